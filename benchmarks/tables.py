"""Tables of sentences and labels, as the benchmarks read them."""

import csv
from collections.abc import Callable
from pathlib import Path

import pandas as pd

READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".parquet": pd.read_parquet,
    ".csv": lambda path: pd.read_csv(path, keep_default_na=False),
    ".tsv": lambda path: pd.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, keep_default_na=False),  # as GLUE writes it
}


def read(path: Path) -> pd.DataFrame:
    if path.suffix not in READERS:
        raise SystemExit(f"{path} ends in {path.suffix!r}; give one of {sorted(READERS)}")
    return READERS[path.suffix](path)
