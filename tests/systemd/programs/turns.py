# SPDX-License-Identifier: Apache-2.0
"""A program that computes a little and checks it, some ten times a second, until its standard input ends; prints ``turn N`` each time.

At the end one JSON object: turns, wrong sums, and its longest turn. It leaves the processors to those who are being watched.
"""

from __future__ import annotations

import json
import select
import sys
import time
from array import array
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples" / "programs"))

from cuda import WORD, Gpu

COUNT = 64
PAUSE_SECONDS = 0.1


def main() -> int:
    """0 if no sum was wrong."""
    gpu = Gpu()
    memory = gpu.allocate(4 * COUNT)
    turns = wrong = 0
    longest = 0.0
    while not select.select([sys.stdin], [], [], PAUSE_SECONDS)[0]:
        turns, began = turns + 1, time.monotonic()
        gpu.upload(memory, array("I", range(turns, turns + COUNT)))
        gpu.mul_add(memory, COUNT, 3, turns)
        gpu.synchronize()
        got = gpu.download(memory, COUNT)
        wrong += got != array("I", [(x * 3 + turns) % WORD for x in range(turns, turns + COUNT)])
        longest = max(longest, time.monotonic() - began)
        print(f"turn {turns}", flush=True)
    print(
        json.dumps({"turns": turns, "wrong": wrong, "longest_turn_ms": round(longest * 1000, 1)}), flush=True
    )
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
