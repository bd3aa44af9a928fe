"""One class a text, out of two or more."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from hpc_compress.config import MOST_CLASSES, ConfigError, DatasetConfig
from hpc_compress.problems.sequence import SequenceProblem
from hpc_compress.types import Dataset

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

POSITIVE = ("1", "1.0", "true", "yes", "positive", "pos", "duplicate", "equivalent", "paraphrase")


class Classification(SequenceProblem):
    """The model's outputs are (batch, classes) logits; the loss is the cross-entropy."""

    metrics = ("accuracy", "f1", "macro_f1", "matthews")

    def labels(self, train: pd.DataFrame, config: DatasetConfig) -> tuple[str, ...]:
        values = sorted({class_name(value) for value in train["label"].unique()})
        if all(value.removeprefix("-").isdecimal() and len(value) <= 4000 for value in values):  # Python reads 4300 digits
            values.sort(key=int)
        if len(values) < 2:
            raise ConfigError(f"{config.name} has {len(values)} class in its train rows; at least 2 are needed")
        if len(values) > MOST_CLASSES:
            raise ConfigError(
                f"{config.name} has {len(values)} classes; if {config.label!r} is a number to predict, "
                "set dataset.problem=regression"
            )
        if len(values) > 2 and "f1" in config.metrics:
            raise ConfigError(
                f"dataset.metrics has f1, which is of 2 classes, but {config.name} has {len(values)}; use macro_f1"
            )
        return tuple(values)

    def targets(self, label: pd.Series, labels: tuple[str, ...], config: DatasetConfig, split: str) -> pd.Series:
        ids = {name: index for index, name in enumerate(labels)}
        names = label.map(class_name)
        unknown = sorted(set(names) - set(ids))
        if unknown:
            raise ConfigError(f"the {split} split of {config.name} has labels {unknown[:5]} that train does not have")
        return names.map(ids).astype("int64")

    def positive(self, labels: tuple[str, ...], config: DatasetConfig) -> str | None:
        """Class 1, as in GLUE, or a class whose name means yes."""
        if "f1" not in config.metrics:
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

    def task_loss(self, outputs: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        import torch.nn.functional as F

        return F.cross_entropy(outputs.float(), targets)

    def response_loss(
        self, student: "torch.Tensor", teacher: "torch.Tensor", weight: float | None, temperature: float
    ) -> "torch.Tensor | None":
        """KL(z_T / t, z_S / t), the teacher's distribution first; mean over the batch. Its published weight is 1."""
        import torch.nn.functional as F

        if weight == 0:
            return None
        divergence = F.kl_div(
            F.log_softmax(student.float() / temperature, dim=-1),
            F.log_softmax(teacher.float() / temperature, dim=-1),
            reduction="batchmean",
            log_target=True,
        )
        return (1.0 if weight is None else weight) * divergence

    def configure(self, config: "PreTrainedConfig", labels: Sequence[str]) -> None:
        super().configure(config, labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        config.problem_type = "single_label_classification"


def class_name(value: object) -> str:
    """A label as text: 1.0 and 1 are the same class."""
    return str(int(value)) if isinstance(value, float | np.floating) and value.is_integer() else str(value)
