# SPDX-License-Identifier: Apache-2.0
"""Every row of the instruction table on the executor, against exact arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from vgpu.gpu.software.ptx import load_ptx

from .conftest import Harness
from .instruction_table import ROWS, Row, agrees, kernel_text, operand_bits

HEADER = ".version 8.4\n.target sm_90\n.address_size 64\n"


@pytest.mark.parametrize("number", range(len(ROWS)), ids=[row.text for row in ROWS])
def test_instruction(harness: Harness, number: int) -> None:
    row: Row = ROWS[number]
    harness.load(HEADER + kernel_text(row, number))
    bits = operand_bits(row, number)
    out = np.zeros(row.lanes, np.uint64)
    source, target = harness.upload(bits), harness.upload(out)
    harness.launch(f"row{number}", -(-row.lanes // 96), 96, target, source, np.uint32(row.lanes))
    results = harness.download(target, out)
    wrong = [
        (operands, hex(got))
        for operands, got in zip(bits.tolist(), results.tolist(), strict=True)
        if not agrees(row, got, operands)
    ]
    assert not wrong, f"{len(wrong)} of {row.lanes}: {[([hex(o) for o in w[0]], w[1]) for w in wrong[:4]]}"


def test_the_whole_table_is_one_module() -> None:
    text = HEADER + "\n".join(kernel_text(row, number) for number, row in enumerate(ROWS))
    assert len(load_ptx(text).kernels) == len(ROWS)
