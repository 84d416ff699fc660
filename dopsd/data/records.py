"""The rows of a concept folder as they are written: JSON lines, text files beside pictures, or parquet.

Whatever the bytes are, the outcome is a list of :class:`Record`; what could not be read is in its ``problems``.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .dvc_cache import is_cached
from .images import EXTENSIONS

SINGLE_VARIANT = "caption"
"""The variant name of a caption that was given alone."""
BAD_NAME = "the file's name holds control characters or is not valid UTF-8; rename it"
"""What to say of a picture whose name is no text."""
_KEYS = ("image", "caption", "captions", "references")
_SHOWN = 80
_MAX_TEXT_BYTES = 64 << 10
"""Of a caption's own file."""
_MAX_JSONL_BYTES = _MAX_PARQUET_BYTES = 256 << 20
_MAX_PARQUET_ROWS = 10_000_000


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
    problems: list[tuple[str | None, str]] = field(default_factory=list)

    def cells(self) -> tuple[str, int, str | None, str | None, str, str]:
        """The row as the table's cells: plain text throughout, safe to print and to store."""
        captions = None if self.captions is None else json.dumps(self.captions)
        image = None if self.image is None or not is_text(self.image) else self.image
        references = [name for name in self.references if is_text(name)]
        problems = [(column, shown(problem)) for column, problem in self.problems]
        return shown(self.source), self.row, image, captions, json.dumps(references), json.dumps(problems)


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


# --- images with .txt beside them ------------------------------------------------------------------------------------


def read_texts(folder: Path, images: Sequence[str], texts: Sequence[str]) -> list[Record]:
    """A row for every picture, in the order of their names; a fault for every text without one."""
    by_stem: dict[str, str] = {}
    records: list[Record] = []
    for text in texts:
        first = by_stem.setdefault(stem_of(text), text)
        if first != text:
            records.append(Record(text, 0, problems=[(None, f"{first} is there too; keep one caption file")]))
    seen: dict[str, str] = {}
    for image in images:
        stem = stem_of(image)
        beside = by_stem.get(stem)
        if not is_text(image):
            records.append(Record(image, 0, problems=[("image", BAD_NAME)]))
        elif beside is None:
            problem = f"has no caption: write {shown(stem)}.txt beside it"
            records.append(Record(image, 0, image, problems=[("captions", problem)]))
        elif stem in seen:
            problem = f"{seen[stem]} and {image} share one caption file; give each picture a name of its own"
            records.append(Record(beside, 1, problems=[("image", problem)]))
        else:
            records.append(_read_text(folder, image, beside))
        seen[stem] = image
    orphans = [text for stem, text in by_stem.items() if stem not in seen]
    return records + [Record(text, 0, problems=[(None, describe_extra(text))]) for text in orphans]


def _read_text(folder: Path, image: str, text: str) -> Record:
    record = Record(text, 1, image)
    content = _read_bytes(folder / text, record, _MAX_TEXT_BYTES)
    if content is not None:
        try:
            record.captions = {SINGLE_VARIANT: content.removeprefix(b"\xef\xbb\xbf").decode().rstrip("\r\n")}
        except UnicodeDecodeError as error:
            record.problems.append(("captions", f"not valid UTF-8 (byte {error.start}); save it as UTF-8"))
    return record


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


# --- metadata.jsonl --------------------------------------------------------------------------------------------------


def read_jsonl(folder: Path, source: str) -> Iterator[Record]:
    """A row for every line that is not blank."""
    whole = Record(source, 0)
    content = _read_bytes(folder / source, whole, _MAX_JSONL_BYTES)
    if content is None:
        yield whole
        return
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield _read_line(source, number, line)


def _read_line(source: str, number: int, line: bytes) -> Record:
    try:
        value = json.loads(line.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        problem = f"not valid UTF-8 (byte {error.start} of the line); save the file as UTF-8"
    except RecursionError:
        problem = "not valid JSON: nested too deeply; write one flat object"
    except ValueError as error:
        problem = f"not valid JSON: {shown(str(error), _SHOWN)}; write one object a line"
    else:
        return _to_record(source, number, value)
    return Record(source, number, problems=[(None, problem)])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
        found[key] = value
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


# --- parquet ---------------------------------------------------------------------------------------------------------


def read_parquet(folder: Path, source: str) -> Iterator[Record]:
    """A row for every row of the table."""
    import pyarrow.parquet

    whole = Record(source, 0)
    try:
        with pyarrow.parquet.ParquetFile(folder / source) as file:
            names = file.schema_arrow.names
            columns = [name for name in names if name in _KEYS]
            unknown = [name for name in names if name not in _KEYS]
            groups = (file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
            if sum(groups) > _MAX_PARQUET_BYTES or file.metadata.num_rows > _MAX_PARQUET_ROWS:
                raise ValueError("far too large; it should hold captions and paths only")
            if len(set(names)) < len(names):
                raise ValueError("two columns have the same name")
            rows = file.read(columns=columns).to_pylist(maps_as_pydicts="strict") if columns else []
    # pyarrow raises errors of many kinds on damaged files, and all of them mean the same to a person.
    except Exception as error:
        problem = f"cannot be read as parquet: {shown(' '.join(str(error).split()), _SHOWN)}; write it again"
        whole.problems.append((None, problem))
        yield whole
        return
    if unknown:
        whole.problems.append((None, _describe_unknown(unknown)))
        yield whole
    for number, row in enumerate(rows, start=1):
        yield _to_record(source, number, _without_nulls(row))


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A table has every column in every row; a null there means what a missing key means in JSON."""
    present = {key: value for key, value in row.items() if value is not None}
    if isinstance(present.get("captions"), dict):
        present["captions"] = {key: value for key, value in present["captions"].items() if value is not None}
    return present


# --- one row, of either kind -----------------------------------------------------------------------------------------


def _to_record(source: str, number: int, value: Any) -> Record:
    record = Record(source, number)
    if not isinstance(value, dict):
        problem = f"expected an object with image and captions, found {_kind(value)}; write {{...}}"
        record.problems.append((None, problem))
        return record
    unknown = [key for key in value if key not in _KEYS]
    if unknown:
        record.problems.append((None, _describe_unknown(unknown)))
    _take_image(record, value)
    _take_captions(record, value)
    _take_references(record, value)
    return record


def _take_image(record: Record, value: Mapping[str, Any]) -> None:
    image = value.get("image")
    if "image" not in value:
        record.problems.append(("image", "missing; name the picture's file"))
    elif not isinstance(image, str) or not image.strip():
        found = "an empty text" if isinstance(image, str) else _kind(image)
        record.problems.append(("image", f"expected the path of a picture, found {found}; name the picture's file"))
    elif not is_text(image):
        record.problems.append(("image", f"{shown(image, _SHOWN)}: control characters in a path; rename the file"))
    else:
        record.image = image


def _take_captions(record: Record, value: Mapping[str, Any]) -> None:
    captions = value.get("captions")
    if "caption" in value and "captions" in value:
        record.problems.append(("captions", "both caption and captions are given; keep one of them"))
    elif "caption" in value:
        if isinstance(value["caption"], str):
            record.captions = {SINGLE_VARIANT: value["caption"]}
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
            problem = f"{shown(name, _SHOWN)!r} is {_kind(captions[name])} instead of a text; write the caption"
            record.problems.append(("captions", problem))
        if not wrong:
            record.captions = dict(captions)


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
            problem = f"{shown(name, _SHOWN)}: control characters in a path; rename the file"
            record.problems.append(("references", problem))


def _describe_unknown(keys: Sequence[Any]) -> str:
    names = ", ".join(shown(str(key), _SHOWN) for key in keys[:5]) + (", ..." if len(keys) > 5 else "")
    return f"unknown {'key' if len(keys) == 1 else 'keys'} {names}; known are {', '.join(_KEYS)}: rename or remove"


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
    if suffix == ".txt":
        return "there is no picture of this name beside it; add the picture or remove the text"
    return "not part of the data set (pictures are PNG, JPEG, WEBP, AVIF, HEIC); take it out or convert it"
