"""What the numbers of a picture mean: its ICC profile, applied so that what is read is sRGB.

Colorimetric: a colour that sRGB has too is read as that colour, and one that it has not as the nearest.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""A profile's colour space, and PIL's mode of its numbers."""


class ProfileError(ValueError):
    """A profile that cannot be applied; the message is half a sentence after "its colour profile"."""


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """An RGB, L or CMYK picture as RGB, by its profile. One that means sRGB changes no pixel.

    Raises :class:`ProfileError` where the profile is damaged, or of another colour space than the picture.
    """
    mode, transform = _transform(profile)
    if image.mode == "L" and mode == "RGB":  # grey as three equal channels, as many programs tag it
        image = image.convert("RGB")
    if image.mode != mode:
        raise ProfileError(f"is for {mode} and the picture is {image.mode}")
    if transform is None:
        return image.convert("RGB")
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # it is so only for a transform in place
    return converted


def changes(profile: bytes) -> bool:
    """Whether pixels with this profile are others in sRGB."""
    try:
        return _transform(profile)[1] is not None
    except ProfileError:
        return False


@lru_cache(maxsize=16)  # a folder's pictures share a few profiles
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode that a profile is for, and the way to sRGB; ``None`` where that changes nothing but rounding."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = opened.profile.xcolor_space.strip()
        if space not in _MODES:
            raise ProfileError(f"is for {space or 'no colour space'}, and a picture is RGB, grey or CMYK")
        mode = _MODES[space]
        colorimetric = ImageCms.Intent.RELATIVE_COLORIMETRIC
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB", colorimetric)
    except ProfileError:
        raise
    except Exception as error:  # the library raises what it trips over, and all of it means the same
        raise ProfileError("is damaged") from error
    return mode, None if mode != "CMYK" and _is_same(transform, mode) else transform


def _is_same(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether it moves no colour of a grid by more than one of 255 levels."""
    levels = np.arange(256, dtype=np.uint8) if mode == "L" else np.linspace(0, 255, 18).round().astype(np.uint8)
    axes = np.meshgrid(*[levels] * len(mode), indexing="ij")
    colours = Image.fromarray(
        np.stack(axes, axis=-1).reshape(1, -1, len(mode)).squeeze(-1 if mode == "L" else ()), mode
    )
    moved = ImageCms.applyTransform(colours, transform)
    before = np.asarray(colours.convert("RGB"), dtype=int)
    return int(np.abs(np.asarray(moved, dtype=int) - before).max()) <= 1
