# SPDX-License-Identifier: Apache-2.0
"""One rule for names of VMs at every door: ``vgpu-run``, HELLO, ``vgpu-admin``; nobody is renamed silently."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.mediator import Mediator
from vgpu.transport._generated_calls import TABLE_HASH
from vgpu.transport.attach import FLAG_PROBE, WELCOME_SIZE, Hello, Status, Welcome
from vgpu.transport.names import NAME_RULE

BAD = [
    b"-vm",
    b" ",
    b"a b",
    b"../x",
    b".",
    b"x" * 64,
    b"x" * 80,
    b"\xff",
    b"\x1b[31m",
    "größe".encode(),
    b"a\n",
]


def run_in(mediator: Mediator, *words: bytes, **environment: bytes) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-P", "-m", "vgpu.run_main", "--run-dir", str(mediator.run_dir)]
    return subprocess.run(
        [*(word.encode() for word in command), *words, b"--", b"true"],
        capture_output=True,
        timeout=60,
        check=False,
        env={**os.environb, **{name.encode(): value for name, value in environment.items()}},
    )


@pytest.mark.parametrize("name", BAD)
def test_vgpu_run_says_so(mediator: Mediator, name: bytes) -> None:
    for done, source in (
        (run_in(mediator, b"--vm=" + name), "--vm"),
        (run_in(mediator, VGPU_VM=name), "VGPU_VM"),
    ):
        assert (done.returncode, done.stdout) == (2, b"")
        said = done.stderr.decode()
        assert said.startswith(f"vgpu-run: {source} is ")
        assert said.endswith(f"expected {NAME_RULE}\n")
        assert said[:-1].isprintable()


def test_a_name_that_was_said_and_is_empty(mediator: Mediator) -> None:
    assert run_in(mediator, b"--vm=").returncode == 2
    assert run_in(mediator, VGPU_VM=b"").returncode == 0  # as if it were not there
    assert run_in(mediator, b"--vm=good").returncode == 0


@pytest.mark.parametrize("name", BAD)
def test_a_hello_with_such_a_name_is_refused(mediator: Mediator, name: bytes) -> None:
    hello = bytearray(Hello(os.getpid(), TABLE_HASH, flags=FLAG_PROBE).encode())
    hello[24:88] = name[:64].ljust(64, b"\0")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(60)
        link.connect(str(mediator.run_dir / "mediator.sock"))
        link.sendall(hello)
        answer = link.recv(WELCOME_SIZE, socket.MSG_WAITALL)
        assert Welcome.decode(answer).status is Status.REFUSED
        assert link.recv(1) == b""
    log = mediator.log.read_text()
    assert f"is refused: the vm name in HELLO is {name[:64]!r}, expected {NAME_RULE}" in log
    assert all(line.isprintable() for line in log.splitlines())
    assert mediator.ask("health")["ok"]


def test_a_name_that_is_too_long_is_not_cut(
    mediator: Mediator, driver_program: Callable[[str], Path]
) -> None:
    """A program that was not started by vgpu-run: cut to what a HELLO holds, its name would be another VM's."""
    known = {vm["name"] for vm in mediator.ask("vms")}
    for length in (64, 70, 200):
        guest = mediator.begin(driver_program("teller"), VGPU_VM="v" * length)
        status, lines = guest.finish(60)
        assert status != 0
        assert "ready" not in lines
    assert {vm["name"] for vm in mediator.ask("vms")} == known
    assert mediator.begin(driver_program("teller"), VGPU_VM="v" * 63).until("ready") == "ready"
    assert "v" * 63 in {vm["name"] for vm in mediator.ask("vms")}
