"""What is asked of a batch system and what it answers: the words that `arrays` shares with the module of each system.

A batch system's commands are the edge: they know no run and no task, and a simulation can stand in for them. What they print
is data from a stranger.
"""

import os
import pwd
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from hpc_compress.door import one_line

SECONDS = 60.0  # that a command may take: a busy server answers late, a dead one after its own timeout

Options = Mapping[str, Any]  # what a job asks for; each system has keys of its own


class CommandError(RuntimeError):
    """A command failed; what it would have said is not known."""


class RefusedError(RuntimeError):
    """A submission was refused. kind: full (later, or fewer), busy (perhaps it was taken), never (a setting to mend)."""

    def __init__(self, message: str, kind: Literal["full", "busy", "never"]) -> None:
        super().__init__(one_line(message))
        self.kind = kind


@dataclass(frozen=True)
class Row:
    """One element of an array, as the queue or the accounting shows it."""

    job_id: str  # of the whole array
    index: int
    name: str
    state: str  # one word, such as RUNNING
    node: str
    reason: str = ""  # queue: why it waits
    exit_code: str = ""  # accounting
    seconds: int = 0  # accounting: elapsed


@dataclass(frozen=True)
class Limits:
    """What the cluster admits; None where it does not say."""

    array_size: int  # elements of one array
    submitted: int | None  # elements that one user may have in the queue
    node_memory_mb: int | None  # of the largest node
    nodes: int | None = None
    excludes: bool = True  # a job can be kept away from nodes


@dataclass(frozen=True)
class States:
    """A system's words for the states of a job, as far as they are told apart."""

    waiting: str
    unfinished: frozenset[str]  # in the accounting: the job has not ended, whatever the queue shows
    leaving: frozenset[str]  # in the queue: the job is over, and its processes have not all ended
    held: tuple[str, ...]  # how the reason of a job begins that waits until somebody lets it go
    completed: str
    failed: str
    of_memory: frozenset[str]
    killed: frozenset[str]  # exit codes of failed jobs that were most likely out of memory
    of_node: frozenset[str]  # the node failed


@dataclass(frozen=True)
class Names:
    """How people call a system and what they type there; for messages."""

    system: str
    programs: tuple[str, ...]  # without which no search works
    submit: str
    queue: str
    accounting: str
    show: str  # a command that shows the job {job}
    estimate: str  # a command that shows when waiting jobs may begin
    keys: str  # of the configuration, where a user says what a job asks for
    gpu_keys: str
    gpu_advice: str  # for a job that was to get a GPU, on a node without one


@dataclass(frozen=True)
class Check:
    """One thing that the doctor looked at."""

    name: str
    ok: bool
    found: str
    advice: str = ""  # what to do when it is not ok


class Scheduler(Protocol):
    """The commands of one batch system."""

    def submit(self, folder: Path, works: Sequence[Callable[[], None]], options: Options) -> str:
        """Submit callables as one array, whose files lie in `folder`; a single one as a job that is no array.

        Returns: the job id. Raises: RefusedError.
        """

    def attach(self, folder: Path, works: Sequence[Callable[[], None]], job_id: str, options: Options) -> None:
        """Finish what `submit` does once it knows the job id, for a driver that was killed in between."""

    def queue(self) -> list[Row]:
        """Every job of this user that is waiting, running or on its way out. Raises: CommandError."""

    def accounting(self, job_ids: Sequence[str]) -> list[Row]:
        """All that is recorded of these jobs, earlier lives of requeued ones too, older before newer. Raises: CommandError."""

    def accounted(self, name: str) -> str | None:
        """The id of the job of this name, if there is a record of one. Raises: CommandError."""

    def cancel(self, ids: Sequence[str]) -> None:
        """Cancel jobs or elements; those that have ended are ignored.

        Raises: CommandError when that failed for some of them; the others were tried too.
        """

    # Time is asked here too, so that a simulation can have its own. Never the time of day: it can be set back.

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


# --- what the modules of batch systems have in common ---


def run(system: str, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Raises: CommandError when the command is not there or does not answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, errors="replace", env=environment)
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            raise CommandError(f"{command[0]} can't be started: {error.strerror}") from None
        raise CommandError(f"{command[0]} is not on this machine; start the search where {system}'s commands are") from None
    except subprocess.TimeoutExpired:
        raise CommandError(f"{command[0]} did not answer in {SECONDS:.0f} s") from None


def user() -> str:
    """The name of this user; the number where there is no name, as in some containers."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def failed(done: subprocess.CompletedProcess[str]) -> CommandError:
    """The error of a command that ended with an exit code."""
    return CommandError(f"{done.args[0]}: {one_line(done.stderr.strip()) or f'exit code {done.returncode}'}")


def in_parts(ids: Sequence[str], do: Callable[[Sequence[str]], object], size: int = 200) -> None:
    """Call `do` with so many ids at a time: a command line has a limit.

    Raises: the last CommandError, after all parts were tried.
    """
    trouble = None
    for start in range(0, len(ids), size):
        try:
            do(ids[start : start + size])
        except CommandError as error:
            trouble = error
    if trouble:
        raise trouble


def refusal(message: str, full: Sequence[str], busy: Sequence[str]) -> RefusedError:
    """What a refused submission means, by the words that the system uses for it."""
    lower = message.lower()
    if any(word in lower for word in full):
        return RefusedError(message, "full")
    return RefusedError(message, "busy" if any(word in lower for word in busy) else "never")


def batch_lines(folder: Path, index: str, modules: Sequence[str], setup: Sequence[str]) -> list[str]:
    """Shell lines that a job runs before Python: where its output goes, and its environment.

    index: how the shell finds the index of the element, which may have none.
    """
    log = shlex.quote(str(folder / "batch-"))
    return [
        # Here and not in an option of the job, which reads some signs in a path as a pattern.
        f'exec >>{log}"${{{index}:-0}}".log 2>&1',
        *(f"module load {shlex.quote(module)} || exit 1" for module in modules),
        *setup,
        "export HF_HUB_OFFLINE=1",
        "export PYTHONSAFEPATH=1",  # else the current folder comes before the libraries
        "unset HF_TOKEN HUGGING_FACE_HUB_TOKEN",  # no job needs them
    ]
