# SPDX-License-Identifier: Apache-2.0
"""The service under a real systemd, installed as docs/operations.md tells: what the unit and that page promise, on the software GPU.

Each test finds the service active and leaves it so.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from tests.e2e.mediator import Guest, wait_until
from tests.systemd.host import ROOT, SystemdHost, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no systemd of our own: {why_not()}")

UNIT: Final = "vgpu-mediator.service"
PAGE: Final = ROOT / "docs" / "operations.md"
CONFIGURATION: Final = '[mediator]\ngpu = "software"\nwarm_workers = 1\n'
PROGRAM: Final = Path(__file__).resolve().parent / "programs" / "turns.py"
NOBODY: Final = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
HANG_SECONDS: Final = 4
EVENT_SECONDS: Final = 60.0


class ServiceHost(SystemdHost):
    """A host with the service installed."""

    python = Path("/opt/vgpu/bin/python")

    def configure(self, text: str) -> None:
        """Write the configuration file."""
        (self.share / "mediator.toml").write_text(text)
        self.run("install", "-D", "-m", "644", "/run/share/mediator.toml", "/etc/vgpu/mediator.toml")

    def install(self, wheel: Path) -> None:
        """As the page tells; but what comes from a package index is taken from this environment, for there is no network."""
        (self.share / wheel.name).write_bytes(wheel.read_bytes())
        self.run(Path(sys.executable).resolve(), "-m", "venv", "--without-pip", "/opt/vgpu")
        purelib = self.run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        (self.share / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
        self.run("cp", "/run/share/beside.pth", purelib.stdout.strip())
        pip = (
            sys.executable,
            "-m",
            "pip",
            "--python",
            self.python,
            "install",
            "-qq",
            "--no-deps",
            "--no-index",
        )
        self.run(*pip, "--no-compile", f"/run/share/{wheel.name}")
        block = PAGE.read_text().partition("On the host:\n\n")[2].partition("\n\n")[0]
        lines = [line.strip() for line in block.splitlines()]
        assert lines[0].startswith("python3 -m venv /opt/vgpu && /opt/vgpu/bin/pip install build/vgpu-"), (
            lines
        )
        assert lines[-1].startswith("systemctl daemon-reload && systemctl enable --now"), lines
        for line in lines[1:]:
            self.run("sh", "-ec", f"cd {ROOT} && {line}")

    def main_pid(self) -> int:
        """The mediator's process, as numbered in there; 0 while there is none."""
        return int(self.show(UNIT, "MainPID")[0])

    def wait_active(self, *, after: int = 0) -> int:
        """Wait until the service is up with another process than ``after``; its process."""

        def is_up() -> bool:
            state, pid = self.show(UNIT, "ActiveState", "MainPID")
            return state == "active" and int(pid) != after

        wait_until(is_up, EVENT_SECONDS, f"{UNIT} is active")
        return self.main_pid()

    def program(self, *, user: Sequence[str] = (), options: Sequence[str] = ("--vm=red",)) -> Guest:
        """A program that computes and checks until its input ends; ``user``: a command before it."""
        return Guest(self.spawn(*user, "vgpu-run", *options, "python3", PROGRAM))

    def workers(self) -> dict[str, int]:
        """VM -> its session's worker."""
        sessions = json.loads(self.run("vgpu-admin", "list-sessions", "--json").stdout)
        return {session["info"]["vm"]: session["info"]["worker_pid"] for session in sessions}


def finish(program: Guest) -> dict[str, Any]:
    """End a program; what it says of itself."""
    status, lines = program.finish()
    assert lines, f"status {status}: {program.errors()}"
    summary: dict[str, Any] = json.loads(lines[-1])
    assert (status, summary["wrong"]) == (0, 0), summary
    return summary


def goes_on(program: Guest, turns: int = 3) -> None:
    """It computes: told so several times from now on."""
    for _ in range(turns):
        program.until("turn ", EVENT_SECONDS)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    fetched = ROOT / ".cache" / "python-headers" / "include"
    has_headers = (Path(sysconfig.get_path("include")) / "Python.h").exists()
    given = [] if has_headers else [f"--config-settings=cmake.define.Python_INCLUDE_DIR={fetched}"]
    pip = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "--no-index"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*pip, *given, "-w", str(out), str(ROOT)],
        cwd=out,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def host(wheel: Path) -> Iterator[ServiceHost]:
    with ServiceHost() as made:
        made.configure(CONFIGURATION)
        made.install(wheel)
        yield made


@pytest.fixture(autouse=True)
def _no_program_stays(host: ServiceHost) -> Iterator[None]:
    yield
    host.end_spawned()


def test_it_becomes_ready_and_is_enabled(host: ServiceHost) -> None:
    shown = host.show(UNIT, "Type", "ActiveState", "SubState", "StatusText", "NRestarts", "WatchdogUSec")
    assert shown == ["notify", "active", "running", "serves software GPU", "0", "30s"]
    assert host.run("systemctl", "is-enabled", UNIT).stdout == "enabled\n"
    assert "ready: software GPU, sockets in /var/vgpu" in "\n".join(host.journal(UNIT))
    assert host.journal(UNIT, "--priority=warning") == []
    assert host.run("getent", "group", "vgpu").stdout.startswith("vgpu:")
    places = ("/var/vgpu", "/var/lib/vgpu", "/var/cache/vgpu", "/etc/vgpu")
    modes = host.run("stat", "-c", "%a %U", *places).stdout.splitlines()
    assert modes == ["755 root", "700 root", "700 root", "755 root"]
    assert host.run("vgpu-admin", "doctor", check=False).stdout.count("FAIL") == 0


def test_the_hardening_is_in_force_and_hides_no_device(host: ServiceHost) -> None:
    pid = host.main_pid()
    status = dict(line.split(":\t", 1) for line in host.run("cat", f"/proc/{pid}/status").stdout.splitlines())
    # CHOWN, DAC_OVERRIDE, FOWNER, KILL, IPC_LOCK, SYS_PTRACE, SYS_NICE
    allowed = sum(1 << bit for bit in (0, 1, 3, 5, 14, 19, 23))
    assert (int(status["CapBnd"], 16), status["NoNewPrivs"], status["Seccomp"]) == (allowed, "1", "2")
    inside = ("nsenter", "-t", str(pid), "--mount", "--")
    for refused in (
        "/usr/local/bin/new",
        "/etc/vgpu/new",
        f"{Path.home()}/new",
        "/tmp/new",
        "/proc/sys/kernel/hostname",
    ):
        done = host.run(*inside, "sh", "-c", f"echo new >{refused}", check=False)
        assert done.returncode != 0, refused
        assert "Read-only file system" in done.stderr
    for writable in ("/var/vgpu", "/var/lib/vgpu", "/var/cache/vgpu", "/dev/shm"):
        host.run(*inside, "sh", "-c", f"echo new >{writable}/new && rm {writable}/new")
    # A device that somebody else's driver has: nothing but the file's mode may stand in the way.
    assert host.show(UNIT, "DevicePolicy", "DeviceAllow", "PrivateDevices") == ["auto", "", "no"]


def test_programs_of_root_and_of_others_compute(host: ServiceHost) -> None:
    program = host.program()
    other = host.program(user=NOBODY, options=["--run-dir=/var/vgpu"])
    goes_on(program)
    goes_on(other)
    workers = host.workers().values()
    assert len(workers) == 2
    for worker in workers:
        said = host.run("cat", f"/proc/{worker}/environ").stdout.split("\0")
        assert "CUDA_CACHE_PATH=/var/cache/vgpu/compiled" in said
    finish(program)
    finish(other)


def test_it_beats_for_the_watchdog_and_is_replaced_when_it_hangs(host: ServiceHost) -> None:
    drop_in = host.share / "hang.conf"
    drop_in.write_text(f"[Service]\nWatchdogSec={HANG_SECONDS}\n")
    place = f"/run/systemd/system/{UNIT}.d"
    host.run("mkdir", "-p", place)
    host.run("cp", "/run/share/hang.conf", place)
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "restart", UNIT)
    pid = host.wait_active()
    first = host.show(UNIT, "WatchdogTimestampMonotonic")
    time.sleep(2 * HANG_SECONDS)
    assert host.show(UNIT, "WatchdogTimestampMonotonic") != first
    assert host.main_pid() == pid

    program = host.program()
    goes_on(program)
    cursor = host.journal_now()
    host.run("kill", "-STOP", str(pid))
    host.wait_active(after=pid)
    told = "\n".join(host.journal(UNIT, f"--after-cursor={cursor}"))
    assert f"Watchdog timeout (limit {HANG_SECONDS}s)!" in told
    goes_on(program)
    finish(program)
    host.run("rm", "-r", place)
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "restart", UNIT)


def test_a_reload_takes_over_what_it_can_and_says_which_line_is_wrong(host: ServiceHost) -> None:
    pid = host.wait_active()
    try:
        host.configure(CONFIGURATION + 'quantum_ms = 5\nlog_format = "json"\n')
        host.run("systemctl", "reload", UNIT)
        line = json.loads(host.journal(UNIT, "--lines=1", f"_PID={pid}")[0])
        assert {"time", "level", "logger", "message"} <= set(line)

        host.configure(CONFIGURATION + "\nwarm_wokers = 2\n")
        cursor = host.journal_now()
        done = host.run("systemctl", "reload", UNIT, check=False)
        assert done.returncode == 1
        assert "Job for vgpu-mediator.service failed" in done.stderr
        told = "\n".join(host.journal(UNIT, f"--after-cursor={cursor}"))
        assert "/etc/vgpu/mediator.toml, line 5: unknown key 'warm_wokers'" in told
        assert "nothing has changed" in told
        assert (host.show(UNIT, "ActiveState"), host.main_pid()) == (["active"], pid)
    finally:
        host.configure(CONFIGURATION)
        host.run("systemctl", "reload", UNIT)
    # Text again, and with priorities of the journal.
    assert not host.journal(UNIT, "--lines=1", f"_PID={pid}")[0].startswith("{")


def test_a_killed_mediator_is_replaced_and_sessions_go_on(host: ServiceHost) -> None:
    pid, program = host.wait_active(), host.program()
    goes_on(program)
    workers = host.workers()
    assert set(workers) == {"red"}
    restarts = int(host.show(UNIT, "NRestarts")[0])
    host.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", UNIT)
    host.wait_active(after=pid)
    assert int(host.show(UNIT, "NRestarts")[0]) == restarts + 1
    goes_on(program)
    assert host.workers() == workers
    finish(program)


def test_a_restart_keeps_sessions(host: ServiceHost) -> None:
    pid, program = host.wait_active(), host.program()
    goes_on(program)
    began = time.monotonic()
    host.run("systemctl", "restart", UNIT)
    seconds = time.monotonic() - began
    assert host.wait_active() != pid
    assert set(host.workers()) == {"red"}
    goes_on(program)
    longest = finish(program)["longest_turn_ms"]
    other = host.program()
    goes_on(other)
    finish(other)
    print(f"systemctl restart took {seconds:.1f} s; the longest turn meanwhile {longest} ms")


def test_a_stop_waits_for_programs_and_leaves_nothing(host: ServiceHost) -> None:
    pid, program = host.wait_active(), host.program()
    goes_on(program)
    stop = host.spawn("systemctl", "stop", UNIT)
    wait_until(
        lambda: host.show(UNIT, "ActiveState") == ["deactivating"], EVENT_SECONDS, "it is being stopped"
    )
    goes_on(program, 10)
    assert stop.poll() is None
    assert host.main_pid() == pid
    assert re.search(r"\bdrain|\bends?\b", host.show(UNIT, "StatusText")[0]), host.show(UNIT, "StatusText")
    finish(program)
    assert stop.wait(EVENT_SECONDS) == 0
    assert host.show(UNIT, "ActiveState", "Result") == ["inactive", "success"]
    processes = host.run("ps", "-eo", "args").stdout
    assert "vgpu.gpu.worker" not in processes
    assert "run-mediator" not in processes
    # What a boot does: nobody listens, so nothing may look as if.
    host.run("systemd-tmpfiles", "--create", "--remove", "--boot", "vgpu.conf")
    assert host.run("ls", "-A", "/var/vgpu").stdout == ""
    host.run("systemctl", "start", UNIT)


def test_a_mediator_that_cannot_start_says_why_and_is_tried_again(host: ServiceHost) -> None:
    host.run("systemctl", "stop", UNIT)
    host.configure(CONFIGURATION + "quantum_ms = 0\n")
    cursor = host.journal_now()
    assert host.run("systemctl", "start", UNIT, check=False).returncode == 1
    told = "\n".join(host.journal(UNIT, f"--after-cursor={cursor}"))
    assert "/etc/vgpu/mediator.toml, line 4: quantum_ms is 0" in told
    assert "Traceback" not in told
    host.configure(CONFIGURATION)
    host.wait_active()
