"""Pictures as networks take them: shapes kept, at the network's own area or in its square, as many at once as fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MOST_ENLARGED = 2.0
"""A network that sees a small picture at many times its size sees the blur of the enlargement."""
MOST_PIXELS = 64 * 128 * 128
"""At once: 64 pictures of 128 px, 20 of 224 px, 4 of 512 px."""

Size = tuple[int, int]


def area_size(size: Size, area: int, *, multiple: int = 1, least: int = 1, enlarged: float = MOST_ENLARGED) -> Size:
    """The (width, height) at which a picture of ``size`` is shown: its shape, at most about ``area`` pixels, never more
    than ``enlarged`` times as wide. Sides are whole ``multiple`` s, ``least`` of them or more."""
    scale = min(math.sqrt(area / (size[0] * size[1])), enlarged)
    width, height = (max(least, round(side * scale / multiple)) * multiple for side in size)
    return width, height


def at_size(image: Image.Image, size: Size, resample: int = Image.Resampling.BICUBIC) -> Image.Image:
    """In RGB and ``size``."""
    return image.convert("RGB").resize(size, Image.Resampling(resample))


def letterboxed(
    image: Image.Image, side: int, mean: Sequence[float], resample: int = Image.Resampling.BICUBIC
) -> Image.Image:
    """All of a picture in the middle of a square of the mean colour: neither squashed nor cropped."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    square = Image.new("RGB", (side, side), tuple(round(255 * value) for value in mean))
    square.paste(at_size(image, (width, height), resample), ((side - width) // 2, (side - height) // 2))
    return square


def normalised(images: Sequence[Image.Image], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """RGB images of one size as ``float32 [N, 3, H, W]``, less the mean and by the deviation."""
    x = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def batches(sizes: Sequence[Size], most: int = MOST_PIXELS) -> Iterator[list[int]]:
    """Numbers of pictures of one size, in their order, as many at once as have ``most`` pixels together, or one."""
    groups: dict[Size, list[int]] = {}
    for number, size in enumerate(sizes):
        groups.setdefault(size, []).append(number)
    for (width, height), numbers in groups.items():
        many = max(1, most // (width * height))
        yield from (numbers[start : start + many] for start in range(0, len(numbers), many))


def rows(sizes: Sequence[Size], width: int, compute: Callable[[list[int]], Tensor]) -> Tensor:
    """``compute`` for each of :func:`batches`, in the pictures' order: ``float32 [N, width]``."""
    out = torch.empty(len(sizes), width)
    for numbers in batches(sizes):
        out[numbers] = compute(numbers)
    return out
