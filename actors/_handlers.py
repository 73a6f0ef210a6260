# SPDX-License-Identifier: Apache-2.0
"""Which method of an actor class handles which message type.

Declared with a decorator, gathered once per class. The table is what makes the set of messages an actor takes a
type: a sender of anything else is told so at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ._messages import is_message_type

__all__ = ["build_table", "find_handler", "handles"]

A = TypeVar("A")
M = TypeVar("M")
T = TypeVar("T")

_MARK = "_vgpu_handles"


def handles(message_type: type[M]) -> Callable[[Callable[[A, M], T]], Callable[[A, M], T]]:
    """Mark a method, sync or async, as the handler of a message type (and of its subclasses).

    For a `Request` the return value is the answer, unless the handler took the reply with `take_reply`.

    Raises:
        TypeError: the type is not a frozen attrs class.
    """
    if not is_message_type(message_type):
        raise TypeError(f"messages are frozen attrs classes; {message_type!r} is none (use @attrs.frozen)")

    def mark(method: Callable[[A, M], T]) -> Callable[[A, M], T]:
        setattr(method, _MARK, (*getattr(method, _MARK, ()), message_type))
        return method

    return mark


def build_table(actor_class: type) -> dict[type, str]:
    """Collect message type -> method name over a class and its bases; a subclass's choice wins.

    Raises:
        TypeError: one class has two handlers for one type.
    """
    table: dict[type, str] = {}
    for base in reversed(actor_class.__mro__):
        here: dict[type, str] = {}
        for name, value in vars(base).items():
            for message_type in getattr(value, _MARK, ()):
                if message_type in here:
                    raise TypeError(
                        f"{base.__name__} handles {message_type.__name__} twice: {here[message_type]} and {name}"
                    )
                here[message_type] = name
        table.update(here)
    return table


def find_handler(table: dict[type, str], message_type: type) -> str | None:
    """The method name for a type: its own entry, else the nearest base class's."""
    for candidate in message_type.__mro__:
        name = table.get(candidate)
        if name is not None:
            return name
    return None
