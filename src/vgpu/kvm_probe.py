# SPDX-License-Identifier: Apache-2.0
"""Does /dev/kvm really run code? ``python -m vgpu.kvm_probe`` makes a virtual machine of one page and runs three instructions.

A device node says little: in many containers and nested clouds it exists, opens, and then cannot run anything. Run it as a
process of its own with a time limit: on a host that is broken in the right way, the run itself never returns. Prints one
line, ``ok`` or what failed.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import sys
from typing import Final

# Linux's numbers for x86-64 (linux/kvm.h).
GET_API_VERSION: Final = 0xAE00
CREATE_VM: Final = 0xAE01
GET_VCPU_MMAP_SIZE: Final = 0xAE04
SET_USER_MEMORY_REGION: Final = 0x4020AE46
CREATE_VCPU: Final = 0xAE41
RUN: Final = 0xAE80
SET_REGS: Final = 0x4090AE82
GET_SREGS: Final = 0x8138AE83
SET_SREGS: Final = 0x4138AE84
API_VERSION: Final = 12
EXIT_IO: Final = 2
EXIT_REASON_OFFSET: Final = 8
SREGS_BYTES: Final = 312
PORT: Final = 0xE9
# mov al, 42; out 0xe9, al; hlt
CODE: Final = bytes((0xB0, 42, 0xE6, PORT, 0xF4))
CODE_AT: Final = 0x1000
FLAGS: Final = 2  # the bit that is always set


def probe(path: str = "/dev/kvm") -> str:
    """``ok``, or what failed. May block for ever."""
    step = "open it"
    try:
        with open(path, "r+b", buffering=0) as kvm:
            step = "ask its version"
            version = fcntl.ioctl(kvm, GET_API_VERSION)
            if version != API_VERSION:
                return f"it speaks version {version}, expected {API_VERSION}"
            step = "make a virtual machine"
            machine = fcntl.ioctl(kvm, CREATE_VM, 0)
            page = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
            page[: len(CODE)] = CODE
            step = "give it memory"
            region = struct.pack("<IIQQQ", 0, 0, CODE_AT, mmap.PAGESIZE, _address(page))
            fcntl.ioctl(machine, SET_USER_MEMORY_REGION, region)
            step = "make a processor"
            processor = fcntl.ioctl(machine, CREATE_VCPU, 0)
            shared = mmap.mmap(processor, fcntl.ioctl(kvm, GET_VCPU_MMAP_SIZE))
            step = "set its registers"
            special = bytearray(SREGS_BYTES)
            fcntl.ioctl(processor, GET_SREGS, special, True)
            struct.pack_into("<QIH", special, 0, 0, 0xFFFF, 0)  # the code segment begins at 0
            fcntl.ioctl(processor, SET_SREGS, bytes(special))
            fcntl.ioctl(processor, SET_REGS, bytes(128) + struct.pack("<QQ", CODE_AT, FLAGS))
            step = "run code"
            fcntl.ioctl(processor, RUN, 0)
            reason = int(struct.unpack_from("<I", shared, EXIT_REASON_OFFSET)[0])
            os.close(processor)
            os.close(machine)
    except OSError as error:
        return f"cannot {step}: {error.strerror}"
    return "ok" if reason == EXIT_IO else f"the code ended for reason {reason}, expected {EXIT_IO}"


def _address(page: mmap.mmap) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(page))


if __name__ == "__main__":
    print(probe())
    sys.stdout.flush()
    os._exit(0)  # the pages are still in use by the kernel's machine
