"""Fixtures for several files: a tiny tokenizer and tiny random checkpoints, made here, so that no test needs a network."""

import copy
import functools
import os
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub; subprocesses inherit it
os.environ["OMP_NUM_THREADS"] = "1"  # before any import of torch: for tiny models, more threads only get in each other's way

import pytest
from _pytest.mark.expression import Expression

from hpc_compress.models import inspection


def pytest_configure(config: pytest.Config) -> None:
    """Before any import of torch: only the tests that are marked so run on a GPU, and only where they are asked for."""
    if not wants_gpu(config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


WHOLE_RUNS = {"finished", "runs"}  # names of fixtures


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what needs a whole run, and what tests an encoder of another family than BERT.

    A parameter that begins with the name of a family is such an encoder. "two groups of albert" begins with another word: it
    stays quick, since BERT can't show what it shows.
    """
    others = {*inspection.LAYERS} - {"bert"}
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        first_words = {value.split(" ")[0] for value in parameters if isinstance(value, str)}
        if first_words & others or WHOLE_RUNS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


def wants_gpu(markexpr: str) -> bool:
    """Whether the option -m asks for tests that are marked gpu: it selects a test with this mark, and not without it."""
    try:
        expression = Expression.compile(markexpr)
    except SyntaxError:  # pytest is about to say so
        return False

    def selects(marks: set[str]) -> bool:
        return expression.evaluate(lambda name, **arguments: name in marks)

    return any(selects({"gpu", *others}) and not selects(set(others)) for others in ((), ("slow",), ("slurm",)))


SPECIAL = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]  # [PAD] is not 0, so that a padding with zeros shows
WORDS = [
    "the",
    "an",
    "it",
    "is",
    "was",
    "not",
    "and",
    "very",
    "film",
    "plot",
    "good",
    "great",
    "bad",
    "dull",
    ".",
    ",",
    "!",
    "?",
]
SIGNS = string.ascii_lowercase + string.digits  # a word that is not in the list falls into these, one token a sign
VOCABULARY = {token: index for index, token in enumerate([*SPECIAL, *WORDS, *SIGNS, *(f"##{sign}" for sign in SIGNS)])}
MAX_TOKENS = 128  # the longest input of a tiny checkpoint


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved WordPiece tokenizer that can spell everything. Shared by all tests: read only."""
    folder = tmp_path_factory.mktemp("tokenizer")
    _save_tokenizer(folder, pair_types=True)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that saves a tiny random checkpoint with its tokenizer. Equal calls share a folder: read only.

    make(family, layers=2, heads=4, hidden=32, ffn=64, num_labels=2, head=True) -> folder; family is a model_type of
    `FAMILIES`; head=False saves the bare encoder. The weights are the same in every session.
    """
    made: dict[str, Path] = {}

    def make(
        family: str,
        layers: int = 2,
        heads: int = 4,
        hidden: int = 32,
        ffn: int = 64,
        num_labels: int = 2,
        head: bool = True,
    ) -> Path:
        name = f"{family}_{layers}_{heads}_{hidden}_{ffn}_{num_labels}_{head}"
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            save_checkpoint(made[name], family, layers, heads, hidden, ffn, num_labels, head)
        return made[name]

    return make


@pytest.fixture(scope="session")
def compose() -> Callable[..., dict[str, Any]]:
    """A function from overrides, as on the command line, to the plain data that `cli` goes on with."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from hpc_compress import cli, config, defaults

    @functools.cache  # composing takes 0.2 s
    def composed(*overrides: str) -> dict[str, Any]:
        with initialize_config_dir(str(cli.conf_dir()), version_base="1.3"):
            composed = compose("config", list(overrides))
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        return defaults.chosen(values, config.build(values["launcher"], "launcher"))

    return lambda *overrides: copy.deepcopy(composed(*overrides))


@pytest.fixture(scope="session")
def setup(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path], compose: Any) -> Any:
    """A `searches.Setup`: a search that takes seconds."""
    from searches import Setup, tiny

    model = tiny_checkpoint("bert", layers=3, heads=4, hidden=128, ffn=64, head=False)
    return Setup(tiny(tmp_path_factory.mktemp("setup"), model), compose)


@pytest.fixture
def printing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that puts an executable on the PATH which prints a text; the path returned gets its arguments."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)

    def make(name: str, out: str = "", error: str = "", code: int = 0) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.out").write_text(out)
        (folder / f"{name}.err").write_text(error)
        lines = f'#!/bin/sh\nprintf "%s\\n" "$@" >{folder}/{name}.args\ncat {folder}/{name}.out\ncat {folder}/{name}.err >&2\n'
        (folder / name).write_text(f"{lines}exit {code}\n")
        (folder / name).chmod(0o755)
        return folder / f"{name}.args"

    return make


def save_checkpoint(
    folder: Path, family: str, layers: int, heads: int, hidden: int, ffn: int, num_labels: int, head: bool
) -> None:
    # As the families' own: RoBERTa and DistilBERT know no types for the texts of a pair.
    _save_tokenizer(folder, pair_types=family in ("bert", "electra", "albert"))
    _save_model(folder, _model_config(family, layers, heads, hidden, ffn, num_labels), head)


def _save_tokenizer(folder: Path, pair_types: bool) -> None:
    from transformers import BertTokenizerFast

    names = ["input_ids", *(["token_type_ids"] if pair_types else []), "attention_mask"]
    BertTokenizerFast(vocab=VOCABULARY, model_max_length=MAX_TOKENS, model_input_names=names).save_pretrained(folder)


def _model_config(family: str, layers: int, heads: int, hidden: int, ffn: int, num_labels: int) -> Any:
    from transformers import AutoConfig

    pad = VOCABULARY["[PAD]"]
    common = {"vocab_size": len(VOCABULARY), "pad_token_id": pad, "num_labels": num_labels}
    if family == "distilbert":
        sizes = {"n_layers": layers, "n_heads": heads, "dim": hidden, "hidden_dim": ffn}
    else:
        sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": hidden, "intermediate_size": ffn}
    special = {
        "roberta": {"max_position_embeddings": MAX_TOKENS + pad + 1, "type_vocab_size": 1},  # counts from pad + 1
        "xlm-roberta": {"max_position_embeddings": MAX_TOKENS + pad + 1, "type_vocab_size": 1},
        "mpnet": {"max_position_embeddings": MAX_TOKENS + pad + 1},
        "electra": {"max_position_embeddings": MAX_TOKENS, "embedding_size": hidden // 2},
        "albert": {"max_position_embeddings": MAX_TOKENS, "embedding_size": hidden // 2},
        "deberta-v2": {  # as the v3 checkpoints
            "max_position_embeddings": MAX_TOKENS,
            "relative_attention": True,
            "position_buckets": 16,
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
        },
        "modernbert": {  # windows of 4 tokens to either side, so that local and global layers differ
            "max_position_embeddings": MAX_TOKENS,
            "local_attention": 8,
            "bos_token_id": VOCABULARY["[CLS]"],
            "cls_token_id": VOCABULARY["[CLS]"],
            "eos_token_id": VOCABULARY["[SEP]"],
            "sep_token_id": VOCABULARY["[SEP]"],
        },
    }
    return AutoConfig.for_model(family, **common, **sizes, **special.get(family, {"max_position_embeddings": MAX_TOKENS}))


def _save_model(folder: Path, config: Any, head: bool) -> None:
    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if head else AutoModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind.from_config(config).save_pretrained(folder)
