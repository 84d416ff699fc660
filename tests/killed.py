"""``dopsd concept add``, killed at each of its steps and then called again: what test_data_killed.py looks at.

    python -m tests.killed PROJECT FOLDER HOW

A step is a call of the system that changes a file of the project, DVC's cache apart. For each kind of step a copy of
PROJECT is made, and a process that is forked from this one (importing DVC takes seconds) kills itself there; a file
that is opened to be written over is empty then. Prints a JSON line of what lies in data/concepts after an unbroken
call, and one for each kind: the step, what lies there after a second call that is refused, and after the first again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from dopsd.data.concept import add_concept
from tests.concept_folders import SETTINGS

CHANGES = {"os.rename", "os.remove", "os.link", "os.symlink", "os.truncate"}


class Steps:
    """Of this process, from :meth:`watch` on. ``kill_at``: the one at which it ends, as by ``kill -9``."""

    def __init__(self, place: Path, kill_at: int | None = None) -> None:
        self._place, self._kill_at = place, kill_at
        self._seen: list[str] = []

    def watch(self) -> None:
        sys.addaudithook(self._hook)

    def write(self) -> None:
        (self._place.parent / "steps").write_text("\n".join(self._seen))

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        written = event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if not written and event not in CHANGES:
            return
        paths = [os.path.abspath(one) for one in args[:2] if isinstance(one, str) and len(one) > 2]
        paths = [path.removeprefix(f"{self._place}/") for path in paths if path.startswith(f"{self._place}/")]
        if not any(path.startswith(("data/", "params", ".dvc/tmp/rwlock")) for path in paths):
            return
        self._seen.append(f"{event} {' '.join(paths)}")
        if len(self._seen) - 1 == self._kill_at:
            if written and args[2] & os.O_TRUNC:
                Path(args[0]).write_bytes(b"")
            self.write()
            os.kill(os.getpid(), signal.SIGKILL)


def of_one_kind(step: str) -> str:
    """Pictures are all alike to it, and so are the names of what is half-written."""
    return re.sub(r"mine/[\w.]*|[\w-]{20,}|cache/\S+|\d+(-\d+)?", "*", step)


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
    """Every file below data/concepts, and the settings; not what DVC leaves where it tries to make a link."""
    files = [p for p in (project / "data").rglob("*") if p.is_file() and not re.fullmatch(r"\.[\w-]{22}\.tmp", p.name)]
    return {str(p.relative_to(project)): p.read_bytes().hex() for p in [*files, project / "params.yaml"]}


def main(project: Path, folder: Path, how: str, out: TextIO) -> None:
    """``how``: ``fresh``, ``replace`` or ``in-place``."""
    place = project.parent / "copy"

    def add(source: Path) -> None:
        os.chdir(place)
        target = place / "data/concepts/mine"
        listed_in = None if "mine" in Path("params.yaml").read_text() else Path("params.yaml")
        what = target if how == "in-place" and source == folder else source
        add_concept(what, "mine", place, SETTINGS, how == "replace", listed_in=listed_in)

    def watched(steps: Steps) -> None:
        steps.watch()
        add(folder)
        steps.write()

    def anew() -> None:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(project, place, symlinks=True)

    (bad := folder.with_name("bad")).mkdir()
    os.dup2(2, 1)  # DVC talks
    anew()
    add(folder)  # what is imported here is there in every child
    anew()
    assert forked(lambda: watched(Steps(place))) == 0
    steps = (place.parent / "steps").read_text().split("\n")
    print(json.dumps({"after": seen(place)}), file=out)
    for number in sorted({of_one_kind(step): number for number, step in enumerate(steps)}.values()):
        anew()
        ended = forked(lambda: watched(Steps(place, number)))  # noqa: B023
        assert ended == -signal.SIGKILL, ended
        row: dict[str, Any] = {"step": (place.parent / "steps").read_text().split("\n")[-1]}
        row["refused"] = how == "fresh" or forked(lambda: add(bad)) == 1
        row["before"] = seen(place)
        row["again"] = forked(lambda: add(folder))
        row["after"] = seen(place)
        print(json.dumps(row), file=out, flush=True)


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as rows:
        main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], rows)
