# SPDX-License-Identifier: Apache-2.0
"""The worker process: one GPU context, one segment, one guest process, then the end.

    python -m vgpu.gpu.worker --run-dir DIR --id ID --gpu nvidia|software [--device N] [--library PATH]

It starts warm: driver initialised, primary context made, segment mapped and registered, before any guest
asks. Then it listens on ``DIR/workers/ID.sock`` (docs/wire.md section 4). The first ``assign`` hands it a guest's
lifeline; from then on a thread replays calls in C without the interpreter lock, and this module only
passes on what happens: kicks inwards; demand, idle and fault outwards. For a guest in a VM the assignment also
brings the BAR1 of that VM and a slot in it: the worker leaves its own segment for that one, at the same address.

The worker belongs to its guest, not to its mediator. When the lifeline ends it leaves at once, in the middle of
whatever it does: process death is how a GPU is freed. When the mediator ends it goes on under the lease it
has, and says hello again, descriptors and all, to the next one that connects.

No trio here: one thread replays, one waits in epoll. Must never: hold anything that a dead guest's memory
depends on; ask to be killed with its parent.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import attrs

# The driver puts device addresses where mmap puts things, by default just below the stack, where the
# libraries of guest processes lie too. A pointer must be either the one or the other there: a stack limit of
# this size at exec moves our mmap base down by as much (measured: 0x7f... becomes 0x6f...).
STACK_GAP_BYTES = 16 << 40
THREAD_STACK_BYTES = 8 << 20
_RELOCATED = "VGPU_WORKER_RELOCATED"

SEGMENT_ADDRESS = 0x2000_0000_0000
RING_BYTES = 4 << 20
SLOT_COUNT = 256
FENCE_COUNT = 8192
# A warm worker that no mediator has spoken to, and whose parent is gone, does not stay for ever.
ORPHAN_SECONDS = 120.0
TICK_SECONDS = 5.0

SESSION_READY, SESSION_DEAD = 1, 3
EVENT_DEMAND, EVENT_IDLE, EVENT_FAULT, EVENT_ENDED = 1, 2, 4, 8


def _arena_default() -> int:
    """A quarter of the host's memory, between 1 and 64 GiB. Pages are taken only when touched."""
    quarter = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    return max(1 << 30, min(64 << 30, quarter)) & ~((2 << 20) - 1)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vgpu.gpu.worker", description="one GPU session's worker")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--id", required=True, help="name of this worker; its socket is workers/ID.sock")
    parser.add_argument("--gpu", choices=["nvidia", "software"], required=True)
    parser.add_argument("--device", type=int, default=0, help="CUDA ordinal on this host")
    parser.add_argument("--library", type=Path, help="the real libcuda (nvidia only)")
    parser.add_argument(
        "--arena-bytes", type=int, default=_arena_default(), help="shared memory for payloads"
    )
    parser.add_argument("--registered-bytes", type=int, default=64 << 20, help="of it, registered while warm")
    parser.add_argument("--spin-us", type=int, help="spin so long before asking for a doorbell")
    parser.add_argument(
        "--turn", type=Path, help="the GPU's turn word (default: gpuN.turn in the run directory)"
    )
    parser.add_argument("--address", type=lambda text: int(text, 0), default=SEGMENT_ADDRESS)
    options = parser.parse_args(arguments)
    if not options.id or "/" in options.id or options.id.startswith("."):
        parser.error(f"--id {options.id!r} is no name for a socket")
    return options


def _spin_default_us() -> int:
    """Long where a processor can be spared for it: waking a sleeper costs more than most kernels take."""
    return 2000 if len(os.sched_getaffinity(0)) > 2 else 4


def _relocate() -> None:
    """Exec once more with a stack limit that moves the mmap base, unless done or not permitted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if _RELOCATED in os.environ:
        os.environ.pop(_RELOCATED)
        # The limit has done its work at exec; what is made from here on gets ordinary stacks.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_STACK, (THREAD_STACK_BYTES, hard))
        return
    if hard != resource.RLIM_INFINITY and hard < STACK_GAP_BYTES:
        return
    if soft != STACK_GAP_BYTES:
        resource.setrlimit(resource.RLIMIT_STACK, (STACK_GAP_BYTES, hard))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, _RELOCATED: "1"})


def _set_title(text: str) -> None:
    """The name that ``ps`` and ``top`` show for the process, or for another thread that asks (15 characters)."""
    pr_set_name = 15
    ctypes.CDLL(None).prctl(pr_set_name, ctypes.c_char_p(text.encode()[:15]), 0, 0, 0)


def _sealed_memory(name: str, size: int) -> int:
    """A memfd that cannot change its size, so that no mapping of it can be made to fault."""
    import fcntl

    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return descriptor


class WorkerFailed(Exception):
    """The worker cannot become warm; the message says at which step."""


@attrs.define(eq=False)
class Worker:
    """State of the process. Built warm; ``serve`` never returns."""

    options: argparse.Namespace
    _ffi: Any
    _lib: Any
    _replay: Any
    _segment_fd: int
    _grant_fd: int
    _segment_size: int
    _device: dict[str, Any]
    _keep: object
    _listener: socket.socket | None = None
    _link: socket.socket | None = None
    _protocol: Any = None
    _assignment: dict[str, Any] | None = None
    _lifeline: int = -1
    _trace_fd: int = -1  # made when somebody traces for the first time
    _segment_offset: int = 0  # where the segment begins in its file: a slot's place in a BAR1
    _last_contact: float = attrs.Factory(time.monotonic)
    _parent: int = attrs.Factory(os.getppid)
    _poll: Any = attrs.Factory(select.epoll)
    _ready: dict[int, Callable[[int], None]] = attrs.Factory(dict)

    @classmethod
    def warm(cls, options: argparse.Namespace) -> Worker:
        """Initialise the driver and everything a guest would otherwise wait for.

        Raises:
            WorkerFailed: the driver is unusable, or memory cannot be had.
        """
        from . import driver
        from ._replay import ffi, lib
        from .errors import result_name
        from .turn import turn_path

        # Here, since a signal may end the process in the middle of a first import, and ``leave`` needs this.
        importlib.import_module("vgpu.transport.layout")
        lib.vgpu_thread_stacks(THREAD_STACK_BYTES)
        replay = lib.vgpu_replay_new()
        if replay == ffi.NULL:
            raise WorkerFailed("out of memory")
        struct = lib.vgpu_replay_driver(replay)
        version = ""
        flags = 0
        keep: object = None
        if options.gpu == "software":
            from .software.attributes import DRIVER_VERSION_TEXT
            from .software.driver import install

            keep = install(ffi, struct)
            flags = lib.VGPU_DEVICE_SOFTWARE
            version = DRIVER_VERSION_TEXT
        else:
            try:
                library = driver.find_library(options.library)
            except driver.DriverNotFound as error:
                raise WorkerFailed(str(error)) from error
            wrong = lib.vgpu_driver_open(struct, os.fsencode(library))
            if wrong != ffi.NULL:
                raise WorkerFailed(f"{library}: {ffi.string(wrong).decode()}")
            version = driver.version_text(library)
            _use_nvml(lib, replay, library)
        spin_us = options.spin_us if options.spin_us is not None else _spin_default_us()
        layout = ffi.new(
            "struct vgpu_replay_options *",
            {
                "address": options.address,
                "arena_size": options.arena_bytes,
                "arena_registered": min(options.registered_bytes, options.arena_bytes),
                "ring_size": RING_BYTES,
                "slot_count": SLOT_COUNT,
                "fence_count": FENCE_COUNT,
                "spin_ns": spin_us * 1000,
            },
        )
        size = lib.vgpu_segment_size(layout)
        if size == 0:
            raise WorkerFailed("--arena-bytes and --registered-bytes must be multiples of 2 MiB")
        segment_fd = _sealed_memory("vgpu-segment", size)
        grant_fd = _sealed_memory("vgpu-grant", lib.VGPU_GRANT_FILE_SIZE)
        errno = lib.vgpu_replay_map(replay, segment_fd, grant_fd, layout)
        if errno:
            raise WorkerFailed(f"mapping {size} bytes at {options.address:#x}: {os.strerror(errno)}")
        lib.vgpu_replay_note_crashes(replay)
        _share_turn(lib, replay, options.turn or turn_path(options.run_dir, options.device))
        step = ffi.new("const char **")
        status = lib.vgpu_replay_warm(replay, options.device, flags, version.encode(), step)
        if status:
            raise WorkerFailed(f"{ffi.string(step[0]).decode()}: {result_name(status)}")
        device = _describe(segment_fd)
        return cls(options, ffi, lib, replay, segment_fd, grant_fd, size, device, keep)

    # -- the control socket

    def listen(self) -> None:
        """Make the socket. Who may connect is who may write the run directory: this user."""
        folder = self.options.run_dir / "workers"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / f"{self.options.id}.sock"
        unfinished = folder / f".{self.options.id}.new"
        unfinished.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._listener.bind(str(unfinished))
        os.chmod(unfinished, 0o600)
        self._listener.listen(4)
        self._listener.setblocking(False)
        unfinished.rename(path)  # it appears listening
        self._watch(self._listener.fileno(), select.EPOLLIN, self._accept)
        self._watch(self._lib.vgpu_replay_event_fd(self._replay), select.EPOLLIN, self._replay_event)

    def _watch(self, descriptor: int, events: int, react: Callable[[int], None]) -> None:
        self._poll.register(descriptor, events)
        self._ready[descriptor] = react

    def _forget(self, descriptor: int) -> None:
        self._poll.unregister(descriptor)
        del self._ready[descriptor]

    def serve(self) -> NoReturn:
        """Wait for whatever comes, until something ends the process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.leave("terminated"))
        while True:
            for descriptor, events in self._poll.poll(TICK_SECONDS):
                react = self._ready.get(descriptor)
                if react is not None:
                    react(events)
            self._leave_if_orphaned()

    def _leave_if_orphaned(self) -> None:
        unheld = self._assignment is None and self._link is None and os.getppid() != self._parent
        if unheld and time.monotonic() - self._last_contact > ORPHAN_SECONDS:
            self.leave("no mediator")

    def _accept(self, _events: int) -> None:
        from .control import LineProtocol

        assert self._listener is not None
        try:
            link, _ = self._listener.accept()
        except BlockingIOError:
            return
        if not _is_ours(link):
            link.close()
            return
        self._drop_link()  # the newest mediator is the one that lives
        self._last_contact = time.monotonic()
        self._link = link
        self._protocol = LineProtocol()
        link.settimeout(1.0)  # a mediator that does not read must not hold us
        self._watch(link.fileno(), select.EPOLLIN | select.EPOLLRDHUP, self._hear)
        self._say(self._hello(), [self._segment_fd, self._grant_fd])
        if self._assignment is not None and self._grant("demand"):
            self._say({"event": "demand", "epoch": self._grant("seen_epoch")})

    def _hello(self) -> dict[str, Any]:
        assignment = self._assignment or {}
        extra = {k: v for k, v in assignment.items() if k not in ("do", "session", "vm")}
        return {
            **extra,
            "event": "hello",
            "worker": self.options.id,
            "pid": os.getpid(),
            "state": "assigned" if self._assignment else "warm",
            "device": self._device,
            "session": assignment.get("session"),
            "vm": assignment.get("vm"),
            "segment_size": self._segment_size,
            "worker_address": self._lib.vgpu_replay_address(self._replay),
        }

    def _say(self, message: dict[str, Any], descriptors: list[int] | None = None) -> None:
        from .control import rights

        if self._link is None:
            return
        line = self._protocol.encode(message, len(descriptors or []))
        try:
            sent = self._link.sendmsg([line], rights(descriptors or []), socket.MSG_NOSIGNAL)
            self._link.sendall(line[sent:])
        except OSError:
            self._drop_link()

    def _drop_link(self) -> None:
        if self._link is None:
            return
        if self._trace_fd >= 0:
            self._lib.vgpu_replay_trace(self._replay, 0)  # whoever wanted to see it has gone
        self._forget(self._link.fileno())
        self._link.close()
        self._protocol.close()
        self._link = self._protocol = None

    def _hear(self, _events: int) -> None:
        from vgpu.transport.errors import RemoteProtocolError

        from .control import ANCILLARY_SIZE, LINE_LIMIT, take_rights

        assert self._link is not None
        try:
            data, ancillary, _, _ = self._link.recvmsg(LINE_LIMIT, ANCILLARY_SIZE, socket.MSG_CMSG_CLOEXEC)
        except TimeoutError:
            return
        except OSError:
            self._drop_link()
            return
        descriptors = take_rights(ancillary)
        if not data:
            for descriptor in descriptors:
                os.close(descriptor)
            self._drop_link()
            return
        try:
            messages = self._protocol.receive_data(data, descriptors)
        except RemoteProtocolError as error:
            _log(f"mediator: {error}")
            self._drop_link()
            return
        for message, owned in messages:
            self._obey(message, owned)

    def _obey(self, message: dict[str, Any], descriptors: list[int]) -> None:
        what = message.get("do")
        if what == "kick":
            self._lib.vgpu_replay_kick(self._replay)
        elif what == "stop":
            self.leave("told to stop")
        elif what == "trace":
            self._trace(message.get("events"))
        elif what == "assign" and self._assignment is None:
            if _is_assignment(message) and len(descriptors) == (2 if "segment_offset" in message else 1):
                lifeline = descriptors.pop(0)
                if descriptors:
                    self._rebase(message, descriptors.pop())
                self._assign(message, lifeline)
                return
            _log(f"an assignment that is none: {message!r}")
        for descriptor in descriptors:
            os.close(descriptor)

    def _trace(self, events: object) -> None:
        """Write down what the session does from now on, so many events at most; 0: no more. A memory answers."""
        if type(events) is not int or not 0 <= events < 1 << 32:
            _log(f"no number of events to trace: {events!r}")
            return
        if self._trace_fd < 0:
            self._trace_fd = _sealed_memory("vgpu-trace", self._lib.VGPU_TRACE_FILE_SIZE)
            errno = self._lib.vgpu_replay_trace_map(self._replay, self._trace_fd)
            if errno:
                _log(f"not traced: {os.strerror(errno)}")
                os.close(self._trace_fd)
                self._trace_fd = -1
                self._say({"event": "trace", "events": 0})
                return
        self._lib.vgpu_replay_trace(self._replay, events)
        self._say({"event": "trace", "events": events}, [self._trace_fd])

    # -- the session

    def _rebase(self, message: dict[str, Any], bar1: int) -> None:
        """Leave the own segment for a slot of a VM's BAR1. What cannot be had ends the process: nothing of it is left."""
        from .errors import result_name

        if not _keeps_its_size(bar1):
            _log("not assigned: the BAR1 is no memfd sealed against shrinking")
            self.leave("no slot")
        step = self._ffi.new("const char **")
        offset, size = message["segment_offset"], message["segment_size"]
        status = self._lib.vgpu_replay_rebase(
            self._replay, bar1, offset, size, self.options.registered_bytes, step
        )
        if status:
            why = os.strerror(-status) if status < 0 else result_name(status)
            failed = self._ffi.string(step[0]).decode()
            _log(f"not assigned: slot of {size:#x} bytes at {offset:#x}: {failed}: {why}")
            self.leave("no slot")
        os.close(self._segment_fd)
        self._segment_fd, self._segment_offset, self._segment_size = bar1, offset, size

    def _share_account(self, message: dict[str, Any]) -> None:
        """From now on the limits of its VM hold. Without them no guest is served."""
        from vgpu.transport.account import open_account_file

        try:
            descriptor = open_account_file(Path(message["account"]))
        except OSError as error:
            _log(f"not assigned: {message['account']}: {error.strerror}")
            self.leave("no account")
        errno = self._lib.vgpu_replay_share_account(self._replay, descriptor, message["account_entry"])
        os.close(descriptor)
        if errno:
            _log(f"not assigned: {message['account']}: {os.strerror(errno)}")
            self.leave("no account")

    def _assign(self, message: dict[str, Any], lifeline: int) -> None:
        if "account" in message:
            self._share_account(message)
        self._assignment = message
        self._lifeline = lifeline
        self._lib.vgpu_replay_assign(
            self._replay, lifeline, message["session"], message.get("memory_limit", 0)
        )
        # Readable means doorbells, which are the loop's business; only its end is ours.
        self._watch(lifeline, select.EPOLLRDHUP, lambda _events: self.leave("guest-gone"))
        threading.Thread(target=self._replay_calls, name="replay", daemon=True).start()
        self._say({"event": "assigned", "session": message["session"]})

    def _replay_calls(self) -> None:
        _set_title("vgpu-replay")  # this thread's: the mediator looks how long it waits for a processor
        self._lib.vgpu_replay_run(self._replay)

    def _replay_event(self, _events: int) -> None:
        taken = self._lib.vgpu_replay_events(self._replay)
        bits, epoch = taken & 0xFF, taken >> 8
        if bits & EVENT_FAULT:
            error = self._lib.vgpu_replay_error(self._replay)
            call = self._ffi.string(self._lib.vgpu_call_name(self._grant("current_call"))).decode()
            self._say({"event": "fault", "error": error, "call": call})
        if bits & EVENT_IDLE:
            self._say({"event": "idle", "epoch": epoch})
        if bits & EVENT_DEMAND:
            self._say({"event": "demand", "epoch": epoch})
        if bits & EVENT_ENDED:
            self.leave("guest-gone")

    def _grant(self, field: str) -> int:
        from vgpu.transport.layout import GrantPage

        page = GrantPage(self._grant_fd)
        try:
            return page.get(field)
        finally:
            page.close()

    def leave(self, why: str) -> NoReturn:
        """End the process now. The kernel frees the GPU; nothing in here is waited for."""
        folder = self.options.run_dir / "workers"
        with contextlib.suppress(OSError):
            (folder / f"{self.options.id}.sock").unlink()
        log = folder / f"{self.options.id}.log"
        with contextlib.suppress(OSError):
            if log.stat().st_size == 0:
                log.unlink()
        if why == "guest-gone":
            if self._segment_offset:
                self._end_session(is_lost=True)  # before the mediator can: it does not know why
            if self._link is not None:
                self._link.settimeout(0)
            self._say({"event": "guest-gone"})
        elif self._assignment is not None:
            self._end_session()
        os._exit(0)

    def _end_session(self, *, is_lost: bool = False) -> None:
        """Tell the guest that nobody is behind its session any more.

        is_lost: a lifeline of a slot has ended. The guest let go, or the device of its VM has gone; then the guest is
        there still, and nobody else can tell it. Until this process has ended nobody else has the slot.
        """
        from vgpu.transport.layout import SessionPage

        from .errors import Result

        page = SessionPage(self._segment_fd, self._segment_offset)
        if is_lost:
            if page.get("state") != SESSION_READY:  # it said goodbye, or has been told something worse
                return
            page.set("device_lost", 1)
        if not page.get("sticky_error"):
            page.set("sticky_error", Result.DEVICE_UNAVAILABLE)
        page.set("state", SESSION_DEAD)


def _use_nvml(lib: Any, replay: Any, libcuda: Path) -> None:
    """Say where it can be asked what a process holds of the card; without it small arrays are charged in whole units."""
    from . import driver

    with contextlib.suppress(driver.DriverNotFound):
        if lib.vgpu_replay_use_nvml(replay, os.fsencode(driver.find_nvml(libcuda))):
            raise WorkerFailed("out of memory")


def _share_turn(lib: Any, replay: Any, path: Path) -> None:
    """Map the word that says whose turn it is. Raises WorkerFailed."""
    from .turn import open_turn_file

    try:
        descriptor = open_turn_file(path)
    except OSError as error:
        raise WorkerFailed(f"{path}: {error.strerror}") from error
    errno = lib.vgpu_replay_share_turn(replay, descriptor)
    os.close(descriptor)
    if errno:
        raise WorkerFailed(f"mapping {path}: {os.strerror(errno)}")


def _is_assignment(message: dict[str, Any]) -> bool:
    numbers = [message.get("session"), message.get("memory_limit", 0)]
    if "segment_offset" in message:
        numbers += [message["segment_offset"], message.get("segment_size")]
    if "account" in message:
        numbers.append(message.get("account_entry"))
        if not isinstance(message["account"], str):
            return False
    sound = all(type(number) is int and 0 <= number < 1 << 64 for number in numbers)
    return sound and isinstance(message.get("vm"), str)


def _keeps_its_size(memory: int) -> bool:
    """Is it a memfd that nobody can shrink? Else a mapping of it could be made to fault."""
    import fcntl

    try:
        return bool(fcntl.fcntl(memory, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        return False


def _is_ours(link: socket.socket) -> bool:
    """Does the peer run as this user, or as root?"""
    peer = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    user = int.from_bytes(peer[4:8], sys.byteorder)
    return user in (0, os.geteuid())


def _describe(segment_fd: int) -> dict[str, Any]:
    """What the hello says of the device, from the device page (offsets as in wire.h; a test compares)."""
    page = os.pread(segment_fd, 4096, 0)
    driver_version = int.from_bytes(page[12:16], "little")
    uuid = page[272:288].hex()
    return {
        "name": page[16:272].split(b"\0", 1)[0].decode("utf-8", "replace"),
        "uuid": f"GPU-{uuid[:8]}-{uuid[8:12]}-{uuid[12:16]}-{uuid[16:20]}-{uuid[20:]}",
        "driver_version": driver_version,
        "memory_bytes": int.from_bytes(page[304:312], "little"),
        "gpu_fences": bool(int.from_bytes(page[312:316], "little") & 2),
    }


def _log(text: str) -> None:
    print(json.dumps({"worker": os.getpid(), "message": text}), file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run a worker; 1 if it cannot become warm, else the process ends in ``Worker.leave``."""
    _relocate()
    options = _parse(arguments)
    _set_title(f"vgpu-{options.id}")
    try:
        worker = Worker.warm(options)
        worker.listen()
    except (WorkerFailed, OSError) as error:
        _log(f"not started: {error}")
        return 1
    return worker.serve()


if __name__ == "__main__":
    raise SystemExit(main())
