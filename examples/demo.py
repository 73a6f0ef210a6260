# SPDX-License-Identifier: Apache-2.0
"""``make demo``: an unmodified CuPy program computes on a virtual GPU, through the mediator.

Starts a mediator on the best device there is, runs examples/cupy_program.py as a guest, checks its
numbers against NumPy on the CPU, shows what the mediator saw, and stops. Exit status 1 if a number is
wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
START_SECONDS = 60


def ask(run_dir: Path, method: str) -> Any:
    """One question to the mediator's admin socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(str(run_dir / "admin.sock"))
        sock.sendall(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method}).encode() + b"\n")
        data = b""
        while not data.endswith(b"\n"):
            more = sock.recv(65536)
            if not more:
                break
            data += more
    return json.loads(data)["result"]


def expected() -> dict[str, Any]:
    """The program's results, on the CPU."""
    n = np.arange(1 << 16, dtype=np.float32)
    x, y = (n % 997) / np.float32(997), (n % 1009) / np.float32(1009)
    padded = np.concatenate([[np.float32(0)], x, [np.float32(0)]]).astype(np.float32)
    smoothed = (padded[:-2] + padded[1:-1] + padded[2:]) / np.float32(3)
    return {
        "total": float(np.sum(x * 2 + y, dtype=np.float64)),
        "largest": int(np.argmax(x * y)),
        "smoothed": smoothed[:1000],
    }


def check(got: dict[str, Any]) -> list[str]:
    """What is wrong with the program's results; empty when nothing is."""
    want = expected()
    wrong = []
    if not np.isclose(got["total"], want["total"], rtol=1e-6):
        wrong.append(f"sum is {got['total']}, expected {want['total']}")
    if got["largest"] != want["largest"]:
        wrong.append(f"argmax is {got['largest']}, expected {want['largest']}")
    if not np.allclose(got["smoothed"], want["smoothed"], rtol=1e-6, atol=1e-7):
        wrong.append("the smoothed values differ")
    if got["devices"] != 1:
        wrong.append(f"{got['devices']} devices, expected 1")
    return wrong


def show(samples: list[dict[str, Any]]) -> None:
    """What the mediator saw, one block a session."""
    for sample in samples:
        info, grant, guest = sample["info"], sample["grant"], sample["guest"]
        print(f"  VM {info['vm']}, session {info['session']}: {info['program']} (pid {info['guest_pid']})")
        print(
            f"    calls: {guest['local_calls']} local, {guest['async_calls']} async, {guest['fence_calls']} fence, "
            f"{guest['reply_calls']} reply, {guest['refused_calls']} refused"
        )
        print(
            f"    on the host: {grant['records']} records, {grant['reply_records']} round trips, "
            f"{grant['launches']} launches, {grant['doorbells']} doorbells"
        )
        print(
            f"    bytes: {grant['bytes_to_device']} to the device, {grant['bytes_from_device']} back; "
            f"GPU time {grant['gpu_ns'] / 1e6:.2f} ms; peak memory {grant['memory_peak_bytes']} bytes"
        )
        for name, count in sample["refused"].items():
            print(f"    refused: {name} ×{count}")


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until the mediator's socket exists."""
    deadline = time.monotonic() + START_SECONDS
    while not path.exists():
        if process.poll() is not None:
            raise SystemExit(f"the mediator ended with status {process.returncode}")
        if time.monotonic() > deadline:
            raise SystemExit(f"the mediator is not ready after {START_SECONDS} s")
        time.sleep(0.05)


def main() -> int:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="auto", choices=("auto", "nvidia", "software"))
    parser.add_argument("--python", type=Path, help="a Python that can import cupy (default: fetched)")
    options = parser.parse_args()
    python = options.python or Path(
        subprocess.check_output(
            [sys.executable, HERE.parent / "tests/toolchain.py", "cupy"], text=True
        ).strip()
    )
    with tempfile.TemporaryDirectory(prefix="vgpu-") as folder:
        run_dir = Path(folder) / "run"
        mediator = subprocess.Popen(
            [sys.executable, "-m", "vgpu.mediator_main", "--gpu", options.gpu, "--run-dir", run_dir,
             "--state-dir", Path(folder) / "state", "--log-level", "warning"]
        )  # fmt: skip
        try:
            wait_for(run_dir / "mediator.sock", mediator)
            health = ask(run_dir, "health")
            print(f"mediator: {health['gpu']} GPU, pid {mediator.pid}")
            print("running examples/cupy_program.py, a program that knows nothing of us")
            environment = dict(os.environ, CUPY_CACHE_DIR=str(Path(folder) / "cupy"))
            if health["gpu"] == "software":
                # The software GPU executes PTX, so CuPy shall stop at PTX.
                environment["CUPY_COMPILE_WITH_PTX"] = "1"
            guest = subprocess.run(
                [sys.executable, "-m", "vgpu.run_main", "--run-dir", run_dir, "--vm", "demo", "--",
                 python, HERE / "cupy_program.py"],
                env=environment, stdout=subprocess.PIPE, text=True, check=False, timeout=600,
            )  # fmt: skip
            if guest.returncode:
                print(f"the program failed with status {guest.returncode}")
                return 1
            got = json.loads(guest.stdout.splitlines()[-1])
            print(f"it saw: {got['device']}, {got['memory_bytes'] >> 20} MiB, driver {got['driver']}")
            wrong = check(got)
            for line in wrong:
                print(f"WRONG: {line}")
            if not wrong:
                print("numbers agree with NumPy on the CPU: sum, argmax, 1000 smoothed values")
            time.sleep(0.5)
            print("what the mediator saw:")
            show(ask(run_dir, "sessions"))
            return 1 if wrong else 0
        finally:
            mediator.send_signal(signal.SIGTERM)
            try:
                mediator.wait(10)
            except subprocess.TimeoutExpired:
                mediator.kill()


if __name__ == "__main__":
    raise SystemExit(main())
