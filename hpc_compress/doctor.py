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
from hpc_compress.launch.arrays import ArrayLauncher
from hpc_compress.launch.local import driver_version
from hpc_compress.launch.scheduler import Check, CommandError, Names, RefusedError
from hpc_compress.types import Record

NODE_MINUTES = 10.0  # that the first job may take to come back; a full cluster takes longer
SKEW_SECONDS = 5.0  # between two clocks that nobody would notice
# The oldest driver on which each major version of CUDA runs: https://docs.nvidia.com/deploy/cuda-compatibility
OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}
SCHEMES, RESTS = ("int8", "nf4", "fp4"), ("fp32", "bf16")  # what a search makes with bitsandbytes


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


def examine(launcher: ArrayLauncher, folder: Path, need_bytes: int, canary: Callable[[], None]) -> Iterator[Check]:
    """Look at everything that a search needs, cheapest first; ends early where the rest can't work.

    folder: where runs are kept. need_bytes: that the search may take there. canary: runs a task of every kind of step on
    the cluster and raises when one fails.
    """
    names = launcher.names
    missing = [name for name in names.programs if shutil.which(name) is None]
    yield Check(
        "commands",
        not missing,
        ", ".join(missing or names.programs),
        f"start from a login node; or load {names.system}'s module",
    )
    if missing:
        return
    yield from launcher.checks()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    yield Check(
        "disk",
        free > need_bytes,
        f"{free / 1e9:.1f} GB free on {folder}, the search may need {need_bytes / 1e9:.1f} GB (a quota is not seen here)",
        "free some, choose a folder on a larger filesystem, or lower strategy.population",
    )
    came_back = True
    for check in _node(launcher, folder):
        came_back = check.ok or check.name != "job"
        yield check
    if came_back:
        yield _canary(canary)


def _node(launcher: ArrayLauncher, folder: Path) -> Iterator[Check]:
    """A job of its own, to see the run folder, the GPU and the clock of a node."""
    room = folder / f".doctor-{secrets.token_hex(4)}"
    room.mkdir(mode=0o700)
    (room / "hello").touch()
    names, begin = launcher.names, time.time()
    try:
        options = launcher.options_to_look(room.name.lstrip("."), room)
        job_id = launcher.commands.submit(room, [Look(str(room))], options)
    except RefusedError as error:
        yield Check("job", False, f"{names.submit}: {error}", f"mend what it names among the keys of {names.keys}")
        return
    try:
        state = _wait_for(launcher, job_id, room / "node.json")
        if not (room / "node.json").exists():
            yield _without_a_trace(launcher, room, job_id, state)
            return
        seen = time.time()
        node = door.record(room / "node.json", Node)
        if node is None:
            raise door.DamageError(f"{room / 'node.json'} was there and is gone; run the doctor again")
        yield Check("job", True, f"ran on {node.host} with Python {node.python}, {seen - begin:.0f} s after {names.submit}")
        yield from _on(node, launcher, folder, begin, seen)
    finally:
        with contextlib.suppress(CommandError):  # most likely it has ended
            launcher.commands.cancel([job_id])
        shutil.rmtree(room, ignore_errors=True)


def _without_a_trace(launcher: ArrayLauncher, room: Path, job_id: str, state: str) -> Check:
    """Of a job that has not left what it was to leave."""
    logs = [path for path in sorted(room.iterdir()) if path.suffix in (".log", ".err", ".out") and path.stat().st_size]
    tail = one_line(" | ".join(line for path in logs for line in door.tail(path).splitlines()[-3:]))
    names = launcher.names
    advice = (
        f"the cluster is full or the request can't be met: try again later, or see `{names.estimate}`"
        if state == launcher.states.waiting
        else f"see that {room.parent} and {sys.executable} are on a filesystem that the nodes share, and that "
        f"{names.keys}.modules and {names.keys}.setup do what Python needs"
    )
    return Check("job", False, f"job {job_id} is {state} and left nothing; {tail or 'no log'}", advice)


def _on(node: Node, launcher: ArrayLauncher, folder: Path, begin: float, seen: float) -> Iterator[Check]:
    """What a job saw on its node. begin, seen: when it was submitted, and when its answer was seen, by the clock here."""
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
    yield _cuda(node, launcher.names, wanted=launcher.needs_gpu)
    yield Check(
        "bitsandbytes",
        not node.bitsandbytes,
        node.bitsandbytes or f"{', '.join(SCHEMES)} work with a rest of {' and '.join(RESTS)}",
        "install the bitsandbytes of pyproject.toml; or leave these precisions out, as with strategy.space.deploys.nf4=null",
    )


def _cuda(node: Node, names: Names, wanted: bool) -> Check:
    """Whether torch sees the GPU; if not, whether the driver, the build of torch or the job is to blame."""
    build = f"torch is built for {f'CUDA {node.cuda}' if node.cuda else 'CPUs'}"
    driver = f"NVIDIA driver {node.driver}" if node.driver else "no NVIDIA driver"
    found = f"{node.device or 'no device'}; {driver}; {build}"
    if node.device or not wanted:
        return Check("CUDA", True, found)
    oldest = OLDEST_DRIVERS.get(int(node.cuda.partition(".")[0] or 0), 0)
    if not node.driver:
        advice = names.gpu_advice
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
            f"({names.gpu_keys}) and that no module or setup line hides it"
        )
    return Check("CUDA", False, found, advice)


def _wait_for(launcher: ArrayLauncher, job_id: str, path: Path) -> str:
    """The state of the job when it has left the file, is over, or has taken too long."""
    commands, state, end = launcher.commands, launcher.states.waiting, time.monotonic() + 60 * NODE_MINUTES
    while time.monotonic() < end and not path.exists():
        time.sleep(1)
        os.listdir(path.parent)
        try:
            rows = [row.state for row in commands.queue() if row.job_id == job_id]
            if not rows:
                time.sleep(2)  # for what it wrote to be seen here
                return next((row.state for row in commands.accounting([job_id])), "over")
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
