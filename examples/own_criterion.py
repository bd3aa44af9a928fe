"""A criterion of your own, for BERT. Copy this file into the folder where you give the command:

hpc-compress search name=entropy strategy=genetic model=custom model.path=path/or/hub-name dataset=sst2 \\
    strategy.mutations.prune.criterion=own_criterion.entropy
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch


@torch.no_grad()
def entropy(model: Any, batches: Iterable[Any], units: Sequence[str]) -> dict[str, list[torch.Tensor]]:
    """How uncertain it is whether a unit is active. A unit that is always or never active tells tokens not apart.

    units: `heads`, `ffn`, or both. Returns for each of them one tensor a layer; higher means keep.
    """
    layers = model.bert.encoder.layer
    outputs = {
        "heads": [(layer.attention.output.dense, layer.attention.self.attention_head_size) for layer in layers],
        "ffn": [(layer.output.dense, 1) for layer in layers],
    }
    active = {unit: [torch.zeros(linear.in_features // size) for linear, size in outputs[unit]] for unit in units}
    tokens, mask, hooks = 0, torch.empty(0), []

    def counting(total: torch.Tensor, size: int) -> Callable[..., None]:
        def count(module: Any, inputs: Any) -> None:
            values = inputs[0][mask].unflatten(1, (len(total), size)).mean(2)
            total.add_((values > 0).sum(0).cpu())

        return count

    for unit in units:
        for (linear, size), total in zip(outputs[unit], active[unit], strict=True):
            hooks.append(linear.register_forward_pre_hook(counting(total, size)))
    for batch in batches:
        mask = batch.inputs["attention_mask"].bool()
        tokens += int(mask.sum())
        model(**batch.inputs)
    for hook in hooks:
        hook.remove()
    return {unit: [_entropy(total / tokens) for total in active[unit]] for unit in units}


def _entropy(share: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(share) + torch.special.entr(1 - share)
