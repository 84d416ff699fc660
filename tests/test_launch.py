"""Training on a real Ray of our own: as in this process, through the death of a worker too."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
import ray
import torch
from moto.server import ThreadedMotoServer
from safetensors.torch import load_file

from dopsd.config import Settings, load_settings
from dopsd.config.groups import ComputeSettings
from dopsd.data.encoded import read_encoded
from dopsd.stages import STAGES
from dopsd.train.errors import LaunchError
from dopsd.train.job import Job
from dopsd.train.launch import bring_back, connect_ray, run_training
from dopsd.train.storage import JobStorage
from dopsd.train.trainer import TrainError
from tests import tiny
from tests.tiny_project import make_project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose concept is encoded."""
    root = make_project(tmp_path_factory.mktemp("project"), max_steps=12, checkpoint_steps=2, methods=["d-opsd"])
    for stage in ("validate", "encode"):
        STAGES[stage]("blots", _settings(root), root)
    return root


@pytest.fixture(scope="module", autouse=True)
def _ray(bucket: Bucket) -> Iterator[None]:
    """One Ray for all tests, which knows the bucket's keys; started by a thread that ends, as a flow's tasks are."""
    thread = threading.Thread(target=connect_ray, args=(ComputeSettings(),))
    thread.start()
    thread.join()
    yield
    ray.shutdown()


@dataclass
class Bucket:
    """A bucket of an S3 server on this machine."""

    client: Any
    address: str
    seen: set[str]

    def names(self) -> set[str]:
        return {found["Key"] for found in self.client.list_objects_v2(Bucket="jobs").get("Contents", [])}


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    keys = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "not-a-secret", "AWS_DEFAULT_REGION": "us-east-1"}
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in keys.items():
            environment.setenv(name, value)
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="jobs")
        yield Bucket(client, f"s3://jobs/dopsd?scheme=http&endpoint_override={host}:{port}", set())
        client.close()
    server.stop()


def _settings(root: Path, *overrides: str) -> Settings:
    return load_settings(root / "params.yaml", overrides).of("blots", root)


def _job(root: Path, name: str, *overrides: str) -> Job:
    settings = _settings(root, *overrides)
    encoded = read_encoded(root / "runs/blots/encoded")
    return Job(name, encoded, settings.train, settings.model, root, "made from")


class _Watcher(tiny.Recorder):
    """A recorder that does something the first time that it is told of a step."""

    def __init__(self, step: int = 0, act: Any = None) -> None:
        super().__init__()
        self._step, self._act = step, act

    def metrics(self, step: int, values: Any) -> None:
        super().metrics(step, values)
        if step == self._step and self._act is not None:
            act, self._act = self._act, None
            act()


def _train(job: Job, folder: Path, watcher: _Watcher | None = None, **compute: Any) -> Any:
    settings = ComputeSettings(**{"storage": str(folder / "storage"), **compute})
    return run_training(job, settings, job.root, folder / "train", folder / "adapters", watcher or _Watcher())


@pytest.fixture(scope="module")
def local(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where training in this process was, unbroken."""
    folder = tmp_path_factory.mktemp("local")
    _train(_job(project, "local"), folder, launcher="local")
    return folder


@pytest.fixture(scope="module")
def unbroken(local: Path) -> dict[str, torch.Tensor]:
    """What it came to."""
    return load_file(local / "adapters/d-opsd.safetensors")


def _rows(folder: Path) -> list[dict[str, float]]:
    """The log, without what a clock says."""
    clock = {"time", "train/seconds", "train/images_per_second"}
    lines = (folder / "train/d-opsd/log.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in clock} for line in lines]


def _assert_equal(folder: Path, local: Path) -> None:
    """Bit for bit, and shown alike."""
    mine, theirs = (load_file(place / "adapters/d-opsd.safetensors") for place in (folder, local))
    assert mine.keys() == theirs.keys()
    assert not [key for key in mine if not torch.equal(mine[key], theirs[key])], "bit for bit"
    assert _rows(folder) == _rows(local)
    pictures = [sorted((place / "train/d-opsd/previews").iterdir()) for place in (folder, local)]
    assert [path.name for path in pictures[0]] == [path.name for path in pictures[1]]
    assert [path.read_bytes() for path in pictures[0]] == [path.read_bytes() for path in pictures[1]]
    status = json.loads((folder / "train/d-opsd/run.json").read_text())
    assert status["status"] == "FINISHED"
    assert status["started"] <= status["ended"]
    system = (folder / "train/d-opsd/system.jsonl").read_text().splitlines()
    assert all("system/cpu_utilization_percentage" in json.loads(line) for line in system)
    assert system


def _workers() -> list[psutil.Process]:
    """Of this process's own Ray; other tests may run theirs beside it."""
    return [p for p in psutil.Process().children(recursive=True) if "ray::RayTrainWorker" in " ".join(p.cmdline())]


def test_a_killed_worker_resumes_and_ends_as_the_unbroken_run(
    project: Path, local: Path, bucket: Bucket, tmp_path: Path
) -> None:
    """Its checkpoints lie on S3."""
    killed = threading.Event()
    live: list[dict[str, float]] = []

    def kill() -> None:
        live.extend(_rows(tmp_path))
        for worker in _workers():
            worker.send_signal(signal.SIGKILL)
            killed.set()
        bucket.seen |= bucket.names()

    watcher = _Watcher(9, kill)
    done = _train(_job(project, "killed"), tmp_path, watcher, cpus_per_worker=1, storage=bucket.address)
    assert killed.is_set()
    assert live == _rows(local)[: len(live)], "the folder here is live"
    assert live[-1]["step"] == 9
    assert done["d-opsd"].steps == 12
    assert any("resuming at step" in message for message in watcher.messages), watcher.messages
    _assert_equal(tmp_path, local)
    seen = {name.partition("/run/")[2] for name in bucket.seen if "killed/run/" in name}
    assert {"d-opsd/log.jsonl", "d-opsd/run.json"} <= seen, "what is needed went there"
    assert not [name for name in seen if "previews" in name or "system" in name], "what is not, did not"
    checkpoints = {name.split("/")[2] for name in seen if name.endswith("/tensors.safetensors")}
    assert 1 <= len(checkpoints) <= 2, "the newest, and the one before while it was replaced"
    assert not [name for name in bucket.names() if "killed" in name], "what is finished needs no storage"


def test_what_an_earlier_run_left_here_is_gone_on_with_and_no_checkpoint_is_in_the_jobs_config(
    project: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was trained in this process up to a checkpoint; the nodes may not see this machine's disk."""

    class Stop(_Watcher):
        def metrics(self, step: int, values: Any) -> None:
            if step == 7:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _train(_job(project, "earlier"), tmp_path, Stop(), launcher="local")
    assert json.loads((tmp_path / "train/d-opsd/run.json").read_text())["status"] == "KILLED"
    sizes = []

    from ray.train.v2.api import data_parallel_trainer

    class Noting(data_parallel_trainer.DataParallelTrainer):
        def __init__(self, *args: Any, **how: Any) -> None:
            sizes.append(len(ray.cloudpickle.dumps({k: v for k, v in how["train_loop_config"].items() if k != "job"})))
            super().__init__(*args, **how)

    monkeypatch.setattr(data_parallel_trainer, "DataParallelTrainer", Noting)
    watcher = _Watcher()
    _train(_job(project, "earlier"), tmp_path, watcher, cpus_per_worker=1)
    assert any("resuming at step 6" in message for message in watcher.messages), watcher.messages
    assert watcher.steps == list(range(7, 13))
    _assert_equal(tmp_path, local)
    checkpoint = next((tmp_path / "train/d-opsd/checkpoints").glob("*/tensors.safetensors"))
    assert sizes[0] < 10_000 < checkpoint.stat().st_size
    assert not [path for path in (tmp_path / "storage").rglob("*") if path.is_file() and "earlier" in str(path)]

    again = _Watcher()
    _train(_job(project, "earlier"), tmp_path, again, cpus_per_worker=1)
    assert again.steps == [], "what is finished is not done again"
    handed, began = again.messages
    assert "handed to Ray; a worker asks for 1 CPU" in handed
    assert "loading the base" in began
    _assert_equal(tmp_path, local)


def test_a_run_of_other_settings_is_set_aside_on_this_side_too(project: Path, tmp_path: Path) -> None:
    _train(_job(project, "one", "train.max_steps=2"), tmp_path, cpus_per_worker=1)
    old = (tmp_path / "train/d-opsd/log.jsonl").read_text()
    job = _job(project, "other", "train.max_steps=1", "train.learning_rate=1e-3")
    _train(job, tmp_path, cpus_per_worker=1)
    assert [row["step"] for row in _rows(tmp_path)] == [0, 1]
    assert (tmp_path / "train/d-opsd.previous-1/log.jsonl").read_text() == old
    names = {path.name for path in (tmp_path / "train/d-opsd/previews").glob("student-*")}
    assert names == {"student-000000.webp", "student-000001.webp"}


@pytest.mark.parametrize("launcher", ["ray", "local"])
@pytest.mark.parametrize("override", ["train.max_steps=8", "train.learning_rate=1e-3"])
def test_what_a_killed_job_of_other_settings_left_in_its_storage_is_not_lost(
    project: Path, tmp_path: Path, launcher: str, override: str
) -> None:
    """It has another name: nobody would look there. More steps go on from it; else it is set aside whole."""

    def stop() -> None:
        raise KeyboardInterrupt

    def job(name: str, *overrides: str) -> Job:
        return replace(_job(project, name, *overrides), parts={"data": "x"})

    with pytest.raises(KeyboardInterrupt):
        _train(job("killed", "train.max_steps=6"), tmp_path, _Watcher(5, stop), launcher="local")
    run = tmp_path / "train/d-opsd"
    JobStorage(str(tmp_path / "storage"), "killed").save(run.parent, ["d-opsd"])
    shutil.rmtree(run / "checkpoints")  # on this side there are log and pictures alone
    rows = (run / "log.jsonl").read_text()
    watcher, compute = _Watcher(), ComputeSettings(launcher=launcher, storage=str(tmp_path / "storage"))
    bring_back("killed", compute, project, run.parent)
    _train(job("other", override), tmp_path, watcher, launcher=launcher, cpus_per_worker=1)
    assert not [path for path in (tmp_path / "storage").rglob("*") if path.is_file() and "killed" in str(path)]
    if "max_steps" in override:
        assert watcher.steps == [5, 6, 7, 8]
        assert [row["step"] for row in _rows(tmp_path)] == list(range(9))
    else:
        assert watcher.steps == list(range(13))
        aside = tmp_path / "train/d-opsd.previous-1"
        assert (aside / "checkpoints/step-00000004/tensors.safetensors").exists()
        assert (aside / "log.jsonl").read_text() == rows, "and not the one of its checkpoint"
        assert any("learning_rate 0.01 -> 0.001, max_steps 6 -> 12 since" in text for text in watcher.messages)


def test_what_cannot_be_fetched_now_is_fetched_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage tells itself by a file which job was before: it may not forget it while that job is not here."""
    root = make_project(tmp_path / "project", methods=["d-opsd"], max_steps=2)
    for stage in ("validate", "encode", "train"):
        STAGES[stage]("blots", load_settings(root / "params.yaml", ["tracking.enabled=false"]), root)
    runs = root / "runs/blots/train"
    name = json.loads((runs / "training.json").read_text())["training"]
    JobStorage(str(root / ".cache/ray"), f"blots-{name}").save(runs, ["d-opsd"])
    shutil.rmtree(runs / "d-opsd/checkpoints")
    changed = load_settings(root / "params.yaml", ["tracking.enabled=false", "train.learning_rate=1e-3"])

    def away(*_: Any) -> None:
        raise OSError("nobody answers")

    with monkeypatch.context() as broken:
        broken.setattr(JobStorage, "load", away)
        with pytest.raises(LaunchError, match="cannot read the storage"):
            STAGES["train"]("blots", changed, root)
    STAGES["train"]("blots", changed, root)
    assert (runs / "d-opsd.previous-1/checkpoints/step-00000002/state.json").exists()


def test_jobs_that_do_not_fit_side_by_side_queue(
    project: Path, unbroken: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """One asks for the whole machine, with two workers that learn what one does; the other diverges at once, which is
    no reason to try again."""
    share = max(1, (os.cpu_count() or 2) // 2)
    together: list[int] = []
    whole = _Watcher(6, lambda: together.append(len(_workers())))
    diverging = _Watcher(0, lambda: together.append(len(_workers())))
    job = _job(project, "diverged", "train.learning_rate=1e30", "train.clip_norm=1e30")
    with ThreadPoolExecutor(2) as pool:
        two = pool.submit(_train, _job(project, "two"), tmp_path / "a", whole, workers=2, cpus_per_worker=share)
        failed = pool.submit(_train, job, tmp_path / "b", diverging, cpus_per_worker=share)
        two.result()
        with pytest.raises(TrainError, match="not finite"):
            failed.result()
    assert sorted(together) == [1, 2], "workers of one job at a time"
    assert sum("LoRA rank" in message for message in diverging.messages) == 1, "it was not tried again"
    mine = load_file(tmp_path / "a/adapters/d-opsd.safetensors")
    for key, value in unbroken.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-2, atol=2e-3)
