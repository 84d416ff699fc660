"""Machines that are not like ours: a proxy that is away, few open files, a worker that does not know the project."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from prefect.deployments.steps.core import run_steps

from dopsd.process import no_proxy_of, proxy_note, raise_open_files
from dopsd.project import StageError, find_project
from tests.stack import ELSEWHERE

ROOT = Path(__file__).parent.parent
_ASK = """
import sys
from dopsd.process import prepare_process
prepare_process()
import httpx, requests, urllib.request
for host in ("127.0.0.1", "localhost"):
    address = f"http://{host}:{sys.argv[1]}"
    print(httpx.get(address).text, requests.get(address).text, urllib.request.urlopen(address).read().decode())
"""
_COUNT = """
import resource
from dopsd.process import prepare_process
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
prepare_process()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


class _Hello(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *_: object) -> None:
        pass


def test_loopback_is_reached_past_a_proxy_that_is_not_there() -> None:
    """By the clients of Prefect, MLflow and the hub; what else was exempt stays so."""
    with HTTPServer(("127.0.0.1", 0), _Hello) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = subprocess.run([sys.executable, "-c", _ASK, str(server.server_port)], capture_output=True, text=True,
                              env=os.environ | ELSEWHERE)  # fmt: skip
        server.shutdown()
    assert done.stdout.split() == ["hello"] * 6, done.stderr
    both = no_proxy_of({"http_proxy": "h", "no_proxy": "a.example, 10.0.0.1", "NO_PROXY": "b.example,127.0.0.1"})
    assert set(both.values()) == {"a.example,10.0.0.1,b.example,127.0.0.1,localhost,::1"}
    assert no_proxy_of({"http_proxy": "h", **both}) == both


def test_nothing_changes_where_no_proxy_is_named_or_all_is_exempt() -> None:
    """macOS asks its own settings where no variable is set; ``*`` alone is everything to urllib and requests."""
    assert no_proxy_of({}) == no_proxy_of({"no_proxy": "a.example", "http_proxy": ""}) == {}
    assert no_proxy_of({"http_proxy": "http://proxy", "NO_PROXY": "*"}) == {}
    assert no_proxy_of({"HTTPS_PROXY": "http://proxy"})["no_proxy"] == "127.0.0.1,localhost,::1"


@pytest.mark.parametrize("login", ["u:secret@", "http://u:secret@", "http://u:secret/x@", "http://u:secr@secret@"])
def test_a_proxy_is_named_without_its_password(login: str) -> None:
    note = proxy_note("https://hub.example/x", {"https_proxy": f"{login}proxy.example:3128"})
    assert note == " (through https_proxy=proxy.example:3128; is that proxy there?)"


def test_a_proxy_is_named_for_what_goes_through_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"HTTP_PROXY": "h:1", "all_proxy": "a:1"}
    assert "HTTP_PROXY=h:1" in proxy_note("http://tracker.example", given)
    assert "all_proxy=a:1" in proxy_note("https://tracker.example", given)
    assert proxy_note("https://tracker.example", {"HTTP_PROXY": "h:1"}) == ""
    assert proxy_note("sqlite:///mlflow.db", given) == ""
    for name, value in (given | no_proxy_of(given)).items():
        monkeypatch.setenv(name, value)
    assert proxy_note("http://127.0.0.1:5000") == ""


def test_what_the_kernel_does_not_give_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def refuse(_: int, limits: tuple[int, int]) -> None:
        asked.append(limits[0])
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    raise_open_files()
    assert asked == [65_536, 10_240]


def test_few_open_files_become_as_many_as_there_may_be() -> None:
    command = ["sh", "-c", 'ulimit -S -n 256; exec "$@"', "sh", sys.executable, "-c", _COUNT]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after, hard = map(int, done.stdout.split())
    assert before == 256
    assert after == hard or after >= 65_536


def test_a_flow_finds_the_project_wherever_its_worker_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    monkeypatch.delenv("DOPSD_ROOT", raising=False)
    assert find_project() == {"folder": str(ROOT)}, "the clone that this is"
    steps = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["pull"]
    assert asyncio.run(run_steps(steps))["directory"] == str(ROOT), "Prefect itself, as a worker does it"
    monkeypatch.chdir("/")
    (tmp_path / "params.yaml").touch()
    monkeypatch.setenv("DOPSD_ROOT", str(tmp_path))
    assert find_project() == {"folder": str(tmp_path)}
    (tmp_path / "params.yaml").unlink()
    with pytest.raises(StageError, match=r"DOPSD_ROOT=.*there is no params\.yaml in it; start it with DOPSD_ROOT set"):
        find_project()
