"""Thresholds of the gates in gated FFNs, and how many gate values they set to 0 (Lee et al. 2024, CATS, arXiv 2404.08763).
Knows models and batches; the activation that applies them lies with the models."""

import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import nn
from transformers import PreTrainedModel

from hpc_compress import calibration
from hpc_compress.data.batches import Batch
from hpc_compress.models import modeling_hpc_compress as modeling
from hpc_compress.models import surgery

log = logging.getLogger(__name__)


@torch.no_grad()
def threshold(model: PreTrainedModel, share: float, batches: Sequence[Batch]) -> None:
    """Give each layer the threshold below which a share of its absolute gate values lies (CATS, section 3.1), in place.

    Layer after layer, so that each one is fitted to what those before it give with their thresholds.

    Raises: ValueError when the FFNs have no gates.
    """
    family = surgery.family(model)
    if family.gate is None:
        able = ", ".join(name for name, row in modeling.FAMILIES.items() if row.gate)
        raise ValueError(f"{model.config.model_type} has no gated FFNs, which threshold acts on; use a family that has: {able}")
    values = [0.0] * len(surgery.layers(model))
    walk = calibration.Walk(model, batches)
    for index, layer in enumerate(surgery.layers(model)):
        modeling.set_thresholds(model, family, values)
        walk.go_to(index)
        activation = layer.get_submodule(family.gate)
        gates = torch.cat([walk.output(batch, activation).abs().float().flatten() for batch in range(len(batches))])
        if len(gates):  # none where all neurons were cut
            values[index] = float(gates.kthvalue(min(len(gates), 1 + round(share * len(gates)))).values)
    modeling.set_thresholds(model, family, values)
    measured = sparsity(model, batches)
    log.info("gate values that are 0, layer by layer: %s", ", ".join(f"{100 * zeros:.1f} %" for zeros in measured))


@torch.no_grad()
def sparsity(model: PreTrainedModel, batches: Iterable[Batch]) -> list[float]:
    """The share of activated gate values that are 0, of each layer, over the real tokens of the batches."""
    zeros = [0] * len(surgery.layers(model))
    total = [0] * len(zeros)
    mask = torch.empty(0)

    def hook(layer: int):
        def count(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            gates = output[mask]
            zeros[layer] += int((gates == 0).sum())
            total[layer] += gates.numel()

        return count

    model.eval()
    with ExitStack() as hooks:
        for index, layer in enumerate(surgery.layers(model)):
            activation = layer.get_submodule(str(surgery.family(model).gate))
            hooks.callback(activation.register_forward_hook(hook(index)).remove)
        for batch in batches:
            mask = batch.inputs["attention_mask"].bool()
            model(**batch.inputs)
    return [none / max(1, count) for none, count in zip(zeros, total, strict=True)]
