"""A seeded loss curve of every method, as it was: a refactoring must not move it.

Written by ``python -m tests.test_loss_curve`` whenever a change is meant to move it; the commit says why.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import get_args

import pytest
import torch

from dopsd.config.groups import Method
from tests import tiny

METHODS = get_args(Method)

CURVES = Path(__file__).with_suffix(".json")
SIZES = ((64, 64), (48, 80))


def curve(method: str, folder: Path) -> list[dict[str, float]]:
    """Loss, replay's loss and gradient norm of six steps: two sizes, guidance, replay, accumulation."""
    settings = tiny.tiny_settings(
        accumulation=2, learning_rate=3e-3, teacher={"decay": 0.9, "guidance": 1.5}, schedule="linear",
        replay={"weight": 0.5, "prompts": ["x"]}, sft_compute_factor=1.0, loss="x0",
    )  # fmt: skip
    recorder = tiny.Recorder()
    tiny.run_tiny(method, folder, settings, recorder, tiny.tiny_examples(8, sizes=SIZES))
    kept = ("train/loss", "train/replay_loss", "train/grad_norm")
    rows = [row for step, row in zip(recorder.steps, recorder.values, strict=True) if step > 0]
    return [{key: row[key] for key in kept if key in row} for row in rows]


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_curve_is_what_it_was(tmp_path, method):
    """Bit for bit on the processor that wrote it; elsewhere kernels round differently, and Adam carries that on."""
    before, now = json.loads(CURVES.read_text())[method], curve(method, tmp_path)
    assert len(before) == len(now)
    for number, (old, new) in enumerate(zip(before, now, strict=True)):
        assert new == pytest.approx(old, rel=1e-4 if number < 2 else 5e-3), f"step {number + 1}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        curves = {method: curve(method, Path(place) / method) for method in METHODS}
    CURVES.write_text(json.dumps(curves, indent=1) + "\n")
