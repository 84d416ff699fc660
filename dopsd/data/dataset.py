"""What a training step draws: encoded examples, and a bucket sampler that resumes exactly where it was."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .cache import Conditioning


@dataclass(frozen=True)
class Example:
    """One picture with one of its captions, encoded.

    ``prompt``: what the student sees; ``context``: what the teacher sees. ``latents``: clean target latents
    ``[C, h, w]``, ``None`` where no method needs them. ``height``, ``width``: pixels of its bucket.
    ``image_index``: the row of the table that it comes from. ``repeats``: how often it is drawn while others are drawn
    once.
    """

    prompt: Conditioning
    context: Conditioning
    latents: Tensor | None
    height: int
    width: int
    image_index: int
    caption: str
    repeats: int = 1


@dataclass(frozen=True)
class Preview:
    """A prompt that the student draws while it trains. ``height``, ``width``: pixels."""

    caption: str
    conditioning: Conditioning
    height: int
    width: int


class BucketSampler(Iterator[list[int]]):
    """An endless sequence of full batches of indices, all of one size each.

    Every bucket (the indices of one size) is a stream of seeded permutations laid end to end, cut into batches; an
    incomplete last batch is filled up from the next permutation. After epoch ``e`` each bucket of ``n`` has had
    ``ceil(e * n / batch_size)`` batches: all indices have appeared ``e`` times, some once more (more often than that
    only in a bucket smaller than a batch, which then sits out the following epochs). The batches of an epoch come in
    seeded random order over the buckets. An index with repeats stands as often in its bucket.

    The sequence is a pure function of its arguments, so a position in it is all that a checkpoint needs.
    Python's own generator is used, whose sequences are guaranteed across versions.
    """

    def __init__(
        self, sizes: Sequence[tuple[int, int]], batch_size: int, seed: int, repeats: Sequence[int] | None = None
    ) -> None:
        """``sizes``: (height, width) of each index. ``repeats``: how often each is drawn in an epoch; ``None``: once.

        Raises ``ValueError`` where there is nothing to draw.
        """
        repeats = [1] * len(sizes) if repeats is None else list(repeats)
        if not sizes:
            raise ValueError("BucketSampler: there are no examples to draw from")
        if batch_size < 1:
            raise ValueError(f"BucketSampler: batch_size must be at least 1, got {batch_size}")
        if min(repeats) < 1:
            raise ValueError(f"BucketSampler: repeats must be at least 1, got {min(repeats)}")
        buckets: dict[tuple[int, int], list[int]] = {}
        for index, ((height, width), times) in enumerate(zip(sizes, repeats, strict=True)):
            buckets.setdefault((int(height), int(width)), []).extend([index] * times)
        self._buckets = list(buckets.values())
        self._batch_size = batch_size
        self._seed = seed
        listed = [[int(h), int(w), *([n] if n > 1 else [])] for (h, w), n in zip(sizes, repeats, strict=True)]
        self._identity = {
            "batch_size": batch_size,
            "seed": seed,
            "sizes": hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
        }
        self._epoch = 0
        self._position = 0
        self._order: list[int] = []
        self._taken: list[int] = []
        self._permutations: dict[tuple[int, int], list[int]] = {}
        self._start_epoch(0)

    def __iter__(self) -> BucketSampler:
        return self

    def __next__(self) -> list[int]:
        while self._position == len(self._order):  # an epoch of small buckets may have no batch at all
            self._start_epoch(self._epoch + 1)
        bucket = self._order[self._position]
        self._position += 1
        start = self._taken[bucket] * self._batch_size
        self._taken[bucket] += 1
        return [self._draw(bucket, place) for place in range(start, start + self._batch_size)]

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON values; the next batch after :meth:`load_state_dict` is the next one here."""
        return {**self._identity, "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position. Raises ``ValueError`` where the state is that of other examples or settings."""
        for name, mine in self._identity.items():
            if state.get(name) != mine:
                values = f"{name} ({state.get(name)} then, {mine} now)"
                what = "the examples' sizes or repeats" if name == "sizes" else values
                raise ValueError(f"the checkpoint's sampler differs in {what}; resume with the same data and settings")
        epoch, position = state.get("epoch"), state.get("position")
        if not isinstance(epoch, int) or not isinstance(position, int) or epoch < 0 or position < 0:
            raise ValueError("the checkpoint's sampler has no valid position; start the run anew")
        if position > sum(self._batches(bucket, epoch) for bucket in range(len(self._buckets))):
            raise ValueError("the checkpoint's sampler is past the end of its epoch; start the run anew")
        self._start_epoch(epoch)
        for bucket in self._order[:position]:
            self._taken[bucket] += 1
        self._position = position

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._position = 0
        self._taken = [self._batches_before(bucket, epoch) for bucket in range(len(self._buckets))]
        self._order = [b for b in range(len(self._buckets)) for _ in range(self._batches(b, epoch))]
        random.Random(f"order/{self._seed}/{epoch}").shuffle(self._order)
        self._permutations = {}

    def _batches_before(self, bucket: int, epoch: int) -> int:
        return -(-epoch * len(self._buckets[bucket]) // self._batch_size)

    def _batches(self, bucket: int, epoch: int) -> int:
        return self._batches_before(bucket, epoch + 1) - self._batches_before(bucket, epoch)

    def _draw(self, bucket: int, place: int) -> int:
        """The index at ``place`` of the bucket's stream."""
        cycle, offset = divmod(place, len(self._buckets[bucket]))
        if (bucket, cycle) not in self._permutations:
            permutation = list(self._buckets[bucket])
            random.Random(f"bucket/{self._seed}/{bucket}/{cycle}").shuffle(permutation)
            self._permutations[bucket, cycle] = permutation
        return self._permutations[bucket, cycle][offset]
