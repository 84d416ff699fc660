"""What the teacher's context asks of the data: references or none, and the caption that is the teacher's alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .duplicates import near_duplicates
from .images import ImageFacts
from .manifest import METADATA, Fault, Row

MIN_SIDE, MAX_RATIO = 64, 8.0
"""What an editing pipeline takes as a reference (pixels; long side over short one)."""

_Said = tuple[str, str]
"""(column, problem)."""


@dataclass(frozen=True)
class Needs:
    """``teacher_variant``: the caption that every row must have for the teacher, beside one for the student."""

    references: Literal["refused", "allowed", "required"] = "allowed"
    teacher_variant: str | None = None


@dataclass(frozen=True)
class Seen:
    """A row's pictures as far as they could be read. ``source``, ``line``: where the row is; names as written there."""

    source: str
    line: int
    name: str | None
    target: ImageFacts | None
    references: tuple[tuple[str, ImageFacts | None], ...]


def unmet(row: Seen, captions: Mapping[str, str] | None, unread: Collection[str | None], needs: Needs) -> list[_Said]:
    """What a row lacks or has too much, as (column, problem) pairs; a row without a picture lacks nothing more.

    ``captions``: by variant, ``None`` where they could not be read; ``unread``: columns that were said to be unreadable.
    """
    if row.name is None:
        return []
    said: list[_Said] = []
    if needs.references == "refused" and row.references:
        said.append(("references", "this context shows the student none; remove them, or set model.context to "
                     "edit-reference with a family that edits"))  # fmt: skip
    elif needs.references == "required" and not row.references and not {None, "references"} & set(unread):
        said.append(("references", _say_none(row)))
    if needs.references != "refused":
        for name, facts in row.references:
            said += [("references", problem) for problem in _unfit(name, facts, row.target)]
    if captions:
        said += [("captions", problem) for problem in lacking_variant(captions, needs.teacher_variant, row.source)]
    return said


def _say_none(row: Seen) -> str:
    needed = "none given, and model.context is edit-reference; "
    if _is_text_file(row.source):
        return (f"{needed}a .txt cannot name any: write {METADATA} in place of the .txt files, one line a picture: "
                f'{{"image": "{row.name}", "caption": "...", "references": ["before.png"]}}')  # fmt: skip
    return f'{needed}name at least one picture, for example "references": ["before.png"]'


def _unfit(name: str, facts: ImageFacts | None, target: ImageFacts | None) -> list[str]:
    """What is wrong with a reference that can be decoded."""
    if facts is None:
        return []
    said = []
    size = f"{name} is {facts.width} x {facts.height} pixels"
    if min(facts.width, facts.height) < MIN_SIDE:
        said.append(f"{size}, at least {MIN_SIDE} a side are needed; give a larger one")
    if max(facts.width, facts.height) > MAX_RATIO * min(facts.width, facts.height):
        said.append(f"{size}, longer than {MAX_RATIO:g} : 1; crop it")
    # only the same file: after a small edit, before and after are near duplicates, as they should be
    if target is not None and facts.sha256 == target.sha256:
        said.append(f"{name} is the row's own image; the student would be shown the answer: give the picture before "
                    "the edit")  # fmt: skip
    return said


def lacking_variant(captions: Mapping[str, str], teacher: str | None, source: str = METADATA) -> list[str]:
    """What a row's captions lack where the teacher reads the variant ``teacher`` alone; nothing where that is None."""
    if teacher is None or not captions:
        return []
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


def lacking(rows: Sequence[Row], needs: Needs) -> str | None:
    """The first thing that checked rows lack or have too much for other needs than they were checked for, in words.

    Sizes of references were judged before and are not looked at again. ``None``: nothing.
    """
    for row in rows:
        place = f"{row.source}, row {row.line}"
        if needs.references == "refused" and row.references:
            return f"{place} names references"
        if needs.references == "required" and not row.references:
            return f"{place} names no reference"
        names = dict(row.captions)
        if needs.teacher_variant is not None and needs.teacher_variant not in names:
            return f"{place} has no caption {needs.teacher_variant!r}"
        if needs.teacher_variant is not None and len(names) == 1:
            return f"{place} has no caption beside {needs.teacher_variant!r}"
    return None


def _is_text_file(source: str) -> bool:
    return source.lower().endswith(".txt")


def leaked_references(train: Sequence[Seen], held_out: Sequence[Seen], folder: str, max_bits: int) -> list[Fault]:
    """Held-out truths that a training row shows as a reference: the model would have seen the answer.

    The other way round is no fault. A training *target* that is a held-out row's *reference* was learnt as an answer to
    another question; here it is what the question shows, to base and tuned model alike, and the truth that both are
    compared with is another picture, which was not seen. Chains are made of it: a sketch of the photograph is one
    row's target, and the next row's reference, to be coloured.
    """
    shown = [(row, name, facts) for row in train for name, facts in row.references if facts is not None]
    truths = [(row, row.target) for row in held_out if row.target is not None]
    near = near_duplicates([facts.fingerprint for _, _, facts in shown] + [t.fingerprint for _, t in truths], max_bits)
    faults = []
    for index, (row, truth) in enumerate(truths):
        own = {facts.sha256 for _, facts in row.references if facts is not None}
        for training, name, facts in shown if len(shown) + index in near or _is_among(truth, shown) else ():
            # Small edits of a shared picture look like it: that it is like its own reference says nothing.
            alike = facts.sha256 not in own and near_duplicates([facts.fingerprint, truth.fingerprint], max_bits)
            if facts.sha256 == truth.sha256 or alike:
                problem = (f"{row.name} is held-out truth but a copy of the reference {name} of training row "
                           f"{training.line}; remove one")  # fmt: skip
                faults.append(Fault(f"{folder}/{row.source}", row.line or None, "image", problem))
                break
    return faults


def _is_among(truth: ImageFacts, shown: Sequence[tuple[Seen, str, ImageFacts]]) -> bool:
    return any(facts.sha256 == truth.sha256 for _, _, facts in shown)
