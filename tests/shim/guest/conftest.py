# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the guest's tests: built parts, a bundle of them, and a made-up system."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.shim.guest.staging import (
    FAKE_LIBRARY,
    GUEST,
    REAL_PARTS,
    SHELL,
    Machine,
    compile_library,
    make_bundle,
)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Agent, probe and exec library as build.sh makes them; libraries and nvidia-smi that stand for the real ones."""
    folder = tmp_path_factory.mktemp("parts")
    subprocess.run([SHELL, str(GUEST / "build.sh"), "-o", str(folder), *REAL_PARTS], check=True)
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        compile_library(FAKE_LIBRARY, name, folder)
    (folder / "nvidia-smi").write_text(
        '#!/bin/sh\necho "GPU 0: Fake H200 (UUID: GPU-0)"\nexit ${FAKE_SMI:-0}\n'
    )
    (folder / "nvidia-smi").chmod(0o755)
    (folder / "GLIBC").write_text("2.17\n")
    return folder


@pytest.fixture
def bundle(tmp_path: Path, parts: Path) -> Path:
    """install.sh of a bundle."""
    return make_bundle(tmp_path / "bundle", parts)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A Debian-like root with glibc and the groups that GPUs have there."""
    made = Machine(tmp_path / "root")
    made.write("lib64/ld-linux-x86-64.so.2", "stands for the loader")
    made.write("etc/group", "root:x:0:\nvideo:x:44:\nrender:x:105:\n")
    made.write("etc/ld.so.conf", "include /etc/ld.so.conf.d/*.conf\n")
    (made.root / "usr/bin").mkdir(parents=True)
    (made.root / "usr/lib").mkdir(parents=True)
    return made
