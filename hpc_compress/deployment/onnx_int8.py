"""A model as a program for ONNX Runtime with int8 weights. Knows the exporter and its names; nothing of running it.

onnx and onnxruntime come with the extra `onnx`, and are imported when a model is converted.
"""

import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hpc_compress.models import artifact, surgery
from hpc_compress.models.modeling_hpc_compress import PROGRAM, HpcCompressOnnxModel

LARGEST = 2**31 - 2**24  # bytes of one protobuf message, and room for the graph


def convert(
    model: PreTrainedModel, linears: dict[str, str], embedding: Callable[[torch.Tensor], nn.Embedding]
) -> HpcCompressOnnxModel:
    """The linears in int8, one scale an output, their inputs rounded as they come; the word embedding as `embedding` makes it
    of its weight; the rest, and with it the task head, in fp32. `model` can't be used afterwards.

    linears: the scheme of each, as it is to stand in the config, by its dotted path in the model.

    Raises: ValueError for weights that are not fp32, or that don't fit into one file.
    """
    if odd := {str(parameter.dtype) for parameter in model.parameters()} - {"torch.float32"}:
        raise ValueError(f"onnx_int8 reads fp32 only, and some weights are {', '.join(sorted(odd))}; quantize once only")
    kind = artifact.kind_of(model, artifact.PROGRAMS)
    counts = [surgery.all_parameters(model), surgery.encoder_parameters(model)]
    config = artifact.describe(model, kind, linears, counts)
    surgery.replace_word_embedding(model.cpu(), embedding)
    return kind(config, _rounded(export(model, kind.outputs), set(linears))).eval()


def program(model: PreTrainedModel) -> HpcCompressOnnxModel:
    """All of an fp32 model in fp32. `model` can't be used afterwards.

    Raises: ValueError for a model that does not fit into one file.
    """
    kind = artifact.kind_of(model, artifact.PROGRAMS)
    config = artifact.describe(model, kind, {}, [surgery.all_parameters(model), surgery.encoder_parameters(model)])
    return kind(config, export(model.cpu(), kind.outputs).SerializeToString()).eval()


def export(model: PreTrainedModel, outputs: Sequence[str]) -> Any:
    """The model as an `onnx.ModelProto` for batches and sequences of any length.

    outputs: fields of what the model returns.

    Raises: ValueError when it is larger than such a message can be.
    """
    import onnx

    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size > LARGEST:
        raise ValueError(f"the model has {size / 1e9:.1f} GB before it is quantized, and ONNX takes 2; choose dynamic_int8")
    model.set_attn_implementation("eager")  # the same numbers by a simpler graph, which runs faster
    # Only the shapes of this example could matter: neither axis is 1, and some positions are padding.
    ids = torch.arange(16).view(2, 8) % model.config.vocab_size
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(8) < torch.tensor([[8], [5]])).long()}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    axes = {0: "batch", 1: "sequence"}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        answer = model.eval()(**inputs)
        # torch recommends its new exporter, which needs onnxscript too; the version that is pinned has both. And it warns of
        # every branch in the code that it traces.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Positional(model, list(inputs), outputs).eval(),
            tuple(inputs.values()),
            f"{folder}/{PROGRAM}",
            dynamo=False,
            input_names=list(inputs),
            output_names=list(outputs),
            # Of one vector for each token, the answer has three dimensions.
            dynamic_axes=dict.fromkeys(inputs, axes)
            | {name: axes if answer[name].ndim == 3 else {0: "batch"} for name in outputs},
        )
        return onnx.load(f"{folder}/{PROGRAM}")


class _Positional(nn.Module):
    """A model that takes its inputs in order, and returns some fields of its answer in order, as the exporter wants it."""

    def __init__(self, model: nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        answer = self.model(**dict(zip(self.inputs, inputs, strict=True)))
        return tuple(answer[name] for name in self.outputs)


def _rounded(program: Any, linears: set[str]) -> bytes:
    """The program with these linears, named by their dotted paths in the model, in int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    products = {}
    for node in program.graph.node:
        # /model/bert/encoder/layer.0/output/dense/MatMul; where a linear runs twice (DeBERTa), dense_1
        if match := re.fullmatch(r"\.model\.(.+?)(_\d+)?\.MatMul", node.name.replace("/", ".")):
            products[node.name] = match[1]
    products = {node: path for node, path in products.items() if path in linears}
    assert set(products.values()) == linears, linears - set(products.values())
    if not products:  # the quantizer would take an empty list for all that there is
        return program.SerializeToString()
    add_pre_process_metadata(program)  # else it warns, on the root logger, that the session will do the optimising
    with tempfile.TemporaryDirectory() as folder, _without_small_talk():
        path = Path(folder) / PROGRAM
        quantize_dynamic(
            program,
            path,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=list(products),
            per_channel=True,
            weight_type=QuantType.QInt8,
            # Without VNNI sums of two products overflow 16 bits, unless the weights have only 7 bits.
            reduce_range=not torch.cpu._is_vnni_supported(),
        )
        return path.read_bytes()


@contextmanager
def _without_small_talk() -> Iterator[None]:
    """ONNX Runtime reports to the root logger each tensor for which it finds no range. None is needed here."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)
