"""Exports: what a stranger's run folder can't do, and what an export never overwrites."""

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import light
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file
from searches import Setup, artifacts

from hpc_compress import analysis, cli, export, identity
from hpc_compress.config import ConfigError
from hpc_compress.door import DamageError
from hpc_compress.launch.local import Debug
from hpc_compress.problems import PROBLEMS
from hpc_compress.store import Store
from hpc_compress.types import Failure, Genome, Outcome, Step

CONFIG = {
    "model_type": "hpc_compress",
    "stock": {"model_type": "bert", "auto_map": {"AutoConfig": "evil.X"}, "_attn_implementation": "evil/kernel"},
    "auto_map": {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"},
    "attn_implementation": "evil/kernel",
    "_attn_implementation_internal": "evil/kernel",
    "quantization_config": {"quant_method": "evil"},
    "custom_pipelines": {"x": {"impl": "evil.Pipeline"}},
    "architectures": ["Evil"],
}


@pytest.fixture(scope="module")
def searched(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by a worker that only answers: it has no artifacts."""
    root = tmp_path_factory.mktemp("searched") / "run"
    setup.run(root, "probe=false", launcher=Debug(worker="light.run"))
    return root


@pytest.fixture
def foreign(searched: Path, tmp_path: Path) -> Path:
    """A run folder of somebody else, with an artifact of its best candidate that holds more than it should."""
    root = tmp_path / "run"
    shutil.copytree(searched, root)
    weights, tokenizer = artifacts(root)
    for folder in (weights, tokenizer):
        folder.mkdir(parents=True)
    save_file({"x": np.zeros(2, np.float32)}, weights / "model.safetensors")
    (weights / "config.json").write_text(json.dumps(CONFIG))
    (weights / "evil.py").write_text("raise SystemExit('evil')")
    (weights / "modeling_hpc_compress.py").write_text("raise SystemExit('evil')")
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "evil.T"}, "model_max_length": 9}')
    return root


def test_nothing_foreign_is_shipped_but_data(foreign: Path, tmp_path: Path):
    target = export.export(foreign, tmp_path / "model")
    names = {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "README.md", export.CODE}
    assert {path.name for path in target.iterdir()} == names
    assert (target / export.CODE).read_bytes() == export._code().read_bytes()
    config = json.loads((target / "config.json").read_text())
    assert "evil" not in (target / "config.json").read_text().lower()
    name = "HpcCompressForSequenceClassification"
    ours = {"AutoConfig": "HpcCompressConfig", "AutoModelForSequenceClassification": name}
    assert config["auto_map"] == {auto: f"modeling_hpc_compress.{own}" for auto, own in ours.items()}
    assert config["architectures"] == [name]
    assert config["stock"] == {"model_type": "bert"}
    assert json.loads((target / "tokenizer_config.json").read_text()) == {"model_max_length": 9}


def test_the_names_are_those_of_the_models():
    from hpc_compress.models import artifact
    from hpc_compress.models import modeling_hpc_compress as modeling

    assert modeling.HpcCompressConfig.model_type == export.MODEL_TYPE
    for kind in PROBLEMS.values():
        for name, known, config in (
            (kind.model_class, artifact.STOCK, "HpcCompressConfig"),
            (kind.program_class, artifact.PROGRAMS, "HpcCompressOnnxConfig"),
        ):
            assert getattr(modeling, name) in known
            assert getattr(modeling, name).config_class.__name__ == config
            assert getattr(modeling, name).auto_class.__name__ == kind.auto_class
    assert {modeling.WEIGHTS, modeling.PROGRAM} == set(export.WEIGHTS)


def test_trust_ships_what_an_operator_wrote(foreign: Path, tmp_path: Path):
    for _ in range(2):  # the second one over the first
        target = export.export(foreign, tmp_path / "model", trust=True)
    assert (target / "evil.py").is_file()
    assert (target / export.CODE).read_bytes() == export._code().read_bytes()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "", "artifacts"])
def test_no_link_leads_out_of_the_run(foreign: Path, tmp_path: Path, name: str):
    weights, tokenizer = artifacts(foreign)
    path = tokenizer / name if name == "tokenizer.json" else foreign / name if name == "artifacts" else weights / name
    moved = tmp_path / "secret"
    path.rename(moved)
    path.symlink_to(moved)
    with pytest.raises(DamageError, match="leads out"):
        export.export(foreign, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["base/tokenizer.json", "base/vocab.txt", "data/train.parquet", "artifacts/a/config.json"])
def test_no_link_is_followed_to_compute_a_model_again(searched: Path, tmp_path: Path, name: str):
    root = Path(shutil.copytree(searched, tmp_path / "run"))
    (tmp_path / "secret").write_text("dear diary")
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).unlink(missing_ok=True)
    (root / name).symlink_to(tmp_path / "secret")
    with pytest.raises(DamageError, match=f"{name} leads out"):
        export.export(root, tmp_path / "model")
    (root / name).unlink()
    os.mkfifo(root / name)  # to open it would wait for a writer
    with pytest.raises(DamageError, match=f"{name} is not a regular file"):
        export.export(root, tmp_path / "model")


@pytest.mark.parametrize("name", ["base/config.json", "base/model.safetensors", "data/train.parquet"])
def test_a_model_that_can_not_be_computed_again_is_told_with_a_line(searched: Path, tmp_path: Path, name: str):
    root = Path(shutil.copytree(searched, tmp_path / "run"))
    (root / name).write_bytes(b"x")
    with pytest.raises(DamageError, match="the model can't be computed again: "):
        export.export(root, tmp_path / "model")


def test_a_full_disk_ends_an_export_with_a_line(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(*arguments: Any, **more: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    root = Path(shutil.copytree(searched, tmp_path / "run"))
    monkeypatch.setattr("hpc_compress.models.artifact.save_file", full)
    monkeypatch.setattr(sys, "argv", ["hpc-compress", "export", str(root), str(tmp_path / "model")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "model.safetensors: No space left on device; free some room" in capsys.readouterr().err


def test_a_pipe_is_no_file(foreign: Path, tmp_path: Path):
    path = artifacts(foreign)[0] / "model.safetensors"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DamageError, match="not a regular file"):
        export.export(foreign, tmp_path / "model")


OWN = """
from pathlib import Path
Path("imported").touch()

def own(model, context, scheme):
    return model

def last_one_goes(model, batches, units):
    import torch
    return {unit: [torch.arange(3.0).flip(0)] for unit in units}
"""
FOREIGN = {
    "operator": Step(operator="stranger.own", params={"scheme": "\x1b[2J"}),
    "criterion": Step(operator="drop_layers", params={"criterion": "stranger.last_one_goes"}),
    "target": Step.model_construct(operator="prune", params={"share": 0.5, "_target_": "stranger.own"}),
}


def with_candidate(root: Path, genome: Genome) -> str:
    """Add a measured candidate to a run, without an artifact; returns its id."""
    store, run = Store(root), analysis.open_run(root)
    task = run.outcomes[run.base_id].task.model_copy(update={"genome": genome})
    task_id = store.add_task(task)
    store.settle(light.answer(task))
    return task_id


@pytest.mark.slow
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_run_imports_nothing_without_trust(
    kind: str,
    foreign: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "stranger.py").write_text(OWN)
    task_id = with_candidate(foreign, Genome(steps=(FOREIGN[kind],)))
    command = ["hpc-compress", "export", "run", "model", "--candidate", task_id]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "add --trust" in capsys.readouterr().err or kind == "target"
    assert not (tmp_path / "imported").exists()

    monkeypatch.setattr(sys, "argv", [*command, "--trust"])
    if kind == "target":  # no trust makes a parameter say what runs
        with pytest.raises(SystemExit):
            cli.main()
    else:
        cli.main()
        assert (tmp_path / "model" / "model.safetensors").is_file()
        assert "was computed again" in caplog.text
        assert "\x1b" not in caplog.text
    assert (tmp_path / "imported").exists() == (kind != "target")
    sys.modules.pop("stranger", None)


def test_a_corpus_of_another_folder_is_not_read_without_trust(foreign: Path, tmp_path: Path):
    (tmp_path / "letters.txt").write_text("dear diary")
    step = Step(operator="trim_vocabulary", params={"corpus": str(tmp_path / "letters.txt")})
    task_id = with_candidate(foreign, Genome(deploy=(step,)))
    with pytest.raises(ConfigError, match=r"letters\.txt is needed.*add --trust"):
        export.export(foreign, tmp_path / "model", task_id)


def test_status_imports_nothing_from_where_it_is_given(foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["hpc-compress", "status", "run"])
    cli.main()
    assert sys.path == before


def test_a_card_holds_no_control_characters(foreign: Path, tmp_path: Path):
    plan = json.loads((foreign / "run.json").read_text())
    plan["base"]["name"], plan["dataset"]["name"] = "evil\x1b[2J\n# model", "evil\x1b[2J"
    (foreign / "run.json").write_text(json.dumps(plan))
    run = analysis.open_run(foreign)
    outcome = run.outcomes[run.base_id]
    measurement = outcome.measurement.model_copy(update={"device": "a\x1b|b\nc", "metrics": {"a\x1b|b\nc": 1.0}})
    path = foreign / "tasks" / run.base_id / "outcome.json"
    path.write_text(outcome.model_copy(update={"measurement": measurement}).model_dump_json())
    (foreign / "tasks" / run.seen[run.base_id].report_id / "outcome.json").unlink()
    text = export.card(analysis.open_run(foreign), run.base_id, tmp_path / "model")
    assert "\x1b" not in text
    assert text.count("\n# ") == 1
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")} == {3}


def test_a_strangers_file_name_is_printed_on_one_line(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    root = Path(shutil.copytree(searched, tmp_path / "run"))
    (root / "base" / "a\x1b[2J\nb").symlink_to(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hpc-compress", "export", str(root), str(tmp_path / "model")])
    with pytest.raises(SystemExit):
        cli.main()
    assert "/base/a?[2J b leads out of" in capsys.readouterr().err


def test_a_card_tells_of_the_search_where_the_report_failed(foreign: Path, tmp_path: Path):
    run = analysis.open_run(foreign)
    task = run.report_of(run.base_id).task
    (foreign / "tasks" / identity.task_id(task) / "outcome.json").unlink()
    Store(foreign).settle(Outcome(task=task, failure=Failure(kind="memory", stage="quality", message="none left")))
    assert "(search split)" in export.card(analysis.open_run(foreign), run.base_id, tmp_path / "model")


# --- targets ---


def a_source(target: Path) -> None:
    for name in (export.CODE, "artifact.py", "config.json"):
        (target / name).write_text("{}")


def with_notes(target: Path) -> None:
    (target / "notes.txt").write_text("precious")


def with_a_link(target: Path) -> None:
    (target / "tokenizer.json").unlink()
    (target / "tokenizer.json").symlink_to(target / "config.json")


def another_model(target: Path) -> None:
    (target / "config.json").write_text('{"model_type": "bert"}')


@pytest.mark.parametrize("change", [a_source, with_notes, with_a_link, another_model])
def test_only_an_export_is_replaced(foreign: Path, tmp_path: Path, change: Callable[[Path], None]):
    target = tmp_path / "model"
    export.export(foreign, target)
    change(target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(ConfigError, match="choose another folder"):
        export.export(foreign, target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_a_folder_that_is_no_export_is_not_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.txt").touch()
    monkeypatch.setattr(Path, "rglob", lambda *arguments: pytest.fail("it may be a home folder"))
    with pytest.raises(ConfigError, match="not an earlier export"):
        export._require_replaceable(tmp_path)


def test_an_export_that_fails_leaves_the_earlier_one(foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target, rename = export.export(foreign, tmp_path / "model"), Path.rename
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def fails_for_a_new_one(self: Path, place: Path) -> Path:
        if place == target and (self / "README.md").read_text() != before["README.md"].decode():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, place)

    monkeypatch.setattr(Path, "rename", fails_for_a_new_one)
    monkeypatch.setattr(export, "card", lambda *arguments: "another card")
    with pytest.raises(OSError, match="Input/output error"):
        export.export(foreign, target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    monkeypatch.undo()
    export.export(foreign, target)
    assert not list(tmp_path.glob(".export-*"))


def test_an_export_replaces_no_file_and_no_link(foreign: Path, tmp_path: Path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("file", "link"):
        with pytest.raises(ConfigError, match="is no folder"):
            export.export(foreign, tmp_path / name)
    assert (tmp_path / "file").read_text() == "precious"
