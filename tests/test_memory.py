"""``dvc.lock`` asked and told without ``dvc repro``, in a small project of DVC's own without git."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from dvc.repo import Repo

from dopsd.memory import PipelineBusy, PipelineError, no_reader, reasons_to_run, remember, remember_data

PIPELINE = """
stages:
  train:
    matrix: {concept: "${concepts}"}
    cmd: cp data/concepts/${item.concept}/x runs/${item.concept}/adapter
    deps: ["data/concepts/${item.concept}"]
    params: ["runs/${item.concept}/plan.json": [train]]
    outs: ["runs/${item.concept}/adapter"]
"""
CONCEPTS = ("a", "b-c")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "params.yaml").write_text(json.dumps({"concepts": CONCEPTS}))
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    for concept in CONCEPTS:
        (tmp_path / "data/concepts" / concept).mkdir(parents=True)
        (tmp_path / "runs" / concept).mkdir(parents=True)
        (tmp_path / "data/concepts" / concept / "x").write_text(concept)
        _plan(tmp_path, concept, {"rate": 1})
        _run(tmp_path, concept)
    Repo.init(str(tmp_path), no_scm=True).close()
    monkeypatch.chdir(tmp_path)  # DVC works where it is called
    return tmp_path


def _plan(root: Path, concept: str, train: dict[str, int]) -> None:
    (root / "runs" / concept / "plan.json").write_text(json.dumps({"train": train, "other": 1}))


def _run(root: Path, concept: str) -> None:
    (root / "runs" / concept / "adapter").write_text((root / "data/concepts" / concept / "x").read_text())


def test_what_changed_is_said_and_what_was_made_is_remembered(root: Path) -> None:
    assert reasons_to_run("train", "a", root), "never run"
    remember("train", root, "a")
    assert reasons_to_run("train", "a", root) == []
    assert reasons_to_run("train", "b-c", root)

    _plan(root, "a", {"rate": 2})
    assert reasons_to_run("train", "a", root) == ["runs/a/plan.json: train modified"]
    _plan(root, "a", {"rate": 1})
    (root / "data/concepts/a/x").write_text("other")
    assert reasons_to_run("train", "a", root) == ["data/concepts/a modified"]
    (root / "data/concepts/a/x").write_text("a")
    (root / "runs/a/adapter").write_text("trained anew")
    assert reasons_to_run("train", "a", root) == ["runs/a/adapter modified since it was made"]
    (root / "runs/a/adapter").unlink()
    assert reasons_to_run("train", "a", root) == ["runs/a/adapter missing since it was made"]


def test_a_repro_finds_nothing_to_do_after_it(root: Path) -> None:
    for concept in CONCEPTS:
        remember("train", root, concept)
    with Repo(str(root)) as repo:
        assert repo.status() == {}
        assert repo.reproduce() == []


def test_many_may_remember_at_one_moment(root: Path) -> None:
    """Threads of a flow; and other processes, which hold DVC's own lock."""
    failed: list[BaseException] = []

    def work(concept: str) -> None:
        try:
            remember("train", root, concept)
            assert reasons_to_run("train", concept, root) == []
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(concept,)) for concept in CONCEPTS * 4]
    with Repo(str(root)) as repo, repo.lock:  # as another command would
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    with Repo(str(root)) as repo:
        assert repo.status() == {}


READER = """
import sys
from dvc.repo import Repo
from dvc.rwlock import rwlock
with Repo(".") as repo, rwlock(repo.tmp_dir, repo.fs, "dvc repro", [sys.argv[1]], [], False):
    print("reads", flush=True)
    sys.stdin.read()
"""


def test_a_plan_is_not_written_while_dvc_is_between_a_stage_and_its_record(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = root / "runs/a/plan.json"
    command = [sys.executable, "-c", READER, str(plan)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdin is not None
        assert reader.stdout.readline() == "reads\n"
        with monkeypatch.context() as patch:
            patch.setattr("dopsd.memory.PATIENCE", 0.01)
            with pytest.raises(PipelineBusy, match="dvc repro"), no_reader(plan, root):
                raise AssertionError("it was entered")
        threading.Timer(0.5, reader.stdin.close).start()  # it is done soon, and we wait for it
        with no_reader(plan, root):
            assert reader.wait(60) == 0


def test_changed_data_under_dvc_are_committed_too(root: Path) -> None:
    with Repo(str(root)) as repo:
        repo.add(str(root / "data/concepts/a"))
    pointer = root / "data/concepts/a.dvc"
    before = pointer.read_text()
    remember_data(root, "a")
    assert pointer.read_text() == before
    (root / "data/concepts/a/x").write_text("other")
    remember_data(root, "a")
    assert pointer.read_text() != before
    remember_data(root, "b-c")


def test_a_project_that_is_none_is_said_in_one_line(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with pytest.raises(PipelineError, match="not a DVC project; run `dvc init` there"):
        reasons_to_run("train", "a", elsewhere)
    with pytest.raises(PipelineError, match=r"params\.yaml: concepts does not list nobody; add it"):
        reasons_to_run("train", "nobody", root)
    remember("train", root, "a")
    (root / "dvc.lock").write_text("schema: '2.0'\nstages:\n  train@a:\n    cm")
    with pytest.raises(PipelineError, match=r"dvc\.lock") as caught:
        reasons_to_run("train", "a", root)
    assert "\n" not in str(caught.value)
