"""Whether one model is really better than another: their answers to the same examples, compared pair by pair. No torch."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from hpc_compress import door
from hpc_compress.analysis.runs import Run
from hpc_compress.config import ConfigError
from hpc_compress.problems import problem
from hpc_compress.store import Store
from hpc_compress.types import Measurement, Split

SURE = 1.96  # standard errors: a difference beyond them is one by chance in 1 of 20 cases
SAME = 1e-6  # answers whose difference is further from the recorded one are not those that were measured


@dataclass(frozen=True)
class Difference:
    """Of two models in the first metric, one minus the other."""

    metric: str
    split: Split
    value: float
    error: float | None  # standard error; None where it is not known
    rows: int | None  # examples that both answered; None: not compared pair by pair, and the error is an upper bound

    @property
    def real(self) -> bool | None:
        """Whether it is more than chance; None where that is not known."""
        return None if self.error is None else abs(self.value) > SURE * self.error

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.metric} {self.value:+.3f} on the {self.split} split"
        how = f"paired, {self.rows} {self.split} rows" if self.rows is not None else f"{self.split} split, not paired"
        return f"{self.metric} {self.value:+.3f} ± {self.error:.3f} ({how}): {self.verdict}"

    @property
    def verdict(self) -> str:
        if self.real is None:
            return "how sure this is, is not known"
        return "may be chance" if not self.real else "really better" if self.value > 0 else "really worse"


class Pairs:
    """Compares the models of one run. Reads what they answered when it is asked for, and keeps it."""

    def __init__(self, run: Run) -> None:
        self._run, self._store = run, Store(run.root)
        self._rows: dict[str, pd.DataFrame | None] = {}
        self._answers: dict[str, np.ndarray | None] = {}

    def difference(self, one: str, other: str) -> Difference | None:
        """Of two candidates, on the report split if both were measured there; None where there is nothing to compare."""
        seen = self._run.seen
        if one not in seen or other not in seen:
            return None
        for split, ids in (("report", (seen[one].report_id, seen[other].report_id)), ("search", (one, other))):
            first, second = (seen[id].measurement if id in seen else None for id in ids)
            if first is not None and second is not None:
                return self._difference(split, ids, first, second)  # type: ignore[arg-type]
        return None

    def _difference(self, split: Split, ids: tuple[str, str], first: Measurement, second: Measurement) -> Difference:
        name = self._run.plan.dataset.metrics[0]
        recorded = first.metrics.get(name, math.nan) - second.metrics.get(name, math.nan)
        rows, one, other = self._of(split), *(self._said(id) for id in ids)
        if rows is not None and one is not None and other is not None and len(one) == len(other):
            try:
                kind = problem(self._run.plan.dataset.problem)
                value, error = kind.difference(self._run.plan.dataset, rows, one, other)
            except (ConfigError, ValueError, KeyError, TypeError):
                value, error = math.nan, math.nan  # data that no search of ours has
            if abs(value - recorded) <= SAME:
                return Difference(name, split, recorded, error, len(rows))
        errors = [measurement.standard_errors.get(name) for measurement in (first, second)]
        unpaired = None if None in errors else math.hypot(*errors)  # type: ignore[arg-type]
        return Difference(name, split, recorded, unpaired, None)

    def _of(self, split: Split) -> pd.DataFrame | None:
        """The rows that a split's answers are compared with."""
        if split not in self._rows:
            try:
                self._rows[split] = pd.read_parquet(door.inside(self._run.root, "data", f"{split}.parquet"))
            except (OSError, ValueError, KeyError, MemoryError, NotImplementedError):
                self._rows[split] = None
        return self._rows[split]

    def _said(self, task_id: str) -> np.ndarray | None:
        if task_id not in self._answers:
            try:
                self._answers[task_id] = self._store.answers(task_id)
            except (OSError, door.DamageError):
                self._answers[task_id] = None
        return self._answers[task_id]
