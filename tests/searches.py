"""A tiny search as the tests run it, and all that one decides. For the files that run whole searches."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from hpc_compress import analysis, config, driver, identity
from hpc_compress.launch.local import Debug
from hpc_compress.records import Result
from hpc_compress.store import Store


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

    def run(self, root: Path, *more: str, launcher: Any = None, progress: Any = None) -> Result:
        values = self.compose(*self.overrides, *more)
        parts = {name: values.pop(name) for name in ("strategy", "objective", "launcher", "cluster", "retries")}
        run = config.validate(config.RunConfig, values)
        settings = driver.SearchSettings(run, parts["strategy"], parts["objective"], launcher or Debug(), parts["retries"])
        return driver.search(settings, root, progress or Silent())


def through_kills(setup: Setup, folder: Path, *more: str) -> Path:
    """Run it by the command line and kill -9 the driver, or one of its workers, at random moments again and again, until it
    comes to its end; returns the run folder. No finished work is repeated."""
    root = folder / "results" / "test"
    command = [sys.executable, "-m", "hpc_compress.cli", "search", *setup.overrides, *more, "retries=9"]
    chance = random.Random(0)
    known: dict[Path, tuple[int, bytes]] = {}
    kills = 0
    for attempt in range(7):
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        enough = len(known) + chance.randrange(3)  # outcomes; no time, since machines differ
        while process.poll() is None and len(list(root.glob("tasks/*/outcome.json"))) < enough:
            time.sleep(0.02)
        try:
            output, _ = process.communicate(timeout=chance.uniform(0, 2) if attempt < 6 else 300)
        except subprocess.TimeoutExpired:
            workers = _workers(root)
            victim = chance.choice(workers) if workers and chance.random() < 0.5 else process.pid
            os.kill(victim, signal.SIGKILL)
            kills += 1
            if victim != process.pid:
                time.sleep(chance.uniform(0, 8))
                process.kill()
            output, _ = process.communicate()
        for path, before in known.items():
            assert (path.stat().st_mtime_ns, path.read_bytes()) == before, "finished work was repeated"
        whole = [path for path in root.glob("tasks/*/outcome.json") if Store(root).outcome(path.parent.name)]
        known = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in whole}
        if process.returncode == 0:
            break
    assert process.returncode == 0, output
    assert kills >= 2
    return root


def _workers(root: Path) -> list[int]:
    """Processes of local jobs of this run, found as any user would find them."""
    found = subprocess.run(["pgrep", "-f", f"submitit.*{root}"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def tiny(folder: Path, model: Path) -> list[str]:
    """Overrides of a search that takes seconds, with its sentences in a folder."""
    words = random.Random(0)
    rows = [(words.choice(["good", "great", "bad", "dull"]), words.choice(["film", "plot"])) for _ in range(120)]
    table = pd.DataFrame({"text": [" ".join(row) for row in rows], "label": [row[0] in ("good", "great") for row in rows]})
    table.assign(label=table["label"].map({True: "pos", False: "neg"})).to_csv(folder / "rows.csv", index=False)
    return [
        f"model.path={model}",
        "model.fine_tune={epochs: 2, learning_rate: 1e-3, batch_size: 16}",
        "dataset=file",
        f"dataset.train={folder / 'rows.csv'}",
        "dataset.name=words",
        "protocol={batch_size: 8, sentences: 16, warmup_passes: 0, min_passes: 2, max_passes: 2}",
        "generations=2",
        "strategy=genetic",
        "strategy.population=4",
        # The published mutations: cheap, and in the tests that follow a genome its shape is known.
        "strategy.mutations.prune.weight=0",
        "strategy.mutations.prune_time.weight=0",
        "strategy.mutations.prune_heads.weight=0.5",
        "strategy.fine_tune.learning_rate=1e-3",
        "strategy.distill.learning_rate=1e-3",
        # The same on every machine, whatever is installed.
        "strategy.quantizations={none: {weight: 0}, bf16: {weight: 0}, onnx_int8: {weight: 0}}",
        "strategy.quantizations={int8: {weight: 0.25}, nf4: {weight: 0.25}}",
        "strategy.vocabularies.none.weight=0",
        "objective.b=0",  # what was timed must not decide, so that runs can be compared
        "name=test",
    ]


def artifacts(root: Path) -> tuple[Path, Path]:
    """Where a run keeps its best model and its tokenizer, or would."""
    run, store = analysis.open_run(root), Store(root)
    return store.path(identity.deployed_key(run.outcomes[run.result.best].task)), store.path("tokenizer")


def story(root: Path) -> Any:
    """All that a search decided, without what it timed."""
    run = analysis.open_run(root)
    scores = {
        id: (str(o.task.genome), o.task.split, o.measurement and (o.measurement.metrics, o.measurement.model_bytes))
        for id, o in run.outcomes.items()
    }
    return run.generations, run.result and run.result.model_copy(update={"front": ()}), scores  # the front depends on times
