"""Vocabularies cut down to what a corpus uses, by editing the JSON form of a fast tokenizer. Knows no models and no torch.

Promise of `trim` with the ids of `used`: a text whose pieces are all kept, the unknown token not among them, gets the same
pieces; any other text falls back to smaller pieces or the unknown token, and never fails. Why it holds:
WordPiece takes the longest match at each place, and that one is kept, while the shorter ones it passed over stay passed over.
BPE merges by rank, and a merge that was made is kept with both its parts, so it is still the first one possible.
Unigram takes the path of the highest score, which is kept and has fewer rivals; the price of an unknown character follows
from the lowest score of all, so the piece that has it is kept too.
"""

import copy
import json
import re
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODELS = ("WordPiece", "BPE", "Unigram", "WordLevel")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # how SentencePiece spells a byte of a character that it does not know
LINES = 10_000  # of a text file, tokenized at once


def count(tokenizer: "PreTrainedTokenizerBase", path: Path) -> np.ndarray:
    """How often each token stands in a text file, one text a line. Returns: (ids,) int64.

    Raises: ValueError when there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"corpus={str(path)!r} is no file on this node; give train, or the full path of a text file")
    total = np.zeros(1 + max(tokenizer.get_vocab().values()), dtype=np.int64)
    with path.open(encoding="utf-8", errors="replace") as stream:
        while lines := [line.strip() for line in islice(stream, LINES)]:
            ids = list(chain.from_iterable(tokenizer(lines, add_special_tokens=False)["input_ids"]))
            total += np.bincount(np.array(ids, dtype=np.int64), minlength=len(total))
    return total


def used(tokenizer: "PreTrainedTokenizerBase", counts: np.ndarray, min_count: int = 1) -> np.ndarray:
    """The ids to keep: tokens that stand in the corpus at least `min_count` times, all special and added ones, and what other
    words fall back to: single characters and bytes, and what the merges of a kept token are made of.

    counts: (ids,) how often each id stands in the corpus; ids beyond its end stand there never.

    Returns: (kept,) int64, rising.

    Raises: ValueError for a tokenizer that has no fast backend, or one of another kind.
    """
    state = _state(tokenizer)
    model, ids = state["model"], tokenizer.get_vocab()
    kept = {token for token, index in ids.items() if index < len(counts) and counts[index] >= min_count}
    kept |= {token["content"] for token in state["added_tokens"]}
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    bare = {token: token.removeprefix(prefix).removesuffix(suffix) for token in ids}
    kept |= {token for token in ids if len(token) == 1 or len(bare[token]) == 1 or BYTE.fullmatch(token)}
    if model["type"] == "Unigram":
        kept |= {min(model["vocab"], key=lambda piece: piece[1])[0]}
        kept |= {model["vocab"][model["unk_id"]][0]} if model["unk_id"] is not None else set()
    elif model["unk_token"] in ids:
        kept |= {model["unk_token"]}
    if model["type"] == "BPE":
        parts: dict[str, list[str]] = {}
        for left, right in model["merges"]:
            parts.setdefault(left + right.removeprefix(prefix), []).extend((left, right))
        todo = list(kept)
        while todo:
            new = set(parts.get(todo.pop(), ())) - kept
            kept |= new
            todo += new
    return np.array(sorted(ids[token] for token in kept), dtype=np.int64)


def trim(tokenizer: "PreTrainedTokenizerBase", kept: np.ndarray) -> "PreTrainedTokenizerBase":
    """A copy of the tokenizer that knows the kept ids only: `kept[i]` becomes `i`. The tokenizer itself stays as it is.

    kept: (n,) rising ids, as from `used`.

    Raises: ValueError as `used`, and for a tokenizer whose ids can't be renumbered.
    """
    state = _state(tokenizer)
    new = {int(old): index for index, old in enumerate(kept)}
    model = state["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [piece for index, piece in enumerate(model["vocab"]) if index in new]
        model["unk_id"] = new.get(model["unk_id"])
    else:
        model["vocab"] = {token: new[index] for token, index in model["vocab"].items() if index in new}
    if model["type"] == "BPE":
        prefix, vocabulary = model.get("continuing_subword_prefix") or "", model["vocab"]
        model["merges"] = [
            (left, right)
            for left, right in model["merges"]
            if left in vocabulary and right in vocabulary and left + right.removeprefix(prefix) in vocabulary
        ]
    state["added_tokens"] = [{**token, "id": new[token["id"]]} for token in state["added_tokens"] if token["id"] in new]
    if state["padding"] is not None:
        state["padding"]["pad_id"] = new[state["padding"]["pad_id"]]
    if state["post_processor"] is not None:
        _renumber(state["post_processor"], new)
    trimmed = copy.deepcopy(tokenizer)
    trimmed._tokenizer = Tokenizer.from_str(json.dumps(state))  # the class offers no way to exchange its backend
    if trimmed.get_vocab() != {token: new[index] for token, index in tokenizer.get_vocab().items() if index in new}:
        raise ValueError(f"the ids of {type(tokenizer).__name__} can't be renumbered; deploy it without trim_vocabulary")
    return trimmed


def _state(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """The JSON form of the backend."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} has no fast backend, so its vocabulary can't be trimmed; "
            "save the checkpoint with a fast tokenizer (a tokenizer.json), or deploy it without trim_vocabulary"
        )
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] not in MODELS:
        raise ValueError(f"a {state['model']['type']} vocabulary can't be trimmed, only one of {', '.join(MODELS)}")
    return state


def _renumber(processor: dict[str, Any], new: dict[int, int]) -> None:
    """The ids of special tokens in a post-processor, in place."""
    for inner in processor.get("processors", ()):  # Sequence
        _renumber(inner, new)
    for special in processor.get("special_tokens", {}).values():  # TemplateProcessing
        special["ids"] = [new[index] for index in special["ids"]]
    for name in ("cls", "sep"):  # BertProcessing, RobertaProcessing
        if name in processor:
            token, index = processor[name]
            processor[name] = (token, new[index])
