"""Features of real pictures, computed once and remembered by the pictures' content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dopsd.files import whole_file

from .base import Backbone

_SHOWN_AS = "2"
"""How pictures are brought to a backbone's size; features of another way are not these."""


class FeatureStore:
    """Features of real pictures, computed once and kept in one safetensors file, keyed by the decoded pixels.

    ``path=None`` remembers within the process only. A file of another backbone, or one that cannot be read, is an
    empty store: it holds nothing that cannot be computed again.
    """

    def __init__(self, backbone: Backbone, path: Path | None = None) -> None:
        self.backbone, self.path = backbone, path
        self._features: dict[str, Tensor] = _read_store(path, backbone) if path is not None else {}
        self._changed = False

    def __call__(self, images: Sequence[Image.Image], progress: str | None = None) -> Tensor:
        """``float32 [N, content_dim + style_dim]``; only pictures not seen before go through the network."""
        keys = [picture_key(image) for image in images]
        missing = {key: image for key, image in zip(keys, images, strict=True) if key not in self._features}
        names = list(missing)
        chunk = 64
        with tqdm(total=len(names), desc=progress, unit="picture", disable=None if progress and names else True) as bar:
            for start in range(0, len(names), chunk):
                part = names[start : start + chunk]
                self._features.update(zip(part, self.backbone([missing[name] for name in part]), strict=True))
                bar.update(len(part))
        self._changed |= bool(names)
        if not keys:
            return self.backbone([])
        return torch.stack([self._features[key] for key in keys])

    def content(self, features: Tensor) -> Tensor:
        """The half that says what is drawn, ``[N, content_dim]``."""
        return features[:, : self.backbone.content_dim]

    def style(self, features: Tensor) -> Tensor:
        """The half that says how, ``[N, style_dim]``."""
        return features[:, self.backbone.content_dim :]

    def save(self) -> None:
        """Write the file, atomically, if there is something new and a path."""
        if self.path is None or not self._changed:
            return
        names = sorted(self._features)
        metadata = {"backbone": self.backbone.name, "shown": _SHOWN_AS, "keys": json.dumps(names)}
        with whole_file(self.path) as partial:
            save_file({"features": torch.stack([self._features[name] for name in names])}, partial, metadata=metadata)
        self._changed = False


def picture_key(image: Image.Image) -> str:
    """Hash of size and RGB pixels: the same for two files that decode to the same picture."""
    rgb = image.convert("RGB")
    return hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode() + rgb.tobytes()).hexdigest()[:32]


def _read_store(path: Path, backbone: Backbone) -> dict[str, Tensor]:
    if not path.exists():
        return {}
    try:
        with safe_open(path, "pt") as handle:
            metadata = handle.metadata() or {}
            features = handle.get_tensor("features")
        names = json.loads(metadata.get("keys", "[]"))
    except (SafetensorError, OSError, ValueError):
        return {}
    shape = (len(names), backbone.content_dim + backbone.style_dim)
    made_by = (metadata.get("backbone"), metadata.get("shown"))
    if made_by != (backbone.name, _SHOWN_AS) or features.shape != shape:
        return {}
    return dict(zip(names, features, strict=True))
