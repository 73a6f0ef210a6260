# SPDX-License-Identifier: Apache-2.0
"""What a VM may be registered with: every value an administrator gives is checked here, once.

Pure: a mapping of JSON values in, a ``VmRecord`` out, or a sentence that names the value and says what is expected: in the
words of who typed it, an option of ``vgpu-admin`` and sizes with their units.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from vgpu.transport.names import NAME_RULE, is_name
from vgpu.transport.vfio_user.device import MAX_BAR1, MIN_BAR1, cut_bar1
from vgpu.transport.vfio_user.pci import Variant

from .messages import PoolRecord, VmRecord

# Slots of a PCI bus have five bits, functions of a slot three.
ADDRESS: Final = re.compile(r"0x[01]?[0-9a-f](\.[0-7])?")
PRIORITIES: Final = ("high", "medium", "low")
MAX_WEIGHT: Final = 1000
MAX_WATCHDOG_SECONDS: Final = 86400.0
MAX_NUMBER: Final = 1 << 62
MAX_RATE: Final = 1_000_000_000
MAX_DEPTH: Final = 1_000_000_000
MAX_SESSIONS: Final = 254  # entries of an account
# Smaller ones have no room for what a session needs beside its payloads.
MIN_SLOT: Final = 1 << 20

# What an administrator types for each parameter. A VM's name is --vm-name here and --vm there.
_OPTIONS: Final = {
    "vm_name": "the VM's name",
    "pool": "--pool",
    "priority": "--priority",
    "weight": "--weight",
    "memory_limit_bytes": "--memory",
    "watchdog_seconds": "--watchdog",
    "rate": "--rate",
    "queue_depth": "--queue-depth",
    "bar1_bytes": "--bar1",
    "slots": "--slots",
    "variant": "--bus",
    "address": "--kernel-addr",
    "bytes_per_second": "--bytes-per-second",
    "session_limit": "--max-sessions",
    "arena_limit_bytes": "--max-arena",
    "module_limit": "--max-modules",
    "handle_limit": "--max-handles",
}
_SIZES: Final = ("memory_limit_bytes", "bar1_bytes", "bytes_per_second", "arena_limit_bytes")


class BadVm(ValueError):
    """A VM cannot be registered with this value; the message names it."""


def _show_size(count: int) -> str:
    """Exactly, in the largest unit there is for that."""
    for power, unit in ((6, "EiB"), (5, "PiB"), (4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count and count % (1 << 10 * power) == 0:
            return f"{count >> 10 * power} {unit}"
    return f"{count} bytes"


def _bad(name: str, value: object, expected: str) -> BadVm:
    shown = repr(value)
    if name in _SIZES and type(value) is int:
        shown = _show_size(value)
    elif name == "watchdog_seconds" and isinstance(value, float):
        shown = f"{value:.10g} s"
    elif name == "watchdog_seconds" and type(value) is int:
        shown = f"{value} s"
    return BadVm(f"{_OPTIONS.get(name, name)} is {shown}, expected {expected}")


def check_name(name: object, what: str = "vm_name") -> str:
    """The name of a VM or a pool.

    Raises:
        BadVm: it is none.
    """
    if not isinstance(name, str) or not is_name(name):
        raise _bad(what, name, NAME_RULE)
    return name


def _number(values: Mapping[str, Any], name: str, default: int, least: int, most: int, expected: str) -> int:
    value = values.get(name, default)
    if type(value) is not int or not least <= value <= most:
        raise _bad(name, value, expected)
    return value


MOST: Final = _show_size(MAX_NUMBER)
BAR1_RULE: Final = f"a power of two from {_show_size(MIN_BAR1)} to {_show_size(MAX_BAR1)}"


def vm_from(values: Mapping[str, Any]) -> VmRecord:
    """The VM that these parameters of ``register_vm`` describe; what is not said has its default.

    Raises:
        BadVm: an unknown parameter, a value that cannot be meant, or a BAR1 that cannot be cut so.
    """
    unknown = set(values) - set(_PARAMETERS)
    if unknown:
        raise BadVm(f"unknown parameters {sorted(unknown)}; known are {', '.join(_PARAMETERS)}")
    default = VmRecord("default")
    priority = values.get("priority", default.priority)
    if priority not in PRIORITIES:
        raise _bad("priority", priority, ", ".join(PRIORITIES))
    watchdog = values.get("watchdog_seconds", default.watchdog_seconds)
    if type(watchdog) not in (int, float) or not 0 < watchdog <= MAX_WATCHDOG_SECONDS:
        raise _bad("watchdog_seconds", watchdog, "more than 0 and at most a day")
    variant = values.get("variant", default.variant)
    if variant not in [member.value for member in Variant]:
        raise _bad("variant", variant, "pci (conventional) or pcie (express)")
    address = values.get("address", default.address)
    if not isinstance(address, str) or not ADDRESS.fullmatch(address):
        raise _bad(
            "address", address, "a PCI slot from 0x0 to 0x1f like 0x5, or one with a function like 0x5.1"
        )
    bar1_bytes = _number(values, "bar1_bytes", 0, 0, MAX_BAR1, BAR1_RULE)
    slots = _number(values, "slots", default.slots, 1, 127, "1 to 127")
    if bar1_bytes:
        _check_bar1(bar1_bytes, slots)
    return VmRecord(
        check_name(values.get("vm_name")),
        pool=check_name(values.get("pool", default.pool), "pool"),
        priority=priority,
        weight=_number(values, "weight", default.weight, 1, MAX_WEIGHT, f"1 to {MAX_WEIGHT}"),
        memory_limit_bytes=_number(
            values, "memory_limit_bytes", 0, 0, MAX_NUMBER, f"up to {MOST}, 0 for the whole card"
        ),
        watchdog_seconds=float(watchdog),
        rate=_number(values, "rate", 0, 0, MAX_RATE, "calls a second up to 1000000000, 0 for no limit"),
        queue_depth=_number(values, "queue_depth", 0, 0, MAX_DEPTH, "calls up to 1000000000, 0 for no limit"),
        bar1_bytes=bar1_bytes,
        slots=slots,
        variant=variant,
        address=address,
        bytes_per_second=_number(
            values, "bytes_per_second", 0, 0, MAX_NUMBER, f"up to {MOST} a second, 0 for no limit"
        ),
        session_limit=_number(
            values,
            "session_limit",
            max(default.session_limit, slots),
            1,
            MAX_SESSIONS,
            f"1 to {MAX_SESSIONS}",
        ),
        arena_limit_bytes=_number(
            values,
            "arena_limit_bytes",
            default.arena_limit_bytes,
            0,
            MAX_NUMBER,
            f"up to {MOST}, 0 for no limit",
        ),
        module_limit=_number(
            values, "module_limit", default.module_limit, 0, MAX_NUMBER, "modules, 0 for no limit"
        ),
        handle_limit=_number(
            values, "handle_limit", default.handle_limit, 0, MAX_NUMBER, "handles, 0 for no limit"
        ),
    )


CHANGEABLE: Final = (
    "pool",
    "priority",
    "weight",
    "memory_limit_bytes",
    "watchdog_seconds",
    "rate",
    "queue_depth",
    "bytes_per_second",
    "session_limit",
    "arena_limit_bytes",
    "module_limit",
    "handle_limit",
)


def changes_from(values: Mapping[str, Any]) -> dict[str, object]:
    """What these parameters of ``change_vm``, without ``vm_name``, change of a VM that is running.

    Raises:
        BadVm: nothing, something that cannot be changed, or a value that cannot be meant.
    """
    unknown = set(values) - set(CHANGEABLE)
    if unknown or not values:
        raise BadVm(f"expected some of {', '.join(CHANGEABLE)} to change, not {sorted(unknown) or 'nothing'}")
    checked = vm_from({"vm_name": "any", **values})
    return {name: getattr(checked, name) for name in values}


def pool_from(values: Mapping[str, Any]) -> PoolRecord:
    """The pool that these parameters (``pool``, ``weight``) describe.

    Raises:
        BadVm: something else, or a value that cannot be meant.
    """
    unknown = set(values) - {"pool", "weight"}
    if unknown:
        raise BadVm(f"unknown parameters {sorted(unknown)}; known are pool, weight")
    default = PoolRecord("default").weight
    return PoolRecord(
        check_name(values.get("pool"), "pool"),
        _number(values, "weight", default, 1, MAX_WEIGHT, f"1 to {MAX_WEIGHT}"),
    )


def _check_bar1(size: int, slots: int) -> None:
    if size & (size - 1) or not MIN_BAR1 <= size <= MAX_BAR1:
        raise _bad("bar1_bytes", size, BAR1_RULE)
    room = cut_bar1(size, slots).slot_size
    if room < MIN_SLOT:
        raise BadVm(
            f"{slots} slots in a BAR1 of {size >> 20} MiB have {room >> 10} KiB each, expected 1 MiB or more:"
            " a smaller --slots, or a larger --bar1"
        )


_PARAMETERS: Final = (
    "vm_name",
    "pool",
    "priority",
    "weight",
    "memory_limit_bytes",
    "watchdog_seconds",
    "rate",
    "queue_depth",
    "bar1_bytes",
    "slots",
    "variant",
    "address",
    "bytes_per_second",
    "session_limit",
    "arena_limit_bytes",
    "module_limit",
    "handle_limit",
)
