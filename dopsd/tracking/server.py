"""The tracking server: its address, a client, and what its answers mean."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from traceback import walk_tb
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from filelock import FileLock

from dopsd.files import PARTIAL, DiskFull, full_disk_said, remove

if TYPE_CHECKING:
    from mlflow import MlflowClient


class Away(Exception):
    """The server cannot be reached, is busy or broken; later it may answer."""


class LoginNeeded(Away):
    """The server does not know who we are."""


class Refused(Exception):
    """The server understood and will not take it; asking again would not help."""


def tracking_uri(root: Path) -> str:
    """``MLFLOW_TRACKING_URI``, or a SQLite file in ``root``."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.resolve()}/mlflow.db"


def without_secrets(text: str, uri: str) -> str:
    """``text`` without the user and password of ``uri``."""
    try:
        userinfo, at, _ = urlsplit(uri).netloc.rpartition("@")
    except ValueError:
        return text.replace(uri, "the tracker")
    if not at:
        return text
    for secret in (userinfo + "@", userinfo, userinfo.partition(":")[2]):
        text = text.replace(secret, "") if secret else text
    return text


def public_uri(uri: str) -> str:
    """The tracker's address as it may be shown: no user, password or query."""
    if uri.startswith("sqlite:"):
        return uri
    parts = urlsplit(uri)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def connect(uri: str) -> MlflowClient:
    """A client for ``uri`` that fails soon: waiting is our business, not MLflow's."""
    for name, value in (
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "10"),
    ):
        os.environ.setdefault(name, value)
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    if uri.startswith("sqlite:///") and not _file_of(uri).exists():
        _make_database(_file_of(uri))
    return MlflowClient(tracking_uri=uri)


def _make_database(path: Path) -> None:
    """A new tracker's SQLite file, whole or not at all: MLflow makes it in fifty steps, and refuses for ever to go on
    with one that a kill or a full disk has cut short."""
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        for leftover in path.parent.glob(f".{path.name}.*{PARTIAL}"):
            remove(leftover)
        if path.exists():  # another process was faster
            return
        with TemporaryDirectory(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent) as place:
            made = Path(place) / path.name
            MlflowClient(tracking_uri=f"sqlite:///{made}").search_experiments(max_results=1)
            made.replace(path)


@contextmanager
def understood(uri: str) -> Iterator[None]:
    """Whatever is raised inside comes out as :class:`Away` or :class:`Refused`, in one short line without passwords."""
    try:
        with full_disk_said(_file_of(uri)):
            yield
    except (Away, Refused):
        raise
    except Exception as error:  # MLflow's, those of four libraries below it, a database's: none may reach a training
        text = " ".join(without_secrets(str(error), uri).split()).rpartition("(Caused by ")[2]
        status, text = _status(error), f"{type(error).__name__}: {text[:200]}"
        if status == 401:
            raise LoginNeeded(text) from None
        if status is not None and 400 <= status < 500 and status not in (408, 429):
            raise Refused(f"HTTP {status}{', too large' if status == 413 else ''}: {text}") from None
        raise Away(text) from (error if isinstance(error, DiskFull) else None)


def _file_of(uri: str) -> Path:
    """Where a tracker without a server writes."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0] if uri.startswith("sqlite:///") else ".").absolute()


def _status(error: Exception) -> int | None:
    """The HTTP status behind an error, where there is one.

    MLflow turns statuses into codes of its own and loses those it has no code for (413, or whatever a proxy answers in
    JSON of its own). The answer itself is still in the frame that raised.
    """
    from mlflow.exceptions import MlflowException
    from requests import Response

    frames = (frame for frame, _ in walk_tb(error.__traceback__))
    for answer in (getattr(error, "response", None), *(value for frame in frames for value in frame.f_locals.values())):
        if isinstance(answer, Response) and answer.status_code >= 400:
            return answer.status_code
    return error.get_http_status_code() if isinstance(error, MlflowException) else None
