"""Rivals that cannot be asked today's questions: which of that is a verdict, and which fails the stage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from dopsd import champions
from dopsd.config import Settings, load_settings
from dopsd.evaluation.suite import EvaluationError
from dopsd.identity import VersionIdentity
from dopsd.models import ModelError, resolved
from dopsd.registry import ANCHOR, CHAMPION, Registry
from tests.registered import MADE, OTHERS, TODAY, fresh_registry, holder, register, write_trained
from tests.scored import paired
from tests.test_drawing import Cramped
from tests.tiny_project import make_project


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    return fresh_registry(tmp_path, monkeypatch)


def _without_base(trained: dict[str, Any]) -> dict[str, Any]:
    """As of a base that is too large to be stored."""
    return {**trained, "files": {key: path for key, path in trained["files"].items() if key != "base"}}


def _delete_files(registry: Registry, version: int) -> None:
    """As a person who makes room does."""
    source = registry.client.get_model_version("dopsd-style-ink", str(version)).source
    shutil.rmtree(source.removeprefix("file://"))


def test_a_champion_that_cannot_be_asked_stays(registry: Registry, tmp_path: Path, trained: dict[str, Any]) -> None:
    first = register(registry, tmp_path, _without_base(trained))
    second = register(registry, tmp_path, trained, paired(learnt=0.9), asked=OTHERS, base="b2")
    assert not second.promoted
    assert second.reason == ("the champion (version 1): made for another base, which is gone: not compared; if this "
                             "version is better, set the aliases champion and anchor in MLflow to it")  # fmt: skip
    assert (holder(registry, CHAMPION), holder(registry, ANCHOR)) == (int(first.version), int(first.version))
    registry.client.set_registered_model_alias("dopsd-style-ink", CHAMPION, "2")
    third = register(registry, tmp_path, trained, paired(learnt=0.95), asked=OTHERS, base="b2", data="d3")
    assert third.promoted
    assert holder(registry, ANCHOR) == 2, "on the new ground"


def test_an_anchor_of_a_base_that_is_gone_is_none_any_more(
    registry: Registry, tmp_path: Path, trained: dict[str, Any]
) -> None:
    """A person chose it, so it outlives its ground; but nothing can be compared with it tonight, nor ever again."""
    for night, learnt in enumerate((0.5, 0.6)):
        assert register(registry, tmp_path, _without_base(trained), paired(learnt=learnt), data=f"d{night}").promoted
    here = register(registry, tmp_path, trained, paired(learnt=0.7), asked=OTHERS, base="b2")
    client = registry.client
    client.set_registered_model_alias("dopsd-style-ink", CHAMPION, here.version)
    client.set_registered_model_alias("dopsd-style-ink", ANCHOR, "2")
    worse = register(registry, tmp_path, trained, paired(learnt=0.6), asked=OTHERS, base="b2", data="d3")
    assert "worse than the champion (version 3)" in worse.reason, "it was compared"
    assert worse.reason.endswith("; the anchor (version 2): made for another base, which is gone: it is the anchor no "
                                 "longer, the champion is")  # fmt: skip
    assert holder(registry, ANCHOR) == int(here.version)
    better = register(registry, tmp_path, trained, paired(learnt=0.8), asked=OTHERS, base="b2", data="d4")
    assert better.promoted
    assert "anchor no longer" not in better.reason
    assert holder(registry, ANCHOR) == int(here.version)
    client.delete_registered_model_alias("dopsd-style-ink", CHAMPION)
    client.set_registered_model_alias("dopsd-style-ink", ANCHOR, "1")
    alone = register(registry, tmp_path, trained, paired(learnt=0.5), asked=OTHERS, base="b2", data="d5")
    assert alone.promoted
    assert holder(registry, ANCHOR) == int(alone.version), "with no champion it begins anew"


@pytest.fixture
def project(tmp_path: Path) -> Settings:
    """Data and base beside the registry; the settings of the concept."""
    make_project(tmp_path, ("style-ink",))
    return resolved(load_settings(tmp_path / "params.yaml").of("style-ink", tmp_path))


def test_another_vlm_is_no_other_base_to_whom_is_compared(
    registry: Registry, tmp_path: Path, trained: dict[str, Any], project: Settings
) -> None:
    """It is the teacher's; the champion draws what it always drew, on the base that is here."""
    register(registry, tmp_path, _without_base(trained))
    rivals, _ = champions._rivals(registry, "style-ink", "ground")
    (tmp_path / "again").mkdir()
    mine = champions._evaluate_again(registry, rivals, "style-ink", project, tmp_path, None, tmp_path / "again")
    same = champions._Questions("r", "ground", TODAY.drawing)
    second = register(registry, tmp_path, trained, mine["champion"], asked=same, settings=project, base="b2")
    assert second.promoted
    assert "no measurable difference" in second.reason


def test_a_champion_whose_files_are_gone_is_named_with_the_alias_to_move(
    registry: Registry, tmp_path: Path, trained: dict[str, Any], project: Settings
) -> None:
    """Somebody deleted them: no waiting brings them back."""
    register(registry, tmp_path, trained)
    _delete_files(registry, 1)
    second = register(registry, tmp_path, trained, paired(learnt=0.9), asked=OTHERS, settings=project, data="d2")
    assert second.reason == ("the champion (version 1): its adapter is gone from the tracker's files: not compared; if "
                             "this version is better, set the aliases champion and anchor in MLflow to it")  # fmt: skip
    for alias in (CHAMPION, ANCHOR):
        registry.client.set_registered_model_alias("dopsd-style-ink", alias, "2")
    assert register(registry, tmp_path, trained, paired(learnt=0.95), asked=OTHERS, data="d3").promoted
    _delete_files(registry, 2)
    fourth = register(registry, tmp_path, trained, paired(learnt=0.99), asked=OTHERS, settings=project, data="d4")
    assert fourth.reason == ("the anchor (version 2): its adapter is gone from the tracker's files: not compared; set "
                             "the alias anchor in MLflow to a version that can be, the champion say, and run stage "
                             "register again")  # fmt: skip
    registry.client.set_registered_model_alias("dopsd-style-ink", ANCHOR, "3")
    run = registry.client.get_model_version("dopsd-style-ink", "4").run_id
    again = register(registry, tmp_path, trained, paired(learnt=0.99), run, asked=OTHERS, data="d4")
    assert (again.version, again.promoted) == ("4", True)


def test_a_champion_whose_adapter_is_damaged_is_not_compared(
    registry: Registry, tmp_path: Path, trained: dict[str, Any], project: Settings
) -> None:
    register(registry, tmp_path, trained)
    (file,) = (tmp_path / "artifacts").rglob("artifacts/adapter.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    second = register(registry, tmp_path, trained, asked=OTHERS, settings=project, data="d2")
    assert second.reason.startswith("the champion (version 1): its adapter cannot be read (")
    assert registry.judged("style-ink", VersionIdentity(**{**MADE.__dict__, "data": "d2"}))


def _misfit(file: Path) -> None:
    """Every tensor twice as long and wide."""
    with safe_open(file, "pt") as opened:
        tensors = {key: opened.get_tensor(key).repeat(2, 2) for key in opened.keys()}  # noqa: SIM118 - not a mapping
        save_file(tensors, file, metadata=opened.metadata())


def test_an_adapter_that_does_not_fit_the_base_is_not_compared(
    registry: Registry, tmp_path: Path, trained: dict[str, Any], project: Settings
) -> None:
    register(registry, tmp_path, trained)
    _misfit(*(tmp_path / "artifacts").rglob("artifacts/adapter.safetensors"))
    second = register(registry, tmp_path, trained, asked=OTHERS, settings=project, data="d2")
    assert second.reason.startswith("the champion (version 1): cannot be drawn with these settings (")


def test_one_rivals_fault_is_not_said_of_both(
    registry: Registry, tmp_path: Path, trained: dict[str, Any], project: Settings
) -> None:
    """Champion and anchor are drawn together; the sound one is nothing that a person should give up."""
    for night, learnt in enumerate((0.5, 0.6)):
        assert register(registry, tmp_path, trained, paired(learnt=learnt), data=f"d{night}").promoted
    assert (holder(registry, CHAMPION), holder(registry, ANCHOR)) == (2, 1)
    source = registry.client.get_model_version("dopsd-style-ink", "1").source.removeprefix("file://")
    _misfit(*Path(source).rglob("artifacts/adapter.safetensors"))
    others = champions._Questions("r", TODAY.ground, TODAY.drawing)
    third = register(registry, tmp_path, trained, asked=others, settings=project, data="d3")
    assert third.reason.startswith("the anchor (version 1): cannot be drawn with these settings (")
    assert "set the alias anchor in MLflow to a version that can be" in third.reason


def test_want_of_memory_is_no_verdict(
    registry: Registry, tmp_path: Path, trained: dict[str, Any], project: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It passes; a verdict would stay, and every night pass the version over."""
    register(registry, tmp_path, trained)
    monkeypatch.setattr(champions, "load_base", lambda *_, **__: Cramped.of("transformer", 0))
    with pytest.raises(EvaluationError, match="has no memory for one picture"):
        register(registry, tmp_path, trained, asked=OTHERS, settings=project, data="d2")
    assert not registry.judged("style-ink", VersionIdentity(**{**MADE.__dict__, "data": "d2"}))
    assert holder(registry, "candidate") == 1


@pytest.mark.parametrize("made_for", ["b1", "b2"])
def test_a_backbone_that_is_absent_is_no_verdict(
    registry: Registry, tmp_path: Path, trained: dict[str, Any], project: Settings, made_for: str
) -> None:
    """Whether the champion is drawn on the base that is here, or on its own."""
    register(registry, tmp_path, trained)
    evaluation = project.evaluation.model_copy(update={"backbones": ("dinov2:models/dinov2-small",)})
    project = project.model_copy(update={"evaluation": evaluation})
    with pytest.raises(ModelError, match=r"evaluation\.backbones, dinov2"):
        register(registry, tmp_path, trained, asked=OTHERS, settings=project, data="d2", base=made_for)
    assert holder(registry, "candidate") == 1


@pytest.mark.parametrize("made_for", ["b1", "b2"])
def test_a_damaged_base_is_a_verdict_where_it_is_the_champions_own(
    registry: Registry, tmp_path: Path, trained: dict[str, Any], project: Settings, made_for: str
) -> None:
    """That one no person can mend; today's will be."""
    register(registry, tmp_path, trained)
    folder = tmp_path / "data/base/tiny" if made_for == "b1" else next((tmp_path / "artifacts").rglob("artifacts/base"))
    next((folder / "transformer").glob("*.safetensors")).unlink()
    if made_for == "b1":
        with pytest.raises(ModelError, match="has no weights"):
            register(registry, tmp_path, trained, asked=OTHERS, settings=project, data="d2")
        assert holder(registry, "candidate") == 1
    else:
        second = register(registry, tmp_path, trained, asked=OTHERS, settings=project, data="d2", base="b2")
        assert second.reason.startswith("the champion (version 1): cannot be drawn with these settings (")
