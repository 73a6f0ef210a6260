# SPDX-License-Identifier: Apache-2.0
"""The mediator looks after itself: a handler that is stuck shows in metrics, log and doctor; and an actor that ends again and again
is held back instead of taking everything with it."""

from __future__ import annotations

import gc
import json
import logging
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial

import attrs
import pytest
import trio
import trio.testing

from tests.e2e import mediator as e2e
from tests.e2e.mediator import SMALL, Mediator
from tests.e2e.test_actor_failures import pytestmark
from vgpu.actors import Actor, ActorSystem, SystemFailed, handles, open_system
from vgpu.actors.metrics import RenderMetrics
from vgpu.gpu.process import WorkerOptions, start_worker
from vgpu.mediator import BACKOFF, GpuPlan, MediatorPlan, mediator_spec, open_mediator
from vgpu.mediator import STUCK_SECONDS as STUCK_LIMIT
from vgpu.supervision import AddChild, ChildSpec, SupervisorSpec

STUCK_SECONDS = 0.5
__all__ = ["pytestmark"]


@attrs.frozen
class Wait:
    """Take for ever."""


class Stuck(Actor):
    """Never finishes its first message."""

    @handles(Wait)
    async def wait(self, message: Wait) -> None:
        await trio.sleep_forever()


class Ailing(Actor):
    """Starts well, and ends at once."""

    async def started(self) -> None:
        self.nursery.start_soon(self._fail)

    async def _fail(self) -> None:
        raise RuntimeError("ailing")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)


def plan_of(outside: Mediator, stuck_seconds: float | None) -> MediatorPlan:
    spawn = partial(start_worker, WorkerOptions(outside.run_dir, e2e.GPU))
    describe: dict[str, object] = {"gpu": "software", "version": "0", "pid": 1}
    return MediatorPlan(
        outside.run_dir, outside.state_dir, (GpuPlan(0, spawn),), describe, stuck_seconds=stuck_seconds
    )


@asynccontextmanager
async def running(stuck_seconds: float) -> AsyncIterator[tuple[ActorSystem, Mediator]]:
    outside = Mediator()
    try:
        async with open_mediator(plan_of(outside, stuck_seconds)) as system:
            yield system, outside
    finally:
        outside.__exit__()
        gc.collect()  # what is left of its workers is found here, and not in somebody else's test


async def findings(outside: Mediator) -> dict[str, dict[str, str]]:
    words = ["--run-dir", str(outside.run_dir), "doctor", "--state-dir", str(outside.state_dir), "--json"]
    done = await trio.run_process(
        [sys.executable, "-P", "-m", "vgpu.admin_main", *words],
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    return {finding["what"]: finding for finding in json.loads(done.stdout)["findings"]}


async def test_a_stuck_handler_shows_in_metrics_log_and_doctor(caplog: pytest.LogCaptureFixture) -> None:
    async with running(STUCK_SECONDS) as (system, outside):
        caplog.set_level(logging.ERROR)
        before = system.statistics().stuck_handlers
        await system.ref("mediator").ask(AddChild(ChildSpec("stuck", Stuck, shutdown=0.1)))
        await system.ref("mediator/stuck").send(Wait())
        with trio.fail_after(60):
            while not any(found.actor == "mediator/stuck" for found in system.recent_stuck_handlers()):
                await trio.sleep(0.05)
        assert system.statistics().stuck_handlers > before
        text = (await system.ref("mediator/metrics").ask(RenderMetrics())).decode()
        (line,) = [line for line in text.splitlines() if line.startswith("vgpu_actors_stuck_handlers_total ")]
        assert float(line.split()[1]) >= 1
        assert "actor mediator/stuck (Wait) has been handling one message for" in caplog.text
        assert "await trio.sleep_forever()" in caplog.text  # where
        found = (await findings(outside))["mediator's handlers"]
        assert found["level"] == "WARN"
        assert "found stuck since it began" in found["found"]
        assert found["remedy"]


async def test_a_mediator_at_rest_has_no_stuck_handlers() -> None:
    """Its usual limit is no false alarm: the first worker is started and an administrator looks meanwhile."""
    async with running(STUCK_LIMIT) as (system, outside):
        await trio.sleep(1.5)
        found = (await findings(outside))["mediator's handlers"]
        assert (found["level"], found["found"]) == ("ok", "none was found stuck")
        assert system.recent_stuck_handlers() == ()


def supervisors(spec: SupervisorSpec) -> Iterator[SupervisorSpec]:
    """A spec and all below it."""
    yield spec
    for child in spec.children:
        made = getattr(child.start, "__self__", None)
        if isinstance(made, SupervisorSpec):
            yield from supervisors(made)


def test_every_supervisor_holds_back_what_ends_too_soon() -> None:
    outside = Mediator()
    try:
        found = list(supervisors(mediator_spec(plan_of(outside, None), [])))
    finally:
        outside.__exit__()
    names = {spec.name for spec in found}
    assert names == {"mediator", "gpus", "gpu0", "executors", "devices", "connections"}
    assert {spec.backoff.reset_after_seconds > 0 for spec in found} == {True}


async def test_an_actor_that_keeps_ending_is_held_back_and_takes_nobody_with_it() -> None:
    """Restarted at once each time it would spend the intensity of the tree in a moment, and end all sessions."""
    async with running(STUCK_SECONDS) as (system, _):
        await system.ref("mediator").ask(AddChild(ChildSpec("ailing", Ailing)))
        ledger = {node.name: node.serial for top in system.tree() for node in top.walk()}["mediator/ledger"]
        await trio.sleep(4)
        nodes = {node.name: node for top in system.tree() for node in top.walk()}
        assert nodes["mediator/ledger"].serial == ledger
        assert 2 <= nodes["mediator/ailing"].restarts <= 8
        assert nodes["mediator/ailing"].state.value in ("restarting", "running", "starting")


async def test_a_back_off_gives_up_in_the_end(autojump_clock: trio.testing.MockClock) -> None:
    """After ten minutes without a life of some length the next one up decides."""
    spec = SupervisorSpec(
        "top", (ChildSpec("ailing", Ailing),), intensity=10, period_seconds=10, backoff=BACKOFF
    )
    began = trio.current_time()
    with pytest.raises(SystemFailed):
        async with open_system(spec, reporter=lambda report: None):
            await trio.sleep_forever()
    assert 550 < trio.current_time() - began < 700
