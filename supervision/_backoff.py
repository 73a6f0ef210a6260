# SPDX-License-Identifier: Apache-2.0
"""When to try again, and when a failure is old enough to be forgotten: tenacity's policy objects, asked one step at a time.

A supervisor may not sit in tenacity's own loop, for it would be deaf to a shutdown meanwhile. So it keeps a
`RetrySchedule`, asks it for the next delay, and sends itself a message after that long. Clients that only have to
repeat an ask use `Backoff.retrying`, which is tenacity's loop with trio's sleep.

Pure but for the random generator, which the caller passes in: seeded, the delays are the same every time.
"""

from __future__ import annotations

import math
from random import Random
from typing import Any, final

import attrs
import tenacity
import trio
from tenacity.stop import stop_base
from tenacity.wait import wait_base

__all__ = ["Backoff", "RetrySchedule", "WaitJittered"]

# 2.0 ** 64 seconds is for ever; more would only overflow.
_LARGEST_EXPONENT = 64


@final
class WaitJittered(wait_base):
    """Exponential back-off whose jitter comes from a generator of ours (tenacity's own use the global one).

    The n-th delay lies between (1 - jitter) * ceiling and ceiling, ceiling = min(maximum, initial * factor ** (n - 1)).
    """

    def __init__(
        self,
        random: Random,
        *,
        initial_seconds: float = 0.1,
        maximum_seconds: float = 10.0,
        factor: float = 2.0,
        jitter: float = 0.5,
    ) -> None:
        if not 0 < initial_seconds <= maximum_seconds:
            raise ValueError(
                f"need 0 < initial_seconds <= maximum_seconds, got {initial_seconds} and {maximum_seconds}"
            )
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got {factor}")
        if not 0 <= jitter <= 1:
            raise ValueError(f"jitter must be from 0 to 1, got {jitter}")
        self._random = random
        self._initial = initial_seconds
        self._maximum = maximum_seconds
        self._factor = factor
        self._jitter = jitter

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        exponent = min(retry_state.attempt_number - 1, _LARGEST_EXPONENT)
        ceiling = min(self._maximum, self._initial * self._factor**exponent)
        return ceiling * (1 - self._jitter * self._random.random())


@attrs.frozen
class Backoff:
    """How long to wait between tries, and when to stop trying. Any tenacity wait and stop will do."""

    wait: wait_base = attrs.field(factory=lambda: WaitJittered(Random()))
    stop: stop_base = attrs.field(factory=lambda: tenacity.stop_after_attempt(10))
    # How long a child must live, once it has been restarted, until its failures are forgotten. A child that ends
    # sooner has not recovered: the failure is counted with those before, and the next restart waits for its turn.
    # With 0 every start that succeeds is a recovery, and every end is followed by a restart at once, as in OTP.
    reset_after_seconds: float = attrs.field(default=0.0)

    @reset_after_seconds.validator
    def _check_reset_after(self, _: object, value: object) -> None:
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise ValueError(f"reset_after_seconds must be a number of seconds from 0, got {value!r}")

    def begin(self, now: float) -> RetrySchedule:
        """Start counting tries at `now`."""
        return RetrySchedule(self, now)

    def retrying(self, *errors: type[Exception]) -> tenacity.AsyncRetrying:
        """Tenacity's loop for clients: repeats on those errors, sleeps on trio's clock, raises the last error."""
        return tenacity.AsyncRetrying(
            sleep=trio.sleep,
            wait=self.wait,
            stop=self.stop,
            retry=tenacity.retry_if_exception_type(errors),
            reraise=True,
        )


@final
class RetrySchedule:
    """Counts the failures of one thing that is being tried again and again."""

    def __init__(self, backoff: Backoff, now: float) -> None:
        self._backoff = backoff
        self._state = tenacity.RetryCallState(retry_object=tenacity.Retrying(), fn=None, args=(), kwargs={})
        self._state.attempt_number = 0
        # Tenacity reads its own clock into this; ours takes its place, so that stop_after_delay sees trio's time.
        self._state.start_time = now

    @property
    def failures(self) -> int:
        """How many tries have failed."""
        return self._state.attempt_number

    def failed(self, now: float, error: BaseException) -> float | None:
        """Note a failure. Returns the seconds to wait before the next try, or None: do not try again."""
        future: tenacity.Future = tenacity.Future(self._state.attempt_number + 1)
        future.set_exception(error)
        self._state.attempt_number += 1
        self._state.outcome = future
        self._state.outcome_timestamp = now
        if self._backoff.stop(self._state):
            return None
        delay: Any = self._backoff.wait(self._state)
        return float(delay)
