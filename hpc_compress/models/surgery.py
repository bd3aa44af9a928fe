"""Physical cuts: smaller tensors, never masks. Works on stock models in place. Knows no data and no training.

The stock config stays that of the uncompressed encoder; what is left is read from the weights.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from hpc_compress.models import modeling_hpc_compress as modeling
from hpc_compress.models.modeling_hpc_compress import Family, SharedEmbedding, family_of, layers_of, linear_of, row_type
from hpc_compress.models.modeling_hpc_compress import replace as replace


def family(model: PreTrainedModel) -> Family:
    return family_of(model.config.model_type)


def layers(model: PreTrainedModel) -> nn.ModuleList:
    return layers_of(model, family(model))


def head_size(model: PreTrainedModel) -> int:
    """Features of one attention head; cuts never change it."""
    return modeling.head_size(model, family(model))


def hidden_size(model: PreTrainedModel) -> int:
    """Dimensions of the residual stream."""
    return modeling.hidden_size(model, family(model))


def origins(model: PreTrainedModel) -> list[int]:
    """Of each layer that is left, its number in the uncompressed encoder."""
    return modeling.origins(model, family(model))


def attention_outputs(model: PreTrainedModel) -> list[nn.Linear]:
    """Of each layer the linear by which the attention writes into the residual stream; its inputs are heads x head size."""
    return [linear_of(layer, family(model).attention_out) for layer in layers(model)]


def ffn_outputs(model: PreTrainedModel) -> list[nn.Linear]:
    """Of each layer the linear by which the FFN writes into the residual stream; its inputs are neurons."""
    return [linear_of(layer, family(model).ffn_out) for layer in layers(model)]


def head_counts(model: PreTrainedModel) -> list[int]:
    return [linear.in_features // head_size(model) for linear in attention_outputs(model)]


def ffn_widths(model: PreTrainedModel) -> list[int]:
    return [linear.in_features for linear in ffn_outputs(model)]


def drop_layers(model: PreTrainedModel, indices: Sequence[int]) -> None:
    """Remove encoder layers, counted from 0. DeBERTa-v2's convolution stays beside the first one that is left.

    Raises: ValueError when none would be left or one does not exist.
    """
    stays = _kept(indices, len(layers(model)), "layers", least=1)
    modeling.keep_layers(model, family(model), stays.tolist())
    modeling.fit_shared_bias(model, family(model))


def prune_heads(model: PreTrainedModel, layer: int, heads: Sequence[int]) -> None:
    """Remove attention heads of one layer: rows of query, key and value, columns of the attention's output.

    A layer that loses all of them is left with the bias of that output.

    Raises: ValueError when one does not exist, or when layers share a bias of their heads and only some would go.
    """
    names, count = family(model), head_counts(model)[layer]
    stays = _kept(heads, count, f"heads of layer {layer}")
    if names.shared_bias and 0 < len(stays) < count:
        raise ValueError(
            f"can't remove {sorted(set(heads))} of {count} heads of layer {layer} alone: the layers of this encoder share one "
            "position bias; remove all heads of the layer, or the same ones everywhere with prune_heads_everywhere"
        )
    _keep_heads(model, layer, stays)
    modeling.fit_shared_bias(model, names)


def prune_heads_everywhere(model: PreTrainedModel, heads: Sequence[int]) -> None:
    """Remove the same attention heads of all layers that have any, and with them their share of a common position bias.

    Raises: ValueError, before anything is cut, when one does not exist in some layer.
    """
    names = family(model)
    stays = {at: _kept(heads, n, f"heads of layer {at}") for at, n in enumerate(head_counts(model)) if n}
    for layer, positions in stays.items():
        _keep_heads(model, layer, positions)
    if names.shared_bias and stays:
        modeling.take(modeling.shared_bias(model, names), "weight", 1, next(iter(stays.values())))


def _keep_heads(model: PreTrainedModel, layer: int, heads: torch.Tensor) -> None:
    size = head_size(model)
    features = (heads[:, None] * size + torch.arange(size)).flatten()
    modeling.keep_heads(layers(model)[layer], family(model), features, size)


def prune_ffn(model: PreTrainedModel, layer: int, neurons: Sequence[int]) -> None:
    """Remove FFN neurons of one layer: rows of what leads into the activation, columns of what leads out.

    A layer that loses all of them is left with the bias of what leads out.

    Raises: ValueError when one does not exist.
    """
    stays = _kept(neurons, ffn_widths(model)[layer], f"FFN neurons of layer {layer}")
    modeling.keep_ffn(layers(model)[layer], family(model), stays)


def prune_hidden(model: PreTrainedModel, features: Sequence[int]) -> None:
    """Remove dimensions of the residual stream from all that writes it, norms it and reads it: embeddings, norms, the linears
    of every layer, and the columns by which the task head reads it. Heads keep their number and size.

    Unlike the other cuts this one is not the same as a mask: means and variances of the norms go over fewer features
    afterwards, so the model equals one whose norms look at the features that are left.

    Raises: ValueError when none would be left, one does not exist, or the model has a convolution in groups.
    """
    stays = _kept(features, hidden_size(model), "hidden dimensions", least=1)
    modeling.keep_hidden(model, family(model), stays)


def _kept(indices: Sequence[int], count: int, what: str, least: int = 0) -> torch.Tensor:
    """Positions that stay, in order, as (kept,) integers."""
    gone = {int(index) for index in indices}
    if not gone <= set(range(count)) or count - len(gone) < least:
        rule = "name existing ones" + (f" and leave at least {least}" if least else "")
        raise ValueError(f"can't remove {sorted(gone)} of {count} {what}; {rule}")
    return torch.tensor([index for index in range(count) if index not in gone], dtype=torch.long)


def path(model: PreTrainedModel, layer: int, name: str) -> str:
    """The dotted path from the model to a linear of an encoder layer."""
    names = family(model)
    return f"{names.encoder}.{names.layers}.{layer}.{name}"


def stream(model: PreTrainedModel, layer: int, name: str) -> str:
    """The path of the module whose input is the residual stream that an output linear's result is added to."""
    names = family(model)
    if name == names.attention_out:
        return f"{names.encoder}.{names.layers}.{layer}"
    return path(model, layer, names.ffn_norm or names.ffn_in)


def encoder_parameters(model: PreTrainedModel) -> int:
    """Elements in the encoder's layers: without embeddings, pooler and head. Packed 4-bit weights count one by one."""
    return sum(_elements(module) for module in layers(model).modules())


def unit_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """What one attention head and one FFN neuron hold: their rows and columns of weights, and their biases."""
    names, block, width = family(model), layers(model)[0], hidden_size(model)
    into = names.attention_blocks * sum(width + _has_bias(linear) for linear in modeling.into_attention(block, names))
    per_neuron = names.ffn_blocks * (width + _has_bias(linear_of(block, names.ffn_in))) + width
    return head_size(model) * (into + width), per_neuron


def _has_bias(linear: nn.Linear) -> bool:
    return linear.bias is not None


def all_parameters(model: PreTrainedModel) -> int:
    return sum(_elements(module) for module in model.modules())


def _elements(module: nn.Module) -> int:
    """Of the module's own parameters. A packed weight knows how many it stands for only by its layer's widths."""
    total = 0
    for name, parameter in module.named_parameters(recurse=False):
        if name == "weight" and isinstance(module, nn.Linear) and not parameter.is_floating_point():
            total += module.in_features * module.out_features
        elif name == "weight" and isinstance(module, nn.Embedding):
            total += module.num_embeddings * module.embedding_dim
        else:
            total += parameter.numel()
    return total


def word_embedding(model: PreTrainedModel) -> nn.Embedding:
    """The one that holds the rows, also where tokens share them."""
    words = model.get_input_embeddings()
    return cast(nn.Embedding, words.embedding if isinstance(words, SharedEmbedding) else words)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the word embedding."""
    return word_embedding(model).num_embeddings


def replace_word_embedding(model: PreTrainedModel, new: Callable[[torch.Tensor], nn.Module]) -> None:
    """new: makes another word embedding of the present one's weight, (tokens, features)."""
    words = word_embedding(model)
    (path,) = (name for name, module in model.named_modules() if module is words)
    replace(model, path, new(words.weight.detach()))


def share_embeddings(model: PreTrainedModel, kept: torch.Tensor, stand_ins: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Keep some rows of the word embedding; every token of the vocabulary gets one of them. Ids stay what they were.

    kept: (n,) ids of the rows, rising. stand_ins: makes (tokens,) positions in `kept` of the weight, (tokens, features).

    Raises: ValueError when tokens don't exist, or when the embedding is quantized or shared already.
    """
    words = word_embedding(model)
    if words is not model.get_input_embeddings() or not words.weight.is_floating_point():
        raise ValueError("the word embedding is packed or shared already; share it once, before it is quantized")
    if len(kept) == 0 or not 0 <= kept.min() <= kept.max() < words.num_embeddings:
        raise ValueError(
            f"can't keep {len(kept)} rows up to {int(kept.max()) if len(kept) else None} of a word embedding of "
            f"{words.num_embeddings}; name existing tokens, with the tokenizer that belongs to the model"
        )

    def shared(weight: torch.Tensor) -> SharedEmbedding:
        few = nn.Embedding.from_pretrained(weight[kept.to(weight.device)], freeze=not words.weight.requires_grad)
        return SharedEmbedding(few, stand_ins(weight).to(weight.device, row_type(len(kept))))

    replace_word_embedding(model, shared)


def trim_vocabulary(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Keep these rows of the word embedding, in this order: token `kept[i]` becomes `i`, and outputs stay as they were.

    Ids in the config follow; one that is not kept becomes None.

    Raises: ValueError when tokens don't exist or come twice, when positions count from a padding id that would move, or when
    the embedding is quantized already.
    """
    embedding = word_embedding(model)
    if embedding is not model.get_input_embeddings():
        raise ValueError("tokens share embeddings already; choose trim_vocabulary or share_embeddings, not both")
    rows = torch.tensor([int(index) for index in kept])
    if len(rows) == 0 or len(set(kept)) < len(kept) or not 0 <= rows.min() <= rows.max() < embedding.num_embeddings:
        raise ValueError(
            f"can't keep {len(rows)} rows up to {max(kept, default=None)} of a word embedding of {embedding.num_embeddings}; "
            "name existing tokens once, with the tokenizer that belongs to the model"
        )
    if not embedding.weight.is_floating_point():
        raise ValueError("the word embedding is packed already; trim the vocabulary before it is quantized")
    new = {int(old): index for index, old in enumerate(kept)}
    owner = next(module for module in model.modules() if any(child is embedding for child in module.children()))
    # RoBERTa and MPNet count positions from the padding id, so that row p + 1 of their position table is the first one.
    start = getattr(owner, "padding_idx", None)
    if start is not None and new.get(start) != start:
        raise ValueError(f"positions of {model.config.model_type} count from the padding id {start}; keep all ids up to it")
    embedding.weight = nn.Parameter(embedding.weight.detach()[rows], requires_grad=embedding.weight.requires_grad)
    embedding.num_embeddings = model.config.vocab_size = len(rows)
    embedding.padding_idx = None if embedding.padding_idx is None else new.get(embedding.padding_idx)
    for name, index in model.config.to_dict().items():
        if name.endswith("_token_id") and isinstance(index, int):
            setattr(model.config, name, new.get(index))
