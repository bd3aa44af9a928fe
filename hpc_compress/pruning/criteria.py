"""How much a unit matters. A criterion is a function `(model, batches, units) -> scores`; higher means keep.

`units` names kinds of units of `models.gates`; the scores are one tensor a layer for each kind, in the order of the layers.
Global cuts compare scores of different layers and add them up, so the best criteria estimate what the loss would rise by.
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from hpc_compress.calibration import input_products
from hpc_compress.config import locate
from hpc_compress.data.batches import Batch
from hpc_compress.models import surgery
from hpc_compress.models.gates import PerUnit, counts, gated
from hpc_compress.problems import Problem
from hpc_compress.pruning import obs

Criterion = Callable[[PreTrainedModel, Iterable[Batch], Sequence[str]], PerUnit]


def magnitude(model: PreTrainedModel, batches: Iterable[Batch], units: Sequence[str]) -> PerUnit:
    """L2 norm of the weights by which a unit writes into the residual stream; needs no data."""
    pairs = zip(surgery.attention_outputs(model), surgery.ffn_outputs(model), strict=True)
    squares = [(one.weight.detach().square(), other.weight.detach().square()) for one, other in pairs]
    size = surgery.head_size(model)
    makers: dict[str, Callable[[], list[torch.Tensor]]] = {
        "heads": lambda: [one.sum(0).unflatten(0, (-1, size)).sum(1) for one, _ in squares],
        "ffn": lambda: [other.sum(0) for _, other in squares],
        "blocks": lambda: [torch.stack([one.sum(), other.sum()]) for one, other in squares],
        "layers": lambda: [torch.stack([one.sum() + other.sum() for one, other in squares])],
        "hidden": lambda: [torch.stack([one.sum(1) + other.sum(1) for one, other in squares]).sum(0)],
    }
    return {unit: [total.sqrt().cpu() for total in makers[unit]()] for unit in units}


def fisher(problem: Problem, model: PreTrainedModel, batches: Iterable[Batch], units: Sequence[str]) -> PerUnit:
    """Diagonal of the empirical Fisher information of the gates: mean over samples of `(dC/dgate)^2`. Half of it is what the
    loss rises by in the second order (LeCun 1989, OBD, with the Fisher in place of the Hessian; Kwon et al. 2022, eq. 5-7).
    """
    return _of_gradients(problem, model, batches, units, torch.square)


def gauss_newton(problem: Problem, model: PreTrainedModel, batches: Iterable[Batch], units: Sequence[str]) -> PerUnit:
    """Diagonal of the Gauss-Newton matrix of the gates: mean over samples of `sum over outputs of (doutput/dgate)^2`, which is
    what the outputs change by, squared, in the first order (Schraudolph 2002, section 3.1, with squared error on the outputs).

    Unlike the Fisher information it does not vanish on sentences of which a trained model is sure. The sum is estimated by one
    gradient, with a random sign for each output (Hutchinson 1989); for one output it is exact.
    """
    generator = torch.Generator().manual_seed(0)

    def projected(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        differentiated = problem.differentiated(outputs)
        signs = 2 * torch.randint(2, differentiated.shape, generator=generator) - 1
        return (differentiated * signs.to(outputs.device)).sum(1).mean()

    return _of_gradients(problem, model, batches, units, torch.square, projected)


def taylor(problem: Problem, model: PreTrainedModel, batches: Iterable[Batch], units: Sequence[str]) -> PerUnit:
    """First-order Taylor expansion: mean over samples of `|dC/dgate|` (Molchanov et al. 2017, eq. 7-8)."""
    return _of_gradients(problem, model, batches, units, torch.abs)


def activation_mean(model: PreTrainedModel, batches: Iterable[Batch], units: Sequence[str]) -> PerUnit:
    """Mean over tokens of a neuron's absolute activation; of a head, of its output's mean absolute value."""

    def mean(groups: torch.Tensor) -> torch.Tensor:
        return groups.abs().mean((0, 2))

    return _of_activations(model, batches, units, mean)


def apoz(model: PreTrainedModel, batches: Iterable[Batch], units: Sequence[str]) -> PerUnit:
    """Share of tokens for which a neuron is active: 1 - APoZ (Hu et al. 2016, eq. 1). GELU is never quite zero, so a neuron
    counts as active where its activation is positive."""

    def active(groups: torch.Tensor) -> torch.Tensor:
        return (groups > 0).float().mean((0, 2))

    return _of_activations(model, batches, units, active)


def similarity(model: PreTrainedModel, batches: Iterable[Batch], units: Sequence[str]) -> PerUnit:
    """1 - the largest absolute cosine with the output of another unit of the layer that is still there when the unit is
    removed: of two equal units one is removed first, and the other one then counts as unique (after Srinivas & Babu 2015, on
    outputs instead of weights). The repair lets the units that stay take over the weights of those that are removed."""
    written = magnitude(model, [], units)
    scores: PerUnit = {}
    for unit, products in _products_of_inputs(model, batches, units).items():
        _, features = _outputs(model, unit)
        alike = [product.unflatten(0, (-1, features)).unflatten(2, (-1, features)) for product in products]
        scores[unit] = [
            _doubles(products.diagonal(dim1=1, dim2=3).sum(-1).cpu(), norms)
            for products, norms in zip(alike, written[unit], strict=True)
        ]
    return scores


def _doubles(products: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Of the two most similar units, the one with the smaller output is removed, and the search goes on. Scores never fall.

    products: (units, units) of the units' outputs. norms: (units,) of the weights by which they write.
    """
    lengths = products.diagonal().sqrt().clamp(min=1e-150)
    cosines = (products / torch.outer(lengths, lengths)).abs().clamp(max=1).fill_diagonal_(-1)
    said = (lengths * norms).tolist()
    scores = torch.ones(len(said), dtype=products.dtype)
    nearest, other = cosines.max(1) if len(said) else (lengths, lengths)
    for _ in range(len(said) - 1):
        one = int(nearest.argmax())
        goes = min(one, int(other[one]), key=lambda unit: (said[unit], -unit))
        scores[goes] = 1 - nearest[one]
        cosines[goes], cosines[:, goes], nearest[goes] = -1, -1, -2
        lost = ((other == goes) & (nearest > -2)).nonzero().flatten()
        nearest[lost], other[lost] = cosines[lost].max(1)
    return scores


def obs_error(model: PreTrainedModel, batches: Iterable[Batch], units: Sequence[str]) -> PerUnit:
    """The share of a layer's output that is lost when units are removed one by one, the least important first, while the
    remaining weights compensate for each (Optimal Brain Surgeon on structures: Kurtic et al. 2023, ZipLM, eq. 3-4)."""
    scores: PerUnit = {}
    for unit, products in _products_of_inputs(model, batches, units).items():
        linears, features = _outputs(model, unit)
        scores[unit] = [
            obs.elimination(linear.weight.detach(), product, features).cpu()
            for linear, product in zip(linears, products, strict=True)
        ]
    return scores


def _products_of_inputs(model: PreTrainedModel, batches: Iterable[Batch], units: Sequence[str]) -> PerUnit:
    """`X X^T` of what flows into the output linears, (features, features), layer by layer."""
    names, depth = surgery.family(model), len(surgery.layers(model))
    leaf = {"heads": names.attention_out, "ffn": names.ffn_out}
    paths = {unit: [surgery.path(model, at, leaf[unit]) for at in range(depth)] for unit in units}
    products = input_products(model, [path for unit in units for path in paths[unit]], batches)
    return {unit: [products[path] for path in paths[unit]] for unit in units}


def _of_gradients(
    problem: Problem,
    model: PreTrainedModel,
    batches: Iterable[Batch],
    units: Sequence[str],
    function: Callable[[torch.Tensor], torch.Tensor],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> PerUnit:
    """A function of each gate's gradient on each sample, summed and divided by the number of labels: a sample's loss is the
    sum of the losses of its labels, which in most problems is one.

    loss: maps outputs and targets to the mean of the labels' losses; None: the problem's own.
    """
    totals = {unit: [torch.zeros(count) for count in counts(model, unit)] for unit in units}
    labels = 0
    model.eval()
    for batch in batches:
        gates = {
            unit: [torch.ones(len(batch), len(total), device=batch.labels.device, requires_grad=True) for total in totals[unit]]
            for unit in units
        }
        with gated(model, gates):
            # A sum of the samples' losses, so that each gate's gradient is that of its own sample.
            outputs = problem.outputs(model(**batch.inputs), batch)
            total_loss = (loss or problem.task_loss)(outputs, batch.labels) * len(batch.labels)
        flat = [gate for unit in units for gate in gates[unit]]
        gradients = iter(torch.autograd.grad(total_loss, flat, allow_unused=True, materialize_grads=True))
        for unit in units:
            for total in totals[unit]:
                total += function(next(gradients).float()).sum(0).cpu()
        labels += len(batch.labels)
    return {unit: [total / labels for total in totals[unit]] for unit in units}


@torch.no_grad()
def _of_activations(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    units: Sequence[str],
    function: Callable[[torch.Tensor], torch.Tensor],
) -> PerUnit:
    """A statistic of what flows into the output linears, mean over batches, each weighed by its real tokens.

    function: maps (tokens, units, features) to (units,).
    """
    totals = {unit: [torch.zeros(count) for count in counts(model, unit)] for unit in units}
    tokens = 0
    mask = torch.empty(0)
    handles = []
    for unit in units:
        linears, features = _outputs(model, unit)
        for total, linear in zip(totals[unit], linears, strict=True):

            def add(module, args, total=total, features=features) -> None:
                if len(total):
                    rows = args[0][mask].float()
                    total += function(rows.unflatten(1, (-1, features))).cpu() * len(rows)

            handles.append(linear.register_forward_pre_hook(add))
    try:
        model.eval()
        for batch in batches:
            mask = batch.inputs["attention_mask"].bool()
            model(**batch.inputs)
            tokens += int(mask.sum())
    finally:
        for handle in handles:
            handle.remove()
    return {unit: [total / tokens for total in totals[unit]] for unit in units}


def _outputs(model: PreTrainedModel, unit: str) -> tuple[list[nn.Linear], int]:
    """The linears whose inputs are heads or FFN neurons, layer by layer, and how many features one of them has."""
    return (surgery.attention_outputs(model), surgery.head_size(model)) if unit == "heads" else (surgery.ffn_outputs(model), 1)


OF_GRADIENTS = {"fisher": fisher, "gauss_newton": gauss_newton, "taylor": taylor}  # of the problem's loss or outputs
OTHERS: dict[str, Criterion] = {
    "magnitude": magnitude,
    "obs": obs_error,
    "activation_mean": activation_mean,
    "apoz": apoz,
    "similarity": similarity,
}


def criterion(name: str, problem: Problem) -> Criterion:
    """One of ours by its name, or a user's own by its dotted path.

    Raises: ConfigError when it can't be imported.
    """
    if name in OF_GRADIENTS:
        return functools.partial(OF_GRADIENTS[name], problem)
    return OTHERS[name] if name in OTHERS else locate(name)
