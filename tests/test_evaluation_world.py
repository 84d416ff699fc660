"""The truth that a base's folder brings along: data from outside, read whole or refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dopsd.evaluation.world import World, WorldError, world_of
from emoji_turbo.captions import caption
from emoji_turbo.pictures import BASE_STYLES
from emoji_turbo.pictures import World as EmojiWorld

SHIPPED = Path(__file__).parent.parent / "data" / "base" / "emoji-turbo" / "world"


def test_the_shipped_world_is_read_without_the_code_that_made_it():
    world, made = World.load(SHIPPED), EmojiWorld.load(SHIPPED)
    assert (world.labels, world.known, world.styles) == (made.labels, made.known, BASE_STYLES)
    assert all(torch.equal(world.pictures[style], made.pictures[style]) for style in made.pictures)
    for style in BASE_STYLES:
        assert world.captions[style] == tuple(caption(label, style) for label in world.labels)
    with Image.open(SHIPPED / "ink.png") as sheet:
        tile = np.array(sheet.convert("RGB"))[64:128, 3 * 64 : 4 * 64]
    assert np.array_equal(world.pictures["ink"][23].permute(1, 2, 0).numpy(), tile), "row 1, column 3 of 20"


def test_what_was_saved_is_read_back(tmp_path):
    made = EmojiWorld.load(SHIPPED)
    made.save(tmp_path / "world")
    again = EmojiWorld.load(tmp_path / "world")
    assert (again.labels, again.codes, again.held_out, again.subject) == (
        made.labels, made.codes, made.held_out, made.subject,
    )  # fmt: skip
    assert world_of(tmp_path) is not None
    assert world_of(tmp_path / "world") is None, "a base without one"


@pytest.mark.parametrize(
    ("change", "words"),
    [({"captions": {"noto": ["a fox"]}}, "one text for each"), ({"captions": {"new": []}}, "styles of the world"),
     ({"known": [10**6]}, "no label's"), ({"styles": ["../../secret"], "captions": {}}, "no style's name"),
     ({"size": "x"}, "misstates"),
     ({"columns": 7}, "no sheet of 7 columns"), ({"styles": ["absent"], "captions": {}}, "cannot be read")],
)  # fmt: skip
def test_a_world_that_does_not_hold_together_is_refused_in_one_line(tmp_path, change, words):
    shutil.copytree(SHIPPED, tmp_path / "world")
    meta = json.loads((SHIPPED / "concepts.json").read_text())
    (tmp_path / "world" / "concepts.json").write_text(json.dumps(meta | change))
    with pytest.raises(WorldError, match=words) as caught:
        World.load(tmp_path / "world")
    assert "\n" not in str(caught.value)
