# SPDX-License-Identifier: Apache-2.0
"""A device process of a VM on its own, without a mediator: what QEMU connects to."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Self

from tests.e2e.mediator import wait_until
from vgpu.transport.stub.launch import device_socket_path, stub_command, vfio_socket_path
from vgpu.transport.vfio_user.device import DEFAULT_BAR1
from vgpu.transport.vfio_user.pci import Variant

START_SECONDS = 30.0


class DeviceProcess:
    """``python -m vgpu.transport.stub`` in a folder of its own. A context manager: running inside."""

    def __init__(
        self, vm: str = "alone", *, variant: Variant = Variant.CONVENTIONAL, bar1_bytes: int = DEFAULT_BAR1
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vgpu-", dir="/tmp"))
        self.vm, self.log = vm, self.folder / "device.log"
        self.socket = vfio_socket_path(self.folder, vm)
        self._command = stub_command(self.folder, vm, variant=variant, bar1_bytes=bar1_bytes)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """Start it and wait until it listens."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=dict(os.environ)
            )
        wait_until(self._listens, START_SECONDS, "the device process listens")

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"the device process ended: {self.log.read_text()}"
        return device_socket_path(self.folder, self.vm).is_socket()

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        # What it would have removed itself.
        for path in (self.socket, device_socket_path(self.folder, self.vm)):
            path.unlink(missing_ok=True)
