# SPDX-License-Identifier: Apache-2.0
"""No test waits for ever: past its limit it fails, with what every thread was doing; and where not even that can interrupt it, the
whole run ends.

The first is an alarm signal, whose handler raises in the main thread: it interrupts system calls, locks and Python code. In the middle
of trio's loop that would leave ruins for the tests that follow, so there it is an interrupt as from the keyboard first, which trio
knows to deliver. The second is a thread, for a test that sits in native code and hears no signal.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import attrs
import pytest
import trio

TEST_SECONDS = 300.0
# Fixtures of the whole session build compilers' environments and images of machines.
SETUP_SECONDS = 1200.0
# Tests with a machine of their own (marks "vm" and "gpu").
MACHINE_SECONDS = 1800.0
# After the alarm, until the run is ended.
GRACE_SECONDS = 60.0
# Between two alarms, where the first did not end it.
AGAIN_SECONDS = 10.0
EXIT_STATUS = 70


class Hung(BaseException):
    """A test went past its limit. No Exception: a test that swallows those must not swallow this."""


def stacks() -> str:
    """What every thread is doing now."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read()


def tasks() -> str:
    """Where every task of the running trio loop waits."""
    lines = []
    waiting = [trio.lowlevel.current_root_task()]
    while waiting:
        task = waiting.pop()
        if task is None:
            continue
        frames = traceback.StackSummary.extract(iter(task.iter_await_frames())).format()
        lines += [f"Task {task.name} (outermost call first):\n", *frames]
        waiting += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return "".join(lines)


def limit_of(item: pytest.Item, phase: str) -> float:
    """Seconds that this phase of a test may take."""
    if any(item.get_closest_marker(name) is not None for name in ("vm", "gpu")):
        return MACHINE_SECONDS
    return SETUP_SECONDS if phase == "setup" else TEST_SECONDS


@attrs.define(eq=False)
class HangGuard:
    """One for each run; ``last_resort`` gets the words, and ends the process where it is the real one."""

    last_resort: Callable[[str], None]
    grace_seconds: float = GRACE_SECONDS
    _ends: float = 0.0  # when the run is to be ended; 0: nothing is being watched
    _what: str = ""
    _thread: threading.Thread | None = None

    @contextmanager
    def limit(self, what: str, seconds: float) -> Iterator[None]:
        """Raises Hung in the main thread when the block takes longer."""

        rung: list[str] = []

        def ring(number: int, frame: FrameType | None) -> None:
            rung.append(f"{what} is not over after {seconds:g} s\n{stacks()}")
            if trio.lowlevel.in_trio_run() and len(rung) == 1:
                rung[0] += tasks()
                signal.raise_signal(signal.SIGINT)
            else:
                raise Hung(rung[0])

        before = signal.signal(signal.SIGALRM, ring)
        self._what, self._ends = what, time.monotonic() + seconds + self.grace_seconds
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="hang guard", daemon=True)
            self._thread.start()
        began = time.monotonic()
        left, _ = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)
        try:
            yield
        except BaseException as error:
            if rung and not isinstance(error, Hung):
                raise Hung(rung[0]) from error
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            self._ends = 0.0
            if left:  # somebody else's, around this one
                signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 0.001))

    def _watch(self) -> None:
        # A signal that comes here does not interrupt the main thread.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            time.sleep(min(1.0, self.grace_seconds / 4))
            ends = self._ends
            if ends and time.monotonic() > ends:
                self.last_resort(f"{self._what} hears no signal; the run is ended\n{stacks()}")
                return


def end_run(config: pytest.Config) -> Callable[[str], None]:
    """The last resort of a real run."""

    def end(words: str) -> None:
        with suppress(Exception):
            config.pluginmanager.getplugin("capturemanager").suspend_global_capture(in_=False)
        print(words, file=sys.stderr, flush=True)
        os._exit(EXIT_STATUS)

    return end
