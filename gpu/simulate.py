# SPDX-License-Identifier: Apache-2.0
"""A whole GPU with its tenants on a virtual clock, to see what ``schedule.py`` does to them. Deterministic.

The schedule under test is the real one; what is modelled is around it: workers that run kernels of drawn lengths while it
is their turn, stop at the deadline, let finish what is queued on the device, hand over, and report later; messages that
take time; a device that takes time to change hands. Given the same scenario it gives the same outcome to the nanosecond.

    scenario = Scenario((Load("a", weight=75), Load("b", weight=25, kernel_ns=20_000)), duration_ns=4_000_000_000)
    outcome = simulate(scenario)
    outcome.share_error, outcome.jain, outcome.lag_ns

Pure: no clock, no files. ``tools/schedule_figures.py`` draws what comes out of it.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Mapping
from typing import Literal

import attrs

from .fluid import Fluid, FluidMember, jain_index
from .hierarchy import MULTIPLIER, Account, Priority
from .schedule import (
    DEFAULT_AGING_NS,
    DEFAULT_GRACE_NS,
    DEFAULT_QUANTUM_NS,
    Grant,
    Schedule,
    SessionId,
    Tuning,
)
from .turn import LocalTurn

Lengths = Literal["fixed", "exponential", "pareto"]
# How long a worker with a bounded lease and no work keeps it.
IDLE_HOLD_NS = 100_000


@attrs.frozen
class Load:
    """A VM and what its sessions run.

    ``period_ns`` 0: always busy. Else jobs of ``work_ns`` arrive at each session, a Poisson process of that mean period
    (or exactly that period where ``is_regular``), and the next job is queued behind an unfinished one.
    """

    vm: str
    weight: int = 50
    pool: str = "default"
    priority: Priority = "medium"
    kernel_ns: int = 200_000
    lengths: Lengths = "fixed"
    sessions: int = 1
    period_ns: int = 0
    work_ns: int = 0
    is_regular: bool = False
    start_ns: int = 0


@attrs.frozen
class Scenario:
    """Who runs what on a GPU, and how quick things are there."""

    loads: tuple[Load, ...]
    duration_ns: int = 2_000_000_000
    pools: Mapping[str, int] = attrs.Factory(dict)
    seed: int = 1
    quantum_ns: int = DEFAULT_QUANTUM_NS
    grace_ns: int = DEFAULT_GRACE_NS
    aging_ns: int = DEFAULT_AGING_NS
    message_ns: int = 0  # worker to scheduler, and back
    switch_ns: int = 0  # device idle between two holders
    sample_ns: int = 10_000_000
    tuning: Tuning = attrs.Factory(Tuning)


@attrs.frozen
class Outcome:
    """What became of it. Per VM, in the order of the scenario."""

    scenario: Scenario
    vms: tuple[str, ...]
    service_ns: dict[str, int]
    configured: dict[str, float]
    # Time, and what each had got by then; what GPS would have given it.
    samples: tuple[tuple[int, dict[str, int], dict[str, float]], ...]
    waits_ns: dict[str, tuple[int, ...]]
    latencies_ns: dict[str, tuple[int, ...]]
    leases: int
    longest_lease_ns: int
    longest_overrun_ns: int

    @property
    def busy(self) -> float:
        """Part of the time that the device worked."""
        return sum(self.service_ns.values()) / self.scenario.duration_ns

    def share(self, vm: str) -> float:
        """Of all GPU time used."""
        return self.service_ns[vm] / sum(self.service_ns.values())

    @property
    def share_error(self) -> float:
        """The largest difference between a share and what was configured, 0.01 is one point. For loads always busy."""
        return max(abs(self.share(vm) - self.configured[vm]) for vm in self.vms)

    @property
    def jain(self) -> float:
        """Jain's index over share by configured share."""
        return jain_index([self.share(v) for v in self.vms], [self.configured[v] for v in self.vms])

    @property
    def lag_ns(self) -> dict[str, float]:
        """How far each was behind GPS at the worst sample."""
        return {v: max((fluid[v] - got[v] for _, got, fluid in self.samples), default=0.0) for v in self.vms}

    def longest_wait_ns(self, vm: str) -> int:
        """For a lease."""
        return max(self.waits_ns[vm], default=0)

    def wait_percentile_ns(self, vm: str, percent: float) -> int:
        """Of the waits for a lease."""
        return percentile(self.waits_ns[vm], percent)

    def latency_percentile_ns(self, vm: str, percent: float) -> int:
        """Of its jobs, from arrival to completion."""
        return percentile(self.latencies_ns[vm], percent)


def percentile(values: tuple[int, ...], percent: float) -> int:
    """The smallest value that so many percent do not exceed; 0 of none."""
    if not values:
        return 0
    ordered = sorted(values)
    return ordered[max(-(-len(ordered) * percent // 100) - 1, 0).__int__()]


@attrs.define(eq=False)
class _Worker:
    load: Load
    session: SessionId
    random: random.Random
    # Jobs: (arrival, work left). Always busy: none, and never empty.
    jobs: list[list[int]] = attrs.Factory(list)
    grant: Grant | None = None
    began_ns: int | None = None
    used_ns: int = 0
    has_asked: bool = False
    # Kernels until the next event: the end of the one that runs.
    running_until: int | None = None
    idle_since: int | None = None
    is_draining: bool = False

    @property
    def has_work(self) -> bool:
        return self.load.period_ns == 0 or bool(self.jobs)

    def kernel(self) -> int:
        mean = self.load.kernel_ns
        if self.load.lengths == "fixed":
            return mean
        if self.load.lengths == "exponential":
            return max(int(self.random.expovariate(1 / mean)), 1000)
        # Heavy tailed, mean as told: shape 1.5, cut at a hundred times the mean.
        return min(int(mean / 3 * self.random.paretovariate(1.5)), 100 * mean)

    def take(self) -> int:
        """Length of the next kernel; none is longer than its job has work left."""
        length = self.kernel()
        return min(length, self.jobs[0][1]) if self.jobs else length


@attrs.define(eq=False)
class _Simulation:
    scenario: Scenario
    turn: LocalTurn = attrs.Factory(LocalTurn)
    schedule: Schedule = attrs.field(init=False)
    fluid: Fluid = attrs.field(init=False)
    workers: dict[SessionId, _Worker] = attrs.Factory(dict)
    events: list[tuple[int, int, str, object]] = attrs.Factory(list)
    now: int = 0
    order: int = 0
    service: dict[str, int] = attrs.Factory(dict)
    latencies: dict[str, list[int]] = attrs.Factory(dict)
    waits: dict[str, list[int]] = attrs.Factory(dict)
    samples: list[tuple[int, dict[str, int], dict[str, float]]] = attrs.Factory(list)
    by_token: dict[int, _Worker] = attrs.Factory(dict)
    timer: int | None = None
    leases: int = 0
    longest_lease: int = 0
    longest_overrun: int = 0

    def __attrs_post_init__(self) -> None:
        scenario = self.scenario
        self.schedule = Schedule(
            scenario.quantum_ns, scenario.grace_ns, scenario.aging_ns, self.turn, tuning=scenario.tuning
        )
        for pool, weight in scenario.pools.items():
            self.schedule.set_pool(pool, weight, 0)
        members = {}
        for load in scenario.loads:
            self.schedule.set_vm(load.vm, load.pool, load.priority, load.weight, 0)
            self.service[load.vm], self.latencies[load.vm], self.waits[load.vm] = 0, [], []
            backlog = None if load.period_ns == 0 and load.start_ns == 0 else 0.0
            members[load.vm] = FluidMember(load.pool, load.weight * MULTIPLIER[load.priority], backlog)
            for _ in range(load.sessions):
                session = SessionId(len(self.workers) + 1)
                worker = _Worker(load, session, random.Random(f"{scenario.seed}/{session}"))
                self.workers[session] = worker
                self.schedule.open(session, load.vm)
                self._watch_waits(session, load.vm)
                self._later(load.start_ns, "start", worker)
        weights = {name: float(node.weight) for name, node in self.schedule.hierarchy.pools.items()}
        self.fluid = Fluid(weights, members)
        for time in range(scenario.sample_ns, scenario.duration_ns + 1, scenario.sample_ns):
            self._later(time, "sample", None)

    def _watch_waits(self, session: SessionId, vm: str) -> None:
        waits = self.waits[vm]

        class Recorded(Account):
            """Keeps every wait."""

            def wait(self, waited_ns: int) -> None:
                waits.append(waited_ns)
                super().wait(waited_ns)

        self.schedule.sessions[session].account = Recorded()

    def _later(self, time: int, kind: str, what: object) -> None:
        self.order += 1
        heapq.heappush(self.events, (time, self.order, kind, what))

    def run(self) -> Outcome:
        scenario = self.scenario
        while self.events and self.events[0][0] <= scenario.duration_ns:
            self.now, _, kind, what = heapq.heappop(self.events)
            getattr(self, f"_on_{kind}")(what)
            self._look_at_turn()
            self._arm()
        configured = self._configured()
        return Outcome(
            scenario,
            tuple(load.vm for load in scenario.loads),
            self.service,
            configured,
            tuple(self.samples),
            {vm: tuple(w) for vm, w in self.waits.items()},
            {vm: tuple(v) for vm, v in self.latencies.items()},
            self.leases,
            self.longest_lease,
            self.longest_overrun,
        )

    def _configured(self) -> dict[str, float]:
        everybody = Fluid(
            self.fluid.pools, {n: FluidMember(m.pool, m.weight, None) for n, m in self.fluid.members.items()}
        )
        return everybody.rates()

    # -- events

    def _on_start(self, worker: object) -> None:
        assert isinstance(worker, _Worker)
        if worker.load.period_ns == 0:
            self.fluid.advance(self.now)
            self.fluid.members[worker.load.vm].backlog_ns = None
            self._ask(worker)
        else:
            self._on_job(worker)

    def _on_job(self, worker: object) -> None:
        assert isinstance(worker, _Worker)
        load = worker.load
        self.fluid.advance(self.now)
        self.fluid.arrive(load.vm, load.work_ns)
        worker.jobs.append([self.now, load.work_ns])
        gap = load.period_ns if load.is_regular else int(worker.random.expovariate(1 / load.period_ns))
        self._later(self.now + max(gap, 1), "job", worker)
        if worker.began_ns is not None:
            if worker.idle_since is not None:
                worker.idle_since = None
                self._go_on(worker)
        elif len(worker.jobs) == 1:
            self._come(worker)

    def _on_sample(self, _: object) -> None:
        self.fluid.advance(self.now)
        fluid = {name: member.service_ns for name, member in self.fluid.members.items()}
        self.samples.append((self.now, dict(self.service), fluid))

    def _on_timer(self, _: object) -> None:
        self.timer = None
        self._told(self.schedule.decide(self.now))

    def _on_demand(self, worker: object) -> None:
        assert isinstance(worker, _Worker)
        self._told(self.schedule.demand(worker.session, self.now))

    def _on_report(self, what: object) -> None:
        assert isinstance(what, tuple)
        worker, token, used, held, more = what
        self._told(
            self.schedule.ended(worker.session, used, self.now, wants_more=more, token=token, held_ns=held)
        )

    def _on_grant(self, grant: object) -> None:
        assert isinstance(grant, Grant)
        worker = self.workers[grant.session]
        is_same = worker.grant is not None and worker.grant.token == grant.token
        if worker.began_ns is not None and not is_same:
            return
        worker.grant = grant
        self.by_token[grant.token] = worker
        if worker.began_ns is not None and worker.idle_since is not None:
            self._go_on(worker)

    def _on_kernel(self, worker: object) -> None:
        assert isinstance(worker, _Worker)
        worker.running_until = None
        self._go_on(worker)

    def _on_idle(self, what: object) -> None:
        assert isinstance(what, tuple)
        worker, since = what
        if worker.idle_since == since and worker.began_ns is not None:
            self._go_on(worker)

    def _on_drained(self, worker: object) -> None:
        assert isinstance(worker, _Worker)
        self._end(worker)

    # -- a worker

    def _come(self, worker: _Worker) -> None:
        """The first job of an idle worker: the place behind the holder is its own, or it has to ask."""
        grant = worker.grant
        if grant is not None and grant.standby and not self.turn.take(grant.token):
            worker.grant = None
            self.by_token.pop(grant.token, None)
            self._later(self.now + self.scenario.message_ns, "report", (worker, grant.token, 0, 0, True))
        else:
            self._ask(worker)

    def _ask(self, worker: _Worker) -> None:
        self._later(self.now + self.scenario.message_ns, "demand", worker)

    def _told(self, grants: list[Grant]) -> None:
        for grant in grants:
            if self.scenario.message_ns:
                self._later(self.now + self.scenario.message_ns, "grant", grant)
            else:
                self._on_grant(grant)

    def _look_at_turn(self) -> None:
        worker = self.by_token.get(self.turn.hands.holder)
        if worker is None or worker.began_ns is not None or worker.grant is None:
            return
        if worker.grant.token != self.turn.hands.holder:
            return
        worker.began_ns = self.now + self.scenario.switch_ns
        worker.used_ns, worker.is_draining, worker.idle_since = 0, False, None
        self.leases += 1
        worker.running_until = worker.began_ns
        self._later(worker.began_ns, "kernel", worker)

    def _deadline(self, worker: _Worker) -> int | None:
        grant = worker.grant
        assert grant is not None
        assert worker.began_ns is not None
        if grant.deadline_ns:
            return grant.deadline_ns
        return worker.began_ns + grant.slice_ns if grant.slice_ns else None

    def _go_on(self, worker: _Worker) -> None:
        """Between two kernels, or idle: what now?"""
        if worker.running_until is not None or worker.is_draining:
            return
        deadline = self._deadline(worker)
        if worker.grant is not None and self.turn.must_yield(worker.grant.token):
            deadline = self.now
        if deadline is not None and self.now >= deadline:
            self._drain(worker, deadline)
            return
        if not worker.has_work:
            if worker.idle_since is None:
                worker.idle_since = self.now
            if deadline is None:
                return
            if self.now - worker.idle_since >= IDLE_HOLD_NS:
                self._end(worker)
            else:
                self._later(worker.idle_since + IDLE_HOLD_NS, "idle", (worker, worker.idle_since))
            return
        worker.idle_since = None
        # As many kernels as nothing can come between.
        limit = self.events[0][0] if self.events else self.scenario.duration_ns
        if deadline is not None:
            limit = min(limit, deadline)
        end = self.now
        while worker.has_work and (end == self.now or end < limit):
            end += self._execute(worker, end)
        worker.running_until = end
        self._later(end, "kernel", worker)

    def _execute(self, worker: _Worker, at: int) -> int:
        length = worker.take()
        worker.used_ns += length
        self.service[worker.load.vm] += length
        if worker.jobs:
            worker.jobs[0][1] -= length
            if worker.jobs[0][1] <= 0:
                arrived, _ = worker.jobs.pop(0)
                self.latencies[worker.load.vm].append(at + length - arrived)
        return length

    def _drain(self, worker: _Worker, deadline: int) -> None:
        """Past the deadline: what is queued on the device still runs, half the bound and one kernel at least."""
        assert worker.grant is not None
        worker.is_draining = True
        end = self.now
        while worker.has_work and end - self.now < worker.grant.in_flight_ns // 2:
            end += self._execute(worker, end)
        self.longest_overrun = max(self.longest_overrun, end - deadline)
        self._later(end, "drained", worker)

    def _end(self, worker: _Worker) -> None:
        assert worker.grant is not None
        assert worker.began_ns is not None
        token, held = worker.grant.token, self.now - worker.began_ns
        self.longest_lease = max(self.longest_lease, held)
        self.turn.pass_on(token)
        report = (worker, token, worker.used_ns, held, worker.has_work)
        worker.grant, worker.began_ns, worker.idle_since, worker.is_draining = None, None, None, False
        self.by_token.pop(token, None)
        self._later(self.now + self.scenario.message_ns, "report", report)

    def _arm(self) -> None:
        due = self.schedule.next_event_ns()
        if due is not None and (self.timer is None or due < self.timer or self.timer <= self.now):
            self.timer = max(due, self.now + 1)
            self._later(self.timer, "timer", None)


def simulate(scenario: Scenario) -> Outcome:
    """Run it. Takes about ten microseconds of computing a lease and one a kernel."""
    return _Simulation(scenario).run()
