# SPDX-License-Identifier: Apache-2.0
"""A guest that does what it is told: driver calls by name, one JSON line each way. Run it with the virtual GPU's library.

    {"call": NAME, "arguments": [...]}    -> [result code, [output, ...]]
    {"peek": ADDRESS, "size": N}          -> [0, [bytes]]
    {"poke": ADDRESS, "bytes": HEX}       -> [0, []]

An argument is a number; {"out": N}, a buffer of N bytes whose content comes back; {"in": HEX}, a buffer that is
overwritten as soon as the call is over; or {"each": [HEX, ...]}, an array of pointers to such buffers.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

SPOILT = 0xEE


def main() -> None:
    """Serve standard input until it ends."""
    library = ctypes.CDLL("libcuda.so.1")
    for line in sys.stdin:
        request = json.loads(line)
        answer: list[Any]
        if "peek" in request:
            answer = [0, [ctypes.string_at(request["peek"], request["size"]).hex()]]
        elif "poke" in request:
            data = bytes.fromhex(request["bytes"])
            ctypes.memmove(request["poke"], data, len(data))
            answer = [0, []]
        else:
            answer = call(library, request["call"], request["arguments"])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def call(library: ctypes.CDLL, name: str, arguments: list[Any]) -> list[Any]:
    """One driver call."""
    inputs: list[Any] = []
    outputs: list[Any] = []

    def buffer(content: str) -> Any:
        data = bytes.fromhex(content)
        made = (ctypes.c_ubyte * max(len(data), 1)).from_buffer_copy(data or b"\0")
        inputs.append(made)
        return made

    converted: list[Any] = []
    for argument in arguments:
        if isinstance(argument, int):
            converted.append(ctypes.c_uint64(argument & (1 << 64) - 1))
        elif "out" in argument:
            outputs.append((ctypes.c_ubyte * max(argument["out"], 1))())
            converted.append(outputs[-1])
        elif "in" in argument:
            converted.append(buffer(argument["in"]))
        else:
            parts = [buffer(part) for part in argument["each"]]
            converted.append((ctypes.c_void_p * len(parts))(*[ctypes.addressof(part) for part in parts]))
    code = int(getattr(library, name)(*converted))
    for made in inputs:
        ctypes.memset(made, SPOILT, ctypes.sizeof(made))
    return [code, [bytes(made).hex() for made in outputs]]


main()
