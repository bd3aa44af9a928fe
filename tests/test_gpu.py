"""What only a GPU can show: bitsandbytes there, CUDA timing, bf16 training, allocator peaks."""

import copy
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
import torch
from test_models import SCHEMES, context, examples, load, logits

from hpc_compress import measure
from hpc_compress.data.batches import eval_batches
from hpc_compress.models import artifact, surgery
from hpc_compress.operators import Context, losses, operator
from hpc_compress.operators.quantization import quantize
from hpc_compress.operators.training import autocast
from hpc_compress.types import Protocol, Step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path]) -> torch.nn.Module:
    return load(tiny_checkpoint("bert", layers=3, heads=4, hidden=256, ffn=1024))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantized_model_is_close_on_the_gpu_too(model: torch.nn.Module, scheme: str, tmp_path: Path):
    surgery.prune_heads(model, 0, [1])
    exact = logits(model)
    artifact.save(quantize(model, scheme), tmp_path)
    on_gpu = measure.outputs(artifact.load(tmp_path, CUDA), examples(), 8, CUDA)
    on_cpu = measure.outputs(artifact.load(tmp_path), examples(), 8, torch.device("cpu"))
    order = torch.cat([batch.index for batch in eval_batches(examples(), 8)]).numpy()
    assert abs(on_gpu[order] - exact.numpy()).max() < 0.2
    assert abs(on_gpu - on_cpu).max() < 0.1


@pytest.mark.parametrize("method", ["round", "gptq"])
@pytest.mark.parametrize("embeddings", ["int8", "nf4", "fp4"])
def test_quantized_embeddings_and_gptq_work_on_the_gpu(model: torch.nn.Module, embeddings: str, method: str, tmp_path: Path):
    exact = logits(model)
    params = {"scheme": "nf4", "layers": {"int8": [0], "rest": [2]}, "embeddings": embeddings, "method": method}
    on_gpu = Context(train=examples(), device=CUDA, seed=0, teacher=lambda: model)
    done = operator(Step(operator="quantize", params=params))(model, on_gpu)
    artifact.save(done, tmp_path)
    one, other = (measure.outputs(artifact.load(tmp_path, on), examples(), 8, on) for on in (CUDA, torch.device("cpu")))
    order = torch.cat([batch.index for batch in eval_batches(examples(), 8)]).numpy()
    assert abs(one[order] - exact.numpy()).max() < 0.2
    assert abs(one - other).max() < 0.1


def test_dynamic_int8_is_refused_on_the_gpu(model: torch.nn.Module, tmp_path: Path):
    artifact.save(quantize(model, "dynamic_int8"), tmp_path)
    with pytest.raises(RuntimeError, match="runs on a CPU only"):
        measure.outputs(artifact.load(tmp_path, CUDA), examples(), 8, CUDA)


def test_two_latencies_of_one_model_agree(model: torch.nn.Module):
    protocol = Protocol(min_passes=20, max_passes=200, max_seconds=10)
    model.to(CUDA)
    sample = measure.timing_sample(examples(256), protocol, CUDA)
    one, other = measure.latencies_ms([(model, sample)] * 2, protocol, CUDA)
    assert median(one) == pytest.approx(median(other), rel=0.03)


def test_the_peak_holds_the_weights_and_the_activations(model: torch.nn.Module):
    model.to(CUDA)
    sample = measure.timing_sample(examples(64), Protocol(), CUDA)
    peak = measure.peak_bytes(model, sample, CUDA)
    assert peak is not None
    assert peak > 4 * surgery.all_parameters(model)


def test_training_learns_under_autocast(model: torch.nn.Module):
    teacher = copy.deepcopy(model).to(CUDA)
    data = examples(64)
    (batch,) = (batch.to(CUDA) for batch in eval_batches(data, 64))
    before = float(losses.task_loss(model.to(CUDA), batch).detach())
    on_gpu = Context(train=data, device=CUDA, seed=0, teacher=lambda: teacher)
    step = Step(operator="distill", params={"epochs": 8, "batch_size": 8, "learning_rate": 1e-3})
    operator(step)(model, on_gpu)
    assert float(losses.task_loss(model, batch).detach()) < before
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert isinstance(autocast(CUDA), torch.autocast) == torch.cuda.is_bf16_supported(including_emulation=False)


def test_a_head_is_scored_and_cut_on_the_gpu(model: torch.nn.Module):
    scored = operator(Step(operator="prune_heads", params={"count": 2}))
    on_cpu = scored(copy.deepcopy(model), context(model))
    on_gpu = scored(model.to(CUDA), Context(train=examples(), device=CUDA, seed=0, teacher=lambda: model))
    torch.testing.assert_close(logits(on_gpu.cpu()), logits(on_cpu), atol=1e-4, rtol=1e-4)


def test_a_two_of_four_model_runs_on_sparse_tensor_cores(model: torch.nn.Module, tmp_path: Path):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    step = Step(operator="sparsify", params={"pattern": "2:4", "permute": True, "precision": "fp16"})
    on_gpu = Context(train=examples(), device=CUDA, seed=0, teacher=lambda: model)
    dense = operator(step)(model, on_gpu)
    for folder in (tmp_path / "once", tmp_path / "twice"):
        folder.mkdir()
    artifact.save(dense, tmp_path / "once")
    sparse = artifact.load(tmp_path / "once", CUDA)
    paths = [
        surgery.path(sparse, index, name)
        for index in range(len(surgery.layers(sparse)))
        for name in surgery.family(sparse).linears
    ]
    assert all(isinstance(sparse.get_submodule(path).weight, torch.sparse.SparseSemiStructuredTensor) for path in paths)
    dense.to(CUDA)
    outputs = [measure.outputs(one, examples(), 8, CUDA) for one in (sparse, dense)]
    assert abs(outputs[0] - outputs[1]).max() < 0.01
    for path in paths:
        assert torch.equal(sparse.state_dict()[f"{path}.weight"], dense.get_submodule(path).weight)
    assert surgery.all_parameters(sparse) == surgery.all_parameters(dense)
    artifact.save(sparse, tmp_path / "twice")
    assert (tmp_path / "once" / artifact.WEIGHTS).read_bytes() == (tmp_path / "twice" / artifact.WEIGHTS).read_bytes()


@pytest.mark.parametrize("mode", [{"share": 0.5}, {"regularisation": 1.0}], ids=str)
def test_movement_pruning_cuts_on_the_gpu(model: torch.nn.Module, mode: dict[str, float], tmp_path: Path):
    step = Step(operator="movement_prune", params={"batch_size": 8, "epochs": 2, **mode})
    cut = operator(step)(model, Context(train=examples(), device=CUDA, seed=0, teacher=lambda: model))
    assert next(cut.parameters()).is_cuda
    assert all(width % 64 == 0 for width in surgery.ffn_widths(cut))
    if "share" in mode:
        assert (sum(surgery.head_counts(cut)), sum(surgery.ffn_widths(cut))) == (6, 1536)
    artifact.save(cut, tmp_path)
    on_cpu = artifact.load(tmp_path)
    torch.testing.assert_close(logits(cut.cpu()), logits(on_cpu))
