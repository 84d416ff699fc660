"""The processes of the stack: supervisord, spoken to through its socket, and every process that descends from it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault, ServerProxy

import psutil
from supervisor.xmlrpc import SupervisorTransport
from tenacity import RetryError, Retrying, retry_if_result, stop_after_delay, wait_fixed

from .stack import MARK, ServiceError, Stack

CONFIG = Path(__file__).with_name("supervisord.conf")
STOP_SECONDS = 120  # supervisord stops four services one after the other, each in 20 s at most


@dataclass(frozen=True)
class State:
    """What supervisord says of one service."""

    pid: int
    name: str

    @property
    def starts_or_runs(self) -> bool:
        """Whether its process is there."""
        return self.name in ("STARTING", "RUNNING")


class Supervisor:
    """The stack's supervisord."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    def _call(self, method: str, *arguments: Any) -> Any:
        transport = SupervisorTransport(None, None, f"unix://{self.stack.socket}")
        try:  # the host is never used: the transport goes to the socket
            return getattr(ServerProxy("http://127.0.0.1", transport=transport).supervisor, method)(*arguments)
        finally:
            transport.close()

    def pid(self) -> int | None:
        """Its PID, or None where none answers."""
        try:
            return self._call("getPID")
        except (OSError, Fault):
            return None

    def start(self) -> None:
        """Start supervisord in the background, and with it all services but the worker."""
        done = subprocess.run(
            [sys.executable, "-m", "supervisor.supervisord", "-c", str(CONFIG)],
            cwd=self.stack.root,
            env=self.stack.variables(),
            capture_output=True,
            encoding="utf-8",
        )
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
            raise ServiceError(f"supervisord did not start: {said[0]}")
        if not _within(30, lambda: self.pid() is not None):
            raise ServiceError("supervisord started but does not answer", self.stack.log("supervisord"))

    def states(self) -> dict[str, State]:
        """All services; empty where no supervisord answers."""
        try:
            rows = self._call("getAllProcessInfo")
        except (OSError, Fault):  # a fault: it is about to end
            return {}
        return {row["name"]: State(row["pid"], row["statename"]) for row in rows}

    def ensure(self, name: str) -> None:
        """Start a service that is not running."""
        if not self.states()[name].starts_or_runs:
            with contextlib.suppress(Fault):  # it was started in between, or failed at once: its state tells
                self._call("startProcess", name, False)

    def shutdown(self) -> None:
        """Stop the services, the worker first, then supervisord; returns when it is gone."""
        with contextlib.suppress(OSError, Fault, psutil.NoSuchProcess):
            process = psutil.Process(self._call("getPID"))
            self._call("shutdown")
            _within(STOP_SECONDS, lambda: not _alive([process]))


def of_stack(stack: Stack) -> list[psutil.Process]:
    """Every process that carries the stack's mark, also one that left its group or lost its parent, and all below it:
    Ray's workers rename themselves, which wipes their mark."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == str(stack.folder):
                found |= {process, *below(process)}
    return _alive(found)


def below(process: psutil.Process) -> list[psutil.Process]:
    """The descendants of a process."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def end(processes: Iterable[psutil.Process], patience: float) -> list[psutil.Process]:
    """Ask processes to end, kill those that have not after ``patience`` seconds, and return those still there."""
    processes = _alive(processes)
    for signal in ("terminate", "kill"):
        for process in _alive(processes):
            with contextlib.suppress(psutil.Error):
                getattr(process, signal)()
        if _within(patience, lambda: not _alive(processes)):
            return []
    return _alive(processes)


def holder(port: int) -> str:
    """Who listens on a port, as `` by python (PID 42)``; empty where this user may not know."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.pid and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                return f" by {psutil.Process(connection.pid).name()} (PID {connection.pid})"
    return ""


def _alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that still run. A zombie does not: it only waits for its parent, which in a container may never come."""
    alive = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Whether ``condition()`` comes true in time."""
    retrying = Retrying(
        stop=stop_after_delay(seconds), wait=wait_fixed(0.2), retry=retry_if_result(lambda true: not true)
    )
    try:
        return bool(retrying(condition))
    except RetryError:
        return False
