# SPDX-License-Identifier: Apache-2.0
"""Ending all sessions of a VM, whichever executors have them, and waiting until they have gone.

For whoever takes something from the VM that its sessions stand on: its limits, its registration. Never touches another
VM's sessions: each executor is told the name and decides by itself whether it is meant.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

import trio

from . import ActorError, Ref, WhichChildren
from .fault_messages import EndSessionsOf
from .messages import Sample

__all__ = ["end_sessions"]

# An executor kills its worker and waits up to three seconds for its end; one in mid-handshake reads nothing for a while.
GONE_SECONDS = 15.0


async def end_sessions(
    find: Callable[[str], Ref[object]], gpus: Iterable[str], vm: str, error: int, what: str
) -> None:
    """End a VM's sessions on these GPUs with this error; returns when their workers have gone.

    A session that is just beginning, and takes longer than ``GONE_SECONDS`` over it, is not waited for: it ends as soon as it
    has begun. Cancelled, those who were told end all the same.
    """
    order = EndSessionsOf(vm, error, what)

    async def end(executor: Ref[object]) -> None:
        # The question lies behind the order in the mailbox. It comes back unread when the executor's cleanup, and with it
        # the worker, is over; whoever answers was not meant.
        with contextlib.suppress(ActorError):
            executor.notify(order)
            await executor.ask(Sample(), timeout_seconds=GONE_SECONDS)

    async with trio.open_nursery() as nursery:
        for gpu in gpus:
            with contextlib.suppress(ActorError):
                for child in await find(f"{gpu}/executors").ask(WhichChildren()):
                    nursery.start_soon(end, find(child.name))
