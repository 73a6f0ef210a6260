# SPDX-License-Identifier: Apache-2.0
"""Lets these tests import ``bench``, which lies beside ``tests`` and is installed nowhere.

The checkout's root must not go on the path for it: then ``import gpu`` would work and modules be loaded twice.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

if "bench" not in sys.modules:
    spec = ModuleSpec("bench", None, is_package=True)
    spec.submodule_search_locations = [str(ROOT / "bench")]
    sys.modules["bench"] = importlib.util.module_from_spec(spec)
