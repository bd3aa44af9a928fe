"""What people type and hand in by mistake: each is answered with a line and exit code 2, and nothing of theirs is touched."""

import contextlib
import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.numpy import load_file, save_file
from simulated import nothing_to_load
from submitit import SlurmExecutor
from submitit.core.utils import UncompletedJobError

from hpc_compress import cli, config, defaults, guard, store
from hpc_compress.analysis import runs
from hpc_compress.config import ConfigError, ModelConfig, RunConfig
from hpc_compress.door import DamageError
from hpc_compress.models import inspection, pretrained
from hpc_compress.search.genetic import Genetic
from hpc_compress.search.objective import Product
from hpc_compress.search.space import Shape
from hpc_compress.store import Store
from hpc_compress.types import SearchError


@dataclass(frozen=True)
class Answer:
    code: int
    stdout: str
    stderr: str


Ask = Callable[..., Answer]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """A function that gives a command in the folder `tmp_path`, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")  # prefetch changes them; put back at the end
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def ask(*words: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["hpc-compress", *words])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            for handler in set(root.handlers) - set(handlers):
                handler.close()
            root.handlers, root.level = list(handlers), level
        said = capsys.readouterr()
        assert "Traceback" not in said.err, said.err
        return Answer(code, said.out, said.err)

    return ask


@pytest.fixture
def rows(tmp_path: Path) -> list[str]:
    """The words for a dataset that is in order."""
    table = pd.DataFrame({"text": [f"row {number}" for number in range(40)], "label": ["a", "b"] * 20})
    table.to_csv(tmp_path / "rows.csv", index=False)
    return ["dataset=file", "dataset.train=rows.csv"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- names ---

BAD_NAMES = [
    "..",
    ".",
    "../precious",
    "a/../../precious",
    "/tmp/precious",
    "a//b",
    "a/",
    "./a",
    "'a\nb'",
    "'a\x1b[31mb'",
    "50%",
    "x" * 256,
    "ü" * 128,
    "a/" + "y" * 300,
    "''",
    "a\udcff",
]


def test_bad_names_are_told_from_good_ones():
    for name in BAD_NAMES:
        with pytest.raises(ConfigError, match="choose"):
            config.check_name(name.strip("'"))
    for name in ("demo", "a/b", "seed=1,objective.a=2", "...", ".hidden", "ünï", "x" * 255):
        config.check_name(name)


@pytest.mark.parametrize("name", [BAD_NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in BAD_NAMES[1:])])
def test_a_name_that_leads_elsewhere_is_refused(ask: Ask, tmp_path: Path, name: str):
    for folder in ("base", "artifacts", "checkpoints", "results"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.txt").write_text("precious")
    before, mode = files(tmp_path), tmp_path.stat().st_mode
    answer = ask("search", f"name={name}")
    assert answer.code == 2, answer.stderr
    assert "name=" in answer.stderr
    assert len(answer.stderr) < 1000
    assert files(tmp_path) == before
    assert tmp_path.stat().st_mode == mode


def test_every_name_of_a_sweep_is_looked_at(ask: Ask, tmp_path: Path):
    answer = ask("search", "-m", "name=fine,../precious")
    assert answer.code == 2
    assert "../precious" in answer.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_sweep_leaves_a_folder_that_holds_something_else_as_it_is(ask: Ask, tmp_path: Path, rows: list[str]):
    mine = tmp_path / "results/mine"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("precious")
    for words in (["-m", "name=mine"], ["name=mine", "hydra.mode=MULTIRUN"], ["-m", "hydra.sweep.dir=results/mine"]):
        answer = ask("search", *words, *rows, "model.path=nowhere", "seed=1,2")
        assert answer.code == 2, answer.stderr
        assert "something else than a run" in answer.stderr
        assert files(tmp_path / "results") == {"mine/notes.txt": b"precious"}


@pytest.mark.slow
def test_what_an_earlier_sweep_has_left_is_no_reason_to_refuse(ask: Ask, tmp_path: Path, rows: list[str]):
    """Nor is it for a run in the very folder of the sweep, which here is that of the default name."""
    for words in (["name=mine", "seed=1,2"], ["name=my_run,other", "hydra.sweep.subdir=."]):
        for _ in range(2):
            answer = ask("search", "-m", *words, *rows, "model.path=nowhere")
            assert answer.code == 1
            assert answer.stderr.count("model.path='nowhere' is no local folder") == 4
    assert {"mine/multirun.yaml", "my_run/multirun.yaml"} <= files(tmp_path / "results").keys()


@pytest.mark.slow
def test_a_folder_that_holds_something_else_is_left_as_it_is(ask: Ask, tmp_path: Path, rows: list[str]):
    mine = tmp_path / "results/mine"
    (mine / ".hydra").mkdir(parents=True)
    (mine / "base").mkdir()
    for name in ("base/model.bin", ".hydra/config.yaml", "notes.txt"):
        (mine / name).write_text("precious")
    before, mode = files(mine), mine.stat().st_mode
    for words in (["name=mine"], ["name=other", "hydra.run.dir=results/mine"]):
        answer = ask("search", *rows, *words)
        assert answer.code == 2
        assert "something else than a run" in answer.stderr
        assert files(mine) == before
        assert mine.stat().st_mode == mode


def test_the_draft_of_a_killed_drivers_first_file_is_no_foreign_file(tmp_path: Path):
    with store._draft(tmp_path / "driver.json", "{"):
        assert [path.name.startswith(".driver.json.") for path in tmp_path.iterdir()] == [True]
        guard._require_ours(Store(tmp_path))
    (tmp_path / ".driver.json.mine").touch()
    with pytest.raises(ConfigError, match="something else than a run"):
        guard._require_ours(Store(tmp_path))


@pytest.mark.slow
def test_a_refused_start_leaves_the_record_of_the_run_alone(ask: Ask, tmp_path: Path, rows: list[str]):
    run = tmp_path / "results/mine"
    (run / ".hydra").mkdir(parents=True)
    (run / ".hydra/config.yaml").write_text("of the run")
    (run / "run.json").write_text("{")
    before = files(run)
    for change in ("seed=-1", "model.path=nowhere"):
        assert ask("search", *rows, "name=mine", change).code == 2
        assert files(run) == before


@pytest.mark.slow
def test_no_group_can_write_where_a_start_has_made_folders(ask: Ask, tmp_path: Path, rows: list[str]):
    """A refused one too, by Hydra, before the driver begins."""
    before = os.umask(0o002)
    try:
        assert ask("search", *rows, "name=a/b", "model.path=nowhere").code == 2
        assert os.umask(0o002) == 0o002
    finally:
        os.umask(before)
    made = [path for path in (tmp_path / "results").rglob("*") if path.is_dir()]
    assert not [path for path in (tmp_path / "results", *made) if path.stat().st_mode & 0o022]


@pytest.mark.slow
def test_the_settings_of_a_run_are_kept_and_a_refused_change_leaves_them(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "model").mkdir()
    words = [*nothing_to_load(tmp_path / "model"), "+launcher.worker=light.run", "name=mine", "probe=false", "generations=1"]
    monkeypatch.setattr(cli, "_answer", lambda *arguments: None)  # there are no models to export
    assert ask("search", *words).code == 0
    kept = files(tmp_path / "results/mine/.hydra")
    assert {"config.yaml", "overrides.yaml"} == kept.keys()
    assert b"generations: 1" in kept["config.yaml"]
    answer = ask("search", *words, "seed=1")
    assert answer.code == 2
    assert "seed: was 0, now 1" in answer.stderr
    assert files(tmp_path / "results/mine/.hydra") == kept
    assert sys.path[-1] == str(tmp_path)


# --- settings ---

BAD_SETTINGS = [
    "objective.b=inf",
    "objective.a=nan",
    "objective.c=-inf",
    "objective.a=1e999",
    "required_quality=nan",
    "required_quality='nan'",
    "required_quality=inf",
    "protocol.tolerance=nan",
    "protocol.max_seconds=inf",
    "protocol.max_seconds='inf'",
    "teacher_gb=inf",
    "dataset.search_rows=nan",
    "dataset.report_rows=inf",
    "strategy.mutation_probability=nan",
    "strategy.mutations.drop_layers.weight=inf",
    "strategy.quantizations.int8.weight=nan",
    "strategy.distill.learning_rate=nan",
    "strategy.fine_tune.epochs=inf",
    "model.fine_tune={learning_rate: 'nan'}",
    "select_after=nan",
    "launcher.checkpoint_minutes=inf",
    "seed=1.5",
    "seed=",
    "seed=null",
    "seed=[1]",
    "seed={a: 1}",
    "seed=true",
    "generations=-1",
    "generations=many",
    "probe=perhaps",
    "report_candidates=0",
    "retries=1.5",
    "retries=null",
    "retries=[1]",
    "model=null",
    "model=[1]",
    "dataset=null",
    "dataset.metrics=[]",
    "dataset.metrics=[accuracy,nosuch]",
    "dataset.metrics=accuracy",
    "dataset.max_length=3",
    "dataset.text=[a]",
    "dataset.problem=both",
    "dataset.train={}",
    "model.head=old",
    "model.path=''",
    "model.path=[1]",
    "model.path=package:..",
    "model.path=package:no.such/x",
    "model.fine_tune=[1]",
    "protocol.batch_size=0",
    "protocol=null",
    "strategy=null",
    "objective=null",
    "launcher=null",
    "launcher._target_=os",
    "launcher._target_=''",
    "launcher._target_=.x.y",
    "objective._target_=[1]",
    "~objective._target_",
    "~strategy",
    "~protocol",
    "~launcher",
    "launcher.checkpoint_minutes={cuda: 5, cpu: 1}",
    "~name",
    "name=${nosuch}",
    "name=${name}",
    "seed=${oc.env:NO_SUCH_VARIABLE}",
    "seed",
    "=1",
    "seed=[1",
    "seed='1",
    "{}",
    "--no-such-option",
    "--config-dir=nosuch",
    "+seed=1",
    "~seed=1",
    "dataset=../x",
    "model.path=a\udcff",
    "model.path=a\x00b",
    "dataset.train=a\x00b",
    "model.fine_tune={_target_: os.system}",
    "strategy.distill={_target_: os.system}",
]


# Each takes Hydra half a second.
QUICK_ONES = [BAD_SETTINGS[0], "~protocol"]


@pytest.mark.parametrize(
    "setting", [setting if setting in QUICK_ONES else pytest.param(setting, marks=pytest.mark.slow) for setting in BAD_SETTINGS]
)
def test_a_bad_setting_is_named(ask: Ask, tmp_path: Path, rows: list[str], setting: str):
    model = checkpoint(tmp_path / "model")
    answer = ask("search", *rows, f"model.path={model}", "launcher=debug", "strategy=genetic", setting)
    assert answer.code == 2, (answer.code, answer.stdout, answer.stderr)
    assert answer.stderr.strip()
    assert not list(tmp_path.rglob("run.json"))


# --- checkpoints ---


def checkpoint(folder: Path, kind: str = "bert", **changes: Any) -> Path:
    """What the driver looks at, in order but for the changes to config.json (None: the key is left out)."""
    folder.mkdir()
    config = {
        "model_type": kind,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_size": 4,
        "vocab_size": 6,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {str(number): number for number in range(6)}}}))
    names = ["attention.self.query.weight", "output.dense.weight"]
    layers = {f"bert.encoder.layer.{number}.{name}": np.ones((4, 4), np.float32) for number in range(2) for name in names}
    save_file({**layers, "bert.embeddings.word_embeddings.weight": np.ones((6, 4), np.float32)}, folder / "model.safetensors")
    return folder


def find(folder: Path) -> None:
    pretrained.find(ModelConfig(path=str(folder)))


def test_a_checkpoint_in_order_is_taken(tmp_path: Path):
    find(checkpoint(tmp_path / "model"))


@pytest.mark.parametrize(("name", "content"), [("vocab.txt", "a\nb\nc\nd\ne\nf\n\n"), ("vocab.json", '{"a": 5}')])
def test_a_vocabulary_of_the_right_size_is_taken(tmp_path: Path, name: str, content: str):
    folder = checkpoint(tmp_path / "model")
    vocabulary(folder, name, content)
    find(folder)


def test_the_families_are_those_of_the_models():
    from hpc_compress.models import modeling_hpc_compress as modeling

    assert set(inspection.LAYERS) == set(modeling.FAMILIES)


@pytest.mark.parametrize("kind", inspection.LAYERS)
def test_layers_are_found_in_a_checkpoint_of_every_family(kind: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path):
    find(tiny_checkpoint(kind))
    folder = Path(shutil.copytree(tiny_checkpoint(kind), tmp_path / "model"))
    path, (count, *_), word = inspection.LAYERS[kind]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, count: config[count] + 1}))
    with pytest.raises(ConfigError, match=rf"says {config[count] + 1} {word}s, and {word} {config[count]} is missing"):
        find(folder)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    gone = [name for name in tensors if f"{path}.0." in name][-1]
    del tensors[gone]
    if config[count] > 1:  # else there is no other layer to compare with
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(ConfigError, match=rf"{word} 0 lacks"):
            find(folder)


def test_albert_of_layers_within_layers_is_refused(tiny_checkpoint: Callable[..., Path], tmp_path: Path):
    folder = Path(shutil.copytree(tiny_checkpoint("albert"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "inner_group_num": 2}))
    with pytest.raises(ConfigError, match="inner_group_num is 2, and only 1 is supported"):
        find(folder)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": None}, "no model_type"),
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"model_type": ["bert"]}, "model_type"),
        ({"model_type": "x" * 10**6}, "model_type"),
        ({"num_hidden_layers": 3}, "layer 2 is missing"),
        ({"num_hidden_layers": 10**9}, "layer 2 is missing"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": [2]}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_attention_heads": 3}, "3 attention heads"),
        ({"hidden_size": "4"}, "hidden_size"),
        ({"vocab_size": 7}, "vocab_size"),
        ({"vocab_size": {}}, "vocab_size"),
        ({"id2label": ["a"]}, "id2label"),
        ({"id2label": {"a": "b"}}, "id2label"),
        ({"id2label": {"1": "b", "2": "c"}}, "id2label"),
        ({"num_labels": "two"}, "num_labels"),
        ({"num_labels": 1001}, "num_labels is 1001"),
    ],
)
def test_an_odd_config_is_named(tmp_path: Path, changes: dict[str, Any], word: str):
    with pytest.raises(ConfigError, match=word) as error:
        find(checkpoint(tmp_path / "model", **changes))
    assert len(str(error.value)) < 1000


def test_heads_must_share_the_width_whatever_the_config_calls_them(tmp_path: Path):
    changes = {"num_attention_heads": None, "hidden_size": None, "n_heads": 3, "dim": 4}
    with pytest.raises(ConfigError, match="3 attention heads can't share a width of 4"):
        find(checkpoint(tmp_path / "model", **changes))


def test_a_config_that_names_no_number_of_labels_means_two(tmp_path: Path):
    folder = checkpoint(tmp_path / "model")
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("{", '{"num_labels": null, ', 1))
    assert pretrained.find(ModelConfig(path=str(folder))).labels == ("LABEL_0", "LABEL_1")


def weights(folder: Path, **changes: Any) -> None:
    """Replace or leave out tensors of a checkpoint."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / "model.safetensors")


def cut(folder: Path, name: str, share: float) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])


def vocabulary(folder: Path, name: str, content: str) -> None:
    """A tokenizer as it was saved before there was a tokenizer.json."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / name).write_text(content)


QUERY = "bert.encoder.layer.1.attention.self.query.weight"
DAMAGE: dict[str, Callable[[Path], Any]] = {
    "config cut short": lambda folder: cut(folder, "config.json", 0.5),
    "config empty": lambda folder: (folder / "config.json").write_text(""),
    "config is a list": lambda folder: (folder / "config.json").write_text("[]"),
    "config is no text": lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{}"),
    "config is deep": lambda folder: (folder / "config.json").write_text("[" * 10**5),
    "config is a folder": lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()),
    "config is a pipe": lambda folder: ((folder / "config.json").unlink(), os.mkfifo(folder / "config.json")),
    "weights cut short": lambda folder: cut(folder, "model.safetensors", 0.9),
    "header cut short": lambda folder: cut(folder, "model.safetensors", 0.01),
    "weights empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "weights of zeros": lambda folder: (folder / "model.safetensors").write_bytes(bytes(1000)),
    "weights are text": lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"),
    "weights gone": lambda folder: (folder / "model.safetensors").unlink(),
    "weights of another name": lambda folder: (folder / "model.safetensors").rename(folder / "other.safetensors"),
    "tensor missing": lambda folder: weights(folder, **{QUERY: None}),
    "tensor of another shape": lambda folder: weights(folder, **{QUERY: np.ones((4, 3), np.float32)}),
    "NaN": lambda folder: weights(folder, **{QUERY: np.array([[1, np.nan]] * 4, np.float32).repeat(2, 1)}),
    "infinity": lambda folder: weights(folder, bias=np.array([np.inf], np.float16)),
    "tokenizer cut short": lambda folder: cut(folder, "tokenizer.json", 0.5),
    "tokenizer gone": lambda folder: (folder / "tokenizer.json").unlink(),
    "tokenizer too large": lambda folder: (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 6}}}'),
    "pieces too many": lambda folder: (folder / "tokenizer.json").write_text('{"model": {"vocab": [1, 2, 3, 4, 5, 6, 7]}}'),
    "added piece too high": lambda folder: (folder / "tokenizer.json").write_text('{"added_tokens": [{"id": 6}]}'),
    "lines too many": lambda folder: vocabulary(folder, "vocab.txt", "\n".join("abcdefg")),
    "piece too high": lambda folder: vocabulary(folder, "vocab.json", '{"a": 6}'),
    "vocabulary cut short": lambda folder: vocabulary(folder, "vocab.json", '{"a": '),
    "index without files": lambda folder: (
        (folder / "model.safetensors").rename(folder / "model-1.safetensors"),
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-2.safetensors"}}'),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_found_before_any_job(tmp_path: Path, damage: str):
    folder = checkpoint(tmp_path / "model")
    find(folder)
    DAMAGE[damage](folder)
    with pytest.raises((ConfigError, DamageError), match="model"):
        find(folder)


def test_nan_in_bfloat16_is_found(tmp_path: Path):
    folder = checkpoint(tmp_path / "model")
    for bits, fine in ((0x3F80, True), (0x7F7F, True), (0x7F80, False), (0xFFC0, False)):
        raw = np.full(3 * 2**20, bits, np.uint16).tobytes()
        head = json.dumps({"x": {"dtype": "BF16", "shape": [3 * 2**20], "data_offsets": [0, len(raw)]}}).encode()
        (folder / "more.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + raw)
        if fine:
            find(folder)
        else:
            with pytest.raises(ConfigError, match="x has NaN"):
                find(folder)


# --- anything at all ---

QUICK = hypothesis.settings(
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.slow
@QUICK
@hypothesis.given(changes=st.dictionaries(st.sampled_from(["model_type", "id2label", *inspection.COUNTS]), JSON, min_size=1))
def test_any_config_is_answered(tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]):
    folder = checkpoint(tmp_path_factory.mktemp("any") / "model", **changes)
    with contextlib.suppress(ConfigError, DamageError):
        find(folder)
        with contextlib.suppress(ValueError):  # which the driver answers
            Shape.of(json.loads((folder / "config.json").read_text()))


@pytest.mark.slow
@QUICK
@hypothesis.given(place=st.integers(0, 600), byte=st.integers(0, 255), end=st.none() | st.integers(0, 900))
def test_any_weights_are_answered(tmp_path_factory: pytest.TempPathFactory, place: int, byte: int, end: int | None):
    folder = checkpoint(tmp_path_factory.mktemp("any") / "model")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[place] = byte
    (folder / "model.safetensors").write_bytes(content[:end])
    with contextlib.suppress(ConfigError, DamageError):
        find(folder)


BY_DEVICE = st.dictionaries(st.sampled_from(sorted(defaults.KINDS)), JSON, max_size=2)
KEYS = st.sampled_from([*sorted(RunConfig.model_fields), "strategy", "objective", "launcher", "cluster", "retries"])
INNER = st.dictionaries(st.sampled_from(["device", "batch_size", "_target_", "workers"]), JSON | BY_DEVICE)


@pytest.mark.slow
@QUICK
@hypothesis.given(values=st.dictionaries(KEYS, JSON | BY_DEVICE | INNER), lost=st.sets(KEYS, max_size=1))
def test_any_settings_are_answered(compose: Callable[..., dict[str, Any]], values: dict[str, Any], lost: set[str]):
    whole = {key: value for key, value in {**compose(), **values}.items() if key not in lost}
    with contextlib.suppress(ConfigError, OmegaConfBaseException):
        cli._settings(OmegaConf.create(whole))


@pytest.mark.slow
@QUICK
@hypothesis.given(
    values=st.dictionaries(st.sampled_from([*Product.model_fields, *Genetic.model_fields, "workers", "threads"]), JSON),
    target=st.sampled_from(["search.objective.Product", "search.genetic.Genetic", "launch.local.Local", "no.such", ""]),
)
def test_any_parts_are_answered(values: dict[str, Any], target: str):
    with contextlib.suppress(ConfigError):
        config.build({**values, "_target_": f"hpc_compress.{target}"}, "objective")


@QUICK
@hypothesis.given(content=JSON)
def test_any_description_of_a_run_is_answered(tmp_path_factory: pytest.TempPathFactory, content: Any):
    folder = tmp_path_factory.mktemp("any")
    (folder / "run.json").write_text(json.dumps(content))
    with contextlib.suppress(ConfigError, DamageError):
        runs.open_run(folder)


# --- exit codes ---


@pytest.mark.slow
def test_a_sweep_names_each_failed_run_and_fails(ask: Ask, tmp_path: Path, rows: list[str]):
    answer = ask("search", "-m", *rows, "model.path=nowhere,neither", "name=sweep", "generations=0")
    assert answer.code == 1
    lines = answer.stderr.partition("2 runs of the sweep failed:\n")[2].splitlines()
    assert [("nowhere" in line, "neither" in line) for line in lines] == [(False, True), (True, False)]
    assert not list(tmp_path.glob("results/.failed*"))


@pytest.mark.slow
def test_a_sweep_whose_driver_was_killed_names_the_other_failed_runs_too(
    ask: Ask, tmp_path: Path, rows: list[str], monkeypatch: pytest.MonkeyPatch
):
    launcher = Plugins.instance().class_name_to_class["hydra._internal.core_plugins.basic_launcher.BasicLauncher"]
    launch = launcher.launch

    def killed(launcher: Any, *arguments: Any, **more: Any) -> None:
        launch(launcher, *arguments, **more)
        log = "Error stream produced:\n----\nTraceback (most recent call last):"
        raise UncompletedJobError(f"Job 17 (task: 0) with path 17_0_result.pkl\nhas not produced any output\n{log}")

    monkeypatch.setattr(launcher, "launch", killed)
    answer = ask("search", "-m", *rows, "model.path=nowhere,neither", "name=sweep")
    assert answer.code == 1
    assert "2 runs of the sweep failed:\n" in answer.stderr
    assert answer.stderr.endswith("search: Job 17 (task: 0) with path 17_0_result.pkl\nhas not produced any output\n")
    assert not list(tmp_path.glob("results/.failed*"))


@pytest.mark.slow
def test_the_drivers_of_a_sweep_ask_for_no_wckey(
    ask: Ask, tmp_path: Path, rows: list[str], printing: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    """And what sbatch says, when it refuses them, is told."""
    monkeypatch.setattr(SlurmExecutor, "_internal_update_parameters", SlurmExecutor._internal_update_parameters)
    printing("srun")
    printing("sbatch", error="sbatch: error: invalid account", code=1)
    words = ["-m", "hydra/launcher=submitit_slurm", "hydra.launcher.mem_gb=8", *rows, "name=mine"]
    for more in (["seed=1,2"], ["seed=1"], ["seed=1", "+hydra.launcher.additional_parameters.wckey=mine"]):
        answer = ask("search", *words, *more)
        assert answer.code == 1
        assert "hpc-compress search: sbatch: error: invalid account\n" in answer.stderr
        (script,) = (tmp_path / "results/mine/.submitit").glob("*.sh")
        lines = script.read_text().splitlines()
        assert "#SBATCH --mem=8GB" in lines
        assert [line for line in lines if "wckey" in line] == ["#SBATCH --wckey=mine"] * (len(more) - 1)
        script.unlink()


@pytest.mark.slow
def test_a_sweep_of_which_a_run_met_a_filesystem_that_was_away_may_be_tried_again(
    ask: Ask, tmp_path: Path, rows: list[str], monkeypatch: pytest.MonkeyPatch
):
    def away(config: ModelConfig) -> None:
        raise ConfigError("no model") if config.path == "nowhere" else OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(pretrained, "find", away)
    answer = ask("search", "-m", *rows, "model.path=nowhere,neither", "name=sweep")
    assert answer.code == 75
    assert "2 runs of the sweep failed:\n" in answer.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (DamageError("x"), 2),
        (FileNotFoundError(errno.ENOENT, "no such file", "x"), 2),
        (PermissionError(errno.EACCES, "permission denied", "x"), 2),
        (NotADirectoryError(errno.ENOTDIR, "not a directory", "x"), 2),
        (OSError(errno.EROFS, "read-only", "x"), 2),
        (OSError(errno.ENAMETOOLONG, "too long", "x"), 2),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), 2),
        (OSError(errno.ENOSPC, "no space", "x"), 1),
        (OSError(errno.EIO, "i/o error", "x"), 75),
        (OSError(errno.ESTALE, "stale file handle", "x"), 75),
        (TimeoutError(errno.ETIMEDOUT, "timed out", "x"), 75),
        (SearchError("x"), 1),
        (UncompletedJobError("x"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_every_mistake_has_its_exit_code(ask: Ask, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int):
    def fail(arguments: list[str]) -> None:
        raise error

    monkeypatch.setattr(cli, "_status", fail)
    answer = ask("status", "x")
    assert answer.code == code
    assert code == 130 or answer.stderr.startswith("hpc-compress status: ")


@pytest.mark.slow
def test_a_sweep_whose_folders_would_have_too_long_names_is_told_what_to_do(ask: Ask, rows: list[str]):
    answer = ask("search", "-m", *rows, f"model.path={'x' * 250}", "seed=1,2", "name=fine")
    assert answer.code == 2
    assert "File name too long; choose a shorter name= (of a sweep: hydra.sweep.subdir)" in answer.stderr


def test_a_mistake_of_the_program_shows_where_it_happened(ask: Ask, monkeypatch: pytest.MonkeyPatch):
    def fail(arguments: list[str]) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_status", fail)
    with pytest.raises(ZeroDivisionError):
        ask("status", "x")


@pytest.mark.slow
def test_a_reader_who_has_seen_enough_is_no_error():
    words = "import sys; sys.argv = ['hpc-compress', '--help']; from hpc_compress import cli; cli.main()"
    with subprocess.Popen([sys.executable, "-c", words], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["status", "nosuch"],
        ["status", "rows.csv"],
        ["status", "a\udcff"],
        ["status", "x" * 300],
        ["status"],
        ["status", "--colour", "x"],
        ["cancel", "nosuch"],
        ["cancel", "rows.csv"],
        ["report", "nosuch"],
        ["report", "rows.csv"],
        ["report", "a\udcff"],
        ["report", "x" * 300],
        ["report", "."],
        ["export", "nosuch", "model"],
        ["export", "rows.csv", "model"],
        ["export", "a\udcff", "model"],
        ["export", "nosuch"],
        ["prefetch", "sead=1"],
        ["prefetch", "~model"],
        ["prefetch", "~seed", "seed=one"],
        ["prefetch", "seed=[1"],
        ["doctor", "launcher=debug"],
        ["doctor", "sead=1"],
        ["doctor", "name=../x"],
        ["profile", "sead=1"],
        ["profile", "--out"],
        ["profile", "--out=."],
        ["serach"],
        ["a\udcff"],
        [""],
    ],
    ids=repr,
)
def test_every_command_answers_odd_words(ask: Ask, tmp_path: Path, rows: list[str], words: list[str]):
    answer = ask(*words)
    assert answer.code == 2, answer.stderr
    assert answer.stderr.strip()
    assert files(tmp_path).keys() == {"rows.csv"}
