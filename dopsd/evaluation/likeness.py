"""How like two pictures are, by a backbone's features: what is drawn, and how. Pure functions of tensors.

What is drawn is compared by the features as they are. How it is drawn is told by means and deviations of channels, in
which all pictures of one base have much in common: a :class:`Scale` takes from them what the base's own pictures of
general prompts share, and gives every channel the same weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Half = Literal["content", "style", "both"]
HALVES: dict[str | None, Half] = {"style": "style", "subject": "content", None: "both"}
"""By a concept's kind, what of a picture is to be learnt."""

LEAST_PICTURES = 6
"""Of fewer nobody knows what they share."""
LEAST_DISTANCE = 1e-3
"""Below it two pictures are one but for rounding."""


@dataclass(frozen=True)
class Scale:
    """``center``, ``deviation`` ``[D]`` of the features of the base's own pictures; the first ``content_dim`` of them
    say what is drawn."""

    center: Tensor
    deviation: Tensor
    content_dim: int

    @classmethod
    def of(cls, features: Tensor, content_dim: int) -> Scale:
        """From features ``[N, D]`` of the base's pictures; of too few, one that takes nothing from them."""
        if len(features) < LEAST_PICTURES:
            return cls(torch.zeros_like(features[0]), torch.ones_like(features[0]), content_dim)
        return cls(features.mean(0), features.std(0).clamp(min=1e-6), content_dim)

    def unit(self, features: Tensor, half: Half = "both") -> Tensor:
        """Unit vectors ``[N, d]`` of what two pictures are compared by."""
        content = F.normalize(features[:, : self.content_dim], dim=1)
        if half == "content" or self.content_dim == features.shape[1]:
            return content
        standard = (features - self.center) / self.deviation
        style = F.normalize(standard[:, self.content_dim :], dim=1)
        return style if half == "style" else torch.cat([content, style], 1) / 2**0.5

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """One minus the cosine ``[N]`` of each row of ``a`` and ``b`` ``[N, D]``: 0 for the same picture."""
        return (1 - (self.unit(a) * self.unit(b)).sum(1)).masked_fill((a == b).all(1), 0)

    def likeness(self, features: Tensor, reference: Tensor, half: Half) -> Tensor:
        """Mean cosine ``[N]`` of each row to the pictures of ``reference`` ``[M, D]``."""
        return (self.unit(features, half) @ self.unit(reference, half).T).mean(1)

    def likeness_among(self, reference: Tensor, half: Half) -> Tensor:
        """The same of each picture of ``reference`` to the others ``[M]``; of one picture alone, empty."""
        if len(reference) < 2:
            return torch.empty(0)
        unit = self.unit(reference, half)
        return ((unit @ unit.T).sum(1) - 1) / (len(unit) - 1)


def as_independent(among: Tensor) -> Tensor:
    """:meth:`Scale.likeness_among` with larger deviations: its values share their pictures, so their mean (a
    U-statistic of two) deviates twice as much as that of independent ones, which is how intervals take them, and by the
    jackknife's ``(n - 1) / (n - 2)`` more where they are few. Fewer than three are left as they are."""
    count = len(among)
    return among if count < 3 else among.mean() + 2 * (count - 1) / (count - 2) * (among - among.mean())


def kept(distance: Tensor, seed_distance: Tensor) -> Tensor:
    """What was kept of each prompt ``[N]``: 1 for the base's own picture, 0 for one as far from it as another noise
    makes it, less for one that is further.

    ``distance``: between tuned model and base, from the same noise; ``seed_distance``: between two noises, by the base.
    A prompt's own counts where it is above the mean over prompts: of one that the base draws nearly alike from every
    noise, a difference that nobody sees would be called a loss.
    """
    return 1 - distance / seed_distance.clamp(min=max(float(seed_distance.mean()), LEAST_DISTANCE))
