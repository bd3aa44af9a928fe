"""Run folders from strangers: nothing in them runs, damage in them is named, and the rest is shown."""

import contextlib
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import light
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from searches import Setup, artifacts

import hpc_compress
from hpc_compress import analysis, cli, door, export, identity
from hpc_compress.analysis import runs
from hpc_compress.config import ConfigError
from hpc_compress.driver import Generation
from hpc_compress.launch.local import Debug
from hpc_compress.records import End, Ends, Submission
from hpc_compress.store import Store
from hpc_compress.types import Outcome, Task


@pytest.fixture(scope="module")
def finished(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    setup.run(root, "probe=false", "generations=3", launcher=Debug(worker="light.run"))
    for folder in artifacts(root):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model_type": export.MODEL_TYPE}))
        save_file({"x": np.zeros(2, np.float32)}, folder / "model.safetensors")
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


READERS: dict[str, Callable[[Path], Any]] = {
    "report": lambda root: analysis.write_report(analysis.open_runs([root]), root.parent / "out"),
    "load_runs": hpc_compress.load_runs,
    "compare": lambda root: analysis.write_comparison([root], root.parent / "out"),
    "status": analysis.status,
    "export": lambda root: export.export(root, root.parent / "model"),
}


@pytest.mark.parametrize("reader", [pytest.param(reader, id=name) for name, reader in READERS.items()])
def test_nothing_that_a_run_names_is_run(root: Path, reader: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch):
    (root.parent / "planted.py").write_text("open('ran', 'w').close()\ndef objective(*args): open('ran', 'w').close()\n")
    monkeypatch.chdir(root.parent)
    monkeypatch.syspath_prepend(str(root.parent))
    for target in ({"_target_": "os.system", "command": "touch ran"}, {"_target_": "planted.objective"}):
        change(root / "run.json", objective=target)
        reader(root)
    assert not (root.parent / "ran").exists()
    assert "planted" not in sys.modules


@pytest.mark.parametrize(
    "step", [{"operator": "planted.Step"}, {"operator": "fine_tune", "params": {"epochs": 10**6}}], ids=["module", "params"]
)
def test_a_resumed_run_prepares_its_base_model_as_its_settings_say(
    root: Path, setup: Setup, step: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    (root.parent / "planted.py").write_text("")
    monkeypatch.syspath_prepend(str(root.parent))
    change(root / "run.json", base={**json.loads((root / "run.json").read_text())["base"], "preparation": [step]})
    with pytest.raises(ConfigError, match="preparation: was"):
        setup.run(root, "probe=false", "generations=3", launcher=Debug(worker="light.run"))
    assert "planted" not in sys.modules


def test_fitness_is_left_out_for_a_foreign_objective(root: Path):
    assert hpc_compress.load_runs(root)["fitness"].notna().any()
    change(root / "run.json", objective={"_target_": "os.system"})
    assert hpc_compress.load_runs(root)["fitness"].isna().all()
    change(root / "run.json", objective={"_target_": "hpc_compress.search.objective.Product", "a": "x"})
    assert hpc_compress.load_runs(root)["fitness"].isna().all()


# --- damage ---


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def foreign(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00garbage")


def deep(path: Path) -> None:
    path.write_text('{"a":' * 100_000)


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def huge(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.truncate(door.RECORD_BYTES + 1)


DAMAGES = [cut, foreign, deep, link, loop, pipe, folder, huge]
FILES = ["generations/0002.json", "result.json", "driver.json", "outcome"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [pytest.param(name, damage, id=f"{name}-{damage.__name__}") for name in FILES for damage in DAMAGES],
)
def test_a_damaged_file_is_named_and_the_rest_is_shown(
    root: Path, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
):
    if name == "outcome":
        run = analysis.open_run(root)
        name = f"tasks/{next(id for id in run.generations[0].told if id not in run.result.reported)}/outcome.json"
    before = len(hpc_compress.load_runs(root))
    damage(root / name)
    table = hpc_compress.load_runs(root)
    assert 0 < len(table) <= before
    assert name in caplog.text
    assert "the rest is used" in caplog.text
    assert name in analysis.status(root)
    caplog.clear()
    if name == "result.json":
        for reader in (READERS["report"], READERS["export"]):
            with pytest.raises(ConfigError, match="come to its end"):
                reader(root)
    else:
        assert len(analysis.report(analysis.open_runs([root]))) > 0
        caplog.clear()
        assert (READERS["export"](root) / "README.md").is_file()
    assert name in caplog.text


def test_an_export_names_the_damaged_outcome(root: Path):
    run = analysis.open_run(root)
    cut(root / "tasks" / run.base_id / "outcome.json")
    READERS["export"](root)  # of the best one
    name = f"tasks/{run.result.best}/outcome.json"
    cut(root / name)
    with pytest.raises(door.DamageError, match=f"{name} is cut short; name another candidate"):
        READERS["export"](root)


@pytest.mark.parametrize("damage", DAMAGES[:-1], ids=lambda damage: damage.__name__)
def test_a_run_with_a_damaged_description_is_refused_and_others_are_shown(
    root: Path, finished: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
):
    damage(root / "run.json")
    for reader in READERS.values():
        with pytest.raises(door.DamageError, match=r"run\.json"):
            reader(root)
    assert len(hpc_compress.load_runs([root, finished])) == len(hpc_compress.load_runs(finished))
    assert "this run is left out" in caplog.text


@pytest.mark.parametrize("command", ["report", "status"])
def test_a_damaged_description_is_a_mistake_of_the_user(
    root: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    cut(root / "run.json")
    monkeypatch.setattr(sys, "argv", ["hpc-compress", command, str(root)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "run.json is cut short" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (errno.EROFS, 2)])
def test_a_full_disk_ends_any_command_with_a_line(
    number: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuse(arguments: list[str]) -> None:
        raise OSError(number, os.strerror(number), "/some/file")

    monkeypatch.setattr(cli, "_export", refuse)
    monkeypatch.setattr(sys, "argv", ["hpc-compress", "export"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    assert f"/some/file: {os.strerror(number)}" in capsys.readouterr().err


def test_what_a_filesystem_does_not_give_is_named_and_asked_for_again(root: Path, monkeypatch: pytest.MonkeyPatch):
    """Also by a reader that has looked before: the file itself has not changed meanwhile."""
    whole = analysis.status(root)
    outcome = f"tasks/{analysis.open_run(root).generations[0].told[0]}/outcome.json"
    reader, read = analysis.Reader(root), door._read

    def away(path: Path, most: int) -> bytes:
        if path in (root / outcome, root / "result.json"):
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(path, most)

    with monkeypatch.context() as patch:
        patch.setattr(door, "WAITS_SECONDS", ())
        patch.setattr(door, "_read", away)
        damage = reader.read().damage
        for name in (outcome, "result.json"):
            assert f"{name} can't be read: Stale file handle" in damage
        patch.setattr(door, "_read", lambda path, most: away(root / "result.json", most))
        with pytest.raises(door.DamageError, match=r"run.json can't be read: Stale file handle"):
            analysis.open_run(root)
    assert analysis.status_of(reader.read()) == whole


def test_what_is_missing_is_named(root: Path, caplog: pytest.LogCaptureFixture):
    (root / "generations" / "0002.json").unlink()
    gone = analysis.open_run(root).generations[0].told[0]
    (root / "tasks" / gone / "outcome.json").unlink()
    hpc_compress.load_runs(root)
    assert "generations/0002.json is missing; the rest is used" in caplog.text
    assert f"no usable outcome, such as tasks/{gone}/outcome.json" in caplog.text


def test_an_outcome_of_another_task_is_named(root: Path):
    one, other = analysis.open_run(root).generations[0].told[:2]
    shutil.copy(root / "tasks" / one / "outcome.json", root / "tasks" / other / "outcome.json")
    assert f"tasks/{other}/outcome.json describes another task" in analysis.status(root)


def test_a_result_that_names_nobody(root: Path, caplog: pytest.LogCaptureFixture):
    change(root / "result.json", best="nobody", reported=["nobody", "../../etc"], generations=10**12)
    assert analysis.report(analysis.open_runs([root]))["method"].tolist() == ["base model"]
    assert "2 candidates have no usable outcome, such as tasks/nobody" in caplog.text
    change(root / "result.json", base="nobody")
    with pytest.raises(ConfigError, match="no candidate could be measured"):
        analysis.report(analysis.open_runs([root]))


def test_a_run_without_its_base_model_is_shown(root: Path):
    (root / "tasks" / analysis.open_run(root).base_id / "outcome.json").unlink()
    assert (hpc_compress.load_runs(root)["generation"] > 0).all()
    with pytest.raises(ConfigError, match="no measurement of the base model"):
        _ = analysis.open_run(root).base_id


@pytest.mark.parametrize(
    "figures",
    [
        {"latency_ms": [1e-300], "base_latency_ms": [1e300]},
        {"latency_ms": [0.0]},
        {"base_latency_ms": [-1.0]},
        {"metrics": {}},
        {"model_bytes": 10**400},
        {"latency_ms": [float("inf")]},
    ],
    ids=str,
)
def test_figures_that_nobody_can_have_measured_are_damage(root: Path, figures: dict[str, Any]):
    id = analysis.open_run(root).generations[0].told[0]
    path = root / "tasks" / id / "outcome.json"
    change(path, measurement={**json.loads(path.read_text())["measurement"], **figures})
    assert f"tasks/{id}/outcome.json is no outcome" in analysis.status(root)
    READERS["report"](root)


@pytest.mark.slow
def test_a_report_does_without_the_base_model(root: Path, caplog: pytest.LogCaptureFixture):
    rows = json.loads((root / "run.json").read_text())["rows"]
    huge = [{**overlap, "rows": 10**400} for overlap in rows["overlaps"]]
    change(root / "run.json", rows={**rows, "overlaps": huge})
    with pytest.raises(door.DamageError, match=r"run\.json is no plan"):
        READERS["report"](root)
    change(root / "run.json", rows=rows)
    whole = READERS["report"](root)
    name = f"tasks/{analysis.open_run(root).base_id}/outcome.json"
    cut(root / name)
    assert len(READERS["report"](root)) == len(whole) - 1
    assert f"{name} is cut short" in caplog.text


ODD = st.sampled_from([0, -1, 1e-300, 1e300, 10**400, "", {}, [], [1e-300], [1e300]])
JSON = st.recursive(
    ODD | st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
RECORDS = ["run.json", "result.json", "driver.json", "generations/0001.json", "outcome", "seen.json"]
JOB = {
    "submission.json": Submission(name="a", packs=((("b",),),), mem_mb=1),
    "ends.json": Ends(ends={0: End(state="X")}, gpus=1),
}


def numbers(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the whole numbers of JSON data are."""
    if isinstance(values, dict | list):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from numbers(value, (*path, key))
    elif type(values) is int:
        yield path


def answered(root: Path) -> None:
    for reader in (READERS["status"], READERS["load_runs"], READERS["report"], READERS["compare"]):
        with contextlib.suppress(ConfigError, door.DamageError):
            reader(root)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("run.json", "outcome", "driver.json", "jobs/a/ends.json"),
        *("result.json", "generations/0001.json", "jobs/a/submission.json"),
    ],
)
def test_a_number_of_any_size_is_answered(root: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    for job, record in JOB.items():
        Store(root).write(f"jobs/a/{job}", record)
    if name == "run.json":  # which has many numbers, and no figures
        monkeypatch.setattr(analysis, "plot", lambda candidates, path: None)
    path = root / name if name != "outcome" else sorted(root.glob("tasks/*/outcome.json"))[0]
    whole = path.read_text()
    for place in numbers(json.loads(whole)):
        values = inner = json.loads(whole)
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = 10**400
        path.write_text(json.dumps(values))
        answered(root)
        (root / "result.json").rename(root / "later.json")
        with contextlib.suppress(door.DamageError):
            analysis.status(root)  # how long the rest will take is told before there is a result
        (root / "later.json").rename(root / "result.json")


def test_a_split_without_the_scores_of_a_constant_answer_is_damage(root: Path):
    rows = json.loads((root / "run.json").read_text())["rows"]
    change(root / "run.json", rows={**rows, "trivial": {}})
    with pytest.raises(door.DamageError, match=r"run\.json .* trivial has no scores for the report split"):
        analysis.write_report(analysis.open_runs([root]), root / "out")


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_a_record_is_answered(finished: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    root = Path(shutil.copytree(finished, tmp_path_factory.mktemp("fuzz") / "run"))
    for job, record in JOB.items():
        Store(root).write(f"jobs/a/{job}", record)
    name = data.draw(st.sampled_from([*RECORDS, *(f"jobs/a/{name}" for name in JOB)]))
    path = root / name if name != "outcome" else data.draw(st.sampled_from(sorted(root.glob("tasks/*/outcome.json"))))
    values: Any = json.loads(path.read_text()) if path.exists() else {"seen": {"0" * 16: {}}}
    inner = values
    while (
        (key := data.draw(st.sampled_from(sorted(inner))))
        and isinstance(inner[key], dict)
        and inner[key]
        and data.draw(st.booleans())
    ):
        inner = inner[key]
    inner[key] = data.draw(JSON)
    path.write_text(json.dumps(values))
    for reader in READERS.values():
        with contextlib.suppress(ConfigError, door.DamageError):
            reader(root)
    shutil.rmtree(root)


# --- what is printed and written ---


@pytest.mark.slow
def test_no_text_of_a_stranger_runs_in_a_spreadsheet_or_a_terminal(root: Path):
    dataset = json.loads((root / "run.json").read_text())["dataset"]
    change(root / "run.json", dataset={**dataset, "name": "=HYPERLINK(1)|\x1b[2J\nnext $\\frac{$"})
    table = analysis.write_report(analysis.open_runs([root]), root / "out")
    for name in ("report.csv", "candidates.csv"):
        text = (root / "out" / name).read_text()
        assert "'=HYPERLINK(1)" in text
        assert not re.search(r"(^|,)\"?[=+@]", text, re.MULTILINE)
    for text in (analysis.as_text(table), analysis.status(root), (root / "out" / "report.csv").read_text()):
        assert "\x1b" not in text
    lines = [line for line in analysis.as_text(table).splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert len(lines) == 2 + len(table)


@pytest.mark.slow
def test_a_report_never_writes_through_a_link(root: Path, tmp_path: Path):
    (tmp_path / "mine.txt").write_text("precious")
    (root / "report.md").symlink_to(tmp_path / "mine.txt")
    analysis.write_report(analysis.open_runs([root]), root)
    assert (tmp_path / "mine.txt").read_text() == "precious"


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES], ids=errno.errorcode.get)
def test_a_report_that_can_not_be_written_says_so(root: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sys.modules["hpc_compress.analysis.report"], "write_atomically", refuse)
    monkeypatch.setattr(runs, "write_atomically", refuse)
    monkeypatch.setattr(runs, "SEEN_FROM", 1)
    assert len(hpc_compress.load_runs(root)) > 0  # from a folder that can only be read
    with pytest.raises(ConfigError, match="choose a folder with --out"):
        analysis.write_report(analysis.open_runs([root]), root)


# --- reading again ---


def test_what_was_seen_is_not_read_again(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runs, "SEEN_FROM", 1)
    first = hpc_compress.load_runs(root)
    read: list[Path] = []
    record = door.record
    monkeypatch.setattr(door, "record", lambda path, kind: read.append(path) or record(path, kind))
    assert hpc_compress.load_runs(root).equals(first)
    assert not [path for path in read if path.name == "outcome.json"]
    path = root / "tasks" / first["candidate"][1] / "outcome.json"
    path.write_text(path.read_text() + "\n")
    assert hpc_compress.load_runs(root).equals(first)
    assert [name for name in read if name.name == "outcome.json"] == [path]


@pytest.mark.parametrize("damage", DAMAGES[:-1], ids=lambda damage: damage.__name__)
def test_a_damaged_memory_of_what_was_seen_does_no_harm(
    root: Path, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
):
    first = hpc_compress.load_runs(root)
    monkeypatch.setattr(runs, "SEEN_FROM", 1)
    hpc_compress.load_runs(root)
    damage(root / "seen.json")
    assert hpc_compress.load_runs(root).equals(first)


def test_a_reader_reads_only_what_changed(root: Path, monkeypatch: pytest.MonkeyPatch):
    store, reader = Store(root), analysis.Reader(root)
    run = reader.read()
    read: list[str] = []
    record = door.record
    monkeypatch.setattr(door, "record", lambda path, kind: read.append(str(path.relative_to(root))) or record(path, kind))
    assert reader.read() == run
    assert read == []
    task = run.outcomes[run.base_id].task.model_copy(update={"seed": 17})
    read.clear()
    task_id = store.add_task(task)
    read.clear()
    assert (reader.read().tasks, reader.read().settled) == (run.tasks + 1, run.settled)
    store.settle(light.answer(task))
    read.clear()
    assert reader.read().settled == run.settled + 1
    assert read == [f"tasks/{task_id}/outcome.json"]
    cut(root / "driver.json")
    for _ in range(2):
        assert "driver.json is cut short" in analysis.status_of(reader.read())
    assert read.count("driver.json") == 1


def test_a_failure_that_is_forgotten_is_forgotten_by_readers(root: Path):
    store, reader = Store(root), analysis.Reader(root)
    run = reader.read()
    task: Task = run.outcomes[run.base_id].task.model_copy(update={"seed": 17})
    failure = {"kind": "lost", "stage": "job", "message": "gone"}
    store.settle(Outcome.model_validate({"task": task, "failure": failure}))
    assert reader.read().settled == run.settled + 1
    store.forget_failure(identity.task_id(task))
    assert reader.read().settled == run.settled
    store.settle(light.answer(task))
    assert reader.read().settled == run.settled + 1


def test_generations_of_earlier_versions_are_read(root: Path):
    path = root / "generations" / "0001.json"
    now = Generation.model_validate_json(path.read_text())
    values = json.loads(path.read_text())
    born = [{"genome": {"steps": [], "deploy": []}, "parent": parent} for parent in values.pop("parents")]
    path.write_text(json.dumps({**values, "born": born}))
    assert Generation.model_validate_json(path.read_text()) == now
    assert "operator" not in json.dumps(values)
    for wrong in ([1], "x", [{"parent": 1}]):
        change(path, born=wrong)
        assert "generations/0001.json" in analysis.status(root)


def test_a_run_is_not_searched_for_other_runs(root: Path):
    planted = root / "tasks" / "x"
    planted.mkdir()
    (planted / "run.json").write_text("{")
    assert analysis.find_runs([root.parent]) == [root]


def test_following_ends_with_the_run(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it has ended"))
    cli._status([str(root), "--follow"])
    assert "ended" in capsys.readouterr().out


# --- the door itself ---


def test_a_strangers_file_is_bounded_and_regular(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    assert door.read_bytes(path, most=100) == b"x" * 100
    with pytest.raises(door.DamageError, match="has more than"):
        door.read_bytes(path, most=99)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(door.DamageError, match="not a regular file"):
        door.read_bytes(tmp_path / "pipe")


def test_a_path_stays_in_its_folder(tmp_path: Path):
    root = tmp_path / "run"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    (root / "own").symlink_to(root)
    assert door.inside(root, "tasks", "a") == root / "tasks" / "a"
    assert door.inside(root, "own", "b") == root / "own" / "b"
    for parts in (("..",), ("/etc/passwd",), ("tasks", "../../x"), ("link", "x"), ("a\0b",)):
        with pytest.raises(door.DamageError, match="leads out of"):
            door.inside(root, *parts)
