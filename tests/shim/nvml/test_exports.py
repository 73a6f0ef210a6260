# SPDX-License-Identifier: Apache-2.0
"""What the library exports is exactly the table, and the table is what the generator thinks it is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from .table import SOURCES, functions, generator


def output(*command: str | Path) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


def test_exports_are_the_table(library_path: Path) -> None:
    lines = output("nm", "-D", "--defined-only", library_path).splitlines()
    exported = sorted(line.split()[-1] for line in lines)
    assert exported == [function.name for function in functions()]
    assert len(exported) == 404  # driver 580's


def test_answered_names_are_not_generated() -> None:
    generated = (SOURCES / "_generated_refusals.c").read_text()
    for function in functions():
        assert (f" {function.name}(" in generated) is bool(function.code), function.name


def test_it_needs_nothing_but_libc(library_path: Path, nvidia_smi: Path) -> None:
    for path, soname in ((library_path, "libnvidia-ml.so.1"), (nvidia_smi, None)):
        dynamic = output("readelf", "-d", path)
        needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line]
        assert set(needed) <= {"libc.so.6", "libpthread.so.0", "libdl.so.2", "ld-linux-x86-64.so.2"}
        assert soname is None or f"soname: [{soname}]" in dynamic


def test_nvidia_smi_searches_beside_itself_and_nowhere_else(nvidia_smi: Path) -> None:
    (line,) = [line for line in output("readelf", "-d", nvidia_smi).splitlines() if "RUNPATH" in line]
    assert line.endswith("[$ORIGIN]")


@pytest.mark.parametrize(
    "text",
    [
        "nvmlInit",
        "nvmlInit answered twice",
        "nvmlInit refused",
        "nvmlInit refused TIMEOUT d",
        "nvmlInit refused NOT_SUPPORTED x",
        "nvmlInit answered\nnvmlInit answered",
        "nvmlInit_v2 answered\nnvmlInit answered",
    ],
)
def test_a_table_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        generator().load(text)


def test_an_entry_checks_what_the_table_says() -> None:
    made = generator().entry(generator().Function("nvmlX", "NO_PERMISSION", "dup"))
    assert "nvmlX(nvmlDevice_t device, unsigned long unused1, const void *pointer)" in made
    assert "pointer == NULL ? NVML_ERROR_INVALID_ARGUMENT : NVML_ERROR_NO_PERMISSION" in made
    assert "nvml_refuse_device(device" in made


def test_the_documentation_without_its_marks_is_refused() -> None:
    with pytest.raises(ValueError):
        generator().page(functions(), "no marks here")
