# SPDX-License-Identifier: Apache-2.0
"""All examples on a real GPU, several at a time: ``python -m tests.real_gpu.examples [--gpu software] [--jobs 4] [--out FILE]``.

Those that measure shares of the GPU run one after the other and first, the rest beside each other. Each has a time limit and is
ended with all it started. The record (text, without this machine's paths) has the output, the exit status and the seconds of
each, in the order of the readme, and is written after each. Exit status 0: every one held.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(folder) for folder in (ROOT, ROOT / "src") if str(folder) not in sys.path]

from bench import sides

from tests.e2e import mediator as e2e
from tests.real_gpu.control_host import without_paths

EXAMPLES = ROOT / "examples"
# The others are programs, or need CuPy: demo.py, cupy_program.py.
PROGRAMS = ("scale_words", "vector_add")
NOT_RUN = ("demo", "cupy_program", *PROGRAMS)
BY_THEMSELVES = ("three_vms", "flooding_vm")
LONG = ("raising_actors", "busy_storm", "full_disk", "clock_jumps", "killed_worker")  # these are begun first


@attrs.frozen
class Outcome:
    """How one went."""

    name: str
    status: int | None  # None: ended by us; it took too long
    seconds: float
    output: str

    @property
    def holds(self) -> bool:
        """It ended in time and says that all of it is so."""
        return self.status == 0

    def text(self) -> str:
        """Its part of the record."""
        how = "no end within its time" if self.status is None else f"exit status {self.status}"
        return f"=== {self.name}: {how}, {self.seconds:.1f} s\n{without_paths(self.output).rstrip()}\n"


def run(name: str, command: Sequence[str | Path], limit: float) -> Outcome:
    """Run it to its end, or end it with all it started."""
    began = time.monotonic()
    process = subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    status: int | None = None
    try:
        output, _ = process.communicate(timeout=limit)
        status = process.returncode
    except subprocess.TimeoutExpired:
        below = sides.descendants(process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for pid, words in below.items():  # workers and devices have sessions of their own
            with contextlib.suppress(OSError):
                if (
                    Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    == words
                ):
                    os.kill(pid, signal.SIGKILL)
        output, _ = process.communicate()
    return Outcome(name, status, time.monotonic() - began, output)


def run_programs(gpu: str, limit: float) -> list[Outcome]:
    """The programs, each as a guest of one mediator."""
    e2e.GPU = gpu
    found = []
    with e2e.Mediator() as mediator:
        through: list[str | Path] = [
            sys.executable,
            "-P",
            "-m",
            "vgpu.run_main",
            "--run-dir",
            mediator.run_dir,
            "--vm",
            "example",
            "--",
        ]
        found.append(run("scale_words", [*through, sys.executable, EXAMPLES / "scale_words.py"], limit))
        compiler = shutil.which("nvcc")
        homes = [Path(compiler).resolve().parents[1]] if compiler else []
        include = next(
            (h / "include" for h in [*homes, Path("/usr/local/cuda")] if (h / "include/cuda.h").exists()),
            None,
        )
        if include is None:
            found.append(Outcome("vector_add", 0, 0.0, "left out: no cuda.h here"))
            return found
        from vgpu.shim.locate import library_directory

        program = mediator.folder / "vector_add"
        words: list[str | Path] = ["gcc", "-O1", "-I", include, "-o", program, EXAMPLES / "vector_add.c"]
        built = run("vector_add", [*words, library_directory() / "libcuda.so.1", "-ldl"], limit)
        found.append(run("vector_add", [*through, program], limit) if built.holds else built)
    return found


def names() -> list[str]:
    """Those that inject faults, and three_vms, in the order of the readme."""
    listed = re.findall(r"`([a-z]\w*)\.py`", (EXAMPLES / "README.md").read_text())
    return [n for n in dict.fromkeys(listed) if n not in NOT_RUN and (EXAMPLES / f"{n}.py").exists()]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", choices=["nvidia", "software"], default="nvidia")
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for each")
    parser.add_argument("--only", nargs="+", choices=[*names(), "programs"], metavar="EXAMPLE")
    parser.add_argument("--commit", help="what the record shall say; git is asked otherwise")
    parser.add_argument("--out", type=Path, default=Path("examples.txt"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run them."""
    options = parse(arguments)
    began = time.monotonic()
    machine = sides.machine_facts(options.commit)
    wanted = options.only or [*names(), "programs"]
    outcomes: dict[str, Outcome] = {}
    lock = threading.Lock()

    def keep(found: Sequence[Outcome]) -> None:
        with lock:
            for outcome in found:
                outcomes[outcome.name] = outcome
                verdict = "holds" if outcome.holds else "DOES NOT HOLD"
                print(f"{outcome.name}: {verdict} ({outcome.seconds:.1f} s)", flush=True)
            order = [*wanted, *PROGRAMS]
            done = sorted(outcomes.values(), key=lambda o: order.index(o.name))
            head = [f"examples, --gpu {options.gpu}, {options.jobs} at a time"]
            head += [f"{name}: {value}" for name, value in machine.items()]
            head += [
                f"{sum(o.holds for o in done)} of {len(done)} hold; {time.monotonic() - began:.1f} s in all",
                "",
            ]
            options.out.write_text("\n".join([*head, *(o.text() for o in done)]))

    def one(name: str) -> None:
        try:
            if name == "programs":
                keep(run_programs(options.gpu, options.limit))
            else:
                command = [sys.executable, EXAMPLES / f"{name}.py", "--gpu", options.gpu]
                keep([run(name, command, options.limit)])
        except Exception as error:  # noqa: BLE001 - the others are to run
            keep(
                [
                    Outcome(
                        PROGRAMS[0] if name == "programs" else name,
                        1,
                        0.0,
                        f"{type(error).__name__}: {error}",
                    )
                ]
            )

    for name in BY_THEMSELVES:
        if name in wanted:
            one(name)
    rest = [name for name in wanted if name not in BY_THEMSELVES]
    rest.sort(key=lambda name: LONG.index(name) if name in LONG else len(LONG))
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, rest))
    print(f"{time.monotonic() - began:.1f} s in all")
    return 0 if all(outcome.holds for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
