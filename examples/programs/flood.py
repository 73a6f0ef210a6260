# SPDX-License-Identifier: Apache-2.0
"""A program that launches as fast as it can and never waits: flood.py [SECONDS [LAUNCHES [WORDS]]]. SIGTERM has it stop.

Each launch number k computes x = x * 31 + k on WORDS words (1), so a launch that is lost, done twice or overtaken gives another
number at the end. Prints one JSON object: launches, seconds, and whether the number is right.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time

from cuda import WORD, Gpu


def main() -> int:
    """0 if every launch took effect, in order."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 3.0
    limit = int(sys.argv[2]) if len(sys.argv) > 2 else 1 << 62
    words = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    told_to_stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told_to_stop.set())
    gpu = Gpu()
    memory = gpu.allocate(4 * words)
    gpu.mul_add(memory, words, 0, 1)
    gpu.synchronize()
    print("flooding", flush=True)
    expected, launches, began = 1, 0, time.monotonic()
    while launches < limit and time.monotonic() - began < seconds and not told_to_stop.is_set():
        launches += 1
        gpu.mul_add(memory, words, 31, launches)
        expected = (expected * 31 + launches) % WORD
    launched = time.monotonic() - began
    is_right = gpu.download(memory, 1)[0] == expected
    took = time.monotonic() - began
    # All is done, and it ends by itself: Python takes its handlers back first, and who tells it to stop then would kill it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    report = {
        "launches": launches,
        "calls": gpu.calls,
        "launch_seconds": round(launched, 2),
        "seconds": round(took, 2),
        "is_right": is_right,
    }
    print(json.dumps(report), flush=True)
    return int(not is_right)


if __name__ == "__main__":
    raise SystemExit(main())
