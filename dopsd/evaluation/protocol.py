"""The published evaluation's prompts: of every training picture one rewrite of its caption and four test prompts.

They are kept beside the data, in ``data/concepts/NAME/protocol.jsonl``, for a person to read and edit; ``dopsd concept
prompts NAME`` writes them, by a VLM as published or by a template. Index 0 is the rewrite, on which the distances to
the picture are measured; 1 to 4 are the tests. What is asked of the VLM, and the template, are in ``protocol.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from dopsd.data.images import load_image
from dopsd.data.manifest import ABOUT, PROTOCOL, ConceptTable, DataError, Fault, Row
from dopsd.data.records import is_text, shown
from dopsd.data.wording import Naming, caption
from dopsd.files import read_json, whole_file

TESTS = 4
COUNT = 1 + TESTS
"""Of a picture: the rewrite, and the tests."""
_MOST_BYTES = 32 << 20
_MOST_LETTERS = 4096
_MOST_FAULTS = 20

Look = Callable[[Image.Image, str], str]
"""A picture and a question to an answer, as :class:`dopsd.models.captioner.Ask`."""


class PublishedPrompt(NamedTuple):
    """``row``: number of the table's row, from 0. ``index``: 0 is the rewrite. ``seed``: of its noise."""

    row: int
    index: int  # type: ignore[assignment] # a tuple's own method of that name is not missed
    text: str
    seed: int


def seed_of(row: int, index: int) -> int:
    """The published seed."""
    return 30 + 100 * row + index


# --- reading ----------------------------------------------------------------------------------------------------------


def published_prompts(table: ConceptTable, path: Path, placeholder: str | None = None) -> list[PublishedPrompt]:
    """The prompts of all rows, row by row. ``placeholder``: what each must hold, where that is asked.

    Raises ``DataError`` with its faults for a file that is missing, is no such file, or is of other rows: written
    before a picture was added, say.
    """
    faults: list[Fault] = []
    found: dict[tuple[str, int], str] = {}
    names = _names(table)

    def fault(line: int | None, column: str | None, problem: str) -> None:
        faults.append(Fault(str(path), line, column, problem))

    for number, values in _lines(path, fault):
        image, index, text = (values.get(key) for key in ("image", "index", "text"))
        if values.keys() != {"image", "index", "text"}:
            fault(number, None, 'must have "image", "index" and "text", and nothing else')
        elif not isinstance(image, str) or image not in names:
            fault(number, "image", f"{shown(str(image), 80)} is no picture of the data set; {_AGAIN}")
        elif not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < COUNT:
            fault(number, "index", f"must be 0 (the rewrite) to {TESTS}")
        elif not isinstance(text, str) or not text.strip() or len(text) > _MOST_LETTERS or not is_text(text):
            fault(number, "text", f"must be one line of text of at most {_MOST_LETTERS} characters")
        elif placeholder is not None and placeholder.lower() not in text.lower():
            fault(number, "text", f"does not hold {placeholder}, so it does not ask for the concept; add it")
        elif (image, index) in found:
            fault(number, "index", f"{index} of {image} is there twice; keep one")
        else:
            found[image, index] = text
    if not faults:
        for name in names:
            lacking = [str(index) for index in range(COUNT) if (name, index) not in found]
            if lacking:
                fault(None, None, f"{name} has no index {', '.join(lacking)}; {_AGAIN}")
    if faults:
        raise DataError(faults[:_MOST_FAULTS])
    return [PublishedPrompt(row, index, found[name, index], seed_of(row, index))
            for name, row in names.items() for index in range(COUNT)]  # fmt: skip


_AGAIN = "`dopsd concept prompts NAME --redo` writes the file anew"


def _names(table: ConceptTable) -> dict[str, int]:
    """The rows' pictures as they are called in the file, to the number of the first row that has each."""
    names: dict[str, int] = {}
    for number, row in enumerate(table.rows):
        names.setdefault(_name(table, row), number)
    return names


def _name(table: ConceptTable, row: Row) -> str:
    return row.image.relative_to(table.root).as_posix()


def _lines(path: Path, fault: Callable[[int | None, str | None, str], None]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers, from 1, and objects of a JSONL file; what is none goes to ``fault``."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            return fault(None, None, f"larger than {_MOST_BYTES >> 20} MiB; {_AGAIN}")
        lines = path.read_text("utf-8").split("\n")
    except FileNotFoundError:
        return fault(None, None, "missing; `dopsd concept prompts NAME` writes it")
    except (OSError, UnicodeDecodeError) as error:
        return fault(None, None, f"cannot be read ({getattr(error, 'strerror', None) or 'no UTF-8'}); {_AGAIN}")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, dict):
            yield number, values
        else:
            fault(number, None, "no JSON object; correct the line")
    return None


# --- for CLIP-S -------------------------------------------------------------------------------------------------------


def class_of(folder: Path) -> str:
    """The class word of a subject, ``"label"`` of the concept's ``concept.json``; empty where none is said."""
    path = folder / ABOUT
    label = read_json(path).get("label") if path.is_file() and path.stat().st_size <= 64 << 10 else None
    return " ".join(label.split()) if isinstance(label, str) and len(label) <= 60 and is_text(label) else ""


def text_for_clip(text: str, placeholder: str, label: str = "") -> str:
    """A prompt in words that CLIP knows: the placeholder becomes the class word, which is said once ("a [V] dog": "a
    dog"); without one "in [V] style", or the placeholder alone, is left out."""
    mark = re.escape(placeholder)
    if label:
        said = re.compile(rf"{mark}(?:\s+({re.escape(label)}(?:e?s)?)\b)?", re.IGNORECASE)
        text = said.sub(lambda found: found[1] or label, text)
    else:
        text = re.sub(rf"[,\s]*(?:\bin\s+(?:the\s+)?)?{mark}[ -]styles?\b", "", text, flags=re.IGNORECASE)
        text = re.sub(rf"[,\s]*(?:\bin\s+(?:the\s+)?)?style\s+of\s+{mark}(?!\w)", "", text, flags=re.IGNORECASE)
        text = re.sub(rf"{mark}'s\s+", "", text, flags=re.IGNORECASE)
        text = re.sub(rf"\s*{mark}", "", text, flags=re.IGNORECASE)
    return re.sub(r"\s+(?=[,.])", "", " ".join(text.split())).strip(" ,")


# --- writing ----------------------------------------------------------------------------------------------------------


@cache
def _words() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("protocol.json").read_text("utf-8"))


def from_template(text: str, naming: Naming) -> list[str]:
    """A caption, and its phrase for the concept in the template's settings: ``COUNT`` prompts."""
    mark, noun = re.escape(naming.placeholder), re.escape(naming.noun)
    if naming.kind == "subject":
        found = re.search(rf"(?:\b(?:an?|the|my|our)\s+)?{mark}(?:\s+{noun}\b)?", text, re.IGNORECASE)
        phrase = found[0] if found else naming.name
    else:
        found = re.search(rf"(?:\bin\s+(?:the\s+)?)?{mark}(?:[ -]styles?\b)?", text, re.IGNORECASE)
        phrase = found[0] if found else naming.name
        phrase = f" {phrase}" if phrase.lower().startswith("in ") else f", {phrase}"
    return [text, *(setting.replace("{phrase}", phrase) for setting in _words()["template"][naming.kind])]


def by_vlm(look: Callable[[str], str], text: str, naming: Naming) -> tuple[list[str], list[str]]:
    """``COUNT`` prompts for a caption by a VLM that sees its picture, and notes for a person. An answer that is no
    caption, or says what another one says, is replaced by the template's."""
    asked = [_words()["rewrite"].replace("{caption}", text), *_words()["tests"][naming.kind]]
    prompts: list[str] = []
    notes: list[str] = []
    for index, (question, otherwise) in enumerate(zip(asked, from_template(text, naming), strict=True)):
        made = caption(look, "medium", naming, question)
        note = "it says what another one says" if made.text in prompts else made.note
        usable = bool(made.text) and made.text not in prompts
        prompts.append(made.text if usable else otherwise)
        notes += [f"index {index}: {note}{'' if usable else '; the template is taken'}"] if note else []
    return prompts, notes


def write_protocol(
    table: ConceptTable, naming: Naming, teachers: str | None, max_pixels: int, look: Look | None,
    progress: Callable[[list[Row]], Any] = iter,
) -> list[str]:  # fmt: skip
    """Write ``protocol.jsonl`` into the table's folder, whole or not at all. ``look``: the VLM; ``None``: the template.
    ``teachers``: the caption variant that is not the student's. Returns what a person should look at."""
    notes: list[str] = []
    lines: list[str] = []
    names = _names(table)
    for row in progress([table.rows[number] for number in names.values()]):
        name, text = _name(table, row), row.student_captions(teachers)[0]
        prompts = from_template(text, naming)
        if look is not None:
            image = load_image(row.image, max_pixels)
            prompts, said = by_vlm(lambda question: look(image, question), text, naming)  # noqa: B023
            notes += [f"{name}, {note}" for note in said]
        lines += [json.dumps({"image": name, "index": index, "text": prompt}, ensure_ascii=False)
                  for index, prompt in enumerate(prompts)]  # fmt: skip
    with whole_file(table.root / PROTOCOL) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return notes
