"""What ``dopsd concept add`` is given, as a folder of pictures with captions: itself, or what is packed in it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..config import SettingsError
from ..files import copy_files, is_disk_full
from .fetched import fetch, hub_name
from .folders import HOLDOUT
from .manifest import METADATA, ConceptTable, DataError, Fault, concept_files, layout_of
from .packed import MAX_ROWS, PACKINGS, Item, PackedError, Packing, Seen
from .placeholder import lacking
from .records import SHOWN, composed, shown


@dataclass(frozen=True)
class Rewording:
    """How captions that lack the placeholder get it. ``trigger``: the word, in small letters or large, in whose place
    it is written. ``wording``: what becomes of a caption that has no such word, with ``{}`` for the caption. Near
    misses of the placeholder stay as they are."""

    placeholder: str
    trigger: str | None = None
    wording: str | None = None

    def texts(self, captions: Mapping[str, str], teacher: str | None) -> dict[str, str]:
        """Captions by variant; the teacher's own needs no placeholder."""
        lacks = lacking({name: text for name, text in captions.items() if name != teacher}, self.placeholder)
        return {name: self._text(text) if lacks.get(name) == "" else text for name, text in captions.items()}

    def _text(self, text: str) -> str:
        if self.trigger is not None:
            whole = rf"(?<!\w){re.escape(self.trigger)}(?!\w)"
            text = re.sub(whole, lambda _: self.placeholder, text, flags=re.IGNORECASE)
        if self.wording is not None and self.placeholder not in text:
            text = self.wording.replace("{}", text)
        return text


def rewording(placeholder: str, trigger: str | None, wording: str | None) -> Rewording | None:
    """What a person asks for, if anything. Raises ``SettingsError`` where it can do nothing."""
    if trigger is not None and not trigger.strip():
        raise SettingsError("--trigger: name the word that calls the concept in its captions")
    if wording is not None and not ("{}" in wording and placeholder in wording):
        example = f'"{{}} in {placeholder} style"'
        raise SettingsError(f"--wording: write {{}} for the caption, and {placeholder}, as in {example}")
    return Rewording(placeholder, trigger, wording) if trigger is not None or wording is not None else None


def reword(folder: Path, tables: tuple[ConceptTable, ConceptTable | None], how: Rewording, teacher: str | None) -> None:
    """Write the captions of a checked folder anew, as ``metadata.jsonl`` in place of whatever held them."""
    for table in (table for table in tables if table is not None):
        lines = []
        for row in table.rows:
            image, *references = (os.path.relpath(path, table.root) for path in (row.image, *row.references))
            value: dict[str, Any] = {"image": image, "captions": how.texts(dict(row.captions), teacher)}
            lines.append(json.dumps(value | {"references": references, "repeats": row.repeats}))
        part = folder / os.path.relpath(table.root, os.path.abspath(folder))
        for source in {row.source for row in table.rows}:
            (part / source).unlink()
        (part / METADATA).write_text("\n".join([*lines, ""]), encoding="utf-8")


@contextmanager
def as_folder(
    source: Path, place: Path, say: Callable[[str], object], copy: bool = False
) -> Iterator[tuple[Path, bool]]:
    """A concept folder, and whether it was unpacked: ``source`` itself (with ``copy`` its files in ``place``), or what
    is packed there, in ``place``. That is gone afterwards. ``source`` may be a data set's name on the hub.

    ``say`` is told what was unpacked as what. Faults that the block finds in ``place`` are said of ``source``. Raises
    ``DataError`` for what cannot be unpacked, and where ``source`` is of two layouts at once, and ``OSError`` where the
    disk is full.
    """
    if (name := hub_name(source)) is not None:
        with _gone_afterwards(place.with_name(f"{place.name}.fetched"), source) as here:
            say(f"{name}: no such folder here; asking the hub")
            try:
                fetch(name, here)
            except PackedError as error:
                raise DataError([Fault(name, None, None, str(error))]) from None
            with as_folder(here, place, lambda line: say(_renamed(line, here, source)), copy) as opened:
                yield opened
        return
    found = _packing_of(source)
    if found is None and not (copy and source.is_dir()):
        yield source, False
        return
    with _gone_afterwards(place, source):
        if found is not None:
            _unpack(source, *found, place, say)
        else:
            copy_files(source, concept_files(source), place)
        yield place, found is not None


@contextmanager
def _gone_afterwards(place: Path, source: Path) -> Iterator[Path]:
    """A folder that stands for ``source``, in the names of faults too."""
    shutil.rmtree(place, ignore_errors=True)
    try:
        yield place
    except DataError as error:
        raise DataError(replace(fault, file=_renamed(fault.file, place, source)) for fault in error.faults) from None
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _renamed(file: str, place: Path, source: Path) -> str:
    return f"{source}{file.removeprefix(str(place))}" if file.startswith(str(place)) else file


def _packing_of(source: Path) -> tuple[Packing, list[str], list[str]] | None:
    """How a file or folder is packed, the files that are, and those beside them."""
    if source.is_dir():
        root, files = source, concept_files(source)
        strange = [file for file in files if (source / file).exists() and not (source / file).is_file()]
        if strange:  # opening a pipe waits for ever
            problem = "is a pipe, a socket or a device, not an ordinary file; take it out"
            raise DataError(Fault(str(source / file), None, None, problem) for file in map(shown, strange))
    elif source.is_file():
        root, files = source.parent, [source.name]
    else:
        return None
    try:
        found = [(packing, own) for packing in PACKINGS if (own := packing.files(root, files))]
    except (PackedError, OSError) as error:
        raise DataError([Fault(str(source), None, None, shown(str(error)))]) from None
    if not found:
        return None
    ways = [f"{packing.name} ({shown(own[0], SHOWN)})" for packing, own in found]
    ways += [f"pictures in the folder ({shown(file, SHOWN)})" for file in layout_of(files).images[:1]]
    if len(ways) > 1:
        problem = f"holds two data sets at once: {' and '.join(ways)}; keep one"
        raise DataError([Fault(str(source), None, None, problem)])
    packing, own = found[0]
    return packing, own, sorted({*files} - {*own})


def _unpack(
    source: Path, packing: Packing, files: list[str], beside: list[str], place: Path, say: Callable[[str], object]
) -> None:
    root, seen, rows = source if source.is_dir() else source.parent, Seen(), {False: 0, True: 0}
    names, documents = dict[str, None](), layout_of(beside).documents
    try:
        for part in (place, place / HOLDOUT):
            part.mkdir(parents=True)
        with (
            (place / METADATA).open("w", encoding="utf-8") as train,
            (place / HOLDOUT / METADATA).open("w", encoding="utf-8") as held_out,
        ):
            for item in (item for file in files for item in _read(packing, root, file, seen)):
                held = bool(item.held_out)
                rows[held] += 1
                names |= {item.held_out: None} if held else {}
                if sum(rows.values()) > MAX_ROWS:
                    raise PackedError(f"more than {MAX_ROWS:,} rows; give a part of it")
                name = _save(item, place / HOLDOUT if held else place, rows[held])
                print(json.dumps({"image": name, **item.row}), file=held_out if held else train)
        copy_files(root, documents, place)
    except PackedError as error:
        raise DataError([Fault(str(source), None, None, str(error))]) from None
    except OSError as error:
        if is_disk_full(error):
            raise
        problem = f"cannot be unpacked: {shown(error.strerror or str(error), SHOWN)}; nothing was added"
        raise DataError([Fault(str(source), None, None, problem)]) from None
    if not rows[True]:
        shutil.rmtree(place / HOLDOUT)
    if not rows[False]:
        found = f"only {rows[True]} rows of splits that are for testing ({_few(names)})" if rows[True] else "no rows"
        raise DataError([Fault(str(source), None, None, f"{found}; give what is to be trained on")])
    told = f", {rows[True]} of them held out as their split's name says ({_few(names)})" if rows[True] else ""
    ignored = f", ignored columns: {', '.join(seen.ignored)}" if seen.ignored else ""
    left = [file for file in beside if file not in documents
            and not any(fnmatch(Path(file).name, name) for name in packing.beside)]  # fmt: skip
    told += f", left aside: {_few(left)}" if left else ""
    number, total = f"{len(files)} {'file' if len(files) == 1 else 'files'}", sum(rows.values())
    say(f"{source}: read as {packing.name} ({number}){ignored}: {total} rows, {total} pictures{told}")


def _read(packing: Packing, root: Path, file: str, seen: Seen) -> Iterator[Item]:
    """The rows of a file. Whatever is wrong with it is a :class:`PackedError`."""
    try:
        yield from packing.items(root, file, seen)
    except PackedError:
        raise
    # pyarrow raises errors of many kinds on damaged files, and all of them mean the same to a person.
    except Exception as error:
        why = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        problem = f"{shown(file, SHOWN)}: cannot be read as {packing.name}: {shown(why, SHOWN)}; fetch it again"
        raise PackedError(problem) from None


def _few(names: Iterable[str]) -> str:
    listed = [*names]
    more = [f"and {len(listed) - 4} more"] if len(listed) > 4 else []
    return ", ".join([*(shown(name, SHOWN) for name in listed[:4]), *more])


def _save(item: Item, part: Path, number: int) -> str:
    """Write a row's picture; under its own name where that is plain and free: faults then name what a person knows."""
    own = composed(os.path.basename(item.name))
    plain = re.fullmatch(r"(?!row-)\w[\w-]{0,99}", own) and not (part / f"{own}{item.ending}").exists()
    name = f"{own if plain else f'row-{number:06}'}{item.ending}"
    with (part / name).open("xb") as file:  # whatever it is called, nothing is written over
        file.write(item.content)
    return name
