# SPDX-License-Identifier: Apache-2.0
"""What messages are, and the few that every actor system has.

A message is an instance of a frozen attrs class: it crosses from one actor to another, so neither may change it.
A message that wants an answer derives from `Request[R]`, where R is the type of the answer; `Ref.ask` is typed by it.
What one may ask of a supervisor stands here and not in the supervision room, because actors may ask for children
and may not import that room.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar  # noqa: F401 - Any stands in a quoted type

import attrs

from ._exit import ExitReason

if TYPE_CHECKING:
    from ._ref import Ref  # noqa: F401 - in a quoted type

__all__ = [
    "ChildCounts",
    "ChildInfo",
    "CountChildren",
    "DeleteChild",
    "Down",
    "Exit",
    "Request",
    "RestartChild",
    "StartChild",
    "StopRequest",
    "TerminateChild",
    "WhichChildren",
    "is_message_type",
]

R_co = TypeVar("R_co", covariant=True)


class Request(Generic[R_co]):
    """Base of messages that are asked: the handler's return value, of type R, is the answer."""

    __slots__ = ()


@attrs.frozen
class Down:
    """The end of a monitored actor. Exactly one a monitor, on the system lane."""

    monitor: int
    """What `Actor.monitor` returned."""
    name: str
    reason: ExitReason


@attrs.frozen
class Exit:
    """The end of a linked actor, for an actor that traps exits. At most one a link, on the system lane."""

    name: str
    reason: ExitReason


@attrs.frozen
class StopRequest:
    """Internal: end after the handler that now runs. Sent by `Ref.stop` and by supervisors."""

    reason: ExitReason


@attrs.frozen
class ChildInfo:
    """One line of a supervisor's list of children."""

    id: str
    name: str
    state: str
    is_supervisor: bool
    restarts: int


@attrs.frozen
class ChildCounts:
    """How many children a supervisor has: known, alive, and of which sort."""

    specs: int
    active: int
    supervisors: int
    workers: int


@attrs.frozen
class StartChild(Request["Ref[Any]"]):
    """To a simple_one_for_one supervisor: start one more child, with `args` after the template's own.

    `id` is the child's last name part and must be free; left empty, the supervisor numbers it.
    The answer is the child's reference. Fails with `StartFailed`, or `ChildError` where the id is taken.
    """

    args: tuple[object, ...] = ()
    id: str = ""


@attrs.frozen
class TerminateChild(Request[None]):
    """Stop a child as its spec says. A dynamic or temporary child is then forgotten, others can be restarted."""

    id: str


@attrs.frozen
class RestartChild(Request["Ref[Any]"]):
    """Start a child again that was terminated or ended for good."""

    id: str


@attrs.frozen
class DeleteChild(Request[None]):
    """Forget the spec of a child that does not run."""

    id: str


@attrs.frozen
class WhichChildren(Request[tuple[ChildInfo, ...]]):
    """List the children in start order."""


@attrs.frozen
class CountChildren(Request[ChildCounts]):
    """Count the children."""


def is_message_type(candidate: type) -> bool:
    """Whether instances are frozen attrs values, as messages must be."""
    if not attrs.has(candidate):
        return False
    properties = getattr(candidate, "__attrs_props__", None)
    if properties is not None:
        return bool(properties.is_frozen)
    # attrs before 25.4 leaves no better sign than the method it installs.
    return candidate.__setattr__.__name__ == "_frozen_setattrs"
