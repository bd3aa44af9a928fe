"""Where tasks run: in this process, in local processes, or in Slurm arrays. Names the worker and does not import it.

A launcher opens the jobs of a run folder. Whoever opened them submits bundles of task ids and polls; what came of a task is
read from the run folder, so jobs have nothing to return, and nothing that they leave behind is unpickled.
"""

import os
import pkgutil
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Bundle = tuple[str, ...]  # ids of tasks that one process works off, one after another
Report = Callable[[str, int, int], None]  # what is being done, units done, units in all

WORKER = "hpc_compress.worker.run"


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

    def __call__(self) -> None:
        bundles, gpu = self.bundles, self.gpu
        if self.shared:
            rank, ranks = int(os.environ.get("SLURM_PROCID", 0)), int(os.environ.get("SLURM_NTASKS", 1))
            bundles = bundles[rank::ranks]
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            gpu = visible[rank] if ranks > 1 and len(visible) >= ranks else None
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
        # Submitit's signal handler raises that error where the job cannot be put back into the queue once more.
        for _ in run(self.root, task_ids, interrupts=(UncompletedJobError,), checkpoint_seconds=self.checkpoint_seconds):
            pass

    def checkpoint(self) -> Any:
        """What Submitit puts back into the queue at a time limit: the same work, of which finished tasks are skipped."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def packed(bundles: Sequence[Bundle], size: int) -> list[tuple[Bundle, ...]]:
    """Join bundles to packs of `size` tasks or a little more, in their order; a bundle is never torn."""
    packs: list[tuple[Bundle, ...]] = []
    for bundle in bundles:
        if packs and sum(map(len, packs[-1])) < size:
            packs[-1] = (*packs[-1], bundle)
        else:
            packs.append((bundle,))
    return packs
