"""The shipped concept data sets, cut out of the emoji world: two styles and one subject, with held-out truth.

``style-3d`` and ``style-ink``: 16 pictures of known things in a style the base has never seen; held out are 100 other
known things in that style. ``subject-LABEL``: 5 pictures of a thing the base has never seen, in its own styles, places
and grounds; held out are three more under other words.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from .captions import PLACEHOLDER, caption_variants, concept_caption
from .pictures import BASE_STYLES, NEW_STYLES, SIZE, World

STYLE_IMAGES = 16
STYLE_HELD_OUT = 100


def write_concepts(world: World, folder: Path, seed: int = 0) -> list[str]:
    """Write the shipped data sets under ``folder`` (replacing them); returns their names."""
    names = []
    draw = np.random.default_rng(seed)
    order = draw.permutation(world.known)
    train, held_out = order[:STYLE_IMAGES], order[STYLE_IMAGES : STYLE_IMAGES + STYLE_HELD_OUT]
    for style in NEW_STYLES:
        names.append(f"style-{style}")
        target = _fresh(folder / names[-1])
        pictures = world.pictures[style]
        rows = [(world.labels[i], caption_variants(world.labels[i]), _image(pictures[i])) for i in sorted(train)]
        _write(target, rows)
        truth = [(world.labels[i], concept_caption(world.labels[i]), _image(pictures[i])) for i in sorted(held_out)]
        _write(target / "holdout", truth)
        _describe(target, {"kind": "style", "style": style})
    label = world.labels[world.subject]
    names.append(f"subject-{label}")
    target = _fresh(folder / names[-1])
    _write(target, _subject_rows(world))
    _write(target / "holdout", _subject_truth(world))
    _describe(target, {"kind": "subject", "label": label})
    return names


def _subject_rows(world: World) -> list[tuple[str, dict[str, str], Image.Image]]:
    noto, twemoji, flat = (_image(world.pictures[style][world.subject]) for style in BASE_STYLES)
    rows = [("noto", "noto", noto), ("twemoji", "twemoji", twemoji)]
    rows.append(("noto-far", "noto", _placed(noto, 0.6, (4, 22), (255, 255, 255))))
    rows.append(("flat-far", "flat", _placed(flat, 0.65, (18, 4), (255, 255, 255))))
    rows.append(("twemoji-sky", "twemoji", _placed(twemoji, 0.75, (14, 8), (205, 230, 250))))
    captions = {style: {"short": f"a {PLACEHOLDER}, {style} style", "request": f"draw a {PLACEHOLDER}, {style} style"}
                for style in BASE_STYLES}  # fmt: skip
    return [(name, captions[style], image) for name, style, image in rows]


def _subject_truth(world: World) -> list[tuple[str, str, Image.Image]]:
    """One picture per style that no training picture shows: flat at its full size, the others in between."""
    noto, twemoji, flat = (_image(world.pictures[style][world.subject]) for style in BASE_STYLES)
    plain = (255, 255, 255)
    pictures = {
        "noto": _placed(noto, 0.8, (6, 6), plain),
        "twemoji": _placed(twemoji, 0.85, (2, 8), plain),
        "flat": flat,
    }
    return [(style, f"{PLACEHOLDER} in {style} style", picture) for style, picture in pictures.items()]


def _placed(image: Image.Image, scale: float, corner: tuple[int, int], ground: tuple[int, int, int]) -> Image.Image:
    """The picture smaller, elsewhere, and on a coloured ground (white is multiplied into it)."""
    side = round(SIZE * scale)
    pixels = np.full((SIZE, SIZE, 3), 255, np.uint8)
    x, y = corner
    pixels[y : y + side, x : x + side] = np.asarray(image.resize((side, side), Image.Resampling.LANCZOS))
    return Image.fromarray((pixels * (np.array(ground) / 255)).round().astype(np.uint8))


def _write(folder: Path, rows: Sequence[tuple[str, dict[str, str] | str, Image.Image]]) -> None:
    (folder / "images").mkdir(parents=True)
    lines = []
    for name, captions, image in rows:
        file = f"images/{name.replace(' ', '-')}.png"
        image.save(folder / file, optimize=True)
        text = {"captions": captions} if isinstance(captions, dict) else {"caption": captions}
        lines.append(json.dumps({"image": file, **text}, ensure_ascii=False))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _describe(folder: Path, what: dict[str, str]) -> None:
    (folder / "concept.json").write_text(json.dumps(what) + "\n", encoding="utf-8")


def _fresh(folder: Path) -> Path:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def _image(picture: Tensor) -> Image.Image:
    return Image.fromarray(picture.permute(1, 2, 0).numpy())
