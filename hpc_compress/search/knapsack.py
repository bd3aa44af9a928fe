"""The structure that loses the least, by the scores of a survey, at a number of encoder parameters."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpc_compress.search.allocation import Place, allocate, levels
from hpc_compress.search.space import Shape, Space
from hpc_compress.types import Structure, Surveyed


@dataclass(frozen=True)
class Knapsack:
    """What each head and neuron is worth and costs."""

    space: Space
    shape: Shape  # of the base model
    survey: Surveyed

    def parameters(self, structure: Structure) -> int:
        """Encoder parameters that a structure keeps."""
        head, neuron = self.survey.parameters
        fewer_heads, fewer_neurons = (
            sum(self.shape.heads) - sum(structure.heads),
            self.shape.ffn * len(structure.ffn) - sum(structure.ffn),
        )
        return self.survey.encoder_parameters - head * fewer_heads - neuron * fewer_neurons

    def budget(self, removed: float) -> float:
        """Encoder parameters that may be kept when a share of them goes; never fewer than what can't be cut.

        removed: share of the encoder's parameters.
        """
        depth = len(self.shape.heads)
        nothing = self.parameters(Structure(heads=(0,) * depth, ffn=(0,) * depth))
        return max((1 - removed) * self.survey.encoder_parameters, nothing)

    def best(self, removed: float) -> Structure:
        """The structure within `budget(removed)` whose removed heads and neurons have the smallest sum of scores."""
        head, neuron = self.survey.parameters
        heads = [np.arange(heads, -1, -1) for heads in self.shape.heads]
        widths = [np.array(self.space.widths(self.shape)[::-1])] * len(heads)
        places = [*_places(self.survey.heads, heads, head), *_places(self.survey.ffn, widths, neuron)]
        whole = sum(float(place.cost[0]) for place in places)
        chosen = allocate(places, whole - (self.survey.encoder_parameters - self.budget(removed)))
        kept = [int(stays[level]) for stays, level in zip((*heads, *widths), chosen, strict=True)]
        return Structure(heads=tuple(kept[: len(heads)]), ffn=tuple(kept[len(heads) :]))


def _places(scores: Sequence[Sequence[float]], kept: Sequence[np.ndarray], cost: int) -> list[Place]:
    """One for each layer. kept: numbers of units that may stay, falling; cost: of one unit."""
    return [Place(levels(np.array(score), stays), cost * stays) for score, stays in zip(scores, kept, strict=True)]
