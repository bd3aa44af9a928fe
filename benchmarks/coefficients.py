"""The study of the coefficients of F at a small size: which model is best for which weights of speed and memory.

A search by `evolve` ends with a front, and F with any weights is a question put to it. So one run a seed answers for all
weights, where the genetic algorithm needs a run for each (experiment=coefficients).

    for seed in 0 1 2; do hpc-compress search experiment=demo seed=$seed name=coefficients/$seed report_front=true; done
    python benchmarks/coefficients.py results/coefficients --out results
"""

import argparse
import io
from pathlib import Path

import pandas as pd

import hpc_compress
from hpc_compress.analysis.figures import COLORS, MARKERS
from hpc_compress.analysis.sweeps import spread

WEIGHTS = (0, 1, 5)  # of speed (b) and of memory (c); quality has a = 5
FORMS = {"report_quality": ".3f", "speed_up": ".2f", "megabytes": ".1f"}
SHOWN = {"report_quality": "quality", "speed_up": "speed-up", "megabytes": "size, MB"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the folder of the runs, one a seed")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for coefficients.md, .csv and .png")
    args = parser.parse_args()
    best = chosen(hpc_compress.load_runs(args.runs))
    best.round(5).to_csv(args.out / "coefficients.csv", index=False)
    (args.out / "coefficients.md").write_text(text(best), encoding="utf-8")
    (args.out / "coefficients.png").write_bytes(picture(best))
    print(text(best))


def chosen(candidates: pd.DataFrame) -> pd.DataFrame:
    """The model with the highest F of each run, for every pair of weights; with the quality on the report split."""
    candidates = candidates[candidates["status"] == "measured"].assign(megabytes=lambda table: table["model_bytes"] / 1e6)
    candidates["report_quality"] = candidates["report_quality"].fillna(candidates["quality"])
    rows = []
    for b in WEIGHTS:
        for c in WEIGHTS:
            ranked = candidates.assign(f=hpc_compress.fitness(candidates, a=5, b=b, c=c))
            best = ranked.loc[ranked.groupby("folder")["f"].idxmax()]
            rows.append(best[["run", "config.seed", "dataset", "candidate", "genome", *SHOWN]].assign(b=b, c=c))
    return pd.concat(rows, ignore_index=True)


def text(best: pd.DataFrame) -> str:
    seeds = best["config.seed"].nunique()
    rows = [
        {"b (speed)": b, "c (memory)": c, **{title: spread(group[name], FORMS[name]) for name, title in SHOWN.items()}}
        for (b, c), group in best.groupby(["b", "c"])
    ]
    speed, memory = (best[(best["b"] == b) & (best["c"] == c)].set_index("config.seed") for b, c in ((5, 0), (0, 5)))
    faster = int((speed["speed_up"] > memory["speed_up"]).sum())
    smaller = int((memory["megabytes"] < speed["megabytes"]).sum())
    rho = best.drop_duplicates(["run", "candidate"])[["speed_up", "megabytes"]].corr(method="spearman").iloc[0, 1]
    return f"""# The coefficients of F

The best model by F = quality^5 * speed^b * (1 / bytes)^c among all that a search by `evolve` has measured, on
{best["dataset"].iloc[0]}: median over {seeds} seeds, with the smallest and the largest. The commands stand in
`benchmarks/coefficients.py`.

{pd.DataFrame(rows).astype(str).to_markdown(index=False, disable_numparse=True)}

The published finding is that speed and size are correlated, and that optimizing one of them gets further on that one than
optimizing the other. Here the rank correlation of speed-up and size over the chosen models is {rho:.2f} (Spearman). The
weight on speed alone (b=5, c=0) gives the faster model in {faster} of {seeds} seeds, and the weight on memory alone (b=0, c=5)
the smaller one in {smaller} of {seeds}.
"""


def picture(best: pd.DataFrame) -> bytes:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(SHOWN), figsize=(12, 4), layout="constrained")
    for axes, (name, title) in zip(panels, SHOWN.items(), strict=True):
        for index, c in enumerate(WEIGHTS):
            of_seeds = best[best["c"] == c].groupby("b")[name]
            middle = of_seeds.median()
            ends = [middle - of_seeds.min(), of_seeds.max() - middle]
            at = [place + 0.06 * (index - 1) for place in range(len(WEIGHTS))]
            style = {"color": COLORS[index], "marker": MARKERS[index], "markersize": 5}
            axes.errorbar(at, middle, yerr=ends, capsize=2, label=f"c = {c} (memory)", **style)
        axes.set_xticks(range(len(WEIGHTS)), map(str, WEIGHTS))
        axes.set_xlabel("b, the weight of speed")
        axes.set_ylabel(title if name != "report_quality" else "accuracy, report split")
        axes.grid(alpha=0.25)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    content = io.BytesIO()
    figure.savefig(content, dpi=110)
    return content.getvalue()


if __name__ == "__main__":
    main()
