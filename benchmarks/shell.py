"""The shell alone: what it costs to bring tasks to outcomes, measured with tasks that do nothing.

Simulated cluster: a search of 10,000 tasks on 64 nodes in virtual time, tasks of 10 minutes on average, log-normal. Gives the
driver's CPU time a task, by quarter of the search (it must not grow with history), and how busy the nodes are when selection
waits for a whole generation and when it does not. The time that the simulation itself takes is not counted.

Real cluster, where there is one: wall time from the first submission to the last outcome seen, for the same tasks sent by this
package and by a bare `sbatch --array` whose elements do the same work in a plain Python script. The bare array has its tasks
described before the clock starts, and nobody who looks after lost jobs.

Reading: CPU time of following a run folder of 10,000 tasks with few changes, and of loading it as a table. Examples:

    python benchmarks/shell.py --out results
    python benchmarks/shell.py --out results --only cluster --tasks 1000 --partition main --parallel 16
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[1]
TESTS = REPOSITORY / "tests"
sys.path.insert(0, str(TESTS))  # before the imports of light and simulated, which lie there

# ruff: noqa: E402
import light
import pandas as pd
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from searches import Silent
from simulated import SimulatedSlurm, nothing_to_load

from hpc_compress import cli, config, defaults, driver
from hpc_compress.analysis import Watch, load_runs
from hpc_compress.dispatch import Dispatch
from hpc_compress.launch.slurm import Cluster, Commands, Slurm
from hpc_compress.records import Generation, Plan
from hpc_compress.search.space import Shape
from hpc_compress.store import Store
from hpc_compress.types import Genome, Step, Task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["simulation", "cluster", "reading"], help="one of the parts")
    parser.add_argument("--population", type=int, default=250, help="children a generation of the simulated search")
    parser.add_argument("--generations", type=int, default=40, help="of the simulated search")
    parser.add_argument("--nodes", type=int, default=64, help="of the simulated cluster")
    parser.add_argument(
        "--select-after",
        type=float,
        default=0.5,
        help="share of a generation that selection waits for, to compare with 1; nodes stay busy when "
        "population * (1 - select_after) is more than nodes",
    )
    parser.add_argument("--tasks", type=int, default=1000, help="on the real cluster; each is a start of Python there")
    parser.add_argument("--parallel", type=int, default=16, help="elements at a time on the real cluster")
    parser.add_argument("--partition", help="of the real cluster; its default when left out")
    parser.add_argument("--mem-gb", type=float, default=0.3, help="of an element on the real cluster")
    parser.add_argument("--scratch", type=Path, help="folder that the nodes of the real cluster share; --out when left out")
    parser.add_argument("--read-tasks", type=int, default=10_000, help="in the run folder that is read")
    parser.add_argument("--follow-seconds", type=float, default=60, help="for which it is followed")
    parser.add_argument("--out", type=Path, help="folder for shell.md")
    args = parser.parse_args()

    parts = [
        "# The shell alone",
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, tasks that do nothing.",
    ]
    for name, part in {"simulation": simulation, "cluster": cluster, "reading": reading}.items():
        parts += part(args) if args.only in (None, name) else []
    text = "\n\n".join(parts) + "\n"
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "shell.md").write_text(text, encoding="utf-8")


# --- a simulated cluster ---


class Timed(SimulatedSlurm):
    """Knows how long it has been at work itself, and when all nodes were last at work."""

    own_seconds = 0.0
    last_full = 0.0

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        if not self.free:
            self.last_full = self.clock


def _counted(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(self: Timed, *args: Any) -> Any:
        start = time.process_time()
        try:
            return method(self, *args)
        finally:
            self.own_seconds += time.process_time() - start

    return call


for _name in ("submit", "attach", "queue", "accounting", "accounted", "cancel", "sleep"):
    setattr(Timed, _name, _counted(getattr(Timed, _name)))


class Marks(Silent):
    """Notes the driver's CPU time and the cluster's clock where a generation or the report begins."""

    def __init__(self, slurm: Timed) -> None:
        super().__init__()
        self.slurm = slurm
        self.marks: dict[str, tuple[float, float]] = {}

    def say(self, text: str) -> None:
        what = text.partition("/")[0].partition(":")[0]
        if what.startswith(("generation", "report")) and what not in self.marks:
            self.marks[what] = (time.process_time() - self.slurm.own_seconds, self.slurm.clock)


def simulation(args: argparse.Namespace) -> list[str]:
    runs = [_simulate(args, share) for share in (1.0, args.select_after)]
    first = runs[0]
    title = f"## Simulated: {first['tasks']} tasks in {args.generations} generations, {args.nodes} nodes"
    return [title, pd.DataFrame(runs).set_index("select_after").T.to_markdown(floatfmt=".4g")]


def _simulate(args: argparse.Namespace, share: float) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    (folder / "model").mkdir()
    # The path of the model is part of what a task is, and how long a task takes follows from that: so it is always the same.
    with _removed(folder), contextlib.chdir(folder):
        # Trainings that differ in their learning rate alone: enough genomes that no child is a child of before.
        mutations = [
            f"+strategy.mutations.m{n}={{weight: 1, operator: fine_tune, learning_rate: {n}e-6}}" for n in range(1, 51)
        ]
        overrides = [
            *nothing_to_load(Path("model")),
            *("~strategy.mutations.drop_layers", "~strategy.mutations.prune_heads", *mutations),
            *(f"strategy.population={args.population}", "strategy.mutation_probability=1"),
            *(f"generations={args.generations}", f"select_after={share}", "probe=false", "timings=1"),
        ]
        with initialize_config_dir(str(cli.conf_dir()), version_base="1.3"):
            composed: Any = OmegaConf.to_container(compose("config", overrides), resolve=True)
        values = defaults.chosen(composed, config.build(composed["launcher"], "launcher"))
        parts = {name: values.pop(name) for name in ("strategy", "objective", "launcher", "cluster", "retries")}
        slurm = Timed(nodes=args.nodes)
        slurm.forever = math.inf
        launcher = Slurm(cluster=Cluster(array_parallelism=args.nodes), poll_seconds=30)
        launcher._commands = slurm  # type: ignore[assignment]
        progress = Marks(slurm)
        run = config.validate(config.RunConfig, values)
        driver.search(driver.SearchSettings(run, parts["strategy"], parts["objective"], launcher), folder / "run", progress)
        marks = progress.marks
        (cpu_start, start), (cpu_end, end) = marks["generation 1"], marks["report"]
        full = slurm.last_full  # before the report, which is of few tasks
        tasks = sum(any(start <= life.began < end for life in element.lives) for element in slurm.elements)
        edges = [1 + round(args.generations * quarter / 4) for quarter in range(4)]
        starts = [marks[f"generation {edge}"][0] for edge in edges] + [marks["report"][0]]
        per_quarter = [4000 * (b - a) / tasks for a, b in itertools.pairwise(starts)]
        return {
            "select_after": share,
            "tasks": tasks,
            "driver CPU a task, ms": 1000 * (cpu_end - cpu_start) / tasks,
            **{f"driver CPU a task, ms, quarter {n}": value for n, value in enumerate(per_quarter, 1)},
            "hours": (end - start) / 3600,
            "hours if no node ever waited": _work(slurm, start, end) / args.nodes / 3600,
            "nodes busy, %": 100 * _work(slurm, start, end) / args.nodes / (end - start),
            "hours at the end with too few tasks left for all nodes": (end - full) / 3600,
            "nodes busy before that, %": 100 * _work(slurm, start, full) / args.nodes / (full - start),
        }


@contextlib.contextmanager
def _removed(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _work(slurm: SimulatedSlurm, start: float, end: float) -> float:
    """Node-seconds between two moments."""
    lives = [life for element in slurm.elements for life in element.lives]
    return sum(max(0.0, min(life.ended or end, end) - max(life.began, start)) for life in lives)


# --- a real cluster ---

BARE = """
import sys
sys.path[:0] = [{tests!r}, {repository!r}]
import light
ids = open({root!r} + "/ids").read().split()
for _ in light.run({root!r}, ids[int(sys.argv[1]) * {per_job} : (int(sys.argv[1]) + 1) * {per_job}]):
    pass
"""


def cluster(args: argparse.Namespace) -> list[str]:
    title = "## A real cluster"
    if shutil.which("sbatch") is None:
        return [title, "Skipped: there is no sbatch on this machine."]
    commands = Commands()
    if args.tasks > commands.limits(args.partition, None, None).array_size:
        return [title, f"Skipped: this cluster admits no array of {args.tasks} elements; choose fewer --tasks."]
    parent = args.scratch or args.out or Path.cwd()
    parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="shell-", dir=parent.absolute()))
    rows = []
    with _removed(scratch):
        _drain(commands, _bare(args, scratch / "warm", 1, args.parallel)[1])  # files into the page cache
        for per_job in (1, 10):
            bare_seconds, name = _bare(args, scratch / f"bare-{per_job}", per_job, args.tasks)
            _drain(commands, name)
            own_seconds, name = _own(args, scratch / f"own-{per_job}", per_job, args.tasks)
            _drain(commands, name)
            rows.append((per_job, -(-args.tasks // per_job), bare_seconds, own_seconds, own_seconds / bare_seconds))
        start = time.monotonic()
        name = _sbatch(args, args.tasks, scratch, "--wrap=true")
        _drain(commands, name)
        empty_seconds = time.monotonic() - start
    columns = ["tasks a job", "jobs", "bare array, s", "hpc_compress, s", "ratio"]
    table = pd.DataFrame(rows, columns=columns).to_markdown(index=False, floatfmt=".4g")
    note = (
        f"An array of {args.tasks} elements that only call `true` takes {empty_seconds:.0f} s until squeue lists none of them."
    )
    return [f"{title}: {args.tasks} tasks, {args.parallel} at a time", table, note]


def _own(args: argparse.Namespace, root: Path, per_job: int, count: int) -> tuple[float, str]:
    """Seconds, and the start of the names of the jobs."""
    site = Cluster(
        partition=args.partition,
        gpus_per_node=0,
        cpus_per_task=1,
        mem_gb=args.mem_gb,
        array_parallelism=args.parallel,
        # As for the bare array, whose script has no use for it: threads that nobody needs take a while to start.
        setup=("export OMP_NUM_THREADS=1", f"export PYTHONPATH={shlex.quote(f'{REPOSITORY}:{TESTS}')}"),
    )
    root.mkdir()
    store, progress, tasks = Store(root), Silent(), light.made_up(count)
    start = time.monotonic()
    with Slurm(cluster=site, worker="light.run", tasks_per_job=per_job).open(root, progress.working, progress.say) as jobs:
        outcomes = Dispatch(store, jobs, progress, retries=2).settle(tasks, "tasks")
        seconds = time.monotonic() - start
        while jobs.in_flight():  # until every job is seen to have ended: this is not part of the work
            jobs.poll()
    assert all(outcome.measurement for outcome in outcomes)
    assert not any("lost" in line for line in progress.lines), "jobs were lost on the way; the time says nothing"
    return seconds, root.name


def _bare(args: argparse.Namespace, root: Path, per_job: int, count: int) -> tuple[float, str]:
    """Seconds, and the start of the names of the jobs."""
    store = Store(root)
    ids = [store.add_task(task) for task in light.made_up(count)]
    (root / "ids").write_text("\n".join(ids))
    (root / "element.py").write_text(BARE.format(tests=str(TESTS), repository=str(REPOSITORY), root=str(root), per_job=per_job))
    script = f"#!/bin/bash\n{shlex.quote(sys.executable)} {shlex.quote(str(root / 'element.py'))} $SLURM_ARRAY_TASK_ID\n"
    (root / "element.sh").write_text(script)
    start = time.monotonic()
    name = _sbatch(args, -(-count // per_job), root, str(root / "element.sh"))
    missing = [root / "tasks" / task_id / "outcome.json" for task_id in ids]
    while missing := [path for path in missing if not path.exists()]:
        time.sleep(0.5)
    return time.monotonic() - start, name


def _sbatch(args: argparse.Namespace, elements: int, root: Path, what: str) -> str:
    name = f"{root.name}-bare"
    options = [f"--array=0-{elements - 1}%{args.parallel}", f"--mem={round(1024 * args.mem_gb)}M", f"--job-name={name}"]
    options += ["--cpus-per-task=1", "--output=/dev/null", "--error=/dev/null"]
    options += [f"--partition={args.partition}"] if args.partition else []
    subprocess.run(["sbatch", "--parsable", *options, what], check=True, capture_output=True)
    return name


def _drain(commands: Commands, name: str) -> None:
    """Wait until none of these jobs is left, so that the next ones find the cluster free."""
    while any(row.name.startswith(name) for row in commands.queue()):
        time.sleep(0.5)


# --- reading a run folder ---


def reading(args: argparse.Namespace) -> list[str]:
    folder = Path(tempfile.mkdtemp(dir=args.scratch))
    with _removed(folder):
        store, late = _long_run(folder, args.read_tasks, generation_size=250)
        load = [_cpu_seconds(lambda: load_runs(folder))[1] for _ in range(2)]
        (folder / "seen.json").unlink()
        watch = Watch(folder)
        _, first_look = _cpu_seconds(watch.look)
        start, looks, seconds = time.monotonic(), 0, 0.0
        while time.monotonic() - start < args.follow_seconds:
            time.sleep(2)
            if late:
                store.settle(light.answer(late.pop()))
            seconds += _cpu_seconds(watch.look)[1]
            looks += 1
        elapsed = time.monotonic() - start
        record_bytes = (folder / "generations" / "0001.json").stat().st_size
    rows = {
        "load_runs for the first time, CPU s": load[0],
        "load_runs again, CPU s": load[1],
        "first look of status --follow, CPU s": first_look,
        f"{looks} further looks in {elapsed:.0f} s, CPU s": seconds,
        "share of one core, %": 100 * seconds / elapsed,
        "record of a generation of 250, bytes": record_bytes,
    }
    table = pd.Series(rows, name="").to_frame().to_markdown(floatfmt=".4g")
    return [f"## Reading a run folder of {args.read_tasks} tasks, one more settled before each look", table]


def _cpu_seconds(do: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return do(), time.process_time() - start


def _long_run(folder: Path, count: int, generation_size: int) -> tuple[Store, list[Task]]:
    """A run folder in the middle of its last generation, and the tasks of it that are not settled yet."""
    settings = config.RunConfig(
        name="long", model=config.ModelConfig(path="none"), dataset=config.DatasetConfig(name="none"), generations=1000
    )
    operators = ("prune", "distill", "quantize", "prune_heads", "fine_tune", "drop_layers")
    template = light.made_up(1)[0]
    genomes = [
        Genome(steps=tuple(Step(operator=name, params={"share": 0.1, "epochs": n, "units": ["heads"]}) for name in operators))
        for n in range(count - 1)
    ]
    tasks = [template.model_copy(update={"genome": genome}) for genome in (Genome(), *genomes)]
    store = Store(folder)
    objective = {"_target_": "hpc_compress.search.objective.Product"}
    shape = Shape(heads=(4, 4))
    plan = Plan(config=settings, strategy={}, objective=objective, base=template.base, dataset=template.dataset, shape=shape)
    store.write("run.json", plan)
    # Without the fsync of a real writer: this is not what is measured.
    with mock.patch("os.fsync"):
        ids = [store.add_task(task) for task in tasks]
        late = tasks[-50:]
        for task in tasks[:-50]:
            outcome = light.answer(task)
            assert outcome.measurement is not None
            times = {"latency_ms": outcome.measurement.latency_ms * 20, "base_latency_ms": (10.0,) * 20}
            store.settle(outcome.model_copy(update={"measurement": outcome.measurement.model_copy(update=times)}))
    for number, start in enumerate(range(1, count - generation_size, generation_size), 1):
        born = tuple(ids[start : start + generation_size])
        parents = (ids[0],) * len(born)
        generation = Generation(number=number, born_ids=born, parents=parents, told=born, population=born[:100])
        store.write(f"generations/{number:04d}.json", generation)
    return store, late


if __name__ == "__main__":
    main()
