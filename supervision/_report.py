# SPDX-License-Identifier: Apache-2.0
"""What a supervisor says when something went wrong: a value with every fact, made into text elsewhere.

`render_report` is that elsewhere; a log in JSON, the admin tool or a test reads the fields instead.
"""

from __future__ import annotations

import enum
import traceback
from collections.abc import Mapping

import attrs

from vgpu.actors import Crashed, ExitReason

from ._spec import Restart, ShutdownMode, ShutdownTime

__all__ = ["CrashReport", "ReportContext", "render_report"]


class ReportContext(enum.Enum):
    """On which occasion the report was made."""

    CHILD_TERMINATED = "child_terminated"
    """A child ended abnormally by itself, or a permanent one ended at all."""
    START_ERROR = "start_error"
    """A child did not start, the first time or at a restart."""
    SHUTDOWN_ERROR = "shutdown_error"
    """A child that was being stopped ended otherwise than asked, or had to be killed."""
    INTENSITY_EXCEEDED = "intensity_exceeded"
    """Too many restarts: the supervisor gives up."""
    RETRIES_EXHAUSTED = "retries_exhausted"
    """The back-off policy says to stop trying: the supervisor gives up."""


@attrs.frozen
class CrashReport:
    """One report; `str()` renders it."""

    time: float
    """Trio's clock, in seconds."""
    supervisor: str
    context: ReportContext
    reason: ExitReason
    child_id: str
    child_name: str
    restart: Restart
    shutdown: ShutdownTime
    restarts: int
    """How often this child has been restarted so far."""
    retry_in_seconds: float | None = None
    """When the supervisor tries (again), where that is not at once; None also where it does not."""
    subject: Mapping[str, object] = attrs.field(factory=dict, eq=False)
    """What VM and session the child knew of, for the log (see `Actor.subject`)."""

    def __str__(self) -> str:
        return render_report(self)


def render_report(report: CrashReport) -> str:
    """Make a report into lines for people, the traceback last."""
    shutdown = report.shutdown.value if isinstance(report.shutdown, ShutdownMode) else f"{report.shutdown} s"
    lines = [
        f"supervisor {report.supervisor}: {report.context.value}",
        f"  child:    {report.child_name} (id {report.child_id}, {report.restart.value}, shutdown {shutdown})",
        f"  reason:   {report.reason}",
        f"  restarts: {report.restarts}",
    ]
    if report.retry_in_seconds is not None:
        lines.append(f"  retry in: {report.retry_in_seconds:.3f} s")
    if isinstance(report.reason, Crashed):
        text = "".join(traceback.format_exception(report.reason.error))
        lines.extend(f"    {line}" for line in text.rstrip().splitlines())
    return "\n".join(lines)
