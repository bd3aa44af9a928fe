"""A cut to a structure that is given in full: equal to the cut that found it, whatever the history."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distillation import job, run_folder
from test_models import context, examples, load, logits
from torch import nn

from hpc_compress.config import ConfigError
from hpc_compress.data.batches import eval_batches
from hpc_compress.models import artifact, surgery
from hpc_compress.models.gates import counts
from hpc_compress.models.modeling_hpc_compress import FAMILIES
from hpc_compress.operators import operator
from hpc_compress.pruning import cutting
from hpc_compress.search.space import Shape
from hpc_compress.store import Store
from hpc_compress.types import Genome, Step, Task


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> nn.Module:
    return load(tiny_checkpoint(request.param, layers=3, heads=4, hidden=64, ffn=96))


def act(name: str, model: nn.Module, **params: object) -> nn.Module:
    whole = copy.deepcopy(model)
    return operator(Step(operator=name, params=params))(copy.deepcopy(model), context(whole))


@pytest.mark.parametrize("repair", [False, True])
def test_a_structure_that_prune_found_is_cut_again(model: nn.Module, repair: bool):
    found = act("prune", model, share=0.5, ffn_multiple=8, repair=repair)
    structure = {"heads": counts(found, "heads"), "ffn": counts(found, "ffn")}
    again = act("carve", model, **structure, repair=repair, drift=False)
    assert {name: tuple(tensor.shape) for name, tensor in again.state_dict().items()} == {
        name: tuple(tensor.shape) for name, tensor in found.state_dict().items()
    }
    torch.testing.assert_close(again.state_dict(), found.state_dict())


def test_what_is_left_whole_says_what_it_said(model: nn.Module):
    whole = act("carve", model, heads=counts(model, "heads"), ffn=counts(model, "ffn"))
    assert torch.equal(logits(whole), logits(model))


def test_layers_and_the_hidden_size_go_too(model: nn.Module):
    heads = counts(model, "heads")[0]
    small = act("carve", model, layers=[0, 2], heads=[heads, heads], ffn=[48, 0], hidden=48)
    assert surgery.origins(small) == [0, 2]
    assert surgery.ffn_widths(small) == [48, 0]
    assert surgery.hidden_size(small) == 48
    assert logits(small).isfinite().all()


def test_the_repair_looks_at_what_the_stream_has_lost(tiny_checkpoint: Callable[..., Path]):
    """The stream after the last layer is nearer to that of the whole model, on the sentences of the fit."""
    whole = load(tiny_checkpoint("bert", layers=4, heads=4, hidden=64, ffn=96))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # fresh weights are so small that layers hardly change the stream
        for parameter in whole.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    (batch,) = eval_batches(examples(), 32)

    @torch.no_grad()
    def stream(model: nn.Module) -> torch.Tensor:
        states = model.eval()(**batch.inputs, output_hidden_states=True).hidden_states[-1]
        return states[batch.inputs["attention_mask"].bool()]

    structure = {"heads": [1, 2, 1, 1], "ffn": [16, 24, 16, 16], "sentences": 24}
    plain, drift = (
        float((stream(act("carve", whole, **structure, drift=drift)) - stream(whole)).norm()) for drift in (False, True)
    )
    assert drift < 0.9 * plain


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"heads": [1, 1], "ffn": [8]}, "each needs one for each of the 2 layers"),
        ({"heads": [], "ffn": []}, "each needs one"),
        ({"heads": [1, 1], "ffn": [8, 8], "layers": [2, 0]}, "must rise"),
        ({"heads": [1], "ffn": [-1]}, "greater than or equal to 0"),
        ({"heads": [1], "ffn": [8], "criterion": "apoz", "hidden": 8}, "can't score ffn, heads, hidden"),
    ],
)
def test_a_structure_that_can_not_be_is_refused(params: dict[str, object], words: str):
    with pytest.raises(ConfigError, match=words):
        operator(Step(operator="carve", params=params))


def test_more_than_the_model_has_is_refused(tiny_checkpoint: Callable[..., Path]):
    model = load(tiny_checkpoint("bert"))
    with pytest.raises(ValueError, match="carve wants 5 heads in layer 1"):
        act("carve", model, heads=[4, 5], ffn=[64, 64])


def test_the_shape_follows_the_structure():
    shape = Shape(heads=(12, 12, 12))
    assert shape.after(Step(operator="carve", params={"heads": [3, 0], "ffn": [64, 0], "layers": [0, 2]})).heads == (3, 0)


def weights_of(store: Store, task: Task, **params: Any) -> dict[str, torch.Tensor]:
    """Of a model that a job of its own has carved in a run folder."""
    step = Step(operator="carve", params={"sentences": 8, **params})
    asked = task.model_copy(update={"genome": Genome(steps=(step,))})
    return artifact.load(job(store)._master(asked, (step,))).state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_units_are_scored_once_a_run(tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By whichever job comes first; what later ones read leads to the same models."""
    scored: list[str] = []
    score = cutting.Scores.of

    def counted(self: cutting.Scores, *args: Any) -> Any:
        scored.append(self.criterion)
        return score(self, *args)

    monkeypatch.setattr(cutting.Scores, "of", counted)
    checkpoint = tiny_checkpoint("bert", layers=2, heads=4, hidden=32, ffn=64)
    run, alone = run_folder(tmp_path / "run", checkpoint), run_folder(tmp_path / "alone", checkpoint)
    weights_of(*run, heads=[2, 3], ffn=[48, 40])
    second = weights_of(*run, heads=[3, 2], ffn=[24, 40])
    assert len(scored) == 1
    assert same(weights_of(*alone, heads=[3, 2], ffn=[24, 40]), second)
    assert len(scored) == 2
    [path] = (tmp_path / "run" / "scores").iterdir()
    for number, damaged in enumerate((path.read_text()[:-9], re.sub(r"\[\s*\[", "[[NaN,", path.read_text())), 3):
        path.write_text(damaged)
        weights_of(*run, heads=[2, 2], ffn=[8 * number, 40])
        assert len(scored) == number, "a damaged file is made anew"
    path.write_text('{"scores": {"heads": [[1.0]], "ffn": [[1.0]]}}')
    with pytest.raises(ValueError, match=r"gave \[1\] finite scores for heads"):
        weights_of(*run, heads=[1, 1], ffn=[8, 8])


def test_dimensions_are_scored_on_the_model_that_is_left(tiny_checkpoint: Callable[..., Path], tmp_path: Path):
    """So another structure of the same run has no part in it."""
    checkpoint = tiny_checkpoint("bert", layers=2, heads=4, hidden=32, ffn=64)
    run, alone = run_folder(tmp_path / "run", checkpoint), run_folder(tmp_path / "alone", checkpoint)
    weights_of(*run, heads=[4, 1], ffn=[64, 0], hidden=24)
    found = weights_of(*run, heads=[1, 4], ffn=[0, 64], hidden=24)
    assert same(weights_of(*alone, heads=[1, 4], ffn=[0, 64], hidden=24), found)
