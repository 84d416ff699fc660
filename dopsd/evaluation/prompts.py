"""What the models are asked: the concept's prompts, and what has nothing to do with it; with the truth where known.

Four splits. ``concept``: held-out rows of the data set (or, without any, prompts of the settings that have no truth).
``kept``: general prompts, of ``evaluation.kept_prompts``. ``near``: the concept's captions without its placeholder.
``known``: styles whose true pictures a base brings along, on things that it knows. Order is drawn from
``evaluation.seed``; tables, curves and grids take the first ones, so that nothing is picked by hand. What replay
rehearses is asked in none of the last three, replay on or off: numbers with and without it are of the same prompts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import numpy as np
from PIL import Image

from dopsd.config import Settings
from dopsd.data.images import bucket_size, fit_image, load_image
from dopsd.data.manifest import PROTOCOL, ConceptTable, Row
from dopsd.data.pictures import Picture, bucket_of, references_of
from dopsd.train.encode import EncodingRequest

from .backbones import picture_key
from .protocol import class_of, published_prompts, seed_of, text_for_clip
from .world import World, world_picture


class EvaluationError(ValueError):
    """Something a person must change before the evaluation can run; one line that says what."""


@dataclass(frozen=True)
class Kind:
    """What a concept is. ``style``: the world's style that it shows, where the world has it. ``label``: what a subject
    is one of, "dog"."""

    kind: Literal["style", "subject"] | None = None
    style: str | None = None
    label: str = ""


@dataclass(frozen=True)
class Prompt:
    """One request. ``number`` decides its noise: the same for every model and number of steps.

    ``truth``: the right picture, ``height x width``, decoded when it is looked at. ``concept``: its index in the world.
    ``style``: the world's style that is asked for. ``row``: the data's row that it comes from; ``references``: what is
    to be edited. ``seed``: of its first noise, where a protocol says which.
    """

    text: str
    number: int
    height: int
    width: int
    truth: Picture | Image.Image | None = None
    concept: int | None = None
    style: str | None = None
    row: Row | None = None
    references: tuple[Picture, ...] = ()
    seed: int | None = None

    @property
    def request(self) -> EncodingRequest:
        """What the models are told."""
        return EncodingRequest(self.text, self.references)

    def true_picture(self) -> Image.Image:
        """The right picture; there must be one."""
        assert self.truth is not None
        return self.truth.load() if isinstance(self.truth, Picture) else self.truth


CONCEPT, REWRITE = "concept", "rewrite"
KEPT, NEAR, KNOWN = "kept", "near", "known"
"""The splits that nothing is to be learnt of."""
MIN_PROMPTS = 6
"""On fewer prompts chance alone too often puts a model between the base and its teacher: no interval is given."""
_LEAST_TO_JUDGE = 2
"""Prompts of which a paired difference has an interval at all."""
NEAR_PROMPTS = 20
"""At most so many prompts near the concept."""
_MAX_KIND_BYTES = 64 << 10
_FIRST = {KNOWN: 100_000, KEPT: 200_000, NEAR: 300_000}
"""The number of a split's first prompt: every prompt has a noise of its own."""


def read_kind(table: ConceptTable, world: World | None) -> Kind:
    """``concept.json`` beside the data: ``{"kind": "style"|"subject", "style": "ink"}``; without it nothing is known.

    Raises :class:`EvaluationError` where the file is there and wrong.
    """
    path = table.root / "concept.json"
    if not path.exists():
        return Kind()
    try:
        if path.stat().st_size > _MAX_KIND_BYTES:
            raise ValueError(f"larger than {_MAX_KIND_BYTES >> 10} KiB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path}: not readable as JSON ({error}); correct it or remove it") from None
    kind = value.get("kind") if isinstance(value, dict) else None
    style = value.get("style") if isinstance(value, dict) else None
    if kind not in ("style", "subject"):
        raise EvaluationError(f'{path}: "kind" must be "style" or "subject", found {kind!r}')
    if kind == "subject" or style is None or world is None:
        return Kind(kind, None, class_of(table.root) if kind == "subject" else "")
    if style not in world.pictures:
        raise EvaluationError(f'{path}: unknown "style" {style!r}; the world has {", ".join(world.pictures)}')
    return Kind(kind, style)


def check_questions(
    table: ConceptTable, holdout: ConceptTable | None, world: World | None, settings: Settings
) -> None:  # fmt: skip
    """Raise :class:`EvaluationError` for what the evaluation cannot ask of these data with these settings."""
    read_kind(table, world)
    _check_for_the_gate(table, holdout, settings)
    if settings.evaluation.prompts and not (holdout and holdout.rows) and any(row.references for row in table.rows):
        raise EvaluationError("evaluation.prompts: they have no pictures to edit; add holdout/ to the data set")


def _check_for_the_gate(table: ConceptTable, holdout: ConceptTable | None, settings: Settings) -> None:
    """A night's training is not to end at a registry that can never let it in."""
    evaluation, registry = settings.evaluation, settings.registry
    general, rehearsed = len(evaluation.kept_texts), rehearsed_of(settings)  # they are there, with a registry or none
    if not (registry.enabled and settings.tracking.enabled):
        return
    left = min(evaluation.kept_count, general - rehearsed)
    if left < _LEAST_TO_JUDGE and (left or registry.min_kept is not None):
        raise EvaluationError(
            f"evaluation.kept_prompts: {left or 'no'} general prompt{'s' * (left != 1)} left to ask ({general}, less "
            f"{rehearsed} that train.replay.prompts rehearses; kept_count is {evaluation.kept_count}): too few to "
            "tell a difference from chance, as the registry must; add some, or set evaluation.kept_prompts to [] and "
            "registry.min_kept to null"
        )
    rows = len(holdout.rows) if holdout else 0
    asked = min(evaluation.max_prompts, rows or len(evaluation.prompts) or len(table.rows))
    if evaluation.protocol == "ours" and asked < _LEAST_TO_JUDGE:
        raise EvaluationError(
            "evaluation: one prompt of the concept is too few to tell a difference from chance, so the registry would "
            "refuse every version; raise max_prompts, add held-out pictures or evaluation.prompts, or set "
            "registry.enabled to false"
        )
    if evaluation.curve_prompts < _LEAST_TO_JUDGE and evaluation.few_steps != evaluation.many_steps:
        raise EvaluationError(
            "evaluation.curve_prompts: of one prompt no loss of few steps can be told from chance, so the registry "
            "would refuse every version; raise it, or set registry.enabled to false"
        )


def concept_prompts(
    table: ConceptTable, holdout: ConceptTable | None, world: World | None, kind: Kind, settings: Settings
) -> list[Prompt]:
    """At most ``max_prompts`` held-out rows in a seeded order; else the settings' prompts, else the data's captions."""
    side, limit, teachers = settings.data.resolution, settings.data.max_pixels, settings.model.teacher_variant
    extra = settings.evaluation.prompts
    if (holdout is None or not holdout.rows) and extra:
        check_questions(table, holdout, None, settings)
        return [Prompt(text, i, side, side) for i, text in enumerate(extra[: settings.evaluation.max_prompts])]
    known = table if holdout is None or not holdout.rows else holdout
    order = np.random.default_rng(settings.evaluation.seed).permutation(len(known.rows))
    rows = [known.rows[i] for i in (order if known is holdout else range(len(order)))]
    places = _places(world, kind.style)
    prompts = []
    for number, row in enumerate(rows[: settings.evaluation.max_prompts]):
        picture = load_image(row.image, limit)
        width, height = bucket_size(*picture.size, side)
        prompt = Prompt(
            row.student_captions(teachers)[0], number, height, width, row=row, references=references_of(row, limit)
        )
        if known is holdout:
            truth = Picture(row.image, limit, (width, height))
            concept = places.get(picture_key(picture)) if places else None
            prompt = replace(prompt, truth=truth, concept=concept, style=kind.style)
        prompts.append(prompt)
    if kind.style is not None and not all(prompt.concept is not None for prompt in prompts):
        # then candidates and probe would be wrong for some prompts: say so instead of scoring them
        return [replace(prompt, concept=None, style=None) for prompt in prompts]
    return prompts


def published(table: ConceptTable, settings: Settings) -> dict[str, list[Prompt]]:
    """The prompts of the published protocol: ``rewrite``, whose target is the training picture, and ``concept``, four
    tests of each. All of them count, whatever ``max_prompts`` says. Raises ``DataError``."""
    if any(row.references for row in table.rows):
        raise EvaluationError("evaluation.protocol: published asks for no edits; set it to ours")
    targets = training_pictures(table, settings)
    out: dict[str, list[Prompt]] = {REWRITE: [], CONCEPT: []}
    for prompt in published_prompts(table, table.root / PROTOCOL, settings.data.placeholder):
        target, number = targets[prompt.row], seed_of(prompt.row, prompt.index)
        assert target.size is not None
        width, height = target.size
        truth = target if prompt.index == 0 else None
        asked = out[CONCEPT if prompt.index else REWRITE]
        asked.append(Prompt(prompt.text, number, height, width, truth, seed=number))
    return out


def kept_prompts(settings: Settings) -> list[Prompt]:
    """The general prompts, ``kept_count`` of them in an order drawn by the seed."""
    texts, side = _not_rehearsed(settings.evaluation.kept_texts, settings), settings.data.resolution
    order = np.random.default_rng(settings.evaluation.seed + 3).permutation(len(texts))
    chosen = [texts[i] for i in order[: settings.evaluation.kept_count]]
    return [Prompt(text, _FIRST[KEPT] + number, side, side) for number, text in enumerate(chosen)]


def rehearsed_of(settings: Settings) -> int:
    """How many of the general prompts are left out, as replay rehearses them."""
    texts = settings.evaluation.kept_texts
    return len(texts) - len(_not_rehearsed(texts, settings))


def near_prompts(table: ConceptTable, kind: Kind, settings: Settings) -> list[Prompt]:
    """The captions of the training pictures without the placeholder: what the concept may have leaked into."""
    if any(row.references for row in table.rows):
        return []  # an edit's caption without its picture says nothing
    captions = [row.student_captions(settings.model.teacher_variant)[0] for row in table.rows]
    placeholder = settings.data.placeholder
    without = [text_for_clip(text, placeholder, kind.label) for text in captions if placeholder.lower() in text.lower()]
    texts = _not_rehearsed(tuple(dict.fromkeys(text for text in without if text)), settings)[:NEAR_PROMPTS]
    side = settings.data.resolution
    return [Prompt(text, _FIRST[NEAR] + number, side, side) for number, text in enumerate(texts)]


def _not_rehearsed(texts: Sequence[str], settings: Settings) -> list[str]:
    """Without what replay's prompts say, whatever its weight."""
    rehearsed = {_plain(text) for text in settings.train.replay.prompts}
    return [text for text in texts if _plain(text) not in rehearsed]


def _plain(text: str) -> str:
    """Letters and digits alone, in lower case: commas and capitals make no other prompt."""
    return "".join(character for character in text.casefold() if character.isalnum())


def known_prompts(world: World | None, concept: Sequence[Prompt], settings: Settings) -> list[Prompt]:
    """The base's own styles in turn, on known concepts: first those of ``concept`` (fewer to hide from the probe)."""
    if world is None:
        return []
    known = set(world.known)
    draw = np.random.default_rng(settings.evaluation.seed + 1)
    shared = [p.concept for p in concept if p.concept in known]
    others = [int(i) for i in draw.permutation(sorted(known - set(shared)))]
    count, side = settings.evaluation.known_prompts, settings.data.resolution
    pool = [i for i in [*shared, *others] if i is not None][:count]
    prompts: list[Prompt] = []
    # every turn through the pool shifts the styles by one, so no pair comes twice
    for turn, (place, index) in product(range(len(world.styles)), enumerate(pool)):
        style = world.styles[(place + turn) % len(world.styles)]
        text = world.captions[style][index]
        if len(prompts) < count and _not_rehearsed([text], settings):
            truth = fit_image(world_picture(world, style, index), (side, side))
            prompts.append(Prompt(text, _FIRST[KNOWN] + len(prompts), side, side, truth, index, style))
    return prompts


def training_pictures(table: ConceptTable, settings: Settings) -> list[Picture]:
    """The data set's pictures as they are trained on, decoded when they are looked at."""
    side, limit = settings.data.resolution, settings.data.max_pixels
    return [Picture(row.image, limit, bucket_of(row, side, limit)) for row in table.rows]


def teacher_requests(
    table: ConceptTable, prompts: Sequence[Prompt], settings: Settings, context: str
) -> list[EncodingRequest] | None:
    """What the teacher is told for each prompt; ``None`` where it can be told nothing that the student is not.

    Of a concept it is shown another training picture, drawn by the seed: never the prompt's own truth, and not the
    picture that has the prompt as a caption. An edit it is shown done: there is no other picture of that one. With
    ``enhanced-prompt`` it reads the row's own long caption.
    """
    limit, teachers = settings.data.max_pixels, settings.model.teacher_variant
    if context == "enhanced-prompt":
        long = [prompt.row.caption(teachers) if prompt.row else None for prompt in prompts]
        return (
            [EncodingRequest(text, p.references) for p, text in zip(prompts, long, strict=True) if text]
            if all(long)
            else None
        )
    if context == "edit-reference":
        rows = [prompt.row for prompt in prompts if prompt.row is not None]
        return [EncodingRequest(p.text, p.references, Picture(row.image, limit, (p.width, p.height)))
                for p, row in zip(prompts, rows, strict=True)]  # fmt: skip
    draw = np.random.default_rng(settings.evaluation.seed + 2)
    requests = []
    for prompt in prompts:
        others = [i for i, row in enumerate(table.rows) if not _captioned(row, prompt.text)]
        row = table.rows[int(draw.choice(others or range(len(table.rows))))]
        shown = Picture(row.image, limit, bucket_of(row, settings.data.resolution, limit))
        requests.append(EncodingRequest(prompt.text, (), shown))
    return requests


def _captioned(row: Row, text: str) -> bool:
    return any(caption_text == text for _, caption_text in row.captions)


def _places(world: World | None, style: str | None) -> dict[str, int]:
    """Picture hash to concept index, for the pictures of one style."""
    if world is None or style is None:
        return {}
    return {picture_key(world_picture(world, style, i)): i for i in range(len(world.labels))}
