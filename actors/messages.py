# SPDX-License-Identifier: Apache-2.0
"""What this system's actors say to each other. Frozen values; descriptors are plain numbers.

Where a message carries a descriptor, its comment says who owns it after the message was delivered.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import attrs

from vgpu.gpu.sampling import GpuSample
from vgpu.gpu.schedule import SessionId as SessionId  # noqa: PLC0414 - re-exported for supervision
from vgpu.transport.account import Limits

from . import Ref, Request
from .descriptor import Descriptor
from .page_lease import PageLease

# -- values ---------------------------------------------------------------------------------------


@attrs.frozen
class VmRecord:
    """A tenant as the ledger keeps it."""

    name: str
    pool: str = "default"
    priority: str = "medium"
    weight: int = 50
    memory_limit_bytes: int = 0  # 0: the whole card
    watchdog_seconds: float = 30.0
    ad_hoc: bool = False
    rate: int = 0  # CUDA calls a second; 0: as many as it likes
    queue_depth: int = 0  # calls accepted and not yet executed; 0: as many as the ring holds
    bar1_bytes: int = 0  # of its PCI device; 0: it has none
    slots: int = 8
    variant: str = "conventional"  # or "express"
    address: str = "0x5"  # where the device is to appear on the VM's bus
    bytes_per_second: int = 0  # copied between its memory and the GPU's; 0: as many as it likes
    # Of all its sessions together; generous, for what they keep from the host.
    session_limit: int = 64
    arena_limit_bytes: int = 64 << 30  # made known to the driver beyond what each session begins with
    module_limit: int = 65536
    handle_limit: int = 1 << 22

    @property
    def limits(self) -> Limits:
        """What its workers enforce."""
        return Limits(
            self.memory_limit_bytes,
            self.arena_limit_bytes,
            self.module_limit,
            self.handle_limit,
            self.rate,
            self.bytes_per_second,
            self.queue_depth,
        )


@attrs.frozen
class PoolRecord:
    """A pool of VMs as the ledger keeps it."""

    name: str
    weight: int = 100  # among the pools, 1 to 1000


@attrs.frozen
class SlotPlacement:
    """A slot of a VM's BAR1, in bytes from the BAR's start. ``bar1`` stays its owner's: whoever uses it copies it."""

    slot: int
    bar1: Descriptor
    offset: int
    size: int


@attrs.frozen
class SessionRequest:
    """A guest process that wants a session; ``slot``: in its VM, and there is where it will look for it."""

    vm: VmRecord
    guest_pid: int
    program: str
    slot: SlotPlacement | None = None


@attrs.frozen
class SessionInfo:
    """A session: who runs it, and the worker that replays it."""

    session: SessionId
    vm: str
    guest_pid: int
    program: str
    worker: str
    worker_pid: int
    watchdog_seconds: float = 30.0
    slot: int | None = None  # of the VM's BAR1; guest_pid is then as the VM numbers it


@attrs.frozen
class SessionSample:
    """Counters of a session at one moment (CLOCK_MONOTONIC nanoseconds).

    ``guest``: the session page, and where the time of the program's threads goes, as the guest says (``guest_times``).
    """

    info: SessionInfo
    taken_ns: int
    grant: dict[str, int]
    guest: dict[str, int]
    refused: dict[str, int]
    ended: str = ""


@attrs.frozen
class SessionUse:
    """What a session holds and has used of its GPU by now; ``in_call``: it is replaying one call after ``records``."""

    info: SessionInfo
    memory_used_bytes: int
    gpu_ns: int
    records: int = 0
    in_call: bool = False


@attrs.frozen
class Attachment:
    """What a guest needs for its session. The receiver owns the descriptors, those that are not -1.

    A local guest gets ``segment_fd``; for a slot the guest has the segment already, and the device of its VM gets a
    ``worker_pidfd`` to see the worker's end by.
    """

    session: SessionId
    segment_fd: int
    lifeline_fd: int
    segment_size: int
    worker_address: int
    worker_pid: int = 0
    worker_pidfd: int = -1

    def close(self) -> None:
        """Close the descriptors: whoever the session was for does not get it, and the worker leaves."""
        for descriptor in (self.segment_fd, self.lifeline_fd, self.worker_pidfd):
            if descriptor >= 0:
                os.close(descriptor)


@attrs.frozen
class WorkerHandle:
    """A worker process: its name, pid and the path of its control socket."""

    worker: str
    pid: int
    socket_path: str


@attrs.frozen
class Adoption:
    """An assigned worker that an earlier mediator left behind."""

    handle: WorkerHandle


# -- ledger ---------------------------------------------------------------------------------------


@attrs.frozen
class EnsureVm(Request[VmRecord]):
    """The VM of that name, registered ad hoc where nobody registered it."""

    name: str


@attrs.frozen
class ListVms(Request[tuple[VmRecord, ...]]):
    """All VMs, by name."""


@attrs.frozen
class GetVm(Request[VmRecord | None]):
    """The VM of that name, None where there is none."""

    name: str


@attrs.frozen
class SaveVm(Request[VmRecord]):
    """Register a VM. One that came by itself becomes the registered one.

    Refused with VmExists where it is registered already.
    """

    vm: VmRecord


@attrs.frozen
class RemoveVm(Request[VmRecord]):
    """Forget a registered VM; its row. Sessions and faults stay. Refused with NoSuchVm."""

    name: str


@attrs.frozen
class UpdateVm(Request[VmRecord]):
    """Replace the row of a VM that is known, registered or not. Refused with NoSuchVm."""

    vm: VmRecord


@attrs.frozen
class ListPools(Request[tuple[PoolRecord, ...]]):
    """All pools, by name. ``default`` is always there."""


@attrs.frozen
class SavePool(Request[PoolRecord]):
    """Keep a pool. Refused with PoolExists or NoSuchPool where it is there against ``is_new``, or is not."""

    pool: PoolRecord
    is_new: bool = False


@attrs.frozen
class RemovePool(Request[PoolRecord]):
    """To the ledger: forget a pool; its row. Refused with NoSuchPool, or PoolInUse."""

    name: str


@attrs.frozen
class NextSession(Request[SessionId]):
    """A session number never used before, also across restarts."""


@attrs.frozen
class RecordStart(Request[None]):
    """A session began. By way of the outbox, as the two below."""

    info: SessionInfo


@attrs.frozen
class RecordEnd(Request[None]):
    """A session ended, with its last counters."""

    sample: SessionSample


@attrs.frozen
class RecordFault(Request[bool]):
    """A session did what it must not. Kept once for each session, kind and error; False: it was kept already.

    kind: a FaultKind; details: a JSON object, of kernel and last calls; at: of the wall clock, 0 for now.
    """

    info: SessionInfo
    error: int
    what: str
    kind: str = "kernel"
    details: str = "{}"
    at: float = 0.0


@attrs.frozen
class ListFaults(Request[tuple[dict[str, object], ...]]):
    """The last faults, newest first: of this VM, or the one of this number, where that is said."""

    limit: int = 100
    vm: str | None = None
    fault: int | None = None


@attrs.frozen
class FaultCount:
    """How often a VM's sessions did something that ended in that CUDA error."""

    vm: str
    error: int
    count: int


@attrs.frozen
class CountFaults(Request[tuple[FaultCount, ...]]):
    """All faults in the ledger, counted by VM and error."""


# -- scheduler --------------------------------------------------------------------------------------


@attrs.frozen
class SessionOpened:
    """An executor has a session (or announces it again to a new scheduler)."""

    session: SessionId
    weight: int
    executor: Ref[object]
    holding: bool = False
    vm: str = ""  # "": a VM of its own
    pool: str = "default"
    priority: str = "medium"
    token: int = 0  # of the lease it has, where it is holding
    is_new: bool = False  # its VM is as the ledger says now; else what the scheduler knows of the VM is newer


@attrs.frozen
class SetVm:
    """To every scheduler: a VM's place, from now on, also for the sessions it has. Bad values are logged and dropped."""

    vm: str
    pool: str
    priority: str  # high, medium, low
    weight: int  # 1 to 1000


@attrs.frozen
class SetPool:
    """To every scheduler: a pool's weight among the pools (1 to 1000), from now on."""

    pool: str
    weight: int


@attrs.frozen
class SessionClosed:
    """A session is over."""

    session: SessionId


@attrs.frozen
class Demand:
    """A session without a lease has calls waiting."""

    session: SessionId


@attrs.frozen
class LeaseEnded:
    """A lease is over: GPU nanoseconds since the last report, and whether calls still wait."""

    session: SessionId
    used_ns: int
    wants_more: bool
    token: int = 0
    held_ns: int | None = None  # the device was the session's alone for so long since the last report


@attrs.frozen
class GrantLease:
    """To an executor: let the worker go on until deadline_ns (CLOCK_MONOTONIC), or slice_ns long; 0 and 0 open-ended.

    It begins when the GPU's turn word names the token; a token that it has already: what was said of it has changed.
    """

    deadline_ns: int
    token: int = 0
    slice_ns: int = 0
    in_flight_ns: int = 0  # work to have queued on the device at most; 0: any
    # Not to begin before the worker has something to do; it then names it in the word by itself.
    standby: bool = False


@attrs.frozen
class RevokeLease:
    """To an executor: have the worker stop at its next call."""


@attrs.frozen
class ScheduleState(Request[dict[str, object]]):
    """Who holds, who waits, what was charged."""


# -- executor, pool, telemetry ----------------------------------------------------------------------


@attrs.frozen
class TakeWorker(Request[WorkerHandle]):
    """A warm worker; waits for one to be ready."""


@attrs.frozen
class DriverVersion(Request[int]):
    """The driver version the workers report, as cuDriverGetVersion gives it; waits for a first worker."""


@attrs.frozen
class DescribeGpu(Request[bytes]):
    """To a pool: the device page as a warm worker has filled it; waits for a first worker."""


@attrs.frozen
class Attach(Request[Attachment]):
    """Asked once of an executor by the connection that will carry the answer to the guest."""


@attrs.frozen
class GuestLeft:
    """The guest's connection ended: the worker should notice by itself; make sure."""


@attrs.frozen
class Fault:
    """End this session with a CUDA error the program will see. kind: a FaultKind; since_ns: when it began to hang."""

    error: int
    what: str
    kind: str = "admin"
    since_ns: int = 0


@attrs.frozen
class Sample(Request[SessionSample]):
    """Read a session's counters now."""


@attrs.frozen
class LimitsChanged:
    """To an executor: the account of that VM says something new; have the worker look, if it is this one's.

    ``watchdog_seconds``: how long a kernel of the VM may run from now on; None: as before.
    """

    vm: str
    watchdog_seconds: float | None = None


@attrs.frozen
class MeasureUse(Request[SessionUse]):
    """The few counters of a session that its VM's device page shows; cheap enough for twice a second."""


@attrs.frozen
class TraceWorker(Request[int]):
    """To an executor: have the worker write down what the session does, so many events at most; 0 ends it.

    The answer is a descriptor of where it writes (``vgpu.gpu.trace``), the asker's to close.
    """

    events: int


@attrs.frozen
class Watch:
    """To telemetry and watchdog: this executor has a session."""

    session: SessionId
    executor: Ref[object]
    vm: str = ""  # for who logs; "": not said


@attrs.frozen
class Unwatch:
    """To telemetry and watchdog: the session ended, with its last counters."""

    sample: SessionSample


@attrs.frozen
class ListSessions(Request[tuple[SessionSample, ...]]):
    """Living sessions, sampled now, and the most recent ended ones."""


@attrs.frozen
class EndedTotals:
    """What the ended sessions of one VM did, summed since telemetry began. None of it ever falls."""

    sessions: int
    grant: dict[str, int]
    refused: dict[str, int]
    guest: dict[str, int] = attrs.Factory(dict)  # what the guests said: guest_times.py


@attrs.frozen
class SessionSurvey:
    """Every session counted exactly once: living ones with their own counters, ended ones in their VM's totals."""

    living: tuple[SessionSample, ...]
    ended: dict[str, EndedTotals]


@attrs.frozen
class Survey(Request[SessionSurvey]):
    """Everything for somebody who adds up."""


# -- devices of VMs ---------------------------------------------------------------------------------


@attrs.frozen
class DeviceState:
    """A VM's device process at this moment. ``trouble``: why there is none."""

    vm: str
    running: bool
    pid: int = 0
    connected: bool = False  # a QEMU is there
    bar1_bytes: int = 0
    slots: int = 0
    claimed: int = 0  # slots that have an owner
    variant: str = ""
    socket: str = ""  # where QEMU connects
    counters: dict[str, int] = attrs.field(factory=dict)
    trouble: str = ""


@attrs.frozen
class AwaitDevice(Request[DeviceState]):
    """To a device: how it is, once it runs or could not be started at first try."""


@attrs.frozen
class ShowDevice(Request[DeviceState]):
    """To a device: how it is now."""


@attrs.frozen
class EndDevice(Request[bool]):
    """To a device: the VM is unregistered. Ends the process and with it the VM's sessions; was a QEMU connected?"""


@attrs.frozen
class RegisterVm(Request[DeviceState | None]):
    """To the fleet: keep this VM and start its device at once; None where it is to have none.

    Refused with VmExists, or NotAdmitted where the promise could not be kept. A pool that there is not yet is made. A device
    that does not start does not undo the registration: it is tried again.
    """

    vm: VmRecord
    overcommit: bool = False  # promise memory even if the sum of all promises is more than there is


@attrs.frozen
class ChangeVm(Request[VmRecord]):
    """To the fleet: change what is said of a VM, for the sessions it has too; the VM as it is then.

    Refused with NoSuchVm, NoSuchPool or NotAdmitted; nothing has changed then.
    """

    name: str
    changes: Mapping[str, object]  # fields of VmRecord, checked before
    overcommit: bool = False


@attrs.frozen
class ChangePool(Request[PoolRecord]):
    """To the fleet: make a pool, or change the weight of one that there is. Refused as SavePool."""

    pool: PoolRecord
    is_new: bool = False


@attrs.frozen
class DeletePool(Request[PoolRecord]):
    """To the fleet: forget a pool that no VM is in. Refused as RemovePool."""

    name: str


@attrs.frozen
class UnregisterVm(Request[bool]):
    """To the fleet: end the VM's sessions and device, and forget the VM. True: a QEMU was connected. Refused with NoSuchVm."""

    name: str


@attrs.frozen
class ListDevices(Request[tuple[DeviceState, ...]]):
    """To the fleet: every VM's device, by name."""


@attrs.frozen
class AttachDevice:
    """To telemetry: a registered VM has a device; write its device page (docs/wire.md section 5).

    ``bar1_fd`` is telemetry's after delivery; where nobody took the message the sender closes it. It may come again for
    the same VM, with a descriptor of the same BAR1 or of a new one: the new one counts, the old one is closed.
    """

    vm: str
    bar1_fd: int


@attrs.frozen
class DetachDevice:
    """To telemetry: the VM's device is gone, or nobody's business any more. Close what AttachDevice brought."""

    vm: str


@attrs.frozen
class MarkVm:
    """To telemetry: a VM is quarantined or not, and whether calls of it are being held back, for its device page.

    Said again for as long as calls are held back: that part is forgotten after some seconds.
    """

    vm: str
    quarantined: bool | None = False  # None: as it was
    rate_limited: bool = False


@attrs.frozen
class OpenPage(Request[PageLease]):
    """To telemetry: the device page of a VM, for a process of this host; the receiver releases the lease.

    Refused with ``NoPage`` where no worker can say what GPU this is, or too many have the page already.
    """

    vm: str


@attrs.frozen
class SampleGpu(Request[GpuSample | None]):
    """To telemetry: how the host's (first) GPU is now; None where nobody has said yet which one it is."""


# -- limits -----------------------------------------------------------------------------------------


@attrs.frozen
class ApplyLimits:
    """To the keeper of limits: this is how the VM is now; its workers are to know at once."""

    vm: VmRecord


@attrs.frozen
class SessionRefused:
    """To the keeper of limits: a VM wanted one session more than it may have."""

    vm: str


@attrs.frozen
class AccountState:
    """What a VM's sessions hold now, and how often and how long it met its limits. By name of the resource."""

    vm: str
    limits: Limits
    sessions: int
    used: dict[str, int]
    refused: dict[str, int]  # since the mediator began, as is all below
    sessions_refused: int
    held_back: int
    held_back_ns: int
    is_held_back: bool


@attrs.frozen
class ListAccounts(Request[tuple[AccountState, ...]]):
    """To the keeper of limits: every VM's account, by name."""


@attrs.frozen
class VmChanged:
    """To telemetry: a VM's share of the memory is another one; its device page is to say so at once."""

    vm: VmRecord


# -- metrics ------------------------------------------------------------------------------------------


@attrs.frozen
class BoundAddress(Request[tuple[str, int]]):
    """Host and port where metrics are served; tells which port it is where 0 was asked for."""
