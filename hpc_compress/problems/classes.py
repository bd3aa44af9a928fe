"""What problems whose labels are classes share: their names and ids, and the losses on logits."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from hpc_compress.config import MOST_CLASSES, ConfigError, DatasetConfig
from hpc_compress.problems.base import Problem

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


class ClassProblem(Problem):
    """The outputs are (labels, classes) logits; the loss is the cross-entropy."""

    several: str  # what to do about too many classes, for a message

    def labels(self, train: pd.DataFrame, config: DatasetConfig) -> tuple[str, ...]:
        values = sorted({class_name(value) for value in train["label"].explode().unique()})
        if all(value.removeprefix("-").isdecimal() and len(value) <= 4000 for value in values):  # Python reads 4300 digits
            values.sort(key=int)
        if len(values) < 2:
            raise ConfigError(f"{config.name} has {len(values)} class in its train rows; at least 2 are needed")
        if len(values) > MOST_CLASSES:
            raise ConfigError(f"{config.name} has {len(values)} classes; {self.several.format(label=config.label)}")
        return tuple(values)

    def targets(self, label: pd.Series, labels: tuple[str, ...], config: DatasetConfig, split: str) -> pd.Series:
        ids = {name: index for index, name in enumerate(labels)}
        unknown = sorted(set(map(class_name, label.explode().unique())) - set(ids))
        if unknown:
            raise ConfigError(f"the {split} split of {config.name} has labels {unknown[:5]} that train does not have")
        return self.numbered(label, ids)

    @abstractmethod
    def numbered(self, label: pd.Series, ids: dict[str, int]) -> pd.Series:
        """The column of labels with the id of each class in the place of its name."""

    def width(self, model: "PreTrainedModel") -> int:
        return int(model.config.num_labels)

    def head_width(self, labels: Sequence[str]) -> int:
        return len(labels)

    def task_loss(self, outputs: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        import torch.nn.functional as F

        return F.cross_entropy(outputs.float(), targets)

    def response_loss(
        self, student: "torch.Tensor", teacher: "torch.Tensor", weight: float | None, temperature: float
    ) -> "torch.Tensor | None":
        """KL(z_T / t, z_S / t), the teacher's distribution first; mean over the labels. Its published weight is 1."""
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
        config.num_labels = self.head_width(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}


def class_name(value: object) -> str:
    """A label as text: 1.0 and 1 are the same class."""
    return str(int(value)) if isinstance(value, float | np.floating) and value.is_integer() else str(value)
