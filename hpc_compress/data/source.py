"""From a dataset's configuration to three tables of rows: train, search and report. Knows pandas and `datasets`, no torch.

The search split is held out of train, so that the official validation rows are touched for the report only.
"""

import csv
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from hpc_compress import identity
from hpc_compress.config import ConfigError, DatasetConfig, resource
from hpc_compress.types import Dataset

Tables = dict[str, pd.DataFrame]  # columns: text, text2 (pairs only), label (class id or target)


def load(config: DatasetConfig, seed: int, label_order: Sequence[str] = ()) -> tuple[Dataset, Tables]:
    """Read, clean and split a dataset; the same rows in the same splits for the same seed.

    label_order: classes as a trained head orders them; obeyed when it names the classes that the rows have.

    Raises: ConfigError when rows, columns or labels are not what the configuration says.
    """
    train = _clean(_read(config, config.train), config)
    validation = None if config.validation is None else _clean(_read(config, config.validation), config)
    if train.empty:
        raise _empty("train", config)
    labels = _labels(train, config)
    if set(labels) == set(label_order):
        labels = tuple(label_order)
    rng = np.random.default_rng(identity.derive(seed, "split"))
    order = train.iloc[rng.permutation(len(train))]
    if validation is None:
        order, report = _hold_out(order, config.report_rows, "report")
    else:
        report = validation
    if config.search_on == "validation":
        # Shuffled, since max_search_rows may take a part of it, and such files are often sorted by label.
        search = report.iloc[rng.permutation(len(report))]
    else:
        order, search = _hold_out(order, config.search_rows, "search")
    tables = {"train": order[: config.max_train_rows], "search": search[: config.max_search_rows], "report": report}
    tables = {split: _with_ids(table, labels, config, split) for split, table in tables.items()}
    dataset = Dataset(
        name=config.name,
        fingerprint=identity.content_hash({split: table.to_dict("list") for split, table in tables.items()}),
        problem=config.problem,
        labels=labels,
        pair=config.text2 is not None,
        metrics=config.metrics,
        max_length=config.max_length,
    )
    return dataset, tables


def _read(config: DatasetConfig, split: str) -> pd.DataFrame:
    if config.path is not None:
        return _read_hub(config, split)
    path = resource(split)
    if not path.is_file():
        raise ConfigError(f"dataset file {path} does not exist; give an existing csv, tsv or parquet file")
    # As GLUE writes a tsv: a quotation mark is a plain character.
    styles = {".csv": {}, ".tsv": {"sep": "\t", "quoting": csv.QUOTE_NONE}}
    suffix = path.suffix.lower()
    if suffix not in (*styles, ".parquet"):
        raise ConfigError(f"dataset file {path} ends in {path.suffix!r}; allowed are .csv, .tsv and .parquet")
    try:
        if suffix == ".parquet":
            return pd.read_parquet(path)
        # Read as they stand, since pandas takes the words "null", "NA" and "None" for missing values.
        words: dict[str, Any] = {"dtype": str, "keep_default_na": False, "encoding_errors": "replace", **styles[suffix]}
        table = pd.read_csv(path, encoding=config.encoding, **words)
    except (ValueError, LookupError, OSError) as error:  # pandas' and pyarrow's own errors are ValueErrors
        raise ConfigError(f"dataset file {path} could not be read ({error}); mend it, or set dataset.encoding") from None
    if not isinstance(table.index, pd.RangeIndex):
        # pandas takes the first column of a table without a name for each column to be an index.
        raise ConfigError(f"lines of dataset file {path} have more fields than its header; quote texts that hold the separator")
    for column in table.columns.difference([config.text, config.text2 or ""]):
        numbers = pd.to_numeric(table[column], errors="coerce")
        if not (numbers.isna() & (table[column] != "")).any():
            table[column] = numbers  # so that dataset.where can compare it
    return table


def _read_hub(config: DatasetConfig, split: str) -> pd.DataFrame:
    import datasets

    try:
        return datasets.load_dataset(config.path, config.subset, split=split).to_pandas()
    except Exception as error:
        # `datasets` raises many kinds here, most of them when there is no network.
        raise ConfigError(
            f"split {split!r} of dataset {config.path} {config.subset or ''} could not be loaded ({error}); check the names, "
            f"or fetch it where there is a network: hpc-compress prefetch dataset.path={shlex.quote(str(config.path))}"
            f"{f' dataset.subset={shlex.quote(config.subset)}' if config.subset else ''}, with the other words of this search"
        ) from error


def _clean(table: pd.DataFrame, config: DatasetConfig) -> pd.DataFrame:
    wanted = {"text": config.text, "text2": config.text2, "label": config.label}
    columns = {name: column for name, column in wanted.items() if column is not None}
    for name, column in columns.items():
        if column not in table.columns:
            raise ConfigError(
                f"dataset.{name}={column!r} is not a column of {config.name}; it has {', '.join(map(str, table.columns))}"
            )
    if config.where is not None:
        try:
            table = table.query(config.where)
        except Exception as error:
            raise ConfigError(f"dataset.where={config.where!r} is not a query that these rows understand: {error}") from None
    table = pd.DataFrame({name: table[column] for name, column in columns.items()}).reset_index(drop=True)
    texts = [name for name in ("text", "text2") if name in table]
    for name in texts:
        table[name] = table[name].astype(str).fillna("")
    # Rows without a text or a label teach nothing.
    absent = table["label"].isna() | (table["label"].astype(str) == "") | (table[texts] == "").all(axis=1)
    return table[~absent].reset_index(drop=True)


def _labels(train: pd.DataFrame, config: DatasetConfig) -> tuple[str, ...]:
    if config.problem == "regression":
        return ()
    values = sorted({_class_name(value) for value in train["label"].unique()})
    if all(value.removeprefix("-").isdecimal() for value in values):
        values.sort(key=int)
    if len(values) < 2:
        raise ConfigError(f"{config.name} has {len(values)} class in its train rows; at least 2 are needed")
    if len(values) > 1000:
        raise ConfigError(
            f"{config.name} has {len(values)} classes; if {config.label!r} is a number to predict, "
            "set dataset.problem=regression"
        )
    if len(values) > 2 and "f1" in config.metrics:
        raise ConfigError(f"dataset.metrics has f1, which is of 2 classes, but {config.name} has {len(values)}; use macro_f1")
    return tuple(values)


def _class_name(value: object) -> str:
    return str(int(value)) if isinstance(value, float | np.floating) and value.is_integer() else str(value)


def _with_ids(table: pd.DataFrame, labels: tuple[str, ...], config: DatasetConfig, split: str) -> pd.DataFrame:
    table = table.reset_index(drop=True)
    if len(table) == 0:
        raise _empty(split, config)
    if config.problem == "regression":
        try:
            targets = table["label"].astype(float)
            if not np.isfinite(targets).all():
                raise ValueError("some are nan or infinite")
            return table.assign(label=targets)
        except ValueError as error:
            raise ConfigError(f"dataset.label={config.label!r} of {config.name} is not a number everywhere: {error}") from None
    ids = {label: index for index, label in enumerate(labels)}
    names = table["label"].map(_class_name)
    unknown = sorted(set(names) - set(ids))
    if unknown:
        raise ConfigError(f"the {split} split of {config.name} has labels {unknown[:5]} that train does not have")
    return table.assign(label=names.map(ids).astype("int64"))


def _empty(split: str, config: DatasetConfig) -> ConfigError:
    return ConfigError(f"the {split} split of {config.name} is empty; check dataset.where and the row limits")


def _hold_out(rows: pd.DataFrame, amount: float, what: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cut `amount` rows (a share below 1, else a number) off the end."""
    count = int(amount) if amount >= 1 else round(amount * len(rows))
    if not 0 < count < len(rows):
        raise ConfigError(f"dataset.{what}_rows={amount} takes {count} of {len(rows)} rows; leave some on both sides")
    return rows.iloc[:-count], rows.iloc[-count:]
