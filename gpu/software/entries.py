# SPDX-License-Identifier: Apache-2.0
"""The list of driver functions the software GPU has, and how one is called.

An entry is a Python function ``(device, *arguments)`` named after the driver symbol; every argument is a
number (pointers are host addresses). It returns nothing, or raises ``CudaError``. What is not listed
stays as the vtable had it: CUDA_ERROR_NOT_SUPPORTED.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from .memory import AddressError, IllegalAddress
from .ptx import PtxError, UnsupportedPtx
from .state import CudaError, Device

_log = logging.getLogger("vgpu.software")

Entry = Callable[..., None]
E = TypeVar("E", bound=Callable[..., None])

ENTRIES: dict[str, Entry] = {}
# Functions that still answer after a fault, as a program must be able to look and to leave.
WORKS_AFTER_FAULT = {
    "cuInit", "cuDriverGetVersion", "cuDeviceGet", "cuDeviceGetCount", "cuDeviceGetName", "cuDeviceGetUuid_v2",
    "cuDeviceTotalMem_v2", "cuDeviceGetAttribute", "cuDeviceGetPCIBusId", "cuDevicePrimaryCtxReset_v2",
    "cuDevicePrimaryCtxRelease_v2", "cuCtxSetCurrent", "cuCtxGetStreamPriorityRange", "cuCtxGetLimit",
}  # fmt: skip

# Functions that need no current context; everything else is refused without one.
NEEDS_NO_CONTEXT = WORKS_AFTER_FAULT - {"cuCtxGetLimit", "cuCtxGetStreamPriorityRange"} | {
    "cuCtxCreate_v2", "cuCtxDestroy_v2", "cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxSetFlags_v2",
    "cuDeviceGetTexture1DLinearMaxWidth", "cuDeviceGetDefaultMemPool", "cuDeviceGetMemPool", "cuDeviceSetMemPool", "cuGetExportTable",
    "cuThreadExchangeStreamCaptureMode", "cuLibraryLoadData", "cuLibraryUnload", "cuLibraryGetKernel",
    "cuLibraryGetKernelCount", "cuLibraryEnumerateKernels", "cuKernelGetAttribute", "cuKernelSetAttribute",
    "cuKernelGetName", "cuKernelGetParamInfo", "cuKernelGetLibrary", "cuMemGetAllocationGranularity",
    "cuMemAddressReserve", "cuMemAddressFree", "cuMemCreate", "cuMemRelease", "cuMemMap", "cuMemUnmap",
    "cuMemSetAccess", "cuMemPoolCreate", "cuMemPoolDestroy", "cuMemPoolTrimTo", "cuMemPoolSetAttribute",
    "cuMemPoolGetAttribute", "cuMemPoolSetAccess",
}  # fmt: skip

INVALID_VALUE = 1
OUT_OF_MEMORY = 2
NOT_SUPPORTED = 801
INVALID_CONTEXT = 201
INVALID_PTX = 218
UNKNOWN = 999


def entry(function: E) -> E:
    """List a function under its own name."""
    name = function.__name__
    if name in ENTRIES:
        raise RuntimeError(f"{name} is written twice")
    ENTRIES[name] = function
    return function


def call(device: Device, name: str, arguments: tuple[Any, ...]) -> int:
    """Call an entry and turn what it raises into a CUresult. Never raises: C is above."""
    if device.fault and name not in WORKS_AFTER_FAULT:
        return device.fault
    if not device.current and name not in NEEDS_NO_CONTEXT:
        return INVALID_CONTEXT
    try:
        ENTRIES[name](device, *arguments)
    except CudaError as error:
        _log.debug("%s: %s", name, error)
        return error.code
    except MemoryError as error:
        _log.info("%s: %s", name, error)
        return OUT_OF_MEMORY
    except UnsupportedPtx as error:
        _log.error("%s: %s", name, error)
        return NOT_SUPPORTED
    except PtxError as error:
        _log.error("%s: %s", name, error)
        return INVALID_PTX
    except IllegalAddress as error:
        _log.warning("%s: %s", name, error)
        return INVALID_VALUE
    except AddressError as error:
        _log.warning("%s: %s", name, error)
        return INVALID_VALUE
    except Exception:  # noqa: BLE001 - a Python error must not unwind into C
        _log.exception("%s failed inside the software GPU", name)
        return UNKNOWN
    return 0
