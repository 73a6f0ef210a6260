# SPDX-License-Identifier: Apache-2.0
"""A guest that calls at random, with handles it was given, handles that are gone and numbers it made up.

    python fuzz_code.py LIBRARY SEED CALLS [MEMORY]

With MEMORY, a quota or 0, it knows of memory nodes too, and what counts has to be what the driver holds. Prints how many calls
succeeded. The driver aborts the process when it is passed a pointer that is not alive.
"""

from __future__ import annotations

import random
import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.gpu.replay.guest import Guest, replayed
from vgpu.transport._generated_calls import CallId

IMAGE = b".version 7.0\0"
CALLS = [
    CallId.wireModuleLoad, CallId.wireFunctionGet, CallId.wireParameterInfo, CallId.wireFunctionDescribe, CallId.wireLaunch,
    CallId.wireBlobWrite, CallId.wireBlobRead, CallId.wireBlobFree, CallId.cuModuleUnload, CallId.cuLibraryUnload,
    CallId.cuLibraryGetModule, CallId.cuLibraryGetGlobal, CallId.cuLibraryEnumerateKernels, CallId.cuKernelGetFunction,
    CallId.cuKernelGetAttribute, CallId.cuFuncGetAttribute, CallId.cuKernelSetAttribute, CallId.cuFuncSetAttribute,
    CallId.cuKernelGetName, CallId.cuFuncGetName, CallId.cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags,
    CallId.cuOccupancyMaxActiveClusters, CallId.cuGraphCreate, CallId.cuGraphDestroy, CallId.cuGraphClone,
    CallId.cuGraphAddEmptyNode, CallId.cuGraphAddKernelNode_v2, CallId.cuGraphAddChildGraphNode, CallId.cuGraphAddMemcpyNode,
    CallId.cuGraphAddMemsetNode, CallId.cuGraphChildGraphNodeGetGraph, CallId.cuGraphGetNodes, CallId.cuGraphNodeGetType,
    CallId.cuGraphDestroyNode, CallId.cuGraphAddDependencies_v2, CallId.cuGraphKernelNodeGetParams_v2,
    CallId.cuGraphInstantiateWithParams, CallId.cuGraphLaunch, CallId.cuGraphExecDestroy, CallId.cuLinkCreate_v2,
    CallId.cuLinkAddData_v2, CallId.cuLinkComplete, CallId.cuLinkDestroy,
]  # fmt: skip
MEMORY_CALLS = [
    CallId.cuGraphAddMemAllocNode, CallId.cuGraphAddMemFreeNode, CallId.cuGraphMemAllocNodeGetParams,
    CallId.cuGraphMemFreeNodeGetParams, CallId.cuMemFreeAsync, CallId.cuDeviceGraphMemTrim, CallId.cuGraphUpload,
    CallId.cuDeviceGetGraphMemAttribute, CallId.cuDeviceSetGraphMemAttribute, CallId.cuGraphRemoveDependencies_v2,
]  # fmt: skip
MODULE, FUNCTION, LIBRARY, KERNEL, GRAPH, NODE, EXEC, LINK = 4, 5, 6, 7, 8, 9, 10, 12
OBJECT = {
    CallId.wireLaunch: FUNCTION, CallId.wireFunctionGet: MODULE, CallId.wireFunctionDescribe: KERNEL,
    CallId.cuModuleUnload: MODULE, CallId.cuLibraryUnload: LIBRARY, CallId.cuLibraryGetModule: LIBRARY,
    CallId.cuLibraryEnumerateKernels: LIBRARY, CallId.cuKernelGetFunction: KERNEL, CallId.cuFuncGetName: FUNCTION,
    CallId.cuKernelGetName: KERNEL, CallId.cuGraphDestroy: GRAPH, CallId.cuGraphClone: GRAPH, CallId.cuGraphGetNodes: GRAPH,
    CallId.cuGraphAddEmptyNode: GRAPH, CallId.cuGraphAddKernelNode_v2: GRAPH, CallId.cuGraphAddChildGraphNode: GRAPH,
    CallId.cuGraphAddMemsetNode: GRAPH, CallId.cuGraphNodeGetType: NODE, CallId.cuGraphDestroyNode: NODE,
    CallId.cuGraphChildGraphNodeGetGraph: NODE, CallId.cuGraphKernelNodeGetParams_v2: NODE,
    CallId.cuGraphInstantiateWithParams: GRAPH, CallId.cuGraphLaunch: EXEC, CallId.cuGraphExecDestroy: EXEC,
    CallId.cuLinkComplete: LINK, CallId.cuLinkDestroy: LINK, CallId.cuGraphAddMemAllocNode: GRAPH,
    CallId.cuGraphAddMemFreeNode: GRAPH, CallId.cuGraphMemAllocNodeGetParams: NODE, CallId.cuGraphMemFreeNodeGetParams: NODE,
    CallId.cuGraphUpload: EXEC,
}  # fmt: skip
ADDS = {
    CallId.cuGraphAddEmptyNode, CallId.cuGraphAddKernelNode_v2, CallId.cuGraphAddChildGraphNode, CallId.cuGraphAddMemsetNode,
    CallId.cuGraphAddMemAllocNode, CallId.cuGraphAddMemFreeNode,
}  # fmt: skip


class Chance:
    """Draws calls; keeps what was answered as handles to try."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.handles: list[int] = []
        self.addresses: list[int] = [0]

    def word(self) -> int:
        draw = self.random.random()
        if self.handles and draw < 0.55:
            return self.random.choice(self.handles[-40:])
        if self.handles and draw < 0.65:
            return self.random.choice(self.handles) ^ 1 << self.random.randrange(47)
        return self.random.choice([0, 0, 1, 1, 2, 3, 16, 2**32, 2**64 - 1, self.random.getrandbits(64)])

    def payload(self, call: int) -> bytes:
        pick = self.random.random
        if call == CallId.wireModuleLoad and pick() < 0.8:
            return struct.pack("<IIQ", 1, 0, len(IMAGE)) + IMAGE
        if call == CallId.wireFunctionGet:
            return self.random.choice([b"k0", b"k3", b"k900", b"unloadable", b"long5000", b"no"])
        if call == CallId.cuGraphAddKernelNode_v2 and pick() < 0.7:
            return struct.pack("<QQ8I", self.word(), 0, 1, 1, 1, 1, 1, 1, 0, 12) + bytes(16)
        if call == CallId.cuGraphAddMemAllocNode and pick() < 0.9:
            size = self.random.choice([1, 4096, 3 << 20, 40 << 20, 90 << 20, 1 << 50, 2**64 - 1])
            return struct.pack("<QQII", 0, size, self.random.choice([0, 0, 1, 99]), 0) + struct.pack(
                "<iii", 1, 0, 3
            ).ljust(192, b"\0")
        if pick() < 0.5:
            return b"".join(struct.pack("<Q", self.word()) for _ in range(self.random.randrange(0, 40)))
        return self.random.randbytes(self.random.randrange(0, 400))


def play(guest: Guest, seed: int, count: int, calls: list[CallId]) -> int:
    chance = Chance(seed)
    good = 0
    for _ in range(count):
        call = chance.random.choice(calls)
        words = [chance.word() for _ in range(8)]
        if call == CallId.wireModuleLoad:
            words[:4] = [chance.random.randrange(2), 0, 0, chance.random.choice([0, 0, 0, 1, 70])]
        if call == CallId.wireLaunch and chance.random.random() < 0.7:
            words[4:7] = [0, 0, chance.random.choice([0, 12, 12, 64])]
        if chance.random.random() < 0.7:  # a handle of the right kind, or one that was
            kind = OBJECT.get(call)
            known = [h for h in chance.handles if h >> 42 == kind]
            if known:
                words[0] = chance.random.choice(known[-10:])
        if call in ADDS and chance.random.random() < 0.7:
            words[1] = 0
        if call in (CallId.cuGraphAddMemFreeNode, CallId.cuMemFreeAsync) and chance.random.random() < 0.9:
            words[2 if call == CallId.cuGraphAddMemFreeNode else 0] = chance.random.choice(
                chance.addresses[-12:]
            )
        if call == CallId.cuGraphInstantiateWithParams:
            words[1:3] = [chance.random.choice([0, 0, 1, 2, 4]), 0]
        if (
            call in (CallId.cuGraphLaunch, CallId.cuGraphUpload, CallId.cuMemFreeAsync)
            and chance.random.random() < 0.8
        ):
            words[1] = 0
        if call == CallId.wireBlobWrite:
            words[:3] = [chance.random.randrange(1, 5), chance.random.randrange(0, 500), 0]
        result = guest.ask(call, *words, payload=chance.payload(call))
        if result.status == 0:
            good += 1
            chance.handles += [v for v in result.values[:2] if v >= 1 << 42]
            if call == CallId.cuGraphAddMemAllocNode:
                chance.addresses.append(result.values[1])
    return good


if __name__ == "__main__":
    library, seed, count, *memory = sys.argv[1:]
    with replayed(Path(library), memory_limit=int(memory[0]) if memory else 0) as session:
        session.guest.retain()
        print(play(session.guest, int(seed), int(count), CALLS + 2 * MEMORY_CALLS if memory else CALLS))
        if memory:
            reserved = session.guest.ask(CallId.cuCtxGetLimit, 1200).values[0]
            most = session.guest.ask(CallId.cuCtxGetLimit, 1201).values[0]
            assert session.grant.get("memory_used_bytes") == reserved
            assert not int(memory[0]) or most <= int(memory[0]), (most, memory)
