"""A family that the project does not know goes the whole way after one file and one line: nobody else asks which."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

from dopsd import models
from dopsd.config import Settings
from dopsd.distill.rollout import sample
from dopsd.models.base import Request
from dopsd.stages import STAGES
from tests import tiny
from tests.family_folders import picture
from tests.made_up_family import write_made_up
from tests.tiny_project import ANYTHING_PASSES


@pytest.fixture
def project(tmp_path, monkeypatch) -> tuple[Path, Settings]:
    monkeypatch.setitem(models.FAMILIES, "made-up", "tests.made_up_family:MadeUp")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    write_made_up(tmp_path / "base")
    for part, count in (("", 4), ("holdout", 2)):
        folder = tmp_path / "data" / "concepts" / "blots" / part
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for number in range(count):
            picture(64 if number % 2 else 96, 64, 10 * len(part) + number).save(folder / f"{number}.png")
            captions = {"short": f"blot {number} in [V] style", "long": f"a large soft blot, {number}, in [V] style"}
            rows.append(json.dumps({"image": f"{number}.png", "captions": captions}))
        (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    settings = Settings.model_validate({
        "concepts": ["blots"],
        "model": {"family": "made-up", "path": "base", "device": "cpu"},
        "data": {"resolution": 64},
        "train": {**tiny.tiny_settings(max_steps=2).model_dump(mode="json", exclude={"teacher"}),
                  "methods": ["d-opsd"], "teacher": {"decay": 0.9}},
        "evaluation": {"steps": [2, 4], "few_steps": 2, "batch_size": 1, "kept_prompts": ["a red house", "two cats"]},
        "compute": {"launcher": "local"},
        "registry": ANYTHING_PASSES,
    })  # fmt: skip
    return tmp_path, settings


def test_a_family_of_one_file_goes_the_whole_way(project):
    root, settings = project
    chosen = models.resolved(settings)
    assert chosen.model.context == "enhanced-prompt", "its only context"
    assert chosen.train.teacher.kind == "frozen", "a teacher that only reads more has nothing to follow"
    for stage in STAGES:
        STAGES[stage]("blots", settings, root)
    run = root / "runs" / "blots"
    assert {path.name for path in (run / "export").iterdir()} == {
        "README.md", "comfyui_lora.safetensors", "pytorch_lora_weights.safetensors",
    }  # fmt: skip
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert metrics["models"] == ["base", "teacher", "d-opsd"], "the held-out rows have the teacher's caption too"
    index = json.loads((run / "encoded" / "index.json").read_text())
    assert {example["caption"] for example in index["examples"]} == {f"blot {n} in [V] style" for n in range(4)}
    with Image.open(run / "train" / "d-opsd" / "previews" / "student-000002.webp") as strip:
        assert strip.size[0] == 80 + 64, "each at its own size: 96 x 64 is trained at 80 x 48"


def test_its_rollout_is_its_pipelines(project):
    root, settings = project
    family = models.load_family(settings.model, root)
    noise = family.initial_latents(2, 48, 80, torch.Generator().manual_seed(0))
    requests = [Request("a fox"), Request("a red boat in [V] style")]
    ours = family.decode(sample(family, family.encode_prompt(requests), 4, 48, 80, noise))
    vae = family.parts["vae_decoder"]
    vae.encoder = family.parts["vae_encoder"].encoder
    pipeline = diffusers.Lumina2Pipeline(
        vae=vae, **{name: family.parts[name] for name in ("transformer", "scheduler", "text_encoder", "tokenizer")}
    )
    pipeline.set_progress_bar_config(disable=True)
    call = family.call(requests[0], 48, 80, 4, noise) | {"prompt": [r.caption for r in requests]}
    for mine, theirs in zip(ours, pipeline(**call).images, strict=True):
        assert mine.tobytes() == theirs.tobytes()
