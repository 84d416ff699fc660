"""What DVC keeps beside a project's files: its cache, where with ``cache.type`` symlink the files of a data set are
links to; and who holds what."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dvc.repo import Repo

_OBJECT = re.compile(r"(files/md5/)?[0-9a-f]{2}/[0-9a-f]{30}")
"""How DVC 3, and DVC 2 before it, calls a file there."""


def is_cached(path: str, folder: Path) -> bool:
    """Whether ``path``, an absolute one with all links followed, is a file in DVC's cache: of the project that the data
    set ``folder`` lies in, or of the one that is worked in.

    A ``.dvc`` in the data set itself, its ``holdout/`` included, never counts, nor does it hide the project's: whoever
    made the data may have written what it says of its cache.
    """
    for place in _caches(folder) if _OBJECT.search(path) else ():
        if path.startswith(place + os.sep) and _OBJECT.fullmatch(path[len(place) + 1 :]):
            return True
    return False


def _caches(folder: Path) -> Iterator[str]:
    from .folders import HOLDOUT  # which asks here what a link leads to

    root = os.path.abspath(folder)
    own = os.path.dirname(root) if os.path.basename(root) == HOLDOUT else root
    for start in (os.path.dirname(own), os.getcwd()):
        parents = (parent for parent in (start, *map(str, Path(start).parents)) if not _lies_in(parent, own))
        projects = (os.path.join(parent, ".dvc") for parent in parents)
        if project := next(filter(os.path.isdir, projects), None):
            files = (os.path.join(project, name) for name in ("config", "config.local"))
            stamps = [os.stat(file).st_mtime_ns if os.path.exists(file) else 0 for file in files]
            if place := _cache_of(project, *stamps):
                yield place


def _lies_in(path: str, folder: str) -> bool:
    """Links followed; the folder itself does."""
    return Path(path).resolve().is_relative_to(Path(folder).resolve())


@cache
def _cache_of(project: str, *_: int) -> str | None:
    """The cache of the project with that ``.dvc``, links followed; read anew when its configuration has changed."""
    from dvc.config import Config, ConfigError

    try:
        config = Config(project)
    except (ConfigError, OSError):  # DVC itself says what is wrong with it
        return None
    named = config["remote"].get(config["cache"].get("local"), {}).get("url")
    return os.path.realpath(named or config["cache"].get("dir") or os.path.join(project, "cache"))


def heal_locks(repo: Repo) -> None:
    """Delete DVC's list of who holds what where a kill left half of it: DVC would refuse to work until somebody does.
    Raises DVC's ``LockError`` where another process is writing it."""
    from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK, make_lock

    path = Path(repo.tmp_dir or "", RWLOCK_FILE)
    with make_lock(str(path.with_name(RWLOCK_LOCK)), tmp_dir=repo.tmp_dir, hardlink_lock=False):
        try:
            json.loads(path.read_bytes())
        except FileNotFoundError:
            pass
        except ValueError:
            path.unlink()
