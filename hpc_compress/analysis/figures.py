"""Figures for a paper: every candidate in three views, and what was known over time. Knows pandas and matplotlib, no runs.

Colours are those of Okabe and Ito, which people with any kind of colour blindness tell apart; markers differ too, for print.

References:
    Okabe & Ito 2008, Color Universal Design, https://jfly.uni-koeln.de/color/
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from hpc_compress import door

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "^", "D", "v", "P", "X")
GREY, BLACK = "#999999", "#000000"
VIEWS = (("speed_up", "quality"), ("megabytes", "quality"), ("speed_up", "megabytes"))


def saved(figure: "Figure") -> dict[str, bytes]:
    """The contents of a png and of a pdf file, by these names."""
    png, pdf = io.BytesIO(), io.BytesIO()
    figure.savefig(png, dpi=150, format="png")
    figure.set_layout_engine("none")  # it has found its places, which takes longer than all the rest
    figure.savefig(pdf, format="pdf", metadata={"CreationDate": None})
    return {"png": png.getvalue(), "pdf": pdf.getvalue()}


def plot(candidates: pd.DataFrame, path: Path | io.BytesIO) -> None:
    """`of_candidates` as a png file."""
    of_candidates(candidates).savefig(path, dpi=150, format="png")


def of_candidates(candidates: pd.DataFrame) -> "Figure":
    """Quality against speed, quality against size, and size against speed: one row of panels a dataset.

    Bars are standard errors of the quality. One run: its front is marked. Several runs of a dataset: the front of each has a
    colour and a marker of its own.
    """
    from matplotlib.figure import Figure

    measured = candidates[candidates["status"] == "measured"].assign(megabytes=lambda table: table["model_bytes"] / 1e6)
    names = list(dict.fromkeys(measured["dataset"]))
    figure = Figure(figsize=(13, 4.4 * max(1, len(names)) + 0.6), layout="constrained")
    rows = figure.subplots(max(1, len(names)), len(VIEWS), squeeze=False)
    for panels, name in zip(rows, names, strict=False):
        of_dataset = measured[measured["dataset"] == name]
        for axes, (x, y) in zip(panels, VIEWS, strict=True):
            _view(axes, of_dataset, x, y)
        panels[1].set_title(f"{plain(name)}, {plain(of_dataset['device'].iloc[0])}", fontsize=10)
    _legend(figure, rows.flat)
    return figure


def _view(axes: Any, rows: pd.DataFrame, x: str, y: str) -> None:
    axes.scatter(rows[x], rows[y], s=16, facecolors="none", edgecolors=GREY, linewidths=0.8, label="candidate")
    runs = list(dict.fromkeys(rows["folder"]))
    for number, folder in enumerate(runs):
        own = rows[(rows["folder"] == folder) & rows["on_front"]]
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        label = "front" if len(runs) == 1 else f"front of {plain(own['run'].iloc[0] if len(own) else folder)}"
        _points(axes, own, x, y, color=color, marker=marker, markersize=6, label=label)
    _points(
        axes, rows[_is_baseline(rows)], x, y, color=COLORS[3], marker="d", markersize=8, label="base model, other precision"
    )
    _points(axes, rows[rows["generation"] == 0], x, y, color=BLACK, marker="s", markersize=8, label="base model")
    if len(runs) == 1:
        best = rows[rows["best"]]
        axes.scatter(best[x], best[y], s=190, facecolors="none", edgecolors=BLACK, marker="*", zorder=4, label="best")
    titles = {
        "speed_up": "speed-up over the base model",
        "megabytes": "size of the deployed model, MB",
        "quality": f"{plain(rows['metric'].iloc[0])} on the search split",
    }
    axes.set_xlabel(titles[x])
    axes.set_ylabel(titles[y])
    for name, scale, axis in ((x, axes.set_xscale, axes.xaxis), (y, axes.set_yscale, axes.yaxis)):
        if name != "quality" and rows[name].min() > 0 and rows[name].max() > 8 * rows[name].min():
            scale("log", base=2)
            axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(0.08)
    axes.grid(alpha=0.25)


def _points(axes: Any, rows: pd.DataFrame, x: str, y: str, **style: Any) -> None:
    if len(rows):
        errors = rows["quality_error"].fillna(0) if y == "quality" and rows["quality_error"].notna().any() else None
        axes.errorbar(rows[x], rows[y], yerr=errors, linestyle="none", elinewidth=0.8, capsize=2, **style)


def _is_baseline(rows: pd.DataFrame) -> "pd.Series[bool]":
    """The base model as it comes, in another precision."""
    return (rows["steps"] == 0) & (rows["deploy"] != "fp32")


def of_progress(curves: pd.DataFrame) -> "Figure":
    """Hypervolume on the search split against device seconds, one line a run; curves: as `compare.curve` gives them."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(curves["dataset"]))
    figure = Figure(figsize=(6.5 * max(1, len(names)), 4.6), layout="constrained")
    panels = figure.subplots(1, max(1, len(names)), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=False):
        rows = curves[curves["dataset"] == name]
        for number, (_, own) in enumerate(rows.groupby("folder", sort=False)):
            color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
            axes.step(
                own["device_seconds"],
                own["hypervolume_search"],
                where="post",
                color=color,
                marker=marker,
                markersize=5,
                label=plain(str(own["run"].iloc[0])),
            )
        axes.set_title(plain(name), fontsize=10)
        axes.set_xlabel("device seconds, summed over jobs")
        axes.set_ylabel("hypervolume on the search split")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    _legend(figure, panels)
    return figure


def _legend(figure: "Figure", panels: Any) -> None:
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, len(handles)), fontsize=9)


def plain(text: str) -> str:
    """A stranger's text for a picture."""
    return door.one_line(text, most=60).replace("$", r"\$")  # matplotlib takes what stands between two for a formula
