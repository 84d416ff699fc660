"""Data by DVC: pushed to a remote by one person, pulled by another in a clone elsewhere, and nothing is run again.

The remotes are a local directory and an S3 server on 127.0.0.1. The project is a small copy of this one: its code, its
`dvc.yaml`, a tiny random base.
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
from moto.server import ThreadedMotoServer

from dopsd.data.concept import RemoteAway, pull_missing
from tests.tiny_project import make_project, write_pictures

ROOT = Path(__file__).parent.parent
NAME = "mine"
CONCEPT = f"data/concepts/{NAME}"
STAGES = (f"validate@{NAME}", f"encode@{NAME}")
"""The cheap ones. What they made, and the concept, is all that DVC keeps here."""
KEPT = (CONCEPT, f"runs/{NAME}/validated.json", f"runs/{NAME}/encoded")
KEYS = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "not-a-secret", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass(frozen=True)
class Remote:
    """Where the data goes, and the address of the server where that is a person's own setting."""

    url: str
    endpoint: str | None = None


def _run(where: Path, *command: str, fails: bool = False) -> str:
    """Run a command in a clone, with that clone's code and none of this machine's settings; returns what it said."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "DVC_", "GIT_"))}
    own = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(where),
        "HOME": str(where.parent),
        "DVC_GLOBAL_CONFIG_DIR": str(where.parent / "no-config"),
        "DVC_SYSTEM_CONFIG_DIR": str(where.parent / "no-config"),
        "DVC_SITE_CACHE_DIR": str(where.parent / f"{where.name}-site"),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
        "OMP_NUM_THREADS": "1",
    }
    for who in ("AUTHOR", "COMMITTER"):
        own |= {f"GIT_{who}_NAME": "a person", f"GIT_{who}_EMAIL": "person@example.org"}
    done = subprocess.run(
        command, cwd=where, env=inherited | KEYS | own, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=1800,
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


def _add_remote(where: Path, remote: Remote) -> None:
    """What one person does once, and commits."""
    _dvc(where, "remote", "add", "--default", "store", remote.url)
    _commit(where)
    _set_for_oneself(where, remote)


def _set_for_oneself(where: Path, remote: Remote) -> None:
    """What everybody sets in their own clone; git never sees it."""
    if remote.endpoint:
        _dvc(where, "remote", "modify", "--local", "store", "endpointurl", remote.endpoint)


def _files(where: Path) -> dict[str, bytes]:
    """What DVC keeps, by path in the clone."""
    below = [path for kept in KEPT for path in [where / kept, *(where / kept).rglob("*")]]
    return {str(path.relative_to(where)): path.read_bytes() for path in below if path.is_file()}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a concept added, its cheap stages run, all of it committed; no remote yet."""
    root = make_project(tmp_path_factory.mktemp("made") / "project", concepts=["another"])
    (root / "dopsd").unlink()  # a clone's code is its own
    shutil.copytree(ROOT / "dopsd", root / "dopsd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / ".dvc/plots", root / ".dvc/plots")
    for path in (".dvc/.gitignore", ".dvcignore", ".gitignore"):
        shutil.copyfile(ROOT / path, root / path)
    (root / ".dvc/config").write_text("")  # with git
    _run(root, "git", "init", "--quiet")
    _commit(root)

    write_pictures(root.parent / "pictures", 4, 100, "blot number {} in [V] style")
    _run(root, "dopsd", "concept", "add", "../pictures", "--name", NAME)
    assert NAME in yaml.safe_load((root / "params.yaml").read_text())["concepts"], "nobody has to edit a file"
    assert _dvc(root, "repro", *STAGES).count("Running stage") == 2 + len(STAGES), "base and plan come first"
    _commit(root)
    return root


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 server with an empty bucket ``data``."""
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


def test_pushed_data_is_pulled_elsewhere_and_nothing_runs_again(project: Path, remote: Remote, tmp_path: Path) -> None:
    # the author: a clone with what the stages left in the cache
    author = _clone(project, tmp_path / "author")
    shutil.copytree(project / ".dvc/cache", author / ".dvc/cache")
    _add_remote(author, remote)
    assert "pushed" in _dvc(author, "push")
    assert not _run(author, "git", "status", "--porcelain"), "nothing is left to commit"

    # a colleague, who has git and the remote and nothing else
    colleague = _clone(author, tmp_path / "colleague")
    shutil.rmtree(author)
    assert not _files(colleague)
    assert not (colleague / ".dvc/cache").exists()
    _set_for_oneself(colleague, remote)
    _dvc(colleague, "pull", "--allow-missing")
    pulled = _files(colleague)
    assert pulled == _files(project)
    assert len(pulled) >= 4 + 1 + 1 + 2, "pictures, metadata.jsonl, validated.json, encoded"

    said = _dvc(colleague, "repro", *STAGES)
    assert [line for line in said.splitlines() if line.startswith("Running stage")] == [
        "Running stage 'base':", f"Running stage 'plan@{NAME}':",
    ]  # fmt: skip
    for stage in STAGES:
        assert f"Stage '{stage}' didn't change" in said
    assert not _run(colleague, "git", "status", "--porcelain"), "neither the locks nor the settings changed"
    shared = (colleague / ".dvc/config").read_text()
    assert not any(own in shared for own in [*KEYS.values(), remote.endpoint or "endpointurl"])


def test_data_that_nobody_pushed_is_named(project: Path, tmp_path: Path) -> None:
    clone = _clone(project, tmp_path / "clone")
    assert not pull_missing(clone, NAME), "no remote is set, so it is left to the stages to say what they lack"
    assert not (clone / CONCEPT).exists()
    said = _dvc(clone, "pull", CONCEPT, fails=True)
    assert "no default remote" in said
    assert CONCEPT in said

    _add_remote(clone, Remote(str(tmp_path / "empty")))
    assert CONCEPT in _dvc(clone, "pull", CONCEPT, fails=True)
    assert f"missing data 'source': {CONCEPT}" in _dvc(clone, "repro", STAGES[0], fails=True)
    with pytest.raises(RemoteAway, match=f"{CONCEPT}: dvc pull failed"):
        pull_missing(clone, NAME)


def test_nightly_brings_data_that_is_missing(project: Path, tmp_path: Path) -> None:
    clone = _clone(project, tmp_path / "clone")
    # A directory remote is laid out as the cache is: here the project's own cache is one.
    _add_remote(clone, Remote(str(project / ".dvc/cache")))
    assert pull_missing(clone, NAME)
    assert not pull_missing(clone, NAME), "it is here now"
    brought = _files(clone)
    assert brought == {path: content for path, content in _files(project).items() if path.startswith(CONCEPT)}
