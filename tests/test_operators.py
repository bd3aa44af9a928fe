"""What every operator promises, on every family of encoders: whole ones, of odd widths, with blocks that lost everything."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from test_models import context, examples, load, logits, reload
from torch import nn
from transformers import AutoTokenizer

from hpc_compress.data.batches import Encoded, eval_batches
from hpc_compress.models import artifact, surgery
from hpc_compress.models.modeling_hpc_compress import FAMILIES
from hpc_compress.operators import OPERATORS, Context, foreign, operator
from hpc_compress.problems import PROBLEMS
from hpc_compress.pruning.steps import Prune
from hpc_compress.training import losses
from hpc_compress.types import Step

CLASSIFICATION = PROBLEMS["classification"]

TRAINING = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3}
LEARNING = {
    "drop_layers": {"count": 1, "criterion": "fisher", "repair": True},
    "prune_heads": {"count": 2, "where": "any"},
    "prune": {"share": 0.5, "ffn_multiple": 8, "repair": True},
    "carve": {"heads": [2, 2, 2], "ffn": [24, 0, 56], "sentences": 24},
    "prune_hidden": {"share": 0.25, "multiple": 16},
    "movement_prune": {"share": 0.4, "ffn_multiple": 8, **TRAINING},
    "fine_tune": TRAINING,
    "distill": {"layers": 1, **TRAINING},
    "threshold": {},
}
DEPLOYING = {
    "fp16": ("quantize", {"scheme": "fp16"}),
    "bf16": ("quantize", {"scheme": "bf16"}),
    "int8": ("quantize", {"scheme": "int8", "embeddings": "int8"}),
    "nf4": ("quantize", {"scheme": "nf4", "method": "gptq", "embeddings": "nf4", "rest": "bf16"}),
    "fp4": ("quantize", {"scheme": "fp4", "embeddings": "int4"}),
    "mixed": ("quantize", {"scheme": "int8", "layers": {"nf4": [0], "rest": [2]}}),
    "dynamic_int8": ("quantize", {"scheme": "dynamic_int8"}),
    "trim_vocabulary": ("trim_vocabulary", {}),
    "share_embeddings": ("share_embeddings", {}),
    "sparsify": ("sparsify", {"share": 0.6}),
    "2:4": ("sparsify", {"pattern": "2:4", "permute": True}),
}
STEPS = {
    **{name: Step(operator=name, params=params) for name, params in LEARNING.items()},
    **{name: Step(operator=what, params=params) for name, (what, params) in DEPLOYING.items()},
}
QUICK = ("carve", "prune", "distill", "nf4")


def test_no_operator_is_left_out():
    assert {step.operator for step in STEPS.values()} == set(OPERATORS)


def test_no_parameter_says_what_code_to_run():
    for params in ({"_target_": "os.system"}, {"training": {"_partial_": True}}, {"units": [{"_args_": []}]}):
        with pytest.raises(ValueError, match="says what code to run"):
            Step(operator="prune", params=params)
    assert type(operator(Step.model_construct(operator="prune", params={"share": 0.5, "_target_": "os.system"}))) is Prune


def test_what_a_step_takes_from_elsewhere_is_named():
    fields = [item for kind in OPERATORS.values() for item in kind.model_fields.items()]
    texts = {name for name, field in fields if field.annotation is str or str in get_args(field.annotation)}
    assert texts == {"criterion", "corpus"}, "let `foreign` know of a new parameter that names a file or code"
    assert foreign(Step(operator="my.own")) == ["my.own"]
    assert foreign(Step(operator="prune", params={"share": 0.5, "criterion": "my.scores"})) == ["my.scores"]
    assert foreign(Step(operator="trim_vocabulary", params={"corpus": "words.txt"})) == ["words.txt"]
    assert foreign(Step(operator="trim_vocabulary", params={"corpus": ("train", "a.txt", "b.txt")})) == ["a.txt", "b.txt"]
    assert [path for step in STEPS.values() for path in foreign(step)] == []


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(request.param, layers=3, heads=4, hidden=64, ffn=96)


def act(name: str, model: nn.Module, folder: Path, out: Path, seed: int = 5) -> nn.Module:
    """What the step makes of the model; what it ships beside the weights goes to `out`."""
    step, family = STEPS[name], surgery.family(model)
    if family.shared_bias and name == "prune_heads":
        pytest.skip("heads go alike in all layers of this family: prune does it")
    if family.shared_bias and name == "movement_prune":
        step = step.model_copy(update={"params": {**step.params, "units": ["ffn"]}})
    if name == "threshold" and family.gate is None:
        pytest.skip("only gated FFNs have gates")
    return operator(step)(model, _context(folder, out, seed))


def _context(folder: Path, out: Path, seed: int) -> Context:
    out.mkdir(exist_ok=True)
    whole = context(load(folder), seed)
    return dataclasses.replace(whole, folder=out, tokenizer=lambda: AutoTokenizer.from_pretrained(folder))


def inputs(model: nn.Module) -> Encoded:
    """A batch of one short and one longest sequence, of ids that every vocabulary here has."""
    longest = model.config.max_position_embeddings - 4
    ids = np.full(longest + 1, 1, dtype=np.int32) + np.arange(longest + 1, dtype=np.int32) % 3
    return Encoded(ids, None, np.array([0, 1, longest + 1]), np.array([0, 1]), pad_id=0)


def weights(model: nn.Module) -> dict[str, Any]:
    return dict(model.state_dict())


def equal(one: nn.Module, other: nn.Module) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STEPS])
def test_the_promises_of_an_operator(folder: Path, name: str, tmp_path: Path):
    acted = act(name, load(folder), folder, tmp_path / "beside")
    assert not acted.training

    # Saved equals loaded, also after a forward, and saved again.
    before = logits(acted, inputs(acted))
    loaded = reload(acted, tmp_path / "once")
    torch.testing.assert_close(logits(loaded, inputs(acted)), before, rtol=1e-5, atol=2e-6)
    again = reload(loaded, tmp_path / "twice")
    assert equal(again, loaded)
    assert [(tmp_path / name / artifact.WEIGHTS).read_bytes() for name in ("once", "twice")].count(
        (tmp_path / "once" / artifact.WEIGHTS).read_bytes()
    ) == 2

    # A batch of one and the longest sequence.
    assert before.isfinite().all()
    assert before.shape == (2, 2)

    # The same seed gives the same result, whatever the caller's generator.
    torch.manual_seed(9)
    assert equal(act(name, load(folder), folder, tmp_path / "other"), acted)

    # What goes on to be trained has gradients everywhere.
    if name in LEARNING:
        (batch,) = eval_batches(examples(8), 8)
        losses.task_loss(CLASSIFICATION)(loaded.train(), batch).backward()
        for path, parameter in loaded.named_parameters():
            if parameter.numel() and "relative_attention_bias" not in path:
                assert parameter.requires_grad, path
                assert parameter.grad is None or parameter.grad.isfinite().all(), path
        assert sum(parameter.grad is None for parameter in loaded.parameters() if parameter.numel()) <= 1


def odd(model: nn.Module, heads: list[int], neurons: int) -> nn.Module:
    """Some heads and neurons of the first layer are gone; an attention and an FFN are no more."""
    if surgery.family(model).shared_bias:
        surgery.prune_heads_everywhere(model, heads[:2])
    else:
        surgery.prune_heads(model, 0, heads)
    surgery.prune_ffn(model, 0, range(neurons))
    surgery.prune_heads(model, 1, range(surgery.head_counts(model)[1]))
    surgery.prune_ffn(model, 2, range(96))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_odd_widths_and_empty_blocks_are_taken(folder: Path, name: str, tmp_path: Path):
    if name == "carve":
        pytest.skip("a structure is cut from the whole model")
    model = odd(load(folder), [0, 1, 3], 55)
    if name == "movement_prune":
        model = load(folder)
        surgery.prune_ffn(model, 0, range(55))
    acted = act(name, copy.deepcopy(model), folder, tmp_path / "beside")
    before = logits(acted, inputs(acted))
    assert before.isfinite().all()
    torch.testing.assert_close(logits(reload(acted, tmp_path / "saved"), inputs(acted)), before, rtol=1e-5, atol=2e-6)
