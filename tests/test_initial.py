"""``train.init_from``: a training begins as what a file draws, whatever tool wrote it, or says in a line why not."""

from __future__ import annotations

import hashlib
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dopsd.champions import identity_today
from dopsd.config import Settings, SettingsError, load_settings
from dopsd.config.groups import TrainSettings
from dopsd.distill.adapters import adapter_applied
from dopsd.distill.targets import AdapterError
from dopsd.export import COMFYUI_FILE, DIFFUSERS_FILE, export_trained
from dopsd.identity import changes
from dopsd.models import Family
from dopsd.project import StageError
from dopsd.runs import runs_in
from dopsd.stages import plan, run_stage
from dopsd.train.start import start_hash
from dopsd.train.student import begin, check_start, make_pair, save_student
from dopsd.train.trainer import Place, Training, train
from tests import tiny
from tests.family_folders import settings_of
from tests.tiny_project import make_project

LORA = {"rank": 4}


def _settings(**changes: Any) -> TrainSettings:
    return tiny.tiny_settings(**{"max_steps": 4, **changes})


def _trained(path: Path, settings: TrainSettings) -> Path:
    """A student of random content, as training leaves one."""
    family = tiny.tiny_family()
    pair = make_pair(settings, family.transformer, family.lora_targets, "ema")
    generator = torch.Generator().manual_seed(5)
    for parameter in pair.student_parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    save_student(path, settings, pair)
    pair.remove()
    return path


def _velocity(family: Any) -> Tensor:
    example = tiny.tiny_examples(1)[0]
    noise = torch.randn(1, tiny.CHANNELS, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return family.predict_velocity(noise, torch.tensor([0.7]), [example.prompt])


def _begun(path: Path, settings: TrainSettings) -> tuple[Family, Any]:
    """A student that begins as ``path``."""
    family = tiny.tiny_family()
    pair = make_pair(settings, family.transformer, family.lora_targets, "ema")
    begin(settings, pair, path, None, family.parts.configs, type(family))
    return family, pair


def _check_begins(path: Path, settings: TrainSettings, trained: Path) -> None:
    """Student and teacher answer as the base with ``trained`` applied, and the base as it did."""
    plain = tiny.tiny_family()
    before = _velocity(plain)
    with adapter_applied(plain.transformer, trained):
        truth = _velocity(plain)
    assert (truth - before).abs().max() > 0.05, "there is something to see"
    family, pair = _begun(path, settings)
    for name, expected in (("student", truth), ("teacher", truth), (None, before)):
        with pair.select(name):
            torch.testing.assert_close(_velocity(family), expected, rtol=1e-4, atol=1e-5)


def _file_as(form: str, trained: Path, folder: Path) -> Path:
    if form == "ours":
        return trained
    base = folder / "base"
    tiny.tiny_family().transformer.save_pretrained(base / "transformer")
    out = export_trained(trained, folder / "export", tiny.CARD, type(tiny.tiny_family()), base, torch.float32)
    return {"folder": out, "diffusers": out / DIFFUSERS_FILE, "comfyui": out / COMFYUI_FILE}[form]


@pytest.mark.parametrize("form", ["ours", "folder", "diffusers", "comfyui"])
@pytest.mark.parametrize(("alpha", "own", "rank"), [(None, None, 4), (3.0, None, 4), (3.0, 10.0, 7)])
def test_student_and_teacher_begin_as_what_the_file_draws(
    tmp_path: Path, form: str, alpha: float | None, own: float | None, rank: int
) -> None:
    """Whatever its alpha is, and whatever the settings' own, at a larger rank too."""
    trained = _trained(tmp_path / "a.safetensors", _settings(lora={"rank": 4, "alpha": alpha}))
    _check_begins(_file_as(form, trained, tmp_path), _settings(lora={"rank": rank, "alpha": own}), trained)


@pytest.mark.parametrize("lora", [{"kind": "dora"}, {"kind": "lokr", "alpha": 8.0}])
@pytest.mark.parametrize("form", ["ours", "diffusers"])
def test_other_kinds_of_adapters_too(tmp_path: Path, lora: dict[str, Any], form: str) -> None:
    settings = _settings(lora={"rank": 4, **lora})
    trained = _trained(tmp_path / "a.safetensors", settings)
    _check_begins(_file_as(form, trained, tmp_path), settings, trained)


@pytest.mark.parametrize("form", ["ours", "folder"])
def test_full_tuning_begins_as_weights(tmp_path: Path, form: str) -> None:
    settings = _settings(tune="full")
    trained = _trained(tmp_path / "a.safetensors", settings)
    _check_begins(_file_as(form, trained, tmp_path), settings, trained)


@pytest.mark.parametrize("tune", ["adapter", "full"])
def test_layers_that_the_file_leaves_out_begin_as_any_do(tmp_path: Path, tune: str) -> None:
    few = _settings(tune=tune, lora={"rank": 4, "targets": ["context_refiner.*to_q"]})
    trained = _trained(tmp_path / "a.safetensors", few)
    _check_begins(trained, _settings(tune=tune, lora={"rank": 4, "targets": ["context_refiner.*"]}), trained)


def test_directions_that_the_file_leaves_out_can_be_learnt(tmp_path: Path) -> None:
    """A layer whose A and B are zero in some direction gets no gradient in either, ever."""
    trained = _trained(tmp_path / "a.safetensors", _settings(lora={"rank": 2}))
    tensors = {key: v.clone() for key, v in load_file(trained).items()}
    key = next(key for key in tensors if key.endswith("lora_A.weight"))
    tensors[key][0], tensors[key.replace("lora_A", "lora_B")][:, 0] = 0, 0
    save_file(tensors, trained, {"format": "dopsd-lora", "rank": "2", "alpha": "2.0"})
    family, pair = _begun(trained, _settings(lora={"rank": 4}))
    example = tiny.tiny_examples(1)[0]
    noise = torch.randn(1, tiny.CHANNELS, 8, 8, generator=torch.Generator().manual_seed(1))
    with pair.select("student"):
        family.predict_velocity(noise, torch.tensor([0.7]), [example.prompt]).square().mean().backward()
    for name, parameter in pair.student().items():
        if name.endswith("lora_B.weight"):
            assert parameter.grad.abs().sum(dim=0).min() > 0, name
    assert float(pair.student()[key].detach().abs().sum(dim=1).min()) > 0


# --- what does not fit is a line --------------------------------------------------------------------------------------


def _odd(kind: str, path: Path) -> Path:
    """No adapter, and no weights."""
    if kind == "garbage":
        path.write_bytes(b"no tensors")
    if kind == "foreign":
        save_file({"lora_unet_layers_0.lora_up.weight": torch.zeros(4, 4)}, path)
    return path


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("ours", {"lora": {"rank": 2}}, "it is of rank 4, and train.lora.rank is 2; set it to 4 or more"),
        ("diffusers", {"lora": {"rank": 2}}, "it is of rank 4, and train.lora.rank is 2"),
        ("comfyui", {"lora": {"rank": 2}}, "it is of rank 4, and train.lora.rank is 2"),
        ("ours", {"lora": {"rank": 4, "kind": "dora"}}, "it is a LoRA, and train.lora.kind is dora"),
        ("ours", {"tune": "full"}, "it holds an adapter, and train.tune is full"),
        ("weights", {}, "it holds weights, and train.tune is adapter"),
        ("comfyui", {"lora": {"rank": 4, "targets": ["to_q"]}}, "are none that train.lora.targets choose, such as "),
        ("weights", {"tune": "full", "lora": {"targets": ["to_q"]}}, "are none that train.lora.targets choose"),
        ("another base's", {}, "it was made for another base"),
        ("not a number", {}, "lora_A.weight holds values that are no numbers"),
        ("missing", {}, "no such adapter"),
        ("garbage", {}, "not a whole safetensors file"),
        ("foreign", {}, "is no name of diffusers' or ComfyUI's"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_loaded(
    tmp_path: Path, folders: Any, file: str, changes: dict[str, Any], said: str
) -> None:
    """Of the base its configuration is enough."""
    family = tiny.tiny_family()
    base = tmp_path / "base"
    for part in ("transformer", "vae", "text_encoder"):
        (base / part).mkdir(parents=True)
        shutil.copy(folders["z-image"] / part / "config.json", base / part)
    shutil.copy(folders["z-image"] / "model_index.json", base)
    (base / "transformer/config.json").write_text(json.dumps(dict(family.parts.configs["transformer"])))
    path = tmp_path / "a.safetensors"
    if file == "weights":
        _trained(path, _settings(tune="full"))
    elif file == "another base's":
        tensors = {key: value[..., :7].contiguous() for key, value in load_file(_trained(path, _settings())).items()}
        save_file(tensors, path, {"format": "dopsd-lora", "rank": "4", "alpha": "4.0"})
    elif file == "not a number":
        tensors = load_file(_trained(path, _settings()))
        next(value for key, value in tensors.items() if key.endswith("lora_A.weight"))[0, 0] = torch.nan
        save_file(tensors, path, {"format": "dopsd-lora", "rank": "4", "alpha": "4.0"})
    elif file in ("ours", "diffusers", "comfyui"):
        path = _file_as(file, _trained(path, _settings()), tmp_path)
    else:
        path = _odd(file, path)
    settings = _settings(init_from=str(path), **changes)
    with pytest.raises(AdapterError) as caught:
        check_start(settings, settings_of("z-image", {**folders, "z-image": base}), Path())
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"train.init_from: {path}")
    assert "\n" not in str(caught.value)


# --- in a training ----------------------------------------------------------------------------------------------------


def _train(folder: Path, start: Path | None, observer: Any = None, method: str = "d-opsd") -> Any:
    settings, examples, prompts = _settings(), tiny.tiny_examples(), tiny.tiny_prompts()
    identity = tiny.tiny_identity(settings, method, examples, prompts)  # type: ignore[arg-type]
    training = Training(method, settings, examples, identity, prompts, start=start)  # type: ignore[arg-type]
    return train(
        tiny.tiny_family(), training, Place(folder / "train", folder / "adapters", observer or tiny.Recorder())
    )


def test_a_training_begins_there_and_a_resumed_one_does_not_begin_again(tmp_path: Path) -> None:
    start = _trained(tmp_path / "a.safetensors", _settings())

    seen = tiny.Recorder()
    whole = _train(tmp_path / "whole", start, seen)
    assert any("d-opsd: begins as" in text and "a.safetensors" in text for text in seen.messages)
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "broken", start, tiny.Cut(3))
    resumed = _train(tmp_path / "broken", start)
    plain = _train(tmp_path / "plain", None)
    files = [load_file(result.adapters["d-opsd"]) for result in (whole, resumed, plain)]
    begun = load_file(start)
    assert all(torch.equal(files[0][key], files[1][key]) for key in begun)
    moved, away = (max(float((file[key] - begun[key]).abs().max()) for key in begun) for file in (files[0], files[2]))
    assert moved < 0.1 < away, "four steps of 0.01 from there, and not from the base"


def test_a_file_that_changed_since_it_was_looked_at_is_not_begun_from(tmp_path: Path) -> None:
    start = _trained(tmp_path / "a.safetensors", _settings())
    settings, examples = _settings(), tiny.tiny_examples()
    training = Training(
        "d-opsd", settings, examples, "x", tiny.tiny_prompts(), made_of={"init_from": "0" * 64}, start=start
    )
    place = Place(tmp_path / "train", tmp_path / "adapters", tiny.Recorder())
    with pytest.raises(AdapterError, match="it changed since this training was started"):
        train(tiny.tiny_family(), training, place)


def test_its_content_decides_and_its_name_does_not(tmp_path: Path) -> None:
    root = make_project(tmp_path / "project", methods=["d-opsd"])
    trained = _trained(root / "a.safetensors", _settings())
    shutil.copy(trained, root / "b.safetensors")

    def planned(name: str | None) -> dict[str, Any]:
        override = () if name is None else (f"train.init_from={name}",)
        plan("blots", load_settings(root / "params.yaml", override), root)
        return json.loads((root / "runs/blots/plan.json").read_text())

    plain, a = planned(None), planned("a.safetensors")
    assert {stage for stage in plain if plain[stage] != a[stage]} == {"train"}
    assert planned("b.safetensors") == a
    _trained(root / "b.safetensors", _settings(seed=1))
    assert planned("b.safetensors")["train"] != a["train"]
    with pytest.raises(AdapterError, match=r"nowhere\.safetensors: no such adapter"):
        planned("nowhere.safetensors")


def test_what_the_training_itself_writes_is_refused_and_what_was_set_aside_is_not(tmp_path: Path) -> None:
    run = tmp_path / "runs/blots"
    for place in ("adapters", "export", "train/d-opsd/adapters", "train/d-opsd.previous-1/adapters"):
        (run / place).mkdir(parents=True)
        path = _trained(run / place / "d-opsd.safetensors", _settings())
        settings = _settings(init_from=str(path.relative_to(tmp_path)))
        if "previous" in place:
            assert len(start_hash(settings, tmp_path, run)) == 64
        else:
            with pytest.raises(SettingsError, match="this training replaces it; copy it"):
                start_hash(settings, tmp_path, run)
        assert len(start_hash(settings, tmp_path, tmp_path / "runs/other")) == 64, "another concept's is as good"
    assert start_hash(_settings(), tmp_path, run) == ""


def test_every_stage_goes_by_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained from it by the stage, evaluated and registered with it on the card; another content is another training,
    and what would be made today is another version."""
    root = make_project(tmp_path / "project", methods=["d-opsd"])
    monkeypatch.setenv("HOME", str(root))
    begun = load_file(_trained(root / "start.safetensors", _settings()))

    def settings(*changes: str) -> Settings:
        return load_settings(root / "params.yaml", ("tracking.enabled=false", *changes))

    own, plain = settings("train.init_from=~/start.safetensors"), settings()
    for stage in ("validate", "encode", "train", "evaluate", "register"):  # none needs `dopsd plan` before it
        run_stage(stage, "blots", own, root)
    run = root / "runs/blots"
    adapter = load_file(run / "adapters/d-opsd.safetensors")
    assert max(float((adapter[key] - begun[key]).abs().max()) for key in begun) < 0.1, "some steps of 0.01 from there"
    digest = hashlib.sha256((root / "start.safetensors").read_bytes()).hexdigest()
    assert f"start.safetensors (sha256 {digest[:12]}...)" in (run / "export/README.md").read_text()
    content = json.loads((run / "validated.json").read_text())["content_hash"]
    with_it, without = (identity_today("blots", content, how, root) for how in (own, plain))
    assert with_it != without
    tensors = {key: value + 0.1 for key, value in begun.items()}
    save_file(tensors, root / "start.safetensors", {"format": "dopsd-lora", "rank": "4", "alpha": "4.0"})
    assert identity_today("blots", content, own, root) != with_it
    with pytest.raises(StageError, match="was trained from other settings, data or base than today's"):
        run_stage("register", "blots", own, root)
    run_stage("train", "blots", own, root)
    save_file({"x": torch.zeros(1)}, root / "odd.safetensors")
    loads: list[bool] = []
    with monkeypatch.context() as patch:
        patch.setattr("dopsd.train.job.load_family", lambda *_: loads.append(True))
        with pytest.raises(AdapterError, match=r"train\.init_from: .*odd"):
            run_stage("train", "blots", settings("train.init_from=odd.safetensors"), root)
    assert not loads, "it is said before the base is loaded"
    run_stage("train", "blots", plain, root)
    made = {run.folder.name: run.made_of for run in runs_in(root, "blots")}
    chain = [made[f"d-opsd{which}"] for which in (".previous-1", ".previous-2", "")]
    assert [changes(*pair) for pair in pairwise(chain)] == [
        ["what train.init_from names changed"], ["what train.init_from names is gone"],
    ]  # fmt: skip
