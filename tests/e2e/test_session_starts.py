# SPDX-License-Identifier: Apache-2.0
"""A guest that starts programs in a loop floods neither the ledger nor the pool of workers, and keeps nobody else out."""

from __future__ import annotations

import socket
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from tests.e2e.mediator import Mediator, wait_until
from vgpu.gpu.process import _answers
from vgpu.transport._generated_calls import TABLE_HASH
from vgpu.transport.attach import WELCOME_SIZE, Hello, Status, Welcome

RATE, BURST, WARM = 2.0, 3, 4
HASTE = 25


@pytest.fixture
def mediator() -> Iterator[Mediator]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mediator.toml"
        path.write_text(
            f"[mediator]\nsession_starts_per_second = {RATE}\nsession_starts_burst = {BURST}\nwarm_workers = {WARM}\n"
        )
        with Mediator(options=["--config", str(path)]) as running:
            # Whoever waits for a worker to start is slower than the rate by that alone.
            sockets = running.run_dir / "workers"
            wait_until(
                lambda: sum(trio.run(_answers, path) for path in sockets.glob("*.sock")) == WARM,
                60,
                "all are warm",
            )
            yield running


def knock(mediator: Mediator, vm: str) -> Welcome:
    """A process that asks for a session, and ends."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(60)
        link.connect(str(mediator.run_dir / "mediator.sock"))
        link.sendall(Hello(1, TABLE_HASH, vm=vm, program="loop").encode())
        data, descriptors, _, _ = socket.recv_fds(link, WELCOME_SIZE, 4)
        for descriptor in descriptors:
            socket.close(descriptor)
        return Welcome.decode(data)


def test_a_loop_of_programs_is_slowed_down(mediator: Mediator, driver_program: Callable[[str], Path]) -> None:
    began = time.monotonic()
    answers = [knock(mediator, "loop") for _ in range(HASTE)]
    # A program that really wants one waits, and gets it: its library asks again.
    patient = mediator.begin(driver_program("teller"), vm="loop")
    assert knock(mediator, "neighbour").status is Status.WELCOME
    patient.until("ready")
    seconds = time.monotonic() - began
    welcome = [answer for answer in answers if answer.status is Status.WELCOME]
    busy = [answer for answer in answers if answer.status is Status.BUSY]
    assert busy
    assert len(welcome) + len(busy) == HASTE
    assert BURST <= len(welcome) <= BURST + RATE * seconds
    assert all(200 <= answer.retry_milliseconds <= 1000 / RATE for answer in busy)
    with sqlite3.connect(mediator.state_dir / "ledger.sqlite") as database:
        rows = database.execute("SELECT count(*) FROM sessions WHERE vm IN ('', 'loop')").fetchone()[0]
    assert rows <= BURST + RATE * seconds
    assert patient.finish()[0] == 0
