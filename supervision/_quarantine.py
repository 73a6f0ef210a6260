# SPDX-License-Identifier: Apache-2.0
"""Has a VM made so many faults that it is to be kept away? A pure core: a sliding window over the times of its faults.

Times are seconds of the wall clock, for they are kept across restarts of the host. A clock that was set
back leaves faults in the future; those of the next window's length count, others are nobody's.
"""

from __future__ import annotations

from collections.abc import Iterable

from vgpu.actors.fault_messages import QuarantineRule

__all__ = ["reached"]


def reached(rule: QuarantineRule, times: Iterable[float], now: float) -> int:
    """How many faults count at ``now``, if they are as many as the rule takes; else 0."""
    if rule.faults <= 0:
        return 0
    counted = sum(1 for at in times if now - rule.seconds < at <= now + rule.seconds)
    return counted if counted >= rule.faults else 0
