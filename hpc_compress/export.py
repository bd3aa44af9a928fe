"""From a run to a folder that loads anywhere: weights, config, tokenizer, their code and a card of what was measured."""

import contextlib
import importlib.util
import json
import logging
import os
import secrets
import shutil
from pathlib import Path
from typing import Any, Literal

from hpc_compress import door, identity
from hpc_compress.analysis import found, runs
from hpc_compress.config import ConfigError
from hpc_compress.deployment.schemes import SCHEMES
from hpc_compress.door import DamageError
from hpc_compress.operators import foreign
from hpc_compress.problems import Problem, problem
from hpc_compress.search.objective import speed_up
from hpc_compress.store import Store
from hpc_compress.types import Measurement, SearchError, Task

CODE = "modeling_hpc_compress.py"
# As in CODE, which can't be imported without torch.
PROGRAM, MODEL_TYPE = "model.onnx", "hpc_compress"
WEIGHTS = ("model.safetensors", PROGRAM)  # one of the two
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spm.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
USED = ("artifacts", "base", "data", "teacher", "checkpoints", "block_times", "scores", "locks")  # folders of a run
EXTRAS = "files_of_operators"  # in an export's config.json: what operators of a user's own wrote, and files of other libraries
Form = Literal["transformers", "onnx", "sentence-transformers"]
LEAD_TO_CODE = (
    "auto_map",
    "custom_pipelines",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_experts_implementation",
    "_experts_implementation_internal",
    "quantization_config",
)

log = logging.getLogger(__name__)


def export(
    root: Path, target: Path, candidate: str | None = None, trust: bool = False, to: Form = "transformers", check: bool = False
) -> Path:
    """Export a candidate of a finished run, by default the one nearest to the targets if the run has any, else the fittest.

    The run folder is taken as a stranger's.
    trust: use what the run names that is no part of this program (operators, criteria, the file of a corpus), and ship the
    files that such operators wrote.
    to: transformers, the model as it was measured; onnx, the same as a program for ONNX Runtime; sentence-transformers, what
    transformers gives for a sentence encoder, also loaded by that library if `check` is set.
    check: load what was written and compare its answers with those of the model in the run folder. This needs torch.

    Raises: ConfigError for an unknown candidate, a target that holds something else, or a run that needs trust;
    DamageError for a run with damaged files; SearchError where the answers differ.
    """
    [run] = runs.open_runs([root])
    if candidate is None:
        if run.result is None:
            raise ConfigError(f"{root} has not come to its end, so it has no best model yet; name one with --candidate")
        nearest = found.nearest(run)
        if nearest is not None and not nearest.within:
            log.warning("%s", door.one_line(nearest.text))
        candidate = nearest.candidate if nearest else run.result.best
    candidates = [
        task_id for task_id, seen in run.seen.items() if seen.split == "search" and not seen.repeats and not seen.study
    ]
    named = [task_id for task_id in candidates if task_id.startswith(candidate)]
    outcome = run.outcomes.get(named[0]) if len(named) == 1 else None
    if outcome is None or outcome.measurement is None:
        damaged = [line for line in run.damage if line.startswith(f"tasks/{candidate}")]
        if damaged and not named:
            raise DamageError(f"{run.root}/{damaged[0]}; name another candidate with --candidate")
        raise ConfigError(
            f"--candidate {candidate!r} names {len(named)} measured candidates of {root}; "
            "see the column `candidate` of candidates.csv"
        )
    place = Path(os.path.abspath(target))
    _require_replaceable(place)
    weights, tokenizer = _artifacts(Store(root), outcome.task, trust)
    draft = place.with_name(f".export-{secrets.token_hex(4)}")
    try:
        draft.mkdir(parents=True)
        for folder in (tokenizer, weights):  # a model with a trimmed vocabulary has a tokenizer of its own
            for name in TOKENIZER:
                _copy(run.root, folder, name, draft)
        extras = _extras(run.root, weights, trust)
        for name in (*WEIGHTS, *extras):
            _copy(run.root, weights, name, draft)
        if not any((draft / name).is_file() for name in WEIGHTS):
            raise DamageError(f"{weights} has no weights; delete the folder, and they are computed again")
        found_config = door.json_object(door.inside(run.root, str(weights / "config.json")))
        kind = problem(run.plan.dataset.problem)
        if to == "sentence-transformers" and kind.pipeline_tag != "sentence-similarity":
            raise ConfigError(
                f"--to=sentence-transformers is for models that embed sentences, and this one is for {kind.pipeline_tag}; "
                "use --to=transformers"
            )
        others = kind.exported(_config(found_config, kind, draft, extras), run.plan.dataset)
        for name, content in others.items():
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        extras = [*extras, *others]
        config = _config(found_config, kind, draft, extras)
        (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if (draft / "tokenizer_config.json").is_file():
            safe = _without(door.json_object(draft / "tokenizer_config.json"))
            (draft / "tokenizer_config.json").write_text(json.dumps(safe, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(_code(), draft / CODE)
        (draft / "README.md").write_text(card(run, named[0], target), encoding="utf-8")
        if check or to == "onnx":
            _deliver(draft, kind, extras, to, check)
        _swap(draft, place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _deliver(draft: Path, kind: Problem, extras: list[str], to: Form, check: bool) -> None:
    """Turn a draft into the form that is wanted, and prove it.

    Raises: ConfigError for a model that can't have this form, SearchError where the answers differ, DamageError where what lies
    in the run folder is no model.
    """
    from hpc_compress import delivery

    try:
        if to == "onnx":
            wanted = delivery.as_program(draft)
            config = _config(door.json_object(draft / "config.json"), kind, draft, extras)
            (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        else:
            wanted = delivery.answers(draft)
        if check:
            delivery.check(draft, kind, wanted)
            if to == "sentence-transformers":
                delivery.check_sentences(draft)
    except (ConfigError, DamageError, SearchError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise  # of the disk
        raise DamageError(f"the model can't be loaded: {door.one_line(str(error))}") from error


def _swap(draft: Path, place: Path) -> None:
    """Put a folder in the place of an earlier one, which is there again if that fails."""
    old = place.with_name(f".export-{secrets.token_hex(4)}")
    with contextlib.suppress(FileNotFoundError):
        place.rename(old)
    try:
        draft.rename(place)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _require_replaceable(target: Path) -> None:
    """Raises: ConfigError for a folder that holds anything but an earlier export."""
    if not target.is_symlink() and not target.exists():
        return
    advice = "choose another folder"
    if target.is_symlink() or not target.is_dir():
        raise ConfigError(f"{target} is no folder; {advice}")
    if not any(target.iterdir()):
        return
    try:
        config = door.json_object(target / "config.json")
    except (FileNotFoundError, DamageError):
        config = {}
    if config.get("model_type") != MODEL_TYPE or not (target / CODE).is_file():
        raise ConfigError(f"{target} is not empty and not an earlier export; {advice}")
    found = {str(path.relative_to(target)): path for path in target.rglob("*") if path.is_symlink() or not path.is_dir()}
    extras = config.get(EXTRAS) if isinstance(config.get(EXTRAS), list) else []
    others = found.keys() - {*WEIGHTS, *TOKENIZER, *map(str, extras or []), "config.json", "README.md", CODE}
    others |= {name for name, path in found.items() if path.is_symlink() or not path.is_file()}
    if others:
        raise ConfigError(f"{target} is an earlier export, but {min(others)} in it is none of its files; {advice}")


def _extras(root: Path, weights: Path, trust: bool) -> list[str]:
    """Files of an operator of a user's own: they may hold anything, so they are shipped by trust alone."""
    found = sorted(str(path.relative_to(weights)) for path in weights.rglob("*") if not path.is_dir() or path.is_symlink())
    extras = [name for name in found if name not in (*WEIGHTS, *TOKENIZER, "config.json", "README.md", CODE)]
    if extras and not trust:
        log.warning("left out, since only --trust ships them: %s", door.one_line(", ".join(extras)))
    return extras if trust else []


def _copy(root: Path, folder: Path, name: str, target: Path) -> None:
    """Copy a file if it is there.

    Raises: DamageError when it is no regular file, or lies outside of the run folder.
    """
    path = door.inside(root, str(folder / name))
    if not path.exists():
        return
    if not path.is_file():
        raise DamageError(f"{path} is not a regular file")
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target / name)


def _config(found: dict[str, Any], kind: Problem, draft: Path, extras: list[str]) -> dict[str, Any]:
    """A model's config.json without anything that leads to other code than ours."""
    if found.get("model_type") != MODEL_TYPE:
        raise DamageError(f"the config.json of the model says model_type {found.get('model_type')!r}, and not {MODEL_TYPE!r}")
    is_program = (draft / PROGRAM).is_file()
    name = kind.program_class if is_program else kind.model_class
    code, config = CODE.removesuffix(".py"), "HpcCompressOnnxConfig" if is_program else "HpcCompressConfig"
    ours = {"AutoConfig": f"{code}.{config}", kind.auto_class: f"{code}.{name}"}
    return {**_without(found), "architectures": [name], "auto_map": ours, **({EXTRAS: extras} if extras else {})}


def _without(values: Any) -> Any:
    """JSON data without the keys by which transformers finds code, wherever they stand."""
    if isinstance(values, dict):
        return {key: _without(value) for key, value in values.items() if key not in LEAD_TO_CODE}
    return [_without(value) for value in values] if isinstance(values, list) else values


def _artifacts(store: Store, task: Task, trust: bool) -> tuple[Path, Path]:
    """The deployed model and the base model's tokenizer. A dead candidate's model was deleted and is computed again."""
    for name in USED:
        door.inside(store.root, name)
    weights, tokenizer = store.artifact(identity.deployed_key(task)), store.artifact("tokenizer")
    if weights is None or tokenizer is None:
        steps = (*task.base.preparation, *task.genome.steps, *task.genome.deploy)
        own = sorted({path for step in steps for path in foreign(step)})
        if own and not trust:
            raise ConfigError(
                f"this model must be computed again, and for that {door.one_line(', '.join(own))} is needed, which is no part "
                "of this program: add --trust if you trust it and this run folder, or export a candidate that is alive"
            )
        for name in USED:  # the libraries that read models and tables follow links
            door.all_inside(store.root, name)
        _restore(store.root, task)
        weights, tokenizer = store.path(identity.deployed_key(task)), store.path("tokenizer")
    return weights, tokenizer


def _restore(root: Path, task: Task) -> None:
    """Raises: DamageError where what lies in the run folder does not make a model."""
    from hpc_compress import worker

    try:
        worker.restore(root, task)
    except (ConfigError, DamageError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise  # of the disk
        raise DamageError(f"{root}: the model can't be computed again: {door.one_line(str(error))}") from error


def _code() -> Path:
    """The modeling file, found without importing it and with it torch."""
    spec = importlib.util.find_spec("hpc_compress.models")
    assert spec
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / CODE


def _with_error(name: str, measurement: Measurement) -> str:
    error = measurement.standard_errors.get(name)
    return f"{measurement.metrics[name]:.4f}" + ("" if error is None else f" ± {error:.4f} (standard error)")


def card(run: runs.Run, candidate: str, target: Path) -> str:
    """A model card: where the model comes from, what was done to it, what was measured, how to load it."""
    reported = run.report_of(candidate)
    outcome = reported if reported and reported.measurement else run.outcomes[candidate]
    task, dataset = outcome.task, run.plan.dataset
    there = run.seen[identity.task_id(task)].measurement  # with all timings, as the run's first device sees it
    measurement = there or outcome.measurement
    assert measurement is not None
    split = "report" if task.split == "report" else "search"
    steps = (*task.genome.steps, *task.genome.deploy)
    figures = {
        **{f"{name} ({split} split)": _with_error(name, measurement) for name in measurement.metrics},
        "weights": f"{measurement.model_bytes / 1e6:.1f} MB",
        "parameters": f"{measurement.parameters / 1e6:.2f} M",
        "of them in the encoder": f"{measurement.encoder_parameters / 1e6:.2f} M",
        "speed-up over the base model": f"{speed_up(measurement):.2f}x on {measurement.device}"
        + (" (predicted)" if measurement.predicted else ""),
    }
    if measurement.base_best_latency_ms:
        best = f"speed-up over the base model in {measurement.base_best_precision}"
        figures[best] = f"{speed_up(measurement, 'best'):.2f}x"
    peak = {"peak GPU memory": f"{measurement.peak_bytes / 1e6:.1f} MB"} if measurement.peak_bytes else {}
    rows = [SCHEMES[name] for name in map(str, (step.params.get("scheme") for step in steps)) if name in SCHEMES]
    needs = [line for row in rows if row.note for line in (row.note, "")]
    kind = problem(dataset.problem)
    cell = door.markdown_cell
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {kind.pipeline_tag}",
        "tags: [hpc_compress]",
        "---",
        f"# {run.plan.base.name} compressed for {dataset.name}",
        "",
        f"Base model: `{run.plan.base.name}`" + (f", revision {run.plan.base.revision}" if run.plan.base.revision else ""),
        f"(fingerprint {run.plan.base.fingerprint}). Found by hpc_compress as candidate `{candidate}`.",
        "",
        "| measured | |",
        "| --- | --- |",
        *(f"| {cell(name)} | {cell(value)} |" for name, value in {**figures, **peak}.items()),
        "",
        f"Latency: one pass over {measurement.protocol.sentences} sentences at most, "
        f"in batches of {measurement.protocol.batch_size}.",
        "",
        *([f"Data: {'; '.join(run.plan.rows.lines())}.", ""] if run.plan.rows else []),
        "What was done to the base model:",
        "",
        *(f"{number}. `{step.operator}` {step.params or ''}".rstrip() for number, step in enumerate(steps, 1)),
        "",
        *needs,
    ]
    safe = [door.one_line(line, most=5_000) for line in lines]
    return "\n".join([*safe, "```python", kind.example(target.name, dataset), "```", ""])
