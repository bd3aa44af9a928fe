"""The run folder: atomic records, artifacts, locks. Knows no torch, no search and no Slurm.

RUN/run.json                     what is searched, in full; a resumed run must agree with it
RUN/base/                        the base checkpoint with its tokenizer
RUN/data/<split>.parquet         rows of train, search and report split
RUN/tasks/<id>/task.json         one task, one folder
RUN/tasks/<id>/answers.npy       what the measured model says of each example of its split
RUN/tasks/<id>/outcome.json      written last, whole or not at all; the first valid one wins
RUN/artifacts/<key>/             fp32 masters and deployed models of the living
RUN/teacher/<key>/               outputs of the base model on the training examples, for distillation
RUN/checkpoints/<key>.pt         state of a training under way; deleted when its master is stored
RUN/generations/<number>.json    who was born and who survived
RUN/jobs/<name>/                 what was submitted, how it ended, and its logs
RUN/block_times/<key>.json       what blocks take on this kind of device, for cuts by time
RUN/scores/<key>.json            what each unit of a model is worth, for cuts
RUN/driver.json                  what the driver is at, and its last sign of life
RUN/result.json                  the end of the search
RUN/seen.json                    what readers keep of outcomes, to be faster the next time; may be deleted
"""

import contextlib
import errno
import fcntl
import io
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Set
from pathlib import Path
from typing import IO, TypeVar

import numpy as np

from hpc_compress import door, identity
from hpc_compress.types import Outcome, Record, Task

R = TypeVar("R", bound=Record)
DRAFT_SECONDS = 6 * 3600  # a younger draft may have a living writer, perhaps one that outlived its driver
# Without a sign of life of a lock's holder: a network filesystem may keep the lock of a dead node for ever.
LOCK_SECONDS = 600.0
ANSWERS = "answers.npy"

log = logging.getLogger(__name__)


class Store:
    """One run folder on a filesystem that the driver and all workers share."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).absolute()

    # --- records ---

    def write(self, name: str, record: Record) -> None:
        """Write `RUN/name` so that a reader sees the old file or the new one, never a part."""
        write_atomically(self.root / name, record.model_dump_json(indent=1))

    def read(self, name: str, kind: type[R]) -> R | None:
        """The record in `RUN/name`; None when it is missing or damaged. Waits while the filesystem has a passing error.

        Raises: OSError when that does not pass: whether there is a record is then not known.
        """
        try:
            return door.record(door.inside(self.root, name), kind)
        except door.DamageError:
            return None

    def delete(self, name: str) -> None:
        """Delete `RUN/name` if it is there."""
        door.patiently(lambda: (self.root / name).unlink(missing_ok=True))

    def read_all(self, pattern: str, kind: type[R]) -> list[R]:
        """The records of every `RUN/pattern`, in the order of their paths; those that can't be read are left out."""
        names = sorted(str(path.relative_to(self.root)) for path in self.root.glob(pattern))
        return [record for name in names if (record := self.read(name, kind)) is not None]

    def add_task(self, task: Task) -> str:
        """Describe a task in its folder, so that a worker needs only its id."""
        task_id = identity.task_id(task)
        if self.read(f"tasks/{task_id}/task.json", Task) != task:
            self.write(f"tasks/{task_id}/task.json", task)
        return task_id

    def task(self, task_id: str) -> Task:
        task = self.read(f"tasks/{task_id}/task.json", Task)
        if task is None or not identity.is_id_of(task_id, task):
            raise FileNotFoundError(f"{self.root}/tasks/{task_id}/task.json is missing or damaged; start the search again")
        return task

    def outcome(self, task_id: str) -> Outcome | None:
        """The outcome of a task; None unless the file is whole and describes this very task."""
        outcome = self.read(f"tasks/{task_id}/outcome.json", Outcome)
        return outcome if outcome is not None and identity.is_id_of(task_id, outcome.task) else None

    def settle(self, outcome: Outcome) -> Outcome:
        """Record an outcome unless there is a valid one already; returns the one that holds."""
        return door.patiently(lambda: self._settle(outcome))

    def _settle(self, outcome: Outcome) -> Outcome:
        task_id = identity.task_id(outcome.task)
        final = self.root / "tasks" / task_id / "outcome.json"
        with _draft(final, outcome.model_dump_json(indent=1)) as draft:
            try:
                os.link(draft, final)  # fails where there is a file: of two writers, the first one wins
                return outcome
            except OSError as error:
                if error.errno in door.PASSING:
                    raise
                # There is an outcome, perhaps this one, or this filesystem has no links.
                with self.lock("settle"):
                    if (earlier := self.outcome(task_id)) is not None:
                        return earlier
                    draft.replace(final)
        return outcome

    def write_answers(self, task_id: str, answers: np.ndarray) -> None:
        """Keep what a model says of each example: (n,) class ids, in as few bytes as hold them, or numbers."""
        small = answers.astype(np.float32 if answers.dtype.kind == "f" else np.min_scalar_type(int(answers.max(initial=0))))
        content = io.BytesIO()
        np.save(content, small, allow_pickle=False)
        write_atomically(self.root / "tasks" / task_id / ANSWERS, content.getvalue())

    def answers(self, task_id: str) -> np.ndarray | None:
        """(n,) what `write_answers` was given; None where there is none.

        Raises: DamageError for a file that holds no such thing.
        """
        path = door.inside(self.root, "tasks", task_id, ANSWERS)
        try:
            found = np.load(io.BytesIO(door.read_bytes(path)), allow_pickle=False)
        except FileNotFoundError:
            return None
        except (ValueError, EOFError, OSError, MemoryError, OverflowError) as error:
            if isinstance(error, door.DamageError):
                raise
            raise door.DamageError(f"{path} is no array of ours: {door.one_line(str(error))}") from None
        if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype.kind not in "fu":
            raise door.DamageError(f"{path} holds no row of class ids or numbers")
        return found

    def forget_failure(self, task_id: str) -> None:
        """Let a failed task be tried again; a measurement stays."""
        outcome = self.outcome(task_id)
        if outcome is not None and outcome.failure:
            self.delete(f"tasks/{task_id}/outcome.json")

    # --- artifacts ---

    def path(self, key: str) -> Path:
        """Where the artifact of a key lies, or would."""
        return self.root / "artifacts" / key

    def artifact(self, key: str) -> Path | None:
        """The folder of a stored artifact; None when there is none."""
        return self.path(key) if self.path(key).is_dir() else None

    def checkpoint(self, key: str) -> Path:
        """The file in which the training that leads to a key may keep its state."""
        return self.root / "checkpoints" / f"{key}.pt"

    def new_artifact(self, key: str) -> contextlib.AbstractContextManager[Path]:
        """A fresh folder to write an artifact into; it takes its place when the block ends without an error."""
        return _new_folder(self.path(key))

    def keep_artifacts(self, keys: Set[str]) -> int:
        """Delete every artifact but these, and what failed trainings of others left; returns the bytes set free.

        What is deleted can be computed again.
        """
        freed = 0
        for folder in self.path("").iterdir() if self.path("").is_dir() else ():
            # A draft that its writer puts in place in this very moment is no longer there under its name.
            with contextlib.suppress(FileNotFoundError):
                young = time.time() - folder.stat().st_mtime < DRAFT_SECONDS
                if folder.name in keys or (folder.name.startswith(".") and young):
                    continue
                freed += folder_bytes(folder)
                # Renamed first, so that nobody opens an artifact that is half deleted.
                doomed = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
                folder.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)
        for file in (self.root / "checkpoints").glob("*"):
            with contextlib.suppress(FileNotFoundError):
                status = file.stat()
                if file.stem not in keys and time.time() - status.st_mtime >= DRAFT_SECONDS:
                    file.unlink()
                    freed += status.st_size
        return freed

    # --- teacher outputs ---

    def teacher(self, key: str) -> Path:
        """Where the outputs of the base model of a key lie, or would. They stay as long as the run folder."""
        return self.root / "teacher" / key

    def new_teacher(self, key: str) -> contextlib.AbstractContextManager[Path]:
        """A fresh folder to write them into, as for an artifact. What lies in its place is taken for damaged, and deleted."""
        final = self.teacher(key)
        shutil.rmtree(final, ignore_errors=True)
        for draft in final.parent.glob(f".{key}.*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - draft.stat().st_mtime >= DRAFT_SECONDS:
                    shutil.rmtree(draft, ignore_errors=True)
        return _new_folder(final)

    # --- locks ---

    @contextlib.contextmanager
    def lock(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold `RUN/locks/name`; yields whether it is held. The system lets go of it when the process dies.

        wait: until it is free, however long its holder works; but when that has shown no sign of life for LOCK_SECONDS, go on
        without it: two writers may repeat work, but they do no harm.
        """
        path = self.root / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        beat, end, pause = None, time.monotonic() + LOCK_SECONDS, 0.02
        while (stream := _lock(path)) is None and wait:
            if (last := _changed_ns(path)) != beat:
                beat, end = last, time.monotonic() + LOCK_SECONDS
            elif time.monotonic() >= end:
                log.warning(
                    "who holds %s, perhaps a dead node, shows no life for %.0f s; going on without it", path, LOCK_SECONDS
                )
                break
            time.sleep(pause)
            pause = min(2 * pause, 5.0)
        if stream is None:
            yield False
            return
        try:
            with touching(path, LOCK_SECONDS / 10):
                yield True
        finally:
            with contextlib.suppress(OSError):
                path.unlink()  # while it is held: see _lock
            stream.close()


@contextlib.contextmanager
def touching(path: Path, seconds: float) -> Iterator[None]:
    """Give a sign of life every so many seconds, while this thread is busy: a new time of change of a file."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(seconds):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _changed_ns(path: Path) -> int | None:
    """When a file was changed last, by the clock of its filesystem; None when it is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _lock(path: Path) -> IO[str] | None:
    """A lock file, open and locked; None when somebody else holds it."""
    while True:
        stream = path.open("a")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever lets go of a lock deletes its file. A lock on a deleted file keeps nobody out.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(stream.fileno()), path.stat()):
                    return stream
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return stream  # some shared filesystems have no locks
            stream.close()
            return None
        stream.close()


@contextlib.contextmanager
def _new_folder(final: Path) -> Iterator[Path]:
    final.parent.mkdir(parents=True, exist_ok=True)
    draft = final.with_name(f".{final.name}.{secrets.token_hex(4)}")
    draft.mkdir()
    try:
        yield draft
        # A folder can't replace a full one: whoever comes second finds the same content there and leaves.
        with contextlib.suppress(OSError):
            draft.rename(final)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    if not final.is_dir():
        raise OSError(f"{final} could not be put in place; is the folder writable?")


def write_atomically(path: Path, content: str | bytes) -> None:
    def write() -> None:
        with _draft(path, content) as draft:
            draft.replace(path)

    door.patiently(write)


@contextlib.contextmanager
def _draft(path: Path, content: str | bytes) -> Iterator[Path]:
    """A file beside `path` with this content, safe on the disk; deleted in the end if it is still there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with draft.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        yield draft
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def private_umask() -> Iterator[None]:
    """What is made meanwhile can't be changed by a group or by others: nodes run what lies in a run folder."""
    before = os.umask(0o022)
    os.umask(before | 0o022)
    try:
        yield
    finally:
        os.umask(before)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
