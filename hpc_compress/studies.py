"""What is asked about genomes besides a full measurement. Knows models and operators; no store and no search."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from hpc_compress.context import Context
from hpc_compress.data.batches import Batch
from hpc_compress.types import Screen, Screening, Step, Survey, Surveyed


def survey(study: Survey, model: PreTrainedModel, context: Context, sample: Sequence[Batch]) -> Surveyed:
    raise ValueError("not yet")


def screen(study: Screen, steps: Sequence[Step], model: PreTrainedModel, context: Context) -> Screening:
    raise ValueError("not yet")
