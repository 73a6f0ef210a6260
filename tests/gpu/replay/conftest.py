# SPDX-License-Identifier: Apache-2.0
"""The fake driver, compiled once."""

from __future__ import annotations

from pathlib import Path

import pytest

from .guest import build_fake_driver


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a library that answers as libcuda does, over host memory."""
    return build_fake_driver(tmp_path_factory.mktemp("fake"))
