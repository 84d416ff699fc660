"""``dopsd concept caption``: captions for pictures that have none, by a VLM, for a person to review.

Each picture's captions are saved as they are made; a second run does the rest, also of one that got only some of them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dopsd.config import CONCEPTS, Settings, is_concept_name
from dopsd.data.captions import Uncaptioned, check_pictures, keep_as_before, save, uncaptioned
from dopsd.data.manifest import ABOUT, DataError, Fault
from dopsd.data.wording import VARIANTS, Caption, Kind, Naming, Variant, caption, naming_of
from dopsd.files import read_json

_MAX_ABOUT_BYTES = 64 << 10


class CaptionError(ValueError):
    """A person's mistake in what is to be captioned; one line that says what to do."""


@dataclass
class Report:
    """What a run did. ``files``: to review; ``look``: captions that a person should look at; ``failed``: none made."""

    total: int
    had: int = 0
    made: int = 0
    files: set[Path] = field(default_factory=set)
    examples: list[str] = field(default_factory=list)
    look: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def untouched(self) -> str:
        """What to say of pictures that had captions."""
        return f"; {self.had} had captions, which stay (--redo makes them anew)" if self.had else ""


def folder_of(place: str, root: Path) -> tuple[Path, str | None]:
    """The folder that a person means, and the concept's name where it is one of the project's.

    Raises :class:`CaptionError` where there is none, and where both a folder and a concept have that name.
    """
    folder, concept = Path(place).expanduser(), root / CONCEPTS / place
    named = is_concept_name(place) and concept.is_dir()
    if named and folder.is_dir() and not folder.samefile(concept):
        raise CaptionError(f"{place}: a folder here and a concept; say ./{place} or {concept}")
    if named:
        return concept, place
    if not folder.is_dir():
        raise CaptionError(f"{place}: no such folder, and no concept of that name in {root / CONCEPTS}; check it")
    inside = folder.resolve().parent == (root / CONCEPTS).resolve()
    return folder, folder.resolve().name if inside else None


def naming_for(folder: Path, kind: Kind | None, subject: str | None, placeholder: str) -> Naming:
    """How captions are to name the concept: as told, else as the folder's concept.json says, else as a style.

    Raises :class:`CaptionError` for a subject without a class word, or a style with one.
    """
    path = folder / ABOUT
    about: dict[str, Any] = {}
    if path.is_file() and path.stat().st_size <= _MAX_ABOUT_BYTES:
        about = read_json(path)
    if kind is None:
        kind = "subject" if subject is not None or about.get("kind") == "subject" else "style"
    if kind == "subject" and subject is None and isinstance(about.get("label"), str):
        subject = about["label"]
    try:
        return naming_of(kind, subject, placeholder)
    except ValueError as error:
        raise CaptionError(str(error)) from None


def caption_folder(
    folder: Path,
    naming: Naming,
    settings: Settings,
    root: Path,
    model: str | None = None,
    redo: bool = False,
    message: Callable[[str], None] = print,
) -> Report:
    """Caption the pictures of ``folder`` that have no captions; with ``redo`` all of them, anew.

    ``model``: the VLM, a folder or hub name; ``None``: that of the settings. Raises ``DataError`` for faults of the
    folder, ``ModelError`` for a model that cannot do it and :class:`CaptionError` for a context whose captions are not
    descriptions; all before anything is loaded.
    """
    from dopsd.data.images import load_image
    from dopsd.models import references_rule, resolved
    from dopsd.models.captioner import find_captioner, load_captioner
    from dopsd.models.reading import reader_of

    own = resolved(settings).model
    if references_rule(own) == "required":
        raise CaptionError(f"model.context is {own.context}: captions say what to change there, which no picture "
                           "shows; write them yourself")  # fmt: skip
    if wrong := reader_of(settings, root).as_prompt(naming.placeholder):
        raise CaptionError(f"data.placeholder: {wrong}")
    allowed = settings.data.allow
    pictures, total = uncaptioned(folder, redo, "folder-names" in allowed)
    names: dict[Variant, str] = {variant: variant for variant in VARIANTS}
    if own.teacher_variant is not None:
        names["detailed"] = own.teacher_variant
    pictures = [one for one in pictures if _to_make(one, names)]
    report = Report(total, had=total - len({one.path for one in pictures}))
    if not pictures:
        return report
    _check_room(pictures, own.teacher_variant)
    message(f"{len(pictures)} of {total} pictures in {folder} are to be captioned; looking at them")
    check_pictures(pictures, settings.data.max_pixels, "long-pictures" in allowed)
    found = find_captioner(settings.model, root, model)
    message(f"loading {found.shown}")
    ask = load_captioner(found, settings.model)
    if redo:
        keep_as_before(pictures)
    for picture in _with_bar(pictures):
        remarks: list[str] = []
        image = load_image(picture.path, settings.data.max_pixels, remarks.append)
        report.look += [f"{picture.path}: {remark}" for remark in remarks]
        made = {variant: caption(lambda question: ask(image, question), variant, naming)  # noqa: B023
                for variant in _to_make(picture, names)}  # fmt: skip
        _keep(picture, made, names, redo, report)
    return report


def _to_make(picture: Uncaptioned, names: Mapping[Variant, str]) -> list[Variant]:
    """``names``: variant to what it is called in a row. The teacher's own caption is the detailed one."""
    if picture.single:
        return ["medium"]
    return [variant for variant, name in names.items() if not picture.lacking or name in picture.lacking]


def _check_room(pictures: list[Uncaptioned], teacher_variant: str | None) -> None:
    """A context whose teacher reads a caption of its own needs two, and a ``.txt`` holds one."""
    faults = [
        Fault(str(one.target), None, None, "a .txt holds one caption, and model.context enhanced-prompt needs two; "
              "write metadata.jsonl in place of the .txt files")
        for one in pictures if one.single
    ]  # fmt: skip
    if teacher_variant is not None and faults:
        raise DataError(faults[:1])


def _with_bar(pictures: list[Uncaptioned]) -> Any:
    from tqdm import tqdm

    return tqdm(pictures, desc="captions", unit="picture", disable=None)


def _keep(
    picture: Uncaptioned, made: Mapping[Variant, Caption], names: Mapping[Variant, str], redo: bool, report: Report
) -> None:
    """Save what could be made of one picture, and note the rest."""
    for variant, one in made.items():
        if one.note:
            line = f"{picture.path}, {variant}: {one.note}"
            (report.look if one.text else report.failed).append(line)
    texts = {names[variant]: one.text for variant, one in made.items() if one.text}
    if not texts:
        return
    if not save(picture, texts, redo, [names[variant] for variant, one in made.items() if not one.text]):
        report.had += 1  # by now
        return
    report.made += 1
    report.files.add(picture.target)
    if len(report.examples) < 3:
        name, text = list(texts.items())[len(report.examples) % len(texts)]
        report.examples.append(f"{picture.image}, {name}: {text}")


def next_command(folder: Path, concept: str | None) -> str:
    """What a person types when the captions are as they should be."""
    guess = re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-")[:64]
    name = concept or (guess if is_concept_name(guess) else "my-concept")
    return f"dopsd concept add {shlex.quote(str(folder))} --name {name}"
