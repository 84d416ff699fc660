"""A trained adapter as files that other tools load, a model card beside them, and the proof that they load.

- ``pytorch_lora_weights.safetensors``: diffusers, ``pipeline.load_lora_weights(folder)``
- ``comfyui_lora.safetensors``: ComfyUI and tools that read its names, which differ from family to family
- ``README.md``: the model card

Of a full tuning, instead of the two files: ``transformer/``, a component as diffusers saves one, whole, in the type
that it was trained beside (:mod:`dopsd.distill.weights`): ``from_pretrained(base, transformer=...)``.

Tools disagree on the scale of an adapter whose alpha is not its rank (some take 1 where no alpha is stored). So the
scale is folded into the weights: alpha equals rank in the file for diffusers, and none is stored in the other.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
import torch
from PIL.Image import Image
from safetensors import safe_open
from torch import Tensor

from dopsd.config.groups import AdapterKind, Offload, Quantization
from dopsd.distill.adapters import adapter_applied, read_adapter
from dopsd.distill.drawing import draw
from dopsd.distill.kinds import NAMES, SCALED, kind_of, module_of
from dopsd.distill.weights import holds_weights, weights_applied
from dopsd.files import whole_folder, write_tensors
from dopsd.models.base import Family, Request
from dopsd.models.loading import place_pipeline

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
COMFYUI_FILE = "comfyui_lora.safetensors"
WEIGHTS = "transformer"
CARD_FILE = "README.md"
_SHARD = "10GB"

# Mean difference in levels (of 255) between the student's pictures and plain diffusers' that is rounding, not a fault;
# or a share of what the adapter changes, where that is more. A float32 pipeline with the bfloat16 file differs by 0.014
# at most on the embedded base (trained style-ink, which changes 83), and by 0.5 % of the change on random networks. A
# bfloat16 pipeline rounds either file alike when it loads it: equal pictures, 0.7 from the student's in float32.
_ROUNDING = {torch.float32: 0.25, torch.bfloat16: 6.0}
_ROUNDING_SHARE = 0.02


class ExportError(ValueError):
    """An export that does not give the trained student's images; nothing of it should be used."""


@dataclass(frozen=True)
class Card:
    """What the model card says. ``columns`` and ``rows`` are the before-and-after table as text."""

    concept: str
    base: str
    """Its name on the hub, or what its folder is called; never a path."""
    method: str
    steps: int
    """Few steps: how many the adapter was trained for and is to be sampled with."""
    placeholder: str
    prompt: str
    """An example prompt."""
    call: Mapping[str, object]
    """Keywords of the pipeline's call for that prompt, the prompt itself and pictures left out."""
    images: int
    data_hash: str
    training: Mapping[str, str]
    """Settings worth knowing, as text."""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    licence: str | None = None
    """The base's; ``None`` where nobody said."""
    licence_listed: bool = False
    """Whether that is an identifier which hubs know (``apache-2.0``), and not a licence's own name."""
    edits: bool = False
    """Whether a picture is edited, and not one made from text alone."""
    prompts: str = "captions of the training pictures"
    """How many prompts the rows are of, and which."""


@dataclass(frozen=True)
class Drawn:
    """A picture that the trained student drew, and all it takes to draw it again elsewhere."""

    request: Request
    noise: Tensor
    """``[1, C, h, w]``, on the CPU."""
    steps: int
    height: int
    width: int
    image: Image


def export_trained(
    trained: Path, out: Path, card: Card, family: type[Family], base: Path, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write what tools load of ``trained``, an adapter (as ``dtype``) or weights, to be the whole folder ``out``."""
    if holds_weights(trained):
        return export_weights(trained, out, card, base)
    return export_adapter(trained, out, card, family, dtype)


def export_weights(weights: Path, out: Path, card: Card, base: Path) -> Path:
    """Write the transformer in ``base`` with trained ``weights`` to be the whole folder ``out``; returns ``out``."""
    from diffusers import AutoModel

    with safe_open(weights, framework="pt") as file:
        dtype = next(file.get_tensor(key).dtype for key in file.keys())  # noqa: SIM118 - not a mapping
    model = AutoModel.from_pretrained(str(base / WEIGHTS), torch_dtype=dtype, use_safetensors=True)
    with whole_folder(out) as partial, weights_applied(model, weights):
        model.save_pretrained(partial / WEIGHTS, max_shard_size=_SHARD)
        # the base's own: the library's names the folder that it was loaded from
        shutil.copyfile(base / WEIGHTS / "config.json", partial / WEIGHTS / "config.json")
        (partial / CARD_FILE).write_text(
            render_card(card, rank=0, scale=1.0, dtype=dtype, kind="full"), encoding="utf-8"
        )
    return out


def export_adapter(
    adapter: Path, out: Path, card: Card, family: type[Family], dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write the files for ``adapter``, as ``dtype``, to be the whole folder ``out``; returns ``out``."""
    tensors, rank, scale = _scaled(adapter, dtype)
    with whole_folder(out) as partial:
        _write_diffusers(partial, tensors, rank)
        kind = kind_of(list(tensors))
        if kind == "lora":  # of other kinds no name is known to load there
            write_tensors(partial / COMFYUI_FILE, family.comfyui_lora(tensors, rank), {"format": "pt"})
        (partial / CARD_FILE).write_text(
            render_card(card, rank=rank, scale=scale, dtype=dtype, kind=kind), encoding="utf-8"
        )
    return out


def _scaled(adapter: Path, dtype: torch.dtype) -> tuple[dict[str, Tensor], int, float]:
    """The adapter's tensors with ``alpha / rank`` folded into B (LoKr's first matrix) and rounded once, its rank, and
    that scale."""
    tensors, rank, alpha = read_adapter(adapter)
    scale = alpha / rank
    folded = {key: value * scale if scale != 1 and key.endswith(SCALED) else value for key, value in tensors.items()}
    return {key: value.to(dtype) for key, value in folded.items()}, rank, scale


def _write_diffusers(folder: Path, tensors: Mapping[str, Tensor], rank: int) -> None:
    """The names that every pipeline's ``load_lora_weights`` reads, with alpha in the header: a tensor of it would be
    refused."""
    modules, kind = sorted(set(map(module_of, tensors))), kind_of(list(tensors))
    config = {"r": rank, "lora_alpha": rank, "target_modules": modules, "lora_dropout": 0.0, "bias": "none"}
    config |= {"rank_pattern": {}, "alpha_pattern": {}}  # diffusers 0.36 to 0.38 load no file without
    if kind == "dora":
        config["use_dora"] = True
    header = {"format": "pt"}
    if kind != "lokr":  # whose factors diffusers reads from the shapes
        header["lora_adapter_metadata"] = json.dumps({f"transformer.{k}": v for k, v in config.items()})
    named = {f"transformer.{key}": value.contiguous() for key, value in tensors.items()}
    write_tensors(folder / DIFFUSERS_FILE, named, header)


def render_card(
    card: Card, *, rank: int, scale: float, dtype: torch.dtype, kind: AdapterKind | Literal["full"] = "lora"
) -> str:
    """The model card as Markdown with YAML front matter. ``dtype`` and ``kind``: of the files; ``full`` is a
    transformer."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters["quoted"] = lambda text: json.dumps(text, ensure_ascii=False)
    return environment.get_template("card.md.j2").render(
        card=card, diffusers_file=DIFFUSERS_FILE, comfyui_file=COMFYUI_FILE, rank=rank, scale=scale,
        dtype=str(dtype).removeprefix("torch."), kind=kind, named=NAMES.get(kind, ""),
    )  # fmt: skip


# --- does it load? ----------------------------------------------------------------------------------------------------


def draw_student(
    family: Family, adapter: Path, requests: Sequence[tuple[Request, int, int]], steps: int, seed: int
) -> list[Drawn]:
    """What the trained student draws for each (request, height, width), one picture at a time."""
    encoded = family.encode_prompt([request for request, *_ in requests])
    family.release_encoders()
    generator, drawn = torch.Generator().manual_seed(seed), []
    with adapter_applied(family.transformer, adapter):
        for (request, height, width), conditioning in zip(requests, encoded, strict=True):
            noise = family.initial_latents(1, height, width, generator)
            (image,) = draw(family, [conditioning], steps, noise, height, width, most=1)
            drawn.append(Drawn(request, noise.cpu(), steps, height, width, image))
    return drawn


def check_export(
    base: Path, export: Path, drawn: Sequence[Drawn], family: type[Family], *, file: str = DIFFUSERS_FILE,
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", quantization: Quantization = "none",
    offload: Offload = "none",
) -> dict[str, float]:  # fmt: skip
    """Load ``export`` with plain diffusers on ``base`` and compare with the student, image against image; on the same
    base, rounded and offloaded as the student's was.

    Returns mean differences in levels of 255: ``change`` (what the adapter changes) and ``difference`` (from the
    student). Raises :class:`ExportError` where the adapter is not there, changes nothing, or draws something else.
    """
    from diffusers import AutoModel, DiffusionPipeline

    def pipeline_of(**components: Any) -> Any:
        made = DiffusionPipeline.from_pretrained(base, torch_dtype=dtype, use_safetensors=True, **components)
        place_pipeline(made, torch.device(device), quantization, offload)
        made.set_progress_bar_config(disable=True)
        return made

    pipeline = pipeline_of()
    before = _draw(pipeline, drawn, family)
    if (export / WEIGHTS).is_dir():
        file = WEIGHTS
        del pipeline  # a large base fits once
        pipeline = pipeline_of(
            transformer=AutoModel.from_pretrained(str(export / WEIGHTS), torch_dtype=dtype, use_safetensors=True)
        )
    else:
        _load_adapter(pipeline, export, file, device if offload == "group" else None)
    after = _draw(pipeline, drawn, family)
    change = max(_difference(a, b) for a, b in zip(before, after, strict=True))
    if change == 0:
        raise ExportError(f"{export / file}: loaded, but the pictures are those of the base; was anything trained?")
    difference = max(_difference(a, one.image) for a, one in zip(after, drawn, strict=True))
    if difference > max(_ROUNDING.get(dtype, _ROUNDING[torch.bfloat16]), _ROUNDING_SHARE * change):
        raise ExportError(
            f"{export / file}: plain diffusers draws other pictures than the trained student (mean difference "
            f"{difference:.2f} of 255, the adapter itself changes {change:.2f}); do not use this export"
        )
    return {"change": change, "difference": difference}


def _load_adapter(pipeline: Any, export: Path, file: str, device: torch.device | str | None) -> None:
    """``device``: where an adapter's tensors are to be brought."""
    pipeline.load_lora_weights(export, weight_name=file, use_safetensors=True)
    if device is not None:
        for name, parameter in pipeline.transformer.named_parameters():
            if "lora_" in name or "lokr_" in name:  # diffusers puts them where the block waits
                parameter.data = parameter.data.to(device)
    if not pipeline.get_active_adapters():
        raise ExportError(
            f"{export / file}: diffusers loads it as nothing; the names of its tensors do not fit the base"
        )


def _draw(pipeline: Any, drawn: Sequence[Drawn], family: type[Family]) -> list[Image]:
    return [
        pipeline(**family.call(one.request, one.height, one.width, one.steps, one.noise)).images[0] for one in drawn
    ]


def _difference(a: Image, b: Image) -> float:
    """Mean absolute difference of two pictures in levels of 255; pictures of two sizes differ wholly."""
    if a.size != b.size:
        return 255.0
    return float(np.abs(np.asarray(a.convert("RGB"), float) - np.asarray(b.convert("RGB"), float)).mean())
