"""A job that may have one worker or two, on a real Ray cluster that gets a second node and loses it again."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from dopsd.config import load_settings
from dopsd.data.encoded import read_encoded
from dopsd.stages import STAGES
from dopsd.train import launch as launch_module
from dopsd.train.errors import LaunchError
from dopsd.train.job import Job
from dopsd.train.launch import run_training
from tests import tiny
from tests.stack import LIMIT
from tests.tiny_project import make_project

NODE = {"num_cpus": 1, "object_store_memory": 128 * 2**20}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """One node of one CPU, whose address is in the environment."""
    patience = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10"}  # for a node that is gone
    for name, value in (patience | launch_module._RAY_ENVIRONMENT | launch_module._OWN_RAY_ENVIRONMENT).items():
        monkeypatch.setenv(name, value)
    nodes = Cluster(initialize_head=True, head_node_args=NODE)
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


class _Crowd(tiny.Recorder):
    """Notes at every step how often training was resumed and how many workers there are; others may wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, int]] = set()
        self._news = threading.Condition()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        super().metrics(step, values)
        if "train/loss" in values:
            resumed = sum("resuming at step" in message for message in self.messages)
            with self._news:
                self.seen.add((resumed, len(_workers())))
                self._news.notify_all()

    def wait_for(self, resumed: int, workers: int) -> None:
        """Until a step is made after so many times, by so many."""
        with self._news:
            assert self._news.wait_for(lambda: (resumed, workers) in self.seen, timeout=LIMIT), self.seen


def _workers() -> list[psutil.Process]:
    """Of this process's nodes; other tests may run theirs beside them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "ray::RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_a_job_grows_when_a_node_comes_and_goes_on_when_it_dies(cluster: Cluster, tmp_path: Path) -> None:
    root = make_project(tmp_path / "project", max_steps=100_000, checkpoint_steps=5, methods=["d-opsd"])
    how = ("launcher=ray", "workers=[1, 2]", "cpus_per_worker=1", "resize_seconds=1", "max_failures=1")
    settings = load_settings(root / "params.yaml", [f"compute.{setting}" for setting in how]).of("blots", root)
    for stage in ("validate", "encode"):
        STAGES[stage]("blots", settings, root)
    job = Job("elastic", read_encoded(root / "runs/blots/encoded"), settings.train, settings.model, root, "made from")
    crowd = _Crowd()

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            run_training, job, settings.compute, root, tmp_path / "train", tmp_path / "adapters", crowd
        )
        try:
            crowd.wait_for(resumed=0, workers=1)
            second = cluster.add_node(**NODE)
            crowd.wait_for(resumed=1, workers=2)
            cluster.remove_node(second, allow_graceful=False)
            crowd.wait_for(resumed=2, workers=1)
        finally:
            while not running.done():  # nobody waits for 100,000 steps
                for worker in _workers():
                    with suppress(psutil.NoSuchProcess):
                        worker.kill()
                wait([running], timeout=1)
        with pytest.raises(LaunchError, match="start it again to go on from its checkpoint"):
            running.result(timeout=LIMIT)
