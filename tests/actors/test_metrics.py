# SPDX-License-Identifier: Apache-2.0
"""Metrics over real sockets: what is served, what is refused, and who is dropped."""

from __future__ import annotations

import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Never

import attrs
import pytest
import trio
import trio.testing
from prometheus_client.parser import text_string_to_metric_families

from vgpu.actors import Actor, ActorSpec, ActorSystem, StartFailed, handles, open_system
from vgpu.actors.guest_times import GUEST_TIMES
from vgpu.actors.ledger import Ledger
from vgpu.actors.messages import (
    BoundAddress,
    EnsureVm,
    ListSessions,
    RecordFault,
    Sample,
    SessionId,
    SessionInfo,
    SessionSample,
    Unwatch,
    Watch,
)
from vgpu.actors.metrics import CONNECTION_LIMIT, CannotServe, Metrics, ServeMetrics, check_address
from vgpu.actors.telemetry import Telemetry
from vgpu.transport.layout import GRANT_FIELDS, SESSION_FIELDS

Sums = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def sample(session: int, vm: str = "vm1", program: str = "train", **counters: int) -> SessionSample:
    """A session's counters: those named, the others 0."""
    info = SessionInfo(SessionId(session), vm, 40 + session, program, "w1", 43)
    grant = {name: counters.get(name, 0) for name in GRANT_FIELDS}
    guest = {name: counters.get(name, 0) for name in (*SESSION_FIELDS, *GUEST_TIMES)}
    refused = {"cuArrayCreate": guest["refused_calls"]} if guest["refused_calls"] else {}
    return SessionSample(info, 1, grant, guest, refused)


@attrs.define(eq=False)
class Session(Actor):
    """Stands for an executor: answers with the counters it was given."""

    counters: SessionSample

    @handles(Sample)
    def answer(self, message: Sample) -> SessionSample:
        return self.counters


@asynccontextmanager
async def serving(
    tmp_path: Path, seconds: float = 10.0, *, with_ledger: bool = True
) -> AsyncIterator[tuple[ActorSystem, int]]:
    """Telemetry, ledger and metrics on a port of the system's choice."""
    async with open_system() as system:
        await system.spawn(ActorSpec("mediator/telemetry", Telemetry))
        if with_ledger:
            await system.spawn(ActorSpec("mediator/ledger", lambda: Ledger(tmp_path / "ledger.sqlite")))
        describe: dict[str, object] = {"version": "1.2", "gpu": "software", "library": None}
        metrics = await system.spawn(
            ActorSpec(
                "mediator/metrics",
                lambda: Metrics(lambda: ("127.0.0.1", 0), describe, request_seconds=seconds),
            )
        )
        host, port = await metrics.ask(BoundAddress())
        assert host == "127.0.0.1"
        assert port > 0
        yield system, port


async def begin(system: ActorSystem, counters: SessionSample) -> None:
    """A living session that telemetry knows."""
    number = counters.info.session
    executor = await system.spawn(ActorSpec(f"executor-{number}", lambda: Session(counters)))
    await system.ref("mediator/telemetry").send(Watch(number, executor))


async def exchange(port: int, data: bytes) -> bytes:
    """Send bytes, end the sending side, and read all that comes."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(data)
        await stream.send_eof()
        answer = b""
        with trio.fail_after(60):
            async for part in stream:
                answer += part
    return answer


async def scrape(port: int) -> Sums:
    """All samples served now, by name and labels."""
    head, _, body = (await exchange(port, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"content-type: text/plain; version=" in head.lower()
    return {
        (found.name, tuple(sorted(found.labels.items()))): found.value
        for family in text_string_to_metric_families(body.decode())
        for found in family.samples
    }


VM1 = (("vm", "vm1"),)
SEVEN = (("session", "7"), ("vm", "vm1"))


async def test_a_living_session_is_shown_by_itself_and_in_its_vm(tmp_path: Path) -> None:
    async with serving(tmp_path) as (system, port):
        await begin(
            system,
            sample(
                7, records=100, launches=30, bytes_to_device=4096, bytes_from_device=512, gpu_ns=1_500_000_000,
                fences_done=5, reply_records=6, doorbells=2, memory_used_bytes=1000, memory_peak_bytes=2000,
                refused_calls=3, sticky_error=719, replay_ns=2_000_000_000, lease_wait_ns=500_000_000,
                gpu_wait_ns=250_000_000, answered_ns=125_000_000, encode_ns=1_000_000_000, copy_ns=2_000_000_000,
                sync_ns=3_000_000_000, answer_wait_ns=4_000_000_000, room_wait_ns=5_000_000_000, ring_wait_ns=6_000_000_000,
                held_ns=7_000_000_000,
            ),
        )  # fmt: skip
        await begin(system, sample(8, launches=1, memory_used_bytes=24, refused_calls=1, sync_ns=500_000_000))
        shown = await scrape(port)
    expected = {
        "records_total": 100, "launches_total": 30, "bytes_to_device_total": 4096, "bytes_from_device_total": 512,
        "gpu_seconds_total": 1.5, "fences_total": 5, "replies_total": 6, "doorbells_total": 2,
        "refused_calls_total": 3, "memory_used_bytes": 1000, "memory_peak_bytes": 2000, "sticky_error": 719,
        "replay_seconds_total": 2, "lease_wait_seconds_total": 0.5, "gpu_wait_seconds_total": 0.25,
        "answered_seconds_total": 0.125, "guest_encode_seconds_total": 1, "guest_copy_seconds_total": 2,
        "sync_seconds_total": 3, "answer_wait_seconds_total": 4, "room_wait_seconds_total": 5,
        "ring_wait_seconds_total": 6, "guest_held_seconds_total": 7,
    }  # fmt: skip
    assert {name: shown[f"vgpu_session_{name}", SEVEN] for name in expected} == expected
    who = (("guest_pid", "47"), ("program", "train"), *SEVEN)
    assert shown["vgpu_session_info", who] == 1
    assert shown["vgpu_vm_sessions", VM1] == 2
    assert shown["vgpu_vm_launches_total", VM1] == 31
    assert shown["vgpu_vm_lease_wait_seconds_total", VM1] == 0.5
    assert shown["vgpu_vm_sync_seconds_total", VM1] == 3.5
    assert shown["vgpu_vm_memory_used_bytes", VM1] == 1024
    assert shown["vgpu_vm_refused_calls_total", (("call", "cuArrayCreate"), *VM1)] == 4


async def test_a_vms_sums_do_not_fall_when_its_sessions_end(tmp_path: Path) -> None:
    async with serving(tmp_path) as (system, port):
        telemetry = system.ref("mediator/telemetry")
        await system.ref("mediator/ledger").ask(EnsureVm("vm1"))
        await begin(system, sample(7, launches=30, refused_calls=1, encode_ns=10**9))
        await begin(system, sample(9, vm="vm2", launches=1000))
        assert (await scrape(port))["vgpu_vm_launches_total", VM1] == 30
        # Its executor is gone, and the last word of it has not come yet.
        system.ref("executor-7").stop()
        await system.ref("executor-7").wait_exit()
        shown = await scrape(port)
        assert shown["vgpu_vm_launches_total", VM1] == 30
        assert [s.info.session for s in await telemetry.ask(ListSessions())] == [9]
        last = attrs.evolve(
            sample(7, launches=32, refused_calls=2, encode_ns=2 * 10**9, ring_wait_ns=10**9),
            ended="guest ended",
        )
        await telemetry.send(Unwatch(last))
        await telemetry.send(Unwatch(last))  # said twice, counted once
        shown = await scrape(port)
    assert shown["vgpu_vm_launches_total", VM1] == 32
    assert shown["vgpu_vm_guest_encode_seconds_total", VM1] == 2
    assert shown["vgpu_vm_ring_wait_seconds_total", VM1] == 1
    assert shown["vgpu_vm_refused_calls_total", (("call", "cuArrayCreate"), *VM1)] == 2
    assert (shown["vgpu_vm_sessions", VM1], shown["vgpu_vm_sessions_ended_total", VM1]) == (0, 1)
    assert ("vgpu_session_launches_total", SEVEN) not in shown
    assert shown["vgpu_vm_launches_total", (("vm", "vm2"),)] == 1000


async def test_series_of_a_vm_that_is_not_registered_end_with_its_last_session(tmp_path: Path) -> None:
    async with serving(tmp_path) as (system, port):
        await system.ref("mediator/ledger").send(RecordFault(sample(5, vm="left").info, 719, "it went wrong"))
        await begin(system, sample(5, vm="left", launches=3))
        shown = await scrape(port)
        assert shown["vgpu_vm_launches_total", (("vm", "left"),)] == 3
        assert shown["vgpu_vm_faults_total", (("error", "719"), ("vm", "left"))] == 1
        ended = attrs.evolve(sample(5, vm="left", launches=4), ended="the VM was unregistered")
        await system.ref("mediator/telemetry").send(Unwatch(ended))
        shown = await scrape(port)
        assert [name for name, labels in shown if ("vm", "left") in labels] == []
        # Nothing was forgotten: one that comes by that name goes on where it was.
        await system.ref("mediator/ledger").ask(EnsureVm("left"))
        assert (await scrape(port))["vgpu_vm_launches_total", (("vm", "left"),)] == 4


async def test_faults_actors_and_the_mediator_itself_are_shown(tmp_path: Path) -> None:
    async with serving(tmp_path) as (system, port):
        ledger = system.ref("mediator/ledger")
        for session, error in ((7, 719), (8, 719), (9, 702)):
            await ledger.send(RecordFault(sample(session).info, error, "it went wrong"))
        await ledger.ask(EnsureVm("vm1"))
        system.ref("nobody").send_nowait(ListSessions())
        shown = await scrape(port)
    assert shown["vgpu_vm_faults_total", (("error", "719"), *VM1)] == 2
    assert shown["vgpu_vm_faults_total", (("error", "702"), *VM1)] == 1
    assert shown["vgpu_actors_alive", ()] == 3
    assert shown["vgpu_actors_crashed_total", ()] == 0
    assert shown["vgpu_actors_restarts_total", ()] == 0
    assert shown["vgpu_actors_dead_letters_total", ()] == 1
    assert shown["vgpu_mediator_info", (("gpu", "software"), ("library", ""), ("version", "1.2"))] == 1
    assert 0 <= shown["vgpu_mediator_uptime_seconds", ()] < 60
    assert shown["process_resident_memory_bytes", ()] > 0


async def test_what_cannot_be_had_is_left_out_and_said(tmp_path: Path) -> None:
    async with serving(tmp_path, with_ledger=False) as (system, port):
        await begin(system, sample(7, launches=4))
        shown = await scrape(port)
    assert shown["vgpu_source_up", (("source", "ledger"),)] == 0
    assert shown["vgpu_source_up", (("source", "telemetry"),)] == 1
    assert shown["vgpu_vm_launches_total", VM1] == 4
    assert not [name for name, _ in shown if name.startswith("vgpu_vm_faults")]


async def test_a_guests_words_cannot_break_the_text(tmp_path: Path) -> None:
    async with serving(tmp_path) as (system, port):
        await begin(system, sample(7, program='a"} 1\nvgpu_forged 1\n\\\udc80'))
        shown = await scrape(port)
    assert not [name for name, _ in shown if name == "vgpu_forged"]
    (labels,) = [dict(labels) for name, labels in shown if name == "vgpu_session_info"]
    assert labels["program"] == 'a"} 1?vgpu_forged 1?\\?'


@pytest.mark.parametrize(
    ("data", "status", "header"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 404, None),
        (b"POST /other HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nab", 404, None),
        (b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nab", 405, b"allow: GET"),
        (b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n", 405, b"allow: GET"),
        (b"nonsense\r\n\r\n", 400, b"connection: close"),
        (b"GET /metrics HTTP/1.1\r\n\r\n", 400, b"connection: close"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, b"connection: close"),
    ],
)
async def test_other_requests_are_refused(
    tmp_path: Path, data: bytes, status: int, header: bytes | None
) -> None:
    async with serving(tmp_path) as (_, port):
        answer = await exchange(port, data)
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        if header is not None:
            assert header.lower() in answer.lower()
        await scrape(port)


async def test_the_query_is_ignored_and_a_connection_serves_more_than_one_request(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, port):
        one = b"GET /metrics?name=x HTTP/1.1\r\nHost: x\r\n\r\n"
        answer = await exchange(port, one + b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n" + one)
    assert re.findall(rb"HTTP/1\.1 (\d+)", answer) == [b"200", b"404", b"200"]


@pytest.mark.parametrize(
    "said", [b"", b"GET /metrics HT", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"]
)
async def test_a_client_that_does_not_finish_its_request_is_dropped(tmp_path: Path, said: bytes) -> None:
    async with (
        serving(tmp_path, seconds=0.2) as (_, port),
        await trio.open_tcp_stream("127.0.0.1", port) as stream,
    ):
        if said:
            await stream.send_all(said)
        with trio.fail_after(60):
            assert await stream.receive_some(100) == b""


async def test_no_more_connections_than_the_limit_and_room_again_afterwards(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, port):
        held = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(CONNECTION_LIMIT)]
        with trio.fail_after(60):
            async with await trio.open_tcp_stream("127.0.0.1", port) as extra:
                assert await extra.receive_some(1) == b""
        for stream in held:
            await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        await scrape(port)


class NobodyKnown(trio.abc.HostnameResolver):
    """A network without names."""

    async def getaddrinfo(self, *_: object, **__: object) -> Never:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async def getnameinfo(self, *_: object, **__: object) -> Never:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


async def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    async with serving(tmp_path) as (system, port):
        taken = (
            f"metrics cannot be served at 127.0.0.1:{port}: Address already in use; end what listens there"
        )
        with pytest.raises(StartFailed, match=taken):
            await system.spawn(ActorSpec("second", lambda: Metrics(lambda: ("127.0.0.1", port))))
        with pytest.raises(CannotServe, match=taken):
            await check_address(("127.0.0.1", port))
        metrics = system.ref("mediator/metrics")
        with socket.create_server(("127.0.0.1", 0)) as other:
            elsewhere = ServeMetrics(("127.0.0.1", other.getsockname()[1]))
            with pytest.raises(CannotServe, match="Address already in use; end what listens there"):
                await metrics.ask(elsewhere)
        # It goes on where it was.
        assert await metrics.ask(BoundAddress()) == ("127.0.0.1", port)
        await scrape(port)


@pytest.mark.parametrize(
    ("host", "shown", "why"),
    [
        (
            "192.0.2.1",
            "192.0.2.1:9400",
            "Cannot assign requested address; name an address that this host has",
        ),
        ("2001:db8::1", r"\[2001:db8::1\]:9400", ".*; name an address"),
        ("a..b", "a..b:9400", "this can be no host's name; name an address of this host"),
        ("nowhere", "nowhere:9400", "Name or service not known; name an address of this host"),
    ],
)
async def test_an_address_that_is_not_ours_is_said(host: str, shown: str, why: str) -> None:
    trio.socket.set_custom_hostname_resolver(NobodyKnown())
    with pytest.raises(CannotServe, match=f"^metrics cannot be served at {shown}: {why}"):
        await check_address((host, 9400))


async def test_an_address_that_can_be_had_is_free_after_the_look() -> None:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    await check_address(("127.0.0.1", port))
    await check_address(("127.0.0.1", port))
