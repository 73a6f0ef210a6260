# SPDX-License-Identifier: Apache-2.0
"""What is kept of a fault besides its number: which kernel, how long, and the session's last calls. Pure.

Made from the worker's flight recorder, which is readable when the worker is dead. The text goes into the ledger
as JSON and comes out in ``vgpu-admin show-faults``.
"""

from __future__ import annotations

import json
from typing import Any

from vgpu.gpu.flight import Flight, FlightCall

from .fault_messages import FaultKind

# Of the 256 that the recorder has; enough to see what led there, and a megabyte in fifty faults.
CALLS_KEPT = 64
_HARDWARE = (214, 220)  # uncorrectable memory error, NVLink error
CUDA_ERROR_INVALID_VALUE = 1


def kind_of(error: int, protocol_errors: int) -> FaultKind:
    """What kind of fault a worker means that reports this error."""
    if error == CUDA_ERROR_INVALID_VALUE and protocol_errors:
        return FaultKind.PROTOCOL
    return FaultKind.DEVICE if error in _HARDWARE else FaultKind.KERNEL


def describe(flight: Flight | None, now_ns: int, since_ns: int = 0, process: str = "") -> str:
    """The details of a fault as JSON. ``since_ns``: when it began to hang, 0 if it did not; both CLOCK_MONOTONIC."""
    details: dict[str, Any] = {"process": process} if process else {}
    if since_ns:
        details["age_seconds"] = round((now_ns - since_ns) / 1e9, 3)
    if flight is not None:
        launch = flight.stuck_launch
        if launch is None:
            launch = next((call for call in reversed(flight.calls) if call.kernel), None)
            details["is_last_launch"] = launch is not None  # the newest one, not for certain the culprit
        if launch is not None:
            details |= {"kernel": launch.kernel, "grid": list(launch.grid), "block": list(launch.block)}
        if flight.fatal_signal:
            details["signal"] = flight.fatal_signal
        details["calls_in_all"] = flight.taken
        details["calls"] = [_call(call, now_ns) for call in flight.calls[-CALLS_KEPT:]]
    return json.dumps(details)


def _call(call: FlightCall, now_ns: int) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "call": call.call,
        "sequence": call.sequence,
        "ago_seconds": round((now_ns - call.began_ns) / 1e9, 6),
        "status": call.status,
    }
    if call.kernel:
        shown |= {"kernel": call.kernel, "grid": list(call.grid), "block": list(call.block)}
    return shown
