"""Runs whose candidates are screened before they are measured, as readers see them."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import screens
from searches import Setup

import hpc_compress
from hpc_compress import analysis, dispatch, export, identity, worker
from hpc_compress.analysis import found, runs
from hpc_compress.config import ConfigError
from hpc_compress.launch.local import Debug
from hpc_compress.store import Store
from hpc_compress.types import Genome, Screen, Screening, Step


@pytest.fixture(scope="module")
def finished(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("screened")
    setup.run(root, *screens.SETTINGS, launcher=Debug(worker="screens.run"))
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_genome_that_was_screened_and_then_measured_is_one_row(finished: Path):
    run, table = analysis.open_run(finished), hpc_compress.load_runs(finished)
    born = {run.candidate_of(task_id) for generation in run.generations for task_id in generation.born_ids}
    assert sorted(table["candidate"]) == sorted({run.base_id, *born})
    assert table["candidate"].is_unique
    assert table["fidelity"].value_counts().to_dict() == {"measured": 5, "screened": 4}
    assert (table["status"] == table["fidelity"]).all()
    both = table[(table["fidelity"] == "measured") & (table["generation"] > 0)]
    assert both["divergence"].notna().all()
    assert set(both["generation"]) <= {1, 3}  # in which they were born
    assert table.loc[table["generation"] == 0, "divergence"].isna().all()
    assert table.loc[table["fidelity"] == "screened", "quality"].isna().all()


def test_the_latest_screening_counts(finished: Path):
    run, table = analysis.open_run(finished), hpc_compress.load_runs(finished).set_index("candidate")
    screened = [run.candidate_of(task_id) for task_id in run.told if run.seen[task_id].study == "screen"]
    [twice] = {candidate for candidate in screened if screened.count(candidate) == 2}
    third = next(run.seen[id] for id in run.generations[2].told if run.candidate_of(id) == twice)
    assert table.loc[twice, "divergence"] == third.divergence


def test_seconds_are_those_of_all_tasks_on_the_search_split(finished: Path):
    run, table = analysis.open_run(finished), hpc_compress.load_runs(finished)
    searched = [seen for seen in run.seen.values() if seen.split == "search"]
    assert table["device_seconds"].sum() == sum(seen.seconds for seen in searched) == len(searched)
    assert table["device_seconds"].iloc[0] == 2  # the base model's measurement and its survey


def test_readers_find_the_front_that_the_search_found(finished: Path):
    run, table = analysis.open_run(finished), hpc_compress.load_runs(finished)
    assert found.front_of(run) == list(run.result.front)
    assert set(table.loc[table["on_front"], "candidate"]) == set(run.result.front)


def test_a_study_of_the_base_model_is_not_its_measurement(root: Path):
    run = analysis.open_run(root)
    surveys = [task_id for task_id, seen in run.seen.items() if seen.study == "survey"]
    assert len(surveys) == 1
    assert run.candidate_of(surveys[0]) == run.base_id != surveys[0]
    assert run.seen[run.base_id].measurement is not None
    (root / "tasks" / run.base_id / "outcome.json").unlink()
    assert analysis.open_run(root).base is None
    assert (hpc_compress.load_runs(root)["generation"] > 0).all()


def test_the_status_counts_those_that_are_only_screened(root: Path):
    run = analysis.open_run(root)
    assert "candidates  8 screened, 4 of them measured" in analysis.status_of(run)
    screened = [run.candidate_of(id) for id in run.told if run.seen[id].study]
    once = [id for id in run.told if run.candidate_of(id) not in run.seen and screened.count(run.candidate_of(id)) == 1]
    screen = once[0]
    (root / "tasks" / screen / "outcome.json").write_text("{")
    assert f"tasks/{screen}/outcome.json is cut short" in analysis.status(root)
    assert len(hpc_compress.load_runs(root)) == 8


def test_gpu_hours_include_studies(root: Path):
    for path in root.glob("tasks/*/outcome.json"):
        path.write_text(path.read_text().replace('"cpu"', '"cuda"'))
    run = analysis.open_run(root)
    assert analysis.gpu_hours(run) == pytest.approx(len(run.seen) / 3600)


def test_an_id_names_a_candidate_and_never_its_screening(finished: Path, tmp_path: Path):
    run = analysis.open_run(finished)
    for task_id in run.generations[0].told:
        with pytest.raises(ConfigError, match="names 0 measured candidates"):
            export.export(finished, tmp_path / "model", task_id)


def test_what_an_earlier_version_kept_of_outcomes_is_read(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runs, "SEEN_FROM", 1)
    whole = hpc_compress.load_runs(root)
    assert (root / "seen.json").exists()
    assert hpc_compress.load_runs(root).equals(whole)
    kept = json.loads((root / "seen.json").read_text())["seen"]
    measured = {task_id: seen for task_id, seen in kept.items() if seen["measurement"]}
    assert not {"study", "candidate", "divergence"} & {key for seen in measured.values() for key in seen}
    (root / "seen.json").write_text(json.dumps({"seen": measured}))  # all that it could read
    assert hpc_compress.load_runs(root).equals(whole)


def test_a_run_of_screens_alone_is_shown(root: Path, finished: Path):
    Store(root).delete("result.json")
    for number in (2, 3, 4):
        Store(root).delete(f"generations/{number:04d}.json")
    for task_id in analysis.open_run(finished).generations[1].told:
        Store(root).delete(f"tasks/{task_id}/outcome.json")
    table = hpc_compress.load_runs(root)
    assert table["fidelity"].tolist() == ["measured", *["screened"] * 4]
    assert "best so far" in analysis.status(root)


def test_costs_are_estimated_from_what_was_counted(finished: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import costs

    run, setting = analysis.open_run(finished), costs.Setting(costs.Model(), 67_000, 1_000, 3.0)
    one, many = (costs.stages(run, setting, gpus).set_index("stage") for gpus in (1, 64))
    reported = len({run.base_id, *run.result.reported})
    counted = {"base": 1, "survey": 1, "trained": 4, "report": reported}
    assert {stage: one.loc[stage, "tasks"] for stage in counted} == counted
    assert one.loc[["screen", "rescore"], "tasks"].sum() == 9
    assert one["gpu_s"].sum() == pytest.approx(many["gpu_s"].sum())
    assert many["wall_s"].sum() < one["wall_s"].sum()
    double = costs.stages(run, costs.Setting(costs.Model(), 134_000, 1_000, 3.0), 1).set_index("stage")
    assert double.loc["trained", "gpu_s"] > 1.8 * one.loc["trained", "gpu_s"], "its epochs are of all rows"


# --- results of a front ---


def targets(setup: Setup, root: Path, *limits: str) -> Path:
    setup.run(root, *screens.SETTINGS, *limits, launcher=Debug(worker="screens.run"))
    return root


@pytest.mark.slow
def test_the_report_has_a_table_of_the_front(finished: Path, tmp_path: Path):
    table, run = analysis.write_report(analysis.open_runs([finished]), tmp_path), analysis.open_run(finished)
    text = (tmp_path / "report.md").read_text()
    rows = text.partition("## Front")[2].splitlines()
    assert [id for id in run.result.front if any(id in row for row in rows)] == list(run.result.front)
    written = pd.read_csv(tmp_path / "report.csv")
    front = written[written["method"] == "front"]
    assert front["candidate"].tolist() == list(run.result.front)
    assert set(front["split"]) == {"search"}
    reported = set(table["candidate"])
    assert front["report_quality"].notna().tolist() == [id in reported for id in run.result.front]
    assert written[written["split"] == "report"]["candidate"].tolist() == table["candidate"].tolist()


@pytest.mark.slow
def test_the_whole_front_is_reported_where_that_is_wanted(setup: Setup, tmp_path: Path):
    root = targets(setup, tmp_path / "run", "report_front=true", "report_candidates=1")
    table, run = analysis.report(analysis.open_runs([root])), analysis.open_run(root)
    assert set(table["candidate"]) == {run.base_id, run.result.best, *run.result.front}
    methods = table.set_index("candidate")["method"]
    assert methods[run.result.best] == "best"
    assert set(methods) <= {"base model", "best", "front"}


@pytest.mark.slow
def test_a_model_within_the_targets_is_named_reported_and_exported(setup: Setup, tmp_path: Path):
    root = targets(setup, tmp_path / "run", "target.speed_up=1.0", "target.megabytes=0.9")
    run, nearest = analysis.open_run(root), found.nearest(analysis.open_run(root))
    assert nearest.within
    measured = hpc_compress.load_runs(root).query("speed_up >= 1 and model_bytes <= 900_000")
    assert nearest.candidate == measured.loc[measured["quality"].idxmax(), "candidate"]
    assert nearest.candidate in run.result.reported
    [line] = analysis.on_targets(analysis.open_runs([root]))
    assert line.startswith(f"within the targets (at least 1x speed, at most 0.9 MB): candidate {nearest.candidate}: accuracy")
    assert "on the report split" in line
    analysis.write_report(analysis.open_runs([root]), tmp_path)
    assert line[1:] in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_targets_that_no_model_keeps_to_are_said_to_be_missed(setup: Setup, tmp_path: Path):
    root = targets(setup, tmp_path / "run", "target.quality=0.01", "target.speed_up=50", "target.megabytes=0.001")
    nearest = found.nearest(analysis.open_run(root))
    assert not nearest.within
    [line] = analysis.on_targets(analysis.open_runs([root]))
    assert line.startswith(
        "no model keeps to all targets (at least 1 % of the base model's quality, at least 50x speed, at most"
    )
    assert line.count("misses by") == 2


def test_a_run_without_targets_says_nothing_of_them(finished: Path):
    assert analysis.on_targets(analysis.open_runs([finished])) == []
    assert found.nearest(analysis.open_run(finished)) is None


@pytest.mark.slow
def test_the_model_for_the_targets_keeps_its_files(setup: Setup, tmp_path: Path):
    """It may not be among the survivors."""
    root = tmp_path / "run"
    setup.run(root, "target.megabytes=0.001", "strategy.survivors=1", "objective._target_=screens.largest")
    run, nearest = analysis.open_run(root), found.nearest(analysis.open_run(root))
    assert run.generations[-1].population == (run.base_id,)
    assert nearest.candidate != run.base_id
    task = run.outcomes[nearest.candidate].task
    assert Store(root).artifact(identity.deployed_key(task)) is not None
    target = export.export(root, tmp_path / "model")
    assert f"candidate `{nearest.candidate}`" in (target / "README.md").read_text()


@pytest.mark.slow
def test_the_picture_shows_both_projections(finished: Path, tmp_path: Path):
    analysis.plot(hpc_compress.load_runs(finished), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 20_000


def test_a_worker_judges_a_structure_in_several_precisions(setup: Setup, tmp_path: Path):
    base = Store(tmp_path).outcome(setup.run(tmp_path, "generations=0").base)
    assert base is not None
    nf4, prune = Step(operator="quantize", params={"scheme": "nf4"}), Step(operator="prune", params={"share": 0.5})
    study = Screen(judge=8, deploys=((), (nf4,)))
    task = base.task.model_copy(update={"genome": Genome(steps=(prune,)), "study": study})
    store = Store(tmp_path)
    assert list(worker.run(str(tmp_path), [store.add_task(task)])) == [identity.task_id(task)]
    outcome = store.outcome(identity.task_id(task))
    assert outcome is not None
    assert isinstance(outcome.finding, Screening)
    whole, small = outcome.finding.deployed
    assert whole.divergence == pytest.approx(outcome.finding.divergence, rel=1e-3, abs=1e-6)
    assert (whole.deploy, small.deploy) == study.deploys
    assert f", base {whole.divergence:.4f}, quantize_nf4 {small.divergence:.4f}  (" in dispatch._outcome_line(outcome)
