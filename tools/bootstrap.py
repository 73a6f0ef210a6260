# SPDX-License-Identifier: Apache-2.0
"""Make the private environment that every `make` target uses, from nothing, with the Python that runs this file.

Afterwards ``.venv`` holds pip, the project's dependencies and development tools at the versions of
``tools/constraints.txt``, and the project itself, editable: its Python is imported from this checkout, its commands
are in ``.venv/bin``. The native parts are not built here but by tools/build_native.py. When nothing changed since
the last time it returns at once; where packages come from is the business of pip's own configuration.

A bare Debian or Ubuntu keeps parts of Python and of gcc in packages that are often not installed (pip for venv, the C
headers, the C++ compiler). This program never changes the system and needs no root: it fetches those packages with ``apt-get
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


def run(
    *command: str | Path, cwd: Path = ROOT, environment: dict[str, str] | None = None, quiet: bool = False
) -> bool:
    """Run a command that may print (unless quiet) but not ask; whether it succeeded."""
    words = [str(word) for word in command]
    output = subprocess.DEVNULL if quiet else None
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=cwd, env=environment, check=False
    )
    return done.returncode == 0


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
    # As root apt would drop its rights, and then could not write here.
    download = ("apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", *packages)
    if not run(*download, cwd=place, quiet=True):
        # A fresh container has no package lists. Reading them changes no installed thing.
        if os.geteuid() != 0 or any(Path("/var/lib/apt/lists").glob("*Packages*")):
            return None
        if not (run("apt-get", "update", "-qq", quiet=True) and run(*download, cwd=place, quiet=True)):
            return None
    for archive in sorted(place.glob("*.deb")):
        if not run("dpkg-deb", "-x", archive, place):
            return None
        archive.unlink()
    return place


def install_pip(python: Path) -> None:
    """Give a venv that was made without pip a pip: the machine's own, else one out of the distribution's wheels."""
    if run(sys.executable, "-m", "pip", "--python", python, "install", "pip", quiet=True):
        return
    wheels = sorted(Path("/usr/share/python-wheels").glob("pip-*.whl"))
    if not wheels:
        place = from_distribution("python3-pip-whl")
        wheels = sorted(place.glob("usr/share/python-wheels/pip-*.whl")) if place else []
    if wheels:
        environment = {**os.environ, "PYTHONPATH": str(wheels[-1])}
        if run(python, "-m", "pip", "install", "-qq", "pip", environment=environment):
            return
    shutil.rmtree(ENVIRONMENT)
    fail(
        "this Python has no pip and no way to get one was found; on Debian or Ubuntu: apt-get install python3-venv"
    )


def make_environment() -> Path:
    """The environment's interpreter; makes the environment where there is none or its Python is gone."""
    python = ENVIRONMENT / "bin" / "python"
    if not (python.exists() and run(python, "-c", "import pip", quiet=True)):
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


def fetch_host_compiler() -> None:
    """Have a C++ compiler at hand, for the host half of the CUDA programs that tests build.

    gcc's C++ half is a package of its own. Unpacked elsewhere it still finds its parts relative to itself, so gcc's
    own parts are linked in beside them. Without it only those tests fail, and they say why.
    """
    launcher = CACHE / "bin" / "g++"
    if shutil.which("g++") is not None or launcher.exists():
        return
    asked = subprocess.run(["gcc", "-dumpfullversion"], capture_output=True, text=True, check=False)
    version, triplet = asked.stdout.split(".")[0], "x86_64-linux-gnu"
    packages = (f"g++-{version}", f"libstdc++-{version}-dev")
    # Newer releases split the compiler proper off.
    place = from_distribution(*packages, f"g++-{version}-x86-64-linux-gnu") or from_distribution(*packages)
    if place is None:
        print(
            "bootstrap: there is no g++, so CUDA programs cannot be built; apt-get install g++",
            file=sys.stderr,
        )
        return
    for folder in ("lib", "libexec"):
        part = Path("usr", folder, "gcc", triplet, version)
        for path in sorted((Path("/") / part).glob("*")):
            (place / part).mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(place / part / path.name):
                (place / part / path.name).symlink_to(path)
    library = place / "usr" / "lib" / "gcc" / triplet / version / "libstdc++.so"
    library.unlink(missing_ok=True)
    library.symlink_to(f"/usr/lib/{triplet}/libstdc++.so.6")
    launcher.parent.mkdir(exist_ok=True)
    launcher.write_text(f'#!/bin/sh\nexec "{place}/usr/bin/{triplet}-g++-{version}" "$@"\n')
    launcher.chmod(0o755)


def check_machine() -> None:
    """Refuse early, in words, what would fail late and obscurely."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        fail(f"this is {sys.platform} {os.uname().machine}; Linux on x86-64 is needed")
    if shutil.which("gcc") is None:
        fail("there is no gcc; on Debian or Ubuntu: apt-get install gcc libc6-dev")


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
        fetch_host_compiler()
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
