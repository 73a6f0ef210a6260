# SPDX-License-Identifier: Apache-2.0
"""The call table's parser: what it takes, and that what it does not take is named by its line."""

from __future__ import annotations

import pytest

from vgpu.transport.calls._table import HANDLES, SCALARS, Parameter, TableError, WireCall, load, parse

GOOD = "cuGood cuGood@2000 reply gen gen a:u32\n"


def test_a_row() -> None:
    (row,) = parse("cuA_v2  cuA@3020/ptsz@7000  async  gen  vt  s:h.stream v:out.u64 b:in.8  # why\n").rows
    assert (row.symbol, row.base, row.since, row.kind, row.shim, row.host) == (
        "cuA_v2", "cuA", 3020, "async", "gen", "vt",
    )  # fmt: skip
    assert row.twin == ("ptsz", 7000)
    assert row.parameters == (Parameter("s", "h.stream"), Parameter("v", "out.u64"), Parameter("b", "in.8"))


def test_a_row_without_twin_or_parameters() -> None:
    (row,) = parse("cuA cuA@2000 fence hand vt").rows
    assert (row.twin, row.parameters) == (None, ())


def test_a_refused_row_has_neither_side() -> None:
    (row,) = parse("cuA cuA@2000/ptds@7000 refused").rows
    assert (row.shim, row.host, row.parameters, row.twin) == ("-", "-", (), ("ptds", 7000))


def test_wire_records() -> None:
    table = parse("wirePad async a=- p=bytes\nwireOne reply a=x,y\n")
    assert table.rows == ()
    assert table.wire == (
        WireCall("wirePad", "async", "-", "bytes"),
        WireCall("wireOne", "reply", "x,y", "-"),
    )


def test_comments_and_empty_lines_are_nothing() -> None:
    assert parse("# cuA cuA@1 reply\n\n   \n").rows == ()


@pytest.mark.parametrize(
    "kind", [*SCALARS, *(f"out.{s}" for s in SCALARS), "dev", "ptr", "cptr", "cstr", "in.16"]
)
def test_plain_types(kind: str) -> None:
    assert parse(f"cuA cuA@1 reply hand vt p:{kind}").rows[0].parameters == (Parameter("p", kind),)


@pytest.mark.parametrize("handle", HANDLES)
def test_handle_types(handle: str) -> None:
    row = parse(f"cuA cuA@1 reply hand vt p:h.{handle} q:out.h.{handle}").rows[0]
    assert [p.type for p in row.parameters] == [f"h.{handle}", f"out.h.{handle}"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("cuA", "expected symbol"),
        ("cuA cuA@2000", "expected symbol"),
        ("cuA cuA reply gen gen", "version"),
        ("cuA cuA@new reply gen gen", "version"),
        ("cuA @2000 reply gen gen", "name"),
        ("cuA cuA@2000 sometimes gen gen", "kind"),
        ("cuA cuA@2000/ptsx@7000 reply gen gen", "twin"),
        ("cuA cuA@2000/ptsz reply gen gen", "twin"),
        ("cuA cuA@2000/ptsz@x reply gen gen", "twin"),
        ("cuA cuA@2000 reply made gen", "shim must be"),
        ("cuA cuA@2000 reply gen hand", "host"),
        ("cuA cuA@2000 reply gen gen a", "parameter"),
        ("cuA cuA@2000 reply gen gen :u32", "parameter"),
        ("cuA cuA@2000 reply gen gen 1a:u32", "parameter"),
        ("cuA cuA@2000 reply gen gen a:u33", "known type"),
        ("cuA cuA@2000 reply gen gen a:h.gpu", "known type"),
        ("cuA cuA@2000 reply gen gen a:out.ptr", "known type"),
        ("cuA cuA@2000 reply gen gen a:out.in.4", "known type"),
        ("cuA cuA@2000 reply gen gen a:in.many", "known type"),
        ("wireA", "expected wireA"),
        ("wireA reply", "expected wireA"),
        ("wireA local a=-", "expected wireA"),
        ("wireA reply x=-", "expected wireA"),
        ("wireA reply a=- q=-", "expected wireA"),
        ("wireA reply a=- p=- more", "expected wireA"),
        ("cuGood cuGood@3000 reply gen gen", "stands twice"),
    ],
)
def test_a_malformed_line_is_named(line: str, complaint: str) -> None:
    with pytest.raises(TableError, match=rf"^line 4: .*{complaint}"):
        parse(f"# a comment\n{GOOD}\n{line}\ncuLast cuLast@1 reply gen gen\n")


@pytest.mark.parametrize("order", [1, -1])
def test_a_twin_that_is_also_a_row_is_refused(order: int) -> None:
    lines = ["cuA cuA@2000/ptsz@7000 reply gen gen", "cuA_ptsz cuB@7000 reply gen gen"][::order]
    with pytest.raises(TableError, match=r"^line 2: cuA_ptsz stands twice"):
        parse("\n".join(lines))


def test_the_projects_own_table() -> None:
    table = load()
    assert table.wire[0].name == "wirePad"
    symbols = [row.symbol for row in table.rows]
    assert {"cuInit", "cuLaunchKernel", "cuMemcpyHtoD_v2", "cuGetProcAddress_v2"} <= set(symbols)
    assert len(symbols) == len(set(symbols))
    # One ABI per base name and first version, or cuGetProcAddress could not choose.
    assert len({(row.base, row.since) for row in table.rows}) == len(table.rows)
