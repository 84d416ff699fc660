"""A linear probe of style on the backbone's style features: which drawing style is this picture, as a probability.

Trained on real pictures of every style of the world, clean and degraded: a probe that has seen clean pictures only is
blind on samples, which are not clean. Concepts that are evaluated are never among the training pictures.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from ..distill.drawing import batch_of, pictures
from ..models.base import Family
from .backbones import FeatureStore
from .prompts import EvaluationError
from .world import World, world_picture

MIN_CONCEPTS = 10
MAX_CONCEPTS = 160
"""More cost seconds and add little: 160 concepts in 5 styles, clean and degraded, are 2,000 pictures."""

RoundTrip = Callable[[Sequence[Image.Image]], list[Image.Image]]
"""Pictures through the model's autoencoder and back."""


@dataclass(frozen=True)
class StyleProbe:
    """``accuracy``: on real pictures of concepts that were not trained on, clean and degraded."""

    styles: tuple[str, ...]
    model: Pipeline
    accuracy: dict[str, float]
    counts: dict[str, int]

    def probabilities(self, features: Tensor) -> Tensor:
        """``float32 [N, styles]`` of style features ``[N, D]``."""
        if len(features) == 0:
            return torch.empty(0, len(self.styles))
        return torch.from_numpy(self.model.predict_proba(features.numpy())).float()

    def probability(self, features: Tensor, styles: Sequence[str]) -> Tensor:
        """Probability ``[N]`` that row i is drawn in ``styles[i]``."""
        wanted = torch.tensor([self.styles.index(style) for style in styles], dtype=torch.int64)
        return self.probabilities(features).gather(1, wanted[:, None])[:, 0]

    def hits(self, features: Tensor, styles: Sequence[str]) -> Tensor:
        """1 where the most probable style of row i is ``styles[i]``, else 0: ``float32 [N]``."""
        wanted = torch.tensor([self.styles.index(style) for style in styles], dtype=torch.int64)
        return (self.probabilities(features).argmax(1) == wanted).float()


def round_trip(family: Family, side: int, batch: int) -> RoundTrip:
    """Pictures as squares of ``side`` pixels through the base's own autoencoder: samples carry its traces, and the
    probe must not trip over them."""

    def through(images: Sequence[Image.Image]) -> list[Image.Image]:
        return decoded(family, [image.resize((side, side)) for image in images], batch)

    return through


def decoded(family: Family, images: Sequence[Image.Image], batch: int) -> list[Image.Image]:
    """Pictures of one size through the base's own autoencoder, at most ``batch`` at a time."""
    out: list[Image.Image] = []
    if images:
        width, height = images[0].size
        batch = batch_of(height, width, batch)
    for start in range(0, len(images), batch):
        out += pictures(family, family.encode_images(images[start : start + batch]), height, width)
    return out


def train_probe(
    world: World, evaluated: Sequence[int], features: FeatureStore, through: RoundTrip | None, seed: int
) -> StyleProbe:
    """Fit the probe on the world's concepts except ``evaluated``, on which its accuracy is measured.

    Every training picture comes clean and once degraded; ``through`` (:func:`round_trip`) adds a third copy of every
    second one. At most :data:`MAX_CONCEPTS` concepts are trained on, drawn by ``seed``; where fewer than ten are
    evaluated, others that are not trained on are measured too. Raises :class:`EvaluationError` where fewer
    than ten are left to train on.
    """
    styles = tuple(world.pictures)
    draw = np.random.default_rng(seed)
    rest = [int(i) for i in draw.permutation(sorted(set(range(len(world.labels))) - set(evaluated)))]
    extra = max(0, MIN_CONCEPTS - len(set(evaluated)))
    held, train = sorted({*evaluated, *rest[:extra]}), sorted(rest[extra:][:MAX_CONCEPTS])
    if len(train) < MIN_CONCEPTS:
        raise EvaluationError(
            f"style probe: {len(train)} concepts are left to train it on, at least {MIN_CONCEPTS} are needed; lower "
            "evaluation.max_prompts or evaluation.known_prompts"
        )
    clean, clean_y = _pictures(world, styles, train)
    copies = [("real pictures", clean, clean_y), ("degraded", [degrade(image, draw) for image in clean], clean_y)]
    if through is not None:
        copies.append(("through the autoencoder", through(clean[::2]), clean_y[::2]))
    x = torch.cat([features.style(features(images, f"style probe, {name}")) for name, images, _ in copies])
    y = np.concatenate([labels for _, _, labels in copies])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=1000, random_state=seed % 2**32))
    model.fit(x.numpy(), y)
    test, test_y = _pictures(world, styles, held)
    every = slice(None, None, max(1, len(test) // 150))
    bad = [degrade(image, draw) for image in test[every]]
    probe = StyleProbe(styles, model, {}, {"training_pictures": len(y), "concepts_measured": len(held)})
    for name, images, labels in (("clean", test, test_y), ("degraded", bad, test_y[every])):
        hits = probe.hits(features.style(features(images)), [styles[i] for i in labels])
        probe.accuracy[name] = float(hits.mean())
    return probe


def _pictures(world: World, styles: Sequence[str], concepts: Sequence[int]) -> tuple[list[Image.Image], np.ndarray]:
    images = [world_picture(world, style, i) for style in styles for i in concepts]
    return images, np.repeat(np.arange(len(styles)), len(concepts))


def degrade(image: Image.Image, draw: np.random.Generator) -> Image.Image:
    """One random flaw of a sampler: blur, noise, block artefacts, or lost contrast; deterministic in ``draw``."""
    kind = int(draw.integers(4))
    strength = float(draw.uniform(0.2, 1.0))
    if kind == 0:
        return image.filter(ImageFilter.GaussianBlur(1.8 * strength * image.width / 64))
    if kind == 1:
        pixels = np.asarray(image, dtype=np.float32)
        noisy = pixels + draw.normal(0, 40 * strength, pixels.shape)
        return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    if kind == 2:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=int(60 - 52 * strength))
        with Image.open(buffer) as decoded:
            return decoded.convert("RGB")
    pale = ImageEnhance.Contrast(image).enhance(1 - 0.6 * strength)
    return ImageEnhance.Color(pale).enhance(1 - 0.4 * strength)
