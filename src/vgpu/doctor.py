# SPDX-License-Identifier: Apache-2.0
"""``vgpu-admin doctor``: what a host needs to share its GPU with VMs, looked at one by one, each with its remedy.

Needs no mediator; where one runs it is asked, too. Changes nothing. Ends with 1 where something FAILs; a WARN is what works
worse than it could, or only matters for some uses.
"""

from __future__ import annotations

import argparse
import contextlib
import grp
import json
import os
import platform
import re
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import attrs

from vgpu import __version__
from vgpu.admin_client import AdminClient, NoMediator, RequestRefused
from vgpu.config import ConfigError, FileValues, Settings, make_settings, read_file
from vgpu.gpu.driver import CONTROL_DEVICE, DriverNotFound, find_library, version_text
from vgpu.paths import configuration_file, run_directory, state_directory
from vgpu.places_check import SHORTEST_NAME, name_room
from vgpu.shim.locate import library_directory
from vgpu.transport.host_memory import memory_from
from vgpu.units import show_seconds, show_size

OK: Final = "ok"
WARN: Final = "WARN"
FAIL: Final = "FAIL"
OLDEST_PYTHON: Final = (3, 11)
OLDEST_QEMU: Final = (10, 1)
OLDEST_KERNEL: Final = (5, 10)
LITTLE_DISK: Final = 64 << 20
FEW_FILES: Final = 1024
LITTLE_MEMLOCK: Final = 64 << 20
MUCH_DRIFT: Final = 0.2
LETTERS_SHOWN: Final = 3
LATELY_SECONDS: Final = 3600.0
COMMAND_SECONDS: Final = 20.0
PACKAGES: Final = ("trio", "attrs", "cffi", "numpy", "prometheus-client", "rich")


@attrs.frozen
class Finding:
    """One thing that was looked at. ``remedy``: what to do, where it is not ``ok``."""

    what: str
    level: str
    found: str
    remedy: str = ""


@attrs.frozen
class Host:
    """Where to look. Tests give it a host of their own."""

    run_dir: Path
    state_dir: Path
    configuration: Path
    qemu: str | None = None
    root: Path = Path("/")
    settings: Settings = attrs.Factory(Settings)
    mute: str = ""  # why the mediator that is there does not answer; asked once, for that takes its time
    mediator: int = 0  # the process of the one that answers, 0 without one

    def text(self, path: str) -> str:
        """The words of a small file of the host, empty where it cannot be read."""
        try:
            return (self.root / path).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return ""


def _output(*command: str, seconds: float = COMMAND_SECONDS) -> str | None:
    """What a command prints; None where it cannot be run, fails, or takes too long."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


# -- the machine and this program


def check_system(host: Host) -> Iterator[Finding]:
    """Kernel, processor and Python."""
    kernel = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])
    if sys.platform != "linux" or platform.machine() != "x86_64":
        yield Finding("system", FAIL, f"{sys.platform} {platform.machine()}", "Linux on x86-64 is needed")
    elif kernel < OLDEST_KERNEL:
        yield Finding("system", FAIL, f"Linux {platform.release()}", "boot Linux 5.10 or later")
    else:
        yield Finding("system", OK, f"Linux {platform.release()}")
    version = sys.version_info[:2]
    level = OK if version >= OLDEST_PYTHON else FAIL
    yield Finding(
        "Python", level, platform.python_version(), "" if level == OK else "use Python 3.11 or later"
    )


def check_parts(host: Host) -> Iterator[Finding]:
    """This program: its native parts, and what it imports."""
    try:
        from vgpu.gpu import _replay  # noqa: F401

        native = True
    except ImportError:
        native = False
    library = library_directory() / "libcuda.so.1"
    if native and library.is_file():
        yield Finding("vgpu", OK, f"{__version__}, native parts built")
    else:
        lacks = "the worker's native part" if not native else str(library)
        yield Finding("vgpu", FAIL, f"{__version__}, without {lacks}", "make build, or install a wheel")
    versions, missing = [], []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        yield Finding("packages", FAIL, f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    else:
        yield Finding("packages", OK, ", ".join(versions))


def check_configuration(host: Host) -> Iterator[Finding]:
    """The file, and what it says."""
    if not host.configuration.exists():
        yield Finding("configuration", OK, f"{host.configuration} is not there; defaults hold")
        return
    try:
        values: FileValues = read_file(host.configuration)
        make_settings(Settings(), values)
    except ConfigError as error:
        yield Finding(
            "configuration", FAIL, str(error), "mend that line; a running mediator goes on as it was"
        )
        return
    yield Finding("configuration", OK, f"{host.configuration}, {len(values)} settings")


# -- the GPU


def check_driver(host: Host) -> Iterator[Finding]:
    """The real driver, or that there is none."""
    control = host.root / str(CONTROL_DEVICE).lstrip("/")
    module = host.text("sys/module/nvidia/version")
    try:
        library = find_library(host.settings.library)
    except DriverNotFound as error:
        if module or host.settings.gpu == "nvidia" or host.settings.library is not None:
            yield Finding("driver", FAIL, str(error), "install the driver's libcuda, or say --library PATH")
        else:
            yield Finding(
                "driver",
                WARN,
                "no NVIDIA driver here: only the software GPU can be shared",
                "to share a real GPU, install NVIDIA's driver and see that nvidia-smi works on this host",
            )
        return
    if not control.exists():
        yield Finding(
            "driver", FAIL, f"module {module}, but no {CONTROL_DEVICE}", "nvidia-modprobe -c 0 -u, as root"
        )
        return
    yield Finding("driver", OK, f"{version_text(library)} ({library})")
    for name in ("nvidiactl", "nvidia-uvm", "nvidia0"):
        path = host.root / "dev" / name
        if not path.exists():
            remedy = "nvidia-modprobe -c 0 -u, as root (and nvidia-persistenced, to keep it)"
            yield Finding(
                f"/dev/{name}", FAIL if name != "nvidia0" else WARN, "there is no such device", remedy
            )
        elif not os.access(path, os.R_OK | os.W_OK):
            yield Finding(
                f"/dev/{name}",
                FAIL,
                f"user {os.getuid()} may not open it",
                "run as root, or give the user's group the device",
            )


# -- virtual machines


def check_qemu(host: Host) -> Iterator[Finding]:
    """A QEMU with the client of our devices."""
    program = host.qemu or shutil.which("qemu-system-x86_64")
    remedy = "install QEMU 10.1 or later (Debian 13 backports, Fedora 43, Ubuntu 25.10), or say --qemu PATH"
    if program is None:
        yield Finding("QEMU", WARN, "no qemu-system-x86_64 on the search path", remedy)
        return
    text = _output(program, "--version")
    found = re.search(r"version (\d+)\.(\d+)(\S*)", text or "")
    if found is None:
        yield Finding("QEMU", FAIL, f"{program} does not tell its version", remedy)
        return
    version = (int(found[1]), int(found[2]))
    words = f"{version[0]}.{version[1]}{found[3]} ({program})"
    if version < OLDEST_QEMU:
        yield Finding("QEMU", FAIL, f"{words} has no vfio-user-pci", remedy)
        return
    devices = _output(program, "-device", "help")
    if devices is None or '"vfio-user-pci"' not in devices:
        yield Finding(
            "QEMU",
            FAIL,
            f"{words} was built without vfio-user-pci",
            "use your distribution's package; whoever builds it needs CONFIG_VFIO_USER",
        )
    else:
        yield Finding("QEMU", OK, f"{words}, with vfio-user-pci")


def check_kvm(host: Host) -> Iterator[Finding]:
    """Does it run code, rather than exist?"""
    path = host.root / "dev/kvm"
    slow = "VMs run, slowly, under emulation (accel=tcg)"
    if not path.exists():
        yield Finding(
            "KVM",
            WARN,
            f"no /dev/kvm: {slow}",
            "switch virtualisation on in the firmware; in a VM or container, have its host hand it through",
        )
        return
    if not os.access(path, os.R_OK | os.W_OK):
        yield Finding(
            "KVM", WARN, f"user {os.getuid()} may not open /dev/kvm: {slow}", "usermod -aG kvm USER"
        )
        return
    said = _output(sys.executable, "-P", "-m", "vgpu.kvm_probe", seconds=5)
    if said is None:
        said = "a virtual machine of three instructions did not end in 5 s"
    flags = re.search(r"^flags\s*:.*\b(vmx|svm)\b", host.text("proc/cpuinfo"), re.MULTILINE)
    if said.strip() == OK and flags is not None:
        yield Finding("KVM", OK, f"/dev/kvm runs code ({flags[1]})")
    elif said.strip() == OK:
        yield Finding(
            "KVM",
            WARN,
            f"/dev/kvm runs code, but the processor shows no vmx or svm: kernels as distributions have them may not boot; {slow}",
            "try one VM with accel=kvm; if it stops early, ask who runs this machine for nested virtualisation",
        )
    else:
        yield Finding(
            "KVM",
            WARN,
            f"/dev/kvm is there and is of no use: {said.strip()}; {slow}",
            "ask who runs this machine for nested virtualisation",
        )


# -- places


def check_places(host: Host) -> Iterator[Finding]:
    """Run and state directory."""
    longest = name_room(host.run_dir)
    if longest < SHORTEST_NAME:
        yield Finding(
            "run directory",
            FAIL,
            f"{host.run_dir} is so long that names of VMs could have {max(longest, 0)} characters",
            "use a shorter --run-dir",
        )
    for what, folder in (("run directory", host.run_dir), ("state directory", host.state_dir)):
        yield _folder(what, folder)
    place = next(p for p in (host.state_dir, *host.state_dir.parents) if p.exists())
    free = shutil.disk_usage(place).free
    level = OK if free >= LITTLE_DISK else FAIL
    remedy = (
        ""
        if level == OK
        else "make room: records of sessions and faults wait until there is some, and then are lost"
    )
    yield Finding("room for the ledger", level, f"{show_size(free)} free at {place}", remedy)


def _folder(what: str, folder: Path) -> Finding:
    if not folder.exists():
        parent = next(p for p in folder.parents if p.exists())
        if os.access(parent, os.W_OK):
            return Finding(what, OK, f"{folder} is not there yet; run-mediator makes it")
        return Finding(
            what,
            FAIL,
            f"{folder} is not there, and user {os.getuid()} may not make it",
            f"run as root, or say --{what.partition(' ')[0]}-dir",
        )
    about = folder.stat()
    mode = stat.S_IMODE(about.st_mode)
    if mode & 0o022 and not mode & stat.S_ISVTX:
        return Finding(what, FAIL, f"{folder} can be written by others ({mode:04o})", f"chmod go-w {folder}")
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return Finding(
            what,
            FAIL,
            f"{folder} belongs to user {about.st_uid}, not {os.getuid()}",
            "run as that user, or as root",
        )
    return Finding(what, OK, f"{folder} ({mode:04o}, user {about.st_uid})")


def check_sockets(host: Host) -> Iterator[Finding]:
    """Devices' sockets: who may connect a QEMU."""
    folder = host.run_dir / "vfio-user"
    group = host.settings.socket_group
    try:
        sockets = sorted(folder.glob("*.sock"))
    except OSError:
        sockets = []
    for path in sockets:
        try:
            about = path.stat()
        except OSError:
            continue
        mode = stat.S_IMODE(about.st_mode)
        if mode & 0o007:
            yield Finding(
                f"socket {path.name}", FAIL, f"everybody may connect ({mode:04o})", f"chmod o= {path}"
            )
        elif group and _group_name(about.st_gid) != group:
            yield Finding(
                f"socket {path.name}",
                WARN,
                f"not of group {group}: the device was started before that was set",
                "unregister-vm and register-vm, or restart the device while its VM is off",
            )
    if sockets:
        yield Finding("sockets of VMs", OK, f"{len(sockets)} in {folder}")


def _group_name(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


# -- limits and memory


def _hard_limit(host: Host, which: int) -> int:
    """The mediator's where one runs, for a service has those of its unit; else this shell's."""
    with contextlib.suppress(OSError):  # somebody else's, or it has just ended
        if host.mediator:
            return resource.prlimit(host.mediator, which)[1]
    return resource.getrlimit(which)[1]


def check_limits(host: Host) -> Iterator[Finding]:
    """What a mediator has for its limits, or would have if it were started here."""
    files = _hard_limit(host, resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < FEW_FILES:
        yield Finding(
            "descriptors", WARN, f"at most {files}", "ulimit -n 65536, or LimitNOFILE=65536 in the unit"
        )
    else:
        yield Finding("descriptors", OK, "no limit" if files == resource.RLIM_INFINITY else f"up to {files}")
    locked = _hard_limit(host, resource.RLIMIT_MEMLOCK)
    if locked != resource.RLIM_INFINITY and locked < LITTLE_MEMLOCK:
        yield Finding(
            "locked memory",
            WARN,
            f"at most {show_size(locked)}",
            "ulimit -l unlimited, or LimitMEMLOCK=infinity in the unit: drivers pin what programs register",
        )
    else:
        yield Finding(
            "locked memory", OK, "no limit" if locked == resource.RLIM_INFINITY else show_size(locked)
        )
    huge = re.search(r"\[(\w+)\]", host.text("sys/kernel/mm/transparent_hugepage/shmem_enabled"))
    if huge is None:
        yield Finding("huge pages for BAR1", WARN, "this kernel does not say", "nothing breaks without them")
    elif huge[1] in ("never", "deny"):
        yield Finding(
            "huge pages for BAR1",
            WARN,
            f"shmem_enabled is {huge[1]}: memory shared with VMs is in small pages, large copies take longer",
            "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
        )
    else:
        yield Finding("huge pages for BAR1", OK, f"shmem_enabled is {huge[1]}")


def check_memory(host: Host, vms: list[dict[str, Any]]) -> Iterator[Finding]:
    """Room for what VMs share with the host."""
    memory = memory_from(host.text("proc/meminfo"))
    sizes = [vm["bar1_bytes"] for vm in vms]
    promised, available = sum(sizes), memory.available_bytes
    with_device = sum(size > 0 for size in sizes)
    whom = "1 VM" if with_device == 1 else f"{with_device} VMs"
    words = (
        f"{show_size(promised)} promised to {whom},"
        f" {show_size(available)} of {show_size(memory.total_bytes)} available"
    )
    if not memory.can_promise(sizes):
        yield Finding("memory for BAR1", FAIL, words, "register VMs with a smaller --bar1")
    elif promised > available:
        yield Finding(
            "memory for BAR1",
            WARN,
            words,
            "if VMs fill what they were given the host runs out: a smaller --bar1, or fewer VMs",
        )
    else:
        yield Finding("memory for BAR1", OK, words)


# -- a mediator that runs


def check_mediator(host: Host) -> Iterator[Finding]:
    """Asks it how it is. Its VMs go into what is checked of memory."""
    vms: list[dict[str, Any]] = []
    if host.mute:
        found, _, remedy = host.mute.partition("; ")
        yield Finding("mediator", FAIL, found, remedy)
        yield from check_memory(host, vms)
        return
    try:
        with AdminClient(host.run_dir) as client:
            health, vms = client.ask("health"), client.ask("vms")
            devices, runtime = client.ask("devices"), client.ask("runtime")
            gpu_time = client.ask("gpu_time")
    except NoMediator as error:
        left = (host.run_dir / "admin.sock").exists()
        level = FAIL if left else WARN
        remedy = (
            "systemctl start vgpu-mediator, or run-mediator" if "another user" not in str(error) else "sudo"
        )
        yield Finding("mediator", level, str(error).partition(";")[0], remedy)
    except RequestRefused as error:
        yield Finding("mediator", FAIL, f"does not say how it is: {error}", "see its log")
    else:
        yield from _mediator(health, devices)
        yield from _handlers(runtime)
        yield from _dead_letters(runtime)
        yield from _gpu_time(gpu_time)
    yield from check_memory(host, vms)


def _mediator(health: dict[str, Any], devices: list[dict[str, Any]]) -> Iterator[Finding]:
    words = f"process {health['pid']}, {health['gpu']} GPU, version {health['version']}"
    if health["version"] != __version__:
        yield Finding(
            "mediator",
            WARN,
            f"{words}, but this is {__version__}",
            "systemctl restart vgpu-mediator: sessions go on meanwhile",
        )
    elif not health["ok"]:
        yield Finding(
            "mediator",
            FAIL,
            f"{words}: {'; '.join(health['trouble'])}",
            "vgpu-admin show-health; see its log",
        )
    elif health.get("draining", False):
        yield Finding(
            "mediator",
            WARN,
            f"{words}: drains, lets nobody new in and ends with its last session",
            "vgpu-admin list-sessions and kill-session; a second SIGTERM ends it at once",
        )
        return
    else:
        yield Finding("mediator", OK, words)
    for device in devices:
        if not device["running"]:
            yield Finding(
                f"device of {device['vm']}",
                FAIL,
                device["trouble"],
                "see the log beside its socket, in devices/",
            )


def _gpu_time(found: dict[str, Any]) -> Iterator[Finding]:
    """The longest window of each GPU that somebody has looked at lately (metrics, top)."""
    for gpu, windows in found.items():
        window = windows[-1]
        drift = window["drift_ratio"]
        if drift is None:
            continue
        words = f"counted {window['counted_ratio']:.0%} of the last {window['seconds']:g} s, NVML says {window['nvml_ratio']:.0%}"
        is_good = abs(drift) <= MUCH_DRIFT
        yield Finding(
            f"GPU time of GPU {gpu}",
            OK if is_good else WARN,
            words,
            "" if is_good else "see who else uses the card (nvidia-smi), and docs/scheduling.md, Drift",
        )


def _handlers(runtime: dict[str, Any]) -> Iterator[Finding]:
    """What its stuck-handler detector found."""
    total, last = runtime["statistics"]["stuck_handlers"], runtime["stuck_handlers"]
    if not total:
        yield Finding("mediator's handlers", OK, "none was found stuck")
        return
    yield Finding(
        "mediator's handlers",
        WARN,
        f"{total} found stuck since it began, last: {last[-1].splitlines()[0] if last else 'not known'}",
        "its log has where each of them waited; please report that",
    )


def _dead_letters(runtime: dict[str, Any]) -> Iterator[Finding]:
    """Messages that nobody read: how many, and when, from whom and to whom the last ones were."""
    total, last = runtime["statistics"]["dead_letters"], runtime["dead_letters"]
    if not last:
        yield Finding("dead letters", OK, "none: its actors have read every message")
        return
    now = runtime.get("now", last[-1]["time"])
    words = [
        f"{show_seconds(now - letter['time'])} ago {letter['message_type']}"
        f" from {letter['sender'] or 'somebody'} to {letter['target']}"
        for letter in reversed(last[-LETTERS_SHOWN:])
    ]
    is_old = now - last[-1]["time"] > LATELY_SECONDS
    yield Finding(
        "dead letters",
        OK if is_old else WARN,
        f"{total} not read since it began, the last: {'; '.join(words)}",
        "vgpu-trace tree has more of them; where its log does not say that the reader had just ended, please report it",
    )


CHECKS: Final[tuple[Callable[[Host], Iterator[Finding]], ...]] = (
    check_system,
    check_parts,
    check_configuration,
    check_driver,
    check_qemu,
    check_kvm,
    check_places,
    check_sockets,
    check_limits,
    check_mediator,
)


def examine(host: Host) -> list[Finding]:
    """All of it. Takes as long as QEMU and KVM take to answer."""
    return [finding for check in CHECKS for finding in check(host)]


def doctor_options(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("--state-dir", type=Path, help="where the ledger is (default: as run-mediator)")
    parser.add_argument(
        "--config", type=Path, help="the mediator's configuration file (default: as run-mediator)"
    )
    parser.add_argument(
        "--qemu", metavar="PATH", help="the QEMU that VMs are run with (default: qemu-system-x86_64)"
    )


def find_host(options: argparse.Namespace) -> Host:
    """Where this host's things are: by the options, then as a mediator that runs says, then by the configuration file, then
    the usual places."""
    path = options.config or configuration_file(os.environ)
    usual = Settings(run_dir=run_directory(os.environ), state_dir=state_directory(os.environ))
    settings = _settings(usual, path, options.config is not None)
    run_dir = options.run_dir or settings.run_dir
    described, mute = _ask_where(run_dir)
    if options.config is None and "configuration" in described:
        path = Path(described["configuration"])
        settings = _settings(usual, path, False)
    if described.get("library"):
        settings = attrs.evolve(settings, library=Path(described["library"]))
    state_dir = options.state_dir or Path(described.get("state_dir", settings.state_dir))
    mediator = int(described.get("pid", 0))
    return Host(run_dir, state_dir, path, options.qemu, settings=settings, mute=mute, mediator=mediator)


def _settings(usual: Settings, path: Path, is_said: bool) -> Settings:
    with contextlib.suppress(ConfigError):  # which is one of the findings
        from_file = read_file(path) if is_said or path.exists() else {}
        return make_settings(usual, from_file, {"run_dir": os.environ.get("VGPU_RUN_DIR") or None})
    return usual


def _ask_where(run_dir: Path) -> tuple[dict[str, Any], str]:
    """What the mediator there says of itself, nothing where there is none; and why one that is there says nothing."""
    try:
        with AdminClient(run_dir) as client:
            return client.ask("health"), ""
    except NoMediator as error:
        return {}, str(error) if "does not answer" in str(error) else ""
    except RequestRefused:
        return {}, ""


def run_doctor(options: argparse.Namespace) -> int:
    """Look, and say it; 1 where something fails."""
    findings = examine(find_host(options))
    failed = sum(finding.level == FAIL for finding in findings)
    if options.json:
        print(json.dumps({"ok": not failed, "findings": [attrs.asdict(f) for f in findings]}, indent=2))
        return 1 if failed else 0
    from vgpu.admin_tables import say

    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        say(f"{finding.level:<4}  {finding.what:<{width}}  {finding.found}")
        if finding.remedy and finding.level != OK:
            say(f"      {'':<{width}}  -> {finding.remedy}")
    warned = sum(finding.level == WARN for finding in findings)
    say(f"\n{len(findings)} looked at, {failed} failed, {warned} could be better")
    return 1 if failed else 0
