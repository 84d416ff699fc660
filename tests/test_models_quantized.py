"""A base in fewer bits, in turns and in blocks: the answers of plain weights of the same values, for every family."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen3ForCausalLM

from dopsd.config.groups import LoraSettings, ModelSettings
from dopsd.distill.adapters import (
    AdapterPair,
    adapted_layers,
    adapter_applied,
    remove_adapters,
    save_adapter,
)
from dopsd.distill.rollout import rollout, sample
from dopsd.export import DIFFUSERS_FILE, check_export, draw_student, export_adapter
from dopsd.models import ModelError, load_family
from dopsd.models.base import Family, Request
from dopsd.models.loading import place
from dopsd.models.quantized import blocks_of, quantize
from tests.family_folders import NAMES, picture, settings_of
from tests.tiny import CARD, trained_pair

KINDS = ("int8", "fp8", "nf4")
LORA = LoraSettings(rank=4)
BITS = {"int8": 0.01, "fp8": 0.04, "nf4": 0.11}
"""How far rounded weights are from the base's, relative, at most."""


def _family(name: str, folders: dict[str, Path], **more: Any) -> Family:
    return load_family(settings_of(name, folders, **more))


def _step(family: Family, pair: AdapterPair) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradients ``[all]`` of one roll-out."""
    (prompt,) = family.encode_prompt([Request("a fox")])
    (context,) = family.encode_context([Request("a fox")], [picture(64, 64)])
    noise = family.initial_latents(1, 64, 64, torch.Generator().manual_seed(2))
    sigmas = family.sigmas(2, 64, 64)
    _, loss = rollout(family.velocity, pair, noise, sigmas, [prompt], [context], teacher="teacher")
    return loss, torch.cat([torch.as_tensor(p.grad).flatten() for p in pair.student_parameters()])


def _weights(linear: nn.Linear) -> torch.Tensor:
    """What a linear layer multiplies by: the answer to every unit vector, less the bias."""
    with torch.no_grad():
        found = linear(torch.eye(linear.in_features))
        return (found if linear.bias is None else found - linear.bias).T.contiguous()


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    inside = {id(part) for block in blocks_of(module) for part in block.modules()}
    return ((n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear) and id(m) in inside)


def _away(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# --- fewer bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_plain_weights_of_the_same_values(folders, name, kind):
    rounded, plain = _family(name, folders, quantization=kind), _family(name, folders)
    for part in ("transformer", "text_encoder"):
        theirs = dict(_layers(plain.parts[part]))
        for path, layer in _layers(rounded.parts[part]):
            values = _weights(layer)
            whole = kind == "nf4" and layer.weight.numel() % 64 and not hasattr(layer.weight, "quant_state")
            assert whole or 1e-4 < _away(values, theirs[path].weight) < BITS[kind]
            theirs[path].weight.data = values.clone()
        others = {n for n, _ in plain.parts[part].named_parameters()} - {f"{path}.weight" for path in theirs}
        own, same = dict(rounded.parts[part].named_parameters()), dict(plain.parts[part].named_parameters())
        assert all(torch.equal(own[n], same[n]) for n in others), "what is outside of the blocks keeps its precision"
    plain.parts.release(["vision"])  # it looks through the text encoder, whose values were replaced
    (loss, grads), (expected, truth) = _step(rounded, trained_pair(rounded)), _step(plain, trained_pair(plain))
    assert loss == pytest.approx(float(expected), rel=1e-4)
    assert _away(grads, truth) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_on_a_rounded_bfloat16_base_cast_nothing_and_no_bit_changes(folders, kind):
    family = _family("z-image", folders, quantization=kind, dtype="bfloat16")
    pair, found = trained_pair(family), []
    layers = list(adapted_layers(family.transformer, "student").values())
    assert {layer.cast_input_dtype_enabled for layer in layers} == {False}
    for cast in (False, True):
        for layer in layers:
            layer.cast_input_dtype_enabled = cast
        loss, grads = _step(family, pair)
        found.append(torch.cat([loss.reshape(1), grads]))
        for parameter in pair.student_parameters():
            parameter.grad = None
    assert torch.equal(*found)


@pytest.mark.parametrize("name", NAMES)
def test_the_rounded_base_is_drawn_by_plain_diffusers_rounded_alike(folders, tmp_path, name):
    family = _family(name, folders, quantization="int8")
    trained_pair(family)
    path = save_adapter(tmp_path / "student.safetensors", family.transformer, "student", LORA)
    remove_adapters(family.transformer, ("student", "teacher"))
    export = export_adapter(path, tmp_path / "export", CARD, type(family))
    drawn = draw_student(family, path, [(Request("a fox"), 64, 64)], 2, 0)
    found = check_export(folders[name], export, drawn, type(family), quantization="int8")
    assert found["difference"] < 0.25 < found["change"]
    assert (export / DIFFUSERS_FILE).is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_a_rounded_base_fits_the_base_itself(folders, tmp_path, kind):
    """The velocity with the adapter differs by no more than the two bases do without it, and a half."""
    rounded, plain = _family("z-image", folders, quantization=kind), _family("z-image", folders)
    trained_pair(rounded)
    path = save_adapter(tmp_path / "student.safetensors", rounded.transformer, "student", LORA)
    remove_adapters(rounded.transformer, ("student", "teacher"))
    (prompt,) = plain.encode_prompt([Request("a fox")])
    noise = plain.initial_latents(1, 64, 64, torch.Generator().manual_seed(2))

    def velocity(family: Family, adapter: Path | None) -> torch.Tensor:
        with adapter_applied(family.transformer, adapter), torch.no_grad():
            return family.predict_velocity(noise, torch.tensor(0.8), [prompt])

    bases = _away(velocity(rounded, None), velocity(plain, None))
    assert 0 < _away(velocity(rounded, path), velocity(plain, path)) < 1.5 * bases < 0.5


def test_a_library_that_is_not_installed_is_one_line(folders, monkeypatch):
    monkeypatch.setattr("dopsd.models.quantized.find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"nf4 needs bitsandbytes; `pip install -e '.\[quantization\]'` brings it"):
        _family("z-image", folders, quantization="nf4")


# --- in blocks and in turns -------------------------------------------------------------------------------------------

WAITING = {"gradient_checkpointing": "every", "offload": "group"}


@pytest.mark.parametrize("how", [WAITING, {"offload": "model"}, {"gradient_checkpointing": "every-second"}])
@pytest.mark.parametrize("name", NAMES)
def test_where_weights_wait_and_what_is_computed_twice_changes_nothing(folders, monkeypatch, name, how):
    monkeypatch.setattr("dopsd.distill.adapters._MERGED_PARAMETERS", 0)  # weights that wait are not merged
    there, waiting = _family(name, folders), _family(name, folders, **how)
    (loss, grads), (expected, truth) = _step(waiting, trained_pair(waiting)), _step(there, trained_pair(there))
    assert loss == pytest.approx(float(expected), rel=1e-5)  # a copy lies elsewhere, and its product may round so
    assert _away(grads, truth) < 1e-5


@pytest.mark.parametrize("kind", ["none", "int8", "nf4"])
def test_two_blocks_are_on_the_device_at_once(folders, monkeypatch, kind):
    """Of a step, and of a sample: the one that computes, and the next. In a backward pass the one whose gradients are
    computed is a third."""
    from dopsd.models import offload

    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most, copy = 0, offload._copy

    def counted(kept: nn.Parameter, device: torch.device) -> nn.Parameter:
        nonlocal most
        made = copy(kept, device)
        alive.add(made)
        most = max(most, len(alive))
        return made

    family = _family("z-image", folders, quantization=kind, **WAITING)
    blocks = blocks_of(family.transformer)
    each = max(sum(1 for _ in block.parameters()) for block in blocks)
    assert len(blocks) > 4
    pair = trained_pair(family)
    monkeypatch.setattr(offload, "_copy", counted)
    _step(family, pair)
    assert 0 < most <= 3 * each
    most = 0
    (prompt,) = family.encode_prompt([Request("a fox")])
    sample(family, [prompt], 2, 64, 64, family.initial_latents(1, 64, 64, torch.Generator()))
    assert 0 < most <= 2 * each


def test_blocks_are_given_back_where_a_forward_fails(folders):
    family = _family("z-image", folders, **WAITING)
    before = [id(p) for p in family.transformer.parameters()]
    with pytest.raises(RuntimeError, match="shape"):
        family.predict_velocity(torch.zeros(1, 1, 2, 2), torch.tensor(0.5), [{"caption": torch.zeros(4, 7)}])
    assert [id(p) for p in family.transformer.parameters()] == before


def test_blocks_in_host_memory_need_checkpointing():
    with pytest.raises(ValueError, match="offload: group needs gradient_checkpointing: every"):
        ModelSettings(path="x", offload="group")
    assert ModelSettings.model_validate({"path": "x", "gradient_checkpointing": True}).gradient_checkpointing == "every"
    assert ModelSettings.model_validate({"path": "x", "gradient_checkpointing": False}).gradient_checkpointing == "none"


def test_in_turns_one_large_part_is_on_the_device(folders):
    """On a device that only notes what is brought to it."""
    family = _family("z-image", folders, offload="model")
    where: dict[str, str] = {}

    def watch(name: str) -> None:
        part, move = family.parts[name], type(family.parts[name]).to  # type: ignore[index]

        def moved(device: Any) -> Any:
            where[name] = str(device)
            return move(part, "cpu")

        part.to = moved

    for name in ("text_encoder", "transformer"):
        watch(name)
    family.parts._in_turn = torch.device("meta")
    family.encode_prompt([Request("a fox")])
    assert where == {"text_encoder": "meta", "transformer": "cpu"}
    _ = family.transformer
    assert where == {"text_encoder": "cpu", "transformer": "meta"}
    family.parts.release(["text_encoder", "transformer"])
    assert where == {"text_encoder": "cpu", "transformer": "cpu"}
    assert family.parts.loaded() >= {"text_encoder", "transformer"}, "nothing is read twice"


def test_nf4_is_the_published_grid():
    """Against the sixteen levels of the paper (arXiv 2305.14314, appendix E), in groups of 64 by their largest."""
    grid = torch.tensor([
        -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
    ])  # fmt: skip
    block = nn.Sequential(nn.Linear(32, 100))
    weight = block[0].weight.data.clone()
    quantize(block, "nf4", torch.device("cpu"))
    groups = weight.reshape(-1, 64)
    scale = groups.abs().amax(1, keepdim=True)
    nearest = (groups / scale).unsqueeze(-1).sub(grid).abs().argmin(-1)
    expected = (grid[nearest] * scale).reshape(weight.shape)
    assert _away(_weights(block[0]), expected) < 0.02, "of which the scales' own rounding is all"


@pytest.mark.parametrize("blocks", ["there", "in turn"])
def test_tied_weights_stay_one_on_their_device(folders, blocks):
    """klein 4B's head is its embeddings: the pipeline's text encoder has as many parameters there as before."""
    model = Qwen3ForCausalLM.from_pretrained(folders["flux2-klein"] / "text_encoder").requires_grad_(False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before, ids = sum(value.numel() for value in model.parameters()), torch.arange(5)[None]
    expected = model(input_ids=ids).logits
    place(model, torch.device("cpu"), "none", blocks)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(value.numel() for value in model.parameters()) == before
    assert torch.equal(model(input_ids=ids).logits, expected)
