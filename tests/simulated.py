"""A Slurm in virtual time that stands in for `launch.slurm.Commands`: days of a cluster in seconds, and every fault at will.

A node runs one element of an array at a time. What a fault does begins half-way through the work of an element:

die STATE CODE    ends so; tasks of it that were done before have outcomes
requeue STATE     that life ends so, and the element waits in the queue to begin once more
twice             the same, but the process of the first life goes on beside the second
blink SECONDS     ends as FAILED, and is back in the queue after so long
linger            ends as CANCELLED, but its process goes on
suspend           is stopped for a while
hold              waits in the queue until somebody lets it go
forget            nothing ever knew it
reuse             the same, and its id is given to a job of another name
"""

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import light
import numpy as np
from safetensors.numpy import save_file

from hpc_compress.launch import Work
from hpc_compress.launch.scheduler import CommandError, Limits, Options, Row
from hpc_compress.launch.slurm import refusal as refused
from hpc_compress.store import Store

PAUSE = 300.0  # that a suspension lasts
BEGIN = 120.0  # before which Slurm does not begin what it has put back into the queue
PATIENCE = 60.0  # for which Submitit waits on the node for the file that says what to do


def nothing_to_load(folder: Path) -> list[str]:
    """A checkpoint and a dataset of which only descriptions are ever read, as overrides of a search with `light.run`."""
    (folder / "config.json").write_text('{"model_type": "bert", "num_hidden_layers": 3, "num_attention_heads": 4}')
    (folder / "tokenizer.json").write_text("{}")
    layers = {f"encoder.layer.{number}.output.dense.weight": np.zeros(1, np.float32) for number in range(3)}
    save_file(layers, folder / "model.safetensors")
    lines = [f"word {n},{['pos', 'neg'][n % 2]}" for n in range(120)]
    (folder / "rows.csv").write_text("\n".join(["text,label", *lines]))
    rows = ["dataset=file", f"dataset.train={folder / 'rows.csv'}", "dataset.name=words"]
    return [f"model.path={folder}", *rows, "strategy=genetic"]


def log_normal(task_id: str, mean: float = 600.0, sigma: float = 0.8) -> float:
    """Seconds that a task takes: the same in whatever order the tasks come."""
    return random.Random(task_id).lognormvariate(math.log(mean) - sigma**2 / 2, sigma)


@dataclass(eq=False)
class Life:
    """One time that an element runs; a row of the accounting."""

    node: str
    began: float
    ended: float | None = None
    state: str = "RUNNING"
    exit_code: str = "0:0"
    alive: bool = True  # the process, whatever Slurm believes


@dataclass(eq=False)
class Element:
    """One element of an array."""

    number: int  # over all submissions, from 0
    job_id: str
    index: int
    options: Options
    work: Work | None
    state: str = "PENDING"
    reason: str = "Priority"
    submitted: float = 0.0
    lives: list[Life] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.options["job_name"]

    @property
    def task_ids(self) -> list[str]:
        return [task_id for bundle in self.work.bundles for task_id in bundle] if self.work else []


class SimulatedSlurm:
    """faults: asked at the beginning of each life of an element what shall happen in it."""

    def __init__(
        self,
        nodes: int = 3,
        seconds: Callable[[str], float] = log_normal,
        faults: Callable[[Element], str] = lambda element: "",
        limits: Limits = Limits(1000, None, 64_000),  # noqa: B008
    ) -> None:
        self.free = [f"n{number}" for number in range(nodes)]
        self.seconds, self.faults, self.admitted = seconds, faults, limits
        self.clock, self.busy_seconds = 0.0, 0.0
        self.forever = 2e5  # a test that gets so far is caught in a loop
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.serial = itertools.count()
        self.elements: list[Element] = []  # every one that was ever taken
        self.jobs: dict[str, list[Element]] = {}  # those that Slurm remembers
        self.queued: dict[Element, None] = {}  # those that have not ended
        self.foreign: list[Row] = []
        self.running: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()  # by task id: how often it was worked off
        self.sizes: list[int] = []  # of the arrays that sbatch was asked for
        self.down: dict[str, tuple[float, float]] = {}  # from when to when a command fails
        self.cancelled: list[str] = []  # ids that scancel was given
        self.immune: set[str] = set()  # job ids for which scancel fails
        self.hidden: set[int] = set()  # numbers of elements that squeue does not list
        self.lag = 0.0  # seconds that the accounting is behind
        self.refusals: list[str] = []  # what sbatch says to the next ones; "taken: " when it takes them all the same
        self.point: Callable[[], None] = lambda: None  # where a driver may be killed while it submits

    # --- what Commands has ---

    def submit(self, folder: Path, works: Sequence[Work], options: Options) -> str:
        self.sizes.append(len(works))
        self.point()
        refusal = self.refusals.pop(0) if self.refusals else ""
        if not refusal and self.admitted.submitted is not None and len(self.queued) + len(works) > self.admitted.submitted:
            refusal = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
        if not refusal and len(works) > self.admitted.array_size:
            refusal = "Invalid job array specification"
        if refusal and not refusal.startswith("taken: "):
            raise refused(refusal)
        job_id = str(1 + len(self.jobs))
        numbers = itertools.count(len(self.elements))
        made = [Element(next(numbers), job_id, index, options, None, submitted=self.clock) for index in range(len(works))]
        self.jobs[job_id] = made
        self.elements += made
        self.queued |= dict.fromkeys(made)
        self.point()
        if refusal:
            raise refused(refusal.removeprefix("taken: "))
        self.attach(folder, works, job_id, options)
        self.point()
        return job_id

    def attach(self, folder: Path, works: Sequence[Work], job_id: str, options: Options) -> None:
        for element, work in zip(self.jobs[job_id], works, strict=True):
            if element.work is None:
                element.work = work

    def queue(self) -> list[Row]:
        self._fail("squeue")
        shown = [element for element in self.queued if element.number not in self.hidden]
        node = [element.lives[-1].node if element.state == "RUNNING" else "" for element in shown]
        return self.foreign + [Row(e.job_id, e.index, e.name, e.state, n, e.reason) for e, n in zip(shown, node, strict=True)]

    def accounting(self, job_ids: Sequence[str]) -> list[Row]:
        self._fail("sacct")
        rows, then = [row for row in self.foreign if row.job_id in job_ids], self.clock - self.lag
        for element in (element for job_id in job_ids for element in self.jobs.get(job_id, ())):
            for life in (life for life in element.lives if life.began <= then):
                over = life.ended is not None and life.ended <= then
                state, code = (life.state, life.exit_code) if over else ("RUNNING", "0:0")
                seconds = int((life.ended if over else self.clock) - life.began)  # type: ignore[operator]
                rows.append(Row(element.job_id, element.index, element.name, state, life.node, "", code, seconds))
            if element.state == "PENDING" and element.submitted <= then:
                rows.append(Row(element.job_id, element.index, element.name, "PENDING", "None assigned"))
        return rows

    def accounted(self, name: str) -> str | None:
        try:
            self._fail("sacct")
        except CommandError:
            return None
        known = (elements[0] for elements in self.jobs.values() if elements and elements[0].lives)
        return next((element.job_id for element in known if element.name == name), None)

    def cancel(self, ids: Sequence[str]) -> None:
        self.cancelled += ids
        ids, immune = [id for id in ids if id not in self.immune], self.immune & set(ids)
        self.foreign = [row for row in self.foreign if not {row.job_id, f"{row.job_id}_{row.index}"} & set(ids)]
        for element in [e for e in self.queued if {e.job_id, f"{e.job_id}_{e.index}"} & set(ids)]:
            if element.state == "PENDING":
                element.lives.append(Life("None assigned", self.clock))
            self._end(element, element.lives[-1], "CANCELLED", "0:15")
        if immune:
            raise CommandError(f"scancel: error: Kill job error on job id {min(immune)}: Access/permission denied")

    def limits(self, partition: str | None, account: str | None, qos: str | None) -> Limits:
        return self.admitted

    def now(self) -> float:
        return self.clock

    def sleep(self, seconds: float) -> None:
        until = self.clock + seconds
        assert until < self.forever, "this goes on for ever"
        self._schedule()
        while self.events and self.events[0][0] <= until:
            self.clock, _, action = heapq.heappop(self.events)
            action()
            self._schedule()
        self.clock = until

    # --- a cluster ---

    def _fail(self, command: str) -> None:
        start, end = self.down.get(command, (0, 0))
        if start <= self.clock < end:
            raise CommandError(f"{command}: down")

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.clock + seconds, next(self.serial), action))

    def _schedule(self) -> None:
        for element in [e for e in self.queued if e.state == "PENDING" and e.reason == "Priority"] if self.free else ():
            excluded = element.options.get("exclude", "").split(",")
            node = next((node for node in self.free if node not in excluded), None)
            if node and self.running[element.job_id] < element.options["array_parallelism"]:
                self.free.remove(node)
                self.running[element.job_id] += 1
                life = Life(node, self.clock)
                element.lives.append(life)
                element.state, element.reason = "RUNNING", "None"
                self._after(0 if element.work else PATIENCE, lambda e=element, life=life: self._begin(e, life))  # type: ignore[misc]

    def _begin(self, element: Element, life: Life) -> None:
        if element.work is None:
            return self._end(element, life, "FAILED", "1:0")
        store, done, fault = Store(element.work.root), 0.0, self.faults(element)
        task_ids = [task_id for task_id in element.task_ids if store.outcome(task_id) is None]
        half = sum(map(self.seconds, task_ids)) / 2
        pause = PAUSE if fault == "suspend" else 0
        for task_id in task_ids:
            done += self.seconds(task_id)
            self._after(done + pause * (done > half), lambda id=task_id: self._answer(store, id, life))  # type: ignore[misc]
        if fault:
            self._after(half, lambda: self._strike(element, life, *fault.split()))
        return self._after(done + pause, lambda: self._end(element, life, "COMPLETED"))

    def _answer(self, store: Store, task_id: str, life: Life) -> None:
        if life.alive:
            self.answers[task_id] += 1
            store.settle(light.answer(store.task(task_id)))

    def _end(self, element: Element, life: Life, state: str, exit_code: str = "0:0") -> None:
        if life.ended is None:
            life.ended, life.state, life.exit_code, life.alive = self.clock, state, exit_code, False
            element.state = state
            self.queued.pop(element, None)
            if life.node.startswith("n"):
                self.free.append(life.node)
                self.running[element.job_id] -= 1
                self.busy_seconds += self.clock - life.began

    def _queue(self, element: Element, reason: str) -> None:
        element.state, element.reason = "PENDING", reason
        self.queued[element] = None

    def _strike(self, element: Element, life: Life, kind: str, *details: str) -> None:
        if life.ended is not None:
            return
        if kind == "suspend":
            element.state = "SUSPENDED"
            return self._after(PAUSE, lambda: setattr(element, "state", "RUNNING"))
        state = {"requeue": details[:1], "twice": ("NODE_FAIL",), "linger": ("CANCELLED",), "die": details[:1]}.get(kind)
        self._end(element, life, *(state or ("FAILED",)), *(details[1:] if kind == "die" else ()))
        life.alive = kind in ("twice", "linger")
        if kind in ("requeue", "twice"):
            self._queue(element, "BeginTime")
            self._after(BEGIN, lambda: self._queue(element, "Priority"))
        if kind == "blink":
            self._after(float(details[0]), lambda: self._queue(element, "Priority"))
        if kind == "hold":
            self._queue(element, "launch failed requeued held")
        if kind in ("forget", "reuse"):
            element.lives.clear()
        if kind == "reuse":
            self.foreign.append(Row(element.job_id, element.index, "of-another-user", "RUNNING", "n0"))
        return None
