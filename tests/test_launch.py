"""Tasks on a Slurm in virtual time: whatever it does to jobs, the outcomes are the same. Imports no torch."""

import itertools
import multiprocessing
import os
import pwd
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import light
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from light import made_up
from searches import Setup, Silent, story
from simulated import PAUSE, Element, SimulatedSlurm, nothing_to_load

from hpc_compress import analysis, cli, guard, identity, store
from hpc_compress.config import ConfigError
from hpc_compress.dispatch import Dispatch
from hpc_compress.launch import Work, local, packed, slurm
from hpc_compress.launch.arrays import Arrays, _Nodes, cancel
from hpc_compress.launch.local import Debug, visible_gpus
from hpc_compress.launch.scheduler import CommandError, Limits, Row, batch_lines
from hpc_compress.launch.slurm import INDEX, RANKS, Cluster, Commands, Slurm, refusal
from hpc_compress.records import Ends, Submission
from hpc_compress.store import Store
from hpc_compress.types import Outcome, SearchError, SpentError, Task

Faults = Callable[[Element], str]


class Run:
    """A run folder on a cluster, and a driver that does nothing but settle tasks."""

    def __init__(self, root: Path, slurm: SimulatedSlurm, retries: int = 2, **settings: Any) -> None:
        self.slurm, self.progress, self.store = slurm, Silent(), Store(root)
        self.settings = Slurm(**settings)
        self.settings._commands = slurm  # type: ignore[assignment]
        self.arrays = Arrays(root, self.settings, self.progress.say)
        self.dispatch = Dispatch(self.store, self.arrays, self.progress, retries)

    def settle(self, tasks: Sequence[Task]) -> list[Outcome]:
        return self.dispatch.settle(tasks, "tasks")

    def said(self, words: str) -> bool:
        return any(words in line for line in self.progress.lines)

    @property
    def submissions(self) -> list[Submission]:
        """In the order in which they were submitted."""
        found = {submission.name: submission for submission in self.store.read_all("jobs/*/submission.json", Submission)}
        return [found[name] for name in dict.fromkeys(e.name for e in self.slurm.elements) if name in found]


def first_time(faults: dict[int, str]) -> Faults:
    """Faults by the number of the element, in its first life."""
    return lambda element: faults.get(element.number, "") if len(element.lives) <= 1 else ""


def answers(tasks: Sequence[Task]) -> list[Outcome]:
    return [light.answer(task) for task in tasks]


ENDS = ("FAILED 9:0", "FAILED 1:0", "OUT_OF_MEMORY 0:125", "COMPLETED 0:0", "TIMEOUT 0:0", "CANCELLED 0:15", "NODE_FAIL 1:0")
LOSSES = (*(f"die {end}" for end in ENDS), "hold", "forget", "reuse")  # what ends a job, so that its tasks must be sent again
DELAYS = ("requeue PREEMPTED", "requeue NODE_FAIL", "requeue REQUEUED", "twice", "linger", "suspend", "blink 8")


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody cuts the power here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# --- faults ---


@pytest.mark.parametrize("tasks_per_job", [1, 3])
@pytest.mark.parametrize("fault", ["", *DELAYS, *LOSSES])
def test_whatever_happens_to_jobs_the_outcomes_are_the_same(tmp_path: Path, fault: str, tasks_per_job: int):
    tasks = made_up(7)
    slurm = SimulatedSlurm(faults=first_time({0: fault, 2: fault}), seconds=lambda id: 100)
    run = Run(tmp_path, slurm, tasks_per_job=tasks_per_job)
    assert run.settle(tasks) == answers(tasks)
    sent_again = fault in LOSSES or fault == "linger"  # whose process needs longer than a final state must persist
    assert run.said("2 tries left") == sent_again
    assert (len(run.submissions) > 1) == sent_again
    if fault in LOSSES:
        again = [pack for submission in run.submissions[1:] for pack in submission.packs]
        assert len(again) == (2 if tasks_per_job == 1 else 3)  # of 3, the first was done before the fault; of the last 1, none
        assert all(len(pack) == 1 for pack in again), "a retry was not alone in its job"


def test_a_process_that_outlives_its_job_is_waited_for(tmp_path: Path):
    """A cancelled process may still write its outcome, within the seconds that a final state must persist."""
    run = Run(tmp_path, SimulatedSlurm(faults=first_time({0: "linger"}), seconds=lambda id: 16), settle_seconds=15)
    assert run.settle(made_up(2)) == answers(made_up(2))
    assert not run.said("lost")


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_a_storm_of_faults_changes_no_outcome(tmp_path: Path, seed: int):
    chance = random.Random(seed)

    def faults(element: Element) -> str:
        return chance.choice((*LOSSES, *DELAYS)) if chance.random() < 0.4 else ""

    slurm = SimulatedSlurm(nodes=5, faults=faults, limits=Limits(7, 12, 64_000))
    slurm.down = {"squeue": (1000, 1600), "sacct": (3000, 4500)}
    slurm.lag = chance.choice([0, 20, 90])
    slurm.refusals = [chance.choice(["", "taken: Socket timed out", "Unable to contact slurm controller"]) for _ in range(6)]
    tasks = made_up(20)
    run = Run(tmp_path, slurm, retries=30, tasks_per_job=chance.choice([1, 2]))
    assert run.settle(tasks) == answers(tasks)
    assert all(not outcome.failure for outcome in run.store.read_all("tasks/*/outcome.json", Outcome))


# --- ends ---


def test_a_task_that_kills_every_job_is_lost_in_the_end_and_its_failure_says_how(tmp_path: Path):
    tasks = made_up(5)
    killer = identity.task_id(tasks[2])
    slurm = SimulatedSlurm(faults=lambda element: "die FAILED 11:0" if killer in element.task_ids else "")
    run = Run(tmp_path, slurm, retries=3)
    outcomes = run.settle(tasks)
    failure = outcomes[2].failure
    assert failure is not None
    assert (failure.kind, failure.stage) == ("lost", "job")
    for words in ("died 4 times", "FAILED 11:0 on n", "logs: ", "batch-0.log"):
        assert words in failure.message
    assert [o for o in outcomes if not o.failure] == answers([*tasks[:2], *tasks[3:]])
    assert sum(killer in element.task_ids for element in slurm.elements) == 4


def test_an_end_must_last(tmp_path: Path):
    """Of a job that is away from squeue for a shorter time than `settle_seconds`, nothing is thought."""
    for seconds, believed in ((15, False), (60, True)):
        slurm = SimulatedSlurm(faults=first_time({0: f"blink {seconds}"}))
        run = Run(tmp_path / str(seconds), slurm, settle_seconds=30)
        run.settle(made_up(1))
        assert run.said("lost, FAILED") == believed


def test_an_unknown_job_is_lost_after_a_while_and_not_before(tmp_path: Path):
    slurm = SimulatedSlurm(faults=first_time({0: "forget"}), seconds=lambda id: 100)
    run = Run(tmp_path, slurm, lost_seconds=500)
    moments: list[tuple[float, str]] = []
    run.progress.say = lambda text: moments.append((slurm.clock, text))  # type: ignore[method-assign]
    assert run.settle(made_up(1)) == answers(made_up(1))
    lost = next(moment for moment, text in moments if "lost, LOST" in text)
    assert 550 <= lost <= 560  # forgotten after 50 s


@pytest.mark.parametrize("command", ["squeue", "sacct"])
def test_a_job_is_not_lost_while_commands_fail(tmp_path: Path, command: str):
    slurm = SimulatedSlurm(faults=first_time({0: "forget"}), seconds=lambda id: 100)
    slurm.down = {command: (30, 1500)}
    run = Run(tmp_path, slurm, lost_seconds=100)
    run.dispatch.send(made_up(1), "tasks")
    while slurm.clock < 1580:
        run.dispatch._turn()
    assert not run.said("lost")
    assert [line for line in run.progress.lines if "does not answer" in line] == [
        f"Slurm does not answer, waiting: {command}: down"
    ]
    run.dispatch.wait(list(run.dispatch.open))
    assert run.said("lost, LOST")


@pytest.mark.parametrize("command", ["squeue", "sacct"])
def test_the_time_during_which_commands_fail_does_not_count(tmp_path: Path, command: str):
    """The accounting may lag for a while after it was down."""
    slurm = SimulatedSlurm(faults=first_time({0: "forget"}), seconds=lambda id: 100)
    slurm.down = {command: (60, 1500)}  # it was looked for, and not found, once or twice
    run = Run(tmp_path, slurm, lost_seconds=100)
    run.dispatch.send(made_up(1), "tasks")
    while slurm.clock < 1520:
        run.dispatch._turn()
    assert not run.said("lost")


def test_a_dead_job_is_sent_again_where_sacct_never_answers(tmp_path: Path):
    """After half an hour squeue alone decides, and the user is told; from then on at once."""
    slurm = SimulatedSlurm(faults=first_time({0: "die FAILED 3:0", 1: "die FAILED 3:0"}), seconds=lambda id: 100)
    slurm.down = {"sacct": (0, 1e9)}
    slurm.refusals = ["taken: Socket timed out"]  # so that the first array must be looked for by its name
    run = Run(tmp_path, slurm)
    assert run.settle(made_up(4)) == answers(made_up(4))
    assert 1800 < slurm.clock < 2400
    told = [line for line in run.progress.lines if "sacct has not answered for 30 min (sacct: down)" in line]
    assert len(told) == 1
    assert "squeue does not list counts as ended" in told[0]
    assert run.said("lost, LOST")
    run = Run(tmp_path, slurm, accounting_seconds=60)
    start, slurm.faults = slurm.clock, first_time({len(slurm.elements): "die FAILED 3:0"})
    assert run.settle(made_up(1, first=9)) == answers(made_up(1, first=9))
    assert slurm.clock - start < 60 + 120 + 300


def test_two_failures_of_sacct_far_apart_are_no_long_silence(tmp_path: Path):
    """In between nobody asked: the job was in the queue again."""
    slurm = SimulatedSlurm(nodes=1, seconds=lambda id: 2000, faults=lambda element: "blink 8")
    slurm.down = {"sacct": (0, 1e9)}
    run = Run(tmp_path, slurm, accounting_seconds=600)
    run.dispatch.send(made_up(1), "tasks")
    while slurm.clock < 2500:
        run.dispatch._turn()
    assert len(slurm.elements[0].lives) > 2
    assert run.said("Slurm does not answer, waiting: sacct: down")
    assert not run.said("sacct has not answered")


def test_a_job_that_sacct_calls_unfinished_is_never_lost(tmp_path: Path):
    """Though squeue hides it: one that runs, and one that has not begun."""
    slurm = SimulatedSlurm(nodes=1, seconds=lambda id: 3000)
    slurm.hidden = {0, 1}
    run = Run(tmp_path, slurm, lost_seconds=20)
    assert run.settle(made_up(2)) == answers(made_up(2))
    assert slurm.clock >= 6000
    assert len(slurm.elements) == 2
    told = [line for line in run.progress.lines if "squeue does not list it" in line]
    assert len(told) == 1, "once an array"
    assert "scontrol show job 1_" in told[0]


def test_the_accounting_may_lag(tmp_path: Path):
    slurm = SimulatedSlurm(faults=first_time({0: "die FAILED 3:0"}), seconds=lambda id: 100)
    slurm.lag = 80
    run = Run(tmp_path, slurm)
    assert run.settle(made_up(4)) == answers(made_up(4))
    assert run.said("lost, FAILED 3:0")
    assert not run.said("lost, LOST")


def test_a_cluster_without_accounting(tmp_path: Path):
    slurm = SimulatedSlurm(faults=first_time({1: "die FAILED 3:0"}))
    slurm.lag = 1e7
    assert Run(tmp_path, slurm).settle(made_up(4)) == answers(made_up(4))


def test_a_suspended_job_is_waited_for_however_long(tmp_path: Path):
    slurm = SimulatedSlurm(faults=first_time({0: "suspend"}), seconds=lambda id: 10)
    run = Run(tmp_path, slurm, lost_seconds=20)
    run.settle(made_up(1))
    assert slurm.clock > PAUSE > 20
    assert len(slurm.elements) == 1


def test_a_held_job_is_cancelled_and_sent_again(tmp_path: Path):
    slurm = SimulatedSlurm(faults=first_time({1: "hold"}))
    run = Run(tmp_path, slurm)
    assert run.settle(made_up(3)) == answers(made_up(3))
    assert set(slurm.cancelled) == {"1_1"}


def test_an_id_that_is_used_again_is_not_believed(tmp_path: Path):
    slurm = SimulatedSlurm(faults=first_time({0: "reuse"}), seconds=lambda id: 100)
    run = Run(tmp_path, slurm)
    run.dispatch.send(made_up(1), "tasks")
    while slurm.clock < 60:
        run.dispatch._turn()
    slurm.foreign.append(Row("1", 0, "of-another-user", "COMPLETED", "n0", "", "0:0"))
    assert slurm.foreign[0].state == "RUNNING"
    while slurm.clock < 140:
        run.dispatch._turn()
    assert not run.said("lost"), "the end of a foreign job was taken for one of ours"
    run.dispatch.wait(list(run.dispatch.open))
    assert run.said("lost, LOST")
    assert not slurm.cancelled


# --- memory and nodes ---


@pytest.mark.parametrize(("max_mem_gb", "expected"), [(None, [10_240, 20_480, 40_960, 50_000]), (24, [10_240, 20_480, 24_576])])
def test_more_memory_after_out_of_memory(tmp_path: Path, max_mem_gb: float | None, expected: list[int]):
    tasks = made_up(3)
    hungry = identity.task_id(tasks[1])

    def faults(element: Element) -> str:
        enough = int(element.options["mem"].removesuffix("M")) >= expected[-1]
        return "die OUT_OF_MEMORY 0:125" if hungry in element.task_ids and not enough else ""

    slurm = SimulatedSlurm(faults=faults, limits=Limits(1000, None, 50_000))
    run = Run(tmp_path, slurm, retries=5, cluster=Cluster(mem_gb=10, max_mem_gb=max_mem_gb))
    assert run.settle(tasks) == answers(tasks)
    assert [submission.mem_mb for submission in run.submissions] == expected
    assert [len(submission.packs) for submission in run.submissions] == [3, *[1] * (len(expected) - 1)]


def test_memory_that_was_learnt_outlives_the_driver(tmp_path: Path):
    slurm = SimulatedSlurm(faults=first_time({0: "die FAILED 9:0", 1: "die FAILED 1:0"}), seconds=lambda id: 100)
    Run(tmp_path, slurm, retries=0, cluster=Cluster(mem_gb=4)).settle(made_up(2))
    for path in tmp_path.glob("tasks/*/outcome.json"):
        path.unlink()
    run = Run(tmp_path, slurm, cluster=Cluster(mem_gb=4))
    run.settle(made_up(2))
    assert sorted(submission.mem_mb for submission in run.submissions[1:]) == [4096, 8192]


def test_a_node_that_failed_for_good_is_left_out(tmp_path: Path):
    slurm = SimulatedSlurm(faults=lambda element: "die NODE_FAIL 1:0" if element.lives[-1].node == "n1" else "")
    run = Run(tmp_path, slurm)
    assert run.settle(made_up(6)) == answers(made_up(6))
    assert [submission.exclude for submission in run.submissions][:2] == [(), ("n1",)]
    assert all(submission.exclude == ("n1",) for submission in run.submissions[1:])
    assert {life.node for element in slurm.elements[6:] for life in element.lives} <= {"n0", "n2"}


def test_a_node_on_which_jobs_keep_dying_is_left_out(tmp_path: Path):
    """It is the first to be free each time, so without that it would kill every task of the run."""
    slurm = SimulatedSlurm(
        nodes=2, seconds=lambda id: 100, faults=lambda element: "die FAILED 1:0" if element.lives[-1].node == "n1" else ""
    )
    run = Run(tmp_path, slurm)
    assert run.settle(made_up(8)) == answers(made_up(8))
    left_out = [submission.exclude for submission in run.submissions]
    assert set(left_out) == {(), ("n1",)}
    assert left_out == sorted(left_out)  # once left out, it stays so


@pytest.mark.slow
def test_tasks_that_kill_their_jobs_condemn_no_node(tmp_path: Path):
    """One task in twenty, wherever it runs."""
    tasks = made_up(160)
    killers = {identity.task_id(task) for task in tasks[::20]}
    slurm = SimulatedSlurm(nodes=16, faults=lambda element: "die FAILED 1:0" if killers & set(element.task_ids) else "")
    run = Run(tmp_path, slurm, poll_seconds=60)
    outcomes = run.settle(tasks)
    assert sum(outcome.failure is not None for outcome in outcomes) == len(killers) == 8
    assert {submission.exclude for submission in run.submissions} == {()}
    assert Run(tmp_path, slurm).arrays.nodes.bad() == []


def test_one_task_that_dies_again_and_again_condemns_no_node(tmp_path: Path):
    slurm = SimulatedSlurm(nodes=2, faults=lambda element: "die FAILED 1:0" if element.index == 0 else "")
    slurm.free = ["n0"]  # the other one has no room
    run = Run(tmp_path, slurm, retries=5)
    run.settle(made_up(1))
    assert {submission.exclude for submission in run.submissions} == {()}


def test_a_node_is_forgiven_when_its_dead_tasks_die_elsewhere_too():
    nodes = _Nodes()
    for task_id in "abc":
        nodes.job_ended("n1", (task_id,), died=True)
    assert nodes.bad() == ["n1"]
    nodes.job_ended("n2", ("b",), died=True)
    assert nodes.bad() == []
    nodes.job_ended("n1", ("d", "e"), died=True)  # one job of two tasks is one death
    assert nodes.bad() == ["n1"]
    nodes.failed("n3")
    nodes.job_ended("n2", ("e",), died=True)
    assert nodes.bad() == ["n3"]


def test_a_node_that_does_most_of_its_work_is_not_condemned():
    nodes = _Nodes()
    for number in range(6):
        nodes.job_ended("n1", (f"well {number}",), died=False)
    for number in range(5):
        nodes.job_ended("n1", (f"dead {number}",), died=True)
    assert nodes.bad() == []
    nodes.job_ended("n1", ("dead 5",), died=True)  # six of the last ten
    assert nodes.bad() == ["n1"]


def test_two_deaths_condemn_no_node(tmp_path: Path):
    slurm = SimulatedSlurm(nodes=1, faults=first_time({0: "die FAILED 1:0", 1: "die FAILED 1:0"}))
    run = Run(tmp_path, slurm)
    run.settle(made_up(3))
    assert {submission.exclude for submission in run.submissions} == {()}


def test_nodes_are_taken_back_when_sbatch_finds_none_left(tmp_path: Path):
    slurm = SimulatedSlurm(nodes=1, seconds=lambda id: 100, faults=first_time(dict.fromkeys(range(3), "die FAILED 1:0")))
    run = Run(tmp_path, slurm)
    submit = slurm.submit

    def picky(folder: Path, works: Sequence[Work], options: dict[str, Any]) -> str:
        if "n0" in options.get("exclude", ""):
            raise refusal("Batch job submission failed: Requested node configuration is not available")
        return submit(folder, works, options)

    slurm.submit = picky  # type: ignore[method-assign]
    assert run.settle(made_up(3)) == answers(made_up(3))
    assert {submission.exclude for submission in run.submissions} == {()}
    assert len(list(tmp_path.glob("jobs/*"))) == len(run.submissions), "what was refused left a folder"


def test_memory_that_no_node_has_is_not_asked_for_again(tmp_path: Path):
    """As where a partition admits less than its nodes have."""
    slurm = SimulatedSlurm(seconds=lambda id: 100, faults=first_time({0: "die OUT_OF_MEMORY 0:125"}))
    run = Run(tmp_path, slurm, cluster=Cluster(mem_gb=4))
    submit = slurm.submit

    def picky(folder: Path, works: Sequence[Work], options: dict[str, Any]) -> str:
        if options["mem"] != "4096M":
            raise refusal("Batch job submission failed: Memory specification can not be satisfied")
        return submit(folder, works, options)

    slurm.submit = picky  # type: ignore[method-assign]
    assert run.settle(made_up(2)) == answers(made_up(2))
    assert {submission.mem_mb for submission in run.submissions} == {4096}


# --- sbatch says no ---


@pytest.mark.parametrize(("limits", "most"), [(Limits(4, None, None), 4), (Limits(1000, 3, None), 3), (Limits(5, 7, None), 5)])
def test_arrays_are_as_large_as_the_cluster_admits(tmp_path: Path, limits: Limits, most: int):
    slurm = SimulatedSlurm(nodes=8, limits=limits)
    assert Run(tmp_path, slurm).settle(made_up(11)) == answers(made_up(11))
    assert max(slurm.sizes) == most
    assert sum(slurm.sizes) == 11, "an array was refused"


def test_a_limit_that_the_cluster_does_not_tell_is_found(tmp_path: Path):
    slurm = SimulatedSlurm(limits=Limits(1000, 3, None), seconds=lambda id: 600)
    slurm.limits = lambda *where: Limits(1000, None, None)  # type: ignore[method-assign]
    run = Run(tmp_path, slurm)
    assert run.settle(made_up(10)) == answers(made_up(10))
    assert slurm.sizes[:3] == [10, 5, 2]
    assert len(slurm.sizes) < 40  # with a pause that grows, not at every poll: it takes 40 min, 480 polls
    assert run.said("trying again in 5 s")
    assert run.said("trying again in 20 s")


@pytest.mark.parametrize(
    "message", ["Socket timed out on send/recv operation", "taken: Socket timed out on send/recv operation"]
)
def test_a_busy_controller_may_have_taken_the_jobs_or_not(tmp_path: Path, message: str):
    slurm = SimulatedSlurm()
    slurm.refusals = [message, message]
    run = Run(tmp_path, slurm)
    assert run.settle(made_up(6)) == answers(made_up(6))
    assert max(slurm.answers.values()) == 1, "a task was worked off twice"
    assert len(slurm.elements) == 6


@pytest.mark.parametrize(
    "message", ["Requested partition configuration not available now", "Transport endpoint is not connected"]
)
def test_a_passing_error_is_waited_out(tmp_path: Path, message: str):
    slurm = SimulatedSlurm()
    slurm.refusals = [f"Batch job submission failed: {message}"] * 6
    run = Run(tmp_path, slurm)
    assert run.settle(made_up(3)) == answers(made_up(3))
    assert run.said(f"{message}; trying again in 10 s")
    assert len(slurm.elements) == 3


def test_what_can_never_be_admitted_ends_the_search_and_says_why(tmp_path: Path):
    slurm = SimulatedSlurm()
    slurm.refusals = ["Batch job submission failed: Invalid partition name specified"]
    run = Run(tmp_path, slurm)
    with pytest.raises(ConfigError, match="Invalid partition name"):
        run.settle(made_up(2))
    assert Run(tmp_path, slurm).settle(made_up(2)) == answers(made_up(2))


SAYINGS = {
    "QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates accounting/QOS policy "
    "(job submit limit, user's size and/or time limits)": "full",
    "AssocMaxSubmitJobLimit": "full",
    "AssocGrpSubmitJobsLimit": "full",
    "Batch job submission failed: Socket timed out on send/recv operation": "busy",
    "Batch job submission failed: Unable to contact slurm controller (connect failure)": "busy",
    "Batch job submission failed: Transport endpoint is not connected": "busy",
    "Batch job submission failed: Requested partition configuration not available now": "full",
    "Slurm temporarily unable to accept job, sleeping and retrying": "busy",
    "Batch job submission failed: Resource temporarily unavailable": "busy",
    "Batch job submission failed: Zero Bytes were transmitted or received": "busy",
    "Batch job submission failed: Unable to create job record, try again": "busy",
    "Batch job submission failed: Invalid account or account/partition combination specified": "never",
    "Batch job submission failed: Invalid qos specification": "never",
    "Batch job submission failed: Requested node configuration is not available": "never",
    "Memory specification can not be satisfied": "never",
    "Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)": "never",
    "Invalid generic resource (gres) specification": "never",
    "unrecognized option '--nonsense'": "never",
}


@pytest.mark.parametrize(("message", "kind"), SAYINGS.items(), ids=range(len(SAYINGS)))
def test_what_sbatch_means(message: str, kind: str):
    assert refusal(f"sbatch: error: {message}").kind == kind


# --- drivers that die ---


class KilledError(BaseException):
    """kill -9."""


@pytest.mark.slow
def test_a_driver_may_be_killed_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Before and after each write, and before, in and after each sbatch: nothing is lost, nothing submitted twice."""
    tasks = made_up(5)
    write, points = store.write_atomically, 0
    for kill_at in itertools.count():
        points = 0

        def point(kill_at: int = kill_at) -> None:
            nonlocal points
            points += 1
            if points == kill_at + 1:
                raise KilledError

        def killing(path: Path, text: str, point: Callable[[], None] = point) -> None:
            if path.name == "outcome.json":  # of the cluster
                return write(path, text)
            point()
            write(path, text)
            return point()

        monkeypatch.setattr(store, "write_atomically", killing)
        slurm = SimulatedSlurm(faults=first_time({1: "die FAILED 1:0"}), seconds=lambda id: 100, limits=Limits(3, None, None))
        slurm.point = point
        root = tmp_path / str(kill_at)
        try:
            Run(root, slurm).settle(tasks)
            break
        except KilledError:
            pass
        run = Run(root, slurm)
        assert run.settle(tasks) == answers(tasks), kill_at
        times = sorted(slurm.answers.values())
        assert times == [1] * 5, f"killed at {kill_at}: {times}"
        assert len(slurm.elements) == 6, f"killed at {kill_at}: {[e.task_ids for e in slurm.elements]}"
    assert kill_at > 20


def test_a_new_driver_finds_the_jobs_of_the_one_before(tmp_path: Path):
    slurm = SimulatedSlurm(nodes=2)
    before = Run(tmp_path, slurm)
    ids = before.dispatch.send(made_up(6), "tasks")
    before.dispatch.wait(ids, 2)
    after = Run(tmp_path, slurm)
    assert after.said("1 arrays of an earlier driver")
    assert after.arrays.in_flight() >= set(before.dispatch.open)
    assert after.settle(made_up(8)) == answers(made_up(8))
    assert len(slurm.elements) == 8
    assert after.arrays.counts()["not submitted yet"] == 0


def test_what_never_came_to_slurm_is_submitted_once(tmp_path: Path):
    """A driver was killed before sbatch; the one after it finds that out before it asks for these tasks itself."""
    slurm = SimulatedSlurm()
    slurm.refusals = ["Unable to contact slurm controller"]
    before = Run(tmp_path, slurm)
    before.dispatch.send(made_up(3), "tasks")
    before.dispatch._turn()
    slurm.refusals = ["job submit limit"] * 9
    after = Run(tmp_path, slurm)
    while slurm.clock < 200:
        after.arrays.poll()
    assert after.settle(made_up(3)) == answers(made_up(3))
    assert len(slurm.elements) == 3


def test_ends_are_written_down_once(tmp_path: Path):
    slurm = SimulatedSlurm(faults=first_time({1: "die TIMEOUT 0:0"}), seconds=lambda id: 100)
    run = Run(tmp_path, slurm)
    run.settle(made_up(3))
    while run.arrays.flying:
        run.arrays.poll()
    ends = [end for ends in run.store.read_all("jobs/*/ends.json", Ends) for end in ends.ends.values()]
    assert sorted((end.state, end.seconds) for end in ends) == [("COMPLETED", 100)] * 3 + [("TIMEOUT", 50)]
    assert not Run(tmp_path, slurm).arrays.flying


# --- cancelling ---


def test_cancel_ends_the_jobs_of_this_run_and_no_others(tmp_path: Path):
    slurm = SimulatedSlurm()
    mine, other = Run(tmp_path / "run", slurm), Run(tmp_path / "other", slurm)
    for run in (other, mine):
        run.dispatch.send(made_up(9), "tasks")
        run.dispatch._turn()
    slurm.foreign.append(Row("77", 0, "run", "RUNNING", "n0"))
    assert cancel(mine.store, mine.settings).cancelled == 9
    assert {element.name for element in slurm.queued} == {other.submissions[0].name}
    assert slurm.cancelled == [slurm.elements[-1].job_id]
    assert cancel(mine.store, mine.settings, own_job=("77", "a-name-of-before")).cancelled == 0
    assert cancel(mine.store, mine.settings, own_job=("77", "run")).cancelled == 1
    assert other.settle(made_up(9)) == answers(made_up(9))


@pytest.mark.parametrize("own_id", ["77_0", "77_2"])
def test_cancel_of_one_run_of_a_sweep_spares_the_other_drivers(tmp_path: Path, own_id: str):
    """The drivers of a sweep are elements of one array, and have one name."""
    slurm = SimulatedSlurm()
    drivers = [Row("77", index, "sweep", "RUNNING", "n0") for index in range(3)]
    slurm.foreign = list(drivers)
    run = Run(tmp_path, slurm)
    done = cancel(run.store, run.settings, own_job=(own_id, "sweep"))
    assert (done.cancelled, done.left) == (1, 0)
    assert slurm.cancelled == [own_id]
    assert slurm.foreign == [row for row in drivers if f"77_{row.index}" != own_id]


def test_a_driver_in_an_array_knows_its_element(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    assert guard.here().job_id is None
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert guard.here().job_id == "77"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")  # as in the last element of an array
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert guard.here().job_id == "77_2"


def test_cancel_tells_what_goes_on(tmp_path: Path):
    slurm = SimulatedSlurm(limits=Limits(4, None, None))
    run = Run(tmp_path, slurm)
    run.dispatch.send(made_up(9), "tasks")
    run.dispatch._turn()
    slurm.immune = {"2"}
    done = cancel(run.store, run.settings)
    assert (done.cancelled, done.left) == (5, 4)
    assert "permission denied" in done.trouble
    run.arrays.cancel()
    assert run.said("4 jobs could not be cancelled (scancel: error: Kill job error on job id 2")
    slurm.immune = set()
    assert cancel(run.store, run.settings).cancelled == 4


@pytest.mark.slow
def test_the_command_cancel_ends_with_1_where_jobs_go_on(
    without_barrier: Path, tmp_path: Path, printing: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    root = tmp_path / "run"
    shutil.copytree(without_barrier, root)
    name = Store(root).read_all("jobs/*/submission.json", Submission)[0].name
    printing("squeue", f"17|0|RUNNING|n1|None|{name}\n17|1|COMPLETING|n1|None|{name}\n")
    printing("scancel", error="scancel: error: Kill job error on job id 17: Access/permission denied", code=1)
    with pytest.raises(SystemExit) as exit:
        cli._cancel([str(root)])
    assert exit.value.code == 1
    said = capsys.readouterr()
    assert said.out.startswith("0 jobs cancelled")
    assert "1 jobs go on (scancel: " in said.err
    printing("squeue", error="down", code=1)
    with pytest.raises(SystemExit) as exit:
        cli._cancel([str(root)])
    assert exit.value.code == 1
    assert "could not be cancelled: squeue: down" in capsys.readouterr().err


@pytest.fixture
def started(tmp_path: Path, printing: Callable[..., Path]) -> Path:
    """A run folder with one job in the queue, as far as `cancel` looks at it."""
    root = tmp_path / "run"
    Store(root).write("jobs/run-1/submission.json", Submission(name="run-1", packs=((("a",),),), mem_mb=None))
    (root / "run.json").write_text("{")  # damaged: the jobs can be cancelled all the same
    printing("squeue", "17|0|RUNNING|n1|None|run-1\n")
    return root


def test_cancel_needs_no_description_of_the_run(started: Path, printing: Callable[..., Path]):
    arguments = printing("scancel")
    with pytest.raises(SystemExit):  # the queue never changes here
        cli._cancel([str(started)])
    assert "17" in arguments.read_text().split()
    assert (started / "cancelled").is_file()


@pytest.mark.parametrize("strange", ["run", "jobs"])
def test_a_folder_of_somebody_else_cancels_none_of_your_jobs(
    started: Path, printing: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, strange: str
):
    arguments, stat = printing("scancel"), Path.stat

    def owned(path: Path, **options: Any) -> Any:
        found = list(stat(path, **options))
        found[4] += path.name == strange  # the user id
        return os.stat_result(found)

    monkeypatch.setattr(Path, "stat", owned)
    with pytest.raises(ConfigError, match=f"{strange} is not yours"):
        cli._cancel([str(started)])
    assert not arguments.exists()
    assert not (started / "cancelled").exists()


def test_cancel_never_writes_through_a_link(started: Path, printing: Callable[..., Path], tmp_path: Path):
    printing("scancel")
    (started / "cancelled").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SystemExit):
        cli._cancel([str(started)])
    assert not (tmp_path / "elsewhere").exists()
    assert (started / "cancelled").is_file()


def test_a_driver_that_is_told_to_stop_takes_its_jobs_with_it(tmp_path: Path):
    slurm = SimulatedSlurm()
    run = Run(tmp_path, slurm)
    run.dispatch.send(made_up(9), "tasks")
    run.dispatch._turn()
    (tmp_path / "cancelled").touch()
    with pytest.raises(SearchError, match="cancelled"):
        run.dispatch._turn()
    assert not slurm.queued
    (tmp_path / "cancelled").unlink()
    assert Run(tmp_path, slurm).settle(made_up(9)) == answers(made_up(9))


def test_what_nobody_waits_for_any_more_can_be_dropped_while_slurm_does_not_answer(tmp_path: Path):
    slurm = SimulatedSlurm()
    run = Run(tmp_path, slurm)
    run.dispatch.send(made_up(9), "tasks")
    run.dispatch._turn()
    slurm.down = {"squeue": (0, 1000)}
    run.dispatch.abandon()
    assert run.settle(made_up(2, first=20)) == answers(made_up(2, first=20))


# --- Slurm's commands ---


def test_squeue_is_read(printing: Callable[..., Path]):
    arguments = printing("squeue", "17|3|RUNNING|n1|None|run-1\n17|4|PENDING||Resources|run-1\n18|N/A|RUNNING|n2|None|a|b\n")
    assert Commands().queue() == [
        Row("17", 3, "run-1", "RUNNING", "n1", "None"),
        Row("17", 4, "run-1", "PENDING", "", "Resources"),
        Row("18", 0, "a|b", "RUNNING", "n2", "None"),
    ]
    assert {"--all", "--array", f"--user={os.getuid()}"} <= set(arguments.read_text().split())


def test_sacct_is_read(printing: Callable[..., Path]):
    lines = (
        "17_0|COMPLETED|0:0|n1|65|run-1",
        "17_1|CANCELLED by 0|0:15|n1|3|run-1",
        "17_2|PREEMPTED|0:0|n1|10|run-1",
        "17_2|RUNNING|0:0|n2|5|run-1",
        "17_[3-9%4]|PENDING|0:0|None assigned|0|run-1",
        "17_10|OUT_OF_ME+|0:125|n3||run-1",
        "18|FAILED|9:0|n2|7|a|b",
        "19|COMPLETED|0:0|n2|none|c",
        "19|COMPLETED|0:0|n2",
    )
    arguments = printing("sacct", "\n".join(lines) + "\n")
    assert Commands().accounting(["17", "18"]) == [
        Row("17", 0, "run-1", "COMPLETED", "n1", "", "0:0", 65),
        Row("17", 1, "run-1", "CANCELLED", "n1", "", "0:15", 3),
        Row("17", 2, "run-1", "PREEMPTED", "n1", "", "0:0", 10),
        Row("17", 2, "run-1", "RUNNING", "n2", "", "0:0", 5),
        *(Row("17", index, "run-1", "PENDING", "None assigned", "", "0:0", 0) for index in range(3, 10)),
        Row("17", 10, "run-1", "OUT_OF_ME", "n3", "", "0:125", 0),
        Row("18", 0, "a|b", "FAILED", "n2", "", "9:0", 7),
        Row("19", 0, "c", "COMPLETED", "n2", "", "0:0", 0),
    ]
    assert {"--duplicates", "--jobs=17,18", "-nPX"} <= set(arguments.read_text().split())


def test_a_command_that_fails_says_nothing(printing: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    printing("squeue", "17|3|RUNNING|n1|None|run-1\n", "slurm_load_jobs error: Unable to contact slurm controller", 1)
    with pytest.raises(CommandError, match="Unable to contact"):
        Commands().queue()
    printing("sacct", error="Slurm accounting storage is disabled", code=1)
    assert Commands().accounting(["17"]) == []
    printing("sacct", error="sacct: error: slurm_persist_conn_open: Connection refused", code=1)
    with pytest.raises(CommandError, match="refused"):
        Commands().accounting(["17"])
    with pytest.raises(CommandError, match="refused"):
        Commands().accounted("run-1")
    printing("sacct", error="Slurm accounting storage is disabled", code=1)
    assert Commands().accounted("run-1") is None
    printing("scancel", error="scancel: error: Invalid job id", code=1)
    with pytest.raises(CommandError, match="Invalid job id"):
        Commands().cancel(["17"])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(CommandError, match="not on this machine"):
        Commands().queue()


def test_a_job_is_found_by_its_name(printing: Callable[..., Path]):
    arguments = printing("sacct", "Welcome to the cluster!\n17_0\n17_[1-3]\n")
    assert Commands().accounted("run-1") == "17"
    assert "--name=run-1" in arguments.read_text()
    printing("sacct")
    assert Commands().accounted("run-1") is None


ODD_LINES = st.lists(st.text("|_[]-%:0179²N/A\r\x1bab \n", max_size=30) | st.text(max_size=10), max_size=2)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_lines_that_describe_no_job_are_skipped(data: st.DataObject):
    """A newline in the name of a user's job, a login banner, numbers that are none: what is ours is found all the same."""
    own = [
        ("squeue", "17|3|RUNNING|n1|None|run-1", Row("17", 3, "run-1", "RUNNING", "n1", "None")),
        ("sacct", "17_3|RUNNING|0:0|n1|5|run-1", Row("17", 3, "run-1", "RUNNING", "n1", "", "0:0", 5)),
        ("accounted", "17_3", "17"),
        ("limits", "20|normal", 20),
    ]
    for name, line, expected in own:
        before, after = data.draw(ODD_LINES), data.draw(ODD_LINES)
        text = "\n".join([*before, line, *after])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(slurm, "call", lambda *words, text=text: text)
            found: Any = {
                "squeue": Commands().queue,
                "sacct": lambda: Commands().accounting(["17"]),
                "accounted": lambda: [Commands().accounted("run-1")],
                "limits": lambda: [Commands().limits(None, None, None)],
            }[name]()
        if name in ("squeue", "sacct"):
            assert expected in found
        elif name == "accounted":
            assert before or found == [expected]
        else:
            assert (found[0].submitted or 0) <= expected


def test_skipped_lines_are_told_once(printing: Callable[..., Path], caplog: pytest.LogCaptureFixture):
    printing("squeue", "Welcome\x1b[31m to the cluster!\n18|N/A|RUNNING|n2|None|odd\n name | x\n")
    ours = Commands()
    assert ours.queue() == ours.queue() == [Row("18", 0, "odd", "RUNNING", "n2", "None")]
    assert [record.getMessage() for record in caplog.records] == [
        "squeue prints lines that are skipped since they describe no job, such as: Welcome?[31m to the cluster!"
    ]


def test_elements_that_have_not_begun(printing: Callable[..., Path]):
    for written, expected in (("[0-2,5,10-20:4%3]", [0, 1, 2, 5, 10, 14, 18]), ("[7]", [7]), ("[3-]", []), ("[x,1]", [1])):
        printing("sacct", f"17_{written}|PENDING|0:0|None assigned|0|run-1\n")
        assert [row.index for row in Commands().accounting(["17"])] == expected


def test_no_variable_of_a_user_or_an_outer_job_reaches_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They hide jobs, change what is printed, and override the lines of a script."""
    odd = ["SQUEUE_PARTITION", "SQUEUE_STATES", "SACCT_FORMAT", "SBATCH_PARTITION", "SCANCEL_STATE", "SINFO_FORMAT"]
    odd += ["SLURM_JOB_ID", "SLURM_TIME_FORMAT", "SLURM_CLUSTERS", "SLURM_CPU_BIND"]
    for name in (*odd, "SLURM_CONF", "SLURM_JWT", "OWN"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    (tmp_path / "bin").mkdir()
    for name in ("squeue", "sacct", "scancel", "scontrol", "sinfo", "sacctmgr", "sbatch", "srun"):
        path = tmp_path / "bin" / name
        path.write_text(f'#!/bin/sh\nenv >{tmp_path}/{name}.env\necho "Submitted batch job 17"\n')
        path.chmod(0o755)
    ours = Commands()
    ours.queue(), ours.accounting(["17"]), ours.cancel(["17"]), ours.limits(None, None, None)
    options = Cluster(mem_gb=None).options("run-1", tmp_path, None, ())
    assert ours.submit(tmp_path, [Work(str(tmp_path), ())], options) == "17"
    for path in (path for path in tmp_path.glob("*.env") if path.name != "srun.env"):
        seen = {line.partition("=")[0] for line in path.read_text().splitlines()}
        assert not seen & set(odd), path.name
        assert {"SLURM_CONF", "SLURM_JWT", "OWN", "PATH"} <= seen
    assert len(list(tmp_path.glob("*.env"))) == 7
    assert os.environ["SLURM_JOB_ID"] == os.environ["SBATCH_PARTITION"] == "x", "the driver's own environment has changed"
    script = (tmp_path / "17_submission.sh").read_text()
    assert "--wckey" not in script
    assert "--mem" not in script


def test_memory_is_left_to_the_site_where_no_number_is_given(tmp_path: Path):
    slurm = SimulatedSlurm(seconds=lambda id: 100, faults=first_time({0: "die OUT_OF_MEMORY 0:125"}))
    run = Run(tmp_path, slurm, cluster=Cluster(mem_gb=None))
    assert run.settle(made_up(2)) == answers(made_up(2))
    assert all("mem" not in element.options for element in slurm.elements)
    assert {submission.mem_mb for submission in Run(tmp_path, slurm).submissions} == {None}


def test_the_limits_of_a_cluster(printing: Callable[..., Path]):
    printing("scontrol", "MaxArraySize            = 1001\nMaxJobCount = 10000\n")
    asked_sinfo = printing("sinfo", "64000|3\n128000+|2\n")
    printing("sacctmgr", "Welcome to the cluster!\n|normal\n50|\n")
    assert Commands().limits("main", None, None) == Limits(1001, 50, 128_000, 5)
    assert {"--all", "--partition=main"} <= set(asked_sinfo.read_text().split()), "it may be hidden"
    long = 5000 * "9"  # more digits than Python reads
    printing("scontrol", f"MaxArraySize            = {long}\n")
    printing("sinfo", f"{long}|3\n64000|{long}\n32000|2\n")
    printing("sacctmgr", f"{long}|normal\n30|\n")
    assert Commands().limits("main", None, None).node_memory_mb == 32_000
    assert Commands().limits("main", None, None).submitted == 30
    printing("sacctmgr", "20|normal\n")
    asked: list[Sequence[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slurm, "ask", lambda *words: asked.append(words) or "")
        Commands().limits(None, None, None)
    (associations,) = [words for words in asked if "assoc" in words]
    assert f"user={pwd.getpwuid(os.getuid()).pw_name}" in associations, "sacctmgr knows users by their names only"
    for name in ("scontrol", "sinfo", "sacctmgr"):
        printing(name, error="down", code=1)
    assert Commands().limits(None, None, None) == Limits(1000, None, None)


@pytest.mark.parametrize("name", ["run", "a b'c\"d\n日本 $(touch oops) `id` ; % \\ *"])
def test_the_lines_before_python_work_in_a_folder_of_any_name(tmp_path: Path, name: str):
    folder = tmp_path / name
    folder.mkdir()
    lines = batch_lines(folder, INDEX, (), ['export GREETING="good day"'])
    script = "\n".join([*lines, 'echo "$GREETING $HF_HUB_OFFLINE $PYTHONSAFEPATH ${HF_TOKEN-no token}"', "echo oh >&2"])
    environment = {"PATH": os.environ["PATH"], "SLURM_ARRAY_TASK_ID": "3", "HF_TOKEN": "hf_secret"}
    subprocess.run(["bash", "-c", script], env=environment, cwd=tmp_path, check=True)
    assert (folder / "batch-3.log").read_text() == "good day 1 1 no token\noh\n"
    assert not (tmp_path / "oops").exists()


def test_a_module_that_can_not_be_loaded_ends_the_job(tmp_path: Path):
    define = 'module() { [ "$2" = "cuda/12 4" ]; }'
    for modules, code in ((["cuda/12 4"], 0), (["cuda/12 4", "gone"], 1)):
        script = "\n".join([define, *batch_lines(tmp_path, INDEX, modules, []), "exit 0"])
        assert subprocess.run(["bash", "-c", script]).returncode == code


# --- on the node ---


def record(root: str, task_ids: Sequence[str], **ignored: Any) -> Iterator[str]:
    """A worker that says what it was given."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "none")
    (Path(root) / os.environ.get("SLURM_PROCID", "0")).write_text(f"{visible}: {' '.join(task_ids)}")
    yield from task_ids


@pytest.mark.parametrize(
    ("processes", "visible", "expected"),
    [
        (1, "0", ["0: a b c d e"]),
        (1, None, ["none: a b c d e"]),
        (2, "2,5", ["2: a b d", "5: c e"]),
        (2, "GPU-1,GPU-2,GPU-3", ["GPU-1: a b d", "GPU-2: c e"]),
        (2, "7", ["7: a b d", "7: c e"]),  # Slurm gave each process its own already
        (2, "", [": a b d", ": c e"]),
        (2, None, ["0: a b d", "1: c e"]),  # nobody has shared the GPUs out, and each process sees all of them
        (5, None, ["0: a b", "1: c", "2: d", "3: e", "4: "]),
    ],
)
def test_the_processes_of_a_job_share_its_bundles_and_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, visible: str | None, expected: list[str]
):
    work = Work(str(tmp_path), (("a", "b"), ("c",), ("d",), ("e",)), worker="test_launch.record", ranks=RANKS)
    monkeypatch.delenv("SLURM_LOCALID", raising=False)  # of the job that the tests may run in
    for rank in range(processes):
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        monkeypatch.setenv("SLURM_NTASKS", str(processes))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        work()
    assert [(tmp_path / str(rank)).read_text() for rank in range(processes)] == expected


@pytest.mark.parametrize(("visible", "gpu"), [("4,5,6,7", "5"), (None, "1")])
def test_a_process_takes_the_gpu_of_its_place_on_its_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, gpu: str
):
    """The fourth process of a job may be the second one of its node."""
    for name, value in {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    Work(str(tmp_path), (("a",), ("b",), ("c",), ("d",)), worker="test_launch.record", ranks=RANKS)()
    assert (tmp_path / "3").read_text() == f"{gpu}: d"


def test_a_local_process_takes_the_gpu_and_threads_that_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    monkeypatch.setenv("SLURM_PROCID", "3")  # of a driver that lives in a job; its own affair
    monkeypatch.setenv("SLURM_NTASKS", "4")
    Work(str(tmp_path), (("a",), ("b",)), worker="test_launch.record", threads=2, gpu="1")()
    assert (tmp_path / "3").read_text() == "1: a b"
    assert os.environ["OMP_NUM_THREADS"] == "2"


@pytest.mark.slow
def test_the_folder_of_a_command_gives_workers_own_modules_and_hides_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for library in ("numpy", "submitit", "uuid"):
        (tmp_path / f"{library}.py").write_text("raise RuntimeError('a file of the user')")
    lines = [
        "import pathlib, sys",
        "def run(root, task_ids, **ignored):",
        "    pathlib.Path(root, 'last').write_text(sys.path[-1])",
    ]
    (tmp_path / "mine.py").write_text("\n".join([*lines, "    yield from task_ids"]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with local.Local(workers=1, worker="mine.run").open(tmp_path / "run", lambda *of: None, print) as jobs:
        jobs.submit([("a",)])
        while not (ended := jobs.poll()):
            pass
    assert (tmp_path / "run" / "last").read_text() == str(tmp_path), ended
    assert "PYTHONSAFEPATH" not in os.environ


def spends(root: str, task_ids: Sequence[str], **ignored: Any) -> Iterator[str]:
    """A worker whose first task makes the GPU unusable for its process."""
    (Path(root) / task_ids[0]).touch()
    raise SpentError(f"{task_ids[0]} left the GPU unusable")
    yield


def test_a_process_that_can_do_no_more_ends_well(tmp_path: Path):
    """As a job that is done, so that nobody blames its node. What it has left is sent again."""
    process = multiprocessing.get_context("fork").Process(
        target=Work(str(tmp_path), (("a", "b"),), worker="test_launch.spends")
    )
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_worker_that_can_do_no_more_ends_a_search_in_its_own_process(setup: Setup, tmp_path: Path):
    with pytest.raises(SearchError, match="start the search again"):
        setup.run(tmp_path / "run", launcher=Debug(worker="test_launch.spends"))


def test_visible_gpus(tmp_path: Path, printing: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    printing("nvidia-smi", "GPU 0: A100 (UUID: GPU-1)\n  MIG 1g\nGPU 1: A100 (UUID: GPU-2)\n")
    for value, expected in (("0,3", ["0", "3"]), ("GPU-1", ["GPU-1"]), ("", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert visible_gpus() == expected
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus() == ["0", "1"]
    printing("nvidia-smi", code=9)
    monkeypatch.setattr(local, "DRIVER_FILES", (str(tmp_path / "version"),))
    assert visible_gpus() == []
    (tmp_path / "version").touch()
    with pytest.raises(ConfigError, match=r"nvidia-smi lists none.*set CUDA_VISIBLE_DEVICES"):
        visible_gpus()
    for value in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert visible_gpus() == []


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_packs_keep_every_bundle_whole_and_in_order(size: int):
    bundles = [tuple(f"{n}.{m}" for m in range(n % 4 + 1)) for n in range(30)]
    packs = packed(bundles, size)
    assert [bundle for pack in packs for bundle in pack] == bundles
    lengths = [sum(map(len, pack)) for pack in packs]
    assert all(length >= size for length in lengths[:-1])
    assert all(sum(map(len, pack[:-1])) < size for pack in packs)


# --- whole searches ---


@pytest.fixture(scope="module")
def light_setup(tmp_path_factory: pytest.TempPathFactory, compose: Any) -> Setup:
    """A search of which no model is ever loaded."""
    overrides = nothing_to_load(tmp_path_factory.mktemp("light"))
    search = ["generations=4", "strategy.population=6", "objective.b=0", "name=test", "retries=9"]
    return Setup([*overrides, *search], compose)


def on(slurm: SimulatedSlurm, **settings: Any) -> Slurm:
    made = Slurm(**settings)
    made._commands = slurm  # type: ignore[assignment]
    return made


@pytest.fixture(scope="module")
def wanted(light_setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("wanted")
    light_setup.run(root, launcher=Debug(worker="light.run"))
    return story(root)


@pytest.mark.slow
@pytest.mark.parametrize("tasks_per_job", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_search_on_a_cluster_of_faults_equals_one_in_a_process(
    light_setup: Setup, wanted: Any, tmp_path: Path, tasks_per_job: int
):
    chance = random.Random(tasks_per_job)
    slurm = SimulatedSlurm(faults=lambda e: chance.choice((*LOSSES, *DELAYS)) if chance.random() < 0.3 else "")
    light_setup.run(tmp_path, launcher=on(slurm, tasks_per_job=tasks_per_job))
    assert story(tmp_path) == wanted


@pytest.fixture(scope="module")
def without_barrier(light_setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("without_barrier")
    light_setup.run(root, "select_after=0.5", launcher=on(SimulatedSlurm()))
    return root


@pytest.mark.slow
def test_without_a_barrier_late_children_are_told_later_and_none_is_forgotten(without_barrier: Path):
    generations = analysis.open_run(without_barrier).generations
    told = [set(generation.told) for generation in generations]
    born = [set(generation.born_ids) for generation in generations]
    assert 3 <= len(told[0]) < 6  # of 6: one look may find more than the half that it waits for
    assert sum(map(len, told)) == len(set().union(*told)), "a child was told twice"
    assert set().union(*told) == set().union(*born)
    assert any(told[n] & born[n - 1] for n in range(1, 4)), "no child was late; the test shows nothing"


@pytest.mark.slow
@pytest.mark.parametrize("first_lost", [1, *(pytest.param(lost, marks=pytest.mark.slow) for lost in (2, 3, 4))])
def test_without_a_barrier_a_resumed_run_keeps_to_what_is_written(
    light_setup: Setup, without_barrier: Path, tmp_path: Path, first_lost: int
):
    root = tmp_path / "run"
    shutil.copytree(without_barrier, root)
    for number in range(first_lost, 5):
        (root / "generations" / f"{number:04d}.json").unlink()
    (root / "result.json").unlink()
    known = {path.parent.name for path in root.glob("tasks/*/outcome.json")}
    # What had not been computed when the driver died; the run after it arrives in another order.
    ids = [id for generation in analysis.open_run(without_barrier).generations[first_lost - 1 :] for id in generation.born_ids]
    kept = {id for generation in analysis.open_run(root).generations for id in generation.told}
    for id in set(ids[::2]) & known - kept:
        (root / "tasks" / id / "outcome.json").unlink()
    slurm = SimulatedSlurm(nodes=2, seconds=lambda id: int(id[:4], 16) / 50)
    light_setup.run(root, "select_after=0.5", launcher=on(slurm))
    old, new = analysis.open_run(without_barrier).generations, analysis.open_run(root).generations
    assert new[: first_lost - 1] == old[: first_lost - 1]
    assert len(new) == 4
    assert (root / "result.json").exists()
    assert not set(slurm.answers) & kept


def test_a_simulation_is_as_it_says(tmp_path: Path):
    """The oracle of the tests above must not lie: nodes work one at a time, and their time adds up."""
    tasks = made_up(9)
    slurm = SimulatedSlurm(nodes=4)
    run = Run(tmp_path, slurm, cluster=Cluster(array_parallelism=2))
    run.settle(tasks)
    assert slurm.busy_seconds == pytest.approx(sum(slurm.seconds(identity.task_id(task)) for task in tasks))
    lives = [life for element in slurm.elements for life in element.lives]
    for life in lives:
        assert sum(other.began <= life.began < (other.ended or 0) for other in lives) <= 2
        assert sum(other.node == life.node and other.began <= life.began < (other.ended or 0) for other in lives) == 1
