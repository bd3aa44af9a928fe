"""Losses of a classifier on a batch. Knows no optimizer and no disk."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from hpc_compress.data.batches import Batch

Loss = Callable[[PreTrainedModel, Batch], torch.Tensor]


def task_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Cross-entropy, or mean squared error when the labels are real numbers."""
    return supervised(model(**batch.inputs).logits, batch.labels)


def supervised(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """logits: (batch, classes), or (batch, 1) for regression; labels: (batch,)."""
    logits = logits.float()
    return F.mse_loss(logits.squeeze(-1), labels) if labels.is_floating_point() else F.cross_entropy(logits, labels)


def hidden_loss(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """L_hidn = 1 - cos(H_S, H_T), mean over real tokens (after Sanh et al. 2019, arXiv 1910.01108, section 3).

    student, teacher: (batch, tokens, hidden) of the last layer; mask: (batch, tokens), 0 for padding.
    """
    distance = 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)
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


def distillation_loss(teacher: PreTrainedModel, temperature: float) -> Loss:
    """L_task + L_hidn + L_pred; without L_pred when the labels are real numbers."""

    def loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            taught = teacher(**batch.inputs, output_hidden_states=True)
        learnt = model(**batch.inputs, output_hidden_states=True)
        mask = batch.inputs["attention_mask"]
        total = supervised(learnt.logits, batch.labels)
        total = total + hidden_loss(learnt.hidden_states[-1], taught.hidden_states[-1], mask)
        if not batch.labels.is_floating_point():
            total = total + response_loss(learnt.logits, taught.logits, temperature)
        return total

    return loss
