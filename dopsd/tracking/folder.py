"""What a concept's run folder says that the tracker is to show. Nothing here knows MLflow, and nothing here is sent.

``runs/<concept>/`` holds ``about.json`` (data set, tags) and ``train/`` with ``training.json`` (the training's name)
and ``settings.json``; for every method ``train/<method>/`` with ``run.json`` (since when, how it ended), ``log.jsonl``,
``system.jsonl``, ``previews/`` and ``adapters/``; and from the later stages ``evaluation/``, ``report.html``,
``export/`` and ``exported.json``. A broken file is a warning, and what it says is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dopsd.files import PARTIAL

LONGEST_PARAM = 6000
"""Characters that MLflow takes as a parameter's value."""
CLOCK_TICK = 0.02
"""Seconds that a file's time may lag behind the clock."""
_PREVIEW = re.compile(r"(\w+)-(\d+)\.png")

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Content:
    """What one run of the tracker is to show: a training's own, or the one of a method below it."""

    key: str
    """``<training>``, or ``<training>/<method>``."""
    name: str
    status: Mapping[str, Any]
    """``status``, ``started`` and ``ended`` in milliseconds; or nothing."""
    tags: dict[str, str]
    files: list[tuple[Path, str | tuple[str, int]]]
    """File here, and its path among the run's artifacts; of a preview instead its key and step."""
    logs: tuple[Path, ...] = ()
    params: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    """The data set: ``name``, ``hash``, ``source``, ``profile``; or nothing."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Those that are measured once, after training."""


def contents(run: Path, warn: Warn) -> Iterator[Content]:
    """All that ``run`` has for the tracker, the training's own run first; nothing before there was a training."""
    train = run / "train"
    training = read_json(train / "training.json", warn).get("training")
    if not training:
        return
    methods = {path.parent: read_json(path, warn) for path in sorted(train.glob("*/run.json"))}
    # a folder of another training, whose turn to be set aside has not come, says so
    methods = {k: v for k, v in methods.items() if "." not in k.name and v.get("training", training) == training}
    about = read_json(run / "about.json", warn)
    tags = {"dopsd.concept": run.name, "dopsd.training": training, **about.get("tags", {})}
    yield _training(run, training, _overall(list(methods.values())), tags, about.get("data", {}), warn)
    for folder, status in methods.items():
        yield _method(run, folder, training, status, tags)


def _training(
    run: Path, training: str, status: Mapping[str, Any], tags: dict[str, str], data: Mapping[str, Any], warn: Warn
) -> Content:
    settings = run / "train" / "settings.json"
    texts = {key: str(value) for key, value in flatten(read_json(settings, warn)).items()}

    def current(name: str) -> list[Path]:
        """Files of a later stage; what an earlier training left there stays until that stage has run again."""
        files = _files(run / name)
        newest = max((path.stat().st_mtime for path in files), default=0) + CLOCK_TICK
        return files if newest >= status.get("started", float("inf")) / 1000 else []

    results = [path for name in ("evaluation", "report.html", "export") for path in current(name)]
    measured = {
        name: read_json(run / path, warn)
        for name, path in (("evaluation", "evaluation/metrics.json"), ("export", "exported.json"))
        if current(path)
    }
    return Content(
        training, run.name, status, tags | ({"dopsd.data.hash": data["hash"]} if data else {}), data=data,
        params={k: text if len(text) <= LONGEST_PARAM else "see settings.json" for k, text in texts.items()},
        numbers={k.replace(".", "/"): float(value) for k, value in flatten(measured).items() if _is_number(value)},
        files=[*((p, p.name) for p in _files(settings)), *((p, p.relative_to(run).as_posix()) for p in results)],
    )  # fmt: skip


def _method(run: Path, folder: Path, training: str, status: Mapping[str, Any], tags: dict[str, str]) -> Content:
    previews = _files(folder / "previews")
    pictures = [(path, found) for path in previews if (found := _PREVIEW.fullmatch(path.name))]
    shown = {"mlflow.loggedImages": "True"} if pictures else {}  # else MLflow's page does not look for them
    return Content(
        f"{training}/{folder.name}", f"{run.name} {folder.name}", status,
        {**tags, "dopsd.method": folder.name, **shown}, logs=(folder / "log.jsonl", folder / "system.jsonl"),
        files=[
            *((path, (f"preview/{found[1]}", int(found[2]))) for path, found in pictures),
            *((path, f"preview/{path.name}") for path in previews if path.suffix == ".txt"),
            *((path, f"adapters/{path.name}") for path in _files(folder / "adapters") if path.suffix != ".json"),
        ],
    )  # fmt: skip


def _overall(methods: list[dict[str, Any]]) -> dict[str, Any]:
    """The status of a training, of its methods'."""
    known = [method for method in methods if {"status", "started", "ended"} <= method.keys()]
    states = {method["status"] for method in known}
    worst = next((state for state in ("RUNNING", "KILLED", "FAILED", "FINISHED") if state in states), None)
    ended = max((method["ended"] or 0 for method in known), default=0)
    started = [method["started"] for method in known]
    return {"status": worst, "started": min(started), "ended": ended} if worst else {}


def _files(place: Path) -> list[Path]:
    """A file, or all that are in a folder; those that are being written are not."""
    files = sorted(place.rglob("*")) if place.is_dir() else [place]
    return [path for path in files if path.is_file() and not path.name.endswith(PARTIAL)]


def read_json(path: Path, warn: Warn) -> dict[str, Any]:
    """The object in a JSON file; nothing where it is missing; nothing, and a warning, where it is broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        warn(f"{path} cannot be read ({error}); what it says is left out")
        return {}
    return value


@dataclass
class LogReader:
    """Reads a log's new rows, again and again; one that was put in the place of the old is read from its start."""

    path: Path
    _file: int = 0
    _position: int = 0
    _lines: int = 0

    def rows(self, warn: Warn, last: bool) -> Iterator[tuple[int, int, dict[str, float]]]:
        """Step, time in milliseconds, numbers. A row without a step counts as the line it is on, from 0.

        ``last``: nobody writes it any more, so that half a line at its end is a fault.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            about = self.path.stat()
            if about.st_ino != self._file or about.st_size < self._position:
                self._file, self._position, self._lines = about.st_ino, 0, 0
            file.seek(self._position)
            for line in file:
                number = self._lines
                if not line.endswith(b"\n") and not last:
                    return  # being written right now
                self._position, self._lines = self._position + len(line), number + 1
                try:
                    row = json.loads(line)
                    step, time = int(row.get("step", number)), int(row.get("time", about.st_mtime * 1000))
                except (ValueError, TypeError, AttributeError):
                    warn(f"{self.path}: line {number + 1} is broken; it is left out")
                    continue
                yield step, time, {k: float(v) for k, v in row.items() if k not in ("step", "time") and _is_number(v)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
