"""``train.init_from``: a training begins as what a file draws, whatever tool wrote it, or says in a line why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dopsd.config import SettingsError, TrainSettings, load_settings
from dopsd.distill.adapters import adapter_applied
from dopsd.distill.initial import begin_as, check_initial
from dopsd.distill.targets import AdapterError
from dopsd.export import COMFYUI_FILE, DIFFUSERS_FILE, export_adapter
from dopsd.models.lora_files import LoraFileError, from_comfyui
from dopsd.stages import plan
from dopsd.train.start import start_hash
from dopsd.train.student import make_pair, save_student
from dopsd.train.trainer import Place, Training, train
from tests import tiny
from tests.test_export import CARD
from tests.test_lora_files import ALL, CASES, RANK, adapter_of, deltas_of, merged_by_comfyui, stacked, weights_of
from tests.tiny_project import make_project

LORA = {"rank": 4}


def _settings(**changes: Any) -> TrainSettings:
    return tiny.tiny_settings(**{"max_steps": 4, **changes})


def _trained(path: Path, settings: TrainSettings) -> Path:
    """A student of random content, as training leaves one."""
    family = tiny.tiny_family()
    pair = make_pair(settings, family, "ema")
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


def _answers(path: Path, settings: TrainSettings) -> dict[str, Tensor]:
    """What student, teacher and base answer where a training begins as ``path``; and the file itself, applied."""
    family = tiny.tiny_family()
    plain = _velocity(family)
    pair = make_pair(settings, family, "ema")
    begin_as(path, pair, settings, type(family).comfyui_lora)
    found = {}
    for name in ("student", "teacher", None):
        with pair.select(name):
            found[str(name)] = _velocity(family)
    pair.remove()
    return found | {"plain": plain}


def _file_as(form: str, trained: Path, folder: Path) -> Path:
    if form == "ours":
        return trained
    out = export_adapter(trained, folder / "export", CARD, type(tiny.tiny_family()), torch.float32)
    return out / (DIFFUSERS_FILE if form == "diffusers" else COMFYUI_FILE)


def _others(form: str, path: Path, alpha: float) -> Path:
    """As another tool writes it: no header, the strength in tensors, whatever the values are scaled by."""
    prefix = {"diffusers": "transformer", "comfyui": "diffusion_model"}[form]
    tensors = load_file(path)
    plain = {key: value for key, value in tensors.items() if not key.endswith(".alpha")}
    for key in [key for key in plain if key.endswith(".lora_B.weight")]:
        rank = plain[key].shape[1]
        plain[key] = plain[key] * rank / alpha
        plain[key.replace(".lora_B.weight", ".alpha")] = torch.tensor(alpha)
    assert all(key.startswith(prefix) for key in plain)
    save_file(plain, path.with_name("others.safetensors"))
    return path.with_name("others.safetensors")


@pytest.mark.parametrize("form", ["ours", "diffusers", "comfyui", "others-diffusers", "others-comfyui"])
@pytest.mark.parametrize(("alpha", "own"), [(None, None), (3.0, None), (3.0, 10.0)])
def test_student_and_teacher_begin_as_what_the_file_draws(
    tmp_path: Path, form: str, alpha: float | None, own: float | None
) -> None:
    """Whatever its alpha is, and whatever the settings' own."""
    trained = _trained(tmp_path / "a.safetensors", _settings(lora={**LORA, "alpha": alpha}))
    family = tiny.tiny_family()
    with adapter_applied(family.transformer, trained):
        truth = _velocity(family)
    path = _file_as(form.removeprefix("others-"), trained, tmp_path)
    if form.startswith("others"):
        path = _others(form.removeprefix("others-"), path, alpha=2.5)
    found = _answers(path, _settings(lora={**LORA, "alpha": own}))
    torch.testing.assert_close(found["student"], truth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["teacher"], truth, rtol=1e-4, atol=1e-5)
    assert torch.equal(found["None"], found["plain"]), "the base is what it was"
    assert (truth - found["plain"]).abs().max() > 0.05, "there is something to see"


@pytest.mark.parametrize("lora", [{"kind": "dora"}, {"kind": "lokr", "alpha": 8.0}])
@pytest.mark.parametrize("form", ["ours", "diffusers"])
def test_other_kinds_of_adapters_too(tmp_path: Path, lora: dict[str, Any], form: str) -> None:
    settings = _settings(lora={**LORA, **lora})
    trained = _trained(tmp_path / "a.safetensors", settings)
    family = tiny.tiny_family()
    with adapter_applied(family.transformer, trained):
        truth = _velocity(family)
    found = _answers(_file_as(form, trained, tmp_path), settings)
    torch.testing.assert_close(found["student"], truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [None, ["to_q"]])
def test_full_tuning_begins_as_weights(tmp_path: Path, targets: list[str] | None) -> None:
    settings = _settings(tune="full", lora={**LORA, "targets": targets})
    trained = _trained(tmp_path / "a.safetensors", settings)
    family = tiny.tiny_family()
    with adapter_applied(family.transformer, trained):
        truth = _velocity(family)
    found = _answers(trained, settings)
    assert torch.equal(found["student"], truth)
    assert torch.equal(found["teacher"], truth)
    assert torch.equal(found["None"], found["plain"])


# --- ComfyUI's names, and back ----------------------------------------------------------------------------------------


@ALL
def test_the_way_back_from_comfyui_gives_every_number_back(name: str) -> None:
    case = CASES[name]
    adapter = adapter_of(weights_of(case.build()))
    found = from_comfyui(case.write(adapter, RANK), adapter, RANK, case.write)
    assert found.keys() == adapter.keys()
    assert not [key for key in adapter if not torch.equal(found[key], adapter[key])]


def test_a_layer_that_another_tool_adapted_as_a_whole_is_divided() -> None:
    """The truth is ComfyUI's merge of that file into the native layers, restated in tests/test_lora_files.py. Our files
    for the other families have diffusers' names, in which nothing is fused."""
    case = CASES["klein"]
    weights, layout = weights_of(case.build()), case.layout()
    generator = torch.Generator().manual_seed(2)
    fused = {layer: [module for module, _ in pieces] for layer, pieces in layout.items() if layer.endswith(".qkv")}
    file: dict[str, Tensor] = {}
    for layer, modules in fused.items():
        rows, columns = sum(weights[module].shape[0] for module in modules), weights[modules[0]].shape[1]
        file[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator)
        file[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator)
        file[f"diffusion_model.{layer}.alpha"] = torch.tensor(3.0)
    adapted = adapter_of(weights, [module for modules in fused.values() for module in modules])
    found = from_comfyui(file, adapted, RANK, case.write)
    native, unread = merged_by_comfyui(case, file, {key: value.clone() for key, value in weights.items()})
    assert len(file) == 3 * 4
    assert not unread
    deltas = {key: torch.zeros_like(value) for key, value in weights.items()} | deltas_of(found)
    mine = stacked(layout, {key: weights[key] + delta for key, delta in deltas.items()})
    for layer, value in native.items():
        torch.testing.assert_close(mine[layer], value)


@ALL
def test_a_comfyui_file_that_does_not_fit_is_refused(name: str) -> None:
    case = CASES[name]
    adapter = adapter_of(weights_of(case.build()))
    file = case.write(adapter, RANK)

    def refused(file: Mapping[str, Tensor], like: Mapping[str, Tensor], rank: int, said: str) -> None:
        with pytest.raises(LoraFileError, match=said):
            from_comfyui(file, like, rank, case.write)

    lost = next(key for key in file if key.endswith("lora_B.weight"))
    refused({key: value for key, value in file.items() if key != lost}, adapter, RANK, f"{lost}: train.lora.targets")
    one = dict(list(adapter.items())[:2])
    refused(file, one, RANK, "it is in the file, and train.lora.targets leave it out")
    wide = {key: torch.zeros(*(3 if n == RANK else n for n in value.shape)) for key, value in adapter.items()}
    refused(file, wide, 3, "with train.lora.rank 3 it would be")
    other = {**file, lost: torch.cat([file[lost]] * 2)}
    refused(other, adapter, RANK, "it would be")


def test_values_where_a_file_of_ours_has_none_are_not_dropped() -> None:
    """A fused layer that was trained whole, at three times the rank: its thirds are no adapters of that rank."""
    case = CASES["klein"]
    weights = weights_of(case.build())
    adapter = adapter_of(weights, [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"])
    file = case.write(adapter, RANK)
    file["diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight"] += 1
    with pytest.raises(LoraFileError, match=f"adapted together at rank {3 * RANK}, and train.lora.rank is {RANK}"):
        from_comfyui(file, adapter, RANK, case.write)


# --- what does not fit is a line --------------------------------------------------------------------------------------


def _garbage(path: Path) -> Path:
    path.write_bytes(b"no tensors")
    return path


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("ours", {"lora": {"rank": 8}}, "is of rank 4, and train.lora.rank is 8"),
        ("diffusers", {"lora": {"rank": 8}}, "is of rank 4, and train.lora.rank is 8"),
        ("comfyui", {"lora": {"rank": 8}}, "is of rank 4, and train.lora.rank is 8"),
        ("ours", {"lora": {"rank": 4, "kind": "dora"}}, "is a lora, and train.lora.kind is dora"),
        ("ours", {"tune": "full"}, "holds an adapter, and train.tune is full"),
        ("weights", {}, "holds weights, and train.tune is adapter"),
        ("missing", {}, "there is no such file"),
        ("garbage", {}, "not a readable safetensors file"),
        ("foreign", {}, "neither our name of a tensor nor diffusers' "),
        ("down-up", {}, "there is no .lora_A.weight in it"),
    ],
)
def test_what_a_header_tells_is_told_before_anything_is_loaded(
    tmp_path: Path, file: str, changes: dict[str, Any], said: str
) -> None:
    path = tmp_path / "a.safetensors"
    if file == "weights":
        _trained(path, _settings(tune="full"))
    elif file == "garbage":
        _garbage(path)
    elif file == "foreign":
        save_file({"lora_unet_layers_0.lora_up.weight": torch.zeros(4, 4)}, path)
    elif file == "down-up":
        save_file({"transformer.layers.0.lora.up.weight": torch.zeros(4, 4)}, path)
    elif file != "missing":
        path = _file_as(file, _trained(path, _settings()), tmp_path)
    settings = _settings(**changes)
    with pytest.raises(AdapterError) as caught:
        check_initial(path, settings)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"train.init_from: {path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["ours", "diffusers", "comfyui", "weights"])
@pytest.mark.parametrize(("its", "mine"), [(None, ["to_q"]), (["to_q"], None)])
def test_other_layers_than_the_settings_train_are_told_with_both_counts(
    tmp_path: Path, form: str, its: list[str] | None, mine: list[str] | None
) -> None:
    tune = "full" if form == "weights" else "adapter"
    trained = _trained(tmp_path / "a.safetensors", _settings(tune=tune, lora={**LORA, "targets": its}))
    path = trained if form == "weights" else _file_as(form, trained, tmp_path)
    settings, family = _settings(tune=tune, lora={**LORA, "targets": mine}), tiny.tiny_family()
    pair = make_pair(settings, family, "ema")
    with pytest.raises(AdapterError, match=r"train\.init_from: .*train\.lora\.targets") as caught:
        begin_as(path, pair, settings, type(family).comfyui_lora)
    assert "\n" not in str(caught.value)
    if form in ("ours", "diffusers"):
        assert "in the file alone" in str(caught.value) or "trained alone" in str(caught.value)


def test_an_adapter_for_another_base_is_told(tmp_path: Path) -> None:
    path = _trained(tmp_path / "a.safetensors", _settings())
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("lora_A.weight"))
    tensors[key] = torch.zeros(4, 7)
    header = {"format": "dopsd-lora", "rank": "4", "alpha": "4.0"}
    save_file(tensors, path, header)
    family = tiny.tiny_family()
    with pytest.raises(AdapterError, match=r"is \(4, 7\), and \(4, \d+\) in what is trained"):
        begin_as(path, make_pair(_settings(), family, "ema"), _settings(), type(family).comfyui_lora)


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

    class Breaks(tiny.Recorder):
        def metrics(self, at: int, values: Mapping[str, float]) -> None:
            super().metrics(at, values)
            if at == 3:
                raise KeyboardInterrupt

    seen = tiny.Recorder()
    whole = _train(tmp_path / "whole", start, seen)
    assert any("d-opsd: begins as" in text and "a.safetensors" in text for text in seen.messages)
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "broken", start, Breaks())
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
    with pytest.raises(AdapterError, match=r"nowhere\.safetensors: there is no such file"):
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
