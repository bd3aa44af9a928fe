"""The space of genomes around one base model: its shape, and what steps do to it. Knows nothing of weights."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from hpc_compress.types import Record, Step


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


class Shape(Record):
    """What structural steps change; enough to tell a possible genome from an impossible one."""

    heads: tuple[int, ...]  # attention heads of each encoder layer, first layer first
    widths: tuple[int, ...] = ()  # of the base model: what its linears have for inputs, as far as its config says so

    @staticmethod
    def of(config: Mapping[str, Any]) -> "Shape":
        """From a checkpoint's config.json.

        Raises: ValueError when it does not describe an encoder.
        """
        layers = config.get("num_hidden_layers", config.get("n_layers"))
        heads = config.get("num_attention_heads", config.get("n_heads"))
        if not (isinstance(layers, int) and isinstance(heads, int)):
            raise ValueError(
                f"a {config.get('model_type', 'nameless')} config without a number of layers and heads is not a BERT-like "
                "encoder; choose a BERT, RoBERTa, ELECTRA, ALBERT, DistilBERT, DeBERTa-v2, ModernBERT or MPNet checkpoint"
            )
        names = ("hidden_size", "dim", "intermediate_size", "hidden_dim")
        return Shape(heads=(heads,) * layers, widths=tuple(config[name] for name in names if isinstance(config.get(name), int)))

    def after(self, step: Step) -> "Shape | None":
        """The shape after one step; None when the step would leave no layer, or no head in one.

        A step whose effect is not known here, such as a cut by scores, is assumed to keep the shape: its operator checks on the
        node.
        """
        count = step.params.get("count", 1)
        if step.operator == "carve":
            return self._with(tuple(step.params.get("heads", self.heads)))
        if step.operator == "drop_layers":
            return self._with(self.heads[:-count]) if count < len(self.heads) else None
        if step.operator == "prune_heads" and step.params.get("where", "last") == "last":
            kept = self.heads[-1] - count
            return self._with((*self.heads[:-1], kept)) if kept > 0 else None
        return self

    def _with(self, heads: tuple[int, ...]) -> "Shape":
        return Shape(heads=heads, widths=self.widths)

    def after_all(self, steps: Iterable[Step]) -> "Shape | None":
        shape: Shape | None = self
        for step in steps:
            shape = shape.after(step) if shape else None
        return shape
