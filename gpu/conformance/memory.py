# SPDX-License-Identifier: Apache-2.0
"""Conformance: allocation, copies in all directions, memsets, pinned memory."""

from __future__ import annotations

from .probe import Probe, check

HOST, DEVICE = 1, 2
PATTERN = bytes(range(256)) * 16


@check
def allocation(p: Probe) -> None:
    """Addresses are aligned and apart; sizes of zero and impossible ones are refused; memory comes back."""
    cell = p.cell()
    p.expect(1, "cuMemAlloc_v2", cell, 0)
    p.expect(2, "cuMemAlloc_v2", cell, 1 << 46)
    first, second = p.value("cuMemAlloc_v2", 1000), p.value("cuMemAlloc_v2", 1000)
    p.true(first % 256 == 0 and second % 256 == 0, "addresses are multiples of 256")
    p.true(abs(first - second) >= 1000, "allocations do not overlap")
    p.ok("cuMemFree_v2", first)
    p.expect(1, "cuMemFree_v2", first)
    p.expect(1, "cuMemFree_v2", second + 256)
    p.ok("cuMemFree_v2", second)
    p.ok("cuMemFree_v2", 0)
    p.expect(1, "cuMemFree_v2", 0x1234500)


@check
def memory_information(p: Probe) -> None:
    """A large allocation shows in the free memory, and frees again."""
    free, total = p.cell(), p.cell()
    p.ok("cuMemGetInfo_v2", free, total)
    before = int(free[0])
    p.true(0 < before <= total[0], "free memory is part of the total")
    address = p.value("cuMemAlloc_v2", 64 << 20)
    p.ok("cuMemGetInfo_v2", free, total)
    p.true(before - free[0] >= 64 << 20, "64 MiB are in use")
    p.ok("cuMemFree_v2", address)
    p.ok("cuMemGetInfo_v2", free, total)
    p.true(free[0] >= before - (4 << 20), "they are free again")


@check
def address_range(p: Probe) -> None:
    """Every address of an allocation leads to its base and size."""
    address = p.device(5000)
    base, size = p.cell(), p.cell()
    for offset in (0, 1, 4999):
        p.ok("cuMemGetAddressRange_v2", base, size, address + offset)
        p.equal((base[0], size[0]), (address, 5000), f"range at offset {offset}")
    p.ok("cuMemGetAddressRange_v2", base, 0, address)
    p.expect(500, "cuMemGetAddressRange_v2", base, size, 0x1234500)


@check
def pitched(p: Probe) -> None:
    """Rows are padded to a pitch that suits the element; strange element sizes are refused."""
    cell, pitch = p.cell(), p.cell()
    p.ok("cuMemAllocPitch_v2", cell, pitch, 1000, 10, 4)
    p.true(pitch[0] >= 1000 and pitch[0] % 256 == 0, "the pitch holds a row and is aligned")
    base, size = p.cell(), p.cell()
    p.ok("cuMemGetAddressRange_v2", base, size, int(cell[0]))
    p.true(size[0] >= pitch[0] * 9 + 1000, "all rows are allocated")
    p.ok("cuMemFree_v2", int(cell[0]))
    p.expect(1, "cuMemAllocPitch_v2", cell, pitch, 1000, 10, 3)
    p.expect(1, "cuMemAllocPitch_v2", cell, pitch, 0, 10, 4)
    p.expect(1, "cuMemAllocPitch_v2", cell, pitch, 1000, 0, 4)


@check
def copies(p: Probe) -> None:
    """Bytes go there, across and back, at odd offsets, in both forms."""
    first, second = p.device(8192), p.device(8192)
    p.ok("cuMemcpyHtoD_v2", first + 3, p.host(PATTERN), 4096)
    p.ok("cuMemcpyDtoD_v2", second + 5, first + 3, 4096)
    p.equal(p.download(second, 4106), bytes(5) + PATTERN + bytes(5), "second buffer")
    stream = p.stream()
    back = p.host(4096)
    p.ok("cuMemcpyHtoDAsync_v2", first, p.host(PATTERN[::-1]), 4096, stream)
    p.ok("cuMemcpyDtoDAsync_v2", second, first, 4096, stream)
    p.ok("cuMemcpyDtoHAsync_v2", back, second, 4096, stream)
    p.ok("cuStreamSynchronize", stream)
    p.equal(p.bytes_of(back, 4096), PATTERN[::-1], "what came back through a stream")


@check
def copies_refused(p: Probe) -> None:
    """Copies of nothing succeed; copies past an allocation or from a dead one do not."""
    address = p.device(4096)
    other = p.value("cuMemAlloc_v2", 4 << 20)
    host = p.host(8192)
    p.ok("cuMemcpyHtoD_v2", address, host, 0)
    p.ok("cuMemcpyDtoHAsync_v2", host, address, 0, 0)
    p.ok("cuMemFree_v2", other)
    p.expect(1, "cuMemcpyHtoD_v2", 0, host, 16)
    p.expect(1, "cuMemcpyDtoH_v2", host, 0x1234500, 16)
    p.expect(1, "cuMemcpyHtoD_v2", address, 0, 16)
    p.ok("cuMemcpyHtoD_v2", 0x1234500, host, 0)
    p.ok("cuMemsetD8Async", 0x1234500, 1, 0, 0)
    p.expect(1, "cuMemsetD2D32Async", address, 6, 1, 1, 2, 0)
    base, size = p.cell(), p.cell()
    if p.call("cuMemGetAddressRange_v2", base, size, other) != 0:
        p.expect(1, "cuMemcpyHtoD_v2", other, host, 16)
        p.expect(1, "cuMemcpyDtoD_v2", address, other, 16)


@check
def copies_past_the_end(p: Probe) -> None:
    """A copy that begins inside an allocation and ends outside of every one is refused."""
    address = p.device(32 << 20)
    host = p.host(8192)
    base, size = p.cell(), p.cell()
    if p.call("cuMemGetAddressRange_v2", base, size, address + (32 << 20)) == 0:
        return  # something else happens to lie right behind it
    p.expect(1, "cuMemcpyHtoD_v2", address + (32 << 20) - 4096, host, 8192)
    p.expect(1, "cuMemcpyDtoH_v2", host, address + (32 << 20) - 4096, 8192)
    p.expect(1, "cuMemsetD8Async", address + (32 << 20) - 16, 1, 32, 0)
    p.equal(p.download(address + (32 << 20) - 16, 16), bytes(16), "the end of the allocation")


@check
def rectangles(p: Probe) -> None:
    """2D copies honour pitches and offsets on both sides."""
    source = bytes(i % 251 for i in range(64 * 8))
    device = p.device(128 * 8)
    host = p.host(source)
    stream = p.stream()
    to_device = p.pack(
        "<QQIxxxxQQQQQQIxxxxQQQQQQ", 5, 1, HOST, host, 0, 0, 64, 16, 2, DEVICE, 0, device, 0, 128, 20, 5
    )
    p.ok("cuMemcpy2DAsync_v2", to_device, stream)
    p.ok("cuStreamSynchronize", stream)
    expected = bytearray(128 * 8)
    for row in range(5):
        expected[(row + 2) * 128 + 16 : (row + 2) * 128 + 36] = source[
            (row + 1) * 64 + 5 : (row + 1) * 64 + 25
        ]
    p.equal(p.download(device, len(expected)), bytes(expected), "the rectangle on the device")
    back = p.host(40 * 5)
    to_host = p.pack(
        "<QQIxxxxQQQQQQIxxxxQQQQQQ", 16, 2, DEVICE, 0, device, 0, 128, 0, 0, HOST, back, 0, 0, 40, 20, 5
    )
    p.ok("cuMemcpy2DAsync_v2", to_host, 0)
    p.ok("cuCtxSynchronize")
    rows = [p.bytes_of(back, 200)[40 * r : 40 * r + 20] for r in range(5)]
    p.equal(
        b"".join(rows), b"".join(bytes(expected[(r + 2) * 128 + 16 :][:20]) for r in range(5)), "rows back"
    )


@check
def rectangles_refused(p: Probe) -> None:
    """A row wider than its pitch is no rectangle."""
    device, host = p.device(4096), p.host(4096)
    wide = p.pack(
        "<QQIxxxxQQQQQQIxxxxQQQQQQ", 0, 0, HOST, host, 0, 0, 16, 0, 0, DEVICE, 0, device, 0, 64, 32, 2
    )
    p.expect(1, "cuMemcpy2DAsync_v2", wide, 0)
    unknown = p.pack(
        "<QQIxxxxQQQQQQIxxxxQQQQQQ", 0, 0, 9, host, 0, 0, 64, 0, 0, DEVICE, 0, device, 0, 64, 32, 2
    )
    p.expect(1, "cuMemcpy2DAsync_v2", unknown, 0)
    single = p.pack(
        "<QQIxxxxQQQQQQIxxxxQQQQQQ", 0, 0, HOST, host, 0, 0, 16, 0, 0, DEVICE, 0, device, 0, 64, 32, 1
    )
    p.expect(1, "cuMemcpy2DAsync_v2", single, 0)
    flat = p.pack(
        "<QQIxxxxQQQQQQIxxxxQQQQQQ", 0, 0, HOST, host, 0, 0, 64, 0, 0, DEVICE, 0, device, 0, 64, 0, 2
    )
    p.ok("cuMemcpy2DAsync_v2", flat, 0)


LAYOUT_3D = "<QQQQIxxxxQQQQQQQQQQIxxxxQQQQQQQQQ"


@check
def boxes(p: Probe) -> None:
    """3D copies honour pitch, height and offsets."""
    source = bytes(i * 7 % 251 for i in range(16 * 4 * 3))
    device = p.device(32 * 6 * 4)
    host = p.host(source)
    box = p.pack(
        LAYOUT_3D,
        2,
        1,
        0,
        0,
        HOST,
        host,
        0,
        0,
        0,
        16,
        4,
        8,
        3,
        1,
        0,
        DEVICE,
        0,
        device,
        0,
        0,
        32,
        6,
        10,
        2,
        3,
    )
    p.ok("cuMemcpy3DAsync_v2", box, 0)
    p.ok("cuCtxSynchronize")
    expected = bytearray(32 * 6 * 4)
    for z in range(3):
        for y in range(2):
            at = ((z + 1) * 6 + y + 3) * 32 + 8
            begin = (z * 4 + y + 1) * 16 + 2
            expected[at : at + 10] = source[begin : begin + 10]
    p.equal(p.download(device, len(expected)), bytes(expected), "the box on the device")


@check
def boxes_refused(p: Probe) -> None:
    """A box from or to an address that is nobody's."""
    device = p.device(64)
    for source, destination in ((0x1234500, device), (device, 0x1234500)):
        sides = ((0, 0, 0, 0, DEVICE, 0, where, 0, 0, 8, 4) for where in (source, destination))
        box = p.pack(LAYOUT_3D, *(field for side in sides for field in side), 8, 4, 1)
        p.expect(1, "cuMemcpy3DAsync_v2", box, 0)


@check
def memsets(p: Probe) -> None:
    """All widths, one and two dimensions; the rest stays untouched."""
    address = p.device(4096)
    p.ok("cuMemsetD8Async", address + 1, 0xAB, 3, 0)
    p.ok("cuMemsetD16Async", address + 16, 0x1234, 4, 0)
    p.ok("cuMemsetD32Async", address + 32, 0xDEADBEEF, 2, 0)
    p.ok("cuMemsetD2D8Async", address + 64, 32, 0x11, 3, 2, 0)
    p.ok("cuMemsetD2D16Async", address + 128, 32, 0x2222, 2, 2, 0)
    p.ok("cuMemsetD2D32Async", address + 192, 32, 0x33333333, 1, 2, 0)
    expected = bytearray(256)
    expected[1:4] = b"\xab" * 3
    expected[16:24] = b"\x34\x12" * 4
    expected[32:40] = b"\xef\xbe\xad\xde" * 2
    expected[64:67] = expected[96:99] = b"\x11" * 3
    expected[128:132] = expected[160:164] = b"\x22" * 4
    expected[192:196] = expected[224:228] = b"\x33" * 4
    p.equal(p.download(address, 256), bytes(expected), "memory after all memsets")
    p.ok("cuMemsetD8Async", address, 1, 0, 0)
    p.expect(1, "cuMemsetD16Async", address + 1, 1, 4, 0)
    p.expect(1, "cuMemsetD32Async", address + 2, 1, 4, 0)
    p.expect(1, "cuMemsetD8Async", 0x1234500, 1, 4, 0)
    p.expect(1, "cuMemsetD2D8Async", address, 2, 1, 3, 2, 0)


@check
def registered(p: Probe) -> None:
    """Host memory that is registered has a device address and takes part in copies; registering is exclusive."""
    size = 1 << 20
    address = p.page_aligned(size)
    p.ok("cuMemHostRegister_v2", address, size, 3)
    p.expect(712, "cuMemHostRegister_v2", address, size, 3)
    pointer = p.value("cuMemHostGetDevicePointer_v2", address, 0)
    p.ok("cuMemsetD8Async", pointer + 100, 0x5A, 50, 0)
    p.ok("cuCtxSynchronize")
    p.equal(p.bytes_of(address, 200), bytes(100) + b"\x5a" * 50 + bytes(50), "registered memory")
    device = p.device(PATTERN)
    p.ok("cuMemcpyDtoHAsync_v2", address, device, len(PATTERN), 0)
    p.ok("cuCtxSynchronize")
    p.equal(p.bytes_of(address, len(PATTERN)), PATTERN, "copied into registered memory")
    p.ok("cuMemHostUnregister", address)
    p.expect(713, "cuMemHostUnregister", address)
    cell = p.cell()
    p.expect(1, "cuMemHostGetDevicePointer_v2", cell, address, 0)
