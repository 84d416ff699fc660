"""Who may use the stack: a password for Prefect and another for MLflow, since whoever has Prefect's may run anything.

Each lies in a file below the stack's folder that only its owner may read, as Ray's token does. They never become
arguments of a program, which all users of a machine can see.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import httpx

USER = "dopsd"
CODE = Path(__file__).parents[2]
"""Where this package is imported from: MLflow's server, a process of its own, imports ``origin`` too."""


@dataclass(frozen=True)
class Logins:
    """The passwords of the stack in ``folder``."""

    folder: Path

    def make(self) -> None:
        """Make what is missing; what is there stays, so that browsers and shells need not log in anew."""
        keep(self.ray_token, secrets.token_hex(32))
        keep(self.prefect_file, f"{USER}:{secrets.token_hex(16)}\n")
        if keep(self.mlflow_file, f"{USER}:{secrets.token_hex(16)}\n"):
            self._mlflow_users.unlink(missing_ok=True)  # they know an earlier password, and MLflow would go by that
        write_private(self.mlflow_settings, self._mlflow_ini())

    @property
    def made(self) -> bool:
        """Whether there are passwords: a stack of an earlier version has none."""
        return self.prefect_file.exists() and self.mlflow_file.exists()

    # --- files ---

    @property
    def ray_token(self) -> Path:
        """Ray's token."""
        return self.folder / "ray-token"

    @property
    def prefect_file(self) -> Path:
        """``user:password`` for Prefect."""
        return self.folder / "prefect-login"

    @property
    def mlflow_file(self) -> Path:
        """``user:password`` for MLflow."""
        return self.folder / "mlflow-login"

    @property
    def mlflow_settings(self) -> Path:
        """What MLflow's log-in reads when it starts."""
        return self.folder / "mlflow-login.ini"

    @property
    def _mlflow_users(self) -> Path:
        return self.folder / "mlflow-users.db"

    def _mlflow_ini(self) -> str:
        user, password = self.mlflow
        lines = {
            "default_permission": "READ",
            "database_uri": f"sqlite:///{self._mlflow_users}",
            "admin_username": user,
            "admin_password": password,
            "authorization_function": "infra.local.origin:authenticate",
            "auth_cache_ttl_seconds": "600",  # else each request costs a password hash, made to be slow
        }
        # configparser takes a % for the beginning of a reference
        return "[mlflow]\n" + "".join(f"{name} = {value.replace('%', '%%')}\n" for name, value in lines.items())

    # --- what is in them ---

    @property
    def prefect(self) -> str:
        """``user:password``, which is what Prefect calls an auth string. Empty where none was made."""
        return _read(self.prefect_file)

    @property
    def mlflow(self) -> tuple[str, str]:
        """User and password."""
        user, _, password = _read(self.mlflow_file).partition(":")
        return user, password

    # --- variables ---

    def for_clients(self) -> dict[str, str]:
        """What the clients of Prefect, MLflow and Ray read by themselves."""
        user, password = self.mlflow
        return {
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": password,
            "PREFECT_API_AUTH_STRING": self.prefect,
            "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED": "true",
            "RAY_AUTH_MODE": "token",  # said, because without it Ray goes by what it finds in the home folder
            "RAY_AUTH_TOKEN_PATH": str(self.ray_token),
        }

    def for_prefect(self, address: str) -> dict[str, str]:
        """What its server reads: no request without the password, and none that a page of another origin made."""
        return {
            "PREFECT_SERVER_API_AUTH_STRING": self.prefect,
            "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
            "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": address,  # by default every page may ask, and read the answer
            "PREFECT_SERVER_UI_API_URL": "/api",  # its pages ask where they came from, so they need no other origin
        }

    def for_mlflow(self, port: int, public: str = "") -> dict[str, str]:
        """What its server reads, started with ``--app-name basic-auth``. ``public``: where it is seen from elsewhere,
        as ``https://HOST:PORT``."""
        path = [str(CODE), *filter(None, [os.environ.get("PYTHONPATH")])]
        hosts, origins = [f"127.0.0.1:{port}", f"localhost:{port}"], [f"http://127.0.0.1:{port}"]
        if public:
            hosts.append(urlsplit(public).netloc)
            origins.append(public)
        return {
            "MLFLOW_AUTH_CONFIG_PATH": str(self.mlflow_settings),
            # signs the forms of its own pages; a new one with each start, since no form is worth keeping longer
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
            "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(hosts),
            "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(origins),
            "DOPSD_MLFLOW_PYTHONPATH": os.pathsep.join(path),
        }


FOREIGN = ("MLFLOW_AUTH_", "MLFLOW_SERVER_", "MLFLOW_TRACKING_", "PREFECT_", "RAY_")
"""How variables begin that are about another stack, and would be mixed into this one's."""


class PrefectLogin(httpx.Auth):
    """Prefect's password, and with each request that may change something the token that it wants then (CSRF)."""

    requires_response_body = True

    def __init__(self, api: str, login: str) -> None:
        user, _, password = login.partition(":")
        self._api, self._basic = api, httpx.BasicAuth(user, password)

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Called by httpx for each request."""
        if request.method != "GET":
            client = str(uuid4())
            ask = httpx.Request("GET", f"{self._api}/csrf-token", params={"client": client})
            answer = yield next(self._basic.auth_flow(ask))
            if not answer.is_success:
                return  # the caller gets this answer: a wrong password, or a server that is busy
            request.headers["Prefect-Csrf-Client"] = client
            request.headers["Prefect-Csrf-Token"] = answer.json()["token"]
        yield next(self._basic.auth_flow(request))


def keep(path: Path, text: str) -> bool:
    """Make a file that only its owner may read, unless it is there; whether it was made."""
    if path.exists():
        path.chmod(0o600)
        return False
    write_private(path, text)
    return True


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, from its first moment on, and whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    partial.replace(path)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""
