# SPDX-License-Identifier: Apache-2.0
"""Code, launches, graphs and links on the worker's side, against a driver that aborts when it is given a pointer that is
not alive, and against guests that do wrong."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu.replay.guest import CONTEXT, DEFERRED, HERE, PAGE, Guest, Replayed, build_fake_driver, replayed
from vgpu.transport._generated_calls import CallId
from vgpu.transport.wire import Result

LAUNCHES, SUM, BYTES, ALIVE, IMAGE_BYTES, INSTANCES, HOST_USERS = 1100, 1101, 1102, 1103, 1104, 1105, 1106
INVALID_VALUE, INVALID_IMAGE, INVALID_PTX, INVALID_HANDLE, NOT_FOUND, NOT_SUPPORTED = (
    1,
    200,
    218,
    400,
    500,
    801,
)
IMAGE = b".version 7.0 // some text\0"
HOST_BLOB = 1 << 32


@pytest.fixture(scope="module")
def fake_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_driver(tmp_path_factory.mktemp("fake"), "fake_code.c")


@pytest.fixture
def guest(fake_code: Path) -> Iterator[Guest]:
    with replayed(fake_code) as session:
        session.guest.retain()
        yield session.guest


def payload_of(guest: Guest, result: Result, slot: int = 0) -> bytes:
    at = guest.slots + slot * 4096 + 64
    return bytes(guest.map[at : at + result.payload_length])


def look(guest: Guest, limit: int) -> int:
    return guest.ask(CallId.cuCtxGetLimit, limit).values[0]


def wire_image(*parts: bytes, wrapper: int = 0) -> bytes:
    head = struct.pack("<II", len(parts), wrapper) + b"".join(struct.pack("<Q", len(p)) for p in parts)
    return b"".join(p + bytes(-len(p) % 16) for p in [head, *parts])


def options(*pairs: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<IIQ", option, 0, value) for option, value in pairs)


def load(guest: Guest, image: bytes = IMAGE, *, library: bool = False) -> int:
    whole = wire_image(image)
    result = guest.ask(CallId.wireModuleLoad, int(library), 0, len(whole), 0, payload=whole)
    assert result.status == 0
    return result.values[0]


def function(guest: Guest, owner: int, name: bytes = b"k3") -> int:
    result = guest.ask(CallId.wireFunctionGet, owner, payload=name)
    assert result.status == 0
    return result.values[0]


def launch(
    guest: Guest,
    handle: int,
    packed: bytes,
    *,
    attributes: bytes = b"",
    count: int | None = None,
    length: int | None = None,
) -> int:
    padded = packed + bytes(-len(packed) % 16)
    number = len(attributes) // 72 if count is None else count
    size = len(packed) if length is None else length
    one = 1 | 1 << 32
    return guest.ask(
        CallId.wireLaunch, handle, one, one, one, number << 32, 0, size, payload=padded + attributes
    ).status


def test_module_from_load_to_unload(guest: Guest) -> None:
    alive = look(guest, ALIVE)
    module = load(guest)
    assert look(guest, IMAGE_BYTES) == len(IMAGE)
    found = guest.ask(CallId.wireFunctionGet, module, payload=b"k3")
    status, parameters, size, here = struct.unpack_from("<4I", payload_of(guest, found))
    assert (found.status, status, parameters, size, here) == (0, 0, 3, 12, 3)
    assert struct.unpack_from("<6I", payload_of(guest, found), 112) == (0, 4, 4, 4, 8, 4)
    assert function(guest, module) == found.values[0]
    assert guest.ask(CallId.wireFunctionGet, module, payload=b"missing").status == NOT_FOUND
    assert launch(guest, found.values[0], bytes(range(12))) == 0
    assert (look(guest, SUM), look(guest, BYTES)) == (66, 12)
    guest.send(CallId.cuModuleUnload, module)
    assert launch(guest, found.values[0], bytes(12)) == INVALID_HANDLE
    assert guest.ask(CallId.cuModuleUnload, module).status == INVALID_HANDLE
    assert look(guest, ALIVE) == alive


def test_library_keeps_its_image_and_takes_its_functions_along(guest: Guest) -> None:
    alive = look(guest, ALIVE)
    library = load(guest, library=True)
    kernel = function(guest, library, b"k1")
    its_function = guest.ask(CallId.cuKernelGetFunction, kernel)
    assert its_function.status == 0
    module = guest.ask(CallId.cuLibraryGetModule, library).values[0]
    assert guest.ask(CallId.cuLibraryGetModule, library).values[0] == module
    inner = function(guest, module, b"k2")
    many = guest.ask(CallId.cuLibraryEnumerateKernels, library, 0, 3)
    kernels = struct.unpack("<3Q", payload_of(guest, many))
    assert kernels[1] == kernel
    for handle in (kernel, its_function.values[0], inner, kernels[2]):
        assert launch(guest, handle, bytes(8)) == 0
    assert guest.ask(CallId.cuLibraryUnload, module).status == INVALID_HANDLE
    guest.send(CallId.cuLibraryUnload, library)
    for handle in (kernel, its_function.values[0], inner, *kernels):
        assert launch(guest, handle, bytes(8)) == INVALID_HANDLE
    assert guest.ask(CallId.wireFunctionGet, module, payload=b"k1").status == INVALID_HANDLE
    assert look(guest, ALIVE) == alive


def test_many_parameters_come_in_pages(guest: Guest) -> None:
    module = load(guest)
    found = guest.ask(CallId.wireFunctionGet, module, payload=b"k1200")
    _, parameters, size, here = struct.unpack_from("<4I", payload_of(guest, found))
    assert (parameters, size) == (1200, 4800)
    table = payload_of(guest, found)[112:]
    while here < parameters:
        more = guest.ask(CallId.wireParameterInfo, found.values[0], here)
        table += payload_of(guest, more)
        here += more.payload_length // 8
    assert struct.unpack(f"<{2 * 1200}I", table) == tuple(x for i in range(1200) for x in (4 * i, 4))
    assert guest.ask(CallId.wireParameterInfo, found.values[0], 1200).status == INVALID_VALUE


def test_a_function_without_code_for_the_device_says_so(guest: Guest) -> None:
    found = guest.ask(CallId.wireFunctionGet, load(guest), payload=b"unloadable")
    assert (found.status, struct.unpack_from("<I", payload_of(guest, found))[0]) == (0, 209)


def test_long_names(guest: Guest) -> None:
    module = load(guest)
    for length in (4, 4032, 4033, 50000):
        found = guest.ask(CallId.cuFuncGetName, function(guest, module, b"long%d" % length))
        if length <= 4032:
            assert payload_of(guest, found) == b"n" * length
            continue
        blob, size = found.values[:2]
        assert size == length
        text = b""
        while len(text) < size:
            text += payload_of(guest, guest.ask(CallId.wireBlobRead, blob, len(text)))
        assert text == b"n" * length
        guest.send(CallId.wireBlobFree, blob)
        assert guest.ask(CallId.wireBlobRead, blob, 0).status == INVALID_VALUE


# ---- images and blobs ----


def test_image_in_a_blob(guest: Guest) -> None:
    text = b"x" * 200_000 + b"\0"
    whole = wire_image(text)
    for offset in range(0, len(whole), 10_000):
        guest.send(CallId.wireBlobWrite, 5, len(whole), offset, payload=whole[offset : offset + 10_000])
    assert guest.ask(CallId.wireModuleLoad, 0, 5, len(whole), 0).status == 0
    assert look(guest, IMAGE_BYTES) == len(text)
    assert guest.u32(DEFERRED) == 0
    # It is used up.
    assert guest.ask(CallId.wireModuleLoad, 0, 5, len(whole), 0).status == 2


BAD_IMAGES = {
    "nothing": b"",
    "head cut off": b"\1\0\0",
    "no parts": wire_image(),
    "too many parts": struct.pack("<II", 5000, 2) + bytes(64),
    "two parts without a wrapper": wire_image(IMAGE, IMAGE),
    "wrapper of version 3": wire_image(IMAGE, wrapper=3),
    "part longer than the payload": struct.pack("<IIQ", 1, 0, 1 << 40) + IMAGE,
    "sizes that wrap": struct.pack("<IIQQ", 2, 2, 16, 2**64 - 16) + bytes(8) + IMAGE,
    "no NUL": wire_image(b".version without its end"),
    "fatbin that claims more": wire_image(struct.pack("<IHHQ", 0xBA55ED50, 1, 16, 1000) + bytes(10)),
    "a wrapper's pointers": wire_image(struct.pack("<IIQQ", 0x466243B1, 1, 0xDEAD0000, 0)),
    "an ELF that claims more": wire_image(
        b"\x7fELF\x02\x01" + bytes(26) + struct.pack("<QQ", 1 << 20, 0) + bytes(100)
    ),
}


@pytest.mark.parametrize("what", BAD_IMAGES)
def test_bad_image_never_reaches_the_driver(guest: Guest, what: str) -> None:
    image, before = BAD_IMAGES[what], look(guest, IMAGE_BYTES)
    assert guest.ask(CallId.wireModuleLoad, 0, 0, len(image), 0, payload=image).status == INVALID_IMAGE
    assert look(guest, IMAGE_BYTES) == before


def test_wrapped_image_is_rebuilt(guest: Guest) -> None:
    fatbin = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, 8) + b"contents"
    for version, parts in ((1, [fatbin]), (2, [fatbin]), (2, [fatbin, fatbin])):
        whole = wire_image(*parts, wrapper=version)
        assert guest.ask(CallId.wireModuleLoad, 0, 0, len(whole), 0, payload=whole).status == 0


@pytest.mark.parametrize(
    "arguments", [(0, 10, 0), (HOST_BLOB, 10, 0), (3, 10, 5), (3, 4, 0), (3, 2**63, 0), (3, (4 << 30) + 1, 0)]
)
def test_blob_rules(guest: Guest, arguments: tuple[int, ...]) -> None:
    guest.send(CallId.wireBlobWrite, *arguments, payload=b"12345")
    guest.ask(CallId.cuCtxGetLimit, LAUNCHES)
    assert guest.u32(DEFERRED) != 0


def test_blobs_are_written_in_order_and_whole(guest: Guest) -> None:
    assert guest.ask(CallId.wireBlobWrite, 3, 10, 0, payload=b"12345").status == 0
    assert guest.ask(CallId.wireBlobWrite, 3, 10, 6, payload=b"1234").status == INVALID_VALUE
    assert guest.ask(CallId.wireBlobWrite, 3, 11, 5, payload=b"1234").status == INVALID_VALUE
    assert guest.ask(CallId.wireBlobWrite, 3, 10, 5, payload=b"123456").status == INVALID_VALUE
    assert guest.ask(CallId.wireModuleLoad, 0, 3, 10, 0).status == 2  # not whole
    assert guest.ask(CallId.wireBlobRead, 3, 0).status == INVALID_VALUE  # not the guest's to read


# ---- options and logs ----


def compile_with(guest: Guest, image: bytes, *pairs: tuple[int, int]) -> tuple[Result, bytes]:
    payload = options(*pairs) + wire_image(image)
    result = guest.ask(CallId.wireModuleLoad, 0, 0, len(wire_image(image)), len(pairs), payload=payload)
    return result, payload_of(guest, result)


def test_logs_and_wall_time_come_back(guest: Guest) -> None:
    result, answer = compile_with(guest, b"fail3\0", (4, 1000), (6, 1000), (2, 0))
    information, error, wall, _, blob = struct.unpack_from("<IIfIQ", answer)
    assert (result.status, information, error, wall, blob) == (INVALID_PTX, 300, 300, 1.5, 0)
    assert answer[24:] == b"i" * 300 + b"e" * 300


def test_logs_longer_than_a_slot_come_as_a_blob(guest: Guest) -> None:
    for digit in (b"9", b":", b"z"):  # 900, 1,000 and 7,400 letters
        result, answer = compile_with(guest, b"fail" + digit + b"\0", (6, 100_000), (4, 3000))
        information, error, _, _, blob = struct.unpack_from("<IIfIQ", answer)
        total = 100 * (digit[0] - 48)
        assert (result.status, error, information) == (INVALID_PTX, total, min(total, 2999))
        assert (blob != 0) == (total > 4000)


@pytest.mark.parametrize("option", [3, 5, 17, 18, 19, 25, 26, 27, 28, 35, 99, 2**31])
def test_options_that_would_be_addresses_are_refused(guest: Guest, option: int) -> None:
    assert compile_with(guest, IMAGE, (option, 0xDEAD))[0].status == NOT_SUPPORTED


def test_more_options_than_the_payload_holds(guest: Guest) -> None:
    for count in (1, 64, 65, 2**32, 2**60):
        assert guest.ask(CallId.wireModuleLoad, 0, 0, 8, count, payload=b"12345678").status == INVALID_VALUE


# ---- launches ----


def attribute(number: int, value: int) -> bytes:
    return struct.pack("<II", number, 0) + struct.pack("<Q", value) + bytes(56)


def test_launch_lengths(guest: Guest) -> None:
    handle = function(guest, load(guest))
    assert launch(guest, handle, bytes(12)) == 0
    assert launch(guest, handle, bytes(16)) == 0
    assert launch(guest, handle, bytes(8)) == INVALID_VALUE  # the driver's own answer
    assert launch(guest, handle, bytes(12), length=100) == INVALID_VALUE
    assert launch(guest, handle, bytes(12), length=2**32 - 1) == INVALID_VALUE
    assert launch(guest, handle, bytes(12), count=1) == INVALID_VALUE
    assert launch(guest, handle, bytes(12), count=2**32 - 1) == INVALID_VALUE
    assert launch(guest, handle, bytes(12), attributes=attribute(6, 1) * 33) == INVALID_VALUE
    assert launch(guest, handle, bytes(12), attributes=attribute(6, 1) * 32) == 0


def test_launch_attributes(guest: Guest) -> None:
    handle = function(guest, load(guest))
    for number in (15, 18, 1000):
        assert launch(guest, handle, bytes(12), attributes=attribute(number, 1)) == NOT_SUPPORTED
    assert launch(guest, handle, bytes(12), attributes=attribute(13, 1)) == NOT_SUPPORTED
    assert launch(guest, handle, bytes(12), attributes=attribute(13, 0)) == 0
    for number in (7, 12):
        assert launch(guest, handle, bytes(12), attributes=attribute(number, 0xDEAD)) == INVALID_HANDLE


def test_launch_of_what_is_no_function(guest: Guest) -> None:
    module = load(guest)
    for handle in (0, 1, module, function(guest, module) + 16, function(guest, module) ^ 1 << 28, 2**64 - 1):
        assert launch(guest, handle, bytes(12)) == INVALID_HANDLE


# ---- graphs ----


def kernel_node(handle: int, packed: bytes) -> bytes:
    return (
        struct.pack("<QQ8I", handle, 0, 1, 1, 1, 1, 1, 1, 0, len(packed)) + packed + bytes(-len(packed) % 16)
    )


def add_node(
    guest: Guest, call: int, graph: int, dependencies: list[int], *more: int, body: bytes = b""
) -> Result:
    listed = b"".join(struct.pack("<Q", d) for d in dependencies)
    return guest.ask(call, graph, len(dependencies), *more, payload=listed + bytes(-len(listed) % 16) + body)


def test_graph_handles_end_with_their_graph(guest: Guest) -> None:
    graph, inner = (guest.ask(CallId.cuGraphCreate, 0).values[0] for _ in range(2))
    handle = function(guest, load(guest))
    first = add_node(guest, CallId.cuGraphAddEmptyNode, graph, []).values[0]
    second = add_node(
        guest, CallId.cuGraphAddKernelNode_v2, graph, [first], body=kernel_node(handle, bytes(12))
    ).values[0]
    child = add_node(guest, CallId.cuGraphAddChildGraphNode, graph, [first, second], inner).values[0]
    below = guest.ask(CallId.cuGraphChildGraphNodeGetGraph, child).values[0]
    deeper = add_node(guest, CallId.cuGraphAddEmptyNode, below, []).values[0]
    nodes = guest.ask(CallId.cuGraphGetNodes, graph, 0, 1)
    assert nodes.values[0] == 3
    assert set(struct.unpack("<3Q", payload_of(guest, nodes))) == {first, second, child}
    assert guest.ask(CallId.cuGraphDestroy, below).status == INVALID_VALUE
    assert add_node(guest, CallId.cuGraphAddEmptyNode, graph, [second + (100 << 4)]).status == INVALID_VALUE
    assert add_node(guest, CallId.cuGraphAddEmptyNode, graph, [handle]).status == INVALID_VALUE
    guest.send(CallId.cuGraphDestroy, graph)
    for node in (first, second, child, deeper):
        assert guest.ask(CallId.cuGraphNodeGetType, node).status == INVALID_HANDLE
        assert guest.ask(CallId.cuGraphDestroyNode, node).status == INVALID_VALUE
    for gone in (graph, below):
        assert guest.ask(CallId.cuGraphGetNodes, gone, 0, 1).status == INVALID_VALUE
        assert guest.ask(CallId.cuGraphInstantiateWithParams, gone, 0, 0).status == INVALID_VALUE
    assert guest.ask(CallId.cuGraphGetNodes, inner, 0, 0).status == 0


def test_child_graph_goes_with_its_node(guest: Guest) -> None:
    graph, inner = (guest.ask(CallId.cuGraphCreate, 0).values[0] for _ in range(2))
    child = add_node(guest, CallId.cuGraphAddChildGraphNode, graph, [], inner).values[0]
    below = guest.ask(CallId.cuGraphChildGraphNodeGetGraph, child).values[0]
    deeper = add_node(guest, CallId.cuGraphAddEmptyNode, below, []).values[0]
    assert guest.ask(CallId.cuGraphDestroyNode, child).status == 0
    assert guest.ask(CallId.cuGraphGetNodes, below, 0, 0).status == INVALID_VALUE
    assert guest.ask(CallId.cuGraphNodeGetType, deeper).status == INVALID_HANDLE


def test_many_nodes_come_in_pages(guest: Guest) -> None:
    graph = guest.ask(CallId.cuGraphCreate, 0).values[0]
    made = {add_node(guest, CallId.cuGraphAddEmptyNode, graph, []).values[0] for _ in range(1100)}
    found: list[int] = []
    while len(found) < 1100:
        page = guest.ask(CallId.cuGraphGetNodes, graph, len(found), 1)
        assert page.values[0] == 1100
        assert page.payload_length > 0
        found += struct.unpack(f"<{page.payload_length // 8}Q", payload_of(guest, page))
    assert set(found) == made
    assert len(found) == 1100


def test_kernel_node_parameters_come_back_packed(guest: Guest) -> None:
    graph = guest.ask(CallId.cuGraphCreate, 0).values[0]
    packed = struct.pack("<3I", 7, 8, 9)
    for library in (False, True):
        handle = function(guest, load(guest, library=library))
        node = add_node(
            guest, CallId.cuGraphAddKernelNode_v2, graph, [], body=kernel_node(handle, packed)
        ).values[0]
        answer = guest.ask(CallId.cuGraphKernelNodeGetParams_v2, node)
        fields = struct.unpack_from("<QQ8I", payload_of(guest, answer))
        assert (fields[0], fields[2:]) == (handle, (1, 2, 3, 4, 5, 6, 7, 12))
        assert payload_of(guest, answer)[48:] == packed


@pytest.mark.parametrize("claimed", [8, 13 + 16, 2**32 - 1])
def test_kernel_node_lengths(guest: Guest, claimed: int) -> None:
    graph = guest.ask(CallId.cuGraphCreate, 0).values[0]
    handle = function(guest, load(guest))
    body = struct.pack("<QQ8I", handle, 0, 1, 1, 1, 1, 1, 1, 0, claimed) + bytes(16)
    assert add_node(guest, CallId.cuGraphAddKernelNode_v2, graph, [], body=body).status == INVALID_VALUE
    assert add_node(guest, CallId.cuGraphAddKernelNode_v2, graph, [], body=body[:40]).status == INVALID_VALUE


def copy_body(
    *,
    source: int,
    source_type: int,
    destination: int,
    destination_type: int,
    width: int = 64,
    height: int = 1,
    pitch: int = 64,
    y: int = 0,
    depth: int = 1,
    rows: int | None = None,
    level: int = 0,
) -> bytes:
    rows = height if rows is None else rows
    one = struct.pack("<4QI4xQQQQQQ", 0, y, 0, level, source_type, source, source, 0, 0, pitch, rows)
    two = struct.pack(
        "<4QI4xQQQQQQ", 0, y, 0, 0, destination_type, destination, destination, 0, 0, pitch, rows
    )
    return one + two + struct.pack("<3Q", width, height, depth)


def test_copy_nodes_name_registered_arena_memory_or_device_memory(guest: Guest) -> None:
    graph = guest.ask(CallId.cuGraphCreate, 0).values[0]
    registered, arena_end = guest.arena, guest.arena + guest.arena_size

    def add(flags: int, **fields: int) -> int:
        body = copy_body(
            **{"source": 0x5000, "source_type": 2, "destination": 0x6000, "destination_type": 2} | fields
        )
        return add_node(guest, CallId.cuGraphAddMemcpyNode, graph, [], 0, flags, body=body).status

    assert add(0) == 0
    assert add(1, source=registered, source_type=1) == 0
    assert add(2, destination=registered + 4096, destination_type=1) == 0
    assert add(0, source=0x5000, source_type=1) == NOT_SUPPORTED  # an address of the worker's
    assert add(0, source=registered, source_type=4) == NOT_SUPPORTED
    assert add(1, source=registered, source_type=2) == NOT_SUPPORTED
    assert add(1, source=registered, source_type=3) == NOT_SUPPORTED
    assert add(1, source=arena_end - 64, source_type=1) == INVALID_VALUE  # not registered
    assert add(1, source=arena_end - 32, source_type=1) == INVALID_VALUE
    assert add(1, source=0, source_type=1) == INVALID_VALUE  # the device page
    assert add(1, source=PAGE, source_type=1) == INVALID_VALUE
    assert add(1, source=registered, source_type=1, width=1 << 40) == INVALID_VALUE
    assert add(1, source=registered, source_type=1, height=1 << 40, pitch=1 << 40) == INVALID_VALUE
    assert add(1, source=registered, source_type=1, y=2**64 - 1) == INVALID_VALUE
    # To a driver no pitch and no height are as much as the box needs, which would be more than has been measured.
    assert add(1, source=registered, source_type=1, height=1 << 20, pitch=0) == INVALID_VALUE
    assert add(1, source=registered, source_type=1, height=1 << 20, pitch=63) == INVALID_VALUE
    assert (
        add(2, destination=registered, destination_type=1, height=2, rows=0, depth=1 << 20) == INVALID_VALUE
    )
    assert (
        add(2, destination=registered, destination_type=1, height=2, rows=1, depth=1 << 20) == INVALID_VALUE
    )
    assert add(1, source=registered, source_type=1, height=2, rows=0) == 0
    assert add(1, source=registered, source_type=1, level=1) == 0  # no driver looks at it
    body = copy_body(source=0x5000, source_type=2, destination=0x6000, destination_type=2)
    assert (
        add_node(guest, CallId.cuGraphAddMemcpyNode, graph, [], 0, 0, body=body[:-8]).status == INVALID_VALUE
    )


def test_host_nodes_that_call_the_same_share_what_is_kept_of_them(guest: Guest) -> None:
    """It is kept as long as the session, so a program that changes a node again and again must not have it grow."""
    graph, before = guest.ask(CallId.cuGraphCreate, 0).values[0], look(guest, HOST_USERS)
    pairs = [struct.pack("<QQ", 0x1000, user) for user in (1, 2, 3)]
    made = add_node(guest, CallId.cuGraphAddHostNode, graph, [], body=pairs[0])
    assert made.status == 0
    for pair in pairs * 10:
        assert guest.ask(CallId.cuGraphHostNodeSetParams, made.values[0], payload=pair).status == 0
    assert look(guest, HOST_USERS) == before + len(pairs)


def test_instances(guest: Guest) -> None:
    graph = guest.ask(CallId.cuGraphCreate, 0).values[0]
    made = guest.ask(CallId.cuGraphInstantiateWithParams, graph, 0, 0)
    assert made.status == 0
    assert guest.ask(CallId.cuGraphInstantiateWithParams, graph, 4, 0).status == NOT_SUPPORTED
    before = look(guest, LAUNCHES)
    guest.send(CallId.cuGraphLaunch, made.values[0], 0)
    assert look(guest, LAUNCHES) == before + 1
    guest.send(CallId.cuGraphExecDestroy, made.values[0])
    assert guest.ask(CallId.cuGraphLaunch, made.values[0], 0).status == INVALID_VALUE
    assert guest.ask(CallId.cuGraphExecDestroy, made.values[0]).status == INVALID_VALUE


# ---- links ----


def test_instances_end_with_their_context_in_the_driver_too(guest: Guest) -> None:
    """Nobody could name them any more, and they are in no context that would take them along."""
    graph, second = guest.ask(CallId.cuGraphCreate, 0).values[0], CONTEXT + 16
    kept = guest.ask(CallId.cuGraphInstantiateWithParams, graph, 0, 0).values[0]
    before = look(guest, INSTANCES)
    assert guest.ask(CallId.wireContextCreate, second, 0).status == 0
    for _ in range(3):
        assert guest.ask(CallId.cuGraphInstantiateWithParams, graph, 0, 0).status == 0
    assert look(guest, INSTANCES) == before + 3
    assert guest.ask(CallId.wireContextDestroy, second).status == 0
    assert look(guest, INSTANCES) == before
    assert guest.ask(CallId.cuGraphLaunch, kept, 0).status == 0


def test_link(guest: Guest) -> None:
    state = guest.ask(CallId.cuLinkCreate_v2, 1, payload=options((6, 5000))).values[0]
    for blob, (text, status, error) in enumerate(
        [(b"fine\0", 0, 0), (b"fail4\0", INVALID_PTX, 400)], start=1
    ):
        guest.send(CallId.wireBlobWrite, blob, len(text), 0, payload=text)
        added = guest.ask(CallId.cuLinkAddData_v2, state, 1, blob, 0, payload=b"name")
        assert added.status == status
        assert struct.unpack_from("<II", payload_of(guest, added))[1] == error
    assert guest.ask(CallId.cuLinkAddData_v2, state, 1, 99, 0).status == INVALID_VALUE
    guest.send(CallId.wireBlobWrite, 7, 4, 0, payload=b"\1\2\3\4")
    assert guest.ask(CallId.cuLinkAddData_v2, state, 0, 7, 0).status == INVALID_IMAGE
    whole = guest.ask(CallId.cuLinkComplete, state)
    cubin = b""
    while len(cubin) < whole.values[1]:
        cubin += payload_of(guest, guest.ask(CallId.wireBlobRead, whole.values[0], len(cubin)))
    assert cubin == bytes(i * 7 & 255 for i in range(10_000))
    guest.send(CallId.cuLinkDestroy, state)
    assert guest.ask(CallId.cuLinkComplete, state).status == INVALID_HANDLE


# ---- anything at all ----


def test_random_calls_never_pass_a_dead_pointer(fake_code: Path) -> None:
    """In a process of its own, because the driver there aborts when it is passed one."""
    for seed in range(4):
        command = [sys.executable, "-P", str(HERE / "fuzz_code.py"), str(fake_code), str(seed), "3000"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert int(done.stdout) > 100  # it was not all refused


def test_session_ends_with_everything_alive(fake_code: Path) -> None:
    session = Replayed(fake_code)
    session.guest.retain()
    load(session.guest)
    function(session.guest, load(session.guest, library=True))
    session.guest.ask(CallId.cuGraphCreate, 0)
    session.guest.ask(CallId.cuLinkCreate_v2, 1, payload=options((6, 5000)))
    session.guest.send(CallId.wireBlobWrite, 1, 10, 0, payload=b"12345")
    session.close()
