"""What a run has found: its front, and the model that comes nearest to its targets. Recomputed whenever it is asked for."""

from dataclasses import dataclass

import numpy as np

from hpc_compress.analysis.runs import Run
from hpc_compress.config import Target
from hpc_compress.search import front
from hpc_compress.search.objective import quality_of, speed_up
from hpc_compress.types import Candidate, Genome, Measurement


def measured(run: Run) -> list[Candidate]:
    """The base model and all candidates that a selection has looked at, as far as they are measured and can be compared."""
    base = run.base
    if base is None or vector(run, base, base) is None:
        return []
    measurements = {run.base_id: base}
    for task_id in run.told:
        seen = run.seen.get(task_id)
        if seen and seen.measurement and vector(run, seen.measurement, base) is not None:
            measurements[task_id] = seen.measurement
    # Readers know a genome's name only; nobody here asks for its steps.
    return [Candidate(id=id, genome=Genome(), measurement=measurement) for id, measurement in measurements.items()]


def vector(run: Run, measurement: Measurement, base: Measurement) -> np.ndarray | None:
    """(objectives,) of `front.vector`; None for figures that no search of ours has or can compare."""
    try:
        found = front.vector(measurement, base, run.plan.config.objectives)
    except (ValueError, OverflowError):
        return None
    return found if np.isfinite(found).all() else None


def front_of(run: Run) -> list[str]:
    """Ids of the candidates that no other one beats in every objective, the best quality first."""
    candidates, base = measured(run), run.base
    return [candidate.id for candidate in front.of(candidates, base, run.plan.config.objectives)] if base else []


def fronts(run: Run) -> list[str]:
    """For each device whose file the user gave, a line on its front."""
    lines = []
    for at, profile in enumerate(run.plan.devices[: len(run.views)]):
        on = run.on(at)
        members = [on.seen[candidate].measurement for candidate in front_of(on)]
        models = [measurement for measurement in members if measurement]
        if models:
            name, qualities, speeds = next(iter(models[0].metrics)), list(map(quality_of, models)), list(map(speed_up, models))
            lines.append(
                f"{len(models)} models on {profile.device} (times {times(models[0])}): {name} {min(qualities):.3f} to "
                f"{max(qualities):.3f}, {min(speeds):.2f}x to {max(speeds):.2f}x speed"
            )
    return lines


def times(measurement: Measurement) -> str:
    return "predicted" if measurement.predicted else "measured"


# --- which one to take ---


@dataclass(frozen=True)
class Choice:
    """The model to deploy, and the one that comes next by the same rule."""

    candidate: str
    next: str | None
    why: str
    text: str  # why, which model it is, and its figures


def chosen(run: Run) -> Choice | None:
    """The model nearest to the run's targets, or the fittest one of a run without targets; None where there is none, or no
    measured base model to compare it with."""
    if (best := nearest(run)) is not None:
        return Choice(best.candidate, _second_nearest(run, best.candidate), best.text, best.text)
    fittest = run.seen[run.best].measurement if run.best in run.seen else None
    if run.base is None or run.best is None or fittest is None:
        return None
    ranked = (*(run.result.reported if run.result else ()), *(run.generations[-1].population if run.generations else ()))
    others = [id for id in dict.fromkeys(ranked) if id not in (run.best, run.base_id) and id in run.seen]
    why = "the fittest candidate, by the objective of the search"
    named = f"candidate {run.best}: {', '.join(_figures(fittest, run.base, Target()))}{_reported(run, run.best)}"
    return Choice(run.best, next(iter(others), None), why, f"{why}: {named}")


def _second_nearest(run: Run, best: str) -> str | None:
    base, others = run.base, [candidate for candidate in measured(run) if candidate.id not in (best, run.base_id)]
    assert base is not None
    return front.nearest(others, base, run.plan.config.target).id if others else None


# --- targets ---


@dataclass(frozen=True)
class Nearest:
    """The model that comes nearest to a run's targets."""

    candidate: str
    within: bool  # it keeps to all of them
    text: str  # says which model it is, and by how much it misses each target


def nearest(run: Run) -> Nearest | None:
    """By its measurement on the search split; None for a run without targets, or with no measured model."""
    target, base, candidates = run.plan.config.target, run.base, measured(run)
    if not (target.wanted and base and candidates):
        return None
    try:
        best = front.nearest(candidates, base, target)
        assert best.measurement is not None
        within = front.missed(best.measurement, base, target) == 0
    except (ValueError, OverflowError):
        return None  # targets that no search of ours has
    named = f"candidate {best.id}: {', '.join(_figures(best.measurement, base, target))}{_reported(run, best.id)}"
    wanted = f"({', '.join(_limits(target))})"
    text = (
        f"within the targets {wanted}: {named}" if within else f"no model keeps to all targets {wanted}; the nearest is {named}"
    )
    return Nearest(best.id, within, text)


def _limits(target: Target) -> list[str]:
    limits = []
    if target.quality is not None:
        limits.append(f"at least {100 * target.quality:g} % of the base model's quality")
    if target.speed_up is not None:
        limits.append(f"at least {target.speed_up:g}x speed")
    if target.megabytes is not None:
        limits.append(f"at most {target.megabytes:g} MB")
    return limits


def _figures(measurement: Measurement, base: Measurement, target: Target) -> list[str]:
    share, speed, megabytes = _kept(measurement, base), speed_up(measurement), measurement.model_bytes / 1e6
    name = next(iter(measurement.metrics))
    quality = f"{name} {quality_of(measurement):.3f} on the search split, {100 * share:.2f} % of the base model's"
    short = 0.0 if target.quality is None else 100 * (target.quality - share)
    slow = 0.0 if target.speed_up is None else target.speed_up - speed
    large = 0.0 if target.megabytes is None else megabytes - target.megabytes
    return [
        quality + (f" (misses by {short:.2g} %)" if short > 0 else ""),
        f"{speed:.2f}x speed{' (predicted)' if measurement.predicted else ''}"
        + (f" (misses by {slow:.2g}x)" if slow > 0 else ""),
        f"{megabytes:.1f} MB" + (f" (misses by {large:.2g} MB)" if large > 0 else ""),
    ]


def _kept(measurement: Measurement, base: Measurement) -> float:
    """The share of the base model's quality that a model has, as targets count it."""
    return 1 - (1 - front.LEAST_QUALITY) * front.lost_quality(quality_of(measurement), quality_of(base))


def _reported(run: Run, candidate: str) -> str:
    """What the report split says of it."""
    ids = (run.seen[candidate].report_id, run.seen[run.base_id].report_id)
    model, base = (run.seen[id].measurement if id in run.seen else None for id in ids)
    if model is None or base is None:
        return ""
    return f"; on the report split {quality_of(model):.3f}, {100 * _kept(model, base):.2f} % of the base model's"
