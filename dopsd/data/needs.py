"""What the teacher's context asks of the data: references or none, and the caption that is the teacher's alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .duplicates import near_duplicates
from .images import ImageFacts
from .manifest import ConceptTable, Fault

MIN_SIDE, MAX_RATIO = 64, 8.0
"""What an editing pipeline takes as a reference (pixels; long side over short one)."""


@dataclass(frozen=True)
class Needs:
    """``teacher_variant``: the caption that every row must have for the teacher, beside one for the student."""

    references: Literal["refused", "allowed", "required"] = "allowed"
    teacher_variant: str | None = None


def faults_of(
    table: ConceptTable,
    targets: Sequence[ImageFacts],
    references: Sequence[Sequence[ImageFacts]],
    needs: Needs,
    folder: str,
) -> list[Fault]:
    """What rows lack or have too much. ``targets``, ``references``: what is known of each row's pictures."""
    faults = []
    for row, target, shown in zip(table.rows, targets, references, strict=True):
        place = f"{folder}/{row.source}"
        problems: list[tuple[str, str]] = []
        if needs.references == "refused" and shown:
            problems.append(("references", "this context shows the student none; remove them, or set model.context to "
                             "edit-reference with a family that edits"))  # fmt: skip
        if needs.references == "required" and not shown:
            problems.append(("references", "none given, and model.context is edit-reference; name at least one picture "
                             "in metadata.jsonl, for example \"references\": [\"before.png\"]"))  # fmt: skip
        for path, facts in zip(row.references, shown, strict=True):
            size = f"{path.name} is {facts.width} x {facts.height} pixels"
            if min(facts.width, facts.height) < MIN_SIDE:
                problems.append(("references", f"{size}, at least {MIN_SIDE} a side are needed; give a larger one"))
            elif max(facts.width, facts.height) > MAX_RATIO * min(facts.width, facts.height):
                problems.append(("references", f"{size}, longer than {MAX_RATIO:g} : 1; crop it"))
            if facts.sha256 == target.sha256:
                problems.append(("references", f"{path.name} is the row's own image; the student would be shown the "
                                 "answer: give the picture before the edit"))  # fmt: skip
        problems += [("captions", text) for text in _variants(row.captions, needs.teacher_variant)]
        faults += [Fault(place, row.line, column, problem) for column, problem in problems]
    return faults


def _variants(captions: Sequence[tuple[str, str]], teacher: str | None) -> list[str]:
    if teacher is None:
        return []
    names = [name for name, _ in captions]
    if teacher not in names:
        return [f"there is no {teacher!r}, which the teacher reads with model.context enhanced-prompt; add it "
                "(model.context_variant)"]  # fmt: skip
    if names == [teacher]:
        return [f"there is only {teacher!r}, which is the teacher's alone; add a caption for the student"]
    return []


def leaked_references(
    table: ConceptTable,
    references: Sequence[Sequence[ImageFacts]],
    held_out: ConceptTable,
    truths: Sequence[ImageFacts],
    folder: str,
    max_bits: int,
) -> list[Fault]:
    """Held-out truths that a training row shows as a reference: the model would have seen the answer."""
    shown = [(row, path, facts) for row, several in zip(table.rows, references, strict=True)
             for path, facts in zip(row.references, several, strict=True)]  # fmt: skip
    near = near_duplicates([facts.fingerprint for facts in (*(facts for *_, facts in shown), *truths)], max_bits)
    exact = {facts.sha256: number for number, (*_, facts) in enumerate(shown)}
    faults = []
    for index, (row, truth) in enumerate(zip(held_out.rows, truths, strict=True)):
        match = exact.get(truth.sha256, near.get(len(shown) + index, (len(shown), 0))[0])
        if match < len(shown):
            training, path, _ = shown[match]
            problem = (f"{row.image.name} is held-out truth but a copy of the reference {path.name} of training row "
                       f"{training.line}; remove one")  # fmt: skip
            faults.append(Fault(f"{folder}/{row.source}", row.line, "image", problem))
    return faults
