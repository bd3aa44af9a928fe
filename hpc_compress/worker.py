"""The one function that runs on a node: from task ids to outcomes. Knows the store, the models and the device; no Slurm."""

import dataclasses
import logging
import os
import platform
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from hpc_compress import door, identity, measure, profiling, studies
from hpc_compress.config import RunConfig
from hpc_compress.context import Checkpoint, Context
from hpc_compress.data.batches import Encoded
from hpc_compress.deployment import quantization
from hpc_compress.models import artifact
from hpc_compress.operators import operator
from hpc_compress.problems import problem_of
from hpc_compress.problems.outputs import Teacher
from hpc_compress.records import ScoresFile
from hpc_compress.store import Store
from hpc_compress.training import teaching
from hpc_compress.types import (
    Failure,
    Finding,
    Genome,
    Measurement,
    OnProgress,
    Outcome,
    Screen,
    SpentError,
    Step,
    Study,
    Survey,
    Task,
)

log = logging.getLogger(__name__)
# How CUDA says that an operator gave a kernel what it can't work on, such as an index that is out of bounds.
ASSERTION = "device-side assert triggered"
# How CUDA, its libraries and torch on a CPU say that there is no memory, each by another error than `OutOfMemoryError`.
NO_MEMORY = re.compile(r"CUDA error: out of memory|_STATUS_(ALLOC_FAILED|INSUFFICIENT_RESOURCES)|DefaultCPUAllocator")
SAME_QUALITY = 5e-5  # two figures that are nearer to each other are the same in four digits
T = TypeVar("T")


def run(
    root: str,
    task_ids: Sequence[str],
    report: OnProgress | None = None,
    interrupts: tuple[type[Exception], ...] = (),
    checkpoint_seconds: float = 300.0,
) -> Iterator[str]:
    """Bring every task to an outcome; yields the id of each as soon as it has one. A task that has one is left alone.

    What is wrong with a task becomes its outcome. `interrupts`, and what is wrong with the machine, is raised: the task may
    do well elsewhere.

    Raises: SpentError after the outcome of a task that left the GPU unusable for this process.

    checkpoint_seconds: wall-clock time of training that a task may lose when it is interrupted and run again.
    """
    store = Store(root)
    job = Job(store, report or (lambda what, done, total: None), interrupts, checkpoint_seconds)
    for task_id in task_ids:
        job.settle(store.task(task_id))
        yield task_id


def restore(root: Path, task: Task) -> None:
    """Compute the artifacts of a task again after they were deleted. Warns where the model is not as good as it was measured:
    a training on a GPU is never quite the same twice. Works without a GPU too, more slowly.
    """
    job = Job(Store(root), lambda what, done, total: None)
    folder = job.deployed(task)
    job.tokenizer(task)
    outcome = job.store.outcome(identity.task_id(task))
    if outcome is None or outcome.measurement is None:
        return
    on = measure.device("cpu" if task.protocol.device == "cpu" else "any")
    if on.type != outcome.measurement.device_type:
        log.warning(
            "%s was measured on a GPU, and torch sees none here: its model is computed and measured on a CPU", task.genome
        )
    found, recorded = job.quality(task, artifact.load(folder, on), folder, on).metrics, outcome.measurement.metrics
    for name, value in recorded.items():
        if abs(found[name] - value) >= SAME_QUALITY:
            log.warning(
                "the model of %s was computed again, and has %s %.4f now; the search measured %.4f",
                door.one_line(str(task.genome)),
                door.one_line(name),
                found[name],
                value,
            )


class Job:
    """One process on one device. Keeps the data and the base model from task to task."""

    def __init__(
        self,
        store: Store,
        report: OnProgress,
        interrupts: tuple[type[Exception], ...] = (),
        checkpoint_seconds: float = 300.0,
    ) -> None:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        measure.keep_freed_memory()
        self.store, self.report, self.interrupts = store, report, interrupts
        self.checkpoint_seconds = checkpoint_seconds
        self.device = measure.device()
        self.spent = False  # whether the device does nothing more for this process
        self._kept: dict[tuple[Any, ...], Any] = {}
        self._last: dict[str, tuple[tuple[Any, ...], Any]] = {}

    def settle(self, task: Task) -> None:
        """Leave an outcome, whatever happens short of the process dying."""
        # A cluster can run a task twice at once: the second one waits here and then finds the outcome. The lock is the
        # master's, since tasks that differ in precision only share the training.
        with self.store.lock(identity.master_key(task)):
            if self.store.outcome(identity.task_id(task)) is None:
                outcome = self.store.settle(self._attempt(task))
                if self.spent:
                    message = outcome.failure.message if outcome.failure else ""
                    raise SpentError(f"{task.genome} left the GPU of {platform.node()} unusable for this process: {message}")

    def _attempt(self, task: Task) -> Outcome:
        stages, before = Stages(), measure.joules(self.device)
        measurement, finding, failure = None, None, None
        try:
            if task.study is None:
                measurement = self._measure(task, stages)
            else:
                with stages(task.study.kind):
                    finding = self._find(task, task.study)
        except self.interrupts:
            raise
        except Exception as error:
            if _is_of_the_machine(error):
                raise
            failure = _failure(error, stages.current)
        if failure and self.device.type == "cuda":
            # Not in the handler: there the error still holds the model.
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:  # after some errors, whatever a process asks of its device fails in the same way
                self.spent = True
        return Outcome(
            task=task,
            measurement=measurement,
            finding=finding,
            failure=failure,
            host=platform.node(),
            seconds=stages.rounded(),
            joules=None if before is None or (after := measure.joules(self.device)) is None else max(0.0, after - before),
        )

    def _find(self, task: Task, study: Study) -> Finding:
        """The answer to a study."""
        context = self._context(task, (Step(operator=study.kind),), Step(operator=study.kind))
        on = measure.device(task.protocol.device)
        if isinstance(study, Survey):
            sample = measure.timing_sample(self._examples(task, task.split), task.protocol, self.device)
            return studies.survey(study, self._base_model(task), context, sample)
        if isinstance(study, Screen):

            def made() -> PreTrainedModel:
                return artifact.load(self._master(task, task.genome.steps), self.device)

            def excused(error: Exception) -> bool:
                return not (isinstance(error, self.interrupts) or _is_of_the_machine(error))

            return studies.screen(study, task.genome.steps, self._base_model(task), context, on, made, excused)
        return profiling.profile(study, self._base_model(task, on), task.protocol, context)

    def _measure(self, task: Task, stages: "Stages") -> Measurement:
        on = measure.device(task.protocol.device)
        with stages("train"):
            self._master(task, task.genome.steps)
        with stages("deploy"):
            folder = self.deployed(task)
            base_model = self._base_model(task, on)
            base_models, precision = [base_model], measure.base_precision(task.protocol, on)
            if precision is not None:
                base_models.append(self._base_model_in(task, on, precision))
            before = measure.allocated_bytes(on)
            model = artifact.load(folder, on)
            own_bytes = measure.allocated_bytes(on) - before
        with stages("quality"):
            quality = self.quality(task, model, folder, on)
            if task.limit is None:
                self.store.write_answers(identity.task_id(task), quality.answers)
        with stages("time"):
            # The same sentences, each model with its own tokenizer's pieces of them: that is what either one would run on.
            base_sample = measure.timing_sample(self._examples(task, task.split), task.protocol, on)
            sample = measure.timing_sample(self._examples(task, task.split, folder), task.protocol, on)
            turns = [*((each, base_sample) for each in base_models), (model, sample)]
            base_latency_ms, *best_latency_ms, latency_ms = measure.latencies_ms(turns, task.protocol, on)
        parameters, encoder_parameters = artifact.parameters(model)
        return Measurement(
            metrics=quality.metrics,
            standard_errors=quality.standard_errors,
            latency_ms=latency_ms,
            base_latency_ms=base_latency_ms,
            base_best_latency_ms=best_latency_ms[0] if best_latency_ms else None,
            base_best_precision=precision,
            of_base=task.genome == Genome(),
            model_bytes=artifact.weights(folder).stat().st_size,
            parameters=parameters,
            encoder_parameters=encoder_parameters,
            peak_bytes=measure.peak_bytes(model, sample, on, own_bytes),
            enqueue_share=measure.enqueue_share(model, sample, on),
            device=measure.device_name(on),
            device_type=on.type,  # type: ignore[arg-type]
            protocol=task.protocol,
            structure=artifact.structure(folder, base_model),
        )

    def quality(self, task: Task, model: PreTrainedModel, folder: Path, on: torch.device) -> "Quality":
        """Of the deployed model in `folder`, on the task's split."""
        examples = self._examples(task, task.split, folder)
        kind = problem_of(task.dataset)
        outputs = measure.outputs(kind, model, examples, task.protocol.batch_size, on)
        rows = self._rows(task, task.split)
        answers = kind.answers(task.dataset, rows, outputs)
        return Quality(
            metrics=kind.score(task.dataset, rows, outputs),
            standard_errors=kind.standard_errors(task.dataset, rows, answers),
            answers=answers,
        )

    # --- artifacts ---

    def _master(self, task: Task, steps: tuple[Step, ...]) -> Path:
        """The stored fp32 model after `steps`, computed from the longest stored prefix when it is not there."""
        key = identity.master_key(task, steps)
        if found := self.store.artifact(key):
            return found
        model, done = self._start(task, steps)
        chain = steps or task.base.preparation
        checkpoints = [self._checkpoint(task, steps, number) for number in range(1, len(chain) + 1)]
        saved = time.monotonic()
        for number, step in enumerate(chain[done:], done + 1):
            context = self._context(task, steps[:number], step, checkpoints[number - 1])
            model = operator(step)(model.to(self.device), context)
            if number < len(steps) and time.monotonic() - saved >= self.checkpoint_seconds:
                self._save_prefix(model, identity.master_key(task, steps[:number]))
                saved = time.monotonic()
        with self.store.new_artifact(key) as folder:
            artifact.save(model, folder)
        for checkpoint in checkpoints:
            checkpoint.path.unlink(missing_ok=True)
        return self.store.path(key)

    def _checkpoint(self, task: Task, steps: tuple[Step, ...], number: int) -> Checkpoint:
        """Of the training in step `number`, counted from 1; without steps, of the base model's preparation."""
        key = identity.master_key(task, steps[:number])
        # All of the preparation leads to one key, so its steps are told apart by their number.
        key = key if steps else identity.content_hash("preparation", key, number)
        return Checkpoint(self.store.checkpoint(key), self.checkpoint_seconds)

    def _save_prefix(self, model: PreTrainedModel, key: str) -> None:
        """Store the model between two steps, for `_start` to find when the task is interrupted."""
        try:
            with self.store.new_artifact(key) as folder:
                artifact.save(model, folder)
        except (OSError, ValueError) as error:
            log.warning("the task goes on without storing its model so far: %s", error)

    def _start(self, task: Task, steps: tuple[Step, ...]) -> tuple[PreTrainedModel, int]:
        """The model to go on from, and how many of the steps it has behind it."""
        if not steps:
            seed = identity.derive(task.seed, "head")
            new_head = bool(task.base.preparation)
            kind = problem_of(task.dataset)
            return kind.load_base(self.store.root / "base", task.dataset.labels, new_head, seed), 0
        for done in range(len(steps) - 1, 0, -1):
            if found := self.store.artifact(identity.master_key(task, steps[:done])):
                return artifact.load(found), done
        return artifact.load(self._master(task, ())), 0

    def deployed(self, task: Task) -> Path:
        """The saved deployed model. What is measured is what was loaded from here, so it is what is exported too."""
        key = identity.deployed_key(task)
        if found := self.store.artifact(key):
            return found
        model = artifact.load(self._master(task, task.genome.steps))
        with self.store.new_artifact(key) as folder:
            for number, step in enumerate(task.genome.deploy, 1):
                if artifact.is_program(model):
                    raise ValueError(
                        f"{step.operator} can't act on an ONNX program; let quantize with onnx_int8 be the last step"
                    )
                context = self._context(task, (*task.genome.steps, *task.genome.deploy[:number]), step)
                # A step that calibrates must see the pieces that the model before it knows.
                train = self._examples(task, "train", folder)
                model = operator(step)(model, dataclasses.replace(context, folder=folder, train=train))
            artifact.save(model, folder)
        return self.store.path(key)

    # --- what tasks of one job share ---

    def _context(self, task: Task, prefix: tuple[Step, ...], step: Step, checkpoint: Checkpoint | None = None) -> Context:
        return Context(
            train=self._examples(task, "train"),
            problem=problem_of(task.dataset),
            device=self.device,
            # The prefix makes the seed, not the place in a job: a master that is computed again is the same.
            seed=identity.derive(task.seed, "step", prefix),
            teacher=lambda: self._base_model(task),
            taught=lambda: self._taught(task),
            tokenizer=lambda: self.tokenizer(task),
            block_times=lambda: self._block_times(task),
            given=identity.master_key(task, prefix[:-1]),
            kept=self._keep_last,
            scores=self._scores,
            progress=lambda done, total: self.report(step.operator, done, total),
            checkpoint=checkpoint,
        )

    def _base_model(self, task: Task, on: torch.device | None = None) -> PreTrainedModel:
        key, place = identity.master_key(task, ()), on or self.device
        return self._keep(("base model", key, str(place)), lambda: artifact.load(self._master(task, ()), place))

    def _base_model_in(self, task: Task, on: torch.device, precision: str) -> PreTrainedModel:
        """The base model in 16 bits, to be timed only."""

        def make() -> PreTrainedModel:
            model = artifact.load(self._master(task, ()))
            quantization.cast(model, precision)
            return model.to(on)

        return self._keep(("base model", identity.master_key(task, ()), str(on), precision), make)

    def _taught(self, task: Task) -> Teacher | None:
        """The base model's stored outputs for the training examples: computed once a run, by whoever needs them first.

        None where it would take too much of the disk; the teacher is then asked in every training.
        """

        kind = problem_of(task.dataset)

        def find() -> teaching.TeacherOutputs | None:
            key, examples, teacher = identity.master_key(task, ()), self._examples(task, "train"), self._base_model(task)
            if teaching.outputs_bytes(kind, teacher, examples) > 1e9 * self._teacher_gb():
                return None
            with self.store.lock(f"teacher-{key}"):
                if (found := teaching.read(self.store.teacher(key), examples)) is not None:
                    return found
                try:
                    with self.store.new_teacher(key) as folder:
                        teaching.write(folder, kind, teacher, examples, self.device)
                except OSError as error:
                    log.warning("distillation goes on without storing the teacher's outputs: %s", error)
                    return None
            return teaching.read(self.store.teacher(key), examples)

        outputs = self._keep(("teacher outputs", identity.master_key(task, ())), find)
        return None if outputs is None else outputs.answer

    def _teacher_gb(self) -> float:
        """A setting of the run and not of the task: what is computed hardly depends on it."""
        try:
            plan = door.json_object(self.store.root / "run.json")
        except FileNotFoundError:
            return RunConfig.model_fields["teacher_gb"].default
        return RunConfig.model_validate(plan.get("config")).teacher_gb

    def _block_times(self, task: Task) -> measure.BlockTimes:
        """Measured once, by whoever needs them first, and the same for all others: a cut by time can be repeated."""
        key = identity.content_hash(identity.master_key(task, ()), task.protocol)
        name = f"block_times/{key}.json"
        with self.store.lock(f"block_times_{key}"):
            times = self.store.read(name, measure.BlockTimes)
            if times is None:
                on = measure.device(task.protocol.device)
                model, sample = self._base_model(task, on), self._examples(task, "train")
                batches = measure.timing_sample(sample, task.protocol, on)
                times = measure.block_times(model, batches, task.protocol, on)
                self.store.write(name, times)
        return times

    def _scores(self, key: tuple[Any, ...], compute: Callable[[], dict[str, list[np.ndarray]]]) -> dict[str, list[np.ndarray]]:
        """Computed once, by whoever needs them first: every task that cuts the base model starts from them."""

        def find() -> dict[str, list[np.ndarray]]:
            name = f"scores/{identity.content_hash(key)}.json"
            with self.store.lock(name.replace("/", "_")):
                stored = self.store.read(name, ScoresFile)
                if stored is None:
                    stored = ScoresFile.of(compute())
                    self.store.write(name, stored)
            return stored.arrays()

        return self._keep_last("scores", key, find)

    def _examples(self, task: Task, split: str, folder: Path | None = None) -> Encoded:
        """A split as the base model's tokenizer sees it, or as that of a deployed model in `folder` if it has one."""
        own = sorted(folder.glob("tokenizer*")) if folder is not None else []
        vocabulary = identity.files_hash(own) if own else "base"  # most candidates with a trimmed one share it
        kind = problem_of(task.dataset)

        def read() -> Encoded:
            base = ("tokenizer",), lambda: self.tokenizer(task)
            tokenizer = kind.tokenizer(own[0].parent) if own else self._keep(*base)
            return kind.encode(tokenizer, self._rows(task, split), task.dataset)

        return self._keep(("examples", task.dataset.fingerprint, split, str(task.limit), vocabulary), read)

    def _rows(self, task: Task, split: str) -> pd.DataFrame:
        def read() -> pd.DataFrame:
            return pd.read_parquet(self.store.root / "data" / f"{split}.parquet")[: task.limit]

        return self._keep(("rows", task.dataset.fingerprint, split, str(task.limit)), read)

    def tokenizer(self, task: Task) -> Any:
        """The base model's; saved in full as an artifact of its own, since an export can't ask the checkpoint's type."""
        tokenizer = problem_of(task.dataset).tokenizer(self.store.root / "base")
        if not self.store.artifact("tokenizer"):
            with self.store.new_artifact("tokenizer") as folder:
                tokenizer.save_pretrained(folder)
        return tokenizer

    def _keep(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def _keep_last(self, name: str, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """As `_keep`, for what is too large to keep more than one of each name."""
        if self._last.get(name, (None, None))[0] != key:
            self._last.pop(name, None)  # before the next one is made
            self._last[name] = key, make()
        return self._last[name][1]


@dataclasses.dataclass(frozen=True)
class Quality:
    """How well a model answers the examples of a split."""

    metrics: dict[str, float]
    standard_errors: dict[str, float]
    answers: np.ndarray  # (examples,) as `Problem.answers`


class Stages:
    """Wall-clock seconds of each stage of a task, and which one is current."""

    def __init__(self) -> None:
        self.current = "start"
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self.current = stage
        begin = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = time.monotonic() - begin

    def rounded(self) -> dict[str, float]:
        return {stage: round(seconds, 3) for stage, seconds in self.seconds.items()}


def _is_of_the_machine(error: Exception) -> bool:
    """A full disk, a stale mount, a GPU that has fallen over: after some errors a CUDA device does nothing more."""
    text = str(error)
    if _is_of_memory(error) or ASSERTION in text:
        return False
    if isinstance(error, OSError) and error.errno in artifact.DISK_ERRORS:
        return True
    # Some libraries, such as tokenizers, say in words what the system told them in numbers.
    return any(os.strerror(number) in text for number in artifact.DISK_ERRORS) or "CUDA error" in text


def _is_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or NO_MEMORY.search(str(error)) is not None


def _failure(error: Exception, stage: str) -> Failure:
    return Failure(
        kind="memory" if _is_of_memory(error) else "error",
        stage=stage,
        message=f"{type(error).__name__}: {error}",
        traceback=traceback.format_exc(limit=-20),
    )
