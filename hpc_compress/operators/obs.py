"""Optimal Brain Surgeon, layer by layer: what a linear's outputs lose when inputs are removed or weights are rounded, and how
the remaining weights compensate. The Hessian of `||W X - W' X||^2` is `H = X X^T` (Frantar & Alistarh 2022, Optimal
Brain Compression, section 3). Knows linears, layers and batches; nothing of units, budgets or training.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hpc_compress.data.batches import Batch
from hpc_compress.models import packing, surgery

DAMPING = 0.01  # of the mean diagonal: a few hundred sentences leave H near singular (as Frantar et al. 2022, GPTQ)
STEPS = 10  # of conjugate gradients; on MiniLM's linears as good as the exact solution


@torch.no_grad()
def input_products(model: PreTrainedModel, paths: Sequence[str], batches: Iterable[Batch]) -> dict[str, torch.Tensor]:
    """`X X^T` of what flows into each linear, padding left out.

    Returns: (in_features, in_features) float64 on the model's device, by dotted path.
    """
    model.eval()
    batches = list(batches)
    return _products(model, paths, batches, lambda index: model(**batches[index].inputs))


def _products(
    model: PreTrainedModel, paths: Sequence[str], batches: Sequence[Batch], run: Callable[[int], Any]
) -> dict[str, torch.Tensor]:
    """As `input_products`. run: computes the linears for the batch of this number."""
    totals: dict[str, torch.Tensor] = {}
    mask = torch.empty(0)

    def hook(path: str):
        def add(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            # DeBERTa's queries and keys read relative positions too, of another shape than the texts.
            rows = (args[0][mask] if args[0].shape[:-1] == mask.shape else args[0].flatten(0, -2)).float()
            product = (rows.T @ rows).double()
            totals[path] = totals[path] + product if path in totals else product

        return add

    with ExitStack() as stack:
        for path in paths:
            stack.callback(model.get_submodule(path).register_forward_pre_hook(hook(path)).remove)
        for index, batch in enumerate(batches):
            mask = batch.inputs["attention_mask"].bool()
            run(index)
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


def solve_sparse(start: torch.Tensor, hessian: torch.Tensor, wanted: torch.Tensor, steps: int = STEPS) -> torch.Tensor:
    """Rows W of least `tr(W H W^T) / 2 - tr(W B^T)`, `B = wanted`, among those with the zeros of `start`: without zeros
    `W H = B`. A system for each row, all solved together by conjugate gradients with the diagonal as preconditioner.

    start, wanted: (rows, columns). hessian: (columns, columns).
    """
    stays = (start != 0).to(hessian)
    residual = (wanted - start @ hessian) * stays  # half the negative gradient
    scaled = residual / hessian.diagonal()
    direction, squared = scaled, (residual * scaled).sum(1, keepdim=True)
    for _ in range(steps):
        product = (direction @ hessian) * stays
        # A row that is solved has no direction any more.
        length = squared / (direction * product).sum(1, keepdim=True).clamp(min=1e-300)
        start = start + length * direction
        residual = residual - length * product
        scaled = residual / hessian.diagonal()
        before, squared = squared, (residual * scaled).sum(1, keepdim=True)
        direction = scaled + squared / before.clamp(min=1e-300) * direction
    return start


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
class Site:
    """A linear that writes into the residual stream, and what is looked at there."""

    layer: int
    linear: str  # dotted path
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


class Walk:
    """Runs a model over some batches layer by layer, and computes no earlier layer again. So the weights of a layer may
    change until the walk goes on to the next one."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        self.model, self.batches = model.eval(), batches
        self.layer = 0
        self._outputs: list[Any] = [None] * len(batches)  # of the layer before, for each batch

    def go_to(self, layer: int) -> None:
        if layer > self.layer:
            reached = [self._run(batch, surgery.layers(self.model)[layer - 1])[1] for batch in range(len(self.batches))]
            self.layer, self._outputs = layer, reached

    def inputs(self, batch: int, site: Site) -> tuple[torch.Tensor, torch.Tensor]:
        """What flows into the linear, and the stream that its output is added to; both (tokens, features), padding left out."""
        seen: list[torch.Tensor] = []

        def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        linear = self.model.get_submodule(site.linear)
        stream = self.model.get_submodule(site.stream) if site.stream else linear
        handle = stream.register_forward_pre_hook(look, with_kwargs=True)
        try:
            flows_in, _ = self._run(batch, linear)
        finally:
            handle.remove()
        mask = self.batches[batch].inputs["attention_mask"].bool()
        return flows_in[mask].float(), seen[0][mask].float()

    def output(self, batch: int, module: nn.Module) -> torch.Tensor:
        """What a module in the layer that was reached makes, padding left out."""
        return self._run(batch, module)[1][self.batches[batch].inputs["attention_mask"].bool()]

    @torch.no_grad()
    def products(self, layer: int, paths: Sequence[str]) -> dict[str, torch.Tensor]:
        """`input_products` of linears in this layer, to which the walk goes."""
        self.go_to(layer)
        last = surgery.layers(self.model)[layer]
        return _products(self.model, paths, self.batches, lambda batch: self._run(batch, last)) if paths else {}

    def _run(self, batch: int, last: nn.Module) -> tuple[Any, Any]:
        """From the layer that was reached through the module `last`, and no further: its first input and its output."""
        seen: list[Any] = []

        def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            seen.extend((args[0] if args else kwargs["hidden_states"], output))
            raise _ReachedError

        behind = surgery.layers(self.model)[: self.layer]
        handle = last.register_forward_hook(stop, with_kwargs=True)
        try:
            for module in behind:
                module.forward = lambda *args, **kwargs: self._outputs[batch]
            with suppress(_ReachedError):
                self.model(**self.batches[batch].inputs)
        finally:
            handle.remove()
            for module in behind:
                del module.forward
        return seen[0], seen[1]


class _ReachedError(Exception):
    """What was looked for has been seen; the rest of the forward pass is not needed."""


@torch.no_grad()
def moments(before: Walk, at: Site, after: Walk, now: Site) -> Moments:
    """Both walks, over the same batches, go to the linear in question."""
    before.go_to(at.layer)
    after.go_to(now.layer)
    totals: list[torch.Tensor] = []
    tokens = 0
    for batch in range(len(before.batches)):
        (x, lost), (y, left) = before.inputs(batch, at), after.inputs(batch, now)
        drift = lost - left if at.stream and now.stream else x[:, :0]
        parts = [part.double() for part in (x.T @ y, y.T @ y, drift.T @ y, x.sum(0), y.sum(0), drift.sum(0))]
        totals = [total + part for total, part in zip(totals, parts, strict=True)] if totals else parts
        tokens += len(x)
    cross, own, drift, mean_before, mean_after, mean_drift = (total / tokens for total in totals)
    if before.model.get_submodule(at.linear).bias is not None:
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
    if packing.zeros(weight) is None:
        fitted = torch.cholesky_solve(wanted.T, torch.linalg.cholesky(hessian)).T
    else:
        fitted = solve_sparse(start, hessian, wanted)
    if bias is not None:
        shifted = bias.double() + weight.double() @ seen.mean_before - fitted @ seen.mean_after
        bias = (shifted + seen.mean_drift if len(seen.drift) else shifted).to(bias.dtype)
    return fitted.to(weight.dtype), bias
