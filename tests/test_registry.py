"""The registry on a real MLflow store: versions, the gate, aliases; and the champion drawing in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from dopsd import champions
from dopsd.distill.adapters import read_adapter
from dopsd.evaluation.paired import Paired
from dopsd.given import read_export
from dopsd.identity import VersionIdentity
from dopsd.registry import ANCHOR, CHAMPION, Registry, RegistryAway, Verdict
from dopsd.registry.gate import measure_deltas
from tests.registered import MADE, fresh_registry, holder, register, run_of, write_trained
from tests.scored import entry, paired


def test_differences_are_named() -> None:
    assert MADE.differences(VersionIdentity(data="d2", settings="s1", base="b1", method="m2")) == [
        "data",
        "method version",
    ]
    assert MADE.differences(MADE) == []


# --- versions ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    return fresh_registry(tmp_path, monkeypatch)


def test_a_worse_challenger_does_not_become_champion(
    registry: Registry, tmp_path: Path, trained: dict[str, Any]
) -> None:
    first = register(registry, tmp_path, trained, paired(learnt=0.5))
    worse = register(registry, tmp_path, trained, paired(learnt=0.4), data="d2")
    assert (first.promoted, worse.promoted) == (True, False)
    assert holder(registry, CHAMPION) == int(first.version)
    client = MlflowClient(registry.uri)
    candidate = client.get_model_version_by_alias("dopsd-style-ink", "candidate")
    assert int(candidate.version) == int(worse.version)
    assert candidate.tags["dopsd.gate"] == "failed"
    assert (
        "worse than the champion (version 1), as far as can be told: likeness 0.400 against 0.500"
        in candidate.tags["dopsd.gate.reason"]
    )
    assert candidate.tags["dopsd.made.data"] == "d2"
    better = register(registry, tmp_path, trained, paired(learnt=0.6), data="d3")
    assert better.promoted
    assert (holder(registry, CHAMPION), holder(registry, ANCHOR)) == (int(better.version), int(first.version))


def test_two_versions_can_be_compared_by_eye(registry: Registry, tmp_path: Path, trained: dict[str, Any]) -> None:
    """Side by side MLflow shows the names and metrics of their runs; each page says what it is beside the champion."""
    for learnt in (0.5, 0.6):
        register(registry, tmp_path, trained, paired(learnt=learnt), data=f"d{learnt}")
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
    assert holder(registry, CHAMPION) == 3, "however much there is to say"
    said = client.get_run(first.run_id).info.run_name
    assert (said[:26], said[-2:], len(said)) == ("style-ink v3 promoted: xxx", "x…", 250)


# --- the anchor -------------------------------------------------------------------------------------------------------


def test_new_training_pictures_do_not_move_the_anchor_and_another_ground_does(
    registry: Registry, tmp_path: Path, trained: dict[str, Any]
) -> None:
    for night, learnt in enumerate((0.5, 0.52, 0.54)):
        assert register(registry, tmp_path, trained, paired(learnt=learnt), data=f"d{night}").promoted
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
        assert register(registry, tmp_path, trained, paired(learnt=learnt), data=f"d{night}").promoted
    registry.client.set_registered_model_alias("dopsd-style-ink", ANCHOR, "2")
    rivals, known = champions._rivals(registry, "style-ink", "ground")
    assert ([int(rival.version.version) for rival in rivals], known) == ([3, 2], None)
    refused = register(registry, tmp_path, trained, paired(learnt=0.55), data="d9")
    assert "worse than the anchor (version 2), as far as can be told: likeness 0.550" in refused.reason
    noted = registry.anchor("style-ink") or pytest.fail("no anchor")
    assert (noted.version, noted.ground) == ("2", "ground")
    rivals, _ = champions._rivals(registry, "style-ink", "other ground")
    assert [int(rival.version.version) for rival in rivals] == [3]
    registry.client.set_registered_model_alias("dopsd-style-ink", ANCHOR, "1")
    rivals, _ = champions._rivals(registry, "style-ink", "other ground")
    assert [int(rival.version.version) for rival in rivals] == [3, 1], "chosen since"


def test_one_that_was_refused_is_nobodys_anchor(registry: Registry, tmp_path: Path, trained: dict[str, Any]) -> None:
    assert not register(registry, tmp_path, trained, paired(kept=0.14)).promoted
    assert (holder(registry, CHAMPION), holder(registry, ANCHOR), registry.anchor("style-ink")) == (None, None, None)


@pytest.mark.parametrize("note", ["", "[]", "{}", '{"version": "1", "ground": "ground", "deltas": {"learnt": NaN}}'])
def test_a_broken_note_of_the_anchor_is_made_anew(
    registry: Registry, tmp_path: Path, trained: dict[str, Any], note: str
) -> None:
    register(registry, tmp_path, trained)
    noted = registry.anchor("style-ink")
    registry.client.set_registered_model_tag("dopsd-style-ink", "dopsd.anchor", note)
    assert registry.anchor("style-ink") is None
    assert register(registry, tmp_path, trained, paired(seed=2), data="d2").promoted
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
    register(registry, tmp_path, trained)
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


# --- what a version holds ---------------------------------------------------------------------------------------------


def test_a_version_brings_the_base_that_it_was_made_for(
    registry: Registry, tmp_path: Path, trained: dict[str, Any]
) -> None:
    register(registry, tmp_path, trained)
    version, *_ = registry.champion("style-ink") or pytest.fail("no champion")
    base = registry.base(version, tmp_path / "place") or pytest.fail("no base")
    of = "transformer/diffusion_pytorch_model.safetensors"
    assert (base / of).read_bytes() == (trained["files"]["base"] / of).read_bytes()
    assert not (base / "vlm").exists(), "its teacher's half draws nothing"
    without = {**trained, "files": {key: path for key, path in trained["files"].items() if key != "base"}}
    register(registry, tmp_path, without, paired(learnt=0.6), data="d2")
    version, *_ = registry.champion("style-ink") or pytest.fail("no champion")
    assert registry.base(version, tmp_path / "other") is None


def test_a_version_holds_its_adapter_once_and_it_can_be_evaluated_again(
    registry: Registry, tmp_path: Path, trained: dict[str, Any]
) -> None:
    """What comes back is the trained adapter to bfloat16's rounding, in the form that the evaluation reads."""
    register(registry, tmp_path, trained)
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
    run = run_of(registry, tmp_path)
    first = register(registry, tmp_path, trained, paired(), run)
    again = register(registry, tmp_path, trained, paired(), run)
    assert again.version == first.version
    assert registry.judged("style-ink", MADE)
    assert not registry.judged("style-ink", VersionIdentity("other", "s1", "b1", "m1"))


def test_the_champion_draws_in_a_fresh_process_from_the_registry_alone(
    registry: Registry, tmp_path: Path, trained: dict[str, Any]
) -> None:
    register(registry, tmp_path, trained)
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
