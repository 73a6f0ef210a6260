# SPDX-License-Identifier: Apache-2.0
"""Kernels that CuPy generates, compiled by NVRTC, on the executor: against NumPy's functions of the same names."""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vgpu.gpu.software.memory import AddressSpace

from .conftest import Harness

LANES, ROWS_OF_REDUCTION, BLOCK = 100, 5, 256
TOLERANCE = {"e": 4e-3, "f": 3e-6, "F": 2e-5, "d": 1e-12, "D": 1e-11}
# CuPy defines these differently from NumPy: a negative left operand, overflow of the product, division by zero.
DIFFERENT = {
    ("logical_and", "<i8"),
    ("logical_and", "<u8"),
    ("lcm", "|i1"),
    ("reciprocal", "<i4"),
    ("reciprocal", "<i8"),
}


@pytest.fixture(scope="module")
def cupy_kernels(cupy_python: Path, nvrtc_library: Path, cuda_home: Path) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("generate_cupy_kernels.py")
    command = [cupy_python, script, nvrtc_library, cuda_home / "include", cuda_home / "include" / "cccl"]
    environment = {"LD_LIBRARY_PATH": str(nvrtc_library.parent)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    loaded: list[dict[str, Any]] = json.loads(result.stdout)
    return loaded


def values(dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    generator = np.random.default_rng(1)
    if dtype.kind in "biu":
        low = 0 if dtype.kind != "i" else -9
        return generator.integers(low, 2 if dtype.kind == "b" else 100, shape).astype(dtype)
    real = generator.normal(size=shape) * 2
    return (real + 1j * generator.normal(size=shape) if dtype.kind == "c" else real).astype(dtype)


def close(got: npt.NDArray[Any], wanted: npt.NDArray[Any], tolerance: float) -> bool:
    return bool(np.allclose(got, wanted, rtol=tolerance, atol=tolerance, equal_nan=True))


def run_elementwise(case: dict[str, Any]) -> bool:
    """Whether there was something to compare with."""
    harness = Harness(AddressSpace(1 << 22))
    instance = harness.load(case["ptx"])
    inputs = [values(np.dtype(d), (LANES,)) for d in case["in"]]
    outputs = [np.zeros(LANES, d) for d in case["out"]]
    pointers = [harness.upload(array) for array in (*inputs, *outputs)]
    params = b"".join(
        struct.pack("<Qqqq", pointer, LANES, LANES, array.itemsize)
        for pointer, array in zip(pointers, (*inputs, *outputs), strict=True)
    ) + struct.pack("<qqq", LANES, LANES, 0)
    assert len(params) == instance.module.kernels["kern"].params_size
    instance.launch("kern", (1, 1, 1), (128, 1, 1), params=params)
    reference = getattr(np, case["name"], None)
    if reference is None or (case["name"], case["in"][0]) in DIFFERENT:
        return False
    with np.errstate(all="ignore"):
        try:
            wanted = reference(*inputs)
        except (TypeError, ValueError):  # NumPy refuses these types, or integers to negative powers
            return False
    for place, array in enumerate(outputs):
        expected = np.asarray(wanted[place] if isinstance(wanted, tuple) else wanted)
        got = harness.download(pointers[len(inputs) + place], array)
        assert close(got, expected.astype(array.dtype), TOLERANCE.get(array.dtype.char, 0)), (
            case["name"],
            case["in"],
        )
    return True


REDUCTIONS: dict[str, Callable[..., Any]] = {
    "sum_auto_dtype": np.sum, "_sum_keep_dtype": np.sum, "prod_auto_dtype": np.prod, "_prod_keep_dtype": np.prod,
    "nansum_auto_dtype": np.nansum, "_nansum_keep_dtype": np.nansum, "all": np.all, "any": np.any,
}  # fmt: skip


def run_reduction(case: dict[str, Any]) -> bool:
    harness = Harness(AddressSpace(1 << 22))
    instance = harness.load(case["ptx"])
    width = 300
    source = values(np.dtype(case["in"][0]), (ROWS_OF_REDUCTION, width))
    if "prod" in case["name"] and source.dtype.kind in "fc":
        source = (source / np.abs(source)).astype(source.dtype)
    result = np.zeros(ROWS_OF_REDUCTION, case["out"][0])
    data, out = harness.upload(source), harness.upload(result)
    size = source.itemsize
    params = struct.pack("<Qqqqqq", data, source.size, width, ROWS_OF_REDUCTION, size, width * size)
    params += struct.pack("<Qqqq", out, ROWS_OF_REDUCTION, ROWS_OF_REDUCTION, result.itemsize)
    params += struct.pack("<qqqqq", source.size, width, ROWS_OF_REDUCTION, 0, 0)
    params += struct.pack("<qqqi", ROWS_OF_REDUCTION, ROWS_OF_REDUCTION, 0, 1)
    assert len(params) == instance.module.kernels["kern"].params_size
    instance.launch("kern", (ROWS_OF_REDUCTION, 1, 1), (BLOCK, 1, 1), params=params)
    reference = REDUCTIONS.get(case["name"])
    if reference is None:
        return False
    with np.errstate(all="ignore"):
        wanted = reference(source, axis=1).astype(result.dtype)
    assert close(harness.download(out, result), wanted, 100 * TOLERANCE.get(result.dtype.char, 0)), case[
        "name"
    ]
    return True


def test_generated_kernels(cupy_kernels: list[dict[str, Any]]) -> None:
    compiled = [case for case in cupy_kernels if not case["ptx"].startswith("error")]
    # Some combinations of types exist in CuPy's tables and not in its headers.
    assert len(compiled) > 0.9 * len(cupy_kernels)
    compared = [run_elementwise(case) for case in compiled if case["family"] == "elementwise"]
    reduced = [run_reduction(case) for case in compiled if case["family"] == "reduction"]
    assert sum(compared) >= 70, f"{sum(compared)} of {len(compared)} functions compared"
    assert sum(reduced) >= 8, f"{sum(reduced)} of {len(reduced)} reductions compared"
