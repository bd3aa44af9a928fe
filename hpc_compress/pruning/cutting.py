"""From scores to a smaller model: which units go, the cut, and the repair of what is left. Knows no training loop."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from hpc_compress import identity
from hpc_compress.calibration import Walk
from hpc_compress.context import Context
from hpc_compress.data.batches import Batch
from hpc_compress.models import surgery
from hpc_compress.models.gates import counts
from hpc_compress.models.modeling_hpc_compress import linear_of
from hpc_compress.problems import Problem
from hpc_compress.pruning import criteria, obs
from hpc_compress.pruning.allocation import Place, allocate, levels
from hpc_compress.types import Structure

UnitArrays = dict[str, list[np.ndarray]]  # of each kind of unit, layer by layer: scores, or the positions of those that stay


@dataclasses.dataclass(frozen=True)
class Price:
    """The cost of a layer, in parameters or time, by what is left of it."""

    heads: Callable[[np.ndarray], np.ndarray]  # of the attention with so many heads; 0 for none
    ffn: Callable[[np.ndarray], np.ndarray]  # of the FFN with so many neurons; 0 for none
    layer: float  # of a layer with neither

    def of(self, model: PreTrainedModel) -> float:
        heads, ffn = (np.array(counts(model, unit)) for unit in ("heads", "ffn"))
        return float(self.heads(heads).sum() + self.ffn(ffn).sum() + self.layer * len(heads))


@dataclasses.dataclass(frozen=True)
class Scores:
    """How units are scored."""

    criterion: str  # one of ours, or the dotted path of a user's own
    units: Sequence[str]  # kinds of units, as in `models.gates`

    def of(self, model: PreTrainedModel, problem: Problem, batches: Sequence[Batch]) -> UnitArrays:
        """Raises: ValueError for scores of the wrong number, or that are not finite."""
        found = criteria.criterion(self.criterion, problem)(model, batches, self.units)
        scores = {unit: [np.asarray(score.detach().cpu().double()) for score in found[unit]] for unit in self.units}
        for unit in self.units:
            sizes, wanted = [len(score) for score in scores[unit]], counts(model, unit)
            if sizes != wanted or not all(np.isfinite(score).all() for score in scores[unit]):
                raise ValueError(
                    f"criterion {self.criterion} gave {sizes} finite scores for {unit}; one for each of {wanted} is needed"
                )
        return scores


def drop_layers(
    model: PreTrainedModel, context: Context, count: int, criterion: str | None, sentences: int, repair: bool
) -> PreTrainedModel:
    """criterion: by which the least important layers go; None: the last ones go."""
    total = len(surgery.layers(model))
    if count >= total:
        raise ValueError(f"count={count} would leave no layer of {total}")
    batches = context.batches(sentences)
    order = np.arange(total)[::-1]
    if criterion is not None:
        scores = Scores(criterion, ["layers"]).of(model, context.problem, batches)["layers"][0]
        order = np.argsort(scores, kind="stable")
    return _cut_once(model, {"layers": [np.sort(order[count:])]}, batches, repair)


def prune_heads(
    model: PreTrainedModel, context: Context, count: int, criterion: str, where: str, sentences: int, repair: bool
) -> PreTrainedModel:
    """where: "last", in the last layer; "any", wherever the scores are lowest."""
    batches = context.batches(sentences)
    scores = Scores(criterion, ["heads"]).of(model, context.problem, batches)["heads"]
    if surgery.family(model).shared_bias:
        raise ValueError("the layers of this encoder share one position bias, so all must lose the same heads: use prune")
    layers = range(len(scores))[-1:] if where == "last" else range(len(scores))
    order = sorted((float(score), layer, head) for layer in layers for head, score in enumerate(scores[layer]))
    if count > len(order):
        raise ValueError(f"count={count} heads can't be removed: there are {len(order)} in {where} layer")
    going = {(layer, head) for _, layer, head in order[:count]}
    kept = [np.array([head for head in range(len(s)) if (at, head) not in going], dtype=int) for at, s in enumerate(scores)]
    return _cut_once(model, {"heads": kept}, batches, repair)


def prune_hidden(
    model: PreTrainedModel, context: Context, share: float, criterion: str, multiple: int, sentences: int
) -> PreTrainedModel:
    width = surgery.hidden_size(model)
    stays = max(1, round((1 - share) * width / multiple)) * multiple
    if stays >= width:
        raise ValueError(f"share={share} of {width} is less than multiple={multiple}; raise the one or lower the other")
    scores = Scores(criterion, ["hidden"]).of(model, context.problem, context.batches(sentences))
    surgery.prune_hidden(model, np.argsort(scores["hidden"][0], kind="stable")[: width - stays].tolist())
    return model


def prune(
    model: PreTrainedModel,
    context: Context,
    shares: Sequence[float],
    scores: Scores,
    sentences: int,
    scope: str,
    cost: str,
    ffn_multiple: int,
    repair: bool,
    between: Callable[[PreTrainedModel, Context], PreTrainedModel] | None,
) -> PreTrainedModel:
    """Cut in rounds, each scored anew.

    shares: of the encoder, gone after each round. scope: "local" takes the same share everywhere, "global" decides by the
    scores. cost: "parameters" or "time", what a share is counted in. between: a training between two rounds.
    """
    batches = context.batches(sentences)
    price = _parameters(model) if cost == "parameters" else _times(context)
    whole, first = price.of(model), {unit: counts(model, unit) for unit in ("heads", "ffn")}
    dense, left_of_it = copy.deepcopy(model) if repair else None, None
    for done, share in enumerate(shares, 1):
        found, left = scores.of(model, context.problem, batches), 1 - share
        if scope == "local":
            kept = _alike(model, found, first, left, ffn_multiple)
        else:
            kept = _cheapest(model, found, price, left * whole, ffn_multiple)
        _cut(model, kept)
        left_of_it = kept if left_of_it is None else _composed(left_of_it, kept)
        if dense is not None:
            # The target is the model before all rounds: errors of one round are not what the next one aims at.
            _repair(model, dense, left_of_it, batches)
        if between is not None and done < len(shares):
            seed = identity.derive(context.seed, "round", done)
            model = between(model, dataclasses.replace(context, seed=seed, checkpoint=None))
            # A repair must not undo what was learnt, so the trained model is the next target.
            dense, left_of_it = copy.deepcopy(model) if repair else None, None
    return model


def carve(
    model: PreTrainedModel, context: Context, structure: Structure, criterion: str, sentences: int, repair: bool, drift: bool
) -> PreTrainedModel:
    """Cut an uncut model to a structure in one go; of each layer the units with the highest scores stay.

    drift: the repair also makes up for what the residual stream has lost before a linear, not for the linear's output alone
    (Park et al. 2024, K-prune, https://arxiv.org/abs/2308.03449).

    Raises: ValueError for a structure that the model can't have.
    """
    batches, depth = context.batches(sentences), len(surgery.layers(model))
    layers = range(depth) if structure.layers is None else structure.layers
    wanted = {"heads": dict(zip(layers, structure.heads, strict=True)), "ffn": dict(zip(layers, structure.ffn, strict=True))}
    units = ["heads", "ffn"] if structure.hidden is None else ["heads", "ffn", "hidden"]
    scores = Scores(criterion, units).of(model, context.problem, batches)
    if surgery.family(model).shared_bias:  # all layers that have heads keep the same ones
        scores["heads"] = [np.sum(scores["heads"], axis=0)] * depth
    kept: UnitArrays = {}
    for unit, counts_ in wanted.items():
        whole = counts(model, unit)
        if more := [layer for layer, count in counts_.items() if layer >= depth or count > whole[layer]]:
            raise ValueError(f"carve wants {counts_[more[0]]} {unit} in layer {more[0]} of a model that has {whole}")
        kept[unit] = [_best(scores[unit][layer], counts_.get(layer, whole[layer])) for layer in range(depth)]
    if structure.layers is not None:
        kept["layers"] = [np.array(layers)]
    dense = copy.deepcopy(model) if repair else None
    _cut(model, kept)
    if dense is not None:
        _repair(model, dense, kept, batches, drift)
    if structure.hidden is not None:
        order = np.argsort(scores["hidden"][0], kind="stable")
        surgery.prune_hidden(model, order[: surgery.hidden_size(model) - structure.hidden].tolist())
    return model


# --- what goes ---


def _parameters(model: PreTrainedModel) -> Price:
    """By parameters of the encoder, as `surgery.encoder_parameters` counts them."""
    total, heads, ffn = surgery.encoder_parameters(model), counts(model, "heads"), counts(model, "ffn")
    per_head, per_neuron = surgery.unit_parameters(model)
    fixed = (total - per_head * sum(heads) - per_neuron * sum(ffn)) / len(heads)
    return Price(lambda count: count * per_head, lambda count: count * per_neuron, fixed)


def _times(context: Context) -> Price:
    """By milliseconds on this kind of device, from a table that was measured once."""
    times = context.block_times()
    return Price(
        lambda count: np.interp(count, times.heads, times.attention_ms),
        lambda count: np.interp(count, times.widths, times.ffn_ms),
        layer=0.0,  # the table has no times for what can't be cut, so that every share can be reached
    )


def _alike(model: PreTrainedModel, scores: UnitArrays, first: dict[str, list[int]], left: float, multiple: int) -> UnitArrays:
    """Keep the same share everywhere, and something in every block.

    first: how many there were before the first round.
    """
    kept: UnitArrays = {unit: [np.arange(count) for count in counts(model, unit)] for unit in scores}
    for site in _sites(model, scores, multiple):
        step = multiple if site.unit == "ffn" else 1
        for layer in site.layers:
            count = max(1, round(left * first[site.unit][layer] / step)) * step
            kept[site.unit][layer] = _best(site.scores, min(len(site.scores), count))
    return kept


@dataclasses.dataclass(frozen=True)
class Site:
    """Heads or neurons that can be removed: those of one layer, or of all layers that share the choice."""

    unit: str
    layers: tuple[int, ...]
    scores: np.ndarray  # (units,) of one layer
    stays: np.ndarray  # (levels,) how many are left at each level, in each of the layers
    loss: np.ndarray  # (levels,)

    def place(self, price: Price) -> Place:
        cost = price.heads if self.unit == "heads" else price.ffn
        return Place(self.loss, len(self.layers) * cost(self.stays))


def _cheapest(model: PreTrainedModel, scores: UnitArrays, price: Price, budget: float, multiple: int) -> UnitArrays:
    """Choose the cut with the smallest total score whose remaining cost fits the budget."""
    if "layers" in scores:
        heads, ffn = (np.array(counts(model, unit)) for unit in ("heads", "ffn"))
        whole = price.heads(heads) + price.ffn(ffn) + price.layer
        places = [Place(np.array([0.0, loss]), np.array([c, 0.0])) for loss, c in zip(scores["layers"][0], whole, strict=True)]
        stays = np.flatnonzero(np.array(allocate(places, budget)) == 0)
        if len(stays) == 0:
            raise ValueError("the share leaves no layer; lower it")
        return {"layers": [stays]}
    sites = _sites(model, scores, multiple)
    places = [site.place(price) for site in sites]
    others = price.of(model) - sum(float(place.cost[0]) for place in places)
    kept: UnitArrays = {site.unit: [np.arange(count) for count in counts(model, site.unit)] for site in sites}
    for site, level in zip(sites, allocate(places, budget - others), strict=True):
        for layer in site.layers:
            kept[site.unit][layer] = _best(site.scores, int(site.stays[level]))
    return kept


def _sites(model: PreTrainedModel, scores: UnitArrays, multiple: int) -> list[Site]:
    if "blocks" in scores:
        sizes = {"heads": counts(model, "heads"), "ffn": counts(model, "ffn")}
        return [
            Site(unit, (layer,), np.ones(n), np.array([n, 0]), np.array([0.0, scores["blocks"][layer][at]]))
            for at, unit in enumerate(sizes)
            for layer, n in enumerate(sizes[unit])
        ]
    sites = []
    for unit, per_layer in scores.items():
        stays = [_levels(len(score), multiple if unit == "ffn" else 1) for score in per_layer]
        if unit == "heads" and surgery.family(model).shared_bias:
            # All layers that have heads lose the same ones; their scores are sums over those layers.
            having = tuple(layer for layer, score in enumerate(per_layer) if len(score))
            total = np.sum([per_layer[layer] for layer in having], axis=0)
            sites += [Site(unit, having, total, stays[having[0]], levels(total, stays[having[0]]))] if having else []
        else:
            sites += [Site(unit, (at,), s, n, levels(s, n)) for at, (s, n) in enumerate(zip(per_layer, stays, strict=True))]
    return sites


def _levels(count: int, multiple: int) -> np.ndarray:
    """All of them, then every smaller multiple, down to none."""
    return np.array([count, *range((count - 1) // multiple * multiple, -1, -multiple)] if count else [0])


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """Positions of the highest scores, in order."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


# --- the cut ---


def _cut_once(model: PreTrainedModel, kept: UnitArrays, batches: Sequence[Batch], repair: bool) -> PreTrainedModel:
    dense = copy.deepcopy(model) if repair else None
    _cut(model, kept)
    if dense is not None:
        _repair(model, dense, kept, batches)
    return model


def _composed(before: UnitArrays, kept: UnitArrays) -> UnitArrays:
    """Positions that are left after two cuts, counted as before the first one."""
    later = {unit: [was[now] for was, now in zip(before[unit], kept[unit], strict=True)] for unit in kept}
    return {**before, **later}


def _cut(model: PreTrainedModel, kept: UnitArrays) -> None:
    if surgery.family(model).shared_bias and "heads" in kept:
        stays = max(kept["heads"], key=len)  # all alike, but for layers that have none
        surgery.prune_heads_everywhere(model, np.setdiff1d(np.arange(max(counts(model, "heads"))), stays).tolist())
    for unit, cut in (("heads", surgery.prune_heads), ("ffn", surgery.prune_ffn)):
        for layer, (stays, count) in enumerate(zip(kept.get(unit, []), counts(model, unit), strict=False)):
            if len(stays) < count:
                cut(model, layer, np.setdiff1d(np.arange(count), stays).tolist())
    if "layers" in kept:
        surgery.drop_layers(model, np.setdiff1d(np.arange(len(surgery.layers(model))), kept["layers"][0]).tolist())


@torch.no_grad()
def _repair(
    model: PreTrainedModel, dense: PreTrainedModel, kept: UnitArrays, batches: Sequence[Batch], drift: bool = False
) -> None:
    """Refit every output linear, first layer first, so that it reproduces its output in `dense` from its present inputs.
    Where whole layers were removed, the linears that follow add what those layers contributed.

    kept: what is left of `dense`. drift: linears add what the stream has lost before them wherever it was.
    """
    before, after = Walk(dense, batches), Walk(model, batches)
    changed = False
    for index, origin, name, stays in _outputs(model, dense, kept):
        linear, whole = linear_of(surgery.layers(model)[index], name), linear_of(surgery.layers(dense)[origin], name)
        changed = changed or linear.in_features < whole.in_features or index != origin
        if changed:  # with no input left, the bias still takes over what the inputs contributed on average
            look = drift or "layers" in kept
            at, now = _output(dense, origin, name, look), _output(model, index, name, look)
            seen = obs.moments(before, at, after, now)
            weight, bias = obs.refit(whole.weight, whole.bias, seen, torch.from_numpy(stays).to(whole.weight.device))
            linear.weight.copy_(weight)
            if bias is not None:
                linear.bias.copy_(bias)


def _output(model: PreTrainedModel, layer: int, name: str, look: bool) -> obs.OutputLinear:
    """look: at the stream too."""
    stream = surgery.stream(model, layer, name) if look else None
    return obs.OutputLinear(layer, surgery.path(model, layer, name), stream)


def _outputs(model: PreTrainedModel, dense: PreTrainedModel, kept: UnitArrays) -> Iterator[tuple[int, int, str, np.ndarray]]:
    """Every linear that writes into the residual stream: layer now, layer before, name, input features that it kept."""
    names, size, depth = surgery.family(model), surgery.head_size(model), len(surgery.layers(dense))
    before = {"heads": counts(dense, "heads"), "ffn": counts(dense, "ffn")}
    for index, origin in enumerate(kept["layers"][0] if "layers" in kept else range(depth)):
        for unit, name, features in (("heads", names.attention_out, size), ("ffn", names.ffn_out, 1)):
            stays = kept[unit][origin] if unit in kept else np.arange(before[unit][origin])
            yield index, int(origin), name, (stays[:, None] * features + np.arange(features)).ravel()
