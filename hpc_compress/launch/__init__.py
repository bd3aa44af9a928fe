"""Where tasks run: in this process, in local processes, or in Slurm arrays. Names the worker and does not import it.

A launcher opens the jobs of a run folder. Whoever opened them submits bundles of task ids and polls; what came of a task is
read from the run folder, so jobs have nothing to return, and nothing that they leave behind is unpickled.
"""

import os
import pkgutil
import platform
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hpc_compress.types import SpentError

Bundle = tuple[str, ...]  # ids of tasks that one process works off, one after another
Report = Callable[[str, int, int], None]  # what is being done, units done, units in all

WORKER = "hpc_compress.worker.run"
WATCH_SECONDS = 0.5  # between two looks of a local worker at whether its driver lives


@dataclass(frozen=True)
class Ended:
    """A job that came to its end, well or not. Tasks of it that have no outcome now are lost."""

    task_ids: Bundle
    reason: str  # for people: how it ended and where its log lies


class Jobs(Protocol):
    """The jobs of one run."""

    def submit(self, bundles: Sequence[Bundle], alone: bool = False) -> None:
        """Take on bundles. alone: in jobs of their own, since one of them may have killed its job."""

    def poll(self) -> list[Ended]:
        """Work or wait a little, then say what has ended since the last call."""

    def in_flight(self) -> set[str]:
        """Ids of tasks in jobs that have not ended; perhaps jobs of a driver before this one."""

    def counts(self) -> Counter[str]:
        """Jobs by state, for people."""

    def cancel(self) -> None:
        """End all jobs."""


class Launcher(Protocol):
    def open(self, root: Path, report: Report, say: Callable[[str], None]) -> AbstractContextManager[Jobs]: ...


@dataclass(frozen=True)
class Work:
    """What a job runs. Only here, on the node, is the worker imported."""

    root: str
    bundles: tuple[Bundle, ...]
    worker: str = WORKER
    checkpoint_seconds: float = 300.0
    threads: int | None = None
    gpu: str | None = None
    shared: bool = False  # all processes of one Slurm job run this, and share the bundles and the job's GPUs
    cuda: bool = False  # die rather than measure on a CPU
    driver: "Process | None" = None  # of this machine, without which the work ends

    def __call__(self) -> None:
        find_own_modules()
        bundles, gpu = self.bundles, self.gpu
        if self.driver is not None:
            threading.Thread(target=_end_with, args=(self.driver,), daemon=True).start()
        if self.shared:
            rank, ranks = int(os.environ.get("SLURM_PROCID", 0)), int(os.environ.get("SLURM_NTASKS", 1))
            bundles = bundles[rank::ranks]
            place = int(os.environ.get("SLURM_LOCALID", rank))  # among the processes of this node
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            if ranks > 1 and visible is None:
                gpu = str(place)  # nobody has shared the GPUs out: each process sees all of them
            elif ranks > 1 and visible is not None and len(names := visible.split(",")) >= ranks:
                gpu = names[place]
        if gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        if self.threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(self.threads)  # before torch is imported
        if self.cuda:
            import torch

            if not torch.cuda.is_available():
                raise RuntimeError(f"no CUDA device on {platform.node()}, though the job was given a GPU")
        from submitit.core.utils import UncompletedJobError

        run = pkgutil.resolve_name(self.worker)
        task_ids = [task_id for bundle in bundles for task_id in bundle]
        try:
            # Submitit's signal handler raises that error where the job cannot be put back into the queue once more.
            for _ in run(self.root, task_ids, interrupts=(UncompletedJobError,), checkpoint_seconds=self.checkpoint_seconds):
                pass
        except SpentError as error:
            # The node is well, so the job ends well, and its other tasks are sent again. CUDA would abort an orderly exit.
            print(error, file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def checkpoint(self) -> Any:
        """What Submitit puts back into the queue at a time limit: the same work, of which finished tasks are skipped."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a while, as a library or a process that starts meanwhile reads it."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def find_own_modules() -> None:
    """Operators of a user's own may lie in the folder where the command is given. It comes last: it hides no library."""
    sys.path.append(str(Path.cwd()))


@dataclass(frozen=True)
class Process:
    """A process of this machine. A later one that has got the same number is told apart by when it was started."""

    pid: int
    started: int | None  # clock ticks after the machine's start; None where the system does not say

    @staticmethod
    def here() -> "Process":
        return Process(os.getpid(), _started(os.getpid()))

    def lives(self) -> bool:
        return self.started is not None and _started(self.pid) == self.started


def _started(pid: int) -> int | None:
    try:
        # The second field, the name of the program, is in brackets and may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])  # state: a zombie does nothing more


def _end_with(process: Process) -> None:
    """End this process once another one is gone, however that ended."""
    while process.started is None or process.lives():
        time.sleep(WATCH_SECONDS)
    print("the driver is gone, so its worker ends; the same search command goes on", file=sys.stderr, flush=True)
    os._exit(1)


def packed(bundles: Sequence[Bundle], size: int) -> list[tuple[Bundle, ...]]:
    """Join bundles to packs of `size` tasks or a little more, in their order; a bundle is never split."""
    packs: list[tuple[Bundle, ...]] = []
    for bundle in bundles:
        if packs and sum(map(len, packs[-1])) < size:
            packs[-1] = (*packs[-1], bundle)
        else:
            packs.append((bundle,))
    return packs
