"""``run.json`` of a run: since when it runs, until when it ran, and how it ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dopsd.files import full_disk_said, now, read_json, write_json
from dopsd.train.observer import Observer

RUN_FILE = "run.json"


@contextmanager
def running(folder: Path, observer: Observer, training: str = "") -> Iterator[None]:
    """RUNNING inside the block; FINISHED, FAILED or KILLED after it. ``training``: the name of what it is part of."""
    try:
        with full_disk_said(folder):
            before = read_json(folder / RUN_FILE)
            started = before.get("started") if before.get("training") == training else None
            _write(
                folder,
                observer,
                {"training": training, "status": "RUNNING", "started": started or now(), "ended": None},
            )
            yield
            end_run(folder, observer)
    except BaseException as error:
        with suppress(OSError):  # where it cannot be written that it failed, the error itself says so
            end_run(folder, observer, how_it_ended(error))
        raise


def how_it_ended(error: BaseException | None) -> str:
    """The status of a run that left this behind."""
    if error is None:
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"


def end_run(folder: Path, observer: Observer, status: str = "FINISHED") -> None:
    """Write down that a run ended, where nobody did."""
    about = read_json(folder / RUN_FILE)
    if about.get("status") == "RUNNING":
        _write(folder, observer, {**about, "status": status, "ended": now()})


def adopt(folder: Path, observer: Observer, training: str) -> None:
    """A finished run is part of ``training`` too: of the same, or one whose settings change nothing in it."""
    end_run(folder, observer)  # killed between its last checkpoint and writing this
    about = read_json(folder / RUN_FILE)
    if about and about.get("training") != training:
        _write(folder, observer, {**about, "training": training})


def _write(folder: Path, observer: Observer, about: dict[str, Any]) -> None:
    write_json(folder / RUN_FILE, about)
    observer.wrote(folder / RUN_FILE)
