# SPDX-License-Identifier: Apache-2.0
"""A device process killed at every stage of a request: QEMU is answered, and the keeper leaves with it."""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.transport.stub.world import until_sync
from vgpu.transport.stub.keeper import Keeper, start_keeper
from vgpu.transport.vfio_user.messages import Command, MessageFlag

READ = struct.pack("<HHIII", 7, Command.REGION_READ, 32, 0, 0) + bytes(16)
ANSWER = struct.pack("<HHIII", 7, Command.REGION_READ, 16, MessageFlag.REPLY | MessageFlag.ERROR, errno.EIO)


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    started = start_keeper()
    yield started
    started.close()
    started.process.kill()
    started.process.wait()


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """QEMU's end of a connection, and the device's."""
    qemu, device = socket.socketpair()
    qemu.settimeout(60)
    with qemu, device:
        yield qemu, device


Ends = tuple[socket.socket, socket.socket]


@pytest.mark.parametrize("read", [0, 5, 16, 20, 32])
def test_a_request_of_which_so_much_was_read_is_answered(keeper: Keeper, ends: Ends, read: int) -> None:
    qemu, device = ends
    keeper.begins(device.fileno())
    qemu.sendall(READ)
    if read:
        keeper.heard(device.recv(min(read, 16)))
    if read > 16:
        keeper.heard(device.recv(read - 16))
    keeper.close()  # as a SIGKILL does
    device.close()
    assert qemu.recv(100) == ANSWER
    for _ in range(3):  # and so on, for as long as QEMU asks
        qemu.sendall(READ)
        assert qemu.recv(100) == ANSWER
    qemu.close()
    assert keeper.process.wait(60) == 0


def test_an_answered_request_is_left_alone(keeper: Keeper, ends: Ends) -> None:
    qemu, device = ends
    keeper.begins(device.fileno())
    keeper.heard(READ)
    keeper.answered()
    keeper.close()
    device.close()
    qemu.settimeout(0.5)
    with pytest.raises(TimeoutError):
        qemu.recv(100)
    qemu.settimeout(60)
    qemu.sendall(READ)
    assert qemu.recv(100) == ANSWER


def test_a_client_that_went_is_forgotten(keeper: Keeper, ends: Ends) -> None:
    qemu, device = ends
    keeper.begins(device.fileno())
    keeper.ends()
    device.close()
    assert qemu.recv(100) == b""
    keeper.close()
    assert keeper.process.wait(60) == 0


def test_the_next_client_replaces_the_one_before(keeper: Keeper, ends: Ends) -> None:
    qemu, device = ends
    other, others = socket.socketpair()
    with other, others:
        keeper.begins(device.fileno())
        keeper.begins(others.fileno())
        device.close()
        assert qemu.recv(100) == b""


def test_signals_that_end_a_device_process_do_not_end_its_keeper(keeper: Keeper, ends: Ends) -> None:
    qemu, device = ends
    keeper.begins(device.fileno())
    # It ignores them once it runs, so wait until it has taken the connection.
    until_sync(lambda: len(list(Path(f"/proc/{keeper.process.pid}/fd").iterdir())) >= 6)
    time.sleep(0.2)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(keeper.process.pid, number)
    keeper.close()
    device.close()
    qemu.sendall(READ)
    assert qemu.recv(100) == ANSWER


def test_a_device_goes_on_without_its_keeper(keeper: Keeper, ends: Ends) -> None:
    keeper.process.kill()
    keeper.process.wait()
    keeper.begins(ends[1].fileno())
    keeper.heard(READ)
    keeper.answered()
    keeper.ends()
