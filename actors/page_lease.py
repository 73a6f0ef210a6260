# SPDX-License-Identifier: Apache-2.0
"""The right to read a VM's device page, for one process of this host, for as long as its connection stands.

Pages are written only while somebody may read them, so whoever has a lease gives it back, whatever happens. An object and
no message does that: it cannot be lost in a full mailbox, or with an actor that has just ended.
"""

from __future__ import annotations

import os

import attrs
import trio


@attrs.define(eq=False)
class PageLease:
    """Owns ``descriptor``, which can only be read. ``ended`` is set when the page is not written any more."""

    descriptor: int
    driver_version: int
    ended: trio.Event = attrs.Factory(trio.Event)
    is_released: bool = False

    def release(self) -> None:
        """Give it back and close the descriptor. May be called twice."""
        if not self.is_released:
            self.is_released = True
            os.close(self.descriptor)
