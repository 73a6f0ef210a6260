# SPDX-License-Identifier: Apache-2.0
"""Reading the configuration again while the mediator runs: by SIGHUP and by ``vgpu-admin reload``.

All or nothing: a file that cannot be meant, or an address that cannot be listened at, changes nothing and is reported. What
the command line said still wins. What a running mediator cannot change is named, and changes at its next start.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import trio

from vgpu.actors import ActorError, ActorSystem
from vgpu.actors.metrics import CannotServe, ServeMetrics
from vgpu.actors.scheduler import SetQuantum
from vgpu.actors.worker_pool import SetWarm
from vgpu.config import LIVE, ConfigError, Settings
from vgpu.logs import make_handler
from vgpu.mediator import LiveSettings

_log = logging.getLogger("vgpu.reload")

ANSWER_SECONDS = 10.0


class NotReloaded(ActorError):
    """Nothing has changed; the message says why."""


@attrs.frozen
class Reloaded:
    """What came of it. Settings by key, each with what it was and what it is to be."""

    changed: dict[str, dict[str, Any]]
    needs_restart: dict[str, dict[str, Any]]

    def __str__(self) -> str:
        def words(found: Mapping[str, Mapping[str, Any]]) -> str:
            return ", ".join(
                f"{key} from {about['was']!r} to {about['is']!r}" for key, about in found.items()
            )

        text = f"configuration read again: {words(self.changed) or 'nothing has changed'}"
        if self.needs_restart:
            text += f"; needs a restart: {words(self.needs_restart)}"
        return text


def live_settings(settings: Settings) -> LiveSettings:
    """What actors read of the settings whenever they begin."""
    live = LiveSettings()
    _set_live(live, settings)
    return live


def _set_live(live: LiveSettings, settings: Settings) -> None:
    live.metrics = settings.metrics
    live.warm_workers = settings.warm_workers
    live.quantum_ns = int(settings.quantum_ms * 1e6)
    live.socket_group = settings.socket_group


def start_logging(settings: Settings) -> None:
    """Log as the settings say, from now on."""
    root = logging.getLogger()
    handler = make_handler(settings.log_format, sys.stderr, os.environ)
    for old in [h for h in root.handlers if type(h) is logging.StreamHandler]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(settings.log_level.upper())


@attrs.define(eq=False)
class Reloader:
    """Knows what the mediator runs with and how to find out what it should. ``read`` may raise ConfigError."""

    settings: Settings
    read: Callable[[], Settings]
    live: LiveSettings
    gpus: tuple[str, ...]  # supervisors, one for each GPU
    _turn: trio.Lock = attrs.Factory(trio.Lock)

    async def reload(self, system: ActorSystem) -> Reloaded:
        """Read, and take over what can be.

        Raises:
            NotReloaded: the new settings cannot be had; nothing has changed.
        """
        async with self._turn:
            try:
                wanted = await trio.to_thread.run_sync(self.read)
            except ConfigError as error:
                raise self._refuse(str(error)) from error
            changed, needs_restart = self._differences(wanted)
            if "metrics" in changed:
                # The only one that can fail comes first.
                metrics = system.ref("mediator/metrics")
                try:
                    await metrics.ask(ServeMetrics(wanted.metrics), timeout_seconds=ANSWER_SECONDS)
                except CannotServe as error:
                    raise self._refuse(str(wanted.blame(ConfigError(str(error), "metrics")))) from error
                except ActorError as error:
                    raise self._refuse(str(error)) from error
            self.settings = attrs.evolve(self.settings, **{key: getattr(wanted, key) for key in LIVE})
            _set_live(self.live, self.settings)
            if {"log_level", "log_format"} & set(changed):
                start_logging(self.settings)
            for gpu in self.gpus:
                # One that is just being restarted reads the new value itself.
                if "quantum_ms" in changed and self.live.quantum_ns is not None:
                    await system.ref(f"{gpu}/scheduler").send(SetQuantum(self.live.quantum_ns))
                if "warm_workers" in changed:
                    await system.ref(f"{gpu}/workers").send(SetWarm(self.settings.warm_workers))
            done = Reloaded(changed, needs_restart)
            _log.info("%s", done)
            return done

    def _differences(self, wanted: Settings) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        changed: dict[str, dict[str, Any]] = {}
        needs_restart: dict[str, dict[str, Any]] = {}
        for field in attrs.fields(Settings):
            if not field.eq:
                continue  # where a setting comes from is none
            was, new = getattr(self.settings, field.name), getattr(wanted, field.name)
            if was != new:
                into = changed if field.name in LIVE else needs_restart
                into[field.name] = {"was": _plain(was), "is": _plain(new)}
        return changed, needs_restart

    @staticmethod
    def _refuse(why: str) -> NotReloaded:
        _log.error("configuration not reloaded, nothing has changed: %s", why)
        return NotReloaded(f"nothing has changed: {why}")


def _plain(value: Any) -> Any:
    """As JSON and people have it."""
    if isinstance(value, tuple):
        is_address = len(value) == 2 and isinstance(value[1], int) and isinstance(value[0], str)
        return f"{value[0]}:{value[1]}" if is_address else list(value)
    return value if isinstance(value, (str, int, float, type(None))) else str(value)
