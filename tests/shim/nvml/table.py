# SPDX-License-Identifier: Apache-2.0
"""The table of functions as the generator reads it, and the library's sources compiled by hand."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent.parent
SOURCES = ROOT / "shim" / "libnvidia_ml"


def generator() -> ModuleType:
    """tools/gen_nvml.py."""
    spec = importlib.util.spec_from_file_location("gen_nvml", ROOT / "tools" / "gen_nvml.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def functions() -> list[Any]:
    """Every line of functions.table: ``name``, ``code`` ("" if answered), ``arguments``."""
    found: list[Any] = generator().load((SOURCES / "functions.table").read_text())
    return found


def compile_library(out: Path, *options: str) -> Path:
    """The library with further compiler options."""
    sources = [path for path in sorted(SOURCES.glob("*.c")) if not path.name.startswith("nvidia_smi")]
    command = [
        *("gcc", "-std=gnu11", "-O1", "-g", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror"),
        *("-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-Wl,-soname,libnvidia-ml.so.1"),
        *options,
        *map(str, sources),
        *("-o", str(out)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out
