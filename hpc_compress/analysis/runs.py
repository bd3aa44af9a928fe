"""Reads run folders, as data from a stranger: damaged files are named and the rest is read. Imports nothing that they name."""

import glob
import itertools
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field

from hpc_compress import door, identity
from hpc_compress.config import ConfigError
from hpc_compress.records import Ends, Generation, Heartbeat, Plan, Result, Submission
from hpc_compress.search import elsewhere
from hpc_compress.search.elsewhere import Elsewhere
from hpc_compress.search.objective import with_timing
from hpc_compress.store import write_atomically
from hpc_compress.types import Candidate, Failure, Genome, Measurement, Outcome, Record, Score, Screening, Split, Surveyed

R = TypeVar("R", bound=Record)
SEEN = "seen.json"
SEEN_FROM = 200  # outcomes read anew that are worth writing it
Stamp = tuple[int, int]  # of a file: time of its last change in ns, bytes

log = logging.getLogger(__name__)


class Seen(Record):
    """An outcome without its task: what tables and the status need of it."""

    stamp: Stamp  # of outcome.json
    split: Split
    probe: bool  # on a few sentences only
    genome: str
    steps: int
    deploy: str
    is_base: bool  # a measurement of the base model, and no study of it
    report_id: str  # of the task that measures the same genome on the report split
    repeats: str | None = None  # the task whose model this one timed again
    # What earlier versions did not know is left out of the JSON where it is missing.
    study: Literal["survey", "screen", "profile"] | None = Field(default=None, exclude_if=lambda study: study is None)
    candidate: str | None = Field(default=None, exclude_if=lambda id: id is None)  # of a study: the task without it
    divergence: Score | None = Field(default=None, exclude_if=lambda number: number is None)  # of a screen
    measurement: Measurement | None
    failure: Failure | None  # without its traceback
    seconds: float
    joules: float | None = Field(default=None, exclude_if=lambda joules: joules is None)

    @classmethod
    def of(cls, outcome: Outcome, stamp: Stamp, report_id: str) -> "Seen":
        task = outcome.task
        failure = outcome.failure and outcome.failure.model_copy(update={"traceback": ""})
        deploy = " > ".join(str(step.params.get("scheme", step.operator)) for step in task.genome.deploy)
        return cls(
            stamp=stamp,
            split=task.split,
            probe=task.limit is not None,
            genome=str(task.genome),
            steps=len(task.genome.steps),
            deploy=deploy or "fp32",
            is_base=task.genome == Genome() and task.study is None,
            report_id=report_id,
            repeats=identity.task_id(task.model_copy(update={"repeat": 0})) if task.repeat else None,
            study=task.study and task.study.kind,
            candidate=identity.task_id(task.model_copy(update={"study": None})) if task.study else None,
            divergence=outcome.finding.divergence if isinstance(outcome.finding, Screening) else None,
            measurement=outcome.measurement,
            failure=failure,
            seconds=sum(outcome.seconds.values()),
            joules=outcome.joules,
        )


class SeenFile(Record):
    """RUN/seen.json. An entry counts only while its outcome.json has the same stamp."""

    seen: dict[str, Seen]  # by task id


class Outcomes(Mapping[str, Outcome]):
    """Outcomes by task id, each read when it is asked for."""

    def __init__(self, root: Path, task_ids: Iterable[str]) -> None:
        self._root, self._ids = root, dict.fromkeys(task_ids)

    def __getitem__(self, task_id: str) -> Outcome:
        found = _outcome(self._root, task_id) if task_id in self._ids else None
        if found is None:
            raise KeyError(task_id)
        return found[0]

    def __contains__(self, task_id: object) -> bool:
        return task_id in self._ids

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)


@dataclass(frozen=True)
class Run:
    """One run folder, read."""

    root: Path
    plan: Plan
    generations: tuple[Generation, ...]
    seen: dict[str, Seen]  # settled tasks by id; the probe's are left out. With the times of the device that `on` has named
    timed: dict[str, Seen]  # the same with the times that were measured
    views: tuple[Elsewhere | None, ...]  # how each device that the user gave sees a model, as in `search.elsewhere.views`
    result: Result | None  # None while the search goes on
    heartbeat: Heartbeat | None
    jobs: tuple[tuple[Submission, Ends], ...]
    tasks: int  # described, settled or not
    settled: int
    damage: tuple[str, ...]  # what is missing or can't be used, and why

    @property
    def outcomes(self) -> Outcomes:
        return Outcomes(self.root, self.seen)

    def on(self, device: int) -> "Run":
        """The run as one of its devices sees it: times are as measured, or as predicted. A run is read as its first one does.

        Raises: DamageError for an outcome that can't be read any more.
        """
        view = self.views[device]
        if view is None:
            return replace(self, seen=self.timed)
        seen = dict(self.timed)
        for task_id, item in seen.items():
            if item.measurement:
                candidate = Candidate(id=task_id, genome=self.outcomes[task_id].task.genome, measurement=item.measurement)
                seen[task_id] = item.model_copy(update={"measurement": view.measured(candidate).measurement})
        return replace(self, seen=seen)

    @property
    def best(self) -> str | None:
        """The id of the fittest candidate so far; None before the first generation."""
        if self.result is not None:
            return self.result.best
        return self.generations[-1].population[0] if self.generations else None

    @property
    def base_id(self) -> str:
        """Raises: ConfigError when the base model has no outcome."""
        for task_id, seen in self.seen.items():
            if seen.is_base and seen.split == "search":
                return task_id
        raise ConfigError(f"{self.root} has no measurement of the base model yet; start its search again")

    @property
    def base(self) -> Measurement | None:
        """The base model's measurement on the search split; None where there is none."""
        return next((seen.measurement for seen in self.seen.values() if seen.is_base and seen.split == "search"), None)

    @property
    def told(self) -> dict[str, int]:
        """Tasks of candidates that a selection has looked at, in this order, and the generation in which it did."""
        told: dict[str, int] = {}
        for generation in self.generations:
            for task_id in generation.told:
                told.setdefault(task_id, generation.number)
        return told

    def candidate_of(self, task_id: str) -> str:
        """The id of the candidate that a task is about: that of the task that measures it."""
        seen = self.seen.get(task_id)
        return (seen and (seen.candidate or seen.repeats)) or task_id

    def report_of(self, candidate: str) -> Outcome | None:
        """The outcome of the same genome on the report split."""
        return self.outcomes.get(self.seen[candidate].report_id)

    def damage_lines(self, most: int = 10) -> list[str]:
        """For people: what is missing or damaged, and what becomes of the rest."""
        more = [f"{len(self.damage) - most} more files are missing or damaged"] if len(self.damage) > most else []
        return [f"{line}; the rest is used" for line in [*self.damage[:most], *more]]


class Reader:
    """Reads one run folder, again and again: only what has changed since the last time.

    An outcome that holds a measurement never changes, so its file is not looked at again.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).absolute()
        self._files: dict[str, tuple[Stamp, Record | door.DamageError]] = {}
        self._seen: dict[str, Seen] | None = None  # None before the first look
        self._done: set[str] = set()  # tasks whose outcomes can't change any more

    def read(self) -> Run:
        """The run as it stands.

        Raises: ConfigError when the folder is not a run, DamageError when its run.json is damaged.
        """
        damage: list[str] = []
        plan = self._file("run.json", Plan)
        if plan is None:
            raise ConfigError(f"{self.root} is not a run folder: it has no run.json")
        result = self._record("result.json", Result, damage)
        generations = self._generations(result, damage)
        tasks, settled = self._settled(damage)
        seen = {task_id: item for task_id, item in settled.items() if not item.probe}
        timed = (task_id for generation in generations for task_id in generation.timed)
        for task_id in (*timed, *(result.timed if result else ())):
            _join(seen, task_id)
        judged = (task_id for generation in generations for task_id in generation.told)
        known = [*((*result.reported, *result.front) if result else ()), *judged]
        if gone := list(dict.fromkeys(task_id for task_id in known if task_id not in settled)):
            damage.append(f"{len(gone)} candidates have no usable outcome, such as tasks/{gone[0]}/outcome.json")
        run = Run(
            root=self.root,
            plan=plan,
            generations=tuple(generations),
            seen=seen,
            timed=seen,
            views=self._views(plan, seen, damage),
            result=result,
            heartbeat=self._record("driver.json", Heartbeat, damage),
            jobs=self._jobs(damage),
            tasks=tasks,
            settled=len(settled),
            damage=tuple(map(door.one_line, damage)),
        )
        return run.on(0)

    def _views(self, plan: Plan, seen: dict[str, Seen], damage: list[str]) -> tuple[Elsewhere | None, ...]:
        """How the run's devices see its models, as soon as the base model was measured and surveyed."""
        base = next((item.measurement for item in seen.values() if item.is_base and item.split == "search"), None)
        surveyed = next((task_id for task_id, item in seen.items() if item.study == "survey"), None)
        if not plan.devices or base is None or surveyed is None:
            return (None,)
        try:
            finding = Outcomes(self.root, [surveyed])[surveyed].finding
            return elsewhere.views(plan.devices, finding if isinstance(finding, Surveyed) else None, base)
        except (door.DamageError, KeyError, ValueError, ArithmeticError) as error:
            damage.append(f"no time can be predicted: {error}")
            return (None,)

    def _generations(self, result: Result | None, damage: list[str]) -> list[Generation]:
        numbers = sorted(int(name[:-5]) for name in self._names("generations") if re.fullmatch(r"\d{4,9}\.json", name))
        if result is not None:
            # The run may have been ended earlier than it was at first.
            numbers = [number for number in numbers if number <= result.generations]
        generations = []
        for number in numbers:
            name = f"generations/{number:04d}.json"
            generation = self._record(name, Generation, damage)
            if generation is not None and generation.number != number:
                damage.append(f"{name} describes generation {generation.number}")
            elif generation is not None:
                generations.append(generation)
        last = max(numbers, default=0)
        gaps = sorted(set(range(1, min(last, len(numbers) + 100))) - set(numbers))  # a stranger's number may be huge
        damage += [f"generations/{number:04d}.json is missing" for number in gaps]
        if result is not None and result.generations > last:
            damage.append(f"generations/{last + 1:04d}.json to {result.generations:04d}.json are missing")
        return generations

    def _jobs(self, damage: list[str]) -> tuple[tuple[Submission, Ends], ...]:
        jobs = []
        for name in sorted(self._names("jobs")):
            submission = self._record(f"jobs/{name}/submission.json", Submission, damage)
            if submission is not None:
                jobs.append((submission, self._record(f"jobs/{name}/ends.json", Ends, damage) or Ends()))
        return tuple(jobs)

    def _settled(self, damage: list[str]) -> tuple[int, dict[str, Seen]]:
        """How many tasks there are, and the settled ones."""
        first = self._seen is None
        known = self._remembered() if self._seen is None else self._seen
        names = sorted(name for name in self._names("tasks") if re.fullmatch("[0-9a-f]{16}", name))
        settled, read = {}, 0
        for task_id in names:
            if task_id in self._done:
                settled[task_id] = known[task_id]
                continue
            path = f"{self.root}/tasks/{task_id}/outcome.json"
            try:
                stamp = _stamp(path)
                if stamp is None:
                    continue
                if task_id not in known or known[task_id].stamp != stamp:
                    with _unreadable_is_damage(path):
                        item = self._look(task_id, stamp)
                    read += 1
                else:
                    item = known[task_id]
            except door.DamageError as error:
                damage.append(self._named(error))
                continue
            settled[task_id] = item
            if item.measurement:
                self._done.add(task_id)
        self._seen = settled
        if first and read >= SEEN_FROM:
            self._remember(settled)
        return len(names), settled

    def _look(self, task_id: str, stamp: Stamp) -> Seen:
        """Raises: DamageError, the same one as the last time where the file has not changed."""
        name = f"tasks/{task_id}/outcome.json"
        kept = self._files.get(name)
        if kept is not None and kept[0] == stamp and isinstance(kept[1], door.DamageError):
            raise kept[1]
        try:
            found = _outcome(self.root, task_id)
            if found is None:
                raise door.DamageError(f"{self.root}/{name} is gone")
            return Seen.of(found[0], stamp, report_id=found[1])
        except door.DamageError as error:
            self._files[name] = stamp, error
            raise

    def _remembered(self) -> dict[str, Seen]:
        try:
            found = door.record(door.inside(self.root, SEEN), SeenFile)
        except (door.DamageError, OSError):
            return {}
        return found.seen if found else {}

    def _remember(self, seen: dict[str, Seen]) -> None:
        content = SeenFile(seen=seen).model_dump_json().encode()
        if len(content) <= door.RECORD_BYTES:
            try:
                write_atomically(self.root / SEEN, content)
            except OSError:
                return  # not writable, or no room: the next reader reads all outcomes too

    # --- files ---

    def _names(self, folder: str) -> list[str]:
        try:
            return os.listdir(door.inside(self.root, folder))
        except (OSError, door.DamageError):
            return []

    def _record(self, name: str, kind: type[R], damage: list[str]) -> R | None:
        try:
            return self._file(name, kind)
        except door.DamageError as error:
            damage.append(self._named(error))
            return None

    def _file(self, name: str, kind: type[R]) -> R | None:
        """The record in a file, read only when the file has changed; None where there is none.

        Raises: DamageError.
        """
        path = f"{self.root}/{name}"
        stamp = _stamp(path)
        if stamp is None:
            return None
        if name not in self._files or self._files[name][0] != stamp:
            with _unreadable_is_damage(path):
                try:
                    found = door.record(door.inside(self.root, name), kind)
                except door.DamageError as error:
                    self._files[name] = stamp, error
                    raise
            if found is None:
                return None
            self._files[name] = stamp, found
        kept = self._files[name][1]
        if isinstance(kept, door.DamageError):
            raise kept
        assert isinstance(kept, kind)
        return kept

    def _named(self, error: door.DamageError) -> str:
        return str(error).replace(f"{self.root}/", "")


def _join(seen: dict[str, Seen], task_id: str) -> None:
    """Add a timing to those of the candidate that it timed again, as the search did."""
    again = seen.get(task_id)
    first = seen.get(again.repeats or "") if again else None
    if again and first and again.measurement and first.measurement:
        with suppress(ValueError):  # of another device, which the search would have refused
            joined = with_timing(first.measurement, again.measurement)
            seen[again.repeats or ""] = first.model_copy(update={"measurement": joined})


def _stamp(path: str) -> Stamp | None:
    with _unreadable_is_damage(path):
        try:
            found = door.patiently(lambda: os.stat(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
    return found.st_mtime_ns, found.st_size


@contextmanager
def _unreadable_is_damage(path: str) -> Iterator[None]:
    """A reader names what a filesystem that is away does not give, and goes on with the rest. Raises: DamageError."""
    try:
        yield
    except OSError as error:
        raise door.DamageError(f"{path} can't be read: {error.strerror}") from None


def _outcome(root: Path, task_id: str) -> tuple[Outcome, str] | None:
    """An outcome, and the id of the task that measures the same genome on the report split. Raises: DamageError."""
    path = door.inside(root, "tasks", task_id, "outcome.json")
    outcome = door.record(path, Outcome)
    if outcome is None:
        return None
    try:
        own_id, report_id = identity.ids_of(outcome.task)
    except ValueError:
        own_id = report_id = ""
    if own_id != task_id:
        raise door.DamageError(f"{path} describes another task")
    return outcome, report_id


def open_run(root: Path | str) -> Run:
    """Read a run folder, finished or not.

    Raises: ConfigError when it is not one, DamageError when its run.json is damaged.
    """
    return Reader(root).read()


def open_runs(roots: Iterable[Path]) -> list[Run]:
    """Read run folders and say what is missing in them. One that can't be read at all is left out if there are others.

    Raises: DamageError when none can be read.
    """
    runs, damaged = [], []
    for root in roots:
        try:
            runs.append(open_run(root))
        except door.DamageError as error:
            damaged.append(error)
    if not runs and damaged:
        raise damaged[0]
    for damage in damaged:
        log.warning("%s; this run is left out", door.one_line(str(damage)))
    for run in runs:
        for line in run.damage_lines():
            log.warning("%s: %s", door.one_line(str(run.root)), line)
    return runs


def find_runs(paths: Path | str | Iterable[Path | str]) -> list[Path]:
    """Run folders at or below the paths, each of which may be a pattern such as `results/sst2-*`. What else a pattern matches,
    such as tables beside the runs, is passed over.

    Raises: ConfigError for a path or a pattern that holds none.
    """
    found: dict[Path, None] = {}
    given = [paths] if isinstance(paths, (str, Path)) else paths
    for pattern in map(str, given):
        here = []
        for folder, folders, files in itertools.chain.from_iterable(map(os.walk, _matching(pattern))):
            folders.sort()
            if "run.json" in (*files, *folders):
                here.append(Path(folder))
                folders.clear()  # a run holds no other runs
        if not here:
            raise ConfigError(
                f"no run in {pattern}: a run folder holds a run.json; `hpc-compress search` makes one in results/"
            )
        found.update(dict.fromkeys(here))
    return list(found)


def _matching(pattern: str) -> list[str]:
    """The paths that a pattern stands for; a path that is there stands for itself, whatever its name."""
    return [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern)) or [pattern]
