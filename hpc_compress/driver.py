"""The loop: asks the strategy for genomes, sends tasks, reads outcomes, lets the strategy select. Imports no torch.

Resuming needs no code of its own. A driver always starts from the base model and asks the strategy again; tasks that have an
outcome already are not sent. Every choice follows from the seed and the outcomes, so the driver arrives where it was.
"""

import errno
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hpc_compress import devices, guard, identity, splits
from hpc_compress.config import ConfigError, RunConfig, build, check_name, locate
from hpc_compress.dispatch import Dispatch, Progress
from hpc_compress.launch import Launcher
from hpc_compress.models import inspection, pretrained
from hpc_compress.operators import Particular, operator
from hpc_compress.problems import problem, problem_of
from hpc_compress.records import DeviceFront, Environment, Generation, Plan, Result
from hpc_compress.search import elsewhere, front
from hpc_compress.search.elsewhere import Elsewhere
from hpc_compress.search.known import Known
from hpc_compress.search.objective import quality_of, with_timing
from hpc_compress.search.space import Shape
from hpc_compress.store import Store
from hpc_compress.summary import describe, figures, learnt, uncertain
from hpc_compress.types import (
    Candidate,
    DeviceProfile,
    Genome,
    Measurement,
    Outcome,
    Profiling,
    Proposal,
    Screening,
    SearchError,
    Split,
    Step,
    Study,
    Survey,
    Surveyed,
    Task,
)

Objective = Callable[[Measurement, Measurement], float]
MOST_FOUND = 8  # masters that are kept of structures that the nodes found block by block and that were not measured yet


class Strategy(Protocol):
    """Decides what is tried and what survives. `steps` and `deploys`: every step that it may use, to be checked and probed.

    One that has a field `known` is given a `search.known.Known`; every other one is given `shape` and `score`. It may have
    more attributes: `studies`, what it asks about the base model before the first generation; `timed_again(population)`, which
    survivors are timed again in a generation (without it: all); `notes()`, new lines for the log; and `ended`, why it proposes
    nothing any more ("": it goes on), which is to be known after `ask`, so that the last generation waits for all its tasks.
    """

    @property
    def steps(self) -> Sequence[Step]: ...
    @property
    def deploys(self) -> Sequence[Step]: ...
    def ask(self, rng: np.random.Generator, population: Sequence[Candidate]) -> list[Proposal]: ...
    def tell(self, population: Sequence[Candidate], candidates: Sequence[Candidate]) -> tuple[Candidate, ...]: ...

    # `tell` returns the survivors, fittest first. At the end it is given no candidates, only new timings of the population.


@dataclass(frozen=True)
class SearchSettings:
    """One search, as its user has set it."""

    config: RunConfig
    strategy: Mapping[str, Any]  # config node with a `_target_`
    objective: Mapping[str, Any]  # the same
    launcher: Launcher
    retries: int = 2  # new jobs for a task whose job died without an outcome


def search(
    settings: SearchSettings,
    root: Path,
    progress: Progress,
    only_probe: bool = False,
    accepted: Callable[[], None] = lambda: None,
) -> Result | None:
    """Run a search in `root` from its start, or on from wherever it was left.

    only_probe: end when every kind of step has worked on a few sentences; returns None.
    accepted: called once the settings are accepted, before any job.

    Raises: ConfigError before any work for what a user can mend; SearchError when work goes on to fail.
    """
    check_name(settings.config.name)
    with _ready(settings, root, progress, accepted) as (run, rehearsal):
        if only_probe:
            run.probe(rehearsal)
            return None
        return run.run(rehearsal)


def profile(settings: SearchSettings, root: Path, progress: Progress) -> DeviceProfile:
    """What the blocks of the base model take on the device that the launcher's jobs have. `root` is a folder for this alone.

    Raises: as `search`.
    """
    # How well the head is trained has no effect on time.
    model = settings.config.model.model_copy(update={"fine_tune": {"epochs": 1e-6}})
    untrained = replace(settings, config=settings.config.model_copy(update={"model": model, "device": ()}))
    with _ready(untrained, root, progress) as (run, rehearsal):
        return run.profile(rehearsal)


@contextmanager
def _ready(
    settings: SearchSettings, root: Path, progress: Progress, accepted: Callable[[], None] = lambda: None
) -> Iterator[tuple["_Search", Strategy]]:
    """A run whose settings are checked and whose jobs can be sent, and the strategy that was checked."""
    store = Store(root)
    with guard.alone(store), _room(store.root):
        objective: Objective = build(settings.objective, "objective")
        plan = _plan(store, settings, progress)

        strategy = functools.partial(strategy_of, settings.strategy)
        rehearsal = strategy(Known(shape=plan.shape))
        for step in (*plan.base.preparation, *rehearsal.steps, *rehearsal.deploys):
            if isinstance(chosen := operator(step), Particular):
                chosen.check(settings.config.protocol.device, len(plan.shape.heads), plan.shape.widths)
            problem_of(plan.dataset).check_step(step, plan.dataset)
        devices.require_precisions(plan.devices, plan.config.device, _profiling(rehearsal))
        with settings.launcher.open(store.root, progress.working, progress.say) as jobs:
            store.write("run.json", plan)  # after the last check: what is written can't be changed any more
            accepted()
            dispatch = Dispatch(store, jobs, progress, settings.retries)
            yield _Search(store, plan, objective, strategy, dispatch, progress), rehearsal


def _profiling(strategy: Strategy) -> Profiling:
    """What it asks of a device. One that asks for no profile may deploy in the precisions of its steps."""
    own = [study for study in _studies(strategy) if isinstance(study, Profiling)]
    return own[0] if own else Profiling(deploys=tuple((step,) for step in strategy.deploys))


def _studies(strategy: Strategy) -> Sequence[Survey | Profiling]:
    """What it asks about the base model before the first generation."""
    return getattr(strategy, "studies", ())


def strategy_of(settings: Mapping[str, Any], known: Known) -> Strategy:
    """The strategy that a config node describes. Raises: ConfigError when it can't be imported or refuses its parameters."""
    target = locate(str(settings.get("_target_", "")))
    told = {"known": known} if "known" in getattr(target, "model_fields", {}) else known.briefly()
    return build({**settings, **told}, "strategy")


@contextmanager
def _room(root: Path) -> Iterator[None]:
    """Raises: SearchError where the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise SearchError(
            f"no room left for {root} ({error.strerror}); free some, and the same search command goes on: nothing is lost"
        ) from None


def _plan(store: Store, settings: SearchSettings, progress: Progress) -> Plan:
    config = settings.config
    old = store.read("run.json", Plan)
    if old is None and (store.root / "run.json").exists():
        raise ConfigError(f"{store.root}/run.json can't be read, perhaps it is of another version; choose another name=")
    if old is not None:
        changed = old.differences(config, settings.strategy, settings.objective)
        if changed:
            raise ConfigError(
                f"{store.root} holds a run with other settings:\n  "
                + "\n  ".join(changed)
                + "\nchoose another name=, or delete it"
            )
        progress.say(f"going on with the run in {store.root}")
        return old.model_copy(update={"config": config})
    progress.say(f"reading {config.model.path} and {config.dataset.name}")
    found, kind = pretrained.find(config.model), problem(config.dataset.problem)
    own_labels = found.labels if found.has_head(kind.head) else ()
    dataset, tables, rows = splits.load(config.dataset, config.seed, own_labels)
    try:
        shape = Shape.of(found.config, alike=found.config.get("model_type") in inspection.ALIKE)
    except ValueError as error:
        raise ConfigError(f"model.path={config.model.path!r}: {error}") from None
    fits = pretrained.head_fits(found, config.model, kind.head, kind.head_width(dataset.labels), dataset.name)
    described = kind.described(found.folder, config.model)
    base = pretrained.adopt(found, config.model, store.root / "base", fits, described)
    (store.root / "data").mkdir(exist_ok=True)
    for split, table in tables.items():
        table.to_parquet(store.root / "data" / f"{split}.parquet", index=False)
    sizes = ", ".join(f"{len(table)} {split}" for split, table in tables.items())
    progress.say(f"{dataset.name}: {sizes} rows; {found.config.get('model_type')} of {len(shape.heads)} layers")
    for line in rows.lines():
        progress.say(line)
    return Plan(
        config=config,
        strategy=dict(settings.strategy),
        objective=dict(settings.objective),
        base=base,
        dataset=dataset,
        shape=shape,
        rows=rows,
        environment=Environment.here(),
        devices=devices.read(config.device, found.config, shape),
    )


class _Search:
    """One pass through the loop; all that must outlive it is in the store."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        objective: Objective,
        strategy: Callable[[Known], Strategy],
        dispatch: Dispatch,
        progress: Progress,
    ) -> None:
        self.store, self.plan, self.config = store, plan, plan.config
        self.objective, self.strategy = objective, strategy
        self.dispatch, self.progress = dispatch, progress
        self.candidates: dict[str, Candidate] = {}  # every one that was ever told
        self.told: dict[str, str] = {}  # tasks whose outcomes a selection has looked at: the candidate that each was about
        self.late: dict[str, Proposal] = {}  # sent, and told to no selection yet
        self.timing: dict[str, str] = {}  # tasks that time a candidate again, and that no selection has looked at yet
        self.repeats: Counter[str] = Counter()  # such tasks that were sent for each candidate
        self.views: tuple[Elsewhere | None, ...] = (None,)  # how each device that the user gave sees a candidate
        self.spent_seconds = 0.0  # of jobs, for the outcomes that were looked at
        self.artifacts: dict[str, tuple[str, str]] = {}  # of those that keep theirs: the keys of master and deployed model

    def run(self, rehearsal: Strategy) -> Result:
        if self.config.probe and self.config.generations:
            self.probe(rehearsal)
        base = self._first()
        strategy = self.strategy(self._known(rehearsal, base))
        population: tuple[Candidate, ...] = (self._seen(base),)
        number, stopped = 0, ""
        for number in range(1, self.config.generations + 1):
            population = self._generation(number, strategy, population, base)
            if self._good_enough(population, base):
                stopped = f"required_quality={self.config.required_quality} is reached"
                break
            if self._left() <= 0:
                stopped = f"budget.device_hours={self.config.budget.device_hours:g} is spent"
                break
            if stopped := getattr(strategy, "ended", ""):
                break
        else:
            stopped = "all generations are done"
        if self.late or self.timing:
            self.dispatch.abandon()
            self.repeats.subtract(self.timing.values())
            self.timing.clear()
        population, timed = self._time_the_fittest(strategy, population, base)
        result = self._report(population, base, number, stopped, timed)
        self.store.write("result.json", result)
        return result

    def _first(self) -> Candidate:
        """The base model, measured before any other candidate: every ratio divides by it."""
        outcome = self.dispatch.settle([self._task(Genome())], "base model", again=True)[0]
        if outcome.failure:
            raise SearchError(f"the base model could not be measured: {describe(outcome.failure)}")
        base = Candidate(id=identity.task_id(outcome.task), genome=Genome(), measurement=outcome.measurement)
        self.candidates[base.id] = base
        self.told[base.id] = base.id
        self._spend([outcome])
        self._has_learnt(outcome)
        return base

    def _seen(self, candidate: Candidate, device: int = 0) -> Candidate:
        """A candidate as one of the devices sees it that the user gave."""
        view = self.views[device]
        return candidate if view is None else view.measured(candidate)

    def _known(self, rehearsal: Strategy, base: Candidate) -> Known:
        """What the strategy is told before the first generation; it may ask for studies of the base model."""
        given = self.plan.devices
        wanted = _studies(rehearsal)
        studies = [study for study in wanted if not (given and isinstance(study, Profiling))]
        if given and not any(isinstance(study, Survey) for study in wanted):
            studies.append(Survey(sentences=1))  # it tells the batches of the sample
        outcomes = self.dispatch.settle([self._task(Genome(), study=study) for study in studies], "studies", again=True)
        if broken := [outcome for outcome in outcomes if outcome.failure]:
            raise SearchError(f"the base model could not be studied: {describe(broken[0].failure)}")  # type: ignore[arg-type]
        self._spend(outcomes)
        found = [outcome.finding for outcome in outcomes]
        survey = next((each for each in found if isinstance(each, Surveyed)), None)
        if survey is not None:
            devices.require_reach(given, self.config.device, survey)
            self.views = elsewhere.views(given, survey, base.measurement)  # type: ignore[arg-type]
        for profile, view in zip(given, self.views, strict=False):
            self.progress.say(f"times {'are measured on' if view is None else 'are predicted for'} {profile.device}")
        profiles = given or (next((each for each in found if isinstance(each, DeviceProfile)), None),)
        known = [self._known_of(at, survey, profile, base) for at, profile in enumerate(profiles)]
        return known[0].model_copy(update={"devices": given, "others": tuple(known[1:])})

    def _known_of(self, device: int, survey: Surveyed | None, profile: DeviceProfile | None, base: Candidate) -> Known:
        """The same for one device."""
        whole = self._seen(base, device).measurement
        if whole is None:
            raise SearchError(
                "an earlier version measured the base model, and no time can be predicted from its outcome; choose another "
                "name=..."
            )
        if "peak_bytes" in self.config.objectives and whole.peak_bytes is None:
            raise SearchError(f"objectives has peak_bytes, which is not known on {whole.device}; leave it out")
        return Known(
            shape=self.plan.shape,
            score=lambda measurement: self.objective(measurement, whole),
            base=whole,
            objectives=self.config.objectives,
            target=self.config.target,
            survey=survey,
            profile=profile,
            timings=self.config.timings if None in self.views else 1,
            left=self._left,
            seen=lambda candidate: self._seen(self.candidates[candidate.id], device),
        )

    def profile(self, rehearsal: Strategy) -> DeviceProfile:
        outcome = self.dispatch.settle([self._task(Genome(), study=_profiling(rehearsal))], "profile", again=True)[0]
        if outcome.failure:
            raise SearchError(f"the device could not be profiled: {describe(outcome.failure)}")
        assert isinstance(outcome.finding, DeviceProfile)
        return outcome.finding

    def _left(self) -> float:
        """Device seconds that the budget leaves, by the outcomes that were looked at."""
        hours = self.config.budget.device_hours
        return math.inf if hours is None else 3600 * hours - self.spent_seconds

    def _spend(self, outcomes: Iterable[Outcome]) -> None:
        self.spent_seconds += sum(sum(outcome.seconds.values()) for outcome in outcomes)

    def _has_learnt(self, outcome: Outcome) -> None:
        """Say it if the base model is no better than the best constant answer, or if its quality is not known precisely enough.

        Raises: SearchError when it is certainly no better than the constant answer.
        """
        said = learnt(self.plan, outcome)
        if said is None:
            if doubt := uncertain(outcome):
                self.progress.say(f"warning: {doubt}")
            return
        line, certain = said
        if certain and not self.config.force:
            raise SearchError(
                f"{line}, so there is nothing that a search could keep; train it longer (model.fine_tune), or go on: force=true"
            )
        self.progress.say(f"warning: {line}")

    def probe(self, strategy: Strategy) -> None:
        """Every kind of step once, on a few sentences: a broken environment shows before anything long is sent."""
        genomes = [Genome(steps=(step,)) for step in strategy.steps] + [Genome(deploy=(step,)) for step in strategy.deploys]
        protocol = self.config.protocol.model_copy(update={"min_passes": 2, "max_passes": 2, "warmup_passes": 0})
        tasks = [
            self._task(genome).model_copy(update={"limit": self.config.protocol.batch_size, "protocol": protocol})
            for genome in genomes
        ]
        broken = [outcome for outcome in self.dispatch.settle(tasks, "probe", again=True) if outcome.failure]
        if broken:
            reasons = "\n  ".join(f"{outcome.task.genome}: {describe(outcome.failure)}" for outcome in broken)  # type: ignore[arg-type]
            raise SearchError(
                f"these steps fail on a few sentences already, so nothing else was started:\n  {reasons}\n"
                f"mend them and start again; tracebacks are in {self.store.root}/tasks/*/outcome.json"
            )

    def _generation(
        self, number: int, strategy: Strategy, population: tuple[Candidate, ...], base: Candidate
    ) -> tuple[Candidate, ...]:
        rng = np.random.default_rng(identity.derive(self.config.seed, number, "variation"))
        proposals = strategy.ask(rng, population)
        what = f"generation {number}/{self.config.generations}"
        chosen = getattr(strategy, "timed_again", None)
        repeats = self._repeats(population if chosen is None else chosen(population), base)
        asked = [self._task(proposal.genome, study=proposal.screen) for proposal in proposals]
        sent = self.dispatch.send([*asked, *repeats.values()], what)
        born_ids, repeat_ids = sent[: len(proposals)], sent[len(proposals) :]
        self.timing |= dict(zip(repeat_ids, repeats, strict=True))
        self.late |= {task_id: p for task_id, p in zip(born_ids, proposals, strict=True) if task_id not in self.told}
        earlier = self.store.read(f"generations/{number:04d}.json", Generation)
        last = number == self.config.generations or bool(getattr(strategy, "ended", ""))
        told, timed = self._told(born_ids, earlier, last)
        outcomes = {task_id: self.dispatch.outcome(task_id) for task_id in told}
        self._stop_if_all_fail_alike(what, list(outcomes.values()))
        for task_id, outcome in outcomes.items():
            proposal = self.late.pop(task_id, None) or proposals[born_ids.index(task_id)]
            self._learn(task_id, proposal, outcome)
        again = {task_id: self.timing.pop(task_id) for task_id in timed}
        survivors = self._select(what, strategy, population, told, again, base)
        record = Generation(
            number=number,
            born_ids=tuple(born_ids),
            parents=tuple(proposal.parent for proposal in proposals),
            told=told,
            timed=timed,
            population=tuple(candidate.id for candidate in survivors),
        )
        if earlier != record:
            # Not when a resumed run passes by again: the living of later generations have artifacts already.
            self._bury(survivors, base)
            self.store.delete("result.json")
            self.store.write(f"generations/{number:04d}.json", record)
        late = f", {len(self.late)} late" if self.late else ""
        for note in getattr(strategy, "notes", list)():
            self.progress.say(f"{what}: {note}")
        self.progress.say(
            f"{what}: {len(told)} judged{late}, {len(survivors)} alive, best {survivors[0].genome}: "
            f"{figures(survivors[0].measurement)}"  # type: ignore[arg-type]
        )
        return survivors

    def _learn(self, task_id: str, proposal: Proposal, outcome: Outcome) -> None:
        """A genome that was screened and is measured now is the same candidate, known better."""
        if task_id in self.told:
            return
        self._spend([outcome])
        candidate_id = identity.task_id(self._task(proposal.genome))
        self.told[task_id] = candidate_id
        first = Candidate(id=candidate_id, genome=proposal.genome, parent=proposal.parent)
        candidate = self.candidates.get(candidate_id, first)
        if outcome.measurement is not None:
            candidate = candidate.model_copy(update={"measurement": outcome.measurement})
        elif isinstance(outcome.finding, Screening):
            candidate = candidate.model_copy(update={"screening": outcome.finding})
        self.candidates[candidate_id] = candidate

    def _select(
        self,
        what: str,
        strategy: Strategy,
        population: Sequence[Candidate],
        told: Sequence[str],
        timed: Mapping[str, str],
        base: Candidate,
    ) -> tuple[Candidate, ...]:
        """Who survives, fittest first. told: new candidates; timed: candidates that were timed again, by the task that did it.

        Raises: SearchError when measurements can't be compared.
        """
        try:
            for task_id, candidate_id in timed.items():
                outcome = self.dispatch.outcome(task_id)
                self._spend([outcome])
                self._time_again(candidate_id, outcome.measurement)
            judged = [self.candidates[id] for id in dict.fromkeys(self.told[task_id] for task_id in told)]
            seen = [self._seen(candidate) for candidate in judged]
            if lost := sum(
                before.measurement is not None and after.measurement is None for before, after in zip(judged, seen, strict=True)
            ):
                self.progress.say(f"{what}: {lost} models are left out, since the device's file can't predict their times")
            return strategy.tell([self._seen(self.candidates[candidate.id]) for candidate in population], seen)
        except ValueError as error:
            raise SearchError(f"{what} can't be judged: {error}{self._odd((*told, *timed), base)}") from None

    def _time_the_fittest(
        self, strategy: Strategy, population: tuple[Candidate, ...], base: Candidate
    ) -> tuple[tuple[Candidate, ...], tuple[str, ...]]:
        """Time the fittest, and the one nearest to the targets, until each has all of its timings: the youngest were timed only
        once, and the one that is recommended must not owe its place to a lucky timing.

        Returns: the population in its new order, and the tasks that timed it.
        """
        what, timed = "timings of the fittest", []
        while repeats := self._repeats((*population[: self.config.report_candidates], *self._nearest(base)), base):
            task_ids = self.dispatch.send(list(repeats.values()), what, again=True)
            self.dispatch.wait(task_ids)
            population = self._select(what, strategy, population, (), dict(zip(task_ids, repeats, strict=True)), base)
            timed += task_ids
        return population, tuple(timed)

    def _repeats(self, population: Sequence[Candidate], base: Candidate) -> dict[str, Task]:
        """By candidate, a task that times it again, for each survivor that was not timed often enough.

        Else one lucky timing would keep a candidate alive for ever.
        """
        if None not in self.views:
            return {}  # what is predicted does not vary
        busy, repeats = {base.id, *self.timing.values()}, {}
        for candidate in {candidate.id: candidate for candidate in population}.values():
            if candidate.id not in busy and self.repeats[candidate.id] + 1 < self.config.timings:
                self.repeats[candidate.id] += 1
                task = self._task(candidate.genome)
                repeats[candidate.id] = task.model_copy(update={"repeat": self.repeats[candidate.id]})
        return repeats

    def _time_again(self, candidate_id: str, measurement: Measurement | None) -> None:
        """Add a timing to those of a candidate. A task that failed adds none."""
        candidate = self.candidates[candidate_id]
        if measurement is not None and candidate.measurement is not None:
            joined = with_timing(candidate.measurement, measurement)
            self.candidates[candidate_id] = candidate.model_copy(update={"measurement": joined})

    def _told(self, born_ids: Sequence[str], earlier: Generation | None, last: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Wait for what selection shall look at: by id, since the order in which outcomes arrive must not matter.

        last: no generation follows, so nothing may be late.

        Returns: tasks of candidates, and tasks that timed survivors again.
        """
        if earlier is not None and earlier.born_ids == tuple(born_ids):
            # Who was late is chance, so a resumed run keeps to what was written down.
            self.dispatch.wait((*earlier.told, *earlier.timed))
            return earlier.told, earlier.timed
        everyone = sorted({*self.late, *self.timing, *born_ids})
        if self.config.select_after == 1 or last:
            self.dispatch.wait(everyone)
        else:
            self.dispatch.wait(born_ids, math.ceil(self.config.select_after * len(set(born_ids))))
        settled = [task_id for task_id in everyone if task_id not in self.dispatch.open]
        told = tuple(task_id for task_id in settled if task_id not in self.timing)
        return told, tuple(task_id for task_id in settled if task_id in self.timing)

    def _odd(self, task_ids: Sequence[str], base: Candidate) -> str:
        """Which outcomes come from another kind of device than the base model's."""
        device = base.measurement and base.measurement.device
        measured = {task_id: self.dispatch.outcome(task_id).measurement for task_id in task_ids}
        odd = [task_id for task_id, measurement in measured.items() if measurement and measurement.device != device]
        files = " ".join(f"{self.store.root}/tasks/{task_id}/outcome.json" for task_id in odd)
        return f"\nthe base model was measured on {device}; delete what was not, and go on: {files}" if odd else ""

    def _stop_if_all_fail_alike(self, what: str, outcomes: Sequence[Outcome]) -> None:
        """When all tasks of a generation fail for the same reason, the user must correct something. Failed screens alone do not
        stop a search once any compressed model was screened or measured, unless jobs were lost: that is the cluster's fault."""
        found = (candidate for candidate in self.candidates.values() if candidate.genome != Genome())
        lost = any(outcome.failure and outcome.failure.kind == "lost" for outcome in outcomes)
        known = any(each.measurement or each.screening for each in found)
        if all(outcome.task.study for outcome in outcomes) and known and not lost:
            return
        reasons = [describe(outcome.failure) for outcome in outcomes if outcome.failure]
        causes = {
            re.sub(r"\b0x[0-9a-f]+\b|\b[0-9a-f]*\d[0-9a-f]*\b", "#", reason.partition(", at last")[0]) for reason in reasons
        }
        if len(reasons) == len(outcomes) >= 3 and len(causes) == 1:
            for outcome in outcomes:
                self.store.forget_failure(identity.task_id(outcome.task))  # so that a new start tries again
            raise SearchError(
                f"all {len(outcomes)} tasks of {what} failed alike: {reasons[0]}\nmend it, and the same search command goes on"
            )

    def _bury(self, alive: Iterable[Candidate], base: Candidate) -> None:
        """Delete the artifacts of the dead, but for those that late children start from, or that the report measures."""
        parents = {proposal.parent for proposal in self.late.values()}
        kept = {
            candidate.id: candidate.genome for candidate in (*alive, base, *self._nearest(base), *self._reported_front(base))
        }
        kept |= {parent: self.candidates[parent].genome for parent in parents if parent in self.candidates}
        kept |= {task_id: proposal.genome for task_id, proposal in self.late.items()}
        kept |= {candidate_id: self.candidates[candidate_id].genome for candidate_id in self.timing.values()}
        # What was only screened may be measured later. (A carved model is made anew in a second.)
        unmeasured = [candidate for candidate in self.candidates.values() if candidate.screening and not candidate.measurement]
        found = [candidate for candidate in unmeasured if any(step.operator != "carve" for step in candidate.genome.steps)]
        kept |= {candidate.id: candidate.genome for candidate in found[-MOST_FOUND:]}
        self.artifacts = {task_id: self.artifacts.get(task_id) or self._artifacts(genome) for task_id, genome in kept.items()}
        # Late tasks go on from whatever prefix of their genome is stored, and from the checkpoint of a training under way.
        tasks = [self._task(proposal.genome) for proposal in self.late.values()]
        prefixes = {
            identity.master_key(task, task.genome.steps[:done]) for task in tasks for done in range(1, len(task.genome.steps))
        }
        self.store.keep_artifacts({"tokenizer", *prefixes, *(key for keys in self.artifacts.values() for key in keys)})

    def _artifacts(self, genome: Genome) -> tuple[str, str]:
        task = self._task(genome)
        return identity.master_key(task), identity.deployed_key(task)

    def _good_enough(self, population: Sequence[Candidate], base: Candidate) -> bool:
        """Whether a candidate that is smaller than the base model has the required quality."""
        required, whole = self.config.required_quality, self._seen(base).measurement
        measured = [candidate.measurement for candidate in population if candidate.measurement]
        assert whole is not None
        small = [measurement for measurement in measured if measurement.model_bytes < whole.model_bytes]
        return required is not None and any(quality_of(measurement) >= required for measurement in small)

    def _report(
        self, population: Sequence[Candidate], base: Candidate, generations: int, stopped: str, timed: tuple[str, ...]
    ) -> Result:
        """Measure the fittest and the base model on the report split, which the search never saw."""
        everyone = (*population[: self.config.report_candidates], *self._nearest(base), *self._reported_front(base))
        reported = tuple({candidate.id: candidate for candidate in everyone}.values())
        tasks = [self._task(candidate.genome, "report") for candidate in {c.id: c for c in (base, *reported)}.values()]
        self.dispatch.settle(tasks, "report", again=True)
        return Result(
            best=population[0].id,
            base=base.id,
            reported=tuple(candidate.id for candidate in reported),
            timed=timed,
            front=tuple(candidate.id for candidate in self._front(base)),
            fronts=tuple(
                DeviceFront(
                    device=profile.device,
                    predicted=self.views[at] is not None,
                    candidates=tuple(candidate.id for candidate in self._front(base, at)),
                )
                for at, profile in enumerate(self.plan.devices)
            ),
            generations=generations,
            stopped=stopped,
        )

    def _front(self, base: Candidate, device: int = 0) -> list[Candidate]:
        """Of all candidates, those that no other one beats in every objective on a device."""
        return front.of(self._measured(device), self._seen(base, device).measurement, self.config.objectives)  # type: ignore[arg-type]

    def _reported_front(self, base: Candidate) -> list[Candidate]:
        """The front of every device, where the report shall measure it. What joins it late, by a new timing, is made again."""
        everywhere = range(len(self.views)) if self.config.report_front else ()
        return [candidate for device in everywhere for candidate in self._front(base, device)]

    def _nearest(self, base: Candidate) -> list[Candidate]:
        """The one that comes nearest to the targets, if there are any."""
        target = self.config.target
        whole = self._seen(base).measurement
        return [front.nearest(self._measured(), whole, target)] if target.wanted else []  # type: ignore[arg-type]

    def _measured(self, device: int = 0) -> list[Candidate]:
        """All candidates that are measured, as a device sees them."""
        seen = (self._seen(candidate, device) for candidate in self.candidates.values() if candidate.measurement)
        return [candidate for candidate in seen if candidate.measurement]

    def _task(self, genome: Genome, split: Split = "search", study: Study | None = None) -> Task:
        return Task(
            base=self.plan.base,
            dataset=self.plan.dataset,
            protocol=self.config.protocol,
            seed=self.config.seed,
            genome=genome,
            split=split,
            study=study,
        )
