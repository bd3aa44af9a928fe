"""How much a unit matters. A criterion is a function `(model, batches) -> scores`, one tensor a layer, higher means keep.

Scores come from hooks of our own on the input of each attention output: there, the features of a head lie side by side, and
a gate of 1 on a head has the derivative `sum(activation * gradient)` over its features.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from hpc_compress.data.batches import Batch
from hpc_compress.models import surgery
from hpc_compress.models.modeling_hpc_compress import linear_of
from hpc_compress.operators.losses import supervised

Criterion = Callable[[PreTrainedModel, Iterable[Batch]], list[torch.Tensor]]


def magnitude(model: PreTrainedModel, batches: Iterable[Batch]) -> list[torch.Tensor]:
    """L2 norm of a head's columns of the attention output; needs no data.

    Returns: (heads,) for each layer.
    """
    size, name = surgery.head_size(model), surgery.family(model).attention_out
    weights = [linear_of(layer, name).weight for layer in surgery.layers(model)]
    return [weight.detach().unflatten(1, (-1, size)).square().sum((0, 2)).sqrt() for weight in weights]


def fisher(model: PreTrainedModel, batches: Iterable[Batch]) -> list[torch.Tensor]:
    """Diagonal of the empirical Fisher information of a head's gate: mean over samples of `(dC/dgate)^2`
    (LeCun 1989 with the Fisher in place of the Hessian; Kwon et al. 2022, eq. 5).

    Returns: (heads,) for each layer.
    """
    return _gate_scores(model, batches, torch.square)


def taylor(model: PreTrainedModel, batches: Iterable[Batch]) -> list[torch.Tensor]:
    """First-order Taylor expansion: mean over samples of `|dC/dgate|` (Molchanov et al. 2017, eq. 7-8).

    Returns: (heads,) for each layer.
    """
    return _gate_scores(model, batches, torch.abs)


def _gate_scores(
    model: PreTrainedModel, batches: Iterable[Batch], of_gradient: Callable[[torch.Tensor], torch.Tensor]
) -> list[torch.Tensor]:
    """Mean over samples of a function of each gate's gradient: (heads,) for each layer."""
    size, name = surgery.head_size(model), surgery.family(model).attention_out
    outputs = [layer.get_submodule(name) for layer in surgery.layers(model)]
    gates: list[torch.Tensor] = []

    def gate(module: nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        heads = args[0].unflatten(-1, (-1, size))  # (batch, tokens, heads, features)
        gates.append(torch.ones(len(heads), 1, heads.shape[2], 1, device=heads.device, requires_grad=True))
        return (heads * gates[-1]).flatten(2)

    handles = [module.register_forward_pre_hook(gate) for module in outputs]
    totals = [torch.zeros(count) for count in surgery.head_counts(model)]
    samples = 0
    try:
        model.eval()
        for batch in batches:
            gates.clear()
            # A sum of the samples' losses, so that each gate's gradient is that of its own sample.
            loss = supervised(model(**batch.inputs).logits, batch.labels) * len(batch.labels)
            for total, gradient in zip(totals, torch.autograd.grad(loss, gates), strict=True):
                total += of_gradient(gradient.flatten(1).float()).sum(0).cpu()
            samples += len(batch.labels)
    finally:
        for handle in handles:
            handle.remove()
    return [total / samples for total in totals]


CRITERIA: dict[str, Criterion] = {"fisher": fisher, "taylor": taylor, "magnitude": magnitude}
