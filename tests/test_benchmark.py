"""The benchmark against peers: it goes on where it was, and its peers cut what they say."""

import argparse
import copy
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from searches import Setup
from test_models import context, examples, load, logits
from test_strategies import KNOWN
from torch import nn

from hpc_compress import driver
from hpc_compress.models import artifact, surgery
from hpc_compress.models.gates import gated
from hpc_compress.operators import operator
from hpc_compress.problems import PROBLEMS
from hpc_compress.pruning import cutting
from hpc_compress.types import Dataset, Step

CLASSIFICATION = PROBLEMS["classification"]

pytestmark = pytest.mark.slow  # it imports what only benchmarks need
ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    for package in ("matplotlib", "torch_pruning"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("compression")


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path]) -> nn.Module:
    return load(tiny_checkpoint("bert", layers=3, heads=4, hidden=64, ffn=256))


def test_a_model_that_has_a_row_is_not_made_again(
    bench: Any, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = []
    run = bench.Bench(argparse.Namespace(work=tmp_path / "work", quality_only=tmp_path / "rows.csv"))
    data = bench.DATASETS["cola"]
    base = run.folder(data, bench.BASE)
    base.mkdir(parents=True)
    artifact.save(model, base)
    (base / "record.json").write_text(json.dumps({"quality": 0.25}))
    monkeypatch.setattr(bench.Bench, "made", lambda self, *cell: (made.append(cell), (model, 0.125))[1])
    monkeypatch.setattr(bench.Bench, "score", lambda self, model, data: 0.5)
    cells = [("random", 0.5, 0), ("last layers, a training after each", 0.5, 0), ("random", 0.5, 1), ("random", 0.5, 0)]
    said = [run.added(data, *cell) for cell in cells]
    assert len(made) == 3
    assert said[-1].endswith("there already")
    rows = pd.read_csv(tmp_path / "rows.csv", dtype={"base": str})
    assert rows[["method", "share", "seed"]].values.tolist() == [list(cell) for cell in cells[:3]]
    assert rows["base"].nunique() == 1
    with torch.no_grad():
        model.classifier.weight += 1
    artifact.save(model, base)  # another base model: other rows
    run.added(data, *cells[0])
    assert pd.read_csv(tmp_path / "rows.csv", dtype={"base": str})["base"].nunique() == 2


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("importance", ["taylor", "hessian"])
def test_torch_pruning_leaves_the_wanted_size(bench: Any, model: nn.Module, importance: str, steps: int, scope: str):
    whole = surgery.encoder_parameters(model)
    small = bench.TorchPruning(importance, scope, round_to=16, steps=steps)(model, context(model), 0.5)
    assert surgery.encoder_parameters(small) == pytest.approx(0.5 * whole, rel=0.15)
    assert all(width % 16 == 0 for width in surgery.ffn_widths(small))
    assert surgery.encoder_parameters(model) == whole
    if scope == "local":
        assert len(set(surgery.head_counts(small))) == len(set(surgery.ffn_widths(small))) == 1
    left = bench.what_is_left(small, model)
    assert [len(heads) for heads in left["heads"]] == surgery.head_counts(small)
    again = copy.deepcopy(model)
    cutting.cut(again, left)
    torch.testing.assert_close(logits(again), logits(small))


def test_layers_are_dropped_one_by_one_with_a_training_between(bench: Any, model: nn.Module, monkeypatch: pytest.MonkeyPatch):
    depths = []

    def trained(self: Any, student: nn.Module, around: Any) -> nn.Module:
        depths.append((len(surgery.layers(student)), around.seed))
        return student

    monkeypatch.setattr("hpc_compress.training.steps.Distill.__call__", trained)
    small = bench.METHODS["last layers, a training after each"](model, context(model), 0.67)
    assert len(surgery.layers(small)) == 1
    assert [depth for depth, _ in depths] == [2]  # the training after the last drop is the one that every method is given
    assert depths[0][1] != context(model).seed


def test_gradients_are_what_the_importances_ask_for(bench: Any, model: nn.Module):
    weight = surgery.ffn_outputs(model)[1].weight
    around = context(model, data=examples(12))
    single = []
    for n in range(12):
        model.zero_grad()
        (batch,) = bench.eval_batches(_only(examples(12), n), 1)
        bench.losses.task_loss(CLASSIFICATION)(model, batch).backward()
        single.append(weight.grad.clone())
    bench.TorchPruning("hessian").prepare(model, around)
    torch.testing.assert_close(weight.grad, torch.stack(single).square().mean(0), rtol=1e-3, atol=1e-9)
    bench.TorchPruning("taylor").prepare(model, around)
    torch.testing.assert_close(weight.grad, torch.stack(single).mean(0), rtol=1e-3, atol=1e-7)


@pytest.fixture
def kprune(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("kprune")


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("regression", [False, True])
def test_kprune_meets_the_budget(kprune: Any, tiny_checkpoint: Callable[..., Path], share: float, regression: bool):
    checkpoint = tiny_checkpoint("bert", layers=3, heads=4, hidden=64, ffn=256)
    model = load(checkpoint, () if regression else ("no", "yes"))
    data = examples(24, np.linspace(0, 1, 24, dtype=np.float32) if regression else None)
    whole, per_head = surgery.encoder_parameters(model), surgery.unit_parameters(model)[0]
    small = kprune.KPrune()(model, context(model, data=data), share)
    assert 0 <= (1 - share) * whole - surgery.encoder_parameters(small) < per_head
    assert torch.isfinite(logits(small)).all()
    assert all(parameter.requires_grad for parameter in small.parameters())


def test_kprune_changes_nothing_when_nothing_goes(kprune: Any, model: nn.Module):
    before = logits(model)
    small = kprune.KPrune(sentences=None)(model, context(model), 0.0)
    assert surgery.head_counts(small) == [4, 4, 4]
    assert surgery.ffn_widths(small) == [256, 256, 256]
    torch.testing.assert_close(logits(small), before, rtol=0, atol=0)


def test_kprune_measures_knowledge_of_the_model_as_it_is_now(kprune: Any, model: nn.Module):
    dense, around = copy.deepcopy(model).eval(), context(model)
    sublayers = [kprune.Sublayer(layer, unit) for layer in range(3) for unit in ("heads", "ffn")]
    batches = around.batches(24)
    sample = kprune._Sample(model, around, batches)
    surgery.prune_heads(model, 0, [1])
    surgery.prune_ffn(model, 0, list(range(100)))
    model.requires_grad_(False)
    for at in range(2, len(sublayers)):  # as `KPrune` does: what lies below is not computed again
        seen = sample.walk(model, sublayers[at:], temperature=2.0)
        predictive = [torch.zeros(256) for _ in range(3)]
        written = [torch.zeros(256) for _ in range(3)]
        for batch in batches:
            gates = [torch.ones(width, requires_grad=True) for width in surgery.ffn_widths(model)]
            inputs: list[torch.Tensor] = []
            hooks = [
                linear.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0].detach()))
                for linear in surgery.ffn_outputs(model)
            ]
            with gated(model, {"ffn": gates}):
                said = model(**batch.inputs).logits
            for hook in hooks:
                hook.remove()
            wanted = dense(**batch.inputs).logits.detach()
            loss = 4 * CLASSIFICATION.response_loss(said, wanted, 1.0, temperature=2.0)
            real = batch.inputs["attention_mask"].bool()
            for layer, gradient in list(enumerate(torch.autograd.grad(loss, gates)))[1:]:
                predictive[layer] += gradient.square() / 2 / 24
                norms = surgery.ffn_outputs(model)[layer].weight.square().mean(0)
                written[layer] += inputs[layer][real].square().sum(0) * norms / sample.tokens
        for number, sublayer in enumerate(sublayers[at:]):
            if sublayer.unit == "ffn":
                torch.testing.assert_close(seen.predictive[number], predictive[sublayer.layer], rtol=1e-3, atol=1e-12)
                torch.testing.assert_close(seen.representational[number], written[sublayer.layer], rtol=1e-4, atol=1e-12)


def test_kprune_brings_the_stream_back(kprune: Any, model: nn.Module):
    """The residual that the refit leaves is orthogonal to what it may use: no other weights come nearer."""
    around = context(model, data=examples(400))
    sample = kprune._Sample(model, around, around.batches(400))
    model.requires_grad_(False)
    here = kprune.Sublayer(0, "ffn")
    surgery.prune_heads(model, 0, [0, 2])
    stays = np.arange(256) % 3 == 0
    seen = sample.walk(model, [here], temperature=2.0)
    here.cut(model, stays)
    kprune.KPrune._tune(here.output(model), torch.from_numpy(stays), seen)
    features, missing = torch.cat(seen.features)[:, stays].double(), torch.cat(seen.missing).double()
    left = missing - features @ here.output(model).weight.double().T
    assert (features.T @ left).abs().max() < 1e-4 * (features.T @ missing).abs().max()
    assert left.square().sum() < missing.square().sum()


def test_an_untrained_cut_adds_one_row(bench: Any, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    untrained = importlib.import_module("untrained")
    run = bench.Bench(argparse.Namespace(work=tmp_path / "work", quality_only=tmp_path / "untrained.csv"))
    data = bench.DATASETS["cola"]
    base = run.folder(data, bench.BASE)
    base.mkdir(parents=True)
    artifact.save(model, base)
    dataset = Dataset(name="x", fingerprint="0" * 16, problem="classification", labels=("0", "1"), metrics=("matthews",))
    rows = bench.Rows(examples(24), examples(24), dataset, pd.DataFrame({"label": examples(24).labels}))
    monkeypatch.setattr(bench.Bench, "read", lambda self, data, seed: rows)
    for method in untrained.METHODS:
        said = [untrained.added(run, data, method, 0.5, 0) for _ in range(2)]
        assert said[-1].endswith("there already")
    rows = pd.read_csv(tmp_path / "untrained.csv", dtype={"base": str})
    assert rows["method"].tolist() == list(untrained.METHODS)
    assert (rows["encoder_parameters"] <= 0.5 * surgery.encoder_parameters(model)).all()
    assert (rows["divergence"] >= 0).all()
    carve = {"heads": json.loads(rows["heads"][0]), "ffn": json.loads(rows["ffn"][0]), "drift": True}
    carved = operator(Step(operator="carve", params=carve))(copy.deepcopy(model), context(model))
    drifted = untrained.METHODS["ours, repaired with drift"](copy.deepcopy(model), context(model), 0.5)
    torch.testing.assert_close(logits(drifted), logits(carved), rtol=1e-4, atol=1e-5)


def test_the_report_of_untrained_cuts_counts_against_the_best_peer(bench: Any):
    untrained = importlib.import_module("untrained")
    figures = {  # quality and divergence: at 50 %, at 80 %
        "ours, rescored": ((0.90, 0.01), (0.80, 0.3)),
        "K-prune": ((0.89, 0.02), (0.70, 0.2)),
        "K-prune, 100,000 tokens": ((0.80, 0.03), (0.85, 0.1)),
    }
    rows = [
        {
            "dataset": "cola",
            "method": method,
            "share": share,
            "seed": seed,
            "base_quality": 0.95,
            "quality": quality,
            "divergence": divergence,
            "encoder_parameters": 1_000_000,
            "heads": "[1]",
            "ffn": "[2]",
            "cpu_seconds": 10.0,
        }
        for method, cuts in figures.items()
        for share, (quality, divergence) in zip((0.5, 0.8), cuts, strict=True)
        for seed in (0, 1)
    ]
    text = untrained.report(pd.DataFrame(rows))
    counted = " ".join(text.split())
    assert "*ours, rescored* is ahead of the best peer in 1 of 2 cases" in counted
    assert "behind in 1 (cola 80 %: -0.050)" in counted
    assert "nearer to the uncut model than all of them in 1 of 2 cases" in counted
    assert "| 80%   | K-prune, 100,000 tokens | 1.00         | **0.850** ± 0.000 |" in text


def _only(data: Any, n: int) -> Any:
    begin, end = data.offsets[n : n + 2]
    return type(data)(data.input_ids[begin:end], None, np.array([0, end - begin]), data.labels[n : n + 1], data.pad_id)


VARIANTS = (
    *("torch_pruning", "evolve_no_screening", "evolve_no_drift", "evolve_no_rescoring", "evolve_no_switching"),
    *("evolve_no_mixing", "evolve_always_trained", "evolve_for_a_target"),
)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_a_strategy_is_one_that_a_search_takes(bench: Any, setup: Setup, name: str):
    variants = importlib.import_module("strategies").VARIANTS
    assert tuple(variants) == VARIANTS
    of_genetic = [word for word in setup.overrides if not word.startswith("strategy.")]
    wanted, plain = (setup.compose(*of_genetic, *words) for words in (variants[name], variants[name][:1]))
    assert wanted != plain
    strategy = driver.strategy_of(wanted["strategy"], KNOWN)
    for step in strategy.steps:
        assert callable(operator(step))
    if name == "torch_pruning":
        cuts = [step for proposal in strategy.ask(np.random.default_rng(0), []) for step in proposal.genome.steps[:1]]
        assert {step.operator for step in cuts} == {"peers.TorchPruned"}
