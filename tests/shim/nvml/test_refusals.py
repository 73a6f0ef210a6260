# SPDX-License-Identifier: Apache-2.0
"""Every refused function answers its code: before nvmlInit, with bad handles, with null pointers, and when all is well."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from .table import functions

UNINITIALIZED, INVALID_ARGUMENT = 1, 2
CODES = {"INVALID_ARGUMENT": 2, "NOT_SUPPORTED": 3, "NO_PERMISSION": 4}
REFUSED = [function for function in functions() if function.code]
ANSWERED = [function.name for function in functions() if not function.code]
# These need no nvmlInit, and say so in their own tests.
ALWAYS = {
    "nvmlInit",
    "nvmlInit_v2",
    "nvmlInitWithFlags",
    "nvmlErrorString",
    "nvmlInternalGetExportTable",
    "nvmlSystemGetCudaDriverVersion",
    "nvmlSystemGetCudaDriverVersion_v2",
}
BUFFER = ctypes.create_string_buffer(1 << 16)


def arguments(kinds: str, device: ctypes.c_void_p, pointer: Any = None) -> list[Any]:
    """Values for the parameters the table names; a pointer to a large buffer unless given."""
    values = {"d": device, "p": ctypes.byref(BUFFER) if pointer is None else pointer, "u": ctypes.c_ulong(0)}
    return [values[kind] for kind in kinds]


@pytest.mark.parametrize("function", REFUSED, ids=lambda function: function.name)
def test_refused_name(function: Any, nvml: ctypes.CDLL, device: ctypes.c_void_p) -> None:
    entry = nvml[function.name]
    assert entry(*arguments(function.arguments, device)) == CODES[function.code]
    if "d" in function.arguments:
        assert entry(*arguments(function.arguments, ctypes.c_void_p(0))) == INVALID_ARGUMENT
        assert entry(*arguments(function.arguments, ctypes.c_void_p(12345))) == INVALID_ARGUMENT
    if "p" in function.arguments:
        assert entry(*arguments(function.arguments, device, ctypes.c_void_p(0))) == INVALID_ARGUMENT


def test_before_init_everything_says_so(library: ctypes.CDLL) -> None:
    somewhere = ctypes.byref(BUFFER)
    for function in REFUSED:
        assert library[function.name](*[somewhere] * 6) == UNINITIALIZED, function.name
    for name in ANSWERED:
        if name not in ALWAYS:
            assert library[name](*[somewhere] * 6) == UNINITIALIZED, name


def test_answered_names_refuse_null_pointers_and_foreign_handles(
    nvml: ctypes.CDLL, device: ctypes.c_void_p
) -> None:
    checked = 0
    for name in ANSWERED:
        if not name.startswith("nvmlDeviceGet") or "Handle" in name or "Count" in name or "Affinity" in name:
            continue
        entry, null = nvml[name], ctypes.c_void_p(0)
        if name != "nvmlDeviceGetAccountingStats":
            assert entry(ctypes.byref(BUFFER), *[ctypes.byref(BUFFER)] * 5) == INVALID_ARGUMENT, name
        # Where the last look is at a pointer: a null one must not be written to.
        status = entry(device, null, null, null, null, null)
        assert status in (INVALID_ARGUMENT, 3, 6, 7), f"{name}: {status}"
        checked += 1
    assert checked > 60
