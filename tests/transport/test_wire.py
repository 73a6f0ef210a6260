# SPDX-License-Identifier: Apache-2.0
"""Wire formats: golden vectors read by Python and by C, limits, and the layout of shared pages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgpu.transport import account, layout
from vgpu.transport.attach import HELLO_SIZE, WELCOME_SIZE, Hello, Status, Welcome
from vgpu.transport.errors import LocalProtocolError, RemoteProtocolError
from vgpu.transport.names import BadName, is_name
from vgpu.transport.wire import CallHeader, Result

ROOT = Path(__file__).resolve().parents[2]
GOLDEN: list[dict[str, Any]] = json.loads((ROOT / "tests/data/golden_wire.json").read_text())


@pytest.fixture(scope="module")
def c_view(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the C side makes of the golden bytes, and its offsets."""
    compiler = shutil.which("gcc")
    assert compiler, "gcc is a requirement of the project"
    program = tmp_path_factory.mktemp("golden") / "golden"
    source = ROOT / "tests/transport/c/golden.c"
    subprocess.run(
        [compiler, "-std=gnu11", "-Wall", "-Werror", f"-I{ROOT}/transport", source, "-o", program], check=True
    )
    lines = "\n".join(f"{g['kind']} {g['hex']}" for g in GOLDEN)
    done = subprocess.run([program], input=lines, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("vector", GOLDEN, ids=lambda g: f"{g['kind']}-{g['sequence']}")
def test_golden_python(vector: dict[str, Any]) -> None:
    raw = bytes.fromhex(vector["hex"])
    if vector["kind"] == "call":
        header = CallHeader.decode(raw + b"trailing")
        assert (header.call, header.flags, header.payload_length) == (
            vector["call"], vector["flags"], vector["payload_length"],
        )  # fmt: skip
        assert (header.sequence, header.slot) == (vector["sequence"], vector["slot"])
        assert [str(a) for a in header.arguments] == vector["arguments"]
        assert header.encode() == raw
    else:
        result = Result.decode(raw + b"trailing")
        assert (result.sequence, result.status, result.payload_length) == (
            vector["sequence"], vector["status"], vector["payload_length"],
        )  # fmt: skip
        assert [str(v) for v in result.values] == vector["values"]
        assert result.encode() == raw


def test_golden_c(c_view: list[str]) -> None:
    for vector, line in zip(GOLDEN, c_view, strict=False):
        if vector["kind"] == "call":
            fields = [vector[k] for k in ("call", "flags", "payload_length", "sequence", "slot")]
            assert line.split() == ["call", *map(str, fields), *vector["arguments"]]
        else:
            fields = [vector[k] for k in ("sequence", "status", "payload_length")]
            assert line.split() == ["result", *map(str, fields), *vector["values"]]


def test_layout_agrees_with_c(c_view: list[str]) -> None:
    offsets: dict[str, dict[str, int]] = {"grant": {}, "session": {}, "account": {}, "entry": {}}
    for line in c_view:
        if line.startswith("offset "):
            _, page, name, offset = line.split()
            offsets[page][name] = int(offset)
    assert offsets["session"].pop("refused") == layout.REFUSED_OFFSET
    assert offsets["session"].pop("times") == layout.GUEST_TIMES_OFFSET
    assert {k: v[0] for k, v in layout.GRANT_FIELDS.items()} == offsets["grant"]
    assert offsets["session"].items() <= {k: v[0] for k, v in layout.SESSION_FIELDS.items()}.items()
    assert offsets["account"] == account.OFFSETS
    assert offsets["entry"] == account.ENTRY_OFFSETS
    magic = f"magic {layout.GRANT_MAGIC:x} {layout.SEGMENT_MAGIC:x}"
    assert c_view[-1] == f"{magic} {layout.DEVICE_PAGE_SIZE} {layout.SESSION_PAGE_SIZE}"


STRUCTURES: dict[str, dict[str, tuple[int, int]]] = {
    name: {k: (offset, 8 if kind in "qQ" else 4) for k, (offset, kind) in fields.items()} | texts
    for name, fields, texts in (
        ("vgpu_session_page", layout.SESSION_FIELDS, {}),
        (
            "vgpu_guest_times",
            {k: (at - layout.GUEST_TIMES_OFFSET, kind) for k, (at, kind) in layout.GUEST_TIME_FIELDS.items()},
            {},
        ),
        ("vgpu_grant_page", layout.GRANT_FIELDS, {}),
        ("vgpu_device_page", layout.DEVICE_FIELDS, layout.DEVICE_TEXTS),
        ("vgpu_directory", layout.DIRECTORY_FIELDS, {"slot": (128, 127 * 128)}),
        ("vgpu_directory_slot", layout.DIRECTORY_SLOT_FIELDS, {"guest_program": layout.DIRECTORY_PROGRAM}),
    )
}


def test_every_named_field_is_where_the_header_has_it(tmp_path: Path) -> None:
    """The C program is made from Python's names, so a field cannot be forgotten on one side."""
    wanted, lines = [], []
    for structure, fields in STRUCTURES.items():
        for field, (offset, size) in fields.items():
            wanted.append(f"{structure}.{field} {offset} {size}")
            lines.append(
                f'    printf("{structure}.{field} %zu %zu\\n", offsetof(struct {structure}, {field}),'
                f" sizeof(((struct {structure} *)0)->{field}));"
            )
    source = tmp_path / "offsets.c"
    body = "\n".join(lines)
    source.write_text(
        f"#include <stddef.h>\n#include <stdio.h>\n#include <wire.h>\nint main(void)\n{{\n{body}\n"
        '    printf("%d %u %llx\\n", VGPU_PROCESSES, VGPU_DIRECTORY_OFFSET, VGPU_DIRECTORY_MAGIC);\n}\n'
    )
    program = tmp_path / "offsets"
    header = ROOT / "transport"
    subprocess.run(["gcc", "-I", str(header), "-o", str(program), str(source)], check=True)
    said = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()
    assert said[:-1] == wanted
    assert said[-1] == f"{layout.PROCESSES} {layout.DIRECTORY_OFFSET} {layout.DIRECTORY_MAGIC:x}"
    assert layout.DIRECTORY_MAGIC.to_bytes(8, "little") == b"VGPUDIR1"


@given(st.binary(max_size=120))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    try:
        header = CallHeader.decode(data)
    except RemoteProtocolError:
        return
    assert header.encode() == data[:80]


def test_local_misuse_is_a_local_error() -> None:
    with pytest.raises(LocalProtocolError, match="call is 65536"):
        CallHeader(65536).encode()
    with pytest.raises(LocalProtocolError, match="9 arguments"):
        CallHeader(1, (0,) * 9).encode()
    with pytest.raises(LocalProtocolError, match="status is 65536"):
        Result(1, 65536).encode()


def test_attach_messages_round_trip() -> None:
    hello = Hello(pid=4, table_hash=2**63, vm="user1", program="ollama")
    assert len(hello.encode()) == HELLO_SIZE
    assert Hello.decode(hello.encode()) == hello
    welcome = Welcome(Status.WELCOME, 0, 9, 1 << 30, 0x200000000000)
    assert len(welcome.encode()) == WELCOME_SIZE
    assert Welcome.decode(welcome.encode()) == welcome


@pytest.mark.parametrize("cut", [0, 1, HELLO_SIZE - 1, HELLO_SIZE + 1])
def test_hello_of_the_wrong_size_is_refused(cut: int) -> None:
    raw = Hello(1, 2).encode().ljust(HELLO_SIZE + 1, b"\0")[:cut]
    with pytest.raises(RemoteProtocolError, match="expected 256"):
        Hello.decode(raw)


def test_hello_with_bad_contents_is_refused() -> None:
    raw = bytearray(Hello(1, 2).encode())
    raw[24] = 0xFF
    with pytest.raises(BadName, match="vm name"):
        Hello.decode(bytes(raw))
    with pytest.raises(RemoteProtocolError, match="begins with"):
        Hello.decode(bytes(HELLO_SIZE))
    with pytest.raises(LocalProtocolError, match="vm name"):
        Hello(1, 2, vm="x" * 64).encode()


@pytest.mark.parametrize(
    "name",
    ["-vm", ".vm", "a b", "../x", "a/b", "x" * 64, "\xff", "gr\xf6\xdfe", "\x1b[31m", "a\n", "\u0663"],
)
def test_a_hello_of_a_vm_that_none_can_be_is_refused(name: str) -> None:
    raw = bytearray(Hello(1, 2).encode())
    said = name.encode() if not name.startswith("\xff") else b"\xff"
    raw[24 : 24 + len(said)] = said
    with pytest.raises(BadName, match="expected 1 to 63 of letters") as found:
        Hello.decode(bytes(raw))
    assert str(found.value).isprintable()


def test_names_as_long_as_can_be_fit() -> None:
    for name in ("x" * 63, "local-1000", "_", "0", "a.b-c_D"):
        assert is_name(name)
        assert Hello.decode(Hello(1, 2, vm=name).encode()).vm == name


def test_grant_page_publishes_an_epoch() -> None:
    fd = os.memfd_create("grant")
    os.ftruncate(fd, layout.GRANT_PAGE_SIZE)
    page, other = layout.GrantPage(fd), layout.GrantPage(fd)
    os.close(fd)
    assert page.grant(deadline_ns=5, credits=-1) == 1
    assert (other.get("granted"), other.get("deadline_ns"), other.get("credits")) == (1, 5, -1)
    assert page.revoke() == 2
    assert (other.get("granted"), other.get("preempt"), other.get("epoch")) == (0, 1, 2)
    assert set(other.snapshot()) == set(layout.GRANT_FIELDS)
    page.close()
    other.close()
