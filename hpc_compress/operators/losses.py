"""Losses of a classifier on a batch. Knows no optimizer and no disk."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from hpc_compress.data.batches import Batch
from hpc_compress.operators.teaching import Teacher, ask

if TYPE_CHECKING:
    from hpc_compress.operators.learning import Distill

Loss = Callable[[PreTrainedModel, Batch], torch.Tensor]


def task_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Cross-entropy, or mean squared error when the labels are real numbers."""
    return supervised(model(**batch.inputs).logits, batch.labels)


def supervised(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """logits: (batch, classes), or (batch, 1) for regression; labels: (batch,)."""
    logits = logits.float()
    return F.mse_loss(logits.squeeze(-1), labels) if labels.is_floating_point() else F.cross_entropy(logits, labels)


def hidden_loss(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, closeness: str = "cosine") -> torch.Tensor:
    """1 - cos(H_S, H_T) (after Sanh et al. 2019, arXiv 1910.01108, section 3), or "mse", their mean squared difference
    (Jiao et al. 2020, TinyBERT, arXiv 1909.10351, eq. 8); mean over real tokens.

    student, teacher: (batch, tokens, hidden) of one layer; mask: (batch, tokens), 0 for padding.
    """
    student, teacher = student.float(), teacher.float()
    if closeness == "cosine":
        distance = 1 - F.cosine_similarity(student, teacher, dim=-1)
    else:
        distance = (student - teacher).square().mean(-1)
    return (distance * mask).sum() / mask.sum()


def response_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """L_pred = KL(z_T / t, z_S / t), the teacher's distribution first, mean over the batch.

    student, teacher: (batch, classes) logits.
    """
    return F.kl_div(
        F.log_softmax(student.float() / temperature, dim=-1),
        F.log_softmax(teacher.float() / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )


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
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], mask: torch.Tensor, closeness: str
) -> np.ndarray:
    """`hidden_loss` of every pair of layers. Returns: (student layers, teacher layers)."""
    real = mask.bool()
    own, others = (torch.stack([states[real].float() for states in side]) for side in (student, teacher))
    tokens, size = own.shape[1:]
    if closeness == "cosine":  # of unit vectors |a - b|^2 = 2 (1 - cos)
        own, others, size = F.normalize(own, dim=-1), F.normalize(others, dim=-1), 2
    return (torch.cdist(own.flatten(1), others.flatten(1)).square() / (tokens * size)).cpu().numpy()


def layers_loss(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    mask: torch.Tensor,
    closeness: str = "cosine",
    fixed: Sequence[int] | None = None,
) -> torch.Tensor:
    """`hidden_loss` of each of the student's layers and its teacher layer, mean over layers (Xia et al. 2022, eq. 5).

    fixed: the teacher's layer for each of the student's; None: the best match on this batch.
    """
    match = match_in_order(layer_distances(student, teacher, mask, closeness)) if fixed is None else fixed
    pairs = [hidden_loss(own, teacher[other], mask, closeness) for own, other in zip(student, match, strict=True)]
    return torch.stack(pairs).mean()


# --- the sum ---


def distillation_loss(
    how: "Distill", teacher: Teacher, project: nn.Module | None = None, fixed: Sequence[int] | None = None
) -> Loss:
    """The weighted sum of the losses of `how`, and the teacher's own task loss where it is trained along.

    project: from the student's hidden size to the teacher's, where they differ; fixed: as in `layers_loss`.
    """
    hidden = bool(how.hidden or how.layers)

    def loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        taught = teacher(batch, hidden)
        learnt = ask(model, batch, hidden)
        mask, regression = batch.inputs["attention_mask"], batch.labels.is_floating_point()
        total = learnt.logits.new_zeros((), dtype=torch.float32)
        if how.online:
            total = total + supervised(taught.logits, batch.labels)
            taught = taught.detach()
        states = learnt.hidden if how.layers else learnt.hidden[-1:]
        if project is not None:
            states = tuple(project(state) for state in states)
        if how.task:
            total = total + how.task * supervised(learnt.logits, batch.labels)
        if how.hidden:
            total = total + how.hidden * hidden_loss(states[-1], taught.hidden[-1], mask, how.closeness)
        if how.layers:
            total = total + how.layers * layers_loss(states, taught.hidden, mask, how.closeness, fixed)
        if regression and how.response:
            total = total + how.response * F.mse_loss(learnt.logits.float(), taught.logits.float())
        elif not regression and how.response != 0:
            weight = 1.0 if how.response is None else how.response
            total = total + weight * response_loss(learnt.logits, taught.logits, how.temperature)
        return total

    return loss
