# SPDX-License-Identifier: Apache-2.0
"""A guest of ``hang.py``, over the driver API alone: ``hang_guest.py spin SECONDS | poll SECONDS | steady``.

spin and poll launch a kernel that runs for so long by the GPU's own clock, then synchronize, or ask whether it is done.
steady launches a short kernel and waits for it, again and again, until its input ends. Each prints JSON lines.
"""

from __future__ import annotations

import ctypes
import json
import select
import sys
import time

PTX = b""".version 7.0
.target sm_70
.address_size 64
.visible .entry spin(.param .u64 nanoseconds)
{
    .reg .u64 %rd<5>;
    .reg .pred %p;
    ld.param.u64 %rd1, [nanoseconds];
    mov.u64 %rd2, %globaltimer;
AGAIN:
    mov.u64 %rd3, %globaltimer;
    sub.u64 %rd4, %rd3, %rd2;
    setp.lt.u64 %p, %rd4, %rd1;
    @%p bra AGAIN;
    ret;
}
\0"""
NOT_READY = 600
cuda = ctypes.CDLL("libcuda.so.1")


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def check(status: int) -> None:
    if status:
        say(error=status)
        raise SystemExit(3)


def main() -> None:
    mode = sys.argv[1]
    device, context, module, function = ctypes.c_int(), *(ctypes.c_void_p() for _ in range(3))
    check(cuda.cuInit(0))
    check(cuda.cuDeviceGet(ctypes.byref(device), 0))
    check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    check(cuda.cuCtxSetCurrent(context))
    check(cuda.cuModuleLoadData(ctypes.byref(module), PTX))
    check(cuda.cuModuleGetFunction(ctypes.byref(function), module, b"spin"))
    nanoseconds = ctypes.c_uint64(20_000)
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(nanoseconds))

    def launch(grid: int) -> int:
        return int(cuda.cuLaunchKernel(function, grid, 1, 1, 32, 1, 1, 0, None, parameters, None))

    check(launch(1))
    check(cuda.cuCtxSynchronize())
    say(ready=True)
    if mode == "steady":
        longest, calls, failed = 0.0, 0, 0
        last = time.monotonic()
        while not select.select([sys.stdin], [], [], 0)[0]:
            failed += (launch(1) != 0) + (cuda.cuCtxSynchronize() != 0)
            now = time.monotonic()
            longest, last, calls = max(longest, now - last), now, calls + 2
        say(calls=calls, failed=failed, longest_gap_seconds=longest)
        return
    nanoseconds.value = int(float(sys.argv[2]) * 1e9)
    began = time.monotonic()
    status = launch(7)
    polls = 0
    if mode == "poll":
        while status == 0 or status == NOT_READY:
            status = cuda.cuStreamQuery(None)
            polls += 1
            if status == 0 and time.monotonic() - began > float(sys.argv[2]):
                break
    else:
        status = status or cuda.cuCtxSynchronize()
    say(status=status, seconds=time.monotonic() - began, polls=polls, then=cuda.cuCtxSynchronize())


if __name__ == "__main__":
    main()
