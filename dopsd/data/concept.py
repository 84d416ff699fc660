"""``dopsd concept add``: a folder checked, copied into the project and put under DVC, or nothing changed at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from filelock import FileLock

from ..config import CONCEPTS, OWN_SETTINGS, DataSettings, SettingsError, concept_name
from ..files import copy_files, disk_full, is_disk_full, remove, size_of, whole_file
from .dvc_cache import heal_locks
from .manifest import ConceptTable, concept_files
from .needs import ANY, Needs
from .replacement import BEGUN, Change
from .schema import validate_dataset
from .unpack import Rewording, as_folder, reword

_Table = ConceptTable | None


class RemoteAway(RuntimeError):
    """The DVC remote does not answer, refuses, or has not got the data; another try may find it."""


class ConceptError(ValueError):
    """A data set that cannot be added; one line a person can act on."""


def add_concept(
    folder: Path,
    name: str,
    root: Path,
    settings: DataSettings,
    replace: bool = False,
    needs: Needs = ANY,
    listed_in: Path | None = None,
    say: Callable[[str], object] = lambda line: None,
    how: Rewording | None = None,
) -> tuple[ConceptTable, ConceptTable | None]:
    """Check ``folder``, copy it to ``root/data/concepts/name``, ``dvc add`` it, and add ``name`` to the concepts in the
    settings ``listed_in``, where that is given. Returns the tables there: training, and held out. What is packed
    (:mod:`dopsd.data.packed`) is unpacked; ``say`` is told how it was read. ``how``: the placeholder, written into the
    copy's captions.

    A folder that lies there already is checked and put under DVC where it is. ``replace`` overwrites another data set
    of that name. A ``train.yaml`` is written where there is none. Whatever fails, everything is as before; whatever is
    killed, the same call again does all of it. Raises ``DataError`` for faults of the data, ``SettingsError`` for a
    name that is none, ``DiskFull`` where there is no room, and :class:`ConceptError` for a name that is taken, or where
    DVC refuses.
    """
    root, name = Path(os.path.abspath(root)), concept_name(name)
    if not (root / ".dvc").is_dir():
        raise ConceptError(f"{root}: not a DVC project; run from the project's root, or `dvc init` there first")
    change = Change(root / CONCEPTS / name)
    target, partial = change.target, change.partial
    change.recover()
    in_place = target.exists() and folder.exists() and target.samefile(folder)
    try:
        with _as_checked(folder, change, in_place, settings, needs, say, how) as (rows, tables):
            if os.path.lexists(target) and not in_place and not replace and not change.goes_on(rows):
                raise ConceptError(f"{target} is there already; choose another name or pass --replace")
            if not in_place:
                _carry_settings(rows, change, say)
                _copy(rows, name, partial, settings, needs, tables)
        with change.made(in_place):
            _with_own_settings(target)
            _dvc_add(root, target)
            tables = validate_dataset(target, name, settings, needs)
            if listed_in is not None:
                list_concept(listed_in, name)
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(error, target, size_of(folder) if folder.exists() else 0) from error
        raise ConceptError(f"{error.filename or target}: {error.strerror or error}; nothing was added") from None
    finally:
        remove(partial)
    return tables


@contextmanager
def _as_checked(
    folder: Path, change: Change, in_place: bool, settings: DataSettings, needs: Needs,
    say: Callable[[str], object], how: Rewording | None,
) -> Iterator[tuple[Path, tuple[ConceptTable, ConceptTable | None]]]:  # fmt: skip
    """The data set as a folder of rows, unpacked and reworded where that is asked, and its tables."""
    name = change.target.name
    with as_folder(folder, change.unpacked, say, copy=how is not None) as (rows, packed):
        if in_place and rows != folder:
            raise ConceptError(f"{folder}: cannot be unpacked or reworded into itself; move it, and add it from there")
        read_as = None
        if how is not None:
            any_caption = settings.model_copy(update={"allow": (*settings.allow, "captions-without-placeholder")})
            tables = validate_dataset(rows, name, any_caption, needs)
            read_as = tables[0].read_as
            reword(rows, tables, how, needs.teacher_variant)
        tables = validate_dataset(rows, name, settings, needs)
        if not packed:
            number = len(tables[0].rows)
            say(f"{folder}: read as {read_as or tables[0].read_as}: {number} rows, {number} pictures")
        yield rows, tables


def _copy(
    folder: Path, name: str, partial: Path, settings: DataSettings, needs: Needs, tables: tuple[_Table, _Table]
) -> None:
    """Copy the data set's own files to ``partial`` and check that the copy is the same."""
    copy_files(folder, concept_files(folder), partial)
    _with_own_settings(partial)
    copies = validate_dataset(partial, name, settings, needs)
    if [_hash(copy) for copy in copies] != [_hash(table) for table in tables]:
        raise ConceptError(f"{folder}: changed while it was copied; nothing was added, try again")


def _hash(table: ConceptTable | None) -> str | None:
    return table.content_hash if table else None


def _carry_settings(folder: Path, change: Change, say: Callable[[str], object]) -> None:
    """What somebody wrote for this concept's training is not the data set's: it outlives that."""
    old = change.target / OWN_SETTINGS
    if os.path.lexists(folder / OWN_SETTINGS) or not old.is_file() or old.read_bytes() == BEGUN.encode():
        return
    change.partial.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(old, change.partial / OWN_SETTINGS)
    say(f"{old}: kept, as the new data set brings none; delete it to begin anew")


def _with_own_settings(folder: Path) -> None:
    path = folder / OWN_SETTINGS
    if not os.path.lexists(path):  # a link to what is gone would be written through
        with whole_file(path) as partial:
            partial.write_text(BEGUN, encoding="utf-8")


def list_concept(params: Path, name: str) -> None:
    """Add ``name`` to ``concepts`` in the file of settings; everything else there stays as it is, to the letter.

    Raises ``SettingsError`` where ``concepts`` is no list of names.
    """
    lock = params.parent / ".cache" / f"{params.name}.lock"
    lock.parent.mkdir(exist_ok=True)
    with FileLock(lock):  # of two at once one would lose its name
        _list_concept(params, name)


def _list_concept(params: Path, name: str) -> None:
    text = params.read_text(encoding="utf-8")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    found = [value for key, value in getattr(root, "value", []) if key.value == "concepts"]
    if len(found) != 1 or not isinstance(found[0], yaml.SequenceNode):
        raise SettingsError(f"{params}: concepts: expected a list of names; add {name} there")
    listed: yaml.SequenceNode = found[0]
    if listed.flow_style or not listed.value:
        place = listed.end_mark.index - 1
        added = f", {name}" if listed.value else name
    else:
        text += "" if text.endswith("\n") else "\n"
        place = text.index("\n", listed.value[-1].end_mark.index)  # after a comment
        added = f"\n{' ' * listed.start_mark.column}- {name}"
    with whole_file(params) as partial:
        partial.write_text(text[:place] + added + text[place:], encoding="utf-8")


def _dvc_add(root: Path, target: Path) -> None:
    # Imported here: DVC takes seconds to import and only this function needs it.
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.scm import SCMError

    try:
        with Repo(str(root)) as repo:
            heal_locks(repo)
            repo.add(str(target))
    except (DvcException, SCMError, OSError) as error:
        if is_disk_full(error):
            raise disk_full(error, Path(repo.cache.local_cache_dir), size_of(target)) from error
        message = " ".join(str(error).split())
        raise ConceptError(f"{target}: dvc add failed: {message}; nothing was added") from None


def pull_missing(root: Path, name: str) -> bool:
    """Bring a concept's data from the DVC remote where it is under DVC and not here. Returns whether it was brought.

    Nothing is done where it is here, not under DVC, or no remote is set. Raises :class:`RemoteAway` where the remote
    does not answer, refuses or has not got it.
    """
    target = root / CONCEPTS / concept_name(name)
    pointer = target.with_name(f"{name}.dvc")
    if target.exists() or not pointer.exists():
        return False
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.scm import SCMError

    try:
        with Repo(str(root)) as repo:
            if not repo.config["remote"]:
                return False
            heal_locks(repo)
            repo.pull(targets=[str(pointer)])
    except (DvcException, SCMError, OSError) as error:
        raise RemoteAway(f"{target}: dvc pull failed: {' '.join(str(error).split())[:300]}") from None
    return True
