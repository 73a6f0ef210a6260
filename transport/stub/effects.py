# SPDX-License-Identifier: Apache-2.0
"""What the core of a device process decides, for ``process.py`` to do, in order and at once.

Descriptors are numbers here; the core owns them from the grant to ``CloseDescriptors``.
"""

from __future__ import annotations

import attrs

from vgpu.transport.vfio_user.registers import DeviceStatus, SlotView

from .messages import Event


@attrs.frozen
class Say:
    """A line for the mediator; a Hello goes with BAR1."""

    event: Event


@attrs.frozen
class WriteHead:
    """What changes in the head of the directory."""

    status: DeviceStatus
    generation: int
    driver_version: int


@attrs.frozen
class WriteSlot:
    """An entry of the directory, its state last."""

    slot: int
    view: SlotView


@attrs.frozen
class RingDoorbell:
    """A byte on a lifeline, without waiting: a full socket is as good as a byte."""

    lifeline: int


@attrs.frozen
class EndLifeline:
    """End our direction of a lifeline: its worker leaves."""

    lifeline: int


@attrs.frozen
class CloseDescriptors:
    """They are of no further use."""

    descriptors: tuple[int, ...]


@attrs.frozen
class WatchWorker:
    """Call ``worker_gone`` when the process of this pidfd has ended."""

    slot: int
    process: int


@attrs.frozen
class KillWorker:
    """SIGKILL through the pidfd."""

    slot: int
    process: int


@attrs.frozen
class MarkDead:
    """In the slot's session page: sticky_error CUDA_ERROR_UNKNOWN if there is none, and state DEAD."""

    slot: int


@attrs.frozen
class ZeroSlot:
    """Give the slot's memory back to the host, beside everything else, and call ``zeroed``."""

    slot: int


@attrs.frozen
class StartCall:
    """Push this record into the slot's ring and call ``complete_call`` with the answer."""

    slot: int
    header: bytes
    payload: bytes


@attrs.frozen
class CancelCall:
    """Nobody waits for the slot's call any more."""

    slot: int


@attrs.frozen
class Leave:
    """End the process."""

    why: str


Effect = (
    Say
    | WriteHead
    | WriteSlot
    | RingDoorbell
    | EndLifeline
    | CloseDescriptors
    | WatchWorker
    | KillWorker
    | MarkDead
    | ZeroSlot
    | StartCall
    | CancelCall
    | Leave
)
