# SPDX-License-Identifier: Apache-2.0
"""The dashboard as Grafana's own published model reads it (the Grafana Foundation SDK): every field known, and of its type.

The model's reader passes values on as they come, so two things are asked of what it read: that writing it again gives all that was
there, for what it does not know it drops; and that each value is of the type that the model says.
"""

from __future__ import annotations

import enum
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import prometheus, stat, timeseries, units
from grafana_foundation_sdk.models.dashboard import Dashboard, Panel, RowPanel

ROOT: Final = Path(__file__).resolve().parents[2]
DASHBOARD: Final = ROOT / "contrib" / "grafana" / "vgpu.json"
# What an export for sharing has besides the dashboard: read by the page that imports it, and by nobody later.
FOR_IMPORT: Final = {"__inputs", "__requires"}
OPTIONS: Final = {"stat": stat.Options, "timeseries": timeseries.Options}

register_default_plugins()


def load(source: dict[str, Any]) -> Dashboard:
    return Dashboard.from_json(source)


def lost(given: Any, written: Any, path: str = "") -> Iterator[str]:
    """What is not there any more, or is something else."""
    if isinstance(given, dict) and isinstance(written, dict):
        for key, value in given.items():
            if key not in written:
                yield f"{path}.{key} is lost"
            else:
                yield from lost(value, written[key], f"{path}.{key}")
    elif isinstance(given, list) and isinstance(written, list) and len(given) == len(written):
        for index, (one, other) in enumerate(zip(given, written, strict=True)):
            yield from lost(one, other, f"{path}[{index}]")
    elif given != written:
        yield f"{path} was {given!r} and is {written!r}"


def is_model(value: Any) -> bool:
    return type(value).__module__.startswith("grafana_foundation_sdk.")


def wrong(value: Any, hint: Any, path: str) -> Iterator[str]:
    """What is not of the type that the model says."""
    origin, words = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        found = [list(wrong(value, word, path)) for word in words]
        if all(found):
            yield min(found, key=len)[0]
    elif origin is list:
        if not isinstance(value, list):
            yield f"{path} is {value!r}, expected a list"
            return
        for index, item in enumerate(value):
            yield from wrong(item, words[0], f"{path}[{index}]")
    elif origin is dict:
        if not isinstance(value, dict):
            yield f"{path} is {value!r}, expected an object"
            return
        for key, item in value.items():
            yield from wrong(item, words[1], f"{path}.{key}")
    elif origin is typing.Literal:
        if value not in words:
            yield f"{path} is {value!r}, expected one of {words}"
    elif is_model(value) and not isinstance(value, enum.Enum):
        if isinstance(hint, type) and not _is_open(hint) and not isinstance(value, hint):
            yield f"{path} is a {type(value).__name__}, expected {hint.__name__}"
        for name, each in typing.get_type_hints(type(value)).items():
            yield from wrong(getattr(value, name), each, f"{path}.{name}")
    elif isinstance(hint, type) and issubclass(hint, enum.Enum):
        if value not in {member.value for member in hint}:
            yield f"{path} is {value!r}, expected one of {[member.value for member in hint]}"
    elif hint is float:
        if type(value) not in (int, float):
            yield f"{path} is {value!r}, expected a number"
    elif hint in (str, int, bool):
        if type(value) is not hint:
            yield f"{path} is {value!r}, expected {hint.__name__}"
    elif hint is types.NoneType:
        if value is not None:
            yield f"{path} is {value!r}, expected nothing"
    elif not _is_open(hint):
        yield f"{path} is {value!r}, expected {hint}"


def _is_open(hint: Any) -> bool:
    """Does the model leave it to a panel or a data source what belongs there?"""
    return hint in (object, Any) or getattr(hint, "__module__", "") == "grafana_foundation_sdk.cog.variants"


@pytest.fixture
def source() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def test_grafanas_model_knows_every_field(source: dict[str, Any]) -> None:
    read = load(source)
    written = json.loads(json.dumps(read, cls=JSONEncoder))
    assert list(lost({k: v for k, v in source.items() if k not in FOR_IMPORT}, written)) == []
    # What was written can be read, and is the same again.
    assert json.loads(json.dumps(load(written), cls=JSONEncoder)) == written


def test_every_value_is_of_its_type(source: dict[str, Any]) -> None:
    assert list(wrong(load(source), Dashboard, "dashboard")) == []


def test_panels_options_queries_and_units_are_what_grafana_has(source: dict[str, Any]) -> None:
    read = load(source)
    assert read.panels is not None
    known_units = {
        unit for name, unit in vars(units).items() if not name.startswith("_") and isinstance(unit, str)
    }
    for panel, given in zip(read.panels, source["panels"], strict=True):
        if isinstance(panel, RowPanel):
            assert given["type"] == "row"
            continue
        assert isinstance(panel, Panel)
        assert isinstance(panel.options, OPTIONS[given["type"]]), panel.title
        assert panel.field_config is not None
        assert panel.field_config.defaults is not None
        assert panel.field_config.defaults.unit in known_units, panel.title
        assert panel.targets, panel.title
        assert all(isinstance(target, prometheus.Dataquery) for target in panel.targets), panel.title


def test_the_import_asks_for_what_the_panels_use(source: dict[str, Any]) -> None:
    required = {(part["type"], part["id"]) for part in source["__requires"]}
    used = {("panel", panel["type"]) for panel in source["panels"] if panel["type"] != "row"}
    assert required == used | {("grafana", "grafana"), ("datasource", "prometheus")}


@pytest.mark.parametrize(
    ("where", "value", "told"),
    [
        (("panels", 1, "fieldConfig", "defaults", "unitt"), "short", "unitt is lost"),
        (("panels", 1, "options", "colourMode"), "value", "colourMode is lost"),
        (("panels", 1, "options", "colorMode"), "coloured", "color_mode is 'coloured'"),
        (("panels", 1, "targets", 0, "expression"), "up", "expression is lost"),
        (("panels", 1, "targets", 0, "expr"), 5, "expr is 5"),
        (("panels", 1, "gridPos", "w"), "4", "w is '4'"),
        (("templating", "list", 1, "refresh"), 7, "refresh is 7"),
    ],
)
def test_mistakes_are_found(source: dict[str, Any], where: tuple[Any, ...], value: Any, told: str) -> None:
    at = source
    for step in where[:-1]:
        at = at[step]
    at[where[-1]] = value
    read = load(source)
    written = json.loads(json.dumps(read, cls=JSONEncoder))
    assert any(told in text for text in [*lost(source, written), *wrong(read, Dashboard, "dashboard")])
