# SPDX-License-Identifier: Apache-2.0
"""Who may connect a QEMU: the device's own user, and with a group its members, and nobody reaches more than that."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.mediator import Mediator, wait_until
from tests.src.test_commands import command
from vgpu.transport.stub.launch import device_socket_path, stub_command, vfio_socket_path

GROUP = 54321
STRANGER = 54322
AS_SOMEBODY = """
import os, socket, sys
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(54323)
for path in sys.argv[3:]:
    try:
        socket.socket(socket.AF_UNIX).connect(path); print("connected")
    except OSError as error:
        print(type(error).__name__)
try: os.listdir(sys.argv[1]); print("listed")
except OSError as error: print(type(error).__name__)
"""


def connect_as(group: int, run_dir: Path) -> list[str]:
    """What a user of that group finds: at QEMU's socket, at the mediator's, and when it lists the folder."""
    words = [str(vfio_socket_path(run_dir, "red").parent), str(group)]
    words += [str(vfio_socket_path(run_dir, "red")), str(device_socket_path(run_dir, "red"))]
    done = subprocess.run(
        [sys.executable, "-c", AS_SOMEBODY, *words], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.split()


@contextmanager
def device(run_dir: Path, group: str) -> Iterator[None]:
    words = stub_command(run_dir, "red", bar1_bytes=16 << 20, socket_group=group)
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(device_socket_path(run_dir, "red").is_socket, 60, "the device listens")
            yield
        finally:
            process.send_signal(signal.SIGTERM)


@pytest.fixture
def run_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vgpu-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def modes(run_dir: Path) -> tuple[int, int]:
    """Of the socket and of its folder."""
    path = vfio_socket_path(run_dir, "red")
    return stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root may become somebody else")


def test_without_a_group_the_socket_is_its_users_alone(run_dir: Path) -> None:
    with device(run_dir, ""):
        assert modes(run_dir) == (0o600, 0o700)
        with socket.socket(socket.AF_UNIX) as ours:
            ours.connect(str(vfio_socket_path(run_dir, "red")))


def test_a_group_of_ours_is_taken_by_name_or_number(run_dir: Path) -> None:
    import grp

    number = os.getgid()
    for group in (str(number), grp.getgrgid(number).gr_name):
        with device(run_dir, group):
            assert modes(run_dir) == (0o660, 0o710)
            assert vfio_socket_path(run_dir, "red").stat().st_gid == number


@needs_root
def test_members_connect_and_others_do_not(run_dir: Path) -> None:
    with device(run_dir, str(GROUP)):
        assert connect_as(GROUP, run_dir) == ["connected", "PermissionError", "PermissionError"]
        assert connect_as(STRANGER, run_dir) == ["PermissionError", "PermissionError", "PermissionError"]
    with device(run_dir, ""):
        assert connect_as(GROUP, run_dir)[0] == "PermissionError"


def test_a_group_that_is_not_there_is_refused(run_dir: Path) -> None:
    done = subprocess.run(
        stub_command(run_dir, "red", socket_group="no-such-group"), capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip
    assert done.returncode == 2
    assert "there is no group 'no-such-group'" in done.stderr
    done = command(
        "vgpu.mediator_main", "--socket-group", "no-such-group", "--gpu", "software", "--run-dir", run_dir
    )
    assert done.returncode == 2
    assert "socket_group is 'no-such-group', and there is no such group" in done.stderr


@needs_root
def test_a_mediator_gives_it_to_the_devices_of_its_vms() -> None:
    with Mediator(options=["--socket-group", str(GROUP)]) as mediator:
        mediator.folder.chmod(0o755)
        words = ["register-vm", "--vm-name=red", "--bar1=16MiB"]
        done = command("vgpu.admin_main", *words, VGPU_RUN_DIR=str(mediator.run_dir))
        assert done.returncode == 0, done.stderr
        assert connect_as(GROUP, mediator.run_dir) == ["connected", "PermissionError", "PermissionError"]
        assert connect_as(STRANGER, mediator.run_dir)[0] == "PermissionError"
        command("vgpu.admin_main", "unregister-vm", "--vm-name=red", VGPU_RUN_DIR=str(mediator.run_dir))
