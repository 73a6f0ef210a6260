# SPDX-License-Identifier: Apache-2.0
"""Run every program of this folder natively and remoted and compare: one table, one JSON record, whatever fails.

    python3 tests/real_gpu/run_all.py --out record.json [--llama-dir DIR] [--only NAME...] [--side native|remoted]

A program is one file of ``programs/``: Python as it is, CUDA C++ compiled once with nvcc and the same binary run on
both sides, with the static and with the shared runtime. It prints one JSON line (programs/report.py); its ``equal``
part must be the same on both sides. Needs no pytest; tests/real_gpu/test_real_gpu.py runs the same list in pytest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs

ROOT = Path(__file__).resolve().parent.parent.parent
if __name__ == "__main__":
    sys.path.append(str(ROOT))

from bench import sides
from bench.sides import NATIVE, REMOTED, Mediator, SideError

from tests.real_gpu import killed, llama

PROGRAMS = Path(__file__).resolve().parent / "programs"
TIMEOUT_SECONDS = 180.0


@attrs.frozen
class Program:
    """One comparison. ``command`` gives the words to run, given a folder for what it must build first."""

    name: str
    command: Callable[[Path], Sequence[str | Path]]
    needs: tuple[str, ...] = ()
    timeout_seconds: float = TIMEOUT_SECONDS


def _python(name: str, *needs: str, arguments: Sequence[str] = ()) -> Program:
    file = PROGRAMS / f"{name}.py"
    return Program(name, lambda _build: [sys.executable, file, *arguments], needs)


def find_nvcc() -> str | None:
    """The machine's CUDA compiler, else None."""
    found = shutil.which("nvcc")
    if found:
        return found
    return next((str(path) for path in sorted(Path("/usr/local").glob("cuda*/bin/nvcc"))), None)


def compile_cuda(name: str, build: Path, cudart: str, code: str) -> Path:
    """Compile ``programs/name.cu`` unless ``build`` has it already; the executable.

    Raises:
        SideError: there is no nvcc, or it refused.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise SideError("no nvcc on this machine")
    out = build / f"{name}-{cudart}-{code}"
    if not out.exists():
        command = [
            nvcc,
            "-std=c++17",
            "-O2",
            "-lineinfo",
            f"-cudart={cudart}",
            "-o",
            str(out),
            str(PROGRAMS / f"{name}.cu"),
        ]
        command += ["-gencode", "arch=compute_90,code=" + ("sm_90" if code == "sass" else "compute_90")]
        if cudart == "shared":
            library = Path(nvcc).resolve().parent.parent / "lib64"
            command += ["-Xlinker", f"-rpath={library}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SideError(f"nvcc: {done.stderr[-1500:]}")
    return out


def _cuda(name: str, cudart: str, code: str, *arguments: str, suffix: str = "") -> Program:
    return Program(
        f"{name} {cudart} {code}{suffix}", lambda build: [compile_cuda(name, build, cudart, code), *arguments]
    )


def all_programs() -> list[Program]:
    """Every comparison, cheapest first."""
    programs = [_cuda("runtime_basic", "static", "sass")]
    for cudart, code in (("shared", "sass"), ("static", "ptx")):
        programs.append(_cuda("runtime_basic", cudart, code))
    for name in ("runtime_launch", "runtime_graph", "runtime_graph_memory", "runtime_textures"):
        programs += [_cuda(name, "static", "sass"), _cuda(name, "shared", "sass")]
    programs.append(_cuda("runtime_errors", "static", "sass"))
    programs.append(_cuda("runtime_errors", "static", "sass", "trap", suffix=" trap"))
    programs += [
        _python("torch_matmul", "torch"),
        _python("torch_streams", "torch"),
        _python("torch_convolution", "torch"),
        _python("torch_training", "torch"),
        _python("torch_graphs", "torch"),
        _python("torch_loader", "torch"),
        _python("torch_fft_linalg", "torch"),
        _python("cupy_arrays", "cupy"),
        _python("triton_kernel", "triton", "torch"),
        _python("numba_kernel", "numba"),
        _python("jax_jit", "jax"),
        _python("torch_decode", "torch", "transformers"),
        _python("torch_small_decode", "torch"),
        _python("torch_compile", "torch", "triton"),
    ]
    return programs


def missing(needs: Sequence[str]) -> list[str]:
    """Those of the modules that the program's Python does not have."""
    import importlib.util

    return [name for name in needs if importlib.util.find_spec(name) is None]


def run_side(program: Program, side: str, build: Path, mediator: Mediator | None) -> dict[str, Any]:
    """One program on one side: ``ok``, ``seconds``, ``equal`` and ``info``, or ``error``."""
    environment = sides.native_environment() if side == NATIVE else None
    if environment is None:
        assert mediator is not None
        environment = mediator.environment()
    with tempfile.TemporaryDirectory(prefix="vgpu-caches-") as caches:
        environment = sides.fresh_caches(environment, Path(caches))
        try:
            command = program.command(build)
            outcome = sides.run_program(command, environment, program.timeout_seconds, PROGRAMS)
        except (SideError, OSError) as error:
            return {"ok": False, "seconds": 0.0, "error": str(error)}
    try:
        line = outcome.json_line()
    except (SideError, ValueError) as error:
        return {"ok": False, "seconds": round(outcome.seconds, 2), "error": str(error)[-1500:]}
    return {"ok": True, "seconds": round(outcome.seconds, 2), "equal": line["equal"], "info": line["info"]}


def differences(native: Any, remoted: Any, path: str = "") -> list[str]:
    """Where two values differ, as short sentences; at most ten."""
    if isinstance(native, dict) and isinstance(remoted, dict):
        found = [f"{path}/{key} on one side only" for key in sorted(native.keys() ^ remoted.keys())]
        for key in native.keys() & remoted.keys():
            found += differences(native[key], remoted[key], f"{path}/{key}")
        return found[:10]
    if isinstance(native, list) and isinstance(remoted, list) and len(native) == len(remoted):
        found = []
        for index, (a, b) in enumerate(zip(native, remoted, strict=True)):
            found += differences(a, b, f"{path}[{index}]")
        return found[:10]
    return (
        [] if native == remoted else [f"{path}: {str(native)[:120]} natively, {str(remoted)[:120]} remoted"]
    )


def compare(
    name: str, native: Callable[[], dict[str, Any]] | None, remoted: Callable[[], dict[str, Any]] | None
) -> dict[str, Any]:
    """Run both sides and judge. Where they differ, the native side runs again: it must agree with itself.

    What fails natively says nothing about remoting: it is skipped, with the native error in the record.
    """
    record: dict[str, Any] = {"name": name}
    if native is not None:
        record[NATIVE] = native()
        if not record[NATIVE]["ok"] and remoted is not None:
            record["skipped"] = "it fails natively too"
            return record
    if remoted is not None:
        record[REMOTED] = remoted()
    both = [record[side] for side in (NATIVE, REMOTED) if side in record]
    record["passed"] = all(side["ok"] for side in both)
    if len(both) == 2 and record["passed"]:
        found = differences(record[NATIVE]["equal"], record[REMOTED]["equal"])
        record["equal"] = record["passed"] = not found
        if found:
            record["differences"] = found
            assert native is not None
            again = native()
            record["native_repeats_itself"] = bool(again["ok"]) and again["equal"] == record[NATIVE]["equal"]
    return record


def summary(record: dict[str, Any]) -> str:
    """One line of the table."""
    words = []
    for side in (NATIVE, REMOTED):
        if side in record:
            words.append(f"{side} {'ok' if record[side]['ok'] else 'FAILED'} {record[side]['seconds']:.1f} s")
    if "equal" in record:
        words.append("equal" if record["equal"] else "DIFFERENT")
    if "memory_free_seconds" in record:
        words.append(
            f"{'passed' if record['passed'] else 'FAILED'}: memory free after {record['memory_free_seconds']} s"
        )
        words.append(f"worker gone after {record.get('worker_gone_seconds', '-')} s")
    if record.get("skipped"):
        words.append(f"skipped: {record['skipped']}")
    return f"{record['name']:34} " + ", ".join(words)


def shorten(record: dict[str, Any]) -> dict[str, Any]:
    """The record without the values that were the same: what was compared shows once, cut to a readable length."""
    short: dict[str, Any] = json.loads(json.dumps(record))
    for side in (NATIVE, REMOTED):
        values = short.get(side, {}).get("equal")
        if record.get("equal") and (side == REMOTED or len(json.dumps(values)) > 4000):
            short[side].pop("equal", None)
    return short


@contextlib.contextmanager
def maybe_mediator(wanted: bool, gpu: str, log: Path | None) -> Iterator[Mediator | None]:
    """A mediator where the remoted side is wanted, else None."""
    if not wanted:
        yield None
        return
    with sides.open_mediator(gpu, log) as mediator:
        yield mediator


def main() -> int:
    """Run what the command line names; 0 if all of it passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("real_gpu.json"))
    parser.add_argument("--only", nargs="*", default=[], help="programs whose names hold one of these words")
    parser.add_argument("--skip", nargs="*", default=[], help="and none of these")
    parser.add_argument("--side", choices=[NATIVE, REMOTED], help="one side alone")
    parser.add_argument("--gpu", default="nvidia", help="what run-mediator is told")
    parser.add_argument("--llama-dir", type=Path, default=os.environ.get("VGPU_LLAMA_DIR"))
    parser.add_argument("--model-dir", type=Path, default=Path(tempfile.gettempdir()) / "vgpu-models")
    parser.add_argument("--build-dir", type=Path, default=Path(tempfile.gettempdir()) / "vgpu-real-gpu")
    parser.add_argument("--timeout", type=float, help="seconds for one program, instead of its own limit")
    parser.add_argument("--commit", help="what the record shall say; git is asked otherwise")
    options = parser.parse_args()
    options.build_dir.mkdir(parents=True, exist_ok=True)

    def chosen(name: str) -> bool:
        wanted = not options.only or any(word in name for word in options.only)
        return wanted and not any(word in name for word in options.skip)

    records: list[dict[str, Any]] = []
    wanted_sides = [options.side] if options.side else [NATIVE, REMOTED]
    head: dict[str, Any] = {"what": "tests/real_gpu", "machine": sides.machine_facts(options.commit)}

    def keep(record: dict[str, Any]) -> None:
        """Print it and write the file anew, so that what is known survives whatever comes."""
        records.append(shorten(record))
        print(summary(record), flush=True)
        for side in (NATIVE, REMOTED):
            if not record.get(side, {}).get("ok", True):
                print(f"    {side}: {record[side]['error'][-600:]}", flush=True)
        for line in record.get("differences", []):
            print(f"    {line}", flush=True)
        passed = sum(1 for one in records if one.get("passed"))
        counted = sum(1 for one in records if "passed" in one)
        totals = {"passed": passed, "failed": counted - passed, "skipped": len(records) - counted}
        options.out.write_text(json.dumps({**head, "totals": totals, "programs": records}, indent=1) + "\n")

    def sided(
        run: Callable[[str, Mediator | None], dict[str, Any]], mediator: Mediator | None
    ) -> dict[str, Callable[[], dict[str, Any]] | None]:
        return {
            "native": (lambda: run(NATIVE, mediator)) if NATIVE in wanted_sides else None,
            "remoted": (lambda: run(REMOTED, mediator)) if REMOTED in wanted_sides else None,
        }

    with maybe_mediator(
        REMOTED in wanted_sides, options.gpu, options.out.with_suffix(".mediator.log")
    ) as mediator:
        if mediator is not None:
            head["mediator_ready_seconds"] = round(mediator.ready_seconds, 2)
        for program in all_programs():
            if not chosen(program.name):
                continue
            if options.timeout:
                program = attrs.evolve(program, timeout_seconds=options.timeout)
            absent = missing(program.needs)
            if absent:
                keep({"name": program.name, "skipped": f"no {', '.join(absent)} here"})
                continue

            def run(side: str, mediator: Mediator | None, program: Program = program) -> dict[str, Any]:
                return run_side(program, side, options.build_dir, mediator)

            keep(compare(program.name, **sided(run, mediator)))
        for check in llama.checks(options.llama_dir, options.model_dir):
            if chosen(check.name):
                if check.skipped:
                    keep({"name": check.name, "skipped": check.skipped})
                else:
                    keep(compare(check.name, **sided(check.run, mediator)))
        if chosen("killed in mid-call"):
            for side in wanted_sides:
                keep(killed.record(side, compile_cuda, options.build_dir, mediator))
        if mediator is not None and not mediator.alive():
            keep(
                {
                    "name": "the mediator lives",
                    "passed": False,
                    "skipped": "it ended: " + mediator.log_tail(600),
                }
            )
    failed = [one["name"] for one in records if one.get("passed") is False]
    print(
        f"{sum(1 for one in records if one.get('passed'))} passed, {len(failed)} failed, record in {options.out}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
