"""Every check of a concept data set, as one pandera schema: all faults at once, each naming file and row.

The table of :func:`dopsd.data.manifest.read_table` is first completed with what can be measured of every picture (size,
hashes, what is wrong with the file); the schema then judges rows and table, and its failure cases become the faults of
one :class:`DataError`. Nothing is dropped, repaired or replaced. The only pandera import of the project.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pandera.pandas as pa

from ..config.groups import DataSettings, Judgement
from .duplicates import near_duplicates
from .folders import kohya_repeats, path_problem
from .images import FULL_AREA, ImageError, ImageFacts, inspect_image
from .manifest import HOLDOUT, ConceptTable, DataError, Fault, Row, hash_content, read_table
from .needs import ANY, Needs, Seen, leaked, unmet
from .placeholder import alone, describe, describe_none, lacking
from .records import is_text, shown

MAX_ASPECT = 4.0
"""A longer strip would lose most of itself when it is cropped to a bucket."""


def validate_dataset(
    folder: Path, name: str, settings: DataSettings, needs: Needs = ANY
) -> tuple[ConceptTable, ConceptTable | None]:
    """Check a concept folder and its held-out part together: (training table, held-out table or ``None``).

    ``needs``: what the teacher's context asks of the rows. A picture that is in both parts would make the evaluation
    worthless: that is a fault too, for near copies as well. Raises :class:`DataError` with the faults of both parts.
    """
    parts = [_validate(folder, name, settings, needs, held_out=False)]
    if os.path.lexists(folder / HOLDOUT):
        beside = _with_pictures(needs, parts[0].rows)  # the evaluation's teacher is shown a picture of training
        parts.append(_validate(folder / HOLDOUT, f"{name}/{HOLDOUT}", settings, beside, held_out=True))
    faults = [fault for part in parts for fault in part.faults]
    if len(parts) == 2:
        train, held_out = parts
        same, near = leaked(train.rows, held_out.rows, str(held_out.folder), settings.near_duplicate_bits)
        if "near-duplicates" in settings.allow:
            parts[1] = replace(held_out, warnings=(*held_out.warnings, *near))
        else:
            same += [replace(fault, problem=fault.problem + _unless("near-duplicates")) for fault in near]
        faults += same
    if faults:
        raise DataError(faults)
    return parts[0].table(), parts[1].table() if len(parts) == 2 else None


def _unless(word: Judgement) -> str:
    """How a fault that is a matter of taste ends."""
    return f" (or data.allow: [{word}])"


@dataclass(frozen=True)
class _Part:
    """One folder, measured and judged: its rows as far as they could be read, and what is wrong with them."""

    folder: Path
    name: str
    frame: pd.DataFrame
    rows: tuple[Seen, ...]
    faults: tuple[Fault, ...]
    warnings: tuple[Fault, ...]

    def table(self) -> ConceptTable:
        """The rows of a folder without faults."""
        root = Path(os.path.abspath(self.folder))
        rows = tuple(_row(root, cells) for cells in self.frame.to_dict("records"))
        # ten times each is once each, and in a better mixed order
        common = math.gcd(*(row.repeats for row in rows))
        rows = tuple(replace(row, repeats=row.repeats // common) for row in rows)
        listed = [
            (_identity(seen.target), row.captions, [_identity(facts) for _, facts in seen.references], row.repeats)
            for seen, row in zip(self.rows, rows, strict=True)
        ]
        return ConceptTable(self.name, root, rows, hash_content(listed), self.warnings, self.frame.attrs["read_as"])


def _identity(facts: ImageFacts | None) -> str:
    return facts.identity if facts else ""


def _validate(folder: Path, name: str, settings: DataSettings, needs: Needs, *, held_out: bool) -> _Part:
    """``held_out``: one picture is enough there, its captions need not name the concept, and folders mean nothing."""
    root = Path(os.path.abspath(folder))
    frame = read_table(root, name, any_folder=held_out or "folder-names" in settings.allow)
    facts = _measure(frame, root, settings)
    cells = frame.to_dict("records")
    rows = tuple(_seen(row, facts) for row in cells)
    needs = needs if held_out else _with_pictures(needs, rows)
    captions = [_student_captions(row, needs) for row in cells]
    lacks = [lacking(texts, settings.placeholder) for texts in captions]
    near = [{variant: found for variant, found in row.items() if found} for row in lacks]
    allowed = "captions-without-placeholder" in settings.allow
    texts = [text for row in captions for text in row.values()]
    named = allowed or held_out or not texts or any(settings.placeholder in text for text in texts)
    named = named or any(near)  # where no caption holds it, that is one fault of the table
    wrong = [{} for _ in rows] if allowed else near if held_out or not named else lacks
    frame["unmet"] = [
        json.dumps(_unmet(row, cell, needs) + _describe_lacking(found, settings))
        for row, cell, found in zip(rows, cells, wrong, strict=True)
    ]
    faults = _judge(frame, folder, settings, named, min_images=1 if held_out else settings.min_images)
    warnings = [
        Fault(str(folder / row.source), row.line or None, column, shown(problem))
        for row, texts, found in zip(rows, captions, near, strict=True)
        for column, problem in [
            *_remarks(row, facts, settings),
            *(("captions", f"{shown(one)!r} is {settings.placeholder} and nothing else; say what the picture shows")
              for one in alone(texts, settings.placeholder)),
            *(_describe_lacking(found, settings) if allowed else ()),
        ]
    ]  # fmt: skip
    if not held_out and frame["repeats"].nunique() > 1:
        counted = "times as its name says, as with kohya's tools; rename the folder if that is not meant"
        folders = kohya_repeats(row.name for row in rows if row.name is not None)
        warnings += [Fault(shown(str(folder / place)), None, None, f"each of its pictures counts {number} {counted}")
                     for place, number in folders.items()]  # fmt: skip
    return _Part(folder, name, frame, rows, tuple(faults), tuple(warnings))


def _student_captions(cells: Mapping[str, Any], needs: Needs) -> dict[str, str]:
    """By variant, those that must name the concept: not the teacher's own."""
    captions = json.loads(cells["captions"]) if isinstance(cells["captions"], str) else {}
    return {variant: text for variant, text in captions.items() if variant != needs.teacher_variant}


def _texts_of(frame: pd.DataFrame) -> list[str]:
    return [text for cell in frame["captions"] if isinstance(cell, str) for text in json.loads(cell).values()]


def _describe_lacking(found: Mapping[str, str], settings: DataSettings) -> list[tuple[str, str]]:
    """(column, problem) of each caption without the placeholder; ``found``: variant to what nearly is one."""
    ending = _unless("captions-without-placeholder")
    return [("captions", describe(shown(variant), shown(near), settings.placeholder) + ("" if near else ending))
            for variant, near in found.items()]  # fmt: skip


def _remarks(row: Seen, facts: Mapping[str, ImageFacts], settings: DataSettings) -> Iterator[tuple[str, str]]:
    """(column, what is worth knowing) of a row's pictures."""
    pictures = [("image", row.name, row.target), *(("references", *reference) for reference in row.references)]
    for column, name, found in pictures:
        for remark in found.remarks if found else ():
            yield column, f"{name}: {remark}"
    if row.target and row.target.width * row.target.height < FULL_AREA * settings.resolution**2:
        side, size = settings.resolution, f"{row.target.width} x {row.target.height}"
        yield (
            "image",
            f"{row.name} is {size} pixels, and is enlarged to as many as {side} x {side}; a larger one is better",
        )


def _seen(cells: Mapping[str, Any], facts: Mapping[str, ImageFacts]) -> Seen:
    name = cells["image"] if isinstance(cells["image"], str) else None
    references = tuple((reference, facts.get(reference)) for reference in json.loads(cells["references"]))
    return Seen(cells["source"], int(cells["row"]), name, facts.get(name) if name is not None else None, references)


def _with_pictures(needs: Needs, rows: Iterable[Seen]) -> Needs:
    """With the room that these rows' pictures take in what the teacher reads: without held-out rows, the evaluation
    shows it any of them beside any caption."""
    if needs.reader is None:
        return needs
    sizes = {(row.target.width, row.target.height) for row in rows if row.target is not None}
    return replace(needs, shown=needs.reader.picture_tokens(sizes))


def _unmet(row: Seen, cells: Mapping[str, Any], needs: Needs) -> list[tuple[str, str]]:
    captions = json.loads(cells["captions"]) if isinstance(cells["captions"], str) else None
    unread = [column for column, _ in json.loads(cells["problems"])]
    return [(column, shown(problem)) for column, problem in unmet(row, captions, unread, needs)]


def _row(root: Path, cells: Mapping[str, Any]) -> Row:
    captions = tuple(json.loads(cells["captions"]).items())
    references = tuple(root / name for name in json.loads(cells["references"]))
    return Row(root / cells["image"], captions, references, cells["source"], cells["row"], cells["repeats"])


# --- what can be measured --------------------------------------------------------------------------------------------


def _measure(frame: pd.DataFrame, root: Path, settings: DataSettings) -> dict[str, ImageFacts]:
    """Add the columns ``image_problem, reference_problems, size, pixels, aspect, copy_of`` to ``frame``.

    Returns what is known of every sound picture by its name in the table; each file is decoded once.
    """
    facts: dict[str, ImageFacts] = {}
    problems: dict[str, str] = {}

    def problem(name: str) -> str:
        if name not in facts and name not in problems:
            wrong = path_problem(root, name)
            try:
                if not wrong:
                    facts[name] = inspect_image(root / name, settings.max_pixels)
            except ImageError as error:
                wrong = error.problem
            if wrong:
                problems[name] = f"{name}: {wrong}"
        return problems.get(name, "")

    images = [name if isinstance(name, str) else None for name in frame["image"]]
    frame["image_problem"] = ["" if name is None else problem(name) for name in images]
    references = [[problem(name) for name in json.loads(cell)] for cell in frame["references"]]
    frame["reference_problems"] = [json.dumps([wrong for wrong in wrongs if wrong]) for wrongs in references]
    sizes = [(facts[name].width, facts[name].height) if name in facts else None for name in images]
    frame["size"] = [f"{size[0]} x {size[1]}" if size else "" for size in sizes]
    frame["pixels"] = [float(size[0] * size[1]) if size else math.nan for size in sizes]
    frame["aspect"] = [max(size) / min(size) if size else math.nan for size in sizes]
    frame["copy_of"] = _copies(frame, images, facts, settings)
    return facts


def _copies(
    frame: pd.DataFrame, images: list[str | None], facts: Mapping[str, ImageFacts], settings: DataSettings
) -> list[str]:
    """For each row whose picture is a copy of an earlier row's, what it copies and how exactly; else empty."""
    word: Judgement
    known = [(index, facts[name]) for index, name in enumerate(images) if name is not None and name in facts]
    near = near_duplicates([one.fingerprint for _, one in known], settings.near_duplicate_bits)
    first: dict[str, int] = {}
    found = [""] * len(frame)
    for position, (index, one) in enumerate(known):
        match = first.setdefault(one.sha256, position)
        if match < position:
            how, word = "is the same picture as", "copies"
        elif position in near:
            match, bits = near[position]
            how, word = f"is nearly the same picture (hash {bits} of 64 bits apart) as", "near-duplicates"
        else:
            continue
        if word in settings.allow:
            continue
        twin = known[match][0]
        place = f"row {frame['row'][twin]}" if frame["source"][twin] == frame["source"][index] else "its own caption"
        found[index] = f"{images[index]} {how} {images[twin]} ({place}); remove one{_unless(word)}"
    return found


# --- the schema ------------------------------------------------------------------------------------------------------


def _count(frame: pd.DataFrame) -> int:
    """Rows that stand for a picture, sound or not."""
    return int(((frame["row"] > 0) | frame["image"].notna()).sum())


def _empty_captions(cell: str) -> list[str]:
    return [variant for variant, text in json.loads(cell).items() if not text.strip()]


def _unclean_captions(cell: str) -> list[str]:
    captions = json.loads(cell).items()
    return [shown(variant) for variant, text in captions if not variant.strip() or not is_text(variant + text)]


def concept_schema(settings: DataSettings, named: bool, min_images: int) -> pa.DataFrameSchema:
    """The schema of a measured table. The ``error`` of each check is its key in ``_MESSAGES``.

    ``named``: whether any caption names the concept, or none has to.
    """

    def enough(frame: pd.DataFrame) -> bool:
        return _count(frame) >= min_images or _count(frame) == 0  # none at all is said elsewhere

    def each(condition: Callable[[Any], bool], key: str) -> pa.Check:
        return pa.Check(condition, element_wise=True, error=key)

    area = 0 if "small-pictures" in settings.allow else (settings.resolution / 2) ** 2
    longest = math.inf if "long-pictures" in settings.allow else MAX_ASPECT
    return pa.DataFrameSchema(
        {
            "source": pa.Column(),
            "row": pa.Column(int),
            "repeats": pa.Column(int),
            "problems": pa.Column(checks=each(lambda cell: cell == "[]", "unreadable")),
            "image": pa.Column(nullable=True),
            "captions": pa.Column(
                nullable=True,
                checks=[
                    each(lambda cell: cell != "{}", "no_caption"),
                    each(lambda cell: not _empty_captions(cell), "empty_caption"),
                    each(lambda cell: not _unclean_captions(cell), "unclean_caption"),
                ],
            ),
            "image_problem": pa.Column(checks=each(lambda problem: not problem, "bad_image")),
            "reference_problems": pa.Column(checks=each(lambda cell: cell == "[]", "bad_reference")),
            "unmet": pa.Column(checks=each(lambda cell: cell == "[]", "unmet")),
            "pixels": pa.Column(float, nullable=True, checks=each(lambda pixels: pixels >= area, "too_small")),
            "aspect": pa.Column(float, nullable=True, checks=each(lambda aspect: aspect <= longest, "too_long")),
            "copy_of": pa.Column(checks=each(lambda copy: not copy, "duplicate")),
        },
        checks=[pa.Check(enough, error="too_few"), pa.Check(lambda _: named, error="no_placeholder")],
    )


def _judge(frame: pd.DataFrame, folder: Path, settings: DataSettings, named: bool, min_images: int) -> list[Fault]:
    """Every fault of a measured table: those of rows in the rows' order, then those of the table as a whole."""
    try:
        concept_schema(settings, named, min_images).validate(frame, lazy=True)
    except pa.errors.SchemaErrors as error:
        cases = error.failure_cases
    else:
        return []
    found = zip(cases["check"], cases["index"], strict=True)
    failed = {(str(key), -1 if pd.isna(index) else int(index)) for key, index in found}
    order = {key: position for position, key in enumerate((*_MESSAGES, *_TABLE_MESSAGES))}
    faults: list[Fault] = []
    for key, index in sorted(failed, key=lambda case: (case[1] < 0, case[1], order[case[0]])):
        if index < 0:
            faults.append(Fault(str(folder), None, None, _TABLE_MESSAGES[key](frame, settings, min_images)))
            continue
        cells = frame.loc[index]
        place, row = str(folder / cells["source"]), int(cells["row"]) or None
        faults += [Fault(place, row, column, problem) for column, problem in _MESSAGES[key](cells, settings)]
    return faults


_Problems = list[tuple[str | None, str]]


def _describe_unclean(cells: Mapping[str, Any], _: DataSettings) -> _Problems:
    advice = "holds control characters or line breaks, or has no name; write it on one line"
    return [("captions", f"{variant!r} {advice}") for variant in _unclean_captions(cells["captions"])]


def _describe_small(cells: Mapping[str, Any], settings: DataSettings) -> _Problems:
    side = settings.resolution
    problem = f"{cells['image']} is too small: {cells['size']} pixels, less than half the side of {side} x {side}; "
    return [("image", f"{problem}give a larger one{_unless('small-pictures')}")]


def describe_long(size: str) -> str:
    """What to say of a picture that is longer than :data:`MAX_ASPECT`; ``size``: ``WIDTH x HEIGHT``."""
    return f"is {size} pixels, longer than {MAX_ASPECT:g} : 1; crop it{_unless('long-pictures')}"


# Check of the schema -> the (column, problem) pairs that it means for the row that failed it; also the faults' order.
_MESSAGES: dict[str, Callable[[Mapping[str, Any], DataSettings], _Problems]] = {
    "unreadable": lambda cells, _: [(column, problem) for column, problem in json.loads(cells["problems"])],
    "bad_image": lambda cells, _: [("image", cells["image_problem"])],
    "too_small": _describe_small,
    "too_long": lambda cells, _: [("image", f"{cells['image']} {describe_long(cells['size'])}")],
    "duplicate": lambda cells, _: [("image", cells["copy_of"])],
    "no_caption": lambda cells, _: [("captions", "is empty; write at least one caption")],
    "empty_caption": lambda cells, _: [
        ("captions", f"{shown(variant)!r} is empty; write it or remove it")
        for variant in _empty_captions(cells["captions"])
    ],
    "unclean_caption": _describe_unclean,
    "bad_reference": lambda cells, _: [("references", wrong) for wrong in json.loads(cells["reference_problems"])],
    "unmet": lambda cells, _: [(column, problem) for column, problem in json.loads(cells["unmet"])],
}

_TABLE_MESSAGES: dict[str, Callable[[pd.DataFrame, DataSettings, int], str]] = {
    "too_few": lambda frame, _, needed: (
        f"too few images: {_count(frame)}, at least {needed} are needed; add more (data.min_images)"
    ),
    "no_placeholder": lambda frame, settings, __: (
        describe_none(_texts_of(frame), settings.placeholder) + _unless("captions-without-placeholder")
    ),
}
