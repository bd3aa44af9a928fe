"""Sentence embeddings: suites and their scores, pairs and their losses, encoders and their exports, whole searches."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from searches import Setup, story, through_kills
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoTokenizer

from hpc_compress import analysis, config, export, splits
from hpc_compress.config import ConfigError, DatasetConfig, ModelConfig, Suite
from hpc_compress.data import suites
from hpc_compress.data.batches import eval_batches, train_batches
from hpc_compress.models import artifact, pretrained, surgery
from hpc_compress.models.modeling_hpc_compress import FAMILIES
from hpc_compress.operators import Context, operator
from hpc_compress.problems import PROBLEMS, problem_of
from hpc_compress.problems.embedding import Embedding, Losses
from hpc_compress.pruning import criteria
from hpc_compress.training import losses, teaching
from hpc_compress.training.steps import Distill
from hpc_compress.types import Dataset, Step

CPU = torch.device("cpu")
EMBEDDING = Embedding()
WORDS = ["good", "great", "bad", "dull", "film", "plot", "the", "very", "is", "was", "not", "an", "it", "and"]


def texts(n: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(2, 9))) for _ in range(n)]


def encoder(folder: Path, target: Path, **settings: Any) -> Any:
    """The base model as a run would load it."""
    model = ModelConfig(path=str(folder), **settings)
    found = pretrained.find(model)
    pretrained.adopt(found, model, target, True, EMBEDDING.described(found.folder, model))
    return EMBEDDING.load_base(target, (), False, 0)


def dataset(pair: bool, **losses: float) -> Dataset:
    return Dataset(
        name="d", fingerprint="0" * 16, problem="embedding", labels=(), pair=pair, metrics=("mean_score",), losses=losses
    )


def train_table(pair: bool, n: int = 24) -> pd.DataFrame:
    return pd.DataFrame({"text": texts(n), "text2": texts(n, 1) if pair else "", "label": np.arange(n)})


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


# --- scores ---


def rows_of(kind: str, n: int, **columns: Any) -> pd.DataFrame:
    frame = pd.DataFrame(
        {"text": [f"a{i}" for i in range(n)], "text2": [f"b{i}" for i in range(n)], "label": "", "part": "test"}
    )
    return frame.assign(task=kind, kind=kind, **columns)


def score(rows: pd.DataFrame, vectors: dict[str, Any]) -> float:
    known, first, second = suites.texts(rows)
    said = suites.answers(rows, first, second, np.array([vectors[text] for text in known], dtype=float))
    return list(suites.scores(rows, said).values())[1]


def test_similarity_is_ranked_by_cosine_whatever_the_lengths():
    rows = rows_of("sts", 3, label=["1", "2", "5"])
    angles = {"a0": 0, "b0": 2.0, "a1": 0, "b1": 1.0, "a2": 0, "b2": 0.5}
    vectors = {name: (1 + at) * np.array([np.cos(angle), np.sin(angle)]) for at, (name, angle) in enumerate(angles.items())}
    assert score(rows, vectors) == pytest.approx(1)
    assert score(rows.assign(label=["5", "2", "1"]), vectors) == pytest.approx(-1)
    assert score(rows, {name: [1, 0] for name in angles}) == 0


def test_pairs_are_found_by_average_precision():
    rows = rows_of("pairs", 4, label=["1", "", "1", ""])
    cosines = [0.9, 0.8, 0.7, 0.1]
    vectors = {f"a{i}": [1, 0] for i in range(4)} | {f"b{i}": [c, np.sqrt(1 - c * c)] for i, c in enumerate(cosines)}
    assert score(rows, vectors) == pytest.approx((1 / 1 + 2 / 3) / 2)


def test_retrieval_counts_both_ways_and_equal_texts_as_found():
    rows = rows_of("retrieval", 3)
    vectors = {"a0": [1, 0, 0], "b0": [1, 0, 0], "a1": [0, 1, 0], "b1": [0, 1, 0.1], "a2": [0, 1, 0.2], "b2": [0, 0, 1]}
    # There: a0 finds b0, a1 finds b1, a2 finds b1. Back: b0, b1 (a1 is nearer than a2?), b2 finds a2.
    unit = {name: np.array(v) / np.linalg.norm(v) for name, v in vectors.items()}
    table = np.array([[unit[f"a{i}"] @ unit[f"b{j}"] for j in range(3)] for i in range(3)])
    wanted = ((table.argmax(1) == range(3)).mean() + (table.argmax(0) == range(3)).mean()) / 2
    assert score(rows, vectors) == pytest.approx(wanted)
    assert wanted < 1
    same = rows.assign(text2=["b0", "b1", "b1"])
    assert score(same, vectors | {"a2": [0, 1, 0.15]}) > wanted


def test_a_classifier_is_fit_to_its_own_part():
    rng = np.random.default_rng(0)
    rows = rows_of("classification", 60, text2="").assign(part=["fit"] * 40 + ["test"] * 20)
    vectors = rng.normal(size=(60, 4))
    labels = np.where(vectors[:, 0] + 0.5 * rng.normal(size=60) > 0, "x", "y")
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    wanted = LogisticRegression(C=10, max_iter=1000).fit(unit[:40], labels[:40]).score(unit[40:], labels[40:])
    assert score(rows.assign(label=labels), {f"a{i}": vector for i, vector in enumerate(vectors)}) == pytest.approx(wanted)
    assert 0.5 < wanted < 1


def test_quality_is_the_mean_of_the_tasks_and_the_trivial_encoder_knows_nothing():
    rows = pd.concat([rows_of("sts", 4, label=["1", "2", "3", "4"]), rows_of("pairs", 4, label=["1", "", "", ""])])
    found = EMBEDDING.score(dataset(False), rows, np.random.default_rng(0).normal(size=(8, 3)))
    assert list(found) == ["mean_score", "sts", "pairs"]
    assert found["mean_score"] == pytest.approx((found["sts"] + found["pairs"]) / 2)
    assert EMBEDDING.trivial(dataset(False), rows) == {"mean_score": 0.125, "sts": 0, "pairs": 0.25}


# --- rows ---


def write_suite(folder: Path, n: int = 60) -> Suite:
    """Four tasks of the four kinds."""
    rng = np.random.default_rng(0)
    one, other = texts(n, 2), texts(n, 3)
    pairs = pd.DataFrame({"text": one, "text2": other, "label": rng.integers(0, 6, n)})
    pairs.to_csv(folder / "sts.csv", index=False)
    pairs.assign(label=np.arange(n) % 2).to_csv(folder / "pairs.csv", index=False)
    for name, seed in (("train", 4), ("dev", 5)):
        single = texts(n, seed)
        labels = ["pos" if ("good" in text or "great" in text) else "neg" for text in single]
        pd.DataFrame({"text": single, "english": single, "label": labels}).to_csv(folder / f"{name}.csv", index=False)
    both = {"text": "text", "text2": "text2"}
    tasks = {
        "similar": {"kind": "sts", "report": "sts.csv", "label": "label", **both},
        "same": {"kind": "pairs", "report": "pairs.csv", "label": "label", **both},
        "found": {"kind": "retrieval", "report": "sts.csv", **both},
        "feeling": {
            "kind": "classification",
            "train": "train.csv",
            "report": "dev.csv",
            "label": "label",
            "fit_text": "english",
        },
    }
    return config.validate(Suite, {"folder": str(folder), "tasks": tasks})


def settings(folder: Path, suite: Suite | None, **more: Any) -> DatasetConfig:
    values = {"name": "lines", "train": str(folder / "lines.txt"), "problem": "embedding", "metrics": ["mean_score"], **more}
    return config.validate(DatasetConfig, {**values, "suite": None if suite is None else suite.model_dump()})


def test_every_task_has_its_own_search_and_report_rows(tmp_path: Path):
    suite = write_suite(tmp_path)
    (tmp_path / "lines.txt").write_text("\n".join([*texts(40, 9), "the plot was good \u2028 very"]) + "\n")
    found, tables, rows = splits.load(settings(tmp_path, suite), seed=0)
    assert found.metrics == ("mean_score",)
    assert not found.pair
    for name, task in tables["search"].groupby("task"):
        other = tables["report"][tables["report"]["task"] == name]
        keys = [
            set(zip(t["text"], t["text2"], strict=True)) for t in (task[task["part"] == "test"], other[other["part"] == "test"])
        ]
        assert not keys[0] & keys[1]
        assert all(keys)
        assert ("fit" in set(task["part"])) == (name == "feeling")
    fit = tables["report"].query("part == 'fit'")
    assert not set(fit["text"]) & set(tables["report"].query("part == 'test' and task == 'feeling'")["text"])
    again = splits.load(settings(tmp_path, suite), seed=0)[0]
    assert again.fingerprint == found.fingerprint
    assert rows.trivial["search"]["similar"] == 0


def test_what_is_scored_is_not_trained_on(tmp_path: Path):
    suite = write_suite(tmp_path)
    scored = pd.read_csv(tmp_path / "sts.csv")["text2"].tolist()
    (tmp_path / "lines.txt").write_text("\n".join([*texts(20, 9), *(text.upper() + "!" for text in scored)]) + "\n")
    _, tables, rows = splits.load(settings(tmp_path, suite), seed=0)
    assert 0 < len(tables["train"]) <= 20
    assert rows.unused >= len(scored)
    (tmp_path / "lines.txt").write_text("\n".join(scored) + "\n")
    with pytest.raises(ConfigError, match="every row of lines shares a text"):
        splits.load(settings(tmp_path, suite), seed=0)


def test_rows_that_lack_a_text_are_not_scored_and_shift_no_others(tmp_path: Path):
    suite = write_suite(tmp_path)
    (tmp_path / "lines.txt").write_text("\n".join(texts(40, 9)) + "\n")
    train = pd.read_csv(tmp_path / "train.csv")
    train["english"] = [f"{text} in english" for text in train["english"]]
    train.loc[0, "english"] = ""
    train.to_csv(tmp_path / "train.csv", index=False)
    pairs = pd.read_csv(tmp_path / "pairs.csv")
    pairs.loc[[3, 5], "text2"] = ""
    pairs.to_csv(tmp_path / "pairs.csv", index=False)
    _, tables, _ = splits.load(settings(tmp_path, suite), seed=0)
    search = tables["search"]
    fit, tested = (search.query(f"task == 'feeling' and part == '{part}'")["text"] for part in ("fit", "test"))
    assert len(fit)
    assert not set(fit.str.removesuffix(" in english")) & set(tested)
    both = pd.concat([table[table["task"] == "same"] for table in tables.values() if "task" in table])
    assert len(both) == len(pairs) - 2
    assert (both["text2"] != "").all()


def test_rows_of_a_suite_are_limited_task_by_task(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"would cut tasks out of dataset\.suite"):
        EMBEDDING.check(settings(tmp_path, write_suite(tmp_path), max_search_rows=50))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"similar": {"report": "none.csv"}}, "none.csv does not exist"),
        ({"similar": {"label": "stars"}}, "'stars' is not a column of dataset.suite.tasks.similar"),
        ({"feeling": {"kind": "sts", "text2": "english", "fit_text": None}}, "labels of kind=sts are numbers"),
        ({"same": {"positive": "yes"}}, "none of the search split's pairs have the label positive='yes'"),
        ({"same": {"text2": None}}, "kind=pairs needs text2"),
        ({"feeling": {"train": None}}, "kind=classification needs train"),
        ({"found": {"kind": "guess"}}, "must be 'sts', 'pairs'"),
        ({"found": {"rows": 1}}, "greater than or equal to 2"),
    ],
)
def test_a_suite_with_a_mistake_is_answered(tmp_path: Path, change: dict[str, Any], words: str):
    tasks = write_suite(tmp_path).model_dump()["tasks"]
    (tmp_path / "lines.txt").write_text("\n".join(texts(30, 9)))
    (name, values), *_ = change.items()
    suite = {"folder": str(tmp_path), "tasks": {**tasks, name: {**tasks[name], **values}}}
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        splits.load(config.validate(DatasetConfig, {**settings(tmp_path, None).model_dump(), "suite": suite}), seed=0)


def test_parallel_files_are_read_line_by_line_and_of_one_length(tmp_path: Path):
    (tmp_path / "lines.txt").write_text("good film\nbad plot\nthe \u2028 end\n" + "\n".join(texts(30)))
    (tmp_path / "ru").write_text("one\ntwo\nthree\n" + "\n".join(texts(30, 1)) + "\n")
    parallel = settings(tmp_path, None, parallel=str(tmp_path / "ru"))
    found, tables, _ = splits.load(parallel, seed=0)
    assert found.pair
    rows = pd.concat(tables.values())
    assert len(rows) == 33
    assert dict(zip(rows["text"], rows["text2"], strict=True))["the \u2028 end"] == "three"
    with (tmp_path / "ru").open("a") as stream:
        stream.write("one more\n")
    with pytest.raises(ConfigError, match=r"has 33 lines and .*ru has 34"):
        splits.load(parallel, seed=0)
    with pytest.raises(ConfigError, match="is no file"):
        splits.load(settings(tmp_path, None, parallel=str(tmp_path / "none")), seed=0)


def test_a_text_without_its_pair_is_told(tmp_path: Path):
    pd.DataFrame({"text": ["a", "b", "c"], "text2": ["x", " ", "z"]}).to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(ConfigError, match=r"1 of 3 rows of split '.*rows.csv' of lines have one text of a pair only.*row 2"):
        splits.load(settings(tmp_path, None, train=str(tmp_path / "rows.csv"), text2="text2"), seed=0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "there is neither"),
        ({"text2": "b", "losses": {"near": 1}}, "losses.near is not a known loss; allowed here: closeness, contrastive"),
        ({"text2": "b", "losses": {"closeness": -1}}, "closeness=-1.0 is too low"),
        ({"text2": "b", "losses": {"cosine": 0}}, "cosine and mse are both 0"),
        ({"text2": "b", "parallel": "c"}, "both give second texts"),
        ({"text2": "b", "metrics": ["accuracy"]}, "use mean_score"),
        ({"parallel": "c", "validation": "d"}, "so dataset.validation would have none"),
        ({"problem": "classification", "metrics": ["accuracy"], "parallel": "c"}, "dataset.parallel has no effect"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path: Path, values: dict[str, Any], words: str):
    asked = settings(tmp_path, None, **values)
    with pytest.raises(ConfigError, match=words):
        PROBLEMS[asked.problem].check(asked)


def test_what_needs_pairs_or_a_contrast_is_refused_before_any_job():
    def check(step: Step, pair: bool, **losses: float) -> None:
        given = dataset(pair, **losses)
        problem_of(given).check_step(step, given)

    fine_tune, taylor = Step(operator="fine_tune"), Step(operator="prune", params={"criterion": "taylor"})
    check(fine_tune, True)
    check(taylor, True, contrastive=0)
    check(Step(operator="distill"), False)
    for step in (fine_tune, taylor):
        with pytest.raises(ConfigError, match="needs pairs of texts"):
            check(step, False)
    with pytest.raises(ConfigError, match="all texts one embedding"):
        check(fine_tune, True, contrastive=0)


# --- batches and losses ---


@pytest.mark.parametrize("size", [1, 4, 5])
def test_no_batch_parts_a_pair(tokenizer: Any, size: int):
    encoded = EMBEDDING.encode(tokenizer, train_table(pair=True), dataset(True))
    assert len(encoded) == 48
    for batches in (train_batches(encoded, size, np.random.default_rng(0)), eval_batches(encoded, size)):
        seen = []
        for batch in batches:
            assert len(batch) <= max(2, size)
            assert all(np.bincount(batch.labels.numpy())[batch.labels.numpy()] == 2)
            seen += batch.index.tolist()
        assert sorted(seen) == list(range(48))
    part = encoded.take(5)
    assert sorted(index for batch in eval_batches(part, 4) for index in batch.index.tolist()) == list(range(5))


def test_the_loss_of_pairs_is_that_of_its_formula():
    torch.manual_seed(0)
    outputs, order = torch.randn(6, 5), torch.tensor([2, 0, 4, 1, 3, 5])
    targets = torch.tensor([0, 0, 1, 1, 2, 2])
    one, other = (torch.nn.functional.normalize(outputs[at::2], dim=-1) for at in (0, 1))
    cosines = one @ other.T
    near = (1 - cosines.diagonal()).mean()
    scaled = cosines / 0.1
    contrast = -(scaled.log_softmax(1).diagonal().mean() + scaled.log_softmax(0).diagonal().mean()) / 2
    problem = Embedding(Losses(closeness=2, contrastive=3, temperature=0.1))
    for rows in (torch.arange(6), order):
        torch.testing.assert_close(problem.task_loss(outputs[rows], targets[rows]), 2 * near + 3 * contrast)
    single = problem.task_loss(outputs.requires_grad_(), torch.arange(6))
    assert single == 0
    assert not torch.autograd.grad(single, outputs)[0].any()


def test_the_loss_to_the_teacher_is_that_of_its_formula():
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    cosine = (1 - torch.nn.functional.cosine_similarity(student, teacher)).mean()
    square = (student - teacher).square().mean()
    problem = Embedding(Losses(cosine=2, mse=0.5))
    torch.testing.assert_close(problem.response_loss(student, teacher, 3.0, 1.0), 3 * (2 * cosine + 0.5 * square))
    assert problem.response_loss(student, teacher, 0, 1.0) is None
    assert EMBEDDING.response_loss(7 * teacher, teacher, None, 1.0) == pytest.approx(0, abs=1e-6)
    rotation = torch.linalg.qr(torch.randn(8, 8))[0][:5]  # into more dimensions, every cosine kept
    assert EMBEDDING.response_loss(teacher @ rotation, teacher, None, 1.0) == pytest.approx(0, abs=1e-6)


def test_a_text_is_differentiated_through_its_cosines_with_the_others():
    torch.manual_seed(0)
    outputs = torch.randn(4, 5, requires_grad=True)
    found = EMBEDDING.differentiated(outputs)
    for at in range(4):
        cosines = torch.nn.functional.cosine_similarity(outputs[at], outputs.detach(), dim=-1)
        torch.testing.assert_close(found[at], cosines)
        rows = [
            torch.autograd.grad(each[other], outputs, retain_graph=True)[0]
            for each in (found[at], cosines)
            for other in range(4)
        ]
        for one, other in zip(rows[:4], rows[4:], strict=True):
            torch.testing.assert_close(one, other)


def test_scores_of_units_see_the_direction_alone(tiny_checkpoint: Callable[..., Path], tmp_path: Path, tokenizer: Any):
    """A criterion on a model whose embeddings are ten times as long."""
    model = encoder(tiny_checkpoint("bert", head=False), tmp_path / "base")
    batches = list(eval_batches(EMBEDDING.encode(tokenizer, train_table(False), dataset(False)), 8))
    long = dataclasses.make_dataclass("Long", [], bases=(Embedding,), frozen=True)()
    object.__setattr__(long, "outputs", lambda answer, batch: 10 * answer.sentence_embedding)
    one, other = (criteria.gauss_newton(problem, model, batches, ["ffn"])["ffn"] for problem in (EMBEDDING, long))
    torch.testing.assert_close(one, other)
    assert all(layer.min() > 0 for layer in one)


# --- encoders ---


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_embeds_and_is_loaded_as_it_was_cut(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path, tokenizer: Any
):
    folder = tiny_checkpoint(family, head=False)
    model = encoder(folder, tmp_path / "base")
    inputs = tokenizer(texts(3), padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state
        found = model(**inputs).sentence_embedding
    mask = inputs["attention_mask"][..., None]
    torch.testing.assert_close(found, (states * mask).sum(1) / mask.sum(1), rtol=1e-4, atol=1e-5)
    assert EMBEDDING.width(model) == 32
    surgery.prune_ffn(model, 1, range(20))
    surgery.prune_heads_everywhere(model, [1])
    surgery.prune_hidden(model, [0, 5])
    assert EMBEDDING.width(model) == 30
    (tmp_path / "saved").mkdir()
    artifact.save(model, tmp_path / "saved")
    loaded = artifact.load(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).sentence_embedding, model(**inputs).sentence_embedding)


def sentence_transformer(folder: Path, pooling: dict[str, Any], modules: list[str]) -> Path:
    """Beside a checkpoint the files by which sentence-transformers knows it."""
    listed = [
        {"idx": at, "name": str(at), "path": f"{at}_{name}" if at else "", "type": f"sentence_transformers.models.{name}"}
        for at, name in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize(
    ("modes", "modules", "given", "wanted"),
    [
        ({"pooling_mode_mean_tokens": True}, ["Transformer", "Pooling", "Normalize"], {}, ("mean", True)),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, ["Transformer", "Pooling"], {}, ("cls", False)),
        ({"pooling_mode": "cls"}, ["Transformer", "Pooling"], {"normalize": True}, ("cls", True)),
        ({"pooling_mode_cls_token": True}, ["Transformer", "Pooling", "Dense"], {"pooling": "pooler"}, ("pooler", False)),
        ({"pooling_mode_cls_token": True}, ["Transformer", "Pooling", "Dense"], {}, "has a module Dense"),
        ({"pooling_mode_max_tokens": True}, ["Transformer", "Pooling"], {}, "pools by pooling_mode_max_tokens"),
        ({"pooling_mode": ["cls", "mean"]}, ["Transformer", "Pooling"], {}, "pools by cls, mean"),
    ],
)
def test_pooling_is_read_from_a_folder_of_sentence_transformers(
    tmp_path: Path, modes: dict[str, Any], modules: list[str], given: dict[str, Any], wanted: Any
):
    folder = sentence_transformer(tmp_path, modes, modules)
    asked = ModelConfig(path="x", **given)
    if isinstance(wanted, str):
        with pytest.raises(ConfigError, match=wanted):
            EMBEDDING.described(folder, asked)
    else:
        assert tuple(EMBEDDING.described(folder, asked).values()) == wanted


def test_an_encoder_without_a_pooler_is_told(tiny_checkpoint: Callable[..., Path], tmp_path: Path):
    with pytest.raises(ValueError, match="has no pooler; choose the pooling mean or cls"):
        encoder(tiny_checkpoint("distilbert", head=False), tmp_path / "base", pooling="pooler")


def test_a_narrower_students_embedding_is_projected_as_its_states_are(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, tokenizer: Any
):
    model, teacher = (encoder(tiny_checkpoint("bert", head=False), tmp_path / name) for name in ("student", "teacher"))
    rows = EMBEDDING.encode(tokenizer, train_table(False, 32), dataset(False))
    surgery.prune_hidden(model, range(8))
    asked = teaching.live(EMBEDDING, teacher)
    project = teaching.projection(EMBEDDING, model, asked, rows, CPU)
    weights = Distill(hidden=0, task=0).weights()
    loss = losses.distillation_loss(EMBEDDING, weights, asked, project=project)
    batch = next(eval_batches(rows, 8))
    with torch.no_grad():
        said, wanted = (EMBEDDING.outputs(each(**batch.inputs), batch) for each in (model, teacher))
        assert said.shape == (8, 24)
        torch.testing.assert_close(loss(model, batch), EMBEDDING.response_loss(project(said), wanted, None, 1.0))
    before = model.state_dict()["bert.encoder.layer.1.output.dense.weight"].clone()
    context = Context(train=rows, problem=EMBEDDING, device=CPU, seed=0, teacher=lambda: teacher)
    operator(Step(operator="distill", params={"hidden": 0}))(model, context)
    assert not torch.equal(before, model.state_dict()["bert.encoder.layer.1.output.dense.weight"])


# --- whole searches ---


@pytest.fixture
def lines(setup: Setup, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Setup:
    """The tiny search on parallel lines."""
    (tmp_path / "one").write_text("\n".join(texts(120)) + "\n")
    (tmp_path / "other").write_text("\n".join(texts(120, 1)) + "\n")
    common = [word for word in setup.overrides if word.split("=")[0] not in ("dataset", "dataset.train", "dataset.name")]
    base = tiny_checkpoint("bert", layers=3, heads=4, hidden=128, ffn=64, head=False)
    data = [
        "dataset=pairs",
        "dataset.text2=null",
        f"dataset.train={tmp_path / 'one'}",
        f"dataset.parallel={tmp_path / 'other'}",
    ]
    return Setup([*common, *data, "dataset.name=lines", f"model.path={base}", "force=true"], setup.compose)


ELSEWHERE = """
import json, sys
sys.modules["hpc_compress"] = None
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
found = SentenceTransformer(folder, trust_remote_code=True, device="cpu").encode(texts)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
tokens = tokenizer(texts, padding=True, return_tensors="pt", truncation=True)
with torch.no_grad():
    stock = AutoModel.from_pretrained(folder, trust_remote_code=True)(**tokens)
print(json.dumps([found.tolist(), stock.sentence_embedding.tolist(), list(stock.last_hidden_state.shape[:2])]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
@pytest.mark.parametrize("scheme", ["fp32", "onnx_int8"])
def test_an_export_is_what_sentence_transformers_loads(lines: Setup, tmp_path: Path, pooling: str, scheme: str):
    pytest.importorskip("sentence_transformers")
    weights = {"int8": 0.0, "nf4": 0.0, "onnx_int8": 1.0 if scheme == "onnx_int8" else 0.0}
    chances = [f"strategy.quantizations.{name}.weight={weight}" for name, weight in weights.items()]
    root = tmp_path / "run"
    lines.run(root, f"model.pooling={pooling}", "model.normalize=true", "protocol.device=cpu", *chances)
    run = analysis.open_run(root)
    genomes = {id: run.outcomes[id].task.genome for id in run.generations[-1].population}
    schemes = {id: {step.params.get("scheme", "fp32") for step in genome.deploy} for id, genome in genomes.items()}
    chosen = next(id for id, genome in genomes.items() if genome.steps and (scheme == "fp32" or scheme in schemes[id]))
    folder = export.export(root, tmp_path / "exported", chosen)
    said = texts(7, 5)
    tokens = AutoTokenizer.from_pretrained(folder)(said, padding=True, return_tensors="pt", truncation=True)
    with torch.no_grad():
        wanted = artifact.load(folder)(**tokens).sentence_embedding
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", ELSEWHERE, str(folder), json.dumps(said)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    theirs, stock, shape = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))
    np.testing.assert_allclose(theirs, torch.nn.functional.normalize(wanted, dim=-1).numpy(), atol=1e-5)
    np.testing.assert_allclose(stock, wanted.numpy(), atol=1e-5)
    assert shape == list(tokens["input_ids"].shape)
    export.export(root, tmp_path / "exported", chosen, to="sentence-transformers", check=True)  # over the earlier one
    assert "SentenceTransformer" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_a_killed_search_goes_on_as_if_nothing_had_happened(lines: Setup, tmp_path: Path):
    words = ["model.pooling=cls", "strategy.fine_tune=null", "strategy.crossover_probability=1"]
    lines.run(tmp_path / "whole", *words)
    assert story(through_kills(lines, tmp_path, *words)) == story(tmp_path / "whole")


@pytest.mark.slow
def test_the_published_case_runs_on_a_tiny_bilingual_model(tiny_checkpoint: Callable[..., Path], tmp_path: Path, compose: Any):
    """Heads by the Taylor criterion, then a distillation with two losses; random weights."""
    suite = write_suite(tmp_path)
    (tmp_path / "en.txt").write_text("\n".join(texts(80, 7)) + "\n")
    (tmp_path / "ru.txt").write_text("\n".join(texts(80, 8)) + "\n")
    model = tiny_checkpoint("bert", layers=3, heads=4, hidden=128, ffn=64, head=False)
    tasks = {f"+dataset.suite.tasks.{name}={json.dumps(task.model_dump())}" for name, task in suite.tasks.items()}
    published = ["ru_stsb", "ru_para", "ru_sentiment", "ru_toxic", "ru_intents", "en_ru_intents"]
    words = [
        "experiment=labse_en_ru",
        f"model.path={model}",
        f"dataset.train={tmp_path / 'en.txt'}",
        f"dataset.parallel={tmp_path / 'ru.txt'}",
        f"dataset.suite.folder={tmp_path}",
        *(f"~dataset.suite.tasks.{name}" for name in published),
        *(word.replace('"', "").replace(": ", ":").replace(", ", ",") for word in tasks),
        "strategy.population=2",
        "strategy.quantizations={nf4: {weight: 0}}",
        "strategy.mutations.prune_time.weight=0",
        "generations=1",
        "protocol={device: cpu, batch_size: 8, sentences: 16, warmup_passes: 0, min_passes: 2, max_passes: 2}",
        "force=true",
    ]
    Setup(words, compose).run(tmp_path / "run")
    run = analysis.open_run(tmp_path / "run")
    assert run.result is not None
    cut = [outcome for outcome in run.outcomes.values() if outcome.task.genome.steps and outcome.task.limit is None]
    assert cut
    assert all(outcome.measurement for outcome in cut)
    assert all([step.operator for step in outcome.task.genome.steps] == ["prune", "distill"] for outcome in cut)
    assert set(cut[0].measurement.metrics) == {"mean_score", "similar", "same", "found", "feeling"}


def test_a_vocabulary_may_be_that_of_several_files(tokenizer: Any, tmp_path: Path):
    for name, text in (("one", "good film"), ("other", "dull plot")):
        (tmp_path / name).write_text(text + "\n")
    rows = EMBEDDING.encode(tokenizer, train_table(False, 1), dataset(False))
    context = Context(train=rows, problem=EMBEDDING, device=CPU, seed=0, teacher=lambda: None)

    def kept(*corpus: str) -> set[int]:
        return set(operator(Step(operator="trim_vocabulary", params={"corpus": list(corpus)})).kept(tokenizer, context))

    one, other, train = kept(str(tmp_path / "one")), kept(str(tmp_path / "other")), kept("train")
    assert kept("train", str(tmp_path / "one"), str(tmp_path / "other")) == one | other | train
    assert one != other
