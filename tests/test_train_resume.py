"""A run killed at any moment resumes where it was and ends bit for bit where the unbroken run ends."""

import json
import math
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
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
    with pytest.raises(KeyboardInterrupt):
        tiny.run_tiny("d-opsd", tmp_path, _settings("d-opsd"), tiny.Cut(step))
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


def _says(seen, *words):
    return [text for text in seen.messages if all(word in text for word in words)]


def test_other_settings_or_data_start_afresh_and_nothing_that_was_set_aside_is_lost(tmp_path):
    tiny.run_tiny("d-opsd", tmp_path, tiny.tiny_settings(max_steps=3))
    (tmp_path / "train.previous").mkdir()  # of a version that did not count them
    old, place = {}, tmp_path / "train"
    other = tiny.tiny_examples(seed=1)
    faster = tiny.tiny_settings(max_steps=2, learning_rate=2e-2)
    for number, (settings, examples, what) in enumerate((
        (faster, None, "learning_rate 0.01 -> 0.02, max_steps 3 -> 2 since"),
        (faster, other, "the encoded data changed since"),
        (tiny.tiny_settings(max_steps=2), other, "learning_rate 0.02 -> 0.01 since"),
        (tiny.tiny_settings(max_steps=1), other, "max_steps 2 -> 1, which it is past since"),
    ), 1):  # fmt: skip
        old[f"train.previous-{number}"] = (place / "log.jsonl").read_text()
        seen = tiny.Recorder()
        tiny.run_tiny("d-opsd", tmp_path, settings, seen, examples)
        assert seen.steps == list(range(settings.max_steps + 1))
        assert _says(seen, f"train: {what} the run at step", "set aside", "`dopsd runs`"), seen.messages
    kept = {path.name: (path / "log.jsonl").read_text() for path in tmp_path.glob("train.previous-*")}
    assert kept == old
    assert (tmp_path / "train.previous").is_dir()


def test_of_many_differences_a_handful_is_named(tmp_path):
    tiny.run_tiny("d-opsd", tmp_path, tiny.tiny_settings(max_steps=2))
    seen = tiny.Recorder()
    others = {"lora": {"rank": 2, "kind": "dora"}, "betas": [0.8, 0.9], "clip_norm": 0.5, "loss": "x0",
              "optimizer": "adamw", "seed": 4, "schedule": "linear"}  # fmt: skip
    tiny.run_tiny("d-opsd", tmp_path, tiny.tiny_settings(max_steps=2, **others), seen)
    (said,) = _says(seen, "since the run at step 2")
    assert "betas [0.9, 0.999] -> [0.8, 0.9], clip_norm 1 -> 0.5, lora.kind as by default -> dora, " in said
    assert "and 2 more since" in said


@pytest.mark.parametrize("lost", ["state.json", "tensors.safetensors"])
def test_a_run_whose_checkpoints_cannot_be_read_is_set_aside_and_not_written_over(tmp_path, lost):
    tiny.run_tiny("d-opsd", tmp_path, tiny.tiny_settings(max_steps=4))
    for path in (tmp_path / "train/checkpoints").glob(f"*/{lost}"):
        path.write_bytes(b"")
    old = (tmp_path / "train/adapters/d-opsd.safetensors").read_bytes()
    seen = tiny.Recorder()
    tiny.run_tiny("d-opsd", tmp_path, tiny.tiny_settings(max_steps=6), seen)
    assert seen.steps == list(range(7))
    assert _says(seen, "unreadable checkpoint")
    assert (tmp_path / "train.previous-1/adapters/d-opsd.safetensors").read_bytes() == old


def test_a_run_without_a_checkpoint_is_not_kept(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        tiny.run_tiny("d-opsd", tmp_path, tiny.tiny_settings(), tiny.Cut(0))
    tiny.run_tiny("d-opsd", tmp_path, tiny.tiny_settings(learning_rate=1.0))
    assert not list(tmp_path.glob("*.previous*"))


LENGTHS = {
    "d-opsd": {"teacher": {"guidance": 1.5, "decay": 0.9, "every": 3}, "warmup_steps": 2},
    "sft": {"warmup_steps": 6},
    "sft-teacher": {},
}


@pytest.mark.parametrize("method", LENGTHS)
@pytest.mark.parametrize("killed", [False, True])
def test_more_steps_go_on_where_the_run_is_and_end_bit_for_bit_as_an_unbroken_longer_run(tmp_path, method, killed):
    def settings(steps):
        return tiny.tiny_settings(max_steps=steps, checkpoint_steps=2, sft_compute_factor=1.5, **LENGTHS[method])

    with pytest.raises(KeyboardInterrupt) if killed else nullcontext():
        tiny.run_tiny(method, tmp_path / "a", settings(4), tiny.Cut(3 if killed else None))
    at = 2 if killed else 6 if method == "sft" else 4
    seen = tiny.Recorder()
    tiny.run_tiny(method, tmp_path / "a", settings(8), seen)
    assert seen.steps[0] == at + 1
    assert _says(seen, f"max_steps 4 -> 8; going on from step {at}")
    assert not _says(seen, "schedule")
    whole = tiny.run_tiny(method, tmp_path / "b", settings(8))
    _assert_same_end(tmp_path / "a", tmp_path / "b")
    for label in whole.adapters:
        mine, theirs = (json.loads((tmp_path / x / f"adapters/{label}.json").read_text()) for x in "ab")
        assert mine.pop("lengthened") == [{"step": at, "max_steps": 4}]
        assert theirs.pop("lengthened") == []
        assert mine == theirs
    again = tiny.Recorder()
    tiny.run_tiny(method, tmp_path / "a", settings(8), again)
    assert (again.steps, again.messages) == ([], [])


@pytest.mark.parametrize(("method", "steps"), [("d-opsd", 6), ("d-opsd", 4), ("sft", 4)])
def test_fewer_steps_that_are_not_behind_go_on_too(tmp_path, method, steps):
    """At step 4 there is a checkpoint, and with 4 steps nothing more to do but to write the adapter."""
    with pytest.raises(KeyboardInterrupt):
        tiny.run_tiny(method, tmp_path / "a", tiny.tiny_settings(max_steps=20), tiny.Cut(5))
    seen = tiny.Recorder()
    mine = tiny.run_tiny(method, tmp_path / "a", tiny.tiny_settings(max_steps=steps), seen)
    assert _says(seen, f"max_steps 20 -> {steps}; going on from step 4")
    theirs = tiny.run_tiny(method, tmp_path / "b", tiny.tiny_settings(max_steps=steps))
    assert (mine.steps, mine.stopped, set(mine.adapters)) == (theirs.steps, theirs.stopped, set(theirs.adapters))
    _assert_same_end(tmp_path / "a", tmp_path / "b")


def test_more_steps_where_the_clock_has_run_out_already(tmp_path):
    """Nothing is trained, and what is there is this run's: its adapter says so, else it could not be registered."""
    result = tiny.run_tiny("d-opsd", tmp_path, tiny.tiny_settings(max_steps=4, max_minutes=1e-9))
    before = result.adapters["d-opsd"].read_bytes()
    longer = tiny.tiny_settings(max_steps=8, max_minutes=1e-9)
    result = tiny.run_tiny("d-opsd", tmp_path, longer)
    assert (result.steps, result.stopped) == (1, "max_minutes")
    assert result.adapters["d-opsd"].read_bytes() == before
    fingerprint = json.loads((tmp_path / "adapters/d-opsd.json").read_text())["fingerprint"]
    assert fingerprint == tiny.tiny_identity(longer, "d-opsd", tiny.tiny_examples(), tiny.tiny_prompts())


def test_a_decaying_schedule_is_the_new_lengths_from_there_on_and_says_so(tmp_path):
    def settings(steps):
        return tiny.tiny_settings(max_steps=steps, schedule="cosine")

    tiny.run_tiny("d-opsd", tmp_path, settings(4))
    seen = tiny.Recorder()
    tiny.run_tiny("d-opsd", tmp_path, settings(8), seen)
    assert _says(
        seen, "max_steps 4 -> 8; going on from step 4; from there on the rate is that of a cosine schedule of 8"
    )
    rates = [values["train/learning_rate"] for values in seen.values]
    assert rates == [pytest.approx(1e-2 * 0.5 * (1 + math.cos(math.pi * step / 8))) for step in range(4, 8)]


def test_more_steps_than_sft_is_past_start_it_afresh(tmp_path):
    """Its first adapter is due at a step that lies behind its last checkpoint."""
    tiny.run_tiny("sft", tmp_path, tiny.tiny_settings(max_steps=4))
    seen = tiny.Recorder()
    tiny.run_tiny("sft", tmp_path, tiny.tiny_settings(max_steps=5), seen)
    assert _says(seen, "max_steps 4 -> 5, which it is past since the run at step 6; starting afresh")
    assert (tmp_path / "train.previous-1/checkpoints/step-00000006").is_dir()


def test_what_a_shorter_run_ended_with_stays_beside_the_longer_ones(tmp_path):
    def settings(steps, **more):
        return tiny.tiny_settings(max_steps=steps, **more)

    tiny.run_tiny("sft", tmp_path, settings(2))
    old = {path.stem: path.read_bytes() for path in (tmp_path / "train/adapters").glob("*.safetensors")}
    result = tiny.run_tiny("sft", tmp_path, settings(6, max_minutes=1e-9))  # ends where it is: before `sft-compute`
    assert set(result.adapters) == {"sft"}, "and not what the shorter one ended with"
    kept = {path.stem: path.read_bytes() for path in (tmp_path / "train/adapters").glob("*-[0-9].safetensors")}
    assert kept == {"sft-2": old["sft"], "sft-compute-3": old["sft-compute"]}


def test_a_run_without_tensors_is_not_made_longer(tmp_path):
    """`dopsd clean` deletes those of a finished one; it is set aside whole."""
    tiny.run_tiny("d-opsd", tmp_path, tiny.tiny_settings(max_steps=2))
    for path in (tmp_path / "train/checkpoints").glob("*/tensors.safetensors"):
        path.unlink()
    seen = tiny.Recorder()
    tiny.run_tiny("d-opsd", tmp_path, tiny.tiny_settings(max_steps=3), seen)
    assert seen.steps == [0, 1, 2, 3]
    assert _says(seen, "`dopsd clean` deletes those of a finished training")
    assert (tmp_path / "train.previous-1/adapters/d-opsd.safetensors").exists()


def test_settings_that_change_no_step_do_not_start_afresh(tmp_path):
    tiny.run_tiny("d-opsd", tmp_path, tiny.tiny_settings(max_steps=2))
    seen = tiny.Recorder()
    changed = tiny.tiny_settings(max_steps=2, preview_steps=1, checkpoint_steps=1, methods=["d-opsd"], max_minutes=60)
    tiny.run_tiny("d-opsd", tmp_path, changed, seen)
    assert not seen.steps
    assert not list(tmp_path.glob("train.previous*"))
