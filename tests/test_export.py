"""Exports as plain diffusers sees them: the trained student's pictures, or an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dopsd.config import load_settings
from dopsd.config.groups import LoraSettings, ModelSettings
from dopsd.distill.adapters import adapter_parameters, add_adapters, save_adapter
from dopsd.export import (
    CARD_FILE,
    COMFYUI_FILE,
    DIFFUSERS_FILE,
    Card,
    ExportError,
    check_export,
    draw_student,
    export_adapter,
    render_card,
)
from dopsd.models import Family, load_family
from dopsd.models.base import Request
from dopsd.models.z_image import ZImage
from emoji_turbo import architecture
from tests import tiny

CARD = Card(
    concept="style-ink", base="maker/emoji-turbo", method="d-opsd", steps=4, placeholder="[V]",
    prompt='a "fox" in [V] style', call={"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 0.0},
    licence="apache-2.0", licence_listed=True, images=16, data_hash="f" * 64, training={"learning rate": "3e-4"},
    columns=("model", "style"), rows=(("base", ".1"), ("d-opsd", ".9")),
)  # fmt: skip
ASKED = [(Request("a fox in [V] style"), 64, 64), (Request("a red boat in [V] style"), 48, 96)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base as a diffusers folder."""
    folder = tmp_path_factory.mktemp("base")
    parts = tiny.tiny_parts()
    architecture.save_folder(folder, **{key: parts[key] for key in ("vae", "tokenizer", "vlm", "transformer")})
    return folder


@pytest.fixture
def family(base: Path) -> Family:
    return load_family(ModelSettings(path=str(base), device="cpu", context_pixels=(4096, 4096)))


def _adapter(path: Path, family: Family, lora: LoraSettings, size: float = 0.5) -> Path:
    """A file with an adapter that changes a lot, as if trained."""
    pair = add_adapters(family.transformer, lora, family.lora_targets, seed=0, kind="frozen")
    generator = torch.Generator().manual_seed(1)
    for key, value in adapter_parameters(family.transformer, "student").items():
        if "lora_B" in key:
            value.data.copy_(size * torch.randn(value.shape, generator=generator))
    save_adapter(path, family.transformer, "student", lora)
    pair.remove()
    return path


ROOT = Path(__file__).parents[1]
INK = load_settings(ROOT / "params.yaml").of("style-ink", ROOT).train.lora.targets
"""What the shipped ``style-ink`` adapts: one of these layers is in no attention and no feed-forward block."""


@pytest.mark.parametrize(("alpha", "targets"), [(None, None), (3.0, None), (None, INK)])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 0.001), (torch.bfloat16, 0.25)])
def test_plain_diffusers_draws_the_students_pictures(
    base: Path, family: Family, tmp_path: Path, alpha: float | None, targets: tuple[str, ...] | None,
    dtype: torch.dtype, most: float,
) -> None:  # fmt: skip
    adapter = _adapter(tmp_path / "a.safetensors", family, LoraSettings(rank=4, alpha=alpha, targets=targets))
    out = export_adapter(adapter, tmp_path / "export", CARD, ZImage, dtype)
    assert {value.dtype for value in load_file(out / DIFFUSERS_FILE).values()} == {dtype}
    compared = check_export(base, out, draw_student(family, adapter, ASKED, 4, seed=3), ZImage)
    assert compared["change"] > 2, "the adapter is to be seen"
    assert compared["difference"] < most


def test_files_name_their_scale(family: Family, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path / "a.safetensors", family, LoraSettings(rank=4, alpha=8.0))
    out = export_adapter(adapter, tmp_path / "export", CARD, ZImage, torch.float32)
    assert {path.name for path in out.iterdir()} == {DIFFUSERS_FILE, COMFYUI_FILE, CARD_FILE}
    trained, diffusers, comfyui = (load_file(p) for p in (adapter, out / DIFFUSERS_FILE, out / COMFYUI_FILE))
    assert set(diffusers) == {f"transformer.{key}" for key in trained}
    modules = {key.rsplit(".", 2)[0] for key in trained}
    assert comfyui.keys() == ZImage.comfyui_lora(trained, 4).keys()
    with safe_open(out / DIFFUSERS_FILE, framework="pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert config["transformer.r"] == config["transformer.lora_alpha"] == 4
    # what diffusers 0.36 looks up in it, before any layer (benchmarks/exports.py)
    assert config["transformer.rank_pattern"] == config["transformer.alpha_pattern"] == {}
    module = next(m for m in sorted(modules) if m.endswith("feed_forward.w1"))  # alike in both
    product = 8 / 4 * trained[f"{module}.lora_B.weight"] @ trained[f"{module}.lora_A.weight"]
    for tensors, prefix in ((diffusers, "transformer"), (comfyui, "diffusion_model")):
        b, a = (tensors[f"{prefix}.{module}.lora_{part}.weight"] for part in "BA")
        torch.testing.assert_close(b @ a, product)


@pytest.mark.parametrize("file", [DIFFUSERS_FILE, COMFYUI_FILE])
def test_bfloat16_rounds_once_after_the_scale_is_folded_in(family: Family, tmp_path: Path, file: str) -> None:
    """The adapter is as it was, the files are half as large, and every value is the nearest that bfloat16 has."""
    adapter = _adapter(tmp_path / "a.safetensors", family, LoraSettings(rank=4, alpha=3.0))
    before = adapter.read_bytes()
    whole, rounded = (
        load_file(export_adapter(adapter, tmp_path / name, CARD, ZImage, dtype) / file)
        for name, dtype in (("whole", torch.float32), ("rounded", torch.bfloat16))
    )
    assert whole.keys() == rounded.keys()
    for key, value in whole.items():
        assert torch.equal(rounded[key], value.to(torch.bfloat16)), key
    assert adapter.read_bytes() == before
    assert "in bfloat16" in (tmp_path / "rounded" / CARD_FILE).read_text()


def test_an_export_that_does_nothing_is_an_error(base: Path, family: Family, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path / "a.safetensors", family, LoraSettings(rank=4), size=0.0)
    out = export_adapter(adapter, tmp_path / "export", CARD, ZImage)
    with pytest.raises(ExportError, match="pictures are those of the base"):
        check_export(base, out, draw_student(family, adapter, ASKED[:1], 2, seed=0), ZImage)


def test_an_export_whose_names_do_not_fit_is_an_error(base: Path, family: Family, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path / "a.safetensors", family, LoraSettings(rank=4))
    drawn = draw_student(family, adapter, ASKED[:1], 2, seed=0)
    save_file({f"base_model.model.{k}": v for k, v in load_file(adapter).items()}, tmp_path / DIFFUSERS_FILE)
    with pytest.raises(ExportError, match="loads it as nothing"):
        check_export(base, tmp_path, drawn, ZImage)


def test_an_export_with_another_scale_is_an_error(base: Path, family: Family, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path / "a.safetensors", family, LoraSettings(rank=4))
    drawn = draw_student(family, adapter, ASKED[:1], 4, seed=0)
    out = export_adapter(adapter, tmp_path / "export", CARD, ZImage)
    halved = {k: v * (0.5 if "lora_B" in k else 1) for k, v in load_file(out / DIFFUSERS_FILE).items()}
    save_file(halved, out / DIFFUSERS_FILE)
    with pytest.raises(ExportError, match="other pictures than the trained student"):
        check_export(base, out, drawn, ZImage)


def test_the_card_is_markdown_with_valid_front_matter() -> None:
    text = render_card(CARD, rank=4, scale=2.0, dtype=torch.float32)
    _, front, body = text.split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["base_model"] == "maker/emoji-turbo"
    assert about["license"] == "apache-2.0"
    assert about["instance_prompt"] == 'a "fox" in [V] style'
    assert "| base | .1 |" in body
    assert "|---|---|\n| base" in body
    assert "f" * 64 in body
    code = body.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "num_inference_steps=4" in code
    bare = Card(**{**vars(CARD), "rows": ()})
    assert "Before and after" not in render_card(bare, rank=4, scale=1.0, dtype=torch.float32)
    assert "the same adapter in float32" in text
