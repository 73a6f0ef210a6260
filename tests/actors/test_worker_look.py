# SPDX-License-Identifier: Apache-2.0
"""Stopped processes are told from those that sleep, compute, or have gone; and waiting for a processor is measured."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.mediator import wait_until
from vgpu.actors.worker_look import REPLAY_THREAD, ReplayThread, is_stopped

# Two of them on one processor: each waits for half of the time. One thread has the name that is looked for.
COMPUTE = f"""
import ctypes, os, threading
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
def compute():
    ctypes.CDLL(None).prctl(15, b"{REPLAY_THREAD}", 0, 0, 0)
    print("ready", flush=True)
    while True:
        pass
thread = threading.Thread(target=compute)
thread.start()
thread.join()
"""


@pytest.fixture
def pair() -> Iterator[list[subprocess.Popen[str]]]:
    processes = [
        subprocess.Popen([sys.executable, "-c", COMPUTE], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    yield processes
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_stopped_process_is_told_from_others(pair: list[subprocess.Popen[str]]) -> None:
    pid = pair[0].pid
    assert not is_stopped(pid)
    assert not is_stopped(os.getpid())
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: is_stopped(pid), 60, "it is stopped")
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: not is_stopped(pid), 60, "it goes on")
    pair[0].kill()
    pair[0].wait()
    assert not is_stopped(pid)


def test_waiting_for_a_processor_is_measured(pair: list[subprocess.Popen[str]]) -> None:
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("this kernel does not count it")
    thread = ReplayThread(pair[0].pid)
    before, began = thread.starved_ns(), time.monotonic_ns()
    wait_until(lambda: thread.starved_ns() - before > 50_000_000, 60, "it has waited for 50 ms")
    assert thread.starved_ns() - before <= time.monotonic_ns() - began


def test_a_process_without_such_a_thread_has_not_waited() -> None:
    assert ReplayThread(os.getpid()).starved_ns() == 0
    assert ReplayThread(0x3FFFFFF).starved_ns() == 0
