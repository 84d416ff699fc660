"""Ray beside training: encoding and drawing by two workers, a cluster that is away, a run that is stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from dopsd.config import load_settings
from dopsd.config.groups import ComputeSettings
from dopsd.stages import STAGES
from dopsd.train.errors import LaunchError
from dopsd.train.launch import resources
from tests.tiny_project import ROOT, make_project


@pytest.fixture
def own_ray() -> Iterator[None]:
    """The Ray that stages start for themselves is gone afterwards."""
    yield
    ray.shutdown()


def test_two_workers_encode_and_draw_what_one_does(own_ray: None, tmp_path: Path) -> None:
    root = make_project(tmp_path / "project", max_steps=1, methods=["d-opsd"])
    for stage in ("validate", "encode", "train", "evaluate"):
        STAGES[stage]("blots", load_settings(root / "params.yaml", ["tracking.enabled=false"]), root)
    run = root / "runs/blots"
    results = [run / "encoded/tensors.safetensors", *sorted((run / "evaluation").rglob("*.*"))]
    before = {path: path.read_bytes() for path in results if path.is_file() and path.name != "index.json"}
    shutil.rmtree(root / ".cache/encodings")
    shutil.rmtree(run / "encoded")
    shutil.rmtree(run / "evaluation")
    two = ("tracking.enabled=false", "compute.launcher=ray", "compute.workers=2", "compute.cpus_per_worker=1")
    for stage in ("encode", "evaluate"):
        STAGES[stage]("blots", load_settings(root / "params.yaml", two), root)
    assert len(before) > 5
    assert [path.name for path, content in before.items() if path.read_bytes() != content] == []


def test_a_cluster_that_is_not_there_is_no_fault_of_the_job() -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from dopsd.config import ComputeSettings\n"
        "from dopsd.train.errors import LaunchError\n"
        "from dopsd.train.launch import connect_ray\n"
        "try:\n    connect_ray(ComputeSettings())\nexcept LaunchError as error:\n    print('away:', error)\n"
    )
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("away: cannot reach the cluster at 127.0.0.1:9"), done.stderr[-2000:]
    assert not issubclass(LaunchError, ValueError), "so that the flow tries again"


def test_a_stopped_run_leaves_no_process(tmp_path: Path) -> None:
    """As Prefect stops a cancelled one: SIGTERM to the process group's leader, in the middle of training."""
    root = make_project(tmp_path / "project", methods=["d-opsd"])
    for stage in ("validate", "encode"):
        STAGES[stage]("blots", load_settings(root / "params.yaml"), root)
    command = [sys.executable, "-m", "dopsd.cli", "train", "--concept", "blots", "--set", "train.max_steps=100000",
               "--set", "compute.launcher=ray", "--set", "tracking.enabled=false"]  # fmt: skip
    run = subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""},
    )  # fmt: skip
    assert run.stdout is not None
    started = any("teacher gain" in line for line in iter(run.stdout.readline, ""))
    assert started
    family = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
    assert any("RayTrainWorker" in " ".join(p.cmdline()) for p in family), "it is Ray that trains"
    heard = {c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert heard
    assert heard <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, "nobody outside is listened to"
    run.send_signal(signal.SIGTERM)
    run.wait(timeout=120)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive


def test_a_worker_asks_for_what_the_settings_say() -> None:
    asked = resources(ComputeSettings(cpus_per_worker=3, gpus_per_worker=0.5, memory_gib=2), "cuda")
    assert asked == {"CPU": 3, "GPU": 0.5, "memory": 2 * 2**30}
