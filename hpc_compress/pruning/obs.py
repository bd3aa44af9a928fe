"""Optimal Brain Surgeon on structures: what an output linear loses when inputs are removed, and the refit of what is left.

Knows linears and what flows into them (`calibration`); nothing of budgets or training.

References:
    Kurtic, Frantar, Alistarh 2023, ZipLM: Inference-Aware Structured Pruning of Language Models, https://arxiv.org/abs/2302.04089
    Kwon et al. 2022, A Fast Post-Training Pruning Framework for Transformers, https://arxiv.org/abs/2204.09656
"""

import torch

from hpc_compress.calibration import damped, damped_inverse, ridge, solve_sparse
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


@torch.no_grad()
def fit(
    start: torch.Tensor, bias: torch.Tensor | None, inputs: torch.Tensor, wanted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights W and a bias b of least `||W x + b - t||^2 + ridge ||W - W_start||^2`, over tokens with inputs x and wanted
    outputs t. Without a bias there is none after it either. Weights that are 0 stay 0.

    start: (out, in). inputs: (tokens, in). wanted: (tokens, out).
    """
    mean_in, mean_out = inputs.double().mean(0), wanted.double().mean(0)
    if bias is None:
        mean_in, mean_out = torch.zeros_like(mean_in), torch.zeros_like(mean_out)
    x, t = inputs - mean_in.float(), wanted - mean_out.float()
    own, cross = (x.T @ x).double() / len(x), (t.T @ x).double() / len(x)
    old = start.double()
    goal, hessian = cross + ridge(own) * old if len(own) else cross, damped(own) if len(own) else own
    if zeros.mask(start) is None:
        fitted = torch.cholesky_solve(goal.T, torch.linalg.cholesky(hessian)).T
    else:
        fitted = solve_sparse(old, hessian, goal)
    if bias is not None:
        bias = (mean_out - fitted @ mean_in).to(bias.dtype)
    return fitted.to(start.dtype), bias
