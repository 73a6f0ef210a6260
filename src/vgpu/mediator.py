# SPDX-License-Identifier: Apache-2.0
"""The mediator's assembly: the supervisor tree of architecture, and nothing else.

mediator (one_for_one: an actor's restart must not end sessions; the others find it by name again)
├── ledger
├── outbox: what is on its way to the ledger
├── telemetry
├── limits: what VMs may do, written where their workers read it
├── gpus (one_for_one)
│   └── gpuN (one_for_one)
│       ├── scheduler
│       ├── watchdog
│       ├── executors (simple_one_for_one): one executor per session, each owning a worker process
│       └── workers: warm worker processes
├── devices (simple_one_for_one): one device actor per registered VM, each keeping the VM's PCI device running
├── fleet: starts the device actors of the VMs that are registered
├── connections (simple_one_for_one): one connection actor per VM
├── quarantine: keeps VMs away that made too many faults
├── listener
├── admin
└── metrics: what is counted, over HTTP where that was asked for

This is the only module that sees all five rooms.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random

import attrs
import tenacity

from vgpu.actors import ActorSnapshot, ActorSystem, Crashed, StartFailed, open_system
from vgpu.actors.admin import Admin, Reload
from vgpu.actors.connection import Connection
from vgpu.actors.device import Device
from vgpu.actors.device_start import DeviceStarter
from vgpu.actors.executor import Executor
from vgpu.actors.fault_messages import COUNTED, QuarantineRule
from vgpu.actors.fleet import Fleet
from vgpu.actors.ledger import Ledger
from vgpu.actors.ledger_prune import Keeping
from vgpu.actors.limits import LimitKeeper
from vgpu.actors.listener import Listener
from vgpu.actors.metrics import Metrics, check_address
from vgpu.actors.outbox import Outbox
from vgpu.actors.scheduler import Scheduler
from vgpu.actors.start_bucket import StartRate
from vgpu.actors.telemetry import Telemetry
from vgpu.actors.unix_listener import is_listened_on
from vgpu.actors.worker_pool import Spawn, WorkerPool, end_strangers
from vgpu.gpu.nvml import sampler_for
from vgpu.gpu.schedule import Tuning
from vgpu.gpu.turn import turn_path
from vgpu.holding import DirectoryTaken, hold_directory
from vgpu.supervision import Backoff, ChildSpec, Restart, Strategy, SupervisorSpec, WaitJittered
from vgpu.supervision.quarantine import QuarantineKeeper
from vgpu.supervision.watchdog import Watchdog
from vgpu.transport.host_memory import HostMemory, host_memory

# A crash here and there is survived; a mediator that cannot keep an actor alive for long says so by ending.
INTENSITY = 10
PERIOD_SECONDS = 10.0
# An actor that starts well and ends soon, again and again, is held back longer each time instead of spending the intensity, which
# would end every session: until it has lived for a while, and for ten minutes at most.
BACKOFF = Backoff(
    WaitJittered(Random(), initial_seconds=0.1, maximum_seconds=10.0),
    tenacity.stop_after_delay(600),
    reset_after_seconds=5.0,
)
# A message in hand for so long, or the event loop held for it, is a finding in log, metrics and doctor. What waits longer for good
# reasons says so in its class (stuck_after_seconds).
STUCK_SECONDS = 5.0


@attrs.frozen
class GpuPlan:
    """One GPU of this host and how its workers are started."""

    index: int
    spawn: Spawn
    warm_workers: int = 1
    quantum_ns: int = 2_000_000
    kind: str = "software"
    tuning: Tuning = attrs.Factory(Tuning)

    @property
    def worker_prefix(self) -> str:
        """How the names of this GPU's workers begin, so that a later mediator knows whose they are."""
        return f"{self.kind}{self.index}-"


@attrs.define(eq=False)
class LiveSettings:
    """What changes while the mediator runs. Every life of an actor reads it anew; None: as the plan says."""

    metrics: tuple[str, int] | None = None  # host and port, or nowhere
    warm_workers: int | None = None
    quantum_ns: int | None = None
    socket_group: str = ""
    draining: bool = False  # nobody new is let in, devices are left to the next mediator


@attrs.frozen
class MediatorPlan:
    """Everything the tree is made from."""

    run_dir: Path
    state_dir: Path
    gpus: tuple[GpuPlan, ...]
    describe: dict[str, object] = attrs.Factory(dict)
    live: LiveSettings = attrs.Factory(LiveSettings)
    reload: Reload | None = None  # reads the configuration again, for administrators
    library: Path | None = None  # the real libcuda, beside which its NVML is looked for
    quarantine: QuarantineRule = attrs.field(factory=QuarantineRule)
    quarantine_kinds: tuple[str, ...] = COUNTED
    keeping: Keeping = attrs.field(factory=Keeping)
    starts: StartRate = attrs.field(factory=StartRate)  # of each VM
    stuck_seconds: float | None = STUCK_SECONDS
    memory: Callable[[], HostMemory] = host_memory  # of which VMs' BAR1s are promised


def _supervisor(
    name: str,
    children: tuple[ChildSpec | SupervisorSpec, ...],
    strategy: Strategy = Strategy.ONE_FOR_ONE,
) -> SupervisorSpec:
    """All of them are as patient as each other."""
    return SupervisorSpec(name, children, strategy, INTENSITY, PERIOD_SECONDS, backoff=BACKOFF)


def gpu_spec(plan: GpuPlan, run_dir: Path, live: LiveSettings) -> SupervisorSpec:
    """The actors of one GPU. Its scheduler's death restarts what depends on it, never the workers' sessions."""
    name = f"gpu{plan.index}"
    path = f"mediator/gpus/{name}"
    executor = ChildSpec(
        "executor",
        partial(Executor, run_dir=run_dir),
        (path,),
        restart=Restart.TEMPORARY,
        shutdown=5.0,
        start_timeout_seconds=30.0,
    )

    def pool() -> WorkerPool:
        warm = plan.warm_workers if live.warm_workers is None else live.warm_workers
        workers = run_dir / "workers"
        return WorkerPool(f"{path}/executors", workers, plan.spawn, warm, prefix=plan.worker_prefix)

    def scheduler() -> Scheduler:
        quantum_ns = plan.quantum_ns if live.quantum_ns is None else live.quantum_ns
        word = turn_path(run_dir, plan.index)
        return Scheduler(quantum_ns, word, "mediator/ledger", tuning=plan.tuning)

    return _supervisor(
        name,
        (
            ChildSpec("scheduler", scheduler),
            ChildSpec("watchdog", Watchdog),
            _supervisor("executors", (executor,), Strategy.SIMPLE_ONE_FOR_ONE),
            ChildSpec("workers", pool),
        ),
        # Not rest_for_one: executors outlive a scheduler's restart and announce themselves to its successor.
    )


def mediator_spec(plan: MediatorPlan, system: list[ActorSystem]) -> SupervisorSpec:
    """The whole tree. ``system`` is filled by the caller once the system is open (the admin shows its tree)."""

    def tree() -> tuple[ActorSnapshot, ...]:
        return system[0].tree() if system else ()

    def is_draining() -> bool:
        return plan.live.draining

    gpus = tuple(f"mediator/gpus/gpu{g.index}" for g in plan.gpus)
    # Device pages show the first GPU.
    telemetry = partial(Telemetry, f"{gpus[0]}/workers", partial(sampler_for, libcuda=plan.library))
    executors = tuple(f"{gpu}/executors" for gpu in gpus)
    connection = ChildSpec("connection", _connection, (executors, plan.starts))
    device = ChildSpec(
        "device",
        partial(Device, starts=plan.starts),
        (DeviceStarter(plan.run_dir, lambda: plan.live.socket_group), executors),
        shutdown=10.0,
    )
    return _supervisor(
        "mediator",
        (
            ChildSpec("ledger", Ledger, (plan.state_dir / "ledger.sqlite", plan.keeping)),
            ChildSpec("outbox", Outbox, (deque(),)),
            ChildSpec("telemetry", telemetry),
            ChildSpec("limits", LimitKeeper, (plan.run_dir, gpus)),
            _supervisor("gpus", tuple(gpu_spec(g, plan.run_dir, plan.live) for g in plan.gpus)),
            _supervisor("devices", (device,), Strategy.SIMPLE_ONE_FOR_ONE),
            ChildSpec("fleet", Fleet, ("mediator/devices", plan.run_dir, gpus, is_draining, plan.memory)),
            _supervisor("connections", (connection,), Strategy.SIMPLE_ONE_FOR_ONE),
            ChildSpec(
                "quarantine",
                QuarantineKeeper,
                (gpus, "mediator/devices", plan.quarantine, plan.quarantine_kinds),
            ),
            ChildSpec("listener", Listener, (plan.run_dir / "mediator.sock", "mediator/connections")),
            ChildSpec(
                "admin",
                Admin,
                (plan.run_dir / "admin.sock", gpus, tree, plan.describe, plan.reload, is_draining),
            ),
            ChildSpec("metrics", Metrics, (lambda: plan.live.metrics, plan.describe, gpus)),
        ),
        # One for one: a ledger's restart must not end sessions; every actor finds the others by name again.
    )


def _connection(executors: tuple[str, ...], starts: StartRate, vm: str) -> Connection:
    return Connection(vm, executors, starts)


@asynccontextmanager
async def open_mediator(plan: MediatorPlan) -> AsyncIterator[ActorSystem]:
    """Run the mediator while the block runs. Sockets exist when it is entered; sessions end when it is left.

    Raises:
        DirectoryTaken: another mediator works with one of the directories; nothing of it was touched.
        CannotServe: metrics cannot be served where they should be; nothing was started.
        StartFailed: something else kept it from starting.
    """
    holder: list[ActorSystem] = []
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            # Before anything is touched: two with one set of workers, or with one ledger and different sockets, would undo each
            # other's work.
            held.enter_context(hold_directory(plan.run_dir, "--run-dir"))
            if plan.state_dir.resolve() != plan.run_dir.resolve():
                held.enter_context(hold_directory(plan.state_dir, "--state-dir"))
        except DirectoryTaken:
            raise
        except OSError as error:
            raise StartFailed("mediator", Crashed(error)) from error
        if await is_listened_on(plan.run_dir / "mediator.sock"):
            # One that holds no directory: of another version, or none of ours.
            raise DirectoryTaken(
                errno.EADDRINUSE,
                f"another mediator listens on {plan.run_dir / 'mediator.sock'}: end it first,"
                " or give this one a directory of its own with --run-dir",
            )
        if plan.live.metrics is not None:
            await check_address(plan.live.metrics)
        await end_strangers(plan.run_dir / "workers", tuple(g.worker_prefix for g in plan.gpus))
        async with open_system(mediator_spec(plan, holder), stuck_seconds=plan.stuck_seconds) as system:
            holder.append(system)
            yield system
