# SPDX-License-Identifier: Apache-2.0
"""``vgpu-trace``: see what a running mediator's actors, leases and workers do, live or recorded.

    record    into Perfetto / Chrome trace JSON (or raw, to be converted later)
    convert   a raw recording into that JSON; needs no mediator
    tree      the actors, live
    top       rates of actors and sessions, live

Everything it switches on is bounded and ends with this process. Ends with 0, with 1 if it could not be done, with 2 if it was
told what cannot be meant.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from vgpu import __version__
from vgpu.admin_arguments import NotDone, refuse_stranger, registered
from vgpu.admin_client import AdminClient, NoMediator, RequestRefused
from vgpu.command_help import add_words
from vgpu.completion import add_completion_option, complete_if_asked
from vgpu.paths import run_directory
from vgpu.standard_output import parse_arguments, run_command
from vgpu.trace_convert import convert
from vgpu.trace_recording import BadRecording, fetch_recording, read_recording
from vgpu.trace_views import Look, Table, as_text, dead_letter_lines, top_json, top_tables, tree_lines
from vgpu.transport.text import printable

EXAMPLES = """examples:
  vgpu-trace record --seconds=5 --vm=user1 --output=user1.json
  vgpu-trace record --raw --output=everything.jsonl
  vgpu-trace convert everything.jsonl everything.json
  vgpu-trace top
  vgpu-trace tree --once --json
Open the .json files at https://ui.perfetto.dev or with chrome://tracing.
"""

# A day: what sleeps longer is not looking.
LONGEST_SECONDS = 86400.0
# As the mediator has it (MOST_SECONDS of actors/trace_desk.py): it refuses to record for longer.
LONGEST_RECORDING_SECONDS = 3600.0
COMMAND_EXAMPLES = {
    "record": (
        "vgpu-trace record --seconds=5 --vm=user1 --output=user1.json",
        "vgpu-trace record --raw --output=everything.jsonl",
    ),
    "convert": ("vgpu-trace convert everything.jsonl everything.json",),
    "tree": ("vgpu-trace tree", "vgpu-trace tree --once --json"),
    "top": ("vgpu-trace top --interval=2", "vgpu-trace top --once --json"),
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="vgpu-trace",
        description="See what a running mediator's actors, leases and workers do.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vgpu-trace {__version__}")
    add_completion_option(parser)
    _add_run_dir(parser, None)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    record = commands.add_parser("record", help="record for a while", description="Record for a while.")
    record.add_argument(
        "--seconds",
        type=_positive(float, LONGEST_RECORDING_SECONDS),
        default=10.0,
        help=f"how long, {LONGEST_RECORDING_SECONDS:g} at most (default 10)",
    )
    record.add_argument(
        "--events", type=_positive(int), default=200_000, help="events of actors at most (default 200000)"
    )
    vm = record.add_argument("--vm", metavar="NAME", help="with the calls and the GPU work of this VM")
    vm.completer = registered  # type: ignore[attr-defined]  # argcomplete looks for it there
    record.add_argument(
        "--worker-events",
        type=_positive(int),
        default=200_000,
        help="calls and GPU slices at most, of each session of that VM (default 200000)",
    )
    record.add_argument("--output", "-o", type=Path, help="where to (default vgpu-trace.json, or .jsonl)")
    record.add_argument("--raw", action="store_true", help="lines as they come, for vgpu-trace convert")
    record.set_defaults(run=_record)
    converter = commands.add_parser(
        "convert", help="make a raw recording into trace JSON", description="Make a raw recording into trace JSON."
    )  # fmt: skip
    converter.add_argument("raw", type=Path, metavar="RAW", help="what record --raw wrote")
    converter.add_argument("out", type=Path, metavar="JSON", help="the trace to write")
    converter.set_defaults(run=_convert)
    for name, help_text, run in (
        ("tree", "the actors, live", _tree),
        ("top", "rates of actors and sessions, live", _top),
    ):
        view = commands.add_parser(
            name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}."
        )
        view.add_argument("--once", action="store_true", help="show it once and end")
        view.add_argument(
            "--interval",
            type=_positive(float, LONGEST_SECONDS),
            default=1.0,
            metavar="SECONDS",
            help="between two looks (default 1)",
        )
        view.add_argument("--json", action="store_true", help="one line of JSON for each look, for programs")
        view.set_defaults(run=run)
    for name, own in commands.choices.items():
        if own is not converter:  # which asks no mediator
            _add_run_dir(own, argparse.SUPPRESS)
        add_words(own, COMMAND_EXAMPLES[name])
    return parser


def _add_run_dir(parser: argparse.ArgumentParser, default: object) -> None:
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=default,
        help="where the mediator's sockets are (default: /var/vgpu, for users $XDG_RUNTIME_DIR/vgpu)",
    )


def _positive(kind: Callable[[str], Any], most: float = float("inf")) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text!r} is more than {most:g}")
        return value

    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: see above."""
    parser = build_parser()
    complete_if_asked(parser)
    options = parse_arguments(parser, arguments)
    return run_command("vgpu-trace", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    try:
        return int(options.run(options))
    except RequestRefused as error:
        return _fail(error, 2 if error.is_wrong_use else 1)
    except (NoMediator, NotDone, BadRecording) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return 0


def _fail(error: Exception, status: int) -> int:
    print(f"vgpu-trace: {error}", file=sys.stderr)
    return status


def _client(options: argparse.Namespace) -> AdminClient:
    return AdminClient(options.run_dir or run_directory(os.environ))


# -- recordings


def _record(options: argparse.Namespace) -> int:
    out = options.output or Path("vgpu-trace.jsonl" if options.raw else "vgpu-trace.json")
    raw = out if options.raw else out.with_name(f".{out.name}.{os.getpid()}.raw")
    if options.vm is not None:
        with _client(options) as client:
            refuse_stranger(client, options.vm, "is not known")
    try:
        with _client(options) as client, _open_beside(raw, out) as lines, _interrupts() as stop:
            status = fetch_recording(
                client,
                lines,
                seconds=options.seconds,
                events=options.events,
                worker_events=options.worker_events,
                vm=options.vm,
                report=_progress(options.seconds),
                stop=stop,
            )
        if not options.raw:
            _write_trace(raw, out)
    finally:
        if not options.raw:
            raw.unlink(missing_ok=True)
    print(_summary(status, out))
    return 0


def _open_beside(unfinished: Path, out: Path) -> TextIO:
    """Open a file for what is not yet in ``out``, which is the one that people named: errors are about that."""
    try:
        return unfinished.open("w", encoding="utf-8")
    except OSError as error:
        error.filename = str(out)
        raise


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """A first SIGINT ends the recording in order; a second one ends this process."""
    hits: list[int] = []

    def hit(number: int, _frame: object) -> None:
        if hits:
            raise KeyboardInterrupt
        hits.append(number)

    try:
        before = signal.signal(signal.SIGINT, hit)
    except ValueError:  # not the main thread: nobody interrupts us
        yield lambda: False
        return
    try:
        yield lambda: bool(hits)
    finally:
        signal.signal(signal.SIGINT, before)


def _progress(seconds: float) -> Callable[[dict[str, Any]], None]:
    began = time.monotonic()
    if not sys.stderr.isatty():
        return lambda status: None

    def show(status: dict[str, Any]) -> None:
        passed = min(time.monotonic() - began, seconds)
        end = "\n" if status.get("ended") else ""
        print(
            f"\r{passed:5.1f} of {seconds:g} s, {status['events']} events",
            end=end,
            file=sys.stderr,
            flush=True,
        )

    return show


def _summary(status: dict[str, Any], out: Path) -> str:
    lines = [f"{out}: {status['events']} events of actors; ended by: {status['ended']}"]
    if status["vm"] is not None:
        sessions = ", ".join(map(str, status["sessions"])) or "none"
        lines.append(f"sessions of {status['vm']}: {sessions}")
    for name, text in (
        ("dropped", "events of actors were dropped: they came faster than they were fetched"),
        ("worker_lost", "events of workers were overwritten before they were fetched"),
        ("worker_missed", "events of workers came after --worker-events"),
    ):
        if status[name]:
            lines.append(f"{status[name]} {text}")
    lines += [f"session {session} was not traced: {why}" for session, why in status["refused"].items()]
    return "\n".join(lines)


def _write_trace(raw: Path, out: Path) -> None:
    try:
        with raw.open(encoding="utf-8") as lines:
            trace = convert(read_recording(lines))
    except BadRecording as error:
        raise BadRecording(f"{raw}: {error}; vgpu-trace record --raw writes what can be converted") from None
    except UnicodeDecodeError:
        raise BadRecording(
            f"{raw}: this is not text; vgpu-trace record --raw writes what can be converted"
        ) from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        # Lines of the right form with something else in them: nobody's recording, and no fault of this program.
        raise BadRecording(
            f"{raw}: not as a recording is written ({type(error).__name__}: {error})"
        ) from None
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.new")
    try:
        with _open_beside(unfinished, out) as file:
            _dump(trace, file)
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)


def _dump(trace: dict[str, Any], file: TextIO) -> None:
    """One event a line, so that a trace can be read with other tools, too."""
    rest = {key: value for key, value in trace.items() if key != "traceEvents"}
    file.write(json.dumps(rest)[:-1] + ', "traceEvents": [\n')
    events = trace["traceEvents"]
    file.writelines(
        json.dumps(event, separators=(",", ":")) + (",\n" if index < len(events) - 1 else "\n")
        for index, event in enumerate(events)
    )
    file.write("]}\n")


def _convert(options: argparse.Namespace) -> int:
    _write_trace(options.raw, options.out)
    return 0


# -- live views


def _tree(options: argparse.Namespace) -> int:
    with _client(options) as client:

        def look() -> tuple[Any, tuple[Table, ...]]:
            tree, letters = client.ask("tree"), dead_letter_lines(client.ask("runtime"))
            return tree, (tree_lines(tree), letters) if letters.rows else (tree_lines(tree),)

        return _show(look, options)


def _top(options: argparse.Namespace) -> int:
    with _client(options) as client:

        def ask() -> Look:
            sessions = [s for s in client.ask("sessions") if not s["ended"]]
            return Look(client.ask("tree"), sessions, client.ask("trace.activity"))

        before = ask()
        time.sleep(options.interval)

        def look() -> tuple[Any, tuple[Table, ...]]:
            nonlocal before
            now = ask()
            rates = top_json(before, now)
            before = now
            return rates, top_tables(rates)

        return _show(look, options)


def _show(look: Callable[[], tuple[Any, tuple[Table, ...]]], options: argparse.Namespace) -> int:
    if sys.stdout.isatty() and not options.json and not options.once:
        return _live(look, options.interval)
    while True:
        value, tables = look()
        if options.json:
            print(json.dumps(value), flush=True)
        else:
            print(as_text(*tables), flush=True)
        if options.once:
            return 0
        if not options.json:
            print(flush=True)
        time.sleep(options.interval)


def _live(look: Callable[[], tuple[Any, tuple[Table, ...]]], interval: float) -> int:
    from rich.console import Group
    from rich.live import Live
    from rich.table import Table as RichTable
    from rich.text import Text

    def draw() -> Group:
        drawn = []
        for table in look()[1]:
            rich = RichTable(title=table.title, title_justify="left", box=None, pad_edge=False)
            for index, name in enumerate(table.header):
                rich.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
            for row in table.rows:
                # A guest's words are text and no markup.
                rich.add_row(*(Text(printable(word)) for word in row))
            drawn.append(rich)
        return Group(*drawn)

    with contextlib.suppress(KeyboardInterrupt), Live(draw(), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            live.update(draw(), refresh=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
