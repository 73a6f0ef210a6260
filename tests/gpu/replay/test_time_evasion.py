# SPDX-License-Identifier: Apache-2.0
"""Ways to keep the device without paying for it or without being seen, tried one by one: fences that the guest writes itself,
captures, records that ask for an answer, and streams that no marker is in. And work before a capture, which honest programs wait for.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.gpu.replay.guest import BUSY, HEAD, Replayed, build_fake_driver, replayed, until
from tests.gpu.replay.test_code import function, load
from tests.gpu.replay.test_pulse import watch
from vgpu.gpu._replay import lib
from vgpu.transport._generated_calls import CallId
from vgpu.transport.wire import FLAG_REPLY

ONE, OTHER = (2 << 42 | 1 << 28 | number << 4 for number in (1, 2))
BLOCK, BLOCK_SHORT, BLOCK_FOREVER = (
    32,
    33,
    77,
)  # of fake_device.c: the last two take no time and all the time there is
WORD = 5
RELAXED = 2
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_driver(tmp_path_factory.mktemp("capture"), "fake_capture.c")


@pytest.fixture
def session(driver: Path) -> Iterator[Replayed]:
    fake = ctypes.CDLL(str(driver))
    fake.fakeReset()
    with replayed(driver) as running:
        running.guest.retain()
        for stream in (ONE, OTHER):
            assert running.guest.ask(CallId.cuStreamCreateWithPriority, stream, 1, 0).status == 0
        yield running
        lib.vgpu_replay_stop(running.replay)
        running.thread.join(60)
        fake.fakeReset()  # it must not write into memory that is gone


@pytest.fixture
def kernel(session: Replayed) -> int:
    return function(session.guest, load(session.guest), b"k0")


def shape(milliseconds: int, block: int = BLOCK) -> tuple[int, int, int]:
    return (milliseconds | 1 << 32, 1 | block << 32, 1 | 1 << 32)


def launch(session: Replayed, kernel: int, milliseconds: int, block: int = BLOCK) -> None:
    session.guest.send(CallId.wireLaunch, kernel, *shape(milliseconds, block), 0, ONE, 0)


def forge(session: Replayed) -> None:
    """Fence the stream, say oneself that it is done, and have that believed by another fence."""
    guest = session.guest
    for value in (1, 2):
        guest.send(CallId.wireFence, ONE, WORD, value)
        assert until(lambda: guest.u64(HEAD) == guest.tail)
        guest.set_u64(guest.fences + WORD * 8, value)


# ---- what is at work


def test_a_forged_fence_is_no_end_of_work(session: Replayed, kernel: int) -> None:
    launch(session, kernel, 5000)
    forge(session)
    before = session.grant.get("gpu_ns")
    assert until(lambda: session.grant.get("gpu_ns") - before > 100_000_000, 20)


@pytest.mark.parametrize("how", ["plain", "forged", "captured"])
def test_a_hang_is_seen_whatever_the_guest_makes_up(session: Replayed, kernel: int, how: str) -> None:
    for _ in range(5):
        launch(session, kernel, 1, BLOCK_SHORT)  # the grid is known to be a short one
        for _ in range(50):
            session.guest.ask(CallId.cuStreamQuery, ONE)
    launch(session, kernel, 1, BLOCK_FOREVER)
    if how == "forged":
        forge(session)
    if how == "captured":
        assert session.guest.ask(CallId.cuStreamBeginCapture_v2, ONE, RELAXED).status == 0
    assert watch(session, 30) is not None


@pytest.mark.parametrize("what", ["stream", "context"])
def test_work_before_a_capture_is_waited_for_after_it(session: Replayed, kernel: int, what: str) -> None:
    guest = session.guest
    began = time.monotonic()
    launch(session, kernel, 500)
    assert guest.ask(CallId.cuStreamBeginCapture_v2, ONE, RELAXED).status == 0
    time.sleep(0.05)  # the worker looks at the device
    guest.ask(CallId.cuStreamEndCapture, ONE)
    if what == "stream":
        guest.send(CallId.wireFence, ONE, WORD, 1)
    else:
        guest.send(CallId.wireFenceContext, WORD, 1)
    assert until(lambda: guest.fence(WORD) == 1)
    assert time.monotonic() - began > 0.49


# ---- what is in flight


def taken(session: Replayed, put: Callable[[], None]) -> int:
    """How many of those records a lease of a fifth of a second takes that may have half a millisecond in flight."""
    guest = session.guest
    session.grant.revoke()
    session.kick()
    assert until(lambda: session.grant.get("seen_epoch") == session.grant.get("epoch"))
    before = session.grant.get("records")
    put()
    guest.publish()
    assert until(lambda: guest.u32(BUSY) == 1)
    session.grant.grant(deadline_ns=time.monotonic_ns() + 200_000_000, token=3, in_flight_us=500)
    session.kick()
    time.sleep(0.4)
    return session.grant.get("records") - before


@pytest.mark.parametrize("flags", [0, FLAG_REPLY])
def test_work_in_flight_is_bounded(session: Replayed, kernel: int, flags: int) -> None:
    """A second of kernels; asking for an answer does not make them another's time."""

    def put() -> None:
        for _ in range(200):
            session.guest.put(CallId.wireLaunch, kernel, *shape(5), 0, ONE, 0, flags=flags, slot=1)

    assert taken(session, put) < 100


def test_work_in_flight_is_bounded_in_every_stream(session: Replayed, kernel: int) -> None:
    """The launch behind which the marker comes is always a short one, in another stream."""

    def put() -> None:
        for number in range(200):
            is_last = number % 8 == 7
            where, how_long = (OTHER, 0) if is_last else (ONE, 5)
            session.guest.put(CallId.wireLaunch, kernel, *shape(how_long), 0, where, 0)

    assert taken(session, put) < 100


# ---- code


def test_a_parameter_table_that_was_made_up_breaks_nothing(driver: Path) -> None:
    """In a process of its own: what it broke was the stack."""
    program = """
import sys
from pathlib import Path
from tests.gpu.replay.guest import replayed
from tests.gpu.replay.test_code import function, load
from tests.gpu.replay.test_time_evasion import shape
from vgpu.transport._generated_calls import CallId
with replayed(Path(sys.argv[1])) as session:
    session.guest.retain()
    kernel = function(session.guest, load(session.guest), b"k0")
    print(session.guest.ask(CallId.wireLaunch, kernel, *shape(1), 0, 0, 0).status)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(driver)],
        env={**os.environ, "FAKE_PARAMETERS": "1"},
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip().isdigit()) == (0, True), done.stderr
