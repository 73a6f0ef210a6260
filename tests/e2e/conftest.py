# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the end-to-end tests: mediators, and compiled guest programs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.mediator import Mediator


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
