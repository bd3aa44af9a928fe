"""Drivers and workers that live side by side, end early, or leave others behind."""

import grp
import os
import pwd
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import light
import pytest
from searches import Setup, Silent
from test_run import lightly

from hpc_compress import analysis, driver, guard, identity, store
from hpc_compress.config import ConfigError
from hpc_compress.dispatch import Dispatch
from hpc_compress.launch import Ended, Work
from hpc_compress.launch.local import Local
from hpc_compress.process import Process
from hpc_compress.records import Heartbeat
from hpc_compress.store import DRAFT_SECONDS, Store
from hpc_compress.types import Base, Dataset, Failure, Genome, MeasurementProtocol, Outcome, SearchError, Step, Task

TESTS = Path(__file__).parent


def another() -> subprocess.Popen:
    """A process that lives until it is told to end."""
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def beat_of(pid: int, **more: Any) -> Heartbeat:
    return guard.here().model_copy(update={"pid": pid, "started": Process.of(pid).started, **more})


def test_a_process_is_known_by_its_number_and_its_start():
    here = Process.here()
    assert here.lives()
    assert not Process(here.pid, (here.started or 0) + 1).lives()
    other = another()
    mark = Process(other.pid, beat_of(other.pid).started)
    assert mark.lives()
    other.kill()
    other.wait()
    assert not mark.lives()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A filesystem on which every lock is granted."""

    class Held:
        def __enter__(self) -> bool:
            return True

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(Store, "lock", lambda *args, **kwargs: Held())


def test_without_locks_a_second_driver_of_this_machine_is_refused(setup: Setup, tmp_path: Path, no_locks: None):
    other = another()
    try:
        Store(tmp_path).write("driver.json", beat_of(other.pid))
        with pytest.raises(SearchError, match="another driver"):
            lightly(setup, tmp_path)
        Store(tmp_path).write("driver.json", beat_of(other.pid, started=1))  # its number was given to a later process
        lightly(setup, tmp_path)
        Store(tmp_path).write("driver.json", beat_of(other.pid, ended=True))  # it goes on with other runs
        lightly(setup, tmp_path)
    finally:
        other.kill()


def test_a_driver_stops_when_another_one_has_gone_on_with_its_run(
    setup: Setup, tmp_path: Path, no_locks: None, monkeypatch: pytest.MonkeyPatch
):
    def answer(task: Any, seconds: float = 1.0) -> Any:
        if task.genome.steps:
            Store(tmp_path).write("driver.json", Heartbeat(host="elsewhere", pid=1, job_id=None, job_name=None))
        return honest(task)

    honest = light.answer
    monkeypatch.setattr(light, "answer", answer)
    with pytest.raises(SearchError, match=r"another driver has gone on with this run \(elsewhere, process 1\)"):
        lightly(setup, tmp_path)
    last = Store(tmp_path).read("driver.json", Heartbeat)
    assert last is not None
    assert (last.host, last.ended) == ("elsewhere", False)


def test_a_driver_that_is_busy_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guard, "HEARTBEAT_SECONDS", 0.02)
    store = Store(tmp_path)
    store.write("driver.json", guard.here())
    os.utime(tmp_path / "driver.json", (0, 0))
    with guard._beating(tmp_path / "driver.json"):
        end = time.monotonic() + 20
        while (tmp_path / "driver.json").stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.01)
    assert (tmp_path / "driver.json").stat().st_mtime > 0
    last = store.read("driver.json", Heartbeat)
    assert last is not None
    assert last.ended


@pytest.mark.parametrize("code", [0, 1, 2, 75, 137])
@pytest.mark.parametrize("script", sorted((TESTS.parent / "slurm").glob("*.sbatch")), ids=lambda path: path.stem)
def test_a_batch_script_goes_back_into_the_queue_after_accidents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printing: Callable[..., Path], script: Path, code: int
):
    """And after nothing that is an answer, nor for ever."""
    words, requeued = printing("hpc-compress", code=code), printing("scontrol")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    for restarts in ("", "19", "20"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        accident = code > 2 and restarts != "20"
        assert subprocess.run(["bash", script, "seed=a b"]).returncode == (0 if accident else code)
        assert words.read_text().splitlines()[-1] == "seed=a b"
        assert requeued.exists() == accident
        if accident:
            assert requeued.read_text().split() == ["requeue", "17"]
            requeued.unlink()
    if code > 2:
        printing("scontrol", error="slurm_requeue error: Invalid job id specified", code=1)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
        assert subprocess.run(["bash", script]).returncode == 75


# --- what nodes run ---


def test_nothing_that_nodes_run_is_written_for_a_group(setup: Setup, tmp_path: Path):
    before = os.umask(0o002)
    try:
        lightly(setup, tmp_path / "run")
        assert os.umask(0o002) == 0o002
    finally:
        os.umask(before)
    open_to_others = [path for path in (tmp_path / "run").rglob("*") if path.lstat().st_mode & guard.OTHERS_WRITE]
    assert open_to_others == []


def test_what_others_could_plant_for_nodes_is_refused(setup: Setup, tmp_path: Path):
    lightly(setup, tmp_path / "run")
    planted = tmp_path / "run" / "jobs" / "a" / "0_submitted.pkl"
    planted.parent.mkdir(parents=True)
    planted.touch()
    planted.chmod(0o664)
    with pytest.raises(ConfigError, match=r"0_submitted.pkl can be written to by others.*chmod -R go-w"):
        lightly(setup, tmp_path / "run")
    planted.chmod(0o644)
    lightly(setup, tmp_path / "run")


def test_a_run_folder_that_everybody_could_exchange_is_refused(setup: Setup, tmp_path: Path):
    parent = tmp_path / "open"
    parent.mkdir()
    parent.chmod(0o777)
    with pytest.raises(ConfigError, match="everybody can write to"):
        lightly(setup, parent / "run")
    parent.chmod(0o1777)  # as /tmp
    lightly(setup, parent / "run")


def test_a_group_is_refused_where_we_make_folders_and_only_named_further_up(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(guard, "_is_private", lambda gid: False)
    project, run = tmp_path / "project", tmp_path / "project/mine/results/run"
    run.parent.mkdir(parents=True)
    project.chmod(0o2775)
    monkeypatch.chdir(run.parents[1])
    lightly(setup, run)
    assert f"they write to {project} (a group)" in caplog.text
    run.parent.chmod(0o775)
    with pytest.raises(ConfigError, match=r"a group can write to .*/results, .*chmod g-w .*/results"):
        lightly(setup, run)
    monkeypatch.setattr(guard, "_is_private", lambda gid: True)
    lightly(setup, run)


def test_another_user_is_refused_where_we_make_folders_and_only_named_further_up(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    real, results = Path.stat, tmp_path / "results"

    def of_another(path: Path, **options: Any) -> os.stat_result:
        found = real(path, **options)
        return os.stat_result([*found[:4], owner, *found[5:]]) if path == results else found

    results.mkdir()
    monkeypatch.setattr(Path, "stat", of_another)
    monkeypatch.chdir(tmp_path)
    owner = os.getuid() + 1
    with pytest.raises(ConfigError, match="another user, its owner, can write to"):
        lightly(setup, results / "run")
    monkeypatch.chdir(results)
    lightly(setup, results / "run")
    assert f"they write to {results} (another user, its owner)" in caplog.text
    owner = 0
    monkeypatch.chdir(tmp_path)
    lightly(setup, results / "run")


def test_a_private_group_has_one_member_and_its_name(monkeypatch: pytest.MonkeyPatch):
    def group(name: str, *members: str) -> None:
        monkeypatch.setattr(guard.grp, "getgrgid", lambda gid: grp.struct_group((name, "x", gid, list(members))))

    def users(*found: tuple[str, int]) -> None:
        entries = [
            pwd.struct_passwd((name, "x", os.getuid() + at, gid, "", "/", "/bin/sh")) for at, (name, gid) in enumerate(found)
        ]
        monkeypatch.setattr(guard.pwd, "getpwuid", lambda uid: entries[0])
        monkeypatch.setattr(guard.pwd, "getpwall", lambda: entries)

    users(("me", 1000), ("you", 1001))
    group("me")
    assert guard._is_private(1000)
    group("me", "me")
    assert guard._is_private(1000)
    assert not guard._is_private(1001), "not the primary one"
    group("me", "me", "you")
    assert not guard._is_private(1000)
    group("users")
    assert not guard._is_private(1000), "a directory service need not list the others"
    users(("me", 1000), ("you", 1000))
    group("me")
    assert not guard._is_private(1000)


# --- workers ---


def silent(root: str, task_ids: Sequence[str], **ignored: Any) -> Iterator[str]:
    """A worker that says it is done, and has done nothing."""
    yield from task_ids


def test_a_worker_without_outcomes_does_not_hold_a_search_up_for_ever(setup: Setup, tmp_path: Path):
    with pytest.raises(SearchError, match=r"base model could not be measured: lost.*test_lives.silent came to its end"):
        lightly(setup, tmp_path, "test_lives.silent")


def sleeps(root: str, task_ids: Sequence[str], **ignored: Any) -> Iterator[str]:
    (Path(root) / "worker.pid").write_text(str(os.getpid()))
    time.sleep(600)
    yield ""


@pytest.mark.slow
def test_a_local_worker_ends_with_its_driver(tmp_path: Path):
    other = another()
    work = Work(str(tmp_path), (("a",),), worker="test_lives.sleeps", driver=Process(other.pid, beat_of(other.pid).started))
    assert work.driver is not None
    code = f"import test_lives; from hpc_compress.launch import Process, Work; {work!r}()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    worker = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (tmp_path / "worker.pid").exists() and time.monotonic() < end:
        assert worker.poll() is None, worker.communicate()
        time.sleep(0.05)
    other.send_signal(signal.SIGKILL)
    other.wait()
    _, said = worker.communicate(timeout=20)
    assert worker.returncode == 1
    assert "the driver is gone" in said


def drive(root: str) -> None:
    """A driver that waits for a worker of this machine for ever."""
    with Local(workers=1, worker="test_lives.sleeps").open(Path(root), lambda *done: None, print) as jobs:
        jobs.submit([("a",)])
        while True:
            jobs.poll()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_killed_driver_takes_its_local_workers_with_it(tmp_path: Path, number: signal.Signals):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    other = subprocess.Popen([sys.executable, "-c", f"import test_lives; test_lives.drive({str(tmp_path)!r})"], env=environment)
    worker = None
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "worker.pid").exists() or not (tmp_path / "worker.pid").read_text():
            assert other.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        pid = int((tmp_path / "worker.pid").read_text())
        worker = Process.of(pid)
        assert worker.lives()
        other.send_signal(number)
        assert other.wait(20) == -number
        end = time.monotonic() + 20
        while worker.lives() and time.monotonic() < end:
            time.sleep(0.05)
        assert not worker.lives()
    finally:
        other.kill()
        if worker is not None and worker.lives():
            os.kill(worker.pid, signal.SIGKILL)


# --- late tasks ---


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The keys of the artifacts that were kept, each time that others were deleted."""
    keys_of_each: list[set[str]] = []
    keep = Store.keep_artifacts
    monkeypatch.setattr(Store, "keep_artifacts", lambda store, keys: keys_of_each.append(set(keys)) or keep(store, keys))
    return keys_of_each


@pytest.mark.slow
def test_what_late_tasks_go_on_from_is_not_buried(
    setup: Setup, tmp_path: Path, kept: list[set[str]], monkeypatch: pytest.MonkeyPatch
):
    """The master of a prefix and the checkpoint of a training, both of a task that is still in the queue."""
    search = driver._Search._bury

    def bury(run: Any, alive: Any, base: Any) -> None:
        late = dict(run.late)
        search(run, alive, base)
        for proposal in late.values():
            task = run._task(proposal.genome)
            steps = task.genome.steps
            assert {identity.master_key(task, steps[:done]) for done in range(1, len(steps) + 1)} <= kept[-1]
            seen.append(len(steps))

    seen: list[int] = []
    monkeypatch.setattr(driver._Search, "_bury", bury)
    lightly(setup, tmp_path, "light.run", "select_after=0.5", "generations=4")
    assert max(seen) > 1


@pytest.mark.slow
def test_nothing_is_late_in_a_last_generation_that_no_setting_names(setup: Setup, tmp_path: Path):
    words = ("strategy._target_=screens.Once", "select_after=0.25", "generations=9")
    result = lightly(setup, tmp_path, "light.run", *words)
    assert (result.generations, result.stopped) == (2, "all is proposed")
    first, last = analysis.open_run(tmp_path).generations
    assert len(first.told) < 4
    assert len(first.told) + len(last.told) == 4


@pytest.mark.slow
@pytest.mark.parametrize("reported", [True, False])
def test_the_front_is_buried_unless_the_report_measures_it(setup: Setup, tmp_path: Path, kept: list[set[str]], reported: bool):
    words = ("report_candidates=1", "strategy.survivors=1", "timings=1", f"report_front={str(reported).lower()}")
    lightly(setup, tmp_path, "light.run", *words)
    run = analysis.open_run(tmp_path)
    assert len(run.result.front) > 1
    tasks = [run.outcomes[id].task for id in run.result.front]
    wanted = {key(task) for task in tasks for key in (identity.master_key, identity.deployed_key)}
    assert (wanted <= kept[-1]) == reported


def test_checkpoints_of_the_living_are_kept_however_old(tmp_path: Path):
    store = Store(tmp_path)
    for key in ("alive", "dead"):
        store.checkpoint(key).parent.mkdir(exist_ok=True)
        store.checkpoint(key).touch()
        long_ago = time.time() - 2 * DRAFT_SECONDS
        os.utime(store.checkpoint(key), (long_ago, long_ago))
    store.keep_artifacts({"alive"})
    assert [path.stem for path in (tmp_path / "checkpoints").iterdir()] == ["alive"]


# --- outcomes that arrive late, or not all ---


def a_task(number: int = 0) -> Task:
    steps = tuple(Step(operator="fine_tune", params={"epochs": n + 1}) for n in range(number))
    return Task(
        base=Base(name="base", fingerprint="0" * 16),
        dataset=Dataset(name="words", fingerprint="0" * 16, problem="classification", metrics=("accuracy",), labels=("a", "b")),
        protocol=MeasurementProtocol(),
        seed=0,
        genome=Genome(steps=steps),
        split="search",
    )


class Packs:
    """Jobs that end as a test says, one poll after the other."""

    def __init__(self, *ends: Any) -> None:
        self.ends, self.sent = list(ends), []

    def submit(self, bundles: Any, alone: bool = False) -> None:
        self.sent += bundles

    def poll(self) -> list[Ended]:
        return self.ends.pop(0)()

    def in_flight(self) -> set[str]:
        return set()

    def counts(self) -> Counter[str]:
        return Counter()

    def cancel(self) -> None: ...


@pytest.mark.parametrize("writes", ["before", "while"])
def test_a_lost_task_whose_process_answers_has_one_outcome_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: str
):
    """It is declared lost, and in the same moment its process writes down a measurement."""
    ours, task = Store(tmp_path), a_task()
    real = os.fsync

    def answer_first(descriptor: int) -> None:
        monkeypatch.setattr(store.os, "fsync", real)
        ours.settle(light.answer(task))
        real(descriptor)

    def end() -> list[Ended]:
        if writes == "before":
            ours.settle(light.answer(task))
        else:
            monkeypatch.setattr(store.os, "fsync", answer_first)
        return [Ended((identity.task_id(task),), "its node failed")]

    (told,) = Dispatch(ours, Packs(end), Silent(), retries=0).settle([task], "test")
    assert told == light.answer(task)
    assert ours.outcome(identity.task_id(task)) == told


def test_a_job_that_ends_after_a_failure_costs_its_other_tasks_no_try(tmp_path: Path):
    ours = Store(tmp_path)
    first, second = a_task(1), a_task(2)
    ids = [ours.add_task(task) for task in (first, second)]

    def spent() -> list[Ended]:
        ours.settle(Outcome(task=first, failure=Failure(kind="error", stage="train", message="device-side assert")))
        return [Ended(tuple(ids), "COMPLETED")]

    def well() -> list[Ended]:
        ours.settle(light.answer(second))
        return [Ended((ids[1],), "COMPLETED")]

    jobs = Packs(spent, well)
    outcomes = Dispatch(ours, jobs, Silent(), retries=0).settle([first, second], "test")
    assert [bool(outcome.measurement) for outcome in outcomes] == [False, True]
    assert jobs.sent[-1] == (ids[1],)
