# SPDX-License-Identifier: Apache-2.0
"""vgpu-admin's commands about faults and quarantine, as people and programs meet them."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.e2e.vm_device import DeviceMediator
from tests.src.test_admin import admin, answer


@pytest.fixture(scope="module")
def mediator() -> Iterator[DeviceMediator]:
    with DeviceMediator() as running:
        for name in ("user1", "user2"):
            assert admin(running, "register-vm", f"--vm-name={name}", "--no-device").returncode == 0
        yield running


# -- set-quarantine-rule


def test_a_rule_is_kept_shown_and_taken_back(mediator: DeviceMediator) -> None:
    words = ("set-quarantine-rule", "--vm-name=user1")
    done = admin(mediator, *words, "--faults=5", "--within=90s")
    assert (done.returncode, done.stdout) == (0, "VM user1 is quarantined after 5 faults in 1m30s\n")
    assert mediator.ask("quarantine_rules") == {"user1": {"faults": 5, "seconds": 90.0}}
    assert answer(mediator, *words, "--faults=2") == {"vm": "user1", "rule": {"faults": 2, "seconds": 600.0}}
    done = admin(mediator, *words, "--faults=0")
    assert (done.returncode, done.stdout) == (0, "VM user1 is quarantined by an administrator only\n")
    done = admin(mediator, *words, "--default")
    assert (done.returncode, done.stdout) == (0, "VM user1 has the mediator's rule\n")
    assert mediator.ask("quarantine_rules") == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--faults=3", "--within=abc"], "argument --within: 'abc' is no time; expected one like 30s or 2m"),
        (["--faults=3", "--within="], "'' is no time"),
        (["--faults=3", "--within=0"], "seconds is 0.0, expected more than 0 and at most 30 days"),
        (["--faults=3", "--within=1000h"], "at most 30 days"),
        (["--faults=-1"], "faults is -1, expected 0 (never) to 1000"),
        (["--faults=many"], "'many' is no whole number"),
        (["--faults=1", "--default"], "not allowed with argument"),
        (["--default", "--within=5m"], "--within goes with --faults"),
        ([], "one of the arguments --faults --default is required"),
    ],
)
def test_a_rule_that_cannot_be_meant_ends_with_2(
    mediator: DeviceMediator, words: list[str], message: str
) -> None:
    done = admin(mediator, "set-quarantine-rule", "--vm-name=user1", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert mediator.ask("quarantine_rules") == {}


# -- names that nobody has


@pytest.mark.parametrize(
    "words", [["quarantine", "--reason=a slip"], ["set-quarantine-rule", "--faults=1"]], ids=lambda w: w[0]
)
def test_a_name_that_nobody_has_is_refused_unless_it_is_meant(
    mediator: DeviceMediator, words: list[str]
) -> None:
    done = admin(mediator, words[0], "--vm-name=usr1", *words[1:])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "vgpu-admin: VM 'usr1' has never been seen: names like it: user1, user2; --force does it all the same\n"
    )
    done = admin(mediator, words[0], "--vm-name=quite-different", *words[1:])
    assert "has never been seen: vgpu-admin list-vms has those there are" in done.stderr
    done = admin(mediator, words[0], "--vm-name=a/b", *words[1:])
    assert (done.returncode, "expected 1 to 63 of letters" in done.stderr) == (2, True)
    assert mediator.ask("quarantines") == []
    assert mediator.ask("quarantine_rules") == {}
    assert admin(mediator, words[0], f"--vm-name=later-{words[0]}", "--force", *words[1:]).returncode == 0
    # It has been heard of now.
    again = admin(mediator, words[0], f"--vm-name=later-{words[0]}", *words[1:])
    assert (again.returncode, again.stderr) == (0, "")
    undo = {
        "quarantine": ["clear-quarantine"],
        "set-quarantine-rule": ["set-quarantine-rule", "--default"],
    }[words[0]]
    assert admin(mediator, undo[0], f"--vm-name=later-{words[0]}", *undo[1:]).returncode == 0


# -- show-faults


def test_faults_that_are_not_there(mediator: DeviceMediator) -> None:
    for words, status, message in [
        (["--fault=77"], 1, "no fault 77 is kept; vgpu-admin show-faults has those there are"),
        (["--fault=77", "--vm-name=user1"], 1, "no fault 77 of VM user1 is kept"),
        (["--fault=0"], 2, "fault is 0, expected its number"),
        (["--fault=99999999999999999999"], 2, "expected its number"),
        (["--limit=0"], 2, "limit is 0, expected 1 to 1000"),
        (["--vm-name=usr1"], 1, "VM 'usr1' has no faults: names like it: user1, user2"),
        (["--vm-name="], 2, "the VM's name is '', expected 1 to 63"),
    ]:
        done = admin(mediator, "show-faults", *words)
        assert (done.returncode, done.stdout) == (status, ""), words
        assert message in done.stderr
    assert answer(mediator, "show-faults", "--vm-name=user1") == []


# -- a VM that is kept away


def test_a_quarantine_is_shown_with_the_vm_and_again_when_it_is_registered(mediator: DeviceMediator) -> None:
    assert admin(mediator, "register-vm", "--vm-name=miner", "--no-device").returncode == 0
    assert admin(mediator, "quarantine", "--vm-name=miner", "--reason=mines coins").returncode == 0
    words = r"quarantined by \S+ since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d: mines coins"
    listed = admin(mediator, "list-vms").stdout
    assert re.search(r"^miner .* quarantined$", listed, re.MULTILINE)
    assert re.search(rf"^miner: {words}$", listed, re.MULTILINE)
    assert re.search(r"^user1 .* -$", listed, re.MULTILINE)
    assert re.search(rf"^state +{words}$", admin(mediator, "show-vm", "--vm-name=miner").stdout, re.MULTILINE)
    assert answer(mediator, "show-vm", "--vm-name=miner")["quarantine"]["reason"] == "mines coins"
    assert answer(mediator, "show-vm", "--vm-name=user1")["quarantine"] is None
    assert admin(mediator, "unregister-vm", "--vm-name=miner").returncode == 0
    again = admin(mediator, "register-vm", "--vm-name=miner", "--no-device")
    assert again.returncode == 0
    assert re.search(rf"^It is still {words};$", again.stdout, re.MULTILINE)
    assert "vgpu-admin clear-quarantine --vm-name=miner lets it have the GPU" in again.stdout
    assert admin(mediator, "clear-quarantine", "--vm-name=miner").returncode == 0
    assert "quarantined" not in admin(mediator, "list-vms").stdout
    assert "quarantined" not in admin(mediator, "show-vm", "--vm-name=miner").stdout
    assert admin(mediator, "unregister-vm", "--vm-name=miner").returncode == 0
