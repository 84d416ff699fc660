"""A narrow stand-in of every family's published folder, and settings that load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dopsd.config.groups import ModelSettings
from tests import published

NAMES = ("z-image", "flux2-klein", "krea-2")


def write_families(root: Path) -> dict[str, Path]:
    """All folders, by family; ``vlm`` is the Qwen3-VL that belongs to Z-Image."""
    z_image = published.write_z_image_turbo(root / "z-image")
    return {
        "z-image": z_image,
        "vlm": published.write_qwen3_vl(root / "vlm", z_image),
        "flux2-klein": published.write_klein(root / "klein", "4b"),
        "krea-2": published.write_krea2_turbo(root / "krea"),
    }


def settings_of(name: str, folders: dict[str, Path], **more: Any) -> ModelSettings:
    """The settings of one family's stand-in; pictures are shown to a VLM at 64 x 64."""
    values = {"family": name, "path": str(folders[name]), "device": "cpu", "context_pixels": (64 * 64, 64 * 64)}
    if name == "z-image":
        values["vlm"] = str(folders["vlm"])
    return ModelSettings.model_validate(values | more)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Large soft blots."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height // 8, width // 8, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((width, height), Image.Resampling.BICUBIC)
