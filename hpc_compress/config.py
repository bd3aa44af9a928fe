"""What a user may set, as validated frozen dataclasses. Plain data in; unknown keys and values out of range are refused."""

import difflib
import functools
import importlib
import importlib.util
import inspect
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from hpc_compress.types import MeasurementProtocol, Params, Record, Step

B = TypeVar("B", bound=BaseModel)
Objective = Literal["quality", "latency", "bytes", "peak_bytes"]
NAME_BYTES = 255  # of a part of a path, on every common filesystem
MOST_CLASSES = 1000  # more labels than that are numbers to predict


class ConfigError(ValueError):
    """A value that a user can mend; the message says what came, what is allowed and what to do."""


class ModelConfig(Record):
    """Which checkpoint to compress, and how its task head is trained when it has none."""

    path: str = Field(min_length=1, description="hub name, local folder, or package:NAME/FOLDER of an installed package")
    revision: str | None = Field(default=None, description="commit, tag or branch on the hub")
    head: Literal["auto", "trained", "new"] = Field(
        default="auto",
        description="trained: use the checkpoint's head; new: fine-tune first, with a new head if the checkpoint's does not "
        "fit; auto: trained if it fits",
    )
    fine_tune: Params = Field(default={}, description="parameters of the step `fine_tune` that trains a new head")
    pooling: Literal["auto", "mean", "cls", "pooler"] = Field(
        default="auto",
        description="how a sentence encoder makes one vector of its tokens; auto: as its folder of sentence-transformers says, "
        "else mean",
    )
    normalize: bool | None = Field(
        default=None, description="whether an exported sentence encoder gives vectors of length 1; null: as its folder says"
    )

    @property
    def preparation(self) -> tuple[Step, ...]:
        """How a new head is trained."""
        return (Step(operator="fine_tune", params=self.fine_tune),)


class SuiteTask(Record):
    """One task on frozen embeddings, read from csv, tsv or parquet files."""

    kind: Literal["sts", "pairs", "retrieval", "classification"] = Field(
        description="sts: Spearman's correlation of cosine and label; pairs: average precision of those that belong together; "
        "retrieval: how often the nearest text is the other one of the pair, both ways; classification: accuracy of a "
        "logistic regression"
    )
    report: str = Field(min_length=1, description="file of the report split; without `train` one half is the search split")
    train: str | None = Field(
        default=None, description="file of the search split's rows, and of those that a classification is fit to"
    )
    text: str = Field(default="text", description="column of the text")
    text2: str | None = Field(default=None, description="column of the second text; of all kinds but classification")
    label: str | None = Field(default=None, description="column of the label; of all kinds but retrieval")
    fit_text: str | None = Field(
        default=None,
        description="classification: column of the text of the rows that it is fit to, in another language perhaps",
    )
    positive: str | int = Field(default="1", description="pairs: the label of those that belong together")
    rows: int = Field(default=1000, ge=2, description="rows of each split, at most")
    fit_rows: int = Field(default=2000, ge=2, description="classification: rows that it is fit to, at most")

    @model_validator(mode="after")
    def _complete(self) -> "SuiteTask":
        single = self.kind == "classification"
        for name, wanted in (("text2", not single), ("label", self.kind != "retrieval")):
            if (getattr(self, name) is not None) != wanted:
                raise ValueError(
                    f"kind={self.kind} {'needs' if wanted else 'has no'} {name}; {'set it' if wanted else 'leave it out'}"
                )
        if single and self.train is None:
            raise ValueError("kind=classification needs train, the file of the rows that it is fit to")
        return self


class Suite(Record):
    """Tasks whose mean score is the quality of a sentence encoder."""

    folder: str = Field(default=".", min_length=1, description="where the files of the tasks are")
    tasks: dict[str, SuiteTask] = Field(min_length=1)


class DatasetConfig(Record):
    """Where rows come from and which columns matter."""

    name: str = Field(min_length=1, description="name of the dataset in reports")
    path: str | None = Field(default=None, description="dataset on the hub or a folder that `datasets` can load")
    subset: str | None = Field(default=None, description="configuration of the dataset on the hub, such as `cola` of GLUE")
    train: str = Field(default="train", description="split of `path`; without `path` a csv, tsv or parquet file")
    validation: str | None = Field(default=None, description="official validation split or file, kept for the report")
    text: str = Field(default="text", description="column of the text")
    text2: str | None = Field(default=None, description="column of the second text of a pair")
    label: str = Field(default="label", description="column of the label")
    problem: str = Field(
        default="classification",
        description="what is predicted: classification, regression or token_classification; or nothing: embedding",
    )
    parallel: str | None = Field(
        default=None,
        description="embedding: a file of lines; line n is the second text of line n of `train`, a file of lines too",
    )
    suite: Suite | None = Field(
        default=None, description="embedding: tasks that quality is measured by; null: retrieval of the pairs that are held out"
    )
    losses: dict[str, float] = Field(default={}, description="embedding: weights of losses, and a temperature")
    metrics: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="the first one is the quality of the search; null: the one that fits the labels"
    )
    positive: str | None = Field(
        default=None, description="the class of the metric f1; null: class 1, or a class with a name such as duplicate"
    )
    where: str | None = Field(default=None, description="keep the rows for which this pandas query holds")
    encoding: str = Field(default="utf-8", description="of a csv or tsv file")
    max_length: int = Field(
        default=128, ge=4, description="tokens; longer examples are cut, or read in several windows where tokens have labels"
    )
    search_on: Literal["held_out", "validation"] = Field(
        default="held_out",
        description="score candidates on rows held out of train, or, as published, on the official validation split",
    )
    search_rows: float = Field(
        default=0.1, gt=0, description="rows held out of train: a number, or a share below 1 of the rows that can be held out"
    )
    report_rows: float = Field(default=0.1, gt=0, description="the same for a report split, when there is no validation")
    max_train_rows: int | None = Field(default=None, ge=1, description="use a random part of train")
    max_search_rows: int | None = Field(default=None, ge=1, description="use a random part of the search split")

    @field_validator("text", "text2", "label", mode="before")
    @classmethod
    def _name(cls, column: Any) -> Any:
        """Columns without names have numbers, which the command line does not quote."""
        return str(column) if type(column) is int else column

    @model_validator(mode="after")
    def _consistent(self) -> "DatasetConfig":
        if self.search_on == "validation" and self.validation is None:
            raise ValueError("search_on=validation needs a validation split or file; set dataset.validation")
        return self


class Target(Record):
    """What the model that is wanted must keep to; null: no limit."""

    quality: float | None = Field(default=None, gt=0, description="share of the base model's quality, at least: 0.99")
    speed_up: float | None = Field(default=None, gt=0, description="over the base model, at least: 3")
    megabytes: float | None = Field(default=None, gt=0, description="of the saved model, at most: 20")

    @property
    def wanted(self) -> bool:
        return any(value is not None for value in (self.quality, self.speed_up, self.megabytes))


class Budget(Record):
    """What a search may cost, besides its number of generations."""

    device_hours: float | None = Field(
        default=None,
        gt=0,
        description="time of jobs, summed over all of them; the search stops after the generation that passes it",
    )


class RunConfig(Record):
    """One search, as far as it is plain data. Strategy, objective and launcher are objects built beside it."""

    name: str = Field(min_length=1, description="the run folder is results/NAME")
    seed: int = Field(default=0, ge=0, description="every random choice follows from it")
    generations: int = Field(default=11, ge=0, lt=10**9, description="the largest number of generations")
    select_after: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of a generation that must be finished before selection; below 1, late candidates join the next",
    )
    timings: int = Field(
        default=3,
        ge=1,
        description="a survivor is timed again in each generation until it has this many timings; the median counts",
    )
    required_quality: float | None = Field(
        default=None, description="stop once a candidate smaller than the base model reaches this quality on the search split"
    )
    objectives: tuple[Objective, ...] = Field(
        default=("quality", "latency", "bytes"),
        min_length=1,
        description="what a model of the front must be better in than others",
    )
    target: Target = Target()
    budget: Budget = Budget()
    device: tuple[str, ...] = Field(
        default=(), description="files that hpc-compress profile wrote, of the devices that the model will run on"
    )
    report_candidates: int = Field(default=3, ge=1, description="fittest candidates measured on the report split")
    tracking: Literal["mlflow", "clearml"] | None = Field(default=None, description="where people can also follow the search")
    report_front: bool = Field(
        default=False, description="measure the whole front on the report split too; its models then keep their files"
    )
    force: bool = Field(default=False, description="go on with a base model that is no better than a constant answer")
    probe: bool = Field(default=True, description="try every kind of step on a few sentences before the first generation")
    teacher_gb: float = Field(
        default=8.0,
        ge=0,
        description="limit for the teacher's stored outputs; if they need more, each training computes them again",
    )
    model: ModelConfig
    dataset: DatasetConfig
    protocol: MeasurementProtocol = MeasurementProtocol()

    @field_validator("device", mode="before")
    @classmethod
    def _several(cls, paths: Any) -> Any:
        """In a config, one path or null will do."""
        return () if paths is None else (paths,) if isinstance(paths, str) else paths


def check_name(name: str) -> None:
    """Refuse a run's name that leads out of results/, or that a filesystem or Slurm would not take as it is.

    Raises: ConfigError.
    """
    parts = name.split("/")
    try:
        longest = max(len(part.encode()) for part in parts)
    except UnicodeEncodeError:
        raise ConfigError(f"name={name!r} is not valid UTF-8; choose another name=") from None
    wrong = ""
    if {"", ".", ".."} & set(parts):
        wrong = "is no path below results/"
    elif not name.isprintable():
        wrong = "has control characters"
    elif "%" in name:
        wrong = "has a %, which Slurm reads as a pattern"
    elif longest > NAME_BYTES:
        wrong = f"has a part of {longest} bytes, and {NAME_BYTES} are allowed"
    if wrong:
        raise ConfigError(f"name={shortened(name)!r} {wrong}; the run folder is results/NAME, so choose a name such as my_run")


def shortened(value: Any, most: int = 200) -> str:
    """A value that a message can quote."""
    text = str(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def validate(kind: type[B], values: Mapping[str, Any], where: str = "") -> B:
    """Build `kind` from plain data.

    Raises: ConfigError, one line a mistake: where it is, what came, what is allowed.
    """
    try:
        found = kind.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(kind, where, item) for item in error.errors())) from None
    _require_finite(found, where)
    return found


def _require_finite(value: Any, where: str) -> None:
    """Raises: ConfigError for a number that is NaN or infinite, wherever it stands."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} must be a finite number; got {value}")
    inner: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, (BaseModel, Mapping)):
        inner = value if isinstance(value, BaseModel) else value.items()
    elif isinstance(value, (list, tuple)):
        inner = enumerate(value)
    for key, item in inner:
        _require_finite(item, f"{where}.{key}".lstrip("."))


def _explain(kind: type[BaseModel], where: str, item: Any) -> str:
    path = [str(part) for part in item["loc"]]
    key = ".".join([*filter(None, [where]), *path])
    if item["type"] == "extra_forbidden":
        allowed = _fields_at(kind, path[:-1])
        close = difflib.get_close_matches(path[-1], allowed, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"{key} is not a known key; allowed here: {', '.join(allowed)}{hint}"
    if item["type"] == "missing":
        return f"{key} is missing; set {key}=..."
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    # A rule about several settings names them itself.
    got = path and not (item["type"] == "value_error" and isinstance(item["input"], dict))
    return f"{key or kind.__name__}: {message}" + (f"; got {shortened(repr(item['input']))}" if got else "")


def _fields_at(kind: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        inner = kind.model_fields[part].annotation if part in kind.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        kind = inner
    return sorted(kind.model_fields)


def locate(path: str) -> Any:
    """The object at a dotted path.

    Raises: ConfigError when the module or the name in it is not there.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a user's own module does when it is imported
        raise ConfigError(
            f"{path!r} can't be imported ({error}); give package.module.Name and make sure that it is installed "
            "or on PYTHONPATH, on the nodes too"
        ) from None


def resource(path: str) -> Path:
    """A local path; `package:NAME/PATH` lies in an installed package.

    Raises: ConfigError when the package is not installed.
    """
    if not path.startswith("package:"):
        return Path(path).expanduser()
    package, _, inner = path.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # of a name that no package can have
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"{path}: package {package!r} is not installed; the demo's come with pip install 'hpc-compress[demo]'"
        )
    return Path(spec.submodule_search_locations[0]) / inner


def build(values: Mapping[str, Any], where: str) -> Any:
    """The object that a config node with `_target_` describes.

    Raises: ConfigError when it can't be imported or refuses its parameters.
    """
    params = {key: value for key, value in values.items() if key != "_target_"}
    if "_target_" not in values:
        raise ConfigError(f"{where} has no _target_; choose one of conf/{where}/ or give the dotted path of a class")
    target = locate(str(values["_target_"]))
    if isinstance(target, type) and issubclass(target, BaseModel):
        return validate(target, params, where)
    _require_finite(params, where)
    if inspect.isfunction(target):
        return functools.partial(target, **params)
    try:
        built = target(**params)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise ConfigError(f"{where}: {values['_target_']} refused {params}: {error}") from None
    # A class may make a number of a text such as `nan`. A text that stays one, as in norm=inf, is no number.
    _require_finite({key: value for key, value in getattr(built, "__dict__", {}).items() if key in params}, where)
    return built
