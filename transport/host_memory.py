# SPDX-License-Identifier: Apache-2.0
"""The host's memory, and whether what VMs were promised of it as BAR1 can be kept: one rule for the fleet and for ``doctor``.

BAR1 is shared memory of the host that grows as VMs fill it, and that drivers pin. A promise is measured against all the
memory that there is (MemTotal): what cannot fit into that can never be kept, whatever else runs. What is free at the moment
(MemAvailable) changes with page cache and neighbours, and would let the same VM in now and not a minute later; ``doctor``
warns of it. Swap does not count, for pinned memory does not go there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import attrs

MEMINFO: Final = Path("/proc/meminfo")


@attrs.frozen
class HostMemory:
    """How much there is, and how much of it is free at the moment; 0 where the host does not say."""

    total_bytes: int
    available_bytes: int

    def can_promise(self, sizes: Iterable[int]) -> bool:
        """Do BAR1s of these sizes fit, all of them filled?"""
        return sum(sizes) <= self.total_bytes


def memory_from(text: str) -> HostMemory:
    """What ``/proc/meminfo`` says."""
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE))
    total, available = (int(found.get(name, 0)) * 1024 for name in ("MemTotal", "MemAvailable"))
    return HostMemory(total, available)


def host_memory() -> HostMemory:
    """This host's, now."""
    try:
        return memory_from(MEMINFO.read_text())
    except (OSError, UnicodeDecodeError):
        return HostMemory(0, 0)
