# SPDX-License-Identifier: Apache-2.0
"""What the kernel says of a worker process: is it stopped, and how long did its replay thread wait for a processor?

Both are judged by the watchdog, and neither can be told by the worker itself: it does not run then. Silence would not do, for
a worker without a processor, without a lease or without anything to do is silent too. Reading these files of the kernel's waits
for nothing. Who asks holds the process by a pidfd or is its parent: a number that somebody else has by now tells of that one.
"""

from __future__ import annotations

from pathlib import Path

import attrs

__all__ = ["REPLAY_THREAD", "ReplayThread", "is_stopped"]

# The name of the thread that replays (gpu/worker.py gives it).
REPLAY_THREAD = "vgpu-replay"
_STOPPED = "T"  # by a signal; "t", stopped by a debugger, is somebody's who looks at it


def is_stopped(pid: int) -> bool:
    """Has a signal (SIGSTOP, SIGTSTP) stopped the process? False for one that has gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    # The name before it may hold anything, also brackets.
    return text.rpartition(")")[2].split()[:1] == [_STOPPED]


@attrs.define(eq=False)
class ReplayThread:
    """The thread of a worker that replays its session's calls, once it is known."""

    pid: int
    _thread: int = 0

    def starved_ns(self) -> int:
        """Nanoseconds that it was ready to run and had no processor, so far; 0 where the kernel does not count them."""
        thread = self._thread or self._find()
        try:
            return int(Path(f"/proc/{self.pid}/task/{thread}/schedstat").read_text().split()[1])
        except (OSError, ValueError, IndexError):
            return 0

    def _find(self) -> int:
        try:
            tasks = list(Path(f"/proc/{self.pid}/task").iterdir())
        except OSError:
            return 0
        for task in tasks:
            try:
                if (task / "comm").read_text().rstrip("\n") == REPLAY_THREAD:
                    self._thread = int(task.name)
                    return self._thread
            except OSError:
                continue
        return 0
