"""Timing, against a clock that only models move: what is timed, in which order, and when it stops."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from searches import Setup
from test_families import build
from torch import nn

from hpc_compress import analysis, identity, measure, worker
from hpc_compress.data.batches import Encoded
from hpc_compress.models import surgery
from hpc_compress.store import Store
from hpc_compress.types import Genome, MeasurementProtocol, Step

CPU = torch.device("cpu")


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def perf_counter(self) -> float:
        return self.seconds

    monotonic = perf_counter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    return clock


class Timed(nn.Module):
    """A model whose passes take the given milliseconds, one after another; the last one for ever."""

    def __init__(self, clock: Clock, milliseconds: Iterator[float], calls: list[str] | None = None, name: str = "") -> None:
        super().__init__()
        self.clock, self.milliseconds, self.calls, self.name = clock, milliseconds, calls, name

    def forward(self, **inputs: torch.Tensor) -> None:
        if self.calls is not None:
            self.calls.append(self.name)
        self.clock.seconds += next(self.milliseconds) / 1e3


def always(milliseconds: float) -> Iterator[float]:
    while True:
        yield milliseconds


def noisy(milliseconds: float, share: float, seed: int) -> Iterator[float]:
    generator = np.random.default_rng(seed)
    while True:
        yield milliseconds * (1 + share * generator.standard_normal())


def sample(batches: int = 1, length: int = 4) -> list[Any]:
    count = 8 * batches
    examples = Encoded(np.ones(length * count, np.int32), None, np.arange(count + 1) * length, np.zeros(count, np.int64), 0)
    return measure.timing_sample(examples, MeasurementProtocol(batch_size=8, sentences=count), CPU)


def latencies(*models: nn.Module, **protocol: Any) -> list[tuple[float, ...]]:
    return measure.latencies_ms([(model, sample()) for model in models], MeasurementProtocol(**protocol), CPU)  # type: ignore[misc]


def test_each_model_gets_its_own_times(clock: Clock):
    slow, fast = latencies(Timed(clock, always(8)), Timed(clock, always(2)))
    assert set(np.round(slow, 6)) == {8}
    assert set(np.round(fast, 6)) == {2}


def test_a_pass_is_the_whole_sample(clock: Clock):
    model = Timed(clock, always(3))
    (timed,) = measure.latencies_ms([(model, sample(batches=4))], MeasurementProtocol(), CPU)  # type: ignore[list-item]
    assert set(np.round(timed, 6)) == {12}


def test_models_take_turns(clock: Clock):
    calls: list[str] = []
    latencies(Timed(clock, always(8), calls, "a"), Timed(clock, always(2), calls, "b"), warmup_passes=1, min_passes=3)
    assert calls == ["a", "b"] * 4


def test_passes_that_warm_up_do_not_count(clock: Clock):
    def cold() -> Iterator[float]:
        yield from (500, 500)
        yield from always(5)

    (timed,) = latencies(Timed(clock, cold()), warmup_passes=2)
    assert max(timed) == pytest.approx(5)


def test_steady_models_are_timed_no_more_than_they_must_be(clock: Clock):
    assert [len(timed) for timed in latencies(Timed(clock, always(5)), Timed(clock, always(7)), min_passes=6)] == [6, 6]


def test_noise_is_timed_until_the_ratio_is_known(clock: Clock):
    one, other = latencies(
        Timed(clock, noisy(5, 0.03, 0)), Timed(clock, noisy(7, 0.03, 1)), max_passes=1000, max_seconds=1e9, tolerance=0.01
    )
    assert 30 < len(one) == len(other) < 300
    assert np.median(one) / np.median(other) == pytest.approx(5 / 7, rel=0.02)
    assert measure.confidence(measure.ratios(other, one)) <= 0.01 < measure.confidence(measure.ratios(other[:10], one[:10]))


def test_noise_that_never_ends_is_timed_to_the_limit(clock: Clock):
    assert len(latencies(Timed(clock, noisy(5, 0.3, 0)), max_passes=20)[0]) == 20


def test_a_machine_that_slows_down_for_all_models_alike_does_not_prolong_the_timing(clock: Clock):
    """Each turn takes 5 % longer than the last one; the ratio stays."""

    def slower(milliseconds: float) -> Iterator[float]:
        while True:
            yield milliseconds
            milliseconds *= 1.05

    one, other = latencies(Timed(clock, slower(4)), Timed(clock, slower(2)), warmup_passes=0, min_passes=5)
    assert len(one) == 5
    assert measure.ratios(other, one) == pytest.approx([0.5] * 5)


def test_the_time_limit_holds(clock: Clock):
    assert len(latencies(Timed(clock, noisy(1000, 0.5, 0)), max_seconds=10, warmup_passes=0)[0]) in range(6, 17)


def test_confidence_against_many_medians():
    """Of samples of a normal distribution about 95 % of the medians lie within the interval."""
    generator = np.random.default_rng(0)
    draws = 1 + 0.02 * generator.standard_normal((2000, 41))
    within = [abs(np.median(row) - 1) <= measure.confidence(row.tolist()) * np.median(row) for row in draws]
    assert np.mean(within) == pytest.approx(0.95, abs=0.03)
    assert measure.confidence([2.0] * 5) == 0


def test_how_much_of_a_pass_goes_by_until_the_gpu_has_its_work(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    """For a GPU that takes 9 s for a batch whose kernels the CPU sends in 1 s. Each batch waits for the one before it."""
    done_at = clock.seconds

    def wait(device: Any = None) -> None:
        clock.seconds = max(clock.seconds, done_at)

    class Sent(Timed):
        def forward(self, **inputs: torch.Tensor) -> None:
            nonlocal done_at
            wait()
            super().forward(**inputs)
            done_at = clock.seconds + 8

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    for batches in (1, 8):
        share = measure.enqueue_share(Sent(clock, always(1000)), sample(batches), torch.device("cuda"))  # type: ignore[arg-type]
        assert share == pytest.approx(1 / 9)
    assert measure.enqueue_share(Timed(clock, always(1000)), sample(), CPU) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("real_bf16", [True, False])
def test_the_best_precision_of_a_gpu_that_only_emulates_bf16_is_fp16(real_bf16: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or real_bf16)
    best = measure.base_precision(MeasurementProtocol(base_precision="best"), torch.device("cuda"))
    assert best == ("bf16" if real_bf16 else "fp16")


@pytest.mark.slow
def test_a_report_tells_of_models_that_are_bound_by_the_start_of_kernels(setup: Setup, tmp_path: Path):
    setup.run(tmp_path, "generations=0")
    table = analysis.report(analysis.open_runs([tmp_path]))
    assert "start of kernels" not in analysis.as_text(table)
    assert "1 of these 1 models keep the CPU busy for over 90%" in analysis.as_text(table.assign(enqueue_share=0.95))


# --- on models ---


@pytest.fixture
def counted(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that every linear of every model moves, by its weights and the tokens that it sees."""
    forward = nn.Linear.forward

    def counting(linear: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
        clock.seconds += linear.weight.numel() * inputs.shape[:-1].numel() * 1e-9
        return forward(linear, inputs)

    monkeypatch.setattr(nn.Linear, "forward", counting)
    return clock


@pytest.mark.slow
def test_the_table_of_block_times_is_exact_where_the_clock_is(counted: Clock, tiny_checkpoint: Callable[..., Path]):
    model = build("bert", tiny_checkpoint)
    batches = sample(batches=3)
    times = measure.block_times(model, batches, MeasurementProtocol(min_passes=2, max_passes=2), CPU)
    depth, tokens = len(surgery.layers(model)), 3 * 8 * 4
    per_head, per_neuron = 4 * surgery.head_size(model) * surgery.hidden_size(model), 2 * surgery.hidden_size(model)
    assert depth > 1
    assert times.attention_ms == pytest.approx([count * per_head * tokens * 1e-6 for count in times.heads])
    assert times.ffn_ms == pytest.approx([count * per_neuron * tokens * 1e-6 for count in times.widths])


@pytest.mark.slow
def test_the_table_leaves_batches_out_where_it_would_take_too_long(
    counted: Clock, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    model, batches = build("bert", tiny_checkpoint), sample(batches=4)
    protocol = MeasurementProtocol(min_passes=2, max_passes=2)
    begin = counted.seconds
    whole = measure.block_times(model, batches, protocol, CPU)
    took = counted.seconds - begin
    monkeypatch.setattr(measure, "TABLE_SECONDS", took / 2)
    begin = counted.seconds
    part = measure.block_times(model, batches, protocol, CPU)
    assert counted.seconds - begin < 0.65 * took
    assert part.ffn_ms == pytest.approx(whole.ffn_ms)


def test_cut_models_of_the_table_share_the_word_embedding(tiny_checkpoint: Callable[..., Path]):
    model = build("bert", tiny_checkpoint)
    before = copy.deepcopy(model.state_dict())
    small = measure._with_blocks(model, 1, 8)
    assert small.get_input_embeddings().weight is model.get_input_embeddings().weight
    assert (set(surgery.head_counts(small)), set(surgery.ffn_widths(small))) == ({1}, {8})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_worker_times_candidate_and_base_model_as_what_they_are(setup: Setup, tmp_path: Path, counted: Clock):
    """Whatever has fewer layers takes less time, in proportion."""
    base_id = setup.run(tmp_path, "generations=0").base
    store = Store(tmp_path)
    base = store.outcome(base_id)
    assert base is not None
    step = Step(operator="drop_layers", params={"count": 1})
    task = base.task.model_copy(update={"genome": Genome(steps=(step,))})
    assert list(worker.run(str(tmp_path), [store.add_task(task)])) == [identity.task_id(task)]
    outcome = store.outcome(identity.task_id(task))
    assert outcome is not None
    for measurement, ratio in ((base.measurement, 1), (outcome.measurement, 2 / 3)):
        assert measurement is not None
        own, whole = (np.median(times) for times in (measurement.latency_ms, measurement.base_latency_ms))
        assert own / whole == pytest.approx(ratio, abs=0.02)  # pooler and head stay
