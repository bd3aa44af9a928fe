"""A device's profile and what it predicts, against oracles: a made-up clock for which time is a sum over blocks."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from searches import Setup, Silent
from test_models import context, examples, load
from torch import nn

from hpc_compress import cli, config, devices, driver, measure, profiling
from hpc_compress.config import ConfigError
from hpc_compress.launch.local import Debug
from hpc_compress.models import surgery
from hpc_compress.search.prediction import Prediction, timed
from hpc_compress.search.space import Shape
from hpc_compress.types import BlockProfile, ByteCounts, DeviceProfile, MeasurementProtocol, Profiling, Step, Surveyed

TRIM, NF4 = Step(operator="trim_vocabulary"), Step(operator="quantize", params={"scheme": "nf4"})
LAYERS, HEADS, WIDTH = 3, 4, 64


def attention_ms(rows: int, length: int, heads: int) -> float:
    return rows * length * (0.02 * heads + (0.05 if heads else 0.0))


def ffn_ms(rows: int, length: int, width: int) -> float:
    return rows * length * (0.001 * width + (0.01 if width else 0.0))


def block(deploy: tuple[Step, ...] = (), factor: float = 1.0) -> BlockProfile:
    """Points of the oracle above; `factor` times slower."""
    rows, lengths, heads, widths = (1, 8), (4, 16), (0, 1, 2, 4), (0, 16, 64)
    return BlockProfile(
        deploy=deploy,
        rows=rows,
        lengths=lengths,
        heads=heads,
        widths=widths,
        fixed_ms=[[factor * r * n for n in lengths] for r in rows],
        layer_ms=[[factor * 0.1 * r * n for n in lengths] for r in rows],
        attention_ms=[[[factor * attention_ms(r, n, count) for count in heads] for n in lengths] for r in rows],
        ffn_ms=[[[factor * ffn_ms(r, n, width) for width in widths] for n in lengths] for r in rows],
    )


def profile_of(*blocks: BlockProfile) -> DeviceProfile:
    return DeviceProfile(device="a pan", device_type="cpu", model_type="bert", hidden=32, head_size=8, blocks=blocks)


def survey(sample: tuple[tuple[int, int], ...] = ((8, 16), (8, 10), (3, 5)), **changes: Any) -> Surveyed:
    rng = np.random.default_rng(0)
    return Surveyed(
        **{
            "heads": rng.random((LAYERS, HEADS)).tolist(),
            "ffn": rng.random((LAYERS, WIDTH)).tolist(),
            "parameters": (8, 2),
            "encoder_parameters": 1000,
            "train_rows": 100,
            "bytes": (ByteCounts(deploy=(TRIM, NF4), fixed=500.0, per_head=10.0, per_neuron=2.0),),
            "sample": sample,
            **changes,
        }
    )


def structures(count: int = 20) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.integers(0, HEADS + 1, (count, LAYERS)), rng.integers(0, WIDTH + 1, (count, LAYERS))


def summed(heads: np.ndarray, ffn: np.ndarray, sample: tuple[tuple[int, int], ...]) -> float:
    """The oracle's milliseconds of one structure: in rows and in length it is linear, so interpolation is exact."""
    return sum(
        r * n * (1 + 0.1 * len(heads)) + sum(attention_ms(r, n, h) for h in heads) + sum(ffn_ms(r, n, w) for w in ffn)
        for r, n in sample
    )


# --- predictions ---


def test_a_prediction_is_the_sum_over_blocks_and_batches():
    known, (heads, ffn) = survey(), structures()
    found = Prediction.of(known, profile_of(block())).latency_ms(heads, ffn)
    expected = [summed(h, w, known.sample) for h, w in zip(heads, ffn, strict=True)]
    assert found == pytest.approx(expected)


def test_many_structures_are_predicted_as_each_alone():
    prediction, (heads, ffn) = Prediction.of(survey(), profile_of(block())), structures()
    alone = [prediction.latency_ms(heads[at : at + 1], ffn[at : at + 1])[0] for at in range(len(heads))]
    assert prediction.latency_ms(heads, ffn) == pytest.approx(alone)


def test_a_latency_is_a_ratio_to_the_whole_model_in_fp32():
    prediction = Prediction.of(survey(), profile_of(block(), block((NF4,), factor=1.5)))
    whole = np.full((1, LAYERS), HEADS), np.full((1, LAYERS), WIDTH)
    assert prediction.latency(*whole) == pytest.approx([1.0])
    assert prediction.latency(*whole, (TRIM, NF4)) == pytest.approx([1.5])  # a smaller vocabulary has no effect


def test_a_structure_with_fewer_layers_pays_for_fewer():
    prediction, known = Prediction.of(survey(), profile_of(block())), survey()
    heads, ffn = np.array([[2, 0]]), np.array([[0, 16]])
    assert prediction.latency_ms(heads, ffn) == pytest.approx([summed(heads[0], ffn[0], known.sample)])


def test_more_units_are_never_predicted_to_be_faster():
    noisy = block().model_dump()
    noisy["attention_ms"] = [[[0.0, 3.0, 3.0, 3.5]] * 2] * 2
    noisy["ffn_ms"] = [[[0.0, 5.0, 5.0]] * 2] * 2
    prediction = Prediction.of(survey(), profile_of(BlockProfile.model_validate(noisy)))
    times = next(iter(prediction.times.values()))
    for table, size in ((times.heads, HEADS), (times.ffn, WIDTH)):
        assert len(table) == size + 1
        assert table[0] == 0
        assert (np.diff(table) >= 0).all()


def test_a_block_that_is_gone_takes_nothing_and_its_first_unit_much():
    """The line through the first two points goes on below the first one; it does not lead to 0."""
    times = next(iter(Prediction.of(survey(((1, 4),)), profile_of(block())).times.values()))
    assert times.ffn[0] == 0
    assert times.ffn[1] == pytest.approx(ffn_ms(1, 4, 1))
    assert times.ffn[8] == pytest.approx(ffn_ms(1, 4, 8))


def test_what_was_not_profiled_is_refused():
    with pytest.raises(ValueError, match="no times of fp32"):
        Prediction.of(survey(), profile_of(block((NF4,))))
    with pytest.raises(ValueError, match="33 tokens a row, and the profile knows at most 16"):
        Prediction.of(survey(((8, 33),)), profile_of(block()))
    prediction = Prediction.of(survey(), profile_of(block()))
    with pytest.raises(ValueError, match="nf4 was not timed on this device"):
        prediction.latency(*structures(), (NF4,))
    with pytest.raises(ValueError, match="knows no bytes of nf4"):
        prediction.bytes(*structures(), (NF4,))  # the survey asked for nf4 with a smaller vocabulary


def test_bytes_are_linear():
    prediction, (heads, ffn) = Prediction.of(survey(), profile_of(block())), structures()
    assert prediction.bytes(heads, ffn, (TRIM, NF4)) == pytest.approx(500 + 10 * heads.sum(1) + 2 * ffn.sum(1))


def test_mass_is_what_the_lowest_scores_sum_to():
    known, (heads, ffn) = survey(), structures()
    total = sum(map(sum, (*known.heads, *known.ffn)))
    expected = [
        sum(
            sum(sorted(scores)[: len(scores) - stays])
            for scores, stays in [*zip(known.heads, h, strict=True), *zip(known.ffn, w, strict=True)]
        )
        / total
        for h, w in zip(heads, ffn, strict=True)
    ]
    prediction = Prediction.of(known, profile_of(block()))
    assert prediction.mass(heads, ffn) == pytest.approx(expected)
    assert prediction.mass(np.full((1, LAYERS), HEADS), np.full((1, LAYERS), WIDTH)) == pytest.approx([0.0])
    assert prediction.mass(np.zeros((1, LAYERS), int), np.zeros((1, LAYERS), int)) == pytest.approx([1.0])


def test_scores_of_nothing_weigh_nothing():
    known = survey(heads=((0.0,) * HEADS,) * LAYERS, ffn=((0.0,) * WIDTH,) * LAYERS)
    assert Prediction.of(known, profile_of(block())).mass(*structures()) == pytest.approx(0)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": (8, 1)},
        {"heads": (1, 2, 3, 4)},
        {"widths": (0, 16)},
        {"fixed_ms": ((1.0,),)},
        {"layer_ms": ((1.0, float("nan")), (1.0, 1.0))},
        {"layer_ms": ((1.0, -1.0), (1.0, 1.0))},
    ],
    ids=str,
)
def test_a_table_that_does_not_fit_its_axes_is_refused(change: dict[str, Any]):
    with pytest.raises(ValueError, match=r"must rise|needs a number|greater than|less than"):
        BlockProfile.model_validate({**block().model_dump(), **change})


# --- profiles ---


@pytest.fixture(params=["bert", "distilbert", "mpnet"])
def model(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> nn.Module:
    return load(tiny_checkpoint(request.param, layers=LAYERS, heads=HEADS, hidden=32, ffn=WIDTH))


def by_the_clock(model: Any, batch: Any, on: torch.device, times: int = 1) -> float:
    """In place of `measure.batch_ms`: runs the model, and says what the oracle says. A precision of 16 bits takes half."""
    with torch.inference_mode():
        model(**batch.inputs)
    rows, length = batch.inputs["input_ids"].shape
    blocks = zip(surgery.head_counts(model), surgery.ffn_widths(model), strict=True)
    ms = rows * length * (1 + 0.1 * len(surgery.layers(model)))
    ms += sum(attention_ms(rows, length, heads) + ffn_ms(rows, length, width) for heads, width in blocks)
    return ms / 2 if next(model.parameters()).dtype == torch.bfloat16 else ms


def taken(model: nn.Module, monkeypatch: pytest.MonkeyPatch, **study: Any) -> DeviceProfile:
    monkeypatch.setattr(measure, "batch_ms", by_the_clock)
    return profiling.profile(Profiling(**{"seconds": 0.1, **study}), model, MeasurementProtocol(batch_size=8), context(model))


def test_a_profile_finds_what_each_block_takes(model: nn.Module, monkeypatch: pytest.MonkeyPatch):
    bf16 = (Step(operator="quantize", params={"scheme": "bf16"}),)
    found = taken(model, monkeypatch, deploys=((TRIM, *bf16), bf16))
    assert [block.deploy for block in found.blocks] == [(), bf16]  # fp32 without being asked for, and none twice
    assert (found.model_type, found.hidden, found.head_size) == (model.config.model_type, 32, 8)
    for block, factor in zip(found.blocks, (1.0, 0.5), strict=True):
        assert block.heads[-1] == HEADS
        assert block.widths[-1] == WIDTH
        assert block.lengths[-1] == examples().lengths.max()
        for i, rows in enumerate(block.rows):
            for j, length in enumerate(block.lengths):
                assert block.fixed_ms[i][j] == pytest.approx(factor * rows * length)
                assert block.layer_ms[i][j] == pytest.approx(factor * 0.1 * rows * length)
                attention = [factor * attention_ms(rows, length, heads) for heads in block.heads]
                assert block.attention_ms[i][j] == pytest.approx(attention)
                assert block.ffn_ms[i][j] == pytest.approx([factor * ffn_ms(rows, length, width) for width in block.widths])


@pytest.mark.slow
def test_a_profile_leaves_the_model_as_it_was(model: nn.Module, monkeypatch: pytest.MonkeyPatch):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = model.config.vocab_size
    taken(model, monkeypatch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.vocab_size == tokens == model.get_input_embeddings().num_embeddings


@pytest.mark.slow
def test_steps_that_calibrate_can_be_profiled(model: nn.Module, monkeypatch: pytest.MonkeyPatch):
    sparse = (Step(operator="sparsify", params={"share": 0.5}),)
    assert taken(model, monkeypatch, deploys=(sparse,)).blocks[1].deploy == sparse


def test_noise_in_a_profile_is_smoothed_until_it_rises():
    assert profiling._rising(np.array([0.0, 2.0, 1.0, 4.0])).tolist() == [0.0, 1.5, 1.5, 4.0]
    rising = np.array([0.0, 1.0, 2.0])
    assert profiling._rising(rising).tolist() == rising.tolist()


@pytest.mark.slow
def test_a_real_clock_gives_a_profile_too(tiny_checkpoint: Callable[..., Path]):
    model = load(tiny_checkpoint("bert", layers=1, heads=HEADS, hidden=32, ffn=WIDTH))
    study = Profiling(seconds=0.1, deploys=((Step(operator="quantize", params={"scheme": "dynamic_int8"}),),))
    found = profiling.profile(study, model, MeasurementProtocol(batch_size=1), context(model))
    assert [len(block.rows) for block in found.blocks] == [1, 1]
    one_layer = survey(((1, 8),), heads=((1.0,) * HEADS,), ffn=((1.0,) * WIDTH,))
    assert Prediction.of(one_layer, found).base_ms > 0


# --- files ---

MODEL = {"model_type": "bert"}
SHAPE = Shape(heads=(HEADS,) * LAYERS, widths=(32, WIDTH))


def test_a_device_file_is_read(tmp_path: Path):
    path = tmp_path / "device.json"
    path.write_text(profile_of(block()).model_dump_json())
    assert devices.read([str(path)], MODEL, SHAPE) == (profile_of(block()),)
    assert devices.read([], MODEL, SHAPE) == ()


@pytest.mark.parametrize(
    ("text", "model", "said"),
    [
        (None, MODEL, "is not there; write it anew with hpc-compress profile"),
        ("{", MODEL, "cut short"),
        ("[]", MODEL, "no deviceprofile"),
        ("whole", {"model_type": "roberta"}, "of models with model_type=bert, and the base model has model_type=roberta"),
        ("other hidden", MODEL, "hidden=64, and the base model has hidden=32"),
        ("negative", MODEL, "greater than or equal to 0"),
    ],
)
def test_a_device_file_that_does_not_fit_is_refused(tmp_path: Path, text: str | None, model: dict[str, str], said: str):
    path, whole = tmp_path / "device.json", profile_of(block()).model_dump(mode="json")
    if text == "other hidden":
        text = json.dumps({**whole, "hidden": 64})
    elif text == "negative":
        whole["blocks"][0]["fixed_ms"][0][0] = -1.0
        text = json.dumps(whole)
    elif text == "whole":
        text = json.dumps(whole)
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        devices.read([str(path)], model, SHAPE)


def test_a_device_file_needs_the_precisions_of_the_strategy():
    given, study = (profile_of(block()),), Profiling(deploys=((TRIM,), (TRIM, NF4)))
    with pytest.raises(ConfigError, match=r"device=d.json has no times for nf4"):
        devices.require_precisions(given, ["d.json"], study)
    devices.require_precisions(given, ["d.json"], Profiling(deploys=((TRIM,),)))
    devices.require_precisions((profile_of(block(), block((NF4,))),), ["d.json"], study)


def test_a_device_file_needs_batches_as_large_as_those_of_the_search():
    with pytest.raises(ConfigError, match=r"device=d.json: a batch of the sample has 17 rows, and the profile knows at most 8"):
        devices.require_reach((profile_of(block()),), ["d.json"], survey(((17, 16),)))
    devices.require_reach((profile_of(block()),), ["d.json"], survey())


def test_steps_without_effect_on_time_are_left_out():
    assert timed((TRIM, NF4)) == (NF4,)
    assert timed((TRIM,)) == ()


# --- whole runs ---


def settings(setup: Setup, *more: str) -> driver.SearchSettings:
    values = setup.compose(*setup.overrides, *more)
    parts = {name: values.pop(name) for name in ("strategy", "objective", "launcher", "cluster", "retries")}
    return driver.SearchSettings(
        config.validate(config.RunConfig, values), parts["strategy"], parts["objective"], Debug(), parts["retries"]
    )


@pytest.mark.slow
def test_the_command_writes_a_file_and_leaves_nothing_else(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profiling, "MOST_SWEEPS", 2)
    monkeypatch.setattr(sys, "argv", ["hpc-compress", "profile", *setup.overrides, "--out=devices/mine.json"])
    cli.main()
    assert "device=devices/mine.json" in capsys.readouterr().out
    found = DeviceProfile.model_validate_json((tmp_path / "devices/mine.json").read_text())
    assert (found.model_type, found.hidden) == ("bert", 128)
    assert [path.name for path in (tmp_path / "results").iterdir()] == []


@pytest.mark.slow
def test_a_run_keeps_what_its_device_file_said(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(profiling, "MOST_SWEEPS", 2)
    found = driver.profile(settings(setup), tmp_path / "scratch", Silent())
    assert () in [block.deploy for block in found.blocks]
    path = tmp_path / "device.json"
    path.write_text(found.model_dump_json())
    chosen = settings(setup, f"device={path}", "generations=0")
    result = driver.search(chosen, tmp_path / "run", Silent())
    path.unlink()
    assert driver.search(chosen, tmp_path / "run", Silent()) == result
    plan = json.loads((tmp_path / "run/run.json").read_text())
    assert [device["device"] for device in plan["devices"]] == [found.device]
    with pytest.raises(ConfigError, match="device"):
        driver.search(settings(setup, "generations=0"), tmp_path / "run", Silent())
