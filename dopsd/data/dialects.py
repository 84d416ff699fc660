"""Rows that other tools write, put in this project's words: which key names the picture says whose they are.

A dialect is one entry of :data:`DIALECTS`. Beside its own words this project's mean what they mean here. Absolute paths
in a foreign row are those of the machine that it was written on: what is looked for is the file of this folder that a
path ends with, so that nothing outside of it is ever meant.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .folders import HOLDOUT
from .records import SHOWN, composed, shown

OWN = "rows"
"""The dialect of this project: ``image``, ``caption`` or ``captions``, ``references``, ``repeats``."""
CAPTIONS = ("text", "caption", "prompt")
"""What other tools call a picture's only caption: Hugging Face's pages and trainers."""


@dataclass(frozen=True)
class Dialect:
    """``name``: whose rows they are. ``images``: the keys that name the picture, one of them in a row. ``captions``:
    of all keys those that hold captions; ``variants``: whether these are several of one picture. ``references``: those
    that name pictures to edit."""

    name: str
    images: tuple[str, ...]
    captions: Callable[[Collection[str]], list[str]]
    variants: bool = False
    references: str = r"(?!)"


def _named(*names: str) -> Callable[[Collection[str]], list[str]]:
    return lambda keys: [name for name in names if name in keys]


def _in_languages(keys: Collection[str]) -> list[str]:
    return [key for key in keys if re.fullmatch(r"\w+_(en|zh)", key)]


DIALECTS = (
    Dialect("Hugging Face image folder", ("file_name", "image_file_name"), _named(*CAPTIONS)),
    Dialect("musubi list", ("image_path",), _named("caption"), references=r"control_path(_\d+)?"),
    Dialect("D-OPSD list", ("local_path_list",), _in_languages, variants=True),
)


@dataclass(frozen=True)
class Reading:
    """How the rows of a table are read. ``fault``: why they cannot be. ``ignored``: keys that are left aside."""

    dialect: Dialect | None = None
    captions: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    fault: str = ""

    @property
    def name(self) -> str:
        return self.dialect.name if self.dialect else OWN

    def row(self, value: Any, folder: str, files: Mapping[str, str]) -> Any:
        """A row in this project's words; what is no object stays what it is. ``folder``: the table's own, relative;
        ``files``: from :func:`files_by_name`."""
        dialect = self.dialect
        if dialect is None or not isinstance(value, dict):
            return value
        found: dict[str, Any] = {"repeats": value["repeats"]} if "repeats" in value else {}
        image = next((value[key] for key in dialect.images if key in value), None)
        if isinstance(image, list) and len(image) == 1:
            image = image[0]
        if image is not None:
            found["image"] = _placed(image, folder, files)
        given = {name: value[name] for name in self.captions if name in value}
        if "captions" in given:
            found["captions"] = given["captions"]
        elif dialect.variants:
            found["captions"] = given
        elif given:
            found["caption"] = next(iter(given.values()))
        if "references" in value:
            own = value["references"]
            found["references"] = [_placed(path, folder, files) for path in own] if isinstance(own, list) else own
        references = [key for key in sorted(value, key=_natural) if re.fullmatch(dialect.references, str(key))]
        if references:
            found["references"] = [_placed(value[key], folder, files) for key in references]
        return found


def reading_of(keys: Collection[str]) -> Reading:
    """How rows with these keys, of all rows together, are to be read."""
    own = [("image", None)] if "image" in keys else []
    named = [*own, *((key, dialect) for dialect in DIALECTS for key in dialect.images if key in keys)]
    if len(named) > 1:
        return Reading(fault=f"{_list([key for key, _ in named])} name the picture, each of them; keep one")
    dialect = named[0][1] if named else None
    if dialect is None:
        return Reading()
    captions = dialect.captions(keys)
    own_captions = [key for key in ("caption", "captions") if key in keys and key not in captions]
    references = [key for key in keys if re.fullmatch(dialect.references, str(key))]
    used = {*dialect.images, *captions, *own_captions, *references, "references", "repeats"}
    ignored = tuple(shown(str(key), SHOWN) for key in keys if key not in used)
    given, fault = [*captions, *own_captions], ""
    if len(given) > 1 and (own_captions or not dialect.variants):
        fault = f"{_list(given)} are captions, each of them; keep one"
    elif references and "references" in keys:
        fault = f"{_list(['references', *references])} name pictures to edit; keep one"
    return Reading(dialect, tuple(given), ignored, fault)


def files_by_name(files: Sequence[str]) -> dict[str, str]:
    """The files of a data set by their paths (composed), and by their names alone where only one has that name."""
    names = Counter(composed(file).rpartition("/")[2] for file in files)
    alone = {name: file for file in files if names[name := composed(file).rpartition("/")[2]] == 1}
    return alone | {composed(file): file for file in files}


def image_keys() -> tuple[str, ...]:
    """All that may name a picture."""
    return ("image", *(key for dialect in DIALECTS for key in dialect.images))


def _list(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _natural(key: Any) -> list[tuple[int, str]]:
    """So that ``control_path_10`` comes after ``control_path_2``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(key))]


def _placed(path: Any, folder: str, files: Mapping[str, str]) -> Any:
    """The file that a path means: as it is written, from the table's folder or from the top. Of a path that leaves the
    data set its end, the longest first, its mere name last; never one past ``holdout``. Where none is there, what then
    is missing."""
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        return path
    plain = composed(path.replace("\\", "/"))
    from_table, from_top = os.path.normpath(os.path.join(folder, plain)), os.path.normpath(plain)
    if os.path.isabs(plain) or from_table.startswith("..") or re.match("[A-Za-z]:", plain):
        parts = [part for part in from_top.split("/") if part not in ("", "..")]
        held_out = [place for place, part in enumerate(parts) if part.casefold() == HOLDOUT]
        tries = ["/".join(parts[start:]) for start in range(held_out[-1] + 1 if held_out else len(parts))]
        missing = tries[-1] if tries else path
    else:
        tries = [from_table, from_top]
        missing = from_table if from_top.startswith("..") else from_top
    return next((files[one] for one in tries if one in files), missing)
