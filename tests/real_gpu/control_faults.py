# SPDX-License-Identifier: Apache-2.0
"""Step ``faults`` of ``control.py``: what goes wrong in one VM, beside a neighbour that computes, checks and must not notice.

An illegal address, a worker and a guest that are killed, garbage in the ring, a VM that dies, a device process that is killed,
and kernels that hang until their VM is quarantined. Each is tried by itself: one that does not go as promised leaves the others to be seen. Kernels that "hang" end by
the GPU's own clock.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.e2e.mediator import is_alive, wait_until

from .control_devices import device_killed, vm_dies
from .control_host import MIB, Findings, Host, Load, Neighbour, Scene, open_host, open_native, without_paths

ILLEGAL_ADDRESS, LAUNCH_TIMEOUT, DEVICE_UNAVAILABLE, INVALID_VALUE = 700, 702, 46, 1
DEADLINE = 1.0
# On a busy machine without a GPU a hang may be found later: what its worker had no processor for is not counted.
SPIN = {"nvidia": 4.0, "software": 15.0}
GONE_SECONDS, DETECTION_SECONDS, GAP_MS = 2.0, 0.1, 1000.0
FAULTS = 3


def measure(scene: Scene, found: Findings) -> None:
    """All of them, one after the other."""
    with open_host(scene) as host, open_native(scene) as native:
        host.change("register_vm", vm_name="hangs", watchdog_seconds=DEADLINE, bar1_bytes=0)
        calm = host.load(scene, "calm")
        host.settle()
        with Neighbour(calm, scene.pick(2000, 2), found):
            faults: dict[str, Callable[[Findings], None]] = {
                "illegal address": lambda part: _illegal(scene, host, part),
                "guest killed in mid-copy": lambda part: _killed_guest(scene, host, native, part),
                "worker killed": lambda part: _killed_worker(scene, host, part),
                "garbage in the ring": lambda part: _garbage(host, part),
                "VM dies": lambda part: vm_dies(scene, host, native, part),
                "device process killed": lambda part: device_killed(host, part),
                "hung kernels": lambda part: _hangs(scene, host, part),
            }
            for name, happen in faults.items():
                part = found.child(name)
                try:
                    happen(part)
                except (AssertionError, OSError, ValueError) as error:
                    part.put(
                        "trouble",
                        {"what": without_paths(f"{type(error).__name__}: {error}")[-800:], "where": []},
                    )
        gap = found.values.get("neighbour", {}).get("longest_turn_ms")
        found.judge("neighbour's longest gap at most 1 s", gap is not None and gap <= GAP_MS, of_speed=True)
        found.put("ledger", [[f["vm"], f.get("kind"), f["error"]] for f in host.ask("faults")])


def _works(scene: Scene, host: Host, vm: str, part: Findings) -> None:
    """The next process of the VM computes and is right."""
    load = host.load(scene, vm)
    turns, _, failed, wrong, _, _ = load.ask("turns", 0.3, scene.pick(2000, 2))
    part.judge("the VM's next process works", turns > 0 and (failed, wrong) == (0, 0))
    load.guest.finish(20)


def _illegal(scene: Scene, host: Host, part: Findings) -> None:
    load = host.load(scene, "pokes")
    status, then = load.ask("poke")
    part.put("statuses", [status, then])
    part.judge("CUDA_ERROR_ILLEGAL_ADDRESS, and it stays", [status, then] == [ILLEGAL_ADDRESS] * 2)
    load.kill()
    _works(scene, host, "pokes", part)


def _killed_guest(scene: Scene, host: Host, native: Load | None, part: Findings) -> None:
    """Thrice, at another moment of the copy each time; memory by the sessions, and by the card where there is one."""
    size, held = scene.pick(256, 16) * MIB, scene.pick(4096, 64) * MIB
    rounds = []
    for number in range(scene.times(3)):
        load = host.load(scene, "victim")
        assert load.ask("alloc", held) == [0]
        load.say("copy-for-ever", size)
        load.guest.until("copying")
        worker = int(host.session_of(load.guest)["info"]["worker_pid"])
        host.settle()
        time.sleep(0.02 + 0.013 * number)
        before = None if native is None else native.ask("info")[1]
        load.kill()
        killed = time.monotonic()
        wait_until(lambda worker=worker: not is_alive(worker), 10, "the worker is gone")  # type: ignore[misc]
        gone = time.monotonic() - killed
        wait_until(lambda: not host.of_vm("victim"), 10, "its session has ended")
        ended = time.monotonic() - killed
        one: dict[str, Any] = {"worker_gone_seconds": gone, "session_ended_seconds": ended}
        if native is not None and before is not None:
            # Its context is gone with it, so more than it held is free again.
            wait_until(lambda before=before: native.ask("info")[1] >= before + held, 10, "its memory is free")  # type: ignore[misc]
            one["memory_free_on_the_card_seconds"] = time.monotonic() - killed
        rounds.append(one)
    part.put("held_bytes", held + size)
    part.put("rounds", rounds)
    part.judge(
        "all is gone within 2 s",
        all(value < GONE_SECONDS for one in rounds for value in one.values()),
        of_speed=True,
    )
    _works(scene, host, "victim", part)


def _killed_worker(scene: Scene, host: Host, part: Findings) -> None:
    load = host.load(scene, "orphan")
    load.say("turns", 0, scene.pick(2000, 2))
    time.sleep(0.3)
    worker = int(host.session_of(load.guest)["info"]["worker_pid"])
    killed = time.monotonic()
    os.kill(worker, signal.SIGKILL)
    turns, _, failed, wrong, _, _ = load.answer()
    part.put("told_after_seconds", time.monotonic() - killed)
    part.put("turns_before", turns)
    part.judge("its program gets an error, and had no wrong number", failed > 0 and wrong == 0)
    load.kill()
    _works(scene, host, "orphan", part)


def _garbage(host: Host, part: Findings) -> None:
    """Records that no guest library writes, by hand."""
    import random
    import sys

    examples = str(Path(__file__).resolve().parents[2] / "examples")
    if examples not in sys.path:
        sys.path.append(examples)
    from _raw_guest import RawGuest

    from vgpu.transport.wire import CallHeader, CallId

    noise = random.Random(21)
    headers = {
        "noise": (noise.randbytes(4096), None),
        "a payload of 4 GiB": (CallHeader(CallId.cuCtxGetLimit, payload_length=0xFFFFFFF0).encode(), None),
        "a tail far ahead": (CallHeader(CallId.cuCtxGetLimit).encode(), 1 << 60),
    }
    errors = {}
    for number, (name, (data, tail)) in enumerate(headers.items()):
        with RawGuest(host.run_dir, f"hostile-{number}") as guest:
            guest.put(data)
            guest.publish(tail)
            guest.ring_bell()
            wait_until(lambda guest=guest: guest.is_dead, 10, f"{name}: its session is ended")  # type: ignore[misc]
            errors[name] = guest.sticky
    part.put("sessions_ended_with", errors)
    part.judge("each session ended with its own error", set(errors.values()) == {INVALID_VALUE})


def _hangs(scene: Scene, host: Host, part: Findings) -> None:
    """Three times past the deadline; quarantined; cleared."""
    hangs = []
    for _ in range(FAULTS):
        load = host.load(scene, "hangs")
        status, taken, then = load.ask("spin", SPIN[scene.gpu])
        hangs.append({"status": status, "then": then, "late_seconds": taken / 1e9 - DEADLINE})
        load.kill()
    part.put("hangs", hangs)
    part.judge(
        "CUDA_ERROR_LAUNCH_TIMEOUT, and it stays",
        all(h["status"] == h["then"] == LAUNCH_TIMEOUT for h in hangs),
    )
    late = [h["late_seconds"] for h in hangs]
    part.judge("not before the deadline", min(late) >= 0)
    part.judge("within 0.1 s of the deadline", max(late) <= DETECTION_SECONDS, of_speed=True)
    wait_until(lambda: [q["vm"] for q in host.ask("quarantines")] == ["hangs"], 10, "the VM is quarantined")
    refused = host.begin(scene.program, vm="hangs")
    said = refused.line(30)
    part.put("new_session_while_quarantined", said.split(":")[0])
    part.judge("new sessions are refused", said.startswith(f"failed {DEVICE_UNAVAILABLE}:"))
    refused.kill()
    host.change("clear_quarantine", vm_name="hangs")
    shown = [f["details"] for f in host.ask("faults") if f["vm"] == "hangs"]
    part.put("faults", [{k: d.get(k) for k in ("kernel", "grid", "block", "age_seconds")} for d in shown])
    part.judge("the faults name the kernel", [d.get("kernel") for d in shown] == ["spin"] * FAULTS)
    _works(scene, host, "hangs", part)
