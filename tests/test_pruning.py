"""Gates, criteria, budgets, cuts and repairs on tiny random encoders, against exact oracles."""

import copy
import itertools
import platform
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_models import CPU, context, examples, load, logits
from torch import nn

from hpc_compress import calibration, measure
from hpc_compress.config import ConfigError
from hpc_compress.data.batches import eval_batches
from hpc_compress.models import surgery
from hpc_compress.models.gates import counts, gated
from hpc_compress.models.modeling_hpc_compress import linear_of
from hpc_compress.operators import operator
from hpc_compress.problems import PROBLEMS
from hpc_compress.pruning import criteria, cutting, obs
from hpc_compress.pruning.repair import Repairer, UnitArrays
from hpc_compress.pruning.steps import SCORABLE, Prune
from hpc_compress.search.allocation import Place, allocate, levels
from hpc_compress.types import MeasurementProtocol, Step

CLASSIFICATION = PROBLEMS["classification"]
UNITS = ["layers", "blocks", "heads", "ffn"]


@pytest.fixture(params=["bert", "distilbert", "roberta"])
def model(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> nn.Module:
    return load(tiny_checkpoint(request.param, layers=3, heads=4, hidden=64, ffn=96))


def prune(model: nn.Module, **params: object) -> nn.Module:
    return operator(Step(operator="prune", params=params))(model, context(copy.deepcopy(model)))


def batches(n: int = 24) -> list:
    return list(eval_batches(examples(n), 8))


# --- gates ---


@pytest.mark.parametrize("unit", [*UNITS, "hidden"])
def test_open_gates_change_nothing(model: nn.Module, unit: str):
    expected = logits(model)
    with gated(model, {unit: [torch.ones(count) for count in counts(model, unit)]}):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits(model), expected)


CLOSED = {
    "layers": lambda model: surgery.drop_layers(model, [1]),
    "heads": lambda model: surgery.prune_heads(model, 1, [0, 3]),
    "ffn": lambda model: surgery.prune_ffn(model, 1, [0, 5, 95]),
    "blocks": lambda model: surgery.prune_ffn(model, 1, range(96)),
}
WHICH = {"layers": (0, [1]), "heads": (1, [0, 3]), "ffn": (1, [0, 5, 95]), "blocks": (1, [1])}


@pytest.mark.parametrize("unit", UNITS)
def test_a_closed_gate_equals_the_cut(model: nn.Module, unit: str):
    gates = [torch.ones(count) for count in counts(model, unit)]
    place, positions = WHICH[unit]
    gates[place][positions] = 0
    with gated(model, {unit: gates}):
        expected = logits(model)
    CLOSED[unit](model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=3e-6)


def test_gates_of_each_example_act_on_that_example(model: nn.Module):
    (batch,) = eval_batches(examples(4), 4)
    open_, closed = torch.ones(3), torch.tensor([1.0, 0.0, 1.0])
    with torch.no_grad(), gated(model, {"layers": [torch.stack([open_, closed, open_, closed])]}):
        mixed = model(**batch.inputs).logits
    for gate, rows in ((open_, [0, 2]), (closed, [1, 3])):
        with torch.no_grad(), gated(model, {"layers": [gate]}):
            torch.testing.assert_close(model(**batch.inputs).logits[rows], mixed[rows])


# --- criteria ---


@pytest.mark.parametrize(("name", "power"), [("fisher", 2), ("taylor", 1), ("gauss_newton", 2)])
@pytest.mark.parametrize("unit", [*UNITS, "hidden"])
def test_gate_scores_equal_finite_differences(model: nn.Module, name: str, power: int, unit: str):
    model.double()
    data = examples(6)
    scores = criteria.criterion(name, CLASSIFICATION)(model, eval_batches(data, 4), [unit])[unit]
    place, position = len(scores) - 1, 1
    assert [len(score) for score in scores] == counts(model, unit)
    generator = torch.Generator().manual_seed(0)
    signs = torch.cat([2 * torch.randint(2, (n, 2), generator=generator) - 1 for n in (4, 2)]).double()
    losses = {}
    for sign in (1, -1):
        gates = [torch.ones(count, dtype=torch.float64) for count in counts(model, unit)]
        gates[place][position] += sign * 1e-5
        with torch.no_grad(), gated(model, {unit: gates}):
            labels = torch.cat([batch.labels for batch in eval_batches(data, 1)])
            outputs = torch.cat([model(**batch.inputs).logits for batch in eval_batches(data, 1)])
        if name == "gauss_newton":
            losses[sign] = (outputs * signs).sum(1).numpy()
        else:
            losses[sign] = nn.functional.cross_entropy(outputs, labels, reduction="none").numpy()
    derivative = (losses[1] - losses[-1]) / 2e-5
    assert float(scores[place][position]) == pytest.approx(np.mean(np.abs(derivative) ** power), rel=2e-3, abs=1e-12)


def test_units_scored_together_are_scored_as_alone(model: nn.Module):
    together = criteria.fisher(CLASSIFICATION, model, batches(), UNITS)
    for unit in UNITS:
        alone = criteria.fisher(CLASSIFICATION, model, batches(), [unit])[unit]
        for one, other in zip(together[unit], alone, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-12)


def test_magnitude_is_the_norm_of_what_a_unit_writes(model: nn.Module):
    names = surgery.family(model)
    scores = criteria.magnitude(model, [], [*UNITS, "hidden"])
    attention, ffn = (linear_of(surgery.layers(model)[1], name).weight for name in (names.attention_out, names.ffn_out))
    torch.testing.assert_close(scores["heads"][1][2], attention[:, 32:48].norm().detach())
    torch.testing.assert_close(scores["ffn"][1][7], ffn[:, 7].norm().detach())
    torch.testing.assert_close(scores["blocks"][1], torch.stack([attention.norm(), ffn.norm()]).detach())
    torch.testing.assert_close(scores["layers"][0][1], torch.cat([attention.flatten(), ffn.flatten()]).norm().detach())
    written = [
        linear_of(layer, name).weight[3] for layer in surgery.layers(model) for name in (names.attention_out, names.ffn_out)
    ]
    torch.testing.assert_close(scores["hidden"][0][3], torch.cat(written).norm().detach())


def _inputs(model: nn.Module, name: str, layer: int) -> np.ndarray:
    """What flows into a linear, real tokens only, one batch after another."""
    rows: list[np.ndarray] = []
    linear = linear_of(surgery.layers(model)[layer], name)
    for batch in batches():
        seen: list[torch.Tensor] = []
        handle = linear.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(**batch.inputs)
        handle.remove()
        rows.append(seen[0][batch.inputs["attention_mask"].bool()].numpy())
    return rows


def test_activation_statistics_equal_numpy(model: nn.Module):
    for unit, name, size in (("ffn", "ffn_out", 1), ("heads", "attention_out", 16)):
        parts = _inputs(model, getattr(surgery.family(model), name), 1)
        groups = np.concatenate(parts).reshape(sum(map(len, parts)), -1, size)
        mean = criteria.activation_mean(model, batches(), [unit])[unit][1]
        np.testing.assert_allclose(mean, np.abs(groups).mean((0, 2)), rtol=1e-4)
        active = criteria.apoz(model, batches(), [unit])[unit][1]
        np.testing.assert_allclose(active, (groups > 0).mean((0, 2)), rtol=1e-4)


def _with_equal_units(model: nn.Module) -> nn.Module:
    """In layer 1: neurons 5, 9 and 20 are equal, and heads 0 and 2."""
    names, layer = surgery.family(model), surgery.layers(model)[1]
    into = linear_of(layer, names.ffn_in)
    with torch.no_grad():
        for double in (9, 20):
            into.weight[double], into.bias[double] = into.weight[5], into.bias[5]
        for path in names.attention_in:
            linear = linear_of(layer, path)
            linear.weight[32:48], linear.bias[32:48] = linear.weight[:16], linear.bias[:16]
    return model


def test_of_equal_units_all_but_one_go_first(model: nn.Module):
    scores = criteria.similarity(_with_equal_units(model), batches(), ["heads", "ffn"])
    for unit, equal in (("ffn", {5, 9, 20}), ("heads", {0, 2})):
        found = scores[unit][1]
        gone = set(found.argsort()[: len(equal) - 1].tolist())
        assert gone < equal
        assert found[list(gone)].tolist() == pytest.approx([0] * len(gone), abs=1e-6)
        (stays,) = equal - gone
        assert float(found[stays]) > 0.01
        assert float(found.max()) == 1  # the last one has no other


def test_what_stays_takes_over_the_work_of_its_double(model: nn.Module):
    before = logits(_with_equal_units(model))
    cut = copy.deepcopy(model)
    for unit in ("ffn", "heads"):
        scores = criteria.similarity(model, batches(), [unit])[unit][1]
        count = 2 if unit == "ffn" else 1
        {"ffn": surgery.prune_ffn, "heads": surgery.prune_heads}[unit](cut, 1, scores.argsort()[:count].tolist())
    step = operator(Step(operator="prune_heads", params={"count": 1, "where": "any", "criterion": "similarity"}))
    done = step(copy.deepcopy(model), context(model))
    assert surgery.head_counts(done) == [4, 3, 4]
    plain = float((logits(cut) - before).norm())
    assert float((logits(done) - before).norm()) < 0.2 * plain


def test_doubles_go_as_a_naive_search_finds_them():
    x = torch.randn(9, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[3], x[7] = -2 * x[1], x[5] + 0.1 * x[6]
    alive, expected, norms = set(range(9)), torch.ones(9, dtype=torch.float64), torch.arange(1.0, 10)
    lengths = x.norm(dim=1)
    while len(alive) > 1:
        pairs = itertools.combinations(sorted(alive), 2)
        alike = {pair: float((x[pair[0]] @ x[pair[1]]).abs() / lengths[list(pair)].prod()) for pair in pairs}
        pair = max(alike, key=lambda pair: alike[pair])
        goes = min(pair, key=lambda unit: float(lengths[unit] * norms[unit]))
        alive.remove(goes)
        expected[goes] = 1 - alike[pair]
    torch.testing.assert_close(criteria._doubles(x @ x.T, norms), expected)
    assert criteria._doubles(torch.zeros(0, 0), torch.zeros(0)).shape == (0,)


def _least_squares_error(weight: torch.Tensor, hessian: torch.Tensor, kept: list[int]) -> float:
    """What the best weights on the kept features lose, as a share."""
    own = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight.T).T if kept else weight[:, :0]
    whole = torch.zeros_like(weight)
    whole[:, kept] = own
    rest = weight - whole
    return float(((rest @ hessian) * rest).sum() / ((weight @ hessian) * weight).sum())


@pytest.mark.parametrize("features", [1, 2])
def test_obs_removal_is_greedy_and_its_errors_are_those_of_least_squares(features: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calibration, "DAMPING", 1e-9)
    monkeypatch.setattr(calibration.damped_inverse, "__defaults__", (1e-9,))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6 * features, 200, generator=generator, dtype=torch.float64)
    x = torch.randn(6 * features, 6 * features, generator=generator, dtype=torch.float64) @ x
    weight, hessian = torch.randn(5, 6 * features, generator=generator, dtype=torch.float64), x @ x.T
    errors = obs.elimination(weight, hessian, features)

    def without(groups: set[int]) -> float:
        kept = [g * features + f for g in range(6) if g not in groups for f in range(features)]
        return _least_squares_error(weight, hessian, kept)

    gone: set[int] = set()
    lost = 0.0
    for group in errors.argsort(stable=True).tolist()[:3]:
        best = min((without(gone | {other}), other) for other in range(6) if other not in gone)
        assert best[1] == group
        assert best[0] - lost <= float(errors[group]) + 1e-9  # equal, but for errors that would fall
        gone.add(group)
        lost = best[0]
    first = int(errors.argmin())
    assert float(errors[first]) == pytest.approx(without({first}), rel=1e-5)


def test_many_neurons_go_several_at_once(model: nn.Module):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 90, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 40, generator=generator, dtype=torch.float64)
    one, several = (obs.elimination(weight, x @ x.T, 1, rounds) for rounds in (40, 10))
    overlap = set(one.argsort()[:20].tolist()) & set(several.argsort()[:20].tolist())
    assert len(overlap) >= 15
    assert bool((several > 0).all())


@pytest.mark.parametrize("name", SCORABLE)
def test_what_says_nothing_goes_first(model: nn.Module, name: str):
    if name == "similarity":
        pytest.skip("it looks for doubles")
    names = surgery.family(model)
    layer = surgery.layers(model)[-1]
    with torch.no_grad():
        for linear in (linear_of(layer, names.value), linear_of(layer, names.attention_out)):
            rows = linear.weight if linear is not linear_of(layer, names.attention_out) else linear.weight.T
            rows[16:32] = 0  # head 1
        linear_of(layer, names.value).bias[16:32] = 0
    before = logits(model)
    operator(Step(operator="prune_heads", params={"count": 1, "criterion": name}))(model, context(model))
    assert surgery.head_counts(model) == [4, 4, 3]
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=3e-6)


# --- budgets ---


@pytest.mark.parametrize("seed", range(8))
def test_the_allocation_is_the_best_of_all(seed: int):
    rng = np.random.default_rng(seed)
    places = []
    for _ in range(4):
        n = int(rng.integers(1, 5))
        loss = np.concatenate([[0], np.cumsum(rng.random(n))])
        cost = np.concatenate([np.cumsum(rng.random(n))[::-1] + 0.5, [0.3]])
        places.append(Place(loss, cost))
    whole = sum(place.cost[0] for place in places)
    budget = float(rng.uniform(0.4, 1.1)) * whole
    chosen = allocate(places, budget)
    all_ = itertools.product(*(range(len(place.loss)) for place in places))
    costs = {c: sum(p.cost[level] for p, level in zip(places, c, strict=True)) for c in all_}
    lost = {c: sum(p.loss[level] for p, level in zip(places, c, strict=True)) for c in costs}
    assert costs[tuple(chosen)] <= budget * (1 + 1e-9)
    # The grid of costs is rounded up, so a choice that just fits may be passed over.
    assert lost[tuple(chosen)] <= min(lost[c] for c in costs if costs[c] <= budget - 5e-3 * whole) + 1e-12


def test_shares_that_add_up_to_a_little_more_than_1_are_the_whole():
    costs = np.random.default_rng(0).random((200, 12))
    for shares in costs / costs.sum(1, keepdims=True):
        places = [Place(np.array([0.0, 1.0]), np.array([share, 0.0])) for share in shares]
        assert allocate(places, 1.0) == [0] * 12


def test_a_budget_that_can_not_be_met_is_refused():
    with pytest.raises(ValueError, match="can't be met"):
        allocate([Place(np.array([0.0, 1.0]), np.array([2.0, 1.0]))], 0.5)


@pytest.mark.filterwarnings("error")
def test_without_any_room_the_cheapest_levels_are_chosen():
    places = [Place(np.array([0.0, 1.0, 2.0]), np.array([5e7, 3e7, 1e3])), Place(np.array([0.0, 1.0]), np.array([4e7, 0.0]))]
    assert allocate(places, 1e3) == [2, 1]


def test_levels_are_sums_of_the_lowest_scores():
    assert levels(np.array([3.0, 1.0, 2.0]), [3, 2, 1, 0]).tolist() == [0, 1, 3, 6]


# --- cuts ---


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("units", [["heads", "ffn"], ["ffn"], ["blocks"], ["layers"]], ids="+".join)
def test_the_share_is_kept_and_hardly_more_is_cut(model: nn.Module, share: float, units: list[str]):
    before = surgery.encoder_parameters(model)
    if units == ["ffn"] and share > 0.5:
        with pytest.raises(ValueError, match="can't be met"):
            prune(model, share=share, units=units)
        return
    if units == ["layers"] and share > 0.67:
        with pytest.raises(ValueError, match="no layer"):
            prune(model, share=share, units=units)
        return
    left = surgery.encoder_parameters(prune(model, share=share, units=units, ffn_multiple=8)) / before
    grain = {"layers": 0.34, "blocks": 0.23}.get(units[0], 0.03)
    assert 1 - share - grain <= left <= 1 - share + 1e-9
    assert all(width % 8 == 0 for width in surgery.ffn_widths(model))


def test_units_parameters_are_what_a_cut_takes_away(model: nn.Module):
    per_head, per_neuron = surgery.unit_parameters(model)
    before = surgery.encoder_parameters(model)
    surgery.prune_heads(model, 0, [1])
    assert before - surgery.encoder_parameters(model) == per_head
    surgery.prune_ffn(model, 2, [1, 4])
    assert before - surgery.encoder_parameters(model) == per_head + 2 * per_neuron


def test_the_global_cut_takes_the_least_important_per_parameter(model: nn.Module):
    """All of equal cost and no multiples: the dynamic programme must agree with plain sorting."""
    scores = np.concatenate(criteria.gauss_newton(CLASSIFICATION, model, batches(), ["ffn"])["ffn"])
    widths = counts(prune(model, share=0.3, units=["ffn"], ffn_multiple=1, sentences=24), "ffn")
    going = 3 * 96 - sum(widths)
    threshold = np.sort(scores)[going]
    expected = [int((part >= threshold).sum()) for part in np.split(scores, 3)]
    assert np.abs(np.array(widths) - expected).max() <= 1


def test_a_local_cut_takes_the_same_share_everywhere(model: nn.Module):
    prune(model, share=0.5, scope="local", ffn_multiple=16, criterion="magnitude")
    assert surgery.head_counts(model) == [2] * 3
    assert surgery.ffn_widths(model) == [48] * 3


def test_a_share_taken_in_rounds_is_the_same_share(model: nn.Module):
    once, thrice = (prune(copy.deepcopy(model), share=0.6, rounds=rounds, ffn_multiple=8) for rounds in (1, 3))
    assert surgery.encoder_parameters(once) == pytest.approx(surgery.encoder_parameters(thrice), rel=0.03)
    local = prune(model, share=0.5, rounds=2, scope="local", ffn_multiple=16, schedule="linear")
    assert (surgery.head_counts(local), surgery.ffn_widths(local)) == ([2] * 3, [48] * 3)


def test_schedules_end_at_the_share():
    cubic, linear = (Prune(share=0.8, rounds=4, schedule=name) for name in ("cubic", "linear"))
    assert [cubic.share_after(done) for done in (0, 2, 4)] == pytest.approx([0, 0.8 * 0.875, 0.8])
    assert [linear.share_after(done) for done in (0, 2, 4)] == pytest.approx([0, 0.4, 0.8])


def test_training_between_rounds_trains(model: nn.Module):
    how = {"share": 0.5, "rounds": 2, "ffn_multiple": 16, "scope": "local", "criterion": "magnitude"}
    bare, trained = (prune(copy.deepcopy(model), **how, **more) for more in ({}, {"training": {"batch_size": 8}}))
    assert surgery.ffn_widths(bare) == surgery.ffn_widths(trained)
    weights = (surgery.attention_outputs(model)[0].weight for model in (bare, trained))
    assert not torch.equal(*weights)


def test_a_cut_by_time_keeps_to_the_table(model: nn.Module):
    """Where FFN neurons cost nothing, only heads go, and the other way round."""
    for heads_ms, ffn_ms in ((1.0, 0.0), (0.0, 1.0)):
        times = measure.BlockTimes(heads=(0, 4), attention_ms=(0.0, heads_ms), widths=(0, 96), ffn_ms=(0.0, ffn_ms))
        step = operator(Step(operator="prune", params={"share": 0.5, "cost": "time", "ffn_multiple": 8}))
        around = context(model)
        object.__setattr__(around, "block_times", lambda times=times: times)
        small = step(copy.deepcopy(model), around)
        heads, widths = surgery.head_counts(small), surgery.ffn_widths(small)
        assert (sum(heads) <= 6) == bool(heads_ms)
        assert (sum(widths) <= 144) == bool(ffn_ms)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_a_timed_pass_waits_for_no_new_memory():
    faults = []

    class Wasteful(nn.Module):
        def forward(self, **inputs: torch.Tensor) -> None:
            _ = [torch.ones(2**22) for _ in range(4)]  # 16 MiB each, on 4,096 new pages if the last pass's went back
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

    protocol = MeasurementProtocol(min_passes=5, max_passes=5)
    measure.latencies_ms([(Wasteful(), measure.timing_sample(examples(8), protocol, CPU))], protocol, CPU)
    assert faults[-1] - faults[-3] < 400


def test_the_table_of_times_rises_from_nothing(model: nn.Module):
    protocol = MeasurementProtocol(min_passes=2, max_passes=2, warmup_passes=0, sentences=8, batch_size=8)
    sample = measure.timing_sample(examples(), protocol, CPU)
    before = logits(model)
    times = measure.block_times(model, sample, protocol, CPU)
    assert (times.heads, times.widths[0], times.widths[-1]) == ((0, 1, 2, 3, 4), 0, 96)
    for ms in (times.attention_ms, times.ffn_ms):
        assert ms[0] == 0
        assert list(ms) == sorted(ms)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    "how",
    [
        {"operator": "prune", "params": {"share": 0.5, "ffn_multiple": 8, "criterion": "fisher"}},
        {"operator": "prune_heads", "params": {"count": 3, "where": "any"}},
        {"operator": "drop_layers", "params": {"count": 1, "criterion": "magnitude"}},
    ],
    ids=lambda how: how["operator"],
)
def test_a_repair_brings_the_outputs_nearer(model: nn.Module, how: dict):
    """Correlated activations, as trained models have them: a random model has nothing to repair with."""
    names, generator = surgery.family(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in surgery.layers(model):
            into = linear_of(layer, names.ffn_in)
            low_rank = torch.randn(96, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
            into.weight.copy_(0.05 * low_rank)
            into.bias.fill_(0.3)
        for name in (names.attention_out, names.ffn_out):  # the layer that goes is one with others after it
            linear_of(surgery.layers(model)[1], name).weight.mul_(0.5)
    dense = logits(model)
    errors = []
    for repair in (False, True):
        step = operator(Step(operator=how["operator"], params={**how["params"], "repair": repair, "sentences": 24}))
        cut = step(copy.deepcopy(model), context(model))
        errors.append(float((logits(cut) - dense).square().mean()))
    assert errors[1] < errors[0]


FAMILIES = ["bert", "modernbert", "deberta-v2", "distilbert", "mpnet"]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_walk_sees_what_a_whole_forward_shows(family: str, tiny_checkpoint: Callable[..., Path]):
    model, seen = load(tiny_checkpoint(family, layers=3)), {}
    names, data = surgery.family(model), batches()
    walk, mask = calibration.Walk(model, data), data[1].inputs["attention_mask"].bool()
    for layer, name in itertools.product((0, 2), (names.attention_out, names.ffn_out)):
        walk.go_to(layer)
        flows_in, stream = walk.inputs(1, surgery.path(model, layer, name), surgery.stream(model, layer, name))
        linear = linear_of(surgery.layers(model)[layer], name)
        handle = linear.register_forward_pre_hook(lambda module, args: seen.update(flows_in=args[0]))
        model(**data[1].inputs)
        handle.remove()
        assert torch.equal(flows_in, seen["flows_in"][mask])
        assert stream.shape == (len(flows_in), surgery.hidden_size(model))
        linear.weight.mul_(1.1)  # what changes in the layer that was reached is seen from there on
    assert not any("forward" in vars(layer) for layer in surgery.layers(model))


@pytest.mark.parametrize("units", [["heads", "ffn"], ["layers"]], ids="+".join)
def test_a_repair_after_several_rounds_aims_at_the_model_before_them_all(
    model: nn.Module, units: list[str], monkeypatch: pytest.MonkeyPatch
):
    before = logits(model)
    targets, left = [], []

    class Spy(Repairer):
        def repair(self, model: nn.Module, kept: UnitArrays) -> list:
            targets.append(logits(self.dense))
            left.append(kept)
            return super().repair(model, kept)

    monkeypatch.setattr(cutting, "Repairer", Spy)
    how = {"share": 0.6, "rounds": 3, "schedule": "linear", "units": units, "ffn_multiple": 8, "sentences": 24}
    done = prune(copy.deepcopy(model), **how, repair=True)
    assert len(targets) == 3
    assert all(torch.equal(target, before) for target in targets)
    at_once = copy.deepcopy(model)
    cutting.cut(at_once, left[-1])
    Repairer(copy.deepcopy(model), batches(), drift=units == ["layers"]).repair(at_once, left[-1])
    torch.testing.assert_close(logits(done), logits(at_once), rtol=1e-4, atol=1e-5)


def test_a_repair_after_a_training_aims_at_what_was_learnt(model: nn.Module, monkeypatch: pytest.MonkeyPatch):
    targets = []

    class Spy(Repairer):
        def repair(self, model: nn.Module, kept: UnitArrays) -> list:
            targets.append(surgery.ffn_widths(self.dense))
            return []

    monkeypatch.setattr(cutting, "Repairer", Spy)
    prune(model, share=0.5, rounds=3, ffn_multiple=16, scope="local", repair=True, training={"batch_size": 8})
    assert targets[0] == [96] * 3
    assert targets[0] > targets[1] > targets[2]


def test_an_ffn_without_neurons_says_what_it_said_on_average(model: nn.Module):
    dense, out = copy.deepcopy(model), surgery.ffn_outputs(model)[0]
    kept = {"ffn": [np.arange(0), np.arange(96), np.arange(96)]}
    inputs = np.concatenate(_inputs(dense, surgery.family(dense).ffn_out, 0))
    expected = out.bias.detach().numpy() + inputs.mean(0) @ out.weight.detach().numpy().T
    cutting.cut(model, kept)
    Repairer(dense, batches(), drift=False).repair(model, kept)
    np.testing.assert_allclose(surgery.ffn_outputs(model)[0].bias.detach(), expected, atol=1e-5)


def test_a_repair_keeps_zeros(model: nn.Module):
    dense = operator(Step(operator="sparsify", params={"share": 0.4}))(model, context(model))
    kept = {"ffn": [np.arange(96), np.arange(0, 96, 2), np.arange(96)]}
    cut = copy.deepcopy(dense)
    cutting.cut(cut, kept)
    repaired = copy.deepcopy(cut)
    Repairer(dense, batches(), drift=False).repair(repaired, kept)
    for one, other in zip(surgery.ffn_outputs(repaired), surgery.ffn_outputs(cut), strict=True):
        assert torch.equal(one.weight == 0, other.weight == 0)
    errors = [float((logits(one) - logits(dense)).norm()) for one in (repaired, cut)]
    assert errors[0] < errors[1]


def test_a_refit_is_the_least_squares_solution(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calibration, "DAMPING", 1e-10)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(500, n, generator=generator, dtype=torch.float64) + 1 for n in (6, 4))
    y = y + x[:, :4]
    weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 6), (3,)))
    design = np.concatenate([y.numpy(), np.ones((500, 1))], axis=1)
    wanted = x @ weight.T + bias
    fitted, shifted = obs.fit(weight[:, :4], bias, y, wanted)
    oracle, *_ = np.linalg.lstsq(design, wanted.numpy(), rcond=None)
    np.testing.assert_allclose(fitted.numpy(), oracle[:4].T, atol=1e-5)
    np.testing.assert_allclose(shifted.numpy(), oracle[4], atol=1e-5)


def test_the_hidden_size_is_cut_to_a_multiple(model: nn.Module):
    operator(Step(operator="prune_hidden", params={"share": 0.3, "multiple": 16}))(model, context(model))
    assert surgery.hidden_size(model) == 48
    assert logits(model).isfinite().all()


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"share": 1.0}, "less than 1"),
        ({"share": 0.5, "criterion": "obd"}, "choose one of fisher"),
        ({"share": 0.5, "criterion": "apoz", "units": ["layers"]}, "choose one of fisher, gauss_newton, taylor, magnitude"),
        ({"share": 0.5, "units": ["layers", "ffn"]}, "stand alone"),
        ({"share": 0.5, "units": ["blocks"], "scope": "local"}, "use global"),
        ({"share": 0.5, "training": {"epoch": 1}}, "did you mean epochs"),
    ],
)
def test_a_cut_that_can_not_be_is_refused(params: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        operator(Step(operator="prune", params=params))


def test_scores_that_say_nothing_are_refused(model: nn.Module, monkeypatch: pytest.MonkeyPatch):
    for wrong in (
        lambda model, batches, units: {"heads": [torch.ones(4)] * 2},
        lambda model, batches, units: {"heads": [torch.full((4,), torch.nan)] * 3},
    ):
        monkeypatch.setattr(criteria, "criterion", lambda name, problem, wrong=wrong: wrong)
        with pytest.raises(ValueError, match="is needed"):
            cutting.Scores("fisher", ["heads"]).of(model, CLASSIFICATION, [])
