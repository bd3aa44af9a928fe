"""What an operator may use besides the model. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hpc_compress.data.batches import Batch, Encoded
    from hpc_compress.measure import BlockTimes
    from hpc_compress.problems import Problem
    from hpc_compress.problems.outputs import Teacher

    UnitScores = dict[str, list[np.ndarray]]


def _no_outputs() -> "Teacher | None":
    return None


def _made(name: str, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    return make()


def _computed(key: tuple[Any, ...], compute: "Callable[[], UnitScores]") -> "UnitScores":
    return compute()


def _no_times() -> "BlockTimes":
    raise ValueError("nobody has measured block times here; cut by parameters")


@dataclass(frozen=True)
class Checkpoint:
    """Where a long training keeps its state, so that a later process goes on with it. Whoever gives it deletes the file."""

    path: Path  # one file, of one training alone; need not exist, nor its folder
    seconds: float  # wall-clock time between two savings


@dataclass(frozen=True)
class Context:
    """What an operator may use besides the model."""

    train: "Encoded"
    problem: "Problem"  # what the dataset asks of a model: its outputs and its losses
    device: "torch.device"
    seed: int  # of this step: all randomness of the operator follows from it
    teacher: "Callable[[], PreTrainedModel]"  # the base model, in eval mode on `device`; loaded when first asked for
    taught: "Callable[[], Teacher | None]" = _no_outputs  # answers from its outputs on `train`, stored once a run; None: ask it
    tokenizer: "Callable[[], PreTrainedTokenizerBase] | None" = None  # the base model's; a fresh one at each call
    folder: Path | None = None  # of the model to deploy: what is written there is shipped beside its weights
    block_times: "Callable[[], BlockTimes]" = _no_times  # of the base model on this kind of device; measured once a run
    given: str = ""  # stands for the model that the operator is given: equal models have equal ones; empty: nothing is known
    # Something that later operators of this process may use again, such as activations of the base model: by name, what it
    # depends on, and how to make it. One of each name is kept.
    kept: Callable[[str, tuple[Any, ...], Callable[[], Any]], Any] = _made
    # Scores of the model that the operator is given, one array a layer by kind of unit: by what they depend on, and how to
    # compute them, which is done once a run.
    scores: "Callable[[tuple[Any, ...], Callable[[], UnitScores]], UnitScores]" = _computed
    progress: Callable[[int, int], None] | None = None  # told (updates done, updates in all)
    checkpoint: Checkpoint | None = None  # for a long training; a user's own operator may hand it to `training.fit` too

    def batches(self, sentences: int) -> "list[Batch]":
        """The first training sentences on the device, for what looks at a model without training it."""
        from hpc_compress.data.batches import eval_batches

        return [batch.to(self.device) for batch in eval_batches(self.train.take(sentences), 32)]
