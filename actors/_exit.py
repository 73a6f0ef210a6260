# SPDX-License-Identifier: Apache-2.0
"""Why an actor ended. Values only: a supervisor's decisions are made on these and nothing else.

The words are Erlang's. `Normal` and `Shutdown` are orderly ends, the others are not; `is_abnormal` is the one
place that says so, and the restart type `transient` is defined by it.
"""

from __future__ import annotations

from typing import TypeAlias

import attrs

__all__ = [
    "ASKED",
    "AUTO_SHUTDOWN",
    "Crashed",
    "ExitReason",
    "Killed",
    "NoActor",
    "Normal",
    "Shutdown",
    "is_abnormal",
]


@attrs.frozen
class Normal:
    """The actor finished its work."""

    def __str__(self) -> str:
        return "normal"


@attrs.frozen
class Shutdown:
    """The actor was asked to stop, or gave up in order; `cause` is for people."""

    cause: str = ""

    def __str__(self) -> str:
        return f"shutdown ({self.cause})" if self.cause else "shutdown"


@attrs.frozen
class Crashed:
    """A handler, a hook or a background task of the actor raised `error`."""

    error: Exception

    def __str__(self) -> str:
        return f"crashed: {type(self.error).__name__}: {self.error}"


@attrs.frozen
class Killed:
    """The actor's task was cancelled: brutal kill, a shutdown that took too long, or its nursery ended."""

    cause: str = ""

    def __str__(self) -> str:
        return f"killed ({self.cause})" if self.cause else "killed"


@attrs.frozen
class NoActor:
    """There was no such actor to begin with, or its end is long forgotten."""

    def __str__(self) -> str:
        return "no such actor"


# Ends of a top-level actor that are nobody's failure.
ASKED = Shutdown("asked")
AUTO_SHUTDOWN = Shutdown("auto_shutdown")

ExitReason: TypeAlias = Normal | Shutdown | Crashed | Killed | NoActor


def is_abnormal(reason: ExitReason) -> bool:
    """Whether a transient child that ended for this reason is to be restarted."""
    return not isinstance(reason, Normal | Shutdown)
