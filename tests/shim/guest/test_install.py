# SPDX-License-Identifier: Apache-2.0
"""install.sh on made-up systems: what it writes, that it takes all of it back, what it refuses, and what interrupts it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.shim.guest.staging import SHELL, Machine, make_bundle, run, snapshot

LIBRARIES = ("libcuda.so.1", "libnvidia-ml.so.1")


def install(bundle: Path, machine: Machine, *words: str | Path, **environment: str) -> str:
    done = run(bundle, "install", "--prefix", machine.root, *words, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def uninstall(bundle: Path, machine: Machine) -> str:
    done = run(bundle, "--uninstall", "--prefix", machine.root)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def cached(machine: Machine, name: str) -> list[str]:
    """Where the loader of that system finds a library, best first."""
    listing = subprocess.run(
        ["ldconfig", "-r", str(machine.root), "-p"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": f"{os.environ['PATH']}:/sbin:/usr/sbin"},
    ).stdout
    return re.findall(rf"^\s+{re.escape(name)} \(libc6,x86-64.*=> (\S+)$", listing, re.MULTILINE)


# ---- what is written


def test_the_loader_finds_ours_first(bundle: Path, machine: Machine, parts: Path) -> None:
    # Some other library of that name, in a folder of its own that the configuration lists.
    other = machine.root / "opt/other"
    other.mkdir(parents=True)
    shutil.copy(parts / "libcuda.so.1", other)
    machine.write("etc/ld.so.conf.d/other.conf", "/opt/other\n")
    install(bundle, machine)
    assert cached(machine, "libcuda.so.1") == ["/usr/lib/vgpu/libcuda.so.1", "/opt/other/libcuda.so.1"]
    assert cached(machine, "libnvidia-ml.so.1") == ["/usr/lib/vgpu/libnvidia-ml.so.1"]
    for name in LIBRARIES:
        assert os.readlink(machine.root / "usr/lib/vgpu" / name.removesuffix(".1")) == name


@pytest.mark.parametrize("before", [None, "/opt/lib\n"])
def test_a_loader_that_reads_no_folder_is_told_to(bundle: Path, machine: Machine, before: str | None) -> None:
    path = machine.root / "etc/ld.so.conf"
    path.unlink() if before is None else path.write_text(before)
    old = snapshot(machine.root)
    install(bundle, machine)
    assert machine.read("etc/ld.so.conf") == "include /etc/ld.so.conf.d/*.conf\n" + (before or "")
    assert cached(machine, "libcuda.so.1") == ["/usr/lib/vgpu/libcuda.so.1"]
    install(bundle, machine)
    assert machine.read("etc/ld.so.conf").count("include") == 1
    uninstall(bundle, machine)
    assert snapshot(machine.root) == old


@pytest.mark.parametrize(
    ("groups", "chosen"),
    [
        ("render:x:105:\nvideo:x:44:\n", "render"),
        ("video:x:44:\n", "video"),
        ("video:x:44:\ngpu:x:9:\n", "gpu"),
    ],
)
def test_the_group(bundle: Path, machine: Machine, groups: str, chosen: str) -> None:
    machine.write("etc/group", f"root:x:0:\n{groups}")
    words = ["--group", "gpu"] if chosen == "gpu" else []
    install(bundle, machine, *words)
    assert f"--group {chosen} --permit" in machine.read("etc/udev/rules.d/71-vgpu.rules")
    assert f"vgpu-guest-agent --group {chosen}\n" in machine.read("etc/systemd/system/vgpu-guest.service")
    install(bundle, machine)  # an update keeps the choice
    assert f"--group {chosen} --permit" in machine.read("etc/udev/rules.d/71-vgpu.rules")


def test_without_a_group_root_alone_gets_the_device(bundle: Path, machine: Machine) -> None:
    machine.write("etc/group", "root:x:0:\n")
    assert "only root will be able to use the GPU" in install(bundle, machine)
    assert "--group" not in machine.read("etc/udev/rules.d/71-vgpu.rules")


def test_a_group_that_does_not_exist_is_refused(bundle: Path, machine: Machine) -> None:
    before = snapshot(machine.root)
    done = run(bundle, "install", "--prefix", machine.root, "--group", "nobody-here")
    assert (done.returncode, "there is no group nobody-here" in done.stderr) == (1, True)
    assert snapshot(machine.root) == before


def test_an_nvidia_smi_that_is_there_stays(bundle: Path, machine: Machine) -> None:
    machine.write("usr/bin/nvidia-smi", "somebody else's\n", 0o755)
    before = snapshot(machine.root)
    assert "there is a command nvidia-smi already" in install(bundle, machine)
    assert machine.read("usr/bin/nvidia-smi") == "somebody else's\n"
    assert not machine.has("usr/lib/vgpu/nvidia-smi")
    uninstall(bundle, machine)
    assert snapshot(machine.root) == before


def test_what_was_installed_can_check_and_uninstall_by_itself(bundle: Path, machine: Machine) -> None:
    before = snapshot(machine.root)
    install(bundle, machine)
    installed = machine.root / "usr/lib/vgpu/guest/install.sh"
    assert run(installed, "--version").stdout == "install.sh 1.0\n"
    assert "OK    files" in run(installed, "check", "--prefix", machine.root).stdout
    assert "uninstalled" in uninstall(installed, machine)
    assert snapshot(machine.root) == before


# ---- taking it back


def test_uninstall_restores_every_file(bundle: Path, machine: Machine) -> None:
    # Files of the names that we write, with modes and times of their own.
    for name in ("etc/profile.d/vgpu.sh", "etc/udev/rules.d/71-vgpu.rules", "usr/lib/vgpu/libcuda.so.1"):
        path = machine.write(name, f"the former {name}\n", 0o640)
        os.utime(path, (1_000_000_000, 1_000_000_000))
    (machine.root / "usr/lib/vgpu/libnvidia-ml.so").symlink_to("elsewhere.so.3")
    before = snapshot(machine.root)
    install(bundle, machine, "--force")  # a libcuda.so.1 was there
    assert machine.read("etc/profile.d/vgpu.sh") != "the former etc/profile.d/vgpu.sh\n"
    assert snapshot(machine.root) != before
    uninstall(bundle, machine)
    assert snapshot(machine.root) == before


def test_a_second_install_changes_nothing(bundle: Path, machine: Machine) -> None:
    before = snapshot(machine.root)
    install(bundle, machine)
    first = snapshot(machine.root)
    install(bundle, machine)
    second = snapshot(machine.root)
    rewritten = {"var/lib/vgpu-guest/manifest", "etc/ld.so.cache", "var/cache/ldconfig/aux-cache"}
    assert {name for name in first if first[name] != second.get(name)} <= rewritten
    assert second["var/lib/vgpu-guest/manifest"][-1] == first["var/lib/vgpu-guest/manifest"][-1]
    uninstall(bundle, machine)
    assert snapshot(machine.root) == before
    assert "nothing is installed" in uninstall(bundle, machine)


def test_a_new_version_replaces_the_old_one(
    bundle: Path, machine: Machine, parts: Path, tmp_path: Path
) -> None:
    before = snapshot(machine.root)
    install(bundle, machine)
    newer = make_bundle(tmp_path / "newer", parts, "2.0")
    # What a release could drop: here the environment file.
    text = newer.read_text()
    newer.write_text(text.replace("\n    put_environment\n", "\n"))
    assert newer.read_text() != text
    install(newer, machine)
    assert machine.read("usr/lib/vgpu/guest/VERSION") == "2.0\n"
    assert not machine.has("etc/profile.d/vgpu.sh")
    assert not machine.has("etc/profile.d")
    uninstall(newer, machine)
    assert snapshot(machine.root) == before


def test_an_edited_file_is_kept_beside(bundle: Path, machine: Machine) -> None:
    install(bundle, machine)
    path = machine.root / "etc/systemd/system/vgpu-guest.service"
    path.write_text("mine\n")
    assert "was changed after it was installed" in install(bundle, machine)
    assert path.read_text().startswith("[Unit]")
    assert path.with_name("vgpu-guest.service.vgpu-saved").read_text() == "mine\n"
    path.write_text("mine again\n")
    assert "was changed after it was installed" in uninstall(bundle, machine)
    assert not path.exists()
    assert path.with_name("vgpu-guest.service.vgpu-saved").read_text() == "mine again\n"


@pytest.mark.parametrize("step", [1, 2, 13, 19, 22])
@pytest.mark.parametrize("then", ["install", "uninstall"])
def test_an_interrupted_install(bundle: Path, machine: Machine, tmp_path: Path, step: int, then: str) -> None:
    """Killed at its n-th rename; the next run finishes it or takes it back."""
    machine.write("etc/profile.d/vgpu.sh", "the former one\n", 0o600)
    before = snapshot(machine.root)
    folder = tmp_path / "bin"
    folder.mkdir()
    counter = tmp_path / "renames"
    (folder / "mv").write_text(
        f'#!/bin/sh\necho x >>{counter}\n[ $(wc -l <{counter}) -lt {step} ] || {{ kill -9 $PPID; exit 1; }}\nexec {shutil.which("mv")} "$@"\n'
    )
    (folder / "mv").chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    killed = run(bundle, "install", "--prefix", machine.root, environment={"PATH": path})
    assert killed.returncode == -9
    assert "an install or uninstall was interrupted" in run(bundle, "check", "--prefix", machine.root).stdout
    if then == "install":
        assert "an earlier install or uninstall was interrupted" in install(bundle, machine)
        assert "OK    files" in run(bundle, "check", "--prefix", machine.root).stdout
    uninstall(bundle, machine)
    assert snapshot(machine.root) == before


def test_an_interrupted_uninstall_is_finished_by_the_next(
    bundle: Path, machine: Machine, tmp_path: Path
) -> None:
    machine.write("etc/profile.d/vgpu.sh", "the former one\n", 0o600)
    before = snapshot(machine.root)
    install(bundle, machine)
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "mv").write_text("#!/bin/sh\nkill -9 $PPID\n")  # the one rename of it: the restored file
    (folder / "mv").chmod(0o755)
    killed = run(
        bundle, "uninstall", "--prefix", machine.root, environment={"PATH": f"{folder}:{os.environ['PATH']}"}
    )
    assert killed.returncode == -9
    uninstall(bundle, machine)
    assert snapshot(machine.root) == before


def test_two_at_once_are_refused(bundle: Path, machine: Machine) -> None:
    machine.write("var/lib/vgpu-guest/pid", f"{os.getpid()}\n")
    done = run(bundle, "install", "--prefix", machine.root)
    assert done.returncode == 1
    assert f"process {os.getpid()} is installing or uninstalling right now" in done.stderr


# ---- what is not done


@pytest.mark.parametrize("action", ["install", "uninstall"])
def test_a_dry_run_changes_nothing(bundle: Path, machine: Machine, action: str) -> None:
    if action == "uninstall":
        install(bundle, machine)
    before = snapshot(machine.root)
    done = run(bundle, action, "--dry-run", "--prefix", machine.root, "--with-ollama")
    assert done.returncode == 0, done.stderr
    assert snapshot(machine.root) == before
    for path in ("/usr/lib/vgpu/libcuda.so.1", "/etc/udev/rules.d/71-vgpu.rules", "/etc/profile.d/vgpu.sh"):
        assert re.search(rf"would (write|remove or restore) {re.escape(path)}$", done.stdout, re.MULTILINE)


def _module(machine: Machine) -> None:
    machine.write("sys/module/nvidia/version", "580.65.06\n")


def _proc(machine: Machine) -> None:
    machine.write("proc/driver/nvidia/version", "NVRM version\n")


def _package(machine: Machine) -> None:
    machine.write("usr/lib/x86_64-linux-gnu/libcuda.so.1", "the driver's")


@pytest.mark.parametrize("driver", [_module, _proc, _package])
def test_a_real_driver_is_left_alone(bundle: Path, machine: Machine, driver: object) -> None:
    assert callable(driver)
    driver(machine)
    before = snapshot(machine.root)
    done = run(bundle, "install", "--prefix", machine.root)
    assert done.returncode == 1
    assert "this system has a real NVIDIA driver" in done.stderr
    assert "nothing was changed" in done.stderr
    assert snapshot(machine.root) == before
    assert "going on because of --force" in install(bundle, machine, "--force")
    uninstall(bundle, machine)
    assert snapshot(machine.root) == before


def test_a_driver_in_the_loaders_cache_is_seen(bundle: Path, machine: Machine, parts: Path) -> None:
    folder = machine.root / "opt/driver"
    folder.mkdir(parents=True)
    shutil.copy(parts / "libcuda.so.1", folder)
    machine.write("etc/ld.so.conf.d/driver.conf", "/opt/driver\n")
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/sbin:/usr/sbin"}
    subprocess.run(["ldconfig", "-r", str(machine.root), "-X"], check=True, env=environment)
    done = run(bundle, "install", "--prefix", machine.root)
    assert done.returncode == 1
    assert "a driver package put /opt/driver/libcuda.so.1 there" in done.stderr


def test_musl_is_refused(bundle: Path, machine: Machine) -> None:
    machine.write("etc/alpine-release", "3.20.0\n")
    done = run(bundle, "install", "--prefix", machine.root)
    assert done.returncode == 1
    assert "musl" in done.stderr
    assert "glibc" in done.stderr


def test_damaged_libraries_are_refused(bundle: Path, machine: Machine) -> None:
    library = bundle.parents[2] / "prebuilt" / "libcuda.so.1"
    library.write_bytes(library.read_bytes()[:-1])
    before = snapshot(machine.root)
    done = run(bundle, "install", "--prefix", machine.root)
    assert (done.returncode, "their checksums differ" in done.stderr) == (1, True)
    assert snapshot(machine.root) == before


def test_without_libraries_and_sources_it_says_what_to_copy(bundle: Path, machine: Machine) -> None:
    shutil.rmtree(bundle.parents[2] / "prebuilt")
    done = run(bundle, "install", "--prefix", machine.root)
    assert (done.returncode, "neither prebuilt libraries nor their sources" in done.stderr) == (1, True)


def test_the_running_system_needs_a_device(bundle: Path) -> None:
    """On the machine that runs the tests, which has no virtual GPU; --dry-run, so that it stays as it is."""
    done = run(bundle, "install", "--dry-run")
    assert done.returncode == 1
    assert re.search("there is no virtual GPU in this VM|has a real NVIDIA driver", done.stderr)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["frobnicate"], "unknown word frobnicate"),
        (["--prefix"], "--prefix needs a value"),
        (["install", "--check"], "install and check at once"),
        (["--prefix", "/nonexistent"], "/nonexistent is no folder"),
    ],
)
def test_wrong_use(bundle: Path, words: list[str], message: str) -> None:
    done = run(bundle, *words)
    assert (done.returncode, message in done.stderr) == (2, True)


# ---- nodes


@pytest.mark.skipif(os.geteuid() != 0, reason="device nodes can be made by root alone")
def test_nodes_exist_and_cannot_be_opened(bundle: Path, machine: Machine) -> None:
    (machine.root / "dev").mkdir()
    done = run(bundle, "nodes", "--prefix", machine.root)
    if "cannot make /dev/nvidia0" in done.stderr:
        pytest.skip("no device nodes may be made here")
    nodes = {path.name: os.stat(path) for path in (machine.root / "dev").iterdir()}
    assert {name: (os.major(status.st_rdev), os.minor(status.st_rdev)) for name, status in nodes.items()} == {
        "nvidia0": (195, 0),
        "nvidiactl": (195, 255),
        "nvidia-uvm": (195, 252),
        "nvidia-uvm-tools": (195, 253),
    }
    assert {status.st_mode & 0o777 for status in nodes.values()} == {0o666}
    if Path("/sys/module/nvidia").exists():
        return
    for name in nodes:
        with pytest.raises(OSError):
            os.close(os.open(machine.root / "dev" / name, os.O_RDWR))


# ---- the environment


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ("/plain", "/plain"),
        ("/plain:OTHER", "/usr/lib/vgpu:/plain:OTHER"),
        ("/usr/lib/vgpu:OTHER", "/usr/lib/vgpu:OTHER"),
    ],
)
def test_the_environment_mends_a_hiding_path_alone(
    bundle: Path, machine: Machine, parts: Path, given: str | None, expected: str | None
) -> None:
    install(bundle, machine)
    environment = {"PATH": os.environ["PATH"]}
    if given is not None:
        environment["LD_LIBRARY_PATH"] = given.replace("OTHER", str(parts))
    script = f'. {machine.root}/etc/profile.d/vgpu.sh; echo "${{LD_LIBRARY_PATH-none}}"; set'
    shell = subprocess.run(
        [SHELL, "-uc", script], env=environment, capture_output=True, text=True, check=True
    )
    assert shell.stdout.splitlines()[0] == (expected or "none").replace("OTHER", str(parts))
    assert not re.search("^vgpu_", shell.stdout, re.MULTILINE)


def test_an_install_without_root(bundle: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    before = snapshot(home)
    done = run(bundle, "install", "--user", home=home)
    if "real NVIDIA driver" in done.stderr:
        pytest.skip("this machine has a real driver")
    assert done.returncode == 0, done.stderr
    folder = home / ".local/lib/vgpu"
    program = "import os; print(os.environ['LD_LIBRARY_PATH'], os.environ['LD_PRELOAD'])"
    for start in (
        [str(home / ".local/bin/vgpu-env")],
        [SHELL, "-c", f'. {folder}/environment.sh; exec "$@"', "x"],
    ):
        shell = subprocess.run([*start, "python3", "-c", program], capture_output=True, text=True, check=True)
        assert shell.stdout.split() == [str(folder), str(folder / "libvgpu-exec.so")]
        assert shell.stderr == ""
    assert run(bundle, "uninstall", "--user", home=home).returncode == 0
    assert snapshot(home) == before


def test_without_root_there_is_no_ollama(bundle: Path, tmp_path: Path) -> None:
    done = run(bundle, "install", "--user", "--with-ollama", home=tmp_path)
    assert (done.returncode, "needs the system-wide install" in done.stderr) == (1, True)


# ---- Ollama


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """What Ollama's release archive looks like."""
    folder = tmp_path / "release"
    for name in ("bin/ollama", "lib/ollama/llama-server", "lib/ollama/cuda_v13/libggml-cuda.so"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\n")
        path.chmod(0o755)
    archive = tmp_path / "ollama-linux-amd64.tgz"
    with tarfile.open(archive, "w:gz") as packed:
        for top in ("bin", "lib"):
            packed.add(folder / top, top)
    return archive


def test_ollama_from_an_archive(bundle: Path, machine: Machine, release: Path) -> None:
    before = snapshot(machine.root)
    install(bundle, machine, "--with-ollama", "--ollama-archive", release)
    assert machine.read("usr/local/bin/ollama") == "bin/ollama\n"
    assert machine.has("usr/local/lib/ollama/cuda_v13/libggml-cuda.so")
    drop_in = machine.read("etc/systemd/system/ollama.service.d/vgpu.conf")
    settings = [line for line in drop_in.splitlines() if line and not line.startswith("#")]
    assert "SupplementaryGroups=render" in settings
    assert "ProtectKernelTunables=no" in settings
    assert not [line for line in settings if "LD_" in line or line.startswith("Environment")]
    assert "ExecStart=/usr/local/bin/ollama serve" in machine.read("etc/systemd/system/ollama.service")
    # An update without the option keeps it; so does one with it, and without a network.
    for words in ([], ["--with-ollama"]):
        install(bundle, machine, *words, VGPU_OLLAMA_URL="http://127.0.0.1:9")
        assert machine.read("usr/local/bin/ollama") == "bin/ollama\n"
        assert machine.has("etc/systemd/system/ollama.service.d/vgpu.conf")
    uninstall(bundle, machine)
    assert snapshot(machine.root) == before


def test_an_ollama_that_is_there_stays(bundle: Path, machine: Machine) -> None:
    machine.write("usr/local/bin/ollama", "an older one\n", 0o755)
    machine.write("etc/systemd/system/ollama.service", "[Service]\nUser=ollama\n")
    before = snapshot(machine.root)
    assert "Ollama is there already and stays as it is" in install(bundle, machine, "--with-ollama")
    assert machine.read("usr/local/bin/ollama") == "an older one\n"
    assert machine.read("etc/systemd/system/ollama.service") == "[Service]\nUser=ollama\n"
    assert "SupplementaryGroups=render" in machine.read("etc/systemd/system/ollama.service.d/vgpu.conf")
    uninstall(bundle, machine)
    assert snapshot(machine.root) == before


def test_without_a_network_everything_else_is_installed(
    bundle: Path, machine: Machine, tmp_path: Path
) -> None:
    before = snapshot(machine.root)
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "curl").write_text("#!/bin/sh\nexit 6\n")
    (folder / "curl").chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    done = run(bundle, "install", "--prefix", machine.root, "--with-ollama", environment={"PATH": path})
    assert done.returncode == 1
    assert "the download failed" in done.stderr
    assert "--ollama-archive FILE" in done.stderr
    assert cached(machine, "libcuda.so.1") == ["/usr/lib/vgpu/libcuda.so.1"]
    assert not machine.has("etc/systemd/system/ollama.service")
    uninstall(bundle, machine)
    assert snapshot(machine.root) == before


def test_an_archive_of_something_else_is_refused(bundle: Path, machine: Machine, tmp_path: Path) -> None:
    before = snapshot(machine.root)
    archive = tmp_path / "other.tgz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(bundle, "bin/other")
    done = run(bundle, "install", "--prefix", machine.root, "--ollama-archive", archive)
    assert (done.returncode, "not Ollama's release archive" in done.stderr) == (1, True)
    assert not machine.has("usr/local/bin/other")
    uninstall(bundle, machine)
    assert snapshot(machine.root) == before
