"""Shared fixtures. Tests run on one thread: the models are tiny, and results must not depend on the machine's cores."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.family_folders import write_families

# Prefect keeps tasks' results in the home folder, for ever, also under its own test harness: what an earlier run on
# this machine did must not be remembered. It reads this when it is imported, which is after this file, here and in
# every process that tests start.
os.environ["PREFECT_LOCAL_STORAGE_PATH"] = tempfile.mkdtemp(prefix="dopsd-prefect-")
atexit.register(shutil.rmtree, os.environ["PREFECT_LOCAL_STORAGE_PATH"], ignore_errors=True)

LONGEST = (
    "test_whole_way.py",
    "test_services.py",
    "test_launch.py",
    "test_launch_ends.py",
    "test_elastic.py",
    "test_flows.py",
    "test_dvc_remotes.py",
    "test_safe_local.py",
    "test_cli.py",
    "test_recipes.py",
)
"""Files are shared out among the processes in this order, the others after them: the longest must not come last."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow files first; within a file the order stays."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A stand-in of every family's published folder, to be read alone: whoever changes one copies it."""
    root = tmp_path_factory.mktemp("published")

    def state() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in root.rglob("*")}

    made = write_families(root)
    before = state()
    yield made
    assert state() == before, "a test wrote into the folders that all tests share"


@pytest.fixture
def family():
    """A fresh random Z-Image family."""
    return tiny.tiny_family()
