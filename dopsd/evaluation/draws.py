"""What is drawn: every model at its numbers of steps, each prompt from the same noise, a batch at a time.

A job is one model on the first prompts of a split. Pictures of a job come batch by batch, and whoever takes them keeps
of them what it needs: no more than a batch is in memory at once.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from PIL.Image import Image

from dopsd.config.groups import EvaluationSettings
from dopsd.distill.adapters import adapter_applied
from dopsd.distill.drawing import batch_of, draw
from dopsd.distill.weights import holds_weights
from dopsd.models.base import Conditioning, Family
from dopsd.train.workers import Workers

from .prompts import CONCEPT, KEPT, NEAR, NEAR_PROMPTS, REWRITE, EvaluationError, Prompt
from .protocol import TESTS

_OTHER_NOISE = 500_000
"""From a prompt's number to that of its second noise: more than prompts of one split are apart."""


@dataclass(frozen=True)
class Subject:
    """A model to evaluate: ``base``, ``teacher`` (both untuned, ``adapter`` is ``None``), or a label of an adapter."""

    name: str
    adapter: Path | None


class Key(NamedTuple):
    """Which pictures: of a split, by a model, with so many steps (0: real ones), from the first noise or another."""

    split: str
    model: str
    steps: int
    noise: int = 0


@dataclass(frozen=True)
class Job:
    """One model's pictures of the first ``len(prompts)`` prompts of a split."""

    key: Key
    adapter: Path | None
    prompts: Sequence[Prompt]
    conditioning: Sequence[Conditioning]


@dataclass(frozen=True)
class Part:
    """One batch of pictures of one size: ``rows`` of the job's prompts, each with its own noise."""

    key: Key
    adapter: Path | None
    height: int
    width: int
    rows: list[int]
    seeds: list[int]
    conditioning: list[Conditioning]


def wanted(split: str, model: str, count: int, asked: EvaluationSettings) -> Iterator[tuple[int, int, int]]:
    """(steps, noise, how many) of a model's pictures of a split with ``count`` prompts. With few steps all, with others
    the curve's. Of a second noise: the concept's, for diversity, and the general prompts, whose distance between two
    noises is the base's own measure of far."""
    few, many, curve = asked.few, asked.many, min(asked.curve_prompts, count)
    if split == CONCEPT:
        yield from ((steps, 0, count if steps == few else curve) for steps in asked.steps)
    elif model == "teacher":
        return
    else:
        yield few, 0, count
    if model != "teacher" and split == CONCEPT:
        yield few, 1, curve
    if split == KEPT or (split == NEAR and model == "base"):
        yield few, 1, count
    if split == KEPT and many != few:
        yield many, 0, curve
        if model == "base":
            yield many, 1, curve


def drawn_at_most(evaluation: EvaluationSettings, tuned: int, training: int) -> tuple[int, int]:
    """Pictures, and steps towards them, of an evaluation of base, teacher and ``tuned`` models of a base without a
    world; ``training``: how many training pictures there are, by which the published protocol asks."""
    ours, general = evaluation.protocol == "ours", evaluation.kept_prompts
    kept = evaluation.kept_count if isinstance(general, str) else min(evaluation.kept_count, len(general))
    counts = {CONCEPT: evaluation.max_prompts if ours else TESTS * training, REWRITE: 0 if ours else training,
              KEPT: kept, NEAR: min(NEAR_PROMPTS, training)}  # fmt: skip
    drawn = [
        (number, steps * number)
        for model in ("base", "teacher", *["tuned"] * tuned)
        for split, count in counts.items()
        for steps, _, number in wanted(split, model, count, evaluation)
    ]
    return sum(pictures for pictures, _ in drawn), sum(steps for _, steps in drawn)


def by_size(prompts: Sequence[Prompt]) -> dict[tuple[int, int], list[int]]:
    """Positions of the prompts of each (height, width)."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        groups[prompt.height, prompt.width].append(i)
    return dict(groups)


def parts_of(job: Job, seed: int, most: int) -> Iterator[Part]:
    """A job's batches, at most ``most`` pictures of one size and of similar caption length each. ``seed``: the
    evaluation's."""
    for (height, width), rows in by_size(job.prompts).items():
        rows = sorted(rows, key=lambda i: max(len(tensor) for tensor in job.conditioning[i].values()))
        size = batch_of(height, width, most)
        for start in range(0, len(rows), size):
            chosen = rows[start : start + size]
            seeds = [_seed(job.prompts[i], job.key.noise, seed) for i in chosen]
            yield Part(job.key, job.adapter, height, width, chosen, seeds, [job.conditioning[i] for i in chosen])


def _seed(prompt: Prompt, noise: int, seed: int) -> int:
    """Of a prompt's noise, whatever batch it is drawn in; torch takes 64 bits."""
    if prompt.seed is not None and noise == 0:
        return prompt.seed
    return (seed * 1_000_003 + prompt.number + noise * _OTHER_NOISE) % 2**64


def draw_all(family: Family, parts: Sequence[Part], workers: Workers | None) -> Iterator[tuple[Part, list[Image]]]:
    """Every part with its pictures, in order. Raises :class:`EvaluationError` where memory does not do for one."""
    paths = {part.adapter for part in parts if part.adapter is not None}
    # trained weights are gigabytes: they are not sent about with every part, one process draws with them
    if workers is not None and not any(map(holds_weights, paths)):
        files: Mapping[Path, bytes] = {path: path.read_bytes() for path in paths}
        sent = [(part, files[part.adapter] if part.adapter else None) for part in parts]
        yield from zip(parts, workers.map(_draw_with, sent), strict=True)
        return
    for adapter, group in groupby(parts, key=lambda part: part.adapter):
        with adapter_applied(family.transformer, adapter):
            for part in group:
                yield part, _draw(family, part)


def _draw_with(family: Family, sent: tuple[Part, bytes | None]) -> list[Image]:
    """As :func:`_draw`, on a machine that may not see this one's disk: the adapter's file comes along."""
    part, content = sent
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        if content is not None:
            path.write_bytes(content)
        with adapter_applied(family.transformer, None if content is None else path):
            return _draw(family, part)


def _draw(family: Family, part: Part) -> list[Image]:
    noise = torch.cat([
        family.initial_latents(1, part.height, part.width, torch.Generator().manual_seed(seed)) for seed in part.seeds
    ])  # fmt: skip
    try:
        return draw(family, part.conditioning, part.key.steps, noise, part.height, part.width, len(part.rows))
    except torch.OutOfMemoryError as error:
        raise EvaluationError(
            f"evaluate: {family.device} has no memory for one picture of {part.width} x {part.height} pixels; free "
            f"some of it (other programs?) or lower data.resolution ({str(error).splitlines()[0]})"
        ) from None
