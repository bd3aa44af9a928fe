"""Contracts of surgery, operators and artifacts on tiny random encoders of every family, against exact oracles."""

import copy
import dataclasses
import errno
import hashlib
import io
import itertools
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from elsewhere import outputs_elsewhere
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from hpc_compress import identity, worker
from hpc_compress.config import ConfigError
from hpc_compress.data.batches import Encoded, eval_batches
from hpc_compress.deployment.quantization import quantize
from hpc_compress.models import artifact, modeling_hpc_compress, surgery
from hpc_compress.models.modeling_hpc_compress import linear_of
from hpc_compress.operators import Checkpoint, Context, operator
from hpc_compress.problems import PROBLEMS
from hpc_compress.store import Store
from hpc_compress.training import loop, losses, teaching
from hpc_compress.training.steps import Distill, FineTune
from hpc_compress.types import Base, Dataset, Genome, MeasurementProtocol, SearchError, Step, Task

CLASSIFICATION = PROBLEMS["classification"]

SCHEMES = ["fp16", "bf16", "int8", "nf4", "fp4"]
CPU = torch.device("cpu")


@pytest.fixture(params=["bert", "distilbert", "roberta", "electra"])
def model(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> nn.Module:
    return load(tiny_checkpoint(request.param, layers=3, heads=4, hidden=64, ffn=96))


def load(folder: Path, labels: tuple[str, ...] = ("no", "yes")) -> nn.Module:
    return PROBLEMS["classification" if labels else "regression"].load_base(folder, labels, new_head=True, seed=0)


def examples(n: int = 24, labels: np.ndarray | None = None) -> Encoded:
    """Random token ids of lengths 3 to 12."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 13, n)
    ids = rng.integers(5, 30, lengths.sum()).astype(np.int32)
    labels = rng.integers(0, 2, n) if labels is None else labels
    return Encoded(ids, None, np.concatenate([[0], lengths.cumsum()]), labels, pad_id=0)


@torch.no_grad()
def logits(model: nn.Module, data: Encoded | None = None) -> torch.Tensor:
    model.eval()
    return torch.cat([model(**batch.inputs).logits.float() for batch in eval_batches(data or examples(), 8)])


def context(model: nn.Module, seed: int = 0, data: Encoded | None = None) -> Context:
    regression = data is not None and data.labels.dtype.kind == "f"
    problem = PROBLEMS["regression" if regression else "classification"]
    return Context(train=data or examples(), problem=problem, device=CPU, seed=seed, teacher=lambda: model)


def reload(model: nn.Module, folder: Path) -> nn.Module:
    folder.mkdir()
    artifact.save(model, folder)
    return artifact.load(folder)


# --- cuts ---


def test_a_cut_head_equals_a_masked_head(model: nn.Module):
    size, names = surgery.head_size(model), surgery.family(model)
    heads = [0, 2]
    masked = linear_of(surgery.layers(model)[1], names.attention_out)
    columns = torch.tensor([head * size + offset for head in heads for offset in range(size)])
    kept = masked.weight.detach().clone()
    with torch.no_grad():
        masked.weight[:, columns] = 0
    expected = logits(model)
    with torch.no_grad():
        masked.weight.copy_(kept)
    surgery.prune_heads(model, 1, heads)
    assert surgery.head_counts(model) == [4, 2, 4]
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=3e-6)


def test_a_dropped_layer_equals_a_bypassed_layer(model: nn.Module):
    last = surgery.layers(model)[-1]
    handle = last.register_forward_hook(
        lambda module, args, output: (args[0], *output[1:]) if isinstance(output, tuple) else args[0]
    )
    expected = logits(model)
    handle.remove()
    operator(Step(operator="drop_layers"))(model, context(model))
    torch.testing.assert_close(logits(model), expected)


def test_cuts_shrink_what_is_stored(model: nn.Module, tmp_path: Path):
    def stored(name: str) -> int:
        reload(model, tmp_path / name)
        return (tmp_path / name / artifact.WEIGHTS).stat().st_size

    before, parameters = stored("before"), surgery.all_parameters(model)
    surgery.prune_heads(model, 0, [1])
    surgery.drop_layers(model, [2])
    assert before - stored("after") == pytest.approx(4 * (parameters - surgery.all_parameters(model)), rel=0.1)
    assert surgery.all_parameters(model) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "cut",
    [
        lambda model: surgery.drop_layers(model, [0, 1, 2]),
        lambda model: surgery.drop_layers(model, [3]),
        lambda model: surgery.prune_heads(model, 0, [4]),
        lambda model: surgery.prune_ffn(model, 0, [96]),
        lambda model: surgery.prune_hidden(model, range(64)),
        lambda model: operator(Step(operator="drop_layers", params={"count": 3}))(model, context(model)),
        lambda model: operator(Step(operator="prune_heads", params={"count": 13}))(model, context(model)),
    ],
)
def test_a_cut_of_what_is_not_there_or_of_everything_is_refused(model: nn.Module, cut: Callable[[nn.Module], None]):
    before = logits(model)
    with pytest.raises(ValueError, match=r"can't (remove|be removed)|leave"):
        cut(model)
    assert torch.equal(logits(model), before)


# --- precisions ---


def _saved(model: nn.Module, folder: Path) -> Path:
    folder.mkdir()
    artifact.save(model, folder)
    return folder


@pytest.mark.parametrize(("scheme", "bits"), [("fp16", 16), ("bf16", 16), ("int8", 8), ("nf4", 4), ("fp4", 4)])
def test_precision_shows_in_bytes_and_not_in_parameters(model: nn.Module, scheme: str, bits: int, tmp_path: Path):
    whole = _saved(model, tmp_path / "whole") / artifact.WEIGHTS
    encoder, total = surgery.encoder_parameters(model), surgery.all_parameters(model)
    quantized = quantize(model, scheme)
    small = _saved(quantized, tmp_path / "small") / artifact.WEIGHTS
    assert (surgery.encoder_parameters(quantized), surgery.all_parameters(quantized)) == (encoder, total)
    shrunk = total if bits == 16 else encoder
    saved = whole.stat().st_size - small.stat().st_size
    assert 0.6 * shrunk * (32 - bits) / 8 < saved < 1.01 * shrunk * (32 - bits) / 8


def test_quantized_heads_and_embeddings_stay_exact(model: nn.Module):
    quantized = quantize(model, "nf4")
    kinds = {name: type(module).__name__ for name, module in quantized.named_modules() if isinstance(module, nn.Linear)}
    assert all((kind == "Linear4bit") == ("layer." in name) for name, kind in kinds.items())


def test_the_scales_of_int8_keep_their_precision(model: nn.Module):
    """bitsandbytes' kernels for GPUs read them in fp32 only. (Moves to a GPU are in test_pretend_gpu.py.)"""
    quantized = quantize(model, "int8")
    scales = [buffer for name, buffer in quantized.half().named_buffers() if name.endswith("SCB")]
    assert len(scales) == 18
    assert all(scale.dtype == torch.float32 for scale in scales)


# --- training ---


@pytest.mark.slow
def test_training_learns_and_distillation_nears_the_teacher(tiny_checkpoint: Callable[..., Path]):
    model = load(tiny_checkpoint("distilbert", layers=3, heads=4, hidden=64, ffn=96))
    teacher = copy.deepcopy(model)
    data = examples(64)
    step = {"epochs": 8, "batch_size": 8, "learning_rate": 2e-3, "warmup": 0.0}
    batches = list(eval_batches(data, 64))
    before = float(losses.task_loss(CLASSIFICATION)(model.eval(), batches[0]))
    operator(Step(operator="fine_tune", params=step))(model, context(teacher, data=data))
    assert float(losses.task_loss(CLASSIFICATION)(model, batches[0])) < before - 0.05
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    loss = losses.distillation_loss(CLASSIFICATION, Distill().weights(), teaching.live(CLASSIFICATION, teacher))
    apart = float(loss(model, batches[0]))
    operator(Step(operator="distill", params=step))(model, context(teacher, data=data))
    assert float(loss(model, batches[0])) < apart


def test_the_distillation_loss_is_the_published_sum():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 5, 8, generator=generator) for _ in "ab")
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    cosines = [
        1 - float(nn.functional.cosine_similarity(student[i, j], teacher[i, j], dim=0))
        for i in range(3)
        for j in range(5)
        if mask[i, j]
    ]
    assert float(losses.hidden_loss(student, teacher, mask)) == pytest.approx(np.mean(cosines), rel=1e-5)
    z_s, z_t = student[:, 0, :4], teacher[:, 0, :4]
    p_t, p_s = torch.softmax(z_t / 3, -1), torch.softmax(z_s / 3, -1)
    assert float(CLASSIFICATION.response_loss(z_s, z_t, 1, 3)) == pytest.approx(
        float((p_t * (p_t / p_s).log()).sum(-1).mean()), rel=1e-5
    )
    assert float(CLASSIFICATION.response_loss(z_t, z_t, 1, 3)) == pytest.approx(0, abs=1e-6)


def test_how_far_a_regression_is_from_the_base_model_has_no_unit():
    generator, regression = torch.Generator().manual_seed(0), PROBLEMS["regression"]
    said, wanted = (torch.randn(50, 1, generator=generator) for _ in "ab")
    divergence = regression.divergence(said, wanted)
    assert float(divergence) == pytest.approx(float((said - wanted).square().mean() / wanted.var(correction=0)))
    torch.testing.assert_close(regression.divergence(100 * said + 7, 100 * wanted + 7), divergence)


def test_regression_trains_on_squared_error(tiny_checkpoint: Callable[..., Path]):
    model = load(tiny_checkpoint("bert"), labels=())
    data = examples(32, np.linspace(0, 5, 32, dtype=np.float32))
    (batch,) = eval_batches(data, 32)
    expected = (model(**batch.inputs).logits[:, 0] - batch.labels).square().mean()
    assert float(losses.task_loss(PROBLEMS["regression"])(model, batch)) == pytest.approx(float(expected))
    operator(Step(operator="distill", params={"epochs": 1, "batch_size": 8}))(model, context(copy.deepcopy(model), data=data))


def test_a_loss_that_is_not_finite_stops_with_advice(tiny_checkpoint: Callable[..., Path]):
    model = load(tiny_checkpoint("bert"))
    step = operator(Step(operator="fine_tune"))
    with pytest.raises(FloatingPointError, match="learning_rate"):
        loop.fit(model, examples(), lambda m, b: losses.task_loss(CLASSIFICATION)(m, b) * torch.nan, step, 0, CPU)


def test_training_leaves_the_callers_random_state_alone(tiny_checkpoint: Callable[..., Path]):
    model = load(tiny_checkpoint("bert"))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    operator(Step(operator="fine_tune"))(model, context(model))
    assert torch.equal(torch.get_rng_state(), state)


def test_words_that_no_example_uses_keep_their_embeddings(tiny_checkpoint: Callable[..., Path]):
    model = load(tiny_checkpoint("bert"))
    embedding = model.get_input_embeddings()
    before = embedding.weight.detach().clone()
    data = examples()
    operator(Step(operator="fine_tune", params={"learning_rate": 1e-2, "batch_size": 8}))(model, context(model, data=data))
    used = np.unique(data.input_ids)
    unused = np.setdiff1d(np.arange(len(before)), [*used, data.pad_id])
    assert torch.equal(embedding.weight[unused], before[unused])
    assert not torch.equal(embedding.weight[used], before[used])


# --- interrupted training ---

TRAINED = [
    Step(operator=name, params={"epochs": 2, "batch_size": 4, "learning_rate": 1e-3}) for name in ("fine_tune", "distill")
]
UPDATES = 12  # of 24 examples in batches of 4; 6 an epoch


class InterruptError(Exception):
    """As a signal handler of the launcher raises it."""


class Trained:
    """What a step makes of the tiny checkpoint: from its start or its checkpoint, to its end or to an interruption."""

    def __init__(self, folder: Path, step: Step, checkpoint: Checkpoint | None = None, until: int = 0, seed: int = 0) -> None:
        self.done: list[int] = []  # updates, as reported
        self.weights: dict[str, torch.Tensor] = {}

        def progress(done: int, total: int) -> None:
            assert total == UPDATES
            self.done.append(done)
            if done == until:
                raise InterruptError

        around = dataclasses.replace(context(load(folder), seed), progress=progress, checkpoint=checkpoint)
        try:
            self.weights = operator(step)(load(folder), around).state_dict()
        except InterruptError:
            assert until

    def equals(self, other: "Trained") -> bool:
        return same_weights(self.weights, other.weights)


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture
def bert(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("bert")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path / "not yet" / "state.pt", 0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("step", TRAINED, ids=str)
def test_an_interrupted_training_goes_on_to_equal_weights(
    family: str, step: Step, tiny_checkpoint: Callable[..., Path], checkpoint: Checkpoint
):
    folder = tiny_checkpoint(family)
    whole = Trained(folder, step)
    parts = [Trained(folder, step, checkpoint, until) for until in (4, 6, 9, 0)]  # 6: the border of two epochs
    assert [part.done for part in parts] == [[1, 2, 3, 4], [5, 6], [7, 8, 9], [10, 11, 12]]
    assert parts[-1].equals(whole)
    assert [path.name for path in checkpoint.path.parent.iterdir()] == ["state.pt"]
    unlike = operator(step)(load(folder), context(load(folder), seed=1)).state_dict()
    assert not same_weights(unlike, whole.weights)


def test_a_training_that_went_on_tells_the_same_loss(bert: Path, checkpoint: Checkpoint):
    step = operator(TRAINED[0])
    whole = loop.fit(load(bert), examples(), losses.task_loss(CLASSIFICATION), step, 0, CPU)
    Trained(bert, TRAINED[0], checkpoint, 11)  # the mean goes over the last two updates, of which it saw one
    assert loop.fit(load(bert), examples(), losses.task_loss(CLASSIFICATION), step, 0, CPU, checkpoint=checkpoint) == whole


def test_a_checkpoint_is_not_saved_before_its_time(bert: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    clock = itertools.count()  # a second at every look
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))
    Trained(bert, TRAINED[0], Checkpoint(checkpoint.path, 100.0), 11)
    assert not checkpoint.path.exists()
    Trained(bert, TRAINED[0], Checkpoint(checkpoint.path, 3.0), 5)  # saved after 3 updates
    assert Trained(bert, TRAINED[0], checkpoint).done[0] == 4


class Harm:
    """Runs code where it is unpickled."""

    done: ClassVar[list[str]] = []

    def __reduce__(self) -> Any:
        return _harm, ()


def _harm() -> None:
    Harm.done.append("harm")


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "short": lambda content: content[:20],
    "cut off": lambda content: content[: len(content) // 2],
    "one byte cut off": lambda content: content[:-1],
    "one bit of a weight": lambda content: (
        (at := len(content) // 2) and content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    ),
    "page of zeros": lambda content: content[:8192] + bytes(4096) + content[12288:],
    "text": lambda content: b"no checkpoint at all\n" * 100,
    "pickle": lambda content: pickle.dumps({"signature": ""}),
    "other values": lambda content: _digested(["no", "dict"]),
    "what could do harm": lambda content: _digested({"signature": Harm()}),
}


def _digested(values: object) -> bytes:
    stream = io.BytesIO()
    torch.save(values, stream)
    return stream.getvalue() + hashlib.sha256(stream.getvalue()).digest()


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_ignored(
    damage: Callable[[bytes], bytes], bert: Path, checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
):
    Trained(bert, TRAINED[0], checkpoint, 5)
    checkpoint.path.write_bytes(damage(checkpoint.path.read_bytes()))
    again = Trained(bert, TRAINED[0], checkpoint)
    assert again.done[0] == 1
    assert again.equals(Trained(bert, TRAINED[0]))
    assert not Harm.done
    assert [record.levelname for record in caplog.records if "starts anew" in record.message] == ["WARNING"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [{"learning_rate": 2e-3}, {"warmup": 0.5}, {"seed": 1}, {"operator": "distill"}, {"family": "roberta"}, {"layers": 1}],
    ids=str,
)
def test_the_checkpoint_of_another_training_is_ignored(
    other: dict[str, Any], tiny_checkpoint: Callable[..., Path], checkpoint: Checkpoint
):
    Trained(tiny_checkpoint("bert"), TRAINED[0], checkpoint, 5)
    other = dict(other)
    folder = tiny_checkpoint(other.pop("family", "bert"), layers=other.pop("layers", 2))
    seed, name = other.pop("seed", 0), other.pop("operator", "fine_tune")
    step = Step(operator=name, params={**TRAINED[0].params, **other})
    again = Trained(folder, step, checkpoint, seed=seed)
    assert again.done[0] == 1
    assert again.equals(Trained(folder, step, seed=seed))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["below a file", "a folder"])
def test_a_checkpoint_that_can_not_be_saved_fails_no_training(
    where: str, bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    path = tmp_path / "file" / "state.pt" if where == "below a file" else tmp_path / "folder"
    assert Trained(bert, TRAINED[0], Checkpoint(path, 0)).equals(Trained(bert, TRAINED[0]))
    assert sum("goes on without" in record.message for record in caplog.records) == UPDATES - 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_what_is_not_finite_is_not_saved(bert: Path, checkpoint: Checkpoint):
    updates = itertools.count(1)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return losses.task_loss(CLASSIFICATION)(model, batch) * (torch.nan if next(updates) == 4 else 1)

    with pytest.raises(FloatingPointError):
        loop.fit(load(bert), examples(), loss, operator(TRAINED[0]), 0, CPU, checkpoint=checkpoint)
    assert Trained(bert, TRAINED[0], checkpoint).done[0] == 4


CHAIN = ["fine_tune", "fine_tune", "fine_tune", "distill"]  # two steps prepare the base model; the last two are the task's
REPORTS = [(name, done, UPDATES) for name in CHAIN for done in range(1, UPDATES + 1)]


def _run_folder(root: Path, checkpoint: Path) -> tuple[Store, Task]:
    """A run folder with one task, ready for a worker."""
    store = Store(root)
    shutil.copytree(checkpoint, root / "base")
    (root / "data").mkdir()
    texts = [f"the {film} is {how}" for film in ("film", "plot", "end") for how in ("good", "great", "bad", "dull")] * 2
    table = pd.DataFrame({"text": texts, "text2": "", "label": [int("d" in text[-4:]) for text in texts]})
    for split in ("train", "search"):
        table.to_parquet(root / "data" / f"{split}.parquet", index=False)
    task = Task(
        base=Base(name="tiny", fingerprint="0" * 16, preparation=(TRAINED[0], TRAINED[0])),
        dataset=Dataset(
            name="words", fingerprint="0" * 16, problem="classification", labels=("no", "yes"), metrics=("accuracy",)
        ),
        protocol=MeasurementProtocol(batch_size=8, sentences=8, warmup_passes=0, min_passes=2, max_passes=2),
        seed=0,
        genome=Genome(steps=(TRAINED[0], Step(operator="drop_layers"), TRAINED[1])),
    )
    store.add_task(task)
    return store, task


@pytest.mark.slow
@pytest.mark.parametrize(("positive", "f1"), [("duplicate", 0.4), ("not_duplicate", 0.0)])
def test_the_worker_takes_f1_of_the_positive_class(
    positive: str, f1: float, tiny_checkpoint: Callable[..., Path], tmp_path: Path
):
    store, task = _run_folder(tmp_path / "run", tiny_checkpoint("bert"))
    classes = {"labels": ("duplicate", "not_duplicate"), "metrics": ("f1",), "positive": positive}
    task = task.model_copy(update={"dataset": task.dataset.model_copy(update=classes)})
    model = load(tiny_checkpoint("bert"))
    with torch.no_grad():  # it calls everything a duplicate; of the rows, a quarter are
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([1.0, 0.0]))
    found = worker.Job(store, lambda what, done, total: None).quality(task, model, tmp_path, CPU).metrics
    assert found == {"f1": pytest.approx(f1)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("died_after", "goes_on_with"),
    [
        (17, [REPORTS[11], *REPORTS[17:]]),  # the last update of a step is not saved, since its model is about to be
        (29, REPORTS[29:]),
        (36, REPORTS[35:]),
        (40, REPORTS[40:]),
    ],
)
def test_a_task_that_was_interrupted_goes_on_where_it_was(
    died_after: int, goes_on_with: list[tuple[str, int, int]], tiny_checkpoint: Callable[..., Path], tmp_path: Path
):
    folder = tiny_checkpoint("bert", layers=3, head=False)
    store, task = _run_folder(tmp_path / "interrupted", folder)
    other, _ = _run_folder(tmp_path / "whole", folder)
    task_id, key = identity.task_id(task), identity.master_key(task)
    told: list[tuple[str, int, int]] = []

    def report(*what: Any) -> None:
        told.append(what)
        if len(told) == died_after:
            raise InterruptError

    with pytest.raises(InterruptError):
        list(worker.run(str(store.root), [task_id], report, interrupts=(InterruptError,), checkpoint_seconds=0))
    assert told == REPORTS[:died_after]
    assert store.outcome(task_id) is None
    assert any((store.root / "checkpoints").iterdir())
    if died_after > 36:
        assert store.artifact(identity.master_key(task, task.genome.steps[:2]))
    list(worker.run(str(store.root), [task_id], report, interrupts=(InterruptError,), checkpoint_seconds=0))
    assert told[died_after:] == goes_on_with
    assert not any((store.root / "checkpoints").iterdir())

    list(worker.run(str(other.root), [task_id]))
    assert not (other.root / "checkpoints").exists()
    assert {path.name for path in other.path("").iterdir()} == {key, identity.master_key(task, ()), "tokenizer"}
    assert same_weights(*(artifact.load(run.path(key)).state_dict() for run in (store, other)))
    assert store.outcome(task_id).measurement.metrics == other.outcome(task_id).measurement.metrics


@pytest.mark.parametrize(
    ("error", "of_the_machine"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (ValueError("count=3 would leave no layer of 3"), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_is_wrong_with_the_machine_is_no_outcome(
    error: Exception, of_the_machine: bool, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store, task = _run_folder(tmp_path / "run", bert)

    def fails(self: worker.Job, *args: Any) -> None:
        raise error

    monkeypatch.setattr(worker.Job, "_measure", fails)
    run = worker.run(str(store.root), [identity.task_id(task)])
    if of_the_machine:
        with pytest.raises(type(error)):
            list(run)
        assert store.outcome(identity.task_id(task)) is None
    else:
        list(run)
        failure = store.outcome(identity.task_id(task)).failure
        assert failure.kind == ("memory" if isinstance(error, torch.OutOfMemoryError) else "error")
        assert str(error) in failure.message


def test_a_full_disk_ends_a_search_with_a_line(setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*arguments: Any, **more: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(artifact, "save_file", full)
    with pytest.raises(SearchError, match=r"no room left for .* \(No space left on device\)"):
        setup.run(tmp_path / "run", "probe=false", "generations=0")


# --- steps and artifacts ---


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (Step(operator="prune_head"), "choose one of drop_layers"),
        (Step(operator="no.such.Thing"), "can't be imported"),
        (Step(operator="drop_layers", params={"count": 0}), "greater than or equal to 1"),
        (Step(operator="drop_layers", params={"cuont": 1}), "did you mean count"),
        (Step(operator="quantize", params={"scheme": "int3"}), "'int8'"),
    ],
)
def test_a_step_that_can_not_be_is_refused(step: Step, words: str):
    with pytest.raises(ConfigError, match=words):
        operator(step)


def test_a_head_of_another_size_is_trained_anew_or_refused(tiny_checkpoint: Callable[..., Path]):
    folder = tiny_checkpoint("bert", num_labels=2)
    assert logits(CLASSIFICATION.load_base(folder, ("a", "b", "c"), new_head=True, seed=0)).shape[1] == 3
    one, other = (CLASSIFICATION.load_base(folder, ("a", "b", "c"), new_head=True, seed=s) for s in (0, 1))
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    with pytest.raises((ValueError, RuntimeError)):
        CLASSIFICATION.load_base(folder, ("a", "b", "c"), new_head=False, seed=0)


def test_weights_that_do_not_fit_are_never_guessed(model: nn.Module, tmp_path: Path):
    folder = _saved(model, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["heads"][0] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError)):
        artifact.load(folder)


# --- kinds of models ---


def test_a_model_is_saved_and_loaded_as_its_kind(tiny_checkpoint: Callable[..., Path], tmp_path: Path):
    """By the class of the stock model, and by `architectures` in config.json, as in run folders of earlier versions."""
    folder = tiny_checkpoint("bert", layers=3, heads=4, hidden=64, ffn=96)
    ids = torch.tensor([[2, 9, 8, 7, 3], [2, 5, 6, 11, 3]])
    for auto_class in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        name = auto_class.__name__.removeprefix("AutoModel")
        model = auto_class.from_pretrained(folder)
        surgery.prune_heads(model, 1, [0, 3])
        surgery.drop_layers(model, [2])
        loaded = reload(model, tmp_path / name)
        assert type(loaded) is type(model)
        assert same_weights(loaded.state_dict(), model.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=2e-6)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["architectures"] == [f"HpcCompress{name}"]
        assert config["auto_map"] == {
            "AutoConfig": "modeling_hpc_compress.HpcCompressConfig",
            auto_class.__name__: f"modeling_hpc_compress.HpcCompress{name}",
        }


def test_a_kind_that_is_not_known_is_named(bert: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="a BertForMaskedLM can't be saved in this form"):
        artifact.save(AutoModelForMaskedLM.from_pretrained(bert), tmp_path)
    folder = _saved(load(bert), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    for architectures in (["Evil"], [], None):
        (folder / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
        with pytest.raises(ValueError, match=r"names the architecture '.*'; this version loads HpcCompressForSeq"):
            artifact.load(folder)


@pytest.mark.slow
def test_exported_models_load_without_the_package(tiny_checkpoint: Callable[..., Path], tmp_path: Path):
    """In a process that can't import hpc_compress, by transformers alone, with equal outputs; saved again by it as well."""
    ids = [[2, 9, 8, 7, 3], [2, 5, 6, 11, 3]]
    expected = {}
    for scheme in (None, *SCHEMES):
        model = load(tiny_checkpoint("bert", layers=3, heads=4, hidden=64, ffn=96))
        surgery.prune_heads(model, 1, [0, 3])
        surgery.drop_layers(model, [2])
        model = quantize(model, scheme) if scheme else model
        folder = _saved(model, tmp_path / str(scheme))
        shutil.copy(modeling_hpc_compress.__file__, folder)
        with torch.no_grad():
            expected[str(scheme)] = model(input_ids=torch.tensor(ids)).logits.double().tolist()
    found = outputs_elsewhere(tmp_path, list(expected), {"input_ids": ids})
    assert {scheme: found[scheme] for scheme in expected} == expected
    assert {scheme: found[scheme + "-saved-again"] for scheme in expected} == expected


def test_no_config_chooses_the_code_of_attention_and_no_weights_are_unpickled(bert: Path, tmp_path: Path):
    folder = Path(shutil.copytree(bert, tmp_path / "model"))
    values = json.loads((folder / "config.json").read_text())
    kernel = {"attn_implementation": "some/kernel", "_attn_implementation": "some/kernel"}
    (folder / "config.json").write_text(json.dumps(values | kernel))
    model = CLASSIFICATION.load_base(folder, ("a", "b"), new_head=True, seed=0)
    (tmp_path / "saved").mkdir()
    artifact.save(model, tmp_path / "saved")
    values = json.loads((tmp_path / "saved/config.json").read_text())
    (tmp_path / "saved/config.json").write_text(json.dumps(values | {"stock": values["stock"] | kernel}))
    artifact.load(tmp_path / "saved")
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        CLASSIFICATION.load_base(folder, ("a", "b"), new_head=True, seed=0)


def test_the_learning_rate_rises_and_falls_in_straight_lines(bert: Path, monkeypatch: pytest.MonkeyPatch):
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def noting(self: Any, *arguments: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    how = FineTune(epochs=5, batch_size=8, learning_rate=1.0, warmup=0.4)
    loop.fit(load(bert), examples(16), losses.task_loss(CLASSIFICATION), how, 0, CPU)
    assert rates == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, *(n / 6 for n in (6, 5, 4, 3, 2, 1))])
