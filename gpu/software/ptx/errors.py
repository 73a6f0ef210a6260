# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with PTX, at load and at launch.

    PtxError                    the text is not PTX we can read (CUDA_ERROR_INVALID_PTX)
    UnsupportedPtx              valid, perhaps, but not built; names the instruction (CUDA_ERROR_NOT_SUPPORTED)
    LaunchError                 a kernel that ran and failed
    ├── Trap                    `trap` (CUDA error 718-class: launch failure)
    ├── AssertFailure           device assert() (CUDA error 710)
    ├── BarrierDeadlock         every live thread waits at a barrier that cannot complete
    └── LaunchInterrupted       the caller's deadline said stop

Address faults are `IllegalAddress` and `MisalignedAddress` of `vgpu.gpu.software.memory`.
"""

from __future__ import annotations


class PtxError(Exception):
    """The PTX text cannot be read."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(f"line {line}: {message}" if line else message)
        self.line = line


class UnsupportedPtx(Exception):
    """The kernel needs something this device does not execute."""

    def __init__(self, instruction: str, line: int = 0, reason: str = "") -> None:
        place = f"line {line}: " if line else ""
        super().__init__(f"{place}unsupported PTX: {instruction}" + (f" ({reason})" if reason else ""))
        self.instruction = instruction
        self.line = line


class LaunchError(Exception):
    """A kernel failed while it ran."""


class Trap(LaunchError):
    """The kernel executed `trap`."""


class AssertFailure(LaunchError):
    """A device-side assert() failed; `text` is what CUDA prints, one line for each thread that failed."""

    def __init__(self, text: str) -> None:
        super().__init__(text.splitlines()[0] if text else "device-side assert")
        self.text = text


class BarrierDeadlock(LaunchError):
    """No thread can go on: a barrier waits for threads that will never come. A real GPU would hang."""


class LaunchInterrupted(LaunchError):
    """The deadline callback asked for the launch to stop."""
