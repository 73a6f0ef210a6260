# SPDX-License-Identifier: Apache-2.0
"""Tests that wait for ever are ended, and told where they waited."""

from __future__ import annotations

import gc
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
import trio

from tests.hang_guard import HangGuard, Hung


def never(words: str) -> None:
    raise AssertionError(words)


def wait_in_a_lock() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def wait_for_a_process() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            process.wait()
        finally:
            process.kill()


def wait_in_trio() -> None:
    async def sleeper() -> None:
        await trio.sleep(60)

    async def start() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sleeper)
            await trio.sleep_forever()

    trio.run(start)


def wait_busily() -> None:
    while True:
        try:
            time.sleep(0.01)
        except Exception:  # noqa: BLE001 - a test that retries whatever happens
            time.sleep(0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("wait", [wait_in_a_lock, wait_for_a_process, wait_in_trio, wait_busily])
def test_what_waits_for_ever_is_interrupted(wait: Callable[[], None]) -> None:
    guard = HangGuard(never)
    began = time.monotonic()
    with pytest.raises(BaseException) as caught, guard.limit("this", 0.3):
        wait()
    assert time.monotonic() - began < 20
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, Hung):
        error = error.__cause__ or error.__context__
    assert isinstance(error, Hung), caught.value
    assert "this is not over after 0.3 s" in str(error)
    assert wait.__name__ in str(error)
    assert ("in sleeper" in str(error)) == (wait is wait_in_trio)
    # What was cut off in the middle of trio's loop leaves here, and not in somebody else's test.
    caught.__dict__.clear()
    del caught, error
    gc.collect()


def test_what_ends_in_time_is_left_alone() -> None:
    guard = HangGuard(never, grace_seconds=0.1)
    before = signal.getsignal(signal.SIGALRM)
    with guard.limit("this", 1.0):
        pass
    assert signal.getsignal(signal.SIGALRM) is before
    time.sleep(1.5)


def test_what_hears_no_signal_ends_the_run() -> None:
    words: list[str] = []
    guard = HangGuard(words.append, grace_seconds=0.2)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    try:
        # Where another thread takes the signal it rings late.
        with suppress(Hung), guard.limit("this", 0.2):
            time.sleep(3)
            signal.sigtimedwait({signal.SIGALRM}, 0)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    (said,) = words
    assert said.startswith("this hears no signal")
    assert "test_what_hears_no_signal_ends_the_run" in said
