# SPDX-License-Identifier: Apache-2.0
"""The fleet: sees to it that every registered VM with a device has its device actor, and nobody else.

At its start it asks the ledger who is registered; afterwards it hears of it. The devices supervisor keeps single
device actors alive; what that supervisor forgets when it is restarted itself, the fleet starts again.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import attrs
import trio

from vgpu.transport.stub.launch import vfio_socket_path

from . import Actor, ActorError, Down, Refused, Reply, StartChild, TerminateChild, WhichChildren, handles
from .messages import (
    AwaitDevice,
    DeviceState,
    EndDevice,
    ListDevices,
    ListVms,
    RegisterVm,
    RemoveVm,
    SaveVm,
    ShowDevice,
    UnregisterVm,
    VmRecord,
)
from .vm_settings import NAME

_log = logging.getLogger("vgpu.fleet")

LEDGER = "mediator/ledger"
AGAIN_SECONDS = 0.5
START_SECONDS = 40.0
SHOW_SECONDS = 2.0
# What the kernel takes as the path of a unix socket, with its NUL.
SOCKET_PATH_LIMIT = 108


class CannotRegister(ActorError):
    """The VM cannot have a device here; the message says why."""


@attrs.define(eq=False)
class Fleet(Actor):
    """Devices by VM."""

    devices: str  # name of their supervisor
    run_dir: Path
    _turn: trio.Lock = attrs.Factory(trio.Lock)  # one change at a time

    async def started(self) -> None:
        self.nursery.start_soon(self._start_all)

    async def _start_all(self) -> None:
        supervisor = self.find(self.devices)
        await supervisor.wait_alive()
        self.monitor(supervisor)
        while True:
            try:
                async with self._turn:
                    for vm in await self.find(LEDGER).ask(ListVms(), wait_for_name=True):
                        if vm.bar1_bytes and not vm.ad_hoc and NAME.fullmatch(vm.name):
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
        self.nursery.start_soon(self._register, message.vm, self.take_reply())

    async def _register(self, vm: VmRecord, reply: Reply[DeviceState | None] | None) -> None:
        try:
            path = str(vfio_socket_path(self.run_dir, vm.name))
            if vm.bar1_bytes and len(path.encode()) >= SOCKET_PATH_LIMIT:
                raise CannotRegister(
                    f"the path of the VM's socket is too long ({path}): a shorter name, or another --run-dir"
                )
            async with self._turn:
                await self.find(LEDGER).ask(SaveVm(vm))
                if vm.bar1_bytes:
                    await self._start(vm)
            state = None
            if vm.bar1_bytes:
                device = self.find(f"{self.devices}/{vm.name}")
                state = self._complete(await device.ask(AwaitDevice(), timeout_seconds=START_SECONDS))
        except ActorError as error:
            if reply is not None:
                reply.refuse(error)
            return
        if reply is not None:
            reply.answer(state)

    @handles(UnregisterVm)
    def unregister(self, message: UnregisterVm) -> None:
        self.nursery.start_soon(self._unregister, message.name, self.take_reply())

    async def _unregister(self, name: str, reply: Reply[bool] | None) -> None:
        try:
            async with self._turn:
                # Forgotten first: a device whose VM is not registered does not come back, whatever happens next.
                await self.find(LEDGER).ask(RemoveVm(name))
                was_connected = False
                if await self._has(name):
                    device = self.find(f"{self.devices}/{name}")
                    was_connected = await device.ask(EndDevice(), timeout_seconds=START_SECONDS)
                    await self.find(self.devices).ask(TerminateChild(name))
        except ActorError as error:
            if reply is not None:
                reply.refuse(error)
            return
        if reply is not None:
            reply.answer(was_connected)

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
            with contextlib.suppress(ActorError):
                device = self.find(f"{self.devices}/{vm.name}")
                state = await device.ask(ShowDevice(), timeout_seconds=SHOW_SECONDS)
            found.append(self._complete(state))
        return tuple(found)
