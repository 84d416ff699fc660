"""A disk that is full in the middle of a training: one clear line, a whole checkpoint before it, and a next start."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dopsd.files import DiskFull
from dopsd.train import checkpoint as ckpt
from tests import tiny
from tests.small_disk import fill, free, small_disk

SETTINGS = {"max_steps": 8, "checkpoint_steps": 3}


class Acts(tiny.Recorder):
    """Calls something at a step."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        super().__init__()
        self._step, self._act = step, act

    def metrics(self, step, values) -> None:
        super().metrics(step, values)
        if step == self._step:
            self._act()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    tiny.run_tiny("d-opsd", folder, tiny.tiny_settings(**SETTINGS))
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "16m") as place:
        yield place


def _assert_goes_on(folder: Path, unbroken: Path, limit: Callable[[], None], free: Callable[[], None]) -> None:
    settings = tiny.tiny_settings(**SETTINGS)
    with pytest.raises(DiskFull) as failure:
        tiny.run_tiny("d-opsd", folder, settings, Acts(4, limit))
    free()
    text = str(failure.value)
    assert text.startswith(f"disk full: {folder}")
    assert len(text.splitlines()) == 1
    assert [path.name for path in (folder / "train/checkpoints").iterdir()] == ["step-00000003"]
    saved = ckpt.load_checkpoint(folder / "train/checkpoints", pytest.fail)
    assert saved is not None
    seen = tiny.Recorder()
    tiny.run_tiny("d-opsd", folder, settings, seen)
    assert seen.steps == [4, 5, 6, 7, 8]
    mine, theirs = (load_file(place / "adapters/d-opsd.safetensors") for place in (folder, unbroken))
    assert all(torch.equal(mine[key], value) for key, value in theirs.items())
    rows = [json.loads(line) for line in (folder / "train/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(9))
    assert json.loads((folder / "train/run.json").read_text())["status"] == "FINISHED"


@pytest.mark.parametrize("left", [0, 8192, 100_000])
def test_a_full_disk_is_one_clear_line_and_the_next_start_goes_on(disk: Path, unbroken: Path, left: int) -> None:
    """Full at a row of the log, or at some place within a checkpoint."""
    tensors = next((unbroken / "train/checkpoints").glob("*/tensors.safetensors"))
    assert tensors.stat().st_size > 100_000
    _assert_goes_on(disk, unbroken, lambda: fill(disk, left), lambda: free(disk))


def test_a_file_that_may_not_grow_is_told_of_as_a_full_disk(tmp_path: Path, unbroken: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))

    def free() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    try:
        _assert_goes_on(tmp_path, unbroken, limit, free)
    finally:
        free()
