"""What a user of another library does by hand, as a strategy of a search: measured as all others, by the same tasks."""

from compression import TorchPruning
from transformers import PreTrainedModel

from hpc_compress.context import Context
from hpc_compress.search.grid import AbstractGrid
from hpc_compress.types import Record, Step


class TorchPruned(Record):
    """An operator: heads and FFN neurons by Torch-Pruning's Taylor importance, the same share in every layer."""

    share: float  # of the encoder's parameters that go

    def __call__(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        return TorchPruning("taylor", round_to=None)(model, context, self.share)


class TorchPruningGrid(AbstractGrid):
    """Eight sizes cut by Torch-Pruning, and then trained and deployed as those of `Grid`."""

    removed: tuple[float, ...] = (0.0, 0.2, 0.33, 0.5, 0.6, 0.67, 0.75, 0.8, 0.9)

    @property
    def steps(self) -> tuple[Step, ...]:
        return (*self._cut(0.5), *self.space.trainings[self.training])

    def _cut(self, share: float) -> tuple[Step, ...]:
        return (Step(operator="peers.TorchPruned", params={"share": share}),) if share else ()
