"""What a base is made of, from its configurations alone: nothing is downloaded and no weight is read.

The configurations are those of the folder where the base is here, and else, for the models that recipes name, the ones
that their publishers ship (``published.json``; the tests hold its numbers of parameters).
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dopsd.config.groups import ModelSettings
from dopsd.models import family_class

from .base import Configs, Family
from .folder import CONFIG, INDEX, read_json
from .quantized import blocks_of
from .sources import check_class

_PUBLISHED = Path(__file__).with_name("published.json")
_FEW_BLOCKS = 4
"""A list of blocks that is no longer than this does not repeat, for :func:`block_lists`."""


@dataclass(frozen=True)
class PartSize:
    """Parameters of one component."""

    parameters: int
    blocks: tuple[int, ...] = ()
    """Of each repeated block, in order."""
    linear: int = 0
    """Weights of the linear layers inside the blocks: what can be quantised."""
    largest: int = 0
    """Of the largest of these layers."""

    @classmethod
    def of(cls, module: nn.Module) -> PartSize:
        """Counted; a shared tensor once."""
        blocks = blocks_of(module)
        linear = [layer.weight.numel() for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
        return cls(_parameters(module), tuple(map(_parameters, blocks)), sum(linear), max(linear, default=0))


def shortened(module: nn.Module, lengths: Mapping[str, int]) -> nn.Module:
    """A copy of the module with these lists of blocks cut to these lengths; the module is left as it is."""
    whole = {name: module.get_submodule(name) for name in lengths}
    try:
        for name, blocks in whole.items():
            _put(module, name, nn.ModuleList(list(blocks.children())[: lengths[name]]))
        return copy.deepcopy(module)
    finally:
        for name, blocks in whole.items():
            _put(module, name, blocks)


def _put(module: nn.Module, name: str, child: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, child)


def block_lists(module: nn.Module) -> dict[str, int]:
    """Name to length of each long list of repeated blocks."""
    blocks = {id(block) for block in blocks_of(module)}
    return {
        name: len(part)
        for name, part in module.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) > _FEW_BLOCKS and id(part[0]) in blocks
    }


def _parameters(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


# --- configurations ---------------------------------------------------------------------------------------------------


def configurations(model: ModelSettings, root: Path) -> Configs | None:
    """Part (``transformer``, ``vae``, ``text_encoder``, ``index``, and ``vlm`` where the settings name one) to its
    configuration; ``None`` where the base is not here and nobody knows it. Raises :class:`ModelError` where it is of
    another family than the settings say."""
    base = _of_folder(root / Path(model.path).expanduser()) or _published(model.path)
    if base is None or not {"transformer", "vae", "text_encoder"} <= set(base):
        return None
    family = family_class(model)
    check_class(base["index"], f"model.path: {model.path}", family.pipeline, family.refused)
    vlm = model.vlm or str(Path(model.path) / "vlm")
    file = root / Path(vlm).expanduser() / CONFIG
    found = read_json(file, f"{vlm}: {CONFIG}") if file.is_file() else (_published(vlm) or {}).get("model")
    return {**base, "vlm": found} if found else base


def _of_folder(folder: Path) -> dict[str, Any] | None:
    if not (folder / INDEX).is_file():
        return None
    found = {path.parent.name: read_json(path, f"{folder.name}: {path.parent.name}/{CONFIG}")
             for path in sorted(folder.glob(f"*/{CONFIG}"))}  # fmt: skip
    return found | {"index": read_json(folder / INDEX, f"{folder.name}: {INDEX}")}


@cache
def _published(name: str) -> dict[str, Any] | None:
    entries = json.loads(_PUBLISHED.read_text(encoding="utf-8")).values()
    parts = next((entry["parts"] for entry in entries if entry["hub"].lower() == name.lower()), None)
    return parts and {("index" if part == "model_index" else part): config for part, config in parts.items()}


# --- modules without values -------------------------------------------------------------------------------------------


def skeleton(part: str, configs: Configs, family: type[Family] | None) -> nn.Module:
    """A component in bfloat16 on the meta device, frozen, as the family loads it; without one as its pipeline does.

    ``vision`` is a VLM's vision half alone; ``vae_encoder`` and ``vae_decoder`` are halves.
    """
    with torch.device("meta"), default_dtype(torch.bfloat16):
        if part in ("vae_encoder", "vae_decoder"):
            module = of_diffusers(configs["vae"])
            setattr(module, {"vae_encoder": "decoder", "vae_decoder": "encoder"}[part], nn.Identity())
        elif part == "vision":
            module = _transformers(configs["vlm"]).visual
        elif part == "text_encoder":
            config, listed = configs[part], str(configs["index"].get(part))
            head = family is None and "ForCausalLM" in listed
            module = _transformers(family.encoder_config(config) if family else config, head)
        else:
            module = of_diffusers(configs[part])
    return module.eval().requires_grad_(False)


def of_diffusers(config: Mapping[str, Any]) -> Any:
    """The module of a configuration that names its class; what that class does not know is left out."""
    import diffusers

    kind = getattr(diffusers, config["_class_name"])
    return kind(**{key: value for key, value in config.items() if key in inspect.signature(kind).parameters})


def _transformers(config: Mapping[str, Any], head: bool = False) -> Any:
    """Without a head, whose logits nobody reads, where none is asked for."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    kind = AutoModelForCausalLM if head else AutoModel
    return kind.from_config(AutoConfig.for_model(**config), attn_implementation="sdpa")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Parameters made inside the block have this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
