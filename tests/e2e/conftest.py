# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the end-to-end tests: mediators, and compiled guest programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.mediator import Mediator
from tests.e2e.steady import Steady


@pytest.fixture(scope="session")
def mediator() -> Iterator[Mediator]:
    """A mediator shared by the tests that leave it as they found it."""
    with Mediator() as running:
        yield running


@pytest.fixture
def own_mediator() -> Iterator[Mediator]:
    """A mediator of the test's own, to be ill-treated."""
    with Mediator() as running:
        yield running


@pytest.fixture
def steady(driver_program: Callable[[str], Path], kernels: Path) -> Steady:
    """The program that computes steadily."""
    return Steady(driver_program("steady"), kernels)
