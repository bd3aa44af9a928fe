"""Movement pruning of structures: scores of heads and FFN neurons that are learnt along with the weights, and the cut that they
lead to (Sanh et al. 2020, arXiv 2005.07683; on structures as Lagunas et al. 2021). Knows models and training; no genomes.

A unit's score makes its gate 1 or 0. The score gets the gradient of the gate unchanged (straight-through), also while the unit
is off: it rises if training would make the unit's contribution larger, and falls if smaller.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from hpc_compress.context import Context
from hpc_compress.data.batches import Batch
from hpc_compress.models import surgery
from hpc_compress.models.gates import PerUnit, counts, gated
from hpc_compress.training import loop, losses
from hpc_compress.training.settings import Training

THRESHOLD = 0.1  # soft mode: a unit is removed if the sigmoid of its score is below (as published)
SPAN = 20.0  # how far a score can move in a whole training, whatever the learning rate; the threshold is at -2.2


@dataclass(frozen=True)
class Goal:
    """What is to be removed; either `share` or `regularisation` is given."""

    units: Sequence[str]  # heads, ffn or both
    share: float | None  # hard: of the heads, and of the neurons
    regularisation: float | None  # soft: the cost of keeping a unit
    cooldown: float  # share of the updates, at the end, in which nothing more is removed
    ffn_multiple: int


class Masks(nn.Module):
    """The scores of all units, and the gates that follow from them at each update."""

    done: torch.Tensor

    def __init__(self, model: PreTrainedModel, training: Training, goal: Goal, updates: int) -> None:
        super().__init__()
        self.warmup, self.goal, self.updates = training.warmup, goal, updates
        self.sizes: dict[str, list[int]] = {unit: counts(model, unit) for unit in goal.units}
        self.scores = nn.ParameterDict({unit: nn.Parameter(torch.zeros(sum(sizes))) for unit, sizes in self.sizes.items()})
        # Soft scores are compared with a fixed threshold, so their scale matters. AdamW moves a parameter by its learning rate
        # at most, on average half of that.
        self.scale = 2 * SPAN / (training.learning_rate * updates)
        self.register_buffer("done", torch.zeros(()))  # updates; a buffer, so that it comes back with a checkpoint
        for unit, sizes in self.sizes.items():
            # Once on the device: copying a list there makes every update wait for it.
            self.register_buffer(f"sizes_of_{unit}", torch.tensor(sizes))

    def progress(self) -> torch.Tensor:
        """The part of the goal that is due by now: `1 - (1 - t)^3`, t from 0 at the end of the warm-up to 1 where the cool-down
        begins (Zhu & Gupta 2017, eq. 1; Sanh et al. 2020, section 4)."""
        begin, end = self.warmup * self.updates, (1 - self.goal.cooldown) * self.updates
        return 1 - (1 - ((self.done - begin) / max(end - begin, 1)).clamp(0, 1)) ** 3

    def forward(self) -> tuple[PerUnit, torch.Tensor]:
        """For one update: gates of 1 and 0 whose gradient is the scores', and the regularisation to add to the loss."""
        gates: PerUnit = {}
        penalty = torch.zeros((), device=self.done.device)
        for unit, kept in self.kept().items():
            # The gradient is not scaled, since it would be clipped; to AdamW its scale makes no difference.
            scores = self.scores[unit] + ((self.scale - 1) * self.scores[unit]).detach()
            through = (scores - scores.detach()).split(self.sizes[unit])
            gates[unit] = [mask + zero for mask, zero in zip(kept, through, strict=True)]
            if self.goal.regularisation is not None:
                penalty = penalty + self.progress() * self.goal.regularisation * scores.sigmoid().mean()
        self.done += 1
        return gates, penalty

    @torch.no_grad()
    def kept(self) -> PerUnit:
        """What stays at this update: 1 or 0 for each unit. All on the device: nothing waits for it."""
        kept: PerUnit = {}
        for unit, sizes in self.sizes.items():
            scores = self.scores[unit]
            if self.goal.share is not None:
                stays = _rank(scores) < ((1 - self.goal.share * self.progress()) * len(scores)).round()
            else:
                stays = (self.scale * scores).sigmoid() > THRESHOLD * self.progress()
            wanted = torch.stack([layer.sum() for layer in stays.split(sizes)])
            multiple = self.goal.ffn_multiple if unit == "ffn" else 1
            widths = rounded(wanted, self.get_buffer(f"sizes_of_{unit}"), multiple)
            kept[unit] = [
                (_rank(layer) < width).to(scores.dtype) for layer, width in zip(scores.split(sizes), widths, strict=True)
            ]
        return kept


def _rank(scores: torch.Tensor) -> torch.Tensor:
    """0 for the highest score; of equal ones the first is the higher."""
    return scores.argsort(descending=True, stable=True).argsort()


def rounded(wanted: torch.Tensor, sizes: torch.Tensor, multiple: int) -> torch.Tensor:
    """Widths in multiples, with about the same sum: all are rounded down, then those that lost most are rounded up.

    A layer that should stay whole is not rounded. wanted, sizes: (layers,) units.
    """
    blocks = wanted // multiple
    more = (wanted.sum() / multiple).round() - blocks.sum()
    blocks = blocks + (_rank(wanted % multiple) < more)
    return torch.where(wanted == sizes, sizes, torch.minimum(blocks * multiple, sizes))


def learn(model: PreTrainedModel, context: Context, training: Training, goal: Goal) -> PerUnit:
    """Train the weights and the scores, in place.

    Returns: what stays in the end, 1 or 0 for each unit.
    Raises: ValueError for heads that can't be cut one by one.
    """
    if "heads" in goal.units and surgery.family(model).shared_bias:
        raise ValueError(
            f"the layers of {model.config.model_type} share a position bias for their heads, so heads can't go one by one; "
            "set units=[ffn]"
        )
    updates = max(1, round(training.epochs * math.ceil(len(context.train) / training.batch_size)))
    masks = Masks(model, training, goal, updates).to(context.device)

    task_loss = losses.task_loss(context.problem)

    def loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        gates, penalty = masks()
        with gated(model, gates):
            return task_loss(model, batch) + penalty

    loop.fit(model, context.train, loss, training, context.seed, context.device, context.progress, context.checkpoint, [masks])
    return masks.kept()


def cut(model: PreTrainedModel, kept: PerUnit) -> None:
    """Cut physically what is 0 in `kept`."""
    cutters = {"heads": surgery.prune_heads, "ffn": surgery.prune_ffn}
    for unit, layers in kept.items():
        for index, mask in enumerate(layers):
            gone: Sequence[int] = (mask == 0).nonzero().flatten().tolist()
            if gone:
                cutters[unit](model, index, gone)
