# SPDX-License-Identifier: Apache-2.0
"""Device pages as telemetry writes them: for a VM's BAR1, and for processes of the host."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import struct
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.shim.nvml.page_host import TEXTS, UUID_TEXT, page_bytes
from vgpu.actors import Actor, ActorSpec, ActorSystem, Refused, handles, open_system
from vgpu.actors.gpu_time import GpuTimes, MeasureGpuTime
from vgpu.actors.ledger import Ledger, LedgerFile
from vgpu.actors.messages import (
    AttachDevice,
    DescribeGpu,
    DetachDevice,
    ListSessions,
    MarkVm,
    MeasureUse,
    OpenPage,
    Sample,
    SampleGpu,
    SessionId,
    SessionInfo,
    SessionSample,
    SessionUse,
    VmRecord,
    Watch,
)
from vgpu.actors.page_writer import LEASES_PER_VM, NoPage
from vgpu.actors.telemetry import Telemetry
from vgpu.gpu.drift import GpuTimeWindow
from vgpu.gpu.sampling import DeviceIdentity, GpuSample
from vgpu.transport.layout import (
    DEVICE_FIELDS,
    DEVICE_PAGE_SIZE,
    DEVICE_TEXTS,
    PROCESS_FORMAT,
    SEGMENT_MAGIC,
    STATE_QUARANTINED,
    STATE_RATE_LIMITED,
    UNKNOWN,
    UNKNOWN_64,
)

GIB = 1 << 30
PERIOD = 0.02
BAR1_SIZE = 1 << 20
# A page as a worker leaves it: it knows the card, and nothing of its state.
CARD = page_bytes(
    {
        name: 0
        for name, (offset, _) in DEVICE_FIELDS.items()
        if offset >= DEVICE_FIELDS["telemetry_sequence"][0]
    }
    | {"total_memory_bytes": 80 * GIB},
    dict.fromkeys(("vbios_version", "nvml_version", "serial", "board_part_number"), ""),
)


@attrs.define
class Reading:
    """A copy of a page, as a guest takes one."""

    data: bytes

    def __getitem__(self, name: str) -> int:
        offset, kind = DEVICE_FIELDS[name]
        (value,) = struct.unpack_from(f"<{kind}", self.data, offset)
        return int(value)

    def text(self, name: str) -> str:
        offset, size = DEVICE_TEXTS[name]
        return self.data[offset : offset + size].split(b"\0", 1)[0].decode()

    def processes(self) -> list[tuple[int, ...]]:
        """pid, SM utilisation, memory, session."""
        offset, _ = DEVICE_TEXTS["process"]
        size = struct.calcsize(PROCESS_FORMAT)
        return [
            struct.unpack_from(PROCESS_FORMAT, self.data, offset + size * i)
            for i in range(self["process_count"])
        ]


def read(fd: int) -> Reading:
    """A consistent copy, taken as docs/wire.md says."""
    for _ in range(1000):
        data = os.pread(fd, DEVICE_PAGE_SIZE, 0)
        before = Reading(data)["telemetry_sequence"]
        again = Reading(os.pread(fd, DEVICE_PAGE_SIZE, 0))["telemetry_sequence"]
        if before == again and before % 2 == 0:
            return Reading(data)
    raise AssertionError("the page is never consistent")


@attrs.define(eq=False)
class FakeSampler:
    """Counts how often it is asked; its temperature is that count."""

    calls: int = 0
    asked_with: list[Mapping[int, int]] = attrs.Factory(list)
    base: GpuSample = attrs.Factory(
        lambda: GpuSample(power_milliwatts=300_000, serial="0815", sm_utilization={901: 12})
    )
    lock: threading.Lock = attrs.Factory(threading.Lock)

    def sample(self, work: Mapping[int, int]) -> GpuSample:
        with self.lock:
            self.calls += 1
            self.asked_with.append(work)
            return attrs.evolve(self.base, temperature_celsius=self.calls)


@attrs.define(eq=False)
class Pool(Actor):
    """Stands for the warm workers."""

    page: bytes | None = CARD
    asked: int = 0

    @handles(DescribeGpu)
    def describe(self, message: DescribeGpu) -> bytes:
        self.asked += 1
        if self.page is None:
            raise Refused(NoPage("no worker can be started"))
        return self.page


@attrs.define(eq=False)
class Session(Actor):
    """Stands for an executor."""

    use: SessionUse

    @handles(MeasureUse)
    def measure(self, message: MeasureUse) -> SessionUse:
        return self.use


@attrs.define
class World:
    """Telemetry with everything it asks, under the test's control."""

    system: ActorSystem
    sampler: FakeSampler
    pool: Pool
    identities: list[DeviceIdentity]

    async def send(self, message: object) -> None:
        assert await self.system.ref("mediator/telemetry").send(message)

    async def begin(
        self, session: int, vm: str, *, pid: int, slot: int | None = None, memory: int = 0, gpu_ns: int = 0
    ) -> Session:
        info = SessionInfo(SessionId(session), vm, pid, "train", "w1", 900 + session, slot=slot)
        actor = Session(SessionUse(info, memory, gpu_ns))
        executor = await self.system.spawn(ActorSpec(f"session{session}", lambda: actor))
        await self.send(Watch(SessionId(session), executor))
        return actor

    @contextlib.asynccontextmanager
    async def page(self, vm: str) -> AsyncIterator[int]:
        """A reader's descriptor while the block runs."""
        lease = await self.system.ref("mediator/telemetry").ask(OpenPage(vm))
        try:
            assert lease.driver_version == 13000
            yield lease.descriptor
        finally:
            lease.release()

    async def written_again(self, fd: int) -> Reading:
        """What the page says after it was written twice from now, so that nothing older than now is in it."""
        first = read(fd)["telemetry_sequence"]
        with trio.fail_after(60):
            while read(fd)["telemetry_sequence"] < first + 4:
                await trio.sleep(PERIOD / 4)
        return read(fd)


@asynccontextmanager
async def telemetry(tmp_path: Path, page: bytes | None = CARD) -> AsyncIterator[World]:
    sampler, pool = FakeSampler(), Pool(page)
    identities: list[DeviceIdentity] = []

    def make_sampler(identity: DeviceIdentity) -> FakeSampler:
        identities.append(identity)
        return sampler

    ledger = LedgerFile(tmp_path / "ledger.sqlite")
    ledger.save_vm(VmRecord("small", memory_limit_bytes=10 * GIB))
    ledger.close()
    async with open_system() as system:
        await system.spawn(ActorSpec("mediator/ledger", lambda: Ledger(tmp_path / "ledger.sqlite")))
        await system.spawn(ActorSpec("pool", lambda: pool))
        await system.spawn(
            ActorSpec("mediator/telemetry", lambda: Telemetry("pool", make_sampler, period_seconds=PERIOD))
        )
        yield World(system, sampler, pool, identities)


@pytest.fixture
def bar1() -> Iterator[int]:
    """A BAR1 as a device process makes one."""
    fd = os.memfd_create("bar1", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, BAR1_SIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    yield fd
    os.close(fd)


async def until_written(fd: int) -> Reading:
    with trio.fail_after(60):
        while os.pread(fd, 8, 0) != CARD[:8]:
            await trio.sleep(PERIOD / 4)
    return read(fd)


async def test_a_vms_page_says_what_the_gpu_is_and_how_it_is(tmp_path: Path, bar1: int) -> None:
    async with telemetry(tmp_path) as world:
        await world.begin(1, "vm1", pid=77, slot=3, memory=GIB, gpu_ns=5)
        await world.begin(2, "vm1", pid=78, slot=4, memory=2 * GIB)
        await world.begin(3, "other", pid=79, slot=0, memory=4 * GIB)
        await world.begin(4, "vm1", pid=5000, memory=8 * GIB)  # a process of the host, run as this VM
        await world.send(AttachDevice("vm1", os.dup(bar1)))
        await until_written(bar1)
        page = await world.written_again(bar1)
        assert page.text("name") == TEXTS["name"]
        assert page.text("driver_version_text") == TEXTS["driver_version_text"]
        assert page["driver_version"] == 13000
        assert page["total_memory_bytes"] == 80 * GIB
        assert page.data[936:1792] == CARD[936:1792]  # attributes
        assert page["temperature_celsius"] > 0
        assert page["power_milliwatts"] == 300_000
        assert page.text("serial") == "0815"
        assert page.text("vbios_version") == ""
        for name in ("gpu_utilization_percent", "fan_percent", "ecc_enabled", "memory_bus_width_bits"):
            assert page[name] == UNKNOWN, name
        for name in ("energy_millijoules", "throttle_reasons", "memory_reserved_bytes"):
            assert page[name] == UNKNOWN_64, name
        assert page["memory_used_bytes"] == 11 * GIB
        assert page.processes() == [(77, 12, GIB, 1), (78, UNKNOWN, 2 * GIB, 2)]
        assert page["device_state"] == 0
        assert abs(page["telemetry_ns"] - time.time_ns()) < 5 * 10**9
        # What lies behind the page is the device's own.
        assert os.pread(bar1, BAR1_SIZE, DEVICE_PAGE_SIZE) == bytes(BAR1_SIZE - DEVICE_PAGE_SIZE)
        # The GPU was identified by what the worker's page says, and measured with what the workers did.
        assert world.identities == [DeviceIdentity(UUID_TEXT, "0000:41:00.0", False)]
        assert world.sampler.asked_with[-1] == {901: 5, 902: 0, 903: 0, 904: 0}
        assert world.pool.asked == 1


async def test_values_move(tmp_path: Path, bar1: int) -> None:
    async with telemetry(tmp_path) as world:
        session = await world.begin(1, "vm1", pid=77, slot=0)
        await world.send(AttachDevice("vm1", os.dup(bar1)))
        before = await until_written(bar1)
        session.use = attrs.evolve(session.use, memory_used_bytes=3 * GIB)
        after = await world.written_again(bar1)
        assert after["temperature_celsius"] > before["temperature_celsius"]
        assert (before["memory_used_bytes"], after["memory_used_bytes"]) == (0, 3 * GIB)
        assert after["telemetry_ns"] > before["telemetry_ns"]


async def test_a_call_that_goes_on_is_work(tmp_path: Path) -> None:
    """The software GPU computes inside the call, and its worker counts the time when it is over."""
    async with telemetry(tmp_path) as world, world.page("vm1") as fd:
        session = await world.begin(1, "vm1", pid=5001, gpu_ns=7)
        session.use = attrs.evolve(session.use, records=3, in_call=True)
        await world.written_again(fd)
        await world.written_again(fd)
        after = world.sampler.asked_with[-1][901]
        assert 7 < after < 5 * 10**9
        await world.written_again(fd)
        assert world.sampler.asked_with[-1][901] > after
        session.use = attrs.evolve(session.use, records=4, in_call=True)  # another call
        before = len(world.sampler.asked_with)
        await world.written_again(fd)
        assert 7 in [work[901] for work in world.sampler.asked_with[before:]]
        session.use = attrs.evolve(session.use, gpu_ns=8, in_call=False)
        await world.written_again(fd)
        assert world.sampler.asked_with[-1] == {901: 8}


async def test_a_share_of_the_memory_is_the_whole_memory(tmp_path: Path, bar1: int) -> None:
    async with telemetry(tmp_path) as world:
        # The driver counts 80 GiB; NVML one more, of which the driver keeps three quarters and what it has left out.
        world.sampler.base = attrs.evolve(
            world.sampler.base,
            card_memory_total_bytes=81 * GIB,
            card_memory_reserved_bytes=GIB + 3 * GIB // 4,
        )
        await world.send(AttachDevice("small", os.dup(bar1)))
        small = await until_written(bar1)
        assert (small["total_memory_bytes"], small["memory_reserved_bytes"]) == (10 * GIB, 0)
        async with world.page("vm1") as fd:
            whole = await world.written_again(fd)
            assert (whole["total_memory_bytes"], whole["memory_reserved_bytes"]) == (80 * GIB, 3 * GIB // 4)


async def test_how_a_vm_is_treated_shows(tmp_path: Path) -> None:
    async with telemetry(tmp_path) as world, world.page("vm1") as fd:
        await world.send(MarkVm("vm1", quarantined=True, rate_limited=True))
        assert (await world.written_again(fd))["device_state"] == STATE_QUARANTINED | STATE_RATE_LIMITED
        await world.send(MarkVm("vm1", rate_limited=True))
        assert (await world.written_again(fd))["device_state"] == STATE_RATE_LIMITED
        await world.send(MarkVm("vm1"))
        assert (await world.written_again(fd))["device_state"] == 0


async def test_that_calls_are_held_back_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vgpu.actors.page_writer.RATE_LIMITED_SECONDS", 0.1)
    async with telemetry(tmp_path) as world, world.page("vm1") as fd:
        await world.send(MarkVm("vm1", rate_limited=True))
        assert (await world.written_again(fd))["device_state"] == STATE_RATE_LIMITED
        await trio.sleep(0.1)
        assert (await world.written_again(fd))["device_state"] == 0


async def test_nothing_is_measured_while_nobody_can_read(tmp_path: Path, bar1: int) -> None:
    async with telemetry(tmp_path) as world:

        async def is_quiet() -> bool:
            await trio.sleep(2 * PERIOD)
            calls = world.sampler.calls
            await trio.sleep(5 * PERIOD)
            return world.sampler.calls == calls

        assert await is_quiet()
        assert world.pool.asked == 0
        async with world.page("vm1"):
            assert not await is_quiet()
        assert await is_quiet()
        await world.send(AttachDevice("vm1", os.dup(bar1)))
        assert not await is_quiet()
        await world.send(DetachDevice("vm1"))
        assert await is_quiet()
        assert await world.system.ref("mediator/telemetry").ask(ListSessions()) == ()


async def test_a_page_is_never_handed_out_without_numbers(tmp_path: Path) -> None:
    async with telemetry(tmp_path) as world, world.page("vm1") as fd:
        page = read(fd)
        assert page["magic"] == SEGMENT_MAGIC
        assert page["temperature_celsius"] == world.sampler.calls > 0


async def test_a_process_of_the_host_sees_the_hosts_numbers_of_its_own_vm(tmp_path: Path) -> None:
    async with telemetry(tmp_path) as world:
        await world.begin(1, "vm1", pid=5001, memory=GIB)
        await world.begin(2, "vm1", pid=77, slot=0, memory=GIB)  # of the virtual machine
        await world.begin(3, "vm2", pid=5002, memory=GIB)
        async with world.page("vm1") as one, world.page("vm2") as two:
            assert (await world.written_again(one)).processes() == [(5001, 12, GIB, 1)]
            assert read(one)["memory_used_bytes"] == 2 * GIB
            assert (await world.written_again(two)).processes() == [(5002, UNKNOWN, GIB, 3)]


async def test_who_reads_a_page_can_neither_write_nor_resize_it(tmp_path: Path) -> None:
    async with telemetry(tmp_path) as world, world.page("vm1") as fd:
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        with pytest.raises(OSError) as refused:
            os.pwrite(fd, b"x", 0)
        assert refused.value.errno in (errno.EBADF, errno.EPERM)
        with pytest.raises(OSError):
            os.ftruncate(fd, 0)
        with pytest.raises(OSError):
            mmap.mmap(fd, DEVICE_PAGE_SIZE)
        # Opened once more to write, which the file's mode alone would allow.
        with contextlib.suppress(PermissionError):
            again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
            with pytest.raises(OSError):
                os.pwrite(again, b"x", 0)
            with pytest.raises(OSError):
                mmap.mmap(again, DEVICE_PAGE_SIZE)
            with pytest.raises(OSError):
                os.ftruncate(again, 0)
            with pytest.raises(OSError):
                os.ftruncate(again, 1 << 20)
            os.close(again)
        with mmap.mmap(fd, DEVICE_PAGE_SIZE, prot=mmap.PROT_READ) as mapping:
            assert Reading(mapping[:])["magic"] == SEGMENT_MAGIC
        await world.written_again(fd)


async def test_telemetry_that_ends_says_so_to_its_readers(tmp_path: Path) -> None:
    async with telemetry(tmp_path) as world:
        ref = world.system.ref("mediator/telemetry")
        lease = await ref.ask(OpenPage("vm1"))
        assert not lease.ended.is_set()
        ref.kill("test")
        await ref.wait_exit()
        assert lease.ended.is_set()
        assert read(lease.descriptor)["magic"] == SEGMENT_MAGIC  # what was written last stays readable
        lease.release()
        lease.release()


async def test_no_more_readers_than_the_limit(tmp_path: Path) -> None:
    async with telemetry(tmp_path) as world:
        ref = world.system.ref("mediator/telemetry")
        leases = [await ref.ask(OpenPage("vm1")) for _ in range(LEASES_PER_VM)]
        with pytest.raises(NoPage, match="processes have the page"):
            await ref.ask(OpenPage("vm1"))
        async with world.page("vm2"):
            pass  # another VM is not concerned
        leases.pop().release()
        async with world.page("vm1"):
            pass
        for lease in leases:
            lease.release()


async def test_without_workers_there_is_no_page_and_a_device_waits(tmp_path: Path, bar1: int) -> None:
    async with telemetry(tmp_path, page=None) as world:
        ref = world.system.ref("mediator/telemetry")
        with pytest.raises(NoPage, match="no worker"):
            await ref.ask(OpenPage("vm1"))
        assert await ref.ask(SampleGpu()) is None
        await world.send(AttachDevice("vm1", os.dup(bar1)))
        await trio.sleep(3 * PERIOD)
        assert os.pread(bar1, DEVICE_PAGE_SIZE, 0) == bytes(DEVICE_PAGE_SIZE)
        world.pool.page = CARD
        assert (await until_written(bar1)).text("name") == TEXTS["name"]


async def test_whoever_asks_for_a_sample_gets_a_fresh_one_and_no_page_is_made(tmp_path: Path) -> None:
    async with telemetry(tmp_path) as world:
        ref = world.system.ref("mediator/telemetry")
        first = await ref.ask(SampleGpu())
        assert first is not None
        assert first.temperature_celsius == 1
        await trio.sleep(PERIOD)
        again = await ref.ask(SampleGpu())
        assert again is not None
        assert again.temperature_celsius == 2
        await trio.sleep(3 * PERIOD)
        assert world.sampler.calls == 2


async def test_what_is_no_bar1_is_refused_and_the_device_can_come_again(tmp_path: Path, bar1: int) -> None:
    async with telemetry(tmp_path) as world:
        unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
        os.ftruncate(unsealed, BAR1_SIZE)
        small = os.memfd_create("small", os.MFD_ALLOW_SEALING)
        fcntl.fcntl(small, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        reader, writer = os.pipe()
        for bad in (unsealed, small, reader):
            await world.send(AttachDevice("vm1", bad))
            await trio.sleep(PERIOD)
            with pytest.raises(OSError):
                os.fstat(bad)  # closed: it was telemetry's
        os.close(writer)
        await world.send(AttachDevice("vm1", os.dup(bar1)))
        await until_written(bar1)


async def test_a_page_a_guest_has_scribbled_on_is_written_over(tmp_path: Path, bar1: int) -> None:
    for scribble in (b"\xff", b"\x55"):
        os.pwrite(bar1, scribble * DEVICE_PAGE_SIZE, 0)
        async with telemetry(tmp_path) as world:
            await world.send(AttachDevice("vm1", os.dup(bar1)))
            page = await until_written(bar1)
            assert page.text("name") == TEXTS["name"]
            assert (page["process_count"], page["power_milliwatts"]) == (0, 300_000)
            os.pwrite(bar1, scribble * DEVICE_PAGE_SIZE, 0)
            page = await until_written(bar1)
            assert page.text("name") == TEXTS["name"]
            assert (page["process_count"], page["power_milliwatts"]) == (0, 300_000)
        (tmp_path / "ledger.sqlite").unlink()


async def test_a_reader_never_sees_half_a_round(tmp_path: Path, bar1: int) -> None:
    """Every round writes the same number twice, far apart; a guest that keeps to the sequence never sees two."""
    async with telemetry(tmp_path) as world:
        session = await world.begin(1, "vm1", pid=77, slot=0)
        await world.send(AttachDevice("vm1", os.dup(bar1)))
        await until_written(bar1)
        stop = threading.Event()
        torn: list[tuple[int, int]] = []
        looks = 0

        def look() -> None:
            nonlocal looks
            while not stop.is_set():
                page = read(bar1)
                (process,) = page.processes() or [(0, 0, 0, 0)]
                looks += 1
                if process[2] != page["memory_used_bytes"]:
                    torn.append((process[2], page["memory_used_bytes"]))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, look)
            for number in range(1, 30):
                session.use = attrs.evolve(session.use, memory_used_bytes=number * GIB)
                await trio.sleep(PERIOD)
            stop.set()
        assert looks > 100
        assert torn == []


async def test_more_sessions_than_a_page_has_room_for(tmp_path: Path, bar1: int) -> None:
    async with telemetry(tmp_path) as world:
        for number in range(1, 131):
            await world.begin(number, "vm1", pid=number, slot=0, memory=1)
        await world.send(AttachDevice("vm1", os.dup(bar1)))
        await until_written(bar1)
        page = await world.written_again(bar1)
        assert page["process_count"] == 128
        assert page["memory_used_bytes"] == 130
        assert page.processes()[127][0] == 128


# -- counted GPU time against the card's


async def test_gpu_time_is_compared_with_the_card_while_somebody_asks(tmp_path: Path) -> None:
    """Nobody has asked: nothing is measured. Then the windows fill, by themselves."""
    async with telemetry(tmp_path) as world:
        world.sampler.base = GpuSample(gpu_utilization_percent=80, sm_utilization={901: 40})
        session = await world.begin(1, "vm1", pid=77)
        await trio.sleep(3 * PERIOD)
        assert world.sampler.calls == 0
        found = await world.system.ref("mediator/telemetry").ask(MeasureGpuTime())
        assert found == {}
        began = time.monotonic_ns()
        with trio.fail_after(60):
            while not (found := await world.system.ref("mediator/telemetry").ask(MeasureGpuTime())):
                session.use = attrs.evolve(session.use, gpu_ns=(time.monotonic_ns() - began) // 2)
                await trio.sleep(PERIOD)
        ((short, long),) = found.values()
        assert (short.seconds, long.seconds) == (10.0, 60.0)
        assert 0 < short.counted_ratio < 0.7
        assert short.nvml_ratio == pytest.approx(0.8)
        assert short.workers_ratio == pytest.approx(0.4)
        assert short.drift_ratio == pytest.approx(short.counted_ratio - 0.8)


@attrs.define(eq=False)
class Sampled(Actor):
    """Stands for an executor; without a sample it answers far too late."""

    sample: SessionSample | None

    @handles(Sample)
    async def measure(self, message: Sample) -> SessionSample | None:
        if self.sample is None:
            await trio.sleep(60)
        return self.sample


async def test_sessions_that_do_not_answer_are_waited_for_together(autojump_clock: MockClock) -> None:
    """Many that are ending at the same time must not make whoever lists the sessions give up."""
    async with open_system() as system:
        telemetry = await system.spawn(ActorSpec("mediator/telemetry", Telemetry))
        silent = [None] * 9
        answer = SessionSample(SessionInfo(SessionId(5), "vm1", 77, "train", "w1", 905), 1, {}, {}, {})
        for number, sample in enumerate([*silent[:4], answer, *silent[4:]], 1):
            executor = await system.spawn(ActorSpec(f"session{number}", partial(Sampled, sample)))
            assert await telemetry.send(Watch(SessionId(number), executor))
        began = trio.current_time()
        assert await telemetry.ask(ListSessions()) == (answer,)
        assert trio.current_time() - began == pytest.approx(1.0)


async def test_workers_that_nvml_does_not_name_are_not_taken_for_idle() -> None:
    now = 0

    def looked(uses: tuple[SessionUse, ...], sample: GpuSample) -> GpuTimeWindow:
        nonlocal now
        times = GpuTimes(lambda: now)
        for _ in range(4):
            now += 10**9
            times.add("mediator/gpus/gpu1", uses, sample)
        ((window, _),) = times.windows().values()
        assert set(times.windows()) == {"1"}
        return window

    use = SessionUse(SessionInfo(SessionId(1), "vm1", 77, "train", "w1", 901), 0, 5)
    busy = GpuSample(gpu_utilization_percent=50)
    assert looked((use,), busy).workers_ratio is None
    assert looked((use,), attrs.evolve(busy, sm_utilization={901: 30})).workers_ratio == pytest.approx(0.3)
    assert looked((), busy).workers_ratio == 0.0
    nothing = looked((), GpuSample())
    assert (nothing.workers_ratio, nothing.nvml_ratio, nothing.drift_ratio) == (None, None, None)
