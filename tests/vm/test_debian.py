# SPDX-License-Identifier: Apache-2.0
"""Debian packages without apt, held to dpkg's own rules; a mirror that lies, breaks off and is away. No machine boots."""

from __future__ import annotations

import hashlib
import io
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from tests.vm import debian, initrd
from tests.vm.debian import DebianError, Mirror, Package, Relation
from tests.vm.packages import Images, module_dependencies


@pytest.mark.parametrize(
    "ascending",
    [
        # Of the policy manual, section 5.6.12, and of packages in use.
        ["~~", "~~a", "~", "0", "a"],
        ["1.0~rc1", "1.0", "1.0-1", "1.0-1+b1", "1.0-2", "1.0.1", "1:0.1"],
        ["6.12.94-1", "6.12.107-1~bpo12+1", "6.12.107-1"],
        ["1:10.0.13+ds-0+deb13u1", "1:11.1.3+ds-1~bpo13+1", "1:11.1.3+ds-1"],
        ["1.21.1+git20220113.fbbdc3926", "1.21.1+git20220113.fbbdc3926+dfsg-1"],
        ["9", "10", "010.1"],
    ],
)
def test_versions_are_ordered(ascending: list[str]) -> None:
    for i, left in enumerate(ascending):
        for j, right in enumerate(ascending):
            assert debian.compare_versions(left, right) == (i > j) - (i < j), (left, right)


@pytest.mark.parametrize(("left", "right"), [("1.0", "0:1.0"), ("1.00", "1.0"), ("1.0-0", "1.0-0")])
def test_versions_are_equal(left: str, right: str) -> None:
    assert debian.compare_versions(left, right) == 0


INDEX = """Package: program
Version: 2.0
Depends: library (>= 1.5), either | other, named:any
Pre-Depends: base
Filename: pool/program.deb
Size: 10
SHA256: 00
Description: words
 Depends: nothing

Package: library
Version: 1.0
Filename: pool/library_1.0.deb
Size: 10
SHA256: 01

Package: library
Version: 1.6
Filename: pool/library_1.6.deb
Size: 10
SHA256: 02

Package: other
Version: 1
Depends: program
Filename: pool/other.deb
Size: 10
SHA256: 03

Package: real
Version: 1
Provides: named (= 3), base
Filename: pool/real.deb
Size: 10
SHA256: 04
"""


def test_dependencies_are_followed() -> None:
    """Versions, alternatives, circles and names that another package provides."""
    packages = list(debian.parse_index(INDEX, "stable"))
    chosen = debian.resolve(["program"], packages, prefer={}, skip=frozenset())
    assert [(p.name, p.version) for p in chosen] == [
        ("library", "1.6"),
        ("other", "1"),
        ("program", "2.0"),
        ("real", "1"),
    ]


def test_what_is_skipped_is_not_followed() -> None:
    packages = list(debian.parse_index(INDEX, "stable"))
    chosen = debian.resolve(["program"], packages, prefer={}, skip=frozenset({"library", "other", "named"}))
    assert [p.name for p in chosen] == ["program", "real"]


def test_a_missing_dependency_is_named() -> None:
    packages = [p for p in debian.parse_index(INDEX, "stable") if p.version != "1.6"]
    with pytest.raises(DebianError, match="program needs library"):
        debian.resolve(["program"], packages, prefer={}, skip=frozenset())


def test_a_preferred_suite_wins() -> None:
    stable = list(debian.parse_index(INDEX, "stable"))
    newer = list(debian.parse_index(INDEX.replace("Version: 2.0", "Version: 3.0"), "backports"))
    versions = {
        suite: next(
            p.version
            for p in debian.resolve(["program"], [*stable, *newer], prefer=prefer, skip=frozenset())
            if p.name == "program"
        )
        for suite, prefer in (("first", {}), ("preferred", {"program": "backports"}))
    }
    assert versions == {"first": "2.0", "preferred": "3.0"}


def test_a_relation_is_read() -> None:
    assert Relation.parse(" libc6:any (>= 2.38) ") == Relation("libc6", ">=", "2.38")
    assert not Relation.parse("x (<< 1)").holds("1")
    with pytest.raises(DebianError):
        Relation.parse("(>= 1)")


# -- archives


def make_tar(build: Callable[[tarfile.TarFile], None]) -> bytes:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        build(archive)
    return plain.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes = b"", **settings: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in settings.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


def make_deb(path: Path, data: bytes, name: str = "data.tar.xz") -> Path:
    packed = {
        "data.tar.xz": lzma.compress(data),
        "data.tar.zst": zstandard.ZstdCompressor().compress(data),
        "data.tar": data,
    }[name]
    archive = b"!<arch>\n"
    for member, content in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), (name, packed)):
        archive += f"{member:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        archive += content + b"\n" * (len(content) % 2)
    path.write_bytes(archive)
    return path


@pytest.mark.parametrize("kind", ["data.tar.xz", "data.tar.zst", "data.tar"])
def test_a_package_is_unpacked(tmp_path: Path, kind: str) -> None:
    def build(archive: tarfile.TarFile) -> None:
        add(archive, "./usr/", type=tarfile.DIRTYPE)
        add(archive, "./usr/bin/tool", b"tool", mode=0o4755)
        add(archive, "./usr/bin/same", type=tarfile.LNKTYPE, linkname="./usr/bin/tool")
        add(archive, "./usr/lib/x.so", type=tarfile.SYMTYPE, linkname="x.so.1")
        add(archive, "./usr/share/doc/x", b"unwanted")

    target = tmp_path / "out"
    target.mkdir()
    package = make_deb(tmp_path / "a.deb", make_tar(build), kind)
    debian.unpack(package, target, lambda name: not name.startswith("usr/share"))
    found = sorted(str(p.relative_to(target)) for p in target.rglob("*") if not p.is_dir() or p.is_symlink())
    assert found == ["usr/bin/same", "usr/bin/tool", "usr/lib/x.so"]
    assert (target / "usr/bin/same").read_bytes() == b"tool"
    assert (target / "usr/bin/tool").stat().st_mode & 0o7777 == 0o755
    assert (target / "usr/lib/x.so").readlink() == Path("x.so.1")


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "./a/../../out"])
def test_no_member_leaves_the_folder(tmp_path: Path, name: str) -> None:
    target = tmp_path / "in"
    target.mkdir()
    package = make_deb(tmp_path / "a.deb", make_tar(lambda archive: add(archive, name, b"x")))
    with pytest.raises(DebianError, match="outside"):
        debian.unpack(package, target, lambda _: True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.deb", "in"]


def test_no_link_leads_a_member_out(tmp_path: Path) -> None:
    def build(archive: tarfile.TarFile) -> None:
        add(archive, "./way", type=tarfile.SYMTYPE, linkname="..")
        add(archive, "./way/out", b"x")

    target = tmp_path / "in"
    target.mkdir()
    with pytest.raises(DebianError, match="leads out"):
        debian.unpack(make_deb(tmp_path / "a.deb", make_tar(build)), target, lambda _: True)
    assert not (tmp_path / "out").exists()


def test_damage_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.deb").write_bytes(b"<html>not found</html>")
    with pytest.raises(DebianError, match="ar archive"):
        debian.unpack(tmp_path / "a.deb", tmp_path, lambda _: True)


# -- mirrors


class _Answer(io.BytesIO):
    status = 200


class _FakeMirror(Mirror):
    """Serves bytes; each entry of ``cuts`` breaks one answer off after so many."""

    files: dict[str, bytes]
    cuts: list[int]
    asked: list[tuple[str, int]]

    def open(self, path: str, start: int = 0) -> _Answer:
        self.asked.append((path, start))
        answer = _Answer(self.files[path][start:][: self.cuts.pop(0) if self.cuts else None])
        answer.status = 206 if start else 200
        return answer


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _FakeMirror:
    for method in (debian.Mirror.fetch, debian.Mirror.index):
        monkeypatch.setattr(method.retry, "sleep", lambda _: None)
    made = _FakeMirror("https://mirror", tmp_path / "downloads")
    for name, value in (("files", {}), ("cuts", []), ("asked", [])):
        object.__setattr__(made, name, value)
    return made


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_broken_download_goes_on(mirror: _FakeMirror) -> None:
    data = bytes(range(256)) * 100
    mirror.files["a.deb"] = data
    mirror.cuts.extend([1000, 2000])
    assert mirror.fetch("a.deb", digest(data), len(data)).read_bytes() == data
    assert mirror.asked == [("a.deb", 0), ("a.deb", 1000), ("a.deb", 3000)]
    mirror.fetch("a.deb", digest(data), len(data))
    assert len(mirror.asked) == 3


def test_another_file_is_refused(mirror: _FakeMirror) -> None:
    mirror.files["a.deb"] = b"evil"
    with pytest.raises(DebianError, match="expected"):
        mirror.fetch("a.deb", digest(b"good"), 4)
    assert list(mirror.folder.iterdir()) == []


def test_an_index_is_held_to_its_release_file(mirror: _FakeMirror) -> None:
    index = lzma.compress(INDEX.encode())
    release = f"Acquire-By-Hash: yes\nMD5Sum:\n 00 1 main/binary-amd64/Packages.xz\nSHA256:\n {digest(index)} {len(index)}"
    folder = "dists/stable/main/binary-amd64"
    mirror.files["dists/stable/InRelease"] = f"Origin: x\n{release} main/binary-amd64/Packages.xz\n".encode()
    mirror.files[f"{folder}/by-hash/SHA256/{digest(index)}"] = index
    assert mirror.index("stable", "main", "amd64") == INDEX
    with pytest.raises(DebianError, match="lists no"):
        mirror.index("stable", "contrib", "amd64")


def test_packages_are_fetched_by_name(mirror: _FakeMirror) -> None:
    packages = []
    for name in "abcdefghij":
        mirror.files[name] = name.encode() * 1000
        sha256 = digest(mirror.files[name])
        packages.append(Package(name, "1", name, 1000, sha256, "stable", (), ()))
    seen: list[Package] = []
    archives = mirror.fetch_all(packages, seen.append)
    assert {name: path.read_bytes()[:1] for name, path in archives.items()} == {
        n: n.encode() for n in "abcdefghij"
    }
    assert len(seen) == 10


def test_a_configured_mirror_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VGPU_DEBIAN_MIRROR", "https://here/debian/")
    assert debian.mirrors() == ["https://here/debian"]
    monkeypatch.delenv("VGPU_DEBIAN_MIRROR")
    assert debian.mirrors()[0] == debian.DEFAULT_MIRROR


# -- kernel and initial files


def test_a_module_names_what_it_needs() -> None:
    assert module_dependencies(b"\0license=GPL\0depends=netfs,9pnet\0name=9p\0") == ["netfs", "9pnet"]
    assert module_dependencies(b"\0depends=\0") == []


def test_the_initial_files_are_an_archive(tmp_path: Path) -> None:
    import gzip

    for name in ("busybox", "a.ko", "b.ko"):
        (tmp_path / name).write_bytes(name.encode() * 3)
    images = Images((), tmp_path / "k", (tmp_path / "b.ko", tmp_path / "a.ko"), tmp_path / "busybox", "1")
    content = gzip.decompress(initrd.build(images))
    names: list[str] = []
    at = 0
    while not names or names[-1] != "TRAILER!!!":
        assert content[at : at + 6] == b"070701"
        size, length = (int(content[at + 6 + 8 * field : at + 14 + 8 * field], 16) for field in (6, 11))
        names.append(content[at + 110 : at + 110 + length - 1].decode())
        at += 110 + length + -(110 + length) % 4
        if names[-1] == "modules/order":
            assert content[at : at + size].split() == [b"b.ko", b"a.ko"]
        at += size + -size % 4
    assert {"init", "agent.py", "bin/busybox", "modules/a.ko", "modules/b.ko"} <= set(names)
    assert initrd.build(images) == initrd.build(images)
