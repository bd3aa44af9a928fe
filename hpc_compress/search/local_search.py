"""Local search for a structure within a budget of parameters: (1 + lambda) with level switches, judged without training.

References:
    Sieberling et al. 2024, EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search,
    https://arxiv.org/abs/2410.14649
"""

from collections.abc import Sequence

import numpy as np
from pydantic import Field, PrivateAttr, model_validator

from hpc_compress.identity import canonical
from hpc_compress.search import survival
from hpc_compress.search.knapsack import Knapsack
from hpc_compress.search.strategy import REDRAW, AbstractSpaceStrategy
from hpc_compress.types import Candidate, Genome, Proposal, Record, Screen, Structure, Survey


class Selection(Record):
    """One of the selections that the offspring of a parent go through."""

    judge: int = Field(ge=1, description="sentences that a structure is judged on")
    keep: int = Field(ge=1, description="structures that are kept")


class LocalSearch(AbstractSpaceStrategy):
    """At one budget after another, a parent is replaced by its best offspring, as long as that is no worse.

    A parent's offspring are its structure with some levels switched: one place gets more heads or neurons, another one fewer.
    They are screened, not trained. Each selection takes one generation of the run and judges fewer offspring on more sentences;
    the parent joins the last one. After `rounds` parents, the structure is trained, and measured in every way to deploy it.
    Then the next budget begins; after the last one nothing more is proposed.
    """

    removed: tuple[float, ...] = Field(
        default=(0.5, 0.67, 0.8), min_length=1, description="shares of the encoder's parameters to remove: a budget each"
    )
    rounds: int = Field(default=6, ge=1, description="parents at each budget")
    selections: tuple[Selection, ...] = Field(
        default=(Selection(judge=64, keep=4), Selection(judge=512, keep=1)),
        min_length=1,
        description="they follow one another",
    )
    switches: int = Field(default=3, ge=1, description="most levels that an offspring switches")
    training: str = Field(default="short", description="of the structure that was found, a name of space.trainings")
    redraw: int = REDRAW
    _asked: int = PrivateAttr(default=0)  # generations so far: each one screens on a sample of its own
    _budget: int = PrivateAttr(default=0)  # position in `removed`
    _round: int = PrivateAttr(default=0)
    _selection: int = PrivateAttr(default=0)  # position in `selections`
    _parent: Structure | None = PrivateAttr(default=None)
    _rivals: list[Structure] = PrivateAttr(default_factory=list)  # of the present selection, without the parent
    _found: list[Genome] = PrivateAttr(default_factory=list)  # to be measured
    _idle: bool = PrivateAttr(default=False)  # whether nothing was left to be proposed

    @model_validator(mode="after")
    def _possible(self) -> "LocalSearch":
        self.space.require_training(self.training)
        if wrong := [share for share in self.removed if not 0 < share < 1]:
            raise ValueError(f"removed={list(self.removed)} holds {wrong[0]}; a share is above 0 and below 1")
        kept = [selection.keep for selection in self.selections]
        if kept[-1] != 1 or kept != sorted(kept, reverse=True):
            raise ValueError(
                f"the selections keep {kept}; each must keep at most as many as the one before, and the last keeps 1"
            )
        if self.population < 1 + (kept[-2] if len(kept) > 1 else 1):
            raise ValueError(f"population={self.population} has no room for the parent in the last selection; raise it")
        return self

    @property
    def studies(self) -> tuple[Survey, ...]:
        return (Survey(**self.space.scores),)

    def ask(self, rng: np.random.Generator, population: Sequence[Candidate]) -> list[Proposal]:
        self._asked += 1
        if not self._found and not self._rivals and self._budget < len(self.removed):
            self._breed(rng)
        if self._found:
            found, self._found = self._found[: self.population], self._found[self.population :]
            return [Proposal(genome=genome) for genome in found]
        rivals = list(self._rivals)
        self._idle = not rivals
        if rivals and self._is_last and self._parent and self._parent not in rivals:
            rivals.append(self._parent)
        screen = Screen(judge=self.selections[self._selection].judge, sample=self._asked)
        return [Proposal(genome=self._untrained(rival), screen=screen) for rival in rivals]

    def tell(self, population: Sequence[Candidate], candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """Returns the front of what was measured in full, the highest score first."""
        if self._rivals:
            self._select(candidates)
        return survival.of_front(self.known, population, candidates)

    @property
    def ended(self) -> str:
        """Why nothing more is proposed; "": there is more."""
        done = self._budget == len(self.removed) and not self._found and self._idle
        return "every budget has its structure" if done else ""

    @property
    def _knapsack(self) -> Knapsack:
        assert self.known.survey is not None
        return Knapsack(self.space, self.known.shape, self.known.survey)

    @property
    def _is_last(self) -> bool:
        return self._selection == len(self.selections) - 1

    def _untrained(self, structure: Structure) -> Genome:
        return self.space.genome(self.known.shape, structure)

    def _breed(self, rng: np.random.Generator) -> None:
        """Offspring of the parent, which are new; without any, the budget is done."""
        removed = self.removed[self._budget]
        parent = self._parent = self._parent or self._knapsack.best(removed)
        for _ in range(self.population - (len(self.selections) == 1)):
            for _ in range(1 + self.redraw):
                child = self._switched(rng, parent, self._knapsack.budget(removed))
                if child != parent and self._is_new(self._untrained(child)):
                    self._rivals.append(child)
                    break
        if not self._rivals:
            self._end_budget()

    def _select(self, candidates: Sequence[Candidate]) -> None:
        """Who goes on to the next selection, or is the next parent.

        A candidate whose task failed is judged by its last screening, if it had one.
        """
        structures = {canonical(self._untrained(rival)): rival for rival in (*self._rivals, *filter(None, [self._parent]))}
        divergences = {
            text: candidate.screening.divergence
            for candidate in candidates
            if candidate.screening and (text := canonical(candidate.genome)) in structures
        }
        best = [structures[text] for text in sorted(divergences, key=lambda text: (divergences[text], text))]
        if not self._is_last and best:
            self._rivals = best[: self.selections[self._selection].keep]
            self._selection += 1
            return
        self._parent = best[0] if best else self._parent
        self._rivals, self._selection, self._round = [], 0, self._round + 1
        if self._round == self.rounds:
            self._end_budget()

    def _end_budget(self) -> None:
        assert self._parent is not None
        training = self.space.trainings[self.training]
        self._found = [
            self.space.genome(self.known.shape, self._parent, training, deploy)
            for deploy in self.space.possible_deploys().values()
        ]
        self._parent, self._round, self._budget = None, 0, self._budget + 1

    def _switched(self, rng: np.random.Generator, parent: Structure, budget: float) -> Structure:
        """Few switches are likelier than many, as published (section 3.2)."""
        structure = parent
        for _ in range(int(rng.integers(1, self.switches + 1, size=2).min())):
            structure = self._switch(rng, structure, budget)
        return structure

    def _switch(self, rng: np.random.Generator, structure: Structure, budget: float) -> Structure:
        """One place gets a level more. Another one loses levels until the budget holds; if it can't, nothing changes.

        What is then left of the budget goes to other places, since a head and a level of neurons differ in size.
        """
        structures, knapsack = self.coordinates.structures, self._knapsack
        most = [len(site.counts) - 1 for site in structures.sites]
        levels = list(structures.levels(structure) or ())

        def fits() -> bool:
            return knapsack.parameters(structures.structure(levels)) <= budget

        up, down, *others = rng.permutation(len(levels)).tolist()
        if levels[up] == most[up] or levels[down] == 0:
            return structure
        levels[up] += 1
        while not fits():
            if levels[down] == 0:
                return structure
            levels[down] -= 1
        for other in others:
            if levels[other] < most[other]:
                levels[other] += 1
                levels[other] -= not fits()
        return structures.structure(levels)
