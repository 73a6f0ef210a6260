# SPDX-License-Identifier: Apache-2.0
"""Specs are checked when they are made, and say which field and which value is wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest

from vgpu.actors import Actor
from vgpu.supervision import (
    AutoShutdown,
    ChildKind,
    ChildSpec,
    Restart,
    ShutdownMode,
    SpecError,
    Strategy,
    Supervisor,
    SupervisorSpec,
)


def test_defaults_are_otps() -> None:
    child = ChildSpec("a", Actor)
    assert (child.restart, child.shutdown, child.significant) == (Restart.PERMANENT, 5.0, False)
    spec = SupervisorSpec("s", [child])
    assert (spec.strategy, spec.intensity, spec.period_seconds) == (Strategy.ONE_FOR_ONE, 1, 5.0)
    assert spec.auto_shutdown is AutoShutdown.NEVER


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": ""}, "ChildSpec '': id must be a non-empty string without '/', got ''"),
        ({"id": "a/b"}, "id must be a non-empty string without '/', got 'a/b'"),
        ({"id": 7}, "id must be .*, got 7"),
        ({"start": "Actor"}, "ChildSpec 'a': start must be a callable that makes an Actor, got 'Actor'"),
        ({"restart": "always"}, "ChildSpec 'a': restart must be one of Restart.PERMANENT, .*, got 'always'"),
        ({"shutdown": -1}, "shutdown must be a number of seconds from 0, or a ShutdownMode, got -1"),
        ({"shutdown": math.inf}, "shutdown must be .*, got inf"),
        ({"shutdown": math.nan}, "shutdown must be .*, got nan"),
        ({"shutdown": "5 s"}, "shutdown must be .*, got '5 s'"),
        ({"shutdown": True}, "shutdown must be .*, got True"),
        ({"significant": 1}, "significant must be True or False, got 1"),
        ({"significant": True}, "significant must be False for a permanent child"),
        ({"name": ""}, "name must be a non-empty string or None, got ''"),
        ({"start_timeout_seconds": 0}, "start_timeout_seconds must be a number of seconds above 0, got 0"),
        ({"start_timeout_seconds": None}, "start_timeout_seconds must be .*, got None"),
        ({"kind": "worker"}, "kind must be one of ChildKind.WORKER, ChildKind.SUPERVISOR, got 'worker'"),
        ({"kind": ChildKind.SUPERVISOR}, "shutdown must be INFINITY for a supervisor"),
    ],
)
def test_a_wrong_child(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        ChildSpec(**{"id": "a", "start": Actor, **fields})


A = ChildSpec("a", Actor)
NAMED = ChildSpec("a", Actor, name="fixed")
SIGNIFICANT = ChildSpec("a", Actor, restart=Restart.TRANSIENT, significant=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "SupervisorSpec '': name must be a non-empty string"),
        ({"strategy": "one_for_one"}, "SupervisorSpec 's': strategy must be one of Strategy.ONE_FOR_ONE"),
        ({"intensity": -1}, "intensity must be a whole number from 0, got -1"),
        ({"intensity": 1.5}, "intensity must be a whole number from 0, got 1.5"),
        ({"intensity": True}, "intensity must be a whole number from 0, got True"),
        ({"period_seconds": 0}, "period_seconds must be a number of seconds above 0, got 0"),
        ({"period_seconds": math.inf}, "period_seconds must be .*, got inf"),
        ({"auto_shutdown": None}, "auto_shutdown must be one of AutoShutdown.NEVER, .*, got None"),
        ({"backoff": 3}, "backoff must be a Backoff, got 3"),
        ({"children": [A, A]}, "children must be of different ids, got 'a'"),
        ({"children": ["a"]}, "children must be ChildSpecs and SupervisorSpecs, got 'a'"),
        ({"strategy": Strategy.SIMPLE_ONE_FOR_ONE}, "children must be exactly one template .*, got 0"),
        (
            {"strategy": Strategy.SIMPLE_ONE_FOR_ONE, "children": [NAMED]},
            "children must be a template without a fixed name, got 'fixed'",
        ),
        ({"children": [SIGNIFICANT]}, "auto_shutdown must be set, as child 'a' is significant"),
    ],
)
def test_a_wrong_supervisor(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        SupervisorSpec(**{"name": "s", **fields})


def test_a_supervisor_is_listed_as_a_child() -> None:
    inner = SupervisorSpec("inner", [A], restart=Restart.TRANSIENT)
    outer = SupervisorSpec("outer", [A.__class__("first", Actor), inner])
    child = outer.children[1]
    assert (child.id, child.kind, child.restart) == ("inner", ChildKind.SUPERVISOR, Restart.TRANSIENT)
    assert child.shutdown is ShutdownMode.INFINITY
    assert isinstance(child.start(), Supervisor)
