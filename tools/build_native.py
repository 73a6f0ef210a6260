# SPDX-License-Identifier: Apache-2.0
"""Build the native parts for this checkout, in place and without pip; a second run with nothing changed is instant.

The targets are those of CMakeLists.txt. What comes out replaces the previous file by one rename, so a program that
has the old one mapped keeps it whole:

    build/native/libcuda.so.1  (and the link libcuda.so)
    shim/lib/libcuda.so.1      the same, where an installed package has it
    build/native/libnvidia-ml.so.1, build/native/nvidia-smi, and the same two in shim/lib
    build/native/libvgpu-exec.so, vgpu-guest-agent, vgpu-guest-probe, and the same in shim/lib
    gpu/_replay.abi3.so        importable as vgpu.gpu._replay
    transport/_ring.abi3.so    importable as vgpu.transport._ring

One target that does not compile stops neither the others nor hides: the exit status is 1 and the compiler's words
are printed. Parts whose sources are absent are left out. ``--only NAME`` builds one target; ``--debug`` builds with
``-O0 -g`` and ``--sanitize address|thread|undefined`` instrumented copies, in build folders and output folders of
their own (``build/native-debug`` ...), leaving the files above alone.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Target -> where its product goes, besides the output folder.
TARGETS = {
    "libcuda": "shim/lib",
    "libnvidia-ml": "shim/lib",
    "nvidia_smi": "shim/lib",
    "vgpu_exec": "shim/lib",
    "vgpu_guest_agent": "shim/lib",
    "vgpu_guest_probe": "shim/lib",
    "_replay": "gpu",
    "_ring": "transport",
}
# What is no extension module: a library with its plain name; and a file by the name it has, mostly a program.
LIBRARIES = {"libcuda": "libcuda.so", "libnvidia-ml": "libnvidia-ml.so"}
PROGRAMS = {
    "nvidia_smi": "nvidia-smi",
    "vgpu_exec": "libvgpu-exec.so",
    "vgpu_guest_agent": "vgpu-guest-agent",
    "vgpu_guest_probe": "vgpu-guest-probe",
}
# What ninja says besides the compiler's words: steps, and the whole command of a step that failed.
PROGRESS = re.compile(r"\[\d+/\d+\] |ninja: |: && |/\S*/(cc|gcc) |generating <")


def tool(name: str) -> str:
    """A build tool of the running Python's environment, else the machine's."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        sys.exit(f"build_native: no {name} in the environment of {sys.executable}; run `make build`")
    return found


def configure(folder: Path, options: list[str]) -> None:
    """Write the build files. They look after themselves later: new sources are seen, a changed list reconfigures."""
    command = [tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
    command += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}"]
    command += options
    include = Path(sysconfig.get_path("include"))
    # Where a distribution keeps Python's headers apart and they are not installed, tools/bootstrap.py fetched them.
    fetched = ROOT / ".cache" / "python-headers" / "include"
    if not (include / "Python.h").exists() and (fetched / "Python.h").exists():
        command += [f"-DPython_INCLUDE_DIR={fetched}"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        shutil.rmtree(folder, ignore_errors=True)
        sys.exit(f"build_native: cmake failed\n{done.stdout}{done.stderr}")


def known_targets(folder: Path) -> list[str]:
    """The names in TARGETS that the configured build has; reconfigures first if a list of sources changed."""
    listing = subprocess.run(
        [tool("ninja"), "-C", str(folder), "-t", "targets", "all"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = {line.split(":")[0] for line in listing.splitlines() if line.endswith(": phony")}
    return [name for name in TARGETS if name in names]


def publish(product: Path, destination: Path) -> bool:
    """Put a copy of ``product`` at ``destination``; False if the same file was there already."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    if destination.exists():
        old, new = destination.stat(), product.stat()
        if (old.st_size, old.st_mtime_ns) == (new.st_size, new.st_mtime_ns):
            return False
    unfinished = destination.with_name(f".{destination.name}.{os.getpid()}")
    shutil.copy2(product, unfinished)
    unfinished.replace(destination)
    return True


def product_name(target: str) -> str:
    """The file that a target makes."""
    if target in PROGRAMS:
        return PROGRAMS[target]
    return f"{LIBRARIES[target]}.1" if target in LIBRARIES else f"{target}.abi3.so"


def imports(target: str) -> bool:
    """Whether the extension loads; the linker lets an extension through with functions that nobody defined."""
    module = f"vgpu.{TARGETS[target]}.{target}"
    source = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); import {module}"
    return subprocess.run([sys.executable, "-P", "-c", source], check=False).returncode == 0


def link(name: str, target: str, folder: Path) -> None:
    """Make ``folder/name`` a symbolic link to ``target`` beside it."""
    path = folder / name
    if not path.is_symlink():
        path.unlink(missing_ok=True)
        path.symlink_to(target)


def build(folder: Path, output: Path, wanted: list[str], *, in_place: bool) -> int:
    """Compile the wanted targets and publish what compiled; the number of targets that failed."""
    failed = 0
    for target in wanted:
        done = subprocess.run(
            [tool("ninja"), "-C", str(folder), target],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        # gcc's warnings are in ninja's output also when it succeeds; silence means nothing to say.
        if done.returncode != 0 or "warning:" in done.stdout:
            print(
                *(line for line in done.stdout.splitlines() if not PROGRESS.match(line)),
                sep="\n",
                file=sys.stderr,
            )
        if done.returncode != 0:
            print(f"build_native: {target} FAILED", file=sys.stderr)
            failed += 1
            continue
        product = folder / product_name(target)
        folders = [output, ROOT / TARGETS[target]] if in_place else [output]
        changed = [publish(product, place / product.name) for place in folders]
        if target in LIBRARIES:
            for place in folders:
                link(LIBRARIES[target], product.name, place)
        elif target not in PROGRAMS and in_place and any(changed) and not imports(target):
            for place in folders:  # or the next run would find nothing to do and call it good
                (place / product.name).unlink()
            print(f"build_native: {target} was built but does not load", file=sys.stderr)
            failed += 1
    return failed


def main() -> int:
    """Build what the command line asks for; 0 if all of it compiled."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=sorted(TARGETS), action="append", help="build this target alone")
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("--sanitize", choices=["address", "thread", "undefined"])
    arguments = parser.parse_args()

    flavour, options = "native", []
    if arguments.sanitize:
        flavour = f"native-{arguments.sanitize}"
        instrument = f"-O1 -g -fno-omit-frame-pointer -fsanitize={arguments.sanitize}"
        options = [f"-DVGPU_OPTIMIZE={instrument}", "-DVGPU_SANITIZE=ON"]
    elif arguments.debug:
        flavour, options = "native-debug", ["-DVGPU_OPTIMIZE=-O0 -g"]
    output = ROOT / "build" / flavour
    folder = output / "cmake"
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several builds of one checkout wait for each other
        if not (folder / "build.ninja").exists():
            configure(folder, options)
        # Brings build.ninja up to date with the sources that exist now, so that the targets listed are today's.
        subprocess.run(
            [tool("ninja"), "-C", str(folder), "build.ninja"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # what is wrong, the targets will say again
            check=False,
        )
        known = known_targets(folder)
        wanted = arguments.only or known
        absent = [target for target in wanted if target not in known]
        for target in absent:
            print(f"build_native: {target} has no sources in this checkout", file=sys.stderr)
        failed = build(folder, output, [t for t in wanted if t in known], in_place=flavour == "native")
    return 1 if failed or absent else 0


if __name__ == "__main__":
    sys.exit(main())
