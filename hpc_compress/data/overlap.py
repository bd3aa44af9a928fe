"""Which texts are the same or lie in one another, so that splits don't share them. Knows numpy and pandas, no torch.

A text is compared by its words alone: letters and digits, without case, punctuation and white space. It lies in another one
if its words are a run of the other's words. Two pairs are the same if both of their texts are, in either order.

Texts of a pair are not compared one by one: a question of QQP stands in many pairs, and if pairs that share a question had to
stay together, most of QQP would be one group. Such rows are counted instead.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from hpc_compress.types import Overlap, Split

WORD = re.compile(r"[^\W_]+")
NEGATION = re.compile(r"(?<=\w)n['\u2019]t\b| n['\u2019]t\b")  # "don't" is "do n't" to the tokenizer that made SST-2
LARGEST = 0.01  # share of the rows held out; a group of equal rows that is larger stays in train if possible
CHUNK = 2**22  # candidate places that are compared at a time: about 100 MB


def normal(text: str) -> str:
    """The words of a text with a blank between two; a text without any word is kept as it is, but for white space."""
    text = text if text.isascii() else unicodedata.normalize("NFKC", text)
    text = NEGATION.sub(" n t", text.casefold())
    return " ".join(WORD.findall(text) or text.split())


def keys(rows: pd.DataFrame) -> np.ndarray:
    """(n,) one string a row, equal for rows that are the same."""
    first = [normal(text) for text in rows["text"]]
    if "text2" not in rows:
        return np.array(first, dtype=object)
    second = [normal(text) for text in rows["text2"]]
    return np.array(["\n".join(sorted(pair)) for pair in zip(first, second, strict=True)], dtype=object)


def runs(needles: Sequence[str] | np.ndarray, texts: Sequence[str] | np.ndarray) -> np.ndarray:
    """Which needles are runs of words of which texts: (n, 2) pairs of a needle's and a text's index, sorted, none twice.

    All strings are as `normal` gives them. A needle also lies in a text that equals it.

    The hash of every run of 2^k words follows from those of 2^(k-1) (Karp, Miller and Rosenberg 1972, Rapid identification of
    repeated patterns). A needle of n words is where both its first and its last 2^k words are, 2^k the largest power up to n.
    """
    numbers: dict[str, int] = {}
    split = [[numbers.setdefault(word, len(numbers) + 1) for word in text.split()] for text in (*texts, *needles)]
    lengths = np.array([len(words) for words in split], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths + 1)]).astype(np.int64)
    stream = np.zeros(int(starts[-1]), dtype=np.uint64)  # after each text a 0, which is no word
    for start, words in zip(starts, split, strict=False):
        stream[start : start + len(words)] = words
    del split, numbers
    owner = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths + 1)
    needle = np.arange(len(texts), len(lengths))  # as they are numbered in the stream
    end = int(starts[len(texts)])  # of the texts
    found = [np.empty((0, 2), dtype=np.int32)]
    hashes, width = _mixed(stream), 1
    while width <= lengths[needle].max(initial=0):
        now = needle[(lengths[needle] >= width) & (lengths[needle] < 2 * width)]
        order = np.argsort(hashes[:end], kind="stable")
        ranked = hashes[:end][order]
        last = lengths[now] - width  # from the first word of a needle to the first of its last 2^k words
        first_hash, last_hash = hashes[starts[now]], hashes[starts[now] + last]
        low, low2 = (np.searchsorted(ranked, value, "left") for value in (first_hash, last_hash))
        high, high2 = (np.searchsorted(ranked, value, "right") for value in (first_hash, last_hash))
        # The rarer of both ends is looked up, and the other one compared.
        rarer = high2 - low2 < high - low
        low, count = np.where(rarer, low2, low), np.where(rarer, high2 - low2, high - low)
        step, wanted = np.where(rarer, -last, last), np.where(rarer, first_hash, last_hash)
        for part in _chunks(count):
            n = count[part]
            which = np.repeat(part, n)
            place = order[np.repeat(low[part] - np.cumsum(n) + n, n) + np.arange(n.sum())]
            other = place + step[which]
            hit = (other >= 0) & (other < end)
            hit[hit] = (hashes[other[hit]] == wanted[which[hit]]) & (owner[place[hit]] == owner[other[hit]])
            pairs = np.stack([now[which[hit]] - len(texts), owner[place[hit]]], axis=1).astype(np.int32)
            found.append(_distinct(pairs))
        following = np.zeros_like(hashes)
        following[:-width] = hashes[width:]
        hashes = _mixed(hashes * np.uint64(0x9E3779B97F4A7C15) + following)
        width *= 2
    return _distinct(np.concatenate(found))


def _mixed(values: np.ndarray) -> np.ndarray:
    """64 bits that depend on every bit of each value (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _distinct(pairs: np.ndarray) -> np.ndarray:
    """The rows of (n, 2) int32 pairs, rising, none twice."""
    single = np.unique(pairs[:, 0].astype(np.int64) << 32 | pairs[:, 1])
    return np.stack([single >> 32, single & 0xFFFFFFFF], axis=1).astype(np.int32)


def _chunks(counts: np.ndarray) -> list[np.ndarray]:
    """Indices in order, cut so that the counts of a part add up to CHUNK, or a single one is larger."""
    marks = np.cumsum(counts) // CHUNK
    return [part for part in np.split(np.arange(len(counts)), np.flatnonzero(np.diff(marks)) + 1) if len(part)]


class Groups:
    """Rows in groups that stay on one side of a split.

    Equal rows are one group. A text that is part of longer ones is never held out. It stays in train if one of the longest
    texts that contain it stays there; otherwise it is in neither split. So no held-out text is part of a train text, and a
    short text that is part of many ("good") does not tie them together.
    """

    def __init__(self, rows: pd.DataFrame) -> None:
        unique, self.group = np.unique(keys(rows), return_inverse=True)  # group: (n,) of each row
        self.sizes = np.bincount(self.group, minlength=len(unique))
        around = runs(unique, unique) if "text2" not in rows else np.empty((0, 2), dtype=np.int32)
        around = around[around[:, 0] != around[:, 1]]
        self.whole = np.ones(len(unique), dtype=bool)  # lies in no other text
        self.whole[around[:, 0]] = False
        self.around = around[self.whole[around[:, 1]]]  # a text that is part of others, and a whole text that contains it

    def hold_out(self, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Those of `rows` that stay in train, and `count` rows held out; the others belong to neither.

        rows: row numbers in random order, which decides. Groups are taken from the end as long as they fit; if none does,
        the smallest one is taken whole. A text that occurs very often, such as a retweet, must not decide a split's results:
        groups larger than `LARGEST` of the rows held out are taken only if the others are too few.
        """
        groups = self.group[rows]
        order = list(dict.fromkeys(groups[::-1][self.whole[groups[::-1]]]))
        order.sort(key=lambda group: self.sizes[group] > max(1, LARGEST * count))  # else they keep their order
        out = np.zeros(len(self.sizes), dtype=bool)
        left = count
        for group in order:
            if self.sizes[group] <= left:
                out[group] = True
                left -= self.sizes[group]
        if left == count and order:
            out[min(order, key=lambda group: self.sizes[group])] = True
        stays = np.bincount(groups, minlength=len(self.sizes)) > 0
        stays &= ~out
        in_train = np.zeros(len(self.sizes), dtype=bool)  # texts with a whole text around them in train
        in_train[self.around[stays[self.around[:, 1]], 0]] = True
        stays &= self.whole | in_train
        return rows[stays[groups]], rows[out[groups]]


def between(tables: Mapping[str, pd.DataFrame]) -> tuple[Overlap, ...]:
    """How many rows of the search and the report split are also in train, and of the report in the search split."""
    normals = {split: keys(table) for split, table in tables.items()}
    pair = "text2" in tables["train"]
    return tuple(_overlap(normals, *both, pair) for both in (("search", "train"), ("report", "train"), ("report", "search")))


def _overlap(normals: Mapping[str, np.ndarray], split: Split, of: str, pair: bool) -> Overlap:
    others = np.unique(normals[of])
    mine, back = np.unique(normals[split], return_inverse=True)
    equal = np.isin(mine, others)
    akin = np.zeros(len(mine), dtype=bool)
    if pair:
        known = {text for key in others for text in key.split("\n")} - {""}  # a pair may have one text only
        akin[:] = [not known.isdisjoint(key.split("\n")) for key in mine]
    else:
        akin[runs(mine, others)[:, 0]] = True
    number = int((akin & ~equal)[back].sum())
    counts = {"shared": number} if pair else {"inside": number}
    return Overlap(split=split, of=of, rows=len(back), equal=int(equal[back].sum()), **counts)  # type: ignore[arg-type]
