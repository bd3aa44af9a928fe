"""An objective of your own: the smallest model that is good enough. Copy this file and `my_conf` into the folder where you give
the command:

hpc-compress search --config-dir=my_conf objective=smallest name=smallest model=custom \\
    model.path=path/or/hub-name dataset=sst2
"""

from typing import Any


def smallest(measurement: Any, base: Any, loss: float = 0.02) -> float:
    """Fewer bytes are better. A candidate whose quality is lower than the base model's by more than `loss` loses to all others.

    measurement, base: of the candidate and of the base model. Returns a number to maximise.
    """
    quality, wanted = (next(iter(each.metrics.values())) for each in (measurement, base))
    if quality < wanted - loss:
        return quality - wanted - 1  # below every candidate that is good enough; the better one is still ahead
    return base.model_bytes / measurement.model_bytes
