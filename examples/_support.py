# SPDX-License-Identifier: Apache-2.0
"""What the examples share: a mediator of their own, guest programs, neighbours that must not notice, and a report.

An example is a function that gets an ``Example`` and does something bad to a host. It says what it does
(``say``) and states facts (``fact``); ``main`` adds the verdict and the exit status, 1 if one fact does not hold. Only
interfaces that anybody may use are used here: the commands, the sockets, and public modules.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from vgpu.admin_client import AdminClient, NoMediator

HERE = Path(__file__).resolve().parent
PROGRAMS = HERE / "programs"
START_SECONDS = 60.0
WAIT_SECONDS = 60.0
# A device that leaves room for several on a small machine.
MEMORY_BYTES = 1 << 30
LAUNCH_TIMEOUT = 702  # CUDA_ERROR_LAUNCH_TIMEOUT


class NotSo(Exception):
    """What an example waited for did not come; the example has failed."""


def wait_until(condition: Callable[[], bool], what: str, seconds: float = WAIT_SECONDS) -> float:
    """Look until it is so; how long that took, in seconds.

    Raises:
        NotSo: it was not so in time.
    """
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise NotSo(f"not so within {seconds:g} s: {what}")
        time.sleep(0.01)
    return time.monotonic() - began


def is_alive(pid: int) -> bool:
    """Is there a process of that number that has not ended? A zombie has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


class Guest:
    """A program in a VM. Its output is read at once, so it never waits for us."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA_", "VGPU_"))}
        environment["CUDA_CACHE_DISABLE"] = "1"
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )  # fmt: skip
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def pid(self) -> int:
        """Of the program itself: ``vgpu-run`` becomes the program."""
        return self.process.pid

    def until(self, word: str, seconds: float = WAIT_SECONDS) -> str:
        """Wait for a line that begins with ``word``; that line.

        Raises:
            NotSo: it ended without one, or was silent for too long.
        """
        deadline = time.monotonic() + seconds
        while True:
            has_ended = self.process.poll() is not None
            if has_ended:
                self._reader.join(5)
            for line in self.lines:
                if line.startswith(word):
                    return line
            if has_ended or time.monotonic() > deadline:
                raise NotSo(f"{self.name} did not say {word!r}; it said {self.lines[-3:]}")
            time.sleep(0.005)

    def hang(self) -> tuple[int, float]:
        """What ``hang.py`` was told of its kernel, and how many seconds after the launch, by the program's own clock."""
        code, seconds = self.until("synchronize").split()[1:]
        return int(code), float(seconds)

    def turn(self) -> int:
        """The last turn a neighbour has told of."""
        return max((int(line.split()[1]) for line in self.lines if line.startswith("turn ")), default=0)

    def finish(self, seconds: float = WAIT_SECONDS) -> tuple[int, str]:
        """Close its input, which ends a neighbour, and wait for its end: exit status and last line.

        Raises:
            NotSo: it does not end.
        """
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        return self.finish_by_itself(seconds)

    def finish_by_itself(self, seconds: float = WAIT_SECONDS) -> tuple[int, str]:
        """Wait for its end: exit status and last line.

        Raises:
            NotSo: it does not end.
        """
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise NotSo(f"{self.name} does not end; it said {self.lines[-3:]}") from None
        self._reader.join(5)
        return status, self.lines[-1] if self.lines else ""

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()


class Host:
    """The sockets' directory of a mediator, the mediator, and the programs that run against it."""

    def __init__(
        self, gpu: str, preload: Path | None = None, environment: dict[str, str] | None = None
    ) -> None:
        """``preload``: a library that the mediator, and all it starts, is run with."""
        self.gpu = gpu
        # Short, for a socket's path is at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="vgpu-", dir="/tmp"))
        self.run_dir, self.state_dir = self.folder / "run", self.folder / "state"
        self.log = self.folder / "mediator.log"
        self._environment = {**os.environ, "VGPU_SOFTWARE_MEMORY": str(MEMORY_BYTES), **(environment or {})}
        if preload is not None:
            self._environment["LD_PRELOAD"] = str(preload)
        self._process: subprocess.Popen[bytes] | None = None
        self._guests: list[Guest] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_guests()
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- the mediator

    def start(self) -> float:
        """Start it; seconds until it answered."""
        command = [sys.executable, "-P", "-m", "vgpu.mediator_main", "--gpu", self.gpu]
        command += ["--run-dir", str(self.run_dir), "--state-dir", str(self.state_dir)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment
            )
        return wait_until(self._is_ready, "the mediator is ready", START_SECONDS)

    def _is_ready(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise NotSo(f"the mediator ended: {self.log.read_text()[-2000:]}")
        with contextlib.suppress(NoMediator):
            return bool(self.ask("health")["ok"])
        return False

    @property
    def pid(self) -> int:
        """The mediator's."""
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Has the mediator not ended?"""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL the mediator; workers, devices and guests stay."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """End the mediator, and what it would leave to a successor."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for module in ("vgpu.gpu.worker", "vgpu.transport.stub"):
            for pid in self.processes(module):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def processes(self, module: str) -> list[int]:
        """Living processes of this host that run a module of ours."""
        wanted, marker = module.encode(), str(self.run_dir).encode()
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
                if wanted in words and marker in words and is_alive(int(entry.name)):
                    found.append(int(entry.name))
        return found

    # -- the administrator

    def ask(self, method: str, **parameters: Any) -> Any:
        """One question on ``admin.sock``."""
        with AdminClient(self.run_dir) as client:
            return client.ask(method, **parameters)

    def admin(self, *words: str) -> str:
        """Run ``vgpu-admin``; what it prints.

        Raises:
            NotSo: it refused.
        """
        command = [sys.executable, "-P", "-m", "vgpu.admin_main", "--run-dir", str(self.run_dir), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=WAIT_SECONDS)
        if done.returncode:
            raise NotSo(f"vgpu-admin {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout.rstrip()

    def sessions(self) -> list[dict[str, Any]]:
        """The living ones."""
        return [sample for sample in self.ask("sessions") if not sample["ended"]]

    def session_of(self, guest: Guest) -> dict[str, Any]:
        """The living session of a program, once it has one."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found[:] = [s for s in self.sessions() if s["info"]["guest_pid"] == guest.pid]
            return bool(found)

        wait_until(look, f"{guest.name} has a session")
        return found[0]

    def worker_of(self, guest: Guest) -> int:
        """The process that replays a program's calls."""
        return int(self.session_of(guest)["info"]["worker_pid"])

    # -- guests

    def begin(self, program: str, *arguments: str, vm: str) -> Guest:
        """Start one of ``programs/`` in a VM, with ``vgpu-run``."""
        command = [
            sys.executable,
            "-P",
            "-m",
            "vgpu.run_main",
            "--run-dir",
            str(self.run_dir),
            "--vm",
            vm,
            "--",
        ]
        guest = Guest(
            f"{program} in VM {vm}", [*command, sys.executable, str(PROGRAMS / program), *arguments]
        )
        self._guests.append(guest)
        return guest

    def end_guests(self) -> None:
        """Kill those that still run."""
        for guest in self._guests:
            if guest.process.poll() is None:
                guest.kill()


class Example:
    """One run of an example: what it says, and whether all of it was so."""

    def __init__(self, gpu: str, seconds: float = 0.0) -> None:
        """``seconds``: how long to go on where somebody watches; 0: as long as it takes."""
        self.gpu = gpu
        self.seconds = seconds
        self.facts = 0
        self.failures: list[str] = []

    def say(self, text: str) -> None:
        """What is done now."""
        print(f"  {text}", flush=True)

    def fact(self, is_so: bool, text: str) -> None:
        """What this run proves, or fails to."""
        self.facts += 1
        print(f"  {'[ok]   ' if is_so else '[WRONG]'} {text}", flush=True)
        if not is_so:
            self.failures.append(text)

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder that is gone afterwards."""
        with tempfile.TemporaryDirectory(prefix="vgpu-") as path:
            yield Path(path)

    @contextlib.contextmanager
    def host(self, *, start: bool = True, **how: Any) -> Iterator[Host]:
        """A mediator that lives as long as the block. If the example fails, the end of its log is shown."""
        with Host(self.gpu, **how) as host:
            if start:
                host.start()
            try:
                yield host
            except Exception:
                print(host.log.read_text()[-3000:], file=sys.stderr)
                raise

    @contextlib.contextmanager
    def neighbours(self, host: Host, count: int = 1, pause_ms: float | None = None) -> Iterator[list[Guest]]:
        """Programs that compute while the block runs; afterwards, the facts about each of them.

        ``pause_ms``: how long one turn of them may take at the most.
        """
        guests = [host.begin("neighbour.py", vm=f"neighbour-{n + 1}") for n in range(count)]
        for guest in guests:
            guest.until("turn 1")
        self.say(
            f"{count} neighbours compute and check every sum"
            if count > 1
            else "a neighbour computes and checks every sum"
        )
        yield guests
        for number, guest in enumerate(guests, 1):
            self.settle(f"neighbour {number}", guest, pause_ms)

    def goes_on(self, guests: list[Guest], turns: int = 3) -> None:
        """Wait until each of them has computed a few more turns.

        Raises:
            NotSo: one does not.
        """
        wanted = [guest.turn() + turns for guest in guests]
        for guest, turn in zip(guests, wanted, strict=True):
            wait_until(
                lambda guest=guest, turn=turn: guest.turn() >= turn or guest.process.poll() is not None,  # type: ignore[misc]
                f"{guest.name} computes on",
            )
            if guest.process.poll() is not None:
                raise NotSo(f"{guest.name} ended: {guest.lines[-1:]}")

    def hung(self, name: str, guest: Guest, deadline: float) -> None:
        """State when a program with a kernel that hangs was told so: never before its deadline.

        How late is said and not judged: a session's time without a processor does not count (docs/failures.md), so it says
        how busy this machine is. That it was told at all is a fact, for later the kernel ends by itself, without an error.
        """
        code, seconds = guest.hang()
        self.fact(code == LAUNCH_TIMEOUT, f"{name} was told CUDA_ERROR_LAUNCH_TIMEOUT ({code})")
        # The watchdog's clock begins with the call as its worker shows it, which is a moment after the program's.
        self.fact(
            seconds >= deadline, f"its deadline: {deadline:g} s after the launch; it was not told before"
        )
        self.say(f"lateness: it was told {seconds - deadline:.2f} s after the deadline")

    def end_of_flood(self, host: Host, flood: Guest, vm: str) -> dict[str, Any]:
        """Take the VM's rate off, have its ``flood.py`` launch no more, and wait until all that it has launched is done.

        Returns:
            What it prints at its end; ``is_right``: and nothing was lost, nothing overtaken, no call failed.
        """
        host.admin("set-rate-limit", f"--vm-name={vm}", "--rate=0")
        flood.process.send_signal(signal.SIGTERM)
        status, last = flood.finish_by_itself(120)
        done: dict[str, Any] = json.loads(last)
        return {**done, "is_right": status == 0 and done["is_right"]}

    def held_to_rate(self, host: Host, guest: Guest, vm: str, rate: int, seconds: float) -> None:
        """Watch a flooding VM for a while, and state that it saw BUSY and was slowed to its rate, neither more nor less.

        By the counters of its worker and of its account. Both bounds hold on a machine of any load:

        - At most: it has its rate for as long as it was watched, and a burst of one second, which it may have saved where its
          worker had no processor; five in a hundred more are allowed.
        - At least: who waits for its rate has spent all it had, and waits again only once what came in meanwhile is spent
          too. So its calls are its rate times the time it was held back, whatever else it waited for. Only what came in
          during a wait of more than a second is lost, where the whole machine stood still: a fifth is asked.
        """

        def sample() -> tuple[int, int]:
            (found,) = [s for s in host.ask("sessions") if s["info"]["session"] == session]
            return found["grant"]["records"], found["taken_ns"]

        def account() -> tuple[int, int]:
            (found,) = [a for a in host.ask("accounts") if a["vm"] == vm]
            return found["held_back"], found["held_back_ns"]

        session = host.session_of(guest)["info"]["session"]
        wait_until(lambda: account()[1] > 0, f"VM {vm} is held back")
        calls, taken = sample()
        # Accounts are looked at twice a second. The next look is behind that sample, so no wait before it counts.
        stale = account()
        wait_until(lambda: account()[1] > stale[1], f"VM {vm} is held back again")
        times, waited = account()
        time.sleep(seconds)
        last_times, last_waited = account()
        last_calls, last_taken = sample()
        calls, times = last_calls - calls, last_times - times
        watched, held = (last_taken - taken) / 1e9, (last_waited - waited) / 1e9
        self.fact(
            times > 0 and held > 0,
            f"VM {vm} saw BUSY: held back {times} times, {held:.2f} s of {watched:.2f} s",
        )
        self.fact(
            rate * held / 5 <= calls <= rate * 1.05 * (watched + 1),
            f"its worker took {calls} calls of it, {calls / watched:.0f} a second; its rate is {rate}",
        )

    def settle(self, name: str, guest: Guest, pause_ms: float | None = None) -> None:
        """End a neighbour, and state what became of it."""
        status, last = guest.finish()
        try:
            done = json.loads(last)
        except ValueError:
            self.fact(False, f"{name} ended with status {status}: {guest.lines[-3:]}")
            return
        self.fact(
            (done["failed"], done["wrong"], status) == (0, 0, 0) and done["turns"] > 0,
            f"{name}: {done['calls']} calls, {done['failed']} lost; {done['turns']} sums, {done['wrong']} wrong; "
            f"longest turn {done['longest_turn_ms']:g} ms {done['failure']}".rstrip(),
        )
        if pause_ms is not None:
            longest = done["longest_turn_ms"]
            self.fact(
                longest <= pause_ms, f"{name} never waited longer than {pause_ms:g} ms ({longest:g} ms)"
            )


def build(source: str, folder: Path, *options: str) -> Path:
    """Compile a C file of this folder to a shared library.

    Raises:
        NotSo: the compiler refuses, or there is none.
    """
    out = folder / (Path(source).stem + ".so")
    command = [
        "gcc",
        "-shared",
        "-fPIC",
        "-O2",
        "-Wall",
        "-Wextra",
        "-o",
        str(out),
        str(HERE / source),
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotSo(f"gcc: {done.stderr}")
    return out


def main(description: str | None, body: Callable[[Example], None]) -> int:
    """Run an example: its title, what it says, its verdict. The exit status."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--gpu", default="software", choices=("software", "nvidia"), help="default software")
    parser.add_argument("--seconds", type=float, default=0.0, help="how long to go on, where one can watch")
    options = parser.parse_args()
    example = Example(options.gpu, options.seconds)
    print((description or "").splitlines()[0], flush=True)
    began = time.monotonic()
    try:
        body(example)
    except NotSo as error:
        example.fact(False, str(error))
    took = time.monotonic() - began
    if example.failures or not example.facts:
        print(
            f"verdict: DOES NOT HOLD, {len(example.failures)} of {example.facts} facts are wrong ({took:.1f} s)"
        )
        return 1
    print(f"verdict: holds, {example.facts} facts ({took:.1f} s)")
    return 0
