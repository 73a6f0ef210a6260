# SPDX-License-Identifier: Apache-2.0
"""Whoever writes the ledger is killed in mid-work, again and again: what was acknowledged is there, and nothing is half there.

A program that is killed shows what the file keeps of a process' sudden end. That a host's sudden end keeps as much is SQLite's
promise for WAL with ``synchronous = FULL``, and the test of the settings holds us to that.
"""

from __future__ import annotations

import contextlib
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.e2e.mediator import Mediator, wait_until
from tests.src.test_commands import command
from vgpu.actors import StartFailed, open_system
from vgpu.actors.ledger import CannotWrite, Ledger, LedgerFile
from vgpu.actors.ledger_health import CheckLedger
from vgpu.actors.messages import EnsureVm, ListVms
from vgpu.supervision import ChildSpec, SupervisorSpec

KILLS = 20
# A program of a VM that makes a context, says what became of it, and stays until it reads a line.
NEWCOMER = """
import ctypes, sys
cuda, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
print(cuda.cuInit(0) or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0), flush=True)
sys.stdin.readline()
"""
# Writes as the mediator does, through the actor, and says a word only when it was told that it is kept.
WRITER = """
import sys, trio
from pathlib import Path
from vgpu.actors import ActorSpec, open_system
from vgpu.actors.ledger import Ledger
from vgpu.actors.messages import *

async def main():
    async with open_system() as system:
        ledger = await system.spawn(ActorSpec("ledger", lambda: Ledger(Path(sys.argv[1]))))
        while True:
            session = await ledger.ask(NextSession())
            print("session", int(session), flush=True)
            vm = f"vm-{int(session)}"
            await ledger.ask(SaveVm(VmRecord(vm, weight=int(session) % 1000 + 1)))
            print("vm", int(session), flush=True)
            info = SessionInfo(session, vm, 1, "writer", "worker", 2)
            await ledger.ask(RecordStart(info))
            print("start", int(session), flush=True)
            await ledger.ask(RecordFault(info, 702, "x" * 2000))
            print("fault", int(session), flush=True)

trio.run(main)
"""


def write_until_killed(path: Path, words: int, seconds: float) -> list[tuple[str, int]]:
    """What a writer was told that it is kept, before it was killed: so long after so many words, for a busy disk writes few in any time."""
    command_line = [sys.executable, "-P", "-c", WRITER, str(path)]
    with subprocess.Popen(
        command_line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        first = "".join(process.stdout.readline() for _ in range(words))
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read()
    assert process.returncode == -signal.SIGKILL
    # A last word that was cut off was not said.
    whole = (first + rest).rpartition("\n")[0].splitlines()
    return [(kind, int(number)) for kind, number in (line.split() for line in whole)]


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    chance = random.Random(4)
    told: list[tuple[str, int]] = []
    for _ in range(KILLS):
        told += write_until_killed(path, chance.randint(1, 16), chance.uniform(0, 0.02))
        # Left as it is: the next one finds the log of the one before and has to recover by itself.
        assert path.with_name("ledger.sqlite-wal").exists()
    sessions = [number for kind, number in told if kind == "session"]
    assert len(sessions) >= KILLS
    assert len(set(sessions)) == len(sessions), "a session number was given out twice"
    ledger = LedgerFile(path)
    vms = {vm.name: vm.weight for vm in ledger.vms()}
    ledger.close()
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        kept = {row[0]: row[1] for row in database.execute("SELECT session, began FROM sessions")}
        faults = {row[0]: row[1] for row in database.execute("SELECT session, what FROM faults")}
    for kind, number in told:
        match kind:
            case "session":
                assert number in kept
            case "vm":
                assert vms[f"vm-{number}"] == number % 1000 + 1
            case "start":
                assert kept[number] is not None
            case "fault":
                assert faults[number] == "x" * 2000, "half a fault"


def test_it_is_written_as_sqlite_promises_to_keep_it(tmp_path: Path) -> None:
    ledger = LedgerFile(tmp_path / "ledger.sqlite")
    try:
        settings = {
            name: ledger._db.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "journal_size_limit")
        }
    finally:
        ledger.close()
    # 2: FULL, which syncs the log at every commit. NORMAL would lose the last ones with the host's power.
    assert settings == {"journal_mode": "wal", "synchronous": 2, "journal_size_limit": 16 << 20}


def test_vms_registered_with_a_mediator_survive_its_kill() -> None:
    names: list[str] = []
    with Mediator() as mediator:
        for life in range(3):
            for number in range(3):
                name = f"vm-{life}-{number}"
                done = command(
                    "vgpu.admin_main", "register-vm", "--vm-name", name, "--no-device", VGPU_RUN_DIR=str(mediator.run_dir)
                )  # fmt: skip
                assert done.returncode == 0, done.stderr
                names.append(name)
            mediator.kill()
            mediator.start()
            assert [vm["name"] for vm in mediator.ask("vms")] == names


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 2 MiB, where this may be mounted."""
    with tempfile.TemporaryDirectory() as name:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", name],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", "-l", name], check=True)


def test_a_full_disk_is_said_and_forgotten_when_there_is_room_again(small_disk: Path) -> None:
    path = small_disk / "ledger.sqlite"
    ledger = LedgerFile(path)
    try:
        health = ledger.check()
        assert (health.writable, health.trouble) == (True, "")
        assert 0 < health.free_bytes < 2 << 20
        filler = small_disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        for _ in range(3):
            health = ledger.check()
            assert (health.writable, health.trouble, health.free_bytes) == (
                False,
                "database or disk is full",
                0,
            )
        filler.unlink()
        assert ledger.check().writable
        ledger.ensure_vm("after")
        assert [vm.name for vm in ledger.vms()] == ["after"]
    finally:
        ledger.close()


def test_administrators_are_told_of_a_full_disk(small_disk: Path) -> None:
    """With a mediator: show-health says it and ends with 1, the metric is 0, and both recover."""
    mediator = Mediator()
    mediator.state_dir = small_disk

    def show(*words: str) -> subprocess.CompletedProcess[str]:
        return command("vgpu.admin_main", *words, VGPU_RUN_DIR=str(mediator.run_dir))

    with mediator:
        assert show("show-health").returncode == 0
        filler = small_disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        told = show("show-health")
        assert told.returncode == 1
        assert "the ledger cannot be written: database or disk is full" in told.stdout
        assert "0 MiB free" in told.stdout
        assert "\nvgpu_ledger_writable 0.0\n" in show("show-metrics").stdout
        done = show("top", "--once", "--interval", "0.1")
        assert "NOT WELL: the ledger cannot be written" in done.stdout
        filler.unlink()
        wait_until(lambda: show("show-health").returncode == 0, 60, "it is well again")
        assert "\nvgpu_ledger_writable 1.0\n" in show("show-metrics").stdout


class Unwell(Mediator):
    """A mediator that has started when it says how it is, whatever it says."""

    def _is_ready(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(self.ask("health")["pid"])
        return False


def fill(disk: Path) -> Path:
    """Leave no room; what to remove for some."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


@pytest.mark.parametrize("is_new", [True, False])
async def test_a_ledger_that_starts_on_a_full_disk_waits_for_room(
    small_disk: Path, is_new: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It neither fails its start nor is started again and again; whoever asks is refused, and what was kept is there afterwards."""
    path = small_disk / "ledger.sqlite"
    if not is_new:
        LedgerFile(path).close()
        ledger = LedgerFile(path)
        ledger.ensure_vm("before")
        ledger.close()
    filler = fill(small_disk)
    spec = SupervisorSpec("mediator", (ChildSpec("ledger", Ledger, (path,)),), intensity=0)
    async with open_system(spec) as system:
        ledger_ref = system.ref("mediator/ledger")
        for _ in range(3):
            with pytest.raises(CannotWrite, match=r"cannot be opened|full"):
                await ledger_ref.ask(EnsureVm("early"))
        health = await ledger_ref.ask(CheckLedger())
        assert not health.writable
        assert health.trouble
        filler.unlink()
        with trio.fail_after(60):
            while not (await ledger_ref.ask(CheckLedger())).writable:
                await trio.sleep(0.05)
        await ledger_ref.ask(EnsureVm("late"))
        names = [vm.name for vm in await ledger_ref.ask(ListVms())]
        assert names == (["late"] if is_new else ["before", "late"])
        assert system.statistics().restarts == 0
    if is_new:  # one that is there can be opened, and says at the first write that it is full
        assert "new sessions wait until it can" in caplog.text
        assert "is open again" in caplog.text


async def test_a_file_that_is_none_fails_the_start(tmp_path: Path) -> None:
    """No room would make it one."""
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"no database at all " * 100)
    with pytest.raises(StartFailed, match="not a database"):
        async with open_system(SupervisorSpec("mediator", (ChildSpec("ledger", Ledger, (path,)),))):
            pass


def test_a_mediator_that_starts_on_a_full_disk_lets_newcomers_wait(small_disk: Path) -> None:
    """Nobody is told of an error: the program that came is in as soon as there is room."""
    mediator = Unwell()
    mediator.state_dir = small_disk
    with mediator:
        mediator.kill()
        filler = fill(small_disk)
        mediator.start()
        pid = mediator.pid
        health = mediator.ask("health")
        assert (health["ok"], bool(health["trouble"])) == (False, True)
        waiting = mediator.begin(sys.executable, "-c", NEWCOMER)
        wait_until(lambda: "no session for pid" in mediator.log.read_text(), 60, "it is told to come again")
        assert waiting.process.poll() is None
        filler.unlink()
        assert waiting.line(60) == "0"
        waiting.say()
        assert waiting.finish()[0] == 0
        assert mediator.pid == pid
        wait_until(lambda: mediator.ask("health")["ok"], 60, "all is well")
        restarts = {actor["name"]: actor["restarts"] for actor in mediator.ask("tree")[0]["children"]}
        assert restarts["mediator/ledger"] == 0
