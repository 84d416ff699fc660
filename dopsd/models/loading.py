"""Components from a folder that was checked: safetensors alone, none of its own code, frozen, on their device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from dopsd.config.groups import Offload, Quantization

from .base import Loader, Part
from .offload import BlockOffload
from .quantized import blocks_of, quantize
from .sharding import shard

Blocks = Literal["there", "in turn", "sharded"]
"""Where a transformer's blocks are: on the device, in host memory until they compute, or divided among processes."""


@dataclass(frozen=True)
class Where:
    """Where components are to be, and in which precision."""

    device: torch.device
    dtype: torch.dtype
    quantization: Quantization = "none"
    """Of the blocks of transformer and text encoder."""
    offload: Offload = "none"
    sharded: bool = False
    """Whether the processes of a training divide the transformer's blocks among them."""


def standard_loaders(folder: Path, transformer: str, vae: str, where: Where) -> dict[Part, Loader]:
    """The parts that every family has; ``transformer`` and ``vae`` are classes of diffusers."""
    plain = replace(where, quantization="none")
    return {
        "tokenizer": lambda _: load_tokenizer(folder / "tokenizer"),
        "scheduler": lambda _: load_scheduler(folder / "scheduler"),
        "transformer": lambda _: load(_of_diffusers(transformer), folder / "transformer", where, blocks=_blocks(where)),
        "vae_encoder": lambda _: _half(load(_of_diffusers(vae), folder / "vae", plain), "encoder"),
        "vae_decoder": lambda _: _half(load(_of_diffusers(vae), folder / "vae", plain), "decoder"),
    }


def _blocks(where: Where) -> Blocks:
    return "sharded" if where.sharded else "in turn" if where.offload == "group" else "there"


def _of_diffusers(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


def load(cls: Any, folder: Path, where: Where, *, blocks: Blocks = "there", **options: Any) -> Any:
    """A model of diffusers or transformers from its folder, frozen and on its device.

    It goes straight there, or where it is quantized or its blocks are not to stay there, through host memory.
    """
    key = "torch_dtype" if cls.__module__.startswith("diffusers") else "dtype"
    direct = where.quantization == "none" and blocks == "there"
    if direct:
        options["device_map"] = {"": where.device}
    model = cls.from_pretrained(folder, use_safetensors=True, **{key: where.dtype}, **options)
    model = model.eval().requires_grad_(False)
    return model if direct else place(model, where.device, where.quantization, blocks)


def place(model: Any, device: torch.device, quantization: Quantization, blocks: Blocks) -> Any:
    """Bring a frozen model from host memory to its device, a block at a time: the device never holds all of it in full
    precision. Its blocks stay there, or wait in host memory until they compute, or are divided among processes. What
    is shared outside of the blocks stays shared: a head that is tied to the embeddings is not there twice."""
    repeated, offload = blocks_of(model), BlockOffload(device)
    if blocks == "sharded":
        shard(repeated, device)
    for block in tqdm(repeated, desc=type(model).__name__, unit="block", leave=False, disable=None):
        if blocks != "sharded":
            quantize(block, quantization, device)
        if blocks == "in turn":
            offload.add(block)
    model.borrowed_weights = blocks != "there"
    model.sharded = blocks == "sharded"
    inside = {id(module) for block in repeated for module in block.modules()}
    placed: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        if id(module) not in inside:
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in placed:
                    placed[id(parameter)] = torch.nn.Parameter(parameter.to(device), requires_grad=False)
                module._parameters[name] = placed[id(parameter)]
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
    return model


def place_pipeline(pipeline: Any, device: torch.device, quantization: Quantization, offload: Offload) -> None:
    """A pipeline of plain diffusers on the device as the stages have its components there: rounded alike, and of the
    large ones no more at once than fits."""
    if device.type == "cuda" and quantization == "none" and offload != "group":
        pipeline.enable_model_cpu_offload(device=device)
        return
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            rounded = quantization if name in ("text_encoder", "transformer") else "none"
            place(component, device, rounded, "in turn" if offload == "group" and name == "transformer" else "there")


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
