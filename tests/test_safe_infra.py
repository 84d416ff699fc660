"""Who holds which keys: Ray's nodes, which run anyone's code, must not reach what MLflow's models are loaded from."""

from __future__ import annotations

import configparser
import importlib.util
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import httpx
import pytest
import yaml
from botocore.awsrequest import AWSPreparedRequest
from botocore.exceptions import ClientError
from mlflow.server.auth.config import read_auth_config
from moto.server import ThreadedMotoServer

INFRA = Path(__file__).parent.parent / "infra"
DOCKER = INFRA / "docker"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
ROOT_KEYS = {"s3_access_key", "s3_secret_key", "s3_root_credentials"}
ASKS = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:ListBucket"]


# --- compose ----------------------------------------------------------------------------------------------------------


def test_roots_keys_are_with_the_store_and_the_maker_of_buckets_alone() -> None:
    holders = {name for name, service in SERVICES.items() if ROOT_KEYS & set(service.get("secrets", []))}
    assert holders == {"s3", "buckets"}
    assert SERVICES["buckets"]["networks"] == ["store"]


@pytest.mark.parametrize("name", SERVICES)
def test_each_service_is_the_user_that_it_holds_the_keys_of(name: str) -> None:
    keys = {secret for secret in SERVICES[name].get("secrets", []) if secret.endswith("_credentials")}
    file = SERVICES[name].get("environment", {}).get("AWS_SHARED_CREDENTIALS_FILE", "")
    if name == "buckets":
        assert file == "/run/secrets/s3_root_credentials"
    elif name == "mlflow":
        assert (file, keys) == ("/run/secrets/s3_mlflow_credentials", {"s3_mlflow_credentials"})
    elif name.startswith(("ray-", "prefect-worker")):
        assert (file, keys) == ("/run/secrets/s3_nodes_credentials", {"s3_nodes_credentials"})
    else:
        assert (file, keys) == ("", set())


def test_the_buckets_are_made_for_those_users() -> None:
    *_, mlflow, checkpoints = SERVICES["buckets"]["command"]
    assert mlflow == "mlflow=/run/secrets/s3_mlflow_credentials"
    assert checkpoints == "checkpoints=/run/secrets/s3_nodes_credentials"
    assert "--artifacts-destination=s3://mlflow" in SERVICES["mlflow"]["command"]
    (command,) = SERVICES["s3"]["command"]
    assert "--iam-dir /users posix /objects" in command, "not below the folder whose folders are buckets"


def test_both_pages_ask_for_a_password_and_know_their_own_origin() -> None:
    mlflow, prefect = SERVICES["mlflow"], SERVICES["prefect-server"]
    assert "--app-name=basic-auth" in mlflow["command"]
    assert mlflow["environment"]["MLFLOW_AUTH_CONFIG_PATH"] == "/run/secrets/mlflow_login"
    assert "PREFECT_SERVER_API_AUTH_STRING__FILE" in prefect["environment"]
    assert prefect["environment"]["PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED"] == "true"
    origins = (prefect["environment"]["PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"],
               mlflow["environment"]["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"])  # fmt: skip
    assert not any("*" in origin for origin in origins)
    for name in (name for name in SERVICES if name.startswith("prefect-worker")):
        assert {"prefect_auth", "mlflow_password"} <= set(SERVICES[name]["secrets"])


# --- the secrets ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What make-secrets.sh makes."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl")
    folder = tmp_path_factory.mktemp("docker")
    subprocess.run([shutil.copy(DOCKER / "make-secrets.sh", folder)], check=True, capture_output=True)
    return folder / "secrets"


def test_mlflow_reads_its_log_in(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_AUTH_CONFIG_PATH", str(secrets / "mlflow_login"))
    found = read_auth_config()
    assert (found.admin_username, found.admin_password) == ("dopsd", (secrets / "mlflow_password").read_text())
    assert SERVICES["prefect-worker"]["environment"]["MLFLOW_TRACKING_USERNAME"] == found.admin_username
    assert SERVICES["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"] == found.database_uri
    module, _, function = found.authorization_function.partition(":")
    file = f"{module.replace('.', '/')}.py"
    assert f"\ndef {function}()" in (INFRA.parent / file).read_text()
    assert f"!{file}" in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines(), "it is in the image"


def test_users_of_the_store_are_different(secrets: Path) -> None:
    access = {
        name: _keys(secrets / f"s3_{name}_credentials")["aws_access_key_id"] for name in ("root", "mlflow", "nodes")
    }
    assert len(set(access.values())) == 3
    assert access["root"] == (secrets / "s3_access_key").read_text()


def _keys(file: Path) -> dict[str, str]:
    found = configparser.ConfigParser()
    found.read(file)
    return dict(found["default"])


# --- make_buckets.py --------------------------------------------------------------------------------------------------


@pytest.fixture
def store(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 server (which has no users of its own), asked as root."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    httpx.post(f"{address}/moto-api/reset").raise_for_status()  # all of a process's servers remember together
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(secrets / "s3_root_credentials"))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    client = boto3.client("s3")
    yield client
    client.close()
    server.stop()


def _run(secrets: Path, monkeypatch: pytest.MonkeyPatch, status: int) -> list[AWSPreparedRequest]:
    """Run it; what it asked VersityGW's admin interface, which answers with ``status``."""
    spec = importlib.util.spec_from_file_location("make_buckets", DOCKER / "make_buckets.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    asked: list[AWSPreparedRequest] = []

    def send(request: AWSPreparedRequest) -> SimpleNamespace:
        asked.append(request)
        return SimpleNamespace(status_code=status, text="<Code>Refused</Code>")

    monkeypatch.setattr(module, "URLLib3Session", lambda: SimpleNamespace(send=send))
    module.main([f"{bucket}={secrets}/s3_{user}_credentials" for bucket, user in PAIRS.items()])
    return asked


PAIRS = {"mlflow": "mlflow", "checkpoints": "nodes"}


def test_each_bucket_is_for_one_user(store: Any, secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _run(secrets, monkeypatch, 201)
    asked = _run(secrets, monkeypatch, 409)  # again: they are there
    for request, (bucket, user) in zip(asked, PAIRS.items(), strict=True):
        keys = _keys(secrets / f"s3_{user}_credentials")
        assert (request.method, request.url) == ("PATCH", f"{store.meta.endpoint_url}/create-user")
        body = request.body.decode() if isinstance(request.body, bytes) else request.body
        assert body == (
            f"<Account><Access>{keys['aws_access_key_id']}</Access>"
            f"<Secret>{keys['aws_secret_access_key']}</Secret><Role>user</Role></Account>"
        )
        root = _keys(secrets / "s3_root_credentials")["aws_access_key_id"]
        assert f"Credential={root}/" in str(request.headers["Authorization"])
        (rule,) = json.loads(store.get_bucket_policy(Bucket=bucket)["Policy"])["Statement"]
        assert (rule["Effect"], rule["Principal"]) == ("Allow", {"AWS": [keys["aws_access_key_id"]]})
        assert rule["Resource"] == [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]
        assert set(ASKS) <= set(rule["Action"])
        assert not [action for action in rule["Action"] if "*" in action or "Policy" in action or "Acl" in action]


def test_a_user_that_cannot_be_made_stops_it(store: Any, secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="could not be made: 403"):
        _run(secrets, monkeypatch, 403)
    with pytest.raises(ClientError):
        store.head_bucket(Bucket="mlflow")


# --- Kubernetes -------------------------------------------------------------------------------------------------------


def test_on_kubernetes_the_bucket_is_mlflows_alone() -> None:
    holders = {path.name for path in (INFRA / "kubernetes").glob("*.yaml") if "{name: dopsd-s3" in path.read_text()}
    assert holders == {"mlflow.yaml"}
    assert "AWS_" not in (INFRA / "kubernetes" / "kustomization.yaml").read_text()


def test_on_kubernetes_prefect_asks_for_the_token_against_forged_requests() -> None:
    objects = [item for item in yaml.safe_load_all((INFRA / "kubernetes/prefect-server.yaml").read_text()) if item]
    (server,) = (item for item in objects if item["kind"] == "Deployment")
    (container,) = server["spec"]["template"]["spec"]["containers"]
    given = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert given["PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED"] == "true"
    assert "*" not in given["PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"]
    assert "PREFECT_SERVER_API_AUTH_STRING" in given
