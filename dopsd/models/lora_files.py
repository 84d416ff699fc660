"""An adapter as the file that ComfyUI loads whole, one function per family: its own layer names, no layer lost.

ComfyUI skips a name that it does not know with a line in its log, and the picture is the base's or half an adapter's.
So a layer without a place in ComfyUI's model is an error here. All functions take tensors keyed
``<diffusers module>.lora_A.weight`` ``[rank, in]`` and ``<diffusers module>.lora_B.weight`` ``[out, rank]`` with the
scale folded into B already (alpha equals rank), and return tensors keyed ``diffusion_model.<layer>...``, contiguous,
of the same dtype.

The names are those of ComfyUI's own models: every version of ComfyUI takes them, while the other names that it takes
change from version to version (tests/comfyui.py). No alpha is stored.

Facts were read in ComfyUI's ``comfy/lora.py`` (which names are taken), ``comfy/weight_adapter/lora.py`` (no alpha is a
scale of 1), its models under ``comfy/ldm``, and in diffusers 0.42.1, ``loaders/single_file_utils.py`` (which rows of a
published checkpoint are which of a diffusers module).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

_PREFIX: Final = "diffusion_model"
_KEY: Final = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
_BLOCK: Final = re.compile(r"(?P<stack>\D+)\.(?P<number>\d+)\.(?P<layer>.+)")

_Pair = tuple[Tensor, Tensor]
"""A and B of one layer."""
_Stacks = Mapping[str, tuple[str, Mapping[str, str]]]
"""Lists of blocks: the name in diffusers, and the native one with the native names of the layers in such a block."""


class LoraFileError(ValueError):
    """Tensors that cannot become a file which ComfyUI loads whole; the message names the layer."""


# --- Z-Image ----------------------------------------------------------------------------------------------------------

# "#0", "#1", "#2": the first, second or last third of the rows of that layer
_Z_IMAGE_LAYERS: Final = {
    "attention.to_q": "attention.qkv#0",
    "attention.to_k": "attention.qkv#1",
    "attention.to_v": "attention.qkv#2",
    "attention.to_out.0": "attention.out",
} | {name: name for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0")}
_Z_IMAGE_STACKS: Final[_Stacks] = {
    stack: (stack, _Z_IMAGE_LAYERS) for stack in ("layers", "noise_refiner", "context_refiner")
}
# 2-1: patches of 2 x 2 pixels and 1 frame, the only ones that ComfyUI's model has
_Z_IMAGE_SINGLE: Final = {
    "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1.linear": "final_layer.linear",
    "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
} | {name: name for name in ("cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2")}


def z_image_comfyui(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Z-Image: native names, no alpha; q, k and v in one layer, as :func:`klein_comfyui` has them.

    ComfyUI has other names for these layers too, but its versions differ in which: the first knew none, and the next
    those in ``layers`` alone, so that attention in the refiners was passed over. Native names are found by all.
    **diffusers does not know the fused layer**: this file is for ComfyUI, and diffusers needs its own.
    Raises :class:`LoraFileError` for a layer without a native name, an A without its B, or another rank.
    """
    return _written(tensors, rank, _Z_IMAGE_SINGLE, _Z_IMAGE_STACKS, "Z-Image")


# --- FLUX.2-klein -----------------------------------------------------------------------------------------------------

_KLEIN_STACKS: Final[_Stacks] = {
    "transformer_blocks": (
        "double_blocks",
        {
            "attn.to_q": "img_attn.qkv#0",
            "attn.to_k": "img_attn.qkv#1",
            "attn.to_v": "img_attn.qkv#2",
            "attn.to_out.0": "img_attn.proj",
            "attn.add_q_proj": "txt_attn.qkv#0",
            "attn.add_k_proj": "txt_attn.qkv#1",
            "attn.add_v_proj": "txt_attn.qkv#2",
            "attn.to_add_out": "txt_attn.proj",
            # gate before value in both
            "ff.linear_in": "img_mlp.0",
            "ff.linear_out": "img_mlp.2",
            "ff_context.linear_in": "txt_mlp.0",
            "ff_context.linear_out": "txt_mlp.2",
        },
    ),
    # q, k, v, gate, value are one layer in both, rows and columns in the same order
    "single_transformer_blocks": ("single_blocks", {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}),
}
_KLEIN_ADALN: Final = "final_layer.adaLN_modulation.1"
_KLEIN_SINGLE: Final = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    # FLUX.2-dev alone has these two
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "norm_out.linear": _KLEIN_ADALN,
    "proj_out": "final_layer.linear",
}


def klein_comfyui(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """FLUX.2-klein: native names, no alpha. ComfyUI knows no ``diffusion_model.`` + diffusers name for this family.

    The native model has one layer for q, k and v: ``[3 out, n rank] @ [n rank, in]`` for the n of them that are
    adapted, B block-diagonal, zero in the rows of the others. The last modulation is (shift, scale) natively and
    (scale, shift) in diffusers, so B of ``norm_out.linear`` changes its halves. diffusers 0.42.1 changes them back when
    it converts a checkpoint but not when it loads a LoRA: **with norm_out adapted this file is right in ComfyUI alone**
    and diffusers needs its own. Everything else loads alike in both from diffusers 0.40 on; older ones scale the fused
    layer by a share of what it was trained with (benchmarks/exports.py).

    Raises :class:`LoraFileError` for a layer without a native name, an A without its B, or another rank.
    """
    return _written(tensors, rank, _KLEIN_SINGLE, _KLEIN_STACKS, "FLUX.2-klein", halves_change=_KLEIN_ADALN)


# --- Krea-2 -----------------------------------------------------------------------------------------------------------

_KREA_LAYERS: Final = {
    "attn.to_q": "attn.wq",
    "attn.to_k": "attn.wk",
    "attn.to_v": "attn.wv",
    "attn.to_gate": "attn.gate",
    "attn.to_out.0": "attn.wo",
    "ff.gate": "mlp.gate",
    "ff.up": "mlp.up",
    "ff.down": "mlp.down",
}
_KREA_STACKS: Final[_Stacks] = {
    "transformer_blocks": ("blocks", _KREA_LAYERS),
    "text_fusion.layerwise_blocks": ("txtfusion.layerwise_blocks", _KREA_LAYERS),
    "text_fusion.refiner_blocks": ("txtfusion.refiner_blocks", _KREA_LAYERS),
}
_KREA_SINGLE: Final = {
    "img_in": "first",
    "time_embed.linear_1": "tmlp.0",
    "time_embed.linear_2": "tmlp.2",
    "time_mod_proj": "tproj.1",
    "txt_in.linear_1": "txtmlp.1",
    "txt_in.linear_2": "txtmlp.3",
    "text_fusion.projector": "txtfusion.projector",
    "final_layer.linear": "last.linear",
}


def krea_comfyui(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Krea-2: native names, no alpha. Layers are one to one, and no rows are in another order.

    ComfyUI would take ``diffusion_model.`` + diffusers names as well (``krea2_to_diffusers`` in ``comfy/utils.py``),
    but diffusers refuses those, and every alpha.
    Raises :class:`LoraFileError` for a layer without a native name, an A without its B, or another rank.
    """
    return _written(tensors, rank, _KREA_SINGLE, _KREA_STACKS, "Krea-2")


# --- what all have in common ------------------------------------------------------------------------------------------


def _written(
    tensors: Mapping[str, Tensor], rank: int, single: Mapping[str, str], stacks: _Stacks, family: str,
    halves_change: str = "",
) -> dict[str, Tensor]:  # fmt: skip
    """The file under native names. ``halves_change``: the native layer whose halves of rows change places."""
    pairs = _pairs(tensors, rank)
    named: dict[str, _Pair] = {}
    thirds: dict[str, dict[int, _Pair]] = defaultdict(dict)
    for module, (a, b) in pairs.items():
        layer, _, third = _native(module, single, stacks, family).partition("#")
        if third:
            thirds[layer][int(third)] = a, b
        else:
            named[layer] = a, torch.cat(b.chunk(2)[::-1]) if layer == halves_change else b
    named |= {layer: _fused(parts) for layer, parts in thirds.items()}
    return _file(named, rank, len(pairs))


def _fused(thirds: Mapping[int, _Pair]) -> _Pair:
    """The one layer for up to three equally high layers with the same input: A ``[n rank, in]``, B block-diagonal,
    ``[3 out, n rank]``, zero in the rows of an absent one."""
    order = sorted(thirds)
    # an absent one takes its rows and no column
    absent = thirds[order[0]][1][:, :0]
    b = torch.block_diag(*(thirds[third][1] if third in thirds else absent for third in range(3)))
    return torch.cat([thirds[third][0] for third in order]), b


def _pairs(tensors: Mapping[str, Tensor], rank: int) -> dict[str, _Pair]:
    """A and B by diffusers module."""
    halves: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise LoraFileError(
                f"{key}: neither a .lora_A.weight nor a .lora_B.weight; this file holds plain LoRA only"
            )
        halves[match["module"]][match["part"]] = value
    for module, parts in halves.items():
        for part, axis in (("A", 0), ("B", 1)):
            if part not in parts:
                raise LoraFileError(f"{module}: no lora_{part}; the adapter is incomplete")
            # where no alpha is stored a tool takes 1 as the scale: another rank than was folded in would go unseen
            shape = tuple(parts[part].shape)
            if len(shape) != 2 or shape[axis] != rank:
                raise LoraFileError(f"{module}: lora_{part} is {shape}, which is not of rank {rank}")
    return {module: (parts["A"], parts["B"]) for module, parts in halves.items()}


def _native(module: str, single: Mapping[str, str], stacks: _Stacks, family: str) -> str:
    if module in single:
        return single[module]
    match = _BLOCK.fullmatch(module)
    if match is not None and match["stack"] in stacks:
        native, layers = stacks[match["stack"]]
        if match["layer"] in layers:
            return f"{native}.{match['number']}.{layers[match['layer']]}"
    raise LoraFileError(
        f"{module}: ComfyUI has no place for this layer in {family}; leave it out of lora.targets, "
        "or take the file for diffusers"
    )


def _file(named: Mapping[str, _Pair], rank: int, modules: int) -> dict[str, Tensor]:
    """The tensors of a file. Every module brings ``rank`` rows of A with it, so that a lost one is seen here."""
    rows = sum(a.shape[0] for a, _ in named.values())
    if rows != rank * modules:
        raise LoraFileError(f"{modules} layers of rank {rank} became {rows} rows: two layers have the same native name")
    return {
        f"{_PREFIX}.{layer}.lora_{part}.weight": value.contiguous()
        for layer, pair in named.items()
        for part, value in zip("AB", pair, strict=True)
    }
