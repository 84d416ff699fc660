"""Stage encode: every prompt, teacher context and target image once, cached by content.

Nothing is encoded in a training step. The target latents serve the baselines and the teacher gain only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dopsd.config import Settings
from dopsd.data.cache import EncodingCache
from dopsd.data.dataset import Example, Preview
from dopsd.data.manifest import ConceptTable, DataError, Fault, Row
from dopsd.data.pictures import Picture, bucket_of, references_of
from dopsd.distill.drawing import in_parts
from dopsd.models.base import BATCH, Conditioning, Family, Request


@dataclass(frozen=True)
class EncodingRequest:
    """Something to encode: a caption with its references, and for the teacher the target picture it is shown."""

    caption: str
    references: tuple[Picture, ...] = ()
    target: Picture | None = None

    def decoded(self) -> Request:
        """With its pictures decoded."""
        return Request(self.caption, tuple(picture.load() for picture in self.references))

    @property
    def identity(self) -> list[str]:
        """All of its own that decides an encoding."""
        pictures = [*self.references, *([self.target] if self.target else [])]
        return [self.caption, *(picture.identity for picture in pictures)]


def _together(family: Family) -> int:
    """How many encodings are asked for at once: the encoders of several workers take as many batches."""
    return BATCH * getattr(family, "parallel_batches", 1)


def encode_prompts(family: Family, requests: Sequence[EncodingRequest], cache: EncodingCache) -> list[Conditioning]:
    """What inference sees of each, in order."""

    def encode(missing: list[int]) -> list[Conditioning]:
        chosen = [requests[i].decoded() for i in missing]
        return in_parts(len(chosen), len(chosen), lambda rows: family.encode_prompt(chosen[rows]))

    keys = [cache.key("prompt", family.fingerprint, *request.identity) for request in requests]
    return cache.get_or_encode(keys, encode, _together(family), "prompts")


def encode_contexts(family: Family, requests: Sequence[EncodingRequest], cache: EncodingCache) -> list[Conditioning]:
    """What the teacher sees of each, in order. One without a target is what inference would see of it."""
    shown = [number for number, request in enumerate(requests) if request.target is not None]
    read = [number for number, request in enumerate(requests) if request.target is None]

    def encode(missing: list[int]) -> list[Conditioning]:
        chosen = [requests[shown[i]] for i in missing]
        targets = [request.target.load() for request in chosen if request.target is not None]
        decoded = [request.decoded() for request in chosen]
        return in_parts(len(chosen), len(chosen), lambda rows: family.encode_context(decoded[rows], targets[rows]))

    keys = [cache.key("context", family.fingerprint, *family.context_key, *requests[i].identity) for i in shown]
    found = dict(zip(shown, cache.get_or_encode(keys, encode, _together(family), "teacher contexts"), strict=True))
    found |= dict(zip(read, encode_prompts(family, [requests[i] for i in read], cache), strict=True))
    return [found[number] for number in range(len(requests))]


def teacher_request(caption: str, row: Row, target: Picture, settings: Settings) -> EncodingRequest:
    """What the teacher is asked for a row: its picture, or with ``enhanced-prompt`` the caption that is its alone."""
    references = references_of(row, settings.data.max_pixels)
    long = row.caption(settings.model.teacher_variant)
    return EncodingRequest(caption, references, target) if long is None else EncodingRequest(long, references)


def encode_concept(family: Family, table: ConceptTable, settings: Settings, cache: EncodingCache) -> list[Example]:
    """One :class:`Example` per image and caption variant, in the table's order; images are fitted to their bucket."""
    data = settings.data
    sizes = [bucket_of(row, data.resolution, data.max_pixels) for row in table.rows]
    targets = [Picture(row.image, data.max_pixels, size) for row, size in zip(table.rows, sizes, strict=True)]
    pairs = [
        (index, text)
        for index, row in enumerate(table.rows)
        for text in row.student_captions(settings.model.teacher_variant)
    ]
    requests = [EncodingRequest(text, references_of(table.rows[index], data.max_pixels)) for index, text in pairs]
    prompts = encode_prompts(family, requests, cache)
    taught = [teacher_request(text, table.rows[index], targets[index], settings) for index, text in pairs]
    contexts = encode_contexts(family, taught, cache)
    latents = _latents(family, targets, cache)
    return [
        Example(
            prompt=prompts[number],
            context=contexts[number],
            latents=latents[index]["latents"],
            height=sizes[index][1],
            width=sizes[index][0],
            image_index=index,
            caption=text,
            repeats=table.rows[index].repeats,
        )
        for number, (index, text) in enumerate(pairs)
    ]


def encode_previews(family: Family, table: ConceptTable, settings: Settings, cache: EncodingCache) -> list[Preview]:
    """What is drawn while it trains: the settings' prompts, or else the first rows of ``table`` at their own sizes."""
    data, texts = settings.data, settings.train.preview_prompts
    if texts and any(row.references for row in table.rows):
        raise DataError([Fault("params.yaml", None, "train.preview_prompts", "a text has no picture to edit; leave it "
                               "empty, and the first rows of the data are previewed")])  # fmt: skip
    if texts:
        requests, sizes = [EncodingRequest(text) for text in texts], [(data.resolution, data.resolution)] * len(texts)
    else:
        rows = table.rows[: settings.train.preview_count]
        captions = [row.student_captions(settings.model.teacher_variant)[0] for row in rows]
        requests = [
            EncodingRequest(text, references_of(row, data.max_pixels)) for text, row in zip(captions, rows, strict=True)
        ]
        sizes = [bucket_of(row, data.resolution, data.max_pixels) for row in rows]
    conditionings = encode_prompts(family, requests, cache)
    return [
        Preview(request.caption, conditioning, height, width)
        for request, conditioning, (width, height) in zip(requests, conditionings, sizes, strict=True)
    ]


def first_requests(table: ConceptTable, settings: Settings, count: int) -> list[tuple[Request, int, int]]:
    """The first rows as a person would ask for them: request, height, width."""
    limit, asked = settings.data.max_pixels, []
    for row in table.rows[:count]:
        text = row.student_captions(settings.model.teacher_variant)[0]
        width, height = bucket_of(row, settings.data.resolution, limit)
        asked.append((EncodingRequest(text, references_of(row, limit)).decoded(), height, width))
    return asked


def _latents(family: Family, targets: Sequence[Picture], cache: EncodingCache) -> list[Conditioning]:
    """Clean latents ``[C, h, w]`` per image, one at a time: neighbours may be of different sizes."""

    def encode(missing: list[int]) -> list[Conditioning]:
        return [{"latents": family.encode_images([targets[index].load()])[0].cpu()} for index in missing]

    keys = [cache.key("latents", family.fingerprint, target.identity) for target in targets]
    return cache.get_or_encode(keys, encode, BATCH, "target latents")
