# SPDX-License-Identifier: Apache-2.0
"""What tracing costs, switched off and on: messages between actors, and calls in a worker; one table, one JSON file.

    python bench/trace_cost.py [--repetitions N] [--out FILE]

*hop* is one message to an actor whose handler does nothing, the worst case: three hooks and nothing else. Without hooks:
the same runtime with the hooks taken out of its source (by its syntax tree), in the same process. *call* is one record of a
session whose handler does next to nothing (the driver is the tests' stand-in): a ring is filled beforehand, then the time
until it is empty is taken. Without hooks: the same worker, compiled with a trace that is never on;
both are built from what is committed.

``--instructions`` counts, with valgrind, the instructions between taking a record and its end, which noise does not move.

Times are processor time of the thread that does the work, so that others on the machine disturb less. The variants take turns,
`repetitions` times over; a cost is the median of the differences within one turn, over the median without hooks.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import inspect
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HOPS = 5000
HOP_TURNS = 4  # for each of the others' turns: it is the noisier one, and quick
RING_BYTES = 8 << 20
CALL_ROUNDS = 12
VARIANTS = ("without hooks", "off", "on")


# -- messages


class _WithoutHooks(ast.NodeTransformer):
    """Takes out what is done for a tracer."""

    removed = 0

    @staticmethod
    def _asks_for_tracer(test: ast.expr) -> bool:
        return isinstance(test, ast.Compare) and ast.unparse(test.left).endswith(".tracer")

    def visit_If(self, node: ast.If) -> Any:
        if self._asks_for_tracer(node.test):
            self.removed += 1
            return ast.Pass()
        return self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        if self._asks_for_tracer(node.test):
            self.removed += 1
            return node.body  # `None if there is no tracer`
        return self.generic_visit(node)


def hop_methods() -> tuple[dict[str, Any], dict[str, Any]]:
    """Methods of the runtime that a hop goes through: as they are, and without hooks."""
    from vgpu.actors import Incarnation

    names = ("deliver", "deliver_nowait", "_receive_until_stopped", "_envelope", "deliver_own")
    module = sys.modules[Incarnation.__module__]
    plain = {name: getattr(Incarnation, name) for name in names}
    without: dict[str, Any] = {}
    for name, method in plain.items():
        tree = ast.parse("from __future__ import annotations\n" + textwrap.dedent(inspect.getsource(method)))
        strip = _WithoutHooks()
        tree = ast.fix_missing_locations(strip.visit(tree))
        assert strip.removed, name
        space: dict[str, Any] = {}
        exec(compile(tree, module.__file__ or name, "exec"), vars(module), space)  # noqa: S102 - our own source
        without[name] = space[name]
    return plain, without


def measure_hops(repetitions: int) -> dict[str, list[float]]:
    """Nanoseconds of processor time a message, for each variant, one value a turn."""
    import attrs
    import trio

    from vgpu.actors import Actor, ActorSpec, Incarnation, Request, handles, open_system
    from vgpu.actors.recorder import Recorder

    @attrs.frozen
    class Note:
        number: int

    @attrs.frozen
    class Done(Request[int]):
        pass

    class Reader(Actor):
        count = 0

        @handles(Note)
        def note(self, message: Note) -> None:
            self.count += 1

        @handles(Done)
        def done(self, message: Done) -> int:
            return self.count

    plain, without = hop_methods()

    async def once(variant: str) -> float:
        for name, method in (without if variant == "without hooks" else plain).items():
            setattr(Incarnation, name, method)
        tracer = Recorder(10 * HOPS) if variant == "on" else None
        async with open_system(tracer=tracer) as system:
            reader = await system.spawn(ActorSpec("reader", Reader))
            began = time.thread_time_ns()
            for number in range(HOPS):
                await reader.send(Note(number))
            assert await reader.ask(Done(), timeout_seconds=60) == HOPS
            took = time.thread_time_ns() - began
            assert tracer is None or tracer.seen > 3 * HOPS
        return took / HOPS

    return _in_turns(HOP_TURNS * repetitions, lambda variant: trio.run(once, variant))


# -- calls


def measure_calls(repetitions: int, *, counts: bool) -> tuple[dict[str, list[float]], dict[str, float]]:
    """As `measure_hops`, of records in a worker; each variant's worker is a process of its own. Then, if asked for, instructions."""
    with tempfile.TemporaryDirectory(prefix="vgpu-trace-cost-") as name:
        folder = Path(name)
        roots = {"off": _build(folder / "plain", without_trace=False)}
        roots["on"] = roots["off"]
        roots["without hooks"] = _build(folder / "without", without_trace=True)

        def run(variant: str, rounds: int, *under: str) -> list[float]:
            own = str(Path(__file__).resolve())
            words = [sys.executable, "-P", own, "--worker", str(roots[variant]), variant, name, str(rounds)]
            done = subprocess.run([*under, *words], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise SystemExit(f"{variant}: {done.stderr}")
            return [float(word) for word in done.stdout.split()]

        def instructions(variant: str) -> float:
            out = folder / "callgrind.out"
            words = ["--tool=callgrind", f"--callgrind-out-file={out}", "--toggle-collect=replay_record"]
            _, records = run(variant, 1, "valgrind", *words)
            found = re.search(r"^(?:summary|totals): (\d+)", out.read_text(), re.MULTILINE)
            if found is None:
                raise SystemExit("valgrind counted nothing")
            return int(found[1]) / records

        samples = _in_turns(repetitions, lambda variant: run(variant, CALL_ROUNDS)[0])
        return samples, {variant: instructions(variant) for variant in VARIANTS} if counts else {}


def _build(copy: Path, *, without_trace: bool) -> Path:
    """The committed sources, and a worker of them; without a trace: compiled as if nobody could ever switch it on."""
    copy.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(copy)], input=archive, check=True)
    header = copy / "gpu" / "replay" / "internal.h"
    text = header.read_text()
    look = "return atomic_load_explicit(&replay->private->trace, memory_order_acquire);"
    assert text.count(look) == 1
    if without_trace:
        header.write_text(text.replace(look, "(void)replay; return NULL;"))
    command = [sys.executable, str(copy / "tools" / "build_native.py"), "--only", "_replay"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return copy


def worker(root: Path, variant: str, folder: Path, rounds: int) -> tuple[float, int]:
    """In a process of its own: nanoseconds of processor time a record, and how many records there were."""
    sys.path[:0] = [str(root / "src"), str(root)]
    # An editable install has put a finder before the path, which would bring this checkout's modules.
    sys.meta_path[:] = [finder for finder in sys.meta_path if isinstance(finder, type)]
    from tests.gpu.replay.guest import HEAD, build_fake_driver, replayed
    from vgpu.gpu import trace
    from vgpu.gpu._replay import lib
    from vgpu.transport._generated_calls import CallId

    assert Path(trace.__file__).resolve().is_relative_to(root)
    if not (folder / "libcuda.so.1").exists():
        build_fake_driver(folder)
    with replayed(folder / "libcuda.so.1", ring_size=RING_BYTES) as session:
        guest = session.guest
        guest.retain()
        if variant == "on":
            descriptor = os.memfd_create("trace")
            os.ftruncate(descriptor, trace.FILE_SIZE)
            assert lib.vgpu_replay_trace_map(session.replay, descriptor) == 0
            lib.vgpu_replay_trace(session.replay, 1 << 40)
        thread = session.thread.native_id
        assert thread is not None
        count = RING_BYTES // 2 // 80  # half a ring of bare headers
        times = []
        for _ in range(rounds):
            while guest.u64(HEAD) != guest.tail:
                time.sleep(0.001)
            for _ in range(count):
                guest.put(int(CallId.cuCtxSetLimit), 2, 1)
            before = _thread_ns(thread)
            guest.publish()
            guest.ring_bell()
            while guest.u64(HEAD) != guest.tail:
                time.sleep(0.0005)
            times.append((_thread_ns(thread) - before) / count)
        records = session.grant.get("records")
    return statistics.median(times[2:] or times), records


def _thread_ns(thread: int) -> int:
    """Processor time of a thread of this process, by the scheduler's own count."""
    return int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0])


# -- the whole


def _in_turns(repetitions: int, once: Callable[[str], float]) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for variant in VARIANTS:
        once(variant)  # what happens once only
    for turn in range(repetitions):
        for variant in VARIANTS if turn % 2 == 0 else reversed(VARIANTS):
            samples[variant].append(once(variant))
    return samples


def summary(samples: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and what off and on cost over no hooks and over off."""
    median = {variant: statistics.median(values) for variant, values in samples.items()}

    def cost(variant: str, base: str) -> dict[str, float]:
        differences = [a - b for a, b in zip(samples[variant], samples[base], strict=True)]
        nanoseconds = statistics.median(differences)
        return {"ns": nanoseconds, "percent": 100 * nanoseconds / median[base]}

    return {
        "samples_ns": samples,
        "median_ns": median,
        "off_over_without_hooks": cost("off", "without hooks"),
        "on_over_off": cost("on", "off"),
    }


def main() -> int:
    """Measure and print."""
    if sys.argv[1:2] == ["--worker"]:
        print(*worker(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), int(sys.argv[5])))
        return 0
    sys.path.insert(0, str(ROOT / "src"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--instructions", action="store_true", help="count them with valgrind, too")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    result: dict[str, Any] = {
        "written_by": "bench/trace_cost.py",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "cpus": os.cpu_count(),
        "load_average": list(os.getloadavg()),
        "python": platform.python_version(),
        "repetitions": options.repetitions,
    }
    calls, counted = measure_calls(options.repetitions, counts=options.instructions)
    for name, samples in (("hop", measure_hops(options.repetitions)), ("call", calls)):
        result[name] = found = summary(samples)
        off, on = found["off_over_without_hooks"], found["on_over_off"]
        print(
            f"{name}: {found['median_ns']['without hooks']:.0f} ns without hooks; "
            f"off {off['ns']:+.1f} ns ({off['percent']:+.2f} %), on {on['ns']:+.1f} ns ({on['percent']:+.1f} %)"
        )
    if counted:
        result["call"]["instructions"] = counted
        print(
            "call: instructions " + ", ".join(f"{count:.1f} {variant}" for variant, count in counted.items())
        )
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
