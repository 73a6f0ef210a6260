# SPDX-License-Identifier: Apache-2.0
"""What a VM or a pool may be called: the one rule, for guests, administrators and whoever makes a file of a name.

A name becomes part of file names, of addresses of actors, of labels and of lines of a terminal; a HELLO has 64 bytes for it.
Pure.
"""

from __future__ import annotations

import re
from typing import Final

from .errors import RemoteProtocolError

__all__ = ["NAME", "NAME_RULE", "BadName", "is_name"]

NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}")
NAME_RULE: Final = "1 to 63 of letters, digits, '_', '.', '-', not beginning with '.' or '-'"


class BadName(RemoteProtocolError):
    """A guest names a VM as none may be called; the message shows the name and the rule."""


def is_name(name: str) -> bool:
    """May a VM or a pool be called so?"""
    return NAME.fullmatch(name) is not None
