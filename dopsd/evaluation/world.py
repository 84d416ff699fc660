"""The truth for every prompt, where a base's folder brings it along: things drawn in several styles, with captions.

``world/`` in the base's folder holds ``concepts.json`` and one contact sheet of pictures per style (``STYLE.png``).
Real models have none; the evaluation then leaves out what it cannot know. Nothing in it is code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FOLDER, INDEX = "world", "concepts.json"
_MAX_SIDE = 8192


class WorldError(ValueError):
    """A world that cannot be read; one line saying which file and why."""


@dataclass(frozen=True)
class World:
    """Things in several drawing styles.

    ``labels``: one name per thing. ``pictures``: style to ``uint8 [N, 3, side, side]``, new styles among them.
    ``known``: indices of the things that the base can draw. ``captions``: for each style that the base knows by name,
    how it is asked for each thing ``[N]``; what the evaluation calls old styles.
    """

    labels: tuple[str, ...]
    pictures: dict[str, Tensor]
    known: tuple[int, ...]
    captions: dict[str, tuple[str, ...]]

    @property
    def styles(self) -> tuple[str, ...]:
        """The styles that the base knows by name."""
        return tuple(self.captions)

    @classmethod
    def load(cls, folder: Path) -> World:
        """Read ``folder``; raises :class:`WorldError`."""
        meta = read_meta(folder)
        return cls(**shared_fields(folder, meta))


def world_of(base: Path) -> World | None:
    """The world that a base's folder brings along; ``None`` where it brings none."""
    return World.load(base / FOLDER) if (base / FOLDER / INDEX).is_file() else None


def read_meta(folder: Path) -> dict[str, Any]:
    """``concepts.json``."""
    try:
        return json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WorldError(f"{folder / INDEX}: not readable as JSON ({error})") from None


def shared_fields(folder: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    """What every world has, checked."""
    try:
        labels, side, columns = tuple(meta["labels"]), int(meta["size"]), int(meta["columns"])
        captions = {style: tuple(texts) for style, texts in meta["captions"].items()}
        styles, known = [str(style) for style in meta["styles"]], tuple(map(int, meta["known"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WorldError(f"{folder / INDEX}: lacks or misstates {error}") from None
    if any(len(texts) != len(labels) for texts in captions.values()) or not set(captions) <= set(styles):
        raise WorldError(f"{folder / INDEX}: captions must name styles of the world, one text for each of the labels")
    if not all(0 <= index < len(labels) for index in known):
        raise WorldError(f"{folder / INDEX}: known holds an index that is no label's")
    pictures = {style: _sheet(folder, style, len(labels), side, columns) for style in styles}
    return {"labels": labels, "pictures": pictures, "known": known, "captions": captions}


def _sheet(folder: Path, style: str, count: int, side: int, columns: int) -> Tensor:
    """One style's pictures ``uint8 [count, 3, side, side]``, cut out of its contact sheet."""
    path = folder / f"{style}.png"
    if Path(style).name != style or style.startswith("."):
        raise WorldError(f"{folder / INDEX}: {style!r} is no style's name")
    try:
        with Image.open(path, formats=("PNG",)) as sheet:
            if max(sheet.size) > _MAX_SIDE or sheet.width != columns * side or sheet.height % side:
                raise WorldError(
                    f"{path}: {sheet.width} x {sheet.height} is no sheet of {columns} columns of {side} px"
                )
            pixels = torch.from_numpy(np.array(sheet.convert("RGB")))
    except OSError as error:
        raise WorldError(f"{path}: cannot be read ({error})") from None
    tiles = pixels.reshape(-1, side, columns, side, 3).permute(0, 2, 4, 1, 3).reshape(-1, 3, side, side)
    if len(tiles) < count:
        raise WorldError(f"{path}: holds {len(tiles)} pictures of {count}")
    return tiles[:count].contiguous()


def world_picture(world: World, style: str, index: int) -> Image.Image:
    """One picture of the world as RGB."""
    return Image.fromarray(world.pictures[style][index].permute(1, 2, 0).numpy())
