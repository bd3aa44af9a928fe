"""One row a candidate: what runs have found as a pandas table, and the questions that people ask it. Imports no torch.

Every question takes the table of `load_runs`, or a part of it, or that table read back from a csv or parquet file. A question
about a run is answered for each run of the table.
"""

import gc
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from pydantic import ValidationError

from hpc_compress import door
from hpc_compress.analysis import found
from hpc_compress.analysis.runs import Run, Seen, find_runs, open_runs
from hpc_compress.config import ConfigError, Objective
from hpc_compress.search import front as fronts
from hpc_compress.search.objective import Product, noise, speed_up, speed_up_spread
from hpc_compress.types import Measurement

By = Literal["compromise", "quality", "speed_up", "megabytes"]
MOST_SETTINGS = 1000  # of a run; no configuration of ours comes near it
OBJECTIVES: tuple[Objective, ...] = ("quality", "latency", "bytes")

COLUMNS = {  # name: (dtype, what it is)
    "run": ("str", "name of the run folder"),
    "folder": ("str", "its path; tells runs of one name apart"),
    "dataset": ("str", "name of the dataset"),
    "model": ("str", "the base model, as the user named it"),
    "candidate": ("str", "id of the candidate: `export` takes it, or its first digits"),
    "parent": ("str", "id of the candidate that it was made from; missing for the base model"),
    "generation": ("Int64", "in which it was born; 0: the base model"),
    "genome": ("str", "its steps in short"),
    "steps": ("Int64", "how many steps its training has, without those that deploy it"),
    "deploy": ("str", "the steps that deploy it; fp32: none"),
    "heads": ("str", "attention heads of each layer that is left, such as 12-8-0; missing in runs of earlier versions"),
    "ffn": ("str", "FFN neurons of each layer that is left"),
    "status": ("str", "measured; screened: its untrained model was only compared with the base model; or the kind of failure"),
    "stage": ("str", "what a failed candidate was at"),
    "failure": ("str", "why it failed"),
    "fidelity": ("str", "measured or screened; missing where neither worked"),
    "divergence": ("float64", "of its latest screening: how far the untrained model's outputs are from the base model's"),
    "alive": ("bool", "in the latest population"),
    "best": ("bool", "the fittest of its run"),
    "on_front": ("bool", "no other candidate of its run is at least as good in every objective of the run"),
    "fitness": ("float64", "F within the latest population; missing for an objective of your own"),
    "metric": ("str", "name of the metric that the search maximises"),
    "quality": ("float64", "that metric on the search split, a fraction of 1"),
    "quality_error": ("float64", "its standard error; missing in runs of earlier versions"),
    "base_quality": ("float64", "of the base model on the same split"),
    "report_quality": ("float64", "that metric on the report split; missing where it was not measured there"),
    "report_quality_error": ("float64", "its standard error"),
    "speed_up": ("float64", "over the base model: median of all timings"),
    "speed_up_best": ("float64", "over the base model in 16 bits, where it was timed so"),
    "speed_up_spread": ("float64", "the largest speed-up of all timings minus the smallest"),
    "timings": ("Int64", "in how many jobs it was timed"),
    "noise": ("float64", "how far the base model's speed-up over itself was from 1, for 9 of 10 pairs of passes"),
    "latency_ms": ("float64", "milliseconds of a pass over the protocol's sample, in its first timing"),
    "base_latency_ms": ("float64", "of the base model beside it"),
    "report_latency_ms": ("float64", "of the model as measured for the report"),
    "model_bytes": ("Int64", "bytes of the saved deployed weights"),
    "base_model_bytes": ("Int64", "of the base model"),
    "parameters": ("Int64", "parameters in all"),
    "encoder_parameters": ("Int64", "without embeddings, pooler and head"),
    "predicted": ("boolean", "its times are of a device that is not at hand, predicted from the device's file"),
    "peak_bytes": ("Int64", "allocator peak of a GPU during one pass"),
    "base_peak_bytes": ("Int64", "of the base model"),
    "enqueue_share": ("float64", "part of a pass until the CPU has sent all work to the GPU"),
    "device_seconds": ("float64", "time of its tasks on the search split, summed over jobs"),
    "device_joules": ("float64", "energy of the GPU in that time, of all its processes; missing where nothing told it"),
    "device": ("str", "as the device calls itself"),
}


def load_runs(paths: Path | str | Iterable[Path | str]) -> pd.DataFrame:
    """Every candidate of some runs, one row each, in the order of birth.

    paths: run folders, folders with runs below them, such as that of a sweep, or patterns such as `results/sst2-*`.

    Columns: those of `COLUMNS`, which docs/results.md lists too; every metric as search_<metric> and report_<metric>; and the
    configuration of the run, each setting as config.<key>.

    What is missing or damaged in a run is named in the log, and the rest is shown.

    Raises: ConfigError for a path that holds no run.
    """
    collects = gc.isenabled()
    gc.disable()  # nothing is garbage here, and the collector would walk through all that is read again and again
    try:
        return table_of(open_runs(find_runs(paths)))
    finally:
        if collects:
            gc.enable()


def table_of(runs: Sequence[Run]) -> pd.DataFrame:
    """The same of runs that are read already."""
    tables = [_candidates(run) for run in runs]
    table = pd.concat(tables, ignore_index=True)
    settings = [name for name in table.columns if name.startswith("config.")]
    metrics = [name for name in table.columns if name not in COLUMNS and name not in settings]
    table = table.reindex(columns=[*COLUMNS, *metrics, *settings])
    for name in settings if len(runs) > 1 else ():
        if len({type(value) for value in table[name].dropna()}) > 1:  # of several runs; a column of a file has one type
            table[name] = table[name].map(lambda value: None if pd.isna(value) else str(value))
    # A copy, since so many columns that are added one by one lie apart in memory.
    return table.astype({name: kind for name, (kind, _) in COLUMNS.items()}).copy()


def _candidates(run: Run) -> pd.DataFrame:
    base, tasks = run.base, _tasks(run)
    born: dict[str, tuple[int, str | None]] = {}  # generation and parent
    if base is not None:
        born[run.base_id] = (0, None)
    for generation in run.generations:
        for task_id, parent in zip(generation.born_ids, generation.parents, strict=True):
            born.setdefault(run.candidate_of(task_id), (generation.number, parent))
    population = run.generations[-1].population if run.generations else tuple(born)
    alive, fitness, front = set(population), _fitness(run, population), set(found.front_of(run))
    of_base = _of_base(base)
    rows = []
    for candidate, (number, parent) in born.items():
        about = tasks.get(candidate, [])
        screens = [seen for seen in about if seen.divergence is not None]
        first = [seen for seen in about if seen.repeats is None]
        if not first:
            continue
        seen = run.seen.get(candidate) or first[-1]
        rows.append(
            {
                "run": run.root.name,
                "folder": str(run.root),
                "dataset": run.plan.dataset.name,
                "model": run.plan.base.name,
                "candidate": candidate,
                "parent": parent,
                "generation": number,
                "genome": seen.genome,
                "steps": seen.steps,
                "deploy": seen.deploy,
                "status": seen.failure.kind if seen.failure else ("measured" if seen.measurement else "screened"),
                "stage": seen.failure.stage if seen.failure else None,
                "failure": seen.failure.message if seen.failure else None,
                "fidelity": "measured" if seen.measurement else ("screened" if screens else None),
                "divergence": screens[-1].divergence if screens else math.nan,
                "alive": candidate in alive,
                "best": candidate == run.best,
                "on_front": candidate in front,
                "fitness": fitness.get(candidate, math.nan),
                "device_seconds": sum(seen.seconds for seen in about),
                "device_joules": sum(known)
                if (known := [seen.joules for seen in about if seen.joules is not None])
                else math.nan,
                **of_base,
                **_figures(seen.measurement),
                **_report_figures(run, seen.report_id),
            }
        )
    table = pd.DataFrame(rows, columns=None if rows else list(COLUMNS))
    constant = {f"config.{name}": value for name, value in settings_of(run).items()}
    return pd.concat([table, pd.DataFrame(constant, index=table.index)], axis=1)


def settings_of(run: Run) -> dict[str, Any]:
    """The configuration of a run by dotted key; lists are JSON."""
    groups = {"strategy": run.plan.strategy, "objective": run.plan.objective}
    return dict(itertools.islice(_flat({**run.plan.config.model_dump(mode="json"), **groups}), MOST_SETTINGS))


def _flat(values: Mapping[str, Any], path: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{path}.{key}".lstrip(".")
        if isinstance(value, Mapping) and value:
            yield from _flat(value, name)
        else:
            huge = isinstance(value, int) and abs(value) >= 2**63
            yield name, json.dumps(value) if huge or isinstance(value, (list, tuple, Mapping)) else value


def _tasks(run: Run) -> dict[str, list[Seen]]:
    """By candidate, what became of its tasks on the search split, in the order in which selections looked at them."""
    tasks: dict[str, list[Seen]] = {}
    for task_id in dict.fromkeys((*(id for id in run.told if id in run.seen), *run.seen)):
        if run.seen[task_id].split == "search":
            tasks.setdefault(run.candidate_of(task_id), []).append(run.seen[task_id])
    return tasks


def product_of(run: Run) -> Product | None:
    """The objective of a run. None for one that is not ours: it would have to be imported, and a stranger names it."""
    settings = dict(run.plan.objective)
    if settings.pop("_target_", None) != f"{Product.__module__}.{Product.__qualname__}":
        return None
    try:
        return Product.model_validate(settings)
    except ValidationError:
        return None  # weights that no search of ours has


def _fitness(run: Run, population: Sequence[str]) -> dict[str, float]:
    """F of the living."""
    members = {id: run.seen[id].measurement for id in population if id in run.seen}
    measured = {id: measurement for id, measurement in members.items() if measurement is not None}
    product = product_of(run)
    try:
        return dict(zip(measured, product.fitness(list(measured.values())), strict=True)) if product else {}
    except (ValueError, OverflowError):
        return {}  # figures that no search of ours has


def _of_base(base: Measurement | None) -> dict[str, Any]:
    if base is None:
        return {}
    return {
        "noise": noise(base),
        "base_quality": next(iter(base.metrics.values())),
        "base_model_bytes": base.model_bytes,
        "base_peak_bytes": base.peak_bytes,
    }


def _figures(measurement: Measurement | None) -> dict[str, Any]:
    if measurement is None:
        return {}
    name, quality = next(iter(measurement.metrics.items()))
    structure = measurement.structure
    return {
        "metric": name,
        "quality": quality,
        "quality_error": measurement.standard_errors.get(name, math.nan),
        **{f"search_{metric}": value for metric, value in measurement.metrics.items()},
        "heads": structure and "-".join(map(str, structure.heads)),
        "ffn": structure and "-".join(map(str, structure.ffn)),
        "latency_ms": median(measurement.latency_ms),
        "base_latency_ms": median(measurement.base_latency_ms),
        "speed_up": speed_up(measurement),
        "speed_up_best": speed_up(measurement, "best") if measurement.base_best_latency_ms else math.nan,
        "timings": len(measurement.timings),
        "speed_up_spread": speed_up_spread(measurement),
        "model_bytes": measurement.model_bytes,
        "parameters": measurement.parameters,
        "encoder_parameters": measurement.encoder_parameters,
        "predicted": measurement.predicted,
        "peak_bytes": measurement.peak_bytes,
        "enqueue_share": measurement.enqueue_share,
        "device": measurement.device,
    }


def _report_figures(run: Run, report_id: str) -> dict[str, Any]:
    seen = run.seen.get(report_id)
    if seen is None or seen.measurement is None:
        return {}
    name, quality = next(iter(seen.measurement.metrics.items()))
    return {
        "report_quality": quality,
        "report_quality_error": seen.measurement.standard_errors.get(name, math.nan),
        **{f"report_{metric}": value for metric, value in seen.measurement.metrics.items()},
        "report_latency_ms": median(seen.measurement.latency_ms),
    }


def csv_of(table: pd.DataFrame) -> str:
    """A table as a csv file that is safe in a spreadsheet."""
    return table.map(door.cell).rename(columns=door.one_line).to_csv(index=False)


# --- questions ---


def front(candidates: pd.DataFrame, objectives: Sequence[Objective] = OBJECTIVES) -> pd.DataFrame:
    """The candidates of each run that no other one of it beats in every objective, the best quality first."""
    kept = []
    for _, own in measured(candidates).groupby("folder", sort=False):
        best = own[fronts.nondominated(_vectors(own.sort_values("candidate"), objectives))[_places(own)]]
        kept.append(best.sort_values(["quality", "candidate"], ascending=[False, True]))
    return pd.concat(kept) if kept else candidates.iloc[:0]


def hypervolume(candidates: pd.DataFrame, objectives: Sequence[Objective] = OBJECTIVES) -> "pd.Series[float]":
    """By `folder`, the volume that a run's candidates dominate; `search.front` fixes its scale."""
    own = measured(candidates).groupby("folder", sort=False)
    volumes = {folder: fronts.hypervolume(_vectors(rows, objectives), objectives) for folder, rows in own}
    return pd.Series(volumes, name="hypervolume", dtype=float).rename_axis("folder")


def fitness(candidates: pd.DataFrame, a: float = 5, b: float = 1, c: float = 1) -> "pd.Series[float]":
    """F = (Q / Qmax)^a * (Tmin / T)^b * (Mmin / M)^c of each candidate among those of its run in the table.

    a, b, c: weights of quality, speed and bytes. T is in units of the base model's time, in 16 bits where it was timed so. As
    `search.objective.Product`: a quality of 0 or less gives 0 if a > 0. Missing for a candidate that was not measured.
    """
    if min(a, b, c) < 0:
        raise ConfigError(f"a={a}, b={b}, c={c}: a weight is 0 or more")
    known = measured(candidates)
    speed = known["speed_up_best"].fillna(known["speed_up"])
    gain = known["quality"].clip(lower=0) ** a
    scores = gain * speed**b / known["model_bytes"].astype(float) ** c
    ideal = pd.DataFrame({"gain": gain, "speed": speed, "bytes": known["model_bytes"].astype(float)}).groupby(known["folder"])
    largest, smallest = ideal.transform("max"), ideal.transform("min")
    scores = scores / (largest["gain"] * largest["speed"] ** b / smallest["bytes"] ** c)
    return scores.reindex(candidates.index).rename("fitness")


def best(
    candidates: pd.DataFrame,
    *,
    quality: float | None = None,
    speed_up: float | None = None,
    megabytes: float | None = None,
    by: By = "compromise",
) -> pd.Series | None:
    """The candidate to take among all that keep to some limits; None where there is none.

    quality: share of the base model's quality, at least, such as 0.99. speed_up: over the base model, at least. megabytes: of
    the saved model, at most.
    by: compromise is what `target` of a search goes by: the largest hypervolume by itself, so that whatever the limits leave
    open is good too. Or the best in one figure.
    """
    if by not in get_args(By):
        raise ConfigError(f"by={by!r}; choose one of {', '.join(get_args(By))}")
    known = measured(candidates)
    within = known[allowed(known, quality, speed_up, megabytes)]
    if within.empty:
        return None
    ranked = within.assign(score=scores_by(within)[by])
    return ranked.sort_values(["score", "quality", "candidate"], ascending=[False, False, True]).iloc[0].drop("score")


def allowed(
    known: pd.DataFrame, quality: float | None = None, speed_up: float | None = None, megabytes: float | None = None
) -> "pd.Series[bool]":
    """Which of the measured candidates keep to the limits of `best`."""
    keeps = pd.Series(True, index=known.index)
    if quality is not None:
        keeps &= kept_quality(known) >= quality - 1e-12
    if speed_up is not None:
        keeps &= known["speed_up"] >= speed_up
    if megabytes is not None:
        keeps &= known["model_bytes"] <= 1e6 * megabytes
    return keeps


def kept_quality(known: pd.DataFrame) -> "pd.Series[float]":
    """The share of the base model's quality that candidates have, as targets count it."""
    return 1 - (known["base_quality"] - known["quality"]) / known["base_quality"].abs().clip(lower=1e-12)


def scores_by(known: pd.DataFrame) -> pd.DataFrame:
    """One column for each way to choose in `best`; more is better."""
    volumes = np.prod(np.maximum(0.0, fronts.reference(OBJECTIVES) - _vectors(known, OBJECTIVES)), axis=1)
    return pd.DataFrame(
        {
            "compromise": volumes,
            "quality": known["quality"],
            "speed_up": known["speed_up"],
            "megabytes": -known["model_bytes"].astype(float),
        },
        index=known.index,
    )


def lineage(candidates: pd.DataFrame, candidate: str) -> pd.DataFrame:
    """A candidate and its parents, from the base model on; `added` says what each has that its parent has not.

    candidate: its id, or the first digits of it.

    Raises: ConfigError when the table has no such candidate, or several.
    """
    named = candidates[candidates["candidate"].str.startswith(candidate)]
    if len(named) != 1:
        raise ConfigError(
            f"candidate={candidate!r} names {len(named)} rows; give more digits of the id, or the rows of one run: "
            "table[table.run == NAME]"
        )
    own = candidates[candidates["folder"] == named["folder"].iloc[0]].set_index("candidate", drop=False)
    chain = [named["candidate"].iloc[0]]
    while (parent := own.loc[chain[-1], "parent"]) in own.index and parent not in chain:
        chain.append(parent)
    line = own.loc[chain[::-1]]
    genomes = [(str(genome), int(steps)) for genome, steps in zip(line["genome"], line["steps"], strict=True)]
    return line.assign(added=[added(*before, *now) for before, now in zip([("base", 0), *genomes], genomes, strict=False)])


def added(before: str, before_steps: int, now: str, now_steps: int) -> str:
    """The steps of a genome, in short, after those that it shares with its parent's; how it is deployed, if that changed."""
    old, new = ([] if genome == "base" else genome.split(" > ") for genome in (before, now))
    pairs = zip(old[:before_steps], new[:now_steps], strict=False)
    shared = next((index for index, pair in enumerate(pairs) if pair[0] != pair[1]), min(before_steps, now_steps))
    deploy = [] if old[before_steps:] == new[now_steps:] else new[now_steps:] or ["fp32"]
    return " > ".join([*new[shared:now_steps], *deploy])


def measured(candidates: pd.DataFrame) -> pd.DataFrame:
    """Those whose figures can be compared."""
    figures = candidates[["quality", "base_quality", "speed_up", "model_bytes", "base_model_bytes"]].astype(float)
    return candidates.iloc[np.flatnonzero(np.isfinite(figures.to_numpy()).all(axis=1))]


def _places(own: pd.DataFrame) -> np.ndarray:
    """Of each row, its place among the rows sorted by id."""
    return np.argsort(np.argsort(own["candidate"].to_numpy(), kind="stable"), kind="stable")


def _vectors(known: pd.DataFrame, objectives: Sequence[Objective]) -> np.ndarray:
    """(rows, objectives) as `search.front.vector` of each candidate."""
    columns: list[Any] = []
    for name in objectives:
        if name == "quality":
            columns.append((1 - kept_quality(known)) / (1 - fronts.LEAST_QUALITY))
        elif name == "latency":
            columns.append(-np.log2(known["speed_up"]))
        elif name == "bytes":
            columns.append(np.log2(known["model_bytes"].astype(float) / known["base_model_bytes"].astype(float)))
        elif name == "peak_bytes":
            ratio = known["peak_bytes"].astype(float) / known["base_peak_bytes"].astype(float)
            columns.append(np.log2(ratio.where(ratio > 0, 1.0)))
        else:
            raise ConfigError(f"objectives={list(objectives)}: {name} is none of {', '.join(get_args(Objective))}")
    return np.column_stack([column.to_numpy(dtype=float) for column in columns])
