"""What the local stack is: its folder, its ports, and the variables that its processes and its users are given.

Everything lives below one folder (``.cache/services``, or ``DOPSD_SERVICES_DIR``), which only its owner may enter:
logs, Prefect's database, supervisor's socket and PID file, the passwords (``logins``), and ``env`` for a shell that
wants to use it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dopsd.process import no_proxy_of

from .logins import FOREIGN, Logins, write_private

HOST = "127.0.0.1"
PORTS = {"mlflow": ("MLFLOW_PORT", 5000), "prefect": ("PREFECT_PORT", 4200), "ray": ("RAY_PORT", 6379)}
SERVICES = (*PORTS, "worker")
POOL = "dopsd"
MARK = "DOPSD_STACK"
"""In the environment of every process of the stack, with its folder: so they are found whatever group they move to."""

SOCKET_LIMIT = 90
"""Bytes of a path that supervisor can still make a socket of: systems allow 104 or 108, and it adds a suffix."""


class ServiceError(Exception):
    """Something of the stack does not work. The message is the one line that a person reads."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Stack:
    """One project's services on one machine."""

    root: Path
    folder: Path
    ports: Mapping[str, int]
    ray_temp: Path | None = None
    """Ray's sessions; a short path outside of the folder, because Ray makes sockets deep below it."""
    public: str = ""
    """Where MLflow's pages are seen from elsewhere, through a tunnel or a proxy."""

    @classmethod
    def from_environment(cls) -> Stack:
        """The stack of this checkout, with the ports of ``MLFLOW_PORT``, ``PREFECT_PORT`` and ``RAY_PORT``, and the
        address of ``MLFLOW_UI_URL``. Raises ServiceError for what is none."""
        root = Path(os.environ.get("DOPSD_ROOT") or Path(__file__).parents[2]).resolve()
        folder = Path(os.environ.get("DOPSD_SERVICES_DIR") or root / ".cache" / "services").resolve()
        ports = {name: _port(variable, default) for name, (variable, default) in PORTS.items()}
        return cls(root, folder, ports, public=_public())

    def as_started(self) -> Stack:
        """As it was when it was started: a later call may have been given other ports."""
        try:
            kept = json.loads(self._state.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return self
        return replace(self, ports=kept["ports"], ray_temp=Path(kept["ray_temp"]))

    def make_folder(self) -> None:
        """Make the folder, which only its owner may enter."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        (self.folder / "logs").mkdir(exist_ok=True)

    def prepare(self) -> Stack:
        """Make what the services need before they start: folders, passwords, and Ray's place for sockets."""
        if len(os.fsencode(self.socket)) > SOCKET_LIMIT:
            raise ServiceError(f"{self.folder} is too long for a socket: set DOPSD_SERVICES_DIR to a shorter path")
        self.make_folder()
        self.logins.make()
        stack = replace(self, ray_temp=Path(tempfile.mkdtemp(prefix="dopsd-ray-", dir="/tmp")))
        stack._state.write_text(
            json.dumps({"ports": dict(stack.ports), "ray_temp": str(stack.ray_temp)}), encoding="utf-8"
        )
        exports = [f"export {name}={shlex.quote(value)}\n" for name, value in stack.client_variables().items()]
        write_private(stack.env_file, "".join(exports))
        return stack

    def forget(self) -> None:
        """Remove what is of no use once nothing runs. Logs, Prefect's database and the passwords stay."""
        for file in (self._state, self.env_file, self.socket, self.pid_file):
            file.unlink(missing_ok=True)
        if self.ray_temp is not None:
            shutil.rmtree(self.ray_temp, ignore_errors=True)

    @property
    def started(self) -> float:
        """When it was started, in seconds since the epoch."""
        return self._state.stat().st_mtime

    # --- places ---

    @property
    def socket(self) -> Path:
        """Where supervisor listens."""
        return self.folder / "supervisor.sock"

    @property
    def pid_file(self) -> Path:
        """Supervisor's own; it knows the PIDs of the others."""
        return self.folder / "supervisord.pid"

    @property
    def env_file(self) -> Path:
        """To be sourced by a shell that wants to talk to the stack."""
        return self.folder / "env"

    @property
    def _state(self) -> Path:
        return self.folder / "stack.json"

    @property
    def logins(self) -> Logins:
        """Its passwords."""
        return Logins(self.folder)

    def log(self, name: str) -> Path:
        """The log of a service."""
        return self.folder / "logs" / f"{name}.log"

    def shown(self, path: Path) -> str:
        """``path`` as a person in the project would write it."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)

    def address(self, name: str) -> str:
        """Where a service is reached; the worker has no address, it asks Prefect for work."""
        if name == "worker":
            return f"work pool {POOL}"
        return f"{'' if name == 'ray' else 'http://'}{HOST}:{self.ports[name]}"

    # --- variables ---

    def client_variables(self) -> dict[str, str]:
        """What a process needs to use the stack: flow runs have it, and a shell that sources ``env``."""
        return {
            "MLFLOW_TRACKING_URI": self.address("mlflow"),
            "PREFECT_API_URL": f"{self.address('prefect')}/api",
            "PREFECT_HOME": str(self.folder / "prefect"),  # the user's own ~/.prefect is left alone
            "RAY_ADDRESS": self.address("ray"),
            # Despite its name the only way to keep Ray on loopback on Linux too: without it every 127.0.0.1 is
            # turned into the machine's outer address, for servers and clients alike.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            **no_proxy_of(os.environ),
            **({"DOPSD_MLFLOW_UI_URL": self.public} if self.public else {}),
            **self.logins.for_clients(),
        }

    def mlflow_variables(self) -> dict[str, str]:
        """What MLflow's server reads beside the caller's."""
        return self.logins.for_mlflow(self.ports["mlflow"], self.public)

    def variables(self) -> dict[str, str]:
        """The environment of everything in the stack: the caller's, less what is about another stack."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
        search = os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)])
        return {
            **inherited,
            **self.client_variables(),
            **self.logins.for_prefect(self.address("prefect")),
            **self.mlflow_variables(),
            **{variable: str(self.ports[name]) for name, (variable, _) in PORTS.items()},
            "PATH": search,  # its programs are those of this Python, whether or not the environment is activated
            MARK: str(self.folder),
            "DOPSD_ROOT": str(self.root),
            "DOPSD_SERVICES_DIR": str(self.folder),
            "DOPSD_RAY_TEMP": str(self.ray_temp or ""),
            "DO_NOT_TRACK": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # for LLM judges and the like; processes nobody here uses
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "3",  # a run asked for starts soon; the server is next door
            "PYTHONUNBUFFERED": "1",
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # of cloud nodes; here a process of 200 MB for nothing
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # of 15, with which everything else on the machine goes before training
            "RAY_worker_register_timeout_seconds": "600",  # of 60; a busy machine's workers are killed, the run hangs
        }


def _public() -> str:
    """As browsers write an origin: small letters, and no port that the scheme has anyway."""
    text = os.environ.get("MLFLOW_UI_URL", "")
    match = re.fullmatch(r"(https?)://([a-z0-9.-]+)(?::(\d{1,5}))?/?", text.lower())
    if text and (match is None or int(match[3] or 0) > 65535):
        shown = text.rpartition("@")[2]
        raise ServiceError(f"MLFLOW_UI_URL={shown}: expected http(s)://NAME or http(s)://NAME:PORT, and nothing more")
    if match is None:
        return ""
    scheme, host, port = match.groups()
    return f"{scheme}://{host}" + (f":{port}" if port not in (None, {"http": "80", "https": "443"}[scheme]) else "")


def _port(variable: str, default: int) -> int:
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal() or not 1024 <= int(text) <= 65535:
        raise ServiceError(f"{variable}={text} is no port: a number from 1024 to 65535")
    return int(text)
