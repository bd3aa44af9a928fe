"""Slurm's commands and what they print. The edge: knows no run and no task, and a simulation can stand in for it.

What a command prints is data from a stranger: job names are anybody's words, and a wrapper or a login script may add lines.
A line that has not the form that was asked for is skipped, and the first one of each command is logged.
"""

import contextlib
import functools
import io
import logging
import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_compress.door import one_line

log = logging.getLogger(__name__)

SECONDS = 60.0  # that a command may take: a busy controller answers late, a dead one after its own timeout

# Variables by which a user's profile, or the job that the driver runs in, changes what a command asks for or shows: they
# hide jobs from squeue, and override the lines of a submitted script.
OPTIONS = ("SLURM_", "SBATCH_", "SQUEUE_", "SACCT_", "SCANCEL_", "SINFO_")
REACH = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT"}  # but by these a command finds the cluster and proves who the user is

# One number has at most 18 digits: Python refuses to read very long ones.
SQUEUE_LINE = re.compile(r"([0-9]{1,18})\|([0-9]{1,18}|N/A)\|([A-Z_]+)\|([^|]*)\|([^|]*)\|(.*)")
SACCT_LINE = re.compile(r"([0-9]{1,18})(?:_([0-9]{1,18}|\[[^|]*\]))?\|([A-Z_]+)[^|]*\|([^|]*)\|([^|]*)\|([^|]*)\|(.*)")
JOB_ID_LINE = re.compile(r"([0-9]{1,18})(?:_.*)?")
INDICES = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9})(?::([0-9]{1,9}))?)?")  # 3, 3-9 or 3-9:2
MOST_INDICES = 4_000_001  # Slurm's own limit of an array

# What a busy or unreachable controller says: it may have accepted the job or not.
BUSY = (
    "standby mode",
    "authentication error",
    "i/o error",
    "timed out",
    "unable to contact",
    "temporarily unable",
    "temporarily unavailable",
    "connection",
    "not connected",
    "zero bytes",
    "try again",
)
# What it says when the user has too many jobs for now. It says the same about a job that it will never admit.
FULL = (
    "qos policy",
    "submit limit",
    "submitjoblimit",
    "submitjobs",
    "maxjobcount",
    "job count limit",
    "not available (inactive",
    "requested partition configuration not available now",
)


class CommandError(RuntimeError):
    """A command failed; what it would have said is not known."""


class RefusedError(RuntimeError):
    """sbatch said no. kind: full (later, or fewer), busy (perhaps it did take the job), never (a setting to mend)."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))
        lower = message.lower()
        self.kind = (
            "full" if any(word in lower for word in FULL) else "busy" if any(word in lower for word in BUSY) else "never"
        )


@dataclass(frozen=True)
class Row:
    """One element of an array, as squeue or sacct shows it."""

    job_id: str  # of the whole array
    index: int
    name: str
    state: str  # one word, such as RUNNING
    node: str
    reason: str = ""  # squeue: why it waits
    exit_code: str = ""  # sacct: status:signal
    seconds: int = 0  # sacct: elapsed


def element_id(job_id: str, index: int, size: int) -> str:
    """How Slurm and Submitit call one element of `size`: a single one is submitted as a job, not as an array."""
    return f"{job_id}_{index}" if size > 1 else job_id


@dataclass(frozen=True)
class Limits:
    """What the cluster admits; None where it does not say."""

    array_size: int  # elements of one array
    submitted: int | None  # elements that one user may have in the queue
    node_memory_mb: int | None  # of the largest node
    nodes: int | None = None


class Commands:
    """A real cluster."""

    def __init__(self) -> None:
        self.complained: set[str] = set()  # commands of which a line was skipped

    def submit(self, folder: Path, works: Sequence[Any], options: dict[str, Any]) -> str:
        """Submit callables as one array by way of Submitit, whose files lie in `folder`.

        Returns: the job id. Raises: RefusedError.
        """
        import submitit

        if shutil.which("sbatch") is None or shutil.which("srun") is None:
            raise RefusedError("Slurm's commands are not on this machine")
        python = shlex.quote(sys.executable)
        # Without srun Python takes the place of the shell, which would keep signals to itself.
        executor = submitit.SlurmExecutor(str(folder), python=python if options.get("use_srun", True) else f"exec {python}")
        executor.update_parameters(**{"wckey": None, **options})  # as `leave_out_wckey`
        try:
            # Submitit prints what sbatch says; whoever catches the error says it better.
            with _clean_environment(), contextlib.redirect_stderr(io.StringIO()), executor.batch():
                jobs = [executor.submit(work) for work in works]
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            raise RefusedError(str(error).replace("sbatch: error: ", "").strip()) from None
        return str(jobs[0].job_id).partition("_")[0]

    def attach(self, folder: Path, works: Sequence[Any], job_id: str, timeout_min: int) -> None:
        """Put the works of a job where its elements look for them. Submitit does so after sbatch, unless it is killed."""
        from submitit.core.utils import DelayedSubmission

        for index, work in enumerate(works):
            path = folder / f"{element_id(job_id, index, len(works))}_submitted.pkl"
            if not path.exists():
                delayed = DelayedSubmission(work)
                delayed.set_timeout(timeout_min, 3)
                draft = path.with_suffix(".draft")
                delayed.dump(draft)
                draft.replace(path)

    def squeue(self) -> list[Row]:
        """Every job of this user that is waiting, running or on its way out, in hidden partitions too."""
        out = call("squeue", "--noheader", "--all", "--array", f"--user={os.getuid()}", "--format=%F|%K|%T|%N|%r|%j")
        rows = []
        for job_id, index, state, node, reason, name in self._read("squeue", out, SQUEUE_LINE):
            rows.append(Row(job_id, 0 if index == "N/A" else int(index), name, state, node, reason))
        return rows

    def sacct(self, job_ids: Sequence[str]) -> list[Row]:
        """Everything that the accounting knows of these jobs, requeued lives too, older before newer.

        By id, never by time: clocks differ. A cluster without accounting knows nothing.
        """
        # --duplicates: a requeued job has a row for each life.
        columns = "--format=JobID,State,ExitCode,NodeList,ElapsedRaw,JobName"
        out = _accounting("--duplicates", f"--jobs={','.join(job_ids)}", columns)
        rows = []
        for job_id, of_array, state, exit_code, node, elapsed, name in self._read("sacct", out, SACCT_LINE):
            seconds = int(elapsed) if re.fullmatch("[0-9]{1,9}", elapsed) else 0
            rows += [Row(job_id, index, name, state, node, "", exit_code, seconds) for index in _indices(of_array)]
        return rows

    def accounted(self, name: str) -> str | None:
        """The id of the job of this name, if the accounting knows of one."""
        out = _accounting(f"--name={name}", "--starttime=now-7days", "--format=JobID")
        return next((job_id for (job_id,) in self._read("sacct", out, JOB_ID_LINE)), None)

    def _read(self, command: str, out: str, form: re.Pattern[str]) -> Iterator[tuple[str, ...]]:
        """The fields of each line that has this form."""
        for line in out.split("\n"):
            if found := form.fullmatch(line):
                yield found.groups(default="")
            elif line.strip() and command not in self.complained:
                self.complained.add(command)
                log.warning(
                    "%s prints lines that are skipped since they describe no job, such as: %s", command, one_line(line, 100)
                )

    def cancel(self, ids: Sequence[str]) -> None:
        """Cancel jobs (`17`) or elements (`17_3`); those that have ended are ignored.

        Raises: CommandError when scancel failed for some of them; the others were tried too.
        """
        trouble = None
        for start in range(0, len(ids), 200):
            try:
                call("scancel", "--quiet", *ids[start : start + 200])
            except CommandError as error:
                trouble = error
        if trouble:
            raise trouble

    def limits(self, partition: str | None, account: str | None, qos: str | None) -> Limits:
        """Ask the cluster what it admits; what it does not tell is left open."""
        config = ask("scontrol", "show", "config")
        found = re.search(r"^MaxArraySize\s*=\s*([0-9]{1,18})", config, re.M)
        # The largest index is one below it, so it is the number of elements from 0 on.
        array_size = max(1, int(found[1])) if found else 1000
        # A partition may be hidden. Of all partitions, only those that the user sees: a job may go to no other.
        chosen = ["--all", f"--partition={partition}"] if partition else []
        kinds = re.findall(r"^([0-9]{1,18})\+?\|([0-9]{1,18})$", ask("sinfo", "--noheader", *chosen, "--format=%m|%D"), re.M)
        memory, nodes = [int(mb) for mb, _ in kinds], sum(int(number) for _, number in kinds)
        # By name: sacctmgr takes a number for a name too, and finds nothing.
        where = [f"user={_user()}", *([f"account={account}"] if account else [])]
        of_user = ask("sacctmgr", "-nP", "show", "assoc", "where", *where, "format=MaxSubmit,DefaultQOS")
        lines = re.findall(r"^([0-9]{0,18})\|([^|\s]*)$", of_user, re.M)
        names = {qos or default or "normal" for _, default in lines} or {qos or "normal"}
        of_qos = ask("sacctmgr", "-nP", "show", "qos", "where", f"name={','.join(sorted(names))}", "format=MaxSubmitPU")
        numbers = [number for number, _ in lines] + re.findall(r"^[0-9]{1,18}$", of_qos, re.M)
        submitted = min((int(number) for number in numbers if number), default=None)
        return Limits(array_size, submitted, max(memory, default=None), nodes or None)

    # Time is asked here too, so that a simulation can have its own. Never the time of day: it can be set back.

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def leave_out_wckey() -> None:
    """Submitit's own default asks for a wckey, which sites that enforce wckeys refuse. Hydra's launcher can't ask for none."""
    from submitit import SlurmExecutor

    update = functools.partialmethod(SlurmExecutor._internal_update_parameters, wckey=None)
    SlurmExecutor._internal_update_parameters = update  # type: ignore[assignment,method-assign]


def batch_lines(folder: Path, modules: Sequence[str], setup: Sequence[str]) -> list[str]:
    """Shell lines that a job runs before Python: where its output goes, and its environment."""
    log = shlex.quote(str(folder / "batch-"))
    return [
        # Here and not in an #SBATCH line, which ends with the line and reads % as a pattern.
        f'exec >>{log}"${{SLURM_ARRAY_TASK_ID:-0}}".log 2>&1',
        *(f"module load {shlex.quote(module)} || exit 1" for module in modules),
        *setup,
        "export HF_HUB_OFFLINE=1",
        "export PYTHONSAFEPATH=1",  # else the current folder comes before the libraries
        "unset HF_TOKEN HUGGING_FACE_HUB_TOKEN",  # no job needs them
    ]


def _indices(of_array: str) -> Sequence[int]:
    """The elements that sacct's JobID names behind the job's: `3`, or `[0-2,5,10-20:2%4]` of those that have not begun."""
    if not of_array.startswith("["):
        return [int(of_array or 0)]
    indices: list[int] = []
    for part in of_array.strip("[]").partition("%")[0].split(","):
        if found := INDICES.fullmatch(part):
            first, last, step = int(found[1]), int(found[2] or found[1]), int(found[3] or 1)
            indices += range(first, min(last, MOST_INDICES) + 1, max(1, step))
    return indices


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container without the user's name
        return str(os.getuid())


def environment() -> dict[str, str]:
    """The environment of every command of Slurm."""
    return {key: value for key, value in os.environ.items() if key in REACH or not key.startswith(OPTIONS)}


@contextlib.contextmanager
def _clean_environment() -> Iterator[None]:
    """For sbatch, which Submitit calls. It hands this environment on to the job."""
    removed = {key: os.environ.pop(key) for key in os.environ.keys() - environment().keys()}
    try:
        yield
    finally:
        os.environ.update(removed)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Raises: CommandError when the command is not there or does not answer."""
    # Slurm shortens long lists of array elements unless it is told not to.
    own = {**environment(), "SLURM_BITSTR_LEN": "0"}
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, errors="replace", env=own)
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            raise CommandError(f"{command[0]} can't be started: {error.strerror}") from None
        raise CommandError(f"{command[0]} is not on this machine; start the search where Slurm's commands are") from None
    except subprocess.TimeoutExpired:
        raise CommandError(f"{command[0]} did not answer in {SECONDS:.0f} s") from None


def call(*command: str) -> str:
    """Raises: CommandError when the command does not answer, or fails."""
    done = run(*command)
    if done.returncode:
        raise CommandError(f"{command[0]}: {one_line(done.stderr.strip()) or f'exit code {done.returncode}'}")
    return done.stdout


def _accounting(*options: str) -> str:
    """What sacct says; nothing on a cluster without accounting."""
    try:
        return call("sacct", "-nPX", *options)
    except CommandError as error:
        if "accounting storage is disabled" in str(error).lower():
            return ""
        raise


def ask(*command: str) -> str:
    """What a command says, nothing when it fails."""
    try:
        return call(*command)
    except CommandError:
        return ""
