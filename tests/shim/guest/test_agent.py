# SPDX-License-Identifier: Apache-2.0
"""vgpu-guest-agent on a made-up sysfs: whose slots it gives back and whose not, permissions, unplugging, systemd."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from tests.shim.guest.staging import DIRECTORY, PAGE, READY, RELEASE, RELEASING, Machine, make_bar1
from vgpu.transport import layout

FREE, PENDING, REFUSED, DEAD = 0, 1, 3, 4


def lock(file: IO[bytes], byte: int) -> None:
    """The open-file-description lock that a living owner holds."""
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))


def released(device: Path, slot: int) -> int:
    """What was stored into a slot's RELEASE."""
    with (device / "resource0").open("rb") as file:
        file.seek(PAGE * (slot + 1) + RELEASE)
        return int(struct.unpack("<I", file.read(4))[0])


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """The agent is another process that works once a second: there is nothing to wait on but what it does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def agent(parts: Path, machine: Machine, *words: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [str(parts / "vgpu-guest-agent"), "--sysfs", str(machine.root / "sys"), *words],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    return process.stderr.readline()


def put(device: Path, *states: tuple[int, int, int], **memory: object) -> None:
    """States into BAR1 in place: an agent has it mapped."""
    with (device / "resource1").open("r+b") as file:
        file.write(make_bar1(states=states, **memory))  # type: ignore[arg-type]


def test_slots_of_the_dead_are_given_back(parts: Path, machine: Machine) -> None:
    device = machine.add_device()
    put(device, (11, 1, READY), (22, 2, READY), (33, 3, PENDING), (44, 4, RELEASING))
    with (device / "resource0").open("r+b") as living:
        lock(living, 2)  # slot 1 has a living owner
        with agent(parts, machine):
            wait_for(lambda: released(device, 2) == 33)
            assert [released(device, slot) for slot in range(4)] == [11, 0, 33, 0]
            living.close()  # and now it dies
            wait_for(lambda: released(device, 1) == 22)


@pytest.mark.parametrize(
    ("state", "given"), [(FREE, 0), (PENDING, 7), (READY, 7), (REFUSED, 7), (DEAD, 7), (RELEASING, 0)]
)
def test_which_states_are_given_back(parts: Path, machine: Machine, state: int, given: int) -> None:
    device = machine.add_device()
    # The last slot is the mark that the agent has come by all of them.
    put(device, (7, 1, state), (0, 0, READY), (0, 0, FREE), (99, 1, READY))
    with agent(parts, machine):
        wait_for(lambda: released(device, 3) == 99)
        assert [released(device, slot) for slot in range(3)] == [given, 0, 0]


def test_a_directory_that_lies_about_its_length_is_not_followed(parts: Path, machine: Machine) -> None:
    device = machine.add_device()
    put(device, *(((5, 1, READY),) * 4))
    with (device / "resource1").open("r+b") as file:
        file.seek(DIRECTORY + layout.DIRECTORY_FIELDS["slot_count"][0])
        file.write(struct.pack("<I", 0xFFFFFFFF))
    with agent(parts, machine) as process:
        wait_for(lambda: released(device, 3) == 5)
        assert process.poll() is None
    assert (device / "resource0").stat().st_size == PAGE * 5


def test_without_a_directory_nothing_is_written(parts: Path, machine: Machine) -> None:
    device = machine.add_device()
    put(device, (5, 1, READY), magic=b"NOTOURS!")
    with agent(parts, machine) as process:
        assert "looking after" in first_line(process)
        time.sleep(1.2)
        assert released(device, 0) == 0
        put(device, (5, 1, READY))  # a host appears behind it
        wait_for(lambda: released(device, 0) == 5)


def test_only_one_agent_looks_after_a_device(parts: Path, machine: Machine) -> None:
    device = machine.add_device()
    with agent(parts, machine) as first:
        assert "looking after" in first_line(first)
        with agent(parts, machine) as second:
            assert "another agent looks after it" in first_line(second)
            first.kill()
            first.wait()
            assert "looking after" in first_line(second)
            put(device, (5, 1, READY))
            wait_for(lambda: released(device, 0) == 5)


def test_a_device_plugged_in_later_is_found_and_opened(parts: Path, machine: Machine) -> None:
    (machine.root / "sys/bus/pci/devices").mkdir(parents=True)
    groups = os.getgroups() or [os.getgid()]
    group = next(
        (number for number in groups if number != os.getgid()), 1 if os.geteuid() == 0 else os.getgid()
    )
    with agent(parts, machine, "--group", str(group)) as process:
        device = machine.add_device(enable="0")
        assert "looking after" in first_line(process)
        assert (device / "enable").read_text() == "1"
        for name in ("resource0", "resource1", "resource1_wc"):
            status = (device / name).stat()
            assert (status.st_gid, status.st_mode & 0o777) == (group, 0o660)


def test_other_cards_are_left_alone(parts: Path, machine: Machine) -> None:
    real = machine.add_device("0000:01:00.0", 16 << 20, enable="0")
    other = machine.add_device("0000:02:00.0", subsystem_device="0x1626", enable="0")
    ours = machine.add_device("0000:03:00.0", enable="0")
    with agent(parts, machine) as process:
        assert "0000:03:00.0" in first_line(process)
    assert [(card / "enable").read_text().strip() for card in (real, other, ours)] == ["0", "0", "1"]


# ---- the end


def test_unplugging_ends_it(parts: Path, machine: Machine) -> None:
    device = machine.add_device()
    with agent(parts, machine) as process:
        assert "looking after" in first_line(process)
        shutil.rmtree(device)
        assert "was unplugged" in first_line(process)
        assert process.wait(60) == 0


def test_memory_that_goes_away_under_it_ends_it(parts: Path, machine: Machine) -> None:
    """A mapping past a file's end raises SIGBUS, as one of an unplugged device does."""
    device = machine.add_device()
    with agent(parts, machine) as process:
        assert "looking after" in first_line(process)
        os.truncate(device / "resource1", 0)
        assert "was unplugged" in first_line(process)
        assert process.wait(60) == 0


def test_a_device_put_in_again_is_not_taken_for_the_old_one(parts: Path, machine: Machine) -> None:
    """Between two looks a device went and came: the old mapping reaches it, but its owners' locks lie on its own files."""
    device = machine.add_device()
    with agent(parts, machine, "--stay") as process:
        assert "looking after" in first_line(process)
        new = device / "new"
        shutil.copyfile(device / "resource0", new)
        with new.open("r+b") as owner, (device / "resource0").open("rb") as old:
            lock(owner, 1)
            new.rename(device / "resource0")
            put(device, (7, 1, READY), (8, 1, READY))  # seen through both mappings
            assert "was unplugged" in first_line(process)
            assert "looking after" in first_line(process)
            wait_for(lambda: released(device, 1) == 8)
            assert released(device, 0) == 0
            for slot in range(2):
                assert os.pread(old.fileno(), 4, PAGE * (slot + 1) + RELEASE) == bytes(4)


def test_where_nobody_starts_it_again_it_stays(parts: Path, machine: Machine) -> None:
    device = machine.add_device()
    with agent(parts, machine, "--stay") as process:
        assert "looking after" in first_line(process)
        shutil.rmtree(device)
        assert "was unplugged" in first_line(process)
        machine.add_device("0000:00:06.0")
        assert "0000:00:06.0" in first_line(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_when_asked(parts: Path, machine: Machine, number: signal.Signals) -> None:
    machine.add_device()
    with agent(parts, machine) as process:
        assert "looking after" in first_line(process)
        process.send_signal(number)
        assert process.wait(60) == 0


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(parts: Path, machine: Machine, tmp_path: Path, abstract: bool) -> None:
    device = machine.add_device()
    put(device, (5, 1, READY))
    name = f"\0{tmp_path}/n" if abstract else str(tmp_path / "n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name)
        listener.settimeout(60)
        with agent(parts, machine, NOTIFY_SOCKET=name.replace("\0", "@")) as process:
            assert listener.recv(200) == b"READY=1\nSTATUS=1 virtual GPU, 1 slots given back"
            put(device)
            process.send_signal(signal.SIGTERM)
            while (message := listener.recv(200)).startswith(b"READY=1"):
                pass  # a second went by, and the slot was given back again, before it was taken away
            assert message == b"STOPPING=1"


def test_it_is_idle_when_there_is_nothing_to_do(parts: Path, machine: Machine) -> None:
    machine.add_device()
    with agent(parts, machine) as process:
        assert "looking after" in first_line(process)
        time.sleep(2)
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        assert int(fields[11]) + int(fields[12]) <= 5  # hundredths of a second of processor time


# ---- permit


def test_permit_opens_one_device(parts: Path, machine: Machine) -> None:
    device = machine.add_device(enable="0")
    group = 1 if os.geteuid() == 0 else os.getgid()
    words = [str(parts / "vgpu-guest-agent"), "--group", str(group), "--permit", str(device)]
    for _ in range(2):
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert (device / "resource1").stat().st_gid == group
        assert (device / "resource1").stat().st_mode & 0o777 == 0o660
        assert (device / "enable").read_text() == "1"


def test_permit_takes_the_device_from_a_display_driver(parts: Path, machine: Machine) -> None:
    device = machine.add_device()
    driver = machine.root / "sys/bus/pci/drivers/nouveau"
    driver.mkdir(parents=True)
    (driver / "unbind").write_text("")
    (device / "driver_override").write_text("(null)\n")
    (device / "driver").symlink_to("../../drivers/nouveau")
    done = subprocess.run(
        [str(parts / "vgpu-guest-agent"), "--permit", str(device)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "took it from the driver nouveau" in done.stderr
    assert (driver / "unbind").read_text() == "0000:00:05.0"
    assert (device / "driver_override").read_text() == "vgpu-none"


def test_permit_says_what_is_missing(parts: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(parts / "vgpu-guest-agent"), "--permit", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"{tmp_path}/resource0: No such file or directory" in done.stderr


@pytest.mark.parametrize(
    ("words", "status"),
    [(["--help"], 0), (["--frobnicate"], 2), (["extra"], 2), (["--group", "no-such-group"], 1)],
)
def test_words(parts: Path, words: list[str], status: int) -> None:
    done = subprocess.run(
        [str(parts / "vgpu-guest-agent"), *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == status
