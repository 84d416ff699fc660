"""A run killed at any moment resumes where it was and ends bit for bit where the unbroken run ends."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny

ROOT = Path(__file__).parent.parent
METHODS = {
    "d-opsd": {"teacher": {"guidance": 1.5, "decay": 0.9}, "replay": {"weight": 0.5, "prompts": ["a fox"]}},
    "sft": {"schedule": "cosine", "warmup_steps": 2, "replay": {"weight": 0.5, "prompts": ["a fox"]}},
}


def _settings(method, **changes):
    return tiny.tiny_settings(max_steps=8, checkpoint_steps=3, **METHODS[method], **changes)


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """One training process per method, importing while other tests run; each waits for a line on its standard input."""
    running = {}
    for method in METHODS:
        folder = tmp_path_factory.mktemp(method)
        running[method] = folder, subprocess.Popen(
            [sys.executable, "-m", "tests.tiny", method, str(folder), _settings(method).model_dump_json()],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    yield running
    for _, process in running.values():
        process.kill()
        process.communicate()


def _tensors(folder):
    """Everything the run is at its end: adapters, and the last checkpoint's teacher, optimizer and generator."""
    found = {}
    last = sorted((folder / "train" / "checkpoints").iterdir())[-1]
    for path in [*sorted((folder / "adapters").glob("*.safetensors")), last / "tensors.safetensors"]:
        found |= {f"{path.name}:{key}": value for key, value in load_file(path).items()}
    return found


def _rows(folder):
    rows = [json.loads(line) for line in (folder / "train" / "log.jsonl").read_text().splitlines()]
    measured = {"time", "train/seconds", "train/images_per_second"}
    return [{key: value for key, value in row.items() if key not in measured} for row in rows]


def _assert_same_end(folder, reference):
    mine, theirs = _tensors(folder), _tensors(reference)
    assert mine.keys() == theirs.keys()
    assert len(mine) > 50
    assert not [key for key in mine if not torch.equal(mine[key], theirs[key])]
    assert _rows(folder) == _rows(reference)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The run that nothing disturbs, per method."""
    made = {}

    def get(method):
        if method not in made:
            made[method] = tmp_path_factory.mktemp("unbroken")
            tiny.run_tiny(method, made[method], _settings(method))
        return made[method]

    return get


@pytest.mark.usefixtures("children")
@pytest.mark.parametrize("step", [1, 3, 4, 8])
def test_a_run_broken_off_after_any_step_ends_bit_for_bit_where_the_unbroken_one_does(tmp_path, unbroken, step):
    class Breaks(tiny.Recorder):
        def metrics(self, at, values):
            super().metrics(at, values)
            if at == step:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.run_tiny("d-opsd", tmp_path, _settings("d-opsd"), Breaks())
    seen = tiny.Recorder()
    result = tiny.run_tiny("d-opsd", tmp_path, _settings("d-opsd"), seen)
    checkpoint = (step - 1) // 3 * 3
    assert [s for s in seen.steps if s] == list(range(checkpoint + 1, 9))
    assert result.steps == 8
    assert result.teacher_gain == tiny.run_tiny("d-opsd", tmp_path, _settings("d-opsd")).teacher_gain
    _assert_same_end(tmp_path, unbroken("d-opsd"))


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_ends_bit_for_bit_where_the_unbroken_one_does(children, unbroken, method):
    folder, process = children[method]
    process.stdin.write("go\n")
    process.stdin.flush()
    for line in process.stdout:
        if line == "step 5\n":
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    seen = tiny.Recorder()
    tiny.run_tiny(method, folder, _settings(method), seen)
    assert any("resuming at step" in text for text in seen.messages)
    _assert_same_end(folder, unbroken(method))


def test_a_finished_run_called_again_returns_at_once_and_restores_its_adapters(tmp_path):
    settings = tiny.tiny_settings(max_steps=3)
    first = tiny.run_tiny("sft", tmp_path, settings)
    contents = {label: path.read_bytes() for label, path in first.adapters.items()}
    for path in (tmp_path / "adapters").iterdir():  # DVC empties an output folder before its stage runs
        path.unlink()
    seen = tiny.Recorder()
    again = tiny.run_tiny("sft", tmp_path, settings, seen)
    assert again == first
    assert not seen.steps
    assert not seen.messages
    assert not seen.shown
    assert {label: path.read_bytes() for label, path in again.adapters.items()} == contents


def test_other_settings_or_data_start_afresh_and_set_the_old_run_aside(tmp_path):
    tiny.run_tiny("d-opsd", tmp_path, tiny.tiny_settings(max_steps=2))
    for settings, examples in (
        (tiny.tiny_settings(max_steps=2, learning_rate=2e-2), None),
        (tiny.tiny_settings(max_steps=2, learning_rate=2e-2), tiny.tiny_examples(seed=1)),
    ):
        old = (tmp_path / "train" / "log.jsonl").read_text()
        seen = tiny.Recorder()
        tiny.run_tiny("d-opsd", tmp_path, settings, seen, examples)
        assert seen.steps == [0, 1, 2]
        assert any("differ from the run at step 2" in text and "train.previous" in text for text in seen.messages)
        assert (tmp_path / "train.previous" / "log.jsonl").read_text() == old


def test_settings_that_change_no_step_do_not_start_afresh(tmp_path):
    tiny.run_tiny("d-opsd", tmp_path, tiny.tiny_settings(max_steps=2))
    seen = tiny.Recorder()
    changed = tiny.tiny_settings(max_steps=2, preview_steps=1, checkpoint_steps=1, methods=["d-opsd"], max_minutes=60)
    tiny.run_tiny("d-opsd", tmp_path, changed, seen)
    assert not seen.steps
    assert not (tmp_path / "train.previous").exists()
