"""The whole local service under a tiny project, and the questions that a person would ask it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from mlflow import MlflowClient
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from infra.local.logins import Logins, PrefectLogin
from tests.tiny_project import ROOT, make_project

LIMIT = 600  # seconds; on a busy machine. What dies is noticed at once.
ELSEWHERE = dict.fromkeys(("http_proxy", "https_proxy", "ALL_PROXY"), "http://somebody:secret@127.0.0.1:9")
"""A proxy that is not there: what is next door is to be reached all the same."""
FEW_FILES = ("sh", "-c", 'ulimit -n 256; exec "$@"', "sh")
"""Before a command: with as many open files as macOS allows at first, and here no more."""
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@dataclass
class Stack:
    """A project folder and the ports that its services are given."""

    root: Path
    mlflow: int
    prefect: int
    ray: int

    @classmethod
    def with_free_ports(cls, root: Path) -> Stack:
        with contextlib.ExitStack() as probes:
            sockets = [probes.enter_context(socket.socket()) for _ in range(3)]
            for probe in sockets:
                probe.bind(("127.0.0.1", 0))
            return cls(root, *(probe.getsockname()[1] for probe in sockets))

    @property
    def folder(self) -> Path:
        return self.root / ".cache" / "services"

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.prefect}/api"

    @property
    def logins(self) -> Logins:
        return Logins(self.folder)

    @property
    def tracker(self) -> MlflowClient:
        return MlflowClient("http://{}:{}@127.0.0.1:{}".format(*self.logins.mlflow, self.mlflow))

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """What `make COMMAND` does."""
        variables = os.environ | {
            "DOPSD_ROOT": str(self.root),
            "DOPSD_SERVICES_DIR": "",
            "MLFLOW_PORT": str(self.mlflow),
            "PREFECT_PORT": str(self.prefect),
            "RAY_PORT": str(self.ray),
            **ELSEWHERE,
        }
        call = [*FEW_FILES, sys.executable, "-m", "infra.local.services", command]
        return subprocess.run(call, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=LIMIT)

    def supervise(self, *command: str) -> None:
        """Start or stop a single service."""
        socket_url = f"unix://{self.folder}/supervisor.sock"
        subprocess.run([sys.executable, "-m", "supervisor.supervisorctl", "-s", socket_url, *command],
                       check=True, capture_output=True, timeout=LIMIT)  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        """All processes of this stack, wherever they went, and those below them: Ray's workers rename themselves, which
        wipes the mark."""
        marked = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("DOPSD_STACK") == str(self.folder):
                    marked.add(process)
        return sorted(marked | {child for process in marked for child in _below(process)}, key=lambda p: p.pid)

    def find(self, words: str) -> list[psutil.Process]:
        """The stack's processes with these words in their command."""
        return [p for p in self.processes() if words in " ".join(_command(p))]

    def training(self) -> list[psutil.Process]:
        """Ray's workers that train."""
        return self.find("ray::RayTrainWorker")

    # --- Prefect ---

    def prefect_cli(self, *command: str) -> subprocess.Popen[str]:
        """A Prefect command, as typed in a shell after `source .cache/services/env`."""
        lines = (self.folder / "env").read_text().splitlines()
        pairs = [line.removeprefix("export ").partition("=") for line in lines if line.startswith("export ")]
        variables = os.environ | ELSEWHERE | {name: value.strip("'\"") for name, _, value in pairs}
        return subprocess.Popen([sys.executable, "-m", "prefect", *command], cwd=self.root, env=variables,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip

    def ask(self, path: str, content: dict[str, Any] | None = None) -> Any:
        """Prefect's answer. While its database is busy it says 503; its own client tries again too."""
        login = PrefectLogin(self.api, self.logins.prefect)

        def once() -> httpx.Response:
            method = "GET" if content is None else "POST"
            return httpx.request(method, f"{self.api}/{path}", json=content, auth=login, timeout=LIMIT)

        return (
            until(once, lambda answer: answer.status_code != httpx.codes.SERVICE_UNAVAILABLE).raise_for_status().json()
        )

    def deployment(self, name: str) -> dict[str, Any]:
        return self.ask(f"deployments/name/{name}")

    def start(self, deployment: str = "dopsd/train", **parameters: Any) -> str:
        """Ask for a run of a deployment; the flow run's id."""
        wanted = {"parameters": parameters}
        return self.ask(f"deployments/{self.deployment(deployment)['id']}/create_flow_run", wanted)["id"]

    def state(self, run: str) -> dict[str, Any]:
        return self.ask(f"flow_runs/{run}")["state"]

    def end(self, run: str) -> dict[str, Any]:
        """The state in which a flow run ends."""
        return until(lambda: self.state(run), lambda state: state["type"] in ENDED)

    def runs(self, deployment: str, *states: str) -> list[dict[str, Any]]:
        """The flow runs of a deployment that are in one of these states."""
        return self.ask("flow_runs/filter", {
            "deployments": {"name": {"any_": [deployment]}}, "flow_runs": {"state": {"type": {"any_": list(states)}}},
        })  # fmt: skip

    def logs(self, run: str) -> str:
        """What a flow run said."""
        return json.dumps(self.ask("logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200}))

    # --- MLflow ---

    def steps(self, flow_run: str) -> int:
        """Optimizer steps of d-opsd that the tracker was told of by a flow run."""
        runs = self.tracker.search_runs(
            [e.experiment_id for e in self.tracker.search_experiments()],
            f"tags.`dopsd.flow_run.id` = '{flow_run}' and tags.`dopsd.method` = 'd-opsd'",
        )
        return len({m.step for m in self.tracker.get_metric_history(runs[0].info.run_id, "train/loss")}) if runs else 0

    def rows(self, concept: str) -> int:
        """Rows of the log of d-opsd."""
        path = self.root / "runs" / concept / "train" / "d-opsd" / "log.jsonl"
        return path.read_text().count("\n") if path.exists() else 0


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _below(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return process.children(recursive=True)
    return []


def until(ask: Callable[[], Any], enough: Callable[[Any], bool] = bool) -> Any:
    """The first answer that is enough. Raises RetryError after LIMIT seconds."""
    patient = Retrying(
        stop=stop_after_delay(LIMIT), wait=wait_fixed(0.5), retry=retry_if_result(lambda answer: not enough(answer))
    )
    return patient(ask)


def project(root: Path) -> Path:
    """A tiny project as a service would run it: two concepts, trained by Ray."""
    make_project(root, ("blots", "spots"), methods=["d-opsd"], max_steps=12, checkpoint_steps=4)
    settings = (root / "params.yaml").read_text().replace("launcher: local", "launcher: ray\n  cpus_per_worker: 1")
    (root / "params.yaml").write_text(settings)
    for file in ("prefect.yaml", "pyproject.toml"):  # the second holds Prefect's settings
        shutil.copy(ROOT / file, root)
    (root / "flows").symlink_to(ROOT / "flows")
    return root
