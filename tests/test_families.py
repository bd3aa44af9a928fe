"""Contracts of surgery over all families of encoders: a cut model equals the masked one, and is what is saved and loaded."""

import copy
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from elsewhere import outputs_elsewhere
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from hpc_compress.models import artifact, modeling_hpc_compress, surgery
from hpc_compress.models.modeling_hpc_compress import FAMILIES, Family, NoHeads, linear_of
from hpc_compress.problems import PROBLEMS

LAYERS, HEADS, HIDDEN, FFN, LONGEST = 3, 4, 32, 24, 128
# Checkpoints that differ in what they are made of, not in sizes alone.
VARIANTS = {
    "deberta-v2 of other positions": (
        "deberta-v2",
        {"share_att_key": False, "norm_rel_ebd": "none", "position_biased_input": True, "type_vocab_size": 2},
    ),
    "deberta-v2 without positions": ("deberta-v2", {"relative_attention": False, "pos_att_type": [], "norm_rel_ebd": "none"}),
    "electra without projection": ("electra", {"embedding_size": HIDDEN}),
    "two groups of albert": ("albert", {"num_hidden_groups": 2, "embedding_size": HIDDEN}),
    "modernbert with biases": (
        "modernbert",
        {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_pooling": "mean"},
    ),
}
KINDS = {**{name: (name, {}) for name in FAMILIES}, **VARIANTS}


@functools.cache
def _built(kind: str, folder: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    for name, value in KINDS[kind][1].items():
        setattr(config, name, value)
    return drawn(config)


def drawn(config: PreTrainedConfig) -> PreTrainedModel:
    """A random model whose biases and norms are random too: as the families draw them, many cuts could not be told apart."""
    torch.manual_seed(0)
    model = modeling_hpc_compress.unshared(AutoModelForSequenceClassification.from_config(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return model.eval()


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> PreTrainedModel:
    return build(request.param, tiny_checkpoint)


def build(kind: str, tiny_checkpoint: Callable[..., Path]) -> PreTrainedModel:
    folder = tiny_checkpoint(KINDS[kind][0], layers=LAYERS, heads=HEADS, hidden=HIDDEN, ffn=FFN)
    return copy.deepcopy(_built(kind, folder))


def inputs(*lengths: int) -> dict[str, torch.Tensor]:
    """Random token ids; the rest of each row is padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 30, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}


@torch.no_grad()
def logits(model: nn.Module, *lengths: int) -> torch.Tensor:
    return model.eval()(**inputs(*(lengths or (20, 13, 1)))).logits


def assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def silence(linears: Sequence[nn.Linear], columns: Sequence[int]) -> None:
    """Mask input features: the weights that read them become 0."""
    with torch.no_grad():
        for linear in linears:
            linear.weight[:, list(columns)] = 0


def features(model: PreTrainedModel, heads: Sequence[int]) -> list[int]:
    size = surgery.head_size(model)
    return [head * size + offset for head in heads for offset in range(size)]


def shared(model: PreTrainedModel) -> bool:
    return surgery.family(model).shared_bias is not None


def shrink(model: PreTrainedModel) -> PreTrainedModel:
    """Every kind of cut at once: an odd hidden size, a layer gone, a block without heads, one without neurons, one of each."""
    surgery.prune_heads_everywhere(model, [1, 2])
    surgery.prune_heads(model, 1, [0, 1])
    if not shared(model):
        surgery.prune_heads(model, 2, [1])
    surgery.prune_ffn(model, 1, range(1, FFN))
    surgery.prune_ffn(model, 2, range(FFN))
    surgery.prune_hidden(model, [0, 3, 5, 7, 20, 30, 31])
    surgery.drop_layers(model, [0])
    return model


def assert_same(one: PreTrainedModel, other: PreTrainedModel) -> None:
    """Equal bit for bit; outputs to the last place, since kernels sum in another order where memory is aligned otherwise."""
    tensors, others = one.state_dict(), other.state_dict()
    assert tensors.keys() == others.keys()
    assert all(tensors[path].dtype == others[path].dtype and torch.equal(tensors[path], others[path]) for path in tensors)
    exact = one.dtype == torch.float32
    torch.testing.assert_close(logits(one), logits(other), rtol=1e-5 if exact else 0.02, atol=2e-6 if exact else 0.02)


def reload(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    folder.mkdir()
    artifact.save(model, folder)
    return artifact.load(folder)


# --- cut = masked ---


@pytest.mark.parametrize("heads", [[1], [0, 2, 3], range(HEADS)], ids=str)
@pytest.mark.parametrize("layer", [0, 1, None])
def test_cut_heads_equal_masked_heads(model: PreTrainedModel, heads: Sequence[int], layer: int | None):
    if shared(model) and layer is not None and len(heads) < HEADS:
        before = logits(model)
        with pytest.raises(ValueError, match="prune_heads_everywhere"):
            surgery.prune_heads(model, layer, heads)
        assert torch.equal(logits(model), before)
        return
    at = range(LAYERS) if layer is None else [layer]
    masked, whole = copy.deepcopy(model), logits(model)
    silence([surgery.attention_outputs(masked)[index] for index in at], features(model, heads))
    if layer is None:
        surgery.prune_heads_everywhere(model, heads)
    else:
        surgery.prune_heads(model, layer, heads)
    assert surgery.head_counts(model) == [HEADS - len(heads) if index in at else HEADS for index in range(LAYERS)]
    assert_close(logits(model), logits(masked))
    assert not torch.allclose(logits(model), whole, atol=1e-4)


@pytest.mark.parametrize("neurons", [[0, 5, 23], range(1, FFN), range(FFN)], ids=str)
def test_cut_neurons_equal_masked_neurons(model: PreTrainedModel, neurons: Sequence[int]):
    masked, whole = copy.deepcopy(model), logits(model)
    silence([surgery.ffn_outputs(masked)[1]], neurons)
    surgery.prune_ffn(model, 1, neurons)
    assert surgery.ffn_widths(model) == [FFN, FFN - len(neurons), FFN]
    assert_close(logits(model), logits(masked))
    assert not torch.allclose(logits(model), whole, atol=1e-4)


@pytest.mark.parametrize("layers", [[0], [1], [0, 2], [1, 2]], ids=str)
def test_dropped_layers_equal_bypassed_layers(model: PreTrainedModel, layers: list[int]):
    bypassed = copy.deepcopy(model)
    for index in layers:
        surgery.layers(bypassed)[index].register_forward_hook(
            lambda module, args, output: (args[0], *output[1:]) if isinstance(output, tuple) else args[0]
        )
    surgery.drop_layers(model, layers)
    assert surgery.origins(model) == [index for index in range(LAYERS) if index not in layers]
    assert_close(logits(model), logits(bypassed))
    surgery.drop_layers(model, range(len(surgery.layers(model)) - 1))
    assert surgery.origins(model) == [index for index in range(LAYERS) if index not in layers][-1:]


GONE = [0, 3, 5, 7, 20, 30, 31]


def deaf(model: PreTrainedModel, gone: Sequence[int]) -> PreTrainedModel:
    """The oracle of a hidden cut: whatever reads the residual stream ignores features, and norms go over the others alone."""
    model, names = copy.deepcopy(model), surgery.family(model)
    kept = torch.tensor([feature for feature in range(HIDDEN) if feature not in gone])
    silence([linear_of(model, names.reader)], gone)
    for layer in surgery.layers(model):
        silence([*modeling_hpc_compress.into_attention(layer, names), linear_of(layer, names.ffn_in)], gone)
    encoder = model.get_submodule(names.encoder)
    projected = [encoder.embeddings] if names.unshare else []  # ALBERT's embeddings are no part of the stream
    apart = {module for part in projected for module in part.modules()}
    for module in set(encoder.modules()) - apart:
        if isinstance(module, nn.Conv1d):
            with torch.no_grad():
                module.weight[:, list(gone)] = 0
        if isinstance(module, nn.LayerNorm) and module.normalized_shape == (HIDDEN,):

            def forward(x: torch.Tensor, norm: nn.LayerNorm = module) -> torch.Tensor:
                bias = None if norm.bias is None else norm.bias[kept]
                normed = F.layer_norm(x[..., kept], (len(kept),), norm.weight[kept], bias, norm.eps)
                return torch.zeros_like(x).index_copy(-1, kept, normed)

            module.forward = forward
    return model


def test_a_hidden_cut_equals_norms_and_readers_of_the_other_features(model: PreTrainedModel):
    whole, expected = logits(model), logits(deaf(model, GONE))
    surgery.prune_hidden(model, GONE)
    assert surgery.hidden_size(model) == HIDDEN - len(GONE)
    assert_close(logits(model), expected)
    assert not torch.allclose(expected, whole, atol=1e-4)


def test_a_hidden_cut_in_two_steps_equals_one(model: PreTrainedModel):
    twice = copy.deepcopy(model)
    surgery.prune_hidden(model, GONE)
    surgery.prune_hidden(twice, GONE[3:])
    surgery.prune_hidden(twice, GONE[:3])
    assert torch.equal(logits(model), logits(twice))


def test_a_hidden_cut_is_not_misled_by_other_sizes_that_are_the_same(tiny_checkpoint: Callable[..., Path]):
    config = build("bert", tiny_checkpoint).config
    for name in ("intermediate_size", "vocab_size", "max_position_embeddings", "type_vocab_size", "num_labels"):
        setattr(config, name, HIDDEN)
    model = drawn(config)
    expected = logits(deaf(model, GONE))
    surgery.prune_hidden(model, GONE)
    assert_close(logits(model), expected)


@pytest.mark.parametrize("groups", [1, 4])
def test_a_convolution_is_cut_too_or_refused(groups: int, tiny_checkpoint: Callable[..., Path]):
    """DeBERTa v2 xlarge has one beside its first layer."""
    config = build("deberta-v2", tiny_checkpoint).config
    config.conv_kernel_size, config.conv_groups = 3, groups
    model = drawn(config)
    before, expected = logits(model), logits(deaf(model, GONE)) if groups == 1 else None
    if expected is None:
        with pytest.raises(ValueError, match=r"conv\.weight"):
            surgery.prune_hidden(model, GONE)
        assert torch.equal(logits(model), before)
    else:
        surgery.prune_hidden(model, GONE)
        assert_close(logits(model), expected)


# --- shared layers ---


@pytest.mark.parametrize("kind", ["albert", "two groups of albert"])
def test_unshared_layers_give_the_outputs_of_the_stock_model(kind: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path):
    config = build(kind, tiny_checkpoint).config
    torch.manual_seed(0)
    stock = AutoModelForSequenceClassification.from_config(config).eval()
    model = modeling_hpc_compress.unshared(copy.deepcopy(stock))
    for data in (inputs(20, 13, 1), inputs(LONGEST)):
        with torch.no_grad():
            expected, found = (one(**data, output_hidden_states=True) for one in (stock, model))
        assert torch.equal(found.logits, expected.logits)
        assert len(found.hidden_states) == len(expected.hidden_states) == LAYERS + 1
        assert all(map(torch.equal, found.hidden_states, expected.hidden_states))
    stock.save_pretrained(tmp_path / "stock")
    loaded = PROBLEMS["classification"].load_base(tmp_path / "stock", ("no", "yes"), new_head=False, seed=0)
    assert_same(loaded, model)
    assert_same(reload(loaded, tmp_path / "saved"), model)


def test_unshared_layers_have_weights_of_their_own_and_one_config(tiny_checkpoint: Callable[..., Path]):
    folder = tiny_checkpoint("albert", layers=LAYERS, heads=HEADS, hidden=HIDDEN, ffn=FFN)
    model = PROBLEMS["classification"].load_base(folder, ("no", "yes"), new_head=False, seed=0)
    one, *others = ({parameter.data_ptr() for parameter in layer.parameters()} for layer in surgery.layers(model))
    assert all(one.isdisjoint(other) for other in others)
    per_layer = sum(parameter.numel() for parameter in surgery.layers(model)[0].parameters())
    assert surgery.encoder_parameters(model) == LAYERS * per_layer
    for other in (model, copy.deepcopy(model)):
        other.set_attn_implementation("eager")
        assert {layer.attention.config._attn_implementation for layer in surgery.layers(other)} == {"eager"}


# --- a cut is physical ---


def test_a_bypassed_attention_computes_nothing(model: PreTrainedModel):
    surgery.prune_heads(model, 1, range(HEADS))
    layer, names = surgery.layers(model)[1], surgery.family(model)
    assert isinstance(layer.get_submodule(names.attention), NoHeads)
    called: list[str] = []
    for path in names.attention_in:
        linear_of(layer, path).register_forward_hook(lambda *args, path=path: called.append(path))
    logits(model)
    assert called == []


def test_units_hold_what_their_cut_saves(model: PreTrainedModel):
    per_head, per_neuron = surgery.unit_parameters(model)
    surgery.prune_heads_everywhere(model, [2])
    before = surgery.encoder_parameters(model)
    surgery.prune_heads_everywhere(model, [0, 1])
    assert before - surgery.encoder_parameters(model) == 2 * LAYERS * per_head
    before = surgery.encoder_parameters(model)
    surgery.prune_ffn(model, 1, [4, 5, 6])
    assert before - surgery.encoder_parameters(model) == 3 * per_neuron
    assert surgery.all_parameters(model) == sum(parameter.numel() for parameter in model.parameters())


def test_no_storage_is_larger_than_its_tensor(model: PreTrainedModel):
    for tensor in shrink(model).state_dict().values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes or tensor.nbytes == 0


def test_gradients_reach_every_parameter_that_is_left(model: PreTrainedModel):
    F.cross_entropy(shrink(model).train()(**inputs(20, 13, 1)).logits, torch.tensor([0, 1, 1])).backward()
    for path, parameter in model.named_parameters():
        if parameter.numel() == 0:
            assert not parameter.requires_grad, path
        else:
            assert parameter.grad is not None, path
            assert parameter.ndim == 1 or parameter.grad.abs().sum() > 0, path  # a key's bias has no effect


# --- cuts together ---


def test_cuts_of_different_kinds_commute(model: PreTrainedModel):
    cuts = [
        lambda m: surgery.prune_heads_everywhere(m, [0, 3]),
        lambda m: surgery.prune_ffn(m, 2, range(1, FFN)),
        lambda m: surgery.prune_hidden(m, GONE),
        lambda m: surgery.prune_heads(m, 2, range(surgery.head_counts(m)[2])),
    ]
    results = []
    for order in (cuts[:3], cuts[2::-1], [cuts[1], cuts[2], cuts[0]]):
        cut = copy.deepcopy(model)
        for one in (*order, cuts[3]):
            one(cut)
        results.append(logits(cut))
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_cut_model_takes_one_text_and_the_longest(model: PreTrainedModel):
    shrink(model)
    many = logits(model, LONGEST, 9, 2)
    assert many.isfinite().all()
    one = {name: tensor[:1] for name, tensor in inputs(LONGEST, 9, 2).items()}
    with torch.no_grad():
        assert_close(model(**one).logits, many[:1])


@pytest.mark.parametrize(
    "cut",
    [
        lambda model: surgery.drop_layers(model, range(LAYERS)),
        lambda model: surgery.drop_layers(model, [0, LAYERS]),
        lambda model: surgery.drop_layers(model, [-1]),
        lambda model: surgery.prune_heads(model, 0, [HEADS]),
        lambda model: surgery.prune_heads_everywhere(model, [0, HEADS]),
        lambda model: surgery.prune_ffn(model, 0, [FFN]),
        lambda model: surgery.prune_hidden(model, range(HIDDEN)),
        lambda model: surgery.prune_hidden(model, [HIDDEN]),
    ],
)
def test_what_can_not_be_cut_is_refused_before_anything_is(model: PreTrainedModel, cut: Callable[[PreTrainedModel], None]):
    before = {path: tensor.clone() for path, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"can't remove .* name existing ones"):
        cut(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[path], after[path]) for path in before)


def test_heads_that_one_layer_lacks_are_not_cut_everywhere(tiny_checkpoint: Callable[..., Path]):
    model = build("bert", tiny_checkpoint)
    surgery.prune_heads(model, 2, [0, 1])
    with pytest.raises(ValueError, match="layer 2"):
        surgery.prune_heads_everywhere(model, [2])
    assert surgery.head_counts(model) == [4, 4, 2]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Family)])
def test_a_family_that_lacks_a_field_is_an_error(name: str):
    fields = vars(FAMILIES["bert"]) | {"unshare": None}
    with pytest.raises(TypeError, match=name):
        Family(**{key: value for key, value in fields.items() if key != name})


# --- saved = loaded ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cut_model_is_saved_and_loaded_bit_for_bit(model: PreTrainedModel, dtype: torch.dtype, tmp_path: Path):
    stock = model.config.to_dict()
    for parameter in shrink(model).parameters():  # not the buffers: a cast would spoil ModernBERT's rotary frequencies
        parameter.data = parameter.to(dtype)
    loaded = reload(model, tmp_path / "once")
    assert_same(loaded, model)
    again = reload(loaded, tmp_path / "twice")  # after a forward
    assert_same(again, model)
    for name in (artifact.WEIGHTS, "config.json"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
    for one in (model, again):
        heads = [0, 2 if shared(one) else 1]
        assert (surgery.origins(one), surgery.head_counts(one), surgery.ffn_widths(one)) == ([1, 2], heads, [1, 0])
        assert (surgery.hidden_size(one), surgery.head_size(one)) == (HIDDEN - len(GONE), HIDDEN // HEADS)
        assert {**stock, "dtype": None} == {**one.config.to_dict(), "dtype": None}


def test_a_loaded_model_can_be_cut_on(model: PreTrainedModel, tmp_path: Path):
    def more(cut: PreTrainedModel) -> PreTrainedModel:
        surgery.prune_hidden(cut, [2, 8])
        surgery.prune_ffn(cut, 0, [0])
        surgery.prune_heads(cut, 1, range(surgery.head_counts(cut)[1]))
        surgery.drop_layers(cut, [0])
        return cut

    loaded = more(reload(shrink(model), tmp_path / "once"))
    assert_same(loaded, more(model))
    assert_same(reload(loaded, tmp_path / "twice"), model)


@pytest.mark.parametrize(
    ("key", "value"), [("heads", [1, 1]), ("ffn", [1, 1]), ("hidden", 26), ("hidden", None), ("layers", [1])]
)
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_weights_that_do_not_fit_are_refused(
    kind: str, key: str, value: object, tiny_checkpoint: Callable[..., Path], tmp_path: Path
):
    artifact.save(shrink(build(kind, tiny_checkpoint)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config[key] != value
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises((ValueError, RuntimeError)):
        artifact.load(tmp_path)


@pytest.mark.slow
def test_exported_models_of_all_families_load_without_the_package(tiny_checkpoint: Callable[..., Path], tmp_path: Path):
    """In a process that can't import hpc_compress, by transformers alone, with equal outputs; saved again by it as well."""
    kinds = list(KINDS)
    tensors = {name: tensor.tolist() for name, tensor in inputs(20, 13, 1).items()}
    expected = []
    for number, kind in enumerate(kinds):
        folder = tmp_path / f"m{number}"
        folder.mkdir()
        model = shrink(build(kind, tiny_checkpoint))
        artifact.save(model, folder)
        shutil.copy(modeling_hpc_compress.__file__, folder)
        expected.append(logits(model).double().tolist())
    names = [f"m{number}" for number in range(len(kinds))]
    elsewhere = outputs_elsewhere(tmp_path, names, tensors)
    found = torch.tensor([elsewhere[name + again] for name in names for again in ("", "-saved-again")])
    torch.testing.assert_close(found, torch.tensor(expected).repeat_interleave(2, 0), rtol=1e-5, atol=2e-6)
