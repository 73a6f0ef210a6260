# SPDX-License-Identifier: Apache-2.0
"""Where things are: sockets, state, configuration. The table in docs and README comes from here.

As root under /var/vgpu, /var/lib/vgpu and /etc/vgpu; as a user under the XDG directories.
``VGPU_RUN_DIR`` overrides the sockets' place on both sides. The environment is an argument. All paths are absolute, whatever the
environment says: they are handed to programs, QEMUs and workers, which may be in other folders.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def run_directory(environment: Mapping[str, str], uid: int | None = None) -> Path:
    """The folder of the sockets."""
    if environment.get("VGPU_RUN_DIR"):
        return Path(environment["VGPU_RUN_DIR"]).absolute()
    if (os.getuid() if uid is None else uid) == 0:
        return Path("/var/vgpu")
    runtime = environment.get("XDG_RUNTIME_DIR")
    own = Path(runtime) if runtime else Path(f"/run/user/{os.getuid() if uid is None else uid}")
    return own.absolute() / "vgpu"


def state_directory(environment: Mapping[str, str], uid: int | None = None) -> Path:
    """The folder of the ledger."""
    if (os.getuid() if uid is None else uid) == 0:
        return Path("/var/lib/vgpu")
    base = environment.get("XDG_STATE_HOME") or str(Path(environment.get("HOME", "/")) / ".local/state")
    return Path(base).absolute() / "vgpu"


def configuration_file(environment: Mapping[str, str], uid: int | None = None) -> Path:
    """The default configuration file, whether or not it exists."""
    if (os.getuid() if uid is None else uid) == 0:
        return Path("/etc/vgpu/mediator.toml")
    base = environment.get("XDG_CONFIG_HOME") or str(Path(environment.get("HOME", "/")) / ".config")
    return Path(base).absolute() / "vgpu" / "mediator.toml"
