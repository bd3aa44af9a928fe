"""Strategies compared at equal device seconds: curves, tables, tests of pairs, and the command that runs what it compares."""

import io
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import screens
from scipy.stats import wilcoxon
from searches import Setup, Silent

from hpc_compress import analysis, cli, contest, driver
from hpc_compress.analysis import compare, found
from hpc_compress.config import Budget, ConfigError
from hpc_compress.launch.local import Debug
from hpc_compress.search import front
from hpc_compress.store import Store

GENETIC = ("probe=false", "generations=3")


def lightly(setup: Setup, root: Path, *words: str) -> Path:
    setup.run(root, *words, "report_front=true", launcher=Debug(worker="screens.run"))
    return root


@pytest.fixture(scope="module")
def runs(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two strategies with two seeds each."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        lightly(setup, folder / f"genetic-{seed}", *GENETIC, f"seed={seed}")
        lightly(setup, folder / f"screens-{seed}", *screens.SETTINGS, f"seed={seed}")
    return folder


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs, tmp_path / "runs"))


def opened(folder: Path) -> list[analysis.Run]:
    return [analysis.open_run(root) for root in analysis.find_runs([folder])]


# --- a run's curve ---


@pytest.mark.slow
def test_device_seconds_are_those_that_the_driver_counts(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    counted: list[float] = []
    spend = driver._Search._spend

    def noted(self: Any, outcomes: Any) -> None:
        spend(self, outcomes)
        counted.append(self.spent_seconds)

    monkeypatch.setattr(driver._Search, "_spend", noted)
    for name, words in (("genetic", GENETIC), ("screens", screens.SETTINGS)):
        run = analysis.open_run(lightly(setup, tmp_path / name, *words))
        curve = compare.curve(run)
        assert curve["device_seconds"].iloc[-1] == counted[-1]
        assert compare.device_seconds(run)[-1] == counted[-1] - len(run.result.timed)
        assert curve["device_seconds"].is_monotonic_increasing
        searched = [seen for seen in run.seen.values() if seen.split == "search"]
        assert counted[-1] == len(searched)  # each took a second; the report is not counted


def test_a_curve_has_the_hypervolume_of_what_was_known_after_each_generation(runs: Path):
    for run in opened(runs):
        curve, objectives = compare.curve(run), run.plan.config.objectives
        assert curve["generation"].tolist() == [0, *(generation.number for generation in run.generations)]
        for number, volume in zip(curve["generation"], curve["hypervolume_search"], strict=True):
            told = {task_id for generation in run.generations if generation.number <= number for task_id in generation.told}
            known = [run.seen[id].measurement for id in told if run.seen[id].measurement]
            vectors = np.array([front.vector(measurement, run.base, objectives) for measurement in known])
            assert volume == pytest.approx(front.hypervolume(vectors, objectives))
        assert curve["hypervolume_search"].iloc[0] == 0
        assert curve["hypervolume_search"].iloc[-1] > 0


def test_the_final_front_is_judged_by_the_report_split(copied: Path):
    run = opened(copied)[0]
    objectives, base = run.plan.config.objectives, run.report_of(run.base_id).measurement
    final = [run.report_of(id).measurement for id in found.front_of(run)]
    vectors = np.array([front.vector(measurement, base, objectives) for measurement in final])
    whole = compare.curve(run)["hypervolume_report"]
    assert whole.iloc[:-1].isna().all()
    assert whole.iloc[-1] == pytest.approx(front.hypervolume(vectors, objectives))
    for id in found.front_of(run):
        (run.root / "tasks" / run.seen[id].report_id / "outcome.json").unlink(missing_ok=id != run.base_id)
    assert compare.curve(analysis.open_run(run.root))["hypervolume_report"].iloc[-1] in (
        0.0,
        pytest.approx(math.nan, nan_ok=True),
    )


def test_a_run_under_way_has_a_curve(copied: Path):
    root = copied / "screens-1"
    whole = compare.curve(analysis.open_run(root))
    (root / "result.json").unlink()
    (root / "generations/0004.json").unlink()
    part = compare.curve(analysis.open_run(root))
    assert part["hypervolume_report"].isna().all()
    assert part["device_seconds"].tolist() == whole["device_seconds"].tolist()[:-1]
    text = analysis.write_comparison(analysis.find_runs([copied]), copied)
    assert "screens-1 has not come to its end" in text


# --- the table ---


def table(**values: Any) -> pd.DataFrame:
    rows = {"run": "r", "dataset": "a", "seed": 0, "generation": 0, "measured": 1, "hypervolume_report": math.nan, **values}
    return pd.DataFrame({name: value if isinstance(value, list) else [value] * 2 for name, value in rows.items()})


def test_the_seconds_to_the_references_end_and_the_volume_at_equal_seconds():
    one = table(strategy="old", device_seconds=[10.0, 100.0], hypervolume_search=[1.0, 2.0], hypervolume_report=[math.nan, 2.0])
    fast = table(
        strategy="new", device_seconds=[20.0, 200.0], hypervolume_search=[2.5, 3.0], hypervolume_report=[math.nan, 3.0]
    )
    slow = table(
        strategy="bad", device_seconds=[20.0, 200.0], hypervolume_search=[0.5, 1.5], hypervolume_report=[math.nan, 1.0]
    )
    last = compare.ends(pd.concat([one, fast, slow]), "old").set_index("strategy")
    assert last["seconds_needed"].to_dict() == {"old": 100, "new": 20, "bad": math.inf}
    assert last["time_ratio"].to_dict() == {"old": 1, "new": 0.2, "bad": math.inf}
    assert last["hypervolume_equal"].to_dict() == {"old": 2, "new": 2.5, "bad": 0.5}
    assert last["ratio"].to_dict() == {"old": 1, "new": 1.5, "bad": 0.5}
    assert "never" in compare._table(last.reset_index())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], "unknown"),
        ([math.nan, 2.0], "2.0"),
        ([1.0, 2.0, 4.0], "2.0 (1.0 to 4.0)"),
        ([1.0, 2.0], "1.5 (1.0 to 2.0)"),
        ([1.0, math.inf, math.inf], "never (1.0 to never)"),
        ([1.0, 2.0, math.inf], "2.0 (1.0 to never)"),
    ],
)
def test_a_spread_is_the_median_and_both_ends(values: list[float], said: str):
    assert compare._spread(pd.Series(values, dtype=float), ".1f") == said


@pytest.mark.parametrize("pairs", [1, 3, 5, 6, 9])
def test_a_few_pairs_are_said_to_prove_nothing(pairs: int):
    differences = [0.1 + 0.01 * number for number in range(pairs)]
    line = compare._test("new", "old", "report", differences)
    assert f"better in {pairs} of n={pairs} pairs" in line
    smallest = float(wilcoxon(differences).pvalue)
    assert smallest == pytest.approx(2 ** (1 - pairs))
    assert ("no difference can be significant" in line) == (smallest > 0.05)
    assert "p=1 " in compare._test("new", "old", "report", [0.0] * pairs)
    assert "nothing to test" in compare._test("new", "old", "report", [])


def test_pairs_are_of_one_dataset_and_seed():
    rows = []
    for dataset in ("a", "b"):
        for seed in (0, 1, 2):
            for strategy, volume in (("old", 1.0), ("new", 2.0 if seed else 0.5)):
                rows.append({"dataset": dataset, "seed": seed, "strategy": strategy, "hypervolume_report": volume})
    rows.append({"dataset": "b", "seed": 3, "strategy": "new", "hypervolume_report": 9.0})
    [line] = compare._tests(pd.DataFrame(rows).assign(hypervolume_search=0.0), "old")
    assert "new against old, report split: better in 4 of n=6 pairs" in line


# --- the files ---


def test_no_two_strategies_look_alike(monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[str, ...]] = []
    monkeypatch.setattr(compare, "_draw", lambda axes, own, *style: seen.append(style))
    rows = {"dataset": "x", "seed": 0, "device_seconds": 1.0, "hypervolume_search": 1.0}
    compare.plot(pd.DataFrame([{**rows, "strategy": f"number {number}"} for number in range(12)]), io.BytesIO())
    assert len(set(seen)) == 12
    assert len({(color, marker) for color, _, marker in seen}) == 12
    assert len({(color, line) for color, line, _ in seen}) == 12


@pytest.mark.slow
def test_a_comparison_leaves_a_table_a_text_and_a_picture(runs: Path, tmp_path: Path):
    text = analysis.write_comparison(analysis.find_runs([runs]), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"compare.md", "compare.csv", "compare.png"}
    assert (tmp_path / "compare.md").read_text() == text
    assert (tmp_path / "compare.png").stat().st_size > 20_000
    written = pd.read_csv(tmp_path / "compare.csv")
    assert set(written["strategy"]) == {"genetic", "screens"}
    assert set(written["seed"]) == {0, 1}
    assert len(written) == 2 * (1 + 3) + 2 * (1 + 4)
    assert "Reference: genetic." in text
    assert re.search(r"screens against genetic, report split: better in \d of n=2 pairs", text)
    assert "p is 0.5 or more" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert "Reference: screens." in analysis.write_comparison(analysis.find_runs([runs]), tmp_path, "screens")


@pytest.mark.slow
def test_what_is_not_measured_on_the_report_split_is_said(setup: Setup, runs: Path, tmp_path: Path):
    setup.run(tmp_path / "screens-2", *screens.SETTINGS, "seed=2", "report_candidates=1", launcher=Debug(worker="screens.run"))
    text = analysis.write_comparison([runs / "genetic-0", tmp_path / "screens-2"], tmp_path)
    run = analysis.open_run(tmp_path / "screens-2")
    measured = {run.result.best, run.base_id} & set(run.result.front)
    assert f"screens-2 measured {len(measured)} of the {len(run.result.front)} models of its front on the report split" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"objectives": ["quality", "bytes"]}, "different objectives"),
        ({"protocol": {"batch_size": 4}}, "different protocols"),
    ],
)
def test_runs_that_differ_in_more_than_the_strategy_are_refused(copied: Path, change: dict[str, Any], words: str):
    path = copied / "screens-0/run.json"
    values = json.loads(path.read_text())
    for name, value in change.items():
        values["config"][name] = {**values["config"][name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=words):
        analysis.write_comparison(analysis.find_runs([copied]), copied)


def test_each_seed_may_have_a_base_model_of_its_own(copied: Path):
    def rebase(run: str) -> None:
        path = copied / run / "run.json"
        values = json.loads(path.read_text())
        values["base"]["fingerprint"] = "0123456789abcdef"
        path.write_text(json.dumps(values))

    rebase("screens-1")
    with pytest.raises(ConfigError, match="different base models"):
        compare.curves(opened(copied))
    rebase("genetic-1")
    assert len(set(compare.curves(opened(copied))["seed"])) == 2


@pytest.mark.slow
def test_the_benchmark_keeps_what_other_days_found(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import strategies

    monkeypatch.setattr(strategies, "DATASETS", {runs.name: []})
    strategies.collect(runs.parent, tmp_path)
    table = pd.read_csv(tmp_path / "strategies.csv")
    old = table[table["seed"] == 0].assign(dataset="of another day", version="old")
    pd.concat([old, table[table["seed"] == 1].assign(hypervolume_search=99)]).to_csv(tmp_path / "strategies.csv", index=False)
    strategies.collect(runs.parent, tmp_path)
    both = pd.read_csv(tmp_path / "strategies.csv")
    assert len(both) == len(old) + len(table)
    assert both["hypervolume_search"].max() < 99
    assert "of another day" in (tmp_path / "strategies.md").read_text()
    assert (tmp_path / "strategies.png").read_bytes().startswith(b"\x89PNG")
    fronts = pd.read_csv(tmp_path / "strategies_fronts.csv")
    assert set(fronts["strategy"]) == {"genetic", "screens"}
    assert (fronts[["on_search", "on_report", "smaller"]] > 0).all(axis=None)


@pytest.mark.slow
def test_a_run_that_is_given_twice_is_refused(copied: Path):
    shutil.copytree(copied / "genetic-0", copied / "again" / "genetic-0")
    with pytest.raises(ConfigError, match="are both genetic on words with seed=0"):
        analysis.write_comparison(analysis.find_runs([copied]), copied)
    shutil.move(copied / "again" / "genetic-0", copied / "again" / "mine-0")
    assert "mine against genetic" in analysis.write_comparison(analysis.find_runs([copied]), copied)


def test_a_reference_that_is_not_there_is_refused(runs: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="none of the strategies of these runs: genetic, screens"):
        analysis.write_comparison(analysis.find_runs([runs]), tmp_path, "random")


def test_a_run_without_its_base_model_is_compared_as_nothing(copied: Path):
    run = analysis.open_run(copied / "screens-0")
    (run.root / "tasks" / run.base_id / "outcome.json").unlink()
    curve = compare.curve(analysis.open_run(run.root))
    assert (curve["hypervolume_search"] == 0).all()
    analysis.write_comparison(analysis.find_runs([copied]), copied)


# --- running what is compared ---


def entries(setup: Setup, folder: Path, **words: tuple[str, ...]) -> list[contest.Entry]:
    from hpc_compress import config

    made = []
    for seed in (0, 1):
        for strategy, more in words.items():
            values = setup.compose(*setup.overrides, *more, f"seed={seed}", "report_front=true")
            parts = {name: values.pop(name) for name in ("strategy", "objective", "launcher", "cluster", "retries")}
            settings = driver.SearchSettings(
                config.validate(config.RunConfig, values), parts["strategy"], parts["objective"], Debug(worker="screens.run")
            )
            made.append(contest.Entry(strategy, seed, folder / f"{strategy}-{seed}", settings))
    return made


@pytest.mark.slow
def test_the_others_spend_what_the_reference_spent(setup: Setup, tmp_path: Path):
    progress = Silent()
    made = entries(setup, tmp_path, screens=screens.SETTINGS[:2], genetic=GENETIC)
    outcome = contest.run(made, "genetic", progress)
    assert [root.name for root in outcome.finished] == ["genetic-0", "screens-0", "genetic-1", "screens-1"]
    assert not outcome.failed
    for seed in (0, 1):
        spent = compare.device_seconds(analysis.open_run(tmp_path / f"genetic-{seed}"))[-1]
        run = analysis.open_run(tmp_path / f"screens-{seed}")
        assert run.plan.config.budget == Budget(device_hours=spent / 3600)
        assert compare.device_seconds(run)[-1] >= spent > compare.device_seconds(run)[-2]
        assert run.result.stopped.startswith("budget.device_hours")


@pytest.mark.slow
def test_what_has_come_to_its_end_is_not_run_again(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = entries(setup, tmp_path, genetic=GENETIC, screens=screens.SETTINGS[:2])
    contest.run(made, "genetic", Silent())
    (tmp_path / "screens-1/result.json").unlink()
    searched: list[str] = []
    search = driver.search
    monkeypatch.setattr(
        driver, "search", lambda settings, root, *more: searched.append(root.name) or search(settings, root, *more)
    )
    progress = Silent()
    assert len(contest.run(made, "genetic", progress).finished) == 4
    assert searched == ["screens-1"]
    assert sum("has come to its end before" in line for line in progress.lines) == 3


@pytest.mark.slow
def test_a_search_that_fails_does_not_end_the_others(setup: Setup, tmp_path: Path):
    progress = Silent()
    made = entries(setup, tmp_path, genetic=GENETIC, screens=screens.SETTINGS[:2])
    with Store(tmp_path / "genetic-0").lock("driver"):
        outcome = contest.run(made, "genetic", progress)
    assert [root.name for root in outcome.finished] == ["genetic-1", "screens-1"]
    assert {root.name for root in outcome.failed} == {"genetic-0", "screens-0"}
    assert "another driver" in outcome.failed[tmp_path / "genetic-0"]
    assert "the budget is not known" in outcome.failed[tmp_path / "screens-0"]


@pytest.mark.slow
@pytest.mark.parametrize(("limited", "last"), [(False, False), (True, True)])
def test_a_budget_of_their_own_ends_all_of_them(setup: Setup, tmp_path: Path, limited: bool, last: bool):
    words = (*GENETIC[:1], "generations=1", f"budget.device_hours={20 / 3600}")
    outcome = contest.run(entries(setup, tmp_path, genetic=words), "genetic", Silent(), limited)
    for root in outcome.finished:
        run = analysis.open_run(root)
        assert (run.result.stopped == "all generations are done") == last
        assert len(run.generations) == 1 or not last


def compared(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["hpc-compress", "compare", *words])
    cli.main()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seeds=2"], "give strategies that differ"),
        (["strategy=genetic,genetic"], "give strategies that differ"),
        (["strategy=genetic", "seeds=0"], "give their number"),
        (["strategy=genetic", "seed=3"], "the number of seeds"),
        (["strategy=genetic", "reference=other"], "none of strategy=genetic"),
        (["strategy=genetic", "name=../x"], "no path below results"),
        (["strategy=gentic"], "gentic"),
        (["strategy=genetic", "generatoins=3"], "did you mean generations?"),
        (["results/none"], "no run in results/none"),
        (["results/none", "generations=3"], "not both"),
    ],
)
def test_a_mistake_is_named_before_the_first_search(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        compared(tmp_path, monkeypatch, *words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_runs_that_are_there_are_compared_by_the_command(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    compared(copied.parent, monkeypatch, "runs", "reference=screens")
    assert "Reference: screens." in capsys.readouterr().out
    assert (copied / "compare.png").exists()
    compared(copied.parent, monkeypatch, "runs/genetic-0", "runs/screens-0", "--out=here")
    assert (copied.parent / "here/compare.md").exists()


@pytest.mark.slow
def test_the_command_searches_and_compares(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = [word for word in setup.overrides if not word.startswith("name=")]
    compared(tmp_path, monkeypatch, "strategy=genetic", "seeds=2", "name=which", *words, "generations=1", "timings=1")
    folder = tmp_path / "results/which"
    shown = capsys.readouterr().out
    assert "hypervolume, report split" in shown
    assert "written to results/which" in shown
    table = pd.read_csv(folder / "compare.csv")
    assert table["run"].unique().tolist() == ["genetic-0", "genetic-1"]
    assert table["generation"].tolist() == [0, 1, 0, 1]
    assert (table["device_seconds"] > 0).all()
    for root in (folder / "genetic-0", folder / "genetic-1"):
        run = analysis.open_run(root)
        assert all(run.report_of(id) for id in run.result.front)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")}
    compared(tmp_path, monkeypatch, "strategy=genetic", "seeds=2", "name=which", *words, "generations=1", "timings=1")
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")} == before
