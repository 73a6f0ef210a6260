# SPDX-License-Identifier: Apache-2.0
"""A mediator that reads its configuration again, is watched by systemd, and hands its sessions over: real processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import trio

from tests.e2e.mediator import Mediator, is_alive, wait_until
from tests.src.test_commands import command, completions
from vgpu.actors.worker_look import is_stopped
from vgpu.gpu.process import _answers
from vgpu.notify import notify, watchdog_seconds

ADMIN = "vgpu.admin_main"


class Configured(Mediator):
    """A mediator with a configuration file and something to tell."""

    def __init__(self, text: str) -> None:
        super().__init__(options=())
        self.file = self.folder / "mediator.toml"
        self.write(text)
        self._options += ["--config", str(self.file)]
        self.told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.told.bind(str(self.folder / "notify"))
        self.told.settimeout(60)

    def write(self, text: str) -> None:
        self.file.write_text(f"# what this host shares\n[mediator]\n{text}")

    def next_word(self) -> str:
        """What systemd hears next, without the beats of the watchdog."""
        while (heard := self.told.recv(4096).decode()) == "WATCHDOG=1":
            pass
        return heard.partition("\n")[0]

    def reload(self) -> Any:
        done = command(ADMIN, "reload", "--json", VGPU_RUN_DIR=str(self.run_dir))
        assert (done.returncode, done.stderr) == (0, "")
        return json.loads(done.stdout)


@pytest.fixture
def mediator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Configured]:
    made = Configured('warm_workers = 1\nlog_level = "info"\n')
    monkeypatch.setenv("NOTIFY_SOCKET", str(made.folder / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    with made:
        yield made
        made.told.close()  # else its last word would wait for somebody to read all that was said before


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        return str(answer.read().decode())


def test_a_reload_changes_what_can_change_and_names_the_rest(mediator: Configured) -> None:
    assert mediator.next_word() == "READY=1"
    port = free_port()
    mediator.write(
        f'warm_workers = 2\nquantum_ms = 5\nmetrics = "127.0.0.1:{port}"\nlog_level = "debug"\nlog_format = "json"\n'
        'state_dir = "/elsewhere"\n'
    )
    done = mediator.reload()
    # The command line said --state-dir, and goes on winning.
    assert set(done["changed"]) == {"warm_workers", "quantum_ms", "metrics", "log_level", "log_format"}
    assert done["changed"]["quantum_ms"] == {"was": 2.0, "is": 5}
    assert done["needs_restart"] == {}
    assert 'vgpu_scheduler_quantum_seconds{gpu="0"} 0.005' in scrape(port)
    wait_until(lambda: len(mediator.workers()) == 2, 60, "a second worker is warm")
    last = json.loads(mediator.log.read_text().splitlines()[-1])
    assert last["level"] in ("info", "debug")

    # Nowhere from now on, by SIGHUP this time.
    mediator.write("library = '/lib/libcuda.so.1'\n")
    os.kill(mediator.pid, signal.SIGHUP)
    assert [mediator.next_word(), mediator.next_word()] == ["RELOADING=1", "READY=1"]
    with pytest.raises(urllib.error.URLError):
        scrape(port)
    wait_until(lambda: len(mediator.workers()) == 1, 60, "the worker that is too many has ended")
    assert "needs a restart: library from None to '/lib/libcuda.so.1'" in mediator.log.read_text()


def test_what_cannot_be_meant_changes_nothing_and_is_reported(mediator: Configured) -> None:
    assert mediator.next_word() == "READY=1"
    for text, words in [
        (
            "quantum_ms = 5\n\n# comment\nwarm_workers = 100\n",
            "line 6: warm_workers is 100, expected 0 to 64",
        ),
        ("quantum_ms = 5\nwarm_wokers = 2\n", "line 4: unknown key 'warm_wokers'"),
        ("quantum_ms = \n", "line 3"),
        ('quantum_ms = 5\nsocket_group = "no-such-group"', "line 4: socket_group is 'no-such-group'"),
    ]:
        mediator.write(text)
        done = command(ADMIN, "reload", VGPU_RUN_DIR=str(mediator.run_dir))
        assert (done.returncode, done.stdout) == (1, "")
        assert "nothing has changed" in done.stderr
        assert str(mediator.file) in done.stderr
        assert words in done.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        mediator.write(f'quantum_ms = 5\nmetrics = "127.0.0.1:{port}"\n')
        done = command(ADMIN, "reload", VGPU_RUN_DIR=str(mediator.run_dir))
        assert done.returncode == 1
        assert done.stderr.startswith(
            f"vgpu-admin: nothing has changed: {mediator.file}, line 4: metrics cannot be served at 127.0.0.1:{port}: "
        )
        assert len(done.stderr.splitlines()) == 1
    (state,) = mediator.ask("schedule").values()
    assert state["quantum_ns"] == 2_000_000
    assert mediator.log.read_text().count("configuration not reloaded, nothing has changed") == 5
    assert "Traceback" not in mediator.log.read_text()


def test_systemd_hears_that_the_mediator_lives_until_it_hangs(mediator: Configured) -> None:
    heard = [mediator.told.recv(4096).decode() for _ in range(4)]
    assert heard.count("WATCHDOG=1") >= 2
    os.kill(mediator.pid, signal.SIGSTOP)
    wait_until(lambda: is_stopped(mediator.pid), 60, "the mediator is stopped")
    mediator.told.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:  # what was said already
            mediator.told.recv(4096)
    mediator.told.settimeout(0.6)
    with pytest.raises(TimeoutError):
        mediator.told.recv(4096)
    os.kill(mediator.pid, signal.SIGCONT)
    mediator.told.settimeout(60)
    assert mediator.told.recv(4096) == b"WATCHDOG=1"


def test_what_is_said_once_waits_for_room_and_beats_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where systemd has not read for a while: a READY that is lost would leave the service reloading."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as others,
    ):
        systemd.bind("")
        systemd.settimeout(60)
        address = systemd.getsockname()
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + address[1:].decode())
        others.setblocking(False)
        with contextlib.suppress(BlockingIOError):  # once there is no more room
            while True:
                others.sendto(b"another", address)
        notify("WATCHDOG=1", room_seconds=0)
        says = threading.Thread(target=notify, args=("READY=1",))
        says.start()
        heard: list[bytes] = []
        while heard[-1:] != [b"READY=1"]:
            heard.append(systemd.recv(4096))
        says.join()
    assert set(heard[:-1]) == {b"another"}


def test_a_mediator_that_hands_over_ends_with_0_and_its_workers_go_on(mediator: Configured) -> None:
    assert mediator.next_word() == "READY=1"
    sockets = mediator.run_dir / "workers"
    wait_until(
        lambda: any(trio.run(_answers, path) for path in sockets.glob("*.sock")), 30, "a worker is warm"
    )
    (worker,) = mediator.workers()
    os.kill(mediator.pid, signal.SIGUSR1)
    assert mediator.next_word() == "STOPPING=1"
    assert mediator._process is not None
    assert mediator._process.wait(60) == 0
    assert is_alive(worker)
    mediator.start()
    assert mediator.workers() == [worker]


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "2000000"}, 1.0),
        ({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "7"}, 1.0),
        ({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_how_often_systemd_wants_to_hear(environment: dict[str, str], seconds: float | None) -> None:
    assert watchdog_seconds(environment, 7) == seconds


WORKING = (
    "import ctypes as c, sys\n"
    "d = c.CDLL('libcuda.so.1'); x = c.c_void_p(); p = c.c_uint64()\n"
    "def ok(status): assert status == 0, status\n"
    "ok(d.cuInit(0)); ok(d.cuDevicePrimaryCtxRetain(c.byref(x), 0)); ok(d.cuCtxSetCurrent(x))\n"
    "ok(d.cuMemAlloc_v2(c.byref(p), c.c_size_t(4096)))\n"
    "turn = 0\n"
    "while True:\n"
    "    turn += 1; back = (c.c_ubyte * 4096)()\n"
    "    ok(d.cuMemsetD8_v2(p, turn % 251, c.c_size_t(4096)))\n"
    "    ok(d.cuMemcpyDtoH_v2(back, p, c.c_size_t(4096)))\n"
    "    assert bytes(back) == bytes([turn % 251]) * 4096\n"
    "    print('turn', turn, flush=True)\n"
)


def test_programs_compute_on_through_a_hand_over(mediator: Configured) -> None:
    guest = mediator.begin(sys.executable, "-c", WORKING, vm="red")
    guest.until("turn")
    session = mediator.session_of(guest)["info"]["session"]
    for _ in range(2):
        os.kill(mediator.pid, signal.SIGUSR1)
        assert mediator._process is not None
        # Its output is read all the while: a program that has the GPU alone needs no mediator.
        while mediator._process.poll() is None:
            guest.line()
        before = int(guest.line().split()[1])
        mediator.start()
        while int(guest.line().split()[1]) < before + 100:
            pass
        wait_until(lambda: len(mediator.sessions()) == 1, 60, "the session is adopted")
        assert mediator.session_of(guest)["info"]["session"] == session
    guest.kill()


def test_new_commands_and_their_options_are_completed() -> None:
    assert completions(ADMIN, "vgpu-admin do") == ["doctor"]
    assert completions(ADMIN, "vgpu-admin top --int") == ["--interval"]
    assert completions("vgpu.mediator_main", "run-mediator --socket-g") == ["--socket-group"]
