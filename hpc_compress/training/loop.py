"""The training loop that every operator shares: fine-tuning, distillation and whatever else has a loss.

Knows torch. Knows nothing of genomes, of Slurm, or of what the loss means: that is an argument. Of the disk it knows one
file, the checkpoint, from which an interrupted training goes on.

Where the time goes (MiniLM-L6 on CPU cores): with AVX2 four fifths of an update are matrix products that already run at the
peak of the processor. Where it has bfloat16 they are a third, and in batches of 8 reading and writing every parameter (AdamW,
clipping, casts) is as much. So what pays is to compute less: batches of similar length leave out the padding (`data.batches`),
and rows of the word embedding that no example uses are left out of the gradient, its norm and AdamW (`_used_rows`).
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import pickle
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch

from hpc_compress.context import Checkpoint
from hpc_compress.data.batches import Batch, Encoded, train_batches
from hpc_compress.models import zeros
from hpc_compress.training.settings import Training

log = logging.getLogger(__name__)

# A loss is looked at in groups of this many updates: on a GPU every look waits for the device.
CHECK_EVERY = 20


def fit(
    model: torch.nn.Module,
    examples: Encoded,
    loss: Callable[[torch.nn.Module, Batch], torch.Tensor],
    training: Training,
    seed: int,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    checkpoint: Checkpoint | None = None,
    companions: Sequence[torch.nn.Module] = (),
) -> float:
    """Trains the model in place, on `device`, and leaves it in eval mode without gradients.

    The same seed gives the same weights, to the last bit, on the same CPU, whether or not the training was interrupted and
    went on from its checkpoint. The global random state is left as it was.

    Args:
        loss: maps the model and a batch to a scalar; it runs under `autocast`. The batch is on the device already, but for
            `index`: by it the loss may look something up without waiting for the device.
        progress: called after every update with the updates done and their total.
        checkpoint: where the state is saved now and then, and looked for at the start; the file is left for the caller.
        companions: modules that the loss uses and that are trained along, such as a projection; each module's gradients
            are clipped on their own, so that they change nothing for the model.

    Weights of linears that are exactly 0 stay 0.

    Returns: the mean loss over the last tenth of the updates.
    Raises: ValueError for weights of fewer than 32 bits, in which small updates would be lost.
    """
    total = max(1, round(training.epochs * math.ceil(len(examples) / training.batch_size)))
    rises = math.ceil(training.warmup * total)
    generator = np.random.default_rng(seed)
    losses: list[torch.Tensor] = []

    modules = [model, *companions]
    _check_trainable(model)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), ExitStack() as stack:
            for module in modules:
                stack.enter_context(_used_rows(module.to(device).train(), examples))
                stack.enter_context(_kept_zeros(module))
            torch.manual_seed(seed)
            groups = [[p for p in module.parameters() if p.requires_grad] for module in modules]
            optimizer = _adamw([p for parameters in groups for p in parameters], training)
            state = None
            if checkpoint is not None:
                signature = _signature(modules, examples, training, seed, total, device)
                state = _State(checkpoint, modules, optimizer, device, signature)
                losses += state.resume()
            epochs = (train_batches(examples, training.batch_size, generator) for _ in itertools.count())
            done = len(losses)
            for step, batch in enumerate(itertools.islice(itertools.chain.from_iterable(epochs), done, total), done):
                for group in optimizer.param_groups:
                    group["lr"] = training.learning_rate * min((step + 1) / (rises + 1), (total - step) / max(1, total - rises))
                with autocast(device):
                    value = loss(model, batch.to(device))
                value.backward()
                for parameters in groups:
                    torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(value.detach())
                due = state is not None and state.due() and len(losses) < total
                if due or len(losses) % CHECK_EVERY == 0 or len(losses) == total:
                    _check_finite(losses[-CHECK_EVERY:], len(losses), total, training)
                if state is not None and due:
                    state.save(losses)
                if progress is not None:
                    progress(len(losses), total)
    finally:
        for module in modules:
            module.eval().zero_grad()
    return torch.stack(losses[-math.ceil(total / 10) :]).float().mean().item()


def autocast(device: torch.device) -> AbstractContextManager:
    """bfloat16 where the device computes in it, else nothing: emulated on an AVX2 processor it is 60 times slower than fp32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = torch.cpu.get_capabilities()
        native = device.type == "cpu" and bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    return torch.autocast(device.type, torch.bfloat16) if native else nullcontext()


def _adamw(parameters: list[torch.nn.Parameter], training: Training) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},  # biases and norms
    ]
    return torch.optim.AdamW(groups, lr=training.learning_rate, fused=True)


@contextmanager
def _used_rows(model: torch.nn.Module, examples: Encoded) -> Iterator[None]:
    """Trains only the rows of the word embedding that the examples use; the model's inputs and outputs stay the same.

    The gradient of all other rows is zero, so AdamW would only let them decay, by learning_rate x weight_decay an update;
    here they stay as they were pretrained. The embedding is half of MiniLM (a fifth of BERT-base), and its dense
    gradient costs a third of an update of 8 short sentences. A loss must not feed the model tokens that are in no example.
    """
    embedding: Any = cast(Any, model).get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    words = getattr(embedding, "weight", None)  # None where tokens share rows
    owners = [name for name, p in model.named_parameters(remove_duplicate=False) if p is words]
    if len(owners) != 1 or not embedding.weight.requires_grad:  # tied to an output layer, or frozen
        yield
        return
    weight, padding_idx = embedding.weight, embedding.padding_idx
    used = np.union1d(examples.input_ids, [examples.pad_id] + ([] if padding_idx is None else [padding_idx]))
    rows = torch.from_numpy(used).to(weight.device, torch.int64)
    renumber = torch.full((len(weight),), len(weight), device=weight.device)
    renumber[rows] = torch.arange(len(rows), device=weight.device)

    hook = embedding.register_forward_pre_hook(lambda module, inputs: (renumber[inputs[0]],))
    embedding.weight = torch.nn.Parameter(weight.detach()[rows])
    if padding_idx is not None:
        embedding.padding_idx = int(renumber[padding_idx])
    try:
        yield
    finally:
        hook.remove()
        with torch.no_grad():
            weight[rows] = embedding.weight
        embedding.weight, embedding.padding_idx = weight, padding_idx


@contextmanager
def _kept_zeros(model: torch.nn.Module) -> Iterator[None]:
    """Within the block, weights of linears that are 0 have no gradient, so that AdamW leaves them 0: what `sparsify` made stays
    sparse through every later training. Zeros are saved as zeros, so nothing else needs to remember them."""
    with ExitStack() as hooks:
        for weight in [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]:
            mask = zeros.mask(weight) if weight.requires_grad else None
            if mask is not None:
                keep = functools.partial(lambda mask, gradient: gradient.masked_fill(mask, 0), mask)
                hooks.callback(weight.register_hook(keep).remove)
        yield


class _State:
    """All that the next update depends on, but for what the caller gives again: saved to one file, and read back from it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        modules: Sequence[torch.nn.Module],
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        signature: str,
    ) -> None:
        self.checkpoint, self.modules, self.optimizer, self.device = checkpoint, modules, optimizer, device
        self.signature = signature
        self.last = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.last >= self.checkpoint.seconds

    def save(self, losses: list[torch.Tensor]) -> None:
        """Write the file, whole or not at all. Where it can't be written, the training goes on without."""
        path = self.checkpoint.path
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        values = {
            "signature": self.signature,
            "losses": torch.stack(losses),  # (updates done,)
            "tensors": _tensors(self.modules),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.save(values, draft)
                with draft.open("r+b") as stream:
                    stream.write(hashlib.file_digest(stream, "sha256").digest())  # read to its end, where the digest goes
                    stream.flush()
                    os.fsync(stream.fileno())
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)
        except (OSError, RuntimeError) as error:  # torch's own for a full disk is a RuntimeError
            log.warning("the training goes on without its checkpoint %s: %s", path, error)
        self.last = time.monotonic()

    def resume(self) -> list[torch.Tensor]:
        """Take up the state of the file, if it is one of this training.

        Returns: the losses so far, one scalar for each update done.
        """
        values = self._read()
        if values is None:
            return []
        with torch.no_grad():
            for name, tensor in _tensors(self.modules).items():
                tensor.copy_(values["tensors"][name])
        self.optimizer.load_state_dict(values["optimizer"])
        torch.set_rng_state(values["random"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(values["random_cuda"], self.device)
        return list(values["losses"].to(self.device).unbind())

    def _read(self) -> dict[str, Any] | None:
        path = self.checkpoint.path
        try:
            with path.open("rb") as stream:
                content = stream.read(max(0, os.fstat(stream.fileno()).st_size - hashlib.sha256().digest_size))
                # torch.load itself looks at no checksum: damaged weights would be trained on.
                if stream.read() != hashlib.sha256(content).digest():
                    raise ValueError("it is damaged, or no checkpoint")
            values = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            log.warning("the training starts anew, since its checkpoint %s can't be read: %s", path, error)
            return None
        if not isinstance(values, dict) or values.get("signature") != self.signature:
            log.warning("the training starts anew, since its checkpoint %s is of another one", path)
            return None
        return values


def _tensors(modules: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Parameters and buffers as they stand, by the module's number and their name."""
    return {
        f"{number}.{name}": tensor
        for number, module in enumerate(modules)
        for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers())
    }


def _signature(
    modules: Sequence[torch.nn.Module], examples: Encoded, training: Training, seed: int, total: int, device: torch.device
) -> str:
    """What must be the same for a state to be of use. Weights and texts are left to whoever names the file."""
    return json.dumps(
        {
            "training": [type(training).__name__, training.model_dump(mode="json")],
            "seed": seed,
            "total": total,
            "examples": [len(examples), len(examples.input_ids)],
            "shapes": {name: [str(tensor.dtype), *tensor.shape] for name, tensor in _tensors(modules).items()},
            "device": device.type,
            "torch": torch.__version__,
        }
    )


def _check_trainable(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is of {parameter.dtype}, and training needs float32: name the step that lowers the precision in "
                "strategy.quantizations, not in strategy.mutations, or leave the model in fp32 there"
            )


def _check_finite(losses: list[torch.Tensor], step: int, total: int, training: Training) -> None:
    if not torch.stack(losses).isfinite().all():
        raise FloatingPointError(
            f"the loss is not finite by update {step} of {total} with learning_rate={training.learning_rate}; "
            "lower it, or raise warmup; if that does not help, look at the labels and at the weights before training"
        )
