"""The front and its hypervolume, against brute force, and targets as a reading of it."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_compress.config import Target
from hpc_compress.search import front
from hpc_compress.types import Candidate, Genome, Measurement, MeasurementProtocol

NAMES = ("quality", "latency", "bytes")


def measured(quality: float, speed_up: float, megabytes: float, **changes: Any) -> Measurement:
    values = {
        "metrics": {"accuracy": quality},
        "latency_ms": (10.0 / speed_up,),
        "base_latency_ms": (10.0,),
        "model_bytes": round(megabytes * 1e6),
        "parameters": 1,
        "encoder_parameters": 1,
        "device": "test",
        "device_type": "cpu",
        "protocol": MeasurementProtocol(),
        **changes,
    }
    return Measurement(**values)


BASE = measured(0.9, 1, 80, of_base=True)


def candidate(name: str, *figures: float) -> Candidate:
    return Candidate(id=name, genome=Genome(), measurement=measured(*figures))


def volume(*models: Measurement) -> float:
    return front.hypervolume(np.array([front.vector(model, BASE, NAMES) for model in models]), NAMES)


def test_one_model_of_the_base_models_quality_with_half_of_its_time_and_bytes_has_a_hypervolume_of_1():
    assert volume(measured(0.9, 2, 40)) == pytest.approx(1)
    assert volume(measured(0.9, 8, 10)) == pytest.approx(9)
    assert volume(measured(0.855, 2, 40)) == pytest.approx(0.5)  # 95 % of the base's quality
    assert volume(measured(0.81, 8, 10)) == pytest.approx(0)
    assert volume(measured(0.9, 0.5, 10)) == 0
    assert volume(BASE) == 0


def test_the_base_model_is_the_origin():
    assert front.vector(BASE, BASE, (*NAMES, "peak_bytes")).tolist() == [0, 0, 0, 0]


points = st.lists(st.tuples(*[st.integers(-4, 2)] * 3), min_size=1, max_size=8)


@given(points)
@settings(max_examples=60)
def test_the_hypervolume_is_that_of_the_unit_cubes_that_are_dominated(rows: list[tuple[int, ...]]):
    reference = front.reference(NAMES)
    cells = np.array(np.meshgrid(*[np.arange(-4, 2) + 0.5] * 3)).reshape(3, -1).T
    inside = cells[(cells < reference).all(1)]
    dominated = sum(any((np.array(row) < cell).all() for row in rows) for cell in inside)
    assert front.hypervolume(np.array(rows), NAMES) == pytest.approx(dominated)


@given(points)
@settings(max_examples=60)
def test_nobody_on_the_front_is_beaten_and_everybody_else_is(rows: list[tuple[int, ...]]):
    vectors = np.array(rows, dtype=float)
    on_it = front.nondominated(vectors)
    for at, row in enumerate(vectors):
        beaten = any((other <= row).all() and (other < row).any() for other in vectors)
        twin = any((vectors[before] == row).all() for before in range(at))
        assert on_it[at] == (not beaten and not twin)


def test_models_of_another_device_are_refused():
    with pytest.raises(ValueError, match="let all tasks run on one kind of device"):
        front.vector(measured(0.9, 2, 40, device="another"), BASE, NAMES)


def test_a_front_has_the_best_quality_first_and_leaves_out_what_failed():
    models = [candidate("a", 0.8, 4, 20), candidate("b", 0.89, 2, 40), candidate("c", 0.8, 2, 40)]
    found = front.of([*models, Candidate(id="d", genome=Genome())], BASE, NAMES)
    assert [model.id for model in found] == ["b", "a"]


def test_targets_name_the_best_model_within_them():
    models = [candidate("slow", 0.9, 2, 20), candidate("good", 0.895, 4, 10), candidate("small", 0.85, 4, 5)]
    target = Target(quality=0.99, speed_up=3)
    assert [front.missed(model.measurement, BASE, target) == 0 for model in models] == [False, True, False]
    assert front.nearest(models, BASE, target).id == "good"
    assert front.nearest(models, BASE, Target(megabytes=6)).id == "small"


def test_where_no_model_keeps_to_the_targets_the_nearest_is_named():
    models = [candidate("a", 0.9, 2, 20), candidate("b", 0.9, 3.9, 20)]
    target = Target(speed_up=4)
    assert front.missed(models[0].measurement, BASE, target) == pytest.approx(1)
    assert front.nearest(models, BASE, target).id == "b"


def test_a_quality_misses_by_the_share_of_what_it_may_lose():
    assert front.missed(measured(0.9 * 0.98, 1, 80), BASE, Target(quality=0.99)) == pytest.approx(1)


def test_a_target_leaves_open_what_it_does_not_name_and_the_rest_should_be_good_too():
    """The base model keeps to a target of quality, and nobody wants it."""
    models = [Candidate(id="base", genome=Genome(), measurement=BASE), candidate("good", 0.895, 4, 10)]
    assert front.nearest(models, BASE, Target(quality=0.99)).id == "good"
