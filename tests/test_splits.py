"""Splits that share nothing, tables that are refused, and what a constant answer scores."""

import contextlib
import csv
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import light
import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from searches import Setup, Silent

from hpc_compress import analysis, export, identity, splits
from hpc_compress.config import ConfigError, DatasetConfig, validate
from hpc_compress.data import overlap
from hpc_compress.launch.local import Debug
from hpc_compress.problems import PROBLEMS
from hpc_compress.records import Plan
from hpc_compress.store import Store
from hpc_compress.summary import learnt, uncertain
from hpc_compress.types import Dataset, Genome, Measurement, MeasurementProtocol, Outcome, Rows, SearchError, Task


def load(path: Path, **settings: Any) -> tuple[Dataset, splits.Tables, Rows]:
    return splits.load(validate(DatasetConfig, {"name": "mine", "train": str(path), **settings}, "dataset"), 0)


def write(path: Path, texts: list[str], **columns: Any) -> Path:
    rows = {"text": texts, "label": [i % 2 for i in range(len(texts))], **columns}
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


@pytest.mark.parametrize("seed", range(20))
def test_runs_of_words_are_found_as_by_a_search_in_every_text(seed: int):
    rng = random.Random(seed)
    needles, texts = ([" ".join(rng.choices("abc", k=rng.randint(1, 9))) for _ in range(rng.randint(1, 30))] for _ in range(2))
    wanted = [[i, j] for i, needle in enumerate(needles) for j, text in enumerate(texts) if f" {needle} " in f" {text} "]
    assert overlap.runs(needles, texts).tolist() == wanted


def test_case_signs_white_space_and_tokenisation_make_no_difference():
    assert overlap.normal("It's  GOOD, don't\tmiss it!") == overlap.normal("it 's good , do n't miss it .")
    assert overlap.normal("good") != overlap.normal("not good")
    assert overlap.normal("!!!") == "!!!"


def phrases() -> list[str]:
    """Sentences with their phrases, as SST-2 has them, some twice; one word lies in all of them."""
    rng = random.Random(0)
    sentences = [" ".join(["film", *(f"w{rng.randrange(3000)}" for _ in range(8))]) for _ in range(100)]
    parts = [" ".join(s.split()[a : a + 3]) for s in sentences for a in (1, 4)]
    return ["film", "Film !", *sentences, *(s.upper() for s in sentences[:20]), *parts]


def test_no_held_out_text_is_in_train_or_lies_in_it(tmp_path: Path):
    path = write(tmp_path / "rows.csv", phrases())
    _, tables, rows = load(path, search_rows=10, report_rows=10)
    assert (len(tables["search"]), len(tables["report"])) == (10, 10)
    assert [(found.equal, found.inside) for found in rows.overlaps] == [(0, 0)] * 3
    train = [f" {overlap.normal(text)} " for text in tables["train"]["text"]]
    for split in ("search", "report"):
        held_out = {f" {overlap.normal(text)} " for text in tables[split]["text"]}
        assert all(len(text.split()) == 9 for text in held_out)  # whole sentences
        assert not any(text in other for text in held_out for other in train)
        assert not any(text in other for text in train for other in held_out if text != " film ")
    assert train.count(" film ") == 2  # a word of every sentence binds nothing together
    assert len(train) + 20 + rows.unused == len(phrases())
    assert 20 <= rows.unused <= 40


def test_equal_pairs_stay_together_in_either_order_and_shared_texts_are_counted(tmp_path: Path):
    questions = [f"question {i}" for i in range(60)]
    first, second = [*questions, *questions], [q[::-1] for q in questions] + ["other"] * 60
    first[60:80], second[60:80] = second[:20], questions[:20]
    _, tables, rows = load(write(tmp_path / "rows.csv", first, text2=second), text2="text2", search_rows=20)
    assert [found.equal for found in rows.overlaps] == [0, 0, 0]
    assert all(found.shared for found in rows.overlaps[:2])
    assert sum(map(len, tables.values())) == 120


def test_pairs_whose_second_text_is_empty_share_no_text_for_that(tmp_path: Path):
    path = write(tmp_path / "rows.csv", [f"question {i}" for i in range(60)], text2=[""] * 60)
    assert [found.shared for found in load(path, text2="text2")[2].overlaps] == [0, 0, 0]


def test_the_overlap_of_official_rows_is_counted_and_they_stay(tmp_path: Path):
    train = write(tmp_path / "train.csv", [f"a long text of number {i}" for i in range(40)])
    official = write(tmp_path / "dev.csv", ["A long text of number 3.", "number 5", "new", "newer"])
    _, tables, rows = load(train, validation=str(official))
    assert len(tables["report"]) == 4
    counts = {found.of: (found.equal, found.inside) for found in rows.overlaps if found.split == "report"}
    assert tuple(map(sum, zip(*counts.values(), strict=True))) == (1, 1)
    assert "of 4 report rows" in "\n".join(rows.lines())


def test_rows_without_a_label_are_counted_and_too_many_are_refused(tmp_path: Path):
    texts = [f"text {i}" for i in range(60)]
    for share, refused in ((3, False), (1.5, True)):
        labels = ["" if i < 60 / share else "ab"[i % 2] for i in range(60)]
        path = write(tmp_path / "rows.csv", texts, label=labels)
        if refused:
            with pytest.raises(ConfigError, match=r"40 of 60 rows .* no text or no label"):
                load(path)
        else:
            rows = load(path)[2]
            assert rows.empty == {"train": 20}
            assert "20 rows of train without a text or a label" in rows.lines()[0]


@pytest.mark.parametrize("problem", ["classification", "regression"])
def test_hidden_labels_are_refused_by_name(tmp_path: Path, problem: str):
    texts = [f"text {i}" for i in range(40)]
    train = write(tmp_path / "train.csv", texts)
    test = write(tmp_path / "test.csv", texts, label=[-1] * 40)
    quality = ["pearson"] if problem == "regression" else ["accuracy"]
    with pytest.raises(ConfigError, match=r"every label of split .*test\.csv.* is -1: they are hidden"):
        load(train, validation=str(test), problem=problem, metrics=quality)


def test_f1_is_of_the_positive_class_whatever_the_order(tmp_path: Path):
    path = write(tmp_path / "rows.csv", [f"text {i}" for i in range(40)], label=["not_duplicate", "duplicate"] * 20)
    dataset = load(path, metrics=["f1"])[0]
    assert dataset.positive == "duplicate"
    assert dataset.labels.index("duplicate") == 0
    assert load(path, metrics=["f1"], positive="not_duplicate")[0].positive == "not_duplicate"
    rows, outputs = pd.DataFrame({"label": [0, 0, 0, 1]}), np.eye(2)[[0, 0, 1, 1]]
    assert PROBLEMS["classification"].score(dataset, rows, outputs) == {"f1": pytest.approx(0.8)}
    with pytest.raises(ConfigError, match=r"dataset\.positive is 'yes'; set dataset\.positive to one of duplicate, not"):
        load(path, metrics=["f1"], positive="yes")
    assert "positive" not in load(path)[0].model_dump()  # the identity of earlier versions


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"text,label,text\na,0,b\n", "more than one column 'text'"),
        (b"text,label\na\x00b,0\nc,1\n", "NUL bytes"),
        (b"text,label\nab,0\nc\xe9,1\n", "line 3 has the byte 0xe9"),
    ],
)
def test_a_table_that_misleads_is_refused(tmp_path: Path, content: bytes, words: str):
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load(tmp_path / "rows.csv")


def test_a_folder_and_nested_columns_are_refused(tmp_path: Path):
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        load(tmp_path / "folder.csv")
    for odd in (["a", "b"], {"a": 1}, b"a"):
        pd.DataFrame({"text": [odd] * 4, "label": [0, 1] * 2}).to_parquet(tmp_path / "rows.parquet")
        with pytest.raises(ConfigError, match=r"column 'text' of mine holds values of kind"):
            load(tmp_path / "rows.parquet")


QUICK = settings(max_examples=100, derandomize=True, database=None, deadline=None)
CELL = st.text(max_size=4) | st.text("ab01-.,;\t\"'\n\r\0é", max_size=6) | st.sampled_from(["", "nan", "1e999", "9" * 5000])
LABEL = st.sampled_from(["0", "1"])
ROWS = [st.lists(row, max_size=30) for row in (st.tuples(CELL, LABEL), st.tuples(CELL, CELL), st.tuples(CELL, LABEL, CELL))]
DATASETS: list[dict[str, Any]] = [
    {},
    {"text2": "text2"},
    {"problem": "regression", "metrics": ["pearson"]},
    {"metrics": ["f1"], "search_rows": 2, "report_rows": 2},
    {"where": "label != 1", "encoding": "utf-16"},
]


def answered(folder: Path, name: str, content: bytes, config: dict[str, Any]) -> None:
    (folder / name).write_bytes(content)
    with contextlib.suppress(ConfigError):
        load(folder / name, **config)


@QUICK
@given(content=st.binary(), name=st.sampled_from(["rows.csv", "rows.tsv", "rows.parquet"]), config=st.sampled_from(DATASETS))
def test_any_bytes_are_answered(tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str, config: dict[str, Any]):
    answered(tmp_path_factory.getbasetemp(), name, content, config)


@pytest.mark.slow
@QUICK
@given(rows=st.one_of(ROWS), more=st.lists(CELL, max_size=1), quoted=st.booleans(), config=st.sampled_from(DATASETS))
@example(rows=[("a text", "9" * 5000), ("another", "٣")] * 20, more=[], quoted=True, config={})
def test_any_cells_are_answered(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], more: list[str], quoted: bool, config: dict[str, Any]
):
    lines = [[*("text", "label", "text2")[: len(rows[0]) if rows else 2], *more], *rows]
    content = io.StringIO()
    if quoted:
        csv.writer(content).writerows(lines)
    else:
        content.write("\n".join(",".join(line) for line in lines))
    answered(tmp_path_factory.getbasetemp(), "rows.csv", content.getvalue().encode(config.get("encoding", "utf-8")), config)


def test_categories_and_long_fields_are_texts(tmp_path: Path):
    texts = [f"text {i} " + "x" * (2_000_000 if i == 7 else 1) for i in range(30)]
    rows = pd.DataFrame({"text": pd.Categorical([None, *texts]), "label": [0, *([0, 1] * 15)]})
    rows.to_parquet(tmp_path / "rows.parquet")
    _, tables, counts = load(tmp_path / "rows.parquet")
    assert sum(map(len, tables.values())) == 30
    assert counts.empty == {"train": 1}


def test_what_a_constant_answer_scores():
    common: dict[str, Any] = {"name": "x", "fingerprint": "0" * 16, "problem": "classification", "labels": ("0", "1")}
    dataset = Dataset(**common, metrics=("accuracy", "f1", "macro_f1", "matthews"))
    found = PROBLEMS["classification"].trivial(dataset, pd.DataFrame({"label": [0, 0, 0, 1]}))
    assert found == pytest.approx({"accuracy": 0.75, "f1": 0.4, "macro_f1": 3 / 7, "matthews": 0.0})


def outcome_of(metrics: dict[str, float], errors: dict[str, float] | None = None) -> Outcome:
    """Of a base model with these metrics on the search rows, and their standard errors."""
    dataset = Dataset(name="x", fingerprint="0" * 16, problem="classification", labels=("0", "1"), metrics=tuple(metrics))
    measurement = Measurement(
        metrics=metrics,
        standard_errors=errors or {},
        latency_ms=(1.0,),
        base_latency_ms=(1.0,),
        model_bytes=1,
        parameters=1,
        encoder_parameters=1,
        device="none",
        device_type="cpu",
        protocol=MeasurementProtocol(),
    )
    base = {"name": "b", "fingerprint": "0" * 16}
    task = Task(base=base, dataset=dataset, protocol=MeasurementProtocol(), seed=0, genome=Genome())  # type: ignore[arg-type]
    return Outcome(task=task, measurement=measurement)


@pytest.mark.parametrize(("score", "said", "certain"), [(0.5, True, True), (0.52, True, False), (0.9, False, False)])
def test_a_base_model_that_has_learnt_nothing_is_told(compose: Any, score: float, said: bool, certain: bool):
    dataset = Dataset(name="x", fingerprint="0" * 16, problem="classification", labels=("0", "1"), metrics=("accuracy",))
    found = {"split": "search", "of": "train", "rows": 400, "equal": 0}
    rows = Rows(empty={}, unused=0, overlaps=(found,), trivial={"search": {"accuracy": 0.5}})  # type: ignore[arg-type]
    plan = Plan.model_construct(rows=rows, dataset=dataset)
    answer = learnt(plan, outcome_of({"accuracy": score}))
    assert (answer is not None) == said
    if answer:
        assert answer[1] == certain
        assert "against 0.500 on 400 search rows" in answer[0]


@pytest.mark.parametrize(
    ("score", "error", "said"), [(0.19, 0.05, True), (0.9, 0.01, False), (0.9, None, False), (-0.1, 0.1, False)]
)
def test_a_base_model_whose_quality_is_mostly_chance_is_told(score: float, error: float | None, said: bool):
    line = uncertain(outcome_of({"matthews": score}, {} if error is None else {"matthews": error}))
    assert (line is not None) == said
    assert line is None or f"on the search rows, the matthews of the base model is {score:.3f} ± {error:.3f}" in line


def half_right(root: str, task_ids: list[str], **ignored: Any) -> Iterator[str]:
    """A worker whose models are right on every other row."""
    store = Store(root)
    for task_id in task_ids:
        outcome = light.answer(store.task(task_id))
        assert outcome.measurement
        measurement = outcome.measurement.model_copy(update={"metrics": {"accuracy": 0.5}})
        store.settle(outcome.model_copy(update={"measurement": measurement}))
        yield task_id


@pytest.mark.slow
def test_a_search_from_a_base_model_that_has_learnt_nothing_ends_unless_it_is_forced(setup: Setup, tmp_path: Path):
    path, root = write(tmp_path / "rows.csv", [f"text {i}" for i in range(600)]), tmp_path / "run"
    words = ["probe=false", "generations=1", f"dataset.train={path}", "dataset.search_rows=100", "dataset.report_rows=100"]
    launcher = Debug(worker="test_splits.half_right")
    with pytest.raises(SearchError, match=r"the base model is no better than .* on 100 search rows, .*force=true"):
        setup.run(root, *words, launcher=launcher)
    assert not (root / "generations").exists()
    progress = Silent()
    assert setup.run(root, *words, "force=true", launcher=launcher, progress=progress) is not None
    assert any(line.startswith("warning: the base model is no better") for line in progress.lines)
    analysis.write_report(analysis.open_runs([root]), root)
    assert "- warning: the base model is no better" in (root / "report.md").read_text()


def luckily_right(root: str, task_ids: list[str], **ignored: Any) -> Iterator[str]:
    """A worker whose qualities are known roughly."""
    store = Store(root)
    for task_id in task_ids:
        outcome = light.answer(store.task(task_id))
        assert outcome.measurement
        measurement = outcome.measurement.model_copy(
            update={"metrics": {"accuracy": 0.9}, "standard_errors": {"accuracy": 0.1}}
        )
        store.settle(outcome.model_copy(update={"measurement": measurement}))
        yield task_id


@pytest.mark.slow
def test_a_quality_that_is_mostly_chance_is_in_the_log_and_the_report(setup: Setup, tmp_path: Path):
    path, root = write(tmp_path / "rows.csv", [f"text {i}" for i in range(600)]), tmp_path / "run"
    words = ["probe=false", "generations=0", f"dataset.train={path}", "dataset.search_rows=100", "dataset.report_rows=100"]
    progress = Silent()
    setup.run(root, *words, launcher=Debug(worker="test_splits.luckily_right"), progress=progress)
    warning = "warning: on the search rows, the accuracy of the base model is 0.900 ± 0.100"
    assert any(line.startswith(warning) for line in progress.lines)
    analysis.write_report(analysis.open_runs([root]), root)
    assert warning in (root / "report.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_overlap_is_in_the_log_the_run_the_report_and_the_card(setup: Setup, tmp_path: Path):
    root, progress = tmp_path / "run", Silent()
    setup.run(root, "generations=0", "probe=false", progress=progress)
    run = analysis.open_run(root)
    assert run.plan.rows is not None
    lines = run.plan.rows.lines()
    assert set(lines) <= set(progress.lines)
    analysis.write_report(analysis.open_runs([root]), tmp_path / "out")
    report, card = (tmp_path / "out" / "report.md").read_text(), export.card(run, run.base_id, tmp_path)
    assert all(line in report and line in card for line in lines)


def test_a_plan_of_before_is_read(setup: Setup, tmp_path: Path):
    setup.run(tmp_path / "run", "generations=0", "probe=false")
    plan = analysis.open_run(tmp_path / "run").plan
    old = plan.model_dump(mode="json", exclude={"rows"})
    assert Plan.model_validate(old).rows is None
    assert identity.canonical(plan.dataset) == identity.canonical(Plan.model_validate(old).dataset)


def test_mnli_has_a_configuration_for_the_mismatched_rows(compose: Any):
    values = compose("dataset=mnli_mismatched")["dataset"]
    assert values["validation"] == "validation_mismatched"


def test_a_text_that_stands_there_very_often_does_not_decide_a_split():
    """A retweet of 79 rows among 600 held-out ones moved an accuracy by 15 points."""
    often = [f"retweet {number}" for number in range(5) for _ in range(80)]
    rows = pd.DataFrame({"text": [*often, *(f"tweet {number}" for number in range(2000))]})
    groups = overlap.Groups(rows)
    stay, out = groups.hold_out(np.random.default_rng(0).permutation(len(rows)), 600)
    assert len(out) == 600
    assert len(stay) == 1800
    assert not rows["text"].iloc[out].str.startswith("retweet").any()
    _, most = groups.hold_out(np.arange(len(rows)), 2200)  # too few others
    assert 2100 < len(most) <= 2200
