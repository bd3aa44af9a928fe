"""The report of finished runs: tables, page and figures, and the files that hold them. Reads records only; knows no torch."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from hpc_compress import door
from hpc_compress.analysis import compare, figures, found
from hpc_compress.analysis.candidates import csv_of, table_of
from hpc_compress.analysis.page import page
from hpc_compress.analysis.pairs import Pairs
from hpc_compress.analysis.runs import Run
from hpc_compress.config import ConfigError
from hpc_compress.search.objective import noise, quality_of, speed_up
from hpc_compress.store import write_atomically
from hpc_compress.summary import learnt, uncertain, with_error
from hpc_compress.types import Measurement

BOUND = 0.9  # an enqueue_share above it: the time is that of starting kernels

FRONT_COLUMNS = {  # of the table of a front; `device` and `times` where devices' files were given
    "dataset": "dataset",
    "device": "device",
    "times": "times",
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
FILES = (
    "report.html",
    "report.md",
    "report.csv",
    "candidates.csv",
    "candidates.parquet",
    *(f"{name}.{kind}" for name in ("candidates", "progress") for kind in ("png", "pdf")),
)


def report(runs: Sequence[Run]) -> pd.DataFrame:
    """The base model and the reported candidates of each run, measured on the report split.

    Columns: run, candidate, genome, quality_error (the standard error) and those of REPORT_COLUMNS. method: base model; best,
    the fittest; target, the one that comes nearest to the targets; next best; front, reported since it is on the front.

    Raises: ConfigError for a run that has not come to its end.
    """
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
            rows.append(report_row(run, candidate, methods[candidate], seen.genome, seen.measurement))
    if not rows:
        raise ConfigError("no candidate could be measured on the report split; start the search again, which tries once more")
    return pd.DataFrame(rows)


def report_row(run: Run, candidate: str, method: str, genome: str, measurement: Measurement) -> dict[str, Any]:
    name, quality = next(iter(measurement.metrics.items()))
    return {
        "run": run.root.name,
        "candidate": candidate,
        "dataset": run.plan.dataset.name,
        "method": method,
        "metric": name,
        "quality": quality,
        "quality_error": measurement.standard_errors.get(name, math.nan),
        "encoder_m": measurement.encoder_parameters / 1e6,
        "parameters_m": measurement.parameters / 1e6,
        "mb": measurement.model_bytes / 1e6,
        "latency_ms": median(measurement.latency_ms),
        "speed_up": speed_up(measurement),
        "speed_up_best": speed_up(measurement, "best") if measurement.base_best_latency_ms else math.nan,
        "noise": noise(measurement) if measurement.of_base and not measurement.predicted else math.nan,
        "device": measurement.device,
        "predicted": measurement.predicted,
        "enqueue_share": math.nan if measurement.enqueue_share is None else measurement.enqueue_share,
        "genome": genome,
    }


def _fronts(runs: Sequence[Run]) -> pd.DataFrame:
    """The models of each run that no other one beats in every objective, as measured on the search split.

    Columns: those of a report, report_quality and its standard error, which are missing for a model that was not measured on
    the report split. Where devices' files were given there is a front for each of them, and the columns device and times
    (measured or predicted).
    """
    rows = []
    for run in (each.on(device) for each in runs for device in range(len(each.views))):
        for candidate in found.front_of(run):
            seen = run.seen[candidate]
            assert seen.measurement is not None
            row = report_row(run, candidate, "front", seen.genome, seen.measurement)
            reported = run.seen.get(seen.report_id)
            there = reported.measurement if reported else None
            figures = {
                "report_quality": quality_of(there) if there else math.nan,
                "report_quality_error": there.standard_errors.get(row["metric"], math.nan) if there else math.nan,
            }
            on = {"device": seen.measurement.device, "times": found.times(seen.measurement)} if run.plan.devices else {}
            rows.append({**row, **figures, **on})
    return pd.DataFrame(rows, columns=list(rows[0]) if rows else ["run", *FRONT_COLUMNS])


def _front_text(runs: Sequence[Run], fronts: pd.DataFrame) -> list[str]:
    if fronts.empty:
        return []
    several = ["run"] if fronts["run"].nunique() > 1 else []
    with_errors = fronts.assign(quality=_with_errors(fronts, "quality"), report_quality=_with_errors(fronts, "report_quality"))
    titles = {name: title for name, title in FRONT_COLUMNS.items() if name in fronts}
    shown = with_errors[[*several, *titles]].rename(columns=titles)
    formats = (*("" for _ in (*several, *titles)[:-5]), "", "", ".1f", ".2f", "")
    cells = shown.map(door.markdown_cell).astype(object)
    table = cells.where(shown.notna(), None).to_markdown(
        index=False, floatfmt=formats, missingval="", disable_numparse=[len((*several, *titles)) - at for at in (5, 4)]
    )
    names = dict.fromkeys(", ".join(run.plan.config.objectives) for run in runs)
    return ["", "## Front", "", f"Models that no other one beats in all of {' or '.join(names)}:", "", table]


def on_targets(runs: Sequence[Run]) -> list[str]:
    """For each run with targets, a line on the model that comes nearest to them."""
    return _of_runs(runs, [nearest.text if (nearest := found.nearest(run)) else None for run in runs])


def to_deploy(runs: Sequence[Run]) -> list[str]:
    """For each run, a line on the model to deploy: the one nearest to the targets, or the fittest of a run without targets."""
    return _of_runs(runs, [choice.text if (choice := found.chosen(run)) else None for run in runs])


def _of_runs(runs: Sequence[Run], said: Sequence[str | None]) -> list[str]:
    names = [f"{run.root.name}: " if len(runs) > 1 else "" for run in runs]
    return [door.one_line(f"{name}{text}", most=1000) for name, text in zip(names, said, strict=True) if text is not None]


def as_text(table: pd.DataFrame) -> str:
    """A report as a Markdown table, genomes last, each quality with its standard error; below it the noise of its speed-ups."""
    names = ["run"] if table["run"].nunique() > 1 else []
    columns = [name for name in REPORT_COLUMNS if name != "speed_up_best" or table[name].notna().any()]
    shown = table.assign(quality=_with_errors(table, "quality"))[[*names, *columns, "genome"]].rename(columns=REPORT_COLUMNS)
    formats = (*("" for _ in names), "", "", "", "", ".2f", ".2f", ".1f", ".1f", ".2f", *(".2f" for _ in columns[9:]), "")
    text = shown.map(door.markdown_cell).to_markdown(index=False, floatfmt=formats, disable_numparse=[len(names) + 3])
    if table["noise"].notna().any():
        text += (
            f"\n\nNoise of a speed-up: two passes of the base model, one after the other, differ by at most "
            f"{table['noise'].max():.1%} in 9 of 10 cases."
        )
    if predicted := list(dict.fromkeys(table.loc[table["predicted"], "device"])):
        text += f"\n\nTimes are predicted for {door.one_line(', '.join(predicted))}; qualities and bytes are measured."
    if bound := int((table["enqueue_share"] > BOUND).sum()):
        text += (
            f"\n\n{bound} of these {len(table)} models keep the CPU busy for over {BOUND:.0%} of a pass: they wait for the "
            "start of kernels, so cuts hardly show in their time. Raise protocol.batch_size."
        )
    return text


def _with_errors(table: pd.DataFrame, name: str) -> Any:
    """A column of qualities, each with its standard error where that is known."""
    pairs = zip(table[name], table[f"{name}_error"], strict=True)
    return [None if math.isnan(value) else with_error(value, error) for value, error in pairs]


def verdicts(runs: Sequence[Run]) -> list[str]:
    """For each run, whether the model to deploy is really worse than the base model, and really better than the next one."""
    lines = []
    for run in runs:
        choice, pairs = found.chosen(run), Pairs(run)
        if choice is None:
            continue
        others = {"the base model": run.base_id, "the next one": choice.next}
        name = f"{run.root.name}: " if len(runs) > 1 else ""
        for word, other in others.items():
            said = pairs.difference(choice.candidate, other) if other not in (None, choice.candidate) else None
            if said is not None and said.error is not None:
                whom = f"{word} ({other})" if other == choice.next else word
                lines.append(door.one_line(f"{name}{choice.candidate} against {whom}: {said}"))
    return lines


def write_report(runs: Sequence[Run], folder: Path) -> pd.DataFrame:
    """Write `FILES` into a folder; returns the report.

    report.html is the page, with all that is below; report.md and report.csv hold the reported models and the front (the column
    `split` says on which split a row was measured); candidates.* every candidate; progress.* the hypervolume over time.

    Raises: ConfigError for a run that has not come to its end, or a folder that can't be written to.
    """
    table, candidates, fronts = report(runs), table_of(runs), _fronts(runs)
    curves = pd.concat([compare.curve(run).assign(folder=str(run.root)) for run in runs], ignore_index=True)
    targets = [line for said in on_targets(runs) for line in ("", f"{said[0].upper()}{said[1:]}.")]
    compared = [line for said in verdicts(runs) for line in ("", f"{said}.")]
    text = "\n".join([as_text(table), *targets, *compared, *_front_text(runs, fronts), *_on_the_data(runs)])
    both = pd.concat([table.assign(split="report"), fronts.assign(split="search")], ignore_index=True)
    pictures = {"candidates": figures.of_candidates(candidates), "progress": figures.of_progress(curves)}
    contents: dict[str, str | bytes] = {
        "report.html": page(runs, candidates),
        "report.md": text + "\n",
        "report.csv": csv_of(both),
        "candidates.csv": csv_of(candidates),
        "candidates.parquet": candidates.to_parquet(index=False),
        **{f"{name}.{kind}": content for name, drawn in pictures.items() for kind, content in figures.saved(drawn).items()},
    }
    try:
        for name in FILES:
            write_atomically(folder / name, contents[name])
    except OSError as error:
        raise ConfigError(f"the report can't be written to {folder} ({error.strerror}); choose a folder with --out") from None
    return table


def _on_the_data(runs: Sequence[Run]) -> list[str]:
    """Under a report: which rows the splits share; and a warning if the base model has learnt nothing, or if its quality is
    too uncertain to choose models by it."""
    lines = []
    for run in runs:
        said = [] if run.plan.rows is None else run.plan.rows.lines()
        bases = ((id, seen.report_id) for id, seen in run.seen.items() if seen.is_base and seen.split == "search")
        on_search, on_report = map(run.outcomes.get, next(bases, ("", "")))
        hardly = learnt(run.plan, on_report) if on_report else None
        if doubt := hardly[0] if hardly else on_search and uncertain(on_search):
            said.append(f"warning: {doubt}")
        if said:
            name = f"{run.plan.dataset.name} ({run.root.name})"
            lines += ["", f"{door.one_line(name)}:", "", *(f"- {door.one_line(line)}" for line in said)]
    return lines
