"""One at a time: whoever works on a concept holds its lock, whichever door it came through.

The lock is the kernel's: it ends with the process that holds it, however that ends.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from dopsd.config import concept_name
from dopsd.files import write_json


class ConceptBusy(RuntimeError):
    """Somebody else works on the concept; the message says who, where and since when."""


@contextmanager
def concept_lock(
    concept: str, root: Path, work: str, wait: float = 0.0, message: Callable[[str], None] = print
) -> Iterator[None]:
    """Hold ``concept`` while the block runs. ``work``: what is done, for those who find it held.

    ``wait``: seconds; ``message`` is told that we wait. Raises :class:`ConceptBusy` where it is held for longer.
    """
    folder = root / "runs" / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{concept_name(concept)}.lock")
    holder = folder / f"{concept}.json"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if wait > 0:
            message(f"{_held(concept, holder)}; waiting for it, {_long(wait)} at most")
        try:
            lock.acquire(timeout=wait)
        except Timeout:
            raise ConceptBusy(f"{_held(concept, holder)}; try again when it is done, or end that process") from None
    try:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        write_json(holder, {"work": work, "pid": os.getpid(), "host": socket.gethostname(), "since": now})
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _long(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"


def end_with_dvc() -> float:
    """Where DVC called this process, let it end with DVC, as by Ctrl-C: what it went on to make nobody would write
    down, and it would hold the concept until then. Returns the seconds to wait for one that is just ending so.

    On Linux, and with a Python that can wait for processes there; elsewhere it goes on.
    """
    stage = os.environ.get("DVC_STAGE")
    if stage is None or not hasattr(os, "pidfd_open"):
        return 0.0
    import psutil

    try:  # DVC's own environment has no stage or another one, that of a shell which it called us with has ours
        caller = next(one for one in psutil.Process().parents() if one.environ().get("DVC_STAGE") != stage)
        handle = os.pidfd_open(caller.pid)
    except (StopIteration, psutil.Error, OSError):
        return 0.0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=_end_with, args=(handle,), name="ends with DVC", daemon=True).start()
    return 10.0


def _end_with(handle: int) -> None:
    select.select([handle], [], [])
    os.kill(os.getpid(), signal.SIGTERM)


def _held(concept: str, holder: Path) -> str:
    """Who holds it, as far as that is known: the file is written after the lock is taken."""
    try:
        known = json.loads(holder.read_text(encoding="utf-8"))
        return (f"{concept} is held by `{known['work']}` (process {known['pid']} on {known['host']}, "
                f"since {known['since']})")  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return f"{concept} is held by another process"
