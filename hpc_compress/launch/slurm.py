"""Runs tasks as Slurm arrays and follows every element. Knows sbatch's options and states; nothing of what a task is.

RUN/jobs/<name>/submission.json   what is about to be submitted under this job name, written before sbatch is called
RUN/jobs/<name>/sent.json         the job id that sbatch gave
RUN/jobs/<name>/ends.json         how its elements ended
RUN/jobs/<name>/...               Submitit's files and the logs

A driver that was killed at any instruction reads these and finds its jobs again, by their names where it has no id. An id
alone is not enough: a controller that lost its state gives out old ids again.

What squeue lists has not ended, whatever the accounting says of it: a preempted job, or one whose node failed, is waiting
there to run again. What squeue does not list has ended when the accounting has a final state of it and says so for
`settle_seconds`. What neither of them knows for `lost_seconds` is lost; what the accounting calls unfinished is not. A
command that fails says nothing; but when the accounting has failed for `accounting_seconds`, squeue alone decides.
"""

import contextlib
import re
import secrets
import shutil
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, PrivateAttr

from hpc_compress.config import ConfigError
from hpc_compress.launch import WORKER, Bundle, Ended, Jobs, Report, Work, packed
from hpc_compress.launch.commands import CommandError, Commands, Limits, RefusedError, Row, batch_lines, element_id
from hpc_compress.store import Store
from hpc_compress.types import Count, Record

T = TypeVar("T")
Pack = tuple[Bundle, ...]  # what one element of an array works off

UNFINISHED = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "RESIZING", "STOPPED", "SIGNALING"}
NODE_STATES = {"NODE_FAIL", "BOOT_FAIL"}
KILLED = {"9:0", "0:9", "137:0", "0:125"}  # how a job out of memory ends, where its state doesn't say so
BACK_OFF_SECONDS = (5.0, 300.0)  # after a refusal; doubled up to the second
HELD = ("launch failed requeued held", "JobHoldMaxRequeue")  # Slurm gave up: the job waits until somebody releases it
BAD_DEATHS, LAST_JOBS = 3, 10  # a node is bad when most of its last jobs died, of at least so many different tasks
LEAVING = {"COMPLETING", "CANCELLED"}  # how squeue shows a job that was cancelled, until its processes have ended


class Cluster(Record):
    """A site: what a job asks for there, and what it needs before Python starts."""

    partition: str | None = Field(default=None, description="null: the cluster's default")
    account: str | None = None
    qos: str | None = None
    timeout_min: int = Field(default=240, ge=1, description="time limit of a job, minutes")
    gpus_per_node: int = Field(default=1, ge=0, lt=1000, description="GPUs of a job, one process each; 0 for CPU nodes")
    gpu_type: str | None = Field(default=None, description="as the site's gres names it, such as a100")
    require_cuda: bool = Field(default=True, description="a process that was given a GPU and sees none ends at once")
    cpus_per_task: int = Field(default=8, ge=1, description="of each process")
    mem_gb: float | None = Field(
        default=32, gt=0, description="of each process; null: the site's default, for --mem is left out"
    )
    max_mem_gb: float | None = Field(default=None, gt=0, description="after out-of-memory; null: what a node has")
    modules: tuple[str, ...] = Field(default=(), description="loaded before Python starts, such as cuda/12.4")
    setup: tuple[str, ...] = Field(default=(), description="shell lines before Python starts")
    sbatch: dict[str, Any] = Field(default={}, description="any other option by its long name, such as {constraint: a100}")
    array_parallelism: int = Field(default=64, ge=1, description="elements of an array that run at a time (%)")

    @property
    def processes(self) -> int:
        return max(1, self.gpus_per_node)

    def mem_mb(self, gb: float | None) -> int | None:
        """Of a job whose processes get so many GB each; None where the site decides."""
        return None if gb is None else round(1024 * gb) * self.processes

    def request(self, mem_mb: int | None, exclude: Sequence[str]) -> dict[str, Any]:
        """What sbatch is asked for, by the long names of its options."""
        gres = ":".join(["gpu", *([self.gpu_type] if self.gpu_type else []), str(self.gpus_per_node)])
        options = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "time": self.timeout_min,
            "nodes": 1,
            "ntasks_per_node": self.processes,
            "gres": gres if self.gpus_per_node else None,
            "cpus_per_task": self.cpus_per_task,
            "mem": None if mem_mb is None else f"{mem_mb}M",  # sbatch takes whole numbers only
            "exclude": ",".join(exclude) or None,
        }
        return {key: value for key, value in options.items() if value is not None}

    def options(self, name: str, folder: Path, mem_mb: int | None, exclude: Sequence[str]) -> dict[str, Any]:
        """The same and the rest as Submitit takes them."""
        options: dict[str, Any] = {
            **self.request(mem_mb, exclude),
            "job_name": name,
            "array_parallelism": self.array_parallelism,
            "setup": batch_lines(folder, self.modules, self.setup),
            "additional_parameters": {"output": "/dev/null", "error": "/dev/null", **self.sbatch},
        }
        if self.processes > 1:
            # From Slurm 22.05 on a job's CPUs are not handed on to srun.
            options["srun_args"] = [f"--cpus-per-task={self.cpus_per_task}"]
        else:
            # A process of its own needs no step of its own, which costs a start; the signal then goes to the script,
            # whose place Python takes.
            options["use_srun"] = False
            options["additional_parameters"]["signal"] = "B:USR2@90"
        return options


class Submission(Record):
    """One array, as it was meant to be submitted."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")  # of the job: unique
    packs: tuple[Pack, ...]  # by array index
    mem_mb: int | None
    exclude: tuple[str, ...] = ()


class Sent(Record):
    job_id: str = Field(pattern=r"^[0-9]{1,18}$")


class End(Record):
    """How an element ended."""

    state: str
    exit_code: str = ""
    node: str = ""
    seconds: Count = 0  # summed over all requeues

    def __str__(self) -> str:
        return f"{self.state}" + (f" {self.exit_code}" if self.exit_code else "") + (f" on {self.node}" if self.node else "")


class Ends(Record):
    ends: dict[int, End] = Field(default={})  # by array index
    gpus: Count = 0  # of each element


class Slurm(Record):
    """Arrays on a cluster, one process and one GPU a task. The run folder must lie on a filesystem that the nodes share."""

    cluster: Cluster = Cluster()
    tasks_per_job: int = Field(default=1, ge=1, description="tasks that one process works off; its start takes 20 s or more")
    worker: str = Field(default=WORKER, description="dotted path of what brings tasks to outcomes")
    checkpoint_minutes: float = Field(default=5.0, gt=0, description="a longer training is saved this often, to go on from")
    poll_seconds: float = Field(default=5.0, gt=0, description="between two looks at the jobs")
    settle_seconds: float = Field(
        default=10.0, ge=0, description="seconds that a final state must persist before it is accepted"
    )
    lost_seconds: float = Field(default=120.0, ge=0, description="seconds after which a job that Slurm does not know is lost")
    accounting_seconds: float = Field(
        default=1800.0, ge=0, description="seconds without an answer from sacct, after which squeue alone decides"
    )
    _commands: Commands = PrivateAttr(default_factory=Commands)

    @contextmanager
    def open(self, root: Path, report: Report, say: Callable[[str], None]) -> Iterator[Jobs]:
        # Whatever ends the driver, its jobs go on, and the next driver finds them.
        yield Arrays(root, self, self._commands, say)


class Arrays:
    """The arrays of one run."""

    def __init__(self, root: Path, settings: Slurm, commands: Commands, say: Callable[[str], None]) -> None:
        if "%" in str(root):
            raise ConfigError(
                f"the run folder {root} has a % in its path, which Slurm reads as a pattern; choose another name="
            )
        self.store, self.settings, self.commands, self.say = Store(root), settings, commands, say
        cluster = settings.cluster
        self.accounting = _Accounting(commands, settings.accounting_seconds, say)
        self.limits: Limits = commands.limits(cluster.partition, cluster.account, cluster.qos)
        if self.limits.submitted == 0:
            raise ConfigError("Slurm admits no job of yours (MaxSubmitJobs=0); choose another cluster.account or cluster.qos")
        self.waiting: deque[Pack] = deque()
        self.chunk = self.limits.array_size
        self.delay_seconds, self.not_before = BACK_OFF_SECONDS[0], 0.0
        self.flying: dict[str, _Array] = {}  # by job name
        self.mem_mb: dict[str, int] = {}  # by task id, after out-of-memory
        self.nodes = _Nodes()
        self.crowd = 0  # elements of this user in the queue, as far as is known
        self.complaint = ""
        for submission in self.store.read_all("jobs/*/submission.json", Submission):
            array = _Array(self.store, submission, settings.cluster.gpus_per_node)
            for index, end in array.ends.items():
                self._learn(array, index, end)
            if array.open:
                self.flying[submission.name] = array
        if self.flying:
            say(f"{len(self.flying)} arrays of an earlier driver are looked after")

    # --- what whoever opened the run asks ---

    def submit(self, bundles: Sequence[Bundle], alone: bool = False) -> None:
        settings = self.settings
        self.waiting += packed(bundles, 1 if alone else settings.tasks_per_job * settings.cluster.processes)

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
            done = cancel(self.store, self.commands)
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
                self.say(f"Slurm does not answer, waiting: {error}")
            self.complaint = str(error)
            for array in self.flying.values():
                array.since.clear()  # patience begins anew: while Slurm was away, nothing could be seen
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
            # Never most of the nodes: if the others are down, Slurm lets the jobs wait and does not say why.
            most = (self.limits.nodes or 2) // 2
            bad_nodes = tuple(self.nodes.bad())[-most:] if most else ()
            array = _Array.new(
                self.store, Submission(name=name, packs=tuple(packs), mem_mb=mem_mb, exclude=bad_nodes), self.settings
            )
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
                    f"sbatch refused the jobs: {error}; mend the keys of cluster (hpc-compress doctor checks them)"
                )
            if error.kind == "never":  # perhaps since too many nodes are excluded, or no node has so much memory
                self.nodes = _Nodes()
                self.mem_mb.clear()
                return
        if error.kind == "full" and len(array.submission.packs) > 1:
            self.chunk = len(array.submission.packs) // 2
            return
        self.say(f"sbatch says {error}; trying again in {self.delay_seconds:.0f} s")
        self.not_before = self.commands.now() + self.delay_seconds
        self.delay_seconds = min(2 * self.delay_seconds, BACK_OFF_SECONDS[1])

    def _memory(self, pack: Pack) -> int | None:
        """Megabytes of one element; None where the site decides."""
        own = self.settings.cluster.mem_mb(self.settings.cluster.mem_gb)
        return None if own is None else max([own, *(self.mem_mb.get(task_id, 0) for bundle in pack for task_id in bundle)])

    def _options(self, array: "_Array") -> dict[str, Any]:
        submission = array.submission
        return self.settings.cluster.options(submission.name, array.folder, submission.mem_mb, submission.exclude)

    def _works(self, array: "_Array") -> list[Work]:
        settings = self.settings
        cluster, root, seconds = settings.cluster, str(self.store.root), 60 * settings.checkpoint_minutes
        cuda = cluster.require_cuda and cluster.gpus_per_node > 0
        return [Work(root, pack, settings.worker, seconds, shared=True, cuda=cuda) for pack in array.submission.packs]

    # --- looking ---

    def _look(self) -> list[Ended]:
        self.accounting.begin()
        queue = self.commands.squeue()
        self.crowd = len(queue)
        queued = {(row.name, row.index): row for row in queue}
        missing: list[tuple[_Array, int]] = []
        for array in self.flying.values():
            for index in list(array.open):
                row = queued.get((array.submission.name, index))
                if row is None:
                    missing.append((array, index))
                elif row.state == "PENDING" and row.reason.startswith(HELD):
                    with contextlib.suppress(CommandError):  # the next look tries again
                        self.commands.cancel([element_id(row.job_id, index, len(array.submission.packs))])
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
            self.commands.attach(array.folder, self._works(array), job_id, self.settings.cluster.timeout_min)

    def _missing(self, array: "_Array", index: int, rows: dict[tuple[str, int], list[Row]]) -> Ended | None:
        """Judge an element that squeue does not list."""
        now, lives = self.commands.now(), rows.get((array.submission.name, index), [])
        last = lives[-1] if lives else None
        final = last.state if last and last.state not in UNFINISHED else None
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
            # It never reached Slurm; or it did, and then its outcomes show it.
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
            job = element_id(row.job_id, index, len(array.submission.packs))
            self.say(
                f"sacct calls job {job} {row.state}, but squeue does not list it; waiting for it. If `scontrol show job {job}` "
                f"does not know it either, stop this driver, delete {array.folder} and start the same search again"
            )

    def _learn(self, array: "_Array", index: int, end: End) -> None:
        """More memory after out-of-memory, other nodes after a node failed or when jobs keep dying there."""
        hungry = end.state == "OUT_OF_MEMORY" or (end.state == "FAILED" and end.exit_code in KILLED)
        task_ids = sum(array.submission.packs[index], ())
        if end.state in NODE_STATES:
            self.nodes.failed(end.node)
        elif end.state == "COMPLETED" or (end.state == "FAILED" and not hungry):
            self.nodes.job_ended(end.node, task_ids, died=end.state == "FAILED")
        mem_mb = array.submission.mem_mb
        if hungry and mem_mb is not None:
            most = self.settings.cluster.max_mem_gb
            most_mb = self.limits.node_memory_mb if most is None else self.settings.cluster.mem_mb(most)
            more = min(2 * mem_mb, most_mb or 2 * mem_mb)
            self.mem_mb |= {task_id: max(more, self.mem_mb.get(task_id, 0)) for task_id in task_ids}


class _Accounting:
    """What sacct says of this run's jobs, and how long it has said nothing."""

    def __init__(self, commands: Commands, patience_seconds: float, say: Callable[[str], None]) -> None:
        self.commands, self.patience_seconds, self.say = commands, patience_seconds, say
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
        for row in self._ask(lambda: self.commands.sacct(sorted(job_ids)), nothing) if job_ids else nothing:
            rows.setdefault((row.name, row.index), []).append(row)
        return rows

    def job_id(self, name: str) -> str | None:
        return self._ask(lambda: self.commands.accounted(name), None)

    def _ask(self, command: Callable[[], T], nothing: T) -> T:
        """Raises: CommandError while sacct fails, until it has failed for so long that `nothing` is taken for its answer."""
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
                    f"sacct has not answered for {self.patience_seconds / 60:.0f} min ({error}): from now on a job that squeue "
                    "does not list counts as ended, and why it ended is not known"
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

    def __init__(self, store: Store, submission: Submission, gpus: int) -> None:
        self.store, self.submission = store, submission
        sent = store.read(f"{self._name}/sent.json", Sent)
        self.job_id = sent.job_id if sent else None
        ends = store.read(f"{self._name}/ends.json", Ends) or Ends(gpus=gpus)
        self.ends, self.gpus, self.recorded = dict(ends.ends), ends.gpus, len(ends.ends)
        self.open = {index: pack for index, pack in enumerate(submission.packs) if index not in self.ends}
        self.states: dict[int, str] = dict.fromkeys(self.open, "submitted")
        self.since: dict[int, float] = {}  # by clock, of a state that may be the last one
        self.puzzling = False  # whether the user was told that squeue and sacct disagree

    @classmethod
    def new(cls, store: Store, submission: Submission, settings: Slurm) -> "_Array":
        store.write(f"jobs/{submission.name}/submission.json", submission)
        return cls(store, submission, settings.cluster.gpus_per_node)

    @property
    def _name(self) -> str:
        return f"jobs/{self.submission.name}"

    @property
    def folder(self) -> Path:
        return self.store.root / self._name

    def sent(self, job_id: str) -> None:
        self.job_id = job_id
        self.store.write(f"{self._name}/sent.json", Sent(job_id=job_id))

    def seen(self, index: int, row: Row) -> None:
        """It is in the queue, so nothing that was said of it before holds."""
        waits = row.state == "PENDING" and row.reason not in ("", "None")
        self.states[index] = f"pending ({row.reason})" if waits else row.state.lower()
        self.since.pop(index, None)

    def record(self) -> None:
        for index in self.ends:
            self.states.pop(index, None)
        if len(self.ends) > self.recorded:
            self.store.write(f"{self._name}/ends.json", Ends(ends=self.ends, gpus=self.gpus))
            self.recorded = len(self.ends)


@dataclass(frozen=True)
class Cancelled:
    """What came of cancelling a run's jobs."""

    cancelled: int  # elements
    left: int  # elements that go on
    trouble: str  # what scancel said


def cancel(store: Store, commands: Commands, own_job: tuple[str, str | None] | None = None) -> Cancelled:
    """Cancel every job of a run that Slurm still knows, and no other.

    own_job: id and name of the job that the driver lives in; `17_3` if it is one element of an array, whose others are not
    the run's.

    Raises: CommandError when squeue fails.
    """
    names = {submission.name for submission in store.read_all("jobs/*/submission.json", Submission)}
    own_id, own_name = own_job or ("", None)

    def targets() -> dict[tuple[str, int], str]:
        """What scancel must be given, by job id and index of the elements that have not ended."""
        found = {}
        for row in commands.squeue():
            own = row.name == own_name and own_id in (f"{row.job_id}_{row.index}", row.job_id if row.index == 0 else None)
            if row.state not in LEAVING and (own or row.name in names):
                found[row.job_id, row.index] = own_id if own else row.job_id
        return found

    before, trouble = targets(), ""
    if before:
        try:
            commands.cancel(sorted(set(before.values())))
        except CommandError as error:
            trouble = str(error)
    # Slurm's list is the truth: scancel may fail for one job and end the next one.
    left = len(before.keys() & targets().keys()) if before else 0
    return Cancelled(len(before) - left, left, trouble or "scancel reports no error")


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", name)[:30].strip("-") or "run"
