"""What every strategy over a space promises, on measurements that are a function of the genome. No torch.

A new strategy needs one line in `STRATEGIES`.
"""

import dataclasses
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from searches import story

from hpc_compress import identity
from hpc_compress.config import ConfigError, validate
from hpc_compress.launch.local import Debug
from hpc_compress.operators import operator
from hpc_compress.search import front
from hpc_compress.search.coordinates import Coordinates
from hpc_compress.search.evolve import Evolve
from hpc_compress.search.grid import Grid
from hpc_compress.search.knapsack import Knapsack
from hpc_compress.search.known import Known
from hpc_compress.search.local_search import LocalSearch
from hpc_compress.search.nas import Nas, _ranks
from hpc_compress.search.objective import Product
from hpc_compress.search.optuna_search import Optuna
from hpc_compress.search.prediction import timed
from hpc_compress.search.random_search import RandomSearch
from hpc_compress.search.regularized_evolution import RegularizedEvolution
from hpc_compress.search.rl import PolicyGradient
from hpc_compress.search.space import Shape, Space
from hpc_compress.types import (
    BlockProfile,
    ByteCounts,
    Candidate,
    Deployed,
    DeviceProfile,
    Genome,
    Measurement,
    MeasurementProtocol,
    Proposal,
    Screen,
    Screening,
    Step,
    Structure,
    Surveyed,
)

SHAPE = Shape(heads=(4, 4, 4), widths=(64, 256))
SPACE = Space(
    ffn_multiple=32,
    trainings={
        "none": (),
        "short": ({"operator": "distill", "params": {"epochs": 1}},),
        "long": ({"operator": "distill", "params": {"epochs": 3}},),
    },
    deploys={
        "fp32": (),
        "nf4": ({"operator": "quantize", "params": {"scheme": "nf4"}},),
        "bf16": None,
        "small": ({"operator": "trim_vocabulary"}, {"operator": "quantize", "params": {"scheme": "int8"}}),
    },
)
POPULATION = 6
SELECTIONS = ({"judge": 16, "keep": 3}, {"judge": 256, "keep": 1})
STRATEGIES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "evolve": (Evolve, {"switching": 1, "rescoring": False, "screens": 6}),
    "random": (RandomSearch, {}),
    "grid": (Grid, {}),
    "local_search": (LocalSearch, {"rounds": 3, "removed": (0.5, 0.2), "selections": SELECTIONS}),
    "optuna": (Optuna, {"startup": 12, "redraw": 3}),
    "nsga2": (Optuna, {"sampler": "nsga2", "members": 12}),
    "nas": (Nas, {"members": 12, "sample": 4}),
    "rl": (PolicyGradient, {}),
    "regularized_evolution": (RegularizedEvolution, {"members": 8, "sample": 3}),
}
LEARNING = ("regularized_evolution", "optuna", "nsga2", "nas", "rl")  # what these propose grows better

# --- a world in which the outer layers matter most ---

SCORES = np.array([3.0, 1.0, 2.0])  # of a head and of 64 neurons of each layer
HEAD, NEURON = 4000, 128  # parameters
SURVEY = Surveyed(
    heads=tuple(tuple(score * (1 + 0.1 * unit) for unit in range(4)) for score in SCORES),
    ffn=tuple(tuple(score * (1 + unit) / 8000 for unit in range(256)) for score in SCORES),
    parameters=(HEAD, NEURON),
    encoder_parameters=3 * (4 * HEAD + 256 * NEURON) + 1000,
    train_rows=1000,
    bytes=tuple(
        ByteCounts(deploy=chain, fixed=50_000 * size, per_head=HEAD * size, per_neuron=NEURON * size)
        for chain, size in zip(SPACE.possible_deploys().values(), (4, 0.6, 1.2), strict=True)
    ),
    sample=((8, 16),),
)


def block(deploy: tuple[Step, ...], factor: float) -> BlockProfile:
    """Times as `measured` has them."""
    unit = 9 * factor / SURVEY.encoder_parameters
    heads, widths = (0, 4), (0, 256)
    return BlockProfile(
        deploy=deploy,
        rows=(8,),
        lengths=(16,),
        heads=heads,
        widths=widths,
        fixed_ms=((factor,),),
        layer_ms=((0.0,),),
        attention_ms=((tuple(unit * HEAD * count for count in heads),),),
        ffn_ms=((tuple(unit * NEURON * count for count in widths),),),
    )


PROFILE = DeviceProfile(
    device="test",
    device_type="cpu",
    model_type="bert",
    hidden=64,
    head_size=16,
    blocks=tuple(
        block(timed(chain), factor) for chain, factor in zip(SPACE.possible_deploys().values(), (1, 1.5, 0.6), strict=True)
    ),
)


def damage(structure: Structure) -> float:
    """From 0 to 1."""
    kept = np.array(structure.heads) / 4 + np.array(structure.ffn) / 256
    return float((SCORES * (1 - kept / 2) ** 2).sum() / SCORES.sum())


IN_SCHEME = {"fp32": (0.0, 1, 4), "nf4": (0.02, 1.5, 0.6), "int8": (0.01, 0.6, 1.2)}  # lost accuracy, time, bytes


def scheme_of(deploy: tuple[Step, ...]) -> str:
    return next((step.params["scheme"] for step in deploy if step.operator == "quantize"), "fp32")


def measured(genome: Genome) -> Measurement:
    structure = SPACE.structure(SHAPE, genome)
    epochs = sum(step.params["epochs"] for step in genome.steps if step.operator == "distill")
    lost, time, size = IN_SCHEME[scheme_of(genome.deploy)]
    kept = sum(structure.heads) * HEAD + sum(structure.ffn) * NEURON
    return Measurement(
        metrics={"accuracy": max(0.0, 0.9 - lost - 0.8 * damage(structure) / (1 + epochs))},
        latency_ms=(time * (1 + 9 * kept / SURVEY.encoder_parameters),),
        base_latency_ms=(10.0,),
        of_base=genome == Genome(),
        model_bytes=round(size * (50_000 + kept)),
        parameters=50_000 + kept,
        encoder_parameters=kept,
        device="test",
        device_type="cpu",
        protocol=MeasurementProtocol(),
    )


BASE = Candidate(id="base", genome=Genome(), measurement=measured(Genome()))
KNOWN = Known(
    shape=SHAPE,
    score=lambda measurement: Product()(measurement, BASE.measurement),
    base=BASE.measurement,
    survey=SURVEY,
    profile=PROFILE,
)
Answer = Callable[[Candidate, Screen | None], Candidate]


def answered(candidate: Candidate, screen: Screen | None) -> Candidate:
    """A candidate with what was asked about it."""
    if screen is None:
        return candidate.model_copy(update={"measurement": measured(candidate.genome)})
    structure = SPACE.structure(SHAPE, candidate.genome)
    luck = int(identity.content_hash(candidate.genome, screen.sample), 16) % 1000 / 1000
    divergence = damage(structure) + 0.3 * luck / math.sqrt(screen.judge)
    deployed = tuple(Deployed(deploy=chain, divergence=divergence + IN_SCHEME[scheme_of(chain)][0]) for chain in screen.deploys)
    return candidate.model_copy(update={"screening": Screening(divergence=divergence, structure=structure, deployed=deployed)})


def hopeless(candidate: Candidate, screen: Screen | None) -> Candidate:
    """Every task failed."""
    return candidate


def unlucky(candidate: Candidate, screen: Screen | None) -> Candidate:
    """Two of three tasks failed; what was known of the candidate before is still known."""
    return answered(candidate, screen) if int(identity.content_hash(candidate.genome, screen), 16) % 3 == 0 else candidate


@dataclasses.dataclass
class Turn:
    """One generation."""

    proposals: list[Proposal]
    told: list[Candidate]
    survivors: tuple[Candidate, ...]


def made(name: str, **changes: Any) -> Any:
    if name == "nas":
        pytest.importorskip("syne_tune")  # large, so not every machine has it
    kind, settings = STRATEGIES[name]
    return kind(**{"known": KNOWN, "space": SPACE, "population": POPULATION, **settings, **changes})


def play(strategy: Any, generations: int, seed: int = 0, answer: Answer = answered) -> Iterator[Turn]:
    """A search as the driver does it."""
    population: tuple[Candidate, ...] = (BASE,)
    everyone: dict[str, Candidate] = {BASE.id: BASE}
    for number in range(1, generations + 1):
        proposals = strategy.ask(np.random.default_rng([seed, number]), population)
        told = set()
        for proposal in proposals:
            id = identity.content_hash(proposal.genome)
            known = everyone.get(id, Candidate(id=id, genome=proposal.genome, parent=proposal.parent))
            everyone[id] = answer(known, proposal.screen)
            told.add(id)
        candidates = [everyone[id] for id in sorted(told)]
        population = strategy.tell([everyone[member.id] for member in population], candidates)
        yield Turn(proposals, candidates, population)


def volume(candidates: list[Candidate]) -> float:
    vectors = [front.vector(c.measurement, KNOWN.base, KNOWN.objectives) for c in candidates if c.measurement]
    return front.hypervolume(np.array(vectors), KNOWN.objectives)


def by_name(names: Iterable[str]) -> pytest.MarkDecorator:
    """A test for each of these strategies. It is slow for those whose samplers take long."""
    slow = ("optuna", "nsga2")
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]
    )


every_strategy = by_name(STRATEGIES)


# --- what they promise ---


@pytest.mark.parametrize("name", ["grid", "local_search"])
def test_what_has_nothing_left_to_propose_says_so(name: str):
    strategy, measured = made(name), 0
    for turn in play(strategy, 100):
        measured += sum(proposal.screen is None for proposal in turn.proposals)
        if strategy.ended:
            break
        assert turn.proposals
    assert strategy.ended
    assert not turn.proposals
    sizes = {"grid": 5, "local_search": 2}[name]
    assert measured == sizes * len(SPACE.possible_deploys()) - (name == "grid"), "the base model is known"


@every_strategy
def test_what_is_proposed_is_in_the_space_and_new_and_never_more_than_was_asked_for(name: str):
    strategy, coordinates = made(name), Coordinates(space=SPACE, shape=SHAPE)
    asked = set()
    for turn in play(strategy, 12):
        assert len(turn.proposals) <= POPULATION or all(proposal.screen for proposal in turn.proposals)
        for proposal in turn.proposals:
            assert coordinates.encode(proposal.genome) is not None
            assert proposal.genome != Genome(), "the base model is known"
            key = identity.canonical(proposal)
            assert key not in asked
            asked.add(key)
    measured_in_full = [key for key in asked if '"screen":null' in key]
    assert measured_in_full


@every_strategy
def test_every_step_is_named_beforehand_and_accepted_by_its_operator(name: str):
    rehearsal = made(name, known=Known(shape=SHAPE))  # nothing else is known then
    steps = [*rehearsal.steps, *rehearsal.deploys]
    assert {step.operator for step in steps} == {"carve", "distill", "quantize", "trim_vocabulary"}
    for turn in play(made(name), 8):
        for proposal in turn.proposals:
            for step in (*proposal.genome.steps, *proposal.genome.deploy):
                assert callable(operator(step))
                assert step.operator == "carve" or step in steps


@every_strategy
def test_equal_seeds_make_equal_searches(name: str):
    one, other = ([turn.proposals for turn in play(made(name), 10, seed=1)] for _ in range(2))
    assert one == other
    if name != "grid":
        assert one != [turn.proposals for turn in play(made(name), 10, seed=2)]


@every_strategy
def test_a_strategy_that_is_built_again_goes_on_as_if_nothing_had_happened(name: str):
    """Whatever other random numbers are drawn in between."""
    whole = [turn.proposals for turn in play(made(name), 9)]
    resumed = []
    np.random.seed(5)
    for turn in play(made(name), 9, answer=answered):
        np.random.random()
        resumed.append(turn.proposals)
    assert resumed == whole


@every_strategy
@pytest.mark.parametrize("answer", [hopeless, unlucky])
def test_failures_are_survived(name: str, answer: Answer):
    turns = list(play(made(name), 12, answer=answer))
    assert turns[0].proposals
    for turn in turns:
        assert all(survivor.measurement for survivor in turn.survivors)
    if answer is hopeless:
        assert {survivor.id for turn in turns for survivor in turn.survivors} == {BASE.id}


@every_strategy
def test_outcomes_that_come_a_generation_late_are_taken_then(name: str):
    strategy, late, everyone = made(name), [], {}
    population: tuple[Candidate, ...] = (BASE,)
    for number in range(12):
        proposals = strategy.ask(np.random.default_rng(number), population)
        new = [
            (proposal, Candidate(id=identity.content_hash(proposal.genome), genome=proposal.genome)) for proposal in proposals
        ]
        for proposal, candidate in new:
            everyone[candidate.id] = answered(everyone.get(candidate.id, candidate), proposal.screen)
        ids = sorted({candidate.id for _, candidate in new})
        population = strategy.tell(population, [everyone[id] for id in sorted({*late, *ids[::2]})])
        late = ids[1::2]
    assert len(population) > 1
    assert {survivor.id for survivor in population} <= {BASE.id, *everyone}


@every_strategy
def test_a_space_with_one_training_and_one_deployment_is_searched_too(name: str):
    space = SPACE.model_copy(
        update={"trainings": {"short": SPACE.trainings["short"]}, "deploys": {"nf4": SPACE.deploys["nf4"]}}
    )
    turns = list(play(made(name, space=space), 8))
    assert any(candidate.measurement for turn in turns for candidate in turn.told)
    assert all(turn.survivors for turn in turns)


@pytest.mark.slow
@every_strategy
def test_a_space_that_is_used_up_ends_the_proposals(name: str):
    shape = Shape(heads=(1,), widths=(32, 32))
    survey = SURVEY.model_copy(update={"heads": ((1.0,),), "ffn": ((0.1,) * 32,), "encoder_parameters": HEAD + 32 * NEURON})
    strategy = made(name, known=KNOWN.model_copy(update={"shape": shape, "survey": survey}))
    population: tuple[Candidate, ...] = (BASE,)
    asked = []
    for number in range(30):
        proposals = strategy.ask(np.random.default_rng(number), population)
        asked += [identity.canonical(proposal) for proposal in proposals]
        ids = [(identity.content_hash(proposal.genome), proposal.genome) for proposal in proposals]
        population = strategy.tell(population, [Candidate(id=id, genome=g, measurement=measured(g)) for id, g in ids])
    assert len(set(asked)) == len(asked) < 2 * 2 * 3 * 3 + 10
    assert proposals == [] or name in ("random", "rl"), "draws without an end may miss the last ones"
    assert name not in ("evolve", "grid", "local_search") or strategy.ended


@every_strategy
def test_who_survives_was_measured_and_the_fittest_comes_first(name: str):
    known = {BASE.id}
    for turn in play(made(name), 8):
        known |= {candidate.id for candidate in turn.told if candidate.measurement}
        assert {survivor.id for survivor in turn.survivors} <= known
        scores = [KNOWN.score(survivor.measurement) for survivor in turn.survivors]
        assert scores == sorted(scores, reverse=True)
        assert len({survivor.id for survivor in turn.survivors}) == len(scores)


@every_strategy
def test_at_the_end_nobody_is_told_but_new_timings(name: str):
    strategy = made(name)
    *_, last = play(strategy, 6)
    assert strategy.tell(last.survivors, ()) == last.survivors


@every_strategy
def test_the_search_finds_more_than_its_first_generation(name: str):
    turns = list(play(made(name), 16))
    everyone = [candidate for turn in turns for candidate in turn.told]
    first = next(turn.told for turn in turns if any(candidate.measurement for candidate in turn.told))
    assert volume(everyone) > volume(first)


@by_name(LEARNING)
def test_what_is_learnt_shows_in_what_is_proposed(name: str):
    turns = list(play(made(name), 40))
    scores = [[KNOWN.score(c.measurement) for c in turn.told if c.measurement] for turn in turns]
    early, late = (np.median([score for turn in part for score in turn]) for part in (scores[:2], scores[-8:]))
    assert late > early + 0.5


@every_strategy
def test_a_quality_of_zero_is_survived(name: str):
    """Its score is -inf."""

    def worthless(candidate: Candidate, screen: Screen | None) -> Candidate:
        found = answered(candidate, screen)
        zero = found.measurement and found.measurement.model_copy(update={"metrics": {"accuracy": 0.0}})
        return found.model_copy(update={"measurement": zero})

    turns = list(play(made(name), 6, answer=worthless))
    assert turns[-1].survivors


@every_strategy
def test_a_setting_that_is_unknown_is_refused_by_name(name: str):
    kind, settings = STRATEGIES[name]
    with pytest.raises(ConfigError, match="did you mean population"):
        validate(kind, {"known": KNOWN, "space": SPACE.model_dump(), **settings, "populaton": 3}, "strategy")


# --- whole searches ---


TINY = {  # settings of whole searches, and their generations
    "evolve": (["budgets=[1.0, 0.5]", "screens=4", "judge=16", "switching=1", "profile_seconds=5"], 6),
    "grid": (["removed=[0, 0.3, 0.6]"], 2),
    "local_search": (["removed=[0.5]", "rounds=1", "selections=[{judge: 16, keep: 1}]"], 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evolve", "grid", "local_search", "random", "regularized_evolution", "optuna", "nas", "rl"])
def test_a_whole_search_on_a_tiny_model_and_again_from_its_outcomes(name: str, setup: Any, tmp_path: Path):
    if name == "nas":
        pytest.importorskip("syne_tune")
    tiny = [word for word in setup.overrides if not word.startswith("strategy.")]
    distill = "{operator: distill, epochs: 0.5, learning_rate: 1e-3, batch_size: 16}"
    overrides = [
        *tiny,
        f"strategy={name}",
        "strategy.population=3",
        "strategy.space.ffn_multiple=16",
        "strategy.space.carve.sentences=16",
        f"strategy.space.trainings={{short: [{distill}], long: [{distill}, {distill}]}}",
        # The same on every machine, whatever is installed.
        "strategy.space.deploys.fp32.cpu_onnx=[]",
        "strategy.space.deploys.onnx_int8=null",
        "objectives=[quality, bytes]",  # what was timed must not decide, so that runs can be compared
        f"generations={TINY.get(name, ([], 2))[1]}",
        "timings=1",
        *(f"strategy.{word}" for word in TINY.get(name, ([], 2))[0]),
    ]
    run = dataclasses.replace(setup, overrides=overrides)
    result = run.run(tmp_path / "run")
    assert result.generations == TINY.get(name, ([], 2))[1]
    first = story(tmp_path / "run")
    generations, _, scores = first
    assert sum(len(generation.born_ids) for generation in generations) >= 3
    worked = sum(score is not None for _, split, score in scores.values() if split == "search")
    assert worked >= (3 if name == "local_search" else 5), "most of them work"
    if name not in ("regularized_evolution", "local_search"):
        assert set(generations[-1].population) == set(result.front), "by the objectives of the run"
    for path in [tmp_path / "run/result.json", *(tmp_path / "run/generations").iterdir()]:
        path.unlink()
    launcher = Debug(worker="no.such.worker")  # is never needed
    assert run.run(tmp_path / "run", launcher=launcher) == result
    assert story(tmp_path / "run") == first


# --- the parts ---


def test_a_vector_is_one_genome():
    coordinates, rng = Coordinates(space=SPACE, shape=SHAPE), np.random.default_rng(0)
    assert coordinates.sizes == (5, 5, 5, 9, 9, 9, 3, 3)
    vectors = {coordinates.draw(rng) for _ in range(300)}
    for vector in vectors:
        genome = coordinates.decode(vector)
        assert coordinates.encode(Genome.model_validate_json(genome.model_dump_json())) == vector
        mutant = coordinates.mutate(rng, vector)
        assert sum(one != other for one, other in zip(vector, mutant, strict=True)) == 1
        assert all(0 <= number < size for number, size in zip(mutant, coordinates.sizes, strict=True))
    assert len({identity.canonical(coordinates.decode(vector)) for vector in vectors}) == len(vectors)
    assert coordinates.encode(Genome()) == (4, 4, 4, 8, 8, 8, 0, 0)


def test_a_genome_of_another_space_has_no_vector():
    coordinates = Coordinates(space=SPACE, shape=SHAPE)
    whole = SPACE.whole(SHAPE)
    odd = Structure(heads=(4, 4, 4), ffn=(33, 32, 32))
    short = Structure(heads=(4, 4), ffn=(32, 32), layers=(0, 2))
    foreign = SPACE.trainings["short"][0].model_copy(update={"params": {"epochs": 9}})
    for genome in (
        SPACE.genome(SHAPE, odd),
        SPACE.genome(SHAPE, short),
        SPACE.genome(SHAPE, whole, (foreign,)),
        SPACE.genome(SHAPE, whole, (), (foreign,)),
    ):
        assert coordinates.encode(genome) is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("removed", [0.0, 0.3, 0.6, 0.9, 0.9999])
def test_the_knapsack_loses_least_within_the_budget(removed: float):
    knapsack = Knapsack(SPACE, SHAPE, SURVEY)
    best = knapsack.best(removed)
    assert knapsack.parameters(SPACE.whole(SHAPE)) == SURVEY.encoder_parameters
    assert knapsack.parameters(best) <= knapsack.budget(removed) + 1e-6
    assert knapsack.parameters(best) >= knapsack.budget(removed) - 32 * NEURON
    assert best.heads[0] >= best.heads[1], "the first layer's heads are worth more"
    assert knapsack.parameters(best) > 0, "what can't be cut"
    assert (removed > 0) == (best != SPACE.whole(SHAPE))


def test_the_grid_is_proposed_once_and_its_first_slice_has_every_size_and_every_deployment():
    strategy = made("grid", population=5)
    turns = list(play(strategy, 3))
    assert not strategy.ended
    turns += play(strategy, 1)
    assert strategy.ended == "the whole grid is measured"
    first = [proposal.genome for proposal in turns[0].proposals]
    assert len({SPACE.structure(SHAPE, genome) for genome in first}) == 5
    assert len({identity.canonical(genome.deploy) for genome in first}) == 3
    everyone = [proposal.genome for turn in turns for proposal in turn.proposals]
    assert len(everyone) == 5 * 3 - 1, "all but the base model"
    assert [len(turn.proposals) for turn in turns] == [5, 5, 4, 0]
    assert all(bool(genome.steps) == (SPACE.structure(SHAPE, genome) != SPACE.whole(SHAPE)) for genome in everyone)


def test_the_oldest_dies_however_fit_and_the_best_is_not_forgotten():
    strategy = made("regularized_evolution", members=3, sample=1)
    best = answered(Candidate(id="best", genome=SPACE.genome(SHAPE, SPACE.whole(SHAPE), SPACE.trainings["long"])), None)
    small = [
        answered(Candidate(id=f"{n}", genome=SPACE.genome(SHAPE, Structure(heads=(n, 0, 0), ffn=(0,) * 3))), None)
        for n in range(4)
    ]
    strategy.tell([BASE], [best])
    survivors = strategy.tell([best], small[:3])
    assert {survivor.id for survivor in survivors} == {"best", "0", "1", "2"}
    survivors = strategy.tell(survivors, small[3:])
    assert {survivor.id for survivor in survivors} == {"best", "1", "2", "3"}


# --- local search ---


def test_a_level_switch_keeps_the_budget_and_uses_it():
    strategy, knapsack, rng = made("local_search"), Knapsack(SPACE, SHAPE, SURVEY), np.random.default_rng(0)
    structure, budget = knapsack.best(0.5), knapsack.budget(0.5)
    visited = set()
    for _ in range(300):
        structure = strategy._switched(rng, structure, budget)
        visited.add(structure)
        assert budget - 2 * 32 * NEURON < knapsack.parameters(structure) <= budget
    assert len(visited) > 100


def test_offspring_are_screened_in_selections_and_the_best_is_measured_in_every_deployment():
    *turns, end = play(made("local_search", removed=(0.5,)), 8)
    screens = [[proposal.screen for proposal in turn.proposals] for turn in turns]
    assert [len(screen) for screen in screens] == [6, 4, 6, 4, 6, 4, 3]
    assert [screen[0] and screen[0].judge for screen in screens] == [16, 256] * 3 + [None]
    assert [screen[0].sample for screen in screens[:-1]] == [1, 2, 3, 4, 5, 6]
    assert all(not proposal.genome.deploy for turn in turns[:-1] for proposal in turn.proposals)
    for first, second in zip(turns[:-1:2], turns[1:-1:2], strict=True):
        ranked = sorted(first.told, key=lambda candidate: candidate.screening.divergence)
        best = {identity.canonical(candidate.genome) for candidate in ranked[:3]}
        assert best < {identity.canonical(proposal.genome) for proposal in second.proposals}, "and the parent"
    last = min(turns[-2].told, key=lambda candidate: candidate.screening.divergence)
    found = SPACE.structure(SHAPE, last.genome)
    assert [proposal.genome for proposal in turns[-1].proposals] == [
        SPACE.genome(SHAPE, found, SPACE.trainings["short"], deploy) for deploy in SPACE.possible_deploys().values()
    ]
    assert end.proposals == []


@pytest.mark.slow
def test_a_search_by_screening_comes_near_the_best_structure_of_all_whatever_the_scores_say():
    flat = tuple((1.0,) * 256 for _ in SCORES)
    misleading = SURVEY.model_copy(update={"heads": ((1e-3,) * 4,) * 3, "ffn": flat})
    knapsack = Knapsack(SPACE, SHAPE, misleading)
    *_, last = play(made("local_search", known=KNOWN.model_copy(update={"survey": misleading}), removed=(0.5,), rounds=20), 41)
    found = damage(SPACE.structure(SHAPE, last.proposals[0].genome))
    heads, widths = itertools.product(range(5), repeat=3), itertools.product(SPACE.widths(SHAPE)[::2], repeat=3)
    everyone = [Structure(heads=h, ffn=f) for h, f in itertools.product(heads, widths)]
    best = min(damage(structure) for structure in everyone if knapsack.parameters(structure) <= knapsack.budget(0.5))
    assert found < 1.1 * best < 0.5 * damage(knapsack.best(0.5))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"removed": (0.0,)}, "above 0 and below 1"),
        ({"training": "none at all"}, "choose one of none, short, long"),
        ({"selections": ({"judge": 8, "keep": 2},)}, "the last keeps 1"),
        ({"selections": ({"judge": 8, "keep": 1}, {"judge": 8, "keep": 2}, {"judge": 8, "keep": 1})}, "at most as many"),
        ({"population": 3}, "no room for the parent"),
    ],
)
def test_settings_of_a_local_search_that_do_not_fit_are_refused(changes: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        made("local_search", **changes)


# --- Optuna, Syne Tune and the policy ---


def test_the_best_come_first_in_the_order_that_syne_tune_is_given():
    pytest.importorskip("syne_tune")
    vectors = np.array([[5.0, 5.0], [4.0, 4.0], [0.0, 0.0], [1.0, 1.0], [3.0, 3.0]])
    assert _ranks(vectors).tolist() == [4, 3, 0, 1, 2]


@pytest.mark.parametrize(("name", "module", "package"), [("optuna", "optuna", "optuna"), ("nas", "syne_tune", "syne-tune")])
def test_a_package_that_is_not_installed_is_named(name: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == module else find(wanted))
    with pytest.raises(ConfigError, match=f"needs the package {package}; pip install"):
        validate(STRATEGIES[name][0], {"known": KNOWN, "space": SPACE}, "strategy")


def test_a_policy_is_moved_towards_what_scored_above_the_average():
    strategy = made("rl", entropy=0.0)
    coordinates, good, bad = strategy.coordinates, (4, 4, 4, 8, 8, 8, 2, 2), (0, 0, 0, 0, 0, 0, 0, 1)
    told = [answered(Candidate(id=f"{at}", genome=coordinates.decode(vector)), None) for at, vector in enumerate((good, bad))]
    for _ in range(3):
        strategy.tell([BASE], told)
    for chance, one, other in zip(strategy._policy(), good, bad, strict=True):
        assert chance.sum() == pytest.approx(1)
        assert chance[one] > 1 / len(chance) > chance[other]


def test_an_undecided_policy_is_rewarded():
    sure, unsure = (made("rl", entropy=weight) for weight in (0.0, 1.0))
    told = [answered(Candidate(id="0", genome=SPACE.genome(SHAPE, SPACE.whole(SHAPE), SPACE.trainings["long"])), None)]
    for strategy in (sure, unsure):
        strategy._logits = [np.linspace(0, 3, size) for size in strategy.coordinates.sizes]
        strategy.tell([BASE], told)  # equal to the average: nothing is learnt from it

    def entropy(strategy: Any) -> float:
        return -sum(float(chance @ np.log(chance)) for chance in strategy._policy())

    assert entropy(unsure) > entropy(sure)
