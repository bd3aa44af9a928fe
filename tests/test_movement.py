"""Movement pruning: its gradients, its schedule and its cuts, against finite differences, formulas and masked models."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_models import context, examples, load, logits, reload
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_compress.config import ConfigError
from hpc_compress.data.batches import eval_batches
from hpc_compress.models import surgery
from hpc_compress.models.gates import counts, gated
from hpc_compress.operators import Checkpoint, operator
from hpc_compress.pruning import movement
from hpc_compress.pruning.steps import MovementPrune
from hpc_compress.types import Step

QUICK: dict[str, Any] = {"epochs": 4, "batch_size": 8, "learning_rate": 1e-3, "ffn_multiple": 1}  # 12 updates
MODES: list[dict[str, Any]] = [{"share": 0.5}, {"regularisation": 2.0}]


@pytest.fixture(params=["bert", "modernbert", "distilbert", "deberta-v2"])
def model(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> nn.Module:
    return load(tiny_checkpoint(request.param, layers=2, heads=4, hidden=32, ffn=48))


def masks_at(model: nn.Module, step: MovementPrune, done: int, updates: int = 100) -> movement.Masks:
    """With random scores, after so many updates."""
    masks = movement.Masks(model, step, step.goal(), updates)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for scores in masks.scores.values():
            scores.copy_(3 * torch.randn(scores.shape, generator=generator) / masks.scale)
    masks.done.fill_(done)
    return masks


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_scores_gradient_is_that_of_its_gate(model: nn.Module, mode: dict[str, Any]):
    """By finite differences, of units that are on and of units that are off."""
    model.double().eval()
    masks = masks_at(model, MovementPrune(**QUICK, **mode), 50).double()
    (batch,) = eval_batches(examples(6), 6)
    kept = masks.kept()
    gates, penalty = masks()
    assert all(torch.equal(gate, mask) for unit in kept for gate, mask in zip(gates[unit], kept[unit], strict=True))
    with gated(model, gates):
        nn.functional.cross_entropy(model(**batch.inputs).logits, batch.labels).backward()
    gradient = {unit: masks.scores[unit].grad.split(masks.sizes[unit]) for unit in kept}
    seen = set()
    for unit, layer, index in [("heads", 0, n) for n in range(4)] + [("ffn", 1, n) for n in range(0, 48, 5)]:
        values = []
        for sign in (1, -1):
            moved = {name: [mask.clone() for mask in masks] for name, masks in kept.items()}
            moved[unit][layer][index] += sign * 1e-5
            with torch.no_grad(), gated(model, moved):
                values.append(float(nn.functional.cross_entropy(model(**batch.inputs).logits, batch.labels)))
        seen.add((unit, float(kept[unit][layer][index])))
        assert float(gradient[unit][layer][index]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=2e-3, abs=1e-9)
    assert len(seen) == 4
    if "regularisation" in mode:  # `progress * regularisation * mean(sigmoid(S))` of heads and of neurons
        means = [(masks.scale * masks.scores[unit]).sigmoid().mean() for unit in kept]
        progress = 1 - (1 - (50 - 6) / (70 - 6)) ** 3
        assert float(penalty.detach()) == pytest.approx(2.0 * progress * float(sum(means).detach()))
    else:
        assert float(penalty) == 0


def test_the_schedule_is_cubic_between_warm_up_and_cool_down(model: nn.Module):
    step = MovementPrune(share=0.5, warmup=0.2, cooldown=0.4, ffn_multiple=1)
    for done in range(0, 101, 5):
        masks = masks_at(model, step, done)
        t = min(max((done - 20) / 40, 0), 1)
        expected = 0.5 * (1 - (1 - t) ** 3)
        for unit, total in (("heads", 8), ("ffn", 96)):
            stays = sum(float(mask.sum()) for mask in masks.kept()[unit])
            assert stays == pytest.approx(total * (1 - expected), abs=0.501)
            assert (stays == total) == (done <= 20 or round(total * expected) == 0)


def test_what_stays_has_the_highest_scores(model: nn.Module):
    masks = masks_at(model, MovementPrune(share=0.5, ffn_multiple=1), 100)
    for unit, kept in masks.kept().items():
        scores, mask = masks.scores[unit].detach(), torch.cat(kept)
        assert scores[mask == 1].min() > scores[mask == 0].max()
    masks = masks_at(model, MovementPrune(regularisation=1.0, ffn_multiple=1), 100)
    for unit, kept in masks.kept().items():
        assert torch.equal(torch.cat(kept) == 1, (masks.scores[unit] * masks.scale).sigmoid() > movement.THRESHOLD)


def test_widths_are_multiples_and_the_best_of_their_layer(model: nn.Module):
    masks = masks_at(model, MovementPrune(share=0.6, ffn_multiple=8), 100)
    kept = masks.kept()["ffn"]
    assert [int(mask.sum()) % 8 for mask in kept] == [0, 0]
    assert int(sum(mask.sum() for mask in kept)) == 40  # 38.4 is asked for
    for mask, scores in zip(kept, masks.scores["ffn"].detach().split(48), strict=True):
        assert scores[mask == 1].min() > scores[mask == 0].max()


@pytest.mark.parametrize(
    ("wanted", "sizes", "multiple", "expected"),
    [
        ([10, 20, 30], [48, 48, 48], 16, [16, 16, 32]),
        ([10, 20, 48], [48, 48, 48], 16, [16, 16, 48]),
        ([3, 40, 50], [48, 50, 50], 16, [0, 48, 50]),  # whole, though no multiple
        ([7, 0, 5], [8, 0, 8], 1, [7, 0, 5]),
        ([5, 4], [48, 48], 16, [16, 0]),
    ],
)
def test_widths_are_rounded_with_about_the_same_sum(wanted: list, sizes: list, multiple: int, expected: list):
    widths = movement.rounded(torch.tensor(wanted, dtype=torch.float32), torch.tensor(sizes), multiple)
    assert widths.tolist() == expected


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("units", [("heads", "ffn"), ("heads",)], ids=str)
def test_the_cut_model_equals_the_masked_one(model: nn.Module, mode: dict[str, Any], units: tuple[str, ...], tmp_path: Path):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step = MovementPrune(**QUICK, **mode, units=units)
    kept = movement.learn(model, context(model), step, step.goal())
    assert list(kept) == list(units)
    assert any(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    with gated(model, kept):
        masked = logits(model)
    assert not torch.equal(masked, logits(model))
    movement.cut(model, kept)
    assert {unit: counts(model, unit) for unit in units} == {
        unit: [int(mask.sum()) for mask in masks] for unit, masks in kept.items()
    }
    torch.testing.assert_close(logits(model), masked, rtol=1e-5, atol=3e-6)
    if "share" in mode:
        assert sum(surgery.head_counts(model)) == 4
        assert sum(surgery.ffn_widths(model)) == (48 if "ffn" in units else 96)
    assert torch.equal(logits(reload(model, tmp_path / "m")), logits(model))


@pytest.mark.slow
def test_more_regularisation_cuts_more(model: nn.Module):
    left = []
    for regularisation in (1e-6, 0.1, 100.0):
        step = MovementPrune(**{**QUICK, "epochs": 8}, regularisation=regularisation)
        kept = movement.learn(copy.deepcopy(model), context(model), step, step.goal())
        left.append(sum(int(mask.sum()) for masks in kept.values() for mask in masks))
    assert left[0] > left[1] >= left[2] == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_same_seed_same_result_also_when_it_was_interrupted(model: nn.Module, mode: dict[str, Any], tmp_path: Path):
    step = Step(operator="movement_prune", params={**QUICK, **mode})
    results = []
    for noise in (1, 2):
        torch.manual_seed(noise)  # the caller's generator must play no part
        results.append(operator(step)(copy.deepcopy(model), context(model, seed=5)))
    assert torch.equal(*map(logits, results))
    checkpoint = Checkpoint(tmp_path / "state.pt", 0)

    def die(done: int, total: int) -> None:
        assert total == 12
        if done == 8:
            raise InterruptedError

    given = {**vars(context(model, seed=5)), "checkpoint": checkpoint}
    with pytest.raises(InterruptedError):
        operator(step)(copy.deepcopy(model), type(context(model))(**{**given, "progress": die}))
    told: list[int] = []
    again = type(context(model))(**{**given, "progress": lambda done, total: told.append(done)})
    resumed = operator(step)(copy.deepcopy(model), again)
    assert told[0] > 7
    assert torch.equal(logits(resumed), logits(results[0]))


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({}, "give one of them"),
        ({"share": 0.5, "regularisation": 1.0}, "give one of them"),
        ({"share": 0.5, "warmup": 0.5, "cooldown": 0.5}, "no updates between"),
        ({"share": 1.0}, "less than 1"),
        ({"share": 0.5, "units": []}, "at least 1"),
    ],
)
def test_parameters_that_can_not_be_are_refused(params: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        operator(Step(operator="movement_prune", params=params))


def test_heads_that_share_a_position_bias_are_refused_before_the_training(tiny_checkpoint: Callable[..., Path]):
    model = load(tiny_checkpoint("mpnet"))
    before = logits(model)
    with pytest.raises(ValueError, match=r"units=\[ffn\]"):
        operator(Step(operator="movement_prune", params={**QUICK, "share": 0.5}))(model, context(model))
    assert torch.equal(logits(model), before)
    operator(Step(operator="movement_prune", params={**QUICK, "share": 0.5, "units": ["ffn"]}))(model, context(model))
    assert (sum(surgery.head_counts(model)), sum(surgery.ffn_widths(model))) == (8, 64)


def test_no_update_waits_for_the_device(model: nn.Module):
    """Nothing goes from the host to the device, nor back, while gates are computed."""
    seen = set()

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    for mode in MODES:
        masks = masks_at(model, MovementPrune(**QUICK, **mode), 50)
        with Ops():
            masks()
    assert "argsort" in seen or "sort" in seen
    assert not seen & {"lift_fresh", "lift_fresh_copy", "_local_scalar_dense", "item", "nonzero"}
