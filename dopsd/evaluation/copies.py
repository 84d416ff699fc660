"""Was a training picture learnt by heart: the nearest one to each sample, and how much of it the sample is.

Pictures on a plain ground are alike wherever they are plain: a copy lacks less than half of what the other training
picture nearest to the same one lacks. (A training picture that is there twice is no other one.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dopsd.data.pictures import Picture

from . import metrics

_THE_SAME = 0.98
"""From here on two training pictures are one."""
_OTHERS = 8
"""So many of the nearest are looked at for another one."""
COPY = 0.6
"""Structural similarity below which nothing counts as a copy."""


class Copies:
    """Compares samples with the training pictures. ``features`` ``[M, D]`` are theirs."""

    def __init__(self, training: Sequence[Picture], features: Tensor) -> None:
        self._small = torch.cat([_small([picture.load()]) for picture in training])
        self._features = F.normalize(features, dim=1)
        near = (self._features @ self._features.T).fill_diagonal_(-2).argsort(1, descending=True)
        level = torch.zeros(len(training))
        for place in reversed(range(min(_OTHERS, len(training) - 1))):
            alike = metrics.structure(self._small, self._small[near[:, place]])
            level = torch.where(alike < _THE_SAME, alike, level)
        self._bars = (0.5 + 0.5 * level).clamp(min=COPY)

    def of(self, images: Sequence[Image.Image], features: Tensor) -> dict[str, Tensor]:
        """Of each sample ``[N]``: ``nearest``, the training picture nearest by its features; ``copy``, how much of a
        copy of it the sample is (structural similarity at its best over small shifts, 1 for the same picture); and
        ``copy_bar``, above which it is one."""
        nearest = (F.normalize(features, dim=1) @ self._features.T).argmax(1)
        copy = metrics.structure(_small(images), self._small[nearest])
        return {"nearest": nearest, "copy": copy, "copy_bar": self._bars[nearest]}


def _small(images: Sequence[Image.Image]) -> Tensor:
    """``[N, 3, 64, 64]``: a copy of another shape is one too."""
    side = metrics.STRUCTURE_SIZE
    return metrics.stack([image.convert("RGB").resize((side, side), Image.Resampling.BOX) for image in images])
