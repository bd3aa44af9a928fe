"""The command line. Hydra stops here: what goes further is plain data and validated dataclasses."""

import argparse
import difflib
import itertools
import logging
import sys
from pathlib import Path
from typing import Any

from hpc_compress.config import ConfigError

USAGE = """hpc-compress COMMAND ...

Find the best compressed BERT-like model for the device that it will run on.

  search [KEY=VALUE ...]    run a search, or go on with it                                  hpc-compress search --help
  status RUN                where a run stands
  report RUN [RUN ...]      tables and a picture of what was found                          hpc-compress report --help
  export RUN FOLDER         a model with tokenizer and card, ready to be loaded anywhere    hpc-compress export --help
"""

log = logging.getLogger("hpc_compress")


def main() -> None:
    """Entry point; exits with 2 for a mistake of the user, 1 for a run that can't go on."""
    sys.path.insert(0, str(Path.cwd()))  # operators of a user's own may lie in the folder where the command is given
    command, *rest = sys.argv[1:] or ["--help"]
    commands = {"search": _search, "status": _status, "report": _report, "export": _export}
    if command in ("-h", "--help"):
        print(USAGE)
        return
    if command not in commands:
        print(f"hpc-compress: {command!r} is not a command; choose one of {', '.join(commands)}", file=sys.stderr)
        sys.exit(2)
    try:
        commands[command](rest)
    except ConfigError as error:
        print(f"hpc-compress {command}: {error}", file=sys.stderr)
        sys.exit(2)


def conf_dir() -> Path:
    """The configuration: inside the package when installed from a wheel, at the top of the repository otherwise."""
    here = Path(__file__).absolute().parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


# --- search ---


def _search(arguments: list[str]) -> None:
    import hydra

    _refuse_unknown_keys(arguments)
    sys.argv = ["hpc-compress search", *arguments]
    hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(_run)()


def _refuse_unknown_keys(arguments: list[str]) -> None:
    """Name the allowed keys where Hydra would only say that one is unknown. Groups and +additions are Hydra's to judge."""
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf

    own_dirs = [value for flag, value in itertools.pairwise(arguments) if flag in ("--config-dir", "-cd")]
    own_dirs += [argument.partition("=")[2] for argument in arguments if argument.startswith("--config-dir=")]
    words = [word for word in arguments if "=" in word and not word.startswith("-")]
    try:
        overrides = [item for item in OverridesParser.create().parse_overrides(words) if item.type is OverrideType.CHANGE]
        keys = [item.key_or_group for item in overrides]
        paths = [conf_dir(), *map(Path, own_dirs)]
        groups = [item for item in overrides if any((path / item.key_or_group).is_dir() for path in paths)]
        search_path = [f"hydra.searchpath=[{','.join(f'file://{Path(path).absolute()}' for path in own_dirs)}]"]
        chosen = [str(item.input_line) for item in groups if not item.is_sweep_override()]
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = compose("config", [*chosen, *(search_path if own_dirs else [])], return_hydra_config=True)
    except HydraException:
        return  # Hydra is about to say it itself
    for key in keys:
        parent, _, leaf = key.rpartition(".")
        node = OmegaConf.select(config, parent, throw_on_missing=False) if parent else config
        if key in [item.key_or_group for item in groups] or key.startswith("hydra.") or not isinstance(node, DictConfig):
            continue
        if leaf not in node.keys():  # noqa: SIM118, `in` is false for a value that is ???
            allowed = sorted(str(name) for name in node if name != "hydra")
            close = difflib.get_close_matches(leaf, allowed, n=1)
            hint = f"; did you mean {parent + '.' if parent else ''}{close[0]}?" if close else ""
            raise ConfigError(
                f"{key} is not a known key; allowed {f'in {parent}' if parent else 'here'}: {', '.join(allowed)}{hint}"
            )


def _run(cfg: Any) -> None:
    """One Hydra job: one search."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from hpc_compress import analysis, config, driver, export

    try:
        values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
        parts = {name: values.pop(name) for name in ("strategy", "objective", "launcher")}
        retries = values.pop("retries")
        if not isinstance(retries, int) or retries < 0:
            raise ConfigError(f"retries={retries!r}; allowed is a whole number of 0 or more")
        unknown = sorted(values.keys() - config.RunConfig.model_fields.keys())
        if unknown:
            known = sorted([*config.RunConfig.model_fields, *parts, "retries"])
            raise ConfigError(f"{unknown[0]} is not a known key; allowed here: {', '.join(known)}")
        settings = config.validate(config.RunConfig, values)
        launcher = config.build(parts["launcher"], "launcher")
        root = Path(HydraConfig.get().runtime.output_dir)
        with Console() as progress:
            driver.search(settings, parts["strategy"], parts["objective"], config.build, launcher, root, progress, retries)
        _answer(root, analysis, export)
    except (ConfigError, OmegaConfBaseException) as error:
        print(f"hpc-compress search: {error}", file=sys.stderr)
        sys.exit(2)
    except driver.SearchError as error:
        log.error(str(error))
        sys.exit(1)


def _answer(root: Path, analysis: Any, export: Any) -> None:
    """What was found, where it lies, what to do next."""
    table = analysis.write_report([root], root)
    best = _short(export.export(root, root / "best"))
    text = '"a text", "a second text"' if analysis.open_run(root).plan.dataset.pair else '"a text"'
    print(f"\n{analysis.as_text(table)}")
    print(f"\nbest model: {best}\n\n{export.LOADING.format(path=best, text=text)}")
    print(f"\nall candidates: {_short(root)}/candidates.csv, as a picture: {_short(root)}/candidates.png")
    print("next: hpc-compress search generations=... goes on with this run; README.md shows how to use your own model and data")


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


class Console:
    """Progress for people: a line for each event, and on a terminal a bar for the step at work."""

    def __enter__(self) -> "Console":
        from rich.console import Console as Terminal
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        terminal = Terminal(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description:>12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=terminal,
            transient=True,
            disable=not terminal.is_terminal,
        )
        self._bar.start()
        self._row = self._bar.add_task("", total=None, visible=False)
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self._bar.update(self._row, visible=False)
        log.info(text)

    def working(self, what: str, done: int, total: int) -> None:
        self._bar.update(self._row, description=what, completed=done, total=total, visible=done < total)


# --- reading runs ---


def _status(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("hpc-compress status", description="Where a run stands, from its files alone.")
    parser.add_argument("run", type=Path, help="run folder, such as results/demo")
    from hpc_compress import analysis

    print(analysis.status(parser.parse_args(arguments).run))


def _report(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "hpc-compress report",
        description="The base model and the fittest candidates, measured on the report split; writes report.md, report.csv, "
        "candidates.csv (one row a candidate) and candidates.png.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or folders with runs below them")
    parser.add_argument("--out", type=Path, help="folder for the files; default: the run's own, or results/ for several runs")
    options = parser.parse_args(arguments)
    from hpc_compress import analysis

    roots = analysis.find_runs(options.runs)
    out = options.out or (roots[0] if len(roots) == 1 else Path("results"))
    print(analysis.as_text(analysis.write_report(roots, out)))
    print(f"\nwritten to {_short(out)}: report.md, report.csv, candidates.csv, candidates.png")


def _export(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "hpc-compress export", description="A model with tokenizer, loading code and card, ready to be loaded anywhere."
    )
    parser.add_argument("run", type=Path, help="run folder, such as results/demo")
    parser.add_argument("folder", type=Path, help="where to; a new folder, or an earlier export")
    parser.add_argument("--candidate", help="id, or its first digits, from candidates.csv; default: the best of the run")
    options = parser.parse_args(arguments)
    from hpc_compress import export

    print(export.export(options.run, options.folder, options.candidate))


if __name__ == "__main__":
    main()
