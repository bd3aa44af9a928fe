"""A tiny search as the tests run it, and all that one decides. For the files that run whole searches."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpc_compress import analysis, config, driver
from hpc_compress.launch.local import Debug


class Silent:
    """Progress that remembers what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def working(self, what: str, done: int, total: int) -> None: ...


@dataclasses.dataclass
class Setup:
    """A search on a tiny checkpoint and two-word sentences, as overrides of the command line."""

    overrides: list[str]
    compose: Callable[..., dict[str, Any]]

    def run(self, root: Path, *more: str, launcher: Any = None, progress: Any = None) -> driver.Result:
        values = self.compose(*self.overrides, *more)
        parts = {name: values.pop(name) for name in ("strategy", "objective", "launcher", "cluster", "retries")}
        settings = config.validate(config.RunConfig, values)
        launcher, progress = launcher or Debug(), progress or Silent()
        return driver.search(
            settings, parts["strategy"], parts["objective"], config.build, launcher, root, progress, parts["retries"]
        )


def story(root: Path) -> Any:
    """All that a search decided, without what it timed."""
    run = analysis.open_run(root)
    scores = {
        id: (str(o.task.genome), o.task.split, o.measurement and (o.measurement.metrics, o.measurement.model_bytes))
        for id, o in run.outcomes.items()
    }
    return run.generations, run.result, scores
