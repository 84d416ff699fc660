"""Pictures, and captions for them, from which a test makes what another tool would have written."""

from __future__ import annotations

from pathlib import Path

from concept_folders import SETTINGS, picture

from dopsd.data.schema import validate_dataset

CAPTIONS = [f"a {i} in [V] style" for i in range(5)]


def pictures(folder: Path, count: int = 5, first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(first + i, (64, 64)).save(folder / f"{i}.png")
    return folder


def read(folder: Path) -> tuple[list[tuple[str, str]], str]:
    """(picture, caption) of each row; and how the folder was read."""
    table = validate_dataset(folder, "test", SETTINGS)[0]
    pairs = [(row.image.relative_to(folder).as_posix(), text) for row in table.rows for _, text in row.captions]
    return pairs, table.read_as


EXPECTED = [(f"{i}.png", CAPTIONS[i]) for i in range(5)]
