"""Qwen3-VL as the teacher's eyes: its vision half in front of a text encoder, and how pictures enter a turn."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image
from torch import Tensor

from .sources import ModelError

_PAD = "<|image_pad|>"


def load_with(folder: Path, text_encoder: Any, positions: Literal["vlm", "encoder"]) -> Any:
    """A ``Qwen3VLModel`` with the folder's vision half and ``text_encoder``'s own tensors as its language half.

    The folder's language weights are never read. ``positions`` says whose rotary frequencies the language half has:
    the VLM's own, as the authors' code has it by accident (theta 5,000,000 for weights that were trained at
    1,000,000), or the text encoder's. Raises :class:`ModelError` where the two do not fit.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, Qwen3VLModel

    config = AutoConfig.from_pretrained(folder, attn_implementation="sdpa")
    with init_empty_weights(include_buffers=False):
        vlm = Qwen3VLModel(config)
    _assign(folder, vlm.visual, "visual.", text_encoder.dtype)
    share_language_half(vlm, text_encoder)
    if positions == "encoder":
        rotary, own = vlm.language_model.rotary_emb, text_encoder.rotary_emb
        for name in ("inv_freq", "original_inv_freq"):
            setattr(rotary, name, getattr(own, name).detach().clone())
    return vlm


def share_language_half(vlm: Any, text_encoder: Any) -> None:
    """Make the VLM's language model use the text encoder's own tensors (no copy in memory); every key must match.

    Linear layers are shared as they are, whatever form their weights are stored in.
    """
    own = {name: part for name, part in text_encoder.named_modules() if isinstance(part, torch.nn.Linear)}
    named = dict(vlm.language_model.named_modules())
    for name in own.keys() & named.keys():
        parent, _, last = name.rpartition(".")
        setattr(named[parent], last, own[name])
    missing, unexpected = vlm.language_model.load_state_dict(
        {key: value for key, value in text_encoder.state_dict().items() if _owner(key, named) not in own}, strict=False,
        assign=True,
    )  # fmt: skip
    missing = [key for key in missing if _owner(key, named) not in own]
    if missing or unexpected:
        names = ", ".join([*missing, *unexpected][:4])
        raise ModelError(f"the VLM's language half does not fit the text encoder (keys {names})")


def _owner(key: str, modules: Mapping[str, torch.nn.Module]) -> str:
    """The module that a key of a state dictionary belongs to: quantized weights have names below their own."""
    while key and key not in modules:
        key = key.rpartition(".")[0]
    return key


def _assign(folder: Path, module: Any, prefix: str, dtype: torch.dtype) -> None:
    """Fill ``module`` with the folder's tensors whose names hold ``prefix`` (``model.visual.`` or ``visual.``)."""
    from safetensors import safe_open

    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 (not a dict)
                short = key.removeprefix("model.")
                if short.startswith(prefix):
                    tensors[short.removeprefix(prefix)] = weights.get_tensor(key).to(dtype)
    missing, unexpected = module.load_state_dict(tensors, strict=False, assign=True)
    if missing or unexpected:
        faults = [*missing, *unexpected]
        raise ModelError(f"{folder}: the VLM's weights lack {faults[0]} and {len(faults) - 1} more; copy it again")


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [
            folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        ]
    return [folder / "model.safetensors"]


def load_image_processor(folder: Path) -> Any:
    """The VLM's image processor; without torchvision the one that works on PIL images."""
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(folder)
    from transformers import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil.from_pretrained(folder)


def image_processor_of(vision: Any) -> Any:
    """Qwen3-VL's published image processor for a vision configuration, where a folder brings none."""
    from transformers import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size, merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size, image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip


def pixels_of(processor: Any, images: Sequence[Image], limits: tuple[int, int]) -> Any:
    """``pixel_values`` and ``image_grid_thw`` of pictures, each brought between the least and most pixels."""
    low, high = limits
    return processor(images=list(images), return_tensors="pt", size={"shortest_edge": low, "longest_edge": high})


def picture_tokens(vision: Mapping[str, Any], limits: tuple[int, int], size: tuple[int, int] | None = None) -> int:
    """Tokens that a picture of (width, height) pixels takes in a turn, ``None``: any at most; by the vision half's
    configuration.

    The picture is resized as transformers' ``smart_resize`` does it, which is not asked: it comes with all of image
    processing, seconds of imports for one line of arithmetic.
    """
    cell, (least, most) = vision["patch_size"] * vision["spatial_merge_size"], limits
    if size is None:
        return most // cell**2 + 2
    cells = [round(side / cell) for side in size]
    if math.prod(cells) * cell**2 > most:
        scale = math.sqrt(math.prod(size) / most)
        cells = [max(1, math.floor(side / scale / cell)) for side in size]
    elif math.prod(cells) * cell**2 < least:
        scale = math.sqrt(least / math.prod(size))
        cells = [math.ceil(side * scale / cell) for side in size]
    return math.prod(cells) + 2


def image_blocks(grid: Tensor, merge: int) -> Iterator[str]:
    """What stands in a turn for each picture of ``grid`` ``[images, 3]``: one placeholder per image token."""
    for length in (grid.prod(-1) // merge**2).tolist():
        yield f"<|vision_start|>{_PAD * length}<|vision_end|>"


def token_types(tokenizer: Any, input_ids: Tensor) -> Tensor:
    """1 where a token stands for a picture: the model builds its positions from this."""
    return (input_ids == tokenizer.convert_tokens_to_ids(_PAD)).int()
