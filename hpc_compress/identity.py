"""Canonical JSON, content hashes and derived seeds. Knows nothing of what is hashed."""

import hashlib
import json
import struct
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import BaseModel

from hpc_compress.types import Step, Task


def canonical(value: Any) -> str:
    """One text for one value: sorted keys, no white space, 1.0 written as 1, no NaN."""
    return _written(_plain(value))


def _written(plain: Any) -> str:
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


# Parameters that have another name now. Identities are computed from the first one, so that they stay what they were.
FIRST_NAMES = {"hidden_distance": "closeness"}


PLAIN = {str, int, bool, NoneType}  # most values; a reader of a long run meets millions, so they cost no call


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, dict):
        return {
            FIRST_NAMES.get(name := str(key), name): item if type(item) in PLAIN else _plain(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [item if type(item) in PLAIN else _plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def content_hash(*values: Any) -> str:
    """16 hex digits that stand for the values in full."""
    return _hash(_plain(values))


def _hash(plain: Any) -> str:
    return hashlib.sha256(_written(plain).encode()).hexdigest()[:16]


def task_id(task: Task) -> str:
    return content_hash("task", task)


def is_id_of(task_id: str, task: Task) -> bool:
    """False also for a task that has no id, since its parameters hold a NaN or text that is no Unicode."""
    try:
        return content_hash("task", task) == task_id
    except ValueError:
        return False


def ids_of(task: Task) -> tuple[str, str]:
    """The id of a task, and that of the task that measures the same genome on the report split. A reader of a long run asks for
    thousands, so the task is made plain once.

    Raises: ValueError for a task that has no id, as in `is_id_of`.
    """
    plain = _plain(task)
    report = {**plain, "split": "report"}
    report.pop("study", None)
    return _hash(["task", plain]), _hash(["task", report])


def master_key(task: Task, steps: tuple[Step, ...] | None = None) -> str:
    """The artifact key of the fp32 weights after `steps` (default: all of the task's). Measuring has no part in it."""
    steps = task.genome.steps if steps is None else steps
    return content_hash("master", task.base, task.dataset, task.seed, steps, task.limit)


def deployed_key(task: Task) -> str:
    """The artifact key of the model as it would run; the master itself when it is deployed as it is."""
    if not task.genome.deploy:
        return master_key(task)
    return content_hash("deployed", master_key(task), task.genome.deploy)


def derive(seed: int, *purpose: Any) -> int:
    """A seed of 63 bits for one purpose of a run: independent streams, the same after every resume."""
    digest = hashlib.sha256(canonical([seed, *purpose]).encode()).digest()
    return int(struct.unpack("<Q", digest[:8])[0] >> 1)


def files_hash(files: list[Path]) -> str:
    """Of the names and contents of files, in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        with path.open("rb") as stream:
            total.update(f"{path.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()[:16]
