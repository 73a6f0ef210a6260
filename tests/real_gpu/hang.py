# SPDX-License-Identifier: Apache-2.0
"""A hung kernel on a real GPU: ``python -m tests.real_gpu.hang [--gpu nvidia|software] [--deadline 2] [--spin 20]``.

In VM "red", with a watchdog of DEADLINE seconds, a program launches a kernel that spins for SPIN seconds by the GPU's own clock;
once it waits for it, once it polls. In VM "blue" a neighbour launches and synchronizes all the while. Prints one JSON object:
how long after the deadline the program was told, the neighbour's longest gap and failed calls, and whether the next
process of "red" works. Exit status 0 when all of it is as promised: 0.1 s, 1 s, 0, yes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import sides

GUEST = Path(__file__).resolve().parent / "programs" / "hang_guest.py"
LAUNCH_TIMEOUT = 702
DETECTION_SECONDS, GAP_SECONDS = 0.1, 1.0


def measure(deadline: float, spin: float) -> dict[str, Any]:
    """Run it all; what came of it."""
    from tests.e2e.vm_device import DeviceMediator  # reads VGPU_TEST_GPU

    with DeviceMediator() as mediator:

        def begin(vm: str, *words: str) -> Any:
            guest = mediator.begin(sys.executable, GUEST, *words, vm=vm)
            assert json.loads(guest.line(90)) == {"ready": True}
            return guest

        mediator.call("register_vm", vm_name="red", watchdog_seconds=deadline)
        mediator.call("set_quarantine_rule", vm_name="red", faults=0)
        neighbour = begin("blue", "steady")
        time.sleep(1)
        hangs = []
        for mode in ("spin", "poll"):
            guest = begin("red", mode, str(spin))
            told = json.loads(guest.line(spin + 30))
            guest.finish(30)
            hangs.append({"mode": mode, **told, "late_seconds": round(told["seconds"] - deadline, 4)})
        following = begin("red", "steady")
        following.say()
        after = json.loads(following.line(30))
        neighbour.say()
        beside = json.loads(neighbour.line(30))
        faults = mediator.ask("faults")
        shown = [{k: f["details"].get(k) for k in ("kernel", "grid", "block", "age_seconds")} for f in faults]
        passed = (
            all(h["status"] == h["then"] == LAUNCH_TIMEOUT and h["late_seconds"] >= 0 for h in hangs)
            and all(h["late_seconds"] <= DETECTION_SECONDS for h in hangs)
            and beside["failed"] == 0
            and beside["longest_gap_seconds"] <= GAP_SECONDS
            and after["failed"] == 0
            and [s["kernel"] for s in shown] == ["spin", "spin"]
        )
        return {
            "gpu": mediator.ask("health")["gpu"],
            "deadline_seconds": deadline,
            "spin_seconds": spin,
            "hangs": hangs,
            "neighbour": beside,
            "next_process_of_the_vm": after,
            "faults": shown,
            "passed": passed,
        }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", choices=("nvidia", "software"), default="nvidia")
    parser.add_argument("--deadline", type=float, default=2.0)
    parser.add_argument("--spin", type=float, default=20.0)
    parser.add_argument("--commit", help="what the record shall say; git is asked otherwise")
    options = parser.parse_args()
    os.environ["VGPU_TEST_GPU"] = options.gpu
    try:
        result = measure(options.deadline, options.spin)
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        result = {"passed": False, "trouble": str(error)[-1500:]}
    print(json.dumps({"machine": sides.machine_facts(options.commit), **result}, indent=1))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
