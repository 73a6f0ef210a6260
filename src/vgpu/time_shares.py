# SPDX-License-Identifier: Apache-2.0
"""Where the time of a session's program goes, out of the samples that ``admin.sock`` answers with. Values in, values out.

The parts are of the time of the program's threads, as its guest library measured it (docs/tracing.md), so they are the
guest's word, and with several threads they may be more than all of the time. What no part has is the program's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from vgpu.units import show_seconds

# In the order of a call's life: written, on the way, held back, replayed, computed.
PARTS: Final = ("encode", "ring", "lease", "replay", "sync")


def spent_ns(sample: Mapping[str, Any]) -> dict[str, int]:
    """Nanoseconds since the session began, by part; zero where an older guest says nothing.

    ``encode``: writing calls, payload included. ``lease``: waiting while the host held it back, for whatever reason.
    ``replay``: waiting while the worker was at the very call. ``ring``: waiting for the worker otherwise. ``sync``: waiting
    for the device, and for what had to be replayed before.
    """
    guest = sample["guest"]

    def said(name: str) -> int:
        return int(guest.get(name, 0))

    for_worker = said("answer_wait_ns") + said("room_wait_ns") - said("held_ring_ns")
    return {
        "encode": said("encode_ns") + said("copy_ns"),
        "ring": said("ring_wait_ns"),
        "lease": said("held_ns"),
        "replay": max(for_worker - said("ring_wait_ns"), 0),
        "sync": max(said("sync_ns") - said("held_sync_ns"), 0),
    }


def time_percent(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> dict[str, float]:
    """Percent of the time between two samples, by part, and ``own``. They add up to 100, or to more with several threads.

    Nothing is known of a session that was not there before: all zero.
    """
    if before is None:
        return dict.fromkeys((*PARTS, "own"), 0.0)
    nanoseconds = max(now["taken_ns"] - before["taken_ns"], 1)
    was, spent = spent_ns(before), spent_ns(now)
    shares = {part: 100.0 * max(spent[part] - was[part], 0) / nanoseconds for part in PARTS}
    return {**shares, "own": max(100.0 - sum(shares.values()), 0.0)}


def in_words(samples: Iterable[Mapping[str, Any]]) -> str:
    """The sums over some sessions, in one line."""
    sums = dict.fromkeys(PARTS, 0)
    for sample in samples:
        for part, nanoseconds in spent_ns(sample).items():
            sums[part] += nanoseconds
    return ", ".join(f"{part} {show_seconds(nanoseconds / 1e9)}" for part, nanoseconds in sums.items())
