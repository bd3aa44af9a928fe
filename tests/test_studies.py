"""What is asked about genomes besides a full measurement, and the one pass in which a cut model is repaired and judged."""

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_models import context, examples, load, logits
from torch import nn

from hpc_compress import studies
from hpc_compress.data.batches import eval_batches
from hpc_compress.models import artifact, surgery
from hpc_compress.models.gates import counts
from hpc_compress.models.modeling_hpc_compress import FAMILIES
from hpc_compress.operators import operator
from hpc_compress.pruning import cutting
from hpc_compress.pruning.repair import Repairer, shared_copy
from hpc_compress.types import Screen, Step, Survey

CPU = torch.device("cpu")


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> nn.Module:
    found = load(tiny_checkpoint(request.param, layers=3, heads=4, hidden=64, ffn=96))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # fresh weights are so small that layers hardly change the stream
        for parameter in found.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return found


def kept_of(heads: list[int], ffn: list[int]) -> cutting.UnitArrays:
    return {"heads": [np.arange(n) for n in heads], "ffn": [np.arange(n) for n in ffn]}


def cut_and_repaired(dense: Repairer, model: nn.Module, kept: cutting.UnitArrays) -> nn.Module:
    small = copy.deepcopy(model)
    cutting.cut(small, kept)
    dense.repair(small, kept)
    return small


# --- one pass ---


@pytest.mark.parametrize("drift", [False, True])
def test_a_pass_that_begins_where_structures_differ_says_the_same(model: nn.Module, drift: bool):
    batches = list(eval_batches(examples(), 4))
    alike = surgery.family(model).shared_bias  # all layers lose the same heads
    kepts = [
        kept_of([2, 2, 2] if alike else [2, 3, 4], [32, 96, 48]),
        kept_of([2, 2, 2] if alike else [2, 3, 1], [32, 96, 16]),  # the first two layers are those before
        kept_of([2, 2, 2] if alike else [2, 3, 1], [32, 40, 16]),  # one of them
        kept_of([4, 4, 4], [96, 96, 16]),  # none
    ]
    again = Repairer(model, batches, drift=drift)
    for kept in kepts:
        fresh = cut_and_repaired(Repairer(model, batches, drift=drift), model, kept)
        torch.testing.assert_close(cut_and_repaired(again, model, kept).state_dict(), fresh.state_dict(), rtol=1e-4, atol=1e-5)


def test_what_a_pass_answers_is_what_the_repaired_model_answers(model: nn.Module):
    batches = list(eval_batches(examples(), 4))
    dense = Repairer(model, batches[:-1], judged=batches[-1:])
    torch.testing.assert_close(dense.answers[0].logits, model(**batches[-1].inputs).logits, rtol=1e-5, atol=1e-5)
    small, kept = copy.deepcopy(model), kept_of([2, 2, 2], [32, 0, 96])
    cutting.cut(small, kept)
    (answer,) = dense.repair(small, kept)
    torch.testing.assert_close(answer.logits, small(**batches[-1].inputs).logits, rtol=1e-4, atol=1e-5)


def test_sentences_that_are_judged_change_no_repair(model: nn.Module):
    batches, kept = list(eval_batches(examples(), 4)), kept_of([2, 2, 2], [32, 16, 48])
    one = cut_and_repaired(Repairer(model, batches[:2], judged=batches[2:]), model, kept)
    other = cut_and_repaired(Repairer(model, batches[:2]), model, kept)
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-5)


def test_a_repair_that_stops_leaves_the_rest_as_it_was(model: nn.Module):
    batches, kept = list(eval_batches(examples(), 8)), kept_of([2, 2, 2], [32, 32, 32])
    small = shared_copy(model)
    cutting.cut(small, kept)
    before = [linear.weight.detach().clone() for linear in surgery.ffn_outputs(small)]
    dense = Repairer(model, batches)
    dense.repair(small, kept, most=4)
    same = [torch.equal(linear.weight, weight) for linear, weight in zip(surgery.ffn_outputs(small), before, strict=True)]
    assert same == [False, False, True]
    rest = copy.deepcopy(model)
    cutting.cut(rest, kept)
    dense.repair(rest, kept)
    assert torch.equal(surgery.ffn_outputs(rest)[0].weight, surgery.ffn_outputs(small)[0].weight)


# --- studies ---


def sharing(model: nn.Module) -> Any:
    """A context that keeps what operators share, as a worker does."""
    kept: dict[str, tuple[Any, Any]] = {}

    def keep(name: str, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if kept.get(name, (None, None))[0] != key:
            kept[name] = key, make()
        return kept[name][1]

    def scores(key: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        return keep("scores", key, compute)

    return dataclasses.replace(context(model), kept=keep, scores=scores, given="base")


def excused(error: Exception) -> bool:
    return True


CARVE = Step(operator="carve", params={"heads": [2, 2, 2], "ffn": [48, 32, 48], "sentences": 12})


def test_a_screen_judges_the_model_that_a_carve_would_make(model: nn.Module):
    shared = sharing(model)
    found = studies.screen(Screen(judge=8), (CARVE,), model, shared, CPU, pytest.fail, excused)
    carved = operator(CARVE)(copy.deepcopy(model), context(model))
    longer = studies.screen(Screen(judge=8), (CARVE, CARVE), model, shared, CPU, lambda: carved, excused)
    assert found.divergence == pytest.approx(longer.divergence, rel=1e-3, abs=1e-6)
    assert found.divergence > 0
    assert found.structure == longer.structure
    assert list(found.structure.ffn) == [48, 32, 48]


def test_what_is_left_whole_diverges_by_nothing(model: nn.Module):
    whole = Step(operator="carve", params={"heads": counts(model, "heads"), "ffn": counts(model, "ffn"), "sentences": 12})
    found = studies.screen(Screen(judge=8), (whole,), model, sharing(model), CPU, pytest.fail, excused)
    assert found.divergence == pytest.approx(0, abs=1e-6)


def test_another_sample_judges_on_other_sentences(model: nn.Module):
    shared = sharing(model)
    found = {
        studies.screen(Screen(judge=4, sample=n), (CARVE,), model, shared, CPU, pytest.fail, excused).divergence
        for n in range(3)
    }
    assert len(found) == 3


def quantize(**params: Any) -> tuple[Step, ...]:
    return (Step(operator="quantize", params=params),)


def test_precisions_are_judged_on_top_of_a_structure(model: nn.Module):
    """As the deployed model answers, and without a trace in the base model."""
    before = copy.deepcopy(model.state_dict())
    chains = [(), *(quantize(scheme=scheme, embeddings=scheme) for scheme in ("nf4", "int8")), quantize(scheme="bf16")]
    shared = sharing(model)
    found = studies.screen(Screen(judge=8, deploys=tuple(chains)), (CARVE,), model, shared, CPU, pytest.fail, excused)
    assert [each.deploy for each in found.deployed] == chains
    whole, nf4, int8, bf16 = (each.divergence for each in found.deployed)
    assert whole == pytest.approx(found.divergence, rel=1e-3, abs=1e-6)
    assert abs(int8 - whole) < abs(nf4 - whole)
    deployed = operator(chains[3][0])(operator(CARVE)(copy.deepcopy(model), context(model)), context(model))
    alone = studies.screen(Screen(judge=8), (CARVE, CARVE), model, shared, CPU, lambda: deployed, excused)
    assert bf16 == pytest.approx(alone.divergence, rel=0.05)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_program_is_judged_too(tiny_checkpoint: Callable[..., Path]):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = load(tiny_checkpoint("bert", layers=3, heads=4, hidden=64, ffn=96))
    study = Screen(judge=8, deploys=((), quantize(scheme="onnx_int8")))
    whole, program = studies.screen(study, (CARVE,), model, sharing(model), CPU, pytest.fail, excused).deployed
    assert program.divergence is not None
    assert program.divergence == pytest.approx(whole.divergence, abs=0.05)


def breaks(model: nn.Module, context: Any, how: str) -> nn.Module:
    if how == "raises":
        raise RuntimeError("no such kernel")
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    return model


@pytest.mark.parametrize("how", ["raises", "is not finite"])
def test_a_precision_that_fails_leaves_the_rest_as_it_is(model: nn.Module, how: str):
    study = Screen(judge=8, deploys=((Step(operator="test_studies.breaks", params={"how": how}),), ()))
    found = studies.screen(study, (CARVE,), model, sharing(model), CPU, pytest.fail, excused)
    assert found.divergence > 0
    assert [each.divergence is None for each in found.deployed] == [True, False]
    with pytest.raises((RuntimeError, FloatingPointError)):
        studies.screen(study, (CARVE,), model, sharing(model), CPU, pytest.fail, lambda error: False)


def test_a_model_whose_outputs_are_not_finite_is_not_lossless(model: nn.Module):
    broken = breaks(copy.deepcopy(model), None, "is not finite")
    with pytest.raises(FloatingPointError, match="not finite"):
        studies.screen(Screen(judge=8), (CARVE, CARVE), model, sharing(model), CPU, lambda: broken, excused)


def test_what_changes_the_tokens_is_no_precision():
    with pytest.raises(ValueError, match="trim_vocabulary"):
        Screen(deploys=((Step(operator="trim_vocabulary"),),))


@pytest.mark.parametrize("deploy", [(), ("bf16",), ("nf4",)], ids=str)
def test_bytes_of_a_survey_are_those_of_the_files(
    tiny_checkpoint: Callable[..., Path], deploy: tuple[str, ...], tmp_path: Path
):
    model = load(tiny_checkpoint("bert", layers=3, heads=4, hidden=64, ffn=256))
    chain = tuple(Step(operator="quantize", params={"scheme": scheme}) for scheme in deploy)
    found = studies.survey(Survey(sentences=8, deploys=(chain,)), model, context(model), [])
    small = copy.deepcopy(model)
    cutting.cut(small, kept_of([1, 4, 2], [64, 256, 128]))
    for step in chain:
        small = operator(step)(small, context(model))
    artifact.save(small, tmp_path)
    sizes = found.bytes[0]
    expected = sizes.fixed + 7 * sizes.per_head + 448 * sizes.per_neuron
    assert expected == pytest.approx(artifact.weights(tmp_path).stat().st_size, rel=0.01)


def test_a_survey_knows_scores_and_the_sample(model: nn.Module):
    batches = list(eval_batches(examples(), 4))
    found = studies.survey(Survey(sentences=8), model, context(model), batches)
    assert [len(layer) for layer in found.ffn] == [96] * 3
    assert found.encoder_parameters == surgery.encoder_parameters(model)
    assert sum(rows for rows, _ in found.sample) == len(examples())
    assert found.train_rows == len(examples())


# --- scores that are computed anew ---


def test_a_rescored_cut_meets_its_budget(model: nn.Module):
    step = Step(operator="prune", params={"share": 0.5, "rescore": True, "ffn_multiple": 8, "sentences": 16})
    before = surgery.encoder_parameters(model)
    small = operator(step)(copy.deepcopy(model), context(model))
    assert 0.35 * before < surgery.encoder_parameters(small) <= 0.5 * before
    assert logits(small).isfinite().all()
    again = operator(step)(copy.deepcopy(model), sharing(model))
    torch.testing.assert_close(again.state_dict(), small.state_dict())
