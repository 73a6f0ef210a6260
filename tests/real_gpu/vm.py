# SPDX-License-Identifier: Apache-2.0
"""A real VM on a real GPU: what a user sees in it, and what it costs. One table, one JSON record, one transcript.

    python3 tests/real_gpu/vm.py --out record.json --transcript transcript.txt [--ollama PREFIX] [--llama-dir DIR]

The mediator runs on this machine's GPU, QEMU boots a guest whose file tree is this machine's (tests/vm/machine.py), the
project's installer installs in it, and every program then runs in the guest without a variable set. What has a native
counterpart runs natively first and must give the same. Each step is recorded whatever the others do; exit status 1
if one failed. ``PREFIX`` is where Ollama is installed (``bin/ollama``, ``lib/ollama``); without it that step is left out
and says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("VGPU_TEST_GPU", "nvidia")
ROOT = Path(__file__).resolve().parent.parent.parent
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from bench import sides
from bench.sides import SideError

from tests.real_gpu import llama
from tests.real_gpu.control_host import without_paths
from tests.real_gpu.run_all import compile_cuda
from tests.vm.guest import INSTALL_SECONDS, INSTALLER, GuestMachine
from tests.vm.host import Host
from tests.vm.remote import Result
from vgpu.transport.vfio_user.pci import Variant

PROGRAMS = Path(__file__).resolve().parent / "programs"
BAR1_BYTES = 4 << 30
LAUNCHES = 1_000_000
NVIDIA_SMI = [Path(folder) / "nvidia-smi" for folder in ("/usr/local/nvidia/bin", "/usr/bin", "/opt/bin")]


class Machine(GuestMachine):
    """A guest whose file tree is that of a GPU host, so the installer is told that a driver there is not in the way."""

    def install(self) -> Result:
        result = self.run(["/bin/sh", INSTALLER, "install", "--force"], seconds=INSTALL_SECONDS)
        self.start_agent()
        return result


class Session:
    """The running host and guest, and what the steps put down."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.build = Path(tempfile.mkdtemp(prefix="vm-build-", dir="/tmp"))
        self.host = Host({"gpu-vm": Variant.CONVENTIONAL}, bar1_bytes=BAR1_BYTES)
        self.machine = Machine(
            self.host, "gpu-vm", memory_mib=options.memory_mib, processors=options.processors
        )
        self.record: dict[str, Any] = {}
        self.transcript: list[str] = []
        self.python_path = _python_path()

    def guest(self, words: str | Sequence[str | Path], seconds: float = 300, **options: Any) -> Result:
        """Run in the guest and write both sides of it down."""
        shown = words if isinstance(words, str) else " ".join(str(word) for word in words)
        self.transcript.append(f"guest# {shown}")
        result = self.machine.run(words, seconds=seconds, check=False, **options)
        self.transcript.append((result.stdout + result.stderr).rstrip())
        if result.status != 0:
            self.transcript.append(f"(status {result.status})")
        return result

    def guest_json(self, words: Sequence[str | Path], seconds: float = 300, **options: Any) -> dict[str, Any]:
        """Run a program in the guest whose last JSON line is its result.

        Raises:
            SideError: it failed.
        """
        result = self.guest(words, seconds, **options)
        return sides.Outcome(result.status, result.stdout, result.stderr, 0.0).json_line()

    def python(self, program: str, *words: str, seconds: float = 500) -> dict[str, Any]:
        """A Python program of ``programs/`` in the guest, with this machine's packages."""
        environment = {"PYTHONPATH": self.python_path} if self.python_path else {}
        command: list[str | Path] = [sys.executable, PROGRAMS / f"{program}.py", *words]
        return self.guest_json(command, seconds, environment=environment)


def _python_path() -> str:
    """Where this machine's packages for the programs are, beyond what Python finds by itself."""
    return os.environ.get("VGPU_PROGRAM_PYTHONPATH", "")


def _native(words: Sequence[str | Path], seconds: float = 200) -> dict[str, Any]:
    return sides.run_program(words, sides.native_environment(), seconds).json_line()


# -- the steps


def shown(session: Session) -> dict[str, Any]:
    """lspci's view, nvidia-smi, the checker."""
    session.guest("for f in vendor device class; do cat /sys/bus/pci/devices/0000:00:05.0/$f; done")
    # A host may have a command of that name that looks for its libraries in places of its own.
    ours = ROOT / "build" / "native" / "nvidia-smi"
    listed = session.guest(f"{ours} -L && {ours}")
    theirs = next((p for p in NVIDIA_SMI if p.is_file() and p.read_bytes()[:4] == b"\x7fELF"), None)
    if theirs is not None:
        own = session.guest([theirs])
        if own.status != 0:
            raise SideError(f"NVIDIA's own nvidia-smi: {own.stdout[-300:]}")
    check = session.guest(["/bin/sh", INSTALLER, "check"])
    native = sides.run_program(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], sides.native_environment(), 30
    )
    name = native.output.splitlines()[0] if native.status == 0 else "NVIDIA"
    if listed.status != 0 or name not in listed.stdout:
        raise SideError(f"nvidia-smi in the guest does not show {name}: {listed.stdout[-300:]}")
    return {"name": name, "check_status": check.status, "nvidias_own": theirs is not None}


def first_result(session: Session) -> dict[str, Any]:
    """The first CUDA program after the boot."""
    began = time.monotonic()
    record = session.guest_json([_bench(session), "first"])
    wall = time.monotonic() - began
    again = session.guest_json([_bench(session), "first"])
    return {**record, "wall_seconds": round(wall, 3), "second_ms": again["first_result_ms"]}


def runtime_program(session: Session) -> dict[str, Any]:
    """A program that nvcc built, natively and in the guest."""
    program = compile_cuda("runtime_basic", session.build, "shared", "sm_90")
    return _same(_native([program]), session.guest_json([program]))


def copies(session: Session) -> dict[str, Any]:
    """BAR1 against the guest's own memory."""
    return session.guest_json([_bench(session), "copies"])


def launches(session: Session) -> dict[str, Any]:
    """A million launches: the caller's time, and how often the VM was left."""
    session.host.wait_idle("gpu-vm", 30)
    before = session.host.accesses("gpu-vm")
    record = session.guest_json([_bench(session), "launches", str(LAUNCHES)], 400)
    session.host.wait_idle("gpu-vm", 30)
    used = session.host.accesses("gpu-vm").since(before)
    beside = sides.run_program([_bench(session), "launches", str(LAUNCHES)], sides.native_environment(), 100)
    record |= {"trapped": used.trapped, "doorbells": used.doorbells, "native": beside.json_line()}
    if used.trapped > 10:
        raise SideError(f"{used.trapped} trapped accesses: {record}")
    return record


def mediator_restart(session: Session) -> dict[str, Any]:
    """SIGKILL to the mediator, and another one, under a computing guest."""
    session.transcript.append(
        "guest# guest_bench steady 12   (and on the host: kill -9 of the mediator, then a new one)"
    )
    running = session.machine.spawn([_bench(session), "steady", "12"])
    running.until("started", 60)
    time.sleep(3)
    session.host.kill()
    time.sleep(0.5)
    session.host.start()
    result = running.wait(60)
    session.transcript.append((result.stdout + result.stderr).rstrip())
    return sides.Outcome(result.status, result.stdout, result.stderr, 0.0).json_line()


def llama_counts(session: Session) -> dict[str, Any]:
    """llama.cpp through Ollama's own sequence of processes."""
    models = {preset: llama.model(session.options.models, preset) for preset in ("tiny", "1b")}
    record: dict[str, Any] = {}
    for preset, gguf in models.items():
        words: list[str | Path] = [session.options.library, "--model", gguf]
        native = _native([sys.executable, PROGRAMS / "ollama_sequence.py", *words])
        there = session.guest_json([sys.executable, PROGRAMS / "ollama_sequence.py", *words], 500)
        record[preset] = {"native": native, "guest": there}
        ours, theirs = there["pass_1"]["devices"][0], native["pass_1"]["devices"][0]
        for key in ("id", "description", "total_mib"):
            if ours[key] != theirs[key]:
                raise SideError(f"{key} is {ours[key]!r}, natively {theirs[key]!r}")
    return record


def ollama_itself(session: Session) -> dict[str, Any]:
    """Ollama's own binary."""
    record = {}
    for preset in ("tiny", "1b"):
        words = [
            sys.executable,
            PROGRAMS / "ollama_run.py",
            session.options.ollama,
            session.options.models / f"counter-{preset}-q8_0.gguf",
        ]
        record[preset] = {"native": _native(words), "guest": session.guest_json(words, 500)}
    return record


def torch_decode(session: Session) -> dict[str, Any]:
    """A small decode by PyTorch: the same tokens, the same logits."""
    native = _native([sys.executable, PROGRAMS / "torch_small_decode.py"])
    return _same(native, session.python("torch_small_decode"))


def _same(native: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
    if native["equal"] != there["equal"]:
        raise SideError(f"natively {str(native['equal'])[:300]}, in the guest {str(there['equal'])[:300]}")
    return {"equal": True, "native": native.get("info"), "guest": there.get("info")}


def _bench(session: Session) -> Path:
    program = session.build / "guest_bench"
    assert program.exists()
    return program


STEPS: dict[str, Callable[[Session], dict[str, Any]]] = {
    "first result": first_result,
    "what the user sees": shown,
    "nvcc program": runtime_program,
    "copies": copies,
    "launches": launches,
    "mediator restart": mediator_restart,
    "llama.cpp as Ollama runs it": llama_counts,
    "Ollama": ollama_itself,
    "PyTorch decode": torch_decode,
}


def _prepare(session: Session) -> None:
    """Everything the guest reads is there before it boots."""
    source = ROOT / "bench" / "c" / "guest_bench.c"
    command = ["gcc", "-O2", "-o", str(session.build / "guest_bench"), str(source)]
    subprocess.run([*command, f"-L{ROOT / 'build' / 'native'}", "-l:libcuda.so.1"], check=True)
    if "nvcc program" in session.options.only:
        compile_cuda("runtime_basic", session.build, "shared", "sm_90")
    if {"Ollama", "llama.cpp as Ollama runs it"} & set(session.options.only):
        for preset in ("tiny", "1b"):
            llama.model(session.options.models, preset)


def run(session: Session) -> bool:
    """Boot, and all steps in order; whether all were good."""
    _prepare(session)
    good = True
    with contextlib.ExitStack() as stack:
        stack.enter_context(session.host)
        began = time.monotonic()
        stack.enter_context(session.machine)
        boot = session.machine.wall_seconds
        session.record["boot"] = {
            "accelerator": session.machine.accelerator,
            "boot_seconds": round(boot, 2),
            "install_seconds": round(time.monotonic() - began - boot, 2),
        }
        print(f"booted in {boot:.1f} s with {session.machine.accelerator}", flush=True)
        for line in session.options.run:
            print(session.guest(line), flush=True)
        for name in session.options.only:
            began = time.monotonic()
            try:
                result = {"ok": True, **STEPS[name](session)}
            except Exception as error:  # noqa: BLE001 - the other steps still run, and this one is told
                result = {"ok": False, "error": f"{type(error).__name__}: {error}"[-3000:]}
            result["seconds"] = round(time.monotonic() - began, 2)
            good &= bool(result["ok"])
            session.record[name] = result
            print(f"{'ok' if result['ok'] else 'FAILED':7} {name}  {json.dumps(result)[:1500]}", flush=True)
            _write(session)
        session.record["host_log"] = session.host.log.read_text(errors="replace")[-1500:] if not good else ""
    _write(session)
    return good


def _write(session: Session) -> None:
    options = session.options
    head = {
        "machine": sides.machine_facts(options.commit or None),
        "bar1_bytes": BAR1_BYTES,
        "guest_memory_mib": options.memory_mib,
        "guest_processors": options.processors,
    }
    options.out.write_text(json.dumps(head | session.record, indent=1) + "\n")
    if options.transcript:
        options.transcript.write_text(without_paths("\n".join(session.transcript)) + "\n")


def main() -> int:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--transcript", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--ollama", type=Path, help="prefix of an Ollama installation")
    parser.add_argument("--library", type=Path, help="Ollama's lib/ollama; PREFIX/lib/ollama unless given")
    parser.add_argument("--models", type=Path, default=Path("/tmp/vgpu-models"))
    parser.add_argument("--memory-mib", type=int, default=16384)
    parser.add_argument("--processors", type=int, default=6)
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument(
        "--run", action="append", default=[], metavar="LINE", help="also run this line in the guest's shell"
    )
    options = parser.parse_args()
    if options.library is None and options.ollama is not None:
        options.library = options.ollama / "lib" / "ollama"
    for step, needed in (("Ollama", options.ollama), ("llama.cpp as Ollama runs it", options.library)):
        if needed is None and step in options.only:
            print(f"left out: {step} (neither --ollama nor --library)")
            options.only.remove(step)
    session = Session(options)
    return 0 if run(session) else 1


if __name__ == "__main__":
    sys.exit(main())
