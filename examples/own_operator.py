"""A pruning and a quantization of your own. Copy this file into the folder where you give the command:

hpc-compress search name=mine strategy=genetic model=custom model.path=path/or/hub-name dataset=sst2 \\
    +strategy.mutations.mine='{weight: 2, operator: own_operator.PruneNeurons, share: 0.3}' \\
    +strategy.quantizations.mine='{weight: 0.2, operator: own_operator.HalfEmbeddings}'
"""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class PruneNeurons:
    """Cut the FFN neurons with the smallest weights, in every layer of a BERT."""

    share: float = 0.25  # of the neurons of each layer

    def __call__(self, model: Any, context: Any) -> Any:
        for layer in model.bert.encoder.layer:
            into, out = layer.intermediate.dense, layer.output.dense
            kept = into.weight.norm(dim=1).argsort()[int(self.share * into.out_features) :].sort().values
            into.weight, into.bias = torch.nn.Parameter(into.weight[kept]), torch.nn.Parameter(into.bias[kept])
            out.weight = torch.nn.Parameter(out.weight[:, kept].contiguous())
            into.out_features = out.in_features = len(kept)
        return model


@dataclass(frozen=True)
class HalfEmbeddings:
    """Deploy in 16 bits. What an operator returns is saved, loaded again and measured."""

    def __call__(self, model: Any, context: Any) -> Any:
        return model.half()
