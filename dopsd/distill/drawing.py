"""Noise to pictures: the one way in which previews, evaluation, export and ``dopsd sample`` draw.

How many pictures are in memory at once is decided by their pixels, not by a setting alone: decoding one of 1024 x 1024
takes 1.6 GB, and a batch of 32 would take 51.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor

from dopsd.distill.rollout import sample
from dopsd.models.base import Conditioning, Family

T = TypeVar("T")

PIXELS = 1024 * 1024
"""In one forward of the transformer or the decoder: a large picture alone, small ones together."""
WHOLE = 2048 * 2048
"""A picture of more pixels is decoded in tiles, where the decoder can."""


def batch_of(height: int, width: int, most: int) -> int:
    """How many pictures of that size are drawn at once: at most ``most``, at least one."""
    return max(1, min(most, PIXELS // (height * width)))


def draw(
    family: Family, conditioning: Sequence[Conditioning], num_steps: int, noise: Tensor, height: int, width: int,
    most: int,
) -> list[Image]:  # fmt: skip
    """A picture from each row of ``noise`` ``[B, C, h, w]``, with the adapter that is selected.

    ``most`` at once, fewer where they are large or do not fit. Raises ``torch.OutOfMemoryError`` where one does not.
    """

    def drawn(rows: slice) -> list[Image]:
        latents = sample(family, conditioning[rows], num_steps, height, width, noise[rows])
        return pictures(family, latents, height, width)

    # processes that divide the transformer draw in step: what one of them tried again, the others would not
    alone = not getattr(family.transformer, "sharded", False)
    return in_parts(len(conditioning), batch_of(height, width, most), drawn, halve=alone)


def pictures(family: Family, latents: Tensor, height: int, width: int) -> list[Image]:
    """Decode latents ``[B, C, h, w]`` of pictures of that size, as many at once as fit."""
    with _tiled(family, height * width > WHOLE):
        return in_parts(len(latents), batch_of(height, width, len(latents)), lambda rows: family.decode(latents[rows]))


def in_parts(count: int, size: int, work: Callable[[slice], list[T]], halve: bool = True) -> list[T]:
    """``work`` over ``count`` rows, ``size`` at a time. Where memory runs out half as many are tried, down to one;
    without ``halve`` nothing is tried again."""
    done: list[T] = []
    while len(done) < count:
        try:
            done += work(slice(len(done), min(len(done) + size, count)))
            continue
        except torch.OutOfMemoryError:
            if size == 1 or not halve:
                raise
        # not in the handler: there the failed attempt's tensors are still held by its traceback
        size = max(1, min(size, count - len(done)) // 2)
    return done


@contextmanager
def _tiled(family: Family, tiled: bool) -> Iterator[None]:
    """The decoder in tiles inside the block. It has one switch: smaller pictures must come as they always do."""
    decoder: Any = family.parts["vae_decoder"] if tiled else None
    if not hasattr(decoder, "enable_tiling"):
        yield
        return
    decoder.enable_tiling()
    try:
        yield
    finally:
        decoder.disable_tiling()
