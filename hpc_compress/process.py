"""Whether a process of this machine lives. Knows Linux' /proc, and nothing of what a process does."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process of this machine. A later one that has got the same number is told apart by when it was started."""

    pid: int
    started: int | None  # clock ticks after the machine's start; None where the system does not say

    @staticmethod
    def of(pid: int) -> "Process":
        return Process(pid, _started(pid))

    @staticmethod
    def here() -> "Process":
        return Process.of(os.getpid())

    def lives(self) -> bool:
        return self.started is not None and _started(self.pid) == self.started


def _started(pid: int) -> int | None:
    try:
        # The second field, the name of the program, is in brackets and may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])  # state: a zombie does nothing more
