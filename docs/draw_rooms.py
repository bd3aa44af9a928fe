"""Draws the rooms of the package from its code: docs/rooms.png, and the table of rooms in docs/architecture.md.

    python docs/draw_rooms.py

The lines come from the import contract in pyproject.toml, the words from the docstrings of the modules, and the arrows from
their imports.
"""

import ast
import hashlib
import re
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path

import grimp
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image

ROOT = Path(__file__).parent.parent
PICTURE, PAGE = ROOT / "docs/rooms.png", ROOT / "docs/architecture.md"
BEGIN, END = "<!-- rooms -->", "<!-- /rooms -->"
WIDTH, HEIGHT, STEP = 3.0, 0.7, 3.35  # inches: of a box, and from one box to the next
GAP = 0.38  # between two lines


@dataclass(frozen=True)
class Room:
    name: str
    line: int  # 0 is the highest
    says: str  # the first sentence of its docstring
    imports: tuple[str, ...]  # rooms, directly; without those that another imported room imports anyway


def rooms() -> list[Room]:
    """All rooms, the highest line first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    lines = [line.split(" | ") for contract in contracts for line in contract.get("layers", ())]
    direct = _imports()
    return [
        Room(name, number, _says(name), tuple(sorted(_reduced(direct, name))))
        for number, names in enumerate(lines)
        for name in names
    ]


def _imports() -> dict[str, set[str]]:
    """The rooms that each room imports from."""
    graph, direct = grimp.build_graph("hpc_compress"), {}
    for module in graph.modules:
        for other in graph.find_modules_directly_imported_by(module):
            if module.count(".") and other.count("."):
                one, another = (name.split(".")[1] for name in (module, other))
                direct.setdefault(one, set()).update({another} - {one})
    return direct


def _reduced(direct: dict[str, set[str]], room: str) -> set[str]:
    """Without those that can be reached through another one."""
    reach = {other: _reachable(direct, other) for other in direct.get(room, ())}
    return {other for other in reach if not any(other in reach[third] for third in reach if third != other)}


def _reachable(direct: dict[str, set[str]], room: str) -> set[str]:
    found: set[str] = set()
    todo = list(direct.get(room, ()))
    while todo:
        if (other := todo.pop()) not in found:
            found.add(other)
            todo += direct.get(other, ())
    return found


def _says(room: str) -> str:
    path = ROOT / "hpc_compress" / room
    text = ast.get_docstring(ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()))
    return re.split(r"(?<=\.)\s", " ".join((text or "").split()))[0].rstrip(".")


def table(found: list[Room]) -> str:
    """The rooms as a Markdown table, one line of the house a row."""
    rows = []
    for number in sorted({room.line for room in found}):
        here = [room for room in found if room.line == number]
        rows.append(f"| {', '.join(f'`{room.name}`' for room in here)} | {'; '.join(room.says for room in here)} |")
    return "\n".join(["| room | what it says of itself |", "| --- | --- |", *rows])


def digest(found: list[Room]) -> str:
    """Stands for all that the picture shows."""
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def drawn() -> str:
    """The digest of the rooms as they were when the picture was drawn."""
    with Image.open(PICTURE) as picture:
        return str(picture.info.get("Description"))


def placed(found: list[Room], width: float) -> dict[str, tuple[float, float]]:
    """The centre of each box: on its line, near the rooms that it imports from or is imported by, so that few arrows cross."""
    lines = max(room.line for room in found) + 1
    near = {room.name: set(room.imports) for room in found}
    for room in found:
        for other in room.imports:
            near[other].add(room.name)
    x = {room.name: width * (0.25 + 0.5 * (number % 2)) for number, room in enumerate(found)}
    for _ in range(30):
        for number in range(lines):
            here = [room.name for room in found if room.line == number]
            wish = {name: sum(x[other] for other in near[name]) / max(1, len(near[name])) for name in here}
            here.sort(key=wish.__getitem__)
            first = sum(wish.values()) / len(here) - (len(here) - 1) / 2 * STEP
            first = min(max(first, STEP / 2), width - STEP * (len(here) - 0.5))
            x |= {name: first + index * STEP for index, name in enumerate(here)}
    return {room.name: (x[room.name], (lines - room.line - 0.5) * (HEIGHT + GAP)) for room in found}


def draw(found: list[Room]) -> None:
    lines = max(room.line for room in found) + 1
    width, height = 3 * STEP, lines * (HEIGHT + GAP)
    figure = Figure(figsize=(width, height), layout="none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    places = placed(found, width)
    for room in found:
        for other in room.imports:
            (x, y), (u, v) = places[room.name], places[other]
            # An arrow over several lines goes around the boxes between.
            bend = 0.0 if y - v < 1.5 * (HEIGHT + GAP) else (0.28 if x + u < width else -0.28)
            arrow = {"arrowstyle": "-|>", "color": "#8aa4bd", "lw": 0.8, "connectionstyle": f"arc3,rad={bend}"}
            axes.annotate("", (u, v + HEIGHT / 2), (x, y - HEIGHT / 2), arrowprops=arrow, zorder=1)
    for room in found:
        x, y = places[room.name]
        corner = x - WIDTH / 2, y - HEIGHT / 2
        shape = "round,pad=0,rounding_size=0.08"
        axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle=shape, fc="#eef4fb", ec="#2b5c8a", zorder=2))
        axes.text(x, y + 0.17, room.name, ha="center", va="center", fontsize=11, weight="bold", color="#16324f", zorder=3)
        says = textwrap.fill(textwrap.shorten(room.says, 96, placeholder=" ..."), 50)
        axes.text(x, y - 0.12, says, ha="center", va="center", fontsize=7, color="0.15", zorder=3)
    figure.savefig(PICTURE, dpi=110, metadata={"Description": digest(found)})


def main() -> None:
    found = rooms()
    draw(found)
    page = PAGE.read_text()
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{after}")
    print(f"{PICTURE} and the table in {PAGE} show {len(found)} rooms")


if __name__ == "__main__":
    main()
