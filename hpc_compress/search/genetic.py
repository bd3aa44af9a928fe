"""The genetic strategy of the published method: mutation is pruning, crossover is distillation against the base model."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pydantic import Field, PrivateAttr, field_validator, model_validator

from hpc_compress.identity import canonical
from hpc_compress.search.objective import quality_of
from hpc_compress.search.space import Shape
from hpc_compress.types import Candidate, Genome, Measurement, Params, Proposal, Record, Step


class Choice(Record):
    """One alternative of a random draw: a step, and how likely it is."""

    weight: float = Field(ge=0)
    step: Step | None  # None: no step

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, values: Any) -> Any:
        """In a config the step lies flat: {weight: 1, operator: drop_layers, count: 1}. No step: operator: null."""
        if isinstance(values, dict) and "step" not in values:
            params = {key: value for key, value in values.items() if key not in ("weight", "operator")}
            none = not params and "operator" in values and values["operator"] is None
            step = None if none else {"operator": values.get("operator"), "params": params}
            return {"weight": values.get("weight"), "step": step}
        return values


class Genetic(Record):
    """Vary every member of the population by mutation and/or crossover, keep the fittest. Elitist: the best is never lost.

    A genome is in the population once. While there are fewer than `population` members, they take turns as parents; at the
    start, the base model is the parent of all.
    """

    shape: Shape  # of the base model
    score: Callable[[Measurement], float]  # what to maximise
    population: int = Field(default=8, ge=1, description="parents that vary in each generation (N)")
    survivors: int | None = Field(default=None, ge=1, description="candidates kept by selection (K); null: population")
    mutation_probability: float = Field(default=0.8, ge=0, le=1)
    crossover_probability: float = Field(default=0.4, ge=0, le=1)
    mutations: dict[str, Choice] = Field(description="one of them is drawn by weight; `fine_tune` follows")
    quantizations: dict[str, Choice] = Field(
        default={}, description="weights are probabilities; the rest up to 1 keeps the parent's precision"
    )
    vocabularies: dict[str, Choice] = Field(
        default={},
        description="the same for the step that makes the word embedding smaller, which comes before the quantization",
    )
    fine_tune: Params | None = Field(
        default={}, description="parameters of the training after a mutation; null: none, for crossovers that always follow"
    )
    distill: Params = Field(default={}, description="parameters of the crossover")
    inherit: bool = Field(
        default=True,
        description="a child starts with its parent's vocabulary and precision; false, as published: with those of the base",
    )
    redraw: int = Field(
        default=20,
        ge=0,
        description="further draws if a child is already known or equals its parent; 0, as published: it is trained anyway, "
        "with its own seed",
    )
    _seen: set[str] = PrivateAttr(default_factory=set)
    _drawn: Counter[str] = PrivateAttr(default_factory=Counter)  # how often a step was drawn for the same parent

    @field_validator("quantizations", "vocabularies")
    @classmethod
    def _probabilities(cls, choices: dict[str, Choice]) -> dict[str, Choice]:
        total = sum(choice.weight for choice in choices.values())
        if total > 1 + 1e-9:
            raise ValueError(f"the weights are probabilities and add up to {total:g}; at most 1 is allowed")
        return choices

    @model_validator(mode="after")
    def _possible(self) -> "Genetic":
        if self.mutation_probability > 0 and not any(choice.weight > 0 for choice in self.mutations.values()):
            raise ValueError("mutation_probability is above 0, but no mutation has a weight above 0")
        if empty := [name for name, choice in self.mutations.items() if choice.step is None]:
            raise ValueError(f"mutations.{empty[0]} has operator=null; a mutation needs an operator")
        return self

    @property
    def steps(self) -> tuple[Step, ...]:
        """Every kind of step that this strategy may use."""
        steps = _steps(self.mutations) if self.mutation_probability > 0 else []
        trained = self._fine_tune() if steps else ()
        distilled = [self._distill()] if self.crossover_probability > 0 else []
        return (*steps, *trained, *distilled)

    @property
    def deploys(self) -> tuple[Step, ...]:
        """Every step of deploying that this strategy may use."""
        if self.mutation_probability == 0:
            return ()
        return (*_steps(self.vocabularies), *_steps(self.quantizations))

    def ask(self, rng: np.random.Generator, population: Sequence[Candidate]) -> list[Proposal]:
        """Propose at most `population` children; a parent may draw neither mutation nor crossover."""
        proposals: list[Proposal] = []
        self._seen.update(canonical(candidate.genome) for candidate in population)
        for index in range(self.population):
            parent = population[index % len(population)]
            for _ in range(1 + self.redraw):
                child = self._vary(rng, parent.genome)
                if canonical(child) not in self._seen:
                    break
            if self.redraw == 0:
                child = self._replicate(parent.genome, child)
            if child != parent.genome and (self.redraw == 0 or canonical(child) not in self._seen):
                self._seen.add(canonical(child))
                proposals.append(Proposal(genome=child, parent=parent.id))
        return proposals

    def tell(self, population: Sequence[Candidate], candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """Returns the survivors of parents and children, fittest first."""
        rivals = {candidate.id: candidate for candidate in (*population, *candidates) if candidate.measurement}
        ranked = sorted(rivals.values(), key=self._rank, reverse=True)
        return tuple(ranked[: self.survivors or self.population])

    def _rank(self, candidate: Candidate) -> tuple[float, float, str]:
        assert candidate.measurement is not None
        # Quality and id break ties: many candidates can share F = 0, and arrival must not matter.
        return self.score(candidate.measurement), quality_of(candidate.measurement), candidate.id

    def _vary(self, rng: np.random.Generator, parent: Genome) -> Genome:
        # Both draws are always made, so that one probability does not shift the other's random stream.
        mutates, crosses = rng.random(2) < (self.mutation_probability, self.crossover_probability)
        if not (mutates or crosses):
            return parent
        steps, deploy = parent.steps, parent.deploy if self.inherit else ()
        if mutates:
            mutation = self._draw_mutation(rng, self.shape.after_all(steps))
            if mutation:
                steps = (*steps, mutation, *self._fine_tune())
            deploy = self._draw_deploy(rng, deploy)
        if crosses:
            steps = (*steps, self._distill())
        return Genome(steps=steps, deploy=deploy)

    def _draw_mutation(self, rng: np.random.Generator, shape: Shape | None) -> Step | None:
        """One of the mutations that the shape admits; None when none does."""
        possible = [choice for choice in self.mutations.values() if shape and choice.step and shape.after(choice.step)]
        weights = np.array([choice.weight for choice in possible])
        if weights.sum() == 0:
            return None
        return possible[int(rng.choice(len(possible), p=weights / weights.sum()))].step

    def _draw_deploy(self, rng: np.random.Generator, inherited: tuple[Step, ...]) -> tuple[Step, ...]:
        """At most one vocabulary and one precision, in this order: one model, one genome."""
        trims = {choice.step.operator for choice in self.vocabularies.values() if choice.step}
        vocabulary = tuple(step for step in inherited if step.operator in trims)
        precision = tuple(step for step in inherited if step.operator not in trims)
        return (*self._draw(rng, self.vocabularies, vocabulary), *self._draw(rng, self.quantizations, precision))

    @staticmethod
    def _draw(rng: np.random.Generator, choices: dict[str, Choice], inherited: tuple[Step, ...]) -> tuple[Step, ...]:
        mark = rng.random()
        for choice in choices.values():
            mark -= choice.weight
            if mark < 0:
                return (choice.step,) if choice.step else ()
        return inherited

    def _replicate(self, parent: Genome, child: Genome) -> Genome:
        """The child with a number on its first new step, so that each child of a parent is trained from its own seed."""
        kept, new = len(parent.steps), child.steps[len(parent.steps) :]
        if not new:
            return child
        drawn = canonical(child.steps[: kept + 1])
        first = new[0].model_copy(update={"replicate": self._drawn[drawn]})
        self._drawn[drawn] += 1
        return child.model_copy(update={"steps": (*parent.steps, first, *new[1:])})

    def _fine_tune(self) -> tuple[Step, ...]:
        return () if self.fine_tune is None else (Step(operator="fine_tune", params=self.fine_tune),)

    def _distill(self) -> Step:
        return Step(operator="distill", params=self.distill)


def _steps(choices: dict[str, Choice]) -> list[Step]:
    """Every step that can be drawn."""
    return [choice.step for choice in choices.values() if choice.step and choice.weight > 0]
