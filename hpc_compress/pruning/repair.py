"""Repairs a cut model in one pass over some sentences, and judges it on others in the same pass.

All batches go through the model side by side. At each linear that writes into the residual stream all of them wait; the
linear is refit to what has arrived there, and they go on with its new weights. What the uncut model makes of the same
sentences is kept, so each further structure of it costs about one pass. If a structure begins with the same layers as the one
before, its pass begins where they differ.

Knows models, batches and what is left of a model; nothing of scores, budgets or training.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import greenlet
import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from hpc_compress.data.batches import Batch
from hpc_compress.models import surgery
from hpc_compress.models.gates import counts
from hpc_compress.models.modeling_hpc_compress import linear_of
from hpc_compress.pruning import obs

UnitArrays = dict[str, list[np.ndarray]]  # of each kind of unit, layer by layer: scores, or the positions of those that stay


@dataclass(frozen=True)
class Written:
    """A linear that writes into the residual stream of a cut model."""

    layer: int  # now
    origin: int  # in the uncut model
    name: str  # in its layer
    features: np.ndarray  # (in_features,) positions of its inputs in the uncut model

    def of(self, model: PreTrainedModel) -> nn.Linear:
        return linear_of(surgery.layers(model)[self.layer], self.name)

    def same_as(self, other: "Written") -> bool:
        return (self.origin, self.name) == (other.origin, other.name) and np.array_equal(self.features, other.features)


def written(model: PreTrainedModel, kept: UnitArrays) -> Iterator[Written]:
    """Every such linear of what a cut leaves of an uncut model, in the order of a pass."""
    names, size, depth = surgery.family(model), surgery.head_size(model), len(surgery.layers(model))
    before = {"heads": counts(model, "heads"), "ffn": counts(model, "ffn")}
    for layer, origin in enumerate(kept["layers"][0] if "layers" in kept else range(depth)):
        for unit, name, width in (("heads", names.attention_out, size), ("ffn", names.ffn_out, 1)):
            stays = kept[unit][origin] if unit in kept else np.arange(before[unit][origin])
            yield Written(layer, int(origin), name, (stays[:, None] * width + np.arange(width)).ravel())


@dataclass
class _Trail:
    """What the last structure left behind, for the next one that begins like it."""

    linears: list[Written] = field(default_factory=list)
    fitted: list[tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=list)  # weight and bias of each
    outputs: list[list[Any]] = field(default_factory=list)  # of each layer, batch by batch


class Repairer:
    """What an uncut model makes of some sentences; repairs what is cut of it to do the same.

    batches: the repair is fit to these. judged: others, on which a repaired model is judged. drift: a refit linear also makes
    up for what the residual stream has lost before it (Park et al. 2024, K-prune, https://arxiv.org/abs/2308.03449); else it
    reproduces its own output only (Kwon et al. 2022, section 4.3, https://arxiv.org/abs/2204.09656).
    """

    @torch.no_grad()
    def __init__(
        self, dense: PreTrainedModel, batches: Sequence[Batch], judged: Sequence[Batch] = (), drift: bool = True
    ) -> None:
        self.dense, self.fit_batches, self.drift = dense.eval(), len(batches), drift
        self.batches = [*batches, *judged]
        self.masks = [batch.inputs["attention_mask"].bool() for batch in self.batches]
        self._wanted: dict[tuple[int, str], torch.Tensor] = {}  # (tokens of the fit, features) by layer and name
        self._trail = _Trail()
        whole = list(written(dense, {}))

        def keep(number: int, inputs: list[torch.Tensor], streams: list[torch.Tensor]) -> None:
            at = whole[number]
            linear, rows = at.of(dense), torch.cat(inputs[: self.fit_batches])
            said = nn.functional.linear(rows, linear.weight, linear.bias)
            self._wanted[at.origin, at.name] = said + torch.cat(streams[: self.fit_batches]) if drift else said

        self.answers = self._walk(dense, whole, keep)[self.fit_batches :]  # of the uncut model on the judged batches

    @torch.no_grad()
    def repair(self, model: PreTrainedModel, kept: UnitArrays, most: int | None = None) -> list[Any]:
        """Refit every output linear of a model that was cut to `kept`, in place.

        most: stop after so many linears, and leave those that follow as they are.

        Returns: what the repaired model answers on each of the judged batches; nothing if it stopped before.
        """
        linears = list(written(self.dense, kept))[:most]
        known = self._begins_alike(linears)
        trail = _Trail(linears[: 2 * known], self._trail.fitted[: 2 * known], self._trail.outputs[:known])
        changed = any(self._cut_at(at) for at in trail.linears)
        for at, fitted in zip(trail.linears, trail.fitted, strict=True):
            self._set(at.of(model), *fitted)
        rest = linears[2 * known :]

        def refit(number: int, inputs: list[torch.Tensor], streams: list[torch.Tensor]) -> None:
            nonlocal changed
            at = rest[number]
            changed = changed or self._cut_at(at)
            linear = at.of(model)
            if changed:  # with no input left, the bias still takes over what the inputs contributed on average
                wanted = self._wanted[at.origin, at.name]
                if self.drift:
                    wanted = wanted - torch.cat(streams[: self.fit_batches])
                whole = linear_of(surgery.layers(self.dense)[at.origin], at.name)
                start = whole.weight[:, torch.from_numpy(at.features).to(whole.weight.device)]
                self._set(linear, *obs.fit(start, whole.bias, torch.cat(inputs[: self.fit_batches]), wanted))
            trail.fitted.append((linear.weight.detach().clone(), None if linear.bias is None else linear.bias.detach().clone()))
            trail.linears.append(at)

        answers = self._walk(model, rest, refit, trail.outputs, to_the_end=most is None)
        self._trail = trail
        return answers[self.fit_batches :]

    def _begins_alike(self, linears: list[Written]) -> int:
        """Layers at the start that are the same as those of the structure before."""
        alike = 0
        for now, before in zip(linears, self._trail.linears, strict=False):
            if not now.same_as(before):
                break
            alike += 1
        return min(alike // 2, len(self._trail.outputs), (len(linears) - 1) // 2)

    def _cut_at(self, at: Written) -> bool:
        whole = linear_of(surgery.layers(self.dense)[at.origin], at.name)
        return len(at.features) < whole.in_features or at.layer != at.origin

    @staticmethod
    def _set(linear: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)

    def _walk(
        self,
        model: PreTrainedModel,
        linears: Sequence[Written],
        look: Callable[[int, list[torch.Tensor], list[torch.Tensor]], None],
        outputs: list[list[Any]] | None = None,
        to_the_end: bool = True,
    ) -> list[Any]:
        """Run all batches through the model, and stop all of them at each linear.

        look: told the number of the linear, what flows into it and into the stream that it writes to, batch by batch: (tokens,
        features) each, padding left out. outputs: of the first layers, which are not computed again; those of the others are
        appended, but for the last one's. to_the_end: false: stop after the last of the linears.

        Returns: the model's answer to each batch, if it gets there.
        """
        model.eval()
        layers, main = surgery.layers(model), greenlet.getcurrent()
        lane = 0  # the batch at work
        behind = 0 if outputs is None else len(outputs)
        made: list[list[Any]] = [[None] * len(self.batches) for _ in range(behind, len(layers) - 1)]
        streams: dict[int, torch.Tensor] = {}

        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            streams[lane] = args[0] if args else kwargs["hidden_states"]

        def halt(module: nn.Module, args: tuple) -> None:
            main.switch(args[0])

        def note(number: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                made[number][lane] = output

            return hook

        with ExitStack() as hooks:
            for number in range(behind):
                layers[number].forward = lambda *args, number=number, **kwargs: outputs[number][lane]  # type: ignore[index]
                hooks.callback(layers[number].__dict__.pop, "forward")
            for number in range(behind, len(layers) - 1):
                if outputs is not None:
                    hooks.callback(layers[number].register_forward_hook(note(number - behind)).remove)
            for at in linears:
                source = model.get_submodule(surgery.stream(model, at.layer, at.name))
                hooks.callback(source.register_forward_pre_hook(see, with_kwargs=True).remove)
                hooks.callback(at.of(model).register_forward_pre_hook(halt).remove)
            lanes = [greenlet.greenlet(lambda batch: model(**batch.inputs)) for _ in self.batches]
            arrived: list[Any] = []
            for lane, batch in enumerate(self.batches):
                arrived.append(lanes[lane].switch(batch))
            for number in range(len(linears)):
                inputs = [rows[mask].float() for rows, mask in zip(arrived, self.masks, strict=True)]
                before = [streams[at][mask].float() for at, mask in enumerate(self.masks)]
                look(number, inputs, before)
                if number + 1 < len(linears) or to_the_end:
                    for lane in range(len(lanes)):
                        arrived[lane] = lanes[lane].switch()
                else:
                    for stopped in lanes:
                        stopped.throw()  # greenlet.GreenletExit, which ends it
                    made, arrived = made[: linears[-1].layer - behind], []
        if outputs is not None:
            outputs.extend(made)
        return arrived


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares the word embedding with the model, which no cut of heads, neurons and layers changes."""
    words = model.get_input_embeddings().weight
    return copy.deepcopy(model, {id(words): words})
