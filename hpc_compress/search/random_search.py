"""Random search: what every other strategy must beat. Draws each coordinate of a genome uniformly and learns nothing.

References:
    Bergstra & Bengio 2012, Random Search for Hyper-Parameter Optimization, https://jmlr.org/papers/v13/bergstra12a.html
"""

from collections.abc import Sequence

import numpy as np

from hpc_compress.search import survival
from hpc_compress.search.strategy import REDRAW, AbstractSpaceStrategy
from hpc_compress.types import Candidate, Proposal


class RandomSearch(AbstractSpaceStrategy):
    """Uniform draws from the space."""

    redraw: int = REDRAW

    def ask(self, rng: np.random.Generator, population: Sequence[Candidate]) -> list[Proposal]:
        self._remember(population)
        drawn = [self._fresh(lambda: self.coordinates.draw(rng), self.redraw) for _ in range(self.population)]
        return [Proposal(genome=genome) for genome in drawn if genome]

    def tell(self, population: Sequence[Candidate], candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """Returns the front, the highest score first."""
        return survival.of_front(self.known, population, candidates)
