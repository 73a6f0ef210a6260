# SPDX-License-Identifier: Apache-2.0
"""The executor actor: owns one worker process, and with it one session's GPU context.

CUDA cannot cancel a running kernel; the only clean cut is the process's death. So this actor's end *is*
the worker's end: however it stops (asked, cancelled, crashed), ``stopped`` kills the worker, tells the
guest through the session page, and reports the last counters. It carries leases between scheduler and
worker; it sees no call.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import attrs
import trio

from vgpu.gpu.control import WorkerLink, open_worker_link
from vgpu.gpu.flight import read_flight
from vgpu.transport._generated_calls import CallId
from vgpu.transport.account import Account, AccountFull, account_path
from vgpu.transport.errors import RemoteProtocolError
from vgpu.transport.layout import GrantPage, SessionPage

from . import Actor, ActorError, Crashed, Down, ExitReason, Refused, handles
from .fault_messages import EndSessionsOf, FaultKind, GetQuarantine, Keep, MeasureProgress, SessionProgress
from .fault_report import describe, kind_of
from .guest_times import GuestTimes
from .messages import (
    Adoption,
    Attach,
    Attachment,
    Demand,
    Fault,
    GetVm,
    GrantLease,
    GuestLeft,
    LeaseEnded,
    LimitsChanged,
    MeasureUse,
    NextSession,
    RecordEnd,
    RecordFault,
    RecordStart,
    RevokeLease,
    Sample,
    SessionClosed,
    SessionId,
    SessionInfo,
    SessionOpened,
    SessionRefused,
    SessionRequest,
    SessionSample,
    SessionUse,
    TakeWorker,
    TraceWorker,
    Unwatch,
    VmRecord,
    Watch,
    WorkerHandle,
)
from .worker_look import ReplayThread, is_stopped

_log = logging.getLogger("vgpu.executor")

SESSION_DEAD = 3
CUDA_ERROR_UNKNOWN = 999
GUEST_ENDED = "guest ended"
# How long a killed worker may take to be gone. Nobody else may have its slot before.
GONE_SECONDS = 3.0
# A worker that lost its guest leaves by itself; past this it is helped.
LEAVE_SECONDS = 1.0
# Less than a connection waits for its attachment, so that it hears why there is none.
TAKE_SECONDS = 45.0
# A warm worker answers in milliseconds, and takes its guest in less than a second; one that is stopped never does.
HANDSHAKE_SECONDS = 10.0
# A connection asks at once; one that ended before it could leaves an executor nobody will ever ask.
UNASKED_SECONDS = 30.0


class TooManySessions(ActorError):
    """The VM has as many sessions as it may have."""


# The outbox has nothing to wait for; this is for its restart.
KEEP_SECONDS = 2.0
CUDA_ERROR_DEVICE_UNAVAILABLE = 46


class Quarantined(ActorError):
    """The VM is quarantined: it gets no sessions until an administrator clears it."""


class NotAttachable(ActorError):
    """The session cannot be attached to: it has a guest already, or its worker is gone."""


@attrs.define(eq=False)
class Executor(Actor):
    """One session."""

    # Beginning one takes a worker, which may have to be started, and two handshakes with it.
    stuck_after_seconds: ClassVar[float | None] = TAKE_SECONDS + 2 * HANDSHAKE_SECONDS + 15

    gpu: str  # name of the gpu's supervisor, whose children are scheduler, pool and watchdog
    origin: SessionRequest | Adoption
    run_dir: Path | None = None  # where the VMs' accounts lie; without it no VM has limits but its memory
    _account: Account | None = None
    _entry: int = -1
    _link: WorkerLink | None = None
    _info: SessionInfo | None = None
    _place: tuple[str, str, int] = ("default", "medium", 50)  # pool, priority, weight
    _grant: GrantPage | None = None
    _page: SessionPage | None = None
    _pidfd: int = -1
    _thread: ReplayThread | None = None
    _reported_ns: int = 0
    _reported_held_ns: int = 0
    _reported_token: int = 0
    _guest_times: GuestTimes = attrs.Factory(
        lambda self: GuestTimes(0 if isinstance(self.origin, Adoption) else time.monotonic_ns()),
        takes_self=True,
    )
    _cause: str = ""
    _fault: int = 0
    _final: SessionSample | None = None
    _is_asked: bool = False
    _awaiting_trace: list[Callable[[list[int]], None]] = attrs.Factory(list)

    # -- a session's life

    @property
    def subject(self) -> Mapping[str, object]:
        """The VM and the session, once it has one."""
        return {} if self._info is None else {"vm": self._info.vm, "session": int(self._info.session)}

    async def started(self) -> None:
        if isinstance(self.origin, Adoption):
            await self._adopt(self.origin.handle)
        else:
            self.nursery.start_soon(self._leave_unasked)

    async def _leave_unasked(self) -> None:
        await trio.sleep(UNASKED_SECONDS)
        if not self._is_asked:
            self.stop()

    @handles(Attach)
    async def attach(self, message: Attach) -> None:
        if self._is_asked or not isinstance(self.origin, SessionRequest):
            raise Refused(NotAttachable(f"{self.name} has a guest already"))
        self._is_asked = True
        reply = self.take_reply()
        try:
            attachment = await self._begin(self.origin)
        except (
            OSError,
            trio.BrokenResourceError,
            trio.TooSlowError,
            RemoteProtocolError,
            ActorError,
        ) as error:
            # Nothing of this session is of use to anybody; the guest will be told to try again.
            is_refusal = isinstance(error, (TooManySessions, Quarantined))
            self.stop() if is_refusal else self.stop(Crashed(error))
            if reply is not None:
                why = str(error) or "its worker does not answer"
                reply.refuse(error if is_refusal else NotAttachable(f"{self.name}: {why}"))
            return
        if reply is None or not reply.answer(attachment):
            # The connection ended meanwhile. Kept open, the lifeline would have the worker wait for ever.
            attachment.close()
            self._cause = GUEST_ENDED
            self.stop()

    async def _begin(self, request: SessionRequest) -> Attachment:
        ledger = self.find("mediator/ledger")
        self._open_account(request.vm.name, request.vm)
        self._check_sessions(request.vm)  # before a worker is spent on it
        handle = await self.find(f"{self.gpu}/workers").ask(TakeWorker(), timeout_seconds=TAKE_SECONDS)
        self._open_process(handle)
        session = await ledger.ask(NextSession())
        self._claim(request.vm, session, handle.pid)
        with trio.fail_after(HANDSHAKE_SECONDS):
            link = await self._open_link(handle)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(ours.close)
            cleanup.callback(theirs.close)
            with trio.fail_after(HANDSHAKE_SECONDS):
                await self._assign(link, request, session, theirs.fileno())
            info = SessionInfo(
                session,
                request.vm.name,
                request.guest_pid,
                request.program,
                handle.worker,
                handle.pid,
                request.vm.watchdog_seconds,
                request.slot.slot if request.slot else None,
            )
            await self._announce(info, (request.vm.pool, request.vm.priority, request.vm.weight), is_new=True)
            # Whoever begins a quarantine ends the sessions he finds; from here on he finds this one.
            await self._check_quarantine(info.vm)
            await self._keep(RecordStart(info))
            return Attachment(
                session,
                os.dup(link.segment_fd) if request.slot is None else -1,
                ours.detach(),
                request.slot.size if request.slot else int(link.hello["segment_size"]),
                int(link.hello["worker_address"]),
                handle.pid,
                os.dup(self._pidfd) if request.slot else -1,
            )

    async def _assign(
        self, link: WorkerLink, request: SessionRequest, session: SessionId, lifeline: int
    ) -> None:
        """Hand the worker its guest, and with a slot the memory to replay in, which is then the link's segment.

        Raises:
            OSError: it did not take it, or the VM's device has gone.
        """
        message: dict[str, object] = {
            "do": "assign",
            "session": session,
            "vm": request.vm.name,
            "memory_limit": request.vm.memory_limit_bytes,
            "guest_pid": request.guest_pid,
            "program": request.program,
            "watchdog": request.vm.watchdog_seconds,
            "pool": request.vm.pool,
            "priority": request.vm.priority,
            "weight": request.vm.weight,
        }
        if self._account is not None and self.run_dir is not None:
            path = account_path(self.run_dir, request.vm.name)
            message |= {"account": str(path), "account_entry": self._entry}
        descriptors = [lifeline]
        place = request.slot
        with contextlib.ExitStack() as cleanup:
            if place is not None:
                message |= {"slot": place.slot, "segment_offset": place.offset, "segment_size": place.size}
                descriptors.append(place.bar1.copy())
                cleanup.callback(os.close, descriptors[1])
            await link.send(message, descriptors)
            event, _ = await link.receive()
            if event is None or event.get("event") != "assigned":
                raise OSError(f"worker {link.hello.get('worker')} answered {event!r} to its assignment")
            if place is not None:
                cleanup.pop_all()
                link.move_segment(descriptors[1])
                self._open_page(link, place.offset)

    def _open_account(self, vm: str, record: VmRecord | None = None) -> None:
        if self.run_dir is None:
            return
        self._account = Account(account_path(self.run_dir, vm))
        # Else they have been written by who hears of changes, and what is known here may be old.
        if record is not None and self._account.is_new:
            self._account.set_limits(record.limits)

    def _check_sessions(self, vm: VmRecord) -> None:
        if self._account is not None and sum(1 for _ in self._account.holdings()) >= vm.session_limit:
            self.find("mediator/limits").notify(SessionRefused(vm.name))
            raise TooManySessions(f"VM {vm.name!r} may have {vm.session_limit} sessions and has them")

    def _claim(self, vm: VmRecord, session: SessionId, worker_pid: int) -> None:
        """Nothing waits between counting and claiming: no two sessions get the last place."""
        if self._account is None:
            return
        self._check_sessions(vm)
        try:
            self._entry = self._account.claim(session, worker_pid)
        except AccountFull as error:
            raise TooManySessions(f"VM {vm.name!r} has {error}") from error

    async def _adopt(self, handle: WorkerHandle) -> None:
        self._open_process(handle)
        link = await self._open_link(handle)
        hello = link.hello
        info = SessionInfo(
            SessionId(int(hello["session"])),
            str(hello["vm"]),
            int(hello.get("guest_pid", 0)),
            str(hello.get("program", "")),
            handle.worker,
            handle.pid,
            float(hello.get("watchdog", 30.0)),
            int(hello["slot"]) if "slot" in hello else None,
        )
        if "account_entry" in hello:
            self._open_account(info.vm)
            if self._account is not None:
                self._entry = self._account.claim(info.session, info.worker_pid)
        assert self._grant is not None
        # What it reported to an earlier mediator, and what nobody was there to hear, is not charged again.
        self._reported_ns, self._reported_held_ns = self._grant.get("gpu_ns"), self._grant.get("held_ns")
        self._reported_token = self._grant.get("ended_token")
        place = (
            str(hello.get("pool", "default")),
            str(hello.get("priority", "medium")),
            int(hello.get("weight", 50)),
        )
        await self._announce(info, place)
        self.nursery.start_soon(self._learn_deadline, info.vm)
        if self._grant.get("last_error"):  # perhaps nobody was there to hear of it; it is kept once
            await self._fault_reported(self._grant.get("last_error"), "noted before this mediator")
        try:
            await self._check_quarantine(info.vm)
        except Quarantined:
            self.stop()
        except ActorError as error:
            _log.warning("nobody can say yet whether %s is quarantined: %s", info.vm, error)
        _log.info("adopted session %d of %s (worker %d)", info.session, info.vm, info.worker_pid)

    async def _learn_deadline(self, vm: str) -> None:
        """The worker knows the VM's deadline of when it was assigned; an administrator may have set another since."""
        try:
            record = await self.find("mediator/ledger").ask(GetVm(vm), wait_for_name=True)
        except ActorError as error:
            _log.warning("the deadline of %s is as it was when its session began: %s", vm, error)
            return
        if record is not None and self._info is not None:
            self._info = attrs.evolve(self._info, watchdog_seconds=record.watchdog_seconds)

    def _open_process(self, handle: WorkerHandle) -> None:
        self._pidfd = os.pidfd_open(handle.pid)
        self._thread = ReplayThread(handle.pid)

    async def _open_link(self, handle: WorkerHandle) -> WorkerLink:
        self._link = link = await open_worker_link(handle.socket_path)
        self._grant = GrantPage(link.grant_fd)
        self._open_page(link, int(link.hello.get("segment_offset", 0)))
        return link

    def _open_page(self, link: WorkerLink, segment_offset: int) -> None:
        if self._page is not None:
            self._page.close()
        self._page = SessionPage(link.segment_fd, segment_offset)

    def _opened(self, info: SessionInfo, *, is_new: bool = False) -> SessionOpened:
        """What the scheduler is to know of this session, as the grant page is now."""
        assert self._grant is not None
        token = self._grant.get("token")
        holding = bool(self._grant.get("granted")) and token not in (0, self._grant.get("ended_token"))
        pool, priority, weight = self._place
        return SessionOpened(
            info.session,
            weight,
            self.ref,
            holding,
            vm=info.vm,
            pool=pool,
            priority=priority,
            token=token if holding else 0,
            is_new=is_new,
        )

    async def _announce(
        self, info: SessionInfo, place: tuple[str, str, int], *, is_new: bool = False
    ) -> None:
        self._info = info
        self._place = place
        opened = self._opened(info, is_new=is_new)
        watch = Watch(info.session, self.ref, info.vm)
        self.monitor(self.find(f"{self.gpu}/scheduler"))
        await self.find(f"{self.gpu}/scheduler").send(opened)
        for name in (f"{self.gpu}/watchdog", "mediator/telemetry"):
            self.monitor(self.find(name))
            await self.find(name).send(watch)
        if not opened.holding:
            # A new session may want the GPU at once: have a lease ready, open-ended if nobody else is there.
            await self.find(f"{self.gpu}/scheduler").send(Demand(info.session))
        self.nursery.start_soon(self._read_events)

    @handles(Down)
    async def peer_restarted(self, message: Down) -> None:
        """Scheduler, watchdog or telemetry ended: announce this session to the successor."""
        if self._info is not None:
            self.nursery.start_soon(self._announce_again, message.name, self._info)

    async def _announce_again(self, name: str, info: SessionInfo) -> None:
        peer = self.find(name)
        await peer.wait_alive()
        self.monitor(peer)
        if name.endswith("/scheduler"):
            opened = self._opened(info)
            await peer.send(opened)
            if not opened.holding:
                await peer.send(Demand(info.session))
        else:
            await peer.send(Watch(info.session, self.ref, info.vm))

    async def _check_quarantine(self, vm: str) -> None:
        """Raises Quarantined."""
        record = await self.find("mediator/ledger").ask(GetQuarantine(vm))
        if record is not None:
            self._fault, self._cause = CUDA_ERROR_DEVICE_UNAVAILABLE, f"quarantine: {record.reason}"
            raise Quarantined(f"VM {vm!r} is quarantined: {record.reason}")

    # -- the worker

    async def _read_events(self) -> None:
        assert self._link is not None
        assert self._info is not None
        while True:
            event, descriptors = await self._link.receive()
            kind = event.get("event") if event is not None else None
            if kind == "trace" and self._awaiting_trace:
                self._awaiting_trace.pop(0)(descriptors)
                continue
            for descriptor in descriptors:
                os.close(descriptor)
            if kind in ("demand", "idle"):
                await self._lease_report(wants_more=kind == "demand")
            elif kind == "fault":
                assert event is not None
                await self._fault_reported(
                    int(event.get("error", CUDA_ERROR_UNKNOWN)), str(event.get("call", ""))
                )
            elif kind == "guest-gone" or event is None:
                # Whoever crashes his worker and leaves at once did crash it, whichever is heard of first.
                if event is None and (
                    not self._cause or (self._cause == GUEST_ENDED and self._fatal_signal())
                ):
                    self._cause = "worker ended"
                    await self._worker_died()
                self._cause = self._cause or GUEST_ENDED
                self.stop()
                return

    async def _lease_report(self, *, wants_more: bool) -> None:
        """A lease is over, or there is work and no lease. The page says which, whatever crossed with what on the way."""
        assert self._info is not None
        assert self._grant is not None
        scheduler = self.find(f"{self.gpu}/scheduler")
        token = self._grant.get("ended_token")  # stored after the two that follow
        if token == self._reported_token:
            if wants_more:
                await scheduler.send(Demand(self._info.session))
            return
        used, held = self._grant.get("gpu_ns"), self._grant.get("held_ns")
        await scheduler.send(
            LeaseEnded(
                self._info.session,
                max(used - self._reported_ns, 0),
                wants_more,
                token,
                max(held - self._reported_held_ns, 0),
            )
        )
        self._reported_ns, self._reported_held_ns, self._reported_token = used, held, token

    @handles(GrantLease)
    async def grant(self, message: GrantLease) -> None:
        if self._grant is None or self._link is None:
            return
        self._grant.grant(
            deadline_ns=message.deadline_ns,
            token=message.token,
            slice_ns=message.slice_ns,
            in_flight_us=message.in_flight_ns // 1000,
            standby=message.standby,
        )
        await self._kick()

    @handles(RevokeLease)
    async def revoke(self, message: RevokeLease) -> None:
        if self._grant is None or self._link is None:
            return
        self._grant.revoke()
        await self._kick()

    @handles(LimitsChanged)
    async def limits_changed(self, message: LimitsChanged) -> None:
        if self._info is not None and self._info.vm == message.vm:
            if message.watchdog_seconds is not None:
                # The watchdog reads it with the session's progress, each time.
                self._info = attrs.evolve(self._info, watchdog_seconds=message.watchdog_seconds)
            await self._kick()

    async def _kick(self) -> None:
        assert self._link is not None
        with contextlib.suppress(trio.BrokenResourceError):
            await self._link.send({"do": "kick"})

    # -- looking, and ending

    @handles(TraceWorker)
    async def trace_worker(self, message: TraceWorker) -> None:
        if self._link is None or self._info is None:
            raise Refused(NotAttachable(f"{self.name} has no session yet"))
        reply = self.take_reply()

        def answer(descriptors: list[int]) -> None:
            if len(descriptors) == 1 and reply is not None and reply.answer(descriptors[0]):
                return
            for descriptor in descriptors:
                os.close(descriptor)
            if not descriptors and reply is not None:
                reply.refuse(NotAttachable(f"the worker of {self.name} cannot be traced"))

        self._awaiting_trace.append(answer)
        with contextlib.suppress(trio.BrokenResourceError):
            await self._link.send({"do": "trace", "events": message.events})

    @handles(Sample)
    def sample(self, message: Sample) -> SessionSample:
        if self._info is None:
            raise Refused(NotAttachable(f"{self.name} has no session yet"))
        return self._take_sample("")

    @handles(MeasureUse)
    def measure_use(self, message: MeasureUse) -> SessionUse:
        if self._info is None or self._grant is None:
            raise Refused(NotAttachable(f"{self.name} has no session yet"))
        read = self._grant.get
        in_call = read("current_call") != 0
        return SessionUse(self._info, read("memory_used_bytes"), read("gpu_ns"), read("records"), in_call)

    @handles(MeasureProgress)
    def measure_progress(self, message: MeasureProgress) -> SessionProgress:
        if self._info is None or self._grant is None:
            raise Refused(NotAttachable(f"{self.name} has no session yet"))
        read = self._grant.get
        looked = read("looked_ns")  # stored last, so read first
        in_call = read("current_call")
        return SessionProgress(
            read("records"),
            in_call,
            read("oldest_mark_ns"),
            read("last_mark_ns"),
            looked,
            read("fences_done"),
            read("oldest_fence_ns"),
            self._info.watchdog_seconds,
            is_stopped(self._info.worker_pid),
            self._thread.starved_ns() if in_call and self._thread is not None else 0,
        )

    def _take_sample(self, ended: str) -> SessionSample:
        assert self._info is not None
        assert self._grant is not None
        assert self._page is not None
        names = {int(c): c.name for c in CallId}
        refused = {names.get(i, f"call {i}"): n for i, n in self._page.refused().items()}
        grant, now = self._grant.snapshot(), time.monotonic_ns()
        return SessionSample(
            self._info,
            now,
            grant,
            self._page.snapshot() | self._guest_times.take(self._page.times(), grant["answered_ns"], now),
            refused,
            ended,
        )

    @handles(GuestLeft)
    def guest_left(self, message: GuestLeft) -> None:
        self._cause = self._cause or GUEST_ENDED
        self.nursery.start_soon(self._leave_soon)

    async def _leave_soon(self) -> None:
        # The worker sees its lifeline end and goes; its link's end stops this actor before the time is up.
        await trio.sleep(LEAVE_SECONDS)
        self.stop()

    @handles(Fault)
    async def fault(self, message: Fault) -> None:
        if self._cause:
            return  # it is ending
        self._fault = message.error
        self._cause = message.what
        if self._info is not None and self._page is not None:
            self._tell_guest(self._page, self._info)  # before it can see its worker go
        self._kill_worker()
        await self._record_fault(message.error, message.what, message.kind, message.since_ns)
        self.stop()

    @handles(EndSessionsOf)
    def end_sessions_of(self, message: EndSessionsOf) -> None:
        if self._info is not None and self._info.vm == message.vm and not self._cause:
            self._fault, self._cause = message.error, message.what
            self.stop()

    async def _fault_reported(self, error: int, what: str) -> None:
        assert self._grant is not None
        await self._record_fault(error, what, kind_of(error, self._grant.get("protocol_errors")))

    def _fatal_signal(self) -> int:
        """The signal that the worker crashed by; 0: it did not."""
        flight = read_flight(self._link.grant_fd) if self._link is not None else None
        return flight.fatal_signal if flight is not None else 0

    async def _worker_died(self) -> None:
        """Of itself or by somebody's hand: nobody here ended it, and its guest is there."""
        number = self._fatal_signal()
        kind = FaultKind.CRASH if number else FaultKind.KILLED
        what = f"the worker crashed ({signal.Signals(number).name})" if number else "the worker was ended"
        await self._record_fault(CUDA_ERROR_UNKNOWN, what, kind)

    async def _record_fault(self, error: int, what: str, kind: str, since_ns: int = 0) -> None:
        if self._info is None or self._link is None:
            return
        info = self._info
        _log.warning("session %d of %s: %s, error %d: %s", info.session, info.vm, kind, error, what)
        details = describe(read_flight(self._link.grant_fd), time.monotonic_ns(), since_ns)
        await self._keep(RecordFault(info, error, what, str(kind), details, time.time()))

    async def _keep(self, record: RecordStart | RecordEnd | RecordFault) -> None:
        try:
            await self.find("mediator/outbox").ask(Keep(record), timeout_seconds=KEEP_SECONDS)
        except ActorError as error:
            _log.error("not kept: %s: %s", type(record).__name__, error)

    def _kill_worker(self) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    @property
    def _has_slot(self) -> bool:
        if isinstance(self.origin, SessionRequest):
            return self.origin.slot is not None
        return self._info is not None and self._info.slot is not None

    def _tell_guest(self, page: SessionPage, info: SessionInfo) -> None:
        """The session is over. Never waits: see below."""
        # Once its worker has gone a slot is taken back and zeroed, and a next session may be there already. That one
        # is made by this thread, so it cannot come between looking and writing.
        if info.slot is not None and page.get("session_id") != info.session:
            return
        if not page.get("sticky_error"):
            page.set("sticky_error", self._fault or CUDA_ERROR_UNKNOWN)
        page.set("state", SESSION_DEAD)

    async def stopped(self, reason: ExitReason) -> None:
        if self._page is not None and self._info is not None:
            self._final = self._take_sample(self._cause or str(reason))
            self._tell_guest(self._page, self._info)
        if self._pidfd >= 0:
            self._kill_worker()
            # Nobody else may have the slot before it has gone, and what it held is held until then.
            if self._has_slot or self._entry >= 0:
                with trio.move_on_after(GONE_SECONDS):
                    await trio.lowlevel.wait_readable(self._pidfd)
            os.close(self._pidfd)
        if self._account is not None:
            if self._entry >= 0:
                self._account.clear(self._entry)
            self._account.close()
        if self._link is not None:
            await self._link.aclose()
        for page in (self._grant, self._page):
            if page is not None:
                page.close()
        if self._info is not None and self._final is not None:
            for name in (f"{self.gpu}/watchdog", "mediator/telemetry"):
                self.find(name).send_nowait(Unwatch(self._final))
            self.find(f"{self.gpu}/scheduler").send_nowait(SessionClosed(self._info.session))
            await self._keep(RecordEnd(self._final))
