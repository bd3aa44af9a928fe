"""Where to cut how much: the choice with the smallest loss within a budget. Plain numpy; knows no models."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 4000  # a budget is kept to within this part of it


@dataclass(frozen=True)
class Place:
    """Something that can be cut in levels, such as the heads of one layer; level 0 is uncut."""

    loss: np.ndarray  # (levels,) what is lost at each level
    cost: np.ndarray  # (levels,) what remains at each level: parameters, or time


def levels(scores: np.ndarray, kept: Sequence[int] | np.ndarray) -> np.ndarray:
    """The loss when so many units are kept, those with the highest scores: the sum of the others' scores.

    scores: (units,); kept: numbers of units. Returns: (len(kept),).
    """
    lost = np.concatenate([[0.0], np.cumsum(np.sort(np.asarray(scores, dtype=float)))])
    return lost[len(scores) - np.asarray(kept)]


def allocate(places: Sequence[Place], budget: float) -> list[int]:
    """The level of each place such that the sum of losses is smallest and the remaining cost is at most `budget`.

    The multiple-choice knapsack problem by dynamic programming over a grid of costs, as Frantar & Alistarh 2022 (SPDY,
    section 3.1). Costs are rounded up on the grid, so the budget is kept, and of equal losses the cheaper is taken.

    Raises: ValueError when even the cheapest levels cost more.
    """
    cheapest = sum(float(place.cost.min()) for place in places)
    if cheapest > budget * (1 + 1e-9):
        raise ValueError(f"a budget of {budget:.4g} can't be met: what can't be cut costs {cheapest:.4g} already")
    whole = sum(float(place.cost[0]) for place in places)
    if whole <= budget * (1 + 1e-9):
        return [0] * len(places)
    # What even the cheapest levels cost is set aside, so that the grid is as fine as the choice needs.
    room = max(budget - cheapest, 1e-12 * whole)  # of no room at all the grid would have infinitely many steps
    extra = [np.ceil((place.cost - place.cost.min()) / room * BINS - 1e-6).astype(int) for place in places]
    best = np.zeros(BINS + 1)  # least loss of the places so far, by cost at most
    chosen = []
    for place, steps in zip(places, extra, strict=True):
        table = np.full((len(place.loss), BINS + 1), np.inf)
        for level, (loss, step) in enumerate(zip(place.loss, steps, strict=True)):
            if step <= BINS:
                table[level, step:] = best[: BINS + 1 - step] + loss
        # Of equal losses the cheapest: the last one, as levels grow smaller.
        chosen.append(len(table) - 1 - table[::-1].argmin(axis=0))
        best = table.min(axis=0)
    at, result = BINS, []
    for steps, choice in zip(reversed(extra), reversed(chosen), strict=True):
        result.append(int(choice[at]))
        at -= steps[result[-1]]
    return result[::-1]
