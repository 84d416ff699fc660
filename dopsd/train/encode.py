"""Stage encode: every prompt, teacher context and target image once, cached by content.

Nothing is encoded in a training step. The target latents serve the baselines and the teacher gain only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dopsd.config import Settings
from dopsd.data.cache import EncodingCache
from dopsd.data.dataset import Example
from dopsd.data.images import bucket_size, fit_image, load_image
from dopsd.data.manifest import ConceptTable, Row
from dopsd.models.base import Conditioning, Family

BATCH = 8


def _together(family: Family) -> int:
    """How many encodings are asked for at once: a crew's encoders take several batches."""
    return BATCH * getattr(family, "lanes", 1)


def encode_texts(family: Family, texts: Sequence[str], cache: EncodingCache) -> list[Conditioning]:
    """What inference sees of each text, in order; ``texts`` is left as it is."""
    keys = [cache.key("prompt", family.fingerprint, text) for text in texts]
    return cache.get_or_encode(
        keys, lambda missing: family.encode_prompt([texts[i] for i in missing]), _together(family), "prompts"
    )


def encode_concept(family: Family, table: ConceptTable, settings: Settings, cache: EncodingCache) -> list[Example]:
    """One :class:`Example` per image and caption variant, in the table's order.

    Images are fitted to their aspect bucket; the context's key covers the bytes of image and references.
    """
    targets = _Targets(table.rows, settings.data.resolution, settings.data.max_pixels)
    pairs = [(index, text) for index, row in enumerate(table.rows) for _, text in row.captions]
    prompts = encode_texts(family, [text for _, text in pairs], cache)
    contexts = _contexts(family, pairs, targets, settings.model.context_pixels, cache)
    latents = _latents(family, targets, cache)
    return [
        Example(
            prompt=prompts[number],
            context=contexts[number],
            latents=latents[index]["latents"],
            height=targets.sizes[index][1],
            width=targets.sizes[index][0],
            image_index=index,
            caption=text,
        )
        for number, (index, text) in enumerate(pairs)
    ]


class _Targets:
    """The rows' images: content hashes and bucket sizes at once, pixels when they are asked for."""

    def __init__(self, rows: Sequence[Row], resolution: int, max_pixels: int) -> None:
        self.rows, self._max_pixels = rows, max_pixels
        self.sizes = [bucket_size(*self._read(row.image).size, resolution) for row in rows]
        self.identities = [
            f"{width}x{height}:" + ":".join(map(_file_hash, (row.image, *row.references)))
            for row, (width, height) in zip(rows, self.sizes, strict=True)
        ]

    def _read(self, path: Path) -> Image.Image:
        return load_image(path, self._max_pixels)

    def image(self, index: int) -> Image.Image:
        return fit_image(self._read(self.rows[index].image), self.sizes[index])

    def references(self, index: int) -> list[Image.Image]:
        return [self._read(path) for path in self.rows[index].references]


def _contexts(
    family: Family,
    pairs: Sequence[tuple[int, str]],
    targets: _Targets,
    context_pixels: tuple[int, int],
    cache: EncodingCache,
) -> list[Conditioning]:
    def encode(missing: list[int]) -> list[Conditioning]:
        chosen = [pairs[i] for i in missing]
        return family.encode_context(
            [text for _, text in chosen],
            [targets.image(index) for index, _ in chosen],
            [targets.references(index) for index, _ in chosen],
        )

    size = json.dumps(context_pixels)
    keys = [cache.key("context", family.fingerprint, size, targets.identities[index], text) for index, text in pairs]
    return cache.get_or_encode(keys, encode, _together(family), "teacher contexts")


def _latents(family: Family, targets: _Targets, cache: EncodingCache) -> list[Conditioning]:
    """Clean latents ``[C, h, w]`` per image, one at a time: neighbours may be of different sizes."""

    def encode(missing: list[int]) -> list[Conditioning]:
        return [{"latents": family.encode_images([targets.image(index)])[0].cpu()} for index in missing]

    keys = [cache.key("latents", family.fingerprint, identity) for identity in targets.identities]
    return cache.get_or_encode(keys, encode, BATCH, "target latents")


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
