"""``dopsd clean``: what nobody needs goes, and nothing that a training goes on from or is known as finished by."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dopsd.clean import tidy
from dopsd.cli import app
from dopsd.config import load_settings
from dopsd.data.cache import EncodingCache
from dopsd.files import write_json
from dopsd.lock import concept_lock
from dopsd.stages import run_stage
from dopsd.train.storage import JobStorage
from tests import tiny
from tests.tiny_project import make_project

SETTINGS = tiny.tiny_settings(max_steps=4, checkpoint_steps=2)


def _train(root: Path, concept: str = "blots", observer=None, settings=SETTINGS, training: str = "0" * 12):
    """A training of the tiny family where a stage would have it."""
    run = root / "runs" / concept
    write_json(run / "train" / "training.json", {"training": training})
    (root / "data/concepts" / concept).mkdir(parents=True, exist_ok=True)
    result = None
    try:
        result = tiny.run_tiny("d-opsd", run, settings, observer)
    finally:  # it names its folder otherwise: in a project each method has its own
        (run / "train" / "d-opsd").mkdir(exist_ok=True)
        for path in [*(run / "train").iterdir()]:
            if path.name not in ("d-opsd", "training.json") and ".previous" not in path.name:
                path.rename(run / "train" / "d-opsd" / path.name)
    about = run / "train/d-opsd/run.json"
    about.write_text(about.read_text().replace('"training": ""', f'"training": "{training}"'))
    return result


def _again(root: Path, settings=SETTINGS, observer=None):
    """The same training once more, where it lies."""
    from dopsd.train.trainer import Place, Training, train

    examples, prompts = tiny.tiny_examples(), tiny.tiny_prompts()
    identity = tiny.tiny_identity(settings, "d-opsd", examples, prompts)
    training = Training("d-opsd", settings, examples, identity, prompts, name="0" * 12)
    place = Place(root / "runs/blots/train/d-opsd", root / "runs/blots/adapters", observer or tiny.Recorder())
    return train(tiny.tiny_family(), training, place)


def _names(root: Path, concept: str | None = None, *, delete: bool = False) -> set[str]:
    found, _ = tidy(root, concept, delete=delete)
    return {path.relative_to(root).as_posix() for one in found for path in one.paths}


def _files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_a_finished_training_stays_finished_without_its_checkpoints(tmp_path: Path) -> None:
    result = _train(tmp_path)
    place = "runs/blots/train/d-opsd/checkpoints"
    before = _files(tmp_path)
    wanted = {f"{place}/step-00000002", f"{place}/step-00000004/tensors.safetensors"}
    assert _names(tmp_path) == wanted
    assert _files(tmp_path) - {"runs/.locks/blots.lock"} == before, "listing deletes nothing"
    (tmp_path / f"{place}/step-00000007.partial").mkdir()
    assert _names(tmp_path, delete=True) == wanted | {f"{place}/step-00000007.partial"}
    assert _names(tmp_path) == set()
    gone = before - _files(tmp_path)
    assert gone == {f"{place}/step-00000002/{name}" for name in ("state.json", "tensors.safetensors")} | {
        f"{place}/step-00000004/tensors.safetensors"
    }
    seen = tiny.Recorder()
    again = _again(tmp_path, observer=seen)
    assert (again.stopped, again.steps, seen.steps) == ("max_steps", 4, [])
    assert again.seconds == result.seconds


def test_one_that_the_clock_ended_goes_on_after_it(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"max_minutes": 1e-9})
    _train(tmp_path, settings=settings)
    assert _names(tmp_path, delete=True) == set()
    longer = _again(tmp_path)
    _train(tmp_path / "whole")
    a, b = ((place / "adapters/d-opsd.safetensors").read_bytes() for place in (
        tmp_path / "runs/blots", tmp_path / "whole/runs/blots"))  # fmt: skip
    assert (longer.steps, a == b) == (4, True)


def test_a_killed_training_keeps_all_that_it_goes_on_from(tmp_path: Path) -> None:
    """Both of its checkpoints, too: the newest may be damaged."""
    settings = SETTINGS.model_copy(update={"checkpoint_steps": 1})
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path, observer=tiny.Cut(3), settings=settings)
    assert len(list((tmp_path / "runs/blots/train/d-opsd/checkpoints").iterdir())) == 2
    storage = JobStorage(str(tmp_path / ".cache/ray"), f"blots-{'0' * 12}")
    storage.save(tmp_path / "runs/blots/train", ["d-opsd"])
    assert _names(tmp_path, delete=True) == set()
    seen = tiny.Recorder()
    _again(tmp_path, observer=seen)
    assert seen.steps == [3, 4]
    assert f".cache/ray/blots-{'0' * 12}" in _names(tmp_path), "now that job is over"


def test_a_finished_job_that_did_not_come_here_yet_stays(tmp_path: Path) -> None:
    """A run says by a message that it is over, and its checkpoints come later: the disk may be full then."""
    _train(tmp_path)
    runs = tmp_path / "runs/blots/train"
    JobStorage(str(tmp_path / ".cache/ray"), f"blots-{'0' * 12}").save(runs, ["d-opsd"])
    assert f".cache/ray/blots-{'0' * 12}" in _names(tmp_path)
    for path in sorted((runs / "d-opsd/checkpoints").iterdir()):
        path.rename(tmp_path / path.name)
    assert f".cache/ray/blots-{'0' * 12}" not in _names(tmp_path)


def test_jobs_of_other_settings_are_over_and_one_that_is_all_there_is_stays(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path, observer=tiny.Cut(3))
    for name in ("blots-aaaaaaaaaaaa", "blots-000000000000", "lost-000000000000", "gone-000000000000"):
        (tmp_path / ".cache/ray" / name / "run").mkdir(parents=True)
    (tmp_path / "data/concepts/lost").mkdir()
    assert _names(tmp_path) == {".cache/ray/blots-aaaaaaaaaaaa", ".cache/ray/gone-000000000000"}
    assert _names(tmp_path, "blots") == {".cache/ray/blots-aaaaaaaaaaaa"}


def test_a_training_that_was_set_aside_stays_and_what_never_had_a_checkpoint_goes(tmp_path: Path) -> None:
    _train(tmp_path)
    train = tmp_path / "runs/blots/train"
    (train / "d-opsd").rename(train / "d-opsd.previous-1")
    (train / "d-opsd.previous/checkpoints").mkdir(parents=True)
    (train / "sft.previous-12").mkdir()
    before = _files(train / "d-opsd.previous-1")
    gone = {"runs/blots/train/d-opsd.previous", "runs/blots/train/sft.previous-12"}
    assert _names(tmp_path, delete=True) == gone
    assert _names(tmp_path) == set()
    assert _files(train / "d-opsd.previous-1") == before
    assert (tmp_path / "runs/blots/adapters/d-opsd.safetensors").exists()


def test_a_busy_concept_is_named_and_nothing_of_it_or_of_all_is_touched(tmp_path: Path) -> None:
    _train(tmp_path, "blots")
    _train(tmp_path, "spots")
    EncodingCache(tmp_path / ".cache/encodings").put("0" * 64, {"a": torch.zeros(1)})
    with concept_lock("blots", tmp_path, "dopsd train"):
        found, skipped = tidy(tmp_path, delete=True)
    assert {path.relative_to(tmp_path).parts[1] for one in found for path in one.paths} == {"spots"}
    assert len(skipped) == 2
    assert skipped[0].startswith("blots is held by `dopsd train`")
    assert (tmp_path / ".cache/encodings" / f"{'0' * 64}.safetensors").exists()
    assert (tmp_path / "runs/blots/train/d-opsd/checkpoints/step-00000002").exists()


def test_encodings_that_the_stages_used_stay_and_others_go(tmp_path: Path) -> None:
    """By the real stages: what was encoded for it is there afterwards, so that nothing is encoded again."""
    root = make_project(tmp_path)
    settings = load_settings(root / "params.yaml", ("tracking.enabled=false", "train.methods=[d-opsd]"))
    for stage in ("validate", "encode", "train", "evaluate"):
        run_stage(stage, "blots", settings, root)
    cache = EncodingCache(root / ".cache/encodings")
    used = set(cache.folder.iterdir())
    assert len(used) > 10
    cache.put("0" * 64, {"a": torch.zeros(1)})
    young, old = (cache.folder / f"{digit * 64}.1.partial" for digit in "12")
    for path, age in ((young, 0), (old, 7200)):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    mine = {name for name in _names(root, delete=True) if name.startswith(".cache")}
    assert mine == {f".cache/encodings/{'0' * 64}.safetensors", f".cache/encodings/{'2' * 64}.1.partial"}
    assert set(cache.folder.iterdir()) == {*used, young}
    (root / "runs/blots/encodings.json").unlink()
    found, skipped = tidy(root, delete=True)
    assert not found
    assert "does not say which it used" in skipped[0]
    assert used <= set(cache.folder.iterdir())


def test_the_command_lists_with_sizes_and_deletes_when_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _train(tmp_path)
    monkeypatch.chdir(tmp_path)
    listed = CliRunner().invoke(app, ["clean"])
    assert listed.exit_code == 0, listed.output
    assert "`dopsd clean --yes` deletes" in listed.output
    assert "kB" in listed.output
    assert "in all" in listed.output
    deleted = CliRunner().invoke(app, ["clean", "--concept", "blots", "--yes"])
    assert "deleted" in deleted.output
    assert not (tmp_path / "runs/blots/train/d-opsd/checkpoints/step-00000002").exists()
    assert CliRunner().invoke(app, ["clean", "--concept", "../x"]).exception is not None
