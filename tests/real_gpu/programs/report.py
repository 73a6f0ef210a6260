# SPDX-License-Identifier: Apache-2.0
"""What every program here prints: one JSON line. ``equal`` must be the same natively and remoted, ``info`` need not."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def digest(array: Any) -> str:
    """A checksum of an array's type, shape and bytes, for torch, CuPy, JAX and NumPy arrays alike."""
    if hasattr(array, "detach"):  # torch: bf16 has no NumPy type, so go through bytes
        import torch

        tensor = array.detach().contiguous().cpu()
        shape, kind = tuple(tensor.shape), str(tensor.dtype)
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        import numpy

        host = array.get() if hasattr(array, "get") else numpy.asarray(array)
        shape, kind, data = host.shape, str(host.dtype), numpy.ascontiguousarray(host).tobytes()
    return f"{kind}{list(shape)}:{hashlib.sha256(data).hexdigest()[:24]}"


def close(name: str, found: Any, expected: Any, tolerance: float) -> float:
    """The relative error of ``found`` against a reference; an AssertionError where it is over ``tolerance``."""
    import numpy

    found, expected = numpy.asarray(found, numpy.float64), numpy.asarray(expected, numpy.float64)
    error = float(numpy.linalg.norm(found - expected) / max(float(numpy.linalg.norm(expected)), 1e-30))
    assert error <= tolerance, f"{name}: relative error {error:.3g} is over {tolerance:g}"
    return error


def report(equal: dict[str, Any], **info: Any) -> None:
    """Print the program's one line, last."""
    print(json.dumps({"equal": equal, "info": info}), flush=True)
