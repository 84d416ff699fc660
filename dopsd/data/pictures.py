"""A picture that is named and measured now, and decoded when somebody looks at it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

from .images import bucket_size, content_identity, fit_image, load_image
from .manifest import Row


@dataclass(frozen=True)
class Picture:
    """A file that was checked, as a model is shown it. ``size``: (width, height) it is fitted to, ``None``: its own."""

    path: Path
    max_pixels: int
    size: tuple[int, int] | None = None

    @cached_property
    def identity(self) -> str:
        """Of the file's content, how it is read, and the size: equal ones are equal pictures."""
        size = "x".join(map(str, self.size)) if self.size else "own"
        return f"{size}:{content_identity(self.path.read_bytes())}"

    def load(self) -> Image.Image:
        """Decode it: upright RGB. Raises ``ImageError``."""
        image = load_image(self.path, self.max_pixels)
        return image if self.size is None else fit_image(image, self.size)


def bucket_of(row: Row, resolution: int, max_pixels: int) -> tuple[int, int]:
    """The (width, height) that a row's picture is trained at."""
    return bucket_size(*load_image(row.image, max_pixels).size, resolution)


def references_of(row: Row, max_pixels: int) -> tuple[Picture, ...]:
    """A row's references at their own sizes: the family brings them to what its pipeline takes."""
    return tuple(Picture(path, max_pixels) for path in row.references)
