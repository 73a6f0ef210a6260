# SPDX-License-Identifier: Apache-2.0
"""How the mediator's log is written: text for people and the journal, or one JSON object a line for programs.

Every record carries, where that is known: the actor in whose task it was written, the VM and the session it is about. A
module says so with ``extra={"vm": ..., "session": ...}``; an actor's own name, VM and session are found without it. Under
systemd, text lines begin with the priority that the journal reads (``<4>``), and without a time of their own, for the
journal has one.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, TextIO

from vgpu.actors import current_subject
from vgpu.transport.text import escaped

FIELDS: Final = ("actor", "vm", "session")
# As syslog(3) numbers them.
PRIORITIES: Final = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
    (logging.NOTSET, 7),
)


class KnowWho(logging.Filter):
    """Writes actor, VM and session into a record that does not say them, as far as the task at hand tells."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Always lets it pass."""
        missing = [field for field in FIELDS if getattr(record, field, None) is None]
        found = current_subject() if missing else {}
        for field in missing:
            setattr(record, field, found.get(field))
        return True


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (RFC 3339, UTC), ``level``, ``logger``, ``message``, and who, where known."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for field in FIELDS:
            value = getattr(record, field, None)
            if value is not None:
                entry[field] = value if isinstance(value, int) else str(value)
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            entry["stack"] = record.stack_info
        return json.dumps(entry)


class TextFormatter(logging.Formatter):
    """A line for people, with who at its end; for the journal each line begins with its priority."""

    def __init__(self, *, for_journal: bool) -> None:
        super().__init__(
            "%(levelname)s %(name)s: %(message)s"
            if for_journal
            else "%(asctime)s %(levelname)s %(name)s: %(message)s"
        )
        self._for_journal = for_journal

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The first line, with who."""
        line = super().formatMessage(record)
        who = [
            f"{field}={getattr(record, field)}"
            for field in FIELDS
            if getattr(record, field, None) is not None
        ]
        # Somebody else's words may be in it: no line end begins a line of the log, no escape sequence reaches a terminal.
        return escaped(f"{line} [{' '.join(who)}]" if who else line)

    def format(self, record: logging.LogRecord) -> str:
        """All lines: an exception has many, set in so that none passes for an entry; for the journal each is one."""
        first, *rest = super().format(record).split("\n")
        lines = [first, *(f"  {escaped(line)}" for line in rest)]
        if self._for_journal:
            level = next(number for floor, number in PRIORITIES if record.levelno >= floor)
            lines = [f"<{level}>{line}" for line in lines]
        return "\n".join(lines)


def is_journal(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Is this stream the one that systemd connected to the journal? A shell started from a service inherits the word alone."""
    device, _, inode = environment.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return (device, inode) == (str(found.st_dev), str(found.st_ino))


def make_handler(kind: str, stream: TextIO, environment: Mapping[str, str]) -> logging.Handler:
    """A handler for ``text`` or ``json``."""
    handler = logging.StreamHandler(stream)
    handler.addFilter(KnowWho())
    if kind == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(TextFormatter(for_journal=is_journal(stream, environment)))
    return handler
