"""The code for GPUs, run on a GPU that is not there: every operator, saving, loading, moving, measuring, and a whole task."""

import copy
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import wants_gpu
from pretend_gpu import CPU, CUDA, WORKSPACE_BYTES, Memory, MixedDevicesError, pretend_gpu
from test_models import _run_folder, examples, load
from test_operators import STEPS, TRAINING
from torch import nn
from transformers import AutoTokenizer

from hpc_compress import identity, measure, profiling, worker
from hpc_compress.deployment import sparsity
from hpc_compress.deployment.quantization import quantize
from hpc_compress.models import artifact, surgery
from hpc_compress.models.modeling_hpc_compress import FAMILIES
from hpc_compress.operators import OPERATORS, Context, operator
from hpc_compress.problems import PROBLEMS
from hpc_compress.training import teaching
from hpc_compress.types import Genome, MeasurementProtocol, Outcome, Profiling, SpentError, Step

CLASSIFICATION = PROBLEMS["classification"]


@pytest.fixture
def gpu() -> Iterator[Memory]:
    with pretend_gpu() as memory:
        yield memory


# --- the pretence itself ---


@pytest.mark.parametrize(
    "mix",
    [
        lambda cpu, gpu: cpu + gpu,
        lambda cpu, gpu: gpu @ cpu,
        lambda cpu, gpu: torch.cat([gpu, cpu]),
        lambda cpu, gpu: gpu.add_(cpu),
        lambda cpu, gpu: cpu * gpu.sum(),  # a number on the GPU meets a matrix on the CPU
        lambda cpu, gpu: cpu[(gpu > 0).nonzero()[:, 0]],
        lambda cpu, gpu: nn.functional.embedding(torch.tensor([0, 1]), gpu),
        lambda cpu, gpu: torch.optim.AdamW([nn.Parameter(gpu)], fused=True) and nn.Linear(2, 2).to("cuda")(cpu),
        lambda cpu, gpu: torch.zeros(2, 2, device="cuda").copy_(gpu).where(cpu > 0, gpu),
    ],
)
def test_what_cuda_refuses_is_refused(mix: Callable[[torch.Tensor, torch.Tensor], Any], gpu: Memory):
    with pytest.raises(MixedDevicesError, match="same device"):
        mix(torch.ones(2, 2), torch.ones(2, 2, device="cuda"))


def test_what_cuda_refuses_of_numpy_and_pinned_memory_is_refused(gpu: Memory):
    there = torch.ones(2, device="cuda")
    for refused in (lambda: there.numpy(), lambda: np.asarray(there), lambda: there.pin_memory()):
        with pytest.raises((TypeError, RuntimeError), match=r"can't convert|cannot pin"):
            refused()


def test_what_cuda_takes_is_taken(gpu: Memory):
    here, there = torch.ones(2, 2), torch.ones(2, 2).to("cuda")
    made = [
        there * torch.tensor(2.0),  # a number on the CPU
        there[torch.tensor([0, 1])],  # an index on the CPU
        torch.zeros_like(here, device="cuda") + there,
        there.new_zeros(2) + torch.arange(2, device=there.device),
        torch.zeros(2, 2, device=CUDA).copy_(here),
        copy.deepcopy(there),
        nn.Linear(2, 2).cuda()(there).detach(),
        here.pin_memory().to(CUDA, non_blocking=True),
    ]
    assert all(tensor.is_cuda and tensor.device == CUDA for tensor in made)
    assert not any(tensor.cpu().is_cuda for tensor in made)
    assert np.array_equal(made[0].cpu().numpy(), [[2, 2], [2, 2]])
    parameter = nn.Parameter(here.clone())
    (parameter.to("cuda") * there).sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.device == CPU
    torch.testing.assert_close(parameter.grad, here)


def test_the_allocator_counts_what_lives(gpu: Memory):
    tensor = torch.ones(256, device="cuda")
    view = tensor[:2]
    del tensor
    assert torch.cuda.memory_allocated() == 1024
    (view.sum() + view.sum()).item()
    assert torch.cuda.max_memory_allocated() == 1024 + 3 * 4
    del view
    assert torch.cuda.memory_allocated() == 0


def test_the_gpu_is_gone_after_the_block():
    with pretend_gpu():
        left = torch.ones(2).to("cuda")
    assert not torch.cuda.is_available()
    assert left.device == CPU


# --- every step ---

FORMS = {
    "drop the last layer": Step(operator="drop_layers"),
    "prune blocks": Step(operator="prune", params={"share": 0.3, "units": ["blocks"], "repair": True}),
    "prune locally": Step(operator="prune", params={"share": 0.3, "scope": "local", "criterion": "taylor", "ffn_multiple": 8}),
    "prune in rounds": Step(
        operator="prune", params={"share": 0.3, "rounds": 2, "ffn_multiple": 8, "training": {**TRAINING, "epochs": 0.5}}
    ),
    **{
        f"prune by {criterion}": Step(operator="prune", params={"share": 0.3, "criterion": criterion, "ffn_multiple": 8})
        for criterion in ("gauss_newton", "magnitude", "obs", "activation_mean", "apoz", "similarity")
    },
    "prune heads, repaired": Step(
        operator="prune_heads", params={"count": 2, "where": "any", "criterion": "taylor", "repair": True}
    ),
    "prune hidden by magnitude": Step(
        operator="prune_hidden", params={"share": 0.25, "multiple": 16, "criterion": "magnitude"}
    ),
    "soft movement": Step(operator="movement_prune", params={"regularisation": 1.0, "units": ["ffn"], **TRAINING}),
    "distill as published": Step(operator="distill", params=TRAINING),
    "distill from files": Step(operator="distill", params=TRAINING),
    "distill online": Step(operator="distill", params={"online": True, **TRAINING}),
    "distill dynamically": Step(
        operator="distill", params={"layers": 1, "matching": "dynamic", "hidden_distance": "mse", **TRAINING}
    ),
    "distill a narrow student": Step(operator="distill", params=TRAINING),
    "2:4 in fp16": Step(operator="sparsify", params={"pattern": "2:4", "criterion": "magnitude", "precision": "fp16"}),
    "gptq in int8": Step(operator="quantize", params={"scheme": "int8", "rest": "fp16", "method": "gptq"}),
    "fp4 embeddings": Step(operator="quantize", params={"scheme": "fp16", "embeddings": "fp4"}),
    "int4 embeddings": Step(operator="quantize", params={"scheme": "bf16", "embeddings": "int4"}),
}
CASES = STEPS | FORMS
TRAINS = {"movement_prune", "fine_tune", "distill"}  # in bf16 on this GPU, and perhaps in fp32 on the CPU
slow = pytest.mark.slow


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(request.param, layers=3, heads=4, hidden=64, ffn=96)


def act(name: str, folder: Path, on: torch.device, out: Path) -> nn.Module:
    """What the case makes of the checkpoint on a device."""
    out.mkdir()
    teacher, model, data = load(folder).to(on), load(folder).to(on), examples(16)
    family = surgery.family(model)
    if family.shared_bias and CASES[name].operator == "prune_heads":
        pytest.skip("heads go alike in all layers of this family: prune does it")
    if family.gate is None and name == "threshold":
        pytest.skip("only gated FFNs have gates")
    step = CASES[name]
    if family.shared_bias and name == "movement_prune":
        step = step.model_copy(update={"params": {**step.params, "units": ["ffn"]}})
    if name == "distill a narrow student":
        surgery.prune_hidden(model, range(16))
    taught = None
    if name == "distill from files":
        (out / "teacher").mkdir()
        teaching.write(out / "teacher", CLASSIFICATION, teacher, data, on)
        stored = teaching.read(out / "teacher", data)
        taught = stored and stored.answer
    around = Context(
        train=data,
        problem=CLASSIFICATION,
        device=on,
        seed=5,
        teacher=lambda: teacher,
        taught=lambda: taught,
        tokenizer=lambda: AutoTokenizer.from_pretrained(folder),
        folder=out,
    )
    return operator(step)(model, around)


def outputs(model: nn.Module, on: torch.device) -> np.ndarray:
    return measure.outputs(CLASSIFICATION, model, examples(16), 8, on)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_step_runs_on_a_gpu(name: str, folder: Path, gpu: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sparsity, "ROUNDS", 2)  # of the search for an order of columns; 30 take most of a minute here
    done = act(name, folder, CUDA, tmp_path / "gpu")
    (tmp_path / "saved").mkdir()
    artifact.save(done, tmp_path / "saved")
    if name == "dynamic_int8":
        with pytest.raises(RuntimeError, match="runs on a CPU only"):
            outputs(artifact.load(tmp_path / "saved", CUDA), CUDA)
        return
    loaded = artifact.load(tmp_path / "saved", CUDA)
    # What bitsandbytes packs for saving, its settings as text, is always on the CPU.
    assert all(tensor.is_cuda for path, tensor in loaded.state_dict().items() if "bitsandbytes__" not in path)
    there = outputs(loaded, CUDA)
    if CASES[name].operator not in TRAINS and "training" not in CASES[name].params:
        np.testing.assert_array_equal(there, outputs(act(name, folder, CPU, tmp_path / "cpu").cpu(), CPU))
    here = artifact.load(tmp_path / "saved")
    np.testing.assert_array_equal(there, outputs(here, CPU))
    # Moved after its first forward pass, and back.
    np.testing.assert_array_equal(there, outputs(here.to(CUDA), CUDA))
    np.testing.assert_array_equal(there, outputs(here.to(CPU), CPU))
    for model, again in ((loaded, tmp_path / "once"), (here, tmp_path / "twice")):
        again.mkdir()
        artifact.save(model, again)
        assert (again / artifact.WEIGHTS).read_bytes() == (tmp_path / "saved" / artifact.WEIGHTS).read_bytes()


def test_no_operator_is_left_out():
    assert {step.operator for step in CASES.values()} == set(OPERATORS)


def test_gates_of_a_quantized_model_are_thresholded_on_a_gpu(gpu: Memory, tiny_checkpoint: Callable[..., Path]):
    folder = tiny_checkpoint("modernbert", layers=3, heads=4, hidden=64, ffn=96)

    def both(on: torch.device) -> nn.Module:
        model = quantize(load(folder), "int8").to(on)
        around = Context(train=examples(16), problem=CLASSIFICATION, device=on, seed=5, teacher=lambda: model)
        return operator(Step(operator="threshold"))(model, around)

    np.testing.assert_array_equal(outputs(both(CUDA), CUDA), outputs(both(CPU), CPU))


# --- ordinary tests see no GPU ---


@pytest.mark.parametrize(
    ("markexpr", "wants"),
    [
        ("", False),
        ("not slow and not gpu", False),
        ("not  gpu", False),
        ("slurm", False),
        ("gpu", True),
        ("gpu and not slow", True),
        ("not (slow or gpu)", False),
        ("not slow", False),
        ("gpu or slow", True),
        ("gpu and slow", True),
        ("not (not gpu)", True),
        ("gpu and (", False),
    ],
)
def test_a_gpu_is_used_only_where_it_is_asked_for(markexpr: str, wants: bool):
    assert wants_gpu(markexpr) == wants


def test_ordinary_tests_see_no_gpu(request: pytest.FixtureRequest):
    assert wants_gpu(request.config.option.markexpr) or os.environ["CUDA_VISIBLE_DEVICES"] == ""


# --- measuring ---


@pytest.mark.slow
def test_a_peak_is_the_models_own_bytes_and_those_of_one_pass(folder: Path, gpu: Memory):
    sample = measure.timing_sample(examples(16), MeasurementProtocol(batch_size=8), CUDA)
    other = load(folder).to(CUDA)
    before = measure.allocated_bytes(CUDA)
    model = load(folder).to(CUDA)
    own_bytes = measure.allocated_bytes(CUDA) - before
    assert own_bytes == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert not gpu.workspace
    peak = measure.peak_bytes(model, sample, CUDA, own_bytes)
    assert gpu.workspace
    assert peak is not None
    assert own_bytes < peak < own_bytes + WORKSPACE_BYTES
    assert measure.peak_bytes(model, sample, CUDA, own_bytes) == peak
    del other
    assert measure.peak_bytes(model, sample, CUDA, own_bytes) == peak


@pytest.mark.slow
def test_what_only_a_reference_cycle_holds_is_not_allocated(gpu: Memory):
    gc.collect()
    gc.disable()
    try:
        before = measure.allocated_bytes(CUDA)
        cycle: list[Any] = [torch.ones(256, device="cuda")]
        cycle.append(cycle)
        del cycle
        assert torch.cuda.memory_allocated() > before
        assert measure.allocated_bytes(CUDA) == before
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_table_of_block_times_holds_one_cut_model_at_a_time(folder: Path, gpu: Memory):
    model = load(folder).to(CUDA)
    batches = measure.timing_sample(examples(8), MeasurementProtocol(batch_size=8), CUDA)
    measure._pass_ms(model, batches, CUDA)

    def peak(work: Callable[[], Any]) -> int:
        torch.cuda.reset_peak_memory_stats(CUDA)
        with torch.inference_mode():
            work()
        return torch.cuda.max_memory_allocated(CUDA)

    shapes = [(heads, 0) for heads in range(5)] + [(0, 6 * part) for part in range(1, 17)]
    alone = [peak(lambda shape=shape: measure._pass_ms(measure._with_blocks(model, *shape), batches, CUDA)) for shape in shapes]
    assert peak(lambda: measure.block_times(model, batches, MeasurementProtocol(min_passes=2, max_passes=2), CUDA)) == max(
        alone
    )


@pytest.mark.slow
def test_a_device_is_profiled_in_its_best_precision_too(folder: Path, gpu: Memory):
    model, bf16 = load(folder).to(CUDA), Step(operator="quantize", params={"scheme": "bf16"})
    context = Context(train=examples(), problem=CLASSIFICATION, device=CUDA, seed=0, teacher=lambda: model)
    protocol = MeasurementProtocol(batch_size=4, base_precision="bf16")
    sparse = (Step(operator="sparsify", params={"share": 0.5}),)
    found = profiling.profile(Profiling(deploys=(sparse,), seconds=0.1), model, protocol, context)
    assert found.device_type == "cuda"
    assert [block.deploy for block in found.blocks] == [(), (bf16,), sparse]
    assert next(model.parameters()).device == CUDA


@slow
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_a_quantized_model_leaves_nothing_behind(scheme: str, folder: Path, gpu: Memory, tmp_path: Path):
    artifact.save(quantize(load(folder), scheme), tmp_path)
    gc.collect()
    gc.disable()  # what only the collector of reference cycles would find counts as left behind
    try:
        before = torch.cuda.memory_allocated()
        model = artifact.load(tmp_path, CUDA)
        assert torch.cuda.memory_allocated() > before
        del model
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()


# --- whole tasks ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cost", "scheme", "precision"),
    [("parameters", "nf4", "best"), pytest.param("time", "int8", "fp32", marks=slow)],
)
def test_the_worker_does_a_task_on_a_gpu(cost: str, scheme: str, precision: str, folder: Path, gpu: Memory, tmp_path: Path):
    """From task.json to outcome.json: preparation, cut, distillation from files, quantization, measuring."""
    store, task = _run_folder(tmp_path / "run", folder)
    prune = Step(operator="prune", params={"share": 0.3, "cost": cost, "ffn_multiple": 8, "criterion": "magnitude"})
    distill = Step(operator="distill", params={**TRAINING, "epochs": 0.5})
    genome = Genome(steps=(prune, distill), deploy=(Step(operator="quantize", params={"scheme": scheme, "rest": "bf16"}),))
    protocol = task.protocol.model_copy(update={"device": "cuda", "base_precision": precision})
    task = task.model_copy(update={"protocol": protocol})
    preparation = (Step(operator="fine_tune", params={**TRAINING, "epochs": 0.5}),)
    task = task.model_copy(update={"genome": genome, "base": task.base.model_copy(update={"preparation": preparation})})
    task_id = store.add_task(task)
    assert list(worker.run(str(store.root), [task_id])) == [task_id]
    outcome = store.outcome(task_id)
    assert outcome is not None
    measured = outcome.measurement
    assert measured is not None, outcome.failure
    assert (measured.device_type, measured.device) == ("cuda", "pretend A100")
    assert measured.enqueue_share is not None
    assert measured.base_best_precision == ("bf16" if precision == "best" else None)
    assert measured.peak_bytes is not None
    assert measured.model_bytes < measured.peak_bytes < WORKSPACE_BYTES
    assert sum(1 for _ in (store.root / "teacher").iterdir()) == 1


class Counter:
    """The library of the driver, with a counter of millijoules."""

    class NVMLError(Exception):
        pass

    def __init__(self, *readings: Any) -> None:
        self.readings, self.asked, self.opened = iter(readings), "", 0

    def nvmlInit(self) -> None:  # noqa: N802, its name
        self.opened += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.opened -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.asked = uuid
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        reading = next(self.readings)
        if isinstance(reading, Exception):
            raise reading
        return reading


def test_the_energy_of_a_gpu_is_what_its_counter_says(monkeypatch: pytest.MonkeyPatch):
    counter = Counter(2500, Counter.NVMLError("not supported"))
    monkeypatch.setitem(sys.modules, "pynvml", counter)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda on: SimpleNamespace(uuid="1-2"))
    assert measure.joules(CUDA) == 2.5
    assert counter.asked == "GPU-1-2"
    assert measure.joules(CUDA) is None
    assert counter.opened == 0
    monkeypatch.setattr(counter, "nvmlInit", lambda: (_ for _ in ()).throw(Counter.NVMLError("no driver")))
    assert measure.joules(CUDA) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert measure.joules(CUDA) is None
    assert measure.joules(CPU) is None


@pytest.mark.parametrize(
    ("readings", "wanted"), [((10.0, 35.0), 25.0), ((None,), None), ((10.0, None), None), ((9.0, 1.0), 0.0)]
)
def test_an_outcome_holds_the_energy_of_its_task(
    readings: tuple[float | None, ...], wanted: float | None, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    store, task_id = _failing(tmp_path, folder, monkeypatch, ValueError("no"))
    told = iter(readings)
    monkeypatch.setattr(measure, "joules", lambda on: next(told))
    list(worker.run(str(store.root), [task_id]))
    assert store.outcome(task_id).joules == wanted
    assert ("joules" in (store.root / "tasks" / task_id / "outcome.json").read_text()) == (wanted is not None)


def _failing(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> tuple[Any, str]:
    def fails(self: worker.Job, *args: Any) -> None:
        raise error

    store, task = _run_folder(tmp_path / "run", folder)
    monkeypatch.setattr(worker.Job, "_measure", fails)
    return store, identity.task_id(task)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    ],
)
def test_libraries_without_memory_are_out_of_memory(
    message: str, folder: Path, gpu: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store, task_id = _failing(tmp_path, folder, monkeypatch, RuntimeError(message))
    assert list(worker.run(str(store.root), [task_id])) == [task_id]
    assert store.outcome(task_id).failure.kind == "memory"


def test_a_task_that_spoils_the_gpu_has_its_outcome_before_the_process_ends(
    folder: Path, gpu: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assertion = RuntimeError("CUDA error: device-side assert triggered")
    store, task_id = _failing(tmp_path, folder, monkeypatch, assertion)

    def spoilt(device: Any = None) -> None:
        raise assertion

    monkeypatch.setattr(torch.cuda, "synchronize", spoilt)
    with pytest.raises(SpentError, match="device-side assert"):
        list(worker.run(str(store.root), [task_id, "never reached"]))
    failure = store.outcome(task_id).failure
    assert (failure.kind, "device-side assert" in failure.message) == ("error", True)


@pytest.mark.parametrize("change", [0.0, 0.125])
def test_a_model_that_was_computed_again_is_measured_again(
    change: float, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    store, task = _run_folder(tmp_path / "run", folder)
    task = task.model_copy(update={"genome": Genome(), "base": task.base.model_copy(update={"preparation": ()})})
    task_id = store.add_task(task)
    list(worker.run(str(store.root), [task_id]))
    measured = store.outcome(task_id).measurement
    shifted = measured.model_copy(update={"metrics": {"accuracy": measured.metrics["accuracy"] + change}})
    (store.root / "tasks" / task_id / "outcome.json").unlink()
    store.settle(Outcome(task=task, measurement=shifted, host="", seconds={}))
    store.keep_artifacts(set())
    worker.restore(store.root, task)
    assert store.artifact(identity.deployed_key(task))
    assert [record.levelname for record in caplog.records if "computed again" in record.message] == ["WARNING"] * bool(change)


@pytest.mark.slow
def test_a_model_of_a_gpu_can_be_computed_again_without_one(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    store, task = _run_folder(tmp_path / "run", folder)
    task = task.model_copy(update={"genome": Genome(), "base": task.base.model_copy(update={"preparation": ()})})
    task = task.model_copy(update={"protocol": task.protocol.model_copy(update={"device": "cuda"})})
    task_id = store.add_task(task)
    with pretend_gpu():
        list(worker.run(str(store.root), [task_id]))
    assert store.outcome(task_id).measurement.device_type == "cuda"
    store.keep_artifacts(set())
    worker.restore(store.root, task)
    assert store.artifact(identity.deployed_key(task))
    assert "torch sees none here" in caplog.text
