"""K-prune, a peer: structured cuts without training. Written from the paper's mathematics for any encoder that `surgery` cuts.

Sublayer after sublayer, from the bottom to the top: measure what every head and neuron above knows, search for the units that
stay within the budget, cut this sublayer, and refit its output weights so that the residual stream is the dense model's again.

The normalisations are those of the authors' code (github.com/snudm-starlab/K-prune), since lambda and mu depend on them. What
differs from that code: the budget counts parameters instead of FLOPs, as our cuts do (a head costs 64 neurons by parameters of
MiniLM, 65 to 70 by FLOPs); the least squares are solved in double precision; a sublayer that loses all units keeps its bias.

References:
    Park, Choi, Kang 2024, Accurate Retraining-free Pruning for Pretrained Encoder-based Language Models, ICLR 2024,
    https://arxiv.org/abs/2308.03449
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from hpc_compress.data.batches import Batch, eval_batches
from hpc_compress.models import surgery
from hpc_compress.models.gates import counts
from hpc_compress.models.modeling_hpc_compress import linear_of
from hpc_compress.operators import Context
from hpc_compress.problems import PROBLEMS

SENTENCES = 512  # as many as our criteria and repairs see
TOKENS = 100_000  # as many as the authors' script asks for
SMALL_LAMBDA = 1e-5


@dataclass(frozen=True)
class Sublayer:
    """The attention or the FFN of a layer."""

    layer: int
    unit: str  # "heads" or "ffn"

    def output(self, model: PreTrainedModel) -> nn.Linear:
        return linear_of(surgery.layers(model)[self.layer], self._name(model))

    def stream(self, model: PreTrainedModel) -> nn.Module:
        """The module whose input is what the sublayer's output is added to."""
        return model.get_submodule(surgery.stream(model, self.layer, self._name(model)))

    def features(self, model: PreTrainedModel) -> int:
        """Inputs of the output linear that belong to one unit."""
        return surgery.head_size(model) if self.unit == "heads" else 1

    def cut(self, model: PreTrainedModel, stays: np.ndarray) -> None:
        remove = surgery.prune_heads if self.unit == "heads" else surgery.prune_ffn
        remove(model, self.layer, np.flatnonzero(~stays).tolist())

    def _name(self, model: PreTrainedModel) -> str:
        names = surgery.family(model)
        return names.attention_out if self.unit == "heads" else names.ffn_out


@dataclass(frozen=True)
class KPrune:
    """The defaults are those of the authors' README and script. Their program's own default of lambda is `SMALL_LAMBDA`."""

    sentences: int | None = SENTENCES  # None: as many as have `TOKENS` tokens
    temperature: float = 2.0  # gamma in the paper
    representational: float = 2.5e-4  # lambda: weight of the representational knowledge beside the predictive one
    mu: float = 64.0  # weight of heads beside neurons

    def __call__(self, model: PreTrainedModel, context: Context, share: float) -> PreTrainedModel:
        """Cut the model in place until at most 1 - share of the encoder's parameters are left."""
        model.eval()
        per_unit = dict(zip(("heads", "ffn"), surgery.unit_parameters(model), strict=True))
        budget = sum(per_unit[unit] * sum(counts(model, unit)) for unit in per_unit) - share * surgery.encoder_parameters(model)
        self._cut(model, _Sample(model, context, self._batches(context)), per_unit, budget)
        return model.requires_grad_(True)

    def _batches(self, context: Context) -> list[Batch]:
        if self.sentences is not None:
            return context.batches(self.sentences)
        enough = 1 + int(np.searchsorted(np.cumsum(context.train.lengths), TOKENS))
        return [batch.to(context.device) for batch in eval_batches(context.train.take(enough), 32)]

    def _cut(self, model: PreTrainedModel, sample: "_Sample", per_unit: dict[str, int], budget: float) -> None:
        whole = True
        above = [Sublayer(layer, unit) for layer in range(len(surgery.layers(model))) for unit in ("heads", "ffn")]
        while above:
            here = above[0]
            model.requires_grad_(False)  # else the graph would begin at the embeddings, and not at the first mask
            seen = sample.walk(model, above, self.temperature)
            weight = {"heads": self.mu / per_unit["heads"], "ffn": 1 / per_unit["ffn"]}
            scores = [
                weight[at.unit] * _of_units(predictive + self.representational * representational, at.features(model))
                for at, predictive, representational in zip(above, seen.predictive, seen.representational, strict=True)
            ]
            stays = _staying(scores, [per_unit[at.unit] for at in above], budget)[0]
            budget -= int(stays.sum()) * per_unit[here.unit]
            whole = whole and bool(stays.all())
            here.cut(model, stays)
            if not whole and stays.any():  # as long as nothing is gone, the weights are a solution already
                self._tune(here.output(model), torch.from_numpy(stays).repeat_interleave(here.features(model)), seen)
            above = above[1:]

    @staticmethod
    @torch.no_grad()
    def _tune(linear: nn.Linear, stays: torch.Tensor, seen: "_Seen") -> None:
        """Weights W of least `||X_dense - (X + b + W f)||^2`: the stream after the sublayer, its drift so far included. The
        bias stays."""
        own = cross = torch.zeros((), dtype=torch.float64)
        for rows, missing in zip(seen.features, seen.missing, strict=True):
            left = rows[:, stays.to(rows.device)]
            own, cross = own + (left.T @ left).double().cpu(), cross + (left.T @ missing).double().cpu()
        linear.weight.copy_(torch.linalg.lstsq(own, cross).solution.T)


@dataclass
class _Seen:
    """What one pass over the sample has found of the sublayers above, the first of which is to be cut."""

    predictive: list[torch.Tensor]  # (in_features,) of each output linear
    representational: list[torch.Tensor]
    features: list[torch.Tensor]  # (tokens, in_features) batch by batch, of the first sublayer
    missing: list[torch.Tensor]  # (tokens, hidden) what its output, without the bias, should be


class _Sample:
    """Sentences, and what the dense model makes of them. Layers that are cut already are not computed again."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, context: Context, batches: Sequence[Batch]) -> None:
        self.problem, self.batches = context.problem, batches
        self.masks = [batch.inputs["attention_mask"].bool() for batch in batches]
        self.tokens, self.sentences = sum(int(mask.sum()) for mask in self.masks), sum(map(len, batches))
        self._behind: list[Any] = [None] * len(batches)  # what the last finished layer returned
        self._answers: list[torch.Tensor] = []
        self._wanted: list[dict[Sublayer, torch.Tensor]] = []  # (tokens, hidden) the stream after each sublayer
        all_ = [Sublayer(layer, unit) for layer in range(len(surgery.layers(model))) for unit in ("heads", "ffn")]
        with ExitStack() as hooks:
            streams, outputs = _inputs_of(model, all_, hooks), {}
            for at in all_:
                hooks.callback(at.output(model).register_forward_hook(_keeping(outputs, at)).remove)
            for batch, mask in zip(batches, self.masks, strict=True):
                self._answers.append(self.problem.outputs(model(**batch.inputs), batch))
                self._wanted.append({at: streams[at][mask] + outputs[at][mask] for at in all_})

    def walk(self, model: PreTrainedModel, above: Sequence[Sublayer], temperature: float) -> _Seen:
        """The knowledge of every unit above.

        Predictive: half the squared gradient of the divergence from the dense model's answers by a mask on the unit, the
        diagonal of the Fisher information for the Hessian. Representational: the squared norm of what the unit writes.
        """
        here, layers = above[0], surgery.layers(model)
        linears = [at.output(model) for at in above]
        seen = _Seen(*([torch.zeros(linear.in_features) for linear in linears] for _ in range(2)), [], [])
        masks: list[torch.Tensor] = []
        inputs: dict[Sublayer, torch.Tensor] = {}
        lane = 0

        def masked(number: int) -> Any:
            def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
                inputs[above[number]] = args[0].detach()
                return args[0] * masks[number]

            return hook

        def note(module: nn.Module, args: Any, output: Any) -> None:
            self._behind[lane] = output

        finished = here.layer - (here.unit == "heads")  # layers whose output is known; the one after them may be new
        with ExitStack() as hooks:
            for number in range(finished):
                layers[number].forward = lambda *args, **kwargs: self._behind[lane]
                hooks.callback(layers[number].__dict__.pop, "forward")
            if here.unit == "heads" and here.layer:
                hooks.callback(layers[finished].register_forward_hook(note).remove)
            streams = _inputs_of(model, [here], hooks)
            for number, linear in enumerate(linears):
                hooks.callback(linear.register_forward_pre_hook(masked(number)).remove)
            for lane, (batch, real) in enumerate(zip(self.batches, self.masks, strict=True)):
                masks[:] = [torch.ones(linear.in_features, device=real.device, requires_grad=True) for linear in linears]
                answers = self.problem.outputs(model(**batch.inputs), batch)
                loss = self.problem.response_loss(answers, self._answers[lane], 1.0, temperature)
                scale = temperature**2 if self.problem is PROBLEMS["classification"] else 1.0
                gradients = torch.autograd.grad(scale * loss, masks, allow_unused=True, materialize_grads=True)
                for number, (at, gradient) in enumerate(zip(above, gradients, strict=True)):
                    seen.predictive[number] += 0.5 * gradient.square().cpu() / self.sentences
                    seen.representational[number] += inputs[at][real].square().sum(0).cpu() / self.tokens
                seen.features.append(inputs[here][real])
                bias = linears[0].bias if linears[0].bias is not None else 0.0
                seen.missing.append(self._wanted[lane][here] - streams[here].detach()[real] - bias)
        for found, linear in zip(seen.representational, linears, strict=True):
            found *= linear.weight.detach().square().mean(0).cpu()
        return seen


def _inputs_of(model: PreTrainedModel, sublayers: Sequence[Sublayer], hooks: ExitStack) -> dict[Sublayer, torch.Tensor]:
    """Filled by every pass: what is in the residual stream before each sublayer."""
    streams: dict[Sublayer, torch.Tensor] = {}

    def seeing(at: Sublayer) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            streams[at] = args[0] if args else kwargs["hidden_states"]

        return hook

    for at in sublayers:
        hooks.callback(at.stream(model).register_forward_pre_hook(seeing(at), with_kwargs=True).remove)
    return streams


def _keeping(outputs: dict[Sublayer, torch.Tensor], at: Sublayer) -> Any:
    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        outputs[at] = output

    return hook


def _of_units(scores: torch.Tensor, features: int) -> np.ndarray:
    """Mean over the features of each unit."""
    return scores.unflatten(0, (-1, features)).mean(1).double().numpy()


def _staying(scores: Sequence[np.ndarray], costs: Sequence[int], budget: float) -> list[np.ndarray]:
    """Of each sublayer the units that score above the lowest threshold at which the rest fits the budget.

    scores: by parameter, so that a threshold solves the (fractional) knapsack. costs: of a unit of each sublayer.
    """
    flat, cost = np.concatenate(scores), np.repeat(costs, [len(score) for score in scores])
    order = np.argsort(flat, kind="stable")
    fits = cost.sum() - np.concatenate([[0], np.cumsum(cost[order])]) <= budget
    kept = np.ones(len(flat), dtype=bool)
    kept[order[: int(np.argmax(fits))]] = False
    return np.split(kept, np.cumsum([len(score) for score in scores])[:-1])
