"""One self-contained HTML page about finished runs: which model to deploy, what it loses, and all that led to it.

What a run says is text or data, never markup or code: texts are escaped, figures lie in a script element of JSON, and by its
Content-Security-Policy the page runs no script but the two that this program wrote into it. Imports no torch.
"""

import functools
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import median
from string import Template
from typing import Any

import pandas as pd
import yaml

from hpc_compress import door
from hpc_compress.analysis import candidates as tables
from hpc_compress.analysis import compare, found, markup
from hpc_compress.analysis.candidates import added, kept_quality, product_of, scores_by, settings_of
from hpc_compress.analysis.markup import Markup, tag
from hpc_compress.analysis.pairs import Pairs
from hpc_compress.analysis.runs import Run, Seen
from hpc_compress.analysis.status import gpu_hours
from hpc_compress.analysis.structures import Drawing, drawing
from hpc_compress.config import ConfigError
from hpc_compress.deployment.schemes import SCHEMES
from hpc_compress.problems import problem
from hpc_compress.search.objective import noise, speed_up
from hpc_compress.store import folder_bytes
from hpc_compress.summary import with_error
from hpc_compress.types import Measurement

MOST_MOVES = 12  # rows of the table of operators
NONE = "unknown"


def page(runs: Sequence[Run], candidates: pd.DataFrame) -> str:
    """The page, complete. candidates: `candidates.table_of` the runs."""
    from plotly.offline import get_plotlyjs

    shown = [_Shown(run, candidates[candidates["folder"] == str(run.root)]) for run in runs]
    library, script = get_plotlyjs().replace("</script", "<\\/script"), _own("page.js")
    title = shown[0].name if len(shown) == 1 else f"{len(shown)} runs"
    return Template(_own("page.html")).substitute(
        title=tag("title", f"{title}: which model to deploy"),
        policy=f"{markup.hash_of(library)} {markup.hash_of(script)}",
        style=_own("page.css"),
        body=markup.joined([_overview(shown) if len(shown) > 1 else None, *(each.article() for each in shown)]),
        data=markup.data([each.data() for each in shown]),
        library=library,
        script=script,
    )


@functools.cache
def _own(name: str) -> str:
    return files("hpc_compress.analysis").joinpath(name).read_text(encoding="utf-8")


class _Shown:
    """One run on the page."""

    def __init__(self, run: Run, table: pd.DataFrame) -> None:
        self.run, self.table, self.name = run, table, run.root.name
        self.pairs, self.choice = Pairs(run), found.chosen(run)
        self.measured = tables.measured(table)
        self.front = tables.front(self.measured, run.plan.config.objectives)
        self.metric = run.plan.dataset.metrics[0]
        self.place = _short(run.root)
        self.by_id = self.measured.set_index("candidate")

    @functools.cached_property
    def curve(self) -> pd.DataFrame:
        return compare.curve(self.run)

    @property
    def hypervolume(self) -> float:
        return float(self.curve["hypervolume_search"].iloc[-1])

    # --- what the script draws ---

    def data(self) -> dict[str, Any]:
        rows, run = self.measured, self.run
        product = product_of(run)
        fitness = tables.fitness(rows, product.a, product.b, product.c) if product and len(rows) else pd.Series(dtype=float)
        places = {id: place for place, id in enumerate(rows["candidate"])}
        points = [
            {
                "id": row.candidate,
                "parent": places.get(row.parent, -1),
                "added": _added(self.by_id, row),
                "generation": int(row.generation),
                "quality": row.quality,
                "error": _number(row.quality_error),
                "report": _number(row.report_quality),
                "kept": 100 * kept,
                "speed": row.speed_up,
                "mb": row.model_bytes / 1e6,
                "front": bool(row.on_front),
                "kind": _kind(row),
                "heads": _text(row.heads),
                "ffn": _text(row.ffn),
                "deploy": row.deploy,
                "compromise": compromise,
                "fitness": _number(fitness.get(index)),
            }
            for (index, row), kept, compromise in zip(
                rows.iterrows(), kept_quality(rows), scores_by(rows)["compromise"], strict=True
            )
        ]
        curve, target = self.curve, run.plan.config.target
        return {
            "name": self.name,
            "folder": self.place,
            "metric": self.metric,
            "device": run.base.device if run.base else "",
            "points": points,
            "choice": self.choice.candidate if self.choice else None,
            "limits": {"quality": target.quality and 100 * target.quality, "speed": target.speed_up, "mb": target.megabytes},
            "by": "compromise" if target.wanted or not fitness.notna().any() else "fitness",
            "progress": {
                "seconds": curve["device_seconds"].tolist(),
                "hypervolume": curve["hypervolume_search"].tolist(),
                "measured": curve["measured"].tolist(),
            },
        }

    # --- what stands without a script ---

    def article(self) -> Markup:
        sections = [
            self._answer(),
            self._views(),
            _section("Progress", "What was known after how much work.", tag("div", class_="plot progress")),
            self._layers(),
            self._ancestry(),
            self._operators(),
            self._failures(),
            self._cost(),
            self._deploying(),
            self._repeating(),
        ]
        return tag("article", *sections, class_="run", data_name=self.name)

    def _answer(self) -> Markup:
        """The first screen: which one to deploy, and what is lost."""
        run, choice = self.run, self.choice
        if choice is None or choice.candidate not in self.by_id.index:
            return tag("section", tag("h1", f"{self.name}: no model can be compared with the base model"), class_="answer")
        _, model, base = self.judged(choice.candidate)
        headline = "Deploy the base model itself: nothing better was found"
        if choice.candidate != run.base_id:
            headline = self.gains(model, base)
        best = run.root / "best"
        there = _short(best) if best.is_dir() else None
        command = tag("code", self.export(choice.candidate))
        return tag(
            "section",
            tag(
                "p",
                f"{run.plan.base.name} on {run.plan.dataset.name}, run {self.name}. Deploy candidate ",
                tag("code", choice.candidate, class_="chosen-id"),
                ":",
                class_="eyebrow",
            ),
            tag("h1", headline),
            tag("div", *self._cards(choice), class_="cards"),
            tag(
                "div",
                tag("p", "Why this one: ", choice.why, "."),
                tag("p", "It lies in ", tag("code", there), ". Write it elsewhere: ", command)
                if there
                else tag("p", "Get it: ", command),
                tag("pre", self._example(there or "model")),
                class_="how",
            ),
            class_="answer",
        )

    def gains(self, model: Measurement, base: Measurement) -> str:
        """In one line, what a model has over the base model, and what it loses."""
        share = model.model_bytes / base.model_bytes
        quality = f"{self.metric} {_quality(model, self.metric)} instead of {_quality(base, self.metric)}"
        return f"{speed_up(model):.1f}x as fast, {share:.0%} of the bytes, {quality}"

    def _cards(self, choice: found.Choice) -> list[Markup | None]:
        split, model, base = self.judged(choice.candidate)
        lost = self.pairs.difference(choice.candidate, self.run.base_id)
        return [
            _card(
                f"Quality ({self.metric}, {split} split)",
                _quality(model, self.metric),
                f"base model {_quality(base, self.metric)}",
                lost if choice.candidate != self.run.base_id else None,
            ),
            _card(
                "Speed",
                f"{speed_up(model):.2f}x",
                f"{median(model.latency_ms):.1f} ms instead of {median(model.base_latency_ms):.1f} ms for "
                f"{model.protocol.sentences} sentences at most",
                f"{model.device}; two passes of the base model differ by {noise(base):.1%}",
            ),
            _card(
                "Size",
                f"{model.model_bytes / 1e6:.1f} MB",
                f"instead of {base.model_bytes / 1e6:.1f} MB",
                f"{model.parameters / 1e6:.1f} M of {base.parameters / 1e6:.1f} M parameters; "
                + str(self.by_id.loc[choice.candidate, "deploy"]),
            ),
            self._next(choice),
        ]

    def judged(self, candidate: str) -> tuple[str, Measurement, Measurement]:
        """The split by which a candidate is told of, and what it and the base model have there: the report split, where the
        search has not chosen among noisy figures, or the search split if it was not measured there."""
        run = self.run
        ids = (run.seen[candidate].report_id, run.seen[run.base_id].report_id)
        model, base = (run.seen[id].measurement if id in run.seen else None for id in ids)
        if model is not None and base is not None:
            return "report", model, base
        own, before = run.seen[candidate].measurement, run.base
        assert own is not None
        assert before is not None
        return "search", own, before

    def export(self, candidate: str) -> str:
        return f"hpc-compress export {shlex.quote(self.place)} model/ --candidate {candidate}"

    def _next(self, choice: found.Choice) -> Markup | None:
        if choice.next is None or choice.next not in self.by_id.index:
            return None
        difference, (_, model, _) = self.pairs.difference(choice.candidate, choice.next), self.judged(choice.next)
        figures = f"{speed_up(model):.2f}x, {model.model_bytes / 1e6:.1f} MB"
        return _card(
            "The next one",
            tag("code", choice.next),
            f"{self.metric} {_quality(model, self.metric)}, {figures}",
            f"the first one has {difference}" if difference else None,
        )

    def _example(self, path: str) -> str:
        try:
            return problem(self.run.plan.dataset.problem).example(path, self.run.plan.dataset)
        except ConfigError as error:
            return str(error)

    def _views(self) -> Markup:
        slider = functools.partial(_slider, self.name)
        options = [
            ("fitness", "the objective of the search"),
            ("compromise", "a compromise of all three"),
            ("quality", "quality"),
            ("speed", "speed"),
            ("mb", "small size"),
        ]
        choose = tag(
            "select",
            *(tag("option", text, value=value) for value, text in options),
            class_="by",
            aria_label="what to prefer within the limits",
        )
        return _section(
            "Choose by your own limits",
            "Each point is a measured model. Figures are those of the search split, by which the search has chosen; bars are "
            "standard errors of the quality.",
            tag(
                "form",
                slider("mb", "at most", "MB"),
                slider("speed", "at least", "times as fast"),
                slider("quality", "at least", "% of the base model's quality"),
                tag("label", tag("span", "prefer "), choose),
                class_="limits",
            ),
            tag("p", class_="taken", role="status", aria_live="polite"),
            _legend(),
            tag("div", *(tag("div", class_=f"plot view view{number}") for number in range(3)), class_="views"),
            tag("noscript", "The figures need JavaScript; candidates.png shows the same."),
        )

    def _layers(self) -> Markup:
        drawings = [(row, drawing(self.run, row.candidate)) for row in self.front.pipe(_tuples)]
        cards = [_drawn(row, self.metric, plan) for row, plan in drawings if plan is not None]
        missing = len(drawings) - len(cards)
        note = f" {missing} models were measured by an earlier version and their files are gone." if missing else ""
        return _section(
            "Models of the front, layer by layer",
            "Attention heads, FFN neurons and precision that are left in each layer of the base model." + note,
            tag("div", *cards, class_="drawings"),
        )

    def _ancestry(self) -> Markup:
        if self.choice is None or self.choice.candidate not in set(self.table["candidate"]):
            return _section("How it came about", "No candidate was measured.")
        line = tables.lineage(self.table, self.choice.candidate)
        rows = [
            (
                tag("code", row.candidate),
                str(row.generation),
                row.added or "base model",
                _with(row.quality, row.quality_error),
                _figure(row.speed_up, ".2f"),
                _figure(row.model_bytes / 1e6 if pd.notna(row.model_bytes) else math.nan, ".1f"),
            )
            for row in line.pipe(_tuples)
        ]
        header = ("candidate", "generation", "what it adds to its parent", f"{self.metric}, search split", "speed-up", "MB")
        return _section(
            "How it came about", "The candidate and its parents, from the base model on.", markup.table(header, rows)
        )

    def _operators(self) -> Markup:
        moves = _moves(self.measured)
        header = (
            "what a child adds to its parent",
            "children",
            "on the front",
            f"change in {self.metric}",
            "times as fast",
            "times the bytes",
        )
        rows = [
            (
                move,
                str(len(group)),
                str(int(group["on_front"].sum())),
                _mean(group["quality"]),
                f"{group['speed'].median():.2f}",
                f"{group['bytes'].median():.2f}",
            )
            for move, group in moves
        ]
        text = (
            "Children against their parents on the search split: mean change with its standard error over children, and the "
            "median of speed and bytes. Most seen on the front first."
        )
        return _section("Which operators paid", text, markup.table(header, rows[:MOST_MOVES]))

    def _failures(self) -> Markup:
        failed = self.table[self.table["failure"].notna()]
        if failed.empty:
            return _section("Failures", "No candidate failed.")
        groups = (
            failed.fillna({"stage": NONE})
            .groupby(["status", "stage", "failure"], sort=False)["candidate"]
            .agg(["size", "first"])
        )
        rows = [
            (str(row.size), *row.Index, tag("code", row.first))
            for row in groups.sort_values("size", ascending=False).head(20).pipe(_tuples)
        ]
        text = f"{len(failed)} of {len(self.table)} candidates failed."
        return _section("Failures", text, markup.table(("candidates", "kind", "while at", "reason", "such as"), rows))

    def _cost(self) -> Markup:
        run = self.run
        parts: Counter[str] = Counter()
        for seen in run.seen.values():
            parts[_work(seen)] += seen.seconds  # type: ignore[assignment]
        total, gpu = sum(parts.values()), gpu_hours(run)
        rows = [(name, f"{seconds / 3600:.3f}", f"{seconds / max(total, 1e-9):.0%}") for name, seconds in parts.most_common()]
        rows.append(("in all", f"{total / 3600:.3f}", "100%"))
        size, known = _folder_mb(run.root), [seen.joules for seen in run.seen.values() if seen.joules is not None]
        lines = [
            f"{len(self.table)} candidates, {len(self.measured)} measured, in {len(run.generations)} generations",
            f"GPU hours: {gpu:.2f}" if gpu else "no GPU was used",
            f"energy of the GPUs: {sum(known) / 3.6e6:.3f} kWh, told for {len(known)} of {len(run.seen)} tasks"
            if known
            else None,
            f"disk: {size:.0f} MB in {self.place}" if size is not None else None,
            f"ended: {run.result.stopped}" if run.result else "not ended",
        ]
        items = tag("ul", *(tag("li", line) for line in lines if line))
        return _section("What it cost", "", items, markup.table(("work", "device hours", "share"), rows))

    def _deploying(self) -> Markup:
        wanted = dict.fromkeys((*(self.run.result.reported if self.run.result else ()), *self.front["candidate"]))
        rows = []
        for id in (id for id in wanted if id in self.by_id.index):
            (split, model, _), deploy = self.judged(id), str(self.by_id.loc[id, "deploy"])
            figures = (f"{speed_up(model):.2f}", f"{model.model_bytes / 1e6:.1f}")
            command = tag("code", self.export(id[:8]))
            rows.append((command, f"{_quality(model, self.metric)} ({split})", *figures, deploy, _needs(deploy)))
        header = ("command", self.metric, "speed-up", "MB", "deployed as", "needs")
        text = "Each command writes a folder with weights, tokenizer, loading code and card. Load it with the lines above."
        return _section("Load and deploy any of them", text, markup.table(header, rows))

    def _repeating(self) -> Markup:
        run, plan = self.run, self.run.plan
        where, revision = plan.environment, [f"revision {plan.base.revision}"] if plan.base.revision else []
        facts = [
            ("command", tag("code", said) if (said := _command(run.root)) else None),
            ("seed", str(plan.config.seed)),
            (
                "base model",
                ", ".join([plan.base.name, *revision, f"fingerprint {plan.base.fingerprint}"]),
            ),
            ("dataset", f"{plan.dataset.name}, fingerprint of all rows {plan.dataset.fingerprint}"),
            ("rows", markup.joined(tag("div", line) for line in plan.rows.lines()) if plan.rows else None),
            ("device", run.base.device if run.base else None),
            (
                "hpc_compress",
                f"{where.version}, commit {where.commit or 'unknown: installed from a package'}" if where else None,
            ),
            (
                "versions",
                ", ".join([f"Python {where.python}", *(f"{name} {version}" for name, version in where.packages.items())])
                if where
                else None,
            ),
            ("system", where.system if where else None),
        ]
        table = markup.table(("what", "as it was"), [(name, value) for name, value in facts if value is not None])
        missing = None if where else tag("p", "The run is of an earlier version, which did not record versions and commit.")
        damage = tag("ul", *(tag("li", line) for line in run.damage_lines())) if run.damage else None
        settings = markup.table(("setting", "value"), [(key, str(value)) for key, value in settings_of(run).items()])
        return _section(
            "Repeat it", "", table, missing, damage, tag("details", tag("summary", "The whole configuration"), settings)
        )


# --- several runs ---


def _overview(shown: Sequence[_Shown]) -> Markup:
    """Which model of which run to deploy, one row a run."""
    found_some = [each for each in shown if each.choice is not None and each.choice.candidate in each.by_id.index]
    datasets = dict.fromkeys(each.run.plan.dataset.name for each in found_some)
    header = ("run", "dataset", "deploy", "its quality", "against the base model", "speed-up", "MB", "hypervolume")
    headlines = [_headline([each for each in found_some if each.run.plan.dataset.name == name]) for name in datasets]
    first = headlines[0][0] if headlines else shown[0]
    options = (
        tag("option", each.name, value=number, selected="" if each is first else None) for number, each in enumerate(shown)
    )
    return tag(
        "section",
        tag("p", f"{len(shown)} runs", class_="eyebrow"),
        *(headline for _, headline in headlines),
        markup.table(header, [_overview_row(each) for each in shown]),
        _over_seeds(found_some),
        tag("div", class_="plot all-progress"),
        tag(
            "label",
            tag("span", "details of the run "),
            tag("select", *options, class_="pick", aria_label="run"),
            class_="picker",
        ),
        class_="answer overview",
    )


def _overview_row(each: _Shown) -> tuple[object, ...]:
    first = (tag("strong", each.name), each.run.plan.dataset.name)
    if each.choice is None or each.choice.candidate not in each.by_id.index:
        return (*first, *[NONE] * 6)
    split, model, _ = each.judged(each.choice.candidate)
    lost = each.pairs.difference(each.choice.candidate, each.run.base_id)
    return (
        *first,
        tag("code", each.choice.candidate[:8]),
        f"{each.metric} {_quality(model, each.metric)} ({split})",
        lost or NONE,
        f"{speed_up(model):.2f}",
        f"{model.model_bytes / 1e6:.1f}",
        f"{each.hypervolume:.3f}",
    )


def _headline(runs: Sequence[_Shown]) -> tuple[_Shown, Markup]:
    """Of all runs on a dataset the one whose model is the best compromise by itself, and a line on it."""

    def alone(each: _Shown) -> float:
        assert each.choice is not None
        return float(scores_by(each.by_id.loc[[each.choice.candidate]])["compromise"].iloc[0])

    each = max(runs, key=alone)
    assert each.choice is not None
    _, model, base = each.judged(each.choice.candidate)
    name = f"{each.run.plan.dataset.name}: deploy {each.choice.candidate[:8]} of {each.name}"
    return each, tag("h1", f"{name}: {each.gains(model, base)}")


def _differences(settings: "pd.Series[Any]") -> list[str]:
    """What tells the settings of each run from those of the others."""
    varied = [key for key in settings.iloc[0] if len({own.get(key) for own in settings}) > 1]
    return ["".join(f", {key}={own.get(key)}" for key in varied) for own in settings]


def _over_seeds(runs: Sequence[_Shown]) -> Markup | None:
    """Runs that differ by seed alone: means with their standard errors over seeds."""
    rows = []
    for each in runs:
        assert each.choice is not None
        _, model, _ = each.judged(each.choice.candidate)
        free = ("seed", "name", "budget.device_hours")
        settings = {key: str(value) for key, value in sorted(settings_of(each.run).items()) if key not in free}
        figures = (model.metrics[each.metric], speed_up(model), model.model_bytes / 1e6, each.hypervolume)
        name = f"{compare.strategy_of(each.run)} on {each.run.plan.dataset.name}"
        rows.append((settings, name, *figures))
    table = pd.DataFrame(rows, columns=["settings", "runs", "quality", "speed", "mb", "hypervolume"])
    table["runs"] += table.groupby("runs")["settings"].transform(_differences)
    table["settings"] = table["settings"].map(str)
    forms = {"quality": ".3f", "speed": ".2f", "mb": ".1f", "hypervolume": ".3f"}

    def mean(own: pd.DataFrame, name: str) -> str:
        values = own[name].to_numpy(dtype=float)
        return f"{values.mean():{forms[name]}} ± {values.std(ddof=1) / math.sqrt(len(values)):{forms[name]}}"

    groups = [own for _, own in table.groupby("settings", sort=False) if len(own) > 1]
    found_rows = [(own["runs"].iloc[0], str(len(own)), *(mean(own, name) for name in forms)) for own in groups]
    header = ("runs that differ by seed", "seeds", "quality", "speed-up", "MB", "hypervolume")
    return markup.table(header, found_rows) if found_rows else None


# --- parts ---


def _section(heading: str, text: str, *children: object) -> Markup:
    return tag("section", tag("h2", heading), tag("p", text) if text else None, *children)


def _card(name: str, value: object, *lines: object) -> Markup:
    return tag(
        "div", tag("h3", name), tag("p", value, class_="value"), *(tag("p", line) for line in lines if line), class_="card"
    )


def _slider(run: str, name: str, word: str, unit: str) -> Markup:
    control = tag("input", type="range", class_=f"limit {name}", aria_label=f"{word} {unit}")
    return tag("label", tag("span", f"{word} ", tag("output"), f" {unit}"), Markup(control.removesuffix("</input>")))


def _legend() -> Markup:
    marks = (
        ("base", "base model"),
        ("baseline", "base model, other precision"),
        ("front", "front"),
        ("candidate", "candidate"),
        ("ring", "the one to take"),
    )
    return tag("ul", *(tag("li", tag("i", class_=name), text) for name, text in marks), class_="legend")


def _drawn(row: Any, metric: str, plan: Drawing) -> Markup:
    def bar(kept: int | None, most: int) -> Markup:
        if kept is None:
            return tag("td", "dropped", class_="gone")
        return tag("td", tag("div", tag("b", style=f"width:{100 * kept / most:.1f}%"), tag("span", str(kept)), class_="bar"))

    rows = [
        tag(
            "tr",
            tag("th", str(layer.number), scope="row"),
            bar(layer.heads, plan.most_heads),
            bar(layer.ffn, plan.most_ffn),
            tag("td", layer.precision),
        )
        for layer in plan.layers
    ]
    head = tag(
        "tr",
        *(
            tag("th", name, scope="col")
            for name in ("layer", f"heads of {plan.most_heads}", f"FFN of {plan.most_ffn}", "precision")
        ),
    )
    title = f"{metric} {_with(row.quality, row.quality_error)}, {row.speed_up:.1f}x, {row.model_bytes / 1e6:.1f} MB"
    return tag(
        "figure",
        tag("figcaption", tag("code", row.candidate[:8]), " ", title),
        tag("table", tag("thead", head), tag("tbody", *rows)),
        class_="drawing",
    )


def _moves(measured: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """What children add to their parents, and how they compare with them: those most often on the front first."""
    by_id, rows = measured.set_index("candidate"), []
    for row in measured.pipe(_tuples):
        if row.parent not in by_id.index or not (said := _added(by_id, row)):
            continue
        parent = by_id.loc[row.parent]
        rows.append(
            {
                "move": " + ".join(dict.fromkeys(re.sub(r"_[\d.]+(#\d+)?$", "", step) for step in said.split(" > "))),
                "on_front": row.on_front,
                "quality": row.quality - parent["quality"],
                "speed": row.speed_up / parent["speed_up"],
                "bytes": row.model_bytes / parent["model_bytes"],
            }
        )
    if not rows:
        return []
    groups = [(str(move), group) for move, group in pd.DataFrame(rows).groupby("move", sort=False)]
    return sorted(groups, key=lambda item: (-item[1]["on_front"].sum(), -len(item[1]), item[0]))


def _work(seen: Seen) -> str:
    """What a task was for."""
    if seen.split == "report":
        return "report"
    if seen.study:
        return "screens and studies"
    if seen.repeats:
        return "repeated timings"
    return "base model" if seen.is_base else "training and measuring candidates"


def _added(by_id: pd.DataFrame, row: Any) -> str:
    """What a candidate adds to its parent, or to the base model where no parent is known."""
    known = row.parent in by_id.index
    before = (str(by_id.loc[row.parent, "genome"]), int(by_id.loc[row.parent, "steps"])) if known else ("base", 0)  # type: ignore[arg-type]
    return added(*before, str(row.genome), int(row.steps))


def _kind(row: Any) -> str:
    if row.generation == 0:
        return "base"
    return "baseline" if row.steps == 0 and row.deploy != "fp32" else "candidate"


def _needs(deploy: str) -> str:
    """What a deployed model asks of the place where it runs."""
    notes = [scheme.note for word in deploy.split(" > ") if (scheme := SCHEMES.get(word)) and scheme.note]
    return " ".join(notes).replace("`", "") or "transformers"


def _quality(measurement: Measurement, metric: str) -> str:
    return _with(measurement.metrics.get(metric, math.nan), measurement.standard_errors.get(metric))


def _tuples(table: pd.DataFrame) -> Iterator[Any]:
    """Rows, each with its columns as attributes."""
    yield from table.itertuples()


def _with(value: float, error: float | None) -> str:
    return NONE if pd.isna(value) else with_error(value, None if error is None or pd.isna(error) else error)


def _mean(values: "pd.Series[float]") -> str:
    error = f" ± {values.std(ddof=1) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{values.mean():+.3f}{error}"


def _figure(value: float, form: str) -> str:
    return NONE if pd.isna(value) else format(value, form)


def _number(value: Any) -> float | None:
    return None if value is None or pd.isna(value) or not math.isfinite(value) else float(value)


def _text(value: Any) -> str | None:
    return None if pd.isna(value) else str(value)


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _folder_mb(root: Path) -> float | None:
    try:
        return folder_bytes(root) / 1e6
    except OSError:
        return None


def _command(root: Path) -> str | None:
    """What was typed, as Hydra has recorded it."""
    try:
        text = door.read_bytes(door.inside(root, ".hydra", "overrides.yaml"), most=2**20).decode()
        words = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return None
    return shlex.join(["hpc-compress", "search", *(word for word in words if "HPC_COMPRESS_NOTES" not in word)])
