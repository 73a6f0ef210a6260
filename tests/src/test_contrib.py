# SPDX-License-Identifier: Apache-2.0
"""The dashboard, the alert rules and docs/metrics.md against what a running mediator serves."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests import prometheus
from tests.e2e.mediator import wait_until
from tests.e2e.vm_device import DeviceMediator
from tests.src.test_admin import admin, answer

ROOT = Path(__file__).resolve().parent.parent.parent
DASHBOARD = ROOT / "contrib" / "grafana" / "vgpu.json"
RULES = ROOT / "contrib" / "prometheus" / "vgpu.rules.yml"
PAGE = ROOT / "docs" / "metrics.md"
# Served by a GPU's sensors, which the software GPU has few of; docs/metrics.md has them from the code.
SENSORS = "vgpu_host_gpu_"
SYSTEMD = ROOT / "contrib" / "systemd"
SYSTEMD_ANALYZE = shutil.which("systemd-analyze")


@pytest.fixture(scope="module")
def text() -> Iterator[str]:
    """The exposition of a mediator with a VM that has a device and one that has none, both quiet."""
    with DeviceMediator() as mediator:
        for words in (["--vm-name=red", "--bar1=16MiB"], ["--vm-name=blue", "--no-device", "--pool=B"]):
            assert admin(mediator, "register-vm", *words).returncode == 0
        deadline = time.monotonic() + 30
        # Windows over counted GPU time begin with the first scrape, and need a second to say something.
        while "vgpu_gpu_time_drift_ratio{" not in admin(mediator, "show-metrics").stdout:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        shown = admin(mediator, "show-metrics")
        assert (shown.returncode, shown.stderr) == (0, "")
        as_json = answer(mediator, "show-metrics")
        assert {"name": "vgpu_vm_sessions", "labels": {"vm": "red"}, "value": 0.0}.items() <= next(
            s for s in as_json if s["name"] == "vgpu_vm_sessions" and s["labels"] == {"vm": "red"}
        ).items()
        yield shown.stdout


@pytest.fixture(scope="module")
def samples(text: str) -> dict[str, list[dict[str, str]]]:
    """Labels of all samples, by name."""
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def documented() -> dict[str, str]:
    """Types by name, out of the page."""
    return dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", PAGE.read_text(), re.MULTILINE))


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def expressions() -> list[str]:
    """All that is asked of Prometheus, anywhere."""
    asked = [target["expr"] for panel in panels() for target in panel.get("targets", ())]
    variables = json.loads(DASHBOARD.read_text())["templating"]["list"]
    asked += [v["query"]["query"] for v in variables if v["type"] == "query"]
    return asked + [rule["expr"] for rule in rules()]


def test_every_vm_has_its_series_before_anything_has_happened(
    samples: dict[str, list[dict[str, str]]],
) -> None:
    by_vm = {
        name: {labels["vm"] for labels in found}
        for name, found in samples.items()
        if name.startswith(("vgpu_vm_", "vgpu_scheduler_")) and any("vm" in labels for labels in found)
    }
    assert len(by_vm) > 35
    for name, vms in by_vm.items():
        assert vms == ({"red"} if name.startswith("vgpu_vm_device_") else {"red", "blue"}), name
    errors = {labels["error"] for labels in samples["vgpu_vm_faults_total"]}
    assert {"702", "719"} <= errors
    assert {labels["pool"] for labels in samples["vgpu_pool_weight"]} == {"default", "B"}


def test_the_mediator_and_its_actors_are_there(samples: dict[str, list[dict[str, str]]]) -> None:
    actors = {labels["actor"]: labels["kind"] for labels in samples["vgpu_actor_messages_total"]}
    assert actors["mediator/gpus/gpu0/scheduler"] == "Scheduler"
    assert actors["mediator/devices/red"] == "Device"
    assert {labels["source"] for labels in samples["vgpu_source_up"]} == {
        "telemetry", "ledger", "fleet", "scheduler 0",
    }  # fmt: skip
    (build,) = samples["vgpu_build_info"]
    assert re.fullmatch(r"[0-9a-f]{16}", build["calls"])
    for name in (
        "process_open_fds",
        "process_max_fds",
        "vgpu_mediator_loop_lag_seconds_bucket",
        "vgpu_ledger_writable",
    ):
        assert name in samples, name


def test_gpu_time_is_compared_with_the_card(text: str) -> None:
    """Nobody computes here: both sides say nothing was done, and they agree."""
    found = {
        (sample.name, sample.labels["window"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("vgpu_gpu_time_") and sample.labels["gpu"] == "0"
    }
    for window in ("10s", "60s"):
        assert found["vgpu_gpu_time_counted_ratio", window] == 0.0
        assert found["vgpu_gpu_time_nvml_ratio", window] == 0.0
        assert found["vgpu_gpu_time_drift_ratio", window] == 0.0


def test_the_page_has_all_that_is_served_and_no_more(text: str) -> None:
    served = {
        family.name + {"counter": "_total"}.get(family.type, ""): family.type
        for family in text_string_to_metric_families(text)
        if family.name.startswith("vgpu_")
    }
    # The info family is a gauge on the wire.
    assert {name: kind for name, kind in served.items() if documented().get(name) not in (kind, "info")} == {}
    missing = {name for name in documented() if name not in served and not name.startswith(SENSORS)}
    assert missing == set()


def test_names_keep_to_prometheus_conventions() -> None:
    for name, kind in documented().items():
        assert re.fullmatch(r"vgpu(_[a-z0-9]+)+", name), name
        assert name.endswith("_total") == (kind == "counter"), name
        for unit in ("milliseconds", "_ms", "_ns", "percent", "kilobytes", "megabytes", "mhz"):
            assert unit not in name, name


def test_what_dashboard_and_rules_ask_for_is_served(samples: dict[str, list[dict[str, str]]]) -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    known = set(samples) | {name for name in documented() if name.startswith(SENSORS)} | recorded | {"up"}
    # A family that has no sample while no session lives.
    known |= {name for name in documented() if name.startswith("vgpu_session_")}
    asked = expressions()
    assert len(asked) > 40
    for expression in asked:
        names = re.findall(r"\b(?:vgpu|process)[a-z0-9_:]*", re.sub(r'"[^"]*"', '""', expression))
        assert names or "up{" in expression, expression
        assert not set(names) - known, expression


def test_labels_that_are_asked_for_are_served(samples: dict[str, list[dict[str, str]]]) -> None:
    """A matcher on a label that a metric has not finds nothing and says nothing."""
    checked = 0
    for expression in expressions():
        for name, matchers in re.findall(r"\b(vgpu_\w+)\{([^}]*)\}", expression):
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) - {"instance", "job"}
            if name in samples:
                checked += 1
                assert all(labels <= set(found) for found in samples[name]), (name, labels)
    assert checked > 20


def test_the_dashboard_can_be_imported() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert {"uid", "title", "schemaVersion", "templating", "panels", "time"} <= set(dashboard)
    assert "id" not in dashboard or dashboard["id"] is None
    numbers = [panel["id"] for panel in panels()]
    assert len(numbers) == len(set(numbers)) > 20
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, f"{panel['title']} lies on another"
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
            references = [target["refId"] for target in panel["targets"]]
            assert len(references) == len(set(references)) > 0


def test_rules_are_whole() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len(alerts) > 10
    assert len({rule["alert"] for rule in alerts}) == len(alerts)
    for rule in alerts:
        assert rule["labels"]["severity"] in ("critical", "warning", "info"), rule["alert"]
        assert set(rule["annotations"]) == {"summary", "description"}, rule["alert"]
    for rule in rules():
        assert rule["expr"].count("(") == rule["expr"].count(")"), rule


@pytest.mark.skipif(prometheus.server() is None, reason="no Prometheus server (tests/prometheus.py fetch)")
def test_prometheus_takes_rules_exposition_and_every_query(tmp_path: Path) -> None:
    """A real server scrapes a real mediator: every rule is evaluated and none fires, every panel's query has an answer."""
    program = prometheus.server()
    assert program is not None
    with DeviceMediator(options=["--metrics", "127.0.0.1:0"]) as mediator:
        assert admin(mediator, "register-vm", "--vm-name=red", "--bar1=16MiB").returncode == 0
        served = re.search(r"http://([\d.]+:\d+)/metrics", mediator.log.read_text())
        assert served is not None
        with prometheus.running(program, tmp_path, served[1], RULES) as server:

            def loaded() -> list[dict[str, Any]]:
                return [rule for group in server.ask("rules")["groups"] for rule in group["rules"]]

            def is_scraped() -> bool:
                return [target["health"] for target in server.ask("targets")["activeTargets"]] == ["up"]

            wait_until(is_scraped, 60, "the mediator is scraped")
            scraped = datetime.now(UTC)
            wait_until(
                lambda: all(datetime.fromisoformat(rule["lastEvaluation"]) > scraped for rule in loaded()),
                60,
                "every rule is evaluated",
            )
            assert len(loaded()) == len(rules())
            assert {rule["name"]: rule.get("lastError") for rule in loaded() if rule["health"] != "ok"} == {}
            assert [rule["name"] for rule in loaded() if rule.get("state") == "firing"] == []
            for panel in panels():
                for asked in panel.get("targets", ()):
                    if SENSORS not in asked["expr"] and "vgpu_session_" not in asked["expr"]:
                        wait_until(lambda text=asked["expr"]: bool(query(server, text)), 60, asked["expr"])  # type: ignore[misc]
                    else:
                        query(server, asked["expr"])


def query(server: prometheus.Prometheus, expression: str) -> list[Any]:
    """Ask as Grafana does, with its variables replaced: a window of a minute, and everything."""
    expression = re.sub(r"\$__(rate_interval|interval|range)", "1m", expression)
    expression = re.sub(r"\$\{?\w+(:\w+)?\}?", ".*", expression)
    result: list[Any] = server.ask("query", query=expression)["result"]
    return result


def unit() -> dict[str, list[str]]:
    """Settings of the service, by name."""
    found: dict[str, list[str]] = {}
    for line in (SYSTEMD / "vgpu-mediator.service").read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def test_a_restart_of_the_service_leaves_sessions_where_they_are() -> None:
    """What test_reload shows of the signals, and what the unit has systemd do, belong together."""
    settings = unit()
    assert settings["KillMode"] == ["process"]
    assert (settings["KillSignal"], settings["RestartKillSignal"]) == (["SIGTERM"], ["SIGUSR1"])
    assert settings["OOMPolicy"] == ["continue"]
    assert "RuntimeDirectory" not in settings
    for hides_gpus in (
        "PrivateDevices",
        "DevicePolicy",
        "MemoryDenyWriteExecute",
        "PrivateUsers",
        "ProcSubset",
        "ProtectClock",  # implies DeviceAllow= before systemd 253
    ):
        assert hides_gpus not in settings


@pytest.mark.skipif(SYSTEMD_ANALYZE is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    assert SYSTEMD_ANALYZE is not None
    text = (SYSTEMD / "vgpu-mediator.service").read_text()
    copy = tmp_path / "vgpu-mediator.service"
    copy.write_text(re.sub(r"/usr/local/bin/[\w-]+", "/bin/true", text))
    done = subprocess.run(
        [SYSTEMD_ANALYZE, "verify", str(copy)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
