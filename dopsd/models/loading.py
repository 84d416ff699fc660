"""Components from a folder that was checked: safetensors alone, none of its own code, frozen, on their device."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from .base import Loader, Part


def standard_loaders(
    folder: Path, transformer: str, vae: str, device: torch.device, dtype: torch.dtype
) -> dict[Part, Loader]:
    """The parts that every family has; ``transformer`` and ``vae`` are classes of diffusers."""
    return {
        "tokenizer": lambda _: load_tokenizer(folder / "tokenizer"),
        "scheduler": lambda _: load_scheduler(folder / "scheduler"),
        "transformer": lambda _: _load(transformer, folder / "transformer", device, dtype),
        "vae_encoder": lambda _: _half(_load(vae, folder / "vae", device, dtype), "encoder"),
        "vae_decoder": lambda _: _half(_load(vae, folder / "vae", device, dtype), "decoder"),
    }


def _load(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    import diffusers

    model = getattr(diffusers, name).from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)
    return frozen(model, device)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a diffusers folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load_scheduler(folder: Path) -> Any:
    """The flow-matching scheduler of a diffusers folder."""
    from diffusers.schedulers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler.from_pretrained(folder)


def frozen(module: Any, device: torch.device) -> Any:
    """A module on its device, for inference only."""
    return module.to(device).eval().requires_grad_(False)


def _half(vae: Any, keep: Literal["encoder", "decoder"]) -> Any:
    """The autoencoder without the half that is not used (an empty module: some classes count its layers)."""
    for name in {"encoder", "decoder"} - {keep}:
        setattr(vae, name, torch.nn.Identity())
    return vae


def use_plain_attention(transformer: Any) -> Any:
    """Plain attention in this model: on a CPU the fused kernel's backward is several times slower for short sequences.

    Set on each layer, as ``set_attention_backend`` would, which changes the default of all other models as well.
    """
    for module in transformer.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            processor._attention_backend = "_native_math"
    return transformer


def compile_blocks(transformer: Any) -> None:
    """Compile each kind of block when it first runs (diffusers' regional compilation); equal blocks share their graphs.

    There is a graph for each adapter that is selected, with and without gradient, and for each place in the model whose
    inputs differ in kind. torch's default of 8 would leave the later ones uncompiled; nothing else is compiled here.
    """
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(64, dynamo.recompile_limit)
    transformer.compile_repeated_blocks()
