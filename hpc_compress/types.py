"""The frozen types that every room speaks. Knows no torch, no disk and no Slurm; checks what it is built from."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator


class Record(BaseModel):
    """A frozen value that refuses unknown fields; its JSON form is what identities are computed from."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


Split = Literal["search", "report"]
Problem = Literal["classification", "regression"]
Fingerprint = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16,64}$")]


class Step(Record):
    """An operator with its parameters: a short name of ours (`drop_layers`) or a dotted path (`my.module.MyOperator`)."""

    operator: str = Field(min_length=1)
    params: dict[str, Any] = {}

    @field_validator("params")
    @classmethod
    def _on_a_grid(cls, params: dict[str, Any]) -> dict[str, Any]:
        # One model, one genome: 6 significant digits, so that 3e-5 and 0.1 * 3e-4 are the same learning rate.
        return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in sorted(params.items())}


class Genome(Record):
    """The ordered steps that lead from the base model to this one. The empty genome is the base model itself."""

    steps: tuple[Step, ...] = ()  # what is done to the master, in order
    deploy: tuple[Step, ...] = ()  # what turns the master into the deployed model, in order; empty: fp32, as it is

    def __str__(self) -> str:
        return " > ".join(map(_short, (*self.steps, *self.deploy))) or "base"


def _short(step: Step) -> str:
    name = step.operator.rsplit(".", 1)[-1]
    return "_".join([name, *(str(step.params[key]) for key in ("count", "share", "scheme") if key in step.params)])


class Base(Record):
    """The base model: what every genome starts from, and the teacher of every distillation."""

    name: str  # as the user wrote it
    revision: str | None = None  # commit on the hub; None for a local folder
    fingerprint: Fingerprint  # of config, weights and tokenizer
    preparation: tuple[Step, ...] = ()  # how a missing task head is trained first; empty when the model brings one


class Dataset(Record):
    """A dataset as the tasks see it; its rows lie in the run folder, one file a split."""

    name: str
    fingerprint: Fingerprint  # of the rows of all splits
    problem: Problem
    labels: tuple[str, ...]  # class names in the order of their ids; empty for regression
    pair: bool = False  # two texts an example
    metrics: tuple[str, ...] = Field(min_length=1)  # the first one is the quality that the search sees
    max_length: int = Field(default=128, ge=4)  # tokens; longer examples are cut


class Protocol(Record):
    """How a deployed model is measured. Measurements of different protocols are never compared."""

    device: Literal["any", "cpu", "cuda"] = Field(
        default="any", description="what candidates are measured on; any: the job's GPU, or the CPU of a job without one"
    )
    batch_size: int = Field(default=32, ge=1, description="sentences a batch, padded to the longest of them")
    sentences: int = Field(default=512, ge=1, description="latency is one pass over this fixed sample")
    warmup_passes: int = Field(default=2, ge=0, description="passes before the first one that counts")
    min_passes: int = Field(default=5, ge=2, description="timed passes at the least")
    max_passes: int = Field(default=50, ge=2, description="timed passes at the most")
    tolerance: float = Field(default=0.01, gt=0, lt=1, description="stop when the median is known this well")
    max_seconds: float = Field(default=30.0, gt=0, description="stop timing a model and the base model after so long")

    @model_validator(mode="after")
    def _ordered(self) -> "Protocol":
        if self.min_passes > self.max_passes:
            raise ValueError(f"min_passes={self.min_passes} is more than max_passes={self.max_passes}")
        return self


class Task(Record):
    """One unit of work, in full: everything that the outcome depends on, and nothing else."""

    base: Base
    dataset: Dataset
    protocol: Protocol
    seed: int
    genome: Genome = Genome()
    split: Split = "search"
    limit: int | None = Field(default=None, ge=1)  # examples of each split; only the probe has one


class Measurement(Record):
    """Raw figures of one deployed model on one device. Summaries and fitness are recomputed from them."""

    metrics: dict[str, float]  # on the task's split
    latency_ms: tuple[float, ...] = Field(min_length=1)  # one value a pass over the protocol's sample
    base_latency_ms: tuple[float, ...] = Field(min_length=1)  # the base model, taking turns with this one
    model_bytes: int = Field(ge=1)  # of the saved deployed weights
    parameters: int = Field(ge=1)
    encoder_parameters: int = Field(ge=0)  # without embeddings, pooler and head
    peak_bytes: int | None = None  # allocator peak during one pass; None where the device has no allocator to ask
    device: str  # as the device calls itself
    device_type: Literal["cpu", "cuda"]
    protocol: Protocol


class Failure(Record):
    """Why a task has no measurement."""

    kind: Literal["error", "memory", "lost"]  # raised on the node; out of memory; the job died without an outcome
    stage: str  # what was being done
    message: str
    traceback: str = ""


class Outcome(Record):
    """What became of a task: a measurement or a failure. Carries its task, so that it can't be taken for another's."""

    task: Task
    measurement: Measurement | None = None
    failure: Failure | None = None
    host: str = ""
    seconds: dict[str, float] = {}  # wall-clock of each stage

    @model_validator(mode="after")
    def _one_of_two(self) -> "Outcome":
        if (self.measurement is None) == (self.failure is None):
            raise ValueError("an outcome holds either a measurement or a failure")
        return self


class Candidate(Record):
    """A genome and what became of it."""

    id: str  # of its search task
    genome: Genome
    parent: str | None = None  # candidate id; crossover's other parent is always the base model
    measurement: Measurement | None = None  # None: failed


class Proposal(Record):
    """A genome that a strategy wants to see measured, and where it came from."""

    genome: Genome
    parent: str | None = None
