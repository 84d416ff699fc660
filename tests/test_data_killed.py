"""``dopsd concept add`` killed at each of its steps: the second try works, nothing is lost and nothing is left over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from concept_folders import SETTINGS, make

from dopsd.data.concept import add_concept

ROOT = Path(__file__).parent.parent


def dvc(project: Path, *command: str) -> None:
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    subprocess.run([sys.executable, "-m", "dvc", *command, "-q"], cwd=project, check=True, env=environment)


@pytest.mark.parametrize(("how", "links"), [("fresh", "symlink"), ("replace", "copy"), ("in-place", "hardlink")])
def test_killed_at_any_step_the_second_try_works_and_nothing_is_lost(tmp_path: Path, how: str, links: str) -> None:
    project = tmp_path / "project"
    project.mkdir()
    subprocess.run(["git", "init", "-q", "--template="], cwd=project, check=True)
    dvc(project, "init")
    dvc(project, "config", "cache.type", links)
    (project / "params.yaml").write_text("concepts: [other]\n")
    folder, before = make(tmp_path / "new", 4, first=10), {}
    if how == "replace":
        add_concept(make(tmp_path / "old", 4), "mine", project, SETTINGS)
    elif how == "in-place":
        make(project / "data/concepts/mine", 4, first=10)
        (project / "data/concepts/mine/.notes").write_text("mine")
    before = data_of({str(p.relative_to(project)): p.read_bytes().hex() for p in (project / "data").rglob("*.*")
                      if p.is_file()})  # fmt: skip
    command = [sys.executable, "-m", "tests.killed", project, folder, how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    unbroken, *killed = map(json.loads, done.stdout.splitlines())
    assert len(killed) > 10
    new = data_of(unbroken["after"])
    assert len(new) == 6 + (how == "in-place")
    for row in killed:
        step = f"{row['step']}\n{done.stderr}"
        assert row["refused"], step
        if how != "fresh":
            assert data_of(row["before"]) in (before, new), f"not whole after {step}"
        assert row["again"] == 0, f"after {step}"
        assert row["after"] == unbroken["after"], f"after {step}"
    assert any(name.endswith("/mine.dvc") for name in unbroken["after"])
    assert unbroken["after"]["params.yaml"] == b"concepts: [other, mine]\n".hex()


def data_of(seen: dict[str, str]) -> dict[str, str]:
    return {name: content for name, content in seen.items() if name.startswith("data/concepts/mine/")}
