"""Losses on a batch: the task's own, and those of a distillation. Knows no optimizer and no disk."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from hpc_compress.data.batches import Batch
from hpc_compress.problems import Problem
from hpc_compress.problems.outputs import Teacher, ask

Loss = Callable[[PreTrainedModel, Batch], torch.Tensor]
Distance = Literal["cosine", "mse"]  # of two hidden states


def task_loss(problem: Problem) -> Loss:
    """The problem's own loss, on a model and a batch."""

    def loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        return problem.task_loss(problem.outputs(model(**batch.inputs), batch), batch.labels)

    return loss


def hidden_loss(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, distance: Distance = "cosine"
) -> torch.Tensor:
    """1 - cos(H_S, H_T) (after Sanh et al. 2019, arXiv 1910.01108, section 3), or "mse", their mean squared difference
    (Jiao et al. 2020, TinyBERT, arXiv 1909.10351, eq. 8); mean over real tokens.

    student, teacher: (batch, tokens, hidden) of one layer; mask: (batch, tokens), 0 for padding.
    """
    student, teacher = student.float(), teacher.float()
    cosine = distance == "cosine"
    apart = 1 - F.cosine_similarity(student, teacher, dim=-1) if cosine else (student - teacher).square().mean(-1)
    return (apart * mask).sum() / mask.sum()


# --- layer by layer ---


def match_in_order(distances: np.ndarray) -> list[int]:
    """The teacher's layer for each of the student's, each later than the one before, at the least sum of distances.

    After the dynamic matching of CoFi (Xia et al. 2022, arXiv 2204.00408, eq. 6), seen from the student's side and solved
    for all layers at once instead of one by one.

    distances: (student layers, teacher layers).
    """
    students, teachers = distances.shape
    if students > teachers:
        raise ValueError(f"{students} student layers can't be matched with {teachers} of the teacher; set matching=fixed")
    # best[i, j]: least sum for the first i layers of the student within the first j of the teacher
    best = np.full((students + 1, teachers + 1), np.inf)
    best[0] = 0
    for i in range(1, students + 1):
        for j in range(i, teachers + 1):
            best[i, j] = min(best[i, j - 1], best[i - 1, j - 1] + distances[i - 1, j - 1])
    matched, j = [], teachers
    for i in range(students, 0, -1):
        while best[i, j] == best[i, j - 1]:
            j -= 1
        j -= 1
        matched.append(j)
    return matched[::-1]


@torch.no_grad()
def layer_distances(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], mask: torch.Tensor, distance: Distance
) -> np.ndarray:
    """`hidden_loss` of every pair of layers. Returns: (student layers, teacher layers)."""
    real = mask.bool()
    own, others = (torch.stack([states[real].float() for states in side]) for side in (student, teacher))
    tokens, size = own.shape[1:]
    if distance == "cosine":  # of unit vectors |a - b|^2 = 2 (1 - cos)
        own, others, size = F.normalize(own, dim=-1), F.normalize(others, dim=-1), 2
    return (torch.cdist(own.flatten(1), others.flatten(1)).square() / (tokens * size)).cpu().numpy()


def layers_loss(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    mask: torch.Tensor,
    distance: Distance = "cosine",
    fixed: Sequence[int] | None = None,
) -> torch.Tensor:
    """`hidden_loss` of each of the student's layers and its teacher layer, mean over layers (Xia et al. 2022, eq. 5).

    fixed: the teacher's layer for each of the student's; None: the best match on this batch.
    """
    match = match_in_order(layer_distances(student, teacher, mask, distance)) if fixed is None else fixed
    pairs = [hidden_loss(own, teacher[other], mask, distance) for own, other in zip(student, match, strict=True)]
    return torch.stack(pairs).mean()


# --- the sum ---


@dataclass(frozen=True)
class Weights:
    """Of the losses of a distillation."""

    task: float
    response: float | None  # None: the problem's own
    hidden: float
    layers: float
    temperature: float
    distance: Distance  # of hidden states


def distillation_loss(
    problem: Problem,
    weights: Weights,
    teacher: Teacher,
    learns: bool = False,
    project: nn.Module | None = None,
    fixed: Sequence[int] | None = None,
) -> Loss:
    """The weighted sum of the losses, and the teacher's own task loss where it is trained along.

    learns: the teacher is trained along; project: from the student's hidden size to the teacher's, where they differ;
    fixed: as in `layers_loss`.
    """
    hidden = bool(weights.hidden or weights.layers)

    def loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        taught = teacher(batch, hidden)
        learnt = ask(problem, model, batch, hidden)
        mask = batch.inputs["attention_mask"]
        total = learnt.outputs.new_zeros((), dtype=torch.float32)
        if learns:
            total = total + problem.task_loss(taught.outputs, batch.labels)
            taught = taught.detach()
        states = learnt.hidden if weights.layers else learnt.hidden[-1:]
        if project is not None:
            states = tuple(project(state) for state in states)
        if weights.task:
            total = total + weights.task * problem.task_loss(learnt.outputs, batch.labels)
        if weights.hidden:
            total = total + weights.hidden * hidden_loss(states[-1], taught.hidden[-1], mask, weights.distance)
        if weights.layers:
            total = total + weights.layers * layers_loss(states, taught.hidden, mask, weights.distance, fixed)
        outputs = learnt.outputs
        if project is not None and outputs.shape[-1] != taught.outputs.shape[-1]:  # of embeddings
            outputs = project(outputs)
        response = problem.response_loss(outputs, taught.outputs, weights.response, weights.temperature)
        return total if response is None else total + response

    return loss
