# SPDX-License-Identifier: Apache-2.0
"""Where nothing goes wrong, nobody writes to the dead: sessions come and go, and every message is read or moot. What was not
read is told by ``vgpu-admin doctor`` and ``vgpu-trace tree``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.e2e.mediator import SMALL
from tests.e2e.test_actor_failures import finish, in_thread, pytestmark, running
from tests.src.test_commands import command
from vgpu import doctor
from vgpu.actors.messages import ApplyLimits, ShowDevice, VmRecord

SESSIONS = 8
__all__ = ["pytestmark"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)


async def test_sessions_that_come_and_go_leave_no_dead_letters(
    driver_program: Callable[[str], Path], kernels: Path
) -> None:
    """Half of the guests end by themselves, half are killed: a worker then hears of it as soon as the connection does."""
    async with running(driver_program, kernels) as mediator:
        for number in range(SESSIONS):
            guest = await mediator.begin()
            if number % 2:
                guest.kill()
            else:
                await finish(guest)
        while await mediator.sessions():
            await trio.sleep(0.02)
        statistics = mediator.system.statistics()
        assert mediator.system.recent_dead_letters() == ()
        assert statistics.dead_letters == 0
        answer = mediator.outside.ask
        shown = await trio.to_thread.run_sync(lambda: answer("runtime"))
        assert shown["dead_letters"] == []
        assert shown["statistics"]["dead_letters"] == 0
        # What used to be dead letters, unless the executor was slow enough to read them all.
        assert shown["statistics"]["moot_notices"] <= SESSIONS


async def test_what_nobody_read_is_told(driver_program: Callable[[str], Path], kernels: Path) -> None:
    async with running(driver_program, kernels) as mediator:
        run_dir = mediator.outside.run_dir
        for message in (ApplyLimits(VmRecord("red")), ApplyLimits(VmRecord("red")), ShowDevice()):
            await mediator.system.ref("mediator/nobody").send(message)
        (found,) = doctor._dead_letters(await in_thread(mediator.outside.ask, "runtime"))
        assert found.level == doctor.WARN
        assert found.found.startswith("3 not read since it began, the last: ")
        assert "ago ShowDevice from somebody to mediator/nobody; " in found.found
        shown = await in_thread(partial(command, "vgpu.trace_main", "tree", "--once", "--run-dir", run_dir))
        header, newest, before = shown.stdout.partition("\n\n")[2].splitlines()
        assert header.split() == ["NOT", "READ", "BY", "MESSAGE", "FROM", "COUNT", "LAST"]
        assert newest.split()[:4] == ["mediator/nobody", "ShowDevice", "-", "1"]
        assert before.split()[:4] == ["mediator/nobody", "ApplyLimits", "-", "2"]
