# SPDX-License-Identifier: Apache-2.0
"""How a guest process finds the virtual GPU, gets a slot of it, and gives it back, however it ends."""

from __future__ import annotations

import os
import re
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shim.fake_device import FakeDevice, PythonHost
from tests.shim.fake_host import SESSION, short_folder
from tests.shim.pci_guest import Guest, build_program, until
from vgpu.transport.vfio_user.registers import SlotState

FREE, PENDING, READY, REFUSED, DEAD, RELEASING = SlotState
HEARTBEAT = SESSION + 192
NO_DEVICE, UNAVAILABLE, MISMATCH = "init 100", "init 46", "init 803"


@pytest.fixture(scope="module")
def program() -> Path:
    return build_program("pci_guest")


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        path.chmod(0o755)
        yield path


@pytest.fixture
def device(folder: Path) -> Iterator[FakeDevice]:
    with FakeDevice(folder, PythonHost()) as made:
        yield made
        assert made.problems == []


def log_of(program: Path, folder: Path, **options: int) -> tuple[str, str]:
    with Guest(program, folder, VGPU_LOG="1", **options) as guest:  # type: ignore[arg-type]
        answer = guest.ask("init")
        return answer, guest.finish()


# ---- finding it ----


def test_without_a_device_nothing_is_said_and_no_time_is_lost(program: Path, folder: Path) -> None:
    took = []
    for _ in range(5):
        with Guest(program, folder) as guest:
            began = time.monotonic()
            assert guest.ask("init") == NO_DEVICE
            took.append(time.monotonic() - began)
            assert guest.ask("version") == "version 13000"
            assert guest.finish() == ""
    assert min(took) < 2  # the least that is waited for a host


def test_where_it_was_looked_for_is_said_once(program: Path, folder: Path) -> None:
    places = f"{folder}/vgpu/mediator.sock, nor at /var/vgpu/mediator.sock"
    without = ["no virtual GPU: sysfs/bus/pci/devices cannot be read: No such file or directory"]
    for device in without, ["no virtual GPU: no device 10de:2331 in sysfs/bus/pci/devices"]:
        for level, lines in (("info", [*device, f"no device: no mediator at {places}"]), ("warning", [])):
            with Guest(program, folder, VGPU_LOG=level) as guest:
                assert guest.ask("version") == "version 13000"
                assert guest.ask("init") == guest.ask("init") == NO_DEVICE
                said = guest.finish()
            assert [line.partition(": ")[2] for line in said.splitlines()] == lines
        (folder / "sysfs" / "bus" / "pci" / "devices").mkdir(parents=True, exist_ok=True)


def test_a_claim_and_a_release(program: Path, device: FakeDevice) -> None:
    with Guest(program, device.folder) as guest:
        assert guest.ask("init") == "init 0"
        assert device.states() == [READY, FREE, FREE, FREE]
        assert guest.ask("launch 200") == "launched 0"
        assert guest.finish() == ""
        pid = guest.process.pid
    until(lambda: device.states() == [FREE] * 4)
    [(slot, token, owner, name)] = device.claims
    assert (slot, owner, name) == (0, pid, program.name[:55])
    assert device.sysfs(0) == (device.place / "resource0").stat().st_dev
    assert device.releases == [(0, token)]
    assert (device.stores["OWNER"], device.stores["RELEASE"]) == (1, 1)
    assert isinstance(device.grant, PythonHost)
    assert device.grant.host.problems == []
    assert device.grant.sessions[0].calls["wireGoodbye"] == 1


def test_a_run_dir_means_sockets_only(program: Path, device: FakeDevice) -> None:
    with Guest(program, device.folder, VGPU_RUN_DIR=str(device.folder)) as guest:
        assert guest.ask("init") == NO_DEVICE
        guest.finish()
    assert device.claims == []


def test_the_version_costs_no_claim(program: Path, folder: Path) -> None:
    with FakeDevice(folder, PythonHost(), driver_version=12040) as device:
        with Guest(program, folder) as guest:
            assert guest.ask("version") == "version 12040"
            guest.finish()
        assert device.claims == []
        assert device.stores.total() == 0


def test_the_device_has_the_address_it_has_here(program: Path, folder: Path) -> None:
    with FakeDevice(folder, PythonHost(), address="0002:41:1f.0"), Guest(program, folder) as guest:
        guest.ask("init")
        assert guest.ask("identity") == "0002:41:1F.0 2 65 31 0 0"
        guest.finish()


def test_of_several_the_lowest_that_is_one(program: Path, folder: Path) -> None:
    with FakeDevice(folder, PythonHost(), address="0000:00:07.0") as second:
        for address, spoilt in (
            ("0000:00:03.0", "vendor"),
            ("0000:00:04.0", "driver"),
            ("0000:00:02.0", "magic"),
        ):
            other = second.place.parent / address
            other.mkdir()
            for name in ("vendor", "device", "enable"):
                (other / name).write_text((second.place / name).read_text())
            for name, size in (("resource0", 65536), ("resource1", 1 << 20)):
                with (other / name).open("wb") as file:
                    file.truncate(size)
            if spoilt == "vendor":
                (other / "vendor").write_text("0x8086\n")
            elif spoilt == "driver":
                (other / "driver").symlink_to("/")
        with Guest(program, folder, VGPU_LOG="1") as guest:
            assert guest.ask("init") == "init 0"
            assert guest.ask("identity").startswith("0000:00:07.0")
            said = guest.finish()
        assert "0000:00:02.0 is no virtual GPU" in said
        assert "0000:00:04.0 has a driver" in said


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("magic", 1, NO_DEVICE),
        ("layout_version", 2, MISMATCH),
        ("table_hash", 5, MISMATCH),
        ("slot_count", 0, MISMATCH),
        ("slot_count", 128, MISMATCH),
        ("slot_count", 5, MISMATCH),
        ("first_slot", 4096, MISMATCH),
        ("first_slot", 1 << 63, MISMATCH),
        ("slot_size", 4096, MISMATCH),
        ("slot_size", 1 << 62, MISMATCH),
        ("slot_size", (2 << 20) + 1, MISMATCH),
    ],
)
def test_a_directory_that_cannot_be(
    program: Path, device: FakeDevice, field: str, value: int, code: str
) -> None:
    device.set_field(field, value)
    answer, said = log_of(program, device.folder)
    assert answer == code
    first, *rest = said.splitlines()
    assert "0000:00:05.0" in first
    # What is no virtual GPU leaves the sockets to be looked for.
    assert ["no device: no mediator" in line for line in rest] == [True] * (code == NO_DEVICE)
    assert device.claims == []


def test_registers_that_nobody_answers(program: Path, device: FakeDevice) -> None:
    device.registers[:4] = b"\xff" * 4
    answer, said = log_of(program, device.folder)
    assert answer == NO_DEVICE
    assert "nobody is behind it" in said


# ---- permissions ----


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_user_who_may_not_is_told_in_the_log_only(program: Path, device: FakeDevice) -> None:
    (device.place / "resource0").chmod(0o600)
    with Guest(program, device.folder, user=65534) as guest:
        assert guest.ask("init") == NO_DEVICE
        assert guest.finish() == ""
    answer, said = log_of(program, device.folder, user=65534)
    assert answer == NO_DEVICE
    assert re.search(r"0000:00:05\.0 cannot be opened.*Permission denied", said)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_user_who_may(program: Path, device: FakeDevice) -> None:
    for name in ("resource0", "resource1"):
        (device.place / name).chmod(0o666)
    with Guest(program, device.folder, user=65534) as guest:
        assert guest.ask("init") == "init 0"
        guest.finish()


def test_a_device_that_is_off_is_switched_on(program: Path, device: FakeDevice) -> None:
    device.write("enable", "0\n")
    with Guest(program, device.folder) as guest:
        assert guest.ask("init") == "init 0"
        guest.finish()
    assert (device.place / "enable").read_text()[0] == "1"


@pytest.mark.parametrize(("command", "on"), [(b"\x02\x00", True), (b"\x05\x00", False)])
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_switching_on_needs_root_unless_the_firmware_did(
    program: Path, device: FakeDevice, command: bytes, on: bool
) -> None:
    for name in ("resource0", "resource1"):
        (device.place / name).chmod(0o666)
    device.write("enable", "0\n")
    (device.place / "config").write_bytes(b"\xde\x10\x31\x23" + command)
    answer, said = log_of(program, device.folder, user=65534)
    assert answer == ("init 0" if on else NO_DEVICE)
    assert on or "needs root" in said


# ---- slots ----


def test_each_process_has_a_slot_and_the_last_one_waits(program: Path, device: FakeDevice) -> None:
    guests = [Guest(program, device.folder) for _ in range(5)]
    try:
        for guest in guests:
            guest.say("init")
        until(lambda: sum(guest.heard() for guest in guests) == 4)
        assert device.states() == [READY] * 4
        time.sleep(0.3)
        answered = [guest for guest in guests if guest.heard()]
        assert len(answered) == 4
        [last] = [guest for guest in guests if guest not in answered]
        for guest in answered:
            assert guest.hear() == "init 0"
            assert guest.ask("launch 50") == "launched 0"
        assert {guest.ask("slot") for guest in answered} == {f"slot {n}" for n in range(4)}
        answered[0].finish()
        assert last.hear() == "init 0"
        assert last.ask("launch 50") == "launched 0"
    finally:
        for guest in guests:
            guest.__exit__()
    assert len({token for _, token, _, _ in device.claims}) == 5


@pytest.mark.parametrize("end", ["killed", "_exit"])
def test_a_dead_owner_is_found_by_who_needs_its_slot(program: Path, folder: Path, end: str) -> None:
    with FakeDevice(folder, PythonHost(), slots=1) as device:
        with Guest(program, folder) as first:
            assert first.ask("init") == "init 0"
            if end == "killed":
                first.process.kill()
            else:
                first.say("abort-at-once")
            first.process.wait(60)
        assert device.states() == [READY]
        began = time.monotonic()
        with Guest(program, folder) as second:
            assert second.ask("init") == "init 0"
            assert time.monotonic() - began < 30
            second.finish()
        until(lambda: device.states() == [FREE])
        assert [token for _, token in device.releases] == [token for _, token, _, _ in device.claims]
        assert device.problems == []


def test_a_dead_owner_is_found_by_any_process_that_lives(program: Path, device: FakeDevice) -> None:
    with Guest(program, device.folder) as living, Guest(program, device.folder) as dying:
        assert living.ask("init") == "init 0"
        assert dying.ask("init") == "init 0"
        dying.process.kill()
        until(lambda: sorted(device.states()) == [FREE, FREE, FREE, READY], 60)
        assert living.ask("launch 20") == "launched 0"
        living.finish()


def test_a_stopped_process_is_not_dead(program: Path, folder: Path) -> None:
    with (
        FakeDevice(folder, PythonHost(), slots=1) as device,
        Guest(program, folder) as first,
        Guest(program, folder) as second,
    ):
        assert first.ask("init") == "init 0"
        first.process.send_signal(signal.SIGSTOP)
        second.say("init")
        time.sleep(3)
        assert device.releases == []
        first.process.send_signal(signal.SIGCONT)
        assert first.ask("launch 20") == "launched 0"
        first.finish()
        assert second.hear() == "init 0"
        second.finish()


def test_a_lock_of_another_sysfs_says_nothing(program: Path, folder: Path) -> None:
    """A process of another network namespace locks another file: only its heartbeat says whether it lives."""
    host = PythonHost()
    with FakeDevice(folder, host, slots=1) as device, Guest(program, folder) as first:
        assert first.ask("init") == "init 0"
        [(_, token, _, _)] = device.claims
        # Another file from now on, with other locks, and the first process says that it sees another one.
        seen = device.place / "resource0_seen_elsewhere"
        seen.write_bytes(device.registers[:])
        (device.place / "resource0").rename(device.place / "resource0_seen_here")
        (device.place / "resource0").symlink_to(seen.name)
        device.set_sysfs(0, 12345)

        def released() -> int:
            return struct.unpack_from("<I", seen.read_bytes(), 4096 + 0x10)[0]  # type: ignore[no-any-return]

        with Guest(program, folder) as second:
            second.say("init")
            time.sleep(3.5)
            assert released() == 0
            assert first.ask("launch 20") == "launched 0"
            [session] = host.sessions
            beat = session.load64(HEARTBEAT)
            until(lambda: session.load64(HEARTBEAT) != beat)
            first.process.kill()
            killed = time.monotonic()
            until(lambda: released() == token)
            # It was given the time of some heartbeats, from its last one, which had been not long ago.
            assert time.monotonic() - killed > 0.9


def put_in_again(device: FakeDevice) -> None:
    """Taken out and put in between two looks. Kernels leave mappings in place, and they reach the new device; its files are new."""
    (device.place / "new").write_bytes(device.registers[:])
    (device.place / "new").rename(device.place / "resource0")


def test_the_locks_of_a_device_taken_out_say_nothing_of_the_next(program: Path, device: FakeDevice) -> None:
    with Guest(program, device.folder) as living:
        assert living.ask("init") == "init 0"
        put_in_again(device)
        # Another process's session, as far as the old files tell one whose owner is dead.
        device.set_entry(1, token=77, pid=1, state=READY)
        device.set_sysfs(1, device.sysfs(0))
        time.sleep(5)  # two sweeps
        assert device.releases == []
        assert living.ask("launch 20") == "launched 0"
        living.finish()
    until(lambda: device.states() == [FREE, READY, FREE, FREE])


def test_who_waits_for_a_slot_of_a_device_taken_out_waits_no_longer(program: Path, folder: Path) -> None:
    with FakeDevice(folder, PythonHost(), slots=1) as device:
        with Guest(program, folder) as living, Guest(program, folder) as waiting:
            assert living.ask("init") == "init 0"
            waiting.say("init")
            until(lambda: waiting.has_open("resource0"))
            time.sleep(0.3)
            put_in_again(device)
            assert waiting.hear() == UNAVAILABLE
        assert (len(device.claims), device.releases) == (1, [])


def test_a_forked_child_does_not_keep_the_slot(program: Path, folder: Path) -> None:
    with FakeDevice(folder, PythonHost(), slots=1) as device:
        with Guest(program, folder) as first:
            assert first.ask("init") == "init 0"
            child = int(first.ask("leave-child").split()[1])
            first.process.kill()
            first.process.wait(60)
        try:
            with Guest(program, folder) as second:
                assert second.ask("init") == "init 0"
                second.finish()
        finally:
            os.kill(child, signal.SIGKILL)
        assert device.problems == []


def test_a_forked_child_is_not_initialised_and_its_parent_goes_on(program: Path, device: FakeDevice) -> None:
    with Guest(program, device.folder) as guest:
        assert guest.ask("init") == "init 0"
        assert guest.ask("fork") == "child 3"
        assert guest.hear() == "parent 0"
        assert guest.ask("launch 20") == "launched 0"
        guest.finish()
    until(lambda: device.states() == [FREE] * 4)
    assert len(device.releases) == 1


# ---- what the host may answer ----


def test_busy_is_asked_again(program: Path, device: FakeDevice) -> None:
    device.refuse += [(1, 50), (1, 50), (1, 50)]
    began = time.monotonic()
    with Guest(program, device.folder) as guest:
        assert guest.ask("init") == "init 0"
        guest.finish()
    assert time.monotonic() - began > 0.07  # half of what was asked for, at least
    assert len(device.claims) == 4
    until(lambda: device.states() == [FREE] * 4)
    assert len(device.releases) == 4


@pytest.mark.parametrize(("status", "code"), [(2, NO_DEVICE), (3, UNAVAILABLE), (4, MISMATCH)])
def test_a_refusal_is_an_error_and_the_slot_is_free_again(
    program: Path, device: FakeDevice, status: int, code: str
) -> None:
    device.refuse.append((status, 0))
    with Guest(program, device.folder) as guest:
        assert guest.ask("init") == code
        until(lambda: device.states() == [FREE] * 4)
        assert guest.ask("init") == "init 0"  # asked again, it may be granted
        guest.finish()


def test_a_worker_that_dies_while_it_starts_is_replaced(program: Path, device: FakeDevice) -> None:
    device.refuse += [(100, 0), (100, 0)]
    with Guest(program, device.folder) as guest:
        assert guest.ask("init") == "init 0"
        guest.finish()
    assert len(device.claims) == 3


def test_workers_that_all_die_are_an_error(program: Path, device: FakeDevice) -> None:
    device.refuse += [(100, 0)] * 3
    with Guest(program, device.folder) as guest:
        assert guest.ask("init") == UNAVAILABLE
    until(lambda: device.states() == [FREE] * 4)


def test_a_claim_waits_for_a_mediator_that_is_away(program: Path, device: FakeDevice) -> None:
    device.answering = False
    device.set_present(False)
    with Guest(program, device.folder) as guest:
        guest.say("init")
        until(lambda: device.states()[0] == PENDING)
        time.sleep(0.5)
        assert device.states() == [PENDING, FREE, FREE, FREE]
        device.set_present(True)
        device.answering = True
        assert guest.hear() == "init 0"
        guest.finish()
    assert len(device.claims) == 1


def test_a_mediator_that_stays_away_is_an_error_in_the_end(device: FakeDevice) -> None:
    device.answering = False
    device.set_present(False)
    with Guest(build_program("pci_guest", "-DHOST_LIMIT_NS=1500000000ull"), device.folder) as guest:
        began = time.monotonic()
        assert guest.ask("init") == UNAVAILABLE
        assert 1.4 < time.monotonic() - began < 30
        assert guest.finish() == ""
    until(lambda: device.states() == [FREE] * 4)


def test_a_process_killed_while_it_waits_leaves_nothing(program: Path, folder: Path) -> None:
    with FakeDevice(folder, PythonHost(), slots=1, answering=False) as device:
        with Guest(program, folder) as first:
            first.say("init")
            until(lambda: device.states() == [PENDING])
        with Guest(program, folder) as second:
            second.say("init")
            until(lambda: len(device.releases) == 1, 60)
            device.answering = True
            assert second.hear() == "init 0"
            second.finish()
        assert device.problems == []


def test_a_store_that_nobody_notices(program: Path, device: FakeDevice) -> None:
    """A device process that hangs: its registers still read well, and nothing follows a claim."""
    device.stand_still()
    with Guest(program, device.folder) as guest:
        assert guest.ask("init", 30) == UNAVAILABLE
        assert guest.finish() == ""
