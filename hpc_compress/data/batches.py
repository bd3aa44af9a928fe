"""From text to tensors: tokenised examples, and batches of them with as little padding as possible.

Knows numpy and torch. Knows nothing of models, of devices but the copy to one, or of where the text came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike

# Training sorts pools of this many batches by length. A large pool has less padding, a small one more varied batches; at
# 64 batches 3 to 4 % of the positions are padding (3,000 sentences of SST-2), where random batches of 8 have 56 %, of 32 67 %.
POOL = 64


@dataclass(frozen=True)
class Encoded:
    """Tokenised, truncated examples in their original order, without padding."""

    # Flat arrays and not lists of lists: the 364 k pairs of QQP take 45 MB of memory, not 600.
    input_ids: np.ndarray  # (n_tokens,) int32, all examples one after another
    token_type_ids: np.ndarray | None  # (n_tokens,) int8; None where the tokenizer makes none or there is no second text
    offsets: np.ndarray  # (n + 1,) int64; example i is input_ids[offsets[i]:offsets[i + 1]]
    labels: np.ndarray  # (n_labels,) int64 for classes, float32 for regression; of all examples one after another
    pad_id: int  # what the tokenizer pads input_ids with
    # Both are None where each example has one label, which belongs to all of its text.
    label_offsets: np.ndarray | None = None  # (n + 1,) int64; example i has labels[label_offsets[i]:label_offsets[i + 1]]
    label_tokens: np.ndarray | None = None  # (n_labels,) int32, which token of its example a label belongs to
    paired: bool = False  # examples 2i and 2i + 1 are a pair, which no batch parts

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(n,) tokens in each example."""
        return np.diff(self.offsets)

    def take(self, n: int) -> Encoded:
        """The first n examples, or all if there are fewer."""
        return self.part(0, n)

    def part(self, begin: int, end: int) -> Encoded:
        """Examples begin to end, without the later ones if there are fewer."""
        part = self.choose(np.arange(len(self))[begin:end])
        return replace(part, paired=self.paired and begin % 2 == 0)

    def choose(self, rows: np.ndarray) -> Encoded:
        """The examples at these positions, in this order."""
        tokens, labels = _places(self.offsets, rows), self.labels_of(rows)
        return replace(
            self,
            input_ids=self.input_ids[tokens],
            token_type_ids=None if self.token_type_ids is None else self.token_type_ids[tokens],
            offsets=offsets_of(self.lengths[rows]),
            labels=self.labels[labels],
            label_offsets=None if self.label_offsets is None else offsets_of(np.diff(self.label_offsets)[rows]),
            label_tokens=None if self.label_tokens is None else self.label_tokens[labels],
            paired=False,
        )

    def labels_of(self, rows: np.ndarray) -> np.ndarray:
        """Positions in `labels` of what belongs to these examples, in their order."""
        return rows if self.label_offsets is None else _places(self.label_offsets, rows)


def offsets_of(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _places(offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Positions of all items of these rows; row i has those from offsets[i] to offsets[i + 1]."""
    counts = np.diff(offsets)[rows]
    return np.repeat(offsets[rows] - offsets_of(counts)[:-1], counts) + np.arange(counts.sum())


@dataclass(frozen=True)
class Batch:
    inputs: dict[str, torch.Tensor]  # ready for model(**inputs); each (batch, longest example of the batch)
    labels: torch.Tensor  # (batch,), or (labels,) where an example may have several: of all examples one after another
    # What lies where in the Encoded; on the CPU, whatever the device.
    index: torch.Tensor  # (batch,) int64, positions of these examples
    label_index: torch.Tensor  # of the shape of `labels`, int64, positions of these labels
    label_tokens: torch.Tensor | None = None  # (labels, 2) int64: the row of the batch and the token that a label belongs to

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device) -> Batch:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            # Only from pinned memory does the copy run beside the kernels that are already queued.
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

        return replace(
            self,
            inputs={name: move(tensor) for name, tensor in self.inputs.items()},
            labels=move(self.labels),
            label_tokens=None if self.label_tokens is None else move(self.label_tokens),
        )


def encode(tokenizer, text: Sequence[str], text2: Sequence[str] | None, labels: ArrayLike, max_length: int) -> Encoded:
    """Tokenises texts, or pairs of texts, and cuts each example to max_length tokens.

    Integer labels are classes, floating-point ones are regression targets.
    """
    labels = np.asarray(labels)
    if labels.dtype.kind not in "biuf":
        raise TypeError(f"labels have dtype {labels.dtype}; give class numbers (integers) or regression targets (floats)")
    sizes = {"text": len(text), "labels": len(labels)} | ({} if text2 is None else {"text2": len(text2)})
    if len(set(sizes.values())) != 1 or not len(text):
        raise ValueError(f"sizes are {sizes}; every example needs its text and its label, and there must be at least one")
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no padding token; set tokenizer.pad_token")

    tokens = tokenizer(list(text), None if text2 is None else list(text2), truncation=True, max_length=max_length)
    # For a single text the types are all 0, which is what every model assumes where none are given.
    types = tokens.get("token_type_ids") if text2 is not None else None
    return Encoded(
        input_ids=np.concatenate(tokens["input_ids"]).astype(np.int32),
        token_type_ids=None if types is None else np.concatenate(types).astype(np.int8),
        offsets=offsets_of(np.array([len(ids) for ids in tokens["input_ids"]])),
        labels=labels.astype(np.float32 if labels.dtype.kind == "f" else np.int64),
        pad_id=tokenizer.pad_token_id,
    )


def train_batches(encoded: Encoded, batch_size: int, generator: np.random.Generator) -> Iterator[Batch]:
    """One epoch: every example once, in batches of similar length that come in random order."""
    lengths, size = _lengths(encoded, batch_size)
    order = generator.permutation(len(lengths))
    chunks = []
    for start in range(0, len(order), POOL * size):
        pool = order[start : start + POOL * size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]  # stable: equal lengths stay shuffled
        chunks += [pool[at : at + size] for at in range(0, len(pool), size)]
    for k in generator.permutation(len(chunks)):
        yield _batch(encoded, _examples(encoded, chunks[k]))


def eval_batches(encoded: Encoded, batch_size: int) -> Iterator[Batch]:
    """Every example once, longest first, so that a batch too large for the memory fails at once."""
    lengths, size = _lengths(encoded, batch_size)
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), size):
        yield _batch(encoded, _examples(encoded, order[start : start + size]))


def _lengths(encoded: Encoded, batch_size: int) -> tuple[np.ndarray, int]:
    """Of what stays together, an example or a pair, the longest text; and how many of these a batch holds."""
    if not encoded.paired:
        return encoded.lengths, batch_size
    return np.maximum.reduceat(encoded.lengths, np.arange(0, len(encoded), 2)), max(1, batch_size // 2)


def _examples(encoded: Encoded, chosen: np.ndarray) -> np.ndarray:
    """Positions of the examples, where pairs may have been chosen."""
    if not encoded.paired:
        return chosen
    both = (2 * chosen[:, None] + np.arange(2)).ravel()
    return both[both < len(encoded)]  # the first examples of a set may end within a pair


def _batch(encoded: Encoded, index: np.ndarray) -> Batch:
    lengths = encoded.lengths[index, None]
    column = np.arange(lengths.max())
    real = column < lengths  # (batch, longest)
    position = np.where(real, encoded.offsets[index, None] + column, 0)
    inputs = {"input_ids": np.where(real, encoded.input_ids[position], encoded.pad_id), "attention_mask": real}
    if encoded.token_type_ids is not None:
        inputs["token_type_ids"] = np.where(real, encoded.token_type_ids[position], 0)
    labels, tokens = encoded.labels_of(index), None
    if encoded.label_offsets is not None and encoded.label_tokens is not None:
        rows = np.repeat(np.arange(len(index)), np.diff(encoded.label_offsets)[index])
        tokens = torch.from_numpy(np.stack([rows, encoded.label_tokens[labels]], axis=1))
    return Batch(
        inputs={name: torch.from_numpy(array.astype(np.int64)) for name, array in inputs.items()},
        labels=torch.from_numpy(encoded.labels[labels]),
        index=torch.from_numpy(index),
        label_index=torch.from_numpy(labels),
        label_tokens=tokens,
    )
