# SPDX-License-Identifier: Apache-2.0
"""The scheduler and its workers over slow messages, in any order: nobody who has work is left waiting for ever.

The workers here are a model of ``gpu/replay/lease.c``: what they read in the grant page, when they name themselves in the turn
word, what they report. Grants, reports and events each travel in queues of their own, as through page, socket and mailboxes.
"""

from __future__ import annotations

import random
from collections import deque

import attrs
import pytest

from vgpu.gpu.schedule import Grant, Schedule, SessionId
from vgpu.gpu.turn import HIGH_TOKEN, STANDBY_TOKEN, Hands, LocalTurn

US, MS = 1_000, 1_000_000
PLENTY = 10**9
# Seeds that found a session whose standby lease was taken while another lease came and was taken back.
FOUND = (7, 919)


@attrs.define
class Worker:
    """A session's worker; everything lies here as its replay thread sees it."""

    turn: LocalTurn
    is_high: bool
    page: Grant | None = None
    unread: bool = False
    token: int = 0
    leased: bool = False
    awaits: bool = False
    standby: bool = False
    owes: bool = False
    demanded: bool = False
    reported: bool = True
    records: int = 0
    done: int = 0
    began: int = 0
    ended_token: int = 0
    held: int = 0
    events: deque[bool] = attrs.Factory(deque)  # to its executor: does it want more?

    def step(self, now: int) -> None:
        """One look at the page, and one record or one report."""
        if self.unread:
            self._read()
        end = self._end()
        if self.records and self.leased:
            must_yield = not self.is_high and bool(self.turn.load().next & STANDBY_TOKEN)
            if must_yield or (end and now > end):
                self._lose(now)
            else:
                self.records -= 1
                self.done += 1
                return
        elif not self.leased and self._begins(now):
            return
        elif self.leased and end:
            self._lose(now)  # others wait, and it has nothing to do
        self._report(now, bool(self.records))

    def _read(self) -> None:
        self.unread = False
        page = self.page
        assert page is not None
        if page.token != self.token:
            self.token, self.standby = page.token, page.standby
            self.leased = self.owes = False
            self.awaits = True
        elif not self.leased and not page.standby:
            self.standby = False

    def _end(self) -> int:
        if self.page is None:
            return 0
        return self.page.deadline_ns or (self.began + self.page.slice_ns if self.page.slice_ns else 0)

    def _begins(self, now: int) -> bool:
        if not self.awaits or self.standby or self.turn.load().holder != self.token:
            return False
        self.awaits = self.demanded = False
        self.leased, self.began = True, now
        return True

    def _lose(self, now: int) -> None:
        self.owes = self.token != 0 and (self.leased or self.awaits or self.owes)
        self.held += now - self.began if self.leased else 0
        self.leased = self.awaits = self.standby = self.reported = self.demanded = False

    def _take_turn(self) -> bool:
        hands = self.turn.load()
        if self.token in (hands.holder, hands.next):
            return True
        if hands.holder & HIGH_TOKEN or hands.next & STANDBY_TOKEN:
            return False
        desired = Hands(hands.holder, self.token) if hands.holder else Hands(self.token, hands.next)
        return self.turn.swap(hands, desired)

    def _report(self, now: int, records_wait: bool) -> None:
        if self.standby:
            if not records_wait:
                return
            self.standby = False
            if self._take_turn():
                self.demanded = self.reported = True
                self.events.append(True)
                return
        hands = self.turn.load()
        if self.awaits:
            if records_wait and self.token in (hands.holder, hands.next):
                return
            self._lose(now)
        if self.leased:
            return
        is_over, self.owes = self.owes, False
        if is_over:
            self.ended_token = self.token
            if hands.holder == self.token:
                self.turn.swap(hands, Hands(hands.next, 0))
        if records_wait and not self.demanded:
            self.demanded = self.reported = True
            self.events.append(True)
        elif not self.reported or is_over:
            self.reported = True
            self.events.append(False)


class World:
    """Some VMs in two pools, a session each; who comes to do something next is drawn."""

    def __init__(self, seed: int) -> None:
        self.draw = draw = random.Random(seed)
        self.now = 0
        self.turn = LocalTurn()
        self.schedule = Schedule(2 * MS, 20 * MS, 1000 * MS, self.turn)
        self.workers: dict[SessionId, Worker] = {}
        # To the scheduler: None is a demand, else what a LeaseEnded says: wants more, token, held.
        self.reports: dict[SessionId, deque[tuple[bool, int, int] | None]] = {}
        self.grants: dict[SessionId, deque[Grant]] = {}
        self.billed: dict[SessionId, tuple[int, int]] = {}
        for number in range(1, draw.randint(3, 6)):
            session, pool = SessionId(number), draw.choice(("default", "other"))
            is_high, weight = draw.random() < 0.6, draw.choice((5, 50, 80))
            self.schedule.set_vm(f"vm{number}", pool, "high" if is_high else "medium", weight, 0)
            self.schedule.open(session, f"vm{number}")
            self.workers[session] = Worker(self.turn, is_high)
            self.reports[session] = deque([None])  # as its executor asks when it begins
            self.grants[session] = deque()
            self.billed[session] = (0, 0)

    def tell(self, grants: list[Grant]) -> None:
        for grant in grants:
            self.grants[grant.session].append(grant)

    def act(self, who: str, session: SessionId) -> None:
        """Let one of them do one thing."""
        worker = self.workers[session]
        if who == "worker":
            worker.step(self.now)
        elif who == "executor" and worker.events:
            self._pass_on(session, worker, worker.events.popleft())
        elif who == "scheduler" and self.reports[session]:
            report = self.reports[session].popleft()
            if report is None:
                self.tell(self.schedule.demand(session, self.now))
            else:
                wants_more, token, held = report
                ended = self.schedule.ended(
                    session, held, self.now, wants_more=wants_more, token=token, held_ns=held
                )
                self.tell(ended)
        elif who == "page" and self.grants[session]:
            worker.page, worker.unread = self.grants[session].popleft(), True
        elif who == "guest" and worker.records < 40:
            worker.records += self.draw.choice((1, 1, 2, 30))

    def _pass_on(self, session: SessionId, worker: Worker, wants_more: bool) -> None:
        token, held = self.billed[session]
        if worker.ended_token != token:
            self.reports[session].append((wants_more, worker.ended_token, worker.held - held))
            self.billed[session] = (worker.ended_token, worker.held)
        elif wants_more:
            self.reports[session].append(None)

    def disorder(self, turns: int) -> None:
        """Everything at its own pace, and no pace is safe."""
        draw, sessions = self.draw, list(self.workers)
        who = ("worker", "executor", "scheduler", "page", "guest")
        pace = [draw.choice((1, 3, 10)) for _ in who]
        longest = draw.choice((5 * US, 30 * US, 120 * US))
        for _ in range(turns):
            self.now += draw.randint(0, longest)
            self.act(draw.choices(who, pace)[0], draw.choice(sessions))
            if draw.random() < 0.03:
                self.tell(self.schedule.decide(self.now))

    def left_waiting(self) -> list[SessionId]:
        """Who does nothing for more than a second, though it has work and all messages arrive, and is not in the queue either."""
        for worker in self.workers.values():
            worker.records = PLENTY
        before: dict[SessionId, int] = {}
        for turn in range(16_000):
            self.now += 100 * US
            for session in self.workers:
                for who in ("worker", "executor", "scheduler", "page", "worker"):
                    self.act(who, session)
            due = self.schedule.next_event_ns()
            if due is not None and due <= self.now:
                self.tell(self.schedule.decide(self.now))
            if turn == 3_000:
                before = {session: worker.done for session, worker in self.workers.items()}
        known = {*self.schedule.waiting(), self.schedule.holder, self.schedule.follower}
        idle = [session for session, worker in self.workers.items() if worker.done == before[session]]
        return [session for session in idle if session not in known]


@pytest.mark.parametrize("seed", [*range(20), *FOUND])
def test_nobody_is_left_waiting(seed: int) -> None:
    world = World(seed)
    world.disorder(1500)
    assert world.left_waiting() == []
