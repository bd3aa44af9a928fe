"""Shows a search in MLflow or ClearML: its settings, a point for each generation, and the report at its end.

It reads the run folder, as every reader does. The search knows nothing of it, and goes on when it fails.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from hpc_compress import analysis, door
from hpc_compress.config import ConfigError
from hpc_compress.store import write_atomically

Kind = Literal["mlflow", "clearml"]
PROJECT = "hpc_compress"
RECORD = "tracking.json"  # of the run folder: which run of the tracker it is, and how many generations it has been told of
PARAMS = 100  # that MLflow takes at a time

log = logging.getLogger("hpc_compress")


class Board(Protocol):
    """A run of a tracker."""

    key: str  # by which it is found again

    def settings(self, values: Mapping[str, str]) -> None: ...

    def point(self, values: Mapping[str, float], step: int) -> None: ...

    def files(self, paths: Sequence[Path]) -> None: ...

    def close(self) -> None: ...


class Tracking:
    """Tells a board what is new in a run folder, each time that it is asked to look."""

    def __init__(self, kind: Kind, root: Path, board: Callable[[str, str | None], Board] | None = None) -> None:
        """board: opens a run by its name and its key, if it has one; None: that of `kind`."""
        self.kind, self.root = kind, root
        self._open = board or BOARDS[kind]
        self._board: Board | None = None
        self._told = -1  # number of generations that the board knows of
        self._broken = False

    def look(self) -> None:
        """After an event of the search."""
        ended = len(list((self.root / "generations").glob("[0-9]*.json")))
        if ended > self._told and (self.root / "run.json").is_file():
            self._safely(self._tell)

    def close(self, files: Sequence[Path]) -> None:
        """At the end of a search: the last generations, and the files of its report."""

        def last() -> None:
            self._tell()
            if self._board is not None:
                self._board.files(files)
                self._board.close()

        self._safely(last)

    def _tell(self) -> None:
        run = analysis.open_run(self.root)
        if run.base is None:
            return
        if self._board is None:
            record = self._record()
            key = record.get(self.kind)
            self._board = self._open(self.root.name, str(key) if key is not None else None)
            self._told = int(record.get("generations", -1)) if key is not None else -1
            if key is None:
                self._board.settings({name: str(value) for name, value in analysis.settings_of(run).items()})
        told = self._told
        for point in analysis.points(run):
            if point["generation"] > self._told:
                numbers = {name: float(value) for name, value in point.items() if name != "generation" and math.isfinite(value)}
                self._board.point(numbers, int(point["generation"]))
                told = int(point["generation"])
        if told > self._told:
            self._told = told
            write_atomically(self.root / RECORD, json.dumps({self.kind: self._board.key, "generations": told}))

    def _record(self) -> dict[str, Any]:
        try:
            return door.json_object(self.root / RECORD)
        except (FileNotFoundError, door.DamageError):
            return {}

    def _safely(self, do: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            do()
        except Exception as error:  # of a server, a network or a library: none of them may end a search
            self._broken = True
            log.warning(f"{self.kind} is told no more of this run: {door.one_line(str(error))}")


def require(kind: Kind) -> None:
    """Raises: ConfigError when the tracker is not installed."""
    import importlib.util

    if importlib.util.find_spec(kind) is None:
        extra = "tracking" if kind == "mlflow" else "clearml"
        raise ConfigError(f"tracking={kind}, and the package {kind} is not installed; pip install 'hpc-compress[{extra}]'")


class MlflowBoard:
    """A run in MLflow: on the server that MLFLOW_TRACKING_URI names, or in results/mlflow.db."""

    def __init__(self, name: str, key: str | None) -> None:
        import mlflow

        self._mlflow = mlflow
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            folder = Path("results").absolute()
            folder.mkdir(parents=True, exist_ok=True)
            mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
            # Artifacts lie beside the database.
            if mlflow.get_experiment_by_name(PROJECT) is None:
                mlflow.create_experiment(PROJECT, artifact_location=(folder / "mlflow").as_uri())
        mlflow.set_experiment(PROJECT)
        self._client = mlflow.MlflowClient()
        run = self._client.get_run(key) if key else self._client.create_run(_experiment(mlflow), run_name=name)
        self.key = run.info.run_id

    def settings(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        params = [Param(name, value[:500]) for name, value in values.items()]
        for begin in range(0, len(params), PARAMS):
            self._client.log_batch(self.key, params=params[begin : begin + PARAMS])

    def point(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self.key, name, value, step=step)

    def files(self, paths: Sequence[Path]) -> None:
        for path in paths:
            self._client.log_artifact(self.key, str(path))

    def close(self) -> None:
        self._client.set_terminated(self.key)


def _experiment(mlflow: Any) -> str:
    return str(mlflow.get_experiment_by_name(PROJECT).experiment_id)


class ClearmlBoard:
    """A task in ClearML, on the server that its configuration names (`clearml-init`)."""

    def __init__(self, name: str, key: str | None) -> None:
        from clearml import Task

        more = {"continue_last_task": key} if key else {"reuse_last_task_id": False}
        self._task = Task.init(PROJECT, name, auto_connect_frameworks=False, auto_connect_arg_parser=False, **more)
        self.key = str(self._task.id)

    def settings(self, values: Mapping[str, str]) -> None:
        self._task.set_parameters(dict(values))

    def point(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._task.get_logger().report_scalar(name, name, value, step)

    def files(self, paths: Sequence[Path]) -> None:
        for path in paths:
            self._task.upload_artifact(path.name, path, wait_on_upload=True)

    def close(self) -> None:
        self._task.close()


BOARDS: dict[Kind, Callable[[str, str | None], Board]] = {"mlflow": MlflowBoard, "clearml": ClearmlBoard}
