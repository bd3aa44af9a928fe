"""Metrics by name, as GLUE reports them, and their standard errors. Knows no model; all higher-is-better, all fractions of 1.

References:
    Efron & Tibshirani 1993, An Introduction to the Bootstrap (ch. 6 standard errors, ch. 8 paired data)
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics as sk

RESAMPLES = 200  # of a bootstrap; a standard error is then known to about 5 % of itself


def _correlation(function: Callable[..., Any]) -> Callable[..., float]:
    def metric(labels: np.ndarray, answers: np.ndarray, counts: np.ndarray | None = None) -> float:
        if counts is not None:
            labels, answers = np.repeat(labels, counts), np.repeat(answers, counts)
        # A constant has no correlation with anything; a model that predicts one has learnt nothing: 0.
        if np.ptp(answers) == 0 or np.ptp(labels) == 0:
            return 0.0
        return float(function(labels, answers).statistic)

    return metric


def _f1(labels: np.ndarray, answers: np.ndarray, counts: np.ndarray | None, positive: int) -> float:
    return float(sk.f1_score(labels, answers, pos_label=positive, zero_division=0.0, sample_weight=counts))


def _macro_f1(labels: np.ndarray, answers: np.ndarray, counts: np.ndarray | None = None) -> float:
    present = slice(None) if counts is None else counts > 0  # a class that was not drawn is no class of 0
    weights = None if counts is None else counts[present]
    return float(sk.f1_score(labels[present], answers[present], average="macro", zero_division=0.0, sample_weight=weights))


# Each takes (n,) labels, (n,) answers and how often each of the n examples counts; None: once.
METRICS: dict[str, Callable[..., float]] = {
    "accuracy": lambda labels, answers, counts=None: float(sk.accuracy_score(labels, answers, sample_weight=counts)),
    "macro_f1": _macro_f1,
    "matthews": lambda labels, answers, counts=None: float(sk.matthews_corrcoef(labels, answers, sample_weight=counts)),
    "pearson": _correlation(stats.pearsonr),
    "spearman": _correlation(stats.spearmanr),
}
CORRELATIONS = ("pearson", "spearman")


def answers_of(names: Sequence[str], outputs: np.ndarray) -> np.ndarray:
    """(n,) what metrics look at: the class with the largest of (n, classes) logits, or the number of (n, 1) outputs."""
    return outputs.reshape(len(outputs)) if names[0] in CORRELATIONS else outputs.argmax(-1)


def compute(names: Sequence[str], labels: np.ndarray, outputs: np.ndarray, positive: int = 1) -> dict[str, float]:
    """Metrics by name, in the order of `names`.

    labels: (n,) class ids or targets; outputs: (n, classes) logits, (n, 1) for regression; positive: the class of f1.
    """
    answers = answers_of(names, outputs)
    return {name: value(name, labels, answers, positive) for name in names}


def value(name: str, labels: np.ndarray, answers: np.ndarray, positive: int = 1, counts: np.ndarray | None = None) -> float:
    """One metric. labels, answers: (n,), as `answers_of` gives them; counts: (n,) how often each example counts."""
    return _f1(labels, answers, counts, positive) if name == "f1" else METRICS[name](labels, answers, counts)


def standard_errors(names: Sequence[str], labels: np.ndarray, answers: np.ndarray, positive: int = 1) -> dict[str, float]:
    """Of each metric, over samples of as many examples. The same whenever it is computed.

    labels, answers: (n,). Of an accuracy p it is sqrt(p (1 - p) / n), which the bootstrap comes to with many resamples.
    """
    found = {}
    for name in names:
        if name == "accuracy":
            found[name] = float(np.std(labels == answers) / math.sqrt(len(labels)))
            continue
        drawn = [value(name, target, said, positive, counts) for (target, said), counts in _resampled(labels, answers)]
        found[name] = float(np.std(drawn, ddof=1))
    return found


def difference(name: str, labels: np.ndarray, one: np.ndarray, other: np.ndarray, positive: int = 1) -> tuple[float, float]:
    """A metric of `one` minus that of `other`, whose (n,) answers are for the same examples, and its standard error.

    The two are resampled together: what makes an example hard for both does not count.
    """
    found = value(name, labels, one, positive) - value(name, labels, other, positive)
    if name == "accuracy":
        each = (labels == one).astype(float) - (labels == other)
        return found, float(np.std(each) / math.sqrt(len(labels)))
    drawn = [
        value(name, target, first, positive, counts) - value(name, target, second, positive, counts)
        for (target, first, second), counts in _resampled(labels, one, other)
    ]
    return found, float(np.std(drawn, ddof=1))


def _resampled(*columns: np.ndarray) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """Samples with replacement, of examples that have one value in each column: distinct rows, and how often each is drawn."""
    rows, often = np.unique(np.stack(columns, axis=1).astype(float), axis=0, return_counts=True)
    kept = [rows[:, index].astype(column.dtype) for index, column in enumerate(columns)]
    random = np.random.default_rng(0)
    for counts in random.multinomial(often.sum(), often / often.sum(), size=RESAMPLES):
        yield kept, counts


# --- of groups of answers, such as the words of a sentence: only whole groups are independent ---


BILOU = {"L-": "E-", "U-": "S-"}  # other letters for IOBES


def entities(tags: Iterable[str]) -> set[tuple[str, int, int]]:
    """Kind, first and last word of each entity of a sentence.

    tags: of each word, such as O, B-PER, I-PER. As in conlleval of CoNLL-2000, an I- after anything but its own kind begins an
    entity, so older files (IOB1) and careless models are read too; and so are E- and S- (IOBES), or L- and U- (BILOU).
    """
    from seqeval.metrics.sequence_labeling import get_entities  # takes a second to import

    return set(get_entities([BILOU.get(tag[:2], tag[:2]) + tag[2:] for tag in tags]))


def mean_f1(counts: np.ndarray) -> np.ndarray:
    """F1 = 2 right / (true + found), mean over the kinds that occur; 0 if none does.

    counts: (..., kinds, 3), of each kind how many are right, how many there are, and how many were found.
    """
    both = counts[..., 1] + counts[..., 2]
    kinds = (both > 0).sum(-1)
    return (2 * counts[..., 0] / np.maximum(both, 1)).sum(-1) / np.maximum(kinds, 1)


def resampled_counts(counts: np.ndarray) -> np.ndarray:
    """Sums over samples of as many groups, with replacement. counts: (groups, ...). Returns: (RESAMPLES, ...)."""
    random, groups = np.random.default_rng(0), len(counts)
    drawn = (np.bincount(random.integers(groups, size=groups), minlength=groups) for _ in range(RESAMPLES))
    return np.stack([np.tensordot(often, counts, 1) for often in drawn])


def noise(name: str, score: float, rows: int) -> float:
    """Two standard errors of a score that comes from so many rows: of a share, or of a correlation near 0."""
    return 2 / np.sqrt(rows) if name in ("matthews", *CORRELATIONS) else 2 * np.sqrt(score * (1 - score) / rows)
