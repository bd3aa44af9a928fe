"""What a sweep shows. Its searches are made by a worker that only answers, so what they find means nothing."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from searches import Setup

from hpc_compress import analysis
from hpc_compress.analysis import sweeps
from hpc_compress.launch.local import Debug

pytestmark = pytest.mark.slow  # eight whole searches


@pytest.fixture(scope="module")
def runs(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The weights of speed and memory, two values each, and two seeds."""
    folder = tmp_path_factory.mktemp("coefficients")
    roots = []
    for b in (0, 5):
        for c in (0, 5):
            for seed in (0, 1):
                roots.append(folder / f"{b}-{c}-{seed}")
                words = [f"objective.b={b}", f"objective.c={c}", f"seed={seed}", "retries=1", "generations=1", "probe=false"]
                setup.run(roots[-1], *words, launcher=Debug(worker="light.run"))
    return roots


@pytest.fixture(scope="module")
def found(runs: list[Path]) -> sweeps.Sweep:
    return sweeps.sweep([analysis.open_run(root) for root in runs])


def test_what_differs_between_runs_is_found_and_seeds_are_repeats(found: sweeps.Sweep):
    assert found.settings == ("b", "c")
    best = found.models[found.models["method"] == "best"]
    assert len(best) == 8
    assert set(zip(best["b"], best["c"], best["seed"], strict=True)) == {
        (b, c, seed) for b in (0, 5) for c in (0, 5) for seed in (0, 1)
    }


def test_the_table_has_a_row_for_each_setting_and_one_for_the_base_model(found: sweeps.Sweep):
    lines = [line for line in sweeps.as_text(found).splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert sorted(row[1:5] for row in cells) == sorted(
        [["", "", "base model", "8"], *([str(b), str(c), "best", "2"] for b in (0, 5) for c in (0, 5))]
    )


def test_a_spread_is_the_median_with_its_ends():
    assert sweeps.spread(pd.Series([3.0, 1.0, 2.0]), ".1f") == "2.0 (1.0 to 3.0)"
    assert sweeps.spread(pd.Series([3.0, 3.0]), ".1f") == "3.0"


@pytest.mark.parametrize(
    ("others", "follows"), [([1, 1, 2], True), ([1, 2, 3], True), ([1, 1, 1], False), ([1, 2, 1], False), (["1", 1, 2], True)]
)
def test_a_setting_follows_from_another_one_or_does_not(others: list[Any], follows: bool):
    assert sweeps._follows(["a", "a", "b"], others) is follows


def test_equal_last_words_keep_their_whole_keys():
    assert sweeps._short(["objective.b", "strategy.b", "strategy.population", "x.quality"]) == {
        "objective.b": "objective.b",
        "strategy.b": "strategy.b",
        "strategy.population": "population",
        "x.quality": "x.quality",  # a column of ours
    }


@pytest.mark.slow
def test_the_report_of_several_runs_has_the_sweep(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from hpc_compress import cli

    monkeypatch.setattr("sys.argv", ["hpc-compress", "report", *map(str, runs), f"--out={tmp_path}"])
    cli.main()
    assert (tmp_path / "sweep.md").read_text().strip() in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "sweep.csv")
    assert len(table) == 16
    assert {"b", "c", "quality", "quality_error", "mb", "speed_up"} <= set(table)
    assert (tmp_path / "sweep.png").stat().st_size > 20_000
    assert (tmp_path / "sweep.pdf").stat().st_size > 5_000


def test_a_run_whose_best_model_is_damaged_is_left_out(runs: list[Path], tmp_path: Path):
    copies = [Path(shutil.copytree(root, tmp_path / root.name)) for root in runs[:2]]
    (copies[0] / "tasks" / str(analysis.open_run(copies[0]).best) / "outcome.json").write_text("{")
    found = sweeps.sweep(analysis.open_runs(copies))
    assert (found.models["method"] == "best").sum() == 1


@pytest.mark.slow
def test_runs_that_differ_in_one_setting_are_drawn_over_generations(setup: Setup, tmp_path: Path):
    for population in (2, 3):
        words = [f"strategy.population={population}", "generations=3", "probe=false"]
        setup.run(tmp_path / str(population), *words, launcher=Debug(worker="light.run"))
    found = sweeps.sweep([analysis.open_run(tmp_path / str(population)) for population in (2, 3)])
    assert found.settings == ("population",)
    assert found.generations.groupby("population")["generation"].apply(list).to_dict() == {2: [1, 2, 3], 3: [1, 2, 3]}
    axes = sweeps.drawn(found).axes[0]
    assert axes.get_xlabel() == "generation"
    assert "population=3" in axes.get_legend_handles_labels()[1]
