# SPDX-License-Identifier: Apache-2.0
"""Who may import whom. The table below is the one of ARCHITECTURE.md; every Python file is read against it."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Room -> rooms it may import. What lies directly in src/vgpu puts the rooms together and may import all of them.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "transport": frozenset(),
    "gpu": frozenset({"transport"}),
    "shim": frozenset({"transport"}),
    "actors": frozenset({"gpu", "transport"}),
    "supervision": frozenset({"actors"}),
}
ROOMS = tuple(MAY_IMPORT)


def imported_modules(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything ``source`` imports, as a module of ``package`` would see it.

    ``from a import b`` gives ``a.b``, for b may be a module; relative names are made absolute. Imports in functions
    and under TYPE_CHECKING count like any other.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                kept = parts[: len(parts) - (node.level - 1)]
                base = ".".join([*kept, base] if base else kept)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def violations(source: str, package: str) -> list[str]:
    """What ``source``, a module of ``package`` (such as ``vgpu.gpu.software``), imports and must not."""
    found = []
    room = package.split(".")[1] if "." in package else None
    for line, name in imported_modules(source, package):
        parts = name.split(".")
        if parts[0] in ROOMS:
            found.append(f"line {line}: {name} is spelled without vgpu")
        elif parts[0] == "vgpu" and room in MAY_IMPORT and len(parts) > 1:
            if parts[1] in ROOMS and parts[1] != room and parts[1] not in MAY_IMPORT[room]:
                found.append(f"line {line}: {room} must not import {name}")
            elif parts[1] not in ROOMS and not parts[1].startswith("__"):
                found.append(f"line {line}: {room} must not import {name}, which lies above the rooms")
    return found


def python_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def room_files() -> list[tuple[Path, str]]:
    """Every Python file of the rooms and of src/vgpu itself, with the package it belongs to."""
    files = [(path, "vgpu") for path in sorted((ROOT / "src" / "vgpu").glob("*.py"))]
    for room in ROOMS:
        for path in python_files(ROOT / room):
            files.append((path, ".".join(["vgpu", *path.parent.relative_to(ROOT).parts])))
    return files


def test_the_rooms_keep_to_the_table() -> None:
    files = room_files()
    assert {package.split(".")[1] for _, package in files if "." in package} == set(ROOMS)
    found = [
        f"{path.relative_to(ROOT)}, {what}"
        for path, package in files
        for what in violations(path.read_text(), package)
    ]
    assert found == []


def test_nothing_else_spells_a_room_without_vgpu() -> None:
    found = [
        f"{path.relative_to(ROOT)}, {what}"
        for folder in ("tests", "tools", "examples", "bench")
        for path in python_files(ROOT / folder)
        for what in violations(path.read_text(), folder)
    ]
    assert found == []


def test_examples_use_public_modules_only() -> None:
    found = [
        f"{path.relative_to(ROOT)}, line {line}: {name}"
        for path in python_files(ROOT / "examples")
        for line, name in imported_modules(path.read_text(), "examples")
        if name.startswith("vgpu.") and any(part.startswith("_") for part in name.split("."))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "package"),
    [
        ("from vgpu.actors import Mailbox", "vgpu.transport"),
        ("import vgpu.gpu", "vgpu.shim"),
        ("from vgpu import supervision", "vgpu.actors"),
        ("from ..gpu import driver", "vgpu.transport"),
        ("from ... import gpu", "vgpu.shim.libcuda"),
        ("def late():\n    from vgpu.transport import wire", "vgpu.supervision"),
        ("from vgpu.mediator_main import main", "vgpu.actors"),
        ("import gpu", "tests"),
        ("from transport.wire import Call", "vgpu.gpu"),
    ],
)
def test_a_forbidden_import_is_found(source: str, package: str) -> None:
    assert len(violations(source, package)) == 1


@pytest.mark.parametrize(
    ("source", "package"),
    [
        ("from vgpu.transport import wire", "vgpu.gpu.software"),
        ("from . import wire", "vgpu.transport"),
        ("from ..memory import Memory", "vgpu.gpu.software.ptx"),
        ("from vgpu import __version__", "vgpu.gpu"),
        ("import vgpu.actors, vgpu.gpu", "vgpu"),
        ("from vgpu import gpu, shim", "tests"),
        ("import trio.testing", "vgpu.actors"),
    ],
)
def test_an_allowed_import_is_not(source: str, package: str) -> None:
    assert violations(source, package) == []


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_is_importable_without_vgpu(room: str) -> None:
    """With the checkout's root on the path every module could be loaded twice, under two names."""
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(room)
    assert importlib.import_module(f"vgpu.{room}").__name__ == f"vgpu.{room}"
