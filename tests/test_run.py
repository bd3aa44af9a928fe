"""Whole searches on a tiny encoder: what they leave behind, how they resume, what a user's own operator may do."""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import light
import pandas as pd
import pytest
import screens
import torch
from searches import Setup, story, through_kills
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hpc_compress
from hpc_compress import analysis, cli, delivery, export, guard, identity
from hpc_compress.analysis import found
from hpc_compress.config import ConfigError
from hpc_compress.launch import Ended, packed
from hpc_compress.launch.local import Debug, InProcess
from hpc_compress.records import Heartbeat, Result
from hpc_compress.store import Store
from hpc_compress.types import Failure, Outcome, Screen, SearchError


@pytest.fixture(scope="module")
def finished(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    setup.run(root)
    return root


MUTATIONS = ["prune", "prune_time", "drop_layers", "prune_heads", "prune_hidden", "movement_prune"]


def test_a_run_leaves_what_it_promises(finished: Path):
    run = analysis.open_run(finished)
    assert run.result is not None
    assert [generation.number for generation in run.generations] == [1, 2]
    assert run.result.best == run.generations[-1].population[0]
    assert run.report_of(run.result.base) is not None
    assert all(run.report_of(id) is not None for id in run.result.reported)
    suffixes = {path.suffix for path in finished.rglob("*") if path.is_file() and "locks" not in path.parts}
    assert suffixes <= {".json", ".parquet", ".safetensors", ".npy"}


def test_only_the_living_keep_their_artifacts(finished: Path):
    run = analysis.open_run(finished)
    alive = {*run.generations[-1].population, run.base_id}
    wanted = {key(run.outcomes[id].task) for id in alive for key in (identity.master_key, identity.deployed_key)}
    assert {path.name for path in (finished / "artifacts").iterdir()} == wanted | {"tokenizer"}


@pytest.mark.slow
def test_equal_seeds_make_equal_runs(setup: Setup, finished: Path, tmp_path: Path):
    setup.run(tmp_path)
    assert story(tmp_path) == story(finished)


def test_a_finished_run_is_not_computed_again(setup: Setup, finished: Path):
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in finished.glob("tasks/*/outcome.json")}

    before = times()
    setup.run(finished)
    assert times() == before


def test_a_resumed_run_deletes_nothing_that_it_needs(setup: Setup, finished: Path, tmp_path: Path):
    root = tmp_path / "run"
    shutil.copytree(finished, root, copy_function=shutil.copy2)
    (root / "result.json").unlink()
    before = {path.name: path.stat().st_ino for path in (root / "artifacts").iterdir()}
    (root / "generations" / "0002.json").unlink()  # killed in the second generation, all of it measured
    setup.run(root)
    assert {path.name: path.stat().st_ino for path in (root / "artifacts").iterdir()} == before


@pytest.mark.slow
def test_a_run_can_be_prolonged_but_not_changed(setup: Setup, finished: Path, tmp_path: Path):
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    longer = setup.run(root, "generations=3")
    assert longer.generations == 3
    assert analysis.open_run(root).generations[:2] == analysis.open_run(finished).generations
    for change, words in (("seed=1", "seed: was 0, now 1"), ("objective.c=2", r"objective.c: was 1, now 2")):
        with pytest.raises(ConfigError, match=words):
            setup.run(root, change)


@pytest.mark.slow
def test_what_is_lost_is_computed_again_the_same(setup: Setup, finished: Path, tmp_path: Path):
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    shutil.rmtree(root / "artifacts")
    for path in list(root.glob("tasks/*/outcome.json"))[::2]:
        path.write_text("{")
    setup.run(root)
    assert story(root) == story(finished)


def test_a_second_driver_is_refused(setup: Setup, tmp_path: Path):
    with Store(tmp_path).lock("driver"), pytest.raises(SearchError, match="another driver"):
        setup.run(tmp_path)


@pytest.mark.slow
def test_the_search_stops_at_the_required_quality(setup: Setup, tmp_path: Path):
    result = setup.run(tmp_path, "required_quality=0.01", "generations=9")
    assert result.generations == 1
    assert "required_quality" in result.stopped


class Unreliable:
    """A launcher whose jobs die: each task's first one, and all of those that prune heads."""

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.dead: list[Ended] = []

    @contextmanager
    def open(self, root: Path, report: Any, say: Any) -> Iterator[Any]:
        self.store, self.inner = Store(root), InProcess(str(root), Debug(worker="light.run"), report)
        yield self

    def submit(self, bundles: Any, alone: bool = False) -> None:
        for task_id in (task_id for bundle in bundles for task_id in bundle):
            self.tried[task_id] += 1
            if self.tried[task_id] == 1 or "prune_heads" in str(self.store.task(task_id).genome):
                self.dead.append(Ended((task_id,), "killed by a test"))
            else:
                self.inner.submit([(task_id,)])

    def poll(self) -> list[Ended]:
        dead, self.dead = self.dead, []
        return [*dead, *self.inner.poll()]

    def in_flight(self) -> set[str]:
        return set()

    def counts(self) -> Counter[str]:
        return Counter()

    def cancel(self) -> None: ...


@pytest.mark.slow
def test_jobs_that_die_are_sent_again_and_then_are_lost(setup: Setup, tmp_path: Path):
    setup.run(tmp_path, "probe=false", "retries=3", launcher=Unreliable())
    outcomes = analysis.open_run(tmp_path).outcomes.values()
    lost = [o for o in outcomes if o.failure]
    assert lost
    assert all(o.failure.kind == "lost" and "died 4 times" in o.failure.message for o in lost)
    assert all("prune_heads" in str(o.task.genome) for o in lost)
    assert all("prune_heads" not in str(o.task.genome) for o in outcomes if o.measurement)


NO_OTHERS = [
    "~strategy.mutations.drop_layers",
    "~strategy.mutations.prune_heads",
    "strategy.quantizations.int8.weight=0",
    "strategy.quantizations.nf4.weight=0",
    "strategy.vocabularies.trim.weight=0",
]
OWN_OPERATORS = '''
"""Operators of a user's own, outside the package."""
from dataclasses import dataclass
import torch
from hpc_compress.config import ConfigError

@dataclass(frozen=True)
class PruneNeurons:
    """Zero no neuron but remove every second one of the first FFN."""
    keep_every: int = 2

    def __call__(self, model, context):
        layer = model.bert.encoder.layer[0]
        kept = torch.arange(0, layer.intermediate.dense.out_features, self.keep_every)
        into, out = layer.intermediate.dense, layer.output.dense
        into.weight, into.bias = torch.nn.Parameter(into.weight[kept]), torch.nn.Parameter(into.bias[kept])
        out.weight = torch.nn.Parameter(out.weight[:, kept].contiguous())
        into.out_features = out.in_features = len(kept)
        return model

@dataclass(frozen=True)
class RoundEmbeddings:
    """Store the word embeddings in half precision."""

    def __call__(self, model, context):
        return model.half()

@dataclass(frozen=True)
class Broken:
    def __call__(self, model, context):
        raise RuntimeError("this operator is broken")

@dataclass(frozen=True)
class ForGpus:
    def check(self, device, depth, inputs):
        raise ConfigError(f"{depth} layers are not for me")

    def __call__(self, model, context):
        return model
'''


@pytest.fixture
def own_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_operators.py").write_text(OWN_OPERATORS)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("own_operators", None)


@pytest.mark.slow
@pytest.mark.usefixtures("own_operators")
def test_a_users_own_pruning_and_quantization_take_part(setup: Setup, tmp_path: Path):
    setup.run(
        tmp_path / "run",
        *NO_OTHERS,
        "+strategy.mutations.mine={weight: 1, operator: own_operators.PruneNeurons, keep_every: 3}",
        "+strategy.quantizations.mine={weight: 0.5, operator: own_operators.RoundEmbeddings}",
        "strategy.mutation_probability=1",
    )
    table = hpc_compress.load_runs(tmp_path / "run")
    born = table[table["generation"] > 0]
    assert (born["status"] == "measured").all()
    assert born["genome"].str.contains("PruneNeurons").all()
    assert set(born["deploy"]) == {"fp32", "own_operators.RoundEmbeddings"}
    base = table.iloc[0]
    half = born[born["deploy"] != "fp32"]
    assert (born["encoder_parameters"] < base["encoder_parameters"]).all()
    assert (half["model_bytes"] < 0.65 * base["model_bytes"]).all()


@pytest.mark.usefixtures("own_operators")
def test_an_operator_may_refuse_the_base_model_before_any_job(setup: Setup, tmp_path: Path):
    with pytest.raises(ConfigError, match="3 layers are not for me"):
        setup.run(tmp_path / "run", "+strategy.mutations.mine={weight: 1, operator: own_operators.ForGpus}")
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("own_operators")
def test_a_broken_operator_shows_in_the_probe_and_can_be_mended(setup: Setup, tmp_path: Path):
    overrides = [*NO_OTHERS, "+strategy.mutations.mine={weight: 1, operator: own_operators.Broken}"]
    for _ in range(2):
        with pytest.raises(SearchError, match="this operator is broken"):
            setup.run(tmp_path / "run", *overrides)
    assert not (tmp_path / "run" / "generations").exists()
    (tmp_path / "own_operators.py").write_text(
        OWN_OPERATORS.replace('raise RuntimeError("this operator is broken")', "return model")
    )
    sys.modules.pop("own_operators")
    setup.run(tmp_path / "run", *overrides)
    assert (tmp_path / "run" / "result.json").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("own_operators")
def test_without_a_probe_a_failure_is_data(setup: Setup, tmp_path: Path):
    broken = "+strategy.mutations.mine={weight: 1, operator: own_operators.Broken}"
    setup.run(tmp_path / "run", broken, "probe=false", "strategy.mutation_probability=1")
    table = hpc_compress.load_runs(tmp_path / "run")
    failed = table[table["status"] == "error"]
    assert len(failed) > 0
    assert failed["failure"].str.contains("RuntimeError: this operator is broken").all()
    assert not failed["alive"].any()


# --- reading runs ---


def test_load_runs_has_a_row_for_each_candidate(finished: Path):
    table = hpc_compress.load_runs([finished])
    run = analysis.open_run(finished)
    assert set(table["candidate"]) == {run.base_id, *(id for g in run.generations for id in g.born_ids)}
    assert table["candidate"].is_unique
    assert table.loc[table["best"], "candidate"].tolist() == [run.result.best]
    assert table.loc[table["best"], "fitness"].item() == pytest.approx(table["fitness"].max())
    assert table["generation"].is_monotonic_increasing
    assert table["speed_up"].iloc[0] == 1
    assert set(table.set_index("candidate")["timings"][list(set(run.result.reported) - {run.base_id})]) == {3}
    for _, row in table[table["status"] == "measured"].iterrows():
        timings = run.seen[row["candidate"]].measurement.timings
        ratios = [base / own for timing in timings for base, own in zip(timing.base_latency_ms, timing.latency_ms, strict=True)]
        assert row["speed_up"] == 1 or min(ratios) <= row["speed_up"] <= max(ratios)


@pytest.mark.slow
def test_the_report_has_the_base_model_and_the_best(finished: Path, tmp_path: Path):
    table = analysis.write_report(analysis.open_runs([finished]), tmp_path)
    result = analysis.open_run(finished).result
    expected = [result.base, *(candidate for candidate in result.reported if candidate != result.base)]
    assert table["candidate"].tolist() == expected
    assert table["method"].tolist()[0] == "base model"
    assert table.loc[table["method"] == "best", "candidate"].tolist() == [id for id in expected[1:] if id == result.best]
    assert {path.name for path in tmp_path.iterdir()} == set(analysis.FILES)
    rows = len(pd.read_parquet(finished / "data/report.parquet"))
    assert f"{result.best} against the base model: " in (said := analysis.verdicts(analysis.open_runs([finished]))[0])
    assert f"(paired, {rows} report rows): " in said
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('<figure class="drawing">') == len(hpc_compress.front(hpc_compress.load_runs(finished)))
    header = (tmp_path / "report.md").read_text().splitlines()[0]
    for column in ("dataset", "method", "metric", "parameters, M", "size, MB", "inference, ms", "speed-up"):
        assert column in header
    assert (tmp_path / "candidates.png").stat().st_size > 10_000


def test_status_speaks_of_runs_in_any_state(finished: Path, tmp_path: Path):
    assert "ended: all generations are done" in analysis.status(finished)
    run = analysis.open_run(finished)
    front = analysis.status(finished).partition("\nfront ")[2]
    assert 0 < len(found.front_of(run)) == sum("x speed: " in line for line in front.splitlines())
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "generations")
    assert "0 of 2 done" in analysis.status(tmp_path / "run")
    assert "driver at work" in analysis.status(tmp_path / "run")  # this process
    Store(tmp_path / "run").write("driver.json", Heartbeat(host="elsewhere", pid=1, job_id="17", job_name="driver"))
    assert "driver at work on elsewhere in job 17" in analysis.status(tmp_path / "run")
    os.utime(tmp_path / "run" / "driver.json", (0, 0))
    assert "goes on with it" in analysis.status(tmp_path / "run")
    with pytest.raises(ConfigError, match="not a run folder"):
        analysis.status(tmp_path)


def test_a_terminal_shows_what_is_found_below_the_lines_of_the_log(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    """And a file, or a terminal without a run, gets the lines alone."""
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("COLUMNS", "240")
    monkeypatch.setenv("LINES", "60")
    screens = {}
    for terminal, root in (("1", finished), ("0", finished), ("1", None), ("1", finished / "tasks")):
        monkeypatch.setenv("TTY_COMPATIBLE", terminal)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        handler = logging.StreamHandler(sys.stderr)
        logging.getLogger().addHandler(handler)
        try:
            with cli.Console(root) as console:
                assert (handler.stream is sys.stderr) or terminal == "0"
                console.working("fine_tune", 3, 10)
                console.say("generation 2/2: a line")
                assert console._live is None or console._live.is_started
        finally:
            logging.getLogger().removeHandler(handler)
        screens[terminal, root] = capsys.readouterr().err
        assert "generation 2/2: a line" in screens[terminal, root]
    first, *others = screens.values()
    front = [line for line in analysis.status(finished).splitlines() if "speed: " in line][-1].strip()
    assert "fine_tune" in first  # the bar
    assert first.index("generation 2/2: a line") < first.index(front)
    assert not any("best so far" in screen for screen in others)


def test_a_dead_candidate_can_be_exported_as_it_was_measured(finished: Path, tmp_path: Path):
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    table = hpc_compress.load_runs(root)
    dead = table[~table["alive"] & (table["status"] == "measured")].iloc[-1]
    target = export.export(root, tmp_path / "model", dead["candidate"][:8])
    assert (target / "model.safetensors").stat().st_size == dead["model_bytes"]
    card = (target / "README.md").read_text()
    assert f"{dead['model_bytes'] / 1e6:.1f} MB" in card
    assert hpc_compress.load_model(target).config.id2label == {0: "neg", 1: "pos"}


def test_an_export_never_overwrites_what_is_not_one(finished: Path, tmp_path: Path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="choose another folder"):
        export.export(finished, tmp_path)
    with pytest.raises(ConfigError, match="candidates"):
        export.export(finished, tmp_path / "new", "nobody")
    export.export(finished, tmp_path / "model")
    export.export(finished, tmp_path / "model")
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_an_exported_model_answers_as_it_was_measured(finished: Path, tmp_path: Path):
    """Text in, label out, by transformers alone; its accuracy on the report split is the one in the report."""
    from transformers import AutoTokenizer

    run = analysis.open_run(finished)
    target = export.export(finished, tmp_path / "model")
    rows = pd.read_parquet(finished / "data" / "report.parquet")
    model, tokenizer = hpc_compress.load_model(target), AutoTokenizer.from_pretrained(target)
    answers = model(**tokenizer(rows["text"].tolist(), padding=True, return_tensors="pt")).logits.argmax(-1).numpy()
    assert (answers == rows["label"]).mean() == pytest.approx(run.report_of(run.result.best).measurement.metrics["accuracy"])


@pytest.mark.slow
def test_an_export_as_a_program_says_what_the_model_says(finished: Path, tmp_path: Path):
    pytest.importorskip("onnxruntime")
    table = hpc_compress.load_runs(finished)
    whole = table[table["deploy"] == "fp32"]["candidate"].iloc[-1]
    with pytest.raises(ConfigError, match="is for models that embed sentences, and this one is for text-classification"):
        export.export(finished, tmp_path / "program", whole, to="sentence-transformers")
    assert not list(tmp_path.iterdir())
    folder = export.export(finished, tmp_path / "program", whole, to="onnx")
    assert (folder / "model.onnx").is_file()
    assert not (folder / "model.safetensors").exists()
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    plain = AutoModelForSequenceClassification.from_pretrained(
        export.export(finished, tmp_path / "plain", whole), trust_remote_code=True
    )
    inputs = AutoTokenizer.from_pretrained(folder)(["a good film", "a dull plot"], return_tensors="pt")
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits.detach(), atol=1e-5, rtol=1e-4)
    small = table[table["deploy"].str.contains("nf4|int8")]["candidate"]
    if len(small):
        with pytest.raises(ConfigError, match="can not be exported to ONNX; export a candidate in fp32"):
            export.export(finished, tmp_path / "small", small.iloc[0], to="onnx")
        assert not (tmp_path / "small").exists()


def test_an_export_that_is_not_the_model_is_not_written(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said = delivery.answers
    monkeypatch.setattr(delivery, "answers", lambda folder: [answer + 0.01 for answer in said(folder)])
    with pytest.raises(SearchError, match=r"answers differ by 0\.01"):
        export.export(finished, tmp_path / "model", check=True)
    assert not any(tmp_path.iterdir())


def test_tasks_that_share_a_master_stay_together():
    assert packed([("a", "b"), ("c",), ("d",)], 1) == [(("a", "b"),), (("c",),), (("d",),)]
    assert packed([("a", "b"), ("c",), ("d",)], 3) == [(("a", "b"), ("c",)), (("d",),)]


# --- kill -9 ---


@pytest.mark.slow
def test_a_run_that_can_not_go_on_does_not_end_its_sweep(setup: Setup, tmp_path: Path):
    command = [sys.executable, "-m", "hpc_compress.cli", "search", "-m", *setup.overrides, "generations=0", "seed=-1,0"]
    command.append("hydra.sweep.subdir=seed${seed}")  # all overrides in one name would be too long for a folder
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    results = [path.parent.name for path in tmp_path.rglob("result.json")]
    assert results == ["seed0"], done.stdout + done.stderr
    assert done.returncode == 1
    assert "seed-1" in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["cuts by score", "hidden cuts", "movement"])
def test_a_search_draws_on_the_whole_tool_box(setup: Setup, tmp_path: Path, strategy: str):
    """Every kind of mutation through driver, probe, worker, deployment and report."""
    drawn = {"cuts by score": ["prune", "prune_time"], "hidden cuts": ["prune_hidden"], "movement": ["movement_prune"]}[
        strategy
    ]
    mutations = [f"strategy.mutations.{name}.weight={int(name in drawn)}" for name in MUTATIONS]
    # Widths that nf4 takes, from an encoder that is narrower than the default multiple allows to cut.
    sizes = ["strategy.mutations.prune.ffn_multiple=32", "+strategy.mutations.prune_time.ffn_multiple=32"]
    sizes += ["strategy.mutations.prune_hidden.multiple=32", "+strategy.mutations.movement_prune.ffn_multiple=32"]
    overrides = [*mutations, *sizes, "strategy.vocabularies.trim.weight=0.5", "generations=1"]
    setup.run(tmp_path / "run", *overrides)
    run = analysis.open_run(tmp_path / "run")
    searched = [outcome for outcome in run.outcomes.values() if outcome.task.genome.steps]
    used = {step.operator for outcome in searched for step in outcome.task.genome.steps}
    assert {name.replace("_time", "") for name in drawn} <= used
    assert all(outcome.measurement for outcome in searched), [outcome.failure for outcome in searched if outcome.failure]
    assert run.outcomes[run.base_id].measurement.encoder_parameters > min(o.measurement.encoder_parameters for o in searched)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["debug", "local"])
def test_a_search_survives_kill_9_at_any_moment(setup: Setup, finished: Path, tmp_path: Path, launcher: str):
    """The same result, and nothing computed twice."""
    threads = ["launcher.threads=1"] if launcher == "local" else []  # as here; other numbers of threads round differently
    assert story(through_kills(setup, tmp_path, f"launcher={launcher}", *threads)) == story(finished)


def test_outcomes_are_json_that_any_tool_can_read(finished: Path):
    for path in finished.glob("tasks/*/outcome.json"):
        assert Outcome.model_validate(json.loads(path.read_text()))


# --- a folder on a shared machine ---


def lightly(setup: Setup, root: Path, worker: str = "light.run", *more: str) -> Result:
    return setup.run(root, "probe=false", *more, launcher=Debug(worker=worker))


def test_a_run_folder_is_private_and_nobody_else_may_write_there(setup: Setup, tmp_path: Path):
    root = tmp_path / "run"
    lightly(setup, root)
    assert root.stat().st_mode & 0o777 == 0o700
    root.chmod(0o750)  # colleagues may read
    lightly(setup, root)
    root.chmod(0o770)
    with pytest.raises(ConfigError, match="written to by others"):
        lightly(setup, root)


@pytest.mark.slow
@pytest.mark.parametrize("alive", [True, False])
def test_a_driver_on_another_node_is_told_by_its_signs_of_life(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alive: bool
):
    """Where locks don't reach from node to node."""
    monkeypatch.setattr(guard, "HEARTBEAT_SECONDS", 0.4)
    Store(tmp_path).write("driver.json", Heartbeat(host="elsewhere", pid=1, job_id=None, job_name=None))
    beat = threading.Timer(0.25, (tmp_path / "driver.json").touch)
    if not alive:
        lightly(setup, tmp_path)
        return
    beat.start()
    with pytest.raises(SearchError, match="another driver"):
        lightly(setup, tmp_path)


def fail_alike(root: str, task_ids: list[str], **ignored: Any) -> Iterator[str]:
    """A worker on whose nodes a library is broken."""
    store = Store(root)
    for task_id in task_ids:
        task = store.task(task_id)
        address = task_id[:6] if int(task_id, 16) % 2 else "abcdef"
        failure = Failure(kind="error", stage="train", message=f"ImportError: libcuda.so at 0x{address}")
        store.settle(Outcome(task=task, failure=failure) if task.genome.steps else light.answer(task))
        yield task_id


@pytest.mark.slow
def test_a_run_whose_tasks_all_fail_alike_stops_and_can_go_on(setup: Setup, tmp_path: Path):
    with pytest.raises(SearchError, match=r"all 4 tasks of generation 1/2 failed alike.*libcuda"):
        lightly(setup, tmp_path / "run", "test_run.fail_alike")
    lightly(setup, tmp_path / "run")
    lightly(setup, tmp_path / "wanted")
    assert story(tmp_path / "run") == story(tmp_path / "wanted")


def fail_screens(root: str, task_ids: list[str], **ignored: Any) -> Iterator[str]:
    """A worker that can screen nothing after the first generation."""
    yield from _failing_screens(root, task_ids, "error")


def lose_screens(root: str, task_ids: list[str], **ignored: Any) -> Iterator[str]:
    """A worker whose node dies at each screen after the first generation."""
    yield from _failing_screens(root, task_ids, "lost")


def _failing_screens(root: str, task_ids: list[str], kind: Any) -> Iterator[str]:
    store = Store(root)
    for task_id in task_ids:
        task = store.task(task_id)
        failure = Failure(kind=kind, stage="screen", message="no such luck")
        later = (Path(root) / "generations" / "0001.json").exists()
        fails = later and isinstance(task.study, Screen)
        store.settle(Outcome(task=task, failure=failure) if fails else light.answer(task))
        yield task_id


@pytest.mark.slow
def test_screens_that_all_fail_alike_do_not_end_a_run(setup: Setup, tmp_path: Path):
    assert lightly(setup, tmp_path, "test_run.fail_screens", *screens.SETTINGS).generations == 4


@pytest.mark.slow
def test_screens_that_are_all_lost_end_a_run(setup: Setup, tmp_path: Path):
    with pytest.raises(SearchError, match="failed alike"):
        lightly(setup, tmp_path, "test_run.lose_screens", *screens.SETTINGS)


@pytest.mark.slow
def test_without_a_barrier_a_run_comes_to_its_end(setup: Setup, tmp_path: Path):
    result = lightly(setup, tmp_path, "light.run", "select_after=0.5", "generations=4")
    generations = analysis.open_run(tmp_path).generations
    assert result.generations == 4
    born = [task_id for generation in generations for task_id in generation.born_ids]
    assert sorted(born) == sorted({task_id for generation in generations for task_id in generation.told})
