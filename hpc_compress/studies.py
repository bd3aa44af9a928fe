"""What is asked about genomes besides a full measurement. Knows models and operators; no store and no search."""

import copy
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from hpc_compress import identity
from hpc_compress.context import Context
from hpc_compress.data.batches import Batch, Encoded, eval_batches
from hpc_compress.models import artifact, surgery
from hpc_compress.models.gates import counts
from hpc_compress.operators import operator
from hpc_compress.pruning import cutting
from hpc_compress.pruning.steps import Carve, Prune
from hpc_compress.types import ByteCounts, Screen, Screening, Step, Structure, Survey, Surveyed


def survey(study: Survey, model: PreTrainedModel, context: Context, sample: Sequence[Batch]) -> Surveyed:
    """sample: the batches by which the protocol times models."""
    scores = cutting.Scores(study.criterion, ("heads", "ffn"))
    found = cutting.scores_of(model, context, scores, study.sentences)
    rounded = {unit: tuple(tuple(float(f"{max(score, 0):.6g}") for score in layer) for layer in found[unit]) for unit in found}
    shapes = [batch.inputs["input_ids"].shape for batch in sample]
    return Surveyed(
        **rounded,
        parameters=surgery.unit_parameters(model),
        encoder_parameters=surgery.encoder_parameters(model),
        train_rows=len(context.train),
        bytes=tuple(_bytes(deploy, model, context) for deploy in study.deploys),
        sample=tuple((rows, length) for rows, length in shapes),
    )


def _bytes(deploy: tuple[Step, ...], model: PreTrainedModel, context: Context) -> ByteCounts:
    """From the files of three deployed models: with all units, with half of the heads, with half of the neurons."""
    heads, widths = counts(model, "heads"), counts(model, "ffn")
    halves = [count // 2 for count in heads], [width // 128 * 64 or width // 2 for width in widths]
    whole = _deployed_bytes(deploy, model, context, heads, widths)
    gone = sum(heads) - sum(halves[0]), sum(widths) - sum(halves[1])
    per_head = (whole - _deployed_bytes(deploy, model, context, halves[0], widths)) / max(1, gone[0])
    per_neuron = (whole - _deployed_bytes(deploy, model, context, heads, halves[1])) / max(1, gone[1])
    fixed = whole - per_head * sum(heads) - per_neuron * sum(widths)
    return ByteCounts(deploy=deploy, fixed=fixed, per_head=per_head, per_neuron=per_neuron)


def _deployed_bytes(
    deploy: tuple[Step, ...], model: PreTrainedModel, context: Context, heads: Sequence[int], widths: Sequence[int]
) -> int:
    cut = copy.deepcopy(model).cpu()
    kept = {"heads": [np.arange(count) for count in heads], "ffn": [np.arange(width) for width in widths]}
    cutting.cut(cut, kept)
    with tempfile.TemporaryDirectory() as folder:
        here = dataclasses.replace(context, folder=Path(folder))
        for step in deploy:
            cut = operator(step)(cut, here)
        artifact.save(cut, Path(folder))
        return artifact.weights(Path(folder)).stat().st_size


def screen(study: Screen, steps: Sequence[Step], model: PreTrainedModel, context: Context) -> Screening:
    """Cut and repair the base model as the first step of a genome says, which must be `carve` or `prune` with rescore=true, and
    compare its outputs with the base model's. No later step plays a part: a screen knows nothing of training.

    Raises: ValueError for any other genome.
    """
    first = operator(steps[0]) if steps else None
    judged = _judged(study, context, getattr(first, "sentences", 0))
    if isinstance(first, Carve) and not first.rescore and first.repair and first.hidden is None:
        dense = cutting.dense_of(model, context, first.how, judged, 1 + study.sample)
        kept = cutting.kept_of(model, context, first, first.how)
        cut = cutting.shared_copy(model)
        cutting.cut(cut, kept)
        outputs = dense.repair(cut, kept)
        wanted = dense.answers
    elif isinstance(first, (Carve, Prune)) and first.rescore:
        cut = first(copy.deepcopy(model), context)
        outputs, wanted = _answers(cut, judged), _answers(model, judged)
    else:
        raise ValueError(f"a genome whose first step is {steps[0] if steps else None} can't be screened; let it be carve")
    said, base = (
        torch.cat([context.problem.outputs(answer, batch) for answer, batch in zip(answers, judged, strict=True)])
        for answers in (outputs, wanted)
    )
    divergence = context.problem.response_loss(said, base, weight=1.0, temperature=1.0)
    assert divergence is not None
    return Screening(
        divergence=max(0.0, float(divergence)),
        structure=Structure(
            heads=tuple(counts(cut, "heads")),
            ffn=tuple(counts(cut, "ffn")),
            layers=None if surgery.origins(cut) == list(range(len(surgery.layers(model)))) else tuple(surgery.origins(cut)),
        ),
    )


@torch.no_grad()
def _answers(model: PreTrainedModel, batches: Sequence[Batch]) -> list:
    return [model.eval()(**batch.inputs) for batch in batches]


def _judged(study: Screen, context: Context, fit: int) -> list[Batch]:
    """Random sentences of train behind those that the repair is fit to; at least a fifth of train is never fit to here."""
    total = len(context.train)
    rows = np.arange(min(fit, total * 4 // 5), total)
    rng = np.random.default_rng(identity.derive(study.sample, "judged"))
    chosen = np.sort(rng.permutation(rows)[: study.judge])
    return [batch.to(context.device) for batch in eval_batches(_rows(context.train, chosen), 32)]


def _rows(examples: Encoded, rows: np.ndarray) -> Encoded:
    lengths = examples.lengths[rows]
    tokens = np.concatenate([np.arange(examples.offsets[row], examples.offsets[row + 1]) for row in rows])
    types = None if examples.token_type_ids is None else examples.token_type_ids[tokens]
    return dataclasses.replace(
        examples,
        input_ids=examples.input_ids[tokens],
        token_type_ids=types,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=examples.labels[rows],
    )
