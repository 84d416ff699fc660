"""The place that all nodes of a job see: what a worker needs that goes on with it, in a shared folder or on S3.

It holds what training would find in its folder after a kill: of every run its newest checkpoint, adapters and log. The
starting side puts there what earlier runs left, the first worker brings up to date what changed at every checkpoint,
and workers begin with a copy of it. Ray's controller imports this module too, so it imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dopsd.files import link_or_copy, whole_file

_REFUSAL = "refused.txt"
_STEP = re.compile(r"checkpoints/step-(\d+)/state\.json$")


@dataclass
class JobStorage:
    """The folder of the job ``name`` below ``place`` (a path, or ``s3://bucket/folder?option=value``). It may be sent
    to another machine."""

    place: str
    name: str
    _known: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Size and time of change of this process's files that are there."""

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        from pyarrow.fs import FileSystem

        system, path = FileSystem.from_uri(self.place)
        return system, f"{path}/{self.name}/run"

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place, "name": self.name, "_known": {}}

    def load(self, folder: Path) -> None:
        """Copy all that is there into ``folder``."""
        from pyarrow.fs import copy_files

        system, path = self._opened
        names = [name for name in self._files() if name != _REFUSAL]
        if system.type_name == "local":
            for name in names:
                link_or_copy(Path(path, name), folder / name)
        elif names:
            folder.mkdir(parents=True, exist_ok=True)
            copy_files(path, str(folder), source_filesystem=system)
        self._known |= {name: _stamp(folder / name) for name in names}

    def save(self, folder: Path, methods: Sequence[str]) -> None:
        """Bring the runs ``folder/<method>`` up to date there; what did not change since the last call is not copied.

        An older checkpoint is removed after the newer one is whole, so a death at any moment leaves one to go on from.
        """
        system, path = self._opened
        wanted = {file.relative_to(folder).as_posix(): file for m in methods for file in needed(folder / m)}
        for name, file in wanted.items():
            stamp = _stamp(file)
            if self._known.get(name) != stamp:
                self._put(file, f"{path}/{name}")
                self._known[name] = stamp
        for name in self._files():
            if name.partition("/")[0] in methods and name not in wanted:
                system.delete_file(f"{path}/{name}")
                self._known.pop(name, None)

    def offer(self, folder: Path, methods: Sequence[str]) -> None:
        """Put the runs in ``folder`` there that are further than what is there; a refusal is over."""
        if _REFUSAL in self._files():
            system, path = self._opened
            system.delete_file(f"{path}/{_REFUSAL}")
        there = {method: [name for name in self._files() if name.startswith(f"{method}/")] for method in methods}
        further = [method for method in methods if _newest(needed(folder / method)) > _newest(there[method])]
        if further:
            self.save(folder, further)

    def refuse(self, text: str) -> None:
        """Say to all workers that begin from now on that it is no use, and why; until :meth:`offer`."""
        system, path = self._opened
        system.create_dir(path, recursive=True)
        with system.open_output_stream(f"{path}/{_REFUSAL}") as file:
            file.write(text.encode())

    def refusal(self) -> str:
        """What a worker said by :meth:`refuse`; else empty."""
        system, path = self._opened
        if _REFUSAL not in self._files():
            return ""
        with system.open_input_stream(f"{path}/{_REFUSAL}") as file:
            return file.read().decode()

    def further_than(self, folder: Path) -> list[str]:
        """The methods whose runs are further there than in ``folder``."""
        names = self._files()
        methods = sorted({name.partition("/")[0] for name in names if name != _REFUSAL})
        there = {method: _newest([name for name in names if name.startswith(f"{method}/")]) for method in methods}
        return [method for method, step in there.items() if step > _newest(needed(folder / method))]

    def drop(self, method: str) -> None:
        """Remove one run of it."""
        system, path = self._opened
        if any(name.startswith(f"{method}/") for name in self._files()):
            system.delete_dir(f"{path}/{method}")

    def delete(self) -> None:
        """Remove all of it."""
        system, path = self._opened
        if self._files():
            system.delete_dir(path)

    def _files(self) -> list[str]:
        """Names of the files that are there."""
        from pyarrow.fs import FileSelector, FileType

        system, path = self._opened
        found = system.get_file_info(FileSelector(path, allow_not_found=True, recursive=True))
        return [info.path[len(path) + 1 :] for info in found if info.type == FileType.File]

    def _put(self, file: Path, target: str) -> None:
        from pyarrow.fs import copy_files

        system, _ = self._opened
        if system.type_name != "local":  # an object is there whole or not at all
            copy_files(str(file), target, destination_filesystem=system)
            return
        with whole_file(Path(target)) as partial:
            link_or_copy(file, partial)


def _stamp(file: Path) -> tuple[int, int]:
    info = file.stat()
    return info.st_size, info.st_mtime_ns


def needed(run: Path) -> list[Path]:
    """The files of a run's folder that going on with it takes; those of the newest checkpoint last.

    Pictures, the machine's load and an older checkpoint are not among them.
    """
    from dopsd.train.checkpoint import complete
    from dopsd.train.machine import SYSTEM_FILE

    newest = complete(run / "checkpoints")[-1:]
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and not path.name.endswith(".partial")]
    left_out = {"previews", "checkpoints", SYSTEM_FILE}
    first = [path for path in files if path.relative_to(run).parts[0] not in left_out]
    return first + sorted((path for path in files if path.parent in newest), key=lambda path: path.name == "state.json")


def _newest(names: Sequence[Any]) -> int:
    """The step of the newest checkpoint among files; -1 where there is none."""
    return max((int(found[1]) for name in names if (found := _STEP.search(str(name)))), default=-1)
