# SPDX-License-Identifier: Apache-2.0
"""A mediator in this process, for examples that reach into it: any actor of it can be made to raise.

The tree is the one that ``run-mediator`` runs, with one handler more in each actor, which raises. It runs in a thread of
its own; the example stays an ordinary program in the main thread.
"""

from __future__ import annotations

import logging
import os
import threading
import types
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import attrs
import trio
import trio.from_thread
from _support import MEMORY_BYTES, Host, NotSo

from vgpu.actors import Actor, ActorSystem, ExitReason, handles, open_system
from vgpu.actors.worker_pool import Spawn
from vgpu.gpu.process import WorkerOptions, start_worker
from vgpu.mediator import GpuPlan, MediatorPlan, mediator_spec
from vgpu.supervision import ChildKind, ChildSpec, SupervisorSpec

RESTART_SECONDS = 60.0
SUPERVISOR = "Supervisor"  # the kind of all of them
T = TypeVar("T")


@attrs.frozen
class RaiseNow:
    """To any actor of this tree: fail in the handler of this message."""


class InjectedFault(Exception):
    """What an actor was made to raise."""


@handles(RaiseNow)
def _raise_now(self: Actor, message: RaiseNow) -> None:
    raise InjectedFault(f"{self.name} was told to raise")


def _faulty(start: Callable[..., Actor]) -> Callable[..., Actor]:
    """The same actors, which can be made to raise."""
    classes: dict[type, type] = {}

    def make(*arguments: object) -> Actor:
        actor = start(*arguments)
        kind = type(actor)
        if kind not in classes:
            body = {"__slots__": (), "raise_now": _raise_now, "__module__": kind.__module__}
            classes[kind] = types.new_class(kind.__name__, (kind,), {}, lambda space: space.update(body))
        actor.__class__ = classes[kind]
        return actor

    return make


def with_faults(spec: SupervisorSpec) -> SupervisorSpec:
    """A tree whose every actor handles ``RaiseNow``, supervisors too; but for the one at the top."""

    def change(child: ChildSpec) -> ChildSpec:
        if child.kind is ChildKind.SUPERVISOR:
            child = with_faults(child.start.__self__).as_child()  # type: ignore[attr-defined]
        return attrs.evolve(child, start=_faulty(child.start))

    return attrs.evolve(spec, children=tuple(change(child) for child in spec.children))


class MediatorHere:
    """A running mediator of this process. Methods may be called from the main thread only."""

    def __init__(self, host: Host, spawn: Spawn | None = None) -> None:
        start = spawn or partial(start_worker, WorkerOptions(host.run_dir, host.gpu))
        self._plan = MediatorPlan(host.run_dir, host.state_dir, (GpuPlan(0, start),), {"gpu": host.gpu})
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._trouble: BaseException | None = None
        self._token: trio.lowlevel.TrioToken
        self._system: ActorSystem
        self._end: trio.Event

    def _run(self) -> None:
        try:
            trio.run(self._serve)
        except BaseException as error:  # noqa: BLE001 - whoever waits shall hear of it
            self._trouble = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        holder: list[ActorSystem] = []
        self._plan.run_dir.mkdir(parents=True, exist_ok=True)
        async with open_system(with_faults(mediator_spec(self._plan, holder))) as system:
            holder.append(system)
            self._system, self._token, self._end = system, trio.lowlevel.current_trio_token(), trio.Event()
            self._ready.set()
            await self._end.wait()

    def start(self) -> None:
        """Returns when it serves.

        Raises:
            NotSo: it does not.
        """
        self._thread.start()
        self._ready.wait()
        if self._trouble is not None:
            raise NotSo(f"the mediator ended: {self._trouble!r}")

    def stop(self) -> None:
        """End it, and its workers."""
        if self._thread.is_alive() and self._trouble is None:
            self._token.run_sync_soon(self._end.set)
        self._thread.join()

    def run(self, function: Callable[..., Awaitable[T]], *arguments: object) -> T:
        """Run an async function in the mediator's thread."""
        if not self._thread.is_alive():
            raise NotSo(f"the mediator ended: {self._trouble!r}")
        return trio.from_thread.run(function, *arguments, trio_token=self._token)

    def actors(self) -> list[str]:
        """Names of all actors that are no supervisors."""
        return [name for name, kind in self.run(self._list) if kind != SUPERVISOR]

    def supervisors(self) -> list[str]:
        """Names of all supervisors below the one at the top."""
        return [name for name, kind in self.run(self._list) if kind == SUPERVISOR][1:]

    async def _list(self) -> list[tuple[str, str]]:
        return [(one.name, one.kind) for top in self._system.tree() for one in top.walk()]

    def make_raise(self, name: str, *, comes_back: bool = True) -> ExitReason:
        """Have an actor raise; how its life ended, once its successor lives.

        Raises:
            NotSo: there is no such actor, or no successor.
        """
        return self.run(self._make_raise, name, comes_back)

    async def _make_raise(self, name: str, comes_back: bool) -> ExitReason:
        ref = self._system.ref(name)
        if not ref.is_alive:
            raise NotSo(f"there is no actor {name}")
        try:
            with trio.fail_after(RESTART_SECONDS):
                ref.send_nowait(RaiseNow())
                reason = await ref.wait_exit()
                if comes_back:
                    await ref.wait_alive()
        except trio.TooSlowError:
            raise NotSo(f"{name} did not end, or did not come back") from None
        return reason


@contextmanager
def mediator_here(host: Host, spawn: Spawn | None = None) -> Iterator[MediatorHere]:
    """Run a mediator on a host whose own was not started; what it logs goes to the host's log."""
    logging.basicConfig(filename=host.log, level=logging.INFO, force=True)
    os.environ["VGPU_SOFTWARE_MEMORY"] = str(MEMORY_BYTES)
    here = MediatorHere(host, spawn)
    here.start()
    try:
        yield here
    finally:
        host.end_guests()
        here.stop()
