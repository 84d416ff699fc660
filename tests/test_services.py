"""`make up`, a life of the service, and `make down`: one MLflow, Prefect, worker and Ray for all tests, in order."""

from __future__ import annotations

import base64
import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from infra.local.logins import PrefectLogin, write_private
from tests import attacks, stack
from tests.browser import CHROMIUM, DRIVER, browser, foreign_page
from tests.stack import Stack, until

needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium here: apt-get install chromium-driver"
)


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
    assert service.folder.stat().st_mode & 0o777 == 0o700
    listening = {
        (process.name(), connection.laddr.ip, connection.laddr.port)
        for process in service.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {service.mlflow, service.prefect, service.ray} <= {port for _, _, port in listening}
    assert not [place for place in listening if place[1] not in ("127.0.0.1", "::ffff:127.0.0.1", "::1")]


def test_nobody_is_answered_without_the_password(service: Stack) -> None:
    prefect, mlflow = service.api, f"http://127.0.0.1:{service.mlflow}"
    user, password = service.logins.mlflow
    asked: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("GET", f"{prefect}/admin/settings", {}),
        ("GET", f"{prefect}/csrf-token?client=somebody", {}),
        ("GET", f"{mlflow}/", {}),
        ("GET", f"{mlflow}/api/2.0/mlflow/experiments/search?max_results=9", {}),
        ("GET", f"{mlflow}/ajax-api/2.0/mlflow/experiments/search?max_results=9", {}),
        ("GET", f"{mlflow}/api/2.0/mlflow-artifacts/artifacts", {}),
        ("POST", f"{mlflow}/graphql", {}),
        ("POST", f"{mlflow}/api/2.0/mlflow/experiments/create", {"name": "somebody's"}),
        ("POST", f"{mlflow}/api/2.0/mlflow/users/create", {"username": "somebody", "password": "not-a-secret"}),
    )
    wrong = ("Basic c29tZWJvZHk6", _basic(f"{user}:{password[::-1]}"))
    for method, url, content in asked:
        for headers in ({}, *({"Authorization": value} for value in wrong)):
            assert httpx.request(method, url, json=content or None, headers=headers).status_code == 401, url
    flow = {"name": "somebody's"}
    for login in ("somebody:", f"{service.logins.prefect}x", f"{user}:{password}"):  # MLflow's is not Prefect's
        answer = httpx.post(f"{prefect}/flows/", json=flow, auth=PrefectLogin(prefect, login))
        assert answer.status_code == 401
    user, _, password = service.logins.prefect.partition(":")
    assert httpx.post(f"{prefect}/flows/", json=flow, auth=(user, password)).status_code == 403, "no CSRF token"
    assert httpx.get(f"{mlflow}/", headers={"Host": "attacker.example"}).status_code == 403, "DNS rebinding"
    assert "somebody's" not in _all_names(service)


def _basic(login: str) -> str:
    return f"Basic {base64.b64encode(login.encode()).decode()}"


def _all_names(service: Stack) -> set[str]:
    """What flows, work pools, experiments and models are called, by the account of who may ask."""
    names = {found["name"] for kind in ("flows", "work_pools") for found in service.ask(f"{kind}/filter", {})}
    names |= {experiment.name for experiment in service.tracker.search_experiments()}
    return names | {model.name for model in service.tracker.search_registered_models()}


@needs_browser
def test_a_foreign_page_can_neither_make_nor_read_anything(service: Stack) -> None:
    """In a real browser that has logged in to both, and keeps the passwords: a page of another port tries."""
    prefect, mlflow = service.api, f"http://127.0.0.1:{service.mlflow}"
    experiments = f"{mlflow}/ajax-api/2.0/mlflow/experiments"
    with browser() as page, foreign_page() as elsewhere:
        page.log_in_to_prefect(prefect.removesuffix("/api"), service.logins.prefect)
        page.log_in_to_mlflow(mlflow, ":".join(service.logins.mlflow))
        options = {"method": "POST", "headers": {"Content-Type": "application/json"}, "body": '{"name": "own"}'}
        assert page.run(attacks.FETCH, f"{experiments}/create", options)["status"] == 200, "its own page may"
        known = _all_names(service)
        assert "own" in known

        page.open(elsewhere, "a foreign page")
        made, named = [], {"name": "foreign"}
        for api, login in ((prefect, service.logins.prefect), (mlflow, ":".join(service.logins.mlflow))):
            header = _basic(login)
            contents = (
                {"flows/": named, "work_pools/": named | {"type": "process"}}
                if api == prefect
                else {f"{way}/2.0/mlflow/{kind}/create": named for way in ("api", "ajax-api")
                      for kind in ("experiments", "registered-models")}
            )  # fmt: skip
            for path, content in contents.items():
                made += attacks.post_all(page, f"{api}/{path}", content, header)
        read = attacks.read_all(page, f"{experiments}/search?max_results=9")
        read += attacks.read_all(page, f"{prefect}/flows/filter", {}) + attacks.read_all(page, f"{prefect}/version")
        for answer in made + read:
            assert answer.type in ("error", "opaque", "form") or answer.status in (401, 403), answer
            assert not answer.text or answer.text == "Not from a page of another origin.\n", answer
        assert page.run(attacks.SOCKET, f"{prefect}/events/out".replace("http", "ws", 1)) == "closed"
    assert _all_names(service) == known


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
    assert ".cache/services/prefect-login" in again.stdout
    assert "user dopsd, password after the colon in .cache/services/mlflow-login" in again.stdout
    assert service.logins.mlflow[1] not in again.stdout
    assert before >= {process.pid for process in service.processes()}
    assert service.run("status").returncode == 0


def test_a_password_that_is_not_taken_is_one_clear_line(service: Stack) -> None:
    for file in (service.logins.mlflow_file, service.logins.prefect_file):
        kept = file.read_text()
        try:
            file.write_text("dopsd:another\n")
            wrong = service.run("status")
            file.unlink()
            none = service.run("up")
        finally:
            write_private(file, kept)
        name = file.name.removesuffix("-login")
        assert wrong.returncode == none.returncode == 1
        said = f"{name} does not take the password in .cache/services/{file.name}: `make down`, delete that file"
        assert said in wrong.stderr.splitlines()[-1]
        assert "of an earlier version that asks for no password" in none.stderr
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
    reused = "blots: reused: validate, encode, train, evaluate, report, register"
    assert state["message"] == reused, _worker_log(service)


@needs_browser
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
        page.log_in_to_prefect(prefect, service.logins.prefect)
        page.log_in_to_mlflow(mlflow, ":".join(service.logins.mlflow))
        page.open(f"{prefect}/runs/flow-run/{flow_run}", "Completed", "tune blots")
        page.open(f"{prefect}/artifacts/artifact/{artifact['latest_id']}", "D-OPSD", "the version in MLflow", "its run")
        page.open(f"{experiment}/runs/{about.run_id}", "dopsd.flow_run.id", "dopsd-blots")
        versions = f'name="dopsd-blots"&runs={{"1":"{about.run_id}"}}'
        page.open(f"{mlflow}/#/compare-model-versions?{versions}", "blots v1 promoted")
        page.open(f"{experiment}/runs/{method.info.run_id}/model-metrics", "preview/student")
        assert "train/images_per_second" in service.tracker.get_run(method.info.run_id).data.metrics
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


def test_the_passwords_are_where_only_their_owner_may_look(service: Stack) -> None:
    """Neither in a program's arguments, which every user may see, nor in a log, an artifact or a database."""
    logins = service.logins
    private = {
        logins.ray_token,
        logins.prefect_file,
        logins.mlflow_file,
        logins.mlflow_settings,
        service.folder / "env",
    }
    assert {path.stat().st_mode & 0o777 for path in private} == {0o600}
    secret = [logins.ray_token.read_text(), logins.prefect.partition(":")[2], logins.mlflow[1]]
    assert min(map(len, secret)) >= 32
    arguments = [" ".join(process.cmdline()) for process in service.processes()]
    assert not [line for line in arguments if any(word in line for word in secret)]
    ray = Path(json.loads((service.folder / "stack.json").read_text())["ray_temp"])
    files = {path for root in (service.root, ray) for path in root.rglob("*") if path.is_file()}
    assert private <= files
    assert {service.folder / "logs" / "worker.log", service.root / "mlflow.db"} <= files
    found = [path for path in files - private if any(word.encode() in path.read_bytes() for word in secret)]
    assert not found


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
