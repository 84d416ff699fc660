"""Pictures from files nobody has looked at: safe decoding, colours, orientation, aspect buckets, resize.

Every fault of a file is an :class:`ImageError` with one sentence; PIL's own exceptions never leave this module.
"""

from __future__ import annotations

import hashlib
import io
import math
import stat
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, features

from .colour import ProfileError, changes, to_srgb
from .duplicates import Fingerprint, fingerprint

EXTENSIONS = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".heic", ".heif", ".hif",
    ".gif", ".bmp", ".tif", ".tiff",
)  # fmt: skip
"""Of files that are meant as pictures (lower case). What one is, and whether it can be read, its content decides."""
_ADVICE = "convert it to PNG, JPEG or WEBP"
_OPENED = ("PNG", "JPEG", "WEBP", "AVIF")
_FOREIGN = {b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF or raw", b"MM\0*": "TIFF or raw", b"8BPS": "Photoshop",
            b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL ": "JPEG XL", b"<svg": "SVG", b"%PDF": "PDF"}  # fmt: skip
"""How the content of pictures begins that are not read."""
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_AVIF = {b"avif", b"avis"}
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
    identity: str
    """Of the content, as :func:`content_identity` has it."""
    remarks: tuple[str, ...] = ()
    """What a person should know of how it was read."""


def load_image(path: Path, max_pixels: int, remark: Callable[[str], object] = lambda text: None) -> Image.Image:
    """Decode one file to an upright RGB picture in sRGB, transparency laid on white.

    PNG, JPEG, WEBP, AVIF, and HEIC with the extra ``heic``: the content says which, not the name. ``remark`` is given
    what a person should know of it. Raises :class:`ImageError` where the file is missing, unreadable, truncated,
    animated, of another format, or of more than ``max_pixels`` (found in its header, before anything is decoded).
    """
    return _decode(path, _read(path, max_pixels), max_pixels, remark)


def inspect_image(path: Path, max_pixels: int) -> ImageFacts:
    """Decode a file as :func:`load_image` does and say what it is. Raises :class:`ImageError`."""
    content = _read(path, max_pixels)
    remarks: list[str] = []
    image = _decode(path, content, max_pixels, remarks.append)
    sha256 = hashlib.sha256(content).hexdigest()
    return ImageFacts(image.width, image.height, sha256, fingerprint(image), content_identity(content), tuple(remarks))


def content_identity(content: bytes) -> str:
    """Of a file's bytes: two equal ones are read as equal pictures, also by earlier versions of this code.

    It is their sha256, and something more where earlier versions read other pixels than today's: they knew neither
    profiles nor a transparent colour of more or fewer than 8 bits.
    """
    reading = ""
    with suppress(Exception), warnings.catch_warnings():  # what cannot be opened is said where it is decoded
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content), formats=_formats(content)) as image:
            profile = image.info.get("icc_profile")
            reading = ":sRGB" if profile and changes(profile) else ""
            reading += ":keyed" if _key(image, content) is not None else ""
    return hashlib.sha256(content).hexdigest() + reading


MULTIPLE = 16
"""Both sides of whatever is drawn are multiples of this: a latent cell of 8 pixels, in patches of 2 x 2."""


FULL_AREA = 0.9
"""Of ``resolution ** 2``: with less, a picture is enlarged visibly. Usual shapes of a megapixel have 0.93 and more."""


def bucket_size(width: int, height: int, resolution: int, multiple: int = MULTIPLE) -> tuple[int, int]:
    """The trained (width, height) of a picture: its shape kept, its area near ``resolution ** 2`` pixels.

    Both sides are multiples of ``multiple``, at least one of it. A picture that is so already, and a little smaller,
    is taken as it is: 1216 x 832 at 1024.
    """
    if min(width, height, resolution, multiple) < 1:
        raise ValueError(f"bucket_size: sides must be positive, got {width} x {height} at {resolution} by {multiple}")
    if width % multiple == height % multiple == 0 and FULL_AREA * resolution**2 <= width * height < resolution**2:
        return width, height
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
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(path, "is not an ordinary file; put the picture itself there")
        limit = max_pixels * _BYTES_PER_PIXEL + _HEADER_BYTES
        if status.st_size > limit:
            raise ImageError(
                path, f"is absurdly large: {status.st_size:,} bytes, at most {limit:,}; shrink it (data.max_pixels)"
            )
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


def _decode(path: Path, content: bytes, max_pixels: int, remark: Callable[[str], object]) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a decoder's remarks about metadata do not concern the pixels
        try:
            with Image.open(io.BytesIO(content), formats=_formats(content)) as image:
                _check_header(path, image, max_pixels)
                image.load()
                _check_complete(content, image.format)
                _describe_colours(image, remark)
                return _to_rgb(ImageOps.exif_transpose(image), _key(image, content), remark)
        except ImageError:
            raise
        except Image.DecompressionBombError:
            most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            raise ImageError(path, f"is absurdly large: more than {most:,} pixels (a bomb?); shrink it") from None
        except Image.UnidentifiedImageError:
            raise ImageError(path, _describe_foreign(content)) from None
        # Decoders of hostile bytes raise whatever they trip over (struct.error, SyntaxError, KeyError, MemoryError).
        except Exception as error:
            problem = f"cannot be decoded: damaged or truncated ({_reason(error)}); fetch or export it again"
            raise ImageError(path, problem) from None


def _formats(content: bytes) -> tuple[str, ...]:
    """The decoders that may look at it: HEIC's is not PIL's own."""
    if _brands(content) & _HEIC:
        with suppress(ImportError):
            import pillow_heif

            pillow_heif.register_heif_opener()
            return (*_OPENED, "HEIF")
    return _OPENED


def _brands(content: bytes) -> set[bytes]:
    """What a file of HEIC's and AVIF's kind says that it is; of others nothing."""
    if content[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(content[:4], "big"), 256)
    found = {content[8:12], *(content[place : place + 4] for place in range(16, end, 4))}
    return found - _HEIC if found & _AVIF else found


def _describe_foreign(content: bytes) -> str:
    brands = _brands(content)
    if brands & _HEIC:
        return ("is a HEIC picture: `pip install -e '.[heic]'` (pillow-heif) makes it readable, or convert it to PNG, "
                "JPEG or WEBP")  # fmt: skip
    if brands & _AVIF and not features.check("avif"):
        return f"is an AVIF picture, which this build of Pillow cannot read; {_ADVICE}"
    found = next((name for start, name in _FOREIGN.items() if content.startswith(start)), None)
    return f"is a {found} picture, which is not read; {_ADVICE}" if found else f"is not a readable picture; {_ADVICE}"


def _check_header(path: Path, image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height}"
        problem = f"is absurdly large: {size} pixels, at most {max_pixels:,} in all; shrink it (data.max_pixels)"
        raise ImageError(path, problem)
    # A phone's JPEG with a preview or depth map behind it is called MPO by PIL; its first picture is an ordinary JPEG.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise ImageError(path, "is animated; save one frame as a picture of its own")


def _check_complete(content: bytes, found: str | None) -> None:
    """PIL forgives a PNG that ends before its last chunk and never looks at the checksums; nobody else should."""
    if found == "PNG":
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            image.verify()


def _describe_colours(image: Image.Image, remark: Callable[[str], object]) -> None:
    """Say what else than a profile speaks of a picture's colours, because it is not followed."""
    if image.info.get("icc_profile"):
        return
    if "icc_profile" in image.info:  # PIL leaves nothing where the parts do not fit together
        remark("its colour profile is damaged and was left aside: the colours are taken as sRGB; export it again")
    elif image.mode == "CMYK":
        remark("is CMYK without a colour profile: its colours are a guess; export it as sRGB")
    elif abs(image.info.get("gamma", _SRGB_GAMMA) - _SRGB_GAMMA) > 0.01 and "srgb" not in image.info:
        remark(f"its gamma of {image.info['gamma']:g} is not followed: the colours are taken as sRGB; export it again")
    elif _exif(image, 0xA005, 1) == "R03":
        remark("its EXIF says Adobe RGB, without a profile: the colours are taken as sRGB; export it as sRGB")


_SRGB_GAMMA = 0.45455


def _exif(image: Image.Image, group: int, tag: int) -> object:
    with suppress(Exception):  # whatever the bytes are
        return image.getexif().get_ifd(group).get(tag)
    return None


def _key(image: Image.Image, content: bytes) -> int | tuple[int, ...] | None:
    """The transparent colour of a PNG whose numbers have not 8 bits, as those of the decoded picture; else ``None``.

    PIL gives it as the file has it: it scales 2 and 4 bits to 8, takes the upper 8 of three times 16, and leaves grey
    of 16 bits as it is.
    """
    key, depth = image.info.get("transparency"), content[24]
    if image.format != "PNG" or key is None or isinstance(key, bytes):
        return None
    if image.mode == "L" and depth in (2, 4):
        return int(key) * 255 // (2**depth - 1)
    if image.mode == "RGB" and depth == 16:
        return tuple(value >> 8 for value in key)
    return int(key) if image.mode.startswith("I") else None


def _to_rgb(image: Image.Image, key: int | tuple[int, ...] | None, remark: Callable[[str], object]) -> Image.Image:
    profile = image.info.get("icc_profile")
    alpha: Image.Image | None = None
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit grey: PIL's own conversion clips at 255 instead of scaling.
        numbers = np.asarray(image, dtype=np.float64)
        if key is not None:
            alpha = Image.fromarray(np.where(numbers == key, 0, 255).astype(np.uint8))
        image = Image.fromarray((numbers / 257).clip(0, 255).round().astype(np.uint8))
    elif image.has_transparency_data:
        if key is not None:
            image.info["transparency"] = key
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        image = rgba.getchannel("R") if image.mode in ("1", "L", "LA", "La") else rgba.convert("RGB")
    elif image.mode not in ("L", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    try:
        opaque = to_srgb(image, profile) if profile else image.convert("RGB")
    except ProfileError as error:
        remark(f"its colour profile {error} and was left aside: the colours are taken as sRGB; export it again")
        opaque = image.convert("RGB")
    if alpha is None:
        return opaque
    canvas = Image.new("RGBA", opaque.size, "white")
    opaque.putalpha(alpha)
    canvas.alpha_composite(opaque)
    return canvas.convert("RGB")


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())[:120]
    return text.encode("ascii", "backslashreplace").decode() or type(error).__name__
