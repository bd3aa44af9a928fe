"""Quality, latency and memory of a deployed model on the device at hand. Raw samples are kept; knows no search."""

import contextlib
import copy
import ctypes
import gc
import platform
import time
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from hpc_compress.data.batches import Batch, Encoded, eval_batches
from hpc_compress.models import surgery
from hpc_compress.problems import Problem
from hpc_compress.types import MeasurementProtocol, Record

TABLE_SECONDS = 45.0  # that a table of block times takes, about; but for models whose two sweeps over one batch take longer


def device(wanted: str = "any") -> torch.device:
    """The device that a protocol asks for; any: the job's own GPU, else the CPU.

    Raises: RuntimeError when a GPU is wanted and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"protocol.device=cuda, but torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU; run where "
            "nvidia-smi shows one with a driver for this CUDA, or set protocol.device=cpu"
        )
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def base_precision(protocol: MeasurementProtocol, on: torch.device) -> Literal["fp16", "bf16"] | None:
    """In which the base model is timed besides fp32; None: in no other."""
    if protocol.base_precision == "fp32":
        return None
    if protocol.base_precision != "best":
        return protocol.base_precision
    # A V100 only emulates bf16.
    emulated = on.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return "fp16" if emulated else "bf16"


def device_name(on: torch.device) -> str:
    if on.type == "cuda":
        return torch.cuda.get_device_name(on)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@torch.inference_mode()
def outputs(problem: Problem, model: PreTrainedModel, examples: Encoded, batch_size: int, on: torch.device) -> np.ndarray:
    """The problem's outputs for every label, in the order of the examples: (n_labels, width) as float32.

    Raises: FloatingPointError when one is not finite: no metric of such outputs means anything.
    """
    model.eval()
    found = [
        (batch.label_index.numpy(), problem.outputs(model(**batch.to(on).inputs), batch).float().cpu().numpy())
        for batch in eval_batches(examples, batch_size)
    ]
    places, values = (np.concatenate(each) for each in zip(*found, strict=True))
    rows = np.empty_like(values)
    rows[places] = values
    if not np.isfinite(rows).all():
        raise FloatingPointError(
            "the model's outputs are not finite; train it with a lower learning rate or deploy it in bf16, not fp16"
        )
    return rows


@torch.inference_mode()
def latencies_ms(
    pairs: Sequence[tuple[PreTrainedModel, list[Batch]]], protocol: MeasurementProtocol, on: torch.device
) -> list[tuple[float, ...]]:
    """Milliseconds of each timed pass of a model over its sample, which lies on the device already; a tuple for each pair.

    The models take turns, so that a machine that grows slower or warmer in the meantime treats them alike. So what the search
    judges by is known better than either time: the ratio of a model's pass to the first model's pass in the same turn. Timing
    stops when the median of every such ratio is known within the protocol's tolerance (for one model alone, the median of its
    times), or at the protocol's limits.
    """
    keep_freed_memory()
    begin = time.monotonic()
    for _ in range(protocol.warmup_passes):
        for model, sample in pairs:
            _pass_ms(model.eval(), sample, on)
    passes: list[list[float]] = [[] for _ in pairs]
    for count in range(1, protocol.max_passes + 1):
        for (model, sample), timed in zip(pairs, passes, strict=True):
            timed.append(_pass_ms(model.eval(), sample, on))
        known = [ratios(timed, passes[0]) for timed in passes[1:]] or passes
        stable = all(confidence(samples) <= protocol.tolerance for samples in known)
        if (count >= protocol.min_passes and stable) or time.monotonic() - begin > protocol.max_seconds:
            break
    return [tuple(timed) for timed in passes]


def ratios(times_ms: Sequence[float], first_ms: Sequence[float]) -> list[float]:
    """Of two models' passes in the same turns."""
    return [own / first for own, first in zip(times_ms, first_ms, strict=True)]


def keep_freed_memory() -> None:
    """Keeps what this process frees for its next allocation (malloc.h of glibc; other systems are left as they are).

    Else large intermediate results come on new pages in each pass, whose faults take up to a third of the time of int8 on a
    CPU, never the same twice, and of a training about 8 %.
    """
    trim_threshold, mmap_threshold = -1, -3
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 32 * 2**20)  # the most that glibc takes
        mallopt(trim_threshold, 2**31 - 1)


class BlockTimes(Record):
    """What the blocks of one layer take on one kind of device, over the protocol's sample; nothing left of a block takes 0."""

    heads: tuple[int, ...]  # rising, from 0
    attention_ms: tuple[float, ...]  # of the attention with so many heads
    widths: tuple[int, ...]  # rising, from 0
    ffn_ms: tuple[float, ...]  # of the FFN with so many neurons


@torch.inference_mode()
def block_times(model: PreTrainedModel, sample: list[Batch], protocol: MeasurementProtocol, on: torch.device) -> BlockTimes:
    """Time the model with attention of every number of heads alone, and with FFNs of 17 widths alone.

    A layer's time is the model's divided by the number of layers, so that the clock sees enough. (Latency tables: Kwon et al.
    2022, section 4.1; Kurtic et al. 2023, ZipLM, section 3.2.)

    The cut models are made and timed one at a time, and share the embeddings, so that they need little memory. They are gone
    through forwards and backwards in turn, so that a machine that grows slower tilts nothing. Batches are left out of the
    sample, evenly over the lengths, until all this takes about `TABLE_SECONDS`.
    """
    keep_freed_memory()
    begin = time.monotonic()
    most, widest = min(surgery.head_counts(model)), min(surgery.ffn_widths(model))
    heads = tuple(range(most + 1))
    widths = tuple(sorted({round(widest * part / 16) for part in range(17)}))
    shapes = [*((count, 0) for count in heads), *((0, width) for width in widths[1:])]

    middle = [sample[len(sample) // 2]]
    batch_ms = [_pass_ms(model.eval(), middle, on) for _ in range(2)][-1]
    # A cut model takes about half of the whole one's time. Each is timed twice, each time after a pass that warms it up.
    affordable = int(TABLE_SECONDS * 1e3 / (4 * 0.5 * batch_ms * len(shapes)))
    count = min(len(sample), max(1, affordable))
    part = [sample[int((index + 0.5) * len(sample) / count)] for index in range(count)]

    passes: dict[tuple[int, int], list[float]] = {shape: [] for shape in shapes}
    for sweep in range(max(2, protocol.max_passes)):
        for shape in shapes if sweep % 2 == 0 else reversed(shapes):
            cut = _with_blocks(model, *shape).eval()
            _pass_ms(cut, part, on)
            passes[shape].append(_pass_ms(cut, part, on))
            del cut  # before the next one is made
        spent = time.monotonic() - begin
        if sweep >= 1 and sweep % 2 and spent * (sweep + 3) / (sweep + 1) > TABLE_SECONDS:
            break

    tokens, timed_tokens = (sum(batch.inputs["input_ids"].numel() for batch in batches) for batches in (sample, part))
    ms = {shape: median(samples) * tokens / timed_tokens for shape, samples in passes.items()}
    depth, empty = len(surgery.layers(model)), ms[0, 0]

    def rising(times: list[float]) -> tuple[float, ...]:
        """Noise must not make a larger block look cheaper than a smaller one."""
        return tuple(np.maximum.accumulate([max(0.0, (time - empty) / depth) for time in times]).tolist())

    return BlockTimes(
        heads=heads,
        attention_ms=rising([ms[count, 0] for count in heads]),
        widths=widths,
        ffn_ms=rising([ms[0, width] for width in widths]),
    )


def _with_blocks(model: PreTrainedModel, heads: int, width: int) -> PreTrainedModel:
    """A copy with so many heads and neurons in every layer. It shares the word embedding with the model."""
    words = model.get_input_embeddings().weight
    small = copy.deepcopy(model, {id(words): words})
    surgery.prune_heads_everywhere(small, range(heads, min(surgery.head_counts(small))))
    for index, before in enumerate(surgery.ffn_widths(small)):
        surgery.prune_ffn(small, index, range(width, before))
    return small


def confidence(samples: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of a median, over the median, from the median absolute deviation.

    1.4826 MAD estimates sigma, a median's standard error is 1.2533 sigma / sqrt(n), and 1.96 of these are 95 % (all three exact
    for many normal samples). The median is used since a busy machine only ever adds time, and sometimes much of it.
    """
    middle = median(samples)
    deviation = median(abs(value - middle) for value in samples)
    return 1.96 * 1.4826 * 1.2533 * deviation / sqrt(len(samples)) / middle


@torch.inference_mode()
def batch_ms(model: PreTrainedModel, batch: Batch, on: torch.device, times: int = 1) -> float:
    """Milliseconds of one batch, which lies on the device already: the mean over so many in a row."""
    return _pass_ms(model, [batch] * times, on) / times


def _pass_ms(model: PreTrainedModel, sample: list[Batch], on: torch.device) -> float:
    return (_cuda_pass_ms if on.type == "cuda" else _cpu_pass_ms)(model, sample)


def _cpu_pass_ms(model: PreTrainedModel, sample: list[Batch]) -> float:
    begin = time.perf_counter()
    for batch in sample:
        model(**batch.inputs)
    return (time.perf_counter() - begin) * 1e3


def _cuda_pass_ms(model: PreTrainedModel, sample: list[Batch]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for batch in sample:
        model(**batch.inputs)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


@torch.inference_mode()
def enqueue_share(model: PreTrainedModel, sample: list[Batch], on: torch.device) -> float | None:
    """What part of the time of a batch goes by until the CPU has sent all of its work to the GPU; None on a CPU.

    Near 1 the GPU waits for the CPU: the pass is bound by the start of kernels, and smaller matrices hardly make it faster.

    The GPU is idle when a batch begins. Else the CPU's time would include waiting for the batch before: a forward looks at
    its attention mask on the GPU, and CUDA's queue of kernels is bounded.
    """
    if on.type != "cuda":
        return None
    model.eval()
    sent = spent = 0.0
    for batch in sample:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model(**batch.inputs)
        sent += time.perf_counter() - begin
        torch.cuda.synchronize()
        spent += time.perf_counter() - begin
    return sent / spent


def allocated_bytes(on: torch.device) -> int:
    """What the allocator has given to tensors that live; 0 on a CPU."""
    if on.type != "cuda":
        return 0
    gc.collect()  # tensors in reference cycles live until then
    return torch.cuda.memory_allocated(on)


def joules(on: torch.device) -> float | None:
    """The energy that a GPU has taken since its driver was loaded, for all its processes; None where nothing tells it: on a
    CPU, without nvidia-ml-py, on GPUs older than Volta, and on a part of a GPU (MIG)."""
    if on.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, or there is no driver for it
        return None
    try:
        gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(on).uuid}")
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)) / 1000
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


@torch.inference_mode()
def peak_bytes(model: PreTrainedModel, sample: list[Batch], on: torch.device, own_bytes: int) -> int | None:
    """Bytes that the model needs on the device: its own, and what one pass over the sample takes at most; None on a CPU.

    own_bytes: what the allocator gave out when the model was loaded. Whatever else lies on the device does not count.
    """
    if on.type != "cuda":
        return None
    _cuda_pass_ms(model.eval(), sample)  # the first matrix product of a process takes a workspace, which stays
    before = allocated_bytes(on)
    torch.cuda.reset_peak_memory_stats(on)
    _cuda_pass_ms(model, sample)
    return own_bytes + torch.cuda.max_memory_allocated(on) - before


def timing_sample(examples: Encoded, protocol: MeasurementProtocol, on: torch.device) -> list[Batch]:
    """The protocol's fixed sample, the first rows of the split, ready on the device."""
    return [batch.to(on) for batch in eval_batches(examples.take(protocol.sentences), protocol.batch_size)]
