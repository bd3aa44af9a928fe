"""Linears with many zeros, as they are saved: a bit for each weight, and the values that are not 0. Knows tensors and
linears; `modeling_hpc_compress` reads them back.

2:4 weights are saved in the same form: two positions of 2 bits in each group of four are as many bits as one for each weight.
"""

import numpy as np
import torch
from torch import nn

from hpc_compress.models.modeling_hpc_compress import TwoOfFourLinear


def scheme(module: nn.Module) -> str | None:
    """How a linear with zeros is saved: `2:4`, else `sparse`; None if it would not be smaller without its zeros, and for all
    that is no linear with dense weights."""
    if type(module) not in (nn.Linear, TwoOfFourLinear):
        return None
    # The state and not the parameter: on a GPU a 2:4 weight is one that computes, and can't be looked at.
    weight = module.state_dict()["weight"]
    nonzero = weight != 0
    if weight.numel() / 8 + int(nonzero.sum()) * weight.element_size() >= weight.numel() * weight.element_size():
        return None
    return "2:4" if weight.shape[1] % 4 == 0 and int(nonzero.unflatten(1, (-1, 4)).sum(-1).max()) <= 2 else "sparse"


def mask(weight: torch.Tensor) -> torch.Tensor | None:
    """Where a linear's weights are 0, as a mask; None if none is, or if all are, since such weights are not trained yet."""
    zero = weight.detach() == 0
    return zero if zero.any() and not zero.all() else None


def without_zeros(tensors: dict[str, torch.Tensor], paths: list[str]) -> dict[str, torch.Tensor]:
    """The tensors with the weights of the linears at `paths` as bits (uint8, 8 weights each) and values (those not 0)."""
    tensors = dict(tensors)
    for path in paths:
        weight = tensors.pop(f"{path}.weight").flatten()
        nonzero = weight != 0
        tensors[f"{path}.weight_bits"] = torch.from_numpy(np.packbits(nonzero.numpy()))
        tensors[f"{path}.weight_values"] = weight[nonzero]
    return tensors
