"""What a smaller word embedding costs: other words split into smaller pieces (`trim_vocabulary`), or represented by the kept
token most like them (`share_embeddings`).

Reads run folders of searches that have ended, and measures their base models on the report split.

    python benchmarks/vocabularies.py results/strategies/bases/*-run --out results
"""

import argparse
import copy
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import claims
import numpy as np
import pandas as pd
import torch

from hpc_compress import analysis, identity, measure
from hpc_compress.data.batches import Encoded
from hpc_compress.models import artifact, surgery
from hpc_compress.operators import Context, operator
from hpc_compress.problems import problem_of
from hpc_compress.store import Store
from hpc_compress.types import Step

CPU = torch.device("cpu")
WAYS = {claims.PIECES: "trim_vocabulary", claims.NEAREST: "share_embeddings"}
HEAD = """Base models with fewer word embeddings, on the report split; nothing was chosen by it. Kept are the tokens of at most
3,000 training rows, and the `common` tokens with the lowest ids. Other words are split into smaller pieces
(`trim_vocabulary`, which keeps these pieces too), or have the embedding of the kept token most like them
(`share_embeddings`). The divergence is that of the outputs from those with all tokens.

"""
COMMON = (0, 6000)  # most common tokens that are kept besides those of train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for vocabularies.csv and vocabularies.md")
    args = parser.parse_args()
    found = pd.DataFrame([row for run in args.runs for row in rows(run)])
    found.round(5).to_csv(args.out / "vocabularies.csv", index=False)
    text = HEAD + claims.vocabularies(claims.read(args.out / "vocabularies.csv")) + "\n"
    (args.out / "vocabularies.md").write_text(text, encoding="utf-8")
    print(text)


def rows(root: Path) -> Iterator[dict[str, Any]]:
    """Of one run: the whole vocabulary, and each way with each number of common tokens."""
    run, store = analysis.open_run(root), Store(root)
    task = run.outcomes[run.base_id].task
    kind, dataset = problem_of(task.dataset), task.dataset
    model = artifact.load(store.path(identity.master_key(task)))
    table, train = (pd.read_parquet(root / "data" / f"{split}.parquet") for split in ("report", "train"))

    def outputs(model: Any, tokenizer: Any) -> tuple[np.ndarray, Encoded]:
        texts = kind.encode(tokenizer, table, dataset)
        return measure.outputs(kind, model, texts, 64, CPU), texts

    def row(way: str, common: int, kept: int, found: np.ndarray, texts: Encoded) -> dict[str, Any]:
        one, other = torch.from_numpy(found), torch.from_numpy(whole)
        return {
            "dataset": dataset.name,
            "way": way,
            "common": common,
            "kept": kept,
            "quality": kind.score(dataset, table, found)[dataset.metrics[0]],
            "divergence": max(0.0, float(kind.divergence(one, other))),
            "tokens_a_text": len(texts.input_ids) / len(table),
        }

    tokenizer = kind.tokenizer(root / "base")
    whole, texts = outputs(model, tokenizer)
    yield row(claims.ALL_TOKENS, 0, surgery.vocabulary_size(model), whole, texts)
    corpus = kind.encode(tokenizer, train, dataset)
    for common in COMMON:
        for way, name in WAYS.items():
            with tempfile.TemporaryDirectory() as folder:
                base_tokenizer = partial(kind.tokenizer, root / "base")
                made = Context(corpus, kind, CPU, 0, lambda: model, tokenizer=base_tokenizer, folder=Path(folder))
                small = operator(Step(operator=name, params={"common": common}))(copy.deepcopy(model), made)
                own = any(Path(folder).iterdir())
                found, texts = outputs(small, kind.tokenizer(Path(folder)) if own else tokenizer)
                yield row(way, common, surgery.vocabulary_size(small), found, texts)


if __name__ == "__main__":
    main()
