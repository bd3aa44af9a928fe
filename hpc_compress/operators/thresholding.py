"""Thresholds of the gates in gated FFNs, and how many gate values they set to 0 (Lee et al. 2024, CATS, arXiv 2404.08763).
Knows models and batches; the activation that applies them lies with the models."""

import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack

import torch
from transformers import PreTrainedModel

from hpc_compress.data.batches import Batch
from hpc_compress.models import modeling_hpc_compress as modeling
from hpc_compress.models import surgery

log = logging.getLogger(__name__)


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
    for index in range(len(values)):
        modeling.set_thresholds(model, family, values)
        gates = torch.cat([gates.flatten() for _, gates in _gates(model, [index], batches)])
        if len(gates):  # none where all neurons were cut
            values[index] = float(gates.kthvalue(min(len(gates), 1 + round(share * len(gates)))).values)
    modeling.set_thresholds(model, family, values)
    measured = sparsity(model, batches)
    log.info("gate values that are 0, layer by layer: %s", ", ".join(f"{100 * zeros:.1f} %" for zeros in measured))


def sparsity(model: PreTrainedModel, batches: Iterable[Batch]) -> list[float]:
    """The share of activated gate values that are 0, of each layer, over the real tokens of the batches."""
    zeros = [0] * len(surgery.layers(model))
    total = [0] * len(zeros)
    for layer, gates in _gates(model, range(len(zeros)), batches):
        zeros[layer] += int((gates == 0).sum())
        total[layer] += gates.numel()
    return [none / max(1, count) for none, count in zip(zeros, total, strict=True)]


@torch.no_grad()
def _gates(model: PreTrainedModel, layers: Sequence[int], batches: Iterable[Batch]) -> Iterator[tuple[int, torch.Tensor]]:
    """Absolute activated gate values, (real tokens, neurons), of each of these layers for each batch."""
    seen: list[tuple[int, torch.Tensor]] = []
    with ExitStack() as hooks:
        for layer in layers:
            activation = surgery.layers(model)[layer].get_submodule(str(surgery.family(model).gate))
            take = functools.partial(lambda layer, module, args, output: seen.append((layer, output)), layer)
            hooks.callback(activation.register_forward_hook(take).remove)
        model.eval()
        for batch in batches:
            seen.clear()
            model(**batch.inputs)
            mask = batch.inputs["attention_mask"].bool()
            yield from ((layer, output[mask].abs().float()) for layer, output in seen)
