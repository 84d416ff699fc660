"""What a run leaves to look at while it runs: a row of numbers per step, pictures by step, a bar on the terminal.

All of it goes into the run's folder first: ``log.jsonl`` (a row per step, cut back to the checkpoint on resume, so
complete and not doubled), ``previews/<who>-<step>.webp`` and the prompts they were drawn from. An :class:`Observer` is
told of every file that was written, and may copy it elsewhere.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dopsd.data.dataset import Example, Preview
from dopsd.distill.drawing import draw
from dopsd.distill.pair import Pair, Selection
from dopsd.files import now, whole_file
from dopsd.models.base import Family


class Observer(Protocol):
    """Whoever follows a run; nothing that it does may change the run."""

    def wrote(self, path: Path, line: str | None = None) -> None:
        """The file ``path`` of the run's folder has one more ``line`` at its end, or without one is another as a whole.
        A folder that is not there any more was set aside."""
        ...

    def message(self, text: str) -> None:
        """A line for the person at the terminal."""
        ...


class Terminal:
    """Messages go to standard error, in a way that breaks no bar; ``on_write`` is called after every file."""

    def __init__(self, on_write: Callable[[], None] = lambda: None) -> None:
        self._on_write = on_write

    def wrote(self, path: Path, line: str | None = None) -> None:
        """As :meth:`Observer.wrote`."""
        self._on_write()

    def message(self, text: str) -> None:
        """As :meth:`Observer.message`."""
        tqdm.write(text, file=sys.stderr)


class RunLog:
    """``log.jsonl`` of a run: ``{"step": n, "time": ms, "train/loss": ...}``, a row per optimizer step (0: before)."""

    def __init__(self, path: Path, step: int, observer: Observer) -> None:
        """Open ``path`` for rows after ``step``; rows beyond it (from after the last checkpoint) are cut off."""
        self._path, self._observer = path, observer
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        for line in path.read_text(errors="replace", encoding="utf-8").splitlines() if path.exists() else ():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):  # a row that a kill or a full disk cut in two
                continue
        with whole_file(path) as partial:
            partial.write_text("".join(kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        observer.wrote(path)

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Add the row of one step."""
        line = json.dumps({"step": step, "time": now(), **values})
        self._file.write(line + "\n")
        self._file.flush()
        self._observer.wrote(self._path, line)

    def sync(self) -> None:
        """Make sure that all rows are on disk: before every checkpoint."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Previews:
    """Fixed noise, fixed prompts: what the student (and its teacher) make of them, step by step.

    The student gets the preview prompts. The teacher is shown training examples (one per image), as in training: its
    pictures are what the student is being taught. Each is drawn at its own size, at most ``batch_size`` at a time.
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

    def show(self, step: int, pair: Pair, teacher: bool, folder: Path, observer: Observer) -> None:
        """Sample and save the pictures of this step. Draws nothing from the run's own generator."""
        who: list[tuple[str, Selection, list[Preview]]] = [("student", "student", self._student)]
        if teacher:
            who.append(("teacher", pair.teacher, self._teacher))
        for name, selection, prompts in who:
            if not prompts:
                continue
            try:
                with pair.select(selection):
                    images = self._draw(prompts)
            except torch.OutOfMemoryError:
                if getattr(self._family.transformer, "sharded", False):  # the others go on drawing, and would wait
                    raise
                observer.message(f"step {step}: no memory to preview a picture of the {name}; skipped")
                return
            captions, strip = folder / f"{name}.captions.txt", folder / f"{name}-{step:06d}.webp"
            text = "".join(f"{prompt.caption}\n" for prompt in prompts)
            if not captions.exists() or captions.read_text(encoding="utf-8") != text:
                with whole_file(captions) as partial:
                    partial.write_text(text, encoding="utf-8")
                observer.wrote(captions)
            with whole_file(strip) as partial:
                save_strip(images, partial)
            observer.wrote(strip)

    def _draw(self, prompts: Sequence[Preview]) -> list[Image.Image]:
        generator = torch.Generator().manual_seed(self._seed)
        noise = [self._family.initial_latents(1, p.height, p.width, generator) for p in prompts]
        images: dict[int, Image.Image] = {}
        sizes = sorted({(p.height, p.width) for p in prompts})
        for size in sizes:
            rows = [number for number, p in enumerate(prompts) if (p.height, p.width) == size]
            drawn = draw(
                self._family, [prompts[row].conditioning for row in rows], self._num_steps,
                torch.cat([noise[row] for row in rows]), *size, self._batch_size,
            )  # fmt: skip
            images |= dict(zip(rows, drawn, strict=True))
        return [images[number] for number in range(len(prompts))]


STRIP_SIDE = 512
"""Longest side in pixels of a picture in a strip; larger ones are reduced to it."""
_LOSSLESS = 256  # smaller pictures are kept to the last bit: the report and the tracker enlarge them
_WIDEST = 16383  # pixels of a WebP


def save_strip(images: Sequence[Image.Image], path: Path) -> None:
    """The pictures side by side as WebP: six of 1024 px are 16 MB as PNG, 0.9 MB so."""
    side = min(STRIP_SIDE, _WIDEST // len(images))
    reduced = [image.copy() for image in images]
    for image in reduced:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    small = max(max(image.size) for image in images) < _LOSSLESS
    picture_row(reduced).save(path, format="WEBP", lossless=small, quality=90)


def picture_row(images: Sequence[Image.Image], at_least: int = 1) -> Image.Image:
    """The pictures side by side, enlarged by a whole factor towards ``at_least`` pixels of the longest side."""
    factor = max(1, at_least // max(max(image.size) for image in images))
    large = [i.resize((i.width * factor, i.height * factor), Image.Resampling.NEAREST) for i in images]
    row = Image.new("RGB", (sum(i.width for i in large), max(i.height for i in large)), "white")
    left = 0
    for image in large:
        row.paste(image, (left, 0))
        left += image.width
    return row


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
