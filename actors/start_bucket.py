# SPDX-License-Identifier: Apache-2.0
"""How fast a VM may start sessions: a token bucket. Pure; the caller says what time it is.

A program that is started again and again takes a worker process, a session number and a row of the ledger each time. Who is
over the rate is told to come again; it costs the host an answer and nothing else.
"""

from __future__ import annotations

import attrs


@attrs.frozen
class StartRate:
    """So many sessions a second, and so many at once after a rest. 0 a second: no limit."""

    per_second: float = 50.0
    burst: int = 200


@attrs.define(eq=False)
class StartBucket:
    """One VM's tokens. Full at first."""

    rate: StartRate
    _tokens: float = attrs.field(init=False)
    _at: float | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self._tokens = float(self.rate.burst)

    def take(self, now: float) -> float:
        """Start one at ``now`` (seconds of a clock that does not go back): 0.0, or the seconds until there is a token."""
        if self.rate.per_second <= 0:
            return 0.0
        if self._at is not None:
            gained = max(now - self._at, 0.0) * self.rate.per_second
            self._tokens = min(self._tokens + gained, float(self.rate.burst))
        self._at = now
        if self._tokens >= 1.0:
            self._tokens -= 1.0
            return 0.0
        return (1.0 - self._tokens) / self.rate.per_second
