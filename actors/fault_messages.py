# SPDX-License-Identifier: Apache-2.0
"""What is said about hangs, faults and quarantine. Frozen values; docs/watchdog.md tells the story."""

from __future__ import annotations

import enum

import attrs

from . import Request
from .messages import RecordEnd, RecordFault, RecordStart


class FaultKind(enum.StrEnum):
    """What went wrong in a session; ``vgpu-admin show-faults`` shows it."""

    HANG = "hang"  # a kernel or a call past the VM's deadline
    KERNEL = "kernel"  # the device faulted in the session's kernel: illegal address, assertion, ...
    PROTOCOL = "protocol"  # what came through the ring was nothing that a guest library sends
    CRASH = "crash"  # the worker died of a signal of its own making while it worked for the session
    KILLED = "killed"  # the worker was ended from outside
    STOPPED = (
        "stopped"  # the worker was stopped (SIGSTOP) from outside and did not go on within the VM's deadline
    )
    DEVICE = "device"  # hardware: an uncorrectable memory error, a broken link
    ADMIN = "admin"  # an administrator ended the session


# A VM is quarantined for these. Not for kernels that fault: that ends their own context and disturbs nobody, and who writes
# kernels does it often. What others did to it never counts.
COUNTED = (FaultKind.HANG, FaultKind.PROTOCOL, FaultKind.CRASH)


@attrs.frozen
class SessionProgress:
    """What of a session's counters tells whether it gets on; fields as in ``vgpu_grant_page``.

    is_stopped: a signal has stopped the worker. starved_ns: its replay thread was ready and had no processor for so long,
    read while a call is in the driver, else 0.
    """

    records: int
    current_call: int
    oldest_mark_ns: int
    last_mark_ns: int
    looked_ns: int
    fences_done: int
    oldest_fence_ns: int
    watchdog_seconds: float
    is_stopped: bool = False
    starved_ns: int = 0


@attrs.frozen
class MeasureProgress(Request[SessionProgress]):
    """To an executor: read them now."""


@attrs.frozen
class EndSessionsOf:
    """To an executor: if your session is of that VM, end it with this error."""

    vm: str
    error: int
    what: str


@attrs.frozen
class Keep(Request[None]):
    """To the outbox: this must get into the ledger. Answered at once; kept until the ledger has it."""

    record: RecordStart | RecordEnd | RecordFault


@attrs.frozen
class FaultKept:
    """To quarantine: the ledger has another fault of this VM."""

    vm: str


@attrs.frozen
class QuarantineRecord:
    """A quarantine as the ledger keeps it. Times are of the wall clock; ``ended`` 0: it is in force."""

    vm: str
    by: str
    reason: str
    began: float
    ended: float = 0.0
    ended_by: str = ""


@attrs.frozen
class BeginQuarantine(Request[QuarantineRecord]):
    """To the ledger: from now on; where it is in force already, the one that is."""

    vm: str
    by: str
    reason: str


@attrs.frozen
class EndQuarantine(Request[QuarantineRecord]):
    """To the ledger: it is over. Refused with NotQuarantined."""

    vm: str
    by: str


@attrs.frozen
class GetQuarantine(Request[QuarantineRecord | None]):
    """To the ledger: the quarantine in force for a VM."""

    vm: str


@attrs.frozen
class ListQuarantines(Request[tuple[QuarantineRecord, ...]]):
    """To the ledger: all that were, newest first; or those in force."""

    in_force: bool = True
    limit: int = 1000


@attrs.frozen
class FaultTimes(Request[tuple[tuple[str, float], ...]]):
    """To the ledger: VM and time of each fault of these kinds since then and since the VM's last quarantine ended."""

    kinds: tuple[str, ...]
    since: float


@attrs.frozen
class QuarantineRule:
    """So many faults in so long quarantine a VM; 0 faults: never."""

    faults: int = 3
    seconds: float = 600.0


@attrs.frozen
class GetRules(Request[dict[str, QuarantineRule]]):
    """To the ledger: the rules of VMs that have one of their own."""


@attrs.frozen
class SetRule(Request[QuarantineRule | None]):
    """To the ledger: a VM's own rule; None: it has the mediator's again."""

    vm: str
    rule: QuarantineRule | None


@attrs.frozen
class Quarantine(Request[QuarantineRecord]):
    """To the quarantine actor: an administrator wants it."""

    vm: str
    by: str
    reason: str


@attrs.frozen
class ClearQuarantine(Request[QuarantineRecord]):
    """To the quarantine actor: an administrator wants it over. Refused with NotQuarantined."""

    vm: str
    by: str


@attrs.frozen
class SetQuarantined:
    """To a device: what its guests are to read in STATUS."""

    quarantined: bool
