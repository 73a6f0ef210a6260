# SPDX-License-Identifier: Apache-2.0
"""What ``vgpu-admin`` can do: one row for each command, with its options, its question and its text for people.

A new command is a function that asks (its value is what ``--json`` prints), a function that shows, and a row.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import attrs

from vgpu.admin_arguments import (
    NotDone,
    WrongUse,
    live_session,
    new_vm_pool,
    pool_name,
    seconds,
    size,
    vm_name,
    whole,
)
from vgpu.admin_client import AdminClient
from vgpu.admin_faults import (
    clear_quarantine,
    faults,
    faults_options,
    quarantine,
    quarantine_options,
    quarantine_words,
    quarantines,
    quarantines_options,
    rule_options,
    set_rule,
    show_cleared,
    show_faults,
    show_quarantine,
    show_quarantines,
    show_rule,
)
from vgpu.time_shares import in_words
from vgpu.units import parse_size, show_seconds, show_size, show_table
from vgpu.vm_recipes import libvirt_text, qemu_arguments, qemu_text

VARIANTS = {"pci": "conventional", "pcie": "express"}
DEFAULT_BAR1 = "256MiB"


@attrs.frozen
class Command:
    """A row. ``ask`` may raise NotDone; ``options`` adds arguments to the command's own parser."""

    name: str
    help: str
    ask: Callable[[AdminClient, argparse.Namespace], Any]
    show: Callable[[Any], str]
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    run: Callable[[argparse.Namespace], int] | None = (
        None  # instead of all that: does it itself, is the exit status
    )
    is_good: Callable[[Any], bool] = lambda answer: True  # else the exit status is 1


# -- VMs


def _overcommit_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overcommit",
        action="store_true",
        help="promise the memory even if all promises together are more than there is",
    )


def _limit_options(parser: argparse.ArgumentParser) -> None:
    """What all processes of a VM together may keep from the host. Only what is said is sent."""
    parser.add_argument(
        "--max-sessions", type=whole, metavar="N", help="processes at a time, 1 to 254 (default 64)"
    )
    parser.add_argument(
        "--max-arena",
        type=size,
        metavar="SIZE",
        help="pinned memory shared with the host (default 64GiB, 0: no limit)",
    )
    parser.add_argument(
        "--max-modules", type=whole, metavar="N", help="loaded modules (default 65536, 0: no limit)"
    )
    parser.add_argument(
        "--max-handles",
        type=whole,
        metavar="N",
        help="streams, events, functions … (default 4194304, 0: no limit)",
    )


def _limits_said(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "session_limit": options.max_sessions,
        "arena_limit_bytes": options.max_arena,
        "module_limit": options.max_modules,
        "handle_limit": options.max_handles,
    }


def _register_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vm-name", required=True, metavar="NAME", help="how it is called from now on")
    new_vm_pool(parser)
    parser.add_argument("--priority", choices=("high", "medium", "low"), help="default medium")
    parser.add_argument(
        "--weight", type=whole, help="its share of the GPU against others', 1 to 1000 (default 50)"
    )
    parser.add_argument(
        "--memory", type=size, metavar="SIZE", help="GPU memory it may use (default: the whole card)"
    )
    parser.add_argument("--rate", type=whole, metavar="N", help="CUDA calls a second (default: no limit)")
    parser.add_argument(
        "--queue-depth",
        type=whole,
        metavar="N",
        help="calls that may wait to be executed (default: no limit)",
    )
    parser.add_argument(
        "--bytes-per-second",
        type=size,
        metavar="SIZE",
        help="copied between its memory and the GPU's (default: no limit)",
    )
    _overcommit_option(parser)
    _limit_options(parser)
    parser.add_argument(
        "--watchdog", type=seconds, metavar="TIME", help="how long a kernel may run (default 30s)"
    )
    parser.add_argument(
        "--bar1",
        type=size,
        metavar="SIZE",
        help=f"memory shared with the VM, a power of two from 16MiB to 64GiB (default {DEFAULT_BAR1})",
    )
    parser.add_argument(
        "--slots",
        type=whole,
        metavar="N",
        help="processes that may use the GPU at a time, 1 to 127 (default 8)",
    )
    parser.add_argument(
        "--bus", choices=tuple(VARIANTS), default="pci", help="pcie for the machine type q35 (default pci)"
    )
    parser.add_argument(
        "--kernel-addr",
        metavar="SLOT",
        help="where the VM's kernel finds it on its bus, 0x0 to 0x1f: 0x5 is 00:05.0 (default 0x5)",
    )
    parser.add_argument(
        "--no-device", action="store_true", help="limits only, for programs on this host (vgpu-run --vm NAME)"
    )


def _register(client: AdminClient, options: argparse.Namespace) -> Any:
    if options.no_device and options.bar1 is not None:
        raise WrongUse(
            "--bar1 is memory of the VM's device, and --no-device registers it without one; leave one out"
        )
    asked = {
        "vm_name": options.vm_name,
        "pool": options.pool,
        "priority": options.priority,
        "weight": options.weight,
        "memory_limit_bytes": options.memory,
        "rate": options.rate,
        "queue_depth": options.queue_depth,
        "bytes_per_second": options.bytes_per_second,
        "overcommit": options.overcommit,
        **_limits_said(options),
        "watchdog_seconds": options.watchdog,
        "bar1_bytes": 0 if options.no_device else options.bar1 or parse_size(DEFAULT_BAR1),
        "slots": options.slots,
        "variant": VARIANTS[options.bus],
        "address": options.kernel_addr,
    }
    answer = client.ask("register_vm", **{name: value for name, value in asked.items() if value is not None})
    described = _with_recipe(answer["vm"], answer["device"])
    device = answer["device"]
    found = [one for one in client.ask("quarantines") if one["vm"] == options.vm_name]
    described["quarantine"] = found[0] if found else None
    if device is not None and not device["running"]:
        raise NotDone(
            f"VM {options.vm_name} is registered, but its device does not run: {device['trouble']}\n"
            f"It is tried again; vgpu-admin show-vm --vm-name={options.vm_name} says how it is"
        )
    return described


def _with_recipe(vm: dict[str, Any], device: dict[str, Any] | None) -> dict[str, Any]:
    described: dict[str, Any] = {"vm": vm, "device": device}
    if device is not None:
        arguments = qemu_arguments(device["socket"], vm["variant"], vm["address"])
        described |= {"qemu": arguments, "libvirt": libvirt_text(arguments)}
    return described


def _show_registered(answer: Any) -> str:
    name = answer["vm"]["name"]
    warning = ""
    if answer["quarantine"] is not None:
        warning = f"\nIt is still {quarantine_words(answer['quarantine'])};\nvgpu-admin clear-quarantine --vm-name={name} lets it have the GPU"
    if answer["device"] is None:
        return f"VM {name} is registered, without a device: vgpu-run --vm {name} PROGRAM runs in it{warning}"
    pid = answer["device"]["pid"]
    return f"VM {name} is registered, and its device runs (process {pid}).{warning}\n\n{_recipe(answer)}"


def _recipe(answer: dict[str, Any]) -> str:
    return (
        f"Start QEMU (10.1 or later) with\n\n{_indent(qemu_text(answer['qemu']))}\n\n"
        f"or give a libvirt domain, with virsh edit, the lines\n\n{_indent(answer['libvirt'])}"
    )


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _unregister(client: AdminClient, options: argparse.Namespace) -> Any:
    return client.ask("unregister_vm", vm_name=options.vm_name)


def _show_unregistered(answer: Any) -> str:
    rest = "; a QEMU was connected, whose guest has lost its GPU" if answer["was_connected"] else ""
    return f"VM {answer['vm']} is not registered any more{rest}"


def _vms(client: AdminClient, options: argparse.Namespace) -> Any:
    devices = {device["vm"]: device for device in client.ask("devices")}
    quarantines = {quarantine["vm"]: quarantine for quarantine in client.ask("quarantines")}
    sessions = [s for s in client.ask("sessions") if not s["ended"]]
    return [
        {
            "vm": vm,
            "device": devices.get(vm["name"]),
            "quarantine": quarantines.get(vm["name"]),
            "sessions": [s for s in sessions if s["info"]["vm"] == vm["name"]],
        }
        for vm in client.ask("vms")
    ]


def _device_word(device: dict[str, Any] | None) -> str:
    if device is None:
        return "-"
    if not device["running"]:
        return "not running"
    return "in use" if device["connected"] else "waits for QEMU"


def _memory_word(vm: dict[str, Any]) -> str:
    return show_size(vm["memory_limit_bytes"]) if vm["memory_limit_bytes"] else "all"


def _show_vms(answer: Any) -> str:
    rows: list[tuple[object, ...]] = []
    for entry in answer:
        vm = entry["vm"]
        name = vm["name"] + (" (ad hoc)" if vm["ad_hoc"] else "")
        row = (name, vm["pool"], vm["priority"], vm["weight"], _memory_word(vm))
        state = "quarantined" if entry["quarantine"] else "-"
        rows.append((*row, len(entry["sessions"]), _device_word(entry["device"]), state))
    text = show_table(("VM", "POOL", "PRIORITY", "WEIGHT", "MEMORY", "SESSIONS", "DEVICE", "STATE"), rows)
    kept_away = [f"{e['vm']['name']}: {quarantine_words(e['quarantine'])}" for e in answer if e["quarantine"]]
    return "\n".join((text, "", *kept_away)) if kept_away else text


def _vm(client: AdminClient, options: argparse.Namespace) -> Any:
    for entry in _vms(client, options):
        if entry["vm"]["name"] == options.vm_name:
            accounts = [a for a in client.ask("accounts") if a["vm"] == options.vm_name]
            account = accounts[0] if accounts else None
            return {
                **_with_recipe(entry["vm"], entry["device"]),
                "quarantine": entry["quarantine"],
                "sessions": entry["sessions"],
                "account": account,
            }
    raise NotDone(f"no VM {options.vm_name!r}; vgpu-admin list-vms has those there are")


def _show_vm(answer: Any) -> str:
    vm, device = answer["vm"], answer["device"]
    lines = [
        ("name", vm["name"] + (" (ad hoc)" if vm["ad_hoc"] else "")),
        ("pool", vm["pool"]),
        ("priority", vm["priority"]),
        ("weight", vm["weight"]),
        ("memory", _memory_word(vm)),
        ("rate", f"{vm['rate']} calls a second" if vm["rate"] else "no limit"),
        ("queue depth", vm["queue_depth"] or "no limit"),
        ("copies", f"{show_size(vm['bytes_per_second'])} a second" if vm["bytes_per_second"] else "no limit"),
        ("sessions", f"{len(answer['sessions'])} of {vm['session_limit']}"),
        ("arena", show_size(vm["arena_limit_bytes"]) if vm["arena_limit_bytes"] else "no limit"),
        ("modules", vm["module_limit"] or "no limit"),
        ("handles", vm["handle_limit"] or "no limit"),
        ("watchdog", show_seconds(vm["watchdog_seconds"])),
        ("device", _device_word(device)),
    ]
    if answer["quarantine"] is not None:
        lines.insert(1, ("state", quarantine_words(answer["quarantine"])))
    if device is not None and device["running"]:
        shape = f"{show_size(device['bar1_bytes'])}, {device['slots']} slots, {device['claimed']} in use"
        lines += [("process", device["pid"]), ("BAR1", shape), ("socket", device["socket"])]
    elif device is not None:
        lines.append(("trouble", device["trouble"]))
    if answer["account"] is not None:
        lines += _account_lines(answer["account"])
    if answer["sessions"]:
        lines.append(("time", f"{in_words(answer['sessions'])} (as its programs say)"))
    text = "\n".join(f"{name:<12} {value}" for name, value in lines)
    if answer["sessions"]:
        text += f"\n\n{_show_sessions(answer['sessions'])}"
    return f"{text}\n\n{_recipe(answer)}" if device is not None else text


def _account_lines(account: dict[str, Any]) -> list[tuple[str, object]]:
    used = account["used"]
    held = f"{account['held_back']} times, {show_seconds(account['held_back_ns'] / 1e9)}"
    refused = sum(account["refused"].values()) + account["sessions_refused"]
    return [
        ("in use", f"{show_size(used['memory'])}, {used['modules']} modules, {used['handles']} handles"),
        ("held back", f"now; {held} in all" if account["is_held_back"] else held),
        ("refused", f"{refused} times for want of room"),
    ]


# -- changing a VM that is registered


def _change(client: AdminClient, options: argparse.Namespace, **changes: Any) -> Any:
    said = {name: value for name, value in changes.items() if value is not None}
    if not said:
        raise WrongUse("nothing to change was named; --help says what can be")
    return client.ask("change_vm", vm_name=options.vm_name, **said)["vm"]


def _weight_options(parser: argparse.ArgumentParser) -> None:
    vm_name(parser)
    parser.add_argument("--weight", type=whole, required=True, metavar="N", help="1 to 1000")


def _set_weight(client: AdminClient, options: argparse.Namespace) -> Any:
    return _change(client, options, weight=options.weight)


def _priority_options(parser: argparse.ArgumentParser) -> None:
    vm_name(parser)
    parser.add_argument(
        "--priority",
        choices=("high", "medium", "low"),
        required=True,
        help="high goes ahead of medium and low",
    )


def _set_priority(client: AdminClient, options: argparse.Namespace) -> Any:
    return _change(client, options, priority=options.priority)


def _rate_options(parser: argparse.ArgumentParser) -> None:
    vm_name(parser)
    parser.add_argument(
        "--rate",
        type=whole,
        metavar="N",
        help="CUDA calls a second, with a burst of one second; 0: no limit",
    )
    parser.add_argument(
        "--queue-depth", type=whole, metavar="N", help="calls accepted and not yet executed; 0: no limit"
    )
    parser.add_argument(
        "--bytes-per-second",
        type=size,
        metavar="SIZE",
        help="copied between its memory and the GPU's, with a burst of one second; 0: no limit",
    )


def _set_rate(client: AdminClient, options: argparse.Namespace) -> Any:
    return _change(
        client,
        options,
        rate=options.rate,
        queue_depth=options.queue_depth,
        bytes_per_second=options.bytes_per_second,
    )


def _memory_options(parser: argparse.ArgumentParser) -> None:
    vm_name(parser)
    parser.add_argument(
        "--memory", type=size, required=True, metavar="SIZE", help="GPU memory it may use; 0: the whole card"
    )
    _overcommit_option(parser)


def _set_memory(client: AdminClient, options: argparse.Namespace) -> Any:
    return _change(client, options, memory_limit_bytes=options.memory, overcommit=options.overcommit)


def _pool_options(parser: argparse.ArgumentParser) -> None:
    vm_name(parser)
    pool_name(parser)


def _set_pool(client: AdminClient, options: argparse.Namespace) -> Any:
    return _change(client, options, pool=options.pool)


def _set_limits_options(parser: argparse.ArgumentParser) -> None:
    vm_name(parser)
    _limit_options(parser)


def _set_limits(client: AdminClient, options: argparse.Namespace) -> Any:
    return _change(client, options, **_limits_said(options))


def _watchdog_options(parser: argparse.ArgumentParser) -> None:
    vm_name(parser)
    parser.add_argument(
        "--watchdog",
        type=seconds,
        required=True,
        metavar="TIME",
        help="how long a kernel or a call may take; one that has taken longer already is ended at once",
    )


def _set_watchdog(client: AdminClient, options: argparse.Namespace) -> Any:
    return _change(client, options, watchdog_seconds=options.watchdog)


def _show_watchdog(vm: Any) -> str:
    return f"VM {vm['name']}: a kernel may run for {show_seconds(vm['watchdog_seconds'])}"


def _show_changed(vm: Any) -> str:
    rate = f"{vm['rate']} calls a second" if vm["rate"] else "any rate"
    arena = show_size(vm["arena_limit_bytes"]) if vm["arena_limit_bytes"] else "any"
    copies = (
        f"{show_size(vm['bytes_per_second'])} copied a second" if vm["bytes_per_second"] else "any copies"
    )
    return (
        f"VM {vm['name']}: pool {vm['pool']}, priority {vm['priority']}, weight {vm['weight']},"
        f" memory {_memory_word(vm)}, {rate}, queue depth {vm['queue_depth'] or 'any'}, {copies},"
        f" sessions {vm['session_limit']}, arena {arena}, modules {vm['module_limit'] or 'any'},"
        f" handles {vm['handle_limit'] or 'any'}"
    )


# -- pools


def _new_pool_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pool", required=True, metavar="NAME", help="how it is called")
    parser.add_argument(
        "--weight", type=whole, metavar="N", help="its share against other pools', 1 to 1000 (default 100)"
    )


def _create_pool(client: AdminClient, options: argparse.Namespace) -> Any:
    said = {} if options.weight is None else {"weight": options.weight}
    return client.ask("create_pool", pool=options.pool, **said)


def _delete_pool(client: AdminClient, options: argparse.Namespace) -> Any:
    return client.ask("delete_pool", pool=options.pool)


def _show_deleted_pool(pool: Any) -> str:
    return f"pool {pool['name']} is not there any more"


def _pool_weight_options(parser: argparse.ArgumentParser) -> None:
    pool_name(parser)
    parser.add_argument("--weight", type=whole, required=True, metavar="N", help="1 to 1000")


def _set_pool_weight(client: AdminClient, options: argparse.Namespace) -> Any:
    return client.ask("set_pool_weight", pool=options.pool, weight=options.weight)


def _show_pool(pool: Any) -> str:
    return f"pool {pool['name']} has weight {pool['weight']}"


def _pools(client: AdminClient, options: argparse.Namespace) -> Any:
    return client.ask("pools")


def _show_pools(answer: Any) -> str:
    rows: list[tuple[object, ...]] = [
        (pool["name"], pool["weight"], ", ".join(pool["vms"]) or "-") for pool in answer
    ]
    return show_table(("POOL", "WEIGHT", "VMS"), rows)


# -- sessions


def _sessions(client: AdminClient, options: argparse.Namespace) -> Any:
    return [s for s in client.ask("sessions") if options.all or not s["ended"]]


def _sessions_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="those that ended lately, too")


def _show_sessions(answer: Any) -> str:
    rows: list[tuple[object, ...]] = []
    for sample in answer:
        info, grant = sample["info"], sample["grant"]
        rows.append(
            (
                info["session"],
                info["vm"],
                "-" if info["slot"] is None else str(info["slot"]),
                info["guest_pid"],
                info["program"] or "-",
                info["worker_pid"],
                show_size(grant["memory_used_bytes"]),
                grant["records"],
                show_seconds(grant["gpu_ns"] / 1e9),
                sample["ended"] or "lives",
            )
        )
    header = ("SESSION", "VM", "SLOT", "PID", "PROGRAM", "WORKER", "MEMORY", "CALLS", "GPU TIME", "STATE")
    return show_table(header, rows)


def _kill(client: AdminClient, options: argparse.Namespace) -> Any:
    return client.ask("kill_session", session=options.session)


# -- the mediator


def _health(client: AdminClient, options: argparse.Namespace) -> Any:
    devices = client.ask("devices")
    return {
        **client.ask("health"),
        "sessions": len([s for s in client.ask("sessions") if not s["ended"]]),
        "vms": len(client.ask("vms")),
        "vm_devices": len(devices),
        "vm_devices_down": [device["vm"] for device in devices if not device["running"]],
    }


def _show_fields(answer: Any) -> str:
    def word(value: object) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)

    width = max(map(len, answer))
    return "\n".join(f"{name.replace('_', ' '):<{width}}  {word(value)}" for name, value in answer.items())


def _tree(client: AdminClient, options: argparse.Namespace) -> Any:
    return client.ask("tree")


def _show_tree(answer: Any) -> str:
    rows: list[tuple[object, ...]] = []

    def add(actors: list[dict[str, Any]], depth: int) -> None:
        for actor in actors:
            name = "  " * depth + actor["name"].rpartition("/")[2]
            waiting = actor["mailbox"]["depth"] if actor["mailbox"] else 0
            rows.append((name, actor["kind"], actor["state"], actor["restarts"], waiting))
            add(actor["children"], depth + 1)

    add(answer, 0)
    return show_table(("ACTOR", "KIND", "STATE", "RESTARTS", "WAITING"), rows)


COMMANDS: tuple[Command, ...] = (
    Command("register-vm", "keep a VM and start its GPU; prints what QEMU needs", _register, _show_registered, _register_options),
    Command("unregister-vm", "end a VM's GPU and sessions, and forget the VM", _unregister, _show_unregistered, vm_name),
    Command("list-vms", "all VMs", _vms, _show_vms),
    Command("show-vm", "all about one VM, and what QEMU needs", _vm, _show_vm, vm_name),
    Command("set-weight", "a VM's share of its pool, from now on", _set_weight, _show_changed, _weight_options),
    Command("set-priority", "who goes first within a pool", _set_priority, _show_changed, _priority_options),
    Command("set-rate-limit", "how many calls, and bytes, a VM may send", _set_rate, _show_changed, _rate_options),
    Command("set-memory", "GPU memory that a VM may use", _set_memory, _show_changed, _memory_options),
    Command("set-limits", "sessions, pinned memory, modules and handles of a VM", _set_limits, _show_changed, _set_limits_options),
    Command("set-watchdog", "how long a kernel of a VM may run", _set_watchdog, _show_watchdog, _watchdog_options),
    Command("set-pool", "move a VM to another pool", _set_pool, _show_changed, _pool_options),
    Command("create-pool", "make a pool of VMs", _create_pool, _show_pool, _new_pool_options),
    Command("list-pools", "all pools, and who is in them", _pools, _show_pools),
    Command("set-pool-weight", "a pool's share against other pools', from now on", _set_pool_weight, _show_pool, _pool_weight_options),
    Command("delete-pool", "forget a pool that no VM is in", _delete_pool, _show_deleted_pool, pool_name),
    Command("list-sessions", "programs that use the GPU", _sessions, _show_sessions, _sessions_options),
    Command("kill-session", "end one of them; its program sees a CUDA error", _kill, lambda a: f"session {a['session']} of {a['vm']} is ended", live_session),
    Command("show-health", "is the mediator well, and what does it serve; ends with 1 if it is not", _health, _show_fields, is_good=lambda a: bool(a["ok"])),
    Command("show-faults", "what programs did that ended in an error, newest first", faults, show_faults, faults_options),
    Command("quarantine", "end a VM's programs, and let no new ones have the GPU", quarantine, show_quarantine, quarantine_options),
    Command("clear-quarantine", "let a quarantined VM have the GPU again", clear_quarantine, show_cleared, vm_name),
    Command("list-quarantines", "VMs that are kept away, since when and why", quarantines, show_quarantines, quarantines_options),
    Command("set-quarantine-rule", "how many faults in what time quarantine a VM", set_rule, show_rule, rule_options),
    Command("tree", "the mediator's actors", _tree, _show_tree),
)  # fmt: skip
