"""Pictures to look at: labelled grids for DVC and the tracker, and plain strips from which the report is laid out.

Always the first prompts of the seeded order, the same noise for every model: nothing is picked by hand.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from dopsd.config import Settings

from .naming import color_of, name_of
from .prompts import Prompt

SHOWN = 10
"""How many prompts the grids show."""
MAX_TILE = 192
"""Larger pictures are reduced to this side in grids and report."""


class Gallery:
    """Collects the first pictures of every cell, then writes ``samples/`` and ``grids/`` into ``folder``."""

    def __init__(
        self, folder: Path, concept: Sequence[Prompt], kept: Sequence[Prompt], training: Sequence[Image.Image],
        captions: Sequence[str], settings: Settings, models: Sequence[str],
    ) -> None:  # fmt: skip
        self._folder, self._models = folder, list(models)
        self._few, self._steps = settings.evaluation.few, sorted(settings.evaluation.steps)
        self._prompts = {"concept": list(concept[:SHOWN]), "kept": list(kept[:SHOWN])}
        self._training, self._captions = [_tile(image) for image in training], list(captions)
        self._tiles: dict[tuple[str, str, int], list[Image.Image]] = {}
        for split, prompts in self._prompts.items():
            truths = [_tile(p.truth) for p in prompts if p.truth is not None]
            if truths:
                self._tiles[split, "real", 0] = truths
            shown = [_together([r.load() for r in p.references]) for p in prompts if p.references]
            if shown and len(shown) == len(prompts):
                self._tiles[split, "reference", 0] = shown
        self._settings = settings

    def add(self, split: str, model: str, steps: int, images: Sequence[Image.Image]) -> None:
        """Keep the first pictures of a cell."""
        self._tiles[split, model, steps] = [_tile(image) for image in images[:SHOWN]]

    def write(self) -> None:
        """Write strips, their index and the labelled grids."""
        self._write_samples()
        grids = {}
        for name, split in (("few_step", "concept"), ("kept", "kept")):
            rows = [
                (model, self._tiles[split, model, steps])
                for model, steps in [("reference", 0), ("real", 0), *((model, self._few) for model in self._models)]
                if (split, model, steps) in self._tiles
            ]
            if rows:
                captions = [p.text for p in self._prompts[split]]
                grids[name] = draw_grid(captions, rows, f"{self._few} steps, same noise for every model")
        grids["steps"] = self._steps_grid()
        (self._folder / "grids").mkdir(parents=True, exist_ok=True)
        for name, grid in grids.items():
            grid.save(self._folder / "grids" / f"{name}.png", optimize=True)

    def _steps_grid(self) -> Image.Image:
        rows = [
            (model, [self._tiles["concept", model, steps][0] for steps in self._steps])
            for model in self._models
            if all(("concept", model, steps) in self._tiles for steps in self._steps)
        ]
        labels = [f"{steps} step{'s' if steps > 1 else ''}" for steps in self._steps]
        return draw_grid(labels, rows, self._prompts["concept"][0].text)

    def _write_samples(self) -> None:
        folder = self._folder / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        index: dict[str, Any] = {
            "prompts": {split: [p.text for p in captions] for split, captions in self._prompts.items()},
            "captions": self._captions,
            "settings": self._settings.model_dump(mode="json"),
            "strips": [],
        }
        strips = {**self._tiles, ("training", "real", 0): self._training}
        for (split, model, steps), tiles in strips.items():
            file = f"{split}-{model}-{steps}.png"
            side = max(max(tile.size) for tile in tiles)
            _strip(tiles, side).save(folder / file, optimize=True)
            entry = {"split": split, "model": model, "steps": steps, "file": file, "side": side}
            index["strips"].append(entry | {"sizes": [tile.size for tile in tiles]})
        (folder / "index.json").write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_strip(folder: Path, entry: dict[str, Any]) -> list[Image.Image]:
    """The tiles of one strip of ``samples/index.json``."""
    side = int(entry["side"])
    with Image.open(folder / entry["file"]) as strip:
        picture = strip.convert("RGB")
    return [picture.crop((i * side, 0, i * side + w, h)) for i, (w, h) in enumerate(entry["sizes"])]


def _strip(tiles: Sequence[Image.Image], side: int) -> Image.Image:
    strip = Image.new("RGB", (side * len(tiles), max(tile.height for tile in tiles)), "white")
    for i, tile in enumerate(tiles):
        strip.paste(tile, (i * side, 0))
    return strip


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
    return _tile(strip)


def _tile(image: Image.Image) -> Image.Image:
    tile = image.convert("RGB")
    if max(tile.size) > MAX_TILE:
        tile.thumbnail((MAX_TILE, MAX_TILE), Image.Resampling.LANCZOS)
    return tile


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
