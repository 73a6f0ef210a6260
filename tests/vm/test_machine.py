# SPDX-License-Identifier: Apache-2.0
"""The machine itself: it boots, runs commands as asked, and starts anew."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest

from tests.vm.machine import SHARE, Machine

pytestmark = pytest.mark.vm


def test_it_is_another_kernel_on_this_file_tree(bare_machine: Machine) -> None:
    released, host = bare_machine.run("uname -r; hostname").lines
    assert (released.endswith("-amd64"), host) == (True, "bare")
    assert bare_machine.run(["/usr/bin/env", sys.executable, "-c", "print(6 * 7)"]).lines == ["42"]


def test_writes_stay_in_it(bare_machine: Machine) -> None:
    assert bare_machine.run("echo here >/etc/vgpu-test-file; cat /etc/vgpu-test-file").lines == ["here"]
    assert not Path("/etc/vgpu-test-file").exists()


def test_files_cross_the_share(bare_machine: Machine) -> None:
    (bare_machine.share / "in").write_text("from the host")
    bare_machine.run(f"tr a-z A-Z <{SHARE}/in >{SHARE}/out")
    assert (bare_machine.share / "out").read_text() == "FROM THE HOST"


def test_status_and_both_streams_are_told(bare_machine: Machine) -> None:
    result = bare_machine.run("echo out; echo err >&2; exit 7", check=False)
    assert (result.status, result.stdout, result.stderr) == (7, "out\n", "err\n")
    missing = bare_machine.run(["/no/such/program"], check=False)
    assert missing.status == 127
    assert "No such file" in missing.stderr


def test_a_large_output_arrives_whole(bare_machine: Machine) -> None:
    assert len(bare_machine.run("head -c 3000000 /dev/zero | tr '\\0' x").stdout) == 3000000


def test_several_commands_run_at_once(bare_machine: Machine) -> None:
    waiting = bare_machine.spawn("read line; echo got $line")
    assert bare_machine.run("echo meanwhile").lines == ["meanwhile"]
    waiting.say("it")
    assert waiting.line() == "got it"
    assert waiting.wait().status == 0


def test_a_command_is_killed_with_its_children(bare_machine: Machine) -> None:
    process = bare_machine.spawn("sleep 1000 & echo $!; wait")
    child = process.line()
    process.kill()
    assert process.status == -signal.SIGKILL
    # Killed with the shell, and then to be waited for by somebody.
    gone = f"for i in $(seq 300); do [ -e /proc/{child} ] || exit 0; sleep 0.1; done; exit 1"
    assert bare_machine.run(gone, check=False).status == 0


def test_a_command_runs_as_another_user(bare_machine: Machine) -> None:
    assert bare_machine.run("id -u; id -G", user=12345, groups=[777]).lines == ["12345", "12345 777"]


def test_a_silent_command_is_an_error(bare_machine: Machine) -> None:
    process = bare_machine.spawn("sleep 1000")
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"not so within 0\.5 s"):
        process.line(0.5)
    assert time.monotonic() - began < 60
    process.kill()


def test_a_reboot_forgets_everything(bare_machine: Machine) -> None:
    lost = bare_machine.spawn("touch /etc/vgpu-test-file; echo done; sleep 1000")
    assert lost.line() == "done"
    bare_machine.reboot()
    assert lost.wait(1).status != 0
    assert bare_machine.run("test -e /etc/vgpu-test-file", check=False).status == 1
