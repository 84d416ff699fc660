"""The drawing of docs/architecture.md, made from the imports: ``python docs/draw_house.py``.

A box is a room (a package or a file of ``dopsd``, or a neighbour of it), an arrow says "uses". Arrows that follow from
others are left out. All of them point down: a room that imported from above could not be drawn, and the command fails.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DRAWING = ROOT / "docs" / "images" / "house.svg"
GROUND = ("params", "config", "files", "versions")
"""Used by all; drawn without arrows."""
EDGES = ("cli", "doctor")
"""Front doors that use whatever they show."""
BOX, GAP, ROW, MARGIN = (116, 34), 18, 78, 20
COLOURS = {"flows": "#dbe7f5", "emoji_turbo": "#f3ead7", "cli": "#dbe7f5", "doctor": "#dbe7f5"}

Uses = dict[str, set[str]]


def imports(path: Path, root: Path = ROOT) -> Iterator[tuple[str, int]]:
    """Full names of the modules that a file imports anywhere in it, relative ones resolved, with their lines."""
    package = path.relative_to(root).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            yield module, node.lineno
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def room_of(module: str) -> str | None:
    """The room of a module; ``None`` for what is not ours."""
    parts = module.split(".")
    if parts[0] in ("emoji_turbo", "flows"):
        return parts[0]
    return parts[1] if parts[0] == "dopsd" and len(parts) > 1 else None


def uses() -> Uses:
    """Room to the rooms that it imports from."""
    rooms = {name: set() for name in _rooms()}  # type: Uses
    for top in ("dopsd", "emoji_turbo", "flows"):
        for path in sorted((ROOT / top).rglob("*.py")):
            room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
            if room is not None and room in rooms:
                rooms[room] |= {other for module, _ in imports(path) if (other := room_of(module)) in rooms} - {room}
    return rooms


def floors(rooms: Uses) -> dict[str, int]:
    """How far below the roof each room is, along the longest way. Raises ``ValueError`` for a circle."""
    found: dict[str, int] = {}

    def floor(room: str, below: tuple[str, ...]) -> int:
        if room in below:
            raise ValueError(f"a circle: {' -> '.join([*reversed(below[below.index(room) :]), room])}")
        if room not in found:
            users = [other for other in rooms if room in rooms[other] and other not in EDGES]
            found[room] = 0 if room in EDGES else 1 + max((floor(o, (*below, room)) for o in users), default=-1)
        return found[room]

    for room in rooms:
        floor(room, ())
    return found


def reduced(rooms: Uses) -> Uses:
    """The same without the arrows that follow from others."""

    def below(room: str) -> set[str]:
        return rooms[room] | {far for near in rooms[room] for far in below(near)}

    return {room: {o for o in others if not any(o in below(n) for n in others - {o})} for room, others in rooms.items()}


def draw() -> str:
    """The drawing as SVG."""
    rooms = {room: others - set(GROUND) for room, others in uses().items() if room not in GROUND}
    placed = _places(floors(rooms))
    width = max(x for x, _ in placed.values()) + BOX[0] + MARGIN
    bottom = max(y for _, y in placed.values()) + ROW
    lines = [
        _arrow(placed[room], placed[other]) for room, others in sorted(reduced(rooms).items())
        if room not in EDGES for other in sorted(others)
    ]  # fmt: skip
    boxes = [_box(x, y, BOX[0], room) for room, (x, y) in sorted(placed.items())]
    boxes.append(_box(MARGIN, bottom, width - 2 * MARGIN, ", ".join(GROUND)))
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + BOX[1] + MARGIN}" '
            f'width="{width}" font-family="sans-serif" font-size="14">')  # fmt: skip
    marker = ('<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
              'orient="auto"><path d="M0 0 8 4 0 8z" fill="#777"/></marker></defs>')  # fmt: skip
    paper = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, marker, paper, *lines, *boxes, "</svg>", ""])


def _rooms() -> list[str]:
    inside = [path for path in (ROOT / "dopsd").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    return [*sorted(path.stem for path in inside if path.stem != "__init__"), "emoji_turbo", "flows"]


def _places(floor: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Left upper corners, each row in the middle."""
    rows = [sorted(room for room in floor if floor[room] == r) for r in sorted(set(floor.values()))]
    widest = max(map(len, rows)) * (BOX[0] + GAP) - GAP
    places = {}
    for number, row in enumerate(rows):
        left = MARGIN + (widest - len(row) * (BOX[0] + GAP) + GAP) // 2
        for column, room in enumerate(row):
            places[room] = (left + column * (BOX[0] + GAP), MARGIN + number * ROW)
    return places


def _arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    x1, y1, x2, y2 = start[0] + BOX[0] // 2, start[1] + BOX[1], end[0] + BOX[0] // 2, end[1]
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2 - 1}" stroke="#777" marker-end="url(#tip)"/>'


def _box(x: int, y: int, width: int, room: str) -> str:
    fill = COLOURS.get(room, "#f4f4f4")
    return (f'<rect x="{x}" y="{y}" width="{width}" height="{BOX[1]}" rx="5" fill="{fill}" stroke="#555"/>'
            f'<text x="{x + width // 2}" y="{y + 22}" text-anchor="middle">{room}</text>')  # fmt: skip


if __name__ == "__main__":
    DRAWING.write_text(draw(), encoding="utf-8")
    sys.stdout.write(f"{DRAWING.relative_to(ROOT)}: written\n")
