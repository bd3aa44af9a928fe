"""Operators that train. Parameters are checked here without torch; the loop lies in `training`."""

import copy
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from hpc_compress.types import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hpc_compress.operators.context import Context


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

    def __call__(self, model: "PreTrainedModel", context: "Context") -> "PreTrainedModel":
        from hpc_compress.operators import losses, training

        loss = losses.task_loss
        training.fit(model, context.train, loss, self, context.seed, context.device, context.progress, context.checkpoint)
        return model


class Distill(Training):
    """Train on a weighted sum of losses with the base model as teacher; by default L_task + L_hidn + L_pred, as published."""

    task: float = Field(default=1.0, ge=0, description="weight of L_task, the loss of `fine_tune`")
    response: float | None = Field(
        default=None,
        ge=0,
        description="weight of L_pred, the KL divergence from the teacher's class probabilities, or the squared difference "
        "from its output for regression; null: as published 1, but 0 for regression",
    )
    temperature: float = Field(default=2.0, gt=0, description="divides the logits in L_pred; higher: softer probabilities")
    hidden: float = Field(default=1.0, ge=0, description="weight of L_hidn, how far the last hidden states are apart")
    layers: float = Field(default=0.0, ge=0, description="weight of the same for every layer, mean over layers")
    matching: Literal["fixed", "dynamic"] = Field(
        default="fixed",
        description="with `layers`, each layer learns from: the teacher's layer that it was; or, "
        "dynamic, the one that fits best on each batch, in order",
    )
    closeness: Literal["cosine", "mse"] = Field(
        default="cosine", description="how far hidden states are apart: 1 - cosine, or mean squared difference"
    )
    online: bool = Field(default=False, description="a copy of the teacher is trained on the task along with the student")

    @model_validator(mode="after")
    def _taught(self) -> "Distill":
        if self.response == self.hidden == self.layers == 0:
            raise ValueError("response, hidden and layers are all 0; raise one of them, or use fine_tune")
        return self

    def __call__(self, model: "PreTrainedModel", context: "Context") -> "PreTrainedModel":
        from hpc_compress.models import surgery
        from hpc_compress.operators import losses, teaching, training

        # The files hold the last hidden states only, and of a teacher that does not change.
        outputs = None if self.layers or self.online else context.taught()
        base = copy.deepcopy(context.teacher()) if self.online else context.teacher()
        teacher = outputs.answer if outputs is not None else teaching.live(base, learns=self.online)
        companions = [base] if self.online else []
        project = None
        if (self.hidden or self.layers) and surgery.hidden_size(model) != surgery.hidden_size(base):
            project = teaching.projection(model.to(context.device), teacher, context.train, context.device)
            companions.append(project)
        fixed = surgery.origins(model) if self.layers and self.matching == "fixed" else None
        loss = losses.distillation_loss(self, teacher, project, fixed)
        training.fit(
            model, context.train, loss, self, context.seed, context.device, context.progress, context.checkpoint, companions
        )
        return model
