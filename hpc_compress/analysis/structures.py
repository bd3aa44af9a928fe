"""What is left of a model layer by layer, for drawings. Reads run folders; imports no torch."""

from dataclasses import dataclass

from pydantic import ValidationError

from hpc_compress import door, identity
from hpc_compress.analysis.runs import Run
from hpc_compress.types import Outcome, Step, Structure

MOST_LAYERS = 200  # no encoder of ours comes near it


@dataclass(frozen=True)
class Layer:
    """One layer of the base model, in a compressed one."""

    number: int  # in the base model, counted from 1
    heads: int | None  # None: the layer was dropped
    ffn: int | None
    precision: str  # of its linears; empty for a dropped layer


@dataclass(frozen=True)
class Drawing:
    """A model, layer by layer."""

    layers: tuple[Layer, ...]
    most_heads: int  # in a layer of the base model
    most_ffn: int


def drawing(run: Run, candidate: str) -> Drawing | None:
    """Of a candidate; None where neither its measurement nor its files say how it was cut."""
    outcome = run.outcomes.get(candidate)
    structure = _structure(run, outcome) if outcome else None
    if outcome is None or structure is None:
        return None
    origins = structure.layers or tuple(range(len(structure.heads)))
    depth = max(len(run.plan.shape.heads), origins[-1] + 1)
    if depth > MOST_LAYERS:
        return None
    precisions = _precisions(outcome.task.genome.deploy, len(origins))
    parts = zip(origins, structure.heads, structure.ffn, precisions, strict=True)
    kept = {number: Layer(number + 1, heads, ffn, precision) for number, heads, ffn, precision in parts}
    layers = tuple(kept.get(number, Layer(number + 1, None, None, "")) for number in range(depth))
    base = run.base.structure if run.base else None
    return Drawing(
        layers,
        most_heads=max(*structure.heads, *(base.heads if base else run.plan.shape.heads), 1),
        most_ffn=max(*structure.ffn, *(base.ffn if base else run.plan.shape.widths[1:]), 1),
    )


def _structure(run: Run, outcome: Outcome) -> Structure | None:
    if outcome.measurement is not None and outcome.measurement.structure is not None:
        return outcome.measurement.structure
    # Earlier versions did not record it; the model's own config says it as long as its files are there.
    key = identity.deployed_key(outcome.task)
    try:
        config = door.json_object(door.inside(run.root, "artifacts", key, "config.json"))
        return Structure(heads=config.get("heads"), ffn=config.get("ffn"), layers=config.get("layers"))
    except (OSError, door.DamageError, ValidationError):
        return None


def _precisions(deploy: tuple[Step, ...], depth: int) -> list[str]:
    """Of the linears of each layer that is left."""
    found = ["fp32"] * depth
    for step in deploy:
        scheme, parts = step.params.get("scheme"), step.params.get("layers")
        if step.operator == "sparsify":
            found = [f"sparse {step.params.get('precision', 'fp32')}"] * depth
        if isinstance(scheme, str):
            found = [scheme] * depth
        for name, indices in parts.items() if isinstance(parts, dict) else ():
            named = step.params.get("rest", "fp32") if name == "rest" else name
            for index in indices if isinstance(indices, (list, tuple)) else ():
                if isinstance(index, int) and 0 <= index < depth:
                    found[index] = str(named)
    return found
