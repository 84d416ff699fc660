"""A real MLflow server of a test's own, and a proxy before it that refuses, breaks or goes silent when told to."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


class Server:
    """An MLflow server of its own on 127.0.0.1, in its own process group."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--artifacts-destination", f"{self.folder}/a",
        ]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, cwd=self.folder,
                env={**environment, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )  # fmt: skip
        tick = threading.Event()
        for _ in range(1800):  # a crowded machine takes minutes
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                tick.wait(0.1)
        pytest.fail(f"the server did not start: {(self.folder / 'server.log').read_text()[-2000:]}")

    def stop(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


Fault = Callable[[str, str, bytes], int | None]
"""From method, path and body of a request: the status to answer, 0 for no answer at all, ``None`` to pass it on."""


class Proxy:
    """Passes requests on to an MLflow server, apart from those that :attr:`fault` has an answer for."""

    def __init__(self, server: Server) -> None:
        self.fault: Fault = lambda method, path, body: None
        self.json_answers = False
        """Refusals come as JSON of the proxy's own, in place of plain text."""
        self.writes: list[str] = []
        """Requests that change something, as ``METHOD path``."""
        self._released = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler(server))
        self._http.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._released.set()
        self._http.shutdown()
        self._http.server_close()

    def _handler(proxy, server: Server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Transfer-Encoding") == "chunked":  # of an empty file
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                    self.headers["Content-Length"] = str(len(body))
                    del self.headers["Transfer-Encoding"]
                if self.command in ("PUT", "PATCH", "DELETE") or re.search(r"/(create|log|set|update)\b", self.path):
                    proxy.writes.append(f"{self.command} {self.path}")
                status = proxy.fault(self.command, self.path, body)
                if status == 0:
                    proxy._released.wait()
                    self.close_connection = True
                elif status is not None:
                    self._answer(status, b'{"detail": "no"}' if proxy.json_answers else b"no", [])
                else:
                    onward = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
                    try:
                        onward.request(self.command, self.path, body, dict(self.headers))
                        answer = onward.getresponse()
                        self._answer(answer.status, answer.read(), answer.getheaders())
                    finally:
                        onward.close()

            def _answer(self, status: int, body: bytes, headers: list[tuple[str, str]]) -> None:
                self.send_response(status)
                for name, value in headers:
                    if name.lower() not in ("transfer-encoding", "content-length", "connection", "date", "server"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass

            def log_message(self, *_: object) -> None:
                """Nothing."""

        return Handler
