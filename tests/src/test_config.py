# SPDX-License-Identifier: Apache-2.0
"""Settings: layers, refusals that name what is wrong, and where things are."""

from __future__ import annotations

from pathlib import Path

import pytest

from vgpu.config import ConfigError, Settings, find_group, make_settings, parse_address, read_file
from vgpu.mediator_main import read_settings
from vgpu.paths import configuration_file, run_directory, state_directory
from vgpu.run_main import guest_environment


@pytest.fixture(autouse=True)
def _no_run_directory_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VGPU_RUN_DIR", raising=False)


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mediator.toml"
    path.write_text('[mediator]\ngpu = "software"\nwarm_workers = 3\nrun_dir = "/run/a"\n')
    settings = read_settings(["--config", str(path), "--warm-workers", "2", "--state-dir", str(tmp_path)])
    assert settings.gpu == "software"
    assert settings.warm_workers == 2
    assert settings.run_dir == Path("/run/a")
    assert settings.state_dir == tmp_path


def test_the_environment_wins_over_the_file_and_the_command_line_over_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs and vgpu-admin go by the environment, and must find the mediator that was started in it."""
    path = tmp_path / "mediator.toml"
    path.write_text('[mediator]\nrun_dir = "/run/a"\n')
    for said, words, expected in [
        ("/run/b", [], "/run/b"),
        ("", [], "/run/a"),
        ("/run/b", ["--run-dir", "/run/c"], "/run/c"),
    ]:
        monkeypatch.setenv("VGPU_RUN_DIR", said)
        assert read_settings(["--config", str(path), *words]).run_dir == Path(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[mediator]\ngup = 1\n", "unknown key 'gup'"),
        ("[mediator]\nwarm_workers = true\n", "warm_workers is True"),
        ("[other]\n", r"unknown table \[other\]"),
        ("nonsense", "mediator.toml, line 1: Expected .*: 'nonsense'$"),
        (
            "[mediator]\ngpu = 'auto'\n\n# about it\ngup = [\n  1,\n]\nwarm_workers = 1\n",
            "toml, line 5: unknown key 'gup'",
        ),
        (
            'mediator.gpu = "auto"\nmediator.warm_workers = "x"\n',
            "toml, line 2: warm_workers is 'x', expected int",
        ),
        ("mediator = { gpu = 'auto', devices = 3 }\n", "toml, line 1: devices is 3"),
        ("gpu = 'auto'\n[mediator]\n", r"toml, line 1: gpu stands before \[mediator\]"),
        ("\n[mediator]\nlog_level = 'info'\n[other]\n", r"toml, line 4: unknown table \[other\]"),
        ("mediator = 3\n", "toml, line 1: mediator is 3"),
        ("[mediator]\nquantum_ms = \n", "line 2: Invalid value: 'quantum_ms ='$"),
        ("[mediator]\r\nquantum_ms = \r\ngpu = 'auto'\r\n", "line 2: Invalid value: 'quantum_ms ='$"),
        ("[mediator]\ngpu = 'auto'\ngpu = 1\n", "line 3: Cannot overwrite a value: 'gpu = 1'$"),
        ("[mediator]\ndevices = [0,\n", r"line 2: .*: 'devices = \[0,'$"),  # at the end of the file
        ("[mediator]\ndevices = [0,\n\n", "line 3: Invalid value$"),
        ("[mediator]\ngpu = 'au\x1bto'\n", r"line 2: .*: \"gpu = 'au\\x1bto'\"$"),
        ("[mediator]\ngpu = " + "x" * 500 + "\n", f"line 2: Invalid value: 'gpu = {'x' * 74}...'$"),
        ("[mediator]\nwarm_workers = " + "1" * 500 + " y\n", r"line 2: .*: '\.\.\.1{37,38} y'$"),
        ("[mediator]\n# caf\xe9\n", "line 2: this is not UTF-8"),
        (
            '[mediator]\nlibrary = """\nwarm_workers = 1\n"""\nwarm_workers = "1"\n',
            "toml, line 5: warm_workers",
        ),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mediator.toml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=message):
        read_file(path)


def test_the_last_line_is_the_parsers_whatever_else_ends_a_line(tmp_path: Path) -> None:
    path = tmp_path / "mediator.toml"
    path.write_text("[mediator]\nlibrary = '\u2028'\ndevices = [0", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"line 3: .*: 'devices = \[0'$"):
        read_file(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gpu", "amd"),
        ("warm_workers", -1),
        ("quantum_ms", 0),
        ("devices", []),
        ("devices", ["0"]),
        ("devices", [1, 1]),
    ],
)
def test_values_out_of_range_are_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        make_settings(Settings(), {key: value})


def test_a_value_out_of_range_is_named_with_its_line_unless_the_command_line_said_it(tmp_path: Path) -> None:
    path = tmp_path / "mediator.toml"
    path.write_text('[mediator]\ngpu = "software"\n\nquantum_ms = 5000\nmetrics = "nowhere"\n')
    with pytest.raises(
        ConfigError, match=r"mediator\.toml, line 4: quantum_ms is 5000, expected 0\.1 to 1000"
    ):
        read_settings(["--config", str(path), "--metrics", ""])
    with pytest.raises(ConfigError, match=r"mediator\.toml, line 5: metrics is 'nowhere'"):
        read_settings(["--config", str(path), "--quantum-ms", "5"])
    with pytest.raises(ConfigError, match=r"^quantum_ms is 0"):
        read_settings(["--config", str(path), "--metrics", "", "--quantum-ms", "0"])
    settings = read_settings(["--config", str(path), "--metrics", "", "--quantum-ms", "5"])
    assert (settings.metrics, settings.quantum_ms) == (None, 5)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9400", ("127.0.0.1", 9400)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_an_address_is_read(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    ["", ":", "9400", ":9400", "host:", "host:-1", "host:65536", "host:9 ", "host:٣", "::1:9400", "[host]:1", "[]:1",
     "http://host:9400", "a b:1", "host:1:2"],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="metrics is"):
        parse_address(text)


def test_several_devices_and_metrics_come_from_line_or_file(tmp_path: Path) -> None:
    path = tmp_path / "mediator.toml"
    path.write_text('[mediator]\ndevices = [2, 0]\nmetrics = "127.0.0.1:9400"\n')
    settings = read_settings(["--config", str(path)])
    assert (settings.devices, settings.metrics) == ((2, 0), ("127.0.0.1", 9400))
    settings = read_settings(["--config", str(path), "--device", "1,3", "--metrics", "[::1]:1"])
    assert (settings.devices, settings.metrics) == ((1, 3), ("::1", 1))


def test_places() -> None:
    assert run_directory({}, 0) == Path("/var/vgpu")
    assert run_directory({"XDG_RUNTIME_DIR": "/run/user/7"}, 7) == Path("/run/user/7/vgpu")
    assert run_directory({"VGPU_RUN_DIR": "/x", "XDG_RUNTIME_DIR": "/y"}, 0) == Path("/x")
    assert state_directory({}, 0) == Path("/var/lib/vgpu")
    assert state_directory({"HOME": "/h"}, 7) == Path("/h/.local/state/vgpu")
    assert configuration_file({}, 0) == Path("/etc/vgpu/mediator.toml")
    assert configuration_file({"XDG_CONFIG_HOME": "/c"}, 7) == Path("/c/vgpu/mediator.toml")


def test_places_are_absolute_wherever_the_process_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A QEMU, a worker or a program that works in another folder is told them."""
    monkeypatch.chdir(tmp_path)
    settings = read_settings(["--run-dir", "r", "--state-dir", "s", "--library", "libcuda.so.1"])
    assert (settings.run_dir, settings.state_dir) == (tmp_path / "r", tmp_path / "s")
    assert settings.library == tmp_path / "libcuda.so.1"
    (tmp_path / "m.toml").write_text('[mediator]\nrun_dir = "a"\nstate_dir = "b"\n')
    settings = read_settings(["--config", "m.toml"])
    assert (settings.run_dir, settings.state_dir) == (tmp_path / "a", tmp_path / "b")
    assert run_directory({"VGPU_RUN_DIR": "x"}, 0) == tmp_path / "x"
    assert run_directory({"XDG_RUNTIME_DIR": "x"}, 7) == tmp_path / "x" / "vgpu"
    assert state_directory({"XDG_STATE_HOME": "x"}, 7) == tmp_path / "x" / "vgpu"
    assert configuration_file({"XDG_CONFIG_HOME": "x"}, 7) == tmp_path / "x" / "vgpu" / "mediator.toml"
    assert guest_environment({}, None, Path("run"))["VGPU_RUN_DIR"] == str(tmp_path / "run")


def test_a_guest_gets_the_library_path_and_the_socket_and_nothing_else() -> None:
    before = {"LD_LIBRARY_PATH": "/mine", "HOME": "/h"}
    after = guest_environment(before, "vm1", Path("/run/vgpu"))
    assert after.pop("LD_LIBRARY_PATH").endswith(":/mine")
    assert after.pop("VGPU_RUN_DIR") == "/run/vgpu"
    assert after.pop("VGPU_VM") == "vm1"
    assert after == {"HOME": "/h"}


@pytest.mark.parametrize("group", ["99999999999999", "4294967295", "9" * 5000, "\udcff", "a\0b"])
def test_a_group_that_cannot_be(group: str) -> None:
    """With the number above the last, chown would leave the group as it is."""
    with pytest.raises(ConfigError, match="socket_group is") as found:
        make_settings(Settings(), {"socket_group": group})
    assert found.value.key == "socket_group"


def test_a_group_by_number_need_not_have_a_name() -> None:
    assert find_group("4294967294") == 4294967294
    assert make_settings(Settings(), {"socket_group": "0"}).socket_group == "0"
