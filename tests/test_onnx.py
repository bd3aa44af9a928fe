"""onnx_int8: programs for ONNX Runtime against the models that they were made from; saved, loaded, exported, refused."""

import copy
import importlib.util
import logging
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from elsewhere import outputs_elsewhere
from test_families import KINDS, build, reload, shrink
from test_models import context, load
from torch import nn
from transformers import AutoTokenizer

import hpc_compress
from hpc_compress import analysis, delivery, export, measure
from hpc_compress.config import ConfigError
from hpc_compress.data import metrics
from hpc_compress.data.batches import encode
from hpc_compress.models import artifact, surgery
from hpc_compress.models.modeling_hpc_compress import PROGRAM, WEIGHTS
from hpc_compress.operators import operator
from hpc_compress.types import Step

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from hpc_compress.deployment import onnx_int8  # noqa: E402
from hpc_compress.problems import PROBLEMS  # noqa: E402

CLASSIFICATION = PROBLEMS["classification"]

CPU = torch.device("cpu")
Batches = list[dict[str, torch.Tensor]]


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path]) -> nn.Module:
    return build("bert", tiny_checkpoint)


def quantized(model: nn.Module, **params: Any) -> nn.Module:
    return operator(Step(operator="quantize", params=params))(model, context(model))


def batches(model: nn.Module) -> Batches:
    """One token, one sentence, many of different lengths, the longest ones; with token types where there are two."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for count, length in ((1, 1), (1, 9), (5, 33), (3, 12), (2, model.config.max_position_embeddings - 4)):
        ids = torch.randint(5, 30, (count, length), generator=generator)
        mask = (torch.arange(length) < length - 2 * torch.arange(count)[:, None]).long()
        made.append({"input_ids": ids, "attention_mask": mask})
        if getattr(model.config, "type_vocab_size", 0) > 1:
            made[-1]["token_type_ids"] = (torch.arange(length) > length // 2).long().expand(count, -1).contiguous()
    return made


def says(model: nn.Module, batches: Batches) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(**batch).logits for batch in batches]


def ran(program: Any, batches: Batches) -> list[torch.Tensor]:
    """What ONNX Runtime alone makes of them."""
    session = ort.InferenceSession(program.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    return [torch.from_numpy(session.run(None, {name: batch[name].numpy() for name in names})[0]) for batch in batches]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- what is computed ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "shape"),
    [(kind, shape) for kind in KINDS for shape in ("whole", "shrunk")],
)
def test_every_family_becomes_a_program(kind: str, shape: str, tiny_checkpoint: Callable[..., Path]):
    """shrunk: odd widths, a layer without heads, one without neurons, fewer dimensions of the stream."""
    model = build(kind, tiny_checkpoint)
    model = shrink(model) if shape == "shrunk" else model
    data, counts = batches(model), (surgery.all_parameters(model), surgery.encoder_parameters(model))
    exact = says(model, data)
    for found, expected in zip(ran(onnx_int8.export(copy.deepcopy(model), ("logits",)), data), exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    # As near as the same rounding in torch.
    dynamic = says(quantized(copy.deepcopy(model), scheme="dynamic_int8", embeddings="int8"), data)
    program = quantized(model, scheme="onnx_int8")
    error, other = (
        max(float((a - b).abs().max()) for a, b in zip(found, exact, strict=True)) for found in (says(program, data), dynamic)
    )
    assert 0 < error < 3 * other
    assert artifact.parameters(program) == counts


@pytest.mark.slow
def test_linears_and_the_word_embedding_alone_are_int8(model: nn.Module):
    import onnx

    linears = len(surgery.layers(model)) * len(surgery.family(model).linears)
    graph = onnx.load_from_string(quantized(model, scheme="onnx_int8").program).graph
    products = [node.name for node in graph.node if node.op_type == "MatMulInteger"]
    assert len(products) == linears
    assert all(name.startswith("/model/bert/encoder/layer.") for name in products)
    tables = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 2]
    assert len(tables) == linears + 1


@pytest.mark.slow
@pytest.mark.parametrize("embeddings", ["int8", "int4", "nf4", "fp4"])
def test_a_program_looks_up_what_torch_does(tiny_checkpoint: Callable[..., Path], embeddings: str):
    """Of a model without blocks, whose program rounds nothing else. Its rows have several blocks, and 133 features."""
    import onnx

    model = load(tiny_checkpoint("bert", layers=2, heads=2, hidden=140, ffn=16))
    surgery.prune_hidden(model, range(133, 140))
    for index in range(len(surgery.layers(model))):
        surgery.prune_heads(model, index, range(surgery.head_counts(model)[index]))
        surgery.prune_ffn(model, index, range(surgery.ffn_widths(model)[index]))
    data = batches(model)
    expected = says(quantized(copy.deepcopy(model), scheme="fp32", embeddings=embeddings), data)
    programs = {name: quantized(copy.deepcopy(model), scheme="onnx_int8", embeddings=name) for name in (embeddings, "rest")}
    for found, wanted in zip(says(programs[embeddings], data), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    tokens, features = model.get_input_embeddings().weight.shape
    tables = [list(table.dims) for table in onnx.load_from_string(programs[embeddings].program).graph.initializer]
    assert features == 133
    assert [tokens, features if embeddings == "int8" else 67] in tables
    assert (programs[embeddings].program == programs["rest"].program) == (embeddings == "int8")


@pytest.mark.slow
def test_without_vnni_weights_have_7_bits(model: nn.Module, monkeypatch: pytest.MonkeyPatch):
    import onnx
    from onnx.numpy_helper import to_array

    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    tables = onnx.load_from_string(quantized(model, scheme="onnx_int8").program).graph.initializer
    weights = [
        to_array(table).astype(int) for table in tables if table.name.startswith("onnx::MatMul") and len(table.dims) == 2
    ]
    assert len(weights) == len(surgery.layers(model)) * len(surgery.family(model).linears)
    assert {int(abs(weight).max()) for weight in weights} == {64}


@pytest.mark.slow
def test_what_is_not_given_is_one_text_without_padding(model: nn.Module):
    program = quantized(model, scheme="onnx_int8")
    ids = torch.tensor([[2, 7, 9, 3]])
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    assert same(says(program, [{"input_ids": ids}, {"input_ids": ids.int()}]), says(program, [whole, whole]))


def test_a_model_that_lost_all_blocks_is_a_program_too(model: nn.Module):
    for index in range(len(surgery.layers(model))):
        surgery.prune_heads(model, index, range(surgery.head_counts(model)[index]))
        surgery.prune_ffn(model, index, range(surgery.ffn_widths(model)[index]))
    data = batches(model)
    exact = says(model, data)
    for found, expected in zip(says(quantized(model, scheme="onnx_int8"), data), exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_converting_is_silent_and_always_the_same(model: nn.Module, capfd: pytest.CaptureFixture[str]):
    handlers = list(logging.getLogger().handlers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        programs = [quantized(copy.deepcopy(model), scheme="onnx_int8").program for _ in "ab"]
    assert programs[0] == programs[1]
    assert logging.getLogger().handlers == handlers
    assert capfd.readouterr() == ("", "")


# --- saved = loaded ---


@pytest.mark.slow
def test_a_program_is_saved_as_it_is_and_small(model: nn.Module, tmp_path: Path):
    data = batches(model)
    reload(quantized(copy.deepcopy(model), scheme="dynamic_int8", embeddings="int8"), tmp_path / "dynamic")
    program = quantized(model, scheme="onnx_int8")
    before = says(program, data)
    once = reload(program, tmp_path / "once")
    twice = reload(once, tmp_path / "twice")
    assert all(same(says(other, data), before) for other in (once, twice, copy.deepcopy(once)))
    assert not once.training
    assert (once.config.num_labels, once.config.id2label) == (model.config.num_labels, model.config.id2label)
    assert once.config.heads == [4, 4, 4]
    assert {path.name for path in (tmp_path / "once").iterdir()} == {PROGRAM, "config.json"}
    for name in (PROGRAM, "config.json"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
    assert artifact.weights(tmp_path / "once") == tmp_path / "once" / PROGRAM
    assert artifact.weights(tmp_path / "dynamic") == tmp_path / "dynamic" / WEIGHTS
    assert artifact.parameters(artifact.load(tmp_path / "dynamic")) == artifact.parameters(once)


@pytest.mark.slow
def test_threads_are_torchs_and_none_spins_after_a_run(model: nn.Module):
    data, threads = batches(model), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        program = quantized(model, scheme="onnx_int8")
    finally:
        torch.set_num_threads(threads)
    options = program.session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    says(program, data)
    begin = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - begin < 0.01


# --- what is refused ---


@pytest.mark.parametrize("params", [{"rest": "bf16"}, {"layers": {"rest": [0]}}, {"method": "gptq"}], ids=str)
def test_a_program_has_one_scheme(params: dict[str, Any]):
    with pytest.raises(ConfigError, match="leave rest, layers and method out"):
        operator(Step(operator="quantize", params={"scheme": "onnx_int8", **params}))


def test_a_layer_alone_can_not_be_a_program():
    with pytest.raises(ConfigError, match="layers"):
        operator(Step(operator="quantize", params={"scheme": "nf4", "layers": {"onnx_int8": [0]}}))


def test_the_device_and_the_packages_are_checked_before_any_job(monkeypatch: pytest.MonkeyPatch):
    step = operator(Step(operator="quantize", params={"scheme": "onnx_int8"}))
    step.check("cpu", 3, (31, 97))
    for device in ("any", "cuda"):
        with pytest.raises(ConfigError, match=r"onnx_int8 runs on cpu only.*set protocol.device=cpu"):
            step.check(device, 3, (32, 96))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.raises(ConfigError, match=r"onnx_int8 needs onnxruntime; pip install 'hpc-compress\[onnx\]'"):
        step.check("cpu", 3, (32, 96))


@pytest.mark.slow
def test_a_program_says_what_it_lacks(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    reload(quantized(model, scheme="onnx_int8"), tmp_path / "m")
    with pytest.raises(ValueError, match="leave it out"):
        artifact.load(tmp_path / "m", "cuda")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install 'hpc-compress\[onnx\]'"):
        artifact.load(tmp_path / "m")


def test_only_fp32_that_fits_becomes_a_program(model: nn.Module, monkeypatch: pytest.MonkeyPatch):
    for params in ({"scheme": "bf16"}, {"scheme": "dynamic_int8"}):
        with pytest.raises(ValueError, match=r"reads fp32 only, and some weights are torch\.(bfloat16|int8)"):
            quantized(quantized(copy.deepcopy(model), **params), scheme="onnx_int8")
    monkeypatch.setattr(onnx_int8, "LARGEST", 1000)
    with pytest.raises(ValueError, match="choose dynamic_int8"):
        quantized(model, scheme="onnx_int8")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["fp32", "bf16", "fp16"])
def test_an_export_becomes_a_program_that_computes_in_fp32(model: nn.Module, tmp_path: Path, scheme: str):
    folder = tmp_path / "exported"
    folder.mkdir()
    artifact.save(model if scheme == "fp32" else quantized(model, scheme=scheme), folder)
    said = delivery.as_program(folder)
    assert not (folder / "model.safetensors").exists()
    for one, other in zip(said, delivery.answers(folder), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


# --- searches and exports ---

ONE_CHILD = [
    "probe=false",
    "generations=1",
    "protocol.device=cpu",
    "strategy.population=1",
    "strategy.mutation_probability=1",
    "strategy.vocabularies.trim.weight=1",
    "strategy.quantizations={int8: {weight: 0}, nf4: {weight: 0}}",
]


@pytest.mark.slow
def test_what_a_search_measured_is_what_it_exports(setup: Any, tmp_path: Path):
    """Through driver, worker and export, into a process that knows transformers alone."""
    root = tmp_path / "run"
    setup.run(root, *ONE_CHILD, "+strategy.quantizations.mine={weight: 1, operator: quantize, scheme: onnx_int8}")
    run = analysis.open_run(root)
    (child,) = run.generations[-1].born_ids
    measurement = run.outcomes[child].measurement
    assert measurement, run.outcomes[child].failure
    table = hpc_compress.load_runs(root)
    assert table[table["candidate"] == child]["deploy"].item() == "trim_vocabulary > onnx_int8"

    target = export.export(root, tmp_path / "model", child)
    assert "pip install onnxruntime" in (target / "README.md").read_text()
    assert not (target / WEIGHTS).exists()
    assert (target / PROGRAM).stat().st_size == measurement.model_bytes
    assert 0 < measurement.encoder_parameters < measurement.parameters
    tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=False)
    rows = pd.read_parquet(root / "data" / "search.parquet")
    data = encode(tokenizer, rows["text"].tolist(), None, rows["label"].to_numpy(), 128)
    model = hpc_compress.load_model(target)
    found = measure.outputs(CLASSIFICATION, model, data, 8, CPU)
    assert metrics.compute(("accuracy",), data.labels, found) == measurement.metrics

    inputs = tokenizer(rows["text"].tolist()[:3], padding=True)
    elsewhere = outputs_elsewhere(tmp_path, ["model"], dict(inputs))
    (expected,) = says(model, [{name: torch.tensor(rows) for name, rows in inputs.items()}])
    assert elsewhere["model"] == elsewhere["model-saved-again"] == expected.double().tolist()

    shutil.rmtree(root / "artifacts")
    again = export.export(root, tmp_path / "again", child)
    assert (again / PROGRAM).read_bytes() == (target / PROGRAM).read_bytes()


@pytest.mark.slow
def test_no_step_can_follow_a_program(setup: Any, tmp_path: Path):
    early = (
        "strategy.vocabularies={trim: {weight: 0}}",
        "+strategy.vocabularies.mine={weight: 1, operator: quantize, scheme: onnx_int8}",
    )
    setup.run(tmp_path, *ONE_CHILD, *early, "strategy.quantizations={int8: {weight: 1}}")
    run = analysis.open_run(tmp_path)
    (child,) = run.generations[-1].born_ids
    failure = run.outcomes[child].failure
    assert failure
    assert "quantize can't act on an ONNX program; let quantize with onnx_int8 be the last step" in failure.message
