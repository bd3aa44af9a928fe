"""Outcomes in one line, for the driver's log, the status and reports. Imports no torch, and knows no file."""

import math

from hpc_compress.data import metrics
from hpc_compress.records import Plan
from hpc_compress.search.front import LEAST_QUALITY
from hpc_compress.search.objective import speed_up
from hpc_compress.types import Failure, Measurement, Outcome

CERTAIN_ROWS = 100  # with fewer, a base model that scores like a constant answer may still have learnt something


def describe(failure: Failure) -> str:
    return f"{failure.kind} while at {failure.stage}: {failure.message}"


def with_error(value: float, error: float | None) -> str:
    """A quality and its standard error, where that is known."""
    return f"{value:.3f}" if error is None or math.isnan(error) else f"{value:.3f} ± {error:.3f}"


def figures(measurement: Measurement) -> str:
    name, quality = next(iter(measurement.metrics.items()))
    best = f" ({speed_up(measurement, 'best'):.2f}x of {precision})" if (precision := measurement.base_best_precision) else ""
    predicted = " (predicted)" if measurement.predicted else ""
    return f"{name} {quality:.3f}, {measurement.model_bytes / 1e6:.1f} MB, {speed_up(measurement):.2f}x speed{best}{predicted}"


def learnt(plan: Plan, outcome: Outcome) -> tuple[str, bool] | None:
    """A warning about a base model that is hardly better than the best constant answer, and whether that is certain."""
    rows, measurement, split = plan.rows, outcome.measurement, outcome.task.split
    count = next((found.rows for found in rows.overlaps if found.split == split), 0) if rows else 0
    if rows is None or measurement is None or not count:
        return None
    name, score = next(iter(measurement.metrics.items()))
    constant = rows.trivial[split].get(name, 0.0)
    if score > constant + metrics.noise(name, constant, count):
        return None
    better = "is no better" if score <= constant else "is hardly better"
    figures = f"{name} {score:.3f} against {constant:.3f} on {count} {split} rows"
    line = f"the base model {better} than always giving the same answer: {figures}"
    return line, score <= constant and count >= CERTAIN_ROWS


def uncertain(outcome: Outcome) -> str | None:
    """A warning about a base model whose quality is not known well enough to choose models by it."""
    measurement = outcome.measurement
    if measurement is None:
        return None
    name, score = next(iter(measurement.metrics.items()))
    error, counted = measurement.standard_errors.get(name, 0.0), (1 - LEAST_QUALITY) * score
    if not 0 < counted < 2 * error:
        return None
    return (
        f"on the {outcome.task.split} rows, the {name} of the base model is {with_error(score, error)} (standard error). A "
        f"model whose {name} is more than {counted:.3f} lower does not count for the hypervolume. So chance decides much of "
        "what is found; use more rows (dataset.search_rows, dataset.max_search_rows)"
    )
