# SPDX-License-Identifier: Apache-2.0
"""llama.cpp, the engine inside Ollama: devices listed, a model that counts, CUDA graphs on and off.

The binaries come from build_llama.sh, the models from tests/models/make_tiny_gguf.py. A counting model's text is known
beforehand, so each side is checked by itself first; then the log-probabilities must be native's too.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
from bench import sides
from bench.sides import NATIVE, Mediator, SideError

ROOT = Path(__file__).resolve().parent.parent.parent
MAKER = ROOT / "tests" / "models" / "make_tiny_gguf.py"
PROMPT, FIRST, TOKENS = "5 6 7", 8, 300
CUDA_LIBRARIES = ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13")


@attrs.frozen
class Check:
    """One comparison; ``skipped`` says why it cannot run here, if so."""

    name: str
    run: Callable[[str, Mediator | None], dict[str, Any]]
    skipped: str = ""


def side_environment(side: str, mediator: Mediator | None, **more: str) -> dict[str, str]:
    """The environment of one side, and the same additions on both."""
    if side == NATIVE:
        return sides.native_environment() | more
    assert mediator is not None
    return mediator.environment() | more


def link_cuda_libraries(folder: Path) -> None:
    """Put links to CUDA's runtime and cuBLAS beside the binaries, which look there ($ORIGIN), wherever they are."""
    import importlib.util

    places = [
        "/usr/local/cuda*/lib64",
        "/usr/local/cuda*/targets/x86_64-linux/lib",
        "/usr/lib/x86_64-linux-gnu",
    ]
    found = importlib.util.find_spec("nvidia")
    if found is not None:
        places += [f"{place}/*/lib" for place in found.submodule_search_locations or []]
    for name in CUDA_LIBRARIES:
        link = folder / name
        if not link.exists():
            target = next((path for place in places for path in sorted(glob.glob(f"{place}/{name}"))), None)
            if target is None:
                raise SideError(f"no {name} on this machine")
            link.symlink_to(target)


def model(folder: Path, preset: str, kind: str = "q8_0") -> Path:
    """The counting model, written where it is not there yet."""
    out = folder / f"counter-{preset}-{kind}.gguf"
    if not out.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = out.with_suffix(f".{os.getpid()}")
        command = [sys.executable, str(MAKER), str(unfinished), "--preset", preset, "--type", kind]
        subprocess.run(command, check=True, capture_output=True)
        unfinished.replace(out)
    return out


def listed_devices(llama: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Name and memory of CUDA0 as llama.cpp lists it.

    Raises:
        SideError: it lists none.
    """
    outcome = sides.run_program([llama / "llama-server", "--list-devices"], environment, 60)
    found = re.search(r"CUDA0: (.+) \((\d+) MiB, (\d+) MiB free\)", outcome.output + outcome.errors)
    if found is None or outcome.status != 0:
        raise SideError(f"no CUDA0 (status {outcome.status}): {(outcome.output + outcome.errors)[-900:]}")
    return {"name": found[1], "total_mib": int(found[2]), "free_mib": int(found[3])}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        assert isinstance(port, int)
        return port


@contextlib.contextmanager
def open_server(
    llama: Path, gguf: Path, environment: Mapping[str, str], *options: str
) -> Iterator[tuple[str, Path]]:
    """A running llama-server with every layer on the GPU: its address and its log.

    Raises:
        SideError: it ended or did not load the model in two minutes.
    """
    with tempfile.TemporaryDirectory(prefix="vgpu-llama-") as folder:
        log, port = Path(folder) / "log", _free_port()
        command = [
            str(llama / "llama-server"),
            "-m",
            str(gguf),
            "-ngl",
            "99",
            "-c",
            "2048",
            "--parallel",
            "1",
        ]
        command += ["--host", "127.0.0.1", "--port", str(port), "--no-webui", "-lv", "4", *options]
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            address = f"http://127.0.0.1:{port}"
            limit = time.monotonic() + 120
            while True:
                if process.poll() is not None or time.monotonic() > limit:
                    said = log.read_text(errors="replace")[-1500:]
                    raise SideError(f"llama-server is not ready (status {process.poll()}): {said}")
                with contextlib.suppress(urllib.error.URLError, OSError):
                    if urllib.request.urlopen(f"{address}/health", timeout=5).status == 200:
                        break
                time.sleep(0.05)
            yield address, log
            if process.poll() is not None:
                raise SideError(
                    f"llama-server ended ({process.poll()}): {log.read_text(errors='replace')[-1500:]}"
                )
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def complete(address: str, prompt: str, count: int, **more: Any) -> dict[str, Any]:
    """Greedy completion with the three best log-probabilities of each token."""
    body = {
        "prompt": prompt,
        "n_predict": count,
        "temperature": 0,
        "top_k": 1,
        "n_probs": 3,
        "cache_prompt": False,
    }
    request = urllib.request.Request(
        f"{address}/completion", json.dumps(body | more).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer = json.load(response)
    assert isinstance(answer, dict)
    return answer


def count_with(
    llama: Path, gguf: Path, environment: Mapping[str, str], *, on_gpu: bool = True
) -> dict[str, Any]:
    """Let the model count and check that it does; what must be equal on both sides, and what need not.

    Raises:
        SideError: it counts wrongly, or not every layer is on the GPU.
    """
    with open_server(llama, gguf, environment) as (address, log):
        answer = complete(address, PROMPT, TOKENS)
        # A long prompt takes other kernels than one token does; its first answer must count on as well.
        numbers = list(range(1000, 1200))
        long = complete(address, " ".join(str(number) for number in numbers), 20)
        said = log.read_text(errors="replace")
    expected = "".join(f" {number}" for number in range(FIRST, FIRST + TOKENS))
    if answer["content"] != expected:
        raise SideError(f"it said {answer['content'][:200]!r} and not {expected[:40]!r}...")
    expected = "".join(f" {number}" for number in range(1200, 1220))
    if long["content"] != expected:
        raise SideError(f"after a long prompt it said {long['content'][:200]!r} and not {expected[:40]!r}...")
    offloaded = re.search(r"offloaded (\d+)/(\d+) layers to GPU", said)
    if on_gpu and (offloaded is None or offloaded[1] != offloaded[2]):
        raise SideError(f"not every layer is on the GPU: {offloaded and offloaded[0]}")
    probabilities = [
        [[best["id"], best["logprob"]] for best in token["top_logprobs"]]
        for token in answer["completion_probabilities"] + long["completion_probabilities"]
    ]
    return {
        "equal": {"layers": offloaded and offloaded[0], "log_probabilities": probabilities},
        "info": {
            "tokens_per_second": answer["timings"]["predicted_per_second"],
            "graphs": "CUDA Graph" in said or "USE_GRAPHS = 1" in said,
        },
    }


def _recorded(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    began = time.monotonic()
    try:
        return {"ok": True, **work(), "seconds": round(time.monotonic() - began, 2)}
    except (SideError, OSError, KeyError, subprocess.CalledProcessError) as error:
        seconds = round(time.monotonic() - began, 2)
        return {"ok": False, "error": f"{type(error).__name__}: {error}"[-1500:], "seconds": seconds}


def checks(llama: Path | None, models: Path) -> list[Check]:
    """Every comparison made with llama.cpp."""
    skipped = (
        ""
        if llama and (llama / "llama-server").exists()
        else "no llama.cpp: --llama-dir (see build_llama.sh)"
    )
    where = Path(llama) if llama else Path("/nonexistent")

    def devices(side: str, mediator: Mediator | None) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            link_cuda_libraries(where)
            found = listed_devices(where, side_environment(side, mediator))
            return {"equal": {"name": found["name"], "total_mib": found["total_mib"]}, "info": found}

        return _recorded(work)

    def counting(preset: str, graphs: bool) -> Callable[[str, Mediator | None], dict[str, Any]]:
        def run(side: str, mediator: Mediator | None) -> dict[str, Any]:
            def work() -> dict[str, Any]:
                link_cuda_libraries(where)
                more = {} if graphs else {"GGML_CUDA_DISABLE_GRAPHS": "1"}
                return count_with(where, model(models, preset), side_environment(side, mediator, **more))

            return _recorded(work)

        return run

    found = [Check("llama.cpp --list-devices", devices, skipped)]
    for preset in ("tiny", "1b"):
        for graphs in (True, False):
            name = f"llama.cpp {preset} counts, graphs {'on' if graphs else 'off'}"
            found.append(Check(name, counting(preset, graphs), skipped))
    return found
