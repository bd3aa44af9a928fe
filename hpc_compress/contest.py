"""Runs strategies one after another on equal terms: the same seeds, the same device seconds. Knows the driver, and no Hydra.

Every run is a search like any other, so it resumes like any other.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpc_compress import driver
from hpc_compress.analysis import open_run
from hpc_compress.analysis.compare import device_seconds
from hpc_compress.config import Budget
from hpc_compress.dispatch import Progress
from hpc_compress.driver import SearchSettings
from hpc_compress.records import Plan
from hpc_compress.store import Store
from hpc_compress.types import SearchError

MOST_GENERATIONS = 1000  # of a run that its budget shall end


@dataclasses.dataclass(frozen=True)
class Entry:
    """One run of a contest."""

    strategy: str
    seed: int
    root: Path
    settings: SearchSettings


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a contest."""

    finished: tuple[Path, ...]
    failed: Mapping[Path, str]  # why


def run(entries: Sequence[Entry], reference: str, progress: Progress, limited: bool = False) -> Outcome:
    """Run each entry to its end, seed by seed, the reference first.

    Entries with a budget of their own spend it. Without one, the reference ends by its settings, and the device seconds that it
    spent with a seed are the budget of the others with this seed.

    limited: the number of generations is a limit even for entries with a budget of their own.

    Raises: ConfigError for what a user can mend. A search that can't go on does not end the others.
    """
    finished: list[Path] = []
    failed: dict[Path, str] = {}
    hours: dict[int, float] = {}  # by seed, what the reference spent
    for number, entry in enumerate(sorted(entries, key=lambda entry: (entry.seed, entry.strategy != reference)), 1):
        name = f"{number}/{len(entries)} {entry.strategy} with seed={entry.seed}"
        own = entry.settings.config.budget.device_hours
        if own is None and entry.strategy != reference and entry.seed not in hours:
            failed[entry.root] = f"left out, since {reference} with seed={entry.seed} failed and so the budget is not known"
            progress.say(f"{name}: {failed[entry.root]}")
            continue
        settings = entry.settings
        if own is None and entry.strategy != reference:
            settings = _until(settings, hours[entry.seed])
        elif own is not None and not limited:
            settings = _until(settings, own)
        try:
            _search(entry.root, settings, progress, name)
        except SearchError as error:
            failed[entry.root] = str(error)
            progress.say(f"{name}: failed: {error}")
            continue
        finished.append(entry.root)
        if entry.strategy == reference:
            hours[entry.seed] = device_seconds(open_run(entry.root))[-1] / 3600
    return Outcome(tuple(finished), failed)


def _until(settings: SearchSettings, hours: float) -> SearchSettings:
    """Ends when the hours are spent, and not before."""
    changes = {"budget": Budget(device_hours=hours), "generations": MOST_GENERATIONS}
    return dataclasses.replace(settings, config=settings.config.model_copy(update=changes))


def _search(root: Path, settings: SearchSettings, progress: Progress, name: str) -> None:
    place, plan = os.path.relpath(root), Store(root).read("run.json", Plan)
    alike = plan is not None and (plan.config, plan.strategy, plan.objective) == (
        settings.config,
        dict(settings.strategy),
        dict(settings.objective),
    )
    if alike and (root / "result.json").is_file():
        progress.say(f"{name}: has come to its end before, in {place}")
        return
    progress.say(f"{name}: in {place}")
    driver.search(settings, root, progress)
