# SPDX-License-Identifier: Apache-2.0
"""The generator: its C is accepted by the compiler, its ids agree across languages, and it refuses what it cannot write."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vgpu.transport._generated_calls import CALL_KINDS, TABLE_HASH, CallId
from vgpu.transport.calls._table import Row, Table, load, parse

ROOT = Path(__file__).resolve().parents[2]
WIRE = "wirePad async a=- p=bytes\nwireOther reply a=x\n"
COMPILE = (
    "gcc",
    "-std=gnu11",
    "-D_GNU_SOURCE",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-fsyntax-only",
    "-x",
    "c",
    "-",
)


def _load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gen_calls", ROOT / "tools/gen_calls.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gen_calls = _load_generator()


def table(*lines: str) -> Table:
    return parse(WIRE + "\n".join(lines))


def row(line: str) -> Row:
    return table(line).rows[0]


def compile_c(source: str, *folders: str) -> None:
    includes = [f"-I{ROOT / folder}" for folder in folders]
    done = subprocess.run([*COMPILE, *includes], input=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{source}\n{done.stderr}"


def entry_source(made: Table) -> str:
    """A file with the generated entries, in which the rows have ids of their own."""
    ids = "\n".join(f"#define VGPU_CALL_{r.symbol} {900 + i}u" for i, r in enumerate(made.rows))
    lines = ['#include "shim.h"', ids]
    for r in made.rows:
        signature = gen_calls.signature(r, opaque=False)
        lines.append(f"CUresult {r.symbol}({signature});")
        lines += [f"CUresult {r.symbol}({signature})", "{", *gen_calls.entry_body(r), "}"]
    return "\n".join(lines) + "\n"


def handler_source(made: Table) -> str:
    """A file with the generated handlers, against a driver that has just these functions."""
    fields = "\n".join(gen_calls.driver_struct(made))
    head = (ROOT / "gpu/replay/replay.h").read_text()
    text = "\n".join("\n".join(gen_calls.handler(r)) for r in made.rows)
    uses = "\n".join(f"replay_handler *const use_{r.symbol} = replay_{r.symbol};" for r in made.rows)
    include = '#include "_generated_driver.h"'
    assert include in head
    return f"{head.replace(include, '#include <stddef.h>' + chr(10) + fields)}\n{text}\n{uses}\n"


# -- types and signatures


@pytest.mark.parametrize(
    ("kind", "guest", "host"),
    [
        ("u8", "unsigned char", "unsigned char"),
        ("i32", "int", "int"),
        ("u64", "unsigned long long", "unsigned long long"),
        ("size", "size_t", "size_t"),
        ("f32", "float", "float"),
        ("dev", "int", "int"),
        ("ptr", "void *", "void *"),
        ("cptr", "const void *", "const void *"),
        ("cstr", "const char *", "const char *"),
        ("in.24", "const void *", "const void *"),
        ("out.u32", "unsigned int *", "unsigned int *"),
        ("h.stream", "CUstream", "void *"),
        ("h.memory", "CUmemGenericAllocationHandle", "unsigned long long"),
        ("out.h.graph", "CUgraph *", "void **"),
        ("out.h.memory", "CUmemGenericAllocationHandle *", "unsigned long long *"),
    ],
)
def test_c_types(kind: str, guest: str, host: str) -> None:
    assert gen_calls.c_type(kind, opaque=False) == guest
    assert gen_calls.c_type(kind, opaque=True) == host


def test_signatures() -> None:
    line = "cuA cuA@1 reply gen gen n:out.u32 s:h.stream text:cstr"
    assert gen_calls.signature(row(line), opaque=False) == "unsigned int *n, CUstream s, const char *text"
    assert gen_calls.signature(row(line), opaque=True) == "unsigned int *n, void *s, const char *text"
    assert gen_calls.signature(row("cuA cuA@1 reply gen gen"), opaque=False) == "void"


# -- generated bodies, both sides

HANDLE_KINDS = tuple(gen_calls.C_HANDLE)
BODIES = [
    "cuNone cuNone@1 async gen gen",
    "cuScalars cuScalars@1 reply gen gen a:u8 b:u16 c:u32 d:i32 e:u64 f:size",
    "cuAsync cuAsync@1 async gen gen a:u8 b:i32 c:size",
    "cuEight cuEight@1 async gen gen a:u8 b:u8 c:u8 d:u8 e:u8 f:u8 g:u8 h:u8",
    "cuDevice cuDevice@1 reply gen gen d:dev n:out.i32",
    "cuOuts cuOuts@1 reply gen gen a:out.u8 b:out.u16 c:out.u64 d:out.size",
    "cuPayload cuPayload@1 reply gen gen a:u32 b:in.24",
    "cuPayloadAsync cuPayloadAsync@1 async gen gen b:in.8 s:h.stream",
    *(f"cuIn_{k} cuIn_{k}@1 reply gen gen x:h.{k} y:u32" for k in HANDLE_KINDS),
    *(f"cuOut_{k} cuOut_{k}@1 reply gen gen x:out.h.{k}" for k in HANDLE_KINDS if k != "memory"),
]  # fmt: skip


def test_every_kind_of_entry_compiles() -> None:
    compile_c(entry_source(table(*BODIES)), "shim/libcuda")


def test_every_kind_of_handler_compiles() -> None:
    compile_c(handler_source(table(*BODIES)), "gpu/replay")


def test_an_entry_checks_before_it_sends() -> None:
    body = "\n".join(
        gen_calls.entry_body(row("cuA cuA@1 reply gen gen e:h.event s:h.stream d:dev v:out.u32 b:in.8"))
    )
    sent = body.index("shim_reply(")
    for check in (
        "shim_handle_valid(VGPU_KIND_EVENT, (uint64_t)e)) return CUDA_ERROR_INVALID_HANDLE",
        "shim_stream(s, &id_s)) != CUDA_SUCCESS) return status",
        "d != 0) return CUDA_ERROR_INVALID_DEVICE",
        "v == NULL) return CUDA_ERROR_INVALID_VALUE",
        "b == NULL) return CUDA_ERROR_INVALID_VALUE",
    ):
        assert 0 < body.index(check) < sent
    assert "{(uint64_t)e, id_s}" in body
    assert body.index("*v = (unsigned int)wire_value[0]") > sent
    # A call that names a device needs no context; every other one does.
    assert "shim_enter();" in body
    assert "shim_enter_context();" in "\n".join(gen_calls.entry_body(row("cuA cuA@1 async gen gen a:u32")))


def test_a_handler_checks_what_a_guest_sends() -> None:
    body = "\n".join(gen_calls.handler(row("cuA cuA@1 reply gen gen s:h.stream e:h.event b:in.24")))
    called = body.index("replay->driver.cuA(")
    assert 0 < body.index("call->payload_length < 24) return CUDA_ERROR_INVALID_VALUE") < called
    assert (
        0
        < body.index("!replay_stream(replay, call->argument[0], &s)) return CUDA_ERROR_INVALID_HANDLE")
        < called
    )
    assert 0 < body.index("!replay_lookup(replay, VGPU_KIND_EVENT, call->argument[1], &e)") < called


@pytest.mark.parametrize("kind", ["ptr", "cptr", "cstr", "f32"])
def test_what_cannot_be_generated_is_refused(kind: str) -> None:
    made = row(f"cuA cuA@1 reply gen gen p:{kind}")
    for write in (gen_calls.entry_body, gen_calls.handler):
        with pytest.raises(SystemExit, match=f"cuA: {kind} cannot be generated"):
            write(made)


@pytest.mark.parametrize(
    "parameters", [" ".join(f"a{i}:u32" for i in range(9)), " ".join(f"o{i}:out.u32" for i in range(5))]
)
def test_too_many_arguments_are_refused(parameters: str) -> None:
    made = row(f"cuA cuA@1 reply gen gen {parameters}")
    for write in (gen_calls.entry_body, gen_calls.handler):
        with pytest.raises(SystemExit, match="cuA: too many arguments"):
            write(made)


def test_two_payloads_are_refused() -> None:
    with pytest.raises(SystemExit, match=r"one in\.N parameter"):
        gen_calls.entry_body(row("cuA cuA@1 reply gen gen a:in.8 b:in.8"))


# -- whole files


def test_a_refused_row_is_exported_and_counts() -> None:
    text = gen_calls.entries(table("cuA cuA@2000/ptsz@7000 refused"))
    for symbol in ("cuA", "cuA_ptsz"):
        assert f"VGPU_EXPORT CUresult {symbol}(void);" in text
        assert f"CUresult {symbol}(void) {{ return shim_refuse(VGPU_CALL_cuA); }}" in text
    assert '{"cuA", "cuA", 2000, 0, (void *)cuA},' in text
    assert '{"cuA", "cuA_ptsz", 7000, 2, (void *)cuA_ptsz},' in text
    assert "cuA" not in gen_calls.prototypes(table("cuA cuA@2000/ptsz@7000 refused"))


def test_a_row_by_hand_is_refused_until_it_is_written() -> None:
    text = gen_calls.entries(table("cuA cuA@2000 reply hand vt a:u32"))
    assert (
        "__attribute__((weak)) CUresult cuA(unsigned int a)\n{ (void)a; return shim_refuse(VGPU_CALL_cuA); }"
        in text
    )


def test_a_twin_calls_its_row_under_the_threads_stream() -> None:
    made = table("cuA_v2 cuA@3020/ptds@7000 async hand vt a:u32 s:h.stream", "cuB cuB@1 async gen gen")
    assert (
        "CUresult cuA_v2_ptds(unsigned int a, CUstream s)\n{\n    SHIM_PER_THREAD_STREAM;\n    return cuA_v2(a, s);"
        in (gen_calls.entries(made))
    )
    assert "VGPU_EXPORT CUresult cuA_v2_ptds(unsigned int a, CUstream s);" in gen_calls.prototypes(made)
    assert [symbol for symbol, _, _ in gen_calls.exported(made)] == ["cuA_v2", "cuA_v2_ptds", "cuB"]


def test_look_up_entries_are_sorted_by_name_and_version() -> None:
    made = table("cuB cuB@2000 refused", "cuA_v2 cuA@3020 refused", "cuA cuA@2000 refused")
    found = re.findall(r'^    \{"(\w+)", "(\w+)", (\d+),', gen_calls.entries(made), re.MULTILINE)
    assert found == [("cuA", "cuA", "2000"), ("cuA", "cuA_v2", "3020"), ("cuB", "cuB", "2000")]


def test_ids_are_positions_and_adding_at_the_end_moves_none() -> None:
    before = gen_calls.call_names(table("cuA cuA@1 refused", "cuB cuB@1 refused"))
    assert before == ["wirePad", "wireOther", "cuA", "cuB"]
    assert (
        gen_calls.call_names(table("cuA cuA@1 refused", "cuB cuB@1 refused", "cuC cuC@1 refused"))[:4]
        == before
    )


def test_the_first_record_is_padding() -> None:
    with pytest.raises(SystemExit, match="wirePad"):
        gen_calls.call_names(parse("wireOther reply a=x\nwirePad async a=-\n"))


@pytest.mark.parametrize(
    "change",
    [
        "cuA cuA@1 async gen gen a:u32",
        "cuA cuA@1 reply gen gen a:u64",
        "cuA cuA@1 reply gen gen b:u32",
        "cuA_v2 cuA@1 reply gen gen a:u32",
        "cuA cuA@1 reply gen vt a:u32",
    ],
)
def test_the_hash_knows_a_change_of_the_wire(change: str) -> None:
    first = table("cuA cuA@1 reply gen gen a:u32")
    assert gen_calls.table_hash(first) == gen_calls.table_hash(
        table("cuA  cuA@1 reply gen gen a:u32 # words")
    )
    assert gen_calls.table_hash(first) != gen_calls.table_hash(table(change))


def test_ids_are_the_same_in_c_and_in_python(tmp_path: Path) -> None:
    compiler = shutil.which("gcc")
    assert compiler, "gcc is a requirement of the project"
    lines = "\n".join(f'    printf("{c.name} %d\\n", VGPU_CALL_{c.name});' for c in CallId)
    source = f'#include <stdio.h>\n#include "_generated_calls.h"\nint main(void)\n{{\n{lines}\n'
    source += '    printf("count %d hash %016llX\\n", VGPU_CALL_COUNT, VGPU_TABLE_HASH);\n    return 0;\n}\n'
    program = tmp_path / "ids"
    subprocess.run(
        [compiler, "-Wall", "-Werror", f"-I{ROOT / 'transport'}", "-x", "c", "-", "-o", program],
        input=source, text=True, check=True,
    )  # fmt: skip
    printed = subprocess.check_output([program], text=True).splitlines()
    assert printed[-1] == f"count {len(CallId)} hash {TABLE_HASH:016X}"
    assert printed[:-1] == [f"{call.name} {call.value}" for call in CallId]
    assert [call.name for call in CallId] == gen_calls.call_names(load())
    kinds = {r.symbol: r.kind for r in load().rows} | {w.name: w.kind for w in load().wire}
    assert {call.name: kind for call, kind in CALL_KINDS.items()} == kinds


# -- --check


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The generated files in a folder of the test's own, at which the generator looks."""
    for name in gen_calls.OUTPUTS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    monkeypatch.setattr(gen_calls, "ROOT", tmp_path)
    return tmp_path


def test_check_is_content_with_the_tree(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gen_calls.main(["--check"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", list(gen_calls.OUTPUTS))
def test_check_names_what_differs_and_writes_nothing(
    copy: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / name).write_text("something else\n")
    assert gen_calls.main(["--check"]) == 1
    assert capsys.readouterr().out == f"differs: {name}\n"
    assert (copy / name).read_text() == "something else\n"


def test_without_check_it_writes_what_differs(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = list(gen_calls.OUTPUTS)
    (copy / names[0]).write_text("something else\n")
    (copy / names[-1]).unlink()
    assert gen_calls.main([]) == 0
    assert capsys.readouterr().out == f"wrote {names[0]}\nwrote {names[-1]}\n"
    for name in (names[0], names[-1]):
        assert (copy / name).read_text() == (ROOT / name).read_text()


def test_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", ROOT / "tools/gen_calls.py", "--check"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, b"")
