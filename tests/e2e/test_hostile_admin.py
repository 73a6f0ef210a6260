# SPDX-License-Identifier: Apache-2.0
"""Nothing that is said on ``admin.sock`` ends an actor: each request is answered, and by the first life of the one asked."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.test_limits import change, refusal
from tests.e2e.vm_device import DeviceMediator

# Deep enough to be refused by the reader; and about as deep as it takes, and too deep for what comes behind it.
DEPTHS = (30_000, 995, 990, 980, 960, 940, 900, 800)
METHODS = (
    "kill_session",
    "register_vm",
    "unregister_vm",
    "change_vm",
    "create_pool",
    "set_pool_weight",
    "delete_pool",
    "faults",
    "quarantines",
    "quarantine",
    "clear_quarantine",
    "set_quarantine_rule",
    "trace.start",
    "trace.stop",
    "trace.fetch",
    "trace.activity",
)
KEYS = (
    "vm_name",
    "pool",
    "weight",
    "reason",
    "by",
    "limit",
    "session",
    "faults",
    "seconds",
    "rate",
    "address",
    "variant",
)
ODD: tuple[Any, ...] = ("\udcff", "x\n\x1b[31m", [], {}, [[]], {"a": []}, 1 << 70, -1, 1.5, True, None, "")


@pytest.fixture(scope="module")
def mediator() -> Iterator[DeviceMediator]:
    with DeviceMediator() as running:
        yield running


def restarts(actors: list[dict[str, Any]]) -> dict[str, int]:
    found = {}
    for actor in actors:
        found[actor["name"]] = actor["restarts"]
        found |= restarts(actor["children"])
    return found


@pytest.fixture(autouse=True)
def everybody_lives(mediator: DeviceMediator) -> Iterator[None]:
    yield
    assert set(restarts(mediator.ask("tree")).values()) == {0}
    assert mediator.ask("health")["ok"]


def say(mediator: DeviceMediator, line: bytes) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(60)
        link.connect(str(mediator.run_dir / "admin.sock"))
        link.sendall(line + b"\n")
        answer: dict[str, Any] = json.loads(link.makefile("rb").readline())
        return answer


@pytest.mark.parametrize("depth", DEPTHS)
def test_deep_json(mediator: DeviceMediator, depth: int) -> None:
    deep = b"[" * depth + b"]" * depth
    for line in (
        b"[" * depth,
        deep,
        b'{"method": "health", "id": ' + deep + b"}",
        b'{"method": ' + deep + b', "id": 1}',
        b'{"method": "unregister_vm", "id": 1, "params": {"vm_name": ' + deep + b"}}",
        b'{"method": "register_vm", "id": 1, "params": {"vm_name": "a", "weight": ' + deep + b"}}",
        b'{"method": "quarantine", "id": 1, "params": {"vm_name": "a", "reason": ' + deep + b"}}",
    ):
        answer = say(mediator, line)
        assert answer["error"]["code"] in (-32600, -32602), answer


def test_odd_values_everywhere(mediator: DeviceMediator) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(60)
        link.connect(str(mediator.run_dir / "admin.sock"))
        answers = link.makefile("rb")
        for method in METHODS:
            for key in KEYS:
                for value in ODD:
                    parameters = {"vm_name": "odd", "pool": "odd", "reason": "odd", key: value}
                    if method == "faults":
                        parameters = {key: value}
                    request = {"jsonrpc": "2.0", "id": 7, "method": method, "params": parameters}
                    link.sendall(json.dumps(request).encode() + b"\n")
                    answer = json.loads(answers.readline())
                    assert answer["id"] == 7
                    assert ("result" in answer) is not ("error" in answer)
    assert all(vm["name"].isprintable() for vm in mediator.ask("vms"))


@pytest.mark.parametrize("reason", ["\udcff", "a\nb", "a\x1b[31mb", "", "x" * 501, "\u202e", 7, None])
def test_a_reason_is_a_printable_line(mediator: DeviceMediator, reason: Any) -> None:
    why = refusal(mediator, "quarantine", vm_name="kept", reason=reason)
    assert "expected 1 to 500 printable characters, on one line" in why
    assert why.isprintable()
    assert "kept" not in [record["vm"] for record in mediator.ask("quarantines")]


def test_a_reason_out_of_a_shell(mediator: DeviceMediator) -> None:
    change(mediator, "register_vm", vm_name="shell")
    words = [sys.executable, "-P", "-m", "vgpu.admin_main", "--run-dir", str(mediator.run_dir)]
    done = subprocess.run(
        [*words, "quarantine", "--vm-name=shell", b"--reason=\xff"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "printable" in done.stderr
    assert "Traceback" not in done.stderr
    change(mediator, "quarantine", vm_name="shell", reason="größe: ☃ is fine", by="me")
    (record,) = [r for r in mediator.ask("quarantines") if r["vm"] == "shell"]
    assert record["reason"] == "größe: ☃ is fine"
