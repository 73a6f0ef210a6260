# SPDX-License-Identifier: Apache-2.0
"""Debian packages without apt, dpkg or root: indexes, dependencies, downloads and unpacking, in Python alone.

The VM tests need QEMU and a kernel newer than most machines have, on any distribution and as any user. A chain of
hashes holds all of it together: the Release file names the hash of each index, the index that of each package. The
Release file itself is as trustworthy as the way to the mirror, which is HTTPS unless somebody configured another.

Nothing of a package is ever run while it is unpacked: maintainer scripts are not even read.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import itertools
import lzma
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO, Final

import attrs
import tenacity
import zstandard

DEFAULT_MIRROR: Final = "https://deb.debian.org/debian"
_PARALLEL_DOWNLOADS: Final = 6
_CHUNK: Final = 1 << 18
_TIMEOUT_SECONDS: Final = 30.0


class DebianError(Exception):
    """A mirror, an index or a package is not as it must be; the message says which and how."""


# -- versions and dependencies


def _order(character: str) -> int:
    """Debian's order of characters: tilde before the end of the part, letters before the rest."""
    if character == "~":
        return -1
    return ord(character) if character.isalpha() else ord(character) + 256


def _compare_part(left: str, right: str) -> int:
    """Compare two upstream versions or revisions: text and numbers in turn."""
    pattern = re.compile(r"(\D*)(\d*)")
    while left or right:
        (text_left, number_left), (text_right, number_right) = (
            found.groups() if (found := pattern.match(side)) else ("", "") for side in (left, right)
        )
        left = left[len(text_left) + len(number_left) :]
        right = right[len(text_right) + len(number_right) :]
        # The end of the text sorts as 0: after a tilde, before everything else.
        for a, b in itertools.zip_longest(map(_order, text_left), map(_order, text_right), fillvalue=0):
            if a != b:
                return -1 if a < b else 1
        if int(number_left or 0) != int(number_right or 0):
            return -1 if int(number_left or 0) < int(number_right or 0) else 1
    return 0


def compare_versions(left: str, right: str) -> int:
    """-1, 0 or 1, as ``dpkg --compare-versions`` orders them."""

    def split(version: str) -> tuple[int, str, str]:
        epoch, _, rest = version.rpartition(":")
        upstream, _, revision = rest.rpartition("-")
        return int(epoch or 0), upstream or rest, revision if upstream else ""

    (epoch_left, upstream_left, revision_left), (epoch_right, upstream_right, revision_right) = (
        split(left),
        split(right),
    )
    if epoch_left != epoch_right:
        return -1 if epoch_left < epoch_right else 1
    return _compare_part(upstream_left, upstream_right) or _compare_part(revision_left, revision_right)


_HOLDS: Final[dict[str, Callable[[int], bool]]] = {
    "<<": lambda order: order < 0,
    "<=": lambda order: order <= 0,
    "=": lambda order: order == 0,
    ">=": lambda order: order >= 0,
    ">>": lambda order: order > 0,
}
_RELATION: Final = re.compile(r"^([a-z0-9][a-z0-9+.-]*)(?::\w+)?(?:\s*\((<<|<=|=|>=|>>)\s*([^)]+)\))?")


@attrs.frozen
class Relation:
    """One alternative of a dependency: a name, and what its version must be."""

    name: str
    operator: str = ""
    version: str = ""

    @classmethod
    def parse(cls, text: str) -> Relation:
        """From ``libc6 (>= 2.38)``, architectures and build profiles left out.

        Raises:
            DebianError: the text is no relation.
        """
        found = _RELATION.match(text.strip())
        if found is None:
            raise DebianError(f"{text!r} is not a relation between packages")
        return cls(found[1], found[2] or "", (found[3] or "").strip())

    def holds(self, version: str) -> bool:
        """Is this version good enough?"""
        return not self.operator or _HOLDS[self.operator](compare_versions(version, self.version))


@attrs.frozen
class Package:
    """A package as an index describes it."""

    name: str
    version: str
    filename: str
    size: int
    sha256: str
    suite: str
    depends: tuple[tuple[Relation, ...], ...]
    provides: tuple[Relation, ...]


def parse_index(text: str, suite: str, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[Package]:
    """The packages of a Packages file; those whose name is not ``wanted`` and which provide nothing are passed over."""
    for stanza in text.split("\n\n"):
        if not stanza.strip():
            continue
        fields: dict[str, str] = {}
        for line in stanza.splitlines():
            if not line.startswith(" "):
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        if "Filename" not in fields or not (wanted(fields["Package"]) or "Provides" in fields):
            continue
        needs = ", ".join(filter(None, (fields.get("Pre-Depends"), fields.get("Depends"))))
        yield Package(
            name=fields["Package"],
            version=fields["Version"],
            filename=fields["Filename"],
            size=int(fields["Size"]),
            sha256=fields["SHA256"],
            suite=suite,
            depends=tuple(
                tuple(Relation.parse(alternative) for alternative in group.split("|"))
                for group in needs.split(",")
                if group.strip()
            ),
            provides=tuple(Relation.parse(p) for p in fields.get("Provides", "").split(",") if p.strip()),
        )


def resolve(
    wanted: Iterable[str], packages: Iterable[Package], *, prefer: dict[str, str], skip: frozenset[str]
) -> list[Package]:
    """The packages that ``wanted`` need, themselves included, without recommendations, by name.

    Args:
        wanted: names.
        packages: every candidate, of all suites; the first suite seen wins where both would do.
        prefer: name -> suite it must come from.
        skip: names that are taken as present and not followed.

    Raises:
        DebianError: something is needed that no candidate is.
    """
    by_name: dict[str, list[Package]] = {}
    providers: dict[str, list[Package]] = {}
    for package in packages:
        if package.name in prefer and package.suite != prefer[package.name]:
            continue
        by_name.setdefault(package.name, []).append(package)
        for relation in package.provides:
            providers.setdefault(relation.name, []).append(package)

    def candidate(relation: Relation) -> Package | None:
        fitting = [p for p in by_name.get(relation.name, ()) if relation.holds(p.version)]
        if fitting:  # the newest of the first suite that has one
            first = [p for p in fitting if p.suite == fitting[0].suite]
            return max(first, key=lambda package: functools.cmp_to_key(compare_versions)(package.version))
        return next(iter(providers.get(relation.name, ())), None)

    chosen: dict[str, Package] = {}
    open_groups: list[tuple[str, tuple[Relation, ...]]] = [
        ("the request", (Relation(name),)) for name in wanted
    ]
    while open_groups:
        why, group = open_groups.pop()
        if any(relation.name in skip or relation.name in chosen for relation in group):
            continue
        found = next(filter(None, map(candidate, group)), None)
        if found is None:
            raise DebianError(f"{why} needs {' or '.join(r.name for r in group)}, which the indexes have not")
        if found.name not in chosen:
            chosen[found.name] = found
            open_groups += [(found.name, needs) for needs in found.depends]
    return [chosen[name] for name in sorted(chosen)]


# -- downloads


def _apt_proxy(scheme: str) -> str | None:
    """The proxy that this machine's apt uses, where it has one and the environment names none."""
    if shutil.which("apt-config") is None or os.environ.get(f"{scheme}_proxy"):
        return None
    done = subprocess.run(
        ["apt-config", "shell", "PROXY", f"Acquire::{scheme}::Proxy"],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.match(r"PROXY='([^']+)'", done.stdout)
    return found[1] if found and found[1] != "DIRECT" else None


def mirrors() -> list[str]:
    """Where to look, in this order: ``VGPU_DEBIAN_MIRROR`` alone if set; else the default, then apt's own sources."""
    configured = os.environ.get("VGPU_DEBIAN_MIRROR")
    if configured:
        return [configured.rstrip("/")]
    found = [DEFAULT_MIRROR]
    if shutil.which("apt-get") is not None:
        done = subprocess.run(
            ["apt-get", "indextargets", "--format", "$(REPO_URI)"],
            capture_output=True,
            text=True,
            check=False,
        )
        found += [
            line.rstrip("/") for line in done.stdout.splitlines() if line.rstrip("/").endswith("/debian")
        ]
    return list(dict.fromkeys(found))


_RETRYING: Final = tenacity.retry(
    retry=tenacity.retry_if_exception_type((OSError, DebianError)),
    stop=tenacity.stop_after_attempt(5),
    wait=tenacity.wait_exponential(multiplier=0.5, max=10) + tenacity.wait_random(0, 0.5),
    reraise=True,
)


@attrs.frozen
class Mirror:
    """One mirror, and the folder in which what came from it is kept, each file under its hash."""

    url: str
    folder: Path
    _opener: urllib.request.OpenerDirector = attrs.field(init=False)

    @_opener.default
    def _make_opener(self) -> urllib.request.OpenerDirector:
        proxies = {scheme: p for scheme in ("http", "https") if (p := _apt_proxy(scheme))}
        return urllib.request.build_opener(
            urllib.request.ProxyHandler({**urllib.request.getproxies(), **proxies})
        )

    def open(self, path: str, start: int = 0) -> IO[bytes]:
        """A file of the mirror, from byte ``start`` on where the mirror can do that.

        Raises:
            OSError: there is no answer, or it is no file.
        """
        request = urllib.request.Request(f"{self.url}/{path}", headers={"User-Agent": "Debian APT-HTTP/1.3"})
        if start:
            request.add_header("Range", f"bytes={start}-")
        answer: IO[bytes] = self._opener.open(request, timeout=_TIMEOUT_SECONDS)
        return answer

    @_RETRYING
    def fetch(self, path: str, sha256: str, size: int) -> Path:
        """A file with this hash, from the folder if it is there. An interrupted download goes on where it was.

        Raises:
            OSError: it could not be had.
            DebianError: what came is something else.
        """
        final = self.folder / sha256
        if final.exists():
            return final
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{sha256}.part"
        present = partial.stat().st_size if partial.exists() else 0
        if present < size:
            with self.open(path, present) as answer:
                goes_on = getattr(answer, "status", 200) == 206
                with partial.open("ab" if goes_on else "wb") as sink:
                    shutil.copyfileobj(answer, sink, _CHUNK)
        with partial.open("rb") as source:
            digest = hashlib.file_digest(source, "sha256").hexdigest()
        if digest != sha256:
            if partial.stat().st_size >= size:
                partial.unlink()
            raise DebianError(f"{self.url}/{path} has SHA256 {digest}, expected {sha256}")
        partial.rename(final)
        return final

    @_RETRYING
    def index(self, suite: str, component: str, architecture: str) -> str:
        """The text of a Packages file, checked against the suite's Release file.

        Raises:
            OSError, DebianError: as :meth:`fetch`; also if a mirror is just being renewed, for several attempts.
        """
        with self.open(f"dists/{suite}/InRelease") as answer:
            release = answer.read().decode()
        name = f"{component}/binary-{architecture}/Packages.xz"
        listed = re.search(
            rf"^ ([0-9a-f]{{64}}) +(\d+) {re.escape(name)}$", release.partition("\nSHA256:")[2], re.MULTILINE
        )
        if listed is None:
            raise DebianError(f"the Release file of {suite} at {self.url} lists no {name}")
        folder = f"dists/{suite}/{component}/binary-{architecture}"
        by_hash = "\nAcquire-By-Hash: yes" in release
        place = f"{folder}/by-hash/SHA256/{listed[1]}" if by_hash else f"{folder}/Packages.xz"
        return lzma.decompress(self.fetch(place, listed[1], int(listed[2])).read_bytes()).decode()

    def fetch_all(self, packages: Sequence[Package], progress: Callable[[Package], None]) -> dict[str, Path]:
        """Name -> archive, several downloads at a time."""

        def one(package: Package) -> tuple[str, Path]:
            archive = self.fetch(package.filename, package.sha256, package.size)
            progress(package)
            return package.name, archive

        with ThreadPoolExecutor(_PARALLEL_DOWNLOADS) as pool:
            return dict(pool.map(one, sorted(packages, key=lambda package: -package.size)))


# -- unpacking


def _members(archive: IO[bytes]) -> Iterator[tuple[str, int]]:
    """Names and sizes of the members of an ``ar`` archive; the file stands at each one's first byte."""
    if archive.read(8) != b"!<arch>\n":
        raise DebianError("this is no Debian package: it does not begin as an ar archive")
    while header := archive.read(60):
        if len(header) != 60 or header[58:] != b"`\n":
            raise DebianError("a member header of the package is damaged")
        name, size = header[:16].decode("ascii").strip().rstrip("/"), int(header[48:58])
        begin = archive.tell()
        yield name, size
        archive.seek(begin + size + size % 2)


class _Part:
    """The bytes of a member as a file of their own, for decompressors that read to the end."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._left = file, size

    def read(self, size: int = -1) -> bytes:
        count = self._left if size < 0 else min(size, self._left)
        data = self._file.read(count)
        self._left -= len(data)
        return data


def _decompress(part: _Part, name: str, sink: IO[bytes]) -> None:
    if name == "data.tar.xz":
        unxz = lzma.LZMADecompressor()
        while data := part.read(_CHUNK):
            sink.write(unxz.decompress(data))
    elif name == "data.tar.zst":
        zstandard.ZstdDecompressor().copy_stream(part, sink)  # type: ignore[arg-type]
    elif name == "data.tar.gz":
        sink.write(gzip.decompress(part.read()))
    elif name == "data.tar":
        shutil.copyfileobj(part, sink, _CHUNK)
    else:
        raise DebianError(f"no way to decompress {name}")


def _inside(destination: Path, name: str) -> Path:
    """Where a member belongs.

    Raises:
        DebianError: outside of the destination.
    """
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts:
        raise DebianError(f"a member of the package would be unpacked outside of its folder: {name!r}")
    return destination.joinpath(*parts)


def unpack(archive: Path, destination: Path, wanted: Callable[[str], bool]) -> list[Path]:
    """Unpack files and links whose name (without a leading ``./``) is ``wanted``; owners and rights are not kept.

    A link keeps its target, which may not exist here.

    Raises:
        DebianError: the package is damaged or means harm.
    """
    unpacked = []
    with archive.open("rb") as source, tempfile.TemporaryFile(dir=destination) as plain:
        for name, size in _members(source):
            if name.startswith("data.tar"):
                _decompress(_Part(source, size), name, plain)
        plain.seek(0)
        with tarfile.open(fileobj=plain, mode="r:") as files:
            for member in files:
                name = member.name.removeprefix("./")
                if member.isdir() or not wanted(name):
                    continue
                target = _inside(destination, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.parent.resolve().is_relative_to(destination.resolve()):
                    raise DebianError(f"a link of the package leads out of its folder: {name!r}")
                target.unlink(missing_ok=True)
                if member.issym():
                    target.symlink_to(member.linkname)
                elif member.islnk():
                    os.link(_inside(destination, member.linkname.removeprefix("./")), target)
                elif member.isreg():
                    content = files.extractfile(member)
                    assert content is not None
                    with content, target.open("wb") as sink:
                        shutil.copyfileobj(content, sink, _CHUNK)
                    target.chmod(0o755 if member.mode & 0o100 else 0o644)
                else:
                    continue
                unpacked.append(target)
    return unpacked
