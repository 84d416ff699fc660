"""Files for ComfyUI against independent truths: diffusers' loaders, and the native models' layers restated here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Krea2Pipeline, ZImagePipeline
from diffusers.loaders import single_file_utils as single_file
from diffusers.models import Flux2Transformer2DModel, Krea2Transformer2DModel, ZImageTransformer2DModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from dopsd.models import lora_files
from dopsd.models.lora_files import LoraFileError, klein_comfyui, krea_comfyui, z_image_comfyui
from tests import comfyui

RANK, BLOCKS = 2, 2

Rows = tuple[str, int | None]
"""All rows of a diffusers module, or its upper (0) or lower (1) half."""
Layout = dict[str, list[Rows]]
"""Layers of the native model, and what their rows are from top to bottom."""


# --- the native models, restated --------------------------------------------------------------------------------------


def whole(*modules: str) -> list[Rows]:
    return [(module, None) for module in modules]


def klein_layout() -> Layout:
    """FLUX.2: two streams with a fused qkv and an MLP of gate and value, then blocks of two layers."""
    layout = {
        "img_in": whole("x_embedder"),
        "txt_in": whole("context_embedder"),
        "final_layer.linear": whole("proj_out"),
        # shift then scale here, scale then shift in diffusers
        "final_layer.adaLN_modulation.1": [("norm_out.linear", 1), ("norm_out.linear", 0)],
    }
    for kind, embedder in (("time", "timestep"), ("guidance", "guidance")):
        for place, number in (("in", 1), ("out", 2)):
            module = f"time_guidance_embed.{embedder}_embedder.linear_{number}"
            layout[f"{kind}_in.{place}_layer"] = whole(module)
    for kind in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        layout[f"{kind}.lin"] = whole(f"{kind}.linear")
    for n in range(BLOCKS):
        at, double = f"transformer_blocks.{n}", f"double_blocks.{n}"
        layout[f"{double}.img_attn.qkv"] = whole(*(f"{at}.attn.to_{x}" for x in "qkv"))
        layout[f"{double}.txt_attn.qkv"] = whole(*(f"{at}.attn.add_{x}_proj" for x in "qkv"))
        layout[f"{double}.img_attn.proj"] = whole(f"{at}.attn.to_out.0")
        layout[f"{double}.txt_attn.proj"] = whole(f"{at}.attn.to_add_out")
        for stream, ff in (("img", "ff"), ("txt", "ff_context")):
            layout[f"{double}.{stream}_mlp.0"] = whole(f"{at}.{ff}.linear_in")
            layout[f"{double}.{stream}_mlp.2"] = whole(f"{at}.{ff}.linear_out")
        layout[f"single_blocks.{n}.linear1"] = whole(f"single_transformer_blocks.{n}.attn.to_qkv_mlp_proj")
        layout[f"single_blocks.{n}.linear2"] = whole(f"single_transformer_blocks.{n}.attn.to_out")
    return layout


def krea_layout() -> Layout:
    """Krea-2: nothing is fused; sequences (``tmlp``, ``tproj``, ``txtmlp``) number their activations and norms too."""
    layout = {
        "first": whole("img_in"),
        "last.linear": whole("final_layer.linear"),
        "tmlp.0": whole("time_embed.linear_1"),
        "tmlp.2": whole("time_embed.linear_2"),
        "tproj.1": whole("time_mod_proj"),
        "txtmlp.1": whole("txt_in.linear_1"),
        "txtmlp.3": whole("txt_in.linear_2"),
        "txtfusion.projector": whole("text_fusion.projector"),
    }
    stacks = {"blocks": "transformer_blocks"}
    stacks |= {f"txtfusion.{kind}_blocks": f"text_fusion.{kind}_blocks" for kind in ("layerwise", "refiner")}
    for native, ours in stacks.items():
        for n in range(BLOCKS):
            for x in "qkv":
                layout[f"{native}.{n}.attn.w{x}"] = whole(f"{ours}.{n}.attn.to_{x}")
            layout[f"{native}.{n}.attn.wo"] = whole(f"{ours}.{n}.attn.to_out.0")
            layout[f"{native}.{n}.attn.gate"] = whole(f"{ours}.{n}.attn.to_gate")
            for part in ("gate", "up", "down"):
                layout[f"{native}.{n}.mlp.{part}"] = whole(f"{ours}.{n}.ff.{part}")
    return layout


def z_image_layout() -> Layout:
    """Z-Image: a fused qkv, everything else under its own name; the blocks of the caption have no modulation."""
    layout = {
        "x_embedder": whole("all_x_embedder.2-1"),
        "final_layer.linear": whole("all_final_layer.2-1.linear"),
        "final_layer.adaLN_modulation.1": whole("all_final_layer.2-1.adaLN_modulation.1"),
    }
    layout |= {same: whole(same) for same in ("cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2")}
    for stack in ("layers", "noise_refiner", "context_refiner"):
        for n in range(BLOCKS):
            at = f"{stack}.{n}"
            layout[f"{at}.attention.qkv"] = whole(*(f"{at}.attention.to_{x}" for x in "qkv"))
            layout[f"{at}.attention.out"] = whole(f"{at}.attention.to_out.0")
            same = [f"{at}.feed_forward.w{x}" for x in (1, 2, 3)]
            same += [f"{at}.adaLN_modulation.0"] * (stack != "context_refiner")
            layout |= {name: whole(name) for name in same}
    return layout


@dataclass(frozen=True)
class Case:
    write: Callable[[Mapping[str, Tensor], int], dict[str, Tensor]]
    pipeline: Any
    transformer: Any
    config: Mapping[str, Any]
    layout: Callable[[], Layout]
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    """diffusers' own conversion of a published checkpoint."""

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.transformer(**self.config)


CASES = {
    "klein": Case(
        klein_comfyui, Flux2KleinPipeline, Flux2Transformer2DModel,
        {
            "in_channels": 8, "num_layers": BLOCKS, "num_single_layers": BLOCKS, "attention_head_dim": 8,
            "num_attention_heads": 2, "joint_attention_dim": 12, "timestep_guidance_channels": 8,
            "axes_dims_rope": (2, 2, 2, 2),
        },
        klein_layout, single_file.convert_flux2_transformer_checkpoint_to_diffusers,
    ),
    "krea": Case(
        krea_comfyui, Krea2Pipeline, Krea2Transformer2DModel,
        {
            "in_channels": 8, "num_layers": BLOCKS, "attention_head_dim": 8, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 24, "timestep_embed_dim": 8, "text_hidden_dim": 12,
            "num_text_layers": 3, "text_num_attention_heads": 2, "text_num_key_value_heads": 2,
            "text_intermediate_size": 20, "axes_dims_rope": (4, 2, 2),
        },
        krea_layout, single_file.convert_krea2_transformer_checkpoint_to_diffusers,
    ),
    "z-image": Case(
        z_image_comfyui, ZImagePipeline, ZImageTransformer2DModel,
        {
            "in_channels": 4, "dim": 24, "n_layers": BLOCKS, "n_refiner_layers": BLOCKS, "n_heads": 2,
            "n_kv_heads": 2, "cap_feat_dim": 10, "axes_dims": [4, 4, 4], "axes_lens": [16, 16, 16],
        },
        z_image_layout, single_file.convert_z_image_transformer_checkpoint_to_diffusers,
    ),
}  # fmt: skip
ALL = pytest.mark.parametrize("name", CASES)
VERSIONS = [(name, version) for name in CASES for version in comfyui.VERSIONS
            if name != "krea" or version in comfyui.KNOWS_KREA]  # fmt: skip


def weights_of(transformer: nn.Module) -> dict[str, Tensor]:
    """Every layer that a user may adapt."""
    return {name: m.weight.data for name, m in transformer.named_modules() if isinstance(m, nn.Linear)}


@cache
def base(name: str) -> dict[str, Tensor]:
    """The weights of a case's own transformer, built once and never written to."""
    return weights_of(CASES[name].build())


def adapter_of(weights: Mapping[str, Tensor], modules: Iterable[str] | None = None) -> dict[str, Tensor]:
    """A random adapter as an adapter file has it."""
    generator = torch.Generator().manual_seed(1)
    adapter = {}
    for module in weights if modules is None else modules:
        rows, columns = weights[module].shape
        adapter[f"{module}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator)
        adapter[f"{module}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator)
    return adapter


def deltas_of(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    modules = {key.rsplit(".", 2)[0] for key in adapter}
    return {m: adapter[f"{m}.lora_B.weight"] @ adapter[f"{m}.lora_A.weight"] for m in modules}


def stacked(layout: Layout, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of diffusers modules as the native layers hold them."""

    def rows(module: str, half: int | None) -> Tensor:
        return values[module] if half is None else values[module].chunk(2)[half]

    return {layer: torch.cat([rows(*piece) for piece in pieces]) for layer, pieces in layout.items()}


def merged_by_comfyui(
    name: str, version: str, file: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], set[str]]:
    """The native weights after the merge of a version of ComfyUI, and the tensors of the file that it passes over."""
    native = stacked(CASES[name].layout(), weights)
    return comfyui.merge(file, native, comfyui.places(name, version, native, BLOCKS))


def loaded_by_diffusers(case: Case, file: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """What the file adds to each layer that diffusers put an adapter on."""
    transformer = case.build()
    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer"))
    pipeline = case.pipeline(**parts, transformer=transformer)
    save_file(dict(file), folder / "file.safetensors")
    pipeline.load_lora_weights(folder, weight_name="file.safetensors")
    (adapter,) = pipeline.get_active_adapters()
    layers = {name: m for name, m in transformer.named_modules() if isinstance(m, LoraLayer)}
    return {name: layer.get_delta_weight(adapter).detach() for name, layer in layers.items()}


def names_of_today(adapter: Mapping[str, Tensor], alpha: bool = True) -> dict[str, Tensor]:
    """``diffusion_model.`` and diffusers' names, with alpha: what fits Z-Image, for any family."""
    file = {f"diffusion_model.{key}": value for key, value in adapter.items()}
    modules = {key.rsplit(".", 2)[0] for key in file} if alpha else ()
    return file | {f"{module}.alpha": torch.tensor(float(RANK)) for module in modules}


# --- the truths agree among themselves --------------------------------------------------------------------------------


@ALL
def test_the_restated_layers_are_those_that_diffusers_converts(name: str) -> None:
    case = CASES[name]
    weights, layout = base(name), case.layout()
    assert {module for pieces in layout.values() for module, _ in pieces} == set(weights), "all layers, no other"
    native = {f"{layer}.weight": value for layer, value in stacked(layout, weights).items()}
    converted = case.convert(native)
    assert converted.keys() == {f"{module}.weight" for module in weights}
    assert all(torch.equal(converted[f"{module}.weight"], value) for module, value in weights.items())


# --- whole adapters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "version", "only"),
    [(*of, only) for only in (None, r"\.0\.", "refiner", "to_k|to_v|add_v") for of in VERSIONS
     if (of[0], only) != ("klein", "refiner")],  # it has none
)  # fmt: skip
def test_every_comfyui_merges_every_layer(name: str, version: str, only: str | None) -> None:
    case = CASES[name]
    weights = {module: weight.double() for module, weight in base(name).items()}
    modules = [module for module in weights if only is None or re.search(only, module)]
    assert modules
    adapter = {key: value.double() for key, value in adapter_of(weights, modules).items()}
    native, unread = merged_by_comfyui(name, version, case.write(adapter, RANK), weights)
    assert not unread
    deltas = deltas_of(adapter)
    wanted = stacked(case.layout(), {m: weight + deltas.get(m, 0.0) for m, weight in weights.items()})
    torch.testing.assert_close(native, wanted)


def test_the_names_of_diffusers_are_lost_on_some_versions() -> None:
    """Why the file has native names: what is passed over is a line in a log, and the picture half an adapter's."""
    weights = base("z-image")
    lost = {}
    for version in comfyui.VERSIONS:
        _, unread = merged_by_comfyui("z-image", version, names_of_today(adapter_of(weights)), weights)
        lost[version] = {key.split(".")[1] for key in unread if "attention" in key}
    assert lost["2025-10"] == {"layers", "noise_refiner", "context_refiner"}
    assert lost["2025-11"] == {"noise_refiner", "context_refiner"}
    assert lost["0.7.0"] == lost["0.38.1"] == set()


@pytest.mark.parametrize("name", ["klein", "krea"])
def test_diffusers_loads_the_same_adapter(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    adapter = adapter_of(base(name))
    deltas = deltas_of(adapter)
    if name == "klein":
        # diffusers converts LoRA files without the change of halves that it makes for checkpoints
        deltas["norm_out.linear"] = torch.cat(deltas["norm_out.linear"].chunk(2)[::-1])
    torch.testing.assert_close(loaded_by_diffusers(case, case.write(adapter, RANK), tmp_path), deltas)


def test_the_file_of_z_image_is_not_for_diffusers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It has no place for the fused layer, and says so; the file for diffusers is the other one."""
    case = CASES["z-image"]
    adapter = adapter_of(base("z-image"), ["layers.0.attention.to_q", "layers.0.feed_forward.w1"])
    assert set(loaded_by_diffusers(case, case.write(adapter, RANK), tmp_path)) == {"layers.0.feed_forward.w1"}
    assert "unexpected keys found in the model: layers.0.attention.qkv.lora_A.weight" in caplog.text


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_can_be_saved_and_keeps_its_dtype(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = CASES[name]
    adapter = adapter_of(base(name))
    adapter = {key: value.to(dtype).T.contiguous().T for key, value in adapter.items()}
    file = case.write(adapter, RANK)
    save_file(file, tmp_path / "file.safetensors")  # refuses what is not contiguous or shares memory
    assert {value.dtype for value in file.values()} == {dtype}


@ALL
def test_no_file_stores_an_alpha(name: str) -> None:
    case = CASES[name]
    file = case.write(adapter_of(base(name)), RANK)
    assert {key.rsplit(".", 2)[1] for key in file} == {"lora_A", "lora_B"}


# --- a part of the layers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["q", "k", "v", "qk", "qv", "kv", "vq"])
@pytest.mark.parametrize("stream", ["attn.to_{}", "attn.add_{}_proj"])
def test_a_fused_layer_of_which_only_some_are_adapted(which: str, stream: str, tmp_path: Path) -> None:
    case = CASES["klein"]
    weights = base("klein")
    modules = [f"transformer_blocks.1.{stream.format(x)}" for x in which]
    adapter = adapter_of(weights, modules)
    file = case.write(adapter, RANK)
    layer = f"diffusion_model.double_blocks.1.{'img' if 'to' in stream else 'txt'}_attn.qkv"
    assert {key: tuple(value.shape) for key, value in file.items()} == {
        f"{layer}.lora_A.weight": (len(which) * RANK, 16),
        f"{layer}.lora_B.weight": (3 * 16, len(which) * RANK),
    }
    deltas = deltas_of(adapter)
    native, unread = merged_by_comfyui("klein", "0.38.1", file, weights)
    assert not unread
    torch.testing.assert_close(native, stacked(case.layout(), weights | {m: weights[m] + deltas[m] for m in modules}))
    loaded = loaded_by_diffusers(case, file, tmp_path)
    assert len(loaded) == 3
    for module, delta in loaded.items():
        torch.testing.assert_close(delta, deltas.get(module, torch.zeros_like(delta)))


@ALL
def test_each_layer_alone_has_its_place(name: str) -> None:
    case = CASES[name]
    weights = base(name)
    for module in weights:
        file = case.write(adapter_of(weights, [module]), RANK)
        assert len(file) == 2
        _, unread = merged_by_comfyui(name, "0.38.1", file, weights)
        assert not unread, module


# --- what must not be written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "module"),
    [
        (klein_comfyui, "transformer_blocks.0.attn.to_qkv"),
        (klein_comfyui, "single_transformer_blocks.0.attn.to_q"),
        (klein_comfyui, "layers.0.attention.to_q"),
        (krea_comfyui, "transformer_blocks.0.attn.to_out"),
        (krea_comfyui, "text_fusion.other_blocks.0.ff.up"),
        (z_image_comfyui, "siglip_refiner.0.attention.to_q"),
        (z_image_comfyui, "all_x_embedder.1-1"),
        (z_image_comfyui, "transformer_blocks.0.attn.to_q"),
    ],
)
def test_a_layer_without_a_place_is_named(write: Callable[..., object], module: str) -> None:
    with pytest.raises(LoraFileError, match=f"^{module}: ComfyUI has no place for this layer"):
        write(adapter_of({module: torch.zeros(4, 4)}), RANK)


@ALL
def test_a_broken_adapter_is_refused(name: str) -> None:
    case = CASES[name]
    weights = base(name)
    module = next(iter(weights))
    a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
    adapter = adapter_of(weights)
    for missing in (a, b):
        with pytest.raises(LoraFileError, match=f"^{module}: no lora_{missing[-8]}; the adapter is incomplete"):
            case.write({key: value for key, value in adapter.items() if key != missing}, RANK)
    with pytest.raises(LoraFileError, match=r"which is not of rank 3"):
        case.write(adapter, 3)
    with pytest.raises(LoraFileError, match=rf"^{module}: lora_B is .* not of rank {RANK}"):
        case.write(adapter | {b: adapter[b][:, :1]}, RANK)
    with pytest.raises(LoraFileError, match="plain LoRA only"):
        case.write(adapter | {f"{module}.lora_magnitude_vector": torch.ones(4)}, RANK)


def test_a_lost_layer_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lora_files._KREA_SINGLE, "txt_in.linear_1", "first")
    with pytest.raises(LoraFileError, match="two layers have the same native name"):
        krea_comfyui(adapter_of(base("krea")), RANK)


# --- why one form does not fit all ------------------------------------------------------------------------------------


def test_the_names_for_z_image_are_nothing_to_comfyui_with_klein() -> None:
    case = CASES["klein"]
    weights = base("klein")
    file = names_of_today(adapter_of(weights))
    native, unread = merged_by_comfyui("klein", "0.38.1", file, weights)
    assert unread == set(file), "it would draw the base"
    torch.testing.assert_close(native, stacked(case.layout(), weights))


@pytest.mark.parametrize(("name", "alpha"), [("klein", True), ("krea", True), ("krea", False)])
def test_the_names_for_z_image_are_an_error_to_diffusers(name: str, alpha: bool, tmp_path: Path) -> None:
    case = CASES[name]
    file = names_of_today(adapter_of(base(name)), alpha)
    with pytest.raises(ValueError, match="should be empty at this point"):
        loaded_by_diffusers(case, file, tmp_path)
