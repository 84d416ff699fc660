"""Pictures from files nobody has looked at: safe decoding, orientation, aspect buckets, resize.

Every fault of a file is an :class:`ImageError` with one sentence; PIL's own exceptions never leave this module.
"""

from __future__ import annotations

import hashlib
import io
import math
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .duplicates import Fingerprint, fingerprint

EXTENSIONS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Extension (lower case) to the format that its content must have."""
_ADVICE = "convert it to PNG, JPEG or WEBP"
# A phone's JPEG with a preview or depth map behind it is called MPO by PIL; its first picture is an ordinary JPEG.
_SAME_FORMAT = {"MPO": "JPEG"}
_OPENED = ("PNG", "JPEG", "WEBP")
_BYTES_PER_PIXEL = 8
_HEADER_BYTES = 1 << 20


class ImageError(ValueError):
    """A picture that cannot be used. ``problem`` says what is wrong and what to do, without the file's name."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.problem = problem


@dataclass(frozen=True)
class ImageFacts:
    """What the checks need to know of a file. ``width`` and ``height`` are pixels, after orientation."""

    width: int
    height: int
    sha256: str
    fingerprint: Fingerprint


def load_image(path: Path, max_pixels: int) -> Image.Image:
    """Decode one PNG, JPEG or WEBP file to an upright RGB picture, transparency laid on white.

    Raises :class:`ImageError` where the file is missing, unreadable, truncated, animated, of another format than its
    extension says, or of more than ``max_pixels`` (found in its header, before anything is decoded).
    """
    return _decode(path, _read(path, max_pixels), max_pixels)


def inspect_image(path: Path, max_pixels: int) -> ImageFacts:
    """Decode a file as :func:`load_image` does and say what it is. Raises :class:`ImageError`."""
    content = _read(path, max_pixels)
    image = _decode(path, content, max_pixels)
    return ImageFacts(image.width, image.height, hashlib.sha256(content).hexdigest(), fingerprint(image))


MULTIPLE = 16
"""Both sides of whatever is drawn are multiples of this: a latent cell of 8 pixels, in patches of 2 x 2."""


def bucket_size(width: int, height: int, resolution: int, multiple: int = MULTIPLE) -> tuple[int, int]:
    """The trained (width, height) of a picture: its shape kept, its area near ``resolution ** 2`` pixels.

    Both sides are multiples of ``multiple``, at least one of it.
    """
    if min(width, height, resolution, multiple) < 1:
        raise ValueError(f"bucket_size: sides must be positive, got {width} x {height} at {resolution} by {multiple}")
    shape = math.sqrt(width / height)

    def side(length: float) -> int:
        return max(1, round(length / multiple)) * multiple

    return side(resolution * shape), side(resolution / shape)


def fit_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize until ``size`` (width, height) is just covered, then crop the overhang equally on both sides."""
    if image.size == size:
        return image.copy()
    return ImageOps.fit(image, size, method=Image.Resampling.LANCZOS, centering=(0.5, 0.5))


def _read(path: Path, max_pixels: int) -> bytes:
    """The file's bytes. A pipe, a device or a file far larger than its pixels could need is never opened."""
    if path.suffix.lower() not in EXTENSIONS:
        raise ImageError(path, f"the extension {path.suffix!r} is not a picture's; {_ADVICE}")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(path, "is not an ordinary file; put the picture itself there")
        limit = max_pixels * _BYTES_PER_PIXEL + _HEADER_BYTES
        if status.st_size > limit:
            raise ImageError(path, f"is absurdly large: {status.st_size:,} bytes, at most {limit:,}; shrink it")
        content = path.read_bytes()
    except FileNotFoundError:
        raise ImageError(path, "is missing; put the file there or remove the row") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(path, f"cannot be read ({_reason(error)}); check the name and the permissions") from None
    if not content:
        raise ImageError(path, "is empty (0 bytes); put the picture there again")
    return content


def _decode(path: Path, content: bytes, max_pixels: int) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a decoder's remarks about metadata do not concern the pixels
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(content), formats=_OPENED) as image:
                _check_header(path, image, max_pixels)
                image.load()
                _check_complete(content, image.format)
                return _to_rgb(ImageOps.exif_transpose(image))
        except ImageError:
            raise
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise ImageError(path, "is absurdly large (a decompression bomb?); shrink it") from None
        except Image.UnidentifiedImageError:
            raise ImageError(path, f"is not a readable PNG, JPEG or WEBP picture; {_ADVICE}") from None
        # Decoders of hostile bytes raise whatever they trip over (struct.error, SyntaxError, KeyError, MemoryError).
        except Exception as error:
            problem = f"cannot be decoded: damaged or truncated ({_reason(error)}); fetch or export it again"
            raise ImageError(path, problem) from None


def _check_header(path: Path, image: Image.Image, max_pixels: int) -> None:
    found = _SAME_FORMAT.get(image.format or "", image.format)
    if found != EXTENSIONS[path.suffix.lower()]:
        raise ImageError(path, f"is named {path.suffix} but holds {found}; rename it or {_ADVICE}")
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height}"
        raise ImageError(path, f"is absurdly large: {size} pixels, at most {max_pixels:,} in all; shrink it")
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise ImageError(path, "is animated; save one frame as a picture of its own")


def _check_complete(content: bytes, found: str | None) -> None:
    """PIL forgives a PNG that ends before its last chunk and never looks at the checksums; nobody else should."""
    if found == "PNG":
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            image.verify()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit grey: PIL's own conversion clips at 255 instead of scaling.
        grey = np.asarray(image, dtype=np.float64) / 257
        image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, "white")
        canvas.alpha_composite(rgba)
        image = canvas
    return image.convert("RGB")


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())[:120]
    return text.encode("ascii", "backslashreplace").decode() or type(error).__name__
