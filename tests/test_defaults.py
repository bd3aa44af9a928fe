"""Settings that follow from the device that candidates run on."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from searches import Setup
from test_config import ask

from hpc_compress import config, defaults
from hpc_compress.config import ConfigError, RunConfig
from hpc_compress.search.genetic import Genetic
from hpc_compress.search.space import Shape
from hpc_compress.store import Store
from hpc_compress.types import Failure, Outcome


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """machine(gpus, packages, flags): what the driver finds where it runs."""

    def be(gpus: int = 0, packages: tuple[str, ...] = (), flags: str = "avx2") -> None:
        monkeypatch.setattr(defaults, "visible_gpus", lambda: [str(number) for number in range(gpus)])
        monkeypatch.setattr(defaults.importlib.util, "find_spec", lambda name: name if name in packages else None)
        monkeypatch.setattr(defaults, "_cpu_flags", lambda: set(flags.split()))

    return be


def resolved(*overrides: str) -> tuple[RunConfig, dict[str, float], Genetic]:
    """What a search with these words would use: its settings, the weights of its precisions, its strategy."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from hpc_compress import cli

    with initialize_config_dir(str(cli.conf_dir()), version_base="1.3"):
        # A strategy of the command line would win over that of an experiment.
        strategy = [] if any(word.startswith("experiment=") for word in overrides) else ["strategy=genetic"]
        composed = compose("config", [*strategy, *overrides])
    values: Any = OmegaConf.to_container(composed, resolve=True)
    values = defaults.chosen(values, config.build(values["launcher"], "launcher"))
    values = {name: value for name, value in values.items() if name in RunConfig.model_fields or name == "strategy"}
    settings = values.pop("strategy")
    strategy = config.build({**settings, "shape": Shape(heads=(12,) * 6), "score": len}, "strategy")
    weights = {name: choice.weight for name, choice in strategy.quantizations.items() if choice.weight and choice.step}
    return config.validate(RunConfig, values), weights, strategy


def test_on_a_gpu_16_bits_come_first_and_few_bits_leave_the_rest_in_bf16(machine: Callable[..., None]):
    machine(gpus=1, packages=("onnx", "onnxruntime"), flags="avx512_bf16")
    run, weights, strategy = resolved()
    assert (run.protocol.device, run.protocol.base_precision) == ("cuda", "best")
    assert run.protocol.batch_size > 32
    assert set(weights) == {"bf16", "fp16", "int8", "nf4"}
    assert weights["bf16"] + weights["fp16"] > weights["int8"] + weights["nf4"]
    rests = {strategy.quantizations[name].step.params["rest"] for name in ("int8", "nf4")}  # type: ignore[union-attr]
    assert rests == {"bf16"}


@pytest.mark.slow
def test_on_a_cpu_onnx_runtime_comes_first_where_it_is_installed(machine: Callable[..., None]):
    machine(packages=("onnx", "onnxruntime"))
    run, weights, _ = resolved()
    assert (run.protocol.device, run.protocol.base_precision, run.protocol.batch_size) == ("cpu", "fp32", 32)
    assert set(weights) == {"onnx_int8", "nf4"}
    assert weights["onnx_int8"] > weights["nf4"]
    machine(packages=("onnx",))
    assert set(resolved()[1]) == {"int8", "nf4"}


@pytest.mark.slow
def test_bf16_is_for_processors_that_compute_in_it(machine: Callable[..., None]):
    machine(flags="avx2 amx_bf16")
    assert set(resolved()[1]) == {"bf16", "int8", "nf4"}
    # Candidates run elsewhere: this processor says nothing about theirs.
    assert set(resolved("launcher=slurm", "cluster.gpus_per_node=0")[1]) == {"int8", "nf4"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "gpus", "device"),
    [
        (["launcher=slurm"], 0, "cuda"),  # a driver on a login node
        (["launcher=slurm", "cluster.gpus_per_node=0"], 2, "cpu"),
        (["launcher=slurm", "cluster=lab"], 2, "cpu"),  # its GPUs are not there
        (["launcher=pbs"], 0, "cuda"),
        (["launcher=pbs", "launcher.ngpus=0"], 2, "cpu"),
        (["launcher=pbs", "launcher.require_cuda=false"], 2, "cpu"),
        (["launcher=local"], 2, "cuda"),
        (["launcher=local"], 0, "cpu"),
        (["launcher=local", "protocol.device=cpu"], 2, "cpu"),
        (["launcher=debug", "protocol.device=cuda"], 0, "cuda"),
    ],
)
def test_the_device_follows_from_protocol_and_launcher(machine: Callable[..., None], words: list[str], gpus: int, device: str):
    machine(gpus=gpus)
    assert resolved(*words)[0].protocol.device == device


def test_what_a_user_sets_wins(machine: Callable[..., None]):
    machine(gpus=1)
    words = ["protocol.batch_size=7", "protocol.base_precision=fp16", "strategy.quantizations.int8.weight=0.01"]
    run, weights, strategy = resolved(*words, "strategy.quantizations.int8.rest=fp16", "strategy.quantizations.bf16.weight=0")
    assert (run.protocol.batch_size, run.protocol.base_precision) == (7, "fp16")
    assert (weights["int8"], "bf16" in weights) == (0.01, False)
    assert strategy.quantizations["int8"].step.params["rest"] == "fp16"  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [0, 1])
def test_the_published_setting_has_precisions_of_its_own(machine: Callable[..., None], gpus: int):
    machine(gpus=gpus, packages=("onnx", "onnxruntime"), flags="amx_bf16")
    _, weights, strategy = resolved("experiment=published")
    assert weights == {"int8": 0.1, "nf4": 0.1, "fp16": 0.1}
    assert len(strategy.deploys) == 3
    assert not strategy.inherit
    assert strategy.redraw == 0


def test_a_setting_without_a_value_for_the_device_is_named(machine: Callable[..., None]):
    machine()
    with pytest.raises(ConfigError, match=r"objective\.a={'cuda': 3} has no value for cpu; add cpu"):
        resolved("objective.a={cuda: 3}")


@pytest.mark.slow
def test_a_child_can_return_to_full_precision_and_to_the_whole_vocabulary(machine: Callable[..., None]):
    for gpus in (0, 1):
        machine(gpus=gpus)
        strategy = resolved()[2]
        for choice in (strategy.quantizations["none"], strategy.vocabularies["none"]):
            assert choice.step is None
            assert choice.weight > 0


def refuse(root: str, task_ids: list[str], **ignored: Any) -> Iterator[str]:
    """A worker that does nothing well."""
    store = Store(root)
    for task_id in task_ids:
        store.settle(Outcome(task=store.task(task_id), failure=Failure(kind="error", stage="train", message="no")))
        yield task_id


@pytest.mark.slow
def test_the_run_folder_holds_what_was_chosen(tmp_path: Path, setup: Setup):
    root = tmp_path / "results/test"
    answer = ask(tmp_path, "search", *setup.overrides, "generations=0", "+launcher.worker=test_defaults.refuse")
    assert answer.code == 1, answer.stderr
    plan = json.loads((root / "run.json").read_text())
    assert plan["config"]["protocol"]["device"] == "cpu"
    assert plan["strategy"]["quantizations"]["int8"]["rest"] == "fp32"
    assert "candidates run on CPUs (protocol.device=cpu) in batches of 8" in answer.stdout + answer.stderr


def test_the_log_names_the_ways_to_deploy_of_a_space():
    space = {"deploys": {"fp32": [], "bf16": None, "nf4": [{"operator": "quantize", "scheme": "nf4"}]}}
    assert defaults.describe(RunConfig.model_fields["protocol"].default, {"space": space}).endswith("precisions: fp32, nf4")
    assert defaults.describe(RunConfig.model_fields["protocol"].default, {}).endswith("precisions: fp32")
