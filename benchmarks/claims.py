"""What may be said of `prune` against its peers, counted from the csv of `compression.py`. README quotes what this prints.

    python benchmarks/claims.py results/compression.csv

A case is a dataset and a cut: ours against the best peer of it, seeds averaged. Cases within 0.0005 are level.

The test is Wilcoxon's signed-rank test, two-sided. Its pairs are a dataset and a seed, the difference averaged over the cuts:
cuts of one base model on the same sentences are no independent evidence. It asks for no common scale and no normal
distribution, since the datasets have different metrics. Seeds of one dataset still share a base model and validation rows,
so the true p is somewhat larger; the best peer is chosen on the same figures, which counts against ours.
"""

import argparse
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

# What stands between these marks in a text is what `sentences` says of results/NAME.csv.
BEGIN, END = "<!-- claims: {name} -->", "<!-- /claims -->"
OURS, BY_TIME, BASE = "ours, by parameters", "ours, by time", "base"
LEVEL = 0.0005
NOISE = 0.01
AMOUNTS = {0.33: "a third", 0.5: "half"}
COLUMNS = ["dataset", "cut", "peer", "seed", "lead"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    path = parser.parse_args().csv
    print(section(read(path), path.stem))


def section(table: pd.DataFrame, name: str) -> str:
    return f"""## Ours against the best of the others

{BEGIN.format(name=name)}
{sentences(table)}
{END}

A case is a dataset and a cut; differences in quality, seeds averaged. At equal latency: ours cut by time, between its two
neighbours in latency (linear). The test is Wilcoxon's signed-rank test, two-sided; a pair is a dataset and a seed, averaged
over the cuts. Seeds of a dataset share the base model, so the true p is somewhat larger.

{cases(table)}

Each peer over all cuts, at equal size:

{peers(table)}"""


def read(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, dtype={"base": str})
    if "base" in table and (mixed := table.groupby("dataset")["base"].nunique().loc[lambda n: n > 1].index.tolist()):
        raise SystemExit(f"{path} has rows of several base models for {', '.join(mixed)}; compare only rows with the same one")
    return table


def sentences(table: pd.DataFrame) -> str:
    """How often ours is ahead where half of the encoder goes or more, and where less goes."""
    size, speed, said = at_equal_size(table), at_equal_latency(table), []
    untrained = at_equal_size(table, "before") if "before" in table else size[:0]
    for most in (True, False):
        same_size, same_speed, before = (leads[(leads["cut"] >= 0.5) == most] for leads in (size, speed, untrained))
        if len(same_size):
            least = float(same_size["cut"].min())
            amount = AMOUNTS.get(least, f"{100 * least:.0f} %")
            place = f"Where {amount} of the encoder goes or more" if most else f"Where {amount} goes"
            said.append(f"{place}, `prune` is ahead of the best peer of equal size {_counted(same_size)}")
        if len(before):
            said.append(f"Before the distillation it is ahead {_counted(before)}")
        if len(same_speed):
            said.append(f"At equal latency it is ahead of the best peer {_counted(same_speed)}")
    return textwrap.fill(" ".join(said), 120, break_on_hyphens=False)


def at_equal_size(table: pd.DataFrame, figure: str = "quality") -> pd.DataFrame:
    """Leads of ours cut by parameters over every peer of the same dataset, cut and seed.

    figure: `quality`, after the epoch of distillation; `before`, the quality before it.
    """
    cut = table[table["share"] > 0]
    keys = ["dataset", "share", "seed"]
    both = cut[~cut["method"].str.startswith("ours")].merge(cut.loc[cut["method"] == OURS, [*keys, figure]], on=keys)
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


def _counted(leads: pd.DataFrame) -> str:
    leads = best(leads)
    means = leads.groupby(["dataset", "cut"], sort=False)["lead"].mean()
    ahead, behind = means[means >= LEVEL], means[means <= -LEVEL]
    text = f"in {len(ahead)} of {len(means)} cases (by more than {NOISE} in {int((ahead > NOISE).sum())})"
    if level := len(means) - len(ahead) - len(behind):
        text += f", level in {level}"
    if len(behind):
        named = [f"{dataset} {100 * cut:.0f} %: {lead:+.3f}" for (dataset, cut), lead in behind.items()]
        text += f", behind in {len(behind)} ({', '.join(named)})"
    p, pairs = p_value(leads)
    return f"{text}; mean lead {means.mean():+.3f}, p = {p:.2g} (Wilcoxon, {pairs} pairs of dataset and seed)."


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


if __name__ == "__main__":
    main()
