"""Suites of small tasks on frozen embeddings: their rows, and their scores. Knows pandas and scikit-learn, no torch.

A table of a suite has one row an example:

    task    its name in the suite
    kind    sts, pairs, retrieval or classification
    part    test, or fit: a row that the classifier of a classification is fit to
    text    and text2, which is empty where an example has one text
    label   as a string

Embeddings are compared by their cosines, so their lengths make no difference. References: SentEval (Conneau & Kiela 2018,
https://arxiv.org/abs/1803.05449), encodechka (https://github.com/avidale/encodechka).
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression

from hpc_compress import identity
from hpc_compress.config import ConfigError, DatasetConfig, Suite, SuiteTask
from hpc_compress.data import metrics, overlap

# From a table's configuration to its rows with the columns text, text2 and label, as far as it names them.
Read = Callable[[DatasetConfig], pd.DataFrame]
COLUMNS = ["task", "kind", "part", "text", "text2", "label"]
MEAN = "mean_score"  # of all tasks
POSITIVE = "1"  # label of a pair that belongs together; empty: one that does not
INVERSE_REGULARISATION = 10.0  # C of the logistic regression, on embeddings of length 1


# --- rows ---


def tables(suite: Suite, encoding: str, seed: int, read: Read) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of the search and of the report split, apart in every task; the same for the same seed.

    Raises: ConfigError for a file, a column or a label that is not what the suite says.
    """
    pairs = [
        _task(name, task, suite, encoding, identity.derive(seed, "suite", name), read) for name, task in suite.tasks.items()
    ]
    search, report = (pd.concat(part, ignore_index=True)[COLUMNS] for part in zip(*pairs, strict=True))
    return search, report


def _task(name: str, task: SuiteTask, suite: Suite, encoding: str, seed: int, read: Read) -> tuple[pd.DataFrame, pd.DataFrame]:
    rng = np.random.default_rng(seed)

    def rows(file: str, text: str, text2: str | None) -> pd.DataFrame:
        path = file if file.startswith("package:") else str(Path(suite.folder).expanduser() / file)
        config = DatasetConfig(
            name=f"dataset.suite.tasks.{name}",
            problem="embedding" if task.label is None else "classification",
            train=path,
            text=text,
            text2=text2,
            label=task.label or "",
            encoding=encoding,
        )
        table = read(config)
        if text2 is not None:  # a row that lacks one of its texts can't be scored
            table = table[(table["text"] != "") & (table["text2"] != "")].reset_index(drop=True)
        if table.empty:
            raise ConfigError(f"dataset.suite.tasks.{name}: {path} has no rows with text and label")
        labels = [_plain(label) if task.label is not None else "" for label in table["label"]]
        if task.kind == "pairs":
            labels = [POSITIVE if label == str(task.positive) else "" for label in labels]
        return table.assign(task=name, kind=task.kind, part="test", text2=table.get("text2", ""), label=labels)

    report = rows(task.report, task.text, task.text2)
    if task.train is None:
        groups, order = overlap.Groups(report), rng.permutation(len(report))
        stay, out = groups.hold_out(order, len(report) // 2)
        search, report = report.iloc[out[: task.rows]], report.iloc[stay[: task.rows]]
    else:
        report = report.iloc[rng.permutation(len(report))[: task.rows]]
        train = rows(task.train, task.text, task.text2 or task.fit_text)
        fit = train.assign(part="fit", text=train["text2"] if task.fit_text else train["text"], text2="")
        train = train if task.text2 else train.assign(text2="")
        known = np.isin(overlap.keys(train), overlap.keys(report))
        order = rng.permutation(np.flatnonzero(~known))
        stay, out = overlap.Groups(train).hold_out(order, min(task.rows, len(order) // 2))
        search = train.iloc[out]
        if task.kind == "classification":
            fit = fit.iloc[stay[: task.fit_rows]]
            search, report = pd.concat([search, fit]), pd.concat([report, fit])
    for split, table in (("search", search), ("report", report)):
        _check(name, task, table, split)
    return search, report


def _check(name: str, task: SuiteTask, table: pd.DataFrame, split: str) -> None:
    """Raises: ConfigError for rows that can't be scored."""
    where, test = f"dataset.suite.tasks.{name}", table[table["part"] == "test"]
    if len(test) < 2:
        raise ConfigError(f"{where}: {len(test)} rows are left for the {split} split, and at least 2 are needed; give more")
    if task.kind == "sts" and pd.to_numeric(test["label"], errors="coerce").isna().any():
        raise ConfigError(f"{where}: the labels of kind=sts are numbers, and {task.label!r} holds others; name another column")
    if task.kind == "pairs" and test["label"].nunique() < 2:
        what = "all" if (test["label"] == POSITIVE).all() else "none"
        raise ConfigError(
            f"{where}: {what} of the {split} split's pairs have the label positive={task.positive!r}; set positive"
        )
    if task.kind == "classification" and table.loc[table["part"] == "fit", "label"].nunique() < 2:
        raise ConfigError(f"{where}: the rows that the classifier is fit to have one class; give more rows, or raise fit_rows")


def _plain(label: object) -> str:
    """1.0 and 1 are the same label."""
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def texts(rows: pd.DataFrame) -> tuple[list[str], np.ndarray, np.ndarray]:
    """All different texts of a table, and for each row the positions of its texts; -1 where it has no second one."""
    both = pd.concat([rows["text"], rows["text2"]], ignore_index=True)
    codes, unique = pd.factorize(both.where(both != ""))  # an empty text is missing: -1
    first, second = np.split(codes, 2)
    return [str(text) for text in unique], first, second


# --- scores ---


def answers(rows: pd.DataFrame, first: np.ndarray, second: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """(n,) what the scores of a table's rows look at: a cosine (sts, pairs), or how far a row is answered rightly, 0 to 1.

    first, second: (n,) of each row its texts' places in the embeddings, (texts, dimensions).
    """
    vectors = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True).clip(min=1e-12)
    found = np.zeros(len(rows))
    for index in rows.groupby("task", sort=False).indices.values():
        task, one, other = rows.iloc[index], vectors[first[index]], vectors[second[index]]
        kind = task["kind"].iloc[0]
        if kind == "classification":
            found[index] = _classified(task, one)
        else:
            found[index] = _retrieved(task, one, other) if kind == "retrieval" else (one * other).sum(1)
    return found


def _retrieved(rows: pd.DataFrame, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether the nearest text of the other side is the row's own, or one equal to it; mean over both directions."""
    cosines = one @ other.T
    firsts, seconds = rows["text"].to_numpy(), rows["text2"].to_numpy()
    there, back = seconds[cosines.argmax(1)] == seconds, firsts[cosines.argmax(0)] == firsts
    return (there.astype(float) + back) / 2


def _classified(rows: pd.DataFrame, one: np.ndarray) -> np.ndarray:
    """Whether a logistic regression, which is fit to the rows of the other part, names the label."""
    fit, labels = (rows["part"] == "fit").to_numpy(), rows["label"].to_numpy()
    right = np.zeros(len(rows))
    if not fit.all() and len(set(labels[fit])) > 1:
        model = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=1000).fit(one[fit], labels[fit])
        right[~fit] = model.predict(one[~fit]) == labels[~fit]
    return right


def scores(rows: pd.DataFrame, said: np.ndarray) -> dict[str, float]:
    """Of each task that has rows, and first their mean. said: (n,) as of `answers`."""
    found = {name: _score(task, said[index]) for name, task, index in _tested(rows)}
    return {MEAN: float(np.mean(list(found.values()))), **found}


def resampled(rows: pd.DataFrame, said: np.ndarray) -> dict[str, np.ndarray]:
    """The same over samples of as many rows of each task, with replacement: (RESAMPLES,) each; the same rows at each call."""
    found = {}
    for name, task, index in _tested(rows):
        random = np.random.default_rng(0)
        drawn = (random.integers(len(index), size=len(index)) for _ in range(metrics.RESAMPLES))
        found[name] = np.array([_score(task.iloc[at], said[index[at]]) for at in drawn])
    return {MEAN: np.mean(list(found.values()), axis=0), **found}


def _tested(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame, np.ndarray]]:
    """Name, tested rows and their positions, of each task that has some."""
    places = np.flatnonzero((rows["part"] == "test").to_numpy())
    for name, index in rows.iloc[places].groupby("task", sort=False).indices.items():
        yield str(name), rows.iloc[places[index]], places[index]


def _score(rows: pd.DataFrame, said: np.ndarray) -> float:
    kind, labels = rows["kind"].iloc[0], rows["label"].to_numpy()
    if kind == "sts":
        return metrics.value("spearman", labels.astype(float), said)
    if kind == "pairs":
        positive = labels == POSITIVE
        return float(sk.average_precision_score(positive, said)) if positive.any() else 0.0
    return float(said.mean())
