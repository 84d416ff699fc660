"""Training and export on every family's classes: LoRA's reach, levels, bfloat16, exact resume, files that load."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file

from dopsd.config.groups import LoraSettings
from dopsd.data.dataset import Example, Preview
from dopsd.distill.adapters import adapter_applied, adapter_parameters, add_adapters, match_targets, save_adapter
from dopsd.distill.rollout import sample
from dopsd.export import COMFYUI_FILE, DIFFUSERS_FILE, check_export, draw_student, export_adapter
from dopsd.models import family_class, load_family
from dopsd.models.base import Request
from dopsd.train.trainer import Place, Training, train
from tests import tiny
from tests.family_folders import NAMES, picture, settings_of
from tests.published_configs import PUBLISHED

# --- the published sizes ----------------------------------------------------------------------------------------------

REACH = {
    "z-image-turbo": ("z-image", "ZImageTransformer2DModel", 238, 276, 158_760_960),
    "klein-4b": ("flux2-klein", "Flux2Transformer2DModel", 100, 109, 96_300_000),
    "klein-9b": ("flux2-klein", "Flux2Transformer2DModel", 144, 153, 174_100_000),
    "krea-2": ("krea-2", "Krea2Transformer2DModel", 257, 264, 228_500_000),
}
"""Family, class, adapted layers, linear layers, parameters of a rank-64 adapter (to the digits that are known)."""


@pytest.mark.parametrize("name", REACH)
def test_the_familys_own_targets_reach_the_published_layers(name):
    family, transformer_class, adapted, layers, size = REACH[name]
    with init_empty_weights():
        transformer = getattr(diffusers, transformer_class).from_config(PUBLISHED[name]["transformer"])
    matched = match_targets(transformer, family_class(settings_of_class(family)).lora_targets)
    found = {module for names in matched.values() for module in names}
    linear = {n: m for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    assert (len(found), len(linear)) == (adapted, layers)
    parameters = sum(64 * (linear[module].in_features + linear[module].out_features) for module in found)
    assert parameters == pytest.approx(size, abs=50_000 if size % 100_000 == 0 else 0)


def settings_of_class(family: str):
    return settings_of(family, {family: Path("nowhere"), "vlm": Path("nowhere")})


# --- levels and rounding ----------------------------------------------------------------------------------------------


def test_kleins_flow_matching_levels_have_the_shift_of_the_few_steps(folders):
    """``exp(mu) / (exp(mu) + 1/u - 1)`` with the mu of 4 steps at 1024 px: 2.2912. A fine grid's own would be -3.5."""
    family = load_family(settings_of("flux2-klein", folders))
    uniform = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    levels = family.levels(uniform, 4, 1024, 1024).double()
    growth = torch.exp(torch.tensor(2.2912, dtype=torch.float64))
    torch.testing.assert_close(levels, growth / (growth + 1 / uniform - 1), rtol=1e-4, atol=1e-5)
    assert float(levels.median()) == pytest.approx(0.908, abs=0.001)


@pytest.mark.parametrize(
    ("side", "steps", "grid"),
    [(512, 4, (1, 0.9581, 0.8840, 0.7175, 0)), (1024, 4, (1, 0.9674, 0.9081, 0.7672, 0)),
     (1536, 4, (1, 0.9575, 0.8825, 0.7146, 0)),
     (1024, 8, (1, 0.9854, 0.9666, 0.9415, 0.9062, 0.8528, 0.7630, 0.5798, 0))],
)  # fmt: skip
def test_kleins_grids(folders, side, steps, grid):
    family = load_family(settings_of("flux2-klein", folders))
    torch.testing.assert_close(family.sigmas(steps, side, side), torch.tensor(grid).float(), atol=6e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_times_are_those_of_the_pipeline(folders, name):
    """klein's pipeline rounds 767.2, not .7672: 768 and not 764."""
    family = load_family(settings_of(name, folders, dtype="bfloat16"))
    pipeline = getattr(diffusers, family.pipeline).from_pretrained(folders[name], torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    seen: dict[str, list[torch.Tensor]] = {"ours": [], "theirs": []}

    def keep(who: str):
        def hook(_, args, kwargs):
            seen[who].append((kwargs["timestep"] if "timestep" in kwargs else args[1]).flatten()[0].cpu())

        return hook

    family.transformer.register_forward_pre_hook(keep("ours"), with_kwargs=True)
    pipeline.transformer.register_forward_pre_hook(keep("theirs"), with_kwargs=True)
    noise = family.initial_latents(1, 64, 64, torch.Generator().manual_seed(0))
    sample(family, family.encode_prompt([Request("a fox")]), 8, 64, 64, noise)
    with torch.no_grad():
        pipeline(**family.call(Request("a fox"), 64, 64, 8, noise))
    assert len(seen["ours"]) == 8
    for mine, theirs in zip(seen["ours"], seen["theirs"], strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


# --- training ---------------------------------------------------------------------------------------------------------


def encoded(name: str, family) -> tuple[list[Example], list[Preview]]:
    """Four rows of two sizes; klein's have references of three shapes, the last row none."""
    shown = [(), (picture(64, 64, 9),), (picture(96, 64, 8), picture(64, 64, 7)), ()]
    sizes = [(64, 64), (64, 96), (64, 64), (64, 96)]
    examples = []
    for number, (references, (height, width)) in enumerate(zip(shown, sizes, strict=True)):
        request = Request(f"a thing {number} in [V] style", references if family.edits else ())
        target = picture(width, height, number)
        (prompt,), (context,) = family.encode_prompt([request]), family.encode_context([request], [target])
        latents = family.encode_images([target])[0]
        examples.append(Example(prompt, context, latents, height, width, number, request.caption))
    return examples, [Preview(e.caption, e.prompt, e.height, e.width) for e in examples[:2]]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_every_family_resumes_bit_for_bit(folders, tmp_path, name):
    changes = {"teacher": {"decay": 0.9, "guidance": 1.5}, "replay": {"weight": 0.5, "prompts": ["x"]}, "loss": "x0"}
    settings = tiny.tiny_settings(max_steps=4, checkpoint_steps=2, lora={"rank": 2, "init": "gaussian"}, **changes)

    def run(folder: Path, cut: int | None) -> None:
        family = load_family(settings_of(name, folders, context_suffix=""))
        examples, previews = encoded(name, family)
        replay = [family.encode_prompt([Request("an owl")])[0]]
        training = Training("d-opsd", settings, examples, "same", replay, previews)
        train(family, training, Place(folder / "train", folder / "adapters", tiny.Cut(cut)))

    run(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", 3)
    run(tmp_path / "cut", None)
    whole, cut = (load_file(tmp_path / who / "adapters" / "d-opsd.safetensors") for who in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert any(bool(value.any()) for key, value in whole.items() if "lora_B" in key)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_gradients_are_the_plain_ones(folders, name):
    grads = []
    for checkpointing in (False, True):
        family = load_family(settings_of(name, folders, gradient_checkpointing=checkpointing))
        pair = add_adapters(family.transformer, LoraSettings(rank=2), family.lora_targets, seed=0)
        (told,) = family.encode_prompt([Request("a fox")])
        noise = family.initial_latents(1, 64, 64, torch.Generator().manual_seed(0))
        family.predict_velocity(noise, torch.tensor(0.8), [told]).square().mean().backward()
        grads.append([p.grad for p in pair.student_parameters()])
        assert family.transformer.is_gradient_checkpointing is checkpointing
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert any(bool(grad.any()) for grad in grads[0])


# --- files ------------------------------------------------------------------------------------------------------------


# Z-Image's file for ComfyUI has a fused layer that diffusers does not know
@pytest.mark.parametrize(
    ("name", "file"),
    [*((name, DIFFUSERS_FILE) for name in NAMES), ("flux2-klein", COMFYUI_FILE), ("krea-2", COMFYUI_FILE)],
)
def test_the_exported_file_in_a_fresh_plain_pipeline_draws_the_students_pictures(folders, tmp_path, name, file):
    family = load_family(settings_of(name, folders))
    lora = LoraSettings(rank=4, alpha=8.0)
    pair = add_adapters(family.transformer, lora, family.lora_targets, seed=0, kind="frozen")
    generator = torch.Generator().manual_seed(1)
    for key, value in adapter_parameters(family.transformer, "student").items():
        if "lora_B" in key:
            value.data.copy_(0.3 * torch.randn(value.shape, generator=generator))
    adapter = save_adapter(tmp_path / "a.safetensors", family.transformer, "student", lora)
    pair.remove()
    asked = [(Request("a fox in [V] style"), 64, 96), (Request("an owl"), 64, 64)]
    if family.edits:
        asked.append((Request("make it [V]", (picture(80, 64, 3), picture(64, 64, 4))), 64, 64))
    out = export_adapter(adapter, tmp_path / "export", tiny.CARD, type(family), torch.float32)
    drawn = draw_student(family, adapter, asked, 4, seed=3)
    compared = check_export(folders[name], out, drawn, type(family), file=file)
    assert compared["change"] > 1, "the adapter is to be seen"
    assert compared["difference"] < 0.25
    with adapter_applied(family.transformer, adapter):
        assert any("applied" in getattr(m, "lora_A", {}) for m in family.transformer.modules())
