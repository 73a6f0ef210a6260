# SPDX-License-Identifier: Apache-2.0
"""What the steps of ``control.py`` share: a mediator of a step's own, guests that are told what to do, and where findings go.

A guest is ``programs/control_load.c``, compiled here, in a VM by its environment, or native. Every wait has an end; nothing
here decides whether a finding is good.
"""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import attrs
from bench import sides

from tests.e2e import mediator as e2e
from tests.e2e.mediator import Guest
from tests.e2e.vm_device import DeviceMediator

SOURCE = Path(__file__).resolve().parent / "programs" / "control_load.c"
MIB = 1 << 20
READY_SECONDS = 40.0
SLACK_SECONDS = 30.0
ENOUGH_PROCESSORS = 12


def without_paths(text: str) -> str:
    """The same text, with every absolute path of this machine but its last word left out."""
    return re.sub(r"(?<![\w.])/(?:[\w.+@-]+/)+", ".../", text)


@attrs.define(eq=False)
class Findings:
    """What a step found so far; every entry is saved at once, so that a step that is cut off keeps what it had."""

    values: dict[str, Any]
    _save: Callable[[], None]
    _is_real: bool

    def put(self, name: str, value: Any) -> None:
        """Keep a finding."""
        self.values[name] = value
        self._save()

    def judge(self, name: str, good: bool, *, of_speed: bool = False) -> None:
        """Whether a promise was kept. What is promised of a real GPU's speed is not judged on another."""
        place = "kept" if self._is_real or not of_speed else "not_judged_here"
        self.values.setdefault(place, {})[name] = bool(good)
        self._save()

    def child(self, name: str) -> Findings:
        """A part of it."""
        return Findings(self.values.setdefault(name, {}), self._save, self._is_real)


@attrs.frozen
class Scene:
    """Where a step runs and how much time it may take. ``scale`` is 1 for a whole run."""

    gpu: str
    scale: float
    program: Path

    @property
    def is_real(self) -> bool:
        """A real GPU, not the software one."""
        return self.gpu == "nvidia"

    def long(self, seconds: float, least: float = 0.3) -> float:
        """So many seconds of a whole run, in this one."""
        return max(seconds * self.scale, least)

    def times(self, count: int, least: int = 1) -> int:
        """So many repetitions of a whole run, in this one."""
        return max(round(count * min(self.scale, 1.0)), least)

    def pick(self, real: int, software: int) -> int:
        """A size for a real GPU, or one that the software GPU does in as long."""
        return real if self.is_real else software


class Load:
    """A running guest program. What it answers comes as numbers."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        assert guest.line(READY_SECONDS) == "ready", guest.lines

    @property
    def pid(self) -> int:
        """The program's."""
        return self.guest.process.pid

    def say(self, *words: object) -> None:
        """Tell it what to do; ``answer`` hears what came of it."""
        self.guest.say(" ".join(map(str, words)))

    def answer(self, seconds: float = SLACK_SECONDS) -> list[int]:
        """The numbers of its next line.

        Raises:
            AssertionError: it ended, was silent, or a call failed that must not.
        """
        word, *numbers = self.guest.line(seconds).split()
        assert word != "failed", self.guest.lines[-1]
        return [int(number) for number in numbers]

    def ask(self, *words: object, seconds: float = SLACK_SECONDS) -> list[int]:
        """``say`` and ``answer``."""
        self.say(*words)
        return self.answer(seconds)

    def rate(self, seconds: float, iterations: int) -> float:
        """Turns a second, over so many seconds.

        Raises:
            AssertionError: a call failed, or a sum was wrong.
        """
        turns, _, failed, wrong, _, taken = self.ask(
            "turns", seconds, iterations, seconds=seconds + SLACK_SECONDS
        )
        assert (failed, wrong) == (0, 0), f"{failed} calls failed, {wrong} sums were wrong"
        return turns / (taken / 1e9)

    def kill(self) -> None:
        """SIGKILL."""
        self.guest.kill()


class Neighbour:
    """A guest that computes until the block ends, and what became of it: it is to have noticed nothing."""

    def __init__(self, load: Load, iterations: int, findings: Findings) -> None:
        self._load, self._iterations, self._findings = load, iterations, findings

    def __enter__(self) -> Self:
        self._load.say("turns", 0, self._iterations)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._load.say("enough")
            turns, calls, failed, wrong, longest, taken = self._load.answer()
        except (AssertionError, OSError) as error:
            self._findings.put("neighbour", {"trouble": without_paths(str(error))[-400:]})
            self._findings.judge("neighbour lost no call", False)
            return
        self._findings.put(
            "neighbour",
            {
                "turns": turns,
                "calls": calls,
                "failed_calls": failed,
                "wrong_sums": wrong,
                "longest_turn_ms": longest / 1e6,
                "seconds": taken / 1e9,
            },
        )
        self._findings.judge("neighbour lost no call", failed == 0 and wrong == 0 and turns > 0)


class Host(DeviceMediator):
    """A mediator, and what an administrator asks of it."""

    def change(self, method: str, **parameters: Any) -> dict[str, Any]:
        """An administrator's command.

        Raises:
            AssertionError: it was refused.
        """
        answer = self.call(method, **parameters)
        assert "result" in answer, answer.get("error")
        result: dict[str, Any] = answer["result"]
        return result

    warm = 1

    def settle(self, seconds: float = 15.0) -> None:
        """Wait until the warm workers that guests took have successors: their start would be measured along.

        Not for ever: a measurement with some noise is better than none.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if len(list((self.run_dir / "workers").glob("*.sock"))) >= len(self.sessions()) + self.warm:
                return
            time.sleep(0.05)

    def load(self, scene: Scene, vm: str) -> Load:
        """A guest in a VM, ready."""
        return Load(self.begin(scene.program, vm=vm))

    def account(self, vm: str) -> dict[str, Any]:
        """What a VM holds and how often it was held back."""
        (found,) = [a for a in self.ask("accounts") if a["vm"] == vm]
        return dict(found)

    def of_vm(self, vm: str) -> list[dict[str, Any]]:
        """Samples of its living sessions."""
        return [sample for sample in self.sessions() if sample["info"]["vm"] == vm]

    def metrics(self) -> str:
        """What Prometheus would be told."""
        text = self.ask("metrics")
        return str(text["text"] if isinstance(text, dict) else text)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the series of that name that have these labels.

        Raises:
            AssertionError: there is none.
        """
        found = []
        for line in self.metrics().splitlines():
            if line.startswith((name + "{", name + " ")) and all(
                f'{k}="{v}"' in line for k, v in labels.items()
            ):
                found.append(float(line.rsplit(" ", 1)[1]))
        assert found, f"no metric {name} {labels}"
        return sum(found)


def put_apart(programs: list[int], workers: list[int], others: list[int]) -> dict[str, list[int]] | None:
    """Give the threads that never rest processors of their own: one for programs, one for workers; only one of each may run at
    a time. All else gets the rest. None, and nothing is done, where there are too few.

    Args:
        programs: process numbers, as are ``workers`` and ``others``. The busiest thread so far is the one that never rests.
    """
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < ENOUGH_PROCESSORS:
        return None
    # Not side by side: those may be two halves of one core, whatever this kernel is told.
    places = {"program": cpus[1:2], "replay loop": cpus[4:5], "all else": cpus[7:]}
    for pids, place in ((programs, "program"), (workers, "replay loop"), (others, "all else")):
        for pid in pids:
            used = _ticks_of_threads(pid)
            busiest = max(used, key=used.__getitem__, default=0)
            for thread in used:
                os.sched_setaffinity(thread, places[place if thread == busiest else "all else"])
    return places


def _ticks_of_threads(pid: int) -> dict[int, int]:
    """Ticks of processor time that each thread has used."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        fields = (task / "stat").read_text().rsplit(")", 1)[1].split()
        found[int(task.name)] = int(fields[11]) + int(fields[12])
    return found


def busiest_descendant(pid: int) -> int:
    """Of the process and all that it started: the one that has used the most processor time."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return max(found, key=lambda each: sum(_ticks_of_threads(each).values()))


@contextlib.contextmanager
def open_host(scene: Scene, *options: str, warm: int = 2) -> Iterator[Host]:
    """A mediator that lives as long as the block, with workers kept warm."""
    e2e.GPU = scene.gpu
    host = Host(options=["--warm-workers", str(warm), *options])
    host.warm = warm
    with host:
        yield host


@contextlib.contextmanager
def open_native(scene: Scene) -> Iterator[Load | None]:
    """The same program on the real driver, which sees the whole card; None where there is no real GPU."""
    if not scene.is_real:
        yield None
        return
    process = subprocess.Popen(
        [str(scene.program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=sides.native_environment(),
    )
    try:
        yield Load(Guest(process))
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def compiled() -> Iterator[Path]:
    """The guest program."""
    with tempfile.TemporaryDirectory(prefix="vgpu-control-") as folder:
        out = Path(folder) / "control_load"
        command = [os.environ.get("CC", "gcc"), "-std=gnu11", "-O2", "-o", str(out), str(SOURCE), "-ldl"]
        subprocess.run(command, check=True, capture_output=True)
        yield out


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and spread of what was measured several times; null where nothing was."""
    if not values:
        return {"count": 0, "median": None}
    return {
        "count": len(values),
        "median": statistics.median(values),
        "least": min(values),
        "most": max(values),
        "values": [round(value, 6) for value in values],
    }
