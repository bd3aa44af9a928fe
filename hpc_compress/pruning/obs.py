"""Optimal Brain Surgeon on structures: what an output linear loses when inputs are removed, and the refit of what is left.

Knows linears and what flows into them (`calibration`); nothing of budgets or training.

References:
    Kurtic, Frantar, Alistarh 2023, ZipLM: Inference-Aware Structured Pruning of Language Models, https://arxiv.org/abs/2302.04089
    Kwon et al. 2022, A Fast Post-Training Pruning Framework for Transformers, https://arxiv.org/abs/2204.09656
"""

from dataclasses import dataclass

import torch

from hpc_compress.calibration import Walk, damped, damped_inverse, ridge, solve_sparse
from hpc_compress.models import zeros


def elimination(weight: torch.Tensor, hessian: torch.Tensor, features: int = 1, rounds: int = 64) -> torch.Tensor:
    """Greedy removal of groups of input features, with the update of the rest after each (Kurtic et al. 2023, ZipLM, eq. 3-4):
    group S costs `tr(W_S ([H^-1]_SS)^-1 W_S^T)`. With more than `rounds` groups, several are removed at once.

    weight: (out, groups * features). hessian: (in, in).

    Returns: (groups,) the error that each removal adds, as a share of the output's energy, never falling: the sum of the k
    smallest estimates the error without those k groups.
    """
    groups = weight.shape[1] // features
    left, inverse = weight.double(), damped_inverse(hessian)
    energy = ((left @ hessian) * left).sum().clamp(min=1e-300)
    alive = torch.arange(groups, device=weight.device)
    errors = torch.zeros(groups, dtype=torch.float64, device=weight.device)
    least = errors.new_zeros(())
    at_once = max(1, -(-groups // rounds))
    while len(alive):
        blocks = left.unflatten(1, (-1, features))  # (out, alive, features)
        own = inverse.unflatten(0, (-1, features)).unflatten(2, (-1, features)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        loss = torch.einsum("oga,gab,ogb->g", blocks, torch.linalg.inv(own), blocks) / energy
        order = loss.argsort()[:at_once]
        errors[alive[order]] = torch.cummax(torch.maximum(loss[order], least), 0).values
        least = errors[alive[order[-1]]]
        stays = torch.ones(len(alive), dtype=torch.bool, device=weight.device)
        stays[order] = False
        kept = stays.repeat_interleave(features)
        step = torch.linalg.solve(inverse[~kept][:, ~kept], inverse[~kept])  # (gone, in)
        left = (left - left[:, ~kept] @ step)[:, kept]
        inverse = (inverse - inverse[:, ~kept] @ step)[kept][:, kept]
        alive = alive[stays]
    return errors


@dataclass(frozen=True)
class OutputLinear:
    """A linear that writes into the residual stream, and what is looked at there."""

    layer: int
    path: str  # dotted
    stream: str | None = None  # the module whose input is the stream that the linear's output is added to; None: not looked at


@dataclass(frozen=True)
class Moments:
    """Of the inputs X of a linear before a cut and Y after it, over the same tokens; float64. The means are subtracted where
    the linear has a bias, which takes them up."""

    cross: torch.Tensor  # (before, after): X Y^T
    own: torch.Tensor  # (after, after): Y Y^T
    drift: torch.Tensor  # (out, after): D Y^T, D what the stream has lost on its way here; 0 when it was not looked at
    mean_before: torch.Tensor  # (before,)
    mean_after: torch.Tensor  # (after,)
    mean_drift: torch.Tensor  # (out,)


@torch.no_grad()
def moments(before: Walk, at: OutputLinear, after: Walk, now: OutputLinear) -> Moments:
    """Both walks, over the same batches, go to the linear in question."""
    before.go_to(at.layer)
    after.go_to(now.layer)
    totals: list[torch.Tensor] = []
    tokens = 0
    for batch in range(len(before.batches)):
        (x, lost), (y, left) = before.inputs(batch, at.path, at.stream), after.inputs(batch, now.path, now.stream)
        drift = lost - left if at.stream and now.stream else x[:, :0]
        parts = [part.double() for part in (x.T @ y, y.T @ y, drift.T @ y, x.sum(0), y.sum(0), drift.sum(0))]
        totals = [total + part for total, part in zip(totals, parts, strict=True)] if totals else parts
        tokens += len(x)
    cross, own, drift, mean_before, mean_after, mean_drift = (total / tokens for total in totals)
    if before.model.get_submodule(at.path).bias is not None:
        cross, own = cross - torch.outer(mean_before, mean_after), own - torch.outer(mean_after, mean_after)
        drift = drift - torch.outer(mean_drift, mean_after)
    return Moments(cross, own, drift, mean_before, mean_after, mean_drift)


def refit(
    weight: torch.Tensor, bias: torch.Tensor | None, seen: Moments, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weights on the kept input features, and the bias, that best reproduce the output of the linear before the cut, and
    add what the stream has lost since: `argmin ||W X + b + D - W' Y - b'||^2 + ridge ||W' - W_kept||^2` (Kwon et al. 2022,
    section 4.3, with the ridge towards the old weights in place of one towards 0). Weights that are 0 stay 0.

    weight: (out, before). kept: (after,) positions of the features that are left.
    """
    start = weight[:, kept].double()
    wanted = weight.double() @ seen.cross + ridge(seen.own) * start
    if len(seen.drift):
        wanted = wanted + seen.drift
    hessian = damped(seen.own)
    if zeros.mask(weight) is None:
        fitted = torch.cholesky_solve(wanted.T, torch.linalg.cholesky(hessian)).T
    else:
        fitted = solve_sparse(start, hessian, wanted)
    if bias is not None:
        shifted = bias.double() + weight.double() @ seen.mean_before - fitted @ seen.mean_after
        bias = (shifted + seen.mean_drift if len(seen.drift) else shifted).to(bias.dtype)
    return fitted.to(weight.dtype), bias
