"""`make up`, a life of the service, and `make down`: one MLflow, Prefect, worker and Ray for all tests, in order."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests import stack
from tests.browser import CHROMIUM, DRIVER, browser
from tests.stack import Stack, until


@pytest.fixture
def down(tmp_path: Path) -> Stack:
    """A service that is not up."""
    return Stack.with_free_ports(tmp_path / "project")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The service, up."""
    here = Stack.with_free_ports(stack.project(tmp_path_factory.mktemp("service") / "project"))
    try:
        done = here.run("up")
        assert done.returncode == 0, done.stdout + done.stderr
        yield here
    finally:
        here.run("down")


def test_a_taken_port_is_one_clear_line(down: Stack) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", down.prefect))
        taken.listen()
        done = down.run("up")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"port {down.prefect}, meant for prefect, is taken" in line
    assert "PREFECT_PORT" in line
    assert not down.processes()


def test_a_port_that_is_none_is_named(down: Stack) -> None:
    down.ray = 80
    done = down.run("up")
    assert (done.returncode, done.stderr) == (1, "RAY_PORT=80 is no port: a number from 1024 to 65535\n")


def test_everything_answers_on_loopback_alone(service: Stack) -> None:
    assert httpx.get(f"http://127.0.0.1:{service.mlflow}/health").text == "OK"
    assert httpx.get(f"{service.api}/health").json() is True
    assert (service.root / "mlflow.db").exists()
    assert (service.folder / "ray-token").stat().st_mode & 0o777 == 0o600
    assert service.folder.stat().st_mode & 0o777 == 0o700
    listening = {
        (process.name(), connection.laddr.ip, connection.laddr.port)
        for process in service.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {service.mlflow, service.prefect, service.ray} <= {port for _, _, port in listening}
    assert not [place for place in listening if place[1] not in ("127.0.0.1", "::ffff:127.0.0.1", "::1")]


def test_deployments_are_there_and_nights_are_planned(service: Stack) -> None:
    """Prefect's scheduler is the part that breaks first, and unseen, where libraries do not fit."""
    train, nightly = service.deployment("dopsd/train"), service.deployment("dopsd-nightly/nightly")
    assert train["work_pool_name"] == nightly["work_pool_name"] == "dopsd"
    assert train["schedules"] == []
    (schedule,) = nightly["schedules"]
    assert schedule["active"]
    assert (schedule["schedule"]["cron"], schedule["schedule"]["timezone"]) == ("0 2 * * *", "UTC")
    assert nightly["global_concurrency_limit"]["limit"] == 1
    assert nightly["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    assert until(lambda: service.runs("nightly", "SCHEDULED"))


def test_a_second_up_starts_nothing(service: Stack) -> None:
    before = {process.pid for process in service.processes()}
    again = service.run("up")
    assert again.returncode == 0, again.stderr
    assert "already runs" in again.stdout
    assert f"http://127.0.0.1:{service.mlflow}" in again.stdout
    assert before >= {process.pid for process in service.processes()}
    assert service.run("status").returncode == 0


def test_a_deployment_run_trains_and_registers_through_an_outage_of_the_tracker(service: Stack) -> None:
    """The MLflow server is away in the middle of training and back before its end; nobody does anything about it. A
    second run of the concept at the same moment waits, and reuses every stage."""
    steps = 150
    watching = service.prefect_cli("deployment", "run", "dopsd/train", "--param", 'concepts=["blots"]',
                                   "--param", f'overrides=["train.max_steps={steps}"]', "--watch")  # fmt: skip
    (run,) = until(lambda: service.runs("train", "RUNNING"))
    until(lambda: 0 < service.steps(run["id"]) < steps)
    second = service.start(concepts=["blots"], overrides=[f"train.max_steps={steps}"])
    service.supervise("stop", "mlflow")
    known = service.rows("blots")
    until(lambda: service.rows("blots") > known + 12)
    service.supervise("start", "mlflow")
    said, _ = watching.communicate()
    assert watching.returncode == 0, said
    assert service.steps(run["id"]) == steps, "nothing was lost"
    champion = service.tracker.get_model_version_by_alias("dopsd-blots", "champion")
    assert int(champion.version) == 1
    training = service.tracker.get_run(champion.run_id)
    assert training.data.tags["dopsd.flow_run.id"] == run["id"]
    assert f"127.0.0.1:{service.prefect}" in training.data.tags["dopsd.flow_run.url"]
    assert training.inputs.dataset_inputs[0].dataset.digest
    kept = {artifact.path for artifact in service.tracker.list_artifacts(champion.run_id)}
    assert kept >= {"report.html", "evaluation", "export"}
    state = service.end(second)
    assert state["type"] == "COMPLETED"
    assert state["message"] == "blots: reused: validate, encode, train, evaluate, report, register"


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium here: apt-get install chromium-driver")
def test_both_web_pages_show_the_run(service: Stack) -> None:
    """In a real browser: the flow run with its tasks and its artifact; the run with its metrics and pictures."""
    champion = service.tracker.get_model_version_by_alias("dopsd-blots", "champion")
    training = service.tracker.get_run(champion.run_id)
    about, flow_run = training.info, training.data.tags["dopsd.flow_run.id"]
    (method,) = service.tracker.search_runs([about.experiment_id], f"tags.mlflow.parentRunId = '{about.run_id}'")
    (artifact,) = service.ask("artifacts/latest/filter", {"artifacts": {"key": {"any_": ["blots-result"]}}})
    prefect, mlflow = (f"http://127.0.0.1:{port}" for port in (service.prefect, service.mlflow))
    experiment = f"{mlflow}/#/experiments/{about.experiment_id}"
    with browser() as page:
        page.open(f"{prefect}/runs/flow-run/{flow_run}", "Completed", "tune blots")
        page.open(f"{prefect}/artifacts/artifact/{artifact['latest_id']}", "D-OPSD", "the version in MLflow", "its run")
        page.open(f"{experiment}/runs/{about.run_id}", "dopsd.flow_run.id", "dopsd-blots")
        page.open(f"{experiment}/runs/{method.info.run_id}/model-metrics", "preview/student", "images_per_second")
        page.wait_for_pictures(2)
        page.open(f"{experiment}/runs/{method.info.run_id}/artifacts", "images")


def test_killed_and_cancelled_runs_leave_no_process_and_the_next_one_goes_on(service: Stack) -> None:
    """kill -9 to Prefect's worker: its run goes on. To the worker and the flow run: the next run of the same goes on,
    and is cancelled."""
    how: dict[str, Any] = {"concepts": ["spots"], "overrides": ["train.max_steps=100000"]}
    first = service.start(**how)
    until(lambda: service.steps(first) > 8)
    killed = service.find("worker start")
    for process in killed:
        process.send_signal(signal.SIGKILL)
    until(lambda: set(service.find("worker start")) - set(killed))  # supervisord starts it again
    known = service.steps(first)
    until(lambda: service.steps(first) > known)
    assert service.state(first)["type"] == "RUNNING"
    assert service.training()
    for process in [*service.find("worker start"), *service.find("prefect.engine")]:
        process.send_signal(signal.SIGKILL)
    until(lambda: not service.training())
    until(lambda: service.find("worker start"))  # supervisord starts it again

    second = service.start(**how)
    until(lambda: service.training() and service.rows("spots") > 0 and "resuming at step" in _worker_log(service))
    cancelled = service.prefect_cli("flow-run", "cancel", second)
    said, _ = cancelled.communicate()
    assert cancelled.returncode == 0, said
    assert service.end(second)["type"] == "CANCELLED"
    until(lambda: not service.training())
    until(lambda: not service.find("prefect.engine"))
    until(lambda: not service.find("ray::PlacementGroupCleaner"))  # one for each job, if left to itself
    until(lambda: service.state(first)["type"] == "CRASHED")  # it has said nothing since


def _worker_log(service: Stack) -> str:
    return (service.folder / "logs" / "worker.log").read_text()


def test_down_leaves_nothing(service: Stack) -> None:
    done = service.run("down")
    assert done.returncode == 0, done.stderr
    assert not service.processes()
    assert not (service.folder / "supervisor.sock").exists()
    assert not (service.folder / "supervisord.pid").exists()
    for port in (service.mlflow, service.prefect, service.ray):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    assert service.run("status").returncode == 1
    done = service.run("down")
    assert (done.returncode, done.stdout) == (0, "Nothing runs.\n")
