# SPDX-License-Identifier: Apache-2.0
"""The library exports what the table says, and nothing that the table calls built is still a refusing stand-in."""

from __future__ import annotations

import subprocess

from vgpu.shim.locate import LIBRARY, library_directory
from vgpu.transport.calls._table import load


def exported() -> dict[str, str]:
    """Exported symbol -> its letter in nm's listing (T strong, W weak)."""
    listing = subprocess.check_output(
        ["nm", "-D", "--defined-only", library_directory() / LIBRARY], text=True
    )
    return {name: letter for _, letter, name in (line.split() for line in listing.splitlines())}


def test_every_symbol_of_the_table_is_exported_and_no_other() -> None:
    wanted = set()
    for row in load().rows:
        wanted.add(row.symbol)
        if row.twin:
            wanted.add(f"{row.symbol}_{row.twin[0]}")
    assert set(exported()) == wanted


def test_what_the_table_calls_built_is_built() -> None:
    symbols = exported()
    stand_ins = [r.symbol for r in load().rows if r.kind != "refused" and symbols[r.symbol] == "W"]
    assert stand_ins == []
