# SPDX-License-Identifier: Apache-2.0
"""A bundle of the guest's parts and a made-up system to install it into: folders that stand for a VM's root."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

import attrs

from vgpu.transport import layout
from vgpu.transport._generated_calls import TABLE_HASH

ROOT = Path(__file__).resolve().parents[3]
GUEST = ROOT / "shim" / "guest"
SHELL = shutil.which("dash") or "/bin/sh"
REAL_PARTS = ("libvgpu-exec", "vgpu-guest-agent", "vgpu-guest-probe")

SLOTS = 4
PAGE = 4096
DIRECTORY = layout.DIRECTORY_OFFSET
RELEASE = 0x10
READY, RELEASING = 2, 5

# Answers as told by the environment: what cuInit and nvmlInit return, and whether cuInit ever comes back.
FAKE_LIBRARY = r"""
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static int told(const char *name) { const char *text = getenv(name); return text ? atoi(text) : 0; }
int cuInit(unsigned flags) { (void)flags; while (told("FAKE_HANG")) pause(); return told("FAKE_CUDA"); }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *name, int length, int device) { (void)device; strncpy(name, "Fake H200", (size_t)length); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { (void)device; *bytes = (size_t)20 << 30; return 0; }
int cuGetErrorName(int error, const char **name) { (void)error; *name = "CUDA_ERROR_FAKE"; return 0; }
int nvmlInit_v2(void) { return told("FAKE_NVML"); }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned length) { strncpy(text, "580.159.04", length); return 0; }
const char *nvmlErrorString(int error) { (void)error; return "Fake"; }
"""


def compile_library(source: str, name: str, folder: Path) -> None:
    """A shared library of this soname."""
    subprocess.run(
        ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-x", "c", "-", "-o", str(folder / name)],
        input=source,
        text=True,
        check=True,
    )


def make_bundle(folder: Path, parts: Path, version: str = "1.0") -> Path:
    """The layout of a bundle; returns its install.sh."""
    guest, prebuilt = folder / "shim" / "guest", folder / "prebuilt"
    guest.mkdir(parents=True)
    for script in GUEST.glob("*.sh"):
        shutil.copy(script, guest)
    (guest / "VERSION").write_text(f"{version}\n")
    shutil.copytree(parts, prebuilt, symlinks=True)
    for link in (prebuilt / "libcuda.so", prebuilt / "libnvidia-ml.so"):
        link.unlink(missing_ok=True)
    names = sorted(path.name for path in prebuilt.iterdir() if path.name != "GLIBC")
    sums = (f"{hashlib.sha256((prebuilt / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    (prebuilt / "SHA256SUMS").write_text("".join(sums))
    return guest / "install.sh"


def snapshot(folder: Path) -> dict[str, tuple[object, ...]]:
    """Everything below a folder: kind, mode, and content; and times of files, which a restored copy has to have too."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_dir():
            found[name] = ("dir", status.st_mode)
        else:
            content = path.read_bytes() if path.is_file() else b""
            found[name] = (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, content)
    return found


@attrs.frozen
class Machine:
    """A system's root folder, made up."""

    root: Path

    def write(self, name: str, text: str = "", mode: int = 0o644) -> Path:
        path = self.root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    def read(self, name: str) -> str:
        return (self.root / name.lstrip("/")).read_text()

    def has(self, name: str) -> bool:
        return os.path.lexists(self.root / name.lstrip("/"))

    def add_device(
        self, address: str = "0000:00:05.0", bar0: int = PAGE * (SLOTS + 1), **attributes: str
    ) -> Path:
        """A PCI device in sysfs, where it appears whole; a virtual GPU unless the attributes say otherwise."""
        place = self.root / "sys/bus/pci/devices" / address
        folder = self.root / "sys/bus/pci/appearing" / address
        values = {
            "vendor": "0x10de", "device": "0x2331", "class": "0x030200",
            "subsystem_vendor": "0x10de", "subsystem_device": "0x16c1", "enable": "1", **attributes,
        }  # fmt: skip
        folder.mkdir(parents=True)
        for name, value in values.items():
            (folder / name).write_text(f"{value}\n")
        (folder / "resource0").write_bytes(b"")
        os.truncate(folder / "resource0", bar0)
        (folder / "resource1").write_bytes(make_bar1())
        (folder / "resource1_wc").write_bytes(b"")
        for name in ("resource0", "resource1", "resource1_wc"):
            (folder / name).chmod(0o600)
        place.parent.mkdir(parents=True, exist_ok=True)
        return folder.rename(place)


def make_bar1(
    *,
    status: int = 1,
    states: tuple[tuple[int, int, int], ...] = (),
    version: int = 1,
    table_hash: int | None = None,
    device_state: int = 0,
    throttle: int = 0,
    magic: bytes = b"VGPUDIR1",
) -> bytes:
    """The start of BAR1: device page and directory. ``states``: token, pid and state of the first slots."""
    memory = bytearray(65536)

    def put(base: int, fields: dict[str, tuple[int, str]], **values: int) -> None:
        for name, value in values.items():
            offset, kind = fields[name]
            struct.pack_into(f"<{kind}", memory, base + offset, value)

    put(
        0, layout.DEVICE_FIELDS, magic=layout.SEGMENT_MAGIC, total_memory_bytes=20 << 30,
        device_state=device_state, throttle_reasons=throttle,
    )  # fmt: skip
    offset, _ = layout.DEVICE_TEXTS["name"]
    memory[offset : offset + 9] = b"Fake H200"
    put(
        DIRECTORY, layout.DIRECTORY_FIELDS, magic=int.from_bytes(magic, "little"), layout_version=version,
        table_hash=TABLE_HASH if table_hash is None else table_hash, slot_count=SLOTS, status=status,
    )  # fmt: skip
    for number, (token, pid, state) in enumerate(states):
        at = DIRECTORY + layout.DIRECTORY_HEAD_SIZE + layout.DIRECTORY_SLOT_SIZE * number
        put(at, layout.DIRECTORY_SLOT_FIELDS, token=token, pid=pid, state=state)
    return bytes(memory)


def run(
    script: Path, *words: str | Path, environment: Mapping[str, str] | None = None, home: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """install.sh with an environment of its own."""
    base = {"PATH": os.environ["PATH"], "HOME": str(home or "/nonexistent")}
    return subprocess.run(
        [SHELL, str(script), *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**base, **(environment or {})},
    )
