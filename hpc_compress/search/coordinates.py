"""A genome of a space as a vector of whole numbers. Knows no objectives and no strategy.

A vector has, in this order: the levels of a structure (see `search.structures`); the training and the way to deploy, as their
positions in the space. Each number counts from 0. One vector is one genome.
"""

from collections.abc import Sequence

import numpy as np

from hpc_compress.identity import canonical
from hpc_compress.search.space import Shape, Space
from hpc_compress.search.structures import Structures
from hpc_compress.types import Genome, Record

Vector = tuple[int, ...]


class Coordinates(Record):
    """Translates both ways between the genomes of a space and vectors."""

    space: Space
    shape: Shape  # of the base model

    @property
    def sizes(self) -> Vector:
        """How many values each coordinate may take."""
        levels = (len(site.counts) for site in self.structures.sites)
        return (*levels, len(self.space.trainings), len(self.space.possible_deploys()))

    @property
    def structures(self) -> Structures:
        return Structures(self.space, self.shape)

    def decode(self, vector: Sequence[int]) -> Genome:
        """The genome of a vector."""
        training = list(self.space.trainings.values())[vector[-2]]
        deploy = list(self.space.possible_deploys().values())[vector[-1]]
        return self.space.genome(self.shape, self.structures.structure(vector[:-2]), training, deploy)

    def encode(self, genome: Genome) -> Vector | None:
        """The vector of a genome; None when the genome is outside the space, as the base model may be."""
        levels = self.structures.levels(self.space.structure(self.shape, genome))
        steps = genome.steps[1:] if genome.steps and genome.steps[0].operator == "carve" else genome.steps
        trainings, deploys = list(self.space.trainings.values()), list(self.space.possible_deploys().values())
        if levels is None or steps not in trainings or genome.deploy not in deploys:
            return None
        vector = (*levels, trainings.index(steps), deploys.index(genome.deploy))
        return vector if canonical(self.decode(vector)) == canonical(genome) else None

    def draw(self, rng: np.random.Generator) -> Vector:
        """Each coordinate uniformly."""
        return tuple(int(number) for number in rng.integers(self.sizes))

    def mutate(self, rng: np.random.Generator, vector: Vector) -> Vector:
        """One coordinate, among those that have a choice, gets another value."""
        free = [at for at, size in enumerate(self.sizes) if size > 1]
        if not free:
            return vector
        at = free[int(rng.integers(len(free)))]
        other = int(rng.integers(self.sizes[at] - 1))
        return (*vector[:at], other + (other >= vector[at]), *vector[at + 1 :])
