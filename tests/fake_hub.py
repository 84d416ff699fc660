"""A hub on 127.0.0.1: what a download of a snapshot asks of the real one, from files in memory."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40
_API = re.compile(r"/api/(models|datasets)/(?P<name>[^/]+/[^/]+)(/(?P<what>revision|tree)/(?P<revision>[^/]+))?(/.*)?")
_FILE = re.compile(r"(/datasets)?/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass
class Repository:
    """A model on the hub. ``gated``: nothing but its page is open, or (``all``) not even that."""

    files: dict[str, bytes]
    commit: str = COMMIT
    revisions: tuple[str, ...] = ("main", "v1")
    gated: str = ""
    answer: int = 0
    """Answer everything with this status."""
    breaks: str = ""
    """The file that breaks off in the middle."""
    withheld: str = ""
    """The file that its page lists and its tree does not."""


@dataclass
class FakeHub:
    """Use it as a context; ``requests`` are what was asked, ``tokens`` what was sent along."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)

    def __enter__(self) -> FakeHub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Nobody answers from now on."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Variables for a process that shall ask this hub, without what this process has of the real one."""
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()
        }
        return {
            **kept,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HOME": str(home),
            "OMP_NUM_THREADS": "1",
            **more,
        }

    def fetched(self) -> set[str]:
        """Names of the files that were sent."""
        found = (re.fullmatch(r"GET " + _FILE.pattern, request) for request in self.requests)
        return {match["file"] for match in found if match}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._respond(body=True)

    def do_HEAD(self) -> None:
        self._respond(body=False)

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _respond(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if "Authorization" in self.headers:
            self.hub.tokens.add(self.headers["Authorization"])
        match = _API.fullmatch(path) or _FILE.fullmatch(path)
        repository = self.hub.repositories.get(match["name"]) if match else None
        if match is None or repository is None:
            status = 404 if "Authorization" in self.headers else 401  # to a stranger it could be a private one
            return self._send(status, {"X-Error-Code": "RepoNotFound"}, b"Repository not found", body)
        found = match.groupdict()
        if repository.answer:
            return self._send(repository.answer, {}, b"no", body)
        if repository.gated == "all" or (repository.gated and "file" in found):
            status = 403 if "Authorization" in self.headers else 401
            return self._send(status, {"X-Error-Code": "GatedRepo"}, b"Access to this model is restricted", body)
        if found["revision"] not in (None, repository.commit, *repository.revisions):
            return self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"Invalid rev id", body)
        if "file" in found:
            return self._file(repository, found["file"], body)
        if found["what"] == "tree":
            answer: Any = [_entry(name, content) for name, content in repository.files.items()
                           if name != repository.withheld]  # fmt: skip
        else:
            siblings = [{"rfilename": name, "size": len(content)} for name, content in repository.files.items()]
            answer = {"id": found["name"], "sha": repository.commit, "siblings": siblings, "gated": False}
        return self._send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode(), body)

    def _file(self, repository: Repository, name: str, body: bool) -> None:
        content = repository.files.get(name)
        if content is None:
            return self._send(404, {"X-Error-Code": "EntryNotFound"}, b"Entry not found", body)
        headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{_entry(name, content)["oid"]}"'}
        ranged = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if name == repository.breaks and body:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return None
        return self._send(206 if ranged else 200, headers, content[int(ranged[1]) :] if ranged else content, body)

    def _send(self, status: int, headers: dict[str, str], content: bytes, body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


def _entry(name: str, content: bytes) -> dict[str, Any]:
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"type": "file", "path": name, "size": len(content), "oid": git}
