"""Optimal Brain Surgeon, layer by layer: what a linear's outputs lose when inputs are taken from it or its weights are rounded,
and how what is left makes up for it. The Hessian of `||W X - W' X||^2` is `H = X X^T` (Frantar & Alistarh 2022, Optimal
Brain Compression, section 3). Knows linears and batches; nothing of units, budgets or training.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from hpc_compress.data.batches import Batch

DAMPING = 0.01  # of the mean diagonal: a few hundred sentences leave H near singular (as Frantar et al. 2022, GPTQ)


@torch.no_grad()
def input_products(model: PreTrainedModel, paths: Sequence[str], batches: Iterable[Batch]) -> dict[str, torch.Tensor]:
    """`X X^T` of what flows into each linear, padding left out.

    Returns: (in_features, in_features) float64 on the model's device, by dotted path.
    """
    totals: dict[str, torch.Tensor] = {}
    mask = torch.empty(0)

    def hook(path: str):
        def add(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            # DeBERTa's queries and keys read relative positions too, of another shape than the texts.
            rows = (args[0][mask] if args[0].shape[:-1] == mask.shape else args[0].flatten(0, -2)).float()
            product = (rows.T @ rows).double()
            totals[path] = totals[path] + product if path in totals else product

        return add

    model.eval()
    with ExitStack() as stack:
        for path in paths:
            stack.callback(model.get_submodule(path).register_forward_pre_hook(hook(path)).remove)
        for batch in batches:
            mask = batch.inputs["attention_mask"].bool()
            model(**batch.inputs)
    return totals


def damped_inverse(hessian: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """`(H + damping * mean(diag H) * I)^-1`; a feature that is always 0 gets a diagonal of the mean."""
    return torch.cholesky_inverse(torch.linalg.cholesky(damped(hessian, damping)))


def damped(hessian: torch.Tensor, damping: float | None = None) -> torch.Tensor:
    """`H + damping * mean(diag H) * I`; by default `DAMPING`."""
    return hessian + ridge(hessian, damping) * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)


def ridge(hessian: torch.Tensor, damping: float | None = None) -> torch.Tensor:
    """What `damped` adds to the diagonal."""
    return (DAMPING if damping is None else damping) * hessian.diagonal().mean().clamp(min=1e-12)


def elimination(weight: torch.Tensor, hessian: torch.Tensor, features: int = 1, rounds: int = 64) -> torch.Tensor:
    """Greedy removal of groups of input features, with the update of the rest after each (Kurtic et al. 2023, ZipLM, eq. 3-4):
    group S costs `tr(W_S ([H^-1]_SS)^-1 W_S^T)`. Of more than `rounds` groups several go at once.

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
class Site:
    """A linear that writes into the residual stream, and what is looked at there."""

    linear: str  # dotted path
    stream: str | None = None  # the module whose input is the stream that the linear's output is added to; None: not looked at


@dataclass(frozen=True)
class Moments:
    """Of the inputs X of a linear before a cut and Y after it, over the same tokens; float64. They are about the means where
    the linear has a bias, which takes these up."""

    cross: torch.Tensor  # (before, after): X Y^T
    own: torch.Tensor  # (after, after): Y Y^T
    drift: torch.Tensor  # (out, after): D Y^T, D what the stream has lost on its way here; 0 when it was not looked at
    mean_before: torch.Tensor  # (before,)
    mean_after: torch.Tensor  # (after,)
    mean_drift: torch.Tensor  # (out,)


@torch.no_grad()
def moments(before: PreTrainedModel, at: Site, after: PreTrainedModel, now: Site, batches: Iterable[Batch]) -> Moments:
    """Run both models as far as the linear in question."""
    totals: list[torch.Tensor] = []
    tokens = 0
    for batch in batches:
        mask = batch.inputs["attention_mask"].bool()
        x, lost = (seen[mask].double() for seen in _inputs(before, at, batch))
        y, left = (seen[mask].double() for seen in _inputs(after, now, batch))
        drift = lost - left if at.stream and now.stream else torch.zeros_like(x[:, :0])
        parts = [x.T @ y, y.T @ y, drift.T @ y, x.sum(0), y.sum(0), drift.sum(0)]
        totals = [total + part for total, part in zip(totals, parts, strict=True)] if totals else parts
        tokens += len(x)
    cross, own, drift, mean_before, mean_after, mean_drift = (total / tokens for total in totals)
    if before.get_submodule(at.linear).bias is not None:
        cross, own = cross - torch.outer(mean_before, mean_after), own - torch.outer(mean_after, mean_after)
        drift = drift - torch.outer(mean_drift, mean_after)
    return Moments(cross, own, drift, mean_before, mean_after, mean_drift)


class _ReachedError(Exception):
    """What was looked for has been seen; the rest of the forward pass is not needed."""


def _inputs(model: PreTrainedModel, site: Site, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What flows into the linear, and the stream that its output is added to; both (batch, tokens, features)."""
    seen: list[torch.Tensor] = []

    def look(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    def stop(module: torch.nn.Module, args: tuple) -> None:
        seen.append(args[0])
        raise _ReachedError

    with ExitStack() as hooks:
        if site.stream is not None:
            hooks.callback(model.get_submodule(site.stream).register_forward_pre_hook(look, with_kwargs=True).remove)
        hooks.callback(model.get_submodule(site.linear).register_forward_pre_hook(stop).remove)
        hooks.enter_context(suppress(_ReachedError))
        model.eval()
        model(**batch.inputs)
    return seen[-1], seen[0]


def refit(
    weight: torch.Tensor, bias: torch.Tensor | None, seen: Moments, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weights on the kept input features, and the bias, that come nearest to what the linear said before the cut, and to
    what the stream has lost since: `argmin ||W X + b + D - W' Y - b'||^2 + ridge ||W' - W_kept||^2` (Kwon et al. 2022,
    section 4.3, with the ridge towards the old weights in place of one towards 0).

    weight: (out, before). kept: (after,) positions of the features that are left.
    """
    wanted = weight.double() @ seen.cross + ridge(seen.own) * weight[:, kept].double()
    if len(seen.drift):
        wanted = wanted + seen.drift
    fitted = torch.cholesky_solve(wanted.T, torch.linalg.cholesky(damped(seen.own))).T
    if bias is not None:
        shifted = bias.double() + weight.double() @ seen.mean_before - fitted @ seen.mean_after
        bias = (shifted + seen.mean_drift if len(seen.drift) else shifted).to(bias.dtype)
    return fitted.to(weight.dtype), bias
