"""onnx_int8: programs for ONNX Runtime against the models that they were made from; saved, loaded, exported, refused."""

import copy
import dataclasses
import importlib.util
import logging
import pickle
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from elsewhere import outputs_elsewhere
from test_models import examples, load, logits, reload
from test_operators import inputs, odd
from test_quantization import quantized
from torch import nn

import hpc_compress
from hpc_compress import analysis, export, identity, worker
from hpc_compress.config import ConfigError
from hpc_compress.models import artifact, modeling_hpc_compress, surgery
from hpc_compress.models.modeling_hpc_compress import FAMILIES, PROGRAM, WEIGHTS, linear_of
from hpc_compress.operators import operator
from hpc_compress.types import Genome, Step

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from hpc_compress.operators import onnx_int8  # noqa: E402

ONNX = {"scheme": "onnx_int8"}


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path]) -> nn.Module:
    return sharp(load(tiny_checkpoint("bert", layers=3, heads=4, hidden=64, ffn=96)))


def sharp(model: nn.Module) -> nn.Module:
    """With weights so large that tokens really attend to one another, and a wrong mask or position shows in the logits."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8) if parameter.dim() > 1 else parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def batches(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """One token, one sentence, many of different lengths, the longest ones; with token types where there are two."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for count, length in ((1, 1), (1, 9), (5, 33), (3, 12), (2, model.config.max_position_embeddings - 4)):
        ids = torch.randint(5, 30, (count, length), generator=generator)
        mask = (torch.arange(length) < length - 2 * torch.arange(count)[:, None]).long()
        made.append({"input_ids": ids, "attention_mask": mask})
        if getattr(model.config, "type_vocab_size", 0) > 1:
            made[-1]["token_type_ids"] = (torch.arange(length) > length // 2).long().expand(count, -1).contiguous()
    return made


def says(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(**batch).logits for batch in batches]


def ran(program: Any, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """What ONNX Runtime alone makes of them."""
    session = ort.InferenceSession(program.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    return [torch.from_numpy(session.run(None, {name: batch[name].numpy() for name in names})[0]) for batch in batches]


# --- what is computed ---


@pytest.mark.parametrize("shape", ["whole", "odd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_says_what_the_model_says(family: str, shape: str, tiny_checkpoint: Callable[..., Path]):
    """odd: one head, odd widths, a layer without heads, one without neurons, and fewer dimensions of the stream."""
    model = sharp(load(tiny_checkpoint(family, layers=3, heads=4, hidden=64, ffn=96)))
    if shape == "odd":
        odd(model)
        surgery.prune_hidden(model, range(0, 21, 3))
    data = batches(model)
    expected = says(model, data)
    for found, wanted in zip(ran(onnx_int8.export(copy.deepcopy(model)), data), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

    # In int8: as near as the same rounding in torch is, within a factor for the rounding of sums.
    dynamic = says(quantized(copy.deepcopy(model), scheme="dynamic_int8", embeddings="int8"), data)
    rounded = says(quantized(model, **ONNX), data)
    error, other = (max(float((a - b).abs().max()) for a, b in zip(what, expected, strict=True)) for what in (rounded, dynamic))
    assert 0 < error < 3 * other + 0.02
