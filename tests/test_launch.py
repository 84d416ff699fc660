"""Training on a real Ray of our own: as in this process, through the death of a worker too."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
import ray
import torch
from moto.server import ThreadedMotoServer
from safetensors.torch import load_file

from dopsd.config import ComputeSettings, Settings, load_settings
from dopsd.data.encoded import read_encoded
from dopsd.stages import STAGES
from dopsd.train.job import Job
from dopsd.train.launch import connect_ray, launch
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


def _launch(job: Job, folder: Path, watcher: _Watcher | None = None, **compute: Any) -> Any:
    @contextmanager
    def observe(_method: Any) -> Iterator[Any]:
        yield watcher or _Watcher()

    settings = ComputeSettings(**{"storage": str(folder / "storage"), **compute})
    return launch(job, settings, job.root, folder / "train", folder / "adapters", observe)


@pytest.fixture(scope="module")
def unbroken(project: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What training in this process comes to."""
    folder = tmp_path_factory.mktemp("local")
    _launch(_job(project, "local"), folder, launcher="local")
    return load_file(folder / "adapters/d-opsd.safetensors")


def _workers() -> list[psutil.Process]:
    """Of this process's own Ray; other tests may run theirs beside it."""
    return [p for p in psutil.Process().children(recursive=True) if "ray::RayTrainWorker" in " ".join(p.cmdline())]


def test_a_killed_worker_resumes_and_ends_as_the_unbroken_run(
    project: Path, unbroken: dict[str, torch.Tensor], bucket: Bucket, tmp_path: Path
) -> None:
    """Its checkpoints lie on S3."""
    killed = threading.Event()

    def kill() -> None:
        for worker in _workers():
            worker.send_signal(signal.SIGKILL)
            killed.set()
        bucket.seen |= bucket.names()

    watcher = _Watcher(9, kill)
    done = _launch(_job(project, "killed"), tmp_path, watcher, cpus_per_worker=1, storage=bucket.address)
    assert killed.is_set()
    assert done["d-opsd"].steps == 12
    assert any("resuming at step" in message for message in watcher.messages), watcher.messages
    mine = load_file(tmp_path / "adapters/d-opsd.safetensors")
    assert mine.keys() == unbroken.keys()
    assert not [key for key in mine if not torch.equal(mine[key], unbroken[key])], "bit for bit"
    assert (tmp_path / "train/d-opsd/log.jsonl").read_text().count("\n") == 12
    assert any(name.endswith("log.jsonl") for name in bucket.seen), "the checkpoints went there"
    assert not [name for name in bucket.names() if "killed" in name], "what is finished needs no storage"


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
        two = pool.submit(_launch, _job(project, "two"), tmp_path / "a", whole, workers=2, cpus_per_worker=share)
        failed = pool.submit(_launch, job, tmp_path / "b", diverging, cpus_per_worker=share)
        two.result()
        with pytest.raises(TrainError, match="not finite"):
            failed.result()
    assert sorted(together) == [1, 2], "workers of one job at a time"
    assert sum("LoRA rank" in message for message in diverging.messages) == 1, "it was not tried again"
    mine = load_file(tmp_path / "a/adapters/d-opsd.safetensors")
    for key, value in unbroken.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-2, atol=2e-3)
