"""A genome of a space as a vector of whole numbers. Knows no objectives and no strategy.

A vector has, in this order: the heads of each layer; the FFN width of each layer, as its position in `space.widths`; the
training and the way to deploy, as their positions in the space. Each number counts from 0. One vector is one genome.
"""

from collections.abc import Sequence

import numpy as np

from hpc_compress.identity import canonical
from hpc_compress.search.space import Shape, Space
from hpc_compress.types import Genome, Record, Structure

Vector = tuple[int, ...]


class Coordinates(Record):
    """Translates both ways between the genomes of a space and vectors."""

    space: Space
    shape: Shape  # of the base model

    @property
    def sizes(self) -> Vector:
        """How many values each coordinate may take."""
        widths = len(self.space.widths(self.shape))
        heads = tuple(heads + 1 for heads in self.shape.heads)
        return (*heads, *(widths for _ in heads), len(self.space.trainings), len(self.space.possible_deploys()))

    def decode(self, vector: Sequence[int]) -> Genome:
        """The genome of a vector."""
        depth, widths = len(self.shape.heads), self.space.widths(self.shape)
        numbers = [int(number) for number in vector]
        structure = Structure(
            heads=tuple(numbers[:depth]), ffn=tuple(widths[position] for position in numbers[depth : 2 * depth])
        )
        training = list(self.space.trainings.values())[numbers[-2]]
        deploy = list(self.space.possible_deploys().values())[numbers[-1]]
        return self.space.genome(self.shape, structure, training, deploy)

    def encode(self, genome: Genome) -> Vector | None:
        """The vector of a genome; None when the genome is outside the space, as the base model may be."""
        structure = self.space.structure(self.shape, genome)
        steps = genome.steps[1:] if genome.steps and genome.steps[0].operator == "carve" else genome.steps
        trainings, deploys = list(self.space.trainings.values()), list(self.space.possible_deploys().values())
        widths = self.space.widths(self.shape)
        if steps not in trainings or genome.deploy not in deploys or not set(structure.ffn) <= set(widths):
            return None
        vector = (
            *structure.heads,
            *(widths.index(width) for width in structure.ffn),
            trainings.index(steps),
            deploys.index(genome.deploy),
        )
        inside = len(vector) == len(self.sizes) and all(number < size for number, size in zip(vector, self.sizes, strict=True))
        return vector if inside and canonical(self.decode(vector)) == canonical(genome) else None

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
