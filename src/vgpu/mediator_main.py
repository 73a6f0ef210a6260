# SPDX-License-Identifier: Apache-2.0
"""``run-mediator``: the host daemon.

Ready means: sd_notify READY was sent (where systemd asked for it) and ``mediator.sock`` exists. SIGTERM
drains: nobody new is let in, and the daemon ends when the last session has. A second SIGTERM (or SIGINT)
stops at once: sessions end. SIGUSR1 ends the daemon and leaves its sessions to the next one, as a kill does. SIGHUP has it
read its configuration again.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import trio

from vgpu import __version__
from vgpu.actors import ActorError, ActorSystem, StartFailed, SystemFailed, TerminateChild
from vgpu.actors.fault_messages import QuarantineRule
from vgpu.actors.ledger_prune import Keeping
from vgpu.actors.messages import ListSessions
from vgpu.actors.metrics import CannotServe
from vgpu.actors.start_bucket import StartRate
from vgpu.completion import add_completion_option, complete_if_asked
from vgpu.config import GPU_CHOICES, LOG_LEVELS, ConfigError, Settings, make_settings, read_file
from vgpu.gpu.driver import DriverNotFound, Kind, choose
from vgpu.gpu.process import WorkerOptions, start_worker
from vgpu.holding import DirectoryTaken
from vgpu.mediator import GpuPlan, MediatorPlan, open_mediator
from vgpu.notify import keep_watchdog, notify, notify_reloading
from vgpu.paths import configuration_file, run_directory, state_directory
from vgpu.places_check import BadPlace, check_places
from vgpu.reload import NotReloaded, Reloader, live_settings, start_logging
from vgpu.standard_output import parse_arguments
from vgpu.transport._generated_calls import TABLE_HASH
from vgpu.transport.attach import LAYOUT_VERSION

_log = logging.getLogger("vgpu.mediator")

DRAIN_LOOK_SECONDS = 0.2
DRAIN_STOP_SECONDS = 15.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

EXAMPLES = """examples:
  run-mediator                               the real GPU if there is one, else the software GPU
  run-mediator --gpu software --run-dir /tmp/vgpu/run --state-dir /tmp/vgpu/state
  run-mediator --device 0,1                  two GPUs; a new session goes to the one with the fewest
  run-mediator --metrics 127.0.0.1:9400      Prometheus metrics at http://127.0.0.1:9400/metrics
  run-mediator --config /etc/vgpu/mediator.toml --log-format json

Settings come from the command line, then VGPU_RUN_DIR in place of --run-dir, then the configuration file,
then the defaults.
SIGTERM drains: no new sessions, and the end with the last one. A second one stops at once.
SIGHUP reads the configuration file again, as vgpu-admin reload does. SIGUSR1 ends at once and leaves the
sessions to the next mediator.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="run-mediator",
        description="Share this host's GPU among VMs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"run-mediator {__version__}")
    add_completion_option(parser)
    parser.add_argument(
        "--gpu",
        choices=GPU_CHOICES,
        help="auto: the real GPU if there is one, else the software GPU (default)",
    )
    parser.add_argument(
        "--device", metavar="N[,N...]", help="CUDA device numbers of the GPUs to share (default 0)"
    )
    parser.add_argument(
        "--run-dir", help="where the sockets go (default: /var/vgpu, for users $XDG_RUNTIME_DIR/vgpu)"
    )
    parser.add_argument(
        "--state-dir", help="where the ledger goes (default: /var/lib/vgpu, for users $XDG_STATE_HOME/vgpu)"
    )
    parser.add_argument("--config", type=Path, help="configuration file (TOML)")
    parser.add_argument("--library", help="path of the real libcuda.so.1 (default: looked for)")
    parser.add_argument("--warm-workers", type=int, help="worker processes kept ready (default 1)")
    parser.add_argument(
        "--quantum-ms", type=float, help="lease length while several sessions compete (default 2)"
    )
    parser.add_argument(
        "--metrics",
        metavar="HOST:PORT",
        help="serve Prometheus metrics at http://HOST:PORT/metrics (default: not)",
    )
    parser.add_argument(
        "--socket-group",
        metavar="GROUP",
        help="whose members' QEMUs may connect to VMs' devices, besides this user's (default: nobody's)",
    )
    parser.add_argument("--log-level", choices=LOG_LEVELS, help="default info")
    parser.add_argument("--log-format", choices=("text", "json"), help="default text")
    return parser


def configuration_path(arguments: Sequence[str] | None) -> Path:
    """The configuration file that is read, whether or not it exists."""
    return build_parser().parse_args(arguments).config or configuration_file(os.environ)


def read_settings(arguments: Sequence[str] | None) -> Settings:
    """Settings from command line, file and environment.

    Raises:
        ConfigError: a value that cannot be meant.
    """
    options = build_parser().parse_args(arguments)
    path = configuration_path(arguments)
    from_file = read_file(path) if options.config or path.exists() else {}
    devices: list[int] | None = None
    if options.device is not None:
        try:
            devices = [int(part) for part in options.device.split(",")]
        except ValueError:
            raise ConfigError(f"--device is {options.device!r}, expected numbers like 0 or 0,1") from None
    environment = {"run_dir": os.environ.get("VGPU_RUN_DIR") or None}
    line = {
        "gpu": options.gpu,
        "devices": devices,
        "run_dir": options.run_dir,
        "state_dir": options.state_dir,
        "library": options.library,
        "warm_workers": options.warm_workers,
        "quantum_ms": options.quantum_ms,
        "log_level": options.log_level,
        "log_format": options.log_format,
        "metrics": options.metrics,
        "socket_group": options.socket_group,
    }
    defaults = Settings(run_dir=run_directory(os.environ), state_dir=state_directory(os.environ))
    return make_settings(defaults, from_file, environment, line)


def make_plan(settings: Settings, read: Callable[[], Settings]) -> MediatorPlan:
    """What to run; ``read`` reads the settings again.

    Raises:
        DriverNotFound: a real GPU was asked for and there is none.
        ConfigError: devices that this kind of GPU does not have.
    """
    kind, library = choose(settings.gpu, settings.library)
    if kind is Kind.SOFTWARE and settings.devices != (0,):
        why = "" if settings.gpu == "software" else " (which auto took, for there is no real one)"
        asked, instead = f"--device is {','.join(map(str, settings.devices))}", "--device 0"
        if "devices" in settings.said_in:
            asked, instead = f"devices is {list(settings.devices)}", "devices = [0]"
        raise ConfigError(f"{asked}, but the software GPU{why} is one device: use {instead}", "devices")
    gpus = tuple(
        GpuPlan(
            device,
            partial(start_worker, WorkerOptions(settings.run_dir, kind.value, device, library)),
            settings.warm_workers,
            int(settings.quantum_ms * 1e6),
            kind.value,
        )
        for device in settings.devices
    )
    describe: dict[str, object] = {
        "gpu": kind.value,
        "devices": list(settings.devices),
        "library": str(library) if library else None,
        "version": __version__,
        "pid": os.getpid(),
        "run_dir": str(settings.run_dir.absolute()),
        "state_dir": str(settings.state_dir.absolute()),
        "layout": LAYOUT_VERSION,
        "calls": f"{TABLE_HASH:016x}",
    }
    live = live_settings(settings)
    reloader = Reloader(
        settings, read, live, tuple(f"mediator/gpus/gpu{device}" for device in settings.devices)
    )
    return MediatorPlan(
        settings.run_dir,
        settings.state_dir,
        gpus,
        describe,
        live=live,
        reload=reloader.reload,
        library=library,
        quarantine=QuarantineRule(settings.quarantine_faults, float(settings.quarantine_seconds)),
        quarantine_kinds=settings.quarantine_counts,
        starts=StartRate(float(settings.session_starts_per_second), settings.session_starts_burst),
        keeping=Keeping(
            settings.ledger_days,
            settings.ledger_sessions,
            settings.ledger_faults_per_vm,
            settings.ledger_faults,
            float(settings.quarantine_seconds),
            settings.quarantine_counts,
        ),
    )


async def serve(plan: MediatorPlan) -> None:
    """Run until told to stop."""
    with trio.open_signal_receiver(*SIGNALS) as signals:
        async with open_mediator(plan) as system, trio.open_nursery() as nursery:
            nursery.start_soon(keep_watchdog)
            notify("READY=1", f"STATUS=serves {plan.describe['gpu']} GPU")
            _log.info("ready: %s GPU, sockets in %s", plan.describe["gpu"], plan.run_dir)
            is_draining = False
            async for number in signals:
                if number == signal.SIGHUP:
                    nursery.start_soon(_reload, plan, system)
                elif number == signal.SIGUSR1:
                    await _hand_over(plan, system)
                elif number == signal.SIGINT or is_draining:
                    _log.info("stopping")
                    notify("STOPPING=1")
                    nursery.cancel_scope.cancel()
                    break
                else:
                    _log.info("draining: no new sessions; a second signal stops at once")
                    notify("STOPPING=1", "STATUS=waits for the last session to end")
                    is_draining = True
                    nursery.start_soon(_drain, plan, system)


async def _reload(plan: MediatorPlan, system: ActorSystem) -> None:
    if plan.reload is None:
        return
    notify_reloading()
    with contextlib.suppress(NotReloaded):  # which says so in the log
        await plan.reload(system)
    notify("READY=1")


async def _close_doors(plan: MediatorPlan, system: ActorSystem) -> None:
    # VMs' devices go on without this mediator, and keep claims for the next one.
    plan.live.draining = True
    for name in ("listener", "devices"):
        await system.ref("mediator").ask(TerminateChild(name), timeout_seconds=DRAIN_STOP_SECONDS)


async def _hand_over(plan: MediatorPlan, system: ActorSystem) -> None:
    """End as one that is killed does, with its sessions left to the next mediator, but with nothing half-done."""
    _log.info("handing over: sessions go on, and the next mediator adopts them")
    notify("STOPPING=1", "STATUS=leaves its sessions to the next mediator")
    with contextlib.suppress(ActorError):
        await _close_doors(plan, system)
    logging.shutdown()
    # No ordered end, which would be that of the sessions.
    os._exit(0)


async def _drain(plan: MediatorPlan, system: ActorSystem) -> None:
    await _close_doors(plan, system)
    while True:
        samples = await system.ref("mediator/telemetry").ask(ListSessions())
        if all(sample.ended for sample in samples):
            os.kill(os.getpid(), signal.SIGINT)
            return
        await trio.sleep(DRAIN_LOOK_SECONDS)


def _plan(settings: Settings, arguments: Sequence[str] | None) -> MediatorPlan:
    try:
        plan = make_plan(settings, partial(read_settings, arguments))
        check_places(plan.run_dir, plan.state_dir)
    except ConfigError as error:
        raise settings.blame(error) from None
    return plan


def _fail(what: object, status: int) -> int:
    print(f"run-mediator: {what}", file=sys.stderr)
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: 0 after an ordered end, 1 if it failed, 2 if it was told what cannot be meant."""
    parser = build_parser()
    complete_if_asked(parser)
    parse_arguments(parser, arguments)  # which answers --help and wrong use; what it says is read again below
    try:
        settings = read_settings(arguments)
        plan = _plan(settings, arguments)
        plan.describe["configuration"] = str(configuration_path(arguments).absolute())
    except DriverNotFound as error:
        return _fail(f"{error}; use --gpu software to run without a GPU", 1)
    except ConfigError as error:
        return _fail(error, 2)
    except BadPlace as error:
        return _fail(error, 1)
    start_logging(settings)
    try:
        trio.run(serve, plan)
    except DirectoryTaken as error:
        return _fail(error.strerror, 1)
    except CannotServe as error:
        return _fail(settings.blame(ConfigError(str(error), "metrics")), 2)
    except (StartFailed, SystemFailed) as error:
        return _fail(error, 1)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
