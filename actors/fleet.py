# SPDX-License-Identifier: Apache-2.0
"""The fleet: sees to it that every registered VM with a device has its device actor, and nobody else.

At its start it asks the ledger who is registered; afterwards it hears of it. The devices supervisor keeps single
device actors alive; what that supervisor forgets when it is restarted itself, the fleet starts again. While the mediator
drains, devices are the next one's: VMs are listed and changed still, and nothing that needs a device is done.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import ClassVar, TypeVar

import attrs
import trio

from vgpu.transport.host_memory import HostMemory, host_memory
from vgpu.transport.names import is_name
from vgpu.transport.stub.launch import vfio_socket_path

from . import Actor, ActorError, Down, Refused, Reply, StartChild, TerminateChild, WhichChildren, handles
from .end_sessions import end_sessions
from .ledger import NoSuchPool, NoSuchVm, PoolExists
from .messages import (
    ApplyLimits,
    AwaitDevice,
    ChangePool,
    ChangeVm,
    DeletePool,
    DescribeGpu,
    DeviceState,
    EndDevice,
    GetVm,
    ListDevices,
    ListPools,
    ListVms,
    PoolRecord,
    RegisterVm,
    RemovePool,
    RemoveVm,
    SavePool,
    SaveVm,
    SetPool,
    SetVm,
    ShowDevice,
    UnregisterVm,
    UpdateVm,
    VmRecord,
)
from .vm_page import Description

_Asked = TypeVar("_Asked")
_Outcome = TypeVar("_Outcome")
_log = logging.getLogger("vgpu.fleet")

LEDGER = "mediator/ledger"
LIMITS = "mediator/limits"
DESCRIBE_SECONDS = 30.0  # a first worker may just be starting
AGAIN_SECONDS = 0.5
# What a program sees whose VM is there no more.
CUDA_ERROR_DEVICE_UNAVAILABLE = 46
START_SECONDS = 40.0
SHOW_SECONDS = 2.0
# What the kernel takes as the path of a unix socket, with its NUL.
SOCKET_PATH_LIMIT = 108


class NotAdmitted(ActorError):
    """What the VM is promised could not be kept; the message says why."""


class CannotRegister(ActorError):
    """The VM cannot have a device here, or lose the one it has; the message says why."""


async def _answer(
    reply: Reply[_Outcome] | None, work: Callable[[_Asked], Awaitable[_Outcome]], asked: _Asked
) -> None:
    """Do what was asked, and say what came of it."""
    try:
        outcome = await work(asked)
    except ActorError as error:
        if reply is not None:
            reply.refuse(error)
        return
    if reply is not None:
        reply.answer(outcome)


@attrs.define(eq=False)
class Fleet(Actor):
    """Devices by VM."""

    # Whoever lists devices asks each of them.
    stuck_after_seconds: ClassVar[float | None] = 30.0

    devices: str  # name of their supervisor
    run_dir: Path
    gpus: tuple[str, ...] = ()
    is_draining: Callable[[], bool] = bool
    memory: Callable[[], HostMemory] = host_memory
    _turn: trio.Lock = attrs.Factory(trio.Lock)  # one change at a time

    async def started(self) -> None:
        self.nursery.start_soon(self._start_all)

    async def _start_all(self) -> None:
        if self.is_draining():
            return
        supervisor = self.find(self.devices)
        await supervisor.wait_alive()
        self.monitor(supervisor)
        while not self.is_draining():
            try:
                async with self._turn:
                    for vm in await self.find(LEDGER).ask(ListVms(), wait_for_name=True):
                        if vm.bar1_bytes and not vm.ad_hoc and is_name(vm.name):
                            await self._start(vm)
                return
            except ActorError as error:
                _log.warning("cannot start every device yet: %s", error)
                await trio.sleep(AGAIN_SECONDS)

    @handles(Down)
    def forgotten(self, message: Down) -> None:
        self.nursery.start_soon(self._start_all)

    async def _start(self, vm: VmRecord) -> None:
        if not await self._has(vm.name):
            await self.find(self.devices).ask(StartChild((vm.name,), id=vm.name))

    async def _has(self, name: str) -> bool:
        """Is there such a child, living or just being restarted?"""
        return any(child.id == name for child in await self.find(self.devices).ask(WhichChildren()))

    # -- changes

    @handles(RegisterVm)
    def register(self, message: RegisterVm) -> None:
        self.nursery.start_soon(_answer, self.take_reply(), self._register, message)

    async def _register(self, message: RegisterVm) -> DeviceState | None:
        vm = message.vm
        path = str(vfio_socket_path(self.run_dir, vm.name))
        if vm.bar1_bytes and len(path.encode()) >= SOCKET_PATH_LIMIT:
            raise CannotRegister(
                f"the path of the VM's socket is too long ({path}): a shorter name, or another --run-dir"
            )
        async with self._turn:
            if vm.bar1_bytes and self.is_draining():
                raise CannotRegister(
                    "this mediator is draining and starts no device any more: ask the next one, or register it"
                    " without a device (--no-device)"
                )
            if not message.overcommit:
                await self._admit(vm)
                await self._admit_bar1(vm)
            await self.find(LEDGER).ask(SaveVm(vm))
            await self._make_pool(vm.pool)
            self._tell(vm)
            if vm.bar1_bytes:
                await self._start(vm)
        state = None
        if vm.bar1_bytes:
            device = self.find(f"{self.devices}/{vm.name}")
            state = self._complete(await device.ask(AwaitDevice(), timeout_seconds=START_SECONDS))
        return state

    @handles(UnregisterVm)
    def unregister(self, message: UnregisterVm) -> None:
        self.nursery.start_soon(_answer, self.take_reply(), self._unregister, message.name)

    async def _unregister(self, name: str) -> bool:
        async with self._turn:
            vm = await self.find(LEDGER).ask(GetVm(name)) if self.is_draining() else None
            if vm is not None and vm.bar1_bytes:
                raise CannotRegister(
                    f"this mediator is draining, and has left the device of VM {name!r} to the next one:"
                    " unregister the VM there"
                )
            # Forgotten first: a device whose VM is not registered does not come back, whatever happens next.
            await self.find(LEDGER).ask(RemoveVm(name))
            try:
                # With a device or without: nothing of the VM may run on when its limits go.
                await end_sessions(
                    self.find, self.gpus, name, CUDA_ERROR_DEVICE_UNAVAILABLE, "the VM was unregistered"
                )
                was_connected = False
                if not self.is_draining() and await self._has(name):
                    device = self.find(f"{self.devices}/{name}")
                    was_connected = await device.ask(EndDevice(), timeout_seconds=START_SECONDS)
                    await self.find(self.devices).ask(TerminateChild(name))
            finally:
                self.find(LIMITS).notify(ApplyLimits(VmRecord(name)))  # who comes by that name later
        return was_connected

    @handles(ChangeVm)
    def change(self, message: ChangeVm) -> None:
        self.nursery.start_soon(_answer, self.take_reply(), self._change, message)

    async def _change(self, message: ChangeVm) -> VmRecord:
        async with self._turn:
            before = await self.find(LEDGER).ask(GetVm(message.name))
            if before is None:
                raise NoSuchVm(f"no VM {message.name!r}; list-vms has those there are")
            vm: VmRecord = attrs.evolve(before, **message.changes)  # type: ignore[arg-type]
            if vm.pool != before.pool:
                await self._check_pool(vm.pool)
            # A promise that was made is kept: only a larger one is looked at.
            is_more = vm.memory_limit_bytes > before.memory_limit_bytes
            if is_more and not message.overcommit:
                await self._admit(vm)
            await self.find(LEDGER).ask(UpdateVm(vm))
            self._tell(vm)
        return vm

    @handles(ChangePool)
    def change_pool(self, message: ChangePool) -> None:
        self.nursery.start_soon(_answer, self.take_reply(), self._change_pool, message)

    async def _change_pool(self, message: ChangePool) -> PoolRecord:
        async with self._turn:
            pool = await self.find(LEDGER).ask(SavePool(message.pool, message.is_new))
            self._tell_schedulers(SetPool(pool.name, pool.weight))
        return pool

    @handles(DeletePool)
    def delete_pool(self, message: DeletePool) -> None:
        self.nursery.start_soon(_answer, self.take_reply(), self._delete_pool, message.name)

    async def _delete_pool(self, name: str) -> PoolRecord:
        # In turn with those that put VMs into pools. Schedulers keep an empty pool, which has no share of anything.
        async with self._turn:
            return await self.find(LEDGER).ask(RemovePool(name))

    async def _make_pool(self, name: str) -> None:
        with contextlib.suppress(PoolExists):
            pool = await self.find(LEDGER).ask(SavePool(PoolRecord(name), is_new=True))
            self._tell_schedulers(SetPool(pool.name, pool.weight))

    async def _check_pool(self, name: str) -> None:
        pools = await self.find(LEDGER).ask(ListPools())
        if name not in [pool.name for pool in pools]:
            raise NoSuchPool(f"no pool {name!r}; create-pool makes one, list-pools has those there are")

    async def _admit(self, vm: VmRecord) -> None:
        """Can the GPU memory that this VM is to have be promised, beside what the others were?

        Raises:
            NotAdmitted: no, or nobody can say.
        """
        if not vm.memory_limit_bytes or not self.gpus:
            return
        others = await self.find(LEDGER).ask(ListVms())
        promised = sum(other.memory_limit_bytes for other in others if other.name != vm.name)
        total = sum([await self._memory_of(gpu) for gpu in self.gpus])
        if promised + vm.memory_limit_bytes > total:
            raise NotAdmitted(
                f"VM {vm.name!r} cannot be promised {_mebibytes(vm.memory_limit_bytes)} of GPU memory:"
                f" there are {_mebibytes(total)}, and {_mebibytes(promised)} of them are promised to others;"
                " less memory, or --overcommit"
            )

    async def _admit_bar1(self, vm: VmRecord) -> None:
        """The same for its BAR1, which is the host's memory.

        Raises:
            NotAdmitted: no, or the host does not say how much it has.
        """
        if not vm.bar1_bytes:
            return
        memory = self.memory()
        if not memory.total_bytes:
            raise NotAdmitted("this host does not say how much memory it has; --overcommit does without")
        others = [o.bar1_bytes for o in await self.find(LEDGER).ask(ListVms()) if o.name != vm.name]
        if not memory.can_promise((vm.bar1_bytes, *others)):
            raise NotAdmitted(
                f"VM {vm.name!r} cannot be promised a BAR1 of {_mebibytes(vm.bar1_bytes)}, which is memory of the"
                f" host: there are {_mebibytes(memory.total_bytes)}, and {_mebibytes(sum(others))} of them are"
                " promised to others; a smaller --bar1, or --overcommit"
            )

    async def _memory_of(self, gpu: str) -> int:
        try:
            page = await self.find(f"{gpu}/workers").ask(DescribeGpu(), timeout_seconds=DESCRIBE_SECONDS)
        except ActorError as error:
            raise NotAdmitted(
                f"nobody can say how much memory {gpu.rpartition('/')[2]} has ({error}); try again, or --overcommit"
            ) from error
        return Description(page).memory_bytes

    def _tell(self, vm: VmRecord) -> None:
        """Have the change take effect, also for sessions that run. Who does not live reads the ledger when it does."""
        self.find(LIMITS).notify(ApplyLimits(vm))
        self._tell_schedulers(SetVm(vm.name, vm.pool, vm.priority, vm.weight))

    def _tell_schedulers(self, message: SetVm | SetPool) -> None:
        for gpu in self.gpus:
            self.find(f"{gpu}/scheduler").notify(message)

    # -- looking

    def _complete(self, state: DeviceState) -> DeviceState:
        return attrs.evolve(state, socket=str(vfio_socket_path(self.run_dir, state.vm)))

    @handles(ListDevices)
    async def list_devices(self, message: ListDevices) -> tuple[DeviceState, ...]:
        try:
            vms = await self.find(LEDGER).ask(ListVms())
        except ActorError as error:
            raise Refused(error) from error
        found = []
        for vm in vms:
            if not vm.bar1_bytes or vm.ad_hoc:
                continue
            state = DeviceState(vm.name, running=False, trouble="it is just being started")
            if self.is_draining():
                state = DeviceState(vm.name, running=False, trouble="it is left to the next mediator")
            with contextlib.suppress(ActorError):
                device = self.find(f"{self.devices}/{vm.name}")
                state = await device.ask(ShowDevice(), timeout_seconds=SHOW_SECONDS)
            found.append(self._complete(state))
        return tuple(found)


def _mebibytes(count: int) -> str:
    return f"{count >> 20} MiB"
