"""Training on a real Ray of our own: as in this process, through the death of a worker too; and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file

from dopsd.config import ComputeSettings, Settings, load_settings
from dopsd.data.encoded import read_encoded
from dopsd.stages import STAGES
from dopsd.train.job import Job
from dopsd.train.launch import LaunchError, launch, resources
from dopsd.train.trainer import TrainError
from tests import tiny
from tests.tiny_project import ROOT, make_project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose concept is encoded."""
    root = make_project(tmp_path_factory.mktemp("project"), max_steps=12, checkpoint_steps=2, methods=["d-opsd"])
    for stage in ("validate", "encode"):
        STAGES[stage]("blots", _settings(root), root)
    return root


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    yield
    ray.shutdown()


def _settings(root: Path, *overrides: str) -> Settings:
    return load_settings(root / "params.yaml", overrides)


def _job(root: Path, name: str, *overrides: str) -> Job:
    settings = _settings(root, *overrides)
    encoded = read_encoded(root / "runs/blots/encoded")
    return Job(name, encoded, settings.train, settings.model, root, settings.data.resolution)


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
    project: Path, unbroken: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    killed = threading.Event()

    def kill() -> None:
        for worker in _workers():
            worker.send_signal(signal.SIGKILL)
            killed.set()

    watcher = _Watcher(9, kill)
    done = _launch(_job(project, "killed"), tmp_path, watcher, cpus_per_worker=1)
    assert killed.is_set()
    assert done["d-opsd"].steps == 12
    assert any("resuming at step" in message for message in watcher.messages), watcher.messages
    mine = load_file(tmp_path / "adapters/d-opsd.safetensors")
    assert mine.keys() == unbroken.keys()
    assert not [key for key in mine if not torch.equal(mine[key], unbroken[key])], "bit for bit"
    assert (tmp_path / "train/d-opsd/log.jsonl").read_text().count("\n") == 12
    assert not list((tmp_path / "storage").glob("killed*")), "what is finished needs no storage"


def test_what_is_finished_is_not_done_again_on_ray(project: Path, tmp_path: Path) -> None:
    job = _job(project, "finished", "train.max_steps=2")
    _launch(job, tmp_path, launcher="local")
    before = (tmp_path / "train/d-opsd/log.jsonl").read_bytes()
    watcher = _Watcher()
    done = _launch(job, tmp_path, watcher, cpus_per_worker=1)
    assert done["d-opsd"].steps == 2
    assert watcher.steps == []
    assert (tmp_path / "train/d-opsd/log.jsonl").read_bytes() == before


def test_training_at_fault_fails_at_once_with_its_reason(project: Path, tmp_path: Path) -> None:
    job = _job(project, "diverged", "train.learning_rate=1e30", "train.clip_norm=1e30")
    watcher = _Watcher()
    with pytest.raises(TrainError, match="not finite"):
        _launch(job, tmp_path, watcher, cpus_per_worker=1)
    assert sum("LoRA rank" in message for message in watcher.messages) == 1, "it was not tried again"


def test_two_workers_train_one_concept(project: Path, unbroken: dict[str, torch.Tensor], tmp_path: Path) -> None:
    _launch(_job(project, "two"), tmp_path, workers=2, cpus_per_worker=1)
    mine = load_file(tmp_path / "adapters/d-opsd.safetensors")
    for key, value in unbroken.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-2, atol=2e-3)


def test_a_worker_asks_for_what_the_settings_say() -> None:
    asked = resources(ComputeSettings(cpus_per_worker=3, gpus_per_worker=0.5, memory_gib=2), "cuda")
    assert asked == {"CPU": 3, "GPU": 0.5, "memory": 2 * 2**30}


def test_a_cluster_that_is_not_there_is_no_fault_of_the_job(project: Path, tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from dopsd.config import ComputeSettings\n"
        "from dopsd.train.launch import LaunchError, connect_ray\n"
        "try:\n    connect_ray(ComputeSettings())\nexcept LaunchError as error:\n    print('away:', error)\n"
    )
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("away: cannot reach the cluster at 127.0.0.1:9"), done.stderr[-2000:]
    assert not issubclass(LaunchError, ValueError), "so that the flow tries again"


def test_a_stopped_run_leaves_no_process(project: Path) -> None:
    """As Prefect stops a cancelled one: SIGTERM to the process group's leader, in the middle of training."""
    command = [sys.executable, "-m", "dopsd.cli", "train", "--concept", "blots", "--set", "train.max_steps=100000",
               "--set", "compute.launcher=ray", "--set", "tracking.enabled=false"]  # fmt: skip
    run = subprocess.Popen(
        command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""},
    )  # fmt: skip
    assert run.stdout is not None
    started = any("teacher gain" in line for line in iter(run.stdout.readline, ""))
    assert started
    family = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
    assert any("RayTrainWorker" in " ".join(p.cmdline()) for p in family), "it is Ray that trains"
    run.send_signal(signal.SIGTERM)
    run.wait(timeout=120)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
