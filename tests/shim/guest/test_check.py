# SPDX-License-Identifier: Apache-2.0
"""What `check` says of systems that are broken in one way each: the line, its remedy, and the exit status."""

from __future__ import annotations

import fcntl
import json
import os
import re
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from tests.shim.guest.staging import PAGE, READY, SLOTS, Machine, make_bar1, run
from vgpu.transport import layout


@attrs.frozen
class Report:
    """The lines of a check."""

    status: int
    lines: list[str]

    def of(self, item: str) -> list[str]:
        """``STATUS text`` of each line about an item."""
        found = [re.match(rf"(OK|WARN|FAIL|SKIP) +{re.escape(item)}: (.*)", line) for line in self.lines]
        return [f"{match[1]} {match[2]}" for match in found if match]


def check(bundle: Path, machine: Machine, **environment: str) -> Report:
    done = run(bundle, "check", "--prefix", machine.root, environment=environment)
    assert done.stderr == ""
    return Report(done.returncode, done.stdout.splitlines())


@pytest.fixture
def device(machine: Machine) -> Path:
    return machine.add_device()


@pytest.fixture
def abandoned(bundle: Path, machine: Machine, device: Path) -> Machine:
    """A system on which everything is installed, with a device that nobody is behind."""
    (machine.root / "dev").mkdir()
    done = run(bundle, "install", "--prefix", machine.root)
    assert done.returncode == 0, done.stderr
    return machine


def beat(path: Path, stop: threading.Event) -> None:
    """What the device's process does on the host: raise the heartbeat."""
    offset = layout.DIRECTORY_OFFSET + layout.DIRECTORY_FIELDS["host_heartbeat"][0]
    beats = 0
    with path.open("r+b", buffering=0) as memory:
        while not stop.wait(0.05):
            beats += 1
            memory.seek(offset)
            memory.write(struct.pack("<Q", beats))


@pytest.fixture
def host(device: Path) -> Iterator[None]:
    """A living process behind the device."""
    stop = threading.Event()
    thread = threading.Thread(target=beat, args=(device / "resource1", stop))
    thread.start()
    yield
    stop.set()
    thread.join()


@pytest.fixture
def installed(abandoned: Machine, host: None) -> Machine:
    """A system on which everything is as it should be."""
    return abandoned


# ---- for programs

WORDS = {"ok": "OK", "warning": "WARN", "failed": "FAIL", "skipped": "SKIP"}


def check_json(bundle: Path, machine: Machine, *words: str, **environment: str) -> tuple[int, list[str]]:
    """The status, and each object of the answer as the line that people get."""
    done = run(bundle, *words, "--json", "--prefix", machine.root, environment=environment)
    assert done.stderr == ""
    lines = []
    for found in json.loads(done.stdout):
        assert list(found) == ["name", "state", "text", "remedy"]
        assert (found["remedy"] != "") == (found["state"] in ("warning", "failed"))
        remedy = f"; remedy: {found['remedy']}" if found["remedy"] else ""
        lines.append(f"{WORDS[found['state']]:<4}  {found['name']}: {found['text']}{remedy}")
    return done.returncode, lines


def test_json_says_the_same(bundle: Path, installed: Machine, device: Path) -> None:
    for status, enable in ((0, "1\n"), (1, "0\n")):
        (device / "enable").write_text(enable)
        report = check(bundle, installed)
        assert report.status == status
        for words in ("check",), ("--check",):
            assert check_json(bundle, installed, *words) == (status, report.lines[:-1])


def test_json_holds_whatever_is_found(bundle: Path, installed: Machine) -> None:
    strange = '-1 "a\\b"\tc\nd\x01\u00e4'
    _, lines = check_json(bundle, installed, "check", CUDA_VISIBLE_DEVICES="none")
    assert any(line.startswith('WARN  environment: CUDA_VISIBLE_DEVICES is "none"') for line in lines)
    installed.write("sys/kernel/security/lockdown", f"[integrity] {strange}\n")
    _, lines = check_json(bundle, installed, "check")
    (line,) = (line for line in lines if "lockdown:" in line)
    assert '[integrity] -1 "a\\b" c' in line


def test_json_is_for_check_alone(bundle: Path, machine: Machine) -> None:
    done = run(bundle, "uninstall", "--json", "--prefix", machine.root)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--json goes with check alone" in done.stderr


# ---- the device


def test_a_good_system(bundle: Path, installed: Machine, device: Path) -> None:
    report = check(bundle, installed)
    assert report.of("device") == ["OK 0000:00:05.0 (10de:2331, subsystem 10de:16c1)"]
    assert report.of("enabled") == ["OK 0000:00:05.0 is switched on"]
    assert report.of("host") == ["OK the mediator is there"]
    assert report.of("slots") == [f"OK 0 of {SLOTS} in use"]
    assert report.of("files") == ["OK all as installed in /usr/lib/vgpu"]
    assert [line.split()[0] for line in report.of("loader")] == ["OK", "OK"]
    assert not [line for line in report.lines if line.startswith("FAIL")]
    assert report.status == 0


def test_no_device(bundle: Path, machine: Machine) -> None:
    report = check(bundle, machine)
    (line,) = report.of("device")
    assert line.startswith("FAIL no GPU in this VM")
    assert "vgpu-admin register-vm" in line
    assert report.of("files")[0].startswith("FAIL nothing is installed here")
    assert report.status == 1


@pytest.mark.parametrize(
    "difference", [{"subsystem_device": "0x1626"}, {"device": "0x2330"}, {"bar0": 16 << 20}], ids=str
)
def test_a_real_card_is_not_taken_for_ours(
    bundle: Path, machine: Machine, difference: dict[str, str | int]
) -> None:
    bar0 = difference.pop("bar0", PAGE * (SLOTS + 1))
    assert isinstance(bar0, int)
    machine.add_device("0000:01:00.0", bar0, **{name: str(value) for name, value in difference.items()})
    (line,) = check(bundle, machine).of("device")
    assert line.startswith("FAIL no virtual GPU; 0000:01:00.0 is a real NVIDIA card")


def test_switched_off(bundle: Path, installed: Machine, device: Path) -> None:
    (device / "enable").write_text("0\n")
    (line,) = check(bundle, installed).of("enabled")
    assert line.startswith("FAIL 0000:00:05.0 is switched off")
    assert "echo 1 > /sys/bus/pci/devices/0000:00:05.0/enable" in line


def test_a_driver_holds_it(bundle: Path, installed: Machine, device: Path) -> None:
    (device / "driver").symlink_to("../../../bus/pci/drivers/nouveau")
    (line,) = check(bundle, installed).of("driver")
    assert line.startswith("FAIL the kernel driver nouveau holds 0000:00:05.0")
    assert "/sys/bus/pci/drivers/nouveau/unbind" in line


def test_lockdown(bundle: Path, installed: Machine) -> None:
    installed.write("sys/kernel/security/lockdown", "none [integrity] confidentiality\n")
    (line,) = check(bundle, installed).of("lockdown")
    assert line.startswith("FAIL the kernel is locked down")
    assert "Secure Boot" in line
    installed.write("sys/kernel/security/lockdown", "[none] integrity confidentiality\n")
    assert check(bundle, installed).of("lockdown") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another group")
def test_permission(bundle: Path, installed: Machine, device: Path) -> None:
    (line,) = check(bundle, installed).of("permission")
    assert line.startswith("WARN 0000:00:05.0 belongs to root alone")
    for name in ("resource0", "resource1"):
        os.chown(device / name, 0, 1)
        (device / name).chmod(0o660)
    (line,) = check(bundle, installed).of("permission")
    assert line.startswith("OK 0000:00:05.0 is open to the group ")


# ---- what the device says


@pytest.mark.parametrize(
    ("memory", "item", "said", "remedy"),
    [
        ({"status": 0}, "host", "FAIL no mediator on the host", "start run-mediator"),
        ({"status": 3}, "quarantine", "FAIL this VM is quarantined", "vgpu-admin clear-quarantine --vm-name=NAME"),
        ({"device_state": 1}, "quarantine", "FAIL this VM is quarantined", "vgpu-admin show-faults"),
        ({"device_state": 2}, "rate", "WARN calls of this VM are being held back", "vgpu-admin set-rate-limit"),
        ({"throttle": 0x40}, "throttle", "WARN the card slows itself down (0x40)", "cooling and power"),
        ({"table_hash": 1}, "version", "FAIL host and guest are of different versions", "vgpu-guest bundle"),
        ({"version": 9}, "version", "FAIL host and guest are of different versions", "vgpu-guest bundle"),
        ({"magic": b"NOTOURS!"}, "host", "FAIL 0000:00:05.0 has our ids but not our memory", "update"),
        ({"magic": b"\xff" * 8}, "host", "FAIL 0000:00:05.0 does not answer", "device_del"),
        ({"states": ((7, 1, READY),) * SLOTS}, "slots", f"WARN all {SLOTS} slots are taken", "larger BAR1"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_what_the_device_says(
    bundle: Path, installed: Machine, device: Path, memory: dict[str, object], item: str, said: str, remedy: str
) -> None:  # fmt: skip
    with (device / "resource1").open("r+b") as file:
        file.write(make_bar1(**memory))  # type: ignore[arg-type]
    (line,) = check(bundle, installed).of(item)
    assert line.startswith(said)
    assert remedy in line.partition("; remedy: ")[2]


def test_ordinary_throttle_reasons_are_no_trouble(bundle: Path, installed: Machine, device: Path) -> None:
    with (device / "resource1").open("r+b") as file:
        file.write(make_bar1(throttle=0x5))  # idle, and software power cap
    assert check(bundle, installed).of("throttle") == []


def test_calls_time_out_when_the_devices_process_has_stopped(bundle: Path, abandoned: Machine) -> None:
    report = check(bundle, abandoned)
    (line,) = report.of("host")
    assert line.startswith("FAIL the device's process on the host has stopped; calls will time out")
    assert report.status == 1


def test_the_agent_is_known_by_its_lock(bundle: Path, installed: Machine, device: Path) -> None:
    (line,) = check(bundle, installed).of("agent")
    assert line.startswith("WARN vgpu-guest-agent is not running")
    with (device / "resource0").open("r+b") as file:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0))
        assert check(bundle, installed).of("agent") == ["OK vgpu-guest-agent looks after 0000:00:05.0"]


# ---- files, loader, environment


def test_files_that_changed(bundle: Path, installed: Machine) -> None:
    (installed.root / "usr/lib/vgpu/libcuda.so").unlink()
    (installed.root / "etc/profile.d/vgpu.sh").write_text("x")
    (line,) = check(bundle, installed).of("files")
    assert line.startswith("WARN changed or missing since they were installed:")
    assert "/usr/lib/vgpu/libcuda.so" in line
    assert "/etc/profile.d/vgpu.sh" in line


def test_an_older_libcuda_comes_first(bundle: Path, installed: Machine, parts: Path) -> None:
    (installed.root / "etc/ld.so.conf").write_text("/opt/old\ninclude /etc/ld.so.conf.d/*.conf\n")
    (installed.root / "opt/old").mkdir(parents=True)
    (installed.root / "opt/old/libcuda.so.1").write_bytes((parts / "libcuda.so.1").read_bytes())
    subprocess.run(
        ["ldconfig", "-r", str(installed.root), "-X"],
        check=True,
        env={**os.environ, "PATH": f"{os.environ['PATH']}:/sbin:/usr/sbin"},
    )
    ours, other = check(bundle, installed).of("loader")
    assert ours.startswith("FAIL the loader finds another libcuda.so.1 first: /opt/old/libcuda.so.1")
    assert other.startswith("OK libnvidia-ml.so.1")


def test_library_paths_and_hidden_devices(bundle: Path, installed: Machine, parts: Path) -> None:
    report = check(bundle, installed, LD_LIBRARY_PATH=f"/nowhere:{parts}", CUDA_VISIBLE_DEVICES="")
    cuda, nvml, hidden = report.of("environment")
    assert cuda.startswith(f"FAIL LD_LIBRARY_PATH leads to {parts}/libcuda.so.1 before ours")
    assert ". /etc/profile.d/vgpu.sh" in cuda
    assert "libnvidia-ml.so.1" in nvml
    assert hidden.startswith('WARN CUDA_VISIBLE_DEVICES is "", which hides every GPU')
    report = check(bundle, installed, LD_LIBRARY_PATH=f"/usr/lib/vgpu:{parts}", CUDA_VISIBLE_DEVICES="0")
    assert report.of("environment") == ["OK LD_LIBRARY_PATH hides nothing"]


# ---- the libraries at work: an install without root, whose libraries a made-up home folder holds


@pytest.fixture
def home(bundle: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    done = run(bundle, "install", "--user", home=folder)
    if "real NVIDIA driver" in done.stderr:
        pytest.skip("this machine has a real driver")
    assert done.returncode == 0, done.stderr
    return folder


def check_home(bundle: Path, home: Path, **environment: str) -> Report:
    done = run(bundle, "check", "--user", home=home, environment=environment)
    return Report(done.returncode, done.stdout.splitlines())


def test_libraries_that_work(bundle: Path, home: Path) -> None:
    report = check_home(bundle, home, PATH=f"{home}/.local/bin:{os.environ['PATH']}")
    assert report.of("CUDA") == ["OK Fake H200, 20480 MiB, CUDA 13.0"]
    assert report.of("NVML") == ["OK driver 580.159.04"]
    assert report.of("nvidia-smi") == ["OK GPU 0: Fake H200 (UUID: GPU-0)"]
    assert report.of("environment")[0].startswith("WARN this shell does not have")
    assert report.of("loader") == report.of("nodes") == []


@pytest.mark.parametrize(
    ("variable", "value", "item", "said"),
    [
        ("FAKE_CUDA", "100", "CUDA", "FAIL cuInit says 100 (CUDA_ERROR_FAKE); remedy: the library found no device"),
        ("FAKE_CUDA", "803", "CUDA", "FAIL cuInit says 803 (CUDA_ERROR_FAKE); remedy: host and guest are of different"),
        ("FAKE_NVML", "9", "NVML", "FAIL nvmlInit says 9 (Fake); remedy: the library found no device"),
        ("FAKE_SMI", "6", "nvidia-smi", "FAIL"),
    ],
)  # fmt: skip
def test_libraries_that_refuse(
    bundle: Path, home: Path, variable: str, value: str, item: str, said: str
) -> None:
    path = f"{home}/.local/bin:{os.environ['PATH']}"
    report = check_home(bundle, home, **{"PATH": path, variable: value})
    (line,) = report.of(item)
    assert line.startswith(said)
    assert report.status == 1


def test_another_library_gets_in_between(bundle: Path, home: Path, parts: Path) -> None:
    # A preloaded library of that soname is what dlopen returns, wherever the path leads.
    report = check_home(bundle, home, LD_PRELOAD=str(parts / "libcuda.so.1"))
    (line,) = report.of("CUDA")
    assert line.startswith(f"FAIL a program gets {parts}/libcuda.so.1, which is not ours")


def test_a_call_that_does_not_come_back(parts: Path) -> None:
    probe = [str(parts / "vgpu-guest-probe"), "--timeout", "1", "cuda", str(parts / "libcuda.so.1")]
    done = subprocess.run(
        probe, env={"FAKE_HANG": "1"}, capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 1
    assert done.stdout.splitlines()[-2:] == ["result=timeout", "asking=cuInit"]


# ---- Ollama


@pytest.fixture
def ollama(installed: Machine) -> Machine:
    installed.write("usr/local/bin/ollama", "#!/bin/sh\n", 0o755)
    installed.write("usr/local/lib/ollama/cuda_v13/libggml-cuda.so")
    installed.write("etc/systemd/system/ollama.service", "[Service]\nUser=ollama\n")
    return installed


def test_an_ollama_that_is_fine(bundle: Path, ollama: Machine) -> None:
    assert check(bundle, ollama).of("Ollama") == [
        "OK its CUDA engine is there",
        "OK its service's environment is fine",
    ]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("usr/local/lib/ollama/cuda_v13/libcuda.so.1", "", "other driver libraries lie in its folder"),
        ("etc/systemd/system/ollama.service.d/a.conf", "Environment=OLLAMA_LLM_LIBRARY=cpu\n", "environment hides the GPU"),
        ("etc/systemd/system/ollama.service.d/a.conf", "ProtectKernelTunables=yes\n", "has ProtectKernelTunables"),
    ],
)  # fmt: skip
def test_ollama_falls_back(bundle: Path, ollama: Machine, name: str, text: str, said: str) -> None:
    ollama.write(name, text)
    failures = [line for line in check(bundle, ollama).of("Ollama") if line.startswith("FAIL")]
    assert len(failures) == 1
    assert said in failures[0]


def test_ollama_without_its_engine(bundle: Path, ollama: Machine) -> None:
    (ollama.root / "usr/local/lib/ollama/cuda_v13/libggml-cuda.so").unlink()
    assert check(bundle, ollama).of("Ollama")[0].startswith("FAIL it falls back to the CPU: no cuda_v12")


def test_a_leftover_preload_is_pointed_out(bundle: Path, ollama: Machine) -> None:
    ollama.write("etc/systemd/system/ollama.service.d/a.conf", "Environment=LD_PRELOAD=/x.so\n")
    lines = [line for line in check(bundle, ollama).of("Ollama") if "LD_PRELOAD" in line]
    assert [line.split()[0] for line in lines] == ["WARN"]


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another group")
def test_ollamas_user_may_not_open_the_device(bundle: Path, ollama: Machine, device: Path) -> None:
    gid = os.stat(device / "resource1").st_gid
    assert gid == 0
    with Path("/etc/group").open() as groups:  # stat prints names of the machine that the test runs on
        names = {line.split(":")[0]: int(line.split(":")[2]) for line in groups}
    name = next(name for name in ("video", "users", "mail") if name in names)
    os.chown(device / "resource1", 0, names[name])
    failures = [line for line in check(bundle, ollama).of("Ollama") if line.startswith("FAIL")]
    assert len(failures) == 1
    assert f"its user ollama is not in the group {name}" in failures[0]
    ollama.write("etc/group", f"{name}:x:{names[name]}:someone,ollama\n")
    assert f"OK its user ollama is in the group {name}" in check(bundle, ollama).of("Ollama")
    ollama.write("etc/group", f"{name}:x:{names[name]}:\n")
    ollama.write("etc/systemd/system/ollama.service.d/vgpu.conf", f"[Service]\nSupplementaryGroups={name}\n")
    assert f"OK its user ollama is in the group {name}" in check(bundle, ollama).of("Ollama")
