"""What a sweep shows: the best model of each run against the settings in which the runs differ. Knows pandas; no torch.

The method's published tables and figures are of this form: methods on datasets; quality, size and time of the best model
against the weights of F; the same against the size of the population and the number of generations.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from hpc_compress import door
from hpc_compress.analysis.candidates import csv_of, settings_of
from hpc_compress.analysis.compare import class_of
from hpc_compress.analysis.figures import COLORS, MARKERS, plain, saved
from hpc_compress.analysis.report import report_row
from hpc_compress.analysis.runs import Run
from hpc_compress.records import FREE
from hpc_compress.store import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASE, BEST = "base model", "best"
OWN = ("dataset", "base", "strategy")  # what a run is of, besides its settings
FIGURES = {  # columns of a model, their names and their forms
    "quality": ("quality", ".3f"),
    "encoder_m": ("encoder, M", ".1f"),
    "parameters_m": ("parameters, M", ".1f"),
    "mb": ("size, MB", ".1f"),
    "latency_ms": ("inference, ms", ".1f"),
    "speed_up": ("speed-up", ".2f"),
}
DRAWN = ("quality", "mb", "speed_up")
ENOUGH = 5  # models from which a correlation is given


class Sweep(NamedTuple):
    """Runs that differ in some settings."""

    settings: tuple[str, ...]  # columns of both tables; the last words of the keys where these tell them apart
    # A row for the base model and one for the best model of each run; where nothing is cut, one for each precision. On the
    # report split if it was measured there. Columns: run, seed, `OWN`, settings, method, metric, quality_error and `FIGURES`.
    models: pd.DataFrame
    # A row for the fittest model after each generation of each run, on the search split. Columns: run, seed, `OWN`, settings,
    # generation and `DRAWN`.
    generations: pd.DataFrame


def sweep(runs: Sequence[Run]) -> Sweep:
    """Which settings differ, and what came of each run. Runs without a measured base model are left out."""
    runs = [run for run in runs if run.base is not None]
    varied = _varied(runs)
    named = _short(list(varied))
    models, generations = [], []
    for index, run in enumerate(runs):
        own = {
            "run": run.root.name,
            "seed": run.plan.config.seed,
            "dataset": run.plan.dataset.name,
            "base": Path(name).name if (name := run.plan.base.name).startswith("/") else name,
            "strategy": class_of(run),
            **{named[key]: values[index] for key, values in varied.items()},
        }
        models += [{**own, **row} for row in _models(run)]
        for generation in run.generations:
            fittest = run.seen.get(generation.population[0]) if generation.population else None
            if fittest is not None and fittest.measurement is not None:
                row = report_row(run, generation.population[0], BEST, fittest.genome, fittest.measurement)
                generations.append({**own, "generation": generation.number, **{name: row[name] for name in DRAWN}})
    return Sweep(tuple(named.values()), pd.DataFrame(models), pd.DataFrame(generations))


def write_sweep(runs: Sequence[Run], folder: Path) -> str:
    """Write sweep.md, sweep.csv, and sweep.png and sweep.pdf into a folder; returns the text of sweep.md."""
    found = sweep(runs)
    text = as_text(found)
    write_atomically(folder / "sweep.md", f"{text}\n")
    write_atomically(folder / "sweep.csv", csv_of(found.models))
    for kind, content in saved(drawn(found)).items():
        write_atomically(folder / f"sweep.{kind}", content)
    return text


def as_text(found: Sweep) -> str:
    """A Markdown table: medians over runs that differ by nothing but their seed, with the smallest and the largest."""
    models = found.models.copy()
    of_base = models["method"].str.startswith(BASE)  # which no setting of the search changes
    models.loc[of_base, ["strategy", *found.settings]] = None
    keys = [name for name in (*OWN, *found.settings) if found.models[name].nunique() > 1 or name == "dataset"]
    rows = []
    for values, group in (
        models.astype(dict.fromkeys(keys, object))
        .fillna(dict.fromkeys(keys, ""))
        .groupby([*keys, "method"], sort=False, dropna=False)
    ):
        named = dict(zip([*keys, "method"], map(_said, values), strict=True))
        figures = {title: spread(group[name], form) for name, (title, form) in FIGURES.items()}
        rows.append({**named, "runs": len(group), "metric": group["metric"].iloc[0], **figures})
    table = pd.DataFrame(rows).astype(str).map(door.markdown_cell).to_markdown(index=False, disable_numparse=True)
    notes = ["Each figure is the median of the runs, with the smallest and the largest one."]
    best = models[models["method"] == BEST]
    for dataset, group in best.groupby("dataset", sort=False):
        if len(group) >= ENOUGH and group["speed_up"].nunique() > 1 and group["mb"].nunique() > 1:
            rho = group["speed_up"].corr(group["mb"], method="spearman")
            notes.append(
                f"{door.one_line(str(dataset))}: of the {len(group)} best models, speed-up and size have a rank correlation of "
                f"{rho:.2f} (Spearman; -1: the smallest is always the fastest)."
            )
    return "\n\n".join([table, *notes])


def drawn(found: Sweep) -> "Figure":
    """Quality, size and speed-up of the best models. Where runs have generations and differ in a setting at most: after each
    generation. Else against the first setting that is a number, with a line for each value of the others."""
    from matplotlib.figure import Figure

    datasets = list(dict.fromkeys(found.models["dataset"]))
    figure = Figure(figsize=(4.2 * len(DRAWN), 3.6 * len(datasets) + 0.8), layout="constrained")
    panels = figure.subplots(len(datasets), len(DRAWN), squeeze=False)
    best = found.models[found.models["method"] == BEST]
    numbers = [name for name in found.settings if _is_number(best[name])]
    lines = [name for name in (*OWN[1:], *found.settings) if best[name].nunique() > 1]
    if len(numbers) < 2 and not found.generations.empty and found.generations["generation"].max() > 1:
        table, x = found.generations, "generation"
    else:
        table, x = best, numbers[0] if numbers else (lines or ["run"])[0]
    lines = [name for name in lines if name != x]
    for row, dataset in zip(panels, datasets, strict=True):
        own = table[table["dataset"] == dataset]
        base = found.models[(found.models["dataset"] == dataset) & (found.models["method"] == BASE)]
        for axes, name in zip(row, DRAWN, strict=True):
            _panel(axes, own, x, name, lines)
            axes.axhline(base[name].median(), color="#000000", linewidth=1, linestyle=":", label="base model")
            axes.set_xlabel(plain(x))
            axes.set_ylabel(FIGURES[name][0])
            axes.grid(alpha=0.25)
        row[0].set_ylabel(f"{plain(str(base['metric'].iloc[0]))}, {'search' if x == 'generation' else 'report'} split")
        row[1].set_title(plain(str(dataset)), fontsize=10)
    handles = {label: handle for axes in panels.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)), fontsize=9)
    return figure


def _panel(axes: Any, table: pd.DataFrame, x: str, name: str, lines: Sequence[str]) -> None:
    """Medians over seeds, and bars from the smallest to the largest."""
    from matplotlib.ticker import MaxNLocator

    number = _is_number(table[x])
    table = table if number else table.assign(**{x: table[x].astype(str)})
    values = list(dict.fromkeys(table[x].sort_values() if number else table[x]))
    places = {value: value if x == "generation" else place for place, value in enumerate(values)}
    lines = [key for key in lines if table[key].nunique() > 1]
    groups = list(table.groupby(lines, sort=True, dropna=False)) if lines else [((), table)]
    for index, (value, group) in enumerate(groups):
        label = ", ".join(f"{key}={_said(one)}" for key, one in zip(lines, value, strict=True)) or BEST
        of_seeds = group.groupby(x)[name]
        middle = of_seeds.median()
        ends = np.abs(np.stack([of_seeds.min() - middle, of_seeds.max() - middle]))
        aside = 0.0 if x == "generation" else 0.06 * (index - (len(groups) - 1) / 2)
        style = {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 5}
        at, joined = [places[one] + aside for one in middle.index], "-" if number else "none"
        axes.errorbar(at, middle, yerr=ends, linestyle=joined, capsize=2, label=plain(label), **style)
    if x == "generation":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.set_xticks(range(len(values)), [plain(_said(one)) for one in values])


def _models(run: Run) -> list[dict[str, Any]]:
    """The base model and the fittest one; where nothing was cut or trained, the base model in every precision."""
    wanted = {run.base_id: BASE}
    told = {task_id: run.seen[task_id] for task_id in run.told if task_id in run.seen and not run.seen[task_id].study}
    if all(seen.steps == 0 for seen in told.values()):
        wanted |= {task_id: f"{BASE}, {seen.deploy}" for task_id, seen in told.items()}
    elif run.best is not None and run.best != run.base_id:
        wanted[run.best] = BEST
    rows = []
    for task_id, method in wanted.items():
        seen = run.seen.get(task_id)
        if seen is None:
            continue
        reported = run.seen.get(seen.report_id)
        measurement = reported.measurement if reported and reported.measurement else seen.measurement
        if measurement is not None:
            rows.append(report_row(run, task_id, method, seen.genome, measurement))
    return rows


def _varied(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The value of each setting in each run, for those that differ and don't follow from the dataset, the base model, the
    strategy or an earlier setting."""
    settings = [settings_of(run) for run in runs]
    known = [(run.plan.dataset.name, run.plan.base.name, class_of(run)) for run in runs]
    free = {"name", "seed", *FREE}
    varied: dict[str, list[Any]] = {}
    for key in dict.fromkeys(key for own in settings for key in own):
        if key in free or key.split(".")[0] in free or key.endswith("_target_"):
            continue
        values = [own.get(key) for own in settings]
        seen = [known, *varied.values()]
        if len(set(map(str, values))) > 1 and not any(_follows(values, others) for others in seen):
            varied[key] = values
    return varied


def _follows(values: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether equal others always come with equal values."""
    met: dict[str, str] = {}
    return all(met.setdefault(str(other), str(value)) == str(value) for value, other in zip(values, others, strict=True))


def _short(keys: Sequence[str]) -> Mapping[str, str]:
    last = [key.rsplit(".", 1)[-1] for key in keys]
    taken = {"run", "seed", "method", "metric", "generation", *OWN, *FIGURES}
    return {key: word if last.count(word) == 1 and word not in taken else key for key, word in zip(keys, last, strict=True)}


def _is_number(values: "pd.Series[Any]") -> bool:
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)


def _said(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def spread(values: "pd.Series[float]", form: str) -> str:
    """The median, with the smallest and the largest where they differ."""
    middle, low, high = (f"{value:{form}}" for value in (values.median(), values.min(), values.max()))
    return middle if low == high else f"{middle} ({low} to {high})"
