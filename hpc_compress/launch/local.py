"""Tasks in this process, or in processes of this machine."""

import os
import pkgutil
import re
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from hpc_compress.config import ConfigError
from hpc_compress.launch import WORKER, Ended, Jobs, Work, packed, variable
from hpc_compress.process import Process
from hpc_compress.records import Bundle, Pack
from hpc_compress.types import OnProgress, Record

# --- in this process ---


class Debug(Record):
    """Everything in this process, one task after another: for demos, debuggers and single machines."""

    worker: str = Field(default=WORKER, description="dotted path of what brings tasks to outcomes")
    checkpoint_minutes: float = Field(default=5.0, gt=0, description="a longer training is saved this often, to go on from")

    @contextmanager
    def open(self, root: Path, report: OnProgress, say: Callable[[str], None]) -> Iterator[Jobs]:
        yield InProcess(str(root), self, report)


class InProcess:
    """Jobs that run while they are polled, a task at a time."""

    def __init__(self, root: str, settings: Debug, report: OnProgress) -> None:
        self.root, self.settings, self.report = root, settings, report
        self.waiting: list[str] = []
        self.taken: Bundle = ()  # what is worked off now
        self.running: Iterator[str] | None = None

    def submit(self, bundles: Sequence[Bundle], alone: bool = False) -> None:
        self.waiting += [task_id for bundle in bundles for task_id in bundle]

    def poll(self) -> list[Ended]:
        if self.running is None:
            self.taken, self.waiting = tuple(self.waiting), []
            run = pkgutil.resolve_name(self.settings.worker)
            self.running = run(
                self.root, self.taken, report=self.report, checkpoint_seconds=60 * self.settings.checkpoint_minutes
            )
        assert self.running is not None
        if next(self.running, None) is not None:
            return []
        self.running = None
        return [Ended(self.taken, f"{self.settings.worker} came to its end in this process")]

    def in_flight(self) -> set[str]:
        return set()

    def counts(self) -> Counter[str]:
        return Counter()

    def cancel(self) -> None:
        self.waiting, self.taken, self.running = [], (), None


# --- processes on this machine ---


class Local(Record):
    """Processes on this machine, at most `workers` at a time, each on its own GPU where there are any."""

    workers: int | None = Field(default=None, ge=1, description="processes at a time; null: one for each GPU, 2 without GPUs")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of each; null: an equal share of the cores")
    tasks_per_job: int = Field(default=1, ge=1, description="tasks that one process works off")
    worker: str = Field(default=WORKER, description="dotted path of what brings tasks to outcomes")
    checkpoint_minutes: float = Field(default=5.0, gt=0, description="a longer training is saved this often, to go on from")

    @contextmanager
    def open(self, root: Path, report: OnProgress, say: Callable[[str], None]) -> Iterator[Jobs]:
        jobs = Processes(root, self, visible_gpus())
        try:
            yield jobs
        finally:
            jobs.cancel()


class Processes:
    """Local jobs. They end with the driver, however that ends."""

    def __init__(self, root: Path, settings: Local, gpus: Sequence[str]) -> None:
        import submitit

        self.root, self.settings, self.gpus = root, settings, gpus
        self.workers = settings.workers or len(gpus) or 2
        # Threads that wait for each other on a busy core make a small model three or more times slower.
        self.threads = settings.threads or max(1, len(os.sched_getaffinity(0)) // self.workers)
        folder = root / "jobs" / f"local-{time.time_ns():x}"  # never an old one: submitit believes the results that it finds
        self.executor = submitit.LocalExecutor(folder=str(folder))
        self.executor.update_parameters(timeout_min=7 * 24 * 60, tasks_per_node=1)
        self.waiting: deque[Pack] = deque()
        self.running: dict[int, tuple[Any, Pack]] = {}  # by place: a worker, and with it a GPU

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
                seconds = 60 * settings.checkpoint_minutes
                work = Work(str(self.root), pack, settings.worker, seconds, self.threads, gpu, driver=Process.here())
                with variable("PYTHONSAFEPATH", "1"):  # else it looks into the current folder before the libraries
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


NO_GPU = ("", "-1", "NoDevFiles")  # how CUDA_VISIBLE_DEVICES says that there is none
DRIVER_FILES = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # there only with a GPU's driver


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to for one GPU each; empty without GPUs. Asks no CUDA library.

    Raises: ConfigError where there is a driver for GPUs, but it can't be found out how many there are.
    """
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name not in NO_GPU]
    gpus = [line for line in _nvidia_smi("--list-gpus").splitlines() if line.startswith("GPU")]  # below stand parts of a GPU
    driver = next((path for path in DRIVER_FILES if os.path.exists(path)), None)
    if not gpus and driver:
        raise ConfigError(
            f"this machine has the driver of a GPU ({driver}), but nvidia-smi lists none, so tasks can't be spread over them; "
            "set CUDA_VISIBLE_DEVICES to the GPUs to use, such as 0,1, or to '' for the CPU"
        )
    return [str(number) for number in range(len(gpus))]


def driver_version() -> str:
    """The version of NVIDIA's driver on this machine; "" where there is none. Asks no CUDA library."""
    if found := re.search(r"^[0-9]+(\.[0-9]+)+$", _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader"), re.M):
        return found[0]
    try:
        text = Path(DRIVER_FILES[0]).read_text(errors="replace")
    except OSError:
        return ""
    # "... Kernel Module  535.104.05  Sat Aug 19 ..." or "... Open Kernel Module for x86_64  580.65.06  Release Build ..."
    found = re.search(r"Kernel Module.*?\s([0-9]+(?:\.[0-9]+)+)\s", text)
    return found[1] if found else ""


def _nvidia_smi(*options: str) -> str:
    """What it prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *options], capture_output=True, text=True, errors="replace", timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
