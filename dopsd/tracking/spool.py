"""A queue on disk between training and the tracker: records are put at once, and delivered when the tracker answers.

One JSON record a line in ``records.jsonl``, files that belong to records in ``files/``, and in ``delivered.json`` the
number of bytes of ``records.jsonl`` that the tracker has acknowledged. Nothing here knows MLflow.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Spool:
    """The queue in ``folder``. One process puts (from any thread); one process at a time delivers (:attr:`lock`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._records = folder / "records.jsonl"
        self._delivered = folder / "delivered.json"
        self._files = folder / "files"
        self._guard = threading.Lock()
        self._files.mkdir(parents=True, exist_ok=True)
        self.id = self._identify()
        self._repair()

    @property
    def lock(self) -> Path:
        """Path of the file that whoever delivers locks."""
        return self.folder / "lock"

    def _identify(self) -> str:
        """A name of this queue's own, so that what it made on a server is found again."""
        path = self.folder / "id"
        if not path.exists():
            _write(path, uuid.uuid4().hex)
        return path.read_text()

    def _repair(self) -> None:
        """Cut off the half line that a killed process left; it was never promised to anybody."""
        if not self._records.exists():
            return
        with self._records.open("rb+") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole != len(content):
                file.truncate(whole)

    def put(self, record: Record) -> None:
        """Append one record; it survives the end of this process once the call returns."""
        line = json.dumps(record, ensure_ascii=False) + "\n"
        with self._guard, self._records.open("a", encoding="utf-8") as file:
            file.write(line)

    def keep(self, path: Path) -> str:
        """Keep a file's present content (a hard link where the disk allows) and return the name to put in a record."""
        name = f"{uuid.uuid4().hex}/{path.name}"
        kept = self._files / name
        kept.parent.mkdir()
        try:
            os.link(path, kept)
        except OSError:
            shutil.copyfile(path, kept)
        return name

    def new_file(self, filename: str) -> tuple[str, Path]:
        """A fresh place for a file that the caller writes: the name for the record, and the path."""
        name = f"{uuid.uuid4().hex}/{filename}"
        path = self._files / name
        path.parent.mkdir()
        return name, path

    def file(self, name: str) -> Path:
        """The path of a kept file."""
        return self._files / name

    def drop(self, name: str) -> None:
        """Forget a kept file, after its record was acknowledged."""
        shutil.rmtree(self.file(name).parent, ignore_errors=True)

    def pending(self) -> Iterator[tuple[Record, int]]:
        """The records not yet acknowledged, oldest first, each with the position to acknowledge it by."""
        if not self._records.exists():
            return
        position = self._position()
        with self._records.open("rb") as file:
            file.seek(position)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # being written right now
                position += len(line)
                yield json.loads(line), position

    def acknowledge(self, position: int) -> None:
        """Everything up to ``position`` was delivered."""
        _write(self._delivered, json.dumps({"bytes": position}))

    def backlog(self) -> int:
        """How many records wait."""
        return sum(1 for _ in self.pending())

    def _position(self) -> int:
        return json.loads(self._delivered.read_text())["bytes"] if self._delivered.exists() else 0

    def reject(self, record: Record, reason: str) -> Path:
        """Set a record aside that the tracker will never take; returns the file that lists them."""
        path = self.folder / "rejected.jsonl"
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"reason": reason, "record": record}, ensure_ascii=False) + "\n")
        return path


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
