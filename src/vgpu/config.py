# SPDX-License-Identifier: Apache-2.0
"""The mediator's settings: command line over environment over configuration file over defaults.

The file is TOML with one table, ``[mediator]``, whose keys are the long options with underscores. An
unknown key, a value of the wrong kind or one that is out of range is refused with the file's name, the key and the line.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs

GPU_CHOICES = ("auto", "nvidia", "software")
QUARANTINE_KINDS = ("hang", "protocol", "crash", "kernel")
MOST_STARTS = 1_000_000
MOST_DAYS = 36500
MOST_ROWS = 10_000_000
# The number behind it is no group's: chown takes it for "leave it as it is".
MAX_GROUP = 0xFFFFFFFE
MAX_GROUP_DIGITS = 10
MOST_SHOWN = 80  # of a line that is not TOML
LOG_LEVELS = ("debug", "info", "warning", "error")
# What a running mediator can take over; the rest is said to need a restart.
LIVE: Final = ("warm_workers", "quantum_ms", "log_level", "log_format", "metrics", "socket_group")


class ConfigError(ValueError):
    """A setting that cannot be meant; the message names the key, and file and line where it stands in one."""

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key


class FileValues(dict[str, Any]):
    """Values of a configuration file that know where they stand."""

    def __init__(self, values: Mapping[str, Any], path: Path, text: str) -> None:
        super().__init__(values)
        self.path = path
        self._text = text

    def place(self, key: str) -> str:
        """``FILE, line N`` of a key."""
        return f"{self.path}, line {line_of(self._text, 'mediator', key)}"


@attrs.frozen
class Settings:
    """What run-mediator runs with."""

    gpu: str = "auto"
    devices: tuple[int, ...] = (0,)
    run_dir: Path = Path("/var/vgpu")
    state_dir: Path = Path("/var/lib/vgpu")
    library: Path | None = None
    warm_workers: int = 1
    quantum_ms: float = 2.0
    log_level: str = "info"
    log_format: str = "text"
    metrics: tuple[str, int] | None = None
    quarantine_faults: int = 3  # so many in quarantine_seconds quarantine a VM; 0: never
    quarantine_seconds: float = 600.0
    quarantine_counts: tuple[str, ...] = ("hang", "protocol", "crash")
    # How many sessions each VM may start a second, 0: any number; and how many at once after a rest.
    session_starts_per_second: float = 50.0
    session_starts_burst: int = 200
    # What the ledger keeps of sessions that have ended, and of faults.
    ledger_days: float = 30.0
    ledger_sessions: int = 10_000
    ledger_faults_per_vm: int = 1000
    ledger_faults: int = 20_000
    socket_group: str = ""  # who besides the mediator's user may connect a QEMU; "": nobody
    # The file of each value that one said, and nobody above it. Not a setting, but where settings come from.
    said_in: Mapping[str, FileValues] = attrs.field(factory=dict, eq=False, repr=False)

    def blame(self, error: ConfigError) -> ConfigError:
        """An error that came out later, with file and line where the value it is about stands in a file."""
        return _with_place(error, self.said_in.get(error.key))


_KINDS: dict[str, tuple[type, ...]] = {
    "gpu": (str,),
    "devices": (list,),
    "run_dir": (str,),
    "state_dir": (str,),
    "library": (str,),
    "warm_workers": (int,),
    "quantum_ms": (int, float),
    "log_level": (str,),
    "log_format": (str,),
    "metrics": (str,),
    "quarantine_faults": (int,),
    "quarantine_seconds": (int, float),
    "quarantine_counts": (list,),
    "session_starts_per_second": (int, float),
    "session_starts_burst": (int,),
    "ledger_days": (int, float),
    "ledger_sessions": (int,),
    "ledger_faults_per_vm": (int,),
    "ledger_faults": (int,),
    "socket_group": (str,),
}


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``; an IPv6 address stands in brackets, as in ``[::1]:9400``.

    Raises:
        ConfigError: it is something else; the message shows what is expected.
    """
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    good_host = bool(host) and host.isprintable() and not set(host) & set(" []/@")
    if not colon or not good_host or bracketed is not (":" in host):
        raise ConfigError(
            f"metrics is {text!r}, expected HOST:PORT like 127.0.0.1:9400 or [::1]:9400", "metrics"
        )
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise ConfigError(
            f"metrics is {text!r}: the port {port!r} is not a number from 0 to 65535", "metrics"
        )
    return host, int(port)


def line_of(text: str, table: str, key: str | None = None) -> int:
    """The line, from 1, where a key of a table begins, or the table itself; 0 where a valid text has it not.

    The parser tells no places, so it is asked: the key begins behind the last lines that are a whole file without it.
    """
    lines = text.splitlines(keepends=True)
    whole = 0
    for count in range(1, len(lines) + 1):
        try:
            found = tomllib.loads("".join(lines[:count])).get(table)
        except tomllib.TOMLDecodeError:
            continue  # in the middle of a value of several lines
        if found is not None and (key is None or (isinstance(found, dict) and key in found)):
            return whole + 1
        whole = count
    return 0


def read_file(path: Path) -> FileValues:
    """Values of a configuration file.

    Raises:
        ConfigError: not to be read, not TOML, an unknown key, or a value of the wrong kind.
    """
    try:
        data = path.read_bytes()
        text = data.decode()
        document = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {line}: this is not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}, {_syntax_error(text, str(error))}") from None
    for name in document:
        if name != "mediator":
            line = line_of(text, name)
            if isinstance(document[name], dict):
                raise ConfigError(
                    f"{path}, line {line}: unknown table [{name}]; settings stand in [mediator]", name
                )
            raise ConfigError(f"{path}, line {line}: {name} stands before [mediator], not in it", name)
    values = document.get("mediator", {})
    if not isinstance(values, dict):
        line = line_of(text, "mediator")
        raise ConfigError(f"{path}, line {line}: mediator is {values!r}, expected the table [mediator]")
    known = FileValues(values, path, text)
    for key, value in values.items():
        if key not in _KINDS:
            names = ", ".join(sorted(_KINDS))
            raise ConfigError(f"{known.place(key)}: unknown key {key!r}; known are {names}", key)
        if not isinstance(value, _KINDS[key]) or isinstance(value, bool):
            names = " or ".join(k.__name__ for k in _KINDS[key])
            raise ConfigError(f"{known.place(key)}: {key} is {value!r}, expected {names}", key)
    return known


def _syntax_error(text: str, message: str) -> str:
    """What the parser says, with the line that it says it of."""
    what, _, place = message.rpartition(" (at ")
    lines = text.removesuffix("\n").split("\n")
    found = re.match(r"line (\d+), column (\d+)", place)
    # Without a place it says: end of document.
    line, column = (int(found[1]), int(found[2])) if found else (len(lines), 0)
    shown = lines[line - 1]
    begin = max(column - MOST_SHOWN // 2, 0) if len(shown) > MOST_SHOWN else 0
    cut = shown[begin : begin + MOST_SHOWN].strip()
    if begin:
        cut = f"...{cut}"
    if begin + MOST_SHOWN < len(shown):
        cut = f"{cut}..."
    return f"line {line}: {what}: {cut!r}" if cut else f"line {line}: {what}"


def make_settings(defaults: Settings, *layers: Mapping[str, Any]) -> Settings:
    """Lay values over defaults, later layers winning; None means "not said".

    Raises:
        ConfigError: a value is out of range; one of a file's is named with its line.
    """
    merged: dict[str, Any] = {}
    said_by: dict[str, Mapping[str, Any]] = {}
    for layer in layers:
        for key, value in layer.items():
            if value is not None:
                merged[key], said_by[key] = value, layer
    try:
        settings = _checked(defaults, merged)
        files = {key: layer for key, layer in said_by.items() if isinstance(layer, FileValues)}
        return attrs.evolve(settings, said_in=files)
    except ConfigError as error:
        raise _with_place(error, said_by.get(error.key)) from None


def _with_place(error: ConfigError, source: Mapping[str, Any] | None) -> ConfigError:
    if not isinstance(source, FileValues):
        return error
    return ConfigError(f"{source.place(error.key)}: {error}", error.key)


def _checked(defaults: Settings, merged: dict[str, Any]) -> Settings:
    for key in ("run_dir", "state_dir", "library"):
        if key in merged:
            # A folder's name may be anything but this, and nothing that is empty is meant.
            if not str(merged[key]) or "\0" in str(merged[key]):
                raise ConfigError(f"{key} is {str(merged[key])!r}, expected a path", key)
            # Workers, devices and QEMUs are told it, and may be in other folders.
            merged[key] = Path(merged[key]).absolute()
    if "metrics" in merged:
        merged["metrics"] = parse_address(merged["metrics"]) if merged["metrics"] else None
    if "devices" in merged:
        merged["devices"] = tuple(merged["devices"])
    if "quarantine_counts" in merged:
        merged["quarantine_counts"] = tuple(merged["quarantine_counts"])
    settings = attrs.evolve(defaults, **merged)
    checks = (
        ("gpu", settings.gpu in GPU_CHOICES, " or ".join(GPU_CHOICES)),
        ("devices", _are_devices(settings.devices), "device numbers, each once"),
        ("quarantine_faults", 0 <= settings.quarantine_faults <= 1000, "0 to 1000"),
        ("quarantine_seconds", 0 < settings.quarantine_seconds <= 30 * 86400, "more than 0, at most 30 days"),
        (
            "quarantine_counts",
            all(kind in QUARANTINE_KINDS for kind in settings.quarantine_counts),
            f"some of {', '.join(QUARANTINE_KINDS)}",
        ),
        (
            "session_starts_per_second",
            0 <= settings.session_starts_per_second <= MOST_STARTS,
            f"0 (any number) to {MOST_STARTS}",
        ),
        ("session_starts_burst", 1 <= settings.session_starts_burst <= MOST_STARTS, f"1 to {MOST_STARTS}"),
        ("ledger_days", 0 < settings.ledger_days <= MOST_DAYS, f"more than 0, at most {MOST_DAYS}"),
        ("ledger_sessions", 0 <= settings.ledger_sessions <= MOST_ROWS, f"0 to {MOST_ROWS}"),
        ("ledger_faults_per_vm", 0 <= settings.ledger_faults_per_vm <= MOST_ROWS, f"0 to {MOST_ROWS}"),
        ("ledger_faults", 0 <= settings.ledger_faults <= MOST_ROWS, f"0 to {MOST_ROWS}"),
        ("warm_workers", 0 <= settings.warm_workers <= 64, "0 to 64"),
        ("quantum_ms", 0.1 <= settings.quantum_ms <= 1000, "0.1 to 1000"),
        ("log_level", settings.log_level in LOG_LEVELS, " or ".join(LOG_LEVELS)),
        ("log_format", settings.log_format in ("text", "json"), "text or json"),
    )
    for key, good, expected in checks:
        if not good:
            raise ConfigError(f"{key} is {getattr(settings, key)!r}, expected {expected}", key)
    if settings.socket_group:
        find_group(settings.socket_group)
    return settings


def find_group(name: str) -> int:
    """The number of a group of this host, by name or number.

    Raises:
        ConfigError: there is none of that name, or there can be none of that number.
    """
    import grp

    if name.isascii() and name.isdigit():
        if len(name) > MAX_GROUP_DIGITS or int(name) > MAX_GROUP:
            raise ConfigError(
                f"socket_group is {name!r}, expected a group's name, or its number up to {MAX_GROUP}",
                "socket_group",
            )
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):  # the second: no name at all, with a NUL in it
        raise ConfigError(f"socket_group is {name!r}, and there is no such group", "socket_group") from None


def _are_devices(devices: tuple[Any, ...]) -> bool:
    numbers = all(isinstance(d, int) and not isinstance(d, bool) and d >= 0 for d in devices)
    return bool(devices) and numbers and len(set(devices)) == len(devices)
