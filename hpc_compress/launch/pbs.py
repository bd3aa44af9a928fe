"""All that is known of PBS (PBS Professional, OpenPBS): its commands and what they print, what a job asks for, its states.

What a command prints is data from a stranger. A job in it that can't be read is skipped, and the first one is logged; an answer
that is no JSON is none.

Each element of an array unpickles what the driver has put into jobs/<name>/work-<index>.pkl before it called qsub.
"""

import json
import logging
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, PrivateAttr

from hpc_compress.door import one_line
from hpc_compress.launch import OwnJob, scheduler
from hpc_compress.launch.arrays import ArrayLauncher
from hpc_compress.launch.scheduler import Check, CommandError, Limits, Names, Options, RefusedError, Row, Scheduler, States

log = logging.getLogger(__name__)

INDEX = "PBS_ARRAY_INDEX"
ARRAY_SIZE = 10_000  # what a server admits that does not say it

# 17.server, 17[].server for an array, 17[3].server for an element. One number has at most 18 digits: Python refuses long ones.
JOB_ID = re.compile(r"([0-9]{1,18})(\[([0-9]{0,9})\])?(?:\.[^\s\[\]]*)?")
NODE = re.compile(r"[A-Za-z0-9._-]+")
SIZE = re.compile(r"([0-9]{1,15})([kmgt]?)b")
DURATION = re.compile(r"([0-9]{1,9}):([0-9]{2}):([0-9]{2})")
WAITING = dict.fromkeys("QWHT", "PENDING")
UNFINISHED = {**WAITING, "R": "RUNNING", "B": "RUNNING", "E": "EXITING", "S": "SUSPENDED", "U": "SUSPENDED", "M": "MOVED"}
ENDED = "FX"
ENDS = {"0": "COMPLETED", "-26": "OUT_OF_MEMORY", "-27": "OUT_OF_MEMORY", "-29": "TIMEOUT", "271": "TERMINATED"}
DELETED = 91  # substate of a job that ended before its Exit_status (the keys of ENDS) was known

# What commands say of jobs that have ended, or where no history of jobs is kept.
GONE = re.compile(r"unknown job id|has finished|job.history", re.I)
# What a busy or unreachable server says: it may have accepted the job or not.
BUSY = ("cannot connect", "connection", "timed out", "end of file", "system error", "shutting down", "temporarily", "try again")
# What it says when the user has too many jobs for now, or the array is too large.
FULL = ("would exceed", "maximum number of jobs", "array job exceeds")

CANCEL_SECONDS = 10.0  # that cancelled jobs get to end: qdel does not wait for them


class Commands(Scheduler):
    """A real server."""

    def __init__(self) -> None:
        self.complained = False  # a job was skipped

    def submit(self, folder: Path, works: Sequence[Callable[[], None]], options: Options) -> str:
        if shutil.which("qsub") is None:
            raise RefusedError("PBS's commands are not on this machine", "never")
        for index, work in enumerate(works):
            (folder / f"work-{index}.pkl").write_bytes(pickle.dumps(work))
        script = folder / "job.sh"
        script.write_text("\n".join(["#!/bin/bash", *options["lines"], ""]))
        array = ["-J", f"0-{len(works) - 1}"] if len(works) > 1 else []
        try:
            done = run("qsub", *options["words"], *array, str(script))
        except CommandError as error:
            raise RefusedError(str(error), "busy") from None
        if done.returncode:
            raise refusal(done.stderr.replace("qsub: ", "").strip() or f"exit code {done.returncode}")
        for line in reversed(done.stdout.splitlines()):
            if found := JOB_ID.fullmatch(line.strip()):
                return _plain(found)
        raise RefusedError(f"it printed no job id: {one_line(done.stdout, 100)}", "busy")

    def attach(self, folder: Path, works: Sequence[Callable[[], None]], job_id: str, options: Options) -> None:
        """Nothing is left to do: what the elements run is named by their indices."""

    def queue(self) -> list[Row]:
        ids = _ids(_lines("qselect", "-u", scheduler.user()))
        return [row for row in self._rows(ids) if row.state in UNFINISHED.values()]

    def accounting(self, job_ids: Sequence[str]) -> list[Row]:
        """The server's history of jobs; it knows the last life of each. A server without one knows nothing."""
        return self._rows(job_ids, "-x")

    def accounted(self, name: str) -> str | None:
        return next(iter(_ids(_lines("qselect", "-x", "-u", scheduler.user(), "-N", name))), None)

    def cancel(self, ids: Sequence[str]) -> None:
        scheduler.in_parts(ids, lambda some: call("qdel", *some))
        end = self.now() + CANCEL_SECONDS
        while self.now() < end and any(_is_one_of(row, ids) for row in self.queue()):
            self.sleep(0.5)

    def _rows(self, ids: Sequence[str], *options: str) -> list[Row]:
        rows: list[Row] = []
        scheduler.in_parts(ids, lambda some: rows.extend(self._read(call("qstat", *options, "-t", "-f", "-F", "json", *some))))
        return rows

    def _read(self, out: str) -> Iterator[Row]:
        """The elements in what qstat prints. Raises: CommandError when that is no JSON."""
        jobs = _objects(out, "Jobs") if out.strip() else {}
        for id, job in jobs.items():
            found = JOB_ID.fullmatch(id)
            if found and found[3] == "":
                continue  # the array as a whole
            whole = jobs.get(id.replace(f"[{found[3]}]", "[]"), {}) if found and found[3] else {}
            row = _row(found, job, whole) if found else None
            if row is not None:
                yield row
            elif not self.complained:
                self.complained = True
                log.warning("qstat prints jobs that are skipped since they can't be read, such as: %s", one_line(id, 100))


def _plain(id: re.Match[str]) -> str:
    """A job id without the name of its server."""
    return f"{id[1]}{id[2] or ''}"


def _ids(lines: Sequence[str]) -> list[str]:
    """The job ids among lines, without the name of their server."""
    return [_plain(found) for found in map(JOB_ID.fullmatch, lines) if found]


def _row(id: re.Match[str], job: Mapping[str, Any], whole: Mapping[str, Any]) -> Row | None:
    """whole: the array that it is an element of; where that is held, its elements are not said to be."""
    letter, name = job.get("job_state"), job.get("Job_Name")
    if not (isinstance(letter, str) and isinstance(name, str)) or letter not in {*UNFINISHED, *ENDED}:
        return None
    held = whole if whole.get("job_state") == "H" else job
    code = str(job.get("Exit_status", ""))
    if letter in UNFINISHED:
        state, code = UNFINISHED[letter], ""
    elif not re.fullmatch("-?[0-9]{1,9}", code):
        state, code = ("TERMINATED" if job.get("substate") == DELETED else "ENDED"), ""
    else:
        state = ENDS.get(code, "FAILED")
    used = job.get("resources_used")
    took = DURATION.fullmatch(str(used.get("walltime"))) if isinstance(used, dict) else None
    node = NODE.match(str(job.get("exec_host", "")))
    return Row(
        job_id=f"{id[1]}[]" if id[3] else id[1],
        index=int(id[3] or 0),
        name=name,
        state=state,
        node=node[0] if node else "",
        reason=one_line(str(held.get("comment", "")), 80),
        exit_code=code,
        seconds=3600 * int(took[1]) + 60 * int(took[2]) + int(took[3]) if took else 0,
    )


def _is_one_of(row: Row, ids: Sequence[str]) -> bool:
    """Whether an element that has not ended is named by these ids, by itself or with its array."""
    return row.state != "EXITING" and bool({row.job_id, Pbs.element_id(row.job_id, row.index, 2)} & set(ids))


def refusal(message: str) -> RefusedError:
    """What qsub means when it says no."""
    return scheduler.refusal(message, FULL, BUSY)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Raises: CommandError when the command is not there or does not answer."""
    return scheduler.run("PBS", command, os.environ)


def call(*command: str) -> str:
    """What a command says of the jobs that are there.

    Raises: CommandError when it does not answer, or fails for another reason than that jobs have ended.
    """
    done = run(*command)
    complaints = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode and not (complaints and all(map(GONE.search, complaints))):
        raise scheduler.failed(done)
    return done.stdout


def _lines(*command: str) -> list[str]:
    return [line.strip() for line in call(*command).splitlines()]


def _objects(out: str, kind: str) -> dict[str, dict[str, Any]]:
    """The objects of one kind, by name, in the JSON that a command prints, perhaps behind other lines.

    Raises: CommandError when there is no JSON.
    """
    try:
        found, _ = json.JSONDecoder().raw_decode(out, max(0, out.find("{")))
    except (ValueError, RecursionError):
        raise CommandError(f"PBS answers with something else than JSON, such as: {one_line(out, 100)}") from None
    values = found.get(kind) if isinstance(found, dict) else None
    return {name: value for name, value in values.items() if isinstance(value, dict)} if isinstance(values, dict) else {}


def _ask(kind: str, *command: str) -> dict[str, dict[str, Any]]:
    """The same; nothing when the command fails."""
    try:
        return _objects(call(*command), kind)
    except CommandError:
        return {}


def _server() -> Mapping[str, Any]:
    return next(iter(_ask("Server", "qstat", "-B", "-f", "-F", "json").values()), {})


def _nodes() -> list[Mapping[str, Any]]:
    """What each node has."""
    nodes = _ask("nodes", "pbsnodes", "-a", "-F", "json").values()
    return [has for node in nodes if isinstance(has := node.get("resources_available"), dict)]


def _number(value: Any) -> int | None:
    return int(value) if re.fullmatch("[0-9]{1,9}", str(value)) else None


def _mb(value: Any) -> int:
    found = SIZE.fullmatch(str(value))
    return int(found[1]) * 1024 ** " kmgt".index(found[2] or " ") // 2**20 if found else 0


class Pbs(ArrayLauncher):
    """Arrays on a cluster with PBS, one process and at most one GPU a job. The nodes must share the run folder's filesystem."""

    queue: str | None = Field(default=None, description="null: the server's default")
    timeout_min: int = Field(default=240, ge=1, description="time limit of a job (walltime), minutes")
    ngpus: int = Field(default=1, ge=0, le=1, description="GPUs of a job; 0 for CPU nodes")
    require_cuda: bool = Field(default=True, description="a process that was given a GPU and sees none ends at once")
    ncpus: int = Field(default=8, ge=1, description="of a job")
    mem_gb: float | None = Field(default=32, gt=0, description="of a job; null: the site's default")
    max_mem_gb: float | None = Field(default=None, gt=0, description="after out-of-memory; null: what the largest node has")
    select: str | None = Field(default=None, pattern=r"^[^\s:+][^\s+]*$", description="more of the chunk, as gpu_model=a100")
    qsub: tuple[str, ...] = Field(default=(), description="any other options as words, such as [-P, my_project]")
    modules: tuple[str, ...] = Field(default=(), description="loaded before Python starts, such as cuda/12.4")
    setup: tuple[str, ...] = Field(default=(), description="shell lines before Python starts")
    _commands: Commands = PrivateAttr(default_factory=Commands)

    names: ClassVar[Names] = Names(
        system="PBS",
        programs=("qsub", "qstat", "qselect", "qdel"),
        submit="qsub",
        queue="qselect",
        accounting="qstat -x",
        show="qstat -x -f {job}",
        estimate="qstat -T",
        keys="launcher",
        gpu_keys="launcher.ngpus, launcher.select",
        gpu_advice="choose a launcher.queue with GPUs, and set launcher.select as the site names its GPU nodes",
    )
    states: ClassVar[States] = States(
        waiting="PENDING",
        unfinished=frozenset(UNFINISHED.values()),
        leaving=frozenset({"EXITING"}),
        held=("job held, too many failed attempts", "Job held, too many failed attempts"),
        completed="COMPLETED",
        failed="FAILED",
        of_memory=frozenset({"OUT_OF_MEMORY"}),
        killed=frozenset({"137", "265"}),  # by signal 9, as the script's exit code and as PBS counts
        of_node=frozenset(),  # PBS runs such a job again
    )
    recorded_as: ClassVar[str | None] = "pbs"

    @staticmethod
    def own_job() -> OwnJob | None:
        found = JOB_ID.fullmatch(os.environ.get("PBS_JOBID", ""))
        return OwnJob("pbs", _plain(found), os.environ.get("PBS_JOBNAME")) if found else None

    @staticmethod
    def element_id(job_id: str, index: int, size: int) -> str:
        return job_id.replace("[]", f"[{index}]")

    def check_root(self, root: Path) -> None:
        """Any will do: no option of qsub has a path below it but the script's."""

    def limits(self) -> Limits:
        server = _server()
        queues = _ask("Queue", "qstat", "-Q", "-f", "-F", "json", *([self.queue] if self.queue else []))
        scopes = [server, queues.get(str(self.queue or server.get("default_queue")), {})]
        sizes = [size for scope in scopes if (size := _number(scope.get("max_array_size"))) is not None]
        queued = [number for scope in scopes if (number := _most_queued(str(scope.get("max_queued", "")))) is not None]
        return Limits(
            array_size=max(1, min(sizes, default=ARRAY_SIZE)),
            submitted=min(queued, default=None),
            node_memory_mb=max((_mb(has.get("mem")) for has in _nodes()), default=0) or None,
            excludes=False,
        )

    @property
    def gpus(self) -> int:
        return self.ngpus

    @property
    def needs_gpu(self) -> bool:
        return self.require_cuda and self.ngpus > 0

    @property
    def mem_mb(self) -> int | None:
        return None if self.mem_gb is None else round(1024 * self.mem_gb)

    @property
    def max_mem_mb(self) -> int | None:
        return None if self.max_mem_gb is None else round(1024 * self.max_mem_gb)

    def options(self, name: str, folder: Path, mem_mb: int | None, exclude: Sequence[str]) -> Options:
        return self._options(name, folder, mem_mb, self.timeout_min)

    def options_to_look(self, name: str, folder: Path) -> Options:
        return self._options(name, folder, self.mem_mb, 10)

    def _options(self, name: str, folder: Path, mem_mb: int | None, minutes: int) -> Options:
        """words: of qsub. lines: of the script."""
        chunk = [f"1:ncpus={self.ncpus}", f"ngpus={self.ngpus}" if self.ngpus else "", f"mem={mem_mb}mb" if mem_mb else ""]
        words = ["-N", name, *(["-q", self.queue] if self.queue else []), "-l", f"walltime={60 * minutes}"]
        words += ["-l", "select=" + ":".join(filter(None, [*chunk, self.select]))]
        # -m n: no mail for each element; -j oe: one output, which the script sends elsewhere.
        words += ["-S", "/bin/bash", "-r", "y", "-m", "n", "-j", "oe", "-o", "/dev/null", *self.qsub]
        # PBS begins in the home folder, and a profile may have made files writable for a group, which `guard` refuses.
        setup = [f"cd {shlex.quote(str(Path.cwd()))} || exit 1", "umask go-w", *self.setup]
        work = f'{shlex.quote(str(folder / "work-"))}"${{{INDEX}:-0}}".pkl'
        lines = [
            *scheduler.batch_lines(folder, INDEX, self.modules, setup),
            f"exec {shlex.quote(sys.executable)} -m hpc_compress.launch {work}",
        ]
        return {"words": words, "lines": lines}

    def checks(self) -> Iterator[Check]:
        server, queues = _server(), _ask("Queue", "qstat", "-Q", "-f", "-F", "json")
        name = str(self.queue or server.get("default_queue"))
        open_ones = sorted(queue for queue, has in queues.items() if _is_true(has, "enabled") and _is_true(has, "started"))
        found = "open" if name in open_ones else "closed" if name in queues else "not there"
        known = one_line(", ".join(open_ones)) or "those that qstat -Q shows"
        yield Check("queue", name in open_ones, f"{one_line(name)}: {found}", f"set launcher.queue to one of {known}")
        if self.ngpus:
            fitting = sum((_number(has.get("ngpus")) or 0) >= self.ngpus for has in _nodes())
            advice = "choose a cluster with GPUs, or set launcher.ngpus=0; without pbsnodes this is not known"
            yield Check("ngpus", fitting > 0, f"{fitting} nodes with {self.ngpus} GPU or more", advice)
        kept = _is_true(server, "job_history_enable")
        advice = (
            "without a history of jobs it takes launcher.lost_seconds until a dead job is noticed, and its reason is not "
            "known; ask for job_history_enable=True"
        )
        yield Check("accounting", kept, "the server keeps ended jobs" if kept else "the server forgets ended jobs", advice)


def _is_true(has: Mapping[str, Any], name: str) -> bool:
    return str(has.get(name)).lower() in ("true", "1")


def _most_queued(limit: str) -> int | None:
    """The jobs that this user may have in the queue, by a limit such as `[u:PBS_GENERIC=200]`."""
    found = dict(re.findall(r"u:([^=\s\],\"]+)\"?=([0-9]{1,9})\b", limit))
    number = found.get(scheduler.user(), found.get("PBS_GENERIC"))
    return None if number is None else int(number)
