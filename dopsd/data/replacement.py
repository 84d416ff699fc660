"""A concept's folder and what DVC wrote of it, changed together or not at all, whatever fails or is killed meanwhile.

Beside ``data/concepts/NAME`` lie, hidden, while it is changed::

    .NAME.unpacked   what the data set is made of, where it is packed or reworded
    .NAME.partial    the copy that is being made
    .NAME.before     ``data``, the folder as it was, and ``pointer``, NAME.dvc as it was; each where there was one
    .NAME.dropped    what is being deleted

The change is made when ``.NAME.before`` is dropped, by one renaming. A run that finds it there follows one that was
killed.
"""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config import OWN_SETTINGS
from ..files import PARTIAL, is_partial, remove, whole_file, whole_folder
from .manifest import concept_files

BEGUN = """\
# What differs from `train` in params.yaml for this concept alone; as it is, nothing. Take the `#` off, or add others:
# max_steps: 100
# learning_rate: 7e-5
"""
"""A concept's own settings, before anybody has touched them."""


class Change:
    """Of the folder ``target``. Whoever makes it holds the concept's lock."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.unpacked, self.partial, self._before, self._dropped = (
            target.with_name(f".{target.name}.{what}") for what in ("unpacked", "partial", "before", "dropped")
        )
        self._data, self._pointer = self._before / "data", self._before / "pointer"
        self._dvc, self._ignored = target.with_name(f"{target.name}.dvc"), target.with_name(".gitignore")

    def recover(self) -> None:
        """Delete what a killed run was making, and put back what it had set aside, unless what lies there by now holds
        more than that."""
        for path in (
            self.unpacked,
            self.unpacked.with_name(f"{self.unpacked.name}.fetched"),
            self.partial,
            self._dropped,
        ):
            remove(path)
        for path in self.target.rglob(f"*{PARTIAL}"):
            if is_partial(path.name):
                remove(path)
        if self._data.exists() and (not os.path.lexists(self.target) or _holds_no_more(self.target, self._data)):
            self._put_back()
            remove(self._dropped)

    def goes_on(self, folder: Path) -> bool:
        """Whether to put a copy of ``folder`` in the place of ``target`` loses nothing, because a killed run was just
        doing that, or has done it."""
        if not _holds_no_more(self.target, folder):
            return False
        return self._before.exists() or set(concept_files(folder)) <= set(concept_files(self.target))

    @contextmanager
    def made(self, in_place: bool) -> Iterator[None]:
        """Inside the block ``partial`` is in the place of ``target``, or that itself is changed (``in_place``). Where
        the block fails, data and DVC's two files are as they were, and as they were before a run that was killed."""
        ignored = self._ignored.read_bytes() if self._ignored.exists() else None
        if in_place or not self._before.exists():
            pointer = self._pointer if self._before.exists() else self._dvc
            with whole_folder(self._before) as before:
                if pointer.exists():
                    shutil.copyfile(pointer, before / self._pointer.name)
                if in_place:
                    _copy_all(self.target, before / self._data.name)
        try:
            if not in_place:
                self._put()
            yield
        except BaseException:
            if not in_place or not self.target.is_symlink():
                self._put_back()
            self._restore_pointers(ignored)
            self._drop(self._before)
            raise
        self._drop(self._before)

    def _put(self) -> None:
        if os.path.lexists(self.target):
            if self._data.exists():  # what a killed run had put there
                self._drop(self.target)
            else:
                self.target.rename(self._data)
        self.partial.rename(self.target)

    def _put_back(self) -> None:
        """Renames alone: on a full disk there is no room for more."""
        if os.path.lexists(self.target) and (self._data.exists() or not self.partial.exists()):
            self.target.rename(self._dropped)
        if self._data.exists():
            self._data.rename(self.target)

    def _restore_pointers(self, ignored: bytes | None) -> None:
        remove(self._dropped)
        if self._pointer.exists():
            self._pointer.replace(self._dvc)
        else:
            self._dvc.unlink(missing_ok=True)
        now = self._ignored.read_bytes() if self._ignored.exists() else None
        if now is None or now == ignored:
            return
        own = f"/{self.target.name}\n".encode()
        if ignored is None and now == own:
            self._ignored.unlink()
        elif now.startswith(ignored or b"") and now[len(ignored or b"") :].strip() == own.strip():
            os.truncate(self._ignored, len(ignored or b""))
        elif own not in (ignored or b"").splitlines(keepends=True):  # another concept was added meanwhile
            with whole_file(self._ignored) as partial:
                partial.write_bytes(b"".join(line for line in now.splitlines(keepends=True) if line != own))

    def _drop(self, path: Path) -> None:
        """Half of it must not be taken for the whole."""
        remove(self._dropped)
        path.rename(self._dropped)
        remove(self._dropped)


def _holds_no_more(there: Path, folder: Path) -> bool:
    """Whether each file of the folder ``there`` is in ``folder`` too, with the same bytes. Own settings that nobody has
    touched may be there alone."""
    for parent, _, names in os.walk(there):
        for path in (Path(parent, name) for name in names):
            other = folder / path.relative_to(there)
            if other == folder / OWN_SETTINGS and not other.exists() and path.read_bytes() == BEGUN.encode():
                continue
            if not (path.is_file() and other.is_file() and filecmp.cmp(path, other, shallow=False)):
                return False
    return there.is_dir()


def _copy_all(folder: Path, target: Path) -> None:
    """Hidden files and links, too: as it is. (``shutil.copytree`` makes one text of all errors.)"""
    for parent, folders, names in os.walk(folder):
        place = target / os.path.relpath(parent, folder)
        place.mkdir(parents=True, exist_ok=True)
        for name in [*names, *(name for name in folders if os.path.islink(os.path.join(parent, name)))]:
            shutil.copy2(os.path.join(parent, name), place / name, follow_symlinks=False)
