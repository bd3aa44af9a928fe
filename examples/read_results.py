"""Read a finished run with pandas: choose a model under two limits, follow its parents, draw all candidates.

python read_results.py results/reviews
"""

import sys
from pathlib import Path

import matplotlib

import hpc_compress

matplotlib.use("Agg")  # draws into a file; no screen is needed


def main() -> None:
    run = Path(sys.argv[1])
    candidates = hpc_compress.load_runs(run)
    best = hpc_compress.best(candidates, megabytes=20, quality=0.97)
    if best is None:
        print("no candidate is small enough and good enough")
    else:
        line = hpc_compress.lineage(candidates, best["candidate"])
        print(line[["added", "quality", "quality_error", "speed_up", "model_bytes"]].to_string())
        print(f"\nhpc-compress export {run} model/ --candidate {best['candidate']}")
    axes = candidates.plot.scatter("speed_up", "quality", c="generation", colormap="viridis")
    axes.figure.savefig(run / "my_plot.png")


if __name__ == "__main__":
    main()
