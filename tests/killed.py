"""``dopsd concept add``, killed at each of its steps and then called again: what test_data_killed.py looks at.

    python -m tests.killed PROJECT FOLDER HOW

A step is a call of the system that changes a file of the project, outside of DVC's cache. For each one a copy of
PROJECT is made, and a process that is forked from this one (importing DVC takes seconds) kills itself there; a file
that is opened to be written over is empty then. Prints a JSON line for each: the step, what lies in data/concepts
after a second call that fails, and after a third that is the first again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from dopsd.data.concept import add_concept
from tests.concept_folders import SETTINGS

CHANGES = {"os.rename", "os.remove", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate"}


def kill_at(number: int, place: Path) -> None:
    """End this process, as by ``kill -9``, at its ``number``-th step from now."""
    steps = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal steps
        written = event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if not written and event not in CHANGES:
            return
        paths = [os.path.abspath(one) for one in args[:2] if isinstance(one, str)]
        if not any(path.startswith(f"{place}/") and "/.dvc/cache/" not in path for path in paths):
            return
        steps += 1
        if steps == number:
            if written and args[2] & os.O_TRUNC:
                Path(args[0]).write_bytes(b"")
            line = f"{event} {' '.join(path.removeprefix(f'{place}/') for path in paths)}"
            (place.parent / "step").write_text(line)
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def forked(work: Callable[[], object]) -> int:
    """How a process that does ``work`` ended: 0, minus a signal's number, or 1 where it raised."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def seen(project: Path) -> dict[str, str]:
    """Every file below data/concepts, and the settings."""
    files = [path for path in (project / "data").rglob("*") if path.is_file()]
    return {str(p.relative_to(project)): p.read_bytes().hex() for p in [*files, project / "params.yaml"]}


def main(project: Path, folder: Path, how: str) -> None:
    """``how``: ``fresh``, ``replace`` or ``in-place``."""
    place = project.parent / "copy"

    def add(source: Path) -> None:
        os.chdir(place)
        target = place / "data/concepts/mine"
        listed_in = None if "mine" in Path("params.yaml").read_text() else Path("params.yaml")
        what = target if how == "in-place" and source == folder else source
        add_concept(what, "mine", place, SETTINGS, how == "replace", listed_in=listed_in)

    def killed(number: int) -> None:
        kill_at(number, place)
        add(folder)

    (bad := folder.with_name("bad")).mkdir()
    for number in count(1):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(project, place, symlinks=True)
        if (ended := forked(lambda: killed(number))) == 0:  # noqa: B023
            print(json.dumps({"step": "none", "after": seen(place)}), flush=True)
            return
        assert ended == -signal.SIGKILL, ended
        row: dict[str, Any] = {"step": (place.parent / "step").read_text()}
        row["code"] = forked(lambda: add(bad))
        row["failed"] = seen(place)
        row["again"] = forked(lambda: add(folder))
        row["after"] = seen(place)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
