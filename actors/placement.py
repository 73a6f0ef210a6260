# SPDX-License-Identifier: Apache-2.0
"""Which GPU a new session goes to, wherever its guest came from."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from . import Actor, ActorError, ActorGone, CountChildren, NoActor


def least_used(sessions: Mapping[str, int]) -> str:
    """The GPU with the fewest living sessions; of several the one named first.

    Raises:
        ValueError: no GPU at all.
    """
    return min(sessions, key=lambda name: sessions[name])


async def choose_gpu(asker: Actor, executors: tuple[str, ...]) -> str:
    """The executors supervisor of the GPU that the next session goes to.

    Raises:
        ActorGone: no GPU's actors live.
    """
    if len(executors) == 1:
        return executors[0]
    living: dict[str, int] = {}
    for name in executors:
        # A GPU that does not answer is left out: its actors are just being restarted.
        with contextlib.suppress(ActorError):
            living[name] = (await asker.find(name).ask(CountChildren())).active
    if not living:
        raise ActorGone(executors[0], NoActor())
    return least_used(living)


def pool_of(executors: str) -> str:
    """The pool of warm workers of the same GPU."""
    return f"{executors.rpartition('/')[0]}/workers"
