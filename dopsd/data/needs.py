"""What base and context ask of the data: captions that are read to their end, references or none, and the caption that
is the teacher's alone; and what no training row may show: the held-out truth."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from .duplicates import near_duplicates
from .images import ImageFacts
from .manifest import METADATA, Fault, Row
from .records import TEXTS, is_text

MIN_SIDE, MAX_RATIO = 64, 8.0
"""What an editing pipeline takes as a reference (pixels; long side over short one)."""


class Reader(Protocol):
    """What the base's text encoder takes (:mod:`dopsd.models.reading`): what is wrong with a text, else nothing."""

    def as_prompt(self, text: str) -> str:
        """As inference reads it."""

    def as_context(self, text: str, shown: int) -> str:
        """A sound prompt as the teacher reads it, beside a picture of so many tokens."""

    def picture_tokens(self, sizes: Collection[tuple[int, int]] | None) -> int:
        """Most tokens that a picture of one of these sizes (width, height) takes; ``None``: of whichever."""


@dataclass(frozen=True)
class Needs:
    """``teacher_variant``: the caption that every row must have for the teacher, beside one for the student.
    ``reader``: by whom captions must be readable; ``None``: they are not looked at. ``shown``: most tokens of a
    picture that the teacher may be shown beside a caption; ``None``: not known, and it is not asked."""

    references: Literal["refused", "allowed", "required"] = "allowed"
    teacher_variant: str | None = None
    reader: Reader | None = None
    shown: int | None = None


ANY = Needs()
"""References or none, captions as they are."""


@dataclass(frozen=True)
class Seen:
    """A row's pictures as far as they could be read. ``source``, ``line``: where the row is; names as written there."""

    source: str
    line: int
    name: str | None
    target: ImageFacts | None
    references: tuple[tuple[str, ImageFacts | None], ...]


def unmet(
    row: Seen, captions: Mapping[str, str] | None, unread: Collection[str | None], needs: Needs
) -> list[tuple[str, str]]:
    """What a row lacks or has too much, as (column, problem) pairs; a row that names no picture lacks nothing more.

    ``captions``: by variant, ``None`` where they could not be read. ``unread``: columns that could not be, ``None`` for
    the row as a whole.
    """
    if row.name is None:
        return []
    problems: list[tuple[str, str]] = []
    if needs.references == "refused" and row.references:
        problems.append(("references", "this context shows the student none; remove them, or set model.context to "
                     "edit-reference with a family that edits"))  # fmt: skip
    elif needs.references == "required" and not row.references and not {None, "references"} & set(unread):
        problems.append(("references", _describe_none(row)))
    if needs.references != "refused":
        for name, facts in row.references:
            problems += [("references", problem) for problem in _unfit(name, facts, row.target)]
    if captions and needs.teacher_variant is not None:
        problems += [("captions", problem) for problem in _lacking_variant(captions, needs.teacher_variant, row.source)]
    for variant, text in (captions or {}).items():
        problems += [("captions", f"{variant!r}: {problem}") for problem in _unreadable(variant, text, needs)]
    return problems


def _unreadable(variant: str, text: str, needs: Needs) -> list[str]:
    """Why a caption cannot be read to its end, by the student or the teacher."""
    if needs.reader is None or not is_text(text):  # what is no text is a fault of its own
        return []
    wrong = needs.reader.as_prompt(text)
    if not wrong and needs.teacher_variant is None and needs.shown is not None:
        wrong = needs.reader.as_context(text, needs.shown)
    return [wrong] if wrong else []


def first_unmet(rows: Sequence[Row], needs: Needs) -> Fault | None:
    """The first thing that rows lack or have too much, which were checked for other needs and found sound."""
    for row in rows:
        seen = Seen(row.source, row.line, row.image.name, None, tuple((path.name, None) for path in row.references))
        for column, problem in unmet(seen, dict(row.captions), (), needs):
            return Fault(row.source, row.line, column, problem)
    return None


def _describe_none(row: Seen) -> str:
    needed = "none given, and the context edit-reference needs them; "
    if _is_text_file(row.source):
        return (f"{needed}a .txt cannot name any: write {METADATA} in place of the .txt files, one line a picture: "
                f'{{"image": "{row.name}", "caption": "...", "references": ["before.png"]}}')  # fmt: skip
    return f'{needed}name at least one picture, for example "references": ["before.png"]'


def _unfit(name: str, facts: ImageFacts | None, target: ImageFacts | None) -> list[str]:
    """What is wrong with a reference that can be decoded."""
    if facts is None:
        return []
    problems = []
    size = f"{name} is {facts.width} x {facts.height} pixels"
    if min(facts.width, facts.height) < MIN_SIDE:
        problems.append(f"{size}, at least {MIN_SIDE} a side are needed; give a larger one")
    if max(facts.width, facts.height) > MAX_RATIO * min(facts.width, facts.height):
        problems.append(f"{size}, longer than {MAX_RATIO:g} : 1; crop it")
    # only the same file: after a small edit, before and after are near duplicates, as they should be
    if target is not None and facts.sha256 == target.sha256:
        answer = "the student would be shown the answer: give the picture before the edit"
        problems.append(f"{name} is the row's own image; {answer}")
    return problems


def _lacking_variant(captions: Mapping[str, str], teacher: str, source: str) -> list[str]:
    if teacher not in captions:
        problem = f"there is no {teacher!r}, which the teacher reads with model.context enhanced-prompt; "
        if _is_text_file(source):
            problem += f"a .txt holds one caption: write {METADATA} in place of the .txt files, there"
        else:
            problem += "write"
        return [f'{problem} "captions": {{"short": "...", "{teacher}": "..."}} (model.context_variant)']
    if len(captions) == 1:
        return [f"there is only {teacher!r}, which is the teacher's alone; add a caption for the student"]
    return []


def _is_text_file(source: str) -> bool:
    return source.lower().endswith(TEXTS)


def leaked(
    train: Sequence[Seen], held_out: Sequence[Seen], folder: str, max_bits: int
) -> tuple[list[Fault], list[Fault]]:
    """Held-out truths that a training row has as its picture or as a reference: the model would have seen the answer.

    First the same files, then near duplicates.

    The other way round is no fault. A training *picture* that is a held-out row's *reference* was learnt as the answer
    to another question; here it is part of the question, shown to base and tuned model alike, and what both are
    compared with is another picture, which was not seen. Chains are made of it: the sketch of a photograph is one
    row's picture, and the next row's reference, to be coloured.
    """
    known = [(f"training picture {row.name}", row.target) for row in train if row.target is not None]
    known += [(f"reference {name} of training row {row.line}", facts) for row in train
              for name, facts in row.references if facts is not None]  # fmt: skip
    truths = [(row, row.target) for row in held_out if row.target is not None]
    near = near_duplicates([facts.fingerprint for _, facts in (*known, *truths)], max_bits)
    faults: tuple[list[Fault], list[Fault]] = ([], [])
    for index, (row, truth) in enumerate(truths):
        # after a small edit a truth is like what it was made of: that this was seen in training says nothing
        own = {facts.sha256 for _, facts in row.references if facts is not None}
        seen = known if len(known) + index in near else []
        same = next((what for what, facts in seen if facts.sha256 == truth.sha256), None)
        alike = (what for what, facts in seen if facts.sha256 not in own
                 and near_duplicates([facts.fingerprint, truth.fingerprint], max_bits))  # fmt: skip
        if found := same or next(alike, None):
            problem = f"{row.name} is held-out truth but a copy of the {found}; remove one"
            fault = Fault(f"{folder}/{row.source}", row.line or None, "image", problem)
            faults[0 if same else 1].append(fault)
    return faults
