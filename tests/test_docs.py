"""What the documents tell people to type. Commands and snippets are found by parsing the documents.

Quick tests compose and check every command. Slow ones run the tour on a tiny model: search, status, report, export, loading,
and the examples. A command that nobody here knows how to check fails.
"""

import argparse
import ast
import importlib.util
import itertools
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from searches import tiny

import hpc_compress
from hpc_compress import cli, config, driver
from hpc_compress.launch.arrays import ArrayLauncher
from hpc_compress.operators import operator
from hpc_compress.search.known import Known
from hpc_compress.search.space import Shape

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOT_OURS = {"pre-commit"}  # packages that a document advises, and that pyproject.toml does not pin
PROGRAMS = ("hpc-compress", "make", "sbatch", "export", "python", "pip", "pytest", "nvidia-smi", "pre-commit")


# --- finding ---


@dataclass(frozen=True)
class Block:
    """Code in a document."""

    page: Path
    line: int
    language: str  # "" for indented code, which is shell
    text: str


@dataclass(frozen=True)
class Command:
    """One command of a document."""

    where: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.where} {shlex.join(self.words[:4])}"


def blocks(page: Path) -> list[Block]:
    """Fenced and indented code. Indented code follows a blank line, and has four spaces or more."""
    found, lines, at = [], page.read_text(encoding="utf-8").splitlines(), 0
    while at < len(lines):
        fence = re.match(r"\s*```(\w*)$", lines[at])
        indented = lines[at].startswith("    ") and lines[at].strip() and (at == 0 or not lines[at - 1].strip())
        begin = at + 1 if fence else at
        if fence:
            at = next(end for end in range(begin, len(lines)) if lines[end].strip() == "```")
        elif indented:
            at = next((end for end in range(begin, len(lines)) if not lines[end].startswith("    ")), len(lines))
        if fence or indented:
            text = "\n".join(lines[begin:at])
            found.append(Block(page, begin + 1, fence[1] if fence else "", text))
        at += 1
    return found


def commands(page: Path) -> Iterator[Command]:
    """The lines of shell blocks, and what looks like a command in a sentence. In an example: those of its docstring."""
    if page.suffix == ".py":
        lines = joined(ast.get_docstring(ast.parse(page.read_text())) or "")
        yield from (Command(page.name, words) for line in lines if (words := parsed(line)) and words[0] in PROGRAMS)
        return
    for block in blocks(page):
        if block.language in ("", "sh", "bash"):
            lines = filter(None, joined(block.text))
            yield from (Command(f"{page.name}:{block.line}", parsed(line)) for line in lines)
    text = prose(page)
    for span in re.finditer(rf"`((?:{'|'.join(PROGRAMS)})\s[^`]+)`", text):
        yield Command(f"{page.name}:{text.count(chr(10), 0, span.start()) + 1}", parsed(" ".join(span[1].split())))


def prose(page: Path) -> str:
    """A document with empty lines in place of its code."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for block in blocks(page):
        begin, end = block.line - 1, block.line - 1 + len(block.text.splitlines())
        lines[begin:end] = [""] * (end - begin)
    return "\n".join("" if line.strip().startswith("```") else line for line in lines)


def joined(text: str) -> list[str]:
    """Lines, of which one that ends with a backslash goes on in the next."""
    return [line.strip() for line in re.sub(r"\\\n\s*", "", text).splitlines()]


def parsed(line: str) -> tuple[str, ...]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # a sentence with an apostrophe
        return ()
    return tuple([word.removeprefix(".venv/bin/") for word in words[:1]] + words[1:])


COMMANDS = [command for page in (*PAGES, *EXAMPLES) for command in commands(page)]


def test_commands_are_found_wherever_they_stand(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "Give `hpc-compress\ncancel` or `--follow`:\n\n    make demo # now\n    python a.py \\\n        --b 'c d'\n\n"
        "1. Then\n   on:\n\n       pip install x\n\n```python\nimport os\n```\n\n```sh\n.venv/bin/pytest -x\n```\n"
    )
    found = [command.words for command in commands(page)]
    assert found == [
        ("make", "demo"),
        ("python", "a.py", "--b", "c d"),
        ("pip", "install", "x"),
        ("pytest", "-x"),
        ("hpc-compress", "cancel"),
    ]


def test_every_page_has_what_we_expect_to_check():
    count = {program: sum(command.words[0] == program for command in COMMANDS) for program in PROGRAMS}
    assert all(count.values()), count
    assert len(COMMANDS) > 50


# --- where commands are given ---


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> Path:
    """A folder that has what the documents call path/or/hub-name, reviews.csv, pairs.csv, names.conll, and the examples."""
    folder = tmp_path_factory.mktemp("place")
    model = tiny_checkpoint("bert", layers=3, heads=4, hidden=128, ffn=64, head=False)
    shutil.copytree(model, folder / "path/or/hub-name")
    shutil.copytree(ROOT / "examples", folder, dirs_exist_ok=True)
    words = random.Random(0)
    said = [(words.choice(["good", "great", "bad", "dull"]), words.choice(["film", "plot"])) for _ in range(120)]
    stars = [5 if row[0] in ("good", "great") else 1 for row in said]
    pd.DataFrame({"review": [" ".join(row) for row in said], "stars": stars}).to_csv(folder / "reviews.csv", index=False)
    pairs = pd.DataFrame({"one": [f"{a} {n}" for n, (a, _) in enumerate(said)], "other": [b for _, b in said]})
    pairs.assign(score=[star + words.random() for star in stars]).to_csv(folder / "pairs.csv", index=False)
    lines = [[f"{word}\tN{len(word)}\t{'B-THING' if word in ('film', 'plot') else 'O'}\n" for word in row] for row in said]
    (folder / "names.conll").write_text("\n".join(map("".join, lines)))
    write_texts(folder)
    return folder


def write_texts(folder: Path) -> None:
    """Files of lines, and in data/ every file that a suite names, small."""
    words = random.Random(1)

    def said() -> str:
        return " ".join(words.choice(["good", "great", "bad", "dull", "film", "plot", "very", "was"]) for _ in range(6))

    for name in ("sentences", "english", "russian"):
        (folder / f"{name}.txt").write_text("".join(f"{said()}\n" for _ in range(60)))
    tables: dict[str, dict[str, list[Any]]] = {}
    for suite in (*(ROOT / "conf/suite").glob("*.yaml"), *(ROOT / "examples").rglob("suite/*.yaml")):
        for task in yaml.safe_load(suite.read_text())["tasks"].values():
            for file in filter(None, (task.get("train"), task["report"])):
                columns = tables.setdefault(file, {})
                columns |= {task[key]: [said() for _ in range(60)] for key in ("text", "text2", "fit_text") if key in task}
                columns[task["label"]] = [number % 2 for number in range(60)]
    for file, columns in tables.items():
        path = folder / "data" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pd.DataFrame(columns).to_parquet(path)
        else:
            pd.DataFrame(columns).to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as the current folder of a command; its modules can be imported."""
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    return place


# --- checking without running ---


class Parsed(Exception):  # noqa: N818, no error: the arguments are fine
    """Raised in place of what a command would do."""


class Checks:
    """One method for each program that a document may name. Each raises for a command that would not work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, printing: Callable[..., Path]) -> None:
        self.monkeypatch, self.printing = monkeypatch, printing

    def check(self, words: tuple[str, ...]) -> None:
        program, *rest = words
        assert program in PROGRAMS, f"{program}: tests/test_docs.py does not know how to check this command"
        getattr(self, program.replace("-", "_"))(rest)

    def export(self, words: list[str]) -> None:
        assert [word.partition("=")[0] for word in words] == ["HF_HOME"]

    def hpc_compress(self, words: list[str]) -> None:
        command, *rest = words
        assert f"  {command} " in cli.USAGE, f"{command} is not a command"
        if not rest or rest == ["--help"]:
            return  # a command's name in a sentence; test_config asks every command for its help
        if command == "search":
            searches(rest)
        elif command == "doctor":
            chosen = any(word.startswith("launcher=") for word in rest)
            searches(rest if chosen else ["launcher=slurm", *rest], ArrayLauncher)
        elif command == "compare" and any("=" in word and not word.startswith("reference=") for word in rest):
            self.hpc_compress(["compare", "RUN"])
            values, others = cli._own_words(rest, ("strategy", "seeds", "reference", "name"))
            assert values.get("reference", values["strategy"].split(",")[0]) in values["strategy"].split(",")
            assert values.get("seeds", "3").isdigit()
            for strategy in values["strategy"].split(","):
                searches([*others, f"strategy={strategy}", "report_front=true", f"name={values['name']}"])
        elif command == "profile":
            searches([word for word in rest if not word.startswith("--out=")])
        elif command == "prefetch":
            searches([word for word in rest if not word.startswith("--to=")])
        else:
            self._parses(command, rest)

    def _parses(self, command: str, words: list[str]) -> None:
        parse = argparse.ArgumentParser.parse_args

        def stop(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
            parse(parser, arguments)
            raise Parsed

        self.monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
        mentioned = all(word.startswith("-") for word in words)  # an option in a sentence
        places = {"export": ["RUN", "FOLDER"]}.get(command, ["RUN"]) if mentioned else []
        with pytest.raises(Parsed):
            getattr(cli, f"_{command}")([*places, *words])

    def make(self, words: list[str]) -> None:
        target, *settings = words
        text = (ROOT / "Makefile").read_text()
        assert re.search(rf"^{re.escape(target)}:", text, re.MULTILINE), f"the Makefile has no {target}"
        assert all(f"$({word.partition('=')[0]})" in text for word in settings)

    def sbatch(self, words: list[str]) -> None:
        """The script runs, and what it gives to hpc-compress is a valid search."""
        options = list(itertools.takewhile(lambda word: word.startswith("-"), words))
        script, *rest = words[len(options) :]
        assert {option.partition("=")[0] for option in options} <= {
            "--gres",
            "--cpus-per-task",
            "--mem",
            "--partition",
            "--account",
        }
        given = self.printing("hpc-compress")
        subprocess.run(["bash", ROOT / script, *rest], check=True, capture_output=True)
        command, *arguments = given.read_text().splitlines()
        assert command == "search"
        searches(arguments)

    def pip(self, words: list[str]) -> None:
        assert words[0] == "install"
        project = PYPROJECT["project"]
        pinned = [line for group in (project["dependencies"], *project["optional-dependencies"].values()) for line in group]
        known = {re.split(r"[=\[]", line)[0] for line in pinned} | {project["name"], "."} | NOT_OURS
        for word in words[1:]:
            name, _, extras = word.rstrip("]").partition("[")
            assert word == "-e" or name in known, name
            assert set(filter(None, extras.split(","))) <= project["optional-dependencies"].keys(), extras

    def pytest(self, words: list[str]) -> None:
        words = [word for word in words if word != "-q" and not word.startswith("tests/")]  # test_extending runs those
        options = dict(zip(words[::2], words[1::2], strict=True))
        assert options.keys() <= {"-m", "-n", "-k", "--dist"}
        marks = {line.partition(":")[0] for line in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
        assert set(re.findall(r"\w+", options.get("-m", ""))) <= marks | {"not", "and", "or"}

    def python(self, words: list[str]) -> None:
        if words[:2] == ["-m", "pytest"]:
            self.pytest(words[2:])
        elif words[0] == "-m":
            assert importlib.util.find_spec(words[1]), words[1]
        elif words[0] == "-c":
            compile(words[1], "a document", "exec")
        else:
            found = [path for path in (ROOT / words[0], ROOT / "examples" / words[0]) if path.is_file()]
            assert found, f"there is no {words[0]}"
            source = found[0].read_text()
            assert all(f'"{word}"' in source for word in words[1:] if word.startswith("--"))

    def nvidia_smi(self, words: list[str]) -> None:
        assert not words  # there is nothing to check without a GPU

    def pre_commit(self, words: list[str]) -> None:
        assert words == ["install"]
        hooks = [
            hook for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"] for hook in repo["hooks"]
        ]
        tools = {re.split(r"[=\[]", line)[0] for line in PYPROJECT["project"]["optional-dependencies"]["dev"]}
        assert {Path(hook["entry"].split()[0]).name for hook in hooks} <= tools


def searches(words: list[str], launcher: type = object) -> None:
    """Raises for a search that would be refused before any work: a key, a value, an operator, a column.

    launcher: of which class the launcher must be.
    """
    for chosen in each_of_sweep(words):
        found = cli._settings(cli._compose(chosen))
        assert isinstance(found.launcher, launcher)
        assert callable(config.build(found.objective, "objective"))
        whole = driver.strategy_of(found.strategy, Known(shape=Shape(heads=(12,) * 6, widths=(384, 1536))))
        for step in (*whole.steps, *whole.deploys):
            assert callable(operator(step))
        dataset = found.config.dataset
        if dataset.path is None and not dataset.train.startswith("package:"):
            from hpc_compress import splits

            splits.load(dataset, 0)


def each_of_sweep(words: list[str]) -> list[list[str]]:
    """The words of each run, where some keys have several values."""
    choices: list[list[str]] = []
    for word in words:
        override = OverridesParser.create().parse_override(word) if word in cli._overrides([word]) else None
        if override is not None and override.is_sweep_override():
            assert {"-m", "--multirun"} & set(words), f"{word} has several values; a sweep needs -m"
            choices.append([f"{override.input_line.partition('=')[0]}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([word])
    return [list(chosen) for chosen in itertools.product(*choices)]


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch, printing: Callable[..., Path]) -> Checks:
    return Checks(monkeypatch, printing)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_would_be_accepted(command: Command, checks: Checks, here: Path):
    checks.check(command.words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "hpc-compress serach seed=1",
        "hpc-compress search seeed=1",
        "hpc-compress search dataset=file dataset.train=reviews.csv dataset.text=revue dataset.label=stars",
        "hpc-compress search strategy=genetic strategy.mutations.prune.units=[layer]",
        "hpc-compress search strategy.mutations.prune.share=0.3",
        "hpc-compress search objective.a=1,2",
        "hpc-compress export results/reviews model/ --candidat 3f2a --best",
        "hpc-compress doctor launcher=local",
        "hpc-compress compare strategy=genetic,gentic name=which",
        "hpc-compress compare strategy=genetic reference=published name=which",
        "hpc-compress compare results/which --references genetic",
        "sbatch slurm/driver.sbatch cluster=nowhere",
        "sbatch slurm/no.sbatch",
        "make demmo",
        "make bench FOLDER=x",
        "pip install -e '.[demos]'",
        "pip install numpie",
        "python -m pytest -m slurmy",
        "python benchmarks/kills.py --murders 100",
        "python benchmarks/nothing.py",
        "python -c 'import ('",
        "squeue --me",
    ],
)
def test_a_wrong_command_is_noticed(line: str, checks: Checks, here: Path):
    with pytest.raises((AssertionError, config.ConfigError, SyntaxError, SystemExit, subprocess.CalledProcessError)):
        checks.check(parsed(line))


SETTINGS = [block for page in PAGES for block in blocks(page) if block.language == "yaml"]


@pytest.mark.parametrize("block", SETTINGS, ids=lambda block: f"{block.page.name}:{block.line}")
def test_settings_in_yaml_are_known(block: Block, compose: Callable[..., dict[str, Any]]):
    found = yaml.safe_load(block.text)
    if "_target_" not in found:
        require_known(found, compose())


def require_known(values: dict[str, Any], known: dict[str, Any]) -> None:
    assert values.keys() <= known.keys()
    for key, value in values.items():
        if isinstance(value, dict):
            require_known(value, known[key])


def test_code_is_in_a_language_that_is_checked():
    languages = {block.language for page in PAGES for block in blocks(page)}
    assert languages <= {"", "sh", "bash", "python", "yaml", "text", "diff"}


# --- the pages themselves ---


def test_the_readme_is_short_and_begins_with_a_command():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert blocks(ROOT / "README.md")[0].line < 25


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(there), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """Of the headings, as code hosts make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_in_the_index():
    index = (ROOT / "README.md").read_text()
    assert [path.name for path in (ROOT / "docs").glob("*.md") if f"docs/{path.name}" not in index] == []


def test_the_wheel_has_every_folder_of_the_configuration_and_the_marker_of_types():
    wheel = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    groups = {f"conf/{path.name}" for path in (ROOT / "conf").iterdir() if path.name != "local"}
    assert wheel["force-include"] == {name: f"hpc_compress/{name}" for name in groups}
    assert (ROOT / "hpc_compress/py.typed").is_file()


# --- the tour, on a tiny model ---

FILE = ["dataset=file", "dataset.train=reviews.csv", "dataset.text=review", "dataset.label=stars"]
STAND_IN = {"dataset=sst2": FILE}  # of what only a hub has


def run_search(folder: Path, words: tuple[str, ...], *more: str) -> pd.DataFrame:
    """Run a search of the documents at tiny size; returns its candidates."""
    small = [word for word in tiny(folder, folder) if not word.startswith(("model.path", "dataset", "name=", "objective"))]
    typed = [part for word in words[2:] for part in STAND_IN.get(word, [word])]
    command = [sys.executable, "-m", "hpc_compress.cli", "search", *typed, *small, "generations=1", *more]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name = next(word.partition("=")[2] for word in words if word.startswith("name="))
    return hpc_compress.load_runs(folder / "results" / name)


def named(page: str, *beginning: str) -> tuple[str, ...]:
    """The first command of a document that begins so."""
    found = (command.words for command in COMMANDS if command.where.partition(":")[0] == page)
    return next(words for words in found if words[: len(beginning)] == beginning)


@pytest.fixture(scope="module")
def tour(place: Path) -> pd.DataFrame:
    """The candidates of README's search, whose run folder stands for all runs of the documents, and whose export is there."""
    table = run_search(place, named("README.md", "hpc-compress", "search", "name=reviews"))
    for name in ("big", "demo_gpu"):
        shutil.copytree(place / "results/reviews", place / "results" / name)
    for name in ("which/genetic-0", "seeds/seed=0", "seeds/seed=1"):
        shutil.copytree(place / "results/reviews", place / "results" / name)
    encoder = named("embeddings.md", "hpc-compress", "search", "name=my_encoder")
    without_pairs = ["strategy.fine_tune=null", "strategy.crossover_probability=1"]
    run_search(place, encoder, *without_pairs, "strategy.mutations.prune_heads.criterion=gauss_newton")
    for name in ("model", "another_model", "exported"):
        shutil.copytree(place / "results/reviews/best", place / name)
    return table


def reads_runs(words: tuple[str, ...]) -> bool:
    if words[:2] == ("python", "read_results.py"):
        return True
    known = words[0] == "hpc-compress" and words[1] in ("status", "report", "compare", "export", "benchmark", "cancel")
    return known and any(word.startswith("results/") for word in words)


READING = [command for command in COMMANDS if reads_runs(command.words)]


@pytest.mark.slow
@pytest.mark.xdist_group("docs")
@pytest.mark.parametrize("command", READING, ids=str)
def test_a_command_that_reads_runs_does_so(
    command: Command, tour: pd.DataFrame, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = [word.replace("3f2a", tour["candidate"].iloc[-1]) for word in command.words]
    if words[0] == "python":
        subprocess.run([sys.executable, *words[1:]], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert (here / words[-1] / "my_plot.png").stat().st_size > 5_000
        return
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setenv("PATH", str(here))  # no Slurm
    cli.main()
    assert capsys.readouterr().out.strip()


SNIPPETS = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.xdist_group("docs")
@pytest.mark.parametrize("page", SNIPPETS, ids=lambda page: page.name)
def test_snippets_run_one_after_another(page: Path, tour: pd.DataFrame, here: Path):
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.language == "python":
            exec(compile(block.text, f"{page.name}:{block.line}", "exec"), names)
    assert getattr(getattr(names.get("model"), "config", None), "num_labels", 2) == 2
    assert "candidates" not in names or len(names["candidates"]) >= len(tour)


INLINE = [command for command in COMMANDS if command.words[:2] == ("python", "-c")]


@pytest.mark.slow
@pytest.mark.xdist_group("docs")
@pytest.mark.parametrize("command", INLINE, ids=str)
def test_python_in_one_line_runs(command: Command, tour: pd.DataFrame, here: Path):
    code = command.words[2].replace("'cuda'", "'cpu'")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip()


def only(mutation: str) -> list[str]:
    others = {"prune", "prune_time", "drop_layers", "prune_heads"} - {mutation}
    return [f"strategy.mutations.{name}.weight=0" for name in sorted(others)] + ["strategy.mutation_probability=1"]


@pytest.mark.slow
@pytest.mark.xdist_group("docs")
def test_the_example_of_an_operator_takes_part(place: Path):
    more = [
        "strategy.quantizations={int8: {weight: 0}, nf4: {weight: 0}, mine: {weight: 0.5}}",
        "strategy.vocabularies.trim.weight=0",
    ]
    table = run_search(place, named("own_operator.py", "hpc-compress", "search"), *only("mine"), *more)
    born = table[table["generation"] > 0]
    assert (born["status"] == "measured").all()
    assert born["genome"].str.contains("PruneNeurons_0.3").all()
    assert set(born["deploy"]) == {"fp32", "own_operator.HalfEmbeddings"}


@pytest.mark.slow
@pytest.mark.xdist_group("docs")
def test_the_example_of_a_criterion_takes_part(place: Path):
    more = ["strategy.mutations.prune.weight=1", "strategy.mutations.prune.ffn_multiple=8"]
    table = run_search(place, named("own_criterion.py", "hpc-compress", "search"), *only("prune"), *more)
    born = table[table["generation"] > 0]
    assert (born["status"] == "measured").all()
    assert (born["encoder_parameters"] < table["encoder_parameters"].iloc[0]).all()


@pytest.mark.slow
@pytest.mark.xdist_group("docs")
def test_the_example_of_an_objective_chooses_the_smallest_that_is_good_enough(place: Path):
    table = run_search(place, named("own_objective.py", "hpc-compress", "search"))
    good = table[table["quality"] >= table["quality"].iloc[0] - 0.02]
    best = table[table["best"]].iloc[0]
    assert best["model_bytes"] == good["model_bytes"].min()
