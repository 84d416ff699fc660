"""A trained adapter as files that other tools load, a model card beside them, and the proof that they load.

- ``pytorch_lora_weights.safetensors``: diffusers, ``ZImagePipeline.load_lora_weights(folder)``
- ``comfyui_lora.safetensors``: ComfyUI and tools that read its names (``diffusion_model.*`` with ``.alpha``)
- ``README.md``: the model card

Tools disagree on the scale of an adapter whose alpha is not its rank (some take 1 where no alpha is stored). So the
scale is folded into the weights: alpha equals rank in every file, and says so.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import torch
from PIL.Image import Image
from safetensors.torch import save_file
from torch import Tensor

from dopsd.distill.adapters import adapter_applied, read_adapter
from dopsd.distill.rollout import sample
from dopsd.models.base import Family

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
COMFYUI_FILE = "comfyui_lora.safetensors"
CARD_FILE = "README.md"

# Mean difference in levels (of 255) between the student's pictures and plain diffusers' that is rounding, not a fault.
_ROUNDING = {torch.float32: 0.25, torch.bfloat16: 6.0}


class ExportError(ValueError):
    """An export that does not give the trained student's images; nothing of it should be used."""


@dataclass(frozen=True)
class Card:
    """What the model card says. ``columns`` and ``rows`` are the before-and-after table as text."""

    concept: str
    base: str
    method: str
    steps: int
    """Few steps: how many the adapter was trained for and is to be sampled with."""
    resolution: int
    placeholder: str
    prompt: str
    """An example prompt."""
    images: int
    data_hash: str
    training: Mapping[str, str]
    """Settings worth knowing, as text."""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    base_licence: str = "see the base model"


@dataclass(frozen=True)
class Drawn:
    """Pictures that the trained student drew, and all it takes to draw them again elsewhere."""

    prompts: tuple[str, ...]
    noise: Tensor
    """``[B, C, h, w]``, on the CPU."""
    steps: int
    height: int
    width: int
    images: tuple[Image, ...]


def export_adapter(adapter: Path, out: Path, card: Card) -> Path:
    """Write the files for ``adapter`` into the folder ``out``, replacing it as a whole; returns ``out``."""
    tensors, rank, scale = _scaled(adapter)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_diffusers(partial, tensors, rank)
    _write_comfyui(partial, tensors, rank)
    (partial / CARD_FILE).write_text(render_card(card, rank=rank, scale=scale))
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return out


def _scaled(adapter: Path) -> tuple[dict[str, Tensor], int, float]:
    """The adapter's tensors with ``alpha / rank`` folded into B, its rank, and that scale."""
    tensors, rank, alpha = read_adapter(adapter)
    scale = alpha / rank
    folded = {
        key: value * scale if scale != 1 and key.endswith(".lora_B.weight") else value for key, value in tensors.items()
    }
    return folded, rank, scale


def _write_diffusers(folder: Path, tensors: Mapping[str, Tensor], rank: int) -> None:
    from diffusers.pipelines.z_image import ZImagePipeline

    modules = sorted({key.rsplit(".", 2)[0] for key in tensors})
    config = {"r": rank, "lora_alpha": rank, "target_modules": modules, "lora_dropout": 0.0, "bias": "none"}
    ZImagePipeline.save_lora_weights(
        folder, transformer_lora_layers=dict(tensors), weight_name=DIFFUSERS_FILE,
        transformer_lora_adapter_metadata=config,
    )  # fmt: skip


def _write_comfyui(folder: Path, tensors: Mapping[str, Tensor], rank: int) -> None:
    named = {f"diffusion_model.{key}": value.contiguous() for key, value in tensors.items()}
    modules = {key.rsplit(".", 2)[0] for key in named}
    named |= {f"{module}.alpha": torch.tensor(float(rank)) for module in modules}
    save_file(named, folder / COMFYUI_FILE, metadata={"format": "pt"})


def render_card(card: Card, **more: object) -> str:
    """The model card as Markdown with YAML front matter."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters["quoted"] = lambda text: json.dumps(text, ensure_ascii=False)
    return environment.get_template("card.md.j2").render(
        card=card, diffusers_file=DIFFUSERS_FILE, comfyui_file=COMFYUI_FILE, **more
    )


# --- does it load? ----------------------------------------------------------------------------------------------------


def draw_student(
    family: Family, adapter: Path, prompts: Sequence[str], steps: int, height: int, width: int, seed: int
) -> Drawn:
    """What the trained student draws for ``prompts``; the family needs its text encoder."""
    conditioning = family.encode_prompt(prompts)
    noise = family.initial_latents(len(prompts), height, width, torch.Generator().manual_seed(seed))
    with adapter_applied(family.transformer, adapter):
        latents = sample(family, conditioning, steps, height, width, noise)
    return Drawn(tuple(prompts), noise.cpu(), steps, height, width, tuple(family.decode(latents)))


def check_export(
    base: Path, export: Path, drawn: Drawn, *, file: str = DIFFUSERS_FILE,
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
) -> dict[str, float]:  # fmt: skip
    """Load ``export`` with plain diffusers on ``base`` and compare with the student, image against image.

    Returns mean differences in levels of 255: ``change`` (what the adapter changes) and ``difference`` (from the
    student). Raises :class:`ExportError` where the adapter is not there, changes nothing, or draws something else.
    """
    from diffusers.pipelines.z_image import ZImagePipeline

    pipeline = ZImagePipeline.from_pretrained(base, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    before = _draw(pipeline, drawn)
    pipeline.load_lora_weights(export, weight_name=file)
    if not pipeline.get_active_adapters():
        raise ExportError(
            f"{export / file}: diffusers loads it as nothing; the names of its tensors do not fit the base"
        )
    after = _draw(pipeline, drawn)
    change = max(_difference(a, b) for a, b in zip(before, after, strict=True))
    if change == 0:
        raise ExportError(f"{export / file}: loaded, but the pictures are those of the base; was anything trained?")
    difference = max(_difference(a, b) for a, b in zip(after, drawn.images, strict=True))
    if difference > _ROUNDING.get(dtype, _ROUNDING[torch.bfloat16]):
        raise ExportError(
            f"{export / file}: plain diffusers draws other pictures than the trained student (mean difference "
            f"{difference:.2f} of 255, the adapter itself changes {change:.2f}); do not use this export"
        )
    return {"change": change, "difference": difference}


def _draw(pipeline: object, drawn: Drawn) -> list[Image]:
    assert callable(pipeline)
    return [
        pipeline(
            prompt=prompt, height=drawn.height, width=drawn.width, num_inference_steps=drawn.steps, guidance_scale=0.0,
            latents=drawn.noise[i : i + 1].clone(),
        ).images[0]
        for i, prompt in enumerate(drawn.prompts)
    ]  # fmt: skip


def _difference(a: Image, b: Image) -> float:
    """Mean absolute difference of two pictures in levels of 255; pictures of two sizes differ wholly."""
    if a.size != b.size:
        return 255.0
    return float(np.abs(np.asarray(a.convert("RGB"), float) - np.asarray(b.convert("RGB"), float)).mean())
