# SPDX-License-Identifier: Apache-2.0
"""Warm workers: processes that have paid for interpreter, driver and context before anybody asks.

Keeps a few ready per GPU, hands them out, and starts the next at once. A worker given away belongs to
the executor that took it. When the mediator starts, the pool looks for workers an earlier one left: warm ones
are taken over, assigned ones get an executor that adopts them. While none can be started, whoever asks for one
is refused at once, so that its guest is told to come again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import attrs
import trio

from vgpu.gpu.control import WorkerLink, open_worker_link
from vgpu.transport.errors import RemoteProtocolError
from vgpu.transport.layout import DEVICE_PAGE_SIZE

from . import Actor, ActorError, ExitReason, Reply, StartChild, handles
from .messages import Adoption, DescribeGpu, DriverVersion, TakeWorker, WorkerHandle
from .worker_look import is_stopped

_log = logging.getLogger("vgpu.workers")

# After a worker failed to start; doubles up to the limit.
RETRY_SECONDS = 0.5
RETRY_LIMIT_SECONDS = 10.0
# Workers of an earlier mediator: how long they are waited for at the start, and how long before they are given up.
HELLO_SECONDS = 2.0
LATE_HELLO_SECONDS = 30.0


class NoWorker(ActorError):
    """No worker can be started at present; the message says why. Ask again later."""


class Process(Protocol):
    """What the pool needs of a started worker process."""

    @property
    def pid(self) -> int: ...

    async def wait(self) -> int: ...


class Spawn(Protocol):
    """Start a worker process of the given name and wait until it is warm."""

    async def __call__(self, worker: str) -> tuple[Process, str]: ...


@attrs.frozen
class SetWarm:
    """Keep so many workers ready from now on; those that are too many end."""

    count: int


@attrs.frozen
class WorkerReady:
    """A worker is warm (or failed to become so)."""

    handle: WorkerHandle | None
    driver_version: int = 0
    device_page: bytes = b""
    error: str = ""


def _device_page_of(link: WorkerLink) -> bytes:
    """What a warm worker has found out about its GPU. Once it has a guest, that may write there what it likes."""
    return os.pread(link.segment_fd, DEVICE_PAGE_SIZE, 0)


def _end(worker: WorkerHandle) -> None:
    """Kill a warm worker: it has nothing to lose."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker.pid, signal.SIGKILL)


async def _end_silent(path: Path, seconds: float) -> None:
    """Kill whoever listens there and has said nothing for so long."""
    with (
        contextlib.suppress(OSError, trio.TooSlowError),
        trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link,
    ):
        with trio.fail_after(1):
            await link.connect(str(path))
        # Of who called listen(), which runs as this user: the directory is this user's.
        pid = int.from_bytes(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)
        _log.error("worker %s (pid %d) has not answered for %g s; it is ended", path.stem, pid, seconds)
        os.kill(pid, signal.SIGKILL)
    path.unlink(missing_ok=True)


async def _link_to(path: Path, seconds: float) -> WorkerLink | None:
    """A link to the worker that listens there; None: there is none any more, or it said nothing for so long and is ended."""
    try:
        with trio.fail_after(seconds):
            return await open_worker_link(str(path))
    except trio.TooSlowError:
        # Its guest would wait for ever for a lease that nobody gives it.
        await _end_silent(path, seconds)
    except (OSError, RemoteProtocolError):
        path.unlink(missing_ok=True)
    return None


async def end_strangers(directory: Path, prefixes: tuple[str, ...]) -> None:
    """End workers that an earlier mediator left and whose GPU this one does not share.

    Nobody would ever give them a lease: their guests would wait for ever. Call it before any pool starts.
    """
    for path in sorted(directory.glob("*.sock")):
        if path.name.startswith(prefixes):
            continue
        link = await _link_to(path, HELLO_SECONDS)
        if link is None:
            continue
        pid = int(link.hello["pid"])
        await link.aclose()
        _log.warning(
            "worker %s (pid %d) is of a GPU that is not shared any more; it is ended", path.stem, pid
        )
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        path.unlink(missing_ok=True)


@attrs.define(eq=False)
class WorkerPool(Actor):
    """Warm workers of one GPU."""

    executors: str
    directory: Path
    spawn: Spawn
    warm: int = 1
    prefix: str = ""  # how the names of this GPU's workers begin; others' are left alone
    new_name: Callable[[], str] = attrs.field(default=lambda: os.urandom(6).hex())
    _ready: deque[WorkerHandle] = attrs.Factory(deque)
    _waiting: deque[Reply[WorkerHandle]] = attrs.Factory(deque)
    _asking: list[Reply[int]] = attrs.Factory(list)
    _asking_page: list[Reply[bytes]] = attrs.Factory(list)
    _driver_version: int = 0
    _device_page: bytes = b""
    _starting: int = 0
    _retry_seconds: float = RETRY_SECONDS
    # Why the last start failed, until the next try.
    _trouble: str = ""

    async def started(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.life.restarts == 0:
            # A successor in the same mediator must not look: what it would find belongs to living executors, and a
            # worker drops its link for a newer one. Warm workers of its predecessor have ended with that.
            await self._take_over()
        self._fill()

    async def stopped(self, reason: ExitReason) -> None:
        for handle in self._ready:
            with contextlib.suppress(ProcessLookupError):
                os.kill(handle.pid, signal.SIGKILL)

    async def _take_over(self) -> None:
        found = sorted(self.directory.glob(f"{self.prefix}*.sock"))
        answered = [trio.Event() for _ in found]
        for path, event in zip(found, answered, strict=True):
            self.nursery.start_soon(self._take_over_one, path, event)
        # Whoever is slow, or stopped, holds up nobody: it is waited for on the side.
        with trio.move_on_after(HELLO_SECONDS):
            for event in answered:
                await event.wait()

    async def _take_over_one(self, path: Path, answered: trio.Event) -> None:
        try:
            handle = await self._greet(path)
        finally:
            # Not before a warm one is among those that are ready, or another is started in its place.
            answered.set()
        if handle is not None:
            await self._start_adopter(handle)

    async def _greet(self, path: Path) -> WorkerHandle | None:
        """Hear what a worker that was left is: one that has a session is given back, to be adopted."""
        link = await _link_to(path, LATE_HELLO_SECONDS)
        if link is None:
            return None
        hello = link.hello
        self._driver_version = int(hello["device"]["driver_version"])
        if hello["state"] == "warm":
            self._device_page = _device_page_of(link)
        await link.aclose()
        handle = WorkerHandle(str(hello["worker"]), int(hello["pid"]), str(path))
        if hello["state"] != "warm":
            return handle
        self._keep(handle)
        self._serve()
        return None

    async def _start_adopter(self, handle: WorkerHandle) -> None:
        supervisor = self.find(self.executors)
        await supervisor.wait_alive()
        try:
            await supervisor.ask(StartChild((Adoption(handle),)), timeout_seconds=30)
        except ActorError as error:
            _log.error("cannot adopt worker %d: %s; it is ended", handle.pid, error)
            with contextlib.suppress(ProcessLookupError):
                os.kill(handle.pid, signal.SIGKILL)

    def _fill(self) -> None:
        if self._trouble:
            return
        is_asked = any(r.is_awaited for r in self._asking) or any(r.is_awaited for r in self._asking_page)
        wanted = max(self.warm + len(self._waiting), int(is_asked))
        while len(self._ready) + self._starting < wanted:
            self._starting += 1
            self.nursery.start_soon(self._start_one)

    async def _start_one(self) -> None:
        worker = f"{self.prefix}{self.new_name()}"
        try:
            process, socket_path = await self.spawn(worker)
            version, page = await self._ask_device(socket_path)
        except (OSError, RemoteProtocolError) as error:
            await self.ref.send(WorkerReady(None, error=str(error)))
            return
        await self.ref.send(WorkerReady(WorkerHandle(worker, process.pid, socket_path), version, page))
        # Reap it whenever it ends. Cancelled, this leaves the process alone: a successor adopts it.
        await process.wait()

    async def _ask_device(self, socket_path: str) -> tuple[int, bytes]:
        if self._driver_version and self._device_page:
            return self._driver_version, self._device_page
        link = await open_worker_link(socket_path)
        try:
            return int(link.hello["device"]["driver_version"]), _device_page_of(link)
        finally:
            await link.aclose()

    @handles(DriverVersion)
    def driver_version(self, message: DriverVersion) -> int:
        reply = self.take_reply() if not self._driver_version else None
        if reply is not None:
            self._asking.append(reply)
            self._fill()
        return self._driver_version

    @handles(DescribeGpu)
    def describe_gpu(self, message: DescribeGpu) -> bytes:
        reply = self.take_reply() if not self._device_page else None
        if reply is not None:
            self._asking_page = [r for r in self._asking_page if r.is_awaited]
            self._asking_page.append(reply)
            self._fill()
        return self._device_page

    @handles(WorkerReady)
    async def ready(self, message: WorkerReady) -> None:
        self._starting -= 1
        if message.handle is None:
            _log.error("a worker did not start: %s", message.error)
            if not self._trouble:
                self._retry_seconds = min(self._retry_seconds * 2, RETRY_LIMIT_SECONDS)
                self.nursery.start_soon(self._fill_later, self._retry_seconds)
            self._trouble = message.error or "unknown"
            self._serve()
            return
        self._retry_seconds = RETRY_SECONDS
        self._driver_version = message.driver_version
        self._device_page = message.device_page
        while self._asking:
            self._asking.pop().answer(self._driver_version)
        while self._asking_page:
            self._asking_page.pop().answer(self._device_page)
        self._keep(message.handle)
        self._serve()

    def _keep(self, handle: WorkerHandle) -> None:
        """It has become warm, or was found so. One that nobody wants any more is ended: it holds memory of the GPU."""
        if len(self._ready) < self.warm + len(self._waiting):
            self._ready.append(handle)
        else:
            _end(handle)

    async def _fill_later(self, seconds: float) -> None:
        await trio.sleep(seconds)
        self._trouble = ""
        self._fill()

    @handles(SetWarm)
    def set_warm(self, message: SetWarm) -> None:
        self.warm = message.count
        while len(self._ready) > self.warm:
            _end(self._ready.pop())
        self._fill()

    @handles(TakeWorker)
    def take(self, message: TakeWorker) -> None:
        reply = self.take_reply()
        if reply is not None:
            self._waiting.append(reply)
        self._serve()
        self._fill()

    def _serve(self) -> None:
        while self._waiting and self._ready:
            if not self._waiting[0].is_awaited:
                self._waiting.popleft()
                continue
            handle = self._ready.popleft()
            if not Path(f"/proc/{handle.pid}").exists():
                continue
            if is_stopped(handle.pid):
                _log.warning("warm worker %s (pid %d) is stopped; it is ended", handle.worker, handle.pid)
                _end(handle)
                continue
            self._waiting.popleft().answer(handle)
        if self._trouble and not self._starting:
            while self._waiting:
                self._waiting.popleft().refuse(NoWorker(self._trouble))
        self._fill()
