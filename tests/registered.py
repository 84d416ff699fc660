"""A trained adapter, a registry of its own, and versions that are registered there as the stage does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dopsd import champions
from dopsd.config import Settings, load_settings
from dopsd.config.groups import LoraSettings, ModelSettings
from dopsd.distill.adapters import adapter_parameters, add_adapters, save_adapter
from dopsd.evaluation.paired import Paired
from dopsd.export import CARD_FILE, COMFYUI_FILE, DIFFUSERS_FILE, draw_student, export_adapter
from dopsd.identity import VersionIdentity
from dopsd.models import load_family
from dopsd.models.base import Request
from dopsd.models.z_image import ZImage
from dopsd.registry import Outcome, Registry
from emoji_turbo import architecture
from tests import tiny
from tests.scored import entry, paired

SETTINGS = load_settings(Path(__file__).parent.parent / "params.yaml")
MADE = VersionIdentity(data="d1", settings="s1", base="b1", method="m1")
TODAY, OTHERS = champions._Questions("q", "ground", "b1"), champions._Questions("r", "other ground", "b2")


def write_trained(folder: Path) -> dict[str, Any]:
    """A random base, an adapter that changes a lot, its export, and what the student draws with it."""
    parts = tiny.tiny_parts()
    architecture.save_folder(folder / "base", **{k: parts[k] for k in ("vae", "tokenizer", "vlm", "transformer")})
    family = load_family(ModelSettings(path=str(folder / "base"), device="cpu", context_pixels=(4096, 4096)))
    lora = LoraSettings(rank=4)
    pair = add_adapters(family.transformer, lora, family.lora_targets, seed=0, kind="frozen")
    generator = torch.Generator().manual_seed(1)
    for key, value in adapter_parameters(family.transformer, "student").items():
        if "lora_B" in key:
            value.data.copy_(0.5 * torch.randn(value.shape, generator=generator))
    save_adapter(folder / "d-opsd.safetensors", family.transformer, "student", lora)
    pair.remove()
    (folder / "d-opsd.json").write_text("{}\n")
    export = export_adapter(folder / "d-opsd.safetensors", folder / "export", tiny.CARD, ZImage)
    asked = [(Request("a fox in [V] style"), 64, 64)]
    drawn = draw_student(family, folder / "d-opsd.safetensors", asked, 2, seed=0)
    files = {
        "adapter": export / DIFFUSERS_FILE, "comfyui": export / COMFYUI_FILE, "card": export / CARD_FILE,
        "about": folder / "d-opsd.json", "base": folder / "base",
    }  # fmt: skip
    return {"files": files, "drawn": drawn, "student": folder / "d-opsd.safetensors"}


def fresh_registry(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """On a SQLite store of its own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    return Registry(folder)


def run_of(registry: Registry, tmp_path: Path) -> str:
    client = registry.client
    found = client.get_experiment_by_name("test")
    experiment = found.experiment_id if found else client.create_experiment("test", (tmp_path / "artifacts").as_uri())
    return client.create_run(experiment).info.run_id


def register(
    registry: Registry, tmp_path: Path, trained: dict[str, Any], mine: Paired | None = None, run: str = "",
    asked: champions._Questions = TODAY, settings: Settings = SETTINGS, **made: str,
) -> Outcome:  # fmt: skip
    """As stage register does, with scores that are given."""
    mine, identity = mine or paired(), VersionIdentity(**{**MADE.__dict__, **made})
    verdict, anchor = champions._judge(registry, "style-ink", identity, mine, asked, settings, tmp_path)
    call = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 0.0}
    serving = {"base": "data/base", "revision": None, "call": call}
    return registry.register(
        "style-ink", run or run_of(registry, tmp_path), identity,
        entry(tmp_path / "scores", mine, asked.asked), verdict,
        {"dopsd.base": "tiny", "dopsd.base.drawing": asked.drawing}, trained["files"], serving, anchor,
    )  # fmt: skip


def holder(registry: Registry, alias: str) -> int | None:
    found = registry.holder("style-ink", alias)
    return int(found[0].version) if found else None
