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
from test_models import context, examples, load, logits
from torch import nn

from hpc_compress.models import artifact, surgery
from hpc_compress.problems import PROBLEMS

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
    left = bench._what_is_left(small, model)
    assert [len(heads) for heads in left["heads"]] == surgery.head_counts(small)
    again = copy.deepcopy(model)
    bench.cutting.cut(again, left)
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


def _only(data: Any, n: int) -> Any:
    begin, end = data.offsets[n : n + 2]
    return type(data)(data.input_ids[begin:end], None, np.array([0, end - begin]), data.labels[n : n + 1], data.pad_id)
