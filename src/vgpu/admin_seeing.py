# SPDX-License-Identifier: Apache-2.0
"""Rows of ``vgpu-admin`` for looking at a host and at a running mediator, and for having it read its configuration again."""

from __future__ import annotations

import argparse
from typing import Any

from vgpu.admin_client import AdminClient
from vgpu.admin_commands import Command
from vgpu.admin_top import run_top, top_options
from vgpu.doctor import doctor_options, run_doctor


def _metrics(client: AdminClient, options: argparse.Namespace) -> Any:
    text = client.ask("metrics")
    return _samples(text) if options.json else text


def _samples(text: str) -> list[dict[str, Any]]:
    """Every sample as an object: ``name``, ``labels``, ``value``, and its family's ``type`` and ``help``."""
    from prometheus_client.parser import text_string_to_metric_families

    return [
        {
            "name": sample.name,
            "labels": sample.labels,
            "value": sample.value,
            "type": family.type,
            "help": family.documentation,
        }
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    ]


def _reload(client: AdminClient, options: argparse.Namespace) -> Any:
    return client.ask("reload")


def _show_reloaded(answer: Any) -> str:
    lines = [f"{key}: {about['is']} (was {about['was']})" for key, about in answer["changed"].items()]
    lines += [
        f"{key}: {about['is']} after a restart (until then {about['was']})"
        for key, about in answer["needs_restart"].items()
    ]
    return "\n".join(lines) or "read again; nothing is different"


def _unreachable(client: AdminClient, options: argparse.Namespace) -> Any:
    raise AssertionError("this command runs by itself")


SEEING: tuple[Command, ...] = (
    Command("show-metrics", "everything that is counted, as Prometheus would get it", _metrics, lambda text: str(text).rstrip()),
    Command("top", "VMs, sessions and the GPU, live", _unreachable, str, top_options, run_top),
    Command("reload", "have the mediator read its configuration file again", _reload, _show_reloaded),
    Command("doctor", "check host, driver, QEMU, permissions and versions, and say what to mend", _unreachable, str, doctor_options, run_doctor),
)  # fmt: skip
