"""Where a run stands, in a few lines, from its files alone."""

import itertools
import platform
import time
from collections import Counter
from pathlib import Path
from statistics import median

from hpc_compress import door
from hpc_compress.analysis import found
from hpc_compress.analysis.runs import Reader, Run, open_run
from hpc_compress.process import Process
from hpc_compress.records import HEARTBEAT_SECONDS
from hpc_compress.summary import describe, figures

FRONT = 6  # models of the front that are named
Line = tuple[str, str]  # what it is about, and what is said


def status(root: Path) -> str:
    """Where a run stands, from its files alone."""
    return status_of(open_run(root))


class Watch:
    """A run that is looked at again and again. What its front is, is found out anew after each generation only."""

    def __init__(self, root: Path) -> None:
        self._reader = Reader(root)
        self._generations, self._front = -1, list[Line]()

    def look(self) -> tuple[Run, str]:
        """The run, and where it stands. Raises: as `Reader.read`."""
        run = self._reader.read()
        if len(run.generations) != self._generations or run.result is not None:
            self._generations, self._front = len(run.generations), _front(run)
        return run, status_of(run, self._front)


def _front(run: Run) -> list[Line]:
    front = [run.seen[task_id] for task_id in found.front_of(run)]
    lines = []
    for index, model in enumerate(front[:FRONT]):
        assert model.measurement is not None
        lines.append(("" if index else "front", f"{figures(model.measurement)}: {model.genome}"))
    if len(front) > FRONT:
        lines.append(("", f"and {len(front) - FRONT} more, of lower quality"))
    return lines + [("device", line) for line in found.fronts(run)]


def status_of(run: Run, front: list[Line] | None = None) -> str:
    """front: the lines on its front, where they are known."""
    lines = [
        ("run", str(run.root)),
        ("compresses", f"{run.plan.base.name} on {run.plan.dataset.name}"),
        ("generation", f"{len(run.generations)} of {run.plan.config.generations} done"),
    ]
    if run.heartbeat and run.result is None:
        lines.append(("now", f"{run.heartbeat.doing}: {run.heartbeat.done} of {run.heartbeat.total} tasks settled"))
        if run.heartbeat.jobs:
            lines.append(("jobs", ", ".join(f"{number} {state}" for state, number in run.heartbeat.jobs.items())))
    failures = Counter(describe(seen.failure)[:100] for seen in run.seen.values() if seen.failure)
    lines.append(("tasks", f"{run.settled} of {run.tasks} settled, {failures.total()} failed"))
    lines += [("", f"{number} x {reason}") for reason, number in failures.most_common(5)]
    if screened := {run.candidate_of(task_id) for task_id, seen in run.seen.items() if seen.divergence is not None}:
        measured = {task_id for task_id, seen in run.seen.items() if seen.measurement and seen.split == "search"}
        lines.append(("candidates", f"{len(screened)} screened, {len(screened & measured)} of them measured"))
    best = run.seen.get(run.best) if run.best else None
    if best and best.measurement:
        lines.append(("best so far", f"{best.genome}: {figures(best.measurement)}"))
    lines += _front(run) if front is None else front
    if hours := gpu_hours(run):
        lines.append(("GPU time", f"{hours:.2f} hours"))
    lines += [("damaged", line) for line in run.damage_lines()]
    if run.result is not None:
        lines.append(("state", f"ended: {run.result.stopped}"))
    else:
        lines += [("time left", left)] if (left := _time_left(run)) else []
        lines.append(("state", _sign_of_life(run)))
    return "\n".join(f"{what:<11} {door.one_line(text, most=4096)}" for what, text in lines)


def gpu_hours(run: Run) -> float:
    """Of ended jobs of a cluster as the accounting counts them; of everything else the time that its tasks took on a GPU."""
    seconds, counted = 0.0, set()
    for submission, ends in run.jobs:
        for index, end in ends.ends.items():
            seconds += end.seconds * ends.gpus
            if 0 <= index < len(submission.packs):
                counted |= {task_id for bundle in submission.packs[index] for task_id in bundle}
    base = next((seen.measurement for seen in run.timed.values() if seen.is_base), None)
    for task_id, seen in run.timed.items():
        # A study does not say where it ran. All tasks of a run are for one kind of device.
        measurement = base if seen.study else seen.measurement
        if measurement and measurement.device_type == "cuda" and task_id not in counted:
            seconds += seen.seconds
    return seconds / 3600


def _time_left(run: Run) -> str:
    """From the pace of the generations so far."""
    names = [f"tasks/{task_id}/outcome.json" for task_id, seen in run.seen.items() if seen.is_base and seen.split == "search"]
    names += [f"generations/{generation.number:04d}.json" for generation in run.generations]
    marks = [mark for name in names if (mark := _written(run.root / name)) is not None]
    if len(marks) < 2:
        return ""
    pace = median(max(0.0, later - earlier) for earlier, later in itertools.pairwise(marks))
    left = run.plan.config.generations - len(run.generations)
    seconds = max(0.0, left * pace - max(0.0, time.time() - marks[-1]))
    return f"about {_duration(seconds)} for {left} more, at {_duration(pace)} a generation"


def _written(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _sign_of_life(run: Run) -> str:
    heartbeat, beat = run.heartbeat, _written(run.root / "driver.json")
    if heartbeat is None or beat is None:
        return "not started; the same search command goes on with it"
    age = max(0.0, time.time() - beat)
    where = f"on {heartbeat.host}" + (f" in job {heartbeat.job_id}" if heartbeat.job_id else f", process {heartbeat.pid}")
    here = heartbeat.host == platform.node()
    lives = Process(heartbeat.pid, heartbeat.started).lives() if here else age < 4 * HEARTBEAT_SECONDS
    if lives and not heartbeat.ended:
        return f"driver at work {where}, last sign of life {_duration(age)} ago"
    return f"no driver at work; the last one, {where}, was there {_duration(age)} ago; the same search command goes on with it"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
