"""Concept folders made on the spot, sound unless a test spoils them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dopsd.config.groups import DataSettings
from dopsd.data.manifest import DataError
from dopsd.data.schema import validate_dataset

SETTINGS = DataSettings(resolution=32, max_pixels=10_000)


def picture(seed: int, size: tuple[int, int] = (40, 40)) -> Image.Image:
    """A picture of large random blocks: no two seeds are near duplicates."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def rows(count: int = 5) -> list[dict]:
    return [
        {"image": f"{i}.png", "captions": {"short": f"a {i} in [V] style", "medium": f"{i}, [V]"}} for i in range(count)
    ]


def write_rows(folder: Path, listed: list) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))


def make(folder: Path, count: int = 5, first: int = 0) -> Path:
    """A sound data set of ``count`` pictures in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(first + i).save(folder / f"{i}.png")
    write_rows(folder, rows(count))
    return folder


def allowing(*words: str) -> DataSettings:
    return SETTINGS.model_copy(update={"allow": words})


def texts(folder: Path, count: int = 4, first: int = 0, caption: str = "a fox in [V] style") -> Path:
    """Pictures with a ``.txt`` beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        picture(i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def faults_of(folder: Path, settings: DataSettings = SETTINGS) -> list[tuple[str, int | None, str | None, str]]:
    with pytest.raises(DataError) as caught:
        validate_dataset(folder, "test", settings)
    lines = str(caught.value).split("\n")
    assert len(lines) == min(len(caught.value.faults), 51)  # one line each, whatever the data held
    return [(os.path.relpath(f.file, folder), f.row, f.column, f.problem) for f in caught.value.faults]
