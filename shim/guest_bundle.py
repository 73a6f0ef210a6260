# SPDX-License-Identifier: Apache-2.0
"""One archive with all that a VM needs: the installer, the built libraries, and what it takes to build them there.

Sources go in from a checkout; an installed package has none, and then the VM uses the built ones. Those ask for a C library
not older than the newest symbol they use: that version goes in as ``GLIBC``, and the installer builds from source where a
VM's is older. Never puts a half-written archive at its place, and the same inputs make the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import tarfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

PARTS = (
    "libcuda.so.1",
    "libnvidia-ml.so.1",
    "libvgpu-exec.so",
    "nvidia-smi",
    "vgpu-guest-agent",
    "vgpu-guest-probe",
)
SCRIPTS = ("build.sh", "check.sh", "files.sh", "install.sh", "ollama.sh", "system.sh")
# What build.sh compiles, and what that includes. One folder deep, as the globs of build.sh are.
SOURCES = ("shim/libcuda", "shim/libnvidia_ml", "shim/exec", "shim/guest", "transport")
SOURCE_SUFFIXES = {".c", ".h", ".map"}
GLIBC_SYMBOL = re.compile(rb"GLIBC_(\d+)\.(\d+)(?:\.\d+)?\0")

README = """vgpu-guest {version}: the virtual GPU's side inside a VM.

    sudo ./install.sh                   install (with Ollama: --with-ollama)
    ./install.sh --check                what works, what does not, and what to do about it
    sudo ./install.sh --uninstall       take it out again
    ./install.sh --help                 the rest, and docs/vm/guest.md in full

It needs Linux on x86-64 with glibc {glibc} or newer, or gcc to build the libraries on an older one. After the installation
this folder is not needed any more: `vgpu-guest check` and `vgpu-guest uninstall` are installed too.
"""


class BundleError(RuntimeError):
    """There is nothing to make a bundle of; the message says how to build it."""


def glibc_needed(binaries: list[bytes]) -> str:
    """The newest glibc version that ELF files ask for, by the version names in their string tables, as ``2.34``."""
    versions = {
        (int(major), int(minor)) for binary in binaries for major, minor in GLIBC_SYMBOL.findall(binary)
    }
    major, minor = max(versions, default=(2, 17))
    return f"{major}.{minor}"


def built_parts(shim: Path) -> dict[str, Path]:
    """The built files by name, of one folder, so that they belong together; ``shim`` is this room's folder.

    Raises:
        BundleError: one is missing everywhere.
    """
    places = (shim.parent / "build" / "native", shim / "lib")
    missing = {folder: [part for part in PARTS if not (folder / part).is_file()] for folder in places}
    for folder, absent in missing.items():
        if not absent:
            return {part: folder / part for part in PARTS}
    fewest = min(missing.values(), key=lambda absent: len(absent))
    raise BundleError(f"not built: {', '.join(fewest)}; run `make build` first")


def sources(root: Path) -> Iterator[Path]:
    """The C sources, headers and version scripts of a checkout, as paths below ``root``."""
    for folder in SOURCES:
        for path in sorted((root / folder).glob("*")):
            if path.suffix in SOURCE_SUFFIXES:
                yield path.relative_to(root)


def bundle_files(shim: Path, version: str) -> dict[str, tuple[int, bytes]]:
    """Name in the archive -> mode and content."""
    parts = {name: path.read_bytes() for name, path in built_parts(shim).items()}
    glibc = glibc_needed(list(parts.values()))
    content: dict[str, tuple[int, bytes]] = {
        "README": (0o644, README.format(version=version, glibc=glibc).encode()),
        "shim/guest/VERSION": (0o644, f"{version}\n".encode()),
        "prebuilt/GLIBC": (0o644, f"{glibc}\n".encode()),
    }
    for name in SCRIPTS:
        mode = 0o755 if name in ("install.sh", "build.sh") else 0o644
        content[f"shim/guest/{name}"] = (mode, (shim / "guest" / name).read_bytes())
    for name, binary in parts.items():
        content[f"prebuilt/{name}"] = (0o755, binary)
    sums = "".join(
        f"{hashlib.sha256(binary).hexdigest()}  {name}\n" for name, binary in sorted(parts.items())
    )
    content["prebuilt/SHA256SUMS"] = (0o644, sums.encode())
    for path in sources(shim.parent):
        content[str(path)] = (0o644, (shim.parent / path).read_bytes())
    for name in ("LICENSE", "docs/vm/guest.md"):
        if (shim.parent / name).is_file():
            content[name] = (0o644, (shim.parent / name).read_bytes())
    return content


def archive_bytes(folder: str, content: dict[str, tuple[int, bytes]]) -> bytes:
    """A gzipped tar of ``content`` below ``folder``, with a link ``install.sh`` at its top."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for name, (mode, data) in sorted(content.items()):
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.mode, entry.size = mode, len(data)
            archive.addfile(entry, io.BytesIO(data))
        entry = tarfile.TarInfo(f"{folder}/install.sh")
        entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, "shim/guest/install.sh", 0o777
        archive.addfile(entry)
    return packed.getvalue()


def write_bundle(output: Path, version: str) -> Path:
    """Write ``vgpu-guest-VERSION.tar.gz`` to ``output``, a file name or a folder; the path written.

    Raises:
        BundleError: the libraries are not built.
        OSError: it cannot be written.
    """
    name = f"vgpu-guest-{version}"
    is_archive = output.name.endswith((".tar.gz", ".tgz"))
    path = output if is_archive else output / f"{name}.tar.gz"
    data = archive_bytes(name, bundle_files(Path(str(files("vgpu.shim"))).resolve(), version))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.write_bytes(data)
    unfinished.replace(path)
    return path
