"""What was done already: ``dvc.lock``, for whoever runs stages without ``dvc repro``.

``dvc repro`` compares a stage with ``dvc.lock``, runs it and writes there what it left. Whoever else runs stages asks
and tells the same file through here, so that what one door made is known at the other. DVC's own lock is held for
milliseconds only, while a stage is compared or committed. As with DVC itself, the process must run inside the project.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random

from dopsd.config import CONCEPTS
from dopsd.data.dvc_cache import heal_locks
from dopsd.files import full_disk_said

if TYPE_CHECKING:
    from dvc.repo import Repo

PATIENCE = 120.0
"""Seconds that another DVC command may hold the project."""
_ONE = threading.Lock()
"""DVC's objects are not made for several threads."""


class PipelineError(ValueError):
    """The project's ``dvc.yaml`` or ``dvc.lock`` cannot be used as it is; one line saying what to do."""

    away = False
    """Whether another try may help."""


class PipelineBusy(PipelineError):
    """Another DVC command holds the project for longer than we wait."""

    away = True


def reasons_to_run(stage: str, concept: str, root: Path) -> list[str]:
    """What changed since ``dvc.lock`` was written: dependencies, results, or all of it; empty where nothing did."""
    with _project(root, concept) as repo:
        found = _patiently(repo.status, targets=[f"{stage}@{concept}"])
    return [reason for entries in found.values() for entry in entries for reason in _reasons(entry)]


def remember(stage: str, root: Path, concept: str | None = None) -> None:
    """Write to ``dvc.lock`` what the stage has just made, and keep it in DVC's cache."""
    with _project(root, concept) as repo:
        _patiently(repo.commit, f"{stage}@{concept}" if concept else stage, force=True)


def remember_data(root: Path, concept: str) -> None:
    """Bring ``data/concepts/<concept>.dvc`` up to date where the data are under DVC, as ``dvc repro`` does."""
    pointer = root / CONCEPTS / f"{concept}.dvc"
    if pointer.exists():
        with _project(root, concept) as repo:
            _patiently(repo.commit, str(pointer), force=True)


@contextmanager
def no_reader(path: Path, root: Path) -> Iterator[None]:
    """Inside the block no ``dvc repro`` depends on ``path`` in the middle of a stage: it hashes what a stage depends on
    when its command is done, and would write down a result beside other values than it was made of."""
    from dvc.rwlock import rwlock

    with _project(root, None) as repo, ExitStack() as held:
        wanted = [str(path.resolve())]
        _patiently(lambda: held.enter_context(rwlock(repo.tmp_dir, repo.fs, "dopsd plan", [], wanted, False)))
        yield


@contextmanager
def _project(root: Path, concept: str | None) -> Iterator[Repo]:
    from dvc.exceptions import DvcException, NoOutputOrStageError, NotDvcRepoError
    from dvc.lock import LockError
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.WARNING)
    try:
        with _ONE, full_disk_said(root / ".dvc"), Repo(str(root)) as repo:
            heal_locks(repo)
            yield repo
    except NotDvcRepoError:
        raise PipelineError(f"{root.resolve()}: not a DVC project; run `dvc init` there (`dvc init --no-scm` without "
                           "git)") from None  # fmt: skip
    except NoOutputOrStageError:
        raise PipelineError(f"params.yaml: concepts does not list {concept}; add it, or let `dopsd concept add` "
                           "do so") from None  # fmt: skip
    except LockError as error:
        raise PipelineBusy(f"DVC: {' '.join(str(error).split())[:300]}") from error
    except DvcException as error:
        raise PipelineError(f"DVC: {' '.join(str(error).split())[:300]}") from error


def _patiently(method: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """Call ``method`` again while another DVC command holds the project."""
    from dvc.lock import LockError

    again = Retrying(
        retry=retry_if_exception_type(LockError), wait=wait_random(0.1, 0.5), stop=stop_after_delay(PATIENCE),
        reraise=True,
    )  # fmt: skip
    return again(method, *args, **named)


def _reasons(entry: Any) -> Iterator[str]:
    """One entry of ``dvc status`` in words."""
    if isinstance(entry, str):
        yield entry
        return
    for kind, changes in entry.items():
        for path, change in changes.items():
            if isinstance(change, dict):  # keys of a file of parameters
                yield from (f"{path}: {key} {how}" for key, how in change.items())
            else:
                yield f"{path} {'missing' if change == 'deleted' else change}" + (
                    "" if kind == "changed deps" else " since it was made"
                )
