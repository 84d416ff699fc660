"""Passwords on one machine: their files, MLflow's look at where a request comes from, `make ui`, a Ray of our own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
from flask import Flask, request

from infra.local.logins import Logins
from infra.local.origin import is_foreign
from infra.local.stack import ServiceError, Stack
from tests.stack import Stack as Running
from tests.stack import until
from tests.tiny_project import ROOT


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stack:
    """A stack that does not run, with its passwords."""
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "PREFECT_", "RAY_", "DOPSD_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DOPSD_ROOT", str(tmp_path))
    made = Stack.from_environment()
    made.make_folder()
    made.logins.make()
    return made


def test_passwords_are_random_stay_and_are_their_owners_alone(stack: Stack, tmp_path: Path) -> None:
    logins = stack.logins
    files = (logins.ray_token, logins.prefect_file, logins.mlflow_file, logins.mlflow_settings)
    before = [file.read_text() for file in files]
    logins.prefect_file.chmod(0o644)
    logins.make()
    assert [file.read_text() for file in files] == before
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    other = Logins(tmp_path / "other")
    other.folder.mkdir()
    other.make()
    words = [logins.prefect, other.prefect, ":".join(logins.mlflow), ":".join(other.mlflow)]
    assert len(set(words)) == 4
    assert all(word.startswith("dopsd:") and len(word) == 38 for word in words)


def test_a_deleted_password_of_mlflow_is_made_anew_with_its_users(stack: Stack) -> None:
    users = stack.folder / "mlflow-users.db"
    users.write_text("they know the old one")
    old = stack.logins.mlflow
    stack.logins.make()
    assert users.exists()
    stack.logins.mlflow_file.unlink()
    stack.logins.make()
    assert stack.logins.mlflow != old
    assert not users.exists()
    assert stack.logins.mlflow[1] in stack.logins.mlflow_settings.read_text()


def test_variables_of_another_stack_do_not_come_in(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    others = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE",
              "PREFECT_API_KEY", "PREFECT_SERVER_CORS_ALLOWED_ORIGINS", "RAY_AUTH_TOKEN")  # fmt: skip
    for name in others:
        monkeypatch.setenv(name, "another's")
    given = stack.variables()
    assert not [name for name in given if given[name] == "another's"]
    assert given["RAY_AUTH_MODE"] == "token"
    assert given["PREFECT_SERVER_API_AUTH_STRING"] == given["PREFECT_API_AUTH_STRING"] == stack.logins.prefect
    assert given["PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"] == "http://127.0.0.1:4200"
    assert given["MLFLOW_TRACKING_PASSWORD"] == stack.logins.mlflow[1]


OWN = "127.0.0.1:5000"


@pytest.mark.parametrize(
    ("method", "headers", "foreign"),
    [
        ("POST", {}, False),  # a program
        ("POST", {"Origin": f"http://{OWN}", "Sec-Fetch-Site": "same-origin"}, False),
        ("POST", {"Origin": f"https://{OWN}"}, False),  # behind a proxy that ends the encryption
        ("GET", {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"}, False),  # typed in
        ("GET", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, False),
        ("GET", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}, True),
        ("POST", {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, True),
        ("GET", {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}, True),
        ("GET", {"Origin": "http://127.0.0.1:8000"}, True),
        ("POST", {"Origin": "http://localhost:5000"}, True),
        ("POST", {"Origin": "http://attacker.example"}, True),
        ("POST", {"Origin": "null"}, True),  # a file, or a frame in a sandbox
        ("POST", {"Origin": ""}, True),
    ],
)
def test_pages_of_other_origins_are_told_apart(method: str, headers: dict[str, str], foreign: bool) -> None:
    with Flask(__name__).test_request_context("/", method=method, headers={"Host": OWN, **headers}):
        assert is_foreign(request) is foreign


@pytest.mark.parametrize("text", ["h:8443", "https://h/mlflow", "https://me:secret@h", "http://h:99999"])
def test_an_address_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MLFLOW_UI_URL", text)
    with pytest.raises(ServiceError, match=r"MLFLOW_UI_URL=.*h.*expected http") as caught:
        Stack.from_environment()
    assert "secret" not in str(caught.value)


def test_an_address_is_as_browsers_write_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, public in (("https://H.example:443", "https://h.example"), ("http://h:443/", "http://h:443")):
        monkeypatch.setenv("MLFLOW_UI_URL", text)
        assert Stack.from_environment().public == public


def test_make_ui_asks_for_the_password_and_shows_it_to_a_terminal_alone(tmp_path: Path) -> None:
    place = Running.with_free_ports(tmp_path)
    given = {"DOPSD_ROOT": str(tmp_path), "DOPSD_SERVICES_DIR": "", "MLFLOW_PORT": str(place.mlflow),
             "MLFLOW_UI_URL": "https://Tracker.example:8443/"}  # fmt: skip
    said = tmp_path / "said"
    with said.open("w") as output:
        process = psutil.Popen([sys.executable, "-m", "infra.local.ui"], cwd=ROOT, env=os.environ | given,
                               stdout=output, stderr=subprocess.STDOUT)  # fmt: skip
    address = f"http://127.0.0.1:{place.mlflow}"
    try:
        until(lambda: process.poll() is not None or _answers(f"{address}/health"))
        assert process.poll() is None, said.read_text()
        search = f"{address}/api/2.0/mlflow/experiments/search?max_results=9"
        assert httpx.get(search).status_code == 401
        assert httpx.get(search, auth=place.logins.mlflow).json()["experiments"]
        assert httpx.get(search, auth=place.logins.mlflow, headers={"Origin": "http://127.0.0.1:9"}).status_code == 403
        assert place.logins.mlflow[1] not in " ".join(process.cmdline())
        # seen through a tunnel or a proxy: by the name that was said, and from its pages, alone
        named = {"Host": "tracker.example:8443", "Origin": "https://tracker.example:8443"}
        assert httpx.get(search, auth=place.logins.mlflow, headers=named).json()["experiments"]
        assert httpx.get(search, headers=named).status_code == 401
        for wrong in ({"Host": "other.example"}, {**named, "Origin": "https://other.example"}):
            assert httpx.get(search, auth=place.logins.mlflow, headers=wrong).status_code == 403
    finally:
        process.terminate()
        process.wait()
    text = said.read_text()
    assert address in text
    assert ".cache/services/mlflow-login" in text
    assert place.logins.mlflow[1] not in text


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.HTTPError:
        return False


RAY = """
import os
from dopsd.config.groups import ComputeSettings
from dopsd.train.launch import connect_ray
connect_ray(ComputeSettings())
import ray
from ray._raylet import AuthenticationMode, get_authentication_mode
assert get_authentication_mode() == AuthenticationMode.TOKEN
asked = ray.remote(num_cpus=0)(lambda: len(os.environ["RAY_AUTH_TOKEN"]))
print(os.environ["RAY_AUTH_MODE"], ray.get(asked.remote()))
"""


def test_a_ray_of_our_own_wants_a_token_that_no_file_holds(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    given = kept | {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", RAY], env=given, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "token 64\n"), done.stderr
    assert not (tmp_path / ".ray").exists()
