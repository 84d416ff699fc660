"""The families of models that the method runs on. Adding one: a file here, and a line in :data:`FAMILIES`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

from dopsd.config import ModelSettings

from .base import Family, Parts, Teaching
from .loading import use_plain_attention
from .sources import ModelError, Source, check_pipeline, check_vlm, identity, licence_of, locate

FAMILIES = {
    "z-image": "dopsd.models.z_image:ZImage",
    "flux2-klein": "dopsd.models.flux2_klein:Flux2Klein",
    "krea-2": "dopsd.models.krea2:Krea2",
}
"""Name in the settings to module and class."""
ENCODING_VERSION = 2
"""Raised when the same caption and pictures are encoded into something else than before."""

__all__ = [
    "FAMILIES", "Base", "Family", "ModelError", "family_class", "licence_of", "load_family", "open_base",
    "references_rule", "teaching_of",
]  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A base model whose files are here and were checked."""

    source: Source
    vlm: Source | None
    index: dict[str, Any]
    """``model_index.json``."""
    identities: dict[str, str]
    """Component (and ``vlm``) to a hash of its files, or their name and revision on the hub."""

    @property
    def identity(self) -> str:
        """Of the whole base."""
        return _hash(self.identities)


def family_class(model: ModelSettings) -> type[Family]:
    """The class of the settings' family; :class:`ModelError` where there is none of that name."""
    place = FAMILIES.get(model.family)
    if place is None:
        raise ModelError(f"model.family: {model.family!r} is unknown; there are {', '.join(FAMILIES)}")
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def teaching_of(model: ModelSettings) -> Teaching:
    """What the teacher is shown. Raises :class:`ModelError` where the family cannot be shown that."""
    family = family_class(model)
    context = model.context or family.contexts[0]
    if context not in family.contexts:
        raise ModelError(f"model.context: {model.family} cannot be taught by {context}; it can by "
                         f"{', '.join(family.contexts)}")  # fmt: skip
    if model.context_suffix is not None and context == "enhanced-prompt":
        raise ModelError("model.context_suffix: enhanced-prompt takes the row's caption as it is; remove the suffix")
    suffix = family.suffixes.get(context, "") if model.context_suffix is None else model.context_suffix
    return Teaching(context, suffix, model.context_pixels, model.vlm_positions)


def references_rule(model: ModelSettings) -> Literal["refused", "allowed", "required"]:
    """Whether rows of the data must, may or must not name reference pictures."""
    context, edits = teaching_of(model).context, family_class(model).edits
    if context == "edit-reference":
        return "required"
    return "allowed" if context == "enhanced-prompt" and edits else "refused"


def open_base(model: ModelSettings, root: Path, teacher: bool = True) -> Base:
    """Find (or fetch) the base's files and check them before anything is loaded; raises :class:`ModelError`.

    Without ``teacher`` the VLM, which draws nothing, need not be there.
    """
    family, teaching = family_class(model), teaching_of(model)
    patterns = ["model_index.json", "README.md", *(f"{name}/*" for name in family.components)]
    source = locate(model.path, root, revision=model.revision, patterns=patterns)
    index = check_pipeline(
        source, family.pipeline, family.components, distilled=family.says_distilled, advice=family.refused
    )
    parts = list(family.components)
    identities = identity(source, root / _HASHES, ["", *parts])
    vlm = None
    if teacher and family.needs_vlm(teaching):
        key = "model.vlm"
        if model.vlm is None and not (source.folder / "vlm").is_dir():
            raise ModelError(f"{key}: the teacher needs a Qwen3-VL to see with; give a folder or a hub name")
        vlm = Source(source.folder / "vlm")
        if model.vlm is not None:
            patterns = ["*.json", "*.safetensors", "*.txt"]
            vlm = locate(model.vlm, root, revision=model.vlm_revision, patterns=patterns, key=key)
        check_vlm(vlm, _config(source.folder, "text_encoder"), key)
        identities["vlm"] = _hash(identity(vlm, root / _HASHES))
    return Base(source, vlm, index, identities)


_HASHES = Path(".cache/model-files.json")


def device_of(model: ModelSettings) -> torch.device:
    """Where the settings want the model; :class:`ModelError` where there is no such device."""
    name = model.device if model.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device is cuda but torch finds no CUDA device here; set it to auto or cpu")
    return torch.device(name)


def load_family(model: ModelSettings, root: Path = Path(), teacher: bool = True) -> Family:
    """The base that the settings name. Nothing of it is in memory yet: each part is loaded when it is first used.

    Without ``teacher`` it can draw, but not encode contexts. ``root`` is what a relative path is relative to. Raises
    :class:`ModelError` for what is missing or does not fit.
    """
    base, device = open_base(model, root, teacher), device_of(model)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    dtype = dtypes.get(model.dtype, torch.bfloat16 if device.type == "cuda" else torch.float32)
    family, teaching = family_class(model), replace(teaching_of(model), vlm=base.identities.get("vlm", ""))
    loaders = dict(family.loaders(base.source, base.vlm, teaching, device, dtype))
    load_transformer = loaders["transformer"]

    def transformer(parts: Parts) -> Any:
        module = load_transformer(parts)
        if model.gradient_checkpointing:
            module.enable_gradient_checkpointing()
        return use_plain_attention(module) if device.type == "cpu" else module

    configs = {name: _config(base.source.folder, name) for name in ("vae", "transformer", "text_encoder")}
    parts = Parts(loaders | {"transformer": transformer}, configs | {"index": base.index})
    encoders = {key: base.identities[key] for key in ("text_encoder", "tokenizer", "vae")}
    return family(parts, teaching, device, dtype, _hash([ENCODING_VERSION, str(dtype), encoders, family.pipeline]))


def _config(folder: Path, component: str) -> dict[str, Any]:
    return json.loads((folder / component / "config.json").read_text(encoding="utf-8"))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
