"""What is known of every structure before any is cut: its time, its bytes, and the importance of what it loses. Numpy only.

Time is the sum of what the blocks take on the device, as its profile says; bytes are linear in heads and neurons. A structure
is two rows of whole numbers: the heads and the FFN neurons that each layer keeps. Every method takes many structures at once.

References:
    Kwon et al. 2022, A Fast Post-Training Pruning Framework for Transformers, section 4.1 (latency tables)
    Kurtic et al. 2023, ZipLM, section 3.2 (the same, for a device's own shapes)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpc_compress import identity
from hpc_compress.search import mixing
from hpc_compress.types import VOCABULARY_STEPS, BlockProfile, DeviceProfile, Step, Surveyed

FARTHEST = 2.0  # times the longest and the largest batch that was timed: no prediction goes beyond


def timed(deploy: Sequence[Step]) -> tuple[Step, ...]:
    """The deploying steps that have an effect on time: a smaller word embedding has none, if texts grow no longer by it."""
    return tuple(step for step in deploy if step.operator not in VOCABULARY_STEPS)


@dataclass(frozen=True)
class _Times:
    """Milliseconds of one pass over the sample in one precision."""

    fixed: float  # embeddings, pooler and head
    layer: float  # of a layer with neither attention nor FFN
    heads: np.ndarray  # (heads + 1,) what 0, 1, 2, ... heads add to a layer; rises from 0
    ffn: np.ndarray  # (neurons + 1,) what 0, 1, 2, ... neurons add to a layer; rises from 0


@dataclass(frozen=True)
class _Bytes:
    fixed: float
    per_head: float
    per_neuron: float


@dataclass(frozen=True)
class Prediction:
    """Made once by `Prediction.of`. `heads` and `ffn` below are (structures, layers) whole numbers: what each layer keeps.

    Latencies know layers that lost everything, which still cost something. A structure with fewer layers has fewer columns.
    """

    times: dict[str, _Times]  # by precision
    sizes: dict[str, _Bytes]  # by chain of deploying steps
    head_scores: np.ndarray  # (layers, heads + 1) share of all scores that goes when so many heads stay
    ffn_scores: np.ndarray  # (layers, neurons + 1) the same for neurons
    base_ms: float  # of the whole model in fp32

    @staticmethod
    def of(survey: Surveyed, profile: DeviceProfile) -> "Prediction":
        """Raises: ValueError when the profile lacks fp32, or knows only batches much smaller than those of the sample."""
        depth, most, widest = len(survey.heads), max(map(len, survey.heads)), max(map(len, survey.ffn))
        times = {_key(timed(block.deploy)): _summed(block, survey.sample, most, widest) for block in profile.blocks}
        if _key(()) not in times:
            raise ValueError(f"the profile of {profile.device} has no times of fp32, which ratios divide by; take it again")
        total = sum(map(sum, (*survey.heads, *survey.ffn)))
        base = times[_key(())]
        return Prediction(
            times=times,
            sizes={_key(one.deploy): _Bytes(one.fixed, one.per_head, one.per_neuron) for one in survey.bytes},
            head_scores=_going(survey.heads, total),
            ffn_scores=_going(survey.ffn, total),
            base_ms=base.fixed
            + depth * base.layer
            + float(base.heads[[len(scores) for scores in survey.heads]].sum())
            + float(base.ffn[[len(scores) for scores in survey.ffn]].sum()),
        )

    def latency_ms(self, heads: np.ndarray, ffn: np.ndarray, deploy: Sequence[Step] = ()) -> np.ndarray:
        """(structures,) milliseconds of one pass over the protocol's sample.

        In a precision that differs by layer, each layer takes what it takes where all have its scheme.

        Raises: ValueError for a way to deploy that was not timed.
        """
        plain, by_layer = mixing.parts(timed(deploy))
        times, heads, ffn = self._times(plain), np.asarray(heads), np.asarray(ffn)
        layers = times.layer + times.heads[heads] + times.ffn[ffn]
        for layer, chain in by_layer.items():
            own = self._times(chain)
            layers[:, layer] = own.layer + own.heads[heads[:, layer]] + own.ffn[ffn[:, layer]]
        return times.fixed + layers.sum(1)

    def latency(self, heads: np.ndarray, ffn: np.ndarray, deploy: Sequence[Step] = ()) -> np.ndarray:
        """(structures,) the same in units of the base model's time in fp32, as `search.objective.latency_of`."""
        return self.latency_ms(heads, ffn, deploy) / self.base_ms

    def bytes(self, heads: np.ndarray, ffn: np.ndarray, deploy: Sequence[Step] = ()) -> np.ndarray:
        """(structures,) of the saved model.

        Raises: ValueError for a chain of deploying steps that the survey did not ask for.
        """
        plain, by_layer = mixing.parts(deploy)
        size, heads, ffn = self._sizes(plain), np.asarray(heads), np.asarray(ffn)
        layers = size.per_head * heads + size.per_neuron * ffn
        for layer, chain in by_layer.items():
            own = self._sizes(chain)
            layers[:, layer] = own.per_head * heads[:, layer] + own.per_neuron * ffn[:, layer]
        return size.fixed + layers.sum(1)

    def _times(self, deploy: Sequence[Step]) -> _Times:
        times = self.times.get(_key(deploy))
        if times is None:
            raise ValueError(f"{_named(deploy)} was not timed on this device; take its profile again with this way to deploy")
        return times

    def _sizes(self, deploy: Sequence[Step]) -> _Bytes:
        size = self.sizes.get(_key(deploy))
        if size is None:
            raise ValueError(f"the survey knows no bytes of {_named(deploy)}; name this way to deploy in the survey")
        return size

    def kept(self, heads: np.ndarray, ffn: np.ndarray) -> np.ndarray:
        """(structures, layers) share of the sum of all scores that stays in each layer."""
        layers = np.arange(len(self.head_scores))
        whole = self.head_scores[:, 0] + self.ffn_scores[:, 0]
        return whole - self.head_scores[layers, heads] - self.ffn_scores[layers, ffn]

    def mass(self, heads: np.ndarray, ffn: np.ndarray) -> np.ndarray:
        """(structures,) share of the sum of all scores that goes when each layer keeps its units of the highest scores.

        0 for the whole model, 1 for one without heads and neurons.
        """
        layers = np.arange(len(self.head_scores))
        return self.head_scores[layers, heads].sum(1) + self.ffn_scores[layers, ffn].sum(1)


def _key(deploy: Sequence[Step]) -> str:
    return identity.canonical(list(deploy))


def _named(deploy: Sequence[Step]) -> str:
    return " > ".join(str(step.params.get("scheme", step.operator)) for step in deploy) or "fp32"


def _summed(block: BlockProfile, sample: Sequence[tuple[int, int]], most: int, widest: int) -> _Times:
    """Over the batches of the sample. Interpolation is linear in the tables, so one set of weights does for all of them."""
    weights = np.zeros((len(block.rows), len(block.lengths)))
    for rows, length in sample:
        weights += np.outer(_weights(block.rows, rows, "rows"), _weights(block.lengths, length, "tokens a row"))

    def total(table: Sequence[Sequence[float]] | Sequence[Sequence[Sequence[float]]]) -> np.ndarray:
        return np.tensordot(weights, np.array(table), axes=2)

    return _Times(
        fixed=max(0.0, float(total(block.fixed_ms))),
        layer=max(0.0, float(total(block.layer_ms))),
        heads=_by_count(block.heads, total(block.attention_ms), most),
        ffn=_by_count(block.widths, total(block.ffn_ms), widest),
    )


def _weights(axis: Sequence[int], at: int, what: str) -> np.ndarray:
    """(axis,) weights of the values at the points of an axis that interpolate at another point; beyond the ends the last two
    points are continued."""
    weights = np.zeros(len(axis))
    if at > FARTHEST * axis[-1]:
        raise ValueError(
            f"a batch of the sample has {at} {what}, and the profile knows at most {axis[-1]}; take the profile with this "
            "search's dataset and protocol"
        )
    if len(axis) == 1:
        weights[0] = at / axis[0]
        return weights
    right = int(np.clip(np.searchsorted(axis, at), 1, len(axis) - 1))
    share = (at - axis[right - 1]) / (axis[right] - axis[right - 1])
    weights[right - 1], weights[right] = 1 - share, share
    return weights


def _by_count(points: Sequence[int], values: np.ndarray, most: int) -> np.ndarray:
    """(most + 1,) a time for each number of units from 0, which rises.

    With its last unit a block goes as a whole, so from one unit to none the time is not linear. Between 0 and the first point
    above it, the line through the first two points above 0 is continued.
    """
    counts, above, known = np.arange(most + 1), np.array(points[1:]), values[1:]
    found = np.interp(counts, above, known)
    if len(above) > 1:
        for inside, (one, two) in ((counts < above[0], (0, 1)), (counts > above[-1], (-2, -1))):
            slope = (known[two] - known[one]) / (above[two] - above[one])
            found[inside] = known[one] + slope * (counts[inside] - above[one])
    found[0] = 0.0
    return np.maximum.accumulate(found)


def _going(scores: Sequence[Sequence[float]], total: float) -> np.ndarray:
    """(layers, units + 1) by how many units stay: the sum of the lowest scores, which go, over the total."""
    table = np.zeros((len(scores), max(map(len, scores)) + 1))
    for layer, own in enumerate(scores):
        table[layer, : len(own)] = np.cumsum(np.sort(own))[::-1]
    return table / total if total > 0 else table
