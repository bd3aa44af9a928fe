"""All that is known of Slurm: its commands and what they print, what a job asks for, its words for states.

What a command prints is data from a stranger: job names are anybody's words, and a wrapper or a login script may add lines.
A line that has not the form that was asked for is skipped, and the first one of each command is logged.
"""

import contextlib
import functools
import io
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, PrivateAttr

from hpc_compress.config import ConfigError
from hpc_compress.door import one_line
from hpc_compress.launch import OwnJob, Ranks, scheduler
from hpc_compress.launch.arrays import ArrayLauncher
from hpc_compress.launch.scheduler import Check, CommandError, Limits, Names, Options, RefusedError, Row, Scheduler, States
from hpc_compress.types import Record

log = logging.getLogger(__name__)

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

UNFINISHED = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "RESIZING", "STOPPED", "SIGNALING"}
INDEX = "SLURM_ARRAY_TASK_ID"
RANKS = Ranks(rank="SLURM_PROCID", ranks="SLURM_NTASKS", place="SLURM_LOCALID")


# --- what a job asks for ---


class Cluster(Record):
    """A site: what a job asks for there, and what it needs before Python starts."""

    partition: str | None = Field(default=None, description="null: the cluster's default")
    account: str | None = None
    qos: str | None = None
    timeout_min: int = Field(default=240, ge=1, description="time limit of a job, minutes")
    gpus_per_node: int = Field(default=1, ge=0, lt=1000, description="GPUs of a job, one process each; 0 for CPU nodes")
    gpu_type: str | None = Field(default=None, description="as the site's gres names it, such as a100")
    require_cuda: bool = Field(default=True, description="a process that was given a GPU and sees none ends at once")
    cpus_per_task: int = Field(default=8, ge=1, description="of each process")
    mem_gb: float | None = Field(
        default=32, gt=0, description="of each process; null: the site's default, for --mem is left out"
    )
    max_mem_gb: float | None = Field(default=None, gt=0, description="after out-of-memory; null: what a node has")
    modules: tuple[str, ...] = Field(default=(), description="loaded before Python starts, such as cuda/12.4")
    setup: tuple[str, ...] = Field(default=(), description="shell lines before Python starts")
    sbatch: dict[str, Any] = Field(default={}, description="any other option by its long name, such as {constraint: a100}")
    array_parallelism: int = Field(default=64, ge=1, description="elements of an array that run at a time (%)")

    @property
    def processes(self) -> int:
        return max(1, self.gpus_per_node)

    def mem_mb(self, gb: float | None) -> int | None:
        """Of a job whose processes get so many GB each; None where the site decides."""
        return None if gb is None else round(1024 * gb) * self.processes

    def request(self, mem_mb: int | None, exclude: Sequence[str]) -> dict[str, Any]:
        """What sbatch is asked for, by the long names of its options."""
        gres = ":".join(["gpu", *([self.gpu_type] if self.gpu_type else []), str(self.gpus_per_node)])
        options = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "time": self.timeout_min,
            "nodes": 1,
            "ntasks_per_node": self.processes,
            "gres": gres if self.gpus_per_node else None,
            "cpus_per_task": self.cpus_per_task,
            "mem": None if mem_mb is None else f"{mem_mb}M",  # sbatch takes whole numbers only
            "exclude": ",".join(exclude) or None,
        }
        return {key: value for key, value in options.items() if value is not None}

    def options(self, name: str, folder: Path, mem_mb: int | None, exclude: Sequence[str]) -> dict[str, Any]:
        """The same and the rest as Submitit takes them."""
        options: dict[str, Any] = {
            **self.request(mem_mb, exclude),
            "job_name": name,
            "array_parallelism": self.array_parallelism,
            "setup": scheduler.batch_lines(folder, INDEX, self.modules, self.setup),
            "additional_parameters": {"output": "/dev/null", "error": "/dev/null", **self.sbatch},
        }
        if self.processes > 1:
            # From Slurm 22.05 on a job's CPUs are not handed on to srun.
            options["srun_args"] = [f"--cpus-per-task={self.cpus_per_task}"]
        else:
            # A process of its own needs no step of its own, which costs a start; the signal then goes to the script,
            # whose place Python takes.
            options["use_srun"] = False
            options["additional_parameters"]["signal"] = "B:USR2@90"
        return options


# --- its commands ---


class Commands(Scheduler):
    """A real cluster."""

    def __init__(self) -> None:
        self.complained: set[str] = set()  # commands of which a line was skipped

    def submit(self, folder: Path, works: Sequence[Callable[[], None]], options: Options) -> str:
        """By way of Submitit."""
        import submitit

        if shutil.which("sbatch") is None or shutil.which("srun") is None:
            raise RefusedError("Slurm's commands are not on this machine", "never")
        python = shlex.quote(sys.executable)
        # Without srun Python takes the place of the shell, which would keep signals to itself.
        executor = submitit.SlurmExecutor(str(folder), python=python if options.get("use_srun", True) else f"exec {python}")
        executor.update_parameters(**{"wckey": None, **options})  # as `leave_out_wckey`
        try:
            # Submitit prints what sbatch says; whoever catches the error says it better.
            with _clean_environment(), contextlib.redirect_stderr(io.StringIO()), executor.batch():
                jobs = [executor.submit(work) for work in works]
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            raise refusal(str(error).replace("sbatch: error: ", "").strip()) from None
        return str(jobs[0].job_id).partition("_")[0]

    def attach(self, folder: Path, works: Sequence[Callable[[], None]], job_id: str, options: Options) -> None:
        """Put the works of a job where its elements look for them. Submitit does so after sbatch, unless it is killed."""
        from submitit.core.utils import DelayedSubmission

        for index, work in enumerate(works):
            path = folder / f"{Slurm.element_id(job_id, index, len(works))}_submitted.pkl"
            if not path.exists():
                delayed = DelayedSubmission(work)
                delayed.set_timeout(options["time"], 3)
                draft = path.with_suffix(".draft")
                delayed.dump(draft)
                draft.replace(path)

    def queue(self) -> list[Row]:
        """In hidden partitions too."""
        out = call("squeue", "--noheader", "--all", "--array", f"--user={os.getuid()}", "--format=%F|%K|%T|%N|%r|%j")
        rows = []
        for job_id, index, state, node, reason, name in self._read("squeue", out, SQUEUE_LINE):
            rows.append(Row(job_id, 0 if index == "N/A" else int(index), name, state, node, reason))
        return rows

    def accounting(self, job_ids: Sequence[str]) -> list[Row]:
        """By id, never by time: clocks differ. A cluster without accounting knows nothing."""
        # --duplicates: a requeued job has a row for each life.
        columns = "--format=JobID,State,ExitCode,NodeList,ElapsedRaw,JobName"
        out = _accounting("--duplicates", f"--jobs={','.join(job_ids)}", columns)
        rows = []
        for job_id, of_array, state, exit_code, node, elapsed, name in self._read("sacct", out, SACCT_LINE):
            seconds = int(elapsed) if re.fullmatch("[0-9]{1,9}", elapsed) else 0
            rows += [Row(job_id, index, name, state, node, "", exit_code, seconds) for index in _indices(of_array)]
        return rows

    def accounted(self, name: str) -> str | None:
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
        scheduler.in_parts(ids, lambda some: call("scancel", "--quiet", *some))

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
        where = [f"user={scheduler.user()}", *([f"account={account}"] if account else [])]
        of_user = ask("sacctmgr", "-nP", "show", "assoc", "where", *where, "format=MaxSubmit,DefaultQOS")
        lines = re.findall(r"^([0-9]{0,18})\|([^|\s]*)$", of_user, re.M)
        names = {qos or default or "normal" for _, default in lines} or {qos or "normal"}
        of_qos = ask("sacctmgr", "-nP", "show", "qos", "where", f"name={','.join(sorted(names))}", "format=MaxSubmitPU")
        numbers = [number for number, _ in lines] + re.findall(r"^[0-9]{1,18}$", of_qos, re.M)
        submitted = min((int(number) for number in numbers if number), default=None)
        return Limits(array_size, submitted, max(memory, default=None), nodes or None)


def leave_out_wckey() -> None:
    """Submitit's own default asks for a wckey, which sites that enforce wckeys refuse. Hydra's launcher can't ask for none."""
    from submitit import SlurmExecutor

    update = functools.partialmethod(SlurmExecutor._internal_update_parameters, wckey=None)
    SlurmExecutor._internal_update_parameters = update  # type: ignore[assignment,method-assign]


def refusal(message: str) -> RefusedError:
    """What sbatch means when it says no."""
    return scheduler.refusal(message, FULL, BUSY)


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
    return scheduler.run("Slurm", command, {**environment(), "SLURM_BITSTR_LEN": "0"})


def call(*command: str) -> str:
    """Raises: CommandError when the command does not answer, or fails."""
    done = run(*command)
    if done.returncode:
        raise scheduler.failed(done)
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


def _lines(program: str, *options: str) -> list[str]:
    return [one_line(line.strip()) for line in ask(program, "--noheader", *options).splitlines() if line.strip()]


# --- the launcher ---


class Slurm(ArrayLauncher):
    """Arrays on a cluster, one process and one GPU a task. The run folder must lie on a filesystem that the nodes share."""

    cluster: Cluster = Cluster()
    _commands: Commands = PrivateAttr(default_factory=Commands)

    names: ClassVar[Names] = Names(
        system="Slurm",
        programs=("sbatch", "srun", "squeue", "sacct", "scancel", "scontrol", "sinfo"),
        submit="sbatch",
        queue="squeue",
        accounting="sacct",
        show="scontrol show job {job}",
        estimate="squeue --start",
        keys="cluster",
        gpu_keys="cluster.gpus_per_node, cluster.gpu_type",
        gpu_advice="choose a cluster.partition with GPUs, and set cluster.gpu_type as the gres of its nodes has it",
    )
    states: ClassVar[States] = States(
        waiting="PENDING",
        unfinished=frozenset(UNFINISHED),
        leaving=frozenset({"COMPLETING", "CANCELLED"}),  # a cancelled job is listed so until its processes have ended
        held=("launch failed requeued held", "JobHoldMaxRequeue"),  # Slurm gave up on it
        completed="COMPLETED",
        failed="FAILED",
        of_memory=frozenset({"OUT_OF_MEMORY"}),
        killed=frozenset({"9:0", "0:9", "137:0", "0:125"}),
        of_node=frozenset({"NODE_FAIL", "BOOT_FAIL"}),
    )
    ranks: ClassVar[Ranks | None] = RANKS
    recorded_as: ClassVar[str | None] = None  # it was the only one when these records were made

    @staticmethod
    def own_job() -> OwnJob | None:
        job_id = os.environ.get("SLURM_JOB_ID")
        if "SLURM_ARRAY_JOB_ID" in os.environ:
            # In the last element of an array SLURM_JOB_ID is the id of the whole array.
            job_id = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get(INDEX, '0')}"
        return OwnJob(None, job_id, os.environ.get("SLURM_JOB_NAME")) if job_id else None

    @staticmethod
    def element_id(job_id: str, index: int, size: int) -> str:
        """As Submitit calls it too."""
        return f"{job_id}_{index}" if size > 1 else job_id

    def check_root(self, root: Path) -> None:
        if "%" in str(root):
            raise ConfigError(
                f"the run folder {root} has a % in its path, which Slurm reads as a pattern; choose another name="
            )

    def limits(self) -> Limits:
        return self._commands.limits(self.cluster.partition, self.cluster.account, self.cluster.qos)

    @property
    def gpus(self) -> int:
        return self.cluster.gpus_per_node

    @property
    def processes(self) -> int:
        return self.cluster.processes

    @property
    def needs_gpu(self) -> bool:
        return self.cluster.require_cuda and self.cluster.gpus_per_node > 0

    @property
    def mem_mb(self) -> int | None:
        return self.cluster.mem_mb(self.cluster.mem_gb)

    @property
    def max_mem_mb(self) -> int | None:
        return self.cluster.mem_mb(self.cluster.max_mem_gb)

    def options(self, name: str, folder: Path, mem_mb: int | None, exclude: Sequence[str]) -> Options:
        return self.cluster.options(name, folder, mem_mb, exclude)

    def options_to_look(self, name: str, folder: Path) -> Options:
        return {**self.cluster.options(name, folder, self.mem_mb, ()), "ntasks_per_node": 1, "time": 10}

    def checks(self) -> Iterator[Check]:
        cluster = self.cluster
        chosen = [f"--partition={cluster.partition}"] if cluster.partition else []
        lines = [line for line in _lines("sinfo", "--all", *chosen, "--format=%P|%D|%G|%l|%m|%c") if line.count("|") == 5]
        names = sorted({line.rstrip("*") for line in _lines("sinfo", "--all", "--format=%P")})
        yield Check(
            "partition",
            bool(lines),
            f"{cluster.partition or 'the default one'}: {'; '.join(lines) or 'not there'}",
            f"set cluster.partition to one of {', '.join(names) or 'those that sinfo shows'}",
        )
        if cluster.gpus_per_node:
            gres = sorted({line.split("|")[2] for line in lines})
            wanted = f"gpu:{cluster.gpu_type}" if cluster.gpu_type else "gpu"
            has = any(wanted in item for item in gres)
            yield Check(
                "gres", has, f"{wanted} in {', '.join(gres) or 'none'}", "set cluster.gpu_type as sinfo -o %G names it, or null"
            )
        yield self._test_only()
        try:
            call("sacct", "-nX", "--starttime=now-1minutes")
            trouble = ""
        except CommandError as error:
            trouble = str(error)
        advice = "without sacct it takes launcher.accounting_seconds until a dead job is noticed, and its reason is not known"
        yield Check("accounting", not trouble, trouble or "answers", advice)

    def _test_only(self) -> Check:
        words = {**self.cluster.request(self.mem_mb, ()), **self.cluster.sbatch}
        flags = [f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}") for key, value in words.items()]
        try:
            tested = run("sbatch", "--test-only", *flags, "--wrap=true")
            admitted = tested.returncode == 0
            said = one_line(tested.stderr.strip().replace("sbatch: ", "").replace("error: ", ""))
        except CommandError as error:
            admitted, said = False, str(error)
        return Check("sbatch", admitted, said, "mend account, qos, timeout_min, cpus_per_task, mem_gb or sbatch of cluster")
