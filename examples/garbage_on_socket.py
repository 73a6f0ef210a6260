#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Garbage on the mediator's socket: noise, cut and forged HELLOs, silence, descriptors; each is hung up on, nobody else notices."""

from __future__ import annotations

import array
import os
import random
import socket

from _support import WAIT_SECONDS, Example, Host, main, wait_until

from vgpu.transport.attach import HELLO_SIZE, WELCOME_SIZE, Hello, Status, Welcome
from vgpu.transport.wire import TABLE_HASH

NOISES = 150
SILENT = 40


def connect(host: Host) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.settimeout(WAIT_SECONDS)
    peer.connect(str(host.run_dir / "mediator.sock"))
    return peer


def answer(host: Host, data: bytes, descriptors: int = 0) -> bytes:
    """Send it and hear what comes back until the mediator hangs up; b"" if nothing came."""
    with connect(host) as peer:
        try:
            if descriptors:
                null = [os.open(os.devnull, os.O_RDONLY) for _ in range(descriptors)]
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", null))]
                peer.sendmsg([data], rights)
                for descriptor in null:
                    os.close(descriptor)
            else:
                peer.sendall(data)
            if len(data) < HELLO_SIZE:
                peer.shutdown(socket.SHUT_WR)
            return peer.recv(WELCOME_SIZE)
        except (ConnectionResetError, BrokenPipeError):
            return b""


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def body(example: Example) -> None:
    noise = random.Random(20)
    with example.host() as host, example.neighbours(host, pause_ms=1500) as neighbours:
        before, sessions = open_files(host.pid), len(host.sessions())
        example.say(f"{NOISES} peers send random bytes, {SILENT} connect and say nothing")
        silent = [connect(host) for _ in range(SILENT)]
        heard = {answer(host, noise.randbytes(noise.choice((1, 16, 255, 256, 4096)))) for _ in range(NOISES)}
        example.fact(heard == {b""}, "random bytes: each peer is hung up on, without an answer")
        good = Hello(os.getpid(), TABLE_HASH, vm="forger").encode()
        cut = {answer(host, good[:size]) for size in (1, 4, 100, 255)}
        example.fact(cut == {b""}, "HELLOs that end early: the same")
        flips = [bytearray(good) for _ in range(32)]
        for number, flipped in enumerate(flips):
            flipped[number % 16] ^= 1 << noise.randrange(8)  # magic, version or the table's hash
        answers = [answer(host, bytes(flipped)) for flipped in flips]
        refused = [Welcome.decode(a).status for a in answers if a]
        example.fact(
            set(refused) == {Status.VERSION_MISMATCH} and answers.count(b"") == 32 - len(refused) > 0,
            f"HELLOs with one bit changed: {len(refused)} told of another version, the rest hung up on",
        )
        name = bytearray(good)
        name[24:88] = b"\xff" * 64
        told = answer(host, bytes(name))
        example.fact(
            bool(told) and Welcome.decode(told).status is Status.REFUSED,
            "a name that no VM can have: refused, with no session",
        )
        example.fact(
            answer(host, noise.randbytes(HELLO_SIZE), descriptors=16) == b"",
            "descriptors that nobody asked for: the same",
        )
        for peer in silent:
            peer.close()
        wait_until(lambda: open_files(host.pid) <= before + 2, "no descriptor is left open")
        example.fact(True, f"the mediator has no more descriptors open than before ({open_files(host.pid)})")
        example.fact(len(host.sessions()) == sessions, "and no session came of any of it")
        example.goes_on(neighbours)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, body))
