# SPDX-License-Identifier: Apache-2.0
"""The mediator's settings: command line over configuration file over defaults, read once.

The file is TOML with one table, ``[mediator]``, whose keys are the long options with underscores. An
unknown key or a value of the wrong kind is refused with the file's name and the key.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

GPU_CHOICES = ("auto", "nvidia", "software")
LOG_LEVELS = ("debug", "info", "warning", "error")


class ConfigError(ValueError):
    """The configuration file cannot be meant; the message names file and key."""


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
        raise ConfigError(f"metrics is {text!r}, expected HOST:PORT like 127.0.0.1:9400 or [::1]:9400")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise ConfigError(f"metrics is {text!r}: the port {port!r} is not a number from 0 to 65535")
    return host, int(port)


def read_file(path: Path) -> dict[str, Any]:
    """Values of a configuration file.

    Raises:
        ConfigError: not to be read, not TOML, an unknown key, or a value of the wrong kind.
    """
    try:
        document = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    for name in document:
        if name != "mediator":
            raise ConfigError(f"{path}: unknown table [{name}]; settings stand in [mediator]")
    values: dict[str, Any] = document.get("mediator", {})
    for key, value in values.items():
        if key not in _KINDS:
            raise ConfigError(f"{path}: unknown key {key!r}; known are {', '.join(sorted(_KINDS))}")
        if not isinstance(value, _KINDS[key]) or isinstance(value, bool):
            names = " or ".join(k.__name__ for k in _KINDS[key])
            raise ConfigError(f"{path}: {key} is {value!r}, expected {names}")
    return values


def make_settings(defaults: Settings, *layers: Mapping[str, Any]) -> Settings:
    """Lay values over defaults, later layers winning; None means "not said".

    Raises:
        ConfigError: a value is out of range.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged.update({k: v for k, v in layer.items() if v is not None})
    for key in ("run_dir", "state_dir", "library"):
        if key in merged:
            merged[key] = Path(merged[key])
    if "metrics" in merged:
        merged["metrics"] = parse_address(merged["metrics"])
    if "devices" in merged:
        merged["devices"] = tuple(merged["devices"])
    settings = attrs.evolve(defaults, **merged)
    checks = (
        ("gpu", settings.gpu in GPU_CHOICES, " or ".join(GPU_CHOICES)),
        ("devices", _are_devices(settings.devices), "device numbers, each once"),
        ("warm_workers", 0 <= settings.warm_workers <= 64, "0 to 64"),
        ("quantum_ms", 0.1 <= settings.quantum_ms <= 1000, "0.1 to 1000"),
        ("log_level", settings.log_level in LOG_LEVELS, " or ".join(LOG_LEVELS)),
        ("log_format", settings.log_format in ("text", "json"), "text or json"),
    )
    for key, good, expected in checks:
        if not good:
            raise ConfigError(f"{key} is {getattr(settings, key)!r}, expected {expected}")
    return settings


def _are_devices(devices: tuple[Any, ...]) -> bool:
    numbers = all(isinstance(d, int) and not isinstance(d, bool) and d >= 0 for d in devices)
    return bool(devices) and numbers and len(set(devices)) == len(devices)
