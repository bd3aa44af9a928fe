"""Regularised evolution: the oldest member dies, however fit it is. Maximises the score.

References:
    Real et al. 2019, Regularized Evolution for Image Classifier Architecture Search, https://arxiv.org/abs/1802.01548
"""

from collections.abc import Sequence

import numpy as np
from pydantic import Field, PrivateAttr

from hpc_compress.search import survival
from hpc_compress.search.strategy import REDRAW, AbstractSpaceStrategy
from hpc_compress.types import Candidate, Genome, Proposal


class RegularizedEvolution(AbstractSpaceStrategy):
    """Each child is a mutant, in one coordinate, of the best of a random sample of the living."""

    members: int = Field(default=24, ge=2, description="candidates that live at a time; the first ones are random")
    sample: int = Field(default=6, ge=1, description="living candidates that are drawn for a parent; the best of them is it")
    redraw: int = REDRAW
    _alive: list[str] = PrivateAttr(default_factory=list)  # ids, the oldest first

    def ask(self, rng: np.random.Generator, population: Sequence[Candidate]) -> list[Proposal]:
        self._remember(population)
        ages = {id: age for age, id in enumerate(self._alive)}
        alive = sorted((candidate for candidate in population if candidate.id in ages), key=lambda c: ages[c.id])
        founders = max(0, self.members - len(alive))
        proposals = []
        for number in range(self.population):
            parent = self._parent(rng, alive) if alive and number >= founders else None
            if genome := self._child(rng, parent):
                proposals.append(Proposal(genome=genome, parent=parent.id if parent else None))
        return proposals

    def tell(self, population: Sequence[Candidate], candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """Returns the living and the best one ever, which is the result even if it died; the highest score first."""
        everyone = {candidate.id: candidate for candidate in (*population, *candidates)}
        ranked = survival.by_score(self.known, list(everyone.values()))
        born = [candidate.id for candidate in candidates if candidate.measurement and candidate.id not in self._alive]
        self._alive = [*self._alive, *born][-self.members :]
        return tuple(candidate for candidate in ranked if candidate.id in self._alive or candidate is ranked[0])

    def _parent(self, rng: np.random.Generator, alive: Sequence[Candidate]) -> Candidate:
        drawn = rng.integers(len(alive), size=self.sample)
        return survival.by_score(self.known, [alive[at] for at in sorted(set(drawn.tolist()))])[0]

    def _child(self, rng: np.random.Generator, parent: Candidate | None) -> Genome | None:
        coordinates = self.coordinates
        vector = coordinates.encode(parent.genome) if parent else None
        if vector is None:
            return self._fresh(lambda: coordinates.draw(rng), self.redraw)
        return self._fresh(lambda: coordinates.mutate(rng, vector), self.redraw)
