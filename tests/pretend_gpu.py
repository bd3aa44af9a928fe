"""A GPU that is not there. Within `pretend_gpu()` code written for CUDA runs on any machine, with real numbers.

Each storage has a place, "cpu" or "cuda". All of them lie in the memory of this machine. Two modes of torch keep up the
appearance:

- `Answers` stands between Python and torch. It answers what code asks of a tensor (`device`, `is_cuda`), and does what code
  asks for by device (`to`, `cuda`, `pin_memory`, `zeros(device=...)`).
- `Watch` sees every operation on tensors below that, those of the backward pass too. It refuses tensors of both places in
  one operation, as CUDA does, and gives results their place.

The allocator counts the bytes of all living storages that are on the GPU, so that peaks and leaks show. What can't be seen:
the kernels themselves, bitsandbytes' code for CUDA, streams, and time.
"""

import contextlib
import time
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import bitsandbytes  # noqa: F401  before anything is patched: where it finds a GPU at its import, it loads kernels for it
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
WORKSPACE_BYTES = 8 * 2**20 + 2**17  # of cuBLAS on an A100; taken from torch's allocator at the first matrix product
CROSSING = {"copy_", "_to_copy", "_foreach_copy_"}  # operations that may have tensors of both places
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}  # may have indices on the CPU
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear"}


class MixedDevicesError(RuntimeError):
    """An operation was given tensors on the CPU and on the GPU."""


class Memory:
    """The place of every storage, and the bytes that are taken on the GPU."""

    def __init__(self) -> None:
        self.taken = self.most = 0
        self.workspace = False

    def place(self, tensor: torch.Tensor) -> str:
        return getattr(tensor.untyped_storage(), "place", "cpu")

    def put(self, tensor: torch.Tensor, place: str) -> None:
        # Python's storage object lives as long as the memory that it stands for, so it can carry the mark.
        storage = tensor.untyped_storage()
        if getattr(storage, "place", "cpu") == place:
            return
        assert place == "cuda", "a storage never moves; a copy of it does"
        storage.place = place
        size = storage.nbytes()
        self.take(size)
        weakref.finalize(storage, self.take, -size).atexit = False

    def take(self, size: int) -> None:
        self.taken += size
        self.most = max(self.most, self.taken)

    def reset_peak(self, device: Any = None) -> None:
        self.most = self.taken


def real(values: Any) -> list[torch.Tensor]:
    """All tensors in any structure that have memory of their own."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta"]


class Watch(TorchDispatchMode):
    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory, self.default = memory, "cpu"

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name, inputs = function._schema.name.split("::")[-1], real((args, kwargs))
        place = self.default
        if inputs and name in CROSSING:
            place = self.memory.place(inputs[0])
        elif inputs:
            place = self._shared(str(function), inputs, free=real(args[1]) if name in INDEXING else [])
        if place == "cuda" and name in PRODUCTS and not self.memory.workspace:
            self.memory.workspace = True
            self.memory.take(WORKSPACE_BYTES)
        result = function(*args, **(kwargs or {}))
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        for tensor in real(result):
            if tensor.untyped_storage()._cdata not in known:
                self.memory.put(tensor, place)
        return result

    def _shared(self, function: str, inputs: list[torch.Tensor], free: list[torch.Tensor]) -> str:
        """Where the inputs are. free: those that may also be on the CPU where the others are on the GPU."""
        places = [(self.memory.place(tensor), tensor) for tensor in inputs]
        bound = {place for place, tensor in places if not any(tensor is one for one in free)}
        sized = {place for place, tensor in places if tensor.dim() and not any(tensor is one for one in free)}
        on_gpu = any(place == "cuda" for place, _ in places)
        # A single number on the CPU may meet tensors on the GPU, but not the other way round.
        if len(sized) > 1 or (on_gpu and (sized == {"cpu"} or bound == {"cpu"})):
            shown = ", ".join(f"{place}{list(tensor.shape)}" for place, tensor in places)
            raise MixedDevicesError(f"Expected all tensors to be on the same device, but found {shown} in {function}")
        return "cuda" if on_gpu else "cpu"


class Answers(TorchFunctionMode):
    def __init__(self, memory: Memory, watch: Watch) -> None:
        super().__init__()
        self.memory, self.watch = memory, watch
        tensor: Any = torch.Tensor
        self.answers: dict[Any, Callable[..., Any]] = {
            tensor.device.__get__: lambda it, *_: CUDA if self._on_gpu(it) else CPU,
            tensor.is_cuda.__get__: lambda it, *_: self._on_gpu(it),
            tensor.is_cpu.__get__: lambda it, *_: not self._on_gpu(it),
            tensor.cpu: lambda it, *_, **__: self._moved(it, "cpu"),
            tensor.cuda: lambda it, *_, **__: self._moved(it, "cuda"),
            tensor.to: self._to,
            tensor.pin_memory: self._pinned,
            tensor.numpy: self._readable(tensor.numpy),
            tensor.__array__: self._readable(tensor.__array__),
            tensor.__deepcopy__: self._copied,
        }

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        answer = self.answers.get(function)
        if answer is not None and args[0].device.type != "meta":
            return answer(*args, **kwargs)
        device = kwargs.get("device")
        if device is None or torch.device(device).type not in ("cpu", "cuda"):
            return function(*args, **kwargs)
        # What makes a tensor from nothing, or like another one, on a device of its own choice.
        kwargs["device"] = CPU
        before, self.watch.default = self.watch.default, torch.device(device).type
        try:
            result = function(*args, **kwargs)
        finally:
            self.watch.default = before
        return self._moved(result, torch.device(device).type) if isinstance(result, torch.Tensor) else result

    def _on_gpu(self, tensor: torch.Tensor) -> bool:
        return self.memory.place(tensor) == "cuda"

    def _moved(self, tensor: torch.Tensor, place: str) -> torch.Tensor:
        return tensor if self.memory.place(tensor) == place else Move.apply(tensor, self, place)

    def copy_to(self, tensor: torch.Tensor, place: str) -> torch.Tensor:
        """The same values in a storage of that place."""
        with torch._C._DisableTorchDispatch():
            out = tensor.detach().clone()
        self.memory.put(out, place)
        return out

    def _to(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        copy = kwargs.pop("copy", False)
        other = kwargs.pop("other", args[0] if args else None)
        if isinstance(other, torch.Tensor):
            place, dtype = self.memory.place(other), other.dtype
        else:
            device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
            if device is not None and device.type == "meta":
                return torch.Tensor.to(tensor, *args, **kwargs)
            place = self.memory.place(tensor) if device is None else device.type
        cast = tensor if dtype in (None, tensor.dtype) else torch.Tensor.to(tensor, dtype)
        moved = self._moved(cast, place)
        return moved.clone() if copy and moved is tensor else moved

    def _pinned(self, tensor: torch.Tensor, *args: Any) -> torch.Tensor:
        if self._on_gpu(tensor):
            raise RuntimeError("cannot pin a tensor on the GPU; only dense CPU tensors can be pinned")
        return tensor.clone()

    def _readable(self, function: Any) -> Callable[..., Any]:
        def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._on_gpu(tensor):
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
            return function(tensor, *args, **kwargs)

        return read

    def _copied(self, tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        """It copies the storage itself, which is no operation on tensors."""
        out = torch.Tensor.__deepcopy__(tensor, memo)
        self.memory.put(out, self.memory.place(tensor))
        return out


class Move(torch.autograd.Function):
    """A copy in another place; the gradient goes back to where the tensor was."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, answers: Answers, place: str) -> torch.Tensor:
        ctx.answers, ctx.place = answers, answers.memory.place(tensor)
        return answers.copy_to(tensor, place)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.answers.copy_to(gradients[0], ctx.place), None, None


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.seconds: float | None = None

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, later: "Event") -> float:
        assert self.seconds is not None
        assert later.seconds is not None
        return 1e3 * (later.seconds - self.seconds)


def two_of_four(dense: torch.Tensor) -> torch.Tensor:
    """Refuses what torch's kernels for sparse tensor cores refuse. What it returns is dense."""
    torch.sparse.SparseSemiStructuredTensorCUTLASS._validate_device_dim_dtype_shape(dense)
    assert int((dense != 0).unflatten(1, (-1, 4)).sum(-1).max()) <= 2
    return dense.clone()


@contextlib.contextmanager
def pretend_gpu() -> Iterator[Memory]:
    """Within the block there is one GPU, an A100 as far as anybody asks."""
    memory = Memory()
    autocast, state = torch.autocast, torch.zeros(16, dtype=torch.uint8)
    cuda: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "pretend A100",
        "get_device_capability": lambda device=None: (8, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: memory.taken,
        "max_memory_allocated": lambda device=None: memory.most,
        "reset_peak_memory_stats": memory.reset_peak,
        "get_rng_state": lambda device=None: state,
        "set_rng_state": lambda new_state, device=None: None,
        "manual_seed_all": lambda seed: None,
        "Event": Event,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch, "autocast", lambda kind, dtype: autocast("cpu", dtype)))
        stack.enter_context(mock.patch.object(torch.sparse, "to_sparse_semi_structured", two_of_four))
        stack.enter_context(mock.patch.object(torch.backends, "cusparselt", SimpleNamespace(is_available=lambda: True)))
        watch = stack.enter_context(Watch(memory))
        stack.enter_context(Answers(memory, watch))
        yield memory
