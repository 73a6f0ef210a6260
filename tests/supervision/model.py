# SPDX-License-Identifier: Apache-2.0
"""What a supervisor ought to do, said a second time: plain lists, no tasks, nothing of ours imported but words.

Written from OTP's manual (and the two additions, back-off and reset-after), one event at a time, without looking
at how `vgpu.supervision` does it. `test_against_model.py` compares the two.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from vgpu.supervision import AutoShutdown, Restart, Strategy

Line = tuple[str, str]


class Refuses(Exception):
    """The request is not allowed, or the start it asked for failed."""


@attrs.define(eq=False)
class ModelChild:
    id: str
    restart: Restart
    significant: bool
    state: str = "stopped"
    restarts: int = 0
    # Failures not yet forgotten; None: none since the last recovery.
    failures: int | None = None
    up_since: float = 0.0
    # When the next try is due, for the one its group waits for.
    due: float | None = None


@attrs.define(eq=False)
class Model:
    """A supervisor, its children and their diary."""

    strategy: Strategy
    auto_shutdown: AutoShutdown
    intensity: int
    period: float
    delay: Callable[[], float]
    tries: int
    reset_after: float
    now: float
    children: list[ModelChild] = attrs.Factory(list)
    diary: list[Line] = attrs.Factory(list)
    # How often the next starts of an id will fail.
    broken: dict[str, int] = attrs.Factory(dict)
    restarted_at: list[float] = attrs.Factory(list)
    ended: str | None = None

    # -- what may happen to it

    def start(self, children: list[ModelChild]) -> None:
        for child in children:
            self.children.append(child)
            if not self._bring_up(child):
                self._end("start failed")
                return

    def child_ends(self, child_id: str, how: str) -> None:
        child = self._get(child_id)
        self._line(f"stop {how}", child)
        child.state = "stopped"
        abnormal = how in ("Crashed", "Killed")
        if child.restart is Restart.PERMANENT or (child.restart is Restart.TRANSIENT and abnormal):
            self._failed_while_up(child)
            return
        if child.restart is Restart.TEMPORARY:
            self.children.remove(child)
        if not child.significant:
            return
        others = [one for one in self.children if one.significant and one.state != "stopped"]
        if self.auto_shutdown is AutoShutdown.ANY_SIGNIFICANT or (
            self.auto_shutdown is AutoShutdown.ALL_SIGNIFICANT and not others
        ):
            self._end("auto_shutdown")

    def time_passes(self, seconds: float) -> None:
        until = self.now + seconds
        while self.ended is None:
            waiting = [child for child in self.children if child.due is not None and child.due <= until]
            if not waiting:
                break
            child = min(waiting, key=lambda one: one.due or 0.0)
            self.now = child.due or 0.0
            child.due = None
            self._restart(child)
        self.now = until

    def terminate(self, child_id: str) -> None:
        child = self._get(child_id)
        group_waits = child.due is not None
        self._take_down(child)
        child.failures = None
        if group_waits:
            self._bring_up_again(
                [one for one in self.children if one.state == "restarting" and one.due is None]
            )
        if child.restart is Restart.TEMPORARY:
            self.children.remove(child)

    def restart_child(self, child_id: str) -> None:
        child = self._get(child_id)
        if child.state != "stopped" or not self._bring_up(child):
            raise Refuses

    def delete(self, child_id: str) -> None:
        child = self._get(child_id)
        if child.state != "stopped":
            raise Refuses
        self.children.remove(child)

    def add(self, child: ModelChild) -> None:
        if any(one.id == child.id for one in self.children):
            raise Refuses
        if child.significant and self.auto_shutdown is AutoShutdown.NEVER:
            raise Refuses
        self.children.append(child)
        if not self._bring_up(child):
            self.children.remove(child)
            raise Refuses

    def stop(self) -> None:
        self._end("asked")

    # -- how it goes about it

    def _get(self, child_id: str) -> ModelChild:
        for child in self.children:
            if child.id == child_id:
                return child
        raise Refuses

    def _line(self, what: str, child: ModelChild) -> None:
        self.diary.append((what, child.id))

    def _group(self, child: ModelChild) -> list[ModelChild]:
        """Who shares a child's fate, itself included, in start order."""
        if self.strategy is Strategy.ONE_FOR_ALL:
            return list(self.children)
        if self.strategy is Strategy.REST_FOR_ONE:
            return self.children[self.children.index(child) :]
        return [child]

    def _failed_while_up(self, child: ModelChild) -> None:
        recovered = child.failures is None or self.now - child.up_since >= self.reset_after
        if not self.reset_after or recovered:
            child.failures = 0 if self.reset_after else None
            self._restart(child)
            return
        for one in self._group(child):
            one.due = None
        if self._wait_for_next_try(child):
            self._group_down(child)

    def _restart(self, child: ModelChild) -> None:
        self.restarted_at.append(self.now)
        if sum(1 for time in self.restarted_at if time >= self.now - self.period) > self.intensity:
            self._end("restart intensity exceeded")
            return
        for one in self._group(child):
            one.due = None
        self._group_down(child)
        self._bring_up_again(self._group(child))

    def _group_down(self, child: ModelChild) -> None:
        """Stop the others; the temporary among them are gone for good, the rest is expected back."""
        group = self._group(child)
        for one in reversed(group):
            if one is not child:
                self._take_down(one)
            if one is child or one.restart is not Restart.TEMPORARY:
                one.state = "restarting"
            else:
                self.children.remove(one)

    def _bring_up_again(self, group: list[ModelChild]) -> None:
        for child in group:
            child.restarts += 1
            if not self._bring_up(child):
                self._wait_for_next_try(child)
                return

    def _wait_for_next_try(self, child: ModelChild) -> bool:
        child.failures = (child.failures or 0) + 1
        if child.failures >= self.tries:
            self._end("restart retries exhausted")
            return False
        child.state = "restarting"
        child.due = self.now + self.delay()
        return True

    def _bring_up(self, child: ModelChild) -> bool:
        child.due = None
        child.state = "stopped"
        if self.broken.get(child.id, 0):
            self.broken[child.id] -= 1
            self._line("fail", child)
            self._line("stop Crashed", child)
            return False
        self._line("start", child)
        child.state = "running"
        child.up_since = self.now
        if not self.reset_after:
            child.failures = None
        return True

    def _take_down(self, child: ModelChild) -> None:
        child.due = None
        if child.state == "running":
            self._line("stop Shutdown", child)
        child.state = "stopped"

    def _end(self, why: str) -> None:
        self.ended = why
        for child in reversed(self.children):
            self._take_down(child)
