# SPDX-License-Identifier: Apache-2.0
"""Make the private environment that every `make` target uses, from nothing, with the Python that runs this file.

Afterwards ``.venv`` holds pip, the project's dependencies and development tools at the versions of
``tools/constraints.txt``, and the project itself, editable: its Python is imported from this checkout, its commands
are in ``.venv/bin``. The native parts are not built here but by tools/build_native.py. When nothing changed since
the last time it returns at once; where packages come from is the business of pip's own configuration.

A bare Debian or Ubuntu keeps parts of Python in packages that are often not installed (pip for venv, the C
headers). This program never changes the system and needs no root: it fetches those packages with ``apt-get
download``, unpacks them under ``.cache``, and uses them from there. Where that is impossible it says what to
install. Standard library only, for it runs before anything is installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
CACHE = ROOT / ".cache"
CONSTRAINTS = ROOT / "tools" / "constraints.txt"
STAMP = ENVIRONMENT / ".ready"
# What the build itself needs, besides pyproject's build requirements; machines have them too old or not at all.
BUILD_TOOLS = ["cmake>=3.26", "ninja"]


def run(*command: str | Path, cwd: Path = ROOT, environment: dict[str, str] | None = None) -> bool:
    """Run a command that may print but not ask; whether it succeeded."""
    words = [str(word) for word in command]
    return (
        subprocess.run(words, stdin=subprocess.DEVNULL, cwd=cwd, env=environment, check=False).returncode == 0
    )


def fail(message: str) -> None:
    """End with the message on standard error."""
    sys.exit(f"bootstrap: {message}")


def fingerprint() -> str:
    """Changes whenever the environment has to be brought up to date."""
    digest = hashlib.sha256(f"{sys.version} {sys.base_prefix} {ROOT}".encode())
    for path in (ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def from_distribution(*packages: str) -> Path | None:
    """Fetch Debian packages and unpack them, without installing; where they lie, or None if that cannot be done."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return None
    place = CACHE / "debian"
    place.mkdir(parents=True, exist_ok=True)
    print(f"bootstrap: fetching {' '.join(packages)} of this distribution into {place}", file=sys.stderr)
    if not run("apt-get", "download", "-q", *packages, cwd=place):
        # A fresh container has no package lists. Reading them changes no installed thing.
        if os.geteuid() != 0 or not run("apt-get", "update", "-q"):
            return None
        if not run("apt-get", "download", "-q", *packages, cwd=place):
            return None
    for archive in sorted(place.glob("*.deb")):
        if not run("dpkg-deb", "-x", archive, place):
            return None
        archive.unlink()
    return place


def install_pip(python: Path) -> None:
    """Give a venv that was made without pip a pip: the machine's own, else one out of the distribution's wheels."""
    if run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "pip"):
        return
    wheels = sorted(Path("/usr/share/python-wheels").glob("pip-*.whl"))
    if not wheels:
        place = from_distribution("python3-pip-whl")
        wheels = sorted(place.glob("usr/share/python-wheels/pip-*.whl")) if place else []
    if wheels:
        environment = {**os.environ, "PYTHONPATH": str(wheels[-1])}
        if run(python, "-m", "pip", "install", "--quiet", "pip", environment=environment):
            return
    shutil.rmtree(ENVIRONMENT)
    fail(
        "this Python has no pip and no way to get one was found; on Debian or Ubuntu: apt-get install python3-venv"
    )


def make_environment() -> Path:
    """The environment's interpreter; makes the environment where there is none or its Python is gone."""
    python = ENVIRONMENT / "bin" / "python"
    if not (python.exists() and run(python, "-c", "import pip")):
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        try:
            import ensurepip  # noqa: F401
        except ImportError:
            venv.create(ENVIRONMENT, symlinks=True, with_pip=False)
            install_pip(python)
        else:
            venv.create(ENVIRONMENT, symlinks=True, with_pip=True)
    return python


def fetch_python_headers() -> None:
    """Have Python's C headers at hand, for the cffi extensions."""
    if (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    include = CACHE / "python-headers" / "include"
    if (include / "Python.h").exists():
        return
    place = from_distribution(f"libpython{version}-dev")
    found = place / "usr" / "include" / f"python{version}" if place else None
    if found is None or not (found / "Python.h").exists():
        fail(f"no Python.h for Python {version}; on Debian or Ubuntu: apt-get install python3-dev")
        return
    shutil.copytree(found, include, dirs_exist_ok=True)
    # Debian's pyconfig.h only forwards to <multiarch/pythonX.Y/pyconfig.h>, which lies one folder up.
    for multiarch in (found.parent).glob(f"*-linux-gnu/python{version}"):
        shutil.copytree(multiarch, include / multiarch.parent.name / multiarch.name, dirs_exist_ok=True)


def check_machine() -> None:
    """Refuse early, in words, what would fail late and obscurely."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        fail(f"this is {sys.platform} {os.uname().machine}; Linux on x86-64 is needed")
    missing = [name for name in ("gcc", "g++") if shutil.which(name) is None]
    if "gcc" in missing:
        fail("there is no gcc; on Debian or Ubuntu: apt-get install gcc libc6-dev")
    if missing:
        print(
            "bootstrap: there is no g++; programs for CUDA's compiler cannot be built here", file=sys.stderr
        )


def main() -> int:
    """Bring the environment up to date; 0, or an exit with a message."""
    wanted = fingerprint()
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "bootstrap.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if STAMP.exists() and STAMP.read_text() == wanted:
            return 0
        check_machine()
        print("bootstrap: setting up .venv", file=sys.stderr)
        python = make_environment()
        fetch_python_headers()
        settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
        requirements = [
            *settings["build-system"]["requires"],
            *settings["project"]["dependencies"],
            *settings["dependency-groups"]["dev"],
            *BUILD_TOOLS,
        ]
        pip = (python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-input")
        if not run(*pip, "--upgrade", "-c", CONSTRAINTS, "pip", *requirements):
            fail("pip could not install the requirements (see above)")
        # The native parts of a checkout are built in place, so the editable install is Python alone: a path to src/.
        settings_of_backend = ("-Cwheel.cmake=false", "-Cwheel.py-api=py3", "-Ceditable.mode=inplace")
        if not run(*pip, "--no-deps", "--no-build-isolation", *settings_of_backend, "--editable", ROOT):
            fail("pip could not install this checkout (see above)")
        STAMP.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
