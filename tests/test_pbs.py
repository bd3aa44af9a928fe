"""Searches on a PBS that fake_pbs.py imitates: what becomes of jobs, and what is read in what the commands print."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from light import answer, made_up
from searches import Setup, Silent, story
from simulated import nothing_to_load

from hpc_compress import cli, config, doctor, guard, launch
from hpc_compress.config import ConfigError
from hpc_compress.dispatch import Dispatch
from hpc_compress.launch.local import Debug
from hpc_compress.launch.pbs import Commands, Pbs, refusal
from hpc_compress.launch.scheduler import CommandError, Limits, RefusedError, Row
from hpc_compress.records import Ends, Heartbeat, Submission
from hpc_compress.store import Store
from hpc_compress.types import SearchError

TESTS = Path(__file__).parent
SETUP = f"export PYTHONPATH={TESTS.parent}:{TESTS}"


@pytest.fixture
def pbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Its folder; see fake_pbs.py."""
    room, bin = tmp_path / "pbs", tmp_path / "pbs-bin"
    room.mkdir()
    bin.mkdir()
    for name in ("qsub", "qselect", "qstat", "qdel", "pbsnodes"):
        shutil.copy(TESTS / "fake_pbs.py", bin / name)
        (bin / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(bin), prepend=os.pathsep)
    monkeypatch.setenv("FAKE_PBS", str(room))
    yield room
    for path in room.glob("jobs/*/[0-9]*.json"):
        element = json.loads(path.read_text())
        if element["job_state"] == "R":
            os.killpg(element["pid"], signal.SIGKILL)


def launcher(**more: Any) -> Pbs:
    small = {"ngpus": 0, "ncpus": 1, "mem_gb": 1, "worker": "light.run", "setup": (SETUP,)}
    return Pbs(**{**small, "poll_seconds": 0.3, "settle_seconds": 0.5, "lost_seconds": 2, **more})


class Run:
    """A run folder, and a driver that does nothing but settle tasks."""

    def __init__(self, root: Path, **settings: Any) -> None:
        self.progress, self.store, self.settings = Silent(), Store(root), launcher(**settings)
        with self.settings.open(root, self.progress.working, self.progress.say) as self.jobs:
            self.dispatch = Dispatch(self.store, self.jobs, self.progress, retries=2)

    def said(self, words: str) -> list[str]:
        return [line for line in self.progress.lines if words in line]

    @property
    def submissions(self) -> list[Submission]:
        return self.store.read_all("jobs/*/submission.json", Submission)

    def until(self, what: Callable[[], Any], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, self.progress.lines
            self.dispatch._turn()


def ends(run: Run) -> list[str]:
    found = run.store.read_all("jobs/*/ends.json", Ends)
    return [f"{end.state} {end.exit_code}" for each in found for end in each.ends.values()]


@pytest.fixture(scope="module")
def light_setup(tmp_path_factory: pytest.TempPathFactory, compose: Any) -> Setup:
    """A search of which no model is ever loaded."""
    overrides = nothing_to_load(tmp_path_factory.mktemp("light"))
    search = ["generations=2", "strategy.population=4", "objective.b=0", "name=test", "probe=false"]
    # Of the processor of this machine, which says nothing about that of a cluster's nodes.
    return Setup([*overrides, *search, "strategy.quantizations.bf16.weight=0"], compose)


# --- whole searches ---


@pytest.mark.slow
def test_a_search_on_pbs_in_a_folder_of_any_name_equals_one_in_a_process(light_setup: Setup, pbs: Path, tmp_path: Path):
    light_setup.run(tmp_path / "wanted", launcher=Debug(worker="light.run"))
    root = tmp_path / "a b'c\"d 日本 $(touch oops) `id` ; % \\"
    light_setup.run(root, launcher=launcher())
    assert story(root) == story(tmp_path / "wanted")
    submissions = Store(root).read_all("jobs/*/submission.json", Submission)
    assert {submission.scheduler for submission in submissions} == {"pbs"}
    assert max(len(submission.packs) for submission in submissions) == 4, "the server admits arrays of 4 elements"
    assert [path for path in root.rglob("*") if path.stat().st_mode & guard.OTHERS_WRITE] == []
    assert not Path("oops").exists()


@pytest.mark.slow
def test_a_driver_that_was_killed_finds_its_jobs_again(light_setup: Setup, pbs: Path, tmp_path: Path):
    light_setup.run(tmp_path / "wanted", launcher=Debug(worker="light.run"))
    root = tmp_path / "results/test"
    root.mkdir(parents=True, mode=0o700)
    Store(root).write("driver.json", guard.here().model_copy(update={"ended": True}))
    (root / "fault-hang").touch()
    own = ["launcher=pbs", "launcher.ngpus=0", "launcher.poll_seconds=0.3", f"launcher.setup=['{SETUP}']"]
    words = ["search", *light_setup.overrides, *own, "+launcher.worker=light.run"]
    driver = subprocess.Popen([sys.executable, "-m", "hpc_compress.cli", *words], cwd=tmp_path, stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while not (root / "hanging").exists():
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)
    driver.kill()
    driver.communicate()
    (root / "go-on").touch()
    progress = Silent()
    light_setup.run(root, launcher=launcher(), progress=progress)
    assert [line for line in progress.lines if "arrays of an earlier driver" in line]
    assert story(root) == story(tmp_path / "wanted")
    submissions = Store(root).read_all("jobs/*/submission.json", Submission)
    sent = [task_id for submission in submissions for pack in submission.packs for bundle in pack for task_id in bundle]
    assert len(sent) == len(set(sent)), "a task was sent twice"


@pytest.mark.slow
@pytest.mark.parametrize("kept", [pytest.param(True, marks=pytest.mark.slow), False])
def test_jobs_are_found_by_their_name_where_the_id_was_not_written_down(pbs: Path, tmp_path: Path, kept: bool):
    """While they are in the queue, and when they have ended. Without a history of jobs, their outcomes show it."""
    before = Run(tmp_path / "run")
    before.dispatch.send(made_up(3), "tasks")
    before.jobs._send()
    (path,) = tmp_path.glob("run/jobs/*/sent.json")
    path.unlink()
    if kept:
        before.until(lambda: "X" in _letters(pbs) or "F" in _letters(pbs))
    else:
        (pbs / "no_history").touch()
    after = Run(tmp_path / "run")
    assert after.dispatch.settle(made_up(3), "tasks") == list(map(answer, made_up(3)))
    after.until(lambda: not after.jobs.in_flight())
    assert len(after.submissions) == 1
    assert not after.said("lost")


def _letters(pbs: Path) -> set[str]:
    return {json.loads(path.read_text())["job_state"] for path in pbs.glob("jobs/*/[0-9]*.json")}


# --- how jobs end ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "state", "mem_mb"),
    [
        ("265", "FAILED 265", 2048),  # by signal 9
        pytest.param("-27", "OUT_OF_MEMORY -27", 2048, marks=pytest.mark.slow),
        pytest.param("-29", "TIMEOUT -29", 1024, marks=pytest.mark.slow),
        pytest.param("271", "TERMINATED 271", 1024, marks=pytest.mark.slow),
        pytest.param("3", "FAILED 3", 1024, marks=pytest.mark.slow),
        pytest.param("forget", "LOST ", 1024, marks=pytest.mark.slow),
    ],
)
def test_a_job_that_dies_is_sent_again(pbs: Path, tmp_path: Path, fault: str, state: str, mem_mb: int):
    (pbs / "faults").write_text(fault)
    run = Run(tmp_path / "run")
    assert run.dispatch.settle(made_up(3), "tasks") == list(map(answer, made_up(3)))
    run.until(lambda: not run.jobs.in_flight())
    assert sorted(ends(run)) == sorted(["COMPLETED 0"] * 3 + [state])
    assert len(run.said("2 tries left")) == 1
    assert sorted((len(s.packs), s.mem_mb) for s in run.submissions) == [(1, mem_mb), (3, 1024)]
    assert all(submission.exclude == () for submission in run.submissions), "qsub can't leave nodes out"


@pytest.mark.slow
def test_where_no_history_is_kept_a_dead_job_is_lost_after_a_while(pbs: Path, tmp_path: Path):
    (pbs / "faults").write_text("3")
    (pbs / "no_history").touch()
    run = Run(tmp_path / "run")
    assert run.dispatch.settle(made_up(3), "tasks") == list(map(answer, made_up(3)))
    assert len(run.said("lost, LOST")) == 1


@pytest.mark.slow
def test_a_job_that_the_server_gave_up_on_is_cancelled_and_sent_again(pbs: Path, tmp_path: Path):
    (pbs / "hold").touch()
    run = Run(tmp_path / "run")
    run.dispatch.send(made_up(2), "tasks")
    run.jobs._send()
    run.until(lambda: len(run.said("lost, TERMINATED")) == 2)
    (pbs / "hold").unlink()
    assert run.dispatch.settle(made_up(2), "tasks") == list(map(answer, made_up(2)))


@pytest.mark.slow
def test_a_server_that_is_away_is_waited_for(pbs: Path, tmp_path: Path):
    run = Run(tmp_path / "run", lost_seconds=0.2)
    run.dispatch.send(made_up(2), "tasks")
    run.jobs._send()
    (pbs / "down").write_text("Connection refused\nqstat: cannot connect to server fake (errno=111)")
    run.until(lambda: run.said("PBS does not answer, waiting: qselect: Connection refused"))
    for _ in range(5):
        run.dispatch._turn()
    (pbs / "down").unlink()
    assert run.dispatch.settle(made_up(2), "tasks") == list(map(answer, made_up(2)))
    assert not run.said("lost")


# --- cancelling ---


@pytest.mark.slow
def test_cancel_ends_the_jobs_of_this_run_and_no_others(pbs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "sleep.sh").write_text("exec sleep 60\n")
    subprocess.run(["qsub", "-N", "foreign", tmp_path / "sleep.sh"], check=True, capture_output=True)
    run = Run(tmp_path / "run", worker="light.diary")
    (tmp_path / "seconds").write_text("60")
    run.dispatch.send(made_up(3), "tasks")
    run.jobs._send()
    end = time.monotonic() + 60
    while not (tmp_path / "diary").exists():
        assert time.monotonic() < end
        time.sleep(0.1)
    Store(run.store.root).write("driver.json", Heartbeat(host="n1", pid=1, job_id=None, job_name=None))
    cli._cancel([str(run.store.root)])
    assert capsys.readouterr().out.startswith("3 jobs cancelled")
    states = {path.parent.name: json.loads(path.read_text())["job_state"] for path in pbs.glob("jobs/*/[0-9]*.json")}
    assert states == {"1": "R", "2": "F"}
    with pytest.raises(SearchError, match="cancelled"):
        run.dispatch._turn()


@pytest.mark.slow
def test_the_job_that_a_driver_lives_in_is_cancelled_and_its_siblings_are_not(
    pbs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "sleep.sh").write_text("exec sleep 60\n")
    subprocess.run(["qsub", "-N", "sweep", "-J", "0-1", tmp_path / "sleep.sh"], check=True, capture_output=True)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PBS_JOBID", "1[1].fake")
    monkeypatch.setenv("PBS_JOBNAME", "sweep")
    heartbeat = guard.here()
    assert (heartbeat.job_id, heartbeat.job_name, heartbeat.scheduler) == ("1[1]", "sweep", "pbs")
    Store(tmp_path / "run").write("driver.json", heartbeat)
    cli._cancel([str(tmp_path / "run")])
    assert capsys.readouterr().out.startswith("1 jobs cancelled")
    rows = Commands().queue()
    assert [(row.job_id, row.index) for row in rows] == [("1[]", 0)]
    Commands().cancel(["1[]"])


def test_records_of_the_oldest_system_name_none(tmp_path: Path):
    """So run folders of the version that knew no other are read, and go on unchanged."""
    records = (Submission(name="a", packs=(), mem_mb=None), Heartbeat(host="n", pid=1, job_id="17", job_name=None))
    for record in records:
        assert "scheduler" not in json.loads(record.model_dump_json())
    store = Store(tmp_path)
    for number, scheduler in enumerate((None, "pbs")):
        record = Submission(name=f"run-{number}", packs=((("a",),),), mem_mb=None, scheduler=scheduler)
        store.write(f"jobs/run-{number}/submission.json", record)
    from hpc_compress.launch.arrays import _submissions
    from hpc_compress.launch.slurm import Slurm

    assert [s.name for s in _submissions(store, Slurm())] == ["run-0"]
    assert [s.name for s in _submissions(store, Pbs())] == ["run-1"]


# --- commands ---


def shown(**jobs: Any) -> str:
    return json.dumps({"timestamp": 1, "pbs_version": "23", "Jobs": jobs["jobs"]})


def test_qstat_is_read(printing: Callable[..., Path]):
    job = {"Job_Name": "run-1", "exec_host": "n1/0*8+n2/0*8", "comment": "Job run"}
    used = {"resources_used": {"walltime": "01:02:03"}}
    jobs = {
        "17[].server": {**job, "job_state": "B"},
        "17[0].server": {**job, "job_state": "X", "Exit_status": 0, **used},
        "17[1].server": {**job, "job_state": "X", "Exit_status": "-29"},
        "17[2].server": {**job, "job_state": "F", "substate": 91},
        "17[3].server": {**job, "job_state": "X"},
        "17[4].server": {**job, "job_state": "Q", "exec_host": None, "comment": "Not\x1b Running"},
        "18.server.site.org": {**job, "job_state": "E", "Exit_status": 0},
        "19[].server": {**job, "job_state": "H", "comment": "job held, too many failed attempts to run"},
        "19[0].server": {**job, "job_state": "Q", "comment": "queued"},
    }
    arguments = printing("qstat", "Welcome to the cluster!\n" + shown(jobs=jobs))
    assert Commands().accounting(["17[]", "18", "19[]"]) == [
        Row("17[]", 0, "run-1", "COMPLETED", "n1", "Job run", "0", 3723),
        Row("17[]", 1, "run-1", "TIMEOUT", "n1", "Job run", "-29"),
        Row("17[]", 2, "run-1", "TERMINATED", "n1", "Job run"),
        Row("17[]", 3, "run-1", "ENDED", "n1", "Job run"),
        Row("17[]", 4, "run-1", "PENDING", "None", "Not? Running"),
        Row("18", 0, "run-1", "EXITING", "n1", "Job run"),
        Row("19[]", 0, "run-1", "PENDING", "n1", "job held, too many failed attempts to run"),
    ]
    assert {"-x", "-t", "-f", "-F", "json", "17[]", "18"} <= set(arguments.read_text().split())
    printing("qselect", "Welcome!\n17[].server\n18.server.site.org\n19[].server\n")
    assert [(row.job_id, row.index) for row in Commands().queue()] == [("17[]", 4), ("18", 0), ("19[]", 0)]


LONG = 5000 * "9"  # more digits than Python reads
ODD_JOBS = [
    {"17[0].server": None},
    {"17[0].server": []},
    {"17[0].server": {"job_state": "R"}},
    {"17[0].server": {"job_state": ["R"], "Job_Name": "run-1"}},
    {"17[0].server": {"job_state": "?", "Job_Name": "run-1"}},
    {f"{LONG}[0].server": {"job_state": "R", "Job_Name": "run-1"}},
    {f"17[{LONG}].server": {"job_state": "R", "Job_Name": "run-1"}},
    {"17[-1].server": {"job_state": "R", "Job_Name": "run-1"}},
    {"": {"job_state": "R", "Job_Name": "run-1"}},
]


@pytest.mark.parametrize("odd", ODD_JOBS, ids=range(len(ODD_JOBS)))
def test_jobs_that_can_not_be_read_are_skipped(printing: Callable[..., Path], odd: dict[str, Any]):
    ours = {"18.server": {"job_state": "R", "Job_Name": "run-1"}}
    printing("qstat", shown(jobs={**odd, **ours}))
    assert Commands().accounting(["18"]) == [Row("18", 0, "run-1", "RUNNING", "")]


@pytest.mark.parametrize(
    "values",
    [
        {"Exit_status": LONG, "state": "ENDED"},
        {"Exit_status": None, "state": "ENDED"},
        {"Exit_status": {"a": 1}, "state": "ENDED"},
        {"Exit_status": 7, "resources_used": "none", "state": "FAILED"},
        {"Exit_status": 7, "resources_used": {"walltime": f"{LONG}:00:00"}, "state": "FAILED"},
        {"Exit_status": 7, "resources_used": {"walltime": ["1"]}, "exec_host": {"n": 1}, "comment": 5, "state": "FAILED"},
    ],
    ids=repr,
)
def test_odd_values_of_a_job_do_no_harm(printing: Callable[..., Path], values: dict[str, Any]):
    state = values.pop("state")
    printing("qstat", shown(jobs={"18.server": {"job_state": "F", "Job_Name": "run-1", **values}}))
    (row,) = Commands().accounting(["18"])
    assert (row.state, row.seconds) == (state, 0)


NO_JSON = ["{", "Welcome!", '{"Jobs": {"18.server": {', "[" * 100_000, '{"a": "\x01"}']


@pytest.mark.parametrize("out", NO_JSON, ids=range(len(NO_JSON)))
def test_an_answer_that_is_no_json_is_none(printing: Callable[..., Path], out: str):
    """Nobody is lost on account of it."""
    printing("qstat", out)
    with pytest.raises(CommandError, match="something else than JSON"):
        Commands().accounting(["18"])


@pytest.mark.parametrize("out", ['{"Jobs": []}', '{"Jobs": {}}', '{"timestamp": 1}', ""])
def test_an_answer_without_jobs_is_one(printing: Callable[..., Path], out: str):
    printing("qstat", out)
    assert Commands().accounting(["18"]) == []


def test_skipped_jobs_are_told_once(printing: Callable[..., Path], caplog: pytest.LogCaptureFixture):
    printing("qstat", shown(jobs={"odd\x1b": {}, "other": {}}))
    ours = Commands()
    assert ours.accounting(["18"]) == ours.accounting(["18"]) == []
    assert [record.getMessage() for record in caplog.records] == [
        "qstat prints jobs that are skipped since they can't be read, such as: odd?"
    ]


def test_a_command_that_fails_says_nothing_unless_a_job_has_ended(
    printing: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    gone = "qstat: Unknown Job Id 17[].server\nqstat: 19.server Job has finished, use -x or -H to obtain historical job info"
    printing("qstat", shown(jobs={"18.server": {"job_state": "R", "Job_Name": "a"}}), gone, 153)
    assert len(Commands().accounting(["17[]", "18"])) == 1
    printing("qstat", "", "qstat: PBS is not configured to maintain job history", 1)
    assert Commands().accounting(["18"]) == []
    for said in (f"{gone}\nqstat: End of File", "cannot connect to server", ""):
        printing("qstat", "", said, 1)
        with pytest.raises(CommandError, match="qstat: "):
            Commands().accounting(["18"])
    printing("qselect")
    printing("qdel", error="qdel: Job 17[].server has finished", code=35)
    Commands().cancel(["17[]"])
    printing("qdel", error="qdel: Unauthorized Request  18.server", code=159)
    with pytest.raises(CommandError, match="Unauthorized"):
        Commands().cancel(["18"])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(CommandError, match="not on this machine; start the search where PBS's commands are"):
        Commands().queue()


SAYINGS = {
    "would exceed queue workq's per-user limit of jobs in 'Q' state": "full",
    "Maximum number of jobs already in queue for user": "full",
    "Array job exceeds server or queue size limit": "full",
    "cannot connect to server fake (errno=111)": "busy",
    "Connection refused": "busy",
    "End of File": "busy",
    "Unknown queue": "never",
    "Job violates queue and/or server resource limits": "never",
    "Unauthorized Request": "never",
    "illegal -N value": "never",
}


@pytest.mark.parametrize(("message", "kind"), SAYINGS.items(), ids=range(len(SAYINGS)))
def test_what_qsub_means(message: str, kind: str):
    assert refusal(message).kind == kind


def test_what_can_never_be_admitted_ends_the_search_and_says_why(pbs: Path, tmp_path: Path, printing: Callable[..., Path]):
    run = Run(tmp_path / "run")
    printing("qsub", error="qsub: Unknown queue", code=170)
    with pytest.raises(ConfigError, match=r"qsub refused the jobs: Unknown queue; mend the keys of launcher"):
        run.dispatch.settle(made_up(2), "tasks")
    printing("qsub", "no id")
    with pytest.raises(RefusedError) as error:
        Commands().submit(tmp_path, [], {"words": [], "lines": []})
    assert error.value.kind == "busy", "it may have been taken"


def test_what_a_job_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    site = Pbs(queue="gpu", timeout_min=90, select="gpu_model=a100", qsub=("-P", "mine"), modules=("cuda/12 4",))
    asked = site.options("run-1", tmp_path, 2048, ("n1",))
    words = " ".join(asked["words"])
    for part in ("-N run-1", "-q gpu", "-l walltime=5400", "-l select=1:ncpus=8:ngpus=1:mem=2048mb:gpu_model=a100", "-P mine"):
        assert part in words
    assert "module load 'cuda/12 4' || exit 1" in asked["lines"]
    plain = " ".join(Pbs(ngpus=0, mem_gb=None).options("run-1", tmp_path, None, ())["words"])
    assert "-l select=1:ncpus=8 " in plain
    assert " -q " not in plain
    with pytest.raises(ConfigError, match="select"):
        config.validate(Pbs, {"select": "a=1 -l b"})
    assert "walltime=600" in site.options_to_look("look", tmp_path)["words"]


def test_the_limits_of_a_cluster(pbs: Path, printing: Callable[..., Path]):
    assert Pbs().limits() == Limits(4, 200, 16_384, excludes=False)
    printing("qstat", error="down", code=1)
    printing("pbsnodes", "no JSON")
    assert Pbs().limits() == Limits(10_000, None, None, excludes=False)


# --- the doctor ---


def test_the_doctor_finds_what_is_wrong_without_a_job(pbs: Path):
    found = {check.name: check for check in Pbs(queue="closed", ngpus=1).checks()}
    assert [check.ok for check in found.values()] == [False, True, True]
    assert found["queue"].found == "closed: closed"
    assert found["queue"].advice == "set launcher.queue to one of workq"
    assert found["ngpus"].found == "1 nodes with 1 GPU or more"
    (pbs / "no_history").touch()
    found = {check.name: check for check in Pbs(ngpus=0).checks()}
    assert {name: check.ok for name, check in found.items()} == {"queue": True, "accounting": False}
    assert "job_history_enable" in found["accounting"].advice


@pytest.mark.slow
def test_the_doctor_looks_at_a_node(pbs: Path, tmp_path: Path):
    checks = list(doctor.examine(launcher(), tmp_path / "results", 1, lambda: None))
    assert [check for check in checks if not check.ok] == []
    names = [check.name for check in checks]
    assert names[:4] == ["commands", "queue", "accounting", "disk"]
    assert names[4:] == ["job", "shared folder", "locks", "clock", "CUDA", "bitsandbytes", "canary"]
    broken = doctor._node(launcher(setup=("echo no such module; exit 1",)), tmp_path / "results")
    (check,) = list(broken)
    assert "is FAILED and left nothing; no such module" in check.found
    assert "launcher.modules and launcher.setup" in check.advice


def test_the_doctor_asks_the_system_that_is_installed(
    tmp_path: Path, printing: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert launch.installed() == "slurm"
    printing("qsub")
    assert launch.installed() == "pbs"
    printing("sbatch")
    assert launch.installed() == "slurm"
