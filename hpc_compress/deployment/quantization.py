"""Precisions of a deployed model. Quantizes in memory, module by module, so that schemes can be mixed and heads stay exact."""

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from hpc_compress import calibration
from hpc_compress.data.batches import Batch
from hpc_compress.deployment import gptq
from hpc_compress.deployment.schemes import SCHEMES
from hpc_compress.models import surgery
from hpc_compress.models.modeling_hpc_compress import (
    EMBEDDING_BLOCK,
    DynamicInt8Linear,
    Int8Linear,
    QuantizedEmbedding,
    linear_of,
)

log = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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

    A linear of a width that its scheme can't take stays in the rest's precision, and a line in the log says so.
    """
    plain = DTYPES[scheme if scheme in DTYPES else rest]
    schemes = schemes_of(model, scheme, layers or {})
    # Both methods round the weights as they are in the rest's precision.
    if batches is None:
        quantized = {path: _build(model, path, name, plain) for path, name in schemes.items()}
    else:
        quantized = _calibrated(model, schemes, plain, batches)
    cast(model.cpu(), plain)
    for path, module in quantized.items():
        surgery.replace(model, path, module)
    if embeddings != "rest":
        words = model.get_input_embeddings()
        (path,) = (name for name, module in model.named_modules() if module is words)
        surgery.replace(model, path, _embedding(words.weight.detach(), embeddings))
    return model.eval()  # new layers are in training mode


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Of parameters only: rotary frequencies are buffers, which are not saved, and loaded in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def schemes_of(model: PreTrainedModel, scheme: str, layers: Mapping[Any, Sequence[int]]) -> dict[str, str]:
    """The scheme of every linear that does not stay in the rest's precision, by path, in the order in which they are run.

    A cut may leave widths that a scheme can't take; such linears stay as they are.
    """
    own = {index: name for name, indices in layers.items() for index in indices}
    schemes, odd = {}, []
    for index, layer in enumerate(surgery.layers(model)):
        name = own.get(index, scheme)
        for leaf in surgery.family(model).linears:
            linear = linear_of(layer, leaf)
            # A block from which everything was cut keeps linears of no width.
            if name in ("rest", *DTYPES) or 0 in (linear.in_features, linear.out_features):
                continue
            if linear.in_features % SCHEMES[name].multiple:
                odd.append(
                    f"{leaf} of layer {index} ({linear.in_features} inputs; {name}: multiples of {SCHEMES[name].multiple})"
                )
                continue
            schemes[surgery.path(model, index, leaf)] = name
    if odd:
        log.warning("not quantized, since their widths do not fit: %s", ", ".join(odd))
    return schemes


def _calibrated(
    model: PreTrainedModel, schemes: Mapping[str, str], plain: torch.dtype, batches: Sequence[Batch]
) -> dict[str, nn.Module]:
    """GPTQ, layer by layer: each sees inputs that come through quantized weights, and compensates for earlier errors."""
    quantized: dict[str, nn.Module] = {}
    walk = calibration.Walk(model, batches)
    for index in range(len(surgery.layers(model))):
        paths = [path for leaf in surgery.family(model).linears if (path := surgery.path(model, index, leaf)) in schemes]
        products = walk.products(index, paths)
        for path in paths:
            quantized[path] = _build(model, path, schemes[path], plain)
            levels, scales = _grid(quantized[path])
            weight = model.get_submodule(path).weight.data
            codes = gptq.round_weights(weight, products[path], levels.to(weight.device), scales.to(weight.device))
            _set_codes(quantized[path], codes.cpu())
            weight.copy_(levels.to(weight.device)[codes] * scales.to(weight.device))
    return quantized


def _build(model: PreTrainedModel, path: str, scheme: str, plain: torch.dtype) -> nn.Module:
    """The quantized layer that takes a linear's place, rounded to nearest."""
    linear = copy.deepcopy(model.get_submodule(path)).to("cpu", plain)
    return {"int8": _int8, "dynamic_int8": _dynamic_int8}.get(scheme, _four_bit)(linear, scheme)


def _int8(linear: nn.Linear, scheme: str) -> nn.Module:
    from bitsandbytes.functional import int8_vectorwise_quant

    weight, scale, _ = int8_vectorwise_quant(linear.weight.detach().half())  # bitsandbytes computes the scales from fp16 values
    return Int8Linear(weight, scale, None if linear.bias is None else linear.bias.detach())


def _four_bit(linear: nn.Linear, scheme: str) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=linear.weight.dtype,
        quant_type=scheme,
        device="meta",
    )
    # A block that goes on into the next row is silently decoded with wrong scales by bitsandbytes' kernels for AVX-512.
    block = math.gcd(linear.in_features, 64)
    layer.weight = Params4bit(linear.weight.detach(), requires_grad=False, quant_type=scheme, blocksize=block, module=layer)
    # With this path on, a forward repacks the weights, and the next state_dict() is silently wrong.
    layer.support_avx512bf16_for_cpu = False
    layer.bias = linear.bias
    return layer.to("cpu")


def _dynamic_int8(linear: nn.Linear, scheme: str) -> nn.Module:
    weight = linear.weight.detach()
    scale = weight.abs().amax(1).clamp(min=1e-30) / 127
    bias = None if linear.bias is None else linear.bias.detach()
    return DynamicInt8Linear(torch.round(weight / scale[:, None]).to(torch.int8), scale, bias)


def _embedding(weight: torch.Tensor, scheme: str) -> QuantizedEmbedding:
    """Rounded to nearest, row by row. weight: (tokens, features)."""
    features = weight.shape[1]
    if scheme == "int8":
        scale = weight.abs().amax(1, keepdim=True)
        rows = torch.round(weight.float() / scale.float().clamp(min=1e-30) * 127).to(torch.int8)
        return QuantizedEmbedding(scheme, features, rows, scale)
    from bitsandbytes.functional import get_4bit_type

    levels = get_4bit_type(scheme, device="cpu")
    blocks = F.pad(weight, (0, -features % EMBEDDING_BLOCK)).unflatten(1, (-1, EMBEDDING_BLOCK))
    scale = blocks.abs().amax(2)  # (tokens, blocks)
    shares = (blocks.float() / scale.float().clamp(min=1e-30)[..., None]).flatten(1)[:, :features]
    return QuantizedEmbedding(scheme, features, _pack(gptq.nearest(shares, levels)), scale, levels)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes of 4 bits, two a byte along the last dimension, the first in the high bits."""
    pairs = F.pad(codes.to(torch.uint8), (0, codes.shape[-1] % 2)).unflatten(-1, (-1, 2))
    return pairs[..., 0] << 4 | pairs[..., 1]


def _grid(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The values that weights of a quantized linear can have: `levels[code] * scale`.

    Returns: (codes,) levels and (out, in) scales.
    """
    shape = (layer.out_features, layer.in_features)
    whole = torch.arange(-127.0, 128)
    if isinstance(layer, DynamicInt8Linear):
        return whole, layer.get_buffer("scale")[:, None].expand(shape)
    if not hasattr(layer.weight, "quant_state"):
        return whole / 127, layer.SCB[:, None].expand(shape)
    from bitsandbytes.functional import dequantize_blockwise

    state = layer.weight.quant_state
    scale = dequantize_blockwise(state.absmax, state.state2) + state.offset  # the scales are stored in 8 bits themselves
    return state.code, scale.repeat_interleave(state.blocksize)[: shape[0] * shape[1]].view(shape)


def _set_codes(layer: Any, codes: torch.Tensor) -> None:
    """codes: (out, in) positions in the levels of `_grid`."""
    whole = not hasattr(layer.weight, "quant_state")
    layer.weight.data.copy_((codes - 127 if whole else _pack(codes.flatten())).view(layer.weight.shape))
