"""Labels of tokens: files of sentences, windows, scores, criteria and losses against oracles; a whole search and its export."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import test_vocabulary as kinds_of_tokenizers
import tokenizers
import torch
from elsewhere import outputs_elsewhere
from searches import Setup, story, through_kills
from seqeval.metrics import f1_score
from sklearn.metrics import accuracy_score
from sklearn.metrics import f1_score as sklearn_f1
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, pipeline

from hpc_compress import analysis, export, measure, splits
from hpc_compress.config import ConfigError, DatasetConfig, validate
from hpc_compress.data import metrics
from hpc_compress.data.batches import Encoded, eval_batches, train_batches
from hpc_compress.models import artifact, modeling_hpc_compress, surgery
from hpc_compress.models.gates import counts, gated
from hpc_compress.operators import operator
from hpc_compress.problems import problem
from hpc_compress.pruning import criteria
from hpc_compress.training import loop, losses, teaching
from hpc_compress.types import Dataset, Rows, Step

TOKENS = problem("token_classification")
BIO = ("B-LOC", "B-PER", "I-LOC", "I-PER", "O")
LINES = """-DOCSTART- -X- O

EU NNP B-ORG
rejects VBZ O
# NN O

#tag NN B-MISC
a DT O
"""


def load(file: Path, **settings: Any) -> tuple[Dataset, splits.Tables, Rows]:
    values = {"name": "mine", "train": str(file), "text": "tokens", "label": "tags", "problem": "token_classification"}
    return splits.load(validate(DatasetConfig, {**values, **settings}, "dataset"), 0)


def read(path: Path, **settings: Any) -> list[tuple[list[str], list[str]]]:
    config = DatasetConfig(name="mine", problem="token_classification", **{"text": "tokens", "label": "tags", **settings})
    table, _ = splits._clean(splits._read(config, str(path)), config, "train")
    return list(zip(table["tokens"], table["label"], strict=True))


def sentences(n: int = 60, seed: int = 0) -> list[tuple[list[str], list[str]]]:
    """What a tag is follows from the word."""
    rng = random.Random(seed)
    kinds = {"good": "B-PER", "great": "I-PER", "film": "B-LOC", "plot": "I-LOC", "is": "O", "not": "O", "very": "O"}
    rows = [rng.choices(list(kinds), k=rng.randint(3, 9)) for _ in range(n)]
    return [([f"the{number}", *words], ["O", *map(kinds.__getitem__, words)]) for number, words in enumerate(rows)]


def write(path: Path, rows: list[tuple[list[str], list[str]]]) -> Path:
    path.write_text("\n".join("".join(f"{word}\t{tag}\n" for word, tag in zip(*row, strict=True)) for row in rows))
    return path


# --- files ---


def test_a_conll_file_is_read_with_its_comments_and_words_that_begin_with_a_hash(tmp_path: Path):
    wanted = [(["EU", "rejects", "#"], ["B-ORG", "O", "O"]), (["#tag", "a"], ["B-MISC", "O"])]
    for name, text in {
        "a.conll": LINES,
        "b.txt": LINES.replace("\n", "\r\n"),
        "c.tsv": "\ufeff" + LINES.replace(" ", "\t"),
        "d.conll": "# a comment of five words\n" + LINES.replace(" ", "  ") + "\n \n",
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert read(tmp_path / name) == wanted, name
    assert read(tmp_path / "a.conll", label=1)[0] == (["EU", "rejects", "#"], ["NNP", "VBZ", "NN"])
    assert read(tmp_path / "a.conll", text=-2, label=0)[1] == (["NN", "DT"], ["#tag", "a"])


def test_words_of_conll_u_are_read_by_the_names_of_its_columns(tmp_path: Path):
    path = tmp_path / "a.conllu"
    rows = [
        "# text = vámonos al",
        "1-2\tvámonos\t_\t_",
        "1\tvamos\tir\tVERB",
        "2\tnos\tyo\tPRON",
        "2.1\tx\tx\tX",
        "3\tal\ta\tADP",
    ]
    path.write_text("\n".join(rows), encoding="utf-8")
    assert read(path) == [(["vamos", "nos", "al"], ["VERB", "PRON", "ADP"])]
    assert read(path, text="lemma", label="form") == [(["ir", "yo", "a"], ["vamos", "nos", "al"])]


def test_tables_hold_lists_or_texts_with_single_blanks(tmp_path: Path):
    rows = sentences()
    columns = {"tokens": [words for words, _ in rows], "tags": [tags for _, tags in rows]}
    pd.DataFrame(columns).to_parquet(tmp_path / "lists.parquet")
    texts = pd.DataFrame({name: [" ".join(items) for items in column] for name, column in columns.items()})
    texts.to_parquet(tmp_path / "texts.parquet")
    texts.to_csv(tmp_path / "texts.csv", index=False)
    texts.to_csv(tmp_path / "texts.tsv", index=False, sep="\t")
    write(tmp_path / "lines.tsv", rows)
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == rows, path
    ids = pd.DataFrame({"tokens": texts["tokens"], "tags": [[len(tag) for tag in tags] for tags in columns["tags"]]})
    ids.to_parquet(tmp_path / "ids.parquet")
    assert load(tmp_path / "ids.parquet")[0].labels == ("1", "5")


def test_lists_of_classes_of_datasets_have_their_names(tmp_path: Path):
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "tags": datasets.List(datasets.ClassLabel(names=BIO))}
    )
    rows = sentences()
    columns = {"tokens": [words for words, _ in rows], "tags": [tags for _, tags in rows]}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "data" / "train.parquet")
    dataset, tables, _ = load(tmp_path, path=str(tmp_path / "data"), train="train")
    assert dataset.labels == BIO
    assert dataset.metrics == ("entity_f1", "accuracy")
    known = {" ".join(words): tags for words, tags in rows}
    for row in tables["train"].itertuples():
        assert [BIO[id] for id in row.label] == known[row.text]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[3][1].pop(), ["row 4", "tokens and", "tags", "the3"]),
        (lambda rows: rows[3][1].append("O"), ["row 4", "tokens and", "tags"]),
        (lambda rows: rows[5][0].__setitem__(2, ""), ["row 6", "token 3 is ''"]),
        (lambda rows: rows[5][1].__setitem__(1, None), ["row 6", "tag 2 is None"]),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path: Path, change: Callable[[Any], Any], words: list[str]):
    rows = sentences()
    change(rows)
    pd.DataFrame(rows, columns=["tokens", "tags"]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "rows.parquet")
    assert all(word in str(caught.value) for word in words), caught.value


def test_rows_without_tokens_or_tags_are_left_out_and_counted(tmp_path: Path):
    rows = [*sentences(), ([], []), (["film"], None), (None, ["O"])]
    pd.DataFrame(rows, columns=["tokens", "tags"]).to_parquet(tmp_path / "rows.parquet")
    _, tables, found = load(tmp_path / "rows.parquet")
    assert found.empty == {"train": 3}
    assert sum(map(len, tables.values())) == 60


@pytest.mark.parametrize(
    ("lines", "settings", "words"),
    [
        ("a\tO\nb\n", {}, ["line 2 has 1 columns, and line 1 has 2"]),
        ("a O\nb O x\n", {}, ["line 2 has 3 columns"]),
        ("a\tO\nb\tO\n", {"label": "pos"}, ["'pos'", "0 to 1", "-1"]),
        ("a\tO\nb\tO\n", {"label": 2}, ["'2'", "0 to 1"]),
    ],
)
def test_lines_that_do_not_fit_are_named(tmp_path: Path, lines: str, settings: dict[str, Any], words: list[str]):
    (tmp_path / "a.conll").write_text(lines)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "a.conll", **settings)
    assert all(word in str(caught.value) for word in words), caught.value


def test_settings_that_do_not_fit_are_refused(tmp_path: Path):
    path, other = write(tmp_path / "a.conll", sentences()), write(tmp_path / "b.conll", [(["film"], ["B-GPE"])])
    pos = write(tmp_path / "c.conll", [(words, [tag.replace("-", "") for tag in tags]) for words, tags in sentences()])
    lists = tmp_path / "d.csv"
    pd.DataFrame(sentences(), columns=["tokens", "tags"]).assign(tokens="a b").to_csv(lists, index=False)
    for file, settings, words in (
        (path, {"validation": str(other)}, ["report", "B-GPE"]),
        (path, {"text2": "tokens"}, ["text2", "leave it out"]),
        (path, {"metrics": ["matthews"]}, ["matthews", "entity_f1, accuracy, macro_f1"]),
        (pos, {"metrics": ["entity_f1"]}, ["entity_f1", "BLOC", "accuracy"]),
        (lists, {}, ["row 1", "one blank"]),
        (tmp_path / "a.json", {}, ["does not exist"]),
    ):
        with pytest.raises(ConfigError) as caught:
            load(file, **settings)
        assert all(word in str(caught.value) for word in words), caught.value


# --- scores ---


def entities(tags: list[str]) -> set[tuple[str, int, int]]:
    """As conlleval finds them."""
    found, start = set(), None
    for place, tag in enumerate([*tags, "O"]):
        before = tags[place - 1] if place else "O"
        if start is not None and not (tag[2:] == before[2:] and tag[0] in "IE" and before[0] in "BI"):
            found.add((before[2:], start, place))
            start = None
        if tag != "O" and start is None:
            start = place
    return found


@pytest.mark.parametrize("seed", range(10))
def test_the_f1_of_entities_is_as_counted_by_hand(seed: int):
    rng = random.Random(seed)
    tags = [*BIO, "E-PER", "S-LOC"] if seed % 2 else list(BIO)
    both = [[rng.choices(tags, k=rng.randint(1, 9)) for _ in range(40)] for _ in range(2)]
    both[1] = [a if rng.random() < 0.5 else (b * 9)[: len(a)] for a, b in zip(*both, strict=True)]
    both[0][0] = both[1][0] = ["B-PER", "I-LOC", "I-LOC", "O", "I-PER", "B-PER"]
    mine, found = [{(row, *one) for row, tags in enumerate(side) for one in entities(tags)} for side in both]
    wanted = 2 * len(mine & found) / (len(mine) + len(found))
    assert f1_score(*both) == pytest.approx(wanted)
    table, dataset, answers = as_rows(both, tags, ("entity_f1", "accuracy", "macro_f1"))
    found = TOKENS.score(dataset, table, np.eye(len(tags))[answers])
    true, said = ([tag for row in side for tag in row] for side in both)
    assert found == {
        "entity_f1": pytest.approx(wanted),
        "accuracy": pytest.approx(accuracy_score(true, said)),
        "macro_f1": pytest.approx(sklearn_f1(true, said, average="macro")),
    }


def test_bilou_names_the_same_entities_as_iobes():
    iobes = ["B-PER", "I-PER", "E-PER", "O", "S-LOC", "S-LOC", "B-LOC", "E-LOC"]
    bilou = [tag.replace("E-", "L-").replace("S-", "U-") for tag in iobes]
    assert metrics.entities(bilou) == metrics.entities(iobes) == {("PER", 0, 2), ("LOC", 4, 4), ("LOC", 5, 5), ("LOC", 6, 7)}
    assert TOKENS.default_metrics(tuple(bilou)) == ("entity_f1", "accuracy")


def as_rows(both: list[list[list[str]]], tags: list[str], names: tuple[str, ...]) -> tuple[pd.DataFrame, Dataset, np.ndarray]:
    """A table of sentences' tags, and answers to them."""
    true, said = ([[tags.index(tag) for tag in row] for row in side] for side in both)
    common: dict[str, Any] = {"name": "x", "fingerprint": "0" * 16, "problem": "token_classification"}
    return pd.DataFrame({"label": true}), Dataset(labels=tuple(tags), metrics=names, **common), np.concatenate(said)


@pytest.mark.parametrize("answers", [[0, 1], [0, 1, 5], [0, 1, -1], [0, 1, 0.5]])
def test_answers_to_other_rows_are_refused(answers: list[float]):
    table, dataset, _ = as_rows([[["O", "O"], ["O"]]] * 2, list(BIO), ("entity_f1",))
    with pytest.raises(ValueError, match="do not fit 3 words"):
        TOKENS.difference(dataset, table, np.array(answers), np.array([0, 1, 2]))


@pytest.mark.slow
def test_standard_errors_are_those_of_samples_of_sentences():
    rng = random.Random(0)
    true = [rng.choices(BIO, k=rng.randint(3, 9)) for _ in range(150)]
    one, other = ([[tag if rng.random() < share else "O" for tag in row] for row in true] for share in (0.8, 0.7))
    table, dataset, first = as_rows([true, one], list(BIO), ("entity_f1", "accuracy", "macro_f1"))
    second = as_rows([true, other], list(BIO), ("accuracy",))[2]
    drawn: dict[str, list[float]] = {name: [] for name in (*dataset.metrics, "difference")}
    ends = table["label"].map(len).cumsum().to_numpy()
    places = [range(end - len(row), end) for end, row in zip(ends, table["label"], strict=True)]
    for _ in range(300):
        rows = rng.choices(range(150), k=150)
        said = [first[[word for row in rows for word in places[row]]], second[[word for row in rows for word in places[row]]]]
        scores = [TOKENS.score(dataset, table.iloc[rows], np.eye(5)[answers]) for answers in said]
        for name in dataset.metrics:
            drawn[name].append(scores[0][name])
        drawn["difference"].append(scores[0]["entity_f1"] - scores[1]["entity_f1"])
    found = TOKENS.standard_errors(dataset, table, first)
    difference, error = TOKENS.difference(dataset, table, first, second)
    assert difference == pytest.approx(f1_score(true, one) - f1_score(true, other))
    for name, value in {**found, "difference": error}.items():
        assert value == pytest.approx(np.std(drawn[name]), rel=0.2)


def test_the_first_metric_follows_the_tags_and_a_constant_answer_is_known(tmp_path: Path):
    rows = sentences()
    dataset, tables, found = load(write(tmp_path / "ner.conll", rows))
    assert dataset.metrics == ("entity_f1", "accuracy")
    labels = tables["report"]["label"].to_list()
    constants = [[[tag] * len(row) for row in labels] for tag in BIO]
    named = [[BIO[id] for id in row] for row in labels]
    best = max(f1_score(named, constant, zero_division=0) for constant in constants)
    assert found.trivial["report"]["entity_f1"] == pytest.approx(best)
    assert found.trivial["report"]["accuracy"] == pytest.approx(
        np.bincount(np.concatenate(labels)).max() / sum(map(len, labels))
    )
    right = np.eye(5)[np.concatenate(labels)]
    assert TOKENS.score(dataset, tables["report"], right) == {"entity_f1": 1.0, "accuracy": 1.0}
    pos = [(words, [tag.removeprefix("B-").removeprefix("I-") for tag in tags]) for words, tags in rows]
    assert load(write(tmp_path / "pos.conll", pos))[0].metrics == ("accuracy", "macro_f1")


# --- windows and pieces ---


def byte_level() -> PreTrainedTokenizerBase:
    """As ModernBERT's: without a class of its own, and it puts no blank before the first word."""
    tokenizer = kinds_of_tokenizers.byte_bpe()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return kinds_of_tokenizers._wrapped(backend)


ODD = ["\u200b", "\x00", "\ufe0f", "\xa0", "☃"]


@pytest.fixture(scope="module", params=[*kinds_of_tokenizers.KINDS, byte_level], ids=lambda make: make.__name__)
def cutter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    request.param().save_pretrained(folder)
    TOKENS.tokenizer(folder).save_pretrained(folder)
    return TOKENS.tokenizer(folder)


def encoded(tokenizer: PreTrainedTokenizerBase, texts: list[list[str]], max_length: int) -> Encoded:
    dataset = Dataset(
        name="x", fingerprint="0" * 16, problem="token_classification", labels=BIO, metrics=("accuracy",), max_length=max_length
    )
    number = iter(range(10**6))
    rows = pd.DataFrame({"tokens": texts, "label": [[next(number) for _ in words] for words in texts]})
    return TOKENS.encode(tokenizer, rows, dataset)


def test_words_alone_have_the_pieces_that_they_have_in_a_text(cutter: PreTrainedTokenizerBase):
    """So what was trained on words is right for texts."""
    for text in kinds_of_tokenizers.LANGUAGE[:40]:
        words = text.removesuffix(".").split()
        ids = encoded(cutter, [words], 100).input_ids.tolist()
        assert ids == cutter(" ".join(words))["input_ids"]
        assert ids == cutter(words, is_split_into_words=True)["input_ids"]


def test_every_word_is_answered_once_at_its_first_piece_whatever_the_window(cutter: PreTrainedTokenizerBase):
    texts = [
        [*text.split(), *ODD[number % 6 :], "zyx" * (number % 4)][: 40 - number % 9]
        for number, text in enumerate(kinds_of_tokenizers.LANGUAGE[:60])
    ]
    texts = [[word for word in words if word] for words in texts]
    firsts = []
    for words in texts:
        for word in words:
            made = cutter([word], is_split_into_words=True, add_special_tokens=False)["input_ids"]
            firsts.append(made[0] if made else cutter.unk_token_id)
    for max_length in (4, 5, 9, 16, 300):
        examples = encoded(cutter, texts, max_length)
        assert examples.labels.tolist() == list(range(len(firsts)))
        assert examples.lengths.max() <= max_length
        begins = np.repeat(examples.offsets[:-1], np.diff(examples.label_offsets))
        assert examples.input_ids[begins + examples.label_tokens].tolist() == firsts
        if max_length == 300:
            assert len(examples) == len(texts)
        edges = examples.input_ids[np.stack([examples.offsets[:-1], examples.offsets[1:] - 1])]
        assert (edges == [[cutter.cls_token_id], [cutter.sep_token_id]]).all()


@pytest.mark.parametrize("seed", range(20))
def test_windows_have_context_on_both_sides(seed: int):
    from hpc_compress.problems.token_classification import _windows

    rng = np.random.default_rng(seed)
    room, lengths = int(rng.integers(8, 40)), rng.integers(1, 4, rng.integers(1, 120))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    windows = _windows(starts, room)
    answered = [word for _, _, first, end in windows for word in range(first, end)]
    assert answered == list(range(len(lengths)))
    for begin, end, first, last in windows:
        assert end - begin <= room
        assert begin in starts
        assert begin <= starts[first]
        assert starts[last] <= end
        assert begin == 0 or starts[first] - begin > room // 4 - 3  # a word has up to 3 pieces
        assert end == starts[-1] or end - starts[last] >= room // 4


# --- models ---


def model_of(folder: Path) -> PreTrainedModel:
    return TOKENS.load_base(folder, BIO, new_head=True, seed=0)


@pytest.fixture(scope="module")
def examples(tokenizer_folder: Path) -> Encoded:
    rows = sentences(12)
    table = pd.DataFrame(
        {"tokens": [words for words, _ in rows], "label": [[BIO.index(tag) for tag in tags] for _, tags in rows]}
    )
    dataset = Dataset(
        name="x", fingerprint="0" * 16, problem="token_classification", labels=BIO, metrics=("entity_f1",), max_length=32
    )
    return TOKENS.encode(TOKENS.tokenizer(tokenizer_folder), table, dataset)


def test_losses_are_means_over_the_first_pieces(tiny_checkpoint: Callable[..., Path], examples: Encoded):
    model, other = (model_of(tiny_checkpoint("bert", layers=layers, head=False)) for layers in (2, 3))
    [batch] = eval_batches(examples, 99)
    wanted, apart = [], []
    for row in range(len(batch)):
        index = int(batch.index[row])
        ids = torch.from_numpy(examples.input_ids[examples.offsets[index] : examples.offsets[index + 1]].astype(np.int64))[None]
        ours, theirs = (each(input_ids=ids).logits[0] for each in (model, other))
        for label in range(*examples.label_offsets[index : index + 2]):
            first = examples.label_tokens[label]
            wanted.append(-ours[first].log_softmax(-1)[examples.labels[label]])
            apart.append((theirs[first].softmax(-1) * (theirs[first].log_softmax(-1) - ours[first].log_softmax(-1))).sum())
    torch.testing.assert_close(losses.task_loss(TOKENS)(model, batch), torch.stack(wanted).mean())
    weights = losses.Weights(task=0, response=1, hidden=0, layers=0, temperature=1, distance="cosine")
    loss = losses.distillation_loss(TOKENS, weights, teaching.live(TOKENS, other))(model, batch)
    torch.testing.assert_close(loss, torch.stack(apart).mean(), rtol=1e-4, atol=1e-5)


def test_stored_answers_of_a_teacher_are_those_that_it_gives(
    tiny_checkpoint: Callable[..., Path], examples: Encoded, tmp_path: Path
):
    model, device = model_of(tiny_checkpoint("bert", head=False)), torch.device("cpu")
    teaching.write(tmp_path, TOKENS, model, examples, device)
    stored = teaching.read(tmp_path, examples)
    assert stored is not None
    for batch in train_batches(examples, 5, np.random.default_rng(0)):
        with torch.no_grad(), loop.autocast(device):
            live = teaching.live(TOKENS, model)(batch, False)
        torch.testing.assert_close(stored.answer(batch, False).outputs, live.outputs.float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["fisher", "taylor", "gauss_newton"])
def test_criteria_are_those_of_examples_whose_loss_is_the_sum_over_their_words(
    name: str, tiny_checkpoint: Callable[..., Path], examples: Encoded
):
    model, units = model_of(tiny_checkpoint("bert", layers=2, heads=2, hidden=16, ffn=8, head=False)).eval(), ("heads", "ffn")
    [whole] = eval_batches(examples, 99)
    signs = 2 * torch.randint(2, (len(whole.labels), len(BIO)), generator=torch.Generator().manual_seed(0)) - 1
    sizes = {unit: counts(model, unit) for unit in units}
    wanted = {unit: [torch.zeros(size) for size in sizes[unit]] for unit in units}
    for row in range(len(whole)):
        mine = whole.label_tokens[:, 0] == row
        [alone] = eval_batches(examples.choose(whole.index[row : row + 1].numpy()), 1)
        gates = {unit: [torch.ones(1, size, requires_grad=True) for size in sizes[unit]] for unit in units}
        flat = [gate for unit in units for gate in gates[unit]]
        with gated(model, gates):
            outputs = TOKENS.outputs(model(**alone.inputs), alone)
        parts = (
            (outputs * signs[mine]).flatten()
            if name == "gauss_newton"
            else -outputs.log_softmax(-1)[range(int(mine.sum())), alone.labels]
        )
        # Of each part alone, and then the sum: the gradient of an example is that of the sum of its words' losses.
        gradients = [torch.autograd.grad(part, flat, retain_graph=True) for part in parts]
        for number, total in enumerate(total for unit in units for total in wanted[unit]):
            summed = torch.stack([gradient[number][0] for gradient in gradients]).sum(0)
            total += summed.abs() if name == "taylor" else summed.square()
    found = criteria.criterion(name, TOKENS)(model, [whole], units)
    for unit in units:
        for one, total in zip(found[unit], wanted[unit], strict=True):
            torch.testing.assert_close(one, total / len(whole.labels), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("family", list(modeling_hpc_compress.FAMILIES))
def test_a_cut_model_of_every_family_is_saved_and_loaded_again(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
):
    model = model_of(tiny_checkpoint(family, layers=3, head=False)).eval()
    whole = tiny_batch()
    before = model(**whole).logits
    surgery.prune_heads_everywhere(model, [1])
    for index in range(3):
        surgery.prune_ffn(model, index, range(index + 1))
    artifact.save(model, tmp_path)
    loaded = artifact.load(tmp_path)
    torch.testing.assert_close(loaded(**whole).logits, model(**whole).logits)
    assert before.shape == (2, 9, len(BIO))
    assert loaded.config.id2label == dict(enumerate(BIO))


@pytest.mark.parametrize("family", list(modeling_hpc_compress.FAMILIES))
def test_dimensions_that_write_and_read_nothing_can_be_cut_from_the_stream(family: str, tiny_checkpoint: Callable[..., Path]):
    """The head on tokens reads the stream without a pooler: it must lose the same columns as the encoder."""
    model = model_of(tiny_checkpoint(family, layers=2, head=False)).eval()
    shared = modeling_hpc_compress.hidden_dims(model, surgery.family(model))
    readers = [path for path in shared if not path.startswith(f"{surgery.family(model).encoder}.")]
    assert len(readers) == 1, readers  # one weight outside of the encoder, and no bias
    modeling_hpc_compress.keep_hidden(model, surgery.family(model), slice(24))
    assert model(**tiny_batch()).logits.shape == (2, 9, len(BIO))


def tiny_batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(5, 23).view(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


# --- a whole search ---


@pytest.fixture(scope="module")
def words(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """The tiny search on sentences with tags. Some texts are longer than a window."""
    rows = [(a + b, c + d) for (a, c), (b, d) in zip(sentences(90), sentences(90, seed=1), strict=True)]
    path = write(tmp_path_factory.mktemp("words") / "rows.conll", rows)
    mine = ["dataset=tokens", f"dataset.train={path}", "dataset.name=words", "dataset.max_length=16"]
    others = [word for word in setup.overrides if not word.startswith("dataset")]
    return Setup([*others, *mine, "model.fine_tune={epochs: 6, learning_rate: 2e-3, batch_size: 8}"], setup.compose)


@pytest.fixture(scope="module")
def finished(words: Setup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished") / "run"
    words.run(root)
    return root


@pytest.mark.slow
def test_a_search_learns_the_tags_and_its_export_is_what_was_measured(finished: Path, tmp_path: Path):
    run = analysis.open_run(finished)
    base = run.outcomes[run.base_id].measurement
    assert base is not None
    assert list(base.metrics) == ["entity_f1", "accuracy"]
    assert base.metrics["entity_f1"] > 0.9
    target = export.export(finished, tmp_path / "model")
    card = (target / "README.md").read_text()
    assert "pipeline_tag: token-classification" in card
    assert "AutoModelForTokenClassification" in card
    tokenizer, model = AutoTokenizer.from_pretrained(target, trust_remote_code=False), artifact.load(target)
    assert model.config.id2label == dict(enumerate(BIO))
    rows = pd.read_parquet(finished / "data" / "report.parquet")
    seen = TOKENS.encode(tokenizer, rows, run.plan.dataset)
    outputs = measure.outputs(TOKENS, model, seen, 8, torch.device("cpu"))
    reported = run.report_of(run.result.best).measurement
    assert TOKENS.score(run.plan.dataset, rows, outputs) == pytest.approx(reported.metrics)
    [batch] = eval_batches(seen, 999)
    inputs = {name: tensor.tolist() for name, tensor in batch.inputs.items()}
    found = outputs_elsewhere(tmp_path, ["model"], inputs, TOKENS.auto_class)
    for logits in found.values():
        torch.testing.assert_close(
            torch.tensor(logits, dtype=torch.float32), model(**batch.inputs).logits, rtol=1e-4, atol=1e-5
        )


@pytest.mark.slow
def test_a_killed_search_goes_on_as_if_nothing_had_happened(words: Setup, finished: Path, tmp_path: Path):
    assert story(through_kills(words, tmp_path)) == story(finished)


@pytest.mark.slow
@pytest.mark.parametrize("program", [False, True])
def test_the_pipeline_of_transformers_gives_our_answers(finished: Path, tmp_path: Path, program: bool):
    """Token by token, for texts given as words, by a model that is exported or a program of it."""
    target = export.export(finished, tmp_path / "model", analysis.open_run(finished).base_id)
    tokenizer, model = AutoTokenizer.from_pretrained(target, trust_remote_code=False), artifact.load(target)
    if program:
        context: Any = None
        model = operator(Step(operator="quantize", params={"scheme": "onnx_int8"}))(model, context)
        folder = tmp_path / "program"
        folder.mkdir()
        artifact.save(model, folder)
        model = artifact.load(folder)
        assert type(model).__name__ == TOKENS.program_class
    rows = sentences(20, seed=3)
    table = pd.DataFrame({"tokens": [words for words, _ in rows], "label": [[0] * len(words) for words, _ in rows]})
    dataset = analysis.open_run(finished).plan.dataset.model_copy(update={"max_length": 128})
    outputs = measure.outputs(TOKENS, model, TOKENS.encode(tokenizer, table, dataset), 8, torch.device("cpu"))
    ours = iter(outputs.argmax(-1))
    tag = pipeline("token-classification", model=model, tokenizer=tokenizer, ignore_labels=[])
    for words, _ in rows:
        [found] = tag(words, is_split_into_words=True)
        starts = {sum(len(word) + 1 for word in words[:number]): number for number in range(len(words))}
        first = {starts[piece["start"]]: piece["entity"] for piece in found if piece["start"] in starts}
        assert [first[number] for number in range(len(words))] == [BIO[next(ours)] for _ in words]
