# SPDX-License-Identifier: Apache-2.0
"""A program that only wants to compute: counts its calls and checks its sums until its standard input ends.

Every turn copies numbers to the device, lets two kernels work on them, copies them back and checks each one. Prints
``turn N`` now and then, and at the end one JSON object: turns, calls, failed calls, wrong sums, and its longest turn.
"""

from __future__ import annotations

import json
import select
import sys
import time
from array import array

from cuda import WORD, CudaError, Gpu

COUNT = 512
TELL_SECONDS = 0.02


def main() -> int:
    """0 if no call failed and no sum was wrong."""
    gpu = Gpu()
    memory = gpu.allocate(4 * COUNT)
    turns = wrong = 0
    longest = told = 0.0
    failure = ""
    while not select.select([sys.stdin], [], [], 0)[0]:
        turn, began = turns + 1, time.monotonic()
        start = array("I", range(turn, turn + COUNT))
        try:
            gpu.upload(memory, start)
            gpu.mul_add(memory, COUNT, 3, turn)
            gpu.mul_add(memory, COUNT, 5, 7)
            gpu.synchronize()
            got = gpu.download(memory, COUNT)
        except CudaError as error:
            failure = str(error)
            break
        turns = turn
        wrong += got != array("I", [((x * 3 + turn) * 5 + 7) % WORD for x in start])
        now = time.monotonic()
        if turn > 3:  # the first ones compile the kernels
            longest = max(longest, now - began)
        if now - told > TELL_SECONDS:
            told = now
            print(f"turn {turn}", flush=True)
    summary = {
        "turns": turns,
        "calls": gpu.calls,
        "failed": int(bool(failure)),
        "failure": failure,
        "wrong": wrong,
        "longest_turn_ms": round(longest * 1000, 1),
    }
    print(json.dumps(summary), flush=True)
    return int(bool(failure) or bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
