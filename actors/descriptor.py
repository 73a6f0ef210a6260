# SPDX-License-Identifier: Apache-2.0
"""A file descriptor that one actor owns and others may copy while it is open.

A number alone cannot be handed about: once closed it names whatever was opened next. This object knows that it was
closed, so a message that was read too late fails cleanly instead of bringing somebody else's memory.
"""

from __future__ import annotations

import errno
import os

import attrs


@attrs.define(eq=False)
class Descriptor:
    """Owns ``number``. Its maker closes it; everybody else only ``copy``s."""

    _number: int

    def copy(self) -> int:
        """A descriptor of the same file, the caller's to close.

        Raises:
            OSError: EBADF when the owner has closed it.
        """
        if self._number < 0:
            raise OSError(errno.EBADF, "its owner has closed it")
        return os.dup(self._number)

    def close(self) -> None:
        """Close it. May be called twice."""
        if self._number >= 0:
            os.close(self._number)
        self._number = -1
