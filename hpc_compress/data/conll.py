"""Sentences from CoNLL files: one line a word, its columns apart by tabs or blanks, an empty line after each sentence.

Knows text files and pandas; nothing of tags.
"""

import re
from pathlib import Path

import pandas as pd

DOCUMENT = "-DOCSTART-"  # CoNLL-2003 has a line of its own before each document
NAMES = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")  # the columns of a CoNLL-U file


def read(path: Path, words: str, tags: str, encoding: str) -> pd.DataFrame:
    """A row for each sentence; the columns `words` and `tags` hold lists of strings.

    words, tags: the number of a column from 0, or from the end as -1; in a file that ends in .conllu also its name. "tokens"
    stands for the first column and "tags" for the last one, in a .conllu file for form and upos.

    A line that begins with # is a comment if it has another number of columns than the words: a word may begin with # too.
    CoNLL-U's lines for ranges of words (1-2) and for empty words (1.1) are left out.

    Raises: ValueError for a line with another number of columns, or a column that is not there; UnicodeError.
    """
    universal = path.suffix.lower() == ".conllu"
    with path.open(encoding="utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding) as stream:
        lines = [(number, line.rstrip("\n")) for number, line in enumerate(stream, 1)]
    of_words = [(number, line) for number, line in lines if line.strip(" \t") and not line.startswith(("#", DOCUMENT))]
    first, example = next(iter(of_words), (0, ""))
    tabs = "\t" in example

    def split(line: str) -> list[str]:
        return line.split("\t") if tabs else re.split("[ \t]+", line.strip(" \t"))

    width = len(split(example))
    places = [_place(name, width, universal) for name in (words, tags)]
    sentences: list[tuple[list[str], list[str]]] = [([], [])]
    for number, line in lines:
        if not line.strip(" \t"):
            sentences.append(([], []))
            continue
        fields = split(line)
        if fields[0] == DOCUMENT or (line.startswith("#") and len(fields) != width):
            continue
        if len(fields) != width:
            raise ValueError(f"line {number} has {len(fields)} columns, and line {first} has {width}")
        if not universal or fields[0].isdecimal():
            for place, column in zip(places, sentences[-1], strict=True):
                column.append(fields[place])
    return pd.DataFrame([sentence for sentence in sentences if sentence[0]], columns=[words, tags])


def _place(name: str, width: int, universal: bool) -> int:
    """The number of a column. Raises: ValueError."""
    if universal and name in NAMES[:width]:
        return NAMES.index(name)
    if name in ("tokens", "tags"):
        return NAMES.index("form" if name == "tokens" else "upos") if universal else (0 if name == "tokens" else -1)
    if re.fullmatch(r"-?\d{1,4}", name) and -width <= int(name) < width:
        return int(name)
    names = f", or by name: {', '.join(NAMES[:width])}" if universal else ""
    raise ValueError(f"there is no column {name!r}; give its number, 0 to {width - 1}, or -1 for the last one{names}")
