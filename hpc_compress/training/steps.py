"""Steps that train. Their parameters are checked here without torch; torch is imported when they act."""

import copy
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from hpc_compress.context import Context
from hpc_compress.training.settings import Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hpc_compress.training.losses import Weights


class FineTune(Training):
    """Train on the task's own loss: cross-entropy, or squared error for regression."""

    def __call__(self, model: "PreTrainedModel", context: Context) -> "PreTrainedModel":
        from hpc_compress.training import loop, losses

        loss = losses.task_loss(context.problem)
        loop.fit(model, context.train, loss, self, context.seed, context.device, context.progress, context.checkpoint)
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
    hidden: float = Field(default=1.0, ge=0, description="weight of L_hidn, the distance between the last hidden states")
    layers: float = Field(default=0.0, ge=0, description="weight of the mean distance over all layers")
    matching: Literal["fixed", "dynamic"] = Field(
        default="fixed",
        description="with `layers`; fixed: a layer learns from the teacher's layer that it was; dynamic: from the best match "
        "on each batch, in order",
    )
    hidden_distance: Literal["cosine", "mse"] = Field(
        default="cosine", description="distance between hidden states: 1 - cosine, or the mean squared difference"
    )
    online: bool = Field(default=False, description="a copy of the teacher is trained on the task along with the student")

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, values: Any) -> Any:
        """They called hidden_distance closeness."""
        if not isinstance(values, dict) or "closeness" not in values or "hidden_distance" in values:
            return values
        return {"hidden_distance" if name == "closeness" else name: value for name, value in values.items()}

    @model_validator(mode="after")
    def _taught(self) -> "Distill":
        if self.response == self.hidden == self.layers == 0:
            raise ValueError("response, hidden and layers are all 0; raise one of them, or use fine_tune")
        return self

    def weights(self) -> "Weights":
        from hpc_compress.training.losses import Weights

        return Weights(self.task, self.response, self.hidden, self.layers, self.temperature, self.hidden_distance)

    def __call__(self, model: "PreTrainedModel", context: Context) -> "PreTrainedModel":
        from hpc_compress.models import surgery
        from hpc_compress.training import loop, losses, teaching

        problem = context.problem
        # The files hold the last hidden states only, and of a teacher that does not change.
        stored = None if self.layers or self.online else context.taught()
        base = copy.deepcopy(context.teacher()) if self.online else context.teacher()
        teacher = stored or teaching.live(problem, base, learns=self.online)
        companions = [base] if self.online else []
        project = None
        narrower = problem.width(model) != problem.width(base)
        if (self.hidden or self.layers or narrower) and surgery.hidden_size(model) != surgery.hidden_size(base):
            project = teaching.projection(problem, model.to(context.device), teacher, context.train, context.device)
            companions.append(project)
        fixed = surgery.origins(model) if self.layers and self.matching == "fixed" else None
        loss = losses.distillation_loss(problem, self.weights(), teacher, self.online, project, fixed)
        loop.fit(
            model, context.train, loss, self, context.seed, context.device, context.progress, context.checkpoint, companions
        )
        return model
