"""One class a token, such as the kind of a name (NER) or a part of speech (POS).

What the datasets call tokens is called words here, since a tokenizer cuts them into pieces. The label of a word belongs to its
first piece (Devlin et al. 2019, BERT, section 5.3, https://arxiv.org/abs/1810.04805). A word of which a tokenizer makes no
piece at all, such as a control character alone, is given to it as an unknown word, so that it gets an answer too.

A text of more pieces than `max_length` is read in several windows, which overlap: each word is answered in one of them, with
a quarter of the window before and behind it where the text has as much.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hpc_compress.config import ConfigError, DatasetConfig
from hpc_compress.data import conll, metrics
from hpc_compress.problems.classes import ClassProblem, class_name
from hpc_compress.types import Dataset

if TYPE_CHECKING:
    import torch

    from hpc_compress.data.batches import Batch, Encoded

ENTITY = re.compile(r"O|[BIESLU]-.+", re.DOTALL)  # tags of BIO (IOB1, IOB2), of IOBES and of BILOU
EXAMPLE = """from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

model = AutoModelForTokenClassification.from_pretrained({path!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({path!r})
tag = pipeline("token-classification", model=model, tokenizer=tokenizer, aggregation_strategy="first")
entities = tag("a text")  # of words: tag([["a", "text"]], is_split_into_words=True)"""


class TokenClassification(ClassProblem):
    """The model's outputs are (words, classes) logits, those at the first piece of each word."""

    metrics = ("entity_f1", "accuracy", "macro_f1")
    auto_class = "AutoModelForTokenClassification"
    model_class = "HpcCompressForTokenClassification"
    program_class = "HpcCompressOnnxForTokenClassification"
    head = "classifier."
    pipeline_tag = "token-classification"
    formats = (".conll", ".conllu", ".txt")
    several = "check dataset.label"

    # --- rows: the columns text (words with blanks between them), tokens (the words) and label (their tags) ---

    def check(self, config: DatasetConfig) -> None:
        super().check(config)
        if config.text2 is not None:
            raise ConfigError(f"dataset.text2={config.text2!r}: tokens with labels have no second text; leave it out")

    def read(self, path: Path, config: DatasetConfig) -> pd.DataFrame | None:
        suffix = path.suffix.lower()
        if suffix == ".tsv":
            with path.open(encoding=config.encoding) as stream:
                header = stream.readline().lstrip("\ufeff").rstrip("\n").split("\t")
            if {config.text, config.label} <= set(header):
                return None
        elif suffix not in self.formats:
            return None
        return conll.read(path, config.text, config.label, config.encoding)

    def columns(self, config: DatasetConfig) -> dict[str, str]:
        return {"text": config.text, "label": config.label}

    def clean(self, table: pd.DataFrame, config: DatasetConfig, split: str) -> pd.DataFrame:
        found: dict[str, list[Any]] = {"text": [], "tokens": [], "label": []}
        rows = []
        for row, text, label in zip(table.index, table["text"], table["label"], strict=True):
            words, tags = _items(text), _items(label)
            if not words or not tags:
                continue
            where = f"row {int(row) + 1} of split {split!r} of {config.name} ({' '.join(map(str, words))[:40]!r})"
            if isinstance(label, str) and label.startswith("[") and label.endswith("]"):
                raise ConfigError(
                    f"{where} has the tags {label[:40]!r}; write them with one blank between two, or as a parquet file"
                )
            if len(words) != len(tags):
                raise ConfigError(
                    f"{where} has {len(words)} tokens and {len(tags)} tags; give each token one tag, "
                    "and check dataset.text and dataset.label"
                )
            for name, items in (("token", words), ("tag", tags)):
                odd = [number for number, item in enumerate(items) if not isinstance(item, str | int | float | np.generic)]
                odd += [number for number, item in enumerate(items) if item == "" or item != item]
                if odd:
                    raise ConfigError(
                        f"{where}: {name} {odd[0] + 1} is {items[odd[0]]!r}; give each {name} as a text that is not empty"
                    )
            rows.append(row)
            found["tokens"].append(list(map(str, words)))
            found["text"].append(" ".join(found["tokens"][-1]))
            found["label"].append(list(map(class_name, tags)))
        return pd.DataFrame(found, index=rows, dtype=object)

    def labels(self, train: pd.DataFrame, config: DatasetConfig) -> tuple[str, ...]:
        values = super().labels(train, config)
        if "entity_f1" in (config.metrics or ()) and not _name_entities(values):
            odd = next((value for value in values if not ENTITY.fullmatch(value)), values[0])
            raise ConfigError(
                f"dataset.metrics has entity_f1, which needs tags such as O, B-PER and I-PER, but {config.name} has {odd!r}; "
                "use accuracy or macro_f1"
            )
        return values

    def default_metrics(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        return ("entity_f1", "accuracy") if _name_entities(labels) else ("accuracy", "macro_f1")

    def numbered(self, label: pd.Series, ids: dict[str, int]) -> pd.Series:
        return label.map(lambda tags: [ids[tag] for tag in tags])

    # --- scores: standard errors are of samples of sentences, since words of one sentence are not independent ---

    def score(self, dataset: Dataset, rows: pd.DataFrame, outputs: np.ndarray) -> dict[str, float]:
        return self._scores(dataset, rows, self.answers(dataset, rows, outputs))

    def answers(self, dataset: Dataset, rows: pd.DataFrame, outputs: np.ndarray) -> np.ndarray:
        return outputs.argmax(-1)

    def standard_errors(self, dataset: Dataset, rows: pd.DataFrame, answers: np.ndarray) -> dict[str, float]:
        drawn = {name: metrics.resampled_counts(_counts(name, dataset, rows, answers)) for name in dataset.metrics}
        return {name: float(np.std(metrics.mean_f1(counts), ddof=1)) for name, counts in drawn.items()}

    def difference(self, dataset: Dataset, rows: pd.DataFrame, one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
        counts = np.stack([_counts(dataset.metrics[0], dataset, rows, answers) for answers in (one, other)], axis=1)
        first, second = metrics.mean_f1(counts.sum(0))
        drawn = metrics.mean_f1(metrics.resampled_counts(counts))
        return float(first - second), float(np.std(drawn[:, 0] - drawn[:, 1], ddof=1))

    def trivial(self, dataset: Dataset, rows: pd.DataFrame) -> dict[str, float]:
        flat = np.concatenate(rows["label"].to_list())
        scores = [self._scores(dataset, rows, np.full(len(flat), answer)) for answer in np.unique(flat)]
        return {name: max(score[name] for score in scores) for name in dataset.metrics}

    def _scores(self, dataset: Dataset, rows: pd.DataFrame, answers: np.ndarray) -> dict[str, float]:
        return {name: float(metrics.mean_f1(_counts(name, dataset, rows, answers).sum(0))) for name in dataset.metrics}

    # --- tensors ---

    def tokenizer(self, folder: Path) -> Any:
        """One that cuts a word that it is given alone as it would inside a text: for byte-level BPE (RoBERTa, ModernBERT), with
        the blank before it."""
        from tokenizers import Tokenizer
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, add_prefix_space=True)
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} can't say which pieces a word has; save the checkpoint with a fast tokenizer "
                "(a tokenizer.json)"
            )
        # A tokenizer that has no class of its own, such as ModernBERT's, ignores the option.
        state = tokenizer.backend_tokenizer.to_str()
        spaced = re.sub(r'("type":"ByteLevel","add_prefix_space":)false', r"\1true", state)
        if spaced != state:
            tokenizer._tokenizer = Tokenizer.from_str(spaced)
        return tokenizer

    def encode(self, tokenizer: Any, rows: pd.DataFrame, dataset: Dataset) -> "Encoded":
        from hpc_compress.data.batches import Encoded, offsets_of

        ids, counts, owned, firsts = [], [], [], []
        for pieces, of_words in _pieces(tokenizer, [list(map(str, words)) for words in rows["tokens"]]):
            inside = np.flatnonzero(of_words >= 0)
            before, behind, pieces = pieces[: inside[0]], pieces[inside[-1] + 1 :], pieces[inside]
            starts = np.append(np.unique(of_words[inside], return_index=True)[1], len(inside))
            for begin, end, core, core_end in _windows(starts, dataset.max_length - len(before) - len(behind)):
                ids += [before, pieces[begin:end], behind]
                counts.append(len(before) + end - begin + len(behind))
                owned.append(core_end - core)
                firsts.append(starts[core:core_end] - begin + len(before))
        return Encoded(
            input_ids=np.concatenate(ids).astype(np.int32),
            token_type_ids=None,
            offsets=offsets_of(np.array(counts)),
            labels=np.concatenate(rows["label"].to_list()).astype(np.int64),
            pad_id=tokenizer.pad_token_id,
            label_offsets=offsets_of(np.array(owned)),
            label_tokens=np.concatenate(firsts).astype(np.int32),
        )

    def outputs(self, answer: Any, batch: "Batch") -> "torch.Tensor":
        assert batch.label_tokens is not None
        rows, tokens = batch.label_tokens.unbind(1)
        return answer.logits[rows, tokens]

    # --- models ---

    def example(self, path: str, dataset: Dataset) -> str:
        return EXAMPLE.format(path=path)


def _items(value: Any) -> list[Any]:
    """Words or tags of a sentence: a list, or a text with one blank between two of them."""
    if isinstance(value, str):
        return value.split(" ") if value else []
    if isinstance(value, list | tuple | np.ndarray):
        return list(value)
    return [] if value is None or value != value else [value]


def _name_entities(labels: tuple[str, ...]) -> bool:
    """Whether tags mark where the names of things begin and go on."""
    return all(map(ENTITY.fullmatch, labels)) and any(label != "O" for label in labels)


def _counts(name: str, dataset: Dataset, rows: pd.DataFrame, answers: np.ndarray) -> np.ndarray:
    """(sentences, kinds, 3) of which a metric is the mean F1: how many are right, how many there are, how many were found. An
    accuracy is the F1 of words, of which there are as many as are found.

    answers: (words,) class ids. Raises: ValueError where they are no answers to these rows.
    """
    sizes, labels = rows["label"].map(len).to_numpy(), np.concatenate(rows["label"].to_list())
    known = np.arange(len(dataset.labels))
    if answers.shape != labels.shape or not np.isin(labels, known).all() or not np.isin(answers, known).all():
        raise ValueError(f"{len(answers)} answers do not fit {len(labels)} words with {len(known)} classes")
    answers = answers.astype(int)
    if name == "entity_f1":
        names, ends = np.array(dataset.labels, dtype=object), np.cumsum(sizes)[:-1]
        mine, others = ([metrics.entities(tags) for tags in np.split(names[ids], ends)] for ids in (labels, answers))
        pairs = zip(mine, others, strict=True)
        return np.array([[[len(true & found), len(true), len(found)]] for true, found in pairs])
    kinds = len(dataset.labels) if name == "macro_f1" else 1
    rows_of = np.repeat(np.arange(len(rows)), sizes)
    right = labels == answers

    def counted(chosen: np.ndarray, ids: np.ndarray) -> np.ndarray:
        places = rows_of[chosen] * kinds + (ids[chosen] if kinds > 1 else 0)
        return np.bincount(places, minlength=len(rows) * kinds).reshape(len(rows), kinds)

    every = np.ones(len(labels), dtype=bool)
    return np.stack([counted(right, labels), counted(every, labels), counted(every, answers)], axis=-1)


def _pieces(tokenizer: Any, texts: list[list[str]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The pieces of each text, special tokens before and behind them, and the number of each piece's word, -1 for special ones.

    Every word has a piece: the unknown one, where the tokenizer makes none.
    """

    def cut(texts: list[list[str]]) -> list[tuple[np.ndarray, np.ndarray]]:
        tokens = tokenizer(texts, is_split_into_words=True, return_attention_mask=False, verbose=False)
        numbers = [tokens.word_ids(row) for row in range(len(texts))]
        return [
            (np.array(ids), np.array([-1 if number is None else number for number in row]))
            for ids, row in zip(tokens["input_ids"], numbers, strict=True)
        ]

    for words, (ids, of_words) in zip(texts, cut(texts), strict=True):
        if len(missing := set(range(len(words))) - set(of_words.tolist())):
            readable = [tokenizer.unk_token if number in missing else word for number, word in enumerate(words)]
            [(ids, of_words)] = cut([readable])
        yield ids, of_words


def _windows(starts: np.ndarray, room: int) -> list[tuple[int, int, int, int]]:
    """Windows that answer each word of a text once: the first piece and the end of the window, the first word that it answers
    and the end of these words.

    starts: (words + 1,) the first piece of each word, and the end of the text; room: pieces in a window. Of a word that is
    longer than the room, the end is left out.
    """
    context, end, core, windows = room // 4, int(starts[-1]), 0, []
    while core < len(starts) - 1:
        # Whole words before the first one that is answered here, as many as fit into the context.
        begin = int(starts[np.searchsorted(starts, starts[core] - context)]) if core else 0
        last = begin + room
        core_end = len(starts) - 1
        if end > last:
            core_end = max(core + 1, int(np.searchsorted(starts, last - context, "right")) - 1)
        windows.append((begin, min(end, last), core, core_end))
        core = core_end
    return windows
