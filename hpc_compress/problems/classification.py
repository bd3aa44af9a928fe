"""One class a text, out of two or more."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from hpc_compress.config import ConfigError, DatasetConfig
from hpc_compress.problems.classes import ClassProblem, class_name
from hpc_compress.problems.sequence import SequenceProblem
from hpc_compress.types import Dataset

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

POSITIVE = ("1", "1.0", "true", "yes", "positive", "pos", "duplicate", "equivalent", "paraphrase")


class Classification(ClassProblem, SequenceProblem):
    """The model's outputs are (batch, classes) logits."""

    metrics = ("accuracy", "f1", "macro_f1", "matthews")
    several = "if {label!r} is a number to predict, set dataset.problem=regression"

    def labels(self, train: pd.DataFrame, config: DatasetConfig) -> tuple[str, ...]:
        values = super().labels(train, config)
        if len(values) > 2 and "f1" in (config.metrics or ()):
            raise ConfigError(
                f"dataset.metrics has f1, which is of 2 classes, but {config.name} has {len(values)}; use macro_f1"
            )
        return values

    def numbered(self, label: pd.Series, ids: dict[str, int]) -> pd.Series:
        return label.map(class_name).map(ids).astype("int64")

    def positive(self, labels: tuple[str, ...], config: DatasetConfig) -> str | None:
        """Class 1, as in GLUE, or a class whose name means yes."""
        if "f1" not in (config.metrics or ()):
            return None
        if config.positive is not None:
            found = [label for label in labels if label == config.positive]
        else:
            found = [label for label in labels if label.casefold() in POSITIVE]
        if len(found) != 1:
            came = "is not set" if config.positive is None else f"is {config.positive!r}"
            raise ConfigError(
                f"dataset.metrics has f1, which is of one class, and dataset.positive {came}; "
                f"set dataset.positive to one of {', '.join(labels)}"
            )
        return found[0]

    def trivial(self, dataset: Dataset, rows: pd.DataFrame) -> dict[str, float]:
        one_hot = np.eye(len(dataset.labels))
        constants = [np.tile(one_hot[answer], (len(rows), 1)) for answer in sorted(set(rows["label"]))]
        scores = [self.score(dataset, rows, outputs) for outputs in constants]
        return {name: max(score[name] for score in scores) for name in dataset.metrics}

    def configure(self, config: "PreTrainedConfig", labels: Sequence[str]) -> None:
        super().configure(config, labels)
        config.problem_type = "single_label_classification"
