"""The tracker as a copy of the run folder, on a real MLflow server: what is shown, sent again, or left to another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from dopsd.config.groups import TrackingSettings
from dopsd.files import append_line, write_json
from dopsd.tracking import Sender, run_id, send, tracking_uri
from tests import tracked
from tests.mlflow_server import Proxy, Server
from tests.tracked import (
    SETTINGS,
    TRAINING,
    Folder,
    Log,
    artifacts_of,
    history_of,
    read_from,
    run_of,
    runs_of,
    tracker,
)

server = pytest.fixture(tracked.server, scope="module")
proxy = pytest.fixture(tracked.proxy)
folder = pytest.fixture(tracked.folder)
in_haste = pytest.fixture(tracked.in_haste, autouse=True)


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_all_of_a_folder_is_shown_and_a_second_send_sends_nothing(proxy: Proxy, folder: Folder, tmp_path: Path) -> None:
    for step in range(5):
        folder.step(step)
    append_line(folder.method / "system.jsonl", json.dumps({"time": 5, "system/cpu": 1.0}))
    append_line(folder.method / "system.jsonl", json.dumps({"time": 6, "system/cpu": 2.0}))
    folder.preview(0, suffix=".png"), folder.preview(4)  # as they once were, and as they are
    folder.write("train/d-opsd/adapters/d-opsd.safetensors", "adapter")
    folder.write("train/d-opsd/adapters/d-opsd.json", "{}")
    folder.write("evaluation/metrics.json", json.dumps({
        "scores": {"d-opsd": {"style": 0.5, "target@efficientnet-lite0": 1.0}},
        "headline": {"d-opsd": {"kept": 0.5, "copied": float("nan"), "why": "text"}, "teacher": {"kept": 0.25}},
    }))  # fmt: skip
    scores = {"learnt": {"first": [0.5, 0.25], "second": [9]}, "kept": {"first": [1]}}
    folder.write("evaluation/paired.json", json.dumps({"models": {"base": {}, "d-opsd": scores}}))
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
    assert history_of(folder) == [(step, 1 / (step + 1)) for step in range(5)]
    assert history_of(folder, "system/cpu") == [(0, 1.0), (1, 2.0)]
    run, training = run_of(folder), run_of(folder, method=False)
    assert (run.info.run_name, training.info.run_name) == (f"{folder.run.name} d-opsd", folder.run.name)
    assert run.data.tags["mlflow.parentRunId"] == training.info.run_id
    assert (run.info.status, run.info.start_time, run.info.end_time) == ("FINISHED", 1000, 9000)
    assert (training.info.status, training.info.end_time) == ("FINISHED", 9000)
    assert training.data.params == {"train.seed": "1", "train.steps": "5"}
    assert training.data.tags["dopsd.data.hash"] == "f" * 64
    assert run.data.tags["mlflow.source.git.commit"] == "0" * 40
    (dataset,) = training.inputs.dataset_inputs
    assert (dataset.dataset.digest, json.loads(dataset.dataset.profile)) == ("f" * 36, {"images": 16})
    assert training.data.metrics == {"export/difference": 0.25}, "what stands above the scores where runs are compared"
    evaluated = {k: v for k, v in run.data.metrics.items() if k.startswith(("score/", "tuned/"))}
    assert np.isnan(evaluated.pop("tuned/copied"))
    assert evaluated == {"score/learnt": 0.375, "score/kept": 1.0, "tuned/kept": 0.5}
    images = artifacts_of(folder, "images")
    assert len(images) == 4, "two pictures, each with its small copy"
    assert sum("preview~student+step+4+timestamp+" in name for name in images) == 2
    assert read_from(folder, "preview/student.captions.txt", tmp_path) == b"a\nb\nc\n"
    assert artifacts_of(folder, "adapters") == ["adapters/d-opsd.safetensors"]
    assert set(artifacts_of(folder, "", method=False)) == {
        "evaluation", "export", "report.html", "sent.json", "settings.json"
    }  # fmt: skip
    assert read_from(folder, "evaluation/grids/few_step.png", tmp_path, method=False) == b"grid"
    assert artifacts_of(folder, "export", method=False) == ["export/README.md"]
    assert run_id(folder.root, folder.run, TRAINING, SETTINGS) == training.info.run_id

    proxy.writes.clear()
    assert folder.send(log)
    assert proxy.writes == []
    folder.preview(5)
    folder.step(5)
    assert folder.send(log)
    assert Counter(line.split("?")[0].rpartition("/")[2].rpartition("+")[2] for line in proxy.writes)["log-batch"] == 1
    assert len(artifacts_of(folder, "images")) == 6
    assert [step for step, _ in history_of(folder)] == list(range(6))


def test_an_experiment_is_said_to_be_of_training_unless_a_person_said_otherwise(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder.root}/mlflow.db")
    client, kind = tracker(), "mlflow.experimentKind"
    assert folder.send()
    made = client.get_experiment_by_name("test") or pytest.fail("no experiment")
    assert made.tags[kind] == "custom_model_development"
    of_before = client.create_experiment("of-before")
    Sender(folder.root, folder.run, TrackingSettings(experiment="of-before")).send()
    assert client.get_experiment(of_before).tags[kind] == "custom_model_development"
    client.set_experiment_tag(of_before, kind, "finetuning")
    Sender(folder.root, folder.run, TrackingSettings(experiment="of-before")).send()
    assert client.get_experiment(of_before).tags[kind] == "finetuning"


@pytest.mark.parametrize("suffix", [".webp", ".png"])
def test_what_changed_is_sent_again_and_nothing_else(proxy: Proxy, folder: Folder, tmp_path: Path, suffix: str) -> None:
    report = folder.write("report.html", "one")
    picture = folder.preview(3, suffix=suffix)
    folder.write("exported.json", '{"difference": 0.5, "same": 1}')
    assert folder.send()
    before = report.stat()
    report.write_text("two")
    os.utime(report, ns=(before.st_atime_ns, before.st_mtime_ns))
    folder.preview(3, seed=1, suffix=suffix)
    folder.write("exported.json", '{"difference": 0.75, "same": 1}')
    proxy.writes.clear()
    assert folder.send()
    assert read_from(folder, "report.html", tmp_path, method=False) == b"two", (
        "the same size, the same time, other bytes"
    )
    (shown, _) = sorted(artifacts_of(folder, "images"), key=lambda name: "compressed" in name)
    assert shown.endswith(suffix), "MLflow's page asks for the type by the name"
    (tmp_path / "shown").write_bytes(read_from(folder, shown, tmp_path))
    with Image.open(tmp_path / "shown") as image, Image.open(picture) as drawn:
        small = image.resize(drawn.size, Image.Resampling.NEAREST)
        assert image.width == 2 * drawn.width, "small ones are enlarged"
        assert np.array_equal(np.asarray(small), np.asarray(drawn)), "in the place of the first"
    assert run_of(folder, method=False).data.metrics["export/difference"] == 0.75
    batches = [line for line in proxy.writes if "log-batch" in line]
    uploads = [line for line in proxy.writes if line.startswith("PUT")]
    assert (len(batches), len(uploads)) == (1, 5), uploads  # report, sent.json; picture, small, sent.json


def test_a_deleted_artifact_is_sent_again_and_a_broken_note_does_no_harm(
    server: Server, proxy: Proxy, folder: Folder
) -> None:
    folder.write("report.html", "one")
    folder.write("export/README.md", "card")
    folder.write("export/comfyui_lora.safetensors", "the registered version has it")
    assert folder.send()
    (kept,) = server.folder.glob(f"a/*/{run_of(folder, method=False).info.run_id}/artifacts")
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
    assert len(runs_of(folder)) == 2, "not the method whose turn to be set aside has not come"
    assert "report.html" not in artifacts_of(folder, "", method=False)


def test_the_default_is_sqlite_beside_the_project(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri, log = tracking_uri(folder.root), Log()
    write_json(folder.train / "settings.json", {"seed": 1, "long": "x" * 7000})
    folder.step(1, **{"train/loss": float("nan")})
    folder.step(2, **{"train/loss": float("inf"), "what#is?this": 1.0})
    folder.step(3)
    assert folder.send(log)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    training = run_of(folder, method=False)
    assert training.data.params == {"seed": "1", "long": "see settings.json"}
    assert (folder.root / "mlartifacts").is_dir()
    assert [step for step, _ in history_of(folder)] == [1, 2, 3]
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


# --- broken files, other processes ------------------------------------------------------------------------------------


def test_broken_files_are_named_and_the_rest_is_sent(proxy: Proxy, folder: Folder) -> None:
    folder.step(1)
    with (folder.method / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "trai')
    append_line(folder.method / "log.jsonl", json.dumps({"step": 3, "time": 2000, "train/loss": 0.25}))
    with (folder.method / "log.jsonl").open("a") as file:
        file.write('{"step": 4')
    empty = [folder.run / "about.json", folder.train / "settings.json", folder.method / "run.json"]
    empty += [folder.write(f"{name}.json", "") for name in ("evaluation/metrics", "evaluation/paired", "exported")]
    for path in empty:
        path.write_text("")
    folder.preview(1).write_bytes(b"half")
    folder.preview(2)
    log = Log()
    assert folder.send(log)
    assert history_of(folder) == [(1, 0.5), (3, 0.25)]
    assert len(artifacts_of(folder, "images")) == 2
    assert all(len(line.splitlines()) == 1 for line in log)
    for path in [*empty[:3], "log.jsonl: line 2", "log.jsonl: line 4", "student-000001.webp"]:
        assert sum(str(path) in line for line in log) == 1, (path, log)
    (folder.train / "training.json").write_text("[]")
    assert folder.send(log)
    assert "training.json" in log[-1]


@pytest.mark.parametrize("content", ['{"headline": [], "models": []}', '{"headline": {"d-opsd": 1}}',
                                     '{"models": {"d-opsd": {"kept": {}}}}', '{"models": {"d-opsd": {"kept": 1}}}',
                                     '{"models": {"d-opsd": {"kept": {"first": []}}}}'])  # fmt: skip
def test_scores_that_are_none_are_said_to_be_and_the_rest_is_sent(proxy: Proxy, folder: Folder, content: str) -> None:
    for name in ("metrics", "paired"):
        folder.write(f"evaluation/{name}.json", content)
    folder.step(1)
    log = Log()
    assert folder.send(log)
    assert [line.rpartition("/")[2] for line in log] == ["evaluation: its scores cannot be read; some are left out"]
    assert history_of(folder) == [(1, 0.5)]


def test_a_lost_id_makes_new_runs_and_no_harm(proxy: Proxy, folder: Folder) -> None:
    path = folder.run / "tracking" / "id"
    for number, content in enumerate((None, "", "nonsense")):
        if content is not None:
            path.write_text(content)
        assert folder.send()
        assert folder.send()
        assert len(runs_of(folder)) == 2 * (number + 1)
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
    assert [step for step, _ in history_of(folder)] == [1, 2, 3]
    assert len(runs_of(folder)) == 2


def test_a_training_that_finds_another_sending_says_so_and_ends(proxy: Proxy, folder: Folder) -> None:
    log = Log()
    (folder.run / "tracking").mkdir()
    with FileLock(folder.run / "tracking" / "lock"), folder.sender(log) as sender:
        folder.step(1)
        sender.wake()
        log.wait("another process is sending")
    assert proxy.writes == []
    assert folder.send()
    assert history_of(folder) == [(1, 0.5)]


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
    assert [step for step, _ in history_of(folder)] == list(range(1, 9))
    assert log == []
