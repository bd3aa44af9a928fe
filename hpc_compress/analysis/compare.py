"""Compares strategies by what they find with equal device seconds. Reads run folders; knows pandas and matplotlib, no torch.

The figure is the hypervolume of `search.front`. Its curve over time is that of the search split: at each moment the candidates
known until then, by all timings that they ever got. The final front is measured anew on the report split; that figure decides.

References:
    Wilcoxon 1945, Individual Comparisons by Ranking Methods (signed-rank test of pairs)
    Lopez-Ibanez et al. 2010, Exploratory Analysis of Stochastic Local Search Algorithms in Biobjective Optimization (curves)
"""

import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

from hpc_compress import door
from hpc_compress.analysis import found
from hpc_compress.analysis.candidates import csv_of
from hpc_compress.analysis.figures import plain
from hpc_compress.analysis.runs import Run, find_runs, open_runs
from hpc_compress.config import ConfigError
from hpc_compress.search import front
from hpc_compress.search.objective import quality_of, speed_up
from hpc_compress.store import write_atomically

ENOUGH_PAIRS = 6  # with fewer, a two-sided Wilcoxon test can't give p < 0.05
STYLES = (("-", "x"), ("--", "+"), (":", "1"))  # line and marker of the first ten strategies, of the next ten, ...
EARLY = 0.9  # of the reference's device seconds; a run that ended before had less to spend


def strategy_of(run: Run) -> str:
    """A folder that is named STRATEGY-SEED says which strategy this is; else it is called by its class."""
    named = re.fullmatch(r"(.+)-(\d{1,9})", run.root.name)
    if named and int(named[2]) == run.plan.config.seed:
        return named[1]
    return class_of(run)


def class_of(run: Run) -> str:
    """The strategy's class, in lower case."""
    return str(run.plan.strategy.get("_target_", "unknown")).rsplit(".", 1)[-1].lower()


# --- a run ---


def device_seconds(run: Run) -> list[float]:
    """Time of jobs until the base model is known, and until each generation has ended, summed over jobs.

    As the driver counts it: the base model, its studies, screens, trainings, measurements and repeated timings. Without the
    probe, the report, and the timings after the last generation.
    """
    before = [
        seen for seen in run.seen.values() if seen.split == "search" and (seen.is_base or seen.study in ("survey", "profile"))
    ]
    spent = [sum(seen.seconds for seen in before)]
    counted = {run.base_id} if run.base is not None else set()
    for generation in run.generations:
        now = [task_id for task_id in dict.fromkeys((*generation.told, *generation.timed)) if task_id not in counted]
        counted.update(now)
        spent.append(spent[-1] + sum(run.seen[task_id].seconds for task_id in now if task_id in run.seen))
    return spent


def curve(run: Run) -> pd.DataFrame:
    """What a run knew after each generation; generation 0 is the base model alone.

    Columns: run, strategy, seed, dataset, generation, device_seconds (with the timings at the end in the last row), measured
    (candidates), hypervolume_search, hypervolume_report (of the final front: in the last row of a finished run only).
    """
    base, objectives, told = run.base, run.plan.config.objectives, run.told
    born: dict[int, list[np.ndarray]] = {}
    for candidate in found.measured(run):
        assert base is not None
        assert candidate.measurement is not None
        vector = found.vector(run, candidate.measurement, base)
        if vector is not None:
            born.setdefault(told.get(candidate.id, 0), []).append(vector)
    seconds = device_seconds(run)
    rows: list[dict[str, Any]] = []
    known, number = np.zeros((0, len(objectives))), 0
    for index, generation in enumerate([0, *(record.number for record in run.generations)]):
        new = born.get(generation, [])
        number += len(new)
        known = np.vstack([known, *new])
        known = known[front.nondominated(known)]
        rows.append(
            {
                "run": run.root.name,
                "strategy": strategy_of(run),
                "seed": run.plan.config.seed,
                "dataset": run.plan.dataset.name,
                "generation": generation,
                "device_seconds": seconds[index],
                "measured": number,
                "hypervolume_search": front.hypervolume(known, objectives),
                "hypervolume_report": math.nan,
            }
        )
    if run.result is not None:
        rows[-1]["device_seconds"] += sum(run.seen[id].seconds for id in run.result.timed if id in run.seen)
        rows[-1]["hypervolume_report"] = _on_report(run)
    return pd.DataFrame(rows)


def points(run: Run) -> list[dict[str, float]]:
    """What a run knew after each generation, in numbers for a tracker: generation, device_hours, models that were measured,
    hypervolume, and quality, speed_up and megabytes of the fittest model on the search split."""
    found_points = []
    fittest = {0: run.base_id} | {record.number: record.population[0] for record in run.generations if record.population}
    for row in curve(run).to_dict("records"):
        number = int(row["generation"])
        point = {
            "generation": number,
            "device_hours": row["device_seconds"] / 3600,
            "models": row["measured"],
            "hypervolume": row["hypervolume_search"],
        }
        seen = run.seen.get(fittest.get(number, ""))
        if seen is not None and seen.measurement is not None:
            best = seen.measurement
            point |= {"quality": quality_of(best), "speed_up": speed_up(best), "megabytes": best.model_bytes / 1e6}
        found_points.append(point)
    return found_points


def _on_report(run: Run) -> float:
    """Of the final front as the report split measured it; models that it did not measure don't count."""
    reported = _reported(run)
    base = reported.pop(run.base_id, None) if run.base is not None else None
    if base is None:
        return math.nan
    vectors = [found.vector(run, measurement, base) for measurement in reported.values()]
    return front.hypervolume(np.array([vector for vector in vectors if vector is not None]), run.plan.config.objectives)


def _reported(run: Run) -> dict[str, Any]:
    """By candidate, the measurements on the report split of the base model and of the front."""
    ids = dict.fromkeys((*([run.base_id] if run.base is not None else ()), *found.front_of(run)))
    seen = {id: run.seen.get(run.seen[id].report_id) for id in ids}
    return {id: item.measurement for id, item in seen.items() if item is not None and item.measurement is not None}


# --- several ---


def curves(runs: Sequence[Run]) -> pd.DataFrame:
    """Of all runs, one row a generation.

    Raises: ConfigError for runs that can't be compared.
    """
    _require_comparable(runs)
    return pd.concat([curve(run) for run in runs], ignore_index=True)


def _require_comparable(runs: Sequence[Run]) -> None:
    """Raises: ConfigError unless runs on one dataset differ by strategy and seed alone."""
    first: dict[tuple[Any, ...], tuple[Run, Any]] = {}
    for run in runs:
        config, dataset, strategy = run.plan.config, run.plan.dataset.name, strategy_of(run)
        twin, _ = first.setdefault(("run", strategy, dataset, config.seed), (run, None))
        if twin is not run:
            raise ConfigError(
                f"{twin.root} and {run.root} are both {strategy} on {dataset} with seed={config.seed}; leave one of them out, "
                "or name their folders STRATEGY-SEED, such as genetic-0"
            )
        alike: dict[tuple[Any, ...], Any] = {
            ("base models", dataset, config.seed): run.plan.base.fingerprint,
            ("objectives", dataset): config.objectives,
            ("protocols", dataset): config.protocol,
            ("rows", dataset, config.seed): run.plan.dataset.fingerprint,
        }
        if run.base:
            alike["devices", dataset] = run.base.device
        for key, value in alike.items():
            other, wanted = first.setdefault(key, (run, value))
            if value != wanted:
                raise ConfigError(f"{other.root} and {run.root} have different {key[0]}, so they can't be compared")


def table_of_ends(paths: Path | str | Iterable[Path | str], reference: str | None = None) -> pd.DataFrame:
    """One row a run, with the columns of `ends`: what each strategy found, and for how many device seconds.

    paths: as in `load_runs`; runs of one dataset may differ by strategy and seed only. reference: the strategy that others are
    compared with; None: genetic if it is there, else the first.

    Raises: ConfigError for runs that can't be compared, or a reference that is none of them.
    """
    table = curves(open_runs(find_runs(paths)))
    return ends(table, _reference(table, reference))


def _reference(table: pd.DataFrame, wanted: str | None) -> str:
    names = list(dict.fromkeys(table["strategy"]))
    chosen = wanted or ("genetic" if "genetic" in names else names[0])
    if chosen not in names:
        raise ConfigError(f"reference={chosen} is none of the strategies of these runs: {', '.join(names)}")
    return chosen


def ends(table: pd.DataFrame, reference: str) -> pd.DataFrame:
    """One row a run.

    Columns: those of `curve` at the run's end, hypervolume_equal (on the search split, after the device seconds of the shortest
    run on this dataset with this seed), seconds_needed (until it had the reference's final hypervolume on the search split;
    infinite: never), ratio (of its hypervolume on the report split to the reference's), time_ratio (of seconds_needed to what
    the reference needed itself).
    """
    rows = []
    for _, group in table.groupby(["dataset", "seed"], sort=False):
        each = {str(strategy): own for strategy, own in group.groupby("strategy", sort=False)}
        equal = min(own["device_seconds"].iloc[-1] for own in each.values())
        theirs = each.get(reference)
        goal, rival = (
            theirs[["hypervolume_search", "hypervolume_report"]].iloc[-1] if theirs is not None else (math.nan, math.nan)
        )
        for own in each.values():
            needed, end = _until(own, goal), own.iloc[-1]
            theirs_needed = _until(theirs, goal) if theirs is not None else math.nan
            rows.append(
                {
                    **end,
                    "hypervolume_equal": _at(own, equal),
                    "seconds_needed": needed,
                    "ratio": end["hypervolume_report"] / rival if rival > 0 else math.nan,
                    "time_ratio": needed / theirs_needed if theirs_needed > 0 else math.nan,
                }
            )
    return pd.DataFrame(rows)


def _until(own: pd.DataFrame, goal: float) -> float:
    """Device seconds until a hypervolume on the search split; infinite: never; NaN: there is no such goal."""
    reached = own.loc[own["hypervolume_search"] >= goal, "device_seconds"]
    return math.nan if math.isnan(goal) else (math.inf if reached.empty else float(reached.iloc[0]))


def _at(own: pd.DataFrame, seconds: float) -> float:
    """The hypervolume on the search split that a run had after so many device seconds."""
    until = own.loc[own["device_seconds"] <= seconds, "hypervolume_search"]
    return 0.0 if until.empty else float(until.iloc[-1])


# --- text ---


def _table(last: pd.DataFrame) -> str:
    """By dataset and strategy, the medians over seeds, with the smallest and the largest value."""
    rows = []
    for (dataset, strategy), group in last.groupby(["dataset", "strategy"], sort=False):
        rows.append(
            {
                "dataset": dataset,
                "strategy": strategy,
                "seeds": len(group),
                "hypervolume, report split": _spread(group["hypervolume_report"], ".3f"),
                "of the reference's": _spread(group["ratio"], ".2f"),
                "hypervolume, search split": _spread(group["hypervolume_search"], ".3f"),
                "at equal seconds": _spread(group["hypervolume_equal"], ".3f"),
                "device seconds": _spread(group["device_seconds"], ".0f"),
                "seconds to the reference's end": _spread(group["seconds_needed"], ".0f"),
                "of what the reference took": _spread(group["time_ratio"], ".2f"),
            }
        )
    return pd.DataFrame(rows).map(door.markdown_cell).to_markdown(index=False, disable_numparse=True)


def _spread(values: "pd.Series[float]", form: str) -> str:
    """median (smallest to largest)"""
    known = sorted(value for value in values if not math.isnan(value))
    if not known:
        return "unknown"
    middle, low, high = (
        format(value, form) if math.isfinite(value) else "never"
        for value in (known[(len(known) - 1) // 2], known[0], known[-1])
    )
    if len(known) % 2 == 0 and math.isfinite(known[len(known) // 2]):
        middle = format(median(known), form)
    return middle if low == high else f"{middle} ({low} to {high})"


def _tests(last: pd.DataFrame, reference: str) -> list[str]:
    """For each other strategy, a paired test against the reference over all seeds of all datasets."""
    split = "report" if last["hypervolume_report"].notna().all() else "search"
    wide = last.pivot(index=["dataset", "seed"], columns="strategy", values=f"hypervolume_{split}")
    if reference not in wide:
        return []
    others = [name for name in dict.fromkeys(last["strategy"]) if name != reference]
    return [_test(name, reference, split, (wide[name] - wide[reference]).dropna().to_list()) for name in others]


def _test(name: str, reference: str, split: str, differences: Sequence[float]) -> str:
    from scipy.stats import wilcoxon

    pairs = len(differences)
    if pairs == 0:
        return f"{name} and {reference} have no dataset and seed in common, so there is nothing to test."
    # SciPy takes no sample without a difference.
    p = float(wilcoxon(differences).pvalue) if any(differences) else 1.0
    wins = sum(difference > 0 for difference in differences)
    line = (
        f"{name} against {reference}, {split} split: better in {wins} of n={pairs} pairs of one dataset and seed, median "
        f"difference {median(differences):+.3f}, p={p:.2g} (two-sided Wilcoxon signed-rank test)."
    )
    if pairs < ENOUGH_PAIRS:
        line += f" With {pairs} pairs p is {2 ** (1 - pairs):.2g} or more, so no difference can be significant at 5 %."
    return line


def _notes(runs: Sequence[Run], table: pd.DataFrame, reference: str) -> list[str]:
    """What a reader must know of single runs."""
    notes, last = [], ends(table, reference)
    keys = zip(last["strategy"], last["dataset"], last["seed"], strict=True)
    all_spent = dict(zip(keys, map(float, last["device_seconds"]), strict=True))
    for run in runs:
        key = (strategy_of(run), run.plan.dataset.name, run.plan.config.seed)
        spent, whole = all_spent[key], all_spent.get((reference, *key[1:]), 0.0)
        reported, on_front = _reported(run), found.front_of(run)
        if run.result is None:
            notes.append(f"{run.root.name} has not come to its end: only its curve so far is used.")
            continue
        if missing := sum(id not in reported for id in on_front):
            notes.append(
                f"{run.root.name} measured {len(on_front) - missing} of the {len(on_front)} models of its front on the report "
                "split, and the others don't count there; report_front=true measures all."
            )
        if spent < EARLY * whole:
            notes.append(f"{run.root.name} ended after {spent:.0f} s of the reference's {whole:.0f}: {run.result.stopped}.")
    return notes


# --- files ---


def write_comparison(roots: Iterable[Path], folder: Path, reference: str | None = None) -> str:
    """Write compare.md, compare.csv and compare.png into a folder; returns the text of the first.

    reference: the strategy that others are compared with; None: genetic if it is there, else the first.

    Raises: ConfigError for runs that can't be compared, a reference that is none of them, or a folder that can't be written to.
    """
    runs = open_runs(roots)
    table = curves(runs)
    chosen = _reference(table, reference)
    text = summary(table, chosen, runs[0].plan.config.objectives, _notes(runs, table, chosen))
    picture = io.BytesIO()
    plot(table, picture)
    try:
        write_atomically(folder / "compare.md", text)
        write_atomically(folder / "compare.csv", csv_of(table))
        write_atomically(folder / "compare.png", picture.getvalue())
    except OSError as error:
        raise ConfigError(f"{folder} can't be written to ({error.strerror}); choose a folder with --out") from None
    return text


def summary(table: pd.DataFrame, reference: str, objectives: Sequence[str], notes: Sequence[str] = ()) -> str:
    """What the curves of several runs show, in Markdown: the table of all strategies, the tests, and the notes."""
    last = ends(table, reference)
    lines = [
        f"Hypervolume of what each strategy found, as median (smallest to largest) over its seeds. Reference: {reference}. "
        f"Objectives: {', '.join(objectives)}. A single model with the base model's quality, half of its time and half of its "
        "bytes has a hypervolume of 1; a quality counts from 90 % of the base model's.",
        *_tests(last, reference),
        *notes,
    ]
    said = [door.one_line(line, most=1000) for line in lines]
    return "\n".join([said[0], "", _table(last), "", *(f"* {line}" for line in said[1:])]).rstrip() + "\n"


def plot(table: pd.DataFrame, path: Path | io.BytesIO) -> None:
    """Hypervolume against device seconds, one panel a dataset: the median over seeds, and a band from smallest to largest."""
    from matplotlib.figure import Figure

    drawn = table[np.isfinite(table["device_seconds"]) & (table["device_seconds"] > 0)]
    datasets, strategies = (list(dict.fromkeys(drawn[name])) for name in ("dataset", "strategy"))
    wide = min(2, max(1, len(datasets)))
    high = math.ceil(max(1, len(datasets)) / wide)
    figure = Figure(figsize=(7 * wide, 4.4 * high + 0.4), layout="constrained")
    panels = figure.subplots(high, wide, squeeze=False).ravel()
    for axes in panels[len(datasets) :]:
        axes.set_axis_off()
    for axes, dataset in zip(panels, datasets, strict=False):
        rows = drawn[drawn["dataset"] == dataset]
        for number, strategy in enumerate(strategies):
            if len(own := rows[rows["strategy"] == strategy]):
                _draw(axes, own, f"C{number % 10}", *STYLES[number // 10 % len(STYLES)])
        axes.set_xscale("log")
        found = rows.loc[rows["hypervolume_search"] > 0, "device_seconds"]
        if len(found):
            axes.set_xlim(left=found.min() / 2)
        seeds = rows["seed"].nunique()
        axes.set_title(f"{plain(dataset)} ({seeds} seed{'s' * (seeds > 1)})", fontsize=10)
        axes.set_xlabel("device seconds, all stages")
        axes.set_ylabel("hypervolume on the search split")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    if len(datasets):
        handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        cross = panels[0].scatter([], [], color="black", marker="x", s=30)
        handles["final front on the report split"] = cross
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, len(handles)), fontsize=8)
    figure.savefig(path, dpi=130, format="png")


def _draw(axes: Any, own: pd.DataFrame, color: str, line: str, marker: str) -> None:
    """One strategy on one dataset. A run that has ended keeps what it had."""
    each = [run for _, run in own.groupby("seed", sort=False)]
    moments = np.unique(own["device_seconds"])
    values = np.array([[_at(run, moment) for moment in moments] for run in each])
    axes.fill_between(moments, values.min(axis=0), values.max(axis=0), step="post", color=color, alpha=0.15, linewidth=0)
    name = plain(own["strategy"].iloc[0])
    axes.plot(moments, np.median(values, axis=0), drawstyle="steps-post", color=color, linestyle=line, label=name)
    last = own[own["hypervolume_report"].notna()]
    axes.scatter(last["device_seconds"], last["hypervolume_report"], color=color, marker=marker, s=30)
