# SPDX-License-Identifier: Apache-2.0
"""Large modules: kernels' bodies are stepped over when the module is read, and read when the kernel is asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgpu.gpu.software.memory import AddressSpace
from vgpu.gpu.software.ptx import PtxError, bodies, load_ptx
from vgpu.gpu.software.ptx.layout import function_addresses

HEADER = ".version 8.0\n.target sm_120\n.address_size 64\n"
STORE = """{{
    // a brace in a comment: }} and /* another: }}
    .reg .b64 %rd<2>; .reg .b32 %r<2>;
    .local .align 4 .b8 stack[20];
    ld.param.u64 %rd1, [{name}_0];
    {{ .reg .b32 %nested; mov.b32 %nested, {value}; mov.b32 %r1, %nested; }}
    st.global.u32 [%rd1], %r1;
    ret;
}}
"""


def entry(name: str, value: int, body: str = STORE) -> str:
    return f".visible .entry {name}(.param .u64 {name}_0)\n.maxntid 64, 1, 1\n" + body.format(
        name=name, value=value
    )


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "LARGE", 0)


def run(text: str, name: str) -> int:
    space = AddressSpace(1 << 20)
    out = space.allocate(4)
    load_ptx(text).instantiate(space).launch(name, (1, 1, 1), (1, 1, 1), params=out.to_bytes(8, "little"))
    return int(np.frombuffer(space.read(out, 4), np.uint32)[0])


def test_bodies_are_read_when_they_are_asked_for() -> None:
    commented = "// .entry gone() { \n/* .entry gone() { } */\n"
    module = load_ptx(HEADER + commented + entry("one", 1) + commented + entry("two", 2))
    one, two = module.kernels["one"], module.kernels["two"]
    assert (one.max_threads, one.params_size) == (64, 8)
    assert one.function.deferred is not None
    assert two.function.deferred is not None
    assert two.local_size == 32
    assert two.function.deferred is None
    assert one.function.deferred is not None


@pytest.mark.parametrize(("name", "value"), [("one", 1), ("two", 2)])
def test_they_run(name: str, value: int) -> None:
    assert run(HEADER + entry("one", 1) + entry("two", 2), name) == value


def test_a_malformed_body_is_refused_at_every_look_and_alone() -> None:
    text = (
        HEADER + entry("good", 7) + entry("bad", 1, "{{\n    .reg .b32 %r<2>;\n    mov.b32 %r1, %r9;\n}}\n")
    )
    module = load_ptx(text)
    line = text[: text.index("%r9")].count("\n") + 1
    for _ in range(2):
        with pytest.raises(PtxError, match="%r9 is not declared") as refused:
            module.kernels["bad"].compiled()
        assert str(line) in str(refused.value)
    assert run(text, "good") == 7


def test_a_body_without_an_end_is_refused() -> None:
    with pytest.raises(PtxError, match="end of text"):
        load_ptx(HEADER + entry("one", 1)[:-3])


def test_functions_whose_address_an_unread_body_takes_are_found() -> None:
    function = ".func (.param .b32 r) {name}(.param .b32 a)\n{{ ret; }}\n"
    taking = "{{ .reg .b64 %rd<2>; mov.u64 %rd1, taken; ret; }}\n"
    text = HEADER + "".join(function.format(name=n) for n in ("unused", "taken"))
    module = load_ptx(text + entry("one", 1) + entry("taker", 1, taking))
    assert list(function_addresses(module.source)) == ["taken"]
    assert module.kernels["one"].function.deferred is not None


@given(st.text(alphabet='{};"/*\n\\ a.', max_size=60))
def test_whatever_stands_in_a_body_it_ends_within_the_text(inside: str) -> None:
    text = HEADER + ".entry k()\n{" + inside + "}\n"
    for start, end in bodies.entry_bodies(text).items():
        assert text[start] == "{"
        assert text[end - 1] == "}"
        assert start < end <= len(text)
