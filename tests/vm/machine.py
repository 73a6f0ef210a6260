# SPDX-License-Identifier: Apache-2.0
"""A virtual machine for tests: QEMU with our PCI device, and in it the file tree of the host.

The guest's root is the host's, read-only over 9p under a layer in memory. So the guest has every program, library and
Python of the machine that tests, at the same paths, can install and change what it likes, and forgets it all at the
end; there is no disk image to make. Files that the user who tests cannot read cannot be read in the guest either,
although its commands run as root there.

A folder of the host's, :attr:`Machine.share`, is ``/run/vm/share`` in the guest, for files that go in or out.

KVM is used where this kernel really boots with it, which is tried once and remembered; elsewhere the processor is
emulated, ten to thirty times slower. ``VGPU_VM_ACCELERATOR`` (``kvm`` or ``tcg``) overrides that.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, Self

import attrs

from tests.vm import initrd, packages
from tests.vm.qmp import Qmp
from tests.vm.remote import COMMAND_SECONDS, Agent, Command, Process, Result

BOOT_SECONDS: Final = 120.0
PROBE_SECONDS: Final = 20.0
SHARE: Final = Path("/run/vm/share")
# Nothing a test looks at, and each of them costs an emulated processor time.
_KERNEL_WORDS: Final = (
    "console=ttyS0 quiet loglevel=4 rdinit=/init nokaslr mitigations=off audit=0 selinux=0 apparmor=0 nowatchdog "
    "random.trust_cpu=on cryptomgr.notests no_timer_check init_on_alloc=0 i8042.noaux 8250.nr_uarts=1"
)

Chipset = Literal["pc", "q35"]


@attrs.frozen
class Gpu:
    """A PCI device of the machine: the socket it is served at, and the name QEMU knows it by."""

    socket: Path
    name: str = "gpu0"


class MachineError(Exception):
    """QEMU ended or the guest did not come up; the message holds what they wrote."""


def _initial_files(images: packages.Images) -> Path:
    """The initial file system for these images, written when its contents changed."""
    content = initrd.build(images)
    path = packages.cache_root() / f"initrd-{images.identity}.gz"
    if not path.exists() or path.read_bytes() != content:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as unfinished:
            unfinished.write(content)
        Path(unfinished.name).replace(path)
    return path


def accelerator(images: packages.Images) -> str:
    """``kvm`` where a guest boots with it, else ``tcg``.

    A device node proves nothing: under another hypervisor the node may open, and the guest then stop at the first
    instruction that nobody emulates. So this very kernel is booted, with little time to say a word.
    """
    chosen = os.environ.get("VGPU_VM_ACCELERATOR")
    if chosen:
        return chosen
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    release = os.uname().release.replace("/", "_")
    remembered = packages.cache_root() / f"accelerator-{images.identity}-{release}"
    if not remembered.exists():
        unfinished = remembered.with_name(f"{remembered.name}.{os.getpid()}")
        unfinished.write_text("kvm" if _boots_with_kvm(images) else "tcg")
        unfinished.replace(remembered)
    return remembered.read_text()


def _boots_with_kvm(images: packages.Images) -> bool:
    command = [*images.qemu, "-accel", "kvm", "-cpu", "host", "-m", "256M", "-machine", "pc", "-nodefaults"]
    command += ["-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"]
    command += ["-kernel", str(images.kernel), "-initrd", str(_initial_files(images))]
    command += ["-append", f"{_KERNEL_WORDS} panic=-1 vm.probe=1"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        timer = threading.Timer(PROBE_SECONDS, process.kill)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if "probe passed" in line:
                    return True
                if "KVM internal error" in line:
                    return False
            return False
        finally:
            timer.cancel()
            process.kill()


class Machine:
    """One VM. A context manager: booted inside, gone afterwards.

    Args:
        gpus: its PCI devices; their sockets must be listening. The first is 0000:00:05.0 on ``pc``, and behind a
            PCI Express port on ``q35``.
        chipset: ``pc``, conventional PCI, or ``q35``, PCI Express.
        name: of the machine, in the guest its host name.
        memory_mib, processors: its size.
    """

    def __init__(
        self,
        gpus: Sequence[Gpu | Path] = (),
        *,
        chipset: Chipset = "pc",
        name: str = "vm",
        memory_mib: int = 1024,
        processors: int = 1,
    ) -> None:
        self.gpus = [
            gpu if isinstance(gpu, Gpu) else Gpu(gpu, f"gpu{number}") for number, gpu in enumerate(gpus)
        ]
        self.chipset, self.name = chipset, name
        self._memory_mib, self._processors = memory_mib, processors
        self.folder = Path(tempfile.mkdtemp(prefix="vm-", dir="/tmp"))
        self.share = self.folder / "share"
        self.share.mkdir()
        self.console_log, self.qemu_log = self.folder / "console.log", self.folder / "qemu.log"
        self._images = packages.images()
        self.accelerator = accelerator(self._images)
        self._qemu: subprocess.Popen[bytes] | None = None
        self._agent: Agent | None = None
        self._qmp: Qmp | None = None
        self.unplugged: set[str] = set()  # devices taken out, by name
        self.kept: list[Process] = []  # commands that outlive a test
        self.wall_seconds = 0.0  # from the start of QEMU to the agent's first word

    # -- life

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start QEMU; the guest begins to boot."""
        began = time.monotonic()
        with self.qemu_log.open("ab") as log:
            self._qemu = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder
            )
        self._began, self.unplugged = began, set()
        deadline = began + 30
        self._qmp = Qmp(self._connect("qmp.sock", deadline))
        self._agent = Agent(self._connect("agent.sock", deadline))

    def _connect(self, name: str, deadline: float) -> socket.socket:
        """A connection to a socket of QEMU's, which appears a moment before anybody listens there."""
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        while True:
            try:
                link.connect(str(self.folder / name))
                return link
            except (FileNotFoundError, ConnectionRefusedError):
                if not self.is_running() or time.monotonic() > deadline:
                    link.close()
                    raise MachineError(f"QEMU has not come to listen at {name}: {self.logs()}") from None
            time.sleep(0.01)

    def wait_ready(self, boots: int = 1, seconds: float = BOOT_SECONDS) -> None:
        """Wait until the guest takes commands, after its ``boots``-th start.

        Raises:
            MachineError: it does not.
        """
        agent = self.agent
        try:
            agent.wait(
                lambda: agent.boots >= boots or not agent.connected, seconds, lambda: "the guest is ready"
            )
        except AssertionError as error:
            raise MachineError(f"{error}: {self.logs()}") from None
        if agent.boots < boots:
            raise MachineError(f"QEMU ended while the guest was booting: {self.logs()}")
        self.wall_seconds = time.monotonic() - self._began

    def kill(self) -> None:
        """SIGKILL to QEMU: the machine vanishes as in a power cut. It may be started again."""
        if self._qemu is not None:
            self._qemu.kill()
            self._qemu.wait()
        for link in (self._qmp, self._agent):
            if link is not None:
                link.close()

    def close(self) -> None:
        """End it, and remove its files."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def power_off(self, seconds: float = 30) -> None:
        """Have the guest switch itself off; QEMU ends."""
        self.agent.send({"do": "halt"})
        assert self._qemu is not None
        self._qemu.wait(seconds)

    def reboot(self) -> None:
        """Have the guest restart itself, and wait until it takes commands again. Its files are the host's anew."""
        boots = self.agent.boots
        self._began = time.monotonic()
        self.agent.send({"do": "reboot"})
        self.wait_ready(boots + 1)

    @property
    def pid(self) -> int:
        """Of QEMU."""
        assert self._qemu is not None
        return self._qemu.pid

    def is_running(self) -> bool:
        """Is QEMU there?"""
        return self._qemu is not None and self._qemu.poll() is None

    # -- commands

    @property
    def agent(self) -> Agent:
        """The connection to the guest."""
        assert self._agent is not None, "the machine has not been started"
        return self._agent

    def spawn(self, command: Command, **options: Any) -> Process:
        """Start a command in the guest: words, or a line for its shell; options as in :meth:`Agent.spawn`."""
        return self.agent.spawn(command, **options)

    def run(
        self, command: Command, *, seconds: float = COMMAND_SECONDS, check: bool = True, **options: Any
    ) -> Result:
        """Run a command to its end, without input.

        Raises:
            AssertionError: it did not end in time, or (unless ``check`` is false) its status was not 0.
        """
        process = self.spawn(command, **options)
        process.close_input()
        result = process.wait(seconds)
        assert not check or result.status == 0, f"{process}\n{result.stdout}\n{result.stderr}\n{self.logs()}"
        return result

    def tidy(self) -> None:
        """As after its start, whatever a test has done: running, every device plugged, no command."""
        if not self.is_running():
            self.kill()
            self.start()
            self.wait_ready()
        for process in self.agent.running():
            if process not in self.kept:
                process.kill()
        for gpu in self.gpus:
            if gpu.name in self.unplugged:
                self.plug(gpu)

    def send_file(self, source: Path, name: str | None = None) -> Path:
        """Copy a file into the share; its path in the guest. Files made after the guest started must go this way."""
        target = self.share / (name or source.name)
        shutil.copy(source, target)
        return SHARE / target.name

    # -- QEMU

    def qmp(self, command: str, **arguments: Any) -> Any:
        """A command of QEMU's machine protocol."""
        assert self._qmp is not None
        return self._qmp.command(command, **arguments)

    def unplug(self, name: str = "gpu0", seconds: float = 30) -> None:
        """Take a device out, as an administrator does, and wait until the guest has let it go."""
        assert self._qmp is not None
        self._qmp.command("device_del", id=name)
        self._qmp.wait_event("DEVICE_DELETED", seconds, device=name)
        self.unplugged.add(name)

    def plug(self, gpu: Gpu | Path) -> None:
        """Put a device in; the guest finds it a moment later."""
        gpu = gpu if isinstance(gpu, Gpu) else Gpu(gpu)
        position = next((n for n, other in enumerate(self.gpus) if other.name == gpu.name), 0)
        assert self._qmp is not None
        self._qmp.command("device_add", **self._device(gpu, position))
        self.unplugged.discard(gpu.name)

    def _device(self, gpu: Gpu, position: int) -> dict[str, Any]:
        place = {"addr": f"{5 + position:#x}"} if self.chipset == "pc" else {"bus": f"port{position}"}
        # A server that is stopped, by a debugger say, must not lose the connection for good.
        return {
            "driver": "vfio-user-pci", "id": gpu.name, "socket": {"type": "unix", "path": str(gpu.socket)},
            "x-msg-timeout": 60000, **place,
        }  # fmt: skip

    def _command(self) -> list[str]:
        images, memory = self._images, f"{self._memory_mib}M"
        emulated = self.accelerator == "tcg"
        command = [*images.qemu, "-name", self.name, "-nodefaults", "-no-user-config", "-display", "none"]
        command += ["-accel", "tcg,thread=multi" if emulated else "kvm"]
        command += ["-cpu", "max,la57=off" if emulated else "host"]
        command += ["-smp", str(self._processors), "-m", memory]
        command += ["-object", f"memory-backend-memfd,id=memory,size={memory},share=on"]
        command += ["-machine", f"{self.chipset},memory-backend=memory"]
        command += ["-chardev", f"file,id=console,path={self.console_log}", "-serial", "chardev:console"]
        command += ["-qmp", "unix:qmp.sock,server=on,wait=off"]
        command += [
            "-device",
            "virtio-serial-pci",
            "-chardev",
            "socket,id=agent,path=agent.sock,server=on,wait=off",
        ]
        command += ["-device", "virtserialport,chardev=agent,name=agent"]
        shares = {"root": ("/", "readonly=on,multidevs=remap"), "share": (str(self.share), "multidevs=remap")}
        for tag, (path, options) in shares.items():
            command += ["-fsdev", f"local,id={tag},path={path},security_model=none,{options}"]
            command += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
        if self.chipset == "q35":
            for number in range(max(1, len(self.gpus))):
                port = f"pcie-root-port,id=port{number},bus=pcie.0,chassis={number + 1},addr={8 + number:#x}"
                command += ["-device", port]
        for position, gpu in enumerate(self.gpus):
            command += ["-device", json.dumps(self._device(gpu, position))]
        words = f"{_KERNEL_WORDS} vm.python={Path(sys.executable).resolve()} vm.name={self.name}"
        command += ["-kernel", str(images.kernel), "-initrd", str(_initial_files(images)), "-append", words]
        return command

    def logs(self) -> str:
        """The ends of the console and of QEMU's own words, for a failed assertion."""
        found = []
        for path in (self.console_log, self.qemu_log):
            with contextlib.suppress(OSError):
                found.append(f"{path.name}: {path.read_text(errors='replace')[-2000:]}")
        return "\n".join(found)
