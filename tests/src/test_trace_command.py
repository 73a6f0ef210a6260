# SPDX-License-Identifier: Apache-2.0
"""vgpu-trace as people and programs meet it: recordings of a mediator at work, and live views."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests import perfetto
from tests.e2e.mediator import Guest, Mediator, wait_until
from tests.src.test_commands import command, completions
from tests.src.trace_schema import problems
from vgpu import __version__
from vgpu.actors.trace_desk import MOST_SECONDS
from vgpu.admin_client import AdminClient, RequestRefused
from vgpu.gpu.trace import EVENT_SIZE, TraceEvent, TraceKind, decode_events
from vgpu.trace_convert import convert
from vgpu.trace_main import LONGEST_RECORDING_SECONDS, main
from vgpu.trace_recording import Recording
from vgpu.transport._generated_calls import CallId

TRACE = "vgpu.trace_main"
VM = "red"


@pytest.fixture(scope="module")
def mediator() -> Iterator[Mediator]:
    with Mediator() as running:
        yield running


@pytest.fixture(scope="module")
def guest(mediator: Mediator, driver_program: Callable[[str], Path], kernels: Path) -> Iterator[Guest]:
    """A program in a VM that computes all the time; what it says is thrown away, so that it goes on."""
    words = [str(driver_program("steady")), str(kernels)]
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=mediator.environment(VM),
    )  # fmt: skip
    running = Guest(process)
    deadline = time.monotonic() + 60
    while not any(s["grant"]["launches"] > 10 for s in mediator.sessions()):
        assert time.monotonic() < deadline, mediator.logs()
        assert process.poll() is None, mediator.logs()
        time.sleep(0.05)
    yield running
    process.kill()
    process.communicate()


def trace(mediator: Mediator, *words: object) -> subprocess.CompletedProcess[str]:
    """The command, without a process of its own."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            status = main(["--run-dir", str(mediator.run_dir), *map(str, words)])
        except SystemExit as end:
            status = int(end.code or 0)
    return subprocess.CompletedProcess(
        [str(word) for word in words], status, out.getvalue(), errors.getvalue()
    )


def done(mediator: Mediator, *words: object) -> str:
    result = trace(mediator, *words)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    return result.stdout


# -- recordings


def test_a_recording_joins_actors_leases_calls_and_the_gpu(
    mediator: Mediator, guest: Guest, tmp_path: Path
) -> None:
    out = tmp_path / "trace.json"
    before = time.monotonic_ns()
    text = done(mediator, "record", "--seconds", 1, "--vm", VM, "--output", out)
    after = time.monotonic_ns()
    (session,) = mediator.sessions()
    assert re.match(rf"{re.escape(str(out))}: \d+ events of actors; ended by: seconds\n", text)
    assert f"sessions of {VM}: {session['info']['session']}" in text
    recorded = json.loads(out.read_text())
    assert problems(recorded) == []
    events = recorded["traceEvents"]
    zero = int(recorded["otherData"]["zero_ns"])
    taken = [zero + e["ts"] * 1e3 for e in events if e.get("cat") == "worker"]
    assert all(before - 1 <= at <= after + 1e7 for at in taken)
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    worker = session["info"]["worker_pid"]
    assert processes[mediator.pid] == f"mediator {__version__}"
    assert processes[worker] == f"worker, session {session['info']['session']} of {VM}"
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert "mediator/telemetry" in threads.values()
    kinds = Counter(
        (threads[e["pid"], e["tid"]], e["name"]) for e in events if e["ph"] == "X" and e["pid"] == worker
    )
    assert kinds["replay loop", "wireLaunch"] >= 10
    assert kinds["GPU", "busy"] >= 1
    assert kinds["lease, as the mediator granted it", "lease"] >= 1
    assert {e["ph"] for e in events} >= {"M", "B", "E", "X", "C", "s", "f"}
    # Telemetry or the watchdog sampled the executor: an arrow leads into the executor's handler.
    arrows = {e["id"]: threads[e["pid"], e["tid"]] for e in events if e["ph"] == "s"}
    heads = [(arrows[e["id"]], threads[e["pid"], e["tid"]]) for e in events if e["ph"] == "f"]
    assert any("executors" in target and source != target for source, target in heads)
    # Launches lie within the time that the device, or the loop, was at it: one clock.
    launch = next(e for e in events if e["name"] == "wireLaunch")
    assert recorded["otherData"]["clock"] == "CLOCK_MONOTONIC"
    about = recorded["otherData"]
    assert int(about["started_ns"]) <= int(about["zero_ns"]) + launch["ts"] * 1e3


@pytest.mark.skipif(perfetto.present() is None, reason="no trace processor (tests/perfetto.py fetch)")
def test_perfetto_has_all_of_a_recording(mediator: Mediator, guest: Guest, tmp_path: Path) -> None:
    """What Perfetto makes of it, slice by slice: nothing is refused, dropped, left open, or shown in another place."""
    processor = perfetto.present()
    assert processor is not None
    out = tmp_path / "trace.json"
    done(mediator, "record", "--seconds", 1, "--vm", VM, "--output", out)
    events = json.loads(out.read_text())["traceEvents"]
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    refused, named, slices, fences, others, arrows, counters = processor.query(
        out,
        "SELECT name, value FROM stats WHERE severity IN ('error', 'data_loss') AND value > 0",
        "SELECT pid, tid, thread.name FROM thread JOIN process USING (upid) WHERE thread.name IS NOT NULL",
        """SELECT pid, thread.name AS thread, slice.name, count(*) AS many, min(dur) AS least, sum(dur) AS ns
           FROM slice JOIN thread_track ON track_id = thread_track.id JOIN thread USING (utid) JOIN process USING (upid)
           GROUP BY 1, 2, 3""",
        """SELECT pid, slice.name, count(*) AS many, min(dur) AS least
           FROM slice JOIN process_track ON track_id = process_track.id JOIN process USING (upid) GROUP BY 1, 2""",
        """SELECT count(*) AS many FROM slice
           WHERE track_id NOT IN (SELECT id FROM thread_track UNION SELECT id FROM process_track)""",
        """SELECT a.pid AS from_pid, a.thread AS source, b.pid AS to_pid, b.thread AS target, count(*) AS many
           FROM flow
           JOIN (SELECT slice.id, pid, thread.name AS thread FROM slice JOIN thread_track ON track_id = thread_track.id
                 JOIN thread USING (utid) JOIN process USING (upid)) a ON a.id = slice_out
           JOIN (SELECT slice.id, pid, thread.name AS thread FROM slice JOIN thread_track ON track_id = thread_track.id
                 JOIN thread USING (utid) JOIN process USING (upid)) b ON b.id = slice_in
           GROUP BY 1, 2, 3, 4""",
        """SELECT pid, count(*) AS many FROM counter JOIN process_counter_track t ON track_id = t.id
           JOIN process USING (upid) GROUP BY 1""",
    )
    assert refused == []
    assert {(row["pid"], row["tid"]): row["name"] for row in named}.items() >= threads.items()

    def place(event: dict[str, Any]) -> tuple[int, str]:
        return event["pid"], threads[event["pid"], event["tid"]]

    expected = Counter((*place(e), e["name"]) for e in events if e["ph"] in ("X", "B", "i"))
    assert Counter({(row["pid"], row["thread"], row["name"]): row["many"] for row in slices}) == expected
    assert min(row["least"] for row in [*slices, *fences]) >= 0
    lengths = Counter[tuple[int, str, str]]()
    for event in events:
        if event["ph"] == "X":
            lengths[(*place(event), event["name"])] += event["dur"] * 1000
    shown = {(row["pid"], row["thread"], row["name"]): row["ns"] for row in slices}
    for slot, length in lengths.items():
        if not any(e["ph"] == "B" and (*place(e), e["name"]) == slot for e in events):
            assert shown[slot] == pytest.approx(length, abs=2 * expected[slot]), slot

    # Fences are their worker's, and nothing stands outside of the processes.
    begun = Counter((e["pid"], e["name"]) for e in events if e["ph"] == "b")
    assert Counter({(row["pid"], row["name"]): row["many"] for row in fences}) == begun
    assert len(begun) > 0
    assert others == [{"many": 0}]

    sources = {e["id"]: place(e) for e in events if e["ph"] == "s"}
    led = Counter((*sources[e["id"]], *place(e)) for e in events if e["ph"] == "f")
    found = {(row["from_pid"], row["source"], row["to_pid"], row["target"]): row["many"] for row in arrows}
    assert Counter(found) == led
    assert {row["pid"]: row["many"] for row in counters} == Counter(
        e["pid"] for e in events if e["ph"] == "C" for _ in e["args"]
    )


def test_a_raw_recording_is_converted_later(mediator: Mediator, guest: Guest, tmp_path: Path) -> None:
    raw, out = tmp_path / "r.jsonl", tmp_path / "r.json"
    done(mediator, "record", "--seconds", 0.5, "--raw", "-o", raw)
    lines = raw.read_text().splitlines()
    head, end = json.loads(lines[0]), json.loads(lines[-1])["end"]
    assert (head["vgpu_trace"], head["vm"], head["pid"]) == (1, None, mediator.pid)
    assert end["events"] == sum(line[0] == "[" for line in lines)
    assert end["dropped"] == 0
    assert done(mediator, "convert", raw, out) == ""
    whole = json.loads(out.read_text())
    assert problems(whole) == []
    # Cut off in the middle of a line, it is converted as far as it goes.
    raw.write_text("\n".join(lines[:-5]) + "\n" + lines[-5][:10])
    done(mediator, "convert", raw, out)
    part = json.loads(out.read_text())
    assert problems(part) == []
    assert 0 < len(part["traceEvents"]) < len(whole["traceEvents"]) + 5
    raw.write_text("\n".join([lines[0], '["sent", 1]', ""]))
    result = trace(mediator, "convert", raw, out)
    assert result.returncode == 1
    assert re.fullmatch(
        r"vgpu-trace: \S+/r\.jsonl: line 2: not an event; vgpu-trace record --raw .*\n", result.stderr
    )
    raw.write_text("{}\n")
    assert "line 1: not the head of a recording" in trace(mediator, "convert", raw, out).stderr
    assert json.loads(out.read_text()) == part  # what was there is left


def test_a_recording_ends_at_its_number_of_events(mediator: Mediator, guest: Guest, tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    # Events of actors for a second at least, of which the worker, too, gets its part on a busy machine.
    text = done(
        mediator, "record", "--seconds", 120, "--events", 400, "--vm", VM, "--worker-events", 7, "-o", out
    )
    assert "400 events of actors; ended by: events" in text
    events = json.loads(out.read_text())["traceEvents"]
    assert problems({"traceEvents": events}) == []
    worker = mediator.sessions()[0]["info"]["worker_pid"]
    # Fences are two events, a lease is the mediator's.
    slices = [e for e in events if e["pid"] == worker and e["ph"] in "Xb" and e["tid"] != 5]
    assert len(slices) <= 7
    assert re.search(r"^\d+ events of workers came after --worker-events$", text, re.MULTILINE)


def test_one_recording_at_a_time_and_none_without_its_client(mediator: Mediator) -> None:
    with AdminClient(mediator.run_dir) as second:
        with AdminClient(mediator.run_dir) as first:
            head = first.ask("trace.start", seconds=60)
            assert head["limits"]["seconds"] == 60
            with pytest.raises(
                RequestRefused, match=r"a recording is under way, which ends in (60|5\d) s at the"
            ):
                second.ask("trace.start")
            with pytest.raises(RequestRefused, match="this connection has no recording"):
                second.ask("trace.fetch")
            status = second.ask("trace.status")
            assert (status["recording"], status["ended"]) == (True, "")
            result = trace(mediator, "record", "--seconds", 1)
            assert (result.returncode, result.stdout) == (1, "")
            assert "vgpu-trace: a recording is under way" in result.stderr
        deadline = time.monotonic() + 60
        while second.ask("trace.status") != {"recording": False}:
            assert time.monotonic() < deadline
        second.ask("trace.start", seconds=60)  # longer than it can take to stop it
        assert second.ask("trace.stop")["ended"] == "stopped"
        while not (answer := second.ask("trace.fetch"))["done"]:
            assert time.monotonic() < deadline
        assert answer["ended"] == "stopped"


def test_limits_are_checked(mediator: Mediator) -> None:
    with AdminClient(mediator.run_dir) as client:
        for parameters in (
            {"events": 0},
            {"events": 1.5},
            {"events": 10**9},
            {"seconds": 0},
            {"seconds": "1"},
            {"seconds": True},
            {"seconds": 1e9},
            {"vm": 3},
            {"worker_events": -1},
        ):
            with pytest.raises(RequestRefused, match="expected") as refusal:
                client.ask("trace.start", **parameters)
            assert refusal.value.is_wrong_use, parameters
        assert client.ask("trace.status") == {"recording": False}


def test_an_interrupt_ends_a_recording_in_order(mediator: Mediator, guest: Guest, tmp_path: Path) -> None:
    out = tmp_path / "i.json"
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", TRACE, "record", "--run-dir", mediator.run_dir, "--seconds", "60", "-o", out],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with AdminClient(mediator.run_dir) as client:
        deadline = time.monotonic() + 60
        while not client.ask("trace.status")["recording"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    text, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert "ended by: stopped" in text
    assert problems(json.loads(out.read_text())) == []
    assert [path.name for path in tmp_path.iterdir()] == ["i.json"]


def test_a_session_that_begins_during_the_recording_is_traced(
    mediator: Mediator, driver_program: Callable[[str], Path], kernels: Path
) -> None:
    with AdminClient(mediator.run_dir) as client:
        client.ask("trace.start", seconds=60, vm="late")
        process = subprocess.Popen(
            [driver_program("steady"), kernels],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=mediator.environment("late"),
        )  # fmt: skip
        try:
            rows, calls = "", b""
            deadline = time.monotonic() + 60
            while len(calls) < 20 * EVENT_SIZE:
                assert time.monotonic() < deadline
                answer = client.ask("trace.fetch")
                rows += answer["rows"] + "\n"
                for piece in answer["workers"].values():
                    calls += base64.b64decode(piece)
                time.sleep(0.05)
        finally:
            process.kill()
            process.communicate()
        (session,) = answer["sessions"]
        client.ask("trace.stop")
    # Those that come after this one know of one session.
    wait_until(lambda: session not in [s["info"]["session"] for s in mediator.sessions()], 60, "it has ended")
    opened = [
        json.loads(line) for line in rows.splitlines() if '"SessionOpened"' in line and '"sent"' in line
    ]
    assert [(row[7]["session"], row[7]["vm"]) for row in opened] == [(session, "late")]
    assert {event.kind for event in decode_events(calls)} >= {TraceKind.CALL, TraceKind.BUSY}


# -- live views


def test_tree(mediator: Mediator, guest: Guest) -> None:
    lines = done(mediator, "tree", "--once").splitlines()
    assert lines[0].split() == [
        "ACTOR", "KIND", "STATE", "RESTARTS", "MAILBOX", "DEEPEST", "MESSAGES", "AGE",
    ]  # fmt: skip
    assert re.match(r"mediator +Supervisor +running +0 +0/", lines[1])
    assert any(re.match(r"  ledger +Ledger +running +0 +\d+/\d+ +\d+ +\d+ +", line) for line in lines)
    (line,) = done(mediator, "tree", "--once", "--json").splitlines()
    tree = json.loads(line)
    assert tree[0]["name"] == "mediator"


def test_top_shows_rates(mediator: Mediator, guest: Guest) -> None:
    (line,) = done(mediator, "top", "--once", "--json", "--interval", 1).splitlines()
    rates = json.loads(line)
    assert 0.9 < rates["seconds"] < 5
    (session,) = rates["sessions"]
    assert session["vm"] == VM
    assert session["calls_per_second"] > 5
    shares = [session[f"{name}_percent"] for name in ("replay", "lease_wait", "gpu_wait", "guest")]
    assert all(0 <= share <= 101 for share in shares)
    assert 95 <= sum(shares) <= 105
    times = session["time_percent"]
    assert list(times) == ["encode", "ring", "lease", "replay", "sync", "own"]
    assert all(0 <= share <= 101 for share in times.values())
    assert 99 <= sum(times.values()) <= 105  # one thread: nothing is counted twice
    assert times["sync"] + times["replay"] > 1
    assert session["replay_percent"] > 1  # the software GPU computes in the call
    # The first look already asked telemetry, which asked the executor.
    telemetry = next(a for a in rates["actors"] if a["name"] == "mediator/telemetry")
    assert telemetry["messages_per_second"] > 0
    assert telemetry["state"] == "running"
    text = done(mediator, "top", "--once", "--interval", 0.2)
    assert text.startswith("SESSION  VM")
    assert "mediator/telemetry" in text


def test_a_recording_and_top_at_the_same_time(mediator: Mediator, guest: Guest) -> None:
    with AdminClient(mediator.run_dir) as client:
        first = client.ask("trace.activity")
        client.ask("trace.start", seconds=60)
        client.ask("sessions")
        second = client.ask("trace.activity")
        assert (
            second["actors"]["mediator/telemetry"]["messages"]
            > first["actors"].get("mediator/telemetry", {"messages": 0})["messages"]
        )
        client.ask("trace.stop")
        rows = client.ask("trace.fetch")["rows"].splitlines()
        assert any(row.startswith('["received",') and "mediator/telemetry" in row for row in rows)


def test_without_a_terminal_it_is_plain_text_until_nobody_reads(mediator: Mediator) -> None:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", TRACE, "tree", "--interval", "0.1", "--run-dir", mediator.run_dir],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    heads = 0
    for line in process.stdout:
        heads += line.startswith(b"ACTOR ")
        assert b"\x1b" not in line
        if heads == 3:
            break
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()


def test_on_a_terminal_it_draws_until_it_is_interrupted(mediator: Mediator, guest: Guest) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", TRACE, "top", "--interval", "0.2", "--run-dir", mediator.run_dir],
        stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env={**os.environ, "TERM": "xterm", "COLUMNS": "150"},
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    deadline = time.monotonic() + 60
    try:
        while seen.count(b"CALLS/S") < 3 or VM.encode() not in seen:
            assert time.monotonic() < deadline, seen
            seen += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # the terminal is gone when the process is
            while os.read(ours, 65536):
                pass
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.communicate()
        os.close(ours)


# -- the command itself


def test_words_about_itself() -> None:
    assert command(TRACE, "--version").stdout == f"vgpu-trace {__version__}\n"
    text = command(TRACE, "--help").stdout
    assert len(re.findall(r"^  vgpu-trace ", text.partition("examples:\n")[2], re.MULTILINE)) >= 4
    for words in ([], ["record", "--seconds", "-1"], ["record", "--events", "some"], ["dance"]):
        assert command(TRACE, *words).returncode == 2
    assert completions(TRACE, "vgpu-trace r") == ["record"]
    assert "complete" in command(TRACE, "--print-completion", "bash").stdout


def test_a_recording_is_as_long_as_the_mediator_lets_it_be() -> None:
    assert LONGEST_RECORDING_SECONDS == MOST_SECONDS
    for seconds in ("3601", "99999"):
        done = command(TRACE, "record", f"--seconds={seconds}")
        assert (done.returncode, done.stdout) == (2, "")
        assert f"'{seconds}' is more than 3600" in done.stderr
    assert "3600 at most" in command(TRACE, "record", "--help").stdout


def test_a_file_that_cannot_be_written_is_called_as_it_was_typed(
    mediator: Mediator, guest: Guest, tmp_path: Path
) -> None:
    out, raw = tmp_path / "nowhere" / "x.json", tmp_path / "r.jsonl"
    for words in (["-o", out], ["--raw", "-o", out]):
        result = trace(mediator, "record", "--seconds=0.1", *words)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr == f"vgpu-trace: {out}: No such file or directory\n"
    done(mediator, "record", "--seconds=0.1", "--raw", "-o", raw)
    result = trace(mediator, "convert", raw, out)
    assert (result.returncode, result.stderr) == (1, f"vgpu-trace: {out}: No such file or directory\n")


def test_slices_touch_on_a_host_that_has_long_been_up() -> None:
    """Three years: microseconds since the boot, as floats, would be 16 ns apart."""
    began = 94_608_000_000_000_003
    head = {"started_ns": began, "pid": 1, "vm": "a", "sessions": [], "actors": []}
    times = [began + 7 * n for n in range(50)]
    calls = [
        TraceEvent(TraceKind.CALL, begin, end, int(CallId.wireLaunch), 0) for begin, end in pairwise(times)
    ]
    trace = convert(Recording(head, workers={3: calls}))
    assert problems(trace) == []
    zero = int(trace["otherData"]["zero_ns"])
    slices = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert [zero + round(e["ts"] * 1000) for e in slices] == times[:-1]
    assert [round((e["ts"] + e["dur"]) * 1000) for e in slices] == [t - zero for t in times[1:]]


def test_converting_asks_no_mediator() -> None:
    done = command(TRACE, "convert", "--run-dir=/tmp", "a", "b")
    assert (done.returncode, "--run-dir" in done.stderr) == (2, True)
    assert "--run-dir" not in command(TRACE, "convert", "--help").stdout


def test_names_of_vms_are_completed(mediator: Mediator, guest: Guest) -> None:
    for words in ("record --vm ", f"--run-dir {mediator.run_dir} record --vm "):
        line = f"vgpu-trace {words}{VM[:2]}"
        assert completions(TRACE, line, VGPU_RUN_DIR=str(mediator.run_dir)) == [VM]


def test_without_a_mediator(tmp_path: Path) -> None:
    for words in (["tree"], ["top"], ["record", "-o", tmp_path / "t.json"]):
        done = command(TRACE, *words, "--run-dir", tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"vgpu-trace: no mediator at {tmp_path}")
    assert list(tmp_path.iterdir()) == []


def test_the_schema_check_finds_what_is_wrong() -> None:
    def events(*rows: dict[str, Any]) -> dict[str, Any]:
        place = {"pid": 1, "tid": 1}
        named = {"ph": "M", "name": "thread_name", **place, "args": {"name": "t"}}
        return {"traceEvents": [named, *({**place, **row} for row in rows)]}

    begin, end = {"ph": "B", "name": "a", "ts": 1}, {"ph": "E", "ts": 2}
    flow = {"ph": "s", "name": "m", "id": 1, "ts": 1.5}
    assert problems(events(begin, flow, end)) == []
    assert "never end" in problems(events(begin))[0]
    assert "never began" in problems(events(end))[0]
    assert "order of time" in problems(events(begin, {**end, "ts": 0.5}))[0]
    assert "without a slice" in problems(events(flow))[0]
    assert "never began" in problems(events(begin, {**flow, "ph": "f"}, end))[0]
    crossing = [{"ph": "X", "name": "x", "ts": 1, "dur": 2}, {"ph": "X", "name": "y", "ts": 2, "dur": 2}]
    assert "crosses" in problems(events(*crossing))[0]
