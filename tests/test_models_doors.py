"""What a person gives as a base, wrongly: one line that says what to do, before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dopsd.config import Settings
from dopsd.models import ModelError, load_family, references_rule, resolved, teaching_of
from tests import published, tiny
from tests.family_folders import NAMES, settings_of


@pytest.fixture
def said(capsys):
    """The one line that loading ends with; nothing else is printed."""

    def load(name: str, folders: dict[str, Path], **more) -> str:
        with pytest.raises(ModelError) as caught:
            load_family(settings_of(name, folders, **more))
        assert "\n" not in str(caught.value)
        assert capsys.readouterr().out == ""
        return str(caught.value)

    return load


def copied(folder: Path, target: Path, **index) -> Path:
    shutil.copytree(folder, target)
    values = json.loads((target / "model_index.json").read_text())
    (target / "model_index.json").write_text(json.dumps(values | index))
    return target


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_another_family_is_named(folders, said, name):
    for other in set(NAMES) - {name}:
        line = said(name, folders | {name: folders[other]})
        assert "its pipeline is" in line
        assert "model.family" in line


def test_models_that_look_like_klein_are_refused_by_name(folders, said, tmp_path):
    cached = copied(folders["flux2-klein"], tmp_path / "kv", _class_name="Flux2KleinKVPipeline")
    assert "keeps references in a cache" in said("flux2-klein", folders | {"flux2-klein": cached})
    dev = copied(folders["flux2-klein"], tmp_path / "dev", _class_name="Flux2Pipeline")
    assert "FLUX.2-dev" in said("flux2-klein", folders | {"flux2-klein": dev})


@pytest.mark.parametrize("name", ["flux2-klein", "krea-2"])
def test_an_undistilled_base_is_refused(folders, said, tmp_path, name):
    raw = copied(folders[name], tmp_path / "raw", is_distilled=False)
    assert "undistilled" in said(name, folders | {name: raw})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae", "tokenizer", "scheduler"])
def test_a_missing_component_is_named(folders, said, tmp_path, name, part):
    broken = copied(folders[name], tmp_path / "broken")
    shutil.rmtree(broken / part)
    assert f"the folder {part}/ is missing" in said(name, folders | {name: broken})


def test_a_missing_shard_is_named(folders, said, tmp_path):
    broken = copied(folders["z-image"], tmp_path / "broken")
    shard = sorted((broken / "transformer").glob("*-of-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in said("z-image", folders | {"z-image": broken})


def test_a_teacher_without_eyes_is_found_before_anything_is_loaded(folders, said, tmp_path):
    assert "model.vlm" in said("z-image", folders, vlm=None)
    (tmp_path / "empty").mkdir()
    assert "model.vlm" in said("z-image", folders, vlm=str(tmp_path / "empty"))
    text_only = folders["flux2-klein"] / "text_encoder"
    assert "Qwen3ForCausalLM" in said("z-image", folders, vlm=str(text_only))
    other = published.write_z_image_turbo(tmp_path / "wide", hidden=96)
    wide = published.write_qwen3_vl(tmp_path / "wide-vlm", other)
    line = said("z-image", folders, vlm=str(wide))
    assert "hidden_size 96 instead of 64" in line


def test_a_tilde_is_the_home_folder(folders, monkeypatch):
    monkeypatch.setenv("HOME", str(folders["flux2-klein"].parent))
    family = load_family(settings_of("flux2-klein", {"flux2-klein": Path("~/klein")}))
    assert family.parts.loaded() == set()


def test_what_only_draws_needs_no_eyes(folders):
    assert load_family(settings_of("z-image", folders, vlm=None), use="draw").parts.loaded() == set()


@pytest.mark.parametrize(
    ("name", "context", "words"),
    [("z-image", "edit", "can by vlm, enhanced-prompt"), ("krea-2", "edit-reference", "can by vlm, enhanced-prompt"),
     ("flux2-klein", "vlm", "can by edit, edit-reference, enhanced-prompt")],
)  # fmt: skip
def test_a_context_that_the_family_cannot_be_shown_is_refused(folders, said, name, context, words):
    assert words in said(name, folders, context=context)


def test_an_unknown_family_is_named_with_those_that_there_are(folders, said):
    assert "z-image, flux2-klein, krea-2" in said("z-image", folders, family="sdxl")


def test_contexts_say_what_the_data_must_have(folders):
    def rule(name: str, context: str | None) -> str:
        return references_rule(settings_of(name, folders, context=context))

    assert rule("z-image", None) == rule("flux2-klein", "edit") == rule("krea-2", "enhanced-prompt") == "refused"
    assert rule("flux2-klein", "edit-reference") == "required"
    assert rule("flux2-klein", "enhanced-prompt") == "allowed"


def test_the_context_is_part_of_every_key(folders):
    """Two families that differ in nothing but what their teacher is shown encode under different keys."""
    changes = ({}, {"context_suffix": " Look."}, {"context_pixels": (64 * 64, 96 * 96)}, {"vlm_positions": "encoder"})
    families = [load_family(settings_of("z-image", folders, **change)) for change in changes]
    assert len({family.context_key for family in families}) == len(changes)
    assert len({family.fingerprint for family in families}) == 1, "captions encode alike"
    klein = [load_family(settings_of("flux2-klein", folders, context=name)) for name in ("edit", "edit-reference")]
    assert klein[0].context_key != klein[1].context_key
    assert teaching_of(settings_of("flux2-klein", folders, context="edit")).suffix.startswith(" ")


def test_a_teacher_that_only_reads_more_is_frozen_unless_told(folders):
    def kind(**teacher: str) -> str:
        values = {"concepts": ["c"], "model": {"path": "b", "context": "enhanced-prompt"}, "data": {"resolution": 64},
                  "train": {**tiny.tiny_settings().model_dump(exclude={"teacher"}), "teacher": teacher}}  # fmt: skip
        return resolved(Settings.model_validate(values)).train.teacher.kind

    assert kind() == "frozen"
    assert kind(kind="ema") == "ema"


def test_what_the_settings_leave_out_is_the_familys(folders):
    def settings(name: str, **evaluation) -> Settings:
        return Settings.model_validate({
            "concepts": ["c"], "model": settings_of(name, folders).model_dump(), "data": {"resolution": 64},
            "train": tiny.tiny_settings().model_dump(), "evaluation": evaluation,
        })  # fmt: skip

    filled = {name: resolved(settings(name)) for name in NAMES}
    assert [filled[name].evaluation.few for name in NAMES] == [8, 4, 8]
    assert [filled[name].model.context for name in NAMES] == ["vlm", "edit", "vlm"]
    assert {filled[name].train.teacher.kind for name in NAMES} == {"ema"}
    assert resolved(filled["krea-2"]) == filled["krea-2"]
    written = settings_of("z-image", folders, context="vlm").decides_learning()
    assert filled["z-image"].model.decides_learning() == written, "writing the default out changes nothing"
    with pytest.raises(ModelError, match=r"few_steps \(8\) must be one of evaluation\.steps"):
        resolved(settings("z-image", steps=[1, 4]))


def test_training_needs_neither_encoders_nor_their_files(folders, tmp_path):
    """A node that trains has the transformer; the text encoder's 8 GB and the VLM need not be there."""
    lean = copied(folders["z-image"], tmp_path / "lean")
    shutil.rmtree(lean / "text_encoder")
    shutil.rmtree(lean / "tokenizer")
    settings = settings_of("z-image", {"z-image": lean, "vlm": tmp_path / "nowhere"})
    family = load_family(settings, use="train")
    assert family.transformer is not None
    assert family.parts["vae_decoder"] is not None


def test_the_command_that_fetches_the_published_model_is_said(folders, said, tmp_path):
    (tmp_path / "empty").mkdir()
    line = said("z-image", folders | {"z-image": tmp_path / "empty"})
    assert "`hf download Tongyi-MAI/Z-Image-Turbo --local-dir DIR`" in line
    assert "`hf download Qwen/Qwen3-VL-4B-Instruct --local-dir DIR`" in said(
        "z-image", folders, vlm=str(tmp_path / "x/y/z")
    )
    assert "`hf download black-forest-labs/FLUX.2-klein-4B" in said(
        "flux2-klein", folders | {"flux2-klein": folders["vlm"]}
    )
