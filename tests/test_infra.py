"""What infra/ promises, checked without an engine, a cluster or a cloud: its files parse, fit together and keep to the
lock's versions, nothing listens outside by itself, and no secret is in them. A check that needs a tool which may be
missing is skipped without it."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dopsd.memory import reasons_to_run, remember

ROOT = Path(__file__).parent.parent
INFRA = ROOT / "infra"
DOCKER = INFRA / "docker"
KUBERNETES = INFRA / "kubernetes"

ONCE = {"buckets", "deploy"}
"""Compose services that do their work and end: they have no health."""
OF_OTHERS = {"dopsd-ray"}
"""Secrets that are not a person's to make: KubeRay's, named like its cluster."""
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|AUTH_STRING|ACCESS_KEY|CREDENTIAL")
READS_A_FILE = re.compile(r"(_FILE|_PATH)$")


def _pins(path: Path) -> dict[str, str]:
    lines = [line.partition(" ;")[0] for line in path.read_text().splitlines() if "==" in line and line[0] != "#"]
    return dict(line.split("==") for line in lines)


LOCK = _pins(ROOT / "requirements.lock")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def _load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def _filled(text: str) -> str:
    """A compose value with its variables at their defaults."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


@functools.cache
def _objects() -> list[dict[str, Any]]:
    """Every Kubernetes object of the kustomization."""
    files = [KUBERNETES / name for name in _load(KUBERNETES / "kustomization.yaml")["resources"]]
    return [item for path in files for item in yaml.safe_load_all(path.read_text()) if item]


def _pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and pod template of everything that runs pods."""
    for item in _objects():
        name, spec = item["metadata"]["name"], item.get("spec", {})
        if item["kind"] in ("Deployment", "Job"):
            yield name, spec["template"]
        elif item["kind"] == "RayCluster":
            for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
                yield f"{name} {group.get('groupName', 'head')}", group["template"]


COMPOSE = _load(DOCKER / "compose.yaml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


# --- everywhere -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(INFRA.rglob("*.y*ml")), ids=lambda path: str(path.relative_to(INFRA)))
def test_yaml_is_valid(path: Path) -> None:
    assert [item for item in yaml.safe_load_all(path.read_text()) if item]


@pytest.mark.parametrize("path", sorted(INFRA.rglob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_valid_and_executable(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert os.access(path, os.X_OK)


def test_no_file_holds_a_secret() -> None:
    """Neither a key block, nor a password in an address; the folder of secrets is ignored by git."""
    for path in INFRA.rglob("*"):
        if path.is_file() and "secrets" not in path.relative_to(INFRA).parts[:-1]:
            text = path.read_text()
            assert "PRIVATE KEY" not in text, path
            assert not re.search(r"://\w+:(?!PASSWORD)[^/@\s$.'\"]+@", text), path
    assert "*" in (DOCKER / "secrets" / ".gitignore").read_text().splitlines()


def test_the_image_has_the_projects_version_everywhere() -> None:
    assert _filled(SERVICES["mlflow"]["image"]) == f"dopsd:{VERSION}"
    assert _load(KUBERNETES / "kustomization.yaml")["images"][0]["newTag"] == VERSION
    assert _load(INFRA / "ray-cluster.yaml")["docker"]["image"].endswith(f"/dopsd:{VERSION}")


# --- the image --------------------------------------------------------------------------------------------------------


def _dockerfile() -> list[tuple[str, str]]:
    text = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    return [(line.split()[0], line.partition(" ")[2]) for line in lines if line and not line.startswith("#")]


def test_the_image_is_pinned_and_does_not_run_as_root() -> None:
    steps = _dockerfile()
    arguments = dict(rest.split("=", 1) for word, rest in steps if word == "ARG")
    assert re.fullmatch(r"python:3\.11\.\d+-slim(-\w+)?", arguments["PYTHON_IMAGE"])
    assert re.fullmatch(r"[\d.]+", arguments["UV_VERSION"])
    assert [rest for word, rest in steps if word == "FROM"] == ["${PYTHON_IMAGE}"]
    users = [rest for word, rest in steps if word == "USER"]
    assert users
    assert users[-1].partition(":")[0] not in ("root", "0")


def test_containers_remember_on_their_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image's own commands, in a folder that stands for ``/app``."""
    (command,) = [rest for word, rest in _dockerfile() if word == "RUN" and "dvc init" in rest]
    command = command.replace("/app", str(tmp_path)).partition("&& chown")[0]
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "dvc.yaml").write_text('stages: {x: {matrix: {c: [a]}, cmd: "true", outs: ["runs/${item.c}/o"]}}')
    (tmp_path / "runs/a/o").write_text("made")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    done = subprocess.run(["bash", "-ec", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    remember("x", tmp_path, "a")
    assert reasons_to_run("x", "a", tmp_path) == []
    assert (tmp_path / "dvc.lock").is_symlink()
    assert "runs/a/o" in (tmp_path / "runs/dvc.lock").read_text()
    assert list((tmp_path / ".cache/dvc/files").rglob("*")), "DVC's cache is on a volume too"


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    ignore = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignore if line.startswith("!")}
    assert ignore[1] == "*", "an allow-list: what it does not name stays out"
    assert not any(
        name.startswith("infra/docker/secrets") or name in ("runs", "infra", "infra/docker") for name in kept
    )
    for word, rest in _dockerfile():
        if word == "COPY":
            *sources, _ = [part for part in rest.split() if not part.startswith("--")]
            for source in sources:
                assert source == "." or (source in kept and (ROOT / source).exists()), source


def test_the_clusters_lock_completes_the_lock() -> None:
    """Ray's dashboard and health checks, and Postgres, at versions of their own; nothing is pinned twice."""
    extra = _pins(DOCKER / "cluster.lock")
    assert not set(extra) & set(LOCK)
    assert "psycopg2-binary" in extra
    for line in importlib.metadata.requires("ray") or []:
        needed, _, condition = line.partition(";")
        if 'extra == "default"' in condition and '>= "3.1' not in condition.replace("'", '"'):
            name = re.match(r"[\w.-]+", needed)
            assert name
            assert name[0].lower().replace("_", "-") in LOCK | extra, f"{line}: make cluster.lock anew"


# --- compose ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_pinned_healthy_and_restarted(name: str) -> None:
    service = SERVICES[name]
    assert re.search(r":v?\d+\.\d+[\w.-]*$", _filled(service["image"])), service["image"]
    assert "restart" in service
    assert "no-new-privileges:true" in service["security_opt"]
    if name not in ONCE:
        assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
        assert {"interval", "timeout", "retries"} <= set(service["healthcheck"])
    for other, wanted in service.get("depends_on", {}).items():
        assert wanted["condition"] == ("service_completed_successfully" if other in ONCE else "service_healthy")
        assert other in SERVICES
        # a service without a profile must not wait for one that is only there with it
        assert set(SERVICES[other].get("profiles", [])) <= set(service.get("profiles", []))


@pytest.mark.parametrize("name", SERVICES)
def test_service_listens_on_this_machine_only(name: str) -> None:
    assert "network_mode" not in SERVICES[name]
    for port in SERVICES[name].get("ports", []):
        assert isinstance(port, str)
        assert _filled(port).startswith("127.0.0.1:"), port


@pytest.mark.parametrize("name", SERVICES)
def test_service_gets_its_secrets_as_files(name: str) -> None:
    service = SERVICES[name]
    environment = service.get("environment", {})
    for key in environment:
        assert not SECRET.search(key) or READS_A_FILE.search(key), f"{key} has a literal value"
    said = " ".join(map(str, [*environment.values(), service.get("command", "")]))
    used = set(re.findall(r"/run/secrets/(\w+)", said))
    assert used <= set(service.get("secrets", []))
    assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])
    if any(key.endswith("__FILE") for key in environment):
        assert "entrypoint" not in service, "with-secrets.sh is the image's entry point"


def test_compose_names_what_it_declares() -> None:
    volumes, networks = set(COMPOSE["volumes"]), set(COMPOSE["networks"])
    for service in SERVICES.values():
        assert set(service.get("networks", [])) <= networks
        for source in (mount.split(":")[0] for mount in service.get("volumes", [])):
            assert source in volumes or (DOCKER / source).exists(), source
    overlay = _load(DOCKER / "compose.machines.yaml")
    assert set(overlay["volumes"]) <= volumes
    assert set(overlay["networks"]) <= networks


def test_every_ray_node_has_the_same_folders_and_asks_for_the_token() -> None:
    nodes = [service for name, service in SERVICES.items() if name.startswith(("ray-", "prefect-worker"))]
    assert len(nodes) == 5
    for service in nodes:
        assert {"runs:/app/runs", "data:/app/data", "cache:/app/.cache"} <= set(service["volumes"])
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["DOPSD_ROOT"] == "/app", "prefect.yaml asks the worker"
    for name in ("ray-worker", "prefect-worker"):
        assert SERVICES[name]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_make_secrets_makes_each_secret_once(tmp_path: Path) -> None:
    if not shutil.which("openssl"):
        pytest.skip("no openssl")
    script = Path(shutil.copy(DOCKER / "make-secrets.sh", tmp_path))
    subprocess.run([script], check=True, capture_output=True)
    made = {path.name: path.read_bytes() for path in (tmp_path / "secrets").iterdir()}
    assert set(made) == set(COMPOSE["secrets"])
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    assert len(made["oauth2_cookie_secret"]) == 32
    assert made["s3_secret_key"] in made["s3_root_credentials"]
    assert not any(made[name].endswith(b"\n") for name in ("ray_auth_token", "prefect_auth", "postgres_password"))
    subprocess.run([script], check=True, capture_output=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "secrets").iterdir()} == made


def test_with_secrets_reads_files_into_the_environment(tmp_path: Path) -> None:
    command = [str(DOCKER / "with-secrets.sh"), "printenv", "WORD"]
    (tmp_path / "secret").write_text("a $word and 'quotes'\n")

    def run(file: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": os.environ["PATH"], "WORD__FILE": str(tmp_path / file)}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    assert run("secret").stdout == "a $word and 'quotes'\n"
    lost = run("none")
    assert lost.returncode == 1
    assert "make-secrets.sh" in lost.stderr


def _compose_command() -> list[str] | None:
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            said = subprocess.run([*command, "version", "--short"], capture_output=True, text=True)
            if said.returncode == 0 and not said.stdout.startswith("1."):
                return command
    return None


@pytest.mark.parametrize("overlay", [[], ["compose.machines.yaml"]])
def test_compose_itself_accepts_it(overlay: list[str]) -> None:
    command = _compose_command()
    if not command:
        pytest.skip("no docker compose")
    files = [part for name in ["compose.yaml", *overlay] for part in ("-f", str(DOCKER / name))]
    environment = {**os.environ, "DOPSD_NFS": "10.0.0.2", "DOPSD_NFS_PATH": "/export"}
    profiles = ["--profile", "gpu", "--profile", "cpu", "--profile", "tls"]
    subprocess.run([*command, *files, *profiles, "config", "--quiet"], env=environment, check=True)


# --- Kubernetes -------------------------------------------------------------------------------------------------------


def test_kustomization_takes_every_file_and_no_secret() -> None:
    listed = set(_load(KUBERNETES / "kustomization.yaml")["resources"])
    assert listed == {path.name for path in KUBERNETES.glob("*.yaml")} - {"kustomization.yaml"}
    for item in _objects():
        assert item["apiVersion"]
        assert item["kind"] != "Secret"
        assert re.fullmatch(r"[a-z0-9-]+", item["metadata"]["name"])
    names = [(item["kind"], item["metadata"]["name"]) for item in _objects()]
    assert len(set(names)) == len(names)


def test_selectors_find_pods() -> None:
    labels = [template["metadata"]["labels"] for _, template in _pods()]

    def found(selector: dict[str, str]) -> bool:
        own = {key: value for key, value in selector.items() if not key.startswith("ray.io/")}  # KubeRay's, added there
        return any(own.items() <= have.items() for have in labels)

    for item in _objects():
        if item["kind"] == "Deployment":
            wanted = item["spec"]["selector"]["matchLabels"]
            assert wanted.items() <= item["spec"]["template"]["metadata"]["labels"].items()
        elif item["kind"] == "Service":
            assert found(item["spec"]["selector"])
        elif item["kind"] == "NetworkPolicy":
            assert found(item["spec"]["podSelector"].get("matchLabels", {}))


@pytest.mark.parametrize(("name", "template"), _pods(), ids=lambda value: value if isinstance(value, str) else "")
def test_pods_are_bounded_watched_and_not_root(name: str, template: dict[str, Any]) -> None:
    spec = template["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    claims = {item["metadata"]["name"] for item in _objects() if item["kind"] == "PersistentVolumeClaim"}
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    assert {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v} <= claims
    for container in spec["containers"]:
        assert container["image"] == "dopsd", "kustomization.yaml says which"
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert "memory" in container["resources"]["limits"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        if spec.get("restartPolicy") != "OnFailure":
            ports = {port["name"] for port in container.get("ports", [])}
            for probe in (container["readinessProbe"], container["livenessProbe"]):
                assert isinstance(probe["httpGet"]["port"], int) or probe["httpGet"]["port"] in ports
        assert {mount["name"] for mount in container.get("volumeMounts", [])} <= set(volumes)


def test_pods_refer_to_secrets_that_the_readme_tells_how_to_make() -> None:
    readme = (INFRA / "README.md").read_text()
    for _, template in _pods():
        for container in template["spec"]["containers"]:
            for variable in container.get("env", []):
                assert not SECRET.search(variable["name"]) or "valueFrom" in variable, variable["name"]
    # yaml aliases make the same object appear twice; the text has each reference once
    text = " ".join(path.read_text() for path in KUBERNETES.glob("*.yaml"))
    for name, key in re.findall(r"secretKeyRef: \{name: ([\w-]+), key: ([\w-]+)\}", text):
        assert name in OF_OTHERS or re.search(rf"create secret generic {name}\b[^`]*--from-\w+={key}=", readme), name
    for name in re.findall(r"secretRef: \{name: ([\w-]+)(?:, optional: true)?\}", text):
        assert f"create secret generic {name} " in readme


def test_every_node_finds_the_hubs_models_in_one_shared_place() -> None:
    home = "/app/.cache/huggingface"
    for name, service in SERVICES.items():
        if name.startswith(("ray-", "prefect-worker")):
            assert service["environment"]["HF_HOME"] == home
            assert "hf_token" in service["secrets"]
    (map_,) = _load(KUBERNETES / "kustomization.yaml")["configMapGenerator"]
    assert f"HF_HOME={home}" in map_["literals"]
    pods = dict(_pods())
    for name in ("dopsd-ray head", "dopsd-ray gpu", "prefect-worker"):
        (container,) = pods[name]["spec"]["containers"]
        assert {"secretRef": {"name": "dopsd-hub", "optional": True}} in container["envFrom"]
        assert {"name": "cache", "mountPath": "/app/.cache"} in container["volumeMounts"]
    options = _load(INFRA / "ray-cluster.yaml")["docker"]["run_options"]
    assert f"-e HF_HOME={home}" in options
    assert "-v /mnt/dopsd/cache:/app/.cache" in options


def test_ray_on_kubernetes_is_the_locks_asks_for_the_token_and_shrinks_to_nothing() -> None:
    (cluster,) = (item for item in _objects() if item["kind"] == "RayCluster")
    spec = cluster["spec"]
    assert spec["rayVersion"] == LOCK["ray"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert cluster["metadata"]["name"] in OF_OTHERS
    (group,) = spec["workerGroupSpecs"]
    assert (group["minReplicas"], group["replicas"]) == (0, 0)
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_kustomize_itself_accepts_it() -> None:
    if not shutil.which("kubectl"):
        pytest.skip("no kubectl")
    built = subprocess.run(["kubectl", "kustomize", str(KUBERNETES)], capture_output=True, text=True, check=True).stdout
    objects = [item for item in yaml.safe_load_all(built) if item]
    assert {item["metadata"].get("namespace", "dopsd") for item in objects} == {"dopsd"}
    maps = {item["metadata"]["name"] for item in objects if item["kind"] == "ConfigMap"}
    assert set(re.findall(r"configMapRef:\s+name: (\S+)", built)) == maps, "also inside the RayCluster"
    assert "image: dopsd\n" not in built, "the registry's name reaches the RayCluster too"


# --- the cluster launcher ---------------------------------------------------------------------------------------------


def test_ray_cluster_fits_rays_schema() -> None:
    found = importlib.util.find_spec("ray")  # not imported: that takes seconds
    assert found
    assert found.origin
    config = _load(INFRA / "ray-cluster.yaml")
    jsonschema.validate(config, json.loads((Path(found.origin).parent / "autoscaler/ray-schema.json").read_text()))
    kinds = config["available_node_types"]
    assert config["head_node_type"] in kinds
    assert sum(kind.get("max_workers", 0) for kind in kinds.values()) <= config["max_workers"]
    for name, kind in kinds.items():
        assert kind.get("min_workers", 0) == 0
        assert kind["node_config"]["SecurityGroupIds"], f"{name}: the one that Ray would make opens SSH to the world"
    assert kinds["l4-spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_ray_cluster_asks_for_the_token() -> None:
    config = _load(INFRA / "ray-cluster.yaml")
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "~/.ray/auth_token" in config["file_mounts"]


# --- what is said about it --------------------------------------------------------------------------------------------


def test_the_readme_names_every_file() -> None:
    readme = (INFRA / "README.md").read_text()
    for path in [*DOCKER.iterdir(), *KUBERNETES.iterdir(), *INFRA.glob("*.*")]:
        if path.name not in ("README.md", "secrets"):
            assert path.name in readme, path.name


def test_caddy_lets_nobody_in_without_asking() -> None:
    text = (DOCKER / "Caddyfile").read_text()
    sites = re.findall(r"^(\w+)\.\{\$DOPSD_DOMAIN:localhost\} \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    assert {name for name, _ in sites} == {"login", "mlflow", "prefect", "ray"}
    for name, body in sites:
        assert ("import secured" if name == "login" else "import login") in body
        (upstream,) = re.findall(r"reverse_proxy ([\w-]+):\d+", body)
        assert upstream in SERVICES
