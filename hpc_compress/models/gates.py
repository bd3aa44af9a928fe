"""A gate on every unit of a model: at 1 the unit works, at 0 the model equals one from which the unit was cut.

Criteria differentiate the loss by gates, learnt masks are gates, and tests compare cuts with gates at 0. (A cut of the hidden
size is the one exception: the LayerNorms then go over fewer features.)

    layers   encoder layers: the layer's output, interpolated with its input
    blocks   the attention and the FFN of each layer: their contribution, but for the output's bias
    heads    attention heads of each layer
    ffn      FFN neurons of each layer
    hidden   dimensions of the residual stream

Knows models; nothing of data, scores or cuts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from hpc_compress.models import surgery
from hpc_compress.models.modeling_hpc_compress import linear_of

Unit = Literal["layers", "blocks", "heads", "ffn", "hidden"]
# For each kind of unit one tensor a layer (layers and hidden: one for the model), with one number for each unit.
PerUnit = dict[str, list[torch.Tensor]]


def counts(model: PreTrainedModel, unit: str) -> list[int]:
    """How many units there are, layer by layer (layers and hidden: one number)."""
    depth = len(surgery.layers(model))
    return {
        "layers": lambda: [depth],
        "blocks": lambda: [2] * depth,
        "heads": lambda: surgery.head_counts(model),
        "ffn": lambda: surgery.ffn_widths(model),
        "hidden": lambda: [surgery.hidden_size(model)],
    }[unit]()


@contextmanager
def gated(model: PreTrainedModel, gates: Mapping[str, Sequence[torch.Tensor]]) -> Iterator[None]:
    """Within the block every unit is multiplied by its gate.

    gates: for each unit as in `counts`, tensors of (count,), or (batch, count) for gates of each example.
    """
    names, size = surgery.family(model), surgery.head_size(model)
    stack = list(surgery.layers(model))
    with ExitStack() as hooks:
        for index, layer in enumerate(stack):
            attention, ffn = linear_of(layer, names.attention_out), linear_of(layer, names.ffn_out)
            if "heads" in gates:
                hooks.callback(_scale_inputs(attention, gates["heads"][index], size).remove)
            if "ffn" in gates:
                hooks.callback(_scale_inputs(ffn, gates["ffn"][index], 1).remove)
            if "blocks" in gates:
                attention_gate, ffn_gate = gates["blocks"][index].split(1, dim=-1)
                hooks.callback(_scale_inputs(attention, attention_gate, attention.in_features).remove)
                hooks.callback(_scale_inputs(ffn, ffn_gate, ffn.in_features).remove)
            if "layers" in gates:
                hooks.callback(_interpolate(layer, gates["layers"][0][..., index : index + 1]).remove)
            if "hidden" in gates:
                hooks.callback(_scale_output(layer, gates["hidden"][0]).remove)
        if "hidden" in gates:
            hooks.callback(_scale_stream(stack[0], gates["hidden"][0]).remove)
        yield


def _broadcast(gate: torch.Tensor) -> torch.Tensor:
    """(count,) or (batch, count) as (1 or batch, 1, count)."""
    return gate.reshape(-1, 1, gate.shape[-1])


def _scale_inputs(linear: nn.Linear, gate: torch.Tensor, features: int) -> Any:
    """Multiply groups of neighbouring input features, each by its gate."""

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return args[0] if args[0].shape[-1] == 0 else args[0] * _broadcast(gate).repeat_interleave(features, -1)

    return linear.register_forward_pre_hook(hook)


def _interpolate(layer: nn.Module, gate: torch.Tensor) -> Any:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        before = _stream(args, kwargs)
        after = output[0] if isinstance(output, tuple) else output
        mixed = before + _broadcast(gate) * (after - before)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    return layer.register_forward_hook(hook, with_kwargs=True)


def _scale_output(layer: nn.Module, gate: torch.Tensor) -> Any:
    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] * _broadcast(gate), *output[1:])
        return output * _broadcast(gate)

    return layer.register_forward_hook(hook)


def _scale_stream(layer: nn.Module, gate: torch.Tensor) -> Any:
    """What enters the first layer: the embeddings."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        scaled = _stream(args, kwargs) * _broadcast(gate)
        return ((scaled, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": scaled})

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


def _stream(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states that a layer is given."""
    return args[0] if args else kwargs["hidden_states"]
