"""The table of candidates and the questions to it, against an oracle that reads the records themselves."""

import logging
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import made
import numpy as np
import pandas as pd
import pytest

import hpc_compress
from hpc_compress import analysis
from hpc_compress.analysis import compare, found
from hpc_compress.analysis.candidates import COLUMNS, added
from hpc_compress.analysis.pairs import Pairs
from hpc_compress.config import ConfigError
from hpc_compress.search.objective import Product

TARGET = {"target": {"quality": 0.9, "speed_up": 3, "megabytes": 30}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    for seed in (0, 1):
        made.run(folder / f"made-{seed}", seed=seed, **TARGET)
    return folder


@pytest.fixture(scope="module")
def table(folder: Path) -> pd.DataFrame:
    return hpc_compress.load_runs(folder / "made-0")


# --- the table ---


@pytest.mark.slow
def test_runs_are_given_as_a_path_a_folder_of_a_sweep_or_a_pattern(folder: Path, monkeypatch: pytest.MonkeyPatch):
    both = hpc_compress.load_runs(folder)
    assert both["run"].unique().tolist() == ["made-0", "made-1"]
    assert hpc_compress.load_runs(str(folder / "made-*")).equals(both)
    (folder / "made-table.csv").touch()
    assert hpc_compress.load_runs(str(folder / "made-*")).equals(both)
    with pytest.raises(ConfigError, match=r"no run in .*made-\*\.csv"):
        hpc_compress.load_runs(str(folder / "made-*.csv"))
    assert hpc_compress.load_runs([folder / "made-0", folder / "made-1"]).equals(both)
    monkeypatch.chdir(folder)
    assert hpc_compress.load_runs("made-[1]")["run"].unique().tolist() == ["made-1"]
    with pytest.raises(ConfigError, match="no run in made-7"):
        hpc_compress.load_runs("made-7*")


def test_every_column_has_its_type_whatever_is_missing(folder: Path, table: pd.DataFrame, tmp_path: Path):
    half = Path(shutil.copytree(folder / "made-0", tmp_path / "half"))
    shutil.rmtree(half / "generations")
    (half / "result.json").unlink()
    empty = Path(shutil.copytree(half, tmp_path / "empty"))
    shutil.rmtree(empty / "tasks")
    for root, rows in ((folder / "made-0", 14), (half, 1), (empty, 0)):
        found_table = hpc_compress.load_runs(root)
        assert len(found_table) == rows
        for name, (kind, _) in COLUMNS.items():
            assert found_table[name].dtype == pd.Series(dtype=kind).dtype, (root.name, name)
    assert (table["config.seed"] == 0).all()
    assert (table["config.target.megabytes"] == 30).all()
    assert table["config.objective.a"].unique().tolist() == [5.0]


def test_the_columns_are_documented():
    page = (Path(__file__).parents[1] / "docs/results.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.partition("### Columns")[2].splitlines() if line.startswith("| `")]
    assert [(name.strip("`"), kind, what) for name, kind, what in rows] == [(name, *said) for name, said in COLUMNS.items()]


def test_a_half_written_run_is_shown_and_what_is_missing_is_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    root = Path(shutil.copytree(folder / "made-0", tmp_path / "run"))
    candidate = hpc_compress.load_runs(root)["candidate"].iloc[3]
    path = root / "tasks" / candidate / "outcome.json"
    path.write_bytes(path.read_bytes()[:200])
    with caplog.at_level(logging.WARNING):
        assert candidate not in set(hpc_compress.load_runs(root)["candidate"])
    assert f"tasks/{candidate}/outcome.json is cut short" in caplog.text


def test_a_failure_has_its_reason_and_stage(table: pd.DataFrame):
    [row] = [row for _, row in table.iterrows() if row["status"] == "error"]
    assert (row["stage"], row["failure"]) == ("plain", "plain")
    assert math.isnan(row["quality"])


def test_energy_is_told_where_the_device_tells_it(folder: Path):
    energy = hpc_compress.load_runs(folder / "made-0").set_index("candidate")["device_joules"]
    assert energy.notna().sum() == 12  # the base model and the one that failed told none
    assert set(energy.dropna()) == {900.0}


@pytest.mark.slow
def test_a_csv_and_a_parquet_file_hold_the_same_table(folder: Path, tmp_path: Path):
    both = hpc_compress.load_runs(folder)
    analysis.write_report(analysis.open_runs(analysis.find_runs(folder)), tmp_path)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "candidates.parquet"), both, check_dtype=False)
    text = pd.read_csv(tmp_path / "candidates.csv")
    assert text.columns.tolist() == both.columns.tolist()
    np.testing.assert_allclose(text["quality"], both["quality"])
    assert hpc_compress.best(text)["candidate"] == hpc_compress.best(both)["candidate"]


@pytest.mark.slow
def test_tables_are_read_without_torch(folder: Path):
    script = f"import sys, hpc_compress as h; h.best(h.load_runs({str(folder)!r})); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


# --- questions ---


def test_the_front_is_that_of_the_search(folder: Path):
    both = hpc_compress.load_runs(folder)
    front = hpc_compress.front(both)
    assert set(front.index) == set(both.index[both["on_front"]])
    for root in analysis.find_runs(folder):
        own = front[front["folder"] == str(root)]
        assert own["candidate"].tolist() == found.front_of(analysis.open_run(root))


def test_fitness_is_that_of_the_objective(folder: Path, table: pd.DataFrame):
    run = analysis.open_run(folder / "made-0")
    for weights in ((5, 1, 1), (0, 1, 0), (1, 0.5, 3)):
        measured = table[table["status"] == "measured"]
        members = [run.seen[id].measurement for id in measured["candidate"]]
        expected = Product(**dict(zip("abc", weights, strict=True))).fitness(members)
        np.testing.assert_allclose(hpc_compress.fitness(measured, *weights), expected)
    assert hpc_compress.fitness(table).isna().sum() == 1  # the failed one
    with pytest.raises(ConfigError, match="b=-1"):
        hpc_compress.fitness(table, b=-1)


def test_the_best_within_the_targets_is_the_one_that_the_search_names(folder: Path, table: pd.DataFrame):
    nearest = found.nearest(analysis.open_run(folder / "made-0"))
    assert nearest.within
    chosen = hpc_compress.best(table, **TARGET["target"])
    assert chosen["candidate"] == nearest.candidate
    assert hpc_compress.best(table, speed_up=1000) is None


@pytest.mark.parametrize(
    ("by", "column", "sign"), [("quality", "quality", 1), ("speed_up", "speed_up", 1), ("megabytes", "model_bytes", -1)]
)
def test_the_best_in_one_figure_within_limits(table: pd.DataFrame, by: str, column: str, sign: int):
    chosen = hpc_compress.best(table, speed_up=2, megabytes=40, by=by)
    within = table.query("speed_up >= 2 and model_bytes <= 40_000_000")
    assert sign * chosen[column] == (sign * within[column]).max()
    with pytest.raises(ConfigError, match="by='size'"):
        hpc_compress.best(table, by="size")


def test_the_hypervolume_is_that_of_the_curve(folder: Path):
    volumes = hpc_compress.hypervolume(hpc_compress.load_runs(folder))
    for root in analysis.find_runs(folder):
        assert volumes[str(root)] == pytest.approx(compare.curve(analysis.open_run(root))["hypervolume_search"].iloc[-1])
    assert hpc_compress.compare(folder)["hypervolume_search"].tolist() == pytest.approx(volumes.tolist())


def test_a_lineage_leads_from_the_base_model_to_a_candidate(table: pd.DataFrame):
    line = hpc_compress.lineage(table, table["candidate"].iloc[4][:10])
    assert line["candidate"].tolist() == table["candidate"].iloc[:5].tolist()
    assert line["added"].tolist() == ["", "plain_0 > quantize_plain", "plain_1", "plain_2", "plain_3"]
    with pytest.raises(ConfigError, match="names 0 rows"):
        hpc_compress.lineage(table, "nobody")
    with pytest.raises(ConfigError, match="give more digits"):
        hpc_compress.lineage(table, "")


def test_what_a_child_adds_is_told_apart_from_how_it_is_deployed():
    assert added("a > b > int8", 2, "a > b > c > int8", 3) == "c"
    assert added("a > int8", 1, "a > nf4", 1) == "nf4"
    assert added("a > int8", 1, "a > b", 2) == "b > fp32"
    assert added("a > b", 2, "c > d > e", 3) == "c > d > e"


# --- pairs ---


def test_models_are_compared_pair_by_pair_where_their_answers_are_kept(folder: Path, tmp_path: Path, table: pd.DataFrame):
    root, ids = folder / "made-0", table["candidate"].tolist()
    pairs = Pairs(analysis.open_run(root))
    one = pairs.difference(ids[10], ids[0])
    assert (one.split, one.rows) == ("report", 200)
    assert one.value == pytest.approx(table["report_quality"][10] - table["report_quality"][0])
    assert str(one) == f"accuracy -0.100 ± {one.error:.3f} (paired, 200 report rows): really worse"
    assert pairs.difference(ids[4], ids[0]).verdict == "may be chance"
    # What 6 gets wrong, 7 gets wrong too. 1 and 4 know nothing of one another.
    for first, second, least, most in ((6, 7, 0.0, 0.5), (1, 4, 0.8, 1.2)):
        errors = math.hypot(*table["report_quality_error"][[first, second]])
        assert least * errors < pairs.difference(ids[first], ids[second]).error < most * errors
    without = Path(shutil.copytree(root, tmp_path / "run"))
    for path in without.glob("tasks/*/answers.npy"):
        path.write_bytes(b"\x93NUMPY no array")
    other = Pairs(analysis.open_run(without)).difference(ids[4], ids[0])
    assert other.rows is None
    assert other.error == pytest.approx(math.hypot(*table["report_quality_error"][[4, 0]]))


def test_answers_of_another_model_are_not_taken_for_its_own(folder: Path, tmp_path: Path, table: pd.DataFrame):
    root, ids = Path(shutil.copytree(folder / "made-0", tmp_path / "run")), table["candidate"].tolist()
    run = analysis.open_run(root)
    answers = root / "tasks" / run.seen[ids[4]].report_id / "answers.npy"
    shutil.copyfile(root / "tasks" / run.seen[ids[1]].report_id / "answers.npy", answers)
    assert Pairs(run).difference(ids[4], ids[0]).rows is None


# --- time ---


@pytest.mark.slow
def test_the_time_to_read_candidates_grows_with_their_number_and_no_faster(tmp_path: Path):
    """What was read once is read faster. The benchmark of the shell measures the seconds."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    import shell

    def seconds(root: Path) -> float:
        begin = time.process_time()
        assert len(hpc_compress.load_runs(root)) > int(root.name) / 2
        return time.process_time() - begin

    tiny, few, many = (tmp_path / name for name in ("500", "2500", "10000"))
    for root in (tiny, few, many):
        shell._long_run(root, int(root.name), generation_size=250)
    seconds(tiny)  # imports what it needs
    first = [seconds(root) for root in (few, many)]
    again = [seconds(root) for root in (few, many)]
    assert again[1] < first[1]
    assert max(first[1] / first[0], again[1] / again[0]) < 8, "four times as many"
