"""The run folder against crashes, damaged files, two writers and odd paths."""

import errno
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from test_search import measured, task

from hpc_compress import door, identity
from hpc_compress.store import Store, _lock
from hpc_compress.types import Failure, Genome, Outcome, Step, Task

TASK = task()
ID = identity.task_id(TASK)
GOOD = Outcome(task=TASK, measurement=measured(0.9))


@pytest.fixture(params=["plain", "with space and 'quotes'", "日本\n語"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Store:
    return Store(tmp_path / request.param)


def test_what_is_settled_is_read_back(store: Store):
    assert store.outcome(ID) is None
    assert store.add_task(TASK) == ID
    assert store.task(ID) == TASK
    store.settle(GOOD)
    assert store.outcome(ID) == GOOD


def test_the_first_valid_outcome_wins(store: Store):
    store.settle(GOOD)
    late = Outcome(task=TASK, failure=Failure(kind="lost", stage="job", message="late"))
    assert store.settle(late) == GOOD
    assert store.outcome(ID) == GOOD


@pytest.mark.parametrize("content", ["", "{", "null", '{"task": 1}', "\x00" * 100], ids=repr)
def test_a_damaged_outcome_is_none_and_is_replaced(store: Store, content: str):
    path = store.root / "tasks" / ID / "outcome.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert store.outcome(ID) is None
    store.settle(GOOD)
    assert store.outcome(ID) == GOOD


def test_every_beginning_of_an_outcome_is_none(store: Store):
    store.settle(GOOD)
    path = store.root / "tasks" / ID / "outcome.json"
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 37):
        path.write_bytes(whole[:length])
        assert store.outcome(ID) is None


def test_an_outcome_of_another_task_is_not_believed(store: Store):
    other = Outcome(task=task(seed=7), measurement=measured(0.1))
    store.write(f"tasks/{ID}/outcome.json", other)
    assert store.outcome(ID) is None


def test_a_missing_task_says_what_to_do(store: Store):
    with pytest.raises(FileNotFoundError, match="start the search again"):
        store.task(ID)


def test_only_failures_are_forgotten(store: Store):
    store.settle(GOOD)
    store.forget_failure(ID)
    assert store.outcome(ID) == GOOD
    (store.root / "tasks" / ID / "outcome.json").unlink()
    store.settle(Outcome(task=TASK, failure=Failure(kind="error", stage="train", message="m")))
    store.forget_failure(ID)
    assert store.outcome(ID) is None


def test_an_artifact_is_there_whole_or_not_at_all(store: Store):
    def fill(folder: Path) -> None:
        (folder / "one").write_text("1")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError), store.new_artifact("key") as folder:
        fill(folder)
    assert store.artifact("key") is None
    with store.new_artifact("key") as folder:
        (folder / "one").write_text("1")
    assert [path.name for path in store.artifact("key").iterdir()] == ["one"]
    assert [path.name for path in store.path("").iterdir()] == ["key"]


def test_the_second_writer_of_an_artifact_does_no_harm(store: Store):
    with store.new_artifact("key") as slow:
        with store.new_artifact("key") as fast:
            (fast / "weights").write_text("same")
        (slow / "weights").write_text("same")
    assert (store.artifact("key") / "weights").read_text() == "same"


def test_the_dead_are_deleted_and_living_writers_are_not(store: Store):
    for key in ("alive", "dead"):
        with store.new_artifact(key) as folder:
            (folder / "weights").write_bytes(b"x" * 10)
    old = store.path(".old.1234")
    old.mkdir()
    os.utime(old, (0, 0))
    with store.new_artifact("being written") as folder:
        (folder / "weights").write_text("w")
        assert store.keep_artifacts({"alive"}) == 10
    assert sorted(path.name for path in store.path("").iterdir()) == ["alive", "being written"]


def test_checkpoints_of_failed_trainings_are_deleted_and_of_living_ones_are_not(store: Store):
    assert store.keep_artifacts(set()) == 0
    store.checkpoint("k").parent.mkdir(parents=True)
    for path in (store.checkpoint("old"), store.checkpoint("young"), store.checkpoint("old").with_name(".old.pt.1234")):
        path.write_bytes(b"x" * 10)
        if "old" in path.name:
            os.utime(path, (0, 0))
    assert store.keep_artifacts({"alive"}) == 20
    assert list(store.checkpoint("k").parent.iterdir()) == [store.checkpoint("young")]


def test_a_lock_keeps_others_out_and_dies_with_its_holder(tmp_path: Path):
    store = Store(tmp_path)
    context = multiprocessing.get_context("fork")
    holder = context.Process(target=_hold, args=(store,))
    holder.start()
    try:
        while not (tmp_path / "held").exists():
            time.sleep(0.01)
        with store.lock("driver", wait=False) as held:
            assert not held
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
    with store.lock("driver", wait=False) as held:
        assert held


def _hold(store: Store) -> None:
    with store.lock("driver"):
        (store.root / "held").touch()
        time.sleep(60)


@pytest.mark.slow
def test_killed_writers_leave_no_half_record(tmp_path: Path):
    """kill -9 at random moments of a writer that never rests: every read is a whole record or none."""
    store = Store(tmp_path)
    context = multiprocessing.get_context("fork")
    for round_ in range(8):
        writer = context.Process(target=_write_forever, args=(store,))
        writer.start()
        time.sleep(0.02 + 0.013 * round_)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        found = list(tmp_path.glob("tasks/*/task.json"))
        assert all(store.read(str(path.relative_to(tmp_path)), Task) is not None for path in found)
    assert found


def _write_forever(store: Store) -> None:
    for seed in range(10**9):
        store.write(f"tasks/{seed % 3}/task.json", task(seed=seed))


# --- several writers ---

LOST = Outcome(task=TASK, failure=Failure(kind="lost", stage="job", message="late"))


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_an_outcome_that_arrives_while_another_is_written_wins(store: Store, monkeypatch: pytest.MonkeyPatch, links: bool):
    def settle_meanwhile(file: int) -> None:
        monkeypatch.setattr(os, "fsync", lambda file: None)
        store.settle(GOOD)

    def no_links(*paths: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(os, "fsync", settle_meanwhile)
    assert store.settle(LOST) == GOOD
    assert store.outcome(ID) == GOOD
    assert [path.name for path in (store.root / "tasks" / ID).iterdir()] == ["outcome.json"]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO], ids=errno.errorcode.get)
def test_an_error_that_passes_does_not_hide_an_outcome(store: Store, monkeypatch: pytest.MonkeyPatch, number: int):
    store.settle(GOOD)
    read, errors = door._read, [number, number]

    def unsteady(*arguments: object) -> bytes:
        if errors:
            raise OSError(errors.pop(), "for a moment")
        return read(*arguments)

    monkeypatch.setattr(door, "_read", unsteady)
    monkeypatch.setattr(door, "WAITS_SECONDS", (0.0, 0.0))
    assert store.outcome(ID) == GOOD
    assert not errors


def test_an_error_that_does_not_pass_is_no_missing_record(store: Store, monkeypatch: pytest.MonkeyPatch):
    def away(*arguments: object) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    store.settle(GOOD)
    monkeypatch.setattr(door, "_read", away)
    monkeypatch.setattr(door, "WAITS_SECONDS", (0.0,))
    with pytest.raises(OSError, match="Stale file handle"):
        store.outcome(ID)


@pytest.mark.parametrize("step", ["mkdir", "fsync", "link", "replace", "unlink"])
def test_an_error_that_passes_does_not_stop_a_writer(store: Store, monkeypatch: pytest.MonkeyPatch, step: str):
    """Before the step is done, and after it: the answer of a server can be lost."""
    for after in (False, True):
        real, errors = getattr(os, step), [errno.EIO]

        def unsteady(*arguments: Any, real: Any = real, errors: list[int] = errors, after: bool = after, **more: Any) -> None:
            if after:
                real(*arguments, **more)
            if errors:
                raise OSError(errors.pop(), "for a moment")
            if not after:
                real(*arguments, **more)

        with monkeypatch.context() as patch:
            patch.setattr(os, step, unsteady)
            patch.setattr(door, "WAITS_SECONDS", (0.0,))
            store.add_task(TASK)
            assert store.settle(GOOD) == GOOD
            store.forget_failure(ID)
            assert not errors
        assert store.task(ID) == TASK
        assert store.outcome(ID) == GOOD
        assert sorted(path.name for path in (store.root / "tasks" / ID).iterdir()) == ["outcome.json", "task.json"]
        shutil.rmtree(store.root)


def test_an_outcome_that_is_a_link_out_of_the_folder_is_not_believed(store: Store, tmp_path: Path):
    (tmp_path / "outcome.json").write_text(GOOD.model_dump_json())
    (store.root / "tasks" / ID).mkdir(parents=True)
    (store.root / "tasks" / ID / "outcome.json").symlink_to(tmp_path / "outcome.json")
    assert store.outcome(ID) is None
    store.settle(LOST)
    assert store.outcome(ID) == LOST
    assert (tmp_path / "outcome.json").read_text() == GOOD.model_dump_json()


def test_a_task_with_a_nan_in_it_is_not_believed(store: Store):
    genome = Genome(steps=(Step(operator="mine", params={"p": math.nan}),))
    text = Outcome(task=TASK.model_copy(update={"genome": genome}), measurement=measured(0.9)).model_dump_json()
    (store.root / "tasks" / ID).mkdir(parents=True)
    (store.root / "tasks" / ID / "outcome.json").write_text(text)
    assert Outcome.model_validate_json(text).task.genome.steps
    assert store.outcome(ID) is None


def test_a_lock_that_nobody_lets_go_of_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hpc_compress.store.LOCK_SECONDS", 0.05)
    store = Store(tmp_path)
    (tmp_path / "locks").mkdir()
    of_a_dead_node = _lock(tmp_path / "locks" / "master")
    assert of_a_dead_node is not None
    with store.lock("master") as held:
        assert not held
    of_a_dead_node.close()


@pytest.mark.slow
def test_a_lock_whose_holder_works_on_is_waited_for_however_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hpc_compress.store.LOCK_SECONDS", 0.5)
    store, held = Store(tmp_path), threading.Event()

    def work() -> None:
        with store.lock("master"):
            held.set()
            time.sleep(2)

    worker = threading.Thread(target=work)
    worker.start()
    held.wait()
    with store.lock("master") as mine:
        assert mine
    worker.join()


def test_locks_leave_no_files(tmp_path: Path):
    store = Store(tmp_path)
    for number in range(3):
        with store.lock(f"master{number}"), store.lock("teacher"):
            pass
    assert not list((tmp_path / "locks").iterdir())


def test_a_lock_on_a_file_that_was_deleted_keeps_others_out(tmp_path: Path):
    """Its holder deletes it between our opening and our locking it."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_count, args=(tmp_path,)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert (tmp_path / "count").read_text() == "200"


def test_a_lock_whose_file_is_gone_for_a_moment_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its holder has just let go of it: there is no file whose time could be a sign of life."""
    take, busy = _lock, iter([True, False])
    monkeypatch.setattr("hpc_compress.store._lock", lambda path: None if next(busy) else take(path))
    with Store(tmp_path).lock("count") as held:
        assert held


def _count(root: Path) -> None:
    count = root / "count"
    for _ in range(50):
        with Store(root).lock("count"):
            before = int(count.read_text()) if count.exists() else 0
            time.sleep(0.0005)
            count.write_text(str(before + 1))
