# SPDX-License-Identifier: Apache-2.0
"""A page that breaks its own rules: lengths are clamped, texts end and hold nothing a terminal would obey."""

from __future__ import annotations

import ctypes
import random

import pytest

from vgpu.transport.layout import DEVICE_FIELDS, DEVICE_PAGE_SIZE, DEVICE_TEXTS

from .page_host import PageHost, page_bytes
from .table import functions


def text(nvml: ctypes.CDLL, device: ctypes.c_void_p, name: str) -> bytes:
    room = ctypes.create_string_buffer(512)
    assert nvml[name](device, room, 512) == 0
    return room.value


def test_texts_without_an_end(nvml: ctypes.CDLL, device: ctypes.c_void_p, host: PageHost) -> None:
    host.replace_page(page_bytes(texts={"name": b"n" * 256, "serial": b"s" * 32, "vbios_version": b"v" * 32}))
    assert text(nvml, device, "nvmlDeviceGetName") == b"n" * 255
    assert text(nvml, device, "nvmlDeviceGetSerial") == b"s" * 31
    assert text(nvml, device, "nvmlDeviceGetVbiosVersion") == b"v" * 31


def test_texts_for_a_terminal(nvml: ctypes.CDLL, device: ctypes.c_void_p, host: PageHost) -> None:
    host.replace_page(page_bytes(texts={"name": b"H\x1b[2J\n\x80200"}))
    assert text(nvml, device, "nvmlDeviceGetName") == b"H?[2J??200"


@pytest.mark.parametrize(("written", "expected"), [(129, 128), (0xFFFFFFFE, 128), (0xFFFFFFFF, 0)])
def test_more_processes_than_fit(
    nvml: ctypes.CDLL, device: ctypes.c_void_p, host: PageHost, written: int, expected: int
) -> None:
    processes = tuple((1000 + i, 0, 1, i) for i in range(128))
    host.replace_page(page_bytes({"process_count": written}, processes=processes))
    count, room = ctypes.c_uint(200), ctypes.create_string_buffer(200 * 24)
    assert nvml.nvmlDeviceGetComputeRunningProcesses_v3(device, ctypes.byref(count), room) == 0
    assert count.value == expected


def test_another_layout_is_no_page(nvml: ctypes.CDLL, device: ctypes.c_void_p, host: PageHost) -> None:
    for name, value in (("magic", 1), ("layout_version", 2)):
        kept = {"magic": DEVICE_FIELDS, "layout_version": DEVICE_FIELDS}[name][name]
        assert kept[0] < 16
        host.replace_page(page_bytes({name: value}))
        room = ctypes.create_string_buffer(64)
        assert nvml.nvmlDeviceGetName(device, room, 64) == 15
    host.replace_page(page_bytes())
    assert nvml.nvmlDeviceGetName(device, room, 64) == 0


def test_rubbish(nvml: ctypes.CDLL, device: ctypes.c_void_p, host: PageHost) -> None:
    """Whatever the page holds, every question ends and writes within its caller's room."""
    rng = random.Random(7)
    good = page_bytes()
    names = [f.name for f in functions() if not f.code and f.name.startswith("nvmlDeviceGet")]
    # These take a count by value, which a pointer is not.
    names = [
        name for name in names if not any(word in name for word in ("Handle", "Affinity", "FieldValues"))
    ]
    for _ in range(30):
        page = bytearray(rng.randbytes(DEVICE_PAGE_SIZE))
        page[:16] = good[:16]
        offset = DEVICE_FIELDS["telemetry_sequence"][0]
        page[offset] &= 0xFE
        host.replace_page(bytes(page))
        for name in names:
            rooms = [ctypes.create_string_buffer(b"\xee" * 16384) for _ in range(4)]
            nvml[name](device, *rooms)
            for room in rooms:
                assert room.raw[8192:].strip(b"\xee") == b"\0", name
        for field, (_, size) in DEVICE_TEXTS.items():
            assert size <= 3072, field
