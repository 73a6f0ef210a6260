# SPDX-License-Identifier: Apache-2.0
"""The mailbox alone: order, bound, policies, lanes, counters, cancellation, closing."""

from __future__ import annotations

from collections import deque

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from vgpu.actors import Mailbox, MailboxClosed, MailboxFull, Policy


async def test_first_in_first_out_and_the_system_lane_overtakes() -> None:
    mailbox: Mailbox[str] = Mailbox(3)
    for item in ("a", "b", "c"):
        mailbox.send_nowait(item)
    mailbox.send_system("stop")
    mailbox.send_system("down")
    assert [await mailbox.receive() for _ in range(5)] == ["stop", "down", "a", "b", "c"]


async def test_the_system_lane_has_room_when_the_data_lane_has_none() -> None:
    mailbox: Mailbox[str] = Mailbox(1, Policy.FAIL)
    mailbox.send_nowait("a")
    with pytest.raises(MailboxFull, match="holds 1 messages"):
        mailbox.send_nowait("b")
    mailbox.send_system("stop")
    assert await mailbox.receive() == "stop"


async def test_blocked_senders_are_served_in_order() -> None:
    mailbox: Mailbox[int] = Mailbox(1)
    mailbox.send_nowait(0)
    async with trio.open_nursery() as nursery:
        for item in (1, 2, 3):
            nursery.start_soon(mailbox.send, item)
            await wait_all_tasks_blocked()
        assert mailbox.statistics().tasks_waiting_send == 3
        assert [await mailbox.receive() for _ in range(4)] == [0, 1, 2, 3]
    assert mailbox.statistics().accepted == 4
    assert mailbox.statistics().high_water == 1


async def test_a_cancelled_sender_leaves_nothing() -> None:
    mailbox: Mailbox[int] = Mailbox(1)
    mailbox.send_nowait(0)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mailbox.send, 1)
            await wait_all_tasks_blocked()
            scope.cancel()
    assert await mailbox.receive() == 0
    statistics = mailbox.statistics()
    assert (statistics.depth, statistics.tasks_waiting_send, statistics.accepted) == (0, 0, 1)


async def test_a_cancelled_receiver_takes_nothing() -> None:
    mailbox: Mailbox[int] = Mailbox(1)
    with trio.move_on_after(0) as scope:
        await mailbox.receive()
    assert scope.cancelled_caught
    mailbox.send_nowait(1)
    with trio.CancelScope() as scope:
        scope.cancel()
        await mailbox.receive()
    assert scope.cancelled_caught
    assert await mailbox.receive() == 1


async def test_fail_refuses_and_counts() -> None:
    mailbox: Mailbox[int] = Mailbox(1, Policy.FAIL)
    await mailbox.send(0)
    with pytest.raises(MailboxFull):
        await mailbox.send(1)
    with pytest.raises(MailboxFull):
        mailbox.send_nowait(2)
    assert mailbox.statistics().refused == 2
    assert await mailbox.receive() == 0


async def test_always_wait_waits_whatever_the_policy() -> None:
    mailbox: Mailbox[int] = Mailbox(1, Policy.FAIL)
    mailbox.send_nowait(0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: mailbox.send(1, always_wait=True))
        await wait_all_tasks_blocked()
        with pytest.raises(MailboxFull):
            mailbox.send_nowait(2)
        assert [await mailbox.receive() for _ in range(2)] == [0, 1]


async def test_drop_oldest_drops_counts_and_tells() -> None:
    dropped: list[int] = []
    mailbox = Mailbox(2, Policy.DROP_OLDEST, dropped.append)
    for item in range(5):
        await mailbox.send(item)
    assert dropped == [0, 1, 2]
    assert [await mailbox.receive() for _ in range(2)] == [3, 4]
    statistics = mailbox.statistics()
    assert (statistics.accepted, statistics.dropped, statistics.received) == (5, 3, 2)


async def test_closing_gives_back_what_was_unread_and_wakes_senders() -> None:
    mailbox: Mailbox[int] = Mailbox(1)
    mailbox.send_nowait(0)
    raised: list[bool] = []

    async def sender() -> None:
        with pytest.raises(MailboxClosed):
            await mailbox.send(1)
        raised.append(True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender)
        await wait_all_tasks_blocked()
        assert mailbox.close() == [0]
    assert raised == [True]
    assert mailbox.close() == []
    with pytest.raises(MailboxClosed):
        mailbox.send_nowait(2)
    with pytest.raises(MailboxClosed):
        mailbox.send_system(2)
    with pytest.raises(MailboxClosed):
        await mailbox.receive()


async def test_what_is_discarded_is_not_received_and_the_receiver_waits_on() -> None:
    mailbox = Mailbox[int](4)
    got: list[int] = []

    async def receive() -> None:
        got.append(await mailbox.receive())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await wait_all_tasks_blocked()
        mailbox.send_system(1)  # wakes it; taken back before it runs
        mailbox.discard_system(lambda item: item == 1)
        await wait_all_tasks_blocked()
        assert got == []
        mailbox.send_system(2)
    assert got == [2]


async def test_closing_wakes_the_receiver() -> None:
    mailbox: Mailbox[int] = Mailbox(1)

    async def receiver() -> None:
        with pytest.raises(MailboxClosed):
            await mailbox.receive()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receiver)
        await wait_all_tasks_blocked()
        mailbox.close()


async def test_everything_async_is_a_checkpoint() -> None:
    mailbox: Mailbox[int] = Mailbox(1)
    with assert_checkpoints():
        await mailbox.send(1)
    with assert_checkpoints():
        await mailbox.receive()


@pytest.mark.parametrize("capacity", [0, -1])
def test_capacity_is_checked(capacity: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, got {capacity}"):
        Mailbox(capacity)


@given(
    capacity=st.integers(1, 4),
    policy=st.sampled_from([Policy.FAIL, Policy.DROP_OLDEST]),
    operations=st.lists(st.sampled_from(["data", "system", "receive"]), max_size=60),
)
def test_against_a_model(capacity: int, policy: Policy, operations: list[str]) -> None:
    """Two queues and a rule: what comes out, and what the counters say, is what the model says."""

    async def scenario() -> None:
        mailbox: Mailbox[int] = Mailbox(capacity, policy)
        data: deque[int] = deque()
        system: deque[int] = deque()
        accepted = dropped = refused = received = 0
        for number, operation in enumerate(operations):
            if operation == "system":
                mailbox.send_system(number)
                system.append(number)
            elif operation == "data":
                if len(data) < capacity or policy is Policy.DROP_OLDEST:
                    if len(data) == capacity:
                        data.popleft()
                        dropped += 1
                    data.append(number)
                    accepted += 1
                    mailbox.send_nowait(number)
                else:
                    refused += 1
                    with pytest.raises(MailboxFull):
                        mailbox.send_nowait(number)
            elif system:
                assert await mailbox.receive() == system.popleft()
            elif data:
                received += 1
                assert await mailbox.receive() == data.popleft()
            statistics = mailbox.statistics()
            assert statistics.depth == len(data) <= capacity
            assert statistics.system_depth == len(system)
            assert (statistics.accepted, statistics.dropped) == (accepted, dropped)
            assert (statistics.refused, statistics.received) == (refused, received)
            assert accepted == received + dropped + len(data)
        assert mailbox.close() == list(data)

    trio.run(scenario)


@given(plan=st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=30), capacity=st.integers(1, 3))
def test_blocked_senders_keep_each_sender_in_order(plan: list[tuple[int, bool]], capacity: int) -> None:
    """Whatever is cancelled in between, one sender's items arrive in its order, none twice, none from nowhere."""

    async def scenario() -> None:
        mailbox: Mailbox[tuple[int, int]] = Mailbox(capacity)
        sent: set[tuple[int, int]] = set()

        async def send(sender: int, number: int, scope: trio.CancelScope) -> None:
            with scope:
                await mailbox.send((sender, number))
                sent.add((sender, number))

        got: list[tuple[int, int]] = []
        async with trio.open_nursery() as nursery:
            for number, (sender, is_cancelled) in enumerate(plan):
                scope = trio.CancelScope()
                nursery.start_soon(send, sender, number, scope)
                await wait_all_tasks_blocked()
                if is_cancelled:
                    scope.cancel()
                    await wait_all_tasks_blocked()
                if number % 3 == 2 and mailbox.depth:
                    got.append(await mailbox.receive())
            await wait_all_tasks_blocked()
            while mailbox.depth:
                got.append(await mailbox.receive())
                await wait_all_tasks_blocked()
        assert len(got) == len(set(got))
        assert set(got) == sent
        assert [number for _, number in got] == sorted(number for _, number in got)

    trio.run(scenario)
