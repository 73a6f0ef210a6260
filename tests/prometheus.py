# SPDX-License-Identifier: Apache-2.0
"""A Prometheus server for tests, to load the alert rules and to ask what the dashboard asks.

The machine's own where it has one, else that of a Debian package, unpacked in ``.cache/prometheus``: no root and no apt. ``python
tests/prometheus.py fetch`` gets it beforehand.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import attrs

if __name__ == "__main__":  # run as a file, so the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.vm import debian

ROOT: Final = Path(__file__).resolve().parents[1]
CACHE: Final = ROOT / ".cache" / "prometheus"
SUITE: Final = "trixie"
READY_SECONDS: Final = 60.0


def server() -> Path | None:
    """The program, None where there is none that runs here. Fetches nothing."""
    for found in (shutil.which("prometheus"), CACHE / "prometheus"):
        if found is None or not Path(found).exists():
            continue
        with contextlib.suppress(OSError):
            if subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0:
                return Path(found)
    return None


def fetch() -> Path:
    """The program, from a Debian mirror if it is not here yet.

    Raises:
        OSError, DebianError: no mirror answers, or what came is damaged.
        LookupError: the package holds no such program, or it does not run on this machine.
    """
    present = server()
    if present is not None:
        return present
    CACHE.mkdir(parents=True, exist_ok=True)
    mirrors = debian.mirrors()
    for url in mirrors:
        mirror = debian.Mirror(url, CACHE / "downloads")
        try:
            listed = debian.parse_index(mirror.index(SUITE, "main", "amd64"), SUITE)
            packages = [package for package in listed if package.name == "prometheus"]
            archives = mirror.fetch_all(packages, lambda package: None)
        except (OSError, debian.DebianError):
            if url == mirrors[-1]:
                raise
            continue
        break
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        for archive in archives.values():
            for path in debian.unpack(archive, Path(scratch), lambda name: name == "usr/bin/prometheus"):
                path.rename(CACHE / "prometheus")
    shutil.rmtree(CACHE / "downloads")
    fetched = server()
    if fetched is None:
        raise LookupError("the prometheus of the package does not run here")
    return fetched


@attrs.frozen
class Prometheus:
    """A running server."""

    url: str

    def ask(self, path: str, **query: str) -> Any:
        """The data of an answer of its HTTP interface.

        Raises:
            AssertionError: it refused the question; what it said of it.
        """
        words = "?" + urllib.parse.urlencode(query) if query else ""
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}{words}", timeout=60) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}{query}: {error.read().decode()}") from None


@contextlib.contextmanager
def running(program: Path, folder: Path, target: str, rules: Path) -> Iterator[Prometheus]:
    """A server that asks ``target`` (host:port) every second and evaluates ``rules`` as often. Files go to ``folder``.

    Raises:
        AssertionError: it did not start; its log.
    """
    config = folder / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
        f"rule_files: ['{rules}']\n"
        f"scrape_configs: [{{job_name: vgpu, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://{address}/-/ready", timeout=5).close()
                break
            time.sleep(0.1)
        yield Prometheus(f"http://{address}")
    finally:
        process.kill()
        process.wait()


def main(arguments: list[str]) -> int:
    """The command line; 2 when it is wrong."""
    if arguments != ["fetch"]:
        print("usage: prometheus.py fetch", file=sys.stderr)
        return 2
    try:
        fetch()
    except (OSError, debian.DebianError, LookupError) as error:
        print(f"prometheus: {error}; its test will be skipped", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
