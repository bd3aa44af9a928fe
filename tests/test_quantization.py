"""Quantization: mixed schemes, embeddings, int8 for CPUs and GPTQ, against decoding by bitsandbytes and naive references."""

import copy
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import VOCABULARY
from elsewhere import outputs_elsewhere
from test_models import _run_folder, examples, load, logits, reload
from tokenizers import Tokenizer
from torch import nn

from hpc_compress import identity, measure, worker
from hpc_compress.calibration import damped_inverse
from hpc_compress.config import ConfigError
from hpc_compress.data.batches import eval_batches
from hpc_compress.deployment import gptq, quantization, schemes
from hpc_compress.deployment.quantization import quantize
from hpc_compress.deployment.schemes import EMBEDDINGS, LOW_BIT, PLAIN, SCHEMES, LowBit, Scheme
from hpc_compress.models import artifact, modeling_hpc_compress, surgery
from hpc_compress.models.modeling_hpc_compress import linear_of
from hpc_compress.operators import Context, operator
from hpc_compress.problems import PROBLEMS
from hpc_compress.types import Genome, Step

CLASSIFICATION = PROBLEMS["classification"]

FEW = list(LOW_BIT)
KINDS = {"int8": "Int8Linear", "nf4": "Linear4bit", "fp4": "Linear4bit", "dynamic_int8": "DynamicInt8Linear"}
CPU = torch.device("cpu")


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path]) -> nn.Module:
    return load(tiny_checkpoint("bert", layers=3, heads=4, hidden=64, ffn=96))


def quantized(model: nn.Module, **params: Any) -> nn.Module:
    around = Context(train=examples(), problem=CLASSIFICATION, device=CPU, seed=0, teacher=lambda: model)
    return operator(Step(operator="quantize", params=params))(model, around)


def decoded(layer: nn.Module) -> torch.Tensor:
    """The weights that a quantized linear stands for, by the library that runs it."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    if hasattr(layer, "_packed"):
        return layer.weight * layer.scale[:, None]
    if hasattr(layer.weight, "quant_state"):
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return int8_vectorwise_dequant(layer.weight.data, layer.SCB)


def packed(scheme: str) -> LowBit:
    weights = SCHEMES[scheme].weights
    assert isinstance(weights, LowBit)
    return weights


# --- the table ---


def test_the_table_has_these_schemes():
    assert PLAIN == ("fp32", "fp16", "bf16")
    assert LOW_BIT == ("int8", "nf4", "fp4", "dynamic_int8")
    assert set(EMBEDDINGS) == set(modeling_hpc_compress.EMBEDDING_SCHEMES) == {"int8", "int4", "nf4", "fp4"}
    assert set(SCHEMES) - {*PLAIN, *LOW_BIT} == {"onnx_int8", "int4"}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Scheme)])
def test_a_row_that_lacks_a_field_is_an_error(name: str):
    with pytest.raises(TypeError, match=name):
        Scheme(**{key: value for key, value in vars(SCHEMES["int8"]).items() if key != name})


@pytest.mark.parametrize("name", ["rounded", "grid", "set_codes"])
def test_a_packed_format_that_lacks_a_method_is_an_error(name: str):
    methods = {key: value for key, value in vars(schemes.Int8).items() if key in LowBit.__abstractmethods__ - {name}}
    with pytest.raises(TypeError, match=name):
        type("Forgetful", (LowBit,), methods)()


def test_rows_agree_with_themselves():
    for row in SCHEMES.values():
        assert bool(row.packages) == (row.extra is not None)
        assert row.devices
        assert set(row.rests) <= set(PLAIN)


def test_what_is_rounded_can_be_told_and_read_back():
    """The rows, and what `modeling_hpc_compress` reads, name the same schemes."""
    assert set(modeling_hpc_compress.RESTORE) == {*LOW_BIT, *modeling_hpc_compress.SPARSE}
    for scheme in LOW_BIT:
        layer = packed(scheme).rounded(nn.Linear(64, 32))
        assert modeling_hpc_compress.scheme_of(layer) == scheme
        tensors = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        again = modeling_hpc_compress.RESTORE[scheme](nn.Linear(64, 32), dict(tensors))
        assert modeling_hpc_compress.scheme_of(again) == scheme
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.state_dict().items())
    for scheme in EMBEDDINGS:
        assert modeling_hpc_compress.scheme_of(SCHEMES[scheme].embedding(torch.randn(5, 8))) == scheme
    assert modeling_hpc_compress.scheme_of(nn.Linear(4, 4)) is None


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"scheme": "int3"}, "'int3' is not a scheme; choose one of fp32, "),
        ({"scheme": "fp32", "layers": {"int3": [0]}}, "'int3' is not a scheme"),
        ({"scheme": "fp32", "layers": {"onnx_int8": [0]}}, "onnx_int8 is no scheme of single linears; choose one of int8, "),
        ({"scheme": "int4"}, "int4 is no scheme of single linears; choose one of int8, "),
        ({"scheme": "int8", "rest": "nf4"}, "nf4 is no floating-point format of a whole model; choose one of fp32, "),
        (
            {"scheme": "fp32", "embeddings": "dynamic_int8"},
            "dynamic_int8 is no scheme of word embeddings; choose one of int8, ",
        ),
    ],
)
@pytest.mark.parametrize("calibrated", [False, True])
def test_an_unknown_scheme_never_becomes_another_one(model: nn.Module, params: dict[str, Any], words: str, calibrated: bool):
    batches = list(eval_batches(examples(), 8)) if calibrated else None
    with pytest.raises(ValueError, match=words):
        quantize(model, **params, batches=batches)


def test_a_saved_scheme_that_is_not_known_is_named(model: nn.Module, tmp_path: Path):
    reload(quantized(model, scheme="int8"), tmp_path / "m")
    text = (tmp_path / "m" / "config.json").read_text()
    (tmp_path / "m" / "config.json").write_text(text.replace('": "int8"', '": "int3"'))
    with pytest.raises(ValueError, match="is saved as 'int3', which this version can't read; it reads int8, nf4"):
        artifact.load(tmp_path / "m")
    reload(quantized(model, scheme="fp32", embeddings="int4"), tmp_path / "e")
    text = (tmp_path / "e" / "config.json").read_text()
    (tmp_path / "e" / "config.json").write_text(text.replace('": "int4"', '": "int3"'))
    with pytest.raises(
        ValueError, match="word_embeddings is saved as 'int3', which this version can't read; it reads int8, int4"
    ):
        artifact.load(tmp_path / "e")


# --- mixed precision ---


def test_each_layer_has_its_own_scheme_and_is_saved_with_it(model: nn.Module, tmp_path: Path):
    mixed = quantized(model, scheme="nf4", layers={"int8": [0], "rest": [2]})
    kinds = [type(linear_of(layer, surgery.family(mixed).ffn_in)).__name__ for layer in surgery.layers(mixed)]
    assert kinds == ["Int8Linear", "Linear4bit", "Linear"]
    before = logits(mixed)
    once = reload(mixed, tmp_path / "once")
    assert torch.equal(logits(once), before)
    assert torch.equal(logits(reload(once, tmp_path / "twice")), before)
    assert (tmp_path / "once" / artifact.WEIGHTS).read_bytes() == (tmp_path / "twice" / artifact.WEIGHTS).read_bytes()


def test_a_layer_alone_equals_that_layer_of_a_whole_model(model: nn.Module):
    whole, one = quantized(copy.deepcopy(model), scheme="nf4"), quantized(model, scheme="fp32", layers={"nf4": [1]})
    for layer, other in zip(surgery.layers(one), surgery.layers(whole), strict=True):
        mine, theirs = (linear_of(block, surgery.family(model).attention_out) for block in (layer, other))
        assert (type(mine) is nn.Linear) == (layer is not surgery.layers(one)[1])
        if type(mine) is not nn.Linear:
            assert torch.equal(mine.weight, theirs.weight)


@pytest.mark.parametrize("scheme", FEW)
def test_linears_of_no_width_are_left_alone(model: nn.Module, scheme: str):
    names, block = surgery.family(model), surgery.layers(model)[1]
    surgery.replace(block, names.ffn_in, nn.Linear(64, 0))
    surgery.replace(block, names.ffn_out, nn.Linear(0, 64))
    done = surgery.layers(quantize(model, scheme))[1]
    assert [type(linear_of(done, path)) for path in (names.ffn_in, names.ffn_out)] == [nn.Linear, nn.Linear]
    assert type(linear_of(done, names.attention_out)).__name__ == KINDS[scheme]


@pytest.mark.parametrize(("scheme", "width"), [("int8", 50), ("nf4", 48), ("fp4", 63)])
@pytest.mark.parametrize("method", ["round", "gptq"])
def test_a_width_that_a_scheme_can_not_take_stays_in_the_rests_precision(
    model: nn.Module, scheme: str, width: int, method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    surgery.prune_ffn(model, 1, range(96 - width))
    exact = logits(model)
    done = quantized(model, scheme=scheme, rest="bf16", method=method)
    names = surgery.family(done)
    odd, other = (linear_of(surgery.layers(done)[index], names.ffn_out) for index in (1, 0))
    assert (type(odd), odd.weight.dtype) == (nn.Linear, torch.bfloat16)
    assert type(other).__name__ == type(linear_of(surgery.layers(done)[1], names.ffn_in)).__name__ == KINDS[scheme]
    assert f"{names.ffn_out} of layer 1 ({width} inputs; {scheme}: multiples of" in caplog.text
    torch.testing.assert_close(logits(done), exact, atol=0.3, rtol=0.3)
    assert torch.equal(logits(reload(done, tmp_path / "m")), logits(done))


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"scheme": "fp16", "rest": "bf16"}, "no effect"),
        ({"scheme": "fp32"}, "changes nothing"),
        ({"scheme": "fp32", "layers": {"rest": [1]}}, "changes nothing"),
        ({"scheme": "fp16", "method": "gptq"}, "no effect"),
        ({"scheme": "nf4", "layers": {"int8": [0, 1], "rest": [1]}}, "twice"),
        ({"scheme": "nf4", "layers": {"int8": [-1]}}, "greater than or equal to 0"),
        ({"scheme": "nf4", "layers": {"int3": [1]}}, "int3"),
        ({"scheme": "dynamic_int8", "rest": "bf16"}, "fp32 only"),
        ({"scheme": "bf16", "layers": {"dynamic_int8": [1]}}, "fp32 only"),
    ],
)
def test_what_makes_no_sense_is_refused(params: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        operator(Step(operator="quantize", params=params))


# --- where a scheme can run ---


@pytest.mark.parametrize(
    ("params", "device", "widths", "words"),
    [
        ({"scheme": "dynamic_int8"}, "cuda", (64, 96), "set protocol.device=cpu"),
        ({"scheme": "dynamic_int8"}, "any", (64, 96), "set protocol.device=cpu"),
        ({"scheme": "nf4", "layers": {"dynamic_int8": [1]}}, "cuda", (64, 96), "dynamic_int8 runs on cpu only"),
        ({"scheme": "int8"}, "cpu", (64, 98), "multiples of 4 inputs, and the base model has some with 98"),
        ({"scheme": "nf4"}, "any", (64, 80), "multiples of 32"),
        ({"scheme": "nf4", "layers": {"int8": [3]}}, "any", (64, 96), "no layer 3; its last one is 2"),
    ],
)
def test_a_scheme_in_the_wrong_place_is_refused(params: dict[str, Any], device: str, widths: tuple[int, ...], words: str):
    chosen = operator(Step(operator="quantize", params=params))
    with pytest.raises(ConfigError, match=words):
        chosen.check(device, 3, widths)


def test_a_scheme_in_its_place_is_not_refused():
    for scheme in ("fp16", "bf16", *FEW):
        operator(Step(operator="quantize", params={"scheme": scheme})).check("cpu", 3, (64, 96))
    for scheme in ("fp16", "bf16", "int8", "nf4", "fp4"):
        for device in ("any", "cuda"):
            operator(Step(operator="quantize", params={"scheme": scheme})).check(device, 3, (64, 96))


def test_a_search_is_refused_before_any_job_is_sent(setup: Any, tmp_path: Path):
    class Never:
        def open(self, *args: Any) -> Any:
            raise AssertionError("a job was about to be sent")

    cpu_only = "+strategy.quantizations.mine={weight: 0.1, operator: quantize, scheme: nf4, layers: {dynamic_int8: [1]}}"
    with pytest.raises(ConfigError, match="dynamic_int8 runs on cpu only"):
        setup.run(tmp_path / "run", cpu_only, "protocol.device=cuda", launcher=Never())
    assert not (tmp_path / "run" / "run.json").exists()
    with pytest.raises(AssertionError, match="about to be sent"):
        setup.run(tmp_path / "run", cpu_only, "protocol.device=cpu", launcher=Never())


def test_the_protocol_says_what_is_measured_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [measure.device(name).type for name in ("any", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [measure.device(name).type for name in ("any", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(RuntimeError, match="sees no GPU"):
        measure.device("cuda")


# --- the word embedding ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_a_4_bit_embedding_decodes_to_what_bitsandbytes_makes_of_it(scheme: str, dtype: torch.dtype):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(50, 192, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type=scheme))
    ids = torch.tensor([[3, 49, 0], [7, 7, 1]])
    assert torch.equal(SCHEMES[scheme].embedding(weight)(ids), expected[ids])


@pytest.mark.parametrize("features", [1, 7, 64, 65, 100])
@pytest.mark.parametrize(("scheme", "gap"), [("int8", 1 / 254), ("int4", 1 / 15), ("nf4", 0.16), ("fp4", 1 / 6)])
def test_an_embedding_of_any_width_is_near(scheme: str, gap: float, features: int):
    """gap: half the widest distance between two levels, as a share of the largest value."""
    weight = torch.randn(20, features, generator=torch.Generator().manual_seed(0))
    weight[4] = 0
    layer = SCHEMES[scheme].embedding(weight)
    values = layer(torch.arange(20))
    blocks = [0, *range(64, features, 64)] if scheme != "int8" else [0]
    for start, stop in zip(blocks, [*blocks[1:], features], strict=True):
        error = (values - weight)[:, start:stop].abs().amax(1)
        assert (error <= 1.001 * gap * weight[:, start:stop].abs().amax(1)).all()
    assert (values[4] == 0).all()
    largest = weight.abs().argmax(1)
    torch.testing.assert_close(values[torch.arange(20), largest].abs(), weight.abs().amax(1))


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra"])
@pytest.mark.parametrize("params", [{"scheme": "fp32"}, {"scheme": "nf4", "rest": "bf16"}], ids=str)
@pytest.mark.parametrize(("embeddings", "bits"), [("int8", 8), ("int4", 4), ("nf4", 4), ("fp4", 4)])
def test_a_quantized_embedding_is_small_and_saved_as_it_is(
    family: str, params: dict[str, str], embeddings: str, bits: int, tiny_checkpoint: Callable[..., Path], tmp_path: Path
):
    model = load(tiny_checkpoint(family, hidden=64))
    (tokens, features), total = model.get_input_embeddings().weight.shape, surgery.all_parameters(model)
    plain = quantize(copy.deepcopy(model), **params)
    done = quantized(copy.deepcopy(model), embeddings=embeddings, **params)
    assert surgery.all_parameters(done) == total
    before = logits(done)
    torch.testing.assert_close(before, logits(plain), atol=0.15, rtol=0.15)
    once = reload(done, tmp_path / "once")
    assert torch.equal(logits(once), before)
    reload(once, tmp_path / "twice")
    reload(plain, tmp_path / "plain")
    files = {name: (tmp_path / name / artifact.WEIGHTS).read_bytes() for name in ("once", "twice", "plain")}
    assert files["once"] == files["twice"]
    whole = 2 if "rest" in params else 4
    saved = tokens * (features * (whole - bits / 8) - whole)  # one scale for each of the rows, which are short
    assert len(files["plain"]) - len(files["once"]) == pytest.approx(saved, abs=400)


# --- int8 for CPUs ---


def test_dynamic_int8_computes_what_torch_does(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)  # torch's own layer never counts on it
    linear = nn.Linear(40, 24)
    layer = packed("dynamic_int8").rounded(linear)
    stock = torch.ao.nn.quantized.dynamic.Linear(40, 24)
    zeros = torch.zeros(24, dtype=torch.long)
    whole = torch._make_per_channel_quantized_tensor(layer.weight.data, layer.scale.double(), zeros, 0)
    stock.set_weight_bias(whole, linear.bias.detach())
    inputs = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(inputs), stock(inputs))
    assert ((decoded(layer) - linear.weight).abs().amax(1) <= 0.5001 * layer.scale).all()
    torch.testing.assert_close(layer(inputs), linear(inputs), atol=0.05, rtol=0.05)


def test_dynamic_int8_is_saved_as_it_is_and_small(model: nn.Module, tmp_path: Path):
    exact, total = logits(model), surgery.all_parameters(model)
    reload(model, tmp_path / "whole")
    done = quantized(model, scheme="dynamic_int8")
    before = logits(done)
    torch.testing.assert_close(before, exact, atol=0.1, rtol=0.1)
    assert torch.equal(logits(copy.deepcopy(done)), before)
    once = reload(done, tmp_path / "once")
    assert torch.equal(logits(once), before)
    assert torch.equal(logits(reload(once, tmp_path / "twice")), before)
    assert surgery.all_parameters(done) == total
    whole, small = ((tmp_path / name / artifact.WEIGHTS).stat().st_size for name in ("whole", "once"))
    assert whole - small == pytest.approx(3 * surgery.encoder_parameters(done), rel=0.1)


# --- GPTQ ---


def correlated(rows: int, features: int, seed: int = 0) -> torch.Tensor:
    """Inputs of which a few directions have most of the energy, as those of a trained model have."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=generator) @ torch.randn(6, features, generator=generator) + 0.2 * torch.randn(
        rows, features, generator=generator
    )


def naive(weight: torch.Tensor, hessian: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Weight by weight (Frantar & Alistarh 2022, OBC, eq. 5-6): round one, spread its error, take it out of the inverse."""
    codes = torch.zeros(weight.shape, dtype=torch.long)
    for row in range(len(weight)):
        left, inverse = weight[row].double().clone(), damped_inverse(hessian)
        for j in sorted(range(len(left)), key=lambda j: -float(hessian[j, j])):
            codes[row, j] = int((left[j] - levels.double() * scales[row, j].double()).abs().argmin())
            error = left[j] - levels[codes[row, j]].double() * scales[row, j].double()
            left = left - error / inverse[j, j] * inverse[j]
            inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
            inverse[j, j] = 1.0  # done with; anything but 0
    return codes


@pytest.mark.parametrize("scheme", FEW)
def test_gptq_is_what_naive_rounding_weight_by_weight_gives(scheme: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gptq, "BLOCK", 5)  # does not divide the columns
    torch.manual_seed(0)
    linear = nn.Linear(32, 6)
    levels, scales = packed(scheme).grid(packed(scheme).rounded(copy.deepcopy(linear)))
    inputs = correlated(100, 32)
    hessian = (inputs.T @ inputs).double()
    codes = gptq.round_weights(linear.weight.data, hessian, levels, scales)
    expected = naive(linear.weight.data, hessian, levels, scales)
    assert torch.equal(levels[codes], levels[expected])
    assert not torch.equal(levels[codes], levels[gptq.nearest(linear.weight.data / scales, levels)])


@pytest.mark.parametrize("width", [64, 96])  # 96: a block of one scale goes on into the next row
@pytest.mark.parametrize("scheme", FEW)
def test_the_grid_is_what_the_stored_format_decodes_to(scheme: str, width: int):
    torch.manual_seed(0)
    linear = nn.Linear(width, 10)
    layer = packed(scheme).rounded(copy.deepcopy(linear))
    levels, scales = packed(scheme).grid(layer)
    codes = torch.randint(len(levels), (10, width))
    packed(scheme).set_codes(layer, codes)
    torch.testing.assert_close(decoded(layer), levels[codes] * scales, rtol=1e-6, atol=1e-7)
    if scheme in ("nf4", "fp4"):
        assert torch.equal(decoded(layer), levels[codes] * scales)


@pytest.mark.parametrize("scheme", FEW)
def test_gptq_says_more_nearly_what_the_linear_said(scheme: str):
    torch.manual_seed(0)
    linear, inputs = nn.Linear(96, 40), correlated(400, 96)
    layer = packed(scheme).rounded(copy.deepcopy(linear))
    nearest = decoded(layer).clone()
    levels, scales = packed(scheme).grid(layer)
    fresh = correlated(400, 96, seed=0)[200:]  # of one kind, and not seen
    seen = inputs[:200]
    codes = gptq.round_weights(linear.weight.data, (seen.T @ seen).double(), levels, scales)
    packed(scheme).set_codes(layer, codes)
    errors = [float((fresh @ (weights - linear.weight).T).norm()) for weights in (decoded(layer), nearest)]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", FEW)
def test_a_model_rounded_by_gptq_is_nearer_and_saved_as_it_is(model: nn.Module, scheme: str, tmp_path: Path):
    with torch.no_grad():
        for layer in surgery.layers(model):  # far from 0, so that rounding shows
            for path in surgery.family(model).linears:
                linear_of(layer, path).weight.mul_(8)
    mask = torch.cat([batch.inputs["attention_mask"].flatten() for batch in eval_batches(examples(), 24)]).bool()

    @torch.no_grad()
    def says(model: nn.Module) -> torch.Tensor:
        (batch,) = eval_batches(examples(), 24)
        return model.bert(**batch.inputs).last_hidden_state.flatten(0, 1)[mask]

    exact = says(model)
    rounded = quantized(copy.deepcopy(model), scheme=scheme)
    one, other = (quantized(copy.deepcopy(model), scheme=scheme, method="gptq") for _ in "ab")
    assert torch.equal(says(one), says(other))
    assert float((says(one) - exact).norm()) < float((says(rounded) - exact).norm())
    assert torch.equal(says(reload(one, tmp_path / "once")), says(one))
    reload(rounded, tmp_path / "rounded")
    sizes = [(tmp_path / name / artifact.WEIGHTS).stat().st_size for name in ("once", "rounded")]
    assert sizes[0] == pytest.approx(sizes[1], abs=64)


def test_gptq_goes_with_mixed_schemes_and_a_lower_rest(model: nn.Module, tmp_path: Path):
    done = quantized(model, scheme="nf4", rest="bf16", layers={"int8": [1], "rest": [2]}, embeddings="int8", method="gptq")
    names = surgery.family(done)
    kinds = [type(linear_of(layer, names.attention_out)).__name__ for layer in surgery.layers(done)]
    assert kinds == ["Linear4bit", "Int8Linear", "Linear"]
    assert linear_of(surgery.layers(done)[2], names.attention_out).weight.dtype == torch.bfloat16
    before = logits(done)
    assert torch.equal(logits(reload(done, tmp_path / "m")), before)


@pytest.mark.slow
def test_gptq_after_a_trimmed_vocabulary_reads_the_pieces_that_are_left(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: set[int] = set()

    class Spy(quantization.calibration.Walk):
        def __init__(self, model: nn.Module, batches: Any) -> None:
            seen.update(id for batch in batches for id in batch.inputs["input_ids"].flatten().tolist())
            super().__init__(model, batches)

    monkeypatch.setattr(quantization.calibration, "Walk", Spy)
    store, task = _run_folder(tmp_path / "run", tiny_checkpoint("bert", hidden=64, ffn=96))
    deploy = (Step(operator="trim_vocabulary"), Step(operator="quantize", params={"scheme": "nf4", "method": "gptq"}))
    protocol = task.protocol.model_copy(update={"device": "cpu"})
    task = task.model_copy(update={"genome": Genome(deploy=deploy), "protocol": protocol})
    store.add_task(task)
    list(worker.run(str(store.root), [identity.task_id(task)]))
    outcome = store.outcome(identity.task_id(task))
    assert outcome is not None
    assert outcome.failure is None
    assert outcome.measurement.device_type == "cpu"
    texts = pd.read_parquet(store.root / "data" / "train.parquet")["text"].tolist()
    trimmed, whole = (
        {id for text in texts for id in Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids}
        for folder in (store.path(identity.deployed_key(task)), store.root / "base")
    )
    assert seen - {VOCABULARY["[PAD]"]} == trimmed != whole


# --- families ---


# The calibration of DeBERTa is left out: its query and key linears also read relative positions, which have no padding.
@pytest.mark.parametrize("method", ["round", "gptq"])
@pytest.mark.parametrize(
    "family",
    ["distilbert", "modernbert", "albert", "roberta", "electra", "mpnet"],
)
def test_every_family_can_be_quantized_and_cut_to_nothing(
    family: str, method: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
):
    _quantize_family(family, method, tiny_checkpoint, tmp_path)


@pytest.mark.slow
def test_deberta_can_be_quantized_and_cut_to_nothing(tiny_checkpoint: Callable[..., Path], tmp_path: Path):
    _quantize_family("deberta-v2", "round", tiny_checkpoint, tmp_path)


def _quantize_family(family: str, method: str, tiny_checkpoint: Callable[..., Path], folder: Path) -> None:
    model = load(tiny_checkpoint(family, layers=2, hidden=64, ffn=96))
    surgery.prune_ffn(model, 0, range(96))
    exact = logits(model)
    done = quantized(model, scheme="nf4", layers={"dynamic_int8": [1]}, embeddings="int8", method=method)
    torch.testing.assert_close(logits(done), exact, atol=0.3, rtol=0.3)
    assert torch.equal(logits(reload(done, folder / "m")), logits(done))


# --- export ---


@pytest.mark.slow
def test_exported_models_load_without_the_package(model: nn.Module, tmp_path: Path):
    ids = [[2, 9, 8, 7, 3], [2, 5, 6, 11, 3]]
    expected = {}
    for name, params in {
        "cpu": {"scheme": "dynamic_int8", "embeddings": "int8"},
        "mixed": {"scheme": "nf4", "layers": {"int8": [1]}, "embeddings": "fp4", "rest": "bf16", "method": "gptq"},
    }.items():
        done = quantized(copy.deepcopy(model), **params)
        reload(done, tmp_path / name)
        shutil.copy(modeling_hpc_compress.__file__, tmp_path / name)
        with torch.no_grad():
            expected[name] = done(input_ids=torch.tensor(ids)).logits.double().tolist()
    found = outputs_elsewhere(tmp_path, list(expected), {"input_ids": ids})
    for name, outputs in expected.items():
        assert found[name] == found[f"{name}-saved-again"] == outputs


def test_weights_for_whole_numbers_are_rounded_to_the_nearest_of_255_levels():
    linear = nn.Linear(100, 20)
    layer = packed("dynamic_int8").rounded(linear)
    values = layer.weight.float() * layer.get_buffer("scale")[:, None]
    error = (values - linear.weight).abs().amax(1)
    assert (error <= 1.001 * linear.weight.abs().amax(1) / 254).all()
