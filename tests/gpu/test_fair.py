# SPDX-License-Identifier: Apache-2.0
"""The fair tree: shares at every level, returning members, preference, aging, moves; and the theorem of the paper."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vgpu.gpu.fair import AGED, HIGH, LOW, MEDIUM, SCALE, FairTree, Leaf, Node

MS = 1_000_000
AGING = 100 * MS


class Tree:
    """A fair tree with named leaves, each below a node of its own below a pool, as VMs are."""

    def __init__(self, **leaves: tuple[str, int, int, int]) -> None:
        """name=(pool, pool weight, weight, rank)."""
        self.tree = FairTree((-4 * MS, 0, 20 * MS), AGING)
        self.pools: dict[str, Node] = {}
        self.leaves: dict[str, Leaf] = {}
        self.used = dict.fromkeys(leaves, 0)
        self.now = 0
        for name, (pool, pool_weight, weight, rank) in leaves.items():
            if pool not in self.pools:
                self.pools[pool] = Node(pool, pool_weight)
                self.tree.attach(self.pools[pool], self.tree.root)
            vm = Node(name, weight)
            self.tree.attach(vm, self.pools[pool])
            leaf = Leaf(name, 1, rank=rank, competes=rank)
            self.tree.attach(leaf, vm)
            self.leaves[name] = leaf

    def want(self, *names: str) -> None:
        for name in names:
            self.tree.want(self.leaves[name], self.now)

    def turn(self, length: int) -> str:
        """Serve whoever is next for so long; it goes on wanting. Its name."""
        self.tree.age(self.now)
        leaf = self.tree.choose()
        assert leaf is not None
        self.tree.serve(leaf)
        self.now += length
        self.tree.charge(leaf, length)
        self.tree.linger(leaf)
        self.tree.release(leaf)
        self.tree.want(leaf, self.now)
        self.tree.forget(leaf)
        self.used[leaf.name] += length
        return leaf.name

    def share(self, name: str) -> float:
        return self.used[name] / sum(self.used.values())


def test_shares_follow_weights_at_every_level() -> None:
    tree = Tree(a=("p", 30, 3, MEDIUM), b=("p", 30, 1, MEDIUM), c=("q", 10, 5, MEDIUM))
    tree.want("a", "b", "c")
    for _ in range(4000):
        tree.turn(2 * MS)
    assert tree.share("a") == pytest.approx(0.5625, abs=0.002)
    assert tree.share("b") == pytest.approx(0.1875, abs=0.002)
    assert tree.share("c") == pytest.approx(0.25, abs=0.002)


def test_what_an_idle_one_leaves_goes_to_its_siblings_first() -> None:
    tree = Tree(a=("p", 1, 1, MEDIUM), b=("p", 1, 1, MEDIUM), c=("q", 1, 1, MEDIUM))
    tree.want("a", "c")
    for _ in range(1000):
        tree.turn(MS)
    assert tree.share("a") == pytest.approx(0.5, abs=0.002)


def test_a_returning_one_has_neither_credit_nor_debt() -> None:
    tree = Tree(a=("p", 1, 1, MEDIUM), b=("p", 1, 1, MEDIUM))
    tree.want("a")
    for _ in range(1000):
        tree.turn(MS)
    tree.want("b")
    tree.used = {"a": 0, "b": 0}
    order = [tree.turn(MS) for _ in range(10)]
    assert order.count("a") == 5
    assert "bb" not in "".join(order)


def test_who_is_preferred_goes_first_but_gets_no_more() -> None:
    tree = Tree(a=("p", 1, 1, HIGH), b=("p", 1, 1, MEDIUM), c=("p", 1, 1, LOW))
    tree.want("a", "b", "c")
    order = [tree.turn(2 * MS) for _ in range(9)]
    assert order == ["a"] * 9
    for _ in range(3000):
        tree.turn(2 * MS)
    for name in "abc":
        assert tree.share(name) == pytest.approx(1 / 3, abs=0.005)


def test_preference_reaches_across_pools_and_pools_keep_their_shares() -> None:
    tree = Tree(a=("p", 1, 1, MEDIUM), b=("q", 1, 1, HIGH))
    tree.want("a")
    tree.turn(MS)
    tree.want("b")
    assert tree.tree.choose() is tree.leaves["b"]
    for _ in range(2000):
        tree.turn(MS)
    assert tree.share("b") == pytest.approx(0.5, abs=0.01)


def test_who_has_waited_goes_before_who_has_not() -> None:
    tree = Tree(a=("p", 1, 1, LOW))
    leaf = tree.leaves["a"]
    tree.want("a")
    assert tree.tree.next_aging_ns() == AGING
    tree.tree.age(AGING)
    assert leaf.competes == AGED
    assert tree.tree.next_aging_ns() is None
    tree.turn(MS)
    assert leaf.competes == LOW


def test_low_waits_no_longer_than_it_says_behind_endless_newcomers() -> None:
    """Each newcomer begins at the virtual time, which does not move while only newcomers are served. Aging ends that."""
    tree = Tree(low=("p", 1, 1, LOW))
    vm = tree.pools["p"]
    tree.want("low")
    for number in range(1000):
        newcomer = Leaf(f"n{number}", 1, rank=MEDIUM, competes=MEDIUM)
        node = Node(newcomer.name, 1)
        tree.tree.attach(node, vm)
        tree.tree.attach(newcomer, node)
        tree.tree.want(newcomer, tree.now)
        tree.tree.age(tree.now)
        leaf = tree.tree.choose()
        assert leaf is not None
        if leaf.name == "low":
            break
        tree.tree.serve(leaf)
        tree.now += 2 * MS
        tree.tree.charge(leaf, 2 * MS)
        tree.tree.release(leaf)
    assert tree.now <= AGING + 2 * MS


def test_a_move_takes_along_what_somebody_is_ahead_and_what_waits() -> None:
    tree = Tree(a=("p", 1, 2, MEDIUM), b=("p", 1, 1, MEDIUM), c=("q", 1, 1, MEDIUM))
    tree.want("a", "b", "c")
    for _ in range(300):
        tree.turn(MS)
    vm = tree.leaves["a"].parent
    assert vm is not None
    ahead = (vm.tag - tree.pools["p"].virtual) * vm.weight // SCALE
    tree.tree.move(vm, tree.pools["q"])
    assert (vm.tag - tree.pools["q"].virtual) * vm.weight // SCALE == pytest.approx(ahead, abs=1)
    tree.used = dict.fromkeys("abc", 0)
    for _ in range(3000):
        tree.turn(MS)
    assert [tree.share(n) for n in "abc"] == pytest.approx([1 / 3, 1 / 2, 1 / 6], abs=0.005)


def test_a_move_into_an_idle_pool_brings_no_credit_for_the_pools_absence() -> None:
    tree = Tree(a=("p", 1, 1, MEDIUM), b=("p", 1, 1, MEDIUM), idle=("q", 4, 1, MEDIUM))
    tree.tree.aging_ns = 1 << 62  # or it would hide that somebody starves
    tree.want("a", "b")
    for _ in range(300):
        tree.turn(MS)
    vm = tree.leaves["a"].parent
    assert vm is not None
    for target, share in (("q", 0.8), ("p", 0.5), ("q", 0.8)):
        tree.tree.move(vm, tree.pools[target])
        tree.used = dict.fromkeys(tree.used, 0)
        assert "b" in [tree.turn(MS) for _ in range(6)]
        for _ in range(994):
            tree.turn(MS)
        assert tree.share("a") == pytest.approx(share, abs=0.005)


def test_a_move_or_a_new_weight_in_the_middle_of_a_long_lease_is_no_debt() -> None:
    """What is charged bit by bit under one lease is nothing that its holder is ahead of those in another pool."""
    tree = Tree(a=("p", 1, 1, MEDIUM), b=("q", 1, 1, MEDIUM))
    tree.tree.aging_ns = 1 << 62
    leaf = tree.leaves["a"]
    vm = leaf.parent
    assert vm is not None
    tree.want("a", "b")
    tree.tree.serve(leaf)
    for _ in range(500):
        tree.tree.charge(leaf, MS)
    tree.tree.set_weight(vm, 2)
    tree.tree.move(vm, tree.pools["q"])
    tree.tree.linger(leaf)
    tree.tree.release(leaf)
    tree.want("a")
    tree.tree.forget(leaf)
    for _ in range(30):
        tree.turn(MS)
    assert tree.share("a") == pytest.approx(2 / 3, abs=0.05)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 1000), st.integers(20_000, 5 * MS)), min_size=2, max_size=6),
    st.integers(0, 2**32),
)
def test_the_fairness_theorem_holds_in_every_interval(members: list[tuple[int, int]], seed: int) -> None:
    """|W_f/w_f - W_g/w_g| <= l_f/w_f + l_g/w_g while both are busy (Goyal, Vin, Cheng, theorem 1), l the longest service."""
    draw = random.Random(seed)
    names = [f"m{i}" for i in range(len(members))]
    tree = Tree(**{n: ("p", 1, w, MEDIUM) for n, (w, _) in zip(names, members, strict=True)})
    tree.tree.aging_ns = 1 << 62  # the theorem is about start tags alone
    tree.want(*names)
    longest = dict.fromkeys(names, 0)
    history = [dict(tree.used)]
    for _ in range(200):
        chosen = tree.tree.choose()
        assert chosen is not None
        limit = members[names.index(chosen.name)][1]
        length = draw.randint(limit // 2, limit)
        assert tree.turn(length) == chosen.name
        longest[chosen.name] = max(longest[chosen.name], length)
        history.append(dict(tree.used))
    weight = {n: w for n, (w, _) in zip(names, members, strict=True)}
    for f in names:
        for g in names:
            bound = longest[f] / weight[f] + longest[g] / weight[g] + 2
            ahead = [u[f] / weight[f] - u[g] / weight[g] for u in history]
            # The greatest rise over any interval.
            lowest = ahead[0]
            for value in ahead:
                lowest = min(lowest, value)
                assert value - lowest <= bound
