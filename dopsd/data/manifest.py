"""A concept folder read into one table, whatever way it is written.

Exactly one of three kinds::

    metadata.jsonl   {"image": "a.png", "captions": {"short": "...", "medium": "..."}, "references": ["r.png"]}
                     or "caption": "..." in place of "captions"; one object a line; "repeats": how often it is drawn
    a.png + a.txt    the caption beside each picture; or a.caption, a.png.txt
    NAME.parquet     one table with the same columns; or NAME.csv

A table may be written in another tool's words (:mod:`dopsd.data.dialects`), and is called as that tool calls it.

A sub-folder ``holdout/`` is a concept folder of its own (the truth that evaluation compares with) and no part of this
table. Everything else in the folder must be mentioned by a row, apart from concept.json, train.yaml, README, LICENSE,
NOTICE, hidden files and what systems leave behind (Thumbs.db). A folder whose name says that it holds no training data
is a fault (:mod:`dopsd.data.folders`).

Nothing is judged here: :func:`read_table` writes what it could not read into the column ``problems``, and
:mod:`dopsd.data.schema` turns that and all its own findings into one :class:`DataError`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import OWN_SETTINGS
from .dialects import OWN
from .folders import HOLDOUT, is_leftover, kohya_repeats, not_for_training
from .images import EXTENSIONS
from .records import TEXTS, Record, as_on_disk, composed, describe_extra, leaves, read_texts, shown, stem_of
from .tables import TABLES, read_rows

if TYPE_CHECKING:
    import pandas as pd

METADATA = "metadata.jsonl"
ABOUT = "concept.json"
"""What kind of concept it is, for the evaluation (dopsd/evaluation/prompts.py reads it)."""
PROTOCOL = "protocol.jsonl"
"""The published evaluation's prompts (dopsd/evaluation/protocol.py): no rows."""
COLUMNS = ("source", "row", "image", "captions", "references", "repeats", "problems")
_MOST_SHOWN = 50
"""Faults that a person is shown at once."""
_DOCUMENTS = ("README", "LICENSE", "LICENCE", "NOTICE", "COPYING", "ATTRIBUTION")


@dataclass(frozen=True)
class Fault:
    """One thing wrong with the data: where, and what to do. ``row`` counts from 1; ``None`` is the file as a whole."""

    file: str
    row: int | None
    column: str | None
    problem: str

    def __str__(self) -> str:
        place = self.file + (f", row {self.row}" if self.row is not None else "")
        return f"{place}, {self.column}: {self.problem}" if self.column else f"{place}: {self.problem}"


class DataError(ValueError):
    """All that is wrong with a data set (``faults``), one line a fault; of very many the first, and how many more."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults: tuple[Fault, ...] = tuple(faults)
        more = len(self.faults) - _MOST_SHOWN
        lines = [*map(str, self.faults[:_MOST_SHOWN]), *([f"and {more:,} more"] if more > 0 else [])]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[DataError], tuple[tuple[Fault, ...]]]:
        return type(self), (self.faults,)  # across processes: from the faults, not from the text


@dataclass(frozen=True)
class Row:
    """One picture. ``image``: absolute. ``captions``: (variant name, text). ``source``, ``line``: where the row is.
    ``repeats``: how often it is drawn while another is drawn once; of a table they have no common divisor."""

    image: Path
    captions: tuple[tuple[str, str], ...]
    references: tuple[Path, ...]
    source: str
    line: int
    repeats: int = 1

    def caption(self, variant: str | None) -> str | None:
        """The caption of that name; ``None`` where there is none."""
        return dict(self.captions).get(variant) if variant is not None else None

    def student_captions(self, teacher_variant: str | None) -> list[str]:
        """The captions that the student reads: all but the one that is the teacher's alone."""
        return [text for variant, text in self.captions if variant != teacher_variant]


@dataclass(frozen=True)
class ConceptTable:
    """A data set that passed every check. ``content_hash``: sha256 of pictures and captions in the rows' order,
    the same wherever the folder lies, whatever the files are called and in whichever kind the rows are written."""

    name: str
    root: Path
    rows: tuple[Row, ...]
    content_hash: str
    warnings: tuple[Fault, ...] = field(default=(), compare=False)
    """What is no fault, and a person should know."""
    read_as: str = field(default="", compare=False)
    """How its rows are written, in words, and which columns were ignored."""

    def folders(self) -> dict[str, int]:
        """How many pictures lie in which folder, relative to ``root``; ``.`` is ``root`` itself."""
        return dict(sorted(Counter(os.path.relpath(row.image.parent, self.root) for row in self.rows).items()))


def hash_content(rows: Iterable[tuple[str, Iterable[tuple[str, str]], Iterable[str], int]]) -> str:
    """sha256 over (identity of the image, (variant, caption) pairs, identities of the references, repeats) of each row.
    Repeats came later: a row that is drawn once is what it was without them."""
    listed = [
        [image, [list(pair) for pair in captions], list(references), *([repeats] if repeats > 1 else [])]
        for image, captions, references, repeats in rows
    ]
    return hashlib.sha256(json.dumps(listed, ensure_ascii=True, separators=(",", ":")).encode("ascii")).hexdigest()


def kind_hash(folder: Path) -> str | None:
    """sha256 of ``concept.json``, and of the prompts of the published protocol where they are there; ``None`` where
    neither is."""
    found = [path for name in (ABOUT, PROTOCOL) if (path := folder / name).is_file()]
    hashes = []
    for path in found:
        with path.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    both = len(hashes) > 1 or any(path.name == PROTOCOL for path in found)
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest() if both else next(iter(hashes), None)


def read_table(folder: Path, name: str, any_folder: bool = False) -> pd.DataFrame:
    """All rows of the concept folder ``name`` as :data:`COLUMNS`; ``attrs["read_as"]``: how they are written, in words.

    ``source``: the file that holds the row, relative; ``row``: from 1, or 0 for a fault of the file as a whole.
    ``image``: relative path as written, or as the disk spells it; ``captions``: JSON object, ``references``: JSON list;
    ``None`` where they could not be read. ``repeats``: as written, or as its folder's name says, else 1. ``problems``:
    JSON list of ``[column or null, problem]``. Rows keep the order they are written in; text files that of their names.
    ``any_folder``: whatever its sub-folders are called, they hold rows. Never raises for what a folder holds.
    """
    import pandas as pd

    read_as = ""
    if not folder.is_dir():
        text = "no such folder; check the path" if not folder.exists() else "not a folder; give the one with the images"
        records = [Record(".", 0, problems=[(None, f"concept {name!r}: {text}")])]
    else:
        records, read_as = _read_folder(folder, any_folder)
    frame = pd.DataFrame([record.cells() for record in records], columns=list(COLUMNS))
    frame.attrs["read_as"] = read_as
    return frame.astype({"row": "int64", "repeats": "int64"})


def concept_files(folder: Path) -> list[str]:
    """Relative paths of every file that belongs to a concept folder (the held-out part too), sorted; none hidden."""
    part = folder / HOLDOUT
    held_out = [f"{HOLDOUT}/{file}" for file in _walk(part)[0]] if part.is_dir() else []
    return sorted(_walk(folder)[0] + held_out)


@dataclass(frozen=True)
class Layout:
    """The files of a folder by what they are in it. ``texts``: all that end as captions do, but documents; ``beside``:
    those of a picture's name. ``kinds``: the files that say how captions are given; one, if all is well."""

    images: list[str]
    texts: list[str]
    beside: list[str]
    documents: set[str]
    kinds: list[str]


def layout_of(files: Sequence[str]) -> Layout:
    """Of a folder's files, its held-out part apart. A text of a picture's name is a caption, whatever it is called."""
    images = [file for file in files if _suffix(file) in EXTENSIONS]
    pictured = {name for file in images for name in (stem_of(file), composed(file))}
    documents = {
        file for file in files if _is_document(file) and not (_suffix(file) in TEXTS and stem_of(file) in pictured)
    }
    texts = [file for file in files if _suffix(file) in TEXTS and file not in documents]
    beside = [file for file in texts if stem_of(file) in pictured]
    tables = [file for file in files if _suffix(file) in TABLES and file != PROTOCOL]
    endings = {_suffix(file): file for file in reversed(beside)}
    return Layout(images, texts, beside, documents, [*tables, *sorted(endings.values())])


def _suffix(file: str) -> str:
    return Path(file).suffix.lower()


def _read_folder(folder: Path, any_folder: bool) -> tuple[list[Record], str]:
    """The rows and all faults; and how the rows are written, in words."""
    files, problems = _walk(folder)
    named, inside = ({}, set()) if any_folder else not_for_training(files)
    files = [file for file in files if file not in inside]
    problems += named.items()
    layout, repeats, read_as = layout_of(files), kohya_repeats(files), ""
    problems += [(place, "its name says 0 repeats, which kohya's tools leave out; take it out or rename it")
                 for place, number in repeats.items() if number == 0]  # fmt: skip
    broken = [Record(file, 0, problems=[(None, problem)]) for file, problem in problems]
    if not files and named:
        return broken, ""
    if len(layout.kinds) != 1:
        return [Record(".", 0, problems=[(None, describe_kinds(layout))]), *broken], ""
    images, texts = layout.images, layout.texts
    if layout.beside:
        # a caption beside a file that is no picture: that file alone is the fault
        pictured = {name for file in images for name in (stem_of(file), composed(file))}
        strange = {stem_of(file) for file in files if file not in images and file not in texts} - pictured
        records = read_texts(folder, images, [text for text in texts if stem_of(text) not in strange])
        expected = {*images, *texts}
        read_as = f"captions beside pictures ({layout.kinds[0]}, ...)"
    else:
        source = layout.kinds[0]
        table = read_rows(folder, source, files)
        records = table.records
        as_on_disk(records, files)
        expected = {source, *_mentioned(records)}
        read_as = f"{table.dialect} of {source}" if table.dialect == OWN else f"{table.dialect} ({source})"
        if table.ignored:
            read_as += f", ignored columns: {', '.join(table.ignored)}"
        if not records:
            records = [Record(source, 0, problems=[(None, "holds no rows; write one for each picture")])]
        if not any(record.row for record in records):
            expected = {*files}  # that no row mentions them is said already
    for record in records:
        if record.repeats is None:
            image = os.path.normpath(record.image) if record.image else ""
            record.repeats = next((times for place, times in repeats.items() if image.startswith(f"{place}/")), None)
    extra = [file for file in files if file not in expected and file not in layout.documents]
    return [*records, *(Record(file, 0, problems=[(None, describe_extra(file))]) for file in extra), *broken], read_as


def _walk(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Every file of a concept folder, relative and sorted, without the held-out part and leftovers; and faults."""
    files: list[str] = []
    problems: list[tuple[str, str]] = []

    def note(error: OSError) -> None:
        place = os.path.relpath(error.filename, folder) if error.filename else "."
        problems.append((place, "this folder cannot be listed; check its permissions"))

    for parent, folders, names in os.walk(folder, onerror=note):
        base = os.path.relpath(parent, folder)
        for link in (name for name in folders if os.path.islink(os.path.join(parent, name))):
            problems.append((_join(base, link), "is a link to a folder; put the files themselves there"))
        held_out = {HOLDOUT} if base == "." else set()
        folders[:] = [name for name in folders if name not in held_out and not is_leftover(name)]
        for name in (name for name in names if not is_leftover(name)):
            if leaves(folder, _join(base, name)):
                problems.append((_join(base, name), "is a link that leaves the folder; put the file itself there"))
            else:
                files.append(_join(base, name))
    return sorted(files), sorted(problems)


def _join(base: str, name: str) -> str:
    return name if base == "." else f"{base}/{name}"


def _is_document(file: str) -> bool:
    return file in (ABOUT, OWN_SETTINGS, PROTOCOL) or (
        Path(file).name.split(".")[0].upper() in _DOCUMENTS and _suffix(file) in ("", ".md", ".txt")
    )


def _mentioned(records: Sequence[Record]) -> set[str]:
    named = [name for record in records for name in (record.image, *record.references) if name]
    named += [name.replace("\\", "/") for name in named if "\\" in name]  # its row says what is wrong with it
    return {os.path.normpath(name) for name in named if "\0" not in name}


def describe_kinds(layout: Layout) -> str:
    """What to say of captions that are given in no way, or in several."""
    expected = f"{METADATA}, or a .txt beside each picture, or one .csv or .parquet file"
    if layout.kinds:
        given = ", ".join(map(shown, layout.kinds))
        return f"captions are given in more than one way ({given}); keep only one: {expected}"
    made = " (`dopsd concept caption FOLDER` makes some to start from)"
    return (
        f"no captions found; write {expected}{made}"
        if layout.images
        else f"no pictures and no captions; expected {expected}"
    )
