"""LPIPS by VGG16 (arXiv 1801.03924, version 0.1): how far two pictures are apart, as people see it.

The library of that name wants torchvision, beside which transformers' image processors give other pixels, and unpickles
its weights. So the forty lines are here: VGG16 of any safetensors folder with torchvision's names, and the 1,472
published weights of its channels in ``lpips_vgg.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .base import Held, checked
from .pictures import area_size, at_size, normalised, rows

AREA = 512**2
"""A larger picture is shown smaller; a smaller one as it is: the weights were fitted to patches of 64 px."""
WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
"""Of VGG16's convolutions; 0: pooling."""
_LEAST = 16
"""Pixels a side, or the four poolings leave nothing."""
# its own constants, which are ImageNet's to three digits, for pictures between -1 and 1
_MEAN = tuple((1 + shift) / 2 for shift in (-0.030, -0.088, -0.188))
_STD = tuple(scale / 2 for scale in (0.458, 0.448, 0.450))


def _tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the convolutions among torchvision's ``features``, where each is followed by its ReLU."""
    place, before = 0, 3
    for width in WIDTHS:
        if width:
            yield f"features.{place}.weight", (width, before, 3, 3)
            yield f"features.{place}.bias", (width,)
        place, before = place + (2 if width else 1), width or before


TENSORS = dict(_tensors())
"""What is read of a VGG16's file, with its shapes; its classifier, nine tenths of it, is not."""


@cache
def channel_weights() -> tuple[tuple[float, ...], ...]:
    """The published weight of every channel of the five stages."""
    stored = json.loads(Path(__file__).with_name("lpips_vgg.json").read_text("utf-8"))
    return tuple(tuple(layer) for layer in stored["layers"])


class Vgg16(nn.Module):
    """The convolutions of VGG16; calling it gives the five stages' activations, each before its pooling."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.layers, before = nn.ModuleList(), 3
        names = iter(TENSORS)
        for width in filter(None, WIDTHS):
            layer = nn.Conv2d(before, width, 3, padding=1)
            layer.load_state_dict({"weight": weights[next(names)], "bias": weights[next(names)]})
            self.layers.append(layer)
            before = width
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        layers = iter(self.layers)
        for width in WIDTHS:
            if width:
                x = F.relu(next(layers)(x), inplace=True)
            else:
                yield x
                x = F.max_pool2d(x, 2)
        yield x


class Lpips(Held):
    """LPIPS as a :class:`~.base.Distance`: float32 on every device, for VGG's activations are large."""

    def __init__(self, name: str, weights: Mapping[str, Tensor], device: torch.device) -> None:
        self.name, self.device = name, device
        self.net = Vgg16(weights).to(device)
        self.channels = [torch.tensor(layer, device=device).view(1, -1, 1, 1) for layer in channel_weights()]

    def __call__(self, first: Sequence[Image.Image], second: Sequence[Image.Image]) -> Tensor:
        for number, (a, b) in enumerate(zip(first, second, strict=True), start=1):
            if a.size != b.size:
                raise ValueError(f"{self.name}: pair {number}: pictures of {a.size} and {b.size}; bring them to one "
                                 "size first")  # fmt: skip
        sizes = [area_size(image.size, AREA, least=_LEAST, enlarged=1.0) for image in first]

        @torch.no_grad()
        def distances(numbers: list[int]) -> Tensor:
            stages = zip(self._stages(first, sizes, numbers), self._stages(second, sizes, numbers),
                         self.channels, strict=True)  # fmt: skip
            by_stage = [(weight * (a - b) ** 2).sum(1).mean((1, 2)) for a, b, weight in stages]
            return checked(torch.stack(by_stage).sum(0), self.name).unsqueeze(1)

        return rows(sizes, 1, distances).squeeze(1)

    def _stages(
        self, images: Sequence[Image.Image], sizes: Sequence[tuple[int, int]], numbers: Iterable[int]
    ) -> Iterator[Tensor]:
        """Activations of unit length at every place."""
        x = normalised([at_size(images[n], sizes[n]) for n in numbers], _MEAN, _STD).to(self.device)
        for stage in self.net(x):
            yield stage / (stage.square().sum(1, keepdim=True).sqrt() + 1e-10)
