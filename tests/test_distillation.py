"""Distillation: every loss against its formula, the teacher's outputs on disk against the teacher, and what is left behind."""

import copy
import dataclasses
import errno
import itertools
import json
import multiprocessing
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from hpc_compress import identity
from hpc_compress.config import ConfigError
from hpc_compress.data.batches import Encoded, eval_batches, train_batches
from hpc_compress.models import artifact, surgery
from hpc_compress.operators import Checkpoint, Context, operator
from hpc_compress.problems import PROBLEMS, Problem
from hpc_compress.problems.outputs import ask
from hpc_compress.store import Store
from hpc_compress.training import loop, losses, teaching
from hpc_compress.training.steps import Distill, FineTune
from hpc_compress.types import Base, Dataset, Genome, MeasurementProtocol, Step, Task
from hpc_compress.worker import Job

CLASSIFICATION = PROBLEMS["classification"]

CPU = torch.device("cpu")
HOW = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3}
UPDATES = 12  # of 24 examples in batches of 4


def examples(n: int = 24, regression: bool = False) -> Encoded:
    """Random token ids of lengths 3 to 12."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 13, n)
    labels = rng.normal(size=n).astype(np.float32) if regression else rng.integers(0, 2, n)
    ids = rng.integers(5, 30, lengths.sum()).astype(np.int32)
    return Encoded(ids, None, np.concatenate([[0], lengths.cumsum()]), labels, pad_id=1)


def kind(data: Encoded) -> Problem:
    """The problem that these labels are of."""
    return PROBLEMS["regression" if data.labels.dtype.kind == "f" else "classification"]


def load(folder: Path, regression: bool = False, noise: int | None = 0) -> nn.Module:
    """The checkpoint with noise on all weights, since fresh LayerNorms are alike and fresh biases are 0."""
    labels = () if regression else ("no", "yes")
    problem = PROBLEMS["regression" if regression else "classification"]
    model = problem.load_base(folder, labels, new_head=True, seed=0)
    if noise is not None:
        generator = torch.Generator().manual_seed(noise)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(params=["bert", "distilbert"])
def folder(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(request.param, layers=3)


@pytest.fixture
def bert(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("bert", layers=3)


def context(teacher: nn.Module, data: Encoded, seed: int = 0, **more: Any) -> Context:
    return Context(train=data, problem=kind(data), device=CPU, seed=seed, teacher=lambda: teacher, **more)


def written(folder: Path, teacher: nn.Module, data: Encoded) -> teaching.TeacherOutputs:
    folder.mkdir(parents=True)
    teaching.write(folder, kind(data), teacher, data, CPU)
    outputs = teaching.read(folder, data)
    assert outputs is not None
    return outputs


# --- losses ---


def tensors(layers: int, hidden: int = 8, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 5, hidden, generator=generator) for _ in range(layers)]


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])


def apart(one: torch.Tensor, other: torch.Tensor, mask: torch.Tensor, distance: str) -> float:
    """How far hidden states are apart, by the book: token by token, in double precision."""
    distances = []
    for i, j in itertools.product(*map(range, mask.shape)):
        a, b = one[i, j].detach().double().numpy(), other[i, j].detach().double().numpy()
        if mask[i, j]:
            cosine = a @ b / np.sqrt((a @ a) * (b @ b))
            distances.append(1 - cosine if distance == "cosine" else np.mean((a - b) ** 2))
    return float(np.mean(distances))


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_hidden_states_are_compared_on_real_tokens(distance: str):
    one, other = tensors(2)
    found = float(losses.hidden_loss(one, other, MASK, distance))
    assert found == pytest.approx(apart(one, other, MASK, distance), rel=1e-5)


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_the_distances_of_layers_are_their_hidden_losses(distance: str):
    own, others = tensors(2), tensors(4, seed=1)
    expected = [[apart(one, other, MASK, distance) for other in others] for one in own]
    np.testing.assert_allclose(losses.layer_distances(own, others, MASK, distance), expected, rtol=1e-4)


@pytest.mark.parametrize("seed", range(30))
def test_the_dynamic_match_is_the_best_of_all_in_order(seed: int):
    rng = np.random.default_rng(seed)
    teachers = int(rng.integers(1, 8))
    students = int(rng.integers(1, teachers + 1))
    distances = rng.random((students, teachers))
    ordered = itertools.combinations(range(teachers), students)
    best = min(ordered, key=lambda match: sum(distances[i, j] for i, j in enumerate(match)))
    assert losses.match_in_order(distances) == list(best)


def test_more_layers_than_the_teacher_has_can_not_be_matched():
    with pytest.raises(ValueError, match="matching=fixed"):
        losses.match_in_order(np.zeros((3, 2)))


@pytest.mark.parametrize("fixed", [None, [0, 2]])
def test_layers_learn_from_those_they_are_matched_with(fixed: list[int] | None):
    others = tensors(3)
    own = [others[1] + 0.1 * tensors(1, seed=1)[0], others[2] + 0.1 * tensors(1, seed=2)[0]]
    expected = np.mean([apart(a, others[b], MASK, "mse") for a, b in zip(own, fixed or [1, 2], strict=True)])
    assert float(losses.layers_loss(own, others, MASK, "mse", fixed)) == pytest.approx(expected, rel=1e-5)


WEIGHTS: list[dict[str, Any]] = [
    {},
    {"task": 0.5, "response": 0.25, "hidden": 2, "layers": 3, "temperature": 3, "hidden_distance": "mse"},
    {"task": 0, "hidden": 0, "response": 1.5},
    {"response": 0, "hidden": 0, "layers": 1},
]


@pytest.mark.parametrize("regression", [False, True], ids=["classes", "regression"])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_the_loss_is_the_weighted_sum(weights: dict[str, Any], regression: bool, folder: Path):
    student, teacher, how = load(folder, regression, 1), load(folder, regression, 2), Distill(**weights)
    (batch,) = eval_batches(examples(regression=regression), 32)
    problem = PROBLEMS["regression" if regression else "classification"]
    loss = losses.distillation_loss(problem, how.weights(), teaching.live(problem, teacher), fixed=[0, 1, 2])
    found = float(loss(student, batch).detach())

    learnt, taught = (model(**batch.inputs, output_hidden_states=True) for model in (student, teacher))
    mask = batch.inputs["attention_mask"]
    pairs = list(zip(learnt.hidden_states[1:], taught.hidden_states[1:], strict=True))
    distances = [apart(own, other, mask, how.hidden_distance) for own, other in pairs]
    z_s, z_t = learnt.logits.detach().double(), taught.logits.detach().double()
    if regression:
        task = float((z_s[:, 0] - batch.labels).square().mean())
        response, default = float((z_s - z_t).square().mean()), 0
    else:
        p_s, p_t = (torch.softmax(z / how.temperature, -1) for z in (z_s, z_t))
        task = float(-torch.softmax(z_s, -1)[range(len(batch)), batch.labels].log().mean())
        response, default = float((p_t * (p_t / p_s).log()).sum(-1).mean()), 1
    weight = default if how.response is None else how.response
    expected = how.task * task + weight * response + how.hidden * distances[-1] + how.layers * np.mean(distances)
    assert found == pytest.approx(expected, rel=1e-4)


def test_nothing_to_learn_from_the_teacher_is_refused():
    with pytest.raises(ConfigError, match="use fine_tune"):
        operator(Step(operator="distill", params={"response": 0, "hidden": 0}))


# --- students of other shapes ---


def test_a_layer_learns_from_the_layer_that_it_was(tiny_checkpoint: Callable[..., Path]):
    """With the last layers' distance left out, a student of unchanged layers is where its teacher is."""
    teacher = load(tiny_checkpoint("bert", layers=6))
    student = copy.deepcopy(teacher)
    surgery.drop_layers(student, [4, 5])
    (batch,) = eval_batches(examples(8), 8)
    how = Distill(task=0, response=0, hidden=0, layers=1)
    asked = teaching.live(CLASSIFICATION, teacher)
    loss = losses.distillation_loss(CLASSIFICATION, how.weights(), asked, fixed=surgery.origins(student))
    assert float(loss(student, batch)) == pytest.approx(0, abs=1e-6)
    even = losses.distillation_loss(CLASSIFICATION, how.weights(), asked, fixed=[1, 2, 4, 5])
    assert float(even(student, batch)) > 1e-3


def test_a_projection_starts_as_the_least_squares_fit(bert: Path, tiny_checkpoint: Callable[..., Path]):
    student, teacher, data = load(tiny_checkpoint("bert", hidden=16)), load(bert), examples(60)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    linear = teaching.projection(CLASSIFICATION, student, teaching.live(CLASSIFICATION, teacher), data, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    (batch,) = eval_batches(data, 60)
    real = batch.inputs["attention_mask"].bool()
    with torch.no_grad():
        own, wanted = (ask(CLASSIFICATION, model, batch, True).hidden[-1][real].double() for model in (student, teacher))
        residual = (own @ linear.weight.T.double() - wanted).square().sum()
    best = np.linalg.lstsq(own.numpy(), wanted.numpy(), rcond=None)[1].sum()
    assert float(residual) == pytest.approx(best, rel=1e-3)


def test_a_projection_is_trained_and_thrown_away(bert: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: Any):
    student, teacher, data = load(tiny_checkpoint("bert", hidden=16)), load(bert), examples()
    seen: dict[str, torch.Tensor] = {}
    fit = loop.fit

    def spy(*args: Any) -> float:
        (linear,) = args[-1]
        seen["before"] = linear.weight.detach().clone()
        result = fit(*args)
        seen["after"] = linear.weight.detach().clone()
        return result

    monkeypatch.setattr(loop, "fit", spy)
    names = [list(vars(student)), list(dict(student.named_modules())), list(student.state_dict())]
    acted = operator(Step(operator="distill", params=HOW))(student, context(teacher, data))
    assert [list(vars(acted)), list(dict(acted.named_modules())), list(acted.state_dict())] == names
    assert acted.config.hidden_size == 16
    assert seen["after"].shape == (32, 16)
    assert not torch.equal(seen["before"], seen["after"])


@pytest.mark.slow
def test_companions_change_nothing_for_the_model(bert: Path):
    """Even where their gradients are a million times larger."""
    data, how = examples(), FineTune(**HOW)
    alone, accompanied, companion = load(bert), load(bert), nn.Linear(3, 3)
    before = companion.weight.detach().clone()
    loop.fit(alone, data, losses.task_loss(CLASSIFICATION), how, 0, CPU)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return losses.task_loss(CLASSIFICATION)(model, batch) + 1e6 * companion(torch.ones(3)).square().sum()

    loop.fit(accompanied, data, loss, how, 0, CPU, None, None, [companion])
    assert same(alone.state_dict(), accompanied.state_dict())
    assert not torch.equal(before, companion.weight)
    assert companion.weight.grad is None


# --- the teacher's outputs ---


@pytest.mark.parametrize("regression", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["classes", "regression"])
def test_outputs_from_disk_are_the_teachers(regression: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(teaching, "CHUNK", 7)
    monkeypatch.setattr(teaching, "autocast", lambda device: nullcontext())  # bfloat16 hides what is asked here
    teacher, data = load(folder, regression), examples(regression=regression)
    problem = kind(data)
    outputs, asked = written(tmp_path / "t", teacher, data), teaching.live(problem, teacher)
    size = sum(path.stat().st_size for path in (tmp_path / "t").iterdir())
    assert size == teaching.outputs_bytes(problem, teacher, data) + 256
    student = load(folder, regression, noise=1)
    weights = Distill(response=1).weights()
    from_disk, from_model = (losses.distillation_loss(problem, weights, t) for t in (outputs.answer, asked))
    rng = np.random.default_rng(1)
    for batch in itertools.chain(eval_batches(data, 32), train_batches(data, 5, rng), train_batches(data, 1, rng)):
        ours, theirs = outputs.answer(batch, True), asked(batch, True)
        real = batch.inputs["attention_mask"].bool()
        torch.testing.assert_close(ours.outputs, theirs.outputs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.hidden[0][real].float(), theirs.hidden[-1][real], rtol=1e-3, atol=1e-3)
        assert not ours.hidden[0][~real].any()
        one, other = (float(loss(student, batch).detach()) for loss in (from_disk, from_model))
        assert one == pytest.approx(other, abs=1e-3)
    assert outputs.answer(batch, False).hidden == ()


@pytest.mark.slow
def test_with_outputs_on_disk_the_teacher_is_never_asked(bert: Path, tmp_path: Path):
    teacher, data = load(bert), examples()
    outputs = written(tmp_path / "t", teacher, data)
    asked: list[int] = []
    teacher.register_forward_pre_hook(lambda module, args: asked.append(1))
    operator(Step(operator="distill", params=HOW))(load(bert), context(teacher, data, taught=lambda: outputs.answer))
    assert not asked
    operator(Step(operator="distill", params=HOW))(load(bert), context(teacher, data, taught=lambda: None))
    assert len(asked) == UPDATES


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"layers": 1}, {"online": True}], ids=str)
def test_what_is_not_on_disk_is_asked_for_live(more: dict[str, Any], bert: Path):
    def taught() -> None:
        raise AssertionError("not these")

    operator(Step(operator="distill", params={**HOW, **more}))(load(bert), context(load(bert), examples(), taught=taught))


def _cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut off": lambda folder: _cut_off(folder / "hidden.npy"),
    "empty": lambda folder: (folder / "hidden.npy").write_bytes(b""),
    "text": lambda folder: (folder / "logits.npy").write_text("no numbers"),
    "missing": lambda folder: (folder / "logits.npy").unlink(),
    "of other examples": lambda folder: np.save(folder / "logits.npy", np.zeros((5, 2), np.float32)),
}


def run_folder(root: Path, checkpoint: Path, **config: Any) -> tuple[Store, Task]:
    """A run folder with one task of a distillation; `config`: what its run.json says."""
    store = Store(root)
    shutil.copytree(checkpoint, root / "base")
    (root / "data").mkdir()
    texts = [f"the {film} is {how}" for film in ("film", "plot", "end") for how in ("good", "great", "bad", "dull")] * 2
    table = pd.DataFrame({"text": texts, "label": [int("d" in text[-4:]) for text in texts]})
    for split in ("train", "search"):
        table.to_parquet(root / "data" / f"{split}.parquet", index=False)
    if config:
        words = {"name": "words"}
        plan = {"config": {"name": "run", "model": {"path": "tiny"}, "dataset": words, **config}}
        (root / "run.json").write_text(json.dumps(plan))
    task = Task(
        base=Base(name="tiny", fingerprint="0" * 16),
        dataset=Dataset(
            name="words", fingerprint="0" * 16, problem="classification", labels=("no", "yes"), metrics=("accuracy",)
        ),
        protocol=MeasurementProtocol(batch_size=8, sentences=8, warmup_passes=0, min_passes=2, max_passes=2),
        seed=0,
        genome=Genome(steps=(Step(operator="drop_layers"), Step(operator="distill", params=HOW))),
    )
    store.add_task(task)
    return store, task


def job(store: Store) -> Job:
    return Job(store, lambda what, done, total: None)


def taught(store: Store, task: Task) -> teaching.TeacherOutputs | None:
    """The stored outputs that a training would learn from."""
    teacher = job(store)._context(task, (), Step(operator="distill")).taught()
    return None if teacher is None else teacher.__self__


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], int]:
    """How often outputs were written so far, by any process."""
    write, log = teaching.write, tmp_path / "writes"

    def counted(*args: Any) -> None:
        with log.open("a") as stream:
            stream.write("w")
        write(*args)

    monkeypatch.setattr(teaching, "write", counted)
    return lambda: len(log.read_text()) if log.exists() else 0


@pytest.mark.slow
def test_outputs_are_computed_once_a_run(bert: Path, tmp_path: Path, writes: Callable[[], int]):
    store, task = run_folder(tmp_path / "run", bert)
    context_of = multiprocessing.get_context("fork")
    torch.set_num_threads(1)
    workers = [context_of.Process(target=taught, args=(store, task)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert writes() == 1
    found, again = taught(store, task), taught(store, task.model_copy(update={"genome": Genome()}))
    assert np.array_equal(found.hidden, again.hidden)
    assert writes() == 1
    taught(store, task.model_copy(update={"limit": 5}))
    assert writes() == 2
    store.keep_artifacts(set())
    assert sorted(len(np.load(path)) for path in (store.root / "teacher").glob("*/logits.npy")) == [5, 24]


@pytest.mark.parametrize(
    "damage",
    [pytest.param(harm, id=name, marks=[] if name == "cut off" else pytest.mark.slow) for name, harm in DAMAGES.items()],
)
def test_damaged_outputs_are_computed_again(damage: Callable[[Path], Any], bert: Path, tmp_path: Path):
    store, task = run_folder(tmp_path / "run", bert)
    whole = taught(store, task)
    expected = whole.outputs.copy(), whole.hidden.copy()
    (folder,) = (store.root / "teacher").iterdir()
    draft = folder.with_name(f".{folder.name}.0123abcd")  # as a killed writer leaves it
    draft.mkdir()
    damage(folder)
    found = taught(store, task)
    assert all(np.array_equal(*pair) for pair in zip(expected, (found.outputs, found.hidden), strict=True))
    assert set((store.root / "teacher").iterdir()) == {folder, draft}


def test_the_disk_bound_is_kept(bert: Path, tmp_path: Path, writes: Callable[[], int]):
    store, task = run_folder(tmp_path / "one", bert)
    bytes_ = teaching.outputs_bytes(CLASSIFICATION, job(store)._base_model(task), job(store)._examples(task, "train"))
    over, _ = run_folder(tmp_path / "over", bert, teacher_gb=0.999 * bytes_ / 1e9)
    under, _ = run_folder(tmp_path / "under", bert, teacher_gb=1.001 * bytes_ / 1e9)
    assert taught(over, task) is None
    assert (writes(), (over.root / "teacher").exists()) == (0, False)
    assert taught(under, task) is not None
    assert writes() == 1


@pytest.mark.slow
def test_a_full_disk_fails_no_distillation(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    store, task = run_folder(tmp_path / "run", bert)

    def full(folder: Path, *args: Any) -> None:
        (folder / "logits.npy").write_bytes(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(teaching, "write", full)
    worker = job(store)
    worker.settle(task)
    assert store.outcome(identity.task_id(task)).measurement is not None
    assert not any((store.root / "teacher").iterdir())
    assert [record.levelname for record in caplog.records if "goes on without storing" in record.message] == ["WARNING"]


@pytest.mark.slow
def test_a_workers_distillation_is_from_disk(bert: Path, tmp_path: Path, writes: Callable[[], int]):
    """And its weights are those of a worker that finds the outputs there."""
    (one, task), (other, _) = run_folder(tmp_path / "one", bert), run_folder(tmp_path / "other", bert)
    taught(other, task)
    for store in (one, other):
        job(store).settle(task)
        assert store.outcome(identity.task_id(task)).measurement is not None
    assert writes() == 2
    assert same(*(artifact.load(s.path(identity.master_key(task))).state_dict() for s in (one, other)))


# --- every variant ---

VARIANTS: dict[str, dict[str, Any]] = {
    "narrow, from disk": {"disk": True, "hidden_size": 16},
    "live": {},
    "from disk": {"disk": True},
    "layers": {"params": {"layers": 1, "hidden_distance": "mse"}},
    "dynamic, narrow": {"params": {"layers": 1, "matching": "dynamic"}, "hidden_size": 16},
    "online": {"params": {"online": True}},
    "regression": {"params": {"response": 1}, "regression": True},
}
QUICK = ("narrow, from disk", "online")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


class InterruptError(Exception):
    """As a signal handler of the launcher raises it."""


@pytest.fixture(
    params=[
        pytest.param(variant, id=name, marks=[] if name in QUICK else pytest.mark.slow) for name, variant in VARIANTS.items()
    ]
)
def distilled(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """A function from seed, checkpoint and the update after which it is interrupted, to the distilled student's weights."""
    variant = {"params": {}, "disk": False, "hidden_size": 32, "regression": False, **request.param}
    data = examples(regression=variant["regression"])
    teacher = load(tiny_checkpoint("bert", layers=3), variant["regression"], noise=1)
    small = tiny_checkpoint("bert", layers=2, hidden=variant["hidden_size"])
    stored = written(tmp_path / "teacher", teacher, data).answer if variant["disk"] else None
    told = teacher.state_dict()
    before = {name: tensor.clone() for name, tensor in told.items()}

    def distill(seed: int = 0, checkpoint: Checkpoint | None = None, until: int = 0) -> dict[str, torch.Tensor]:
        def progress(done: int, total: int) -> None:
            assert total == UPDATES
            if done == until:
                raise InterruptError

        around = context(teacher, data, seed, taught=lambda: stored, progress=progress, checkpoint=checkpoint)
        student = load(small, variant["regression"])
        torch.manual_seed(seed + 100)  # the caller's generator must play no part
        try:
            operator(Step(operator="distill", params={**HOW, **variant["params"]}))(student, around)
        except InterruptError:
            assert until
        assert same(before, told)
        assert not teacher.training
        return student.state_dict()

    return distill


@pytest.mark.slow
def test_an_interrupted_distillation_goes_on_to_equal_weights(distilled: Callable[..., Any], tmp_path: Path):
    checkpoint = Checkpoint(tmp_path / "state.pt", 0)
    whole = distilled()
    for until in (5, 8):
        assert not same(distilled(0, checkpoint, until), whole)
    assert same(distilled(0, checkpoint), whole)
    assert not same(distilled(1), whole)


@pytest.mark.slow
def test_an_online_teacher_learns_the_task(bert: Path, monkeypatch: pytest.MonkeyPatch):
    teacher, student, data = load(bert), load(bert, noise=1), examples(64)
    (batch,) = eval_batches(data, 64)
    asked = operator(Step(operator="distill", params={"epochs": 0.1}))(copy.deepcopy(student), context(teacher, data))
    assert not asked.training  # a live distillation comes first: it leaves hooks on the teacher, which are copied
    fit, companions = loop.fit, []
    monkeypatch.setattr(loop, "fit", lambda *args: (companions.extend(args[-1]), fit(*args)))
    before = [float(losses.task_loss(CLASSIFICATION)(model, batch).detach()) for model in (teacher, student)]
    params = {"epochs": 10, "batch_size": 8, "learning_rate": 2e-3, "online": True}
    operator(Step(operator="distill", params=params))(student, context(teacher, data))
    after = [float(losses.task_loss(CLASSIFICATION)(model, batch).detach()) for model in (*companions, student)]
    assert all(last < first - 0.05 for first, last in zip(before, after, strict=True))


@pytest.mark.slow
def test_the_teacher_is_neared(bert: Path, tmp_path: Path):
    teacher, student, data = load(bert, noise=1), load(bert, noise=2), examples(64)
    outputs = written(tmp_path / "t", teacher, data)
    (batch,) = eval_batches(data, 64)
    for weights in ({"task": 0}, {"task": 0, "layers": 1, "matching": "dynamic"}):
        how = Distill(**weights, epochs=8, batch_size=8, learning_rate=2e-3)
        loss = losses.distillation_loss(CLASSIFICATION, how.weights(), teaching.live(CLASSIFICATION, teacher))
        acted = copy.deepcopy(student).eval()
        before = float(loss(acted, batch).detach())
        around = dataclasses.replace(context(teacher, data), taught=lambda: outputs.answer)
        assert float(loss(how(acted, around), batch).detach()) < 0.7 * before


# --- in memory or on the disk ---


@pytest.mark.parametrize(("share", "mapped"), [(2.0, False), (1.9, True)])
def test_outputs_are_read_into_memory_where_they_fit(
    share: float, mapped: bool, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """At most half of what is free is taken."""
    data = examples()
    written(tmp_path / "outputs", load(bert), data)
    size = sum(file.stat().st_size for file in (tmp_path / "outputs").iterdir())
    monkeypatch.setattr(teaching, "free_bytes", lambda: int(share * size))
    outputs = teaching.read(tmp_path / "outputs", data)
    assert outputs is not None
    assert isinstance(outputs.hidden, np.memmap) == mapped


@pytest.mark.parametrize(
    ("groups", "expected_mb"),
    [
        ({}, 1000),
        ({"0::/job/step": {"job/memory.max": "500", "job/memory.stat": "200", "job/step/memory.max": "max"}}, 300),
        ({"0::/job": {"job/memory.max": "100", "job/memory.stat": "200"}}, 0),
        ({"4:cpu,memory:/job": {"memory/job/memory.limit_in_bytes": "700", "memory/job/memory.stat": "300"}}, 400),
        ({"4:cpu:/job": {"job/memory.max": "500"}}, 1000),
        ({"0::/job": {"job/memory.max": "what"}}, 0),
    ],
)
def test_free_memory_is_that_of_the_machine_and_of_its_control_groups(
    groups: dict[str, dict[str, str]], expected_mb: int, tmp_path: Path
):
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {1000 * 1024} kB\nHugePages_Total: 0\n")
    (tmp_path / "self" / "cgroup").write_text("".join(f"{line}\n" for line in groups))
    for name, value in (item for files in groups.values() for item in files.items()):
        path = tmp_path / "cgroups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        number = str(int(value) * 2**20) if value.isdigit() else value
        used = "total_rss" if name.startswith("memory/") else "anon"
        path.write_text(f"{used} {number}\nother 1\n" if name.endswith("stat") else f"{number}\n")
    assert teaching.free_bytes(tmp_path, tmp_path / "cgroups") == expected_mb * 2**20


def test_free_memory_is_known_here():
    assert teaching.free_bytes() > 0
