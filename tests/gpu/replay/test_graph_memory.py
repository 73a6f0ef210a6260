# SPDX-License-Identifier: Apache-2.0
"""Memory nodes of graphs against a hostile guest, and against drivers that take memory at other times and in larger pieces.

What is refused must not reach the driver (which crashes there), nothing may run that is beyond the quota, and what the driver
holds is what counts.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu.replay.guest import HERE, Guest, Replayed, build_fake_driver, replayed, used
from vgpu.gpu.errors import Result as Code
from vgpu.transport._generated_calls import CallId

MIB = 1 << 20
LAUNCHES, RESERVED, MOST_AT_LAUNCH = 1100, 1200, 1201
AUTO_FREE, UPLOAD = 1, 2


@pytest.fixture(scope="module", params=["INSTANTIATE", "UPLOAD", "LAUNCH"])
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("graphs")
    return request.param, build_fake_driver(folder, "fake_graph_memory.c", f"-DTAKEN_AT={request.param}")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_driver(tmp_path_factory.mktemp("graphs"), "fake_graph_memory.c")


@pytest.fixture
def session(library: Path) -> Iterator[Replayed]:
    with replayed(library) as made:
        made.guest.retain()
        yield made


def look(guest: Guest, what: int) -> int:
    return guest.ask(CallId.cuCtxGetLimit, what).values[0]


def node(size: int, *access: tuple[int, int, int], count: int | None = None) -> bytes:
    given = b"".join(struct.pack("<iii", *one) for one in access)
    number = len(access) if count is None else count
    return struct.pack("<QQII", 0, size, number, 0) + given.ljust(192, b"\0")


def graph_of(guest: Guest, size: int, *, frees: bool = True) -> tuple[int, int]:
    """A graph that allocates, and its address."""
    graph = guest.ask(CallId.cuGraphCreate, 0).values[0]
    made = guest.ask(CallId.cuGraphAddMemAllocNode, graph, 0, payload=node(size))
    assert made.status == 0
    if frees:
        assert guest.ask(CallId.cuGraphAddMemFreeNode, graph, 0, made.values[1]).status == 0
    return graph, made.values[1]


def instance_of(guest: Guest, graph: int, flags: int = 0) -> int:
    made = guest.ask(CallId.cuGraphInstantiateWithParams, graph, flags, 0)
    assert made.status == 0
    return made.values[0]


# ---- fields


@pytest.mark.parametrize(
    ("payload", "status"),
    [
        (node(0), Code.INVALID_VALUE),
        (node(1 << 63), Code.OUT_OF_MEMORY),
        (node((1 << 64) - 1), Code.OUT_OF_MEMORY),
        (node(64)[:-1], Code.INVALID_VALUE),
        (b"", Code.INVALID_VALUE),
        (node(64, count=17), Code.INVALID_VALUE),
        (node(64, count=0xFFFFFFFF), Code.INVALID_VALUE),
        (node(64, (2, 0, 3)), Code.INVALID_VALUE),
        (node(64, (1, 0, 2)), Code.INVALID_VALUE),
        (node(64, (1, 77, 3)), 0),  # whichever device it says, it is this one
    ],
)
def test_fields_of_an_allocation(session: Replayed, payload: bytes, status: int) -> None:
    guest = session.guest
    graph = guest.ask(CallId.cuGraphCreate, 0).values[0]
    assert guest.ask(CallId.cuGraphAddMemAllocNode, graph, 0, payload=payload).status == status
    assert (
        guest.ask(CallId.cuGraphAddMemAllocNode, graph ^ 16, 0, payload=payload).status == Code.INVALID_VALUE
    )
    assert (
        guest.ask(CallId.cuGraphAddMemAllocNode, graph, 1 << 60, payload=payload).status == Code.INVALID_VALUE
    )


def test_addresses_that_are_nobodys(session: Replayed) -> None:
    guest = session.guest
    graph, address = graph_of(guest, MIB, frees=False)
    executable = instance_of(guest, graph)
    other = guest.ask(CallId.cuGraphCreate, 0).values[0]
    for wrong in (0, address + 1, address - 1, address + MIB, (1 << 64) - 1):
        assert guest.ask(CallId.cuGraphAddMemFreeNode, other, 0, wrong).status == Code.INVALID_VALUE
        assert guest.ask(CallId.cuMemFreeAsync, wrong, 0).status == Code.INVALID_VALUE
        assert guest.ask(CallId.wireMemoryFree, wrong).status == Code.INVALID_VALUE
    assert guest.ask(CallId.cuMemFreeAsync, address, 0).status == Code.INVALID_VALUE  # not allocated yet
    assert guest.ask(CallId.cuGraphLaunch, executable, 0).status == 0
    assert guest.ask(CallId.cuGraphLaunch, executable, 0).status == Code.INVALID_VALUE
    assert guest.ask(CallId.cuMemFreeAsync, address, 0).status == 0
    assert guest.ask(CallId.cuMemFreeAsync, address, 0).status == Code.INVALID_VALUE
    assert guest.ask(CallId.cuGraphExecDestroy, executable).status == 0
    assert guest.ask(CallId.cuGraphDestroy, graph).status == 0
    assert guest.ask(CallId.cuGraphAddMemFreeNode, other, 0, address).status == Code.INVALID_VALUE  # gone


def test_what_copies_or_takes_apart_is_refused(session: Replayed) -> None:
    guest = session.guest
    graph, _ = graph_of(guest, MIB)
    other = guest.ask(CallId.cuGraphCreate, 0).values[0]
    first = guest.ask(CallId.cuGraphAddEmptyNode, graph, 0).values[0]
    assert guest.ask(CallId.cuGraphClone, graph).status == Code.NOT_SUPPORTED
    assert guest.ask(CallId.cuGraphAddChildGraphNode, other, 0, graph).status == Code.NOT_SUPPORTED
    assert guest.ask(CallId.cuGraphDestroyNode, first).status == Code.NOT_SUPPORTED
    pair = struct.pack("<QQQQ", first, 0, first, 0)
    assert (
        guest.ask(CallId.cuGraphRemoveDependencies_v2, graph, 1, 0, payload=pair).status == Code.NOT_SUPPORTED
    )


def test_a_node_that_could_not_be_made_is_in_no_graph(session: Replayed) -> None:
    guest = session.guest
    graph, other = (guest.ask(CallId.cuGraphCreate, 0).values[0] for _ in range(2))
    first = guest.ask(CallId.cuGraphAddEmptyNode, graph, 0).values[0]
    refused = guest.ask(CallId.cuGraphAddMemAllocNode, graph, 0, payload=node(1 << 61))
    assert refused.status == Code.OUT_OF_MEMORY
    assert guest.ask(CallId.cuGraphClone, graph).status == 0
    assert guest.ask(CallId.cuGraphAddChildGraphNode, other, 0, graph).status == 0
    assert guest.ask(CallId.cuGraphDestroyNode, first).status == 0


def test_a_part_of_another_graph_gets_no_memory_nodes(session: Replayed) -> None:
    """It would be launched with the other, which nothing here knows to have memory."""
    guest = session.guest
    inner, outer = (guest.ask(CallId.cuGraphCreate, 0).values[0] for _ in range(2))
    child = guest.ask(CallId.cuGraphAddChildGraphNode, outer, 0, inner)
    part = guest.ask(CallId.cuGraphChildGraphNodeGetGraph, child.values[0]).values[0]
    _, address = graph_of(guest, MIB, frees=False)
    made = guest.ask(CallId.cuGraphAddMemAllocNode, part, 0, payload=node(64))
    assert made.status == Code.NOT_SUPPORTED
    assert guest.ask(CallId.cuGraphAddMemFreeNode, part, 0, address).status == Code.NOT_SUPPORTED
    executable, whole = instance_of(guest, outer), graph_of(guest, MIB)[0]
    for graph, status in [(whole, Code.NOT_SUPPORTED), (inner, 0), (inner + 160, Code.INVALID_VALUE)]:
        replaced = guest.ask(CallId.cuGraphExecChildGraphNodeSetParams, executable, child.values[0], graph)
        assert replaced.status == status


STREAM = 2 << 42 | 1 << 28 | 1 << 4


def test_what_is_captured_into_stays_there(library: Path) -> None:
    """CUDA permits everything then but destroying the graph and taking nodes out, and says nothing of who does it all the same."""
    with replayed(library, memory_limit=100 * MIB) as session:
        guest = session.guest
        guest.retain()
        assert guest.ask(CallId.cuStreamCreateWithPriority, STREAM, 1, 0).status == 0
        assert guest.ask(CallId.cuStreamBeginCapture_v2, STREAM, 0).status == 0
        made = guest.ask(CallId.cuMemAllocAsync, 101 * MIB, STREAM)
        graph = guest.ask(CallId.cuStreamGetCaptureInfo_v3, STREAM, 0, 0).values[2]
        assert made.values[1] == graph != 0
        assert guest.ask(CallId.cuGraphDestroy, graph).status == Code.ILLEGAL_STATE
        ended = guest.ask(CallId.cuStreamEndCapture, STREAM)
        assert (ended.status, ended.values[0]) == (0, graph)
        launched = guest.ask(CallId.cuGraphLaunch, instance_of(guest, graph), 0)
        assert launched.status == Code.OUT_OF_MEMORY  # its allocation is still known
        assert guest.ask(CallId.cuGraphDestroy, graph).status == 0


def test_parts_that_are_captured_into_stay_there(session: Replayed) -> None:
    guest = session.guest
    assert guest.ask(CallId.cuStreamCreateWithPriority, STREAM, 1, 0).status == 0
    inner, outer = (guest.ask(CallId.cuGraphCreate, 0).values[0] for _ in range(2))
    first = guest.ask(CallId.cuGraphAddEmptyNode, inner, 0).values[0]
    child = guest.ask(CallId.cuGraphAddChildGraphNode, outer, 0, inner).values[0]
    part = guest.ask(CallId.cuGraphChildGraphNodeGetGraph, child).values[0]
    for target, call, what in [
        (inner, CallId.cuGraphDestroy, inner),
        (inner, CallId.cuGraphDestroyNode, first),
        (part, CallId.cuGraphDestroy, outer),
        (part, CallId.cuGraphDestroyNode, child),
    ]:
        assert guest.ask(CallId.cuStreamBeginCaptureToGraph, STREAM, target, 0, 0).status == 0
        assert guest.ask(call, what).status == Code.ILLEGAL_STATE
        assert guest.ask(CallId.cuStreamEndCapture, STREAM).status == 0
    assert guest.ask(CallId.cuGraphDestroyNode, child).status == 0
    assert guest.ask(CallId.cuGraphDestroyNode, first).status == 0
    for graph in (inner, outer):
        assert guest.ask(CallId.cuGraphDestroy, graph).status == 0


# ---- quota


def test_within_the_quota_whenever_the_driver_takes_it(driver: tuple[str, Path]) -> None:
    when, library = driver
    with replayed(library, memory_limit=100 * MIB) as session:
        guest = session.guest
        guest.retain()
        graph, _ = graph_of(guest, 40 * MIB)
        executable = instance_of(guest, graph)
        assert used(session) == (64 * MIB if when == "INSTANTIATE" else 0)
        for _ in range(5):
            assert guest.ask(CallId.cuGraphLaunch, executable, 0).status == 0
            assert used(session) == look(guest, RESERVED) == 64 * MIB
        assert guest.ask(CallId.cuGraphExecDestroy, executable).status == 0
        assert used(session) == 0


def test_beyond_it_nothing_runs(driver: tuple[str, Path]) -> None:
    when, library = driver
    with replayed(library, memory_limit=100 * MIB) as session:
        guest = session.guest
        guest.retain()
        graph, _ = graph_of(guest, 101 * MIB)
        before = look(guest, LAUNCHES)
        made = guest.ask(CallId.cuGraphInstantiateWithParams, graph, 0, 0)
        if when == "INSTANTIATE":
            assert made.status == Code.OUT_OF_MEMORY
        else:
            executable = made.values[0]
            for call in (CallId.cuGraphLaunch, CallId.cuGraphUpload, CallId.cuGraphLaunch):
                assert guest.ask(call, executable, 0).status == Code.OUT_OF_MEMORY
        uploaded = guest.ask(CallId.cuGraphInstantiateWithParams, graph, UPLOAD, 0)
        assert uploaded.status == Code.OUT_OF_MEMORY
        assert (look(guest, LAUNCHES), look(guest, RESERVED), used(session)) == (before, 0, 0)


def test_pieces_that_are_larger_than_what_is_left(driver: tuple[str, Path]) -> None:
    """The driver takes 128 MiB for 97: seen before the launch where it takes them before it, and counted where it does not."""
    when, library = driver
    with replayed(library, memory_limit=100 * MIB) as session:
        guest = session.guest
        guest.retain()
        graph, _ = graph_of(guest, 97 * MIB)
        before = look(guest, LAUNCHES)
        made = guest.ask(CallId.cuGraphInstantiateWithParams, graph, 0, 0)
        if when == "INSTANTIATE":
            assert made.status == Code.OUT_OF_MEMORY
            assert used(session) == 0
            return
        status = guest.ask(CallId.cuGraphLaunch, made.values[0], 0).status
        if when == "UPLOAD":
            assert (status, look(guest, LAUNCHES)) == (Code.OUT_OF_MEMORY, before)
            assert used(session) == look(guest, RESERVED) == 0  # it has let go of it
        else:
            assert status == 0
            assert used(session) == look(guest, RESERVED) == 128 * MIB
            other, _ = graph_of(guest, MIB)
            launched = guest.ask(CallId.cuGraphLaunch, instance_of(guest, other), 0)
            assert launched.status in (0, Code.OUT_OF_MEMORY)  # the first may have been let go
            assert (
                used(session) == look(guest, RESERVED) <= 100 * MIB or launched.status == Code.OUT_OF_MEMORY
            )


def test_other_memory_gets_what_graphs_only_keep(driver: tuple[str, Path]) -> None:
    _, library = driver
    with replayed(library, memory_limit=100 * MIB) as session:
        guest = session.guest
        guest.retain()
        first, _ = graph_of(guest, 60 * MIB)
        executable = instance_of(guest, first)
        assert guest.ask(CallId.cuGraphLaunch, executable, 0).status == 0
        assert guest.ask(CallId.cuMemAlloc_v2, 90 * MIB).status == 0
        assert used(session) == 90 * MIB
        assert look(guest, RESERVED) == 0
        assert guest.ask(CallId.cuGraphLaunch, executable, 0).status == Code.OUT_OF_MEMORY


def test_what_is_allocated_is_not_let_go(library: Path) -> None:
    with replayed(library, memory_limit=100 * MIB) as session:
        guest = session.guest
        guest.retain()
        graph, address = graph_of(guest, 60 * MIB, frees=False)
        executable = instance_of(guest, graph, AUTO_FREE)
        for _ in range(4):
            assert guest.ask(CallId.cuGraphLaunch, executable, 0).status == 0
            assert used(session) == 64 * MIB
        other, _ = graph_of(guest, 40 * MIB)
        second = instance_of(guest, other)
        assert guest.ask(CallId.cuGraphLaunch, second, 0).status == Code.OUT_OF_MEMORY
        assert guest.ask(CallId.cuGraphLaunch, executable, 0).status == 0  # its own needs nothing more
        assert guest.ask(CallId.cuDeviceGraphMemTrim).status == 0
        assert used(session) == 64 * MIB
        assert guest.ask(CallId.wireMemoryFree, address).status in (0, Code.NOT_SUPPORTED, Code.INVALID_VALUE)
        assert look(guest, MOST_AT_LAUNCH) <= 100 * MIB


def test_graphs_without_memory_nodes_are_asked_nothing(session: Replayed) -> None:
    guest = session.guest
    graph = guest.ask(CallId.cuGraphCreate, 0).values[0]
    guest.ask(CallId.cuGraphAddEmptyNode, graph, 0)
    executable = instance_of(guest, graph)
    assert guest.ask(CallId.cuGraphLaunch, executable, 0).status == 0
    assert used(session) == 0


# ---- anything at all


@pytest.mark.parametrize("limit", [0, 200 * MIB])
def test_random_calls(library: Path, limit: int) -> None:
    """In a process of its own, because the driver there aborts when it is passed what is not alive."""
    for seed in range(3):
        command = [
            sys.executable,
            "-P",
            str(HERE / "fuzz_code.py"),
            str(library),
            str(seed),
            "3000",
            str(limit),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert int(done.stdout) > 100
