"""Published layouts go the whole way as a person takes it: the README's lines, `dvc repro`, the flow, every night.

Models are narrow stand-ins and settings are made small (tests.published_project says how); all else is as shipped.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from dvc.repo import Repo
from mlflow import MlflowClient
from PIL import Image
from prefect.testing.utilities import prefect_test_harness

from dopsd.config import load_settings
from dopsd.data.encoded import read_encoded
from dopsd.stages import STAGES
from flows.nightly import nightly
from flows.train import dopsd
from tests import published
from tests.published_project import (
    CONCEPT,
    RECIPES,
    ROOT,
    SMALL,
    edit_settings,
    make_clone,
    overrides_of,
    run,
    write_concept,
    write_stand_in,
)
from tests.published_tokens import Wording
from tests.test_recipes import database

__all__ = ["database"]

FULL, SHRUNK = "--size 1216x832", "--size 128x96"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=300):
        yield


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that are really run in this process, in order."""
    log: list[str] = []

    def noting(name: str, stage: Any) -> Any:
        def noted(*arguments: Any) -> None:
            log.append(name)
            stage(*arguments)

        return noted

    for name, stage in list(STAGES.items()):
        monkeypatch.setitem(STAGES, name, noting(name, stage))
    return log


def _small(few: int) -> dict[str, Any]:
    """Less is drawn than :mod:`tests.test_recipes` does, where all is as the recipes have it."""
    return SMALL | {"evaluation.steps": [few, few + 1]}


def _check_results(root: Path, concept: str, few: int) -> None:
    """What there is at the end of the way."""
    made = root / "runs" / concept
    metrics = json.loads((made / "evaluation" / "metrics.json").read_text())
    assert (metrics["few_steps"], metrics["models"]) == (few, ["base", "teacher", "d-opsd"])
    assert "<h1>" in (made / "report.html").read_text()
    assert str(root) not in (made / "export" / "README.md").read_text()
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    (version,) = client.search_model_versions(f"name='dopsd-{concept}'")
    assert int(json.loads((made / "registered.json").read_text())["version"]) == int(version.version) == 1


def _stages_run(said: str) -> list[str]:
    return re.findall(r"Running stage '([^']+)'", said)


# --- Z-Image-Turbo, by the README's lines -----------------------------------------------------------------------------


def _readme_lines() -> list[str]:
    """The commands of README's section, as they are."""
    section = (ROOT / "README.md").read_text().split("\n## Tune Z-Image-Turbo\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    return block.splitlines()


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A clone in which the README was followed to the letter; what each line said, by its first two words."""
    home = tmp_path_factory.mktemp("home")
    clone = make_clone(home / "clone")
    write_concept(home / "my-pictures")
    said = {}
    for line in _readme_lines():
        said[" ".join(line.split()[:2])] = run(clone, line.replace(FULL, SHRUNK))
        if line.startswith("cp "):  # a person without a network names folders; a test shrinks what takes hours
            edit_settings(clone / "params.yaml", _small(8) | write_stand_in("z-image-turbo", home / "models"))
    return clone, said


def test_the_readmes_lines_tune_z_image_turbo(followed: tuple[Path, dict[str, str]]) -> None:
    clone, said = followed
    assert list(said) == ["cp recipes/z-image-turbo.yaml", "dopsd concept", "dvc repro", "dopsd show", "dopsd sample"]
    assert any(FULL in line for line in _readme_lines())
    stages = _stages_run(said["dvc repro"])
    assert stages[:2] == ["base", f"plan@{CONCEPT}"]
    assert sorted(stages[2:]) == sorted(f"{stage}@{CONCEPT}" for stage in STAGES)
    _check_results(clone, CONCEPT, few=8)
    assert "D-OPSD" in said["dopsd show"]
    assert "export: " in said["dopsd show"]
    with Image.open(clone / "samples" / "00.png") as picture:
        assert f"--size {picture.width}x{picture.height}" == SHRUNK
    assert "8 steps" in said["dopsd sample"], "as many as the model is made for, unasked"
    examples = read_encoded(clone / "runs" / CONCEPT / "encoded").examples
    assert len({(example.height, example.width) for example in examples}) > 2, "mixed shapes"
    assert not run(clone, "git status --porcelain -- recipes")


def test_again_only_the_base_is_looked_at(followed: tuple[Path, dict[str, str]]) -> None:
    assert _stages_run(run(followed[0], "dvc repro")) == ["base", f"plan@{CONCEPT}"]


def test_a_nightly_run_finds_nothing_to_do_afterwards(
    followed: tuple[Path, dict[str, str]], server: None, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(followed[0])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    state = nightly(return_state=True)
    assert state.is_completed(), state.message
    assert state.result() == {CONCEPT: "skipped: nothing changed since its version was judged"}
    assert ran == []


def test_a_nightly_run_tunes_what_changed_and_the_next_finds_nothing(
    followed: tuple[Path, dict[str, str]], server: None, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the others: it leaves the clone with a second version."""
    clone, _ = followed
    monkeypatch.chdir(clone)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    made, changed = clone / "runs" / CONCEPT, ["train.max_steps=1"]
    before = json.loads((made / "registered.json").read_text())
    why = f"settings changed since version {before['version']}" if before["promoted"] else "it has no champion"
    state = nightly(overrides=changed, return_state=True)
    assert state.is_completed(), state.message
    assert state.result() == {CONCEPT: f"tuned: {why}"}
    assert ran == [stage for stage in STAGES if stage not in ("validate", "encode")], "`dvc repro` had made these"
    assert json.loads((made / "adapters" / "d-opsd.json").read_text())["steps"] == 1
    after = json.loads((made / "registered.json").read_text())
    assert int(after["version"]) == int(before["version"]) + 1
    assert after["run_id"] != before["run_id"], "another training"
    ran.clear()
    state = nightly(overrides=changed, return_state=True)
    assert state.result() == {CONCEPT: "skipped: nothing changed since its version was judged"}
    assert ran == []


def test_both_published_wordings_of_the_template_encode_alike(tmp_path: Path) -> None:
    """The text-only template drops a turn's picture, or dies of it: the teacher's turn must not depend on it."""
    found = []
    wordings: tuple[Wording, ...] = ("string", "startswith")
    for wording in wordings:
        root = tmp_path / wording
        base = published.write_z_image_turbo(root / "z", layers=1, wording=wording)
        vlm = published.write_qwen3_vl(root / "vlm", base)
        values = SMALL | {"model.path": str(base), "model.vlm": str(vlm)}
        settings = load_settings(RECIPES / "z-image-turbo.yaml", overrides_of(values))
        write_concept(root / "data" / "concepts" / CONCEPT)
        for stage in ("validate", "encode"):
            STAGES[stage](CONCEPT, settings, root)
        found.append(read_encoded(root / "runs" / CONCEPT / "encoded").examples)
    for one, other in zip(*found, strict=True):
        told, taught = one.prompt["caption"], one.context["caption"]
        # a token for 32 x 32 pixels: 64 x 64, or what fits into that area of a picture that is longer
        pictures = 4 if one.height == one.width else 2
        assert len(taught) == len(told) + pictures + 2, "the caption, the picture's tokens and the two around them"
        assert torch.equal(told, other.prompt["caption"])
        assert torch.equal(taught, other.context["caption"])


# --- klein (edits) and Krea-2, by dvc repro and by the flow -----------------------------------------------------------

OTHERS = {"krea-2-turbo": ("my-style", 8), "flux2-klein-edit": ("my-edit", 4)}
"""Recipe to the concept it is used for here, and its few steps."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    root = tmp_path_factory.mktemp("models")
    return {recipe: write_stand_in(recipe, root) for recipe in OTHERS}


def _take(recipe: str, file: Path, stand_in: dict[str, str]) -> None:
    """The recipe for its concept here, small."""
    concept, few = OTHERS[recipe]
    file.write_text((RECIPES / f"{recipe}.yaml").read_text())
    edit_settings(file, _small(few) | stand_in | {"concepts": [concept]})


def test_two_families_one_after_another_by_dvc(models: dict[str, dict[str, str]], tmp_path: Path) -> None:
    """As far as their encodings: the rest goes by DVC with Z-Image above, and by the flow with these two below."""
    clone = make_clone(tmp_path / "clone")
    for recipe, (concept, _) in OTHERS.items():
        _take(recipe, clone / "params.yaml", models[recipe])
        write_concept(tmp_path / concept, edits=recipe.endswith("edit"))
        run(clone, f"dopsd concept add ~/{concept} --name {concept}")
        wanted = ["base", *(f"{stage}@{concept}" for stage in ("plan", "validate", "encode"))]
        assert _stages_run(run(clone, f"dvc repro encode@{concept}")) == wanted
    again = run(clone, f"dvc repro encode@{concept}")
    assert _stages_run(again) == ["base", f"plan@{concept}"], "nothing else has changed"


def test_two_families_one_after_another_by_the_flow(
    models: dict[str, dict[str, str]], database: Path, server: None, ran: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(database, tmp_path)
    (tmp_path / "dopsd").symlink_to(ROOT / "dopsd")
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"concepts": [concept for concept, _ in OTHERS.values()]}))
    Repo.init(no_scm=True).close()
    for recipe, (concept, few) in OTHERS.items():
        params = f"{recipe}.yaml"
        _take(recipe, tmp_path / params, models[recipe])
        write_concept(tmp_path / "data" / "concepts" / concept, edits=recipe.endswith("edit"))
        first = dopsd(params=params, return_state=True)
        assert first.is_completed(), first.message
        assert ran == list(STAGES)
        _check_results(tmp_path, concept, few)
        ran.clear()
        assert dopsd(params=params, return_state=True).message == f"{concept}: reused: {', '.join(STAGES)}"
        assert ran == []
    assert nightly(params=params, return_state=True).is_completed()
    assert ran == []
    kept = yaml.safe_load((tmp_path / "krea-2-turbo.yaml").read_text())
    assert kept["concepts"] == ["my-style"], "one project, two settings files"
