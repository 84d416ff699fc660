"""The families of models that the method runs on. Adding one: a file here, and a line in :func:`load_family`."""

from __future__ import annotations

from pathlib import Path

import torch

from dopsd.config import ModelSettings

from . import z_image
from .base import Conditioning, Family

_LOADERS = {"z-image": z_image.load}

__all__ = ["Conditioning", "Family", "load_family"]


def load_family(settings: ModelSettings, root: Path = Path(), encoders: bool = True) -> Family:
    """The base model that the settings name, on its device. ``root`` is what a relative path is relative to.

    Without ``encoders`` only what sampling and training need is loaded (conditionings come from the cache).
    """
    device = torch.device(
        settings.device if settings.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise z_image.ModelError("model.device is cuda but torch finds no CUDA device here; set it to auto or cpu")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    dtype = dtypes.get(settings.dtype, torch.bfloat16 if device.type == "cuda" else torch.float32)
    family = _LOADERS[settings.family](
        root / settings.path,
        vlm=root / settings.vlm if settings.vlm else None,
        device=device,
        dtype=dtype,
        context_pixels=settings.context_pixels,
        encoders=encoders,
    )
    if settings.gradient_checkpointing:
        family.transformer.enable_gradient_checkpointing()
    return family
