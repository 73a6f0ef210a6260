# SPDX-License-Identifier: Apache-2.0
"""Pools, VMs and sessions as the fair tree sees them, and what each of them got.

The tree: root -> pools by weight -> VMs by weight and priority -> the sessions of a VM, equal among themselves.

A priority says two things of a VM:
- how much: its weight counts four times (high), twice (medium) or once (low) within its pool;
- when: a high one may be up to ten quanta of service ahead of its share, and a low one stands two quanta behind its
  turn. That is bounded, so shares over any longer time are the weights' alone, and aging (``fair.py``) takes even that
  disadvantage away from who has waited.

Pure: no clock. Times are nanoseconds.
"""

from __future__ import annotations

from collections import deque
from typing import Final, Literal

import attrs

from .fair import HIGH, LOW, MEDIUM, SCALE, FairTree, Leaf, Node

Priority = Literal["high", "medium", "low"]

DEFAULT_POOL: Final = "default"
DEFAULT_WEIGHT: Final = 50
DEFAULT_POOL_WEIGHT: Final = 100
MAXIMUM_WEIGHT: Final = 1000
RANK: Final[dict[Priority, int]] = {"high": HIGH, "medium": MEDIUM, "low": LOW}
MULTIPLIER: Final[dict[Priority, int]] = {"high": 4, "medium": 2, "low": 1}
# Quanta of service by which a class competes ahead of its tag, from low to high.
PREFERENCE_QUANTA: Final = (-2, 0, 10)
# Upper bounds of the histogram of waits for a lease, nanoseconds; a last bucket takes the rest.
WAIT_BOUNDS_NS: Final = tuple(
    int(ms * 1e6) for ms in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
)
WINDOW_SECONDS: Final = 10


def check_weight(weight: int) -> int:
    """The weight itself. Raises ValueError where it is not in 1..1000."""
    if not 1 <= weight <= MAXIMUM_WEIGHT:
        raise ValueError(f"weight {weight} is not in 1..{MAXIMUM_WEIGHT}")
    return weight


def check_priority(priority: str) -> Priority:
    """The priority itself. Raises ValueError where there is none of that name."""
    if priority not in RANK:
        raise ValueError(f"priority {priority!r} is none of {', '.join(RANK)}")
    return priority


@attrs.define(eq=False)
class Account:
    """What a VM or a session got so far. Nothing here ever falls, but the window."""

    used_ns: int = 0
    leases: int = 0
    wait_ns: int = 0
    longest_wait_ns: int = 0
    waits: list[int] = attrs.Factory(lambda: [0] * (len(WAIT_BOUNDS_NS) + 1))
    # GPU nanoseconds by second, the last few seconds.
    window: deque[tuple[int, int]] = attrs.Factory(deque)

    def use(self, used_ns: int, now: int) -> None:
        """GPU time was reported."""
        self.used_ns += used_ns
        second = now // 1_000_000_000
        if self.window and self.window[-1][0] == second:
            used_ns += self.window.pop()[1]
        self.window.append((second, used_ns))
        while self.window[0][0] <= second - WINDOW_SECONDS:
            self.window.popleft()

    def wait(self, waited_ns: int) -> None:
        """A lease began after so long."""
        self.leases += 1
        self.wait_ns += waited_ns
        self.longest_wait_ns = max(self.longest_wait_ns, waited_ns)
        for bucket, bound in enumerate(WAIT_BOUNDS_NS):
            if waited_ns <= bound:
                self.waits[bucket] += 1
                return
        self.waits[-1] += 1

    def recent_ns(self, now: int) -> int:
        """GPU nanoseconds reported within the window."""
        oldest = now // 1_000_000_000 - WINDOW_SECONDS
        return sum(used for second, used in self.window if second > oldest)


@attrs.define(eq=False)
class Vm:
    """A VM's place in the tree. It stays when its sessions go, and with it what it owes."""

    name: str
    pool: str
    node: Node
    priority: Priority = "medium"
    weight: int = DEFAULT_WEIGHT
    sessions: dict[str, Session] = attrs.Factory(dict)
    account: Account = attrs.Factory(Account)


@attrs.define(eq=False)
class Session:
    """A session's leaf, and what it got."""

    vm: Vm
    leaf: Leaf
    account: Account = attrs.Factory(Account)

    @property
    def used_ns(self) -> int:
        """GPU nanoseconds reported."""
        return self.account.used_ns


@attrs.frozen
class VmState:
    """A VM for an administrator. Shares are parts of the whole GPU, 0 to 1."""

    vm: str
    pool: str
    pool_weight: int
    priority: Priority
    weight: int
    sessions: int
    waiting: int
    # Of the VMs that have sessions now.
    configured_share: float
    # Of the GPU time used in the last ten seconds; an unfinished lease counts with an estimate.
    achieved_share: float
    used_ns: int
    leases: int
    wait_ns: int
    longest_wait_ns: int
    waits: tuple[int, ...]
    # How far the VM is ahead of its siblings, and its pool of the others, in nanoseconds of service at its weight.
    ahead_ns: int
    pool_ahead_ns: int


@attrs.define(eq=False)
class Hierarchy:
    """Who belongs where, over a ``FairTree``."""

    quantum_ns: int
    aging_ns: int
    tree: FairTree = attrs.field(init=False)
    pools: dict[str, Node] = attrs.Factory(dict)
    vms: dict[str, Vm] = attrs.Factory(dict)

    def __attrs_post_init__(self) -> None:
        low, medium, high = (quanta * self.quantum_ns for quanta in PREFERENCE_QUANTA)
        self.tree = FairTree((low, medium, high), self.aging_ns)

    def set_pool(self, pool: str, weight: int) -> None:
        """Make a pool, or change its weight. Raises ValueError."""
        self.tree.set_weight(self._pool(pool), check_weight(weight))

    def set_vm(self, vm: str, pool: str, priority: Priority, weight: int) -> Vm:
        """Make a VM, or change its place. Raises ValueError."""
        check_weight(weight)
        check_priority(priority)
        known = self.vms.get(vm)
        parent = self._pool(pool)
        effective = weight * MULTIPLIER[priority]
        if known is None:
            node = Node(vm, effective)
            self.tree.attach(node, parent)
            self.vms[vm] = known = Vm(vm, pool, node, priority, weight)
            return known
        self.tree.set_weight(known.node, effective)
        if known.pool != pool:
            self.tree.move(known.node, parent)
        for session in known.sessions.values():
            self.tree.set_rank(session.leaf, RANK[priority])
        known.pool, known.priority, known.weight = pool, priority, weight
        return known

    def _pool(self, pool: str) -> Node:
        node = self.pools.get(pool)
        if node is None:
            node = self.pools[pool] = Node(pool, DEFAULT_POOL_WEIGHT)
            self.tree.attach(node, self.tree.root)
        return node

    def open_session(self, vm: str, session: str) -> Session:
        """A session's leaf; a VM that nobody spoke of gets the defaults."""
        owner = self.vms.get(vm) or self.set_vm(vm, DEFAULT_POOL, "medium", DEFAULT_WEIGHT)
        rank = RANK[owner.priority]
        leaf = Leaf(session, 1, rank=rank, competes=rank)
        self.tree.attach(leaf, owner.node)
        owner.sessions[session] = made = Session(owner, leaf)
        return made

    def close_session(self, session: Session) -> None:
        """It is gone. Its leaf must not be in service."""
        self.tree.unwant(session.leaf)
        session.vm.sessions.pop(session.leaf.name, None)

    def account(self, session: Session, used_ns: int, now: int) -> None:
        """GPU time was reported."""
        for account in (session.account, session.vm.account):
            account.use(max(used_ns, 0), now)

    def waited(self, session: Session, waited_ns: int) -> None:
        """A lease began."""
        for account in (session.account, session.vm.account):
            account.wait(waited_ns)

    def vm_states(self, now: int, running: tuple[Session, int] | None) -> list[VmState]:
        """Every VM that is known; ``running``: who holds the lease, and what it will report, about."""
        recent = {vm.name: vm.account.recent_ns(now) for vm in self.vms.values()}
        if running is not None:
            recent[running[0].vm.name] += min(running[1], WINDOW_SECONDS * 1_000_000_000)
        total = sum(recent.values())
        present = [vm for vm in self.vms.values() if vm.sessions]
        pool_weights = {vm.pool: self.pools[vm.pool].weight for vm in present}
        states = []
        for vm in sorted(self.vms.values(), key=lambda v: v.name):
            pool = self.pools[vm.pool]
            siblings = sum(v.node.weight for v in present if v.pool == vm.pool)
            configured = 0.0
            if vm.sessions:
                configured = pool.weight / sum(pool_weights.values()) * vm.node.weight / siblings
            states.append(
                VmState(
                    vm.name,
                    vm.pool,
                    pool.weight,
                    vm.priority,
                    vm.weight,
                    len(vm.sessions),
                    sum(s.leaf.wants for s in vm.sessions.values()),
                    configured,
                    recent[vm.name] / total if total else 0.0,
                    vm.account.used_ns,
                    vm.account.leases,
                    vm.account.wait_ns,
                    vm.account.longest_wait_ns,
                    tuple(vm.account.waits),
                    _ahead(vm.node, pool),
                    _ahead(pool, self.tree.root),
                )
            )
        return states


def _ahead(node: Node, parent: Node) -> int:
    return max(node.tag - parent.virtual, 0) * node.weight // SCALE
