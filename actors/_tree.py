# SPDX-License-Identifier: Apache-2.0
"""A snapshot of who is alive, for the admin tool. Values only; taking one changes nothing."""

from __future__ import annotations

import enum
from collections.abc import Iterator

import attrs

from ._exit import ExitReason
from ._mailbox import MailboxStatistics

__all__ = ["ActorSnapshot", "ActorState", "render_tree"]


class ActorState(enum.Enum):
    """Where an actor is in its life. `RESTARTING` and `STOPPED` are said of children that do not live now."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    EXITED = "exited"
    RESTARTING = "restarting"
    STOPPED = "stopped"


@attrs.frozen
class ActorSnapshot:
    """One actor, and those under it in start order."""

    name: str
    kind: str
    """Name of the actor's class."""
    state: ActorState
    mailbox: MailboxStatistics | None
    """None where the actor does not live."""
    restarts: int
    serial: int
    """Tells lives apart; 0 where the actor does not live."""
    age_seconds: float
    """Since this life began."""
    last_exit: ExitReason | None
    """Why the life before this one ended, where there was one."""
    children: tuple[ActorSnapshot, ...] = ()
    handler_seconds: float = 0.0
    """Real time its handlers took in this life, their waits included."""

    def walk(self) -> Iterator[ActorSnapshot]:
        """This actor and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()

    def find(self, name: str) -> ActorSnapshot | None:
        """The snapshot of that name at or below this one."""
        return next((node for node in self.walk() if node.name == name), None)


def render_tree(nodes: tuple[ActorSnapshot, ...]) -> str:
    """Draw snapshots as indented lines, for people."""
    lines: list[str] = []

    def draw(node: ActorSnapshot, lead: str, follow: str) -> None:
        depth = "-" if node.mailbox is None else f"{node.mailbox.depth}/{node.mailbox.capacity}"
        lines.append(
            f"{lead}{node.name} [{node.kind}] {node.state.value} mailbox={depth} restarts={node.restarts}"
        )
        for index, child in enumerate(node.children):
            last = index == len(node.children) - 1
            draw(child, follow + ("└── " if last else "├── "), follow + ("    " if last else "│   "))

    for node in nodes:
        draw(node, "", "")
    return "\n".join(lines)
