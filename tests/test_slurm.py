"""Searches on a real Slurm: what a cluster does to jobs, and that the same population comes out.

The cluster is the one of slurm/lab, started for these tests. Where Slurm is not installed they are skipped.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cluster import LIGHT, MISSING, REPOSITORY, TESTS, Lab, call, command, private_cluster, wait_for
from searches import Setup, Silent, story

from hpc_compress import analysis, guard
from hpc_compress.launch.arrays import cancel
from hpc_compress.launch.local import Debug
from hpc_compress.launch.scheduler import Row
from hpc_compress.launch.slurm import Cluster, Commands, Slurm
from hpc_compress.records import Submission
from hpc_compress.store import Store
from hpc_compress.types import SearchError

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.xdist_group("slurm"),  # one cluster for all of them
    pytest.mark.skipif(bool(MISSING), reason=f"Slurm is not installed: no {', '.join(MISSING)}"),
]


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    with private_cluster() as lab:
        yield lab


@pytest.fixture(scope="module")
def wanted(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The story of the search that nothing happens to."""
    root = tmp_path_factory.mktemp("wanted")
    setup.run(root, *LIGHT, launcher=Debug(worker="light.run"))
    return story(root)


def launcher(commands: Commands | None = None, **cluster: Any) -> Slurm:
    site = {"gpu_type": "a100", "require_cuda": False, "cpus_per_task": 1, "mem_gb": 0.5, "timeout_min": 5, **cluster}
    setup = (f"export PYTHONPATH={REPOSITORY}:{TESTS}", *cluster.pop("setup", ()))
    site = Cluster(**{**site, "setup": setup})
    made = Slurm(cluster=site, worker="light.run", poll_seconds=0.5, settle_seconds=2, lost_seconds=6)
    if commands is not None:
        made._commands = commands
    return made


class Running(threading.Thread):
    """A search that goes on while a test does something to its cluster."""

    def __init__(self, setup: Setup, root: Path, slurm: Slurm) -> None:
        super().__init__(daemon=True)
        self.setup, self.root, self.slurm = setup, root, slurm
        self.progress = Silent()
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.setup.run(self.root, *LIGHT, launcher=self.slurm, progress=self.progress)
        except BaseException as error:
            self.error = error

    def hanging(self) -> dict[str, str]:
        """Where a task hangs that took the fault `hang`."""
        wait_for((self.root / "hanging").exists)
        where = json.loads((self.root / "hanging").read_text())
        where["element"] = f"{where['SLURM_ARRAY_JOB_ID']}_{where['SLURM_ARRAY_TASK_ID']}"
        return where

    def end(self) -> Any:
        self.join(240)
        assert not self.is_alive(), self.progress.lines[-5:]
        if self.error:
            raise self.error
        return story(self.root)


def taken_for_a_run(root: Path) -> None:
    """A driver refuses a folder with anything in it that is not a run's."""
    Store(root).write("driver.json", guard.here().model_copy(update={"ended": True}))


@pytest.fixture
def start(lab: Lab, setup: Setup, tmp_path: Path) -> Callable[..., Running]:
    def begin(fault: str | None = None, slurm: Slurm | None = None) -> Running:
        root = tmp_path / "run"
        root.mkdir(mode=0o700)
        taken_for_a_run(root)
        if fault:
            (root / f"fault-{fault}").touch()
        return Running(setup, root, slurm or launcher())

    return begin


def run_again(element: str) -> None:
    """Spare a requeued job most of its waiting."""
    wait_for(lambda: "PENDING" in call("squeue", "-h", "-j", element, "-o", "%T"))
    time.sleep(3)  # what the first life's script still has to say would be taken for the end of the second one
    call("scontrol", "update", f"jobid={element}", "starttime=now")


def said(running: Running, words: str) -> list[str]:
    return [line for line in running.progress.lines if words in line]


# --- nothing happens ---


def test_a_search_is_the_same_on_a_cluster_in_a_folder_of_any_name(lab: Lab, setup: Setup, wanted: Any, tmp_path: Path):
    root = tmp_path / "a b'c\"d\n日本 $(touch oops) `id` ;"
    os.environ["HF_TOKEN"] = "hf_secret"
    try:
        setup.run(root, *LIGHT, launcher=launcher(array_parallelism=2))
    finally:
        del os.environ["HF_TOKEN"]
    assert story(root) == wanted
    assert root.stat().st_mode & 0o077 == 0
    text = b"".join(path.read_bytes() for path in root.rglob("*") if path.is_file())
    assert b"hf_secret" not in text
    assert not Path("oops").exists()


def test_a_job_of_several_gpus_spreads_its_tasks_one_process_a_gpu(lab: Lab, setup: Setup, wanted: Any, tmp_path: Path):
    setup.run(tmp_path, *LIGHT, launcher=launcher(gpus_per_node=2))
    assert story(tmp_path) == wanted
    submissions = Store(tmp_path).read_all("jobs/*/submission.json", Submission)
    jobs = [len(submission.packs) for submission in submissions]
    tasks = [sum(len(bundle) for pack in submission.packs for bundle in pack) for submission in submissions]
    assert max(tasks) > 1
    assert jobs == [math.ceil(count / 2) for count in tasks]
    logs = [path.name for path in tmp_path.glob("jobs/*/*_log.out")]
    assert any(name.endswith("_1_log.out") for name in logs)  # of the second process


# --- one row of the table of failures after the other ---


@pytest.mark.parametrize("fault", ["exception", "exit-3", "exit-0", "kill", "segfault"])
def test_a_process_that_dies(start: Any, wanted: Any, fault: str):
    running = start(fault)
    assert running.end() == wanted
    assert said(running, "COMPLETED" if fault == "exit-0" else "FAILED")
    assert said(running, "3 tries left")
    assert not said(running, "2 tries left")  # siblings in the array were not sent again


def test_out_of_memory_gets_more_of_it(start: Any, wanted: Any):
    running = start("memory")
    assert running.end() == wanted
    sizes = {submission.mem_mb for submission in Store(running.root).read_all("jobs/*/submission.json", Submission)}
    assert sizes == {512, 1024}


def test_scancel_of_an_element(start: Any, wanted: Any):
    running = start("hang")
    call("scancel", running.hanging()["element"])
    assert running.end() == wanted
    assert said(running, "CANCELLED")


@pytest.mark.slow
def test_the_time_limit(start: Any, wanted: Any):
    running = start("deaf", launcher(timeout_min=1))
    assert running.end() == wanted
    assert said(running, "TIMEOUT")


def test_the_signal_before_the_time_limit(start: Any, wanted: Any):
    running = start("hang")
    element = running.hanging()["element"]
    call("scancel", "--batch", "--signal=USR2", element)
    run_again(element)
    assert running.end() == wanted
    assert not said(running, "lost")


def test_preemption(start: Any, wanted: Any):
    running = start("hang")
    where = running.hanging()
    node = where["SLURMD_NODENAME"]
    urgent = call("sbatch", "--parsable", "-p", "urgent", "-w", node, "--gres=gpu:a100:2", "-o", "/dev/null", "--wrap=sleep 30")
    run_again(where["element"])
    call("scancel", urgent)
    assert running.end() == wanted
    assert not said(running, "lost")


def test_a_node_set_down(start: Any, wanted: Any):
    running = start("hang")
    where = running.hanging()
    call("scontrol", "update", f"nodename={where['SLURMD_NODENAME']}", "state=down", "reason=test")
    try:
        run_again(where["element"])
        assert running.end() == wanted
    finally:
        call("scontrol", "update", f"nodename={where['SLURMD_NODENAME']}", "state=resume")
    assert not said(running, "lost")


def test_a_node_that_fails_for_good_is_left_out(start: Any, wanted: Any):
    running = start("hang", launcher(sbatch={"no-requeue": True}))
    node = running.hanging()["SLURMD_NODENAME"]
    call("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    try:
        assert running.end() == wanted
    finally:
        call("scontrol", "update", f"nodename={node}", "state=resume")
    assert said(running, "NODE_FAIL")
    submissions = Store(running.root).read_all("jobs/*/submission.json", Submission)
    assert (node,) in {submission.exclude for submission in submissions}


def test_a_dead_slurmd_whose_task_goes_on_and_runs_twice(lab: Lab, start: Any, wanted: Any):
    running = start("hang")
    where = running.hanging()
    lab.kill(f"slurmd-{where['SLURMD_NODENAME']}")
    try:
        run_again(where["element"])
        (running.root / "go-on").touch()  # the first one answers too
        assert running.end() == wanted
    finally:
        lab.start()
    assert not said(running, "lost")


def test_suspended(start: Any, wanted: Any):
    running = start("hang")
    element = running.hanging()["element"]
    call("scontrol", "suspend", element)
    time.sleep(4)  # longer than a final state must persist
    (running.root / "go-on").touch()
    assert running.is_alive()
    call("scontrol", "resume", element)
    assert running.end() == wanted
    assert not said(running, "lost")


class Forgetful(Commands):
    """A cluster whose controller is killed in the moment after it took the second array."""

    def __init__(self, lab: Lab) -> None:
        super().__init__()
        self.lab, self.submitted = lab, 0

    def submit(self, *arguments: Any) -> str:
        job_id = super().submit(*arguments)
        self.submitted += 1
        if self.submitted == 2:
            self.lab.kill("slurmctld")
            self.lab.start()
        return job_id


def test_a_controller_killed_just_after_sbatch(lab: Lab, start: Any, wanted: Any):
    assert start(slurm=launcher(Forgetful(lab))).end() == wanted


def test_accounting_is_down_when_a_task_dies(lab: Lab, start: Any, wanted: Any):
    running = start("hang")
    where = running.hanging()
    lab.kill("slurmdbd")
    os.kill(int(where["pid"]), signal.SIGKILL)
    wait_for(lambda: said(running, "Slurm does not answer"))
    time.sleep(7)  # longer than a job that nobody knows would live
    assert not said(running, "lost")
    lab.start()
    assert running.end() == wanted


def test_accounting_stays_down_when_a_task_dies(lab: Lab, start: Any, wanted: Any):
    """After a while squeue alone decides."""
    running = start("hang", launcher().model_copy(update={"accounting_seconds": 4.0}))
    where = running.hanging()
    lab.kill("slurmdbd")
    try:
        os.kill(int(where["pid"]), signal.SIGKILL)
        assert running.end() == wanted
    finally:
        lab.start()
    assert len(said(running, "sacct has not answered")) == 1
    assert said(running, "lost, LOST")


def test_variables_that_hide_jobs_and_move_them_elsewhere(start: Any, wanted: Any, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        for name in ("SQUEUE_PARTITION", "SACCT_PARTITION", "SBATCH_PARTITION"):
            patch.setenv(name, "urgent")
        running = start("hang")
        where = running.hanging()
        time.sleep(8)  # longer than a job that nobody knows would live
        (running.root / "go-on").touch()
        assert running.end() == wanted
    assert not said(running, "lost")
    assert call("sacct", "-nPX", "-j", where["element"], "-o", "partition") == "main"


class Blind(Commands):
    """A cluster whose squeue lists no job for a while."""

    see = False

    def queue(self) -> list[Row]:
        return super().queue() if self.see else []


def test_a_job_that_only_the_accounting_knows_is_waited_for(start: Any, wanted: Any):
    commands = Blind()
    running = start("hang", launcher(commands))
    running.hanging()
    time.sleep(8)  # longer than a job that nobody knows would live
    (running.root / "go-on").touch()
    commands.see = True
    assert running.end() == wanted
    assert not said(running, "lost")


class Damaging(Commands):
    """Does something to the files of an array before it starts."""

    def __init__(self, damage: Callable[[Path, str], None]) -> None:
        super().__init__()
        self.damage, self.submitted = damage, 0

    def submit(self, folder: Path, works: Any, options: dict[str, Any]) -> str:
        self.submitted += 1
        if self.submitted != 2:
            return super().submit(folder, works, options)
        held = {**options["additional_parameters"], "hold": True}
        job_id = super().submit(folder, works, {**options, "additional_parameters": held})
        self.damage(folder, job_id)
        call("scontrol", "release", job_id)
        return job_id


def test_a_truncated_pickle(lab: Lab, start: Any, wanted: Any):
    def truncate(folder: Path, job_id: str) -> None:
        path = folder / f"{job_id}_0_submitted.pkl"
        path.write_bytes(path.read_bytes()[:20])

    assert start(slurm=launcher(Damaging(truncate))).end() == wanted


def test_a_left_over_draft_of_submitit(lab: Lab, start: Any, wanted: Any):
    def leave(folder: Path, job_id: str) -> None:
        for path in folder.glob(f"{job_id}_*_submitted.pkl"):
            path.with_name(f"{path.name}.save_tmp").touch()

    running = start("hang", launcher(Damaging(leave)))
    call("scancel", "--batch", "--signal=USR2", running.hanging()["element"])
    assert running.end() == wanted


def test_a_full_disk(lab: Lab, setup: Setup, wanted: Any, tmp_path: Path):
    room = tmp_path / "room"
    room.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "tmpfs", room], capture_output=True).returncode:
        pytest.skip("this user may not mount a small filesystem")
    try:
        root = room / "run"
        root.mkdir(mode=0o700)
        taken_for_a_run(root)
        (root / "fault-hang").touch()
        running = Running(setup, root, launcher())
        running.hanging()
        with (room / "hog").open("wb", buffering=0) as hog, suppress(OSError):
            while hog.write(bytes(1024)):
                pass
        assert shutil.disk_usage(room).free < 4096
        (root / "go-on").touch()
        with pytest.raises(SearchError, match="no room left"):
            running.end()
        (room / "hog").unlink()
        assert Running(setup, root, launcher()).end() == wanted
    finally:
        subprocess.run(["umount", "--lazy", room], check=True)


def test_outcomes_that_are_not_one(start: Any, wanted: Any):
    running = start("hang")
    array = running.hanging()["SLURM_ARRAY_JOB_ID"]
    wait_for(lambda: len(call("squeue", "-h", "-r", "-j", array, "-o", "%K").split()) == 1)  # its siblings are done
    # Of the task that hangs, and of one that waits behind it if they share a master.
    missing = [path / "outcome.json" for path in running.root.glob("tasks/*") if not (path / "outcome.json").exists()]
    foreign = next(running.root.glob("tasks/*/outcome.json"))
    for content in (b"", b'{"task": {', foreign.read_bytes()):
        for path in missing:
            path.write_bytes(content)
        time.sleep(1.2)  # two polls
    (running.root / "go-on").touch()
    assert running.end() == wanted


def test_a_node_whose_clock_is_an_hour_off(start: Any, wanted: Any, tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text("import time\nreal = time.time\ntime.time = lambda: real() + 3600\n")
    running = start("kill", launcher(setup=(f'export PYTHONPATH="$PYTHONPATH:{tmp_path}"',)))
    assert running.end() == wanted


# --- drivers ---


@pytest.mark.slow
def test_twenty_kills_of_the_driver(lab: Lab, setup: Setup, tmp_path: Path):
    longer = "generations=8"
    setup.run(tmp_path / "wanted", *LIGHT, longer, launcher=Debug(worker="light.run"))
    chance, kills, output = random.Random(1), 0, b""
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    for _ in range(60):
        process = subprocess.Popen(
            command(setup, longer), cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        # The first seconds are imports.
        try:
            output, _ = process.communicate(timeout=chance.uniform(2.5, 5.5) if kills < 20 else 200)
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
            output, _ = process.communicate()
        if process.returncode == 0:
            break
    assert process.returncode == 0, output.decode()
    assert kills == 20
    root = tmp_path / "results" / "test"
    assert story(root) == story(tmp_path / "wanted")
    # Nothing was computed twice but for what a kill between sbatch and its record may cost.
    submissions = Store(root).read_all("jobs/*/submission.json", Submission)
    sent = [task_id for submission in submissions for pack in submission.packs for bundle in pack for task_id in bundle]
    assert len(sent) <= 1.2 * len(set(sent))


def test_a_second_driver_refuses(start: Any, setup: Setup, wanted: Any):
    running = start("hang")
    running.hanging()
    with pytest.raises(SearchError, match="another driver"):
        setup.run(running.root, *LIGHT, launcher=launcher())
    (running.root / "go-on").touch()
    assert running.end() == wanted


def test_cancel_ends_a_runs_jobs_and_no_others(start: Any, setup: Setup, wanted: Any):
    other = call("sbatch", "--parsable", "-o", "/dev/null", "--wrap=sleep 60")
    running = start("hang")
    element = running.hanging()["element"]
    assert "driver at work" in analysis.status(running.root)
    # The driver looks now and then, and Slurm's list may miss an element for a moment.
    wait_for(lambda: re.search(r"^jobs .*\brunning", analysis.status(running.root), re.MULTILINE))
    done = subprocess.run(
        [sys.executable, "-m", "hpc_compress.cli", "cancel", running.root], capture_output=True, text=True, check=True
    )
    assert "jobs cancelled" in done.stdout
    with pytest.raises(SearchError, match="cancelled"):
        running.end()
    wait_for(lambda: element.partition("_")[0] not in call("squeue", "-h", "-o", "%F"))
    assert other in call("squeue", "-h", "-o", "%F")
    call("scancel", other)
    assert Running(setup, running.root, launcher()).end() == wanted


def test_cancel_of_the_last_run_of_a_sweep_spares_the_drivers_of_the_others(lab: Lab, tmp_path: Path):
    tell = "from hpc_compress import guard; print(guard.here().job_id)"
    script = f"{sys.executable} -c '{tell}' >{tmp_path}/$SLURM_ARRAY_TASK_ID; sleep 60"
    drivers = ["sbatch", "--parsable", "--array=0-2", "--mem=100M", "-J", "odd|sweep", "-o", "/dev/null", f"--wrap={script}"]
    array = call(*drivers)
    odd = call(
        "sbatch", "--parsable", "--mem=100M", "-J", "a\nb", "-o", "/dev/null", "--wrap=sleep 60"
    )  # its name has two lines
    try:
        own_id = wait_for(lambda: (tmp_path / "2").exists() and (tmp_path / "2").read_text().strip())
        assert own_id == f"{array}_2"
        done = cancel(Store(tmp_path), Slurm(), own_job=(own_id, "odd|sweep"))
        assert (done.cancelled, done.left) == (1, 0)
        left = call("squeue", "-h", "-r", "-t", "PENDING,RUNNING", "-o", "%F_%K").split()
        assert {f"{array}_0", f"{array}_1", f"{odd}_N/A"} <= set(left)
        assert own_id not in left
    finally:
        call("scancel", array, odd)


def test_limits_of_an_association_and_memory_that_the_site_decides(lab: Lab, setup: Setup, wanted: Any, tmp_path: Path):
    user = call("id", "-un")
    call("sacctmgr", "-i", "modify", "user", user, "set", "MaxSubmitJobs=3")
    try:
        assert Commands().limits(None, None, None).submitted == 3
        setup.run(tmp_path, *LIGHT, launcher=launcher(mem_gb=None))
    finally:
        call("sacctmgr", "-i", "modify", "user", user, "set", "MaxSubmitJobs=-1")
    assert story(tmp_path) == wanted
    packs = [len(submission.packs) for submission in Store(tmp_path).read_all("jobs/*/submission.json", Submission)]
    assert max(packs) in (2, 3)  # jobs of the submission before may still be in the queue
    scripts = [path.read_text() for path in tmp_path.glob("jobs/*/*_submission.sh")]
    assert scripts
    assert not [script for script in scripts if "--wckey" in script or "--mem" in script]


@pytest.mark.slow
def test_a_driver_in_a_job_goes_on_after_its_time_limit(lab: Lab, setup: Setup, tmp_path: Path):
    """With real tasks: sbatch slurm/driver.sbatch, requeued twice, equals the same search in one process."""
    setup.run(tmp_path / "wanted")
    words = [*setup.overrides, "cluster=lab", "cluster.gpus_per_node=0", "launcher.tasks_per_job=2", "launcher.poll_seconds=1"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    submit = ["sbatch", "--parsable", "--mem=1G", "--time=60", REPOSITORY / "slurm/driver.sbatch", *words]
    done = subprocess.run(submit, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    job_id, root = done.stdout.strip(), tmp_path / "results" / "test"
    for tasks in (1, 9):
        wait_for(lambda tasks=tasks: len(list(root.glob("tasks/*/outcome.json"))) >= tasks, 180)
        call("scancel", "--batch", "--signal=USR1", job_id)
        run_again(job_id)
    wait_for((root / "result.json").exists, 300)
    log = (tmp_path / f"hpc_compress_driver-{job_id}.log").read_text()
    assert log.count("back into the queue") == 2
    assert log.count("going on with the run") == 2
    assert story(root) == story(tmp_path / "wanted")
    # The accounting hears of the end a little later than the queue does.
    wait_for(lambda: "COMPLETED" in call("sacct", "-nX", "-j", job_id, "-o", "state"))


def test_the_submit_limit_and_small_arrays(lab: Lab, setup: Setup, wanted: Any, tmp_path: Path):
    call("sacctmgr", "-i", "modify", "qos", "normal", "set", "MaxSubmitJobsPerUser=2")
    try:
        assert Commands().limits(None, None, None).submitted == 2
        slurm, progress = launcher(), Silent()
        setup.run(tmp_path, *LIGHT, launcher=slurm, progress=progress)
    finally:
        call("sacctmgr", "-i", "modify", "qos", "normal", "set", "MaxSubmitJobsPerUser=-1")
    assert story(tmp_path) == wanted
    packs = [len(submission.packs) for submission in Store(tmp_path).read_all("jobs/*/submission.json", Submission)]
    assert max(packs) <= 2


def test_the_doctor_finds_what_is_wrong(lab: Lab, setup: Setup, tmp_path: Path):
    words = [*setup.overrides, "cluster=lab", "cluster.mem_gb=2"]

    def doctor(*more: str) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "hpc_compress.cli", "doctor", *words, *more],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert (done.returncode == 0) == ("FAIL" not in done.stdout), done.stdout + done.stderr
        return done.stdout

    wrong = doctor("cluster.partition=nowhere", "cluster.gpu_type=h100")
    assert "set cluster.partition to one of main, urgent" in wrong
    assert "FAIL gres" in wrong
    well = doctor("launcher.tasks_per_job=4", "launcher.poll_seconds=1")
    assert "all is well" in well, well
    assert "canary" in well


def test_a_driver_in_a_job_comes_back_after_it_was_killed(lab: Lab, setup: Setup, wanted: Any, tmp_path: Path):
    """Its Python process alone, as the kernel does when memory is short; the driver then ends with 137."""
    root = tmp_path / "results" / "test"
    root.mkdir(parents=True, mode=0o700)
    taken_for_a_run(root)
    (root / "fault-hang").touch()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = [word for word in command(setup)[4:] if word != "launcher=slurm"]
    submit = ["sbatch", "--parsable", "--mem=1G", "--time=60", REPOSITORY / "slurm/driver.sbatch", *words]
    done = subprocess.run(submit, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    job_id = done.stdout.strip()
    wait_for((root / "hanging").exists)
    os.kill(json.loads((root / "driver.json").read_text())["pid"], signal.SIGKILL)
    run_again(job_id)
    (root / "go-on").touch()
    wait_for((root / "result.json").exists)
    log = (tmp_path / f"hpc_compress_driver-{job_id}.log").read_text()
    assert log.count("ended with 137: back into the queue") == 1
    assert log.count("going on with the run") == 1
    assert story(root) == wanted
    # The accounting hears of the end a little later than the queue does.
    wait_for(lambda: "COMPLETED" in call("sacct", "-nX", "-j", job_id, "-o", "state"))


@pytest.mark.slow
def test_kills_of_the_driver_of_workers_of_nodes_and_of_the_controller(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    from kills import Plan, disturbed

    found = disturbed(lab, tmp_path, Plan(kills=6, seed=3, generations=2))
    assert found.kills.total() == 6
    assert found.equal
    assert not found.repeated
    assert not found.gave_up
