"""``train.init_from``: the file that a training begins from, found and known by its content before a base is loaded."""

from __future__ import annotations

from pathlib import Path

from dopsd.config import SettingsError
from dopsd.config.groups import TrainSettings


def start_path(settings: TrainSettings, root: Path) -> Path | None:
    """Where ``train.init_from`` is; ``None``: a training begins from the base."""
    return root / Path(settings.init_from).expanduser() if settings.init_from is not None else None


def start_hash(settings: TrainSettings, root: Path, run: Path) -> str:
    """The hash of the content of ``train.init_from``; empty where a training begins from the base. ``run``: the
    concept's run folder.

    Raises ``SettingsError`` for a file that the training itself writes, and
    :class:`~dopsd.distill.targets.AdapterError` for one that is missing, or of no kind that is read.
    """
    path = start_path(settings, root)
    if path is None:
        return ""
    from dopsd.distill.targets import AdapterError  # torch and more
    from dopsd.given import find_given
    from dopsd.models.hashes import HASHES, content_hash

    _check_stays(path, run)
    try:
        return content_hash(find_given(path), root / HASHES)
    except AdapterError as error:
        raise AdapterError(f"train.init_from: {error}") from None


def _check_stays(path: Path, run: Path) -> None:
    """What this concept's stages write changes with every training, and would then ask for another one."""
    from dopsd.train.checkpoint import was_set_aside

    place, here = path.resolve(), run.resolve()
    if place.is_relative_to(here) and not any(was_set_aside(folder) for folder in place.relative_to(here).parents):
        raise SettingsError(f"train.init_from: {path}: this training replaces it; copy it out of {run}, name the copy")
