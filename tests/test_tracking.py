"""Tracking against a real MLflow server that goes away in the middle and comes back."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from dopsd.config import TrackingSettings
from dopsd.tracking import Tracker, flatten, git_tags, picture_row, public_uri, sync, tracking_uri, without_secrets
from dopsd.tracking.spool import Spool

SETTINGS = TrackingSettings(experiment="test")


class Server:
    """An MLflow server of its own on 127.0.0.1, in its own process group."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--artifacts-destination", f"{self.folder}/a",
        ]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, cwd=self.folder,
                env={**environment, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )  # fmt: skip
        tick = threading.Event()
        for _ in range(1800):  # a crowded machine takes minutes
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                tick.wait(0.1)
        pytest.fail(f"the server did not start: {(self.folder / 'server.log').read_text()[-2000:]}")

    def stop(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()


class Told(list[str]):
    """What the user was told; :meth:`wait` returns when a line with ``word`` has been said."""

    def __init__(self) -> None:
        super().__init__()
        self._news = threading.Condition()

    def __call__(self, text: str) -> None:
        with self._news:
            self.append(text)
            self._news.notify_all()

    def wait(self, word: str) -> None:
        with self._news:
            assert self._news.wait_for(lambda: any(word in line for line in self), 180), list(self)


def _history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in MlflowClient(tracking_uri=uri).get_metric_history(run_id, key)]


def _runs(uri: str) -> dict:
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("test")
    assert experiment is not None
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def test_an_outage_in_the_middle_costs_nothing(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    told = Told()
    picture = Image.new("RGB", (64, 64), "red")
    with Tracker(tmp_path, tmp_path / "t", "fox", "abc", "d-opsd", SETTINGS, tell=told) as tracker:
        for step in range(20):
            tracker.metrics(step, {"train/loss": 1 / (step + 1)})
        tracker.images(10, "preview/student", [picture] * 3, ["a", "b", "c"])
        server.stop()
        tracker.metrics(20, {"train/loss": 0.5})
        told.wait("cannot be reached")
        for step in range(21, 40):
            tracker.metrics(step, {"train/loss": 1 / (step + 1)})
        tracker.images(30, "preview/student", [picture] * 3, ["a", "b", "c"])
        server.start()
        told.wait("answers again")
    assert sum("cannot be reached" in line for line in told) == 1, "the outage is told once"
    run = _runs(server.uri)["fox d-opsd"]
    client = MlflowClient(tracking_uri=server.uri)
    assert [step for step, _ in _history(server.uri, run.info.run_id, "train/loss")] == list(range(40))
    names = [item.path for item in client.list_artifacts(run.info.run_id, "images")]
    assert len(names) == 4, "two pictures, each with its small copy, none twice"
    assert run.info.status == "FINISHED"
    assert _runs(server.uri)["fox"].info.run_id == run.data.tags["mlflow.parentRunId"]
    assert Spool(tmp_path / "t" / "spool").backlog() == 0
    assert not list((tmp_path / "t" / "spool" / "files").iterdir()), "kept files go once they were delivered"


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


def test_a_full_artifact_store_loses_nothing(
    server: Server, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    told = Told()
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)  # compresses to no less: 192 KiB
    with Tracker(tmp_path, tmp_path / "t", "hare", "abc", "d-opsd", SETTINGS, tell=told) as tracker:
        tracker.images(1, "preview/student", [Image.fromarray(noise)], ["a"])
        told.wait("cannot be reached")
        tracker.metrics(2, {"train/loss": 0.5})
        subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
        told.wait("answers again")
    client = MlflowClient(tracking_uri=server.uri)
    run = _runs(server.uri)["hare d-opsd"]
    assert _history(server.uri, run.info.run_id, "train/loss") == [(2, 0.5)]
    full, small = sorted(client.list_artifacts(run.info.run_id, "images"), key=lambda item: "compressed" in item.path)
    with Image.open(client.download_artifacts(run.info.run_id, full.path)) as image:
        shown = np.asarray(image)
    assert np.array_equal(shown, noise), "whole, not what had room"
    assert "compressed" in small.path


def test_what_never_arrived_is_sent_by_sync_and_no_password_is_shown(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://mia:hunter2@127.0.0.1:{unused.getsockname()[1]}")
        told = Told()
        file = tmp_path / "adapter.bin"
        file.write_bytes(b"as it was")
        with Tracker(tmp_path, tmp_path / "t", "owl", "abc", None, SETTINGS, tell=told) as tracker:
            tracker.metrics(1, {"loss": 2.0})
            tracker.artifact(file, "adapters")
        file.unlink()
        file.write_bytes(b"something newer")
        assert not sync(tmp_path, tmp_path / "t", SETTINGS, told)
    assert any("dopsd track sync" in line for line in told)
    kept = "".join(p.read_text() for p in (tmp_path / "t").rglob("*.jsonl"))
    assert "hunter2" not in "".join(told) + kept
    assert "mia" not in "".join(told)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    assert sync(tmp_path, tmp_path / "t", SETTINGS, told)
    assert sync(tmp_path, tmp_path / "t", SETTINGS, told), "nothing left, nothing sent again"
    run = _runs(server.uri)["owl"]
    assert _history(server.uri, run.info.run_id, "loss") == [(1, 2.0)]
    place = MlflowClient(tracking_uri=server.uri).download_artifacts(run.info.run_id, "adapters", str(tmp_path / "got"))
    assert (Path(place) / "adapter.bin").read_bytes() == b"as it was", "the file as it was when it was logged"


def test_the_default_is_sqlite_beside_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri, told = tracking_uri(tmp_path), Told()
    for values in ({"seed": 1, "train": {"steps": 5}}, {"seed": 1, "train": {"steps": 5}}):  # twice: a resumed training
        with Tracker(tmp_path, tmp_path / "t", "cat", "abc", None, SETTINGS, tell=told) as tracker:
            tracker.params({**values, "long": "x" * 7000})
            tracker.dataset("cat", "f" * 64, "data/concepts/cat", images=16)
            tracker.tags({"mlflow.source.git.commit": "0" * 40})
    assert told == []
    run = _runs(uri)["cat"]
    assert run.data.params == {"seed": "1", "train.steps": "5", "long": "see settings.json"}
    assert [item.dataset.digest for item in run.inputs.dataset_inputs] == ["f" * 36]
    assert run.data.tags["dopsd.data.hash"] == "f" * 64
    client = MlflowClient(tracking_uri=uri)
    place = client.download_artifacts(run.info.run_id, "settings.json", str(tmp_path))
    assert len(json.loads(Path(place).read_text())["long"]) == 7000
    assert (tmp_path / "mlartifacts").is_dir()

    # a record that the tracker refuses is set aside and told of, and does not hold up the next
    with Tracker(tmp_path, tmp_path / "t", "cat", "abc", None, SETTINGS, tell=told) as tracker:
        tracker.metrics(0, {"what#is?this": 1.0})
        tracker.params({"seed": 2})
        tracker.metrics(1, {"loss": float("nan")})
    assert sum("refused" in line for line in told) == 2
    assert len((tmp_path / "t" / "spool" / "rejected.jsonl").read_text().splitlines()) == 2
    assert len(_history(uri, run.info.run_id, "loss")) == 1


def test_a_failed_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(RuntimeError), Tracker(tmp_path, tmp_path / "t", "dog", "abc", None, SETTINGS):
        raise RuntimeError
    assert _runs(tracking_uri(tmp_path))["dog"].info.status == "FAILED"


def test_switched_off_it_only_passes_messages_on(tmp_path: Path) -> None:
    told = Told()
    with Tracker(tmp_path, tmp_path / "t", "x", "y", None, TrackingSettings(enabled=False), tell=told) as tracker:
        tracker.metrics(0, {"loss": 1.0})
        tracker.images(0, "k", [Image.new("RGB", (8, 8))], ["a"])
        tracker.artifact(tmp_path)
        tracker.message("hello")
    assert told == ["hello"]
    assert not (tmp_path / "t").exists()


def test_spool_survives_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.put({"n": 1})
    spool.put({"n": 2})
    (_, first), *_ = spool.pending()
    spool.acknowledge(first)
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"n": 3, "ha')
    again = Spool(tmp_path)
    again.put({"n": 4})
    assert [record["n"] for record, _ in again.pending()] == [2, 4]
    assert again.id == spool.id


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
    said = without_secrets(f"cannot open {uri}: wrong password {'s3cret' if '@' in uri else ''}", uri)
    assert "s3cret" not in said
    assert said.startswith("cannot open ")


def test_helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert flatten({"a": {"b": 1, "c": {"d": (2, 3)}}}) == {"a.b": 1, "a.c.d": (2, 3)}
    assert picture_row([Image.new("RGB", (64, 48))] * 2).size == (256, 96)
    assert git_tags(tmp_path) == {}
    monkeypatch.setenv("DOPSD_COMMIT", "abc")
    assert git_tags(tmp_path) == {"mlflow.source.git.commit": "abc"}, "an image has no repository"
