"""Teacher gain, measured before training: is the teacher, shown the target, really closer to it than the student?

The method works only where it is (docs/method.md): users of other tools lost days to teachers that were no better.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from dopsd.data.dataset import Example
from dopsd.distill.rollout import sample
from dopsd.models.base import Family
from dopsd.train.observer import mean_square


def choose(examples: Sequence[Example], count: int) -> list[Example]:
    """Up to ``count`` examples with latents: one per image first, then further captions, in a fixed order."""
    seen: defaultdict[int, int] = defaultdict(int)
    ranked = []
    for number, example in enumerate(examples):
        if example.latents is not None:
            ranked.append((seen[example.image_index], number))
            seen[example.image_index] += 1
    return [examples[number] for _, number in sorted(ranked)[:count]]


def teacher_gain(
    family: Family, examples: Sequence[Example], num_steps: int, batch_size: int, seed: int
) -> dict[str, float] | None:
    """Few-step samples of the selected weights from context and from prompt, same noise, against the target latents.

    Returns ``student`` and ``teacher`` (mean squared distance to the target in latent space), ``gain`` (the share of
    the student's distance that the teacher saves; 0 and below is none), ``improved`` (the share of examples on which
    it is nearer) and ``images``. ``None`` where no example has latents.
    """
    generator = torch.Generator().manual_seed(seed)
    groups: dict[tuple[int, int], list[Example]] = defaultdict(list)
    for example in examples:
        if example.latents is not None:
            groups[example.height, example.width].append(example)
    if not groups:
        return None
    student: list[Tensor] = []
    teacher: list[Tensor] = []
    for (height, width), members in groups.items():
        for start in range(0, len(members), batch_size):
            batch = members[start : start + batch_size]
            noise = torch.cat([family.initial_latents(1, height, width, generator) for _ in batch])
            targets = torch.stack([e.latents for e in batch if e.latents is not None])
            for distances, conditioning in (
                (student, [e.prompt for e in batch]),
                (teacher, [e.context for e in batch]),
            ):
                distances.append(mean_square(sample(family, conditioning, num_steps, height, width, noise), targets))
    far, near = torch.cat(student), torch.cat(teacher)
    return {
        "student": float(far.mean()),
        "teacher": float(near.mean()),
        "gain": float(1 - near.mean() / far.mean()),
        "improved": float((near < far).float().mean()),
        "images": float(len(far)),
    }
