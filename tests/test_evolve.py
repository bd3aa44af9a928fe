"""What only `evolve` does, in the world of the strategies' suite; and the variation of structures."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_strategies as world
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpc_compress import analysis, identity
from hpc_compress.config import Target
from hpc_compress.models import inspection
from hpc_compress.models.modeling_hpc_compress import FAMILIES
from hpc_compress.search import front
from hpc_compress.search.beliefs import Curve, Cut, Design
from hpc_compress.search.fidelity import LEFT_OUT
from hpc_compress.search.objective import speed_up
from hpc_compress.search.prediction import Prediction
from hpc_compress.search.space import Shape
from hpc_compress.search.structures import Structures
from hpc_compress.search.variation import Sites
from hpc_compress.types import Candidate, Genome, Screen, Screening, Step, Structure

STRUCTURES = Structures(world.SPACE, world.SHAPE)
SITES = Sites.of(STRUCTURES, [Prediction.of(world.SURVEY, world.PROFILE)], ())
levels = st.tuples(*[st.integers(0, most) for most in SITES.most])


def played(generations: int = 12, answer: Any = world.answered, **changes: Any) -> list[world.Turn]:
    return list(world.play(world.made("evolve", **changes), generations, answer=answer))


def proposed(turns: list[world.Turn]) -> list[Any]:
    return [proposal for turn in turns for proposal in turn.proposals]


# --- the course ---


def test_the_first_generation_is_measured_untrained_and_leaves_a_whole_front():
    first, *_ = played(1)
    assert all(proposal.screen is None for proposal in first.proposals)
    assert not any(step.operator == "distill" for proposal in first.proposals for step in proposal.genome.steps)
    assert len(first.survivors) > 3
    speeds = [speed_up(survivor.measurement) for survivor in first.survivors]
    assert max(speeds) > 3 * min(speeds)


def test_what_is_only_screened_comes_before_what_is_trained():
    kinds = [
        "screen" if proposal.screen else "train" if any(s.operator == "distill" for s in proposal.genome.steps) else "measure"
        for proposal in proposed(played(6))
    ]
    assert kinds.index("measure") < kinds.index("screen") < kinds.index("train")


def with_accuracy(found: Candidate, accuracy: float) -> Candidate:
    """The candidate, had it been measured with this accuracy; unchanged where it was only screened."""
    if found.measurement is None:
        return found
    return found.model_copy(update={"measurement": found.measurement.model_copy(update={"metrics": {"accuracy": accuracy}})})


def lossless(candidate: Candidate, screen: Screen | None) -> Candidate:
    return with_accuracy(world.answered(candidate, screen), 0.9)


def test_the_second_generation_is_small_and_trains_nothing():
    _, second = played(2, population=8, answer=lossless)
    assert 0 < len(second.proposals) <= 2
    assert all(proposal.screen is None for proposal in second.proposals)
    assert not any(step.operator == "distill" for proposal in second.proposals for step in proposal.genome.steps)


def test_nothing_is_measured_in_vain_before_the_first_screening():
    _, second = played(2, population=8)
    assert all(proposal.screen is not None for proposal in second.proposals)


def tries_moves(turn: world.Turn) -> bool:
    """Whether many structures differ from one of them at a single site: moves are tried one by one."""
    rows = [STRUCTURES.levels(STRUCTURES.space.structure(world.SHAPE, p.genome)) for p in turn.proposals if p.screen]
    alike = [sum(np.count_nonzero(np.subtract(one, other)) == 1 for other in rows) for one in rows]
    return max(alike, default=0) > len(SITES.most)


@pytest.mark.parametrize("fails", [False, True])
def test_moves_are_put_together_only_where_all_were_judged_on_the_same_sentences(fails: bool):
    def answered(candidate: Candidate, screen: Screen | None) -> Candidate:
        again = candidate.screening is not None and screen is not None
        return candidate if fails and again else world.answered(candidate, screen)

    turns = played(12, answered, switching=3)
    after = [later for turn, later in itertools.pairwise(turns) if tries_moves(turn) and not tries_moves(later)]
    assert len(after) > 1
    assert any(proposal.screen for turn in after for proposal in turn.proposals) == (not fails)


def test_screens_of_which_nothing_was_told_are_under_way():
    strategy = world.made("evolve")
    (turn,) = world.play(strategy, 1)
    assert not strategy._under_way
    proposals = strategy.ask(np.random.default_rng(1), turn.survivors)
    assert proposals
    assert all(proposal.screen for proposal in proposals)
    assert strategy._under_way
    told = [
        world.answered(Candidate(id=str(at), genome=proposal.genome), proposal.screen) for at, proposal in enumerate(proposals)
    ]
    strategy.tell(turn.survivors, told)
    assert not strategy._under_way


@pytest.mark.slow
def test_parts_can_be_left_out():
    assert not any(proposal.screen for proposal in proposed(played(screens=0)))

    assert not any(tries_moves(turn) for turn in played(10, switching=0))
    assert any(tries_moves(turn) for turn in played(10, switching=2))


def test_a_loss_that_all_first_models_would_share_is_seen():
    """One structure is measured with each vocabulary, and what a vocabulary loses is not put down to the precision."""
    trim = (Step(operator="trim_vocabulary"),)
    deploys = {name: chain for name, chain in world.SPACE.deploys.items() if name != "small"}
    lossy = world.SPACE.model_copy(update={"deploys": deploys, "vocabularies": {"few": trim, "all": ()}})
    parts = lossy.deploy_parts()
    assert list(parts.values()) == [("fp32", "few"), ("fp32", "all"), ("nf4", "few"), ("nf4", "all")]
    sizes = [
        one.model_copy(update={"deploy": (*trims, *one.deploy), "fixed": one.fixed / (2 if trims else 1)})
        for one in world.SURVEY.bytes[:2]
        for trims in (trim, ())
    ]
    known = world.KNOWN.model_copy(update={"survey": world.SURVEY.model_copy(update={"bytes": tuple(sizes)})})

    def answered(candidate: Candidate, screen: Screen | None) -> Candidate:
        found = world.answered(candidate, screen)
        if found.measurement is None or not any(step.operator == "trim_vocabulary" for step in candidate.genome.deploy):
            return found
        metrics = {name: value - 0.02 for name, value in found.measurement.metrics.items()}
        return found.model_copy(update={"measurement": found.measurement.model_copy(update={"metrics": metrics})})

    found = {}
    for name, answer in (("lossless", world.answered), ("lossy", answered)):
        target = Target(speed_up=3)  # one budget more
        strategy = world.made("evolve", known=known.model_copy(update={"target": target}), space=lossy, population=2)
        first, *_ = world.play(strategy, 1, answer=answer)
        ways = [(proposal.genome.steps, proposal.genome.deploy[:1] == trim) for proposal in first.proposals]
        assert any((steps, not trimmed) in ways for steps, trimmed in ways)
        found[name] = strategy._believed().offsets
    change = {part: found["lossy"].get(part, 0) - found["lossless"].get(part, 0) for part in found["lossy"]}
    assert change["vocabulary few"] > 0.03
    assert change["vocabulary all"] < -0.03
    others = [abs(change[part]) for part in change if part.startswith("precision")]
    assert max(others) < 0.5 * change["vocabulary few"], "its loss is put down to the precisions"


def test_cuts_that_lose_everything_untrained_are_trained():
    """A training gives most of it back, as the search expects before it has seen one."""

    def answered(candidate: Candidate, screen: Screen | None) -> Candidate:
        found = world.answered(candidate, screen)
        structure = world.SPACE.structure(world.SHAPE, candidate.genome)
        if found.measurement is None or world.damage(structure) < 0.1:
            return found
        trained = any(step.operator == "distill" for step in candidate.genome.steps)
        return with_accuracy(found, 0.88 if trained else 0.6)

    last = played(12, answer=answered)[-1]
    best = [candidate for candidate in last.survivors if candidate.measurement.metrics["accuracy"] == 0.88]
    assert max(speed_up(candidate.measurement) for candidate in best) > 5


def test_cuts_grow_deeper_as_long_as_that_pays():
    def deepest(answer: Any) -> float:
        strategy = world.made("evolve", budgets=(1.0, 0.6), screens=0)
        turns = list(world.play(strategy, 12, answer=answer))
        return min(SITES.price(STRUCTURES.levels(world.SPACE.structure(world.SHAPE, p.genome))) for p in proposed(turns))

    def useless(candidate: Candidate, screen: Screen | None) -> Candidate:
        mild = world.damage(world.SPACE.structure(world.SHAPE, candidate.genome)) < 0.1
        return with_accuracy(world.answered(candidate, screen), 0.9 if mild else 0.1)

    assert deepest(lossless) < 0.1
    assert deepest(useless) > 0.2


def test_where_every_cut_loses_everything_the_search_goes_on():
    def useless(candidate: Candidate, screen: Screen | None) -> Candidate:
        return with_accuracy(world.answered(candidate, screen), 0.1)

    turns = played(12, answer=useless, budgets=(0.4,), screens=0)
    assert any(turn.proposals for turn in turns[4:])


def test_a_training_costs_by_what_is_left_and_a_model_that_was_found_is_found_again_where_it_died():
    strategy = world.made("evolve")
    list(world.play(strategy, 1))
    whole, small = Cut(SITES.most), Cut(SITES.knapsack(0.1))
    costs = [strategy._cost(Design(cut, training, "fp32")) for cut in (whole, small) for training in ("none", "short", "long")]
    assert costs[0] == costs[3] == 1
    assert 1 < costs[4] < costs[1] < costs[2]
    assert strategy._cost(Design(small, "short", "nf4"), {(small, "short")}) == 1, "they share a model"
    found = Cut(SITES.knapsack(0.1), 0.5)
    assert strategy._cost(Design(found, "none", "fp32")) == 1, "stored until it is measured"
    strategy._believed().measured[Design(found, "none", "nf4")] = "dead"
    assert strategy._cost(Design(found, "none", "fp32")) > 1


@pytest.mark.slow
def test_only_structures_that_lose_something_have_offspring():
    def offspring(negligible: float) -> int:
        measured: set[str] = set()
        count = 0
        for proposal in proposed(played(12, negligible=negligible, rescoring=False, switching=0)):
            count += proposal.screen is not None and str(proposal.genome.steps) not in measured
            measured |= {str(proposal.genome.steps[:1])}
        return count

    assert offspring(10.0) == 0
    assert offspring(0.02) > 8


def test_a_precision_that_was_never_measured_is_judged_on_top_of_a_structure():
    strategy = world.made("evolve")
    *_, turn = world.play(strategy, 2)
    assert {"fp32", "nf4"} - {design.deploy for design in strategy._designs.values()} == {"fp32"}
    (compared,) = (proposal.screen for proposal in turn.proposals if proposal.screen and proposal.screen.deploys)
    assert [world.scheme_of(chain) for chain in compared.deploys] == ["fp32", "nf4"], "what changes the tokens is left out"
    offsets = strategy._believed().offsets
    assert offsets["precision fp32"] < 0 < offsets["precision nf4"]
    assert strategy._added("fp32", offsets) < strategy._added("nf4", offsets)


@pytest.mark.parametrize("divergence", [1e3, None], ids=["terrible", "failed"])
def test_a_precision_that_is_no_good_changes_little_for_the_others(divergence: float | None):
    def bad(candidate: Candidate, screen: Screen | None) -> Candidate:
        found = world.answered(candidate, screen)
        if found.screening is None or not found.screening.deployed:
            return found
        deployed = tuple(
            each.model_copy(update={"divergence": divergence}) if world.scheme_of(each.deploy) == "fp32" else each
            for each in found.screening.deployed
        )
        return found.model_copy(update={"screening": found.screening.model_copy(update={"deployed": deployed})})

    good, other = world.made("evolve"), world.made("evolve")
    for strategy, answer in ((good, world.answered), (other, bad)):
        list(world.play(strategy, 2, answer=answer))
    believed = good._believed().offsets, other._believed().offsets
    assert believed[1].get("precision fp32", 0.0) >= (0.1 if divergence else 0.0)
    design = Design(good._plain[1], "none", "nf4")
    assert other._expected(design)[0][0] == pytest.approx(good._expected(design)[0][0], abs=0.15)
    assert len(list(world.play(other, 6, answer=bad))) == 6


def test_a_way_to_deploy_that_always_fails_is_given_up():
    def broken(candidate: Candidate, screen: Screen | None) -> Candidate:
        fails = screen is None and world.scheme_of(candidate.genome.deploy) == "int8"
        return candidate if fails else world.answered(candidate, screen)

    turns = played(12, answer=broken)
    tried = [sum(world.scheme_of(each.genome.deploy) == "int8" for each in turn.proposals) for turn in turns]
    assert sum(tried) >= 2
    assert not any(tried[4:])
    assert len(turns[-1].survivors) > 3


def test_a_search_goes_on_where_nothing_can_be_screened_any_more():
    def broken(candidate: Candidate, screen: Screen | None) -> Candidate:
        return candidate if screen and screen.sample > 1 else world.answered(candidate, screen)

    turns = played(12, answer=broken)
    assert sum(proposal.screen is None for turn in turns[6:] for proposal in turn.proposals) > 8


def test_precisions_that_were_measured_are_not_judged_once_more():
    space = world.SPACE.model_copy(update={"deploys": {"fp32": (), "nf4": world.SPACE.deploys["nf4"]}})
    proposals = [proposal for turn in world.play(world.made("evolve", space=space), 8) for proposal in turn.proposals]
    assert any(proposal.screen for proposal in proposals)
    assert not any(proposal.screen and proposal.screen.deploys for proposal in proposals)


@pytest.mark.slow
def test_offspring_are_of_every_depth():
    strategy = world.made("evolve", switching=0, rescoring=False, screens=32)
    ranges = []
    for turn in world.play(strategy, 12):
        structures = [world.SPACE.structure(world.SHAPE, proposal.genome) for proposal in turn.proposals if proposal.screen]
        prices = [SITES.price(STRUCTURES.levels(structure)) for structure in structures]
        parents = [SITES.price(cut.levels) for cut in strategy._worth_varying()]
        if len(prices) > 16:
            ranges.append(np.ptp(prices) / np.ptp(parents))
    assert len(ranges) > 2
    assert min(ranges) > 0.6


@pytest.mark.slow
def test_samples_differ_from_screen_to_screen_and_grow():
    screens = [
        {(proposal.screen.sample, proposal.screen.judge) for proposal in turn.proposals if proposal.screen}
        for turn in played(20)
        if turn.proposals and turn.proposals[0].screen
    ]
    assert all(len(each) == 1 for each in screens)
    samples = [next(iter(each)) for each in screens]
    assert len({sample for sample, _ in samples}) == len(samples)
    assert samples[-1][1] > samples[0][1]


@pytest.mark.slow
def test_some_of_the_best_are_judged_again_beside_their_rivals():
    seen: set[str] = set()
    strategy, again = world.made("evolve", screens=8, judge=16, switching=0, rescoring=False), []
    best: set[str] = set()
    for turn in world.play(strategy, 20):
        screened = {identity.canonical(proposal.genome) for proposal in turn.proposals if proposal.screen}
        if screened:
            again.append(screened & seen)
            seen |= screened
            assert again[-1] <= best
        best = {identity.canonical(Genome(steps=strategy._steps(cut))) for cut in strategy._best_cuts()}
    assert len(again) > 4
    assert again[0] == set()
    assert {len(each) for each in again[1:]} == {2}, "a quarter of them"
    assert len(set.union(*again)) > 2, "others the next time"


@pytest.mark.slow
def test_none_is_judged_again_where_all_samples_are_alike():
    survey = world.SURVEY.model_copy(update={"train_rows": 200})
    known = world.KNOWN.model_copy(update={"survey": survey})
    screened = [
        identity.canonical(proposal.genome)
        for proposal in proposed(played(20, known=known, screens=8, switching=0, rescoring=False))
        if proposal.screen
    ]
    assert len(screened) == len(set(screened)) > 8


FOUND = Structure(heads=(1, 0, 1), ffn=(32, 0, 64))


def with_found(candidate: Candidate, screen: Screen | None) -> Candidate:
    """`prune` finds a structure on the node, far better than any other one."""
    if candidate.genome.steps[:1] and candidate.genome.steps[0].operator == "prune":
        if screen is not None:
            return candidate.model_copy(update={"screening": Screening(divergence=0.001, structure=FOUND)})
        measured = world.measured(Genome(deploy=candidate.genome.deploy))
        small = world.measured(world.SPACE.genome(world.SHAPE, FOUND, deploy=candidate.genome.deploy))
        return candidate.model_copy(update={"measurement": small.model_copy(update={"metrics": measured.metrics})})
    return world.answered(candidate, screen)


def test_structures_that_are_found_block_by_block_are_measured_as_the_genomes_that_found_them():
    turns = played(8, answer=with_found, rescoring=True, negligible=0.0)
    asked = [p.genome for p in proposed(turns) if p.screen and p.genome.steps[0].operator == "prune"]
    assert asked
    assert all(genome.steps[0].params["rescore"] for genome in asked)
    measured = [
        p.genome for p in proposed(turns) if not p.screen and p.genome.steps[:1] and p.genome.steps[0].operator == "prune"
    ]
    assert measured
    known = [genome.steps[0] for genome in asked]
    assert all(genome.steps[0] in known for genome in measured)


ALIKE = Shape(heads=(4, 4, 4), widths=(64, 256), alike=True)


@pytest.mark.parametrize("name", ["evolve", "random", "grid", "local_search", "regularized_evolution"])
def test_layers_that_share_a_bias_keep_the_same_heads(name: str):
    known = world.KNOWN.model_copy(update={"shape": ALIKE})
    turns = list(world.play(world.made(name, known=known), 8))
    found = [world.SPACE.structure(ALIKE, proposal.genome) for proposal in proposed(turns)]
    assert all(len(set(structure.heads)) == 1 for structure in found)
    assert len({structure.heads for structure in found}) > 1 or name == "grid"
    assert len({structure.ffn for structure in found}) > 1


def test_the_families_whose_layers_are_alike_are_known_without_torch():
    assert {name for name, family in FAMILIES.items() if family.shared_bias} == inspection.ALIKE


@pytest.mark.slow
def test_a_model_whose_layers_share_a_bias_is_searched(setup: Any, tiny_checkpoint: Any, tmp_path: Path):
    model = tiny_checkpoint("mpnet", layers=2, heads=4, hidden=64, ffn=64, head=False)
    tiny = [word for word in setup.overrides if not word.startswith(("strategy", "model.path"))]
    distill = "{operator: distill, epochs: 0.5, learning_rate: 1e-3, batch_size: 16}"
    small = [
        *("population=3", "budgets=[1.0, 0.4]", "screens=4", "judge=16", "switching=0", "profile_seconds=2", "negligible=0"),
        *("space.ffn_multiple=16", "space.carve.sentences=16"),
        f"space.trainings={{short: [{distill}], long: [{distill}, {distill}]}}",
        *("space.deploys.fp32.cpu_onnx=[]", "space.deploys.onnx_int8=null"),
    ]
    words = [*tiny, "strategy=evolve", *(f"strategy.{word}" for word in small), f"model.path={model}", "generations=5"]
    dataclasses.replace(setup, overrides=[*words, "timings=1"]).run(tmp_path / "run")
    run = analysis.open_run(tmp_path / "run")
    assert not [seen.failure for seen in run.seen.values() if seen.failure]
    assert {seen.study for seen in run.seen.values()} == {None, "survey", "profile", "screen"}
    assert any("prune" in seen.genome for seen in run.seen.values()), "found block by block, as far as that goes"


@given(levels)
def test_a_structure_is_priced_by_all_devices(each: tuple[int, ...]):
    blocks = [
        block.model_copy(update={"attention_ms": (tuple(tuple(5 * ms for ms in row) for row in block.attention_ms[0]),)})
        for block in world.PROFILE.blocks
    ]
    slow = Prediction.of(world.SURVEY, world.PROFILE.model_copy(update={"blocks": tuple(blocks)}))
    here = Prediction.of(world.SURVEY, world.PROFILE)
    prices = [Sites.of(STRUCTURES, predictions, ()).price(each) for predictions in ([here], [slow], [here, slow])]
    assert prices[2] == pytest.approx((prices[0] + prices[1]) / 2)
    assert Sites.of(STRUCTURES, [here, slow], ()).price(SITES.most) == pytest.approx(1)


def test_the_probe_tries_the_step_that_finds_structures():
    rehearsal = world.made("evolve", known=world.Known(shape=world.SHAPE), rescoring=True)
    assert "prune" in {step.operator for step in rehearsal.steps}


@pytest.mark.slow
def test_a_target_draws_the_search_near_it():
    def missed(wanted: Target, target: Target) -> float:
        """How far the models that a search measures are from what is wanted."""
        known = world.KNOWN.model_copy(update={"target": target})
        found = []
        for seed in range(3):
            strategy = world.made("evolve", known=known, population=2, switching=0, screens=8)  # more is open than is measured
            turns = list(world.play(strategy, 24, seed=seed))
            found += [candidate.measurement for turn in turns[3:] for candidate in turn.told if candidate.measurement]
        return float(np.mean([front.missed(measurement, world.KNOWN.base, wanted) for measurement in found]))

    targets = [Target(quality=0.9, speed_up=3), Target(quality=0.95, speed_up=2.5), Target(quality=0.93, megabytes=20)]
    assert np.mean([missed(target, target) / missed(target, Target()) for target in targets]) < 0.8


def test_a_stage_that_does_not_rank_is_said_and_done_without():
    def by_chance(candidate: Candidate, screen: Screen | None) -> Candidate:
        found = world.answered(candidate, screen)
        if found.screening is None:
            return found
        luck = int(identity.content_hash(candidate.genome), 16) % 1000 / 1000
        return found.model_copy(update={"screening": found.screening.model_copy(update={"divergence": luck})})

    strategy = world.made("evolve", switching=0)
    notes = []
    for _ in world.play(strategy, 16, answer=by_chance):
        notes += strategy.notes()
    assert any("rank correlation of removed scores and divergence" in note for note in notes)
    assert len(notes) == len(set(notes))
    strategy._screen_stage.trust = LEFT_OUT
    assert not strategy._still_screens, "a stage that is left out costs nothing more"
    assert tuple(strategy._best_cuts()) == strategy._plain


def test_what_is_new_waits_before_it_is_timed_again():
    strategy = world.made("evolve", elites=100)
    rng = np.random.default_rng(0)
    for turn in world.play(strategy, 12):
        told = {candidate.id for candidate in turn.told}
        old = [candidate for candidate in turn.survivors if candidate.id not in told]
        if len(turn.survivors) > len(old) > 3:
            break
    assert len(turn.survivors) > len(old) > 3
    strategy.ask(rng, turn.survivors)
    assert strategy.timed_again(turn.survivors) == old
    strategy.ask(rng, turn.survivors)
    assert strategy.timed_again(turn.survivors) == list(turn.survivors)


def test_a_time_that_contradicts_its_prediction_is_measured_again():
    strategy = world.made("evolve", elites=1)
    *_, turn = world.play(strategy, 4)
    assert len(turn.survivors) > 4
    rng = np.random.default_rng(0)
    strategy.ask(rng, turn.survivors)
    strategy.ask(rng, turn.survivors)
    assert strategy.timed_again(turn.survivors) == [turn.survivors[0]]
    *others, lucky = [candidate for candidate in turn.survivors if candidate.genome != Genome()]
    faster = {"latency_ms": tuple(ms / 1.3 for ms in lucky.measurement.latency_ms)}
    lucky = lucky.model_copy(update={"measurement": lucky.measurement.model_copy(update=faster)})
    assert strategy.timed_again([*others, lucky]) == [others[0], lucky]


# --- the budget ---


@pytest.mark.parametrize("timings", [1, 2])
def test_only_timings_that_will_be_taken_are_paid_for(timings: int):
    strategy = world.made("evolve", known=world.KNOWN.model_copy(update={"timings": timings}))
    *_, turn = world.play(strategy, 8)  # in which every model is timed once
    again = [candidate for candidate in strategy.timed_again(turn.survivors) if candidate.genome != Genome()]
    assert again
    assert strategy._timed_beside(turn.survivors) == (timings - 1) * len(again)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [60.0, 111.0, 180.0])
def test_the_last_generation_is_as_small_as_the_budget_asks(budget: float):
    spent, sizes = 0.0, []
    known = world.KNOWN.model_copy(update={"left": lambda: budget - spent})
    strategy = world.made("evolve", known=known, elites=0, switching=0)
    for turn in world.play(strategy, 100):
        for proposal in turn.proposals:
            trained = sum(step.params["epochs"] for step in proposal.genome.steps if step.operator == "distill")
            spent += 0.3 if proposal.screen else 2 + 1.5 * trained
        sizes.append((bool(turn.proposals and turn.proposals[0].screen), len(turn.proposals)))
        if strategy.ended:
            break
    assert "too short for another model" in strategy.ended
    assert 0.75 * budget < spent <= 1.03 * budget  # costs are expected, and differ a little
    assert not sizes[-1][0], "what is only screened at the end is no result"


def test_structures_that_do_not_fit_leave_the_budget_to_models():
    """Finding a structure block by block takes as long as ten models, and nobody knows it before the first one."""
    spent, kinds = 0.0, []
    known = world.KNOWN.model_copy(update={"left": lambda: 90.0 - spent})
    strategy = world.made("evolve", known=known, elites=0, rescoring=True, negligible=0.0)
    for turn in world.play(strategy, 100, answer=with_found):
        slow = [
            proposal
            for proposal in turn.proposals
            if proposal.genome.steps[:1] and proposal.genome.steps[0].operator == "prune"
        ]
        searched = [proposal for proposal in slow if proposal.screen]
        for proposal in turn.proposals:
            trained = sum(step.params["epochs"] for step in proposal.genome.steps if step.operator == "distill")
            spent += 20.0 if proposal in searched else 0.3 if proposal.screen else 2 + 1.5 * trained
        kinds.append("found" if searched else "screened" if turn.proposals and turn.proposals[0].screen else "measured")
        assert len(searched) <= (1 if kinds.count("found") == 1 else 9)
        if strategy.ended:
            break
    assert kinds.count("found") >= 1
    assert kinds[-1] == "measured"
    assert spent <= 1.05 * 90


def test_a_training_that_is_stored_is_not_paid_again():
    strategy = world.made("evolve")
    for _ in world.play(strategy, 3):
        pass
    cut, (*_, name) = strategy._plain[1], strategy.space.trainings
    design = Design(cut, name, next(iter(strategy.space.possible_deploys())))
    strategy._alive.clear()
    assert strategy._cost(design) > 1
    assert strategy._cost(design, {(cut, name)}) == 1
    strategy._alive.add((cut, name))
    assert strategy._cost(design) == 1


def test_the_knapsacks_structures_always_compete():
    strategy = world.made("evolve")
    for _ in world.play(strategy, 8):
        pass
    assert set(strategy._plain) <= {design.cut for design in (*strategy._pool(), *strategy._designs.values())}


# --- what is believed ---


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(-0.2, 2)), max_size=8), st.floats(0, 2), st.floats(0, 2))
@example([(0.0, 2.0)], 0.0, 1.0)
@settings(max_examples=60)
def test_a_curve_rises_from_the_origin(pairs: list[tuple[float, float]], one: float, other: float):
    curve = Curve.through(pairs)
    low, high = sorted((one, other))
    assert 0 <= curve(low) <= curve(high) + 1e-9


def test_a_curve_without_points_is_the_identity():
    assert Curve.through([])(0.3) == pytest.approx(0.3)


# --- variation ---


@given(levels)
@settings(max_examples=40)
def test_levels_and_structures_are_two_names_of_one_thing(row: tuple[int, ...]):
    assert STRUCTURES.levels(STRUCTURES.structure(row)) == row


def test_the_whole_model_costs_1_and_loses_nothing():
    assert SITES.price(SITES.most) == pytest.approx(1)
    assert SITES.mass(SITES.most) == pytest.approx(0)
    assert SITES.mass((0,) * len(SITES.most)) == pytest.approx(1)


@given(st.floats(0.05, 1), levels)
@settings(max_examples=40)
def test_the_knapsack_keeps_its_budget_and_loses_least(budget: float, other: tuple[int, ...]):
    best = SITES.knapsack(budget)
    assert SITES.price(best) <= budget * (1 + 1e-6)
    if SITES.price(other) <= budget * 0.99:  # the grid of the budget is coarser than a price
        assert SITES.mass(best) <= SITES.mass(other) + 1e-3


@given(levels, st.integers(0, 100), st.integers(1, 4))
@settings(max_examples=60)
def test_switching_never_costs_more(row: tuple[int, ...], seed: int, switches: int):
    found = SITES.switched(np.random.default_rng(seed), row, switches)
    assert SITES.price(found) <= SITES.price(row) * (1 + 1e-5) + 1e-12
    assert all(0 <= level <= most for level, most in zip(found, SITES.most, strict=True))


@given(levels, levels, st.integers(0, 100))
@settings(max_examples=40)
def test_a_child_has_each_site_of_one_of_its_parents(one: tuple[int, ...], other: tuple[int, ...], seed: int):
    child = SITES.crossed(np.random.default_rng(seed), one, other)
    assert all(level in pair for level, pair in zip(child, zip(one, other, strict=True), strict=True))


@given(levels)
@settings(max_examples=40)
def test_neighbours_differ_at_one_site(row: tuple[int, ...]):
    for (site, by), near in SITES.neighbours(row, 2).items():
        assert [at for at in range(len(row)) if near[at] != row[at]] == [site]
        assert by * (near[site] - row[site]) > 0
        assert 0 <= near[site] <= SITES.most[site]


FINE = Sites(prices=(np.arange(49.0), np.arange(13.0)), losses=(np.zeros(49), np.zeros(13)))


@pytest.mark.parametrize(
    ("row", "site", "steps", "moved"),
    [
        ((48, 12), 0, -2, (32, 12)),
        ((48, 12), 1, -2, (48, 8)),
        ((24, 5), 0, 2, (32, 5)),
        ((24, 5), 1, 2, (24, 7)),
        ((0, 1), 0, 2, (2, 1)),
        ((0, 1), 1, -2, (0, 0)),
        ((47, 0), 0, 2, (48, 0)),
        ((48, 0), 0, 2, None),
        ((48, 0), 1, -1, None),
    ],
)
def test_a_step_is_a_sixth_of_what_a_site_keeps(row: tuple[int, int], site: int, steps: int, moved: tuple[int, int] | None):
    assert FINE.moved(row, site, steps) == moved


def test_what_one_site_gives_another_one_gets():
    gains = {(0, 2): -9.0, (0, -2): 1.0, (1, 2): 1.0, (1, -2): -9.0}
    assert FINE.combined((24, 2), gains, by=2, count=4) == [(16, 10)]


def test_a_site_that_gets_a_part_of_its_move_gains_a_part():
    gains = {(0, 2): 4.0, (0, -2): -9.0, (1, 2): 0.0, (1, -2): -1.5}  # two levels are freed, of the eight that the first wants
    assert FINE.combined((24, 2), gains, by=2, count=4) == []
    assert FINE.combined((24, 2), gains | {(1, -2): -0.5}, by=2, count=4) == [(26, 0)]


def test_a_switch_by_which_nothing_grows_is_none():
    coarse = Sites(prices=(np.arange(0.0, 50, 10), np.arange(13.0)), losses=(np.zeros(5), np.zeros(13)))
    gains = {(0, 2): 4.0, (0, -2): -9.0, (1, 2): 0.0, (1, -2): 1.0}  # two units are freed, and a level of the first takes ten
    assert coarse.combined((2, 2), gains, by=2, count=4) == []


def test_what_grows_at_no_price_gains_in_full():
    flat = Sites(prices=(np.arange(13.0), np.array([0.0, 1.0, 2.0, 2.0, 2.0, 3.0])), losses=(np.zeros(13), np.zeros(6)))
    gains = {(0, 2): -9.0, (0, -2): -1.0, (1, 2): 1.5, (1, -2): -9.0}
    assert flat.moved((4, 2), 1, 2) == (4, 4)
    assert flat.combined((4, 2), gains, by=2, count=4) == [(2, 5)]


def test_moves_that_gain_are_put_together_at_the_same_price():
    row = (24, 6)
    gains = {(0, 2): 1.0, (0, -2): -0.5, (1, 2): 0.8, (1, -2): -0.2}
    together = FINE.combined(row, gains, by=2, count=6)
    assert together == [(16, 12), (26, 4)], "the best first"
    assert all(FINE.price(found) <= FINE.price(row) for found in together)
    assert FINE.combined(row, gains, by=2, count=1) == [(16, 12)]
    assert FINE.combined(row, dict.fromkeys(gains, -1.0), by=2, count=6) == []
