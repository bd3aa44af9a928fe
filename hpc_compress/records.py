"""The records of a run folder that one part of the program writes and others read. Knows no launcher and no loop.

run.json                    Plan, by the driver
generations/<number>.json   Generation, by the driver
result.json                 Result, by the driver
driver.json                 Heartbeat, by the driver
scores/<key>.json           ScoresFile, by the worker that needs them first
jobs/<name>/submission.json, sent.json, ends.json
                            Submission, Sent and Ends, by a launcher that submits job arrays
cancelled                   asks the driver to stop; by `hpc-compress cancel`
"""

import functools
import importlib.metadata
import importlib.util
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from hpc_compress import identity
from hpc_compress.config import RunConfig
from hpc_compress.search.space import Shape
from hpc_compress.types import Base, Count, Dataset, DeviceProfile, Record, Rows

# Settings that a resumed run may change; conf/config.yaml leaves them out of the folder names of a sweep too.
FREE = {
    "name",
    "generations",
    "budget",
    "required_quality",
    "report_candidates",
    "report_front",
    "tracking",
    "probe",
    "teacher_gb",
    "force",
}
HEARTBEAT_SECONDS = 15.0  # between two signs of life of a driver that has no news
PACKAGES = ("torch", "transformers", "datasets", "bitsandbytes", "onnxruntime", "numpy", "scipy")
CANCELLED = "cancelled"  # name of the file that asks the driver to stop

Bundle = tuple[str, ...]  # ids of tasks that one process works off, one after another
Pack = tuple[Bundle, ...]  # what one element of an array works off


# --- the search ---


class Environment(Record):
    """Where a run began: what is needed to begin it again. A record for readers: tasks don't depend on it."""

    version: str  # of hpc_compress
    commit: str | None  # of the repository that the program lies in, with a + if files were changed; None: from a package
    python: str
    system: str
    packages: dict[str, str]  # versions of those that computed figures

    @classmethod
    @functools.cache
    def here(cls) -> "Environment":
        found = {name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)}
        return cls(
            version=importlib.metadata.version("hpc_compress"),
            commit=_commit(),
            python=platform.python_version(),
            system=platform.platform(),
            packages=found,
        )


def _commit() -> str | None:
    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else the repository is another's
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


class Plan(Record):
    """What a run searches, in full. A resumed run must agree with it."""

    config: RunConfig
    strategy: dict[str, Any]
    objective: dict[str, Any]
    base: Base
    dataset: Dataset
    shape: Shape
    rows: Rows | None = None  # None in runs of earlier versions
    environment: Environment | None = None  # the same
    devices: tuple[DeviceProfile, ...] = ()  # as they stood in the files of config.device, which a resumed run does not ask

    def differences(self, config: RunConfig, strategy: Mapping[str, Any], objective: Mapping[str, Any]) -> list[str]:
        """Settings that a resumed run may not change, where they changed. A run may be prolonged and reported anew."""
        old = {
            **self.config.model_dump(mode="json", exclude=FREE),
            "strategy": self.strategy,
            "objective": self.objective,
        }
        new = {**config.model_dump(mode="json", exclude=FREE), "strategy": dict(strategy), "objective": dict(objective)}
        if self.base.preparation:  # it is taken from run.json, and its operators are imported
            old["preparation"] = [step.model_dump(mode="json") for step in self.base.preparation]
            new["preparation"] = [step.model_dump(mode="json") for step in config.model.preparation]
        return _differences(old, new)


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        old, new = ({identity.FIRST_NAMES.get(key, key): value for key, value in side.items()} for side in (old, new))
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
    return [] if identity.canonical(old) == identity.canonical(new) else [f"{path}: was {old}, now {new}"]


class Generation(Record):
    """Who was born and who survived, by candidate id. Genomes stand in the tasks."""

    number: int
    born_ids: tuple[str, ...]  # tasks of this generation's proposals: a candidate's own, or one that screens it
    parents: tuple[str | None, ...]  # in the order of `born_ids`
    told: tuple[str, ...]  # candidates judged now: late arrivals of earlier generations included, unfinished ones excluded
    timed: tuple[str, ...] = ()  # tasks that timed a survivor again, and that this selection is the first to use
    population: tuple[str, ...]  # survivors, fittest first

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, values: Any) -> Any:
        """They kept whole proposals."""
        if not isinstance(values, dict) or not isinstance(values.get("born"), list):
            return values
        parents = [proposal.get("parent") if isinstance(proposal, dict) else None for proposal in values["born"]]
        return {**{key: value for key, value in values.items() if key != "born"}, "parents": parents}

    @model_validator(mode="after")
    def _consistent(self) -> "Generation":
        if len(self.parents) != len(self.born_ids) or not self.population:
            raise ValueError("each of born_ids needs a parent, and population can't be empty")
        return self


class DeviceFront(Record):
    """The models that no other one beats on one device."""

    device: str  # as it calls itself
    predicted: bool  # its times were predicted from its file; false: they were measured
    candidates: tuple[str, ...]  # ids, the best quality first


class Result(Record):
    """The end of a search."""

    best: str  # candidate id
    base: str
    reported: tuple[str, ...]  # candidate ids measured on the report split: the fittest first, then others that were wanted
    timed: tuple[str, ...] = ()  # tasks that timed the fittest candidates again after the last generation
    front: tuple[str, ...] = ()  # candidate ids that no other one beats in every objective; none in runs of earlier versions
    # One for each device whose file was given. The first of them is `front`.
    fronts: tuple[DeviceFront, ...] = Field(default=(), exclude_if=lambda fronts: not fronts)
    generations: int
    stopped: str  # why


# --- the driver ---


class Heartbeat(Record):
    """What the driver is doing. The time of writing is its last sign of life."""

    host: str
    pid: int
    started: int | None = None  # of this process, in clock ticks after the machine's start
    job_id: str | None  # of the job that the driver lives in; 17_3 or 17[3] for an element of an array
    job_name: str | None
    scheduler: str | None = Field(default=None, exclude_if=lambda name: name is None)  # of this job; None: the first known
    doing: str = "starting"
    done: int = 0  # tasks of it that are settled
    total: int = 0
    jobs: Mapping[str, int] = Field(default={})  # by state
    ended: bool = False  # the driver has let go of the run; its process may live on

    def same_driver(self, other: "Heartbeat") -> bool:
        return (self.host, self.pid, self.started) == (other.host, other.pid, other.started)


# --- its jobs ---


class Submission(Record):
    """One array, as it was meant to be submitted."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")  # of the job: unique
    packs: tuple[Pack, ...]  # by array index
    mem_mb: int | None
    exclude: tuple[str, ...] = ()  # nodes
    scheduler: str | None = Field(default=None, exclude_if=lambda name: name is None)  # None: the first known


class Sent(Record):
    """What the scheduler calls an array."""

    job_id: str = Field(pattern=r"^[0-9]{1,18}(\[\])?$")


class End(Record):
    """How an element ended."""

    state: str
    exit_code: str = ""
    node: str = ""
    seconds: Count = 0  # summed over all requeues

    def __str__(self) -> str:
        return f"{self.state}" + (f" {self.exit_code}" if self.exit_code else "") + (f" on {self.node}" if self.node else "")


class Ends(Record):
    """How the elements of an array ended, as far as they have."""

    ends: dict[int, End] = Field(default={})  # by array index
    gpus: Count = 0  # of each element


Finite = Annotated[float, Field(allow_inf_nan=False)]


class ScoresFile(Record):
    """What each unit of a model is worth, by kind of unit and layer."""

    scores: dict[str, tuple[tuple[Finite, ...], ...]]

    @staticmethod
    def of(arrays: Mapping[str, Sequence[np.ndarray]]) -> "ScoresFile":
        """arrays: one of float64 for each layer, all finite; they come back to the last bit."""
        return ScoresFile(scores={unit: tuple(tuple(layer.tolist()) for layer in layers) for unit, layers in arrays.items()})

    def arrays(self) -> dict[str, list[np.ndarray]]:
        return {unit: [np.array(layer, dtype=float) for layer in layers] for unit, layers in self.scores.items()}
