"""Encoders of any per-layer shape and precision, for `transformers`.

This file stands alone: it is shipped beside every exported model, so that it loads without hpc_compress through the Auto
class of its kind, such as `AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)`. It knows the
families of encoders, how to give a stock model an irregular shape, and how to read quantized weights back. It knows nothing
of search or training.
"""

import copy
import dataclasses
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import cached_file

# On a CPU it warns of each int8 layer in each forward, and of kernels that nobody asked for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where the parts of one kind of encoder are, as dotted paths. A new kind of encoder is one more row of `FAMILIES`.

    No field has a default: a part that a new row forgets must not pass for one that the encoder lacks.
    """

    encoder: str  # from the task model to the base encoder
    layers: str  # from there to the list of layers
    reader: str  # from the task model to the linear by which the task head of a whole text reads the encoder's output
    attention: str  # from a layer to the module that computes attention
    attention_in: tuple[str, ...]  # from a layer to the linears whose rows are heads; the last rows are the values'
    attention_out: str  # from a layer to each linear
    ffn_in: str
    ffn_out: str
    attention_blocks: int  # blocks of rows in each linear of attention_in; every block holds all heads
    ffn_blocks: int  # blocks of rows in ffn_in; every block holds all neurons
    positions: tuple[str, ...]  # like attention_in, for relative positions; not every checkpoint has them
    attention_norm: str | None  # a norm before the attention, which nothing else reads
    ffn_norm: str | None  # a norm before the FFN, which nothing else reads
    inner_norm: str | None  # inside the module that computes attention: the norm of the sum of its input and its output
    gate: str | None  # from a layer to the activation of a gated FFN, whose output multiplies the neurons
    shared_bias: str | None  # from the base encoder to an embedding of all layers' heads, one column each
    head_count: str  # names in the stock config
    width: str
    also_width: tuple[str, ...]  # further names, of widths that belong to the residual stream if they are equal to `width`
    unshare: "Callable[[PreTrainedModel], None] | None"  # gives each layer weights of its own, where layers share them

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.attention_in, self.attention_out, self.ffn_in, self.ffn_out)

    @property
    def value(self) -> str:
        return self.attention_in[-1]


class UnsharedEncoder(nn.Module):
    """ALBERT's encoder as a plain list of layers. Each has weights of its own, so that each can be cut in its own way.

    The stock encoder runs one layer many times (Lan et al. 2020, ALBERT, arXiv 1909.11942, section 3.1). This one computes the
    same outputs, to the last bit, with the same number of operations. The price is size: a saved model holds every layer, so
    an uncut model is larger than the stock one (ALBERT-base: 90 M parameters instead of 12 M).
    """

    layers: Any

    def __init__(self, shared: Any) -> None:
        """shared: the stock encoder."""
        super().__init__()
        self.embedding_hidden_mapping_in = shared.embedding_hidden_mapping_in
        config, depth = shared.config, shared.config.num_hidden_layers
        # The stock encoder's own rule says which group stands at which place.
        groups = [shared.albert_layer_groups[int(at / (depth / config.num_hidden_groups))] for at in range(depth)]
        # All copies look at the one config in which `set_attn_implementation` writes.
        copies = (copy.deepcopy(layer, {id(config): config}) for group in groups for layer in group.albert_layers)
        self.layers = nn.ModuleList(copies)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        hidden_states = self.embedding_hidden_mapping_in(hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


def _unshare_albert(model: PreTrainedModel) -> None:
    model.albert.encoder = UnsharedEncoder(model.albert.encoder)


def _bert_like(encoder: str, reader: str, suffix: str = "") -> Family:
    return Family(
        encoder=encoder,
        layers="encoder.layer",
        reader=reader,
        attention="attention.self",
        attention_in=tuple(f"attention.self.{name}{suffix}" for name in ("query", "key", "value")),
        attention_out="attention.output.dense",
        ffn_in="intermediate.dense",
        ffn_out="output.dense",
        attention_blocks=1,
        ffn_blocks=1,
        positions=(),
        attention_norm=None,
        ffn_norm=None,
        inner_norm=None,
        gate=None,
        shared_bias=None,
        head_count="num_attention_heads",
        width="hidden_size",
        also_width=(),
        unshare=None,
    )


FAMILIES = {
    "bert": _bert_like("bert", "bert.pooler.dense"),
    "roberta": _bert_like("roberta", "classifier.dense"),
    "xlm-roberta": _bert_like("roberta", "classifier.dense"),
    # Without a projection of the embeddings, their features are the residual stream's.
    "electra": dataclasses.replace(_bert_like("electra", "classifier.dense"), also_width=("embedding_size",)),
    "deberta-v2": dataclasses.replace(
        _bert_like("deberta", "pooler.dense", suffix="_proj"),
        positions=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
        also_width=("embedding_size", "pooler_hidden_size"),
    ),
    "mpnet": dataclasses.replace(
        _bert_like("mpnet", "classifier.dense"),
        attention="attention.attn",
        attention_in=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        attention_out="attention.attn.o",
        shared_bias="encoder.relative_attention_bias",
    ),
    "distilbert": dataclasses.replace(
        _bert_like("distilbert", "pre_classifier"),
        layers="transformer.layer",
        attention="attention",
        attention_in=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        attention_out="attention.out_lin",
        ffn_in="ffn.lin1",
        ffn_out="ffn.lin2",
        head_count="n_heads",
        width="dim",
    ),
    # The embeddings are always projected: their features are not the residual stream's, however many they are.
    "albert": dataclasses.replace(
        _bert_like("albert", "albert.pooler"),
        layers="encoder.layers",
        attention="attention",
        attention_in=("attention.query", "attention.key", "attention.value"),
        attention_out="attention.dense",
        ffn_in="ffn",
        ffn_out="ffn_output",
        inner_norm="LayerNorm",
        unshare=_unshare_albert,
    ),
    "modernbert": Family(
        encoder="model",
        layers="layers",
        reader="head.dense",
        attention="attn",
        attention_in=("attn.Wqkv",),
        attention_out="attn.Wo",
        ffn_in="mlp.Wi",
        ffn_out="mlp.Wo",
        attention_blocks=3,
        ffn_blocks=2,
        positions=(),
        attention_norm="attn_norm",
        ffn_norm="mlp_norm",
        inner_norm=None,
        gate="mlp.act",
        shared_bias=None,
        head_count="num_attention_heads",
        width="hidden_size",
        also_width=(),
        unshare=None,
    ),
}


SPARSE = ("sparse", "2:4")  # linears that are saved without their zeros
EMBEDDING_SCHEMES = ("int8", "int4", "nf4", "fp4")
WEIGHTS, PROGRAM = "model.safetensors", "model.onnx"  # a saved model has one of the two


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
        layers: list[int] | None = None,
        heads: list[int] | None = None,
        ffn: list[int] | None = None,
        hidden: int | None = None,
        quantized: dict[str, str] | None = None,
        thresholds: list[float] | None = None,
        parameters: list[int] | None = None,
        shared: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.stock = stock or {}  # the uncompressed encoder's config, with its model_type
        self.layers = layers or []  # numbers of those that are left, counted from 0 in the uncompressed encoder
        self.heads = heads or []  # attention heads of each layer that is left
        self.ffn = ffn or []  # FFN neurons of each layer that is left
        self.hidden = hidden  # dimensions of the residual stream; None: all of them
        self.quantized = quantized or {}  # dotted path of a linear or embedding -> its scheme
        self.thresholds = thresholds or []  # of each layer: smaller values of its FFN's activated gate become 0; empty: none
        self.parameters = parameters  # of an ONNX program: all of the model that it was made from, and its encoder layers'
        self.shared = shared  # rows of a word embedding whose tokens share rows; None: each token has its own
        super().__init__(**kwargs)

    def stock_config(self) -> PreTrainedConfig:
        # Transformers chooses how attention is computed; a config may name a kernel, which is code of the hub.
        return AutoConfig.for_model(**{key: value for key, value in self.stock.items() if "attn_implementation" not in key})


class HpcCompressOnnxConfig(HpcCompressConfig):
    """The config of an ONNX program. transformers finds a model's class by its config's class, so weights and programs need
    different config classes to be loaded in one process."""


POOLINGS = ("mean", "cls", "pooler")  # how a sentence encoder makes one vector of its tokens


@dataclass
class SentenceOutput(BaseModelOutputWithPooling):
    """What a bare encoder returns, and (batch, dimensions) embeddings of the texts, before they are normalised."""

    sentence_embedding: torch.Tensor | None = None


class SentenceEncoder(PreTrainedModel):
    """A bare stock encoder, at the place that it has in the task models of its family, and its pooling.

    config: the encoder's; its `sentence_pooling` is one of `POOLINGS`. A pooler that the pooling does not use is left out.
    """

    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PreTrainedConfig, encoder: PreTrainedModel | None = None) -> None:
        """encoder: with its weights; None: a new one."""
        encoder = AutoModel.from_config(config) if encoder is None else encoder
        super().__init__(encoder.config)  # in which the encoder has chosen an attention that it knows
        self.base_model_prefix = family_of(config.model_type).encoder
        self.pooling = getattr(config, "sentence_pooling", "mean")
        if self.pooling not in POOLINGS:
            raise ValueError(f"sentence_pooling={self.pooling!r} is not known; known: {', '.join(POOLINGS)}")
        has_pooler = getattr(encoder, "pooler", None) is not None
        if self.pooling == "pooler" and not has_pooler:
            raise ValueError(f"{type(encoder).__name__} has no pooler; choose the pooling mean or cls")
        if self.pooling != "pooler" and has_pooler:
            encoder.pooler = None
        setattr(self, self.base_model_prefix, encoder)

    @property
    def dimensions(self) -> int:
        """Of an embedding."""
        if self.pooling == "pooler":
            return [module for module in self.base_model.pooler.modules() if isinstance(module, nn.Linear)][-1].out_features
        return hidden_size(self, family_of(self.config.model_type))

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> SentenceOutput:
        answer = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        states = answer.last_hidden_state
        if self.pooling == "pooler":
            pooled = answer.pooler_output
        elif self.pooling == "cls":
            pooled = states[:, 0]
        else:
            mask = torch.ones_like(states[..., :1]) if attention_mask is None else attention_mask[..., None].to(states.dtype)
            pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return SentenceOutput(
            last_hidden_state=states,
            pooler_output=getattr(answer, "pooler_output", None),
            hidden_states=answer.hidden_states,
            attentions=answer.attentions,
            sentence_embedding=pooled,
        )

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As of a stock model, but for weights that the pooling does not use: nobody misses these."""
        encoder, report = AutoModel.from_pretrained(path, *args, config=config, **{**kwargs, "output_loading_info": True})
        model = cls(config, encoder)
        if model.pooling != "pooler":
            report["missing_keys"] = {key for key in report["missing_keys"] if not key.startswith("pooler.")}
        return (model, report) if kwargs.get("output_loading_info") else model


class HpcCompressStockModel(PreTrainedModel):
    """A stock model with irregular layers; `forward` takes and returns what the stock model does.

    Each kind of model is one final subclass, which names the Auto class of its stock models.
    """

    auto_class: ClassVar[Any]  # of transformers: makes the stock model, and loads the exported one
    stock_class: ClassVar[Any] = None  # of stock models that the Auto class does not make
    config_class = HpcCompressConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: HpcCompressConfig) -> None:
        super().__init__(config)
        self.model = skeleton(config, self.stock_class or self.auto_class.from_config)
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load on the CPU, or on `device_map` when it names one device; weights keep the precision they were saved in.

        The generic loader would silently re-initialise layers of unusual shape, so this one is strict.
        """
        config, weights, device = _saved(path, WEIGHTS, config, kwargs)
        with no_init_weights():
            model = cls(config)
        load_weights(model, load_file(str(weights)), config.quantized, prefix="model.")
        return model.to(device).eval()


class HpcCompressForSequenceClassification(HpcCompressStockModel):
    """One label for each text, or pair of texts."""

    auto_class = AutoModelForSequenceClassification


class HpcCompressForTokenClassification(HpcCompressStockModel):
    """One label for each token."""

    auto_class = AutoModelForTokenClassification


class HpcCompressSentenceEncoder(HpcCompressStockModel):
    """A vector for each text: `sentence_embedding` of what `forward` returns."""

    auto_class = AutoModel
    stock_class = SentenceEncoder


class HpcCompressOnnxModel(PreTrainedModel):
    """A program for ONNX Runtime, on CPUs: it can't be trained, cut or quantized any more.

    Each kind of model is one final subclass, which says what its programs return. Threads are as many as torch has when the
    program is loaded.
    """

    auto_class: ClassVar[Any]  # as in HpcCompressStockModel
    stock_class: ClassVar[Any] = None  # the same
    answer: ClassVar[Any]  # what `forward` returns; the program's outputs are fields of it
    outputs: ClassVar[tuple[str, ...]]  # names of these fields, in the order of the program's outputs
    config_class = HpcCompressOnnxConfig
    device, dtype = torch.device("cpu"), torch.float32  # what it takes and returns; it has no parameters that could be asked

    def __init__(self, config: HpcCompressConfig, program: bytes) -> None:
        super().__init__(config)
        try:
            from onnxruntime import InferenceSession, SessionOptions
        except ImportError as error:
            raise ImportError("this model needs ONNX Runtime; pip install 'hpc-compress[onnx]', or onnxruntime") from error
        options = SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        # Threads that go on spinning after a run would take the cores from whoever comes next, such as a model timed in turns.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.program = program
        # The fused kernel is slower on CPUs than the addition and the norm alone: a whole MiniLM runs 13 % faster without it.
        slow = ["SkipLayerNormFusion"]
        self.session = InferenceSession(program, options, providers=["CPUExecutionProvider"], disabled_optimizers=slow)

    def __reduce__(self) -> Any:
        """A session can't be copied."""
        return type(self), (self.config, self.program)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        if not input_ids.is_cpu:
            raise RuntimeError(f"onnx_int8 runs on a CPU only, and the inputs are on {input_ids.device}; move them to the CPU")
        given = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids) if attention_mask is None else attention_mask,
            "token_type_ids": torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids,
        }
        feeds = {item.name: given[item.name].long().numpy() for item in self.session.get_inputs()}
        arrays = self.session.run(list(self.outputs), feeds)
        answer = self.answer(**{name: torch.from_numpy(array) for name, array in zip(self.outputs, arrays, strict=True)})
        return answer.to_tuple() if return_dict is False else answer

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        self.config.save_pretrained(save_directory, **kwargs)
        (Path(save_directory) / PROGRAM).write_bytes(self.program)

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        config, program, device = _saved(path, PROGRAM, config, kwargs)
        if torch.device(device).type != "cpu":
            raise ValueError(f"onnx_int8 runs on a CPU only, and device_map={device!r}; leave it out")
        return cls(config, program.read_bytes()).eval()


class HpcCompressOnnxForSequenceClassification(HpcCompressOnnxModel):
    """One label for each text, or pair of texts."""

    auto_class = AutoModelForSequenceClassification
    answer = SequenceClassifierOutput
    outputs = ("logits",)


class HpcCompressOnnxForTokenClassification(HpcCompressOnnxModel):
    """One label for each token."""

    auto_class = AutoModelForTokenClassification
    answer = TokenClassifierOutput
    outputs = ("logits",)


class HpcCompressOnnxSentenceEncoder(HpcCompressOnnxModel):
    """A vector for each text: `sentence_embedding` of what `forward` returns."""

    auto_class = AutoModel
    stock_class = SentenceEncoder
    answer = SentenceOutput
    outputs = ("last_hidden_state", "sentence_embedding")


def _saved(path: Any, name: str, config: Any, options: dict[str, Any]) -> tuple[Any, Path, Any]:
    """Config, file and device of a model in a folder or on the hub; options are those of `from_pretrained`."""
    hub = {key: options[key] for key in ("cache_dir", "revision", "token", "local_files_only") if key in options}
    if config is None:
        config = HpcCompressConfig.from_pretrained(path, **hub)
    if options.get("dtype", options.get("torch_dtype")) not in (None, "auto"):
        raise ValueError("the precision of a compressed model is part of it; load it without dtype")
    local, device = Path(path) / name, options.get("device_map")
    file = local if local.is_file() else Path(str(cached_file(path, name, **hub)))
    return config, file, "cpu" if device in (None, "auto") else device


def skeleton(config: HpcCompressConfig, stock: Callable[[PreTrainedConfig], PreTrainedModel]) -> PreTrainedModel:
    """A stock model whose layers have the config's shape; its weights are not set yet.

    stock: makes the whole model of a stock config.
    """
    family = family_of(config.stock["model_type"])
    model = unshared(stock(config.stock_config()))
    size = head_size(model, family)
    keep_layers(model, family, config.layers)
    for layer, heads, ffn in zip(layers_of(model, family), config.heads, config.ffn, strict=True):
        keep_heads(layer, family, slice(heads * size), size)
        keep_ffn(layer, family, slice(ffn))
    fit_shared_bias(model, family)
    if config.hidden not in (None, hidden_size(model, family)):
        keep_hidden(model, family, slice(config.hidden))
    set_thresholds(model, family, config.thresholds)
    if config.shared is not None:
        words = cast(nn.Embedding, model.get_input_embeddings())
        (path,) = (name for name, module in model.named_modules() if module is words)
        few = nn.Embedding(config.shared, words.embedding_dim)
        replace(model, path, SharedEmbedding(few, torch.zeros(words.num_embeddings, dtype=row_type(config.shared))))
    return model


def unshared(model: PreTrainedModel) -> PreTrainedModel:
    """The stock model, in place, with weights of its own in each layer. Surgery takes no other."""
    unshare = family_of(model.config.model_type).unshare
    if unshare is not None:
        unshare(model)
    return model


def layers_of(model: nn.Module, family: Family) -> nn.ModuleList:
    return cast(nn.ModuleList, model.get_submodule(f"{family.encoder}.{family.layers}"))


def linear_of(layer: nn.Module, path: str) -> nn.Linear:
    """A linear of an encoder layer; quantized ones are linears too."""
    return cast(nn.Linear, layer.get_submodule(path))


def into_attention(layer: nn.Module, family: Family) -> list[nn.Linear]:
    """All linears whose rows are heads."""
    present = dict(layer.named_modules())
    return [linear_of(layer, path) for path in (*family.attention_in, *family.positions) if path in present]


def replace(parent: nn.Module, path: str, module: nn.Module) -> None:
    above, _, leaf = path.rpartition(".")
    setattr(parent.get_submodule(above), leaf, module)


def head_size(model: PreTrainedModel, family: Family) -> int:
    """Features of one attention head. Cuts never change it, nor the stock config that it is read from."""
    return getattr(model.config, family.width) // getattr(model.config, family.head_count)


def hidden_size(model: nn.Module, family: Family) -> int:
    """Dimensions of the residual stream, as the first layer's FFN reads it, even one that lost all its neurons."""
    return linear_of(layers_of(model, family)[0], family.ffn_in).in_features


def origins(model: nn.Module, family: Family) -> list[int]:
    """Of each layer, its number in the uncompressed encoder."""
    return [getattr(layer, "origin", index) for index, layer in enumerate(layers_of(model, family))]


class ThresholdedActivation(nn.Module):
    """The activation of a gated FFN, but its values near 0 become 0 (Lee et al. 2024, CATS, arXiv 2404.08763, section 3.2)."""

    def __init__(self, activation: nn.Module, threshold: float) -> None:
        super().__init__()
        self.activation, self.threshold = activation, threshold

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        values = self.activation(inputs)
        return values.masked_fill(values.abs() < self.threshold, 0)


def set_thresholds(model: nn.Module, family: Family, values: Sequence[float]) -> None:
    """Set one threshold a layer, in place of earlier ones; with no values nothing changes."""
    for layer, value in zip(layers_of(model, family), values, strict=False):
        activation = layer.get_submodule(cast(str, family.gate))
        activation = activation.activation if isinstance(activation, ThresholdedActivation) else activation
        replace(layer, cast(str, family.gate), ThresholdedActivation(activation, value))


def thresholds(model: nn.Module, family: Family) -> list[float]:
    """Of each layer; empty when there is none."""
    gates = [layer.get_submodule(family.gate) for layer in layers_of(model, family)] if family.gate else []
    values = [gate.threshold if isinstance(gate, ThresholdedActivation) else 0.0 for gate in gates]
    return values if any(values) else []


class NoHeads(nn.Module):
    """Takes the place of an attention that lost all its heads: it computes nothing and passes nothing between tokens. The
    bias of its output linear stays, as for every linear without inputs."""

    def __init__(self, attention: nn.Module, out: str | None, norm: str | None) -> None:
        """out: the name of the output linear, where that is a part of the attention.

        norm: the name of a norm of the sum of the attention's input and output, where that is a part of it too.
        """
        super().__init__()
        self.out, self.norm = out, norm
        for name, child in attention.named_children():
            self.add_module(name, child)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        output = hidden_states.new_empty(*hidden_states.shape[:-1], 0)
        if self.out is not None:
            output = self.get_submodule(self.out)(output)
        if self.norm is not None:
            output = self.get_submodule(self.norm)(hidden_states + output)
        return output, None


# --- cuts ---

Kept = torch.Tensor | slice  # positions that stay; a slice copies nothing


def keep_layers(model: nn.Module, family: Family, kept: Sequence[int]) -> None:
    stack = layers_of(model, family)
    for layer, origin in zip(stack, origins(model, family), strict=True):
        cast(Any, layer).origin = origin
    for index in reversed(range(len(stack))):
        if index not in kept:
            del stack[index]


def keep_heads(layer: nn.Module, family: Family, features: Kept, head_size: int) -> None:
    """Keep only these features of a layer's attention, whole heads of them; with none left it is bypassed."""
    for linear in into_attention(layer, family):
        for name in ("weight", "bias"):
            take(linear, name, 0, features, family.attention_blocks)
    out = linear_of(layer, family.attention_out)
    take(out, "weight", 1, features)
    attention = layer.get_submodule(family.attention)
    if isinstance(attention, NoHeads):
        return
    heads = out.in_features // head_size
    for name, value in (("num_attention_heads", heads), ("n_heads", heads), ("all_head_size", out.in_features)):
        if hasattr(attention, name):
            setattr(attention, name, value)
    if heads == 0:
        inside = family.attention_out.startswith(f"{family.attention}.")
        own = family.attention_out.rpartition(".")[2] if inside else None
        replace(layer, family.attention, NoHeads(attention, own, family.inner_norm))
        if family.attention_norm is not None:
            replace(layer, family.attention_norm, nn.Identity())


def keep_ffn(layer: nn.Module, family: Family, neurons: Kept) -> None:
    """Keep only these neurons of a layer's FFN; with none left its output is a bias."""
    for name in ("weight", "bias"):
        take(linear_of(layer, family.ffn_in), name, 0, neurons, family.ffn_blocks)
    out = linear_of(layer, family.ffn_out)
    take(out, "weight", 1, neurons)
    if out.in_features == 0 and family.ffn_norm is not None:
        replace(layer, family.ffn_norm, nn.Identity())


def fit_shared_bias(model: PreTrainedModel, family: Family) -> None:
    """Cut a position bias that all layers share to as many columns as layers have heads; layers without heads don't count."""
    if family.shared_bias is not None:
        widest = max(linear_of(layer, family.attention_out).in_features for layer in layers_of(model, family))
        take(shared_bias(model, family), "weight", 1, slice(widest // head_size(model, family)))


def shared_bias(model: nn.Module, family: Family) -> nn.Module:
    return model.get_submodule(f"{family.encoder}.{family.shared_bias}")


def keep_hidden(model: PreTrainedModel, family: Family, features: Kept) -> None:
    """Keep only these dimensions of the residual stream, in every parameter that shares them.

    Raises: ValueError, before anything is cut, when a parameter is grouped in a way that does not allow it.
    """
    width, shared = hidden_size(model, family), hidden_dims(model, family)
    for path, dims in shared.items():
        shape = model.get_parameter(path).shape
        if any(shape[dim] != width for dim in dims):
            raise ValueError(f"the hidden size of this model can't be cut: {path} of shape {tuple(shape)} holds it in groups")
    for path, dims in shared.items():
        parent, _, name = path.rpartition(".")
        for dim in dims:
            take(model.get_submodule(parent), name, dim, features)


def hidden_dims(model: PreTrainedModel, family: Family) -> dict[str, list[int]]:
    """Paths of all parameters that share the dimensions of the residual stream -> along which of their dimensions.

    Found by looking what grows when the stock config is given twice the hidden size. What the task head makes of its input
    is no part of the stream, nor are the heads' own features.
    """
    small, large = _shapes(model, family, 1), _shapes(model, family, 2)
    # A head on single tokens has no pooler and no layers of its own: it reads the stream itself.
    reader = family.reader if family.reader in dict(model.named_modules()) else "classifier"
    stack, numbers = f"{family.encoder}.{family.layers}.", origins(model, family)
    rows = {f"{path}.{name}" for path in (*family.attention_in, *family.positions) for name in ("weight", "bias")}
    found = {}
    for path, _ in model.named_parameters():
        stock, inner = path, ""
        if path.startswith(stack):
            index, _, inner = path.removeprefix(stack).partition(".")
            stock = f"{stack}{numbers[int(index)]}.{inner}"
        grows = [dim for dim, (one, two) in enumerate(zip(small[stock], large[stock], strict=True)) if one != two]
        if inner in rows:
            grows = [dim for dim in grows if dim != 0]
        elif inner == f"{family.attention_out}.weight" or path == f"{reader}.weight":
            grows = [0] if inner else [1]
        elif path == f"{reader}.bias" or not path.startswith(f"{family.encoder}."):
            grows = []
        if grows:
            found[path] = grows
    return found


def _shapes(model: PreTrainedModel, family: Family, factor: int) -> dict[str, torch.Size]:
    """Of the parameters of an uncut stock model of this kind, with so many times its hidden size."""
    config = copy.deepcopy(model.config)
    width = getattr(config, family.width)
    for name in (family.width, *family.also_width):
        if getattr(config, name, None) == width:
            setattr(config, name, factor * width)
    with torch.device("meta"), no_init_weights():
        uncut = unshared(type(model)(config))
    return {path: parameter.shape for path, parameter in uncut.named_parameters()}


def take(module: nn.Module, name: str, dim: int, kept: Kept, blocks: int = 1) -> None:
    """Keep only these positions of a parameter along a dimension, the same in each block, and update the module's widths."""
    old = getattr(module, name)
    if old is None:  # a linear without bias
        return
    kept = kept.to(old.device) if isinstance(kept, torch.Tensor) else kept
    parts = old.detach().unflatten(dim, (blocks, old.shape[dim] // blocks))
    new = parts[(slice(None),) * (dim + 1) + (kept,)].flatten(dim, dim + 1)
    setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad and new.numel() > 0))
    shape = cast(torch.Tensor, module.weight).shape
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = shape[1]
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(shape)
    elif isinstance(module, nn.Conv1d):
        module.out_channels, module.in_channels = shape[:2]


# --- weights ---


def load_weights(model: nn.Module, tensors: dict[str, torch.Tensor], quantized: dict[str, str], prefix: str = "") -> None:
    """Assign saved tensors; the linears and embeddings named in `quantized` become what they were saved as, bit for bit."""
    for name, scheme in quantized.items():
        path = prefix + name
        own = {key.removeprefix(path + "."): tensors.pop(key) for key in list(tensors) if key.startswith(path + ".")}
        module = model.get_submodule(path)
        known = EMBEDDING_SCHEMES if isinstance(module, nn.Embedding) else tuple(RESTORE)
        if scheme not in known:
            raise ValueError(f"{name} is saved as {scheme!r}, which this version can't read; it reads {', '.join(known)}")
        if isinstance(module, nn.Embedding):
            restored = QuantizedEmbedding.restored(module, own, scheme)
        else:
            restored = RESTORE[scheme](module, own)
        replace(model, path, restored)
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    missing = [key for key in missing if not any(key.startswith(f"{prefix}{name}.") for name in quantized)]
    if missing or unexpected:
        raise ValueError(f"the saved weights do not fit the model: missing {missing[:3]}, unexpected {unexpected[:3]}")


def scheme_of(module: nn.Module) -> str | None:
    """The scheme of a layer that holds its weights in 8 or 4 bits; None for any other module."""
    if type(module).__name__ == "Linear4bit":  # bitsandbytes' own; by its name, since most models load without bitsandbytes
        return cast(Any, module).weight.quant_type
    return getattr(module, "scheme", None)


class Int8Linear(nn.Linear):
    """int8 weights with one scale a row. bitsandbytes multiplies, and rounds the inputs as they come.

    bitsandbytes' own layer holds the scales where a move of the whole model does not find them.
    """

    scheme = "int8"
    SCB: torch.Tensor

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        """weight: (out, in) int8. scale: (out,) float32, the largest absolute value of each row, for which 127 stands."""
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("SCB", scale)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        from bitsandbytes import MatmulLtState, matmul

        state = MatmulLtState(CB=self.weight.data, SCB=self.SCB)
        state.has_fp16_weights = state.is_training = False
        return matmul(inputs, self.weight, bias=None if self.bias is None else self.bias.to(inputs.dtype), state=state)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What `to`, `cuda` and `half` go through. The kernels read scales in fp32 only, so these keep their precision."""
        scale = self.SCB
        super()._apply(fn, recurse)
        self.SCB = scale.to(self.weight.device)
        return self

    @classmethod
    def restored(cls, linear: nn.Linear, tensors: dict[str, torch.Tensor]) -> nn.Module:
        return cls(tensors["weight"], tensors["SCB"], tensors.get("bias"))


def _restore_4bit(linear: nn.Linear, tensors: dict[str, torch.Tensor]) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    bias = tensors.pop("bias", None)
    weight = tensors.pop("weight")
    statistics = {key.removeprefix("weight."): value for key, value in tensors.items()}
    layer = Linear4bit(linear.in_features, linear.out_features, bias=False, device="meta")
    layer.weight = Params4bit.from_prequantized(weight, statistics, device="cpu", module=layer)
    layer.weight.module = None  # else layer and weight hold each other, and outlive the model until the next `gc.collect()`
    layer.compute_dtype = layer.weight.quant_state.dtype
    layer.compute_type_is_set = True
    # With this path on, a forward repacks the weights, and the next state_dict() is silently wrong.
    layer.support_avx512bf16_for_cpu = False
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    return layer


class DynamicInt8Linear(nn.Linear):
    """int8 weights with one scale a row, for CPUs: inputs are rounded as they come, and whole numbers are multiplied."""

    scheme = "dynamic_int8"

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        """weight: (out, in) int8. scale: (out,) float32; a weight is worth its number times its row's scale."""
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self._packed: Any = None  # what the kernel wants, in the layout of this machine

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not inputs.is_cpu:
            raise RuntimeError(f"dynamic_int8 runs on a CPU only, and the model is on {inputs.device}; move it to the CPU")
        if self._packed is None:
            scale = cast(torch.Tensor, self.scale).double()
            with warnings.catch_warnings():
                # torch warns that it will remove these tensors; the pinned version still has them.
                warnings.simplefilter("ignore", UserWarning)
                whole = torch._make_per_channel_quantized_tensor(self.weight.data, scale, scale.new_zeros(len(scale)).long(), 0)
            self._packed = torch.ops.quantized.linear_prepack(whole, self.bias)
        # Without VNNI sums of two products overflow 16 bits, unless the inputs have only 7 bits.
        return torch.ops.quantized.linear_dynamic(inputs, self._packed, reduce_range=not torch.cpu._is_vnni_supported())

    @classmethod
    def restored(cls, linear: nn.Linear, tensors: dict[str, torch.Tensor]) -> nn.Module:
        return cls(tensors["weight"], tensors["scale"], tensors.get("bias"))


EMBEDDING_BLOCK = 64  # features of a row that share a scale in 4 bits, as in bitsandbytes' linears; int8: the whole row


class SharedEmbedding(nn.Module):
    """A word embedding with fewer rows than tokens: each token has a row, and several tokens can have the same one."""

    rows: torch.Tensor

    def __init__(self, embedding: nn.Embedding, rows: torch.Tensor) -> None:
        """rows: (tokens,) whole numbers: the row of each token in `embedding`."""
        super().__init__()
        self.embedding = embedding
        self.register_buffer("rows", rows)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(self.rows[ids].long())


def row_type(rows: int) -> torch.dtype:
    """The smallest integer type that can number so many rows."""
    return torch.int16 if rows <= 2**15 else torch.int32


class QuantizedEmbedding(nn.Embedding):
    """A word embedding in int8, int4, nf4 or fp4. Only the rows that are looked up are decoded, on any device.

    (bitsandbytes has such layers too, which can't be saved.)
    """

    def __init__(
        self, scheme: str, features: int, weight: torch.Tensor, scale: torch.Tensor, levels: torch.Tensor | None = None
    ) -> None:
        """weight: (tokens, features) int8, or (tokens, features / 2 rounded up) uint8 with two codes in a byte: of nf4 and fp4
        the first of two neighbours in the high bits, of int4 the first half of the features there.

        scale: (tokens, blocks), the largest absolute value of each block. Its dtype is that of the output.
        levels: (16,) float32, what the codes of nf4 and fp4 stand for, as shares of the scale. Those of int4 are 16 even steps
        from -1 to 1, which a program computes several times faster than it looks levels up.
        """
        super().__init__(len(weight), features, device="meta")
        self.scheme = scheme
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.register_buffer("levels", levels)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows, scale = self.weight[ids], cast(torch.Tensor, self.scale)[ids]
        if self.scheme == "int8":
            return (rows * (scale.float() / 127)).to(scale.dtype)
        if self.scheme == "int4":
            bytes_ = rows.float()
            high = torch.floor(bytes_ / 16)
            values = torch.cat((high, bytes_ - 16 * high), -1) / 7.5 - 1
        else:
            codes = torch.stack((rows >> 4, rows & 15), -1).flatten(-2)
            values = cast(torch.Tensor, self.levels)[codes.long()]
        # As `repeat_interleave`, of which torch's exporter to ONNX infers a wrong shape.
        scales = scale[..., None].expand(*scale.shape, EMBEDDING_BLOCK).flatten(-2)
        return (values[..., : self.embedding_dim] * scales[..., : self.embedding_dim]).to(scale.dtype)

    @classmethod
    def restored(cls, embedding: nn.Embedding, tensors: dict[str, torch.Tensor], scheme: str) -> nn.Module:
        return cls(scheme, embedding.embedding_dim, tensors["weight"], tensors["scale"], tensors.get("levels"))


def _restore_sparse(linear: nn.Linear, tensors: dict[str, torch.Tensor]) -> nn.Linear:
    """The dense linear that was saved without its zeros: a bit for each weight, and the values that are not 0."""
    weight = tensors.get("weight")  # dense where `transformers` itself saved the model again
    if weight is None:
        values = tensors["weight_values"]
        bits = np.unpackbits(tensors["weight_bits"].numpy(), count=linear.out_features * linear.in_features)
        weight = values.new_zeros(len(bits))
        weight[torch.from_numpy(bits).bool()] = values
    linear.weight = nn.Parameter(weight.view(linear.out_features, linear.in_features))
    if "bias" in tensors:
        linear.bias = nn.Parameter(tensors["bias"])
    return linear


class TwoOfFourLinear(nn.Linear):
    """A linear with two zeros in each four weights of a row. On a GPU with sparse tensor cores it runs without the zeros, where
    the kernels know its precision and widths. Everywhere else it is a dense linear."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__(dense.in_features, dense.out_features, bias=False, device="meta")
        self.weight, self.bias = dense.weight, dense.bias

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What `to`, `cuda` and `half` go through. Only the dense weight can be moved or cast."""
        if isinstance(self.weight, torch.sparse.SparseSemiStructuredTensor):
            self.weight = nn.Parameter(self.weight.to_dense(), requires_grad=False)
        super()._apply(fn, recurse)
        if self._suits_the_kernels():
            self.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(self.weight.detach()), requires_grad=False)
        return self

    def _suits_the_kernels(self) -> bool:
        return (
            self.weight.is_cuda
            and torch.cuda.get_device_capability(self.weight.device) >= (8, 0)
            and torch.backends.cusparselt.is_available()
            and self.weight.dtype in (torch.float16, torch.bfloat16)
            and self.out_features % 32 == 0
            and self.in_features % 64 == 0
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """What is saved is the dense weight: the kernels' own form has no storage that safetensors could read."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if isinstance(self.weight, torch.sparse.SparseSemiStructuredTensor):
            destination[f"{prefix}weight"] = self.weight.to_dense()

    @classmethod
    def restored(cls, linear: nn.Linear, tensors: dict[str, torch.Tensor]) -> nn.Module:
        return cls(_restore_sparse(linear, tensors))


# By scheme: what a saved linear becomes, from the stock linear in whose place it goes, and its tensors by their names in it.
RESTORE: dict[str, Callable[[Any, dict[str, torch.Tensor]], nn.Module]] = {
    Int8Linear.scheme: Int8Linear.restored,
    "nf4": _restore_4bit,
    "fp4": _restore_4bit,
    DynamicInt8Linear.scheme: DynamicInt8Linear.restored,
    "sparse": _restore_sparse,
    "2:4": TwoOfFourLinear.restored,
}
