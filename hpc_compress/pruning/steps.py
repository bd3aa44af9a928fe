"""Steps that cut. Their parameters are checked here without torch; what they do lies in `cutting` and `movement`."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from hpc_compress.config import validate
from hpc_compress.context import Context
from hpc_compress.training.settings import Training
from hpc_compress.training.steps import Distill
from hpc_compress.types import Record, Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hpc_compress.pruning.cutting import Carving
    from hpc_compress.pruning.movement import Goal


# The units that each criterion of ours can score. A user's own, named by its dotted path, is tried on the node.
SCORABLE = {
    "fisher": {"layers", "blocks", "heads", "ffn", "hidden"},
    "gauss_newton": {"layers", "blocks", "heads", "ffn", "hidden"},
    "taylor": {"layers", "blocks", "heads", "ffn", "hidden"},
    "magnitude": {"layers", "blocks", "heads", "ffn", "hidden"},
    "obs": {"heads", "ffn"},
    "activation_mean": {"heads", "ffn"},
    "apoz": {"heads", "ffn"},
    "similarity": {"heads", "ffn"},
}
REPAIR = (
    "refit the remaining output weights by least squares, so that each layer reproduces its original output; "
    "criterion=similarity always does"
)


def _require_criterion(criterion: str, units: set[str]) -> None:
    if "." in criterion:
        return
    if criterion not in SCORABLE:
        raise ValueError(f"{criterion!r} is not a criterion; choose one of {', '.join(SCORABLE)}, or give a dotted path")
    if not units <= SCORABLE[criterion]:
        able = [name for name, known in SCORABLE.items() if units <= known]
        raise ValueError(f"criterion {criterion!r} can't score {', '.join(sorted(units))}; choose one of {', '.join(able)}")


def repairs(step: "DropLayers | PruneHeads | Prune") -> bool:
    """A unit that is removed because it is similar to another one leaves its work to that one. The repair hands it over."""
    return step.repair or step.criterion == "similarity"


class DropLayers(Record):
    """Remove encoder layers: the last ones (K1 of the published method), or the least important ones."""

    count: int = Field(default=1, ge=1)
    criterion: str = Field(default="last", description="last, or a criterion; the layers with the lowest scores are removed")
    sentences: int = Field(default=256, ge=1, description="training sentences that the criterion and the repair use")
    repair: bool = Field(default=False, description="refit the remaining output weights by least squares")

    @field_validator("criterion")
    @classmethod
    def _known(cls, criterion: str) -> str:
        if criterion != "last":
            _require_criterion(criterion, {"layers"})
        return criterion

    def __call__(self, model: "PreTrainedModel", context: Context) -> "PreTrainedModel":
        from hpc_compress.pruning import cutting

        criterion = None if self.criterion == "last" else self.criterion
        return cutting.drop_layers(model, context, self.count, criterion, self.sentences, repairs(self))


class PruneHeads(Record):
    """Remove the least important attention heads, of the last layer (K2 of the published method) or of all layers."""

    count: int = Field(default=1, ge=1)
    criterion: str = "fisher"
    where: Literal["last", "any"] = Field(default="last", description="the last layer, or wherever the least important are")
    sentences: int = Field(default=256, ge=1, description="training sentences that the criterion and the repair use")
    repair: bool = Field(default=False, description=REPAIR)

    @field_validator("criterion")
    @classmethod
    def _known(cls, criterion: str) -> str:
        _require_criterion(criterion, {"heads"})
        return criterion

    def __call__(self, model: "PreTrainedModel", context: Context) -> "PreTrainedModel":
        from hpc_compress.pruning import cutting

        return cutting.prune_heads(model, context, self.count, self.criterion, self.where, self.sentences, repairs(self))


class Prune(Record):
    """Remove a share of the encoder, wherever the scores are lowest."""

    share: float = Field(gt=0, lt=1, description="share of the encoder's parameters, or of its blocks' time, to remove")
    units: tuple[Literal["heads", "ffn", "blocks", "layers"], ...] = Field(
        default=("heads", "ffn"),
        min_length=1,
        description="heads and ffn (neurons) one by one, alone or together; or whole blocks (attention, FFN); or whole layers",
    )
    criterion: str = "gauss_newton"
    scope: Literal["global", "local"] = Field(
        default="global", description="global: the scores decide where; local: the same share everywhere"
    )
    cost: Literal["parameters", "time"] = Field(
        default="parameters", description="cost of a unit: its parameters, or its time on this device"
    )
    ffn_multiple: int = Field(
        default=64, ge=1, description="FFN widths are cut to multiples of this, since kernels are faster then"
    )
    rounds: int = Field(default=1, ge=1, description="number of cuts; the scores are computed again for each")
    schedule: Literal["cubic", "linear"] = Field(
        default="cubic", description="how the share grows over the rounds; cubic (AGP) cuts most at first"
    )
    training: dict[str, Any] | None = Field(
        default=None, description="parameters of `distill` between two rounds; null: no training there"
    )
    sentences: int = Field(default=512, ge=1, description="training sentences that the criterion and the repair use")
    repair: bool = Field(default=False, description=REPAIR)
    rescore: bool = Field(
        default=False,
        description="cut and repair, drift included, one block after another, and decide anew before each where the rest goes",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Prune":
        units: set[str] = set(self.units)
        if self.rescore and (units != {"heads", "ffn"} or (self.scope, self.cost, self.rounds) != ("global", "parameters", 1)):
            raise ValueError("rescore=true goes with units=[heads, ffn], scope=global, cost=parameters and rounds=1 only")
        if len(units) > 1 and not units <= {"heads", "ffn"}:
            raise ValueError(f"units={list(self.units)}: blocks and layers stand alone; together only heads and ffn can be")
        if self.scope == "local" and not units <= {"heads", "ffn"}:
            raise ValueError(f"scope=local takes a share of each layer's heads or ffn, not of {', '.join(units)}; use global")
        _require_criterion(self.criterion, units)
        if self.training is not None:
            validate(Distill, self.training, "training")
        return self

    def share_after(self, done: int) -> float:
        """What is gone after so many rounds: `s_f (1 - (1 - t/n)^3)`, cubic (Zhu & Gupta 2017, AGP, eq. 1), or `s_f t/n`."""
        left = 1 - done / self.rounds
        return self.share * (1 - (left**3 if self.schedule == "cubic" else left))

    def __call__(self, model: "PreTrainedModel", context: Context) -> "PreTrainedModel":
        from hpc_compress.pruning import cutting

        if self.rescore:
            how = cutting.Carving(self.criterion, self.sentences, repair=True, drift=True)
            return cutting.rescored(model, context, self.share, self.ffn_multiple, how)
        return cutting.prune(
            model,
            context,
            shares=[self.share_after(done) for done in range(1, self.rounds + 1)],
            scores=cutting.Scores(self.criterion, self.units),
            sentences=self.sentences,
            scope=self.scope,
            cost=self.cost,
            ffn_multiple=self.ffn_multiple,
            repair=repairs(self),
            between=None if self.training is None else Distill(**self.training),
        )


class Carve(Structure):
    """Cut the base model to a structure that is given in full, in one go. It must come before every other cut."""

    criterion: str = "gauss_newton"
    sentences: int = Field(default=512, ge=1, description="training sentences that the criterion and the repair use")
    repair: bool = Field(default=True, description=REPAIR)
    drift: bool = Field(
        default=True, description="the repair also makes up for what the residual stream has lost in the layers before"
    )

    @model_validator(mode="after")
    def _scored(self) -> "Carve":
        _require_criterion(self.criterion, {"heads", "ffn"} | ({"hidden"} if self.hidden else set()))
        return self

    @property
    def how(self) -> "Carving":
        from hpc_compress.pruning.cutting import Carving

        return Carving(self.criterion, self.sentences, self.repair, self.drift)

    def __call__(self, model: "PreTrainedModel", context: Context) -> "PreTrainedModel":
        from hpc_compress.pruning import cutting

        return cutting.carve(model, context, self, self.how)


class PruneHidden(Record):
    """Remove the least important dimensions of the residual stream, everywhere at once. The LayerNorms then go over fewer
    features, so the cut model is not the masked one: distill it."""

    share: float = Field(gt=0, lt=1, description="share of the hidden size to remove")
    criterion: str = "fisher"
    multiple: int = Field(default=32, ge=1, description="the hidden size is cut to a multiple of this")
    sentences: int = Field(default=512, ge=1, description="training sentences that the criterion uses")

    @field_validator("criterion")
    @classmethod
    def _known(cls, criterion: str) -> str:
        _require_criterion(criterion, {"hidden"})
        return criterion

    def __call__(self, model: "PreTrainedModel", context: Context) -> "PreTrainedModel":
        from hpc_compress.pruning import cutting

        return cutting.prune_hidden(model, context, self.share, self.criterion, self.multiple, self.sentences)


class MovementPrune(Training):
    """Train, and remove the heads and FFN neurons with the lowest scores; the scores are learnt along with the weights
    (movement pruning, Sanh et al. 2020). The share removed grows from the end of the warm-up to the start of the cool-down, in
    which the rest is trained further."""

    share: float | None = Field(default=None, gt=0, lt=1, description="hard: of the heads, and of the neurons, to remove")
    regularisation: float | None = Field(
        default=None,
        gt=0,
        description="soft, instead of share: the cost of keeping a unit (with 1, a third of MiniLM was removed)",
    )
    units: tuple[Literal["heads", "ffn"], ...] = Field(default=("heads", "ffn"), min_length=1)
    cooldown: float = Field(
        default=0.3, ge=0, lt=1, description="share of the updates, at the end, in which nothing more is removed"
    )
    ffn_multiple: int = Field(
        default=64, ge=1, description="FFN widths are cut to multiples of this, since kernels are faster then"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "MovementPrune":
        if (self.share is None) == (self.regularisation is None):
            raise ValueError(
                f"share={self.share} and regularisation={self.regularisation}: give one of them, share for hard movement "
                "pruning or regularisation for soft"
            )
        if self.warmup + self.cooldown >= 1:
            raise ValueError(f"warmup={self.warmup} and cooldown={self.cooldown} leave no updates between; lower one of them")
        return self

    def goal(self) -> "Goal":
        from hpc_compress.pruning.movement import Goal

        return Goal(self.units, self.share, self.regularisation, self.cooldown, self.ffn_multiple)

    def __call__(self, model: "PreTrainedModel", context: Context) -> "PreTrainedModel":
        from hpc_compress.pruning import movement

        movement.cut(model, movement.learn(model, context, self, self.goal()))
        return model
