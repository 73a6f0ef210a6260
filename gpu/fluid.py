# SPDX-License-Identifier: Apache-2.0
"""The ideal to measure a scheduler by: hierarchical generalised processor sharing, and two figures of fairness.

GPS (A. K. Parekh and R. G. Gallager, IEEE/ACM Transactions on Networking 1, 1993) serves every busy member at once, each at
its weight's part of the whole; what an idle one does not use goes to its busy siblings first. No machine that runs one
kernel after another can do that; how far one is behind it is the lag. Pure; times are nanoseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs


def jain_index(shares: Sequence[float], weights: Sequence[float]) -> float:
    """Jain's index over share by weight: 1 where everybody has what its weight says, 1/n where one has all.

    R. Jain, D. Chiu and W. Hawe, "A Quantitative Measure of Fairness", DEC-TR-301, 1984. Raises ValueError for nobody.
    """
    ratios = [share / weight for share, weight in zip(shares, weights, strict=True)]
    squares = sum(r * r for r in ratios)
    if not ratios or squares == 0:
        raise ValueError("nobody got anything")
    return sum(ratios) ** 2 / (len(ratios) * squares)


@attrs.define(eq=False)
class FluidMember:
    """A VM under GPS. ``backlog_ns`` None: always busy."""

    pool: str
    weight: float
    backlog_ns: float | None = 0.0
    service_ns: float = 0.0

    @property
    def is_busy(self) -> bool:
        """Has it work?"""
        return self.backlog_ns is None or self.backlog_ns > 1e-6


@attrs.define(eq=False)
class Fluid:
    """Pools by weight, their members by weight, all served at once. The whole serves one nanosecond a nanosecond."""

    pools: Mapping[str, float]
    members: dict[str, FluidMember]
    now: float = 0.0

    def rates(self) -> dict[str, float]:
        """What part of the whole each busy member gets now."""
        busy = {name: m for name, m in self.members.items() if m.is_busy}
        pools: dict[str, float] = {}
        for member in busy.values():
            pools[member.pool] = pools.get(member.pool, 0.0) + member.weight
        total = sum(self.pools[pool] for pool in pools)
        return {n: self.pools[m.pool] / total * m.weight / pools[m.pool] for n, m in busy.items()}

    def arrive(self, name: str, work_ns: float) -> None:
        """Work for a member, now."""
        member = self.members[name]
        if member.backlog_ns is not None:
            member.backlog_ns += work_ns

    def advance(self, until: float) -> None:
        """Serve up to that time."""
        while self.now < until:
            rates = self.rates()
            step = until - self.now
            for name, rate in rates.items():
                left = self.members[name].backlog_ns
                if left is not None:
                    step = min(step, left / rate)
            for name, rate in rates.items():
                member = self.members[name]
                member.service_ns += rate * step
                if member.backlog_ns is not None:
                    member.backlog_ns = max(member.backlog_ns - rate * step, 0.0)
            self.now = until if step >= until - self.now else self.now + max(step, 1e-3)
