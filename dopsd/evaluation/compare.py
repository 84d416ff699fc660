"""What can be said of a model without knowing the right pictures: beside the base's own, from the same noise.

Adds to every cell what comes of comparing it with others: ``likeness`` (of the concept's prompts, to the training
pictures), ``kept`` (of general prompts, how much of the base's own picture is left), ``diversity`` (how far two noises'
pictures are apart). A second backbone's have its name behind an ``@``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .backbones import kind_of
from .draws import Key
from .extras import FROM_BASE
from .likeness import HALVES, LEAST_PICTURES, Half, Scale, kept
from .prompts import KEPT, NEAR
from .scoring import Cell, Values

Cells = Mapping[Key, Cell]


@dataclass(frozen=True)
class Look:
    """How one backbone sees: its scale, and the training pictures' features ``[M, D]``. ``suffix``: of its scores."""

    name: str
    scale: Scale
    training: Tensor
    half: Half
    suffix: str


def looks_of(
    cells: Cells, training: Mapping[str, Tensor], dims: Mapping[str, int], kind: str | None, few: int
) -> list[Look]:
    """Every backbone's, the first one's without a suffix; their scale is the base's few-step pictures of general
    prompts, and of all others too where those are few. ``dims``: how many of its features say what is drawn."""
    general = cells.get(Key(KEPT, "base", few))
    own = [cell for key, cell in cells.items() if (key.model, key.steps, key.noise) == ("base", few, 0)]
    if general is not None and len(general) >= LEAST_PICTURES:
        own = [general]
    return [
        Look(
            name,
            Scale.of(torch.cat([cell.features[name] for cell in own]), dims[name]),
            features,
            HALVES[kind],
            f"@{kind_of(name)}" if number else "",
        )
        for number, (name, features) in enumerate(training.items())
    ]


def compared(cells: Cells, looks: list[Look]) -> dict[Key, Cell]:
    """All cells, with what comes of comparing them."""
    out = {}
    for key, cell in cells.items():
        values = dict(cell.values)
        for look in looks:
            if key.split == "concept":
                likeness = look.scale.likeness(cell.features[look.name], look.training, look.half)
                values["likeness" + look.suffix] = likeness.double().numpy()
            if key.split in (KEPT, NEAR) and key.model != "real":
                left = _kept(cells, key, look)
                if left is not None:
                    values["kept" + look.suffix] = left.double().numpy()
            if key.noise and key.split in ("concept", KEPT):
                first = cells[key._replace(noise=0)].first(len(cell))
                apart = look.scale.distance(cell.features[look.name], first.features[look.name])
                values["diversity" + look.suffix] = apart.double().numpy()
        for name in [name for name in values if name.startswith(FROM_BASE)]:
            values |= _kept_by(cells, key, name)
            del values[name]  # of pictures it says no more than kept does
        out[key] = replace(cell, values=values)
    return out


def _kept_by(cells: Cells, key: Key, name: str) -> dict[str, Values]:
    """The same by a distance of pictures; of the base it is all."""
    other = cells.get(key._replace(model="base", noise=1))
    if key.model == "base" or other is None or name not in other.values:
        return {}
    mine = torch.from_numpy(cells[key].values[name])
    far = torch.from_numpy(other.values[name])[: len(mine)]
    return {f"kept@{name.partition('@')[2]}": kept(mine[: len(far)], far).numpy()}


def _kept(cells: Cells, key: Key, look: Look) -> Tensor | None:
    """What is left of the base's pictures, per prompt; ``None`` where the base was not drawn from two noises."""
    own, other = (cells.get(key._replace(model="base", noise=noise)) for noise in (0, 1))
    if own is None or other is None:
        return None
    count = min(len(own), len(other), len(cells[key]))
    features = [cell.first(count).features[look.name] for cell in (cells[key], (own, other)[key.noise], own, other)]
    mine, bases, one, two = features
    return kept(look.scale.distance(mine, bases), look.scale.distance(one, two))
