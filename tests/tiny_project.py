"""A project with a random base and small concepts, that goes the whole way in seconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from dvc.repo import Repo
from PIL import Image

from emoji_turbo import architecture
from tests import tiny

ROOT = Path(__file__).parent.parent
ANYTHING_PASSES = {"min_learnt": None, "min_kept": None, "max_few_step_loss": None, "min_diversity": None,
                   "tolerance": 10.0}  # fmt: skip
"""For random pictures: what the gate asks for is tested where it is."""


def write_pictures(folder: Path, count: int, seed: int, caption: str) -> None:
    """``count`` pictures of large soft blots with captions, as a data set."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        blot(draw).save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "caption": caption.format(number)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def blot(draw: np.random.Generator) -> Image.Image:
    """One picture of 64 pixels."""
    small = draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC)


def make_project(root: Path, concepts: Sequence[str] = ("blots",), **train: Any) -> Path:
    """Write a project into ``root``; ``train`` changes its training settings."""
    parts = tiny.tiny_parts()
    architecture.save_folder(
        root / "data/base/tiny", **{key: parts[key] for key in ("vae", "tokenizer", "vlm", "transformer")}
    )
    for number, concept in enumerate(concepts):
        write_pictures(root / "data/concepts" / concept, 4, 10 * number, "blot number {} in [V] style")
        write_pictures(root / "data/concepts" / concept / "holdout", 3, 10 * number + 1, "another blot {} in [V] style")
    how = tiny.tiny_settings(**{"max_steps": 3, "preview_steps": 2} | train).model_dump(mode="json")
    settings = {
        "concepts": list(concepts),
        "model": {"path": "data/base/tiny", "device": "cpu", "context_pixels": [4096, 4096]},
        "data": {"resolution": 64},
        # each concept's own number of steps lies over the common one, so that whoever reads `train` alone is found out
        "train": how | {"methods": train.get("methods", ["d-opsd", "sft"]), "max_steps": how["max_steps"] + 1},
        "evaluation": {
            "steps": [1, 2],
            "few_steps": 1,
            "many_steps": 2,
            "max_prompts": 3,
            "curve_prompts": 2,
            "kept_prompts": "data/prompts/three.txt",
        },
        "compute": {"launcher": "local"},
        "registry": ANYTHING_PASSES,
    }
    (root / "data/prompts").mkdir()
    (root / "data/prompts/three.txt").write_text("a red house\ntwo cats\nthe sea\n")
    for concept in concepts:
        (root / "data/concepts" / concept / "train.yaml").write_text(f"max_steps: {how['max_steps']}\n")
    (root / "params.yaml").write_text(yaml.safe_dump(settings))
    (root / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    (root / "dopsd").symlink_to(ROOT / "dopsd")  # the report depends on the code beside dvc.yaml
    Repo.init(str(root), no_scm=True).close()
    return root
