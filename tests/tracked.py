"""A run folder as training and stages write it, and what the tracker has of it; to be made fixtures of."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from dopsd import tracking
from dopsd.config.groups import TrackingSettings
from dopsd.files import append_line, write_json
from dopsd.tracking import Sender, send
from tests.mlflow_server import Proxy, Server

SETTINGS = TrackingSettings(experiment="test")
TRAINING = "0123456789ab"


def in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the sender waits for is over at once."""
    monkeypatch.setattr(tracking, "BATCH_SECONDS", 0.05)
    monkeypatch.setattr(tracking, "LONGEST_WAIT", 0.5)


def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for a module: starting one takes seconds."""
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()


def proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What the tracker is here."""
    proxy = Proxy(server)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
    yield proxy
    proxy.close()


class Log(list[str]):
    """What the person was told; :meth:`wait` returns when a line with ``word`` was."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()

    def __call__(self, text: str) -> None:
        with self._changed:
            self.append(text)
            self._changed.notify_all()

    def wait(self, word: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: any(word in line for line in self), 180), list(self)


class Folder:
    """A run folder, written as training and stages do."""

    def __init__(self, root: Path, concept: str) -> None:
        self.root, self.run = root, root / "runs" / concept
        self.train, self.method = self.run / "train", self.run / "train" / "d-opsd"
        write_json(self.train / "training.json", {"training": TRAINING, "code": "c"})
        write_json(self.train / "settings.json", {"train": {"seed": 1, "steps": 5}})
        data = {"name": concept, "hash": "f" * 64, "source": f"data/concepts/{concept}", "profile": {"images": 16}}
        write_json(self.run / "about.json", {"data": data, "tags": {"mlflow.source.git.commit": "0" * 40}})
        self.status("RUNNING")

    def status(self, status: str, ended: int | None = None, training: str = TRAINING) -> None:
        write_json(self.method / "run.json", {"training": training, "status": status, "started": 1000, "ended": ended})

    def step(self, step: int, **values: float) -> None:
        values = values or {"train/loss": 1 / (step + 1)}
        append_line(self.method / "log.jsonl", json.dumps({"step": step, "time": 1000 + step, **values}))

    def preview(self, step: int, seed: int = 0, side: int = 64, suffix: str = ".webp") -> Path:
        path = self.method / "previews" / f"student-{step:06d}{suffix}"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (side, side * 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, lossless=True)
        path.with_name("student.captions.txt").write_text("a\nb\nc\n")
        return path

    def write(self, name: str, content: str) -> Path:
        path = self.run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return path

    def send(self, log: Any = print) -> bool:
        return send(self.root, self.run, SETTINGS, log)

    def sender(self, log: Any) -> Sender:
        return Sender(self.root, self.run, SETTINGS, log)


def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Folder:
    """Of a concept that is named after the test."""
    return Folder(tmp_path, re.sub("[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower()))


def tracker() -> MlflowClient:
    return MlflowClient(tracking_uri=os.environ["MLFLOW_TRACKING_URI"])


def runs_of(folder: Folder) -> list[Any]:
    client = tracker()
    experiment = client.get_experiment_by_name("test")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], f"tags.`dopsd.concept` = '{folder.run.name}'"))


def run_of(folder: Folder, method: bool = True) -> Any:
    (run,) = (run for run in runs_of(folder) if ("dopsd.method" in run.data.tags) is method)
    return run


def history_of(folder: Folder, key: str = "train/loss", method: bool = True) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in tracker().get_metric_history(run_of(folder, method).info.run_id, key)]


def artifacts_of(folder: Folder, place: str, method: bool = True) -> list[str]:
    return [item.path for item in tracker().list_artifacts(run_of(folder, method).info.run_id, place)]


def read_from(folder: Folder, path: str, tmp_path: Path, method: bool = True) -> bytes:
    place = tmp_path / "read"
    place.mkdir(exist_ok=True)
    return Path(tracker().download_artifacts(run_of(folder, method).info.run_id, path, str(place))).read_bytes()
