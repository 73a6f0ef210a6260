# SPDX-License-Identifier: Apache-2.0
"""What a message costs from one actor to another: ours, plain trio channels, Pykka and tractor; one table, one JSON file.

    python bench/hops.py [--messages N] [--asks N] [--repetitions N] [--setup] [--out FILE]

*send* is one producer and one consumer with room for 256 messages between them: time from the first send to the last
message handled, by the number of messages. *ask* is one round trip after the other: request, handler, answer. Every side
runs in a process of its own, in turn, `repetitions` times over, so that a disturbance of the machine meets all of them.

What is compared is not the same thing, and the numbers are to be read so. A trio channel is the floor: a queue between two
tasks, without names, deadlines, restarts or counters. Pykka's actors are threads. Tractor's are processes, and a hop is
encoded and goes over a socket. Ours are tasks of one event loop, as in the mediator.

Pykka and tractor are no dependencies: `--setup` puts them into environments under .cache/hops; a side whose environment
is not there is left out. Tractor's last release asks for a trio that still has MultiError, and for a pdbpp from
a git repository, which pip refuses from an index; it gets trio 0.22.2 and the pdbpp that the index has.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "hops"
CAPACITY = 256
WARM_UP = 500

# Side -> its environment's folder, what is installed there, and what is installed without what it asks for.
ENVIRONMENTS: dict[str, tuple[str, list[str], list[str]]] = {
    "pykka": ("venv", ["pykka==4.5.0"], []),
    "tractor": (
        "tractor",
        [
            "trio==0.22.2",
            "colorlog",
            "msgspec<0.19",
            "tricycle",
            "trio_typing",
            "wrapt",
            "async_generator",
            "pdbpp",
        ],
        ["tractor==0.1.0a5"],
    ),
}
SIDES = ("trio", "ours", "ours, detector on", "pykka", "tractor")
PACKAGES = {"trio": ("trio",), "pykka": ("pykka",), "tractor": ("tractor", "trio", "msgspec")}

Samples = dict[str, list[float]]


# -- the sides; each returns the seconds for all messages sent, and the seconds of each ask


def run_trio(messages: int, asks: int) -> tuple[float, list[float]]:
    """Two tasks and a memory channel; an ask carries an event and a place for the answer."""
    import trio

    async def consume(channel: trio.MemoryReceiveChannel[int], count: int) -> None:
        total = 0
        for _ in range(count):
            total += await channel.receive()

    async def serve(channel: trio.MemoryReceiveChannel[tuple[int, list[int], trio.Event]]) -> None:
        async for number, answer, event in channel:
            answer.append(number + 1)
            event.set()

    async def main() -> tuple[float, list[float]]:
        for count in (WARM_UP, messages):
            sender, receiver = trio.open_memory_channel[int](CAPACITY)
            began = time.perf_counter()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(consume, receiver, count)
                for number in range(count):
                    await sender.send(number)
            took = time.perf_counter() - began
        requests, served = trio.open_memory_channel[tuple[int, list[int], trio.Event]](CAPACITY)
        each = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, served)
            for number in range(asks + WARM_UP):
                began = time.perf_counter()
                answer: list[int] = []
                event = trio.Event()
                await requests.send((number, answer, event))
                await event.wait()
                each.append(time.perf_counter() - began)
                assert answer == [number + 1]
            requests.close()
        return took, each[WARM_UP:]

    return trio.run(main)


def run_ours(messages: int, asks: int, stuck_seconds: float | None = None) -> tuple[float, list[float]]:
    """An actor of ours, its mailbox as large as the channels."""
    import attrs
    import trio

    from vgpu.actors import Actor, ActorSpec, Request, handles, open_system

    @attrs.frozen
    class Note:
        number: int

    @attrs.frozen
    class Last:
        done: trio.Event

    @attrs.frozen
    class Next(Request[int]):
        number: int

    class Counter(Actor):
        mailbox_capacity = CAPACITY
        total = 0

        @handles(Note)
        def note(self, message: Note) -> None:
            self.total += message.number

        @handles(Last)
        def last(self, message: Last) -> None:
            message.done.set()

        @handles(Next)
        def next(self, request: Next) -> int:
            return request.number + 1

    async def main() -> tuple[float, list[float]]:
        async with open_system(ActorSpec("counter", Counter), stuck_seconds=stuck_seconds) as system:
            ref = system.ref("counter")
            for count in (WARM_UP, messages):
                done = trio.Event()
                began = time.perf_counter()
                for number in range(count - 1):
                    await ref.send(Note(number))
                await ref.send(Last(done))
                await done.wait()
                took = time.perf_counter() - began
            each = []
            for number in range(asks + WARM_UP):
                began = time.perf_counter()
                answer = await ref.ask(Next(number))
                each.append(time.perf_counter() - began)
                assert answer == number + 1
            return took, each[WARM_UP:]

    return trio.run(main)


def run_watched(messages: int, asks: int) -> tuple[float, list[float]]:
    """Ours with the stuck-handler detector on."""
    return run_ours(messages, asks, 1.0)


def run_pykka(messages: int, asks: int) -> tuple[float, list[float]]:
    """A ThreadingActor; `tell`, and `ask` that blocks."""
    pykka: Any = importlib.import_module("pykka")

    class Counter(pykka.ThreadingActor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.total = 0

        def on_receive(self, message: int | str) -> int:
            if isinstance(message, str):
                return self.total
            self.total += message
            return message + 1

    ref = Counter.start()
    try:
        for count in (WARM_UP, messages):
            began = time.perf_counter()
            for number in range(count - 1):
                ref.tell(number)
            ref.ask("last")
            took = time.perf_counter() - began
        each = []
        for number in range(asks + WARM_UP):
            began = time.perf_counter()
            answer = ref.ask(number)
            each.append(time.perf_counter() - began)
            assert answer == number + 1
        return took, each[WARM_UP:]
    finally:
        ref.stop()


def _tractor_context(function: Any) -> Any:
    """Tractor's decorator, in the processes of that side; elsewhere the function is never called."""
    try:
        return importlib.import_module("tractor").context(function)
    except ImportError:
        return function


async def tractor_next(number: int) -> int:
    """Runs in tractor's other process."""
    return number + 1


@_tractor_context
async def tractor_consume(ctx: Any, count: int) -> None:
    """Runs in tractor's other process: reads a stream."""
    await ctx.started()
    total = 0
    async with ctx.open_stream() as stream:
        for _ in range(count):
            total += await stream.receive()
        await stream.send(total)


def run_tractor(messages: int, asks: int) -> tuple[float, list[float]]:
    """Another process; a stream for the sends, `Portal.run` for the asks."""
    import warnings

    import trio

    warnings.simplefilter("ignore")
    tractor: Any = importlib.import_module("tractor")
    asks, warm_up = min(asks, 1000), 50

    async def main() -> tuple[float, list[float]]:
        async with tractor.open_nursery() as nursery:
            portal = await nursery.start_actor("counter", enable_modules=[__name__])
            for count in (WARM_UP, messages):
                async with (
                    portal.open_context(tractor_consume, count=count) as (context, _),
                    context.open_stream() as stream,
                ):
                    began = time.perf_counter()
                    for number in range(count):
                        await stream.send(number)
                    assert await stream.receive() == sum(range(count))
                    took = time.perf_counter() - began
            each = []
            for number in range(asks + warm_up):
                began = time.perf_counter()
                answer = await portal.run(tractor_next, number=number)
                each.append(time.perf_counter() - began)
                assert answer == number + 1
            await portal.cancel_actor()
            return took, each[warm_up:]

    return trio.run(main)


RUNNERS: dict[str, Callable[[int, int], tuple[float, list[float]]]] = {
    "trio": run_trio,
    "ours": run_ours,
    "ours, detector on": run_watched,
    "pykka": run_pykka,
    "tractor": run_tractor,
}


def measure(side: str, messages: int, asks: int) -> dict[str, Any]:
    """One run of one side, in this process."""
    took, each = RUNNERS[side](messages, asks)
    cuts = statistics.quantiles(each, n=100)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES.get(side, ("trio", "attrs"))}
    return {
        "send_ns": took / messages * 1e9,
        "ask_us_p50": statistics.median(each) * 1e6,
        "ask_us_p99": cuts[98] * 1e6,
        "versions": versions,
    }


# -- all sides, in turn


def python_of(side: str) -> Path | None:
    """The interpreter that has what the side needs; None where it was not set up."""
    if side not in ENVIRONMENTS:
        return Path(sys.executable)
    python = CACHE / ENVIRONMENTS[side][0] / "bin" / "python"
    return python if python.exists() else None


def set_up() -> None:
    """Make the environments of the others."""
    for folder, packages, bare in ENVIRONMENTS.values():
        venv.create(CACHE / folder, with_pip=True)
        pip = [str(CACHE / folder / "bin" / "pip"), "install", "--quiet"]
        subprocess.run([*pip, *packages], check=True)
        if bare:
            subprocess.run([*pip, "--no-deps", *bare], check=True)


def run_side(side: str, python: Path, messages: int, asks: int) -> dict[str, Any]:
    """One run of one side, in a process of its own."""
    command = [str(python), "-W", "ignore", str(Path(__file__).resolve()), "--side", side]
    command += ["--messages", str(messages), "--asks", str(asks)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"{side}: status {done.returncode}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def compare(messages: int, asks: int, repetitions: int) -> dict[str, Any]:
    """Run every side that is there, in turn, and put what they say side by side."""
    pythons = {side: python for side in SIDES if (python := python_of(side)) is not None}
    rows: dict[str, dict[str, Any]] = {}
    for repetition in range(repetitions):
        order = list(pythons) if repetition % 2 == 0 else list(reversed(pythons))
        for side in order:
            result = run_side(side, pythons[side], messages, asks)
            row = rows.setdefault(side, {"versions": result.pop("versions"), "samples": {}})
            result.pop("versions", None)
            for name, value in result.items():
                row["samples"].setdefault(name, []).append(value)
    for row in rows.values():
        for name, values in row["samples"].items():
            row[name] = statistics.median(values)
    return {
        "written_by": "bench/hops.py",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "messages": messages,
        "asks": asks,
        "repetitions": repetitions,
        "left_out": [side for side in SIDES if side not in pythons],
        "sides": {side: rows[side] for side in SIDES if side in rows},
    }


def table(record: dict[str, Any]) -> str:
    """The record in words, medians only."""
    lines = [f"{'':20} {'send, ns':>10} {'messages/s':>12} {'ask p50, µs':>12} {'ask p99, µs':>12}"]
    for side, row in record["sides"].items():
        lines.append(
            f"{side:20} {row['send_ns']:10.0f} {1e9 / row['send_ns']:12.0f} "
            f"{row['ask_us_p50']:12.1f} {row['ask_us_p99']:12.1f}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="cost of a message hop")
    parser.add_argument("--messages", type=int, default=50_000)
    parser.add_argument("--asks", type=int, default=10_000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--setup", action="store_true", help="make the environments of Pykka and tractor first"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options.messages, options.asks)))
        return 0
    if options.setup:
        set_up()
    record = compare(options.messages, options.asks, options.repetitions)
    print(table(record))
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
