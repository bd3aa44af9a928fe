"""What the blocks of an encoder take on a device. Times models; knows no search.

A block's time is a difference of the times of whole models. These are copies of the base model with few layers: in all layers
the same number of heads and no FFN, or the same FFN and no heads. So what is timed runs as a candidate would: in its precision,
in its library, from its embeddings to its head. Two copies without blocks, one of a single layer and one of all, tell what a
bare layer takes.

References:
    Kwon et al. 2022, A Fast Post-Training Pruning Framework for Transformers, section 4.1
    Kurtic et al. 2023, ZipLM, section 3.2
"""

import copy
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from statistics import median_low

import numpy as np
import torch
from transformers import PreTrainedModel

from hpc_compress import identity, measure
from hpc_compress.context import Context
from hpc_compress.data.batches import Batch, Encoded, eval_batches
from hpc_compress.models import surgery
from hpc_compress.operators import operator
from hpc_compress.search.prediction import timed
from hpc_compress.types import BlockProfile, DeviceProfile, MeasurementProtocol, Profiling, Step

TOKENS = 2048  # rows of the word embedding that are left, so that copies are small; which rows are read has no effect on time
FEWEST_SWEEPS, GOOD_SWEEPS, MOST_SWEEPS = 2, 6, 12  # after the one that warms up
CLEAR_MS = 4.0  # a batch that takes less is timed several times in a row
Shape = tuple[int, int, int]  # layers; heads and FFN neurons of each of them
Key = tuple[int, Shape]  # number of a precision, and shape of a copy


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where the tables have points."""

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    heads: tuple[int, ...]
    widths: tuple[int, ...]
    depth: int  # layers of a copy with blocks
    layers: int  # of the base model

    @property
    def shapes(self) -> list[Shape]:
        bare = sorted({(1, 0, 0), (self.layers, 0, 0)})
        return [*bare, *((self.depth, n, 0) for n in self.heads[1:]), *((self.depth, 0, n) for n in self.widths[1:])]


def profile(study: Profiling, model: PreTrainedModel, protocol: MeasurementProtocol, context: Context) -> DeviceProfile:
    """Time the blocks of the model, which lies on the device, in fp32 and in every precision of the study."""
    measure.keep_freed_memory()
    begin, on = time.monotonic(), next(model.parameters()).device
    small = _with_few_tokens(model.eval())
    chains = _chains(study, protocol, on)
    grid = _grid(small, protocol, context.train, on, study.seconds / len(chains))
    small.cpu()
    batches = [_batch(rows, length, small, context.train).to(on) for rows in grid.rows for length in grid.lengths]
    models = {}
    for shape in grid.shapes:
        cut = _cut(small, shape)
        for number, chain in enumerate(chains):
            models[number, shape] = _deployed(cut, chain, context).to(on).eval()
    found = _in_turns(models, batches, on, begin + study.seconds)
    tables = (len(grid.rows), len(grid.lengths))
    return DeviceProfile(
        device=measure.device_name(on),
        device_type=on.type,  # type: ignore[arg-type]
        model_type=model.config.model_type,
        hidden=surgery.hidden_size(model),
        head_size=surgery.head_size(model),
        blocks=tuple(
            _blocks(chain, grid, {shape: np.array(found[number, shape]).reshape(tables) for shape in grid.shapes})
            for number, chain in enumerate(chains)
        ),
    )


def _in_turns(
    models: Mapping[Key, PreTrainedModel], batches: Sequence[Batch], on: torch.device, end: float
) -> dict[Key, list[float]]:
    """Milliseconds of each model for each batch.

    A sweep goes over all models, forwards and backwards in turn, so that a machine that grows slower tilts nothing. The first
    one warms up. Sweeps go on until the clock is at `end`.
    """
    passes: dict[Key, list[list[float]]] = {key: [] for key in models}
    times: dict[Key, list[int]] = {}  # in a row, of each batch
    for sweep in range(MOST_SWEEPS + 1):
        begin = time.monotonic()
        for key in list(models)[:: 1 if sweep % 2 else -1]:
            counts = times.get(key, [1] * len(batches))
            # Large batches first, as in a search; they bring the model's weights back into the caches.
            ordered = reversed([*zip(batches, counts, strict=True)])
            found = [measure.batch_ms(models[key], batch, on, count) for batch, count in ordered]
            found = found[::-1]  # in the order of the batches
            if sweep == 0:
                times[key] = [min(10, math.ceil(CLEAR_MS / ms)) for ms in found]
            else:
                passes[key].append(found)
        now = time.monotonic()
        if sweep >= FEWEST_SWEEPS and now + (now - begin) > end:
            break
    # The low one of two middle ones, since a busy machine only ever adds time.
    return {key: [median_low(samples) for samples in zip(*found, strict=True)] for key, found in passes.items()}


# --- what is timed ---


def _chains(study: Profiling, protocol: MeasurementProtocol, on: torch.device) -> list[tuple[Step, ...]]:
    """The precisions, each once: fp32 first, which ratios divide by."""
    best = measure.base_precision(protocol, on)
    wanted = [(), *([(Step(operator="quantize", params={"scheme": best}),)] if best else []), *map(timed, study.deploys)]
    return list({identity.canonical(list(chain)): chain for chain in wanted}.values())


def _grid(model: PreTrainedModel, protocol: MeasurementProtocol, train: Encoded, on: torch.device, seconds: float) -> Grid:
    """seconds: for each precision."""
    layers, heads, width = len(surgery.layers(model)), max(surgery.head_counts(model)), max(surgery.ffn_widths(model))
    rows = tuple(sorted({1, math.ceil(protocol.batch_size / 4), protocol.batch_size}))
    lengths = _lengths(train)
    batch = _batch(rows[-1], lengths[-1], model, train).to(on)
    layer_ms = [measure.batch_ms(model.to(on), batch, on) for _ in range(2)][-1] / layers
    # All copies of one precision together have about 2.6 times the attention and the FFN of a whole model of their depth.
    share = sum(length / lengths[-1] for length in lengths) * sum(count / rows[-1] for count in rows)
    affordable = int(0.6 * seconds * 1e3 / (2.6 * share * layer_ms * (GOOD_SWEEPS + 1)))
    return Grid(
        rows=rows,
        lengths=lengths,
        heads=_points(heads, 1),
        widths=_points(width, 64 if width >= 512 else 1),
        depth=min(layers, max(2, affordable)),
        layers=layers,
    )


def _lengths(train: Encoded) -> tuple[int, ...]:
    """Up to 6, each at most about twice the one before, from a short batch to the longest one."""
    shortest, longest = max(1, int(np.quantile(train.lengths, 0.1))), max(2, int(train.lengths.max()))
    shortest = min(shortest, longest // 2)
    count = min(6, math.ceil(math.log2(longest / shortest)) + 1)
    return tuple(sorted({round(length) for length in np.geomspace(shortest, longest, count)}))


def _points(most: int, multiple: int) -> tuple[int, ...]:
    """0, the fewest units, quarters, all: kernels take whole multiples best."""
    near = {max(1, round(most * part / multiple)) * multiple for part in (1 / 16, 1 / 4, 1 / 2, 3 / 4)}
    return (0, *sorted({count for count in near if count < most} | {most}))


def _batch(rows: int, length: int, model: PreTrainedModel, like: Encoded) -> Batch:
    """One row is shorter than the others, as almost always in a real batch."""
    return next(iter(eval_batches(_texts([length] * (rows - 1) + [max(1, length - (rows > 1))], model, like), rows)))


def _texts(lengths: Sequence[int], model: PreTrainedModel, like: Encoded) -> Encoded:
    """Random tokens that the model knows."""
    tokens = model.get_input_embeddings().weight.shape[0]
    ids = np.random.default_rng(0).integers(0, tokens, sum(lengths))
    ids[ids == like.pad_id] = (like.pad_id + 1) % tokens  # RoBERTa counts the positions of what is no padding
    return Encoded(
        input_ids=ids.astype(np.int32),
        token_type_ids=None if like.token_type_ids is None else np.zeros(len(ids), dtype=np.int8),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=np.zeros(len(lengths), dtype=like.labels.dtype),
        pad_id=like.pad_id,
    )


def _with_few_tokens(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose word embedding is small."""
    words = model.get_input_embeddings().weight
    copied = copy.deepcopy(model, {id(words): words})
    least = (getattr(copied.get_input_embeddings(), "padding_idx", None) or 0) + 1
    surgery.trim_vocabulary(copied, range(min(len(words), max(TOKENS, least))))
    return copied


def _cut(model: PreTrainedModel, shape: Shape) -> PreTrainedModel:
    depth, heads, width = shape
    cut = copy.deepcopy(model)
    surgery.drop_layers(cut, range(depth, len(surgery.layers(cut))))
    surgery.prune_heads_everywhere(cut, range(heads, max(surgery.head_counts(cut))))
    for layer, before in enumerate(surgery.ffn_widths(cut)):
        surgery.prune_ffn(cut, layer, range(width, before))
    return cut


def _deployed(cut: PreTrainedModel, chain: Sequence[Step], context: Context) -> PreTrainedModel:
    model = copy.deepcopy(cut)
    # A step that calibrates gets a few sentences, since what it learns from them has no effect on time.
    few = dataclasses.replace(context, train=_texts([8] * 8, cut, context.train))
    for step in chain:
        model = operator(step)(model, few)
    return model


# --- from times of models to times of blocks ---


def _blocks(deploy: tuple[Step, ...], grid: Grid, ms: dict[Shape, np.ndarray]) -> BlockProfile:
    """ms: (rows, lengths) of a batch, by the shape of the model."""
    one, all_layers = ms[1, 0, 0], ms[grid.layers, 0, 0]
    layer = np.maximum(0.0, (all_layers - one) / max(1, grid.layers - 1))
    fixed = np.maximum(0.0, one - layer)
    bare = fixed + grid.depth * layer

    def blocks(times: list[np.ndarray]) -> np.ndarray:
        """(rows, lengths, units) of one layer."""
        added = np.stack([np.zeros_like(bare), *(np.maximum(0.0, (each - bare) / grid.depth) for each in times)], -1)
        return _rising(added).round(6)

    return BlockProfile(
        deploy=deploy,
        rows=grid.rows,
        lengths=grid.lengths,
        heads=grid.heads,
        widths=grid.widths,
        fixed_ms=fixed.round(6).tolist(),
        layer_ms=layer.round(6).tolist(),
        attention_ms=blocks([ms[grid.depth, count, 0] for count in grid.heads[1:]]).tolist(),
        ffn_ms=blocks([ms[grid.depth, 0, width] for width in grid.widths[1:]]).tolist(),
    )


def _rising(times: np.ndarray) -> np.ndarray:
    """Noise must not make a larger block look cheaper. Halfway between the next rising tables above and below."""
    above = np.maximum.accumulate(times, -1)
    below = np.minimum.accumulate(times[..., ::-1], -1)[..., ::-1]
    return (above + below) / 2
