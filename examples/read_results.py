"""Read a finished run with pandas: choose a model under two constraints, follow its parents, draw all candidates.

python read_results.py results/reviews
"""

import sys
from pathlib import Path

import matplotlib
import pandas as pd

import hpc_compress

matplotlib.use("Agg")  # draws into a file; no screen is needed


def chosen(candidates: pd.DataFrame, most_bytes: float, least_speed_up: float) -> pd.Series | None:
    """The best quality among the models that are small enough and fast enough; None where there are none."""
    allowed = candidates[(candidates["model_bytes"] <= most_bytes) & (candidates["speed_up"] >= least_speed_up)]
    return None if allowed.empty else allowed.loc[allowed["quality"].idxmax()]


def lineage(candidates: pd.DataFrame, candidate: str) -> pd.DataFrame:
    """A candidate and its parents, back to the base model."""
    by_id, found = candidates.set_index("candidate"), []
    while candidate in by_id.index:
        found.append(candidate)
        candidate = by_id.loc[candidate, "parent"]
    return by_id.loc[found[::-1], ["generation", "genome", "deploy", "quality", "speed_up", "model_bytes"]]


def main() -> None:
    run = Path(sys.argv[1])
    candidates = hpc_compress.load_runs(run)
    measured = candidates[candidates["status"] == "measured"]
    base = measured.iloc[0]
    best = chosen(measured, most_bytes=0.9 * base["model_bytes"], least_speed_up=1.0)
    if best is None:
        print("no candidate is small enough and fast enough")
    else:
        print(lineage(measured, best["candidate"]).to_string())
        print(f"\nhpc-compress export {run} model/ --candidate {best['candidate']}")
    axes = measured.plot.scatter("speed_up", "quality", c="generation", colormap="viridis")
    axes.figure.savefig(run / "my_plot.png")


if __name__ == "__main__":
    main()
