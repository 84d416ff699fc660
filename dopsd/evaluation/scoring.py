"""From samples to scores: one number per prompt and score, against real pictures whose features are known."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from . import metrics
from .backbones import FeatureStore
from .probe import StyleProbe, world_picture
from .prompts import Prompt
from .world import World

Values = NDArray[np.float64]
MIN_KID = 10
"""With fewer pictures on a side a distance of distributions is mere chance."""


@dataclass(frozen=True)
class Cell:
    """The scores of one model at one number of steps on the first N prompts of a split.

    ``values``: score to ``[N]``. ``content``: the samples' content features ``[N, D]``, for the scores of sets.
    """

    values: dict[str, Values]
    content: Tensor = field(repr=False)

    def first(self, count: int) -> Cell:
        """The same on the first ``count`` prompts only."""
        return Cell({key: value[:count] for key, value in self.values.items()}, self.content[:count])


def by_size(prompts: Sequence[Prompt]) -> dict[tuple[int, int], list[int]]:
    """Positions of the prompts of each (height, width)."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        groups[prompt.height, prompt.width].append(i)
    return dict(groups)


class Scorer:
    """The scores of one split. Which ones there are follows from what is known of it (:attr:`omitted` says why not).

    ``evaluated``: concepts of the world that any split asks for; the distribution is compared with the others.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        features: FeatureStore,
        training: Sequence[Image.Image],
        probe: StyleProbe | None,
        world: World | None,
        evaluated: Sequence[int],
    ) -> None:
        self.prompts, self.features, self.probe = list(prompts), features, probe
        self.omitted: dict[str, str] = {}
        self._training = features.content(features(training))
        truths = [p.truth for p in prompts if p.truth is not None]
        self._has_truth = len(truths) == len(prompts) > 0
        self._truth = features.content(features(truths)) if self._has_truth else None
        self._energy = float(_energies(truths if self._has_truth else training).mean())
        self._styles = [p.style for p in prompts if p.style is not None] if _all(prompts, "style") else None
        self._known_styles = world.styles if world is not None else ()
        self._world = self._world_features(world) if world is not None else {}
        self._center = self._centers()
        self._others = self._kid_reference(world, evaluated)
        self.candidates = len(world.labels) if world is not None and self._styles is not None else 0
        """Among how many pictures the right one has to be found."""
        self._explain(world)

    def score(self, images: Sequence[Image.Image]) -> Cell:
        """Scores of samples for the first ``len(images)`` prompts, in order."""
        both = self.features.backbone(images)
        content, style = self.features.content(both), self.features.style(both)
        n = len(images)
        values: dict[str, Tensor] = {"sharpness": _energies(images) / self._energy}
        center = self._center[:n] if self._center is not None else None
        base_center = self._base_center()
        values["train_similarity"] = metrics.set_similarity(content, self._training, base_center)
        if self.probe is not None and self._styles is not None:
            values["style"] = self.probe.probability(style, self._styles[:n])
            values["style_hit"] = self.probe.hits(style, self._styles[:n])
        if self._truth is not None:
            values["cosine"] = metrics.cosine(content, self._truth[:n], center)
            values |= self._pixel_scores(images)
        if self._styles is not None and _all(self.prompts, "concept"):
            rank = self._ranks(content)
            values["concept_top1"], values["concept_top5"] = (rank < 1).float(), (rank < 5).float()
        return Cell({key: value.double().numpy() for key, value in values.items()}, content)

    def kid(self, cell: Cell, real: bool = False) -> float | None:
        """Distance of the samples' distribution to real pictures; ``None`` where there are too few of either.

        ``real``: the samples are the true pictures, which cannot be compared with themselves.
        """
        if self._others is None or min(len(cell.content), len(self._others)) < MIN_KID:
            return None
        if real and self._others is self._truth:
            return None
        return metrics.kid(cell.content, self._others)

    def real(self) -> Cell | None:
        """The scores of the true pictures themselves: the ceiling."""
        truths = [p.truth for p in self.prompts if p.truth is not None]
        return self.score(truths) if self._has_truth else None

    # --- what is compared with ----------------------------------------------------------------------------------------

    def _world_features(self, world: World) -> dict[str, Tensor]:
        wanted = [*world.styles, *(self._styles or [])]
        return {
            style: self.features.content(
                self.features([world_picture(world, style, i) for i in range(len(world.labels))], f"real: {style}")
            )
            for style in dict.fromkeys(wanted)
        }

    def _base_center(self) -> Tensor | None:
        """The mean feature of the base's own pictures: what all drawings have in common."""
        return torch.cat([self._world[style] for style in self._known_styles]).mean(0) if self._world else None

    def _centers(self) -> Tensor | None:
        """What is subtracted before things are compared, ``[N, D]``: the mean of each prompt's style."""
        if not self._has_truth:
            return None
        if self._styles is not None and self._world:
            return torch.stack([self._world[style].mean(0) for style in self._styles])
        base = self._base_center()
        return base.expand(len(self.prompts), -1) if base is not None else None

    def _kid_reference(self, world: World | None, evaluated: Sequence[int]) -> Tensor | None:
        if self._styles is not None and world is not None:
            others = sorted(set(range(len(world.labels))) - set(evaluated))
            return torch.cat([self._world[style][others] for style in dict.fromkeys(self._styles)])
        return self._truth

    def _ranks(self, content: Tensor) -> Tensor:
        """Rank of each sample's own concept among all the world's pictures in the style that was asked for."""
        assert self._styles is not None
        ranks = torch.empty(len(content), dtype=torch.int64)
        for style in dict.fromkeys(self._styles[: len(content)]):
            rows = [i for i in range(len(content)) if self._styles[i] == style]
            truth = torch.tensor([self.prompts[i].concept or 0 for i in rows])
            candidates = self._world[style]
            ranks[rows] = metrics.retrieval_rank(content[rows], candidates, truth, candidates.mean(0))
        return ranks

    def _pixel_scores(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        out = {"mse": torch.empty(len(images)), "structure": torch.empty(len(images))}
        for rows in by_size(self.prompts[: len(images)]).values():
            truths = [truth for i in rows if (truth := self.prompts[i].truth) is not None]
            samples = [images[i] for i in rows]
            out["mse"][rows] = metrics.pixel_mse(metrics.stack(samples), metrics.stack(truths))
            small, right = (metrics.stack(pictures, metrics.STRUCTURE_SIZE) for pictures in (samples, truths))
            out["structure"][rows] = metrics.structure(small, right)
        return out

    def _explain(self, world: World | None) -> None:
        if not self._has_truth:
            reason = "there are no held-out pictures: add holdout/ to the data set"
            for key in ("cosine", "structure", "mse", "kid"):
                self.omitted[key] = reason
        elif min(len(self.prompts), len(self._others) if self._others is not None else 0) < MIN_KID:
            self.omitted["kid"] = f"fewer than {MIN_KID} held-out pictures: a distribution cannot be compared"
        if self.probe is None or self._styles is None:
            why = "no world of labelled styles belongs to this base"
            if world is not None:
                why = "the concept is no style of the world"
            self.omitted["style"] = f"{why}; similarity to the training pictures stands in for it"
            reason = f"{why}, so there are no candidates to choose among"
            self.omitted |= {"style_hit": reason, "concept_top1": reason, "concept_top5": reason}


def interval(samples: Values) -> tuple[float, float]:
    """The 95 % percentile interval of bootstrap values; resamples without a value (0 / 0) are left out."""
    finite = samples[np.isfinite(samples)]
    if len(finite) == 0:
        return float("nan"), float("nan")
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)


class Bootstrap:
    """Seeded resamples of prompts: the same ones for every model, so that differences are paired."""

    def __init__(self, seed: int, resamples: int = 1000) -> None:
        self._seed, self._resamples = seed, resamples
        self._indices: dict[int, NDArray[np.int64]] = {}

    def means(self, values: Values) -> Values:
        """Means ``[resamples]`` of ``values [N]`` under resampling of the prompts."""
        n = len(values)
        if n not in self._indices:
            self._indices[n] = np.random.default_rng(self._seed).integers(0, n, (self._resamples, n))
        return values[self._indices[n]].mean(1)


def _all(prompts: Sequence[Prompt], name: str) -> bool:
    return bool(prompts) and all(getattr(p, name) is not None for p in prompts)


def _energies(pictures: Sequence[Image.Image]) -> Tensor:
    """Laplacian energy of each picture, ``[N]``; sizes may differ."""
    out = torch.empty(len(pictures))
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, picture in enumerate(pictures):
        groups[picture.size].append(i)
    for rows in groups.values():
        out[rows] = metrics.laplacian_energy(metrics.stack([pictures[i] for i in rows]))
    return out
