"""Models from the hub: its own library's download and cache, and one line where it gives nothing.

The library looks for the token in its own places; here it is neither read nor shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dopsd.process import proxy_note

from .folder import HubAway, ModelError, Source, quoted

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NEVER = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.py")
"""Never fetched: formats that run code when they are read, and code."""
_PATIENCE = 10.0
"""Seconds for the hub's first answer. Its library waits without end, minutes where a firewall drops what is sent."""


def from_hub(name: str, revision: str | None, patterns: Sequence[str] | None, key: str) -> Source:
    """Fetch what is not in the library's cache yet; ``key`` names the setting in messages.

    With a commit as ``revision`` whose files are all in the cache the network is not asked; where the hub cannot be
    reached or refuses, what the cache has is used. Raises :class:`ModelError` where that is not enough.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    def fetch(patterns: list[str] | None, **options: Any) -> Source:
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=list(_NEVER), **options)
        )
        if not folder.is_dir():  # so it is where no file matched
            raise ModelError(f"{key}: {name}: that model has none of the files that are needed here; check the name")
        return Source(folder, name, folder.name)

    bare = None if patterns is None else list(patterns)
    wanted = None if bare is None else [*bare, "README.md"]
    begun = False
    with _quiet_hub():
        try:
            if _listed(name, revision):
                with suppress(OSError):  # the library's word for files that are missing; they are fetched below
                    return fetch(wanted, local_files_only=True)
            problem: Exception | None = None
            try:
                HfApi().model_info(name, revision=revision, timeout=_PATIENCE)
            except RevisionNotFoundError:
                raise
            except Exception as error:
                problem = error
            if problem is None:
                begun = True
                return fetch(wanted, tqdm_class=_Bar)
            with suppress(OSError):
                return fetch(bare, local_files_only=True)
            raise problem
        except ModelError:
            raise
        except Exception as error:
            # Whatever the library's HTTP client raises: its classes differ between versions. Neither its text nor its
            # traceback is passed on, for a malformed token stands in some of them.
            kind = HubAway if _away(error) else ModelError
            raise kind(f"{key}: {name}: {_why(error, name, revision, key, begun)}") from None


def cached(name: str, revision: str | None, patterns: Sequence[str]) -> Source | None:
    """What the library's cache has of these files, all or some; ``None``: nothing. The network is not asked."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(name, revision=revision, allow_patterns=list(patterns), local_files_only=True)
    except (OSError, ValueError):  # the library's words for "not in the cache" and for a name that the hub has not
        return None
    folder = Path(found)
    return Source(folder, name, folder.name) if folder.is_dir() else None


def _listed(name: str, revision: str | None) -> bool:
    """Whether the cache knows which files that commit has. Others may have put single files of it there."""
    if not _COMMIT.fullmatch(revision or ""):
        return False
    try:
        from huggingface_hub import get_cached_repo_tree

        return bool(get_cached_repo_tree(name, revision=revision))
    except Exception:  # not listed, or a library that keeps no lists
        return False


def _away(error: BaseException) -> bool:
    """Whether the hub was not there, as against having said no: a status above 500, or no answer at all."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    chain = list(_causes(error))
    status = next((e.response.status_code for e in chain if isinstance(e, HfHubHTTPError)), 0)
    settled = any(isinstance(e, HFValidationError | OfflineModeIsEnabled) for e in chain)
    full = isinstance(error, OSError) and error.strerror is not None
    return status >= 500 or (status == 0 and not settled and not full)


def _why(error: BaseException, name: str, revision: str | None, key: str, begun: bool) -> str:
    """Why the hub gave nothing, and what to do. ``begun``: it had answered, and files were being fetched."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    option = f" --revision {revision}" if revision else ""
    elsewhere = f"where there is network: `hf download {name}{option} --local-dir DIR`, then set {key} to DIR"
    chain = list(_causes(error))
    status = next((e.response.status_code for e in chain if isinstance(e, HfHubHTTPError)), 0)
    if any(isinstance(e, RevisionNotFoundError) for e in chain):
        return f"no revision {quoted(revision or 'main')!r} there; give a branch, a tag or a full commit"
    if any(isinstance(e, GatedRepoError) for e in chain) or status == 403:
        return "gated: accept its licence at its page on the hub, then `hf auth login` here"
    if any(isinstance(e, RepositoryNotFoundError) for e in chain):
        closed = ", or it is not open to this machine" if status == 401 else ""
        return (
            f"no such folder here, and no such model on the hub{closed}; check the spelling; if it is private or "
            "gated, accept its licence at its page on the hub, then `hf auth login` here"
        )
    if status == 401:
        return "the hub wants a valid token of this machine; `hf auth login` here (or correct HF_TOKEN)"
    if status:
        return f"the hub answers with an error ({status}) and its cache here lacks the files; try later, or {elsewhere}"
    if isinstance(error, HFValidationError):
        return "not a name that the hub allows (owner/name)"
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain):
        return f"not in the hub's cache here, and HF_HUB_OFFLINE forbids to fetch it; {elsewhere}"
    if isinstance(error, OSError) and error.strerror:
        return (
            f"cannot be written to the hub's cache ({error.strerror}); free some space or set HF_HOME to another disk"
        )
    what = type(chain[-1]).__name__
    if begun:
        return f"the download broke off ({what}); run again, what was fetched is kept; or {elsewhere}"
    return (
        "no such folder here, not (or not all) in the hub's cache here, and the hub cannot be reached "
        f"({what}){proxy_note(constants.ENDPOINT)}; {elsewhere}"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without the library's notes on every retry: what matters of them is in our one line."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


class _Bar(tqdm):
    """A bar for downloads. The library's own stays off where the environment says so, as dopsd.cli does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("name", None)
        super().__init__(*args, **{**kwargs, "disable": None})
