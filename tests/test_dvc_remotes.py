"""Data by DVC: pushed to a remote by one person, pulled by another in a clone elsewhere, and nothing is run again.

The remotes are a local directory and an S3 server on 127.0.0.1. The project is a copy of this one, small: its code, its
`dvc.yaml` and `params.yaml`, and a tiny random base.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest
import yaml
from concept_folders import make, picture
from moto.server import ThreadedMotoServer

from dopsd.emoji_turbo import architecture
from tests import tiny

ROOT = Path(__file__).parent.parent
NAME = "mine"
COPIED = (".dvc/.gitignore", ".dvc/plots", ".dvcignore", ".gitignore", "dopsd", "dvc.yaml", "params.yaml")
STAGES = (f"validate@{NAME}", f"encode@{NAME}")
"""The stages that are cheap. Their outputs and the concept are all that DVC has here."""
KEPT = (f"data/concepts/{NAME}", f"runs/{NAME}/validated.json", f"runs/{NAME}/encoded")
KEYS = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "not-a-secret", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass(frozen=True)
class Remote:
    """Where the data goes: its address, and what each person sets for themselves alone."""

    url: str
    endpoint: str | None = None


def _run(where: Path, *command: str, fails: bool = False) -> str:
    """Run a command in a clone, with that clone's code and no settings of this machine; returns what it said."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "DVC_", "GIT_"))}
    environment = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(where),
        "HOME": str(where.parent),
        "DVC_GLOBAL_CONFIG_DIR": str(where.parent / "dvc-global"),
        "DVC_SYSTEM_CONFIG_DIR": str(where.parent / "dvc-system"),
        "DVC_SITE_CACHE_DIR": str(where.parent / f"{where.name}-site"),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
        "OMP_NUM_THREADS": "1",
    }
    for who in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{who}_NAME": "a person", f"GIT_{who}_EMAIL": "person@example.org"}
    done = subprocess.run(
        command, cwd=where, env=inherited | KEYS | environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=1800,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


def _dvc(where: Path, *arguments: str, fails: bool = False) -> str:
    return _run(where, sys.executable, "-m", "dvc", *arguments, fails=fails)


def _commit(where: Path) -> None:
    _run(where, "git", "add", "--all")
    _run(where, "git", "commit", "--quiet", "--message", "data")


def _clone(source: Path, target: Path) -> Path:
    _run(source, "git", "clone", "--quiet", str(source), str(target))
    return target


def _files(where: Path) -> dict[str, bytes]:
    """What DVC keeps, by path in the clone."""
    below = [path for kept in KEPT for path in [where / kept, *(where / kept).rglob("*")]]
    return {str(path.relative_to(where)): path.read_bytes() for path in below if path.is_file()}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a concept added, its cheap stages run, all of it committed; no remote yet."""
    root = tmp_path_factory.mktemp("author") / "project"
    for path in COPIED:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / path).is_dir():
            shutil.copytree(ROOT / path, root / path, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / path, root / path)
    parts = tiny.tiny_parts()
    base = {key: parts[key] for key in ("vae", "tokenizer", "vlm", "transformer")}
    architecture.save_folder(root / "data/base/tiny", **base)
    (root / ".dvc/config").touch()
    settings = yaml.safe_load((root / "params.yaml").read_text())
    settings["concepts"] = ["never-run", NAME]
    settings["model"] |= {"path": "data/base/tiny", "vlm": None, "device": "cpu", "context_pixels": [4096, 4096]}
    settings["data"] |= {"resolution": 64, "min_images": 4}
    (root / "params.yaml").write_text(yaml.safe_dump(settings))
    _run(root, "git", "init", "--quiet")
    _commit(root)

    pictures = make(root.parent / "pictures", count=4)
    for number in range(4):
        picture(number, (64, 64)).save(pictures / f"{number}.png")
    _run(root, "dopsd", "concept", "add", str(pictures), "--name", NAME)
    said = _dvc(root, "repro", *STAGES)
    assert said.count("Running stage") == len(STAGES)
    _commit(root)
    return root


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An S3 server with an empty bucket ``data``; its address."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=address, region_name=KEYS["AWS_DEFAULT_REGION"],
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"], aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip
    client.create_bucket(Bucket="data")
    client.close()
    yield address
    server.stop()


@pytest.fixture(params=["directory", "s3"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Remote:
    if request.param == "directory":
        return Remote(str(tmp_path / "store"))
    return Remote("s3://data/dopsd", endpoint=request.getfixturevalue("s3"))


def _local(where: Path, remote: Remote) -> None:
    """What a person sets in their own clone; git never sees it."""
    if remote.endpoint:
        _dvc(where, "remote", "modify", "--local", "store", "endpointurl", remote.endpoint)


def test_pushed_data_is_pulled_elsewhere_and_nothing_runs_again(project: Path, remote: Remote, tmp_path: Path) -> None:
    # The author, in a clone of their own, whose cache is the one the stages filled.
    author = _clone(project, tmp_path / "author")
    shutil.copytree(project / ".dvc/cache", author / ".dvc/cache")
    _dvc(author, "remote", "add", "--default", "store", remote.url)
    _commit(author)
    _local(author, remote)
    assert "pushed" in _dvc(author, "push")
    assert "up to date" in _dvc(author, "push"), "a second push has nothing to do"
    assert not _run(author, "git", "status", "--porcelain")

    # A colleague, who has git and the remote and nothing else.
    colleague = _clone(author, tmp_path / "colleague")
    shutil.rmtree(author)
    assert not _files(colleague)
    assert not (colleague / ".dvc/cache").exists()
    _local(colleague, remote)
    _dvc(colleague, "pull", "--allow-missing")
    assert _files(colleague) == _files(project)

    said = _dvc(colleague, "repro", *STAGES)
    assert "Running stage" not in said
    for stage in STAGES:
        assert f"Stage '{stage}' didn't change" in said
    assert "up to date" in said
    assert not _run(colleague, "git", "status", "--porcelain"), "neither the locks nor the settings changed"
    shared = (colleague / ".dvc/config").read_text()
    assert not any(secret in shared for secret in [*KEYS.values(), remote.endpoint or "endpointurl"])


def test_without_its_data_a_concept_is_named(project: Path, tmp_path: Path) -> None:
    clone = _clone(project, tmp_path / "clone")
    assert "no remote specified" in _dvc(clone, "pull", f"data/concepts/{NAME}", fails=True)
    # A remote that is there and has nothing: somebody forgot to push.
    _dvc(clone, "remote", "add", "--default", "store", str(tmp_path / "empty"))
    (tmp_path / "empty").mkdir()
    assert f"data/concepts/{NAME}" in _dvc(clone, "pull", f"data/concepts/{NAME}", fails=True)
    assert f"missing data 'source': data/concepts/{NAME}" in _dvc(clone, "repro", STAGES[0], fails=True)
