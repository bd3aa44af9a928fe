"""What can be wrong with a cluster, found before a long run: check after check, and a sentence of advice for each failure."""

import contextlib
import fcntl
import os
import platform
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hpc_compress import door
from hpc_compress.door import one_line
from hpc_compress.launch.commands import CommandError, Commands, RefusedError, ask, call, run
from hpc_compress.launch.local import driver_version
from hpc_compress.launch.slurm import Slurm
from hpc_compress.types import Record

COMMANDS = ("sbatch", "srun", "squeue", "sacct", "scancel", "scontrol", "sinfo")
NODE_MINUTES = 10.0  # that the first job may take to come back; a full cluster takes longer
SKEW_SECONDS = 5.0  # between two clocks that nobody would notice
# The oldest driver on which each major version of CUDA runs: https://docs.nvidia.com/deploy/cuda-compatibility
OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}
SCHEMES, RESTS = ("int8", "nf4", "fp4"), ("fp32", "bf16")  # what a search makes with bitsandbytes


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    found: str
    advice: str = ""  # what to do when it is not ok


class Node(Record):
    """What a job saw where it ran."""

    host: str
    time: float  # of day there, when it looked
    python: str
    seen: bool  # the file that the login node had written
    locks: bool
    driver: str  # version of NVIDIA's driver; "" where there is none
    cuda: str  # that torch is built for; "" for a build without it
    device: str  # "" where torch sees no GPU
    refusal: str  # why torch sees none, in its own words
    bitsandbytes: str  # what does not work; "" when all does


@dataclass(frozen=True)
class Look:
    """What runs on the node."""

    folder: str

    def __call__(self) -> None:
        import torch

        from hpc_compress.store import Store

        store, refusal = Store(self.folder), ""
        if not torch.cuda.is_available():
            try:
                torch.cuda.init()
            except Exception as error:  # every error is a result here
                refusal = one_line(str(error))
        node = Node(
            host=platform.node(),
            time=time.time(),
            python=sys.version.split()[0],
            seen=(store.root / "hello").is_file(),
            locks=_has_locks(store.root),
            driver=driver_version(),
            cuda=torch.version.cuda or "",
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else "",
            refusal=refusal,
            bitsandbytes=precisions_that_fail(),
        )
        store.write("node.json", node)


def _has_locks(folder: Path) -> bool:
    """Whether the filesystem has locks. `Store.lock` goes on without them where it has none, and does not say so."""
    with (folder / "lock").open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def precisions_that_fail() -> str:
    """Each precision of bitsandbytes with each rest, as a search makes, stores, loads and runs it; "" when all work."""
    failures: dict[str, list[str]] = {}
    for scheme in SCHEMES:
        for rest in RESTS:
            try:
                _try_precision(scheme, rest)
            except Exception as error:  # every error is a result here
                failures.setdefault(one_line(f"{type(error).__name__}: {error}", 200), []).append(f"{scheme} with {rest}")
    return "; ".join(f"{', '.join(names)}: {message}" for message, names in failures.items())


def _try_precision(scheme: str, rest: str) -> None:
    """Raises: whatever goes wrong with a tiny model."""
    import torch
    from transformers import AutoModelForSequenceClassification, BertConfig

    from hpc_compress import measure
    from hpc_compress.deployment.quantization import quantize
    from hpc_compress.models import artifact

    config = BertConfig(
        vocab_size=99,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=16,
    )
    on = measure.device()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        artifact.save(quantize(AutoModelForSequenceClassification.from_config(config), scheme, rest), Path(folder))
        model = artifact.load(Path(folder), on)
        for rows in (1, 32):  # bitsandbytes has kernels of their own for few rows
            logits = model(input_ids=torch.ones(rows, 12, dtype=torch.long, device=on)).logits
            if not torch.isfinite(logits).all():
                raise FloatingPointError(f"{rows} rows give numbers that are not finite")


def examine(
    settings: Slurm, folder: Path, need_bytes: int, canary: Callable[[], None], commands: Commands | None = None
) -> Iterator[Check]:
    """Look at everything that a search needs, cheapest first; ends early where the rest can't work.

    folder: where runs are kept. need_bytes: that the search may take there. canary: runs a task of every kind of step on
    the cluster and raises when one fails.
    """
    commands = commands or Commands()
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    yield Check("commands", not missing, ", ".join(missing or COMMANDS), "start from a login node; or load Slurm's module")
    if missing:
        return
    yield from _partition(settings)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    yield Check(
        "disk",
        free > need_bytes,
        f"{free / 1e9:.1f} GB free on {folder}, the search may need {need_bytes / 1e9:.1f} GB (a quota is not seen here)",
        "free some, choose a folder on a larger filesystem, or lower strategy.population",
    )
    trouble = ""
    try:
        call("sacct", "-nX", "--starttime=now-1minutes")
    except CommandError as error:
        trouble = str(error)
    yield Check(
        "accounting",
        not trouble,
        trouble or "answers",
        "without sacct it takes launcher.accounting_seconds until a dead job is noticed, and its reason is not known",
    )
    came_back = True
    for check in _node(settings, folder, commands):
        came_back = check.ok or check.name != "job"
        yield check
    if came_back:
        yield _canary(canary)


def _partition(settings: Slurm) -> Iterator[Check]:
    cluster = settings.cluster
    chosen = [f"--partition={cluster.partition}"] if cluster.partition else []
    lines = [
        line for line in _lines("sinfo", "--noheader", "--all", *chosen, "--format=%P|%D|%G|%l|%m|%c") if line.count("|") == 5
    ]
    names = sorted({line.rstrip("*") for line in _lines("sinfo", "--noheader", "--all", "--format=%P")})
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
    words = {**cluster.request(cluster.mem_mb(cluster.mem_gb), ()), **cluster.sbatch}
    flags = [f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}") for key, value in words.items()]
    try:
        tested = run("sbatch", "--test-only", *flags, "--wrap=true")
        admitted = tested.returncode == 0
        said = one_line(tested.stderr.strip().replace("sbatch: ", "").replace("error: ", ""))
    except CommandError as error:
        admitted, said = False, str(error)
    yield Check("sbatch", admitted, said, "mend account, qos, timeout_min, cpus_per_task, mem_gb or sbatch of cluster")


def _node(settings: Slurm, folder: Path, commands: Commands) -> Iterator[Check]:
    """A job of its own, to see the run folder, the GPU and the clock of a node."""
    room = folder / f".doctor-{secrets.token_hex(4)}"
    room.mkdir(mode=0o700)
    (room / "hello").touch()
    cluster = settings.cluster
    options = cluster.options(room.name.lstrip("."), room, cluster.mem_mb(cluster.mem_gb), ())
    begin = time.time()
    try:
        job_id = commands.submit(room, [Look(str(room))], {**options, "ntasks_per_node": 1, "time": 10})
    except RefusedError as error:
        yield Check("job", False, f"sbatch: {error}", "mend what it names among the keys of cluster")
        return
    try:
        state = _wait_for(commands, job_id, room / "node.json")
        if not (room / "node.json").exists():
            logs = [path for path in sorted(room.iterdir()) if path.suffix in (".log", ".err", ".out") and path.stat().st_size]
            tail = one_line(" | ".join(line for path in logs for line in door.tail(path).splitlines()[-3:]))
            advice = (
                "the cluster is full or the request can't be met: try again later, or see `squeue --start`"
                if state == "PENDING"
                else f"see that {folder} and {sys.executable} are on a filesystem that the nodes share, and that "
                "cluster.modules and cluster.setup do what Python needs"
            )
            yield Check("job", False, f"job {job_id} is {state} and left nothing; {tail or 'no log'}", advice)
            return
        seen = time.time()
        node = door.record(room / "node.json", Node)
        if node is None:
            raise door.DamageError(f"{room / 'node.json'} was there and is gone; run the doctor again")
        yield Check("job", True, f"ran on {node.host} with Python {node.python}, {seen - begin:.0f} s after sbatch")
        yield Check(
            "shared folder", node.seen, f"{folder} seen and written from {node.host}", "keep results/ on a shared filesystem"
        )
        yield Check(
            "locks",
            node.locks,
            "work on the run folder" if node.locks else "do not work there",
            "two jobs may compute the same; no harm but time. Ask for flock on that mount",
        )
        skew = max(begin - node.time, node.time - seen, 0.0)
        yield Check(
            "clock", skew < SKEW_SECONDS, f"{skew:.0f} s apart at the least", "nothing breaks; but logs will be out of order"
        )
        yield _cuda(node, wanted=cluster.gpus_per_node > 0 and cluster.require_cuda)
        yield Check(
            "bitsandbytes",
            not node.bitsandbytes,
            node.bitsandbytes or f"{', '.join(SCHEMES)} work with a rest of {' and '.join(RESTS)}",
            "install the bitsandbytes of pyproject.toml; or leave these precisions out: strategy.mutations.int8.weight=0",
        )
    finally:
        with contextlib.suppress(CommandError):  # most likely it has ended
            commands.cancel([job_id])
        shutil.rmtree(room, ignore_errors=True)


def _cuda(node: Node, wanted: bool) -> Check:
    """Whether torch sees the GPU; if not, whether the driver, the build of torch or the job is to blame."""
    build = f"torch is built for {f'CUDA {node.cuda}' if node.cuda else 'CPUs'}"
    driver = f"NVIDIA driver {node.driver}" if node.driver else "no NVIDIA driver"
    found = f"{node.device or 'no device'}; {driver}; {build}"
    if node.device or not wanted:
        return Check("CUDA", True, found)
    oldest = OLDEST_DRIVERS.get(int(node.cuda.partition(".")[0] or 0), 0)
    if not node.driver:
        advice = "choose a cluster.partition with GPUs, and set cluster.gpu_type as the gres of its nodes has it"
    elif not node.cuda:
        advice = "install a CUDA build of torch (https://pytorch.org/get-started)"
    elif int(node.driver.partition(".")[0]) < oldest:
        fitting = [major for major, least in OLDEST_DRIVERS.items() if int(node.driver.partition(".")[0]) >= least]
        advice = f"CUDA {node.cuda} needs driver {oldest} or newer: ask for a newer driver on the nodes" + (
            f", or install a build of torch for CUDA {fitting[-1]} (https://pytorch.org/get-started). Modules don't help here"
            if fitting
            else ""
        )
    else:
        advice = (
            f"the driver is new enough, and torch says: {node.refusal or 'nothing'}. See that the job was given a GPU "
            "(cluster.gpus_per_node, cluster.gpu_type) and that no module or setup line hides it"
        )
    return Check("CUDA", False, found, advice)


def _wait_for(commands: Commands, job_id: str, path: Path) -> str:
    """The state of the job when it has left the file, is over, or has taken too long."""
    state, end = "PENDING", time.monotonic() + 60 * NODE_MINUTES
    while time.monotonic() < end and not path.exists():
        time.sleep(1)
        os.listdir(path.parent)
        try:
            rows = [row.state for row in commands.squeue() if row.job_id == job_id]
            if not rows:
                time.sleep(2)  # for what it wrote to be seen here
                return next((row.state for row in commands.sacct([job_id])), "over")
            state = rows[0]
        except CommandError:
            continue
    return state


def _canary(canary: Callable[[], None]) -> Check:
    begin = time.monotonic()
    try:
        canary()
    except Exception as error:  # every error is a result here
        return Check("canary", False, str(error), "mend it and run the doctor again")
    return Check("canary", True, f"a task of every kind of step, {time.monotonic() - begin:.0f} s")


def _lines(*command: str) -> list[str]:
    return [one_line(line.strip()) for line in ask(*command).splitlines() if line.strip()]
