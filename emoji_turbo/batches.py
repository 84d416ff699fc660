"""What the base is trained on: captions, pictures in the encoder's context, and the pictures that should be drawn.

A third of a batch is text only: "a fox, noto style", or a technique of :data:`.transforms.TECHNIQUES`, "a fox, pen
style". A caption that names no style the base knows ("a fox in [V]
style") is drawn in the base's own manner, :data:`DEFAULT_STYLE` on a ground of its own
(:func:`.transforms.own_manner`), as large models draw in their own way where nothing is said. The rest has a
picture in the context: the target itself, with or without a caption, another thing in the same style while the text
says what to draw ("a fox in [V] style"), or the same thing drawn otherwise ("a [V], noto style"). All but the last go
through one random transform of a wide family, the same for reference and target, so that the context comes to carry
styles that no caption names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .captions import PLACEHOLDER, random_caption
from .pictures import BASE_STYLES, World
from .transforms import TECHNIQUES, Transform, own_manner, sample_placement, sample_transform

DEFAULT_STYLE = "flat"
WORDS = (*BASE_STYLES, PLACEHOLDER, *TECHNIQUES)
"""What may stand before "style" in a caption."""
UNNAMED = -1
TEXT_SHARE = 1 / 3
OWN, TECHNIQUE = 0.2, 0.32
"""Shares of the texts: those that name no style the base knows, and those that name a technique; the rest a style."""
SHOWN_TECHNIQUE = 0.25
"""Share of the shown manners that are a technique, where the rest is any transform of any style."""
SAME, COPIED, OTHER = 0.26, 0.08, 0.58
"""Shares of what is shown: the target with a caption, the target alone, another thing; the rest: a new subject."""


@dataclass(frozen=True)
class Batch:
    """``captions``; ``context [C, 3, 64, 64]`` belongs to the last of them; ``targets [B, 3, 64, 64]``; both
    in [-1, 1]. ``things [B]``: index in the world of the known thing that the caption names; ``words [B]``: index in
    :data:`WORDS`; ``same [B]``: 1 where the picture shows what the caption names, 0 where it shows something else;
    :data:`UNNAMED` where there is none. ``pictured [C]``, ``outlines [C]``: indices of the thing that the picture shows
    and of the base style whose outlines it has.
    """

    captions: list[str]
    context: Tensor
    targets: Tensor
    things: Tensor
    words: Tensor
    same: Tensor
    pictured: Tensor
    outlines: Tensor

    @property
    def alone(self) -> int:
        """How many are text only; they come first."""
        return len(self.captions) - len(self.context)

    def rows(self, rank: int, ranks: int) -> list[int]:
        """The rows that process ``rank`` of ``ranks`` works on, text only first."""
        every = range(len(self.captions))
        return [*every[: self.alone][rank::ranks], *every[self.alone :][rank::ranks]]

    def share(self, rank: int, ranks: int) -> Batch:
        """The batch of :meth:`rows`."""
        rows = self.rows(rank, ranks)
        marks = (self.things[rows], self.words[rows], self.same[rows])
        shown = (self.pictured[rank::ranks], self.outlines[rank::ranks])
        return Batch([self.captions[i] for i in rows], self.context[rank::ranks], self.targets[rows], *marks, *shown)


class _Example(NamedTuple):
    """``label`` is empty where nothing is said."""

    label: str
    word: str
    target: Tensor
    shown: Tensor
    thing: int
    same: int = UNNAMED
    pictured: int = UNNAMED
    outlines: str = ""


def draw_batch(world: World, size: int, generator: torch.Generator, drop: float = 0.15) -> Batch:
    """:data:`TEXT_SHARE` text only (``drop`` of it without a caption, for guidance), the rest with a picture."""
    alone = round(size * TEXT_SHARE)
    drawn = [_draw_text(world, generator) for _ in range(alone)]
    drawn += [_draw_in_context(world, generator) for _ in range(size - alone)]
    captions = [random_caption(e.label, e.word, generator) if e.label else "" for e in drawn]
    things = torch.tensor([e.thing for e in drawn])
    words = torch.tensor([WORDS.index(e.word) for e in drawn])
    for i in (torch.rand(alone, generator=generator) < drop).nonzero().flatten().tolist():
        captions[i] = ""
    silent = torch.tensor([caption == "" for caption in captions])
    things[silent] = words[silent] = UNNAMED
    context = torch.stack([e.shown for e in drawn[alone:]]) * 2 - 1
    same, pictured = torch.tensor([e.same for e in drawn]), torch.tensor([e.pictured for e in drawn[alone:]])
    outlines = torch.tensor([BASE_STYLES.index(e.outlines) for e in drawn[alone:]])
    targets = torch.stack([e.target for e in drawn]) * 2 - 1
    return Batch(captions, context, targets, things, words, same, pictured, outlines)


def draw_shown(world: World, size: int, generator: torch.Generator) -> Tensor:
    """Transformed pictures of all that is seen, ``[size, 3, 64, 64]`` in [-1, 1], to be copied."""
    pictures = []
    for _ in range(size):
        picture = _picture(world, _style(generator), _index(world.seen, generator))
        pictures.append(sample_transform(generator)(picture))
    return torch.stack(pictures) * 2 - 1


def _draw_text(world: World, generator: torch.Generator) -> _Example:
    thing, style = _index(world.known, generator), _style(generator)
    word, target = style, _picture(world, style, thing)
    kind = torch.rand((), generator=generator).item()
    if kind < OWN:
        word, target = PLACEHOLDER, own_manner(_picture(world, DEFAULT_STYLE, thing))
    elif kind < OWN + TECHNIQUE:
        word, technique = _technique(generator)
        target = technique(_picture(world, DEFAULT_STYLE, thing))
    return _Example(world.labels[thing], word, target, target, thing)


def _draw_in_context(world: World, generator: torch.Generator) -> _Example:
    style, both = _manner(generator)
    kind = torch.rand((), generator=generator).item()
    if kind < SAME + COPIED:  # the target itself; also things that text alone cannot draw
        known = torch.rand((), generator=generator) < 0.6
        thing = _index(world.known if known else world.seen, generator)
        target = both(_picture(world, style, thing))
        named = thing if thing in world.known else UNNAMED
        return _Example(world.labels[thing] if kind < SAME else "", PLACEHOLDER, target, target, named, 1, thing, style)
    if kind < SAME + COPIED + OTHER:  # another thing in the same style
        thing, other = _index(world.known, generator), _index(world.seen, generator)
        target, shown = both(_picture(world, style, thing)), both(_picture(world, style, other))
        same = int(thing == other)
        return _Example(world.labels[thing], PLACEHOLDER, target, shown, thing, same, other, style)
    thing = _index(world.seen, generator)  # the same thing, drawn or placed otherwise; the style is named
    style, outlines = _style(generator), _style(generator)
    shown = sample_placement(generator)(_picture(world, outlines, thing))
    target = _picture(world, style, thing)
    return _Example(PLACEHOLDER, style, target, shown, UNNAMED, pictured=thing, outlines=outlines)


def _manner(generator: torch.Generator) -> tuple[str, Transform]:
    """Whose outlines, and what is done to them: a technique, or one random transform of any base style."""
    if torch.rand((), generator=generator) < SHOWN_TECHNIQUE:
        return DEFAULT_STYLE, _technique(generator)[1]
    return _style(generator), sample_transform(generator)


def _technique(generator: torch.Generator) -> tuple[str, Transform]:
    word = list(TECHNIQUES)[int(torch.randint(len(TECHNIQUES), (), generator=generator))]
    return word, TECHNIQUES[word]


def _index(of: tuple[int, ...] | list[int], generator: torch.Generator) -> int:
    return of[int(torch.randint(len(of), (), generator=generator))]


def _style(generator: torch.Generator) -> str:
    return BASE_STYLES[int(torch.randint(len(BASE_STYLES), (), generator=generator))]


def _picture(world: World, style: str, index: int) -> Tensor:
    return world.pictures[style][index].float() / 255
