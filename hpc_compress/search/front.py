"""Vectors of objectives, all minimised: who is on the front, and what volume it dominates. Knows no steps and no models.

The hypervolume is the one figure by which searches are compared, so its scale is fixed here. A quality counts from 90 % of the
base model's (0) to the base model's own (1), linearly. A latency and a number of bytes count by how many times they are halved.
So a model with the base model's quality, half of its time and half of its bytes has a hypervolume of 1 by itself.

References:
    Zitzler & Thiele 1998, Multiobjective Optimization Using Evolutionary Algorithms (hypervolume)
    moocore, https://multi-objective.github.io/moocore/ (non-dominated sorting, hypervolume)
"""

import math
from collections.abc import Sequence

import moocore
import numpy as np

from hpc_compress.config import Objective, Target
from hpc_compress.search.objective import latency_of, quality_of, require_alike
from hpc_compress.types import Candidate, Measurement

LEAST_QUALITY = 0.9  # of the base model's, from which a quality counts


def vector(measurement: Measurement, base: Measurement, objectives: Sequence[Objective]) -> np.ndarray:
    """(objectives,) all minimised: what is lost of the quality, in tenths of the base model's, and log2 of the ratios to the
    base model. The base model is (0, 0, ...), and the hypervolume's reference point is (1, 0, 0, ...).

    Raises: ValueError when the two were measured on different devices or by different protocols.
    """
    require_alike(measurement, base)
    return np.array([_minimised(name, measurement, base) for name in objectives])


def _minimised(name: Objective, measurement: Measurement, base: Measurement) -> float:
    if name == "quality":
        return lost_quality(quality_of(measurement), quality_of(base))
    if name == "latency":
        return math.log2(latency_of(measurement))
    if name == "bytes":
        return math.log2(measurement.model_bytes / base.model_bytes)
    # Where the device has no allocator to ask, all are alike.
    return math.log2(measurement.peak_bytes / base.peak_bytes) if measurement.peak_bytes and base.peak_bytes else 0.0


def lost_quality(quality: float, base: float) -> float:
    """0 at the base model's quality, 1 at `LEAST_QUALITY` of it. A base model of quality 0 or below loses by its size."""
    return (base - quality) / ((1 - LEAST_QUALITY) * max(abs(base), 1e-12))


def reference(objectives: Sequence[Objective]) -> np.ndarray:
    """(objectives,) the point up to which a volume counts."""
    return np.array([1.0 if name == "quality" else 0.0 for name in objectives])


def nondominated(vectors: np.ndarray) -> np.ndarray:
    """(n,) whether no other of the (n, objectives) vectors is at least as good in everything; of equal ones the first."""
    return moocore.is_nondominated(np.asarray(vectors, dtype=float)) if len(vectors) else np.zeros(0, dtype=bool)


def hypervolume(vectors: np.ndarray, objectives: Sequence[Objective]) -> float:
    """Of the (n, objectives) vectors, up to `reference`."""
    vectors, upper = np.asarray(vectors, dtype=float).reshape(-1, len(objectives)), reference(objectives)
    inside = vectors[(vectors < upper).all(1)]
    return float(moocore.hypervolume(inside, ref=upper)) if len(inside) else 0.0


def of(candidates: Sequence[Candidate], base: Measurement, objectives: Sequence[Objective]) -> list[Candidate]:
    """The measured candidates that no other one beats in every objective, the best quality first."""
    measured = sorted((c for c in candidates if c.measurement), key=lambda c: c.id)
    vectors = np.array([vector(c.measurement, base, objectives) for c in measured if c.measurement])
    on_it = [c for c, best in zip(measured, nondominated(vectors), strict=True) if best]
    return sorted(on_it, key=lambda c: (-quality_of(c.measurement), c.id))  # type: ignore[arg-type]


# --- targets ---


def missed(measurement: Measurement, base: Measurement, target: Target) -> float:
    """By how many halvings a model misses its targets, summed over them; 0: it keeps to all. A quality misses by the share of
    the quality that it may lose: 0.98 where 0.99 is wanted misses by 1."""
    names: tuple[Objective, ...] = ("quality", "latency", "bytes")
    return missed_by(vector(measurement, base, names), names, base, target)


def missed_by(found: np.ndarray, objectives: Sequence[Objective], base: Measurement, target: Target) -> float:
    """The same for a vector of objectives. What is no objective of the vector misses nothing."""
    values = dict(zip(objectives, map(float, found), strict=True))
    total = 0.0
    if target.quality is not None and "quality" in values:
        lost, allowed = (1 - LEAST_QUALITY) * values["quality"], 1 - target.quality
        total += max(0.0, (lost - allowed) / max(allowed, 0.01))
    if target.speed_up is not None and "latency" in values:
        total += max(0.0, math.log2(target.speed_up) + values["latency"])
    if target.megabytes is not None and "bytes" in values:
        total += max(0.0, values["bytes"] + math.log2(base.model_bytes / (1e6 * target.megabytes)))
    return total


def nearest(candidates: Sequence[Candidate], base: Measurement, target: Target) -> Candidate:
    """The candidate that misses the targets least; of those that keep to all, the one with the largest hypervolume by itself:
    what a target leaves open should be good too."""
    names: tuple[Objective, ...] = ("quality", "latency", "bytes")

    def rank(candidate: Candidate) -> tuple[float, float, float, str]:
        found = candidate.measurement
        assert found is not None
        alone = hypervolume(vector(found, base, names)[None], names)
        return missed(found, base, target), -alone, -quality_of(found), candidate.id

    return min((candidate for candidate in candidates if candidate.measurement), key=rank)
