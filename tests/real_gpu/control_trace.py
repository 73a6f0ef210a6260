# SPDX-License-Identifier: Apache-2.0
"""Step."""

from __future__ import annotations

from .control_host import Findings, Scene


def measure(scene: Scene, found: Findings) -> None:
    """Not yet."""
