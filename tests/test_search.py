"""The pure core: genomes, variation, selection and fitness, by property and by brute force. No torch."""

import itertools
import math

import numpy as np
import pytest

from hpc_compress import identity
from hpc_compress.config import ConfigError, validate
from hpc_compress.search.genetic import Genetic
from hpc_compress.search.objective import Product, latency_of, noise, quality_of, speed_up, speed_up_spread, with_timing
from hpc_compress.search.space import Shape
from hpc_compress.types import Base, Candidate, Dataset, Genome, Measurement, MeasurementProtocol, Step, Task

SHAPE = Shape(heads=(4, 4, 4))
MUTATIONS = {
    "layers": {"weight": 1, "operator": "drop_layers", "count": 1},
    "heads": {"weight": 1, "operator": "prune_heads", "count": 2},
}
QUANTIZATIONS = {
    "int8": {"weight": 0.3, "operator": "quantize", "scheme": "int8"},
    "nf4": {"weight": 0.3, "operator": "quantize", "scheme": "nf4"},
}


def measured(quality: float, ms: float = 10.0, size: int = 100, **changes: object) -> Measurement:
    values = {
        "metrics": {"accuracy": quality},
        "latency_ms": (ms,),
        "base_latency_ms": (10.0,),
        "model_bytes": size,
        "parameters": 10,
        "encoder_parameters": 5,
        "device": "test",
        "device_type": "cpu",
        "protocol": MeasurementProtocol(),
    }
    return Measurement(**{**values, **changes})


BASE = measured(0.9)


def genetic(**changes: object) -> Genetic:
    values = {
        "shape": SHAPE,
        "score": lambda measurement: Product()(measurement, BASE),
        "mutations": MUTATIONS,
        "quantizations": QUANTIZATIONS,
        "population": 8,
        "mutation_probability": 0.8,
        "crossover_probability": 0.5,
    }
    return Genetic.model_validate({**values, **changes})


def candidate(name: str, measurement: Measurement | None = BASE, genome: Genome | None = None) -> Candidate:
    return Candidate(id=name, genome=genome or Genome(steps=(Step(operator=name),)), measurement=measurement)


def evolve(strategy: Genetic, generations: int, seed: int = 0) -> list[Genome]:
    """Genomes of a search whose measurements are a function of the genome."""
    population: tuple[Candidate, ...] = (candidate("base", genome=Genome()),)
    genomes = []
    for number in range(1, generations + 1):
        born = []
        for proposal in strategy.ask(np.random.default_rng([seed, number]), population):
            key = identity.content_hash(proposal.genome)
            luck = int(key, 16) % 1000 / 1000
            born.append(candidate(key, measured(0.5 + luck / 2, ms=1 + luck), proposal.genome))
        genomes += [child.genome for child in born]
        population = strategy.tell(population, born)
    return genomes


def test_children_extend_their_parents_and_are_possible():
    strategy = genetic()
    parent = candidate("parent", genome=Genome(steps=(Step(operator="drop_layers"),), deploy=(Step(operator="quantize"),)))
    for proposal in strategy.ask(np.random.default_rng(0), [parent]):
        assert proposal.parent == "parent"
        assert proposal.genome.steps[:1] == parent.genome.steps
        assert SHAPE.after_all(proposal.genome.steps) is not None


def test_a_mutation_is_a_cut_and_training_and_a_crossover_is_distillation():
    only_mutation = genetic(crossover_probability=0, mutation_probability=1, quantizations={})
    only_crossover = genetic(crossover_probability=1, mutation_probability=0, redraw=0)
    both = genetic(crossover_probability=1, mutation_probability=1, quantizations={})
    base = candidate("base", genome=Genome())
    names = lambda strategy: {  # noqa: E731
        tuple(step.operator for step in proposal.genome.steps) for proposal in strategy.ask(np.random.default_rng(0), [base])
    }
    assert names(only_mutation) == {("drop_layers", "fine_tune"), ("prune_heads", "fine_tune")}
    assert names(only_crossover) == {("distill",)}
    assert names(both) == {("drop_layers", "fine_tune", "distill"), ("prune_heads", "fine_tune", "distill")}


def test_precision_is_inherited_unless_a_mutation_draws_another():
    parent = candidate("parent", genome=Genome(deploy=(Step(operator="quantize", params={"scheme": "fp16"}),)))
    crossed = genetic(mutation_probability=0, crossover_probability=1).ask(np.random.default_rng(0), [parent])
    assert all(proposal.genome.deploy == parent.genome.deploy for proposal in crossed)
    always = {"int8": {**QUANTIZATIONS["int8"], "weight": 1.0}}
    mutated = genetic(mutation_probability=1, quantizations=always).ask(np.random.default_rng(0), [parent])
    assert all(proposal.genome.deploy == (Step(operator="quantize", params={"scheme": "int8"}),) for proposal in mutated)


@pytest.mark.slow
def test_vocabulary_and_precision_are_drawn_and_inherited_apart_and_stand_in_one_order():
    trim, nf4 = Step(operator="trim_vocabulary"), Step(operator="quantize", params={"scheme": "nf4"})
    vocabularies = {"trim": {"weight": 0.25, "operator": "trim_vocabulary"}}
    strategy = genetic(population=4000, redraw=0, mutation_probability=1, vocabularies=vocabularies)
    assert strategy.deploys == (trim, *(choice.step for choice in strategy.quantizations.values()))

    def deploys(*parent: Step) -> list[tuple[Step, ...]]:
        proposals = strategy.ask(np.random.default_rng(0), [candidate("parent", genome=Genome(deploy=parent))])
        return [proposal.genome.deploy for proposal in proposals]

    born = deploys()
    assert sum(trim in deploy for deploy in born) / 4000 == pytest.approx(0.25, abs=0.03)
    assert sum(nf4 in deploy for deploy in born) / 4000 == pytest.approx(0.3, abs=0.03)
    assert sum(deploy == (trim, nf4) for deploy in born) / 4000 == pytest.approx(0.075, abs=0.02)
    assert all(deploy == tuple(sorted(deploy, key=lambda step: step != trim)) for deploy in born)
    assert all(deploy[0] == trim and len(deploy) <= 2 for deploy in deploys(trim))
    heirs = deploys(nf4)
    assert {len(deploy) for deploy in heirs} == {1, 2}
    assert sum(nf4 in deploy for deploy in heirs) / 4000 == pytest.approx(0.7, abs=0.03)


def test_a_child_can_return_to_fp32_and_to_the_whole_vocabulary():
    none = {"none": {"weight": 0.2, "operator": None}}
    vocabularies = {**none, "trim": {"weight": 0.25, "operator": "trim_vocabulary"}}
    strategy = genetic(
        population=1000,
        redraw=0,
        mutation_probability=1,
        vocabularies=vocabularies,
        quantizations={**none, "nf4": QUANTIZATIONS["nf4"]},
    )
    trim, nf4 = Step(operator="trim_vocabulary"), Step(operator="quantize", params={"scheme": "nf4"})
    assert strategy.deploys == (trim, nf4)
    parent = candidate("parent", genome=Genome(deploy=(trim, nf4)))
    deploys = [proposal.genome.deploy for proposal in strategy.ask(np.random.default_rng(0), [parent])]
    assert sum(nf4 not in deploy for deploy in deploys) / 1000 == pytest.approx(0.2, abs=0.05)
    assert sum(trim not in deploy for deploy in deploys) / 1000 == pytest.approx(0.2, abs=0.05)


# --- as published ---


def published(**changes: object) -> Genetic:
    return genetic(population=100, mutation_probability=0.5, crossover_probability=0.5, redraw=0, inherit=False, **changes)


def test_as_published_every_child_is_trained_from_a_seed_of_its_own():
    strategy, base = published(), candidate("base", genome=Genome())
    proposals = strategy.ask(np.random.default_rng(0), [base])
    assert 65 <= len(proposals) <= 85  # three of four draw a mutation, a crossover or both
    masters = {identity.master_key(task(genome=proposal.genome)) for proposal in proposals}
    assert len(masters) == len(proposals)
    ordinary = [p.genome for p in proposals if not any(step.replicate for step in p.genome.steps)]
    assert {genome.steps[0].operator for genome in ordinary} == {"drop_layers", "prune_heads", "distill"}
    later = strategy.ask(np.random.default_rng(1), [base])
    assert not {str(p.genome) for p in later if p.genome.steps} & {str(p.genome) for p in proposals}


def test_as_published_only_the_result_of_a_mutation_is_quantized():
    parent = candidate("parent", genome=Genome(steps=(Step(operator="distill"),), deploy=(Step(operator="quantize"),)))
    proposals = published().ask(np.random.default_rng(0), [parent])
    assert all(proposal.genome.steps[:1] == parent.genome.steps for proposal in proposals)
    crossed = [p.genome for p in proposals if len(p.genome.steps) == 2]
    mutated = [p.genome for p in proposals if len(p.genome.steps) > 2]
    assert crossed
    assert len(crossed) + len(mutated) == len(proposals), "a parent that draws nothing has no child"
    assert {genome.deploy for genome in crossed} == {()}
    schemes = {None if not genome.deploy else genome.deploy[0].params["scheme"] for genome in mutated}
    assert schemes == {None, "int8", "nf4"}


def test_the_published_dynamics_are_repeatable():
    assert evolve(published(), 4, seed=1) == evolve(published(), 4, seed=1)
    texts = [identity.canonical(genome) for genome in evolve(published(), 4)]
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize("seed", range(5))
def test_a_long_search_never_leaves_the_space_and_never_repeats_itself(seed: int):
    genomes = evolve(genetic(), generations=12, seed=seed)
    assert all(SHAPE.after_all(genome.steps) for genome in genomes)
    texts = [identity.canonical(genome) for genome in genomes]
    assert len(texts) == len(set(texts))


def test_equal_seeds_make_equal_searches_and_others_do_not():
    assert evolve(genetic(), 5, seed=1) == evolve(genetic(), 5, seed=1)
    assert evolve(genetic(), 5, seed=1) != evolve(genetic(), 5, seed=2)


@pytest.mark.slow
def test_the_rates_of_variation_are_those_that_were_asked_for():
    strategy = genetic(population=4000, redraw=0, crossover_probability=0.25, mutation_probability=0.5)
    proposals = strategy.ask(np.random.default_rng(0), [candidate("base", genome=Genome())])
    mutated = [p for p in proposals if p.genome.steps[:1] and p.genome.steps[0].operator != "distill"]
    crossed = [p for p in proposals if p.genome.steps[-1:] and p.genome.steps[-1].operator == "distill"]
    assert len(mutated) / 4000 == pytest.approx(0.5, abs=0.03)
    assert len(crossed) / 4000 == pytest.approx(0.25, abs=0.03)
    choices = strategy.quantizations.values()
    shares = [sum(p.genome.deploy == (choice.step,) for p in mutated) / len(mutated) for choice in choices]
    assert shares == pytest.approx([0.3, 0.3], abs=0.03)


def test_selection_keeps_the_fittest_whatever_the_order_of_arrival():
    qualities = {"a": 0.9, "b": 0.8, "c": 0.95, "d": 0.2, "e": 0.99}
    everyone = [candidate(name, measured(quality)) for name, quality in qualities.items()]
    for order in itertools.permutations(everyone):
        survivors = genetic(survivors=3).tell(order[:2], order[2:])
        assert [survivor.id for survivor in survivors] == ["e", "c", "a"]


def test_the_best_candidate_is_never_lost():
    strategy = genetic(survivors=1)
    best = candidate("best", measured(0.99))
    population = strategy.tell([best], [candidate("x", measured(0.5)), candidate("lost", None)])
    assert population == (best,)


def test_a_lost_candidate_never_survives():
    assert genetic(survivors=9).tell([candidate("base")], [candidate("lost", None)]) == (candidate("base"),)


def test_a_model_that_can_lose_nothing_more_is_still_crossed():
    strategy = genetic(shape=Shape(heads=(1,)), mutation_probability=1, crossover_probability=1, quantizations={})
    (first, *_) = strategy.ask(np.random.default_rng(0), [candidate("base", genome=Genome())])
    assert [step.operator for step in first.genome.steps] == ["distill"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"population": 0}, "population"),
        ({"mutation_probability": 1.5}, "mutation_probability"),
        ({"quantizations": {"a": {"weight": 0.7, "operator": "q"}, "b": {"weight": 0.7, "operator": "r"}}}, "at most 1"),
        ({"mutations": {}}, "no mutation has a weight"),
        ({"mutations": {**MUTATIONS, "none": {"weight": 1, "operator": None}}}, r"mutations\.none .* needs an operator"),
        ({"populaton": 3}, "did you mean population"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(changes: dict[str, object], words: str):
    with pytest.raises(ConfigError, match=words):
        validate(Genetic, {"shape": SHAPE, "score": len, "mutations": MUTATIONS, **changes}, "strategy")


# --- shape ---


def test_shape_follows_the_steps():
    drop, prune = Step(operator="drop_layers", params={"count": 2}), Step(operator="prune_heads", params={"count": 3})
    assert SHAPE.after_all([prune, drop]) == Shape(heads=(4,))
    assert SHAPE.after_all([drop, prune]) == Shape(heads=(1,))
    assert SHAPE.after_all([drop, drop]) is None
    assert SHAPE.after_all([prune, prune]) is None
    assert SHAPE.after(Step(operator="my.Own")) == SHAPE


@pytest.mark.parametrize("config", [{"num_hidden_layers": 3, "num_attention_heads": 4}, {"n_layers": 3, "n_heads": 4}])
def test_shape_is_read_from_a_config(config: dict[str, int]):
    assert Shape.of(config) == SHAPE


def test_a_config_that_is_no_encoder_is_refused():
    with pytest.raises(ValueError, match="choose a BERT"):
        Shape.of({"model_type": "resnet"})


# --- fitness ---


def test_fitness_is_the_published_formula():
    objective = Product(a=5, b=2, c=0.5)
    population = [measured(0.9, 10, 100), measured(0.8, 4, 80), measured(0.85, 5, 30)]
    for member, fitness in zip(population, objective.fitness(population), strict=True):
        q, t, m = quality_of(member), member.latency_ms[0], member.model_bytes
        assert fitness == pytest.approx((q / 0.9) ** 5 * (4 / t) ** 2 * (30 / m) ** 0.5)


def test_the_ranking_does_not_depend_on_the_population():
    rng = np.random.default_rng(0)
    population = [measured(*rng.uniform((0.1, 1), (1, 9)), size=int(rng.integers(1, 99))) for _ in range(30)]
    objective = Product()
    by_fitness = sorted(range(30), key=lambda i: objective.fitness(population)[i])
    by_score = sorted(range(30), key=lambda i: objective(population[i], BASE))
    assert by_fitness == by_score


@pytest.mark.parametrize("quality", [0.0, -0.3])
def test_no_power_turns_a_quality_of_zero_or_below_into_a_good_score(quality: float):
    bad, good = measured(quality, ms=1e-3, size=1), measured(0.01, ms=1e3, size=10**9)
    for a in (1.0, 2.0, 5.0, 0.5):
        assert Product(a=a)(bad, BASE) == -math.inf < Product(a=a)(good, BASE)
        assert Product(a=a).fitness([bad, good])[0] == 0


def test_a_population_without_any_quality_has_no_fitness_but_an_order():
    assert Product().fitness([measured(-0.1), measured(0.0)]) == [0, 0]
    survivors = genetic().tell([candidate("a", measured(-0.1))], [candidate("b", measured(0.0))])
    assert [survivor.id for survivor in survivors] == ["b", "a"]


def test_without_a_weight_quality_plays_no_part():
    assert Product(a=0)(measured(-0.5), BASE) == Product(a=0)(measured(0.9), BASE)


def test_zero_weights_leave_one_goal():
    assert Product(a=0, b=0, c=1).fitness([measured(0.1, size=50), measured(0.9, size=100)]) == pytest.approx([1, 0.5])


def test_the_median_of_all_timings_counts():
    lucky = measured(0.9, ms=1)
    again = [measured(0.9, ms=ms) for ms in (10, 12)]
    assert latency_of(lucky) == pytest.approx(0.1)
    whole = with_timing(with_timing(lucky, again[0]), again[1])
    assert latency_of(whole) == pytest.approx(1.0)
    assert speed_up(whole) == pytest.approx(1.0)
    assert speed_up_spread(whole) == pytest.approx(10 - 10 / 12)
    assert Product()(whole, BASE) == pytest.approx(Product()(again[0], BASE))
    with pytest.raises(ValueError, match="can't be compared"):
        with_timing(lucky, measured(0.9, device="another"))


def test_a_ratio_is_the_median_over_turns():
    # The machine was slow in the second turn, for both models alike.
    times = {"latency_ms": (5.0, 50.0, 5.0, 5.5), "base_latency_ms": (10.0, 100.0, 9.0, 10.0)}
    assert latency_of(measured(0.9, **times)) == pytest.approx((0.5 + 0.55) / 2)
    with pytest.raises(ValueError, match="equally many passes"):
        measured(0.9, latency_ms=(1.0, 2.0), base_latency_ms=(1.0,))


def test_the_base_model_is_as_fast_as_itself_and_tells_the_noise():
    times = {"latency_ms": (8.0, 9.0, 9.0, 10.5), "base_latency_ms": (10.0, 10.0, 10.0, 10.0)}
    base = measured(0.9, of_base=True, **times)
    assert speed_up(base) == 1
    assert speed_up_spread(base) == 0
    assert noise(base) == pytest.approx(0.2)
    assert speed_up(measured(0.9, **times)) != 1
    steady = measured(0.9, of_base=True, latency_ms=(*(10.0,) * 9, 30.0), base_latency_ms=(10.0,) * 10)
    assert noise(steady) == 0, "one pass of ten does not count"


def test_speed_is_over_the_base_model_in_its_best_precision_where_it_was_timed_so():
    both = {"base_best_latency_ms": (4.0,), "base_best_precision": "bf16"}
    cut, base = measured(0.9, ms=2, **both), measured(0.9, of_base=True, **both)
    assert (speed_up(cut), speed_up(cut, "best")) == (5, 2)
    assert (speed_up(base), speed_up(base, "best")) == (1, 0.4)
    assert speed_up(measured(0.9, ms=2), "best") == 5, "not timed in another precision"
    node = measured(0.9, ms=2, base_best_latency_ms=(8.0,), base_best_precision="bf16")
    assert Product()(node, base) - Product()(cut, base) == pytest.approx(math.log(2))
    assert Product(base="fp32")(node, base) == Product(base="fp32")(cut, base)


@pytest.mark.parametrize("device", ["Tesla V100-SXM2-32GB", "NVIDIA A100-PCIE-40GB"])
def test_two_kinds_of_gpu_are_not_compared(device: str):
    a100 = measured(0.9, device="NVIDIA A100-SXM4-40GB", device_type="cuda")
    with pytest.raises(ValueError, match=r"constraint") as error:
        Product()(measured(0.9, device=device, device_type="cuda"), a100)
    assert device in str(error.value)


@pytest.mark.parametrize(
    "other", [{"device_type": "cuda"}, {"device": "test, 2 threads"}, {"protocol": MeasurementProtocol(batch_size=1)}]
)
def test_unlike_measurements_are_not_compared(other: dict[str, object]):
    with pytest.raises(ValueError, match="can't be compared"):
        Product()(measured(0.9, **other), BASE)


# --- identity ---


def task(**changes: object) -> Task:
    values = {
        "base": Base(name="model", fingerprint="0" * 16),
        "dataset": Dataset(
            name="data", fingerprint="1" * 16, problem="classification", labels=("no", "yes"), metrics=("accuracy",)
        ),
        "protocol": MeasurementProtocol(),
        "seed": 0,
        "genome": Genome(steps=(Step(operator="drop_layers", params={"count": 1}),)),
    }
    return Task(**{**values, **changes})


def test_identities_stay_what_they_were():
    # Golden: if one changes, stored runs can no longer be resumed. Then say so in the release notes.
    assert identity.task_id(task()) == "292396aa7383b18d"
    assert identity.master_key(task()) == "a1ca02acdafda8ee"
    assert identity.derive(0, "purpose", 1) == 390836754130692552


def test_a_first_step_and_a_first_timing_are_written_as_ever():
    assert identity.canonical(Step(operator="x")) == '{"operator":"x","params":{}}'
    assert "repeat" not in identity.canonical(task())
    assert "base_precision" not in identity.canonical(task())
    again = Step(operator="x", replicate=2)
    assert Step.model_validate_json(identity.canonical(again)) == again
    assert identity.master_key(task(), (again,)) != identity.master_key(task(), (Step(operator="x"),))
    assert str(Genome(steps=(again,))) == "x#2"


def test_identity_has_everything_that_is_computed_and_nothing_else():
    changed = [
        task(seed=1),
        task(base=Base(name="model", fingerprint="2" * 16)),
        task(protocol=MeasurementProtocol(batch_size=8)),
        task(genome=Genome()),
        task(split="report"),
        task(limit=4),
        task(repeat=1),
        task(protocol=MeasurementProtocol(base_precision="best")),
    ]
    ids = {identity.task_id(item) for item in [task(), *changed]}
    assert len(ids) == 1 + len(changed)
    assert identity.master_key(task()) == identity.master_key(
        task(protocol=MeasurementProtocol(batch_size=8), split="report", repeat=2)
    )


def test_numbers_lie_on_a_grid():
    one, other = (Step(operator="x", params={"lr": value, "n": 1.0}) for value in (3e-5, 0.1 * 3e-4))
    assert one == other
    assert identity.canonical(one) == '{"operator":"x","params":{"lr":3e-05,"n":1}}'


def test_derived_seeds_are_independent():
    seeds = {identity.derive(seed, generation, purpose) for seed in range(9) for generation in range(9) for purpose in "ab"}
    assert len(seeds) == 162
    assert all(0 <= seed < 2**63 for seed in seeds)
