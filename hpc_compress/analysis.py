"""From run folders to tables, plots and a status. Reads records only; knows pandas and matplotlib, no torch and no Slurm."""

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from hpc_compress import identity
from hpc_compress.config import ConfigError, build
from hpc_compress.dispatch import HEARTBEAT_SECONDS, Heartbeat, describe, figures
from hpc_compress.driver import Generation, Plan, Result
from hpc_compress.launch.slurm import Ends, Submission
from hpc_compress.search.objective import Product, speed_up
from hpc_compress.store import Store
from hpc_compress.types import Genome, Measurement, Outcome, Proposal, Task

REPORT_COLUMNS = {  # of a report, with their units
    "dataset": "dataset",
    "method": "method",
    "metric": "metric",
    "quality": "quality",
    "encoder_m": "encoder, M",
    "parameters_m": "parameters, M",
    "mb": "size, MB",
    "latency_ms": "inference, ms",
    "speed_up": "speed-up",
}


@dataclass(frozen=True)
class Run:
    """One run folder, read."""

    root: Path
    plan: Plan
    generations: tuple[Generation, ...]
    outcomes: dict[str, Outcome]  # by task id; the probe's are left out
    result: Result | None  # None while the search goes on

    @property
    def base_id(self) -> str:
        return next(id for id, o in self.outcomes.items() if o.task.genome == Genome() and o.task.split == "search")

    def report_of(self, candidate: str) -> Outcome | None:
        """The outcome of the same genome on the report split."""
        task = self.outcomes[candidate].task.model_copy(update={"split": "report"})
        return self.outcomes.get(identity.task_id(task))


def open_run(root: Path | str) -> Run:
    """Read a run folder, finished or not.

    Raises: ConfigError when it is not one.
    """
    store = Store(root)
    plan = store.read("run.json", Plan)
    if plan is None:
        raise ConfigError(f"{root} is not a run folder: it has no readable run.json")
    result = store.read("result.json", Result)
    numbers = sorted(path.name for path in (store.root / "generations").glob("[0-9]*.json"))
    if result is not None:
        numbers = numbers[: result.generations]  # the run may have been ended earlier than it was at first
    generations = [store.read(f"generations/{name}", Generation) for name in numbers]
    outcomes = {}
    for folder in sorted((store.root / "tasks").glob("*")):
        outcome = store.outcome(folder.name)
        if outcome is not None and outcome.task.limit is None:
            outcomes[folder.name] = outcome
    return Run(
        root=store.root,
        plan=plan,
        generations=tuple(generation for generation in generations if generation is not None),
        outcomes=outcomes,
        result=result,
    )


def find_runs(paths: Iterable[Path | str]) -> list[Path]:
    """Run folders at or below the paths.

    Raises: ConfigError for a path that holds none.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        here = [path] if (path / "run.json").is_file() else [file.parent for file in sorted(path.rglob("run.json"))]
        if not here:
            raise ConfigError(f"no run in {path}: a run folder holds a run.json; `hpc-compress search` makes one in results/")
        found.update(dict.fromkeys(here))
    return list(found)


def load_runs(paths: Path | str | Iterable[Path | str]) -> pd.DataFrame:
    """Every candidate of some runs, one row each, in the order of birth.

    Columns: run, dataset, model, candidate, parent, generation, genome, steps, deploy, status (measured, or the kind of
    failure), failure, alive, best, fitness (F within the last population), metric, quality, search_<metric>,
    report_<metric>, latency_ms, base_latency_ms, report_latency_ms, speed_up, model_bytes, parameters, encoder_parameters,
    peak_bytes, seconds, device.

    Raises: ConfigError for a path that holds no run.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    frames = [_candidates(open_run(root)) for root in find_runs(paths)]
    return pd.concat(frames, ignore_index=True)


def _candidates(run: Run) -> pd.DataFrame:
    born: dict[str, tuple[int, Proposal]] = {}
    if any(o.task.genome == Genome() and o.task.split == "search" for o in run.outcomes.values()):
        born[run.base_id] = (0, Proposal(genome=Genome()))
    for generation in run.generations:
        for task_id, proposal in zip(generation.born_ids, generation.born, strict=True):
            born.setdefault(task_id, (generation.number, proposal))
    population = run.generations[-1].population if run.generations else tuple(born)
    fitness = _fitness(run, population)
    rows = []
    for task_id, (number, proposal) in born.items():
        outcome = run.outcomes.get(task_id)
        if outcome is None:
            continue
        rows.append(
            {
                "run": run.root.name,
                "dataset": run.plan.dataset.name,
                "model": run.plan.base.name,
                "candidate": task_id,
                "parent": proposal.parent,
                "generation": number,
                "genome": str(proposal.genome),
                "steps": len(proposal.genome.steps),
                "deploy": _deploy(proposal.genome),
                "status": outcome.failure.kind if outcome.failure else "measured",
                "failure": outcome.failure.message if outcome.failure else None,
                "alive": task_id in population,
                "best": bool(population) and task_id == population[0],
                "fitness": fitness.get(task_id, math.nan),
                "seconds": sum(outcome.seconds.values()),
                **_figures(outcome.measurement, "search"),
                **_report_figures(run.report_of(task_id)),
            }
        )
    return pd.DataFrame(rows)


def _deploy(genome: Genome) -> str:
    return " > ".join(str(step.params.get("scheme", step.operator)) for step in genome.deploy) or "fp32"


def _fitness(run: Run, population: Sequence[str]) -> dict[str, float]:
    """F of the living; the objective of a user's own is reported as it is."""
    objective = build(run.plan.objective, "objective")
    members = {id: run.outcomes[id].measurement for id in population if id in run.outcomes}
    measured = {id: measurement for id, measurement in members.items() if measurement is not None}
    if isinstance(objective, Product):
        return dict(zip(measured, objective.fitness(list(measured.values())), strict=True))
    base = run.outcomes[run.base_id].measurement
    return {id: objective(measurement, base) for id, measurement in measured.items()}


def _figures(measurement: Measurement | None, split: str) -> dict[str, Any]:
    if measurement is None:
        return {}
    name, quality = next(iter(measurement.metrics.items()))
    return {
        "metric": name,
        "quality": quality,
        **{f"{split}_{metric}": value for metric, value in measurement.metrics.items()},
        "latency_ms": median(measurement.latency_ms),
        "base_latency_ms": median(measurement.base_latency_ms),
        "speed_up": speed_up(measurement),
        "model_bytes": measurement.model_bytes,
        "parameters": measurement.parameters,
        "encoder_parameters": measurement.encoder_parameters,
        "peak_bytes": measurement.peak_bytes,
        "device": measurement.device,
    }


def _report_figures(outcome: Outcome | None) -> dict[str, Any]:
    if outcome is None or outcome.measurement is None:
        return {}
    figures = {f"report_{metric}": value for metric, value in outcome.measurement.metrics.items()}
    return {**figures, "report_latency_ms": median(outcome.measurement.latency_ms)}


# --- report ---


def report(roots: Sequence[Path]) -> pd.DataFrame:
    """The base model and the reported candidates of each run, measured on the report split.

    Columns: run, candidate, genome and those of REPORT_COLUMNS.

    Raises: ConfigError for a run that has not come to its end.
    """
    rows = []
    for root in roots:
        run = open_run(root)
        if run.result is None:
            raise ConfigError(f"{root} has not come to its end; see `hpc-compress status {root}`, or start its search again")
        best = run.result.best
        for candidate in dict.fromkeys((run.result.base, *run.result.reported)):
            outcome = run.report_of(candidate)
            if outcome is None or outcome.measurement is None:
                continue
            method = "base model" if candidate == run.result.base else ("best" if candidate == best else "next best")
            rows.append(_report_row(run, candidate, method, outcome.task, outcome.measurement))
    if not rows:
        raise ConfigError("no candidate could be measured on the report split; start the search again, which tries once more")
    return pd.DataFrame(rows)


def _report_row(run: Run, candidate: str, method: str, task: Task, measurement: Measurement) -> dict[str, Any]:
    name, quality = next(iter(measurement.metrics.items()))
    return {
        "run": run.root.name,
        "candidate": candidate,
        "dataset": task.dataset.name,
        "method": method,
        "metric": name,
        "quality": quality,
        "encoder_m": measurement.encoder_parameters / 1e6,
        "parameters_m": measurement.parameters / 1e6,
        "mb": measurement.model_bytes / 1e6,
        "latency_ms": median(measurement.latency_ms),
        "speed_up": speed_up(measurement),
        "genome": str(task.genome),
    }


def as_text(table: pd.DataFrame) -> str:
    """A report as a Markdown table, genomes last."""
    names = ["run"] if table["run"].nunique() > 1 else []
    shown = table.rename(columns=REPORT_COLUMNS)[[*names, *REPORT_COLUMNS.values(), "genome"]]
    formats = (*("" for _ in names), "", "", "", ".3f", ".2f", ".2f", ".1f", ".1f", ".2f", "")
    return shown.to_markdown(index=False, floatfmt=formats)


def write_report(roots: Sequence[Path], folder: Path) -> pd.DataFrame:
    """Write report.md, report.csv, candidates.csv and candidates.png into a folder; returns the report."""
    table, candidates = report(roots), load_runs(roots)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(as_text(table) + "\n", encoding="utf-8")
    table.to_csv(folder / "report.csv", index=False)
    candidates.to_csv(folder / "candidates.csv", index=False)
    plot(candidates, folder / "candidates.png")
    return table


def plot(candidates: pd.DataFrame, path: Path) -> None:
    """Quality against speed for every measured candidate, one panel a dataset; the area of a mark is the model's bytes."""
    from matplotlib.figure import Figure

    measured = candidates[candidates["status"] == "measured"]
    names = list(dict.fromkeys(measured["dataset"]))
    figure = Figure(figsize=(7 * len(names), 4.8), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        rows = measured[measured["dataset"] == name]
        area = 300 * rows["model_bytes"] / rows["model_bytes"].max()
        marks = axes.scatter(
            rows["speed_up"], rows["quality"], s=area, c=rows["generation"], cmap="viridis", alpha=0.75, linewidths=0
        )
        figure.colorbar(marks, ax=axes, label="generation", ticks=sorted(set(rows["generation"])))
        for label, chosen, color in (("base", rows["generation"] == 0, "black"), ("best", rows["best"], "crimson")):
            special = rows[chosen]
            axes.scatter(special["speed_up"], special["quality"], s=area[special.index], facecolors="none", edgecolors=color)
            for _, row in special.iterrows():
                axes.annotate(label, (row["speed_up"], row["quality"]), textcoords="offset points", xytext=(10, 8), color=color)
        axes.set_title(f"{name} (area: MB of the deployed model, at most {rows['model_bytes'].max() / 1e6:.0f})", fontsize=10)
        axes.set_xlabel(f"speed-up over the base model on {rows['device'].iloc[0]}")
        axes.set_ylabel(f"{rows['metric'].iloc[0]} on the search split")
        axes.margins(0.12)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


# --- status ---


def status(root: Path) -> str:
    """Where a run stands, from its files alone."""
    run = open_run(root)
    store = Store(root)
    lines = [
        f"run         {run.root}",
        f"compresses  {run.plan.base.name} on {run.plan.dataset.name}",
        f"generation  {len(run.generations)} of {run.plan.config.generations} done",
    ]
    heartbeat = store.read("driver.json", Heartbeat)
    if heartbeat and run.result is None:
        lines.append(f"now         {heartbeat.doing}: {heartbeat.done} of {heartbeat.total} tasks settled")
        jobs = ", ".join(f"{number} {state}" for state, number in heartbeat.jobs.items())
        lines.append(f"jobs        {jobs or 'none'}")
    tasks = len(list((run.root / "tasks").glob("*/task.json")))
    settled = len(list((run.root / "tasks").glob("*/outcome.json")))
    failures = Counter(describe(outcome.failure)[:100] for outcome in run.outcomes.values() if outcome.failure)
    lines.append(f"tasks       {settled} of {tasks} settled, {failures.total()} failed")
    lines += [f"            {number} x {reason}" for reason, number in failures.most_common(5)]
    if run.generations and (best := run.outcomes.get(run.generations[-1].population[0])) and best.measurement:
        lines.append(f"best so far {best.task.genome}: {figures(best.measurement)}")
    lines.append(f"GPU time    {gpu_hours(store, run.outcomes):.2f} hours")
    if run.result is not None:
        return "\n".join([*lines, f"state       ended: {run.result.stopped}"])
    if left := _time_left(run):
        lines.append(f"time left   {left}")
    return "\n".join([*lines, f"state       {_sign_of_life(store, heartbeat)}"])


def gpu_hours(store: Store, outcomes: Mapping[str, Outcome]) -> float:
    """Of ended Slurm jobs as the accounting counts them; of everything else the time that its tasks took on a GPU."""
    seconds, counted = 0.0, set()
    for submission in store.read_all("jobs/*/submission.json", Submission):
        ends = store.read(f"jobs/{submission.name}/ends.json", Ends) or Ends()
        for index, end in ends.ends.items():
            seconds += end.seconds * ends.gpus
            counted |= {task_id for bundle in submission.packs[index] for task_id in bundle}
    for task_id, outcome in outcomes.items():
        if task_id not in counted and outcome.measurement and outcome.measurement.device_type == "cuda":
            seconds += sum(outcome.seconds.values())
    return seconds / 3600


def _time_left(run: Run) -> str:
    """From the pace of the generations so far."""
    base = run.root / "tasks" / run.base_id / "outcome.json" if run.outcomes else None
    files = [run.root / "generations" / f"{generation.number:04d}.json" for generation in run.generations]
    marks = [path.stat().st_mtime for path in (*([base] if base else []), *files) if path.exists()]
    if len(marks) < 2:
        return ""
    pace = median(max(0.0, later - earlier) for earlier, later in itertools.pairwise(marks))
    left = run.plan.config.generations - len(run.generations)
    seconds = max(0.0, left * pace - max(0.0, time.time() - marks[-1]))
    return f"about {_duration(seconds)} for {left} more, at {_duration(pace)} a generation"


def _sign_of_life(store: Store, heartbeat: Heartbeat | None) -> str:
    if heartbeat is None:
        return "not started; the same search command goes on with it"
    age = max(0.0, time.time() - (store.root / "driver.json").stat().st_mtime)
    where = f"on {heartbeat.host}" + (f" in job {heartbeat.job_id}" if heartbeat.job_id else f", process {heartbeat.pid}")
    here = heartbeat.host == Heartbeat.here().host
    if Path(f"/proc/{heartbeat.pid}").exists() if here else age < 4 * HEARTBEAT_SECONDS:
        return f"driver at work {where}, last sign of life {_duration(age)} ago"
    return f"no driver at work; the last one, {where}, was there {_duration(age)} ago; the same search command goes on with it"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
