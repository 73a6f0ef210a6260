# SPDX-License-Identifier: Apache-2.0
"""What ``ollama serve`` does to find a GPU, then to run a model on it, done to a llama-server without Ollama.

    python3 ollama_sequence.py LIBRARY_FOLDER [--model GGUF]

LIBRARY_FOLDER is Ollama's ``lib/ollama``: llama-server and its libraries, and one folder for each GPU library
(``cuda_v13``) with libggml-cuda.so, libcudart, libcublas. As Ollama 0.33 does, for each such folder and then for each device
found (with CUDA_VISIBLE_DEVICES and GGML_CUDA_INIT=1): a llama-server that is killed as soon as it has said ``system_info``,
a llama-server that lists its devices, and a probe through libcuda and libnvidia-ml; 30 seconds for all three together. Then
the model is served with the options Ollama gives, and asked to go on counting.

Ollama reads these processes' output with the patterns below; what they do not match it does not see. Standard library only,
since it runs in VMs too. Prints one JSON object; exit status 1 if Ollama would have gone on without the GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PASS_SECONDS = 30.0
PROBE_SECONDS = 15.0
LOAD_SECONDS = 300.0
DEVICE_LINE = re.compile(r"^\s+(.+?):\s+(.+?)\s+\((\d+)\s+MiB,\s+(\d+)\s+MiB\s+free\)", re.MULTILINE)
INIT_LINE = re.compile(r"Device (\d+): (.+?), compute capability (\d+)\.(\d+)")
ARCHS = re.compile(r"CUDA : ARCHS = ([\d,]+)")
ATTRIBUTE_MAJOR, ATTRIBUTE_MINOR, ATTRIBUTE_INTEGRATED = 75, 76, 18


class WithoutGpu(Exception):
    """Ollama would print ``library=cpu``; the message says what it missed."""


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment_for(library: Path, backend: Path, more: Mapping[str, str]) -> dict[str, str]:
    """What Ollama sets for its children: the server's own environment, and these in front."""
    users = os.environ.get("LD_LIBRARY_PATH")
    path = [str(library), str(backend), *([users] if users else [])]
    chosen = {
        "LD_LIBRARY_PATH": os.pathsep.join(path),
        "GGML_BACKEND_PATH": str(backend / "libggml-cuda.so"),
    }
    return {**os.environ, **chosen, **more}


def killed_at_system_info(server: Path, environment: Mapping[str, str], deadline: float) -> str:
    """Start without a model, read standard error to ``system_info:``, then SIGKILL; what it said until then."""
    command = [
        str(server),
        "--port",
        str(free_port()),
        "--host",
        "127.0.0.1",
        "--no-webui",
        "--offline",
        "--verbose",
    ]
    said = ""
    with subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said += line
            if "system_info:" in line or time.monotonic() > deadline:
                break
        process.send_signal(signal.SIGKILL)
    if "system_info:" not in said:
        raise WithoutGpu(f"llama-server said no system_info: {said[-400:]}")
    return said


def listed(server: Path, environment: Mapping[str, str], deadline: float) -> list[dict[str, Any]]:
    """The devices of ``--list-devices``; a status other than 0 loses the whole folder."""
    done = subprocess.run(
        [str(server), "--list-devices", "--offline", "--verbose"],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=max(deadline - time.monotonic(), 0.1),
        check=False,
    )
    if done.returncode != 0:
        raise WithoutGpu(f"--list-devices ended with {done.returncode}: {done.stdout[-400:]}")
    found = [
        {"id": name, "description": text, "total_mib": int(total), "free_mib": int(free)}
        for name, text, total, free in DEVICE_LINE.findall(done.stdout)
        if name.startswith("CUDA") and int(total) > 0
    ]
    if not found:
        raise WithoutGpu(f"--list-devices shows no CUDA device: {done.stdout[-400:]}")
    return found


def probe() -> dict[str, Any]:
    """What ``ollama gpu-discover`` asks libcuda and libnvidia-ml, in a process of its own."""
    cuda, answer = ctypes.CDLL("libcuda.so.1"), {}

    def ask(name: str, *words: Any) -> None:
        status = getattr(cuda, name)(*words)
        if status != 0:
            raise WithoutGpu(f"{name}: {status}")

    number, device, text = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    ask("cuInit", 0)
    ask("cuDriverGetVersion", ctypes.byref(number))
    answer["cuda"] = number.value
    ask("cuDeviceGetCount", ctypes.byref(number))
    answer["count"] = number.value
    ask("cuDeviceGet", ctypes.byref(device), 0)
    for name, attribute in (
        ("major", ATTRIBUTE_MAJOR),
        ("minor", ATTRIBUTE_MINOR),
        ("integrated", ATTRIBUTE_INTEGRATED),
    ):
        ask("cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
        answer[name] = number.value
    ask("cuDeviceGetName", text, len(text), device)
    answer["name"] = text.value.decode()
    total = ctypes.c_size_t()
    ask("cuDeviceTotalMem_v2", ctypes.byref(total), device)
    answer["total_bytes"] = total.value
    ask("cuDeviceGetPCIBusId", text, len(text), device)
    answer["pci"] = text.value.decode()
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    if nvml.nvmlInit_v2() != 0 or nvml.nvmlSystemGetDriverVersion(text, len(text)) != 0:
        raise WithoutGpu("nvmlInit_v2 or nvmlSystemGetDriverVersion failed")
    answer["driver"] = text.value.decode()
    nvml.nvmlShutdown()
    return answer


def one_pass(library: Path, backend: Path, more: Mapping[str, str]) -> dict[str, Any]:
    """The three processes of one library folder, or of one device."""
    began = time.monotonic()
    deadline = began + PASS_SECONDS
    environment = environment_for(library, backend, more)
    said = killed_at_system_info(library / "llama-server", environment, deadline)
    at = [round(time.monotonic() - began, 2)]
    devices = listed(library / "llama-server", environment, deadline)
    at.append(round(time.monotonic() - began, 2))
    child = subprocess.run(
        [sys.executable, __file__, "--probe"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PROBE_SECONDS,
        check=False,
    )
    if child.returncode != 0:
        raise WithoutGpu(f"the probe failed: {child.stderr[-400:]}")
    seconds = round(time.monotonic() - began, 2)
    if time.monotonic() > deadline:
        raise WithoutGpu(f"the three processes took {seconds} s")
    architectures = ARCHS.search(said)
    capability = INIT_LINE.search(said)
    if capability is not None and architectures is not None:
        wanted = f"{int(capability[3])}{int(capability[4])}0"
        if wanted not in architectures[1].split(","):
            raise WithoutGpu(f"the backend has {architectures[1]} and not {wanted}")
    return {
        "devices": devices,
        "probe": json.loads(child.stdout),
        "said_capability": capability is not None,
        "after_seconds": [*at, seconds],
    }


def serve(library: Path, backend: Path, model: Path) -> dict[str, Any]:
    """Serve the model as Ollama does and ask it to count on."""
    port = free_port()
    command = [
        str(library / "llama-server"),
        "--model",
        str(model),
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
    ]
    command += ["--no-webui", "--offline", "-c", "1024", "-np", "1", "--log-verbosity", "4"]
    command += [
        "--no-log-prefix",
        "--no-log-timestamps",
        "--no-jinja",
        "--chat-template",
        "chatml",
        "--flash-attn",
        "auto",
    ]
    began = time.monotonic()
    log = Path(f"/tmp/ollama-sequence-{os.getpid()}.log")
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            env=environment_for(library, backend, {}),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
        )
    try:
        while True:
            if process.poll() is not None or time.monotonic() - began > LOAD_SECONDS:
                raise WithoutGpu(
                    f"llama-server did not load the model: {log.read_text(errors='replace')[-600:]}"
                )
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    if answer.status == 200:
                        break
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.1)
        load = time.monotonic() - began
        body = {"prompt": "5 6 7", "n_predict": 100, "temperature": 0, "top_k": 1, "cache_prompt": False}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=LOAD_SECONDS) as response:
            reply = json.load(response)
    finally:
        process.terminate()
        process.wait(30)
    said = log.read_text(errors="replace")
    offloaded = re.search(r"offloaded (\d+)/(\d+) layers to GPU", said)
    if offloaded is None or offloaded[1] != offloaded[2]:
        raise WithoutGpu(f"layers on the GPU: {offloaded and offloaded[0]}")
    expected = "".join(f" {number}" for number in range(8, 108))
    return {
        "load_seconds": round(load, 2),
        "offloaded": offloaded[0],
        "counts": reply["content"] == expected,
        "said": reply["content"][:60],
        "tokens_per_second": round(reply["timings"]["predicted_per_second"], 1),
    }


def sequence(library: Path, model: Path | None) -> dict[str, Any]:
    """Discovery in two passes, then the model."""
    backends = sorted((p.parent for p in library.glob("*/libggml-cuda.so")), reverse=True)
    if not backends:
        raise WithoutGpu(f"no folder with libggml-cuda.so in {library}")
    backend = backends[0]  # the newest name wins
    first = one_pass(library, backend, {})
    again = {"CUDA_VISIBLE_DEVICES": "0", "GGML_CUDA_INIT": "1"}
    record: dict[str, Any] = {
        "folder": backend.name,
        "pass_1": first,
        "pass_2": one_pass(library, backend, again),
    }
    if model is not None:
        record["model"] = serve(library, backend, model)
        if not record["model"]["counts"]:
            raise WithoutGpu(f"it does not count: {record['model']['said']!r}")
    return record


def main() -> int:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path, nargs="?")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        answer = probe() if options.probe else sequence(options.library, options.model)
    except (WithoutGpu, OSError, subprocess.TimeoutExpired) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}) if not options.probe else error)
        if options.probe:
            print(error, file=sys.stderr)
        return 1
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
