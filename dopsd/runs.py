"""The trainings of a concept, those that were set aside too: listed, and removed when they are named (``dopsd runs``).

A run is set aside when settings, data, base or code changed (:mod:`dopsd.train.resume`). It is a training, and no
leftover: ``dopsd clean`` leaves it alone, however often it is called.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from dopsd.config.groups import ComputeSettings
from dopsd.files import read_json, size_of
from dopsd.identity import changes
from dopsd.lock import concept_lock
from dopsd.params import SettingsError
from dopsd.project import concepts_in, run_folder

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN = ("max_steps", "batch_size", "learning_rate", "tune", "lora.rank")
"""Of the settings of a run that is not set aside; of others what differs from it is said."""


@dataclass(frozen=True)
class Run:
    """One training of one method."""

    folder: Path
    aside: bool
    """Whether it was set aside."""
    steps: int
    """Of its newest checkpoint; 0 where it has none here (a job on Ray brings them when it ends)."""
    status: str
    time: int | None
    """Milliseconds since 1970: when it ended, or began where it did not end."""
    size: int
    """Bytes that removing it frees."""
    made_of: Mapping[str, Any]
    """Settings and what they stood for (:func:`dopsd.identity.made_of`); empty for runs of earlier versions."""

    @property
    def method(self) -> str:
        """What was trained."""
        return self.folder.name.partition(".")[0]


def runs_in(root: Path, concept: str | None = None) -> list[Run]:
    """The trainings of ``concept``, or of all. Raises ``SettingsError`` for a name that is none."""
    return [
        _run(about.parent)
        for name in ([concept] if concept else concepts_in(root))
        for about in sorted((run_folder(name, root) / "train").glob("*/run.json"))
    ]


def _run(folder: Path) -> Run:
    from dopsd.train.checkpoint import STATE, complete, was_set_aside

    about = read_json(folder / "run.json")
    states = (read_json(path / STATE) for path in reversed(complete(folder / "checkpoints")))
    state: dict[str, Any] = next((found for found in states if found), {})
    return Run(
        folder, was_set_aside(folder), state.get("step", 0), str(about.get("status", "")).lower(),
        about.get("ended") or about.get("started"), size_of(folder), state.get("made_of", {}),
    )  # fmt: skip


def remove_runs(root: Path, concept: str, names: Sequence[str], compute: ComputeSettings) -> list[Run]:
    """Delete the runs ``names`` of ``concept``, under its lock, also what Ray's job keeps of them; returns what they
    were.

    Raises ``SettingsError`` where there is no such run, or only a link to one, and then deletes nothing;
    ``ConceptBusy``.
    """
    from dopsd.train.launch import storage_of

    with concept_lock(concept, root, "dopsd runs"):
        found = {run.folder.name: run for run in runs_in(root, concept)}
        if missing := [name for name in names if name not in found]:
            raise SettingsError(f"{concept} has no run {', '.join(missing)}; it has {', '.join(found) or 'none'}")
        if links := [name for name in names if found[name].folder.is_symlink()]:
            raise SettingsError(f"{concept}: {links[0]} is a link, to {found[links[0]].folder.resolve()}; remove both "
                                "by hand")  # fmt: skip
        training = read_json(run_folder(concept, root) / "train" / "training.json").get("training")
        for name in dict.fromkeys(names):
            if training and not found[name].aside:
                storage_of(f"{concept}-{training}", compute, root).drop(found[name].method)
            shutil.rmtree(found[name].folder)
    return [found[name] for name in dict.fromkeys(names)]


def runs_table(runs: Sequence[Run], root: Path) -> Table:
    """One line for each, and the sum."""
    from rich.table import Table

    table = Table(show_footer=True)
    # the name is what one types to remove it: it may stand below its concept, but in one piece
    table.add_column("run", min_width=max((len(run.folder.name) for run in runs), default=0), overflow="fold")
    table.add_column("steps")
    table.add_column("when", no_wrap=True)
    table.add_column("size", decimal(sum(run.size for run in runs)), justify="right", no_wrap=True)
    table.add_column("settings; where set aside: its own -> those of the run in its place", min_width=20)
    current = {(run.folder.parent, run.method): run for run in runs if not run.aside}
    for run in runs:
        date = datetime.fromtimestamp(run.time / 1000).strftime("%Y-%m-%d") if run.time else ""
        words = _settings_of(run, current.get((run.folder.parent, run.method)))
        place = run.folder.relative_to(root / "runs")
        name, steps = f"{place.parts[0]} {place.name}", str(run.steps or "-")
        table.add_row(name, steps, f"{run.status}\n{date}", decimal(run.size), words)
    return table


def _settings_of(run: Run, current: Run | None) -> str:
    if not run.made_of:
        return "not written down"
    if run.aside and current is not None and current.made_of:
        return ", ".join(changes(run.made_of, current.made_of)) or "the same"
    settings: Mapping[str, Any] = run.made_of["settings"]
    flat = {**settings, **{f"lora.{key}": value for key, value in settings.get("lora", {}).items()}}
    return ", ".join(f"{key} {flat[key]}" for key in _SHOWN if key in flat)
