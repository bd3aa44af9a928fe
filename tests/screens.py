"""A strategy that screens before it measures, for tests of readers; its worker is `light.run` or `run`. Imports no torch."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import light
import numpy as np

from hpc_compress.search.space import Shape
from hpc_compress.store import Store
from hpc_compress.types import Candidate, Genome, Measurement, Proposal, Screen, Step, Survey

SETTINGS = ("strategy._target_=screens.Screens", "probe=false", "generations=4")


def run(root: str, task_ids: Sequence[str], **ignored: Any) -> Iterator[str]:
    """A worker whose compressed models are faster and smaller than the base model."""
    store = Store(root)
    for task_id in task_ids:
        if store.outcome(task_id) is None:
            outcome = light.answer(store.task(task_id))
            if (found := outcome.measurement) and not found.of_base:
                small = {"latency_ms": (found.latency_ms[0] / 4,), "model_bytes": found.model_bytes // 4}
                outcome = outcome.model_copy(update={"measurement": found.model_copy(update=small)})
            store.settle(outcome)
        yield task_id


def largest(measurement: Measurement, whole: Measurement, /, **ignored: Any) -> float:
    """An objective by which the base model survives."""
    return measurement.model_bytes


class Screens:
    """Odd generations screen new genomes; even ones measure those with the smallest divergence.

    The first of each generation has been screened before, with another sample.
    """

    def __init__(self, shape: Shape, score: Callable[[Measurement], float], population: int = 4, **ignored: Any) -> None:
        self.score, self.population, self.number = score, population, 0
        self.screened: dict[str, Candidate] = {}
        self.steps = (Step(operator="fine_tune"),)
        self.deploys = ()
        self.studies = (Survey(),)

    def timed_again(self, population: Sequence[Candidate]) -> list[Candidate]:
        return list(population[:1])

    def ask(self, rng: np.random.Generator, population: Sequence[Candidate]) -> list[Proposal]:
        self.number += 1
        parent = population[0].id
        ranked = sorted(self.screened.values(), key=lambda candidate: candidate.screening.divergence)
        if self.number % 2 == 0:
            return [Proposal(genome=candidate.genome, parent=parent) for candidate in ranked[: self.population // 2]]
        epochs = [int(number) for number in rng.integers(1, 10**6, self.population)]
        genomes = [Genome(steps=(Step(operator="fine_tune", params={"epochs": number}),)) for number in epochs]
        again = [Proposal(genome=ranked[-1].genome, parent=parent, screen=Screen(sample=self.number))] if ranked else []
        return [*again, *(Proposal(genome=genome, parent=parent, screen=Screen()) for genome in genomes)]

    def tell(self, population: Sequence[Candidate], candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
        self.screened |= {candidate.id: candidate for candidate in candidates if candidate.screening}
        for candidate in candidates:
            if candidate.measurement:
                self.screened.pop(candidate.id, None)
        rivals = {candidate.id: candidate for candidate in (*population, *candidates) if candidate.measurement}
        ranked = sorted(rivals.values(), key=lambda candidate: (self.score(candidate.measurement), candidate.id), reverse=True)
        return tuple(ranked[: self.population])


class Once(Screens):
    """Proposes four genomes to be measured, and then nothing more."""

    def ask(self, rng: np.random.Generator, population: Sequence[Candidate]) -> list[Proposal]:
        self.number += 1
        genomes = [Genome(steps=(Step(operator="fine_tune", params={"epochs": epochs}),)) for epochs in range(1, 5)]
        return [Proposal(genome=genome, parent=population[0].id) for genome in genomes if self.number == 1]

    @property
    def ended(self) -> str:
        return "all is proposed" if self.number > 1 else ""
