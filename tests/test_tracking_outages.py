"""The tracker where a real MLflow server goes away, refuses, breaks and goes silent."""

from __future__ import annotations

import re
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dopsd.tracking import run_id
from tests import tracked
from tests.mlflow_server import Proxy, Server
from tests.tracked import SETTINGS, TRAINING, Folder, Log, artifacts_of, history_of, read_from, run_of, runs_of, tracker

server = pytest.fixture(tracked.server, scope="module")
proxy = pytest.fixture(tracked.proxy)
folder = pytest.fixture(tracked.folder)
in_haste = pytest.fixture(tracked.in_haste, autouse=True)


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
    assert [step for step, _ in history_of(folder)] == list(range(40))
    assert len(artifacts_of(folder, "images")) == 4, "two pictures, each with its small copy, none twice"
    assert run_of(folder).info.status == "FINISHED"


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
    assert history_of(folder) == [(1, 0.5)]


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
    assert [step for step, _ in history_of(folder)] == list(range(1500))
    assert len(artifacts_of(folder, "images")) == 4


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
    assert [step for step, _ in history_of(folder)] == list(range(100))


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
    assert history_of(folder) == [(2, 1 / 3)], "what goes is sent"
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    assert folder.send(log)
    full, small = sorted(artifacts_of(folder, "images"), key=lambda name: "compressed" in name)
    (tmp_path / "full").write_bytes(read_from(folder, full, tmp_path))
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
    assert [step for step, _ in history_of(folder)] == [step for step in range(11) if step != 7]
    training = run_of(folder, method=False)
    assert training.data.params == {"train.steps": "5"}
    assert training.data.tags["dopsd.data.hash"] == "f" * 64
    assert set(artifacts_of(folder, "", method=False)) == {"export", "sent.json", "settings.json"}
    assert run_of(folder).info.status == "FINISHED"
    proxy.fault = lambda method, path, body: None
    assert folder.send(log)
    assert "report.html" in artifacts_of(folder, "", method=False), "the next stage tries again"


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
    assert history_of(folder) == [(1, 0.5)]


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
    assert history_of(folder) == [(1, 0.5)]


def test_a_run_that_somebody_deleted_is_made_again(proxy: Proxy, folder: Folder) -> None:
    folder.step(1)
    assert folder.send()
    client = tracker()
    for run in runs_of(folder):
        client.delete_run(run.info.run_id)
    folder.step(2)
    assert folder.send()
    assert [step for step, _ in history_of(folder)] == [1, 2]
