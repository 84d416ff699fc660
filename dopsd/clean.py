"""What the project keeps and nobody needs any more: found, measured, and deleted when asked (``dopsd clean``).

Everything is looked at and deleted under the locks of the concepts it belongs to, so that no training, running or about
to go on, loses anything. What is deleted here costs at most time: encodings are made again when they are asked for.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.filesize import decimal

from dopsd.config import concept_name
from dopsd.files import PARTIAL, read_json, size_of
from dopsd.lock import ConceptBusy, concept_lock
from dopsd.project import ENCODINGS, cache_of, concept_folder, concepts_in, job_of, jobs_in, run_folder

if TYPE_CHECKING:
    from rich.table import Table

_ENCODING = re.compile(r"[0-9a-f]{64}\.safetensors")  # weights of the evaluation's networks lie there too
_SURELY_DEAD = 3600  # seconds after which nobody goes on writing a half-written encoding; it takes milliseconds


@dataclass(frozen=True)
class Leftover:
    """A file or folder that may go, or several files of one folder."""

    paths: tuple[Path, ...]
    reason: str
    size: int
    """Bytes that deleting it frees."""


def tidy(root: Path, concept: str | None = None, *, delete: bool) -> tuple[list[Leftover], list[str]]:
    """Everything that may go, of ``concept`` or of all; with ``delete`` it is gone. And a line for what was skipped,
    because somebody works with it.

    Raises ``SettingsError`` for a name that is none.
    """
    concepts, skipped, free = [concept_name(concept)] if concept else concepts_in(root), list[str](), list[str]()
    with ExitStack() as held:
        for name in concepts:
            try:
                held.enter_context(concept_lock(name, root, "dopsd clean"))
                free.append(name)
            except ConceptBusy as busy:
                skipped.append(str(busy))
        found = [one for name in free for one in _of_concept(name, root)]
        if concept is None and not skipped:
            found += _of_encodings(concepts, root, skipped)
        elif concept is None:
            skipped.append("cached encodings: whoever works may be using them")
        for path in (path for one in found for path in one.paths) if delete else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return found, skipped


def leftovers_table(found: Sequence[Leftover], root: Path, *, deleted: bool) -> Table:
    """What was found, the largest first, and the sum."""
    from rich.table import Table

    table = Table(show_footer=True)
    table.add_column("what", "deleted" if deleted else "in all", overflow="fold")
    table.add_column("why", min_width=15)  # paths are what may break
    table.add_column("size", decimal(sum(one.size for one in found)), justify="right", no_wrap=True)
    for one in sorted(found, key=lambda one: (-one.size, one.paths)):
        first, *more = (path.relative_to(root) for path in one.paths)
        table.add_row(f"{first.parent}: {len(one.paths)} files" if more else str(first), one.reason, decimal(one.size))
    return table


# --- of one concept ---------------------------------------------------------------------------------------------------


def _of_concept(concept: str, root: Path) -> Iterator[Leftover]:
    from dopsd.train.checkpoint import complete, was_set_aside

    run = run_folder(concept, root)
    aside = [path for path in sorted((run / "train").glob("*")) if was_set_aside(path)]
    for path in aside:
        if not complete(path / "checkpoints"):  # others are trainings: `dopsd runs` has them
            yield _leftover(path, reason="set aside before its first checkpoint")
    for path in sorted(run.rglob(f"*{PARTIAL}")):
        if not any(parent in aside or parent.name.endswith(PARTIAL) for parent in path.parents):
            yield _leftover(path, reason="half-written by a process that was killed")
    for method in sorted(run.glob("train/*/checkpoints")):
        if method.parent not in aside:
            yield from _checkpoints(method.parent)
    for path in jobs_in(root):
        name, training = job_of(path)
        if name == concept and _job_is_over(path, run, training, concept_folder(concept, root)):
            yield _leftover(path, reason="kept for a Ray job that is over")


def _checkpoints(run: Path) -> Iterator[Leftover]:
    """Those that a finished run does not need to be known as finished, nor to go on with more minutes."""
    from dopsd.train.checkpoint import STATE, TENSORS, complete, is_over

    *older, newest = complete(run / "checkpoints") or [run]
    state = read_json(newest / STATE)
    if not state or read_json(run / "run.json").get("status") != "FINISHED":
        return
    for path in [*older, *([newest / TENSORS] if is_over(state) and (newest / TENSORS).exists() else [])]:
        yield _leftover(path, reason="checkpoint of a finished training")


def _job_is_over(job: Path, run: Path, training: str, data: Path) -> bool:
    """Whether nobody would go on with it: the concept's training is another one now, is finished here, or has no data.
    Where this side lost its run folder, or not all of it came here, the job is all that there is."""
    from dopsd.train.checkpoint import was_set_aside
    from dopsd.train.storage import JobStorage

    current = read_json(run / "train" / "training.json").get("training")
    if current is None:
        return not data.exists()
    methods = [read_json(path) for path in run.glob("train/*/run.json") if not was_set_aside(path.parent)]
    ends = [about.get("status") for about in methods if about.get("training") == training]
    if JobStorage(str(job.parent.resolve()), job.name).further_than(run / "train"):
        return False
    return current != training or (bool(ends) and set(ends) == {"FINISHED"})


# --- of all -----------------------------------------------------------------------------------------------------------


def _of_encodings(concepts: Sequence[str], root: Path, skipped: list[str]) -> Iterator[Leftover]:
    """Encodings that no concept's run used last."""
    used = set[str]()
    for concept in concepts:
        run = run_folder(concept, root)
        by_stage = read_json(run / ENCODINGS)
        if (run / "encoded").exists() and "encode" not in by_stage:
            skipped.append(f"cached encodings: {run} does not say which it used; run stage encode there once")
            return
        used |= {key for keys in by_stage.values() for key in keys}
    files = sorted(cache_of(root).folder.glob("*"))
    dead = time.time() - _SURELY_DEAD
    half = [path for path in files if path.suffix == PARTIAL and path.stat().st_mtime < dead]
    unused = [path for path in files if _ENCODING.fullmatch(path.name) and path.stem not in used]
    if half:
        yield _leftover(*half, reason="half-written by a process that was killed")
    if unused:
        yield _leftover(*unused, reason="encodings that no concept uses")


def _leftover(*paths: Path, reason: str) -> Leftover:
    return Leftover(paths, reason, size_of(*paths))
