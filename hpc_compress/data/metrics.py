"""Metrics by name, as GLUE reports them. Knows no model; all higher-is-better, all fractions of 1."""

from collections.abc import Sequence

import numpy as np
from scipy import stats
from sklearn import metrics as sk


def _f1(labels: np.ndarray, outputs: np.ndarray, positive: int) -> float:
    return float(sk.f1_score(labels, outputs.argmax(-1), pos_label=positive, zero_division=0.0))


def _correlation(function: object) -> object:
    def metric(labels: np.ndarray, outputs: np.ndarray) -> float:
        scores = outputs.reshape(len(labels))
        # A constant has no correlation with anything; a model that predicts one has learnt nothing: 0.
        if np.ptp(scores) == 0 or np.ptp(labels) == 0:
            return 0.0
        return float(function(labels, scores).statistic)  # type: ignore[operator]

    return metric


METRICS = {
    "accuracy": lambda labels, outputs: float(sk.accuracy_score(labels, outputs.argmax(-1))),
    "macro_f1": lambda labels, outputs: float(sk.f1_score(labels, outputs.argmax(-1), average="macro", zero_division=0.0)),
    "matthews": lambda labels, outputs: float(sk.matthews_corrcoef(labels, outputs.argmax(-1))),
    "pearson": _correlation(stats.pearsonr),
    "spearman": _correlation(stats.spearmanr),
}


def compute(names: Sequence[str], labels: np.ndarray, outputs: np.ndarray, positive: int = 1) -> dict[str, float]:
    """Metrics by name, in the order of `names`.

    labels: (n,) class ids or targets; outputs: (n, classes) logits, (n, 1) for regression; positive: the class of f1.
    """
    return {
        name: _f1(labels, outputs, positive) if name == "f1" else METRICS[name](labels, outputs)  # type: ignore[operator]
        for name in names
    }


def noise(name: str, score: float, rows: int) -> float:
    """Two standard errors of a score that comes from so many rows: of a share, or of a correlation near 0."""
    return 2 / np.sqrt(rows) if name in ("matthews", "pearson", "spearman") else 2 * np.sqrt(score * (1 - score) / rows)
