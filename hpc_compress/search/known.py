"""What a strategy is told before its first question. Knows no torch, no disk and no device."""

import math
from collections.abc import Callable
from typing import Any

from hpc_compress.config import Objective, Target
from hpc_compress.search.space import Shape
from hpc_compress.types import Candidate, DeviceProfile, Measurement, Record, Surveyed


class Known(Record):
    """Only `shape` is known when a strategy is asked which steps it may use; the rest when it is asked for genomes."""

    shape: Shape  # of the base model
    score: Callable[[Measurement], float] = lambda measurement: 0.0  # F, to be maximised
    base: Measurement | None = None
    objectives: tuple[Objective, ...] = ("quality", "latency", "bytes")
    target: Target = Target()
    survey: Surveyed | None = None  # None: the strategy did not ask for it
    profile: DeviceProfile | None = None  # of the device; likewise, unless the user gave its file
    devices: tuple[DeviceProfile, ...] = ()  # all that the user gave; `profile` is the first one
    # A candidate that was told, as this device sees it. Strategies are told what the first device sees.
    seen: Callable[[Candidate], Candidate] = lambda candidate: candidate
    others: tuple["Known", ...] = ()  # the same for each further device
    timings: int = 3  # that a candidate gets at most
    # Device seconds that the budget leaves, by the outcomes that selections have looked at; infinite without a budget.
    left: Callable[[], float] = lambda: math.inf

    def briefly(self) -> dict[str, Any]:
        """For a strategy that maximises F and knows nothing else."""
        return {"shape": self.shape, "score": self.score}
