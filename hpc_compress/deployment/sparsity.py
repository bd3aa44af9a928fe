"""Zeros in the encoder's linears: which weights become 0, and how the others compensate. Knows linears and what flows into
them; nothing of how zeros are saved or run.

Weights are (out_features, in_features), as a linear holds them.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from hpc_compress import calibration
from hpc_compress.data.batches import Batch
from hpc_compress.models import surgery
from hpc_compress.models.modeling_hpc_compress import linear_of

Pattern = Literal["unstructured", "2:4"]
BLOCK = 128  # input columns among which the weights to go are chosen at once, as in SparseGPT
ROUNDS = 30  # of the search for an order of columns; each one looks at every column once


@torch.no_grad()
def sparsify(
    model: PreTrainedModel,
    pattern: Pattern,
    share: float,
    batches: Sequence[Batch] | None = None,
    seed: int | None = None,
) -> None:
    """Set weights of all linears in the encoder to 0, in place. Where 2:4 does not fit (inputs no multiple of 4), none.

    share: of the weights of each linear; 2:4 is always a half.
    batches: what Optimal Brain Surgeon measures the outputs on; None: the smallest weights become 0.
    seed: of the search for an order of inputs that keeps more in 2:4; None: they stay in their order.
    """
    if seed is not None:
        _reorder(model, np.random.default_rng(seed))
    walk = calibration.Walk(model, batches or [])
    for index, layer in enumerate(surgery.layers(model)):
        linears = {path: linear_of(layer, path) for path in surgery.family(model).linears}
        linears = {path: linear for path, linear in linears.items() if _fits(linear, pattern)}
        if batches is None:
            for linear in linears.values():
                linear.weight.copy_(magnitude(linear.weight, pattern, share))
            continue
        # Layer after layer, so that each one is fitted to what the sparse ones before it give.
        paths = {surgery.path(model, index, path): linear for path, linear in linears.items()}
        for path, product in walk.products(index, list(paths)).items():
            weight = paths[path].weight
            sparse = surgeon(weight, product, pattern, share)
            weight.copy_(refitted(weight, sparse, product))


def _fits(linear: nn.Linear, pattern: Pattern) -> bool:
    return linear.weight.numel() > 0 and (pattern == "unstructured" or linear.in_features % 4 == 0)


def magnitude(weight: torch.Tensor, pattern: Pattern, share: float) -> torch.Tensor:
    """The weights without those of the smallest absolute value."""
    if pattern == "unstructured":
        return weight.masked_fill(_smallest(weight.abs(), round(share * weight.numel())), 0)
    return weight.masked_fill(_two_of_four(weight.abs()), 0)


def surgeon(weight: torch.Tensor, product: torch.Tensor, pattern: Pattern, share: float) -> torch.Tensor:
    """Optimal Brain Surgeon for a linear with inputs of `product = X X^T`, column by column, as SparseGPT (Frantar &
    Alistarh 2023, algorithm 1): with F the columns from j on, weight j of a row costs `w_j^2 / [H_F^-1]_jj`, and when it goes,
    the later ones change by `-(w_j / [H_F^-1]_jj) [H_F^-1]_j` (Frantar & Alistarh 2022, eq. 3). One H^-1 serves all rows.

    product: (in_features, in_features). Returns: the new weights, (out_features, in_features), in double precision.
    """
    # Row j of the upper Cholesky factor of H^-1 is row j of H_F^-1, divided by the root of its first element.
    factor = torch.linalg.cholesky(calibration.damped_inverse(product.double()), upper=True)
    roots = factor.diagonal()
    weight = weight.to(factor, copy=True)
    rows, columns = weight.shape
    gone = 0
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        removed = torch.zeros(rows, end - start, dtype=torch.bool, device=weight.device)
        errors = torch.zeros(rows, end - start, dtype=weight.dtype, device=weight.device)
        for column in range(start, end):
            at = column - start
            if pattern == "unstructured" and at == 0:
                count = round(share * rows * end) - gone  # of all columns so far, so that the whole share is exact
                removed = _smallest((weight[:, start:end] / roots[start:end]).abs(), count)
                gone += count
            elif pattern == "2:4" and at % 4 == 0:
                group = slice(column, column + 4)
                removed[:, at : at + 4] = _two_of_four((weight[:, group] / roots[group]).abs())
            errors[:, at] = torch.where(removed[:, at], weight[:, column] / roots[column], 0)
            weight[:, column:end] -= errors[:, at, None] * factor[column, column:end]
        weight[:, start:end].masked_fill_(removed, 0)
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight


def refitted(weight: torch.Tensor, sparse: torch.Tensor, product: torch.Tensor, steps: int = calibration.STEPS) -> torch.Tensor:
    """The weights that are left in `sparse`, brought nearer to the least squares fit of the dense linear's outputs.

    That fit is what OBS gives when all of a row's weights go at once (Frantar & Alistarh 2022, section 4, group OBS); column
    by column, no weight can make up for one that goes later. On MiniLM's linears at 50 % the error ends up a third lower.

    Returns: new weights with the zeros of `sparse`, (out_features, in_features), in double precision.
    """
    hessian = calibration.damped(product.double())
    return calibration.solve_sparse(sparse.to(hessian), hessian, weight.to(hessian) @ hessian, steps)


def _smallest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Where the `count` smallest of all scores are."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().argsort(stable=True)[:count]] = True
    return mask.view(scores.shape)


def _two_of_four(scores: torch.Tensor) -> torch.Tensor:
    """Where the two smallest scores of each four neighbouring columns are."""
    groups = scores.unflatten(1, (-1, 4))
    order = groups.argsort(dim=-1, stable=True)[..., :2]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).flatten(1)


# --- the order of inputs ---


def _reorder(model: PreTrainedModel, generator: np.random.Generator) -> None:
    """Put FFN neurons, and the value features of each head, in an order in which 2:4 keeps more of the output linears.

    The model computes the same: what makes a feature moves along with what reads it. Inputs of the other linears are
    the residual stream, which all layers share, or must match in query and key; they stay.
    """
    names, size = surgery.family(model), surgery.head_size(model)
    for layer in surgery.layers(model):
        attention, ffn = linear_of(layer, names.attention_out), linear_of(layer, names.ffn_out)
        if size % 4 == 0 and attention.in_features:
            heads = attention.weight.split(size, dim=1)
            order = torch.cat([best_order(head.abs(), generator) + at * size for at, head in enumerate(heads)])
            _permute(linear_of(layer, names.value), attention, order, last=True)
        if ffn.in_features % 4 == 0 and ffn.in_features:
            _permute(linear_of(layer, names.ffn_in), ffn, best_order(ffn.weight.abs(), generator))


def _permute(maker: nn.Linear, reader: nn.Linear, order: torch.Tensor, last: bool = False) -> None:
    """Reorder the rows of the linear that makes features, and the columns of the one that reads them.

    The maker may hold several blocks of rows, such as an FFN's inputs and gates; last: only the last of them makes these
    features, as values do beside queries and keys.
    """
    rows = torch.arange(maker.out_features, device=order.device).view(-1, len(order))
    moved = rows[:, order]
    rows = torch.cat([rows[:-1], moved[-1:]]).flatten() if last else moved.flatten()
    maker.weight.copy_(maker.weight[rows])
    if maker.bias is not None:
        maker.bias.copy_(maker.bias[rows])
    reader.weight.copy_(reader.weight[:, order])


# The 35 ways to split eight columns into two groups of four, the first one as they stand.
SPLITS = [
    [0, *three, *(column for column in range(1, 8) if column not in three)] for three in itertools.combinations(range(1, 8), 3)
]


def best_order(magnitudes: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """An order of the columns in which the two largest of each four neighbours sum up to more (Pool & Yu 2021, who search
    greedily over all pairs of groups; here the pairs are drawn, and each is split in the best of its 35 ways).

    magnitudes: (rows, columns), columns a multiple of 4. Returns: (columns,), what stands where.
    """
    columns = magnitudes.T.contiguous()
    order = torch.arange(len(columns), device=columns.device)
    splits = torch.tensor(SPLITS, device=columns.device)
    groups = len(columns) // 4
    for _ in range(ROUNDS if groups > 1 else 0):
        drawn = torch.from_numpy(generator.permutation(groups)[: groups // 2 * 2].reshape(-1, 2)).to(columns.device)
        pairs = order.view(-1, 4)[drawn].flatten(1)  # (pairs, 8)
        eight = columns[pairs].unbind(1)  # each (pairs, rows)
        kept = [
            _two_largest(*(eight[at] for at in split[:4])) + _two_largest(*(eight[at] for at in split[4:])) for split in SPLITS
        ]
        best = splits[torch.stack(kept).argmax(0)]  # (pairs, 8)
        order.view(-1, 4)[drawn] = pairs.gather(1, best).unflatten(1, (2, 4))
    return order


def _two_largest(one: torch.Tensor, two: torch.Tensor, three: torch.Tensor, four: torch.Tensor) -> torch.Tensor:
    """The sum over rows of the two largest of four: (pairs,) from (pairs, rows). They are in two halves, or both in one."""
    apart = torch.maximum(one, two) + torch.maximum(three, four)
    return torch.maximum(apart, torch.maximum(one + two, three + four)).sum(1, dtype=torch.float64)
