"""What the names of files and folders say: outside of the folder, left behind by a system, held-out truth under another
name, regularisation pictures, kohya's repeats."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

from ..files import is_partial
from .records import leaves

HOLDOUT = "holdout"
"""The folder of held-out truth."""
_LEFTOVERS = {
    "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "picasa.ini", "zbthumbnail.info", "icon\r",
    "__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found",
}  # fmt: skip
_PICTURES = "(set|split|data|images?|imgs?|pictures?|pics?|photos?)*"
_HELD_OUT = re.compile(f"((hold|held)outs?|vals?|valid|validation|tests?|testing|evals?|evaluation|dev){_PICTURES}")
_REGULARISATION = re.compile(f"(regs?|regulari[sz]ations?){_PICTURES}|(class|prior){_PICTURES.replace('*', '+')}")
_MAX_PATH = 1024
_REPEATS = re.compile(r"(\d{1,3})_.+")
"""kohya's ``10_fox``; a longer number is a year, or something else."""


def is_leftover(name: str) -> bool:
    """Whether a file or folder of that name is hidden, or what a system, a NAS, a viewer or a kill leaves behind."""
    return name.startswith(".") or is_partial(name) or name.casefold().partition(":")[0] in _LEFTOVERS


def path_problem(root: Path, name: str) -> str:
    """What is wrong with a path as it is written in the table, before anything is opened."""
    parts = Path(name).parts
    if len(name) > _MAX_PATH:
        return "is far too long for a path; rename the file"
    if os.path.isabs(name) or ".." in parts:
        return "leaves the folder; give a path inside it"
    if "\\" in name and not os.path.lexists(root / name):
        other = name.replace("\\", "/")
        inside = not other.startswith("/") and ":" not in other and ".." not in other.split("/")
        return f"folders are parted by back-slashes; write {other if inside else 'a path inside the folder, with /'}"
    if any(is_leftover(part) for part in parts):
        return "is a hidden file, or one that systems leave behind; rename it"
    if parts and parts[0] == HOLDOUT:
        return "is held-out truth and must not be trained on; take the row out"
    try:
        return "is a link that leaves the folder; put the file itself there" if leaves(root, name) else ""
    except (OSError, ValueError):
        return "is not a path that this system knows; rename the file"


def not_for_training(files: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """Folders whose names say that what they hold is not to be trained on, each with what to do; and the files there.

    ``files``: relative paths; ``holdout/`` itself is not among them.
    """
    held: Counter[str] = Counter()
    meanings: dict[str, str] = {}
    inside: set[str] = set()
    for file in files:
        for folder, name in _folders(file):
            held_out = _HELD_OUT.fullmatch(_letters(name))
            meaning = "held-out" if held_out else "regularisation" if says_regularisation(name) else ""
            if meaning:
                meanings[folder] = meaning
                held[folder] += 1
                inside.add(file)
                break
    return {folder: _describe(meaning, held[folder]) for folder, meaning in meanings.items()}, inside


def _describe(meaning: str, files: int) -> str:
    what = f"{files} {'file' if files == 1 else 'files'} that would be trained on, in a folder whose name says"
    anyway = "to train on it all the same, rename it otherwise or set data.allow: [folder-names]"
    if meaning == "held-out":
        return f"{what} that it is held out; for that, the folder must be {HOLDOUT}/ of the data set itself; {anyway}"
    return (
        f"{what} that it holds regularisation pictures, which nothing here uses (what the base must keep is said by "
        f"train.replay.prompts); take it out; {anyway}"
    )


def says_held_out(file: str) -> bool:
    """Whether a packed file's split is not trained on, as Hugging Face knows splits: its word stands anywhere between
    separators and digits. ``test-00000-of-00001.parquet``, ``imagenet1k-validation-00.tar``, ``validation/...``."""
    for part in file.casefold().split("/"):
        words = re.findall(r"[^\W\d_]+", part)
        if any(_HELD_OUT.fullmatch(word) for word in (*words, *map("".join, pairwise(words)))):
            return True
    return False


def says_regularisation(name: str) -> bool:
    """Whether a folder of that name holds pictures that kohya's tools keep a class with."""
    return _REGULARISATION.fullmatch(_letters(name)) is not None


def _letters(name: str) -> str:
    return re.sub("[^a-z]", "", name.casefold())


def kohya_repeats(files: Iterable[str]) -> dict[str, int]:
    """Folders named as kohya's ``10_fox``, the outermost of each file, and how often a picture there is drawn."""
    found: dict[str, int] = {}
    for file in files:
        named = ((folder, _REPEATS.fullmatch(name)) for folder, name in _folders(file))
        first = next(((folder, match) for folder, match in named if match), None)
        if first is not None:
            found[first[0]] = int(first[1][1])
    return found


def _folders(file: str) -> Iterator[tuple[str, str]]:
    """Every folder above a file: its path and its name, the outermost first."""
    parts = file.split("/")[:-1]
    for depth, name in enumerate(parts, start=1):
        yield "/".join(parts[:depth]), name
