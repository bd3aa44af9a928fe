"""Encoders of any per-layer shape and precision, for `transformers`.

This file stands alone: it is shipped beside every exported model, so that it loads without hpc_compress through
`AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)`. It knows the families of encoders, how
to give a stock model an irregular shape, and how to read quantized weights back. It knows nothing of search or training.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import cached_file


@dataclass(frozen=True)
class Family:
    """Where the parts of one kind of encoder are, as dotted paths. A new kind of encoder is one more row of `FAMILIES`."""

    encoder: str  # from the classification model to the base encoder
    layers: str  # from there to the list of layers
    query: str  # from a layer to each linear
    key: str
    value: str
    attention_out: str
    ffn_in: str
    ffn_out: str
    layer_count: str = "num_hidden_layers"  # names in the stock config
    head_count: str = "num_attention_heads"
    width: str = "hidden_size"

    @property
    def linears(self) -> tuple[str, ...]:
        return (self.query, self.key, self.value, self.attention_out, self.ffn_in, self.ffn_out)


def _bert_like(encoder: str) -> Family:
    return Family(
        encoder=encoder,
        layers="encoder.layer",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        attention_out="attention.output.dense",
        ffn_in="intermediate.dense",
        ffn_out="output.dense",
    )


FAMILIES = {
    "bert": _bert_like("bert"),
    "roberta": _bert_like("roberta"),
    "xlm-roberta": _bert_like("roberta"),
    "electra": _bert_like("electra"),
    "distilbert": Family(
        encoder="distilbert",
        layers="transformer.layer",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_out="attention.out_lin",
        ffn_in="ffn.lin1",
        ffn_out="ffn.lin2",
        layer_count="n_layers",
        head_count="n_heads",
        width="dim",
    ),
}


def family_of(model_type: str) -> Family:
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not a known family of encoders; known: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


class HpcCompressConfig(PreTrainedConfig):
    """A stock config plus what the surgery and the quantization changed."""

    model_type = "hpc_compress"

    def __init__(
        self,
        stock: dict[str, Any] | None = None,
        heads: list[int] | None = None,
        ffn: list[int] | None = None,
        quantized: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.stock = stock or {}  # the uncompressed encoder's config, with its model_type
        self.heads = heads or []  # attention heads of each layer that is left
        self.ffn = ffn or []  # FFN neurons of each layer that is left
        self.quantized = quantized or {}  # dotted path of a linear -> int8, nf4 or fp4
        super().__init__(**kwargs)

    def stock_config(self) -> PreTrainedConfig:
        return AutoConfig.for_model(**self.stock)


class HpcCompressForSequenceClassification(PreTrainedModel):
    """A stock sequence classifier with irregular layers; `forward` takes and returns what the stock model does."""

    config_class = HpcCompressConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: HpcCompressConfig) -> None:
        super().__init__(config)
        self.model = skeleton(config)
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What `to`, `cuda` and `half` go through. An int8 layer's scales are no parameters: they are taken along here."""
        super()._apply(fn, recurse)
        for module in self.modules():
            if type(module).__name__ == "Linear8bitLt":
                for holder in (module.weight, module.state):  # before the first forward the one, then the other
                    if holder.SCB is not None:
                        holder.CB, holder.SCB = module.weight.data, holder.SCB.to(module.weight.device)
        return self

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load on the CPU, or on `device_map` when it names one device; weights keep the precision they were saved in.

        The generic loader would re-initialise layers of unusual shape without a word, so this one is strict.
        """
        hub = {key: kwargs[key] for key in ("cache_dir", "revision", "token", "local_files_only") if key in kwargs}
        if config is None:
            config = HpcCompressConfig.from_pretrained(path, **hub)
        if kwargs.get("dtype", kwargs.get("torch_dtype")) not in (None, "auto"):
            raise ValueError("the precision of a compressed model is part of it; load it without dtype")
        local = Path(path) / "model.safetensors"
        weights = local if local.is_file() else cached_file(path, "model.safetensors", **hub)
        with no_init_weights():
            model = cls(config)
        load_weights(model, load_file(str(weights)), config.quantized, prefix="model.")
        device = kwargs.get("device_map")
        return model.to(device if device not in (None, "auto") else "cpu").eval()


def skeleton(config: HpcCompressConfig) -> PreTrainedModel:
    """A stock model whose layers have the config's shape; its weights mean nothing yet."""
    family = family_of(config.stock["model_type"])
    stock_config = config.stock_config()
    head_size = getattr(stock_config, family.width) // getattr(stock_config, family.head_count)
    setattr(stock_config, family.layer_count, len(config.heads))
    model = AutoModelForSequenceClassification.from_config(stock_config)
    for layer, heads, ffn in zip(layers_of(model, family), config.heads, config.ffn, strict=True):
        for name in (family.query, family.key, family.value):
            resize(linear_of(layer, name), out_features=heads * head_size)
        resize(linear_of(layer, family.attention_out), in_features=heads * head_size)
        resize(linear_of(layer, family.ffn_in), out_features=ffn)
        resize(linear_of(layer, family.ffn_out), in_features=ffn)
    return model


def layers_of(model: nn.Module, family: Family) -> nn.ModuleList:
    return cast(nn.ModuleList, model.get_submodule(f"{family.encoder}.{family.layers}"))


def linear_of(layer: nn.Module, path: str) -> nn.Linear:
    """A linear of an encoder layer; quantized ones are linears too."""
    return cast(nn.Linear, layer.get_submodule(path))


def resize(linear: nn.Linear, in_features: int | None = None, out_features: int | None = None) -> None:
    """Give a linear other widths; the new weights are empty."""
    linear.in_features = in_features or linear.in_features
    linear.out_features = out_features or linear.out_features
    if linear.weight.shape != (linear.out_features, linear.in_features):
        linear.weight = nn.Parameter(linear.weight.new_empty(linear.out_features, linear.in_features))
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.new_empty(linear.out_features))


def load_weights(model: nn.Module, tensors: dict[str, torch.Tensor], quantized: dict[str, str], prefix: str = "") -> None:
    """Assign saved tensors; the linears named in `quantized` become bitsandbytes layers again, bit for bit."""
    for name, scheme in quantized.items():
        path = prefix + name
        own = {key.removeprefix(path + "."): tensors.pop(key) for key in list(tensors) if key.startswith(path + ".")}
        restore = _restore_int8 if scheme == "int8" else _restore_4bit
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, restore(linear_of(model, path), own))
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    missing = [key for key in missing if not any(key.startswith(f"{prefix}{name}.") for name in quantized)]
    if missing or unexpected:
        raise ValueError(f"the saved weights do not fit the model: missing {missing[:3]}, unexpected {unexpected[:3]}")


def _restore_int8(linear: nn.Linear, tensors: dict[str, torch.Tensor]) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    bias = tensors.get("bias")
    layer = Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, device="meta")
    weight, scale = tensors["weight"], tensors["SCB"]
    layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=scale)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    return layer


def _restore_4bit(linear: nn.Linear, tensors: dict[str, torch.Tensor]) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    bias = tensors.pop("bias", None)
    weight = tensors.pop("weight")
    statistics = {key.removeprefix("weight."): value for key, value in tensors.items()}
    layer = Linear4bit(linear.in_features, linear.out_features, bias=False, device="meta")
    layer.weight = Params4bit.from_prequantized(weight, statistics, device="cpu", module=layer)
    layer.compute_dtype = layer.weight.quant_state.dtype
    layer.compute_type_is_set = True
    # With this path on, a forward repacks the weights, and the next state_dict() is silently wrong.
    layer.support_avx512bf16_for_cpu = False
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    return layer
