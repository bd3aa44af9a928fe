"""Where tasks run: in this process, in local processes, or in job arrays. Names the worker and does not import it.

A launcher opens the jobs of a run folder. Whoever opened them submits bundles of task ids and polls; what came of a task is
read from the run folder, so jobs have nothing to return, and nothing that they leave behind is unpickled.

Each batch system has a module of its own, and all that is known of it stands there. The others ask SCHEDULERS.
"""

import os
import pkgutil
import platform
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hpc_compress.process import Process
from hpc_compress.records import Bundle, Pack
from hpc_compress.types import OnProgress, SpentError

WORKER = "hpc_compress.worker.run"
WATCH_SECONDS = 0.5  # between two looks of a local worker at whether its driver lives

# Launchers that submit to a batch system, by their names in conf/launcher; imported when they are needed.
SCHEDULERS = {"slurm": "hpc_compress.launch.slurm.Slurm", "pbs": "hpc_compress.launch.pbs.Pbs"}
# What must be done before a sweep, by the class of Hydra's launcher.
SWEEPS = {"SlurmLauncher": "hpc_compress.launch.slurm.leave_out_wckey"}


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
    """Opens the jobs of a run."""

    def open(self, root: Path, report: OnProgress, say: Callable[[str], None]) -> AbstractContextManager[Jobs]: ...


@dataclass(frozen=True)
class Ranks:
    """Names of the environment variables by which a process learns its place among those of its job, counted from 0."""

    rank: str
    ranks: str  # how many there are
    place: str  # among those on the same node


@dataclass(frozen=True)
class Work:
    """What a job runs. Only here, on the node, is the worker imported."""

    root: str
    bundles: Pack
    worker: str = WORKER
    checkpoint_seconds: float = 300.0
    threads: int | None = None
    gpu: str | None = None
    ranks: Ranks | None = None  # all processes of one job run this, and share the bundles and the job's GPUs
    cuda: bool = False  # die rather than measure on a CPU
    driver: Process | None = None  # of this machine, without which the work ends

    def __call__(self) -> None:
        find_own_modules()
        if self.driver is not None:
            threading.Thread(target=_end_with, args=(self.driver,), daemon=True).start()
        bundles, gpu = (self.bundles, self.gpu) if self.ranks is None else self._share(self.ranks)
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

    def _share(self, names: Ranks) -> tuple[Pack, str | None]:
        """The bundles and the GPU of this process; None: it may see what it sees."""
        rank, ranks = int(os.environ.get(names.rank, 0)), int(os.environ.get(names.ranks, 1))
        bundles = self.bundles[rank::ranks]
        place = int(os.environ.get(names.place, rank))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if ranks > 1 and visible is None:
            return bundles, str(place)  # nobody has shared the GPUs out: each process sees all of them
        if ranks > 1 and visible is not None and len(devices := visible.split(",")) >= ranks:
            return bundles, devices[place]
        return bundles, None

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


def _end_with(process: Process) -> None:
    """End this process once another one is gone, however that ended."""
    while process.started is None or process.lives():
        time.sleep(WATCH_SECONDS)
    print("the driver is gone, so its worker ends; the same search command goes on", file=sys.stderr, flush=True)
    os._exit(1)


def packed(bundles: Sequence[Bundle], size: int) -> list[Pack]:
    """Join bundles to packs of `size` tasks or a little more, in their order; a bundle is never split."""
    packs: list[Pack] = []
    for bundle in bundles:
        if packs and sum(map(len, packs[-1])) < size:
            packs[-1] = (*packs[-1], bundle)
        else:
            packs.append((bundle,))
    return packs


# --- batch systems ---


@dataclass(frozen=True)
class OwnJob:
    """The job that this process lives in."""

    scheduler: str | None  # as in the records of a run
    id: str  # names one element, if it is one of an array
    name: str | None


def own_job() -> OwnJob | None:
    """The job that this process lives in; None if it lives in none that is known."""
    return next((job for path in SCHEDULERS.values() if (job := pkgutil.resolve_name(path).own_job())), None)


def installed() -> str:
    """The batch system that this machine can submit to; the first one known if there is none."""
    names = {name: pkgutil.resolve_name(path).names.submit for name, path in SCHEDULERS.items()}
    return next((name for name, command in names.items() if shutil.which(command)), next(iter(SCHEDULERS)))


def before_sweep(launcher: str) -> None:
    """Do what a launcher of Hydra, given by its dotted path, needs before a sweep."""
    if path := SWEEPS.get(launcher.rpartition(".")[2]):
        pkgutil.resolve_name(path)()
