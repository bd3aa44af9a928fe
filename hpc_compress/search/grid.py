"""A grid, as a user tries it by hand: a few sizes, each cut by the scores, trained, and deployed in every way."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
from pydantic import Field, PrivateAttr, model_validator

from hpc_compress.search import survival
from hpc_compress.search.knapsack import Knapsack
from hpc_compress.search.strategy import AbstractSpaceStrategy
from hpc_compress.types import Candidate, Genome, Proposal, Step, Survey


class AbstractGrid(AbstractSpaceStrategy):
    """Proposes the whole grid, some of it in each generation, and then nothing more. Learns nothing.

    What is not cut is not trained.
    """

    removed: tuple[float, ...] = Field(
        default=(0.0, 0.33, 0.5, 0.67, 0.8), min_length=1, description="shares of the encoder's parameters to remove"
    )
    training: str = Field(default="short", description="the training after a cut, a name of space.trainings")
    _next: int = PrivateAttr(default=0)  # the first point that was not proposed yet
    _done: bool = PrivateAttr(default=False)  # whether nothing was left to be proposed

    @model_validator(mode="after")
    def _possible(self) -> "AbstractGrid":
        self.space.require_training(self.training)
        if wrong := [share for share in self.removed if not 0 <= share < 1]:
            raise ValueError(f"removed={list(self.removed)} holds {wrong[0]}; a share is from 0 to below 1")
        return self

    def ask(self, rng: np.random.Generator, population: Sequence[Candidate]) -> list[Proposal]:
        self._remember(population)
        proposals: list[Proposal] = []
        points = list(self._points())
        while self._next < len(points) and len(proposals) < self.population:
            if self._is_new(genome := points[self._next]):
                proposals.append(Proposal(genome=genome))
            self._next += 1
        self._done = not proposals
        return proposals

    @property
    def ended(self) -> str:
        """Why nothing more is proposed; "": there is more."""
        return "the whole grid is measured" if self._done else ""

    def tell(self, population: Sequence[Candidate], candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """Returns the front, the highest score first."""
        return survival.of_front(self.known, population, candidates)

    def _points(self) -> Iterator[Genome]:
        """Along diagonals, so that the first points have every size and every way to deploy."""
        cuts = [self._cut(share) for share in self.removed]
        deploys = list(self.space.possible_deploys().values())
        for shift in range(len(deploys)):
            for at, cut in enumerate(cuts):
                training = self.space.trainings[self.training] if cut else ()
                yield Genome(steps=(*cut, *training), deploy=deploys[(at + shift) % len(deploys)])

    @abstractmethod
    def _cut(self, share: float) -> tuple[Step, ...]:
        """The steps that remove this share of the encoder's parameters; none where nothing goes."""


class Grid(AbstractGrid):
    """Structures of the knapsack."""

    @property
    def studies(self) -> tuple[Survey, ...]:
        return (Survey(**self.space.scores),)

    def _cut(self, share: float) -> tuple[Step, ...]:
        assert self.known.survey is not None
        structure = Knapsack(self.space, self.known.shape, self.known.survey).best(share)
        return self.space.genome(self.known.shape, structure).steps
