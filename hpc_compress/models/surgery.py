"""Physical cuts: smaller tensors, never masks. Works on stock models in place. Knows no data and no training."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import prune_linear_layer

from hpc_compress.models.modeling_hpc_compress import Family, family_of, layers_of, linear_of


def family(model: PreTrainedModel) -> Family:
    return family_of(model.config.model_type)


def layers(model: PreTrainedModel) -> nn.ModuleList:
    return layers_of(model, family(model))


def head_size(model: PreTrainedModel) -> int:
    """Features of one attention head; cuts never change it."""
    names = family(model)
    return getattr(model.config, names.width) // getattr(model.config, names.head_count)


def head_counts(model: PreTrainedModel) -> list[int]:
    size, query = head_size(model), family(model).query
    return [linear_of(layer, query).out_features // size for layer in layers(model)]


def ffn_widths(model: PreTrainedModel) -> list[int]:
    ffn_in = family(model).ffn_in
    return [linear_of(layer, ffn_in).out_features for layer in layers(model)]


def drop_layers(model: PreTrainedModel, indices: Sequence[int]) -> None:
    """Remove encoder layers, counted from 0.

    Raises: ValueError when none would be left or one does not exist.
    """
    names, stack = family(model), layers(model)
    _require_subset(indices, len(stack), "layers")
    for index in sorted(indices, reverse=True):
        del stack[index]
    setattr(model.config, names.layer_count, len(stack))


def prune_heads(model: PreTrainedModel, layer: int, heads: Sequence[int]) -> None:
    """Remove attention heads of one layer: rows of query, key and value, columns of the attention's output.

    Raises: ValueError when none would be left or one does not exist.
    """
    names, size, block = family(model), head_size(model), layers(model)[layer]
    count = linear_of(block, names.query).out_features // size
    _require_subset(heads, count, f"heads of layer {layer}")
    kept = torch.tensor([head for head in range(count) if head not in set(heads)])
    features = (kept[:, None] * size + torch.arange(size)).flatten()
    for name in (names.query, names.key, names.value):
        replace(block, name, prune_linear_layer(linear_of(block, name), features, dim=0))
    replace(block, names.attention_out, prune_linear_layer(linear_of(block, names.attention_out), features, dim=1))


def replace(block: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(block.get_submodule(parent), leaf, module)


def _require_subset(indices: Sequence[int], count: int, what: str) -> None:
    if not set(indices) <= set(range(count)) or len(set(indices)) >= count:
        raise ValueError(f"can't remove {sorted(set(indices))} of {count} {what}; name existing ones and leave at least one")


def encoder_parameters(model: PreTrainedModel) -> int:
    """Elements in the encoder's layers: without embeddings, pooler and head. Packed 4-bit weights count one by one."""
    return sum(_elements(module) for module in layers(model).modules())


def all_parameters(model: PreTrainedModel) -> int:
    return sum(_elements(module) for module in model.modules())


def _elements(module: nn.Module) -> int:
    """Of the module's own parameters. A packed weight knows how many it stands for only by its layer's widths."""
    total = 0
    for name, parameter in module.named_parameters(recurse=False):
        if name == "weight" and isinstance(module, nn.Linear) and not parameter.is_floating_point():
            total += module.in_features * module.out_features
        else:
            total += parameter.numel()
    return total
