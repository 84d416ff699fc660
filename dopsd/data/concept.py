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
from ..files import whole_file
from .manifest import ConceptTable, concept_files
from .needs import ANY, Needs
from .schema import validate_dataset
from .unpack import Rewording, as_folder, reword

_Table = ConceptTable | None
_OWN = """\
# What differs from `train` in params.yaml for this concept alone; as it is, nothing. Take the `#` off, or add others:
# max_steps: 100
# learning_rate: 7e-5
"""


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
    say: Callable[[str], object] = lambda line: None,
    how: Rewording | None = None,
) -> tuple[ConceptTable, ConceptTable | None]:
    """Check ``folder``, copy it to ``root/data/concepts/name`` and ``dvc add`` it. Returns the tables there: training,
    and held out. What is packed (:mod:`dopsd.data.packed`) is unpacked; ``say`` is told how it was read.
    ``how``: the placeholder, written into the copy's captions.

    A folder that lies there already is checked and put under DVC where it is. ``replace`` overwrites another data set
    of that name. A ``train.yaml`` is written where there is none. Whatever fails, everything is as before. Raises
    ``DataError`` for faults of the data, ``SettingsError`` for a name that is none, and :class:`ConceptError` for one
    that is taken, or where DVC refuses.
    """
    root, name = Path(os.path.abspath(root)), concept_name(name)
    if not (root / ".dvc").is_dir():
        raise ConceptError(f"{root}: not a DVC project; run from the project's root, or `dvc init` there first")
    target = root / CONCEPTS / name
    in_place = target.exists() and folder.exists() and target.samefile(folder)
    if os.path.lexists(target) and not in_place and not replace:
        raise ConceptError(f"{target} is there already; choose another name or pass --replace")
    _recover(target)
    with as_folder(folder, target.with_name(f".{target.name}.unpacked"), say, copy=how is not None) as (rows, packed):
        if in_place and rows != folder:
            raise ConceptError(f"{folder}: cannot be unpacked or reworded into itself; move it, and add it from there")
        read_as = None
        if how is not None:
            any_caption = settings.model_copy(update={"allow": (*settings.allow, "captions-without-placeholder")})
            tables = validate_dataset(rows, name, any_caption, needs)
            read_as = tables[0].read_as
            reword(rows, tables, how, needs.teacher_variant)
        table, held_out = validate_dataset(rows, name, settings, needs)
        if not packed:
            number = len(table.rows)
            say(f"{folder}: read as {read_as or table.read_as}: {number} rows, {number} pictures")
        partial = None if in_place else _copy(rows, name, target, settings, needs, (table, held_out))
    with _undone_on_failure(target, partial):
        _dvc_add(root, target)
    return validate_dataset(target, name, settings, needs)


def _copy(
    folder: Path, name: str, target: Path, settings: DataSettings, needs: Needs, tables: tuple[_Table, _Table]
) -> Path:
    """Copy the data set's own files to a hidden folder beside ``target`` and check that the copy is the same."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for file in concept_files(folder):
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file, partial / file)
        _with_own_settings(partial)
        copies = validate_dataset(partial, name, settings, needs)
        if [_hash(copy) for copy in copies] != [_hash(table) for table in tables]:
            raise ConceptError(f"{folder}: changed while it was copied; nothing was added, try again")
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            problem = f"cannot be copied to {target}: {error.strerror}; nothing was added"
            raise ConceptError(f"{folder}: {problem}") from None
        raise
    return partial


def _hash(table: ConceptTable | None) -> str | None:
    return table.content_hash if table else None


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def _recover(target: Path) -> None:
    """Put back what a run that was killed in the middle of a replacement had set aside."""
    aside = _aside(target)
    if aside.exists() and not target.exists():
        aside.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _undone_on_failure(target: Path, partial: Path | None) -> Iterator[None]:
    """Put ``partial`` in the place of ``target``; where the block fails, put everything back, DVC's two files too."""
    pointers = [target.with_name(f"{target.name}.dvc"), target.with_name(".gitignore"), target / OWN_SETTINGS]
    before = [path.read_bytes() if path.exists() else None for path in pointers]
    aside = _aside(target)
    try:
        if partial is not None:
            if target.exists():
                target.rename(aside)
            partial.rename(target)
        _with_own_settings(target)
        yield
    except BaseException:
        if partial is not None:
            shutil.rmtree(target if not partial.exists() else partial, ignore_errors=True)
            if aside.exists():
                aside.rename(target)
        for path, content in zip(pointers, before, strict=True):
            if content is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(content)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _with_own_settings(folder: Path) -> None:
    path = folder / OWN_SETTINGS
    if not path.exists():
        path.write_text(_OWN, encoding="utf-8")


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
            repo.add(str(target))
    except (DvcException, SCMError, OSError) as error:
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
            repo.pull(targets=[str(pointer)])
    except (DvcException, SCMError, OSError) as error:
        raise RemoteAway(f"{target}: dvc pull failed: {' '.join(str(error).split())[:300]}") from None
    return True
