# SPDX-License-Identifier: Apache-2.0
"""Hierarchical start-time fair queuing: a tree of weights, and which leaf is to be served next.

The discipline is that of P. Goyal, H. M. Vin and H. Cheng, "Start-time Fair Queuing: A Scheduling Algorithm for
Integrated Services Packet Switching Networks", SIGCOMM 1996 (flat), and P. Goyal, X. Guo and H. M. Vin, "A Hierarchical
CPU Scheduler for Multimedia Operating Systems", OSDI 1996 (the tree). Every node has a start tag in its parent's
virtual time. The child with the least tag is served; what it used moves its tag on by used / weight; the parent's virtual
time is the least tag of its busy children, and, once nobody is left, the greatest tag that any child reached. A child
that becomes busy again gets max(virtual time, its own tag): an idle one gathers no credit, and owes nothing it has
not used. Lengths need not be known beforehand, which is why it fits GPU time: it is known only afterwards.

Two things are added, both about *when*, neither about *how much*:

- Preference, after borrowed virtual time (K. J. Duda and D. R. Cheriton, SOSP 1999). A leaf's class shifts the tag it
  competes with by a bounded amount of service, so a preferred leaf may be that much ahead of its share and no more. A
  node competes with the preference of the most urgent leaf that waits below it.
- Aging, after L. Kleinrock's delay dependent priorities (Naval Research Logistics Quarterly 11, 1964): a leaf that
  has waited for ``aging_ns`` goes before those that have not. Among the aged, start tags alone decide.

Pure: no clock, ``now`` is an argument. Virtual times are integers, so that nothing drifts in a year of running.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

import attrs

# Virtual time per nanosecond of service at weight 1.
SCALE = 1 << 20
LOW, MEDIUM, HIGH = 0, 1, 2
AGED = 3  # whatever it was, it has waited for long
CLASSES = 4
SMALLEST_HEAP = 64


@attrs.define(eq=False)
class Node:
    """A node of the tree: the root, a pool, a VM, or as a leaf a session."""

    name: str
    weight: int
    parent: Node | None = None
    # In the parent's virtual time; meaningful while it is busy, and kept for its return.
    tag: int = 0
    # Virtual time among its children.
    virtual: int = 0
    # Greatest tag a child has reached.
    furthest: int = 0
    # Leaves below (or the leaf itself) that wait, by the class they compete in.
    # Invariant: a node is in its parent's heap if and only if any(waiting) and it is not in service.
    waiting: list[int] = attrs.Factory(lambda: [0] * CLASSES)
    # The child on whose side the leaf in service is.
    serving: Node | None = None
    # Leaves below that have been served and have not said yet whether they go on; children that have such leaves.
    lingering: int = 0
    limbo: set[Node] = attrs.Factory(set)
    ticket: int = 0
    # An entry of the parent's heap counts while its stamp is this.
    stamp: int = 0
    heap: list[tuple[int, int, int, Node]] = attrs.Factory(list)
    # The same children by their tags alone.
    tags: list[tuple[int, int, int, Node]] = attrs.Factory(list)
    heap_limit: int = SMALLEST_HEAP  # entries that do not count are swept out beyond it

    @property
    def is_waiting(self) -> bool:
        """Does a leaf here wait?"""
        return any(self.waiting)

    @property
    def is_busy(self) -> bool:
        """Does a leaf here wait, or is one in service, or was just now?"""
        return self.serving is not None or self.is_waiting or self.lingering > 0

    def urgency(self) -> int:
        """The highest class that waits here."""
        return max((c for c in range(CLASSES) if self.waiting[c]), default=LOW)

    def path(self) -> Iterator[Node]:
        """This node and those above it, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


@attrs.define(eq=False)
class Leaf(Node):
    """A session: what is served."""

    rank: int = MEDIUM  # its own class
    competes: int = MEDIUM  # the class it competes in: its own, or what aging made of it
    wants: bool = False
    in_service: bool = False
    waiting_since: int = 0

    @property
    def is_busy(self) -> bool:
        """Waiting, or in service, or was just now?"""
        return self.in_service or self.wants or self.lingering > 0


@attrs.define(eq=False)
class FairTree:
    """The tree and its orders. One leaf is in service at a time; others may be charged late."""

    # Service by which a class is ahead of (or behind) its tag, nanoseconds, from low to high.
    preference_ns: tuple[int, int, int]
    aging_ns: int
    root: Node = attrs.Factory(lambda: Node("", 1))
    _stamps: Iterator[int] = attrs.Factory(lambda: itertools.count(1))
    # When leaves age next: (time, order, leaf, when it began to wait).
    _aging: list[tuple[int, int, Leaf, int]] = attrs.Factory(list)

    # -- shape

    def attach(self, node: Node, parent: Node) -> None:
        """Put an idle node below another; it begins at the virtual time there."""
        assert not node.is_busy
        node.parent = parent
        node.tag = max(parent.virtual, 0)

    def move(self, node: Node, parent: Node) -> None:
        """Put a node with everything below it under another parent. What it is ahead of its old siblings comes along."""
        old = node.parent
        assert old is not None
        if old is parent:
            return
        serving = old.serving is node
        if serving:
            self._advance(old)  # a long lease is charged bit by bit, and time moves on at its next slice only
        ahead_ns = max(node.tag - old.virtual, 0) * node.weight // SCALE
        waiting = list(node.waiting)
        lingering = list(self._lingering(node))
        for leaf in lingering:
            self.forget(leaf)
        if serving:
            for above in node.path():
                self._leave_service(above)
        self._count(node, waiting, -1)
        for above in (*old.path(), self.root):
            self._settle(above)
        node.parent = parent
        node.tag = parent.virtual + ahead_ns * SCALE // node.weight
        if serving or lingering or any(waiting):
            for above in (
                parent.path()
            ):  # an idle one becomes busy by this, as in `want`: without credit for its absence
                if not above.is_busy and above.parent is not None:
                    above.tag = max(above.tag, above.parent.virtual)
        self._count(node, waiting, +1)
        if serving:
            for above in node.path():
                self._enter_service(above)
        for leaf in lingering:
            self.linger(leaf)

    def set_weight(self, node: Node, weight: int) -> None:
        """From the next charge on. How far it is ahead stays the same in nanoseconds."""
        parent = node.parent
        if parent is not None:
            if parent.serving is node:
                self._advance(parent)
            ahead = max(node.tag - parent.virtual, 0)
            node.tag = node.tag - ahead + ahead * node.weight // weight
        node.weight = weight
        self._requeue(node)

    def set_rank(self, leaf: Leaf, rank: int) -> None:
        """The leaf's own class; what it has waited counts on."""
        leaf.rank = rank
        if leaf.competes != AGED:
            self._recount(leaf, rank)

    # -- waiting

    def want(self, leaf: Leaf, now: int) -> None:
        """The leaf has something to do. Nothing happens if it waits already."""
        if leaf.wants:
            return
        assert not leaf.in_service
        for node in leaf.path():
            parent = node.parent
            assert parent is not None
            if not node.is_busy:
                node.tag = max(node.tag, parent.virtual)
        leaf.wants = True
        leaf.competes = leaf.rank
        leaf.waiting_since = now
        for node in leaf.path():
            if not node.is_waiting:
                node.ticket = next(self._stamps)
        counts = [0] * CLASSES
        counts[leaf.rank] = 1
        self._count(leaf, counts, +1)
        self._plan_aging(leaf)

    def unwant(self, leaf: Leaf) -> None:
        """The leaf has nothing to do any more, or is served now."""
        if not leaf.wants:
            return
        leaf.wants = False
        self._count(leaf, list(leaf.waiting), -1)
        self._settle_path(leaf)

    def age(self, now: int) -> None:
        """Raise those that have waited for long."""
        while self._aging and self._aging[0][0] <= now:
            _, _, leaf, since = heapq.heappop(self._aging)
            if leaf.wants and leaf.waiting_since == since:
                self._recount(leaf, AGED)

    def next_aging_ns(self) -> int | None:
        """When ``age`` has something to do."""
        while self._aging:
            due, _, leaf, since = self._aging[0]
            if leaf.wants and leaf.waiting_since == since:
                return due
            heapq.heappop(self._aging)
        return None

    def _plan_aging(self, leaf: Leaf) -> None:
        due = leaf.waiting_since + self.aging_ns
        heapq.heappush(self._aging, (due, next(self._stamps), leaf, leaf.waiting_since))

    # -- service

    def serve(self, leaf: Leaf) -> None:
        """The leaf is in service from now on. Nobody else may be."""
        assert self.root.serving is None
        leaf.in_service = True
        if leaf.wants:
            leaf.wants = False
            self._count(leaf, list(leaf.waiting), -1)
        for node in leaf.path():
            self._enter_service(node)

    def release(self, leaf: Leaf) -> None:
        """The leaf is not in service any more. Charge it before, or later with ``charge``."""
        if not leaf.in_service:
            return
        leaf.in_service = False
        for node in leaf.path():
            self._leave_service(node)
        self._settle_path(leaf)

    def linger(self, leaf: Leaf) -> None:
        """It was in service a moment ago and will say soon whether it goes on: until then it counts as busy."""
        if leaf.lingering:
            return
        for node in (*leaf.path(), self.root):
            node.lingering += 1
            if node.parent is not None:
                node.parent.limbo.add(node)

    def forget(self, leaf: Leaf) -> None:
        """It does not go on, or waits already."""
        if not leaf.lingering:
            return
        for node in (*leaf.path(), self.root):
            node.lingering -= 1
            if node.parent is not None and not node.lingering:
                node.parent.limbo.discard(node)
        self._settle_path(leaf)

    def charge(self, leaf: Leaf, used_ns: int) -> None:
        """Move the leaf's tag, and those above it, on by what it used; less than nothing corrects an estimate."""
        if used_ns == 0:
            return
        for node in leaf.path():
            parent = node.parent
            assert parent is not None
            node.tag += used_ns * SCALE // node.weight
            parent.furthest = max(parent.furthest, node.tag)
            self._requeue(node)
            self._settle(parent)

    def renew(self, leaf: Leaf) -> None:
        """The leaf in service begins its next slice: virtual times move on to its tags, as if it had been chosen anew."""
        for node in leaf.path():
            assert node.parent is not None
            self._advance(node.parent)

    def choose(self, ahead_ns: int = 0) -> Leaf | None:
        """Who is next, if the leaf in service will have used so much more; itself, if it would be chosen again."""
        node = self.root
        while not isinstance(node, Leaf):
            candidate = self._top(node)
            served = node.serving
            if (
                served is not None
                and (served.is_waiting or self._serves(served))
                and (candidate is None or self._key(served, ahead_ns) <= self._key(candidate))
            ):
                candidate = served
            if candidate is None:
                return None
            node = candidate
        return node

    # -- inside

    def _lingering(self, node: Node) -> Iterator[Leaf]:
        if isinstance(node, Leaf):
            yield from (node,) if node.lingering else ()
        else:
            for child in list(node.limbo):
                yield from self._lingering(child)

    @staticmethod
    def _serves(node: Node) -> bool:
        return node.serving is not None or (isinstance(node, Leaf) and node.in_service)

    def _key(self, node: Node, ahead_ns: int = 0) -> tuple[int, int]:
        urgency = node.urgency() if node.is_waiting else LOW
        if self._serves(node):
            leaf: Node = node
            while leaf.serving is not None:
                leaf = leaf.serving
            assert isinstance(leaf, Leaf)
            urgency = max(urgency, leaf.rank)
        if urgency == AGED:
            # The same for all, and no less than any preference: weight 1 is the lightest there is.
            return node.tag + ahead_ns * SCALE // node.weight - self.preference_ns[HIGH] * SCALE, node.ticket
        return node.tag + (ahead_ns - self.preference_ns[urgency]) * SCALE // node.weight, node.ticket

    def _requeue(self, node: Node) -> None:
        parent = node.parent
        node.stamp = next(self._stamps)
        if parent is None or parent.serving is node or not node.is_waiting:
            return
        if len(parent.heap) > parent.heap_limit:
            parent.heap = [e for e in parent.heap if e[2] == e[3].stamp]
            heapq.heapify(parent.heap)
            parent.heap_limit = 2 * len(parent.heap) + SMALLEST_HEAP
            parent.tags = [(e[3].tag, *e[1:]) for e in parent.heap]
            heapq.heapify(parent.tags)
        key, ticket = self._key(node)
        heapq.heappush(parent.heap, (key, ticket, node.stamp, node))
        heapq.heappush(parent.tags, (node.tag, ticket, node.stamp, node))

    def _top(self, node: Node) -> Node | None:
        return _first(node.heap, node)

    def _advance(self, node: Node) -> None:
        """Virtual time is the least tag of the busy children. Preference lets others overtake them, not time."""
        least = [child.tag for child in node.limbo]
        if node.serving is not None:
            least.append(node.serving.tag)
        waiting = _first(node.tags, node)
        if waiting is not None:
            least.append(waiting.tag)
        if least:
            node.virtual = max(node.virtual, min(least))

    def _count(self, node: Node, counts: list[int], sign: int) -> None:
        """Add to, or take from, the waiting counts of a node and of those above it."""
        for above in (node, *itertools.islice(node.path(), 1, None), self.root):
            for rank in range(CLASSES):
                above.waiting[rank] += sign * counts[rank]
            if above is not self.root:
                self._requeue(above)

    def _recount(self, leaf: Leaf, competes: int) -> None:
        if leaf.wants and competes != leaf.competes:
            counts = [0] * CLASSES
            counts[leaf.competes], counts[competes] = -1, 1
            leaf.competes = competes
            self._count(leaf, counts, +1)
        leaf.competes = competes

    def _enter_service(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        parent.serving = node
        node.stamp = next(self._stamps)  # out of the heap
        self._advance(parent)

    def _leave_service(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        if parent.serving is node:
            parent.serving = None
            if node.is_waiting:
                node.ticket = next(self._stamps)
            self._requeue(node)

    def _settle_path(self, leaf: Leaf) -> None:
        for node in leaf.path():
            assert node.parent is not None
            self._settle(node.parent)

    def _settle(self, node: Node) -> None:
        """At the end of a busy period virtual time is the greatest tag reached."""
        if not node.is_busy:
            node.virtual = max(node.virtual, node.furthest)


def _first(heap: list[tuple[int, int, int, Node]], parent: Node) -> Node | None:
    """The least entry that counts; what does not count is dropped on the way."""
    while heap:
        _, _, stamp, child = heap[0]
        if child.stamp == stamp and child.parent is parent and child.is_waiting:
            return child
        heapq.heappop(heap)
    return None
