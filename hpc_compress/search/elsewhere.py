"""Models on a device that is not at hand: quality and bytes as measured, times as predicted from the device's file."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpc_compress.search.prediction import Prediction
from hpc_compress.types import Candidate, DeviceProfile, Measurement, Step, Structure, Surveyed


@dataclass(frozen=True)
class Elsewhere:
    """One such device."""

    profile: DeviceProfile
    prediction: Prediction

    def measured(self, candidate: Candidate) -> Candidate:
        """The candidate as it would be there. Without a measurement where it has none, or where its times can't be predicted:
        a model with fewer hidden dimensions, or in a precision that the device's file does not know."""
        return candidate.model_copy(update={"measurement": self._measurement(candidate)})

    def _measurement(self, candidate: Candidate) -> Measurement | None:
        found = candidate.measurement
        if found is None or found.structure is None or found.structure.hidden is not None:
            return None
        try:
            own_ms = self._ms(found.structure, candidate.genome.deploy)
        except ValueError:
            return None
        return found.model_copy(
            update={
                "latency_ms": (own_ms,),
                "base_latency_ms": (self.prediction.base_ms,),
                "base_best_latency_ms": None,
                "base_best_precision": None,
                "again": (),
                "peak_bytes": None,
                "enqueue_share": None,
                "device": self.profile.device,
                "device_type": self.profile.device_type,
                "predicted": True,
            }
        )

    def _ms(self, structure: Structure, deploy: Sequence[Step]) -> float:
        return float(self.prediction.latency_ms(np.array([structure.heads]), np.array([structure.ffn]), deploy)[0])


def views(devices: Sequence[DeviceProfile], survey: Surveyed | None, base: Measurement) -> tuple[Elsewhere | None, ...]:
    """How each device sees the models of a search; None: its times are those that were measured. Without any device's file
    there is one device, the one at hand.

    base: of the base model, as it was measured.
    """
    if survey is None or not devices:
        return (None,)
    return tuple(
        None if profile.device == base.device else Elsewhere(profile, Prediction.of(survey, profile)) for profile in devices
    )
