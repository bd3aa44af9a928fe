"""What MLflow and ClearML are told of a search."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from searches import Setup

from hpc_compress import analysis, tracking
from hpc_compress.config import ConfigError
from hpc_compress.launch.local import Debug


class Notes:
    """A board that keeps what it is told."""

    def __init__(self, name: str, key: str | None) -> None:
        self.name, self.found = name, key
        self.key = key or "new"
        self.told: list[tuple[str, Any]] = []

    def settings(self, values: Mapping[str, str]) -> None:
        self.told.append(("settings", dict(values)))

    def point(self, values: Mapping[str, float], step: int) -> None:
        self.told.append(("point", (step, dict(values))))

    def files(self, paths: Sequence[Path]) -> None:
        self.told.append(("files", [path.name for path in paths]))

    def close(self) -> None:
        self.told.append(("close", None))


class Boards:
    """Opens boards and remembers them."""

    def __init__(self) -> None:
        self.opened: list[Notes] = []

    def __call__(self, name: str, key: str | None) -> Notes:
        self.opened.append(Notes(name, key))
        return self.opened[-1]


class Looking:
    """A progress that looks after every line, as the console does."""

    def __init__(self, watch: tracking.Tracking) -> None:
        self.watch = watch

    def say(self, text: str) -> None:
        self.watch.look()

    def working(self, what: str, done: int, total: int) -> None:
        pass


def search(setup: Setup, root: Path, watch: tracking.Tracking, generations: int = 2) -> None:
    words = ["probe=false", f"generations={generations}"]
    setup.run(root, *words, launcher=Debug(worker="light.run"), progress=Looking(watch))


def test_a_board_gets_the_settings_and_a_point_for_each_generation(setup: Setup, tmp_path: Path):
    boards = Boards()
    watch = tracking.Tracking("mlflow", tmp_path / "run", boards)
    search(setup, tmp_path / "run", watch)
    watch.close([tmp_path / "run/report.html"])
    [board] = boards.opened
    assert (board.name, board.found) == ("run", None)
    kinds = [kind for kind, _ in board.told]
    assert kinds == ["settings", "point", "point", "point", "files", "close"]
    assert board.told[0][1]["strategy.population"] == "4"
    steps = [value[0] for kind, value in board.told if kind == "point"]
    assert steps == [0, 1, 2]
    expected = analysis.points(analysis.open_run(tmp_path / "run"))
    assert [value[1]["hypervolume"] for kind, value in board.told if kind == "point"] == [
        point["hypervolume"] for point in expected
    ]
    assert {"quality", "speed_up", "megabytes", "device_hours", "models"} <= board.told[1][1][1].keys()


@pytest.mark.slow
def test_a_resumed_search_goes_on_with_its_run_and_repeats_nothing(setup: Setup, tmp_path: Path):
    boards = Boards()
    for generations in (1, 3):
        search(setup, tmp_path / "run", tracking.Tracking("mlflow", tmp_path / "run", boards), generations)
    first, second = boards.opened
    assert (first.found, second.found) == (None, "new")
    assert "settings" not in dict(second.told)
    steps = [value[0] for board in boards.opened for kind, value in board.told if kind == "point"]
    assert steps == [0, 1, 2, 3]


def test_a_broken_board_ends_no_search(setup: Setup, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def broken(name: str, key: str | None) -> tracking.Board:
        raise ConnectionError("the server\nis away")

    watch = tracking.Tracking("clearml", tmp_path / "run", broken)
    search(setup, tmp_path / "run", watch)
    watch.close([])
    assert analysis.open_run(tmp_path / "run").result is not None
    assert caplog.text.count("clearml is told no more of this run: the server is away") == 1


@pytest.mark.slow
def test_tracking_is_no_part_of_a_run(setup: Setup, tmp_path: Path):
    """A run that was begun without it goes on with it, and its tasks are the same."""
    search(setup, tmp_path / "run", tracking.Tracking("mlflow", tmp_path / "run", Boards()), 1)
    before = sorted(path.name for path in (tmp_path / "run/tasks").iterdir())
    setup.run(tmp_path / "run", "probe=false", "generations=1", "tracking=mlflow", launcher=Debug(worker="light.run"))
    assert sorted(path.name for path in (tmp_path / "run/tasks").iterdir()) == before


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'hpc-compress\[tracking\]'"):
        tracking.require("mlflow")
    with pytest.raises(ConfigError, match=r"pip install 'hpc-compress\[clearml\]'"):
        tracking.require("clearml")


@pytest.mark.slow
def test_mlflow_holds_what_it_was_told(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra `tracking` is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for generations in (1, 2):
        watch = tracking.Tracking("mlflow", tmp_path / "run", tracking.MlflowBoard)
        search(setup, tmp_path / "run", watch, generations)
        (tmp_path / "page.html").write_text("a page")
        watch.close([tmp_path / "page.html"])
    assert not watch._broken
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/results/mlflow.db")
    [experiment] = [each for each in client.search_experiments() if each.name == tracking.PROJECT]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["strategy.population"] == "4"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "hypervolume")] == [0, 1, 2]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["page.html"]
