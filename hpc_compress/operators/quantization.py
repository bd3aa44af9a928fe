"""Precisions of a deployed model. Quantizes in memory, linear by linear, so that schemes can be mixed and heads stay exact."""

import torch
from torch import nn
from transformers import PreTrainedModel

from hpc_compress.models import surgery
from hpc_compress.models.modeling_hpc_compress import linear_of

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def quantize(model: PreTrainedModel, scheme: str, rest: str = "fp32") -> PreTrainedModel:
    """Quantize on the CPU, in place. Only the encoder's linears become int8, nf4 or fp4: a 2-class head can't be 4-bit."""
    if scheme in DTYPES:
        return model.to(DTYPES[scheme])
    build = _int8 if scheme == "int8" else _four_bit
    model.to(DTYPES[rest])
    for layer in surgery.layers(model):
        for path in surgery.family(model).linears:
            surgery.replace(layer, path, build(linear_of(layer, path), scheme))
    return model.eval()  # new layers are in training mode, where int8 takes another path with other results


def _int8(linear: nn.Linear, scheme: str) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    layer = Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, device="meta")
    layer.weight = Int8Params(linear.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
    layer.bias = linear.bias
    # Moving the weights is what quantizes them; bitsandbytes computes the scales from fp16 values.
    return layer.to("cpu")


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
    layer.weight = Params4bit(linear.weight.detach().clone(), requires_grad=False, quant_type=scheme, module=layer)
    # With this path on, a forward repacks the weights, and the next state_dict() is silently wrong.
    layer.support_avx512bf16_for_cpu = False
    layer.bias = linear.bias
    return layer.to("cpu")
