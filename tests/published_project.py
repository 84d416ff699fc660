"""Projects that tune a stand-in of a published model: its folder, a concept of mixed shapes, settings from a recipe.

What is shrunk is listed in :data:`SMALL` and nowhere else; whatever is not there stays as the recipe has it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from tests import published

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
CONCEPT = "my-concept"
SIZES = ((64, 64), (96, 48), (48, 96), (80, 64))
"""Pictures are of mixed shapes, each of at least 64 x 64 pixels in area."""
REFERENCES = (((96, 64),), ((64, 128), (80, 80)), ((112, 64),), ((64, 64), (128, 64)))
"""What an edit starts from: one picture or two, of other sizes than the target."""

SMALL: dict[str, Any] = {
    "model.device": "cpu",
    "model.context_pixels": [64 * 64, 64 * 64],
    "data.resolution": 64,
    "train.max_steps": 2,
    "train.accumulation": 1,
    "train.teacher.gain_images": 1,
    "evaluation.max_prompts": 2,
    "evaluation.curve_prompts": 2,
    "evaluation.kept_prompts": ["a red house", "two cats"],
    "evaluation.backbones": ["efficientnet-lite0"],  # the one that is here without a hub
    "compute.launcher": "local",
    "registry.max_base_gib": 0,  # as with a base of the real size: versions name it and do not hold it
}
"""What makes a recipe small enough for a test."""


def write_stand_in(recipe: str, root: Path) -> dict[str, str]:
    """The folder of the recipe's base (and its VLM) below ``root``; returns the settings that name them."""
    if recipe == "z-image-turbo":
        base = published.write_z_image_turbo(root / recipe, layers=1)
        vlm = published.write_qwen3_vl(root / "qwen3-vl", base)
        return {"model.path": str(base), "model.vlm": str(vlm)}
    if recipe == "krea-2-turbo":
        return {"model.path": str(published.write_krea2_turbo(root / recipe, layers=1))}
    size = "9b" if recipe.endswith("9b") else "4b"
    return {"model.path": str(published.write_klein(root / recipe, size, blocks=(1, 2)))}


def write_concept(folder: Path, *, edits: bool = False, held_out: int = 2) -> Path:
    """Four pictures and ``held_out`` others in ``holdout/``, of :data:`SIZES` in turn; of edits, with references."""
    draw = np.random.default_rng(7)
    parts = ((folder, 4, "blot number {} in [V] style"), (folder / "holdout", held_out, "another blot {} in [V] style"))
    for part, count, caption in parts:
        part.mkdir(parents=True)
        rows = []
        for number in range(count):
            _blots(draw, SIZES[number % 4]).save(part / f"{number}.png")
            row: dict[str, Any] = {"image": f"{number}.png", "caption": caption.format(number)}
            if edits:
                row["references"] = []
                for index, size in enumerate(REFERENCES[number % 4]):
                    name = f"before-{number}-{index}.png"
                    _blots(draw, size).save(part / name)
                    row["references"].append(name)
            rows.append(json.dumps(row))
        (part / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def _blots(draw: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Large soft blots."""
    small = draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def overrides_of(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Settings by dotted name, as ``--set`` takes them."""
    return tuple(f"{key}={json.dumps(value)}" for key, value in values.items())


def edit_settings(file: Path, values: Mapping[str, Any]) -> None:
    """Change settings in a file, as a person would with an editor; their keys must be there."""
    raw = yaml.safe_load(file.read_text())
    for key, value in values.items():
        *parents, last = key.split(".")
        node = raw
        for parent in parents:
            node = node[parent]
        assert last in node, key
        node[last] = value
    file.write_text(yaml.safe_dump(raw, sort_keys=False))


def make_clone(root: Path) -> Path:
    """What a clone of this repository is at first, as far as the stages need it: under git and DVC, no run yet."""
    for folder in ("dopsd", "recipes", ".dvc/plots", "data/prompts"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("dvc.yaml", "params.yaml", ".dvcignore", ".gitignore", ".dvc/.gitignore"):
        shutil.copyfile(ROOT / file, root / file)
    (root / ".dvc/config").touch()
    (root / "data/concepts").mkdir(parents=True)
    run(root, "git init --quiet && git add --all && git commit --quiet --message clone")
    return root


def run(where: Path, line: str, fails: bool = False) -> str:
    """Run a line of the shell as a person in that clone does, with its code and their own home; returns what it said.

    ``~`` is the folder that the clone is in.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "GIT_", "MLFLOW_", "RAY_"))}
    own = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(where),
        "HOME": str(where.parent),
        "DVC_GLOBAL_CONFIG_DIR": str(where.parent / "no-config"),
        "DVC_SYSTEM_CONFIG_DIR": str(where.parent / "no-config"),
        "DVC_SITE_CACHE_DIR": str(where.parent / f"{where.name}-site"),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "300",
    }
    for who in ("AUTHOR", "COMMITTER"):
        own |= {f"GIT_{who}_NAME": "a person", f"GIT_{who}_EMAIL": "person@example.org"}
    done = subprocess.run(
        ["bash", "-c", line], cwd=where, env=kept | own, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=900,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, f"{line}\n{done.stdout}"
    return done.stdout
