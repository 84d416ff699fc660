"""A small world and a concept drawn from it, for an evaluation that takes seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dopsd.config import Settings
from dopsd.config.groups import LoraSettings
from dopsd.data.manifest import ConceptTable
from dopsd.data.schema import validate_dataset
from dopsd.distill.adapters import STUDENT, adapted_layers, add_adapters, save_adapter
from dopsd.evaluation.world import world_picture
from emoji_turbo.captions import concept_caption
from emoji_turbo.pictures import World
from tests.tiny import tiny_family

WORLD = Path(__file__).parent.parent / "data" / "base" / "emoji-turbo" / "world"
HOLDOUT, TRAINING = 12, 4


@cache
def small_world() -> World:
    """The first 34 things of the embedded base's world."""
    whole = World.load(WORLD)
    count = 34
    pictures = {style: stack[:count] for style, stack in whole.pictures.items()}
    return replace(
        whole, labels=whole.labels[:count], codes=whole.codes[:count], pictures=pictures, held_out=(5,),
        known=tuple(i for i in range(count) if i != 5), subject=5,
    )  # fmt: skip


def tiny_run_settings(**changes: Any) -> Settings:
    """Few steps and few prompts; ``changes`` of the evaluation."""
    evaluation = {
        "steps": [1, 2], "few_steps": 1, "many_steps": 2, "max_prompts": 10, "curve_prompts": 4, "known_prompts": 6,
        "kept_prompts": ["a red house", "two cats", "a boat", "a tree, flat style", "a sign that says OPEN", "the sea"],
    }  # fmt: skip
    values = {
        "concepts": ["inked"], "model": {"path": "nowhere"}, "data": {"resolution": 64},
        "train": {"max_steps": 1, "batch_size": 1, "learning_rate": 1e-3}, "evaluation": evaluation | changes,
        "registry": {"enabled": False},
    }  # fmt: skip
    return Settings.model_validate(values)


def write_concept(
    folder: Path, world: World, kind: dict[str, Any] | None, holdout: bool = True
) -> tuple[ConceptTable, ConceptTable | None]:
    """A style data set of the world's ink pictures: concepts 0-11 held out, 12-15 to train on."""
    parts = [(folder, range(HOLDOUT, HOLDOUT + TRAINING))] + ([(folder / "holdout", range(HOLDOUT))] if holdout else [])
    for place, concepts in parts:
        place.mkdir(parents=True)
        rows = []
        for i in concepts:
            world_picture(world, "ink", i).save(place / f"{i}.png")
            rows.append({"image": f"{i}.png", "caption": concept_caption(world.labels[i])})
        (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tables = validate_dataset(folder, "inked", tiny_run_settings().data)
    if kind is not None:
        (folder / "concept.json").write_text(json.dumps(kind))
    return tables


def write_adapter(path: Path, scale: float) -> Path:
    """An adapter that changes the tiny family's pictures, or with ``scale`` 0 does nothing."""
    transformer = tiny_family().transformer
    pair = add_adapters(transformer, LoraSettings(rank=4), tiny_family().lora_targets, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapted_layers(transformer, STUDENT).values():
            weight = layer.lora_B[STUDENT].weight
            weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    save_adapter(path, transformer, STUDENT, LoraSettings(rank=4))
    pair.remove()
    return path
