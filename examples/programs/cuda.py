# SPDX-License-Identifier: Apache-2.0
"""The few functions of CUDA's driver API that the example programs call, by ctypes: no compiler, no package needed.

Every call is counted, and a call that fails raises ``CudaError``. This is a program's side: it knows ``libcuda.so.1``
and nothing of virtual GPUs.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

# mul_add(pointer, count, factor, summand): pointer[i] = pointer[i] * factor + summand, modulo 2^32.
# spin(nanoseconds): looks at the GPU's clock until so much time has gone by.
PTX = b"""
.version 6.3
.target sm_70
.address_size 64

.visible .entry mul_add(.param .u64 pointer, .param .u32 count, .param .u32 factor, .param .u32 summand)
{
    .reg .pred %p<2>; .reg .b32 %r<11>; .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [pointer];
    ld.param.u32 %r1, [count];
    ld.param.u32 %r2, [factor];
    ld.param.u32 %r3, [summand];
    mov.u32 %r4, %ctaid.x;
    mov.u32 %r5, %ntid.x;
    mov.u32 %r6, %tid.x;
    mad.lo.s32 %r7, %r4, %r5, %r6;
    setp.ge.u32 %p1, %r7, %r1;
    @%p1 bra DONE;
    mul.wide.u32 %rd2, %r7, 4;
    add.s64 %rd3, %rd1, %rd2;
    ld.global.u32 %r8, [%rd3];
    mul.lo.u32 %r9, %r8, %r2;
    add.u32 %r10, %r9, %r3;
    st.global.u32 [%rd3], %r10;
DONE:
    ret;
}

.visible .entry spin(.param .u64 nanoseconds)
{
    .reg .pred %p<2>; .reg .b64 %rd<5>;
    ld.param.u64 %rd1, [nanoseconds];
    mov.u64 %rd2, %globaltimer;
AGAIN:
    mov.u64 %rd3, %globaltimer;
    sub.u64 %rd4, %rd3, %rd2;
    setp.lt.u64 %p1, %rd4, %rd1;
    @%p1 bra AGAIN;
    ret;
}
\0"""

WORD = 1 << 32


class CudaError(Exception):
    """A call failed; ``code`` is its CUresult."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"{name} failed with error {code}")
        self.code = code


class Gpu:
    """Device 0 and its primary context. ``calls`` counts calls that were made, the failed one included.

    Raises:
        CudaError: there is no GPU, or it refuses.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._library = ctypes.CDLL("libcuda.so.1")
        device, self._context, self._module = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self.call("cuCtxSetCurrent", self._context)
        self.call("cuModuleLoadData", ctypes.byref(self._module), PTX)
        self._functions = {name: self._function(name) for name in ("mul_add", "spin")}

    def call(self, name: str, *arguments: object) -> None:
        """One call of the driver API."""
        self.calls += 1
        status = self.status(name, *arguments)
        if status:
            raise CudaError(name, status)

    def status(self, name: str, *arguments: object) -> int:
        """The same, for a caller who expects an error."""
        return int(getattr(self._library, name)(*arguments))

    def _function(self, name: str) -> ctypes.c_void_p:
        function = ctypes.c_void_p()
        self.call("cuModuleGetFunction", ctypes.byref(function), self._module, name.encode())
        return function

    def allocate(self, size: int) -> int:
        """Device memory of ``size`` bytes; its address."""
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return int(address.value)

    def free(self, address: int) -> None:
        """Give it back."""
        self.call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, address: int, words: array[int]) -> None:
        """Copy 32-bit words to the device."""
        size = ctypes.c_size_t(4 * len(words))
        self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), ctypes.c_void_p(words.buffer_info()[0]), size)

    def download(self, address: int, count: int) -> array[int]:
        """Copy 32-bit words from the device; waits for the work before it."""
        words = array("I", bytes(4 * count))
        size = ctypes.c_size_t(4 * count)
        self.call("cuMemcpyDtoH_v2", ctypes.c_void_p(words.buffer_info()[0]), ctypes.c_uint64(address), size)
        return words

    def mul_add(self, address: int, count: int, factor: int, summand: int) -> None:
        """Launch the kernel of that name; does not wait."""
        blocks = -(-count // 256)
        threads = min(count, 256)
        words = [ctypes.c_uint32(value % WORD) for value in (count, factor, summand)]
        self._launch("mul_add", blocks, threads, [ctypes.c_uint64(address), *words])

    def spin(self, seconds: float) -> None:
        """Launch a kernel that runs for so long by the GPU's clock; does not wait."""
        self._launch("spin", 1, 1, [ctypes.c_uint64(int(seconds * 1e9))])

    def _launch(self, name: str, blocks: int, threads: int, values: Sequence[object]) -> None:
        parameters = (ctypes.c_void_p * len(values))(
            *[ctypes.addressof(value) for value in values]  # type: ignore[arg-type]
        )
        shape = (blocks, 1, 1, threads, 1, 1)
        self.call("cuLaunchKernel", self._functions[name], *shape, 0, None, parameters, None)

    def synchronize(self) -> None:
        """Wait until the device has done everything."""
        self.call("cuCtxSynchronize")
