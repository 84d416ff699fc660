"""Which kinds of backbone there are, what a name in ``evaluation.backbones`` means, and whether its files are here.

``KIND``, ``KIND:HUB-NAME``, ``KIND:HUB-NAME@REVISION`` or ``KIND:FOLDER``. A kind is one line in :data:`KINDS`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dopsd.config.groups import ModelSettings
from dopsd.models.captioner import Captioner, find_captioner
from dopsd.models.folder import CONFIG, need, quoted, read_json, tensors_of
from dopsd.models.hashes import HASHES, identity
from dopsd.models.sources import Source, locate

from . import efficientnet, lpips
from .base import BackboneError, kind_of

_CONFIGS = (CONFIG, "preprocessor_config.json")
_WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
"""A hub folder may hold the same weights once more, for another library."""
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class Kind:
    """``default``: its name on the hub, ``billions`` its parameters. ``types``: what ``model_type`` may be; ``cls``:
    transformers' class."""

    default: str
    billions: float
    types: tuple[str, ...] = ()
    cls: str = ""
    tokenizer: bool = False


KINDS: dict[str, Kind] = {
    "dinov2": Kind("facebook/dinov2-small", 0.022, ("dinov2", "dinov2_with_registers"), "AutoModel"),
    "dinov3": Kind("facebook/dinov3-vits16plus-pretrain-lvd1689m", 0.029, ("dinov3_vit",), "DINOv3ViTModel"),
    "clip": Kind("openai/clip-vit-large-patch14", 0.428, ("clip",), "CLIPModel", tokenizer=True),
    "siglip": Kind("google/siglip2-base-patch16-224", 0.375, ("siglip",), "SiglipModel", tokenizer=True),
    "reward": Kind("yuvalkirstain/PickScore_v1", 0.986, ("clip",), "CLIPModel", tokenizer=True),
    "lpips": Kind("timm/vgg16.tv_in1k", 0.015),
    "judge": Kind("Qwen/Qwen3-VL-8B-Instruct", 8.767),
}
"""Those that have files of their own."""
NAMES = (efficientnet.NAME, *KINDS)
"""All; the first comes with the environment. Settings know them as ``dopsd.params.BACKBONES``."""


def device_bytes(names: Sequence[str]) -> tuple[float, float]:
    """What backbones take on a GPU while pictures are drawn, and what a judge takes when all else is gone; of other
    weights than the default ones nobody knows before they are here, and they are counted as those."""
    kinds = [kind_of(name) for name in names if kind_of(name) in KINDS]
    sizes = [(kind, (4e9 if kind == "lpips" else 2e9) * KINDS[kind].billions) for kind in kinds]
    judges = [size for kind, size in sizes if kind == "judge"]
    return sum(size for kind, size in sizes if kind != "judge"), max(judges, default=0.0)


@dataclass(frozen=True)
class Found:
    """A named backbone whose files are here and were checked. ``name``: kind and weights (a commit, or a hash)."""

    kind: str
    name: str
    source: Source | None = None
    captioner: Captioner | None = None

    @property
    def folder(self) -> Path:
        """Where its files are; of kinds that have some."""
        assert self.source is not None
        return self.source.folder


def find(name: str, root: Path) -> Found:
    """What ``name`` means, fetched where it is on the hub. No weights are loaded. Raises :class:`BackboneError` or
    ``ModelError``: one line."""
    kind = kind_of(name)
    if kind not in NAMES:
        raise BackboneError(f"backbone {name!r}: unknown; choose one of {', '.join(NAMES)}")
    if kind == efficientnet.NAME:
        if name != kind:
            raise BackboneError(f"backbone {name!r}: efficientnet-lite0 has one set of weights; leave the rest out")
        efficientnet.find_weights()
        return Found(kind, kind)
    where, revision = _place(name.partition(":")[2] or KINDS[kind].default, root)
    key = f"evaluation.backbones, {kind}"
    if kind == "judge":
        captioner = find_captioner(ModelSettings(path="-"), root, where, key, revision)
        return Found(kind, f"{kind}:{_weights_of(captioner.source, root)}", captioner.source, captioner)
    source = locate(where, root, revision=revision, patterns=_patterns(kind), key=key)
    _check(kind, source, f"{key}: {source.shown}")
    return Found(kind, f"{kind}:{_weights_of(source, root)}", source)


def _place(said: str, root: Path) -> tuple[str, str | None]:
    """Folder or hub name, and the revision after its last ``@``; a folder may have one in its name."""
    where, at, revision = said.rpartition("@")
    return (said, None) if not at or os.path.isdir(root / os.path.expanduser(said)) else (where, revision)


def _patterns(kind: str) -> Sequence[str]:
    return (*_CONFIGS, *_WEIGHTS, *(_TOKENIZER if KINDS[kind].tokenizer else ()))


def _check(kind: str, source: Source, shown: str) -> None:
    """Whether a folder can be that kind of backbone, by its configuration and the names of its tensors."""
    if kind == "lpips":
        head = tensors_of(source, "", shown)
        need(source, "", "model.safetensors", shown=shown)  # and not one in parts
        _check_vgg(head, shown)
        return
    types = KINDS[kind].types
    need(source, "", CONFIG, shown=shown)
    found = read_json(source.folder / CONFIG, f"{shown}: {CONFIG}").get("model_type")
    if found not in types:
        other = quoted(found or "model of no known type")
        raise BackboneError(f"{shown}: a {other}, and {kind} is {' or '.join(types)}; "
                            f"give another one, {kind}:{KINDS[kind].default} for example")  # fmt: skip
    need(source, "", "preprocessor_config.json", shown=shown)
    if KINDS[kind].tokenizer:
        need(source, "", "tokenizer.json", "vocab.json", shown=shown)
    tensors_of(source, "", shown)


def _check_vgg(head: Any, shown: str) -> None:
    """``head``: of a safetensors file, its tensors' names to what they are."""
    for name, shape in lpips.TENSORS.items():
        if name not in head or head[name].get("shape") != list(shape):
            raise BackboneError(f"{shown}: no VGG16 with torchvision's names ({name} is missing or of another shape); "
                                f"give lpips:{KINDS['lpips'].default}")  # fmt: skip


def _weights_of(source: Source, root: Path) -> str:
    """The hub's name and commit, else the folder and a hash of all that is in it."""
    if source.name and source.revision:
        return f"{source.name}@{source.revision}"
    return f"{source.folder.name}#{identity(source, root / HASHES, [''])[''][:16]}"
