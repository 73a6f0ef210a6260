# SPDX-License-Identifier: Apache-2.0
"""A session over the virtual GPU while it lives, and when the worker, the device's process or the device itself goes away."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shim.fake_device import FIRST_SLOT, FakeDevice, PythonHost
from tests.shim.fake_host import NAME, SESSION, FakeHost, Session, short_folder
from tests.shim.pci_guest import UNCACHED, Guest, build_program, environment, until
from vgpu.transport._generated_calls import CallId
from vgpu.transport.layout import GUEST_TIME_FIELDS

HEARTBEAT, LOCAL_CALLS = SESSION + 192, SESSION + 4608
UNAVAILABLE, UNKNOWN = 46, 999


@pytest.fixture(scope="module", params=["cached", "uncached"])
def program(request: pytest.FixtureRequest) -> Path:
    return build_program("pci_guest", *([UNCACHED] if request.param == "uncached" else []))


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


@pytest.fixture
def host() -> PythonHost:
    return PythonHost()


@pytest.fixture
def device(folder: Path, host: PythonHost) -> Iterator[FakeDevice]:
    with FakeDevice(folder, host) as made:
        yield made
        assert made.problems == []
        assert host.host.problems == []


@pytest.fixture
def guest(program: Path, device: FakeDevice) -> Iterator[Guest]:
    with Guest(program, device.folder) as made:
        assert made.ask("init") == "init 0"
        yield made


def only(host: PythonHost) -> Session:
    [session] = host.sessions
    return session


# ---- living ----


def test_records_go_round_a_small_ring(program: Path, guest: Guest, host: PythonHost) -> None:
    identical, combining, uncached = guest.ask("segment").split()[:3]
    assert (identical, combining) == ("1", "1")
    assert uncached == str(int("ASSUME" in program.name))
    assert guest.ask("launch 1500") == "launched 0"
    records = [(c, p) for c, p in only(host).records if c.call == CallId.cuMemPoolTrimTo]
    assert [c.arguments[0] for c, _ in records] == list(range(1500))
    assert max(len(p) for _, p in records) > 65000
    assert only(host).pads > 100


def test_the_heartbeat_beats_and_carries_the_counters(guest: Guest, host: PythonHost) -> None:
    session = only(host)
    before, began = session.load64(HEARTBEAT), time.monotonic()
    time.sleep(2.2)
    assert session.load64(HEARTBEAT) - before <= 2 * (time.monotonic() - began) + 1
    until(lambda: session.load64(HEARTBEAT) - before >= 3)
    for _ in range(10):
        guest.ask("local")
    until(lambda: session.load64(LOCAL_CALLS) >= 0 and session.load64(LOCAL_CALLS + 24) >= 1)


def test_the_heartbeat_carries_where_the_time_goes(guest: Guest, host: PythonHost) -> None:
    """In a VM the library counts in memory of its own; the page gets copies."""
    session = only(host)

    def said(name: str) -> int:
        return session.load64(SESSION + GUEST_TIME_FIELDS[name][0])

    assert guest.ask("launch 1500") == "launched 0"
    until(lambda: said("ticks_per_second") != 0 and said("answer_ticks") + said("room_ticks") != 0)
    assert 10**6 < said("ticks_per_second") < 10**11
    assert said("answer_waits") + said("room_waits") > 0


def test_only_a_worker_that_sleeps_is_rung_for(program: Path, folder: Path) -> None:
    host = PythonHost(FakeHost(Path("/nonexistent"), ring_size=1 << 18, slot_count=64, spin=True))
    with FakeDevice(folder, host) as device, Guest(program, folder) as guest:
        guest.ask("init")
        assert guest.ask("launch 2000") == "launched 0"
        guest.finish()
        until(lambda: device.stores["RELEASE"] == 1)
        assert dict(device.stores) == {"OWNER": 1, "RELEASE": 1}


def test_a_worker_that_sleeps_is_rung_for(guest: Guest, device: FakeDevice, host: PythonHost) -> None:
    time.sleep(0.1)
    assert guest.ask("launch 5") == "launched 0"
    # The worker looks by itself as well, now and then, and may be faster than the bell.
    until(lambda: device.stores["DOORBELL"] >= 1)
    until(lambda: only(host).doorbells >= 1)


def test_waiting_costs_next_to_nothing(guest: Guest, host: PythonHost) -> None:
    host.host.paused.set()
    assert guest.ask("wait-beside") == "waiting"
    time.sleep(0.3)
    assert int(guest.ask("idle-cost")) < 60_000  # microseconds of a second; 5 000 are usual
    host.host.paused.clear()
    assert guest.hear() == "waited 0"


def test_a_host_function_runs_soon_and_nothing_is_asked_afterwards(guest: Guest, host: PythonHost) -> None:
    session = only(host)
    assert guest.ask("pin 4096") == "pinned 0 1"
    real = session._replay_one

    def replay(call, payload):  # type: ignore[no-untyped-def]
        if call.call == CallId.wireHostFunction:
            entry = SESSION + 512
            session.store64(entry + 8, call.arguments[1])
            session.store64(entry + 16, call.arguments[2])
            session.store(entry, 1)
            until(lambda: session.load(entry) == 3)
            session.store(entry, 0)
        real(call, payload)

    session._replay_one = replay  # type: ignore[method-assign]
    took = []
    for number in range(1, 21):
        began = time.monotonic()
        assert guest.ask("host-function") == f"called 0 {number}"
        took.append(time.monotonic() - began)
    assert statistics.median(took) < 0.05  # 0.1 s where it is looked for as seldom as when none is expected
    time.sleep(0.2)
    assert int(guest.ask("idle-cost")) < 20_000


def test_memory_that_is_still_pinned_stays_the_programs_own(
    program: Path, device: FakeDevice, host: PythonHost
) -> None:
    with Guest(program, device.folder) as guest:
        guest.ask("init")
        assert guest.ask("pin 100000") == "pinned 0 1"
        guest.finish()
    until(lambda: only(host).calls["wireGoodbye"] == 1)
    assert device.releases == []  # the lock tells; whoever looks next releases it
    with Guest(program, device.folder) as guest:
        guest.ask("init")
        until(lambda: len(device.releases) == 1, 60)
        assert guest.ask("pin 100000") == "pinned 0 1"
        assert guest.ask("unpin") == "unpin 0"
        guest.finish()
    until(lambda: len(device.releases) == 2)


# ---- ends ----


def test_a_worker_that_dies_ends_the_session(guest: Guest, device: FakeDevice, host: PythonHost) -> None:
    session = only(host)
    host.host.paused.set()
    assert guest.ask("wait-beside") == "waiting"
    session.store(SESSION + 388, UNKNOWN)
    session.store(SESSION + 384, 3)
    assert guest.hear() == f"waited {UNKNOWN}"
    assert guest.ask("sync") == f"sync {UNKNOWN}"
    assert guest.finish() == ""
    until(lambda: device.states() == [0] * 4)


def test_a_device_process_that_dies_is_noticed_without_a_wait(guest: Guest, device: FakeDevice) -> None:
    device.vanish()
    until(lambda: not guest.has_device_mapped())
    assert guest.ask("sync") == f"sync {UNAVAILABLE}"
    assert guest.ask("local") == f"0 1 132 {NAME}"
    assert guest.finish() == ""


def test_a_device_process_that_dies_ends_a_wait(guest: Guest, device: FakeDevice, host: PythonHost) -> None:
    host.host.paused.set()
    assert guest.ask("wait-beside") == "waiting"
    device.vanish()
    began = time.monotonic()
    assert guest.hear(60) == f"waited {UNAVAILABLE}"
    assert time.monotonic() - began < 30


def test_a_heartbeat_that_stands_is_not_yet_a_loss(guest: Guest, device: FakeDevice) -> None:
    device.stand_still()
    time.sleep(3.5)
    assert guest.ask("launch 20") == "launched 0"


@pytest.mark.parametrize("doing", ["waiting", "idle", "filling"])
def test_a_device_that_is_unplugged_is_an_error_and_no_signal(
    program: Path, device: FakeDevice, host: PythonHost, doing: str
) -> None:
    with Guest(program, device.folder) as guest:
        assert guest.ask("init") == "init 0"
        assert guest.ask("pin 100000") == "pinned 0 1"
        if doing == "waiting":
            host.host.paused.set()
            assert guest.ask("wait-beside") == "waiting"
            time.sleep(0.1)
        device.unplug()
        if doing == "waiting":
            assert guest.hear(60) == f"waited {UNAVAILABLE}"
        if doing == "filling":
            assert guest.ask("fill") == f"filled {UNAVAILABLE}"
        assert guest.ask("sync") == f"sync {UNAVAILABLE}"
        assert guest.ask("local") == f"0 1 132 {NAME}"
        assert guest.finish() == ""


@pytest.mark.parametrize("doing", ["waiting", "idle", "filling"])
@pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
def test_a_device_that_is_unplugged_and_whose_mappings_stay(
    program: Path, device: FakeDevice, host: PythonHost, doing: str, byte: bytes
) -> None:
    with Guest(program, device.folder) as guest:
        assert guest.ask("init") == "init 0"
        assert guest.ask("pin 100000") == "pinned 0 1"
        if doing == "waiting":
            host.host.paused.set()
            assert guest.ask("wait-beside") == "waiting"
            time.sleep(0.1)
        device.blank(byte)
        if doing == "waiting":
            assert guest.hear(60) == f"waited {UNAVAILABLE}"
        if doing == "filling":
            assert guest.ask("fill") == f"filled {UNAVAILABLE}"
        assert guest.ask("sync") == f"sync {UNAVAILABLE}"
        assert guest.ask("local") == f"0 1 132 {NAME}"
        until(lambda: not guest.has_device_mapped())
        # It has let go: what another device may have there by now is left alone.
        device.memory[:] = bytes(len(device.memory))
        assert guest.ask("fill") == f"filled {UNAVAILABLE}"
        time.sleep(0.7)
        assert device.memory[:] == bytes(len(device.memory))
        assert guest.finish() == ""


def test_a_slot_that_was_given_to_another_is_left_alone(guest: Guest, device: FakeDevice) -> None:
    """A host may do that to a process that has shown no life for long."""
    assert guest.ask("pin 100000") == "pinned 0 1"
    device.stand_still()
    device.set_entry(0, token=12345)
    until(lambda: not guest.has_device_mapped())
    left = device.memory[FIRST_SLOT : FIRST_SLOT + device.slot_size]
    assert guest.ask("fill") == f"filled {UNAVAILABLE}"
    time.sleep(0.6)
    assert device.memory[FIRST_SLOT : FIRST_SLOT + device.slot_size] == left
    assert guest.finish() == ""


def test_another_fault_is_the_programs_own(program: Path, device: FakeDevice) -> None:
    with Guest(program, device.folder) as guest:
        assert guest.ask("init") == "init 0"
        guest.say("own-fault")
        assert guest.process.wait(60) == -7
    with Guest(program, device.folder, "chained") as guest:
        assert guest.ask("init") == "init 0"
        assert guest.ask("own-fault") == "survived 1"
        assert guest.ask("sync") == "sync 0"
        guest.finish()


def test_an_unplugged_device_ends_a_claim(program: Path, device: FakeDevice) -> None:
    device.answering = False
    with Guest(program, device.folder) as guest:
        guest.say("init")
        until(lambda: device.states()[0] == 1)
        device.unplug()
        assert guest.hear(60) == f"init {UNAVAILABLE}"
        assert guest.ask("init") == "init 100"  # it is not there any more
        assert guest.finish() == ""


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_threads_under_sanitizers(folder: Path, sanitizer: str) -> None:
    """Ring, waits, heartbeat, goodbye and release, with a heartbeat or two meanwhile."""
    host = PythonHost(first_address=0)  # a sanitizer keeps most addresses to itself
    program = build_program("core_guest", f"-fsanitize={sanitizer}", "-O1")
    with FakeDevice(folder, host) as device:
        done = subprocess.run(
            [program, "threads", "8", "150"],
            cwd=folder,
            env=environment(folder, ASAN_OPTIONS="detect_leaks=0"),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        until(lambda: device.stores["RELEASE"] == 1)
        until(only(host).done.is_set)  # what the guest sent last may lie in the ring still
        assert device.problems == []
        assert host.host.problems == []
    assert only(host).calls["cuMemPoolTrimTo"] == 8 * (150 + 19)
