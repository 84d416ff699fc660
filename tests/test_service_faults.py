"""The whole service, real: MLflow, Prefect, its worker and Ray under a tiny project; and what it survives."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from mlflow import MlflowClient
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from tests.test_services import LIMIT, Project, _free_ports
from tests.tiny_project import ROOT, make_project

ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


class Service(Project):
    """A stack that is up, and the questions that a person would ask it."""

    @property
    def variables(self) -> dict[str, str]:
        """What `source .cache/services/env` sets."""
        lines = (self.folder / "env").read_text().splitlines()
        pairs = [line.removeprefix("export ").partition("=") for line in lines if line.startswith("export ")]
        return os.environ | {name: value.strip("'\"") for name, _, value in pairs}

    @property
    def tracker(self) -> MlflowClient:
        return MlflowClient(f"http://127.0.0.1:{self.mlflow}")

    def cli(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A Prefect command, as typed in a shell."""
        return subprocess.run([sys.executable, "-m", "prefect", *command], cwd=self.root, env=self.variables,
                              capture_output=True, text=True, timeout=LIMIT)  # fmt: skip

    def start(self, **parameters: Any) -> str:
        """Start the deployment dopsd/train; the flow run's id."""
        deployment = httpx.get(f"{self.api}/deployments/name/dopsd/train", timeout=60).raise_for_status().json()
        url = f"{self.api}/deployments/{deployment['id']}/create_flow_run"
        return httpx.post(url, json={"parameters": parameters}, timeout=60).raise_for_status().json()["id"]

    def state(self, run: str) -> dict[str, Any]:
        return httpx.get(f"{self.api}/flow_runs/{run}", timeout=60).json()["state"]

    def end(self, run: str) -> dict[str, Any]:
        """The state in which a flow run ends."""
        return until(lambda: self.state(run), lambda state: state["type"] in ENDED)

    def steps(self, concept: str) -> int:
        """Optimizer steps that the tracker was told of, of the latest training of d-opsd."""
        runs = self.tracker.search_runs(
            [e.experiment_id for e in self.tracker.search_experiments()],
            f"tags.`dopsd.concept` = '{concept}' and tags.`dopsd.method` = 'd-opsd'",
            order_by=["attributes.start_time DESC"],
        )
        return len({m.step for m in self.tracker.get_metric_history(runs[0].info.run_id, "train/loss")}) if runs else 0

    def find(self, words: str) -> list[psutil.Process]:
        """The stack's processes with these words in their command."""
        return [p for p in self.processes() if words in " ".join(_command(p))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def until(ask: Callable[[], Any], enough: Callable[[Any], bool]) -> Any:
    """Ask until the answer is enough."""
    return Retrying(stop=stop_after_delay(LIMIT), wait=wait_fixed(0.5), retry=retry_if_result(lambda a: not enough(a)))(
        ask
    )


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("service") / "project"
    make_project(root, ("blots", "spots"), methods=["d-opsd"], max_steps=12, checkpoint_steps=2)
    settings = (root / "params.yaml").read_text().replace("launcher: local", "launcher: ray\n  cpus_per_worker: 1")
    (root / "params.yaml").write_text(settings)
    shutil.copy(ROOT / "prefect.yaml", root)
    (root / "flows").symlink_to(ROOT / "flows")
    stack = Service(root, *_free_ports(3))
    try:
        done = stack.run("up")
        assert done.returncode == 0, done.stdout + done.stderr
        yield stack
    finally:
        stack.run("down")


def test_a_deployment_run_trains_registers_and_a_second_one_reuses_all(service: Service) -> None:
    done = service.cli("deployment", "run", "dopsd/train", "--param", 'concepts=["blots"]', "--watch")
    assert done.returncode == 0, done.stdout + done.stderr
    champion = service.tracker.get_model_version_by_alias("dopsd-blots", "champion")
    assert int(champion.version) == 1
    run = service.tracker.get_run(champion.run_id)
    assert run.data.tags["dopsd.flow_run.id"]
    assert f"127.0.0.1:{service.prefect}" in run.data.tags["dopsd.flow_run.url"]
    assert run.inputs.dataset_inputs[0].dataset.digest
    assert {a.path for a in service.tracker.list_artifacts(champion.run_id)} >= {"report.html", "evaluation", "export"}
    assert service.steps("blots") == 12
    second = service.end(service.start(concepts=["blots"]))
    assert second["type"] == "COMPLETED"
    assert second["message"] == "blots: reused: validate, encode, train, evaluate, report, register"


def test_the_tracker_away_for_a_while_loses_nothing(service: Service) -> None:
    """The MLflow server is stopped in the middle of training and comes back before its end."""
    run = service.start(concepts=["blots"], overrides=["train.max_steps=400", "train.seed=1"])
    until(lambda: service.steps("blots"), lambda steps: 0 < steps < 400)
    _supervise(service, "stop", "mlflow")
    until(lambda: len(_log(service.root, "blots")), lambda rows: rows > 300)
    _supervise(service, "start", "mlflow")
    state = service.end(run)
    assert state["type"] == "COMPLETED", state["message"]
    assert service.steps("blots") == 400
    assert int(service.tracker.get_model_version_by_alias("dopsd-blots", "candidate").version) == 2


def test_cancelling_stops_the_job_and_leaves_no_process(service: Service) -> None:
    run = service.start(concepts=["spots"], overrides=["train.max_steps=100000"])
    until(lambda: service.steps("spots"), lambda steps: steps > 5)
    assert service.find("ray::RayTrainWorker")
    done = service.cli("flow-run", "cancel", run)
    assert done.returncode == 0, done.stderr
    assert service.end(run)["type"] == "CANCELLED"
    until(lambda: service.find("ray::RayTrainWorker"), lambda found: not found)
    until(lambda: service.find("prefect.engine"), lambda found: not found)


def test_the_prefect_worker_killed_the_next_run_goes_on_from_the_checkpoint(service: Service) -> None:
    overrides = ["train.max_steps=300", "train.seed=2"]
    first = service.start(concepts=["spots"], overrides=overrides)
    until(lambda: service.steps("spots"), lambda steps: 20 < steps < 300)
    for process in [*service.find("worker start"), *service.find("prefect.engine")]:
        process.send_signal(signal.SIGKILL)
    until(lambda: service.find("ray::RayTrainWorker"), lambda found: not found)
    until(lambda: service.find("worker start"), bool)  # supervisord starts it again
    second = service.start(concepts=["spots"], overrides=overrides)
    state = service.end(second)
    assert state["type"] == "COMPLETED", state["message"]
    logs = httpx.post(f"{service.api}/logs/filter", json={"limit": 200}, timeout=60).json()
    assert service.steps("spots") == 300
    worker = (service.folder / "logs" / "worker.log").read_text()
    assert "resuming at step" in worker + json.dumps(logs)
    assert service.state(first)["type"] != "COMPLETED"


def _log(root: Path, concept: str) -> list[str]:
    """Rows that the job has handed to storage or brought home."""
    places = [root / "runs" / concept / "train", *(root / ".cache" / "ray").glob(f"{concept}-*")]
    logs = [path for place in places for path in place.rglob("d-opsd/log.jsonl")]
    return max((path.read_text().splitlines() for path in logs if path.exists()), key=len, default=[])


def _supervise(service: Service, *command: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "supervisor.supervisorctl", "-s", f"unix://{service.folder}/supervisor.sock", *command],
        check=True, capture_output=True, timeout=LIMIT,
    )  # fmt: skip
