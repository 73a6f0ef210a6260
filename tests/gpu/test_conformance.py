# SPDX-License-Identifier: Apache-2.0
"""The conformance suite on the software GPU, and that the suite itself notices a driver that is wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from vgpu.gpu import testing
from vgpu.gpu.conformance import CHECKS


@functools.cache
def software() -> testing.OpenDriver:
    """One software GPU for all checks of this process."""
    return testing.open_driver("software")


@pytest.mark.parametrize("name", testing.names(fatal=False))
def test_software_gpu_conforms(name: str) -> None:
    assert testing.run_check(software(), CHECKS[name]).problem == ""


@pytest.mark.parametrize("name", testing.names(fatal=True))
def test_software_gpu_faults_as_a_real_one(name: str) -> None:
    assert testing.run_in_process(name, "software").problem == ""


@pytest.mark.gpu
def test_real_driver_conforms() -> None:
    opened = testing.open_driver("nvidia")
    outcomes = testing.check_driver(opened.driver, opened.ffi, kind="nvidia")
    outcomes += [testing.run_in_process(name, "nvidia") for name in testing.names(fatal=True)]
    assert [outcome for outcome in outcomes if outcome.problem] == []


def _replaced(entry: str, make: Callable[[Any], Callable[..., int]]) -> list[testing.Outcome]:
    """All outcomes on a software GPU with one function replaced."""
    opened = testing.open_driver("software")
    real = getattr(opened.driver, entry)
    wrong = opened.ffi.callback(opened.ffi.typeof(real), make(real))
    setattr(opened.driver, entry, wrong)
    return testing.check_driver(
        opened.driver, opened.ffi, kind="software", only=["memory.allocation", "memory.memsets"]
    )


def test_a_driver_that_succeeds_at_everything_is_noticed() -> None:
    outcomes = _replaced("cuMemFree_v2", lambda real: lambda address: 0)
    assert "cuMemFree_v2 returned 0" in {o.name: o for o in outcomes}["memory.allocation"].problem


def test_a_driver_that_writes_the_wrong_bytes_is_noticed() -> None:
    def wrong(real: Any) -> Callable[..., int]:
        return lambda address, value, count, stream: int(real(address, value ^ 1, count, stream))

    outcomes = {o.name: o.problem for o in _replaced("cuMemsetD8Async", wrong)}
    assert outcomes["memory.allocation"] == ""
    assert "memory after all memsets" in outcomes["memory.memsets"]


def test_wrong_use_is_exit_status_2() -> None:
    with pytest.raises(SystemExit) as caught:
        testing.main(["--gpu", "software", "--only", "no.such.check"])
    assert caught.value.code == 2
