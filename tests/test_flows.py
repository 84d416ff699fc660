"""The flows, run for real on a Prefect server of their own: what is reused, tried again, tuned at night."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort
from prefect.testing.utilities import prefect_test_harness

from dopsd.config import load_settings
from dopsd.data.concept import list_concept
from dopsd.evaluation.suite import evaluate
from dopsd.lock import concept_lock
from dopsd.project import StageError, read_concept
from dopsd.stages import STAGES
from dopsd.train.errors import LaunchError
from emoji_turbo import architecture
from flows.nightly import nightly
from flows.train import STAGE_TASKS, dopsd, is_infrastructure
from tests import tiny
from tests.tiny_project import blot, make_project

CONCEPTS = ("blots", "spots")
ALIASES = ("champion", "anchor")


@pytest.fixture(scope="module", autouse=True)
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=300):
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("project"), CONCEPTS, methods=["d-opsd"])


@pytest.fixture
def project(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return made


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """``stage concept`` of every stage that is really run, in order."""
    log: list[str] = []

    def noting(name: str, stage: Any) -> Any:
        def run(concept: str, *rest: Any) -> None:
            log.append(f"{name} {concept}")
            stage(concept, *rest)

        return run

    for name, stage in list(STAGES.items()):
        monkeypatch.setitem(STAGES, name, noting(name, stage))
    return log


def _artifact(key: str) -> Any:
    async def read() -> Any:
        async with get_client() as client:
            wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
            return await client.read_artifacts(artifact_filter=wanted, sort=ArtifactSort.CREATED_DESC)

    return asyncio.run(read())[0].data


def test_there_is_a_task_for_every_stage() -> None:
    assert list(STAGE_TASKS) == list(STAGES)


def test_a_run_goes_the_whole_way_and_a_second_one_reuses_every_stage(project: Path, ran: list[str]) -> None:
    first = dopsd(concepts=["blots"], return_state=True)
    assert first.is_completed(), first.message
    assert ran == [f"{stage} blots" for stage in STAGES]
    ran.clear()
    second = dopsd(concepts=["blots"], return_state=True)
    assert second.is_completed()
    assert ran == []
    assert second.message == f"blots: reused: {', '.join(STAGES)}"
    table = _artifact("blots-result")
    assert "| D-OPSD" in table
    assert "dopsd-blots` version 1 (champion)" in table


def test_an_adapter_of_other_settings_is_not_registered_as_one_of_todays(project: Path) -> None:
    settings = load_settings(Path("params.yaml"), ("train.seed=99",))
    with pytest.raises(StageError, match=r"d-opsd\.safetensors was trained from other settings.*run stage train first"):
        STAGES["register"]("blots", settings, project)


def test_data_that_change_while_they_are_validated_are_not_said_to_be_valid(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, validated = project / "data/concepts/blots/metadata.jsonl", project / "runs/blots/validated.json"
    text, before = file.read_text(), validated.read_text()

    def meanwhile(*arguments: Any) -> Any:
        found = read_concept(*arguments)
        file.write_text(text + "\n")
        return found

    monkeypatch.setattr("dopsd.stages.read_concept", meanwhile)
    try:
        with pytest.raises(StageError, match="data/concepts/blots changed while it was validated; run it again"):
            STAGES["validate"]("blots", load_settings(Path("params.yaml")), project)
    finally:
        file.write_text(text)
    assert validated.read_text() == before


def test_an_evaluation_setting_does_not_retrain(project: Path, ran: list[str]) -> None:
    assert dopsd(concepts=["blots"], overrides=["evaluation.max_prompts=2"], return_state=True).is_completed()
    assert ran == ["evaluate blots", "report blots", "register blots"]


def test_a_result_that_is_gone_is_made_again(project: Path, ran: list[str]) -> None:
    assert dopsd(concepts=["blots"], return_state=True).is_completed()
    ran.clear()
    (project / "runs/blots/report.html").unlink()
    assert dopsd(concepts=["blots"], return_state=True).is_completed()
    assert ran == ["report blots"]


def test_what_was_done_before_a_stage_failed_is_not_done_again(
    project: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("a mistake")

    how: dict[str, Any] = {"concepts": ["blots"], "overrides": ["train.seed=3"], "return_state": True}
    with monkeypatch.context() as patch:
        patch.setitem(STAGES, "evaluate", fails)
        assert dopsd(**how).is_failed()
    assert ran == ["train blots"]
    assert dopsd(**how).is_completed()
    assert ran == ["train blots", "evaluate blots", "report blots", "register blots"]


def test_the_same_concept_twice_at_one_moment_is_tuned_once(project: Path, ran: list[str]) -> None:
    """Both end well; the second waits and reuses."""
    shutil.rmtree(project / "runs/blots/evaluation")
    states: list[Any] = []
    threads = [
        threading.Thread(target=lambda: states.append(dopsd(concepts=["blots"], return_state=True))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [state.is_completed() for state in states] == [True, True]
    assert ran.count("evaluate blots") == 1


def test_a_bad_data_set_fails_at_once_with_every_fault_and_stops_nobody_else(project: Path, ran: list[str]) -> None:
    folder = project / "data/concepts/broken"
    shutil.copytree(project / "data/concepts/spots", folder)
    settings = (project / "params.yaml").read_text()
    list_concept(project / "params.yaml", "broken")
    (folder / "0.png").unlink()
    (folder / "1.png").write_bytes(b"no picture")
    try:
        state = dopsd(concepts=["broken", "blots"], return_state=True)
        assert state.is_failed()
        assert "broken: failed: data/concepts/broken" in state.message.replace(str(project) + "/", "")
        assert "blots: reused" in state.message
        assert ran.count("validate broken") == 1, "it is not tried again"
        faults = json.loads(_artifact("broken-faults"))
        assert len(faults) == 2
        assert all(fault["problem"] for fault in faults)
    finally:
        shutil.rmtree(folder)
        (project / "params.yaml").write_text(settings)


def test_a_concept_that_the_settings_do_not_list_is_named(project: Path, ran: list[str]) -> None:
    state = dopsd(concepts=["unheard-of"], return_state=True)
    assert state.is_failed()
    assert "params.yaml: concepts does not list unheard-of" in state.message
    assert ran == []


def _dvc(*arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _ran_by_dvc(said: str) -> list[str]:
    """The stages that DVC ran; base and plan, which always run, left out."""
    found = re.findall(r"^Running stage '(.*)':", said, re.MULTILINE)
    return [name for name in found if name.partition("@")[0] not in ("base", "plan")]


def test_what_one_door_made_is_known_at_the_other(project: Path, ran: list[str], tmp_path: Path) -> None:
    """A folder without git: ``dvc init --no-scm``, as in a container."""
    assert dopsd(return_state=True).is_completed()
    assert _ran_by_dvc(_dvc("repro", "--dry")) == [], "after a flow `dvc repro` does nothing"
    _dvc("remote", "add", "--default", "store", str(tmp_path / "store"))
    assert "pushed" in _dvc("push")
    assert "evaluation/metrics.json" in _dvc("metrics", "show")

    how = project / "data/concepts/blots/train.yaml"
    how.write_text("# a comment\n" + how.read_text())
    assert _ran_by_dvc(_dvc("repro", "--dry")) == ["validate@blots"], "the folder is another one"
    assert _ran_by_dvc(_dvc("repro", "encode@blots")) == ["validate@blots"], "and says the same"
    ran.clear()
    assert dopsd(return_state=True).is_completed()
    assert ran == [], "after `dvc repro` a flow reuses everything"
    (project / "runs/blots/encoded/index.json").unlink()
    assert dopsd(return_state=True).is_completed()
    assert ran == ["encode blots"], "equal results are equal files"


def test_two_doors_at_one_moment(project: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A flow is at work on one concept: `dvc repro` of that one says who holds it, of the other it goes through."""
    seen: dict[str, Any] = {}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

    def evaluate(*_: Any) -> None:
        for concept, how in (("blots", []), ("spots", ["--single-item", "--force"])):
            command = [sys.executable, "-m", "dvc", "repro", *how, f"report@{concept}"]
            seen[concept] = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path})
        kept.append((project / "runs/blots/plan.json").exists())

    kept: list[bool] = []
    assert dopsd(return_state=True).is_completed()
    with monkeypatch.context() as patch:
        patch.setitem(STAGES, "evaluate", evaluate)
        (project / "runs/blots/evaluation/scores.csv").unlink()
        dopsd(concepts=["blots"], return_state=True)
    assert seen["blots"].returncode != 0
    assert "blots is held by `flow run " in seen["blots"].stderr
    assert f"(process {os.getpid()} on " in seen["blots"].stderr
    assert kept == [True], "DVC deletes results before it runs a stage: the flow's plan must not be among them"
    assert seen["spots"].returncode == 0, seen["spots"].stderr
    assert dopsd(return_state=True).is_completed()


def test_a_flow_waits_for_a_concept_only_so_long(
    project: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.train.LOCK_SECONDS", 0.01)
    with concept_lock("blots", project, "dopsd train"):
        state = dopsd(return_state=True)
    assert state.is_failed()
    assert "blots: failed: blots is held by `dopsd train` (process" in state.message
    assert "spots: reused" in state.message, "it holds up nobody else"
    assert ran == []


def test_faults_of_the_machines_alone_are_tried_again() -> None:
    from prefect.states import Failed

    from dopsd.config import SettingsError
    from dopsd.train.trainer import TrainError

    def retried(error: Exception) -> bool:
        return is_infrastructure(None, None, Failed(data=error))

    assert retried(LaunchError("the cluster is gone"))
    assert retried(ConnectionError("no route"))
    assert not retried(TrainError("the loss is not finite"))
    assert not retried(SettingsError("train.rank: unknown setting"))
    assert not retried(KeyError("a mistake in the code"))


def test_a_version_that_the_registry_lost_is_registered_again(project: Path, ran: list[str]) -> None:
    assert dopsd(concepts=["blots"], return_state=True).is_completed()
    MlflowClient(f"sqlite:///{project}/mlflow.db").delete_registered_model("dopsd-blots")
    ran.clear()
    assert dopsd(concepts=["blots"], return_state=True).is_completed()
    assert ran == ["register blots"]


def test_a_champion_of_another_base_draws_with_that_one(project: Path) -> None:
    """What it was compared with is in the registry alone: the base in the project is another one now."""
    assert dopsd(concepts=["blots"], return_state=True).is_completed()
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    before = client.get_model_version_by_alias("dopsd-blots", "champion")
    parts = tiny.tiny_parts(seed=5)
    architecture.save_folder(
        project / "data/base/tiny", **{key: parts[key] for key in ("vae", "tokenizer", "vlm", "transformer")}
    )
    assert dopsd(concepts=["blots"], return_state=True).is_completed()
    after = client.get_model_version_by_alias("dopsd-blots", "candidate")
    assert int(after.version) == int(before.version) + 1
    assert after.tags["dopsd.made.base"] != before.tags["dopsd.made.base"]
    assert "champion" in after.tags["dopsd.gate.reason"]
    assert "not compared" not in after.tags["dopsd.gate.reason"]


def test_nightly_tunes_what_changed_and_nothing_else(
    ran: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make_project(tmp_path / "project", CONCEPTS, methods=["d-opsd"])
    monkeypatch.chdir(project)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def tuned() -> list[str]:
        found = [line.removeprefix("register ") for line in ran if line.startswith("register ")]
        ran.clear()
        return sorted(found)

    first = nightly(return_state=True)
    assert first.is_completed(), first.message
    assert tuned() == ["blots", "spots"]
    assert nightly(return_state=True).is_completed()
    assert nightly(overrides=["data.min_images=3", "train.preview_steps=3"], return_state=True).is_completed()
    assert ran == [], "neither changes what is learnt"
    blot(np.random.default_rng(99)).save(project / "data/concepts/blots/0.png")
    assert nightly(return_state=True).is_completed()
    assert tuned() == ["blots"]
    decisions = {row["concept"]: row["decision"] for row in json.loads(_artifact("nightly"))}
    assert decisions["blots"].startswith("tuned: data changed since version ")
    assert decisions["spots"].startswith("skipped")

    (project / "data/concepts/blots/1.png").write_bytes(b"no picture")
    blot(np.random.default_rng(98)).save(project / "data/concepts/spots/0.png")
    last = nightly(return_state=True)
    assert last.is_failed(), "one is broken"
    assert tuned() == ["spots"], "which did not stop the other"
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    assert int(client.get_model_version_by_alias("dopsd-spots", "candidate").version) == 2

    holders = {alias: client.get_model_version_by_alias("dopsd-spots", alias).version for alias in ALIASES}
    assert {alias: int(version) for alias, version in holders.items()} == {"champion": 2, "anchor": 1}

    evaluated: list[list[str]] = []

    def noting(family: Any, table: Any, holdout: Any, world: Any, subjects: Any, *rest: Any, **more: Any) -> Any:
        evaluated.append([subject.name for subject in subjects])
        return evaluate(family, table, holdout, world, subjects, *rest, **more)

    monkeypatch.setattr("dopsd.evaluation.suite.evaluate", noting)
    blot(np.random.default_rng(97)).save(project / "data/concepts/spots/0.png")
    changes = ["train.max_steps=4", "registry.tolerance=0"]
    assert nightly(concepts=["spots"], overrides=changes, return_state=True).is_completed()
    assert tuned() == ["spots"]
    assert evaluated == [["base", "teacher", "d-opsd"], ["base", "champion", "anchor"]], "both anew, at once"
    challenger = client.get_model_version_by_alias("dopsd-spots", "candidate")
    assert int(challenger.version) == 3
    assert challenger.tags["dopsd.gate.reason"].startswith("worse than the champion (version 2)")
    assert {alias: client.get_model_version_by_alias("dopsd-spots", alias).version for alias in ALIASES} == holders
