"""What flows into the linears of an encoder on some sentences, and least squares on it.

Pruning (OBS), rounding (GPTQ) and zeros (SparseGPT) share this. Each of them keeps the outputs of a linear as they are: it
minimises `||W X - W' X||^2`, whose Hessian is `H = X X^T` (Frantar & Alistarh 2022, Optimal Brain Compression, section 3,
https://arxiv.org/abs/2208.11580). Knows linears, layers and batches; nothing of units, codes or training.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hpc_compress.data.batches import Batch
from hpc_compress.models import surgery

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

    def inputs(self, batch: int, path: str, stream_path: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """What flows into the linear at `path`, and into the module at `stream_path` (None: the same linear).

        Returns: (tokens, features) each, padding left out.
        """
        seen: list[torch.Tensor] = []

        def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        linear = self.model.get_submodule(path)
        stream = self.model.get_submodule(stream_path) if stream_path else linear
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
