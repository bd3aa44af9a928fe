"""The structure that loses the least, by the scores of a survey, at a number of encoder parameters."""

from dataclasses import dataclass

import numpy as np

from hpc_compress.search.allocation import Place, allocate, levels
from hpc_compress.search.space import Shape, Space
from hpc_compress.search.structures import Site, Structures
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
        structures = Structures(self.space, self.shape)
        places = [self._place(site) for site in structures.sites]
        whole = sum(float(place.cost[0]) for place in places)
        chosen = allocate(places, whole - (self.survey.encoder_parameters - self.budget(removed)))
        return structures.structure([len(site.counts) - 1 - cut for site, cut in zip(structures.sites, chosen, strict=True)])

    def _place(self, site: Site) -> Place:
        """Level 0 is uncut. Layers that must keep the same heads keep those with the highest sum of scores."""
        stays = np.array(site.counts[::-1])
        of_unit = dict(zip(("heads", "ffn"), self.survey.parameters, strict=True))[site.unit]
        scores = np.sum([getattr(self.survey, site.unit)[layer] for layer in site.layers], axis=0)
        return Place(levels(scores, stays), len(site.layers) * of_unit * stays)
