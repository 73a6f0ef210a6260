# SPDX-License-Identifier: Apache-2.0
"""The conformance suite over ``struct vgpu_driver``, one file per subject; ``vgpu.gpu.testing`` runs it."""

from .probe import CHECKS as CHECKS
from .probe import Check as Check
from .probe import Mismatch as Mismatch
from .probe import Probe as Probe
