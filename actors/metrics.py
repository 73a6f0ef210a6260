# SPDX-License-Identifier: Apache-2.0
"""The metrics actor: answers ``GET /metrics`` over HTTP for Prometheus. Present only where it was asked for.

Asks telemetry and the ledger when somebody scrapes, and shows what they say (``exposition``). Nothing is
secret-proof here: whoever reaches the port reads VM and program names, so it listens only where it is told
to. A peer is trusted with nothing: a time limit on every request and answer, a limit on connections, and one
collection at a time however many ask.
"""

from __future__ import annotations

import contextlib
import logging
from functools import partial
from http import HTTPStatus
from typing import TypeVar

import attrs
import h11
import trio
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from . import Actor, ActorError, Request, handles
from .exposition import Knowledge, render
from .messages import BoundAddress, CountFaults, SampleGpu, Survey

_log = logging.getLogger("vgpu.metrics")

T = TypeVar("T")

REQUEST_SECONDS = 10.0
CONNECTION_LIMIT = 32
RECEIVE_BYTES = 4096
# A host with many sessions is read one session after the other.
ANSWER_SECONDS = 5.0
PLAIN = "text/plain; charset=utf-8"


@attrs.frozen
class _Answer:
    """What goes back to a peer."""

    status: HTTPStatus
    body: bytes
    kind: str = PLAIN
    headers: tuple[tuple[str, str], ...] = ()


def _refusal(status: HTTPStatus, *headers: tuple[str, str]) -> _Answer:
    return _Answer(status, f"{status.value} {status.phrase}\n".encode(), PLAIN, headers)


@attrs.define(eq=False)
class Metrics(Actor):
    """Serves metrics at one address."""

    host: str
    port: int
    describe: dict[str, object] = attrs.Factory(dict)
    telemetry: str = "mediator/telemetry"
    ledger: str = "mediator/ledger"
    request_seconds: float = REQUEST_SECONDS
    _bound: tuple[str, int] = ("", 0)
    _began: float = 0.0
    _connections: trio.CapacityLimiter = attrs.Factory(lambda: trio.CapacityLimiter(CONNECTION_LIMIT))
    _collecting: trio.Lock = attrs.Factory(trio.Lock)

    async def started(self) -> None:
        self._began = trio.current_time()
        try:
            listeners = await trio.open_tcp_listeners(self.port, host=self.host)
        except OSError as error:
            raise OSError(
                error.errno, f"cannot serve metrics at {self.host}:{self.port}: {error.strerror}"
            ) from error
        address = listeners[0].socket.getsockname()
        self._bound = (str(address[0]), int(address[1]))
        _log.info("metrics at http://%s:%d/metrics", *self._bound)
        self.nursery.start_soon(partial(trio.serve_listeners, self._serve, listeners))

    @handles(BoundAddress)
    def bound_address(self, message: BoundAddress) -> tuple[str, int]:
        return self._bound

    # -- one peer

    async def _serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            with contextlib.suppress(trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
                self._connections.acquire_nowait()
                try:
                    await self._converse(stream)
                finally:
                    self._connections.release()

    async def _converse(self, stream: trio.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER)
        while True:
            # A connection that says nothing for so long is dropped, between requests as before the first.
            with trio.move_on_after(self.request_seconds) as patience:
                try:
                    request = await self._receive(stream, connection)
                except h11.RemoteProtocolError as error:
                    await self._hang_up(stream, connection, error)
                    return
            if patience.cancelled_caught or request is None:
                return
            answer = await self._answer(request)
            with trio.move_on_after(self.request_seconds) as patience:
                await self._send(stream, connection, answer, request.method == b"HEAD")
            if patience.cancelled_caught or connection.our_state is h11.MUST_CLOSE:
                return
            try:
                connection.start_next_cycle()
            except h11.LocalProtocolError:
                return

    async def _receive(self, stream: trio.SocketStream, connection: h11.Connection) -> h11.Request | None:
        """A whole request, its body read and dropped; None where the peer hung up.

        Raises:
            h11.RemoteProtocolError: it is not HTTP.
        """
        request: h11.Request | None = None
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                if connection.they_are_waiting_for_100_continue:
                    return request  # answered without the body; the connection ends after that
                connection.receive_data(await stream.receive_some(RECEIVE_BYTES))
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.EndOfMessage):
                return request
            elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
                return None

    async def _hang_up(
        self, stream: trio.SocketStream, connection: h11.Connection, error: h11.RemoteProtocolError
    ) -> None:
        if connection.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            with trio.move_on_after(self.request_seconds):
                await self._send(stream, connection, _refusal(HTTPStatus(error.error_status_hint)), False)

    async def _send(
        self, stream: trio.SocketStream, connection: h11.Connection, answer: _Answer, is_head: bool
    ) -> None:
        headers = [
            ("content-type", answer.kind),
            ("content-length", str(len(answer.body))),
            *answer.headers,
        ]
        if connection.their_state is not h11.DONE:
            headers.append(("connection", "close"))
        data = connection.send(
            h11.Response(status_code=answer.status, headers=headers, reason=answer.status.phrase)
        )
        body = b"" if is_head else connection.send(h11.Data(data=answer.body))
        end = connection.send(h11.EndOfMessage())
        await stream.send_all((data or b"") + (body or b"") + (end or b""))

    # -- what is answered

    async def _answer(self, request: h11.Request) -> _Answer:
        if request.target.partition(b"?")[0] != b"/metrics":
            return _refusal(HTTPStatus.NOT_FOUND)
        if request.method != b"GET":
            return _refusal(HTTPStatus.METHOD_NOT_ALLOWED, ("allow", "GET"))
        async with self._collecting:
            return _Answer(HTTPStatus.OK, render(await self._collect()), CONTENT_TYPE_LATEST)

    async def _collect(self) -> Knowledge:
        return Knowledge(
            version=str(self.describe.get("version", "")),
            gpu=str(self.describe.get("gpu", "")),
            library=str(self.describe.get("library") or ""),
            uptime_seconds=trio.current_time() - self._began,
            statistics=self.life.system.statistics(),
            survey=await self._ask(self.telemetry, Survey()),
            faults=await self._ask(self.ledger, CountFaults()),
            gpu_now=await self._ask(self.telemetry, SampleGpu()),
        )

    async def _ask(self, name: str, question: Request[T]) -> T | None:
        try:
            return await self.find(name).ask(question, timeout_seconds=ANSWER_SECONDS)
        except ActorError as error:
            _log.warning("metrics without %s: %s", name, error)
            return None
