"""What a run has found: its front, and the model that comes nearest to its targets. Recomputed whenever it is asked for."""

import numpy as np

from hpc_compress.analysis.runs import Run
from hpc_compress.search import front
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
