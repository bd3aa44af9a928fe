"""Slurm's commands and what they print. The edge: knows no run and no task, and a simulation can stand in for it."""

import contextlib
import io
import os
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

SECONDS = 60.0  # that a command may take: a busy controller answers late, a dead one after its own timeout

# What a controller says that has too much to do, or is away: it may have taken the job or not.
BUSY = (
    "standby mode",
    "authentication error",
    "i/o error",
    "timed out",
    "unable to contact",
    "temporarily unable",
    "temporarily unavailable",
    "connection",
    "zero bytes",
    "try again",
)
# What it says when the user has enough jobs for now. It says the same of a job that is larger than it will ever admit.
FULL = (
    "qos policy",
    "submit limit",
    "submitjoblimit",
    "submitjobs",
    "maxjobcount",
    "job count limit",
    "not available (inactive",
)


class CommandError(RuntimeError):
    """A command failed; what it would have said is not known."""


class RefusedError(RuntimeError):
    """sbatch said no. kind: full (later, or fewer), busy (perhaps it did take the job), never (a setting to mend)."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
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
        executor.update_parameters(**options)
        try:
            # Submitit prints what sbatch says; whoever catches the error says it better.
            with _outside_any_job(), contextlib.redirect_stderr(io.StringIO()), executor.batch():
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
        """Every job of this user that is waiting, running or on its way out."""
        out = call("squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%F|%K|%T|%N|%r|%j")
        rows = []
        for line in out.splitlines():
            job_id, index, state, node, reason, name = line.split("|", 5)
            rows.append(Row(job_id, int(index) if index.isdigit() else 0, name, state, node, reason))
        return rows

    def sacct(self, job_ids: Sequence[str]) -> list[Row]:
        """Everything that the accounting knows of these jobs, requeued lives too, older before newer.

        By id, never by time: clocks differ. A cluster without accounting knows nothing.
        """
        # --duplicates: a requeued job has a row for each life.
        columns = "--format=JobID,State,ExitCode,NodeList,ElapsedRaw,JobName"
        out = _accounting("--duplicates", f"--jobs={','.join(job_ids)}", columns)
        rows = []
        for line in out.splitlines():
            full_id, state, exit_code, node, seconds, name = line.split("|", 5)
            job_id, _, index = full_id.partition("_")
            if index.isdigit() or not index:  # 17_[3-9] are elements that have not begun
                word = state.partition(" ")[0].rstrip("+")  # "CANCELLED by 1000"
                rows.append(Row(job_id, int(index or 0), name, word, node, "", exit_code, int(seconds or 0)))
        return rows

    def accounted(self, name: str) -> str | None:
        """The id of the job of this name, if the accounting knows of one."""
        found = _accounting(f"--name={name}", "--starttime=now-7days", "--format=JobID").split()
        return found[0].partition("_")[0] if found else None

    def cancel(self, ids: Sequence[str]) -> None:
        """Cancel jobs (`17`) or elements (`17_3`); those that have ended are no matter."""
        for start in range(0, len(ids), 200):
            with contextlib.suppress(CommandError):
                call("scancel", "--quiet", *ids[start : start + 200])

    def limits(self, partition: str | None, account: str | None, qos: str | None) -> Limits:
        """Ask the cluster what it admits; what it does not tell is left open."""
        config = ask("scontrol", "show", "config")
        found = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.M)
        # The largest index is one below it, so it is the number of elements from 0 on.
        array_size = max(1, int(found[1])) if found else 1000
        chosen = [f"--partition={partition}"] if partition else []
        kinds = re.findall(r"^(\d+)\+?\|(\d+)", ask("sinfo", "--noheader", *chosen, "--format=%m|%D"), re.M)
        memory, nodes = [int(mb) for mb, _ in kinds], sum(int(number) for _, number in kinds)
        user = [f"account={account}"] if account else []
        of_user = ask("sacctmgr", "-nP", "show", "assoc", "where", f"user={os.getuid()}", *user, "format=MaxSubmit,DefaultQOS")
        names = {qos or line.partition("|")[2] or "normal" for line in of_user.splitlines()} or {qos or "normal"}
        of_qos = ask("sacctmgr", "-nP", "show", "qos", "where", f"name={','.join(sorted(names))}", "format=MaxSubmitPU")
        numbers = [line.partition("|")[0] for line in [*of_user.splitlines(), *of_qos.splitlines()]]
        submitted = min((int(number) for number in numbers if number.isdigit()), default=None)
        return Limits(array_size, submitted, max(memory, default=None), nodes or None)

    # Time is asked here too, so that a simulation can have its own. Never the time of day: it can be set back.

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def batch_lines(folder: Path, modules: Sequence[str], setup: Sequence[str]) -> list[str]:
    """Shell lines that a job runs before Python: where its output goes, and its environment."""
    log = shlex.quote(str(folder / "batch-"))
    return [
        # Here and not in an #SBATCH line, which ends with the line and reads % as a pattern.
        f'exec >>{log}"${{SLURM_ARRAY_TASK_ID:-0}}".log 2>&1',
        *(f"module load {shlex.quote(module)} || exit 1" for module in modules),
        *setup,
        "export HF_HUB_OFFLINE=1",
        "unset HF_TOKEN HUGGING_FACE_HUB_TOKEN",  # no job needs them
    ]


@contextlib.contextmanager
def _outside_any_job() -> Iterator[None]:
    """Without what Slurm has told the driver of its own job: sbatch would hand that on to the new one."""
    inner = {key: os.environ.pop(key) for key in list(os.environ) if key.startswith("SLURM_") and key != "SLURM_CONF"}
    try:
        yield
    finally:
        os.environ.update(inner)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Raises: CommandError when the command is not there or does not answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, errors="replace")
    except FileNotFoundError:
        raise CommandError(f"{command[0]} is not on this machine; start the search where Slurm's commands are") from None
    except subprocess.TimeoutExpired:
        raise CommandError(f"{command[0]} did not answer in {SECONDS:.0f} s") from None


def call(*command: str) -> str:
    """Raises: CommandError when the command does not answer, or fails."""
    done = run(*command)
    if done.returncode:
        raise CommandError(f"{command[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
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
