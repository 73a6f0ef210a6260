# SPDX-License-Identifier: Apache-2.0
"""Native against remoted: the same programs, the same machine, alternating runs, one table and one JSON file.

    python bench/run.py [--gpu auto|nvidia|software] [--repetitions N] [--only GROUP...] [--llama-dir DIR] [--out FILE]

Groups: driver (single calls and copies, bench/c/driver_bench.c), start (process start to first result), decode (PyTorch)
and llama (llama.cpp). Every repetition runs each group once on each side, and every second repetition starts with the
other side. On the software GPU there is no native side: the data plane's own cost is measured and nothing compared.
A group that fails on one side is recorded with its last words and leaves the others alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.append(str(ROOT))

from bench import metrics, sides
from bench.sides import NATIVE, REMOTED, Outcome, SideError

from tests.real_gpu import llama

PROGRAMS = ROOT / "tests" / "real_gpu" / "programs"
PAUSE_SECONDS = 0.5  # before a program whose start is measured, on both sides
Environment = Mapping[str, str]


@attrs.frozen
class Group:
    """One program and how its output becomes values. ``run`` is given a side's environment and that side's name."""

    name: str
    run: Callable[[Environment, str], dict[str, list[float]]]


def build_driver_bench(folder: Path) -> Path:
    """Compile bench/c/driver_bench.c with the machine's C compiler."""
    out = folder / "driver_bench"
    source = ROOT / "bench" / "c" / "driver_bench.c"
    compiler = os.environ.get("CC", "gcc")
    command = [
        compiler,
        "-std=gnu11",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        str(source),
        "-o",
        str(out),
        "-ldl",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SideError(f"{compiler}: {done.stderr}")
    return out


def numbers(outcome: Outcome) -> dict[str, list[float]]:
    """The values of driver_bench's one JSON line."""
    return {name: [float(value)] for name, value in outcome.json_line().items()}


def driver_groups(program: Path, *, software: bool) -> list[Group]:
    """Single calls and copies, and the start of a small program."""
    calls = "launch,sustained,sync,dtoh,event,async,local,roundtrip"
    options = ["--scale", "0.1", "--largest-mib", "64"] if software else []

    def driver(environment: Environment, _side: str) -> dict[str, list[float]]:
        found = numbers(sides.run_program([program, calls, *options], environment, 300))
        return found | numbers(sides.run_program([program, "pinned,pageable", *options], environment, 300))

    def start(environment: Environment, _side: str) -> dict[str, list[float]]:
        values: dict[str, list[float]] = {}
        for _ in range(3):
            time.sleep(PAUSE_SECONDS)
            command = [str(program), "first", "--start-ns", str(time.monotonic_ns())]
            for name, value in numbers(sides.run_program(command, environment, 120)).items():
                values.setdefault(name, []).extend(value)
        return values

    return [Group("driver", driver), Group("start", start)]


def decode_group(tokens_seen: dict[str, Any], *, timed: int) -> Group:
    """PyTorch's greedy decode; the token ids of all runs must be the same."""

    def decode(environment: Environment, side: str) -> dict[str, list[float]]:
        command = [sys.executable, str(PROGRAMS / "torch_decode.py"), "--time", str(timed), "--tokens", "128"]
        line = sides.run_program(command, environment, 300, PROGRAMS).json_line()
        first = tokens_seen.setdefault("equal", line["equal"])
        if line["equal"] != first:
            raise SideError(f"{side}: the token ids or logits differ from the first run's")
        return {"decode_tokens_per_s": [float(rate) for rate in line["info"]["tokens_per_second"]]}

    return Group("decode", decode)


def llama_group(folder: Path, models: Path) -> Group:
    """llama-bench: decode of two models with CUDA graphs on and off."""
    llama.link_cuda_libraries(folder)

    def bench(environment: Environment, model: Path, *options: str) -> dict[str, list[float]]:
        command = [str(folder / "llama-bench"), "-m", str(model), "-ngl", "99", "-o", "json", *options]
        outcome = sides.run_program(command, environment, 300)
        begin = outcome.output.find("[")
        if outcome.status != 0 or begin < 0:
            raise SideError(f"llama-bench: exit status {outcome.status}: {outcome.last_words()}")
        tests = json.loads(outcome.output[begin:])
        if any("CUDA" not in test.get("backends", "") for test in tests):
            raise SideError("llama-bench did not use the GPU")
        kinds = {True: "prompt", False: "decode"}
        return {kinds[test["n_gen"] == 0]: [float(rate) for rate in test["samples_ts"]] for test in tests}

    def run(environment: Environment, _side: str) -> dict[str, list[float]]:
        values: dict[str, list[float]] = {}
        for preset in ("tiny", "1b"):
            file = llama.model(models, preset)
            for graphs in ("on", "off"):
                more = {} if graphs == "on" else {"GGML_CUDA_DISABLE_GRAPHS": "1"}
                prompt = "512" if (preset, graphs) == ("1b", "on") else "0"
                found = bench({**environment, **more}, file, "-p", prompt, "-n", "256", "-r", "4")
                values[f"llama_{preset}_graphs_{graphs}"] = found["decode"]
                if "prompt" in found:
                    values["llama_1b_prompt"] = found["prompt"]
        return values

    return Group("llama", run)


@attrs.define(eq=False)
class Samples:
    """What was measured so far, and what failed."""

    values: dict[str, dict[str, list[float]]] = attrs.Factory(lambda: {NATIVE: {}, REMOTED: {}})
    failures: list[dict[str, str]] = attrs.Factory(list)

    def measure(self, group: Group, side: str, environment: Environment) -> None:
        """Run one group on one side and keep its values, or its last words."""
        try:
            found = group.run(environment, side)
        except (SideError, ValueError, KeyError, OSError) as error:
            words = f"{type(error).__name__}: {error}"[-1500:]
            self.failures.append({"group": group.name, "side": side, "error": words})
            print(f"bench: {group.name}, {side}: {words[-400:]}", file=sys.stderr, flush=True)
            return
        for name, values in found.items():
            self.values[side].setdefault(name, []).extend(values)

    def failed(self, group: Group, side: str) -> bool:
        """Whether this group has failed on this side; it is not tried again."""
        return any(one["group"] == group.name and one["side"] == side for one in self.failures)


def choose_groups(
    options: argparse.Namespace, folder: Path, *, software: bool
) -> tuple[list[Group], dict[str, str]]:
    """The groups that can run here, and why the others cannot."""
    import importlib.util

    groups = driver_groups(build_driver_bench(folder), software=software)
    left_out: dict[str, str] = {}
    if software:
        left_out = dict.fromkeys(("decode", "llama"), "on the software GPU only the data plane is measured")
    else:
        if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
            groups.append(decode_group({}, timed=3))
        else:
            left_out["decode"] = "no torch and transformers here"
        if options.llama_dir and (options.llama_dir / "llama-bench").exists():
            groups.append(llama_group(options.llama_dir, options.model_dir))
        else:
            left_out["llama"] = "no llama.cpp: --llama-dir (see tests/real_gpu/build_llama.sh)"
    if options.only:
        groups = [group for group in groups if group.name in options.only]
    return groups, left_out


def default_name(machine: Mapping[str, Any], gpu: str) -> str:
    """bench-nvidia-h200-2026-11-21.json"""
    card = "software" if gpu == "software" else re.sub(r"[^a-z0-9]+", "-", str(machine["gpu"]).lower())
    return f"bench-{card}-{machine['date'][:10]}.json"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", choices=["auto", "nvidia", "software"], default="auto")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=["driver", "start", "decode", "llama"], default=[])
    parser.add_argument("--side", choices=[NATIVE, REMOTED], help="one side alone")
    places = parser.add_argument_group("places")
    default_llama = os.environ.get("VGPU_LLAMA_DIR")
    places.add_argument("--llama-dir", type=Path, default=Path(default_llama) if default_llama else None)
    places.add_argument("--model-dir", type=Path, default=Path(tempfile.gettempdir()) / "vgpu-models")
    places.add_argument("--out", type=Path, help="default: a name with card and date in docs/measurements/")
    parser.add_argument("--commit", help="what the record shall say; git is asked otherwise")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. 0 if every group that can run here ran on every side."""
    options = parse(arguments)
    gpu = options.gpu if options.gpu != "auto" else ("nvidia" if sides.has_nvidia_gpu() else "software")
    software = gpu == "software"
    wanted = [REMOTED] if software else ([options.side] if options.side else [NATIVE, REMOTED])
    machine = sides.machine_facts(options.commit)
    samples = Samples()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vgpu-bench-") as scratch, contextlib.ExitStack() as stack:
        groups, left_out = choose_groups(options, Path(scratch), software=software)
        environments: dict[str, Environment] = {NATIVE: sides.native_environment()}
        if REMOTED in wanted:
            environments[REMOTED] = stack.enter_context(sides.open_mediator(gpu)).environment()
        for repetition in range(options.repetitions):
            for group in groups:
                order = wanted if repetition % 2 == 0 else wanted[::-1]
                for side in order:
                    if not samples.failed(group, side):
                        samples.measure(group, side, environments[side])
    rows = metrics.rows(samples.values, promised=not software)
    record = {
        "what": "bench",
        "device": gpu,
        "machine": machine,
        "settings": {
            "repetitions": options.repetitions,
            "order": "alternating, every second repetition the other way round",
            "sides": wanted,
            "pause_before_start_seconds": PAUSE_SECONDS,
            "left_out": left_out,
            "seconds": round(time.monotonic() - began, 1),
        },
        "rows": rows,
        "failures": samples.failures,
    }
    out = options.out or ROOT / "docs" / "measurements" / default_name(machine, gpu)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    if software:
        print(
            "No real GPU here: the software GPU computes, so only the data plane's own cost means anything."
        )
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    print(metrics.table(rows))
    print(f"record: {out}")
    return 1 if samples.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
