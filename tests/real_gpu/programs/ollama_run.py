# SPDX-License-Identifier: Apache-2.0
"""Ollama itself: serve, create a model from a GGUF file, generate with it, ask what it runs on.

    python3 ollama_run.py PREFIX GGUF

PREFIX holds ``bin/ollama`` and ``lib/ollama``. Nothing is set that a user of Ollama would not set. Prints one JSON object: the
server's own words on which GPU it found, the text, and how much of the model is on the GPU. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

START_SECONDS, ANSWER_SECONDS = 120.0, 400.0


def ask(address: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """One request to Ollama's interface."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(f"{address}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
        answer = json.load(response)
    assert isinstance(answer, dict)
    return answer


def main() -> int:
    """See the head of this file."""
    prefix, gguf = Path(sys.argv[1]), Path(sys.argv[2])
    with tempfile.TemporaryDirectory(prefix="ollama-") as home, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        environment = {**os.environ, "HOME": home, "OLLAMA_HOST": f"127.0.0.1:{port}", "OLLAMA_DEBUG": "1"}
        log = Path(home) / "serve.log"
        began = time.monotonic()
        with log.open("wb") as sink:
            server = subprocess.Popen(
                [str(prefix / "bin" / "ollama"), "serve"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
            )
        try:
            address = f"http://127.0.0.1:{port}"
            while "inference compute" not in log.read_text(errors="replace"):
                if server.poll() is not None or time.monotonic() - began > START_SECONDS:
                    print(json.dumps({"error": log.read_text(errors="replace")[-1500:]}))
                    return 1
                time.sleep(0.1)
            discovered = time.monotonic() - began
            said = re.findall(r'msg="inference compute" (.*)', log.read_text(errors="replace"))
            (Path(home) / "Modelfile").write_text(f"FROM {gguf}\nPARAMETER num_ctx 1024\n")
            subprocess.run(
                [str(prefix / "bin" / "ollama"), "create", "counter", "-f", str(Path(home) / "Modelfile")],
                env=environment, check=True, capture_output=True, timeout=ANSWER_SECONDS,
            )  # fmt: skip
            options = {"temperature": 0, "num_predict": 100}
            body = {"model": "counter", "prompt": "5 6 7", "raw": True, "stream": False, "options": options}
            answer = ask(address, "/api/generate", body)
            (running,) = ask(address, "/api/ps")["models"]
            shown = subprocess.run(
                [str(prefix / "bin" / "ollama"), "ps"],
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        except (urllib.error.URLError, OSError, subprocess.CalledProcessError) as error:
            print(json.dumps({"error": f"{error}: {log.read_text(errors='replace')[-2500:]}"}))
            return 1
        finally:
            server.terminate()
            server.wait(60)
        text = log.read_text(errors="replace")
    expected = "".join(f" {number}" for number in range(8, 108))
    record = {
        "inference_compute": said,
        "discovery_seconds": round(discovered, 2),
        "offloaded": re.findall(r"offloaded \d+/\d+ layers to GPU", text)[:1],
        "counts": answer["response"] == expected,
        "response": answer["response"][:60],
        "size_bytes": running["size"],
        "size_vram_bytes": running["size_vram"],
        "ps": shown.splitlines()[1:],
        "load_seconds": round(answer["load_duration"] / 1e9, 2),
        "tokens_per_second": round(answer["eval_count"] / (answer["eval_duration"] / 1e9), 1),
    }
    print(json.dumps(record))
    is_on_gpu = any("library=CUDA" in line for line in said) and running["size_vram"] == running["size"]
    return 0 if is_on_gpu and record["counts"] else 1


if __name__ == "__main__":
    sys.exit(main())
