"""The rows of a concept folder as they are written: one as a table has it, or a text file beside a picture.

Whatever the bytes are, the outcome is a list of :class:`Record`; what could not be read is in its ``problems``.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .dvc_cache import is_cached
from .images import EXTENSIONS
from .text import decoded, folded

SINGLE_VARIANT = "caption"
"""The variant name of a caption that was given alone."""
BAD_NAME = "the file's name holds control characters or is not valid UTF-8; rename it"
"""What to say of a picture whose name is no text."""
KEYS = ("image", "caption", "captions", "references", "repeats")
"""Of a row in this project's own words."""
TEXTS = (".txt", ".caption")
"""Endings of files that hold a picture's caption."""
MAX_REPEATS = 999
SHOWN = 80
"""Letters of what somebody wrote that a message shows."""
MAX_TEXT_BYTES = 64 << 10
"""Of a caption's own file."""


@dataclass
class Record:
    """One row as it is written. ``row``: from 1, or 0 for something about the file ``source`` as a whole.

    ``problems``: (column or ``None``, what could not be read and what to do).
    """

    source: str
    row: int
    image: str | None = None
    captions: dict[str, str] | None = None
    references: list[str] = field(default_factory=list)
    repeats: int | None = None
    problems: list[tuple[str | None, str]] = field(default_factory=list)

    def cells(self) -> tuple[str, int, str | None, str | None, str, int, str]:
        """The row as the table's cells: plain text throughout, safe to print and to store."""
        captions = None if self.captions is None else json.dumps(self.captions)
        image = None if self.image is None or not is_text(self.image) else self.image
        references = [name for name in self.references if is_text(name)]
        problems = [(column, shown(problem)) for column, problem in self.problems]
        return (
            shown(self.source),
            self.row,
            image,
            captions,
            json.dumps(references),
            self.repeats or 1,
            json.dumps(problems),
        )


def is_text(text: str) -> bool:
    """Whether ``text`` is free of control characters, line breaks and halves of surrogate pairs."""
    return not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)


def shown(text: str, limit: int = 4096) -> str:
    """``text`` made safe to print on one line."""
    safe = "".join(c if is_text(c) else ascii(c)[1:-1] for c in text[: limit + 1])
    return safe if len(text) <= limit else safe[:limit] + "..."


def leaves(folder: Path, name: str) -> bool:
    """Whether ``name``, links followed, lies outside ``folder``, and not in DVC's cache either."""
    root = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(root, name))
    return os.path.commonpath([root, path]) != root and not is_cached(path, folder)


# --- images with texts beside them -----------------------------------------------------------------------------------


def read_texts(folder: Path, images: Sequence[str], texts: Sequence[str]) -> list[Record]:
    """A row for every picture, in the order of their names; a fault for every text without one.

    The text of ``0.png`` is ``0.txt`` or ``0.png.txt``, with any ending of :data:`TEXTS`.
    """
    by_stem: dict[str, str] = {}
    records: list[Record] = []
    for text in texts:
        first = by_stem.setdefault(stem_of(text), text)
        if first != text:
            records.append(Record(text, 0, problems=[(None, f"{first} is there too; keep one caption file")]))
    seen: dict[str, str] = {}
    for image in images:
        stem, whole = stem_of(image), composed(image)
        beside = by_stem.get(whole, by_stem.get(stem))
        if not is_text(image):
            records.append(Record(image, 0, problems=[("image", BAD_NAME)]))
        elif beside is None:
            problem = f"has no caption: write {shown(caption_file(image, texts))} beside it"
            records.append(Record(image, 0, image, problems=[("captions", problem)]))
        elif whole in by_stem and stem in by_stem:
            problem = f"{by_stem[stem]} is there too; keep one caption file"
            records.append(Record(beside, 1, problems=[(None, problem)]))
        elif beside in seen:
            problem = f"{seen[beside]} and {image} share one caption file; give each picture a name of its own"
            records.append(Record(beside, 1, problems=[("image", problem)]))
        else:
            records.append(_read_text(folder, image, beside))
        seen |= {by_stem[name]: image for name in (stem, whole) if name in by_stem}
    orphans = [text for text in by_stem.values() if text not in seen]
    return records + [Record(text, 0, problems=[(None, describe_extra(text))]) for text in orphans]


def caption_file(image: str, texts: Sequence[str]) -> str:
    """What the text beside ``image`` is called, where the other pictures have ``texts``."""
    example = Path(next(iter(texts), ".txt"))
    whole = Path(example.stem).suffix.lower() in EXTENSIONS
    return f"{composed(image) if whole else stem_of(image)}{example.suffix or '.txt'}"


def _read_text(folder: Path, image: str, text: str) -> Record:
    record = Record(text, 1, image)
    content = read_text(folder / text, record, MAX_TEXT_BYTES)
    if content is not None:
        record.captions = {SINGLE_VARIANT: folded(content)}
    return record


def read_text(path: Path, record: Record, most: int) -> str | None:
    """A file's text, of at most ``most`` bytes; ``None`` where there is none, and why in the record."""
    content = _read_bytes(path, record, most)
    try:
        return None if content is None else decoded(content)
    except ValueError as error:
        record.problems.append((None, str(error)))
        return None


def _read_bytes(path: Path, record: Record, most: int) -> bytes | None:
    try:
        if not path.is_file():
            raise OSError("not an ordinary file")
        with path.open("rb") as file:
            content = file.read(most + 1)  # not by its size beforehand: a file may grow
        if len(content) > most:
            raise OSError(f"larger than {most >> 10:,} KiB; it should hold captions and paths only")
        return content
    except OSError as error:
        record.problems.append((None, f"cannot be read ({shown(error.strerror or str(error))}); check it"))
        return None


# --- one row of a table -----------------------------------------------------------------------------------------------


def to_record(source: str, number: int, value: Any) -> Record:
    """A row in :data:`KEYS`; ``value`` is whatever stands there."""
    record = Record(source, number)
    if not isinstance(value, dict):
        problem = f"expected an object with image and captions, found {_kind(value)}; write {{...}}"
        record.problems.append((None, problem))
        return record
    unknown = [key for key in value if key not in KEYS]
    if unknown:
        record.problems.append((None, describe_unknown(unknown)))
    _take_image(record, value)
    _take_captions(record, value)
    _take_references(record, value)
    _take_repeats(record, value)
    return record


def _take_image(record: Record, value: Mapping[str, Any]) -> None:
    image = value.get("image")
    if "image" not in value:
        record.problems.append(("image", "missing; name the picture's file"))
    elif not isinstance(image, str) or not image.strip():
        found = "an empty text" if isinstance(image, str) else _kind(image)
        record.problems.append(("image", f"expected the path of a picture, found {found}; name the picture's file"))
    elif not is_text(image):
        record.problems.append(("image", f"{shown(image, SHOWN)}: control characters in a path; rename the file"))
    else:
        record.image = image


def _take_captions(record: Record, value: Mapping[str, Any]) -> None:
    captions = value.get("captions")
    if "caption" in value and "captions" in value:
        record.problems.append(("captions", "both caption and captions are given; keep one of them"))
    elif "caption" in value:
        if isinstance(value["caption"], str):
            record.captions = {SINGLE_VARIANT: folded(value["caption"])}
        else:
            record.problems.append(("caption", f"expected a text, found {_kind(value['caption'])}; write the caption"))
    elif "captions" not in value:
        record.problems.append(("captions", "missing; write caption or captions"))
    elif not isinstance(captions, dict):
        found = _kind(captions)
        record.problems.append(("captions", f'expected {{"short": "...", ...}}, found {found}; write the captions'))
    else:
        wrong = [name for name, text in captions.items() if not isinstance(text, str)]
        for name in wrong:
            problem = f"{shown(name, SHOWN)!r} is {_kind(captions[name])} instead of a text; write the caption"
            record.problems.append(("captions", problem))
        if not wrong:
            record.captions = {name: folded(text) for name, text in captions.items()}


def _take_references(record: Record, value: Mapping[str, Any]) -> None:
    references = value.get("references", [])
    if not isinstance(references, list) or not all(isinstance(name, str) and name.strip() for name in references):
        problem = f"expected a list of paths, found {_kind(references)} that is none; list the files or leave it out"
        record.problems.append(("references", problem))
        return
    for name in references:
        if is_text(name):
            record.references.append(name)
        else:
            problem = f"{shown(name, SHOWN)}: control characters in a path; rename the file"
            record.problems.append(("references", problem))


def _take_repeats(record: Record, value: Mapping[str, Any]) -> None:
    """A CSV has it as a text, and a table that leaves it out somewhere as a float."""
    given = value.get("repeats", 1)
    try:
        number = 0 if isinstance(given, bool) or float(given) != int(given) else int(given)
    except (TypeError, ValueError, OverflowError):
        number = 0
    if 1 <= number <= MAX_REPEATS:
        record.repeats = number if "repeats" in value else None
    else:
        found = shown(str(given), SHOWN)
        record.problems.append(
            ("repeats", f"expected a whole number from 1 to {MAX_REPEATS}, found {found}; correct it")
        )


def describe_unknown(keys: Sequence[Any]) -> str:
    """What to say of keys that mean nothing."""
    names = ", ".join(shown(str(key), SHOWN) for key in keys[:5]) + (", ..." if len(keys) > 5 else "")
    return f"unknown {'key' if len(keys) == 1 else 'keys'} {names}; known are {', '.join(KEYS)}: rename or remove"


def _kind(value: Any) -> str:
    """What a JSON value is, in a person's words."""
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a text"}
    return {**names, list: "a list", dict: "an object"}.get(type(value), type(value).__name__)


# --- names and what to say of them ------------------------------------------------------------------------------------


def stem_of(file: str) -> str:
    """The name without its last extension: what a picture and its caption file share, composed (NFC)."""
    return composed(file.rpartition(".")[0])


def composed(name: str) -> str:
    """``name`` in NFC: one spelling of what looks the same (é is one code point, or on a Mac's disks two)."""
    return unicodedata.normalize("NFC", name)


def as_on_disk(records: Sequence[Record], files: Sequence[str]) -> None:
    """Put a file's own spelling where a record has another spelling (NFC, NFD) of the same name."""
    known, spelled = set(files), {composed(file): file for file in files}

    def own(name: str) -> str:
        path = os.path.normpath(name)
        return name if path in known else spelled.get(composed(path), name)

    for record in records:
        record.image = None if record.image is None else own(record.image)
        record.references = [own(name) for name in record.references]


def describe_extra(file: str) -> str:
    """What to say of a file that no row needs."""
    suffix = Path(file).suffix.lower()
    if suffix in EXTENSIONS:
        return "no row mentions this picture; add a row for it or take it out of the folder"
    if suffix in TEXTS:
        return "there is no picture of this name beside it; add the picture or remove the text"
    return "not part of the data set (pictures are PNG, JPEG, WEBP, AVIF, HEIC); take it out or convert it"
