"""The tracker as a copy of the run folder, on a real MLflow server that goes away, refuses, breaks and goes silent."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from mlflow import MlflowClient
from PIL import Image

from dopsd import tracking
from dopsd.config import TrackingSettings
from dopsd.files import append_line, write_json
from dopsd.origin import git_tags
from dopsd.tracking import Sender, public_uri, run_id, send, tracking_uri, without_secrets
from dopsd.tracking.folder import flatten
from tests.mlflow_server import Proxy, Server

SETTINGS = TrackingSettings(experiment="test")
TRAINING = "0123456789ab"


@pytest.fixture(autouse=True)
def _in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "BATCH_SECONDS", 0.05)
    monkeypatch.setattr(tracking, "LONGEST_WAIT", 0.5)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
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


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Folder:
    """Of a concept that is named after the test."""
    return Folder(tmp_path, re.sub("[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower()))


def _client() -> MlflowClient:
    return MlflowClient(tracking_uri=os.environ["MLFLOW_TRACKING_URI"])


def _runs(folder: Folder) -> list[Any]:
    client = _client()
    experiment = client.get_experiment_by_name("test")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], f"tags.`dopsd.concept` = '{folder.run.name}'"))


def _run(folder: Folder, method: bool = True) -> Any:
    (run,) = (run for run in _runs(folder) if ("dopsd.method" in run.data.tags) is method)
    return run


def _history(folder: Folder, key: str = "train/loss", method: bool = True) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in _client().get_metric_history(_run(folder, method).info.run_id, key)]


def _artifacts(folder: Folder, place: str, method: bool = True) -> list[str]:
    return [item.path for item in _client().list_artifacts(_run(folder, method).info.run_id, place)]


def _read(folder: Folder, path: str, tmp_path: Path, method: bool = True) -> bytes:
    place = tmp_path / "read"
    place.mkdir(exist_ok=True)
    return Path(_client().download_artifacts(_run(folder, method).info.run_id, path, str(place))).read_bytes()


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_all_of_a_folder_is_shown_and_a_second_send_sends_nothing(proxy: Proxy, folder: Folder, tmp_path: Path) -> None:
    for step in range(5):
        folder.step(step)
    append_line(folder.method / "system.jsonl", json.dumps({"time": 5, "system/cpu": 1.0}))
    append_line(folder.method / "system.jsonl", json.dumps({"time": 6, "system/cpu": 2.0}))
    folder.preview(0, suffix=".png"), folder.preview(4)  # as they once were, and as they are
    folder.write("train/d-opsd/adapters/d-opsd.safetensors", "adapter")
    folder.write("train/d-opsd/adapters/d-opsd.json", "{}")
    folder.write("evaluation/metrics.json", json.dumps({"scores": {"d-opsd": {"style": 0.5, "none": float("nan")}}}))
    folder.write("evaluation/grids/few_step.png", "grid")
    folder.write("report.html", "report")
    folder.write("export/README.md", "card")
    folder.write("export/comfyui_lora.safetensors", "the registered version has it")
    folder.write("exported.json", json.dumps({"difference": 0.25}))
    folder.write("train/sft/log.jsonl", "left by another training\n")
    folder.status("FINISHED", 9000)
    log = Log()
    assert folder.send(log)
    assert not log
    assert _history(folder) == [(step, 1 / (step + 1)) for step in range(5)]
    assert _history(folder, "system/cpu") == [(0, 1.0), (1, 2.0)]
    run, training = _run(folder), _run(folder, method=False)
    assert (run.info.run_name, training.info.run_name) == (f"{folder.run.name} d-opsd", folder.run.name)
    assert run.data.tags["mlflow.parentRunId"] == training.info.run_id
    assert (run.info.status, run.info.start_time, run.info.end_time) == ("FINISHED", 1000, 9000)
    assert (training.info.status, training.info.end_time) == ("FINISHED", 9000)
    assert training.data.params == {"train.seed": "1", "train.steps": "5"}
    assert training.data.tags["dopsd.data.hash"] == "f" * 64
    assert run.data.tags["mlflow.source.git.commit"] == "0" * 40
    (dataset,) = training.inputs.dataset_inputs
    assert (dataset.dataset.digest, json.loads(dataset.dataset.profile)) == ("f" * 36, {"images": 16})
    assert training.data.metrics["evaluation/scores/d-opsd/style"] == 0.5
    assert training.data.metrics["export/difference"] == 0.25
    images = _artifacts(folder, "images")
    assert len(images) == 4, "two pictures, each with its small copy"
    assert sum("preview~student+step+4+timestamp+" in name for name in images) == 2
    assert _read(folder, "preview/student.captions.txt", tmp_path) == b"a\nb\nc\n"
    assert _artifacts(folder, "adapters") == ["adapters/d-opsd.safetensors"]
    assert set(_artifacts(folder, "", method=False)) == {
        "evaluation", "export", "report.html", "sent.json", "settings.json"
    }  # fmt: skip
    assert _read(folder, "evaluation/grids/few_step.png", tmp_path, method=False) == b"grid"
    assert _artifacts(folder, "export", method=False) == ["export/README.md"]
    assert run_id(folder.root, folder.run, TRAINING, SETTINGS) == training.info.run_id

    proxy.writes.clear()
    assert folder.send(log)
    assert proxy.writes == []
    folder.preview(5)
    folder.step(5)
    assert folder.send(log)
    assert Counter(line.split("?")[0].rpartition("/")[2].rpartition("+")[2] for line in proxy.writes)["log-batch"] == 1
    assert len(_artifacts(folder, "images")) == 6
    assert [step for step, _ in _history(folder)] == list(range(6))


@pytest.mark.parametrize("suffix", [".webp", ".png"])
def test_what_changed_is_sent_again_and_nothing_else(proxy: Proxy, folder: Folder, tmp_path: Path, suffix: str) -> None:
    report = folder.write("report.html", "one")
    picture = folder.preview(3, suffix=suffix)
    folder.write("evaluation/metrics.json", '{"style": 0.5, "same": 1}')
    assert folder.send()
    before = report.stat()
    report.write_text("two")
    os.utime(report, ns=(before.st_atime_ns, before.st_mtime_ns))
    folder.preview(3, seed=1, suffix=suffix)
    folder.write("evaluation/metrics.json", '{"style": 0.75, "same": 1}')
    proxy.writes.clear()
    assert folder.send()
    assert _read(folder, "report.html", tmp_path, method=False) == b"two", "the same size, the same time, other bytes"
    (shown, _) = sorted(_artifacts(folder, "images"), key=lambda name: "compressed" in name)
    assert shown.endswith(suffix), "MLflow's page asks for the type by the name"
    (tmp_path / "shown").write_bytes(_read(folder, shown, tmp_path))
    with Image.open(tmp_path / "shown") as image, Image.open(picture) as drawn:
        small = image.resize(drawn.size, Image.Resampling.NEAREST)
        assert image.width == 2 * drawn.width, "small ones are enlarged"
        assert np.array_equal(np.asarray(small), np.asarray(drawn)), "in the place of the first"
    assert _run(folder, method=False).data.metrics["evaluation/style"] == 0.75
    batches = [line for line in proxy.writes if "log-batch" in line]
    uploads = [line for line in proxy.writes if line.startswith("PUT")]
    assert (len(batches), len(uploads)) == (1, 6), uploads  # report, metrics.json, sent.json; picture, small, sent.json


def test_a_deleted_artifact_is_sent_again_and_a_broken_note_does_no_harm(
    server: Server, proxy: Proxy, folder: Folder
) -> None:
    folder.write("report.html", "one")
    folder.write("export/README.md", "card")
    folder.write("export/comfyui_lora.safetensors", "the registered version has it")
    assert folder.send()
    (kept,) = server.folder.glob(f"a/*/{_run(folder, method=False).info.run_id}/artifacts")
    (kept / "report.html").unlink()
    proxy.writes.clear()
    assert folder.send()
    assert [line.rpartition("/")[2] for line in proxy.writes if line.startswith("PUT")] == ["report.html", "sent.json"]
    (kept / "sent.json").write_text('{"report.ht')
    assert folder.send()
    proxy.writes.clear()
    assert folder.send()
    assert proxy.writes == []


def test_results_of_an_earlier_training_are_not_shown_with_a_new_one(proxy: Proxy, folder: Folder) -> None:
    started = int((folder.run / "about.json").stat().st_mtime * 1000) + 60_000
    folder.write("report.html", "of the training before")
    folder.write("train/sft/log.jsonl", '{"step": 1, "train/loss": 7}\n')
    write_json(folder.train / "sft/run.json", {"training": "another", "status": "FINISHED", "started": 1, "ended": 2})
    write_json(folder.method / "run.json", {"training": TRAINING, "status": "RUNNING", "started": started})
    assert folder.send()
    assert len(_runs(folder)) == 2, "not the method whose turn to be set aside has not come"
    assert "report.html" not in _artifacts(folder, "", method=False)


def test_the_default_is_sqlite_beside_the_project(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri, log = tracking_uri(folder.root), Log()
    write_json(folder.train / "settings.json", {"seed": 1, "long": "x" * 7000})
    folder.step(1, **{"train/loss": float("nan")})
    folder.step(2, **{"train/loss": float("inf"), "what#is?this": 1.0})
    folder.step(3)
    assert folder.send(log)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    training = _run(folder, method=False)
    assert training.data.params == {"seed": "1", "long": "see settings.json"}
    assert (folder.root / "mlartifacts").is_dir()
    assert [step for step, _ in _history(folder)] == [1, 2, 3]
    (line,) = log
    assert "refused" in line
    assert "what#is?this" in line
    assert "HTTP 400" in line


def test_switched_off_it_does_nothing(folder: Folder) -> None:
    log = Log()
    off = TrackingSettings(enabled=False)
    with Sender(folder.root, folder.run, off, log) as sender:
        sender.wake()
    assert send(folder.root, folder.run, off, log)
    assert log == []
    assert not (folder.run / "tracking").exists()


# --- outages ----------------------------------------------------------------------------------------------------------


def test_an_outage_in_the_middle_costs_nothing(server: Server, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    log = Log()
    with folder.sender(log) as sender:
        for step in range(20):
            folder.step(step)
            sender.wake()
        folder.preview(10)
        server.stop()
        folder.step(20)
        sender.wake()
        log.wait("cannot be reached")
        for step in range(21, 40):
            folder.step(step)
        folder.preview(30)
        server.start()
        log.wait("answers again")
        folder.status("FINISHED", 5000)
    assert sum("cannot be reached" in line for line in log) == 1, "the outage is told once"
    assert [step for step, _ in _history(folder)] == list(range(40))
    assert len(_artifacts(folder, "images")) == 4, "two pictures, each with its small copy, none twice"
    assert _run(folder).info.status == "FINISHED"


def test_what_never_arrived_is_sent_by_the_next_stage_and_no_password_is_shown(
    server: Server, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://mia:hunter2@127.0.0.1:{unused.getsockname()[1]}")
        log = Log()
        folder.step(1)
        with folder.sender(log) as sender:
            sender.wake()
            log.wait("cannot be reached")
        assert not folder.send(log)
        assert run_id(folder.root, folder.run, TRAINING, SETTINGS) is None
    assert any("dopsd track sync" in line for line in log)
    kept = "".join(path.read_text() for path in folder.run.rglob("*") if path.is_file())
    assert "hunter2" not in "".join(log) + kept
    assert "mia" not in "".join(log)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    assert folder.send(log)
    assert _history(folder) == [(1, 0.5)]


@pytest.mark.parametrize("kind", ["log-batch", "mlflow-artifacts"])
def test_a_server_that_fails_within_is_away_and_what_it_took_is_not_doubled(
    proxy: Proxy, folder: Folder, kind: str
) -> None:
    """500 for the third request of a kind, and the one after it: once before it reached the server."""
    seen = Counter[str]()

    def fault(method: str, path: str, body: bytes) -> int | None:
        if kind not in path or method == "GET":
            return None
        seen[kind] += 1
        return 500 if seen[kind] in (3, 4) else None

    log = Log()
    for step in range(1500):
        folder.step(step)
    folder.preview(1), folder.preview(2)
    proxy.fault = fault
    assert not folder.send(log)
    (line,) = (line for line in log if "cannot be reached" in line)
    assert "500" in line
    assert not folder.send(log)
    assert folder.send(log)
    assert [step for step, _ in _history(folder)] == list(range(1500))
    assert len(_artifacts(folder, "images")) == 4


def test_a_server_that_never_answers_holds_nobody_up(
    proxy: Proxy, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    proxy.fault = lambda method, path, body: 0
    log = Log()
    with folder.sender(log) as sender:
        for step in range(100):
            folder.step(step)
            sender.wake()
        log.wait("cannot be reached")
    assert any("dopsd track sync" in line for line in log)
    proxy.fault = lambda method, path, body: None
    assert folder.send(log)
    assert [step for step, _ in _history(folder)] == list(range(100))


@pytest.fixture
def small_disk(server: Server) -> Iterator[Path]:
    """A disk of 64 KiB under the server's artifacts."""
    place = server.folder / "a"
    place.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk takes root")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_artifact_store_loses_nothing(small_disk: Path, proxy: Proxy, folder: Folder, tmp_path: Path) -> None:
    log = Log()
    path = folder.preview(1, side=256)  # noise compresses to no less: 576 KiB
    folder.step(2)
    assert not folder.send(log)
    assert any("cannot be reached" in line for line in log)
    assert _history(folder) == [(2, 1 / 3)], "what goes is sent"
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    assert folder.send(log)
    full, small = sorted(_artifacts(folder, "images"), key=lambda name: "compressed" in name)
    (tmp_path / "full").write_bytes(_read(folder, full, tmp_path))
    with Image.open(tmp_path / "full") as image, Image.open(path) as drawn:
        assert np.array_equal(np.asarray(image), np.asarray(drawn)), "whole, not what had room"
    assert "compressed" in small


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [False, True])
def test_what_is_refused_is_named_once_and_the_rest_goes_through(proxy: Proxy, folder: Folder, as_json: bool) -> None:
    """A report that is too large for a proxy, a number at one step, a parameter, a tag; in plain text, or in JSON of
    the proxy's own that MLflow knows no code of."""
    proxy.json_answers = as_json
    refused = {rb'"step": ?7\b': 400, b"train.seed": 403, b"git.commit": 404, b"large": 413}
    names = {400: "metric train/loss", 403: "param train.seed", 404: "tag mlflow.source.git.commit",
             413: "file report.html"}  # fmt: skip

    def fault(method: str, path: str, body: bytes) -> int | None:
        return next((status for words, status in refused.items() if method != "GET" and re.search(words, body)), None)

    proxy.fault = fault
    log = Log()
    for step in range(10):
        folder.step(step)
    folder.write("report.html", "large")
    folder.write("export/README.md", "card")
    folder.write("export/comfyui_lora.safetensors", "the registered version has it")
    with folder.sender(log) as sender:
        log.wait("report.html")
        folder.step(10)
        sender.wake()
        folder.status("FINISHED", 5000)
    assert len(log) == 4, "named once, though the end of the training tried again"
    for status, name in names.items():
        (line,) = (line for line in log if f"HTTP {status}" in line)
        assert name in line
        assert "refused" in line
    assert ["too large" in line for line in log].count(True) == 1
    assert [step for step, _ in _history(folder)] == [step for step in range(11) if step != 7]
    training = _run(folder, method=False)
    assert training.data.params == {"train.steps": "5"}
    assert training.data.tags["dopsd.data.hash"] == "f" * 64
    assert set(_artifacts(folder, "", method=False)) == {"export", "sent.json", "settings.json"}
    assert _run(folder).info.status == "FINISHED"
    proxy.fault = lambda method, path, body: None
    assert folder.send(log)
    assert "report.html" in _artifacts(folder, "", method=False), "the next stage tries again"


@pytest.mark.parametrize("as_json", [False, True])
def test_a_login_that_is_needed_is_a_line_of_its_own(proxy: Proxy, folder: Folder, as_json: bool) -> None:
    proxy.json_answers = as_json
    proxy.fault = lambda method, path, body: 401
    log = Log()
    with folder.sender(log) as sender:
        log.wait("login needed")
        folder.step(1)
        sender.wake()
    login = [line for line in log if "login needed" in line]
    assert len(login) == 1
    assert "MLFLOW_TRACKING_USERNAME" in login[0]
    assert "MLFLOW_TRACKING_PASSWORD" in login[0]
    assert not [line for line in log if "cannot be reached" in line or "refused" in line]
    proxy.fault = lambda method, path, body: None
    assert folder.send(log)
    assert _history(folder) == [(1, 0.5)]


def test_who_may_do_nothing_there_is_told_so_and_no_more(proxy: Proxy, folder: Folder) -> None:
    proxy.fault = lambda method, path, body: 403
    log = Log()
    with folder.sender(log) as sender:
        log.wait("HTTP 403")
        folder.step(1)
        sender.wake()
    assert sum("HTTP 403" in line for line in log) == 1, log
    proxy.fault = lambda method, path, body: None
    assert folder.send(log)
    assert _history(folder) == [(1, 0.5)]


def test_a_run_that_somebody_deleted_is_made_again(proxy: Proxy, folder: Folder) -> None:
    folder.step(1)
    assert folder.send()
    client = _client()
    for run in _runs(folder):
        client.delete_run(run.info.run_id)
    folder.step(2)
    assert folder.send()
    assert [step for step, _ in _history(folder)] == [1, 2]


# --- broken files, other processes ------------------------------------------------------------------------------------


def test_broken_files_are_named_and_the_rest_is_sent(proxy: Proxy, folder: Folder) -> None:
    folder.step(1)
    with (folder.method / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "trai')
    append_line(folder.method / "log.jsonl", json.dumps({"step": 3, "time": 2000, "train/loss": 0.25}))
    with (folder.method / "log.jsonl").open("a") as file:
        file.write('{"step": 4')
    empty = [folder.run / "about.json", folder.train / "settings.json", folder.method / "run.json"]
    empty += [folder.write(name, "") for name in ("evaluation/metrics.json", "exported.json")]
    for path in empty:
        path.write_text("")
    folder.preview(1).write_bytes(b"half")
    folder.preview(2)
    log = Log()
    assert folder.send(log)
    assert _history(folder) == [(1, 0.5), (3, 0.25)]
    assert len(_artifacts(folder, "images")) == 2
    assert all(len(line.splitlines()) == 1 for line in log)
    for path in [*empty[:3], "log.jsonl: line 2", "log.jsonl: line 4", "student-000001.webp"]:
        assert sum(str(path) in line for line in log) == 1, (path, log)
    (folder.train / "training.json").write_text("[]")
    assert folder.send(log)
    assert "training.json" in log[-1]


def test_a_lost_id_makes_new_runs_and_no_harm(proxy: Proxy, folder: Folder) -> None:
    path = folder.run / "tracking" / "id"
    for number, content in enumerate((None, "", "nonsense")):
        if content is not None:
            path.write_text(content)
        assert folder.send()
        assert folder.send()
        assert len(_runs(folder)) == 2 * (number + 1)
    path.unlink()
    assert folder.send()
    assert len(path.read_text()) == 32


def test_a_sync_during_a_training_leaves_it_to_the_training(proxy: Proxy, folder: Folder) -> None:
    """A process of its own, as the command is; afterwards nothing is lost and nothing is there twice."""
    log, held = Log(), threading.Event()
    inside = threading.Event()

    def fault(method: str, path: str, body: bytes) -> int | None:
        if "log-batch" in path and b"train/loss" in body:
            inside.set()
            held.wait()
        return None

    proxy.fault = fault
    folder.step(1)
    command = [
        sys.executable, "-c",
        "import sys, pathlib; from dopsd.config import TrackingSettings; from dopsd.tracking import send\n"
        "root, run = map(pathlib.Path, sys.argv[1:])\n"
        "sys.exit(0 if send(root, run, TrackingSettings(experiment='test')) else 1)",
        str(folder.root), str(folder.run),
    ]  # fmt: skip
    with folder.sender(log) as sender:
        assert inside.wait(120), "it is sending"
        folder.step(2)
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
        held.set()
        folder.step(3)
        sender.wake()
    assert done.returncode == 1
    assert "another process is sending" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert [step for step, _ in _history(folder)] == [1, 2, 3]
    assert len(_runs(folder)) == 2


def test_a_training_that_finds_another_sending_says_so_and_ends(proxy: Proxy, folder: Folder) -> None:
    log = Log()
    (folder.run / "tracking").mkdir()
    with FileLock(folder.run / "tracking" / "lock"), folder.sender(log) as sender:
        folder.step(1)
        sender.wake()
        log.wait("another process is sending")
    assert proxy.writes == []
    assert folder.send()
    assert _history(folder) == [(1, 0.5)]


def test_a_log_that_was_cut_back_is_neither_doubled_nor_broken(proxy: Proxy, folder: Folder) -> None:
    """As after a kill: rows beyond the checkpoint are made again, in a file that took the place of the first."""
    log = Log()
    for step in range(1, 6):
        folder.step(step)
    assert folder.send(log)
    with folder.sender(log) as sender:
        kept = (folder.method / "log.jsonl").read_text().splitlines(keepends=True)[:3]
        (folder.method / "log.new").write_text("".join(kept))
        (folder.method / "log.new").replace(folder.method / "log.jsonl")
        for step in range(4, 9):
            folder.step(step)
            sender.wake()
    assert [step for step, _ in _history(folder)] == list(range(1, 9))
    assert log == []


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://mia:s3cret@host:5000/x?token=abc", "http://host:5000/x"),
        ("postgresql://mia:s3cret@db/mlflow", "postgresql://db/mlflow"),
        ("sqlite:////home/mia/mlflow.db", "sqlite:////home/mia/mlflow.db"),
    ],
)
def test_addresses_are_shown_without_secrets(uri: str, shown: str) -> None:
    assert public_uri(uri) == shown
    text = without_secrets(f"cannot open {uri}: wrong password {'s3cret' if '@' in uri else ''}", uri)
    assert "s3cret" not in text
    assert text.startswith("cannot open ")


def test_helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert flatten({"a": {"b": 1, "c": {"d": (2, 3)}}}) == {"a.b": 1, "a.c.d": (2, 3)}
    monkeypatch.delenv("DOPSD_COMMIT", raising=False)
    assert git_tags(tmp_path) == {}
    monkeypatch.setenv("DOPSD_COMMIT", "abc")
    assert git_tags(tmp_path) == {"mlflow.source.git.commit": "abc"}, "an image has no repository"
