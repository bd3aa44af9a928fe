"""Where tasks run: in this process, in local processes, or in a Slurm array. Names the worker and does not import it.

A launcher has `run(root, bundles, poll, report)`: bring every bundle of task ids to an end, calling `poll` now and then, and
`report(step, done, total)` where it can see a step at work. What came of the tasks is read from the run folder by whoever
asked, so a launcher has nothing to return, and nothing is unpickled.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field

from hpc_compress.config import ConfigError
from hpc_compress.types import Record

Bundle = tuple[str, ...]  # ids of tasks that one process works off, one after another
Poll = Callable[[], None]
Report = Callable[[str, int, int], None]


class Launcher(Protocol):
    def run(self, root: Path, bundles: Sequence[Bundle], poll: Poll, report: Report) -> None: ...


@dataclass(frozen=True)
class Work:
    """What a job runs. Only here, on the node, is the worker imported."""

    root: str
    task_ids: Bundle
    threads: int | None = None

    def __call__(self) -> None:
        if self.threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(self.threads)  # before torch is imported
        from submitit.core.utils import UncompletedJobError

        from hpc_compress import worker

        # Submitit's signal handler raises it where the job cannot be put back into the queue once more.
        worker.run(self.root, self.task_ids, interrupts=(UncompletedJobError,))

    def checkpoint(self) -> Any:
        """What Submitit puts back into the queue at a time limit: the same work, of which finished tasks are skipped."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class Debug(Record):
    """Everything in this process, one task after another: for demos, debuggers and single machines."""

    def run(self, root: Path, bundles: Sequence[Bundle], poll: Poll, report: Report) -> None:
        from hpc_compress import worker

        worker.run(str(root), [task_id for bundle in bundles for task_id in bundle], report, poll)


class Local(Record):
    """Processes on this machine, at most `workers` at a time."""

    workers: int = Field(default=2, ge=1, description="processes at a time")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of each; null: an equal share of the cores")
    tasks_per_job: int = Field(default=1, ge=1, description="tasks that one process works off")

    def run(self, root: Path, bundles: Sequence[Bundle], poll: Poll, report: Report) -> None:
        import submitit

        # Threads that wait for each other on a core that is taken slow a small model down threefold and more.
        threads = self.threads or max(1, len(os.sched_getaffinity(0)) // self.workers)
        executor = submitit.LocalExecutor(folder=str(new_folder(root)))
        executor.update_parameters(timeout_min=7 * 24 * 60, tasks_per_node=1)
        waiting = packed(bundles, self.tasks_per_job)
        running: list[Any] = []
        try:
            while waiting or running:
                running = [job for job in running if not job.done()]
                while waiting and len(running) < self.workers:
                    running.append(executor.submit(Work(str(root), waiting.pop(0), threads)))
                poll()
                time.sleep(0.2)
        finally:
            for job in running:
                job.cancel()
        poll()


class Slurm(Record):
    """One array job a generation; one process a task, each on its own GPU."""

    partition: str | None = Field(default=None, description="null: the cluster's default")
    account: str | None = None
    qos: str | None = None
    timeout_min: int = Field(default=240, ge=1, description="time limit of a job, minutes")
    gpus_per_node: int | None = Field(default=1, ge=0, description="GPUs of a job; 0 or null for CPU nodes")
    cpus_per_task: int = Field(default=8, ge=1)
    mem_gb: float = Field(default=32, gt=0)
    array_parallelism: int = Field(default=64, ge=1, description="elements of an array that run at a time")
    tasks_per_job: int = Field(default=1, ge=1, description="tasks that one element works off")
    setup: tuple[str, ...] = Field(default=(), description="shell lines before Python starts, such as module loads")
    additional_parameters: dict[str, Any] = Field(default={}, description="any other sbatch option, by its long name")
    poll_seconds: float = Field(default=5.0, gt=0)

    def run(self, root: Path, bundles: Sequence[Bundle], poll: Poll, report: Report) -> None:
        import submitit

        executor = submitit.SlurmExecutor(folder=str(new_folder(root)))
        options = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "time": self.timeout_min,
            "gpus_per_node": self.gpus_per_node or None,
            "cpus_per_task": self.cpus_per_task,
            "mem": f"{round(1024 * self.mem_gb)}M",  # sbatch takes whole numbers only
            "array_parallelism": self.array_parallelism,
            "setup": ["export HF_HUB_OFFLINE=1", *self.setup],
            "additional_parameters": self.additional_parameters,
            "job_name": "hpc_compress",
        }
        executor.update_parameters(**{name: value for name, value in options.items() if value is not None})
        packs = packed(bundles, self.tasks_per_job)
        try:
            with executor.batch():
                jobs = [executor.submit(Work(str(root), pack)) for pack in packs]
        except submitit.core.utils.FailedJobError as error:
            raise ConfigError(f"sbatch refused the jobs: {error}; check the keys of launcher") from None
        try:
            while any(not job.done() for job in jobs):
                poll()
                time.sleep(self.poll_seconds)
        except BaseException:
            for job in jobs:
                job.cancel(check=False)
            raise
        poll()


def packed(bundles: Sequence[Bundle], size: int) -> list[Bundle]:
    """Join bundles to jobs of `size` tasks or a little more, in their order; a bundle is never torn."""
    packs: list[Bundle] = []
    for bundle in bundles:
        if packs and len(packs[-1]) < size:
            packs[-1] = (*packs[-1], *bundle)
        else:
            packs.append(bundle)
    return packs


def new_folder(root: Path) -> Path:
    """A folder for one submission's logs. Never an old one: submitit believes any result file that it finds there."""
    folder = root / "jobs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}"
    folder.mkdir(parents=True)
    return folder
