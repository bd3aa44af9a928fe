"""From a dataset's configuration to three tables of rows: train, search and report. Knows pandas and `datasets`, no torch.

The search split is held out of train, so that the official validation rows are touched for the report only. Equal rows, and
texts of which one contains the other, stay on the same side (`data.overlap`).
"""

import csv
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hpc_compress import identity
from hpc_compress.config import ConfigError, DatasetConfig, resource
from hpc_compress.data import overlap
from hpc_compress.problems import problem
from hpc_compress.types import Dataset, Rows, Split

MOST_EMPTY = 0.5  # share of rows without text or label above which a table is refused
Tables = dict[str, pd.DataFrame]  # columns: text, text2 (pairs only), label (class id or target)


def load(config: DatasetConfig, seed: int, label_order: Sequence[str] = ()) -> tuple[Dataset, Tables, Rows]:
    """Read, clean and split a dataset; the same rows in the same splits for the same seed.

    label_order: classes as a trained head orders them; obeyed when it names the classes that the rows have.

    Raises: ConfigError when rows, columns or labels are not what the configuration says.
    """
    kind = problem(config.problem)
    kind.check(config)
    read = [split for split in (config.train, config.validation) if split is not None]
    cleaned = [_clean(_read(config, split), config, split) for split in read]
    empty = {split: n for split, (_, n) in zip(("train", "validation"), cleaned, strict=False) if n}
    train, validation = cleaned[0][0], (None if config.validation is None else cleaned[1][0])
    if train.empty:
        raise _empty("train", config)
    labels = kind.labels(train, config)
    if set(labels) == set(label_order):
        labels = tuple(label_order)
    rng = np.random.default_rng(identity.derive(seed, "split"))
    order = rng.permutation(len(train))
    groups, total = None, len(order)
    judged = kind.judged(train, config, seed, lambda part: _clean(_read(part, part.train), part, part.train)[0])
    if judged is not None:
        stays, search, report = judged
        order = order[np.isin(order, stays)]
    else:
        if validation is None or config.search_on == "held_out":
            groups = overlap.Groups(train)
        if validation is None:
            assert groups is not None
            order, held_out = _hold_out(groups, order, config.report_rows, "report")
            report, total = train.iloc[held_out], total - len(held_out)
        else:
            report = validation
        if config.search_on == "validation":
            # Shuffled, since max_search_rows may take a part of it, and such files are often sorted by label.
            search = report.iloc[rng.permutation(len(report))]
        else:
            assert groups is not None
            order, held_out = _hold_out(groups, order, config.search_rows, "search")
            search, total = train.iloc[held_out], total - len(held_out)
    unused = total - len(order)
    tables = {"train": train.iloc[order[: config.max_train_rows]], "search": search[: config.max_search_rows], "report": report}
    tables = {split: _with_targets(table, labels, config, split) for split, table in tables.items()}
    dataset = Dataset(
        name=config.name,
        fingerprint=identity.content_hash({split: table.to_dict("list") for split, table in tables.items()}),
        problem=config.problem,
        labels=labels,
        pair="text2" in kind.columns(config),
        metrics=config.metrics or kind.default_metrics(labels),
        positive=kind.positive(labels, config),
        max_length=config.max_length,
        losses=config.losses,
    )
    splits: tuple[Split, ...] = ("search", "report")
    trivial = {split: kind.trivial(dataset, tables[split]) for split in splits}
    overlaps = overlap.between({split: kind.tested(table) for split, table in tables.items()})
    return dataset, tables, Rows(empty=empty, unused=unused, overlaps=overlaps, trivial=trivial)


def _read(config: DatasetConfig, split: str) -> pd.DataFrame:
    if config.path is not None:
        return _read_hub(config, split)
    path = resource(split)
    if path.is_dir():
        raise ConfigError(f"dataset file {path} is a folder; give a csv, tsv or parquet file (a folder: dataset.path)")
    if not path.is_file():
        raise ConfigError(f"dataset file {path} does not exist; give an existing csv, tsv or parquet file")
    kind = problem(config.problem)
    # As GLUE writes a tsv: a quotation mark is a plain character.
    styles = {".csv": {}, ".tsv": {"sep": "\t", "quoting": csv.QUOTE_NONE}}
    suffix = path.suffix.lower()
    if suffix not in (allowed := (*styles, ".parquet", *kind.formats)) and not config.parallel:
        raise ConfigError(f"dataset file {path} ends in {path.suffix!r}; allowed are {', '.join(allowed)}")
    try:
        if (own := kind.read(path, config)) is not None:
            return own
        if suffix == ".parquet":
            return _unique(pd.read_parquet(path), path)
        # Read as they stand, since pandas takes the words "null", "NA" and "None" for missing values.
        words: dict[str, Any] = {"dtype": str, "keep_default_na": False, **styles[suffix]}
        header = pd.read_csv(path, encoding=config.encoding, header=None, nrows=1, **words)
        _unique(header.set_axis(header.iloc[0], axis=1), path)
        table = pd.read_csv(path, encoding=config.encoding, **words)
    except UnicodeError:
        raise ConfigError(f"dataset file {path} {_undecodable(path, config.encoding)}") from None
    except (ValueError, LookupError, OSError) as error:  # pandas' and pyarrow's own errors are ValueErrors
        raise ConfigError(f"dataset file {path} could not be read ({error}); mend it, or set dataset.encoding") from None
    if not isinstance(table.index, pd.RangeIndex):
        # pandas takes the first column of a table without a name for each column to be an index.
        raise ConfigError(f"lines of dataset file {path} have more fields than its header; quote texts that hold the separator")
    if any(table[column].str.contains("\0", regex=False).any() for column in table):
        raise ConfigError(f"dataset file {path} holds NUL bytes; delete them, or set dataset.encoding (perhaps utf-16)")
    for column in table.columns.difference([config.text, config.text2 or ""]):
        numbers = pd.to_numeric(table[column], errors="coerce")
        if not (numbers.isna() & (table[column] != "")).any():
            table[column] = numbers  # so that dataset.where can compare it
    return table


def _unique(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    names = table.columns[table.columns.duplicated() & (table.columns != "")]
    if len(names):
        raise ConfigError(f"dataset file {path} has more than one column {names[0]!r}; rename or delete one of them")
    return table


def _undecodable(path: Path, encoding: str) -> str:
    """Where a file is not in the encoding."""
    content = path.read_bytes()
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return (
            f"is not {encoding}: line {line} has the byte 0x{content[error.start]:02x} at byte {error.start}; "
            "set dataset.encoding to the file's own, such as latin-1 or cp1252"
        )
    return f"could not be read as {encoding}; set dataset.encoding to the file's own"


def _read_hub(config: DatasetConfig, split: str) -> pd.DataFrame:
    import datasets

    try:
        if Path(str(config.path), "dataset_dict.json").is_file():  # as DatasetDict.save_to_disk writes it
            rows = datasets.load_from_disk(str(config.path))[split]
        else:
            rows = datasets.load_dataset(config.path, config.subset, split=split)
    except Exception as error:
        # `datasets` raises many kinds here, most of them when there is no network.
        raise ConfigError(
            f"split {split!r} of dataset {config.path} {config.subset or ''} could not be loaded ({error}); check the names, "
            f"or fetch it where there is a network: hpc-compress prefetch dataset.path={shlex.quote(str(config.path))}"
            f"{f' dataset.subset={shlex.quote(config.subset)}' if config.subset else ''}, with the other words of this search"
        ) from error
    table = rows.to_pandas()
    feature = rows.features.get(config.label)
    if isinstance(feature, datasets.ClassLabel) and (table[config.label] != -1).any():
        table[config.label] = table[config.label].where(table[config.label] != -1)  # -1 stands for a missing class here
    if isinstance(classes := getattr(feature, "feature", None), datasets.ClassLabel):  # of a list
        table[config.label] = [[classes.int2str(int(id)) for id in ids] for ids in table[config.label]]
    return table


def _clean(table: pd.DataFrame, config: DatasetConfig, split: str) -> tuple[pd.DataFrame, int]:
    """The rows with the columns that the problem reads, and how many were left out because they have no text or no label."""
    columns = problem(config.problem).columns(config)
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
    table = pd.DataFrame({name: table[column] for name, column in columns.items()})
    cleaned = problem(config.problem).clean(table, config, split)
    missing = len(table) - len(cleaned)
    if missing > MOST_EMPTY * len(table):
        raise ConfigError(
            f"{missing} of {len(table)} rows of split {split!r} of {config.name} have no text or no label; check "
            "dataset.text and dataset.label, or delete those rows"
        )
    return cleaned.reset_index(drop=True), missing


def _with_targets(table: pd.DataFrame, labels: tuple[str, ...], config: DatasetConfig, split: str) -> pd.DataFrame:
    table = table.reset_index(drop=True)
    if len(table) == 0:
        raise _empty(split, config)
    return table.assign(label=problem(config.problem).targets(table["label"], labels, config, split))


def _empty(split: str, config: DatasetConfig) -> ConfigError:
    return ConfigError(f"the {split} split of {config.name} is empty; check dataset.where and the row limits")


def _hold_out(groups: overlap.Groups, rows: np.ndarray, amount: float, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers that stay, and `amount` (a share below 1, else a number) of those that can be held out."""
    able = int(groups.whole[groups.group[rows]].sum())
    count = int(amount) if amount >= 1 else round(amount * able)
    stay, out = groups.hold_out(rows, count) if 0 < count < able else (rows[:0], rows)
    if not len(stay):
        raise ConfigError(
            f"dataset.{what}_rows={amount} takes {count} of {able} rows (of {len(rows)}, those not part of a longer text); "
            "leave some on both sides"
        )
    return stay, out
