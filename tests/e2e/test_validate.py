# SPDX-License-Identifier: Apache-2.0
"""The deployment checklist, ``tests/validate_e2e.sh``, against a real mediator: every item that passes, fails and is skipped.

QEMU, ssh and Ollama are played by scripts here; ``tests/vm`` has the real ones.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

from tests.e2e.mediator import GPU, Mediator
from vgpu.shim.locate import library_directory

SCRIPT = Path(__file__).resolve().parent.parent / "validate_e2e.sh"
SHELL = shutil.which("dash") or "/bin/sh"
Build = Callable[[str], Path]
NEEDED = (
    "sh",
    "awk",
    "grep",
    "sed",
    "tr",
    "cat",
    "id",
    "dirname",
    "basename",
    "mktemp",
    "rm",
    "readlink",
    "env",
)
GOOD_QEMU = r"""case $1 in
--version) echo "QEMU emulator version 11.1.3 (somewhere)";;
-device) printf 'name "vfio-user-pci", bus PCI, desc "VFIO over socket PCI device assignment"\n';;
esac"""


@attrs.frozen
class Result:
    """What the script said: item -> (verdict, rest of the line)."""

    status: int
    lines: list[str]

    def __getitem__(self, item: str) -> tuple[str, str]:
        for line in self.lines:
            verdict, rest = line[:4], line[6:]
            if rest.startswith(f"{item}: "):
                return verdict, rest[len(item) + 2 :]
        raise AssertionError(f"no line about {item!r} in {self.lines}")

    @property
    def verdicts(self) -> list[str]:
        return [line[:4] for line in self.lines]


@attrs.define
class Place:
    """A machine on which the script runs: only the commands that are put into its one folder exist there."""

    folder: Path
    environment: dict[str, str] = attrs.Factory(dict)

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    def __attrs_post_init__(self) -> None:
        self.bin.mkdir()
        for name in NEEDED:
            found = shutil.which(name)
            assert found is not None
            (self.bin / name).symlink_to(found)

    def command(self, name: str, body: str) -> Path:
        """Put a shell script there."""
        path = self.bin / name
        path.write_text(f"#!{SHELL}\n{body}\n")
        path.chmod(0o755)
        return path

    def module(self, name: str, module: str) -> None:
        """A command of this project."""
        path = os.pathsep.join(p for p in sys.path if p)
        self.command(name, f'PYTHONPATH="{path}" exec "{sys.executable}" -P -m {module} "$@"')

    def run(self, *words: str) -> Result:
        environment = {"PATH": str(self.bin), "HOME": str(self.folder), "TMPDIR": str(self.folder)}
        done = subprocess.run(
            [SHELL, str(SCRIPT), *words],
            capture_output=True, text=True, timeout=120, check=False, env=environment | self.environment,
        )  # fmt: skip
        assert done.stderr == ""
        lines = done.stdout.splitlines()
        assert all(line[:6] in ("PASS  ", "FAIL  ", "SKIP  ") for line in lines), lines
        assert all("; remedy: " in line for line in lines if not line.startswith("PASS"))
        assert done.returncode == ("FAIL" in [line[:4] for line in lines])
        assert list(self.folder.glob("tmp.*")) == []
        return Result(done.returncode, lines)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A machine with nothing."""
    return Place(tmp_path)


@pytest.fixture
def host(place: Place, mediator: Mediator) -> Place:
    """One with this project's commands, and a mediator that runs."""
    place.module("vgpu-admin", "vgpu.admin_main")
    place.module("vgpu-run", "vgpu.run_main")
    place.environment["VGPU_RUN_DIR"] = str(mediator.run_dir)
    place.environment["CUDA_CACHE_PATH"] = str(mediator.folder / "jit")
    return place


def test_the_script_is_sound() -> None:
    subprocess.run([SHELL, "-n", str(SCRIPT)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-S", "warning", str(SCRIPT)], check=True)
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.parametrize(
    "words",
    [[], ["--host", "--guest"], ["--what"], ["--host", "--run-dir"], ["--e2e", "--ssh", "-oProxyCommand=x"],
     ["--e2e", "--ssh", "a b"], ["--e2e", "--with", "a", "--with", "b", "--with", "c"]],
)  # fmt: skip
def test_wrong_words(words: list[str]) -> None:
    done = subprocess.run([SHELL, str(SCRIPT), *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr


# ---- the host


def test_a_host_in_order(host: Place) -> None:
    host.command("qemu-system-x86_64", GOOD_QEMU)
    host.command("nvidia-smi", "echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'")
    result = host.run("--host")
    assert result.status == 0, result.lines
    assert result["mediator runs"][0] == "PASS"
    assert f"{GPU} GPU" in result["mediator runs"][1]
    assert result["nvidia-smi shows the GPU"][0] == ("SKIP" if GPU == "software" else "PASS")
    assert result["mediator.sock exists"] == ("PASS", f"{host.environment['VGPU_RUN_DIR']}/mediator.sock")
    assert result["QEMU has the device"][0] == "PASS"
    assert "11.1.3" in result["QEMU has the device"][1]
    assert result["VMs' devices run"][0] == "SKIP"  # none is registered


def test_a_host_without_anything(place: Place) -> None:
    place.module("vgpu-admin", "vgpu.admin_main")
    place.command(
        "nvidia-smi", "echo 'NVIDIA-SMI has failed because it could not talk to the driver'; exit 9"
    )
    place.command("qemu-system-x86_64", "echo 'QEMU emulator version 8.2.2'")
    result = place.run("--host", "--run-dir", str(place.folder / "nowhere"))
    assert result.status == 1
    assert result.verdicts == ["FAIL"] * 4 + ["SKIP"]
    assert "run-mediator" in result["mediator runs"][1]
    assert "NVIDIA-SMI has failed" in result["nvidia-smi shows the GPU"][1]
    assert "8.2.2 has no vfio-user-pci" in result["QEMU has the device"][1]
    (place.bin / "vgpu-admin").unlink()
    (place.bin / "nvidia-smi").unlink()
    (place.bin / "qemu-system-x86_64").unlink()
    result = place.run("--host", "--run-dir", str(place.folder / "nowhere"))
    assert "there is no nvidia-smi" in result["nvidia-smi shows the GPU"][1]
    assert result["QEMU has the device"][0] == "FAIL"


def test_a_qemu_elsewhere_and_devices_that_are_down(place: Place) -> None:
    qemu = place.command("my-qemu", GOOD_QEMU)
    health = '{\n  "ok": true,\n  "gpu": "nvidia",\n  "version": "1",\n  "pid": 7,\n  "vm_devices": 3,\n  "vm_devices_down": [\n    "red",\n    "blue"\n  ]\n}'
    place.command("vgpu-admin", f"cat <<'END'\n{health}\nEND")
    result = place.run("--host", "--qemu", str(qemu))
    assert result["QEMU has the device"][0] == "PASS"
    assert result["VMs' devices run"][0] == "FAIL"
    assert result["VMs' devices run"][1].startswith("these do not: red blue;")
    place.command(
        "vgpu-admin", "cat <<'END'\n" + health.replace('    "red",\n    "blue"\n  ]', "]") + "\nEND"
    )
    assert place.run("--host")["VMs' devices run"] == ("PASS", "3")


# ---- a VM


def make_guest(place: Place, *, device_class: str = "0x030200") -> Path:
    """A root with a device in its sysfs and a node."""
    root = place.folder / "root"
    card = root / "sys/bus/pci/devices/0000:00:05.0"
    card.mkdir(parents=True)
    for name, value in (("vendor", "0x10de"), ("device", "0x2331"), ("class", device_class)):
        (card / name).write_text(value + "\n")
    (root / "dev").mkdir()
    (root / "dev/nvidia0").touch()
    place.environment["VGPU_VALIDATE_PREFIX"] = str(root)
    return root


def test_a_guest_in_order(host: Place) -> None:
    make_guest(host)
    host.environment["LD_LIBRARY_PATH"] = str(library_directory())
    host.command("python3", f'exec "{sys.executable}" "$@"')
    host.command("nvidia-smi", "echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'")
    log = host.folder / "ollama.log"
    log.write_text(
        'msg="inference compute" id=cpu library=cpu\nmsg="starting again"\n'
        'msg="inference compute" id=0 library=CUDA compute=9.0 name=CUDA0 description="NVIDIA H200"\n'
    )
    result = host.run("--guest", "--ollama-log", str(log))
    assert result.verdicts == ["PASS"] * 8, result.lines
    assert result["the GPU is on the PCI bus"][1].startswith("0000:00:05.0")
    assert result["libcuda.so.1 is ours"][1].endswith("/libcuda.so.1")
    assert "library=CUDA" in result["Ollama detects the GPU"][1]


def test_a_guest_where_nothing_is_right(place: Place) -> None:
    root = make_guest(place, device_class="0x030000")  # a display adapter: not ours
    (root / "dev/nvidia0").unlink()
    other = place.folder / "lib"
    other.mkdir()
    (other / "libcuda.so.1").write_bytes(b"somebody else's")
    place.environment["LD_LIBRARY_PATH"] = str(other)
    place.command("python3", f'exec "{sys.executable}" "$@"')
    place.command("nvidia-smi", "echo 'No devices were found'; exit 6")
    log = place.folder / "ollama.log"
    log.write_text('msg="inference compute" id=cpu library=cpu\n')
    result = place.run("--guest", "--ollama-log", str(log))
    assert result.verdicts == ["FAIL"] * 7, result.lines
    assert "another library" in result["libcuda.so.1 is ours"][1]
    assert "computes on the CPU" in result["Ollama detects the GPU"][1]


def test_what_cannot_be_looked_at_in_a_guest_is_skipped(place: Place) -> None:
    make_guest(place)
    place.environment["LD_LIBRARY_PATH"] = str(library_directory())
    result = place.run("--guest")
    assert result.status == 0
    assert [result[item][0] for item in ("Python loads libcuda.so.1", "nvidia-smi shows the GPU")] == [
        "SKIP"
    ] * 2
    assert result["Ollama detects the GPU"][1].startswith("Ollama is not installed")
    place.command("ollama", "exit 1")
    place.command("journalctl", "echo 'nothing of interest'")
    assert place.run("--guest")["Ollama detects the GPU"][0] == "SKIP"


# ---- both


def test_two_vms_compute(host: Place, driver_program: Build, kernels: Path) -> None:
    program = driver_program("driver")
    words = [f"vgpu-run --vm {vm} -- {program} {kernels}" for vm in ("red", "blue")]
    result = host.run("--e2e", "--with", words[0], "--with", words[1])
    assert result.verdicts == ["PASS"] * 4, result.lines
    assert "red: " in result["the mediator replays its calls"][1]
    shown = result["vgpu-admin shows both VMs' activity"][1]
    assert "red: " in shown
    assert "blue: " in shown
    one = host.run("--e2e", "--with", words[1])
    assert one.verdicts == ["PASS", "PASS", "SKIP", "SKIP"]
    assert "red" not in one["the mediator replays its calls"][1]


def test_programs_that_fail_or_use_no_gpu(host: Place) -> None:
    result = host.run("--e2e", "--with", "echo I am on the CPU", "--with", "echo out of memory >&2; exit 3")
    assert result.verdicts == ["PASS", "FAIL", "FAIL", "FAIL"], result.lines
    assert "no call of any VM" in result["the mediator replays its calls"][1]
    assert "status 3: out of memory" in result["a second VM computes at the same time"][1]
    silent = host.run("--e2e", "--with", "true")
    assert silent["a program in the VM answers"] == (
        "FAIL",
        '"true": it said nothing; remedy: vgpu-guest check in that VM; try there: ollama run llama3.2:1b "Say hello"',
    )


def test_ollama_is_run_through_ssh(host: Place, driver_program: Build, kernels: Path) -> None:
    program = driver_program("driver")
    host.command(
        "ssh",
        f"""printf '%s\\n' "$@" >>"{host.folder}/said"
        while [ $# -gt 2 ]; do shift; done
        vm=${{1#*@}}; export vm; eval "$2\"""",
    )
    host.command(
        "ollama", f'printf "%s\\n" "$@" >>"{host.folder}/said"; vgpu-run --vm "$vm" -- {program} {kernels}'
    )
    result = host.run("--e2e", "--ssh", "root@red", "--ssh", "root@blue", "--model", "it's:1b")
    assert result.verdicts == ["PASS"] * 4, result.lines
    assert result['ollama run it\'s:1b "Say hello" answers'][0] == "PASS"
    said = (host.folder / "said").read_text().splitlines()
    assert said[:4] == ["-n", "-o", "BatchMode=yes", "root@red"]
    assert said[5:8] == ["run", "it's:1b", "Say hello"]


def test_in_a_vm_ollama_is_run_there(place: Place) -> None:
    result = place.run("--e2e")
    assert result.verdicts == ["SKIP"] * 4
    place.command("ollama", 'echo "Hello there: $1 $2 $3"')
    result = place.run("--e2e")
    assert result.verdicts == ["PASS"] + ["SKIP"] * 3
    assert result.lines[0].endswith("Hello there: run llama3.2:1b Say hello")
    place.command("ollama", "printf '\\033[2J\\007bad\\n' >&2; exit 1")
    result = place.run("--e2e")
    assert result.verdicts[0] == "FAIL"
    assert "\033" not in result.lines[0]
