"""One search on a private Slurm cluster while its parts are killed at random, and what came of it.

Needs Slurm and slurm/lab. The worker imports no torch: it sleeps, answers, and keeps a diary. Killed, always by signal 9, are

    driver       `hpc-compress search`, while it leads the search; the same command is started again
    worker       the Python process of a job
    slurmd       the daemon of a node; the node's jobs go on
    node         the daemon of a node, and all processes of the jobs on it
    controller   slurmctld

What was killed of the cluster is started again after up to --outage seconds. Other kills go on in the meantime. At the end the
search must equal the same search that ran undisturbed in one process. No task may be begun again once its outcome was written.

    python benchmarks/kills.py --kills 100 --seed 0 --out results
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY)]  # before the imports of cluster and searches, which lie there

# ruff: noqa: E402
import pandas as pd
from cluster import MISSING, Lab, command, private_cluster
from conftest import save_checkpoint
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from searches import Setup, story, tiny

from hpc_compress import cli, config, defaults
from hpc_compress.launch.local import Debug
from hpc_compress.records import Heartbeat, Submission
from hpc_compress.store import Store

POPULATION = 16
TASK_SECONDS = 1.0  # while kills go on
LAST_SECONDS = 300.0  # that the search may take from the last kill on
GENERATION_SECONDS = 15.0  # and so much more for each of its generations
KINDS = ("driver", "worker", "slurmd", "node", "controller")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="which kills, and when; and of the search")
    parser.add_argument("--minutes", type=float, default=60, help="after which nothing more is killed")
    parser.add_argument("--pause", type=float, default=6, help="seconds between two kills, at the most")
    parser.add_argument("--outage", type=float, default=12, help="seconds until what was killed is started again, at the most")
    parser.add_argument("--generations", type=int, help="of the search; a quarter of the kills, and 2, when left out")
    parser.add_argument("--out", type=Path, help="folder for kills.md")
    args = parser.parse_args()
    if MISSING:
        raise SystemExit(f"Slurm is not installed: no {', '.join(MISSING)}")
    plan = Plan(args.kills, args.seed, args.generations or 2 + args.kills // 4, args.minutes, args.pause, args.outage)
    with tempfile.TemporaryDirectory() as folder, private_cluster() as lab:
        found = disturbed(lab, Path(folder), plan)
    text = report(found)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "kills.md").write_text(text, encoding="utf-8")
    if not found.well:
        raise SystemExit(1)


@dataclass(frozen=True)
class Plan:
    """What is to be killed, and when."""

    kills: int
    seed: int
    generations: int  # of the search
    minutes: float = 60  # after which nothing more is killed
    pause_seconds: float = 6  # between two kills, at the most
    outage_seconds: float = 12  # until what was killed of the cluster is started again, at the most


@dataclass
class Found:
    """What became of the search."""

    wished: int  # kills
    kills: Counter[str] = field(default_factory=Counter)  # by kind
    seconds: float = 0.0  # from the first start of the driver to the end of the search
    kill_seconds: float = 0.0  # to the last kill
    drivers: int = 0  # started
    gave_up: list[str] = field(default_factory=list)  # last words of drivers that ended by themselves, before the search did
    tasks: int = 0
    answers: int = 0  # begun
    again: int = 0  # begun once more, since a kill had come before the outcome
    repeated: int = 0  # begun although the outcome was written
    jobs: int = 0  # elements of arrays that were submitted
    equal: bool = False

    @property
    def well(self) -> bool:
        return self.equal and not self.repeated and not self.gave_up


def disturbed(lab: Lab, folder: Path, plan: Plan) -> Found:
    (folder / "model").mkdir()
    save_checkpoint(folder / "model", "bert", layers=3, heads=4, hidden=128, ffn=64, num_labels=2, head=False)
    # Trainings that differ in their learning rate alone: enough genomes that no child is a child of before.
    mutations = [f"+strategy.mutations.m{n}={{weight: 1, operator: fine_tune, learning_rate: {n}e-6}}" for n in range(1, 51)]
    own = [*tiny(folder, folder / "model"), "~strategy.mutations.drop_layers", *mutations, "strategy.mutation_probability=1"]
    own += [f"strategy.population={POPULATION}", f"generations={plan.generations}", f"seed={plan.seed}"]
    setup = Setup(own, _composed)
    setup.run(folder / "wanted", "probe=false", launcher=Debug(worker="light.run"))
    search = _Search(setup, folder)
    try:
        found = _kill(lab, search, plan)
    finally:
        search.process.kill()
    found.equal = story(search.root) == story(folder / "wanted")
    _count(search.root, found)
    return found


def _composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(cli.conf_dir()), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose("config", list(overrides)), resolve=True, throw_on_missing=True)
    return defaults.chosen(values, config.build(values["launcher"], "launcher"))


class _Search:
    """The search, whose driver is started again as often as it is killed."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        self.folder, self.root = folder, folder / "results" / "test"
        self.root.parent.mkdir()
        self.take(TASK_SECONDS)
        # A task may lose many jobs here that are none of its fault.
        words = ("retries=1000", "++launcher.worker=light.diary", "launcher.tasks_per_job=4", "cluster.array_parallelism=8")
        self.command = command(setup, *words)
        self.environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY / 'tests'}:{REPOSITORY}"}
        self.log = (folder / "driver.log").open("ab")
        self.process = self.start()

    def take(self, seconds: float) -> None:
        """From now on, for each task."""
        draft = self.root.with_name("seconds.new")
        draft.write_text(str(seconds))
        draft.replace(self.root.with_name("seconds"))

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.command, cwd=self.folder, env=self.environment, stdout=self.log, stderr=subprocess.STDOUT)

    @property
    def leads(self) -> bool:
        """Whether the driver that was started last has taken over the search."""
        last = Store(self.root).read("driver.json", Heartbeat)
        return last is not None and last.pid == self.process.pid

    def start_again(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process = self.start()


def _kill(lab: Lab, search: _Search, plan: Plan) -> Found:
    """Kill until it was done so often, then see the search to its end."""
    found, chance, begin = Found(plan.kills), random.Random(plan.seed), time.monotonic()
    revive_at, next_at, end_at = float("inf"), begin + chance.uniform(0, plan.pause_seconds), begin + 60 * plan.minutes
    down: set[str] = set()
    found.drivers = 1
    while True:
        now = time.monotonic()
        if search.process.poll() is not None:
            if search.process.returncode == 0:
                break
            lines = (search.folder / "driver.log").read_text(errors="replace").strip().splitlines()
            found.gave_up.append(lines[-1] if lines else "")
            if len(found.gave_up) > 20:
                raise RuntimeError("the driver gives up again and again: " + "\n".join(lines[-20:]))
            search.start_again()
            found.drivers += 1
        if now >= revive_at:
            lab.start()
            down.clear()
            revive_at = float("inf")
        if found.kills.total() < found.wished and now < end_at:
            if now >= next_at and (kind := _one(lab, search, chance, down)):
                found.kills[kind] += 1
                found.kill_seconds = time.monotonic() - begin
                found.drivers += kind == "driver"
                if kind in ("slurmd", "node", "controller"):
                    revive_at = min(revive_at, time.monotonic() + chance.uniform(0, plan.outage_seconds))
                next_at = time.monotonic() + chance.uniform(0, plan.pause_seconds)
                print(f"{found.kills.total()} {found.kill_seconds:.0f} s: {kind}", file=sys.stderr, flush=True)
        else:
            search.take(0)
            if now - begin > found.kill_seconds + LAST_SECONDS + GENERATION_SECONDS * plan.generations:
                raise RuntimeError(f"the search did not end:\n{(search.folder / 'driver.log').read_text()[-3000:]}")
        time.sleep(0.1)
    found.seconds = time.monotonic() - begin
    return found


def _one(lab: Lab, search: _Search, chance: random.Random, down: set[str]) -> str | None:
    """Kill one thing; its kind, or None if there is none of that kind just now. down: daemons that were killed."""
    kind = chance.choice(KINDS)
    if kind == "driver":
        if not search.leads:
            return None
        search.start_again()
    elif kind == "worker":
        workers = [pid for pid, (program, _) in lab.processes().items() if program.startswith("python")]
        if not (workers and _ended(chance.choice(workers))):
            return None
    else:
        node = f"n{chance.randint(1, 4)}"
        daemon = "slurmctld" if kind == "controller" else f"slurmd-{node}"
        if daemon in down:
            return None
        lab.kill(daemon)
        down.add(daemon)
        for pid in [pid for pid, (_, where) in lab.processes().items() if where == node] if kind == "node" else []:
            _ended(pid)
    return kind


def _ended(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def _count(root: Path, found: Found) -> None:
    """What the diary says. A task that two processes had begun before either wrote its outcome counts as `again`."""
    began: Counter[str] = Counter()
    wrote: set[str] = set()
    for line in root.with_name("diary").read_text().splitlines():
        what, task_id = line.split()
        if what == "began":
            began[task_id] += 1
            found.repeated += task_id in wrote
        else:
            wrote.add(task_id)
    found.tasks, found.answers = len(began), began.total()
    found.again = found.answers - found.tasks - found.repeated
    found.jobs = sum(len(submission.packs) for submission in Store(root).read_all("jobs/*/submission.json", Submission))


def report(found: Found) -> str:
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, which other work shared; Slurm with 4 simulated nodes on this host"
    )
    rows = {
        **{f"kills: {kind}": found.kills[kind] for kind in KINDS},
        "kills in all": found.kills.total(),
        "seconds to the last kill": round(found.kill_seconds),
        "seconds of the search": round(found.seconds),
        "drivers started": found.drivers,
        "drivers that gave up by themselves": len(found.gave_up),
        "elements of arrays submitted": found.jobs,
        "tasks": found.tasks,
        "answers begun": found.answers,
        "answers begun again, since a kill came before the outcome": found.again,
        "answers repeated although the outcome was written": found.repeated,
        "equal to the undisturbed search": "yes" if found.equal else "NO",
    }
    table = pd.DataFrame(rows.items(), columns=["", "this run"]).set_index("").to_markdown()
    short = (
        "" if found.kills.total() == found.wished else f"{found.wished} kills were asked for; time or the search ended before."
    )
    said = [f"- {line}" for line in found.gave_up]
    parts = [
        "# A search whose parts are killed at random",
        f"{machine}. `python {shlex.join(['benchmarks/kills.py', *sys.argv[1:]])}`",
        short,
        table,
        "\n".join(["Last words of the drivers that gave up by themselves:", *said]) if said else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    main()
