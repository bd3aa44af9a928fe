"""`hpc-compress benchmark`: models in folders, timed on this machine."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from hpc_compress import benchmark, cli
from hpc_compress.config import ConfigError
from hpc_compress.door import DamageError
from hpc_compress.models import artifact, surgery
from hpc_compress.problems import PROBLEMS


@pytest.fixture
def folders(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> list[Path]:
    """A base model, and a much smaller one in the form of an export."""
    base = tiny_checkpoint("bert", layers=6, heads=4, hidden=64, ffn=256)
    model = PROBLEMS["classification"].load_base(base, ("no", "yes"), new_head=True, seed=0)
    surgery.drop_layers(model, range(1, 6))
    small = tmp_path / "small"
    shutil.copytree(base, small, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    artifact.save(model, small)
    return [base, small]


def test_speed_is_compared_turn_by_turn(folders: list[Path], monkeypatch: pytest.MonkeyPatch):
    # The machine grows slower, for both alike; the clock stops before there are enough passes of the larger batch.
    monkeypatch.setattr(
        benchmark.measure,
        "latencies_ms",
        lambda pairs, how, on: (
            [tuple(base / part for base in (10.0, 20, 30, 40, 50)[: 5 if len(pairs[0][1][0]) == 2 else 1]) for part in (1, 4)]
        ),
    )
    table = benchmark.run(folders, [8, 2], [16])
    assert list(zip(table["model"], table["batch_size"], strict=True)) == [
        (folder.name, size) for size in (2, 8) for folder in folders
    ]
    assert table["speed_up"].tolist() == pytest.approx([1, 4, 1, 4])
    assert table["latency_ms"].tolist() == pytest.approx([30, 7.5, 10, 2.5])
    assert table["texts_per_second"].tolist() == pytest.approx([200 / 3, 800 / 3, 800, 3200])
    assert table["latency_error"].isna().tolist() == [False, False, True, True]
    base, small = (table[table["model"] == folder.name].iloc[0] for folder in folders)
    assert small["model_bytes"] == (folders[1] / "model.safetensors").stat().st_size < base["model_bytes"]
    assert small["parameters"] < base["parameters"]
    text = benchmark.as_text(table)
    assert f"| {folders[1].name}, ms" in text
    assert f"Speed-ups are over {folders[0].name}" in text
    assert "raise --seconds" in text


def test_all_models_do_the_work_of_the_exported_ones_task_head(folders: list[Path]):
    """A base model comes with the head of its pretraining, or with none."""
    config = json.loads((folders[0] / "config.json").read_text())
    (folders[0] / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    base, small = benchmark._loaded(folders, torch.device("cpu"))
    assert type(base.model) is type(small.model)
    assert [type(each.model).__name__ for each in benchmark._loaded(folders[:1], torch.device("cpu"))] == ["BertForMaskedLM"]


def test_every_text_has_the_length_and_ordinary_tokens(folders: list[Path]):
    each = benchmark._loaded(folders[:1], torch.device("cpu"))[0]
    for size, length in ((1, 5), (3, 16)):
        batch = benchmark._batch(each, size, length)
        assert batch.inputs["input_ids"].shape == (size, length)
        lengths = sorted(batch.inputs["attention_mask"].sum(1).tolist())
        assert lengths == ([length] if size == 1 else [length - 1] + [length] * (size - 1))
        real = batch.inputs["attention_mask"].bool()
        assert set(batch.inputs["input_ids"][real].tolist()) <= set(each.tokens.tolist())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lengths", "2"], "--lengths 2: give numbers of tokens of 4 or more"),
        (["--lengths", "100000"], "tokens at most, and --lengths has 100000"),
        (["--batch-sizes", "0"], "--batch-sizes 0: give numbers of texts of 1 or more"),
        (["FOLDER"], "is given more than once"),
        (["."], "it has no config.json"),
    ],
)
def test_what_cannot_be_timed_is_said(
    folders: list[Path],
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
):
    monkeypatch.chdir(tmp_path)
    words = [str(folders[0]) if word == "FOLDER" else word for word in words]
    monkeypatch.setattr("sys.argv", ["hpc-compress", "benchmark", str(folders[0]), *words])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert message in capsys.readouterr().err


def test_a_stranger_s_folder_is_data(folders: list[Path]):
    config = json.loads((folders[1] / "config.json").read_text())
    (folders[1] / "config.json").write_text(json.dumps({**config, "architectures": ["Popen"]}))
    with pytest.raises(DamageError, match="'Popen'"):
        benchmark.run(folders, [1], [8])
    (folders[1] / "config.json").write_text("{}")
    with pytest.raises((DamageError, ConfigError), match="small"):
        benchmark.run(folders, [1], [8])


@pytest.mark.slow
def test_the_command_writes_its_tables(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    words = [*map(str, folders), "--batch-sizes", "2", "--lengths", "8", "16", "--seconds", "1", f"--out={tmp_path / 'out'}"]
    monkeypatch.setattr("sys.argv", ["hpc-compress", "benchmark", *words])
    cli.main()
    said = capsys.readouterr().out
    assert (tmp_path / "out/benchmark.md").read_text().strip() in said
    table = pd.read_csv(tmp_path / "out/benchmark.csv")
    assert table["length"].tolist() == [8, 8, 16, 16]
    assert table["passes"].min() >= 1
