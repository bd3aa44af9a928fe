"""From a run to a folder that loads anywhere: weights, config, tokenizer, their code and a card of what was measured."""

import importlib.util
import secrets
import shutil
from pathlib import Path

from hpc_compress import analysis, identity
from hpc_compress.config import ConfigError
from hpc_compress.search.objective import speed_up
from hpc_compress.store import Store
from hpc_compress.types import Task

CODE = "modeling_hpc_compress.py"
LOADING = """from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained({path!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({path!r})
logits = model(**tokenizer({text}, return_tensors="pt")).logits"""


def export(root: Path, target: Path, candidate: str | None = None) -> Path:
    """Export a candidate of a finished run, by default the best one.

    Raises: ConfigError for an unknown candidate or a target that holds something else.
    """
    run = analysis.open_run(root)
    if candidate is None:
        if run.result is None:
            raise ConfigError(f"{root} has not come to its end, so it has no best model yet; name one with --candidate")
        candidate = run.result.best
    known = {generation_id for generation in run.generations for generation_id in generation.born_ids}
    found = [id for id in (run.base_id, *sorted(known)) if id.startswith(candidate) and id in run.outcomes]
    if len(found) != 1 or run.outcomes[found[0]].measurement is None:
        raise ConfigError(
            f"--candidate {candidate!r} names {len(found)} measured candidates of {root}; "
            "see the column `candidate` of candidates.csv"
        )
    if target.exists() and not (target / CODE).is_file() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty and not an earlier export; choose another folder")
    task = run.outcomes[found[0]].task
    weights, tokenizer = _artifacts(Store(root), task)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        shutil.copytree(tokenizer, draft)
        shutil.copytree(weights, draft, dirs_exist_ok=True)  # with a tokenizer of its own, if its vocabulary was trimmed
        shutil.copy(_code(), draft / CODE)
        (draft / "README.md").write_text(card(run, found[0], target), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _artifacts(store: Store, task: Task) -> tuple[Path, Path]:
    """The deployed model and the base model's tokenizer. A dead candidate's model was deleted and is computed again."""
    weights, tokenizer = store.artifact(identity.deployed_key(task)), store.artifact("tokenizer")
    if weights is None or tokenizer is None:
        from hpc_compress import worker

        worker.restore(store.root, task)
        weights, tokenizer = store.path(identity.deployed_key(task)), store.path("tokenizer")
    return weights, tokenizer


def _code() -> Path:
    """The modeling file, found without importing it and with it torch."""
    spec = importlib.util.find_spec("hpc_compress.models")
    assert spec
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / CODE


def card(run: analysis.Run, candidate: str, target: Path) -> str:
    """A model card: where the model comes from, what was done to it, what was measured, how to load it."""
    outcome = run.report_of(candidate) or run.outcomes[candidate]
    measurement, task, dataset = outcome.measurement, outcome.task, run.plan.dataset
    assert measurement is not None
    split = "report" if task.split == "report" else "search"
    steps = (*task.genome.steps, *task.genome.deploy)
    figures = {
        **{f"{name} ({split} split)": f"{value:.4f}" for name, value in measurement.metrics.items()},
        "weights": f"{measurement.model_bytes / 1e6:.1f} MB",
        "parameters": f"{measurement.parameters / 1e6:.2f} M",
        "of them in the encoder": f"{measurement.encoder_parameters / 1e6:.2f} M",
        "speed-up over the base model": f"{speed_up(measurement):.2f}x on {measurement.device}",
    }
    peak = {"peak GPU memory": f"{measurement.peak_bytes / 1e6:.1f} MB"} if measurement.peak_bytes else {}
    program = any(step.params.get("scheme") == "onnx_int8" for step in steps)
    needs = ["It runs in ONNX Runtime, on CPUs: `pip install onnxruntime`.", ""] if program else []
    text = '"a text", "a second text"' if dataset.pair else '"a text"'
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-classification",
            "tags: [hpc_compress]",
            "---",
            f"# {run.plan.base.name} compressed for {dataset.name}",
            "",
            f"Base model: `{run.plan.base.name}`" + (f", revision {run.plan.base.revision}" if run.plan.base.revision else ""),
            f"(fingerprint {run.plan.base.fingerprint}). Found by hpc_compress as candidate `{candidate}`.",
            "",
            "| measured | |",
            "| --- | --- |",
            *(f"| {name} | {value} |" for name, value in {**figures, **peak}.items()),
            "",
            f"Latency: one pass over {measurement.protocol.sentences} sentences at most, "
            f"in batches of {measurement.protocol.batch_size}.",
            "",
            "What was done to the base model:",
            "",
            *(f"{number}. `{step.operator}` {step.params or ''}".rstrip() for number, step in enumerate(steps, 1)),
            "",
            *needs,
            "```python",
            LOADING.format(path=target.name, text=text),
            "```",
            "",
        ]
    )
