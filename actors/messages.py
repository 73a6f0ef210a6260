# SPDX-License-Identifier: Apache-2.0
"""What this system's actors say to each other. Frozen values; descriptors are plain numbers.

Where a message carries a descriptor, its comment says who owns it after the message was delivered.
"""

from __future__ import annotations

import attrs

from vgpu.gpu.schedule import SessionId as SessionId  # noqa: PLC0414 - re-exported for supervision

from . import Ref, Request

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


@attrs.frozen
class SessionRequest:
    """A guest process that wants a session."""

    vm: VmRecord
    guest_pid: int
    program: str


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


@attrs.frozen
class SessionSample:
    """Counters of a session at one moment (CLOCK_MONOTONIC nanoseconds)."""

    info: SessionInfo
    taken_ns: int
    grant: dict[str, int]
    guest: dict[str, int]
    refused: dict[str, int]
    ended: str = ""


@attrs.frozen
class Attachment:
    """What a guest needs for its session. The receiver owns both descriptors."""

    session: SessionId
    segment_fd: int
    lifeline_fd: int
    segment_size: int
    worker_address: int


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
class NextSession(Request[SessionId]):
    """A session number never used before, also across restarts."""


@attrs.frozen
class RecordStart:
    """A session began."""

    info: SessionInfo


@attrs.frozen
class RecordEnd:
    """A session ended, with its last counters."""

    sample: SessionSample


@attrs.frozen
class RecordFault:
    """A session did what it must not."""

    info: SessionInfo
    error: int
    what: str


@attrs.frozen
class ListFaults(Request[tuple[dict[str, object], ...]]):
    """The last faults, newest first."""

    limit: int = 100


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


@attrs.frozen
class GrantLease:
    """To an executor: let the worker go on until deadline_ns (CLOCK_MONOTONIC; 0 open-ended)."""

    deadline_ns: int


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
class Attach(Request[Attachment]):
    """Asked once of an executor by the connection that will carry the answer to the guest."""


@attrs.frozen
class GuestLeft:
    """The guest's connection ended: the worker should notice by itself; make sure."""


@attrs.frozen
class Fault:
    """End this session with a CUDA error the program will see."""

    error: int
    what: str


@attrs.frozen
class Sample(Request[SessionSample]):
    """Read a session's counters now."""


@attrs.frozen
class Watch:
    """To telemetry and watchdog: this executor has a session."""

    session: SessionId
    executor: Ref[object]


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


# -- metrics ------------------------------------------------------------------------------------------


@attrs.frozen
class BoundAddress(Request[tuple[str, int]]):
    """Host and port where metrics are served; tells which port it is where 0 was asked for."""
