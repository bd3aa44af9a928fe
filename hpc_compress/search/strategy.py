"""What the strategies over a space of genomes share. Proposes and learns nothing itself."""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from pydantic import Field, PrivateAttr

from hpc_compress.identity import canonical
from hpc_compress.search.coordinates import Coordinates, Vector
from hpc_compress.search.known import Known
from hpc_compress.search.space import Space
from hpc_compress.types import Candidate, Genome, Proposal, Record, Step

# Strategies sample without knowing what was proposed before; so many draws are tried until one is new.
REDRAW = Field(default=20, ge=0, description="further draws for a genome that was proposed before")


def require_package(module: str, package: str) -> None:
    """Raises: ValueError that says what to install when a module is not there."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"this strategy needs the package {package}; pip install 'hpc-compress[rivals]'")


class AbstractSpaceStrategy(Record, ABC):
    """Chooses among the genomes of a space, and proposes none twice.

    What it remembers between two calls must follow from what it was asked and told, since a resumed run repeats all calls.
    """

    known: Known
    space: Space
    population: int = Field(default=8, ge=1, description="genomes proposed in each generation")
    _seen: set[str] = PrivateAttr(default_factory=set)  # genomes that were proposed or are known, as canonical text

    @property
    def steps(self) -> tuple[Step, ...]:
        """Every kind of step that this strategy may use."""
        return self.space.steps(self.known.shape)

    @property
    def deploys(self) -> tuple[Step, ...]:
        """Every step of deploying that this strategy may use."""
        return self.space.deploy_steps()

    @property
    def coordinates(self) -> Coordinates:
        return Coordinates(space=self.space, shape=self.known.shape)

    @abstractmethod
    def ask(self, rng: np.random.Generator, population: Sequence[Candidate]) -> list[Proposal]:
        """At most `population` proposals; fewer when too many draws were proposed before."""

    @abstractmethod
    def tell(self, population: Sequence[Candidate], candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """Returns the survivors, fittest first. Some of the candidates may have failed."""

    def _remember(self, candidates: Iterable[Candidate]) -> None:
        """These are not proposed any more."""
        self._seen.update(canonical(candidate.genome) for candidate in candidates)

    def _is_new(self, genome: Genome) -> bool:
        """Whether a genome was not seen before. It is from now on."""
        text = canonical(genome)
        new = text not in self._seen
        self._seen.add(text)
        return new

    def _fresh(self, draw: Callable[[], Vector], redraw: int) -> Genome | None:
        """A drawn genome that is new; None when 1 + `redraw` draws gave none."""
        for _ in range(1 + redraw):
            if self._is_new(genome := self.coordinates.decode(draw())):
                return genome
        return None
