"""Structures of one encoder and how they vary: the knapsack's, level switching, crossing. Pure numpy.

Structures are rows of levels, as in `search.structures`. A site's price is what its level is predicted to take on the device,
so equal prices mean equal speed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpc_compress.search.allocation import Place, allocate
from hpc_compress.search.prediction import Prediction
from hpc_compress.search.structures import Levels, Structures
from hpc_compress.types import Step

STEPS = 6  # a step is the levels that a site keeps, divided by this


@dataclass(frozen=True)
class Sites:
    """The price of each level of each site, and what it loses. Made by `Sites.of`."""

    prices: tuple[np.ndarray, ...]  # for each site (levels,): share of the time of all blocks of the base model; level 0 is 0
    losses: tuple[np.ndarray, ...]  # for each site (levels,): the removed share of the scores

    @staticmethod
    def of(structures: Structures, predictions: Sequence[Prediction], deploy: Sequence[Step]) -> "Sites":
        """predictions: for each device; a price is the mean over them. deploy: the way to deploy whose times are the prices."""
        depth = len(structures.shape.heads)
        none = np.zeros((1, depth), dtype=int)
        times, losses = [], []
        for site in structures.sites:
            rows = np.zeros((len(site.counts), depth), dtype=int)
            rows[:, list(site.layers)] = np.array(site.counts)[:, None]
            others = np.zeros_like(rows)
            pair = (rows, others) if site.unit == "heads" else (others, rows)
            times.append([each.latency(*pair, deploy) - each.latency(none, none, deploy) for each in predictions])
            mass = predictions[0].mass(*pair)
            losses.append(mass - mass[-1])
        whole = np.maximum(sum(np.array([time[-1] for time in each]) for each in times), 1e-12)
        return Sites(tuple((np.array(each) / whole[:, None]).mean(0) for each in times), tuple(losses))

    @property
    def most(self) -> Levels:
        return tuple(len(price) - 1 for price in self.prices)

    def price(self, levels: Levels) -> float:
        """Share of the time of the base model's blocks."""
        return float(sum(price[level] for price, level in zip(self.prices, levels, strict=True)))

    def mass(self, levels: Levels) -> float:
        """Removed share of the scores."""
        return float(sum(loss[level] for loss, level in zip(self.losses, levels, strict=True)))

    def knapsack(self, budget: float) -> Levels:
        """The structure that removes the smallest share of the scores at this price at most."""
        places = [Place(loss[::-1], price[::-1]) for loss, price in zip(self.losses, self.prices, strict=True)]
        cuts = allocate(places, budget)
        return tuple(most - cut for most, cut in zip(self.most, cuts, strict=True))

    def moved(self, levels: Levels, site: int, steps: int) -> Levels | None:
        """One site with more or fewer units; None where nothing changes. A step is a sixth of the levels that the site keeps,
        rounded down, but at least one level."""
        level = levels[site] + steps * max(1, levels[site] // STEPS)
        level = min(max(0, level), self.most[site])
        return (*levels[:site], level, *levels[site + 1 :]) if level != levels[site] else None

    def switched(self, rng: np.random.Generator, levels: Levels, switches: int) -> Levels:
        """Levels move from some sites to others, at about the same price (level switching: Sieberling et al. 2024, EvoPress,
        section 3, https://arxiv.org/abs/2410.14649)."""
        for _ in range(switches):
            one, other = (int(site) for site in rng.choice(len(levels), 2, replace=False))
            cut = self.moved(levels, one, -int(rng.integers(1, 3)))
            if cut is not None:
                levels = self._refilled(cut, other, self.price(levels))
        return levels

    def _refilled(self, levels: Levels, site: int, price: float) -> Levels:
        """More levels at one site, up to a price."""
        prices, level = self.prices[site], levels[site]
        room = price * (1 + 1e-6) - self.price(levels) + prices[level]
        more = max(level, int(np.searchsorted(prices, room, side="right")) - 1)
        return (*levels[:site], more, *levels[site + 1 :])

    def crossed(self, rng: np.random.Generator, one: Levels, other: Levels) -> Levels:
        """Each site as in one of two parents."""
        mask = rng.random(len(one)) < 0.5
        return tuple(int(a if first else b) for a, b, first in zip(one, other, mask, strict=True))

    def neighbours(self, levels: Levels, by: int) -> dict[tuple[int, int], Levels]:
        """By site and direction, every structure that differs at one site, by so many steps."""
        moves = {(site, step): self.moved(levels, site, step) for site in range(len(levels)) for step in (by, -by)}
        return {move: near for move, near in moves.items() if near is not None}

    def combined(self, levels: Levels, gains: dict[tuple[int, int], float], by: int, count: int) -> list[Levels]:
        """Structures of about the same price, from what single moves gain: the best pairs of a site that grows and one that
        shrinks, alone and several together. Where the freed time pays only for a part of a site's move, the same part of its
        gain is counted.

        gains: of each move as in `neighbours`, how far the divergence falls. Returns: at most `count`, the best first.
        """
        near = self.neighbours(levels, by)
        prices = {move: abs(self.price(near[move]) - self.price(levels)) for move in gains}

        budget, together = self.price(levels), levels

        def gain(grow: int, shrink: int) -> float:
            less = near[shrink, -by]
            whole = self._refilled(less, grow, budget)
            if whole[grow] == levels[grow]:
                return -np.inf  # nothing grows, so this is no switch
            more = self.price(whole) - self.price(less)
            part = min(1.0, more / prices[grow, by]) if prices[grow, by] > 0 else 1.0
            return part * gains[grow, by] + gains[shrink, -by]

        pairs = sorted(
            (-gain(grow, shrink), grow, shrink)
            for grow in range(len(levels))
            for shrink in range(len(levels))
            if grow != shrink and (grow, by) in gains and (shrink, -by) in gains
        )
        found: list[Levels] = []
        used: set[int] = set()
        for loss, grow, shrink in pairs:
            if loss >= 0 or len(found) >= count:
                break
            found.append(self._refilled(near[shrink, -by], grow, budget))
            if not used & {grow, shrink} and (less := self.moved(together, shrink, -by)) is not None:
                used |= {grow, shrink}
                together = self._refilled(less, grow, budget)
                found.append(together)
        return [each for each in dict.fromkeys(found) if each != levels][:count]
