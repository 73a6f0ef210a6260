# SPDX-License-Identifier: Apache-2.0
"""A call that a guest made through registers, carried through the ring of its slot by the host.

For guests that cannot map BAR1, so it may be slow: the answer is looked for, ever more rarely. The record is the
guest's own; what is wrong with it is answered as the driver would.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Final

import trio

from vgpu.transport.errors import RemoteProtocolError
from vgpu.transport.ring import RingProducer
from vgpu.transport.vfio_user.registers import CALL_DATA_SIZE
from vgpu.transport.wire import FLAG_REPLY, CallHeader, Result

CALL_SECONDS: Final = 60.0
SHORTEST_SECONDS: Final = 0.0005
LONGEST_SECONDS: Final = 0.02
# CUresult of what no worker answered.
INVALID_VALUE: Final = 1
TIMEOUT: Final = 909
UNKNOWN: Final = 999

Answer = tuple[Result, bytes]


async def carry_call(
    bar1: int,
    offset: int,
    size: int,
    header: bytes,
    payload: bytes,
    *,
    ring: Callable[[], None],
    lives: Callable[[], bool],
) -> Answer:
    """Push the record into the segment at ``offset`` and wait for its answer, a minute at most.

    ``ring`` sends the worker a doorbell; ``lives`` says whether there is a worker. Cancelled before its first wait it has
    pushed nothing; later the record stays in the ring and nobody waits for its answer.
    """
    await trio.lowlevel.checkpoint()
    try:
        call = CallHeader.decode(header)
    except RemoteProtocolError:
        return Result(int.from_bytes(header[8:12], "little"), INVALID_VALUE), b""
    with mmap.mmap(bar1, size, offset=offset) as mapping, memoryview(mapping) as memory:
        try:
            producer = RingProducer(memory)
        except RemoteProtocolError:
            return Result(call.sequence, INVALID_VALUE), b""
        try:
            with trio.move_on_after(CALL_SECONDS):
                return await _carry(producer, call, payload, ring, lives)
            return Result(call.sequence, TIMEOUT), b""
        except RemoteProtocolError:
            return Result(call.sequence, INVALID_VALUE), b""
        finally:
            producer.close()


async def _carry(
    producer: RingProducer,
    call: CallHeader,
    payload: bytes,
    ring: Callable[[], None],
    lives: Callable[[], bool],
) -> Answer:
    pushed = False
    pause = SHORTEST_SECONDS
    while True:
        if not pushed:
            pushed = producer.try_push(call, payload)
        if pushed and producer.take_doorbell():
            ring()
        if pushed and not call.flags & FLAG_REPLY:
            return Result(call.sequence), b""
        answer = producer.answer(call, CALL_DATA_SIZE) if pushed else None
        if answer is not None:
            return answer
        error = producer.session_error()
        if error is not None or not lives():
            return Result(call.sequence, error or UNKNOWN), b""
        await trio.sleep(pause)
        pause = min(pause * 1.5, LONGEST_SECONDS)
