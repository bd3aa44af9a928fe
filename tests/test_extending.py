"""The changes that docs/extending.md teaches, each applied to a copy of the project and run there; and who may import whom."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
PARTS = ("hpc_compress", "conf", "tests", "docs", "slurm", "benchmarks", "examples", "results")
slow = pytest.mark.slow


@dataclass(frozen=True)
class Change:
    """One section of the document."""

    title: str
    diff: str
    command: str  # that shows it at work


def changes() -> list[Change]:
    sections = re.split(r"^## ", (ROOT / "docs/extending.md").read_text(encoding="utf-8"), flags=re.M)[1:]
    found = []
    for section in sections:
        title, diff = section.partition("\n")[0], re.search(r"^```diff\n(.*?)^```$", section, re.M | re.S)
        command = re.search(r"^    (python -m pytest .*)$", section, re.M)
        assert bool(diff) == bool(command), f"{title}: a change needs a diff, and a command that runs it"
        if diff and command:
            found.append(Change(title, diff[1], command[1]))
    return found


def copied(folder: Path) -> Path:
    for name in PARTS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "demo"))
    for path in (ROOT / name for name in ("pyproject.toml", "Makefile", "README.md", "LICENSE")):
        shutil.copy2(path, folder)
    return folder


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A command that sees the package in this folder, and no other."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_picture_and_the_table_of_the_rooms_are_drawn_from_the_code(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    draw_rooms = importlib.import_module("draw_rooms")
    rooms = draw_rooms.rooms()
    assert draw_rooms.drawn() == draw_rooms.digest(rooms), "python docs/draw_rooms.py draws it again"
    assert draw_rooms.table(rooms) in (ROOT / "docs/architecture.md").read_text()
    assert {path.stem for path in (ROOT / "hpc_compress").iterdir() if path.stem[0].isalpha()} - {"py"} == {
        room.name for room in rooms
    }


def test_the_five_changes_of_a_newcomer_are_taught():
    assert [change.title for change in changes()] == [
        "An encoder family",
        "A strategy",
        "A problem",
        "A quantization scheme",
        "A launcher",
    ]


@slow
@pytest.mark.parametrize("change", changes(), ids=lambda change: change.title)
def test_a_change_of_the_document_works(change: Change, tmp_path: Path):
    copy = copied(tmp_path / "copy")
    (tmp_path / "change.diff").write_text(change.diff, encoding="utf-8")
    applied = run(copy, "git", "apply", "--whitespace=error", str(tmp_path / "change.diff"))
    assert applied.returncode == 0, applied.stderr
    for command in ("ruff format --check .", "ruff check .", "lint-imports", change.command):
        done = run(copy, *shlex.split(command))
        assert done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}{done.stderr[-2000:]}"


FAULTS = {
    "an import from above": ("types.py", "hpc_compress.cli"),
    "a circle within a room": ("models/zeros.py", "hpc_compress.models.artifact"),  # which imports zeros
}


@slow
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_an_import_that_breaks_the_order_is_found(fault: tuple[str, str], tmp_path: Path):
    copy, (module, imported) = copied(tmp_path / "copy"), fault
    path = copy / "hpc_compress" / module
    path.write_text(f"{path.read_text()}\n\ndef late() -> None:\n    import {imported}  # noqa: F401\n")
    # -o: the environment of this test is used, and none is made in the copy.
    done = run(copy, "make", "check", f"BIN={BIN}", "-o", ".venv/ready")
    assert done.returncode != 0
    assert "BROKEN" in done.stdout, f"{done.stdout[-3000:]}{done.stderr[-1000:]}"
