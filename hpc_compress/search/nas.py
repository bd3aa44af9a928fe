"""Neural architecture search by Syne Tune's multi-objective regularised evolution.

References:
    Salinas et al. 2022, Syne Tune: A Library for Large Scale Hyperparameter Tuning, https://proceedings.mlr.press/v188/salinas22a
    Klein et al. 2023, Structural Pruning of Pre-trained Language Models via Neural Architecture Search,
    https://arxiv.org/abs/2405.02267
    Salinas et al. 2021, A multi-objective perspective on jointly tuning hardware and hyperparameters,
    https://arxiv.org/abs/2106.05680 (the order of a front)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field, PrivateAttr, model_validator

from hpc_compress.search import front, survival
from hpc_compress.search.coordinates import Vector
from hpc_compress.search.strategy import REDRAW, AbstractSpaceStrategy, require_package
from hpc_compress.types import Candidate, Proposal


class Nas(AbstractSpaceStrategy):
    """Each child is a mutant, in one coordinate, of the best of a random sample of the living; the oldest dies."""

    members: int = Field(default=24, ge=2, description="candidates that live at a time; the first ones are random")
    sample: int = Field(default=6, ge=1, description="living candidates that are drawn for a parent; the best of them is it")
    redraw: int = REDRAW
    _searcher: Any = PrivateAttr(default=None)
    _told: int = PrivateAttr(default=0)

    @model_validator(mode="after")
    def _installed(self) -> "Nas":
        require_package("syne_tune", "syne-tune")
        return self

    def ask(self, rng: np.random.Generator, population: Sequence[Candidate]) -> list[Proposal]:
        self._remember(population)
        searcher, coordinates = self._started(), self.coordinates
        searcher.random_state = np.random.RandomState(int(rng.integers(2**31)))

        def draw() -> Vector:
            # Syne Tune draws the first candidates from a global generator, which a resumed run could not repeat.
            if len(searcher.population) < self.members:
                return coordinates.draw(rng)
            return tuple(int(value) for value in searcher.suggest().values())

        drawn = [self._fresh(draw, self.redraw) for _ in range(self.population)]
        return [Proposal(genome=genome) for genome in drawn if genome]

    def tell(self, population: Sequence[Candidate], candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """Returns the front, the highest score first."""
        assert self.known.base is not None
        for candidate in candidates:
            vector = self.coordinates.encode(candidate.genome)
            if candidate.measurement and vector is not None:
                values = front.vector(candidate.measurement, self.known.base, self.known.objectives)
                config = {_name(at): value for at, value in enumerate(vector)}
                self._started().on_trial_complete(self._told, config, values.tolist())
                self._told += 1
        return survival.of_front(self.known, population, candidates)

    def _started(self) -> Any:
        from syne_tune.config_space import randint
        from syne_tune.optimizer.schedulers.multiobjective import MultiObjectiveRegularizedEvolution

        if self._searcher is None:
            self._searcher = MultiObjectiveRegularizedEvolution(
                {_name(at): randint(0, size - 1) for at, size in enumerate(self.coordinates.sizes)},
                population_size=self.members,
                sample_size=self.sample,
                multiobjective_priority=_ranks,
                random_seed=0,  # of no effect: `ask` gives it a generator
            )
        return self._searcher


def _name(at: int) -> str:
    return f"coordinate_{at:03d}"


def _ranks(vectors: np.ndarray) -> np.ndarray:
    """(n,) the place of each of the (n, objectives) vectors, the best one first.

    Syne Tune 0.16 takes the sorted positions themselves for the places, so the best ones would be parents by chance only.
    """
    from syne_tune.optimizer.schedulers.multiobjective.non_dominated_priority import nondominated_sort

    places = np.empty(len(vectors), dtype=int)
    places[nondominated_sort(vectors, dim=0)] = np.arange(len(vectors))
    return places
