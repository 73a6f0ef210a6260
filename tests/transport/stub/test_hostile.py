# SPDX-License-Identifier: Apache-2.0
"""A guest that writes anything anywhere and a peer that says anything, against one device process that lives through it all."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.transport.stub.world import SLOTS, Guest, World
from vgpu.transport.layout import DIRECTORY_OFFSET, DIRECTORY_SIZE
from vgpu.transport.lines import rights
from vgpu.transport.stub import messages as m
from vgpu.transport.stub.launch import device_socket_path
from vgpu.transport.vfio_user.registers import PAGE, SlotRegister

HOSTILE = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
OFFSETS = st.one_of(
    st.tuples(st.integers(1, SLOTS), st.sampled_from(SlotRegister)).map(lambda p: p[0] * PAGE + p[1]),
    st.integers(0, (SLOTS + 1) * PAGE),
)
VALUES = st.one_of(st.sampled_from([0, 1, 77, 5 << 32 | 77, (1 << 64) - 1]), st.integers(0, (1 << 64) - 1))
ACCESSES = st.lists(
    st.tuples(
        st.sampled_from(["read", "write", "scribble", "reset"]),
        OFFSETS,
        VALUES,
        st.sampled_from([1, 2, 4, 8]),
    ),
    max_size=25,
)
LINES = st.one_of(
    st.binary(max_size=60),
    st.builds(
        lambda do, slot, token, extra: (
            json.dumps(
                {
                    "do": do,
                    "slot": slot,
                    "token": token,
                    "session": 1,
                    "worker_address": 1,
                    "worker_pid": 1,
                    **extra,
                }
            ).encode()
            + b"\n"
        ),
        st.sampled_from(["grant", "refuse", "status", "dance", None]),
        st.integers(-1, SLOTS),
        st.sampled_from([0, 77, 1]),
        st.dictionaries(
            st.sampled_from(["status", "present", "quarantined", "driver_version", "descriptors"]),
            st.sampled_from([0, 1, 2, 3, True, "x", None]),
            max_size=3,
        ),
    ),
)


def still_serves(world: World) -> None:
    assert world.process is not None
    assert world.process.poll() is None, world.log_path.read_text()
    assert world.clients[0].read_bytes(0, 0, 4) == b"VGPU"


@given(ACCESSES)
@HOSTILE
def test_any_accesses(shared: World, accesses: list[tuple[str, int, int, int]]) -> None:
    """Some of them claims that no mediator answers; directory and slots overwritten meanwhile."""
    guest = Guest(shared.clients[0])
    for what, offset, value, count in accesses:
        data = (value & ((1 << 8 * count) - 1)).to_bytes(count, "little")
        if what == "read":
            guest.qemu.read(0, offset, count)
        elif what == "write":
            guest.qemu.write(0, offset, int.from_bytes(data, "little"), count)
        elif what == "scribble":
            at = DIRECTORY_OFFSET + value % (DIRECTORY_SIZE - 8)
            guest.qemu.maps[1][at : at + count] = data
        else:
            guest.qemu.reset()
    still_serves(shared)
    guest.qemu.reset()


@given(st.lists(st.tuples(LINES, st.integers(0, 3)), max_size=8), ACCESSES)
@HOSTILE
def test_any_lines(
    shared: World, lines: list[tuple[bytes, int]], accesses: list[tuple[str, int, int, int]]
) -> None:
    """Descriptors are of the connection itself: a socket passes for a lifeline, but not for a process."""
    guest = Guest(shared.clients[0])
    guest.claim(0)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(device_socket_path(shared.run_dir, shared.vm)))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for line, lent in lines:
                if line:
                    connection.sendmsg([line], rights([connection.fileno()] * lent))
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            connection.recv(65536)
    still_serves(shared)
    guest.qemu.reset()


@pytest.fixture(scope="module", autouse=True)
def _nothing_leaks(shared: World) -> Iterator[None]:
    """Descriptors of the device after all of it: as many as before, once its connections have ended."""
    before = shared.descriptors()
    yield
    end = time.monotonic() + 60
    while shared.descriptors() > before and time.monotonic() < end:
        time.sleep(0.02)
    assert shared.descriptors() <= before


def test_the_lines_above_are_not_all_garbage() -> None:
    line = json.dumps({"do": "refuse", "slot": 0, "token": 77, "status": 1})
    assert m.read_command(json.loads(line)) == m.Refuse(0, 77, 1)
