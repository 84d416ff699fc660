"""`make up` and `make down`: the whole local stack, brought up once on free ports for a project of two tiny flows."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

ROOT = Path(__file__).parent.parent
LIMIT = 900  # seconds; on a busy machine with first starts. A service that dies is noticed at once.

FLOW = """
import json, os
from pathlib import Path
from prefect import flow

@flow(name="{name}")
def {function}():
    names = ["MLFLOW_TRACKING_URI", "RAY_ADDRESS", "PREFECT_API_URL"]
    seen = {{"folder": os.getcwd()}} | {{name: os.environ[name] for name in names}}
    Path("seen.json").write_text(json.dumps(seen))
"""


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@dataclass
class Project:
    """A folder with a prefect.yaml and flows, and the ports that its services are given."""

    root: Path
    mlflow: int
    prefect: int
    ray: int

    @property
    def folder(self) -> Path:
        return self.root / ".cache" / "services"

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.prefect}/api"

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """What `make COMMAND` does."""
        variables = os.environ | {
            "DOPSD_ROOT": str(self.root),
            "DOPSD_SERVICES_DIR": "",
            "MLFLOW_PORT": str(self.mlflow),
            "PREFECT_PORT": str(self.prefect),
            "RAY_PORT": str(self.ray),
        }
        call = [sys.executable, "-m", "infra.local.services", command]
        return subprocess.run(call, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=LIMIT)

    def processes(self) -> list[psutil.Process]:
        """All processes of this stack, wherever they went."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("DOPSD_STACK") == str(self.folder):
                    found.append(process)
        return found


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project with nothing but two flows."""
    return _project(tmp_path)


def _project(folder: Path) -> Project:
    root = folder / "project"
    (root / "flows").mkdir(parents=True)
    shutil.copy(ROOT / "prefect.yaml", root)
    (root / "flows" / "train.py").write_text(FLOW.format(name="dopsd", function="dopsd"))
    (root / "flows" / "nightly.py").write_text(FLOW.format(name="dopsd-nightly", function="nightly"))
    return Project(root, *_free_ports(3))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """The stack, up."""
    project = _project(tmp_path_factory.mktemp("services"))
    try:
        done = project.run("up")
        assert done.returncode == 0, done.stdout + done.stderr
        yield project
    finally:
        project.run("down")


def test_a_taken_port_is_one_clear_line(project: Project) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", project.prefect))
        taken.listen()
        done = project.run("up")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"port {project.prefect}, meant for prefect, is taken" in line
    assert "PREFECT_PORT" in line
    assert not project.processes()


def test_a_port_that_is_none_is_named(project: Project) -> None:
    project.ray = 80
    done = project.run("up")
    assert (done.returncode, done.stderr) == (1, "RAY_PORT=80 is no port: a number from 1024 to 65535\n")


def test_a_life_of_the_stack(running: Project) -> None:
    """One test, because each step needs the one before, and starting takes most of a minute."""
    assert httpx.get(f"http://127.0.0.1:{running.mlflow}/health").text == "OK"
    assert httpx.get(f"{running.api}/health").json() is True
    assert (running.root / "mlflow.db").exists()
    assert (running.folder / "ray-token").stat().st_mode & 0o777 == 0o600
    assert running.folder.stat().st_mode & 0o777 == 0o700

    _check_that_only_loopback_listens(running)
    _check_the_deployments(running)
    _check_a_run(running)
    _check_the_nights_are_planned(running)

    assert running.run("status").returncode == 0
    before = {process.pid for process in running.processes()}
    again = running.run("up")
    assert again.returncode == 0, again.stderr
    assert "already runs" in again.stdout
    assert f"http://127.0.0.1:{running.mlflow}" in again.stdout
    assert before >= {process.pid for process in running.processes()}, "a second up starts nothing"

    done = running.run("down")
    assert done.returncode == 0, done.stderr
    assert not running.processes()
    assert not (running.folder / "supervisor.sock").exists()
    assert not (running.folder / "supervisord.pid").exists()
    for port in (running.mlflow, running.prefect, running.ray):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    assert running.run("status").returncode == 1

    done = running.run("down")
    assert (done.returncode, done.stdout) == (0, "Nothing runs.\n")


def _check_that_only_loopback_listens(running: Project) -> None:
    listening = {
        (process.name(), connection.laddr.ip, connection.laddr.port)
        for process in running.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {running.mlflow, running.prefect, running.ray} <= {port for _, _, port in listening}
    assert not [place for place in listening if place[1] not in ("127.0.0.1", "::ffff:127.0.0.1", "::1")]


def _check_the_deployments(running: Project) -> None:
    train = httpx.get(f"{running.api}/deployments/name/dopsd/train").raise_for_status().json()
    nightly = httpx.get(f"{running.api}/deployments/name/dopsd-nightly/nightly").raise_for_status().json()
    assert train["work_pool_name"] == nightly["work_pool_name"] == "dopsd"
    assert train["schedules"] == []
    (schedule,) = nightly["schedules"]
    assert schedule["active"]
    assert schedule["schedule"]["cron"] == "0 2 * * *"
    assert nightly["global_concurrency_limit"]["limit"] == 1
    assert nightly["concurrency_options"]["collision_strategy"] == "ENQUEUE"


def _check_the_nights_are_planned(running: Project) -> None:
    """The server's scheduler works: it is the part that breaks first where libraries do not fit."""

    def planned() -> list[Any]:
        wanted = {"deployments": {"name": {"any_": ["nightly"]}}}
        return httpx.post(f"{running.api}/flow_runs/filter", json=wanted, timeout=30).json()

    assert _within(120, planned)[0]["state"]["type"] == "SCHEDULED"


def _within(seconds: float, ask: Callable[[], Any]) -> Any:
    """The first answer that is something."""
    retrying = Retrying(
        stop=stop_after_delay(seconds), wait=wait_fixed(1), retry=retry_if_result(lambda answer: not answer)
    )
    return retrying(ask)


def _check_a_run(running: Project) -> None:
    """The worker runs a flow in the project's folder, and gives it the addresses."""
    deployment = httpx.get(f"{running.api}/deployments/name/dopsd/train").json()
    run = httpx.post(f"{running.api}/deployments/{deployment['id']}/create_flow_run", json={}).json()

    def ended() -> dict[str, Any] | None:
        state = httpx.get(f"{running.api}/flow_runs/{run['id']}", timeout=30).json()["state"]
        return None if state["type"] in ("SCHEDULED", "PENDING", "RUNNING") else state

    state = _within(LIMIT, ended)
    assert state["type"] == "COMPLETED", state["message"]
    seen = (running.root / "seen.json").read_text()
    for part in (str(running.root), f"127.0.0.1:{running.mlflow}", f"127.0.0.1:{running.ray}", running.api):
        assert part in seen
