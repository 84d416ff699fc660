"""The job's storage: what goes on needs and no more, each file once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dopsd.train.storage import JobStorage
from tests import tiny

METHODS = ("d-opsd",)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was killed after its second checkpoint."""
    settings = tiny.tiny_settings(max_steps=6, checkpoint_steps=2, preview_steps=1)
    with pytest.raises(KeyboardInterrupt):
        tiny.run_tiny("d-opsd", tmp_path / "here", settings, tiny.Cut(5))
    (tmp_path / "here" / "train").rename(tmp_path / "here" / "d-opsd")
    return tmp_path / "here"


def _files(place: Path) -> dict[str, Path]:
    return {path.relative_to(place).as_posix(): path for path in place.rglob("*") if path.is_file()}


def test_it_has_what_going_on_needs_and_what_did_not_change_is_not_written_again(run: Path, tmp_path: Path) -> None:
    storage = JobStorage(str(tmp_path / "storage"), "job")
    storage.save(run, METHODS)
    place = tmp_path / "storage" / "job" / "run"
    stored = _files(place)
    newest = "d-opsd/checkpoints/step-00000004"
    assert stored.keys() == {f"{newest}/tensors.safetensors", f"{newest}/state.json", "d-opsd/log.jsonl",
                             "d-opsd/run.json"}  # fmt: skip
    assert all(path.read_bytes() == (run / name).read_bytes() for name, path in stored.items())
    times = {name: os.stat(path).st_ctime_ns for name, path in stored.items()}
    with (run / "d-opsd/log.jsonl").open("a") as log:
        log.write("a row more\n")
    assert "a row more" not in stored["d-opsd/log.jsonl"].read_text(), "what grows is a file of its own"
    storage.save(run, METHODS)
    again = {name: os.stat(path).st_ctime_ns for name, path in _files(place).items()}
    assert [name for name, time in again.items() if times[name] != time] == ["d-opsd/log.jsonl"]


def test_on_one_disk_tensors_are_written_once_and_outlive_every_name_but_one(run: Path, tmp_path: Path) -> None:
    name = "d-opsd/checkpoints/step-00000004/tensors.safetensors"
    content = (run / name).read_bytes()
    storage = JobStorage(str(tmp_path / "storage"), "job")
    storage.save(run, METHODS)
    storage.load(tmp_path / "worker")
    places = (run, tmp_path / "storage" / "job" / "run", tmp_path / "worker")
    assert len({os.stat(place / name).st_ino for place in places}) == 1
    (run / name).unlink()
    (run / name).write_bytes(b"another")
    storage.delete()
    assert (tmp_path / "worker" / name).read_bytes() == content


def test_a_half_copy_that_a_kill_left_is_not_written_through(run: Path, tmp_path: Path) -> None:
    """It may be another name of the very checkpoint."""
    name = "d-opsd/log.jsonl"
    content = (run / name).read_bytes()
    partial = tmp_path / "storage" / "job" / "run" / f"{name}.partial"
    partial.parent.mkdir(parents=True)
    (tmp_path / "kept").write_bytes(b"kept")
    os.link(tmp_path / "kept", partial)
    JobStorage(str(tmp_path / "storage"), "job").save(run, METHODS)
    assert (tmp_path / "kept").read_bytes() == b"kept"
    assert partial.with_suffix("").read_bytes() == content
