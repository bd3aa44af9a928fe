"""A model's outputs for a batch: what losses compare. Knows models and batches; nothing of losses and their weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from hpc_compress.data.batches import Batch
from hpc_compress.problems.base import Problem


@dataclass(frozen=True)
class ModelOutputs:
    """What a model gives for a batch."""

    outputs: torch.Tensor  # (labels, width), as the problem defines them
    hidden: tuple[torch.Tensor, ...]  # (batch, tokens, hidden) each: of all layers, of the last one alone, or none at all

    def detach(self) -> "ModelOutputs":
        return ModelOutputs(self.outputs.detach(), tuple(state.detach() for state in self.hidden))


Teacher = Callable[[Batch, bool], ModelOutputs]  # the bool: whether hidden states are wanted too


def ask(problem: Problem, model: nn.Module, batch: Batch, hidden: bool = False) -> ModelOutputs:
    """The outputs and, if wanted, the hidden states after every layer."""
    answer = model(**batch.inputs, output_hidden_states=hidden)
    return ModelOutputs(problem.outputs(answer, batch), tuple(answer.hidden_states[1:]) if hidden else ())
