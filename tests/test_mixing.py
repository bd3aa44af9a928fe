"""Precisions that differ by layer, and stages that are trusted as far as they rank."""

from typing import Any, get_args

import numpy as np
import pytest
import test_strategies as world
from test_evolve import played, proposed

from hpc_compress.deployment.steps import LayerScheme
from hpc_compress.operators import operator
from hpc_compress.search import mixing
from hpc_compress.search.fidelity import LEFT_OUT, TRUSTED, WIDENED, Stage
from hpc_compress.search.prediction import Prediction
from hpc_compress.search.space import Space
from hpc_compress.types import Candidate, Screen, Step

TRIM = Step(operator="trim_vocabulary")


def quantize(scheme: str, **params: Any) -> Step:
    return Step(operator="quantize", params={"scheme": scheme, **params})


NF4, INT8 = (TRIM, quantize("nf4", embeddings="nf4")), (TRIM, quantize("int8", embeddings="nf4"))
MIXED = mixing.mixed(NF4, "int8", [2, 0])


def test_schemes_of_layers_are_those_that_quantize_takes():
    assert set(mixing.LAYERED) == set(get_args(LayerScheme)) - {"rest"}


def test_a_mixed_chain_has_the_parts_that_it_is_made_of():
    assert MIXED[1].params["layers"] == {"int8": [0, 2]}
    assert callable(operator(MIXED[1]))
    assert mixing.parts(MIXED) == (NF4, {0: INT8, 2: INT8})
    assert mixing.parts(NF4) == (NF4, {})


def test_only_precisions_that_differ_in_nothing_but_the_scheme_are_mixed():
    deploys = {"fp32": (), "a": NF4, "b": INT8, "c": (quantize("nf4", embeddings="nf4"),), "d": (TRIM, quantize("onnx_int8"))}
    assert mixing.pairs(deploys) == [("a", "b", "int8"), ("b", "a", "nf4")]


# --- in a world with two precisions that can be mixed ---

SPACE = Space(
    ffn_multiple=32,
    trainings=world.SPACE.trainings,
    deploys={"fp32": (), "nf4": (quantize("nf4"),), "int8": (quantize("int8"),)},
)
CHAINS = list(SPACE.possible_deploys().values())
SURVEY = world.SURVEY.model_copy(
    update={
        "bytes": tuple(old.model_copy(update={"deploy": chain}) for old, chain in zip(world.SURVEY.bytes, CHAINS, strict=True))
    }
)
PROFILE = world.PROFILE.model_copy(
    update={"blocks": tuple(world.block(chain, factor) for chain, factor in zip(CHAINS, (1, 1.5, 0.6), strict=True))}
)
KNOWN = world.KNOWN.model_copy(update={"survey": SURVEY, "profile": PROFILE})


def test_a_mixture_takes_and_weighs_what_its_layers_do():
    prediction, rows = Prediction.of(SURVEY, PROFILE), (np.array([[4, 2, 1]]), np.array([[256, 64, 0]]))
    chain = mixing.mixed(CHAINS[1], "int8", [0])
    alone = tuple(np.array([[row[0, 0], 0, 0]]) for row in rows)
    for figure in (prediction.latency_ms, prediction.bytes):
        own, others = (figure(*alone, chain_) - figure(*(0 * row for row in rows), chain_) for chain_ in CHAINS[:0:-1])
        assert figure(*rows, chain) == pytest.approx(figure(*rows, CHAINS[1]) - others + own)


def layers_of(turns: list[world.Turn]) -> list[dict[str, Any]]:
    steps = [step for proposal in proposed(turns) for step in proposal.genome.deploy]
    return [step.params["layers"] for step in steps if "layers" in step.params]


@pytest.mark.slow
def test_evolve_mixes_precisions_that_it_has_measured():
    settings = {"known": KNOWN, "space": SPACE, "switching": 0}
    assert layers_of(played(8, **settings))
    assert layers_of(played(8, mixing=False, **settings)) == []
    assert any("layers" in step.params for step in world.made("evolve", **settings).deploys), "the probe tries one"


@pytest.mark.slow
def test_a_mixture_that_always_fails_is_given_up_for_all_structures():
    def mixed(candidate: Candidate) -> bool:
        return any("layers" in step.params for step in candidate.genome.deploy)

    def broken(candidate: Candidate, screen: Screen | None) -> Candidate:
        return candidate if mixed(candidate) else world.answered(candidate, screen)

    settings = {"known": KNOWN, "space": SPACE, "switching": 0}
    tried = [sum(map(mixed, turn.told)) for turn in played(16, broken, **settings)]
    assert sum(tried) >= 2
    assert not any(tried[10:])


# --- stages ---


def test_a_stage_that_does_not_rank_is_widened_before_it_is_left_out_and_may_come_back():
    stage = Stage("a", "b", "it is widened", "it is left out")
    good = [(float(n), float(n)) for n in range(40)]
    bad = [(float(n), float(-n)) for n in range(40)]
    found = [stage.judge(pairs) for pairs in (good[:7], good[:8], good[:8], bad[:9], bad[:10], bad[:11], good[:12])]
    assert found == [TRUSTED, TRUSTED, TRUSTED, WIDENED, LEFT_OUT, LEFT_OUT, TRUSTED]
    assert [note.rpartition(", so ")[2] for note in stage.notes[1:3]] == ["it is widened", "it is left out"]
    assert len(stage.notes) == 5, "nothing is said of too few pairs, or of the same ones again"


def test_figures_that_are_all_alike_say_nothing():
    stage = Stage("a", "b", "", "")
    assert stage.judge([(1.0, float(n)) for n in range(9)]) == TRUSTED
    assert stage.notes == []


def test_screens_that_do_not_rank_qualities_are_made_on_more_sentences():
    strategy = world.made("evolve", switching=0)
    before = strategy._screen.judge
    strategy._screen_stage.trust = WIDENED
    assert strategy._screen.judge == 2 * before
