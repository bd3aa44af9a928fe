"""Searches for devices that are not at hand: quality and bytes are measured, times are predicted from the devices' files."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import test_strategies as world
from searches import Setup, Silent
from test_prediction import settings

import hpc_compress
from hpc_compress import analysis, driver, export, profiling
from hpc_compress.launch.local import Debug
from hpc_compress.search import front
from hpc_compress.search.elsewhere import Elsewhere, views
from hpc_compress.search.objective import speed_up
from hpc_compress.search.prediction import Prediction, timed
from hpc_compress.types import Candidate, DeviceProfile, Genome, Structure

STRUCTURE = Structure(heads=(4, 2, 1), ffn=(256, 0, 64))


def candidate(structure: Structure | None, deploy: str = "fp32") -> Candidate:
    genome = world.SPACE.genome(world.SHAPE, structure or STRUCTURE, deploy=world.SPACE.deploys[deploy])
    measured = world.measured(genome).model_copy(update={"structure": structure})
    return Candidate(id="0", genome=genome, measurement=measured)


def slow_ffn(profile: DeviceProfile) -> DeviceProfile:
    """Another device, on which neurons cost ten times as much."""
    blocks = []
    for block in profile.blocks:
        slower = np.array(block.ffn_ms) * 10
        blocks.append(block.model_copy(update={"ffn_ms": tuple(tuple(tuple(c) for c in row) for row in slower.tolist())}))
    return profile.model_copy(update={"device": "another", "device_type": "cuda", "blocks": tuple(blocks)})


ANOTHER = slow_ffn(world.PROFILE)
THERE = Elsewhere(ANOTHER, Prediction.of(world.SURVEY, ANOTHER))


def test_times_are_predicted_and_the_rest_is_measured():
    here = candidate(STRUCTURE, "nf4")
    found = THERE.measured(here).measurement
    assert found.predicted
    assert (found.device, found.device_type) == ("another", "cuda")
    assert (found.metrics, found.model_bytes) == (here.measurement.metrics, here.measurement.model_bytes)
    rows = np.array([STRUCTURE.heads]), np.array([STRUCTURE.ffn])
    assert speed_up(found) == pytest.approx(1 / THERE.prediction.latency(*rows, here.genome.deploy)[0])
    base = THERE.measured(candidate(world.SPACE.whole(world.SHAPE))).measurement
    assert speed_up(base) == pytest.approx(1)
    assert front.vector(found, base, ("quality", "latency", "bytes")).shape == (3,), "they can be compared"


@pytest.mark.parametrize(
    "odd", [None, Structure(heads=(4, 4, 4), ffn=(256, 256, 256), hidden=32)], ids=["of an earlier version", "hidden size"]
)
def test_what_can_not_be_predicted_is_not_judged_there(odd: Structure | None):
    assert THERE.measured(candidate(odd)).measurement is None


def test_the_device_at_hand_is_timed():
    base = world.BASE.measurement
    here, there = views((world.PROFILE, ANOTHER), world.SURVEY, base)
    assert here is None
    assert there is not None
    assert there.profile == ANOTHER
    assert views((), world.SURVEY, base) == views((), None, base) == (None,)


def with_structure(candidate: Candidate, screen: Any) -> Candidate:
    found = world.answered(candidate, screen)
    if found.measurement is None:
        return found
    structure = world.SPACE.structure(world.SHAPE, found.genome)
    return found.model_copy(update={"measurement": found.measurement.model_copy(update={"structure": structure})})


@pytest.mark.slow
def test_evolve_searches_for_the_fronts_of_all_devices():
    chains = list(world.SPACE.possible_deploys().values())
    blocks = tuple(world.block(timed(chain), factor) for chain, factor in zip(chains, (1, 0.3, 3), strict=True))
    profile = world.PROFILE.model_copy(update={"device": "another", "blocks": blocks})  # on which another precision is fast
    view = Elsewhere(profile, Prediction.of(world.SURVEY, profile))
    base = view.measured(candidate(world.SPACE.whole(world.SHAPE))).measurement
    there = world.KNOWN.model_copy(update={"profile": profile, "base": base, "seen": view.measured})

    def volume(*others: Any) -> float:
        """Of the front on the other device."""
        strategy = world.made("evolve", known=world.KNOWN.model_copy(update={"others": others}), population=2)
        turns = list(world.play(strategy, 12, answer=with_structure))
        found = [view.measured(c).measurement for turn in turns for c in turn.told if c.measurement]
        return front.hypervolume(np.array([front.vector(m, base, there.objectives) for m in found]), there.objectives)

    assert volume(there) > volume()


# --- whole searches ---


@pytest.fixture(scope="module")
def given(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> tuple[Setup, list[str], list[str]]:
    """A tiny search with evolve, the files of another device and of this one, and their names."""
    folder = tmp_path_factory.mktemp("devices")
    tiny = [word for word in setup.overrides if not word.startswith("strategy")]
    distill = "{operator: distill, epochs: 0.5, learning_rate: 1e-3, batch_size: 16}"
    overrides = [
        *tiny,
        *("strategy=evolve", "strategy.population=3", "strategy.budgets=[1.0, 0.5]", "strategy.screens=3", "strategy.judge=16"),
        *("strategy.rescoring=false", "strategy.space.ffn_multiple=16", "strategy.space.carve.sentences=16"),
        f"strategy.space.trainings={{short: [{distill}], long: [{distill}, {distill}]}}",
        *("strategy.space.deploys.fp32.cpu_onnx=[]", "strategy.space.deploys.onnx_int8=null"),
        *("generations=3", "timings=1", "target.speed_up=1.2"),
    ]
    run = dataclasses.replace(setup, overrides=overrides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling, "MOST_SWEEPS", 2)
        mine = driver.profile(settings(run, "strategy.profile_seconds=5"), folder / "scratch", Silent())
    paths = []
    for profile in (slow_ffn(mine), mine):
        paths.append(str(folder / f"{len(paths)}.json"))
        Path(paths[-1]).write_text(profile.model_dump_json())
    return run, paths, ["another", mine.device]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_search_for_another_device_says_what_was_predicted(given: Any, tmp_path: Path, count: int):
    run, paths, names = given
    root, progress = tmp_path / "run", Silent()
    result = run.run(root, f"device=[{', '.join(paths[:count])}]", progress=progress)
    assert [(each.device, each.predicted) for each in result.fronts] == [(names[0], True), (names[1], False)][:count]
    assert result.front == result.fronts[0].candidates
    assert "times are predicted for another" in progress.lines
    table = hpc_compress.load_runs(root)
    measured = table[table["status"] == "measured"]
    assert measured["predicted"].all()
    assert set(measured["device"]) == {"another"}
    assert list(table.loc[table["on_front"], "candidate"].sort_values()) == sorted(result.front)

    analysis.write_report(analysis.open_runs([root]), tmp_path / "report")
    text, rows = (tmp_path / "report/report.md").read_text(), pd.read_csv(tmp_path / "report/report.csv")
    assert "Times are predicted for another; qualities and bytes are measured." in text
    fronts = rows[rows["split"] == "search"]
    assert {(row["device"], row["times"]) for _, row in fronts.iterrows()} == set(
        zip(names[:count], ["predicted", "measured"], strict=False)
    )
    for each in result.fronts:
        assert set(fronts.loc[fronts["device"] == each.device, "candidate"]) == set(each.candidates)
    status = analysis.status(root)
    assert "models on another (times predicted)" in status
    assert (f"models on {names[1]} (times measured)" in status) == (count == 2)
    assert "x speed (predicted)" in analysis.on_targets(analysis.open_runs([root]))[0]
    assert "on another (predicted)" in (export.export(root, tmp_path / "model") / "README.md").read_text()
    if count == 1:  # nobody asks what is predicted a second time
        assert not any(outcome.task.repeat for outcome in analysis.open_run(root).outcomes.values())

    for path in [root / "result.json", *(root / "generations").iterdir()]:
        path.unlink()
    again = run.run(root, f"device=[{', '.join(paths[:count])}]", launcher=Debug(worker="no.such.worker"))
    assert again == result


@pytest.mark.slow
def test_genetic_search_for_another_device_is_told_predicted_times(given: Any, setup: Setup, tmp_path: Path):
    """It asks for no profile and no survey, and deploys in other ways."""
    _, paths, _ = given
    root = tmp_path / "run"
    fp32 = ("strategy.quantizations={int8: {weight: 0}, nf4: {weight: 0}}", "strategy.vocabularies.trim.weight=0")
    result = setup.run(root, f"device={paths[0]}", *fp32, "generations=1")
    assert result.fronts[0].predicted
    assert hpc_compress.load_runs(root)["predicted"].all()


@pytest.mark.slow
def test_what_a_model_is_made_of_is_measured_too(given: Any, tmp_path: Path):
    run, *_ = given
    run.run(tmp_path / "run", "generations=1", "strategy.profile_seconds=2", "target.speed_up=null")
    outcomes = [outcome for outcome in analysis.open_run(tmp_path / "run").outcomes.values() if outcome.measurement]
    for outcome in outcomes:
        first = outcome.task.genome.steps[:1]
        wanted = {name: list(first[0].params[name]) for name in ("heads", "ffn")} if first else {"heads": [4] * 3}
        found = outcome.measurement.structure.model_dump(mode="json")
        assert {name: found[name] for name in wanted} == wanted
    assert any(outcome.task.genome != Genome() for outcome in outcomes)
