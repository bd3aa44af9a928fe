"""What only a GPU can show: every step on its kernels, CUDA timing, bf16 training, allocator peaks, errors of the device."""

import copy
import gc
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
import torch
from test_models import SCHEMES, _run_folder, context, examples, load, logits
from test_pretend_gpu import CASES, act, outputs

from hpc_compress import identity, measure, worker
from hpc_compress.data.batches import eval_batches
from hpc_compress.deployment.quantization import quantize
from hpc_compress.launch import Work
from hpc_compress.models import artifact, surgery
from hpc_compress.models.modeling_hpc_compress import FAMILIES
from hpc_compress.operators import Context, operator
from hpc_compress.problems import PROBLEMS
from hpc_compress.store import Store
from hpc_compress.training import losses
from hpc_compress.training.loop import autocast
from hpc_compress.types import MeasurementProtocol, Step

CLASSIFICATION = PROBLEMS["classification"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("gpu"),  # one after another: they time, and count memory
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path]) -> torch.nn.Module:
    return load(tiny_checkpoint("bert", layers=3, heads=4, hidden=256, ffn=1024))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantized_model_is_close_on_the_gpu_too(model: torch.nn.Module, scheme: str, tmp_path: Path):
    surgery.prune_heads(model, 0, [1])
    exact = logits(model)
    artifact.save(quantize(model, scheme), tmp_path)
    on_gpu = measure.outputs(CLASSIFICATION, artifact.load(tmp_path, CUDA), examples(), 8, CUDA)
    on_cpu = measure.outputs(CLASSIFICATION, artifact.load(tmp_path), examples(), 8, torch.device("cpu"))
    order = torch.cat([batch.index for batch in eval_batches(examples(), 8)]).numpy()
    assert abs(on_gpu[order] - exact.numpy()).max() < 0.2
    assert abs(on_gpu - on_cpu).max() < 0.1


@pytest.mark.parametrize("method", ["round", "gptq"])
@pytest.mark.parametrize("embeddings", ["int8", "int4", "nf4", "fp4"])
def test_quantized_embeddings_and_gptq_work_on_the_gpu(model: torch.nn.Module, embeddings: str, method: str, tmp_path: Path):
    exact = logits(model)
    params = {"scheme": "nf4", "layers": {"int8": [0], "rest": [2]}, "embeddings": embeddings, "method": method}
    on_gpu = Context(train=examples(), problem=CLASSIFICATION, device=CUDA, seed=0, teacher=lambda: model)
    done = operator(Step(operator="quantize", params=params))(model, on_gpu)
    artifact.save(done, tmp_path)
    one, other = (
        measure.outputs(CLASSIFICATION, artifact.load(tmp_path, on), examples(), 8, on) for on in (CUDA, torch.device("cpu"))
    )
    order = torch.cat([batch.index for batch in eval_batches(examples(), 8)]).numpy()
    assert abs(one[order] - exact.numpy()).max() < 0.2
    assert abs(one - other).max() < 0.1


def test_dynamic_int8_is_refused_on_the_gpu(model: torch.nn.Module, tmp_path: Path):
    artifact.save(quantize(model, "dynamic_int8"), tmp_path)
    with pytest.raises(RuntimeError, match="runs on a CPU only"):
        measure.outputs(CLASSIFICATION, artifact.load(tmp_path, CUDA), examples(), 8, CUDA)


def test_two_latencies_of_one_model_agree(model: torch.nn.Module):
    protocol = MeasurementProtocol(min_passes=20, max_passes=200, max_seconds=10)
    model.to(CUDA)
    sample = measure.timing_sample(examples(256), protocol, CUDA)
    one, other = measure.latencies_ms([(model, sample)] * 2, protocol, CUDA)
    assert median(one) == pytest.approx(median(other), rel=0.03)


def test_events_and_the_clock_agree(model: torch.nn.Module):
    model.to(CUDA)
    sample = measure.timing_sample(examples(512), MeasurementProtocol(), CUDA)
    with torch.inference_mode():
        for _ in range(3):
            measure._cuda_pass_ms(model, sample)
        pairs = []
        for _ in range(20):
            begin = time.perf_counter()
            by_events_ms = measure._cuda_pass_ms(model, sample)
            pairs.append((by_events_ms, 1e3 * (time.perf_counter() - begin)))
    events_ms, clock_ms = (median(times) for times in zip(*pairs, strict=True))
    assert 0.5 * clock_ms < events_ms < 1.02 * clock_ms


def _loaded(model: torch.nn.Module, scheme: str, folder: Path) -> tuple[torch.nn.Module, int]:
    """A model of this precision on the GPU, and what the allocator gave out for it."""
    folder.mkdir()
    artifact.save(quantize(copy.deepcopy(model), scheme) if scheme != "fp32" else model, folder)
    before = measure.allocated_bytes(CUDA)
    loaded = artifact.load(folder, CUDA)
    return loaded, measure.allocated_bytes(CUDA) - before


def test_peaks_are_repeatable_and_fall_with_the_precision(model: torch.nn.Module, tmp_path: Path):
    sample = measure.timing_sample(examples(64), MeasurementProtocol(), CUDA)
    peaks = []
    for scheme in ("fp32", "bf16"):
        loaded, own_bytes = _loaded(model, scheme, tmp_path / scheme)
        tensors = [*loaded.parameters(), *loaded.buffers()]
        assert 0 <= own_bytes - sum(tensor.nbytes for tensor in tensors) <= 512 * len(tensors)  # the allocator rounds up
        one, other = (measure.peak_bytes(loaded, sample, CUDA, own_bytes) for _ in "ab")
        assert one is not None
        assert one == other > own_bytes
        peaks.append(one)
    assert peaks[1] < peaks[0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_that_is_gone_leaves_no_memory_behind(model: torch.nn.Module, scheme: str, tmp_path: Path):
    sample = measure.timing_sample(examples(16), MeasurementProtocol(), CUDA)
    measure.peak_bytes(copy.deepcopy(model).to(CUDA), sample, CUDA, 0)  # the workspaces of the libraries
    gc.collect()
    before = torch.cuda.memory_allocated()
    loaded, _ = _loaded(model, scheme, tmp_path / "m")
    measure.peak_bytes(loaded, sample, CUDA, 0)
    del loaded
    assert torch.cuda.memory_allocated() == before


def test_the_base_model_is_timed_in_bf16_too(model: torch.nn.Module, tmp_path: Path):
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("needs a GPU that computes in bfloat16")
    (base, _), (half, _) = (_loaded(model, scheme, tmp_path / scheme) for scheme in ("fp32", "bf16"))
    assert abs(outputs(base, CUDA) - outputs(half, CUDA)).max() < 0.1
    sample = measure.timing_sample(examples(64), MeasurementProtocol(), CUDA)
    base_ms, half_ms = measure.latencies_ms([(base, sample), (half, sample)], MeasurementProtocol(max_passes=10), CUDA)
    assert len(base_ms) == len(half_ms) >= 5
    assert min(*base_ms, *half_ms) > 0


# --- every step, every family ---


@pytest.mark.parametrize("name", CASES)
def test_every_step_runs(name: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path):
    kind = "modernbert" if name == "threshold" else "bert"
    done = act(name, tiny_checkpoint(kind, layers=3, heads=4, hidden=64, ffn=96), CUDA, tmp_path / "beside")
    (tmp_path / "saved").mkdir()
    artifact.save(done, tmp_path / "saved")
    if name == "dynamic_int8":
        return
    moved, expected = artifact.load(tmp_path / "saved"), outputs(artifact.load(tmp_path / "saved", CUDA), CUDA)
    assert abs(outputs(moved, CPU) - expected).max() < 0.1
    assert abs(outputs(moved.to(CUDA), CUDA) - expected).max() < 1e-3
    assert abs(outputs(moved.to(CPU), CPU) - expected).max() < 0.1


@pytest.mark.parametrize("scheme", ["fp32", "bf16", "int8", "nf4"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_runs(kind: str, scheme: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path):
    on_gpu, _ = _loaded(load(tiny_checkpoint(kind, layers=2, heads=4, hidden=64, ffn=96)), scheme, tmp_path / "m")
    assert abs(outputs(on_gpu, CUDA) - outputs(artifact.load(tmp_path / "m"), CPU)).max() < 0.1


# --- whole tasks, and what can go wrong in them ---


def test_the_worker_does_a_task(tiny_checkpoint: Callable[..., Path], tmp_path: Path):
    store, task = _run_folder(tmp_path / "run", tiny_checkpoint("bert", layers=3))
    list(worker.run(str(store.root), [identity.task_id(task)]))
    outcome = store.outcome(identity.task_id(task))
    assert outcome is not None
    assert outcome.measurement is not None, outcome.failure
    assert outcome.measurement.device_type == "cuda"


def test_too_large_a_model_is_out_of_memory(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store, task = _run_folder(tmp_path / "run", tiny_checkpoint("bert", layers=3))
    monkeypatch.setattr(worker.Job, "_measure", lambda *args: torch.empty(2**46, device=CUDA))
    list(worker.run(str(store.root), [identity.task_id(task)]))
    outcome = store.outcome(identity.task_id(task))
    assert outcome is not None
    assert outcome.failure is not None
    assert outcome.failure.kind == "memory"


def _spoil(root: str, task_ids: list[str]) -> None:
    def measured(*args: object) -> None:
        torch.zeros(2, device=CUDA)[torch.tensor([5], device=CUDA)].cpu()

    worker.Job._measure = measured  # type: ignore[assignment,method-assign]
    Work(root, (tuple(task_ids),))()


def test_a_task_that_breaks_an_assertion_on_the_gpu_ends_its_process_well(tiny_checkpoint: Callable[..., Path], tmp_path: Path):
    store, task = _run_folder(tmp_path / "run", tiny_checkpoint("bert", layers=3))
    others = [store.add_task(task.model_copy(update={"seed": seed})) for seed in (1, 2)]
    process = multiprocessing.get_context("spawn").Process(target=_spoil, args=(str(store.root), others))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    first, second = (Store(store.root).outcome(task_id) for task_id in others)
    assert first is not None
    assert first.failure is not None
    assert (first.failure.kind, second) == ("error", None)
    assert "device-side assert" in first.failure.message


# --- training ---


def test_training_learns_under_autocast(model: torch.nn.Module):
    teacher = copy.deepcopy(model).to(CUDA)
    data = examples(64)
    (batch,) = (batch.to(CUDA) for batch in eval_batches(data, 64))
    before = float(losses.task_loss(CLASSIFICATION)(model.to(CUDA), batch).detach())
    on_gpu = Context(train=data, problem=CLASSIFICATION, device=CUDA, seed=0, teacher=lambda: teacher)
    step = Step(operator="distill", params={"epochs": 8, "batch_size": 8, "learning_rate": 1e-3})
    operator(step)(model, on_gpu)
    assert float(losses.task_loss(CLASSIFICATION)(model, batch).detach()) < before
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert isinstance(autocast(CUDA), torch.autocast) == torch.cuda.is_bf16_supported(including_emulation=False)


def test_a_head_is_scored_and_cut_on_the_gpu(model: torch.nn.Module):
    scored = operator(Step(operator="prune_heads", params={"count": 2}))
    on_cpu = scored(copy.deepcopy(model), context(model))
    on_gpu = scored(
        model.to(CUDA), Context(train=examples(), problem=CLASSIFICATION, device=CUDA, seed=0, teacher=lambda: model)
    )
    torch.testing.assert_close(logits(on_gpu.cpu()), logits(on_cpu), atol=1e-4, rtol=1e-4)


def test_a_two_of_four_model_runs_on_sparse_tensor_cores(model: torch.nn.Module, tmp_path: Path):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    step = Step(operator="sparsify", params={"pattern": "2:4", "permute": True, "precision": "fp16"})
    on_gpu = Context(train=examples(), problem=CLASSIFICATION, device=CUDA, seed=0, teacher=lambda: model)
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
    outputs = [measure.outputs(CLASSIFICATION, one, examples(), 8, CUDA) for one in (sparse, dense)]
    assert abs(outputs[0] - outputs[1]).max() < 0.01
    for path in paths:
        assert torch.equal(sparse.state_dict()[f"{path}.weight"], dense.get_submodule(path).weight)
    assert surgery.all_parameters(sparse) == surgery.all_parameters(dense)
    artifact.save(sparse, tmp_path / "twice")
    assert (tmp_path / "once" / artifact.WEIGHTS).read_bytes() == (tmp_path / "twice" / artifact.WEIGHTS).read_bytes()


@pytest.mark.parametrize("mode", [{"share": 0.5}, {"regularisation": 1.0}], ids=str)
def test_movement_pruning_cuts_on_the_gpu(model: torch.nn.Module, mode: dict[str, float], tmp_path: Path):
    step = Step(operator="movement_prune", params={"batch_size": 8, "epochs": 2, **mode})
    cut = operator(step)(model, Context(train=examples(), problem=CLASSIFICATION, device=CUDA, seed=0, teacher=lambda: model))
    assert next(cut.parameters()).is_cuda
    assert all(width % 64 == 0 for width in surgery.ffn_widths(cut))
    if "share" in mode:
        assert (sum(surgery.head_counts(cut)), sum(surgery.ffn_widths(cut))) == (6, 1536)
    artifact.save(cut, tmp_path)
    on_cpu = artifact.load(tmp_path)
    torch.testing.assert_close(logits(cut.cpu()), logits(on_cpu))
