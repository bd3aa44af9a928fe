"""Precisions, one row each: where they run, what they take, how weights are rounded to them. Knows single layers; nothing of
models, calibration or storage. How a saved layer is read back lies with the models, in `modeling_hpc_compress.load_weights`.

Imports torch only where weights are rounded, so that a login node can check a step.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Plain:
    """A floating-point format of torch, for any part of a model."""

    name: str  # in torch

    @property
    def dtype(self) -> "torch.dtype":
        import torch

        return getattr(torch, self.name)


class LowBit(ABC):
    """A format of 8 or 4 bits for single linears: each one becomes a layer of another class, which packs its weights.

    Its weights can have the values `levels[code] * scale`. The scales are fixed by the largest weights; GPTQ chooses the codes.
    """

    @abstractmethod
    def rounded(self, linear: "nn.Linear") -> "nn.Linear":
        """The layer that takes a linear's place, with each weight at its nearest value. The linear is on the CPU, in the
        precision of the rest of the model; it may be used up."""

    @abstractmethod
    def grid(self, layer: Any) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Of a layer that `rounded` made: (codes,) levels and (out, in) scales."""

    @abstractmethod
    def set_codes(self, layer: Any, codes: "torch.Tensor") -> None:
        """Give the layer other weights. codes: (out, in) positions in the levels of `grid`."""


class Int8(LowBit):
    """One scale a row, multiplied by bitsandbytes: LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339)."""

    def rounded(self, linear: "nn.Linear") -> "nn.Linear":
        from bitsandbytes.functional import int8_vectorwise_quant

        from hpc_compress.models.modeling_hpc_compress import Int8Linear

        # bitsandbytes computes the scales from fp16 values.
        weight, scale, _ = int8_vectorwise_quant(linear.weight.detach().half())
        return Int8Linear(weight, scale, None if linear.bias is None else linear.bias.detach())

    def grid(self, layer: Any) -> tuple["torch.Tensor", "torch.Tensor"]:
        import torch

        return torch.arange(-127.0, 128) / 127, layer.SCB[:, None].expand(layer.weight.shape)

    def set_codes(self, layer: Any, codes: "torch.Tensor") -> None:
        layer.weight.data.copy_(codes - 127)


class DynamicInt8(LowBit):
    """One scale a row, multiplied by torch's kernels for CPUs, which round the inputs as they come."""

    def rounded(self, linear: "nn.Linear") -> "nn.Linear":
        import torch

        from hpc_compress.models.modeling_hpc_compress import DynamicInt8Linear

        weight = linear.weight.detach()
        scale = weight.abs().amax(1).clamp(min=1e-30) / 127
        bias = None if linear.bias is None else linear.bias.detach()
        return DynamicInt8Linear(torch.round(weight / scale[:, None]).to(torch.int8), scale, bias)

    def grid(self, layer: Any) -> tuple["torch.Tensor", "torch.Tensor"]:
        import torch

        return torch.arange(-127.0, 128), layer.scale[:, None].expand(layer.weight.shape)

    def set_codes(self, layer: Any, codes: "torch.Tensor") -> None:
        layer.weight.data.copy_(codes - 127)


@dataclass(frozen=True)
class FourBit(LowBit):
    """16 levels, and a scale for each block of 64 weights, multiplied by bitsandbytes. The levels of nf4 are quantiles of a
    normal distribution; the scales are stored in 8 bits themselves (Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3).
    """

    levels: str  # nf4 or fp4, as bitsandbytes calls them

    def rounded(self, linear: "nn.Linear") -> "nn.Linear":
        import math

        from bitsandbytes.nn import Linear4bit, Params4bit

        layer = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=linear.weight.dtype,
            quant_type=self.levels,
            device="meta",
        )
        # A block that goes on into the next row is silently decoded with wrong scales by bitsandbytes' kernels for AVX-512.
        block = math.gcd(linear.in_features, 64)
        weight = linear.weight.detach()
        layer.weight = Params4bit(weight, requires_grad=False, quant_type=self.levels, blocksize=block, module=layer)
        # With this path on, a forward repacks the weights, and the next state_dict() is silently wrong.
        layer.support_avx512bf16_for_cpu = False
        layer.bias = linear.bias
        return layer.to("cpu")

    def grid(self, layer: Any) -> tuple["torch.Tensor", "torch.Tensor"]:
        from bitsandbytes.functional import dequantize_blockwise

        state, shape = layer.weight.quant_state, (layer.out_features, layer.in_features)
        scale = dequantize_blockwise(state.absmax, state.state2) + state.offset
        return state.code, scale.repeat_interleave(state.blocksize)[: shape[0] * shape[1]].view(shape)

    def set_codes(self, layer: Any, codes: "torch.Tensor") -> None:
        layer.weight.data.copy_(_two_a_byte(codes.flatten()).view(layer.weight.shape))


@dataclass(frozen=True)
class Program:
    """A format of a whole model, which is then no model of torch any more."""

    # From a model, the scheme of each linear, and what rounds the word embedding.
    convert: Callable[["PreTrainedModel", dict[str, str], Callable[["torch.Tensor"], "nn.Embedding"]], "PreTrainedModel"]
    embedding: str  # the scheme of the word embedding, unless another one is chosen


def _to_onnx(
    model: "PreTrainedModel", linears: dict[str, str], embedding: Callable[["torch.Tensor"], "nn.Embedding"]
) -> "PreTrainedModel":
    from hpc_compress.deployment import onnx_int8

    return onnx_int8.convert(model, linears, embedding)


# --- word embeddings ---


def _int8_embedding(weight: "torch.Tensor") -> "nn.Embedding":
    """Rounded to nearest, one scale a row. weight: (tokens, features)."""
    import torch

    from hpc_compress.models.modeling_hpc_compress import QuantizedEmbedding

    scale = weight.abs().amax(1, keepdim=True)
    rows = torch.round(weight.float() / scale.float().clamp(min=1e-30) * 127).to(torch.int8)
    return QuantizedEmbedding("int8", weight.shape[1], rows, scale)


def _four_bit_embedding(scheme: str) -> Callable[["torch.Tensor"], "nn.Embedding"]:
    """Rounded to nearest, one scale for each block of a row. scheme: nf4, fp4 or int4."""

    def rounded(weight: "torch.Tensor") -> "nn.Embedding":
        import torch
        import torch.nn.functional as F

        from hpc_compress.models.modeling_hpc_compress import EMBEDDING_BLOCK, QuantizedEmbedding

        features = weight.shape[1]
        blocks = F.pad(weight, (0, -features % EMBEDDING_BLOCK)).unflatten(1, (-1, EMBEDDING_BLOCK))
        scale = blocks.abs().amax(2)  # (tokens, blocks)
        shares = (blocks.float() / scale.float().clamp(min=1e-30)[..., None]).flatten(1)[:, :features]
        if scheme == "int4":
            # As `QuantizedEmbedding` decodes it: 16 even steps from -1 to 1, none of which is 0.
            codes = F.pad(torch.round((shares + 1) * 7.5).to(torch.uint8), (0, features % 2))
            first, second = codes.chunk(2, 1)
            return QuantizedEmbedding(scheme, features, first << 4 | second, scale)

        from bitsandbytes.functional import get_4bit_type

        from hpc_compress.deployment.gptq import nearest

        levels = get_4bit_type(scheme, device="cpu")
        return QuantizedEmbedding(scheme, features, _two_a_byte(nearest(shares, levels)), scale, levels)

    return rounded


def _two_a_byte(codes: "torch.Tensor") -> "torch.Tensor":
    """Codes of 4 bits, two a byte along the last dimension, the first in the high bits."""
    import torch
    import torch.nn.functional as F

    pairs = F.pad(codes.to(torch.uint8), (0, codes.shape[-1] % 2)).unflatten(-1, (-1, 2))
    return pairs[..., 0] << 4 | pairs[..., 1]


# --- the table ---


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What a precision is. No field has a default: one that a new row forgets is an error when this module is imported."""

    weights: Plain | LowBit | Program | None  # None: it is one for word embeddings only
    devices: tuple[str, ...]  # on which it runs
    multiple: int  # of which the inputs of a linear must be a multiple; with others bitsandbytes is slow or wrong
    rests: tuple[str, ...]  # plain schemes that the rest of the model may have beside it; of a plain scheme: its own
    embedding: Callable[["torch.Tensor"], "nn.Embedding"] | None  # rounds a word embedding, (tokens, features); None: can't
    packages: tuple[str, ...]  # what it needs besides the dependencies of this program
    extra: str | None  # of this program, which installs them
    note: str | None  # for the card of an exported model: what whoever loads it needs


def _plain(name: str, dtype: str) -> Scheme:
    return Scheme(
        weights=Plain(dtype),
        devices=("cpu", "cuda"),
        multiple=1,
        rests=(name,),
        embedding=None,
        packages=(),
        extra=None,
        note=None,
    )


def _by_bitsandbytes(weights: LowBit, multiple: int, embedding: Callable[["torch.Tensor"], "nn.Embedding"]) -> Scheme:
    return Scheme(
        weights=weights,
        devices=("cpu", "cuda"),
        multiple=multiple,
        rests=("fp32", "fp16", "bf16"),
        embedding=embedding,
        packages=(),
        extra=None,
        note=None,
    )


SCHEMES = {
    "fp32": _plain("fp32", "float32"),
    "fp16": _plain("fp16", "float16"),
    "bf16": _plain("bf16", "bfloat16"),
    "int8": _by_bitsandbytes(Int8(), multiple=4, embedding=_int8_embedding),
    "nf4": _by_bitsandbytes(FourBit("nf4"), multiple=32, embedding=_four_bit_embedding("nf4")),
    "fp4": _by_bitsandbytes(FourBit("fp4"), multiple=32, embedding=_four_bit_embedding("fp4")),
    "int4": Scheme(
        weights=None,
        devices=("cpu", "cuda"),
        multiple=1,
        rests=("fp32", "fp16", "bf16"),
        embedding=_four_bit_embedding("int4"),
        packages=(),
        extra=None,
        note=None,
    ),
    "dynamic_int8": Scheme(
        weights=DynamicInt8(),
        devices=("cpu",),
        multiple=1,
        rests=("fp32",),
        embedding=None,
        packages=(),
        extra=None,
        note=None,
    ),
    "onnx_int8": Scheme(
        weights=Program(_to_onnx, embedding="int8"),
        devices=("cpu",),
        multiple=1,
        rests=("fp32",),
        embedding=None,
        packages=("onnx", "onnxruntime"),
        extra="onnx",
        note="It runs in ONNX Runtime, on CPUs: `pip install onnxruntime`.",
    ),
}
OF_MODELS = tuple(name for name, row in SCHEMES.items() if row.weights is not None)
PLAIN = tuple(name for name, row in SCHEMES.items() if isinstance(row.weights, Plain))
LOW_BIT = tuple(name for name, row in SCHEMES.items() if isinstance(row.weights, LowBit))
EMBEDDINGS = tuple(name for name, row in SCHEMES.items() if row.embedding)


def named(name: str) -> Scheme:
    """Raises: ValueError for a scheme that is in no row."""
    if name not in SCHEMES:
        raise ValueError(f"{name!r} is not a scheme; choose one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


def dtype(name: str) -> "torch.dtype":
    """Of a plain scheme.

    Raises: ValueError for another one.
    """
    weights = named(name).weights
    if not isinstance(weights, Plain):
        raise ValueError(f"{name} is no floating-point format of a whole model; choose one of {', '.join(PLAIN)}")
    return weights.dtype
