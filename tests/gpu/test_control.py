# SPDX-License-Identifier: Apache-2.0
"""The control protocol by bytes, and the mediator's link over a real socket."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from vgpu.gpu.control import LINE_LIMIT, LineProtocol, open_worker_link, rights
from vgpu.transport.errors import LocalProtocolError, RemoteProtocolError

MESSAGES: list[dict[str, Any]] = [
    {"do": "kick"},
    {"event": "hello", "worker": "a", "list": [1, {"x": None}]},
    {"text": 'ä\n"\\'},
]


def descriptors(count: int) -> list[int]:
    return [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_lines_whole_and_byte_by_byte() -> None:
    sender = LineProtocol()
    stream = b"".join(sender.encode(m) for m in MESSAGES)
    assert LineProtocol().receive_data(stream) == [(m, []) for m in MESSAGES]
    receiver, got = LineProtocol(), []
    for at in range(len(stream)):
        got += receiver.receive_data(stream[at : at + 1])
    assert got == [(m, []) for m in MESSAGES]


def test_trailing_half_line_waits() -> None:
    line = LineProtocol().encode({"a": 1})
    receiver = LineProtocol()
    assert receiver.receive_data(line + line[:3]) == [({"a": 1}, [])]
    assert receiver.receive_data(line[3:]) == [({"a": 1}, [])]


def test_descriptors_go_to_the_lines_that_mention_them() -> None:
    sender, receiver = LineProtocol(), LineProtocol()
    owned = descriptors(3)
    stream = sender.encode({"n": 1}, 2) + sender.encode({"n": 2}) + sender.encode({"n": 3}, 1)
    assert receiver.receive_data(stream, owned) == [
        ({"n": 1}, owned[:2]),
        ({"n": 2}, []),
        ({"n": 3}, owned[2:]),
    ]
    receiver.close()
    assert all(is_open(d) for d in owned)  # they are the caller's
    for descriptor in owned:
        os.close(descriptor)


def test_close_closes_what_nobody_took() -> None:
    receiver = LineProtocol()
    owned = descriptors(2)
    assert receiver.receive_data(b'{"unfinished', owned) == []
    receiver.close()
    receiver.close()
    assert not any(is_open(d) for d in owned)


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\n",
        b"[1]\n",
        b"7\n",
        b'{"descriptors":1}\n',
        b'{"descriptors":-1}\n',
        b'{"descriptors":true}\n',
        b'{"descriptors":"2"}\n',
        b"\xff\xfe\n",
        b"\n",
        b"[" * 5000 + b"\n",
        b"x" * (LINE_LIMIT + 1),
        b'"' + b"x" * LINE_LIMIT + b'"\n',
    ],
)
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        LineProtocol().receive_data(data)


def test_garbage_leaks_no_descriptor() -> None:
    owned = descriptors(3)
    good = LineProtocol().encode({"a": 1}, 1)
    with pytest.raises(RemoteProtocolError):
        LineProtocol().receive_data(good + b"garbage\n", owned)
    assert not any(is_open(d) for d in owned)


def test_flood_of_descriptors_is_refused() -> None:
    owned = descriptors(5)
    with pytest.raises(RemoteProtocolError, match="no line mentions"):
        LineProtocol().receive_data(b"", owned)
    assert not any(is_open(d) for d in owned)


@pytest.mark.parametrize("message", [{"x": object()}, {"x": float("nan")}, {"x": "y" * LINE_LIMIT}])
def test_what_cannot_be_sent_is_our_bug(message: dict[str, object]) -> None:
    with pytest.raises(LocalProtocolError):
        LineProtocol().encode(message)


def test_too_many_descriptors_is_our_bug() -> None:
    with pytest.raises(LocalProtocolError):
        LineProtocol().encode({}, 5)


@given(data=st.binary(max_size=200))
def test_any_bytes_give_messages_or_a_protocol_error(data: bytes) -> None:
    try:
        messages = LineProtocol().receive_data(data)
    except RemoteProtocolError:
        return
    assert all(json.dumps(m) and owned == [] for m, owned in messages)


async def serve_once(path: Path, data: bytes, passed: list[int]) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def answer() -> socket.socket:
        peer, _ = listener.accept()
        if data:
            peer.sendmsg([data], rights(passed))
        return peer

    try:
        return await trio.to_thread.run_sync(answer)
    finally:
        listener.close()


async def test_link_reads_hello_and_talks(tmp_path: Path) -> None:
    hello = {"event": "hello", "worker": "w"}
    owned = descriptors(2)
    peers: list[socket.socket] = []
    path = tmp_path / "s"

    async def serve() -> None:
        extra = LineProtocol().encode({"event": "demand"})
        peers.append(await serve_once(path, LineProtocol().encode(hello, 2) + extra, owned))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            while not path.exists():
                await trio.sleep(0.001)
            link = await open_worker_link(str(path))
        assert link.hello == hello
        assert is_open(link.segment_fd)
        assert is_open(link.grant_fd)
        assert await link.receive() == ({"event": "demand"}, [])
        await link.send({"do": "kick"}, owned[:1])
        data, _, _, _ = peers[0].recvmsg(1000)
        assert json.loads(data) == {"do": "kick", "descriptors": 1}
        peers[0].close()
        assert await link.receive() == (None, [])
        with pytest.raises(trio.BrokenResourceError):
            await link.send({"do": "kick"})
        segment = link.segment_fd
        await link.aclose()
        await link.aclose()
        assert not is_open(segment)
    for descriptor in owned:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("line", "passed", "error"),
    [
        (b"", 0, ConnectionResetError),
        (b'{"event":"hello"}\n', 0, RemoteProtocolError),
        (b'{"event":"hello","descriptors":1}\n', 1, RemoteProtocolError),
        (b'{"event":"other","descriptors":2}\n', 2, RemoteProtocolError),
        (b"garbage\n", 0, RemoteProtocolError),
    ],
)
async def test_link_refuses_what_is_no_hello(
    tmp_path: Path, line: bytes, passed: int, error: type[Exception]
) -> None:
    owned = descriptors(passed)
    before = len(os.listdir("/proc/self/fd"))
    path = tmp_path / "s"

    async def serve() -> None:
        (await serve_once(path, line, owned)).close()

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            while not path.exists():
                await trio.sleep(0.001)
            with pytest.raises(error):
                await open_worker_link(str(path))
    assert len(os.listdir("/proc/self/fd")) == before
    for descriptor in owned:
        os.close(descriptor)
