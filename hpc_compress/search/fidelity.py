"""Whether a cheap figure ranks candidates as a dear one does. A stage that does not is widened, and then left out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import spearmanr

RANKS = 0.3  # Spearman correlation below which a figure is taken not to rank
LEAST_PAIRS = 8  # that it is judged by
TRUSTED, WIDENED, LEFT_OUT = range(3)


@dataclass
class Stage:
    """How far the figure that a stage finds is trusted to rank what a later stage finds."""

    figure: str
    later: str
    widened: str  # what is done once it does not rank, for the log
    left_out: str  # what is done if it still does not
    trust: int = TRUSTED
    notes: list[str] = field(default_factory=list)  # for the log; who reads them takes them away
    _judged: int = 0  # pairs that the last judgement was made by

    def judge(self, pairs: Sequence[tuple[float, float]]) -> int:
        """pairs: both figures of each candidate. The same pairs are judged once. Returns: TRUSTED, WIDENED or LEFT_OUT."""
        if len(pairs) < LEAST_PAIRS or len(pairs) == self._judged:
            return self.trust
        self._judged = len(pairs)
        cheap, dear = np.array(pairs).T
        correlation = float(spearmanr(cheap, dear).statistic) if np.ptp(cheap) > 0 and np.ptp(dear) > 0 else math.nan
        if math.isnan(correlation):  # all alike: there is nothing to rank
            return self.trust
        self.trust = TRUSTED if correlation >= RANKS else min(self.trust + 1, LEFT_OUT)
        then = {
            TRUSTED: "",
            WIDENED: f"; it does not rank, so {self.widened}",
            LEFT_OUT: f"; it does not rank, so {self.left_out}",
        }
        said = f"rank correlation of {self.figure} and {self.later} over {len(pairs)} structures: {correlation:.2f}"
        self.notes.append(said + then[self.trust])
        return self.trust
