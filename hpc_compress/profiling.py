"""What the blocks of an encoder take on a device. Times layers; knows no search."""

from transformers import PreTrainedModel

from hpc_compress.context import Context
from hpc_compress.types import DeviceProfile, MeasurementProtocol, Profiling


def profile(study: Profiling, model: PreTrainedModel, protocol: MeasurementProtocol, context: Context) -> DeviceProfile:
    raise ValueError("not yet")
