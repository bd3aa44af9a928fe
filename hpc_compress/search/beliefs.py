"""What the measured models say of others: what cuts, trainings and ways to deploy lose. Pure numpy.

A loss is in tenths of the base model's quality.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import isotonic_regression

from hpc_compress.search.structures import Levels

# Lost tenths of the quality before and after a training: medians over cut models of QQP (results/compression.csv) and of words
# (results/tokens.csv). What lost nearly all gets most of it back. They always count as one measured model each.
RECOVERED = ((1.0, 0.4), (3.0, 1.1), (8.0, 2.0))
UNSETTLED = 0.1  # the smallest loss that is expected after a training
RIDGE = 2  # penalty on differences between ways to deploy: as many measurements without a difference


class Cut(NamedTuple):
    """What is left of the encoder, and how it is found."""

    levels: Levels
    share: float = 0.0  # of the encoder, which `prune` removes block by block to find these levels; 0: they are given


class Design(NamedTuple):
    """A genome, by the names of the space."""

    cut: Cut
    training: str
    deploy: str

    @property
    def model(self) -> "Trained":
        """The cut and the training, without the way to deploy."""
        return self.cut, self.training


Trained = tuple[Cut, str]  # a model: a cut and the training after it


class Curve(NamedTuple):
    """A rising function through the origin and some points, by isotonic regression. Points at 0, or nearly so, say nothing."""

    x: np.ndarray
    y: np.ndarray

    @staticmethod
    def through(pairs: Sequence[tuple[float, float]]) -> "Curve":
        x, y = np.array(sorted([(0.0, 0.0), *(pair for pair in pairs if pair[0] > 1e-9)])).T
        return Curve(x, np.maximum(isotonic_regression(y).x, 0.0))

    def __call__(self, at: float) -> float:
        """Beyond the last point it goes on in a line through the origin; without any point it is the identity."""
        if at > self.x[-1]:
            return float(self.y[-1] * at / self.x[-1]) if self.x[-1] > 0 else float(at)
        return float(np.interp(at, self.x, self.y))


class Beliefs(NamedTuple):
    """What follows from the designs that were measured so far."""

    losses: dict[Trained, float]  # of each measured model, without what its ways to deploy add
    measured: dict[Design, str]  # candidates, by design
    by_divergence: Curve  # loss of an untrained cut that was screened
    by_scores: Curve  # of one that was not, by the share of the scores that it removes
    recovery: Curve  # what a training leaves of a loss
    offsets: dict[str, float]  # by precision and by vocabulary, what it loses more than others do with the same model


def recovery(losses: Mapping[Trained, float], trainings: Sequence[str]) -> Curve:
    """What one training leaves of a loss, by the models that were measured before and after. Trainings without
    a measurement between them are taken to leave the same share each.

    trainings: from the shortest to the longest; each goes on from the one before.
    """
    pairs = list(RECOVERED)
    for (cut, training), loss in losses.items():
        trained = trainings.index(training)
        less = [at for at in range(trained) if (cut, trainings[at]) in losses]
        start = losses[cut, trainings[less[-1]]] if less else 0.0
        if start > UNSETTLED:
            steps = trained - less[-1]
            part = (max(loss, UNSETTLED) / start) ** (1 / steps)
            pairs += [(start * part**step, start * part ** (step + 1)) for step in range(steps)]
    return Curve.through(pairs)


def offsets(models: Iterable[Mapping[str, float]], makeup: Callable[[str], Mapping[str, float]]) -> dict[str, float]:
    """What each part of a way to deploy adds to the loss of a model, by ridge regression on models whose losses are known in
    several ways; nearer to 0 where few are.

    models: of each one, its loss in every way to deploy that is known. makeup: of a way to deploy, the share of each part.
    """
    known = list(models)
    parts = sorted({part for losses in known for deploy in losses for part in makeup(deploy)})
    rows, differences = [], []
    for losses in known:
        made = np.array([[makeup(deploy).get(part, 0.0) for part in parts] for deploy in losses])
        lost = np.array(list(losses.values()))
        rows.append(made - made.mean(0))
        differences.append(lost - lost.mean())
    if not rows:
        return {}
    # RIDGE more measurements of each part, which show no difference.
    matrix = np.concatenate([*rows, math.sqrt(RIDGE) * np.eye(len(parts))])
    found = np.linalg.lstsq(matrix, np.concatenate([*differences, np.zeros(len(parts))]), rcond=None)[0]
    return {part: round(float(value), 9) for part, value in zip(parts, found, strict=True)}  # equal on every machine
