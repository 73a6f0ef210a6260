# SPDX-License-Identifier: Apache-2.0
"""The watchdog actor of one GPU: compares every session's progress with its deadline.

Deciding is ``_progress``; this actor reads the counters and tells the executor of a hung session to end it with
CUDA_ERROR_LAUNCH_TIMEOUT, and that of one whose worker has been stopped for as long. Other sessions are not touched. It looks every CHECK_SECONDS, and again when the earliest
deadline of all is due: a hang is found within a tenth of a second of its deadline. An executor that does not answer
holds up nobody else's turn.
"""

from __future__ import annotations

import contextlib
import logging
import time

import attrs
import trio

from vgpu.actors import Actor, ActorError, handles
from vgpu.actors.fault_messages import FaultKind, MeasureProgress, SessionProgress
from vgpu.actors.messages import Fault, SessionId, Unwatch, Watch

from ._progress import STOPPED, Hang, Progress, ProgressWatch

_log = logging.getLogger("vgpu.watchdog")

CUDA_ERROR_LAUNCH_TIMEOUT = 702
CUDA_ERROR_UNKNOWN = 999
# How late a call may be seen to have begun; what a check costs is some 50 us for each session.
CHECK_SECONDS = 0.06
ASK_SECONDS = 1.0
# After a deadline, so that the worker has looked at the device meanwhile.
AFTER_SECONDS = 0.004


@attrs.frozen
class Check:
    """Look at everybody now."""


def progress_of(found: SessionProgress) -> Progress:
    """What of a session's counters tells that it gets on."""
    return Progress(
        found.records,
        found.current_call != 0,
        found.oldest_mark_ns,
        found.last_mark_ns,
        found.looked_ns,
        found.fences_done,
        found.oldest_fence_ns,
        found.is_stopped,
        found.starved_ns,
    )


@attrs.define(eq=False)
class Watchdog(Actor):
    """Ends hung sessions."""

    _watched: dict[SessionId, tuple[Watch, ProgressWatch | None]] = attrs.Factory(dict)

    async def started(self) -> None:
        self.send_after(0, Check())

    @handles(Watch)
    def watch(self, message: Watch) -> None:
        self._watched[message.session] = (message, None)

    @handles(Unwatch)
    def unwatch(self, message: Unwatch) -> None:
        self._watched.pop(message.sample.info.session, None)

    @handles(Check)
    async def check(self, message: Check) -> None:
        async with trio.open_nursery() as nursery:
            for whom, _ in list(self._watched.values()):
                nursery.start_soon(self._look, whom)
        self.send_after(self._pause(), Check())

    def _pause(self) -> float:
        """Seconds until the next look."""
        dues = [watch.due() for _, watch in self._watched.values() if watch is not None]
        due = min((d for d in dues if d is not None), default=None)
        if due is None:
            return CHECK_SECONDS
        return min(CHECK_SECONDS, max(AFTER_SECONDS, (due - time.monotonic_ns()) / 1e9 + AFTER_SECONDS))

    async def _look(self, whom: Watch) -> None:
        session, executor = whom.session, whom.executor
        try:
            found = await executor.ask(MeasureProgress(), timeout_seconds=ASK_SECONDS)
        except ActorError:
            return
        known = self._watched.get(session)
        if known is None or known[0].executor != executor:
            return
        deadline = int(found.watchdog_seconds * 1e9)
        watch = known[1] or ProgressWatch(deadline)
        watch.deadline_ns = deadline
        self._watched[session] = (whom, watch)
        was_stopped = watch.is_stopped
        hang = watch.observe(progress_of(found), time.monotonic_ns())
        if watch.is_stopped != was_stopped:
            what = f"is stopped, and may be for {found.watchdog_seconds:g} s"
            _log.warning(
                "the worker of session %d %s",
                session,
                what if watch.is_stopped else "goes on",
                extra={"vm": whom.vm or None, "session": session},
            )
        if hang is not None:
            with contextlib.suppress(ActorError):  # its mailbox is full: the next look finds it again
                executor.notify(self._fault(hang, found.watchdog_seconds))
                self._watched.pop(session, None)

    @staticmethod
    def _fault(hang: Hang, seconds: float) -> Fault:
        if hang.what == STOPPED:
            what = f"the worker was stopped (SIGSTOP), and may be for {seconds:g} s"
            return Fault(CUDA_ERROR_UNKNOWN, what, FaultKind.STOPPED, hang.since_ns)
        what = f"{hang.what} does not end, and may take {seconds:g} s"
        return Fault(CUDA_ERROR_LAUNCH_TIMEOUT, what, FaultKind.HANG, hang.since_ns)
