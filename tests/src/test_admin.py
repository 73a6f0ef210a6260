# SPDX-License-Identifier: Apache-2.0
"""vgpu-admin as people and programs meet it: what it prints for QEMU, tables, JSON, statuses, completion."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import socket
import subprocess
import tempfile
import threading
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.e2e.vm_device import DeviceMediator
from tests.src.test_commands import command, completions
from vgpu import __version__
from vgpu.admin_arguments import live_sessions
from vgpu.admin_client import AdminClient, NoMediator
from vgpu.admin_main import main
from vgpu.units import parse_seconds, parse_size, show_seconds, show_size, show_table
from vgpu.vm_recipes import QEMU_NAMESPACE, libvirt_text, qemu_arguments, qemu_text

ADMIN = "vgpu.admin_main"


@pytest.fixture(scope="module")
def mediator() -> Iterator[DeviceMediator]:
    with DeviceMediator() as running:
        yield running


def admin(mediator: DeviceMediator, *words: str) -> subprocess.CompletedProcess[str]:
    """The command, without a process of its own: starting one takes longer than what it does."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            status = main(["--run-dir", str(mediator.run_dir), *words])
        except SystemExit as end:
            status = int(end.code or 0)
    return subprocess.CompletedProcess(words, status, out.getvalue(), errors.getvalue())


def answer(mediator: DeviceMediator, *words: str) -> Any:
    done = admin(mediator, *words, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


# -- with a mediator


def test_registering_prints_what_qemu_needs(mediator: DeviceMediator) -> None:
    done = admin(mediator, "register-vm", "--vm-name=user1", "--pool=A", "--priority=high", "--memory=512MiB")
    assert (done.returncode, done.stderr) == (0, "")
    path = mediator.run_dir / "vfio-user" / "user1.sock"
    assert path.is_socket()
    (option,) = re.findall(r"^  (-device .*)$", done.stdout, re.MULTILINE)
    assert json.loads(shlex.split(option)[1]) == {
        "driver": "vfio-user-pci",
        "socket": {"path": str(path), "type": "unix"},
        "addr": "0x5",
        "id": "vgpu0",
        "x-msg-timeout": 60000,
    }
    assert f"xmlns:qemu='{QEMU_NAMESPACE}'" in done.stdout
    shown = answer(mediator, "show-vm", "--vm-name=user1")
    assert shown["vm"]["memory_limit_bytes"] == 512 << 20
    assert (shown["vm"]["pool"], shown["vm"]["priority"], shown["vm"]["bar1_bytes"]) == (
        "A",
        "high",
        256 << 20,
    )
    assert shown["qemu"] == shlex.split(option)
    assert (shown["device"]["running"], shown["device"]["connected"]) == (True, False)
    assert shown["sessions"] == []
    text = admin(mediator, "show-vm", "--vm-name=user1").stdout
    assert re.search(r"^memory +512 MiB$", text, re.MULTILINE)
    assert re.search(r"^BAR1 +256 MiB, 8 slots, 0 in use$", text, re.MULTILINE)
    assert option in text

    again = admin(mediator, "register-vm", "--vm-name=user1")
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == "vgpu-admin: VM 'user1' is registered already; show-vm shows it\n"


def test_what_cannot_be_meant_ends_with_2(mediator: DeviceMediator) -> None:
    for words, message in [
        (["register-vm"], "--vm-name"),
        (["register-vm", "--vm-name=a/b"], "the VM's name is 'a/b', expected 1 to 63 of letters"),
        (
            ["register-vm", "--vm-name=x", "--bar1=100MiB"],
            "--bar1 is 100 MiB, expected a power of two from 16 MiB to 64 GiB",
        ),
        (["register-vm", "--vm-name=x", "--memory=much"], "'much' is no size; expected one like 256MiB"),
        (["register-vm", "--vm-name=x", "--watchdog=soon"], "'soon' is no time; expected one like 30s"),
        (["register-vm", "--vm-name=x", "--weight=0"], "--weight is 0, expected 1 to 1000"),
        (["kill-session", "one"], "'one' is no whole number"),
        (
            ["register-vm", "--vm-name=x", "--no-device", "--bar1=1GiB"],
            "--no-device registers it without one",
        ),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--bogus", "list-vms"], "unrecognized arguments: --bogus"),
        (["--bogus=1"], "unrecognized arguments: --bogus=1"),
        (["--run-dir"], "argument --run-dir: expected one argument"),
        (["no-such-command"], "invalid choice"),
        ([], "COMMAND"),
    ]:
        done = admin(mediator, *words)
        assert (done.returncode, done.stdout) == (2, ""), words
        assert message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    assert "x" not in [vm["name"] for vm in mediator.ask("vms")]


def test_what_cannot_be_done_ends_with_1(mediator: DeviceMediator) -> None:
    for words, message in [
        (["show-vm", "--vm-name=nobody"], "no VM 'nobody'; vgpu-admin list-vms"),
        (["unregister-vm", "--vm-name=nobody"], "no VM 'nobody' is registered"),
        (["kill-session", "999"], "no session 999 lives"),
    ]:
        done = admin(mediator, *words)
        assert (done.returncode, done.stdout) == (1, ""), words
        assert message in done.stderr, done.stderr


def test_listings(mediator: DeviceMediator) -> None:
    admin(mediator, "register-vm", "--vm-name=listed", "--bus=pcie", "--kernel-addr=0x3", "--bar1=16MiB")
    admin(mediator, "register-vm", "--vm-name=limits", "--no-device", "--weight=80")
    table = admin(mediator, "list-vms").stdout.splitlines()
    assert table[0].split() == ["VM", "POOL", "PRIORITY", "WEIGHT", "MEMORY", "SESSIONS", "DEVICE", "STATE"]
    assert ["limits", "default", "medium", "80", "all", "0", "-", "-"] in [line.split() for line in table]
    assert any(line.startswith("listed ") and line.endswith("waits for QEMU  -") for line in table)
    listed = {entry["vm"]["name"]: entry for entry in answer(mediator, "list-vms")}
    assert listed["limits"]["device"] is None
    assert listed["listed"]["device"]["bar1_bytes"] == 16 << 20
    assert answer(mediator, "list-sessions") == []
    assert admin(mediator, "list-sessions").stdout.startswith("SESSION  VM")
    assert answer(mediator, "show-faults") == []
    health = answer(mediator, "show-health")
    assert (health["ok"], health["gpu"], health["vm_devices_down"]) == (True, "software", [])
    assert re.search(r"^ok +yes$", admin(mediator, "show-health").stdout, re.MULTILINE)
    tree = admin(mediator, "tree").stdout
    assert re.search(r"^  devices +Supervisor +running +0", tree, re.MULTILINE)
    assert re.search(r"^    listed +Device +running +0", tree, re.MULTILINE)
    assert completions(
        ADMIN, "vgpu-admin show-vm --vm-name l", VGPU_RUN_DIR=str(mediator.run_dir)
    ) == ["limits", "listed"]  # fmt: skip
    done = admin(mediator, "unregister-vm", "--vm-name=listed")
    assert (done.returncode, done.stdout) == (0, "VM listed is not registered any more\n")
    assert "listed" not in admin(mediator, "list-vms").stdout


# -- without one


def test_sessions_that_live_are_completed(mediator: DeviceMediator, monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"vgpu-admin --run-dir {mediator.run_dir} kill-session "
    assert [word for word in completions(ADMIN, line) if not word.startswith("-")] == []
    sessions = [{"info": {"session": 12}, "ended": ""}, {"info": {"session": 13}, "ended": "killed"}]
    monkeypatch.setattr(AdminClient, "ask", lambda self, method: sessions)
    assert live_sessions(Namespace(run_dir=mediator.run_dir)) == ["12"]


def test_as_a_process(mediator: DeviceMediator) -> None:
    done = command(ADMIN, "show-health", "--json", VGPU_RUN_DIR=str(mediator.run_dir))
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["ok"] is True


def test_without_a_mediator(tmp_path: Path) -> None:
    done = command(ADMIN, "list-vms", "--run-dir", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"vgpu-admin: no mediator at {tmp_path}; start run-mediator,"
        " or say where it is with --run-dir or VGPU_RUN_DIR\n"
    )


def test_a_mediator_that_ends_in_mid_answer() -> None:
    with tempfile.TemporaryDirectory(prefix="vgpu-", dir="/tmp") as name:
        folder = Path(name)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(folder / "admin.sock"))
            listener.listen()

            def serve() -> None:
                link, _ = listener.accept()
                link.recv(1000)
                link.send(b'{"jsonrpc":')
                link.close()

            thread = threading.Thread(target=serve)
            thread.start()
            with (
                AdminClient(folder) as client,
                pytest.raises(NoMediator, match="ended before it had answered"),
            ):
                client.ask("health")
            thread.join()


def test_words_about_itself() -> None:
    done = command(ADMIN, "--version")
    assert (done.returncode, done.stdout) == (0, f"vgpu-admin {__version__}\n")
    done = command(ADMIN, "--help")
    assert done.returncode == 0
    assert len(re.findall(r"^  vgpu-admin ", done.stdout, re.MULTILINE)) >= 2
    for name in (
        "register-vm",
        "unregister-vm",
        "list-vms",
        "show-vm",
        "list-sessions",
        "kill-session",
        "show-health",
    ):
        assert re.search(rf"^    {name} +\w+", done.stdout, re.MULTILINE), name
    done = command(ADMIN, "register-vm", "--help")
    for option in (
        "--memory",
        "--rate",
        "--queue-depth",
        "--watchdog",
        "--bar1",
        "--slots",
        "--bus",
        "--kernel-addr",
    ):
        assert re.search(rf"^  {option} \S+\s+\w+", done.stdout, re.MULTILINE), option
    assert "complete " in command(ADMIN, "--print-completion", "bash").stdout
    assert {"list-vms", "list-pools", "list-sessions"} <= set(completions(ADMIN, "vgpu-admin list-"))
    assert completions(ADMIN, "vgpu-admin register-vm --bus p") == ["pci", "pcie"]


# -- recipes and units


def test_a_recipe_for_a_root_port() -> None:
    words = qemu_arguments("/run/it's.sock", "express", "0x1c")
    assert words[:2] == ["-device", "pcie-root-port,id=vgpu0-port,bus=pcie.0,addr=0x1c,chassis=28"]
    assert json.loads(words[3])["bus"] == "vgpu0-port"
    assert "addr" not in json.loads(words[3])
    assert shlex.split(qemu_text(words).replace("\\\n", "")) == words
    domain = ElementTree.fromstring(libvirt_text(words))
    values = [
        a.get("value") for a in domain.findall(f"{{{QEMU_NAMESPACE}}}commandline/{{{QEMU_NAMESPACE}}}arg")
    ]
    assert values == words


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("5", 5), ("256MiB", 256 << 20), ("1.5 GiB", 3 << 29), ("20g", 20 << 30), ("1GB", 10**9), ("2TiB", 2 << 40)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 PiB", "1.5", "0x10", "1e3", "\u0661"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is no size; expected one like"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30.0), ("500ms", 0.5), ("2m", 120.0), ("1h", 3600.0), ("7", 7.0)]
)
def test_times(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds
    with pytest.raises(ValueError, match="is no time"):
        parse_seconds(f"{text}x")


def test_what_people_read() -> None:
    assert [show_size(n) for n in (0, 1023, 1024, 3 << 29, 20 << 30)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "1.5 GiB",
        "20 GiB",
    ]
    assert [show_seconds(s) for s in (0.04, 59.9, 61, 7500)] == ["0.0s", "59.9s", "1m01s", "2h05m"]
    assert show_table(("A", "NUMBER"), [("x", 5), ("longer", 1234567)]) == (
        "A        NUMBER\nx             5\nlonger  1234567"
    )
    assert show_table(("A", "B"), []) == "A  B"


# -- limits of VMs, and pools


def test_limits_are_set_and_shown(mediator: DeviceMediator) -> None:
    assert answer(mediator, "register-vm", "--vm-name=bounded", "--no-device")["vm"]["rate"] == 0
    changes: list[tuple[list[str], dict[str, object]]] = [
        (["set-rate-limit", "--rate=200", "--queue-depth=100"], {"rate": 200, "queue_depth": 100}),
        (["set-rate-limit", "--bytes-per-second=1GiB"], {"rate": 200, "bytes_per_second": 1 << 30}),
        (["set-memory", "--memory=64MiB"], {"memory_limit_bytes": 64 << 20}),
        (["set-weight", "--weight=80"], {"weight": 80}),
        (["set-priority", "--priority=low"], {"priority": "low"}),
        (["set-watchdog", "--watchdog=90s"], {"watchdog_seconds": 90.0}),
        (["set-limits", "--max-sessions=3", "--max-arena=1GiB"], {"session_limit": 3, "module_limit": 65536}),
    ]
    for words, expected in changes:
        vm = answer(mediator, words[0], "--vm-name=bounded", *words[1:])
        assert {name: vm[name] for name in expected} == expected
    done = admin(mediator, "set-limits", "--vm-name=bounded", "--max-modules=100", "--max-handles=0")
    assert done.stdout == (
        "VM bounded: pool default, priority low, weight 80, memory 64 MiB, 200 calls a second, queue depth 100,"
        " 1 GiB copied a second, sessions 3, arena 1 GiB, modules 100, handles any\n"
    )
    text = admin(mediator, "show-vm", "--vm-name=bounded").stdout
    for line in (
        "rate +200 calls a second",
        "queue depth +100",
        "copies +1 GiB a second",
        "watchdog +1m30s",
        "memory +64 MiB",
        "sessions +0 of 3",
        "arena +1 GiB",
        "modules +100",
        "handles +no limit",
        "held back +0 times, 0.0s",
        "refused +0 times for want of room",
    ):
        assert re.search(f"^{line}$", text, re.MULTILINE), (line, text)
    for words, status, message in [
        (["set-rate-limit"], 2, "nothing to change was named"),
        (["set-limits"], 2, "nothing to change was named"),
        (["set-rate-limit", "--rate=-1"], 2, "--rate is -1"),
        (["set-rate-limit", "--rate=many"], 2, "'many' is no whole number"),
        (["set-watchdog"], 2, "--watchdog"),
        (
            ["set-watchdog", "--watchdog=0"],
            2,
            "--watchdog is 0 s, expected more than 0 and at most a day",
        ),
        (["set-watchdog", "--watchdog=soon"], 2, "'soon' is no time; expected one like 30s"),
        (["set-memory", "--memory=64GiB"], 1, "cannot be promised 65536 MiB of GPU memory"),
        (["set-pool", "--pool=nowhere"], 1, "no pool 'nowhere'; create-pool makes one"),
    ]:
        done = admin(mediator, words[0], "--vm-name=bounded", *words[1:])
        assert done.returncode == status, (words, done)
        assert message in done.stderr


def test_pools_are_made_listed_and_weighed(mediator: DeviceMediator) -> None:
    assert answer(mediator, "create-pool", "--pool=night", "--weight=20") == {"name": "night", "weight": 20}
    assert answer(mediator, "set-pool-weight", "--pool=night", "--weight=30")["weight"] == 30
    answer(mediator, "register-vm", "--vm-name=owl", "--no-device")
    assert answer(mediator, "set-pool", "--vm-name=owl", "--pool=night")["pool"] == "night"
    (night,) = [pool for pool in answer(mediator, "list-pools") if pool["name"] == "night"]
    assert night == {"name": "night", "weight": 30, "vms": ["owl"]}
    assert re.search(r"^night +30 +owl$", admin(mediator, "list-pools").stdout, re.MULTILINE)
    again = admin(mediator, "create-pool", "--pool=night")
    assert (again.returncode, "is there already" in again.stderr) == (1, True)


def test_a_pool_is_deleted_when_nobody_is_in_it(mediator: DeviceMediator) -> None:
    admin(mediator, "register-vm", "--vm-name=swimmer", "--no-device", "--pool=deep")
    for words, message in [
        (["--pool=deep"], "pool 'deep' has VMs in it (swimmer); set-pool moves them"),
        (["--pool=default"], "pool 'default' is where VMs are that nobody put into another; it stays"),
        (["--pool=dry"], "no pool 'dry'; list-pools has those there are"),
    ]:
        done = admin(mediator, "delete-pool", *words)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", f"vgpu-admin: {message}\n")
    bad = admin(mediator, "delete-pool", "--pool=a/b")
    assert (bad.returncode, bad.stdout) == (2, "")
    admin(mediator, "unregister-vm", "--vm-name=swimmer")
    done = admin(mediator, "delete-pool", "--pool=deep")
    assert (done.returncode, done.stdout) == (0, "pool deep is not there any more\n")
    assert "deep" not in [pool["name"] for pool in mediator.ask("pools")]
    line = f"vgpu-admin --run-dir {mediator.run_dir} delete-pool --pool "
    assert "default" in completions(ADMIN, line)
    for start in "register-vm --vm-name x", "set-pool --vm-name x":
        line = f"vgpu-admin --run-dir {mediator.run_dir} {start} --pool d"
        assert completions(ADMIN, line) == ["default"]
    again = admin(mediator, "register-vm", "--vm-name=swimmer", "--no-device", "--pool=deep")
    assert again.returncode == 0
    assert "deep" in [pool["name"] for pool in mediator.ask("pools")]
