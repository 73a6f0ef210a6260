# SPDX-License-Identifier: Apache-2.0
"""A host without a control plane: ``python -m tests.real_gpu.control_bare --run-dir DIR --gpu nvidia|software``.

Starts one worker and gives it to the first guest that says HELLO, under a lease that never ends. No scheduler hears of it,
no account limits it, no watchdog and no telemetry read its counters: what a VM that is alone would have if there were none of
that. Prints "ready" when the worker is warm, and ends with its guest. For ``control_alone.py``; serves one guest in its life.
"""

from __future__ import annotations

import argparse
import os
import socket
from functools import partial
from pathlib import Path

import trio

from vgpu.gpu.control import open_worker_link
from vgpu.gpu.process import WorkerOptions, start_worker
from vgpu.transport.attach import HELLO_SIZE, Hello, Status, Welcome
from vgpu.transport.layout import GrantPage
from vgpu.transport.lines import rights

SESSION = 1


async def serve(run_dir: Path, gpu: str) -> None:
    """Until the guest's worker has ended."""
    process, path = await start_worker(WorkerOptions(run_dir, gpu), "bare")
    try:
        link = await open_worker_link(path)
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            await listener.bind(str(run_dir / "mediator.sock"))
            listener.listen(8)
            print("ready", flush=True)
            while True:
                peer, _ = await listener.accept()
                hello = await _hello(peer)
                if hello is not None and not hello.flags:
                    break
                peer.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        assignment = {
            "do": "assign",
            "session": SESSION,
            "vm": "bare",
            "memory_limit": 0,
            "guest_pid": hello.pid,
            "program": hello.program,
        }
        await link.send(assignment, [theirs.fileno()])
        theirs.close()
        event, _ = await link.receive()
        assert event is not None, "the worker hung up"
        assert event.get("event") == "assigned", event
        GrantPage(link.grant_fd).grant(deadline_ns=0)
        await link.send({"do": "kick"})
        welcome = Welcome(
            Status.WELCOME,
            session_id=SESSION,
            segment_size=int(link.hello["segment_size"]),
            worker_address=int(link.hello["worker_address"]),
        )
        descriptors = [link.segment_fd, ours.fileno()]
        await peer.sendmsg([welcome.encode()], rights(descriptors))
        ours.close()
        await process.wait()
    finally:
        process.kill()


async def _hello(peer: trio.socket.SocketType) -> Hello | None:
    data = b""
    while len(data) < HELLO_SIZE:
        more = await peer.recv(HELLO_SIZE - len(data))
        if not more:
            return None
        data += more
    return Hello.decode(data)


def main() -> None:
    """Serve one guest."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--gpu", choices=["nvidia", "software"], required=True)
    options = parser.parse_args()
    options.run_dir.mkdir(parents=True, exist_ok=True)
    os.umask(0o077)
    trio.run(partial(serve, options.run_dir, options.gpu))


if __name__ == "__main__":
    main()
