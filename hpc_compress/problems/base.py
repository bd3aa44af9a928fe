"""What every kind of problem must say. Imports torch only where a method computes with tensors."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from hpc_compress.config import ConfigError, DatasetConfig, ModelConfig
from hpc_compress.types import Dataset, Step

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from hpc_compress.data.batches import Batch, Encoded


OF_ONE_PROBLEM = ("parallel", "suite", "losses")  # settings of a dataset that only some problems know


class Problem(ABC):
    """One kind of problem. It has no state but what `of` reads from a `Dataset`, which holds all that differs between datasets.

    "outputs" are the numbers that a model gives for one label: logits of classes, or one number for a regression.
    "targets" are what they are compared with: class ids, or real numbers. An example has one label or, where tokens have
    labels, several; a batch's outputs and targets have a row for each label, in the order of the examples.
    """

    metrics: ClassVar[tuple[str, ...]]  # of `data.metrics`; a dataset chooses among them
    auto_class: ClassVar[str]  # of transformers: loads the base model, and the exported one
    model_class: ClassVar[str]  # of modeling_hpc_compress: an exported model with safetensors weights
    program_class: ClassVar[str]  # likewise: one that is a program for ONNX Runtime
    head: ClassVar[str]  # how names of a checkpoint's weights begin when it brings a task head; empty: no head is needed
    pipeline_tag: ClassVar[str]  # of a model card on the hub
    formats: ClassVar[tuple[str, ...]] = ()  # endings of files that `read` may know, besides those of tables
    settings: ClassVar[tuple[str, ...]] = ()  # of `OF_ONE_PROBLEM`: those that it knows

    def of(self, dataset: Dataset) -> "Problem":
        """The problem with what this dataset says of it."""
        return self

    # --- rows ---

    def check(self, config: DatasetConfig) -> None:
        """Raises: ConfigError for settings that this kind of problem can't have."""
        others = [name for name in OF_ONE_PROBLEM if name not in self.settings and getattr(config, name)]
        if others:
            raise ConfigError(f"dataset.{others[0]} has no effect with problem={config.problem}; leave it out")
        if odd := [name for name in config.metrics or () if name not in self.metrics]:
            raise ConfigError(
                f"dataset: metrics={list(config.metrics or ())} do not fit problem={config.problem}, which has no {odd[0]}; "
                f"use {', '.join(self.metrics)}"
            )

    def read(self, path: Path, config: DatasetConfig) -> pd.DataFrame | None:
        """The table in a file of a format that only this kind of problem has; None for a csv, tsv or parquet table.

        Raises: ValueError for a file that is not as its format wants it; UnicodeError for one of another encoding.
        """
        return None

    @abstractmethod
    def columns(self, config: DatasetConfig) -> dict[str, str]:
        """The columns of a table that are read, by the names that they get in the run folder."""

    @abstractmethod
    def clean(self, table: pd.DataFrame, config: DatasetConfig, split: str) -> pd.DataFrame:
        """The rows that teach something: those that have a text and a label. The column "text" of what is given back holds
        strings, by which equal rows are found.

        table: the columns of `columns`, by their names there. Raises: ConfigError for values of a wrong kind.
        """

    @abstractmethod
    def labels(self, train: pd.DataFrame, config: DatasetConfig) -> tuple[str, ...]:
        """Class names in the order of their ids; empty where there are no classes. Raises: ConfigError."""

    @abstractmethod
    def targets(self, label: pd.Series, labels: tuple[str, ...], config: DatasetConfig, split: str) -> pd.Series:
        """What the column of labels becomes in the run folder. Raises: ConfigError for a label that has no meaning."""

    def default_metrics(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        """The metrics of a dataset that names none."""
        return self.metrics[:1]

    def judged(
        self, train: pd.DataFrame, config: DatasetConfig, seed: int, read: Callable[[DatasetConfig], pd.DataFrame]
    ) -> tuple[np.ndarray, pd.DataFrame, pd.DataFrame] | None:
        """Tables of the search and the report split that are no rows of the dataset's own, and the row numbers of train that
        have nothing in common with them; None: rows of the dataset are held out.

        read: the cleaned rows of a table, by its configuration. Raises: ConfigError.
        """
        return None

    def tested(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The rows of a table that a score is of."""
        return rows

    def positive(self, labels: tuple[str, ...], config: DatasetConfig) -> str | None:
        """The class that f1 is computed for; None without f1. Raises: ConfigError."""
        return None

    # --- scores ---

    @abstractmethod
    def score(self, dataset: Dataset, rows: pd.DataFrame, outputs: np.ndarray) -> dict[str, float]:
        """The dataset's metrics. rows: of a split, as they lie in the run folder; outputs: (n_labels, width) of a model."""

    @abstractmethod
    def answers(self, dataset: Dataset, rows: pd.DataFrame, outputs: np.ndarray) -> np.ndarray:
        """(n,) what the metrics look at; stored, so that two models can be compared pair by pair. rows, outputs: as for
        `score`."""

    @abstractmethod
    def standard_errors(self, dataset: Dataset, rows: pd.DataFrame, answers: np.ndarray) -> dict[str, float]:
        """Of `score`, over samples of as many rows. answers: (n,) of `answers`."""

    @abstractmethod
    def difference(self, dataset: Dataset, rows: pd.DataFrame, one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
        """The first metric of one model's (n,) answers minus that of another's, and the standard error of this."""

    @abstractmethod
    def trivial(self, dataset: Dataset, rows: pd.DataFrame) -> dict[str, float]:
        """The best score on each metric of a model that always gives the same answer."""

    # --- tensors ---

    def tokenizer(self, folder: Path) -> Any:
        """The tokenizer that is saved in a folder, as `encode` needs it."""
        from transformers import AutoTokenizer

        # Without trust the code that a config may name is not asked for; a tokenizer needs none of it.
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    @abstractmethod
    def encode(self, tokenizer: Any, rows: pd.DataFrame, dataset: Dataset) -> "Encoded":
        """Tokenised rows of a split, as they lie in the run folder."""

    @abstractmethod
    def width(self, model: "PreTrainedModel") -> int:
        """How many outputs a model gives for one label."""

    @abstractmethod
    def outputs(self, answer: Any, batch: "Batch") -> "torch.Tensor":
        """(labels, width) from what the model returned for the batch. Evaluation, stored teacher outputs, losses and
        criteria all use these."""

    @abstractmethod
    def task_loss(self, outputs: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        """Mean over the batch. outputs: (labels, width); targets: (labels,)."""

    @abstractmethod
    def response_loss(
        self, student: "torch.Tensor", teacher: "torch.Tensor", weight: float | None, temperature: float
    ) -> "torch.Tensor | None":
        """L_pred of a distillation: how far the student's outputs are from the teacher's, (labels, width) each.

        weight: of this loss; None stands for the published one. Returns: None when the loss plays no part.
        """

    def divergence(self, student: "torch.Tensor", teacher: "torch.Tensor") -> "torch.Tensor":
        """How far a compressed model's outputs are from the base model's, (labels, width) each; in no unit of the labels."""
        loss = self.response_loss(student, teacher, weight=1.0, temperature=1.0)
        assert loss is not None
        return loss

    def differentiated(self, outputs: "torch.Tensor") -> "torch.Tensor":
        """(labels, width) numbers whose squared change a Gauss-Newton criterion estimates."""
        return outputs.float()

    # --- models ---

    @abstractmethod
    def head_width(self, labels: Sequence[str]) -> int:
        """How many outputs a task head must have for these labels."""

    @abstractmethod
    def configure(self, config: "PreTrainedConfig", labels: Sequence[str]) -> None:
        """Write into a stock config what the task head is to be."""

    def load_base(self, folder: Path, labels: Sequence[str], new_head: bool, seed: int) -> "PreTrainedModel":
        """The base model in `folder` as a stock model. A new head is drawn from `seed`."""
        from hpc_compress.models import artifact

        configure = functools.partial(self.configure, labels=labels)
        return artifact.load_base(folder, self.stock_class(), configure, new_head, seed)

    def stock_class(self) -> Any:
        """The class that loads the base model."""
        import transformers

        return getattr(transformers, self.auto_class)

    def described(self, folder: Path, config: ModelConfig) -> dict[str, Any]:
        """What is written into the base model's config.json besides what stands there. folder: the checkpoint, as it was found.

        Raises: ConfigError.
        """
        return {}

    def check_step(self, step: Step, dataset: Dataset) -> None:
        """Raises: ConfigError for a step that this dataset gives nothing to work with."""
        return

    def exported(self, config: dict[str, Any], dataset: Dataset) -> dict[str, Any]:
        """JSON files of an exported model, by their paths in it, that other libraries read. config: its config.json."""
        return {}

    @abstractmethod
    def example(self, path: str, dataset: Dataset) -> str:
        """Python lines that load an exported model and use it."""
