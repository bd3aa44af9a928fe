"""Precisions that differ by layer: chains of deploying steps whose `quantize` names layers with another scheme."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

from hpc_compress.identity import canonical
from hpc_compress.types import Step

LAYERED = ("int8", "nf4", "fp4", "dynamic_int8")  # schemes that `quantize` can give to single layers
Chain = tuple[Step, ...]


def parts(chain: Sequence[Step]) -> tuple[Chain, dict[int, Chain]]:
    """The chain with one scheme for all layers, and for each layer with another scheme the chain of that one."""
    plain, others = tuple(chain), dict[int, Chain]()
    for at, step in enumerate(chain):
        if step.operator == "quantize" and step.params.get("layers"):
            params = {name: value for name, value in step.params.items() if name != "layers"}
            plain = _with(chain, at, params)
            for scheme, layers in step.params["layers"].items():
                own = () if scheme == "rest" else _with(chain, at, {**params, "scheme": scheme})
                others |= {int(layer): own for layer in layers}
    return plain, others


def mixed(chain: Sequence[Step], scheme: str, layers: Iterable[int]) -> Chain:
    """A chain whose last `quantize` gives these layers another scheme."""
    at = max(at for at, step in enumerate(chain) if step.operator == "quantize")
    return _with(chain, at, {**chain[at].params, "layers": {scheme: sorted(layers)}})


def pairs(deploys: Mapping[str, Chain]) -> list[tuple[str, str, str]]:
    """Names of two ways to deploy that differ in nothing but the scheme of their layers, and the second one's scheme."""
    found = {}
    for name, chain in deploys.items():
        schemes = [step.params.get("scheme") for step in chain if step.operator == "quantize"]
        if len(schemes) == 1 and schemes[0] in LAYERED:
            others = [
                {**step.params, "scheme": ""} if step.operator == "quantize" else step.model_dump(mode="json") for step in chain
            ]
            found[name] = str(schemes[0]), canonical(others)
    return [
        (one, other, found[other][0])
        for one, other in itertools.permutations(found, 2)
        if found[one][1] == found[other][1] and found[one][0] != found[other][0]
    ]


def _with(chain: Sequence[Step], at: int, params: Mapping) -> Chain:
    return (*chain[:at], chain[at].model_copy(update={"params": dict(sorted(params.items()))}), *chain[at + 1 :])
