"""Structures of one encoder as rows of levels: whole numbers, one for each site. Knows no times and no scores.

A site is a place where structures differ: the attention of a layer, whose levels are its heads, or an FFN, whose levels are its
widths in steps of the space. Where all layers must keep the same heads, their attention is one site.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from hpc_compress.search.space import Shape, Space
from hpc_compress.types import Structure

Levels = tuple[int, ...]  # (sites,)


class Site(NamedTuple):
    """Where structures differ."""

    unit: Literal["heads", "ffn"]
    layers: tuple[int, ...]  # that have the same number of units
    counts: tuple[int, ...]  # (levels,) units of each layer, rising from 0


@dataclass(frozen=True)
class Structures:
    """Translates both ways between the structures of a space and levels."""

    space: Space
    shape: Shape  # of the base model

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Heads first."""
        layers, widths = range(len(self.shape.heads)), self.space.widths(self.shape)
        attention = [tuple(layers)] if self.shape.alike else [(layer,) for layer in layers]
        heads = [Site("heads", each, tuple(range(self.shape.heads[each[0]] + 1))) for each in attention]
        return (*heads, *(Site("ffn", (layer,), widths) for layer in layers))

    def structure(self, levels: Sequence[int]) -> Structure:
        kept = {"heads": [0] * len(self.shape.heads), "ffn": [0] * len(self.shape.heads)}
        for site, level in zip(self.sites, levels, strict=True):
            for layer in site.layers:
                kept[site.unit][layer] = site.counts[int(level)]
        return Structure(heads=tuple(kept["heads"]), ffn=tuple(kept["ffn"]))

    def levels(self, structure: Structure) -> Levels | None:
        """None for a structure that is outside the space."""
        if structure.layers is not None or structure.hidden is not None or len(structure.heads) != len(self.shape.heads):
            return None
        kept, levels = {"heads": structure.heads, "ffn": structure.ffn}, []
        for site in self.sites:
            own = {kept[site.unit][layer] for layer in site.layers}
            if len(own) > 1 or not own <= set(site.counts):
                return None
            levels.append(site.counts.index(own.pop()))
        return tuple(levels)
