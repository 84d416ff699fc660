"""DoRA and LoKr on every family: they start as the base, train, switch, are kept in files and load elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dopsd.config import load_settings
from dopsd.config.groups import LoraSettings
from dopsd.distill.adapters import adapter_applied, adapter_parameters, add_adapters, save_adapter
from dopsd.distill.rollout import rollout
from dopsd.export import COMFYUI_FILE, check_export, draw_student, export_adapter
from dopsd.models import ModelError, load_family, resolved
from dopsd.models.base import Family, Request
from tests import tiny
from tests.family_folders import NAMES, settings_of

ROOT = Path(__file__).parent.parent
KINDS = [(name, kind) for name in NAMES for kind in ("dora", "lokr") if (name, kind) != ("krea-2", "lokr")]


def _velocity(family: Family) -> torch.Tensor:
    (prompt,) = family.encode_prompt([Request("a fox")])
    noise = family.initial_latents(1, 64, 64, torch.Generator().manual_seed(2))
    with torch.no_grad():
        return family.predict_velocity(noise, torch.tensor(0.8), [prompt])


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_it_starts_as_the_base_and_every_tensor_of_the_student_is_trained(folders, name, kind):
    family = load_family(settings_of(name, folders))
    base = _velocity(family)
    pair = add_adapters(family.transformer, LoraSettings(kind=kind, rank=4), family.lora_targets, seed=0)
    for selection in ("student", "teacher"):
        with pair.select(selection):
            torch.testing.assert_close(_velocity(family), base, rtol=1e-4, atol=1e-5)
    pair.remove()
    assert torch.equal(_velocity(family), base)

    pair = tiny.trained_pair(family, LoraSettings(kind=kind, rank=4))
    (prompt,) = family.encode_prompt([Request("a fox")])
    noise = family.initial_latents(1, 64, 64, torch.Generator().manual_seed(2))
    rollout(family.predict_velocity, pair, noise, family.sigmas(2, 64, 64), [prompt], [prompt], teacher="teacher")
    grads = {k: p.grad for k, p in adapter_parameters(family.transformer, "student").items()}
    assert all(grad is not None and bool(grad.any()) for grad in grads.values())
    assert all(p.grad is None for p in adapter_parameters(family.transformer, "teacher").values())
    ends = {key.rpartition(".")[2] for key in grads}
    assert ("lora_magnitude_vector" in ends) == (kind == "dora")


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_file_loads_to_the_same_answer_here_and_in_plain_diffusers(folders, tmp_path, name, kind):
    family = load_family(settings_of(name, folders))
    lora = LoraSettings(kind=kind, rank=4, alpha=8.0)
    pair = tiny.trained_pair(family, lora)
    told = _velocity(family)
    path = save_adapter(tmp_path / "student.safetensors", family.transformer, "student", lora)
    pair.remove()
    with adapter_applied(family.transformer, path):
        torch.testing.assert_close(_velocity(family), told, rtol=1e-5, atol=1e-5)
    drawn = draw_student(family, path, [(Request("a fox"), 64, 64)], 2, 0)
    export = export_adapter(path, tmp_path / "export", tiny.CARD, type(family))
    found = check_export(folders[name], export, drawn, type(family))
    assert found["difference"] < 0.25 < found["change"]
    assert not (export / COMFYUI_FILE).exists()
    card = (export / "README.md").read_text()
    assert "ComfyUI" not in card
    assert f"A {'DoRA' if kind == 'dora' else 'LoKr'} (rank 4) for" in card


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_a_cut_run_ends_where_the_unbroken_one_ends(tmp_path, kind):
    settings = tiny.tiny_settings(max_steps=4, checkpoint_steps=2, lora={"kind": kind, "rank": 2})
    tiny.run_tiny("d-opsd", tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        tiny.run_tiny("d-opsd", tmp_path / "cut", settings, tiny.Cut(3))
    tiny.run_tiny("d-opsd", tmp_path / "cut", settings)
    whole, cut = (load_file(tmp_path / who / "adapters" / "d-opsd.safetensors") for who in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_a_kind_that_a_pipeline_does_not_load_is_refused_before_anything():
    settings = load_settings(ROOT / "recipes" / "krea-2-turbo.yaml", ("train.lora.kind=lokr",))
    with pytest.raises(ModelError, match="diffusers loads no lokr for krea-2; there are lora, dora"):
        resolved(settings)
