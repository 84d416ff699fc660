"""What other backbones than the first see in the samples: how well they follow the prompt, how far they are from the
base's pictures and from the target, and what a judge says.

A second backbone's scores have its kind behind an ``@``. Distances of pictures need the pictures themselves: the base's
wait on disk until the tuned models' come.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dopsd.data.pictures import Picture

from .backbones import Backbones, kind_of
from .draws import Key
from .prompts import CONCEPT, KEPT, NEAR, REWRITE, Prompt
from .protocol import text_for_clip
from .scoring import Cell, Values, opened

FROM_BASE = "from_base"
"""A picture's distance to the base's of the same noise; of the base's second noise, to its first."""


class Extras:
    """Scores of pictures by everything but features. ``words``: the placeholder and what a concept is one of."""

    def __init__(
        self, backbones: Backbones, splits: Mapping[str, Sequence[Prompt]], training: Sequence[Picture],
        words: tuple[str, str], few: int, many: int, waiting: Path,
    ) -> None:  # fmt: skip
        self._see, self._splits, self._training = backbones, splits, training
        self._words, self._few, self._many, self._waiting = words, few, many, waiting

    def measure(self, key: Key, rows: Sequence[int], images: Sequence[Image.Image]) -> dict[str, Values]:
        """Of samples for those prompts, of one size: score to ``[N]``."""
        asked = [self._splits[key.split][row] for row in rows]
        values: dict[str, Tensor] = {}
        if key.noise == 0 and key.steps in (self._few, self._many):
            for text in self._see.texts:
                score = text(images, [text_for_clip(prompt.text, *self._words) or prompt.text for prompt in asked])
                kind = kind_of(text.name)
                values["reward" if kind == "reward" else f"prompt@{kind}" if "prompt" in values else "prompt"] = score
        if self._see.distances and key.split in (KEPT, NEAR):
            values |= self._from_base(key, rows, images)
        if self._see.distances and all(prompt.truth is not None for prompt in asked):
            truths = [prompt.true_picture() for prompt in asked]
            values |= {f"target@{kind_of(one.name)}": one(images, truths) for one in self._see.distances}
        if self._see.judges and self._judged(key):
            self._keep(key, rows, images)
        return {name: value.double().numpy() for name, value in values.items()}

    def try_judges(self) -> None:
        """Load every judge and ask it once, of a training picture: its faults are to be found before hours of drawing.
        Raises ``BackboneError`` and ``ModelError``."""
        for judge in self._see.judges:
            picture = self._training[0].load()
            judge([picture], [self._splits[CONCEPT][0].text], [picture])
            judge.release()

    def judge(self, cells: Mapping[Key, Cell]) -> dict[Key, dict[str, Values]]:
        """The judges' grades, 1 to 4, of the pictures that waited for them: a judge may be larger than all else."""
        grades: dict[Key, dict[str, Values]] = {}
        for number, judge in enumerate(self._see.judges):
            name = "judge" if number == 0 else f"judge@{kind_of(judge.name)}"
            for key in filter(self._judged, cells):
                each = [judge([self._kept(key, row)], [prompt.text], [self._reference(key, cells[key], row)])
                        for row, prompt in enumerate(self._splits[key.split])]  # fmt: skip
                grades.setdefault(key, {})[name] = torch.cat(each).double().numpy()
        return grades

    def _judged(self, key: Key) -> bool:
        return key.split in (CONCEPT, REWRITE) and key.steps == self._few and key.noise == 0

    def _reference(self, key: Key, cell: Cell, row: int) -> Image.Image:
        """What a sample is to be true to: its own picture, or the training picture that it is nearest to."""
        truth = self._splits[key.split][row].truth
        return opened(truth if truth is not None else self._training[int(cell.values["nearest"][row])])

    def _from_base(self, key: Key, rows: Sequence[int], images: Sequence[Image.Image]) -> dict[str, Tensor]:
        base = key.model == "base"
        if base:
            self._keep(key, rows, images)
            if key.noise == 0:
                return {}
        other = Key(key.split, "base", key.steps, 0 if base else key.noise)  # drawn before all others
        pictures = [self._kept(other, row) for row in rows]
        return {f"{FROM_BASE}@{kind_of(one.name)}": one(images, pictures) for one in self._see.distances}

    def _keep(self, key: Key, rows: Sequence[int], images: Sequence[Image.Image]) -> None:
        for row, image in zip(rows, images, strict=True):
            path = self._place(key, row)
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, compress_level=1)

    def _kept(self, key: Key, row: int) -> Image.Image:
        with Image.open(self._place(key, row)) as image:
            return image.convert("RGB")

    def _place(self, key: Key, row: int) -> Path:
        return self._waiting / f"{key.split}-{key.model}-{key.steps}-{key.noise}" / f"{row}.png"


@contextmanager
def waiting_room(beside: Path) -> Iterator[Path]:
    """A folder on the disk of the results, for pictures that wait; gone afterwards."""
    beside.parent.mkdir(parents=True, exist_ok=True)
    # what a killed run left of it is swept as every half-written folder is
    with tempfile.TemporaryDirectory(".partial", f"{beside.name}.waiting-", beside.parent) as folder:
        yield Path(folder)


def with_values(cell: Cell, values: Mapping[str, Values]) -> Cell:
    """The cell with more scores."""
    return Cell(cell.values | {name: np.asarray(value) for name, value in values.items()}, cell.features)
