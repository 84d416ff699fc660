"""ComfyUI's side of a LoRA file, version by version: which names it finds, in which rows of which layer, and its merge.

These are facts, written down from reading its sources, and share nothing with our own tables:

- ``2025-10``: commit a125cd84, 11 October 2025, comfy/lora.py (model_lora_keys_unet): any model's own layers under
  ``diffusion_model.``, and no other name for these families. What the first versions with Z-Image, FLUX.2 and Krea-2
  did for a family until it got more names.
- ``2025-11``: the first names for Z-Image, as node packs that took them over still have them (the commit itself was
  not read): ``layers`` alone, no refiners.
- ``0.7.0``: January 2026, comfy/lora.py and comfy/utils.py (flux_to_diffusers, z_image_to_diffusers).
- ``0.38.1``: the same files at 17358c8f and 09708eae, with krea2_to_diffusers; comfy/lora_convert.py at 2bffe2f4
  changes none of our names; comfy/weight_adapter/lora.py at 6f98b150 (scale: alpha over rows of A, 1 without alpha).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

Place = tuple[str, int | None]
"""A layer of ComfyUI's model, and which third of its rows; ``None``: all."""
VERSIONS = ("2025-10", "2025-11", "0.7.0", "0.38.1")
KNOWS_KREA = ("2025-10", "0.38.1")


def _qkv(prefix: str, names: tuple[str, str, str], layer: str) -> dict[str, Place]:
    return {f"{prefix}{name}": (layer, third) for third, name in enumerate(names)}


def _z_image(version: str, blocks: int) -> dict[str, Place]:
    if version == "2025-10":
        return {}
    names: dict[str, Place] = {
        "all_final_layer.2-1.linear": ("final_layer.linear", None),
        "all_final_layer.2-1.adaLN_modulation.1": ("final_layer.adaLN_modulation.1", None),
        "all_x_embedder.2-1": ("x_embedder", None),
    }
    for stack in ("layers",) if version == "2025-11" else ("layers", "context_refiner", "noise_refiner"):
        for n in range(blocks):
            at = f"{stack}.{n}.attention"
            names |= _qkv(f"{at}.", ("to_q", "to_k", "to_v"), f"{at}.qkv") | {f"{at}.to_out.0": (f"{at}.out", None)}
    return names


def _klein(version: str, blocks: int) -> dict[str, Place]:
    names: dict[str, Place] = {"x_embedder": ("img_in", None), "context_embedder": ("txt_in", None)}
    names["proj_out"] = ("final_layer.linear", None)
    for n in range(blocks):
        at, native = f"transformer_blocks.{n}", f"double_blocks.{n}"
        names |= _qkv(f"{at}.attn.", ("to_q", "to_k", "to_v"), f"{native}.img_attn.qkv")
        names |= _qkv(f"{at}.attn.", ("add_q_proj", "add_k_proj", "add_v_proj"), f"{native}.txt_attn.qkv")
        names[f"{at}.attn.to_out.0"] = (f"{native}.img_attn.proj", None)
        names[f"{at}.attn.to_add_out"] = (f"{native}.txt_attn.proj", None)
        if version == "0.38.1":
            for ours, theirs in (("ff", "img_mlp"), ("ff_context", "txt_mlp")):
                names[f"{at}.{ours}.linear_in"] = (f"{native}.{theirs}.0", None)
                names[f"{at}.{ours}.linear_out"] = (f"{native}.{theirs}.2", None)
            single = f"single_transformer_blocks.{n}.attn"
            names[f"{single}.to_qkv_mlp_proj"] = (f"single_blocks.{n}.linear1", None)
            names[f"{single}.to_out"] = (f"single_blocks.{n}.linear2", None)
    return names


def _krea(version: str, blocks: int) -> dict[str, Place]:
    if version != "0.38.1":
        return {}
    pairs = {
        "img_in": "first", "time_embed.linear_1": "tmlp.0", "time_embed.linear_2": "tmlp.2", "time_mod_proj": "tproj.1",
        "txt_in.linear_1": "txtmlp.1", "txt_in.linear_2": "txtmlp.3", "text_fusion.projector": "txtfusion.projector",
        "final_layer.linear": "last.linear",
    }  # fmt: skip
    layers = {"attn.to_q": "attn.wq", "attn.to_k": "attn.wk", "attn.to_v": "attn.wv", "attn.to_gate": "attn.gate",
              "attn.to_out.0": "attn.wo", "attn.to_out": "attn.wo", "ff.gate": "mlp.gate", "ff.up": "mlp.up",
              "ff.down": "mlp.down"}  # fmt: skip
    stacks = {"transformer_blocks": "blocks", "text_fusion.layerwise_blocks": "txtfusion.layerwise_blocks",
              "text_fusion.refiner_blocks": "txtfusion.refiner_blocks"}  # fmt: skip
    for stack, native in stacks.items():
        for n in range(blocks):
            pairs |= {f"{stack}.{n}.{ours}": f"{native}.{n}.{theirs}" for ours, theirs in layers.items()}
    return {name: (layer, None) for name, layer in pairs.items()}


def places(family: str, version: str, layers: Mapping[str, Tensor], blocks: int) -> dict[str, Place]:
    """Every name that this version finds in a file, for a model of these ``layers`` and two stacks of ``blocks``."""
    found: dict[str, Place] = {f"diffusion_model.{layer}": (layer, None) for layer in layers}
    if family == "klein":
        found |= {f"transformer.{name}": place for name, place in _klein(version, blocks).items()}
        return found
    for name, place in (_z_image if family == "z-image" else _krea)(version, blocks).items():
        prefixes = ["diffusion_model."] + ["transformer."] * (version not in ("2025-10", "2025-11"))
        found |= {f"{prefix}{name}": place for prefix in prefixes}
    return found


def merge(
    file: Mapping[str, Tensor], native: Mapping[str, Tensor], found: Mapping[str, Place]
) -> tuple[dict[str, Tensor], set[str]]:
    """ComfyUI's weights with the file at strength 1, and the tensors of it that it passes over with a line in a log.

    As there, what a name adds to one place takes the place of what an earlier name would have added there.
    """
    patches: dict[Place, Tensor] = {}
    unread = set(file)
    for name, place in found.items():
        for up, down in _ends():
            if f"{name}.{up}" not in file:
                continue
            b, a, alpha = file[f"{name}.{up}"], file[f"{name}.{down}"], file.get(f"{name}.alpha")
            patches[place] = (1.0 if alpha is None else float(alpha) / a.shape[0]) * b @ a
            unread -= {f"{name}.{up}", f"{name}.{down}", f"{name}.alpha"}
    merged = {layer: weight.clone() for layer, weight in native.items()}
    for (layer, third), patch in patches.items():
        weight = merged[layer] if third is None else merged[layer].chunk(3)[third]
        weight += patch
    return merged, unread


def _ends() -> Iterator[tuple[str, str]]:
    yield "lora_up.weight", "lora_down.weight"
    yield "lora_B.weight", "lora_A.weight"
