"""A search that thinks first: predict every structure, screen the promising, train and measure the few.

What it knows of a genome grows at rising cost. Predicted: the share of the scores that a structure removes, its time by the
device's profile, its bytes. Screened: how far the repaired, untrained model's outputs are from the base model's, on sentences
that its repair has not seen; one structure is screened in every precision. Measured: quality, time and bytes of the deployed
model, untrained or trained. All choices follow from the generator and from what was told.

References:
    Kwon et al. 2022, A Fast Post-Training Pruning Framework for Transformers, https://arxiv.org/abs/2204.09656
    Park et al. 2024, K-prune, https://arxiv.org/abs/2308.03449 (scoring anew block by block)
    Sieberling et al. 2024, EvoPress, https://arxiv.org/abs/2410.14649 (level switching, screening)
"""

import math
from collections import Counter
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from pydantic import Field, PrivateAttr, model_validator

from hpc_compress.identity import canonical
from hpc_compress.search import beliefs, front, mixing, survival
from hpc_compress.search.beliefs import UNSETTLED, Beliefs, Cut, Design, Trained
from hpc_compress.search.fidelity import LEFT_OUT, TRUSTED, WIDENED, Stage
from hpc_compress.search.knapsack import Knapsack
from hpc_compress.search.known import Known
from hpc_compress.search.objective import latency_of, quality_of
from hpc_compress.search.prediction import Prediction
from hpc_compress.search.strategy import AbstractSpaceStrategy
from hpc_compress.search.structures import Levels, Structures
from hpc_compress.search.variation import Sites
from hpc_compress.types import (
    VOCABULARY_STEPS,
    Candidate,
    Genome,
    Profiling,
    Proposal,
    Screen,
    Screening,
    Step,
    Survey,
    outside,
)

ROWS = 650  # of training with the whole model, which take about as long as measuring a model
OUTSIDE = 0.1  # of that time, what a training takes besides the encoder's blocks
FOUND = 4.0  # measurements that take as long as finding a structure block by block
MOST_JUDGED = 4  # times the sentences that a structure is judged on at first
DOUBTFUL = 0.2  # halvings between the measured and the predicted time of a model (15 %), from which it is timed again
DEEPER = 0.7  # of the price of the deepest structure that was not trained in vain, the next deeper one has
PATIENCE = 3  # generations in a row without a proposal; after one more, the search ends
AIMED = 20.0  # times the gain of a model that keeps to the targets, against one that is far from them


class Mixture(NamedTuple):
    """A way to deploy in which a share of the layers have the precision of another one."""

    chain: tuple[Step, ...]
    one: str
    other: str
    share: float


class Bill(NamedTuple):
    """A generation whose cost shows when the next one is asked for."""

    kind: str
    units: float
    left: float  # device seconds of the budget before it
    again: int  # repeated timings of all candidates, before it


class Evolve(AbstractSpaceStrategy):
    """First the knapsack's structures at some budgets, measured untrained; then better structures by screening; then training.

    The knapsack's structures always compete. Later generations screen structures, or measure the designs that are expected
    to add the most hypervolume for what they cost. The population is the front, so a search that is stopped has a complete one.
    """

    budgets: tuple[float, ...] = Field(
        default=(1.0, 0.6, 0.4, 0.27, 0.18, 0.12),
        min_length=1,
        description="time of the encoder's blocks that the first structures keep, as shares of the base model's",
    )
    mixing: bool = Field(
        default=True, description="also try precisions that differ by layer, where two of the space can be mixed"
    )
    screens: int = Field(
        default=32,
        ge=0,
        description="structures that each generation of screening compares without training, after the first one (level "
        "switching: two for each site); 0: none are screened, in the whole search",
    )
    judge: int = Field(default=256, ge=1, description="sentences that a structure is judged on at first; more later")
    negligible: float = Field(
        default=0.02, ge=0, description="divergence below which a structure is not worth improving: nothing is lost that shows"
    )
    rescoring: bool = Field(
        default=True, description="also try structures whose scores are computed anew before each block is cut"
    )
    switching: int = Field(default=2, ge=0, description="depths at which level switching by marginals is tried")
    elites: int = Field(
        default=3,
        ge=0,
        description="of the fittest that have lived for one more generation are timed again, besides models whose measured "
        "time is far from its prediction",
    )
    profile_seconds: float = Field(default=90.0, gt=0, description="that the device's profile takes, where no file is given")
    _candidates: dict[str, Candidate] = PrivateAttr(default_factory=dict)  # all that was told, by id
    _designs: dict[str, Design] = PrivateAttr(default_factory=dict)  # what was chosen to be measured, by genome
    _screenings: dict[Cut, Screening] = PrivateAttr(default_factory=dict)  # the latest of each structure
    _in_precisions: dict[Cut, dict[str, float]] = PrivateAttr(default_factory=dict)  # divergences, by way to deploy
    _alive: set[Trained] = PrivateAttr(default_factory=set)  # of living candidates, whose masters are stored
    _asked: dict[Levels, int] = PrivateAttr(default_factory=dict)  # structures sent to be screened, and on which sample last
    _deepened: list[Cut] = PrivateAttr(default_factory=list)  # the knapsack's below the budgets that were tried
    _before: set[str] = PrivateAttr(default_factory=set)  # ids of the population that the last generation was asked for
    _settled: set[str] = PrivateAttr(default_factory=set)  # ids of those in it that are still in the population
    _best: list[Cut] | None = PrivateAttr(default=None)  # see `_best_cuts`; None: not thought over yet
    _sample: int = PrivateAttr(default=0)  # number of the last one that was screened on
    _beliefs: Beliefs | None = PrivateAttr(default=None)  # what follows from the candidates; None: not thought over yet
    _course: Generator[list[Proposal], None, None] | None = PrivateAttr(default=None)
    _rng: np.random.Generator = PrivateAttr(default_factory=lambda: np.random.default_rng(0))  # of the present generation
    _mixtures: dict[str, Mixture] = PrivateAttr(default_factory=dict)  # by name
    _mass_stage: Stage = PrivateAttr(
        default_factory=lambda: Stage(
            "removed scores", "divergence", "half of the structures are drawn without it", "structures are drawn without it"
        )
    )
    _screen_stage: Stage = PrivateAttr(
        default_factory=lambda: Stage(
            "divergence", "lost quality", "structures are judged on twice as many sentences", "models are chosen without it"
        )
    )
    _bill: "Bill | None" = PrivateAttr(default=None)
    _paid: dict[str, tuple[float, float]] = PrivateAttr(default_factory=dict)  # seconds and units so far, by kind of generation
    _sent: set[str] = PrivateAttr(default_factory=set)  # genomes that were proposed
    _idle: int = PrivateAttr(default=0)  # generations without a proposal, one after another
    _ended: str = PrivateAttr(default="")

    @model_validator(mode="after")
    def _possible(self) -> "Evolve":
        if wrong := [budget for budget in self.budgets if not 0 < budget <= 1]:
            raise ValueError(f"budgets={list(self.budgets)} holds {wrong[0]}; a share is above 0 and at most 1")
        return self

    @property
    def steps(self) -> tuple[Step, ...]:
        """Every kind of step that this strategy may use."""
        return (*super().steps, *(self._steps(Cut((), 0.5)) if self.rescoring and self.screens else ()))

    @property
    def deploys(self) -> tuple[Step, ...]:
        """Every step of deploying that this strategy may use; of those that differ by layer, one of each kind."""
        chains = self.space.possible_deploys()
        first = [mixing.mixed(chains[one], scheme, [0]) for one, _, scheme in mixing.pairs(chains) if self.mixing]
        return (*super().deploys, *{step.model_dump_json(): step for chain in first for step in chain[-1:]}.values())

    @property
    def studies(self) -> tuple[Survey | Profiling, ...]:
        chains = tuple(self.space.possible_deploys().values())
        survey = Survey(**self.space.scores, deploys=chains)
        return survey, Profiling(deploys=chains, seconds=self.profile_seconds)

    def ask(self, rng: np.random.Generator, population: Sequence[Candidate]) -> list[Proposal]:
        self._rng = rng
        self._learn(population)
        living = {candidate.id for candidate in population}
        self._before, self._settled = living, living & self._before
        designs = (self._designs.get(canonical(candidate.genome)) for candidate in population)
        self._alive = {design.model for design in designs if design is not None}
        if self._course is None:
            self._course = self._stages()
        self._pay()
        proposals = self._affordable(next(self._course), beside=self._timed_beside(population))
        self._sent |= {canonical(proposal.genome) for proposal in proposals}
        self._idle = 0 if proposals else self._idle + 1
        if self._idle > PATIENCE and not self._ended and not self._under_way:
            self._ended = "nothing is left that it could screen or measure"
        for proposal in proposals:
            if proposal.screen is not None and _kind(proposal) == "screen":
                levels = self._structures.levels(self.space.structure(self.known.shape, proposal.genome))
                assert levels is not None
                self._asked[levels] = proposal.screen.sample
        return proposals

    def tell(self, population: Sequence[Candidate], candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
        self._learn((*population, *candidates))
        return survival.of_front(self.known, population, candidates)

    def timed_again(self, population: Sequence[Candidate]) -> list[Candidate]:
        """The fittest few, and those whose time is far from its prediction: a wrong timing would keep a model on the front.
        A model waits until it has lived for one more generation."""
        settled = [candidate for candidate in population if candidate.id in self._settled]
        return [*settled[: self.elites], *filter(self._is_doubtful, settled[self.elites :])]

    def _timed_beside(self, population: Sequence[Candidate]) -> int:
        """How many of the population are timed again, since they have too few timings."""
        again = [candidate for candidate in self.timed_again(population) if candidate.genome != Genome()]
        return sum(self._times_taken(candidate) < self.known.timings for candidate in again)

    def _times_taken(self, candidate: Candidate) -> int:
        """On the device at hand; what is predicted for others is predicted once."""
        seen = (known.seen(candidate).measurement for known in self._devices)
        return max(len(measurement.timings) if measurement else 0 for measurement in seen)

    @property
    def _under_way(self) -> bool:
        """Whether a genome was proposed, and nothing was ever told of it."""
        return bool(self._sent - {canonical(candidate.genome) for candidate in self._candidates.values()})

    def _is_doubtful(self, candidate: Candidate) -> bool:
        design = self._designs.get(canonical(candidate.genome))
        if design is None or candidate.measurement is None:
            return False
        predicted, _ = self._shape_of(design.cut.levels, design.deploy)
        return abs(math.log2(latency_of(candidate.measurement) / predicted)) > DOUBTFUL

    @property
    def ended(self) -> str:
        """Why nothing more is proposed; "": the search goes on."""
        return self._ended

    def notes(self) -> list[str]:
        """What people should know of the last stage; each line is given once."""
        stages = (self._mass_stage, self._screen_stage)
        said = [note for stage in stages for note in stage.notes]
        for stage in stages:
            stage.notes.clear()
        return said

    def _learn(self, candidates: Iterable[Candidate]) -> None:
        self._beliefs = self._best = None
        for candidate in candidates:
            self._candidates[candidate.id] = candidate
            if candidate.measurement is not None:
                self._remember([candidate])
            if candidate.screening is not None:
                # A `prune` has found its structure on the node.
                share = candidate.genome.steps[0].params.get("share", 0.0)
                levels = self._structures.levels(candidate.screening.structure)
                if levels is not None:
                    cut = Cut(levels, share)
                    self._screenings[cut] = candidate.screening
                    for deployed in candidate.screening.deployed:
                        for name, chain in self._precisions.items():
                            if chain == deployed.deploy and deployed.divergence is not None:
                                self._in_precisions.setdefault(cut, {})[name] = deployed.divergence

    # --- the course of a search: each `yield` is a generation ---

    def _stages(self) -> Generator[list[Proposal], None, None]:
        plain = self._plain
        leading = self._leading()
        # Every cut in the first of the leading ways to deploy. The mildest cut in the second one too, and with every other
        # vocabulary: what a way to deploy loses shows only where one cut is deployed in several ways.
        mildest = min(plain, key=lambda cut: (cut.levels == self._sites.most, self._sites.mass(cut.levels)))
        compared = [Design(mildest, self._first_training, other) for other in (*self._revocalized(leading[0]), *leading[1:])]
        others = [Design(cut, self._first_training, deploy) for deploy in leading for cut in plain]
        first = list(dict.fromkeys([*others[: len(plain)], *compared, *others]))
        yield self._to_measure(first[: max(self.population, len(plain) + len(set(compared)))])
        # A few more that cost no more than their measurement.
        yield from _some(self._promising(self._cheap, most=max(1, self.population // 4)))
        if self.screens:
            yield from _some(self._to_screen(self._unscreened(), in_precisions=True))
            yield from self._to_rescore(self._open_cuts())
            yield self._promising(self._pool())
        done: list[Levels] = []
        while True:
            if self._still_screens and not self._hurries:
                if self.switching > len(done):
                    yield from self._switched(done)
                else:
                    yield from _some(self._to_screen(self._offspring()))
                    yield from self._to_rescore(self._between())
            yield self._promising(self._pool())

    @property
    def _still_screens(self) -> bool:
        """Whether structures are still screened: what it finds must rank them."""
        return self.screens > 0 and self._screen_stage.trust != LEFT_OUT

    def _to_measure(self, designs: Iterable[Design]) -> list[Proposal]:
        proposals = []
        for design in designs:
            if design.cut not in self._plain and design.cut == self._deeper:
                self._deepened.append(design.cut)
            genome = self._genome(design)
            self._designs[canonical(genome)] = design
            if self._is_new(genome):
                proposals.append(Proposal(genome=genome, parent=self._parent(design)))
        return proposals

    def _to_screen(self, cuts: Iterable[Cut], in_precisions: bool = False) -> list[Proposal]:
        """Ordered so that structures that begin alike follow one another: a worker then computes their beginning once.

        in_precisions: judge one of them in every precision too, if there is one that was never measured.
        """
        wanted = {cut for cut in cuts if cut.levels != self._sites.most}
        self._sample += bool(wanted)

        def by_layer(cut: Cut) -> list[tuple[int, int]]:
            structure = self._structures.structure(cut.levels)
            return list(zip(structure.heads, structure.ffn, strict=True))

        ordered, screens = sorted(wanted, key=by_layer), dict.fromkeys(wanted, self._screen)
        if in_precisions and wanted and self._has_unknown_precisions:
            screens[self._halfway(ordered)] = self._screen.model_copy(update={"deploys": tuple(self._precisions.values())})
        return [Proposal(genome=Genome(steps=self._steps(cut)), screen=screens[cut]) for cut in ordered]

    def _halfway(self, cuts: Iterable[Cut]) -> Cut:
        """The cut that is expected to lose about half of what the hypervolume counts: there, both better and worse shows."""
        return min(cuts, key=lambda cut: (abs(self._loss_of_cut(cut) - 0.5), cut))

    def _between(self) -> list[Cut]:
        """Two cuts of the knapsack's, at prices between those of the structures worth improving."""
        prices = [self._sites.price(cut.levels) for cut in self._worth_varying()]
        if not prices:
            return []
        return [Cut(self._sites.knapsack(float(price))) for price in self._rng.uniform(min(prices), max(prices), size=2)]

    def _to_rescore(self, cuts: Sequence[Cut]) -> Generator[list[Proposal], None, None]:
        """Ask the nodes for structures as deep as these, found block by block: in one generation, or within a budget the first
        one alone, since nobody knows yet what it costs."""
        if not (self.rescoring and cuts):
            return
        self._sample += 1
        survey = self.known.survey
        assert survey is not None
        shares = (round(1 - self._parameters(cut.levels) / survey.encoder_parameters, 2) for cut in cuts)
        asked = {cut.share for cut in self._screenings}
        steps = [self._steps(Cut((), share)) for share in dict.fromkeys(shares) if 0 < share < 1 and share not in asked]
        proposals = [Proposal(genome=Genome(steps=step), screen=self._screen) for step in steps]
        first = 1 if "rescore" not in self._paid and math.isfinite(self.known.left()) else len(proposals)
        yield from _some(proposals[:first])
        yield from _some(proposals[first:])

    def _switched(self, done: list[Levels]) -> Generator[list[Proposal], None, None]:
        """Level switching by marginals at one depth: what each single move changes, then the best moves together. Two
        generations. done: structures at which this was tried; the new one is added."""
        open_ = [cut for cut in self._open_cuts() if cut.levels not in done]
        if not open_:
            done.append(())  # there is nothing to improve
            return
        cut = self._halfway(open_)
        done.append(cut.levels)  # also where nothing comes of it
        near = self._sites.neighbours(cut.levels, by=2)
        proposals = self._to_screen([Cut(cut.levels), *(Cut(levels) for levels in near.values())])
        before = dict(self._screenings)
        yield proposals
        # Only what was judged just now, so on the same sentences: a structure whose screening fails keeps its earlier one.
        judged = {
            levels: self._divergence(Cut(levels))
            for levels in (cut.levels, *near.values())
            if self._screenings.get(Cut(levels)) is not before.get(Cut(levels))
        }
        start = judged.get(cut.levels)
        after = {move: judged[levels] for move, levels in near.items() if levels in judged}
        if start is None or not after:  # they failed, or the budget had no room for them
            return
        gains = {move: start - divergence for move, divergence in after.items()}
        together = self._sites.combined(cut.levels, gains, by=2, count=max(4, self.screens // 3))
        if together:
            yield self._to_screen([Cut(cut.levels), *map(Cut, together)])

    def _promising(self, designs: Iterable[Design], most: int | None = None) -> list[Proposal]:
        """Of these designs those that are expected to add the most hypervolume for what they cost. Each choice joins the
        expected front before the next choice.

        most: only so many, and only those that are expected to add something; None: `population`.
        """
        fronts = [_Front(known, self._vectors(known)) for known in self._devices]
        pool = {design: self._expected(design) for design in designs}
        costs = {design: self._cost(design) for design in pool}
        chosen: list[Design] = []
        while pool and len(chosen) < (most or self.population):
            gains = {
                design: sum(each.gain(vector) for each, vector in zip(fronts, vectors, strict=True)) / costs[design]
                for design, vectors in pool.items()
            }
            # Where nothing at all is expected to add anything, what is best in the first objective is tried all the same.
            design = max(gains, key=lambda design: (gains[design], -float(pool[design][0][0]), design))
            if gains[design] <= 0 and (most or any(each.grew for each in fronts)):
                break
            chosen.append(design)
            costs |= {other: 1.0 for other in pool if other.model == design.model}
            for each, vector in zip(fronts, pool.pop(design), strict=True):
                each.add(vector)
        return self._to_measure(chosen)

    def _pool(self) -> list[Design]:
        """Every design that was not proposed yet, of the best structures, the knapsack's and the one below them, and living
        models. Ways to deploy that failed for two models or more, and worked for none, are left out."""
        tried, failed = set(self._designs.values()), self._failed_deploys
        living = (cut for cut, _ in sorted(self._alive))
        return [
            design
            for cut in dict.fromkeys((*self._best_cuts(), *self._plain, self._deeper, *living))
            for deploy in (*self.space.possible_deploys(), *self._mixed(cut))
            if self._way(deploy) not in failed
            for training in self.space.trainings
            if (design := Design(cut, training, deploy)) not in tried
        ]

    @property
    def _failed_deploys(self) -> set[str]:
        """Ways to deploy that failed for at least two models which could be measured in another way, and worked for none."""
        models, worked = self._believed().losses, {self._way(design.deploy) for design in self._believed().measured}
        failed: Counter[str] = Counter()
        for candidate in self._candidates.values():
            design = self._designs.get(canonical(candidate.genome))
            if design is not None and candidate.measurement is None and candidate.genome.deploy and design.model in models:
                failed[self._way(design.deploy)] += 1
        return {way for way, times in failed.items() if times > 1 and way not in worked}

    def _way(self, deploy: str) -> str:
        """A way to deploy; all mixtures of the same two are one."""
        mixture = self._mixtures.get(deploy)
        return deploy if mixture is None else f"{mixture.one} with {mixture.other}"

    @property
    def _cheap(self) -> list[Design]:
        """Those of the pool that cost no more than their measurement."""
        return [design for design in self._pool() if self._cost(design) == 1]

    @property
    def _deeper(self) -> Cut:
        """The knapsack's structure below the deepest one that was not trained in vain. In vain: even its best training lost
        more than the hypervolume counts."""
        trained: dict[Cut, float] = {}
        for (cut, training), loss in self._believed().losses.items():
            if self.space.trainings[training]:
                trained[cut] = min(loss, trained.get(cut, math.inf))
        prices = [self._sites.price(cut.levels) for cut in (*self._plain, *trained) if trained.get(cut, 0.0) < 1]
        return Cut(self._sites.knapsack(DEEPER * min(prices, default=1.0)))

    def _unscreened(self) -> list[Cut]:
        """Structures that were proposed to be measured and never sent to be screened."""
        cuts = dict.fromkeys(design.cut for design in self._designs.values())
        return [cut for cut in cuts if not cut.share and cut.levels not in self._asked and cut.levels != self._sites.most]

    def _open_cuts(self) -> list[Cut]:
        """The best structures that lose something."""
        return [cut for cut in self._best_cuts() if self._divergence(cut) > self.negligible]

    def _worth_varying(self) -> list[Cut]:
        """The best structures that lose something, and the cheapest one that loses nothing: what is between them may lose
        nothing either."""
        open_ = self._open_cuts()
        closed = [cut for cut in self._best_cuts() if cut not in open_]
        return open_ and [*open_, *sorted(closed, key=lambda cut: self._sites.price(cut.levels))[:1]]

    def _mixed(self, cut: Cut) -> list[str]:
        """Of two precisions in which a structure was measured, a third or two thirds of the layers have the second one: those
        with the highest scores that are left."""
        measured = {design.deploy for design in self._believed().measured if design.cut == cut}
        found, chains = [], self.space.possible_deploys()
        for one, other, scheme in mixing.pairs(chains) if self.mixing else []:
            if not {one, other} <= measured:
                continue
            order = np.argsort(-self._prediction.kept(*self._rows(cut.levels))[0], kind="stable")
            for part in (1, 2):
                layers = sorted(int(layer) for layer in order[: len(order) * part // 3])
                name = f"{one} with {scheme} in layers {', '.join(map(str, layers))}"
                if layers:
                    chain = mixing.mixed(chains[one], scheme, layers)
                    self._mixtures[name] = Mixture(chain, one, other, len(layers) / len(order))
                    found.append(name)
        return found

    def _offspring(self) -> list[Cut]:
        """Structures to be screened: those that were measured only; and new ones near the best that lose something: switched,
        crossed, and the knapsack's at prices between them. Some of the best carved ones are judged with them, on the same
        sentences: what was best on one sample is often worse on others."""
        parents = [cut.levels for cut in self._worth_varying()]
        unscreened = self._unscreened()
        if not parents:
            return unscreened
        again = [*unscreened, *self._judged_again()][: self.screens]
        count = self.screens - len(again)
        found: dict[Levels, float] = {}
        for _ in range(20 * self.screens):
            kind = self._rng.integers(3)
            one, other = (parents[int(at)] for at in self._rng.integers(len(parents), size=2))
            if kind == 0:
                levels = self._sites.switched(self._rng, one, int(self._rng.integers(1, 4)))
            elif kind == 1:
                levels = self._sites.crossed(self._rng, one, other)
            else:
                low, high = sorted((self._sites.price(one), self._sites.price(other)))
                levels = self._sites.knapsack(float(self._rng.uniform(low, high)) if high > low else low)
            if levels not in self._asked:
                least = float(np.interp(self._sites.price(levels), *self._least_masses))
                found[levels] = self._sites.mass(levels) / max(1e-9, least)
        # Those that remove the least at their price: one of each range of prices, else all would be of one depth.
        by_mass = min(len(found), {TRUSTED: count, WIDENED: count // 2, LEFT_OUT: 0}[self._mass_trust()])
        order = sorted(found, key=lambda levels: (self._sites.price(levels), levels))
        ranges = [order[len(order) * at // by_mass : len(order) * (at + 1) // by_mass] for at in range(by_mass)]
        chosen = [min(each, key=lambda levels: (found[levels], levels)) for each in ranges]
        others = [levels for levels in order if levels not in chosen]
        drawn = [others[int(at)] for at in self._rng.permutation(len(others))]
        return [*again, *(Cut(levels) for levels in [*chosen, *drawn][:count])]

    def _judged_again(self) -> list[Cut]:
        """Of the best structures those that were judged longest ago; none where every sample has the same sentences. What
        `prune` has found is not among them: where its model is not stored, it takes half a minute to make."""
        assert self.known.survey is not None
        sentences = outside(Survey(**self.space.scores).sentences, self.known.survey.train_rows)
        if self._screen.judge >= len(sentences):
            return []
        open_ = [cut for cut in self._open_cuts() if not cut.share]
        return sorted(open_, key=lambda cut: self._asked.get(cut.levels, 0))[: self.screens // 4]

    # --- what a generation costs ---

    def _pay(self) -> None:
        """Learn what the last generation has cost."""
        if self._bill is not None and math.isfinite(self._bill.left):
            seconds, units = self._paid.get(self._bill.kind, (0.0, 0.0))
            spent = max(0.0, self._bill.left - self.known.left())
            own, again = self._bill.units, self._timings() - self._bill.again
            if self._bill.kind == "measure":
                own += again
            else:
                spent = max(0.0, spent - again * self._seconds_of("measure"))
            if own > 0:
                self._paid[self._bill.kind] = (seconds + spent, units + own)
        self._bill = None

    def _timings(self) -> int:
        """How often a candidate was timed again, over all of them."""
        return sum(len(candidate.measurement.again) for candidate in self._measured_candidates() if candidate.measurement)

    def _seconds_of(self, kind: str) -> float:
        """Device seconds of a unit of work, by the generations so far; 0 while there was none of this kind."""
        seconds, units = self._paid.get(kind, (0.0, 1.0))
        return seconds / units

    def _affordable(self, proposals: list[Proposal], beside: int) -> list[Proposal]:
        """Those that fit what the budget leaves, in their order. Where some models do not fit, this generation is the last one.
        Where no training fits, models that need none are measured instead. Where structures do not fit, models are: what is
        only screened at the end is no result.

        beside: models that are timed again in the same generation.
        """
        if not proposals:
            return proposals
        kind, fitting, units, dearest = _kind(proposals[0]), [], 0.0, 0.0
        again = beside * self._seconds_of("measure")
        after = 0.0 if kind == "measure" else self._seconds_of("measure")
        made: set[Trained] = set()
        for proposal in proposals:
            design = self._designs.get(canonical(proposal.genome)) if kind == "measure" else None
            # A precision takes about as long as another structure.
            screened = 1.0 + len(proposal.screen.deploys if proposal.screen else ())
            cost = screened if design is None else self._cost(design, made)
            dearest = max(dearest, cost)
            if (units + cost) * self._seconds_of(kind) + again + after <= self.known.left():
                fitting.append(proposal)
                units += cost
                if design is not None:
                    made.add(design.model)
        if len(fitting) < len(proposals):
            if kind != "measure":
                return self._affordable(self._promising(self._pool()), beside)
            if not fitting and dearest > 1 and (cheap := self._promising(self._cheap)):
                return self._affordable(cheap, beside)
            self._ended = "the rest of budget.device_hours is too short for another model"
        self._bill = Bill(kind, units, self.known.left(), self._timings())
        return fitting

    @property
    def _hurries(self) -> bool:
        """Whether the budget leaves no time to screen structures and then to measure what was found."""
        return self.screens * self._seconds_of("screen") + (self.elites + 1) * self._seconds_of("measure") > self.known.left()

    # --- what is known, and what is expected ---

    @property
    def _devices(self) -> tuple[Known, ...]:
        """Every device that the models are for."""
        return (self.known, *self.known.others)

    @cached_property
    def _predictions(self) -> tuple[Prediction, ...]:
        """For each device."""
        assert self.known.survey is not None
        return tuple(Prediction.of(self.known.survey, known.profile) for known in self._devices if known.profile is not None)

    @property
    def _prediction(self) -> Prediction:
        return self._predictions[0]

    @property
    def _first_training(self) -> str:
        """The training of the first models: none, in most spaces."""
        return next(iter(self.space.trainings))

    @cached_property
    def _first_deploy(self) -> str:
        """The one that is fastest, whose times are the prices of structures."""
        whole = self.space.whole(self.known.shape)
        heads, ffn = np.array([whole.heads]), np.array([whole.ffn])
        chains = self.space.possible_deploys()
        return min(chains, key=lambda name: float(self._prediction.latency(heads, ffn, chains[name])[0]))

    @cached_property
    def _deploy_parts(self) -> dict[str, tuple[str, str]]:
        """The precision and the vocabulary of each way to deploy."""
        return self.space.deploy_parts()

    @cached_property
    def _precisions(self) -> dict[str, tuple[Step, ...]]:
        """The steps of each precision that leaves the word embedding's rows alone; the key is the first way to deploy that has
        this precision."""
        chains: dict[str, tuple[Step, ...]] = {}
        for name, (precision, _) in self._deploy_parts.items():
            chain = self.space.deploys[precision] or ()
            if chain not in chains.values() and not any(step.operator in VOCABULARY_STEPS for step in chain):
                chains[name] = chain
        return chains

    @property
    def _has_unknown_precisions(self) -> bool:
        """Whether there are several precisions, and one in which no design was measured."""
        parts = (self._deploy_parts.get(design.deploy) for design in self._believed().measured)
        measured = [self.space.deploys[part[0]] for part in parts if part is not None]
        return len(self._precisions) > 1 and any(chain not in measured for chain in self._precisions.values())

    @cached_property
    def _structures(self) -> Structures:
        return Structures(self.space, self.known.shape)

    @cached_property
    def _knapsack(self) -> Knapsack:
        assert self.known.survey is not None
        return Knapsack(self.space, self.known.shape, self.known.survey)

    @cached_property
    def _sites(self) -> Sites:
        chains = self.space.possible_deploys()
        return Sites.of(self._structures, self._predictions, chains[self._first_deploy])

    @property
    def _plain(self) -> tuple[Cut, ...]:
        """The knapsack's structures, which always compete."""
        return (*self._budgeted, *self._deepened)

    @cached_property
    def _budgeted(self) -> tuple[Cut, ...]:
        return tuple(Cut(levels) for levels in dict.fromkeys(map(self._sites.knapsack, self._reachable())))

    @cached_property
    def _least_masses(self) -> tuple[np.ndarray, np.ndarray]:
        """Prices, and the smallest share of the scores that a structure of each price removes, which the knapsack finds."""
        prices = np.linspace(0, self._sites.price(self._sites.most), 65)
        return prices, np.array([self._sites.mass(self._sites.knapsack(float(price))) for price in prices])

    @property
    def _screen(self) -> Screen:
        """The sample grows as the search goes on: what is chosen by one sample is soon chosen for that sample."""
        wider = 1 if self._screen_stage.trust == TRUSTED else 2
        return Screen(judge=wider * self.judge * min(MOST_JUDGED, 1 + self._sample // 3), sample=self._sample)

    def _reachable(self) -> list[float]:
        """The budgets, and the largest ones at which the leading ways to deploy keep to the targets of speed and size."""
        target, budgets = self.known.target, list(self.budgets)

        def keeps(budget: float, deploy: str) -> bool:
            latency, size = self._shape_of(self._sites.knapsack(budget), deploy)
            # A little faster and smaller than the targets, since predictions err.
            return latency <= 0.95 / (target.speed_up or 1e-9) and size <= 0.98e6 * (target.megabytes or math.inf)

        for deploy in self._leading():
            low, high = 0.02, 1.0
            if keeps(low, deploy) and not keeps(high, deploy):
                while high - low > 0.01:
                    middle = (low + high) / 2
                    low, high = (middle, high) if keeps(middle, deploy) else (low, middle)
                budgets.append(low)
        return sorted(budgets, reverse=True)

    def _leading(self) -> list[str]:
        """The two ways to deploy that together promise most, where a cut loses little: of those that keep to the targets of
        speed and size at a middle cut, if there are any."""
        middle, target = self._sites.knapsack(0.4), self.known.target
        shapes = {deploy: self._shape_of(middle, deploy) for deploy in self.space.possible_deploys()}
        keeping = {
            deploy: (latency, size)
            for deploy, (latency, size) in shapes.items()
            if latency * (target.speed_up or 0) <= 1 and size <= 1e6 * (target.megabytes or math.inf)
        }
        vectors = {deploy: np.array(self._point(0.2, *shape)) for deploy, shape in (keeping or shapes).items()}
        chosen: list[str] = []
        while len(chosen) < min(2, len(vectors)):
            chosen.append(
                max(
                    (deploy for deploy in vectors if deploy not in chosen),
                    key=lambda deploy: front.hypervolume(
                        np.array([vectors[name] for name in [*chosen, deploy]]), self.known.objectives
                    ),
                )
            )
        return chosen

    def _revocalized(self, deploy: str) -> list[str]:
        """The ways to deploy that differ from this one in nothing but the vocabulary."""
        parts = self._deploy_parts
        return [other for other in parts if other != deploy and parts[other][0] == parts[deploy][0]]

    def _shape_of(self, levels: Levels, deploy: str, device: int = 0) -> tuple[float, float]:
        """Predicted latency in units of the base model's, and predicted bytes."""
        prediction, rows, chain = self._predictions[device], self._rows(levels), self._chain(deploy)
        return float(prediction.latency(*rows, chain)[0]), float(prediction.bytes(*rows, chain)[0])

    def _rows(self, levels: Levels) -> tuple[np.ndarray, np.ndarray]:
        """(1, layers) heads and neurons, as a prediction wants them."""
        structure = self._structures.structure(levels)
        return np.array([structure.heads]), np.array([structure.ffn])

    def _chain(self, deploy: str) -> tuple[Step, ...]:
        return self._mixtures[deploy].chain if deploy in self._mixtures else self.space.possible_deploys()[deploy]

    def _parameters(self, levels: Levels) -> float:
        """Encoder parameters of a structure."""
        return self._knapsack.parameters(self._structures.structure(levels))

    def _point(self, loss: float, latency: float, size: float) -> list[float]:
        """As `front.vector`, of figures that are expected."""
        assert self.known.base is not None
        values = {
            "quality": loss,
            "latency": math.log2(latency),
            "bytes": math.log2(size / self.known.base.model_bytes),
            "peak_bytes": math.log2(size / self.known.base.model_bytes),
        }
        return [values[name] for name in self.known.objectives]

    def _vectors(self, known: Known) -> np.ndarray:
        """(candidates, objectives) of all measured candidates, as a device sees them."""
        assert known.base is not None
        seen = (known.seen(candidate).measurement for candidate in self._measured_candidates())
        found = [front.vector(measured, known.base, known.objectives) for measured in seen if measured is not None]
        return np.array(found).reshape(-1, len(known.objectives))

    def _measured_candidates(self) -> list[Candidate]:
        return [candidate for candidate in self._candidates.values() if candidate.measurement is not None]

    def _believed(self) -> Beliefs:
        if self._beliefs is None:
            assert self.known.base is not None
            base = quality_of(self.known.base)
            lost: dict[Design, float] = {}
            measured: dict[Design, str] = {}
            for candidate in self._measured_candidates():
                design = self._designs.get(canonical(candidate.genome))
                if design is not None and candidate.measurement is not None:
                    lost[design] = front.lost_quality(quality_of(candidate.measurement), base)
                    measured[design] = candidate.id
            models: dict[Trained, dict[str, float]] = {}
            for design, loss in sorted(lost.items()):
                models.setdefault(design.model, {})[design.deploy] = loss
            offsets = beliefs.offsets(models.values(), self._makeup)
            losses = self._losses(models, offsets)
            self._screen_stage.judge(self._screened(losses))
            if self._in_precisions and self._still_screens:
                judged = self._judged_in_precisions(beliefs.Curve.through(self._screened(losses)))
                offsets = beliefs.offsets([*models.values(), *judged], self._makeup)
                losses = self._losses(models, offsets)
            masses = [(self._sites.mass(cut.levels), loss) for cut, loss in self._untrained(losses).items()]
            curves = beliefs.Curve.through(self._screened(losses)), beliefs.Curve.through(masses)
            self._beliefs = Beliefs(losses, measured, *curves, beliefs.recovery(losses, list(self.space.trainings)), offsets)
        return self._beliefs

    def _judged_in_precisions(self, by_divergence: beliefs.Curve) -> list[dict[str, float]]:
        """What each structure that was screened in several precisions is expected to lose, by way to deploy. All that loses a
        tenth of the quality more than the best one is equally bad."""
        found = [{deploy: by_divergence(value) for deploy, value in own.items()} for own in self._in_precisions.values()]
        return [{deploy: min(loss, 1 + min(own.values())) for deploy, loss in own.items()} for own in found]

    def _divergence(self, cut: Cut) -> float:
        """The latest of a structure that was screened; 0 for another one."""
        return self._screenings[cut].divergence if cut in self._screenings else 0.0

    def _losses(self, models: Mapping[Trained, Mapping[str, float]], offsets: dict[str, float]) -> dict[Trained, float]:
        """Of each measured model, without what its ways to deploy add."""
        return {
            model: float(np.mean([loss - self._added(deploy, offsets) for deploy, loss in own.items()]))
            for model, own in models.items()
        }

    def _untrained(self, losses: Mapping[Trained, float]) -> dict[Cut, float]:
        return {cut: loss for (cut, training), loss in losses.items() if training == self._first_training}

    def _screened(self, losses: Mapping[Trained, float]) -> list[tuple[float, float]]:
        """Divergence and loss of the untrained cuts of which both are known."""
        untrained = self._untrained(losses)
        return [(self._divergence(cut), loss) for cut, loss in untrained.items() if cut in self._screenings]

    def _best_cuts(self) -> list[Cut]:
        """Structures that no other one beats in time, parameters and divergence; without screening, the knapsack's."""
        if not self._still_screens or not self._screenings:
            return list(self._plain)
        if self._best is None:
            cuts = [Cut(self._sites.most), *self._screenings]
            rows = [(self._sites.price(cut.levels), self._parameters(cut.levels), self._divergence(cut)) for cut in cuts]
            self._best = [cut for cut, best in zip(cuts, front.nondominated(np.array(rows)), strict=True) if best]
        return self._best

    def _loss_of_cut(self, cut: Cut) -> float:
        """Expected lost tenths of the quality, untrained: by its divergence if it was screened, else by its removed scores."""
        believed = self._believed()
        if cut in self._screenings and self._screen_stage.trust != LEFT_OUT:
            return believed.by_divergence(self._divergence(cut))
        return believed.by_scores(self._sites.mass(cut.levels))

    def _expected(self, design: Design) -> list[np.ndarray]:
        """The vector of objectives that a design will have on each device, as far as can be told."""
        believed, order = self._believed(), list(self.space.trainings)
        trained = order.index(design.training)
        start = max((at for at in range(trained + 1) if (design.cut, order[at]) in believed.losses), default=0)
        known = believed.losses.get((design.cut, order[start]))
        loss = self._loss_of_cut(design.cut) if known is None else known
        for _ in range(trained - start):
            loss = max(min(believed.recovery(loss), loss), UNSETTLED)
        added = self._added(design.deploy, believed.offsets)
        shapes = (self._shape_of(design.cut.levels, design.deploy, device) for device in range(len(self._devices)))
        return [np.array(self._point(loss + added, *shape)) for shape in shapes]

    def _added(self, deploy: str, offsets: dict[str, float]) -> float:
        """What a way to deploy is expected to lose more than others."""
        return sum(share * offsets.get(part, 0.0) for part, share in self._makeup(deploy).items())

    def _makeup(self, deploy: str) -> dict[str, float]:
        """What a way to deploy consists of: its vocabulary, and the share of the layers that each precision has."""
        parts, mixture = self._deploy_parts, self._mixtures.get(deploy)
        shares = {deploy: 1.0} if mixture is None else {mixture.one: 1 - mixture.share, mixture.other: mixture.share}
        makeup: dict[str, float] = {}
        for name, share in shares.items():
            precision, vocabulary = parts[name]
            for part in (f"precision {precision}", f"vocabulary {vocabulary}"):
                makeup[part] = makeup.get(part, 0.0) + share
        return makeup

    def _cost(self, design: Design, made: Collection[Trained] = ()) -> float:
        """Of measuring a design, in measurements: what is cut in a second is trained for minutes. A training goes on from what
        is stored, and models that differ in precision only share theirs.

        made: models that the same generation makes for others.
        """
        if design.model in self._alive or design.model in made:
            return 1.0
        steps = self.space.trainings[design.training]
        stored = [
            len(own)
            for name, own in self.space.trainings.items()
            if (design.cut, name) in self._alive and steps[: len(own)] == own
        ]
        epochs = sum(float(step.params.get("epochs", 1)) for step in steps[max(stored, default=0) :])
        survey = self.known.survey
        assert survey is not None
        kept = self._parameters(design.cut.levels) / survey.encoder_parameters
        # What was found is stored until it is measured, and then as long as a model of it lives.
        lost = design.cut.share and not stored and any(other.cut == design.cut for other in self._believed().measured)
        found = FOUND if lost else 0.0
        return 1 + found + epochs * survey.train_rows / ROWS * (OUTSIDE + (1 - OUTSIDE) * kept)

    def _mass_trust(self) -> int:
        """How far what is free is trusted to rank structures as screening does."""
        cuts = [cut for cut in self._screenings if not cut.share]
        return self._mass_stage.judge([(self._sites.mass(cut.levels), self._divergence(cut)) for cut in cuts])

    # --- genomes ---

    def _steps(self, cut: Cut) -> tuple[Step, ...]:
        if cut.share:
            how = {**self.space.scores, "ffn_multiple": self.space.ffn_multiple}
            return (Step(operator="prune", params={**how, "share": cut.share, "rescore": True}),)
        return self.space.genome(self.known.shape, self._structures.structure(cut.levels)).steps

    def _genome(self, design: Design) -> Genome:
        steps = (*self._steps(design.cut), *self.space.trainings[design.training])
        return Genome(steps=steps, deploy=self._chain(design.deploy))

    def _parent(self, design: Design) -> str | None:
        """The measured candidate that was trained less, whose weights this one goes on from."""
        order = list(self.space.trainings)
        less = {
            order.index(other.training): candidate
            for other, candidate in self._believed().measured.items()
            if other.cut == design.cut and order.index(other.training) < order.index(design.training)
        }
        return less[max(less)] if less else None


@dataclass
class _Front:
    """What is known and expected of one device: its measured models, and those that were chosen to be measured next."""

    known: Known
    vectors: np.ndarray  # (models, objectives)

    def __post_init__(self) -> None:
        self.vectors = self.vectors[front.nondominated(self.vectors)]
        self.start = self.volume = self._volume(self.vectors)

    @property
    def grew(self) -> bool:
        return self.volume > self.start

    def gain(self, vector: np.ndarray) -> float:
        """The hypervolume that a model adds; more counts near the targets."""
        if (self.vectors <= vector).all(1).any():
            return 0.0
        return self._aim(vector) * (self._volume(np.vstack([self.vectors, vector])) - self.volume)

    def add(self, vector: np.ndarray) -> None:
        self.vectors = np.vstack([self.vectors, vector])
        self.volume = self._volume(self.vectors)

    def _volume(self, vectors: np.ndarray) -> float:
        return front.hypervolume(vectors, self.known.objectives)

    def _aim(self, vector: np.ndarray) -> float:
        if not self.known.target.wanted:
            return 1.0
        assert self.known.base is not None
        return 1 + AIMED * 16 ** -front.missed_by(vector, self.known.objectives, self.known.base, self.known.target)


def _some(proposals: list[Proposal]) -> Iterable[list[Proposal]]:
    """A generation, if it holds anything."""
    return [proposals] if proposals else []


def _kind(proposal: Proposal) -> str:
    """Proposals of one kind cost about the same for each unit of work."""
    if proposal.screen is None:
        return "measure"
    return "screen" if all(step.operator == "carve" for step in proposal.genome.steps) else "rescore"
