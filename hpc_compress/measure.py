"""Quality, latency and memory of a deployed model on the device at hand. Raw samples are kept; knows no search."""

import contextlib
import copy
import ctypes
import platform
import time
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import PreTrainedModel

from hpc_compress.data.batches import Batch, Encoded, eval_batches
from hpc_compress.models import surgery
from hpc_compress.types import Protocol, Record


def device(wanted: str = "any") -> torch.device:
    """The device that a protocol asks for; any: the job's own GPU, else the CPU.

    Raises: RuntimeError when a GPU is wanted and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("protocol.device=cuda, but torch sees no GPU; run where there is one, or set protocol.device=cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


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
def outputs(model: PreTrainedModel, examples: Encoded, batch_size: int, on: torch.device) -> np.ndarray:
    """Logits of every example, in the order of the examples: (n, classes) as float32.

    Raises: FloatingPointError when one is not finite: no metric of such outputs means anything.
    """
    model.eval()
    rows = np.empty((len(examples), int(model.config.num_labels)), dtype=np.float32)
    for batch in eval_batches(examples, batch_size):
        rows[batch.index.numpy()] = model(**batch.to(on).inputs).logits.float().cpu().numpy()
    if not np.isfinite(rows).all():
        raise FloatingPointError(
            "the model's outputs are not finite; train it with a lower learning rate or deploy it in bf16, not fp16"
        )
    return rows


@torch.inference_mode()
def latencies_ms(
    pairs: Sequence[tuple[PreTrainedModel, list[Batch]]], protocol: Protocol, on: torch.device
) -> list[tuple[float, ...]]:
    """Milliseconds of each timed pass of a model over its sample, which lies on the device already; a tuple for each pair.

    The models take turns, so that a machine that grows slower or warmer in the meantime treats them alike. Stops when every
    median is known within the protocol's tolerance, or at its limits.
    """
    keep_freed_memory()
    one_pass = _cuda_pass_ms if on.type == "cuda" else _cpu_pass_ms
    begin = time.monotonic()
    for _ in range(protocol.warmup_passes):
        for model, sample in pairs:
            one_pass(model.eval(), sample)
    passes: list[list[float]] = [[] for _ in pairs]
    for count in range(1, protocol.max_passes + 1):
        for (model, sample), timed in zip(pairs, passes, strict=True):
            timed.append(one_pass(model.eval(), sample))
        stable = all(relative_error_of_median(timed) <= protocol.tolerance for timed in passes)
        if (count >= protocol.min_passes and stable) or time.monotonic() - begin > protocol.max_seconds:
            break
    return [tuple(timed) for timed in passes]


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


def block_times(model: PreTrainedModel, sample: list[Batch], protocol: Protocol, on: torch.device) -> BlockTimes:
    """Time the model with attention of every number of heads alone, and with FFNs of 17 widths alone.

    A layer's time is the model's divided by the number of layers, so that the clock sees enough. (Latency tables: Kwon et al.
    2022, section 4.1; Kurtic et al. 2023, ZipLM, section 3.2.)
    """
    depth = len(surgery.layers(model))
    most, widest = min(surgery.head_counts(model)), min(surgery.ffn_widths(model))
    heads = tuple(range(most + 1))
    widths = tuple(sorted({round(widest * part / 16) for part in range(17)}))

    def cut(heads_left: int, width_left: int) -> PreTrainedModel:
        small = copy.deepcopy(model)
        surgery.prune_heads_everywhere(small, range(heads_left, most))
        for index, width in enumerate(surgery.ffn_widths(small)):
            surgery.prune_ffn(small, index, range(width_left, width))
        return small

    shapes = [*((count, 0) for count in heads), *((0, width) for width in widths[1:])]
    timed = latencies_ms([(cut(*shape), sample) for shape in shapes], protocol, on)
    ms = {shape: median(samples) for shape, samples in zip(shapes, timed, strict=True)}
    empty = ms[0, 0]

    def rising(times: list[float]) -> tuple[float, ...]:
        """Noise must not make a larger block look cheaper than a smaller one."""
        return tuple(np.maximum.accumulate([max(0.0, (time - empty) / depth) for time in times]).tolist())

    return BlockTimes(
        heads=heads,
        attention_ms=rising([ms[count, 0] for count in heads]),
        widths=widths,
        ffn_ms=rising([ms[0, width] for width in widths]),
    )


def relative_error_of_median(samples: list[float]) -> float:
    """Standard error of the median over the median, from the median absolute deviation.

    1.4826 MAD estimates sigma, and a median's standard error is 1.2533 sigma / sqrt(n) (both exact for normal samples). The
    median is used since a busy machine only ever adds time, and sometimes much of it.
    """
    middle = median(samples)
    deviation = median(abs(value - middle) for value in samples)
    return 1.4826 * 1.2533 * deviation / sqrt(len(samples)) / middle


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


def allocated_bytes(on: torch.device) -> int:
    """What the allocator has given out so far; 0 on a CPU."""
    return torch.cuda.memory_allocated(on) if on.type == "cuda" else 0


@torch.inference_mode()
def peak_bytes(model: PreTrainedModel, sample: list[Batch], on: torch.device, others: int = 0) -> int | None:
    """Allocator peak of one pass, the model's own weights included and `others`, in bytes, left out; None on a CPU."""
    if on.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(on)
    _cuda_pass_ms(model, sample)
    return torch.cuda.max_memory_allocated(on) - others


def timing_sample(examples: Encoded, protocol: Protocol, on: torch.device) -> list[Batch]:
    """The protocol's fixed sample, the first rows of the split, ready on the device."""
    return [batch.to(on) for batch in eval_batches(examples.take(protocol.sentences), protocol.batch_size)]
