"""One number a text, such as the similarity of two sentences."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from hpc_compress.config import ConfigError, DatasetConfig
from hpc_compress.problems.sequence import SequenceProblem
from hpc_compress.types import Dataset

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig


class Regression(SequenceProblem):
    """The model's output is (batch, 1); the loss is the mean squared error."""

    metrics = ("pearson", "spearman")

    def labels(self, train: pd.DataFrame, config: DatasetConfig) -> tuple[str, ...]:
        return ()

    def targets(self, label: pd.Series, labels: tuple[str, ...], config: DatasetConfig, split: str) -> pd.Series:
        try:
            targets = label.astype(float)
            if not np.isfinite(targets).all():
                raise ValueError("some are nan or infinite")
            return targets
        except ValueError as error:
            raise ConfigError(f"dataset.label={config.label!r} of {config.name} is not a number everywhere: {error}") from None

    def trivial(self, dataset: Dataset, rows: pd.DataFrame) -> dict[str, float]:
        return dict.fromkeys(dataset.metrics, 0.0)  # a constant is correlated with nothing

    def task_loss(self, outputs: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        import torch.nn.functional as F

        return F.mse_loss(outputs.float().squeeze(-1), targets)

    def response_loss(
        self, student: "torch.Tensor", teacher: "torch.Tensor", weight: float | None, temperature: float
    ) -> "torch.Tensor | None":
        """The mean squared difference. The published method has no L_pred for a regression, so its weight is 0 by default."""
        import torch.nn.functional as F

        return weight * F.mse_loss(student.float(), teacher.float()) if weight else None

    def divergence(self, student: "torch.Tensor", teacher: "torch.Tensor") -> "torch.Tensor":
        """The mean squared difference as a share of the variance of the base model's outputs."""
        return super().divergence(student, teacher) / teacher.float().var(correction=0).clamp(min=1e-12)

    def configure(self, config: "PreTrainedConfig", labels: Sequence[str]) -> None:
        super().configure(config, labels)
        config.problem_type = "regression"
