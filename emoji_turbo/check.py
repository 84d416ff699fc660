"""``emoji-turbo check``: is the embedded base good enough to make claims in? (docs/emoji-turbo.md lists the aims.)

Measured on the files that are shipped, over three seeds, as shares of the same score of real pictures. What many steps
would give is asked of the base itself, at 32 steps; the guided model it was distilled from is not shipped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models import AutoencoderKL
from PIL import Image
from torch import Tensor

from dopsd.config.groups import ModelSettings
from dopsd.models.base import Family, Request

from .batches import DEFAULT_STYLE
from .captions import caption, concept_caption
from .pictures import BASE_STYLES, NEW_STYLES, World
from .transforms import TECHNIQUES
from .vae import psnr

if TYPE_CHECKING:
    from dopsd.evaluation.backbones import FeatureStore
    from dopsd.evaluation.probe import StyleProbe

SEEDS = (0, 1, 2)
PROMPTS = 60
FEW_STEPS = 4


@dataclass(frozen=True)
class Line:
    """One row of the check: what was measured, over the seeds, and what was aimed at."""

    name: str
    value: float
    spread: float
    aim: str
    met: bool

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def check(root: Path) -> list[Line]:
    """Measure ``data/base/emoji-turbo`` against the world beside it; writes ``docs/base-check.json``."""
    from dopsd.evaluation.backbones import FeatureStore, load_backbone
    from dopsd.evaluation.probe import round_trip, train_probe
    from dopsd.models import load_family

    world = World.load(root / "data" / "base" / "emoji-turbo" / "world")
    base = root / "data" / "base" / "emoji-turbo"
    family = load_family(ModelSettings(path=str(base), device="cpu", context_pixels=(64 * 64, 128 * 128)), root)
    features = FeatureStore(load_backbone(), root / ".cache" / "features.safetensors")
    evaluated = list(world.known)[:: max(1, len(world.known) // PROMPTS)][:PROMPTS]
    probe = train_probe(world, evaluated, features, round_trip(family, 64, 32), seed=0)
    judge = _Judge(world, evaluated, features, probe)
    vae = AutoencoderKL.from_pretrained(base / "vae", use_safetensors=True).float()
    lines = _reconstruction(vae, world) + _drawing(family, judge) + _teaching(family, judge)
    features.save()
    out = root / "docs" / "base-check.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps([line.as_dict() for line in lines], indent=1) + "\n", encoding="utf-8")
    return lines


class _Judge:
    """Scores samples of the evaluated concepts: style by the probe, thing by the nearest true picture."""

    def __init__(self, world: World, evaluated: Sequence[int], features: FeatureStore, probe: StyleProbe) -> None:
        self.world, self.evaluated, self.features, self.probe = world, list(evaluated), features, probe

    def style(self, images: Sequence[Image.Image], style: str) -> float:
        """Mean probability that the pictures are drawn in ``style``."""
        seen = self.features.style(self.features.backbone(images))
        return float(self.probe.probability(seen, [style] * len(images)).mean())

    def concept(self, images: Sequence[Image.Image], style: str) -> float:
        """Share of pictures whose own true picture is the nearest of all evaluated ones (style's mean subtracted)."""
        from dopsd.evaluation.metrics import retrieval_rank

        truth = self.features.content(self.features(self.real(style)))
        seen = self.features.content(self.features.backbone(images))
        rank = retrieval_rank(seen, truth, torch.arange(len(images)), center=truth.mean(0))
        return float((rank == 0).float().mean())

    def real(self, style: str) -> list[Image.Image]:
        """The true pictures of the evaluated concepts, in a style or a technique."""
        from dopsd.evaluation.world import world_picture

        if style in TECHNIQUES:
            plain = (self.world.pictures[DEFAULT_STYLE][i].float() / 255 for i in self.evaluated)
            worked = (TECHNIQUES[style](picture).mul(255).round().byte() for picture in plain)
            return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in worked]
        return [world_picture(self.world, style, i) for i in self.evaluated]


def _reconstruction(vae: AutoencoderKL, world: World) -> list[Line]:
    lines = []
    for style in (*BASE_STYLES, *NEW_STYLES):
        value = psnr(vae, world.pictures[style][list(world.held_out)])
        aim = 24.0 if style == "ink" else 28.0
        lines.append(Line(f"VAE PSNR on held-out things, {style} (dB)", value, 0.0, f">= {aim:g}", value >= aim))
    return lines


def _drawing(family: Family, judge: _Judge) -> list[Line]:
    """Text only: is the right thing drawn, in the right style? Techniques are no styles of the probe's."""
    lines = []
    for technique in TECHNIQUES:
        prompts = family.encode_prompt([Request(caption(judge.world.labels[i], technique)) for i in judge.evaluated])
        top = judge.concept(judge.real(technique), technique)
        drawn = [judge.concept(_draw(family, prompts, FEW_STEPS, seed), technique) / max(top, 1e-9) for seed in SEEDS]
        lines.append(_line(f"concept of ceiling, {technique}, {FEW_STEPS} steps", torch.tensor(drawn), 0.6))
    for style in BASE_STYLES:
        prompts = family.encode_prompt([Request(caption(judge.world.labels[i], style)) for i in judge.evaluated])
        few = [_draw(family, prompts, FEW_STEPS, seed) for seed in SEEDS]
        many = [_draw(family, prompts, 32, SEEDS[0])]
        ceiling = judge.real(style)
        for name, score in (("style", judge.style), ("concept", judge.concept)):
            top = score(ceiling, style)
            values = torch.tensor([score(images, style) / max(top, 1e-9) for images in few])
            steps = score(many[0], style) / max(top, 1e-9)
            lines.append(_line(f"{name} of ceiling, {style}, {FEW_STEPS} steps", values, 0.6))
            gap = float(values[0]) - steps
            lines.append(
                Line(f"{name}, {style}: {FEW_STEPS} steps minus 32 steps", gap, 0.0, "within 0.1", abs(gap) <= 0.1)
            )
    return lines


def _teaching(family: Family, judge: _Judge) -> list[Line]:
    """Shown one picture of a style it has never seen, does the base draw other things in that style?"""
    lines = []
    for style in NEW_STYLES:
        captions = [concept_caption(judge.world.labels[i]) for i in judge.evaluated]
        real = judge.real(style)
        ceiling = judge.style(real, style)
        shown = real[1:] + real[:1]  # another thing of the style
        requests = [Request(text) for text in captions]
        alone, context = family.encode_prompt(requests), family.encode_context(requests, shown)
        taught = torch.tensor([judge.style(_draw(family, context, FEW_STEPS, s), style) / ceiling for s in SEEDS])
        untaught = torch.tensor([judge.style(_draw(family, alone, FEW_STEPS, s), style) / ceiling for s in SEEDS])
        lines.append(_line(f"style {style} of ceiling, shown one picture", taught, 0.5))
        value = float(untaught.mean())
        lines.append(Line(f"style {style} of ceiling, text alone", value, float(untaught.std()), "< 0.1", value < 0.1))
    return lines


def _line(name: str, values: Tensor, aim: float) -> Line:
    mean = float(values.mean())
    return Line(name, mean, float(values.std()), f">= {aim:g}", mean >= aim)


def _draw(family: Family, conditioning: Sequence, steps: int, seed: int) -> list[Image.Image]:
    from dopsd.distill.rollout import sample

    images: list[Image.Image] = []
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(conditioning), 30):
        chunk = conditioning[start : start + 30]
        images += family.decode(sample(family, chunk, steps, 64, 64, generator=generator))
    return images
