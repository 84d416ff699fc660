"""The pictures of a folder that have no captions yet, and where captions for them are written.

They are written the way the folder has its others: into ``metadata.jsonl``, or as a ``.txt`` beside each picture, which
holds one caption only. A folder with no captions at all gets a ``metadata.jsonl``. What a person wrote stays, to the
byte: a row is looked at again at the moment it is written. Of a picture that got only some of its captions the others'
names are noted in a hidden file beside: a person's own row has as many as it has.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from ..files import read_json, whole_file, write_json
from .dialects import OWN
from .folders import not_for_training
from .images import EXTENSIONS, ImageError, load_image
from .manifest import HOLDOUT, METADATA, DataError, Fault, Layout, concept_files, describe_kinds, layout_of
from .records import BAD_NAME, as_on_disk, caption_file, composed, is_text, read_texts, shown
from .tables import Table, read_rows
from .text import decoded


@dataclass(frozen=True)
class Uncaptioned:
    """A picture that gets captions. ``part``: the concept folder or its held-out part; ``image``: relative to it.

    ``source``: the file that its captions are written to, relative to ``part``. ``lacking``: the only captions that are
    to be made, where an earlier run made the others; empty: all of them.
    """

    part: Path
    image: str
    source: str
    lacking: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The picture. Not as it is written: after a link to a folder, ``..`` is not where it seems to be."""
        return self.part / os.path.normpath(self.image)

    @property
    def target(self) -> Path:
        return self.part / self.source

    @property
    def single(self) -> bool:
        """Whether there is room for one caption only."""
        return self.source != METADATA


def uncaptioned(folder: Path, redo: bool = False, any_folder: bool = False) -> tuple[list[Uncaptioned], int]:
    """The pictures without captions (all of them with ``redo``), held-out ones too, and how many pictures there are;
    what is a reference and nothing else is none.

    ``any_folder``: whatever its sub-folders are called, their pictures are to be captioned.
    Raises :class:`DataError` with every reason why captions cannot be written there; no picture is opened.
    """
    if not folder.is_dir():
        problem = (
            "no such folder; check the path" if not folder.exists() else "not a folder; give the one with pictures"
        )
        raise DataError([Fault(str(folder), None, None, problem)])
    files = concept_files(folder)
    inner = f"{HOLDOUT}/"
    parts = {
        folder: [file for file in files if not file.startswith(inner)],
        folder / HOLDOUT: [file.removeprefix(inner) for file in files if file.startswith(inner)],
    }
    found: list[Uncaptioned] = []
    named = {} if any_folder else not_for_training(parts[folder])[0]
    faults = [Fault(shown(str(folder / name)), None, None, problem) for name, problem in named.items()]
    total, empty = 0, True
    for part, names in parts.items():
        layout = layout_of(names)
        if layout.images:
            more, count = _of_part(part, names, layout, redo, faults)
            found, total, empty = found + more, total + count, False
    if empty:
        faults.append(Fault(str(folder), None, None, f"no pictures there ({', '.join(EXTENSIONS)}); check the path"))
    for part in {one.target.parent for one in found}:
        if not os.access(part, os.W_OK):
            faults.append(Fault(str(part), None, None, "this folder may not be written to; give yourself the right to"))
    if faults:
        raise DataError(faults)
    return found, total


def _of_part(
    part: Path, names: Sequence[str], layout: Layout, redo: bool, faults: list[Fault]
) -> tuple[list[Uncaptioned], int]:
    source = next(iter(layout.kinds), METADATA)
    if len(layout.kinds) > 1:
        faults.append(Fault(str(part), None, None, describe_kinds(layout)))
        return [], 0
    if source != METADATA and not layout.beside:
        return _elsewhere(part / source, faults)
    if layout.beside:
        found, count = list(_by_texts(part, layout, redo, faults)), len(layout.images)
    else:
        found, count = _by_rows(part, names, layout.images, redo, faults)
    twins = Counter(one.source for one in found if one.single)
    for source in (source for source, pictures in twins.items() if pictures > 1):
        problem = "two pictures share this one caption file; give each a name of its own"
        faults.append(Fault(str(part / source), None, None, problem))
    for one in found:
        # what is there and not among the files is no file, or a link that leaves the folder
        if one.source not in names and os.path.lexists(one.target):
            problem = "is a link that leaves the folder, or no file; take it out of the folder"
            fault = Fault(str(one.target), None, None, problem)
            faults += [fault] if fault not in faults else []
    return found, count


def _elsewhere(table: Path, faults: list[Fault]) -> tuple[list[Uncaptioned], int]:
    problem = f"captions are not written into this table; write them there yourself, or give {METADATA} instead"
    faults.append(Fault(str(table), None, None, problem))
    return [], 0


def _by_texts(part: Path, layout: Layout, redo: bool, faults: list[Fault]) -> Iterator[Uncaptioned]:
    for record in read_texts(part, layout.images, layout.beside):
        blank = record.captions is not None and not _any_text(record.captions)
        if record.row == 0 and record.image is not None:
            yield Uncaptioned(part, record.image, caption_file(record.image, layout.beside))
        elif record.image is not None and record.captions is not None and (blank or redo):
            yield Uncaptioned(part, record.image, record.source)
        else:
            faults += _faults(part, record.source, record.row, record.problems)


def _by_rows(
    part: Path, names: Sequence[str], images: Sequence[str], redo: bool, faults: list[Fault]
) -> tuple[list[Uncaptioned], int]:
    found: dict[str, Uncaptioned] = {}
    listed, references = set[str](), set[str]()
    known, noted = set(names), read_json(_notes(part / METADATA))
    table = read_rows(part, METADATA, names) if METADATA in known else Table([])
    if table.dialect != OWN:
        return _elsewhere(part / METADATA, faults)
    records = table.records
    as_on_disk(records, names)
    lines = _lines(part / METADATA) if any(record.row for record in records) else []
    for record in records:
        value = _value(lines[record.row - 1]) if record.row else None
        lacks = value is not None and _lacks(value)
        unread = [pair for pair in record.problems if not (lacks and pair[0] in ("caption", "captions"))]
        faults += _faults(part, METADATA, record.row, unread)
        if record.image is None:
            continue
        image = os.path.normpath(record.image)
        listed.add(image)
        references |= {os.path.normpath(name) for name in record.references}
        whole = lacks or redo
        left = () if whole or value is None or record.references else _left(value, noted.get(image))
        if unread or not (whole or left):
            continue
        problem = ""
        if image not in known:
            problem = f"{record.image}: no picture of this folder; give a path inside it, with /, or remove the row"
        elif record.references:
            problem = "this row is an edit (it has references), and its caption says what to change: write it yourself"
        if problem:
            faults += _faults(part, METADATA, record.row, [("image", problem)])
        else:
            found.setdefault(image, Uncaptioned(part, record.image, METADATA, left))
    for image in (image for image in images if image not in listed | references):
        if not is_text(image):
            faults += _faults(part, image, 0, [("image", BAD_NAME)])
        else:
            found[image] = Uncaptioned(part, image, METADATA)
    return list(found.values()), len(set(images) - (references - listed))


def _left(value: Mapping[str, Any], noted: Any) -> tuple[str, ...]:
    """Of the captions that were noted as lacking, those that the row still has not got."""
    captions = value.get("captions")
    if not isinstance(captions, dict) or not isinstance(noted, list | tuple):
        return ()
    return tuple(name for name in noted if name not in captions)


def _faults(part: Path, source: str, row: int, problems: Sequence[tuple[str | None, str]]) -> list[Fault]:
    return [Fault(shown(str(part / source)), row or None, column, shown(problem)) for column, problem in problems]


def check_pictures(pictures: Sequence[Uncaptioned], max_pixels: int, any_shape: bool = False) -> None:
    """Decode each once. Raises :class:`DataError` with everything that is wrong with them."""
    from .schema import MAX_ASPECT, describe_long  # a longer picture would be captioned for nothing

    faults = []
    for one in pictures:
        try:
            width, height = load_image(one.path, max_pixels).size
        except ImageError as error:
            faults.append(Fault(str(one.path), None, None, error.problem))
            continue
        if not any_shape and max(width, height) > MAX_ASPECT * min(width, height):
            faults.append(Fault(str(one.path), None, None, describe_long(f"{width} x {height}")))
    if faults:
        raise DataError(faults)


# --- writing ----------------------------------------------------------------------------------------------------------


def keep_as_before(pictures: Sequence[Uncaptioned]) -> None:
    """Copy each file of captions that is going to be written over to ``.NAME.before`` (``.before2`` ... where there is
    one already); being hidden it is no part of the data."""
    for target in {one.target for one in pictures if one.target.is_file()}:
        names = (f".{target.name}.before{number if number > 1 else ''}" for number in count(1))
        shutil.copyfile(target, next(free for name in names if not os.path.lexists(free := target.with_name(name))))


def save(picture: Uncaptioned, captions: Mapping[str, str], redo: bool = False, lacking: Sequence[str] = ()) -> bool:
    """Write a picture's captions (variant to text), all of the file or nothing. Returns whether they were written.

    They are not where somebody has captioned the picture meanwhile, unless ``redo``. ``lacking``: those that could not
    be made, for :func:`uncaptioned` to name another time.
    """
    content = _texts_of(picture, captions, redo) if picture.single else _rows_of(picture, captions, redo)
    if content is None:
        return False
    if lacking:  # beforehand: whoever is killed in between has lost nothing
        _note(picture, lacking)
    with whole_file(picture.target) as partial:
        partial.write_bytes(content)
    if not lacking:
        _note(picture, ())
    return True


def _notes(target: Path) -> Path:
    return target.with_name(f".{target.name}.lacking")


def _note(picture: Uncaptioned, lacking: Sequence[str]) -> None:
    path, image = _notes(picture.target), os.path.normpath(picture.image)
    before = read_json(path)
    noted = {name: left for name, left in before.items() if name != image} | ({image: [*lacking]} if lacking else {})
    if noted != before:
        write_json(path, noted)


def _texts_of(picture: Uncaptioned, captions: Mapping[str, str], redo: bool) -> bytes | None:
    if not redo and picture.target.is_file() and decoded(picture.target.read_bytes()).strip():
        return None
    (text,) = captions.values()
    return f"{text}\n".encode()


def _rows_of(picture: Uncaptioned, captions: Mapping[str, str], redo: bool) -> bytes | None:
    lines = _lines(picture.target)
    rows = [(place, value) for place, line in enumerate(lines) if (value := _value(line)) is not None]
    own = [(place, value) for place, value in rows if _names(value, picture.image)]
    if not own:
        if lines and not lines[-1].strip():
            lines.pop()
        own = [(len(lines), {"image": picture.image})]
        lines.append(b"")
    lacks = (lambda value: _left(value, picture.lacking)) if picture.lacking else _lacks
    wanted = [(place, value) for place, value in own if redo or lacks(value)]
    for place, value in wanted:
        row = {key: content for key, content in value.items() if key not in ("caption", "captions")}
        own_captions = value["captions"] if picture.lacking else {}
        texts = own_captions | dict(captions) | own_captions  # in this order, and what is there stays
        lines[place] = json.dumps(row | {"captions": texts}, ensure_ascii=False).encode()
    if lines[-1].strip():
        lines.append(b"")
    return b"\n".join(lines) if wanted else None


def _lines(path: Path) -> list[bytes]:
    return decoded(path.read_bytes()).encode().split(b"\n") if path.is_file() else []


def _value(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _names(value: Mapping[str, Any], image: str) -> bool:
    """Whether a row is of that picture, however its name is composed."""
    return isinstance(name := value.get("image"), str) and composed(name) == composed(image)


def _lacks(value: Mapping[str, Any]) -> bool:
    """Whether a row has no caption: neither key, or null, or only blanks. A number, say, is a fault."""
    given = [value[key] for key in ("caption", "captions") if value.get(key) is not None]
    return all(isinstance(one, str | dict) and not _any_text(one) for one in given)


def _any_text(given: str | Mapping[str, Any]) -> bool:
    texts = [given] if isinstance(given, str) else [text for text in given.values() if text is not None]
    return any(not isinstance(text, str) or text.strip() for text in texts)
