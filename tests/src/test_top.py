# SPDX-License-Identifier: Apache-2.0
"""vgpu-admin top: rates and states out of two looks, and the command on a pipe and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import attrs
import pytest

from tests.e2e.mediator import Mediator, wait_until
from tests.src.test_commands import command
from vgpu.admin_top import Look, rates, summary, tables
from vgpu.trace_views import as_text

ADMIN = "vgpu.admin_main"


def session(number: int, vm: str, taken_ns: int, *, sticky: int = 0, **grant: int) -> dict[str, Any]:
    fields = (
        "gpu_ns",
        "lease_wait_ns",
        "records",
        "bytes_to_device",
        "bytes_from_device",
        "memory_used_bytes",
    )
    return {
        "info": {"session": number, "vm": vm, "program": "[b]train", "guest_pid": 40 + number},
        "taken_ns": taken_ns,
        "grant": {name: grant.get(name, 0) for name in fields},
        "guest": {"sticky_error": sticky},
        "ended": "",
    }


def vm(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "pool": "default",
        "priority": "medium",
        "weight": 50,
        "memory_limit_bytes": 0,
        **changes,
    }


def look(second: int, sessions: list[dict[str, Any]], **changes: Any) -> Look:
    found = Look(
        second * 10**9,
        [vm("blue"), vm("red", memory_limit_bytes=2 << 30)],
        [],
        sessions,
        {},
        [],
        [],
        None,
        {"ok": True, "gpu": "software", "trouble": []},
    )
    return attrs.evolve(found, **changes)


def state_of(now: Look, name: str) -> str:
    found = {vm["name"]: vm["state"] for vm in rates(look(1, []), now)["vms"]}
    return str(found[name])


def test_rates_are_between_two_looks_and_the_busiest_vm_comes_first() -> None:
    before = look(1, [session(1, "red", 10**9, gpu_ns=100, records=10, bytes_to_device=5)])
    now = look(
        3,
        [
            session(1, "red", 3 * 10**9, gpu_ns=100 + 10**9, records=2010, bytes_to_device=2005, memory_used_bytes=1 << 30),
            session(2, "blue", 3 * 10**9, gpu_ns=5 * 10**9, records=9, memory_used_bytes=1 << 20),
        ],
    )  # fmt: skip
    found = rates(before, now)
    assert found["seconds"] == 2
    red, blue = found["vms"]
    assert (red["name"], red["gpu_percent"], red["calls_per_second"], red["state"]) == (
        "red",
        50,
        1000,
        "computes",
    )
    # It was not there before: nothing is known of its rate yet.
    assert (blue["name"], blue["gpu_percent"], blue["calls_per_second"], blue["state"]) == (
        "blue",
        0,
        0,
        "idle",
    )
    text = as_text(*tables(found))
    assert re.search(r"^red +default +medium +50 +50 +- +1 GiB/2 GiB +1000 +1 +computes$", text, re.MULTILINE)
    assert re.search(r"^1 +red +41 +\[b\]train +50 +0 +1000 +1000 B/s +1 GiB +1\.0s$", text, re.MULTILINE)


def test_what_is_most_important_to_say_of_a_vm() -> None:
    idle = [session(1, "red", 10**9)]
    account = {"vm": "red", "is_held_back": True}
    pool = {"vms": {"red": {"waiting": 1, "configured_share": 0.5}}}
    device = {"vm": "red", "running": True, "connected": False}
    for now, word in (
        (look(2, []), "-"),
        (look(2, [], devices=[device]), "VM is off"),
        (look(2, idle), "idle"),
        (look(2, idle, schedules={"gpu0": {"pools": {"default": pool}}}), "waits for GPU"),
        (look(2, idle, accounts=[account]), "held back"),
        (look(2, [session(1, "red", 10**9, sticky=719)], accounts=[account]), "failed"),
        (look(2, idle, devices=[{**device, "running": False}]), "no device"),
        (look(2, idle, devices=[{**device, "running": False}], quarantines=[{"vm": "red"}]), "quarantined"),
    ):
        assert state_of(now, "red") == word


def test_the_line_above_says_how_the_card_is_and_what_is_wrong() -> None:
    card = {"gpu_utilization_percent": 97, "card_memory_used_bytes": 3 << 30, "card_memory_total_bytes": 4 << 30,
            "temperature_celsius": 61, "power_milliwatts": 412_300, "power_limit_milliwatts": 700_000, "sm_clock_mhz": None}  # fmt: skip
    told = summary(rates(look(1, []), look(2, [], gpu=card)))
    assert told == "GPU (software): busy 97 % memory 3 GiB/4 GiB 61 °C 412 W/700 W   VMs: 2   sessions: 0"
    times = {"0": [{"seconds": 10.0, "counted_ratio": 0.946}, {"seconds": 60.0, "counted_ratio": 0.5}]}
    told = summary(rates(look(1, []), look(2, [], gpu=card, gpu_time=times)))
    assert told.startswith("GPU (software): busy 97 % (counted 95 %) memory 3 GiB/4 GiB ")
    health = {"ok": False, "gpu": "nvidia", "trouble": ["one", "two"]}
    assert summary(rates(look(1, []), look(2, [], health=health))).endswith("NOT WELL: one; two")


@pytest.fixture(scope="module")
def mediator() -> Iterator[Mediator]:
    with Mediator() as running:
        yield running


def test_a_program_at_work_is_seen(mediator: Mediator) -> None:
    wait_until(lambda: bool(mediator.workers()), 60, "a worker is warm")
    guest = mediator.begin(sys.executable, "-c", "import ctypes as c; d=c.CDLL('libcuda.so.1'); x=c.c_void_p();"
        "d.cuInit(0); d.cuDevicePrimaryCtxRetain(c.byref(x),0); d.cuCtxSetCurrent(x); p=c.c_uint64();"
        "d.cuMemAlloc_v2(c.byref(p),c.c_size_t(1<<20)); print('ready',flush=True)\n"
        "while True: d.cuMemsetD8_v2(p,1,c.c_size_t(4096)); d.cuCtxSynchronize()", vm="busy")  # fmt: skip
    guest.until("ready")
    done = command(ADMIN, "top", "--once", "--json", "--interval", "0.5", VGPU_RUN_DIR=str(mediator.run_dir))
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    (busy,) = [vm for vm in found["vms"] if vm["name"] == "busy"]
    assert (busy["sessions"], busy["memory_used_bytes"] >= 1 << 20) == (1, True)
    assert busy["calls_per_second"] > 100
    (at_work,) = found["sessions"]
    assert (at_work["vm"], at_work["pid"]) == ("busy", guest.process.pid)
    guest.kill()


def test_many_looks_are_lines_of_json_until_the_reader_goes(mediator: Mediator) -> None:
    words = [sys.executable, "-P", "-m", ADMIN, "top", "--json", "--interval", "0.05"]
    environment = {**os.environ, "VGPU_RUN_DIR": str(mediator.run_dir)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert all(json.loads(process.stdout.readline())["ok"] for _ in range(3))
        process.stdout.close()
        assert process.wait(60) == 0


def test_on_a_terminal_it_is_drawn_until_q_is_pressed(mediator: Mediator) -> None:
    ours, theirs = pty.openpty()
    words = [sys.executable, "-P", "-m", ADMIN, "top", "--interval", "0.2"]
    environment = {
        **os.environ, "VGPU_RUN_DIR": str(mediator.run_dir), "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40",
    }  # fmt: skip
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    try:
        drawn, deadline = "", time.monotonic() + 30
        while drawn.count("q: quit") < 2:
            assert time.monotonic() < deadline, drawn
            if select.select([ours], [], [], 1)[0]:
                drawn += os.read(ours, 65536).decode()
        assert "\x1b[?1049h" in drawn  # a screen of its own
        assert "GPU (software)" in drawn
        os.write(ours, b"q")
        while select.select([ours], [], [], 5)[0]:
            try:
                drawn += os.read(ours, 65536).decode()
            except OSError:
                break
        assert process.wait(60) == 0
        assert "\x1b[?1049l" in drawn
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_without_a_mediator() -> None:
    done = command(ADMIN, "top", "--once", "--run-dir", "/nonexistent")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no mediator at /nonexistent" in done.stderr
