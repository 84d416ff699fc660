"""What a run shows while it runs: metrics per step, pictures by step, a bar; and the run's own log of them.

Trackers implement :class:`Observer`. Whatever they do, the run folder has ``log.jsonl`` (one row per step, cut back to
the checkpoint on resume, so complete and not doubled) and ``previews/<who>-<step>.png``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dopsd.data.dataset import Example, Preview
from dopsd.distill.adapters import AdapterPair, Selection
from dopsd.distill.rollout import sample
from dopsd.files import whole_file
from dopsd.models.base import Family


class Observer(Protocol):
    """Where a run's news go; none of it may change the run."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after optimizer step ``step`` (1-based; 0 is before training)."""
        ...

    def images(self, step: int, key: str, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
        """Preview pictures under ``preview/student`` or ``preview/teacher``."""
        ...

    def message(self, text: str) -> None:
        """A line for the person at the terminal."""
        ...


class RunLog:
    """``log.jsonl`` of a run: ``{"step": n, "train/loss": ...}``, a row per optimizer step."""

    def __init__(self, path: Path, step: int) -> None:
        """Open ``path`` for rows after ``step``; rows beyond it (from after the last checkpoint) are cut off."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:  # the row that a kill cut in two is younger than any checkpoint
                break
        with whole_file(path) as partial:
            partial.write_text("".join(kept))
        self._file = path.open("a")

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Add the row of one step."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make sure that all rows are on disk: before every checkpoint."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Previews:
    """Fixed noise, fixed prompts: what the student (and its teacher) make of them, step by step.

    The student gets the preview prompts. The teacher is shown training examples (one per image), as in training: its
    pictures are what the student is being taught. Each is drawn at its own size, ``batch_size`` of one size at a time.
    """

    def __init__(
        self, family: Family, prompts: Sequence[Preview], examples: Sequence[Example], num_steps: int, batch_size: int,
        seed: int,
    ) -> None:  # fmt: skip
        self._family, self._num_steps, self._batch_size, self._seed = family, num_steps, batch_size, seed
        self._student = list(prompts)
        by_image = {example.image_index: example for example in reversed(examples)}
        taught = [by_image[index] for index in sorted(by_image)][: len(self._student)]
        self._teacher = [Preview(e.caption, e.context, e.height, e.width) for e in taught]

    def show(self, step: int, adapters: AdapterPair, teacher: bool, folder: Path, observer: Observer) -> None:
        """Sample, save and hand over the pictures of this step. Draws nothing from the run's own generator."""
        who: list[tuple[str, Selection, list[Preview]]] = [("student", "student", self._student)]
        if teacher:
            who.append(("teacher", adapters.teacher, self._teacher))
        for name, selection, prompts in who:
            if not prompts:
                continue
            with adapters.select(selection):
                images = self._draw(prompts)
            _save_strip(folder / f"{name}-{step:06d}.png", images)
            observer.images(step, f"preview/{name}", images, [prompt.caption for prompt in prompts])

    def _draw(self, prompts: Sequence[Preview]) -> list[Image.Image]:
        generator = torch.Generator().manual_seed(self._seed)
        noise = [self._family.initial_latents(1, p.height, p.width, generator) for p in prompts]
        images: dict[int, Image.Image] = {}
        sizes = sorted({(p.height, p.width) for p in prompts})
        for size in sizes:
            rows = [number for number, p in enumerate(prompts) if (p.height, p.width) == size]
            for start in range(0, len(rows), self._batch_size):
                part = rows[start : start + self._batch_size]
                latents = sample(
                    self._family, [prompts[row].conditioning for row in part], self._num_steps, *size,
                    noise=torch.cat([noise[row] for row in part]),
                )  # fmt: skip
                images |= dict(zip(part, self._family.decode(latents), strict=True))
        return [images[number] for number in range(len(prompts))]


def _save_strip(path: Path, images: Sequence[Image.Image]) -> None:
    """The pictures side by side as one PNG, written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    strip = Image.new("RGB", (sum(i.width for i in images), max(i.height for i in images)), "white")
    left = 0
    for image in images:
        strip.paste(image, (left, 0))
        left += image.width
    with whole_file(path) as partial:
        strip.save(partial, format="PNG")


class Progress:
    """The bar on the terminal: loss, images per second, time left. Silent where standard error is no terminal."""

    def __init__(self, label: str, total: int, step: int) -> None:
        self._bar = tqdm(total=total, initial=step, desc=label, unit="step", dynamic_ncols=True, disable=None)

    def update(self, loss: float, images_per_second: float) -> None:
        """One more step is done."""
        self._bar.set_postfix(loss=f"{loss:.4f}", images_s=f"{images_per_second:.1f}", refresh=False)
        self._bar.update()

    def to(self, step: int, loss: float, images_per_second: float) -> None:
        """The run is at ``step`` now, maybe again."""
        self._bar.n = step - 1
        self.update(loss, images_per_second)

    def close(self) -> None:
        """Leave the finished bar on the screen."""
        self._bar.close()


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference per example, ``[B]``, on the CPU."""
    return (a.float().cpu() - b.float().cpu()).square().flatten(1).mean(1)
