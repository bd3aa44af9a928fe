"""Survivors are timed again, and the base model in its best precision too."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import light
import pytest
from searches import Setup, story

from hpc_compress import analysis
from hpc_compress.analysis.found import nearest
from hpc_compress.launch.local import Debug
from hpc_compress.search.objective import latency_of
from hpc_compress.store import Store
from hpc_compress.types import Genome, Outcome, SearchError, Task


def timed(task: Task, usual: float = 10.0) -> Outcome:
    """Models of ``usual`` ms but for their first timing, in which some are lucky, beside a base model of 10 ms."""
    outcome = light.answer(task)
    assert outcome.measurement
    lucky = task.repeat == 0 and len(task.genome.steps) in (1, 2)  # most of the first generation
    figures = {
        "metrics": {"accuracy": 0.9},
        "latency_ms": (1.0 if lucky else usual if task.genome.steps else 10.0,),
        "model_bytes": 1000,
    }
    return outcome.model_copy(update={"measurement": outcome.measurement.model_copy(update=figures)})


def run(root: str, task_ids: list[str], usual: float = 10.0, **ignored: Any) -> Iterator[str]:
    store = Store(root)
    for task_id in task_ids:
        if store.outcome(task_id) is None:
            store.settle(timed(store.task(task_id), usual))
        yield task_id


run_faster_models = partial(run, usual=5.0)


def searched(setup: Setup, root: Path, *more: str, worker: str = "test_timings.run") -> analysis.Run:
    setup.run(root, "probe=false", "objective.b=1", "generations=5", *more, launcher=Debug(worker=worker))
    return analysis.open_run(root)


def repeats(found: analysis.Run) -> Counter[Genome]:
    return Counter(str(outcome.task.genome) for outcome in found.outcomes.values() if outcome.task.repeat)


@pytest.mark.slow
def test_a_lucky_timing_does_not_last(setup: Setup, tmp_path: Path):
    def mature(found: analysis.Run) -> list[float]:
        born = {task_id for generation in found.generations[:2] for task_id in generation.born_ids}
        survivors = [found.seen[task_id].measurement for task_id in found.generations[-1].population if task_id in born]
        return [latency_of(measurement) for measurement in survivors if measurement]

    once = mature(searched(setup, tmp_path / "once", "timings=1"))
    assert min(once) == pytest.approx(0.1), "this test needs a lucky candidate"
    assert [latency for latency in mature(searched(setup, tmp_path / "again")) if latency != 1] == []


@pytest.mark.slow
def test_each_survivor_is_timed_so_often_and_the_base_model_never_again(setup: Setup, tmp_path: Path):
    found = searched(setup, tmp_path, "timings=3")
    numbers = repeats(found)
    assert numbers
    assert max(numbers.values()) == 2
    assert "base" not in numbers
    for generation, before in zip(found.generations[1:], found.generations, strict=False):
        timed_now = {str(found.outcomes[task_id].task.genome) for task_id in generation.timed}
        alive = {str(found.outcomes[task_id].task.genome) for task_id in before.population}
        assert timed_now <= alive
    table = analysis.load_runs(tmp_path)
    assert table["timings"].max() == 3
    assert not repeats(searched(setup, tmp_path / "once", "timings=1"))


@pytest.mark.slow
def test_no_lucky_child_of_the_last_generation_is_the_best(setup: Setup, tmp_path: Path):
    """All models are alike but for the first timing of those of the first generation, which is the last one here."""
    words = ("generations=1", "report_candidates=2")
    found = searched(setup, tmp_path / "once", "timings=1", *words)
    assert latency_of(found.outcomes[found.best].measurement) == pytest.approx(0.1), "this test needs a lucky candidate"
    found = searched(setup, tmp_path / "again", "timings=3", *words)
    assert found.result
    assert found.result.timed
    for candidate in found.result.reported:
        measurement = found.seen[candidate].measurement
        assert measurement
        assert len(measurement.timings) == (1 if measurement.of_base else 3)
        assert latency_of(measurement) == 1
    wanted = story(found.root)
    (found.root / "result.json").unlink()
    assert story(searched(setup, found.root, "timings=3", *words).root) == wanted
    # A run that is prolonged goes on from what it has.
    longer = searched(setup, found.root, "timings=3", "generations=2", "report_candidates=2")
    assert longer.result
    assert longer.result.generations == 2
    assert longer.damage == ()


def test_the_model_nearest_to_the_targets_is_timed_as_often_as_the_fittest(setup: Setup, tmp_path: Path):
    words = ("timings=3", "generations=1", "report_candidates=1", "target.speed_up=5")
    found = searched(setup, tmp_path, *words, worker="test_timings.run_faster_models")
    assert found.result
    best = nearest(found)
    assert best
    assert best.candidate != found.base_id
    assert len(found.seen[best.candidate].measurement.timings) == 3


@pytest.mark.slow
@pytest.mark.parametrize("select_after", [1, 0.5])
def test_a_resumed_run_looks_at_the_same_timings(setup: Setup, tmp_path: Path, select_after: float):
    words = [f"select_after={select_after}"]
    wanted = story(searched(setup, tmp_path, *words).root)
    for lost in ("result.json", "generations/0005.json"):
        (tmp_path / lost).unlink()
    assert story(searched(setup, tmp_path, *words).root) == wanted


def test_outcomes_of_another_device_are_named(setup: Setup, tmp_path: Path):
    with pytest.raises(SearchError, match=r"constraint") as error:
        searched(setup, tmp_path, worker="test_timings.run_on_two_devices")
    odd = [path for path in tmp_path.glob("tasks/*/outcome.json") if "a V100" in path.read_text()]
    assert odd
    assert all(str(path) in str(error.value) for path in odd)


def run_on_two_devices(root: str, task_ids: list[str], **ignored: Any) -> Iterator[str]:
    store = Store(root)
    for number, task_id in enumerate(task_ids):
        outcome = timed(store.task(task_id))
        if number % 2 and outcome.measurement:
            measurement = outcome.measurement.model_copy(update={"device": "a V100"})
            outcome = outcome.model_copy(update={"measurement": measurement})
        store.settle(outcome)
        yield task_id


@pytest.mark.slow
def test_the_worker_times_the_base_model_in_16_bits_too(setup: Setup, tmp_path: Path):
    setup.run(tmp_path, "generations=0", "probe=false", "protocol.base_precision=bf16")
    found = analysis.open_run(tmp_path)
    measurement = found.outcomes[found.base_id].measurement
    assert measurement
    assert measurement.of_base
    assert measurement.base_best_precision == "bf16"
    assert measurement.base_best_latency_ms
    assert len(measurement.base_best_latency_ms) == len(measurement.latency_ms)
    text = analysis.as_text(analysis.report(analysis.open_runs([tmp_path])))
    assert "speed-up over 16-bit base" in text
    assert "Noise of a speed-up: " in text
    (row,) = (line for line in text.splitlines() if "base model" in line and line.startswith("|"))
    assert " 1.00 |" in row
