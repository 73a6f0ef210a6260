# SPDX-License-Identifier: Apache-2.0
"""A mediator that does not answer: whoever asked hears that, soon, and what to do. One that takes its time is waited for."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.vm_device import DeviceMediator
from tests.src.test_commands import command
from vgpu import admin_client
from vgpu.admin_client import AdminClient, NoMediator

ADMIN = "vgpu.admin_main"


Hurry = Callable[..., None]


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> Hurry:
    """The same in a tenth of the time; but what a test wants to see kept, it leaves its seconds, for a machine may be busy."""

    def change(*, but: str = "") -> None:
        for name in ("QUIET_SECONDS", "PROBE_SECONDS", "MUTE_SECONDS", "ANSWER_SECONDS"):
            if name != but:
                monkeypatch.setattr(admin_client, name, getattr(admin_client, name) / 10)

    return change


def test_a_mediator_that_is_stopped_is_told_in_time() -> None:
    with DeviceMediator() as mediator:
        os.kill(mediator.pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            done = command(ADMIN, "list-vms", "--run-dir", mediator.run_dir)
            seconds = time.monotonic() - began
        finally:
            os.kill(mediator.pid, signal.SIGCONT)
        assert (done.returncode, done.stdout) == (1, "")
        waits, gives_up = done.stderr.splitlines()
        assert waits.endswith(f": the mediator at {mediator.run_dir} does not answer; waiting for it")
        assert gives_up == (
            f"vgpu-admin: the mediator at {mediator.run_dir} does not answer: its process {mediator.pid} is stopped;"
            f" kill -CONT {mediator.pid} lets it go on"
        )
        assert 8 < seconds < 45  # ten, and what a busy machine takes to start a program
        assert command(ADMIN, "list-vms", "--run-dir", mediator.run_dir).returncode == 0


@contextmanager
def serving(answer: Callable[[str], float]) -> Iterator[Path]:
    """A mediator that answers each method after so many seconds; infinite: never."""
    with (
        tempfile.TemporaryDirectory(prefix="vgpu-", dir="/tmp") as name,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
    ):
        listener.bind(f"{name}/admin.sock")
        listener.listen()
        over = threading.Event()

        def serve(link: socket.socket) -> None:
            with link:
                method = json.loads(link.recv(1000))["method"]
                if not over.wait(min(answer(method), 60)):
                    with contextlib.suppress(
                        OSError
                    ):  # a question whether it lives is not waited for so long
                        link.sendall(b'{"jsonrpc": "2.0", "id": 1, "result": "at last"}\n')

        def accept() -> None:
            while True:
                try:
                    link, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(link,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield Path(name)
        over.set()
        listener.shutdown(socket.SHUT_RDWR)


def test_an_answer_that_takes_long_is_waited_for_in_silence(hurry: Hurry) -> None:
    hurry(but="PROBE_SECONDS")
    heard: list[str] = []
    with (
        serving(lambda method: 2.0 if method == "slow" else 0.0) as run_dir,
        AdminClient(run_dir, heard.append) as client,
    ):
        assert client.ask("slow") == "at last"  # twice as long as one that says nothing is given
    assert heard == []


def test_a_mediator_that_goes_on_in_time_is_waited_for(hurry: Hurry) -> None:
    hurry(but="MUTE_SECONDS")
    heard: list[str] = []
    with (
        serving(lambda method: 1.5 if method == "late" else 60.0) as run_dir,
        AdminClient(run_dir, heard.append) as client,
    ):
        assert client.ask("late") == "at last"
        assert len(heard) == 1


def test_one_that_runs_and_says_nothing_is_given_up(hurry: Hurry) -> None:
    hurry()
    heard: list[str] = []
    with serving(lambda method: 60.0) as run_dir, AdminClient(run_dir, heard.append) as client:
        with pytest.raises(
            NoMediator, match=rf"its process {os.getpid()} is stuck .* systemctl restart vgpu-mediator"
        ):
            client.ask("health")
        assert len(heard) == 1


def test_nobody_waits_for_one_answer_for_ever(hurry: Hurry) -> None:
    hurry()
    with (
        serving(lambda method: 60.0 if method == "endless" else 0.0) as run_dir,
        AdminClient(run_dir) as client,
        pytest.raises(NoMediator, match="does not answer"),
    ):
        client.ask("endless")


def test_one_whose_queue_is_full_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_client, "QUIET_SECONDS", 0.2)
    with (
        tempfile.TemporaryDirectory(prefix="vgpu-", dir="/tmp") as name,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as first,
    ):
        listener.bind(f"{name}/admin.sock")
        listener.listen(0)
        first.connect(f"{name}/admin.sock")
        with pytest.raises(NoMediator, match="does not answer anybody; systemctl restart"):
            AdminClient(Path(name))
