# SPDX-License-Identifier: Apache-2.0
"""The metrics actor: gathers what everybody knows, for administrators and, where it was asked for, for Prometheus over HTTP.

Asks the other actors when somebody scrapes, and shows what they say (``exposition``). Between scrapes it only looks how
late the event loop is. Where it listens can be changed while it runs (``ServeMetrics``). Nothing is
secret-proof here: whoever reaches the port reads VM and program names, so it listens only where it is told
to. A peer is trusted with nothing: a time limit on every request and answer, a limit on connections, and one
collection at a time however many ask.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final, TypeVar

import attrs
import h11
import trio
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from . import Actor, ActorError, Refused, Reply, Request, handles
from .exposition import Knowledge, render
from .exposition_runtime import LoopLag
from .fault_messages import ListQuarantines
from .gpu_time import MeasureGpuTime
from .ledger_health import CheckLedger, CheckOutbox
from .messages import (
    BoundAddress,
    CountFaults,
    ListAccounts,
    ListDevices,
    ListVms,
    SampleGpu,
    ScheduleState,
    Survey,
)

_log = logging.getLogger("vgpu.metrics")

T = TypeVar("T")

REQUEST_SECONDS = 10.0
CONNECTION_LIMIT = 32
RECEIVE_BYTES = 4096
# A host with many sessions is read one session after the other.
ANSWER_SECONDS = 5.0
LAG_PERIOD_SECONDS = 0.25
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


class CannotServe(ActorError):
    """Nobody can listen at that address; the message says why, and what to do."""


_REMEDIES: Final = {
    errno.EADDRINUSE: "end what listens there (ss -ltnp shows it), or name another port",
    errno.EADDRNOTAVAIL: "name an address that this host has, or 0.0.0.0 for all of them",
    errno.EACCES: "name a port from 1024 on",
}


async def _open_listeners(address: tuple[str, int]) -> list[trio.SocketListener]:
    """Listen there.

    Raises:
        CannotServe: that address cannot be had.
    """
    host, port = address
    at = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        return await trio.open_tcp_listeners(port, host=host)
    except UnicodeError:  # which a name's parts are checked with
        why, number = "this can be no host's name", 0
    except OSError as error:
        why, number = error.strerror or str(error), error.errno or 0
    remedy = _REMEDIES.get(number, "name an address of this host, like 127.0.0.1")
    raise CannotServe(f"metrics cannot be served at {at}: {why}; {remedy}")


async def check_address(address: tuple[str, int]) -> None:
    """See whether metrics could be served there, for who would rather not start than not serve them.

    Raises:
        CannotServe: they could not.
    """
    for listener in await _open_listeners(address):
        await listener.aclose()


@attrs.frozen
class ServeMetrics(Request[tuple[str, int] | None]):
    """Serve over HTTP at this address from now on, and nowhere else; None: nowhere. What is bound, if anything.

    Refused with CannotServe; then it goes on where it was. Connections to the old address end.
    """

    address: tuple[str, int] | None


@attrs.frozen
class RenderMetrics(Request[bytes]):
    """The text that Prometheus would get."""


@attrs.define(eq=False)
class Metrics(Actor):
    """Everything that is counted; served over HTTP at one address or none.

    ``address`` is a function, for a successor is to listen where this one was told to.
    """

    address: Callable[[], tuple[str, int] | None]
    describe: dict[str, object] = attrs.Factory(dict)
    gpus: tuple[str, ...] = ()  # supervisors, one for each GPU
    telemetry: str = "mediator/telemetry"
    ledger: str = "mediator/ledger"
    fleet: str = "mediator/fleet"
    outbox: str = "mediator/outbox"
    limits: str = "mediator/limits"
    request_seconds: float = REQUEST_SECONDS
    _bound: tuple[str, int] | None = None
    _serving: trio.CancelScope | None = None
    _began: float = 0.0
    _lag: LoopLag = attrs.Factory(LoopLag)
    _connections: trio.CapacityLimiter = attrs.Factory(lambda: trio.CapacityLimiter(CONNECTION_LIMIT))
    _collecting: trio.Lock = attrs.Factory(trio.Lock)

    async def started(self) -> None:
        self._began = trio.current_time()
        await self._listen(self.address())
        self.nursery.start_soon(self._watch_loop)

    async def _watch_loop(self) -> None:
        while True:
            due = trio.current_time() + LAG_PERIOD_SECONDS
            await trio.sleep_until(due)
            self._lag.observe(trio.current_time() - due)

    async def _listen(self, address: tuple[str, int] | None) -> None:
        """Listen there and nowhere else.

        Raises:
            CannotServe: that address cannot be had; nothing has changed.
        """
        if address is not None and address == self._bound:
            return
        listeners = [] if address is None else await _open_listeners(address)
        if self._serving is not None:
            self._serving.cancel()
        self._serving = self._bound = None
        if listeners:
            at = listeners[0].socket.getsockname()
            self._bound = (str(at[0]), int(at[1]))
            _log.info("metrics at http://%s:%d/metrics", *self._bound)
            self._serving = trio.CancelScope()
            self.nursery.start_soon(self._serve_all, listeners, self._serving)

    async def _serve_all(self, listeners: list[trio.SocketListener], scope: trio.CancelScope) -> None:
        with scope:
            await trio.serve_listeners(self._serve, listeners)

    @handles(ServeMetrics)
    async def serve_at(self, message: ServeMetrics) -> tuple[str, int] | None:
        try:
            await self._listen(message.address)
        except CannotServe as error:
            raise Refused(error) from error
        return self._bound

    @handles(RenderMetrics)
    def render_metrics(self, message: RenderMetrics) -> None:
        self.nursery.start_soon(self._answer_render, self.take_reply())

    async def _answer_render(self, reply: Reply[bytes] | None) -> None:
        if reply is not None:
            reply.answer(await self._render())

    @handles(BoundAddress)
    def bound_address(self, message: BoundAddress) -> tuple[str, int]:
        if self._bound is None:
            raise Refused(CannotServe("metrics are served nowhere"))
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
        return _Answer(HTTPStatus.OK, await self._render(), CONTENT_TYPE_LATEST)

    async def _render(self) -> bytes:
        async with self._collecting:
            return render(await self._collect())

    async def _collect(self) -> Knowledge:
        system = self.life.system
        tree = system.tree()
        schedules: dict[str, dict[str, Any] | None] = {}
        for gpu in self.gpus:
            schedules[gpu.rpartition("/")[2].removeprefix("gpu")] = await self._ask(
                f"{gpu}/scheduler", ScheduleState()
            )
        return Knowledge(
            describe=self.describe,
            # The root of the tree is as old as the mediator.
            uptime_seconds=tree[0].age_seconds if tree else trio.current_time() - self._began,
            statistics=system.statistics(),
            survey=await self._ask(self.telemetry, Survey()),
            faults=await self._ask(self.ledger, CountFaults()),
            gpu_now=await self._ask(self.telemetry, SampleGpu()),
            gpu_times=await self._ask(self.telemetry, MeasureGpuTime()),
            vms=await self._ask(self.ledger, ListVms()),
            devices=await self._ask(self.fleet, ListDevices()),
            schedules=schedules,
            tree=tree,
            lag=self._lag,
            ledger=await self._ask(self.ledger, CheckLedger()),
            outbox=await self._ask(self.outbox, CheckOutbox()),
            accounts=await self._ask(self.limits, ListAccounts()),
            quarantines=await self._ask(self.ledger, ListQuarantines()),
        )

    async def _ask(self, name: str, question: Request[T]) -> T | None:
        try:
            return await self.find(name).ask(question, timeout_seconds=ANSWER_SECONDS)
        except ActorError as error:
            _log.warning("metrics without %s: %s", name, error)
            return None
