"""From measurements to one number to maximise. Recomputed whenever it is asked for, never stored as fact."""

import math
from collections.abc import Sequence
from statistics import median
from typing import Literal

from pydantic import Field

from hpc_compress.types import Measurement, Record, Timing

BasePrecision = Literal["best", "fp32"]


class Product(Record):
    """The weighted product `F = (Q / Qmax)^a * (Tmin / T)^b * (Mmin / M)^c` of the published method.

    Q: the first metric. T: time of one pass over the protocol's sample, in units of the base model's time in the same job.
    This unit makes no difference among equal nodes, and cancels what a slow or busy node adds. M: bytes of the saved deployed
    model.

    Edges: if a > 0, a Q of zero or below gives F = 0, since no power of it may look good; with a = 0, quality does not count.
    A candidate without a measurement has no F and never survives.
    """

    a: float = Field(default=5.0, ge=0, description="weight of quality")
    b: float = Field(default=1.0, ge=0, description="weight of speed")
    c: float = Field(default=1.0, ge=0, description="weight of memory")
    base: BasePrecision = Field(
        default="best", description="the base model whose time is the unit of T: in its best timed precision, or in fp32"
    )

    def __call__(self, measurement: Measurement, base: Measurement) -> float:
        """log F up to a constant of the population, which can't change a ranking; -inf for F = 0.

        Raises: ValueError when the two were measured on different devices or by different protocols.
        """
        require_alike(measurement, base)
        quality = quality_of(measurement)
        if self.a > 0 and quality <= 0:
            return -math.inf
        gain = self.a * math.log(quality) if self.a > 0 else 0.0
        return gain - self.b * math.log(latency_of(measurement, self.base)) - self.c * math.log(measurement.model_bytes)

    def fitness(self, population: Sequence[Measurement]) -> list[float]:
        """F of each member, normalised within this population: 1 for a member that is best in everything."""
        if not population:
            return []
        scores = [self(measurement, population[0]) for measurement in population]
        best_quality = max(quality_of(measurement) for measurement in population)
        ideal = self.a * math.log(best_quality) if self.a > 0 and best_quality > 0 else 0.0
        ideal -= self.b * math.log(min(latency_of(measurement, self.base) for measurement in population))
        ideal -= self.c * math.log(min(measurement.model_bytes for measurement in population))
        return [math.exp(score - ideal) for score in scores]


def quality_of(measurement: Measurement) -> float:
    return next(iter(measurement.metrics.values()))


def latency_of(measurement: Measurement, base: BasePrecision = "fp32") -> float:
    """Time of one pass, in units of the base model's: the median over all timings of this model.

    base: best means the precision in which the protocol times the base model besides fp32, if there is one.
    """
    return median(_ratio(timing, measurement.of_base, base) for timing in measurement.timings)


def speed_up(measurement: Measurement, base: BasePrecision = "fp32") -> float:
    """Of the deployed model over the base model."""
    return 1 / latency_of(measurement, base)


def speed_up_spread(measurement: Measurement) -> float:
    """The largest speed-up of all timings of this model minus the smallest."""
    ratios = [1 / _ratio(timing, measurement.of_base, "fp32") for timing in measurement.timings]
    return max(ratios) - min(ratios)


def with_timing(measurement: Measurement, other: Measurement) -> Measurement:
    """A measurement with one more timing, which was taken of the same model in another job.

    Raises: ValueError when the two were measured on different devices or by different protocols.
    """
    require_alike(measurement, other)
    timing = Timing(**{name: getattr(other, name) for name in Timing.model_fields})
    return measurement.model_copy(update={"again": (*measurement.again, timing)})


def noise(base: Measurement) -> float:
    """How far the ratio of two times is from 1 when both are the base model's, for 9 of 10 pairs of passes.

    The passes of a pair follow one another, so this holds for every other ratio of the run as well.
    """
    distances = sorted(abs(own / other - 1) for own, other in zip(base.latency_ms, base.base_latency_ms, strict=True))
    return distances[math.ceil(0.9 * len(distances)) - 1]


def _ratio(timing: Timing, of_base: bool, base: BasePrecision) -> float:
    """The median over the turns of one job: within a turn both models meet the same state of the machine."""
    # The base model takes 1 of its own time by definition. What its two timings differ by is noise, and no result.
    own = timing.base_latency_ms if of_base else timing.latency_ms
    unit = timing.base_best_latency_ms if base == "best" and timing.base_best_latency_ms else timing.base_latency_ms
    return median(model_ms / base_ms for model_ms, base_ms in zip(own, unit, strict=True))


def require_alike(one: Measurement, other: Measurement) -> None:
    """Raises: ValueError unless the two were taken on the same kind of device by the same protocol.

    The name of a CPU includes the number of threads: a cut changes the time on one thread and on eight differently.
    """
    if one.protocol != other.protocol:
        raise ValueError(
            f"a measurement by {one.protocol} can't be compared with one by {other.protocol}; measure both by one protocol"
        )
    if (one.device_type, one.device) != (other.device_type, other.device):
        raise ValueError(
            f"a measurement on {one.device} can't be compared with one on {other.device}; let all tasks run on one kind of "
            "device: choose a partition of equal nodes, or set cluster.gpu_type=... or cluster.sbatch={constraint: ...}; on "
            "CPUs give every job the same number of threads too (launcher.threads, cluster.cpus_per_task)"
        )
