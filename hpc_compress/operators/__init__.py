"""Operators: what can be done to a model. Their parameters are checked without torch; torch is imported when they act.

An operator is a frozen object with `__call__(model, context) -> model`. One that acts on the master takes and returns a
stock classifier with fp32 weights; one that deploys is given a copy of its own and may change precision. A user's own
operator is named in the config by its dotted path.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field, field_validator

from hpc_compress.config import ConfigError, build, locate
from hpc_compress.types import Record, Step

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from hpc_compress.data.batches import Encoded


@dataclass(frozen=True)
class Checkpoint:
    """Where a long training keeps its state, so that a later process goes on with it. Whoever gives it deletes the file."""

    path: Path  # one file, of one training alone; need not exist, nor its folder
    seconds: float  # wall-clock time between two savings


@dataclass(frozen=True)
class Context:
    """What an operator may use besides the model."""

    train: "Encoded"
    device: "torch.device"
    seed: int  # of this step: all randomness of the operator follows from it
    teacher: "Callable[[], PreTrainedModel]"  # the base model, in eval mode on `device`; loaded when first asked for
    progress: Callable[[int, int], None] | None = None  # told (updates done, updates in all)
    checkpoint: Checkpoint | None = None  # for a long training; a user's own operator may hand it to `training.fit` too


class Operator(Protocol):
    def __call__(self, model: "PreTrainedModel", context: Context) -> "PreTrainedModel": ...


class DropLayers(Record):
    """Remove the last encoder layers (K1 of the published method): a model that loses its first ones is harder to retrain."""

    count: int = Field(default=1, ge=1)

    def __call__(self, model: "PreTrainedModel", context: Context) -> "PreTrainedModel":
        from hpc_compress.models import surgery

        total = len(surgery.layers(model))
        if self.count >= total:
            raise ValueError(f"count={self.count} would leave no layer of {total}")
        surgery.drop_layers(model, range(total - self.count, total))
        return model


class PruneHeads(Record):
    """Remove the least important attention heads of the last layer (K2 of the published method)."""

    count: int = Field(default=1, ge=1)
    criterion: str = Field(default="fisher", description="fisher, taylor, magnitude, or the dotted path of a function")
    sentences: int = Field(default=256, ge=1, description="training sentences that the criterion sees")

    @field_validator("criterion")
    @classmethod
    def _known(cls, criterion: str) -> str:
        if criterion not in ("fisher", "taylor", "magnitude") and "." not in criterion:
            raise ValueError(f"{criterion!r} is not a criterion; choose fisher, taylor or magnitude, or give a dotted path")
        return criterion

    def __call__(self, model: "PreTrainedModel", context: Context) -> "PreTrainedModel":
        from hpc_compress.data.batches import eval_batches
        from hpc_compress.models import surgery
        from hpc_compress.operators import criteria

        score = criteria.CRITERIA.get(self.criterion) or locate(self.criterion)
        batches = (batch.to(context.device) for batch in eval_batches(context.train.take(self.sentences), 32))
        last = len(surgery.layers(model)) - 1
        scores = score(model, batches)[last]
        if self.count >= len(scores):
            raise ValueError(f"count={self.count} would leave no head of {len(scores)} in the last layer")
        surgery.prune_heads(model, last, scores.argsort()[: self.count].tolist())
        return model


class Training(Record):
    """How a model is trained: AdamW, linear warm-up, then linear decay to 0."""

    epochs: float = Field(default=1.0, gt=0, description="passes over the examples; 0.5 stops in the middle of the first")
    learning_rate: float = Field(default=5e-5, gt=0, description="at the end of the warm-up")
    batch_size: int = Field(default=32, ge=1, description="examples in one update")
    warmup: float = Field(default=0.06, ge=0, lt=1, description="share of the updates in which the learning rate rises")
    weight_decay: float = Field(default=0.01, ge=0, description="decoupled, on matrices only: not on biases and norms")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients with a larger 2-norm are scaled down to it")


class FineTune(Training):
    """Train on the task's own loss: cross-entropy, or squared error for regression."""

    def __call__(self, model: "PreTrainedModel", context: Context) -> "PreTrainedModel":
        from hpc_compress.operators import losses, training

        loss = losses.task_loss
        training.fit(model, context.train, loss, self, context.seed, context.device, context.progress, context.checkpoint)
        return model


class Distill(Training):
    """Train on L_task + L_hidn + L_pred with the base model as teacher (L_task + L_hidn for regression)."""

    temperature: float = Field(default=2.0, gt=0)

    def __call__(self, model: "PreTrainedModel", context: Context) -> "PreTrainedModel":
        from hpc_compress.operators import losses, training

        loss = losses.distillation_loss(context.teacher(), self.temperature)
        training.fit(model, context.train, loss, self, context.seed, context.device, context.progress, context.checkpoint)
        return model


class Quantize(Record):
    """Deploy in a lower precision. int8, nf4 and fp4 hold the encoder's linears in bitsandbytes layers."""

    scheme: Literal["fp16", "bf16", "int8", "nf4", "fp4"]
    rest: Literal["fp32", "fp16", "bf16"] = Field(default="fp32", description="embeddings, norms and head of int8, nf4, fp4")

    def __call__(self, model: "PreTrainedModel", context: Context) -> "PreTrainedModel":
        from hpc_compress.operators import quantization

        return quantization.quantize(model, self.scheme, self.rest)


OPERATORS: dict[str, type[Record]] = {
    "drop_layers": DropLayers,
    "prune_heads": PruneHeads,
    "fine_tune": FineTune,
    "distill": Distill,
    "quantize": Quantize,
}


def operator(step: Step) -> Any:
    """The operator that a step names, with its parameters checked.

    Raises: ConfigError when there is no such operator or it refuses its parameters.
    """
    target = step.operator if "." in step.operator else None
    if target is None and step.operator not in OPERATORS:
        raise ConfigError(
            f"{step.operator!r} is not an operator; choose one of {', '.join(OPERATORS)}, or give a dotted path to your own"
        )
    own = OPERATORS.get(step.operator)
    path = target or f"{own.__module__}.{own.__qualname__}"  # type: ignore[union-attr]
    return build({"_target_": path, **step.params}, f"operator {step.operator}")
