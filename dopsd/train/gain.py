"""What the teacher draws, shown the target. Is it really closer to it than what the student draws (the teacher's gain)?

The method works only where it is (docs/method.md): users of other tools lost days to teachers that were no better.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from dopsd.data.dataset import Example
from dopsd.distill.rollout import sample
from dopsd.files import write_tensors
from dopsd.models.base import Conditioning, Family
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


def distances(
    family: Family,
    examples: Sequence[Example],
    shown: Sequence[Conditioning],
    num_steps: int,
    batch_size: int,
    seed: int,
    done: Callable[[int], object] | None = None,
) -> Tensor:
    """Few-step samples of the selected weights, each from what is ``shown`` of its example, against the target latents.

    Returns mean squared distances ``[examples]`` in latent space, on the CPU. Equal seeds give an example equal noise,
    whatever is shown. Every example must have latents. ``done`` is told how many more are drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, example in enumerate(examples):
        groups[example.height, example.width].append(number)
    found = torch.empty(len(examples))
    for (height, width), members in groups.items():
        for start in range(0, len(members), batch_size):
            batch = members[start : start + batch_size]
            noise = torch.cat([family.initial_latents(1, height, width, generator) for _ in batch])
            targets = torch.stack([cast(Tensor, examples[number].latents) for number in batch])
            drawn = sample(family, [shown[number] for number in batch], num_steps, height, width, noise)
            found[batch] = mean_square(drawn, targets)
            if done is not None:
                done(len(batch))
    return found


def compare(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """Distances ``[examples]`` of both: ``student`` and ``teacher`` (their means), ``gain`` (the share of the student's
    distance that the teacher saves; 0 and below is none), ``improved`` (the share of examples on which it is nearer)
    and ``images``."""
    return {
        "student": float(student.mean()),
        "teacher": float(teacher.mean()),
        "gain": float(1 - teacher.mean() / student.mean()),
        "improved": float((teacher < student).float().mean()),
        "images": float(len(student)),
    }


def helps(measured: Mapping[str, float]) -> bool:
    """Whether there is something to learn from a teacher, by the numbers of :func:`compare`."""
    return measured["gain"] > 0 and measured["improved"] > 0.5


def described(measured: Mapping[str, float], num_steps: int) -> str:
    """The numbers of :func:`compare` as a sentence."""
    gain, improved = measured["gain"], measured["improved"]
    return (
        f"teacher gain: shown the target, {num_steps}-step samples are {abs(gain):.0%} "
        f"{'nearer to it' if gain >= 0 else 'further from it'}; nearer on {improved:.0%} of "
        f"{measured['images']:.0f} examples"
    )


def teacher_gain(
    family: Family, examples: Sequence[Example], num_steps: int, batch_size: int, seed: int
) -> dict[str, float] | None:
    """:func:`compare` of samples from context and from prompt, by the selected weights, with the same noise.

    ``None`` where no example has latents.
    """
    known = [example for example in examples if example.latents is not None]
    if not known:
        return None
    with tqdm(total=2 * len(known), desc="teacher gain", unit="sample", disable=None) as bar:
        student, teacher = (
            distances(family, known, shown, num_steps, batch_size, seed, bar.update)
            for shown in ([e.prompt for e in known], [e.context for e in known])
        )
    return compare(student, teacher)


def teacher_samples(
    path: Path, identity: str, family: Family, examples: Sequence[Example], num_steps: int, seed: int
) -> list[Tensor | None]:
    """A few-step sample ``[C, h, w]`` of the selected weights, shown each example's context: targets to learn from.

    They are drawn once and kept in ``path``, together with what they were drawn for, ``identity``.
    """
    if not path.exists() or _header(path) != identity:
        generator = torch.Generator().manual_seed(seed)
        drawn = {}
        for number, example in enumerate(tqdm(examples, desc="teacher samples", unit="sample", disable=None)):
            noise = family.initial_latents(1, example.height, example.width, generator)
            latents = sample(family, [example.context], num_steps, example.height, example.width, noise)
            drawn[str(number)] = latents[0].cpu().contiguous()
        write_tensors(path, drawn, {"fingerprint": identity})
    with safe_open(path, framework="pt") as file:
        return [file.get_tensor(str(number)) for number in range(len(examples))]


def _header(path: Path) -> str | None:
    """The fingerprint that a file of teacher samples was drawn for."""
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("fingerprint")
