"""The space of genomes around one base model: its shape, and what steps do to it. Knows nothing of weights."""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field, field_validator, model_validator

from hpc_compress.config import ConfigError
from hpc_compress.types import VOCABULARY_STEPS, Genome, Params, Record, Step, Structure


class Shape(Record):
    """What structural steps change; enough to tell a possible genome from an impossible one."""

    heads: tuple[int, ...]  # attention heads of each encoder layer, first layer first
    widths: tuple[int, ...] = ()  # of the base model: what its linears have for inputs, as far as its config says so
    alike: bool = Field(default=False, exclude_if=lambda alike: not alike)  # all layers must keep the same heads

    @staticmethod
    def of(config: Mapping[str, Any], alike: bool = False) -> "Shape":
        """From a checkpoint's config.json. alike: all layers must keep the same heads.

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
        widths = tuple(config[name] for name in names if isinstance(config.get(name), int))
        return Shape(heads=(heads,) * layers, widths=widths, alike=alike)

    @property
    def ffn(self) -> int:
        """FFN neurons of each layer of the base model.

        Raises: ConfigError when the base model's config does not say.
        """
        if len(self.widths) < 2:
            raise ConfigError(
                "the base model's config.json has no intermediate_size or hidden_dim, which this strategy needs; add it, or "
                "choose strategy=genetic"
            )
        return self.widths[1]

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
        return self.model_copy(update={"heads": heads})

    def after_all(self, steps: Iterable[Step]) -> "Shape | None":
        shape: Shape | None = self
        for step in steps:
            shape = shape.after(step) if shape else None
        return shape


class Space(Record):
    """The genomes that a strategy chooses among: a structure, how it is trained, how it is deployed.

    A structure is explicit, so two histories that lead to one structure are one genome. Its heads are counted one by one, its
    FFN neurons in multiples.
    """

    ffn_multiple: int = Field(default=64, ge=1, description="FFN widths are multiples of this, since kernels are faster then")
    carve: Params = Field(default={}, description="parameters of the step `carve` besides the structure")
    trainings: dict[str, tuple[Step, ...]] = Field(min_length=1, description="what may follow the cut; [] for no training")
    deploys: dict[str, tuple[Step, ...] | None] = Field(
        min_length=1, description="ways to deploy, in order of preference; [] for fp32, null: not on this device"
    )
    vocabularies: dict[str, tuple[Step, ...] | None] = Field(
        default={"all": ()}, min_length=1, description="what comes before each way to deploy; [] for all tokens, null: left out"
    )

    @field_validator("trainings", "deploys", "vocabularies", mode="before")
    @classmethod
    def _flat(cls, chains: Any) -> Any:
        """In a config a step lies flat: {operator: distill, epochs: 1}."""
        if not isinstance(chains, dict):
            return chains
        return {
            name: [_step(step) for step in chain] if isinstance(chain, (list, tuple)) else chain
            for name, chain in chains.items()
        }

    @model_validator(mode="after")
    def _one_vocabulary(self) -> "Space":
        for name, chain in self.possible_deploys().items():
            steps = [step.operator for step in chain if step.operator in VOCABULARY_STEPS]
            if len(steps) > 1:
                raise ValueError(f"the way to deploy {name!r} changes the word embedding twice ({', '.join(steps)}); keep one")
        return self

    def whole(self, shape: Shape) -> Structure:
        """That of the base model."""
        return Structure(heads=shape.heads, ffn=(shape.ffn,) * len(shape.heads))

    def widths(self, shape: Shape) -> tuple[int, ...]:
        """How many FFN neurons a layer may keep, rising from 0."""
        return (*range(0, shape.ffn, self.ffn_multiple), shape.ffn)

    @property
    def scores(self) -> Params:
        """What the step `carve` says of its scores: a survey with these scores units as the cuts do."""
        return {name: self.carve[name] for name in ("criterion", "sentences") if name in self.carve}

    def deploy_parts(self) -> dict[str, tuple[str, str]]:
        """The precision and the vocabulary of each way to deploy on this device, by its name."""
        vocabularies = [name for name, chain in self.vocabularies.items() if chain is not None]
        return {
            f"{precision}, {vocabulary} embeddings" if len(vocabularies) > 1 else precision: (precision, vocabulary)
            for precision, chain in self.deploys.items()
            if chain is not None
            for vocabulary in vocabularies
        }

    def possible_deploys(self) -> dict[str, tuple[Step, ...]]:
        """The steps of each way to deploy on this device, by the names of `deploy_parts`."""
        return {
            name: (*(self.vocabularies[vocabulary] or ()), *(self.deploys[precision] or ()))
            for name, (precision, vocabulary) in self.deploy_parts().items()
        }

    def require_training(self, name: str) -> None:
        """Raises: ValueError when there is no training of this name."""
        if name not in self.trainings:
            raise ValueError(f"training={name!r} is not in space.trainings; choose one of {', '.join(self.trainings)}")

    def genome(
        self, shape: Shape, structure: Structure, training: tuple[Step, ...] = (), deploy: tuple[Step, ...] = ()
    ) -> Genome:
        """The one genome of a structure with a training and a way to deploy. What is left whole is not carved."""
        kept = {name: value for name, value in structure.model_dump().items() if value is not None}
        carve = Step(operator="carve", params={**self.carve, **kept})
        return Genome(steps=(*(() if structure == self.whole(shape) else (carve,)), *training), deploy=deploy)

    def structure(self, shape: Shape, genome: Genome) -> Structure:
        """The structure of a genome that `genome` made."""
        first = genome.steps[0] if genome.steps else None
        if first is None or first.operator != "carve":
            return self.whole(shape)
        return Structure(**{name: first.params[name] for name in Structure.model_fields if name in first.params})

    def steps(self, shape: Shape) -> tuple[Step, ...]:
        """Every kind of step for the master that a genome may have, to be checked and tried."""
        half = Structure(
            heads=tuple(max(1, heads // 2) for heads in shape.heads),
            ffn=(self.widths(shape)[len(self.widths(shape)) // 2],) * len(shape.heads),
        )
        return (
            *self.genome(shape, half).steps,
            *{step.model_dump_json(): step for chain in self.trainings.values() for step in chain}.values(),
        )

    def deploy_steps(self) -> tuple[Step, ...]:
        """Every kind of step that deploys, to be checked and tried."""
        return tuple({step.model_dump_json(): step for chain in self.possible_deploys().values() for step in chain}.values())


def _step(values: Any) -> Any:
    if not isinstance(values, dict) or "params" in values:
        return values
    return {"operator": values.get("operator"), "params": {key: value for key, value in values.items() if key != "operator"}}
