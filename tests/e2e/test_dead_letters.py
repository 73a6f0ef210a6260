# SPDX-License-Identifier: Apache-2.0
"""Where nothing goes wrong, nobody writes to the dead: sessions come and go, and every message is read or moot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.e2e.mediator import SMALL
from tests.e2e.test_actor_failures import finish, running

SESSIONS = 8


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
