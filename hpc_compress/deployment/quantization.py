"""Precisions of a deployed model. Quantizes in memory, module by module, so that schemes can be mixed and heads stay exact.

Knows which linear gets which scheme; what a scheme makes of a linear is in `schemes`, and how GPTQ rounds in `gptq`.
"""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hpc_compress import calibration
from hpc_compress.data.batches import Batch
from hpc_compress.deployment import gptq, schemes
from hpc_compress.deployment.schemes import PLAIN, LowBit, Program
from hpc_compress.models import surgery
from hpc_compress.models.modeling_hpc_compress import linear_of

log = logging.getLogger(__name__)


def quantize(
    model: PreTrainedModel,
    scheme: str,
    rest: str = "fp32",
    layers: Mapping[Any, Sequence[int]] | None = None,
    embeddings: str = "rest",
    batches: Sequence[Batch] | None = None,
) -> PreTrainedModel:
    """Quantize in place; the model ends on the CPU. Only the encoder's linears and the word embedding are ever below 16 bits:
    a 2-class head can't be 4-bit.

    layers: scheme -> layers that have it in place of `scheme`; "rest" leaves a layer in the precision of the rest.
    batches: calibration sentences, on the model's device; with them linears are rounded by GPTQ, else to nearest.

    A linear of a width that its scheme can't take stays in the rest's precision, and a line in the log says so. A scheme that
    makes a program of the whole model leaves only `embeddings` to choose: the other arguments have no effect on it.

    Raises: ValueError for a scheme that does not exist, or has no form for what it is asked for.
    """
    own = schemes_of(model, scheme, layers or {})
    whole = schemes.named(scheme).weights
    if isinstance(whole, Program):
        return whole.convert(model, own, _embedding(whole.embedding if embeddings == "rest" else embeddings))
    # Both methods round the weights as they are in the rest's precision.
    plain = scheme if scheme in PLAIN else rest
    if batches is None:
        quantized = {path: _rounded(model, path, name, plain) for path, name in own.items()}
    else:
        quantized = _calibrated(model, own, plain, batches)
    cast(model.cpu(), plain)
    for path, module in quantized.items():
        surgery.replace(model, path, module)
    if embeddings != "rest":
        surgery.replace_word_embedding(model, _embedding(embeddings))
    return model.eval()  # new layers are in training mode


def cast(model: PreTrainedModel, scheme: str) -> None:
    """To a plain scheme, in place. Parameters only: rotary frequencies are buffers, which are not saved, and loaded in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(schemes.dtype(scheme))


def schemes_of(model: PreTrainedModel, scheme: str, layers: Mapping[Any, Sequence[int]]) -> dict[str, str]:
    """The scheme of every linear that does not stay in the rest's precision, by path, in the order in which they are run.

    A cut may leave widths that a scheme can't take; such linears stay as they are.
    """
    own = {index: name for name, indices in layers.items() for index in indices}
    found, odd = {}, []
    for index, layer in enumerate(surgery.layers(model)):
        name = own.get(index, scheme)
        multiple = 1 if name == "rest" else schemes.named(name).multiple
        for leaf in surgery.family(model).linears:
            linear = linear_of(layer, leaf)
            # A block from which everything was cut keeps linears of no width.
            if name in ("rest", *PLAIN) or 0 in (linear.in_features, linear.out_features):
                continue
            if linear.in_features % multiple:
                odd.append(f"{leaf} of layer {index} ({linear.in_features} inputs; {name}: multiples of {multiple})")
                continue
            found[surgery.path(model, index, leaf)] = name
    if odd:
        log.warning("not quantized, since their widths do not fit: %s", ", ".join(odd))
    return found


def _calibrated(model: PreTrainedModel, own: Mapping[str, str], plain: str, batches: Sequence[Batch]) -> dict[str, nn.Module]:
    """GPTQ, layer by layer: each sees inputs that come through quantized weights, and compensates for earlier errors."""
    quantized: dict[str, nn.Module] = {}
    walk = calibration.Walk(model, batches)
    for index in range(len(surgery.layers(model))):
        paths = [path for leaf in surgery.family(model).linears if (path := surgery.path(model, index, leaf)) in own]
        products = walk.products(index, paths)
        for path in paths:
            quantized[path], low_bit = _rounded(model, path, own[path], plain), _low_bit(own[path])
            levels, scales = low_bit.grid(quantized[path])
            weight = model.get_submodule(path).weight.data
            codes = gptq.round_weights(weight, products[path], levels.to(weight.device), scales.to(weight.device))
            low_bit.set_codes(quantized[path], codes.cpu())
            weight.copy_(levels.to(weight.device)[codes] * scales.to(weight.device))
    return quantized


def _rounded(model: PreTrainedModel, path: str, scheme: str, plain: str) -> nn.Module:
    """The quantized layer that takes a linear's place, rounded to nearest."""
    linear: Any = copy.deepcopy(model.get_submodule(path))
    return _low_bit(scheme).rounded(linear.to("cpu", schemes.dtype(plain)))


def _low_bit(scheme: str) -> LowBit:
    """Raises: ValueError for a scheme that single linears can't have."""
    weights = schemes.named(scheme).weights
    if not isinstance(weights, LowBit):
        raise ValueError(f"{scheme} is no scheme of single linears; choose one of {', '.join(schemes.LOW_BIT)}")
    return weights


def _embedding(scheme: str) -> Callable[[torch.Tensor], nn.Embedding]:
    """Raises: ValueError for a scheme that a word embedding can't have."""
    rounded = schemes.named(scheme).embedding
    if rounded is None:
        raise ValueError(f"{scheme} is no scheme of word embeddings; choose one of {', '.join(schemes.EMBEDDINGS)}")
    return rounded
