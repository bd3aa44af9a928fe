"""What problems with one label for each text, or pair of texts, share. transformers calls them sequence classification."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hpc_compress.config import ConfigError, DatasetConfig
from hpc_compress.data import metrics
from hpc_compress.problems.base import Problem
from hpc_compress.types import Dataset

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from hpc_compress.data.batches import Batch, Encoded

EXAMPLE = """from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained({path!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({path!r})
logits = model(**tokenizer({text}, return_tensors="pt")).logits"""


class SequenceProblem(Problem):
    """One label a text or a pair of texts; what the label is, a subclass says."""

    auto_class = "AutoModelForSequenceClassification"
    model_class = "HpcCompressForSequenceClassification"
    program_class = "HpcCompressOnnxForSequenceClassification"
    head = "classifier."
    pipeline_tag = "text-classification"

    def columns(self, config: DatasetConfig) -> dict[str, str]:
        wanted = {"text": config.text, "text2": config.text2, "label": config.label}
        return {name: column for name, column in wanted.items() if column is not None}

    def clean(self, table: pd.DataFrame, config: DatasetConfig, split: str) -> pd.DataFrame:
        for name, column in self.columns(config).items():
            odd = table[name].map(lambda value: isinstance(value, list | dict | tuple | bytes | np.ndarray))
            if odd.any():
                kind = type(table[name][odd].iloc[0]).__name__
                raise ConfigError(
                    f"column {column!r} of {config.name} holds values of kind {kind}; give plain texts and labels"
                )
        texts = [name for name in ("text", "text2") if name in table]
        table = table.assign(**{name: table[name].astype(object).where(table[name].notna(), "").astype(str) for name in texts})
        table = table[table["label"].notna() & (table["label"].astype(str) != "") & (table[texts] != "").any(axis=1)]
        if len(table) > 0 and (pd.to_numeric(table["label"], errors="coerce") == -1).all():
            raise ConfigError(
                f"every label of split {split!r} of {config.name} is -1: they are hidden, as those of GLUE's test splits are; "
                "set dataset.train and dataset.validation to splits with labels, such as train and validation"
            )
        return table

    def score(self, dataset: Dataset, rows: pd.DataFrame, outputs: np.ndarray) -> dict[str, float]:
        return metrics.compute(dataset.metrics, rows["label"].to_numpy(), outputs, self._positive(dataset))

    def answers(self, dataset: Dataset, rows: pd.DataFrame, outputs: np.ndarray) -> np.ndarray:
        return metrics.answers_of(dataset.metrics, outputs)

    def standard_errors(self, dataset: Dataset, rows: pd.DataFrame, answers: np.ndarray) -> dict[str, float]:
        return metrics.standard_errors(dataset.metrics, rows["label"].to_numpy(), answers, self._positive(dataset))

    def difference(self, dataset: Dataset, rows: pd.DataFrame, one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
        return metrics.difference(dataset.metrics[0], rows["label"].to_numpy(), one, other, self._positive(dataset))

    def _positive(self, dataset: Dataset) -> int:
        """The id of the class that f1 is of."""
        return 1 if dataset.positive is None else dataset.labels.index(dataset.positive)

    def encode(self, tokenizer: Any, rows: pd.DataFrame, dataset: Dataset) -> "Encoded":
        from hpc_compress.data.batches import encode

        text2 = rows["text2"].tolist() if dataset.pair else None
        return encode(tokenizer, rows["text"].tolist(), text2, rows["label"].to_numpy(), dataset.max_length)

    def width(self, model: "PreTrainedModel") -> int:
        return int(model.config.num_labels)

    def outputs(self, answer: Any, batch: "Batch") -> "torch.Tensor":
        return answer.logits

    def head_width(self, labels: Sequence[str]) -> int:
        return len(labels) or 1

    def configure(self, config: "PreTrainedConfig", labels: Sequence[str]) -> None:
        config.num_labels = self.head_width(labels)

    def example(self, path: str, dataset: Dataset) -> str:
        return EXAMPLE.format(path=path, text='"a text", "a second text"' if dataset.pair else '"a text"')
