"""Zeros in linears: which ones, what makes up for them, that they are saved without and come back, against exact oracles."""

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from elsewhere import outputs_elsewhere
from test_models import context, examples, load, logits, reload
from torch import nn

from hpc_compress import calibration
from hpc_compress.config import ConfigError
from hpc_compress.data.batches import eval_batches
from hpc_compress.deployment import sparsity, thresholding
from hpc_compress.models import artifact, modeling_hpc_compress, surgery, zeros
from hpc_compress.models.modeling_hpc_compress import linear_of
from hpc_compress.operators import Checkpoint, operator
from hpc_compress.types import Step

STEPS = [
    Step(operator="sparsify", params={"pattern": pattern, "criterion": criterion, "precision": precision, **more})
    for criterion in ("magnitude", "obs")
    for pattern, precision, more in [
        ("unstructured", "fp32", {"share": 0.7}),
        ("2:4", "fp16", {"permute": True}),
        ("2:4", "bf16", {}),
    ]
]


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sparsity, "ROUNDS", 10)


@pytest.fixture(params=["bert", "modernbert", "distilbert", "roberta", "electra", "mpnet"])
def model(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> nn.Module:
    return _perturbed(load(tiny_checkpoint(request.param, layers=2, heads=4, hidden=64, ffn=96)))


def _perturbed(model: nn.Module) -> nn.Module:
    """Biases that are not 0, so that one that is lost shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        surgery.path(model, index, path): linear_of(layer, path)
        for index, layer in enumerate(surgery.layers(model))
        for path in surgery.family(model).linears
    }


def _problem(rows: int = 5, columns: int = 12, tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (rows, columns) and correlated inputs (columns, tokens), in double precision."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = mix @ torch.randn(columns, tokens, generator=generator, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), inputs


def _error(weight: torch.Tensor, other: torch.Tensor, product: torch.Tensor) -> float:
    """|| (W - W') X ||^2 with X X^T = product."""
    return float(((weight - other) @ product @ (weight - other).T).trace())


# --- which weights go, and what makes up for them ---


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_the_surgeon_equals_the_formula_with_every_inverse_in_full(pattern: str, monkeypatch: pytest.MonkeyPatch):
    """Column by column: cost `w^2 / [H_F^-1]_jj`, update `-(w / [H_F^-1]_jj) [H_F^-1]_j`, F the columns from j on."""
    monkeypatch.setattr(sparsity, "BLOCK", 8)  # so that 12 columns are two blocks
    weight, inputs = _problem()
    product = inputs @ inputs.T
    hessian = torch.linalg.inv(calibration.damped_inverse(product))
    expected, gone = weight.clone(), torch.zeros(weight.shape, dtype=torch.bool)

    def costs(columns: range) -> torch.Tensor:
        inverse = [torch.linalg.inv(hessian[j:, j:])[0, 0] for j in columns]
        return expected[:, columns].square() / torch.stack(inverse)

    for j in range(12):
        if pattern == "unstructured" and j % 8 == 0:
            block = range(j, min(j + 8, 12))
            count = round(0.6 * 5 * block.stop) - int(gone.sum())
            ranked = sorted(itertools.product(range(5), block), key=lambda at: costs(block)[at[0], at[1] - j])
            for at in ranked[:count]:
                gone[at] = True
        if pattern == "2:4" and j % 4 == 0:
            for row, cost in enumerate(costs(range(j, j + 4))):
                gone[row, j + cost.argsort()[:2]] = True
        inverse = torch.linalg.inv(hessian[j:, j:])
        for row in range(5):
            if gone[row, j]:
                expected[row, j:] -= expected[row, j] / inverse[0, 0] * inverse[0]
                expected[row, j] = 0
    found = sparsity.surgeon(weight, product, pattern, 0.6)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(found == 0, gone)
    assert int(gone.sum()) == (36 if pattern == "unstructured" else 30)


def _least_squares(row: torch.Tensor, kept: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """The row nearest in its outputs, with weights at `kept` only."""
    best = torch.zeros_like(row)
    best[kept] = torch.linalg.solve(hessian[kept][:, kept], (hessian @ row)[kept])
    return best


def test_a_cheap_first_weight_goes_and_the_others_are_the_least_squares_fit():
    weight, inputs = _problem(rows=1)
    weight[0, 0] = 1e-3
    product = inputs @ inputs.T
    found = sparsity.surgeon(weight, product, "unstructured", 1 / 12)
    hessian = torch.linalg.inv(calibration.damped_inverse(product))
    torch.testing.assert_close(found[0], _least_squares(weight[0], torch.arange(1, 12), hessian))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_refitting_nears_the_least_squares_fit(pattern: str):
    weight, inputs = _problem(rows=16, columns=24, tokens=400)
    product = inputs @ inputs.T
    hessian = torch.linalg.inv(calibration.damped_inverse(product))
    found = sparsity.surgeon(weight, product, pattern, 0.5)
    least = torch.stack([_least_squares(row, kept, hessian) for row, kept in zip(weight, found != 0, strict=True)])
    assert torch.equal(least != 0, found != 0)
    torch.testing.assert_close(sparsity.refitted(weight, found, product, 100), least, rtol=1e-6, atol=1e-6)
    errors = [_error(weight, sparsity.refitted(weight, found, product, steps), hessian) for steps in range(12)]
    assert errors[0] == pytest.approx(_error(weight, found, hessian))
    assert errors == sorted(errors, reverse=True)
    assert errors[10] < 0.9 * errors[0]
    only_zeroed = _error(weight, weight * (found != 0), hessian)
    assert _error(weight, least, hessian) <= errors[10] < errors[0] < only_zeroed


def test_magnitude_takes_the_smallest():
    weight, _ = _problem()
    found = sparsity.magnitude(weight, "unstructured", 0.25)
    assert sorted(weight.abs().flatten())[15] == weight.abs()[found != 0].min()
    assert int((found == 0).sum()) == 15
    for before, after in zip(weight.view(-1, 4), sparsity.magnitude(weight, "2:4", 0.5).view(-1, 4), strict=True):
        assert set(after.nonzero().flatten().tolist()) == set(before.abs().argsort()[2:].tolist())


# --- the order of inputs ---


def _kept_by_two_of_four(magnitudes: torch.Tensor) -> float:
    return float(magnitudes.unflatten(1, (-1, 4)).sort(-1).values[..., 2:].sum())


def test_the_best_order_of_eight_columns_is_found():
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        magnitudes = torch.rand(3, 8, generator=generator)
        order = sparsity.best_order(magnitudes, np.random.default_rng(0))
        assert sorted(order.tolist()) == list(range(8))
        best = max(
            _kept_by_two_of_four(magnitudes[:, list(other)]) for other in itertools.permutations(range(8)) if other[0] == 0
        )
        assert _kept_by_two_of_four(magnitudes[:, order]) == pytest.approx(best)


def test_an_order_nears_a_planted_best_one():
    """Columns of two kinds, shuffled: kept in full when every four hold two of each."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat_interleave(8, dim=0)  # rows of one kind read columns of one kind
    magnitudes = kinds.repeat_interleave(32, dim=1)[:, torch.randperm(64, generator=generator)]
    order = sparsity.best_order(magnitudes, np.random.default_rng(0))
    assert _kept_by_two_of_four(magnitudes) < 0.9 * float(magnitudes.sum())
    assert _kept_by_two_of_four(magnitudes[:, order]) > 0.95 * float(magnitudes.sum())


def test_reordered_models_are_equal_and_keep_more(model: nn.Module):
    before, names = logits(model), surgery.family(model)
    outputs = [path for path in _linears(model) if path.endswith((names.attention_out, names.ffn_out))]
    kept = {path: _kept_by_two_of_four(_linears(model)[path].weight.detach().abs()) for path in outputs}
    with torch.no_grad():
        sparsity._reorder(model, np.random.default_rng(0))
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=3e-6)
    for path in outputs:
        assert _kept_by_two_of_four(_linears(model)[path].weight.detach().abs()) > kept[path] * 1.005


# --- the operator ---


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_the_pattern_is_kept_and_saved_without_zeros(model: nn.Module, step: Step, tmp_path: Path):
    (tmp_path / "dense").mkdir()
    precision = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[step.params["precision"]]
    dense = copy.deepcopy(model).to(precision)
    artifact.save(dense, tmp_path / "dense")
    sparse = operator(step)(copy.deepcopy(model), context(model))
    for linear in _linears(sparse).values():
        assert linear.weight.dtype == precision
        zeros = (linear.weight == 0).detach()
        if step.params["pattern"] == "2:4":
            assert int(zeros.unflatten(1, (-1, 4)).sum(-1).min()) >= 2
        else:
            assert int(zeros.sum()) == round(0.7 * zeros.numel())
    before = logits(sparse)
    loaded = reload(sparse, tmp_path / "once")
    assert torch.equal(logits(loaded), before)
    again = reload(loaded, tmp_path / "twice")
    assert torch.equal(logits(again), before)
    sizes = [(tmp_path / name / artifact.WEIGHTS).stat().st_size for name in ("dense", "once", "twice")]
    assert sizes[1] == sizes[2]
    elements = sum(linear.weight.numel() for linear in _linears(sparse).values())
    share = step.params.get("share", 0.5)
    saved = elements * (share * precision.itemsize - 1 / 8)
    assert sizes[0] - sizes[1] == pytest.approx(saved, rel=0.15)  # the names of more tensors take some bytes
    schemes = json.loads((tmp_path / "once" / "config.json").read_text())["quantized"]
    assert schemes == dict.fromkeys(_linears(sparse), "2:4" if step.params["pattern"] == "2:4" else "sparse")


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_same_seed_same_zeros(model: nn.Module, step: Step):
    results = []
    for noise in (1, 2):
        torch.manual_seed(noise)  # the caller's generator must play no part
        results.append(logits(operator(step)(copy.deepcopy(model), context(model, seed=3))))
    assert torch.equal(*results)


def test_the_surgeon_keeps_outputs_nearer_than_magnitude(model: nn.Module):
    exact = logits(model)
    away = {}
    for criterion in ("magnitude", "obs"):
        step = Step(operator="sparsify", params={"criterion": criterion, "share": 0.6})
        away[criterion] = float((logits(operator(step)(copy.deepcopy(model), context(model))) - exact).norm())
    assert 0 < away["obs"] < 0.75 * away["magnitude"]


def test_a_cut_model_can_be_made_sparse(model: nn.Module, tmp_path: Path):
    # Layers that share a position bias lose all heads or the same ones everywhere.
    surgery.prune_heads(model, 0, range(4) if surgery.family(model).shared_bias else [0, 2, 3])
    surgery.prune_ffn(model, 1, range(90))  # 6 neurons are left, no multiple of 4
    sparse = operator(Step(operator="sparsify", params={"pattern": "2:4", "permute": True}))(model, context(model))
    assert not (linear_of(surgery.layers(sparse)[1], surgery.family(sparse).ffn_out).weight == 0).any()
    before = logits(sparse)
    assert torch.equal(logits(reload(sparse, tmp_path / "m")), before)


TRAINING = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2}


@pytest.mark.parametrize(
    ("pattern", "name", "params"),
    [
        ("2:4", "fine_tune", {}),
        ("unstructured", "distill", {"layers": 1}),
        ("unstructured", "movement_prune", {"share": 0.3, "units": ["ffn"], "ffn_multiple": 8}),
    ],
)
def test_zeros_outlive_training(model: nn.Module, pattern: str, name: str, params: dict[str, Any], tmp_path: Path):
    share = {} if pattern == "2:4" else {"share": 0.02}  # as few as would be saved dense
    sparse = operator(Step(operator="sparsify", params={"pattern": pattern, **share}))(copy.deepcopy(model), context(model))
    sparse = reload(sparse, tmp_path / "sparse")
    before = copy.deepcopy(sparse)
    trained = operator(Step(operator=name, params={**TRAINING, **params}))(sparse, context(model))
    loaded = reload(trained, tmp_path / "trained")
    assert torch.equal(logits(loaded), logits(trained))
    for path, linear in _linears(loaded).items():
        zeros = _linears(before)[path].weight == 0
        if name == "movement_prune":  # of the neurons that are left
            assert (linear.weight == 0).any()
            continue
        assert zeros.any()
        assert torch.equal(linear.weight == 0, zeros)
        assert not torch.equal(linear.weight, _linears(before)[path].weight)
    # Nothing is left behind that would keep zeros of a later model.
    assert not any(linear.weight._backward_hooks for linear in _linears(trained).values())


def test_zeros_outlive_a_training_that_was_interrupted(model: nn.Module, tmp_path: Path):
    sparse = operator(Step(operator="sparsify", params={"share": 0.6}))(model, context(model))
    checkpoint = Checkpoint(tmp_path / "state.pt", 0)

    def die(done: int, total: int) -> None:
        if done == 4:
            raise InterruptedError

    step = operator(Step(operator="fine_tune", params=TRAINING))
    whole = step(copy.deepcopy(sparse), context(model))
    with pytest.raises(InterruptedError):
        step(copy.deepcopy(sparse), dataclasses.replace(context(model), checkpoint=checkpoint, progress=die))
    resumed = step(copy.deepcopy(sparse), dataclasses.replace(context(model), checkpoint=checkpoint))
    for path, linear in _linears(resumed).items():
        assert torch.equal(linear.weight, _linears(whole)[path].weight)
        assert torch.equal(linear.weight == 0, _linears(sparse)[path].weight == 0)


def test_a_linear_that_starts_at_nothing_learns(model: nn.Module):
    linear = surgery.ffn_outputs(model)[0]
    with torch.no_grad():
        linear.weight.zero_()
    operator(Step(operator="fine_tune", params=TRAINING))(model, context(model))
    assert bool((linear.weight != 0).any())


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_training_refuses_weights_of_few_bits(model: nn.Module, precision: str):
    half = operator(Step(operator="sparsify", params={"precision": precision}))(model, context(model))
    with pytest.raises(ValueError, match=r"strategy\.quantizations, not in strategy\.mutations"):
        operator(Step(operator="fine_tune", params=TRAINING))(half, context(model))


@pytest.mark.slow
def test_calibration_computes_each_layer_once_before_and_once_after(model: nn.Module):
    """However many layers there are: each batch passes the first layer to be looked at, and once more to go on."""
    for step in (
        Step(operator="sparsify", params={"sentences": 24}),
        Step(operator="quantize", params={"scheme": "dynamic_int8", "method": "gptq", "sentences": 24}),
    ):
        seen: list[int] = []
        deeper = copy.deepcopy(model)
        surgery.layers(deeper).extend(copy.deepcopy(surgery.layers(model)[1]) for _ in range(3))
        first = linear_of(surgery.layers(deeper)[0], surgery.family(model).ffn_out)
        handle = first.register_forward_hook(lambda *args, seen=seen: seen.append(1))
        operator(step)(deeper, context(model))
        handle.remove()
        assert len(seen) == 2  # one batch of 24


# --- what is saved ---


@pytest.mark.parametrize(
    ("zero", "dtype", "scheme"),
    [(0, torch.float32, None), (2, torch.float32, None), (3, torch.float32, "sparse"), (5, torch.float16, "sparse")],
)
def test_only_what_is_smaller_is_saved_without_zeros(zero: int, dtype: torch.dtype, scheme: str | None):
    """64 weights: 8 bytes of bits pay for 2 zeros of 4 bytes, or 4 of 2 bytes."""
    linear = nn.Linear(8, 8, bias=False, dtype=dtype)
    with torch.no_grad():
        linear.weight.fill_(1).flatten()[:zero] = 0
    assert zeros.scheme(linear) == scheme


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_packed_weights_come_back_bit_for_bit(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(5, 3)  # 15 weights: the last byte of bits is not full
    weight = (torch.randn(3, 5, generator=generator) * (torch.rand(3, 5, generator=generator) < 0.4)).to(dtype)
    stored = zeros.without_zeros({"a.weight": weight, "a.bias": torch.arange(3).to(dtype), "b": weight}, ["a"])
    assert stored["b"] is weight
    own = {name.removeprefix("a."): tensor for name, tensor in stored.items() if name.startswith("a.")}
    assert {name: tensor.numel() for name, tensor in own.items()} == {
        "bias": 3,
        "weight_bits": 2,
        "weight_values": int((weight != 0).sum()),
    }
    restored = modeling_hpc_compress._restore_sparse(linear, own)
    assert torch.equal(restored.weight, weight)
    assert torch.equal(restored.bias, torch.arange(3).to(dtype))


@pytest.mark.slow
def test_exported_sparse_models_load_without_the_package(tiny_checkpoint: Callable[..., Path], tmp_path: Path):
    model = _perturbed(load(tiny_checkpoint("bert")))
    ids = [[2, 9, 8, 7, 3], [2, 5, 6, 11, 3]]
    expected = {}
    for pattern in ("unstructured", "2:4"):
        sparse = operator(Step(operator="sparsify", params={"pattern": pattern}))(copy.deepcopy(model), context(model))
        folder = tmp_path / pattern.replace(":", "_")
        reload(sparse, folder)
        (folder / "modeling_hpc_compress.py").write_bytes(Path(modeling_hpc_compress.__file__).read_bytes())
        with torch.no_grad():
            expected[folder.name] = sparse(input_ids=torch.tensor(ids)).logits.double().tolist()
    gated = _perturbed(load(tiny_checkpoint("modernbert")))
    gated = operator(Step(operator="threshold"))(gated, context(gated))
    reload(gated, tmp_path / "threshold")
    (tmp_path / "threshold" / "modeling_hpc_compress.py").write_bytes(Path(modeling_hpc_compress.__file__).read_bytes())
    with torch.no_grad():
        expected["threshold"] = gated(input_ids=torch.tensor(ids)).logits.double().tolist()
    found = outputs_elsewhere(tmp_path, list(expected), {"input_ids": ids})
    for name, outputs in expected.items():
        assert found[name] == found[f"{name}-saved-again"] == outputs


# --- activations ---


@pytest.fixture
def gated_model(tiny_checkpoint: Callable[..., Path]) -> nn.Module:
    return _perturbed(load(tiny_checkpoint("modernbert", layers=3)))


def _activated_gates(model: nn.Module, layer: int) -> torch.Tensor:
    """Of all real tokens of the examples, batch by batch: (tokens, neurons), computed from what enters the linear."""
    mlp, gates = surgery.layers(model)[layer].mlp, []
    mask = torch.empty(0)

    def look(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        first, _ = nn.functional.linear(args[0], module.weight).chunk(2, dim=-1)
        gates.append(nn.functional.gelu(first)[mask])

    handle = mlp.Wi.register_forward_pre_hook(look)
    with torch.no_grad():
        for batch in eval_batches(examples(), 32):
            mask = batch.inputs["attention_mask"].bool()
            model(**batch.inputs)
    handle.remove()
    return torch.cat(gates)


def test_a_threshold_is_the_quantile_and_acts_as_the_formula(gated_model: nn.Module, tmp_path: Path):
    exact = logits(gated_model)
    step = Step(operator="threshold", params={"share": 0.7})
    found = operator(step)(copy.deepcopy(gated_model), context(gated_model))
    values = modeling_hpc_compress.thresholds(found, surgery.family(found))
    measured = thresholding.sparsity(found, eval_batches(examples(), 8))
    for layer, value in enumerate(values):
        gates = _activated_gates(found, layer).abs()
        assert value == pytest.approx(float(gates.quantile(0.7)), rel=0.02)
        assert measured[layer] == pytest.approx(0.7, abs=1e-3)
        assert float((gates < value).float().mean()) == pytest.approx(0.7, abs=1e-3)

    def by_hand(module: nn.Module, args: Any, value: float) -> torch.Tensor:
        first, second = module.Wi(args[0]).chunk(2, dim=-1)
        first = nn.functional.gelu(first)
        return module.Wo(torch.where(first.abs() >= value, first, 0) * second)

    for layer, value in zip(surgery.layers(gated_model), values, strict=True):
        layer.mlp.register_forward_hook(lambda module, args, output, value=value: by_hand(module, args, value))
    assert torch.equal(logits(found), logits(gated_model))
    assert not torch.equal(logits(found), exact)
    loaded = reload(found, tmp_path / "once")
    assert torch.equal(logits(loaded), logits(found))
    assert torch.equal(logits(reload(loaded, tmp_path / "twice")), logits(found))
    assert json.loads((tmp_path / "twice" / "config.json").read_text())["thresholds"] == values


def test_a_threshold_may_stand_before_cuts_training_and_precision(gated_model: nn.Module, tmp_path: Path):
    model = operator(Step(operator="threshold"))(gated_model, context(gated_model))
    again = operator(Step(operator="threshold", params={"share": 0.9}))(model, context(model))
    values = modeling_hpc_compress.thresholds(again, surgery.family(again))
    model = operator(Step(operator="fine_tune", params={"batch_size": 8}))(again, context(again))
    surgery.drop_layers(model, [0])
    surgery.prune_ffn(model, 1, range(64))
    model = operator(Step(operator="quantize", params={"scheme": "int8"}))(model, context(model))
    loaded = reload(model, tmp_path / "m")
    assert modeling_hpc_compress.thresholds(loaded, surgery.family(loaded)) == values[1:]
    assert torch.equal(logits(loaded), logits(model))
    assert thresholding.sparsity(loaded, eval_batches(examples(), 8))[0] == pytest.approx(0.9, abs=0.05)
    emptied = operator(Step(operator="threshold"))(artifact.load(tmp_path / "m"), context(loaded))
    assert modeling_hpc_compress.thresholds(emptied, surgery.family(emptied))[1] == 0


def test_an_ffn_without_gates_is_refused(tiny_checkpoint: Callable[..., Path]):
    model = load(tiny_checkpoint("bert"))
    with pytest.raises(ValueError, match=r"no gated FFNs.*modernbert"):
        operator(Step(operator="threshold"))(model, context(model))


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"pattern": "2:4", "share": 0.7}, "which is a half"),
        ({"permute": True}, "pattern=2:4"),
        ({"share": 1.0}, "less than 1"),
        ({"pattern": "4:8"}, "'unstructured' or '2:4'"),
    ],
)
def test_parameters_that_contradict_each_other_are_refused(params: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        operator(Step(operator="sparsify", params=params))
