"""Pictures to look at: labelled grids for DVC and the tracker, and plain strips from which the report is laid out.

Always the first prompts of the seeded order, the same noise for every model: nothing is picked by hand.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from dopsd.config import Settings
from dopsd.data.pictures import Picture

from .draws import Key
from .naming import color_of, name_of
from .prompts import KEPT, KNOWN, Prompt

SHOWN = 10
"""How many prompts the grids show."""
MAX_TILE = 512
"""Larger pictures are reduced to this side."""
_GRID_TILE = 192
_LOSSLESS = 128
"""Up to this side a tile is a PNG: pixels of such pictures are looked at one by one."""

Tiles = Mapping[Key, Mapping[int, Path]]
"""Files of pictures, by the prompt's place in its split."""


class Gallery:
    """Keeps a small copy of the pictures that somebody may want to see, in ``samples/`` below ``folder``; then draws
    ``grids/``. With few steps all: the worst are shown. With others and from another noise the first ones, and one of
    the concept for every number of steps."""

    def __init__(
        self, folder: Path, splits: Mapping[str, Sequence[Prompt]], training: Sequence[Picture],
        captions: Sequence[str], settings: Settings, models: Sequence[str],
    ) -> None:  # fmt: skip
        self._samples, self._grids, self._models = folder / "samples", folder / "grids", list(models)
        self._few, self._steps = settings.evaluation.few, sorted(settings.evaluation.steps)
        self._splits, self._captions, self._settings = splits, list(captions), settings
        self._tiles: dict[Key, dict[int, Path]] = {}
        for split, prompts in splits.items():
            for row, prompt in enumerate(prompts[:SHOWN]):
                if prompt.truth is not None:
                    self._keep(Key(split, "real", 0), row, prompt.true_picture())
                if prompt.references:
                    self._keep(Key(split, "reference", 0), row, _together([r.load() for r in prompt.references]))
        for row, picture in enumerate(training):
            self._keep(Key("training", "real", 0), row, picture.load())

    def add(self, key: Key, rows: Sequence[int], images: Sequence[Image.Image]) -> None:
        """Keep what is to be seen of some pictures of a cell."""
        whole = key.split != KNOWN and key.steps == self._few and (key.noise == 0 or key.split == KEPT)
        shown = len(self._splits[key.split]) if whole else SHOWN if key.steps == self._few or key.split == KEPT else 1
        for row, image in zip(rows, images, strict=True):
            if row < shown:
                self._keep(key, row, image)

    def _keep(self, key: Key, row: int, image: Image.Image) -> None:
        tile = reduced(image.convert("RGB"), MAX_TILE)
        small = max(tile.size) <= _LOSSLESS
        name = f"{row:03d}.{'png' if small else 'webp'}"
        path = self._samples / f"{key.split}-{key.model}-{key.steps}{f'-{key.noise}' if key.noise else ''}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        tile.save(path, **({"optimize": True} if small else {"quality": 90, "method": 2}))
        self._tiles.setdefault(key, {})[row] = path

    def write(self) -> None:
        """Write the index of the samples, and the labelled grids."""
        index = {
            "prompts": {split: [p.text for p in prompts] for split, prompts in self._splits.items()},
            "captions": self._captions,
            "settings": self._settings.model_dump(mode="json"),
            "tiles": [
                {
                    **key._asdict(),
                    "files": {str(row): str(path.relative_to(self._samples)) for row, path in files.items()},
                }
                for key, files in self._tiles.items()
            ],
        }
        self._samples.mkdir(parents=True, exist_ok=True)
        (self._samples / "index.json").write_text(json.dumps(index, ensure_ascii=False) + "\n", encoding="utf-8")
        self._grids.mkdir(parents=True, exist_ok=True)
        for name, split in (("few_step", "concept"), (KEPT, KEPT), (KNOWN, KNOWN)):
            keys = [
                Key(split, "reference", 0),
                Key(split, "real", 0),
                *(Key(split, m, self._few) for m in self._models),
            ]
            rows = [(key.model, [opened_tile(self._tiles[key][row]) for row in range(SHOWN) if row in self._tiles[key]])
                    for key in keys if key in self._tiles]  # fmt: skip
            if rows:
                captions = [prompt.text for prompt in self._splits[split][:SHOWN]]
                grid = draw_grid(captions, rows, f"{self._few} steps, same noise for every model")
                grid.save(self._grids / f"{name}.png", optimize=True)
        self._steps_grid().save(self._grids / "steps.png", optimize=True)

    def _steps_grid(self) -> Image.Image:
        rows = []
        for model in self._models:
            keys = [Key("concept", model, steps) for steps in self._steps]
            if all(key in self._tiles for key in keys):
                rows.append((model, [opened_tile(self._tiles[key][0]) for key in keys]))
        labels = [f"{steps} step{'s' if steps > 1 else ''}" for steps in self._steps]
        return draw_grid(labels, rows, self._splits["concept"][0].text)


def read_tiles(samples: Path, index: Mapping[str, Any]) -> dict[Key, dict[int, Path]]:
    """The files of ``samples/``, by its ``index.json``. Raises ``ValueError`` for one that names anything else."""
    tiles: dict[Key, dict[int, Path]] = {}
    for entry in index["tiles"]:
        key = Key(str(entry["split"]), str(entry["model"]), int(entry["steps"]), int(entry["noise"]))
        files = {int(row): samples / name for row, name in entry["files"].items()}
        if not all(path.resolve().is_relative_to(samples.resolve()) for path in files.values()):
            raise ValueError(f"names a file outside of {samples}")
        if not all(path.suffix in (".png", ".webp") for path in files.values()):
            raise ValueError("names a file that is no picture of ours")
        tiles[key] = files
    return tiles


def reduced(image: Image.Image, side: int) -> Image.Image:
    """With no side above ``side``, of the same shape."""
    if max(image.size) <= side:
        return image
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def opened_tile(path: Path) -> Image.Image:
    """A kept picture at a grid's size."""
    with Image.open(path) as image:
        return reduced(image.convert("RGB"), _GRID_TILE)


def _together(pictures: Sequence[Image.Image]) -> Image.Image:
    """Several references of one request as one tile, side by side."""
    height = min(picture.height for picture in pictures)
    scaled = [
        p.resize((max(1, round(p.width * height / p.height)), height), Image.Resampling.LANCZOS) for p in pictures
    ]
    strip = Image.new("RGB", (sum(p.width for p in scaled), height), "white")
    left = 0
    for picture in scaled:
        strip.paste(picture, (left, 0))
        left += picture.width
    return strip


def draw_grid(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Image.Image]]], title: str) -> Image.Image:
    """A labelled grid: ``rows`` are (model, pictures), ``columns`` the texts above. Sides below 128 px are doubled."""
    side = max(max(image.size) for _, images in rows for image in images)
    cell = side if side >= 128 else side * max(1, round(128 / side))
    gap, left, font = 6, 150, ImageFont.load_default(15)
    small, bold = ImageFont.load_default(13), ImageFont.load_default(17)
    wrapped = [textwrap.wrap(text, width=max(8, cell // 8), max_lines=4, placeholder=" …") for text in columns]
    top = 44 + 16 * max((len(lines) for lines in wrapped), default=1) + 8
    width = left + len(columns) * (cell + gap) + gap
    canvas = Image.new("RGB", (width, top + len(rows) * (cell + gap) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((12, 12), title, font=bold, fill="#111111")
    for i, lines in enumerate(wrapped):
        x = left + i * (cell + gap)
        for j, line in enumerate(lines):
            draw.text((x, top - 8 - 16 * (len(lines) - j)), line, font=small, fill="#444444")
    for r, (model, images) in enumerate(rows):
        y = top + r * (cell + gap)
        draw.rectangle((12, y + cell // 2 - 18, 16, y + cell // 2 + 18), fill=color_of(model))
        lines = textwrap.wrap(name_of(model), width=14)
        for j, line in enumerate(lines):
            draw.text((24, y + cell // 2 + 18 * j - 9 * len(lines)), line, font=font, fill="#111111")
        for i, image in enumerate(images):
            factor = cell / side
            size = (round(image.width * factor), round(image.height * factor))
            large = image.resize(size, Image.Resampling.BICUBIC) if size != image.size else image
            canvas.paste(large, (left + i * (cell + gap), y))
    return canvas
