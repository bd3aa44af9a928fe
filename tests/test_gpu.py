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


def test_two_latencies_of_one_model_agree(model: torch.nn.Module):
    protocol = Protocol(min_passes=20, max_passes=200, max_seconds=10)
    model.to(CUDA)
    sample = measure.timing_sample(examples(256), protocol, CUDA)
    one, other = measure.latencies_ms([model, model], sample, protocol, CUDA)
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
