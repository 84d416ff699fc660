"""The registry on a real MLflow store: versions, the gate, aliases; and the champion drawing in a fresh process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from safetensors import safe_open
from safetensors.torch import save_file

from dopsd import champions
from dopsd.config import Settings, load_settings
from dopsd.config.groups import LoraSettings, ModelSettings
from dopsd.distill.adapters import adapter_parameters, add_adapters, read_adapter, save_adapter
from dopsd.evaluation.paired import Paired
from dopsd.evaluation.suite import EvaluationError
from dopsd.export import CARD_FILE, COMFYUI_FILE, DIFFUSERS_FILE, draw_student, export_adapter
from dopsd.given import read_export
from dopsd.identity import VersionIdentity
from dopsd.models import ModelError, load_family, resolved
from dopsd.models.base import Request
from dopsd.models.z_image import ZImage
from dopsd.registry import ANCHOR, CHAMPION, Outcome, Registry, RegistryAway, Verdict
from dopsd.registry.gate import measure_deltas
from emoji_turbo import architecture
from tests import tiny
from tests.scored import entry, paired
from tests.test_drawing import Cramped
from tests.tiny_project import make_project

SETTINGS = load_settings(Path(__file__).parent.parent / "params.yaml")
MADE = VersionIdentity(data="d1", settings="s1", base="b1", method="m1")
TODAY, OTHERS = champions._Questions("q", "ground", "b1"), champions._Questions("r", "other ground", "b2")


def test_differences_are_named() -> None:
    assert MADE.differences(VersionIdentity(data="d2", settings="s1", base="b1", method="m2")) == [
        "data",
        "method version",
    ]
    assert MADE.differences(MADE) == []


# --- versions ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A random base, an adapter that changes a lot, its export, and what the student draws with it."""
    folder = tmp_path_factory.mktemp("trained")
    parts = tiny.tiny_parts()
    architecture.save_folder(folder / "base", **{k: parts[k] for k in ("vae", "tokenizer", "vlm", "transformer")})
    family = load_family(ModelSettings(path=str(folder / "base"), device="cpu", context_pixels=(4096, 4096)))
    lora = LoraSettings(rank=4)
    pair = add_adapters(family.transformer, lora, family.lora_targets, seed=0, kind="frozen")
    generator = torch.Generator().manual_seed(1)
    for key, value in adapter_parameters(family.transformer, "student").items():
        if "lora_B" in key:
            value.data.copy_(0.5 * torch.randn(value.shape, generator=generator))
    save_adapter(folder / "d-opsd.safetensors", family.transformer, "student", lora)
    pair.remove()
    (folder / "d-opsd.json").write_text("{}\n")
    export = export_adapter(folder / "d-opsd.safetensors", folder / "export", tiny.CARD, ZImage)
    asked = [(Request("a fox in [V] style"), 64, 64)]
    drawn = draw_student(family, folder / "d-opsd.safetensors", asked, 2, seed=0)
    files = {
        "adapter": export / DIFFUSERS_FILE, "comfyui": export / COMFYUI_FILE, "card": export / CARD_FILE,
        "about": folder / "d-opsd.json", "base": folder / "base",
    }  # fmt: skip
    return {"files": files, "drawn": drawn, "student": folder / "d-opsd.safetensors"}


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A fresh SQLite store of its own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return Registry(tmp_path)


def _run(registry: Registry, tmp_path: Path) -> str:
    client = registry.client
    found = client.get_experiment_by_name("test")
    experiment = found.experiment_id if found else client.create_experiment("test", (tmp_path / "artifacts").as_uri())
    return client.create_run(experiment).info.run_id


def _register(
    registry: Registry, tmp_path: Path, trained: dict[str, Any], mine: Paired | None = None, run: str = "",
    asked: champions._Questions = TODAY, settings: Settings = SETTINGS, **made: str,
) -> Outcome:  # fmt: skip
    """As stage register does, with scores that are given."""
    mine, identity = mine or paired(), VersionIdentity(**{**MADE.__dict__, **made})
    verdict, anchor = champions._judge(registry, "style-ink", identity, mine, asked, settings, tmp_path)
    call = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 0.0}
    serving = {"base": "data/base", "revision": None, "call": call}
    return registry.register(
        "style-ink", run or _run(registry, tmp_path), identity, entry(tmp_path / "scores", mine, asked.asked), verdict,
        {"dopsd.base": "tiny", "dopsd.base.drawing": asked.drawing}, trained["files"], serving, anchor,
    )  # fmt: skip


def _holder(registry: Registry, alias: str) -> int | None:
    found = registry.holder("style-ink", alias)
    return int(found[0].version) if found else None


def test_a_worse_challenger_does_not_become_champion(
    registry: Registry, tmp_path: Path, trained: dict[str, Any]
) -> None:
    first = _register(registry, tmp_path, trained, paired(learnt=0.5))
    worse = _register(registry, tmp_path, trained, paired(learnt=0.4), data="d2")
    assert (first.promoted, worse.promoted) == (True, False)
    assert _holder(registry, CHAMPION) == int(first.version)
    client = MlflowClient(registry.uri)
    candidate = client.get_model_version_by_alias("dopsd-style-ink", "candidate")
    assert int(candidate.version) == int(worse.version)
    assert candidate.tags["dopsd.gate"] == "failed"
    assert (
        "worse than the champion (version 1), as far as can be told: likeness 0.400 against 0.500"
        in candidate.tags["dopsd.gate.reason"]
    )
    assert candidate.tags["dopsd.made.data"] == "d2"
    better = _register(registry, tmp_path, trained, paired(learnt=0.6), data="d3")
    assert better.promoted
    assert (_holder(registry, CHAMPION), _holder(registry, ANCHOR)) == (int(better.version), int(first.version))


def test_two_versions_can_be_compared_by_eye(registry: Registry, tmp_path: Path, trained: dict[str, Any]) -> None:
    """Side by side MLflow shows the names and metrics of their runs; each page says what it is beside the champion."""
    for learnt in (0.5, 0.6):
        _register(registry, tmp_path, trained, paired(learnt=learnt), data=f"d{learnt}")
    client = MlflowClient(registry.uri)
    first, second = (client.get_model_version("dopsd-style-ink", number) for number in ("1", "2"))
    assert [v.tags["dopsd.score.learnt"] for v in (first, second)] == ["0.5000", "0.6000"]
    metrics = [client.get_run(v.run_id).data.metrics for v in (first, second)]
    assert [m["score/learnt"] for m in metrics] == pytest.approx([0.5, 0.6])
    assert set(metrics[0]) == {"score/learnt", "score/kept", "score/few_step", "score/diversity"}
    assert client.get_run(second.run_id).info.run_name == (
        "style-ink v2 promoted beside the champion (version 1): better learnt +0.100 (+0.100 to +0.100); "
        "no measurable difference in kept, few_step"
    )
    beside = "Promoted to champion: beside the champion (version 1): better in likeness, no measurable difference in"
    assert second.description.startswith(beside)
    assert "| the champion (version 1) | likeness | 0.600 | 0.500 | +0.100" in second.description
    many = {f"score_{i}": {"better": "higher", "label": "a label of some length"} for i in range(40)}
    values = {score: {"first": (0.5, 0.6)} for score in many}
    verdict = Verdict(True, "x" * 3000)
    registry.register(
        "style-ink", first.run_id, MADE,
        entry(tmp_path / "scores", Paired(many, {"base": values, "version": values})), verdict, {}, trained["files"],
        {"base": "b", "revision": None, "call": {}},
    )  # fmt: skip
    assert _holder(registry, CHAMPION) == 3, "however much there is to say"
    said = client.get_run(first.run_id).info.run_name
    assert (said[:26], said[-2:], len(said)) == ("style-ink v3 promoted: xxx", "x…", 250)


# --- the anchor -------------------------------------------------------------------------------------------------------


def test_new_training_pictures_do_not_move_the_anchor_and_another_ground_does(
    registry: Registry, tmp_path: Path, trained: dict[str, Any]
) -> None:
    for night, learnt in enumerate((0.5, 0.52, 0.54)):
        assert _register(registry, tmp_path, trained, paired(learnt=learnt), data=f"d{night}").promoted
    noted = registry.anchor("style-ink") or pytest.fail("no anchor")
    assert (noted.version, noted.ground) == ("1", "ground")
    mine = paired(learnt=0.5)
    assert noted.deltas == pytest.approx(measure_deltas(mine.models["version"], mine.models["base"]))
    rivals, known = champions._rivals(registry, "style-ink", "ground")
    assert [rival.words for rival in rivals] == ["the champion (version 3)", "the anchor (version 1)"]
    assert known == noted
    rivals, known = champions._rivals(registry, "style-ink", "other ground")
    assert [rival.words for rival in rivals] == ["the champion (version 3)"]
    assert known is None, "it is the new anchor, with deltas of its own"


def test_an_anchor_set_by_hand_holds_until_the_ground_changes(
    registry: Registry, tmp_path: Path, trained: dict[str, Any]
) -> None:
    for night, learnt in enumerate((0.5, 0.6, 0.7)):
        assert _register(registry, tmp_path, trained, paired(learnt=learnt), data=f"d{night}").promoted
    registry.client.set_registered_model_alias("dopsd-style-ink", ANCHOR, "2")
    rivals, known = champions._rivals(registry, "style-ink", "ground")
    assert ([int(rival.version.version) for rival in rivals], known) == ([3, 2], None)
    refused = _register(registry, tmp_path, trained, paired(learnt=0.55), data="d9")
    assert "worse than the anchor (version 2), as far as can be told: likeness 0.550" in refused.reason
    noted = registry.anchor("style-ink") or pytest.fail("no anchor")
    assert (noted.version, noted.ground) == ("2", "ground")
    rivals, _ = champions._rivals(registry, "style-ink", "other ground")
    assert [int(rival.version.version) for rival in rivals] == [3]
    registry.client.set_registered_model_alias("dopsd-style-ink", ANCHOR, "1")
    rivals, _ = champions._rivals(registry, "style-ink", "other ground")
    assert [int(rival.version.version) for rival in rivals] == [3, 1], "chosen since"


def test_one_that_was_refused_is_nobodys_anchor(registry: Registry, tmp_path: Path, trained: dict[str, Any]) -> None:
    assert not _register(registry, tmp_path, trained, paired(kept=0.14)).promoted
    assert (_holder(registry, CHAMPION), _holder(registry, ANCHOR), registry.anchor("style-ink")) == (None, None, None)


@pytest.mark.parametrize("note", ["", "[]", "{}", '{"version": "1", "ground": "ground", "deltas": {"learnt": NaN}}'])
def test_a_broken_note_of_the_anchor_is_made_anew(
    registry: Registry, tmp_path: Path, trained: dict[str, Any], note: str
) -> None:
    _register(registry, tmp_path, trained)
    noted = registry.anchor("style-ink")
    registry.client.set_registered_model_tag("dopsd-style-ink", "dopsd.anchor", note)
    assert registry.anchor("style-ink") is None
    assert _register(registry, tmp_path, trained, paired(seed=2), data="d2").promoted
    assert registry.anchor("style-ink") == noted


def _with_scores(*names: str) -> Paired:
    """Others than an evaluation of before had."""
    about = {name: {"better": "higher", "label": name} for name in names}
    of = {model: {name: its.get(name, its["few_step"]) for name in names} for model, its in paired().models.items()}
    return Paired(about, of, 4)


def test_scores_that_cannot_be_used_are_asked_for_anew(
    registry: Registry, tmp_path: Path, trained: dict[str, Any]
) -> None:
    """Of a version from before there were any, of other questions, of other prompts, and what is no scores at all."""
    _register(registry, tmp_path, trained)
    (rival,), _ = champions._rivals(registry, "style-ink", "ground")
    found = 0

    def stored(asked: str = "q", mine: Paired | None = None) -> Paired | None:
        nonlocal found
        found += 1
        return champions._stored(registry, rival, mine or paired(), asked, tmp_path / f"found-{found}")

    assert stored() == paired()
    assert stored("others") is None
    assert stored(mine=paired(prompts=9)) is None
    assert stored(mine=_with_scores("learnt", "kept")) is None, "it has one more, which nobody could pass"
    assert stored(mine=_with_scores("learnt", "kept", "few_step", "few_step_kept")) is None
    (file,) = (tmp_path / "artifacts").rglob("artifacts/scores.json")
    for content in ("{", json.dumps({"version": 1}), file.read_text().replace('"version":', '"version": [') + "]"):
        file.write_text(content)
        assert stored() is None
    with file.open("wb") as large:
        large.truncate(2**30)
    assert stored() is None
    file.unlink()
    assert stored() is None, "of before"
    registry.client.delete_model_version_tag("dopsd-style-ink", "1", "dopsd.asked")
    (rival,), _ = champions._rivals(registry, "style-ink", "ground")
    assert stored() is None


# --- who cannot be compared ------------------------------------------------------------------------------------------


def _without_base(trained: dict[str, Any]) -> dict[str, Any]:
    """As of a base that is too large to be stored."""
    return {**trained, "files": {key: path for key, path in trained["files"].items() if key != "base"}}


def _delete_files(registry: Registry, version: int) -> None:
    """As a person who makes room does."""
    source = registry.client.get_model_version("dopsd-style-ink", str(version)).source
    shutil.rmtree(source.removeprefix("file://"))


def test_a_champion_that_cannot_be_asked_stays(registry: Registry, tmp_path: Path, trained: dict[str, Any]) -> None:
    first = _register(registry, tmp_path, _without_base(trained))
    second = _register(registry, tmp_path, trained, paired(learnt=0.9), asked=OTHERS, base="b2")
    assert not second.promoted
    assert second.reason == ("the champion (version 1): made for another base, which is gone: not compared; if this "
                             "version is better, set the aliases champion and anchor in MLflow to it")  # fmt: skip
    assert (_holder(registry, CHAMPION), _holder(registry, ANCHOR)) == (int(first.version), int(first.version))
    registry.client.set_registered_model_alias("dopsd-style-ink", CHAMPION, "2")
    third = _register(registry, tmp_path, trained, paired(learnt=0.95), asked=OTHERS, base="b2", data="d3")
    assert third.promoted
    assert _holder(registry, ANCHOR) == 2, "on the new ground"


def test_an_anchor_of_a_base_that_is_gone_is_none_any_more(
    registry: Registry, tmp_path: Path, trained: dict[str, Any]
) -> None:
    """A person chose it, so it outlives its ground; but nothing can be compared with it tonight, nor ever again."""
    for night, learnt in enumerate((0.5, 0.6)):
        assert _register(registry, tmp_path, _without_base(trained), paired(learnt=learnt), data=f"d{night}").promoted
    here = _register(registry, tmp_path, trained, paired(learnt=0.7), asked=OTHERS, base="b2")
    client = registry.client
    client.set_registered_model_alias("dopsd-style-ink", CHAMPION, here.version)
    client.set_registered_model_alias("dopsd-style-ink", ANCHOR, "2")
    worse = _register(registry, tmp_path, trained, paired(learnt=0.6), asked=OTHERS, base="b2", data="d3")
    assert "worse than the champion (version 3)" in worse.reason, "it was compared"
    assert worse.reason.endswith("; the anchor (version 2): made for another base, which is gone: it is the anchor no "
                                 "longer, the champion is")  # fmt: skip
    assert _holder(registry, ANCHOR) == int(here.version)
    better = _register(registry, tmp_path, trained, paired(learnt=0.8), asked=OTHERS, base="b2", data="d4")
    assert better.promoted
    assert "anchor no longer" not in better.reason
    assert _holder(registry, ANCHOR) == int(here.version)
    client.delete_registered_model_alias("dopsd-style-ink", CHAMPION)
    client.set_registered_model_alias("dopsd-style-ink", ANCHOR, "1")
    alone = _register(registry, tmp_path, trained, paired(learnt=0.5), asked=OTHERS, base="b2", data="d5")
    assert alone.promoted
    assert _holder(registry, ANCHOR) == int(alone.version), "with no champion it begins anew"


@pytest.fixture
def project(tmp_path: Path) -> Settings:
    """Data and base beside the registry; the settings of the concept."""
    make_project(tmp_path, ("style-ink",))
    return resolved(load_settings(tmp_path / "params.yaml").of("style-ink", tmp_path))


def test_another_vlm_is_no_other_base_to_whom_is_compared(
    registry: Registry, tmp_path: Path, trained: dict[str, Any], project: Settings
) -> None:
    """It is the teacher's; the champion draws what it always drew, on the base that is here."""
    _register(registry, tmp_path, _without_base(trained))
    rivals, _ = champions._rivals(registry, "style-ink", "ground")
    (tmp_path / "again").mkdir()
    mine = champions._evaluate_again(registry, rivals, "style-ink", project, tmp_path, None, tmp_path / "again")
    same = champions._Questions("r", "ground", TODAY.drawing)
    second = _register(registry, tmp_path, trained, mine["champion"], asked=same, settings=project, base="b2")
    assert second.promoted
    assert "no measurable difference" in second.reason


def test_a_champion_whose_files_are_gone_is_named_with_the_alias_to_move(
    registry: Registry, tmp_path: Path, trained: dict[str, Any], project: Settings
) -> None:
    """Somebody deleted them: no waiting brings them back."""
    _register(registry, tmp_path, trained)
    _delete_files(registry, 1)
    second = _register(registry, tmp_path, trained, paired(learnt=0.9), asked=OTHERS, settings=project, data="d2")
    assert second.reason == ("the champion (version 1): its adapter is gone from the tracker's files: not compared; if "
                             "this version is better, set the aliases champion and anchor in MLflow to it")  # fmt: skip
    for alias in (CHAMPION, ANCHOR):
        registry.client.set_registered_model_alias("dopsd-style-ink", alias, "2")
    assert _register(registry, tmp_path, trained, paired(learnt=0.95), asked=OTHERS, data="d3").promoted
    _delete_files(registry, 2)
    fourth = _register(registry, tmp_path, trained, paired(learnt=0.99), asked=OTHERS, settings=project, data="d4")
    assert fourth.reason == ("the anchor (version 2): its adapter is gone from the tracker's files: not compared; set "
                             "the alias anchor in MLflow to a version that can be, the champion say, and run stage "
                             "register again")  # fmt: skip
    registry.client.set_registered_model_alias("dopsd-style-ink", ANCHOR, "3")
    run = registry.client.get_model_version("dopsd-style-ink", "4").run_id
    again = _register(registry, tmp_path, trained, paired(learnt=0.99), run, asked=OTHERS, data="d4")
    assert (again.version, again.promoted) == ("4", True)


def test_a_champion_whose_adapter_is_damaged_is_not_compared(
    registry: Registry, tmp_path: Path, trained: dict[str, Any], project: Settings
) -> None:
    _register(registry, tmp_path, trained)
    (file,) = (tmp_path / "artifacts").rglob("artifacts/adapter.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    second = _register(registry, tmp_path, trained, asked=OTHERS, settings=project, data="d2")
    assert second.reason.startswith("the champion (version 1): its adapter cannot be read (")
    assert registry.judged("style-ink", VersionIdentity(**{**MADE.__dict__, "data": "d2"}))


def test_an_adapter_that_does_not_fit_the_base_is_not_compared(
    registry: Registry, tmp_path: Path, trained: dict[str, Any], project: Settings
) -> None:
    _register(registry, tmp_path, trained)
    (file,) = (tmp_path / "artifacts").rglob("artifacts/adapter.safetensors")
    with safe_open(file, "pt") as opened:
        tensors = {key: opened.get_tensor(key).repeat(2, 2) for key in opened.keys()}  # noqa: SIM118 - not a mapping
        save_file(tensors, file, metadata=opened.metadata())
    second = _register(registry, tmp_path, trained, asked=OTHERS, settings=project, data="d2")
    assert second.reason.startswith("the champion (version 1): cannot be drawn with these settings (")


def test_want_of_memory_is_no_verdict(
    registry: Registry, tmp_path: Path, trained: dict[str, Any], project: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It passes; a verdict would stay, and every night pass the version over."""
    _register(registry, tmp_path, trained)
    monkeypatch.setattr(champions, "load_base", lambda *_, **__: Cramped.of("transformer", 0))
    with pytest.raises(EvaluationError, match="has no memory for one picture"):
        _register(registry, tmp_path, trained, asked=OTHERS, settings=project, data="d2")
    assert not registry.judged("style-ink", VersionIdentity(**{**MADE.__dict__, "data": "d2"}))
    assert _holder(registry, "candidate") == 1


@pytest.mark.parametrize("made_for", ["b1", "b2"])
def test_a_backbone_that_is_absent_is_no_verdict(
    registry: Registry, tmp_path: Path, trained: dict[str, Any], project: Settings, made_for: str
) -> None:
    """Whether the champion is drawn on the base that is here, or on its own."""
    _register(registry, tmp_path, trained)
    evaluation = project.evaluation.model_copy(update={"backbones": ("dinov2:models/dinov2-small",)})
    project = project.model_copy(update={"evaluation": evaluation})
    with pytest.raises(ModelError, match=r"evaluation\.backbones, dinov2"):
        _register(registry, tmp_path, trained, asked=OTHERS, settings=project, data="d2", base=made_for)
    assert _holder(registry, "candidate") == 1


@pytest.mark.parametrize("made_for", ["b1", "b2"])
def test_a_damaged_base_is_a_verdict_where_it_is_the_champions_own(
    registry: Registry, tmp_path: Path, trained: dict[str, Any], project: Settings, made_for: str
) -> None:
    """That one no person can mend; today's will be."""
    _register(registry, tmp_path, trained)
    folder = tmp_path / "data/base/tiny" if made_for == "b1" else next((tmp_path / "artifacts").rglob("artifacts/base"))
    next((folder / "transformer").glob("*.safetensors")).unlink()
    if made_for == "b1":
        with pytest.raises(ModelError, match="has no weights"):
            _register(registry, tmp_path, trained, asked=OTHERS, settings=project, data="d2")
        assert _holder(registry, "candidate") == 1
    else:
        second = _register(registry, tmp_path, trained, asked=OTHERS, settings=project, data="d2", base="b2")
        assert second.reason.startswith("the champion (version 1): cannot be drawn with these settings (")


# --- what a version holds ---------------------------------------------------------------------------------------------


def test_a_version_brings_the_base_that_it_was_made_for(
    registry: Registry, tmp_path: Path, trained: dict[str, Any]
) -> None:
    _register(registry, tmp_path, trained)
    version, *_ = registry.champion("style-ink") or pytest.fail("no champion")
    base = registry.base(version, tmp_path / "place") or pytest.fail("no base")
    of = "transformer/diffusion_pytorch_model.safetensors"
    assert (base / of).read_bytes() == (trained["files"]["base"] / of).read_bytes()
    assert not (base / "vlm").exists(), "its teacher's half draws nothing"
    without = {**trained, "files": {key: path for key, path in trained["files"].items() if key != "base"}}
    _register(registry, tmp_path, without, paired(learnt=0.6), data="d2")
    version, *_ = registry.champion("style-ink") or pytest.fail("no champion")
    assert registry.base(version, tmp_path / "other") is None


def test_a_version_holds_its_adapter_once_and_it_can_be_evaluated_again(
    registry: Registry, tmp_path: Path, trained: dict[str, Any]
) -> None:
    """What comes back is the trained adapter to bfloat16's rounding, in the form that the evaluation reads."""
    _register(registry, tmp_path, trained)
    version, *_ = registry.champion("style-ink") or pytest.fail("no champion")
    stored = [path.name for path in (tmp_path / "artifacts").rglob("*.safetensors") if "base" not in path.parts]
    assert sorted(stored) == ["adapter.safetensors", "comfyui.safetensors"]
    given = registry.adapter(version, tmp_path / "place") or pytest.fail("no adapter")
    again = read_export(given, tmp_path / "again" / "a.safetensors")
    (mine, rank, alpha), (theirs, *scale) = read_adapter(again), read_adapter(trained["student"])
    assert [rank, alpha] == scale
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(mine[key], value.to(torch.bfloat16).float()), key


def test_registering_the_same_run_again_makes_no_second_version(
    registry: Registry, tmp_path: Path, trained: dict[str, Any]
) -> None:
    run = _run(registry, tmp_path)
    first = _register(registry, tmp_path, trained, paired(), run)
    again = _register(registry, tmp_path, trained, paired(), run)
    assert again.version == first.version
    assert registry.judged("style-ink", MADE)
    assert not registry.judged("style-ink", VersionIdentity("other", "s1", "b1", "m1"))


def test_the_champion_draws_in_a_fresh_process_from_the_registry_alone(
    registry: Registry, tmp_path: Path, trained: dict[str, Any]
) -> None:
    _register(registry, tmp_path, trained)
    script = """
import json, sys, mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1])
images = mlflow.pyfunc.load_model("models:/dopsd-style-ink@champion").predict(["a fox in [V] style"])
again = mlflow.pyfunc.load_model("models:/dopsd-style-ink@champion").predict(["a fox in [V] style"], params={"seed": 1})
assert not any(name == "dopsd" or name.startswith("dopsd.") for name in sys.modules)
print(json.dumps([np.asarray(i).tolist() for i in (images[0], again[0])]))
"""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script, registry.uri], cwd=elsewhere, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    picture, other = (np.array(p, np.uint8) for p in json.loads(done.stdout.splitlines()[-1]))
    assert picture.shape == (64, 64, 3)
    assert np.abs(picture.astype(int) - other).mean() > 1, "another seed, another picture"
    theirs = np.asarray(trained["drawn"][0].image.convert("RGB")).astype(int)
    assert np.abs(picture.astype(int) - theirs).mean() < 0.5, "from the same noise, the student's picture"


def test_a_registry_that_does_not_answer_is_no_fault_of_the_data(
    tmp_path: Path, trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    with pytest.raises(RegistryAway) as caught:
        Registry(tmp_path).champion("style-ink")
    assert "secret" not in str(caught.value)
    assert not isinstance(caught.value, ValueError), "so that the flow tries again"
