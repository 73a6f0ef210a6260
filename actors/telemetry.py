# SPDX-License-Identifier: Apache-2.0
"""Telemetry: what every session has done so far, living and lately ended, and how the GPU is.

Holds the list of sessions for whoever asks (admin tool, metrics, demo) and reads counters from the
executors only when asked: nothing runs per call, and nothing runs while nobody looks.

Device pages are somebody looking: while a VM has a device or a process of this host has asked for its VM's page, the
GPU is measured twice a second and every page written (``page_writer``). So is who asks for metrics: for minutes after that
counted GPU time is compared with the card's, once a second (``gpu_time``).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter, deque
from collections.abc import Callable
from typing import TypeVar

import attrs
import trio

from vgpu.gpu.drift import GpuTimeWindow
from vgpu.gpu.nvml import sampler_for
from vgpu.gpu.sampling import DeviceIdentity, GpuSample, Sampler
from vgpu.gpu.schedule import SessionId

from . import (
    Actor,
    ActorError,
    ActorGone,
    AskTimeout,
    ExitReason,
    Ref,
    Reply,
    Request,
    WhichChildren,
    handles,
)
from .gpu_time import INTEREST_SECONDS, LOOK_SECONDS, GpuTimes, MeasureGpuTime, gpu_of
from .guest_times import GUEST_COUNTS, GUEST_TIMES
from .messages import (
    AttachDevice,
    DescribeGpu,
    DetachDevice,
    EndedTotals,
    ListSessions,
    ListVms,
    MarkVm,
    MeasureUse,
    OpenPage,
    Sample,
    SampleGpu,
    SessionSample,
    SessionSurvey,
    SessionUse,
    Survey,
    Unwatch,
    VmChanged,
    Watch,
)
from .page_lease import PageLease
from .page_writer import NoPage, PageWriter
from .vm_page import Description

_log = logging.getLogger("vgpu.telemetry")

LEDGER = "mediator/ledger"
PERIOD_SECONDS = 0.5
# A sample this fresh is as good as a new one.
FRESH_SECONDS = 1.0
# For a first worker to say what GPU this is. A guest that waits for its page gives up after five seconds.
DESCRIBE_SECONDS = 4.0
KNOWN_SECONDS = 0.5
USE_SECONDS = 0.2

# Enough to see what a busy host has been doing; older sessions are in the ledger.
REMEMBERED_SESSIONS = 256

A = TypeVar("A")

# Counters of the grant page that only rise, so that adding them up over sessions means something.
CUMULATIVE = (
    "records",
    "async_records",
    "reply_records",
    "fence_records",
    "doorbells",
    "replay_errors",
    "protocol_errors",
    "launches",
    "bytes_to_device",
    "bytes_from_device",
    "gpu_ns",
    "replay_ns",
    "lease_wait_ns",
    "gpu_wait_ns",
    "answered_ns",
    "timed_leases",
    "timed_charged_ns",
    "timed_device_ns",
    "fences_issued",
    "fences_done",
)


@attrs.define(eq=False)
class _Totals:
    """Sums over the ended sessions of one VM."""

    sessions: int = 0
    grant: Counter[str] = attrs.Factory(Counter)
    refused: Counter[str] = attrs.Factory(Counter)
    guest: Counter[str] = attrs.Factory(Counter)

    def add(self, sample: SessionSample) -> None:
        self.sessions += 1
        for name in CUMULATIVE:
            self.grant[name] += sample.grant.get(name, 0)
        self.refused.update(sample.refused)
        for name in (*GUEST_TIMES, *GUEST_COUNTS):
            self.guest[name] += sample.guest.get(name, 0)


@attrs.define(eq=False)
class Telemetry(Actor):
    """Sessions by number, and the last counters of those that ended.

    ``pool``: the warm workers of the GPU that pages show; without one there are no pages.
    """

    pool: str = ""
    make_sampler: Callable[[DeviceIdentity], Sampler] = sampler_for
    period_seconds: float = PERIOD_SECONDS
    _writer: PageWriter = attrs.Factory(PageWriter)
    _turn: trio.Lock = attrs.Factory(trio.Lock)  # one measurement at a time
    _wanted: trio.Event = attrs.Factory(trio.Event)
    _description_trouble: str = ""
    _living: dict[SessionId, Ref[object]] = attrs.Factory(dict)
    # A session that does not answer counts as it last did: a sum over sessions must not fall.
    _last: dict[SessionId, SessionSample] = attrs.Factory(dict)
    _ended: deque[SessionSample] = attrs.Factory(lambda: deque(maxlen=REMEMBERED_SESSIONS))
    _totals: dict[str, _Totals] = attrs.Factory(dict)
    _gpu_times: GpuTimes = attrs.Factory(GpuTimes)
    _interest_until: float = float("-inf")
    _interest: trio.Event = attrs.Factory(trio.Event)

    @handles(Watch)
    def watch(self, message: Watch) -> None:
        self._living[message.session] = message.executor

    @handles(Unwatch)
    def unwatch(self, message: Unwatch) -> None:
        info = message.sample.info
        self._last.pop(info.session, None)
        executor = self._living.pop(info.session, None)
        if executor is not None:
            self._gpu_times.ended(self._gpu_of(executor), info.session, message.sample.grant.get("gpu_ns", 0))
            self._ended.append(message.sample)
            self._totals.setdefault(info.vm, _Totals()).add(message.sample)

    @handles(ListSessions)
    async def list_sessions(self, message: ListSessions) -> tuple[SessionSample, ...]:
        answered = await self._look()
        return (*self._ended, *(self._last[session] for session in answered))

    @handles(Survey)
    async def survey(self, message: Survey) -> SessionSurvey:
        await self._look()
        living = tuple(self._last[session] for session in sorted(self._living) if session in self._last)
        ended = {
            vm: EndedTotals(t.sessions, dict(t.grant), dict(t.refused), dict(t.guest))
            for vm, t in sorted(self._totals.items())
        }
        return SessionSurvey(living, ended)

    async def _look(self) -> list[SessionId]:
        """Sample the living; those that answered."""
        answered = await self._ask_all(Sample(), 1)
        self._last.update(answered)
        return list(answered)

    async def _ask_all(self, question: Request[A], seconds: float) -> dict[SessionId, A]:
        """Ask the living, all at once; answers in the order of the sessions. One without is just ending, and says so with Unwatch."""
        found: dict[SessionId, A] = {}

        async def ask(session: SessionId, executor: Ref[object]) -> None:
            with contextlib.suppress(ActorGone, AskTimeout):
                found[session] = await executor.ask(question, timeout_seconds=seconds)

        async with trio.open_nursery() as nursery:
            for session, executor in self._living.items():
                nursery.start_soon(ask, session, executor)
        return {session: found[session] for session in sorted(found)}

    # -- device pages

    async def started(self) -> None:
        self.nursery.start_soon(self._keep_pages)
        self.nursery.start_soon(self._keep_gpu_times)

    async def stopped(self, reason: ExitReason) -> None:
        self._writer.close()

    @handles(AttachDevice)
    def attach_device(self, message: AttachDevice) -> None:
        try:
            self._writer.attach(message.vm, message.bar1_fd)
        except OSError as error:
            _log.error(
                "the device of %s has no page that can be written: %s",
                message.vm,
                error,
                extra={"vm": message.vm},
            )
        finally:
            os.close(message.bar1_fd)
        self._wanted.set()

    @handles(DetachDevice)
    def detach_device(self, message: DetachDevice) -> None:
        self._writer.detach(message.vm)

    @handles(MarkVm)
    def mark_vm(self, message: MarkVm) -> None:
        self._writer.mark(message)

    @handles(VmChanged)
    def vm_changed(self, message: VmChanged) -> None:
        self._writer.know_limit(message.vm)
        self._wanted.set()

    @handles(OpenPage)
    def open_page(self, message: OpenPage) -> None:
        self.nursery.start_soon(self._open_page, message.vm, self.take_reply())

    async def _open_page(self, vm: str, reply: Reply[PageLease] | None) -> None:
        if reply is None:
            return
        try:
            await self._describe()
            lease = self._writer.lease(vm)
        except (NoPage, ActorError, OSError) as error:
            reply.refuse(error if isinstance(error, ActorError) else NoPage(str(error)))
            return
        try:
            await self._round()  # so that nobody reads a page without numbers
        except BaseException:
            lease.release()
            raise
        self._wanted.set()
        if not reply.answer(lease):
            lease.release()

    @handles(SampleGpu)
    def sample_gpu(self, message: SampleGpu) -> None:
        self.nursery.start_soon(self._answer_sample, self.take_reply())

    async def _answer_sample(self, reply: Reply[GpuSample | None] | None) -> None:
        self._be_interested()
        sample = None
        try:
            await self._describe(KNOWN_SECONDS)
            sample = await self._measure()
        except ActorError:
            pass  # nobody knows yet what GPU this is
        if reply is not None:
            reply.answer(sample)

    async def _keep_pages(self) -> None:
        while True:
            if not self._writer.is_wanted:
                await self._wanted.wait()
            self._wanted = trio.Event()
            began = trio.current_time()
            try:
                await self._describe()
                await self._round()
            except ActorError as error:
                if str(error) != self._description_trouble:
                    _log.warning("device pages wait: nobody can say yet what GPU this is: %s", error)
                self._description_trouble = str(error)
            # A page that is new is written at once.
            with trio.move_on_at(began + self.period_seconds):
                await self._wanted.wait()

    async def _describe(self, seconds: float = DESCRIBE_SECONDS) -> None:
        """See to it that the writer knows the GPU.

        Raises:
            ActorError: no worker could say in time.
        """
        if self._writer.description is not None:
            return
        if not self.pool:
            raise NoPage("there are no workers to ask what GPU this is")
        page = await self.find(self.pool).ask(DescribeGpu(), timeout_seconds=seconds)
        description = Description(page)
        if self._writer.description is None:
            self._writer.know(description, self.make_sampler(description.identity))

    async def _round(self) -> None:
        """Measure, and write every page."""
        await self._measure()
        if self._writer.is_wanted:
            if self._writer.are_limits_old:
                with contextlib.suppress(ActorError):  # limits are what they were
                    self._writer.know_limits(await self.find(LEDGER).ask(ListVms(), timeout_seconds=1))
            self._writer.write_all()

    async def _measure(self) -> GpuSample:
        async with self._turn:
            if self._writer.age() < min(self.period_seconds / 2, FRESH_SECONDS):
                return self._writer.sample
            uses = await self._uses()
            sample = await self._writer.measure(uses)
            # The software GPU's sensor is what its workers count, with what goes on in it; a real card's is its own.
            identity = self._writer.description.identity if self._writer.description else None
            work = self._writer.work if identity and identity.is_software else {}
            self._gpu_times.add(self._first_gpu, self._on_gpu(self._first_gpu, uses), sample, work)
            return sample

    # -- counted GPU time against the card's

    @property
    def _first_gpu(self) -> str:
        return self.pool.rpartition("/")[0]

    def _gpu_of(self, executor: Ref[object]) -> str:
        return gpu_of(executor.name) or self._first_gpu

    def _on_gpu(self, gpu: str, uses: tuple[SessionUse, ...]) -> tuple[SessionUse, ...]:
        def is_there(use: SessionUse) -> bool:
            executor = self._living.get(use.info.session)
            return executor is not None and self._gpu_of(executor) == gpu

        return tuple(use for use in uses if is_there(use))

    @handles(MeasureGpuTime)
    def measure_gpu_time(self, message: MeasureGpuTime) -> dict[str, tuple[GpuTimeWindow, ...]]:
        self._be_interested()
        return self._gpu_times.windows()

    def _be_interested(self) -> None:
        self._interest_until = trio.current_time() + INTEREST_SECONDS
        self._interest.set()

    async def _keep_gpu_times(self) -> None:
        while self.pool:
            if trio.current_time() > self._interest_until:
                self._interest = trio.Event()
                await self._interest.wait()
            with contextlib.suppress(ActorError):  # nobody can say yet what GPU this is
                await self._describe(KNOWN_SECONDS)
                await self._measure()
            for gpu in await self._other_gpus():
                with contextlib.suppress(ActorError):
                    await self._measure_other(gpu)
            await trio.sleep(LOOK_SECONDS)

    async def _other_gpus(self) -> tuple[str, ...]:
        if "/" not in self._first_gpu:
            return ()
        try:
            gpus = await self.find(self._first_gpu.rpartition("/")[0]).ask(WhichChildren(), timeout_seconds=1)
        except ActorError:
            return ()
        return tuple(gpu.name for gpu in gpus if gpu.name != self._first_gpu)

    async def _measure_other(self, gpu: str) -> None:
        if not self._gpu_times.knows(gpu):
            page = await self.find(f"{gpu}/workers").ask(DescribeGpu(), timeout_seconds=KNOWN_SECONDS)
            self._gpu_times.know(gpu, self.make_sampler(Description(page).identity))
        await self._gpu_times.measure(gpu, self._on_gpu(gpu, await self._uses()))

    async def _uses(self) -> tuple[SessionUse, ...]:
        return tuple((await self._ask_all(MeasureUse(), USE_SECONDS)).values())
