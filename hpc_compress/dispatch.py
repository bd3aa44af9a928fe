"""From tasks to outcomes: sends what the store can't answer, reads what came of it, sends the lost again. Imports no torch."""

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

from hpc_compress import door, guard, identity
from hpc_compress.launch import Jobs
from hpc_compress.records import CANCELLED, HEARTBEAT_SECONDS, Heartbeat
from hpc_compress.store import Store
from hpc_compress.summary import describe, figures
from hpc_compress.types import Failure, Genome, Outcome, Screen, Screening, SearchError, SpentError, Task

SCREENS = 32  # that one process works off


class Progress(Protocol):
    """Where the driver says what is going on."""

    def say(self, text: str) -> None: ...
    def working(self, what: str, done: int, total: int) -> None: ...


class Dispatch:
    """The tasks of one run that have been sent, and those among them that are still open."""

    def __init__(self, store: Store, jobs: Jobs, progress: Progress, retries: int) -> None:
        self.store, self.jobs, self.progress, self.retries = store, jobs, progress, retries
        self.open: dict[str, Task] = {}
        self.losses: Counter[str] = Counter()
        self.heartbeat, self.beaten = guard.here(), 0.0
        self.wanted: set[str] = set()  # what was sent last

    def send(self, tasks: Sequence[Task], what: str, again: bool = False) -> list[str]:
        """See that every task is on its way, equal ones once; returns their ids, in order.

        again: try once more what failed in an earlier run of the driver, since its user may have mended the cause.
        """
        task_ids = [self.store.add_task(task) for task in tasks]
        wanted = dict(zip(task_ids, tasks, strict=True))
        for task_id in wanted if again else ():
            self.store.forget_failure(task_id)
        new = {
            task_id: task
            for task_id, task in wanted.items()
            if task_id not in self.open and self.store.outcome(task_id) is None
        }
        if new:
            known = len(wanted) - len(new)
            tasks_text = f"{len(new)} {'task' if len(new) == 1 else 'tasks'}"
            self.progress.say(f"{what}: {tasks_text}{f', {known} known already' if known else ''}")
        self.open |= new
        flying = self.jobs.in_flight() if new else set()
        self.jobs.submit(_bundles({task_id: task for task_id, task in new.items() if task_id not in flying}))
        self.wanted = set(wanted)
        self.heartbeat = self.heartbeat.model_copy(update={"doing": what})
        return task_ids

    def wait(self, task_ids: Sequence[str], enough: int | None = None) -> None:
        """Wait until `enough` of them, or all, have an outcome.

        Raises: SearchError when somebody cancels the run.
        """
        distinct = set(task_ids)
        enough = len(distinct) if enough is None else enough
        while len(distinct - self.open.keys()) < enough:
            self._turn()
        self._beat()

    def settle(self, tasks: Sequence[Task], what: str, again: bool = False) -> list[Outcome]:
        """An outcome for each task, in order."""
        task_ids = self.send(tasks, what, again)
        self.wait(task_ids)
        return [self.outcome(task_id) for task_id in task_ids]

    def abandon(self) -> None:
        """Nobody waits any more for what is still open."""
        self.jobs.cancel()
        self.open.clear()

    def outcome(self, task_id: str) -> Outcome:
        outcome = self.store.outcome(task_id)
        if outcome is None:
            raise SearchError(f"{self.store.root}/tasks/{task_id}/outcome.json was there and is gone; start the search again")
        return outcome

    def _turn(self) -> None:
        if os.path.exists(self.store.root / CANCELLED):  # Path.exists raises where the filesystem has an error
            self.jobs.cancel()
            raise SearchError("cancelled; the same search command goes on with it")
        try:
            ended = self.jobs.poll()
        except SpentError as error:  # of a worker in this very process
            raise SearchError(f"{error}; start the search again, and it goes on with the other tasks") from error
        for task_id in list(self.open):
            outcome = self.store.outcome(task_id)
            if outcome is not None:
                self._arrive(task_id, outcome)
        again = []
        for job in ended:
            left = [task_id for task_id in job.task_ids if task_id in self.open]
            # A job that settled one task and then ended may have ended because of it, so the others lose no try. They are
            # alone in their next job: this happens only once a task.
            blamed = len(left) == len(job.task_ids)
            again += [task_id for task_id in left if self._lost(task_id, job.reason, blamed)]
        # Alone, so that a task that kills its job takes no other with it.
        self.jobs.submit([(task_id,) for task_id in again], alone=True)
        self._beat()

    def _arrive(self, task_id: str, outcome: Outcome) -> None:
        del self.open[task_id]
        place = f"{self._arrived()}/{len(self.wanted)}" if task_id in self.wanted else "late"
        self.progress.say(f"  {place} {_outcome_line(outcome)}")

    def _arrived(self) -> int:
        return len(self.wanted - self.open.keys())

    def _lost(self, task_id: str, reason: str, blamed: bool) -> bool:
        """Whether to send a task again whose job ended without an outcome of it. blamed: this costs the task a try."""
        # A network filesystem may not show a new file for a while; listing the folder refreshes it.
        door.patiently(lambda: os.listdir(self.store.root / "tasks" / task_id))
        outcome = self.store.outcome(task_id)
        if outcome is None:
            self.losses[task_id] += blamed
            left = self.retries + 1 - self.losses[task_id]
            self.progress.say(f"  {self.open[task_id].genome}: lost, {reason}; {f'{left} tries left' if left else 'given up'}")
            if left:
                return True
            # Written down, so that a resumed run sees the same end of this task.
            message = f"its job died {self.losses[task_id]} times without an outcome, at last: {reason}"
            outcome = self.store.settle(
                Outcome(task=self.open[task_id], failure=Failure(kind="lost", stage="job", message=message))
            )
        self._arrive(task_id, outcome)
        return False

    def _beat(self) -> None:
        """Record in the run folder that the driver is alive, and what it is doing."""
        jobs = dict(sorted(self.jobs.counts().items()))
        news = self.heartbeat.model_copy(update={"done": self._arrived(), "total": len(self.wanted), "jobs": jobs})
        if news != self.heartbeat or time.monotonic() - self.beaten > HEARTBEAT_SECONDS:
            last = self.store.read("driver.json", Heartbeat)
            if last is not None and not last.same_driver(news):
                # Where the filesystem has no locks, or after this process was held up for long.
                raise SearchError(
                    f"another driver has gone on with this run ({last.host}, process {last.pid}), so this one stops"
                )
            self.store.write("driver.json", news)
            self.heartbeat, self.beaten = news, time.monotonic()


def _bundles(tasks: Mapping[str, Task]) -> list[tuple[str, ...]]:
    """What goes to one process, one after another: tasks that share a master, so that its training is done once; and screens,
    which share the base model's activations, in the order in which they were asked for."""
    bundles: dict[str, list[str]] = {}
    screens = 0
    for task_id, task in tasks.items():
        if isinstance(task.study, Screen) and [step.operator for step in task.genome.steps] == ["carve"]:
            key = f"screens {screens // SCREENS}"
            screens += 1
        else:
            key = identity.master_key(task)
        bundles.setdefault(key, []).append(task_id)
    return [tuple(ids) for ids in bundles.values()]


def _outcome_line(outcome: Outcome) -> str:
    spent = f"({sum(outcome.seconds.values()):.0f} s)"
    if outcome.failure is not None:
        return f"{outcome.task.genome}: FAILED, {describe(outcome.failure)}"
    if isinstance(outcome.finding, Screening):
        found = [(Genome(deploy=each.deploy), each.divergence) for each in outcome.finding.deployed]
        others = "".join(f", {genome} {'failed' if value is None else f'{value:.4f}'}" for genome, value in found)
        return f"{outcome.task.genome}: divergence {outcome.finding.divergence:.4f}{others}  {spent}"
    if outcome.measurement is None:
        return f"{outcome.task.study.kind if outcome.task.study else ''} of the base model  {spent}"
    again = ", timed again" if outcome.task.repeat else ""
    return f"{outcome.task.genome}{again}: {figures(outcome.measurement)}  {spent}"
