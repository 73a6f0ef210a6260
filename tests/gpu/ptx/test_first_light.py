# SPDX-License-Identifier: Apache-2.0
"""The smallest whole path: a vector add, as nvcc writes it, on the executor."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vgpu.gpu.software.memory import AddressError, AddressSpace, IllegalAddress
from vgpu.gpu.software.ptx import LaunchError, LaunchInterrupted, PtxError, UnsupportedPtx, load_ptx
from vgpu.gpu.software.ptx.lexer import Lines, tokenize

from .conftest import Harness

PREFIX = ".version 8.0\n.target sm_75\n.address_size 64\n"
VECTOR_ADD = """
.version 8.0
.target sm_75
.address_size 64
.visible .entry vadd(
    .param .u64 vadd_param_0, .param .u64 vadd_param_1, .param .u64 vadd_param_2, .param .u32 vadd_param_3)
{
    .reg .pred %p<2>;
    .reg .f32 %f<4>;
    .reg .b32 %r<6>;
    .reg .b64 %rd<11>;
    ld.param.u64 %rd1, [vadd_param_0];
    ld.param.u64 %rd2, [vadd_param_1];
    ld.param.u64 %rd3, [vadd_param_2];
    ld.param.u32 %r2, [vadd_param_3];
    mov.u32 %r3, %ctaid.x;
    mov.u32 %r4, %ntid.x;
    mov.u32 %r5, %tid.x;
    mad.lo.s32 %r1, %r3, %r4, %r5;
    setp.ge.s32 %p1, %r1, %r2;
    @%p1 bra $L__BB0_2;
    cvta.to.global.u64 %rd4, %rd1;
    mul.wide.s32 %rd5, %r1, 4;
    add.s64 %rd6, %rd4, %rd5;
    cvta.to.global.u64 %rd7, %rd2;
    add.s64 %rd8, %rd7, %rd5;
    ld.global.f32 %f1, [%rd8];
    ld.global.f32 %f2, [%rd6];
    add.f32 %f3, %f2, %f1;
    cvta.to.global.u64 %rd9, %rd3;
    add.s64 %rd10, %rd9, %rd5;
    st.global.f32 [%rd10], %f3;
$L__BB0_2:
    ret;
}
"""


@pytest.mark.parametrize("count", [1, 255, 256, 257, 100_003])
def test_vector_add(harness: Harness, count: int) -> None:
    generator = np.random.default_rng(count)
    a, b = generator.random((2, count), dtype=np.float32)
    c = np.full(count + 8, -1, np.float32)
    harness.load(VECTOR_ADD)
    first, second, third = harness.upload(a), harness.upload(b), harness.upload(c)
    result = harness.launch("vadd", -(-count // 256), 256, first, second, third, np.int32(count))
    out = harness.download(third, c)
    np.testing.assert_array_equal(out[:count], a + b)
    np.testing.assert_array_equal(out[count:], -1)
    assert result.threads == -(-count // 256) * 256


def test_kernel_description() -> None:
    kernel = load_ptx(VECTOR_ADD).kernels["vadd"]
    assert [(p.offset, p.size) for p in kernel.params] == [(0, 8), (8, 8), (16, 8), (24, 4)]
    assert (kernel.params_size, kernel.static_shared, kernel.max_threads, kernel.local_size) == (
        28,
        0,
        1024,
        0,
    )
    assert kernel.reqntid is None
    assert 16 <= kernel.registers <= 255


def test_out_of_range_is_illegal(harness: Harness) -> None:
    harness.load(VECTOR_ADD)
    pointer = harness.upload(np.zeros(1024, np.float32))
    with pytest.raises(IllegalAddress) as caught:
        harness.launch("vadd", 9, 256, pointer, pointer, pointer, np.int32(2304))
    assert caught.value.address == pointer + 4096
    assert not caught.value.is_write


def test_deadline_interrupts(harness: Harness) -> None:
    harness.load(
        ".version 8.0\n.target sm_75\n.address_size 64\n.visible .entry spin()\n{\n$top:\n bra $top;\n}\n"
    )
    asked = 0

    def deadline() -> bool:
        nonlocal asked
        asked += 1
        return asked > 10

    with pytest.raises(LaunchInterrupted):
        harness.launch("spin", 2, 64, deadline=deadline)


def test_unsupported_instruction_is_named(harness: Harness) -> None:
    harness.load(
        ".version 8.0\n.target sm_75\n.address_size 64\n"
        ".visible .entry good() { ret; }\n"
        ".visible .entry bad() { .reg .b32 %r<2>; frobnicate.warp.b32 %r1, 1; ret; }\n"
    )
    harness.launch("good", 1, 1)
    with pytest.raises(UnsupportedPtx) as caught:
        harness.launch("bad", 1, 1)
    assert caught.value.instruction == "frobnicate.warp.b32"
    assert caught.value.line == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "line 1"),
        (
            ".version 8.0\n.target sm_75\n.address_size 64\n.visible .entry f()\n{\n add.s32 %r1, %r2, 3;\n}",
            "line 6: register %r1",
        ),
        (
            ".version 8.0\n.target sm_75\n.address_size 64\n.visible .entry f()\n{\n bra $nowhere;\n}",
            r"label \$nowhere",
        ),
        (".version 8.0\n.target sm_75\n.address_size 64\n.visible .entry f()\n{\n ret;", "unexpected end"),
        (".version 8.0\n.target sm_75\n.address_size 32\n", "address_size 32"),
        (PREFIX + ".global .align 3 .b8 x[4];", "line 4: alignment 3"),
        (PREFIX + ".global .b8 x[9999999999999];", "line 4: x of 9999999999999 elements"),
        (PREFIX + ".global .b8 x = " + "9" * 5000 + ";", "line 4: a number of that length"),
        (PREFIX + ".global .b8 x[2] = " + "{" * 5000, "line 4: nested too deeply"),
        (PREFIX + ".visible .entry f() " + "{" * 5000, "line 4: nested too deeply"),
    ],
)
def test_bad_text_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        load_ptx(text)


WORDS = [token.text for token in tokenize(VECTOR_ADD, Lines(VECTOR_ADD))][:-1]
JUNK = [
    *"{}[];,@!|()_-",
    ".reg",
    ".b32",
    "%r1",
    "%p1",
    "0x7fffffffffffffff",
    "bar.sync",
    "call",
    "ld.param.v4.f32",
    "prmt.b32.x",
]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, len(WORDS) - 1), st.sampled_from(["", *JUNK, *WORDS])),
        min_size=1,
        max_size=4,
    )
)
def test_damaged_text_is_refused_not_crashed_on(damage: list[tuple[int, str]]) -> None:
    words = list(WORDS)
    for place, word in damage:
        words[place] = word
    space = AddressSpace(1 << 20)
    pointer = space.allocate(4096)
    asked = 0

    def deadline() -> bool:
        nonlocal asked
        asked += 1
        return asked > 20

    try:
        instance = load_ptx(" ".join(words)).instantiate(space)
        for name, kernel in instance.module.kernels.items():
            params = (pointer.to_bytes(8, "little") * 8)[: kernel.params_size]
            instance.launch(name, (2, 1, 1), (33, 1, 1), params=params, deadline=deadline)
    except (PtxError, UnsupportedPtx, LaunchError, AddressError):
        pass
