"""Operators: what can be done to a model. Their parameters are checked without torch; torch is imported when they act.

An operator is a frozen object with `__call__(model, context) -> model`. One that acts on the master takes and returns a
stock classifier with fp32 weights; one that deploys is given a copy of its own and may change precision. A user's own
operator is named in the config by its dotted path.
"""

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from hpc_compress.config import ConfigError, build
from hpc_compress.context import Checkpoint, Context
from hpc_compress.deployment.steps import Quantize, ShareEmbeddings, Sparsify, Threshold, TrimVocabulary
from hpc_compress.pruning.steps import Carve, DropLayers, MovementPrune, Prune, PruneHeads, PruneHidden
from hpc_compress.training.settings import Training
from hpc_compress.training.steps import Distill, FineTune
from hpc_compress.types import Record, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["OPERATORS", "Checkpoint", "Context", "Operator", "Particular", "Training", "foreign", "operator"]


class Operator(Protocol):
    def __call__(self, model: "PreTrainedModel", context: Context) -> "PreTrainedModel": ...


@runtime_checkable
class Particular(Protocol):
    """An operator that works only on some devices or base models; it is checked before any job is submitted."""

    def check(self, device: str, depth: int, inputs: tuple[int, ...]) -> None:
        """device: as in the protocol. depth: encoder layers of the base model. inputs: widths of what leads into its linears.

        Raises: ConfigError that says what does not suit.
        """


OPERATORS: dict[str, type[Record]] = {
    "drop_layers": DropLayers,
    "prune_heads": PruneHeads,
    "prune": Prune,
    "carve": Carve,
    "prune_hidden": PruneHidden,
    "movement_prune": MovementPrune,
    "fine_tune": FineTune,
    "distill": Distill,
    "quantize": Quantize,
    "trim_vocabulary": TrimVocabulary,
    "share_embeddings": ShareEmbeddings,
    "sparsify": Sparsify,
    "threshold": Threshold,
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
    return build({**step.params, "_target_": path}, f"operator {step.operator}")


def foreign(step: Step) -> list[str]:
    """What a step would use that is neither of this program nor of the run: code by its dotted path, a corpus by its path."""
    named = [step.operator, str(step.params.get("criterion", ""))]
    corpora = step.params.get("corpus", "train")
    files = [str(corpus) for corpus in ([corpora] if isinstance(corpora, str) else corpora) if corpus != "train"]
    return [*(path for path in named if "." in path), *files]
