# SPDX-License-Identifier: Apache-2.0
"""Examples for the ``--help`` of each of ``vgpu-admin``'s commands. A test has every one of them read by the real parser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

EXAMPLES: Final[Mapping[str, tuple[str, ...]]] = {
    "register-vm": (
        "vgpu-admin register-vm --vm-name=user1 --pool=A --priority=high --memory=20GiB",
        "vgpu-admin register-vm --vm-name=user2 --bus=pcie --bar1=1GiB --slots=16",
        "vgpu-admin register-vm --vm-name=batch --no-device --rate=200 --watchdog=5m",
    ),
    "unregister-vm": ("vgpu-admin unregister-vm --vm-name=user1",),
    "list-vms": ("vgpu-admin list-vms", "vgpu-admin list-vms --json"),
    "show-vm": ("vgpu-admin show-vm --vm-name=user1",),
    "set-weight": ("vgpu-admin set-weight --vm-name=user1 --weight=80",),
    "set-priority": ("vgpu-admin set-priority --vm-name=user1 --priority=low",),
    "set-rate-limit": (
        "vgpu-admin set-rate-limit --vm-name=user1 --rate=200 --queue-depth=100",
        "vgpu-admin set-rate-limit --vm-name=user1 --bytes-per-second=1GiB",
        "vgpu-admin set-rate-limit --vm-name=user1 --rate=0          # no limit any more",
    ),
    "set-memory": (
        "vgpu-admin set-memory --vm-name=user1 --memory=8GiB",
        "vgpu-admin set-memory --vm-name=user1 --memory=60GiB --overcommit",
    ),
    "set-limits": ("vgpu-admin set-limits --vm-name=user1 --max-sessions=16 --max-arena=8GiB",),
    "set-watchdog": ("vgpu-admin set-watchdog --vm-name=user1 --watchdog=2m",),
    "set-pool": ("vgpu-admin set-pool --vm-name=user1 --pool=B",),
    "create-pool": ("vgpu-admin create-pool --pool=night --weight=20",),
    "list-pools": ("vgpu-admin list-pools",),
    "set-pool-weight": ("vgpu-admin set-pool-weight --pool=night --weight=60",),
    "delete-pool": ("vgpu-admin delete-pool --pool=night",),
    "list-sessions": ("vgpu-admin list-sessions", "vgpu-admin list-sessions --all --json"),
    "kill-session": ("vgpu-admin kill-session 12",),
    "show-health": ("vgpu-admin show-health", "vgpu-admin show-health --json"),
    "show-faults": (
        "vgpu-admin show-faults --vm-name=user1 --limit=10",
        "vgpu-admin show-faults --fault=3          # with its session's last calls",
    ),
    "quarantine": ("vgpu-admin quarantine --vm-name=user1 --reason='mines coins'",),
    "clear-quarantine": ("vgpu-admin clear-quarantine --vm-name=user1",),
    "list-quarantines": ("vgpu-admin list-quarantines --all",),
    "set-quarantine-rule": (
        "vgpu-admin set-quarantine-rule --vm-name=user1 --faults=5 --within=1h",
        "vgpu-admin set-quarantine-rule --vm-name=user1 --faults=0          # never by itself",
        "vgpu-admin set-quarantine-rule --vm-name=user1 --default",
    ),
    "tree": ("vgpu-admin tree",),
    "show-metrics": ("vgpu-admin show-metrics", "vgpu-admin show-metrics --json"),
    "top": ("vgpu-admin top", "vgpu-admin top --once --json", "vgpu-admin top --interval=5"),
    "reload": ("vgpu-admin reload",),
    "doctor": ("vgpu-admin doctor", "vgpu-admin doctor --qemu=/opt/qemu/bin/qemu-system-x86_64 --json"),
}
