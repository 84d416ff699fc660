"""From samples to scores: one number per prompt and score, against real pictures whose features are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dopsd.data.pictures import Picture
from dopsd.distill.drawing import batch_of

from . import metrics
from .backbones import FeatureStore, kind_of
from .copies import Copies
from .draws import by_size
from .probe import StyleProbe
from .prompts import Prompt
from .world import World, world_picture

Values = NDArray[np.float64]
NO_SCORES = frozenset({"nearest", "copy_bar"})
"""What cells hold beside scores: a place, and a bar."""
MIN_KID = 10
"""With fewer pictures on a side a distance of distributions is mere chance."""
BATCH = 64
"""Small pictures that are looked at together; large ones come alone."""


@dataclass(frozen=True)
class Cell:
    """What is known of one model's pictures of the first N prompts of a split.

    ``values``: score to ``[N]``. ``features``: backbone to ``[N, D]``, the first one's first.
    """

    values: dict[str, Values]
    features: dict[str, Tensor] = field(repr=False)

    def __len__(self) -> int:
        return len(next(iter(self.features.values())))

    def first(self, count: int) -> Cell:
        """The same on the first ``count`` prompts only."""
        values = {key: value[:count] for key, value in self.values.items()}
        return Cell(values, {name: each[:count] for name, each in self.features.items()})


def in_order(parts: Sequence[tuple[Sequence[int], Cell]]) -> Cell:
    """One cell of several that hold the rows beside them, in the order of the rows."""
    order = np.argsort(np.concatenate([np.asarray(rows, dtype=np.int64) for rows, _ in parts]))
    cells = [cell for _, cell in parts]
    values = {key: np.concatenate([cell.values[key] for cell in cells])[order] for key in cells[0].values}
    features = {name: torch.cat([cell.features[name] for cell in cells])[order] for name in cells[0].features}
    return Cell(values, features)


class Training:
    """What is known of the training pictures, for the scorers of all splits: features of every backbone ``[M, D]``, the
    mean Laplacian energy, and what copies are told by."""

    def __init__(self, pictures: Sequence[Picture], stores: Sequence[FeatureStore]) -> None:
        self.features = {store.backbone.name: features_of(store, pictures) for store in stores}
        self.energy = _energy(pictures)
        self.copies = Copies(pictures, self.features[stores[0].backbone.name])


class Scorer:
    """The scores of one split. Which ones there are follows from what is known of it (:attr:`omitted` says why not).

    Pictures are measured batch by batch (:meth:`measure`) and dropped; what is compared by features alone comes when
    all are there (:meth:`scored`). ``evaluated``: concepts of the world that any split asks for; the distribution is
    compared with the others.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        stores: Sequence[FeatureStore],
        training: Training,
        probe: StyleProbe | None,
        world: World | None,
        evaluated: Sequence[int],
    ) -> None:
        self.prompts, self.stores, self.probe = list(prompts), list(stores), probe
        self.features = self.stores[0]
        self.omitted: dict[str, str] = {}
        self._training = training
        self._has_truth = len(prompts) > 0 and all(prompt.truth is not None for prompt in prompts)
        truths = [prompt.truth for prompt in prompts if prompt.truth is not None] if self._has_truth else []
        self._truths = {store.backbone.name: store.content(features_of(store, truths)) for store in stores if truths}
        self._truth = self._truths.get(self.features.backbone.name)
        self._energy = _energy(truths) if truths else training.energy
        self._styles = [p.style for p in prompts if p.style is not None] if _all(prompts, "style") else None
        self._known_styles = world.styles if world is not None else ()
        self._world = self._world_features(world) if world is not None else {}
        self._center = self._centers()
        self._others = self._kid_reference(world, evaluated)
        self.candidates = len(world.labels) if world is not None and self._styles is not None else 0
        """Among how many pictures the right one has to be found."""
        self._explain(world)

    def measure(self, rows: Sequence[int], images: Sequence[Image.Image]) -> Cell:
        """Features and what is measured on pixels, of samples for those prompts, of one size."""
        features = {store.backbone.name: store.backbone(images) for store in self.stores}
        primary = features[self.features.backbone.name]
        values = {"sharpness": metrics.laplacian_energy(metrics.stack(images)) / self._energy}
        values |= self._training.copies.of(images, primary)
        if self._has_truth:
            values |= self._pixel_scores(rows, images)
        return Cell({key: value.double().numpy() for key, value in values.items()}, features)

    def scored(self, cell: Cell) -> Cell:
        """With the scores that come of the features, of the first ``len(cell)`` prompts, in order."""
        n, both = len(cell), cell.features[self.features.backbone.name]
        content, style = self.features.content(both), self.features.style(both)
        values: dict[str, Tensor] = {}
        if self.probe is not None and self._styles is not None:
            values["style"] = self.probe.probability(style, self._styles[:n])
            values["style_hit"] = self.probe.hits(style, self._styles[:n])
        if self._truth is not None:
            center = self._center[:n] if self._center is not None else None
            values["cosine"] = metrics.cosine(content, self._truth[:n], center)
            for store in self.stores:
                apart = metrics.cosine(
                    store.content(cell.features[store.backbone.name]), self._truths[store.backbone.name][:n]
                )
                values[f"target@{kind_of(store.backbone.name)}"] = 1 - apart
        if self._styles is not None and _all(self.prompts, "concept"):
            rank = self._ranks(content)
            values["concept_top1"], values["concept_top5"] = (rank < 1).float(), (rank < 5).float()
        return Cell(cell.values | {key: value.double().numpy() for key, value in values.items()}, cell.features)

    def kid(self, cell: Cell, real: bool = False) -> float | None:
        """Distance of the samples' distribution to real pictures; ``None`` where there are too few of either.

        ``real``: the samples are the true pictures, which cannot be compared with themselves.
        """
        if self._others is None or min(len(cell), len(self._others)) < MIN_KID:
            return None
        if real and self._others is self._truth:
            return None
        return metrics.kid(self.features.content(cell.features[self.features.backbone.name]), self._others)

    def real(self, through: Callable[[list[Image.Image]], list[Image.Image]] | None = None) -> Cell | None:
        """The scores of the true pictures themselves, or of what ``through`` makes of them (batches of one size);
        ``None`` where they are not known."""
        if not self._has_truth:
            return None
        parts = []
        for (height, width), rows in by_size(self.prompts).items():
            size = batch_of(height, width, BATCH)
            for chosen in (rows[start : start + size] for start in range(0, len(rows), size)):
                truths = [self.prompts[i].true_picture() for i in chosen]
                parts.append((chosen, self.measure(chosen, through(truths) if through else truths)))
        return self.scored(in_order(parts))

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

    def _pixel_scores(self, rows: Sequence[int], images: Sequence[Image.Image]) -> dict[str, Tensor]:
        truths = [self.prompts[i].true_picture() for i in rows]
        small, right = (metrics.stack(pictures, metrics.STRUCTURE_SIZE) for pictures in (images, truths))
        return {
            "mse": metrics.pixel_mse(metrics.stack(images), metrics.stack(truths)),
            "structure": metrics.structure(small, right),
        }

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
    """Seeded resamples of prompts: the same ones for every model, so that differences are paired.

    Percentiles of plain resamples are too narrow on few prompts (of six the lower bound holds 92 times in 100,
    where 97.5 are meant: docs/benchmarks.md). Every resample's mean is put further from the mean of all, by what
    Student's t and the unbiased deviation make of the normal's and the plain one (Hesterberg 2015, "What teachers
    should know about the bootstrap", section 4.3).
    """

    def __init__(self, seed: int, resamples: int = 1000) -> None:
        self._seed, self._resamples = seed, resamples
        self._indices: dict[int, NDArray[np.int64]] = {}

    def means(self, values: Values) -> Values:
        """Means ``[resamples]`` of ``values [N]`` under resampling of the prompts, for 95 % intervals."""
        n = len(values)
        if n not in self._indices:
            self._indices[n] = np.random.default_rng(self._seed).integers(0, n, (self._resamples, n))
        return values.mean() + _expansion(n) * (values[self._indices[n]].mean(1) - values.mean())


def _expansion(count: int) -> float:
    from scipy.special import ndtri, stdtrit

    return float(np.sqrt(count / (count - 1)) * stdtrit(count - 1, 0.975) / ndtri(0.975)) if count > 1 else 1.0


def _all(prompts: Sequence[Prompt], name: str) -> bool:
    return bool(prompts) and all(getattr(p, name) is not None for p in prompts)


def opened(picture: Picture | Image.Image) -> Image.Image:
    """Decoded, where it is a file."""
    return picture.load() if isinstance(picture, Picture) else picture


def features_of(store: FeatureStore, pictures: Sequence[Picture | Image.Image]) -> Tensor:
    """Features ``[N, D]`` of real pictures, of which few are decoded at once."""
    chunks = [store([]), *(store(images) for images in _few_at_once(pictures))]
    return torch.cat(chunks)


def _few_at_once(pictures: Sequence[Picture | Image.Image]) -> Iterator[list[Image.Image]]:
    chunk: list[Image.Image] = []
    for image in map(opened, pictures):
        chunk.append(image)
        if len(chunk) >= batch_of(image.height, image.width, BATCH):
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _energy(pictures: Sequence[Image.Image | Picture]) -> float:
    """Mean Laplacian energy; sizes may differ."""
    each = [metrics.laplacian_energy(metrics.stack([image])) for image in map(opened, pictures)]
    return float(torch.cat(each).mean())
