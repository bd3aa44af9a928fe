"""Tasks in this process, or in processes of this machine."""

import os
import pkgutil
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from hpc_compress.launch import WORKER, Bundle, Ended, Jobs, Report, Work, packed
from hpc_compress.types import Record

# --- in this process ---


class Debug(Record):
    """Everything in this process, one task after another: for demos, debuggers and single machines."""

    worker: str = Field(default=WORKER, description="dotted path of what brings tasks to outcomes")
    checkpoint_minutes: float = Field(default=5.0, gt=0, description="a longer training is saved this often, to go on from")

    @contextmanager
    def open(self, root: Path, report: Report, say: Callable[[str], None]) -> Iterator[Jobs]:
        yield InProcess(str(root), self, report)


class InProcess:
    """Jobs that run while they are polled, a task at a time."""

    def __init__(self, root: str, settings: Debug, report: Report) -> None:
        self.root, self.settings, self.report = root, settings, report
        self.waiting: list[str] = []
        self.running: Iterator[str] | None = None

    def submit(self, bundles: Sequence[Bundle], alone: bool = False) -> None:
        self.waiting += [task_id for bundle in bundles for task_id in bundle]

    def poll(self) -> list[Ended]:
        if self.running is None:
            task_ids, self.waiting = self.waiting, []
            run = pkgutil.resolve_name(self.settings.worker)
            self.running = run(
                self.root, task_ids, report=self.report, checkpoint_seconds=60 * self.settings.checkpoint_minutes
            )
        assert self.running is not None
        if next(self.running, None) is None:
            self.running = None
        return []

    def in_flight(self) -> set[str]:
        return set()

    def counts(self) -> Counter[str]:
        return Counter()

    def cancel(self) -> None:
        self.waiting, self.running = [], None


# --- processes on this machine ---


class Local(Record):
    """Processes on this machine, at most `workers` at a time, each on its own GPU where there are any."""

    workers: int | None = Field(default=None, ge=1, description="processes at a time; null: one for each GPU, 2 without GPUs")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of each; null: an equal share of the cores")
    tasks_per_job: int = Field(default=1, ge=1, description="tasks that one process works off")
    worker: str = Field(default=WORKER, description="dotted path of what brings tasks to outcomes")
    checkpoint_minutes: float = Field(default=5.0, gt=0, description="a longer training is saved this often, to go on from")

    @contextmanager
    def open(self, root: Path, report: Report, say: Callable[[str], None]) -> Iterator[Jobs]:
        jobs = Processes(root, self, visible_gpus())
        try:
            yield jobs
        finally:
            jobs.cancel()


class Processes:
    """Local jobs. They end with the driver, unless that is killed."""

    def __init__(self, root: Path, settings: Local, gpus: Sequence[str]) -> None:
        import submitit

        self.root, self.settings, self.gpus = root, settings, gpus
        self.workers = settings.workers or len(gpus) or 2
        # Threads that wait for each other on a core that is taken slow a small model down threefold and more.
        self.threads = settings.threads or max(1, len(os.sched_getaffinity(0)) // self.workers)
        folder = root / "jobs" / f"local-{time.time_ns():x}"  # never an old one: submitit believes the results that it finds
        self.executor = submitit.LocalExecutor(folder=str(folder))
        self.executor.update_parameters(timeout_min=7 * 24 * 60, tasks_per_node=1)
        self.waiting: deque[Sequence[Bundle]] = deque()
        self.running: dict[int, tuple[Any, Sequence[Bundle]]] = {}  # by place: a worker, and with it a GPU

    def submit(self, bundles: Sequence[Bundle], alone: bool = False) -> None:
        self.waiting += packed(bundles, 1 if alone else self.settings.tasks_per_job)

    def poll(self) -> list[Ended]:
        time.sleep(0.2)
        ended = []
        for place, (job, pack) in list(self.running.items()):
            if job.done():
                del self.running[place]
                ended.append(Ended(sum(pack, ()), f"its process ended; log: {job.paths.stderr}"))
        for place in range(self.workers):
            if self.waiting and place not in self.running:
                pack = self.waiting.popleft()
                gpu = self.gpus[place % len(self.gpus)] if self.gpus else None
                settings = self.settings
                work = Work(str(self.root), tuple(pack), settings.worker, 60 * settings.checkpoint_minutes, self.threads, gpu)
                self.running[place] = self.executor.submit(work), pack
        return ended

    def in_flight(self) -> set[str]:
        return set()

    def counts(self) -> Counter[str]:
        return Counter({"running": len(self.running), "waiting": len(self.waiting)})

    def cancel(self) -> None:
        for job, _ in self.running.values():
            job.cancel()
        self.waiting.clear()
        self.running.clear()


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to for one GPU each; empty without GPUs. Asks no CUDA library."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    gpus = [line for line in listed.stdout.splitlines() if line.startswith("GPU")]  # below them stand parts of a GPU
    return [str(number) for number in range(len(gpus))]
