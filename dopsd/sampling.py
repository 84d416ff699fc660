"""Pictures for a person: ``dopsd sample``. Everything is encoded first, then drawn one at a time."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL.Image import Image
from tqdm import tqdm

from dopsd.config import Settings
from dopsd.data.images import MULTIPLE, bucket_size, load_image
from dopsd.distill.adapters import adapter_applied
from dopsd.distill.drawing import draw as draw_pictures
from dopsd.given import as_trained, find_given
from dopsd.models import ModelError, family_class
from dopsd.models.base import Configs, Request
from dopsd.models.reading import reader_of
from dopsd.models.sizes import configurations, skeleton
from dopsd.params import MAX_SEED
from dopsd.project import load_base

MAX_SIDE = 4096


def size_of(text: str | None, references: Sequence[Image], settings: Settings) -> tuple[int, int]:
    """(width, height) of ``WIDTHxHEIGHT``; without it the first reference's shape, or a square, of the trained area.

    Raises :class:`ModelError` where that cannot be drawn.
    """
    side = settings.data.resolution
    if text is None:
        return bucket_size(*references[0].size, side) if references else (side, side)
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    sides = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(0 < side <= MAX_SIDE and side % MULTIPLE == 0 for side in sides):
        raise ModelError(
            f"--size {text}: expected WIDTHxHEIGHT, multiples of {MULTIPLE} up to {MAX_SIDE}, for example 1024x768"
        )
    return sides


def read_references(paths: Sequence[Path], settings: Settings) -> tuple[Image, ...]:
    """The pictures to edit. Raises :class:`ModelError` where the family does not edit, ``ImageError`` for bad files."""
    if paths and not family_class(settings.model).edits:
        raise ModelError(f"--reference: {settings.model.family} does not edit pictures; leave it out")
    return tuple(load_image(path, settings.data.max_pixels, partial(_warn, path)) for path in paths)


def _warn(path: Path, remark: str) -> None:
    print(f"warning: {path}: {remark}")


def check_prompts(prompts: Sequence[str], settings: Settings, root: Path) -> None:
    """Raise :class:`ModelError` for a prompt that the base cannot read to its end, as far as that is known here."""
    reader = reader_of(settings, root)
    for number, prompt in enumerate(prompts, start=1):
        if wrong := reader.as_prompt(prompt):
            raise ModelError(f"--prompt, number {number}: {wrong}")


def seeds_of(given: Sequence[int], prompts: int) -> list[int]:
    """A seed for each prompt: those given, or from the one that is given (or 0) on. Raises :class:`ModelError`."""
    if len(given) > 1 and len(given) != prompts:
        raise ModelError(f"--seed: {len(given)} seeds for {prompts} prompts; give one for each, or one alone")
    first = given[0] if given else 0
    seeds = list(given) if len(given) > 1 else list(range(first, first + prompts))
    if wrong := [seed for seed in seeds if not 0 <= seed <= MAX_SEED]:
        raise ModelError(f"--seed: {wrong[0]}: expected a number from 0 to {MAX_SEED}")
    return seeds


def draw(
    prompts: Sequence[str], references: tuple[Image, ...], settings: Settings, root: Path, adapter: Path | None,
    width: int, height: int, steps: int, seeds: Sequence[int],
) -> Iterator[Image]:  # fmt: skip
    """A picture per prompt and its seed, each with the same references, by the base or base + adapter: ours, an export
    of ours, or trained weights. Raises :class:`~dopsd.distill.targets.AdapterError` for what cannot be taken, before
    any weight is loaded, and before the base is fetched where its configuration is known."""
    check_prompts(prompts, settings, root)
    given, kind = adapter and find_given(adapter), family_class(settings.model)
    known = configurations(settings.model, root) if given else None
    with tempfile.TemporaryDirectory(prefix="dopsd-given-") as place:

        def as_ours(configs: Configs) -> Path | None:
            out = Path(place) / "a.safetensors"
            return given and as_trained(given, out, skeleton("transformer", configs, kind), kind)

        file = as_ours(known) if known else None
        family = load_base(settings, root, use="draw")  # its files are here now, and nothing of it is in memory
        check_prompts(prompts, settings, root)  # exactly now, wherever the base came from
        file = file or as_ours(family.parts.configs)
        encoded = [family.encode_prompt([Request(prompt, references)])[0] for prompt in prompts]
        family.release_encoders()
        with adapter_applied(family.transformer, file):
            pictures = tqdm(encoded, desc="sample", unit="picture", disable=None if len(encoded) > 1 else True)
            for conditioning, seed in zip(pictures, seeds, strict=True):
                noise = family.initial_latents(1, height, width, torch.Generator().manual_seed(seed))
                yield from draw_pictures(family, [conditioning], steps, noise, height, width, most=1)
