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

from dopsd.files import PARTIAL, GrowingFile, read_json

LONGEST_PARAM = 6000  # characters that MLflow takes as a parameter's value
CLOCK_TICK = 0.02  # seconds that a file's time may lag behind the clock
LARGEST_SENT = 4 * 2**30
"""Bytes of a trained file."""
_PREVIEW = re.compile(r"(\w+)-(\d+)\.(?:webp|png)")  # png: of runs before 30 November 2026
Warn = Callable[[str], None]


@dataclass(frozen=True)
class Content:
    """What one run of the tracker is to show: a training's own, or the one of a method below it.

    ``key``: ``<training>`` or ``<training>/<method>``. ``status``: ``status``, ``started``, ``ended`` (milliseconds).
    ``data``: the data set's ``name``, ``hash``, ``source`` and ``profile``. ``numbers``: those measured once, after
    training. ``files``: each with its path among the run's artifacts; a preview with its key and step instead.
    """

    key: str
    name: str
    status: Mapping[str, Any]
    tags: dict[str, str]
    files: list[tuple[Path, str | tuple[str, int]]]
    logs: tuple[Path, ...] = ()
    params: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)


def contents(run: Path, warn: Warn) -> Iterator[Content]:
    """All that ``run`` has for the tracker, the training's own run first; nothing before there was a training."""
    train = run / "train"
    training = read_json(train / "training.json", warn).get("training")
    if not training:
        return
    methods = {path.parent: read_json(path, warn) for path in sorted(train.glob("*/run.json"))}
    # a folder of another training, whose turn to be set aside has not come, says so
    methods = {k: v for k, v in methods.items() if "." not in k.name and v.get("training", training) == training}
    metadata = read_json(run / "about.json", warn)
    data, tags = ({k: v for k, v in metadata.items() if isinstance(v, dict)}.get(name, {}) for name in ("data", "tags"))
    tags = {"dopsd.concept": run.name, "dopsd.training": training, **tags}
    begun = sorted((status for status in methods.values() if status.get("started")), key=lambda m: m["started"])
    status = {**begun[-1], "started": begun[0]["started"]} if begun else {}  # one method after the other
    yield _training(run, training, status, tags, data, warn)
    scores = _scores(run, status, warn)
    for folder, its in methods.items():
        yield _method(run, folder, training, its, tags, scores.get(folder.name, {}))


def _training(
    run: Path, training: str, status: Mapping[str, Any], tags: dict[str, str], data: Mapping[str, Any], warn: Warn
) -> Content:
    settings = run / "train" / "settings.json"
    texts = {key: str(value) for key, value in flatten(read_json(settings, warn)).items()}

    results = [path for name in ("evaluation", "report.html", "export") for path in _current(run / name, status)]
    # the exported weights are the registered version's: hundreds of megabytes need be there but once
    results = [path for path in results if path.suffix != ".safetensors"]
    exported = run / "exported.json"
    measured = read_json(exported, warn) if _current(exported, status) else {}
    return Content(
        training, run.name, status, tags | ({"dopsd.data.hash": data["hash"]} if "hash" in data else {}), data=data,
        params={k: text if len(text) <= LONGEST_PARAM else "see settings.json" for k, text in texts.items()},
        numbers={f"export/{k}": float(value) for k, value in measured.items() if _is_number(value)},
        files=[*((p, p.name) for p in _files(settings)), *((p, p.relative_to(run).as_posix()) for p in results)],
    )  # fmt: skip


def _current(place: Path, status: Mapping[str, Any]) -> list[Path]:
    """Files of a later stage; what an earlier training left there stays until that stage has run again."""
    files = _files(place)
    newest = max((path.stat().st_mtime for path in files), default=0) + CLOCK_TICK
    return files if newest >= status.get("started", float("inf")) / 1000 else []


def _scores(run: Path, status: Mapping[str, Any], warn: Warn) -> dict[str, dict[str, float]]:
    """Method to its numbers by names that are the same for every base: ``score/`` has the means of what the registry's
    gate compares, ``tuned/`` the headline. The rest stays in files: MLflow's pages compare runs by all of their
    metrics, and have charts of all, in the order of the alphabet: ``tuned`` is after previews and curves."""
    paired, metrics = run / "evaluation" / "paired.json", run / "evaluation" / "metrics.json"
    models = read_json(paired, warn).get("models", {}) if _current(paired, status) else {}
    headline = read_json(metrics, warn).get("headline", {}) if _current(metrics, status) else {}
    found: dict[str, dict[str, float]] = {}
    try:
        for model, its in headline.items():
            # what goes beyond all of the way is for benchmarks
            shown = {name: value for name, value in its.items() if _is_number(value) and not name.endswith("_raw")}
            found[model] = {f"tuned/{name}": float(value) for name, value in shown.items()}
        for model, scores in models.items():
            means = {f"score/{score}": sum(its["first"]) / len(its["first"]) for score, its in scores.items()}
            found[model] = found.get(model, {}) | means
    except (AttributeError, LookupError, TypeError, ZeroDivisionError):
        warn(f"{run / 'evaluation'}: its scores cannot be read; some are left out")
    return found


def _method(
    run: Path, folder: Path, training: str, status: Mapping[str, Any], tags: dict[str, str],
    scores: Mapping[str, float],
) -> Content:  # fmt: skip
    previews = _files(folder / "previews")
    pictures = [(path, found) for path in previews if (found := _PREVIEW.fullmatch(path.name))]
    shown = {"mlflow.loggedImages": "True"} if pictures else {}  # else MLflow's page does not look for them
    return Content(
        f"{training}/{folder.name}", f"{run.name} {folder.name}", status,
        {**tags, "dopsd.method": folder.name, **shown}, logs=(folder / "log.jsonl", folder / "system.jsonl"),
        numbers=scores,
        files=[
            *((path, (f"preview/{found[1]}", int(found[2]))) for path, found in pictures),
            *((path, f"preview/{path.name}") for path in previews if path.suffix == ".txt"),
            *((path, f"adapters/{path.name}") for path in _files(folder / "adapters") if _is_sent(path)),
        ],
    )  # fmt: skip


def _is_sent(path: Path) -> bool:
    """Whether a trained file goes to the tracker: a whole model's does not, what is exported of it is registered."""
    return path.suffix != ".json" and path.stat().st_size <= LARGEST_SENT


def _files(place: Path) -> list[Path]:
    """A file, or all that are in a folder; those that are being written are not."""
    files = sorted(place.rglob("*")) if place.is_dir() else [place]
    return [path for path in files if path.is_file() and not path.name.endswith(PARTIAL)]


def rows(log: GrowingFile, warn: Warn, last: bool) -> Iterator[tuple[int, int, dict[str, float]]]:
    """The new rows of a log: step (or the number of the line), time in milliseconds, numbers. ``last``: nobody writes
    it any more, so that half a line at its end is a fault."""
    for number, line in log.new_lines(half=last):
        try:
            row = json.loads(line)
            step, time = int(row.get("step", number)), int(row.get("time", 0))
        except (ValueError, TypeError, AttributeError):
            warn(f"{log.path}: line {number + 1} is broken; it is left out")
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
