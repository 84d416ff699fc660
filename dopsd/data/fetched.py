"""A data set of the hub, fetched as files: its own code is neither fetched nor run."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from ..files import disk_full, is_disk_full
from .images import EXTENSIONS
from .packed import MAX_BYTES, PackedError
from .records import SHOWN, TEXTS, shown
from .tables import TABLES

_WANTED = (*EXTENSIONS, *TEXTS, *TABLES, ".tar", ".arrow", ".json", ".md")
_PATIENCE = 10.0
"""Seconds for the hub's first answer."""


def hub_name(source: Path) -> str | None:
    """``owner/name``, where nothing here is meant: neither it nor the folder it would be in is there."""
    name = source.as_posix()
    plain = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name)
    return name if plain and not source.parent.exists() else None


def fetch(name: str, place: Path) -> None:
    """Put the files of a data set on the hub into ``place``: tables, texts, pictures, and what packs them.

    Raises :class:`PackedError` where it cannot be had, or is too much, and ``DiskFull``.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    files: dict[str, int] = {}
    try:
        place.mkdir(parents=True, exist_ok=True)
        about = HfApi().dataset_info(name, files_metadata=True, timeout=_PATIENCE)
        files = {one.rfilename: one.size or 0 for one in about.siblings or () if _is_wanted(one.rfilename)}
        if sum(files.values()) > MAX_BYTES:
            raise PackedError(f"more than {MAX_BYTES >> 30} GiB in all; give a part of it as a folder")
        if files:
            wanted = [glob.escape(file) for file in files]
            snapshot_download(name, repo_type="dataset", revision=about.sha, local_dir=place, allow_patterns=wanted)
        missing = [file for file in files if not (place / file).is_file()]
        if missing:
            problem = f"the hub lists {shown(missing[0], SHOWN)} and does not give it"
            raise PackedError(f"{problem} ({len(missing)} of {len(files)} files); try again")
    except PackedError:
        raise
    except GatedRepoError:
        raise PackedError("gated: accept its licence at its page on the hub, then `hf auth login` here") from None
    except RepositoryNotFoundError:
        raise PackedError("no such folder here, and no such data set on the hub; check the spelling; if it is private, "
                          "`hf auth login` here") from None  # fmt: skip
    # Whatever the library's HTTP client raises; neither its text nor its traceback is passed on, for a malformed token
    # stands in some of them.
    except Exception as error:
        if is_disk_full(error):
            raise disk_full(error, place, sum(files.values())) from None
        raise PackedError(f"no such folder here, and the hub gives nothing ({type(error).__name__}); where there is "
                          f"network: `hf download --repo-type dataset {name} --local-dir DIR`, then add DIR"
                          ) from None  # fmt: skip


def _is_wanted(file: str) -> bool:
    parts = file.split("/")
    return file.lower().endswith(_WANTED) and not any(part in ("", "..") or part.startswith(".") for part in parts)
