# SPDX-License-Identifier: Apache-2.0
"""docs/vm/ shows what ``vgpu-admin`` prints, and its links lead somewhere."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

from vgpu.vm_recipes import qemu_arguments

DOCS = Path(__file__).resolve().parents[2] / "docs" / "vm"
SOCKET = "/var/vgpu/vfio-user/red.sock"


@pytest.mark.parametrize(("variant", "address"), [("conventional", "0x5"), ("express", "0x5")])
def test_qemus_options_are_those_that_are_printed(variant: str, address: str) -> None:
    text = (DOCS / "qemu.md").read_text()
    for word in qemu_arguments(SOCKET, variant, address)[1::2]:
        assert f"-device '{word}'" in text or f"-device {word} " in text


def test_libvirts_arguments_are_those_that_are_printed() -> None:
    shown = re.findall(r"<qemu:arg value='(.*)'/>", (DOCS / "libvirt.md").read_text())
    assert [html.unescape(word) for word in shown] == qemu_arguments(SOCKET, "express", "0x10")


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target
