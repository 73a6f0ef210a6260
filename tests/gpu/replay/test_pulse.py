# SPDX-License-Identifier: Apache-2.0
"""What the watchdog is told of the device, against a device that takes time: hangs are seen whatever the guest does, and
queues are none. And what is left to read of a session's last calls."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.gpu.replay.guest import Replayed, build_fake_driver, replayed, until
from tests.gpu.replay.test_code import function, load
from vgpu.gpu._replay import lib
from vgpu.gpu.flight import FLIGHT_SIZE, Flight, read_flight
from vgpu.supervision._progress import Hang, Progress, ProgressWatch
from vgpu.transport._generated_calls import CallId

FOREVER = 60000
DEADLINE = 0.15
PATIENT = 30.0  # seconds: for a hang to be seen on a machine that is busy with other things
STREAM = 2 << 42 | 1 << 28 | 1 << 4


@pytest.fixture(scope="module")
def fake_device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_driver(tmp_path_factory.mktemp("fake"), "fake_device.c")


@pytest.fixture
def session(fake_device: Path) -> Iterator[Replayed]:
    ctypes.CDLL(str(fake_device)).fakeReset()
    with replayed(fake_device) as running:
        running.guest.retain()
        yield running


@pytest.fixture
def kernel(session: Replayed) -> int:
    return function(session.guest, load(session.guest), b"k0")


def launch(session: Replayed, kernel: int, milliseconds: int, stream: int = 0) -> None:
    shape = (milliseconds | 1 << 32, 1 | 32 << 32, 1 | 1 << 32)
    session.guest.send(CallId.wireLaunch, kernel, *shape, 0, stream, 0)


def stream(session: Replayed) -> int:
    handle = STREAM
    while session.guest.ask(CallId.cuStreamCreateWithPriority, handle, 1, 0).status != 0:
        handle += 1 << 4
        assert handle < STREAM + (64 << 4)
    return handle


def look(session: Replayed) -> Progress:
    read = session.grant.get
    looked = read("looked_ns")
    return Progress(
        read("records"),
        read("current_call") != 0,
        read("oldest_mark_ns"),
        read("last_mark_ns"),
        looked,
        read("fences_done"),
        read("oldest_fence_ns"),
    )


def watch(session: Replayed, seconds: float, also: Callable[[], object] = lambda: None) -> Hang | None:
    """Judge the session as the watchdog would, for so long; what it finds."""
    judge = ProgressWatch(int(DEADLINE * 1e9))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        also()
        hang = judge.observe(look(session), time.monotonic_ns())
        if hang is not None:
            return hang
        time.sleep(0.002)
    return None


def flight_of(session: Replayed) -> Flight:
    flight = read_flight(session.grant_fd)
    assert flight is not None
    return flight


def test_layout_is_that_of_the_header() -> None:
    assert lib.VGPU_GRANT_FILE_SIZE == 4096 + FLIGHT_SIZE


def test_a_hung_kernel_is_seen_while_the_guest_polls(session: Replayed, kernel: int) -> None:
    begun = time.monotonic()
    for _ in range(10):
        launch(session, kernel, 1)
    launch(session, kernel, FOREVER)
    launch(session, kernel, 1)
    polls = 0

    def poll() -> None:
        nonlocal polls
        for _ in range(20):
            assert session.guest.ask(CallId.cuStreamQuery, 0).status == 600
            polls += 1

    hang = watch(session, PATIENT, poll)
    assert hang is not None
    assert hang.what == "a kernel"
    assert time.monotonic() - begun >= DEADLINE
    assert polls >= 20
    for _ in range(15):
        poll()  # the flight recorder has nothing but polls now
    assert {call.call for call in flight_of(session).calls} == {"cuStreamQuery"}
    suspect = flight_of(session).suspect
    assert suspect is not None
    assert (suspect.kernel, suspect.grid, suspect.block) == ("k0", (FOREVER, 1, 1), (32, 1, 1))


def test_a_hung_kernel_is_seen_while_nobody_asks(session: Replayed, kernel: int) -> None:
    launch(session, kernel, FOREVER)
    hang = watch(session, PATIENT)
    assert hang is not None


def test_a_long_queue_is_no_hang(session: Replayed, kernel: int) -> None:
    for _ in range(40):
        launch(session, kernel, 25)
    assert watch(session, 1.3) is None
    assert until(lambda: look(session).oldest_mark_ns == 0)


def test_many_short_kernels_need_few_marks(session: Replayed, kernel: int) -> None:
    launch(session, kernel, 1)
    time.sleep(0.05)
    for _ in range(300):
        launch(session, kernel, 1)
    assert watch(session, 0.6) is None


def test_a_hang_among_short_kernels_is_seen(session: Replayed, kernel: int) -> None:
    launch(session, kernel, 1)
    time.sleep(0.05)
    for number in range(100):
        launch(session, kernel, FOREVER if number == 70 else 1)
    assert watch(session, PATIENT) is not None


def test_other_streams_that_get_on_hide_a_hang_for_a_while_only(session: Replayed, kernel: int) -> None:
    other = stream(session)
    launch(session, kernel, FOREVER)
    begun = time.monotonic()
    hang = watch(session, 60, lambda: launch(session, kernel, 1, other))
    assert hang is not None
    assert time.monotonic() - begun >= 4 * DEADLINE


def test_a_stream_that_is_destroyed_is_watched_still(session: Replayed, kernel: int) -> None:
    gone = stream(session)
    launch(session, kernel, 1, gone)
    time.sleep(0.05)
    launch(session, kernel, FOREVER, gone)
    session.guest.send(CallId.cuStreamDestroy_v2, gone)
    assert watch(session, PATIENT) is not None


def test_without_a_lease_nothing_is_judged(session: Replayed, kernel: int) -> None:
    session.grant.revoke()
    session.kick()
    assert until(lambda: session.grant.get("seen_epoch") == session.grant.get("epoch"))
    launch(session, kernel, FOREVER)
    assert watch(session, 3 * DEADLINE) is None
    session.grant.grant(deadline_ns=0)
    session.kick()
    assert watch(session, PATIENT) is not None


def test_a_call_that_does_not_return_is_seen(session: Replayed) -> None:
    session.guest.send(CallId.cuCtxSetLimit, 1000, 1000)  # the call itself takes a second
    hang = watch(session, PATIENT)
    assert hang is not None
    assert hang.what == "a call"
    last = flight_of(session).calls[-1]
    assert (last.call, last.status) == ("cuCtxSetLimit", None)


def test_the_flight_recorder_has_the_last_calls(session: Replayed, kernel: int) -> None:
    before = flight_of(session).taken
    for number in range(400):
        session.guest.send(CallId.cuCtxSetLimit, 2, number)
    launch(session, kernel, 1)
    assert session.guest.ask(CallId.cuCtxSetLimit, 999, 0).status == 215
    flight = flight_of(session)
    assert flight.taken == before + 402
    assert len(flight.calls) == 256
    assert [call.status for call in flight.calls] == [0] * 255 + [215]
    sequences = [call.sequence for call in flight.calls]
    assert sequences == list(range(sequences[0], sequences[0] + 256))
    assert (flight.calls[-2].call, flight.calls[-2].kernel) == ("cuLaunchKernel", "k0")
    times = [call.began_ns for call in flight.calls]
    assert times == sorted(times)
    assert flight.fatal_signal == 0


HOLD = """
#include <time.h>
#include <signal.h>
#include <string.h>
static volatile long milliseconds;
static void hold(int number)
{
    (void)number;
    struct timespec pause = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    nanosleep(&pause, NULL);
}
int prepare(long how_long)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = hold;
    milliseconds = how_long;
    return sigaction(SIGUSR2, &action, NULL);
}
"""


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[[Replayed, float], None]]:
    """Keeps the replay thread, and it alone, from running for so long, as a host with too much to do keeps it."""
    (tmp_path / "hold.c").write_text(HOLD)
    subprocess.run(
        ["gcc", "-shared", "-fPIC", str(tmp_path / "hold.c"), "-o", str(tmp_path / "hold.so")], check=True
    )
    library = ctypes.CDLL(str(tmp_path / "hold.so"))

    def apply(session: Replayed, seconds: float) -> None:
        assert library.prepare(ctypes.c_long(int(seconds * 1000))) == 0
        assert session.thread.ident is not None
        signal.pthread_kill(session.thread.ident, signal.SIGUSR2)

    before = signal.getsignal(signal.SIGUSR2)
    yield apply
    signal.signal(signal.SIGUSR2, before)


def test_time_in_which_nobody_could_look_does_not_count(
    session: Replayed, kernel: int, hold: Callable[[Replayed, float], None]
) -> None:
    """The kernel takes longer than the deadline by the clock, but the device was seen at it for far less."""
    launch(session, kernel, int(4 * DEADLINE * 1000))
    assert until(lambda: look(session).oldest_mark_ns != 0)
    looked = look(session).looked_ns
    hold(session, 3.5 * DEADLINE)
    assert watch(session, 6 * DEADLINE) is None
    assert until(lambda: look(session).oldest_mark_ns == 0)
    assert look(session).looked_ns - looked > 3.5 * DEADLINE * 1e9


def test_a_hang_is_found_though_the_thread_was_kept_from_looking(
    session: Replayed, kernel: int, hold: Callable[[Replayed, float], None]
) -> None:
    launch(session, kernel, FOREVER)
    assert until(lambda: look(session).oldest_mark_ns != 0)
    begun = time.monotonic()
    hold(session, 2 * DEADLINE)
    assert watch(session, PATIENT) is not None
    assert time.monotonic() - begun > 2 * DEADLINE
