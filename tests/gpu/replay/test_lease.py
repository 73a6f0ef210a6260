# SPDX-License-Identifier: Apache-2.0
"""Leases with a token: they begin when the turn word says so, and the worker hands the word on by itself."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu.replay.guest import CONTEXT, HEAD, Replayed, until
from vgpu.gpu._replay import lib
from vgpu.gpu.turn import (
    HIGH_TOKEN,
    STANDBY_TOKEN,
    TURN_FILE_SIZE,
    Hands,
    SharedTurn,
    open_turn_file,
    turn_path,
)
from vgpu.transport._generated_calls import CallId

DEVICE_BUSY = 1001
MINE, OTHER, THIRD = 5, 9, 13
STANDBY = HIGH_TOKEN | STANDBY_TOKEN | 17
MS = 1_000_000
BUSY_MS = 500  # long enough to look at what must not happen before it is over, on a busy machine too


class Sharing(Replayed):
    """A replay that shares a turn word."""

    def __init__(self, library: Path, word: Path) -> None:
        self._word = word
        super().__init__(library, leased=False)

    def _run(self) -> None:
        descriptor = open_turn_file(self._word)
        assert lib.vgpu_replay_share_turn(self.replay, descriptor) == 0
        os.close(descriptor)
        super()._run()


@pytest.fixture
def turn(tmp_path: Path) -> Iterator[SharedTurn]:
    word = SharedTurn(turn_path(tmp_path, 0))
    yield word
    word.close()


@pytest.fixture
def session(fake_driver: Path, tmp_path: Path, turn: SharedTurn) -> Iterator[Replayed]:
    """A session that shares the word and has no lease yet; one record waits."""
    running = Sharing(fake_driver, turn_path(tmp_path, 0))
    running.guest.send(CallId.wirePrimaryRetain, CONTEXT, 0)
    assert until(lambda: running.grant.get("demand") == 1)
    try:
        yield running
    finally:
        running.close()


def consumed(session: Replayed) -> bool:
    return session.guest.u64(HEAD) == session.guest.tail


def make_busy(session: Replayed) -> float:
    """The device has work for ``BUSY_MS``; the time at which that began, or a little before."""
    began = time.monotonic()
    assert session.guest.ask(CallId.cuCtxSetLimit, DEVICE_BUSY, BUSY_MS).status == 0
    session.guest.ask(CallId.cuStreamCopyAttributes, 0, 0)
    return began


def grant(session: Replayed, *, deadline_ns: int = 0, slice_ns: int = 0, in_flight_us: int = 0) -> None:
    session.grant.grant(deadline_ns=deadline_ns, token=MINE, slice_ns=slice_ns, in_flight_us=in_flight_us)
    session.kick()


def has_ended(session: Replayed, token: int) -> bool:
    return until(lambda: session.grant.get("ended_token") == token)


def test_it_waits_for_its_turn_and_begins_without_being_told(session: Replayed, turn: SharedTurn) -> None:
    assert turn.swap(Hands(), Hands(OTHER, MINE))
    grant(session)
    time.sleep(0.02)
    assert not consumed(session)
    assert turn.swap(Hands(OTHER, MINE), Hands(MINE, 0))  # as another worker does; nobody kicks
    assert until(lambda: consumed(session))
    assert session.grant.get("ended_token") == 0


def test_the_turn_is_passed_on_when_the_work_is_done(session: Replayed, turn: SharedTurn) -> None:
    assert turn.swap(Hands(), Hands(MINE, OTHER))
    grant(session)
    began = make_busy(session)
    grant(session, deadline_ns=time.monotonic_ns())
    session.guest.send(CallId.wireSetContext, CONTEXT)
    time.sleep(0.02)
    assert turn.load() == Hands(MINE, OTHER)
    assert until(lambda: turn.load() == Hands(OTHER, 0))
    assert time.monotonic() - began > BUSY_MS / 1000
    assert session.grant.get("ended_token") == MINE
    assert BUSY_MS * MS < session.grant.get("held_ns") < 20 * BUSY_MS * MS
    assert not consumed(session)


def test_every_eighth_lease_among_others_is_timed_by_the_device(session: Replayed, turn: SharedTurn) -> None:
    """What its clock says is read when the next lease begins; the fake's events are always 1.5 ms apart."""
    timed = []
    for number in range(1, 19):
        token = 4 * number + 1
        held = session.grant.get("held_ns")
        assert turn.swap(turn.load(), Hands(token, 0))
        among_others = number != 2  # that one is alone, and does not count
        session.grant.grant(deadline_ns=0, token=token, in_flight_us=500 if among_others else 0)
        session.kick()
        assert session.guest.ask(CallId.cuCtxSetLimit, DEVICE_BUSY, 0).status == 0
        timed.append(session.grant.get("timed_leases"))
        session.grant.grant(deadline_ns=1, token=token, in_flight_us=500)
        session.kick()
        assert has_ended(session, token)
        if number == 9:
            charged = session.grant.get("held_ns") - held
        if number == 10:
            assert session.grant.get("timed_charged_ns") == charged > 0
    assert timed == [0] * 9 + [1] * 8 + [2]
    assert session.grant.get("timed_device_ns") == 2 * 1_500_000


def test_a_slice_counts_from_the_beginning(session: Replayed, turn: SharedTurn) -> None:
    assert turn.swap(Hands(), Hands(OTHER, MINE))
    grant(session, slice_ns=5 * MS)
    time.sleep(0.03)
    began_ns = time.monotonic_ns()
    assert turn.swap(Hands(OTHER, MINE), Hands(MINE, 0))
    assert until(lambda: consumed(session))
    assert until(lambda: turn.load() == Hands())
    assert session.grant.get("ended_token") == MINE
    assert session.grant.get("held_ns") <= time.monotonic_ns() - began_ns


def test_an_open_ended_lease_is_ended_by_the_same_token(session: Replayed, turn: SharedTurn) -> None:
    assert turn.swap(Hands(), Hands(MINE, 0))
    grant(session)
    assert until(lambda: consumed(session))
    time.sleep(0.02)
    assert turn.load() == Hands(MINE, 0)
    assert turn.swap(Hands(MINE, 0), Hands(MINE, OTHER))
    grant(session, deadline_ns=1)
    assert until(lambda: turn.load() == Hands(OTHER, 0))


def test_with_nothing_to_do_a_lease_is_declined(session: Replayed, turn: SharedTurn) -> None:
    assert turn.swap(Hands(), Hands(MINE, 0))
    grant(session, slice_ns=5 * MS)
    assert until(lambda: session.grant.get("ended_token") == MINE)
    held = session.grant.get("held_ns")
    assert turn.swap(Hands(), Hands(OTHER, MINE + 1))
    session.grant.grant(deadline_ns=0, token=MINE + 1, slice_ns=5 * MS)
    session.kick()
    assert until(lambda: session.grant.get("ended_token") == MINE + 1)
    assert session.grant.get("held_ns") == held
    assert turn.load() == Hands(OTHER, MINE + 1)  # the mediator takes it out of the word


def test_who_was_passed_over_says_so_and_asks_again(session: Replayed, turn: SharedTurn) -> None:
    assert turn.swap(Hands(), Hands(OTHER, MINE))
    grant(session, slice_ns=5 * MS)
    time.sleep(0.01)
    session.events()
    assert turn.swap(Hands(OTHER, MINE), Hands(OTHER, 0))
    assert until(lambda: session.grant.get("ended_token") == MINE)
    assert until(lambda: bool(session.events() & 1))
    assert session.grant.get("held_ns") == 0
    assert not consumed(session)


def test_a_standby_lease_is_kept_while_there_is_nothing_to_do(session: Replayed, turn: SharedTurn) -> None:
    assert turn.swap(Hands(), Hands(MINE, 0))
    grant(session, slice_ns=5 * MS)
    assert until(lambda: session.grant.get("ended_token") == MINE)
    assert turn.swap(Hands(), Hands(OTHER, THIRD))
    session.grant.grant(deadline_ns=0, token=STANDBY, slice_ns=50 * MS, standby=True)
    session.kick()
    time.sleep(0.02)
    assert (turn.load(), session.grant.get("ended_token")) == (Hands(OTHER, THIRD), MINE)
    session.events()
    # A record: it takes the place behind the holder at once, whoever was named there, and says so.
    session.guest.send(CallId.wireSetContext, CONTEXT)
    assert until(lambda: turn.load() == Hands(OTHER, STANDBY))
    assert until(lambda: bool(session.events() & 1))
    assert not consumed(session)
    assert turn.swap(Hands(OTHER, STANDBY), Hands(STANDBY, 0))
    assert until(lambda: consumed(session))
    # One use: it is over like any other lease.
    assert until(lambda: session.grant.get("ended_token") == STANDBY)
    assert turn.load() == Hands()


def test_a_standby_lease_begins_at_once_where_nobody_has_the_device(
    session: Replayed, turn: SharedTurn
) -> None:
    session.grant.grant(deadline_ns=0, token=STANDBY, slice_ns=5 * MS, standby=True)
    session.kick()
    assert until(lambda: consumed(session))
    assert until(lambda: session.grant.get("ended_token") == STANDBY)
    assert turn.load() == Hands()


@pytest.mark.parametrize(
    "hands", [Hands(OTHER | HIGH_TOKEN, THIRD), Hands(OTHER, THIRD | HIGH_TOKEN | STANDBY_TOKEN)]
)
def test_a_standby_lease_takes_nothing_from_its_equals(
    session: Replayed, turn: SharedTurn, hands: Hands
) -> None:
    assert turn.swap(Hands(), hands)
    session.grant.grant(deadline_ns=0, token=STANDBY, slice_ns=5 * MS, standby=True)
    session.kick()
    assert until(lambda: session.grant.get("ended_token") == STANDBY)  # it is given up for a wish
    assert until(lambda: bool(session.events() & 1))
    assert (turn.load(), session.grant.get("held_ns")) == (hands, 0)
    assert not consumed(session)


def test_a_standby_lease_that_lost_its_place_is_a_wish(session: Replayed, turn: SharedTurn) -> None:
    assert turn.swap(Hands(), Hands(OTHER, 0))
    session.grant.grant(deadline_ns=0, token=STANDBY, slice_ns=5 * MS, standby=True)
    session.kick()
    assert until(lambda: turn.load() == Hands(OTHER, STANDBY))
    session.events()
    assert turn.swap(Hands(OTHER, STANDBY), Hands(OTHER, THIRD))  # the scheduler thinks otherwise
    assert until(lambda: session.grant.get("ended_token") == STANDBY)
    assert until(lambda: bool(session.events() & 1))
    assert turn.load() == Hands(OTHER, THIRD)


def test_a_holder_yields_to_a_standby_lease_when_its_work_is_done(
    session: Replayed, turn: SharedTurn
) -> None:
    assert turn.swap(Hands(), Hands(MINE, 0))
    grant(session, in_flight_us=500)
    began = make_busy(session)
    assert turn.swap(Hands(MINE, 0), Hands(MINE, STANDBY))
    session.guest.send(CallId.wireSetContext, CONTEXT)
    assert until(lambda: turn.load() == Hands(STANDBY, 0))
    assert time.monotonic() - began > BUSY_MS / 1000
    assert not consumed(session)
    assert BUSY_MS * MS < session.grant.get("held_ns") < 20 * BUSY_MS * MS


def test_an_idle_holder_and_one_of_high_priority(session: Replayed, turn: SharedTurn) -> None:
    """With nothing to do it yields as soon as it is looked at; a session of high priority never does."""
    assert turn.swap(Hands(), Hands(MINE, STANDBY))
    session.grant.grant(deadline_ns=0, token=MINE, in_flight_us=500)
    session.kick()
    assert until(lambda: turn.load() == Hands(STANDBY, 0))
    high = HIGH_TOKEN | OTHER
    assert turn.swap(Hands(STANDBY, 0), Hands(high, STANDBY + 1))
    session.grant.grant(deadline_ns=0, token=high, in_flight_us=500)
    session.kick()
    assert until(lambda: consumed(session))
    time.sleep(0.02)
    assert turn.load() == Hands(high, STANDBY + 1)


def test_a_turn_word_must_be_whole_and_is_shared_once(session: Replayed, tmp_path: Path) -> None:
    short = os.open(tmp_path / "short", os.O_RDWR | os.O_CREAT)
    os.ftruncate(short, 8)
    fresh = lib.vgpu_replay_new()
    assert lib.vgpu_replay_share_turn(fresh, short) == 22
    os.ftruncate(short, TURN_FILE_SIZE)
    assert lib.vgpu_replay_share_turn(fresh, short) == 0
    assert lib.vgpu_replay_share_turn(fresh, short) == 22
    lib.vgpu_replay_free(fresh)
    os.close(short)


def test_the_word_in_memory(turn: SharedTurn, tmp_path: Path) -> None:
    assert turn.swap(Hands(), Hands(3, 4))
    assert not turn.swap(Hands(), Hands(7, 8))
    assert turn.load() == Hands(3, 4)
    assert struct.unpack("<II", turn_path(tmp_path, 0).read_bytes()[:8]) == (3, 4)
