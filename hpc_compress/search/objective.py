"""From measurements to one number to maximise. Recomputed whenever it is asked for, never stored as fact."""

import math
from collections.abc import Sequence
from statistics import median

from pydantic import Field

from hpc_compress.types import Measurement, Record


class Product(Record):
    """The weighted product `F = (Q / Qmax)^a * (Tmin / T)^b * (Mmin / M)^c` of the published method.

    Q: the first metric. T: median time of one pass over the protocol's sample, in units of the base model's median in the
    same job, which makes no difference among equal nodes and takes out what a slow or busy one adds. M: bytes of the saved
    deployed model.

    Edges: a Q of zero or below earns F = 0 whenever a > 0, since no power of it may look good; with a = 0 quality has no
    part in F, as the user asked. A candidate without a measurement has no F and never survives.
    """

    a: float = Field(default=5.0, ge=0, description="weight of quality")
    b: float = Field(default=1.0, ge=0, description="weight of speed")
    c: float = Field(default=1.0, ge=0, description="weight of memory")

    def __call__(self, measurement: Measurement, base: Measurement) -> float:
        """log F up to a constant of the population, which can't change a ranking; -inf for F = 0.

        Raises: ValueError when the two were measured on different types of device or by different protocols.
        """
        require_alike(measurement, base)
        quality = quality_of(measurement)
        if self.a > 0 and quality <= 0:
            return -math.inf
        gain = self.a * math.log(quality) if self.a > 0 else 0.0
        return gain - self.b * math.log(latency_of(measurement)) - self.c * math.log(measurement.model_bytes)

    def fitness(self, population: Sequence[Measurement]) -> list[float]:
        """F of each member, normalised within this population: 1 for a member that is best in everything."""
        if not population:
            return []
        scores = [self(measurement, population[0]) for measurement in population]
        best_quality = max(quality_of(measurement) for measurement in population)
        ideal = self.a * math.log(best_quality) if self.a > 0 and best_quality > 0 else 0.0
        ideal -= self.b * math.log(min(latency_of(measurement) for measurement in population))
        ideal -= self.c * math.log(min(measurement.model_bytes for measurement in population))
        return [math.exp(score - ideal) for score in scores]


def quality_of(measurement: Measurement) -> float:
    return next(iter(measurement.metrics.values()))


def latency_of(measurement: Measurement) -> float:
    """Median time of one pass, in units of the base model's in the same job."""
    return median(measurement.latency_ms) / median(measurement.base_latency_ms)


def speed_up(measurement: Measurement) -> float:
    """Of the deployed model over the base model, both timed in one job."""
    return median(measurement.base_latency_ms) / median(measurement.latency_ms)


def require_alike(one: Measurement, other: Measurement) -> None:
    """Raises: ValueError unless the two were taken on the same type of device by the same protocol."""
    if one.device_type != other.device_type or one.protocol != other.protocol:
        raise ValueError(
            f"a measurement on {one.device_type} by {one.protocol} can't be compared with one on {other.device_type} by "
            f"{other.protocol}; measure both on one type of device by one protocol"
        )
