# SPDX-License-Identifier: Apache-2.0
"""Our nvidia-smi, word for word. The files in golden/ were compared with what NVIDIA's of driver 580 prints over this library.

``VGPU_WRITE_GOLDEN=1`` writes them anew; then look at the difference.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from .page_host import GIB, UUID_TEXT, PageHost, page_bytes, unknown_page

GOLDEN = Path(__file__).resolve().parent / "golden"
NAME = "/opt/trainer/bin/python3"
LONG_NAME = "/opt/a-very-long-folder-name/and-another/bin/python3"
TIME = re.compile(r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun) \w{3} [ \d]\d \d\d:\d\d:\d\d \d{4}")
STAMP = re.compile(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d\.\d{3}")


@attrs.define
class Smi:
    """nvidia-smi over a host, and two processes that look as if they used the GPU."""

    program: Path
    host: PageHost
    processes: list[subprocess.Popen[bytes]]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **self.host.environment, "LC_ALL": "C.UTF-8"}
        environment.pop("LD_LIBRARY_PATH", None)
        return subprocess.run(
            [self.program, *words], env=environment, capture_output=True, text=True, check=False
        )

    def output(self, *words: str) -> str:
        """What it prints, with times and process numbers made the same."""
        done = self.run(*words)
        assert (done.returncode, done.stderr) == (0, "")
        text = STAMP.sub("2026/01/02 03:04:05.678", TIME.sub("Fri Jan  2 03:04:05 2026", done.stdout))
        for letter, process in zip("PQ", self.processes, strict=True):
            digits = str(process.pid)
            text = re.sub(rf"\b{digits}\b", letter * len(digits), text)
            text = re.sub(rf" *{letter * len(digits)}(?=      C )", f"{letter * 4:>16}", text)
            text = text.replace(letter * len(digits), letter * 4)
        return text


@pytest.fixture
def smi(nvidia_smi: Path, host: PageHost) -> Iterator[Smi]:
    """nvidia-smi, its host, and two running processes on its page."""
    processes = [
        subprocess.Popen([name, "1000"], executable=shutil.which("sleep")) for name in (NAME, LONG_NAME)
    ]
    first, second = (process.pid for process in processes)
    host.replace_page(page_bytes(processes=((first, 40, 3 * GIB, 1), (second, 20, 120 * GIB, 2))))
    yield Smi(nvidia_smi, host, processes)
    for process in processes:
        process.kill()
        process.wait()


# File in golden/ -> arguments.
OUTPUTS: dict[str, tuple[str, ...]] = {
    "table": (),
    "list": ("-L",),
    "full": ("-q",),
    "full_memory_power": ("-q", "-d", "MEMORY,POWER"),
    "version": ("--version",),
    "query": (
        (
            "--query-gpu=timestamp,name,uuid,index,pci.bus_id,driver_version,memory.total,memory.used,memory.free,"
            "utilization.gpu,utilization.memory,temperature.gpu,power.draw,power.limit,clocks.sm,clocks.max.memory,"
            "pstate,ecc.mode.current,ecc.errors.corrected.volatile.total,compute_mode,compute_cap,fan.speed"
        ),
        "--format=csv",
    ),
    "query_bare": ("--query-gpu=gpu_name,memory.used,power.draw", "--format=csv,noheader,nounits"),
    "query_apps": ("--query-compute-apps=timestamp,gpu_uuid,pid,name,used_memory", "--format=csv"),
    "query_apps_bare": (
        "--query-compute-apps=process_name,used_gpu_memory",
        "--format",
        "csv,noheader,nounits",
    ),
    "help_query": ("--help-query-gpu",),
    "help_query_apps": ("--help-query-compute-apps",),
}


def compare(name: str, text: str) -> None:
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("VGPU_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", OUTPUTS)
def test_output(smi: Smi, name: str) -> None:
    compare(name, smi.output(*OUTPUTS[name]))


@pytest.mark.parametrize("words", [(), ("-q",)], ids=["table", "full"])
def test_output_of_a_card_that_tells_nothing(smi: Smi, words: tuple[str, ...]) -> None:
    smi.host.replace_page(unknown_page())
    compare("unknown_full" if words else "unknown_table", smi.output(*words))


def test_a_table_with_other_values(smi: Smi) -> None:
    numbers = {"fan_percent": 30, "compute_mode": 3, "persistence_mode": 0, "ecc_enabled": 0}
    numbers |= {"power_milliwatts": 9999, "power_limit_milliwatts": 1_000_000, "temperature_celsius": 101}
    numbers |= {"gpu_utilization_percent": 100, "performance_state": 12, "total_memory_bytes": 1500 * GIB}
    numbers |= {"memory_used_bytes": 1400 * GIB, "pci_domain": 0x12345, "pci_bus": 0xFF, "pci_device": 0x1F}
    texts = {"name": "NVIDIA GeForce RTX 3080 Ti Laptop GPU", "driver_version_text": "580.105.08-open"}
    smi.host.replace_page(page_bytes(numbers, texts, ((2**22 + 1, 0, GIB, 1),)))
    compare("other_table", smi.output())


def test_memory_is_rounded_to_the_nearest_mebibyte(smi: Smi) -> None:
    """As NVIDIA's own does: an H200 of 150109880320 bytes has 143156 MiB."""
    smi.host.replace_page(page_bytes({"total_memory_bytes": 150109880320, "memory_used_bytes": 5 << 19}))
    assert "3MiB / 143156MiB" in smi.output()
    query = ("--query-gpu=memory.total,memory.used", "--format=csv,noheader")
    assert smi.output(*query) == "143156 MiB, 3 MiB\n"


def test_every_line_of_the_table_is_as_wide(smi: Smi) -> None:
    for page in (None, unknown_page()):
        if page is not None:
            smi.host.replace_page(page)
        lines = smi.output().splitlines()
        assert {len(line) for line in lines[1:] if line} == {91}


def test_every_property_can_be_asked_for(smi: Smi) -> None:
    names = re.findall(r'"([a-zA-Z_.0-9]+)"', smi.output("--help-query-gpu"))
    names = [name for name in names if name != "--query-gpu"]
    assert len(names) > 200
    header, line = smi.output("--query-gpu=" + ",".join(names), "--format=csv").splitlines()
    assert len(header.split(", ")) == len(line.split(", ")) == len(names)
    assert "Unknown Error" not in line
    assert "Function Not Found" not in line


# ---- which GPU ----


@pytest.mark.parametrize("word", ["0", UUID_TEXT, "00000000:41:00.0", "0000:41:00.0", "1652723012345", "0,0"])
def test_a_gpu_by(smi: Smi, word: str) -> None:
    for words in (("-i", word), (f"--id={word}",)):
        assert smi.output(*words, "--query-gpu=index", "--format=csv,noheader") == "0\n"


@pytest.mark.parametrize("word", ["1", "99999999999999999999", "GPU-1", "0000:42:00.0", "x"])
def test_a_gpu_that_there_is_not(smi: Smi, word: str) -> None:
    done = smi.run("-i", word)
    assert (done.returncode, done.stdout) == (6, "No devices were found\n")


# ---- repeating, files ----


@pytest.mark.parametrize("words", [("-lms", "50"), ("--loop-ms=50",)])
def test_repeating(smi: Smi, words: tuple[str, ...]) -> None:
    process = subprocess.Popen(
        [smi.program, "--query-gpu=power.draw", "--format=csv,nounits", *words],
        env={**os.environ, **smi.host.environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        began = time.monotonic()
        lines = [process.stdout.readline() for _ in range(3)]
        smi.host.set("power_milliwatts", 1000)
        while process.stdout.readline() != "1.00\n":
            assert time.monotonic() - began < 60
        assert lines == ["power.draw [W]\n", "412.35\n", "412.35\n"]
        assert time.monotonic() - began > 0.05
        process.stdout.close()
        assert process.wait(60) != 0  # nobody reads any more
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("words", [("-l", "0"), ("-l", "x"), ("--loop=-1",), ("-lms", "0")])
def test_a_period_that_is_none(smi: Smi, words: tuple[str, ...]) -> None:
    done = smi.run(*words)
    assert done.returncode == 2
    assert "Loop frequency must be greater than 0." in done.stdout


def test_into_a_file(smi: Smi, tmp_path: Path) -> None:
    assert smi.output("-L", "-f", str(tmp_path / "out")) == ""
    assert (tmp_path / "out").read_text() == smi.output("-L")


# ---- what goes wrong ----


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (("--bogus",), 255, "ERROR: Option --bogus is not recognized. Please run 'nvidia-smi -h'.\n\n"),
        (("--query-gpu=foo,name",), 2, 'Field "foo" is not a valid field to query.\n\n'),
        (("--query-compute-apps=pid,foo",), 2, 'Field "foo" is not a valid field to query.\n\n'),
        (("--query-gpu=name", "--format=xml"), 2, "Format modifier is not recognized.\n"),
        (
            ("--query-gpu",),
            255,
            "ERROR: Option --query-gpu is missing its value. Please run 'nvidia-smi -h' for help.\n\n",
        ),
        (("-q", "-d", "FOO"), 2, "Failed to parse --display/-d flags\n"),
        (("-d", "MEMORY"), 2, "Invalid combination of input arguments."),
        (("-pm", "1"), 4, "The current user does not have permission to change"),
        (("-r",), 4, "The current user does not have permission to change"),
    ],
)
def test_refusal(smi: Smi, words: tuple[str, ...], status: int, text: str) -> None:
    done = smi.run(*words)
    assert (done.returncode, done.stdout[: len(text)], done.stderr) == (status, text, "")


def test_without_a_driver(nvidia_smi: Path, run_dir: Path) -> None:
    environment = {**os.environ, "VGPU_RUN_DIR": str(run_dir)}
    for words in ((), ("-L",), ("--query-gpu=name",), ("--version",)):
        done = subprocess.run(
            [nvidia_smi, *words], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 9
        assert done.stdout == (
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
            "Make sure that the latest NVIDIA driver is installed and running.\n\n"
        )


def test_without_a_library(nvidia_smi: Path, tmp_path: Path) -> None:
    alone = shutil.copy(nvidia_smi, tmp_path / "nvidia-smi")
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    done = subprocess.run([alone], env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 9:  # this machine has a driver's library where the loader looks
        assert "couldn't communicate" in done.stdout
    else:
        assert done.returncode == 12
        assert "couldn't find libnvidia-ml.so library" in done.stdout


def test_help_needs_no_driver(nvidia_smi: Path, run_dir: Path) -> None:
    for word in ("-h", "--help"):
        done = subprocess.run(
            [nvidia_smi, word],
            env={**os.environ, "VGPU_RUN_DIR": str(run_dir)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0
        assert "--query-gpu=" in done.stdout


def test_a_lost_gpu(smi: Smi) -> None:
    smi.host.set("magic", 0)
    done = smi.run()
    assert done.returncode == 15
    assert done.stdout == "Unable to determine the device handle for GPU 0: GPU is lost\n"


def test_a_host_of_another_layout(smi: Smi) -> None:
    smi.host.resize(4096)
    done = smi.run("-L")
    assert (done.returncode, done.stdout) == (
        18,
        "Failed to initialize NVML: Driver/library version mismatch\n",
    )
