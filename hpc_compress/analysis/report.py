"""Tables and plots of runs. Reads records only; knows pandas and matplotlib, no torch."""

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
from pydantic import ValidationError

from hpc_compress import door
from hpc_compress.analysis import found
from hpc_compress.analysis.runs import Run, Seen, find_runs, open_run, open_runs
from hpc_compress.config import ConfigError
from hpc_compress.search.front import nondominated
from hpc_compress.search.objective import Product, noise, quality_of, speed_up, speed_up_spread
from hpc_compress.store import write_atomically
from hpc_compress.summary import learnt
from hpc_compress.types import Measurement

BOUND = 0.9  # an enqueue_share above it: the time is that of starting kernels

FRONT_COLUMNS = {  # of the table of a front
    "dataset": "dataset",
    "candidate": "candidate",
    "metric": "metric",
    "quality": "on the search split",
    "report_quality": "on the report split",
    "mb": "size, MB",
    "speed_up": "speed-up",
    "genome": "genome",
}
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
    "speed_up_best": "speed-up over 16-bit base",  # of the base model, where it was timed so
}


def load_runs(paths: Path | str | Iterable[Path | str]) -> pd.DataFrame:
    """Every candidate of some runs, one row each, in the order of birth.

    Columns: run, dataset, model, candidate, parent, generation, genome, steps, deploy, status (measured, screened, or the kind
    of failure), failure, fidelity (measured; or screened: its untrained model was only compared with the base model),
    divergence (of its latest screening), alive, best, on_front (no other candidate of its run is at least as good in every
    objective), fitness (F within the last population; missing for an own objective), metric, quality, search_<metric>,
    report_<metric>, latency_ms, base_latency_ms, report_latency_ms (of the first timing), speed_up (median of all timings),
    speed_up_best (over the base model in 16 bits), timings (how many), speed_up_spread (largest minus smallest), noise (how far
    the base model's speed-up over itself was from 1, for 9 of 10 pairs of passes), model_bytes, parameters, encoder_parameters,
    peak_bytes, enqueue_share (part of a pass until the CPU has sent all work to the GPU), seconds (of all of its tasks on the
    search split), device.

    What is missing or damaged in a run is named in the log, and the rest is shown.

    Raises: ConfigError for a path that holds no run.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    return _load(open_runs(find_runs(paths)))


def _load(runs: Sequence[Run]) -> pd.DataFrame:
    return pd.concat([_candidates(run) for run in runs], ignore_index=True)


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
                "dataset": run.plan.dataset.name,
                "model": run.plan.base.name,
                "candidate": candidate,
                "parent": parent,
                "generation": number,
                "genome": seen.genome,
                "steps": seen.steps,
                "deploy": seen.deploy,
                "status": seen.failure.kind if seen.failure else ("measured" if seen.measurement else "screened"),
                "failure": seen.failure.message if seen.failure else None,
                "fidelity": "measured" if seen.measurement else ("screened" if screens else None),
                "divergence": screens[-1].divergence if screens else math.nan,
                "alive": candidate in alive,
                "best": candidate == run.best,
                "on_front": candidate in front,
                "fitness": fitness.get(candidate, math.nan),
                "noise": noise(base) if base else math.nan,
                "seconds": sum(seen.seconds for seen in about),
                **_figures(seen.measurement, "search"),
                **_report_figures(run, seen.report_id),
            }
        )
    return pd.DataFrame(rows)


def _tasks(run: Run) -> dict[str, list[Seen]]:
    """By candidate, what became of its tasks on the search split, in the order in which selections looked at them."""
    tasks: dict[str, list[Seen]] = {}
    for task_id in dict.fromkeys((*(id for id in run.told if id in run.seen), *run.seen)):
        if run.seen[task_id].split == "search":
            tasks.setdefault(run.candidate_of(task_id), []).append(run.seen[task_id])
    return tasks


def _fitness(run: Run, population: Sequence[str]) -> dict[str, float]:
    """F of the living. Nothing for an objective that is not ours: it would have to be imported, and a stranger names it."""
    settings = dict(run.plan.objective)
    if settings.pop("_target_", None) != f"{Product.__module__}.{Product.__qualname__}":
        return {}
    members = {id: run.seen[id].measurement for id in population if id in run.seen}
    measured = {id: measurement for id, measurement in members.items() if measurement is not None}
    try:
        return dict(zip(measured, Product.model_validate(settings).fitness(list(measured.values())), strict=True))
    except (ValidationError, ValueError, OverflowError):
        return {}  # weights or figures that no search of ours has


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
        "speed_up_best": speed_up(measurement, "best") if measurement.base_best_latency_ms else math.nan,
        "timings": len(measurement.timings),
        "speed_up_spread": speed_up_spread(measurement),
        "model_bytes": measurement.model_bytes,
        "parameters": measurement.parameters,
        "encoder_parameters": measurement.encoder_parameters,
        "peak_bytes": measurement.peak_bytes,
        "enqueue_share": measurement.enqueue_share,
        "device": measurement.device,
    }


def _report_figures(run: Run, report_id: str) -> dict[str, Any]:
    seen = run.seen.get(report_id)
    if seen is None or seen.measurement is None:
        return {}
    figures = {f"report_{metric}": value for metric, value in seen.measurement.metrics.items()}
    return {**figures, "report_latency_ms": median(seen.measurement.latency_ms)}


# --- report ---


def report(roots: Sequence[Path]) -> pd.DataFrame:
    """The base model and the reported candidates of each run, measured on the report split.

    Columns: run, candidate, genome and those of REPORT_COLUMNS. method: base model; best, the fittest; target, the one that
    comes nearest to the targets; next best; front, reported since it is on the front.

    Raises: ConfigError for a run that has not come to its end.
    """
    return _report(open_runs(roots))


def _report(runs: Sequence[Run]) -> pd.DataFrame:
    rows = []
    for run in runs:
        if run.result is None:
            raise ConfigError(
                f"{run.root} has not come to its end; see `hpc-compress status {run.root}`, or start its search again"
            )
        nearest, fittest = found.nearest(run), run.result.reported[: run.plan.config.report_candidates]
        methods = {
            **dict.fromkeys(run.result.reported, "front"),
            **dict.fromkeys(fittest, "next best"),
            **({nearest.candidate: "target"} if nearest else {}),
            run.result.best: "best",
            run.result.base: "base model",
        }
        for candidate in dict.fromkeys((run.result.base, *run.result.reported)):
            seen = run.seen.get(run.seen[candidate].report_id) if candidate in run.seen else None
            if seen is None or seen.measurement is None:
                continue
            rows.append(_report_row(run, candidate, methods[candidate], seen.genome, seen.measurement))
    if not rows:
        raise ConfigError("no candidate could be measured on the report split; start the search again, which tries once more")
    return pd.DataFrame(rows)


def _report_row(run: Run, candidate: str, method: str, genome: str, measurement: Measurement) -> dict[str, Any]:
    name, quality = next(iter(measurement.metrics.items()))
    return {
        "run": run.root.name,
        "candidate": candidate,
        "dataset": run.plan.dataset.name,
        "method": method,
        "metric": name,
        "quality": quality,
        "encoder_m": measurement.encoder_parameters / 1e6,
        "parameters_m": measurement.parameters / 1e6,
        "mb": measurement.model_bytes / 1e6,
        "latency_ms": median(measurement.latency_ms),
        "speed_up": speed_up(measurement),
        "speed_up_best": speed_up(measurement, "best") if measurement.base_best_latency_ms else math.nan,
        "noise": noise(measurement) if measurement.of_base else math.nan,
        "enqueue_share": math.nan if measurement.enqueue_share is None else measurement.enqueue_share,
        "genome": genome,
    }


def _fronts(runs: Sequence[Run]) -> pd.DataFrame:
    """The models of each run that no other one beats in every objective, as measured on the search split.

    Columns: those of a report, and report_quality, which is missing for a model that was not measured on the report split.
    """
    rows = []
    for run in runs:
        for candidate in found.front_of(run):
            seen = run.seen[candidate]
            assert seen.measurement is not None
            row = _report_row(run, candidate, "front", seen.genome, seen.measurement)
            reported = run.seen.get(seen.report_id)
            quality = quality_of(reported.measurement) if reported and reported.measurement else math.nan
            rows.append({**row, "report_quality": quality})
    return pd.DataFrame(rows, columns=list(rows[0]) if rows else ["run", *FRONT_COLUMNS])


def _front_text(runs: Sequence[Run], fronts: pd.DataFrame) -> list[str]:
    if fronts.empty:
        return []
    several = ["run"] if fronts["run"].nunique() > 1 else []
    shown = fronts[[*several, *FRONT_COLUMNS]].rename(columns=FRONT_COLUMNS)
    formats = (*("" for _ in several), "", "", "", ".3f", ".3f", ".1f", ".2f", "")
    cells = shown.map(door.markdown_cell).astype(object)
    table = cells.where(shown.notna(), None).to_markdown(index=False, floatfmt=formats, missingval="")
    names = dict.fromkeys(", ".join(run.plan.config.objectives) for run in runs)
    return ["", "## Front", "", f"Models that no other one beats in all of {' or '.join(names)}:", "", table]


def on_targets(roots: Sequence[Path]) -> list[str]:
    """For each run with targets, a line on the model that comes nearest to them.

    Raises: DamageError for a run that can't be read.
    """
    return _on_targets([open_run(root) for root in roots])


def _on_targets(runs: Sequence[Run]) -> list[str]:
    named = [(run.root.name, nearest.text) for run in runs if (nearest := found.nearest(run))]
    return [door.one_line(f"{name}: {text}" if len(runs) > 1 else text, most=1000) for name, text in named]


def as_text(table: pd.DataFrame) -> str:
    """A report as a Markdown table, genomes last, and below it the noise of its speed-ups."""
    names = ["run"] if table["run"].nunique() > 1 else []
    columns = [name for name in REPORT_COLUMNS if name != "speed_up_best" or table[name].notna().any()]
    shown = table[[*names, *columns, "genome"]].rename(columns=REPORT_COLUMNS)
    formats = (*("" for _ in names), "", "", "", ".3f", ".2f", ".2f", ".1f", ".1f", ".2f", *(".2f" for _ in columns[9:]), "")
    text = shown.map(door.markdown_cell).to_markdown(index=False, floatfmt=formats)
    if table["noise"].notna().any():
        text += (
            f"\n\nNoise of a speed-up: two passes of the base model, one after the other, differ by at most "
            f"{table['noise'].max():.1%} in 9 of 10 cases."
        )
    if bound := int((table["enqueue_share"] > BOUND).sum()):
        text += (
            f"\n\n{bound} of these {len(table)} models keep the CPU busy for over {BOUND:.0%} of a pass: they wait for the "
            "start of kernels, so cuts hardly show in their time. Raise protocol.batch_size."
        )
    return text


def write_report(roots: Sequence[Path], folder: Path) -> pd.DataFrame:
    """Write report.md, report.csv, candidates.csv and candidates.png into a folder; returns the report.

    The first two hold the front too; the column `split` of report.csv says on which split a row was measured.

    Raises: ConfigError for a run that has not come to its end, or a folder that can't be written to.
    """
    runs = open_runs(roots)
    table, candidates, fronts = _report(runs), _load(runs), _fronts(runs)
    targets = [line for said in _on_targets(runs) for line in ("", f"{said[0].upper()}{said[1:]}.")]
    text = "\n".join([as_text(table), *targets, *_front_text(runs, fronts), *_on_the_data(runs)])
    both = pd.concat([table.assign(split="report"), fronts.assign(split="search")], ignore_index=True)
    picture = io.BytesIO()
    plot(candidates, picture)
    try:
        write_atomically(folder / "report.md", text + "\n")
        write_atomically(folder / "report.csv", csv_of(both))
        write_atomically(folder / "candidates.csv", csv_of(candidates))
        write_atomically(folder / "candidates.png", picture.getvalue())
    except OSError as error:
        raise ConfigError(f"the report can't be written to {folder} ({error.strerror}); choose a folder with --out") from None
    return table


def _on_the_data(runs: Sequence[Run]) -> list[str]:
    """Under a report: which rows the splits share, and whether the base model has learnt anything."""
    lines = []
    for run in runs:
        said = [] if run.plan.rows is None else run.plan.rows.lines()
        base = next((seen for seen in run.seen.values() if seen.is_base), None)
        outcome = run.outcomes.get(base.report_id) if base else None
        if outcome is not None and (hardly := learnt(run.plan, outcome)):
            said.append(f"warning: {hardly[0]}")
        if said:
            name = f"{run.plan.dataset.name} ({run.root.name})"
            lines += ["", f"{door.one_line(name)}:", "", *(f"- {door.one_line(line)}" for line in said)]
    return lines


def csv_of(table: pd.DataFrame) -> str:
    """A table as a csv file that is safe in a spreadsheet."""
    return table.map(door.cell).rename(columns=door.one_line).to_csv(index=False)


def plot(candidates: pd.DataFrame, path: Path | io.BytesIO) -> None:
    """Quality against speed and against size for every measured candidate, one column of panels a dataset.

    The line of a panel goes through the candidates that are best in its two figures; a ring marks who is on a run's front.
    """
    from matplotlib.figure import Figure

    measured = candidates[candidates["status"] == "measured"].assign(mb=lambda table: table["model_bytes"] / 1e6)
    names = list(dict.fromkeys(measured["dataset"]))
    figure = Figure(figsize=(7 * max(1, len(names)), 8.6), layout="constrained")
    panels = figure.subplots(2, max(1, len(names)), squeeze=False)
    for column, name in enumerate(names):
        rows = measured[measured["dataset"] == name]
        area = 300 * rows["model_bytes"] / rows["model_bytes"].max()
        _panel(panels[0][column], rows, "speed_up", area)
        _panel(panels[1][column], rows, "mb", 60.0 + 0 * area)
        panels[0][column].set_title(
            f"{plain(name)} (area: MB of the deployed model, at most {rows['mb'].max():.0f})", fontsize=10
        )
        panels[0][column].set_xlabel(f"speed-up over the base model on {plain(rows['device'].iloc[0])}")
        panels[1][column].set_xlabel("MB of the deployed model")
    figure.savefig(path, dpi=130, format="png")


def _panel(axes: Any, rows: pd.DataFrame, figure: str, area: pd.Series) -> None:
    """Quality against one figure: speed_up, of which more is better, or mb, of which less is."""
    x = rows[figure]
    marks = axes.scatter(x, rows["quality"], s=area, c=rows["generation"], cmap="viridis", alpha=0.75, linewidths=0)
    axes.figure.colorbar(marks, ax=axes, label="generation", ticks=sorted(set(rows["generation"])))
    front = rows["on_front"]
    axes.scatter(x[front], rows["quality"][front], s=area[front], facecolors="none", edgecolors="dimgray", label="on the front")
    better = -1 if figure == "speed_up" else 1
    line = rows[nondominated(np.column_stack([better * x, -rows["quality"]]))].sort_values(figure)
    steps = "steps-pre" if figure == "speed_up" else "steps-post"  # what quality is to be had at least that fast, or that small
    axes.plot(
        line[figure], line["quality"], drawstyle=steps, color="dimgray", linewidth=1, zorder=0.5, label="best in these two"
    )
    for label, chosen, color in (("base", rows["generation"] == 0, "black"), ("best", rows["best"], "crimson")):
        special = rows[chosen]
        axes.scatter(special[figure], special["quality"], s=area[special.index], facecolors="none", edgecolors=color)
        for _, row in special.iterrows():
            axes.annotate(label, (row[figure], row["quality"]), textcoords="offset points", xytext=(10, 8), color=color)
    axes.set_ylabel(f"{plain(rows['metric'].iloc[0])} on the search split")
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize=8)


def plain(text: str) -> str:
    """A stranger's text for a picture."""
    return door.one_line(text, most=60).replace("$", r"\$")  # matplotlib takes what stands between two for a formula
