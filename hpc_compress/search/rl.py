"""Reinforcement learning: a policy that draws each coordinate of a genome, and is moved towards what scored well.

References:
    Williams 1992, Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning (REINFORCE)
    Zoph & Le 2017, Neural Architecture Search with Reinforcement Learning, https://arxiv.org/abs/1611.01578
"""

import math
from collections.abc import Sequence

import numpy as np
from pydantic import Field, PrivateAttr

from hpc_compress.search import survival
from hpc_compress.search.coordinates import Vector
from hpc_compress.search.strategy import REDRAW, AbstractSpaceStrategy
from hpc_compress.types import Candidate, Proposal


class PolicyGradient(AbstractSpaceStrategy):
    """A softmax for each coordinate, independent of the others. At first all values are equally likely."""

    learning_rate: float = Field(default=2.0, gt=0, description="of the logits, by the mean gradient of a generation")
    entropy: float = Field(default=0.01, ge=0, description="reward for a policy that is undecided")
    memory: float = Field(
        default=0.8, ge=0, lt=1, description="of the moving average of rewards, which a reward is compared with"
    )
    floor: float = Field(
        default=-5.0, lt=0, description="the lowest reward; the base model's is 0, and a quality of 0 has -inf"
    )
    redraw: int = REDRAW
    _logits: list[np.ndarray] = PrivateAttr(default_factory=list)  # of each coordinate, (values,)
    _average: float | None = PrivateAttr(default=None)

    def ask(self, rng: np.random.Generator, population: Sequence[Candidate]) -> list[Proposal]:
        self._remember(population)
        chances = self._policy()

        def draw() -> Vector:
            return tuple(int(rng.choice(len(chance), p=chance)) for chance in chances)

        drawn = [self._fresh(draw, self.redraw) for _ in range(self.population)]
        return [Proposal(genome=genome) for genome in drawn if genome]

    def tell(self, population: Sequence[Candidate], candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """Returns the front, the highest score first."""
        vectors = {candidate.id: self.coordinates.encode(candidate.genome) for candidate in candidates}
        acts = [(vector, self._reward(c)) for c in candidates if c.measurement and (vector := vectors[c.id]) is not None]
        if acts:
            self._learn([vector for vector, _ in acts], np.array([reward for _, reward in acts]))
        return survival.of_front(self.known, population, candidates)

    def _policy(self) -> list[np.ndarray]:
        """The chances of each coordinate's values."""
        self._logits = self._logits or [np.zeros(size) for size in self.coordinates.sizes]
        return [np.exp(logit - logit.max()) / np.exp(logit - logit.max()).sum() for logit in self._logits]

    def _reward(self, candidate: Candidate) -> float:
        assert self.known.base is not None
        assert candidate.measurement is not None
        own, base = (self.known.score(measurement) for measurement in (candidate.measurement, self.known.base))
        return max(self.floor, own - base if math.isfinite(base) else own)

    def _learn(self, vectors: Sequence[Vector], rewards: np.ndarray) -> None:
        """One step up the expected reward: the mean of (reward - average) * d log p, Williams 1992, section 3."""
        average = float(rewards.mean()) if self._average is None else self._average
        for at, chance in enumerate(self._policy()):
            chosen = np.eye(len(chance))[[vector[at] for vector in vectors]]
            gradient = ((rewards - average)[:, None] * (chosen - chance)).mean(axis=0)
            surprise = np.log(np.maximum(chance, 1e-300))
            undecided = -chance * (surprise - chance @ surprise)  # of the entropy, by the logits
            self._logits[at] = self._logits[at] + self.learning_rate * (gradient + self.entropy * undecided)
        self._average = self.memory * average + (1 - self.memory) * float(rewards.mean())
