"""Was a training picture learnt by heart: the nearest one to each sample, and how much of it the sample is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dopsd.data.pictures import Picture

from . import metrics


class Copies:
    """Compares samples with the training pictures. ``features`` ``[M, D]`` are theirs."""

    def __init__(self, training: Sequence[Picture], features: Tensor) -> None:
        self._small = torch.cat([_small([picture.load()]) for picture in training])
        self._features = F.normalize(features, dim=1)

    def of(self, images: Sequence[Image.Image], features: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest training picture of each sample by its features, ``int64 [N]``, and how much of a copy of it the
        sample is ``[N]``: structural similarity at its best over small shifts, 1 for the same picture."""
        nearest = (F.normalize(features, dim=1) @ self._features.T).argmax(1)
        return nearest, metrics.structure(_small(images), self._small[nearest])


def _small(images: Sequence[Image.Image]) -> Tensor:
    """``[N, 3, 64, 64]``: a copy of another shape is one too."""
    side = metrics.STRUCTURE_SIZE
    return metrics.stack([image.convert("RGB").resize((side, side), Image.Resampling.BOX) for image in images])
