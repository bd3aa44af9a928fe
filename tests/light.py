"""A worker that does nothing but answer, so that whole searches can be run through a launcher in seconds. Imports no torch.

What it measures follows from the genome alone. A file RUN/fault-<kind> is taken by the first task of a generation that comes
by, and that task then fails in this way, once.
"""

import ctypes
import hashlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hpc_compress import identity
from hpc_compress.store import Store
from hpc_compress.types import (
    Base,
    BlockProfile,
    Dataset,
    Deployed,
    DeviceProfile,
    Genome,
    Measurement,
    MeasurementProtocol,
    Outcome,
    Screen,
    Screening,
    Step,
    Structure,
    Survey,
    Surveyed,
    Task,
)


def run(root: str, task_ids: Sequence[str], **ignored: Any) -> Iterator[str]:
    store = Store(root)
    for task_id in task_ids:
        task = store.task(task_id)
        if store.outcome(task_id) is None:
            if task.genome.steps and task.split == "search":
                _fail_once(store.root)
            store.settle(answer(task))
        yield task_id


def made_up(count: int, first: int = 0) -> list[Task]:
    """Tasks of no model."""
    base = Base(name="none", fingerprint="0" * 16)
    dataset = Dataset(name="none", fingerprint="0" * 16, problem="classification", labels=("a", "b"), metrics=("accuracy",))
    return [
        Task(
            base=base,
            dataset=dataset,
            protocol=MeasurementProtocol(),
            seed=0,
            genome=Genome(steps=(Step(operator="fine_tune", params={"epochs": n}),)),
        )
        for n in range(first, first + count)
    ]


def answer(task: Task, seconds: float = 1.0) -> Outcome:
    """The same for the same genome, wherever and whenever it is asked for."""
    if task.study is not None:
        return Outcome(task=task, finding=_finding(task), seconds={"nothing": seconds})
    digest = hashlib.sha256(identity.canonical(task.genome).encode()).digest()
    quality, speed, size = (0.5 + byte / 512 for byte in digest[:3])
    measurement = Measurement(
        metrics={task.dataset.metrics[0]: quality},
        latency_ms=(10 / speed,),
        base_latency_ms=(10.0,),
        model_bytes=int(1e6 * size),
        parameters=1000,
        encoder_parameters=500,
        device="nothing",
        device_type="cpu",
        of_base=not (task.genome.steps or task.genome.deploy),
        protocol=task.protocol,
    )
    return Outcome(task=task, measurement=measurement, seconds={"nothing": seconds})


def _finding(task: Task) -> Surveyed | Screening | DeviceProfile:
    if isinstance(task.study, Survey):
        scores = ((1.0,),)
        counted = {"parameters": (1, 1), "encoder_parameters": 500, "train_rows": 120}
        return Surveyed(heads=scores, ffn=scores, **counted, bytes=(), sample=((1, 8),))
    if isinstance(task.study, Screen):
        digest = hashlib.sha256(identity.canonical([task.genome, task.study]).encode()).digest()
        deployed = tuple(Deployed(deploy=chain, divergence=digest[1] / 256) for chain in task.study.deploys)
        return Screening(divergence=digest[0] / 256, structure=Structure(heads=(1,), ffn=(1,)), deployed=deployed)
    block = BlockProfile(
        deploy=(),
        batch=1,
        lengths=(8,),
        heads=(0,),
        widths=(0,),
        fixed_ms=(1.0,),
        layer_ms=(1.0,),
        attention_ms=((0.0,),),
        ffn_ms=((0.0,),),
    )
    return DeviceProfile(device="nothing", device_type="cpu", model_type="bert", hidden=1, head_size=1, blocks=(block,))


def _fail_once(root: Path) -> None:
    for path in root.glob("fault-*"):
        taken = root / f"taken-{path.name}"
        try:
            path.rename(taken)
        except FileNotFoundError:
            continue
        _fail(root, path.name.removeprefix("fault-"))


def _fail(root: Path, kind: str) -> None:
    if kind == "exception":
        raise RuntimeError("a fault")
    if kind == "exit-3":
        os._exit(3)
    if kind == "exit-0":
        sys.exit(0)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "segfault":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        ctypes.string_at(0)
    if kind == "memory":
        hoard = bytearray(900 * 2**20)
        hoard[::4096] = b"x" * len(hoard[::4096])
        time.sleep(60)
    if kind == "deaf":  # to the signal before the time limit
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        kind = "hang"
    if kind == "hang":  # until it is told to go on, so that somebody can do something to its job
        keys = ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_ID", "SLURMD_NODENAME")
        where = {key: os.environ.get(key, "") for key in keys}
        draft = root / ".hanging"
        draft.write_text(json.dumps({**where, "pid": os.getpid()}))
        draft.rename(root / "hanging")
        end = time.monotonic() + 300
        while not (root / "go-on").exists() and time.monotonic() < end:
            time.sleep(0.1)


def diary(root: str, task_ids: Sequence[str], **ignored: Any) -> Iterator[str]:
    """The same; a task takes as long as the file `seconds` beside the run folder says. The file `diary` there gets a line when
    work on a task begins, and one when its outcome is written.
    """
    store = Store(root)
    for task_id in task_ids:
        if store.outcome(task_id) is None:
            _note(store.root, "began", task_id)
            time.sleep(float((store.root.parent / "seconds").read_text()))
            store.settle(answer(store.task(task_id)))
            _note(store.root, "wrote", task_id)
        yield task_id


def _note(root: Path, what: str, task_id: str) -> None:
    with (root.parent / "diary").open("ab", buffering=0) as lines:  # one write is whole, whoever else writes
        lines.write(f"{what} {task_id}\n".encode())
