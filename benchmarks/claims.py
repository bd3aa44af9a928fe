"""What the documents say about results, rendered from the csv files in results/. Knows pandas and scipy, nothing of models.

    python benchmarks/claims.py

rewrites what is between the marks `<!-- claims: NAME -->` and `<!-- /claims -->` in the documents. NAME is a key of `BLOCKS`.

A case is a dataset and a cut: ours against the best peer of this case, seeds averaged. Cases within 0.0005 are level.

The test is Wilcoxon's signed-rank test, two-sided. Its pairs are a dataset and a seed, with the difference averaged over the
cuts: cuts of one base model on the same sentences are no independent evidence. The test needs no common scale and no normal
distribution, since the datasets have different metrics. Seeds of one dataset still share a base model and validation rows,
so the true p is somewhat larger. The best peer is chosen on the same figures, which counts against ours.
"""

import re
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from hpc_compress.analysis import compare

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
DOCUMENTS = ("README.md", "docs/measurements.md", "results/compression.md", "results/compression_peers.md", "results/tokens.md")
BEGIN, END = "<!-- claims: {name} -->", "<!-- /claims -->"
OURS, BY_TIME, RESCORED, BASE = "ours, by parameters", "ours, by time", "ours, rescored", "base"
LEVEL = 0.0005
NOISE = 0.01
AMOUNTS = {0.33: "a third", 0.5: "half"}
COLUMNS = ["dataset", "cut", "peer", "seed", "lead"]
# What a genome's steps are called in the table of the demo. Every cut is followed by a training, which goes without saying.
STEPS = {
    "prune_0.25": "cut by a quarter",
    "carve": "cut",
    "fine_tune": "",
    "distill": "distilled",
    "trim_vocabulary": "vocabulary trimmed",
    "share_embeddings": "embeddings shared",
    "quantize_onnx_int8": "int8 for ONNX Runtime",
    "quantize_dynamic_int8": "dynamic int8",
    "quantize_nf4": "4 bits (nf4)",
}
ALL_TOKENS, PIECES, NEAREST = "all tokens", "smaller pieces", "nearest embedding"  # of benchmarks/vocabularies.py
TIMES = {1: "", 2: " twice", 3: " three times"}
STAGES = {  # of benchmarks/costs.py
    "base": "base model: trained and measured; the teacher's outputs",
    "survey": "scores and sizes",
    "profile": "the device's profile",
    "screen": "structures screened",
    "rescore": "structures scored anew block by block",
    "untrained": "models measured untrained",
    "trained": "models trained and measured",
    "again": "models timed again",
    "report": "models measured on the report split",
    "all": "all",
}
DATASETS = {"sst2": "SST-2", "trec6": "TREC-6", "stsb": "STS-B", "qqp_sample": "QQP sample", "cola": "CoLA"}
METHODS = {
    OURS: "`prune` by parameters",
    "Torch-Pruning Taylor": "Torch-Pruning Taylor, local",
    "last layers": "last layers dropped at once",
}


def main() -> None:
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")


def rendered(text: str) -> str:
    """A document with every block as the csv files have it now."""
    pattern = re.escape(BEGIN).replace(re.escape("{name}"), "(.+?)") + ".*?" + re.escape(END)
    return re.sub(pattern, lambda found: block(found[1], BLOCKS[found[1]]()), text, flags=re.DOTALL)


def block(name: str, content: str) -> str:
    return f"{BEGIN.format(name=name)}\n{content}\n{END}"


def demo(report: pd.DataFrame) -> str:
    """The report of the demo as the README shows it: what was measured on the report split, the model for the targets first."""
    order = ["base model", "target", "best", "next best"]
    report = report[(report["split"] == "report") & report["method"].isin(order)]
    report = report.sort_values("method", key=lambda methods: methods.map(order.index), kind="stable")
    rows = [
        (
            row["method"] if row["method"] == "base model" else f"{row['method']}: {_described(row['genome'])}",
            f"{row['quality']:.3f} ± {row['quality_error']:.3f}",
            f"{row['encoder_m']:.2f}",
            f"{row['mb']:.1f}",
            f"{row['latency_ms']:.0f}",
            "" if row["method"] == "base model" else f"{row['speed_up']:.2f}x",
        )
        for row in report.to_dict("records")
    ]
    columns = ["", report["metric"].iloc[0], "encoder, M", "size, MB", "inference, ms", "speed-up"]
    return pd.DataFrame(rows, columns=columns).to_markdown(index=False, disable_numparse=True)


def _described(genome: str) -> str:
    """A genome in words, such as `cut by a quarter twice, vocabulary trimmed`."""
    counts = Counter(genome.split(" > "))
    return ", ".join(_word(step) + TIMES[count] for step, count in counts.items() if _word(step))


def _word(step: str) -> str:
    name, _, share = step.partition("_")
    if name == "prune" and step not in STEPS:
        return f"cut block by block by {float(share):.0%}".replace("%", " %")
    return STEPS[step]


def encoders(table: pd.DataFrame) -> str:
    """Mean score of cut sentence encoders as a share of the base model's, by method and cut."""
    cut = table[table["share"] > 0]
    kept = cut.groupby(["method", "share"])["kept"].mean().unstack("share").sort_values(cut["share"].min(), ascending=False)
    shown = kept.map(lambda value: "" if pd.isna(value) else f"{100 * value:.1f} %")
    shown.columns = pd.Index([f"{100 * share:.0f} % of the encoder removed" for share in kept.columns])
    return shown.rename_axis("").reset_index().to_markdown(index=False, disable_numparse=True)


def most_cut(table: pd.DataFrame, share: float = 0.8) -> str:
    """Quality before and after the epoch of distillation, and speed-up, where most of the encoder is removed."""
    means = table.groupby(["dataset", "method", "share"])[["before", "quality", "speed_up"]].mean()
    rows: dict[str, list[str]] = {label: [label] for label in METHODS.values()}
    for dataset in DATASETS:
        cells = means.loc[dataset].xs(share, level="share").loc[list(METHODS)]
        best = cells.max()
        for method, row in cells.iterrows():
            rows[METHODS[str(method)]].append(f"{_before_after(row, best)}, {row['speed_up']:.1f}x")
    bases = [means.loc[(dataset, BASE, 0), "quality"] for dataset in DATASETS]
    titles = [f"{title} (base {base:.3f})" for title, base in zip(DATASETS.values(), bases, strict=True)]
    columns = [f"{100 * share:.0f} % of the encoder removed: before / after the epoch", *titles]
    return pd.DataFrame(rows.values(), columns=columns).to_markdown(index=False, disable_numparse=True)


def _before_after(row: pd.Series, best: pd.Series) -> str:
    """The quality before and after the epoch; what is best of a dataset is bold."""
    figures = (f"{row[name]:.3f}" for name in ("before", "quality"))
    marks = ("**" if row[name] == best[name] else "" for name in ("before", "quality"))
    return " / ".join(f"{mark}{figure}{mark}" for mark, figure in zip(marks, figures, strict=True))


def rescored(table: pd.DataFrame, share: float = 0.8) -> str:
    """What scoring anew before each block is cut saves of the loss, before and after the epoch of distillation: means over the
    seeds that every method has."""
    rows = []
    for dataset, cut in table[table["share"] == share].groupby("dataset", sort=False):
        cut = cut[cut.groupby("seed")["method"].transform("nunique") == cut["method"].nunique()]
        base, own = cut["base_quality"].iloc[0], cut.groupby("method")[["before", "quality"]].mean()
        cells = {method: _before_after(row, own.max()) for method, row in own.iterrows()}
        lost = base - own["quality"]
        left = f"{lost[RESCORED] / lost[OURS]:.0%}".replace("%", " %")
        title = f"{DATASETS[str(dataset)]} ({base:.3f})"
        rows.append({"dataset (base)": title, **cells, "of the loss of ours by parameters": left})
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def untrained(table: pd.DataFrame) -> str:
    """How often each method of ours is ahead of the best peer in quality, and nearer to the uncut model than all."""
    lines = []
    for method in table["method"].unique():
        leads = at_equal_size(table, ours=method)
        if not method.startswith("ours") or leads.empty:
            continue
        nearer = best(at_equal_size(table.assign(nearness=-table["divergence"]), "nearness", method))
        means = nearer.groupby(["dataset", "cut"])["lead"].mean()
        close = f"It is nearer to the uncut model than all of them in {(means > 0).sum()} of {len(means)} cases."
        lines.append(f"*{method}* is {counted(leads)} {close}")
    return _listed(lines)


def untrained_cells(table: pd.DataFrame) -> str:
    """Quality of each dataset and cut, by method, seeds averaged."""
    means = table.pivot_table(index=["dataset", "share"], columns="method", values="quality", sort=False)
    bold = means.round(3).eq(means.round(3).max(axis=1), axis=0)
    shown = means.map(lambda value: "" if pd.isna(value) else f"{value:.3f}")
    shown = shown.mask(bold, "**" + shown + "**")
    bases = table.groupby("dataset")["base_quality"].first()
    names = [f"{DATASETS[dataset]} ({bases[dataset]:.3f}), {share:.0%}".replace("%", " %") for dataset, share in means.index]
    return (
        shown.set_axis(pd.Index(names, name="dataset (base), cut"))
        .reset_index()
        .to_markdown(index=False, disable_numparse=True)
    )


def section(table: pd.DataFrame, name: str) -> str:
    return f"""## Ours against the best of the others

{block(name, sentences(table))}

A case is a dataset and a cut. A lead is a difference in quality, averaged over the seeds. At equal latency, ours is cut by
time; its quality at the peer's latency is interpolated linearly between its two neighbours in latency. The test is
Wilcoxon's signed-rank test, two-sided. A pair is a dataset and a seed, averaged over the cuts. Seeds of a dataset share the
base model, so the true p is somewhat larger.

{cases(table)}

Each peer over all cuts, at equal size:

{peers(table)}"""


def read(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, dtype={"base": str})
    if "base" in table and (mixed := table.groupby("dataset")["base"].nunique().loc[lambda n: n > 1].index.tolist()):
        raise SystemExit(f"{path} has rows of several base models for {', '.join(mixed)}; compare only rows with the same one")
    return table


def sentences(table: pd.DataFrame) -> str:
    """How often ours is ahead where half of the encoder or more is removed, and where less is removed."""
    compared = {
        "At equal size": at_equal_size(table),
        "At equal size, before the distillation": at_equal_size(table, "before") if "before" in table else None,
        "At equal latency": at_equal_latency(table),
    }
    found = {title: leads for title, leads in compared.items() if leads is not None}
    parts = []
    for most in (True, False):
        lines, least = [], 1.0
        for title, leads in found.items():
            chosen = leads[(leads["cut"] >= 0.5) == most]
            if len(chosen):
                least = min(least, float(chosen["cut"].min()))
                lines.append(f"{title}, `prune` is {counted(chosen)}")
        amount = AMOUNTS.get(least, f"{100 * least:.0f} %")
        if lines:
            parts.append(f"When {amount} of the encoder {'or more ' if most else ''}is removed:\n\n{_listed(lines)}")
    return "\n\n".join(parts)


def _listed(lines: list[str]) -> str:
    wrap = textwrap.TextWrapper(110, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(wrap.fill(line) for line in lines)


def at_equal_size(table: pd.DataFrame, figure: str = "quality", ours: str = OURS) -> pd.DataFrame:
    """Leads of one method of ours over every peer of the same dataset, cut and seed.

    figure: a column of which more is better: `quality`; `before`, the quality before the epoch of distillation.
    """
    cut = table[table["share"] > 0]
    keys = ["dataset", "share", "seed"]
    both = cut[~cut["method"].str.startswith("ours")].merge(cut.loc[cut["method"] == ours, [*keys, figure]], on=keys)
    both["lead"] = both[f"{figure}_y"] - both[f"{figure}_x"]
    return both.rename(columns={"share": "cut", "method": "peer"})[COLUMNS]


def at_equal_latency(table: pd.DataFrame) -> pd.DataFrame:
    """The same of ours cut by time: its quality at the peer's latency, between its two neighbours in latency (linear).

    Peers that are faster than all of ours are left out.
    """
    rows = []
    if "latency_ms" not in table or not (table["method"] == BY_TIME).any():
        return pd.DataFrame(columns=COLUMNS)
    for dataset, group in table.groupby("dataset", sort=False):
        for seed, runs in group[group["share"] > 0].groupby("seed", sort=False):
            own = pd.concat([runs[runs["method"] == BY_TIME], group[group["method"] == BASE]]).sort_values("latency_ms")
            for _, peer in runs[~runs["method"].str.startswith("ours")].iterrows():
                if peer["latency_ms"] >= own["latency_ms"].min():
                    quality = float(np.interp(peer["latency_ms"], own["latency_ms"], own["quality"]))
                    rows.append((dataset, peer["share"], peer["method"], seed, quality - peer["quality"]))
    return pd.DataFrame(rows, columns=COLUMNS)


def best(leads: pd.DataFrame) -> pd.DataFrame:
    """Of each case only the peer that comes nearest to ours, or is ahead of it by most, seeds averaged."""
    seeds = leads["seed"].nunique()
    means = leads.groupby(["dataset", "cut", "peer"], sort=False)["lead"].agg(["mean", "count"]).reset_index()
    nearest = means[means["count"] == seeds].sort_values("mean").groupby(["dataset", "cut"], sort=False).head(1)
    return leads.merge(nearest[["dataset", "cut", "peer"]], on=["dataset", "cut", "peer"])


def p_value(leads: pd.DataFrame) -> tuple[float, int]:
    """Of Wilcoxon's test, and the number of pairs."""
    pairs = leads.groupby(["dataset", "seed"])["lead"].mean()
    return (float(stats.wilcoxon(pairs).pvalue) if pairs.any() else 1.0), len(pairs)


def counted(leads: pd.DataFrame) -> str:
    """In how many cases ours is ahead of the best peer, and the test."""
    leads = best(leads)
    means = leads.groupby(["dataset", "cut"], sort=False)["lead"].mean()
    ahead, behind = means[means >= LEVEL], means[means <= -LEVEL]
    text = (
        f"ahead of the best peer in {len(ahead)} of {len(means)} cases (by more than {NOISE} in {int((ahead > NOISE).sum())})"
    )
    if level := len(means) - len(ahead) - len(behind):
        text += f", level in {level}"
    if len(behind):
        named = [f"{dataset} {100 * cut:.0f} %: {lead:+.3f}" for (dataset, cut), lead in behind.items()]
        text += f", behind in {len(behind)} ({', '.join(named)})"
    p, pairs = p_value(leads)
    return f"{text}. The mean lead is {means.mean():+.3f}, p = {p:.2g} (Wilcoxon, {pairs} pairs of dataset and seed)."


def cases(table: pd.DataFrame) -> str:
    """Each case: the best peer and our lead, at equal size and at equal latency."""
    parts = []
    for title, leads in (("at equal size", at_equal_size(table)), ("at equal latency", at_equal_latency(table))):
        mean = best(leads).groupby(["dataset", "cut"], sort=False).agg(peer=("peer", "first"), lead=("lead", "mean"))
        parts.append(mean.rename(columns={"peer": f"best peer {title}", "lead": f"our lead {title}"}))
    frame = parts[0].join(parts[1]) if len(parts[1]) else parts[0]
    frame = frame.reset_index().assign(cut=lambda frame: [f"{cut:.0%}" for cut in frame["cut"]])
    for column in frame.columns[frame.columns.str.startswith("our lead")]:
        frame[column] = ["" if pd.isna(lead) else f"{lead:+.3f}" for lead in frame[column]]
    return frame.fillna("").to_markdown(index=False, disable_numparse=True)


def peers(table: pd.DataFrame) -> str:
    """Each peer over all cases, at equal size."""
    rows = []
    for peer, leads in at_equal_size(table).groupby("peer", sort=True):
        means = leads.groupby(["dataset", "cut"])["lead"].mean()
        ahead, behind = int((means >= LEVEL).sum()), int((means <= -LEVEL).sum())
        p, pairs = p_value(leads)
        rows.append((peer, f"{ahead} / {len(means) - ahead - behind} / {behind}", f"{means.mean():+.3f}", f"{p:.2g}", pairs))
    columns = ["peer", "ours ahead / level / behind", "mean lead", "p", "pairs"]
    return pd.DataFrame(rows, columns=columns).to_markdown(index=False, disable_numparse=True)


def costs(table: pd.DataFrame) -> str:
    """What each stage of a search is estimated to cost."""
    total = table[["tasks", "wall_s_1", "wall_s_many"]].sum()
    rows = [
        (STAGES[row["stage"]], int(row["tasks"]), f"{row['wall_s_1'] / 60:.1f}", f"{row['wall_s_many'] / 60:.1f}")
        for row in [*table.to_dict("records"), {"stage": "all", **total}]
    ]
    columns = ["stage", "tasks", "one A100, min", f"{table['gpus'].iloc[0]} A100s, min"]
    return pd.DataFrame(rows, columns=columns).to_markdown(index=False, disable_numparse=True)


def vocabularies(table: pd.DataFrame) -> str:
    """What fewer word embeddings cost, and how the two ways compare."""
    table = table.groupby(["dataset", "common", "way"], sort=False).mean().reset_index()  # over the runs of a dataset
    whole = table[table["way"] == ALL_TOKENS].set_index("dataset")["quality"]
    cut = table[table["way"] != ALL_TOKENS]
    rows = [
        (
            f"{DATASETS[row['dataset']]} ({whole[row['dataset']]:.3f})",
            row["common"],
            row["way"],
            f"{row['kept']:,.0f}",
            f"{row['quality']:.3f}",
            f"{row['divergence']:.3f}",
            f"{row['tokens_a_text']:.1f}",
        )
        for row in cut.to_dict("records")
    ]
    columns = ["dataset (all tokens)", "common", "other words", "embeddings", "quality", "divergence", "tokens a text"]
    ways = cut.pivot_table(index=["dataset", "common"], columns="way", values="divergence")
    ratio = (ways[NEAREST] / ways[PIECES].clip(lower=1e-9)).median()
    return (
        f"{pd.DataFrame(rows, columns=columns).to_markdown(index=False, disable_numparse=True)}\n\n"
        f"The divergence of the nearest embedding over that of smaller pieces: {ratio:.2f} (median of {len(ways)} pairs)."
    )


def strategies(table: pd.DataFrame) -> str:
    """What each strategy found with the device seconds of `genetic`, medians over seeds, and how soon it had found as much."""
    last = compare.ends(table, "genetic")
    many = table[table["device_seconds_many"].notna()]
    if len(many):
        counted = compare.ends(many.assign(device_seconds=many["device_seconds_many"]), "genetic")
        pairs = ["dataset", "seed", "strategy"]
        last = last.merge(counted[[*pairs, "time_ratio"]], on=pairs, how="left", suffixes=("", "_many"))
    else:
        last["time_ratio_many"] = np.nan
    found = last.groupby(["dataset", "strategy"])["hypervolume_report"].median().reset_index(name="volume")
    ours = found[found["strategy"] == "evolve"].set_index("dataset")["volume"]
    rows = []
    for dataset, strategy, volume in found.sort_values(["dataset", "volume"], ascending=[True, False]).itertuples(index=False):
        own = last[(last["dataset"] == dataset) & (last["strategy"] == strategy)]
        soon, counted_ = own["time_ratio"].median(), own["time_ratio_many"].median()
        ahead = ours.get(dataset, np.nan) / volume if volume > 0 and strategy != "evolve" else np.nan
        rows.append(
            (
                DATASETS[str(dataset)],
                f"`{strategy}`",
                len(own),
                f"{volume:.2f}",
                f"{own['hypervolume_search'].median():.2f}",
                f"{own['ratio'].median():.2f}",
                f"{ahead:.2f}" if np.isfinite(ahead) else "",
                f"{own['device_seconds'].median():,.0f}",
                _share(soon),
                _share(counted_),
            )
        )
    columns = [
        *("dataset", "strategy", "seeds", "hypervolume", "on the search split", "over `genetic`", "`evolve` over it"),
        *("device seconds", "to `genetic`'s end, of its seconds", "counted for 67,000 rows"),
    ]
    return pd.DataFrame(rows, columns=columns).to_markdown(index=False, disable_numparse=True)


def _share(value: float) -> str:
    if np.isnan(value):
        return ""
    return f"{value:.1%}" if np.isfinite(value) else "never"


WANTED = ((3, 12), (8, 8))  # times as fast and as small


def small_and_fast(fronts: pd.DataFrame) -> str:
    """Of each front of `evolve`, with and without a target, the model that is best on the search split among those that are
    fast and small enough, and what it keeps on the report split."""
    rows = []
    ours = fronts[fronts["strategy"].isin(["evolve", "evolve_for_a_target"])]
    for (dataset, seed, strategy), front in ours.groupby(["dataset", "seed", "strategy"], sort=False):
        for speed, size in WANTED:
            within = front[(front["speed_up"] >= speed) & (front["smaller"] >= size)]
            best = within.sort_values(["on_search", "speed_up"]).iloc[-1] if len(within) else None
            kept = (
                ("", "", "none", "")
                if best is None
                else (
                    f"{best['speed_up']:.1f}x",
                    f"{best['megabytes']:.1f}, 1/{best['smaller']:.1f}",
                    f"{best['on_report']:.1%}",
                    f"{best['on_search']:.1%}",
                )
            )
            rows.append((DATASETS[str(dataset)], f"`{strategy}`", seed, f"{speed}x, 1/{size}", *kept))
    columns = ["dataset", "strategy", "seed", "at least", "speed", "MB", "of the base's quality", "on the search split"]
    return pd.DataFrame(rows, columns=columns).to_markdown(index=False, disable_numparse=True)


BLOCKS: dict[str, Callable[[], str]] = {
    "demo": lambda: demo(pd.read_csv(RESULTS / "report.csv")),
    "compression": lambda: sentences(read(RESULTS / "compression.csv")),
    "compression_peers": lambda: sentences(read(RESULTS / "compression_peers.csv")),
    "costs": lambda: costs(pd.read_csv(RESULTS / "costs.csv")),
    "tokens": lambda: sentences(read(RESULTS / "tokens.csv")),
    "embeddings": lambda: encoders(pd.read_csv(RESULTS / "embeddings.csv")),
    "vocabularies": lambda: vocabularies(pd.read_csv(RESULTS / "vocabularies.csv")),
    "strategies": lambda: strategies(pd.read_csv(RESULTS / "strategies.csv")),
    "small and fast": lambda: small_and_fast(pd.read_csv(RESULTS / "strategies_fronts.csv")),
    "rescored": lambda: rescored(read(RESULTS / "compression_rescored.csv")),
    "untrained": lambda: untrained(read(RESULTS / "untrained.csv")),
    "untrained cells": lambda: untrained_cells(read(RESULTS / "untrained.csv")),
    "most cut": lambda: most_cut(read(RESULTS / "compression.csv")),
}

if __name__ == "__main__":
    main()
