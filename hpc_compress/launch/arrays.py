"""Runs tasks as job arrays of a batch system and follows every element. Knows no batch system, and nothing of what a task is.

RUN/jobs/<name>/submission.json   what is about to be submitted under this job name, written before it is submitted
RUN/jobs/<name>/sent.json         the job id that it got
RUN/jobs/<name>/ends.json         how its elements ended
RUN/jobs/<name>/...               what its elements run, and the logs

A driver that was killed at any instruction reads these and finds its jobs again, by their names where it has no id. An id
alone is not enough: a server that lost its state gives out old ids again.

What the queue lists has not ended, whatever the accounting says of it: a preempted job, or one whose node failed, is waiting
there to run again. What the queue does not list has ended when the accounting has a final state of it and says so for
`settle_seconds`. What neither of them knows for `lost_seconds` is lost; what the accounting calls unfinished is not. A
command that fails says nothing; but when the accounting has failed for `accounting_seconds`, the queue alone decides.
"""

import contextlib
import pkgutil
import re
import secrets
import shutil
from abc import abstractmethod
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import Field, PrivateAttr

from hpc_compress.config import ConfigError
from hpc_compress.launch import SCHEDULERS, WORKER, Ended, Jobs, OwnJob, Ranks, Work, packed
from hpc_compress.launch.scheduler import Check, CommandError, Limits, Names, Options, RefusedError, Row, Scheduler, States
from hpc_compress.records import Bundle, End, Ends, Heartbeat, Pack, Sent, Submission
from hpc_compress.store import Store
from hpc_compress.types import OnProgress, Record

T = TypeVar("T")

BACK_OFF_SECONDS = (5.0, 300.0)  # after a refusal; doubled up to the second
BAD_DEATHS, LAST_JOBS = 3, 10  # a node is bad when most of its last jobs died, of at least so many different tasks


class ArrayLauncher(Record):
    """Tasks in job arrays: what is the same for every batch system, and what the module of each one must say."""

    tasks_per_job: int = Field(default=1, ge=1, description="tasks that one process works off; its start takes 20 s or more")
    worker: str = Field(default=WORKER, description="dotted path of what brings tasks to outcomes")
    checkpoint_minutes: float = Field(default=5.0, gt=0, description="a longer training is saved this often, to go on from")
    poll_seconds: float = Field(default=5.0, gt=0, description="between two looks at the jobs")
    settle_seconds: float = Field(
        default=10.0, ge=0, description="seconds that a final state must persist before it is accepted"
    )
    lost_seconds: float = Field(default=120.0, ge=0, description="seconds after which a job that nobody knows is lost")
    accounting_seconds: float = Field(
        default=1800.0, ge=0, description="seconds without an answer from the accounting, after which the queue alone decides"
    )
    _commands: Any = PrivateAttr()

    names: ClassVar[Names]
    states: ClassVar[States]
    ranks: ClassVar[Ranks | None] = None  # how the processes of a job are told apart; None: it has one
    recorded_as: ClassVar[str | None]  # in the records of a run

    @contextmanager
    def open(self, root: Path, report: OnProgress, say: Callable[[str], None]) -> Iterator[Jobs]:
        # Whatever ends the driver, its jobs go on, and the next driver finds them.
        yield Arrays(root, self, say)

    @property
    def commands(self) -> Scheduler:
        return self._commands

    @staticmethod
    @abstractmethod
    def own_job() -> OwnJob | None:
        """The job that this process lives in; None if it lives in none of this system."""

    @staticmethod
    @abstractmethod
    def element_id(job_id: str, index: int, size: int) -> str:
        """How the system calls one element of an array of `size`; a single one is a job that is no array."""

    @abstractmethod
    def check_root(self, root: Path) -> None:
        """Raises: ConfigError for a run folder that the system can't work with."""

    @abstractmethod
    def limits(self) -> Limits:
        """What the cluster admits of this launcher's jobs."""

    @property
    @abstractmethod
    def gpus(self) -> int:
        """Of each job."""

    @property
    def processes(self) -> int:
        """Of each job."""
        return 1

    @property
    @abstractmethod
    def needs_gpu(self) -> bool:
        """Whether each process gets a GPU, and ends at once if it sees none."""

    @property
    @abstractmethod
    def mem_mb(self) -> int | None:
        """Of each job; None where the site decides."""

    @property
    @abstractmethod
    def max_mem_mb(self) -> int | None:
        """Of each job, after out-of-memory; None: what the largest node has."""

    @abstractmethod
    def options(self, name: str, folder: Path, mem_mb: int | None, exclude: Sequence[str]) -> Options:
        """What a job of this name asks for."""

    @abstractmethod
    def options_to_look(self, name: str, folder: Path) -> Options:
        """The same for one process that ends within ten minutes."""

    @abstractmethod
    def checks(self) -> Iterator[Check]:
        """What the doctor can find out without a job."""


class Arrays:
    """The arrays of one run."""

    def __init__(self, root: Path, settings: ArrayLauncher, say: Callable[[str], None]) -> None:
        settings.check_root(root)
        self.store, self.settings, self.commands, self.say = Store(root), settings, settings.commands, say
        self.names, self.states = settings.names, settings.states
        self.accounting = _Accounting(settings, say)
        self.limits = settings.limits()
        if self.limits.submitted == 0:
            raise ConfigError(
                f"{self.names.system} admits no job of yours; choose another account, QOS or queue by the keys of "
                f"{self.names.keys}"
            )
        self.waiting: deque[Pack] = deque()
        self.chunk = self.limits.array_size
        self.delay_seconds, self.not_before = BACK_OFF_SECONDS[0], 0.0
        self.flying: dict[str, _Array] = {}  # by job name
        self.mem_mb: dict[str, int] = {}  # by task id, after out-of-memory
        self.nodes = _Nodes()
        self.crowd = 0  # elements of this user in the queue, as far as is known
        self.complaint = ""
        for submission in _submissions(self.store, settings):
            array = _Array(self.store, submission, settings)
            for index, end in array.ends.items():
                self._learn(array, index, end)
            if array.open:
                self.flying[submission.name] = array
        if self.flying:
            say(f"{len(self.flying)} arrays of an earlier driver are looked after")

    # --- what whoever opened the run asks ---

    def submit(self, bundles: Sequence[Bundle], alone: bool = False) -> None:
        settings = self.settings
        self.waiting += packed(bundles, 1 if alone else settings.tasks_per_job * settings.processes)

    def in_flight(self) -> set[str]:
        packs = [*self.waiting, *(pack for array in self.flying.values() for pack in array.open.values())]
        return {task_id for pack in packs for bundle in pack for task_id in bundle}

    def counts(self) -> Counter[str]:
        counts = Counter(state for array in self.flying.values() for state in array.states.values())
        return counts + Counter({"not submitted yet": len(self.waiting)})

    def cancel(self) -> None:
        self.waiting.clear()
        self.flying.clear()
        try:
            done = cancel(self.store, self.settings)
        except CommandError as error:
            self.say(f"the jobs could not be cancelled ({error}); `hpc-compress cancel` tries again")
        else:
            if done.left:
                self.say(f"{done.left} jobs could not be cancelled ({done.trouble}); `hpc-compress cancel` tries again")

    def poll(self) -> list[Ended]:
        self._send()
        self.commands.sleep(self.settings.poll_seconds)
        try:
            return self._look()
        except CommandError as error:
            if str(error) != self.complaint:  # once, and again when it is another one
                self.say(f"{self.names.system} does not answer, waiting: {error}")
            self.complaint = str(error)
            for array in self.flying.values():
                array.since.clear()  # patience begins anew: while the system was away, nothing could be seen
            return []

    # --- sending ---

    def _send(self) -> None:
        while self.waiting and self.commands.now() >= self.not_before:
            room = self.chunk if self.limits.submitted is None else min(self.chunk, self.limits.submitted - self.crowd)
            if room < 1:
                return
            mem_mb = self._memory(self.waiting[0])
            packs: list[Pack] = []
            while self.waiting and len(packs) < room and self._memory(self.waiting[0]) == mem_mb:
                packs.append(self.waiting.popleft())
            name = f"{_slug(self.store.root.name)}-{secrets.token_hex(4)}"
            scheduler = self.settings.recorded_as
            submission = Submission(name=name, packs=tuple(packs), mem_mb=mem_mb, exclude=self._exclude(), scheduler=scheduler)
            array = _Array.new(self.store, submission, self.settings)
            try:
                job_id = self.commands.submit(array.folder, self._works(array), self._options(array))
            except RefusedError as error:
                self._refused(array, error)
            else:
                array.sent(job_id)
                self.flying[name] = array
                self.crowd += len(packs)
                self.chunk, self.delay_seconds = min(2 * self.chunk, self.limits.array_size), BACK_OFF_SECONDS[0]

    def _refused(self, array: "_Array", error: RefusedError) -> None:
        """Try again later, try fewer elements, or give up."""
        if error.kind == "busy":
            # It may have taken them all the same: they are looked for by name, and sent again when nobody knows them.
            self.flying[array.submission.name] = array
        else:
            self.waiting.extendleft(reversed(array.submission.packs))
            shutil.rmtree(array.folder)
            if error.kind == "never" and not (array.submission.exclude or self.mem_mb):
                raise ConfigError(
                    f"{self.names.submit} refused the jobs: {error}; mend the keys of {self.names.keys} "
                    "(hpc-compress doctor checks them)"
                )
            if error.kind == "never":  # perhaps since too many nodes are excluded, or no node has so much memory
                self.nodes = _Nodes()
                self.mem_mb.clear()
                return
        if error.kind == "full" and len(array.submission.packs) > 1:
            self.chunk = len(array.submission.packs) // 2
            return
        self.say(f"{self.names.submit} says {error}; trying again in {self.delay_seconds:.0f} s")
        self.not_before = self.commands.now() + self.delay_seconds
        self.delay_seconds = min(2 * self.delay_seconds, BACK_OFF_SECONDS[1])

    def _memory(self, pack: Pack) -> int | None:
        """Megabytes of one element; None where the site decides."""
        own = self.settings.mem_mb
        return None if own is None else max([own, *(self.mem_mb.get(task_id, 0) for bundle in pack for task_id in bundle)])

    def _exclude(self) -> tuple[str, ...]:
        # Never most of the nodes: if the others are down, the jobs wait and nobody says why.
        most = (self.limits.nodes or 2) // 2
        return tuple(self.nodes.bad())[-most:] if most and self.limits.excludes else ()

    def _options(self, array: "_Array") -> Options:
        submission = array.submission
        return self.settings.options(submission.name, array.folder, submission.mem_mb, submission.exclude)

    def _works(self, array: "_Array") -> list[Work]:
        settings, root, seconds = self.settings, str(self.store.root), 60 * self.settings.checkpoint_minutes
        return [
            Work(root, pack, settings.worker, seconds, ranks=settings.ranks, cuda=settings.needs_gpu)
            for pack in array.submission.packs
        ]

    # --- looking ---

    def _look(self) -> list[Ended]:
        self.accounting.begin()
        queue = self.commands.queue()
        self.crowd = len(queue)
        queued = {(row.name, row.index): row for row in queue}
        missing: list[tuple[_Array, int]] = []
        for array in self.flying.values():
            for index in list(array.open):
                row = queued.get((array.submission.name, index))
                if row is None:
                    missing.append((array, index))
                elif row.state == self.states.waiting and row.reason.startswith(self.states.held):
                    with contextlib.suppress(CommandError):  # the next look tries again
                        self.commands.cancel([array.element_id(row.job_id, index)])
                    array.states[index] = f"held ({row.reason})"
                else:
                    array.seen(index, row)
            if array.job_id is None:
                self._attach(array, next((row.job_id for row in queue if row.name == array.submission.name), None))
        rows = self.accounting.rows({array.job_id for array, _ in missing if array.job_id is not None})
        self.complaint = ""
        ended = [found for array, index in missing if (found := self._missing(array, index, rows))]
        for array in {array.submission.name: array for array, _ in missing}.values():
            array.record()
        self.flying = {name: array for name, array in self.flying.items() if array.open}
        return ended

    def _attach(self, array: "_Array", job_id: str | None) -> None:
        """Give a submission of which only the name is known its job, if there is one."""
        job_id = job_id or self.accounting.job_id(array.submission.name)
        if job_id is not None:
            array.sent(job_id)
            self.commands.attach(array.folder, self._works(array), job_id, self._options(array))

    def _missing(self, array: "_Array", index: int, rows: dict[tuple[str, int], list[Row]]) -> Ended | None:
        """Judge an element that the queue does not list."""
        now, lives = self.commands.now(), rows.get((array.submission.name, index), [])
        last = lives[-1] if lives else None
        final = last.state if last and last.state not in self.states.unfinished else None
        state = last.state if last else "unknown"
        if array.states.get(index) != state:
            array.states[index], array.since[index] = state, now
        seconds = now - array.since.setdefault(index, now)
        if last and not final:
            if seconds >= self.settings.accounting_seconds:
                self._puzzled(array, index, last)
            return None
        if seconds < (self.settings.settle_seconds if final else self.settings.lost_seconds):
            return None
        pack = array.open.pop(index)
        if final is None and array.job_id is None:
            # It was never taken; or it was, and then its outcomes show it.
            open_bundles = tuple(ids for ids in pack if any(self.store.outcome(task_id) is None for task_id in ids))
            self.waiting.extend([open_bundles] if open_bundles else [])
            array.ends[index] = End(state="NEVER_SUBMITTED")
            return None
        end = End(
            state=final or "LOST",
            exit_code=last.exit_code if last else "",
            node=last.node if last else "",
            seconds=sum(row.seconds for row in lives),
        )
        array.ends[index] = end
        for row in lives:
            self._learn(array, index, End(state=row.state, exit_code=row.exit_code, node=row.node))
        return Ended(sum(pack, ()), f"{end}; logs: {array.folder}/*_{index}_*, batch-{index}.log")

    def _puzzled(self, array: "_Array", index: int, row: Row) -> None:
        """Tell the user, once an array, of an element that only the accounting knows."""
        if not array.puzzling:
            array.puzzling = True
            job, names = array.element_id(row.job_id, index), self.names
            self.say(
                f"{names.accounting} calls job {job} {row.state}, but {names.queue} does not list it; waiting for it. If "
                f"`{names.show.format(job=job)}` does not know it either, stop this driver, delete {array.folder} and start "
                "the same search again"
            )

    def _learn(self, array: "_Array", index: int, end: End) -> None:
        """More memory after out-of-memory, other nodes after a node failed or when jobs keep dying there."""
        states = self.states
        hungry = end.state in states.of_memory or (end.state == states.failed and end.exit_code in states.killed)
        task_ids = sum(array.submission.packs[index], ())
        if end.state in states.of_node:
            self.nodes.failed(end.node)
        elif end.state == states.completed or (end.state == states.failed and not hungry):
            self.nodes.job_ended(end.node, task_ids, died=end.state == states.failed)
        mem_mb = array.submission.mem_mb
        if hungry and mem_mb is not None:
            most_mb = self.settings.max_mem_mb or self.limits.node_memory_mb
            more = min(2 * mem_mb, most_mb or 2 * mem_mb)
            self.mem_mb |= {task_id: max(more, self.mem_mb.get(task_id, 0)) for task_id in task_ids}


class _Accounting:
    """What the accounting says of this run's jobs, and how long it has said nothing."""

    def __init__(self, settings: ArrayLauncher, say: Callable[[str], None]) -> None:
        self.commands, self.names, self.say = settings.commands, settings.names, say
        self.patience_seconds = settings.accounting_seconds
        self.mute_since: float | None = None
        self.given_up = False
        self.asked = False  # in the look at the jobs that is under way

    def begin(self) -> None:
        """A new look at the jobs begins. Silence is counted from look to look, as long as each of them asks."""
        if not self.asked and not self.given_up:
            self.mute_since = None
        self.asked = False

    def rows(self, job_ids: set[str]) -> dict[tuple[str, int], list[Row]]:
        """By job name and index, older before newer."""
        rows: dict[tuple[str, int], list[Row]] = {}
        nothing: list[Row] = []
        for row in self._ask(lambda: self.commands.accounting(sorted(job_ids)), nothing) if job_ids else nothing:
            rows.setdefault((row.name, row.index), []).append(row)
        return rows

    def job_id(self, name: str) -> str | None:
        return self._ask(lambda: self.commands.accounted(name), None)

    def _ask(self, command: Callable[[], T], nothing: T) -> T:
        """What a command answers; `nothing` once the accounting has failed for long enough. Raises: CommandError until then."""
        self.asked = True
        try:
            answer = command()
        except CommandError as error:
            now = self.commands.now()
            self.mute_since = now if self.mute_since is None else self.mute_since
            if now - self.mute_since < self.patience_seconds:
                raise
            if not self.given_up:
                self.say(
                    f"{self.names.accounting} has not answered for {self.patience_seconds / 60:.0f} min ({error}): from now "
                    f"on a job that {self.names.queue} does not list counts as ended, and why it ended is not known"
                )
            self.given_up = True
            return nothing
        self.mute_since, self.given_up = None, False
        return answer


class _Nodes:
    """Which nodes to avoid: those that failed, and those on which jobs of this run keep dying.

    A node is judged by the last jobs that ended there. A death counts against it while the job's tasks have died nowhere
    else: a task that dies on two nodes is to blame itself.
    """

    def __init__(self) -> None:
        self.gone: dict[str, None] = {}  # that failed, the last one last
        self.ended: defaultdict[str, deque[tuple[Bundle, bool]]] = defaultdict(lambda: deque(maxlen=LAST_JOBS))  # and died
        self.places: defaultdict[str, set[str]] = defaultdict(set)  # by task: the nodes on which jobs of it died

    def failed(self, node: str) -> None:
        if node:
            self.gone[node] = self.gone.pop(node, None)

    def job_ended(self, node: str, task_ids: Bundle, died: bool) -> None:
        if node:
            self.ended[node].append((task_ids, died))
            for task_id in task_ids if died else ():
                self.places[task_id].add(node)

    def bad(self) -> list[str]:
        """Nodes to avoid, most certain last."""
        return [*(node for node in self.ended if node not in self.gone and self._deadly(node)), *self.gone]

    def _deadly(self, node: str) -> bool:
        """Whether most of the last jobs there died, of several tasks."""
        jobs = self.ended[node]
        held_against = [ids for ids, died in jobs if died and all(self.places[task_id] == {node} for task_id in ids)]
        counted: set[str] = set()
        distinct = 0
        for task_ids in held_against:
            distinct += counted.isdisjoint(task_ids)
            counted.update(task_ids)
        return distinct >= BAD_DEATHS and 2 * len(held_against) > len(jobs)


class _Array:
    """One submission and what is known of its elements."""

    def __init__(self, store: Store, submission: Submission, settings: ArrayLauncher) -> None:
        self.store, self.submission, self.settings = store, submission, settings
        sent = store.read(f"{self._name}/sent.json", Sent)
        self.job_id = sent.job_id if sent else None
        ends = store.read(f"{self._name}/ends.json", Ends) or Ends(gpus=settings.gpus)
        self.ends, self.gpus, self.recorded = dict(ends.ends), ends.gpus, len(ends.ends)
        self.open = {index: pack for index, pack in enumerate(submission.packs) if index not in self.ends}
        self.states: dict[int, str] = dict.fromkeys(self.open, "submitted")
        self.since: dict[int, float] = {}  # by clock, of a state that may be the last one
        self.puzzling = False  # whether the user was told that queue and accounting disagree

    @classmethod
    def new(cls, store: Store, submission: Submission, settings: ArrayLauncher) -> "_Array":
        store.write(f"jobs/{submission.name}/submission.json", submission)
        return cls(store, submission, settings)

    @property
    def _name(self) -> str:
        return f"jobs/{self.submission.name}"

    @property
    def folder(self) -> Path:
        return self.store.root / self._name

    def element_id(self, job_id: str, index: int) -> str:
        return self.settings.element_id(job_id, index, len(self.submission.packs))

    def sent(self, job_id: str) -> None:
        self.job_id = job_id
        self.store.write(f"{self._name}/sent.json", Sent(job_id=job_id))

    def seen(self, index: int, row: Row) -> None:
        """It is in the queue, so nothing that was said of it before holds."""
        waits = row.state == self.settings.states.waiting and row.reason not in ("", "None")
        self.states[index] = f"{row.state.lower()} ({row.reason})" if waits else row.state.lower()
        self.since.pop(index, None)

    def record(self) -> None:
        for index in self.ends:
            self.states.pop(index, None)
        if len(self.ends) > self.recorded:
            self.store.write(f"{self._name}/ends.json", Ends(ends=self.ends, gpus=self.gpus))
            self.recorded = len(self.ends)


# --- cancelling ---


@dataclass(frozen=True)
class Cancelled:
    """What came of cancelling a run's jobs."""

    cancelled: int  # elements
    left: int  # elements that go on
    trouble: str  # what the command said


def cancel_all(store: Store, driver: Heartbeat | None) -> list[Cancelled]:
    """Cancel the jobs of a run, and the one that its driver lives in, on every system that got some.

    Raises: CommandError when a system does not say what is in its queue.
    """
    done = []
    for path in SCHEDULERS.values():
        launcher: ArrayLauncher = pkgutil.resolve_name(path)()
        own_job = None
        if driver and driver.job_id and driver.scheduler == launcher.recorded_as:
            own_job = (driver.job_id, driver.job_name)
        if own_job or _submissions(store, launcher):
            done.append(cancel(store, launcher, own_job))
    return done


def cancel(store: Store, launcher: ArrayLauncher, own_job: tuple[str, str | None] | None = None) -> Cancelled:
    """Cancel every job of a run that is still in the queue, and no other.

    own_job: id and name of the job that the driver lives in. The id may be that of one element of an array, whose others are
    not the run's.

    Raises: CommandError when the queue can't be read.
    """
    names = {submission.name for submission in _submissions(store, launcher)}
    own_id, own_name = own_job or ("", None)

    def targets() -> dict[tuple[str, int], str]:
        """What must be cancelled, by job id and index of the elements that have not ended."""
        found = {}
        for row in launcher.commands.queue():
            ids = (launcher.element_id(row.job_id, row.index, 2), row.job_id if row.index == 0 else None)
            own = row.name == own_name and own_id in ids
            if row.state not in launcher.states.leaving and (own or row.name in names):
                found[row.job_id, row.index] = own_id if own else row.job_id
        return found

    before, trouble = targets(), ""
    if before:
        try:
            launcher.commands.cancel(sorted(set(before.values())))
        except CommandError as error:
            trouble = str(error)
    # The queue is the truth: cancelling may fail for one job and end the next one.
    left = len(before.keys() & targets().keys()) if before else 0
    return Cancelled(len(before) - left, left, trouble or "the command reports no error")


def _submissions(store: Store, launcher: ArrayLauncher) -> list[Submission]:
    """Those of a run that this system got."""
    found = store.read_all("jobs/*/submission.json", Submission)
    return [submission for submission in found if submission.scheduler == launcher.recorded_as]


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", name)[:30].strip("-") or "run"
