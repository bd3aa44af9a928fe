"""The frozen types that every room speaks. Knows no torch, no disk and no Slurm; checks what it is built from."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    field_validator,
    model_serializer,
    model_validator,
)


class Record(BaseModel):
    """A frozen value that refuses unknown fields; its JSON form is what identities are computed from."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


Split = Literal["search", "report"]
Fingerprint = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16,64}$")]
Count = Annotated[int, Field(ge=0, lt=2**63)]


def _says_no_code(params: Any) -> Any:
    if isinstance(params, dict):
        for key, value in params.items():
            if str(key).startswith("_") and str(key).endswith("_"):
                raise ValueError(
                    f"the key {str(key)[:100]!r} is not allowed here: a name that begins and ends with an underscore, such as "
                    "_target_, says what code to run; name your own code as the operator"
                )
            _says_no_code(value)
    elif isinstance(params, (list, tuple)):
        for value in params:
            _says_no_code(value)
    return params


Params = Annotated[dict[str, Any], AfterValidator(_says_no_code)]  # of an operator: data, and never what code to run


VOCABULARY_STEPS = ("trim_vocabulary", "share_embeddings")  # operators that make the word embedding smaller


class Step(Record):
    """An operator with its parameters: a short name of ours (`drop_layers`) or a dotted path (`my.module.MyOperator`)."""

    operator: str = Field(min_length=1)
    params: Params = {}
    # Above 0: the same step with other random numbers, and so are those of all later steps. Left out of the JSON when 0.
    replicate: int = Field(default=0, ge=0, exclude_if=lambda number: number == 0)

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
    text = "_".join([name, *(str(step.params[key]) for key in ("count", "share", "scheme") if key in step.params)])
    return f"{text}#{step.replicate}" if step.replicate else text


class Structure(Record):
    """What is left of the base model's encoder; enough to cut it from there in one go, whatever the history."""

    heads: tuple[Annotated[int, Field(ge=0)], ...]  # kept in each layer that is left; 0: no attention there
    ffn: tuple[Annotated[int, Field(ge=0)], ...]  # neurons kept in each layer that is left; 0: no FFN there
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None  # that are left, counted from 0; None: all
    hidden: int | None = Field(default=None, ge=1)  # dimensions of the residual stream; None: all

    @model_validator(mode="after")
    def _consistent(self) -> "Structure":
        depth = len(self.heads) if self.layers is None else len(self.layers)
        if not len(self.heads) == len(self.ffn) == depth or depth == 0:
            raise ValueError(
                f"heads has {len(self.heads)} numbers and ffn {len(self.ffn)}; each needs one for each of the {depth} layers "
                "that are left"
            )
        if self.layers is not None and list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers={list(self.layers)} must rise and name no layer twice")
        return self


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
    problem: str = Field(pattern=r"^[a-z_]{1,64}$")  # its kind, a name of `problems.PROBLEMS`
    labels: tuple[str, ...]  # class names in the order of their ids; empty for regression
    pair: bool = False  # two texts an example
    metrics: tuple[str, ...] = Field(min_length=1)  # the first one is the quality that the search sees
    positive: str | None = None  # the class that f1 is of; None: no f1 (the second class in runs of earlier versions)
    max_length: int = Field(default=128, ge=4)  # tokens; longer examples are cut
    losses: dict[str, float] = {}  # of a problem that is composed of several: their weights

    @model_serializer(mode="wrap")
    def _without_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What has no effect is absent: the identity of a dataset without f1 is the one it had before there was `positive`.
        none: dict[str, Any] = {"positive": None, "losses": {}}
        return {name: value for name, value in serialize(self).items() if name not in none or value != none[name]}


class Overlap(Record):
    """Rows of one split that another split has too, by their words alone."""

    split: Split
    of: Literal["train", "search"]
    rows: Count  # of `split`
    equal: Count  # the same text, or pair of texts, is in the other split
    inside: Count = 0  # single texts: not equal to a text of the other split, but part of one
    shared: Count | None = None  # pairs: one of the two texts stands in a pair of the other split; None: no pairs

    def __str__(self) -> str:
        more = f"{self.inside} more lie inside one" if self.shared is None else f"{self.shared} more share a text with one"
        return f"of {self.rows} {self.split} rows, {self.equal} are equal to a {self.of} row and {more}"


class Rows(Record):
    """What became of a dataset's rows. A record for readers: tasks don't depend on it."""

    empty: dict[str, Count]  # by split as read: rows left out since they have no text or no label
    unused: Count  # rows of train in no split: their text occurs only inside held-out texts
    overlaps: tuple[Overlap, ...]
    trivial: dict[Split, dict[str, float]]  # what the best constant answer scores on each metric

    @model_validator(mode="after")
    def _complete(self) -> "Rows":
        if missing := {found.split for found in self.overlaps} - self.trivial.keys():
            raise ValueError(f"trivial has no scores for the {min(missing)} split")
        return self

    def lines(self) -> list[str]:
        """For a log, a report and a model card."""
        lines = [f"{count} rows of {split} without a text or a label are left out" for split, count in self.empty.items()]
        if self.unused:
            lines.append(f"{self.unused} rows of train are in no split, since their texts occur only inside held-out texts")
        return [*lines, *map(str, self.overlaps)]


class MeasurementProtocol(Record):
    """How a deployed model is measured. Measurements of different protocols are never compared."""

    device: Literal["any", "cpu", "cuda"] = Field(
        default="any", description="device on which candidates are measured; any: the job's GPU, or its CPU if it has no GPU"
    )
    batch_size: int = Field(default=32, ge=1, description="sentences a batch, padded to the longest of them")
    base_precision: Literal["fp32", "fp16", "bf16", "best"] = Field(
        default="fp32",
        exclude_if=lambda precision: precision == "fp32",
        description="the base model is timed in this precision too, besides fp32; best: bf16 if the GPU has it, else fp16",
    )
    sentences: int = Field(default=512, ge=1, description="latency is one pass over this fixed sample")
    warmup_passes: int = Field(default=2, ge=0, description="passes before the first one that counts")
    min_passes: int = Field(default=5, ge=2, description="timed passes at the least")
    max_passes: int = Field(default=50, ge=2, description="timed passes at the most")
    tolerance: float = Field(
        default=0.01,
        gt=0,
        lt=1,
        description="stop when half the 95 % confidence interval of the ratio to the base model's time is this small",
    )
    max_seconds: float = Field(default=30.0, gt=0, description="longest time for timing a model and the base model beside it")

    @model_validator(mode="after")
    def _ordered(self) -> "MeasurementProtocol":
        if self.min_passes > self.max_passes:
            raise ValueError(f"min_passes={self.min_passes} is more than max_passes={self.max_passes}")
        return self


# --- what can be asked about a genome besides a full measurement ---


class Survey(Record):
    """Ask what is known of every structure before any is cut. The genome is empty."""

    kind: Literal["survey"] = "survey"
    criterion: str = "gauss_newton"
    sentences: int = Field(default=512, ge=1)  # of train, from the start, that the criterion sees
    deploys: tuple[tuple[Step, ...], ...] = ()  # chains of deploying steps whose bytes are wanted


class Screen(Record):
    """Ask how far the outputs of a genome's untrained model are from the base model's, on sentences that no repair has seen."""

    kind: Literal["screen"] = "screen"
    judge: int = Field(default=256, ge=1)  # sentences of train that the divergence is a mean over
    sample: int = Field(default=0, ge=0)  # which sentences those are: a number for each sample
    # Precisions: chains of deploying steps, each to be judged on top of the same model.
    deploys: tuple[tuple[Step, ...], ...] = Field(default=(), exclude_if=lambda chains: not chains)

    @model_validator(mode="after")
    def _same_tokens(self) -> "Screen":
        if wrong := [step.operator for chain in self.deploys for step in chain if step.operator in VOCABULARY_STEPS]:
            raise ValueError(f"a screen can't judge {wrong[0]}, which changes the word embedding; leave it out of deploys")
        return self


def outside(fit: int, rows: int) -> range:
    """Which of `rows` training sentences a structure may be judged on whose repair is fit to the first `fit`: the others. At
    least a fifth is never fit to."""
    return range(min(fit, rows * 4 // 5), rows)


class Profiling(Record):
    """Ask what the blocks of the base model take on the job's device. The genome is empty."""

    kind: Literal["profile"] = "profile"
    deploys: tuple[tuple[Step, ...], ...] = ()  # precisions
    seconds: float = Field(default=90.0, gt=0)  # that the profile may take, about


Study = Annotated[Survey | Screen | Profiling, Field(discriminator="kind")]


class Task(Record):
    """One unit of work, in full: everything that the outcome depends on, and nothing else."""

    base: Base
    dataset: Dataset
    protocol: MeasurementProtocol
    seed: int
    genome: Genome = Genome()
    split: Split = "search"
    limit: int | None = Field(default=None, ge=1)  # examples of each split; only the probe has one
    # Above 0: the same model is timed again. Left out of the JSON when 0.
    repeat: int = Field(default=0, ge=0, exclude_if=lambda number: number == 0)
    # What is asked; None: a full measurement. Left out of the JSON then.
    study: Study | None = Field(default=None, exclude_if=lambda study: study is None)


Milliseconds = Annotated[float, Field(ge=1e-6, le=1e12)]  # from a nanosecond to 30 years, so that ratios are finite


class Timing(Record):
    """Milliseconds of passes over the protocol's sample, in one job. The models take turns; n-th numbers are of one turn."""

    latency_ms: tuple[Milliseconds, ...] = Field(min_length=1)  # of the deployed model
    base_latency_ms: tuple[Milliseconds, ...] = Field(min_length=1)  # of the base model in fp32
    # Of the base model in the protocol's base_precision, if that is not fp32.
    base_best_latency_ms: tuple[Milliseconds, ...] | None = None

    @model_validator(mode="after")
    def _in_turns(self) -> "Timing":
        turns = [
            len(times) for times in (self.latency_ms, self.base_latency_ms, self.base_best_latency_ms) if times is not None
        ]
        if len(set(turns)) > 1:
            raise ValueError(f"models that take turns have equally many passes; these have {turns}")
        return self


class Measurement(Timing):
    """Raw figures of one deployed model on one device. Summaries and fitness are recomputed from them."""

    metrics: dict[str, float] = Field(min_length=1)  # on the task's split
    # Of the metrics, over examples. Empty in outcomes of earlier versions, and then left out of the JSON.
    standard_errors: dict[str, float] = Field(default={}, exclude_if=lambda errors: not errors)
    again: tuple[Timing, ...] = ()  # of the same model in other jobs on the same kind of device
    of_base: bool = False  # the deployed model is the base model, timed against itself
    base_best_precision: Literal["fp16", "bf16"] | None = None  # of base_best_latency_ms
    model_bytes: Count = Field(ge=1)  # of the saved deployed weights
    parameters: Count = Field(ge=1)
    encoder_parameters: Count  # without embeddings, pooler and head
    peak_bytes: Count | None = None  # allocator peak during one pass; None where the device has no allocator to ask
    # Part of a pass until the CPU has sent all work to the GPU; None on a CPU.
    enqueue_share: float | None = Field(default=None, ge=0, le=1)
    device: str  # as the device calls itself
    device_type: Literal["cpu", "cuda"]
    protocol: MeasurementProtocol
    # What is left of the encoder; None in outcomes of earlier versions.
    structure: Structure | None = Field(default=None, exclude_if=lambda structure: structure is None)
    # The times were predicted from the device's file. What a task measures is never predicted.
    predicted: bool = Field(default=False, exclude_if=lambda predicted: not predicted)

    @property
    def timings(self) -> tuple[Timing, ...]:
        return (self, *self.again)


Score = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ByteCounts(Record):
    """Bytes of the saved deployed model as a linear function of the structure."""

    deploy: tuple[Step, ...]
    fixed: float  # with no layer's heads and neurons
    per_head: float
    per_neuron: float


class Surveyed(Record):
    """The answer to a `Survey`."""

    kind: Literal["survey"] = "survey"
    heads: tuple[tuple[Score, ...], ...]  # score of each attention head, layer by layer
    ffn: tuple[tuple[Score, ...], ...]  # of each FFN neuron
    parameters: tuple[Count, Count]  # of one head and of one neuron
    encoder_parameters: Count
    train_rows: Count
    bytes: tuple[ByteCounts, ...]  # for each chain of the survey
    sample: tuple[tuple[Count, Count], ...]  # rows and padded length of each batch of the protocol's timing sample


class Deployed(Record):
    """A screened model in one precision."""

    deploy: tuple[Step, ...]
    divergence: Score | None  # None: it can't be made, or its outputs are not finite


class Screening(Record):
    """The answer to a `Screen`."""

    kind: Literal["screen"] = "screen"
    divergence: Score  # mean over the judged sentences of the response loss to the base model's outputs, at temperature 1
    structure: Structure  # of the model
    deployed: tuple[Deployed, ...] = Field(default=(), exclude_if=lambda found: not found)  # in the order of the screen


BlockMs = Annotated[float, Field(ge=0, le=1e12)]


class BlockProfile(Record):
    """Milliseconds of one batch in one precision, by its rows and its padded length. More units are never cheaper."""

    deploy: tuple[Step, ...]  # the steps that have an effect on time
    rows: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)  # rising
    lengths: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)  # rising
    heads: tuple[Count, ...] = Field(min_length=2)  # rising, from 0
    widths: tuple[Count, ...] = Field(min_length=2)  # rising, from 0
    fixed_ms: tuple[tuple[BlockMs, ...], ...]  # (rows, lengths) embeddings, pooler and head
    layer_ms: tuple[tuple[BlockMs, ...], ...]  # (rows, lengths) a layer with neither attention nor FFN
    attention_ms: tuple[tuple[tuple[BlockMs, ...], ...], ...]  # (rows, lengths, heads) what so many heads add to a layer
    ffn_ms: tuple[tuple[tuple[BlockMs, ...], ...], ...]  # (rows, lengths, widths) what so many neurons add to a layer

    @model_validator(mode="after")
    def _consistent(self) -> "BlockProfile":
        for name in ("rows", "lengths", "heads", "widths"):
            axis = getattr(self, name)
            if list(axis) != sorted(set(axis)) or (name in ("heads", "widths") and axis[0] != 0):
                raise ValueError(f"{name}={list(axis)} must rise" + (" from 0" if name in ("heads", "widths") else ""))
        for name, last in (("fixed_ms", None), ("layer_ms", None), ("attention_ms", self.heads), ("ffn_ms", self.widths)):
            table = getattr(self, name)
            cells = [cell for row in table for cell in row]
            whole = len(table) == len(self.rows) and all(len(row) == len(self.lengths) for row in table)
            if not whole or (last is not None and any(len(cell) != len(last) for cell in cells)):
                raise ValueError(f"{name} needs a number for each of its rows, lengths and units")
        return self


class DeviceProfile(Record):
    """The answer to a `Profiling`: a device's file. It holds for every model of the same kind of layers."""

    kind: Literal["profile"] = "profile"
    device: str  # as the device calls itself
    device_type: Literal["cpu", "cuda"]
    model_type: str
    hidden: Count
    head_size: Count
    blocks: tuple[BlockProfile, ...] = Field(min_length=1)


Finding = Annotated[Surveyed | Screening | DeviceProfile, Field(discriminator="kind")]


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
    finding: Finding | None = Field(default=None, exclude_if=lambda finding: finding is None)  # the answer to the task's study
    host: str = ""
    seconds: dict[str, float] = {}  # wall-clock of each stage
    # Of the GPU, meanwhile, for all its processes; None where nothing tells it. Left out of the JSON then.
    joules: float | None = Field(default=None, ge=0, allow_inf_nan=False, exclude_if=lambda joules: joules is None)

    @model_validator(mode="after")
    def _one_of_them(self) -> "Outcome":
        if sum(part is not None for part in (self.measurement, self.finding, self.failure)) != 1:
            raise ValueError("an outcome holds either a measurement, or the finding of a study, or a failure")
        if self.failure is None and (self.task.study and self.task.study.kind) != (self.finding and self.finding.kind):
            raise ValueError("an outcome's finding must answer its task's study")
        return self


class Candidate(Record):
    """A genome and what became of it."""

    id: str  # of the task that measures it on the search split
    genome: Genome
    parent: str | None = None  # candidate id; crossover's other parent is always the base model
    measurement: Measurement | None = None  # None: failed, or only screened
    screening: Screening | None = Field(default=None, exclude_if=lambda found: found is None)  # the latest one


class Proposal(Record):
    """A genome that a strategy wants to know better, and where it came from."""

    genome: Genome
    parent: str | None = None
    screen: Screen | None = None  # None: measure it in full


OnProgress = Callable[[str, int, int], None]  # is told what is being done, units done, units in all


class SearchError(RuntimeError):
    """The run can't go on; the message says why and what to do."""


class SpentError(RuntimeError):
    """A worker's process can do no more work. Its last task has an outcome; the others are for another process."""
