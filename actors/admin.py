# SPDX-License-Identifier: Apache-2.0
"""The admin actor: JSON-RPC 2.0 on ``admin.sock``, one object per line.

Methods ask other actors and turn their answers into JSON; nothing is decided here. A method's parameters are an object,
checked before anybody is asked. The socket is readable by its owner only, which is the whole of its access control.
"""

from __future__ import annotations

import contextlib
import enum
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import attrs
import trio

from . import ActorError, ActorSnapshot, ActorSystem, ExitReason, WhichChildren
from .fault_messages import (
    ClearQuarantine,
    GetRules,
    ListQuarantines,
    Quarantine,
    QuarantineRule,
    SetRule,
)
from .gpu_time import MeasureGpuTime
from .ledger_health import CheckLedger, CheckOutbox
from .messages import (
    ChangePool,
    ChangeVm,
    DeletePool,
    DeviceState,
    Fault,
    ListAccounts,
    ListDevices,
    ListFaults,
    ListPools,
    ListSessions,
    ListVms,
    RegisterVm,
    Sample,
    SampleGpu,
    ScheduleState,
    UnregisterVm,
    VmRecord,
)
from .metrics import RenderMetrics
from .trace_desk import TraceDesk
from .unix_listener import UnixListener
from .vm_settings import BadVm, changes_from, check_name, pool_from, vm_from

_log = logging.getLogger("vgpu.admin")

LINE_LIMIT = 65536
REASON_LENGTH = 500
METHOD_NOT_FOUND = -32601
INVALID_REQUEST = -32600
INVALID_PARAMETERS = -32602
INTERNAL_ERROR = -32603
# What a program sees whose session an administrator ended.
CUDA_ERROR_DEVICE_UNAVAILABLE = 46
START_SECONDS = 45.0
LEDGER_SECONDS = 5.0
FLEET = "mediator/fleet"
QUARANTINE = "mediator/quarantine"

Parameters = Mapping[str, Any]
Reload = Callable[[ActorSystem], Awaitable[Any]]


def to_json(value: Any) -> Any:
    """attrs values as objects, tuples as lists, everything else as it is."""
    if attrs.has(type(value)):
        return {f.name: to_json(getattr(value, f.name)) for f in attrs.fields(type(value))}
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, enum.Enum):
        return to_json(value.value)
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    return str(value)


class NoSuchSession(ActorError):
    """No session of that number lives."""


@attrs.define(eq=False)
class Admin(UnixListener):
    """Answers administrators."""

    gpus: tuple[str, ...]  # supervisors, one for each GPU
    tree: Callable[[], tuple[ActorSnapshot, ...]]
    describe: dict[str, object] = attrs.Factory(dict)
    reload: Reload | None = None
    is_draining: Callable[[], bool] = bool
    _tracing: TraceDesk | None = attrs.field(default=None, init=False)

    async def started(self) -> None:
        self._tracing = TraceDesk(
            self.life.system, self.nursery, self.find, self.gpus, str(self.describe.get("version", ""))
        )
        await super().started()

    async def stopped(self, reason: ExitReason) -> None:
        if self._tracing is not None:
            self._tracing.close()
        await super().stopped(reason)

    async def serve(self, stream: trio.SocketStream) -> None:
        try:
            await self._converse(stream)
        finally:
            if self._tracing is not None:
                self._tracing.peer_left(stream)

    async def _converse(self, stream: trio.SocketStream) -> None:
        buffer = b""
        with contextlib.suppress(trio.BrokenResourceError):
            async with stream:
                async for data in stream:
                    buffer += data
                    while b"\n" in buffer:
                        line, buffer = buffer.split(b"\n", 1)
                        await stream.send_all(json.dumps(await self._answer(line, stream)).encode() + b"\n")
                    if len(buffer) > LINE_LIMIT:
                        return

    async def _answer(self, line: bytes, peer: object) -> dict[str, Any]:
        number: Any = None
        try:
            request = json.loads(line)
            number = request.get("id")
            method = self._methods(peer).get(request["method"])
            parameters = request.get("params", {})
            if not isinstance(number, (str, int, float, type(None))):
                number = None
                raise TypeError
        except RecursionError:  # thousands of opening brackets
            return self._error(None, INVALID_REQUEST, "this is nested too deeply")
        except (ValueError, KeyError, AttributeError, TypeError):
            return self._error(number, INVALID_REQUEST, "expected a JSON-RPC object with a method")
        if method is None:
            return self._error(number, METHOD_NOT_FOUND, f"no method {request['method']!r}")
        if not isinstance(parameters, dict):
            return self._error(number, INVALID_PARAMETERS, "params must be an object")
        try:
            return {"jsonrpc": "2.0", "id": number, "result": to_json(await method(parameters))}
        except BadVm as error:
            return self._error(number, INVALID_PARAMETERS, str(error))
        except ActorError as error:
            return self._error(number, INTERNAL_ERROR, str(error))
        except RecursionError:  # what could just be read can be too deep to be shown in an error
            return self._error(number, INVALID_PARAMETERS, "the parameters are nested too deeply")

    @staticmethod
    def _error(number: Any, code: int, message: str) -> dict[str, Any]:
        return {"jsonrpc": "2.0", "id": number, "error": {"code": code, "message": message}}

    def _methods(self, peer: object) -> dict[str, Callable[[Parameters], Awaitable[Any]]]:
        return {
            "health": self._health,
            "sessions": self._sessions,
            "kill_session": self._kill_session,
            "vms": self._vms,
            "devices": self._devices,
            "register_vm": self._register_vm,
            "unregister_vm": self._unregister_vm,
            "change_vm": self._change_vm,
            "pools": self._pools,
            "create_pool": self._create_pool,
            "set_pool_weight": self._set_pool_weight,
            "delete_pool": self._delete_pool,
            "accounts": self._accounts,
            "faults": self._faults,
            "quarantines": self._quarantines,
            "quarantine": self._quarantine,
            "clear_quarantine": self._clear_quarantine,
            "quarantine_rules": self._quarantine_rules,
            "set_quarantine_rule": self._set_quarantine_rule,
            "tree": self._tree,
            "schedule": self._schedule,
            "runtime": self._runtime,
            "metrics": self._metrics,
            "reload": self._reload,
            "gpu": self._gpu,
            "gpu_time": self._gpu_time,
            **(self._tracing.methods(peer) if self._tracing is not None else {}),
        }

    async def _health(self, _: Parameters) -> Any:
        trouble = []
        try:
            ledger = await self.find("mediator/ledger").ask(CheckLedger(), timeout_seconds=LEDGER_SECONDS)
            if ledger.trouble:
                trouble.append(
                    f"the ledger cannot be written: {ledger.trouble} ({ledger.path},"
                    f" {ledger.free_bytes >> 20} MiB free on its file system)"
                )
        except ActorError as error:
            trouble.append(f"the ledger does not answer, its disk may be full: {error}")
        waiting = lost = None
        with contextlib.suppress(ActorError):
            outbox = await self.find("mediator/outbox").ask(CheckOutbox(), timeout_seconds=LEDGER_SECONDS)
            waiting, lost = outbox.waiting, outbox.lost
        if waiting and trouble:
            trouble.append(f"{waiting} records wait for it")
        if lost:
            trouble.append(f"{lost} records were lost while it could not be written")
        return {
            "ok": not trouble,
            **self.describe,
            "draining": self.is_draining(),
            "trouble": trouble,
            "records_waiting": waiting,
            "records_lost": lost,
        }

    async def _sessions(self, _: Parameters) -> Any:
        return await self.find("mediator/telemetry").ask(ListSessions())

    async def _kill_session(self, parameters: Parameters) -> Any:
        wanted = parameters.get("session")
        if type(wanted) is not int:
            raise BadVm(f"session is {wanted!r}, expected a number")
        for gpu in self.gpus:
            for child in await self.find(f"{gpu}/executors").ask(WhichChildren()):
                executor = self.find(child.name)
                try:
                    sample = await executor.ask(Sample(), timeout_seconds=1)
                except ActorError:
                    continue  # one that is just beginning, or ending
                if sample.info.session == wanted:
                    await executor.send(Fault(CUDA_ERROR_DEVICE_UNAVAILABLE, "ended by an administrator"))
                    return {"session": wanted, "vm": sample.info.vm}
        raise NoSuchSession(f"no session {wanted} lives")

    async def _vms(self, _: Parameters) -> Any:
        return await self.find("mediator/ledger").ask(ListVms())

    async def _devices(self, _: Parameters) -> Any:
        return await self.find(FLEET).ask(ListDevices(), timeout_seconds=START_SECONDS)

    async def _register_vm(self, parameters: Parameters) -> Any:
        overcommit, said = _take_overcommit(parameters)
        vm = vm_from(said)
        state = await self.find(FLEET).ask(RegisterVm(vm, overcommit), timeout_seconds=START_SECONDS)
        return _described(vm, state)

    async def _unregister_vm(self, parameters: Parameters) -> Any:
        name = check_name(parameters.get("vm_name"))
        was_connected = await self.find(FLEET).ask(UnregisterVm(name), timeout_seconds=START_SECONDS)
        return {"vm": name, "was_connected": was_connected}

    async def _change_vm(self, parameters: Parameters) -> Any:
        overcommit, said = _take_overcommit(parameters)
        name = check_name(said.pop("vm_name", None))
        message = ChangeVm(name, changes_from(said), overcommit)
        return {"vm": await self.find(FLEET).ask(message, timeout_seconds=START_SECONDS)}

    async def _pools(self, _: Parameters) -> Any:
        vms = await self.find("mediator/ledger").ask(ListVms())
        return [
            {"name": pool.name, "weight": pool.weight, "vms": [vm.name for vm in vms if vm.pool == pool.name]}
            for pool in await self.find("mediator/ledger").ask(ListPools())
        ]

    async def _create_pool(self, parameters: Parameters) -> Any:
        message = ChangePool(pool_from(parameters), is_new=True)
        return await self.find(FLEET).ask(message, timeout_seconds=START_SECONDS)

    async def _set_pool_weight(self, parameters: Parameters) -> Any:
        if "weight" not in parameters:
            raise BadVm("weight is missing")
        return await self.find(FLEET).ask(ChangePool(pool_from(parameters)), timeout_seconds=START_SECONDS)

    async def _delete_pool(self, parameters: Parameters) -> Any:
        name = check_name(parameters.get("pool"), "pool")
        return await self.find(FLEET).ask(DeletePool(name), timeout_seconds=START_SECONDS)

    async def _accounts(self, _: Parameters) -> Any:
        return await self.find("mediator/limits").ask(ListAccounts())

    async def _faults(self, parameters: Parameters) -> Any:
        limit = parameters.get("limit", 100)
        if type(limit) is not int or not 1 <= limit <= 1000:
            raise BadVm(f"limit is {limit!r}, expected 1 to 1000")
        vm, fault = parameters.get("vm_name"), parameters.get("fault")
        if fault is not None and (type(fault) is not int or not 0 < fault < 1 << 63):
            raise BadVm(f"fault is {fault!r}, expected its number as show-faults shows it")
        message = ListFaults(limit, None if vm is None else check_name(vm), fault)
        return await self.find("mediator/ledger").ask(message)

    async def _quarantines(self, parameters: Parameters) -> Any:
        in_force = not parameters.get("all", False)
        return await self.find("mediator/ledger").ask(ListQuarantines(in_force))

    async def _quarantine(self, parameters: Parameters) -> Any:
        name, reason = check_name(parameters.get("vm_name")), parameters.get("reason")
        if not isinstance(reason, str) or not reason.isprintable() or not 0 < len(reason) <= REASON_LENGTH:
            shown = repr(reason)[:REASON_LENGTH]
            raise BadVm(f"reason is {shown}, expected 1 to {REASON_LENGTH} printable characters, on one line")
        message = Quarantine(name, _who(parameters), reason)
        return await self.find(QUARANTINE).ask(message, timeout_seconds=START_SECONDS)

    async def _clear_quarantine(self, parameters: Parameters) -> Any:
        message = ClearQuarantine(check_name(parameters.get("vm_name")), _who(parameters))
        return await self.find(QUARANTINE).ask(message, timeout_seconds=START_SECONDS)

    async def _quarantine_rules(self, _: Parameters) -> Any:
        return await self.find("mediator/ledger").ask(GetRules())

    async def _set_quarantine_rule(self, parameters: Parameters) -> Any:
        faults, seconds = parameters.get("faults"), parameters.get("seconds", 600)
        rule = None
        if faults is not None:
            if type(faults) is not int or not 0 <= faults <= 1000:
                raise BadVm(f"faults is {faults!r}, expected 0 (never) to 1000")
            if type(seconds) not in (int, float) or not 0 < seconds <= 30 * 86400:
                raise BadVm(f"seconds is {seconds!r}, expected more than 0 and at most 30 days")
            rule = QuarantineRule(faults, float(seconds))
        name = check_name(parameters.get("vm_name"))
        return {"vm": name, "rule": await self.find("mediator/ledger").ask(SetRule(name, rule))}

    async def _tree(self, _: Parameters) -> Any:
        return self.tree()

    async def _runtime(self, _: Parameters) -> Any:
        system = self.life.system
        return {
            "now": trio.current_time(),  # on the clock of what follows
            "statistics": system.statistics(),
            "dead_letters": system.recent_dead_letters(),
            "stuck_handlers": [str(stuck) for stuck in system.recent_stuck_handlers()],
        }

    async def _gpu(self, _: Parameters) -> Any:
        return await self.find("mediator/telemetry").ask(SampleGpu())

    async def _gpu_time(self, _: Parameters) -> Any:
        return await self.find("mediator/telemetry").ask(MeasureGpuTime())

    async def _metrics(self, _: Parameters) -> Any:
        text = await self.find("mediator/metrics").ask(RenderMetrics(), timeout_seconds=START_SECONDS)
        return text.decode()

    async def _reload(self, _: Parameters) -> Any:
        if self.reload is None:
            raise ActorError("this mediator was started without a configuration that could be read again")
        return await self.reload(self.life.system)

    async def _schedule(self, _: Parameters) -> Any:
        names = [f"{gpu}/scheduler" for gpu in self.gpus]
        return {name: await self.find(name).ask(ScheduleState()) for name in names}


def _take_overcommit(parameters: Parameters) -> tuple[bool, dict[str, Any]]:
    said = dict(parameters)
    overcommit = said.pop("overcommit", False)
    if type(overcommit) is not bool:
        raise BadVm(f"overcommit is {overcommit!r}, expected true or false")
    return overcommit, said


def _who(parameters: Parameters) -> str:
    """Who says so, as the tool was told; it is kept, and proves nothing."""
    by = parameters.get("by", "administrator")
    if not isinstance(by, str) or not by.isprintable() or not 0 < len(by) <= 100:
        raise BadVm(f"by is {by!r}, expected a name of up to 100 characters")
    return by


def _described(vm: VmRecord, state: DeviceState | None) -> dict[str, Any]:
    return {"vm": vm, "device": state}
