"""The loop: asks the strategy for genomes, sends tasks, reads outcomes, lets the strategy select. Imports no torch.

Resuming is not a case of its own: a driver always starts from the base model and asks again, and what the store can
answer is not sent. Since every choice follows from the seed and the outcomes, it comes to where it was.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hpc_compress import identity
from hpc_compress.config import ConfigError, RunConfig
from hpc_compress.data import source
from hpc_compress.launch import Launcher
from hpc_compress.models import checkpoint
from hpc_compress.operators import operator
from hpc_compress.search.objective import quality_of
from hpc_compress.search.space import Shape
from hpc_compress.store import Store
from hpc_compress.types import (
    Base,
    Candidate,
    Dataset,
    Failure,
    Genome,
    Measurement,
    Outcome,
    Proposal,
    Record,
    Split,
    Step,
    Task,
)

Objective = Callable[[Measurement, Measurement], float]


class Strategy(Protocol):
    """What decides. `steps` and `deploys` are every step that it may use, so that they can be checked and probed."""

    @property
    def steps(self) -> Sequence[Step]: ...
    @property
    def deploys(self) -> Sequence[Step]: ...
    def ask(self, rng: np.random.Generator, population: Sequence[Candidate]) -> list[Proposal]: ...
    def tell(self, population: Sequence[Candidate], candidates: Sequence[Candidate]) -> tuple[Candidate, ...]: ...


class Progress(Protocol):
    """Where the driver says what is going on."""

    def say(self, text: str) -> None: ...
    def working(self, what: str, done: int, total: int) -> None: ...


class Plan(Record):
    """What a run searches, in full. Kept as run.json; a resumed run must agree with it."""

    config: RunConfig
    strategy: dict[str, Any]
    objective: dict[str, Any]
    base: Base
    dataset: Dataset
    shape: Shape

    def differences(self, config: RunConfig, strategy: Mapping[str, Any], objective: Mapping[str, Any]) -> list[str]:
        """Settings that a resumed run may not change, where they changed. A run may be prolonged and reported anew."""
        free = {"name", "generations", "required_quality", "report_candidates", "probe"}
        old = {
            **self.config.model_dump(mode="json", exclude=free),
            "strategy": self.strategy,
            "objective": self.objective,
        }
        new = {**config.model_dump(mode="json", exclude=free), "strategy": dict(strategy), "objective": dict(objective)}
        return _differences(old, new)


class Generation(Record):
    """Who was born and who survived, by candidate id."""

    number: int
    born: tuple[Proposal, ...]
    born_ids: tuple[str, ...]  # in the order of `born`
    population: tuple[str, ...]  # survivors, fittest first


class Result(Record):
    """The end of a search."""

    best: str  # candidate id
    base: str
    reported: tuple[str, ...]  # candidate ids measured on the report split, fittest first
    generations: int
    stopped: str  # why


class SearchError(RuntimeError):
    """The run can't go on; the message says why and what to do."""


def search(
    config: RunConfig,
    strategy_settings: Mapping[str, Any],
    objective_settings: Mapping[str, Any],
    make: Callable[[Mapping[str, Any], str], Any],
    launcher: Launcher,
    root: Path,
    progress: Progress,
    retries: int = 2,
) -> Result:
    """Run a search in `root` from its start, or on from wherever it was left.

    make: builds the object of a config node, as `config.build`.

    Raises: ConfigError before any work for what a user can mend; SearchError when work goes on to fail.
    """
    store = Store(root)
    with store.lock("driver", wait=False) as alone:
        if not alone:
            raise SearchError(f"another driver is at work in {root}; wait for it, or choose another name=")
        objective: Objective = make(objective_settings, "objective")
        plan = _plan(store, config, strategy_settings, objective_settings, progress)

        def strategy(score: Callable[[Measurement], float]) -> Strategy:
            return make({**strategy_settings, "shape": plan.shape, "score": score}, "strategy")

        rehearsal = strategy(lambda measurement: 0.0)
        for step in (*plan.base.preparation, *rehearsal.steps, *rehearsal.deploys):
            operator(step)
        store.write("run.json", plan)  # after the last check: what is written can't be changed any more
        return _Search(store, plan, config, objective, launcher, progress, retries).run(strategy, rehearsal)


def _plan(
    store: Store,
    config: RunConfig,
    strategy: Mapping[str, Any],
    objective: Mapping[str, Any],
    progress: Progress,
) -> Plan:
    old = store.read("run.json", Plan)
    if old is None and (store.root / "run.json").exists():
        raise ConfigError(f"{store.root}/run.json can't be read, perhaps it is of another version; choose another name=")
    if old is not None:
        changed = old.differences(config, strategy, objective)
        if changed:
            raise ConfigError(
                f"{store.root} holds a run with other settings:\n  "
                + "\n  ".join(changed)
                + "\nchoose another name=, or delete it"
            )
        progress.say(f"going on with the run in {store.root}")
        return old.model_copy(update={"config": config})
    progress.say(f"reading {config.model.path} and {config.dataset.name}")
    found = checkpoint.find(config.model)
    dataset, tables = source.load(config.dataset, config.seed, found.labels if found.has_head else ())
    try:
        shape = Shape.of(found.config)
    except ValueError as error:
        raise ConfigError(f"model.path={config.model.path!r}: {error}") from None
    store.root.mkdir(parents=True, exist_ok=True)
    base = checkpoint.adopt(found, config.model, dataset, store.root / "base")
    (store.root / "data").mkdir(exist_ok=True)
    for split, table in tables.items():
        table.to_parquet(store.root / "data" / f"{split}.parquet", index=False)
    sizes = ", ".join(f"{len(table)} {split}" for split, table in tables.items())
    progress.say(f"{dataset.name}: {sizes} rows; {found.config.get('model_type')} of {len(shape.heads)} layers")
    plan = Plan(config=config, strategy=dict(strategy), objective=dict(objective), base=base, dataset=dataset, shape=shape)
    return plan


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
    return [] if identity.canonical(old) == identity.canonical(new) else [f"{path}: was {old}, now {new}"]


class _Search:
    """One pass through the loop; all that must outlive it is in the store."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        config: RunConfig,
        objective: Objective,
        launcher: Launcher,
        progress: Progress,
        retries: int,
    ) -> None:
        self.store, self.plan, self.config, self.objective = store, plan, config, objective
        self.launcher, self.progress, self.retries = launcher, progress, retries
        self.candidates: dict[str, Candidate] = {}  # every one that was ever born

    def run(self, make_strategy: Callable[[Callable[[Measurement], float]], Strategy], rehearsal: Strategy) -> Result:
        if self.config.probe and self.config.generations:
            self._probe(rehearsal)
        base = self._first()
        base_measurement = base.measurement
        assert base_measurement is not None
        strategy = make_strategy(lambda measurement: self.objective(measurement, base_measurement))
        population: tuple[Candidate, ...] = (base,)
        number, stopped = 0, "all generations are done"
        for number in range(1, self.config.generations + 1):
            population = self._generation(number, strategy, population, base)
            if self._good_enough(population, base):
                stopped = f"required_quality={self.config.required_quality} is reached"
                break
        result = self._report(population, base, number, stopped)
        self.store.write("result.json", result)
        return result

    def _first(self) -> Candidate:
        """The base model, measured before any other candidate: every ratio divides by it."""
        outcome = self._settle([self._task(Genome())], "base model", again=True)[0]
        if outcome.failure:
            raise SearchError(f"the base model could not be measured: {_describe(outcome.failure)}")
        base = Candidate(id=identity.task_id(outcome.task), genome=Genome(), measurement=outcome.measurement)
        self.candidates[base.id] = base
        return base

    def _probe(self, strategy: Strategy) -> None:
        """Every kind of step once, on a few sentences: a broken environment shows before anything long is sent."""
        genomes = [Genome(steps=(step,)) for step in strategy.steps] + [Genome(deploy=step) for step in strategy.deploys]
        protocol = self.config.protocol.model_copy(update={"min_passes": 2, "max_passes": 2, "warmup_passes": 0})
        tasks = [
            self._task(genome).model_copy(update={"limit": self.config.protocol.batch_size, "protocol": protocol})
            for genome in genomes
        ]
        broken = [outcome for outcome in self._settle(tasks, "probe", again=True) if outcome.failure]
        if broken:
            reasons = "\n  ".join(f"{outcome.task.genome}: {_describe(outcome.failure)}" for outcome in broken)  # type: ignore[arg-type]
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
        outcomes = self._settle([self._task(proposal.genome) for proposal in proposals], what)
        born = {}
        for proposal, outcome in zip(proposals, outcomes, strict=True):
            task_id = identity.task_id(outcome.task)
            candidate = Candidate(id=task_id, genome=proposal.genome, parent=proposal.parent, measurement=outcome.measurement)
            born[task_id] = self.candidates.setdefault(task_id, candidate)
        # By id: the order in which outcomes arrived must not matter.
        try:
            survivors = strategy.tell(population, [born[task_id] for task_id in sorted(born)])
        except ValueError as error:
            raise SearchError(
                f"{what} can't be judged: {error}; delete the outcomes that differ in tasks/, and go on"
            ) from None
        record = Generation(
            number=number,
            born=tuple(proposals),
            born_ids=tuple(identity.task_id(outcome.task) for outcome in outcomes),
            population=tuple(candidate.id for candidate in survivors),
        )
        if self.store.read(f"generations/{number:04d}.json", Generation) != record:
            # Not when a resumed run passes by again: the living of later generations have artifacts already.
            self._bury(survivors, base)
            (self.store.root / "result.json").unlink(missing_ok=True)
            self.store.write(f"generations/{number:04d}.json", record)
        best = survivors[0]
        self.progress.say(f"{what}: {len(born)} born, {len(survivors)} alive, best {self._line(best)}")
        return survivors

    def _bury(self, alive: Iterable[Candidate], base: Candidate) -> None:
        """Delete the artifacts of the dead."""
        tasks = [self._task(candidate.genome) for candidate in (*alive, base)]
        keys = {key(task) for task in tasks for key in (identity.master_key, identity.deployed_key)}
        self.store.keep_artifacts(keys | {"tokenizer"})

    def _good_enough(self, population: Sequence[Candidate], base: Candidate) -> bool:
        """Whether a candidate that is smaller than the base model has the required quality."""
        required, whole = self.config.required_quality, base.measurement
        measured = [candidate.measurement for candidate in population if candidate.measurement]
        assert whole is not None
        small = [measurement for measurement in measured if measurement.model_bytes < whole.model_bytes]
        return required is not None and any(quality_of(measurement) >= required for measurement in small)

    def _report(self, population: Sequence[Candidate], base: Candidate, generations: int, stopped: str) -> Result:
        """Measure the fittest and the base model on the report split, which the search never saw."""
        reported = population[: self.config.report_candidates]
        tasks = [self._task(candidate.genome, "report") for candidate in {c.id: c for c in (base, *reported)}.values()]
        self._settle(tasks, "report", again=True)
        return Result(
            best=population[0].id,
            base=base.id,
            reported=tuple(candidate.id for candidate in reported),
            generations=generations,
            stopped=stopped,
        )

    # --- from tasks to outcomes ---

    def _task(self, genome: Genome, split: Split = "search") -> Task:
        return Task(
            base=self.plan.base,
            dataset=self.plan.dataset,
            protocol=self.config.protocol,
            seed=self.config.seed,
            genome=genome,
            split=split,
        )

    def _settle(self, tasks: Sequence[Task], what: str, again: bool = False) -> list[Outcome]:
        """An outcome for each task, in order; what the store can answer is not sent, and equal tasks are sent once.

        again: try once more what failed in an earlier run of the driver, since its user may have mended the cause.
        """
        wanted = {self.store.add_task(task): task for task in tasks}
        for task_id in wanted if again else ():
            self.store.forget_failure(task_id)
        open_ids = [task_id for task_id in wanted if self.store.outcome(task_id) is None]
        arrived = len(wanted) - len(open_ids)
        if open_ids:
            known = f", {arrived} known already" if arrived else ""
            self.progress.say(f"{what}: {len(open_ids)} {'task' if len(open_ids) == 1 else 'tasks'}{known}")

        def poll() -> None:
            nonlocal arrived
            for task_id in list(open_ids):
                outcome = self.store.outcome(task_id)
                if outcome is not None:
                    open_ids.remove(task_id)
                    arrived += 1
                    self.progress.say(f"  {arrived}/{len(wanted)} {self._outcome_line(outcome)}")

        for attempt in range(1 + self.retries):
            if open_ids:
                # Every other time from the end, so that a task that kills its job can't keep those behind it from being tried.
                order = open_ids[::-1] if attempt % 2 else list(open_ids)
                self.launcher.run(self.store.root, _bundles({i: wanted[i] for i in order}), poll, self.progress.working)
                poll()
        for task_id in open_ids:
            # Written down, so that a resumed run sees the same end of this task.
            message = f"its job died {1 + self.retries} times without an outcome; see the logs in {self.store.root}/jobs"
            self.store.settle(Outcome(task=wanted[task_id], failure=Failure(kind="lost", stage="job", message=message)))
        poll()
        outcomes = [self.store.outcome(identity.task_id(task)) for task in tasks]
        assert all(outcomes)
        return outcomes  # type: ignore[return-value]

    def _outcome_line(self, outcome: Outcome) -> str:
        if outcome.failure:
            return f"{outcome.task.genome}: FAILED, {_describe(outcome.failure)}"
        seconds = sum(outcome.seconds.values())
        return f"{outcome.task.genome}: {_figures(outcome.measurement)}  ({seconds:.0f} s)"  # type: ignore[arg-type]

    def _line(self, candidate: Candidate) -> str:
        return f"{candidate.genome}: {_figures(candidate.measurement)}"  # type: ignore[arg-type]


def _bundles(tasks: Mapping[str, Task]) -> list[tuple[str, ...]]:
    """Tasks that share a master go to one process, one after another, so that its training is done once."""
    bundles: dict[str, list[str]] = {}
    for task_id, task in tasks.items():
        bundles.setdefault(identity.master_key(task), []).append(task_id)
    return [tuple(ids) for ids in bundles.values()]


def _figures(measurement: Measurement) -> str:
    name, quality = next(iter(measurement.metrics.items()))
    speed = float(np.median(measurement.base_latency_ms) / np.median(measurement.latency_ms))
    return f"{name} {quality:.3f}, {measurement.model_bytes / 1e6:.1f} MB, {speed:.2f}x speed"


def _describe(failure: Failure) -> str:
    return f"{failure.kind} while at {failure.stage}: {failure.message}"
