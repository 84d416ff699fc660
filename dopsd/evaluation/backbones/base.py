"""What a backbone is: pictures, texts and references in, numbers out; nothing of it is ever used in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor


class BackboneError(ValueError):
    """A backbone that is unknown, absent, or gives what is no score; says what to do."""


class Backbone(Protocol):
    """Pictures to features. A row has two halves: *content* says what is drawn, *style* says how."""

    name: str
    """Kind and weights: two of one name give the same features."""
    content_dim: int
    style_dim: int

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Features of RGB images of any size: ``float32 [N, content_dim + style_dim]`` on the CPU."""
        ...


class Distance(Protocol):
    """How far two pictures are apart."""

    name: str

    def __call__(self, first: Sequence[Image.Image], second: Sequence[Image.Image]) -> Tensor:
        """Of each pair, both of one size: ``float32 [N]`` on the CPU, 0 for a picture and itself."""
        ...


class TextScore(Protocol):
    """How well a picture shows what a text says."""

    name: str

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """Of each picture and its text: ``float32 [N]`` on the CPU, more is better."""
        ...


class Judge(Protocol):
    """A grade in words' place: how true a picture is to a reference, by a written rubric."""

    name: str

    def __call__(
        self, images: Sequence[Image.Image], texts: Sequence[str], references: Sequence[Image.Image]
    ) -> Tensor:
        """Of each picture, its prompt and its reference: ``float32 [N]`` on the CPU, 1 (worst) to 4."""
        ...

    def release(self) -> None:
        """Free its memory; asked again, it loads itself again."""
        ...


def kind_of(name: str) -> str:
    """What kind of backbone a name means: ``dinov2`` of ``dinov2:facebook/dinov2-small@main``."""
    return name.partition(":")[0]


def checked(values: Tensor, name: str) -> Tensor:
    """``values`` in float32 on the CPU. Raises :class:`BackboneError` where one is not a number: half precision
    overflows, and an average would hide it."""
    values = values.detach().float().cpu()
    if not bool(values.isfinite().all()):
        raise BackboneError(f"backbone {name}: gives values that are no numbers; its weights are damaged, or too large "
                            "for half precision: evaluate with model.device cpu")  # fmt: skip
    return values


class Held:
    """A network that can be let go of: ``net`` is there until :meth:`release`."""

    net: Any

    def release(self) -> None:
        """Free the network's memory; the backbone cannot be used any more."""
        self.net = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
