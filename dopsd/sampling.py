"""Pictures for a person: ``dopsd sample``. Everything is encoded first, then drawn one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL.Image import Image
from tqdm import tqdm

from dopsd.config import Settings
from dopsd.data.images import load_image
from dopsd.distill.adapters import adapter_applied
from dopsd.distill.rollout import sample
from dopsd.models import ModelError, family_class
from dopsd.models.base import Request
from dopsd.stages import load_base

MAX_SIDE = 4096


def size_of(text: str | None, settings: Settings) -> tuple[int, int]:
    """(width, height) of ``WIDTHxHEIGHT``; raises :class:`ModelError` where the family cannot draw that."""
    if text is None:
        return settings.data.resolution, settings.data.resolution
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    multiple = family_class(settings.model).multiple
    sides = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(0 < side <= MAX_SIDE and side % multiple == 0 for side in sides):
        raise ModelError(f"--size {text}: expected WIDTHxHEIGHT, multiples of {multiple} up to {MAX_SIDE}, "
                         "for example 1024x768")  # fmt: skip
    return sides


def draw(
    prompts: Sequence[str], references: Sequence[Path], settings: Settings, root: Path, adapter: Path | None,
    steps: int, width: int, height: int, seed: int,
) -> Iterator[Image]:  # fmt: skip
    """A picture per prompt, each with the same references, by the base or base + adapter."""
    if references and not family_class(settings.model).edits:
        raise ModelError(f"--reference: {settings.model.family} does not edit pictures; leave it out")
    pictures = tuple(load_image(path, settings.data.max_pixels) for path in references)
    family = load_base(settings, root, teacher=False)
    encoded = [family.encode_prompt([Request(prompt, pictures)])[0] for prompt in prompts]
    family.release_encoders()
    generator = torch.Generator().manual_seed(seed)
    with adapter_applied(family.transformer, adapter):
        for conditioning in tqdm(encoded, desc="sample", unit="picture", disable=None if len(encoded) > 1 else True):
            noise = family.initial_latents(1, height, width, generator)
            yield family.decode(sample(family, [conditioning], steps, height, width, noise))[0]
