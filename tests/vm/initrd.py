# SPDX-License-Identifier: Apache-2.0
"""The initial file system of a test VM: busybox, a few modules, ``init.sh`` and the agent. A cpio archive, gzipped."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Final

from tests.vm.packages import Images

HERE: Final = Path(__file__).resolve().parent


def _entry(number: int, name: str, mode: int, content: bytes) -> bytes:
    """One file of a cpio archive, "newc" format: 13 numbers of 8 hexadecimal digits, name, content, each padded to 4."""
    label = name.encode() + b"\0"
    #        inode   mode  uid gid links mtime size         device and special device     length of the name, sum
    fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(label), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + label
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)


def build(images: Images) -> bytes:
    """The archive; the same images and sources give the same bytes."""
    files = {
        "init": (0o100755, (HERE / "init.sh").read_bytes()),
        "agent.py": (0o100644, (HERE / "agent.py").read_bytes()),
        "bin/busybox": (0o100755, images.busybox.read_bytes()),
        "modules/order": (0o100644, "\n".join(path.name for path in images.modules).encode()),
        **{f"modules/{path.name}": (0o100644, path.read_bytes()) for path in images.modules},
    }
    archive = io.BytesIO()
    number = 1
    for folder in ("bin", "modules", "dev"):
        archive.write(_entry(number, folder, 0o040755, b""))
        number += 1
    for name, (mode, content) in files.items():
        archive.write(_entry(number, name, mode, content))
        number += 1
    archive.write(_entry(0, "TRAILER!!!", 0, b""))
    return gzip.compress(archive.getvalue(), 6, mtime=0)
