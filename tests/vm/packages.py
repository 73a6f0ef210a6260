# SPDX-License-Identifier: Apache-2.0
"""QEMU and a Linux kernel for the VM tests, in a private folder, from Debian packages.

Needs no root, no apt and no particular distribution, and changes nothing outside its folder: ``.cache/vm``, or
``VGPU_VM_CACHE``. What is there already is used at once; to get newer packages remove the folder. ``VGPU_VM_BUNDLE``
names an unpacked bundle (``packages.py bundle``) to use instead, on a machine that can reach no mirror. A QEMU of the
machine's own is used where it has the device that is needed.

As a script: ``packages.py fetch`` gets all of it, ``packages.py where`` says where it lies, ``packages.py bundle
FOLDER`` writes ``vm-bundle.tar.zst`` there.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import attrs
import zstandard

if __name__ == "__main__":  # run as a file, so the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.vm import debian

ROOT: Final = Path(__file__).resolve().parents[2]
SUITES: Final = ("trixie", "trixie-backports")
QEMU_SUITE: Final = "trixie-backports"
# What QEMU's packages want and a VM of ours never uses: network boot, and the tools of a whole Debian system.
UNUSED: Final = frozenset(
    {"ipxe-qemu", "adduser", "debconf", "dpkg", "passwd", "perl", "udev", "systemd", "uidmap"}
)
# Modules the guest's first minute needs; what they depend on follows by itself.
MODULES: Final = ("9pnet_virtio", "9p", "overlay", "virtio_console")
_ARCHITECTURE: Final = "x86_64-linux-gnu"
# Changes whenever what lies in the folder would be different.
_RECIPE: Final = 1
_FIRMWARE: Final = ("bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin", "pvh.bin", "vgabios-stdvga.bin")


@attrs.frozen
class Images:
    """What a VM is made of."""

    # The command that is QEMU, with everything it needs to find its libraries and firmware.
    qemu: tuple[str, ...]
    kernel: Path
    modules: tuple[Path, ...]  # in the order in which they load
    busybox: Path
    version: str

    @property
    def identity(self) -> str:
        """Differs where another QEMU or kernel would run."""
        return hashlib.sha256(" ".join([*self.qemu, str(self.kernel), self.version]).encode()).hexdigest()[
            :12
        ]


def cache_root() -> Path:
    """The folder everything is kept in; made if absent."""
    root = Path(os.environ.get("VGPU_VM_CACHE") or ROOT / ".cache" / "vm")
    root.mkdir(parents=True, exist_ok=True)
    return root


def _own_loader(libraries: Sequence[Path], program: Path, firmware: Sequence[Path]) -> tuple[str, ...]:
    """QEMU under the C library it was built against, whatever this machine's is."""
    loader = next(
        folder / "ld-linux-x86-64.so.2" for folder in libraries if (folder / "ld-linux-x86-64.so.2").exists()
    )
    words = [str(loader), "--inhibit-cache", "--library-path", ":".join(map(str, libraries))]
    words += ["--argv0", "qemu-system-x86_64", str(program)]
    for folder in firmware:
        words += ["-L", str(folder)]
    return tuple(words)


@functools.cache
def _machines_own() -> tuple[str, ...] | None:
    """A QEMU on the path that has the device."""
    found = shutil.which("qemu-system-x86_64")
    if found is None:
        return None
    done = subprocess.run(
        [found, "-device", "help"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    return (found,) if '"vfio-user-pci"' in done.stdout else None


def _describe(folder: Path) -> Images:
    """The images in a folder that :func:`_build` or a bundle filled."""
    described = json.loads((folder / "images.json").read_text())
    own = _machines_own() if described["kind"] == "fetched" else None
    return Images(
        qemu=own
        or _own_loader(
            [folder / name for name in described["libraries"]],
            folder / described["qemu"],
            [folder / name for name in described["firmware"]],
        ),
        kernel=folder / described["kernel"],
        modules=tuple(folder / name for name in described["modules"]),
        busybox=folder / described["busybox"],
        version=described["version"],
    )


def images() -> Images:
    """The images, fetched if need be; takes a minute or two then, and no time otherwise.

    Raises:
        DebianError, OSError: they are not there and could not be had.
    """
    bundle = os.environ.get("VGPU_VM_BUNDLE")
    if bundle:
        return _describe(Path(bundle).resolve())
    source = "kernel" if _machines_own() else "all"
    final = cache_root() / f"images-{_RECIPE}-{source}"
    if not (final / "images.json").exists():
        with _locked():
            if not (final / "images.json").exists():
                unfinished = Path(tempfile.mkdtemp(prefix=".images-", dir=cache_root()))
                try:
                    _build(unfinished, with_qemu=source == "all")
                    unfinished.chmod(0o755)
                    unfinished.rename(final)
                except BaseException:
                    shutil.rmtree(unfinished, ignore_errors=True)
                    raise
                shutil.rmtree(cache_root() / "downloads", ignore_errors=True)
    return _describe(final)


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    with (cache_root() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# -- filling the folder


def _plan(mirror: debian.Mirror) -> list[debian.Package]:
    """What to download: QEMU of the backports with all it needs, and of the stable release the rest."""
    packages = [
        p for suite in SUITES for p in debian.parse_index(mirror.index(suite, "main", "amd64"), suite)
    ]
    prefer = {name: QEMU_SUITE for name in ("qemu-system-x86", "qemu-system-common", "qemu-system-data")}
    stable = SUITES[0]
    image = debian.resolve(
        ["linux-image-amd64"], packages, prefer={"linux-image-amd64": stable},
        skip=frozenset({"kmod", "linux-base", "initramfs-tools", "linux-initramfs-tool"}),
    )  # fmt: skip
    kernel = [p for p in image if re.fullmatch(r"linux-image-\d.*-amd64", p.name)]
    if len(kernel) != 1:
        raise debian.DebianError(f"linux-image-amd64 of {stable} names no kernel: {[p.name for p in image]}")
    others = debian.resolve(["qemu-system-x86", "busybox-static"], packages, prefer=prefer, skip=UNUSED)
    return [*kernel, *others]


def _fetch() -> tuple[list[debian.Package], dict[str, Path]]:
    """The packages, from the first mirror that answers."""
    mirrors = debian.mirrors()
    for url in mirrors:
        mirror = debian.Mirror(url, cache_root() / "downloads")
        try:
            plan = _plan(mirror)
        except (OSError, debian.DebianError) as error:
            if url == mirrors[-1]:
                raise
            print(f"vm: {url}: {error}; trying the next mirror", file=sys.stderr)
            continue
        size = sum(package.size for package in plan)
        print(f"vm: fetching QEMU and a kernel, {len(plan)} packages, {size >> 20} MiB", file=sys.stderr)
        return plan, mirror.fetch_all(plan, lambda package: None)
    raise AssertionError("there is always a mirror")


_NEEDED_OF_QEMU: Final = re.compile(
    rf"usr/bin/qemu-system-x86_64$|usr/lib/{_ARCHITECTURE}/(pulseaudio/)?[^/]+\.so(\.[\w.]+)?$"
    rf"|usr/lib64/.*|usr/share/(qemu|seabios)/({'|'.join(map(re.escape, _FIRMWARE))})$"
)


def _build(folder: Path, *, with_qemu: bool) -> None:
    """Fill ``folder`` and write ``images.json`` in it, last."""
    began = time.monotonic()
    plan, archives = _fetch()
    fetched = time.monotonic()
    kernel = plan[0]
    for package in plan[1:]:
        if package.name == "busybox-static":
            debian.unpack(archives[package.name], folder, lambda name: name.endswith("bin/busybox"))
        elif with_qemu:
            debian.unpack(archives[package.name], folder, lambda name: bool(_NEEDED_OF_QEMU.match(name)))
    modules = _unpack_kernel(archives[kernel.name], folder)
    (busybox,) = (path for path in folder.rglob("busybox") if path.is_file())
    library = folder / "usr" / "lib" / _ARCHITECTURE
    # Some libraries lie in folders of their own and are found by the path that their users have in them.
    nested = sorted({path.parent for path in library.rglob("*.so*") if path.parent != library})
    described = {
        "kind": "fetched",
        "qemu": "usr/bin/qemu-system-x86_64",
        "libraries": [str(path.relative_to(folder)) for path in (library, *nested)],
        "firmware": ["usr/share/qemu", "usr/share/seabios"],
        "kernel": "kernel/vmlinuz",
        "modules": [str(path.relative_to(folder)) for path in modules],
        "busybox": str(busybox.relative_to(folder)),
        "version": " ".join(
            f"{p.name}={p.version}" for p in plan if p.name in ("qemu-system-x86", kernel.name)
        ),
    }
    (folder / "images.json").write_text(json.dumps(described, indent=1))
    done = time.monotonic()
    print(f"vm: fetched in {fetched - began:.0f} s, unpacked in {done - fetched:.0f} s", file=sys.stderr)


def module_dependencies(content: bytes) -> list[str]:
    """The modules that a ``.ko`` says it needs."""
    found = re.search(rb"\0depends=([\w,-]*)\0", content)
    return [name for name in found[1].decode().split(",") if name] if found else []


def _unpack_kernel(archive: Path, folder: Path) -> list[Path]:
    """The kernel, and of its modules those that are wanted with those they need, in loading order."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        found = debian.unpack(
            archive,
            Path(scratch),
            lambda name: bool(re.search(r"^boot/vmlinuz|\.ko(\.xz)?$|/modules\.builtin$", name)),
        )
        (listing,) = (path for path in found if path.name == "modules.builtin")
        built_in = {Path(line).stem.replace("-", "_") for line in listing.read_text().splitlines()}
        (vmlinuz,) = (path for path in found if path.name.startswith("vmlinuz"))
        by_name = {
            path.name.partition(".")[0].replace("-", "_"): path for path in found if ".ko" in path.name
        }
        target = folder / "kernel"
        target.mkdir()
        shutil.move(vmlinuz, target / "vmlinuz")
        loaded: dict[str, Path] = {}

        def load(name: str) -> None:
            if name in loaded or name in built_in:
                return
            if name not in by_name:
                raise debian.DebianError(f"the kernel has no module {name}")
            path = by_name[name]
            content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
            for needed in module_dependencies(content):
                load(needed.replace("-", "_"))
            loaded[name] = target / f"{name}.ko"
            loaded[name].write_bytes(content)

        for name in MODULES:
            load(name)
    return list(loaded.values())


# -- for another machine


def bundle(destination: Path) -> Path:
    """Write ``vm-bundle.tar.zst``: what :func:`images` gives, and only the libraries that QEMU loads.

    On the other machine: unpack it, and set ``VGPU_VM_BUNDLE`` to the folder.

    Raises:
        DebianError: the QEMU here is the machine's own, whose libraries are not ours to carry.
    """
    source = images()
    if len(source.qemu) == 1:
        raise debian.DebianError("QEMU of this machine is in use; only a fetched one can be bundled")
    loader, options, program = source.qemu[0], source.qemu[1:6], Path(source.qemu[6])
    listing = subprocess.run(
        [loader, *options[:3], "--list", str(program)], capture_output=True, text=True, check=True
    )
    libraries = {Path(found) for found in re.findall(r"=> (/\S+)", listing.stdout)} | {Path(loader)}
    firmware = [Path(folder) / name for folder in source.qemu[8::2] for name in _FIRMWARE]
    places = {
        "qemu/qemu-system-x86_64": program,
        "kernel/vmlinuz": source.kernel,
        "busybox": source.busybox,
        **{f"kernel/{path.name}": path for path in source.modules},
        **{f"lib/{path.name}": path for path in libraries},
        **{f"share/{path.name}": path for path in firmware if path.exists()},
    }
    described = {
        "kind": "bundle",
        "qemu": "qemu/qemu-system-x86_64",
        "libraries": ["lib"],
        "firmware": ["share"],
        "kernel": "kernel/vmlinuz",
        "modules": [f"kernel/{path.name}" for path in source.modules],
        "busybox": "busybox",
        "version": source.version,
    }
    destination.mkdir(parents=True, exist_ok=True)
    final = destination / "vm-bundle.tar.zst"
    with tempfile.TemporaryDirectory() as scratch, final.open("wb") as sink:
        description = Path(scratch) / "images.json"
        description.write_text(json.dumps(described, indent=1))
        compressor = zstandard.ZstdCompressor(level=19, threads=-1)
        with compressor.stream_writer(sink) as stream, tarfile.open(fileobj=stream, mode="w|") as archive:
            for name, path in sorted({**places, "images.json": description}.items()):
                archive.add(path.resolve(), f"vm/{name}")
    return final


def main(arguments: Sequence[str]) -> int:
    """The command line; 2 when it is wrong."""
    match list(arguments):
        case ["fetch"]:
            images()
        case ["where"]:
            found = images()
            print(f"qemu\t{' '.join(found.qemu)}\nkernel\t{found.kernel}\nversion\t{found.version}")
        case ["bundle", folder]:
            print(bundle(Path(folder)))
        case _:
            print("usage: packages.py fetch|where|bundle FOLDER", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
