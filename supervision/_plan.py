# SPDX-License-Identifier: Apache-2.0
"""The decision: a child has ended, so who is stopped, who is started, in which order, and who is forgotten.

Pure. Children come in start order, the plan goes out; carrying it out, waiting and counting is the supervisor's
work. The clauses are those of the OTP supervisor's manual; docs/supervision.md lists them with their tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from vgpu.actors import ExitReason, is_abnormal

from ._spec import AutoShutdown, Restart, Strategy

__all__ = ["ChildView", "Plan", "plan_exit", "plan_restart", "should_restart"]


@attrs.frozen
class ChildView:
    """What the decision needs to know of one child."""

    id: str
    restart: Restart = Restart.PERMANENT
    is_alive: bool = True
    significant: bool = False
    is_expected: bool = False
    """Not alive, but about to be restarted: it has not ended for good."""


@attrs.frozen
class Plan:
    """What to do, in this order: stop, forget, start; or shut the supervisor down."""

    stops: tuple[str, ...] = ()
    """Living children to stop: the reverse of start order."""
    forgets: tuple[str, ...] = ()
    """Children whose specs go: temporary ones that have ended or are stopped here."""
    starts: tuple[str, ...] = ()
    """Children to start, in start order. Not empty exactly when this is a restart."""
    shut_down: bool = False
    """The supervisor's own end, by auto_shutdown."""


# Which ends call for a restart. The whole of it: everything else leaves the child ended.
_RESTARTS: dict[tuple[Restart, bool], bool] = {
    # (type, is the end abnormal)
    (Restart.PERMANENT, False): True,
    (Restart.PERMANENT, True): True,
    (Restart.TRANSIENT, False): False,
    (Restart.TRANSIENT, True): True,
    (Restart.TEMPORARY, False): False,
    (Restart.TEMPORARY, True): False,
}


def should_restart(restart: Restart, reason: ExitReason) -> bool:
    """Whether a child of that type that ended for that reason is restarted."""
    return _RESTARTS[restart, is_abnormal(reason)]


def plan_exit(
    strategy: Strategy,
    auto_shutdown: AutoShutdown,
    children: Sequence[ChildView],
    ended: str,
    reason: ExitReason,
) -> Plan:
    """Decide what follows when a child has ended by itself.

    Args:
        strategy: the supervisor's.
        auto_shutdown: the supervisor's.
        children: all of them in start order, the ended one included and marked not alive.
        ended: its id.
        reason: why it ended.
    """
    child = next(view for view in children if view.id == ended)
    if should_restart(child.restart, reason):
        return plan_restart(strategy, children, ended)
    is_forgotten = child.restart is Restart.TEMPORARY or strategy is Strategy.SIMPLE_ONE_FOR_ONE
    return Plan(
        forgets=(ended,) if is_forgotten else (),
        shut_down=child.significant and _ends_supervisor(auto_shutdown, children, ended),
    )


def plan_restart(strategy: Strategy, children: Sequence[ChildView], failed: str) -> Plan:
    """Decide who is stopped and started so that one child lives again; also when an earlier try has failed."""
    index = next(index for index, view in enumerate(children) if view.id == failed)
    if strategy is Strategy.ONE_FOR_ALL:
        affected = list(children)
    elif strategy is Strategy.REST_FOR_ONE:
        affected = list(children[index:])
    else:
        affected = [children[index]]
    others = [view for view in affected if view.id != failed]
    return Plan(
        stops=tuple(view.id for view in reversed(others) if view.is_alive),
        # A temporary child that a sibling's restart takes with it does not come back.
        forgets=tuple(view.id for view in others if view.restart is Restart.TEMPORARY),
        starts=tuple(
            view.id for view in affected if view.id == failed or view.restart is not Restart.TEMPORARY
        ),
    )


def _ends_supervisor(auto_shutdown: AutoShutdown, children: Sequence[ChildView], ended: str) -> bool:
    if auto_shutdown is AutoShutdown.ANY_SIGNIFICANT:
        return True
    if auto_shutdown is AutoShutdown.ALL_SIGNIFICANT:
        return not any(
            view.significant and (view.is_alive or view.is_expected) for view in children if view.id != ended
        )
    return False
