"""What is asked about genomes besides a full measurement. Knows models and operators; no store and no search."""

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from hpc_compress import identity
from hpc_compress.context import Context
from hpc_compress.data.batches import Batch, eval_batches
from hpc_compress.models import artifact, surgery
from hpc_compress.models.gates import counts
from hpc_compress.operators import operator
from hpc_compress.pruning import cutting
from hpc_compress.pruning.steps import Carve
from hpc_compress.types import (
    VOCABULARY_STEPS,
    ByteCounts,
    Deployed,
    Screen,
    Screening,
    Step,
    Structure,
    Survey,
    Surveyed,
    outside,
)


def survey(study: Survey, model: PreTrainedModel, context: Context, sample: Sequence[Batch]) -> Surveyed:
    """sample: the batches by which the protocol times models."""
    scores = cutting.Scores(study.criterion, ("heads", "ffn"))
    found = cutting.scores_of(model, context, scores, study.sentences)
    rounded = {unit: tuple(tuple(float(f"{max(score, 0):.6g}") for score in layer) for layer in found[unit]) for unit in found}
    sizes = _Sizes(model, context)
    shapes = [batch.inputs["input_ids"].shape for batch in sample]
    return Surveyed(
        **rounded,
        parameters=surgery.unit_parameters(model),
        encoder_parameters=surgery.encoder_parameters(model),
        train_rows=len(context.train),
        bytes=tuple(sizes.of(deploy) for deploy in study.deploys),
        sample=tuple((rows, length) for rows, length in shapes),
    )


class _Sizes:
    """Bytes of deployed models, found from four small ones in each precision: saving a whole one takes longer."""

    def __init__(self, model: PreTrainedModel, context: Context) -> None:
        self.model, self.context = model, context
        self.rows = surgery.vocabulary_size(model)
        self.found: dict[str, tuple[float, float, float, float]] = {}

    def of(self, deploy: tuple[Step, ...]) -> ByteCounts:
        smaller = [step for step in deploy if step.operator in VOCABULARY_STEPS]
        others = tuple(step for step in deploy if step.operator not in VOCABULARY_STEPS)
        rows, besides = self.rows, 0
        if smaller and self.context.tokenizer is not None:
            step = operator(smaller[-1])
            rows = len(step.kept(self.context.tokenizer(), self.context))
            besides = step.bytes_besides(self.rows, rows)
        key = identity.canonical(others)
        if key not in self.found:
            self.found[key] = self._slopes(others)
        fixed, per_row, per_head, per_neuron = self.found[key]
        return ByteCounts(deploy=deploy, fixed=fixed + besides + rows * per_row, per_head=per_head, per_neuron=per_neuron)

    def _slopes(self, deploy: tuple[Step, ...]) -> tuple[float, float, float, float]:
        """Fixed bytes, and bytes of a row of the word embedding, of a head and of a neuron."""
        heads, widths = counts(self.model, "heads"), counts(self.model, "ffn")
        fewer = [count // 2 for count in heads], [width // 128 * 64 or width // 2 for width in widths]
        few = min(1024, self.rows // 2)
        whole = self._saved(deploy, heads, widths, few)
        per_row = (self._saved(deploy, heads, widths, 2 * few) - whole) / few
        per_head = (whole - self._saved(deploy, fewer[0], widths, few)) / max(1, sum(heads) - sum(fewer[0]))
        per_neuron = (whole - self._saved(deploy, heads, fewer[1], few)) / max(1, sum(widths) - sum(fewer[1]))
        return whole - few * per_row - sum(heads) * per_head - sum(widths) * per_neuron, per_row, per_head, per_neuron

    def _saved(self, deploy: tuple[Step, ...], heads: Sequence[int], widths: Sequence[int], rows: int) -> int:
        cut = copy.deepcopy(self.model).cpu()
        cutting.cut(cut, {"heads": [np.arange(count) for count in heads], "ffn": [np.arange(width) for width in widths]})
        surgery.trim_vocabulary(cut, range(rows))
        with tempfile.TemporaryDirectory() as folder:
            _save(cut, deploy, self.context, Path(folder))
            return artifact.weights(Path(folder)).stat().st_size


def screen(
    study: Screen,
    steps: Sequence[Step],
    model: PreTrainedModel,
    context: Context,
    on: torch.device,
    made: Callable[[], PreTrainedModel],
    excused: Callable[[Exception], bool],
) -> Screening:
    """Compare the outputs of a genome's model with the base model's.

    model: the base model. on: where deployed models run. made: gives the model after the steps; not asked where one pass over
    kept activations gives it. excused: whether an error in one of the precisions leaves the rest as it is.

    Raises: FloatingPointError when an output of the model is not finite.
    """
    first = operator(steps[0]) if steps else None
    judged = _judged(study, context, getattr(first, "sentences", 0))
    if isinstance(first, Carve) and first.repair and first.hidden is None and len(steps) == 1:
        repairer = cutting.repairer_of(model, context, first.how, judged, 1 + study.sample)
        kept = cutting.kept_of(model, context, first, first.how)
        cut = cutting.shared_copy(model)
        cutting.cut(cut, kept)
        answers, wanted = repairer.repair(cut, kept), repairer.answers
    else:
        cut = made()
        answers, wanted = _answers(cut, judged), _answers(model, judged)

    base = _outputs(wanted, judged, context)

    def divergence(outputs: torch.Tensor) -> float:
        return max(0.0, float(context.problem.divergence(outputs, base)))

    def in_precision(deploy: tuple[Step, ...]) -> float | None:
        try:
            return divergence(_deployed_outputs(cut, deploy, context, judged, on))
        except Exception as error:
            if not excused(error):
                raise
            return None

    return Screening(
        divergence=divergence(_outputs(answers, judged, context)),
        structure=Structure(
            heads=tuple(counts(cut, "heads")),
            ffn=tuple(counts(cut, "ffn")),
            layers=None if surgery.origins(cut) == list(range(len(surgery.layers(model)))) else tuple(surgery.origins(cut)),
        ),
        deployed=tuple(Deployed(deploy=deploy, divergence=in_precision(deploy)) for deploy in study.deploys),
    )


def _deployed_outputs(
    cut: PreTrainedModel, deploy: tuple[Step, ...], context: Context, judged: Sequence[Batch], on: torch.device
) -> torch.Tensor:
    """Outputs of a model after these steps: of what is loaded from a file, as a measured one is."""
    batches = judged if on == context.device else [batch.to(on) for batch in judged]
    with tempfile.TemporaryDirectory() as folder:
        _save(copy.deepcopy(cut).cpu(), deploy, context, Path(folder))
        return _outputs(_answers(artifact.load(folder, on), batches), batches, context)


def _save(model: PreTrainedModel, deploy: tuple[Step, ...], context: Context, folder: Path) -> None:
    """Write the model after these steps into the folder."""
    here = dataclasses.replace(context, folder=folder)
    for step in deploy:
        model = operator(step)(model, here)
    artifact.save(model, folder)


def _outputs(answers: Sequence, batches: Sequence[Batch], context: Context) -> torch.Tensor:
    """(labels, width) of all batches, as float32 on the CPU."""
    pairs = zip(answers, batches, strict=True)
    found = torch.cat([context.problem.outputs(answer, batch).float().cpu() for answer, batch in pairs])
    if not found.isfinite().all():
        raise FloatingPointError("the outputs of the screened model are not finite")
    return found


@torch.no_grad()
def _answers(model: PreTrainedModel, batches: Sequence[Batch]) -> list:
    return [model.eval()(**batch.inputs) for batch in batches]


def _judged(study: Screen, context: Context, fit: int) -> list[Batch]:
    """Random sentences of train that the repair is not fit to."""
    rows = np.array(outside(fit, len(context.train)))
    rng = np.random.default_rng(identity.derive(study.sample, "judged"))
    chosen = np.sort(rng.permutation(rows)[: study.judge])
    return [batch.to(context.device) for batch in eval_batches(context.train.choose(chosen), 32)]
