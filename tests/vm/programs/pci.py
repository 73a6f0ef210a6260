# SPDX-License-Identifier: Apache-2.0
"""In the guest: what PCI shows of a device (``pci.py ADDRESS``), as one JSON object. Needs root."""

from __future__ import annotations

import json
import mmap
import os
import sys
from pathlib import Path


def main() -> None:
    folder = Path("/sys/bus/pci/devices") / sys.argv[1]
    # No driver does it for us: memory decoding is off at power-on.
    (folder / "enable").write_text("1")
    shown: dict[str, str | None] = {
        name: (folder / name).read_text().strip() for name in ("vendor", "device", "class", "revision")
    }
    shown |= {
        f"subsystem_{name}": (folder / f"subsystem_{name}").read_text().strip()
        for name in ("vendor", "device")
    }
    for name in ("current_link_speed", "current_link_width", "reset_method"):
        path = folder / name
        shown[name] = path.read_text().strip() if path.exists() else None
    bars = []
    for number in (0, 1):
        descriptor = os.open(folder / f"resource{number}", os.O_RDWR | os.O_SYNC)
        size = os.fstat(descriptor).st_size
        with mmap.mmap(descriptor, min(size, 1 << 20)) as memory:
            bars.append(
                {
                    "size": size,
                    "begins": memory[:4].hex(),
                    "prefetchable": (folder / f"resource{number}_wc").exists(),
                }
            )
        os.close(descriptor)
    driver = folder / "driver"
    print(
        json.dumps(
            {
                **shown,
                "bars": bars,
                "reset": (folder / "reset").exists(),
                "driver": driver.resolve().name if driver.exists() else None,
            }
        )
    )


main()
