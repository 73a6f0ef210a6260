# SPDX-License-Identifier: Apache-2.0
"""The admin actor: JSON-RPC 2.0 on ``admin.sock``, one object per line.

Methods ask other actors and turn their answers into JSON; nothing is decided here. The socket is
readable by its owner only, which is the whole of its access control.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import trio

from . import ActorError, ActorSnapshot
from .messages import ListFaults, ListSessions, ListVms, ScheduleState
from .unix_listener import UnixListener

_log = logging.getLogger("vgpu.admin")

LINE_LIMIT = 65536
METHOD_NOT_FOUND = -32601
INVALID_REQUEST = -32600
INTERNAL_ERROR = -32603


def to_json(value: Any) -> Any:
    """attrs values as objects, tuples as lists, everything else as it is."""
    if attrs.has(type(value)):
        return {f.name: to_json(getattr(value, f.name)) for f in attrs.fields(type(value))}
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    return str(value)


@attrs.define(eq=False)
class Admin(UnixListener):
    """Answers administrators."""

    schedulers: tuple[str, ...]
    tree: Callable[[], tuple[ActorSnapshot, ...]]
    describe: dict[str, object] = attrs.Factory(dict)

    async def serve(self, stream: trio.SocketStream) -> None:
        buffer = b""
        with contextlib.suppress(trio.BrokenResourceError):
            async with stream:
                async for data in stream:
                    buffer += data
                    while b"\n" in buffer:
                        line, buffer = buffer.split(b"\n", 1)
                        await stream.send_all(json.dumps(await self._answer(line)).encode() + b"\n")
                    if len(buffer) > LINE_LIMIT:
                        return

    async def _answer(self, line: bytes) -> dict[str, Any]:
        number: Any = None
        try:
            request = json.loads(line)
            number = request.get("id")
            method = self._methods().get(request["method"])
        except (ValueError, KeyError, AttributeError, TypeError):
            return self._error(number, INVALID_REQUEST, "expected a JSON-RPC object with a method")
        if method is None:
            return self._error(number, METHOD_NOT_FOUND, f"no method {request['method']!r}")
        try:
            return {"jsonrpc": "2.0", "id": number, "result": to_json(await method())}
        except ActorError as error:
            return self._error(number, INTERNAL_ERROR, str(error))

    @staticmethod
    def _error(number: Any, code: int, message: str) -> dict[str, Any]:
        return {"jsonrpc": "2.0", "id": number, "error": {"code": code, "message": message}}

    def _methods(self) -> dict[str, Callable[[], Awaitable[Any]]]:
        return {
            "health": self._health,
            "sessions": self._sessions,
            "vms": self._vms,
            "faults": self._faults,
            "tree": self._tree,
            "schedule": self._schedule,
        }

    async def _health(self) -> Any:
        return {"ok": True, **self.describe}

    async def _sessions(self) -> Any:
        return await self.find("mediator/telemetry").ask(ListSessions())

    async def _vms(self) -> Any:
        return await self.find("mediator/ledger").ask(ListVms())

    async def _faults(self) -> Any:
        return await self.find("mediator/ledger").ask(ListFaults())

    async def _tree(self) -> Any:
        return self.tree()

    async def _schedule(self) -> Any:
        return {name: await self.find(name).ask(ScheduleState()) for name in self.schedulers}
