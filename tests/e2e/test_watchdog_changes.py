# SPDX-License-Identifier: Apache-2.0
"""A VM's deadline is changed while a kernel of it hangs: what counts is what was said last, to every mediator."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.mediator import wait_until
from tests.e2e.test_watchdog import LAUNCH_TIMEOUT, SLACK, Build, register
from tests.e2e.vm_device import DeviceMediator
from vgpu.supervision._progress import PATIENCE

LONG, SHORT = 60.0, 0.4  # seconds


@pytest.fixture
def mediator() -> Iterator[DeviceMediator]:
    with DeviceMediator() as running:
        yield running


def change(mediator: DeviceMediator, vm: str, seconds: float) -> float:
    """Set it; when that was answered."""
    answer = mediator.call("change_vm", vm_name=vm, watchdog_seconds=seconds)
    assert answer["result"]["vm"]["watchdog_seconds"] == seconds
    return time.monotonic()


def test_a_shorter_deadline_ends_what_has_passed_it_already(
    mediator: DeviceMediator, driver_program: Build, kernels: Path
) -> None:
    register(mediator, "red", watchdog_seconds=LONG)
    register(mediator, "blue", watchdog_seconds=LONG)
    hung, other = (mediator.begin(driver_program("polls"), kernels, vm=vm) for vm in ("red", "blue"))
    for guest in (hung, other):
        guest.until("launching")
    time.sleep(2 * SHORT)
    began = change(mediator, "red", SHORT)
    error, seconds = hung.until("polled", 60).split()[1:]
    found_after = time.monotonic() - began
    assert int(error) == LAUNCH_TIMEOUT
    assert float(seconds) >= 2 * SHORT
    assert found_after < 0.1 + PATIENCE * SHORT + SLACK
    print(f"found {found_after:.3f} s after the change was answered")
    # Nobody else's deadline is another now. (The program is told before the fault is kept.)
    wait_until(lambda: mediator.ask("faults") != [], 60, "the fault is kept")
    assert [fault["vm"] for fault in mediator.ask("faults")] == ["red"]
    assert hung.finish(60)[0] == 0
    other.kill()


def test_a_longer_deadline_holds_for_what_runs(
    mediator: DeviceMediator, driver_program: Build, kernels: Path
) -> None:
    register(mediator, "red", watchdog_seconds=4.0)
    hung = mediator.begin(driver_program("polls"), kernels, vm="red")
    hung.until("launching")
    change(mediator, "red", 6.0)
    error, seconds = hung.until("polled", 60).split()[1:]
    assert int(error) == LAUNCH_TIMEOUT
    assert 6.0 <= float(seconds) < PATIENCE * 6.0 + SLACK
    assert hung.finish(60)[0] == 0


def test_the_next_mediator_knows_the_deadline_that_was_set(
    mediator: DeviceMediator, driver_program: Build, kernels: Path
) -> None:
    """The worker was told the first one, and says that one when it is adopted."""
    register(mediator, "red", watchdog_seconds=LONG)
    hung = mediator.begin(driver_program("polls"), kernels, vm="red")
    hung.until("launching")
    change(mediator, "red", 3.0)
    mediator.kill()
    mediator.start()
    assert int(hung.until("polled", 60).split()[1]) == LAUNCH_TIMEOUT
    assert hung.finish(60)[0] == 0
