"""Whether the services answer, and waiting until they do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import httpx
import yaml
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from .logins import PrefectLogin
from .processes import Supervisor, holder
from .stack import HOST, POOL, PORTS, ServiceError, Stack

PATIENCE = float(os.environ.get("DOPSD_SERVICES_TIMEOUT") or 600)
"""Seconds that a service may take. Long, for first starts on busy machines; a service that dies is noticed at once."""

STARTS = 3
"""How often supervisord may start a service until it is given up: Ray's own patience is short on a busy machine."""


class NotReady(Exception):
    """It does not answer yet; the message says what was seen."""


def check_ports(stack: Stack) -> None:
    """Raises ServiceError for a port that another program has."""
    for name in PORTS:
        check_port(stack, name)
    if len(set(stack.ports.values())) < len(PORTS):
        raise ServiceError("two services are given one port: " + ", ".join(f"{k} {v}" for k, v in stack.ports.items()))


def check_port(stack: Stack, name: str) -> None:
    """Raises ServiceError where another program has the port of the service ``name``."""
    port = stack.ports[name]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise ServiceError(
                f"port {port}, meant for {name}, is taken{holder(port)}: end that, or pass {PORTS[name][0]}=another"
            ) from None


def check(stack: Stack, name: str) -> None:
    """Raises NotReady where the service ``name`` does not answer as it should."""
    try:
        {"mlflow": _mlflow, "prefect": _prefect, "ray": _ray, "worker": _worker}[name](stack)
    except (httpx.HTTPError, OSError) as error:
        raise NotReady(f"{type(error).__name__}: {error}") from error


def wait_for(stack: Stack, supervisor: Supervisor, name: str) -> None:
    """Returns when a service answers. Raises ServiceError when its process ends, or takes too long."""
    pids: set[int] = set()

    def attempt() -> None:
        state = supervisor.states().get(name)
        if state is None:
            raise ServiceError("supervisord ended", stack.log("supervisord"))
        pids.add(state.pid)
        if not state.starts_or_runs or len(pids) > STARTS:
            raise ServiceError(f"{name} ended while it was starting", stack.log(name))
        check(stack, name)

    try:
        _retrying(PATIENCE)(attempt)
    except NotReady as error:
        raise ServiceError(f"{name} does not answer after {PATIENCE:.0f} s: {error}", stack.log(name)) from error


def is_healthy(stack: Stack, name: str) -> bool:
    """Whether it answers now."""
    try:
        check(stack, name)
    except NotReady:
        return False
    return True


def registered(stack: Stack) -> bool:
    """Whether Prefect knows every deployment of ``prefect.yaml``."""
    wanted = {
        d["name"] for d in yaml.safe_load((stack.root / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    }
    try:
        answer = _ask_prefect(stack, "deployments/filter", timeout=30).raise_for_status()
    except httpx.HTTPError:
        return False
    return wanted <= {deployment["name"] for deployment in answer.json()}


def _retrying(seconds: float) -> Callable[[Callable[[], None]], None]:
    return Retrying(
        stop=stop_after_delay(seconds),
        wait=wait_exponential(multiplier=0.25, max=2),
        retry=retry_if_exception_type(NotReady),
        reraise=True,
    )


def _api(stack: Stack) -> str:
    return stack.client_variables()["PREFECT_API_URL"]


def _ask_prefect(stack: Stack, path: str, timeout: float) -> httpx.Response:
    """Its answer to a question that wants the password."""
    api = _api(stack)
    answer = httpx.post(f"{api}/{path}", json={}, timeout=timeout, auth=PrefectLogin(api, stack.logins.prefect))
    if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise ServiceError(_refused(stack, "prefect", stack.logins.prefect_file), stack.log("prefect"))
    return answer


def _mlflow(stack: Stack) -> None:
    """First what costs nothing, then a question that wants the password."""
    address = stack.address("mlflow")
    httpx.get(f"{address}/health", timeout=10).raise_for_status()
    answer = httpx.get(f"{address}/api/2.0/mlflow/users/current", auth=stack.logins.mlflow, timeout=10)
    if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise ServiceError(_refused(stack, "mlflow", stack.logins.mlflow_file), stack.log("mlflow"))
    answer.raise_for_status()


def _refused(stack: Stack, name: str, file: Path) -> str:
    return f"{name} does not take the password in {stack.shown(file)}: `make down`, delete that file, `make up`"


def _prefect(stack: Stack) -> None:
    httpx.get(f"{_api(stack)}/health", timeout=10).raise_for_status()


def _ray(stack: Stack) -> None:
    """First what costs nothing: `ray start` writes this file when its node is up, well after its port answers. Then
    Ray's own check, a process of seconds that also proves the token."""
    if stack.ray_temp is None or not (stack.ray_temp / "ray_current_cluster").exists():
        raise NotReady("its node has not started yet")
    socket.create_connection((HOST, stack.ports["ray"]), timeout=2).close()
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", stack.address("ray")]
    try:
        done = subprocess.run(command, env=stack.variables(), capture_output=True, encoding="utf-8", timeout=120)
    except subprocess.TimeoutExpired:
        raise NotReady("ray health-check took more than 120 s") from None
    if done.returncode:
        raise NotReady((done.stderr.strip().splitlines() or ["ray health-check failed"])[-1])


def _worker(stack: Stack) -> None:
    """Prefect has heard of the worker since this start: one of an earlier start counts as online for a while too."""
    answer = _ask_prefect(stack, f"work_pools/{POOL}/workers/filter", timeout=10)
    if answer.status_code == httpx.codes.NOT_FOUND:
        raise NotReady(f"there is no work pool {POOL} yet")
    online = [worker for worker in answer.raise_for_status().json() if worker["status"] == "ONLINE"]
    if not any(datetime.fromisoformat(worker["last_heartbeat_time"]).timestamp() > stack.started for worker in online):
        raise NotReady("Prefect has not heard of it")
