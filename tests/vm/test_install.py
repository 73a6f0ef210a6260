# SPDX-License-Identifier: Apache-2.0
"""The project's installer in a real guest: what it puts there works, says what is wrong, and goes away without a trace."""

from __future__ import annotations

import pytest

from tests.vm.guest import INSTALLER, LIBRARIES, GuestMachine
from tests.vm.machine import Machine

pytestmark = pytest.mark.vm

# Everything a change to the system could touch, by name, size and kind; not contents of folders that live.
LISTING = (
    "find /usr/lib/vgpu /usr/bin /usr/lib/udev /etc /var/lib/vgpu-guest /dev/nvidia* "
    "! -name ld.so.cache ! -type d -printf '%p %s %y %l\\n' 2>/dev/null | sort"
)


def findings(text: str) -> dict[str, list[str]]:
    """Lines of ``vgpu-guest check`` by their first word."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        found.setdefault(word, []).append(rest.strip())
    return found


def test_check_finds_nothing_broken(alpha: GuestMachine) -> None:
    result = alpha.run(["vgpu-guest", "check"])
    found = findings(result.stdout)
    assert "FAIL" not in found, result.stdout
    passed = "\n".join(found["OK"])
    for subject in ("device:", "permission:", "host:", "agent:", "loader:", "CUDA:", "NVML:", "nvidia-smi:"):
        assert subject in passed, result.stdout


def test_what_software_looks_for_is_there(alpha: GuestMachine) -> None:
    """The checklist of a deployment: nodes, and whose the libraries are that the loader finds."""
    alpha.run("test -c /dev/nvidia0 && test -c /dev/nvidiactl && test -c /dev/nvidia-uvm")
    listing = alpha.run("ldconfig -p").stdout
    for library in ("libcuda.so.1", "libnvidia-ml.so.1"):
        first = next(line for line in listing.splitlines() if line.strip().startswith(library))
        assert first.endswith(f"=> {LIBRARIES}/{library}")


def test_check_names_the_absent_mediator(bare_machine: Machine) -> None:
    """A VM whose host has no mediator: installed all the same, and told so."""
    before = bare_machine.run(LISTING).stdout
    bare_machine.run(["/bin/sh", INSTALLER, "install"])
    result = bare_machine.run(["vgpu-guest", "check"], check=False)
    assert result.status == 1
    assert any(line.startswith("host:") for line in findings(result.stdout)["FAIL"]), result.stdout
    bare_machine.run(["vgpu-guest", "uninstall"])
    assert bare_machine.run(LISTING).stdout == before


def test_uninstalled_and_installed_again(alpha: GuestMachine) -> None:
    installed = alpha.run(LISTING).stdout
    alpha.run(["vgpu-guest", "uninstall"])
    assert "libcuda.so.1" not in alpha.run("ldconfig -p").stdout
    assert alpha.run("ls /usr/lib/vgpu /dev/nvidia0 /usr/bin/vgpu-guest", check=False).stdout == ""
    alpha.install()
    assert alpha.run(LISTING).stdout == installed
