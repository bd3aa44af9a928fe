"""From scores to a smaller model: which units go, the cut, and the repair of what is left. Knows no training loop."""

import copy
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from transformers import PreTrainedModel

from hpc_compress import identity
from hpc_compress.context import Context
from hpc_compress.data.batches import Batch
from hpc_compress.models import surgery
from hpc_compress.models.gates import counts
from hpc_compress.problems import Problem
from hpc_compress.pruning import criteria
from hpc_compress.pruning.repair import Repairer, UnitArrays, shared_copy
from hpc_compress.search.allocation import Place, allocate, levels
from hpc_compress.types import Structure

RESCORED_PART = 2  # of a cut's sentences one in so many is looked at when the rest is scored anew


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
        self.require_fit(scores, model)
        return scores

    def require_fit(self, scores: UnitArrays, model: PreTrainedModel) -> None:
        """Raises: ValueError for scores of the wrong number, or that are not finite."""
        for unit in self.units:
            found = scores.get(unit, [])
            sizes, wanted = [len(score) for score in found], counts(model, unit)
            if sizes != wanted or not all(np.isfinite(score).all() for score in found):
                raise ValueError(
                    f"criterion {self.criterion} gave {sizes} finite scores for {unit}; one for each of {wanted} is needed"
                )


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
    by_layers = "layers" in scores.units
    repairer, left_of_it = _repairer(model, batches, by_layers) if repair else None, None
    for done, share in enumerate(shares, 1):
        found, left = scores.of(model, context.problem, batches), 1 - share
        if scope == "local":
            kept = _alike(model, found, first, left, ffn_multiple)
        else:
            kept = _cheapest(model, found, price, left * whole, ffn_multiple)
        cut(model, kept)
        left_of_it = kept if left_of_it is None else _composed(left_of_it, kept)
        if repairer is not None:
            # The target is the model before all rounds: errors of one round are not what the next one aims at.
            repairer.repair(model, left_of_it)
        if between is not None and done < len(shares):
            seed = identity.derive(context.seed, "round", done)
            model = between(model, dataclasses.replace(context, seed=seed, checkpoint=None))
            # A repair must not undo what was learnt, so the trained model is the next target.
            repairer, left_of_it = _repairer(model, batches, by_layers) if repair else None, None
    return model


@dataclasses.dataclass(frozen=True)
class Carving:
    """How a model is cut to a structure that is given in full."""

    criterion: str
    sentences: int  # of train, that the criterion and the repair see
    repair: bool
    drift: bool  # as in `Repairer`


def carve(model: PreTrainedModel, context: Context, structure: Structure, how: Carving) -> PreTrainedModel:
    """Cut an uncut model in one go; of each layer the units with the highest scores stay.

    Raises: ValueError for a structure that the model can't have.
    """
    kept = kept_of(model, context, structure, how)
    repairer = repairer_of(model, context, how) if how.repair else None
    cut(model, kept)
    if repairer is not None:
        repairer.repair(model, kept)
    if structure.hidden is not None:
        # Of the model as it is cut by now, which differs from structure to structure.
        scores = Scores(how.criterion, ["hidden"]).of(model, context.problem, context.batches(how.sentences))
        order = np.argsort(scores["hidden"][0], kind="stable")
        surgery.prune_hidden(model, order[: surgery.hidden_size(model) - structure.hidden].tolist())
    return model


def kept_of(model: PreTrainedModel, context: Context, structure: Structure, how: Carving) -> UnitArrays:
    """What a structure leaves of an uncut model. Raises: ValueError for a structure that the model can't have."""
    depth = len(surgery.layers(model))
    layers = range(depth) if structure.layers is None else structure.layers
    wanted = {"heads": dict(zip(layers, structure.heads, strict=True)), "ffn": dict(zip(layers, structure.ffn, strict=True))}
    scores = dict(scores_of(model, context, Scores(how.criterion, ["heads", "ffn"]), how.sentences))
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
    return kept


def scores_of(model: PreTrainedModel, context: Context, scores: Scores, sentences: int) -> UnitArrays:
    """Scores of the model that the operator was given, uncut; computed once for all structures of it."""
    key = (context.given, scores.criterion, tuple(scores.units), sentences)
    found = context.scores(key, lambda: scores.of(model, context.problem, context.batches(sentences)))
    scores.require_fit(found, model)  # a file holds what it holds
    return found


def repairer_of(
    model: PreTrainedModel, context: Context, how: Carving, judged: Sequence[Batch] = (), sample: int = 0
) -> Repairer:
    """What repairs aim at, kept for all structures of the uncut model. Where structures are judged, a fifth of the sentences at
    least is not fit to. sample: which sentences are judged; 0 for none."""
    key = (context.given, how.sentences, how.drift, sample, sum(map(len, judged)))

    def make() -> Repairer:
        fit = min(how.sentences, len(context.train) * 4 // 5) if judged else how.sentences
        return Repairer(copy.deepcopy(model), context.batches(fit), judged, how.drift)

    return context.kept("repairer", key, make)


def rescored(model: PreTrainedModel, context: Context, share: float, ffn_multiple: int, how: Carving) -> PreTrainedModel:
    """Remove a share of the encoder's parameters block by block: attention, then FFN, of one layer after another. Before each,
    all that is left is scored anew, on the model as it is then, and the rest of the budget is allocated anew; after each, what
    was cut so far is repaired (after Park et al. 2024, K-prune, algorithm 1, https://arxiv.org/abs/2308.03449).
    """
    # There are two scorings a layer, so each one sees a part of the sentences only.
    batches, scores = context.batches(max(1, how.sentences // RESCORED_PART)), Scores(how.criterion, ["heads", "ffn"])
    repairer, whole, price = repairer_of(model, context, how), copy.deepcopy(model), _parameters(model)
    left = (1 - share) * price.of(model) - price.layer * len(surgery.layers(model))
    if surgery.family(model).shared_bias:  # all layers must lose the same heads, so they are cut at once
        kept = _cheapest(model, scores.of(model, context.problem, batches), price, (1 - share) * price.of(model), ffn_multiple)
        cut(model, kept)
        repairer.repair(model, kept)
        return model
    kept = {unit: [np.arange(count) for count in counts(model, unit)] for unit in ("heads", "ffn")}
    for number in range(2 * len(surgery.layers(whole))):
        layer, unit = number // 2, ("heads", "ffn")[number % 2]
        found = scores.of(model, context.problem, batches)
        ordered = sorted(_sites(model, found, ffn_multiple), key=lambda site: (site.layers[0], site.unit == "ffn"))
        places = [site.place(price) for site in ordered[number:]]
        level = allocate(places, left)[0]
        left -= float(places[0].cost[level])
        kept[unit][layer] = _best(found[unit][layer], int(ordered[number].stays[level]))
        model = shared_copy(whole)
        cut(model, kept)
        # Blocks that are still whole keep their weights: they are scored as what they are.
        repairer.repair(model, kept, most=number + 1)
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
    repairer = _repairer(model, batches, drift="layers" in kept) if repair else None
    cut(model, kept)
    if repairer is not None:
        repairer.repair(model, kept)
    return model


def _repairer(model: PreTrainedModel, batches: Sequence[Batch], drift: bool = False) -> Repairer:
    """The model as it is now, for a repair to aim at. Where whole layers go, those that follow must make up for the stream."""
    return Repairer(copy.deepcopy(model), batches, drift=drift)


def _composed(before: UnitArrays, kept: UnitArrays) -> UnitArrays:
    """Positions that are left after two cuts, counted as before the first one."""
    later = {unit: [was[now] for was, now in zip(before[unit], kept[unit], strict=True)] for unit in kept}
    return {**before, **later}


def cut(model: PreTrainedModel, kept: UnitArrays) -> None:
    """Remove all units but those at the given positions; kinds of units that are not named stay whole."""
    if surgery.family(model).shared_bias and "heads" in kept:
        stays = max(kept["heads"], key=len)  # all alike, but for layers that have none
        surgery.prune_heads_everywhere(model, np.setdiff1d(np.arange(max(counts(model, "heads"))), stays).tolist())
    for unit, remove in (("heads", surgery.prune_heads), ("ffn", surgery.prune_ffn)):
        for layer, (stays, count) in enumerate(zip(kept.get(unit, []), counts(model, unit), strict=False)):
            if len(stays) < count:
                remove(model, layer, np.setdiff1d(np.arange(count), stays).tolist())
    if "layers" in kept:
        surgery.drop_layers(model, np.setdiff1d(np.arange(len(surgery.layers(model))), kept["layers"][0]).tolist())
