"""Optuna's samplers on the vector of objectives: TPE or NSGA-II.

References:
    Akiba et al. 2019, Optuna: A Next-generation Hyperparameter Optimization Framework, https://arxiv.org/abs/1907.10902
    Ozaki et al. 2022, Multiobjective Tree-Structured Parzen Estimator, https://doi.org/10.1613/jair.1.13188
    Deb et al. 2002, A fast and elitist multiobjective genetic algorithm: NSGA-II, https://doi.org/10.1109/4235.996017
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, PrivateAttr, model_validator

from hpc_compress.identity import canonical
from hpc_compress.search import front, survival
from hpc_compress.search.strategy import REDRAW, AbstractSpaceStrategy, require_package
from hpc_compress.types import Candidate, Genome, Proposal

if TYPE_CHECKING:
    import optuna


class Optuna(AbstractSpaceStrategy):
    """A study in memory. Its trials are this strategy's genomes."""

    sampler: Literal["tpe", "nsga2"] = Field(default="tpe", description="tpe: models of good and bad genomes; nsga2: evolution")
    startup: int = Field(default=16, ge=1, description="tpe: candidates that are measured before the models are used")
    members: int = Field(default=16, ge=2, description="nsga2: candidates of a generation of the sampler, at least 2")
    redraw: int = REDRAW
    _study: "optuna.Study | None" = PrivateAttr(default=None)
    _trials: dict[str, int] = PrivateAttr(default_factory=dict)  # that wait for a result: their numbers by genome

    @model_validator(mode="after")
    def _installed(self) -> "Optuna":
        require_package("optuna", "optuna")
        return self

    def ask(self, rng: np.random.Generator, population: Sequence[Candidate]) -> list[Proposal]:
        self._remember(population)
        study = self._started()
        # A sampler of each generation's own, since Optuna's have a state that can't be set.
        study.sampler = self._sampler(int(rng.integers(2**31)))
        drawn = [self._draw(study) for _ in range(self.population)]
        return [Proposal(genome=genome) for genome in drawn if genome]

    def tell(self, population: Sequence[Candidate], candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """Returns the front, the highest score first."""
        from optuna.trial import TrialState

        assert self.known.base is not None
        for candidate in candidates:
            number = self._trials.pop(canonical(candidate.genome), None)
            if number is None:
                continue
            found = candidate.measurement
            values = front.vector(found, self.known.base, self.known.objectives) if found else np.array(np.nan)
            if np.isfinite(values).all():
                self._started().tell(number, values.tolist())
            else:
                self._started().tell(number, state=TrialState.FAIL)
        return survival.of_front(self.known, population, candidates)

    def _draw(self, study: "optuna.Study") -> Genome | None:
        """A genome that is new; None when 1 + `redraw` trials had none."""
        from optuna.trial import TrialState

        distributions = self._distributions()
        for _ in range(1 + self.redraw):
            trial = study.ask(distributions)
            genome = self.coordinates.decode([trial.params[name] for name in distributions])
            if self._is_new(genome):
                self._trials[canonical(genome)] = trial.number
                return genome
            study.tell(trial, state=TrialState.FAIL)
        return None

    def _distributions(self) -> "dict[str, optuna.distributions.BaseDistribution]":
        """By coordinate. How a model is trained and deployed has no order."""
        from optuna.distributions import CategoricalDistribution, IntDistribution

        *levels, training, deploy = self.coordinates.sizes
        numbers = {f"level_{at}": IntDistribution(0, size - 1) for at, size in enumerate(levels)}
        names = {"training": training, "deploy": deploy}
        return {**numbers, **{name: CategoricalDistribution(range(size)) for name, size in names.items()}}

    def _started(self) -> "optuna.Study":
        import optuna

        if self._study is None:
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            self._study = optuna.create_study(directions=["minimize"] * len(self.known.objectives))
        return self._study

    def _sampler(self, seed: int) -> "optuna.samplers.BaseSampler":
        from optuna.samplers import NSGAIISampler, TPESampler

        if self.sampler == "nsga2":
            return NSGAIISampler(population_size=self.members, seed=seed)
        # constant_liar: trials of this generation that have no result yet count as bad, so that it does not draw them again.
        return TPESampler(n_startup_trials=self.startup, multivariate=True, constant_liar=True, seed=seed)
