# SPDX-License-Identifier: Apache-2.0
"""vgpu-admin doctor on hosts that are made up: what it finds, what it says to do, and how it ends."""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.e2e.mediator import Mediator
from tests.src.test_commands import command
from vgpu import doctor, kvm_probe
from vgpu.config import Settings
from vgpu.doctor import FAIL, OK, WARN, Finding, Host

ADMIN = "vgpu.admin_main"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """An empty one."""
    root = tmp_path / "root"
    root.mkdir()
    return Host(tmp_path / "run", tmp_path / "state", tmp_path / "mediator.toml", root=root)


def put(host: Host, path: str, text: str = "") -> Path:
    place = host.root / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text)
    return place


def only(findings: list[Finding], what: str) -> Finding:
    (found,) = [finding for finding in findings if finding.what == what]
    return found


def qemu(tmp_path: Path, version: str, devices: str) -> str:
    program = tmp_path / "qemu"
    program.write_text(
        f"#!/bin/sh\ncase $1 in --version) echo 'QEMU emulator version {version}';; *) echo '{devices}';; esac\n"
    )
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(
    ("version", "devices", "level", "words"),
    [
        ("10.1.0 (Debian 1:10.1)", 'name "vfio-user-pci", bus PCI', OK, "10.1.0"),
        ("11.1.3", 'name "vfio-user-pci", bus PCI', OK, "with vfio-user-pci"),
        ("10.0.4", 'name "vfio-pci", bus PCI', FAIL, "has no vfio-user-pci"),
        ("10.2.0", 'name "vfio-pci", bus PCI', FAIL, "built without vfio-user-pci"),
        ("unknown", "", FAIL, "does not tell its version"),
    ],
)
def test_qemu(host: Host, tmp_path: Path, version: str, devices: str, level: str, words: str) -> None:
    (found,) = doctor.check_qemu(
        Host(host.run_dir, host.state_dir, host.configuration, qemu(tmp_path, version, devices))
    )
    assert (found.level, words in found.found) == (level, True), found
    assert bool(found.remedy) == (level != OK)


def test_kvm_that_is_there_and_of_no_use_is_told_from_kvm(host: Host) -> None:
    (none,) = doctor.check_kvm(host)
    assert (none.level, "no /dev/kvm" in none.found) == (WARN, True)
    node = put(host, "dev/kvm")
    assert kvm_probe.probe(str(node)).startswith("cannot ask its version: ")
    assert kvm_probe.probe(str(host.root / "dev" / "nothing")).startswith("cannot open it: ")


def test_a_driver_that_is_half_there(host: Host) -> None:
    (none,) = doctor.check_driver(host)
    assert none.level == WARN
    assert "software GPU" in none.found
    put(host, "sys/module/nvidia/version", "580.1")
    wanted = Host(
        host.run_dir,
        host.state_dir,
        host.configuration,
        root=host.root,
        settings=Settings(library=Path("/nonexistent")),
    )
    (found,) = doctor.check_driver(wanted)
    assert (found.level, found.found) == (FAIL, "/nonexistent is not a file")


def test_places(host: Host) -> None:
    findings = list(doctor.check_places(host))
    assert [f.level for f in findings] == [OK, OK, OK]
    host.run_dir.mkdir()
    host.run_dir.chmod(0o777)
    found = only(list(doctor.check_places(host)), "run directory")
    assert (found.level, found.remedy) == (FAIL, f"chmod go-w {host.run_dir}")
    long = Host(Path("/" + "x" * 100), host.state_dir, host.configuration)
    assert "names of VMs could have 0 characters" in next(doctor.check_places(long)).found


def test_a_socket_that_everybody_may_open_fails(host: Host) -> None:
    folder = host.run_dir / "vfio-user"
    folder.mkdir(parents=True)
    socket = folder / "red.sock"
    socket.touch()
    socket.chmod(0o666)
    found = next(doctor.check_sockets(host))
    assert (found.what, found.level, found.remedy) == ("socket red.sock", FAIL, f"chmod o= {socket}")
    socket.chmod(0o660)
    (found,) = doctor.check_sockets(host)
    assert found.level == OK


def test_memory_that_vms_were_promised(host: Host) -> None:
    put(host, "proc/meminfo", "MemTotal:       1048576 kB\nMemFree: 1 kB\nMemAvailable:    524288 kB\n")
    for promised, level in ((256 << 20, OK), (768 << 20, WARN), (2 << 30, FAIL)):
        (found,) = doctor.check_memory(host, [{"bar1_bytes": promised}])
        assert found.level == level, found
    assert "512 MiB of 1 GiB available" in found.found
    # A VM without a device was promised nothing.
    for sizes, words in (([256 << 20, 0], "256 MiB promised to 1 VM,"), ([1, 1, 0], "promised to 2 VMs,")):
        (found,) = doctor.check_memory(host, [{"bar1_bytes": size} for size in sizes])
        assert words in found.found


def test_huge_pages(host: Host) -> None:
    for text, level in (
        ("always within_size advise [never] deny force", WARN),
        ("always [advise] never", OK),
        ("", WARN),
    ):
        put(host, "sys/kernel/mm/transparent_hugepage/shmem_enabled", text)
        assert only(list(doctor.check_limits(host)), "huge pages for BAR1").level == level


def test_a_configuration_that_cannot_be_meant_fails_with_its_line(host: Host) -> None:
    (found,) = doctor.check_configuration(host)
    assert found.level == OK
    host.configuration.write_text("[mediator]\nwarm_workers = 100\n")
    (found,) = doctor.check_configuration(host)
    assert found.level == FAIL
    assert "mediator.toml, line 2: warm_workers is 100" in found.found


def test_the_command_has_a_remedy_for_all_that_is_not_ok_and_ends_with_1_on_failure(tmp_path: Path) -> None:
    words: list[str | Path] = [
        "doctor",
        "--run-dir",
        tmp_path / "run",
        "--state-dir",
        tmp_path / "state",
        "--json",
    ]
    done = command(ADMIN, *words, XDG_CONFIG_HOME=str(tmp_path))
    told = json.loads(done.stdout)
    assert done.returncode == (0 if told["ok"] else 1), done.stderr
    by_name = {finding["what"]: finding for finding in told["findings"]}
    assert {
        "system",
        "Python",
        "vgpu",
        "packages",
        "driver",
        "QEMU",
        "KVM",
        "run directory",
        "locked memory",
        "mediator",
    } <= set(by_name)
    assert all(finding["remedy"] for finding in told["findings"] if finding["level"] != OK)
    assert by_name["mediator"]["level"] == WARN
    bad = tmp_path / "bad.toml"
    bad.write_text("[mediator]\ngup = 1\n")
    done = command(
        ADMIN, "doctor", "--config", bad, "--run-dir", tmp_path / "run", XDG_CONFIG_HOME=str(tmp_path)
    )
    assert done.returncode == 1
    assert f"{bad}, line 2: unknown key 'gup'" in done.stdout
    assert os.listdir(tmp_path) == ["bad.toml"]


def test_counted_gpu_time_that_is_not_the_cards_is_told() -> None:
    def window(counted: float, nvml: float | None) -> dict[str, float | None]:
        drift = None if nvml is None else counted - nvml
        return {"seconds": 60.0, "counted_ratio": counted, "nvml_ratio": nvml, "drift_ratio": drift}

    found = list(
        doctor._gpu_time({"0": [window(0.5, 0.5)], "1": [window(0.1, 0.9)], "2": [window(0.1, None)]})
    )
    assert [(one.what, one.level) for one in found] == [
        ("GPU time of GPU 0", OK),
        ("GPU time of GPU 1", WARN),
    ]
    assert "counted 10% of the last 60 s, NVML says 90%" in found[1].found
    assert "nvidia-smi" in found[1].remedy


def test_messages_that_nobody_read_are_told(host: Host) -> None:
    def runtime(now: float, *letters: dict[str, object]) -> dict[str, object]:
        return {"now": now, "statistics": {"dead_letters": len(letters)}, "dead_letters": list(letters)}

    def letter(time: float, kind: str, sender: str | None = "a") -> dict[str, object]:
        return {"time": time, "target": "b", "message_type": kind, "text": f"{kind}()", "sender": sender}

    (none,) = doctor._dead_letters(runtime(5.0))
    assert (none.level, none.found) == (OK, "none: its actors have read every message")
    letters = [letter(1.0, "Ping"), letter(2.0, "Pong"), letter(3.0, "Note", None), letter(100.0, "Pong")]
    (found,) = doctor._dead_letters(runtime(110.0, *letters))
    assert found.level == WARN
    assert found.found == (
        "4 not read since it began, the last: 10.0s ago Pong from a to b; 1m47s ago Note from somebody to b;"
        " 1m48s ago Pong from a to b"
    )
    assert "vgpu-trace tree" in found.remedy
    # What is long past stays to be seen, and is nothing to be warned of for ever.
    (old,) = doctor._dead_letters(runtime(100.0 + 3601, *letters))
    assert (old.level, old.found.partition(",")[0]) == (OK, "4 not read since it began")
    without_now = {name: value for name, value in runtime(0, letter(7.0, "Ping")).items() if name != "now"}
    (of_an_older_one,) = doctor._dead_letters(without_now)
    assert "0.0s ago Ping" in of_an_older_one.found


def test_it_looks_where_the_mediator_that_runs_has_its_things(tmp_path: Path) -> None:
    """Its state directory and configuration are those of its command line, which nobody has to repeat."""
    with tempfile.TemporaryDirectory(prefix="vgpu-", dir="/tmp") as name:
        (Path(name) / "own.toml").write_text("[mediator]\nwarm_workers = 0\n")
        with Mediator(options=["--config", f"{name}/own.toml"]) as mediator:
            described = mediator.ask("health")
            words: list[str | Path] = ["doctor", "--json", "--run-dir", mediator.run_dir]
            elsewhere = {"XDG_CONFIG_HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}
            findings = json.loads(command(ADMIN, *words, **elsewhere).stdout)["findings"]
            found = {one["what"]: one["found"] for one in findings}
            assert found["configuration"] == f"{name}/own.toml, 1 settings"
            assert found["state directory"].startswith(f"{described['state_dir']} (")
            # What is said on the command line wins.
            words += ["--state-dir", str(tmp_path / "mine"), "--config", str(tmp_path / "none.toml")]
            findings = json.loads(command(ADMIN, *words).stdout)["findings"]
            found = {one["what"]: one["found"] for one in findings}
            assert found["state directory"].startswith(str(tmp_path / "mine"))
            assert "none.toml" in found["configuration"]
            os.kill(mediator.pid, signal.SIGSTOP)
            try:
                done = command(ADMIN, "doctor", "--json", "--run-dir", mediator.run_dir)
            finally:
                os.kill(mediator.pid, signal.SIGCONT)
            (mute,) = [one for one in json.loads(done.stdout)["findings"] if one["what"] == "mediator"]
            assert mute["level"] == FAIL
            assert f"its process {mediator.pid} is stopped" in mute["found"]
            assert mute["remedy"] == f"kill -CONT {mediator.pid} lets it go on"
            assert done.stderr.count("does not answer; waiting for it") == 1


def test_limits_are_those_of_the_mediator_that_runs(tmp_path: Path) -> None:
    def found(mediator: int) -> dict[str, doctor.Finding]:
        host = doctor.Host(tmp_path, tmp_path, tmp_path / "none.toml", mediator=mediator)
        return {finding.what: finding for finding in doctor.check_limits(host)}

    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            resource.prlimit(other.pid, resource.RLIMIT_NOFILE, (64, 64))
            resource.prlimit(other.pid, resource.RLIMIT_MEMLOCK, (4096, 4096))
            theirs = found(other.pid)
        finally:
            other.kill()
    assert (theirs["descriptors"].level, theirs["descriptors"].found) == (doctor.WARN, "at most 64")
    assert (theirs["locked memory"].level, theirs["locked memory"].found) == (doctor.WARN, "at most 4 KiB")
    assert found(other.pid) == found(0)  # it has ended: what is said is said of this shell


def test_it_looks_where_a_mediator_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Line before environment before file, as for the mediator itself."""
    config = tmp_path / "mediator.toml"
    config.write_text(f"[mediator]\nrun_dir = '{tmp_path}/file'\n")
    said = argparse.Namespace(config=config, run_dir=None, state_dir=None, qemu="")
    monkeypatch.delenv("VGPU_RUN_DIR", raising=False)
    assert doctor.find_host(said).run_dir == tmp_path / "file"
    monkeypatch.setenv("VGPU_RUN_DIR", str(tmp_path / "environment"))
    assert doctor.find_host(said).run_dir == tmp_path / "environment"
    said.run_dir = tmp_path / "line"
    assert doctor.find_host(said).run_dir == tmp_path / "line"
